//! Losses on the logits, one pass for value and gradient.
//!
//! Distillation (Hinton, Vinyals & Dean 2015) as the reference recipe writes it:
//! `alpha * CE(s, y) + (1 - alpha) * T^2 * KL(softmax(t / T) || softmax(s / T))`, the KL a mean over the sentences
//! (`reduction="batchmean"`), the CE PyTorch's weighted mean: with class weights w and label smoothing e
//! `sum_i (1 - e) w[y_i] nll(i, y_i) + e / C * sum_c w[c] nll(i, c)`, divided by `sum_i w[y_i]`.

use quetsch_kernels::math::softmax;

/// Cross-entropy with the labels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hard<'a> {
    /// Share of the target spread over all labels (Szegedy et al. 2016), as `label_smoothing` in PyTorch.
    pub label_smoothing: f32,
    /// Weight of each class, as `weight` in PyTorch; empty where all weigh 1.
    pub class_weights: &'a [f32],
}

/// The teacher's part.
#[derive(Clone, Copy, Debug)]
pub struct Soft<'a> {
    /// Weight of the cross-entropy; the KL has 1 - alpha.
    pub alpha: f32,
    /// Temperature.
    pub temperature: f32,
    /// `[examples, labels]`, by example.
    pub logits: &'a [f32],
}

/// What is minimised.
#[derive(Clone, Copy, Debug)]
pub enum Objective<'a> {
    /// Cross-entropy with the labels.
    CrossEntropy(Hard<'a>),
    /// Cross-entropy with the labels and divergence from a teacher.
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
        labels.iter().for_each(|l| counts[*l as usize] += 1);
        let balanced = |n: &usize| match n {
            0 => 1.0,
            n => labels.len() as f64 / (classes * n) as f64,
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
    /// 1 / sentences.
    soft: f32,
}

impl Shares {
    /// Of a step with these labels.
    pub fn of(objective: &Objective, labels: impl ExactSizeIterator<Item = u32>) -> Shares {
        let soft = 1.0 / labels.len().max(1) as f32;
        match objective.hard().class_weights {
            [] => Shares { hard: soft, soft },
            w => Shares { hard: (1.0 / labels.map(|l| f64::from(w[l as usize])).sum::<f64>()) as f32, soft },
        }
    }
}

/// Loss parts, each per sentence.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Losses {
    /// What is minimised.
    pub total: f64,
    /// Cross-entropy.
    pub ce: f64,
    /// T^2 * KL; 0 without a teacher.
    pub kl: f64,
}

impl std::ops::AddAssign for Losses {
    fn add_assign(&mut self, o: Losses) {
        self.total += o.total;
        self.ce += o.ce;
        self.kl += o.kl;
    }
}

impl Losses {
    /// Every part multiplied.
    pub fn scaled(self, by: f64) -> Losses {
        Losses { total: self.total * by, ce: self.ce * by, kl: self.kl * by }
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

/// Adds up the shares of these sentences in the losses of their step and writes their gradient. `examples[i]` is the
/// row of the teacher's logits that sentence `i` belongs to.
pub fn losses(
    logits: &[f32],
    labels: &[u32],
    examples: &[usize],
    objective: &Objective,
    shares: Shares,
    dlogits: &mut [f32],
) -> Losses {
    let classes = logits.len() / labels.len().max(1);
    let (hard, soft) = (objective.hard(), objective.soft());
    let hard_weight = soft.map_or(1.0, |s| s.alpha);
    let mut sum = Losses::default();
    for (i, (row, d)) in logits.chunks_exact(classes).zip(dlogits.chunks_exact_mut(classes)).enumerate() {
        let ce =
            f64::from(shares.hard) * cross_entropy(row, labels[i] as usize, hard, shares.hard * hard_weight, d);
        sum += Losses { total: f64::from(hard_weight) * ce, ce, kl: 0.0 };
        if let Some(soft) = soft {
            let teacher = &soft.logits[examples[i] * classes..][..classes];
            let weight = 1.0 - soft.alpha;
            let kl = f64::from(shares.soft) * divergence(row, teacher, soft.temperature, shares.soft * weight, d);
            sum += Losses { total: f64::from(weight) * kl, ce: 0.0, kl };
        }
    }
    sum
}

/// One sentence's weighted, smoothed cross-entropy; `d` becomes `scale` times its gradient.
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
