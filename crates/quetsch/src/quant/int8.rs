//! 8-bit rows in the layout of bitsandbytes LLM.int8() (Dettmers et al. 2022): `weight` I8 `[out, in]`, `SCB` F32
//! `[out]` = row absmax; w = q * SCB / 127.

use quetsch_kernels::math;

/// Outlier threshold of bitsandbytes.
pub const THRESHOLD: f32 = 6.0;

/// What an int8 linear does with its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Int8Input {
    /// int8 per token with the row's own absmax, at run time (scheme `int8`).
    Dynamic,
    /// Nothing: the weight is decoded to float (scheme `int8-weight`). So are the rows of an embedding table.
    Float,
    /// int8 with one absmax for all inputs, found by calibration; what is larger is clipped (scheme `int8-static`).
    Static {
        /// The magnitude that becomes 127.
        absmax: f32,
    },
    /// LLM.int8(): as `Dynamic`, but columns with an element >= threshold are computed in float (scheme `bnb-int8`).
    Mixed {
        /// Outlier threshold, 6.0 in bitsandbytes; 0 turns outliers off.
        threshold: f32,
    },
}

/// Added and taken away again, it rounds what is below 2^22, ties to even: here the step of f32 is 1.
const INTEGERS: f32 = 1.5 * (1 << 23) as f32;

/// An int8 matrix with one scale per output row.
#[derive(Clone, Debug, PartialEq)]
pub struct Int8Rows {
    /// `[out, in]`, row-major.
    pub values: Vec<i8>,
    /// Row absmax, not divided by 127. `[out]`
    pub scb: Vec<f32>,
    /// How its input is quantised.
    pub input: Int8Input,
}

impl Int8Rows {
    /// q = round_half_even(w * ((1 / SCB) * 127)) with w rounded to f16 first, as bitsandbytes does: the reciprocal
    /// before the product decides exact halves. `w: [out, in]` with `in = columns`; a row of zeros stays zero.
    pub fn encode(w: &[f32], columns: usize, input: Int8Input) -> Int8Rows {
        let (mut values, mut scb) = (Vec::with_capacity(w.len()), vec![]);
        let mut row = vec![0.0; columns];
        for w in w.chunks_exact(columns.max(1)) {
            math::round_to_f16(w, &mut row);
            let absmax = row.iter().fold(0.0f32, |m, w| m.max(w.abs()));
            let scale = if absmax == 0.0 { 0.0 } else { (1.0 / absmax) * 127.0 };
            values.extend(row.iter().map(|w| (w * scale + INTEGERS - INTEGERS) as i8));
            scb.push(absmax);
        }
        Int8Rows { values, scb, input }
    }

    /// w = q * SCB / 127. `[out * in]`
    pub fn dequantise(&self) -> Vec<f32> {
        let k = self.values.len() / self.scb.len().max(1);
        let row = |(q, s): (&[i8], &f32)| q.iter().map(|&q| q as f32 * s / 127.0).collect::<Vec<_>>();
        self.values.chunks(k.max(1)).zip(&self.scb).flat_map(row).collect()
    }
}
