//! The encoder's forward, written once over nine transformer-shaped ops.
//!
//! Who owns what: [`Ops`] owns the parameters and looks them up by site; the forward only names sites. Activations are
//! owned values. An op that *reads the residual stream* borrows (`qkv`, `ffn_up`); every other op consumes, so an
//! implementation may work in place and knows without reference counts when a buffer is free. Ops are infallible:
//! specs, weights and batches are checked at the door.

use crate::batch::Batch;
use crate::spec::{Activation, At, DropSite, HeadSpec, Lin, ModelSpec, Norm, Pool};

/// An implementation of the encoder's operations: inference, training tape, cost model.
pub trait Ops {
    /// A ragged activation `[tokens, width]`; after `pool` `[sentences, width]`.
    type Act;

    /// LayerNorm(word + position + token type) -> `[tokens, embedding width]`.
    fn embed(&mut self, batch: &Batch) -> Self::Act;
    /// `[tokens, hidden]` -> `[tokens, 3 * heads * head_dim]`, q, k and v side by side.
    fn qkv(&mut self, layer: usize, x: &Self::Act) -> Self::Act;
    /// softmax(q k^T / sqrt(head_dim)) v inside each sentence -> `[tokens, heads * head_dim]`.
    fn attention(&mut self, layer: usize, qkv: Self::Act, batch: &Batch) -> Self::Act;
    /// f(x W^T + b) with the feed-forward non-linearity -> `[tokens, ffn]`.
    fn ffn_up(&mut self, layer: usize, x: &Self::Act) -> Self::Act;
    /// f(x W^T + b).
    fn linear(&mut self, site: Lin, x: Self::Act, f: Activation) -> Self::Act;
    /// LayerNorm(x + residual).
    fn add_norm(&mut self, site: Norm, x: Self::Act, residual: Self::Act) -> Self::Act;
    /// `[tokens, hidden]` -> `[sentences, hidden]`.
    fn pool(&mut self, how: Pool, x: Self::Act, batch: &Batch) -> Self::Act;
    /// Training only.
    fn dropout(&mut self, _site: DropSite, x: Self::Act, _batch: &Batch) -> Self::Act {
        x
    }
    /// Every activation that a tap, a mask or a calibration may want passes here once, under its name.
    fn tap(&mut self, _at: At, x: Self::Act) -> Self::Act {
        x
    }
}

/// Embeddings and all layers: `[tokens]` -> `[tokens, hidden]`.
pub fn encode<O: Ops>(ops: &mut O, spec: &ModelSpec, batch: &Batch) -> O::Act {
    let x = embedded(ops, spec, batch);
    (0..spec.layers.len()).fold(x, |x, l| layer(ops, l, x, batch))
}

/// What the first layer reads: `[tokens]` -> `[tokens, hidden]`.
pub fn embedded<O: Ops>(ops: &mut O, spec: &ModelSpec, batch: &Batch) -> O::Act {
    let x = ops.embed(batch);
    let x = ops.dropout(DropSite::Embedded, x, batch);
    let x = ops.tap(At::Embedded, x);
    if !spec.is_projected() {
        return x;
    }
    let x = ops.linear(Lin::EmbedProjection, x, Activation::Identity);
    ops.tap(At::Projected, x)
}

/// One post-LayerNorm BERT layer (Devlin et al. 2019): `[tokens, hidden]` -> `[tokens, hidden]`.
pub fn layer<O: Ops>(ops: &mut O, l: usize, x: O::Act, batch: &Batch) -> O::Act {
    let context = heads(ops, l, &x, batch);
    let x = attended(ops, l, context, x, batch);
    let h = channels(ops, l, &x);
    fed(ops, l, h, x, batch)
}

/// What a layer's heads see: `[tokens, hidden]` -> `[tokens, heads * head_dim]`.
pub fn heads<O: Ops>(ops: &mut O, l: usize, x: &O::Act, batch: &Batch) -> O::Act {
    let qkv = ops.qkv(l, x);
    let qkv = ops.tap(At::Qkv(l), qkv);
    let context = ops.attention(l, qkv, batch);
    ops.tap(At::Context(l), context)
}

/// From the heads back to the residual stream `x`.
pub fn attended<O: Ops>(ops: &mut O, l: usize, context: O::Act, x: O::Act, batch: &Batch) -> O::Act {
    let y = ops.linear(Lin::Out(l), context, Activation::Identity);
    let y = ops.dropout(DropSite::Attention(l), y, batch);
    let x = ops.add_norm(Norm::Attention(l), y, x);
    ops.tap(At::Attended(l), x)
}

/// A layer's feed-forward channels: `[tokens, hidden]` -> `[tokens, ffn]`.
pub fn channels<O: Ops>(ops: &mut O, l: usize, x: &O::Act) -> O::Act {
    let h = ops.ffn_up(l, x);
    ops.tap(At::FfnHidden(l), h)
}

/// From the channels back to the residual stream `x`.
pub fn fed<O: Ops>(ops: &mut O, l: usize, h: O::Act, x: O::Act, batch: &Batch) -> O::Act {
    let y = ops.linear(Lin::Down(l), h, Activation::Identity);
    let y = ops.dropout(DropSite::Ffn(l), y, batch);
    let x = ops.add_norm(Norm::Ffn(l), y, x);
    ops.tap(At::Hidden(l), x)
}

/// Encoder and head: one row of logits per sentence or token, or one hidden state per token for a bare body.
pub fn forward<O: Ops>(ops: &mut O, spec: &ModelSpec, batch: &Batch) -> O::Act {
    let mut x = encode(ops, spec, batch);
    if spec.head == HeadSpec::None {
        return x;
    }
    if let Some(head) = spec.head_flow() {
        x = ops.pool(head.pool, x, batch);
        x = ops.tap(At::Pooled, x);
        if head.dropout {
            x = ops.dropout(DropSite::HeadIn, x, batch);
        }
        x = ops.linear(Lin::HeadDense, x, head.activation);
        x = ops.tap(At::HeadHidden, x);
    }
    let x = ops.dropout(DropSite::Classifier, x, batch);
    let logits = ops.linear(Lin::Classifier, x, Activation::Identity);
    ops.tap(At::Logits, logits)
}

/// What a hook needs from an implementation that has data.
pub trait Inspect: Ops {
    /// A copy of the activation as f32, row-major.
    fn values(&self, x: &Self::Act) -> Vec<f32>;
    /// `x[:, c] *= scale[c / (width / scale.len())]`: a head mask or an FFN-channel mask.
    fn scale_columns(&mut self, at: At, x: Self::Act, scale: &[f32]) -> Self::Act;
}

/// Something to do at every tap.
pub trait Hook<O: Ops> {
    /// Sees, and may replace, the activation at `at`.
    fn at(&mut self, ops: &mut O, at: At, x: O::Act) -> O::Act;
}

/// A hook, or none.
impl<O: Ops, H: Hook<O>> Hook<O> for Option<H> {
    fn at(&mut self, ops: &mut O, at: At, x: O::Act) -> O::Act {
        match self {
            Some(hook) => hook.at(ops, at, x),
            None => x,
        }
    }
}

/// Two hooks, the first one first.
impl<O: Ops, A: Hook<O>, B: Hook<O>> Hook<O> for (A, B) {
    fn at(&mut self, ops: &mut O, at: At, x: O::Act) -> O::Act {
        let x = self.0.at(ops, at, x);
        self.1.at(ops, at, x)
    }
}

/// The one decorator: `O` with a hook. Observing, recording and masking are hooks.
pub struct With<'a, O, H> {
    /// What computes.
    pub ops: &'a mut O,
    /// What watches.
    pub hook: H,
}

impl<O: Ops, H: Hook<O>> Ops for With<'_, O, H> {
    type Act = O::Act;
    fn embed(&mut self, batch: &Batch) -> O::Act {
        self.ops.embed(batch)
    }
    fn qkv(&mut self, layer: usize, x: &O::Act) -> O::Act {
        self.ops.qkv(layer, x)
    }
    fn attention(&mut self, layer: usize, qkv: O::Act, batch: &Batch) -> O::Act {
        self.ops.attention(layer, qkv, batch)
    }
    fn ffn_up(&mut self, layer: usize, x: &O::Act) -> O::Act {
        self.ops.ffn_up(layer, x)
    }
    fn linear(&mut self, site: Lin, x: O::Act, f: Activation) -> O::Act {
        self.ops.linear(site, x, f)
    }
    fn add_norm(&mut self, site: Norm, x: O::Act, residual: O::Act) -> O::Act {
        self.ops.add_norm(site, x, residual)
    }
    fn pool(&mut self, how: Pool, x: O::Act, batch: &Batch) -> O::Act {
        self.ops.pool(how, x, batch)
    }
    fn dropout(&mut self, site: DropSite, x: O::Act, batch: &Batch) -> O::Act {
        self.ops.dropout(site, x, batch)
    }
    fn tap(&mut self, at: At, x: O::Act) -> O::Act {
        let x = self.ops.tap(at, x);
        self.hook.at(self.ops, at, x)
    }
}
