//! AdamW over all parameters, in two parallel passes over fixed pieces: gradients summed and measured, then the update.
//!
//! Decay is decoupled (Loshchilov & Hutter 2019) and is not applied to biases and LayerNorms. Rows of the word table
//! that a batch does not touch have gradient 0; dense AdamW moves them all the same. They take those steps when they are
//! next read, see [`AdamW::catch_up`].

use crate::params::{Grads, Params};
use crate::step::Worker;
use crate::threads::parallel;
use quetsch::Result;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::spec::{Lin, Role, Tensor, TensorDef};
use quetsch_kernels::{math, optim};

/// The constants of a run.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Learning rate of the body, at this step.
    pub body: f32,
    /// Learning rate of the head (its hidden layer and the classifier), of projections and of layer weights, at this step.
    pub head: f32,
    /// Decoupled weight decay of matrices and tables.
    pub decay: f32,
    /// Largest global norm of the gradient; 0 turns clipping off.
    pub clip: f32,
}

/// First and second moments.
pub struct AdamW {
    /// Steps taken.
    pub step: usize,
    /// First moments by row of the table; empty where nothing is trained.
    pub m: Vec<Vec<f32>>,
    /// Second moments.
    pub v: Vec<Vec<f32>>,
    /// By row of the word table: the step up to which it is updated; empty where it is not trained.
    pub(crate) updated: Vec<u32>,
    idle: Idle,
}

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPS: f32 = 1e-8;
/// Floats in a piece of work; not a multiple of anything that matters.
const PIECE: usize = 1 << 18;

fn is_head(d: &TensorDef) -> bool {
    match d.tensor {
        Tensor::W(s) | Tensor::B(s) => matches!(s, Lin::HeadDense | Lin::Classifier),
        Tensor::Projection(_) | Tensor::LayerWeights(_) => true,
        _ => false,
    }
}

impl AdamW {
    /// Zero moments.
    pub fn new(p: &Params) -> AdamW {
        let zeros = || -> Vec<Vec<f32>> {
            p.data.iter().zip(&p.trained).map(|(d, t)| vec![0.0; if *t { d.len() } else { 0 }]).collect()
        };
        let rows = if p.trained[p.id(Tensor::Word)] { p.spec.vocab } else { 0 };
        AdamW { step: 0, m: zeros(), v: zeros(), updated: vec![0; rows], idle: Idle::default() }
    }

    /// Rate and decay of every step so far.
    pub(crate) fn history(&self) -> &[[f32; 2]] {
        &self.idle.history
    }

    /// Goes on after these steps.
    pub(crate) fn resume(&mut self, updated: Vec<u32>, history: &[[f32; 2]]) {
        (self.step, self.updated, self.idle) = (history.len(), updated, Idle::default());
        history.iter().for_each(|[rate, decay]| self.idle.push(*rate, *decay));
    }

    /// Brings the rows of the word table that a batch reads up to the present step.
    pub fn catch_up<'a>(&mut self, p: &mut Params, ids: impl Iterator<Item = &'a u32>) {
        if self.updated.is_empty() {
            return;
        }
        let (word, width) = (p.id(Tensor::Word), p.spec.embedding());
        for id in ids.map(|id| *id as usize) {
            if (self.updated[id] as usize) < self.step {
                let row = id * width..(id + 1) * width;
                let [w, m, v] = [&mut p.data[word], &mut self.m[word], &mut self.v[word]];
                self.idle.run(self.updated[id], &mut w[row.clone()], &mut m[row.clone()], &mut v[row]);
                self.updated[id] = self.step as u32;
            }
        }
    }

    /// `like` with the weights as they are after the last step.
    ///
    /// # Errors
    /// Never for the checkpoint these parameters came from.
    pub fn checkpoint(&self, p: &Params, like: &Checkpoint) -> Result<Checkpoint> {
        let mut checkpoint = p.to_checkpoint(like)?;
        if self.updated.iter().any(|u| (*u as usize) < self.step) {
            let (word, width) = (p.id(Tensor::Word), p.spec.embedding());
            let [mut w, mut m, mut v] = [&p.data[word], &self.m[word], &self.v[word]].map(Clone::clone);
            let rows = w.chunks_mut(width).zip(m.chunks_mut(width)).zip(v.chunks_mut(width));
            for (((w, m), v), updated) in rows.zip(&self.updated) {
                self.idle.run(*updated, w, m, v);
            }
            checkpoint.set(Tensor::Word, Stored::f32(w));
        }
        Ok(checkpoint)
    }

    /// Sums the workers' gradients into the first one's, clips, updates and clears. Returns the gradient's global norm
    /// before clipping.
    pub fn update(&mut self, p: &mut Params, workers: &mut [Worker], rates: Rates) -> f64 {
        let threads = workers.len();
        let (first, rest) = workers.split_at_mut(1);
        let grads = &mut first[0].grads;
        rest.iter().for_each(|w| grads.word.add(&w.grads.word));
        let norm = sum_and_measure(grads, rest, threads);
        if norm.is_finite() {
            self.apply(p, grads, norm, rates, threads);
            p.repack(threads);
        }
        workers.iter_mut().for_each(|w| w.grads.clear());
        norm
    }

    fn apply(&mut self, p: &mut Params, grads: &Grads, norm: f64, rates: Rates, threads: usize) {
        self.step += 1;
        self.idle.push(rates.body, rates.decay);
        let (correction1, correction2) = corrections(self.step);
        let scale = match rates.clip > 0.0 && norm > f64::from(rates.clip) {
            true => f64::from(rates.clip) / (norm + 1e-6),
            false => 1.0,
        };
        let common = optim::AdamW {
            rate: 0.0,
            decay: 0.0,
            beta1: BETA1,
            beta2: BETA2,
            eps: EPS,
            correction1,
            correction2,
            scale: scale as f32,
        };
        let setting = |def: &TensorDef| optim::AdamW {
            rate: if is_head(def) { rates.head } else { rates.body },
            decay: if matches!(def.role, Role::Weight | Role::Embedding) { rates.decay } else { 0.0 },
            ..common
        };
        let (word, width) = (p.id(Tensor::Word), p.spec.embedding());
        let (w, m, v) = (&mut p.data[word], &mut self.m[word], &mut self.v[word]);
        for (id, g) in grads.word.rows.iter().zip(grads.word.data.chunks_exact(width)) {
            let (id, row) = (*id as usize, *id as usize * width..(*id as usize + 1) * width);
            debug_assert_eq!(self.updated[id] as usize + 1, self.step, "a row is up to date before it is read");
            optim::adamw(&mut w[row.clone()], g, &mut m[row.clone()], &mut v[row], setting(&p.table[word]));
            self.updated[id] = self.step as u32;
        }
        let mut pieces = vec![];
        let tensors = p.data.iter_mut().zip(&mut self.m).zip(&mut self.v).enumerate();
        for (i, ((w, m), v)) in tensors.filter(|(i, _)| p.trained[*i] && *i != word) {
            let setting = setting(&p.table[i]);
            let parts = w.chunks_mut(PIECE).zip(m.chunks_mut(PIECE)).zip(v.chunks_mut(PIECE)).enumerate();
            pieces.extend(parts.map(|(c, ((w, m), v))| (i, c * PIECE, w, m, v, setting)));
        }
        parallel(pieces, threads, |(i, start, w, m, v, setting)| {
            optim::adamw(w, &grads.dense[i][start..start + w.len()], m, v, setting);
        });
    }
}

/// The steps that rows without a gradient take later, all at once.
///
/// With g = 0 a step of AdamW is m <- beta1 m, v <- beta2 v, w <- (1 - rate decay) w - rate m_hat / (sqrt(v_hat) + eps):
/// it depends on the row and on the step's constants alone. So a row may wait until it is read, and then take the
/// same steps in the same order, in registers, with the same bits. Two shortcuts, exact to the rounding of f32:
/// a row that never had a gradient has m = v = 0, and its steps are one product of the (1 - rate decay). And
/// |m_hat| / sqrt(v_hat) shrinks by beta1 / sqrt(beta2) = 0.9005 a step: after [`LONG`] steps what m still moves w
/// by is below 1e-10 rates in all, and only the decay is left.
#[derive(Default)]
struct Idle {
    /// Rate and decay of every step.
    history: Vec<[f32; 2]>,
    steps: Vec<optim::Idle>,
    /// `products[t]`: of the (1 - rate decay) of the first t + 1 steps.
    products: Vec<f64>,
}

/// Steps without a gradient after which the first moment no longer moves the weight.
const LONG: usize = 256;

impl Idle {
    fn push(&mut self, rate: f32, decay: f32) {
        self.history.push([rate, decay]);
        let (correction1, correction2) = corrections(self.history.len());
        let shrink = 1.0 - rate * decay;
        self.steps.push(optim::Idle { shrink, step: rate / correction1, root: 1.0 / correction2.sqrt() });
        self.products.push(self.product(self.products.len()) * f64::from(shrink));
    }

    /// Of the first `t` steps.
    fn product(&self, t: usize) -> f64 {
        if t == 0 { 1.0 } else { self.products[t - 1] }
    }

    fn run(&self, updated: u32, w: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        let (from, to) = (updated as usize, self.steps.len());
        let near = if from == 0 { 0 } else { to.min(from + LONG) };
        if near > from {
            optim::adamw_idle(w, m, v, &self.steps[from..near], BETA1, BETA2, EPS);
        }
        let from = near.max(from);
        if from < to {
            let product = (self.product(to) / self.product(from)) as f32;
            let (decay1, decay2) = (BETA1.powi((to - from) as i32), BETA2.powi((to - from) as i32));
            w.iter_mut().for_each(|w| *w *= product);
            m.iter_mut().for_each(|m| *m *= decay1);
            v.iter_mut().for_each(|v| *v *= decay2);
        }
    }
}

/// 1 - beta^step of both moments.
fn corrections(step: usize) -> (f32, f32) {
    let of = |beta: f32| (1.0 - f64::from(beta).powi(step as i32)) as f32;
    (of(BETA1), of(BETA2))
}

/// Adds the other workers' dense gradients to `grads`, in order; the global norm.
fn sum_and_measure(grads: &mut Grads, rest: &[Worker], threads: usize) -> f64 {
    let mut pieces = vec![];
    for (i, (g, fresh)) in grads.dense.iter_mut().zip(&mut grads.fresh).enumerate() {
        let fresh = std::mem::take(fresh);
        pieces.extend(g.chunks_mut(PIECE).enumerate().map(|(c, g)| (i, c * PIECE, g, fresh)));
    }
    let squares = parallel(pieces, threads, |(i, start, g, mut fresh)| {
        for other in rest.iter().map(|w| &w.grads).filter(|g| !g.fresh[i]) {
            let other = &other.dense[i][start..start + g.len()];
            match fresh {
                true => g.copy_from_slice(other),
                false => math::add(g, other),
            }
            fresh = false;
        }
        if fresh {
            g.fill(0.0);
        }
        math::sum_of_squares(g)
    });
    (squares.iter().sum::<f64>() + math::sum_of_squares(&grads.word.data)).sqrt()
}
