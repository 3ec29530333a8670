//! Scaled dot-product attention (Vaswani et al. 2017) on ragged sentences; [`crate::attention_train`] has
//! what training needs.
//!
//! `qkv` is `[tokens, 3 * inner]` with q, k and v side by side, inner = heads * dim; heads may be 0. Probabilities are
//! stored sentence after sentence, head after head, `[len, len]` each.

use crate::isa::{Isa, isa};
use crate::lanes::{Eight, Lanes, exp2};
use crate::rows::{Dropout, dropout};
use crate::window::Window;
use std::ops::Range;

/// Columns of a panel of keys.
const LINE: usize = 16;
/// Queries of the tallest register block.
const MOST_ROWS: usize = 8;

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

    /// Floats that [`attention`] works in when the longest sentence has `longest` tokens: k, v and a block of scores of
    /// one head.
    pub fn scratch_len(self, longest: usize) -> usize {
        let wide = longest.next_multiple_of(LINE);
        wide * (2 * self.dim.next_multiple_of(LINE) + MOST_ROWS)
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

/// context `[tokens, inner]` = softmax(q k^T / sqrt(dim)) v, in f32. `scratch` holds [`Heads::scratch_len`] floats. A
/// sentence has the same bits whatever sentences stand beside it.
///
/// # Panics
/// When a slice is shorter than the sizes say.
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
    context: Window,
    scratch: &mut [f32],
) {
    on_isa(isa(), qkv, heads, some, starts, context, scratch);
}

fn on_isa(
    isa: Isa,
    qkv: &[f32],
    heads: Heads,
    some: Range<usize>,
    starts: &[usize],
    mut context: Window,
    scratch: &mut [f32],
) {
    assert!(some.start <= some.end && some.end <= heads.count);
    for (s, head) in starts.windows(2).flat_map(|s| some.clone().map(move |h| (s, h))) {
        let column = (head - some.start) * heads.dim;
        if s[0] < s[1] && heads.dim > 0 {
            let out = context.part(s[0]..s[1], column..column + heads.dim);
            Head::of(qkv, heads, s[0], head, out, scratch).run(isa);
        }
    }
}

/// One head of one sentence.
struct Head<'a> {
    /// Rows of q, k and v, `stride` floats apart.
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    stride: usize,
    dim: usize,
    /// k across, in panels of `LINE` tokens: `[len / LINE][dim / LINE][LINE][LINE]`.
    keys: &'a mut [[Line; LINE]],
    /// v, its rows one behind the other: `[len][dim / LINE][LINE]`.
    values: &'a mut [Line],
    /// Room for `MOST_ROWS` rows of scores, rounded up to lines.
    scores: &'a mut [Line],
    /// `[len, dim]`
    out: Window<'a>,
}

type Line = [f32; LINE];

impl<'a> Head<'a> {
    fn of(
        qkv: &'a [f32],
        heads: Heads,
        start: usize,
        head: usize,
        out: Window<'a>,
        scratch: &'a mut [f32],
    ) -> Self {
        let (len, dim, stride) = (out.rows(), heads.dim, 3 * heads.inner());
        let (wide, lines) = (len.div_ceil(LINE), dim.div_ceil(LINE));
        let [q, k, v] = [0, 1, 2].map(|which| &qkv[start * stride + which * heads.inner() + head * dim..]);
        assert!((len - 1) * stride + dim <= v.len() && dim == out.width());
        let (keys, scratch) = scratch.as_chunks_mut::<LINE>().0.split_at_mut(wide * lines * LINE);
        let (values, scores) = scratch.split_at_mut(len * lines);
        let (keys, scores) = (keys.as_chunks_mut().0, &mut scores[..MOST_ROWS * wide]);
        Head { q, k, v, stride, dim, keys, values, scores, out }
    }

    /// Fills `keys` and `values`.
    ///
    /// # Safety
    /// As for [`Lanes`].
    #[inline(always)]
    unsafe fn pack<V: Lanes>(&mut self) {
        let (len, lines) = (self.out.rows(), self.dim.div_ceil(LINE));
        for (panel, keys) in self.keys.chunks_exact_mut(lines).enumerate() {
            for (i, block) in keys.iter_mut().enumerate() {
                // What stands behind the last token gives scores that are not read.
                for (line, token) in block.iter_mut().zip(panel * LINE..len) {
                    copy(&self.k[token * self.stride..][..self.dim][i * LINE..], line);
                }
                // SAFETY: passed on.
                unsafe { V::transpose(block) };
            }
        }
        if self.reads_values() {
            return;
        }
        for (token, values) in self.values.chunks_exact_mut(lines).enumerate() {
            let row = &self.v[token * self.stride..][..self.dim];
            for (i, line) in values.iter_mut().enumerate() {
                copy(&row[i * LINE..], line);
            }
        }
    }

    /// Whether v is read where it stands: a few rows, in whole lines.
    #[inline(always)]
    fn reads_values(&self) -> bool {
        self.out.rows() <= 2 * LINE && self.dim.is_multiple_of(LINE)
    }

    fn run(self, isa: Isa) {
        #[cfg(target_arch = "x86_64")]
        match isa {
            // SAFETY: `isa` is at most what this CPU has; `of` made slices as long as the sizes say.
            Isa::Avx2 => return unsafe { avx2(self) },
            // SAFETY: as above; what stands higher has AVX-512 too.
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => return unsafe { avx512(self) },
            Isa::Scalar => {}
        }
        let _ = isa;
        // SAFETY: this vector wants no instruction set; the slices are as above.
        unsafe { run::<Eight>(self) }
    }
}

/// # Safety
/// AVX-512; a head as [`Head::of`] makes it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn avx512(head: Head) {
    // SAFETY: passed on.
    unsafe { run::<std::arch::x86_64::__m512>(head) }
}

/// # Safety
/// AVX2 and FMA; a head as [`Head::of`] makes it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(head: Head) {
    // SAFETY: passed on.
    unsafe { run::<std::arch::x86_64::__m256>(head) }
}

/// A line's worth of `from`, zeros behind it.
#[inline(always)]
fn copy(from: &[f32], line: &mut Line) {
    match from.first_chunk() {
        Some(from) => *line = *from,
        None => {
            *line = [0.0; LINE];
            line[..from.len()].copy_from_slice(from);
        }
    }
}

/// A block of queries at a time: scores, exponentials, the product with v, and last the division by their sum.
///
/// # Safety
/// As for [`Lanes`]; a head as [`Head::of`] makes it.
#[inline(always)]
unsafe fn run<V: Lanes>(mut head: Head) {
    let len = head.out.rows();
    let scale = std::f32::consts::LOG2_E / (head.dim as f32).sqrt();
    // SAFETY: passed on.
    unsafe { head.pack::<V>() };
    for first in (0..len).step_by(V::ROWS) {
        let rows = V::ROWS.min(len - first);
        // SAFETY: passed on; a block of fewer rows computes its last row twice.
        unsafe {
            match rows {
                1 | 2 => queries::<V, 2>(&mut head, first, rows, scale),
                3 | 4 if V::ROWS > 2 => queries::<V, 4>(&mut head, first, rows, scale),
                5 | 6 if V::ROWS > 4 => queries::<V, 6>(&mut head, first, rows, scale),
                _ if V::ROWS > 6 => queries::<V, 8>(&mut head, first, rows, scale),
                _ => unreachable!("at most V::ROWS rows"),
            }
        }
    }
}

/// `rows` queries from `first` on, at most `R`.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn queries<V: Lanes, const R: usize>(head: &mut Head, first: usize, rows: usize, scale: f32) {
    let (len, line) = (head.out.rows(), head.dim.next_multiple_of(LINE));
    let wide = len.next_multiple_of(LINE);
    let row = |r: usize| r.min(rows - 1);
    // SAFETY: rows of q and of scores, panels of keys and lines of values are inside their slices (see `Head::of`);
    // stores into `out` keep to `dim` floats of `len` rows.
    unsafe {
        let q: [*const f32; R] = std::array::from_fn(|r| head.q.as_ptr().add((first + row(r)) * head.stride));
        let scores = head.scores.as_mut_ptr().cast::<f32>();
        let keys = head.keys.as_ptr().cast::<f32>();
        // Vector `c` of a row of keys, of which a panel has LINE / N.
        let key = |c: usize| keys.add(c * V::N / LINE * LINE * line + c * V::N % LINE);
        let columns = len.div_ceil(V::N);
        let inverse = match columns {
            1 => in_registers::<V, R, 1>(q, [key(0)], head.dim, len, scale, scores, wide),
            2 => in_registers::<V, R, 2>(q, [key(0), key(1)], head.dim, len, scale, scores, wide),
            _ => {
                for c in (0..columns).step_by(2) {
                    if c + 1 < columns {
                        let sums = product::<V, R, 2>(q, [key(c), key(c + 1)], LINE, head.dim);
                        for (r, [a, b]) in sums.into_iter().enumerate() {
                            a.store(scores.add(r * wide + c * V::N));
                            b.store(scores.add(r * wide + (c + 1) * V::N));
                        }
                    } else {
                        let sums = product::<V, R, 1>(q, [key(c)], LINE, head.dim);
                        sums.iter().enumerate().for_each(|(r, [a])| a.store(scores.add(r * wide + c * V::N)));
                    }
                }
                let mut inverse = [0.0; R];
                for (r, inverse) in inverse.iter_mut().enumerate().take(rows) {
                    *inverse = 1.0 / exponentials::<V>(scores.add(r * wide), len, scale);
                }
                inverse
            }
        };
        let p: [*const f32; R] = std::array::from_fn(|r| scores.add(row(r) * wide).cast_const());
        let (values, line) = match head.reads_values() {
            true => (head.v.as_ptr(), head.stride),
            false => (head.values.as_ptr().cast::<f32>(), line),
        };
        let value = |c: usize| values.add(c * V::N);
        for c in (0..head.dim).step_by(2 * V::N) {
            let vector = c / V::N;
            if c + V::N < head.dim {
                let sums = product::<V, R, 2>(p, [value(vector), value(vector + 1)], line, len);
                for (r, [a, b]) in sums.into_iter().enumerate().take(rows) {
                    let inverse = V::splat(inverse[r]);
                    let out = &mut head.out.row(first + r)[c..];
                    a.mul(inverse).store(out.as_mut_ptr());
                    store_first(b.mul(inverse), &mut out[V::N..]);
                }
            } else {
                let sums = product::<V, R, 1>(p, [value(vector)], line, len);
                for (r, [a]) in sums.into_iter().enumerate().take(rows) {
                    store_first(a.mul(V::splat(inverse[r])), &mut head.out.row(first + r)[c..]);
                }
            }
        }
    }
}

/// Scores of few keys, which stay in registers, and their exponentials, `wide` floats from row to row; the inverse of
/// each row's sum. What [`product`] and [`exponentials`] give, for all rows at a time.
///
/// # Safety
/// As for [`run`]; `C` vectors are what `len` keys take.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // r and c name rows and vectors of several arrays
unsafe fn in_registers<V: Lanes, const R: usize, const C: usize>(
    q: [*const f32; R],
    keys: [*const f32; C],
    dim: usize,
    len: usize,
    scale: f32,
    scores: *mut f32,
    wide: usize,
) -> [f32; R] {
    // SAFETY: passed on.
    unsafe {
        // Plain loops: a closure may be compiled apart, for the base instruction set.
        let mut e = product::<V, R, C>(q, keys, LINE, dim);
        let (scale, last) = (V::splat(scale), len - (C - 1) * V::N);
        let mut most = [V::splat(f32::NEG_INFINITY); R];
        for r in 0..R {
            let mut row = e[r][C - 1].first(last, most[r]);
            for c in 0..C - 1 {
                row = e[r][c].max(row);
            }
            most[r] = V::splat(row.largest());
        }
        let mut inverse = [0.0; R];
        for r in 0..R {
            for c in 0..C {
                e[r][c] = exp2(e[r][c].sub(most[r]).mul(scale));
            }
            e[r][C - 1] = e[r][C - 1].first(last, V::splat(0.0));
            let mut sum = e[r][0];
            e[r][0].store(scores.add(r * wide));
            for c in 1..C {
                e[r][c].store(scores.add(r * wide + c * V::N));
                sum = sum.add(e[r][c]);
            }
            inverse[r] = 1.0 / sum.total();
        }
        inverse
    }
}

/// As many lanes as there is room for.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn store_first<V: Lanes>(x: V, out: &mut [f32]) {
    let mut lanes = [0.0; LINE];
    // SAFETY: both have room for the lanes.
    unsafe {
        if out.len() >= V::N {
            return x.store(out.as_mut_ptr());
        }
        x.store(lanes.as_mut_ptr());
    }
    out.copy_from_slice(&lanes[..out.len()]);
}

/// `R` rows of `k` floats times `P` vectors of each of `k` rows that are `step` floats apart.
///
/// # Safety
/// As for [`Lanes`]; the pointers reach as far.
#[inline(always)]
unsafe fn product<V: Lanes, const R: usize, const P: usize>(
    a: [*const f32; R],
    b: [*const f32; P],
    step: usize,
    k: usize,
) -> [[V; P]; R] {
    // SAFETY: passed on.
    unsafe {
        let mut sums = [[V::splat(0.0); P]; R];
        for i in 0..k {
            let b: [V; P] = std::array::from_fn(|p| V::load(b[p].add(i * step)));
            for (sums, a) in sums.iter_mut().zip(a) {
                let a = V::splat(*a.add(i));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = a.mul_add(b, *sum);
                }
            }
        }
        sums
    }
}

/// x = 2^(scale (x - max x)) for `len` floats, which lie in whole vectors; returns their sum.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn exponentials<V: Lanes>(x: *mut f32, len: usize, scale: f32) -> f32 {
    let whole = len / V::N * V::N;
    // SAFETY: passed on.
    unsafe {
        let mut most = V::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(V::N) {
            most = V::load(x.add(i)).max(most);
        }
        if whole < len {
            most = V::load(x.add(whole)).first(len - whole, most).max(most);
        }
        let most = V::splat(most.largest());
        let (mut sum, scale) = (V::splat(0.0), V::splat(scale));
        for i in (0..whole).step_by(V::N) {
            let e = exp2(V::load(x.add(i)).sub(most).mul(scale));
            e.store(x.add(i));
            sum = sum.add(e);
        }
        if whole < len {
            let e = exp2(V::load(x.add(whole)).sub(most).mul(scale)).first(len - whole, V::splat(0.0));
            e.store(x.add(whole));
            sum = sum.add(e);
        }
        sum.total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every instruction set that this CPU has (and `QUETSCH_ISA` leaves).
    fn tiers() -> impl Iterator<Item = Isa> {
        [Isa::Scalar, Isa::Avx2, Isa::Avx512].into_iter().filter(|i| *i <= isa())
    }

    fn noise(n: usize, seed: u32, size: f32) -> Vec<f32> {
        let value = |i: u32| (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761) >> 8;
        (0..n as u32).map(|i| (value(i) as f32 / (1 << 23) as f32 - 1.0) * size).collect()
    }

    fn run(isa: Isa, qkv: &[f32], heads: Heads, starts: &[usize]) -> Vec<f32> {
        let tokens = starts[starts.len() - 1];
        let longest = starts.windows(2).map(|s| s[1] - s[0]).max().unwrap_or(0);
        let mut context = vec![9.0; tokens * heads.inner()];
        let mut scratch = vec![f32::NAN; heads.scratch_len(longest)];
        let window = Window::new(&mut context, tokens, heads.inner(), heads.inner());
        on_isa(isa, qkv, heads, 0..heads.count, starts, window, &mut scratch);
        context
    }

    /// softmax(q k^T / sqrt(dim)) v in f64.
    fn reference(qkv: &[f32], heads: Heads, starts: &[usize]) -> Vec<f64> {
        let (inner, stride) = (heads.inner(), 3 * heads.inner());
        let mut out = vec![0.0; qkv.len() / 3];
        for s in starts.windows(2) {
            for (i, h) in (s[0]..s[1]).flat_map(|i| (0..heads.count).map(move |h| (i, h))) {
                let at = |token: usize, which: usize, d: usize| {
                    f64::from(qkv[token * stride + which * inner + h * heads.dim + d])
                };
                let score = |j: usize| (0..heads.dim).map(|d| at(i, 0, d) * at(j, 1, d)).sum::<f64>();
                let scores: Vec<f64> = (s[0]..s[1]).map(|j| score(j) / (heads.dim as f64).sqrt()).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = scores.iter().map(|x| (x - most).exp()).collect();
                for d in 0..heads.dim {
                    let sum: f64 = (s[0]..s[1]).map(|j| p[j - s[0]] * at(j, 2, d)).sum();
                    out[i * inner + h * heads.dim + d] = sum / p.iter().sum::<f64>();
                }
            }
        }
        out
    }

    /// A score is a sum of `dim` products of at most size^2, divided by sqrt(dim): off by about
    /// sqrt(dim) size^2 2^-24 per rounding; so is, relatively, its exponential, and values are at most `size`.
    fn check(heads: Heads, starts: &[usize], size: f32) {
        let tokens = starts[starts.len() - 1];
        let qkv = noise(tokens * 3 * heads.inner(), tokens as u32, size);
        let want = reference(&qkv, heads, starts);
        let scores = (heads.dim as f32).sqrt() * size * size;
        let tolerance = f64::from(size * (4.0 + 4.0 * scores) * 6e-8 + 1e-7);
        for isa in tiers() {
            let got = run(isa, &qkv, heads, starts);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((f64::from(*g) - w).abs() < tolerance, "{isa:?} {heads:?} {starts:?} at {i}: {g} {w}");
            }
        }
    }

    #[test]
    fn every_tier_is_near_the_exact_answer() {
        for (count, dim) in [(1, 1), (3, 7), (2, 16), (1, 33), (2, 32), (2, 64), (1, 100)] {
            check(Heads { count, dim }, &[0, 1, 3, 8, 8, 17, 33, 82, 129], 1.0);
        }
        check(Heads { count: 1, dim: 64 }, &[0, 512], 1.0);
        check(Heads { count: 2, dim: 32 }, &[0, 40], 6.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn any_shape_is_near_the_exact_answer(
            count in 0usize..4, dim in 1usize..70, lens in prop::collection::vec(0usize..70, 1..4), size in 0.1f32..4.0,
        ) {
            let mut starts = vec![0];
            lens.iter().for_each(|n| starts.push(starts[starts.len() - 1] + n));
            check(Heads { count, dim }, &starts, size);
        }
    }

    #[test]
    fn neighbours_and_the_split_of_heads_change_no_bit() {
        let heads = Heads { count: 5, dim: 24 };
        let (starts, inner) = ([0, 13, 14, 60, 77], 120);
        let qkv = noise(77 * 3 * inner, 5, 2.0);
        for isa in tiers() {
            let all = run(isa, &qkv, heads, &starts);
            for s in starts.windows(2) {
                let alone = run(isa, &qkv[s[0] * 3 * inner..s[1] * 3 * inner], heads, &[0, s[1] - s[0]]);
                assert!(alone == all[s[0] * inner..s[1] * inner], "{isa:?} {s:?}");
            }
            let mut parts = vec![9.0; 77 * inner];
            let mut scratch = vec![0.0; heads.scratch_len(46)];
            for some in [0..2, 2..2, 2..5] {
                let mut whole = Window::new(&mut parts, 77, inner, inner);
                let columns = whole.part(0..77, some.start * 24..some.end * 24);
                on_isa(isa, &qkv, heads, some, &starts, columns, &mut scratch);
            }
            assert!(parts == all, "{isa:?}");
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so_in_its_row() {
        let heads = Heads { count: 1, dim: 32 };
        for (isa, bad) in tiers().flat_map(|i| [f32::NAN, f32::INFINITY].map(|b| (i, b))) {
            let mut qkv = noise(20 * 96, 3, 1.0);
            qkv[5 * 96] = bad; // the query of token 5
            let got = run(isa, &qkv, heads, &[0, 20]);
            for (token, row) in got.chunks(32).enumerate() {
                assert_eq!(row.iter().all(|v| v.is_nan()), token == 5, "{isa:?} {bad} token {token}");
            }
        }
    }

    #[test]
    #[should_panic]
    fn short_operands_are_refused() {
        attention(&[0.0; 95], Heads { count: 1, dim: 16 }, &[0, 2], &mut [0.0; 32], &mut [0.0; 4096]);
    }
}
