//! A packed linear layer: one or several matrices side by side that read the same input (q, k and v).

use super::outliers::take_outliers;
use super::{Workspace, split};
use crate::checkpoint::{Checkpoint, Stored};
use crate::quant::four_bit::{Absmax, Compute, FourBit};
use crate::quant::int8::{Int8Input, Int8Rows};
use crate::spec::{Activation, Lin, Tensor};
use quetsch_kernels::gemm::{Size, Write, matmul};
use quetsch_kernels::int8::{self, Range};
use quetsch_kernels::isa::{Isa, bf16_is_fast, isa};
use quetsch_kernels::math::Rounding;
use quetsch_kernels::panels::{Left, Precision, Source};
use quetsch_kernels::peak::Arithmetic;
use quetsch_kernels::team::Team;
use quetsch_kernels::window::Window;
use quetsch_kernels::{four_bit, math, panels};
use std::borrow::Cow;

/// What a linear reads.
pub struct Input<'a> {
    /// `[rows, k]`
    pub values: &'a [f32],
    /// The same quantised, and in which range, where its producer did it.
    pub int8: Option<(int8::Rows<'a>, Range)>,
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
    /// The same rounded to bf16, computed in bf16; in panels of what [`precision`] says.
    Bf16(Vec<u32>),
    /// int8 rows; the input quantised in this range: of its row, or static.
    Int8 { matrix: int8::Matrix, range: Range },
    /// LLM.int8(): as `Int8` by row, but columns with an outlier are multiplied in float.
    Mixed { matrix: int8::Matrix, threshold: f32 },
    /// 4-bit blocks in the order of panels, decoded some panels at a time.
    FourBit { panels: four_bit::Panels, values: four_bit::Values, absmax: Absmax, compute: Compute },
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
    /// matrix. Weights that are not multiplied as integers anyway are in `floats`.
    pub fn pack(ck: &Checkpoint, sites: &[Lin], floats: Arithmetic) -> Linear {
        let bias: Vec<f32> = sites.iter().flat_map(|s| ck.values(Tensor::B(*s)).into_owned()).collect();
        let k = ck.spec.linears().iter().find(|(s, ..)| *s == sites[0]).map_or(0, |(_, _, k)| *k);
        let (mut parts, mut offset) = (vec![], 0);
        let weights: Vec<Sited> = sites
            .iter()
            .map(|s| (as_multiplied(ck.get(Tensor::W(*s)), k, floats), ck.get(Tensor::B(*s)).len()))
            .collect();
        for group in weights.chunk_by(|(a, _), (b, _)| one_matrix(a, b)) {
            let n = group.iter().map(|(_, n)| n).sum();
            let weight = match &*group[0].0 {
                Stored::Float { .. } => in_float(group, k, n, floats),
                Stored::Int8(q) => match q.input {
                    Int8Input::Float => in_float(group, k, n, floats),
                    Int8Input::Dynamic => Weight::Int8 { matrix: int8_matrix(group, k), range: Range::Row },
                    Int8Input::Static { absmax } => {
                        Weight::Int8 { matrix: int8_matrix(group, k), range: Range::Fixed(absmax) }
                    }
                    Int8Input::Mixed { threshold } => Weight::Mixed { matrix: int8_matrix(group, k), threshold },
                },
                Stored::FourBit(q) => four_bit_panels(q, n, k),
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
            Weight::Panels(w) | Weight::Bf16(w) => 4 * w.len(),
            Weight::Int8 { matrix, .. } | Weight::Mixed { matrix, .. } => matrix.bytes(),
            Weight::FourBit { panels, absmax, .. } => panels.bytes() + absmax.bytes(),
        };
        4 * self.bias.len() + self.parts.iter().map(one).sum::<usize>()
    }

    /// The kinds of multiply-adds, and how many of each a row of the input takes.
    pub fn arithmetic(&self) -> impl Iterator<Item = (Arithmetic, usize)> {
        let of = |compute| match precision(compute) {
            Precision::F32 => Arithmetic::F32,
            Precision::Bf16 => Arithmetic::Bf16,
        };
        self.parts.iter().map(move |part| {
            let kind = match &part.weight {
                Weight::Dense(_) | Weight::Panels(_) => Arithmetic::F32,
                Weight::Int8 { .. } | Weight::Mixed { .. } => Arithmetic::Int8,
                Weight::Bf16(_) => of(Compute::Bf16),
                Weight::FourBit { compute, .. } => of(*compute),
            };
            (kind, part.n * self.k)
        })
    }

    /// The range in which it reads its input as int8, if it does; of several ranges the first.
    pub fn reads_int8(&self) -> Option<Range> {
        self.parts.iter().find_map(|p| match p.weight {
            Weight::Int8 { range, .. } => Some(range),
            _ => None,
        })
    }

    /// out `[rows, n]` = f(x W^T + b).
    pub fn run(&self, x: &Input, f: Activation, team: &Team, ws: &mut Workspace, out: &mut [f32]) {
        let (rows, step, k) = (x.rows, self.n(), self.k);
        for part in &self.parts {
            let n = part.n;
            let bias = &self.bias[part.offset..part.offset + n];
            // With no column of its own there may be no element behind the offset.
            let out = out.get_mut(part.offset..).unwrap_or_default();
            match &part.weight {
                // By rows: the `gemm-f32` crate sums in another order for few columns.
                Weight::Dense(w) => {
                    let share = split::rows_of_product(team, rows, k, n);
                    let pieces = out.chunks_mut((share * step).max(1)).enumerate().take(rows.div_ceil(share));
                    team.each(pieces.collect(), |(i, out)| {
                        let m = share.min(rows - i * share);
                        matmul(Size { m, n, k }, &x.values[i * share * k..], w, out, step);
                        math::bias_activation(&mut Window::new(out, m, n, step), bias, f);
                    });
                }
                Weight::Panels(w) => {
                    let left = Left::f32_rows(Source { data: x.values, stride: k });
                    let pieces =
                        split::columns(team, Window::new(out, rows, n, step), rows * n * k, split::PRODUCTS, TILE);
                    team.each(pieces, |(first, mut out)| {
                        let (p, all) = (Precision::F32, 0..out.width());
                        panels::multiply_into(
                            p,
                            left,
                            &w[p.panels_len(k, first)..],
                            k,
                            out.part(0..rows, all),
                            Write::Set,
                        );
                        math::bias_activation(&mut out, &bias[first..], f);
                    });
                }
                Weight::Bf16(w) => {
                    let p = precision(Compute::Bf16);
                    let read = AsRead::of(x.values, rows, k, Compute::Bf16, ws);
                    let pieces =
                        split::columns(team, Window::new(out, rows, n, step), rows * n * k, split::PRODUCTS, TILE);
                    team.each(pieces, |(first, mut out)| {
                        let (w, all) = (&w[p.panels_len(k, first)..], 0..out.width());
                        panels::multiply_into(p, read.left(x.values, k), w, k, out.part(0..rows, all), Write::Set);
                        math::bias_activation_rounded(&mut out, &bias[first..], f, Rounding::Bf16);
                    });
                    read.free(ws);
                }
                Weight::Int8 { matrix, range } => {
                    let out = Window::new(out, rows, n, step);
                    match x.int8.filter(|(_, is)| is == range) {
                        Some((x, _)) => integers(team, x, matrix, bias, f, out),
                        None => {
                            let x = ws.quantise(team, x.values, rows, k, *range);
                            integers(team, x.rows(), matrix, bias, f, out);
                            ws.free(x);
                        }
                    }
                }
                Weight::Mixed { matrix, threshold } => {
                    let (quantised, outliers) = take_outliers(x, k, *threshold, team, ws);
                    let product = Window::new(out, rows, n, step);
                    if outliers.columns == 0 {
                        integers(team, quantised.rows(), matrix, bias, f, product);
                        outliers.free(ws);
                    } else {
                        integers(team, quantised.rows(), matrix, &[], Activation::Identity, product);
                        outliers.add_to(matrix, rows, ws, out, step);
                        math::bias_activation(&mut Window::new(out, rows, n, step), bias, f);
                    }
                    ws.free(quantised);
                }
                Weight::FourBit { panels, values, absmax, compute } => {
                    let w = (panels, values, absmax, *compute);
                    four_bits(x.values, w, bias, f, team, ws, k, Window::new(out, rows, n, step));
                }
            }
        }
    }
}

/// A weight and the width of its output.
type Sited<'a> = (Cow<'a, Stored>, usize);

/// What is not multiplied as integers anyway becomes rows of int8 where all is to be: weights and inputs by row.
fn as_multiplied(stored: &Stored, k: usize, floats: Arithmetic) -> Cow<'_, Stored> {
    match stored {
        _ if floats != Arithmetic::Int8 || k == 0 => Cow::Borrowed(stored),
        Stored::Int8(q) if q.input != Int8Input::Float => Cow::Borrowed(stored),
        Stored::Int8(q) => Cow::Owned(Stored::Int8(Int8Rows { input: Int8Input::Dynamic, ..q.clone() })),
        _ => match Int8Rows::encode(&stored.values(), k, Int8Input::Dynamic) {
            rows if rows.scb.iter().all(|s| s.is_finite()) => Cow::Owned(Stored::Int8(rows)),
            _ => Cow::Borrowed(stored), // beyond f16, in which int8 rows are rounded
        },
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
fn int8_matrix(sites: &[Sited], k: usize) -> int8::Matrix {
    let all: Vec<&Int8Rows> = sites
        .iter()
        .filter_map(|(w, _)| match &**w {
            Stored::Int8(q) => Some(q),
            _ => None,
        })
        .collect();
    let scale = all.iter().flat_map(|q| q.scb.iter().map(|s| s / 127.0)).collect();
    match all[..] {
        [q] => int8::Matrix::new(&q.values, scale, k),
        _ => int8::Matrix::new(&all.iter().map(|q| &q.values[..]).collect::<Vec<_>>().concat(), scale, k),
    }
}

/// W `[n, k]` of several sites -> `[k, n]`: the layout in which the f32 product is fastest.
fn transposed(sites: &[Sited], k: usize, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n * k];
    let mut column = 0;
    for (w, _) in sites {
        for row in w.values().chunks_exact(k.max(1)) {
            row.iter().enumerate().for_each(|(i, v)| out[i * n + column] = *v);
            column += 1;
        }
    }
    out
}

/// Weights to be multiplied in floats, in the layout that this machine's product reads.
fn in_float(sites: &[Sited], k: usize, n: usize, floats: Arithmetic) -> Weight {
    let compute = if floats == Arithmetic::Bf16 { Compute::Bf16 } else { Compute::F32 };
    if compute == Compute::F32 && isa() < Isa::Avx512 {
        return Weight::Dense(transposed(sites, k, n));
    }
    let mut values: Vec<_> = sites.iter().map(|(w, _)| w.values()).collect();
    if compute == Compute::Bf16 {
        values.iter_mut().flat_map(|w| w.to_mut()).for_each(|v| *v = math::bf16(*v));
    }
    let rows: Vec<&[f32]> = values.iter().flat_map(|w| w.chunks_exact(k.max(1))).collect();
    let p = precision(compute);
    let mut out = vec![0; p.panels_len(k, n)];
    panels::pack_panels_across(p, |c| rows[c], k, n, &mut out);
    if compute == Compute::Bf16 { Weight::Bf16(out) } else { Weight::Panels(out) }
}

/// 4-bit weights in the order in which they are decoded.
fn four_bit_panels(q: &FourBit, n: usize, k: usize) -> Weight {
    let map = std::array::from_fn(|i| q.map[i]);
    let rounded = [q.source, q.compute].map(Compute::rounding);
    Weight::FourBit {
        panels: four_bit::Panels::new(&q.packed, n, k),
        values: four_bit::Values { map, block: q.block, rounded },
        absmax: q.absmax.clone(),
        compute: q.compute,
    }
}

/// The integer product.
fn integers(team: &Team, x: int8::Rows, w: &int8::Matrix, bias: &[f32], f: Activation, out: Window) {
    let macs = out.rows() * out.width() * w.k();
    // Pairs of panels: the product takes them together.
    team.each(split::columns(team, out, macs, split::PRODUCTS, 2 * int8::LANES), |(first, out)| {
        w.multiply_columns(x, first, bias, f, out);
    });
}

/// A float product's input as it is multiplied.
enum AsRead {
    /// As it is.
    Plain,
    /// f32 rounded to the type of the product; the buffer may be longer.
    Rounded(Vec<f32>),
    /// Packed as bf16; the buffer may be longer.
    Packed(Vec<u32>),
}

impl AsRead {
    /// `values: [rows, k]`
    fn of(values: &[f32], rows: usize, k: usize, compute: Compute, ws: &mut Workspace) -> AsRead {
        match (precision(compute), compute) {
            (p @ Precision::Bf16, _) => {
                let mut packed = ws.words(p.rows_len(rows, k));
                panels::pack_rows(p, Source { data: values, stride: k }, rows, k, &mut packed);
                AsRead::Packed(packed)
            }
            (Precision::F32, Compute::F32) => AsRead::Plain,
            (Precision::F32, _) => {
                let mut rounded = ws.floats(rows * k);
                compute.rounding().all(&values[..rows * k], &mut rounded[..rows * k]);
                AsRead::Rounded(rounded)
            }
        }
    }

    fn left<'a>(&'a self, values: &'a [f32], k: usize) -> Left<'a> {
        match self {
            AsRead::Plain => Left::f32_rows(Source { data: values, stride: k }),
            AsRead::Rounded(values) => Left::f32_rows(Source { data: values, stride: k }),
            AsRead::Packed(words) => Left::rows(words, Precision::Bf16, k),
        }
    }

    fn free(self, ws: &mut Workspace) {
        match self {
            AsRead::Plain => {}
            AsRead::Rounded(buffer) => ws.floats.push(buffer),
            AsRead::Packed(buffer) => ws.words.push(buffer),
        }
    }
}

/// What a product that computes so multiplies.
fn precision(compute: Compute) -> Precision {
    if compute == Compute::Bf16 && bf16_is_fast() { Precision::Bf16 } else { Precision::F32 }
}

/// Columns of one tile of the product.
const TILE: usize = 48;

/// 4-bit weights: [`TILE`] columns of the result, which stay in the second-level cache, are decoded into panels and
/// multiplied at a time. Input, weights, bias and result are rounded to the type of the product and products are summed in
/// f32, as PyTorch's bf16 and f16 linears on dequantised weights do; the products of rounded f32 are the same numbers.
#[allow(clippy::too_many_arguments)]
fn four_bits(
    values: &[f32],
    (w, decoded, absmax, compute): (&four_bit::Panels, &four_bit::Values, &Absmax, Compute),
    bias: &[f32],
    f: Activation,
    team: &Team,
    ws: &mut Workspace,
    k: usize,
    out: Window,
) {
    let (m, macs) = (out.rows(), out.rows() * out.width() * k);
    let p = precision(compute);
    let read = AsRead::of(values, m, k, compute, ws);
    let left = read.left(values, k);
    let pieces = split::columns(team, out, macs, split::PRODUCTS, TILE);
    let mut decoded_panels: Vec<_> = pieces.iter().map(|_| ws.words(p.panels_len(k, TILE))).collect();
    team.each(pieces.into_iter().zip(&mut decoded_panels).collect(), |((start, mut out), right)| {
        for c in (0..out.width()).step_by(TILE) {
            let (first, width) = (start + c, TILE.min(out.width() - c));
            w.decode(first..first + width, p, decoded, |b| absmax.scale(b), right);
            let out = out.part(0..m, c..c + width);
            panels::multiply_into(p, left, right, k, out, Write::Set);
        }
        math::bias_activation_rounded(&mut out, &bias[start..], f, compute.rounding());
    });
    read.free(ws);
    ws.words.extend(decoded_panels);
}

#[cfg(test)]
mod tests {
    use super::super::ALONE;
    use super::*;
    use crate::spec::{Family, HeadSpec, LayerShape, ModelSpec};

    /// Against f64: what is rounded to bfloat16, and that sums are not.
    #[test]
    fn bf16_rounds_inputs_weights_bias_and_result() {
        let spec = ModelSpec {
            family: Family::Bert,
            prefix: "bert.".into(),
            vocab: 5,
            positions: 8,
            token_types: 2,
            hidden: 70,
            head_dim: 10,
            original_heads: 1,
            layers: vec![LayerShape { heads: vec![0], ffn: 99 }],
            ffn_activation: Activation::Gelu,
            norm_eps: 1e-6,
            head: HeadSpec::None,
            unused_pooler: false,
        };
        let mut ck = Checkpoint::random(spec, vec![], 1).unwrap();
        let noise = |i: usize, seed: usize| ((i * 7919 + seed) as f32 * 0.37).sin();
        let (rows, k, n) = (9, 70, 99);
        ck.set(Tensor::W(Lin::Up(0)), Stored::f32((0..n * k).map(|i| noise(i, 1)).collect()));
        ck.set(Tensor::B(Lin::Up(0)), Stored::f32((0..n).map(|i| noise(i, 2)).collect()));
        let x: Vec<f32> = (0..rows * k).map(|i| noise(i, 3)).collect();
        let linear = Linear::pack(&ck, &[Lin::Up(0)], Arithmetic::Bf16);
        let (mut ws, mut out) = (Workspace::default(), vec![0.0; rows * n]);
        let input = Input { values: &x, int8: None, rows, starts: &[0, rows] };
        linear.run(&input, Activation::Identity, &ALONE, &mut ws, &mut out);
        let (w, bias) = (ck.values(Tensor::W(Lin::Up(0))), ck.values(Tensor::B(Lin::Up(0))));
        let near = |x: f32| f64::from(math::bf16(x));
        for (i, got) in out.iter().enumerate() {
            let (r, c) = (i / n, i % n);
            let sum: f64 = (0..k).map(|j| near(x[r * k + j]) * near(w[c * k + j])).sum();
            let want = sum + near(bias[c]);
            // Half a step of bfloat16, and what f32 sums may move.
            assert!((f64::from(*got) - want).abs() <= want.abs() / 256.0 + 1e-5, "{r},{c}: {got} {want}");
            assert_eq!(math::bf16(*got), *got);
        }
    }

    #[test]
    fn half_precision_is_rounded_as_stored_weights_are() {
        let x: Vec<f32> = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
        let mut got = vec![0.0; x.len()];
        math::round_to_f16(&x, &mut got);
        for (x, got) in x.iter().zip(got) {
            let want = Compute::F16.round(*x);
            assert!(got.to_bits() == want.to_bits() || x.is_nan() && got.is_nan(), "{x}: {got} != {want}");
        }
    }
}
