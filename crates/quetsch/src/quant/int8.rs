//! 8-bit rows in the layout of bitsandbytes LLM.int8() (Dettmers et al. 2022): `weight` I8 `[out, in]`, `SCB` F32
//! `[out]` = row absmax; w = q * SCB / 127.

use crate::checkpoint::FloatType;

/// Outlier threshold of bitsandbytes.
pub const THRESHOLD: f32 = 6.0;

/// What an int8 linear does with its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Int8Input {
    /// int8 per token with the row's own absmax, at run time (scheme `int8`).
    Dynamic,
    /// Nothing: the weight is decoded to float (scheme `int8-weight`). So are the rows of an embedding table.
    Float,
    /// LLM.int8(): as `Dynamic`, but columns with an element >= threshold are computed in float (scheme `bnb-int8`).
    Mixed {
        /// Outlier threshold, 6.0 in bitsandbytes; 0 turns outliers off.
        threshold: f32,
    },
}

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
        for row in w.chunks(columns.max(1)) {
            let row: Vec<f32> = row.iter().map(|&w| FloatType::F16.round(w)).collect();
            let absmax = row.iter().fold(0.0f32, |m, w| m.max(w.abs()));
            let scale = if absmax == 0.0 { 0.0 } else { (1.0 / absmax) * 127.0 };
            values.extend(row.iter().map(|w| (w * scale).round_ties_even() as i8));
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
