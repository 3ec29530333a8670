//! One step's gradients: the batch dealt to threads, one tape each, gradients summed in fixed order.

use crate::features::Taps;
use crate::loss::{Losses, Objective, Shares, losses};
use crate::params::{Grads, Params};
use crate::tape::{Buffers, Draw, Dropout, Tape};
use quetsch::batch::{Batch, Encoding};
use quetsch::hooks::Masks;
use quetsch::ops::{With, forward};
use quetsch::runtime::Workspace;
use quetsch::spec::At;
use quetsch::{Error, Result};
use std::collections::BTreeMap;

/// Labelled, tokenised sentences.
#[derive(Clone, Copy)]
pub struct TrainSet<'a> {
    /// Tokens.
    pub encodings: &'a [Encoding],
    /// Class indices.
    pub labels: &'a [u32],
}

/// What one thread keeps from step to step.
pub struct Worker {
    /// Its share of the gradients.
    pub grads: Grads,
    buffers: Buffers,
    teacher: Workspace,
}

impl Worker {
    /// Workers for `threads` threads.
    pub fn team(params: &Params, threads: usize) -> Vec<Worker> {
        let worker =
            || Worker { grads: Grads::new(params), buffers: Buffers::default(), teacher: Workspace::default() };
        (0..threads.max(1)).map(|_| worker()).collect()
    }
}

/// What is computed: everything but the sentences.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// The weights.
    pub params: &'a Params,
    /// The data.
    pub set: TrainSet<'a>,
    /// What is minimised.
    pub objective: Objective<'a>,
    /// Rates of dropout.
    pub dropout: Dropout,
    /// The run's seed.
    pub seed: u64,
    /// Masks on heads and channels whose gradients are wanted.
    pub masks: Option<&'a Masks>,
}

/// Tokens that one forward of one thread sees at most (one sentence if that is longer): large enough for matrix
/// products at full speed, small enough that activations stay small. Gradients add up, and dropout does not depend on
/// how sentences are gathered, so the value changes nothing but the rounding of sums.
const CHUNK: usize = 512;

/// Gradients of the masks by place.
pub type MaskGrads = BTreeMap<At, Vec<f32>>;

/// Deals examples to `parts` so that each has about the same number of tokens, keeping their order.
fn deal(set: TrainSet, examples: &[usize], parts: usize) -> Vec<Vec<usize>> {
    let total: usize = examples.iter().map(|e| set.encodings[*e].ids.len()).sum();
    let mut dealt = vec![vec![]; parts];
    let mut before = 0;
    for &e in examples {
        dealt[(before * parts / total.max(1)).min(parts - 1)].push(e);
        before += set.encodings[e].ids.len();
    }
    dealt
}

/// Adds the gradients of the mean loss over all `examples` to the workers' and returns the loss and the gradients of
/// the masks. `micro` is the number of sentences that one forward sees at most (all threads together).
///
/// # Errors
/// An example that the model cannot read.
pub fn gradients(
    task: &Task,
    step: u64,
    examples: &[usize],
    micro: usize,
    workers: &mut [Worker],
) -> Result<(Losses, MaskGrads)> {
    let tokens = examples.iter().map(|e| task.set.encodings[*e].ids.len()).sum();
    let shares = Shares::of(&task.objective, examples.iter().map(|e| task.set.labels[*e]), tokens);
    let mut shards = vec![vec![]; workers.len()];
    for part in examples.chunks(micro.max(1)) {
        for (shard, mine) in shards.iter_mut().zip(deal(task.set, part, workers.len())) {
            shard.push(mine);
        }
    }
    let results: Vec<Result<(Losses, MaskGrads)>> = std::thread::scope(|s| {
        let spawn = |(w, shard): (_, Vec<Vec<usize>>)| s.spawn(move || run_shard(task, step, &shard, shares, w));
        let handles: Vec<_> = workers.iter_mut().zip(shards).map(spawn).collect();
        handles.into_iter().map(|h| h.join().expect("a training thread never panics")).collect()
    });
    let (mut total, mut masks) = (Losses::default(), MaskGrads::new());
    for r in results {
        let (l, m) = r?;
        total += l;
        for (at, g) in m {
            quetsch_kernels::math::add(masks.entry(at).or_insert_with(|| vec![0.0; g.len()]), &g);
        }
    }
    Ok((total, masks))
}

/// Cuts examples into runs of at most [`CHUNK`] tokens.
fn chunks<'e>(set: TrainSet, mut examples: &'e [usize]) -> Vec<&'e [usize]> {
    let mut cut = vec![];
    while !examples.is_empty() {
        let mut tokens = 0;
        let fits = examples.iter().take_while(|e| {
            tokens += set.encodings[**e].ids.len();
            tokens <= CHUNK
        });
        let (now, later) = examples.split_at(fits.count().max(1));
        cut.push(now);
        examples = later;
    }
    cut
}

fn run_shard(
    task: &Task,
    step: u64,
    shard: &[Vec<usize>],
    shares: Shares,
    w: &mut Worker,
) -> Result<(Losses, MaskGrads)> {
    let (mut total, mut masks) = (Losses::default(), MaskGrads::new());
    let features = task.objective.features();
    for examples in shard.iter().flat_map(|part| chunks(task.set, part)) {
        let spec = &task.params.spec;
        let batch = Batch::new(spec, examples.iter().map(|e| &task.set.encodings[*e]))
            .map_err(|e| Error::invalid(format!("training examples {examples:?}: {e}")))?;
        let labels: Vec<u32> = examples.iter().map(|e| task.set.labels[*e]).collect();
        let draw = Draw { rate: task.dropout, seed: task.seed, step, examples };
        let mut tape = Tape::new(task.params, draw, &mut w.buffers);
        let mut taps = features.map(|f| Taps::new(f.links));
        let logits = forward(&mut With { ops: &mut tape, hook: (task.masks, taps.as_mut()) }, spec, &batch);
        let mut d = vec![0.0; tape.value(logits).len()];
        total += losses(tape.value(logits), &labels, examples, &task.objective, shares, &mut d);
        let mut of = vec![(logits, d)];
        if let (Some(features), Some(taps)) = (features, &taps) {
            let student = (task.params, &tape, taps);
            let (loss, more) = features.losses(student, examples, shares.token, &mut w.teacher, &mut w.grads)?;
            total += loss;
            of.extend(more);
        }
        for (at, g) in tape.backward(of, &mut w.grads) {
            quetsch_kernels::math::add(masks.entry(at).or_insert_with(|| vec![0.0; g.len()]), &g);
        }
    }
    Ok((total, masks))
}
