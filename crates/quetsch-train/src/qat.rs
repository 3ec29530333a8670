//! Quantisation-aware training (Jacob et al. 2018): the forward computes with quantised weights and inputs, the backward
//! takes quantising for the identity (the straight-through estimator, Bengio et al. 2013).
//!
//! Every linear of the forward is the runtime's own [`Linear`], packed after each step from what quantising the f32 master
//! weights stores, so training and serving cannot disagree: y = Q(x) Q(W)^T + b with the runtime's integers. With x^ and
//! W^ the decoded values that are multiplied, dW = dy^T x^ and dx = dy W^; dx is 0 where a static range clipped x.
//!
//! Scales of weights, and of inputs quantised by row, are those of the values at hand. Static ranges of inputs are
//! observed again on the calibration sentences before each epoch of the first two thirds, and then stay.

use crate::params::Part;
use quetsch::batch::Encoding;
use quetsch::checkpoint::{Checkpoint, FloatType, Stored};
use quetsch::quant::calibrate::{self, Observer};
use quetsch::quant::{self, Scheme};
use quetsch::runtime::Arithmetic;
use quetsch::runtime::linear::Linear;
use quetsch::runtime::reads::Reads;
use quetsch::spec::{Lin, ModelSpec, Role, Tensor, TensorDef};
use quetsch::{Error, Result};
use std::collections::BTreeMap;

/// What is quantised how: the arguments of [`quant::quantise_calibrated`], which makes the result of the training.
#[derive(Clone, Debug, Default)]
pub struct Qat {
    /// Schemes by site pattern, the last match holds.
    pub rules: Vec<(String, Scheme)>,
    /// Patterns of what stays in float.
    pub keep: Vec<String>,
    /// absmax of the inputs of static linears.
    pub ranges: BTreeMap<Lin, f32>,
    /// How `ranges` are chosen from what is seen.
    pub observer: Observer,
    /// The sentences that are looked at; without any, the ranges stay as they are.
    pub sample: Vec<Encoding>,
}

/// The same for one model.
pub(crate) struct Assigned {
    pub qat: Qat,
    /// By row of the table of tensors.
    schemes: Vec<Option<Scheme>>,
}

/// The linears that read one input, as the forward runs them.
pub(crate) struct Site {
    /// The runtime's.
    pub linear: Linear,
    /// What each of its matrices reads of the input.
    pub reads: Vec<Reads>,
}

impl Qat {
    /// With the scheme of every tensor.
    pub(crate) fn assigned(&self, spec: &ModelSpec, table: &[TensorDef], trained: &[bool]) -> Result<Assigned> {
        let schemes: Vec<_> =
            quant::assign(spec, &self.rules, &self.keep)?.into_iter().map(|(_, scheme)| scheme).collect();
        for (i, (def, scheme)) in table.iter().zip(&schemes).enumerate() {
            if def.role == Role::Embedding && trained[i] && matches!(scheme, Some(s) if is_four_bit(*s)) {
                return Err(Error::invalid(format!(
                    "{} is to be trained in 4 bits, whose blocks and scales run across its rows: store it as int8, or \
                     freeze it",
                    def.name
                )));
            }
        }
        Ok(Assigned { schemes, qat: self.clone() })
    }

    /// The checkpoint that is deployed.
    pub(crate) fn deploy(&self, trained: &Checkpoint) -> Result<Checkpoint> {
        quant::quantise_calibrated(trained, &self.rules, &self.keep, &self.ranges)
    }

    /// Whether static ranges are observed anew before this epoch of so many; `ranges` are those of before the first.
    pub(crate) fn observes(&self, epoch: usize, epochs: usize) -> bool {
        !self.sample.is_empty() && !self.ranges.is_empty() && epoch > 0 && epoch < epochs * 2 / 3
    }

    /// The ranges that these weights give, quantised as they are.
    pub(crate) fn observe(&self, trained: &Checkpoint) -> Result<BTreeMap<Lin, f32>> {
        let seen = calibrate::observe(&self.deploy(trained)?, &self.sample)?;
        Ok(seen.iter().map(|(lin, seen)| (*lin, seen.absmax(self.observer))).collect())
    }
}

impl Assigned {
    /// The scheme of a row of the table.
    pub(crate) fn scheme(&self, row: usize) -> Option<Scheme> {
        self.schemes.get(row).copied().flatten()
    }

    fn encode(&self, row: usize, tensor: Tensor, values: &[f32], columns: usize) -> Stored {
        let range = if let Tensor::W(lin) = tensor { self.qat.ranges.get(&lin).copied() } else { None };
        let scheme = self.scheme(row).unwrap_or(Scheme::F32);
        quant::encode(values, columns, scheme, FloatType::F32, range.unwrap_or(0.0))
    }

    /// What the forward reads of rows of a tensor that is no matrix; None for the values themselves.
    pub(crate) fn read(&self, row: usize, values: &[f32], columns: usize) -> Option<Vec<f32>> {
        let stored = match self.scheme(row) {
            None | Some(Scheme::F32) => return None,
            Some(scheme) => quant::encode(values, columns, scheme, FloatType::F32, 0.0),
        };
        Some(decoded(stored))
    }

    /// The linear of some matrices side by side, and its weights as they are multiplied, `[n, k]`.
    pub(crate) fn site(
        &self,
        spec: &ModelSpec,
        table: &[TensorDef],
        data: &[Vec<f32>],
        parts: &[Part],
    ) -> (Site, Vec<f32>) {
        let (mut tensors, mut sites, mut reads, mut weights) = (vec![], vec![], vec![], vec![]);
        for part in parts {
            let def = &table[part.w];
            let stored = self.encode(part.w, def.tensor, &data[part.w], def.shape[1]);
            reads.push(Reads::of(&stored));
            weights.extend(decoded(stored.clone()));
            if let Tensor::W(lin) = def.tensor {
                sites.push(lin);
            }
            tensors.push((def.tensor, stored));
            let bias = &table[part.b];
            tensors.push((bias.tensor, self.encode(part.b, bias.tensor, &data[part.b], part.rows)));
        }
        let linear = Linear::pack(&Checkpoint::part(spec.clone(), tensors), &sites, Arithmetic::F32);
        (Site { linear, reads }, weights)
    }
}

pub(crate) fn is_four_bit(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::Nf4 { .. } | Scheme::Fp4 { .. })
}

/// The values that a product or a look-up reads: 4-bit weights are rounded once more, to the type of the product.
fn decoded(stored: Stored) -> Vec<f32> {
    match stored {
        Stored::Float { data, .. } => data,
        Stored::Int8(q) => q.dequantise(),
        Stored::FourBit(q) => {
            let compute = q.compute;
            q.dequantise().into_iter().map(|v| compute.round(v)).collect()
        }
    }
}
