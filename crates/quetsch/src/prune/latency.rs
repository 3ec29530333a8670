//! Budgets in measured time: how long a layer takes on this machine by its number of heads and by the width of its
//! feed-forward network (the tables of ZipLM: Kurtic, Frantar & Alistarh 2023), and the heads and channels with the
//! highest scores under a share of that time.
//!
//! Time is not linear in either, so no number of heads decides the channels as in [`super::search()`]. For every half of a
//! layer the best groups of each size are known; one size for each half is chosen by dynamic programming over a time
//! axis cut into steps (the multiple-choice knapsack; Frantar & Alistarh 2022, SPDY, for layers).

use super::budget::Budget;
use super::groups::in_layer;
use super::scores::Scores;
use super::search::{Keep, checked, removed};
use crate::batch::{Batch, Encoding};
use crate::checkpoint::{Checkpoint, Stored};
use crate::error::{Error, Result};
use crate::ops::{self, Ops};
use crate::quant::{self, Scheme};
use crate::runtime::{CpuOps, Model, Workspace, isa};
use crate::spec::{Activation, HeadSpec, LayerShape, Lin, ModelSpec};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, Instant};

/// The version of the JSON form that this program writes and reads.
pub const TABLE_VERSION: u32 = 1;

/// Time of one layer on one machine, for one sentence on one thread. Its JSON is kept beside a plan, so that the plan can
/// be found again without measuring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatencyTable {
    /// [`TABLE_VERSION`].
    pub version: u32,
    /// Where it was measured, for the reader.
    #[serde(default)]
    pub machine: String,
    /// The instruction set whose kernels ran.
    pub isa: String,
    /// Tokens of the sentence.
    pub tokens: usize,
    /// What the linears were stored as.
    pub scheme: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Microseconds of a layer without heads and channels.
    pub rest_us: f64,
    /// (heads, microseconds on top of `rest_us`), from (0, 0), ascending.
    pub heads: Vec<(usize, f64)>,
    /// (channels, microseconds on top of `rest_us`), from (0, 0), ascending.
    pub ffn: Vec<(usize, f64)>,
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Tokens of the sentence.
    pub tokens: usize,
    /// What the linears are stored as.
    pub scheme: Scheme,
    /// Widths are multiples of this, and the widest.
    pub align: usize,
}

/// Most widths that are timed; between them time is taken as linear.
const WIDTHS: usize = 48;
/// The layers are timed in turn, so many times; the fastest counts, since whatever disturbs makes it slower.
const ROUNDS: usize = 9;
/// How long a layer is run each time.
const BURST: Duration = Duration::from_micros(700);
/// Steps that the time of a budget is cut into.
const STEPS: usize = 20_000;

/// Measures: the layer with most heads and the one with the widest feed-forward network, cut to every size.
///
/// # Errors
/// A model without layers, a length that it cannot read, or a scheme that its weights cannot be stored in.
pub fn measure(parent: &Checkpoint, how: Timing) -> Result<LatencyTable> {
    let spec = &parent.spec;
    let all = 0..spec.layers.len();
    let (heads_of, ffn_of) = (|l: &usize| spec.layers[*l].heads.len(), |l: &usize| spec.layers[*l].ffn);
    let (Some(most), Some(widest)) = (all.clone().max_by_key(heads_of), all.max_by_key(ffn_of)) else {
        return Err(Error::invalid("a model without layers has none to time"));
    };
    if how.tokens == 0 || how.tokens > spec.longest() || how.align == 0 {
        return Err(Error::invalid(format!(
            "a sentence of {} tokens cannot be timed, the model reads 1 to {}; align is {}, expected at least 1",
            how.tokens,
            spec.longest(),
            how.align
        )));
    }
    let widths = widths(ffn_of(&widest), how.align);
    let mut shapes = vec![(most, 0, 0)];
    shapes.extend((1..=heads_of(&most)).map(|n| (most, n, 0)));
    shapes.extend(widths.iter().map(|n| (widest, 0, *n)));
    let batch = Batch::new(spec, [&Encoding { ids: vec![0; how.tokens], types: vec![] }])?;
    let (mut models, mut ws) = (vec![], Workspace::default());
    for (layer, heads, ffn) in &shapes {
        let cut = first_groups(parent, *layer, *heads, *ffn)?;
        let stored = match how.scheme {
            Scheme::F32 => cut,
            scheme => quant::quantise(&cut, &[("layer.*".into(), scheme)], &[])?,
        };
        models.push(Model::pack(&stored));
    }
    let mut best = vec![f64::INFINITY; models.len()];
    for _ in 0..ROUNDS {
        for (best, model) in best.iter_mut().zip(&models) {
            *best = best.min(time(model, &batch, &mut ws));
        }
    }
    // To the nanosecond: a table is the same when it comes back from its file.
    let round = |us: f64| (us * 1e3).round() / 1e3;
    let (rest_us, halves) = (round(best[0]), &best[1..]);
    let on_top = |(n, us): (usize, &f64)| (n, round((us - rest_us).max(0.0)));
    let table = |sizes: &[usize], times: &[f64]| -> Vec<(usize, f64)> {
        std::iter::once((0, 0.0)).chain(sizes.iter().copied().zip(times).map(on_top)).collect()
    };
    let counts: Vec<usize> = (1..=heads_of(&most)).collect();
    Ok(LatencyTable {
        version: TABLE_VERSION,
        machine: String::new(),
        isa: isa().name().into(),
        tokens: how.tokens,
        scheme: how.scheme.name().into(),
        hidden: spec.hidden,
        head_dim: spec.head_dim,
        rest_us,
        heads: table(&counts, &halves[..counts.len()]),
        ffn: table(&widths, &halves[counts.len()..]),
    })
}

/// Multiples of `align` up to `widest` and `widest` itself, thinned out evenly to about [`WIDTHS`].
fn widths(widest: usize, align: usize) -> Vec<usize> {
    let step = align * widest.div_ceil(align).div_ceil(WIDTHS).max(1);
    let mut widths: Vec<usize> = (1..).map(|i| i * step).take_while(|w| *w < widest).collect();
    widths.extend((widest > 0).then_some(widest));
    widths
}

/// The first heads and channels of one layer, with embeddings of one word and no classification head.
fn first_groups(parent: &Checkpoint, layer: usize, heads: usize, ffn: usize) -> Result<Checkpoint> {
    let whole = &parent.spec;
    let shape = LayerShape { heads: whole.layers[layer].heads[..heads].to_vec(), ffn };
    let spec =
        ModelSpec { vocab: 1, layers: vec![shape], head: HeadSpec::None, unused_pooler: false, ..whole.clone() };
    let table = whole.tensors();
    Checkpoint::from_fn(spec, vec![], |def| {
        let tensor = in_layer(def.tensor, |_| layer);
        let columns = |shape: &[usize]| shape.get(1).copied().unwrap_or(1);
        let (values, all) = (parent.values(tensor), columns(&table[parent.id(tensor)].shape));
        let (rows, columns) = (def.shape[0], columns(&def.shape));
        let row = |r: usize| &values[r * all..][..columns];
        Ok(Stored::f32((0..rows).flat_map(row).copied().collect()))
    })
}

/// Microseconds of a layer: the mean over a burst of runs, each reading what the last one wrote.
fn time(model: &Model, batch: &Batch, ws: &mut Workspace) -> f64 {
    let mut ops = CpuOps::new(model, ws);
    let mut x = ops.embed(batch);
    if model.spec().is_projected() {
        x = ops.linear(Lin::EmbedProjection, x, Activation::Identity);
    }
    x = ops::layer(&mut ops, 0, x, batch);
    let (start, mut runs) = (Instant::now(), 0);
    while runs == 0 || start.elapsed() < BURST {
        x = ops::layer(&mut ops, 0, x, batch);
        runs += 1;
    }
    start.elapsed().as_secs_f64() * 1e6 / f64::from(runs)
}

impl LatencyTable {
    /// Microseconds that so many heads add to a layer.
    pub fn heads_us(&self, heads: usize) -> f64 {
        at(&self.heads, heads)
    }

    /// Microseconds that a feed-forward network of this width adds to a layer.
    pub fn ffn_us(&self, ffn: usize) -> f64 {
        at(&self.ffn, ffn)
    }

    /// Microseconds of all heads and channels of a model.
    pub fn of(&self, spec: &ModelSpec) -> f64 {
        spec.layers.iter().map(|l| self.heads_us(l.heads.len()) + self.ffn_us(l.ffn)).sum()
    }

    /// Microseconds of all layers of a model.
    pub fn layers_us(&self, spec: &ModelSpec) -> f64 {
        self.of(spec) + self.rest_us * spec.layers.len() as f64
    }

    /// Whether the table speaks of layers like those of this model.
    ///
    /// # Errors
    /// Another version, other widths, fewer heads or channels than a layer has, or times that are none.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        let bad = |m: String| Err(Error::invalid(format!("latency table: {m}; measure again")));
        if self.version != TABLE_VERSION {
            return bad(format!("version {}, expected {TABLE_VERSION}", self.version));
        }
        if (self.hidden, self.head_dim) != (spec.hidden, spec.head_dim) {
            return bad(format!(
                "for hidden width {} and heads of {}, the model has {} and {}",
                self.hidden, self.head_dim, spec.hidden, spec.head_dim
            ));
        }
        let heads = spec.layers.iter().map(|l| l.heads.len()).max().unwrap_or(0);
        let ffn = spec.layers.iter().map(|l| l.ffn).max().unwrap_or(0);
        for (what, points, needed) in [("heads", &self.heads, heads), ("channels", &self.ffn, ffn)] {
            if points.first() != Some(&(0, 0.0)) || points.windows(2).any(|w| w[0].0 >= w[1].0) {
                return bad(format!("{what} must begin with 0 in 0 microseconds and rise"));
            }
            if let Some((n, us)) = points.iter().find(|(_, us)| !(us.is_finite() && *us >= 0.0)) {
                return bad(format!("{n} {what} take {us} microseconds"));
            }
            let last = points[points.len() - 1].0;
            if last < needed {
                return bad(format!("ends at {last} {what}, a layer of the model has {needed}"));
            }
        }
        Ok(())
    }
}

/// Linear between the points; the last one's beyond.
fn at(points: &[(usize, f64)], n: usize) -> f64 {
    let i = points.partition_point(|p| p.0 < n);
    match (points.get(i.wrapping_sub(1)), points.get(i)) {
        (_, Some(p)) if p.0 == n => p.1,
        (Some(a), Some(b)) => a.1 + (b.1 - a.1) * (n - a.0) as f64 / (b.0 - a.0) as f64,
        (Some(p), None) | (None, Some(p)) => p.1,
        (None, None) => 0.0,
    }
}

/// The heads and channels to remove so that those that stay take at most `keep.share` of the time of all (up to 0.1%: time
/// is counted in 20,000 steps), with the highest sum of scores. Every layer keeps at least its best block of channels.
///
/// # Errors
/// Scores or a table that do not fit, or a share that cannot be met.
pub fn search_latency(spec: &ModelSpec, scores: &Scores, table: &LatencyTable, keep: &Keep) -> Result<Budget> {
    table.check(spec)?;
    let order = checked(spec, scores, keep)?;
    let budget = keep.share * table.of(spec);
    let step = budget / STEPS as f64;
    let steps = |us: f64| if step > 0.0 { (us / step + 1e-9) as usize } else { 0 };
    let sum = |scores: &[f32], best: &[usize]| best.iter().map(|i| f64::from(scores[*i])).sum();
    // By half of a layer, for every size that it may have: (size, steps rounded down, sum of the best scores).
    let mut halves: Vec<Vec<(usize, usize, f64)>> = vec![];
    for (l, layer) in spec.layers.iter().enumerate() {
        let (heads, ffn) = (layer.heads.len(), layer.ffn);
        let option = |n| (n, steps(table.heads_us(n)), sum(&scores.heads[l], &order.heads[l][..n]));
        halves.push((keep.least_heads(heads)..=heads).map(option).collect());
        let blocks = ffn.div_ceil(keep.align);
        let option = |n| (n, steps(table.ffn_us(n)), sum(&scores.ffn[l], &order.ffn[l][..n]));
        halves.push((blocks.min(1)..=blocks).map(|b| option(ffn.min(b * keep.align))).collect());
    }
    // best[t]: the highest sum in at most t steps; choice[half][t]: the size that it takes.
    let mut best = vec![0.0; STEPS + 1];
    let mut choice = vec![];
    for half in &halves {
        let mut next = vec![f64::NEG_INFINITY; STEPS + 1];
        let mut chosen = vec![usize::MAX; STEPS + 1];
        for (i, (_, cost, score)) in half.iter().enumerate() {
            for t in *cost..=STEPS {
                let sum = best[t - cost] + score;
                if sum > next[t] {
                    (next[t], chosen[t]) = (sum, i);
                }
            }
        }
        best = next;
        choice.push(chosen);
    }
    if best[STEPS] == f64::NEG_INFINITY {
        let least = |half: &Vec<(usize, usize, f64)>| half.iter().map(|s| s.1).min().unwrap_or(0);
        let least = halves.iter().map(least).sum::<usize>() as f64 / STEPS as f64;
        return Err(Error::invalid(format!(
            "{:.1}% of the time cannot be met: {}, which takes {:.1}%",
            100.0 * keep.share,
            keep.must_stay(),
            100.0 * least * keep.share
        )));
    }
    let mut t = STEPS;
    let mut stays = vec![0; halves.len()];
    for (i, half) in halves.iter().enumerate().rev() {
        let (size, cost, _) = half[choice[i][t]];
        stays[i] = size;
        t -= cost;
    }
    let heads = order.heads.iter().zip(stays.iter().step_by(2)).map(|(o, n)| o[*n..].to_vec()).collect();
    let ffn = order.ffn.iter().zip(stays.iter().skip(1).step_by(2)).map(|(o, n)| o[*n..].to_vec()).collect();
    Ok(removed(spec, heads, ffn))
}

/// A table for people.
impl fmt::Display for LatencyTable {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let machine = if self.machine.is_empty() { String::new() } else { format!(", {}", self.machine) };
        writeln!(
            f,
            "Latency of a layer: {} tokens, {}, one thread, {}{machine}; {:.1} us without heads and channels",
            self.tokens, self.scheme, self.isa, self.rest_us
        )?;
        for (what, points) in [("heads", &self.heads), ("channels", &self.ffn)] {
            let shown = points.iter().skip(1).step_by((points.len() / 12).max(1));
            let shown: Vec<String> = shown.map(|(n, us)| format!("{n}: {us:.1}")).collect();
            writeln!(f, "us of so many {what} on top: {}", shown.join("  "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
