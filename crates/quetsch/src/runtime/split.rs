//! How the work of one operation is split over a team. A part must be worth its fork and join, and
//! the cache lines that change cores; what is less stays with the caller. How an operation is split changes no bit of it.

use super::Workspace;
use quetsch_kernels::int8::{self, Range};
use quetsch_kernels::team::Team;
use quetsch_kernels::window::Window;

/// Multiply-accumulates of a part; an estimate, as is [`ELEMENTS`].
const PRODUCTS: usize = 1 << 18;
/// Elements of a part, for what is done to each once.
const ELEMENTS: usize = 1 << 11;

fn parts(team: &Team, work: usize, least: usize) -> usize {
    (work / least).clamp(1, team.threads())
}

/// Rows of a part of a product `[rows, k] x [k, n]`.
pub fn rows_of_product(team: &Team, rows: usize, k: usize, n: usize) -> usize {
    rows.div_ceil(parts(team, rows * k * n, PRODUCTS))
}

/// A part's rows of `[rows, width]`.
pub fn rows(team: &Team, rows: usize, width: usize) -> usize {
    rows.div_ceil(parts(team, rows * width, ELEMENTS))
}

/// Columns of the result, in multiples of `unit`, that cost `macs` multiply-accumulates altogether.
pub fn columns<'a>(team: &Team, out: Window<'a>, macs: usize, unit: usize) -> Vec<(usize, Window<'a>)> {
    let units = out.width().div_ceil(unit.max(1));
    let width = units.div_ceil(parts(team, macs, PRODUCTS)) * unit;
    out.columns(width)
}

/// [`int8::quantise`], by rows.
pub fn quantise(team: &Team, values: &[f32], k: usize, range: Range, q: &mut [i8], scale: &mut [f32]) {
    let share = rows(team, scale.len(), k);
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
