//! What the product of a quantised linear reads of its input, as floats again: where straight-through training takes
//! its derivatives.

use super::linear::Input;
use super::outliers::take_outliers;
use super::{ALONE, Workspace};
use crate::checkpoint::Stored;
use crate::quant::{Compute, Int8Input};
use quetsch_kernels::int8::{self, Range};

/// What happens to an input before it is multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reads {
    /// Nothing.
    Floats,
    /// Rounded to the type of the product.
    Rounded(Compute),
    /// As int8 says: by row, with one absmax, or all but the outlier columns.
    Int8(Int8Input),
}

impl Reads {
    /// By the weight that it is multiplied with.
    pub fn of(weight: &Stored) -> Reads {
        match weight {
            Stored::Int8(q) if q.input != Int8Input::Float => Reads::Int8(q.input),
            Stored::FourBit(q) if q.compute != Compute::F32 => Reads::Rounded(q.compute),
            _ => Reads::Floats,
        }
    }

    /// Above which magnitude inputs are clipped.
    pub fn clips(self) -> Option<f32> {
        match self {
            Reads::Int8(Int8Input::Static { absmax }) => Some(absmax),
            _ => None,
        }
    }

    /// out `[rows, k]` = `x` as it is multiplied.
    pub fn apply(self, x: &Input, k: usize, ws: &mut Workspace, out: &mut [f32]) {
        let (values, out) = (&x.values[..x.rows * k], &mut out[..x.rows * k]);
        match self {
            Reads::Floats | Reads::Int8(Int8Input::Float) => out.copy_from_slice(values),
            Reads::Rounded(compute) => compute.rounding().all(values, out),
            Reads::Int8(Int8Input::Dynamic) => in_range(Range::Row, values, x.rows, k, ws, out),
            Reads::Int8(Int8Input::Static { absmax }) => {
                in_range(Range::Fixed(absmax), values, x.rows, k, ws, out);
            }
            Reads::Int8(Int8Input::Mixed { threshold }) => {
                let (q, outliers) = take_outliers(x, k, threshold, &ALONE, ws);
                decode(&q.rows(), k, out);
                ws.free(q);
                outliers.put_back(x.rows, k, ws, out);
            }
        }
    }
}

fn in_range(range: Range, values: &[f32], rows: usize, k: usize, ws: &mut Workspace, out: &mut [f32]) {
    let q = ws.quantise(&ALONE, values, rows, k, range);
    decode(&q.rows(), k, out);
    ws.free(q);
}

/// x = q * scale.
fn decode(x: &int8::Rows, k: usize, out: &mut [f32]) {
    for (r, scale) in x.scale.iter().enumerate() {
        let q = &x.q[r * int8::stride(k)..][..k];
        q.iter().zip(&mut out[r * k..]).for_each(|(q, x)| *x = f32::from(*q) * scale);
    }
}
