//! Variants of a model side by side: size, accuracy, what changed against the parent, speed and memory. Every variant
//! is timed in a fresh process, so that no allocator or cache is shared.

use super::provenance::Provenance;
use super::{corpus, round};
use crate::commands::Speed;
use crate::settings::Data;
use crate::ui::{Ui, mb, percent};
use anyhow::{Context, Result, anyhow, bail};
use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use quetsch::baseline::TfIdf;
use quetsch::dir;
use quetsch::metrics::{self, Agreement, Metrics};
use quetsch::runtime::Classifier;
use serde::Serialize;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// One line of the comparison.
#[derive(Serialize)]
pub struct Variant {
    /// Stage id or folder.
    pub name: String,
    /// Its folder; none for a baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// What it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Number of parameters.
    pub parameters: usize,
    /// Bytes of the weights' files.
    pub disk_bytes: u64,
    /// On the data.
    #[serde(flatten)]
    pub figures: Metrics,
    /// Against the parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub against_parent: Option<Agreement>,
    /// In a process of its own.
    #[serde(flatten)]
    pub speed: Option<Speed>,
}

/// All lines.
#[derive(Serialize)]
pub struct Comparison {
    /// Layout of this JSON.
    pub version: u32,
    /// Sentences measured on.
    pub sentences: usize,
    /// Threads used for timing.
    pub threads: usize,
    /// The variants in the order asked for, the baseline last.
    pub variants: Vec<Variant>,
}

/// What to compare, on what.
pub struct Plan<'a> {
    /// (name, folder).
    pub models: Vec<(String, PathBuf)>,
    /// Test data, and training data for the baseline.
    pub data: &'a Data,
    /// Without the TF-IDF baseline.
    pub no_baseline: bool,
    /// Without timing.
    pub no_speed: bool,
    /// Threads.
    pub threads: usize,
}

/// Measures everything.
pub fn compare(plan: &Plan, ui: &Ui) -> Result<Comparison> {
    let mut variants: Vec<Variant> = vec![];
    let (mut hashes, mut all_logits): (Vec<String>, Vec<Vec<f32>>) = (vec![], vec![]);
    let mut truth: Option<quetsch::data::Dataset> = None;
    let test = plan.data.test.as_ref().context("no test data: give --data FILE")?;
    let steps = plan.models.len() as u64;
    let mut bar = ui.bar(steps, "compare");
    for (i, (name, path)) in plan.models.iter().enumerate() {
        bar.at(i as u64, || name.clone());
        let model = dir::read(path)?;
        let classifier = Classifier::new(&model, None).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        if truth.is_none() {
            truth = Some(corpus::read(test.as_ref(), plan.data, classifier.labels())?);
        }
        let Some(set) = &truth else { unreachable!("set above") };
        if classifier.labels() != set.names {
            bail!("{}: its labels are not those of {}", path.display(), plan.models[0].1.display());
        }
        let logits = classifier.logits(&set.texts, plan.threads)?;
        let hash = corpus::hash_model(path)?;
        let parent = parent_of(path, &hashes, i);
        variants.push(Variant {
            name: name.clone(),
            dir: Some(path.clone()),
            parent: parent.map(|p| variants[p].name.clone()),
            parameters: model.checkpoint.parameters(),
            disk_bytes: corpus::disk_bytes(path),
            figures: metrics::evaluate(&logits, &set.labels, &set.names),
            against_parent: parent
                .map(|p| metrics::agreement(&all_logits[p], &logits, &set.labels, set.names.len())),
            speed: None,
        });
        hashes.push(hash);
        all_logits.push(logits);
    }
    if !plan.no_speed {
        for variant in &mut variants {
            bar.at(steps, || format!("timing {}", variant.name));
            if let Some(path) = &variant.dir {
                variant.speed = Some(measure(path, plan)?);
            }
        }
    }
    drop(bar);
    let set = truth.context("no model to compare")?;
    if let Some(train) = plan.data.train.as_ref().filter(|_| !plan.no_baseline) {
        let train = corpus::read(train.as_ref(), plan.data, &set.names)?;
        let baseline = TfIdf::fit(&train.texts, &train.labels, set.names.len());
        let scores: Vec<f32> = set.texts.iter().flat_map(|t| baseline.scores(t)).collect();
        variants.push(Variant {
            name: "TF-IDF baseline".into(),
            dir: None,
            parent: None,
            parameters: 0,
            disk_bytes: 0,
            figures: metrics::evaluate(&scores, &set.labels, &set.names),
            against_parent: None,
            speed: None,
        });
    }
    Ok(Comparison { version: 1, sentences: set.len(), threads: plan.threads, variants })
}

/// The variant that this one was made from, by its provenance; else the first one.
fn parent_of(path: &std::path::Path, hashes: &[String], i: usize) -> Option<usize> {
    let provenance = Provenance::read(path);
    let made_from = provenance.as_ref().and_then(|p| p.inputs.get("model").or_else(|| p.inputs.get("teacher")));
    made_from.and_then(|hash| hashes.iter().position(|h| h == hash)).or_else(|| (i > 0).then_some(0))
}

/// `quetsch bench` in a process of its own.
fn measure(model: &std::path::Path, plan: &Plan) -> Result<Speed> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.arg("bench").arg("--model").arg(model).args(["--format", "json", "--quiet", "--samples", "300"]);
    command.args(["--threads", &plan.threads.to_string()]);
    if let Some(test) = &plan.data.test {
        command.args(["--data", test]);
    }
    if let Some(column) = &plan.data.text_col {
        command.args(["--text-col", column]);
    }
    let done = command.stdin(Stdio::null()).output().context("cannot start the process that measures")?;
    if !done.status.success() {
        bail!("measuring {} failed: {}", model.display(), String::from_utf8_lossy(&done.stderr).trim());
    }
    serde_json::from_slice(&done.stdout).context("the process that measures wrote no JSON")
}

/// The columns of the table.
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

impl Comparison {
    /// The cells of a line, as in [`HEADER`].
    fn cells(v: &Variant) -> [String; 12] {
        let none = || "-".to_string();
        let speed = |f: &dyn Fn(&Speed) -> String| v.speed.as_ref().map_or_else(none, f);
        let against = |f: &dyn Fn(&Agreement) -> String| v.against_parent.as_ref().map_or_else(none, f);
        let is_model = v.dir.is_some();
        [
            v.name.clone(),
            if is_model { format!("{:.2} M", v.parameters as f64 / 1e6) } else { none() },
            if is_model { format!("{:.1}", mb(v.disk_bytes)) } else { none() },
            percent(v.figures.accuracy),
            percent(v.figures.macro_f1),
            v.parent.clone().unwrap_or_else(none),
            against(&|a| format!("{:+.2} pt", 100.0 * a.accuracy_delta)),
            against(&|a| format!("{} ({})", a.flips, percent(a.flip_rate))),
            against(&|a| format!("{:.3}", a.mcnemar.p)),
            speed(&|s| format!("{:.2}", s.latency_ms.p50)),
            speed(&|s| format!("{:.0}", s.sentences_per_s)),
            speed(&|s| s.peak_rss_mb.map_or_else(none, |m| format!("{m:.1}"))),
        ]
    }

    /// For a terminal: numbers to the right, the best accuracy in bold.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(HEADER);
        let best = self.variants.iter().map(|v| v.figures.accuracy).fold(f64::NEG_INFINITY, f64::max);
        for v in &self.variants {
            let cells = Self::cells(v).into_iter().enumerate().map(|(i, text)| match i {
                3 if v.figures.accuracy == best => Cell::new(text).add_attribute(Attribute::Bold),
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

    /// For a pull request.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut text = line(&HEADER.map(str::to_string));
        text +=
            &line(&std::array::from_fn::<_, 12, _>(|i| if i == 0 || i == 5 { "---" } else { "---:" }.to_string()));
        self.variants.iter().for_each(|v| text += &line(&Self::cells(v)));
        text + &format!("\n{}\n", self.legend())
    }

    /// What the columns mean.
    pub fn legend(&self) -> String {
        format!(
            "{} sentences, {} threads. delta, flips (changed predictions) and McNemar's p are against the parent; p50 is \
             one sentence at a time, tokenising included; each model was timed in a process of its own.",
            self.sentences, self.threads
        )
    }

    /// One self-contained page.
    pub fn html(&self, title: &str) -> Result<String> {
        let rows: Vec<_> = self.variants.iter().map(|v| Self::cells(v).to_vec()).collect();
        let largest = self.variants.iter().map(|v| v.disk_bytes).max().unwrap_or(1).max(1);
        let slowest = self.variants.iter().filter_map(|v| v.speed.as_ref()).map(|s| s.latency_ms.p50);
        let slowest = slowest.fold(f64::MIN_POSITIVE, f64::max);
        let bars: Vec<_> = self
            .variants
            .iter()
            .filter(|v| v.dir.is_some())
            .map(|v| {
                minijinja::context! {
                    name => v.name.clone(),
                    disk => round(100.0 * v.disk_bytes as f64 / largest as f64, 1),
                    disk_mb => round(mb(v.disk_bytes), 1),
                    latency => v.speed.as_ref().map(|s| round(100.0 * s.latency_ms.p50 / slowest, 1)),
                    p50 => v.speed.as_ref().map(|s| s.latency_ms.p50),
                    accuracy => percent(v.figures.accuracy),
                }
            })
            .collect();
        let mut env = minijinja::Environment::new();
        env.add_template("report.html", include_str!("report.html"))?;
        let page = env.get_template("report.html")?.render(minijinja::context! {
            title, header => HEADER, rows, bars, legend => self.legend(),
        })?;
        Ok(page)
    }
}
