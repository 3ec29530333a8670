//! Quality gates: `accuracy>=-0.5pt` (against the parent), `accuracy>=92%`, `latency<=0.5x`, `disk<=30MB`. A gate that
//! is not met ends the program with exit code 3.

use super::compare::Variant;
use crate::exit::{gate, usage};
use crate::ui::{mb, percent};
use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use quetsch::task::{Problem, Task};
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;
use std::str::FromStr;

/// One condition on one figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    text: String,
    figure: Figure,
    at_least: bool,
    limit: Limit,
}

/// What can be asked about a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Figure {
    Accuracy,
    MicroF1,
    MacroF1,
    WeightedF1,
    Top3,
    R2,
    Pearson,
    WorstRecall,
    Flips,
    Agreement,
    Latency,
    LatencyP99,
    Throughput,
    Disk,
    Memory,
}

/// How the figures are measured; decides which limits make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// 0 to 1; differences to the parent in points.
    Share,
    /// 0 to 1, already a comparison with the parent.
    ShareOfParent,
    Milliseconds,
    PerSecond,
    Megabytes,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    /// In the figure's own unit.
    Absolute(f64),
    /// Difference to the parent, in shares: `-0.5pt` is -0.005.
    ToParent(f64),
    /// Times the parent's: `0.5x`.
    Ratio(f64),
}

impl Figure {
    /// Every figure with its names, the first one is printed.
    const ALL: [(Figure, &[&str]); 15] = [
        (Figure::Accuracy, &["accuracy"]),
        (Figure::MicroF1, &["micro_f1"]),
        (Figure::R2, &["r2"]),
        (Figure::Pearson, &["pearson"]),
        (Figure::MacroF1, &["macro_f1"]),
        (Figure::WeightedF1, &["weighted_f1"]),
        (Figure::Top3, &["top_3"]),
        (Figure::WorstRecall, &["worst_recall"]),
        (Figure::Flips, &["flips", "flip_rate"]),
        (Figure::Agreement, &["agreement"]),
        (Figure::Latency, &["latency", "latency_p50"]),
        (Figure::LatencyP99, &["latency_p99"]),
        (Figure::Throughput, &["throughput"]),
        (Figure::Disk, &["disk", "size"]),
        (Figure::Memory, &["memory"]),
    ];

    fn unit(self) -> Unit {
        match self {
            Figure::Accuracy | Figure::MicroF1 | Figure::MacroF1 | Figure::WeightedF1 => Unit::Share,
            Figure::Top3 | Figure::WorstRecall | Figure::R2 | Figure::Pearson => Unit::Share,
            Figure::Flips | Figure::Agreement => Unit::ShareOfParent,
            Figure::Latency | Figure::LatencyP99 => Unit::Milliseconds,
            Figure::Throughput => Unit::PerSecond,
            Figure::Disk | Figure::Memory => Unit::Megabytes,
        }
    }

    /// Whether it takes a process that measures speed and memory.
    fn is_timed(self) -> bool {
        matches!(self, Figure::Latency | Figure::LatencyP99 | Figure::Throughput | Figure::Memory)
    }

    /// Whether it is one of a task's.
    fn is_of(self, problem: Problem) -> bool {
        match self {
            Figure::Accuracy | Figure::MacroF1 | Figure::WeightedF1 | Figure::Top3 => {
                problem != Problem::Regression
            }
            Figure::WorstRecall | Figure::Flips | Figure::Agreement => problem != Problem::Regression,
            Figure::MicroF1 => problem == Problem::MultiLabel,
            Figure::R2 | Figure::Pearson => problem == Problem::Regression,
            Figure::Latency | Figure::LatencyP99 | Figure::Throughput | Figure::Disk | Figure::Memory => true,
        }
    }

    /// Of a variant, in the figure's unit. What compares with the parent is not there for the first variant.
    fn of(self, v: &Variant) -> Option<f64> {
        let (speed, parent) = (v.speed.as_ref(), v.against_parent.as_ref());
        match self {
            Figure::Accuracy => Some(v.labels().accuracy),
            Figure::MicroF1 => v.labels().micro_f1,
            Figure::MacroF1 => Some(v.labels().macro_f1),
            Figure::WeightedF1 => Some(v.labels().weighted_f1),
            Figure::Top3 => Some(v.labels().top_3),
            Figure::R2 => v.numbers().map(|r| r.r2),
            Figure::Pearson => v.numbers().map(|r| r.pearson),
            Figure::WorstRecall => v.worst_recall.as_ref().map(|w| w.recall),
            Figure::Flips => parent.map(|a| a.flip_rate),
            Figure::Agreement => parent.map(|a| a.agreement),
            Figure::Latency => speed.map(|s| s.latency_ms.p50),
            Figure::LatencyP99 => speed.map(|s| s.latency_ms.p99),
            Figure::Throughput => speed.map(|s| s.sentences_per_s),
            Figure::Disk => Some(mb(v.disk_bytes)),
            Figure::Memory => speed.and_then(|s| s.peak_rss_mb),
        }
    }
}

impl FromStr for Gate {
    type Err = String;

    fn from_str(text: &str) -> Result<Gate, String> {
        let bad = |what: String| {
            format!("{what}; such as accuracy>=-0.5pt, accuracy>=92%, flips<=1%, latency<=0.5x, disk<=30MB")
        };
        let (name, at_least, value) = match (text.split_once(">="), text.split_once("<=")) {
            (Some((name, value)), None) => (name.trim(), true, value.trim()),
            (None, Some((name, value))) => (name.trim(), false, value.trim()),
            _ => return Err(bad("expected FIGURE>=LIMIT or FIGURE<=LIMIT".into())),
        };
        let wanted = name.replace('-', "_").to_lowercase();
        let known = Figure::ALL.iter().find(|(_, names)| names.contains(&wanted.as_str()));
        let Some((figure, _)) = known else {
            let names = Figure::ALL.map(|(_, names)| names[0]).join(", ");
            return Err(bad(format!("unknown figure `{name}`, expected one of {names}")));
        };
        let split = value.find(|c: char| c.is_alphabetic() || c == '%' || c == '/').unwrap_or(value.len());
        let (number, unit) = value.split_at(split);
        let x = number.trim().parse::<f64>().ok().filter(|x| x.is_finite());
        let x = x.ok_or_else(|| bad(format!("`{value}` is not a number with a unit")))?;
        // A limit that no share can miss, or none can meet, is a slip.
        let share = |share: f64| match ((0.0..=1.0).contains(&share), figure.unit()) {
            (true, _) => Ok(Limit::Absolute(share)),
            (false, Unit::Share) if share < 0.0 => {
                Err(bad(format!("`{value}` is no share; a difference to the parent in points is written {x}pt")))
            }
            _ if unit.is_empty() => Err(bad(format!("`{value}` is no share, 0 to 1; per cent are written {x}%"))),
            _ => Err(bad(format!("`{value}` is no share, 0% to 100%"))),
        };
        let limit = match (figure.unit(), unit.trim()) {
            (Unit::Share | Unit::ShareOfParent, "") => share(x)?,
            (Unit::Share | Unit::ShareOfParent, "%") => share(x / 100.0)?,
            (Unit::Share, "pt") => Limit::ToParent(x / 100.0),
            (Unit::Milliseconds | Unit::PerSecond | Unit::Megabytes, "x") => Limit::Ratio(x),
            (Unit::Milliseconds, "ms") | (Unit::Megabytes, "MB") => Limit::Absolute(x),
            (Unit::PerSecond, "" | "/s") => Limit::Absolute(x),
            (kind, _) => {
                let forms = match kind {
                    Unit::Share => "a share (0.92, 92%) or points against the parent (-0.5pt)",
                    Unit::ShareOfParent => "a share (0.01, 1%)",
                    Unit::Milliseconds => "milliseconds (2ms) or times the parent's (0.5x)",
                    Unit::PerSecond => "sentences a second (1000/s) or times the parent's (2x)",
                    Unit::Megabytes => "megabytes (30MB) or times the parent's (0.25x)",
                };
                return Err(bad(format!("`{value}` is no limit for {name}, expected {forms}")));
            }
        };
        Ok(Gate { text: text.trim().into(), figure: *figure, at_least, limit })
    }
}

/// One gate looked at on one variant.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Checked {
    /// The gate as written.
    pub gate: String,
    /// The variant.
    pub variant: String,
    /// What the figure is; for a limit against the parent, the difference or the ratio.
    pub found: String,
    /// Whether the gate is met.
    pub met: bool,
}

impl Gate {
    /// What the limit is compared with: the figure, its difference to the parent's or its ratio to it.
    fn value(&self, v: &Variant, parent: Option<&Variant>) -> Option<f64> {
        let own = self.figure.of(v)?;
        let parent = || parent.and_then(|p| self.figure.of(p));
        match self.limit {
            Limit::Absolute(_) => Some(own),
            Limit::ToParent(_) => Some(own - parent()?),
            Limit::Ratio(_) => Some(own / parent()?),
        }
    }

    /// NaN meets nothing.
    fn holds(&self, value: f64) -> bool {
        let (Limit::Absolute(limit) | Limit::ToParent(limit) | Limit::Ratio(limit)) = self.limit;
        // A difference of 0.005 that is stored as 0.0050000000001 meets a gate of half a point.
        let epsilon = 1e-9;
        if self.at_least { value >= limit - epsilon } else { value <= limit + epsilon }
    }

    /// A value as people read it.
    fn show(&self, value: f64) -> String {
        match (self.limit, self.figure.unit()) {
            (Limit::ToParent(_), _) => format!("{:+.2} pt", 100.0 * value),
            (Limit::Ratio(_), _) => format!("{value:.3}x"),
            (_, Unit::Share | Unit::ShareOfParent) => percent(value),
            (_, Unit::Milliseconds) => format!("{value:.2} ms"),
            (_, Unit::PerSecond) => format!("{value:.0}/s"),
            (_, Unit::Megabytes) => format!("{value:.1} MB"),
        }
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether a gate needs speed or memory.
pub fn timed(gates: &[Gate]) -> bool {
    gates.iter().any(|g| g.figure.is_timed())
}

/// Refuses gates on figures that will not be measured, before anything is.
pub fn possible(gates: &[Gate], no_speed: bool) -> Result<()> {
    match gates.iter().find(|g| no_speed && g.figure.is_timed()) {
        Some(g) => Err(usage(format!("--gate {g}: needs what --no-speed leaves out"))),
        None => Ok(()),
    }
}

/// Refuses gates on figures that a task does not have.
pub fn sensible(gates: &[Gate], task: Task) -> Result<()> {
    let Some(g) = gates.iter().find(|g| !g.figure.is_of(task.problem)) else { return Ok(()) };
    let has = Figure::ALL.iter().filter(|(f, _)| f.is_of(task.problem)).map(|(_, names)| names[0]);
    let has = has.collect::<Vec<_>>().join(", ");
    Err(usage(format!("--gate {g}: the task is {task}, whose figures are {has}")))
}

/// Looks at every gate on every model but the first `skip` ones. The first model has no parent, and passes over gates
/// that need one.
pub fn check(gates: &[Gate], variants: &[Variant], skip: usize) -> Result<Vec<Checked>> {
    let mut checked = vec![];
    for gate in gates {
        let before = checked.len();
        for v in variants.iter().filter(|v| v.dir.is_some()).skip(skip) {
            let parent = v.parent.as_ref().and_then(|name| variants.iter().find(|p| p.name == *name));
            if let Some(value) = gate.value(v, parent) {
                let (found, met) = (gate.show(value), gate.holds(value));
                checked.push(Checked { gate: gate.text.clone(), variant: v.name.clone(), found, met });
            }
        }
        if checked.len() == before {
            return Err(usage(format!(
                "--gate {gate}: no model to check it on; figures against a parent need two"
            )));
        }
    }
    Ok(checked)
}

/// An error with the table of what is not met, if anything is not.
pub fn verdict(checked: &[Checked]) -> Result<()> {
    let missed: Vec<_> = checked.iter().filter(|c| !c.met).collect();
    if missed.is_empty() {
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["model", "gate", "found"]);
    for c in &missed {
        table.add_row([&c.variant, &c.gate, &c.found]);
    }
    if let Some(column) = table.column_mut(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let (n, of) = (missed.len(), checked.len());
    Err(gate(format!("quality gate: {n} of {of} conditions are not met\n{table}")))
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
            ("macro-f1>=-1pt", Some((-0.01, -0.011))),
            ("top_3>=98%", Some((0.98, 0.97))),
            ("worst_recall >= 60 %", Some((0.6, 0.59))),
            ("flips<=1%", Some((0.01, 0.011))),
            ("flip_rate<=0.01", Some((0.01, 0.011))),
            ("latency<=0.5x", Some((0.5, 0.51))),
            ("latency<=2ms", Some((2.0, 2.1))),
            ("latency_p99<=5ms", Some((5.0, f64::NAN))),
            ("throughput>=2x", Some((2.0, 1.9))),
            ("throughput>=1000/s", Some((1000.0, 999.0))),
            ("disk<=30MB", Some((30.0, 30.1))),
            ("size<=0.25x", Some((0.25, 0.26))),
            ("memory<=200MB", Some((200.0, 201.0))),
            ("accuracy>=-0.5", None),
            ("accuracy>=-0.5%", None),
            ("accuracy>=92", None),
            ("flips<=5", None),
            ("flips<=500%", None),
            ("agreement>=-1%", None),
            ("flips<=1pt", None),
            ("disk<=30", None),
            ("disk<=30%", None),
            ("latency<=-0.5pt", None),
            ("accuracy>=0.9x", None),
            ("accuracy>0.9", None),
            ("accuracy>=0.9<=1", None),
            ("speed>=9", None),
            ("accuracy>=high", None),
            ("accuracy>=inf", None),
            ("", None),
        ];
        for (text, want) in rows {
            let gate = text.parse::<Gate>();
            match want {
                None => assert!(gate.is_err(), "{text}"),
                Some((met, missed)) => {
                    let gate = gate.unwrap_or_else(|e| panic!("{text}: {e}"));
                    assert!(gate.holds(met) && !gate.holds(missed), "{text}");
                }
            }
        }
    }

    #[test]
    fn a_slip_in_the_unit_names_the_right_one() {
        for (text, hint) in [("accuracy>=-0.5", " -0.5pt"), ("accuracy>=-0.5%", " -0.5pt"), ("flips<=5", " 5%")] {
            let message = text.parse::<Gate>().expect_err("no share");
            assert!(message.contains(hint), "{text}: {message}");
        }
    }

    #[test]
    fn an_unknown_figure_names_those_that_exist() {
        let message = "acuracy>=92%".parse::<Gate>().expect_err("a misspelling");
        for (_, names) in Figure::ALL {
            assert!(message.contains(names[0]), "{message}");
        }
        assert!("disk<=30".parse::<Gate>().expect_err("no unit").contains("30MB"));
    }
}
