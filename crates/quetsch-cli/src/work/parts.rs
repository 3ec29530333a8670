//! What a model's bytes are spent on: parts, and the scheme of every linear.

use quetsch::checkpoint::{Checkpoint, FloatType, Stored};
use quetsch::quant::{self, Scheme};
use quetsch::spec::{Lin, Role, Tensor};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;

/// The part of the model that a tensor belongs to.
pub fn part_of(tensor: Tensor, role: Role) -> &'static str {
    match (tensor, role) {
        (_, Role::Embedding) => "embeddings",
        (_, Role::Norm) => "norms",
        (Tensor::W(l) | Tensor::B(l), _) => match l {
            Lin::Query(_) | Lin::Key(_) | Lin::Value(_) | Lin::Out(_) => "attention",
            Lin::Up(_) | Lin::Down(_) => "feed-forward",
            Lin::HeadDense | Lin::Classifier => "head",
            Lin::EmbedProjection => "embeddings",
            Lin::UnusedPooler => "unused pooler",
        },
        _ => "other",
    }
}

/// Bytes in the file, scales included.
pub fn bytes(stored: &Stored) -> usize {
    match stored {
        Stored::Float { dtype: FloatType::F32, data } => 4 * data.len(),
        Stored::Float { data, .. } => 2 * data.len(),
        Stored::Int8(q) => q.values.len() + 4 * q.scb.len(),
        Stored::FourBit(q) => q.bytes(),
    }
}

/// Size of one part.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Part {
    /// embeddings, encoder, head or unused.
    pub part: &'static str,
    /// Number of parameters.
    pub parameters: usize,
    /// Bytes in the file, scales included.
    pub bytes: usize,
}

/// Embeddings, encoder, head, and what stands in the file unused.
pub fn coarse(ck: &Checkpoint) -> Vec<Part> {
    let mut parts = ["embeddings", "encoder", "head", "unused"].map(|part| Part { part, parameters: 0, bytes: 0 });
    for (def, stored) in ck.tensors() {
        let i = match part_of(def.tensor, def.role) {
            "embeddings" => 0,
            "head" => 2,
            "unused pooler" => 3,
            _ => 1,
        };
        parts[i].parameters += stored.len();
        parts[i].bytes += bytes(stored);
    }
    parts.into_iter().filter(|p| p.bytes > 0).collect()
}

/// How the weights are stored.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Storage {
    /// Linears by scheme.
    pub linears: BTreeMap<&'static str, Vec<String>>,
    /// Type of the word table.
    pub embeddings: &'static str,
}

/// Scheme of every linear and of the word table.
pub fn storage(ck: &Checkpoint) -> Storage {
    let mut linears: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    for (lin, ..) in ck.spec.linears() {
        let scheme = Scheme::of(ck.get(Tensor::W(lin))).name();
        linears.entry(scheme).or_default().push(quant::site(&ck.spec, lin));
    }
    Storage { linears, embeddings: Scheme::of(ck.get(Tensor::Word)).name() }
}
