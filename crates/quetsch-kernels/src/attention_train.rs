//! [`attention`](crate::attention) for training: the forward that keeps its probabilities, and the backward.

use crate::attention::{Heads, ProbsDropout, blocks};
use crate::gemm::Write;
use crate::math::{dot, exp, sum};
use crate::panels::{Left, Precision, Source, multiply, pack_panels, pack_panels_across};

/// Space for one head of one sentence, reused from call to call.
#[derive(Default)]
pub struct Scratch {
    panels: Vec<u32>,
    dropped: Vec<f32>,
    ds: Vec<f32>,
}

const F32: Precision = Precision::F32;

/// The q, k or v of one head of one sentence.
struct Part<'a> {
    data: &'a [f32],
    stride: usize,
    len: usize,
    dim: usize,
}

impl<'a> Part<'a> {
    fn of(qkv: &'a [f32], heads: Heads, start: usize, len: usize, head: usize, which: usize) -> Part<'a> {
        let stride = 3 * heads.inner();
        let at = start * stride + which * heads.inner() + head * heads.dim;
        Part { data: &qkv[at..], stride, len, dim: heads.dim }
    }

    fn left(&self) -> Left<'a> {
        Left::f32_rows(Source { data: self.data, stride: self.stride })
    }

    fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.dim]
    }

    /// out `[m, dim]` = a `[m, len]` self `[len, dim]`
    fn times(&self, a: Left, out: &mut [f32], stride: usize, panels: &mut Vec<u32>) {
        let (len, dim) = (self.len, self.dim);
        panels.resize(F32.panels_len(len, dim), 0);
        pack_panels(F32, |i| self.row(i), len, dim, panels);
        multiply(F32, a, panels, len, dim, len, out, stride, Write::Set);
    }

    /// out `[len, len]` = a `[len, dim]` self^T `[dim, len]`
    fn across(&self, a: Left, out: &mut [f32], panels: &mut Vec<u32>) {
        let (len, dim) = (self.len, self.dim);
        panels.resize(F32.panels_len(dim, len), 0);
        pack_panels_across(F32, |i| self.row(i), dim, len, panels);
        multiply(F32, a, panels, len, len, dim, out, len, Write::Set);
    }
}

/// As [`attention`](crate::attention::attention), keeping the probabilities (before their dropout) in `probs`.
pub fn attention_keep(
    qkv: &[f32],
    heads: Heads,
    starts: &[usize],
    drop: Option<&ProbsDropout>,
    probs: &mut [f32],
    context: &mut [f32],
    scratch: &mut Scratch,
) {
    let Scratch { panels, dropped, .. } = scratch;
    for (i, start, len, head, at) in blocks(heads, starts) {
        let p = &mut probs[at..at + len * len];
        let [q, k, v] = [0, 1, 2].map(|which| Part::of(qkv, heads, start, len, head, which));
        k.across(q.left(), p, panels);
        softmax_scaled(p, len, heads.scale());
        let mut used = &*p;
        if let Some(d) = drop {
            dropped.clear();
            dropped.extend_from_slice(p);
            d.apply(i, head, dropped, len);
            used = dropped;
        }
        let out = &mut context[start * heads.inner() + head * heads.dim..];
        v.times(Left::f32_rows(Source { data: used, stride: len }), out, heads.inner(), panels);
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
    scratch: &mut Scratch,
) {
    let (inner, stride) = (heads.inner(), 3 * heads.inner());
    let Scratch { panels, dropped, ds } = scratch;
    for (i, start, len, head, at) in blocks(heads, starts) {
        let p = &probs[at..at + len * len];
        let [q, k, v] = [0, 1, 2].map(|which| Part::of(qkv, heads, start, len, head, which));
        let dc = Part { data: &dcontext[start * inner + head * heads.dim..], stride: inner, len, dim: heads.dim };
        let offset = |which: usize| start * stride + which * inner + head * heads.dim;
        ds.resize(len * len, 0.0);
        v.across(dc.left(), ds, panels);
        let mut used = p;
        if let Some(d) = drop {
            d.apply(i, head, ds, len);
            dropped.clear();
            dropped.extend_from_slice(p);
            d.apply(i, head, dropped, len);
            used = dropped;
        }
        dc.times(Left::f32_columns(Source { data: used, stride: len }), &mut dqkv[offset(2)..], stride, panels);
        if let Some(extra) = dprobs {
            crate::math::add(ds, &extra[at..at + len * len]);
        }
        softmax_back(p, ds, len, heads.scale());
        let ds = Source { data: ds, stride: len };
        k.times(Left::f32_rows(ds), &mut dqkv[offset(0)..], stride, panels);
        q.times(Left::f32_columns(ds), &mut dqkv[offset(1)..], stride, panels);
    }
}

kernel! {
    /// x = softmax(scale x) on every row of `width`.
    fn softmax_scaled(x: &mut [f32], width: usize, scale: f32) {
        for row in x.chunks_exact_mut(width) {
            let max = row.iter().fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m });
            row.iter_mut().for_each(|v| *v = exp(scale * (*v - max)));
            let inv = 1.0 / sum(row, |v| v);
            row.iter_mut().for_each(|v| *v *= inv);
        }
    }
}

kernel! {
    /// d = scale p (d - rowsum(d p)) on every row of `width`.
    fn softmax_back(p: &[f32], d: &mut [f32], width: usize, scale: f32) {
        for (p, d) in p.chunks_exact(width).zip(d.chunks_exact_mut(width)) {
            let total = dot(p, d);
            d.iter_mut().zip(p).for_each(|(d, p)| *d = scale * p * (*d - total));
        }
    }
}
