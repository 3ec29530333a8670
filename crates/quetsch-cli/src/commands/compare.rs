//! `quetsch compare`: models side by side.

use crate::settings::{self, Data};
use crate::ui::Ui;
use crate::work::compare::{Comparison, Plan, compare};
use crate::work::gate::{self, Gate};
use crate::work::pretty;
use anyhow::Result;
use clap::Args;
use quetsch::atomic::write_file;
use std::path::{Path, PathBuf};

/// Flags of `compare`.
#[derive(Debug, Args)]
pub struct CompareModels {
    /// Model directories; each is compared with the one it was made from, else with the first
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Labelled texts to measure on
    #[arg(long, value_name = "FILE")]
    data: String,
    /// Training data, for the TF-IDF baseline
    #[arg(long, value_name = "FILE")]
    train: Option<String>,
    /// Name of the text column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    text_col: Option<String>,
    /// Name of the label column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    label_col: Option<String>,
    /// Write a report too: .html, .md or .json
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// End with exit code 3 unless this holds for every model: accuracy>=-0.5pt, flips<=1%, accuracy>=92%
    #[arg(long, value_name = "CONDITION")]
    gate: Vec<Gate>,
    #[command(flatten)]
    settings: settings::Compare,
}

/// Runs `compare`.
pub fn run(c: &CompareModels, ui: &Ui) -> Result<()> {
    let data = Data {
        train: c.train.clone(),
        test: Some(c.data.clone()),
        text_col: c.text_col.clone(),
        label_col: c.label_col.clone(),
        ..Data::default()
    };
    let plan = Plan {
        models: c.dirs.iter().map(|d| (name(d), d.clone())).collect(),
        data: &data,
        no_baseline: c.settings.no_baseline,
        no_speed: c.settings.no_speed,
        threads: ui.threads(None),
    };
    let comparison = compare(&plan, ui)?;
    if let Some(file) = &c.report {
        write(&comparison, file)?;
    }
    ui.result(format!("{}\n{}", comparison.table(), comparison.legend()), &comparison)?;
    let models: Vec<_> = comparison.variants.iter().filter(|v| v.dir.is_some()).collect();
    gate::check(&c.gate, &models)
}

fn name(dir: &Path) -> String {
    dir.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// A report in the form that the file's name asks for.
fn write(comparison: &Comparison, file: &Path) -> Result<()> {
    let bytes = match file.extension().and_then(|e| e.to_str()) {
        Some("html") => comparison.html("Quetsch: comparison")?.into_bytes(),
        Some("md") => comparison.markdown().into_bytes(),
        Some("json") => pretty(comparison)?,
        _ => return Err(crate::exit::usage(format!("--report {}: expected .html, .md or .json", file.display()))),
    };
    Ok(write_file(file, &bytes)?)
}
