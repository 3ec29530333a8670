//! One step's gradients: the batch dealt to threads, one tape each, gradients summed in fixed order.

use crate::features::Taps;
use crate::loss::{Losses, Objective, Shares, losses};
use crate::params::{Grads, Params};
use crate::tape::{Buffers, Draw, Dropout, Tape};
use quetsch::batch::{Batch, Encoding};
use quetsch::data::Examples;
use quetsch::hooks::Masks;
use quetsch::ops::{With, forward};
use quetsch::runtime::Workspace;
use quetsch::spec::At;
use quetsch::task::{Targets, Units};
use quetsch::{Error, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Labelled, tokenised sentences.
#[derive(Clone, Copy)]
pub struct TrainSet<'a> {
    /// Tokens.
    pub encodings: &'a [Encoding],
    /// What has an answer.
    pub units: &'a Units,
    /// What is true of each unit.
    pub targets: Targets<'a>,
}

impl<'a> TrainSet<'a> {
    /// Sentences, each of which has one answer.
    pub fn sentences(encodings: &'a [Encoding], targets: impl Into<Targets<'a>>) -> TrainSet<'a> {
        TrainSet { encodings, units: &Units::Sentences, targets: targets.into() }
    }
}

impl<'a> From<&'a Examples> for TrainSet<'a> {
    fn from(examples: &'a Examples) -> TrainSet<'a> {
        TrainSet { encodings: &examples.encodings, units: &examples.units, targets: examples.targets() }
    }
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
    /// Whether the backward computes what is inside a layer again ([`Tape::recompute`]); not with masks.
    pub recompute: bool,
}

/// Tokens that one forward of one thread sees at most (one sentence if that is longer): large enough for matrix
/// products at full speed, small enough that activations stay small. Gradients add up, and dropout does not depend on
/// how sentences are gathered, so the value changes nothing but the rounding of sums.
const CHUNK: usize = 256;

/// Gradients of the masks by place, a row `[groups]` for each example, in the order in which the workers took them.
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
    if task.recompute && task.masks.is_some() {
        return Err(Error::invalid("gradients of masks inside a layer need its activations: not with `recompute`"));
    }
    let tokens = examples.iter().map(|e| task.set.encodings[*e].ids.len()).sum();
    let units: Vec<usize> = examples.iter().flat_map(|e| task.set.units.range(*e)).collect();
    let pairs = examples.iter().map(|e| task.set.units.range(*e).len().saturating_sub(1)).sum();
    let labels = units.iter().map(|u| task.set.targets.class(*u));
    let shares = Shares::of(&task.objective, labels, tokens).with_pairs(pairs);
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
        m.into_iter().for_each(|(at, g)| masks.entry(at).or_default().extend(g));
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

/// The output rows of a forward that have an answer.
struct Rows {
    /// Numbers of the units.
    numbers: Vec<usize>,
    /// Borders of the sentences in them.
    starts: Vec<usize>,
    /// Their rows in the output; none where every row answers.
    places: Option<Vec<usize>>,
}

impl Rows {
    fn of(set: TrainSet, examples: &[usize]) -> Rows {
        let mut starts = vec![0];
        let numbers: Vec<usize> = examples.iter().flat_map(|e| set.units.range(*e)).collect();
        examples.iter().for_each(|e| starts.push(starts[starts.len() - 1] + set.units.range(*e).len()));
        let mut first = 0;
        let mut places = vec![];
        for &e in examples {
            places.extend(set.units.tokens(e).unwrap_or(&[]).iter().map(|t| first + *t as usize));
            first += set.encodings[e].ids.len();
        }
        let is_words = matches!(set.units, Units::Words { .. });
        Rows { numbers, starts, places: is_words.then_some(places) }
    }

    /// The rows that answer.
    fn take<'o>(&self, output: &'o [f32], width: usize) -> Cow<'o, [f32]> {
        match &self.places {
            None => Cow::Borrowed(output),
            Some(places) => places.iter().flat_map(|p| &output[p * width..][..width]).copied().collect(),
        }
    }

    /// Their gradient, by all rows.
    fn put(&self, d: Vec<f32>, len: usize, width: usize) -> Vec<f32> {
        let Some(places) = &self.places else { return d };
        let mut all = vec![0.0; len];
        for (place, d) in places.iter().zip(d.chunks_exact(width)) {
            all[place * width..][..width].copy_from_slice(d);
        }
        all
    }
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
        let units = Rows::of(task.set, examples);
        let draw = Draw { rate: task.dropout, seed: task.seed, step, examples };
        let mut tape = Tape::new(task.params, draw, &mut w.buffers).recompute(task.recompute);
        let mut taps = features.map(|f| Taps::new(f.links));
        let logits = forward(&mut With { ops: &mut tape, hook: (task.masks, taps.as_mut()) }, spec, &batch);
        let (rows, width) = (units.take(tape.value(logits), spec.head.labels()), spec.head.labels());
        let mut d = vec![0.0; rows.len()];
        total += losses(&rows, task.set.targets, &units.numbers, &units.starts, &task.objective, shares, &mut d);
        let d = units.put(d, tape.value(logits).len(), width);
        let mut of = vec![(logits, d)];
        if let (Some(features), Some(taps)) = (features, &taps) {
            let student = (task.params, &tape, taps);
            let (loss, more) = features.losses(student, examples, shares.token, &mut w.teacher, &mut w.grads)?;
            total += loss;
            of.extend(more);
        }
        for (at, g) in tape.backward(of, &mut w.grads) {
            masks.entry(at).or_default().extend(g);
        }
    }
    Ok((total, masks))
}
