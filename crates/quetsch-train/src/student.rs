//! A student that starts from nothing.

use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::rng::{Rng, key};
use quetsch::spec::{LayerShape, ModelSpec, Tensor};
use quetsch::{Error, Result};

/// The shape of a student; family, vocabulary, positions and head are its teacher's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Attention heads per layer; they divide the width.
    pub heads: usize,
    /// Width of the feed-forward networks.
    pub ffn: usize,
}

/// Random weights as transformers initialises them: matrices and tables N(0, 0.02), LayerNorms 1 and 0, biases 0.
///
/// # Errors
/// A shape that cannot be a model.
pub fn random_student(teacher: &Checkpoint, shape: Shape, seed: u64) -> Result<Checkpoint> {
    let Shape { layers, hidden, heads, ffn } = shape;
    let count = u16::try_from(heads).unwrap_or(0);
    if layers == 0 || count == 0 || hidden % heads != 0 {
        return Err(Error::invalid(format!(
            "a student of {layers} layers, width {hidden} and {heads} heads: expected at least one layer, and heads that \
             divide the width"
        )));
    }
    let layer = LayerShape { heads: (0..count).collect(), ffn };
    let spec = ModelSpec {
        hidden,
        head_dim: hidden / heads,
        original_heads: count,
        layers: vec![layer; layers],
        ..teacher.spec.clone()
    };
    spec.validate()?;
    let mut rng = Rng::new(key(&[seed, 0x57d]));
    let mut student = Checkpoint::from_fn(spec, teacher.labels.clone(), |d| {
        Ok(Stored::f32(match d.tensor {
            Tensor::Gamma(_) => vec![1.0; d.len()],
            Tensor::Beta(_) | Tensor::B(_) => vec![0.0; d.len()],
            _ => (0..d.len()).map(|_| 0.02 * rng.normal()).collect(),
        }))
    })?;
    student.max_length = teacher.max_length;
    student.config.clone_from(&teacher.config);
    Ok(student)
}
