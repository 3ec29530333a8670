//! Importance of heads and FFN channels by first-order Taylor expansion: the absolute gradient of the loss with
//! respect to a mask on the unit, summed over batches (Michel, Levy & Neubig 2019; Molchanov et al. 2017).

use crate::fit::batches;
use crate::loss::Objective;
use crate::params::Params;
use crate::step::{MaskGrads, Task, TrainSet, Worker, gradients};
use crate::tape::Dropout;
use quetsch::checkpoint::Checkpoint;
use quetsch::hooks::Masks;
use quetsch::spec::At;
use quetsch::{Error, Result};

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

/// Per layer, in the order of `spec.layers[l].heads`: sum over batches of |dL / d mask|, divided by the layer's L2
/// norm so that layers compare.
///
/// # Errors
/// Data that the model cannot read.
pub fn head_scores(
    ck: &Checkpoint,
    set: &TrainSet,
    objective: &Objective,
    sample: Sample,
) -> Result<Vec<Vec<f32>>> {
    mask_scores(ck, set, objective, sample, At::Context, |l| ck.spec.layers[l].heads.len())
}

/// As [`head_scores`], for the channels of the feed-forward networks.
///
/// # Errors
/// Data that the model cannot read.
pub fn ffn_scores(ck: &Checkpoint, set: &TrainSet, objective: &Objective, sample: Sample) -> Result<Vec<Vec<f32>>> {
    mask_scores(ck, set, objective, sample, At::FfnHidden, |l| ck.spec.layers[l].ffn)
}

fn mask_scores(
    ck: &Checkpoint,
    set: &TrainSet,
    objective: &Objective,
    sample: Sample,
    at: fn(usize) -> At,
    units: impl Fn(usize) -> usize,
) -> Result<Vec<Vec<f32>>> {
    if set.encodings.is_empty() || ck.spec.head.labels() == 0 {
        return Err(Error::invalid("gradient scores need a model with a classification head and sentences"));
    }
    // Weights need no gradient here: every name contains the empty string.
    let params = Params::new(ck, &[String::new()]);
    let masks = Masks((0..ck.spec.layers.len()).map(|l| (at(l), vec![1.0; units(l)])).collect());
    let task = Task {
        params: &params,
        set: *set,
        // A mask is judged by what it does to the answers.
        objective: objective.on_logits(),
        dropout: Dropout::default(),
        seed: 0,
        masks: Some(&masks),
    };
    let mut workers = Worker::team(&params, sample.threads);
    let lengths: Vec<usize> = set.encodings.iter().map(|e| e.ids.len()).collect();
    let mut sums: MaskGrads = masks.0.iter().map(|(at, m)| (*at, vec![0.0; m.len()])).collect();
    for examples in batches(&lengths, sample.batch_size.max(1), sample.seed, 0).iter().take(sample.batches) {
        let (_, grads) = gradients(&task, 0, examples, sample.batch_size, &mut workers)?;
        for (at, g) in grads {
            if let Some(sum) = sums.get_mut(&at) {
                sum.iter_mut().zip(g).for_each(|(s, g)| *s += g.abs());
            }
        }
    }
    let normalised = |mut s: Vec<f32>| {
        let norm = s.iter().map(|v| v * v).sum::<f32>().sqrt();
        s.iter_mut().for_each(|v| *v /= norm.max(f32::MIN_POSITIVE));
        s
    };
    Ok((0..ck.spec.layers.len()).map(|l| normalised(sums.remove(&at(l)).unwrap_or_default())).collect())
}
