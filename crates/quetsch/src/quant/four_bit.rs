//! 4-bit blocks in the layout of bitsandbytes: NF4 (Dettmers et al. 2023) and FP4, with and without double
//! quantisation of the block scales.

/// The codebook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitKind {
    /// 16 quantiles of the normal distribution.
    Nf4,
    /// Sign, two exponent bits, one mantissa bit.
    Fp4,
}

/// What a 4-bit linear multiplies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compute {
    /// Input, weight and result rounded to bfloat16, f32 accumulation.
    Bf16,
    /// f32 throughout.
    F32,
}

/// Block scales.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// One f32 per block.
    Plain(Vec<f32>),
    /// Double quantisation: scale = dynamic_map[code] * nested_absmax[block / nested_block] + offset.
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
    /// Two elements a byte, the first in the high nibble.
    pub packed: Vec<u8>,
    /// Number of elements.
    pub len: usize,
    /// Elements per block, 64 by default.
    pub block: usize,
    /// The scales.
    pub absmax: Absmax,
    /// The type the values had before; dequantising rounds to it.
    pub source: crate::checkpoint::FloatType,
    /// What the forward computes in.
    pub compute: Compute,
}

impl Absmax {
    /// The scale of a block.
    pub fn scale(&self, block: usize) -> f32 {
        match self {
            Absmax::Plain(scales) => scales[block],
            Absmax::Nested { codes, map, nested_absmax, nested_block, offset } => {
                map[codes[block] as usize] * nested_absmax[block / nested_block] + offset
            }
        }
    }
}

impl FourBit {
    /// code[nibble] * absmax in f32, rounded to the source type. `[len]`
    pub fn dequantise(&self) -> Vec<f32> {
        let value = |i: usize| {
            let byte = self.packed[i / 2];
            let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
            self.source.round(self.map[code as usize] * self.absmax.scale(i / self.block))
        };
        (0..self.len).map(value).collect()
    }
}
