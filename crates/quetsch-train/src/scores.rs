//! Importance of heads, FFN channels and layers from the gradient of the loss with respect to a mask on the unit.
//!
//! With g_i the gradient that example i's loss has at mask = 1: removing the unit changes the loss of i by -g_i to first
//! order.

use crate::fit::batches;
use crate::loss::Objective;
use crate::params::Params;
use crate::step::{Task, TrainSet, Worker, gradients};
use crate::tape::Dropout;
use quetsch::checkpoint::Checkpoint;
use quetsch::hooks::Masks;
use quetsch::prune::Scores;
use quetsch::spec::At;
use quetsch::{Error, Result};
use quetsch_kernels::gemm::{Size, View, Write, gemm};
use std::collections::BTreeMap;

/// How much data is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Sentences per batch.
    pub batch_size: usize,
    /// Batches; the whole set if there are fewer.
    pub batches: usize,
    /// Which ones.
    pub seed: u64,
    /// Threads.
    pub threads: usize,
}

/// What is made of the gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Criterion {
    /// Sum over batches of abs(mean g_i over the batch), divided by the layer's L2 norm so that layers compare (Michel,
    /// Levy & Neubig 2019). Layers: the sum before that division.
    #[default]
    Gradient,
    /// Mean over examples of abs(g_i): first-order Taylor expansion (Molchanov et al. 2017, equation 7, example by
    /// example).
    Taylor,
    /// Mean over examples of g_i^2: the diagonal of the empirical Fisher matrix, twice the loss that a unit costs to
    /// second order (LeCun et al. 1990; Kwon et al. 2022, equation 9).
    Fisher,
}

/// The gradients of the masks on all units, summed up.
pub struct MaskGradients {
    layers: usize,
    examples: usize,
    sums: BTreeMap<At, Sums>,
}

#[derive(Clone, Default)]
struct Sums {
    /// Sum over batches of abs(mean g).
    by_batch: Vec<f64>,
    /// Sum over examples of abs(g).
    absolute: Vec<f64>,
    /// Sum over examples of g^2.
    squares: Vec<f64>,
    /// Sum over examples of g g^T; empty if it is not wanted.
    outer: Vec<f32>,
}

impl Sums {
    fn new(units: usize, outer: bool) -> Sums {
        let zeros = vec![0.0; units];
        let outer = vec![0.0; if outer { units * units } else { 0 }];
        Sums { by_batch: zeros.clone(), absolute: zeros.clone(), squares: zeros, outer }
    }

    /// A batch's rows g_i / examples of the batch.
    fn add(&mut self, rows: &[f32], examples: usize) {
        let (n, scale) = (self.squares.len(), examples as f64);
        let mut mean = vec![0.0; n];
        for (i, g) in rows.iter().enumerate() {
            let (unit, g) = (i % n, f64::from(*g));
            mean[unit] += g;
            self.absolute[unit] += (scale * g).abs();
            self.squares[unit] += (scale * g).powi(2);
        }
        self.by_batch.iter_mut().zip(&mean).for_each(|(s, m)| *s += m.abs());
        if !self.outer.is_empty() {
            let x = View::rows(rows, n);
            let scale = (examples * examples) as f32;
            gemm(Size { m: n, n, k: rows.len() / n }, scale, x.t(), x, &mut self.outer, n, Write::Add);
        }
    }
}

/// Looks at a sample of the training data. `outer` keeps the Fisher matrices of the layers, channels times channels
/// floats each.
///
/// # Errors
/// Data that the model cannot read, or none.
pub fn mask_gradients(
    ck: &Checkpoint,
    set: &TrainSet,
    objective: &Objective,
    sample: Sample,
    outer: bool,
) -> Result<MaskGradients> {
    if set.encodings.is_empty() || ck.spec.head.labels() == 0 {
        return Err(Error::invalid("gradient scores need a model with a classification head and sentences"));
    }
    // Weights need no gradient here: every name contains the empty string.
    let params = Params::new(ck, &[String::new()]);
    let units = ck.spec.layers.iter().enumerate().flat_map(|(l, s)| {
        let units = [(At::Context(l), s.heads.len()), (At::FfnHidden(l), s.ffn)];
        units.into_iter().filter(|(_, n)| *n > 0)
    });
    let masks = Masks(units.map(|(at, n)| (at, vec![1.0; n])).collect());
    let task = Task {
        params: &params,
        set: *set,
        // A mask is judged by what it does to the answers.
        objective: objective.on_logits(),
        dropout: Dropout::default(),
        seed: 0,
        masks: Some(&masks),
        recompute: false,
    };
    let mut workers = Worker::team(&params, sample.threads);
    let lengths: Vec<usize> = set.encodings.iter().map(|e| e.ids.len()).collect();
    let sums = masks.0.iter().map(|(at, m)| (*at, Sums::new(m.len(), outer))).collect();
    let mut found = MaskGradients { layers: ck.spec.layers.len(), examples: 0, sums };
    for examples in batches(&lengths, sample.batch_size.max(1), sample.seed, 0).iter().take(sample.batches) {
        let (_, rows) = gradients(&task, 0, examples, sample.batch_size, &mut workers)?;
        found.examples += examples.len();
        for (at, sums) in &mut found.sums {
            sums.add(rows.get(at).map_or(&[], Vec::as_slice), examples.len());
        }
    }
    Ok(found)
}

impl MaskGradients {
    fn of(&self, at: At, criterion: Criterion) -> Vec<f64> {
        let Some(sums) = self.sums.get(&at) else { return vec![] };
        let mean = |sums: &[f64]| sums.iter().map(|s| s / self.examples.max(1) as f64).collect();
        match criterion {
            Criterion::Gradient => sums.by_batch.clone(),
            Criterion::Taylor => mean(&sums.absolute),
            Criterion::Fisher => mean(&sums.squares),
        }
    }

    /// The scores of all heads and channels; a layer's is the sum over its units.
    pub fn scores(&self, criterion: Criterion) -> Scores {
        let all = |at: fn(usize) -> At| -> Vec<Vec<f32>> {
            let of = |l: usize| {
                let s = self.of(at(l), criterion);
                let norm = match criterion {
                    Criterion::Gradient => s.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE),
                    _ => 1.0,
                };
                s.iter().map(|v| (v / norm) as f32).collect()
            };
            (0..self.layers).map(of).collect()
        };
        let sum = |at: At| self.of(at, criterion).iter().sum::<f64>();
        let layer = |l: usize| (sum(At::Context(l)) + sum(At::FfnHidden(l))) as f32;
        Scores { heads: all(At::Context), ffn: all(At::FfnHidden), layers: (0..self.layers).map(layer).collect() }
    }

    /// The Fisher matrix of the heads ([`At::Context`]) or channels ([`At::FfnHidden`]) of a layer, up to a factor;
    /// empty where it was not asked for.
    pub fn fisher(&self, at: At) -> &[f32] {
        self.sums.get(&at).map_or(&[], |s| &s.outer)
    }
}
