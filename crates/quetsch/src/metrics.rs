//! How good a classifier is, and how far it is from its parent. Logits are `[n, labels]`; truths are below `labels`.
//!
//! The prediction of a row is its largest logit, of equal ones the lowest index; NaN is below everything. Numbers that
//! need a probability (loss, ECE, KL) are NaN, `null` in JSON, when a logit is.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;
use statrs::distribution::{Binomial, DiscreteCDF};

use crate::rng::Rng;

pub use tasks::{Distance, Figures, Output, Regression, agree, distance, measure};

/// The 97.5% quantile of the standard normal distribution.
const Z_95: f64 = 1.959_963_984_540_054;
/// Equal-width bins of the expected calibration error (Guo et al. 2017 use 15).
const ECE_BINS: usize = 15;
/// Resamples of the paired bootstrap, and its fixed seed: one comparison always prints the same interval.
const RESAMPLES: usize = 2_000;
const RESAMPLING_SEED: u64 = 0;
/// How many confusion pairs are listed.
const CONFUSIONS: usize = 20;

/// What [`evaluate`] measures.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Metrics {
    /// Rows.
    pub n: usize,
    /// The share of rows whose prediction is the truth, 0..1.
    pub accuracy: f64,
    /// Wilson's 95% interval of the accuracy (Wilson 1927).
    pub accuracy_interval: [f64; 2],
    /// Several labels: F1 over all rows and labels together. [`Metrics::accuracy`] is then that of whole rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_f1: Option<f64>,
    /// The mean F1 of the labels that occur as a truth or a prediction, as scikit-learn has it.
    pub macro_f1: f64,
    /// The mean F1 by support.
    pub weighted_f1: f64,
    /// The share of rows whose truth is among the three largest logits (among all, with fewer labels).
    pub top_3: f64,
    /// Expected calibration error: |accuracy - confidence| by row over 15 equal-width bins of the confidence.
    pub ece: f64,
    /// The bins that [`Metrics::ece`] is made of, empty ones left out: a reliability diagram.
    pub reliability: Vec<Reliability>,
    /// The mean negative log probability of the truth.
    pub loss: f64,
    /// One entry a label, in label order.
    pub per_class: Vec<ClassMetrics>,
    /// The most frequent confusions, up to 20.
    pub confusions: Vec<Confusion>,
}

/// The rows whose confidence, the probability of the prediction, falls into one bin.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Reliability {
    /// Their mean confidence.
    pub confidence: f64,
    /// The share of them whose prediction is the truth.
    pub accuracy: f64,
    /// How many.
    pub n: usize,
}

/// One label's share. A ratio of nothing to nothing is 0.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ClassMetrics {
    /// The label.
    pub label: String,
    /// The share of its predictions that are right.
    pub precision: f64,
    /// The share of its rows that are found.
    pub recall: f64,
    /// The harmonic mean of both.
    pub f1: f64,
    /// Rows whose truth it is.
    pub support: usize,
}

/// Rows of one label predicted as another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Confusion {
    /// The truth.
    pub truth: String,
    /// The prediction.
    pub predicted: String,
    /// How many rows.
    pub count: usize,
}

/// What [`agreement`] measures.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Agreement {
    /// The share of rows with the same prediction, 0..1.
    pub agreement: f64,
    /// Rows with another prediction.
    pub flips: usize,
    /// Their share, 0..1.
    pub flip_rate: f64,
    /// The mean of KL(parent || child) over rows, in nats.
    pub mean_kl: f64,
    /// Whether the flips favour one side.
    pub mcnemar: McNemar,
    /// The child's accuracy minus the parent's.
    pub accuracy_delta: f64,
    /// The 95% interval of `accuracy_delta`: percentiles of a paired bootstrap.
    pub delta_interval: [f64; 2],
    /// The rows with another prediction.
    pub flipped: Vec<usize>,
}

/// McNemar's exact test: of the rows that one side alone has right, does each side have its half?
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub struct McNemar {
    /// Rows that only the parent has right.
    pub parent_only: usize,
    /// Rows that only the child has right.
    pub child_only: usize,
    /// The two-sided binomial p-value.
    pub p: f64,
}

/// Measures predictions against truths. `names` are the labels, in the order of the columns of `logits`.
pub fn evaluate(logits: &[f32], truth: &[u32], names: &[String]) -> Metrics {
    let (n, labels) = (truth.len(), names.len());
    let mut support = vec![0; labels];
    let mut predictions = vec![0; labels];
    let mut hits = vec![0; labels];
    let mut confused: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    let (mut loss, mut top_3) = (0.0, 0);
    let mut bins = [(0.0, 0.0, 0); ECE_BINS];
    for (row, truth) in rows(logits, truth, labels) {
        let log_p = log_softmax(row);
        let predicted = argmax(row);
        support[truth] += 1;
        predictions[predicted] += 1;
        if predicted == truth {
            hits[truth] += 1;
        } else {
            *confused.entry((truth, predicted)).or_default() += 1;
        }
        loss -= log_p[truth];
        top_3 += usize::from(top_k(row, 3).contains(&truth));
        // Bins are open below and closed above: (0, 1/15], (1/15, 2/15], ...
        let confidence = log_p[predicted].exp();
        let bin = ((confidence * ECE_BINS as f64).ceil() as usize).clamp(1, ECE_BINS) - 1;
        bins[bin].0 += confidence;
        bins[bin].1 += f64::from(u8::from(predicted == truth));
        bins[bin].2 += 1;
    }

    let ratio = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let class = |l: usize| ClassMetrics {
        label: names[l].clone(),
        precision: ratio(hits[l], predictions[l]),
        recall: ratio(hits[l], support[l]),
        f1: ratio(2 * hits[l], support[l] + predictions[l]),
        support: support[l],
    };
    let per_class: Vec<ClassMetrics> = (0..labels).map(class).collect();
    let seen: Vec<f64> =
        (0..labels).filter(|&l| support[l] + predictions[l] > 0).map(|l| per_class[l].f1).collect();
    let mut confused: Vec<_> = confused.into_iter().collect();
    confused.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    let correct = hits.iter().sum();
    Metrics {
        n,
        accuracy: correct as f64 / n as f64,
        accuracy_interval: wilson(correct, n),
        micro_f1: None,
        macro_f1: seen.iter().sum::<f64>() / seen.len() as f64,
        weighted_f1: per_class.iter().map(|c| c.f1 * c.support as f64).sum::<f64>() / n as f64,
        top_3: top_3 as f64 / n as f64,
        ece: bins.iter().map(|(confidence, hits, _)| (confidence - hits).abs()).sum::<f64>() / n as f64,
        reliability: (bins.iter().filter(|bin| bin.2 > 0))
            .map(|&(confidence, hits, n)| Reliability {
                confidence: confidence / n as f64,
                accuracy: hits / n as f64,
                n,
            })
            .collect(),
        loss: loss / n as f64,
        per_class,
        confusions: (confused.into_iter().take(CONFUSIONS))
            .map(|((t, p), count)| Confusion { truth: names[t].clone(), predicted: names[p].clone(), count })
            .collect(),
    }
}

/// One row of two models.
pub(crate) struct Pair {
    same: bool,
    parent_right: bool,
    child_right: bool,
    kl: f64,
}

/// Compares the logits of a child with its parent's on the same rows.
pub fn agreement(parent: &[f32], child: &[f32], truth: &[u32], labels: usize) -> Agreement {
    compare(rows(parent, truth, labels).zip(rows(child, truth, labels)).map(|((p, truth), (c, _))| {
        let (parent_says, child_says) = (argmax(p), argmax(c));
        // 0 ln 0 = 0; with log 0 = -inf it would be NaN.
        let term = |p: f64, c: f64| if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - c) };
        Pair {
            same: parent_says == child_says,
            parent_right: parent_says == truth,
            child_right: child_says == truth,
            kl: log_softmax(p).into_iter().zip(log_softmax(c)).map(|(p, c)| term(p, c)).sum(),
        }
    }))
}

fn compare(pairs: impl Iterator<Item = Pair>) -> Agreement {
    let (mut flipped, mut deltas) = (Vec::new(), Vec::new());
    let (mut kl, mut parent_only, mut child_only) = (0.0, 0, 0);
    for (i, pair) in pairs.enumerate() {
        if !pair.same {
            flipped.push(i);
        }
        let delta = i8::from(pair.child_right) - i8::from(pair.parent_right);
        parent_only += usize::from(delta < 0);
        child_only += usize::from(delta > 0);
        deltas.push(delta);
        kl += pair.kl;
    }
    let n = deltas.len();
    Agreement {
        agreement: (n - flipped.len()) as f64 / n as f64,
        flips: flipped.len(),
        flip_rate: flipped.len() as f64 / n as f64,
        mean_kl: kl / n as f64,
        mcnemar: McNemar { parent_only, child_only, p: mcnemar(parent_only, child_only) },
        accuracy_delta: (child_only as f64 - parent_only as f64) / n as f64,
        delta_interval: bootstrap(&deltas),
        flipped,
    }
}

/// Where [`temperature`] looks.
const TEMPERATURES: [f64; 2] = [0.05, 20.0];

/// Whether a temperature is an end of those that were looked at: the loss is lowest beyond it.
pub fn is_at_bound(temperature: f64) -> bool {
    let [low, high] = TEMPERATURES;
    temperature < low * 1.01 || temperature > high / 1.01
}

/// The temperature that logits are divided by for the lowest loss (Guo et al. 2017). It changes no prediction.
pub fn temperature(logits: &[f32], truth: &[u32], labels: usize) -> f64 {
    let loss = |t: f64| -> f64 {
        let scaled: Vec<f32> = logits.iter().map(|&x| (f64::from(x) / t) as f32).collect();
        rows(&scaled, truth, labels).map(|(row, truth)| -log_softmax(row)[truth]).sum()
    };
    // The loss is convex in 1/t, so it has one valley in ln t: golden-section search.
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (TEMPERATURES[0].ln(), TEMPERATURES[1].ln());
    let (mut a, mut b) = (high - golden * (high - low), low + golden * (high - low));
    let (mut loss_a, mut loss_b) = (loss(a.exp()), loss(b.exp()));
    while high - low > 1e-3 {
        if loss_a <= loss_b {
            (high, b, loss_b) = (b, a, loss_a);
            a = high - golden * (high - low);
            loss_a = loss(a.exp());
        } else {
            (low, a, loss_a) = (a, b, loss_b);
            b = low + golden * (high - low);
            loss_b = loss(b.exp());
        }
    }
    ((low + high) / 2.0).exp()
}

/// exp(x) / sum exp(x), in place.
pub fn softmax(row: &mut [f32]) {
    let log_p = log_softmax(row);
    row.iter_mut().zip(log_p).for_each(|(x, p)| *x = p.exp() as f32);
}

/// The indices of the `k` largest values (all, if there are fewer), in falling order.
pub fn top_k(row: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| falling(row[a], row[b]));
    order.truncate(k);
    order
}

/// The index of the largest value: the class a row is given.
pub fn argmax(row: &[f32]) -> usize {
    (0..row.len()).min_by(|&a, &b| falling(row[a], row[b])).unwrap_or(0)
}

/// Large first, NaN last; unlike `total_cmp`, -0 and 0 are equal.
fn falling(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

fn rows<'a>(logits: &'a [f32], truth: &'a [u32], labels: usize) -> impl Iterator<Item = (&'a [f32], usize)> {
    assert_eq!(logits.len(), truth.len() * labels, "logits are [n, labels]");
    logits.chunks_exact(labels.max(1)).zip(truth.iter().map(|&label| label as usize))
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let log_sum = max + row.iter().map(|&x| (x as f64 - max).exp()).sum::<f64>().ln();
    row.iter().map(|&x| x as f64 - log_sum).collect()
}

/// Wilson's 95% interval of a share (Wilson 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
pub fn wilson(correct: usize, n: usize) -> [f64; 2] {
    if n == 0 {
        return [0.0, 1.0];
    }
    let (n, p) = (n as f64, correct as f64 / n as f64);
    let z2 = Z_95 * Z_95;
    let centre = p + z2 / (2.0 * n);
    let half = Z_95 * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    [(centre - half) / (1.0 + z2 / n), (centre + half) / (1.0 + z2 / n)].map(|bound| bound.clamp(0.0, 1.0))
}

/// P(at most the smaller or at least the larger count of a + b fair coins).
fn mcnemar(a: usize, b: usize) -> f64 {
    let tail = Binomial::new(0.5, (a + b) as u64).map_or(1.0, |coins| coins.cdf(a.min(b) as u64));
    (2.0 * tail).min(1.0)
}

/// The 2.5% and 97.5% percentiles of the mean of rows drawn with replacement.
fn bootstrap(deltas: &[i8]) -> [f64; 2] {
    let n = deltas.len();
    let mut rng = Rng::new(RESAMPLING_SEED);
    let mut sums: Vec<i64> =
        (0..RESAMPLES).map(|_| (0..n).map(|_| i64::from(deltas[rng.below(n)])).sum()).collect();
    sums.sort_unstable();
    let percentile = |q: f64| {
        let at = q * (RESAMPLES - 1) as f64;
        let (low, high) = (sums[at.floor() as usize] as f64, sums[at.ceil() as usize] as f64);
        (low + (high - low) * at.fract()) / n as f64
    };
    [percentile(0.025), percentile(0.975)]
}

mod tasks;
#[cfg(test)]
mod tests;
