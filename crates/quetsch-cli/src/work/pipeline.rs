//! A recipe's stages in order.

use super::compare::{Comparison, Plan, compare};
use super::gate::{self, Gate};
use super::{Job, corpus, pretty};
use crate::exit::{interrupted, usage};
use crate::recipe::{Kind, Recipe, Stage};
use crate::settings::Compare;
use crate::ui::{Ui, duration, is_interrupted};
use anyhow::{Context, Result};
use quetsch::atomic::write_file;
use quetsch::data::Dataset;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

/// How to run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Stop after this stage.
    pub until: Option<String>,
    /// Go on with an interrupted training.
    pub resume: bool,
    /// Replace outputs that were made from something else.
    pub force: bool,
    /// Conditions on the models that come after the first.
    pub gates: Vec<Gate>,
}

/// Where things of a run are.
impl Recipe {
    /// The folder of a stage.
    pub fn stage_dir(&self, id: &str) -> PathBuf {
        self.out.join(id)
    }

    /// A model named in the recipe: the folder of a stage, else a path.
    pub fn model_dir(&self, name: &str) -> PathBuf {
        match self.stages.iter().any(|s| s.id == name) {
            true => self.stage_dir(name),
            false => self.place(name),
        }
    }

    /// The stages up to the one named.
    pub fn until(&self, until: Option<&str>) -> Result<&[Stage]> {
        let Some(id) = until else { return Ok(&self.stages) };
        let known = || self.stages.iter().map(|s| s.id.as_str()).collect::<Vec<_>>().join(", ");
        match self.stages.iter().position(|s| s.id == id) {
            Some(last) => Ok(&self.stages[..=last]),
            None => Err(usage(format!("--until {id}: no such stage; there are: {}", known()))),
        }
    }

    /// The job of a stage.
    pub fn job<'a>(&'a self, stage: &'a Stage, threads: usize, options: &Options) -> Job<'a> {
        let inputs: BTreeMap<_, _> = match &stage.kind {
            Kind::Compare(_) => BTreeMap::new(),
            kind => kind.inputs().into_iter().filter_map(|(r, n)| Some((r, self.model_dir(&n?)))).collect(),
        };
        Job {
            id: &stage.id,
            kind: &stage.kind,
            data: self.local_data(),
            unlabelled: stage.kind.unlabelled().map(|name| self.place(name)),
            card: &self.card,
            seed: self.seed,
            inputs,
            out: self.stage_dir(&stage.id),
            cache: Some(self.cache.clone().unwrap_or_else(|| self.out.join("cache"))),
            threads,
            force: options.force,
            resume: options.resume,
        }
    }
}

/// What a run ends with.
pub struct Finished {
    /// The last comparison, if there was one.
    pub comparison: Option<Comparison>,
    /// Everything, for `report.json`.
    pub report: Value,
}

/// Runs a recipe.
pub fn run(recipe: &Recipe, options: &Options, ui: &Ui) -> Result<Finished> {
    let threads = ui.threads(recipe.threads);
    for warning in &recipe.warnings {
        ui.warn(warning);
    }
    let recipe = &recipe.fetched(ui)?;
    let stages = recipe.until(options.until.as_deref())?;
    let started = Instant::now();
    let _alone = super::alone(&recipe.out, || {
        ui.note(format!("{}: another run is writing there; waiting for its end", recipe.out.display()));
        true
    })?;
    let mut comparisons = stages.iter().filter(|s| matches!(s.kind, Kind::Compare(_)));
    let last_comparison = comparisons.next_back().map(|s| s.id.as_str());
    let (mut reports, mut comparison) = (vec![], None);
    for stage in stages {
        if is_interrupted() {
            let id = &stage.id;
            return Err(interrupted(format!("interrupted before {id}; run the same command to go on from there")));
        }
        let job = recipe.job(stage, threads, options);
        match &stage.kind {
            Kind::Eval(_) => reports.push(eval(&job, ui)?),
            Kind::Compare(s) => {
                let models: Vec<_> = s.models.iter().map(|n| (n.clone(), recipe.model_dir(n))).collect();
                // Gates look at the last comparison.
                let is_last = last_comparison == Some(stage.id.as_str());
                let plan = Plan {
                    calibration: validation(recipe, &models, ui)?,
                    models,
                    data: recipe.local_data(),
                    settings: s,
                    gates: if is_last { &options.gates } else { &[] },
                    skip_gates: 1,
                    threads,
                };
                let mut result = compare(&plan, ui)?;
                result.recipe = Some(recipe.to_toml()?);
                let dir = recipe.stage_dir(&stage.id);
                std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
                let title = s.lang.pick("Quetsch: comparison", "Quetsch:模型对比");
                write_file(dir.join("report.json"), &pretty(&result)?)?;
                write_file(dir.join("report.md"), result.markdown(s.lang).as_bytes())?;
                if result.has_page() {
                    write_file(dir.join("report.html"), result.html(title, s.lang)?.as_bytes())?;
                }
                ui.say(format!("{}\n{}\n-> {}", result.table(), result.legend(), dir.display()))?;
                reports.push(json!({ "id": stage.id, "stage": "compare", "comparison": result }));
                comparison = Some(result);
            }
            _ => reports.push(job.run(ui)?),
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    ui.note(format!("done in {}", duration(seconds)));
    let report = json!({ "seconds": super::round(seconds, 1), "stages": reports });
    write_file(recipe.out.join("report.json"), &pretty(&report)?)?;
    write_file(recipe.out.join("recipe.resolved.toml"), recipe.to_toml()?.as_bytes())?;
    check_gates(recipe, stages, options, comparison.as_ref(), threads, ui)?;
    Ok(Finished { comparison, report })
}

/// Gates look at every model but the first: those that were made smaller.
fn check_gates(
    recipe: &Recipe,
    stages: &[Stage],
    options: &Options,
    comparison: Option<&Comparison>,
    threads: usize,
    ui: &Ui,
) -> Result<()> {
    if options.gates.is_empty() {
        return Ok(());
    }
    if let Some(comparison) = comparison {
        return gate::verdict(&comparison.gates);
    }
    let models = stages.iter().filter(|s| s.kind.makes_model());
    let plan = Plan {
        models: models.map(|s| (s.id.clone(), recipe.stage_dir(&s.id))).collect(),
        data: recipe.local_data(),
        calibration: None,
        settings: &Compare { no_baseline: true, no_speed: !gate::timed(&options.gates), ..Compare::default() },
        gates: &options.gates,
        skip_gates: 1,
        threads,
    };
    gate::verdict(&compare(&plan, ui)?.gates)
}

/// The part of the training data that was set aside, to fit temperatures on.
fn validation(recipe: &Recipe, models: &[(String, PathBuf)], ui: &Ui) -> Result<Option<Dataset>> {
    let Some((_, first)) = models.first().filter(|_| recipe.data.validation > 0.0 && recipe.data.train.is_some())
    else {
        return Ok(None);
    };
    let model = quetsch::dir::read_checkpoint(first)?;
    Ok(Some(corpus::training(recipe.local_data(), (&model).into(), recipe.seed, ui)?.validation))
}

fn eval(job: &Job, ui: &Ui) -> Result<Value> {
    let model = quetsch::dir::read(job.input("model")?)?;
    let test = job.test(&model, ui)?.ok_or_else(|| usage("no test data: set data.test"))?;
    let figures = [("micro_f1", "micro-F1"), ("accuracy", "accuracy"), ("r2", "R2")];
    let main = figures.iter().find_map(|(key, name)| Some((*name, test[key].as_f64()?)));
    let (name, x) = main.unwrap_or(("R2", f64::NAN));
    let shown = if name == "accuracy" { crate::ui::percent(x) } else { format!("{x:.4}") };
    ui.say(format!("{}: test {name} {shown}", job.id))?;
    std::fs::create_dir_all(&job.out).with_context(|| format!("cannot make {}", job.out.display()))?;
    let report = json!({ "id": job.id, "stage": "eval", "test": test });
    write_file(job.out.join(super::REPORT), &pretty(&report)?)?;
    Ok(report)
}
