//! One row of the table of tensors <-> its entries in a safetensors file: plain floats, or the several entries that
//! bitsandbytes keeps for an int8 or 4-bit weight.

use super::rows::{RowType, Rows};
use super::shards::{Entry, Shards};
use crate::checkpoint::{Checkpoint, FloatType, Stored};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::quant::{self, Absmax, Compute, FourBit, FourBitKind, Int8Input, Int8Rows, Scheme};
use crate::spec::{Role, TensorDef};
use half::{bf16, f16};
use safetensors::Dtype;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt::Debug;

/// Reads the rows of the table and collects everything that is wrong with the file on the way.
pub struct Reader<'a> {
    shards: &'a Shards,
    config: &'a Config,
    used: &'a mut HashSet<String>,
    problems: Vec<String>,
}

/// A row, or what is wrong with it.
type Read<T> = std::result::Result<T, String>;

impl<'a> Reader<'a> {
    /// `used` collects the entries that were asked for.
    pub fn new(shards: &'a Shards, config: &'a Config, used: &'a mut HashSet<String>) -> Reader<'a> {
        Reader { shards, config, used, problems: vec![] }
    }

    pub fn read(&mut self, def: &TensorDef) -> Option<Stored> {
        let read = match self.take(&def.name) {
            None => Err(format!("missing {} {:?}", def.name, def.shape)),
            Some(entry) => match (entry.dtype, def.role) {
                (Dtype::F32 | Dtype::F16 | Dtype::BF16, _) => self.float(def, entry),
                (Dtype::I8, Role::Weight | Role::Embedding) => self.int8(def, entry).map(Stored::Int8),
                (Dtype::U8, Role::Weight | Role::Embedding) => self.four_bit(def, entry).map(Stored::FourBit),
                (other, Role::Weight | Role::Embedding) => {
                    Err(format!("{}: type {other}, expected F32, F16, BF16, I8 or U8", def.name))
                }
                (other, _) => Err(format!("{}: type {other}, expected F32, F16 or BF16", def.name)),
            },
        };
        read.map_err(|problem| self.problems.push(problem)).ok()
    }

    /// A table whose rows stay in the file; nothing if something is wrong with it.
    pub fn rows(&mut self, def: &TensorDef) -> Option<Rows> {
        let entry = self.take(&def.name)?;
        let kind = match entry.dtype {
            Dtype::F32 => RowType::Float(FloatType::F32),
            Dtype::F16 => RowType::Float(FloatType::F16),
            Dtype::BF16 => RowType::Float(FloatType::Bf16),
            Dtype::I8 => RowType::Int8 { scb: self.int8_scales(def, entry).ok()?.0 },
            Dtype::U8 => RowType::FourBit(self.four_bit_scales(def, entry).ok()?),
            _ => return None,
        };
        if matches!(kind, RowType::Float(_)) {
            expect_shape(&def.name, &def.shape, &entry.shape).ok()?;
        }
        let (file, path, start) = self.shards.place(entry);
        Some(Rows::new(file, path.to_owned(), start, def.shape[0], def.shape[1], kind))
    }

    /// Everything that was wrong, with the tensors that nobody asked for.
    pub fn finish(mut self) -> Vec<String> {
        let extra = self.shards.names().filter(|n| !self.used.contains(*n) && !foreign(n));
        let extra = extra.filter_map(|n| Some(format!("extra {n} {:?}", self.shards.get(n)?.shape)));
        self.problems.extend(extra);
        self.problems
    }

    fn take(&mut self, name: &str) -> Option<&'a Entry> {
        let entry = self.shards.get(name)?;
        self.used.insert(name.to_owned());
        Some(entry)
    }

    fn float(&self, def: &TensorDef, entry: &Entry) -> Read<Stored> {
        expect_shape(&def.name, &def.shape, &entry.shape)?;
        let bytes = self.shards.bytes(entry);
        let half = |of: fn([u8; 2]) -> f32| bytes.as_chunks().0.iter().map(|&b| of(b)).collect();
        let (dtype, data): (_, Vec<f32>) = match entry.dtype {
            Dtype::F16 => (FloatType::F16, half(|b| f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => (FloatType::Bf16, half(|b| bf16::from_le_bytes(b).to_f32())),
            _ => (FloatType::F32, floats(bytes)),
        };
        expect_finite(&def.name, &data)?;
        Ok(Stored::Float { dtype, data })
    }

    fn int8(&mut self, def: &TensorDef, entry: &Entry) -> Read<Int8Rows> {
        let (scb, input) = self.int8_scales(def, entry)?;
        let values = self.shards.bytes(entry).iter().map(|&b| b as i8).collect();
        Ok(Int8Rows { values, scb, input })
    }

    /// What stands beside the integers.
    fn int8_scales(&mut self, def: &TensorDef, entry: &Entry) -> Read<(Vec<f32>, Int8Input)> {
        let module = def.name.trim_end_matches(".weight");
        let scb = self.magnitudes(&format!("{module}.SCB"), &def.shape[..1]);
        if let Some(format) = self.take(&format!("{module}.weight_format"))
            && self.shards.bytes(format) != [0]
        {
            return Err(format!("{module}.weight_format: {:?}, expected [0] (rows)", self.shards.bytes(format)));
        }
        // As one column, too: linears that stand beside 4-bit ones.
        if def.role == Role::Embedding || entry.shape != column(def) {
            expect_shape(&def.name, &int8_shape(def, false), &entry.shape)?;
        }
        let threshold = self.config.threshold;
        let input = match self.config.sites.get(module) {
            _ if def.role == Role::Embedding => Int8Input::Float,
            Some(Scheme::Int8) => Int8Input::Dynamic,
            Some(Scheme::Int8Weight) => Int8Input::Float,
            Some(Scheme::Int8Static) => {
                Int8Input::Static { absmax: self.magnitudes(&format!("{module}.{INPUT_ABSMAX}"), &[1])?[0] }
            }
            _ => Int8Input::Mixed { threshold },
        };
        Ok((scb?, input))
    }

    fn four_bit(&mut self, def: &TensorDef, entry: &Entry) -> Read<FourBit> {
        let blocks = self.four_bit_scales(def, entry)?;
        Ok(FourBit { packed: self.shards.bytes(entry).to_vec(), ..blocks })
    }

    /// What stands beside the codes.
    fn four_bit_scales(&mut self, def: &TensorDef, entry: &Entry) -> Read<FourBit> {
        let name = &def.name;
        // Taken up front, so that one wrong entry does not make extras of its neighbours.
        let scales = self.take(&format!("{name}.absmax"));
        let map = self.f32s(&format!("{name}.quant_map"), &[16]);
        let nested_map = self.f32s(&format!("{name}.nested_quant_map"), &[256]);
        let nested_absmax = self.take(&format!("{name}.nested_absmax"));
        let kinds = [FourBitKind::Nf4, FourBitKind::Fp4];
        let state = kinds.map(|k| (k, self.take(&format!("{name}.{}", state_key(k)))));
        let Some((kind, state)) = state.into_iter().find_map(|(k, e)| Some((k, e?))) else {
            return Err(format!("missing {name}.{} (or __fp4)", state_key(FourBitKind::Nf4)));
        };
        let state: QuantState = serde_json::from_slice(self.shards.bytes(state))
            .map_err(|e| format!("{name}.{}: {e}", state_key(kind)))?;
        let wrong = |what: &str, found: &dyn Debug, expected: &dyn Debug| {
            Err(format!("{name}.{}: {what} is {found:?}, expected {expected:?}", state_key(kind)))
        };
        if state.quant_type != kind_name(kind) {
            return wrong("quant_type", &state.quant_type, &kind_name(kind));
        }
        if state.shape != def.shape {
            return Err(format!("{name}: expected shape {:?}, found {:?}", def.shape, state.shape));
        }
        if !BLOCKS.contains(&state.blocksize) {
            return wrong("blocksize", &state.blocksize, &format_args!("1 to {}", BLOCKS.end()));
        }
        let Some(source) = FloatType::named(&state.dtype) else {
            return wrong("dtype", &state.dtype, &FloatType::ALL.map(FloatType::name));
        };
        let len = def.len();
        let packed = self.shards.bytes(entry).len();
        if packed != len.div_ceil(2) {
            return Err(format!("{name}: {packed} packed bytes, expected {}", len.div_ceil(2)));
        }
        let blocks = len.div_ceil(state.blocksize);
        let Some(scales) = scales else { return Err(format!("missing {name}.absmax [{blocks}]")) };
        expect_shape(&format!("{name}.absmax"), &[blocks], &scales.shape)?;
        let absmax = match (scales.dtype, state.nested_blocksize) {
            (Dtype::F32, None) => Absmax::Plain(self.magnitudes(&format!("{name}.absmax"), &[blocks])?),
            (Dtype::U8, Some(nested_block)) => {
                let Some(offset) = state.nested_offset.map(|o| o as f32).filter(|o| o.is_finite()) else {
                    return wrong("nested_offset", &state.nested_offset, &"a number");
                };
                if !BLOCKS.contains(&nested_block) {
                    return wrong("nested_blocksize", &nested_block, &format_args!("1 to {}", BLOCKS.end()));
                }
                if state.nested_dtype.as_deref() != Some("float32") {
                    return wrong("nested_dtype", &state.nested_dtype, &"float32");
                }
                if nested_absmax.is_none() {
                    return Err(format!("missing {name}.nested_absmax"));
                }
                let nested = self.magnitudes(&format!("{name}.nested_absmax"), &[blocks.div_ceil(nested_block)])?;
                let codes = self.shards.bytes(scales).to_vec();
                Absmax::Nested { codes, map: nested_map?, nested_absmax: nested, nested_block, offset }
            }
            (other, nested) => {
                return Err(format!(
                    "{name}.absmax: type {other} with nested_blocksize {nested:?}, expected F32 without or U8 with"
                ));
            }
        };
        let compute = match def.role {
            Role::Embedding => Compute::F32,
            _ => self.config.compute,
        };
        Ok(FourBit { kind, map: map?, packed: vec![], len, block: state.blocksize, absmax, source, compute })
    }

    /// Largest magnitudes: finite and never negative.
    fn magnitudes(&mut self, name: &str, shape: &[usize]) -> Read<Vec<f32>> {
        let data = self.f32s(name, shape)?;
        match data.iter().position(|x| *x < 0.0) {
            None => Ok(data),
            Some(i) => Err(format!("{name}: element {i} is {}, expected 0 or more", data[i])),
        }
    }

    /// A helper entry that must be f32 and finite.
    fn f32s(&mut self, name: &str, shape: &[usize]) -> Read<Vec<f32>> {
        let Some(entry) = self.take(name) else { return Err(format!("missing {name} {shape:?}")) };
        if entry.dtype != Dtype::F32 {
            return Err(format!("{name}: type {}, expected F32", entry.dtype));
        }
        expect_shape(name, shape, &entry.shape)?;
        let data = floats(self.shards.bytes(entry));
        expect_finite(name, &data)?;
        Ok(data)
    }
}

/// What the tensors of pre-training heads start with: BERT, RoBERTa, DistilBERT, ELECTRA.
const PRETRAINING: [&str; 8] = [
    "cls.",
    "lm_head.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
    "discriminator_predictions.",
    "generator_predictions.",
    "generator_lm_head.",
];

/// Tensors of other tasks and buffers that stand beside a body and are none of our business.
fn foreign(name: &str) -> bool {
    name.ends_with("position_ids") || PRETRAINING.iter().any(|p| name.starts_with(p))
}

/// Our own entry beside a static int8 weight: the input's absmax, not divided by 127, as SCB is.
const INPUT_ABSMAX: &str = "input_absmax";

/// The shape in the file of an int8 tensor. Embedding tables, and linears in a file that has 4-bit ones as well, are one
/// column, as all 4-bit tensors are: a loader that expects floats there stops at the shape, where the true one would let
/// it read codes as if they were weights.
fn int8_shape(def: &TensorDef, is_mixed: bool) -> Vec<usize> {
    match def.role == Role::Embedding || is_mixed {
        true => column(def),
        false => def.shape.clone(),
    }
}

fn column(def: &TensorDef) -> Vec<usize> {
    vec![def.len(), 1]
}

fn expect_shape(name: &str, expected: &[usize], found: &[usize]) -> Read<()> {
    match expected == found {
        true => Ok(()),
        false => Err(format!("{name}: expected shape {expected:?}, found {found:?}")),
    }
}

fn expect_finite(name: &str, data: &[f32]) -> Read<()> {
    match data.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(i) => Err(format!("{name}: element {i} is {}, expected a finite number", data[i])),
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn kind_name(kind: FourBitKind) -> &'static str {
    match kind {
        FourBitKind::Nf4 => "nf4",
        FourBitKind::Fp4 => "fp4",
    }
}

fn state_key(kind: FourBitKind) -> String {
    format!("quant_state.bitsandbytes__{}", kind_name(kind))
}

/// Elements of a block, as far as there are such files.
const BLOCKS: std::ops::RangeInclusive<usize> = 1..=1 << 16;

/// The JSON beside a 4-bit weight; its loader takes no other key, so neither does this one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// The same JSON as Python's `json.dumps` writes it, to the byte.
fn quant_state(q: &FourBit, shape: &[usize]) -> String {
    let head = format!(
        "{{\"quant_type\": \"{}\", \"blocksize\": {}, \"dtype\": \"{}\", \"shape\": {shape:?}",
        kind_name(q.kind),
        q.block,
        q.source.name()
    );
    match &q.absmax {
        Absmax::Plain(_) => head + "}",
        Absmax::Nested { nested_block, offset, .. } => format!(
            "{head}, \"nested_blocksize\": {nested_block}, \"nested_dtype\": \"float32\", \"nested_offset\": {}}}",
            python_float(*offset as f64)
        ),
    }
}

/// `repr` of a Python float: the shortest digits that read back, an exponent of two digits below 1e-4.
fn python_float(x: f64) -> String {
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}");
    }
    let s = format!("{x:e}");
    match s.split_once('e') {
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(e) => format!("{digits}e-{e:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
        None => s,
    }
}

/// A tensor on its way into the file.
struct Row<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Payload<'a>,
}

enum Payload<'a> {
    Floats(FloatType, &'a [f32]),
    Int8(&'a [i8]),
    Bytes(Cow<'a, [u8]>),
}

impl safetensors::View for Row<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.data {
            Payload::Floats(FloatType::F32, x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Payload::Floats(FloatType::F16, x) => x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Payload::Floats(FloatType::Bf16, x) => {
                x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
            }
            Payload::Int8(x) => x.iter().map(|&x| x as u8).collect(),
            Payload::Bytes(b) => Cow::Borrowed(b),
        }
    }

    fn data_len(&self) -> usize {
        match &self.data {
            Payload::Floats(FloatType::F32, x) => 4 * x.len(),
            Payload::Floats(_, x) => 2 * x.len(),
            Payload::Int8(x) => x.len(),
            Payload::Bytes(b) => b.len(),
        }
    }
}

fn f32_row(x: &[f32]) -> Row<'_> {
    Row { dtype: Dtype::F32, shape: vec![x.len()], data: Payload::Floats(FloatType::F32, x) }
}

fn u8_row<'a>(shape: Vec<usize>, bytes: impl Into<Cow<'a, [u8]>>) -> Row<'a> {
    Row { dtype: Dtype::U8, shape, data: Payload::Bytes(bytes.into()) }
}

/// The bytes of `model.safetensors`.
pub fn serialize(ck: &Checkpoint) -> Result<Vec<u8>> {
    let is_mixed = quant::is_mixed(ck);
    let mut rows: Vec<(String, Row)> = vec![];
    for (def, stored) in ck.tensors() {
        let int8_shape = int8_shape(&def, is_mixed);
        let (name, shape) = (def.name, def.shape);
        match stored {
            Stored::Float { dtype, data } => {
                let in_file = match dtype {
                    FloatType::F32 => Dtype::F32,
                    FloatType::F16 => Dtype::F16,
                    FloatType::Bf16 => Dtype::BF16,
                };
                rows.push((name, Row { dtype: in_file, shape, data: Payload::Floats(*dtype, data) }));
            }
            Stored::Int8(q) => {
                let module = name.trim_end_matches(".weight");
                rows.push((format!("{module}.SCB"), f32_row(&q.scb)));
                rows.push((format!("{module}.weight_format"), u8_row(vec![], vec![0])));
                if let Int8Input::Static { absmax } = &q.input {
                    rows.push((format!("{module}.{INPUT_ABSMAX}"), f32_row(std::slice::from_ref(absmax))));
                }
                rows.push((name, Row { dtype: Dtype::I8, shape: int8_shape, data: Payload::Int8(&q.values) }));
            }
            Stored::FourBit(q) => {
                let state = quant_state(q, &shape).into_bytes();
                rows.push((format!("{name}.{}", state_key(q.kind)), u8_row(vec![state.len()], state)));
                rows.push((format!("{name}.quant_map"), f32_row(&q.map)));
                match &q.absmax {
                    Absmax::Plain(scales) => rows.push((format!("{name}.absmax"), f32_row(scales))),
                    Absmax::Nested { codes, map, nested_absmax, .. } => rows.extend([
                        (format!("{name}.absmax"), u8_row(vec![codes.len()], codes)),
                        (format!("{name}.nested_quant_map"), f32_row(map)),
                        (format!("{name}.nested_absmax"), f32_row(nested_absmax)),
                    ]),
                }
                rows.push((name, u8_row(vec![q.packed.len(), 1], &q.packed)));
            }
        }
    }
    // transformers 4.57 refuses a file whose metadata has no format.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(rows, Some(metadata)).map_err(|e| Error::invalid(format!("model.safetensors: {e}")))
}
