//! int8 rows: symmetric quantisation by row absmax and the integer product. Accumulators are exact i32, so every tier
//! gives the same bits.

use crate::isa::{Isa, isa};

kernel! {
    /// q = round(x * 127 / absmax), ties to even, and scale = absmax / 127, for every row of `width`; a row of zeros
    /// (or of less than `TINY`, whose reciprocal would overflow) has scale 0.
    pub fn quantise(x: &[f32], width: usize, q: &mut [i8], scale: &mut [f32]) {
        for (r, scale) in scale.iter_mut().enumerate() {
            let cols = r * width..(r + 1) * width;
            let (x, q) = (&x[cols.clone()], &mut q[cols]);
            let max = x.iter().fold(0f32, |m, v| if v.abs() > m { v.abs() } else { m });
            let inv = if max > TINY { 127.0 / max } else { 0.0 };
            // 1.5 * 2^23 rounds to an integer, ties to even, that sits in the low mantissa bits.
            x.iter().zip(q).for_each(|(x, q)| *q = ((x * inv) + 12_582_912.0).to_bits() as i8);
            *scale = if max > TINY { max / 127.0 } else { 0.0 };
        }
    }
}

kernel! {
    /// As [`quantise`] with one `absmax` known beforehand for all rows: what is larger is clipped to +-127.
    pub fn quantise_static(x: &[f32], width: usize, absmax: f32, q: &mut [i8], scale: &mut [f32]) {
        let inv = if absmax > TINY { 127.0 / absmax } else { 0.0 };
        for (r, scale) in scale.iter_mut().enumerate() {
            let cols = r * width..(r + 1) * width;
            let round = |x: f32| ((x * inv).clamp(-127.0, 127.0) + 12_582_912.0).to_bits() as i8;
            x[cols.clone()].iter().zip(&mut q[cols]).for_each(|(x, q)| *q = round(*x));
            *scale = if absmax > TINY { absmax / 127.0 } else { 0.0 };
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
    /// AVX512-VNNI: `[n / 16][k / 4][16][4]`, zeros behind n and k, and 128 * the sum of every row.
    Vnni(Vec<i8>, Vec<i32>),
}

/// Output columns in a vector.
const LANES: usize = 16;

impl Matrix {
    /// Packs `values` `[n, k]`; n is the number of scales.
    pub fn new(values: &[i8], scale: Vec<f32>, k: usize) -> Matrix {
        Matrix::for_isa(values, scale, k, isa())
    }

    fn for_isa(values: &[i8], scale: Vec<f32>, k: usize, isa: Isa) -> Matrix {
        assert_eq!(values.len(), scale.len() * k);
        if isa < Isa::Avx512Vnni {
            return Matrix { packed: Packed::Plain(values.to_vec()), scale, k };
        }
        let (panels, quads) = (scale.len().div_ceil(LANES), k.div_ceil(4));
        let mut packed = vec![0; panels * quads * LANES * 4];
        let mut sums = vec![0; panels * LANES];
        for (c, row) in values.chunks_exact(k.max(1)).enumerate() {
            for (i, v) in row.iter().enumerate() {
                packed[((c / LANES * quads + i / 4) * LANES + c % LANES) * 4 + i % 4] = *v;
            }
            sums[c] = 128 * row.iter().map(|v| i32::from(*v)).sum::<i32>();
        }
        Matrix { packed: Packed::Vnni(packed, sums), scale, k }
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
            Packed::Plain(v) => v.len(),
            Packed::Vnni(v, sums) => v.len() + 4 * sums.len(),
        };
        packed + 4 * self.scale.len()
    }

    /// out `[rows, n]` (row stride `stride`) = (q w^T) as exact integers * (scale * w.scale). Exact in i32 for up to
    /// 2^16 columns: 255 * 127 * 2^16 < 2^31.
    ///
    /// # Panics
    /// When a slice is shorter than the sizes say.
    pub fn multiply(&self, q: &[i8], scale: &[f32], out: &mut [f32], stride: usize) {
        let (rows, n) = (scale.len(), self.n());
        assert!(self.k <= 1 << 16 && q.len() >= rows * self.k);
        assert!(rows == 0 || n == 0 || (stride >= n && out.len() >= (rows - 1) * stride + n));
        match &self.packed {
            Packed::Plain(w) => plain(q, scale, w, &self.scale, self.k, out, stride),
            #[cfg(target_arch = "x86_64")]
            Packed::Vnni(w, sums) => {
                let product = vnni::Product { q, k: self.k, w, sums, row_scale: scale, scale: &self.scale, stride };
                // SAFETY: `Packed::Vnni` is made only where `isa()` saw AVX512-VNNI (tests: `Isa::best()`); the
                // asserts above are what `vnni::product` asks for.
                unsafe { vnni::product(&product, out) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            Packed::Vnni(..) => unreachable!("this architecture has no such tier"),
        }
    }
}

kernel! {
    /// The reference, and the tier of CPUs without integer dot products.
    fn plain(q: &[i8], scale: &[f32], w: &[i8], w_scale: &[f32], k: usize, out: &mut [f32], stride: usize) {
        const ROWS: usize = 4; // rows of x that share one pass over a row of w
        for first in (0..scale.len()).step_by(ROWS) {
            let rows = ROWS.min(scale.len() - first);
            for (c, w_scale) in w_scale.iter().enumerate() {
                let w = &w[c * k..(c + 1) * k];
                for r in first..first + rows {
                    let products = q[r * k..(r + 1) * k].iter().zip(w).map(|(a, b)| i32::from(*a) * i32::from(*b));
                    out[r * stride + c] = products.sum::<i32>() as f32 * (scale[r] * w_scale);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use super::LANES;
    use std::arch::x86_64::*;

    pub struct Product<'a> {
        pub q: &'a [i8],
        pub k: usize,
        pub w: &'a [i8],
        pub sums: &'a [i32],
        pub row_scale: &'a [f32],
        pub scale: &'a [f32],
        pub stride: usize,
    }

    /// Rows of a block: with two panels of 16 columns, 12 accumulators stay in registers.
    const ROWS: usize = 6;

    /// `vpdpbusd` multiplies unsigned by signed bytes: x is fed as x + 128 (its sign bit flipped) and 128 * the sum of
    /// the weights is taken off at the end.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub fn product(p: &Product, out: &mut [f32]) {
        let panels = p.scale.len().div_ceil(LANES);
        for first in (0..p.row_scale.len()).step_by(ROWS) {
            let rows = ROWS.min(p.row_scale.len() - first);
            let mut panel = 0;
            while panel < panels {
                let two = panel + 1 < panels;
                match (rows, two) {
                    (6, true) => block::<6, 2>(p, first, panel, out),
                    (5, true) => block::<5, 2>(p, first, panel, out),
                    (4, true) => block::<4, 2>(p, first, panel, out),
                    (3, true) => block::<3, 2>(p, first, panel, out),
                    (2, true) => block::<2, 2>(p, first, panel, out),
                    (1, true) => block::<1, 2>(p, first, panel, out),
                    (6, false) => block::<6, 1>(p, first, panel, out),
                    (5, false) => block::<5, 1>(p, first, panel, out),
                    (4, false) => block::<4, 1>(p, first, panel, out),
                    (3, false) => block::<3, 1>(p, first, panel, out),
                    (2, false) => block::<2, 1>(p, first, panel, out),
                    _ => block::<1, 1>(p, first, panel, out),
                }
                panel += if two { 2 } else { 1 };
            }
        }
    }

    #[inline]
    #[allow(clippy::needless_range_loop)] // r and j name rows and panels of several arrays
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn block<const R: usize, const P: usize>(p: &Product, first: usize, panel: usize, out: &mut [f32]) {
        let (k, quads, n) = (p.k, p.k.div_ceil(4), p.scale.len());
        let mut acc = [[_mm512_setzero_si512(); P]; R];
        let weights: [&[i8]; P] =
            std::array::from_fn(|j| &p.w[(panel + j) * quads * LANES * 4..(panel + j + 1) * quads * LANES * 4]);
        let input: [&[i8]; R] = std::array::from_fn(|r| &p.q[(first + r) * k..(first + r + 1) * k]);
        for quad in 0..k / 4 {
            // SAFETY: `weights[j]` holds `quads` vectors of 64 bytes, `input[r]` holds k >= 4 * quad + 4 bytes.
            unsafe {
                let w: [__m512i; P] =
                    std::array::from_fn(|j| _mm512_loadu_si512(weights[j].as_ptr().add(quad * 64).cast()));
                for r in 0..R {
                    let four = input[r].as_ptr().add(quad * 4).cast::<i32>().read_unaligned();
                    let x = _mm512_set1_epi32(four ^ 0x8080_8080_u32 as i32);
                    for j in 0..P {
                        acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], x, w[j]);
                    }
                }
            }
        }
        if k % 4 != 0 {
            for r in 0..R {
                let mut four = [0i8; 4];
                four[..k % 4].copy_from_slice(&input[r][k / 4 * 4..]);
                let x = _mm512_set1_epi32(i32::from_le_bytes(four.map(|b| b as u8)) ^ 0x8080_8080_u32 as i32);
                for j in 0..P {
                    // SAFETY: the last of `quads` vectors.
                    let w = unsafe { _mm512_loadu_si512(weights[j].as_ptr().add(k / 4 * 64).cast()) };
                    acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], x, w);
                }
            }
        }
        for j in 0..P {
            let column = (panel + j) * LANES;
            let live = LANES.min(n - column);
            let mask = (u32::MAX >> (32 - live)) as __mmask16;
            // SAFETY: `sums` holds whole panels; scale and out are touched where the mask is set: `live` columns.
            unsafe {
                let sums = _mm512_loadu_si512(p.sums.as_ptr().add(column).cast());
                let scale = _mm512_maskz_loadu_ps(mask, p.scale.as_ptr().add(column));
                for r in 0..R {
                    let exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][j], sums));
                    let scale = _mm512_mul_ps(_mm512_set1_ps(p.row_scale[first + r]), scale);
                    let to = out.as_mut_ptr().add((first + r) * p.stride + column);
                    _mm512_mask_storeu_ps(to, mask, _mm512_mul_ps(exact, scale));
                }
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

    /// Every tier of this CPU against i64 arithmetic.
    fn check(rows: usize, n: usize, k: usize, extra: usize) {
        let (q, w) = (bytes(rows * k, 1), bytes(n * k, 2));
        let scale: Vec<f32> = (0..n).map(|c| 0.5 + c as f32).collect();
        let row_scale: Vec<f32> = (0..rows).map(|r| 1.0 / (1 + r) as f32).collect();
        for isa in [Isa::Scalar, Isa::Avx512Vnni].into_iter().filter(|i| *i <= Isa::best()) {
            let m = Matrix::for_isa(&w, scale.clone(), k, isa);
            let stride = n + extra;
            let mut out = vec![-7.0; rows * stride];
            m.multiply(&q, &row_scale, &mut out, stride);
            for r in 0..rows {
                for c in 0..n {
                    let want: i64 = (0..k).map(|i| i64::from(q[r * k + i]) * i64::from(w[c * k + i])).sum();
                    let want = want as f32 * (row_scale[r] * scale[c]);
                    assert_eq!(out[r * stride + c], want, "{isa:?} {rows}x{n}x{k} at {r},{c}");
                }
                assert!(out[r * stride + n..(r + 1) * stride].iter().all(|v| *v == -7.0), "{isa:?} wrote too far");
            }
        }
    }

    #[test]
    fn a_static_scale_clips_and_is_the_dynamic_one_when_it_is_the_absmax() {
        let x: Vec<f32> = (0..5 * 37).map(|i| (i as f32 * 0.7).sin() * (1 + i / 37) as f32).collect();
        for (width, row) in [37usize, 185].into_iter().zip([&x[..37], &x[..]]) {
            let absmax = row.iter().fold(0f32, |m, v| m.max(v.abs()));
            let (mut a, mut b, mut scale, mut same) = (vec![0; width], vec![0; width], [0.0], [0.0]);
            quantise(row, width, &mut a, &mut scale);
            quantise_static(row, width, absmax, &mut b, &mut same);
            assert_eq!((&a, scale), (&b, same), "{width}");
        }
        let (mut q, mut scale) = (vec![0; 8], [0.0; 2]);
        quantise_static(&[0.0, 0.5, -0.5, 1.0, -1.0, 9.0, -9.0, 0.003], 4, 1.0, &mut q, &mut scale);
        assert_eq!(
            (q, scale),
            (vec![0, 64, -64, 127, -127, 127, -127, 0], [1.0 / 127.0; 2]),
            "63.5 is a tie, to even"
        );
        quantise_static(&[3.0], 1, 0.0, &mut [1], &mut scale[..1]);
        assert_eq!(scale[0], 0.0);
    }

    #[test]
    fn the_product_is_the_exact_integer_one_on_every_tier() {
        for (rows, n, k) in [(1, 1, 1), (5, 7, 33), (9, 77, 384), (3, 2, 0), (0, 3, 4), (13, 33, 1003), (6, 0, 8)] {
            check(rows, n, k, 0);
            check(rows, n, k, 5);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn odd_shapes(rows in 0usize..20, n in 0usize..70, k in 0usize..90, extra in 0usize..3) {
            check(rows, n, k, extra);
        }
    }

    #[test]
    fn quantising_keeps_zero_and_the_extremes() {
        let x = [0.0, -2.0, 1.0, 0.5, 0.0, 0.0, 1e-38, 0.0, 127.0, 0.5, 1.5, -2.5];
        let (mut q, mut s) = ([9i8; 12], [0f32; 3]);
        quantise(&x, 4, &mut q, &mut s);
        assert_eq!(q, [0, -127, 64, 32, 0, 0, 0, 0, 127, 0, 2, -2], "ties go to even");
        assert_eq!(s, [2.0 / 127.0, 0.0, 1.0]);
    }
}
