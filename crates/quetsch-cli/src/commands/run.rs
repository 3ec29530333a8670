//! `quetsch run`: a whole recipe.

use crate::hub;
use crate::recipe::{self, Kind, Recipe, Stage};
use crate::ui::{self, Ui, mb};
use crate::work::corpus::Wanted;
use crate::work::gate::Gate;
use crate::work::pipeline::{self, Options};
use crate::work::provenance::Provenance;
use crate::work::quantize;
use anyhow::Result;
use clap::Args;
use quetsch::dir::Source;
use quetsch::quant::{self, Scheme};
use quetsch::spec::{HeadSpec, ModelSpec};
use quetsch::task::Level;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Flags of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Recipe file
    #[arg(value_name = "RECIPE.toml")]
    recipe: PathBuf,
    /// Put a value over the recipe's: model=DIR, data.train=FILE, student.alpha=0.4
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Stop after this stage
    #[arg(long, value_name = "STAGE")]
    until: Option<String>,
    /// Go on with an interrupted training; stages that are done are skipped in any case
    #[arg(long)]
    resume: bool,
    /// Make stages again whose output was made from something else
    #[arg(long)]
    force: bool,
    /// Print what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// End with exit code 3 unless this holds for every model after the first: accuracy>=-0.5pt, flips<=1%, latency<=0.5x
    #[arg(long, value_name = "CONDITION")]
    gate: Vec<Gate>,
    /// End in good order when standard input closes: whoever started this has gone
    #[arg(long, hide = true)]
    attached: bool,
}

/// Runs `run`.
pub fn run(r: &Run, ui: &Ui) -> Result<()> {
    let environment: BTreeMap<_, _> = std::env::vars().filter(|(k, _)| k.starts_with("QUETSCH_")).collect();
    let recipe = recipe::read(&r.recipe, &environment, &r.set)?;
    let options = Options { until: r.until.clone(), resume: r.resume, force: r.force, gates: r.gate.clone() };
    if r.dry_run {
        // What the hub's cache has is looked at; nothing is fetched.
        let mut offline = ui.clone();
        offline.offline = true;
        let recipe = recipe.fetched(&offline).unwrap_or(recipe);
        let steps = plan(&recipe, &options, ui)?;
        return ui.result(human(&recipe, &steps).trim_end(), &steps);
    }
    ui::catch_interrupts()?;
    if r.attached {
        ui::end_with_stdin();
    }
    let finished = pipeline::run(&recipe, &options, ui)?;
    match ui.human() {
        true => Ok(()),
        false => ui.result("", &finished.report),
    }
}

/// One stage of a plan.
#[derive(Serialize)]
struct Step {
    id: String,
    stage: &'static str,
    inputs: BTreeMap<&'static str, PathBuf>,
    out: PathBuf,
    /// Whether its output is there already.
    done: bool,
    /// Expected, if the model is there to count from.
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    settings: serde_json::Value,
}

fn plan(recipe: &Recipe, options: &Options, ui: &Ui) -> Result<Vec<Step>> {
    let stages = recipe.until(options.until.as_deref())?;
    let steps = stages.iter().zip(shapes(recipe, stages)).map(|(stage, spec)| {
        let job = recipe.job(stage, ui.threads(recipe.threads), options);
        let done = job.provenance().ok().zip(Provenance::read(&job.out)).is_some_and(|(a, b)| a.key == b.key);
        let settings = serde_json::to_value(&stage.kind)?[stage.kind.name()].take();
        Ok(Step {
            id: stage.id.clone(),
            stage: stage.kind.name(),
            inputs: job.inputs.clone(),
            out: job.out.clone(),
            done,
            parameters: spec.as_ref().map(parameters),
            bytes: spec.as_ref().map(|spec| expected_bytes(&stage.kind, spec)),
            settings,
        })
    });
    steps.collect()
}

/// The shape of the model that each stage will make, where there is one to count from.
pub fn shapes(recipe: &Recipe, stages: &[Stage]) -> Vec<Option<ModelSpec>> {
    let mut specs: BTreeMap<PathBuf, ModelSpec> = BTreeMap::new();
    let shape = |stage: &Stage| {
        let job = recipe.job(stage, 1, &Options::default());
        let start = job.inputs.get("model").or(job.inputs.get("teacher")).filter(|_| stage.kind.makes_model())?;
        let start = specs.get(start).cloned().or_else(|| Some(Source::open(start).ok()?.spec().clone()))?;
        let spec = expected(&stage.kind, with_head(&stage.kind, start, recipe));
        specs.insert(job.out, spec.clone());
        Some(spec)
    };
    stages.iter().map(shape).collect()
}

fn parameters(spec: &ModelSpec) -> usize {
    spec.tensors().iter().map(|d| d.len()).sum()
}

/// A body that is trained gets a head for the labels of the data.
fn with_head(kind: &Kind, mut spec: ModelSpec, recipe: &Recipe) -> ModelSpec {
    if matches!(kind, Kind::Train(_)) && spec.head == HeadSpec::None {
        let path = recipe.local_data().train.as_ref();
        let set =
            path.and_then(|p| crate::work::corpus::read(p.as_ref(), recipe.local_data(), Wanted::default()).ok());
        let labels = set.as_ref().map_or(2, |s| s.names.len());
        spec.head = match set.map(|s| s.task.level) {
            Some(Level::Token) => HeadSpec::Tokens { labels },
            _ => HeadSpec::MeanMlp { labels },
        };
    }
    spec
}

/// The shape that a stage will make; which heads go does not change the numbers.
pub fn expected(kind: &Kind, mut spec: ModelSpec) -> ModelSpec {
    match kind {
        Kind::Distill(s) if s.model.is_none() && !s.layers.is_empty() => {
            spec.layers = s.layers.iter().filter_map(|l| spec.layers.get(*l).cloned()).collect();
        }
        Kind::Prune(s) => {
            let keep = spec.layers.len().saturating_sub(s.layers.of(spec.layers.len()));
            spec.layers.truncate(keep);
            let mut left = s.heads.of(spec.layers.iter().map(|l| l.heads.len()).sum());
            while left > 0 {
                let Some(most) = spec.layers.iter_mut().max_by_key(|l| l.heads.len()) else { break };
                if most.heads.pop().is_none() {
                    break;
                }
                left -= 1;
            }
            for layer in &mut spec.layers {
                layer.ffn -= s.ffn.of(layer.ffn).min(layer.ffn);
            }
        }
        _ => {}
    }
    spec
}

/// Bytes of the tensors; a rule that fits nowhere is for the stage itself to complain about.
fn expected_bytes(kind: &Kind, spec: &ModelSpec) -> u64 {
    let assigned = match kind {
        Kind::Quantize(s) => {
            quantize::rules(s).and_then(|r| Ok(quant::assign(spec, &r, &quantize::kept(s, spec))?)).ok()
        }
        _ => None,
    };
    let bits = |scheme: Option<Scheme>| match scheme {
        Some(Scheme::F16 | Scheme::Bf16) => 16,
        Some(Scheme::Int8 | Scheme::Int8Static | Scheme::Int8Weight | Scheme::BnbInt8 { .. }) => 8,
        Some(Scheme::Nf4 { .. } | Scheme::Fp4 { .. }) => 4,
        Some(Scheme::F32) | None => 32,
    };
    let table = assigned.unwrap_or_else(|| spec.tensors().into_iter().map(|d| (d, None)).collect());
    table.iter().map(|(d, scheme)| (d.len() * bits(*scheme)) as u64 / 8).sum()
}

fn human(recipe: &Recipe, steps: &[Step]) -> String {
    let none = || "(not given)".to_string();
    let d = &recipe.data;
    let mut text = format!(
        "train {}\ntest  {}\nvalidation share {}\n\n",
        d.train.clone().unwrap_or_else(none),
        d.test.clone().unwrap_or_else(none),
        d.validation
    );
    for step in steps {
        let state = if step.done { "done, will be skipped" } else { "will run" };
        text += &format!("{} ({}): {state}\n", step.id, step.stage);
        for (role, path) in &step.inputs {
            let there = match path.exists() || path.starts_with(&recipe.out) {
                true => "",
                false if hub::is_remote(path) => "  from the hub, to be fetched",
                false => "  MISSING",
            };
            text += &format!("  {role} <- {}{there}\n", path.display());
        }
        text += &format!("  out   -> {}\n", step.out.display());
        if let (Some(n), Some(bytes)) = (step.parameters, step.bytes) {
            text += &format!("  about {:.2} M parameters, {:.1} MB\n", n as f64 / 1e6, mb(bytes));
        }
        if let serde_json::Value::Object(settings) = &step.settings {
            let shown = settings.iter().filter(|(k, _)| *k != "model" && *k != "teacher");
            let all: Vec<_> = shown.map(|(k, v)| format!("{k} {v}")).collect();
            text += &format!("  {}\n", all.join(", "));
        }
    }
    text
}
