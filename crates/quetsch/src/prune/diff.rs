//! Two plans for one parent beside each other.

use super::plan::Plan;
use crate::error::{Error, Result};
use serde::Serialize;
use std::fmt;

/// What each of two plans removes alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanDiff {
    /// Parameters after each plan.
    pub parameters: [usize; 2],
    /// What the first removes and the second does not.
    pub first: Removed,
    /// What the second removes and the first does not.
    pub second: Removed,
}

/// Layers, and by layer heads (original indices) and channels (positions).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Removed {
    /// Whole layers.
    pub layers: Vec<usize>,
    /// By layer.
    pub heads: Vec<Vec<u16>>,
    /// By layer.
    pub ffn: Vec<Vec<usize>>,
}

/// What differs.
///
/// # Errors
/// Plans for different parents.
pub fn diff(first: &Plan, second: &Plan) -> Result<PlanDiff> {
    if first.parent.fingerprint != second.parent.fingerprint {
        return Err(Error::invalid(format!(
            "the plans are for different parents: one has {}, the other {}. Plans compare where their parent is of one \
             shape",
            first.parent.describe(),
            second.parent.describe()
        )));
    }
    Ok(PlanDiff {
        parameters: [first, second].map(Plan::parameters),
        first: alone(first, second),
        second: alone(second, first),
    })
}

fn alone(plan: &Plan, other: &Plan) -> Removed {
    fn without<T: PartialEq + Copy>(a: &[T], b: &[T]) -> Vec<T> {
        a.iter().filter(|x| !b.contains(x)).copied().collect()
    }
    let all = 0..plan.parent.layers.len();
    Removed {
        layers: without(&plan.layers, &other.layers),
        heads: all.clone().map(|l| without(plan.heads_of(l), other.heads_of(l))).collect(),
        ffn: all.map(|l| without(plan.ffn_of(l), other.ffn_of(l))).collect(),
    }
}

impl Removed {
    fn of_layer(&self, l: usize) -> String {
        if self.layers.contains(&l) {
            return "the layer".into();
        }
        let mut parts = vec![];
        if !self.heads[l].is_empty() {
            parts
                .push(format!("heads {}", self.heads[l].iter().map(u16::to_string).collect::<Vec<_>>().join(", ")));
        }
        if !self.ffn[l].is_empty() {
            parts.push(format!("{} channels", self.ffn[l].len()));
        }
        parts.join("; ")
    }
}

/// A table for people.
impl fmt::Display for PlanDiff {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [a, b] = self.parameters;
        writeln!(f, "parameters after the first plan {a}, after the second {b}")?;
        let rows = (0..self.first.heads.len()).map(|l| (l, self.first.of_layer(l), self.second.of_layer(l)));
        let rows: Vec<_> = rows.filter(|(_, a, b)| a != b).collect();
        if rows.is_empty() {
            return writeln!(f, "both remove the same");
        }
        let width = rows.iter().map(|(_, a, _)| a.len()).max().unwrap_or(0).max("the first alone removes".len());
        writeln!(f, "layer  {:<width$}  the second alone removes", "the first alone removes")?;
        for (l, a, b) in rows {
            writeln!(
                f,
                "{l:>5}  {:<width$}  {}",
                if a.is_empty() { "-" } else { &a },
                if b.is_empty() { "-" } else { &b }
            )?;
        }
        Ok(())
    }
}
