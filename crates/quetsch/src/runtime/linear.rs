//! A packed linear layer: one or several matrices side by side that read the same input (q, k and v).

use super::Workspace;
use crate::checkpoint::{Checkpoint, FloatType, Stored};
use crate::quant::four_bit::{Compute, FourBit};
use crate::quant::int8::Int8Input;
use crate::spec::{Activation, Lin, Tensor};
use quetsch_kernels::gemm::{Size, Write, matmul};
use quetsch_kernels::isa::{Isa, bf16_is_fast, isa};
use quetsch_kernels::panels::{Left, Precision, Source};
use quetsch_kernels::{four_bit, int8, math, panels};
use std::collections::BTreeMap;

/// What a linear reads.
pub struct Input<'a> {
    /// `[rows, k]`
    pub values: &'a [f32],
    /// The same quantised, where its producer did it.
    pub int8: Option<int8::Rows<'a>>,
    /// Rows.
    pub rows: usize,
    /// Row borders of the sequences.
    pub starts: &'a [usize],
}

/// A closed set: one variant per scheme.
enum Weight {
    /// f32 `[k, n]`: f32, f16, bf16 and weight-only int8 storage alike.
    Dense(Vec<f32>),
    /// The same in panels of 16 columns, where AVX-512 multiplies them.
    Panels(Vec<u32>),
    /// int8 rows; the input quantised by row at run time.
    Int8(int8::Matrix),
    /// int8 rows; all inputs quantised with one absmax.
    Static { matrix: int8::Matrix, absmax: f32 },
    /// LLM.int8(): as `Int8`, but columns with an outlier are multiplied in float.
    Mixed { matrix: int8::Matrix, threshold: f32 },
    /// 4-bit blocks, decoded a panel of rows at a time.
    FourBit(FourBit),
}

/// `[k]` -> `[n]`, some columns of the output.
struct Part {
    weight: Weight,
    /// First column of the output.
    offset: usize,
    n: usize,
}

/// Packed for this machine; lives in RAM only.
pub struct Linear {
    parts: Vec<Part>,
    bias: Vec<f32>,
    k: usize,
}

impl Linear {
    /// Packs the linears at `sites`, which read the same input, side by side; neighbours of one scheme become one
    /// matrix.
    pub fn pack(ck: &Checkpoint, sites: &[Lin]) -> Linear {
        let bias: Vec<f32> = sites.iter().flat_map(|s| ck.values(Tensor::B(*s)).into_owned()).collect();
        let k = ck.spec.linears().iter().find(|(s, ..)| *s == sites[0]).map_or(0, |(_, _, k)| *k);
        let (mut parts, mut offset) = (vec![], 0);
        for group in sites.chunk_by(|a, b| one_matrix(ck.get(Tensor::W(*a)), ck.get(Tensor::W(*b)))) {
            let n = group.iter().map(|s| ck.get(Tensor::B(*s)).len()).sum();
            let weight = match ck.get(Tensor::W(group[0])) {
                Stored::Float { .. } => in_float(ck, group, k, n),
                Stored::Int8(q) => match q.input {
                    Int8Input::Float => in_float(ck, group, k, n),
                    Int8Input::Dynamic => Weight::Int8(int8_matrix(ck, group, k)),
                    Int8Input::Static { absmax } => Weight::Static { matrix: int8_matrix(ck, group, k), absmax },
                    Int8Input::Mixed { threshold } => {
                        Weight::Mixed { matrix: int8_matrix(ck, group, k), threshold }
                    }
                },
                Stored::FourBit(q) => Weight::FourBit(q.clone()),
            };
            parts.push(Part { weight, offset, n });
            offset += n;
        }
        Linear { parts, bias, k }
    }

    /// Width of the output.
    pub fn n(&self) -> usize {
        self.bias.len()
    }

    /// Bytes of memory that weights and bias take.
    pub fn bytes(&self) -> usize {
        let one = |part: &Part| match &part.weight {
            Weight::Dense(w) => 4 * w.len(),
            Weight::Panels(w) => 4 * w.len(),
            Weight::Int8(matrix) | Weight::Static { matrix, .. } | Weight::Mixed { matrix, .. } => matrix.bytes(),
            Weight::FourBit(q) => q.bytes(),
        };
        4 * self.bias.len() + self.parts.iter().map(one).sum::<usize>()
    }

    /// Whether it reads its input quantised to int8.
    pub fn reads_int8(&self) -> bool {
        self.parts.iter().any(|p| matches!(p.weight, Weight::Int8(_)))
    }

    /// out `[rows, n]` = f(x W^T + b).
    pub fn run(&self, x: &Input, f: Activation, ws: &mut Workspace, out: &mut [f32]) {
        let step = self.n();
        for part in &self.parts {
            let size = Size { m: x.rows, n: part.n, k: self.k };
            let bias = &self.bias[part.offset..part.offset + part.n];
            // With no column of its own there may be no element behind the offset.
            let out = out.get_mut(part.offset..).unwrap_or_default();
            match &part.weight {
                Weight::Dense(w) => {
                    matmul(size, x.values, w, out, step);
                    math::bias_activation(out, step, bias, f);
                }
                Weight::Panels(w) => {
                    let rows = Left::f32_rows(Source { data: x.values, stride: self.k });
                    let Size { m, n, k } = size;
                    panels::multiply(Precision::F32, rows, w, m, n, k, out, step, Write::Set);
                    math::bias_activation(out, step, bias, f);
                }
                Weight::Int8(w) => match x.int8 {
                    Some(x) => w.multiply(x, bias, f, out, step),
                    None => dynamic(x.values, x.rows, w, bias, f, ws, out, step),
                },
                Weight::Static { matrix, absmax } => {
                    let x = ws.quantise_static(x.values, x.rows, self.k, *absmax);
                    matrix.multiply(x.rows(), bias, f, out, step);
                    ws.free(x);
                }
                Weight::Mixed { matrix, threshold } => {
                    let outliers = take_outliers(x, self.k, *threshold, ws);
                    dynamic(&outliers.rest, x.rows, matrix, &[], Activation::Identity, ws, out, step);
                    outliers.add_to(matrix, out, step);
                    ws.floats.push(outliers.rest);
                    math::bias_activation(out, step, bias, f);
                }
                Weight::FourBit(w) => four_bits(size, x.values, w, bias, f, ws, out, step),
            }
        }
    }
}

/// Whether two weights that read the same input may be rows of one matrix.
fn one_matrix(a: &Stored, b: &Stored) -> bool {
    match (a, b) {
        (Stored::Float { .. }, Stored::Float { .. }) => true,
        (Stored::Int8(a), Stored::Int8(b)) => a.input == b.input,
        _ => false,
    }
}

/// int8 rows of several sites, one below the other.
fn int8_matrix(ck: &Checkpoint, sites: &[Lin], k: usize) -> int8::Matrix {
    let (mut values, mut scale) = (vec![], vec![]);
    for s in sites {
        if let Stored::Int8(q) = ck.get(Tensor::W(*s)) {
            values.extend_from_slice(&q.values);
            scale.extend(q.scb.iter().map(|s| s / 127.0));
        }
    }
    int8::Matrix::new(&values, scale, k)
}

/// W `[n, k]` of several sites -> `[k, n]`: the layout in which the f32 product is fastest.
fn transposed(ck: &Checkpoint, sites: &[Lin], k: usize, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n * k];
    let mut column = 0;
    for s in sites {
        for row in ck.values(Tensor::W(*s)).chunks_exact(k.max(1)) {
            row.iter().enumerate().for_each(|(i, v)| out[i * n + column] = *v);
            column += 1;
        }
    }
    out
}

/// Weights to be multiplied in f32, in the layout that this machine's product reads.
fn in_float(ck: &Checkpoint, sites: &[Lin], k: usize, n: usize) -> Weight {
    if isa() < Isa::Avx512 {
        return Weight::Dense(transposed(ck, sites, k, n));
    }
    let rows: Vec<f32> = sites.iter().flat_map(|s| ck.values(Tensor::W(*s)).into_owned()).collect();
    let mut out = vec![0; Precision::F32.panels_len(k, n)];
    panels::pack_panels_across(Precision::F32, |c| &rows[c * k..(c + 1) * k], k, n, &mut out);
    Weight::Panels(out)
}

/// Input rows quantised by their own absmax at run time.
#[allow(clippy::too_many_arguments)]
fn dynamic(
    values: &[f32],
    rows: usize,
    w: &int8::Matrix,
    bias: &[f32],
    f: Activation,
    ws: &mut Workspace,
    out: &mut [f32],
    step: usize,
) {
    let x = ws.quantise(values, rows, w.k());
    w.multiply(x.rows(), bias, f, out, step);
    ws.free(x);
}

/// The input of LLM.int8() (Dettmers et al. 2022), rounded to f16 and taken apart.
pub(super) struct Outliers {
    /// `[rows, k]` with zeros where an outlier column was; may be longer.
    pub(super) rest: Vec<f32>,
    /// (row, column, value)
    pub(super) taken: Vec<(usize, usize, f32)>,
}

/// A column is an outlier when some element of the *sequence* reaches the threshold; 0 turns outliers off.
pub(super) fn take_outliers(x: &Input, k: usize, threshold: f32, ws: &mut Workspace) -> Outliers {
    let (mut rest, mut largest, mut taken) = (ws.floats(x.rows * k), ws.floats(k), vec![]);
    math::round_to_f16(&x.values[..x.rows * k], &mut rest[..x.rows * k]);
    for s in x.starts.windows(2).filter(|_| threshold > 0.0) {
        math::column_absmax(&rest[s[0] * k..s[1] * k], &mut largest[..k]);
        for c in (0..k).filter(|c| largest[*c] >= threshold) {
            taken.extend((s[0]..s[1]).map(|r| (r, c, std::mem::take(&mut rest[r * k + c]))));
        }
    }
    ws.floats.push(largest);
    Outliers { rest, taken }
}

impl Outliers {
    /// out += taken columns * w, in float.
    fn add_to(&self, w: &int8::Matrix, out: &mut [f32], step: usize) {
        let mut columns = BTreeMap::new();
        for &(r, c, v) in &self.taken {
            let column = columns.entry(c).or_insert_with(|| {
                let mut column = vec![0.0; w.n()];
                w.column(c, &mut column);
                column
            });
            math::add_scaled(&mut out[r * step..][..w.n()], v, column);
        }
    }
}

/// 4-bit weights: `COLUMNS` columns of the result are decoded into panels and multiplied at a time. With
/// [`Compute::Bf16`] input, weights, bias and result are rounded to bfloat16 and products are summed in f32, as
/// PyTorch's bf16 linear on dequantised weights does; the products of rounded f32 are the same numbers.
#[allow(clippy::too_many_arguments)]
fn four_bits(
    size: Size,
    values: &[f32],
    w: &FourBit,
    bias: &[f32],
    f: Activation,
    ws: &mut Workspace,
    out: &mut [f32],
    step: usize,
) {
    const COLUMNS: usize = 48; // one tile of the product; decoded rows and panels stay in the second-level cache
    let Size { m, n, k } = size;
    let bf16 = w.compute == Compute::Bf16;
    let p = if bf16 && bf16_is_fast() { Precision::Bf16 } else { Precision::F32 };
    let map = std::array::from_fn(|i| w.map[i]);
    let table = |b: usize| {
        four_bit::table(&map, w.absmax.scale(b), w.source == FloatType::F16, bf16 || w.source == FloatType::Bf16)
    };
    let (mut rows, mut x) = (ws.floats(COLUMNS * k), ws.floats(m * k));
    let (mut left, mut right) = (ws.words(p.rows_len(m, k)), ws.words(p.panels_len(k, COLUMNS)));
    if bf16 {
        math::round_to_bf16(&values[..m * k], &mut x[..m * k]);
    } else {
        x[..m * k].copy_from_slice(&values[..m * k]);
    }
    panels::pack_rows(p, Source { data: &x, stride: k }, m, k, &mut left);
    for first in (0..n).step_by(COLUMNS) {
        let width = COLUMNS.min(n - first);
        four_bit::decode(&w.packed, w.block, first * k..(first + width) * k, table, &mut rows);
        panels::pack_panels_across(p, |c| &rows[c * k..(c + 1) * k], k, width, &mut right);
        panels::multiply(p, Left::rows(&left, p, k), &right, m, width, k, &mut out[first..], step, Write::Set);
    }
    if bf16 {
        math::bias_activation_bf16(out, step, bias, f);
    } else {
        math::bias_activation(out, step, bias, f);
    }
    [rows, x].into_iter().for_each(|b| ws.floats.push(b));
    [left, right].into_iter().for_each(|b| ws.words.push(b));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_rounded_as_stored_weights_are() {
        let x: Vec<f32> = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
        let mut got = vec![0.0; x.len()];
        math::round_to_f16(&x, &mut got);
        for (x, got) in x.iter().zip(got) {
            let want = FloatType::F16.round(*x);
            assert!(got.to_bits() == want.to_bits() || x.is_nan() && got.is_nan(), "{x}: {got} != {want}");
        }
    }
}
