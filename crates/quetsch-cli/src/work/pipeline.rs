//! A recipe's stages in order.

use super::compare::{Comparison, Plan, compare};
use super::gate::{self, Gate};
use super::report::Lang;
use super::{Job, corpus, pretty};
use crate::commands::shapes;
use crate::exit::{interrupted, usage};
use crate::recipe::{self, Kind, Recipe, Stage};
use crate::settings::{Compare, Data};
use crate::ui::{Ui, duration, is_interrupted};
use anyhow::{Context, Result};
use quetsch::atomic::write_file;
use quetsch::data::Dataset;
use quetsch::spec::ModelSpec;
use quetsch::task::Task;
use serde_json::{Value, json};
use std::cell::LazyCell;
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
    can_be_measured(recipe, stages)?;
    let measured = measured(recipe, stages, options, ui)?;
    let mut comparisons = stages.iter().filter(|s| matches!(s.kind, Kind::Compare(_)));
    let last_comparison = comparisons.next_back().map(|s| s.id.as_str());
    // Only wanted once something was made and more is to come.
    let works = LazyCell::new(|| -> Vec<f64> {
        stages.iter().zip(shapes(recipe, stages)).map(|(s, spec)| work(&s.kind, spec)).collect()
    });
    let (mut reports, mut comparison) = (vec![], None);
    for (n, stage) in stages.iter().enumerate() {
        let so_far = duration(started.elapsed().as_secs_f64());
        let ahead = if n > 0 { ahead(&works, &reports) } else { None };
        let ahead = ahead.map_or_else(String::new, |s| format!(", trainings about {} more", duration(s)));
        ui.note(format!("stage {} of {}: {} ({so_far} so far{ahead})", n + 1, stages.len(), stage.id));
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
                    data: &measured.data,
                    settings: s,
                    gates: if is_last { &options.gates } else { &[] },
                    skip_gates: 1,
                    threads,
                };
                let mut result = compare(&plan, ui)?;
                result.recipe = Some(recipe.to_toml()?);
                result.data.held_out = measured.is_held_out;
                let dir = recipe.stage_dir(&stage.id);
                std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
                let title = s.lang.pick("Quetsch: comparison", "Quetsch：模型对比");
                write_file(dir.join("report.json"), &pretty(&result)?)?;
                write_file(dir.join("report.md"), result.markdown(s.lang).as_bytes())?;
                if result.has_page() {
                    write_file(dir.join("report.html"), result.html(title, s.lang)?.as_bytes())?;
                }
                ui.say(format!("{}\n{}\n-> {}", result.table(), result.legend(Lang::En), dir.display()))?;
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
    check_gates(recipe, stages, options, comparison.as_ref(), &measured.data, threads, ui)?;
    Ok(Finished { comparison, report })
}

/// What a stage trains: multiply-accumulates of the linears on a token, times epochs.
fn work(kind: &Kind, spec: Option<ModelSpec>) -> f64 {
    let linears = spec.map_or(0, |s| s.linears().iter().map(|(_, rows, columns)| rows * columns).sum::<usize>());
    (linears * kind.epochs()) as f64
}

/// Seconds that the trainings without a report will take, at the pace of those that have one.
fn ahead(works: &[f64], reports: &[Value]) -> Option<f64> {
    let (done, left) = works.split_at(reports.len());
    let trained = done.iter().zip(reports).filter(|(work, _)| **work > 0.0);
    let (work, seconds) = trained
        .fold((0.0, 0.0), |sum, (work, report)| (sum.0 + work, sum.1 + report["seconds"].as_f64().unwrap_or(0.0)));
    let left: f64 = left.iter().sum();
    (seconds > 0.0 && left > 0.0).then(|| seconds / work * left)
}

/// Gates look at every model but the first: those that were made smaller.
fn check_gates(
    recipe: &Recipe,
    stages: &[Stage],
    options: &Options,
    comparison: Option<&Comparison>,
    data: &Data,
    threads: usize,
    ui: &Ui,
) -> Result<()> {
    if options.gates.is_empty() {
        return Ok(());
    }
    if let Some(comparison) = comparison {
        return gate::verdict(&comparison.gates);
    }
    let plan = Plan {
        models: recipe::results(stages).map(|s| (s.id.clone(), recipe.stage_dir(&s.id))).collect(),
        data,
        calibration: None,
        settings: &Compare { no_baseline: true, no_speed: !gate::timed(&options.gates), ..Compare::default() },
        gates: &options.gates,
        skip_gates: 1,
        threads,
    };
    gate::verdict(&compare(&plan, ui)?.gates)
}

/// Test data that do not fit the training data are known before anything is trained.
fn can_be_measured(recipe: &Recipe, stages: &[Stage]) -> Result<()> {
    let data = recipe.local_data();
    let (Some(train), Some(test)) = (&data.train, &data.test) else { return Ok(()) };
    if stages.iter().any(|s| matches!(s.kind, Kind::Train(_))) {
        // As the stage does it: the labels of the model if the data fit them, else those of the data.
        let start = recipe.model.as_ref().and_then(|m| quetsch::dir::read_checkpoint(recipe.place(m)).ok());
        let own = start.as_ref().filter(|ck| !ck.labels.is_empty());
        let fits = own.and_then(|ck| corpus::read(train.as_ref(), data, ck.into()).ok());
        let set = match fits {
            Some(set) => set,
            None => corpus::read(train.as_ref(), data, corpus::Wanted::default())?,
        };
        corpus::read(test.as_ref(), data, (&set).into())?;
    }
    Ok(())
}

/// What models are compared on.
struct MeasuredOn {
    data: Data,
    /// Whether it is a part of the training data, for want of test data.
    is_held_out: bool,
}

/// The test data; without any, the part of the training data that is set aside. Whether there is either is known before
/// anything is trained.
fn measured(recipe: &Recipe, stages: &[Stage], options: &Options, ui: &Ui) -> Result<MeasuredOn> {
    let data = recipe.local_data().clone();
    let asks = |s: &Stage| matches!(s.kind, Kind::Compare(_) | Kind::Eval(_));
    let is_asked = stages.iter().any(asks) || !options.gates.is_empty();
    if data.test.is_some() || !is_asked {
        return Ok(MeasuredOn { data, is_held_out: false });
    }
    let missing = "no test data: set data.test";
    if let Some(stage) = stages.iter().find(|s| matches!(s.kind, Kind::Eval(_))) {
        return Err(usage(format!("{missing}, which stage {} measures on", stage.id)));
    }
    if data.validation == 0.0 || data.train.is_none() {
        return Err(usage(format!(
            "{missing}, or data.validation = 0.1 to compare on a part of the training data"
        )));
    }
    let split = corpus::training(&data, corpus::Wanted::default(), recipe.seed, ui)?;
    if split.train.task != Task::default() {
        let task = split.train.task;
        return Err(usage(format!(
            "{missing} (the part set aside stands in for it with one label a text only, not {task})"
        )));
    }
    if split.validation.is_empty() {
        return Err(usage(format!("{missing}; {} sentences are too few to set a part aside", split.train.len())));
    }
    let parts = [("train", &split.train), ("validation", &split.validation)];
    let [train, test] = corpus::write_parts(&recipe.out.join("data"), &data, parts)?;
    ui.note(format!(
        "no test data: models are compared on the {} sentences set aside, {test}; what is chosen on them looks better \
         there than it is",
        split.validation.len()
    ));
    let data = Data { train: Some(train), test: Some(test), validation: 0.0, ..data };
    Ok(MeasuredOn { data, is_held_out: true })
}

/// The part of the training data that was set aside, to fit temperatures on.
fn validation(recipe: &Recipe, models: &[(String, PathBuf)], ui: &Ui) -> Result<Option<Dataset>> {
    let is_free = recipe.data.validation > 0.0 && recipe.data.train.is_some() && recipe.data.test.is_some();
    let Some((_, first)) = models.first().filter(|_| is_free) else {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_ahead_goes_by_what_was_trained() {
        let seconds = |s: f64| json!({ "seconds": s });
        let works = [6.0, 0.0, 3.0, 1.0, 0.0];
        assert_eq!(ahead(&works, &[]), None, "nothing to go by");
        assert_eq!(ahead(&works, &[seconds(12.0)]), Some(8.0));
        assert_eq!(ahead(&works, &[seconds(12.0), seconds(99.0)]), Some(8.0), "what is not trained says nothing");
        assert_eq!(ahead(&works, &[seconds(12.0), json!({}), seconds(24.0)]), Some(4.0));
        assert_eq!(ahead(&works, &[seconds(12.0), json!({}), seconds(24.0), seconds(1.0)]), None, "nothing ahead");
        assert_eq!(ahead(&[0.0, 2.0], &[json!({})]), None);
    }
}
