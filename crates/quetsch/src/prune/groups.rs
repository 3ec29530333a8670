//! The coupling table: which tensors a head or a channel runs through, and along which axis.

use crate::spec::{Lin, ModelSpec, Norm, Tensor};

/// What a layer can lose a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An attention head: `head_dim` consecutive rows or columns.
    Head,
    /// A feed-forward channel: one row or column.
    Channel,
}

/// The axis of `[out, in]` that the groups of a tensor lie on; a bias is `[out, 1]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    Rows,
    Columns,
}

/// The only place that knows what is coupled. `None`: no group runs through this tensor.
///
/// The biases of `Out` and `Down` are added to the residual stream and belong to no group.
pub(super) fn coupling(tensor: Tensor) -> Option<(Kind, usize, Axis)> {
    match tensor {
        Tensor::W(Lin::Query(l) | Lin::Key(l) | Lin::Value(l)) => Some((Kind::Head, l, Axis::Rows)),
        Tensor::B(Lin::Query(l) | Lin::Key(l) | Lin::Value(l)) => Some((Kind::Head, l, Axis::Rows)),
        Tensor::W(Lin::Out(l)) => Some((Kind::Head, l, Axis::Columns)),
        Tensor::W(Lin::Up(l)) | Tensor::B(Lin::Up(l)) => Some((Kind::Channel, l, Axis::Rows)),
        Tensor::W(Lin::Down(l)) => Some((Kind::Channel, l, Axis::Columns)),
        _ => None,
    }
}

/// Rows or columns per group.
pub(super) fn unit(spec: &ModelSpec, kind: Kind) -> usize {
    match kind {
        Kind::Head => spec.head_dim,
        Kind::Channel => 1,
    }
}

/// The same tensor of layer `f(its layer)`; tensors outside the layers stay.
pub(super) fn in_layer(tensor: Tensor, f: impl Fn(usize) -> usize) -> Tensor {
    let lin = |site: Lin| match site {
        Lin::Query(l) => Lin::Query(f(l)),
        Lin::Key(l) => Lin::Key(f(l)),
        Lin::Value(l) => Lin::Value(f(l)),
        Lin::Out(l) => Lin::Out(f(l)),
        Lin::Up(l) => Lin::Up(f(l)),
        Lin::Down(l) => Lin::Down(f(l)),
        Lin::EmbedProjection | Lin::HeadDense | Lin::Classifier | Lin::UnusedPooler => site,
    };
    let norm = |site: Norm| match site {
        Norm::Embeddings => site,
        Norm::Attention(l) => Norm::Attention(f(l)),
        Norm::Ffn(l) => Norm::Ffn(f(l)),
    };
    match tensor {
        Tensor::Word | Tensor::Position | Tensor::TokenType | Tensor::Projection(_) | Tensor::LayerWeights(_) => {
            tensor
        }
        Tensor::Gamma(n) => Tensor::Gamma(norm(n)),
        Tensor::Beta(n) => Tensor::Beta(norm(n)),
        Tensor::W(s) => Tensor::W(lin(s)),
        Tensor::B(s) => Tensor::B(lin(s)),
    }
}
