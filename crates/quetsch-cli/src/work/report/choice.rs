//! Which model a report recommends, and what stands against the others.

use crate::work::compare::{Comparison, Variant};
use crate::work::gate::Checked;

/// The accuracy, in shares, that the recommended variant may lose against the first one, unless a search says.
const MAX_DROP: f64 = 0.005;

/// What stands against a variant.
pub enum Objection<'a> {
    /// It loses more than it may: this share of accuracy, against the first one.
    Loses(f64),
    /// It misses a gate.
    Misses(&'a Checked),
    /// Word statistics answer better, without a network.
    BelowBaseline,
}

impl Comparison {
    /// The accuracy, in shares, that the recommended variant may lose.
    pub(super) fn max_drop(&self) -> f64 {
        self.chosen.as_ref().map_or(MAX_DROP, |c| c.max_drop)
    }

    /// Everything that stands against a variant. What a search's choice loses was judged on other data.
    pub(super) fn objections(&self, v: &Variant) -> Vec<Objection<'_>> {
        let mut found = vec![];
        let old = self.models().next().map_or(0.0, |first| first.labels().accuracy);
        let loss = old - v.labels().accuracy;
        if self.chosen.is_none() && loss > MAX_DROP + 1e-9 {
            found.push(Objection::Loses(loss));
        }
        found.extend(self.gates.iter().filter(|g| !g.met && g.variant == v.name).map(Objection::Misses));
        if v.below_baseline == Some(true) {
            found.push(Objection::BelowBaseline);
        }
        found
    }

    /// What a search chose, or else one of all after the first; of those with nothing against them, the fastest, or
    /// the smallest where nothing was timed.
    pub(super) fn recommended(&self) -> Option<&Variant> {
        let asked = |v: &&Variant| match &self.chosen {
            Some(chosen) => chosen.variant.as_ref() == Some(&v.name),
            None => true,
        };
        let timed = self.is_timed();
        let cost = |v: &Variant| match &v.speed {
            Some(s) if timed => s.latency_ms.p50,
            _ => v.disk_bytes as f64,
        };
        let good = self.models().skip(1).filter(asked).filter(|v| self.objections(v).is_empty());
        good.min_by(|a, b| cost(a).total_cmp(&cost(b)))
    }

    /// Whether every model was timed.
    pub(super) fn is_timed(&self) -> bool {
        self.models().all(|v| v.speed.is_some())
    }

    /// The variant that the page shows in detail: the recommended one, else of those after the first the most accurate,
    /// of equals the smallest.
    pub(super) fn shown(&self) -> Option<&Variant> {
        let nearest = || {
            self.models().skip(1).min_by(|a, b| {
                let accurate = b.labels().accuracy.total_cmp(&a.labels().accuracy);
                accurate.then(a.disk_bytes.cmp(&b.disk_bytes))
            })
        };
        self.recommended().or_else(nearest).or_else(|| self.models().next())
    }
}
