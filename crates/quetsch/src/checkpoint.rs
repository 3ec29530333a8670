//! Canonical weights in memory: a spec and one [`Stored`] tensor per row of [`ModelSpec::tensors`].
//!
//! Canonical means: as the file holds them, independent of the CPU. `runtime` packs them for a machine, `dir` reads
//! and writes them as Hugging Face model directories. Pruning and quantisation are functions from checkpoint to
//! checkpoint.

use crate::error::{Error, Result};
use crate::quant::{FourBit, Int8Rows};
use crate::spec::{ModelSpec, Role, Tensor, TensorDef};
use quetsch_kernels::math::Rounding;
use std::borrow::Cow;
use std::collections::HashMap;

/// The type a float tensor has in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE 754 binary32.
    #[default]
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// All of them.
    pub const ALL: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

    /// The name in configs, as torch has it.
    pub fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "float32",
            FloatType::F16 => "float16",
            FloatType::Bf16 => "bfloat16",
        }
    }

    /// The type of such a name.
    pub fn named(name: &str) -> Option<FloatType> {
        FloatType::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Rounding to this type, as the kernels know it.
    pub fn rounding(self) -> Rounding {
        match self {
            FloatType::F32 => Rounding::F32,
            FloatType::F16 => Rounding::F16,
            FloatType::Bf16 => Rounding::Bf16,
        }
    }

    /// The nearest value of this type.
    pub fn round(self, x: f32) -> f32 {
        match self {
            FloatType::F32 => x,
            FloatType::F16 => half::f16::from_f32(x).to_f32(),
            FloatType::Bf16 => half::bf16::from_f32(x).to_f32(),
        }
    }

    /// Values of this type as they lie in a file, as f32.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let half = |bytes: &[u8], out: &mut [f32], f: fn([u8; 2]) -> f32| {
            bytes.as_chunks().0.iter().zip(out).for_each(|(b, o)| *o = f(*b));
        };
        match self {
            FloatType::F32 => {
                bytes.as_chunks().0.iter().zip(out).for_each(|(b, o)| *o = f32::from_le_bytes(*b));
            }
            FloatType::F16 => half(bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
            FloatType::Bf16 => half(bytes, out, |b| half::bf16::from_le_bytes(b).to_f32()),
        }
    }
}

/// One tensor as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    /// Float values; `data` is exact in `dtype`.
    Float {
        /// The type in the file.
        dtype: FloatType,
        /// The values, row-major.
        data: Vec<f32>,
    },
    /// 8-bit rows with one scale each.
    Int8(Int8Rows),
    /// 4-bit blocks (NF4 or FP4).
    FourBit(FourBit),
}

impl Stored {
    /// f32 values kept as f32.
    pub fn f32(data: Vec<f32>) -> Stored {
        Stored::Float { dtype: FloatType::F32, data }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Stored::Float { data, .. } => data.len(),
            Stored::Int8(q) => q.values.len(),
            Stored::FourBit(q) => q.len,
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as f32, dequantised if need be.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self {
            Stored::Float { data, .. } => data.into(),
            Stored::Int8(q) => q.dequantise().into(),
            Stored::FourBit(q) => q.dequantise().into(),
        }
    }
}

/// A model: shape, labels, weights, and what of its `config.json` the spec does not hold.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The shape.
    pub spec: ModelSpec,
    /// Label names by class index; empty for a bare body.
    pub labels: Vec<String>,
    /// Longest input in tokens that the model was made for (`max_length` in config.json), if it says so.
    pub max_length: Option<usize>,
    /// `config.json` as read, so that keys which Quetsch does not know survive a round trip.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// What the reader noticed and went on from (say, label names that disagree).
    pub warnings: Vec<String>,
    tensors: Vec<Stored>,
    index: HashMap<Tensor, usize>,
}

impl Checkpoint {
    /// A checkpoint whose tensors are made by `f`, in the order of the table.
    ///
    /// # Errors
    /// Whatever `f` returns, a spec that cannot be, or a tensor of the wrong length.
    pub fn from_fn(
        spec: ModelSpec,
        labels: Vec<String>,
        mut f: impl FnMut(&TensorDef) -> Result<Stored>,
    ) -> Result<Checkpoint> {
        spec.validate()?;
        let table = spec.tensors();
        let mut tensors = Vec::with_capacity(table.len());
        for def in &table {
            let t = f(def)?;
            if t.len() != def.len() {
                return Err(Error::invalid(format!(
                    "tensor {}: expected {} elements {:?}, found {}",
                    def.name,
                    def.len(),
                    def.shape,
                    t.len()
                )));
            }
            tensors.push(t);
        }
        let index = table.iter().enumerate().map(|(i, d)| (d.tensor, i)).collect();
        let config = serde_json::Map::new();
        Ok(Checkpoint { spec, labels, max_length: None, config, warnings: vec![], tensors, index })
    }

    /// A checkpoint of some tensors: what [`Checkpoint::get`] may ask for, and no more.
    pub fn part(spec: ModelSpec, tensors: Vec<(Tensor, Stored)>) -> Checkpoint {
        let index = tensors.iter().enumerate().map(|(i, (t, _))| (*t, i)).collect();
        let (labels, warnings, config) = (vec![], vec![], serde_json::Map::new());
        let tensors = tensors.into_iter().map(|(_, stored)| stored).collect();
        Checkpoint { spec, labels, max_length: None, config, warnings, tensors, index }
    }

    /// Row of the table of tensors.
    ///
    /// # Panics
    /// When the spec has no such tensor: sites come from the spec, so that is a bug of the caller.
    pub fn id(&self, tensor: Tensor) -> usize {
        self.index[&tensor]
    }

    /// A tensor as stored.
    pub fn get(&self, tensor: Tensor) -> &Stored {
        &self.tensors[self.id(tensor)]
    }

    /// Replaces a tensor by one of the same number of elements.
    pub fn set(&mut self, tensor: Tensor, value: Stored) {
        let id = self.id(tensor);
        assert_eq!(self.tensors[id].len(), value.len(), "{tensor:?}");
        self.tensors[id] = value;
    }

    /// A tensor's values as f32, dequantised if need be.
    pub fn values(&self, tensor: Tensor) -> Cow<'_, [f32]> {
        self.get(tensor).values()
    }

    /// Every row of the table with its tensor.
    pub fn tensors(&self) -> impl Iterator<Item = (TensorDef, &Stored)> {
        let here = |def: TensorDef| self.index.get(&def.tensor).map(|&i| (def, &self.tensors[i]));
        self.spec.tensors().into_iter().filter_map(here)
    }

    /// The same model with every tensor as f32 values: what training, pruning and quantising start from.
    pub fn to_f32(&self) -> Checkpoint {
        let tensors = self.tensors().map(|(d, _)| Stored::f32(self.values(d.tensor).into_owned())).collect();
        Checkpoint { tensors, ..self.clone() }
    }

    /// Whether any tensor is stored quantised.
    pub fn is_quantised(&self) -> bool {
        self.tensors.iter().any(|t| !matches!(t, Stored::Float { .. }))
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.tensors.iter().map(Stored::len).sum()
    }

    /// Random weights as transformers initialises BERT: N(0, 0.02) for tables and linears, LayerNorm at identity.
    pub fn random(spec: ModelSpec, labels: Vec<String>, seed: u64) -> Result<Checkpoint> {
        let mut rng = crate::rng::Rng::new(seed);
        Checkpoint::from_fn(spec, labels, |def| {
            let value = match (def.role, def.tensor) {
                (Role::Embedding | Role::Weight, _) => (0..def.len()).map(|_| 0.02 * rng.normal()).collect(),
                (_, Tensor::Gamma(_)) => vec![1.0; def.len()],
                _ => vec![0.0; def.len()],
            };
            Ok(Stored::f32(value))
        })
    }
}
