//! 4-bit blocks in the layout of bitsandbytes: NF4 (Dettmers et al. 2023) and FP4, with and without double
//! quantisation of the block scales.

use crate::checkpoint::FloatType;
use std::ops::Range;
use std::sync::LazyLock;

/// Elements per block.
pub const BLOCK: usize = 64;
/// Scales per nested scale.
pub const NESTED_BLOCK: usize = 256;

/// Quantiles of N(0, 1) scaled to [-1, 1], zero among them.
#[rustfmt::skip]
const NF4: [f32; 16] = [
    -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5, -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
    0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24, 0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
];

/// Sign in the high bit, so the values are not sorted; 12 is the largest, and the second zero has no sign on disk.
const FP4: [f32; 16] =
    [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0];

/// The codebook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitKind {
    /// 16 quantiles of the normal distribution.
    Nf4,
    /// Sign, two exponent bits, one mantissa bit.
    Fp4,
}

impl FourBitKind {
    /// The 16 values by code.
    pub fn map(self) -> [f32; 16] {
        match self {
            FourBitKind::Nf4 => NF4,
            FourBitKind::Fp4 => FP4.map(|v| v / 12.0),
        }
    }
}

/// What a linear with 4-bit or float weights multiplies in: input, weight, bias and result are rounded to this type,
/// products are summed in f32.
pub type Compute = FloatType;

/// Block scales.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// One f32 per block.
    Plain(Vec<f32>),
    /// Double quantisation: `scale = dynamic_map[code] * nested_absmax[block / nested_block] + offset`.
    Nested {
        /// 8-bit code per block.
        codes: Vec<u8>,
        /// The 256 entries of the dynamic map.
        map: Vec<f32>,
        /// One f32 per `nested_block` codes.
        nested_absmax: Vec<f32>,
        /// Codes per nested scale, 256 in bitsandbytes.
        nested_block: usize,
        /// Mean of the scales.
        offset: f32,
    },
}

/// A 4-bit tensor: blocks run over the flat row-major tensor and may cross rows.
#[derive(Clone, Debug, PartialEq)]
pub struct FourBit {
    /// The codebook's kind.
    pub kind: FourBitKind,
    /// The 16 codebook values as the file holds them.
    pub map: Vec<f32>,
    /// Two elements a byte, the first in the high nibble; empty where they stay in the file (see [`crate::dir::Rows`]).
    pub packed: Vec<u8>,
    /// Number of elements.
    pub len: usize,
    /// Elements per block, 64 by default.
    pub block: usize,
    /// The scales.
    pub absmax: Absmax,
    /// The type the values had before; dequantising rounds to it.
    pub source: FloatType,
    /// What the forward computes in.
    pub compute: Compute,
}

/// The 256 values of bitsandbytes' signed dynamic map (Dettmers 2016): for every power of ten the midpoints of an even
/// grid on [0.1, 1], with twice as many per step, plus 0 and 1.
static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut map = [0.0f32; 256];
    map[1] = 1.0;
    let mut n = 2;
    for i in 0..7i32 {
        let cells = 1usize << i;
        let step = ((1.0f32 - 0.1) / cells as f32) as f64;
        // torch.linspace: fused, the first half from the start, the second from the end.
        let edge = |j: usize| match j < cells.div_ceil(2) {
            true => (0.1f32 as f64 + step * j as f64) as f32,
            false => (1.0 - step * (cells - j) as f64) as f32,
        };
        let power = 10f64.powi(i - 6) as f32;
        for j in 0..cells {
            let middle = (edge(j) + edge(j + 1)) / 2.0 * power;
            (map[n], map[n + 1]) = (middle, -middle);
            n += 2;
        }
    }
    map.sort_by(f32::total_cmp);
    map
});

/// The nearest dynamic code of every 16-bit step of [-1, 1], ties to the lower: bitsandbytes' CPU path.
static DYNAMIC_CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let map = &*DYNAMIC_MAP;
    let nearest = |i: u16| {
        let x = i as f32 * (2.0f32 / 65535.0) - 1.0;
        let right = map.partition_point(|m| *m < x).min(255);
        let left = right.saturating_sub(1);
        if right > 0 && (map[right] - x).abs() >= (x - map[left]).abs() { left as u8 } else { right as u8 }
    };
    (0..=u16::MAX).map(nearest).collect()
});

/// `torch.sum` of a contiguous f32 vector on a CPU, to the bit: from 8 numbers on, 8 lanes of four interleaved rows, each
/// row a cascade of partial sums. The mean is in the file, so the order of additions is part of the format. (Above 32,768
/// scales torch splits the sum between threads, and its own last bit depends on their number.)
fn torch_sum(x: &[f32]) -> f32 {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const LEVELS: usize = 4;
    if x.len() < LANES {
        // Too few for lanes: four sums of single numbers, of which the first takes what is left over.
        let order = (0..1).chain(ROWS..x.len()).chain(1..ROWS);
        return order.filter_map(|i| x.get(i)).sum();
    }
    let (vectors, tail) = x.as_chunks::<LANES>();
    let (steps, rest) = vectors.as_chunks::<ROWS>();
    let add = |a: &mut [f32; LANES], b: &[f32; LANES]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    let log2 = steps.len().next_power_of_two().trailing_zeros() as usize;
    let power = (log2 / LEVELS).max(4);
    let mut sums = [[[0.0f32; LANES]; ROWS]; LEVELS];
    let whole = steps.len() >> power << power;
    for (i, step) in steps.iter().enumerate() {
        sums[0].iter_mut().zip(step).for_each(|(a, b)| add(a, b));
        let done = i + 1;
        if done > whole || !done.is_multiple_of(1 << power) {
            continue;
        }
        for level in 1..LEVELS {
            let (lower, upper) = sums.split_at_mut(level);
            upper[0].iter_mut().zip(&lower[level - 1]).for_each(|(a, b)| add(a, b));
            lower[level - 1] = Default::default();
            if done & (((1 << power) - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    let [mut first, higher @ ..] = sums;
    for level in &higher {
        first.iter_mut().zip(level).for_each(|(a, b)| add(a, b));
    }
    let mut lanes = first[0];
    rest.iter().for_each(|v| add(&mut lanes, v));
    first[1..].iter().for_each(|row| add(&mut lanes, row));
    tail.iter().chain(&lanes).fold(0.0, |sum, x| sum + x)
}

impl Absmax {
    /// Double quantisation: scales minus their mean, as codes of the dynamic map times the absmax of 256 of them.
    pub fn nested(scales: &[f32]) -> Absmax {
        let offset = if scales.is_empty() { 0.0 } else { torch_sum(scales) / scales.len() as f32 };
        let (mut codes, mut nested_absmax) = (Vec::with_capacity(scales.len()), vec![]);
        for block in scales.chunks(NESTED_BLOCK) {
            let absmax = block.iter().fold(0.0f32, |m, s| m.max((s - offset).abs()));
            let code = |s: &f32| {
                let v = ((s - offset) * (1.0 / absmax)).clamp(-1.0, 1.0);
                DYNAMIC_CODES[((v + 1.0) * 0.5 * 65535.0 + 0.5) as u16 as usize]
            };
            codes.extend(block.iter().map(|s| if absmax == 0.0 { 0 } else { code(s) }));
            nested_absmax.push(absmax);
        }
        Absmax::Nested { codes, map: DYNAMIC_MAP.to_vec(), nested_absmax, nested_block: NESTED_BLOCK, offset }
    }

    /// The scale of a block.
    pub fn scale(&self, block: usize) -> f32 {
        match self {
            Absmax::Plain(scales) => scales[block],
            Absmax::Nested { codes, map, nested_absmax, nested_block, offset } => {
                // Decoding asks for every block of every product: a power of two, as everywhere, divides quickly.
                let nested = match nested_block.is_power_of_two() {
                    true => block >> nested_block.trailing_zeros(),
                    false => block / nested_block,
                };
                map[codes[block] as usize] * nested_absmax[nested] + offset
            }
        }
    }

    /// Bytes of scales.
    pub fn bytes(&self) -> usize {
        match self {
            Absmax::Plain(scales) => 4 * scales.len(),
            Absmax::Nested { codes, nested_absmax, .. } => codes.len() + 4 * nested_absmax.len(),
        }
    }
}

/// How a 4-bit tensor is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FourBitOptions {
    /// The codebook.
    pub kind: FourBitKind,
    /// Whether the block scales are quantised too.
    pub double_quant: bool,
    /// The type the values are rounded to first.
    pub source: FloatType,
    /// What the forward computes in.
    pub compute: Compute,
    /// Elements per block: [`BLOCK`], if nothing speaks for another.
    pub block: usize,
}

impl FourBit {
    /// Per block: absmax, s = clamp(w * (1 / absmax), -1, 1), then the number of midpoints between neighbouring
    /// codebook values that are below s (a tie goes down).
    pub fn encode(w: &[f32], options: FourBitOptions) -> FourBit {
        let FourBitOptions { kind, double_quant, source, compute, block } = options;
        let map = kind.map();
        let mut sorted: Vec<u8> = (0..16).collect();
        // Stable, so that of FP4's two zeros the first is the lower one.
        sorted.sort_by(|&a, &b| map[a as usize].total_cmp(&map[b as usize]));
        let value = |rank: usize| map[sorted[rank] as usize];
        let midpoints: Vec<f32> = (0..15).map(|i| (value(i) + value(i + 1)) / 2.0).collect();
        let (mut codes, mut scales) = (Vec::with_capacity(w.len() + 1), vec![]);
        for values in w.chunks(block) {
            let values: Vec<f32> = values.iter().map(|&w| source.round(w)).collect();
            let absmax = values.iter().fold(0.0f32, |m, w| m.max(w.abs()));
            let inverse = 1.0 / absmax.max(1e-38);
            let rank = |w: &f32| midpoints.partition_point(|m| *m < (w * inverse).clamp(-1.0, 1.0));
            codes.extend(values.iter().map(|w| sorted[rank(w)]));
            scales.push(absmax);
        }
        if !codes.len().is_multiple_of(2) {
            codes.push(0);
        }
        let packed = codes.as_chunks::<2>().0.iter().map(|[high, low]| high << 4 | low).collect();
        let absmax = if double_quant { Absmax::nested(&scales) } else { Absmax::Plain(scales) };
        FourBit { kind, map: map.to_vec(), packed, len: w.len(), block, absmax, source, compute }
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.packed.len() + self.absmax.bytes()
    }

    /// `code[nibble] * absmax` in f32, rounded to the source type. `[len]`
    pub fn dequantise(&self) -> Vec<f32> {
        if !self.block.is_multiple_of(2) {
            return self.values(&self.packed, 0..self.len).collect();
        }
        let mut out = Vec::with_capacity(self.len + 1);
        for (block, bytes) in self.packed.chunks(self.block / 2).enumerate() {
            let scale = self.absmax.scale(block);
            let values: [f32; 16] = std::array::from_fn(|code| self.source.round(self.map[code] * scale));
            out.extend(bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|code| values[code as usize]));
        }
        out.truncate(self.len);
        out
    }

    /// The bytes of `packed` that hold some of the elements.
    pub fn bytes_of(elements: Range<usize>) -> Range<usize> {
        elements.start / 2..elements.end.div_ceil(2)
    }

    /// As [`FourBit::dequantise`], some of the elements, from [the bytes that hold them](FourBit::bytes_of).
    pub fn values(&self, bytes: &[u8], elements: Range<usize>) -> impl Iterator<Item = f32> {
        let first = elements.start / 2;
        let value = move |i: usize| {
            let byte = bytes[i / 2 - first];
            let code = if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            self.source.round(self.map[code as usize] * self.absmax.scale(i / self.block))
        };
        elements.map(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codebooks_are_what_bitsandbytes_prints() {
        let nf4 = [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0f64,
        ];
        assert_eq!(NF4.map(f64::from), nf4);
        assert!(DYNAMIC_MAP.windows(2).all(|w| w[0] < w[1]), "256 different values");
        assert_eq!((DYNAMIC_MAP[255], DYNAMIC_MAP[127]), (1.0, 0.0));
    }
}
