//! 4-bit blocks: decoding by table.

use crate::isa::{Isa, isa};
use std::ops::Range;

/// Decodes elements `range` of a tensor of two elements a byte (the first in the high nibble); `table(b)` gives the
/// sixteen values of block `b`, which holds elements `b * block ..`.
pub fn decode(
    packed: &[u8],
    block: usize,
    range: Range<usize>,
    table: impl Fn(usize) -> [f32; 16],
    out: &mut [f32],
) {
    let isa = isa();
    let mut i = range.start;
    while i < range.end {
        let (values, end) = (table(i / block), ((i / block + 1) * block).min(range.end));
        lookup(packed, i..end, &values, &mut out[i - range.start..end - range.start], isa);
        i = end;
    }
}

/// Elements `range` of one block.
fn lookup(packed: &[u8], range: Range<usize>, values: &[f32; 16], out: &mut [f32], isa: Isa) {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && range.start.is_multiple_of(2) {
        done = out.len() / 16 * 16;
        let bytes = &packed[range.start / 2..range.start / 2 + done / 2];
        // SAFETY: `isa` is at most what this CPU has.
        unsafe { lookup_avx512(bytes, values, &mut out[..done]) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    for (j, o) in (range.start + done..range.end).zip(&mut out[done..]) {
        let byte = packed[j / 2];
        *o = values[usize::from(if j % 2 == 0 { byte >> 4 } else { byte & 15 })];
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn lookup_avx512(bytes: &[u8], values: &[f32; 16], out: &mut [f32]) {
    use std::arch::x86_64::*;
    let low = _mm_set1_epi8(15);
    // SAFETY: `values` has 16 floats; every chunk has 8 bytes and 16 floats.
    unsafe {
        let values = _mm512_loadu_ps(values.as_ptr());
        for (b, o) in bytes.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<16>().0) {
            let b = _mm_loadl_epi64(b.as_ptr().cast());
            let (first, second) = (_mm_and_si128(_mm_srli_epi16(b, 4), low), _mm_and_si128(b, low));
            let index = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));
            _mm512_storeu_ps(o.as_mut_ptr(), _mm512_permutexvar_ps(index, values));
        }
    }
}

kernel! {
    /// `rows` `[n, k]` -> `out` `[k, n]`, in strips of 16 columns so that what is written stays in L1.
    pub fn transpose(rows: &[f32], n: usize, k: usize, out: &mut [f32]) {
        for first in (0..k).step_by(16) {
            let last = (first + 16).min(k);
            for (c, row) in rows[..n * k].chunks_exact(k.max(1)).enumerate() {
                for (i, v) in row[first..last].iter().enumerate() {
                    out[(first + i) * n + c] = *v;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_may_start_and_end_inside_a_byte_and_a_block() {
        let packed = [0x01, 0x23, 0x45, 0x67];
        let table = |b: usize| std::array::from_fn(|i| (100 * b + i) as f32);
        let mut all = [0.0; 8];
        decode(&packed, 4, 0..8, table, &mut all);
        assert_eq!(all, [0.0, 1.0, 2.0, 3.0, 104.0, 105.0, 106.0, 107.0]);
        let mut some = [0.0; 4];
        decode(&packed, 4, 3..7, table, &mut some);
        assert_eq!(some, all[3..7]);
    }

    #[test]
    fn every_tier_looks_up_the_same() {
        let packed: Vec<u8> = (0..300).map(|i| (i * 77 % 256) as u8).collect();
        let values: [f32; 16] = std::array::from_fn(|i| i as f32 * 1.5 - 7.0);
        for range in [0..600, 0..15, 1..64, 2..66, 64..128, 10..43, 599..600, 7..7] {
            let (mut plain, mut best) = (vec![9.0; range.len()], vec![8.0; range.len()]);
            lookup(&packed, range.clone(), &values, &mut plain, Isa::Scalar);
            lookup(&packed, range.clone(), &values, &mut best, Isa::best());
            assert_eq!(plain, best, "{range:?}");
        }
    }

    #[test]
    fn transposing_twice_is_nothing() {
        for (n, k) in [(1, 1), (3, 50), (64, 33), (2, 0), (17, 16)] {
            let x: Vec<f32> = (0..n * k).map(|i| i as f32).collect();
            let (mut y, mut z) = (vec![0.0; n * k], vec![0.0; n * k]);
            if k > 0 {
                transpose(&x, n, k, &mut y);
                transpose(&y, k, n, &mut z);
                assert_eq!((x[0], y.get(n)), (z[0], x.get(1)), "{n}x{k}");
            }
            assert_eq!(x, z);
        }
    }
}
