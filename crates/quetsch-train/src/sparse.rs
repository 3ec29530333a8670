//! Unstructured sparsity during training: weights that are exactly 0 stay 0, and a schedule makes more of them.

use crate::params::Params;
use quetsch::prune::{Scope, sparse_sites, sparsify};
use quetsch::spec::Tensor;
use quetsch::{Error, Result};

/// What happens to the matrices of the layers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Sparsity {
    /// Zeros are weights like others.
    #[default]
    Free,
    /// Zeros stay.
    Keep,
    /// Zeros stay and become more, by the cubic schedule of Zhu & Gupta 2017: after step t of n that is
    /// `share * (1 - (1 - t / n)^3)` of the weights, the smallest; n is `until` of all steps.
    Cubic {
        /// The share of zeros in the end.
        share: f64,
        /// What a weight competes with: all matrices, or its own.
        scope: Scope,
        /// The share of the steps after which the zeros stay as they are.
        until: f64,
    },
}

/// How often a schedule looks for weights to drop, in steps.
const EVERY: usize = 10;

/// Which weights stay 0.
pub(crate) struct Zeros {
    how: Sparsity,
    /// By row of the table of tensors; empty where there are none.
    zero: Vec<Vec<bool>>,
    rows: Vec<usize>,
}

impl Zeros {
    /// The zeros that are there: those of the start, or of a saved state.
    pub fn new(how: Sparsity, p: &Params) -> Zeros {
        let rows = match how {
            Sparsity::Free => vec![],
            _ => sparse_sites(&p.spec).into_iter().map(|s| p.id(Tensor::W(s))).collect(),
        };
        let mut zeros = Zeros { how, zero: vec![vec![]; p.data.len()], rows };
        zeros.find(p);
        zeros
    }

    fn find(&mut self, p: &Params) {
        for &i in &self.rows {
            self.zero[i] = p.data[i].iter().map(|w| *w == 0.0).collect();
        }
    }

    /// After step `step` (from 1) of `steps`.
    pub fn after(&mut self, p: &mut Params, step: usize, steps: usize, threads: usize) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        for &i in &self.rows {
            p.data[i].iter_mut().zip(&self.zero[i]).filter(|(_, z)| **z).for_each(|(w, _)| *w = 0.0);
        }
        if let Sparsity::Cubic { share, scope, until } = self.how {
            let last = ((until * steps as f64) as usize).max(1);
            if step == last || step < last && step.is_multiple_of(EVERY) {
                let now = share * (1.0 - (1.0 - step as f64 / last as f64).powi(3));
                let rows = p.data.iter_mut().enumerate().filter(|(i, _)| self.rows.contains(i));
                let mut all: Vec<&mut [f32]> = rows.map(|(_, data)| data.as_mut_slice()).collect();
                sparsify(&mut all, now, scope)?;
                self.find(p);
            }
        }
        p.repack(threads);
        Ok(())
    }
}

impl Sparsity {
    pub(crate) fn check(self) -> Result<()> {
        let Sparsity::Cubic { share, until, .. } = self else { return Ok(()) };
        for (what, x) in [("share of zeros", share), ("share of the steps until it is reached", until)] {
            if !(x > 0.0 && x <= 1.0) {
                return Err(Error::invalid(format!("sparsity: the {what} is {x}, expected above 0, at most 1")));
            }
        }
        Ok(())
    }
}
