//! The int8 product on AVX2 and on AVX-512 without VNNI: pairs of neighbours of a row as 16-bit integers. `vpmaddwd` sums two
//! products in 32 bits exactly, where `vpmaddubsw` on bytes would saturate.

use crate::int8::{LANES, Rows, stride};
use crate::window::Window;
use std::arch::x86_64::*;

/// Pairs that `k` columns take.
pub(crate) fn pairs(k: usize) -> usize {
    k.div_ceil(2)
}

/// Rows of a block.
const ROWS: usize = 6;

/// Sums of a block for two panels, by row.
type Sums = [[[i32; LANES]; 2]; ROWS];

/// Which vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Avx2,
    Avx512,
}

/// out = (x w^T) * scales + bias; `w` is `[n / 16][pairs(k)][16][2]`, its scales are `scale`; see
/// [`Matrix::multiply`](crate::int8::Matrix::multiply).
///
/// # Safety
/// The CPU has the instruction set of `width`, AVX-512 with BW. (Slices are checked.)
pub(crate) unsafe fn product(
    width: Width,
    x: Rows,
    k: usize,
    w: &[i8],
    scale: &[f32],
    bias: &[f32],
    out: &mut Window,
) {
    let (rows, pairs) = (x.scale.len(), pairs(k));
    let panel = pairs * 2 * LANES;
    // Rows as pairs of 16 bits.
    let mut wide = vec![[0i16; 2]; rows * pairs];
    for r in 0..rows {
        let (q, wide) = (&x.q[r * stride(k)..][..2 * pairs], &mut wide[r * pairs..]);
        wide.iter_mut().zip(q.as_chunks::<2>().0).for_each(|(to, q)| *to = q.map(i16::from));
    }
    // Blocks of nearly the same height.
    let blocks = rows.div_ceil(ROWS);
    for block in 0..blocks {
        let (first, end) = (rows * block / blocks, rows * (block + 1) / blocks);
        let x16 = &wide[first * pairs..end * pairs];
        for c in (0..scale.len()).step_by(2 * LANES) {
            let two = c + LANES < scale.len();
            let at = |c: usize| &w[c / LANES * panel..][..panel];
            let panels = [at(c), at(if two { c + LANES } else { c })];
            let mut sums = [[[0; LANES]; 2]; ROWS];
            macro_rules! rows {
                ($($n:literal)*) => {
                    match (end - first, width) {
                        $(($n, Width::Avx2) => avx2::<$n>(x16, panels, &mut sums),
                        ($n, Width::Avx512) => avx512::<$n>(x16, panels, &mut sums),)*
                        _ => unreachable!("at most ROWS rows"),
                    }
                };
            }
            // SAFETY: passed on.
            unsafe { rows!(1 2 3 4 5 6) };
            for (r, sums) in (first..end).zip(&sums) {
                for (sums, c) in sums.iter().zip([c, c + LANES]).take(1 + usize::from(two)) {
                    let columns = c..(c + LANES).min(scale.len());
                    let out = &mut out.row(r)[columns.clone()];
                    store(sums, x.scale[r], &scale[columns.clone()], bias.get(columns), out);
                }
            }
        }
    }
}

/// Scales, and the bias, as every tier computes them.
fn store(sums: &[i32; LANES], x: f32, scale: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
    for (j, ((out, sum), w)) in out.iter_mut().zip(sums).zip(scale).enumerate() {
        *out = *sum as f32 * (x * w) + bias.map_or(0.0, |b| b[j]);
    }
}

/// `R` rows of `x` by two panels, eight columns in a vector; one panel after the other, because there are 16 registers.
///
/// # Safety
/// AVX2.
///
/// # Panics
/// When `x` does not hold as many pairs in a row as each panel.
#[target_feature(enable = "avx2")]
unsafe fn avx2<const R: usize>(x: &[[i16; 2]], panels: [&[i8]; 2], out: &mut Sums) {
    for (p, panel) in panels.into_iter().enumerate() {
        let (lines, pairs) = (panel.as_chunks::<{ 2 * LANES }>().0, x.len() / R);
        assert!(pairs == lines.len());
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for (i, line) in lines.iter().enumerate() {
            // SAFETY: a line is 32 bytes.
            let w: [_; 2] = std::array::from_fn(|half| unsafe {
                _mm256_cvtepi8_epi16(_mm_loadu_si128(line.as_ptr().add(half * LANES).cast()))
            });
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `i` is below `pairs`, `r` below `R`.
                let x = unsafe { _mm256_set1_epi32(x.as_ptr().add(r * pairs + i).cast::<i32>().read_unaligned()) };
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(w, x));
                }
            }
        }
        for (sums, out) in sums.iter().zip(out.iter_mut()) {
            for (sum, out) in sums.iter().zip(out[p].as_chunks_mut::<8>().0) {
                // SAFETY: a vector is eight integers.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), *sum) };
            }
        }
    }
}

/// `R` rows of `x` by two panels, 16 columns in a vector.
///
/// # Safety
/// AVX-512 with BW.
///
/// # Panics
/// When `x` does not hold as many pairs in a row as each panel.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512<const R: usize>(x: &[[i16; 2]], panels: [&[i8]; 2], out: &mut Sums) {
    let (lines, pairs) = (panels.map(|p| p.as_chunks::<{ 2 * LANES }>().0), x.len() / R);
    assert!(lines.iter().all(|lines| lines.len() == pairs));
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    for i in 0..pairs {
        // SAFETY: a line is 32 bytes.
        let w = lines.map(|lines| unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(lines[i].as_ptr().cast())) });
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `i` is below `pairs`, `r` below `R`.
            let x = unsafe { _mm512_set1_epi32(x.as_ptr().add(r * pairs + i).cast::<i32>().read_unaligned()) };
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = _mm512_add_epi32(*sum, _mm512_madd_epi16(w, x));
            }
        }
    }
    for (sums, out) in sums.iter().zip(out) {
        for (sum, out) in sums.iter().zip(out) {
            // SAFETY: a vector is 16 integers.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), *sum) };
        }
    }
}
