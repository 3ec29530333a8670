//! `quetsch search`: the smallest models within a budget of accuracy.

use crate::recipe;
use crate::ui::{self, Ui};
use crate::values::Points;
use crate::work::search::{self, Options};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;

/// Flags of `search`.
#[derive(Debug, Args)]
pub struct Search {
    /// Search file
    #[arg(value_name = "SEARCH.toml")]
    file: PathBuf,
    /// Put a value over the file's: out=DIR, data.train=FILE, search.trials=20
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Points of validation accuracy that the recommended model may lose: 0.5 or 0.5pt
    #[arg(long, value_name = "POINTS")]
    max_drop: Option<Points>,
    /// Minutes that the search may take; 0 sets no limit
    #[arg(long)]
    minutes: Option<f64>,
    /// Trials at a time, each in a process of its own with its share of the threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Time the models of a finished search again, and choose again: on a quiet machine, or on another one
    #[arg(long)]
    again: bool,
}

/// Runs `search`.
pub fn run(s: &Search, ui: &Ui) -> Result<()> {
    let mut flags = s.set.clone();
    flags.extend(s.max_drop.map(|p| format!("search.max-drop={}", p.0)));
    flags.extend(s.minutes.map(|m| format!("search.minutes={m}")));
    let file = recipe::read_search(&s.file, &flags)?;
    if s.jobs == 0 {
        return Err(crate::exit::usage("--jobs 0: must be at least 1"));
    }
    ui::catch_interrupts()?;
    let options = Options { jobs: s.jobs, threads: ui.threads(file.threads), again: s.again };
    let found = search::search(&file, options, ui)?;
    let out = file.out.display();
    ui.result(format!("{}\n{}\n-> {out}/report.html, {out}/search.json", found.table(), found.summary()), &found.0)
}
