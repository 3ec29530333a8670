//! A comparison as a table for the terminal, as Markdown for a pull request and as one HTML page. JSON is the
//! comparison itself; its layout is in `docs/report.md`.

mod charts;
mod choice;
mod plot;
mod summary;
mod tables;
mod words;

pub use words::Lang;

use super::compare::{Comparison, Flip, Variant};
use super::gate::Checked;
use crate::commands::Speed;
use crate::exit::usage;
use crate::ui::{mb, percent};
use anyhow::Result;
use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use minijinja::{Environment, UndefinedBehavior};
use quetsch::metrics::{self, Agreement, ClassMetrics, Distance};
use serde_json::{Value, json};
use std::collections::BTreeMap;

type Words = BTreeMap<&'static str, &'static str>;

/// The columns of the page's table after the name, by their words: what decides comes first.
const COLUMNS: [&str; 16] = [
    "accuracy",
    "delta",
    "flips",
    "p50",
    "disk",
    "memory",
    "params",
    "macro_f1",
    "weighted_f1",
    "top_3",
    "worst",
    "ece",
    "parent",
    "p99",
    "throughput",
    "p",
];

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

/// The same columns as [`Words`].
const HEADER_KEYS: [&str; 12] = [
    "variant",
    "params",
    "disk",
    "accuracy",
    "macro_f1",
    "parent",
    "delta",
    "flips",
    "p",
    "p50",
    "throughput",
    "memory",
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
            against(&|a| p_value(a.mcnemar.p)),
        ],
    };
    let [delta, flips, p] = far;
    [
        v.name.clone(),
        if is_model { format!("{:.2} M", v.parameters as f64 / 1e6) } else { none() },
        if is_model { figure(mb(v.disk_bytes), 1) } else { none() },
        good,
        also,
        v.parent.clone().unwrap_or_else(none),
        delta,
        flips,
        p,
        speed(&|s| figure(s.latency_ms.p50, 2)),
        speed(&|s| format!("{:.0}", s.sentences_per_s)),
        speed(&|s| s.peak_rss_mb.map_or_else(none, |m| format!("{m:.1}"))),
    ]
}

/// A size or a time with three digits that count and at least so many decimals.
fn figure(x: f64, decimals: usize) -> String {
    let digits = 2 - x.abs().log10().floor().clamp(-4.0, 2.0) as i32;
    let decimals = if x == 0.0 { decimals } else { decimals.max(digits as usize) };
    format!("{x:.decimals$}")
}

/// Of a test; it is never 0.
fn p_value(p: f64) -> String {
    if p < 0.001 { "<0.001".into() } else { format!("{p:.3}") }
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

    /// Of the table; in another language where the columns have a word on the page.
    fn header(&self, lang: Lang) -> [&'static str; 12] {
        let words = lang.words();
        match (self.is_numbers(), lang) {
            (true, _) => NUMBERS,
            (false, Lang::En) => HEADER,
            (false, Lang::Zh) => HEADER_KEYS.map(|key| words[key]),
        }
    }

    /// The gates, those that want attention before the others.
    fn missed_first(&self) -> Vec<&Checked> {
        let mut gates: Vec<_> = self.gates.iter().collect();
        gates.sort_by_key(|g| g.met);
        gates
    }

    fn baseline(&self) -> Option<&Variant> {
        self.variants.iter().find(|v| v.dir.is_none())
    }

    /// For a terminal: numbers to the right, the best accuracy in bold.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(self.header(Lang::En));
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
    pub fn legend(&self, lang: Lang) -> String {
        let compared = match self.is_numbers() {
            true => lang.pick(
                "mean diff, max diff and Pearson compare the numbers with the parent's",
                "mean diff、max diff 与 Pearson 将数值与对照模型的相比较",
            ),
            false => lang.pick(
                "delta, flips (changed predictions) and McNemar's p are against the parent",
                "差值、答案改变数与 McNemar p 值均相对于对照模型",
            ),
        };
        let timed = match self.models().any(|v| v.speed.is_some()) {
            true => lang.pick(
                "; p50 is one sentence at a time, tokenising included; each model was timed in a process of its own",
                "；p50 为逐句推理的延迟（含分词）；每个模型在独立进程中测量",
            ),
            false => "",
        };
        match lang {
            Lang::En => format!("{} sentences, {} threads. {compared}{timed}.", self.sentences, self.threads),
            Lang::Zh => format!("{} 个句子，{} 个线程。{compared}{timed}。", self.sentences, self.threads),
        }
    }

    /// For a pull request: the summary, the table, the gates.
    pub fn markdown(&self, lang: Lang) -> String {
        let w = lang.words();
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let summary = self.summary(lang);
        let sentences: Vec<String> = summary.sentences.into_iter().chain(summary.cost).collect();
        let mut text = escape_markdown(&sentences.join(lang.pick(" ", ""))) + "\n\n";
        text += &line(&self.header(lang).map(str::to_string));
        text +=
            &line(&std::array::from_fn::<_, 12, _>(|i| if i == 0 || i == 5 { "---" } else { "---:" }.to_string()));
        self.variants.iter().for_each(|v| text += &line(&cells(v).map(|c| escape_markdown(&c))));
        if !self.gates.is_empty() {
            text +=
                &format!("\n| {} | {} | {} | |\n| --- | --- | ---: | --- |\n", w["gate"], w["variant"], w["found"]);
            for g in self.missed_first() {
                let met = if g.met { w["met"] } else { w["missed"] };
                let (gate, variant) = (escape_markdown(&g.gate), escape_markdown(&g.variant));
                text += &format!("| {gate} | {variant} | {} | {met} |\n", g.found);
            }
        }
        let m = &self.machine;
        let command = self.command.replace("```", "");
        text + &format!(
            "\n{}\n\n{}, {} ({} CPUs, {}), {}\n\n```\n{command}\n```\n",
            self.legend(lang),
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
        let summary = self.summary(lang);
        let praised = self.recommended().or(self.models().next().filter(|_| self.models().count() == 1));
        let mut env = Environment::new();
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        env.add_template("page.html", include_str!("page.html"))?;
        let largest = self.models().flat_map(|v| v.parts.iter().map(|p| p.bytes).reduce(|a, b| a + b)).max();
        let page = json!({
            "title": title,
            "w": w,
            "lang": lang.code(),
            "c": self,
            "summary": summary,
            "gates": self.missed_first(),
            "columns": COLUMNS,
            "rows": self.variants.iter().enumerate().map(|(i, v)| self.row(i + 1, v)).collect::<Vec<_>>(),
            "shown": self.shown(),
            "tiles": self.models().next().zip(praised).map(|(first, v)| tables::tiles(first, v, lang)),
            "tradeoffs": self.tradeoffs(&w)?,
            "has_front": self.models().count() > 1,
            "sizes": self.models().map(|v| tables::size_bar(v, largest.unwrap_or(1))).collect::<Vec<_>>(),
            "stores": self.models().filter_map(|v| tables::store(v, &w)).collect::<Vec<_>>(),
            "sensitivity": self.models().filter_map(|v| tables::sensitivity(v, &w)).collect::<Vec<_>>(),
            "classes": self.classes(),
            "losses": self.losses(&w)?,
            "reliability": self.reliability(&w)?,
            "keys": self.reliability_keys(),
            "flips": self.flips(&w),
            "confusions": self.shown().map(|v| v.labels().confusions.iter().take(CONFUSIONS_LISTED).collect::<Vec<_>>()),
            "calibrated": self.calibrated(),
            "made": self.models().filter_map(|v| Some((&v.name, tables::made_from(v)?))).collect::<Vec<_>>(),
        });
        let page = env.get_template("page.html")?.render(minijinja::value::Serde(&page))?;
        Ok(page)
    }

    /// The cells of a line of the page's table, as in [`COLUMNS`], each with what belongs below it.
    fn row(&self, number: usize, v: &Variant) -> Value {
        let is_model = v.dir.is_some();
        let model = |text: String| (if is_model { text } else { none() }, String::new());
        let plain = |text: Option<String>| (text.unwrap_or_else(none), String::new());
        let speed = |f: &dyn Fn(&Speed) -> Option<String>| plain(v.speed.as_ref().and_then(f));
        let against = v.against_parent.as_ref();
        let [low, high] = v.labels().accuracy_interval.map(|x| format!("{:.2}", 100.0 * x));
        let share = |x: f64| (percent(x), String::new());
        let cells = [
            (percent(v.labels().accuracy), format!("{low} – {high}")),
            against.map_or_else(
                || plain(None),
                |a| {
                    let [low, high] = a.delta_interval.map(|x| points(x, 2));
                    (points(a.accuracy_delta, 2), format!("{low} – {high}"))
                },
            ),
            against.map_or_else(|| plain(None), |a| (a.flips.to_string(), percent(a.flip_rate))),
            speed(&|s| Some(figure(s.latency_ms.p50, 2))),
            model(figure(mb(v.disk_bytes), 1)),
            speed(&|s| s.peak_rss_mb.map(|m| figure(m, 0))),
            model(format!("{:.2} M", v.parameters as f64 / 1e6)),
            share(v.labels().macro_f1),
            share(v.labels().weighted_f1),
            share(v.labels().top_3),
            v.worst_recall
                .as_ref()
                .map_or_else(|| plain(None), |w| (percent(w.recall), format!("{} (n = {})", w.label, w.support))),
            // The baseline's margins are no probabilities.
            model(format!("{:.4}", v.labels().ece)),
            plain(v.parent.clone()),
            speed(&|s| Some(figure(s.latency_ms.p99, 2))),
            speed(&|s| Some(format!("{:.0}", s.sentences_per_s))),
            plain(against.map(|a| p_value(a.mcnemar.p))),
        ];
        json!({
            "number": is_model.then_some(number),
            "name": v.name,
            "below": v.below_baseline == Some(true),
            "recommended": self.recommended().is_some_and(|r| std::ptr::eq(r, v)),
            "cells": cells,
        })
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
            let at_bound = metrics::is_at_bound(c.temperature);
            Some(json!({ "name": v.name, "t": t, "at_bound": at_bound, "before": before, "after": after }))
        };
        self.models().filter_map(row).collect()
    }

    /// Changed answers: of the shown model those against the first one, which the summary speaks about, then of all
    /// against their parents.
    fn flips(&self, w: &Words) -> Vec<Value> {
        let list = |v: &Variant, from: &str, against: &Agreement, rows: &[Flip], open: bool| {
            let (lost, won) = (against.mcnemar.parent_only, against.mcnemar.child_only);
            let other = against.flips.saturating_sub(lost + won);
            json!({
                "name": v.name,
                "from": from,
                "open": open,
                "count": w["flipped_count"].replace('N', &against.flips.to_string()),
                "lost": w["flipped_lost"].replace('N', &lost.to_string()),
                "won": w["flipped_won"].replace('N', &won.to_string()),
                "other": w["flipped_other"].replace('N', &other.to_string()),
                "shown": w["flipped_shown"].replace('N', &rows.len().min(FLIPS_LISTED).to_string()),
                "rows": &rows[..rows.len().min(FLIPS_LISTED)],
            })
        };
        let is_shown = |v: &Variant| self.shown().is_some_and(|s| std::ptr::eq(s, v));
        let first = self.shown().zip(self.models().next());
        let from_first = first.and_then(|(v, first)| {
            Some(list(v, &first.name, v.against_first.as_ref()?, &v.flipped_from_first, true))
        });
        let of_parents = self.models().filter_map(|v| {
            let open = is_shown(v) && v.against_first.is_none();
            Some(list(v, v.parent.as_deref()?, v.against_parent.as_ref()?, &v.flipped, open))
        });
        from_first.into_iter().chain(of_parents).collect()
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
