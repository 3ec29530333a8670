//! The int8 product on AVX512-VNNI, and the epilogue that AMX shares.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes: the panels hold w + 128, and 128 times the sum of the row is taken off
//! at the end. So a row is read as it is, four bytes at a time, straight into all lanes.

use crate::gelu::x86::{gelu, gelu_of_rows};
use crate::int8::{LANES, Rows, stride};
use crate::prefetch::Ahead;
use std::arch::asm;
use std::arch::x86_64::*;

/// out `[rows, n]` = f(x w^T * scales + bias); see [`Matrix::multiply`](crate::int8::Matrix::multiply). Where it writes
/// is a pointer: several threads may write columns of one matrix.
pub(crate) struct Product<'a> {
    pub x: Rows<'a>,
    pub k: usize,
    /// `[n / 16][stride(k) / 4][16][4]`: for VNNI w + 128 as an unsigned byte, for AMX w.
    pub w: &'a [i8],
    /// Of the rows of w. `[n]`
    pub scale: &'a [f32],
    pub bias: &'a [f32],
    /// Whether f is GELU, else nothing.
    pub gelu: bool,
    /// Floats from one row of the result to the next.
    pub step: usize,
}

/// Rows of a block: with two panels 24 sums, with four panels 6 rows do the same for short inputs.
const ROWS: usize = 12;
/// Rows of x whose sums are taken at a time.
const STRIP: usize = 256;

/// Calls `block` with its number of rows as a constant.
macro_rules! block {
    ($panels:literal, $rows:expr, $args:tt, [$($n:literal)*]) => {
        match $rows {
            $($n => block::<$n, $panels> $args,)*
            _ => unreachable!("at most ROWS rows"),
        }
    };
}

/// Panels are the outer loop: a panel stays in L1 while all rows pass.
///
/// # Safety
/// The CPU has the features; the slices and `out` are as long as [`Matrix::multiply`](crate::int8::Matrix::multiply)
/// checks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn product(p: &Product, out: *mut f32) {
    let (all, panels) = (p.x.scale.len(), p.scale.len().div_ceil(LANES));
    for strip in (0..all).step_by(STRIP) {
        let rows = STRIP.min(all - strip);
        let mut sums = [0; STRIP];
        for (r, sum) in sums[..rows].iter_mut().enumerate() {
            let row = &p.x.q[(strip + r) * stride(p.k)..][..p.k];
            *sum = 128 * row.iter().map(|v| i32::from(*v)).sum::<i32>();
        }
        // Blocks of nearly the same height: twelve and one would leave the one waiting for its own sums.
        let blocks = rows.div_ceil(ROWS);
        let mut panel = 0;
        while panel < panels {
            let group = match panels - panel {
                4.. if rows <= 6 => 4,
                2.. => 2,
                _ => 1,
            };
            for i in 0..blocks {
                let (first, end) = (rows * i / blocks, rows * (i + 1) / blocks);
                let (height, sums) = (end - first, &sums[first..end]);
                let first = strip + first;
                // A few rows are through before what is fetched could come, and four panels are four streams, which the
                // CPU finds.
                let ahead = match rows > 6 && panel + group < panels {
                    true => Ahead::of(i, blocks, group, stride(p.k) / 4),
                    false => Ahead::NOTHING,
                };
                // SAFETY: passed on.
                unsafe {
                    match group {
                        4 => block!(4, height, (p, first, panel, sums, ahead, out), [1 2 3 4 5 6]),
                        2 => block!(2, height, (p, first, panel, sums, ahead, out), [1 2 3 4 5 6 7 8 9 10 11 12]),
                        _ => block!(1, height, (p, first, panel, sums, ahead, out), [1 2 3 4 5 6 7 8 9 10 11 12]),
                    }
                }
            }
            panel += group;
        }
    }
}

/// acc += weights * the four bytes at `x + ahead * step`, broadcast. In `asm!` because the compiler loads all rows of a
/// block first and spills the sums.
///
/// # Safety
/// As for [`product`]; the address is inside x.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn row<const P: usize>(acc: &mut [__m512i; P], w: &[__m512i; P], x: *const i8, step: usize, ahead: usize) {
    let _four: __m512i; // its type chooses the register's width
    macro_rules! dots {
        ($address:literal, $($n:literal $a:ident $w:ident),*) => {
            asm!(
                concat!("vpbroadcastd {y}, dword ptr [", $address, "]"),
                $(concat!("vpdpbusd {", stringify!($a), "}, {", stringify!($w), "}, {y}"),)*
                x = in(reg) x,
                step = in(reg) if ahead == 0 { 0 } else { step },
                y = out(zmm_reg) _four,
                $($a = inout(zmm_reg) acc[$n], $w = in(zmm_reg) w[$n],)*
                options(pure, readonly, nostack, preserves_flags),
            )
        };
    }
    macro_rules! panels {
        ($address:literal) => {
            match P {
                1 => dots!($address, 0 a0 w0),
                2 => dots!($address, 0 a0 w0, 1 a1 w1),
                _ => dots!($address, 0 a0 w0, 1 a1 w1, 2 a2 w2, 3 a3 w3),
            }
        };
    }
    // SAFETY: reads four bytes inside x.
    unsafe {
        match ahead {
            2 => panels!("{x} + 2*{step}"),
            _ => panels!("{x} + {step}"),
        }
    }
}

/// `R` rows by `P` panels. Not inlined: with all sizes in one function the compiler runs out of registers.
///
/// # Safety
/// As for [`product`].
#[inline(never)]
#[allow(clippy::needless_range_loop)] // r and j name rows and panels of several arrays
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block<const R: usize, const P: usize>(
    p: &Product,
    first: usize,
    panel: usize,
    sums: &[i32],
    ahead: Ahead,
    out: *mut f32,
) {
    let (from_row, size) = (stride(p.k), stride(p.k) * LANES);
    let mut acc = [[_mm512_setzero_si512(); P]; R];
    // SAFETY: a panel of w holds stride(k) / 4 vectors of 64 bytes, a row of x stride(k) bytes; the rest is what
    // `product` asks for.
    unsafe {
        let mut w = p.w.as_ptr().add(panel * size);
        let mut next = ahead.behind(w.wrapping_add(P * size));
        // Every third row: the two behind it are reached by address arithmetic, so that four pointers do.
        let mut x: [*const i8; 4] =
            std::array::from_fn(|i| p.x.q.as_ptr().wrapping_add((first + 3 * i) * from_row));
        for _ in 0..p.k.div_ceil(4) {
            let mut weights = [_mm512_setzero_si512(); P];
            for j in 0..P {
                weights[j] = _mm512_loadu_si512(w.add(j * size).cast());
            }
            // Written out: as a loop the compiler does not unroll it, and the sums live in memory.
            macro_rules! rows {
                ($($r:literal)*) => {
                    $(if $r < R {
                        row(&mut acc[$r], &weights, x[$r / 3], from_row, $r % 3);
                    })*
                };
            }
            rows!(0 1 2 3 4 5 6 7 8 9 10 11);
            next.fetch::<P>();
            w = w.wrapping_add(64);
            x.iter_mut().for_each(|x| *x = x.wrapping_add(4));
        }
        for j in 0..P {
            let columns = p.columns(panel + j);
            for r in 0..R {
                let sums = _mm512_sub_epi32(acc[r][j], _mm512_set1_epi32(sums[r]));
                p.store(first + r, &columns, p.scaled(first + r, &columns, sums), out);
            }
        }
        if p.gelu {
            let column = panel * LANES;
            let width = (P * LANES).min(p.scale.len() - column);
            gelu_of_rows(out.wrapping_add(first * p.step + column), R, width, p.step);
        }
    }
}

/// What all rows of a panel of the result share.
pub(crate) struct Columns {
    first: usize,
    mask: __mmask16,
    scale: __m512,
    bias: __m512,
}

impl Product<'_> {
    /// # Safety
    /// The slices are as long as the sizes say, and the panel has a column.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn columns(&self, panel: usize) -> Columns {
        let first = panel * LANES;
        let mask = u16::MAX >> (LANES - LANES.min(self.scale.len() - first));
        // SAFETY: scale and bias are read where the mask is set: columns that exist.
        unsafe {
            let scale = _mm512_maskz_loadu_ps(mask, self.scale.as_ptr().add(first));
            let bias = match self.bias {
                [] => _mm512_setzero_ps(),
                bias => _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(first)),
            };
            Columns { first, mask, scale, bias }
        }
    }

    /// Stores f(sums * scales + bias) in a row.
    ///
    /// # Safety
    /// As for [`Product::columns`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn finish(&self, row: usize, c: &Columns, sums: __m512i, out: *mut f32) {
        let y = self.scaled(row, c, sums);
        // SAFETY: passed on.
        unsafe { self.store(row, c, if self.gelu { gelu(y) } else { y }, out) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scaled(&self, row: usize, c: &Columns, sums: __m512i) -> __m512 {
        let scale = _mm512_mul_ps(_mm512_set1_ps(self.x.scale[row]), c.scale);
        _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale), c.bias)
    }

    /// # Safety
    /// As for [`Product::columns`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(&self, row: usize, c: &Columns, y: __m512, out: *mut f32) {
        // SAFETY: the row is touched where the mask is set.
        unsafe { _mm512_mask_storeu_ps(out.add(row * self.step + c.first), c.mask, y) };
    }
}
