//! `quetsch eval`: accuracy, macro-F1, top-3, calibration and confusions of one model.

use crate::hub;
use crate::settings::{Compare, Data};
use crate::ui::{Ui, percent};
use crate::work::compare::{Plan, compare};
use crate::work::corpus;
use crate::work::gate::{self, Gate};
use crate::work::warn_of_lost_words;
use anyhow::Result;
use clap::Args;
use quetsch::metrics::{self, Figures, Metrics, Regression};
use quetsch::runtime::Classifier;
use quetsch::task::Level;
use std::path::PathBuf;

/// Flags of `eval`.
#[derive(Debug, Args)]
pub struct Eval {
    /// Model directory, or ORG/NAME on the hub
    #[arg(long, alias = "model-id", value_name = "DIR")]
    model: PathBuf,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long)]
    revision: Option<String>,
    /// Labelled texts: .csv, .tsv, .jsonl or .parquet, or hf:ORG/NAME:SPLIT
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Name of the text column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    text_col: Option<String>,
    /// Name of the label column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    label_col: Option<String>,
    /// Several labels in one field are separated by this [default: |]
    #[arg(long, value_name = "TEXT")]
    label_separator: Option<String>,
    /// Longest text in tokens; longer ones are cut [default: what the model says, else 256]
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<usize>,
    /// End with exit code 3 unless this holds: accuracy>=92%, worst_recall>=60%, latency<=2ms
    #[arg(long, value_name = "CONDITION", conflicts_with = "max_length")]
    gate: Vec<Gate>,
}

/// Runs `eval`.
pub fn run(e: &Eval, ui: &Ui) -> Result<()> {
    let model = hub::model(&e.model, e.revision.as_deref(), ui)?;
    let file = hub::table(&e.data, "test", ui)?;
    let classifier = Classifier::load(&model, e.max_length)?;
    let columns = Data {
        text_col: e.text_col.clone(),
        label_col: e.label_col.clone(),
        label_separator: e.label_separator.clone(),
        ..Data::default()
    };
    gate::sensible(&e.gate, classifier.task())?;
    let set = corpus::read(&file, &columns, (&classifier).into())?;
    for warning in &set.warnings {
        ui.warn(format!("{}: {warning}", e.data.display()));
    }
    let (examples, logits) = classifier.answers(&set, ui.threads(None))?;
    warn_of_lost_words(&examples, &e.data.display().to_string(), ui);
    let task = classifier.task();
    let figures = metrics::measure(task.problem, &logits, examples.targets(), classifier.labels());
    let what = if task.level == Level::Token { "words    " } else { "sentences" };
    let shown = match &figures {
        Figures::Labels(m) => human(m, what),
        Figures::Numbers(r) => numbers(r, what),
    };
    ui.result(shown.trim_end(), &figures)?;
    if e.gate.is_empty() {
        return Ok(());
    }
    // Gates look at a comparison; this is one of a single model.
    let data = Data { test: Some(file.display().to_string()), ..columns };
    let no_speed = !gate::timed(&e.gate);
    let plan = Plan {
        models: vec![(e.model.display().to_string(), model)],
        data: &data,
        calibration: None,
        settings: &Compare { no_baseline: true, no_speed, ..Compare::default() },
        gates: &e.gate,
        skip_gates: 0,
        threads: ui.threads(None),
    };
    gate::verdict(&compare(&plan, ui)?.gates)
}

/// The figures for people: totals, the five weakest labels, the five most frequent confusions.
pub fn human(m: &Metrics, what: &str) -> String {
    let [low, high] = m.accuracy_interval;
    let micro = m.micro_f1.map_or(String::new(), |f1| {
        format!("  of whole rows: all labels right and no other\nmicro-F1     {}", percent(f1))
    });
    let mut text = format!(
        "{what}    {}\naccuracy     {}  (95% interval {} to {}){micro}\nmacro-F1     {}\ntop-3        {}\n\
         ECE          {:.4}\nloss         {:.4}\n",
        m.n,
        percent(m.accuracy),
        percent(low),
        percent(high),
        percent(m.macro_f1),
        percent(m.top_3),
        m.ece,
        m.loss,
    );
    let mut weakest: Vec<_> = m.per_class.iter().filter(|c| c.support > 0).collect();
    weakest.sort_by(|a, b| a.f1.total_cmp(&b.f1));
    text += "weakest labels (F1, precision, recall, sentences):\n";
    for c in weakest.iter().take(5) {
        text += &format!("  {:.3}  {:.3}  {:.3}  {:>4}  {}\n", c.f1, c.precision, c.recall, c.support, c.label);
    }
    if !m.confusions.is_empty() {
        text += "most frequent confusions (truth -> prediction):\n";
    }
    for c in m.confusions.iter().take(5) {
        text += &format!("  {:>4}  {} -> {}\n", c.count, c.truth, c.predicted);
    }
    text
}

/// The figures of numbers for people: totals, then each output.
fn numbers(r: &Regression, what: &str) -> String {
    let mut text = format!(
        "{what}    {}\nMSE          {:.5}\nMAE          {:.5}\nR2           {:.4}\nPearson      {:.4}\n",
        r.n, r.mse, r.mae, r.r2, r.pearson
    );
    if r.outputs.len() > 1 {
        text += "outputs (MSE, MAE, R2, Pearson):\n";
        for o in &r.outputs {
            text += &format!("  {:.5}  {:.5}  {:.4}  {:.4}  {}\n", o.mse, o.mae, o.r2, o.pearson, o.name);
        }
    }
    text
}
