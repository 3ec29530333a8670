//! AdamW over all parameters, in two parallel passes over fixed pieces: gradients summed and measured, then the update.
//!
//! Decay is decoupled (Loshchilov & Hutter 2019) and is not applied to biases and LayerNorms. Rows of the word table
//! that a batch does not touch have gradient 0 and are updated like everything else, exactly as dense AdamW does.

use crate::params::{Grads, Params};
use crate::step::Worker;
use quetsch::spec::{Lin, Role, Tensor, TensorDef};
use quetsch_kernels::{math, optim};

/// The constants of a run.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Learning rate of the body, at this step.
    pub body: f32,
    /// Learning rate of the head (its hidden layer and the classifier) and of projections, at this step.
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
}

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPS: f32 = 1e-8;
/// Floats in a piece of work; not a multiple of anything that matters.
const PIECE: usize = 1 << 18;

fn is_head(d: &TensorDef) -> bool {
    match d.tensor {
        Tensor::W(s) | Tensor::B(s) => matches!(s, Lin::HeadDense | Lin::Classifier),
        Tensor::Projection(_) => true,
        _ => false,
    }
}

/// Runs `f` on every item on `threads` threads; items are dealt in turn, so results do not depend on timing.
fn parallel<T: Send, R: Send>(items: Vec<T>, threads: usize, f: impl Fn(T) -> R + Sync) -> Vec<R> {
    if threads <= 1 {
        return items.into_iter().map(f).collect();
    }
    let count = items.len();
    let mut hands: Vec<Vec<(usize, T)>> = (0..threads).map(|_| vec![]).collect();
    items.into_iter().enumerate().for_each(|(i, t)| hands[i % threads].push((i, t)));
    let mut results: Vec<Option<R>> = (0..count).map(|_| None).collect();
    std::thread::scope(|s| {
        let f = &f;
        let run =
            |hand: Vec<(usize, T)>| s.spawn(move || hand.into_iter().map(|(i, t)| (i, f(t))).collect::<Vec<_>>());
        for h in hands.into_iter().map(run).collect::<Vec<_>>() {
            for (i, r) in h.join().expect("an optimiser thread never panics") {
                results[i] = Some(r);
            }
        }
    });
    results.into_iter().flatten().collect()
}

impl AdamW {
    /// Zero moments.
    pub fn new(p: &Params) -> AdamW {
        let zeros = || -> Vec<Vec<f32>> {
            p.data.iter().zip(&p.trained).map(|(d, t)| vec![0.0; if *t { d.len() } else { 0 }]).collect()
        };
        AdamW { step: 0, m: zeros(), v: zeros() }
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
        }
        workers.iter_mut().for_each(|w| w.grads.clear());
        norm
    }

    fn apply(&mut self, p: &mut Params, grads: &Grads, norm: f64, rates: Rates, threads: usize) {
        self.step += 1;
        let t = self.step as i32;
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
            correction1: (1.0 - f64::from(BETA1).powi(t)) as f32,
            correction2: (1.0 - f64::from(BETA2).powi(t)) as f32,
            scale: scale as f32,
        };
        let (word, hidden) = (p.id(Tensor::Word), p.spec.embedding());
        let mut pieces = vec![];
        let tensors = p.data.iter_mut().zip(&mut self.m).zip(&mut self.v).enumerate();
        for (i, ((w, m), v)) in tensors.filter(|(i, _)| p.trained[*i]) {
            let def = &p.table[i];
            let decay = if matches!(def.role, Role::Weight | Role::Embedding) { rates.decay } else { 0.0 };
            let setting =
                optim::AdamW { rate: if is_head(def) { rates.head } else { rates.body }, decay, ..common };
            let size = if i == word { (PIECE / hidden).max(1) * hidden } else { PIECE };
            let parts = w.chunks_mut(size).zip(m.chunks_mut(size)).zip(v.chunks_mut(size)).enumerate();
            pieces.extend(parts.map(|(c, ((w, m), v))| (i, c * size, w, m, v, setting)));
        }
        let zeros = vec![0.0; hidden];
        parallel(pieces, threads, |(i, start, w, m, v, setting)| {
            if i != word {
                optim::adamw(w, &grads.dense[i][start..start + w.len()], m, v, setting);
                return;
            }
            let rows = w.chunks_mut(hidden).zip(m.chunks_mut(hidden)).zip(v.chunks_mut(hidden));
            for (r, ((w, m), v)) in rows.enumerate() {
                optim::adamw(w, grads.word.row(start / hidden + r).unwrap_or(&zeros), m, v, setting);
            }
        });
    }
}

/// Adds the other workers' dense gradients to `grads`, in order; the global norm.
fn sum_and_measure(grads: &mut Grads, rest: &[Worker], threads: usize) -> f64 {
    let mut pieces = vec![];
    for (i, g) in grads.dense.iter_mut().enumerate() {
        pieces.extend(g.chunks_mut(PIECE).enumerate().map(|(c, g)| (i, c * PIECE, g)));
    }
    let squares = parallel(pieces, threads, |(i, start, g)| {
        rest.iter().for_each(|w| math::add(g, &w.grads.dense[i][start..start + g.len()]));
        math::sum_of_squares(g)
    });
    (squares.iter().sum::<f64>() + math::sum_of_squares(&grads.word.data)).sqrt()
}
