//! The shapes of a search: all that the space holds, what each costs, and a few that cover its costs evenly.

use crate::commands::expected;
use crate::exit::usage;
use crate::recipe::Kind;
use crate::settings::{Distill, Kd, Prune, Space};
use crate::values::Amount;
use anyhow::Result;
use quetsch::cost::CostOps;
use quetsch::rng;
use quetsch::spec::ModelSpec;
use schemars::JsonSchema;
use serde::Serialize;

/// A student's shape and what it learns from.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Shape {
    /// Layers of the teacher that it has.
    pub layers: usize,
    /// Share of their heads that is cut.
    pub heads: f64,
    /// Share of their feed-forward channels that is cut.
    pub ffn: f64,
    /// Weight of the true labels, if the space varies it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Temperature, if the space varies it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
}

impl Shape {
    /// `d3-h33-f50-a0.5-t2`: layers, percent of heads and channels cut, alpha, temperature; what is not cut or varied
    /// is left out.
    pub fn name(&self) -> String {
        let cut = |letter, share: f64| match share > 0.0 {
            true => format!("-{letter}{}", (100.0 * share).round()),
            false => String::new(),
        };
        let value = |letter, x: Option<f64>| x.map_or_else(String::new, |x| format!("-{letter}{x}"));
        let (heads, ffn) = (cut('h', self.heads), cut('f', self.ffn));
        format!("d{}{heads}{ffn}{}{}", self.layers, value('a', self.alpha), value('t', self.temperature))
    }

    /// Whether anything is cut off the student.
    pub fn is_cut(&self) -> bool {
        self.heads > 0.0 || self.ffn > 0.0
    }

    fn learns(&self, kd: &Kd) -> Kd {
        let (alpha, temperature) = (self.alpha.unwrap_or(kd.alpha), self.temperature.unwrap_or(kd.temperature));
        Kd { alpha, temperature, ..kd.clone() }
    }

    /// The stage that cuts a student to this shape, with so many epochs of recovery.
    pub fn prune(&self, base: &Prune, epochs: usize) -> Prune {
        let mut stage = Prune {
            heads: Amount::Share(self.heads),
            ffn: Amount::Share(self.ffn),
            kd: self.learns(&base.kd),
            ..base.clone()
        };
        stage.training.epochs = epochs;
        stage
    }

    /// The stage that teaches a student of this shape for so many epochs more.
    pub fn distill(&self, base: &Distill, epochs: usize) -> Distill {
        let mut stage = Distill { kd: self.learns(&base.kd), ..base.clone() };
        stage.training.epochs = epochs;
        stage
    }

    /// The shape itself.
    pub fn spec(&self, teacher: &ModelSpec) -> ModelSpec {
        let layers = spread_layers(self.layers, teacher.layers.len());
        let student = expected(&Kind::Distill(Distill { layers, ..Distill::default() }), teacher.clone());
        expected(&Kind::Prune(self.prune(&Prune::default(), 0)), student)
    }
}

/// `n` of `all` layers, evenly spread, the last one included: 3 of 6 are 1, 3, 5.
pub fn spread_layers(n: usize, all: usize) -> Vec<usize> {
    (1..=n).map(|i| (2 * i * all + n) / (2 * n) - 1).collect()
}

/// Every shape of the space, the cheap ones first.
pub fn shapes(space: &Space, teacher: &ModelSpec) -> Result<Vec<Shape>> {
    let all = teacher.layers.len();
    if let Some(deep) = space.layers.iter().find(|n| **n > all) {
        return Err(usage(format!("space.layers holds {deep}, the teacher has {all} layers")));
    }
    let optional = |list: &[f64]| match list.is_empty() {
        true => vec![None],
        false => list.iter().copied().map(Some).collect(),
    };
    let (alphas, temperatures) = (optional(&space.alpha), optional(&space.temperature));
    let mut found: Vec<Shape> = vec![];
    for &layers in &space.layers {
        for &heads in &space.heads {
            for &ffn in &space.ffn {
                for &alpha in &alphas {
                    for &temperature in &temperatures {
                        let shape = Shape { layers, heads, ffn, alpha, temperature };
                        if !found.contains(&shape) {
                            found.push(shape);
                        }
                    }
                }
            }
        }
    }
    Ok(found)
}

/// Multiply-accumulates of one sentence, the mean over sentences of these lengths.
pub fn macs(spec: &ModelSpec, lengths: &[usize]) -> Result<f64> {
    Ok(CostOps::run(spec, lengths)?.macs() as f64 / lengths.len().max(1) as f64)
}

/// Up to `n` of the candidates by index, ascending in cost: the cheapest, the dearest, and evenly between. Of equal
/// costs the seed decides, so that settings that cost nothing are mixed.
pub fn cover(costs: &[f64], n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| {
        let draw = |i: usize| rng::key(&[seed, i as u64]);
        costs[a].total_cmp(&costs[b]).then(draw(a).cmp(&draw(b)))
    });
    if n >= order.len() {
        return order;
    }
    let last = order.len() - 1;
    (0..n).map(|i| order[if n == 1 { 0 } else { (2 * i * last + n - 1) / (2 * (n - 1)) }]).collect()
}

/// How many of `n` survive a round.
pub fn survivors(n: usize, keep: f64) -> usize {
    ((n as f64 * keep).ceil() as usize).clamp(1, n.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_spread_and_the_last_is_there() {
        for (n, all, want) in [
            (3, 6, vec![1, 3, 5]),
            (1, 6, vec![5]),
            (2, 6, vec![2, 5]),
            (4, 6, vec![1, 2, 4, 5]),
            (6, 6, vec![0, 1, 2, 3, 4, 5]),
            (5, 12, vec![1, 4, 6, 9, 11]),
            (3, 4, vec![0, 2, 3]),
        ] {
            assert_eq!(spread_layers(n, all), want, "{n} of {all}");
        }
    }

    #[test]
    fn names_say_what_is_cut() {
        let shape = Shape { layers: 3, heads: 0.33, ffn: 0.5, alpha: Some(0.5), temperature: Some(2.0) };
        assert_eq!(shape.name(), "d3-h33-f50-a0.5-t2");
        let plain = Shape { layers: 2, heads: 0.0, ffn: 0.0, alpha: None, temperature: None };
        assert!(plain.name() == "d2" && !plain.is_cut());
    }

    #[test]
    fn a_few_cover_the_costs() {
        let costs = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(cover(&costs, 3, 0), [1, 2, 0]);
        assert_eq!(cover(&costs, 9, 0), [1, 3, 2, 4, 0]);
        assert_eq!(cover(&costs, 1, 0), [1]);
        let equal = [1.0; 40];
        assert_eq!(cover(&equal, 6, 3), cover(&equal, 6, 3));
        assert_ne!(cover(&equal, 6, 3), cover(&equal, 6, 4), "the seed mixes equals");
        for n in 2..40 {
            let mut chosen = cover(&equal, n, 1);
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen.len(), n, "no shape twice");
        }
    }

    #[test]
    fn somebody_survives() {
        assert_eq!([(12, 0.5), (3, 0.5), (1, 0.1), (5, 1.0)].map(|(n, keep)| survivors(n, keep)), [6, 2, 1, 5]);
    }
}
