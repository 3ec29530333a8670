//! `quetsch train | distill | prune | quantize`: one stage without a recipe.

use crate::exit::usage;
use crate::hub;
use crate::recipe::Kind;
use crate::settings::{Card, Data, Finding, Level, Settings};
use crate::ui::{self, Ui};
use crate::work::Job;
use anyhow::Result;
use clap::Args;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Flags of a stage command.
#[derive(Debug, Args)]
pub struct Stage<T: Args> {
    #[command(flatten)]
    settings: T,
    #[command(flatten)]
    data: Data,
    #[command(flatten)]
    card: Card,
    /// Branch, tag or commit of --model on the hub, of --teacher where there is no --model [default: main]
    #[arg(long)]
    revision: Option<String>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace what is there
    #[arg(long)]
    force: bool,
    /// Go on with an interrupted training
    #[arg(long)]
    resume: bool,
    /// Print what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

/// Runs a stage command.
pub fn run<T: Settings>(stage: Stage<T>, kind: fn(T) -> Kind, ui: &Ui) -> Result<()> {
    report(stage.settings.check(), ui)?;
    report(stage.data.check(), ui)?;
    report(stage.card.check(), ui)?;
    let kind = kind(stage.settings);
    let mut inputs = BTreeMap::new();
    for (role, path) in kind.inputs() {
        match path {
            Some(path) => drop(inputs.insert(role, PathBuf::from(path))),
            // A recovery without a teacher learns from the model as it was.
            None if role == "teacher" && matches!(kind, Kind::Prune(_)) => {}
            None => return Err(usage(format!("no {role} given: pass --{role} DIR"))),
        }
    }
    let mut data = stage.data.clone();
    let mut unlabelled = kind.unlabelled().map(PathBuf::from);
    // A dry run says what would be fetched, and fetches nothing.
    if !stage.dry_run {
        let of = if inputs.contains_key("model") { "model" } else { "teacher" };
        for (role, path) in &mut inputs {
            let revision = stage.revision.as_deref().filter(|_| *role == of);
            *path = hub::model(path, revision, ui)?;
        }
        data = data.local(ui)?;
        unlabelled = unlabelled.map(|file| hub::table(&file, "train", ui)).transpose()?;
    }
    let job = Job {
        id: kind.name(),
        kind: &kind,
        data: &data,
        unlabelled,
        card: &stage.card,
        seed: kind.seed().unwrap_or(42),
        inputs,
        out: stage.out,
        cache: None,
        threads: ui.threads(None),
        force: stage.force,
        resume: stage.resume,
    };
    if stage.dry_run {
        let settings = toml::to_string(&kind)?;
        let inputs: Vec<_> = job.inputs.iter().map(|(role, path)| format!("{role} {}", path.display())).collect();
        let text = format!("{} -> {}\n\n{settings}", inputs.join(", "), job.out.display());
        return ui.result(text.trim_end(), &kind);
    }
    ui::catch_interrupts()?;
    let report = job.run(ui)?;
    match ui.human() {
        true => Ok(()),
        false => ui.result("", &report),
    }
}

/// Findings about flags: the first error ends the command.
pub fn report(findings: Vec<Finding>, ui: &Ui) -> Result<()> {
    for finding in findings {
        let message = format!("--{} {}", finding.key, finding.message);
        match finding.level {
            Level::Error => return Err(usage(message)),
            Level::Warning => ui.warn(message),
        }
    }
    Ok(())
}
