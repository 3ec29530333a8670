//! A comparison as a table for the terminal, as Markdown for a pull request and as one HTML page. JSON is the
//! comparison itself; its layout is in `docs/report.md`.

mod plot;
mod summary;
mod tables;
mod words;

pub use words::Lang;

use super::compare::{Comparison, Variant};
use super::pareto::front;
use crate::commands::Speed;
use crate::exit::usage;
use crate::ui::{mb, percent};
use anyhow::Result;
use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use minijinja::{Environment, UndefinedBehavior};
use plot::{Axis, Mark, Plot, line, mark, place_labels};
use quetsch::metrics::{Agreement, ClassMetrics, Distance};
use serde_json::{Value, json};
use std::collections::BTreeMap;

type Words = BTreeMap<&'static str, &'static str>;

/// The accuracy, in shares, that the recommended variant may lose against the first one, unless a search says.
const MAX_DROP: f64 = 0.005;
/// Changed answers and confusions that the page lists.
const FLIPS_LISTED: usize = 12;
const CONFUSIONS_LISTED: usize = 10;

/// The columns of the terminal's table.
const HEADER: [&str; 12] = [
    "variant",
    "params",
    "disk MB",
    "accuracy",
    "macro-F1",
    "parent",
    "delta",
    "flips",
    "McNemar p",
    "p50 ms",
    "sent/s",
    "RSS MB",
];

/// What other columns say where answers are numbers.
const NUMBERS: [&str; 12] = [
    "variant",
    "params",
    "disk MB",
    "R2",
    "MAE",
    "parent",
    "mean diff",
    "max diff",
    "Pearson",
    "p50 ms",
    "sent/s",
    "RSS MB",
];

fn none() -> String {
    "-".into()
}

/// The cells of a line, as in [`HEADER`].
fn cells(v: &Variant) -> [String; 12] {
    let speed = |f: &dyn Fn(&Speed) -> String| v.speed.as_ref().map_or_else(none, f);
    let against = |f: &dyn Fn(&Agreement) -> String| v.against_parent.as_ref().map_or_else(none, f);
    let is_model = v.dir.is_some();
    let [good, also, far @ ..] = match v.numbers() {
        Some(r) => {
            let far = |f: &dyn Fn(&Distance) -> f64| {
                v.distance_to_parent.as_ref().map_or_else(none, |d| format!("{:.4}", f(d)))
            };
            [
                format!("{:.4}", r.r2),
                format!("{:.4}", r.mae),
                far(&|d| d.mean),
                far(&|d| d.largest),
                far(&|d| d.pearson),
            ]
        }
        None => [
            percent(v.labels().accuracy),
            percent(v.labels().macro_f1),
            against(&|a| format!("{} pt", points(a.accuracy_delta, 2))),
            against(&|a| format!("{} ({})", a.flips, percent(a.flip_rate))),
            against(&|a| format!("{:.3}", a.mcnemar.p)),
        ],
    };
    let [delta, flips, p] = far;
    [
        v.name.clone(),
        if is_model { format!("{:.2} M", v.parameters as f64 / 1e6) } else { none() },
        if is_model { format!("{:.1}", mb(v.disk_bytes)) } else { none() },
        good,
        also,
        v.parent.clone().unwrap_or_else(none),
        delta,
        flips,
        p,
        speed(&|s| format!("{:.2}", s.latency_ms.p50)),
        speed(&|s| format!("{:.0}", s.sentences_per_s)),
        speed(&|s| s.peak_rss_mb.map_or_else(none, |m| format!("{m:.1}"))),
    ]
}

/// A difference of shares in points, with its sign.
fn points(delta: f64, decimals: usize) -> String {
    format!("{:+.decimals$}", 100.0 * delta)
}

impl Comparison {
    fn models(&self) -> impl Iterator<Item = &Variant> {
        self.variants.iter().filter(|v| v.dir.is_some())
    }

    /// Whether answers are numbers, not labels.
    fn is_numbers(&self) -> bool {
        self.variants.iter().any(|v| v.numbers().is_some())
    }

    /// Whether [`Comparison::html`] has something to show.
    pub fn has_page(&self) -> bool {
        !self.is_numbers()
    }

    fn header(&self) -> [&'static str; 12] {
        if self.is_numbers() { NUMBERS } else { HEADER }
    }

    fn baseline(&self) -> Option<&Variant> {
        self.variants.iter().find(|v| v.dir.is_none())
    }

    fn max_drop(&self) -> f64 {
        self.chosen.as_ref().map_or(MAX_DROP, |c| c.max_drop)
    }

    /// What a search chose; else, of the models after the first that lose at most half a point and meet their gates,
    /// the fastest, or the smallest where nothing was timed.
    fn recommended(&self) -> Option<&Variant> {
        if let Some(chosen) = &self.chosen {
            return self.models().find(|v| Some(&v.name) == chosen.variant.as_ref());
        }
        let first = self.models().next()?;
        let good = |v: &&Variant| {
            v.labels().accuracy >= first.labels().accuracy - MAX_DROP - 1e-9
                && self.gates.iter().all(|g| g.met || g.variant != v.name)
        };
        let timed = self.models().all(|v| v.speed.is_some());
        let cost = |v: &Variant| match &v.speed {
            Some(s) if timed => s.latency_ms.p50,
            _ => v.disk_bytes as f64,
        };
        self.models().skip(1).filter(good).min_by(|a, b| cost(a).total_cmp(&cost(b)))
    }

    /// The variant that the page shows in detail: the recommended one, else of those after the first the most accurate,
    /// of equals the smallest.
    fn shown(&self) -> Option<&Variant> {
        let nearest = || {
            let order = |v: &Variant| (-v.labels().accuracy, v.disk_bytes as f64);
            self.models().skip(1).min_by(|a, b| {
                let ((a, x), (b, y)) = (order(a), order(b));
                a.total_cmp(&b).then(x.total_cmp(&y))
            })
        };
        self.recommended().or_else(nearest).or_else(|| self.models().next())
    }

    /// For a terminal: numbers to the right, the best accuracy in bold.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(self.header());
        let best = self.variants.iter().map(|v| v.figures.main().1).fold(f64::NEG_INFINITY, f64::max);
        for v in &self.variants {
            let cells = cells(v).into_iter().enumerate().map(|(i, text)| match i {
                3 if v.figures.main().1 == best && v.figures.main().0 != "micro_f1" => {
                    Cell::new(text).add_attribute(Attribute::Bold)
                }
                _ => Cell::new(text),
            });
            table.add_row(cells);
        }
        for (i, column) in table.column_iter_mut().enumerate() {
            if i != 0 && i != 5 {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.to_string()
    }

    /// What the columns of the table mean.
    pub fn legend(&self) -> String {
        let compared = match self.is_numbers() {
            true => "mean diff, max diff and Pearson compare the numbers with the parent's",
            false => "delta, flips (changed predictions) and McNemar's p are against the parent",
        };
        let timed = match self.models().any(|v| v.speed.is_some()) {
            true => {
                "; p50 is one sentence at a time, tokenising included; each model was timed in a process of its own"
            }
            false => "",
        };
        format!("{} sentences, {} threads. {compared}{timed}.", self.sentences, self.threads)
    }

    /// For a pull request: the summary, the table, the gates.
    pub fn markdown(&self, lang: Lang) -> String {
        let w = lang.words();
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let summary = self.summary(lang);
        let sentences: Vec<String> = summary.sentences.into_iter().chain(summary.cost).collect();
        let mut text = escape_markdown(&sentences.join(lang.pick(" ", ""))) + "\n\n";
        text += &line(&self.header().map(str::to_string));
        text +=
            &line(&std::array::from_fn::<_, 12, _>(|i| if i == 0 || i == 5 { "---" } else { "---:" }.to_string()));
        self.variants.iter().for_each(|v| text += &line(&cells(v).map(|c| escape_markdown(&c))));
        if !self.gates.is_empty() {
            text +=
                &format!("\n| {} | {} | {} | |\n| --- | --- | ---: | --- |\n", w["gate"], w["variant"], w["found"]);
            for g in &self.gates {
                let met = if g.met { w["met"] } else { w["missed"] };
                let (gate, variant) = (escape_markdown(&g.gate), escape_markdown(&g.variant));
                text += &format!("| {gate} | {variant} | {} | {met} |\n", g.found);
            }
        }
        let m = &self.machine;
        let command = self.command.replace("```", "");
        text + &format!(
            "\n{}\n\n{}, {} ({} CPUs, {}), {}\n\n```\n{command}\n```\n",
            self.legend(),
            escape_markdown(self.tool),
            escape_markdown(&m.cpu),
            m.cpus,
            m.instruction_set,
            m.system
        )
    }

    /// One self-contained page. The template escapes everything that comes from users.
    ///
    /// # Errors
    /// Answers that are numbers: the page is about labels.
    pub fn html(&self, title: &str, lang: Lang) -> Result<String> {
        if self.is_numbers() {
            return Err(usage("the HTML report is about labels; for numbers write .md or .json"));
        }
        let w = lang.words();
        let mut env = Environment::new();
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        env.add_template("page.html", include_str!("page.html"))?;
        let largest = self.models().flat_map(|v| v.parts.iter().map(|p| p.bytes).reduce(|a, b| a + b)).max();
        let page = json!({
            "title": title,
            "w": w,
            "lang": lang.code(),
            "c": self,
            "summary": self.summary(lang),
            "rows": self.variants.iter().map(|v| self.row(v)).collect::<Vec<_>>(),
            "shown": self.shown(),
            "tiles": self.models().next().zip(self.shown()).map(|(first, v)| tables::tiles(first, v, &w)),
            "tradeoffs": self.tradeoffs(&w),
            "has_front": self.models().count() > 1,
            "sizes": self.models().map(|v| tables::size_bar(v, largest.unwrap_or(1))).collect::<Vec<_>>(),
            "stores": self.models().filter_map(|v| tables::store(v, &w)).collect::<Vec<_>>(),
            "sensitivity": self.models().filter_map(tables::sensitivity).collect::<Vec<_>>(),
            "classes": self.classes(),
            "losses": self.losses(&w),
            "reliability": self.reliability(&w),
            "keys": self.reliability_keys(),
            "flips": self.flips(),
            "confusions": self.shown().map(|v| v.labels().confusions.iter().take(CONFUSIONS_LISTED).collect::<Vec<_>>()),
            "calibrated": self.calibrated(),
            "made": self.models().filter_map(|v| Some((&v.name, tables::made_from(v)?))).collect::<Vec<_>>(),
        });
        let page = env.get_template("page.html")?.render(minijinja::value::Serde(&page))?;
        Ok(page)
    }

    fn row(&self, v: &Variant) -> Value {
        let against = v.against_parent.as_ref();
        let [low, high] = v.labels().accuracy_interval;
        let is_model = v.dir.is_some();
        json!({
            "name": v.name,
            "below": v.below_baseline == Some(true),
            "recommended": self.recommended().is_some_and(|r| std::ptr::eq(r, v)),
            "cells": [
                if is_model { format!("{:.2} M", v.parameters as f64 / 1e6) } else { none() },
                if is_model { format!("{:.1}", mb(v.disk_bytes)) } else { none() },
                percent(v.labels().accuracy),
                format!("{:.1}-{:.1}", 100.0 * low, 100.0 * high),
                percent(v.labels().macro_f1),
                percent(v.labels().weighted_f1),
                percent(v.labels().top_3),
                v.worst_recall.as_ref().map_or_else(none, |w| percent(w.recall)),
                // The baseline's margins are no probabilities.
                if is_model { format!("{:.4}", v.labels().ece) } else { none() },
                v.parent.clone().unwrap_or_else(none),
                against.map_or_else(none, |a| format!("{} pt", points(a.accuracy_delta, 2))),
                against.map_or_else(none, |a| a.delta_interval.map(|x| points(x, 1)).join(" / ")),
                against.map_or_else(none, |a| format!("{} ({})", a.flips, percent(a.flip_rate))),
                against.map_or_else(none, |a| format!("{:.3}", a.mcnemar.p)),
                v.speed.as_ref().map_or_else(none, |s| format!("{:.2}", s.latency_ms.p50)),
                v.speed.as_ref().map_or_else(none, |s| format!("{:.2}", s.latency_ms.p99)),
                v.speed.as_ref().map_or_else(none, |s| format!("{:.0}", s.sentences_per_s)),
                v.speed.as_ref().and_then(|s| s.peak_rss_mb).map_or_else(none, |m| format!("{m:.0}")),
            ],
        })
    }

    /// Accuracy against latency, where it was measured, and against size.
    fn tradeoffs(&self, w: &Words) -> Vec<Plot> {
        type Cost = fn(&Variant) -> Option<f64>;
        let plots: [(&str, &str, Cost); 2] = [
            (w["pareto_latency"], w["x_latency"], |v| v.speed.as_ref().map(|s| s.latency_ms.p50)),
            (w["pareto_size"], w["x_size"], |v| v.dir.as_ref().map(|_| mb(v.disk_bytes))),
        ];
        let baseline = self.baseline().map(|b| 100.0 * b.labels().accuracy);
        let intervals = self.models().flat_map(|v| v.labels().accuracy_interval).map(|a| 100.0 * a);
        let y = Axis::around(intervals.chain(baseline), false, Axis::y);
        let plot = |(title, x_label, cost): (&str, &str, Cost)| {
            let models: Vec<(&Variant, f64)> = self.models().filter_map(|v| Some((v, cost(v)?))).collect();
            if models.is_empty() {
                return None;
            }
            let x = Axis::around(models.iter().map(|m| m.1), true, Axis::x);
            let at: Vec<(f64, f64)> = models.iter().map(|(v, c)| (*c, 100.0 * v.labels().accuracy)).collect();
            let on_front = front(&at.iter().map(|p| ([p.0], p.1)).collect::<Vec<_>>());
            let mut marks: Vec<Mark> = (models.iter().zip(&at).zip(&on_front))
                .map(|(((v, _), (c, accuracy)), on_front)| {
                    let class = match (v.below_baseline == Some(true), on_front) {
                        (true, _) => "below",
                        (_, true) => "front",
                        _ => "dominated",
                    };
                    let interval = v.labels().accuracy_interval.map(|a| y.at(100.0 * a));
                    let tip = format!("{}: {accuracy:.2}%, {c:.2}", v.name);
                    Mark {
                        interval: Some(interval),
                        label: v.name.clone(),
                        ..mark(class, x.at(*c), y.at(*accuracy), 5.0, tip)
                    }
                })
                .collect();
            place_labels(&mut marks);
            let mut best: Vec<(f64, f64)> = at.iter().zip(&on_front).filter(|p| *p.1).map(|p| *p.0).collect();
            best.sort_by(|a, b| a.0.total_cmp(&b.0));
            let mut lines = vec![line("frontier", &x, &y, best)];
            if let Some(b) = baseline {
                let (left, right) = x.ends();
                lines.push(line("baseline", &x, &y, [(left, b), (right, b)]));
            }
            Some(Plot {
                title: title.into(),
                x_label: x_label.into(),
                y_label: w["y_accuracy"].into(),
                x_ticks: x.ticks(""),
                y_ticks: y.ticks("%"),
                lines,
                marks,
            })
        };
        plots.into_iter().filter_map(plot).collect()
    }

    fn losses(&self, w: &Words) -> Vec<Plot> {
        let plot = |v: &Variant| {
            let last = v.loss_curve.last()?[0];
            let highest = v.loss_curve.iter().map(|p| p[1]).fold(0.0, f64::max);
            let (x, y) = (Axis::x(0.0, last, false), Axis::y(0.0, 1.05 * highest, false));
            Some(Plot {
                title: v.name.clone(),
                x_label: w["step"].into(),
                y_label: w["loss"].into(),
                x_ticks: x.ticks(""),
                y_ticks: y.ticks(""),
                lines: vec![line("s1", &x, &y, v.loss_curve.iter().map(|p| (p[0], p[1])))],
                marks: vec![],
            })
        };
        self.models().filter_map(plot).collect()
    }

    /// The first and the shown variant.
    fn pair(&self) -> Vec<&Variant> {
        let first = self.models().next();
        let shown = self.shown().filter(|v| first.is_none_or(|f| f.name != v.name));
        first.into_iter().chain(shown).collect()
    }

    fn reliability(&self, w: &Words) -> Plot {
        let (x, y) = (Axis::x(0.0, 1.0, false), Axis::y(0.0, 1.0, false));
        let (mut lines, mut marks) = (vec![line("ideal", &x, &y, [(0.0, 0.0), (1.0, 1.0)])], vec![]);
        for (v, class) in self.pair().into_iter().zip(["s0", "s1"]) {
            let bins = &v.labels().reliability;
            lines.push(line(class, &x, &y, bins.iter().map(|b| (b.confidence, b.accuracy))));
            marks.extend(bins.iter().map(|b| {
                let r = 2.0 + 6.0 * (b.n as f64 / self.sentences.max(1) as f64).sqrt();
                let tip = format!("{}: {:.2} -> {:.2} ({})", v.name, b.confidence, b.accuracy, b.n);
                mark(class, x.at(b.confidence), y.at(b.accuracy), (10.0 * r).round() / 10.0, tip)
            }));
        }
        Plot {
            title: w["reliability"].into(),
            x_label: w["confidence"].into(),
            y_label: w["right"].into(),
            x_ticks: x.ticks(""),
            y_ticks: y.ticks(""),
            lines,
            marks,
        }
    }

    fn reliability_keys(&self) -> Vec<(&str, String)> {
        let keys = self.pair().into_iter().zip(["s0", "s1"]);
        keys.map(|(v, class)| (class, format!("{} (ECE {:.3})", v.name, v.labels().ece))).collect()
    }

    /// The shown model label by label, those found least often first, beside the first model.
    fn classes(&self) -> Vec<Value> {
        let (Some(first), Some(shown)) = (self.models().next(), self.shown()) else { return vec![] };
        let mut rows: Vec<_> = shown.labels().per_class.iter().zip(&first.labels().per_class).collect();
        rows.sort_by(|a, b| a.0.recall.total_cmp(&b.0.recall).then(a.0.f1.total_cmp(&b.0.f1)));
        let row = |(own, old): (&ClassMetrics, &ClassMetrics)| {
            let shares = [own.precision, own.recall, own.f1, old.f1].map(percent);
            json!({ "label": own.label, "support": own.support, "shares": shares })
        };
        // A label without a test sentence has no recall.
        rows.into_iter().filter(|(own, _)| own.support > 0).map(row).collect()
    }

    fn calibrated(&self) -> Vec<Value> {
        let row = |v: &Variant| {
            let c = v.calibrated.as_ref()?;
            let [t, before, after] = [c.temperature, v.labels().ece, c.ece].map(|x| format!("{x:.3}"));
            Some(json!({ "name": v.name, "t": t, "before": before, "after": after }))
        };
        self.models().filter_map(row).collect()
    }

    fn flips(&self) -> Vec<Value> {
        let of = |v: &Variant| {
            let against = v.against_parent.as_ref()?;
            Some(json!({
                "name": v.name,
                "parent": v.parent,
                "count": against.flips,
                "parent_only": against.mcnemar.parent_only,
                "child_only": against.mcnemar.child_only,
                "open": self.shown().is_some_and(|s| std::ptr::eq(s, v)),
                "rows": v.flipped.iter().take(FLIPS_LISTED).collect::<Vec<_>>(),
            }))
        };
        self.models().filter_map(of).collect()
    }
}

/// Text that means itself in a Markdown table.
fn escape_markdown(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('|', "\\|")
        .replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests;
