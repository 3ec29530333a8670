//! Scaled dot-product attention (Vaswani et al. 2017) on ragged sentences, forward and backward.
//!
//! `qkv` is `[tokens, 3 * inner]` with q, k and v side by side, inner = heads * dim; heads may be 0. Probabilities are
//! stored sentence after sentence, head after head, `[len, len]` each.

use crate::gemm::{Size, View, Write, gemm};
use crate::math::{dot, softmax};
use crate::rows::{Dropout, dropout};

/// The shape of one layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Number of heads.
    pub count: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Heads {
    fn inner(self) -> usize {
        self.count * self.dim
    }

    fn scale(self) -> f32 {
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
    fn apply(&self, sentence: usize, head: usize, p: &mut [f32], len: usize) {
        for (query, row) in p.chunks_exact_mut(len).enumerate() {
            dropout(row, self.how, (self.key)(sentence, head, query));
        }
    }
}

/// (sentence index, its token range start, length, head, offset of its probabilities)
fn blocks(heads: Heads, starts: &[usize]) -> impl Iterator<Item = (usize, usize, usize, usize, usize)> + '_ {
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

fn times_values(qkv: &[f32], heads: Heads, start: usize, len: usize, head: usize, p: &[f32], context: &mut [f32]) {
    let out = &mut context[start * heads.inner() + head * heads.dim..];
    let size = Size { m: len, n: heads.dim, k: len };
    gemm(size, 1.0, View::rows(p, len), part(qkv, heads, start, head, 2), out, heads.inner(), Write::Set);
}

/// context `[tokens, inner]` = softmax(q k^T / sqrt(dim)) v. `scratch` holds longest^2 floats.
pub fn attention(qkv: &[f32], heads: Heads, starts: &[usize], context: &mut [f32], scratch: &mut [f32]) {
    for (_, start, len, head, _) in blocks(heads, starts) {
        let p = &mut scratch[..len * len];
        probabilities(qkv, heads, start, len, head, p);
        times_values(qkv, heads, start, len, head, p, context);
    }
}

/// As [`attention`], keeping the probabilities (before their dropout) in `probs`.
pub fn attention_keep(
    qkv: &[f32],
    heads: Heads,
    starts: &[usize],
    drop: Option<&ProbsDropout>,
    probs: &mut [f32],
    context: &mut [f32],
) {
    let mut dropped = vec![];
    for (i, start, len, head, at) in blocks(heads, starts) {
        let p = &mut probs[at..at + len * len];
        probabilities(qkv, heads, start, len, head, p);
        match drop {
            None => times_values(qkv, heads, start, len, head, p, context),
            Some(d) => {
                dropped.clear();
                dropped.extend_from_slice(p);
                d.apply(i, head, &mut dropped, len);
                times_values(qkv, heads, start, len, head, &dropped, context);
            }
        }
    }
}

/// The backward of [`attention_keep`]. With C = D(P) V and P = softmax(S): dV = D(P)^T dC,
/// dP = D(dC V^T) (+ `dprobs`, the gradient that reaches P by another way), dS = P (dP - rowsum(dP P)),
/// dQ = dS K / sqrt(dim), dK = dS^T Q / sqrt(dim). `dqkv` is overwritten.
#[allow(clippy::too_many_arguments)] // its tensors
pub fn attention_back(
    qkv: &[f32],
    heads: Heads,
    starts: &[usize],
    drop: Option<&ProbsDropout>,
    probs: &[f32],
    dprobs: Option<&[f32]>,
    dcontext: &[f32],
    dqkv: &mut [f32],
) {
    let (inner, dim, stride) = (heads.inner(), heads.dim, 3 * heads.inner());
    let (mut ds, mut dropped) = (vec![], vec![]);
    for (i, start, len, head, at) in blocks(heads, starts) {
        let p = &probs[at..at + len * len];
        let dc = View::rows(&dcontext[start * inner + head * dim..], inner);
        let offset = |which: usize| start * stride + which * inner + head * dim;
        ds.resize(len * len, 0.0);
        let size = Size { m: len, n: len, k: dim };
        gemm(size, 1.0, dc, part(qkv, heads, start, head, 2).t(), &mut ds, len, Write::Set);
        let (narrow, mut used) = (Size { m: len, n: dim, k: len }, p);
        if let Some(d) = drop {
            d.apply(i, head, &mut ds, len);
            dropped.clear();
            dropped.extend_from_slice(p);
            d.apply(i, head, &mut dropped, len);
            used = &dropped;
        }
        gemm(narrow, 1.0, View::rows(used, len).t(), dc, &mut dqkv[offset(2)..], stride, Write::Set);
        if let Some(extra) = dprobs {
            crate::math::add(&mut ds, &extra[at..at + len * len]);
        }
        softmax_back(p, &mut ds, len);
        let ds = View::rows(&ds, len);
        let (q, k) = (part(qkv, heads, start, head, 0), part(qkv, heads, start, head, 1));
        gemm(narrow, heads.scale(), ds, k, &mut dqkv[offset(0)..], stride, Write::Set);
        gemm(narrow, heads.scale(), ds.t(), q, &mut dqkv[offset(1)..], stride, Write::Set);
    }
}

kernel! {
    /// d = p (d - rowsum(d p)) on every row of `width`.
    fn softmax_back(p: &[f32], d: &mut [f32], width: usize) {
        for (p, d) in p.chunks_exact(width).zip(d.chunks_exact_mut(width)) {
            let total = dot(p, d);
            d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - total));
        }
    }
}
