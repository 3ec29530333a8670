//! The int8 product on AVX512-VNNI.

use crate::int8::{LANES, Rows, stride};
use crate::math::{Activation, activate};
use std::arch::x86_64::*;

/// A product; see [`Matrix::multiply`](crate::int8::Matrix::multiply).
pub(crate) struct Product<'a> {
    pub x: Rows<'a>,
    pub k: usize,
    pub w: &'a [i8],
    /// 128 * the sum of every row of w, whole panels.
    pub sums: &'a [i32],
    pub scale: &'a [f32],
    pub bias: &'a [f32],
    pub f: Activation,
    pub step: usize,
}

/// Rows of a block: with two panels 24 accumulators, with four panels 6 rows do the same for short inputs.
const ROWS: usize = 12;

/// Calls `block` with its number of rows as a constant.
macro_rules! block {
    ($panels:literal, $rows:expr, $args:tt, [$($n:literal)*]) => {
        match $rows {
            $($n => block::<$n, $panels> $args,)*
            _ => unreachable!("at most ROWS rows"),
        }
    };
}

/// `vpdpbusd` multiplies unsigned by signed bytes: x is fed as x + 128 (its sign bit flipped) and 128 * the sum of
/// the weights is taken off at the end. Panels are the outer loop: a panel stays in L1 while all rows pass.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn product(p: &Product, out: &mut [f32]) {
    let (panels, rows) = (p.scale.len().div_ceil(LANES), p.x.scale.len());
    // Blocks of nearly the same height: twelve and one would leave the one waiting for its own sums.
    let blocks = rows.div_ceil(ROWS);
    let height = |i: usize| rows * (i + 1) / blocks - rows * i / blocks;
    let mut panel = 0;
    while panel < panels {
        let group = match panels - panel {
            4.. if rows <= 6 => 4,
            2.. => 2,
            _ => 1,
        };
        let mut first = 0;
        for i in 0..blocks {
            let height = height(i);
            match group {
                4 => block!(4, height, (p, first, panel, out), [1 2 3 4 5 6]),
                2 => block!(2, height, (p, first, panel, out), [1 2 3 4 5 6 7 8 9 10 11 12]),
                _ => block!(1, height, (p, first, panel, out), [1 2 3 4 5 6 7 8 9 10 11 12]),
            }
            first += height;
        }
        panel += group;
    }
}

#[inline]
#[allow(clippy::needless_range_loop)] // r and j name rows and panels of several arrays
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn block<const R: usize, const P: usize>(p: &Product, first: usize, panel: usize, out: &mut [f32]) {
    let (n, from_row, size) = (p.scale.len(), stride(p.k), stride(p.k) * LANES);
    let mut acc = [[_mm512_setzero_si512(); P]; R];
    let flip = _mm512_set1_epi8(-128);
    let (x, w) = (&p.x.q[first * from_row..(first + R) * from_row], &p.w[panel * size..(panel + P) * size]);
    for quad in 0..p.k.div_ceil(4) {
        // SAFETY: a panel of w holds stride(k) / 4 vectors of 64 bytes, a row of x stride(k) bytes.
        unsafe {
            let mut weights = [_mm512_setzero_si512(); P];
            for j in 0..P {
                weights[j] = _mm512_loadu_si512(w.as_ptr().add(j * size + quad * 64).cast());
            }
            for r in 0..R {
                let four = x.as_ptr().add(r * from_row + quad * 4).cast::<i32>().read_unaligned();
                let x = _mm512_xor_si512(_mm512_set1_epi32(four), flip);
                for j in 0..P {
                    acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], x, weights[j]);
                }
            }
        }
    }
    for j in 0..P {
        let column = (panel + j) * LANES;
        let live = LANES.min(n - column);
        let mask = (u32::MAX >> (32 - live)) as __mmask16;
        // SAFETY: `sums` holds whole panels; scale, bias and out are touched where the mask is set: `live` columns.
        unsafe {
            let sums = _mm512_loadu_si512(p.sums.as_ptr().add(column).cast());
            let scale = _mm512_maskz_loadu_ps(mask, p.scale.as_ptr().add(column));
            let bias = match p.bias {
                [] => _mm512_setzero_ps(),
                bias => _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(column)),
            };
            for r in 0..R {
                let exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][j], sums));
                let scale = _mm512_mul_ps(_mm512_set1_ps(p.x.scale[first + r]), scale);
                let mut y = _mm512_add_ps(_mm512_mul_ps(exact, scale), bias);
                if p.f != Activation::Identity {
                    let mut lanes = [0f32; LANES];
                    _mm512_storeu_ps(lanes.as_mut_ptr(), y);
                    activate(&mut lanes, p.f);
                    y = _mm512_loadu_ps(lanes.as_ptr());
                }
                _mm512_mask_storeu_ps(out.as_mut_ptr().add((first + r) * p.step + column), mask, y);
            }
        }
    }
}
