//! Quantised tensors and the schemes that make them. How to encode and decode is in `int8` and `four_bit`, both in
//! the layout of bitsandbytes; *where* a scheme applies is an ordered list of (site pattern, scheme).

pub mod calibrate;
mod distortion;
pub mod four_bit;
pub mod int8;

pub use distortion::{Distortion, distortions};
pub use four_bit::{Absmax, Compute, FourBit, FourBitKind, FourBitOptions};
pub use int8::{Int8Input, Int8Rows};

use crate::checkpoint::{Checkpoint, FloatType, Stored};
use crate::error::{Error, Result};
use crate::spec::{HeadSpec, Lin, ModelSpec, Role, Tensor, TensorDef};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// How a tensor is stored and, for the quantised ones, how its linear computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scheme {
    /// Dense f32.
    F32,
    /// Dense f16.
    F16,
    /// Dense bf16.
    Bf16,
    /// int8 rows, int8 per token at run time.
    Int8,
    /// int8 rows, int8 inputs with a scale that calibration found.
    Int8Static,
    /// int8 rows, decoded to float: weight-only linears, embedding tables.
    Int8Weight,
    /// int8 rows, LLM.int8(): input columns with an element >= threshold stay in float.
    BnbInt8 {
        /// Outlier threshold, 6.0 by default.
        threshold: f32,
    },
    /// 4-bit NormalFloat blocks of 64.
    Nf4 {
        /// Whether the block scales are quantised too.
        double_quant: bool,
        /// What the forward computes in.
        compute: Compute,
        /// The type the values are rounded to first and decoded to; none: the one that they are stored in.
        source: Option<FloatType>,
    },
    /// 4-bit float blocks of 64.
    Fp4 {
        /// Whether the block scales are quantised too.
        double_quant: bool,
        /// What the forward computes in.
        compute: Compute,
        /// The type the values are rounded to first and decoded to; none: the one that they are stored in.
        source: Option<FloatType>,
    },
}

impl Scheme {
    /// Every name that [`FromStr`] takes.
    pub const NAMES: [&str; 10] =
        ["f32", "f16", "bf16", "int8", "int8-dynamic", "int8-static", "int8-weight", "bnb-int8", "nf4", "fp4"];

    /// The name, without its options.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::F32 => "f32",
            Scheme::F16 => "f16",
            Scheme::Bf16 => "bf16",
            Scheme::Int8 => "int8",
            Scheme::Int8Static => "int8-static",
            Scheme::Int8Weight => "int8-weight",
            Scheme::BnbInt8 { .. } => "bnb-int8",
            Scheme::Nf4 { .. } => "nf4",
            Scheme::Fp4 { .. } => "fp4",
        }
    }

    /// The scheme that a tensor is stored in; of 4-bit blocks without their source type.
    pub fn of(stored: &Stored) -> Scheme {
        match stored {
            Stored::Float { dtype: FloatType::F32, .. } => Scheme::F32,
            Stored::Float { dtype: FloatType::F16, .. } => Scheme::F16,
            Stored::Float { dtype: FloatType::Bf16, .. } => Scheme::Bf16,
            Stored::Int8(q) => match q.input {
                Int8Input::Dynamic => Scheme::Int8,
                Int8Input::Static { .. } => Scheme::Int8Static,
                Int8Input::Float => Scheme::Int8Weight,
                Int8Input::Mixed { threshold } => Scheme::BnbInt8 { threshold },
            },
            Stored::FourBit(q) => {
                let (double_quant, compute, source) = (matches!(q.absmax, Absmax::Nested { .. }), q.compute, None);
                match q.kind {
                    FourBitKind::Nf4 => Scheme::Nf4 { double_quant, compute, source },
                    FourBitKind::Fp4 => Scheme::Fp4 { double_quant, compute, source },
                }
            }
        }
    }

    /// The float type of a dense scheme.
    pub fn float(self) -> Option<FloatType> {
        match self {
            Scheme::F32 => Some(FloatType::F32),
            Scheme::F16 => Some(FloatType::F16),
            Scheme::Bf16 => Some(FloatType::Bf16),
            _ => None,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Scheme {
    type Err = Error;

    fn from_str(name: &str) -> Result<Scheme> {
        let (double_quant, compute, source) = (true, Compute::Bf16, None);
        Ok(match name {
            "f32" => Scheme::F32,
            "f16" => Scheme::F16,
            "bf16" => Scheme::Bf16,
            "int8" | "int8-dynamic" => Scheme::Int8,
            "bnb-int8" => Scheme::BnbInt8 { threshold: int8::THRESHOLD },
            "nf4" => Scheme::Nf4 { double_quant, compute, source },
            "fp4" => Scheme::Fp4 { double_quant, compute, source },
            "int8-weight" => Scheme::Int8Weight,
            "int8-static" => Scheme::Int8Static,
            _ => {
                let names = Scheme::NAMES.join(", ");
                return Err(Error::invalid(format!("unknown scheme {name:?}, expected one of {names}")));
            }
        })
    }
}

/// The short name of a linear in patterns, recipes and reports: `layer.0.query`, `.key`, `.value`, `.attention_out`,
/// `.ffn_up`, `.ffn_down`; elsewhere its module name.
pub fn site(spec: &ModelSpec, lin: Lin) -> String {
    match lin {
        Lin::Query(l) => format!("layer.{l}.query"),
        Lin::Key(l) => format!("layer.{l}.key"),
        Lin::Value(l) => format!("layer.{l}.value"),
        Lin::Out(l) => format!("layer.{l}.attention_out"),
        Lin::Up(l) => format!("layer.{l}.ffn_up"),
        Lin::Down(l) => format!("layer.{l}.ffn_down"),
        Lin::EmbedProjection | Lin::HeadDense | Lin::Classifier | Lin::UnusedPooler => {
            let module = spec.module(lin);
            module.strip_prefix(&spec.prefix).map(str::to_owned).unwrap_or(module)
        }
    }
}

/// The linears that stay float unless somebody says otherwise: the last one, as transformers 4.57 keeps it.
/// transformers 5 reads a skip list by suffix, so DistilBERT's `pre_classifier` stays with its `classifier`.
pub fn default_keep(spec: &ModelSpec) -> Vec<String> {
    let mut keep = vec![];
    if spec.head != HeadSpec::None {
        let (dense, last) = (spec.module(Lin::HeadDense), spec.module(Lin::Classifier));
        if spec.head_flow().is_some() && dense.ends_with(&last) {
            keep.push(dense);
        }
        keep.push(last);
    }
    keep
}

/// `*` stands for any characters, dots included.
fn glob(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name
            .strip_prefix(start)
            .is_some_and(|tail| (0..=tail.len()).any(|i| tail.get(i..).is_some_and(|t| glob(rest, t)))),
    }
}

/// The names that a pattern may match for a tensor: module with and without the body's prefix, short name.
fn names(spec: &ModelSpec, def: &TensorDef) -> Vec<String> {
    let module = def.name.rsplit_once('.').map_or(def.name.as_str(), |(module, _)| module);
    let bare = module.strip_prefix(&spec.prefix).unwrap_or(module);
    let mut names = vec![module.to_owned(), bare.to_owned()];
    if let Tensor::W(lin) | Tensor::B(lin) = def.tensor {
        names.push(site(spec, lin));
    }
    names
}

/// Which scheme every tensor gets: of the patterns that match a tensor's module, the last one holds. What `keep`
/// matches is not quantised, but takes a dense scheme (f32, f16, bf16); so do biases and LayerNorms. A rule about
/// linears says nothing about embedding tables: they are quantised by patterns that match no linear
/// (`embeddings.*=int8`). None: no pattern matches.
///
/// # Errors
/// A pattern matches nothing, or an embedding table is to have a scheme that is about the input of a linear.
pub fn assign(
    spec: &ModelSpec,
    schemes: &[(String, Scheme)],
    keep: &[String],
) -> Result<Vec<(TensorDef, Option<Scheme>)>> {
    let named = |def: TensorDef| (names(spec, &def), def);
    let table: Vec<(Vec<String>, TensorDef)> = spec.tensors().into_iter().map(named).collect();
    let matches = |pattern: &str, names: &[String]| names.iter().any(|n| glob(pattern, n));
    for pattern in schemes.iter().map(|(p, _)| p).chain(keep) {
        if !table.iter().any(|(names, _)| matches(pattern, names)) {
            let sites: Vec<_> = spec.linears().into_iter().map(|(lin, _, _)| site(spec, lin)).collect();
            return Err(Error::invalid(format!(
                "site pattern {pattern:?} matches nothing; the linears are: {} (`*` stands for any characters)",
                sites.join(", ")
            )));
        }
    }
    let linears = || table.iter().filter(|(_, def)| def.role == Role::Weight);
    let about_linears: Vec<bool> =
        schemes.iter().map(|(p, _)| linears().any(|(names, _)| matches(p, names))).collect();
    let choose = |(names, def): &(Vec<String>, TensorDef)| {
        let kept = keep.iter().any(|k| matches(k, names)) || def.is_empty();
        let fits = |(i, (pattern, scheme)): &(usize, &(String, Scheme))| {
            let quantises = match def.role {
                Role::Weight => !kept,
                Role::Embedding => !kept && !about_linears[*i],
                Role::Norm | Role::Bias => false,
            };
            matches(pattern, names) && (scheme.float().is_some() || quantises)
        };
        let scheme = schemes.iter().enumerate().rev().find(fits).map(|(_, (_, scheme))| *scheme);
        let scheme = match (def.role, scheme) {
            (Role::Embedding, Some(Scheme::Int8)) => Some(Scheme::Int8Weight),
            (Role::Embedding, Some(Scheme::Nf4 { double_quant, source, .. })) => {
                Some(Scheme::Nf4 { double_quant, compute: Compute::F32, source })
            }
            (Role::Embedding, Some(Scheme::Fp4 { double_quant, source, .. })) => {
                Some(Scheme::Fp4 { double_quant, compute: Compute::F32, source })
            }
            (Role::Embedding, Some(other @ (Scheme::Int8Static | Scheme::BnbInt8 { .. }))) => {
                let name = &def.name;
                return Err(Error::invalid(format!(
                    "{name} is looked up, not multiplied: int8 instead of {other}"
                )));
            }
            (_, scheme) => scheme,
        };
        Ok((def.clone(), scheme))
    };
    table.iter().map(choose).collect()
}

/// Stores a checkpoint's tensors in the schemes that [`assign`] gives them; those without one stay as they are.
///
/// # Errors
/// A pattern matches nothing, a weight is quantised already in another scheme, or a value does not fit into f16.
pub fn quantise(ck: &Checkpoint, schemes: &[(String, Scheme)], keep: &[String]) -> Result<Checkpoint> {
    quantise_calibrated(ck, schemes, keep, &BTreeMap::new())
}

/// As [`quantise`], with the absmax of the inputs of linears that are to be `int8-static` (see
/// [`calibrate::observe`]).
///
/// # Errors
/// As [`quantise`]; a static linear whose input was not seen.
pub fn quantise_calibrated(
    ck: &Checkpoint,
    schemes: &[(String, Scheme)],
    keep: &[String],
    ranges: &BTreeMap<Lin, f32>,
) -> Result<Checkpoint> {
    let mut out = ck.clone();
    for (def, scheme) in assign(&ck.spec, schemes, keep)? {
        if let Some(scheme) = scheme.filter(|s| Scheme::of(ck.get(def.tensor)) != *s) {
            out.set(def.tensor, store(ck, &def, scheme, ranges)?);
        }
    }
    Ok(out)
}

/// Whether int8 and 4-bit linears stand in one file: bitsandbytes has one scheme a model, so that no other program reads
/// them.
pub fn is_mixed(ck: &Checkpoint) -> bool {
    let linears = || ck.tensors().filter(|(def, _)| def.role == Role::Weight).map(|(_, stored)| stored);
    linears().any(|t| matches!(t, Stored::Int8(_))) && linears().any(|t| matches!(t, Stored::FourBit(_)))
}

fn store(ck: &Checkpoint, def: &TensorDef, scheme: Scheme, ranges: &BTreeMap<Lin, f32>) -> Result<Stored> {
    let old = ck.get(def.tensor);
    if scheme.float().is_none() && !matches!(old, Stored::Float { .. }) {
        return Err(Error::invalid(format!(
            "{} is stored as {} already; make {scheme} from the float model it came from",
            def.name,
            Scheme::of(old)
        )));
    }
    let dtype = if let Stored::Float { dtype, .. } = old { *dtype } else { FloatType::F32 };
    let values = ck.values(def.tensor);
    let through_f16 = match scheme {
        Scheme::F16 | Scheme::Int8 | Scheme::Int8Static | Scheme::Int8Weight | Scheme::BnbInt8 { .. } => true,
        Scheme::Nf4 { source, .. } | Scheme::Fp4 { source, .. } => source == Some(FloatType::F16),
        Scheme::F32 | Scheme::Bf16 => false,
    };
    if through_f16 && let Some(i) = values.iter().position(|v| !FloatType::F16.round(*v).is_finite()) {
        let through = if scheme == Scheme::F16 { "" } else { ", which goes through f16" };
        return Err(Error::invalid(format!(
            "{}: element {i} is {}, too large for {scheme}{through} (at most 65504); use bf16",
            def.name, values[i]
        )));
    }
    let absmax = match (scheme, def.tensor) {
        // The unused pooler has no input at all.
        (_, Tensor::W(Lin::UnusedPooler)) => Some(0.0),
        (_, Tensor::W(lin)) => ranges.get(&lin).copied(),
        _ => None,
    };
    if scheme == Scheme::Int8Static && absmax.is_none() {
        return Err(Error::invalid(format!("{}: {scheme} needs calibration sentences", def.name)));
    }
    let columns = def.shape.last().copied().unwrap_or(1);
    Ok(encode(&values, columns, scheme, dtype, absmax.unwrap_or(0.0)))
}

/// Rows of `columns` values in a scheme. `dtype` is the type that they are stored in; `absmax` is of the input, for
/// `int8-static` alone. A value beyond f16 makes an int8 row that decodes to NaN.
pub fn encode(values: &[f32], columns: usize, scheme: Scheme, dtype: FloatType, absmax: f32) -> Stored {
    let int8 = |input| Stored::Int8(Int8Rows::encode(values, columns, input));
    let four_bit = |kind, double_quant, compute, source: Option<FloatType>| {
        let (source, block) = (source.unwrap_or(dtype), four_bit::BLOCK);
        Stored::FourBit(FourBit::encode(values, FourBitOptions { kind, double_quant, source, compute, block }))
    };
    let dense = |dtype: FloatType| Stored::Float { dtype, data: values.iter().map(|&v| dtype.round(v)).collect() };
    match scheme {
        Scheme::F32 => dense(FloatType::F32),
        Scheme::F16 => dense(FloatType::F16),
        Scheme::Bf16 => dense(FloatType::Bf16),
        Scheme::Int8 => int8(Int8Input::Dynamic),
        Scheme::Int8Static => int8(Int8Input::Static { absmax }),
        Scheme::Int8Weight => int8(Int8Input::Float),
        Scheme::BnbInt8 { threshold } => int8(Int8Input::Mixed { threshold }),
        Scheme::Nf4 { double_quant, compute, source } => four_bit(FourBitKind::Nf4, double_quant, compute, source),
        Scheme::Fp4 { double_quant, compute, source } => four_bit(FourBitKind::Fp4, double_quant, compute, source),
    }
}
