//! Quality gates: `accuracy>=-0.5pt` (against the parent), `accuracy>=0.92`, `flips<=1%`. A gate that is not met ends
//! the program with exit code 3.

use super::compare::Variant;
use crate::exit::{gate, usage};
use anyhow::Result;
use std::str::FromStr;

/// One condition.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    text: String,
    figure: Figure,
    at_least: bool,
    limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Figure {
    Accuracy,
    MacroF1,
    Top3,
    Flips,
    Agreement,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    /// A share, 0 to 1.
    Absolute(f64),
    /// Difference to the parent, in shares.
    ToParent(f64),
}

impl FromStr for Gate {
    type Err = String;

    fn from_str(text: &str) -> Result<Gate, String> {
        let example = "such as accuracy>=-0.5pt, accuracy>=92%, macro_f1>=0.9, flips<=1%";
        let bad = |what: &str| format!("`{text}`: {what}, {example}");
        let (name, at_least, value) = match (text.split_once(">="), text.split_once("<=")) {
            (Some((name, value)), None) => (name, true, value),
            (None, Some((name, value))) => (name, false, value),
            _ => return Err(bad("expected FIGURE>=LIMIT or FIGURE<=LIMIT")),
        };
        let figure = match name.trim() {
            "accuracy" => Figure::Accuracy,
            "macro_f1" | "macro-f1" => Figure::MacroF1,
            "top_3" | "top-3" => Figure::Top3,
            "flips" => Figure::Flips,
            "agreement" => Figure::Agreement,
            _ => return Err(bad("expected accuracy, macro_f1, top_3, flips or agreement")),
        };
        let value = value.trim();
        let number = |v: &str| v.trim().parse::<f64>().ok().filter(|x| x.is_finite());
        let limit = match (value.strip_suffix("pt"), value.strip_suffix('%')) {
            (Some(v), _) => number(v).map(|x| Limit::ToParent(x / 100.0)),
            (_, Some(v)) => number(v).map(|x| Limit::Absolute(x / 100.0)),
            _ => number(value).map(Limit::Absolute),
        };
        let limit = limit.ok_or_else(|| bad("expected a number"))?;
        if matches!(limit, Limit::ToParent(_)) && figure != Figure::Accuracy {
            return Err(bad("points against the parent (pt) are for accuracy"));
        }
        Ok(Gate { text: text.trim().into(), figure, at_least, limit })
    }
}

impl Gate {
    /// Checks one variant; a figure that needs a parent is not there for the first one.
    fn value(&self, v: &Variant) -> Option<f64> {
        let parent = v.against_parent.as_ref();
        match (self.figure, self.limit) {
            (Figure::Accuracy, Limit::ToParent(_)) => parent.map(|a| a.accuracy_delta),
            (Figure::Accuracy, _) => Some(v.figures.accuracy),
            (Figure::MacroF1, _) => Some(v.figures.macro_f1),
            (Figure::Top3, _) => Some(v.figures.top_3),
            (Figure::Flips, _) => parent.map(|a| a.flip_rate),
            (Figure::Agreement, _) => parent.map(|a| a.agreement),
        }
    }

    fn holds(&self, value: f64) -> bool {
        let (Limit::Absolute(limit) | Limit::ToParent(limit)) = self.limit;
        // A difference of 0.005 that is stored as 0.0050000000001 meets a gate of half a point.
        let epsilon = 1e-9;
        if self.at_least { value >= limit - epsilon } else { value <= limit + epsilon }
    }
}

/// Checks gates on variants; what has no parent passes those that need one.
pub fn check(gates: &[Gate], variants: &[&Variant]) -> Result<()> {
    let mut missed = vec![];
    for gate in gates {
        let values: Vec<_> = variants.iter().filter_map(|v| Some((v, gate.value(v)?))).collect();
        if values.is_empty() {
            return Err(usage(format!("--gate {}: nothing to check it on", gate.text)));
        }
        for (v, value) in values {
            if !gate.holds(value) {
                missed.push(format!("{}: {} is not met, found {:.2}", v.name, gate.text, 100.0 * value));
            }
        }
    }
    match missed.is_empty() {
        true => Ok(()),
        false => Err(gate(format!("quality gate: {} (in points or %)", missed.join("; ")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_read_and_compared() {
        let rows = [
            ("accuracy>=-0.5pt", Some((-0.005, -0.006))),
            ("accuracy>=92%", Some((0.92, 0.9199))),
            ("accuracy >= 0.92", Some((0.92, 0.9199))),
            ("flips<=1%", Some((0.01, 0.011))),
            ("flips<=1pt", None),
            ("accuracy>0.9", None),
            ("speed>=9", None),
            ("accuracy>=high", None),
        ];
        for (text, want) in rows {
            let gate = text.parse::<Gate>();
            match want {
                None => assert!(gate.is_err(), "{text}"),
                Some((met, missed)) => {
                    let gate = gate.expect(text);
                    assert!(gate.holds(met) && !gate.holds(missed), "{text}");
                }
            }
        }
    }
}
