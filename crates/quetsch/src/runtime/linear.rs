//! A packed linear layer: one or several matrices side by side that read the same input (q, k and v).

use super::Workspace;
use crate::checkpoint::{Checkpoint, FloatType, Stored};
use crate::quant::four_bit::{Compute, FourBit};
use crate::quant::int8::Int8Input;
use crate::spec::{Activation, Lin, Tensor};
use quetsch_kernels::gemm::{Size, matmul};
use quetsch_kernels::{four_bit, int8, math};

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
    /// int8 rows; the input quantised by row at run time.
    Int8(int8::Matrix),
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
                Stored::Float { .. } => Weight::Dense(transposed(ck, group, k, n)),
                Stored::Int8(q) => match q.input {
                    Int8Input::Float => Weight::Dense(transposed(ck, group, k, n)),
                    Int8Input::Dynamic => Weight::Int8(int8_matrix(ck, group, k)),
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

    /// Whether it reads its input quantised to int8.
    pub fn reads_int8(&self) -> bool {
        self.parts.iter().any(|p| matches!(p.weight, Weight::Int8(_)))
    }

    /// out `[rows, n]` = f(x W^T + b).
    pub(super) fn run(&self, x: &Input, f: Activation, ws: &mut Workspace, out: &mut [f32]) {
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
                Weight::Int8(w) => match x.int8 {
                    Some(x) => w.multiply(x, bias, f, out, step),
                    None => dynamic(x.values, x.rows, w, bias, f, ws, out, step),
                },
                Weight::Mixed { matrix, threshold } => {
                    let outliers = take_outliers(x, *threshold);
                    dynamic(&outliers.rest, x.rows, matrix, &[], Activation::Identity, ws, out, step);
                    outliers.add_to(matrix, out, step);
                    math::bias_activation(out, step, bias, f);
                }
                Weight::FourBit(w) => panels(size, x.values, w, bias, f, ws, out, step),
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
    fn add_to(&self, w: &int8::Matrix, out: &mut [f32], step: usize) {
        let (mut column, mut of) = (vec![0.0; w.n()], None);
        for &(r, c, v) in &self.taken {
            if of.replace(c) != Some(c) {
                w.column(c, &mut column);
            }
            out[r * step..].iter_mut().zip(&column).for_each(|(o, w)| *o += v * w);
        }
    }
}

/// 4-bit weights: `PANEL` output columns are decoded, transposed and multiplied at a time. With [`Compute::Bf16`]
/// input, weights, bias and result are rounded to bfloat16 and products are summed in f32, as PyTorch's bf16 linear on
/// dequantised weights does.
#[allow(clippy::too_many_arguments)]
fn panels(
    size: Size,
    values: &[f32],
    w: &FourBit,
    bias: &[f32],
    f: Activation,
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
    if f != Activation::Identity {
        (0..m).for_each(|r| math::activate(&mut out[r * stride..][..n], f));
    }
    [rows, panel, x].into_iter().for_each(|b| ws.floats.push(b));
}
