//! `quetsch compare`: models side by side.

use crate::exit::usage;
use crate::hub;
use crate::settings::{self, Data};
use crate::ui::Ui;
use crate::work::compare::{Plan, compare};
use crate::work::gate::{self, Gate};
use crate::work::report::Lang;
use crate::work::{corpus, pretty};
use anyhow::Result;
use clap::Args;
use quetsch::atomic::write_file;
use quetsch::task::Task;
use std::path::{Path, PathBuf};

/// Flags of `compare`.
#[derive(Debug, Args)]
pub struct CompareModels {
    /// Model directories, or ORG/NAME on the hub; each is compared with the one it was made from, else with the first
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
    /// Several labels in one field are separated by this [default: |]
    #[arg(long, value_name = "TEXT")]
    label_separator: Option<String>,
    /// Labelled texts to fit temperatures on, neither trained nor measured on; models stay as they are
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Write a report too: .html, .md or .json; may be given several times
    #[arg(long, value_name = "FILE")]
    report: Vec<PathBuf>,
    /// End with exit code 3 unless this holds for every model after the first (a model alone, too): accuracy>=-0.5pt, flips<=1%, latency<=0.5x, disk<=30MB
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
        label_separator: c.label_separator.clone(),
        ..Data::default()
    };
    let data = data.local(ui)?;
    let dirs = c.dirs.iter().map(|dir| hub::model(dir, None, ui)).collect::<Result<Vec<_>>>()?;
    if let Some(file) = c.report.iter().find(|f| Form::of(f).is_none()) {
        return Err(usage(format!("--report {}: expected .html, .md or .json", file.display())));
    }
    let calibration = match (&c.calibration, dirs.first()) {
        (Some(file), Some(first)) => {
            let model = quetsch::dir::read_checkpoint(first)?;
            let set = corpus::read(&hub::table(file, "validation", ui)?, &data, (&model).into())?;
            if set.task != Task::default() {
                let task = set.task;
                return Err(usage(format!(
                    "--calibration: temperatures are of one label a text, this task is {task}"
                )));
            }
            Some(set)
        }
        _ => None,
    };
    let plan = Plan {
        models: names(&c.dirs).into_iter().zip(dirs).collect(),
        data: &data,
        calibration,
        settings: &c.settings,
        gates: &c.gate,
        skip_gates: usize::from(c.dirs.len() > 1),
        threads: ui.threads(None),
    };
    let comparison = compare(&plan, ui)?;
    for file in &c.report {
        let lang = c.settings.lang;
        let bytes = match Form::of(file) {
            Some(Form::Html) => {
                comparison.html(lang.pick("Quetsch: comparison", "Quetsch：模型对比"), lang)?.into_bytes()
            }
            Some(Form::Markdown) => comparison.markdown(lang).into_bytes(),
            _ => pretty(&comparison)?,
        };
        write_file(file, &bytes)?;
    }
    ui.result(format!("{}\n{}", comparison.table(), comparison.legend(Lang::En)), &comparison)?;
    gate::verdict(&comparison.gates)
}

/// What a report is written as.
enum Form {
    Html,
    Markdown,
    Json,
}

impl Form {
    /// By the file's name.
    fn of(file: &Path) -> Option<Form> {
        match file.extension()?.to_str()? {
            "html" => Some(Form::Html),
            "md" => Some(Form::Markdown),
            "json" => Some(Form::Json),
            _ => None,
        }
    }
}

/// The folders' last names; where two are the same, the paths.
fn names(dirs: &[PathBuf]) -> Vec<String> {
    let last = |d: &PathBuf| d.file_name().map(|n| n.to_string_lossy().into_owned());
    let name = |d: &PathBuf| match last(d) {
        Some(name) if dirs.iter().filter(|o| last(o).as_ref() == Some(&name)).count() == 1 => name,
        _ => d.display().to_string(),
    };
    dirs.iter().map(name).collect()
}
