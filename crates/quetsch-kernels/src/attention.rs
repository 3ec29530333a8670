//! Scaled dot-product attention (Vaswani et al. 2017) on ragged sentences; [`crate::attention_train`] has
//! what training needs.
//!
//! `qkv` is `[tokens, 3 * inner]` with q, k and v side by side, inner = heads * dim; heads may be 0. Probabilities are
//! stored sentence after sentence, head after head, `[len, len]` each.

use crate::gemm::{Size, View, Write, gemm, gemm_into};
use crate::math::softmax;
use crate::rows::{Dropout, dropout};
use crate::window::Window;
use std::ops::Range;

/// The shape of one layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Number of heads.
    pub count: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Heads {
    pub(crate) fn inner(self) -> usize {
        self.count * self.dim
    }

    pub(crate) fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Floats that the probabilities of these sentences take.
    pub fn probs_len(self, starts: &[usize]) -> usize {
        starts.windows(2).map(|s| self.count * (s[1] - s[0]) * (s[1] - s[0])).sum()
    }
}

/// Dropout of the probabilities: `key(sentence, head, query)` names a row.
pub struct ProbsDropout<'a> {
    /// How much.
    pub how: Dropout,
    /// The row's key.
    pub key: &'a (dyn Fn(usize, usize, usize) -> u64 + Sync),
}

impl ProbsDropout<'_> {
    pub(crate) fn apply(&self, sentence: usize, head: usize, p: &mut [f32], len: usize) {
        for (query, row) in p.chunks_exact_mut(len).enumerate() {
            dropout(row, self.how, (self.key)(sentence, head, query));
        }
    }
}

/// (sentence index, its token range start, length, head, offset of its probabilities)
pub(crate) fn blocks(
    heads: Heads,
    starts: &[usize],
) -> impl Iterator<Item = (usize, usize, usize, usize, usize)> + '_ {
    let mut used = 0;
    starts.windows(2).enumerate().flat_map(move |(i, s)| {
        let len = s[1] - s[0];
        let first = used;
        used += heads.count * len * len;
        (0..heads.count).map(move |h| (i, s[0], len, h, first + h * len * len))
    })
}

fn part(qkv: &[f32], heads: Heads, start: usize, head: usize, which: usize) -> View<'_> {
    let stride = 3 * heads.inner();
    View::rows(&qkv[start * stride + which * heads.inner() + head * heads.dim..], stride)
}

fn probabilities(qkv: &[f32], heads: Heads, start: usize, len: usize, head: usize, p: &mut [f32]) {
    let (q, k) = (part(qkv, heads, start, head, 0), part(qkv, heads, start, head, 1));
    gemm(Size { m: len, n: len, k: heads.dim }, heads.scale(), q, k.t(), p, len, Write::Set);
    softmax(p, len);
}

/// context `[tokens, inner]` = softmax(q k^T / sqrt(dim)) v. `scratch` holds longest^2 floats.
pub fn attention(qkv: &[f32], heads: Heads, starts: &[usize], context: &mut [f32], scratch: &mut [f32]) {
    let tokens = starts.last().copied().unwrap_or(0);
    let context = Window::new(context, tokens, heads.inner(), heads.inner());
    attention_of_heads(qkv, heads, 0..heads.count, starts, context, scratch);
}

/// As [`attention`], of some of the heads; `context` is their columns.
///
/// # Panics
/// When a slice is shorter than the sizes say.
pub fn attention_of_heads(
    qkv: &[f32],
    heads: Heads,
    some: Range<usize>,
    starts: &[usize],
    mut context: Window,
    scratch: &mut [f32],
) {
    for (_, start, len, head, _) in blocks(heads, starts).filter(|block| some.contains(&block.3)) {
        let p = &mut scratch[..len * len];
        probabilities(qkv, heads, start, len, head, p);
        let column = (head - some.start) * heads.dim;
        let out = context.part(start..start + len, column..column + heads.dim);
        gemm_into(len, 1.0, View::rows(p, len), part(qkv, heads, start, head, 2), out, Write::Set);
    }
}
