//! Losses on the logits, one pass for value and gradient.
//!
//! Distillation (Hinton, Vinyals & Dean 2015) as the reference recipe writes it:
//! `alpha * CE(s, y) + (1 - alpha) * T^2 * KL(softmax(t / T) || softmax(s / T))`, both means over the sentences
//! (`reduction="batchmean"`).

use quetsch_kernels::math::softmax;

/// What is minimised.
#[derive(Clone, Copy, Debug)]
pub enum Objective<'a> {
    /// Cross-entropy with the labels.
    CrossEntropy {
        /// Share of the target spread over all labels (Szegedy et al. 2016), as `label_smoothing` in PyTorch.
        label_smoothing: f32,
    },
    /// Cross-entropy with the labels and KL divergence from a teacher.
    Distill {
        /// Weight of the cross-entropy; the KL has 1 - alpha.
        alpha: f32,
        /// Temperature.
        temperature: f32,
        /// `[examples, labels]`, by example.
        teacher_logits: &'a [f32],
    },
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

/// Adds up the losses of these sentences, weighted by `share` (1 / sentences of the whole batch), and writes their
/// gradient. `examples[i]` is the row of the teacher's logits that sentence `i` belongs to.
pub fn losses(
    logits: &[f32],
    labels: &[u32],
    examples: &[usize],
    objective: &Objective,
    share: f32,
    dlogits: &mut [f32],
) -> Losses {
    let classes = logits.len() / labels.len().max(1);
    let mut sum = Losses::default();
    for (i, (row, d)) in logits.chunks_exact(classes).zip(dlogits.chunks_exact_mut(classes)).enumerate() {
        let label = labels[i] as usize;
        let lse = log_sum_exp(row, 1.0);
        let p = softmax_at(row, 1.0);
        match *objective {
            Objective::CrossEntropy { label_smoothing: s } => {
                let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / classes as f64;
                let ce = lse - f64::from(1.0 - s) * f64::from(row[label]) - f64::from(s) * mean;
                sum += Losses { total: ce, ce, kl: 0.0 };
                for (c, (d, p)) in d.iter_mut().zip(&p).enumerate() {
                    let target = s / classes as f32 + if c == label { 1.0 - s } else { 0.0 };
                    *d = share * (p - target);
                }
            }
            Objective::Distill { alpha, temperature: t, teacher_logits } => {
                let teacher = &teacher_logits[examples[i] * classes..][..classes];
                let (ls, lt) = (log_sum_exp(row, t), log_sum_exp(teacher, t));
                let (ps, pt) = (softmax_at(row, t), softmax_at(teacher, t));
                let term = |(c, s): (usize, &f32)| {
                    let (log_t, log_s) = (f64::from(teacher[c] / t) - lt, f64::from(s / t) - ls);
                    log_t.exp() * (log_t - log_s)
                };
                let ce = lse - f64::from(row[label]);
                let kl = f64::from(t * t) * row.iter().enumerate().map(term).sum::<f64>();
                let a = f64::from(alpha);
                sum += Losses { total: a * ce + (1.0 - a) * kl, ce, kl };
                for (c, d) in d.iter_mut().enumerate() {
                    let hard = p[c] - if c == label { 1.0 } else { 0.0 };
                    *d = share * (alpha * hard + (1.0 - alpha) * t * (ps[c] - pt[c]));
                }
            }
        }
    }
    sum.scaled(f64::from(share))
}
