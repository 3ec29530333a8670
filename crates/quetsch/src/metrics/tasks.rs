//! Figures of the other problems: several labels, numbers; and the door to all of them.

use super::{
    Agreement, ClassMetrics, ECE_BINS, Metrics, Pair, Reliability, agreement, compare, evaluate, top_k, wilson,
};
use crate::task::{Problem, THRESHOLD, Targets, UNLABELLED, sigmoid};
use schemars::JsonSchema;
use serde::Serialize;

/// Figures of a model on units of which something is known; the others are passed over.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Figures {
    /// Of labels.
    Labels(Metrics),
    /// Of numbers.
    Numbers(Regression),
}

/// How far numbers are off; means over all outputs.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Regression {
    /// Units.
    pub n: usize,
    /// Mean of the squared errors.
    pub mse: f64,
    /// Mean of the absolute errors.
    pub mae: f64,
    /// 1 - squared error / variance of the truth, as scikit-learn's `r2_score`: 1 is perfect, 0 is the mean's.
    pub r2: f64,
    /// Pearson's correlation; NaN (`null`) where the truth or the answers are constant.
    pub pearson: f64,
    /// One entry an output, in their order.
    pub outputs: Vec<Output>,
}

/// One output's share.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// As in [`Regression`], likewise the others.
    pub mse: f64,
    #[allow(missing_docs)]
    pub mae: f64,
    #[allow(missing_docs)]
    pub r2: f64,
    #[allow(missing_docs)]
    pub pearson: f64,
}

/// How far a child's numbers are from its parent's.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Distance {
    /// Mean of the absolute differences.
    pub mean: f64,
    /// The largest.
    pub largest: f64,
    /// Pearson's correlation, a mean over outputs.
    pub pearson: f64,
}

impl Figures {
    /// The figure that epochs and models are ranked by, with its name: accuracy, micro-F1 or R2.
    pub fn main(&self) -> (&'static str, f64) {
        match self {
            Figures::Labels(Metrics { micro_f1: Some(f1), .. }) => ("micro_f1", *f1),
            Figures::Labels(m) => ("accuracy", m.accuracy),
            Figures::Numbers(r) => ("r2", r.r2),
        }
    }

    /// Those of labels, if it was labels.
    pub fn labels(&self) -> Option<&Metrics> {
        match self {
            Figures::Labels(m) => Some(m),
            Figures::Numbers(_) => None,
        }
    }
}

/// Measures logits `[units, names]`.
pub fn measure(problem: Problem, logits: &[f32], targets: Targets, names: &[String]) -> Figures {
    let (logits, targets) = known(logits, targets, names.len());
    match problem {
        Problem::SingleLabel => Figures::Labels(evaluate(&logits, &targets.classes, names)),
        Problem::MultiLabel => Figures::Labels(multi_label(&logits, &targets.values, names)),
        Problem::Regression => Figures::Numbers(regression(&logits, &targets.values, names)),
    }
}

/// Compares the logits of a child with its parent's; nothing for numbers, which have a [`distance`].
pub fn agree(
    problem: Problem,
    parent: &[f32],
    child: &[f32],
    targets: Targets,
    outputs: usize,
) -> Option<Agreement> {
    let ((parent, truth), (child, _)) = (known(parent, targets, outputs), known(child, targets, outputs));
    match problem {
        Problem::SingleLabel => Some(agreement(&parent, &child, &truth.classes, outputs)),
        Problem::MultiLabel => {
            let rows = parent.chunks_exact(outputs).zip(child.chunks_exact(outputs));
            Some(compare(rows.zip(truth.values.chunks_exact(outputs)).map(|((p, c), truth)| Pair {
                same: decisions(p).eq(decisions(c)),
                parent_right: is_right(p, truth),
                child_right: is_right(c, truth),
                kl: p.iter().zip(c).map(|(p, c)| bernoulli_kl(*p, *c)).sum(),
            })))
        }
        Problem::Regression => None,
    }
}

/// How far the numbers `[units, outputs]` of a child are from its parent's.
pub fn distance(parent: &[f32], child: &[f32], outputs: usize) -> Distance {
    let far = || parent.iter().zip(child).map(|(p, c)| f64::from((p - c).abs()));
    let column = |values: &[f32], o: usize| values.iter().skip(o).step_by(outputs).copied().collect::<Vec<_>>();
    let correlations = (0..outputs).map(|o| pearson(&column(parent, o), &column(child, o)));
    Distance {
        mean: far().sum::<f64>() / parent.len() as f64,
        largest: far().fold(0.0, f64::max),
        pearson: correlations.sum::<f64>() / outputs as f64,
    }
}

struct Known {
    classes: Vec<u32>,
    values: Vec<f32>,
}

/// The units of which something is known.
fn known(logits: &[f32], targets: Targets, outputs: usize) -> (Vec<f32>, Known) {
    assert_eq!(logits.len(), targets.len() * outputs, "logits are [units, outputs]");
    let units: Vec<usize> = (0..targets.len()).filter(|u| targets.class(*u) != UNLABELLED).collect();
    let classes = match targets {
        Targets::Classes(classes) => units.iter().map(|u| classes[*u]).collect(),
        Targets::Values { .. } => vec![],
    };
    let values = units.iter().flat_map(|u| targets.row(*u)).copied().collect();
    (units.iter().flat_map(|u| &logits[u * outputs..][..outputs]).copied().collect(), Known { classes, values })
}

/// Which labels a row is given.
fn decisions(row: &[f32]) -> impl Iterator<Item = bool> + '_ {
    row.iter().map(|x| sigmoid(*x) >= THRESHOLD)
}

fn is_right(row: &[f32], truth: &[f32]) -> bool {
    decisions(row).eq(truth.iter().map(|t| *t == 1.0))
}

/// log(1 + exp(x))
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// KL between two labels' probabilities, in nats.
fn bernoulli_kl(parent: f32, child: f32) -> f64 {
    let (p, c) = (f64::from(parent), f64::from(child));
    let q = 1.0 / (1.0 + (-p).exp());
    // log sigmoid(x) = -softplus(-x)
    q * (softplus(-c) - softplus(-p)) + (1.0 - q) * (softplus(c) - softplus(p))
}

/// Accuracy is that of whole rows (exact match); calibration and loss are over rows and labels.
fn multi_label(logits: &[f32], truth: &[f32], names: &[String]) -> Metrics {
    let labels = names.len();
    let n = truth.len() / labels.max(1);
    let (mut support, mut predictions, mut hits) = (vec![0; labels], vec![0; labels], vec![0; labels]);
    let (mut loss, mut exact, mut top_3) = (0.0, 0, 0);
    let mut bins = [(0.0, 0.0, 0); ECE_BINS];
    for (row, truth) in logits.chunks_exact(labels).zip(truth.chunks_exact(labels)) {
        exact += usize::from(is_right(row, truth));
        top_3 += usize::from(top_k(row, 3).into_iter().any(|l| truth[l] == 1.0));
        for (l, given) in decisions(row).enumerate() {
            let is_true = truth[l] == 1.0;
            support[l] += usize::from(is_true);
            predictions[l] += usize::from(given);
            hits[l] += usize::from(given && is_true);
            let x = f64::from(row[l]);
            loss += softplus(if is_true { -x } else { x });
            let p = 1.0 / (1.0 + (-x).exp());
            let confidence = p.max(1.0 - p);
            let bin = ((confidence * ECE_BINS as f64).ceil() as usize).clamp(1, ECE_BINS) - 1;
            bins[bin].0 += confidence;
            bins[bin].1 += f64::from(u8::from(given == is_true));
            bins[bin].2 += 1;
        }
    }
    let ratio = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let per_class: Vec<ClassMetrics> = (0..labels)
        .map(|l| ClassMetrics {
            label: names[l].clone(),
            precision: ratio(hits[l], predictions[l]),
            recall: ratio(hits[l], support[l]),
            f1: ratio(2 * hits[l], support[l] + predictions[l]),
            support: support[l],
        })
        .collect();
    let seen: Vec<f64> =
        (0..labels).filter(|&l| support[l] + predictions[l] > 0).map(|l| per_class[l].f1).collect();
    let sum = |counts: &[usize]| counts.iter().sum::<usize>();
    let cells = (n * labels) as f64;
    Metrics {
        n,
        accuracy: exact as f64 / n as f64,
        accuracy_interval: wilson(exact, n),
        micro_f1: Some(ratio(2 * sum(&hits), sum(&support) + sum(&predictions))),
        macro_f1: seen.iter().sum::<f64>() / seen.len() as f64,
        weighted_f1: per_class.iter().map(|c| c.f1 * c.support as f64).sum::<f64>() / sum(&support) as f64,
        top_3: top_3 as f64 / n as f64,
        ece: bins.iter().map(|(confidence, right, _)| f64::abs(confidence - right)).sum::<f64>() / cells,
        reliability: (bins.iter().filter(|bin| bin.2 > 0))
            .map(|&(confidence, right, n)| Reliability {
                confidence: confidence / n as f64,
                accuracy: right / n as f64,
                n,
            })
            .collect(),
        loss: loss / cells,
        per_class,
        confusions: vec![],
    }
}

fn regression(logits: &[f32], truth: &[f32], names: &[String]) -> Regression {
    let width = names.len();
    let column = |values: &[f32], o: usize| values.iter().skip(o).step_by(width).copied().collect::<Vec<_>>();
    let output = |o: usize| {
        let (got, want) = (column(logits, o), column(truth, o));
        let n = want.len() as f64;
        let errors = || got.iter().zip(&want).map(|(a, b)| f64::from(*a) - f64::from(*b));
        let mean = want.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let variance = want.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
        let mse = errors().map(|e| e * e).sum::<f64>() / n;
        let r2 = match variance > 0.0 {
            true => 1.0 - mse / variance,
            false => f64::from(u8::from(mse == 0.0)),
        };
        let mae = errors().map(f64::abs).sum::<f64>() / n;
        Output { name: names[o].clone(), mse, mae, r2, pearson: pearson(&got, &want) }
    };
    let outputs: Vec<Output> = (0..width).map(output).collect();
    let mean = |f: fn(&Output) -> f64| outputs.iter().map(f).sum::<f64>() / width as f64;
    Regression {
        n: truth.len() / width.max(1),
        mse: mean(|o| o.mse),
        mae: mean(|o| o.mae),
        r2: mean(|o| o.r2),
        pearson: mean(|o| o.pearson),
        outputs,
    }
}

/// Pearson's correlation.
fn pearson(a: &[f32], b: &[f32]) -> f64 {
    let mean = |x: &[f32]| x.iter().map(|v| f64::from(*v)).sum::<f64>() / x.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (f64::from(*a) - ma, f64::from(*b) - mb);
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    ab / (aa * bb).sqrt()
}
