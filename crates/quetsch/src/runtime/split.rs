//! How the work of one operation is split over a team. A part must be worth its fork and join, and
//! the cache lines that change cores; what is less stays with the caller. How an operation is split changes no bit of it.

use super::Workspace;
use quetsch_kernels::int8::{self, Range};
use quetsch_kernels::team::Team;
use quetsch_kernels::window::Window;

/// Multiply-accumulates of a part of a product with weights; an estimate of some 0.5 us, as are the others.
pub const PRODUCTS: usize = 1 << 18;
/// Multiply-accumulates of a part of attention, which does not reach the rate of those.
pub const ATTENTION: usize = 1 << 15;
/// Elements of a part of LayerNorm.
const ELEMENTS: usize = 1 << 11;
/// Elements of a part of quantising.
const QUANTISED: usize = 1 << 13;

fn parts(team: &Team, work: usize, least: usize) -> usize {
    (work / least).clamp(1, team.threads())
}

/// Rows of a part of a product `[rows, k] x [k, n]`.
pub fn rows_of_product(team: &Team, rows: usize, k: usize, n: usize) -> usize {
    rows.div_ceil(parts(team, rows * k * n, PRODUCTS))
}

/// A part's rows of `[rows, width]`, for LayerNorm.
pub fn rows(team: &Team, rows: usize, width: usize) -> usize {
    rows.div_ceil(parts(team, rows * width, ELEMENTS))
}

/// Columns of the result, in multiples of `unit`, that cost `macs` multiply-accumulates altogether; a part costs at
/// `least` so many.
pub fn columns<'a>(
    team: &Team,
    out: Window<'a>,
    macs: usize,
    least: usize,
    unit: usize,
) -> Vec<(usize, Window<'a>)> {
    let units = out.width().div_ceil(unit.max(1));
    let width = units.div_ceil(parts(team, macs, least)) * unit;
    out.columns(width)
}

/// [`int8::quantise`], by rows.
pub fn quantise(team: &Team, values: &[f32], k: usize, range: Range, q: &mut [i8], scale: &mut [f32]) {
    let share = scale.len().div_ceil(parts(team, scale.len() * k, QUANTISED));
    if share == scale.len() {
        return int8::quantise(values, k, range, q, scale);
    }
    let q = q.chunks_mut(share * int8::stride(k));
    let pieces = values.chunks(share * k).zip(q).zip(scale.chunks_mut(share)).collect();
    team.each(pieces, |((values, q), scale)| int8::quantise(values, k, range, q, scale));
}

/// `n` buffers of `len` floats.
pub fn buffers(ws: &mut Workspace, n: usize, len: usize) -> Vec<Vec<f32>> {
    (0..n).map(|_| ws.floats(len)).collect()
}
