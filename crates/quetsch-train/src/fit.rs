//! The one training loop: fine-tuning, distillation and recovery differ in the objective alone.
//!
//! The order of examples, the dropout masks and the learning rate are functions of (seed, step), so a run that goes
//! on from a saved state ends with the bytes of one that was never interrupted, given the same thread count.

use crate::loss::{Loss, Losses, Measure, Objective, Soft, UNLABELLED};
use crate::optim::{AdamW, Rates};
use crate::params::Params;
use crate::qat::Qat;
use crate::schedule::Schedule;
use crate::sparse::{Sparsity, Zeros};
use crate::state::State;
use crate::step::{Task, Worker, gradients};
use crate::tape::Dropout;
use quetsch::Error;
use quetsch::checkpoint::Checkpoint;
use quetsch::rng::{Rng, key};
use quetsch::task::{Targets, Units};
use quetsch_kernels::panels::Precision;
use std::ops::ControlFlow;
use std::time::Instant;

pub use crate::step::TrainSet;

/// Settings of a run.
#[derive(Clone, Debug)]
pub struct FitSettings {
    /// Passes over the data.
    pub epochs: usize,
    /// Sentences per forward.
    pub batch_size: usize,
    /// Forwards per optimiser step.
    pub accumulate: usize,
    /// Peak learning rate of the body.
    pub learning_rate: f32,
    /// Peak learning rate of the head.
    pub head_learning_rate: f32,
    /// Decoupled weight decay of matrices and tables.
    pub weight_decay: f32,
    /// Share of all steps that warm up.
    pub warmup: f32,
    /// After the warm-up.
    pub schedule: Schedule,
    /// Largest global gradient norm; 0 turns clipping off.
    pub clip: f32,
    /// Rates of dropout.
    pub dropout: Dropout,
    /// Tensors whose name contains one of these are not trained.
    pub freeze: Vec<String>,
    /// Decides the order of examples and the dropout masks.
    pub seed: u64,
    /// Threads; the bytes of the result depend on their number.
    pub threads: usize,
    /// What the products of linear layers are computed in; weights, sums and everything else are f32.
    pub precision: Precision,
    /// Whether the backward computes what is inside a layer again, to save memory; the result has the same bits.
    pub recompute: bool,
    /// What happens to weights that are exactly 0.
    pub sparsity: Sparsity,
    /// Quantisation in the forward; the checkpoints that [`Event::Epoch`] and the result hold are quantised then.
    pub quant: Option<Qat>,
}

/// Why the caller stops a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It is to go on later: the state is saved, and the run ends with [`FitError::Interrupted`].
    Interrupted,
    /// Early stopping, after an epoch: the weights as they are now are the result. At a step it ends the run as an
    /// interruption does.
    Enough,
}

/// What the caller hears while a run goes on.
pub enum Event<'a> {
    /// A saved state was found; the next step is `step`.
    Resumed {
        /// Steps done before.
        step: usize,
        /// Whole epochs done before.
        epoch: usize,
    },
    /// An optimiser step is done.
    Step(Progress),
    /// An epoch is done.
    Epoch {
        /// Epochs done.
        epoch: usize,
        /// All epochs.
        epochs: usize,
        /// The weights as they are now.
        checkpoint: &'a Checkpoint,
        /// Mean losses of the epoch's steps (of those after the resume, if it was resumed within).
        mean: Losses,
    },
}

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// All steps.
    pub steps: usize,
    /// Epoch under way, from 1.
    pub epoch: usize,
    /// All epochs.
    pub epochs: usize,
    /// Losses of this step.
    pub losses: Losses,
    /// The body's learning rate at this step.
    pub learning_rate: f32,
    /// Gradient norm before clipping.
    pub gradient_norm: f64,
    /// Since the start or the resume.
    pub sentences_per_s: f64,
    /// Seconds left at that rate.
    pub eta_s: f64,
}

/// A finished run.
pub struct Fitted {
    /// The trained weights.
    pub checkpoint: Checkpoint,
    /// Optimiser steps.
    pub steps: usize,
    /// Losses of the last step.
    pub last: Losses,
    /// By layer of the student: learned weights of the teacher's layers, where there are any.
    pub layer_weights: Vec<(usize, Vec<f32>)>,
}

/// Why a run did not finish.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// The caller asked to stop; the state is saved if there is a place for it.
    #[error("interrupted after step {step} of {steps}")]
    Interrupted {
        /// Steps done.
        step: usize,
        /// All steps.
        steps: usize,
    },
    /// A loss or a gradient is not a number: the weights of before that step are the last good ones.
    #[error(
        "step {step}: the {what} is not a finite number; training stopped before the update. \
         A lower learning rate or a longer warm-up usually helps"
    )]
    NotFinite {
        /// The step that failed.
        step: usize,
        /// `loss` or `gradient`.
        what: &'static str,
    },
    /// Anything else.
    #[error(transparent)]
    Quetsch(#[from] Error),
}

/// The batches of an epoch: shuffled, sorted by length within groups of 50 batches, and the batches shuffled, so that
/// sentences of a batch have similar lengths and batches come in random order.
pub fn batches(lengths: &[usize], batch: usize, seed: u64, epoch: usize) -> Vec<Vec<usize>> {
    let mut rng = Rng::new(key(&[seed, 0xba7c, epoch as u64]));
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    rng.shuffle(&mut order);
    let mut all: Vec<Vec<usize>> = vec![];
    for group in order.chunks_mut(50 * batch) {
        group.sort_by_key(|i| lengths[*i]);
        all.extend(group.chunks(batch).map(<[usize]>::to_vec));
    }
    rng.shuffle(&mut all);
    all
}

fn check(start: &Checkpoint, set: &TrainSet, objective: &Objective, s: &FitSettings) -> Result<(), Error> {
    let labels = start.spec.head.labels();
    let bad = |m: String| Err(Error::invalid(m));
    if labels == 0 {
        return bad("training needs a model with a classification head".into());
    }
    let (units, known) = (set.units.count(set.encodings.len()), set.targets.len());
    if units == 0 || units != known {
        return bad(format!("{units} sentences or words and {known} labels to train on"));
    }
    check_targets(set, objective, labels)?;
    if s.epochs == 0 || s.batch_size == 0 || s.accumulate == 0 {
        return bad("epochs, batch_size and accumulate must be at least 1".into());
    }
    let rates = [s.dropout.hidden, s.dropout.attention, s.dropout.head];
    if let Some(r) = rates.iter().find(|r| !(0.0..1.0).contains(*r)) {
        return bad(format!("dropout is {r}, expected 0 to below 1"));
    }
    if !(0.0..=1.0).contains(&s.warmup) {
        return bad(format!("warmup is {}, expected a share from 0 to 1", s.warmup));
    }
    for (name, v) in [
        ("learning_rate", s.learning_rate),
        ("head_learning_rate", s.head_learning_rate),
        ("weight_decay", s.weight_decay),
        ("clip", s.clip),
    ] {
        if !(v.is_finite() && v >= 0.0) {
            return bad(format!("{name} is {v}, expected a number from 0"));
        }
    }
    let hard = objective.hard();
    if !(0.0..1.0).contains(&hard.label_smoothing) {
        return bad(format!("label_smoothing is {}, expected 0 to below 1", hard.label_smoothing));
    }
    let weights = hard.class_weights;
    if !weights.is_empty() && weights.len() != labels {
        return bad(format!("{} class weights, the model has {labels} labels", weights.len()));
    }
    if let Some(w) = weights.iter().find(|w| !(w.is_finite() && **w > 0.0)) {
        return bad(format!("a class weight is {w}, expected a number above 0"));
    }
    s.sparsity.check()?;
    objective.features().map_or(Ok(()), |f| f.check(&start.spec, set, s.recompute))?;
    objective.soft().map_or(Ok(()), |soft| check_soft(&soft, units, labels))
}

/// Whether targets, loss and head speak of the same.
fn check_targets(set: &TrainSet, objective: &Objective, labels: usize) -> Result<(), Error> {
    let bad = |m: String| Err(Error::invalid(m));
    let hard = objective.hard();
    let is_words = matches!(set.units, Units::Words { .. });
    match (set.targets, hard.loss) {
        (Targets::Classes(classes), Loss::CrossEntropy) => {
            let may_be_open = objective.soft().is_some() || is_words;
            if let Some(l) = classes.iter().find(|l| **l as usize >= labels && !(may_be_open && **l == UNLABELLED))
            {
                return bad(format!("label index {l} in the training data, the model has {labels} labels"));
            }
        }
        (Targets::Values { outputs, .. }, Loss::Binary | Loss::Distance(_)) if outputs == labels => {}
        (Targets::Values { outputs, .. }, Loss::Binary | Loss::Distance(_)) => {
            return bad(format!("{outputs} numbers a unit in the training data, the model has {labels} outputs"));
        }
        (_, loss) => return bad(format!("the training data's labels are not what {loss:?} compares with")),
    }
    if hard.loss != Loss::CrossEntropy && (hard.label_smoothing != 0.0 || !hard.class_weights.is_empty()) {
        return bad("label smoothing and class weights are for tasks with a single label".into());
    }
    if hard.loss == Loss::Distance(Measure::Cosine) {
        return bad("outputs that are numbers are compared by mse or l1, not by their cosine".into());
    }
    let differences = objective.soft().is_some_and(|s| s.differences != 0.0);
    if differences && !(is_words && matches!(hard.loss, Loss::Distance(_))) {
        return bad("first differences are those of numbers from word to word: this is another task".into());
    }
    Ok(())
}

fn check_soft(soft: &Soft, units: usize, labels: usize) -> Result<(), Error> {
    let bad = |m: String| Err(Error::invalid(m));
    for alpha in [Some(soft.alpha), soft.alpha_end].into_iter().flatten() {
        if !(0.0..=1.0).contains(&alpha) {
            return bad(format!("alpha is {alpha}, expected 0 to 1"));
        }
    }
    for temperature in [Some(soft.temperature), soft.temperature_end].into_iter().flatten() {
        if !(temperature.is_finite() && temperature > 0.0) {
            return bad(format!("temperature is {temperature}, expected a number above 0"));
        }
    }
    for (name, weight) in [("the logits' distance", soft.logits_weight), ("first differences", soft.differences)] {
        if !(weight.is_finite() && weight >= 0.0) {
            return bad(format!("the weight of {name} is {weight}, expected 0 or more"));
        }
    }
    if soft.logits.len() != units * labels {
        return bad(format!(
            "{} teacher logits, expected {units} units x {labels} labels: do teacher and student have the same \
             labels?",
            soft.logits.len()
        ));
    }
    if soft.logits.iter().any(|v| !v.is_finite()) {
        return bad("a teacher logit is not a finite number".into());
    }
    Ok(())
}

/// Trains `start`. `on` hears every step and epoch and may stop the run.
///
/// # Errors
/// Settings or data that cannot work, a state that cannot be written, a loss that is not finite, or `on` asked to stop.
pub fn fit(
    start: &Checkpoint,
    set: &TrainSet,
    objective: &Objective,
    settings: &FitSettings,
    state: Option<&State>,
    on: &mut dyn FnMut(Event) -> ControlFlow<Stop>,
) -> Result<Fitted, FitError> {
    check(start, set, objective, settings)?;
    let s = settings;
    let mut params = Params::with(start, &s.freeze, s.precision, s.threads);
    if let Some(features) = objective.features() {
        features.add_parameters(&mut params, s.seed);
    }
    if let Some(qat) = &s.quant {
        qat.deploy(start)?; // what cannot be quantised is known before the first step
        params.quantise(qat, s.threads)?;
    }
    let mut adamw = AdamW::new(&params);
    let lengths: Vec<usize> = set.encodings.iter().map(|e| e.ids.len()).collect();
    let per_step = s.batch_size * s.accumulate;
    let per_epoch = set.encodings.len().div_ceil(per_step);
    let steps = s.epochs * per_epoch;
    let warmup = (f64::from(s.warmup) * steps as f64) as usize;
    if let Some(state) = state.filter(|s| s.resume)
        && state.load(&mut params, &mut adamw)?
        && let ControlFlow::Break(stop) = on(Event::Resumed { step: adamw.step, epoch: adamw.step / per_epoch })
    {
        return match stop {
            Stop::Interrupted => Err(FitError::Interrupted { step: adamw.step, steps }),
            Stop::Enough => Ok(Fitted {
                checkpoint: deployed(&params, adamw.checkpoint(&params, start)?)?,
                steps: adamw.step,
                last: Losses::default(),
                layer_weights: layer_weights(objective, &params),
            }),
        };
    }
    let mut workers = Worker::team(&params, s.threads);
    let mut zeros = Zeros::new(s.sparsity, &params);
    let (clock, first) = (Instant::now(), adamw.step);
    let (mut last, mut sentences) = (Losses::default(), 0);
    for epoch in first / per_epoch..s.epochs {
        let done = adamw.step - epoch * per_epoch;
        if let Some(qat) =
            params.quant.as_ref().map(|q| &q.qat).filter(|q| done == 0 && q.observes(epoch, s.epochs))
        {
            let ranges = qat.observe(&adamw.checkpoint(&params, start)?)?;
            params.set_ranges(ranges, s.threads);
        }
        let (mut mean, mut counted) = (Losses::default(), 0usize);
        for examples in batches(&lengths, per_step, s.seed, epoch).iter().skip(done) {
            let step = adamw.step;
            adamw.catch_up(&mut params, examples.iter().flat_map(|e| &set.encodings[*e].ids));
            let task = Task {
                params: &params,
                set: *set,
                objective: objective.at(step as f32 / (steps - 1).max(1) as f32),
                dropout: s.dropout,
                seed: s.seed,
                masks: None,
                recompute: s.recompute,
            };
            let (losses, _) = gradients(&task, step as u64, examples, s.batch_size, &mut workers)?;
            if !losses.total.is_finite() {
                return Err(FitError::NotFinite { step: step + 1, what: "loss" });
            }
            let factor = s.schedule.factor(step, steps, warmup);
            let rates = Rates {
                body: s.learning_rate * factor,
                head: s.head_learning_rate * factor,
                decay: s.weight_decay,
                clip: s.clip,
            };
            let norm = adamw.update(&mut params, &mut workers, rates);
            if !norm.is_finite() {
                return Err(FitError::NotFinite { step: step + 1, what: "gradient" });
            }
            zeros.after(&mut params, adamw.step, steps, s.threads)?;
            mean += losses;
            (counted, sentences, last) = (counted + 1, sentences + examples.len(), losses);
            let seconds = clock.elapsed().as_secs_f64().max(1e-9);
            let progress = Progress {
                step: adamw.step,
                steps,
                epoch: epoch + 1,
                epochs: s.epochs,
                losses,
                learning_rate: rates.body,
                gradient_norm: norm,
                sentences_per_s: sentences as f64 / seconds,
                eta_s: seconds / (adamw.step - first) as f64 * (steps - adamw.step) as f64,
            };
            let stop = on(Event::Step(progress)).is_break();
            let periodic = state.is_some_and(|s| s.every_steps > 0 && adamw.step.is_multiple_of(s.every_steps));
            if let Some(state) = state.filter(|_| stop || periodic) {
                state.save(&params, &adamw)?;
            }
            if stop {
                return Err(FitError::Interrupted { step: adamw.step, steps });
            }
        }
        let checkpoint = deployed(&params, adamw.checkpoint(&params, start)?)?;
        let mean = mean.scaled(1.0 / counted.max(1) as f64);
        // The caller first: killed in between, the end of the epoch comes again, and nothing it keeps is missed.
        let heard = on(Event::Epoch { epoch: epoch + 1, epochs: s.epochs, checkpoint: &checkpoint, mean });
        if let Some(state) = state {
            state.save(&params, &adamw)?;
        }
        match heard {
            ControlFlow::Continue(()) => {}
            ControlFlow::Break(Stop::Enough) => {
                let layer_weights = layer_weights(objective, &params);
                return Ok(Fitted { checkpoint, steps: adamw.step, last, layer_weights });
            }
            ControlFlow::Break(Stop::Interrupted) => {
                return Err(FitError::Interrupted { step: adamw.step, steps });
            }
        }
    }
    let checkpoint = deployed(&params, adamw.checkpoint(&params, start)?)?;
    Ok(Fitted { checkpoint, steps, last, layer_weights: layer_weights(objective, &params) })
}

/// What was learned about the teacher's layers.
fn layer_weights(objective: &Objective, params: &Params) -> Vec<(usize, Vec<f32>)> {
    objective.features().map_or(vec![], |f| f.layer_weights(params))
}

/// The checkpoint as the forward of training reads it.
fn deployed(params: &Params, trained: Checkpoint) -> Result<Checkpoint, Error> {
    match &params.quant {
        Some(quant) => quant.qat.deploy(&trained),
        None => Ok(trained),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_once_an_epoch_in_batches_of_like_length() {
        let lengths: Vec<usize> = (0..1003).map(|i| 3 + i * 37 % 60).collect();
        let a = batches(&lengths, 8, 1, 0);
        let mut seen: Vec<usize> = a.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..1003).collect::<Vec<_>>());
        assert_eq!(a, batches(&lengths, 8, 1, 0));
        assert_ne!(a, batches(&lengths, 8, 1, 1));
        assert_ne!(a, batches(&lengths, 8, 2, 0));
        let spread = |b: &Vec<usize>| {
            let l = b.iter().map(|i| lengths[*i]);
            l.clone().max().unwrap() - l.min().unwrap()
        };
        assert!(a.iter().map(spread).sum::<usize>() < 5 * a.len(), "lengths within a batch differ little");
    }
}
