//! A packed linear layer: one or several matrices side by side that read the same input (q, k and v).

use super::Workspace;
use crate::checkpoint::{Checkpoint, FloatType, Stored};
use crate::quant::four_bit::{Compute, FourBit};
use crate::quant::int8::{Int8Input, Int8Rows};
use crate::spec::{Lin, Tensor};
use quetsch_kernels::gemm::{Size, matmul};
use quetsch_kernels::{four_bit, int8, math};

/// What a linear reads.
pub struct Input<'a> {
    /// `[rows, k]`
    pub values: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// Row borders of the sequences.
    pub starts: &'a [usize],
}

/// A closed set: one variant per scheme.
enum Weight {
    /// f32 `[k, n]`: f32, f16, bf16 and weight-only int8 storage alike.
    Dense(Vec<f32>),
    /// int8 rows; the input quantised by row at run time.
    Int8(int8::Matrix),
    /// int8 rows; all inputs quantised with one absmax.
    Static { matrix: int8::Matrix, absmax: f32 },
    /// LLM.int8(): as `Int8`, but columns with an outlier are multiplied in float, which needs the rows as stored.
    Mixed { matrix: int8::Matrix, rows: Int8Rows, threshold: f32 },
    /// 4-bit blocks, decoded a panel of rows at a time, and their bias: with [`Compute::Bf16`] the sum is rounded
    /// after it, so it cannot be added later.
    FourBit(FourBit, Vec<f32>),
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
    /// Packs the linears at `sites`, which read the same input, side by side.
    pub fn pack(ck: &Checkpoint, sites: &[Lin]) -> Linear {
        let mut bias: Vec<f32> = sites.iter().flat_map(|s| ck.values(Tensor::B(*s)).into_owned()).collect();
        let width = |s: Lin| ck.get(Tensor::B(s)).len();
        let k = ck.spec.linears().iter().find(|(s, ..)| *s == sites[0]).map_or(0, |(_, _, k)| *k);
        let mut parts = vec![];
        let dense = |s: &Lin| match ck.get(Tensor::W(*s)) {
            Stored::Float { .. } => true,
            Stored::Int8(q) => q.input == Int8Input::Float,
            Stored::FourBit(_) => false,
        };
        if sites.iter().all(dense) {
            parts.push(Part {
                weight: Weight::Dense(transposed(ck, sites, k, bias.len())),
                offset: 0,
                n: bias.len(),
            });
            return Linear { parts, bias, k };
        }
        let mut offset = 0;
        for &s in sites {
            let n = width(s);
            let float = || Weight::Dense(transposed(ck, &[s], k, n));
            let weight = match ck.get(Tensor::W(s)) {
                Stored::Float { .. } => float(),
                Stored::Int8(q) => {
                    let matrix = || int8::Matrix::new(&q.values, q.scb.iter().map(|s| s / 127.0).collect(), k);
                    match q.input {
                        Int8Input::Float => float(),
                        Int8Input::Dynamic => Weight::Int8(matrix()),
                        Int8Input::Static { absmax } => Weight::Static { matrix: matrix(), absmax },
                        Int8Input::Mixed { threshold } => {
                            Weight::Mixed { matrix: matrix(), rows: q.clone(), threshold }
                        }
                    }
                }
                Stored::FourBit(q) => {
                    let own = bias[offset..offset + n].iter_mut().map(std::mem::take).collect();
                    Weight::FourBit(q.clone(), own)
                }
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

    /// The bias that the caller adds together with the non-linearity.
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// out `[rows, n]` = x W^T, and what of the bias [`Linear::bias`] does not hold.
    pub(super) fn run(&self, x: &Input, ws: &mut Workspace, out: &mut [f32]) {
        let stride = self.n();
        for part in &self.parts {
            let size = Size { m: x.rows, n: part.n, k: self.k };
            // With no column of its own there may be no element behind the offset.
            let out = out.get_mut(part.offset..).unwrap_or_default();
            match &part.weight {
                Weight::Dense(w) => matmul(size, x.values, w, out, stride),
                Weight::Int8(w) => integer(x.values, x.rows, w, None, ws, out, stride),
                Weight::Static { matrix, absmax } => {
                    integer(x.values, x.rows, matrix, Some(*absmax), ws, out, stride);
                }
                Weight::Mixed { matrix, rows, threshold } => {
                    let outliers = take_outliers(x, *threshold);
                    integer(&outliers.rest, x.rows, matrix, None, ws, out, stride);
                    outliers.add_to(rows, self.k, out, stride);
                }
                Weight::FourBit(w, bias) => panels(size, x.values, w, bias, ws, out, stride),
            }
        }
    }
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

/// The integer product of input rows quantised by one absmax, or each by its own at run time.
fn integer(
    values: &[f32],
    rows: usize,
    w: &int8::Matrix,
    absmax: Option<f32>,
    ws: &mut Workspace,
    out: &mut [f32],
    stride: usize,
) {
    let (mut q, mut scale) = (ws.bytes(rows * w.k()), ws.floats(rows));
    let (some_q, some_scale) = (&mut q[..rows * w.k()], &mut scale[..rows]);
    match absmax {
        Some(absmax) => int8::quantise_static(values, w.k(), absmax, some_q, some_scale),
        None => int8::quantise(values, w.k(), some_q, some_scale),
    }
    w.multiply(&q, &scale[..rows], out, stride);
    ws.bytes.push(q);
    ws.floats.push(scale);
}

/// The input of LLM.int8() (Dettmers et al. 2022), rounded to f16 and taken apart.
struct Outliers {
    /// `[rows, k]` with zeros where an outlier column was.
    rest: Vec<f32>,
    /// (row, column, value)
    taken: Vec<(usize, usize, f32)>,
}

/// A column is an outlier when some element of the *sequence* reaches the threshold; 0 turns outliers off.
fn take_outliers(x: &Input, threshold: f32) -> Outliers {
    let k = x.values.len() / x.rows.max(1);
    let mut rest: Vec<f32> = x.values.iter().map(|v| FloatType::F16.round(*v)).collect();
    let mut taken = vec![];
    for s in x.starts.windows(2).filter(|_| threshold > 0.0) {
        for c in 0..k {
            if (s[0]..s[1]).any(|r| rest[r * k + c].abs() >= threshold) {
                taken.extend((s[0]..s[1]).map(|r| (r, c, std::mem::take(&mut rest[r * k + c]))));
            }
        }
    }
    Outliers { rest, taken }
}

impl Outliers {
    /// out += taken columns * w, in float.
    fn add_to(&self, w: &Int8Rows, k: usize, out: &mut [f32], stride: usize) {
        for &(r, c, v) in &self.taken {
            for (j, scb) in w.scb.iter().enumerate() {
                out[r * stride + j] += v * (f32::from(w.values[j * k + c]) * scb / 127.0);
            }
        }
    }
}

/// 4-bit weights: `PANEL` output columns are decoded, transposed and multiplied at a time. With [`Compute::Bf16`]
/// input, weights, bias and result are rounded to bfloat16 and products are summed in f32, as PyTorch's bf16 linear on
/// dequantised weights does.
fn panels(
    size: Size,
    values: &[f32],
    w: &FourBit,
    bias: &[f32],
    ws: &mut Workspace,
    out: &mut [f32],
    stride: usize,
) {
    const PANEL: usize = 64;
    let Size { m, n, k } = size;
    let bf16 = w.compute == Compute::Bf16;
    let round = |v: f32| if bf16 { math::bf16(v) } else { v };
    let table = |b: usize| {
        let scale = w.absmax.scale(b);
        std::array::from_fn(|i| round(w.source.round(w.map[i] * scale)))
    };
    let (mut rows, mut panel, mut x) = (ws.floats(PANEL * k), ws.floats(PANEL * k), ws.floats(m * k));
    if bf16 {
        math::round_to_bf16(&values[..m * k], &mut x[..m * k]);
    } else {
        x[..m * k].copy_from_slice(&values[..m * k]);
    }
    for first in (0..n).step_by(PANEL) {
        let width = PANEL.min(n - first);
        four_bit::decode(&w.packed, w.block, first * k..(first + width) * k, table, &mut rows);
        four_bit::transpose(&rows, width, k, &mut panel);
        matmul(Size { m, n: width, k }, &x[..m * k], &panel[..width * k], &mut out[first..], stride);
        for r in 0..m {
            let row = &mut out[r * stride + first..][..width];
            row.iter_mut().zip(&bias[first..]).for_each(|(v, b)| *v = round(*v + round(*b)));
        }
    }
    [rows, panel, x].into_iter().for_each(|b| ws.floats.push(b));
}
