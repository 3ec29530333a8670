//! Losses on the logits, one pass for value and gradient.
//!
//! Distillation (Hinton, Vinyals & Dean 2015) as the reference recipe writes it:
//! `alpha * CE(s, y) + (1 - alpha) * T^2 * KL(softmax(t / T) || softmax(s / T))`, the KL a mean over the sentences
//! (`reduction="batchmean"`), the CE PyTorch's weighted mean: with class weights w and label smoothing e
//! `sum_i (1 - e) w[y_i] nll(i, y_i) + e / C * sum_c w[c] nll(i, c)`, divided by `sum_i w[y_i]`. Beside them, with a weight of
//! its own: a distance of the logits (Ba & Caruana 2014), and what happens inside ([`crate::features`]). Several labels and
//! numbers have their own in the places of the two ([`Loss`]).

use crate::features::Features;
use quetsch::task::Targets;
use quetsch_kernels::math::softmax;

pub use quetsch::task::UNLABELLED;

/// What compares outputs with what is true, and with a teacher's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Loss {
    /// One label of many: cross-entropy; KL(softmax(t / T) || softmax(s / T)).
    #[default]
    CrossEntropy,
    /// Each label for itself: binary cross-entropy; KL(sigmoid(t / T) || sigmoid(s / T)). Means over labels.
    Binary,
    /// Numbers: their distance, on both sides; a temperature has no meaning.
    Distance(Measure),
}

/// The loss with what is true.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hard<'a> {
    /// Which.
    pub loss: Loss,
    /// Share of the target spread over all labels (Szegedy et al. 2016), as `label_smoothing` in PyTorch.
    pub label_smoothing: f32,
    /// Weight of each class, as `weight` in PyTorch; empty where all weigh 1.
    pub class_weights: &'a [f32],
}

/// How far two rows lie apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Measure {
    /// Mean of the squared differences.
    #[default]
    Mse,
    /// Mean of the absolute differences.
    L1,
    /// 1 - cosine of the angle between them (Sanh et al. 2019); 1 if one of them is 0.
    Cosine,
}

impl Measure {
    /// The distance; `scale` times its gradient by `row` is added to `d`.
    pub fn add(self, row: &[f32], target: &[f32], scale: f32, d: &mut [f32]) -> f64 {
        let pairs = || row.iter().zip(target);
        let share = scale / row.len() as f32;
        match self {
            Measure::Mse => {
                d.iter_mut().zip(pairs()).for_each(|(d, (a, b))| *d += 2.0 * share * (a - b));
                pairs().map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / row.len() as f64
            }
            Measure::L1 => {
                let sign = |x: f32| if x == 0.0 { 0.0 } else { x.signum() };
                d.iter_mut().zip(pairs()).for_each(|(d, (a, b))| *d += share * sign(a - b));
                pairs().map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / row.len() as f64
            }
            Measure::Cosine => {
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                let (square, norms) = (dot(row, row), (dot(row, row) * dot(target, target)).sqrt());
                if norms == 0.0 {
                    return 1.0;
                }
                let cosine = dot(row, target) / norms;
                let (by_target, by_row) = ((1.0 / norms) as f32, (cosine / square) as f32);
                d.iter_mut().zip(pairs()).for_each(|(d, (a, b))| *d -= scale * (by_target * b - by_row * a));
                1.0 - cosine
            }
        }
    }
}

/// The teacher's part.
#[derive(Clone, Copy, Default)]
pub struct Soft<'a> {
    /// Weight of the cross-entropy; the KL has 1 - alpha.
    pub alpha: f32,
    /// Temperature.
    pub temperature: f32,
    /// What alpha becomes by the last step, in a straight line.
    pub alpha_end: Option<f32>,
    /// The same for the temperature.
    pub temperature_end: Option<f32>,
    /// `[examples, labels]`, by example.
    pub logits: &'a [f32],
    /// Weight of the distance of the logits, beside the two.
    pub logits_weight: f32,
    /// That distance.
    pub logits_loss: Measure,
    /// Numbers of a sequence: weight of the distance of their first differences, from each word to the next.
    pub differences: f32,
    /// What happens inside.
    pub features: Option<Features<'a>>,
}

/// What is minimised.
#[derive(Clone, Copy)]
pub enum Objective<'a> {
    /// The loss with the labels.
    CrossEntropy(Hard<'a>),
    /// The loss with the labels and divergence from a teacher.
    Distill(Hard<'a>, Soft<'a>),
}

impl<'a> Objective<'a> {
    /// The labels' part.
    pub fn hard(&self) -> Hard<'a> {
        match *self {
            Objective::CrossEntropy(hard) | Objective::Distill(hard, _) => hard,
        }
    }

    /// The teacher's part.
    pub fn soft(&self) -> Option<Soft<'a>> {
        match *self {
            Objective::CrossEntropy(_) => None,
            Objective::Distill(_, soft) => Some(soft),
        }
    }

    /// The inner part.
    pub fn features(&self) -> Option<Features<'a>> {
        self.soft().and_then(|s| s.features)
    }

    /// As it is at `progress`, 0 (first step) to 1 (last step).
    pub fn at(self, progress: f32) -> Objective<'a> {
        let Objective::Distill(hard, soft) = self else { return self };
        let between = |from: f32, to: Option<f32>| to.map_or(from, |to| from + progress * (to - from));
        let alpha = between(soft.alpha, soft.alpha_end);
        let temperature = between(soft.temperature, soft.temperature_end);
        Objective::Distill(hard, Soft { alpha, temperature, ..soft })
    }

    /// Without the inner part.
    pub fn on_logits(self) -> Objective<'a> {
        match self {
            Objective::Distill(hard, soft) => Objective::Distill(hard, Soft { features: None, ..soft }),
            other => other,
        }
    }
}

/// How classes of different sizes are weighed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClassWeights {
    /// All alike.
    #[default]
    None,
    /// sentences / (classes * sentences of the class), as scikit-learn's `balanced`.
    Balanced,
    /// The root of that.
    Sqrt,
}

impl ClassWeights {
    /// The weight of each class; empty for [`ClassWeights::None`]. A class without a sentence weighs 1.
    pub fn of(self, labels: &[u32], classes: usize) -> Vec<f32> {
        let mut counts = vec![0usize; classes];
        labels.iter().filter(|l| **l != UNLABELLED).for_each(|l| counts[*l as usize] += 1);
        let all: usize = counts.iter().sum();
        let balanced = |n: &usize| match n {
            0 => 1.0,
            n => all as f64 / (classes * n) as f64,
        };
        match self {
            ClassWeights::None => vec![],
            ClassWeights::Balanced => counts.iter().map(|n| balanced(n) as f32).collect(),
            ClassWeights::Sqrt => counts.iter().map(|n| balanced(n).sqrt() as f32).collect(),
        }
    }
}

/// What one sentence's loss is multiplied by, so that the sum over a step is the step's mean.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    /// 1 / sum of the labels' weights.
    hard: f32,
    /// 1 / units.
    soft: f32,
    /// 1 / pairs of neighbours.
    pair: f32,
    /// 1 / tokens.
    pub(crate) token: f32,
}

impl Shares {
    /// Of a step with these labels by unit and so many tokens.
    pub fn of(objective: &Objective, labels: impl ExactSizeIterator<Item = u32>, tokens: usize) -> Shares {
        let token = 1.0 / tokens.max(1) as f32;
        let soft = 1.0 / labels.len().max(1) as f32;
        let weight = |l: u32| objective.hard().class_weights.get(l as usize).map_or(1.0, |w| f64::from(*w));
        let labelled: f64 = labels.filter(|l| *l != UNLABELLED).map(weight).sum();
        let hard = if labelled > 0.0 { (1.0 / labelled) as f32 } else { 0.0 };
        Shares { hard, soft, pair: 0.0, token }
    }

    /// With so many pairs of neighbouring units.
    pub fn with_pairs(self, pairs: usize) -> Shares {
        Shares { pair: 1.0 / pairs.max(1) as f32, ..self }
    }
}

/// Loss parts, each per unit: sentence or word.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Losses {
    /// What is minimised.
    pub total: f64,
    /// The [`Loss`] with the labels: cross-entropy, or what stands for it.
    pub ce: f64,
    /// T^2 * KL, or what stands for it; 0 without a teacher.
    pub kl: f64,
    /// Distance of the logits; 0, as the following, where it is no part.
    pub logits: f64,
    /// Distance of first differences.
    pub differences: f64,
    /// Distance of hidden states.
    pub hidden: f64,
    /// Distance of embeddings.
    pub embeddings: f64,
    /// KL of attention maps.
    pub attention: f64,
    /// KL of relations.
    pub relations: f64,
}

impl std::ops::AddAssign for Losses {
    fn add_assign(&mut self, o: Losses) {
        self.total += o.total;
        self.ce += o.ce;
        self.kl += o.kl;
        self.logits += o.logits;
        self.differences += o.differences;
        self.hidden += o.hidden;
        self.embeddings += o.embeddings;
        self.attention += o.attention;
        self.relations += o.relations;
    }
}

impl Losses {
    /// Every part multiplied.
    pub fn scaled(self, by: f64) -> Losses {
        Losses {
            total: self.total * by,
            ce: self.ce * by,
            kl: self.kl * by,
            logits: self.logits * by,
            differences: self.differences * by,
            hidden: self.hidden * by,
            embeddings: self.embeddings * by,
            attention: self.attention * by,
            relations: self.relations * by,
        }
    }

    /// The parts beside the cross-entropy, by name.
    pub fn parts(&self) -> [(&'static str, f64); 7] {
        [
            ("kl", self.kl),
            ("logits", self.logits),
            ("differences", self.differences),
            ("hidden", self.hidden),
            ("embeddings", self.embeddings),
            ("attention", self.attention),
            ("relations", self.relations),
        ]
    }
}

/// log(sum(exp(row))), in f64.
fn log_sum_exp(row: &[f32], temperature: f32) -> f64 {
    let t = f64::from(temperature);
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max = f64::from(max) / t;
    max + row.iter().map(|v| (f64::from(*v) / t - max).exp()).sum::<f64>().ln()
}

fn softmax_at(row: &[f32], temperature: f32) -> Vec<f32> {
    let mut p: Vec<f32> = row.iter().map(|v| v / temperature).collect();
    softmax(&mut p, row.len());
    p
}

/// Adds up the shares of these units in the losses of their step and writes their gradient. `logits` are the rows of
/// `units`, which are numbers of the targets' and of the teacher's rows; `starts` are the borders of sentences in them.
pub fn losses(
    logits: &[f32],
    targets: Targets,
    units: &[usize],
    starts: &[usize],
    objective: &Objective,
    shares: Shares,
    dlogits: &mut [f32],
) -> Losses {
    let width = logits.len() / units.len().max(1);
    let (hard, soft) = (objective.hard(), objective.soft());
    let hard_weight = soft.map_or(1.0, |s| s.alpha);
    let mut sum = Losses::default();
    for ((row, d), &unit) in
        logits.chunks_exact(width.max(1)).zip(dlogits.chunks_exact_mut(width.max(1))).zip(units)
    {
        d.fill(0.0);
        let label = targets.class(unit);
        if label != UNLABELLED {
            let scale = shares.hard * hard_weight;
            let loss = match hard.loss {
                Loss::CrossEntropy => cross_entropy(row, label as usize, hard, scale, d),
                Loss::Binary => binary(row, targets.row(unit), scale, d),
                Loss::Distance(measure) => measure.add(row, targets.row(unit), scale, d),
            };
            let ce = f64::from(shares.hard) * loss;
            sum += Losses { total: f64::from(hard_weight) * ce, ce, ..Losses::default() };
        }
        if let Some(soft) = soft {
            let teacher = &soft.logits[unit * width..][..width];
            let weight = 1.0 - soft.alpha;
            let scale = shares.soft * weight;
            let far = match hard.loss {
                Loss::CrossEntropy => divergence(row, teacher, soft.temperature, scale, d),
                Loss::Binary => binary_divergence(row, teacher, soft.temperature, scale, d),
                Loss::Distance(measure) => measure.add(row, teacher, scale, d),
            };
            let kl = f64::from(shares.soft) * far;
            sum += Losses { total: f64::from(weight) * kl, kl, ..Losses::default() };
            if soft.logits_weight > 0.0 {
                let (share, weight) = (shares.soft, soft.logits_weight);
                let far = f64::from(share) * soft.logits_loss.add(row, teacher, share * weight, d);
                sum += Losses { total: f64::from(weight) * far, logits: far, ..Losses::default() };
            }
        }
    }
    if let (Some(soft), Loss::Distance(measure)) = (soft.filter(|s| s.differences > 0.0), hard.loss) {
        let far = f64::from(shares.pair)
            * differences(
                measure,
                (logits, width),
                soft.logits,
                units,
                starts,
                shares.pair * soft.differences,
                dlogits,
            );
        sum += Losses { total: f64::from(soft.differences) * far, differences: far, ..Losses::default() };
    }
    sum
}

/// Distances of the first differences within each sentence; `scale` times their gradient is added to `d`.
fn differences(
    measure: Measure,
    (rows, width): (&[f32], usize),
    teacher: &[f32],
    units: &[usize],
    starts: &[usize],
    scale: f32,
    d: &mut [f32],
) -> f64 {
    let step = |rows: &[f32], from: usize, to: usize| -> Vec<f32> {
        let (a, b) = (&rows[from * width..][..width], &rows[to * width..][..width]);
        a.iter().zip(b).map(|(a, b)| b - a).collect()
    };
    let mut sum = 0.0;
    for sentence in starts.windows(2) {
        for i in sentence[0] + 1..sentence[1] {
            let (own, theirs) = (step(rows, i - 1, i), step(teacher, units[i - 1], units[i]));
            let mut gradient = vec![0.0; width];
            sum += measure.add(&own, &theirs, scale, &mut gradient);
            for (c, g) in gradient.into_iter().enumerate() {
                d[i * width + c] += g;
                d[(i - 1) * width + c] -= g;
            }
        }
    }
    sum
}

/// log(1 + exp(x))
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Mean over labels of the binary cross-entropy; `scale` times its gradient is added to `d`.
fn binary(row: &[f32], truth: &[f32], scale: f32, d: &mut [f32]) -> f64 {
    let n = row.len() as f64;
    let mut sum = 0.0;
    for ((x, t), d) in row.iter().zip(truth).zip(d) {
        let (x, t) = (f64::from(*x), f64::from(*t));
        sum += softplus(x) - t * x;
        *d += scale * ((sigmoid(x) - t) / n) as f32;
    }
    sum / n
}

/// T^2 * the mean over labels of KL(teacher || student), which is the binary cross-entropy with the teacher's
/// probabilities less their entropy; `scale` times its gradient is added to `d`.
fn binary_divergence(row: &[f32], teacher: &[f32], temperature: f32, scale: f32, d: &mut [f32]) -> f64 {
    let (n, t) = (row.len() as f64, f64::from(temperature));
    let mut sum = 0.0;
    for ((s, teacher), d) in row.iter().zip(teacher).zip(d) {
        let (s, teacher) = (f64::from(*s) / t, f64::from(*teacher) / t);
        let p = sigmoid(teacher);
        sum += p * (softplus(-s) - softplus(-teacher)) + (1.0 - p) * (softplus(s) - softplus(teacher));
        *d += scale * (t * (sigmoid(s) - p) / n) as f32;
    }
    t * t * sum / n
}

/// One unit's weighted, smoothed cross-entropy; `d` becomes `scale` times its gradient.
fn cross_entropy(row: &[f32], label: usize, hard: Hard, scale: f32, d: &mut [f32]) -> f64 {
    let s = hard.label_smoothing;
    let weight = |c: usize| hard.class_weights.get(c).copied().unwrap_or(1.0);
    // The target of class c, not normalised to a sum of 1.
    let target = |c: usize| weight(c) * (s / row.len() as f32 + if c == label { 1.0 - s } else { 0.0 });
    let (lse, p) = (log_sum_exp(row, 1.0), softmax_at(row, 1.0));
    let mass: f64 = (0..row.len()).map(|c| f64::from(target(c))).sum();
    for (c, (d, p)) in d.iter_mut().zip(&p).enumerate() {
        *d = scale * (mass as f32 * p - target(c));
    }
    // A target of 0 times a logit that is infinite would be NaN.
    let terms = row.iter().enumerate().filter(|(c, _)| target(*c) != 0.0);
    terms.map(|(c, v)| f64::from(target(c)) * (lse - f64::from(*v))).sum()
}

/// T^2 * KL(teacher || student) of one sentence; `scale` times its gradient is added to `d`.
fn divergence(row: &[f32], teacher: &[f32], t: f32, scale: f32, d: &mut [f32]) -> f64 {
    let (ls, lt) = (log_sum_exp(row, t), log_sum_exp(teacher, t));
    let (ps, pt) = (softmax_at(row, t), softmax_at(teacher, t));
    let term = |(s, teacher): (&f32, &f32)| {
        let (log_t, log_s) = (f64::from(teacher / t) - lt, f64::from(s / t) - ls);
        log_t.exp() * (log_t - log_s)
    };
    for (d, (ps, pt)) in d.iter_mut().zip(ps.iter().zip(&pt)) {
        *d += scale * t * (ps - pt);
    }
    f64::from(t * t) * row.iter().zip(teacher).map(term).sum::<f64>()
}
