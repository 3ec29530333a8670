//! int8 rows: symmetric quantisation by row absmax and the integer product. Accumulators are exact i32, so every tier
//! gives the same bits.

use crate::isa::{Isa, isa};
use crate::math::Activation;
#[cfg(target_arch = "x86_64")]
use crate::math::bias_activation;
use crate::window::Window;
#[cfg(target_arch = "x86_64")]
use crate::{amx, pairs, vnni};

/// Rows quantised to int8: `q` `[rows, stride(k)]`, zeros behind k, and what an integer of a row is worth.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Integers.
    pub q: &'a [i8],
    /// absmax / 127. `[rows]`
    pub scale: &'a [f32],
}

/// Bytes from one quantised row to the next: k rounded up, so that kernels read whole vectors.
pub fn stride(k: usize) -> usize {
    k.next_multiple_of(64)
}

/// The magnitude that becomes 127.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    /// The largest of each row.
    Row,
    /// One for all rows, known beforehand; what is larger is clipped to +-127.
    Fixed(f32),
}

#[inline(always)]
fn absmax(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0f32; 16];
    let larger = |m: &mut f32, v: &f32| *m = if v.abs() > *m { v.abs() } else { *m };
    chunks.iter().for_each(|c| lanes.iter_mut().zip(c).for_each(|(m, v)| larger(m, v)));
    let mut max = 0f32;
    lanes.iter().chain(rest).for_each(|v| larger(&mut max, v));
    max
}

impl Range {
    /// The magnitude of a fixed range, else NaN: a number in both cases, so that no branch reads what is not there.
    #[inline(always)]
    pub(crate) fn fixed(self) -> f32 {
        match self {
            Range::Row => f32::NAN,
            Range::Fixed(max) => max,
        }
    }
}

/// Quantises one row into `stride(x.len())` bytes, in a range that is [`Range::fixed`]; returns its scale.
#[inline(always)]
pub(crate) fn quantise_row(x: &[f32], fixed: f32, q: &mut [i8]) -> f32 {
    let (own, padding) = q.split_at_mut(x.len());
    padding.fill(0);
    // 1.5 * 2^23 rounds to an integer, ties to even, that sits in the low mantissa bits.
    let round = |x: f32| (x + 12_582_912.0).to_bits() as i8;
    let max = if fixed.is_nan() { absmax(x) } else { fixed };
    let inverse = if max > TINY { 127.0 / max } else { 0.0 };
    match fixed.is_nan() {
        true => x.iter().zip(own).for_each(|(x, q)| *q = round(x * inverse)),
        false => x.iter().zip(own).for_each(|(x, q)| *q = round((x * inverse).clamp(-127.0, 127.0))),
    }
    if max > TINY { max / 127.0 } else { 0.0 }
}

kernel! {
    /// q = round(x * 127 / absmax), ties to even, and scale = absmax / 127, for every row of `width`; an absmax of 0
    /// (or of less than `TINY`, whose reciprocal would overflow) has scale 0. `q` has rows of `stride(width)`.
    pub fn quantise(x: &[f32], width: usize, range: Range, q: &mut [i8], scale: &mut [f32]) {
        let fixed = range.fixed();
        for (r, scale) in scale.iter_mut().enumerate() {
            let q = &mut q[r * stride(width)..(r + 1) * stride(width)];
            *scale = quantise_row(&x[r * width..(r + 1) * width], fixed, q);
        }
    }
}

/// Far below every activation, far above where 127 / x overflows.
const TINY: f32 = 1e-30;

/// An int8 matrix `[n, k]` with one scale per row, packed for the tier in use.
#[derive(Clone, Debug)]
pub struct Matrix {
    packed: Packed,
    /// What an accumulator is multiplied by. `[n]`
    scale: Vec<f32>,
    k: usize,
}

#[derive(Clone, Debug)]
enum Packed {
    /// `[n, k]`, row-major.
    Plain(Vec<i8>),
    /// Panels `[n / 16][k / 2][16][2]`, for AVX2, or AVX-512 without VNNI.
    #[cfg(target_arch = "x86_64")]
    Pairs(Vec<i8>, pairs::Width),
    /// Panels `[n / 16][stride(k) / 4][16][4]` of w + 128, so that AVX512-VNNI may take them for unsigned.
    Vnni(Vec<i8>),
    /// The same panels of w, for AMX.
    Amx(Vec<i8>),
}

/// Output columns of a panel.
pub const LANES: usize = 16;

impl Matrix {
    /// Packs `values` `[n, k]`; n is the number of scales.
    pub fn new(values: &[i8], scale: Vec<f32>, k: usize) -> Matrix {
        Matrix::for_isa(values, scale, k, isa())
    }

    fn for_isa(values: &[i8], scale: Vec<f32>, k: usize, isa: Isa) -> Matrix {
        assert_eq!(values.len(), scale.len() * k);
        if isa < Isa::Avx512Vnni {
            let packed = match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => Packed::Pairs(in_pairs(values, scale.len(), k), pairs::Width::Avx2),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => Packed::Pairs(in_pairs(values, scale.len(), k), pairs::Width::Avx512),
                _ => Packed::Plain(values.to_vec()),
            };
            return Matrix { packed, scale, k };
        }
        let (panels, quads) = (scale.len().div_ceil(LANES), stride(k) / 4);
        let flip = if isa < Isa::Amx { -128 } else { 0 };
        let mut packed = vec![flip; panels * quads * LANES * 4];
        for (c, row) in values.chunks_exact(k.max(1)).enumerate() {
            for (i, v) in row.iter().enumerate() {
                packed[((c / LANES * quads + i / 4) * LANES + c % LANES) * 4 + i % 4] = *v ^ flip;
            }
        }
        let packed = if isa < Isa::Amx { Packed::Vnni(packed) } else { Packed::Amx(packed) };
        Matrix { packed, scale, k }
    }

    /// Rows of the matrix: columns of the product.
    pub fn n(&self) -> usize {
        self.scale.len()
    }

    /// Columns of the matrix.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        let packed = match &self.packed {
            Packed::Plain(v) | Packed::Vnni(v) | Packed::Amx(v) => v.len(),
            #[cfg(target_arch = "x86_64")]
            Packed::Pairs(v, _) => v.len(),
        };
        packed + 4 * self.scale.len()
    }

    /// Row `c` of the matrix's transpose, as floats: `out[j] = w[j][c] * scale[j]`.
    pub fn column(&self, c: usize, out: &mut [f32]) {
        let panel = |j: usize| ((j / LANES * (stride(self.k) / 4) + c / 4) * LANES + j % LANES) * 4 + c % 4;
        let at = |j: usize| match &self.packed {
            Packed::Plain(w) => w[j * self.k + c],
            #[cfg(target_arch = "x86_64")]
            Packed::Pairs(w, _) => w[pair(self.k, j, c)],
            Packed::Vnni(w) => w[panel(j)] ^ -128,
            Packed::Amx(w) => w[panel(j)],
        };
        for (j, (o, scale)) in out.iter_mut().zip(&self.scale).enumerate() {
            *o = f32::from(at(j)) * scale;
        }
    }

    /// out `[rows, n]` (from row to row `step`) = f((x w^T) as exact integers * (x.scale * w.scale) + bias); without a
    /// bias where it is empty. Exact in i32 for up to 2^16 columns: 255 * 127 * 2^16 < 2^31.
    ///
    /// # Panics
    /// When a slice is shorter than the sizes say.
    pub fn multiply(&self, x: Rows, bias: &[f32], f: Activation, out: &mut [f32], step: usize) {
        self.multiply_columns(x, 0, bias, f, Window::new(out, x.scale.len(), self.n(), step));
    }

    /// As [`Matrix::multiply`], but only columns of the product: those from `first` on, as many as `out` has. `bias` is
    /// that of all columns.
    ///
    /// # Panics
    /// When `first` is not a multiple of [`LANES`], or a slice is shorter than the sizes say.
    pub fn multiply_columns(&self, x: Rows, first: usize, bias: &[f32], f: Activation, mut out: Window) {
        let (rows, width, k) = (x.scale.len(), out.width(), self.k);
        assert!(k <= 1 << 16 && x.q.len() >= rows * stride(k));
        assert!(first.is_multiple_of(LANES) && first + width <= self.n() && rows == out.rows());
        assert!(bias.is_empty() || bias.len() >= first + width);
        if rows == 0 || width == 0 {
            return;
        }
        let (bias, scale) = (bias.get(first..).unwrap_or_default(), &self.scale[first..first + width]);
        #[cfg(target_arch = "x86_64")]
        let (step, panels, gelu) = (out.stride(), first / LANES * stride(k) * LANES, f == Activation::Gelu);
        match &self.packed {
            Packed::Plain(w) => return plain(x, &w[first * k..], scale, k, bias, f, &mut out),
            #[cfg(target_arch = "x86_64")]
            Packed::Pairs(w, width) => {
                // SAFETY: made only where `isa()` saw the instruction set (tests: `Isa::best()`).
                unsafe { pairs::product(*width, x, k, &w[pair(k, first, 0)..], scale, bias, &mut out) };
                return bias_activation(&mut out, &[], f);
            }
            #[cfg(target_arch = "x86_64")]
            Packed::Vnni(w) => {
                let product = vnni::Product { x, k, w: &w[panels..], scale, bias, gelu, step };
                // SAFETY: `Packed::Vnni` is made only where `isa()` saw AVX512-VNNI (tests: `Isa::best()`); the
                // asserts above are what `vnni::product` asks for, and the window is where it may write.
                unsafe { vnni::product(&product, out.as_mut_ptr()) }
            }
            #[cfg(target_arch = "x86_64")]
            Packed::Amx(w) => {
                let product = vnni::Product { x, k, w: &w[panels..], scale, bias, gelu, step };
                // SAFETY: as above: `isa()` saw that AMX works.
                unsafe { amx::int8(&product, out.as_mut_ptr()) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            Packed::Vnni(..) | Packed::Amx(_) => unreachable!("this architecture has no such tier"),
        }
        #[cfg(target_arch = "x86_64")]
        if f != Activation::Identity && f != Activation::Gelu {
            bias_activation(&mut out, &[], f);
        }
    }
}

/// Where row `j` has column `c` in panels of pairs.
#[cfg(target_arch = "x86_64")]
fn pair(k: usize, j: usize, c: usize) -> usize {
    ((j / LANES * pairs::pairs(k) + c / 2) * LANES + j % LANES) * 2 + c % 2
}

#[cfg(target_arch = "x86_64")]
fn in_pairs(values: &[i8], n: usize, k: usize) -> Vec<i8> {
    let mut packed = vec![0; n.div_ceil(LANES) * LANES * 2 * pairs::pairs(k)];
    for (j, row) in values.chunks_exact(k.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(c, v)| packed[pair(k, j, c)] = *v);
    }
    packed
}

kernel! {
    /// The reference, and the tier of CPUs without integer dot products.
    fn plain(
        x: Rows, w: &[i8], w_scale: &[f32], k: usize, bias: &[f32], f: Activation, out: &mut Window,
    ) {
        const ROWS: usize = 4; // rows of x that share one pass over a row of w
        for first in (0..x.scale.len()).step_by(ROWS) {
            let rows = ROWS.min(x.scale.len() - first);
            for (c, w_scale) in w_scale.iter().enumerate() {
                let w = &w[c * k..(c + 1) * k];
                let bias = bias.get(c).copied().unwrap_or(0.0);
                for r in first..first + rows {
                    let q = &x.q[r * stride(k)..][..k];
                    let products = q.iter().zip(w).map(|(a, b)| i32::from(*a) * i32::from(*b));
                    out.row(r)[c] = products.sum::<i32>() as f32 * (x.scale[r] * w_scale) + bias;
                }
            }
            for r in first..first + rows {
                crate::math::activate(out.row(r), f);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(n: usize, seed: u64) -> Vec<i8> {
        (0..n as u64).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 as i8).collect()
    }

    /// `[rows, k]` -> rows of `stride(k)` with zeros behind k.
    fn padded(q: &[i8], rows: usize, k: usize) -> Vec<i8> {
        let mut out = vec![0; rows * stride(k)];
        (0..rows).for_each(|r| out[r * stride(k)..][..k].copy_from_slice(&q[r * k..][..k]));
        out
    }

    /// Every tier of this CPU against i64 arithmetic.
    fn check(rows: usize, n: usize, k: usize, extra: usize) {
        let (q, w) = (bytes(rows * k, 1), bytes(n * k, 2));
        let scale: Vec<f32> = (0..n).map(|c| 0.5 + c as f32).collect();
        let row_scale: Vec<f32> = (0..rows).map(|r| 1.0 / (1 + r) as f32).collect();
        let bias: Vec<f32> = (0..n).map(|c| 100.0 - c as f32).collect();
        let x = padded(&q, rows, k);
        let x = Rows { q: &x, scale: &row_scale };
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Amx]
            .into_iter()
            .filter(|i| *i <= Isa::best())
        {
            let m = Matrix::for_isa(&w, scale.clone(), k, isa);
            let step = n + extra;
            let shape = format!("{isa:?} {rows}x{n}x{k}");
            let mut exact = vec![-7.0; rows * step];
            m.multiply(x, &[], Activation::Identity, &mut exact, step);
            for r in 0..rows {
                for c in 0..n {
                    let want: i64 = (0..k).map(|i| i64::from(q[r * k + i]) * i64::from(w[c * k + i])).sum();
                    let want = want as f32 * (row_scale[r] * scale[c]);
                    assert_eq!(exact[r * step + c], want, "{shape} at {r},{c}");
                }
                assert!(exact[r * step + n..(r + 1) * step].iter().all(|v| *v == -7.0), "{shape} wrote too far");
            }
            let mut out = vec![-7.0; rows * step];
            for f in [Activation::Relu, Activation::Gelu] {
                let plain = |x: f32| if f == Activation::Relu { x.max(0.0) } else { crate::math::gelu(x) };
                m.multiply(x, &bias, f, &mut out, step);
                for (r, c) in (0..rows).flat_map(|r| (0..n).map(move |c| (r, c))) {
                    let want = plain(exact[r * step + c] + bias[c]);
                    assert_eq!(out[r * step + c], want, "{shape} with bias and {f:?} at {r},{c}");
                }
            }
            let mut apart = vec![-7.0; rows * step];
            for (first, part) in Window::new(&mut apart, rows, n, step).columns(2 * LANES) {
                m.multiply_columns(x, first, &bias, Activation::Gelu, part);
            }
            assert_eq!(apart, out, "{shape}: some columns at a time");
            let mut column = vec![0.0; n];
            for c in 0..k {
                m.column(c, &mut column);
                (0..n).for_each(|j| assert_eq!(column[j], f32::from(w[j * k + c]) * scale[j], "{shape}"));
            }
        }
    }

    #[test]
    fn a_static_scale_clips_and_is_the_dynamic_one_when_it_is_the_absmax() {
        let x: Vec<f32> = (0..5 * 37).map(|i| (i as f32 * 0.7).sin() * (1 + i / 37) as f32).collect();
        for (width, row) in [37usize, 185].into_iter().zip([&x[..37], &x[..]]) {
            let absmax = row.iter().fold(0f32, |m, v| m.max(v.abs()));
            let (mut a, mut scale, mut same) = (vec![9; stride(width)], [0.0], [0.0]);
            let mut b = a.clone();
            quantise(row, width, Range::Row, &mut a, &mut scale);
            quantise(row, width, Range::Fixed(absmax), &mut b, &mut same);
            assert_eq!((&a, scale), (&b, same), "{width}");
        }
        let (mut q, mut scale) = (vec![9; 2 * 64], [0.0; 2]);
        let x = [0.0, 0.5, -0.5, 1.0, -1.0, 9.0, -9.0, 0.003];
        quantise(&x, 4, Range::Fixed(1.0), &mut q, &mut scale);
        assert_eq!(q, padded(&[0, 64, -64, 127, -127, 127, -127, 0], 2, 4), "63.5 is a tie, to even");
        assert_eq!(scale, [1.0 / 127.0; 2]);
        quantise(&[3.0], 1, Range::Fixed(0.0), &mut q[..64], &mut scale[..1]);
        assert_eq!(scale[0], 0.0);
    }

    #[test]
    fn the_product_is_the_exact_integer_one_on_every_tier() {
        let shapes =
            [(1, 1, 1), (5, 7, 33), (9, 77, 384), (3, 2, 0), (0, 3, 4), (25, 33, 1003), (6, 0, 8), (70, 49, 130)];
        for (rows, n, k) in shapes {
            check(rows, n, k, 0);
            check(rows, n, k, 5);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn odd_shapes(rows in 0usize..30, n in 0usize..70, k in 0usize..90, extra in 0usize..3) {
            check(rows, n, k, extra);
        }
    }

    #[test]
    fn quantising_keeps_zero_and_the_extremes() {
        let x = [0.0, -2.0, 1.0, 0.5, 0.0, 0.0, 1e-38, 0.0, 127.0, 0.5, 1.5, -2.5];
        let (mut q, mut s) = ([9i8; 3 * 64], [0f32; 3]);
        quantise(&x, 4, Range::Row, &mut q, &mut s);
        let want = padded(&[0, -127, 64, 32, 0, 0, 0, 0, 127, 0, 2, -2], 3, 4);
        assert_eq!(q[..], want, "ties go to even, zeros behind the row");
        assert_eq!(s, [2.0 / 127.0, 0.0, 1.0]);
    }
}
