//! 4-bit blocks: decoding by table.

use crate::isa::{Isa, isa};
use crate::math::Rounding;
use crate::panels::Precision;
use std::ops::Range;

/// A 4-bit matrix `[n, k]` in the order in which the panels of its transpose are decoded (see [`crate::panels`]):
/// `[n / 16][k / 2][16]` bytes, each two neighbours of a row, the first in the high nibble.
pub struct Panels {
    nibbles: Vec<Codes>,
    n: usize,
    k: usize,
}

/// Two neighbours of each of 16 rows.
type Codes = [u8; LINE];
/// Columns of a panel.
const LINE: usize = 16;

/// What codes mean: map * scale of its block, rounded to the type that was quantised and then to that of the product.
/// Panels of bf16 hold values rounded to bf16, of which denormals may be zero: their products count them as zero.
#[derive(Clone, Copy)]
pub struct Values {
    /// By code.
    pub map: [f32; 16],
    /// Elements of the row-major matrix in a block.
    pub block: usize,
    /// What values are rounded to, the first one first.
    pub rounded: [Rounding; 2],
}

impl Panels {
    /// From two elements a byte, row after row.
    ///
    /// # Panics
    /// When there are fewer than n k elements.
    pub fn new(packed: &[u8], n: usize, k: usize) -> Panels {
        let words = k.div_ceil(2);
        let mut nibbles = vec![[0; LINE]; n.div_ceil(LINE) * words];
        let code = |i: usize| if i.is_multiple_of(2) { packed[i / 2] >> 4 } else { packed[i / 2] & 15 };
        for (c, w) in (0..n).flat_map(|c| (0..words).map(move |w| (c, w))) {
            let first = c * k + 2 * w;
            nibbles[c / LINE * words + w][c % LINE] = if k.is_multiple_of(2) {
                packed[first / 2]
            } else {
                code(first) << 4 | if 2 * w + 1 < k { code(first + 1) } else { 0 }
            };
        }
        Panels { nibbles, n, k }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.nibbles.as_flattened().len()
    }

    /// Decodes the panels of columns `columns` (its start a multiple of 16) of the transpose `[k, n]` into a right
    /// operand of [`crate::panels::multiply`]; `scale(b)` is that of block `b`.
    ///
    /// # Panics
    /// When `out` is shorter than the panels, or columns are not there.
    pub fn decode(
        &self,
        columns: Range<usize>,
        p: Precision,
        values: &Values,
        scale: impl Fn(usize) -> f32,
        out: &mut [u32],
    ) {
        assert!(columns.start.is_multiple_of(LINE) && columns.end <= self.n);
        assert!(p.panels_len(self.k, columns.len()) <= out.len());
        if self.k == 0 {
            return;
        }
        let (words, panel) = (self.k.div_ceil(2), p.panel_words(self.k) * LINE);
        let panels = self.nibbles.chunks_exact(words).skip(columns.start / LINE);
        let firsts = columns.step_by(LINE);
        for ((first, codes), out) in firsts.zip(panels).zip(out.chunks_exact_mut(panel)) {
            self.decode_panel(first, codes, p, values, &scale, out);
        }
    }

    fn decode_panel(
        &self,
        first: usize,
        codes: &[Codes],
        p: Precision,
        values: &Values,
        scale: &impl Fn(usize) -> f32,
        out: &mut [u32],
    ) {
        let per = if p == Precision::Bf16 { LINE } else { 2 * LINE };
        let columns = LINE.min(self.n - first);
        // Neighbours are of one block unless it ends inside a byte.
        let halves = if self.k.is_multiple_of(2) && values.block.is_multiple_of(2) { 1 } else { 2 };
        // With whole blocks in a row, all columns come to the next one at the same word.
        let together = halves == 1 && self.k.is_multiple_of(values.block);
        let mut w = 0;
        while w < codes.len() {
            // Words for which no column comes to another block, and the scales of their halves.
            let (mut run, mut scales) = (codes.len() - w, [[0.0; LINE]; 2]);
            if together {
                let (each, block) = (self.k / values.block, 2 * w / values.block);
                run = values.block / 2;
                (0..columns).for_each(|c| scales[0][c] = scale((first + c) * each + block));
            } else {
                for (half, scales) in scales.iter_mut().enumerate().take(halves.min(self.k - 2 * w)) {
                    for (c, to) in scales.iter_mut().enumerate().take(columns) {
                        let at = (first + c) * self.k + 2 * w + half;
                        let block = at / values.block;
                        run = run.min(((block + 1) * values.block - at).div_ceil(2));
                        *to = scale(block);
                    }
                }
            }
            if halves == 1 {
                scales[1] = scales[0];
            }
            if 2 * (w + run) > self.k {
                run = run.max(2) - 1; // an odd k: the last word has one half
            }
            expand(&codes[w..w + run], &scales, values, p, &mut out[w * per..(w + run) * per], isa());
            w += run;
        }
        out[w * per..].fill(0);
    }
}

/// Words of a panel that have the same scales.
fn expand(codes: &[Codes], scales: &[[f32; LINE]; 2], values: &Values, p: Precision, out: &mut [u32], isa: Isa) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        match p {
            // SAFETY: `isa` is at most what this CPU has.
            Precision::F32 => return unsafe { x86::f32_words(codes, scales, values, out) },
            Precision::Bf16 if is_x86_feature_detected!("avx512bf16") => {
                // SAFETY: as above, and the last feature was just seen.
                return unsafe { x86::bf16_words(codes, scales, values, out) };
            }
            Precision::Bf16 => {}
        }
    }
    let _ = isa;
    expand_plain(codes, scales, values, p, out);
}

kernel! {
    fn expand_plain(
        codes: &[Codes],
        scales: &[[f32; LINE]; 2],
        values: &Values,
        p: Precision,
        out: &mut [u32],
    ) {
        let [source, compute] = values.rounded;
        let value = |code: u8, scale: f32| {
            compute.of(source.of(values.map[usize::from(code)] * scale)).to_bits()
        };
        let per = if p == Precision::Bf16 { LINE } else { 2 * LINE };
        for (codes, out) in codes.iter().zip(out.chunks_exact_mut(per)) {
            for (j, byte) in codes.iter().enumerate() {
                let (low, high) = (value(byte >> 4, scales[0][j]), value(byte & 15, scales[1][j]));
                match p {
                    Precision::Bf16 => out[j] = low >> 16 | high & 0xffff_0000,
                    Precision::F32 => (out[j], out[LINE + j]) = (low, high),
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Codes, LINE, Values};
    use crate::math::Rounding;
    use std::arch::x86_64::*;

    /// The map times two lines of scales, by code; rounded once.
    struct Products {
        map: __m512,
        scales: [__m512; 2],
        source: Rounding,
    }

    impl Products {
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn new(scales: &[[f32; LINE]; 2], values: &Values) -> Products {
            // SAFETY: the map and both lines of scales have 16 floats.
            let load = |line: &[f32; LINE]| unsafe { _mm512_loadu_ps(line.as_ptr()) };
            Products {
                map: load(&values.map),
                scales: [load(&scales[0]), load(&scales[1])],
                source: values.rounded[0],
            }
        }

        /// Of the first and of the second code of each byte.
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn of(&self, codes: &Codes) -> [__m512; 2] {
            // SAFETY: 16 bytes.
            let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
            let product = |code: __m512i, scale: __m512| {
                // The lookup reads the low four bits of a lane.
                rounded(_mm512_mul_ps(_mm512_permutexvar_ps(code, self.map), scale), self.source)
            };
            [product(_mm512_srli_epi32::<4>(codes), self.scales[0]), product(codes, self.scales[1])]
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(line: &mut [u32; LINE], v: __m512i) {
        // SAFETY: 16 words.
        unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), v) }
    }

    /// Words of two bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn bf16_words(codes: &[Codes], scales: &[[f32; LINE]; 2], values: &Values, out: &mut [u32]) {
        let products = Products::new(scales, values);
        let halves: [u16; 2 * LINE] = std::array::from_fn(|i| (i % 2 * LINE + i / 2) as u16);
        // SAFETY: 32 halves of a word.
        let halves = unsafe { _mm512_loadu_si512(halves.as_ptr().cast()) };
        for (codes, line) in codes.iter().zip(out.as_chunks_mut::<LINE>().0) {
            let [low, high] = products.of(codes);
            // SAFETY: both are 512 bits without invalid patterns.
            let both = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) };
            store(line, _mm512_permutexvar_epi16(halves, both));
        }
    }

    /// Words of one f32.
    #[target_feature(enable = "avx512f")]
    pub fn f32_words(codes: &[Codes], scales: &[[f32; LINE]; 2], values: &Values, out: &mut [u32]) {
        let products = Products::new(scales, values);
        for (codes, lines) in codes.iter().zip(out.as_chunks_mut::<LINE>().0.as_chunks_mut::<2>().0) {
            for (v, line) in products.of(codes).into_iter().zip(lines) {
                store(line, _mm512_castps_si512(rounded(v, values.rounded[1])));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn rounded(v: __m512, to: Rounding) -> __m512 {
        match to {
            Rounding::F32 => v,
            Rounding::F16 => {
                _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
            }
            Rounding::Bf16 => _mm512_castsi512_ps(round_to_bf16(v)),
        }
    }

    /// As `math::bf16`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn round_to_bf16(v: __m512) -> __m512i {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let near = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x0040_0000));
        _mm512_and_si512(near, _mm512_set1_epi32(0xffff_0000u32 as i32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panels::pack_panels_across;

    /// Odd widths, blocks that cross rows, and every rounding: the panels are those of the decoded matrix.
    #[test]
    fn panels_are_those_of_the_decoded_matrix() {
        let map: [f32; 16] = std::array::from_fn(|i| (i as f32 * 1.37).sin());
        for (n, k, block) in [(1, 1, 64), (48, 64, 64), (50, 96, 64), (17, 33, 64), (33, 7, 4), (16, 130, 64)] {
            let packed: Vec<u8> = (0..usize::div_ceil(n * k, 2)).map(|i| (i * 77 % 251) as u8).collect();
            let scale = |b: usize| (b * 31 % 17) as f32 * 0.013 + 0.001;
            let code = |i: usize| packed[i / 2] >> (4 * (1 - i % 2)) & 15;
            let panels = Panels::new(&packed, n, k);
            let types = [Rounding::F32, Rounding::F16, Rounding::Bf16];
            let pairs = types.into_iter().flat_map(|source| types.map(|compute| [source, compute]));
            let f32s = pairs.clone().map(|rounded| (rounded, Precision::F32));
            let bf16s = pairs.filter(|r| r[1] == Rounding::Bf16).map(|rounded| (rounded, Precision::Bf16));
            for (rounded, p) in f32s.chain(bf16s) {
                let value = |i: usize| rounded[1].of(rounded[0].of(map[usize::from(code(i))] * scale(i / block)));
                let rows: Vec<f32> = (0..n * k).map(value).collect();
                let mut want = vec![7; p.panels_len(k, n)];
                pack_panels_across(p, |c| &rows[c * k..(c + 1) * k], k, n, &mut want);
                let mut got = vec![9; want.len()];
                panels.decode(0..n, p, &Values { map, block, rounded }, scale, &mut got);
                // Padding may be a zero of either sign.
                let plus = |words: &[u32]| -> Vec<u32> {
                    let zero = |w: u32| [w & 0xffff, w >> 16].map(|h| if h == 0x8000 { 0 } else { h });
                    words.iter().flat_map(|w| if *w == 1 << 31 { [0; 2] } else { zero(*w) }).collect()
                };
                assert!(plus(&got) == plus(&want), "{n}x{k} {block} {p:?} {rounded:?}");
            }
        }
    }

    #[test]
    fn every_tier_expands_the_same() {
        let codes: Vec<Codes> = (0..37).map(|i| std::array::from_fn(|j| (i * 16 + j * 77) as u8)).collect();
        let map = std::array::from_fn(|i| i as f32 * 1.5 - 7.0);
        let mut scales = [[0.5; LINE]; 2];
        scales[0].iter_mut().enumerate().for_each(|(i, s)| *s = i as f32 * 0.37 + 1e-6);
        scales[1][3] = f32::INFINITY;
        for (p, per, rounded) in [
            (Precision::F32, 32, [Rounding::F32, Rounding::Bf16]),
            (Precision::F32, 32, [Rounding::Bf16, Rounding::F16]),
            (Precision::F32, 32, [Rounding::F16, Rounding::F32]),
            (Precision::Bf16, 16, [Rounding::F16, Rounding::Bf16]),
        ] {
            let values = Values { map, block: 64, rounded };
            let (mut plain, mut best) = (vec![9; 37 * per], vec![8; 37 * per]);
            expand(&codes, &scales, &values, p, &mut plain, Isa::Scalar);
            expand(&codes, &scales, &values, p, &mut best, isa());
            assert_eq!(plain, best, "{p:?} {rounded:?}");
        }
    }
}
