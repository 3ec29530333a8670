//! The input of LLM.int8() (Dettmers et al. 2022), taken apart: columns with an outlier, and integers for the rest.

use super::linear::Input;
use super::{Int8, Workspace};
use quetsch_kernels::int8::{self, Range};
use quetsch_kernels::math;
use quetsch_kernels::team::Team;

/// What bitsandbytes multiplies integers by instead of 1 / 127^2, through 1 / 127^2: it has the number to six digits.
const BITSANDBYTES: f32 = 6.200_124e-5 * 127.0 * 127.0;

/// The columns of an LLM.int8() input (Dettmers et al. 2022) that are multiplied in float; buffers may be longer.
pub(super) struct Outliers {
    /// `[rows, columns]`: what stood there, zeros where a sequence has no outlier in that column.
    taken: Vec<f32>,
    /// The columns that have an outlier in some sequence, rising, in the first of `columns` words.
    which: Vec<u32>,
    pub(super) columns: usize,
}

/// The input of LLM.int8(), rounded to f16 and taken apart as bitsandbytes does: a column is an outlier when some element
/// of the *sequence* reaches the threshold (0 turns outliers off); a row's scale is of the elements below the threshold,
/// those in outlier columns included, whose integers are 0.
pub(super) fn take_outliers(
    x: &Input,
    k: usize,
    threshold: f32,
    team: &Team,
    ws: &mut Workspace,
) -> (Int8, Outliers) {
    let sequences = if threshold > 0.0 { x.starts.len().saturating_sub(1) } else { 0 };
    let (mut rest, mut largest) = (ws.floats(x.rows * k), ws.floats(sequences * k));
    let mut which = ws.words(k);
    math::round_to_f16(&x.values[..x.rows * k], &mut rest[..x.rows * k]);
    for (i, s) in x.starts.windows(2).take(sequences).enumerate() {
        math::column_absmax(&rest[s[0] * k..s[1] * k], &mut largest[i * k..(i + 1) * k]);
    }
    let out = |i: usize, c: usize| largest[i * k + c] >= threshold;
    let mut columns = 0;
    for c in (0..k).filter(|c| (0..sequences).any(|i| out(i, *c))) {
        which[columns] = c as u32;
        columns += 1;
    }
    let mut taken = ws.floats(x.rows * columns);
    taken[..x.rows * columns].fill(0.0);
    let places = |f: &mut dyn FnMut(usize, usize, usize)| {
        for (i, s) in x.starts.windows(2).take(sequences).enumerate() {
            for (j, c) in which[..columns].iter().map(|c| *c as usize).enumerate().filter(|(_, c)| out(i, *c)) {
                (s[0]..s[1]).for_each(|r| f(r, c, j));
            }
        }
    };
    places(&mut |r, c, j| {
        let v = &mut rest[r * k + c];
        taken[r * columns + j] = *v;
        if v.abs() >= threshold {
            *v = 0.0;
        }
    });
    let mut quantised = ws.quantise(team, &rest, x.rows, k, Range::Row);
    let (q, scale) = quantised.parts();
    places(&mut |r, c, _| q[r * int8::stride(k) + c] = 0);
    scale.iter_mut().for_each(|s| *s *= BITSANDBYTES);
    [rest, largest].into_iter().for_each(|b| ws.floats.push(b));
    (quantised, Outliers { taken, which, columns })
}

impl Outliers {
    /// out += taken columns * w, in float.
    pub(super) fn add_to(self, w: &int8::Matrix, rows: usize, ws: &mut Workspace, out: &mut [f32], step: usize) {
        let mut column = ws.floats(w.n());
        for (j, c) in self.which[..self.columns].iter().enumerate() {
            let column = &mut column[..w.n()];
            w.column(*c as usize, column);
            for r in 0..rows {
                let v = self.taken[r * self.columns + j];
                if v != 0.0 {
                    math::add_scaled(&mut out[r * step..][..w.n()], v, column);
                }
            }
        }
        ws.floats.push(column);
        self.free(ws);
    }

    /// out `[rows, k]` with the outliers where they stood.
    pub(super) fn put_back(self, rows: usize, k: usize, ws: &mut Workspace, out: &mut [f32]) {
        for (j, c) in self.which[..self.columns].iter().enumerate() {
            for r in 0..rows {
                let v = self.taken[r * self.columns + j];
                if v != 0.0 {
                    out[r * k + *c as usize] = v;
                }
            }
        }
        self.free(ws);
    }

    pub(super) fn free(self, ws: &mut Workspace) {
        ws.floats.push(self.taken);
        ws.words.push(self.which);
    }
}
