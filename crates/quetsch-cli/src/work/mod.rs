//! Running one stage, the same from a recipe and from its own command: find out what it would be made from, skip it if
//! that is there, make it, measure it, write its folder in one piece.

pub mod card;
pub mod compare;
pub mod corpus;
mod events;
pub mod fit;
pub mod folds;
pub mod gate;
pub mod machine;
pub mod make;
pub mod pareto;
pub mod parts;
pub mod pipeline;
pub mod provenance;
pub mod quantize;
pub mod report;
pub mod search;
mod teacher;
pub mod thin;

use crate::exit::usage;
use crate::recipe::Kind;
use crate::settings::{Card, Data};
use crate::ui::{Ui, duration, mb, percent};
use anyhow::{Context, Result};
use provenance::Provenance;
use quetsch::atomic::{Folder, write_file};
use quetsch::data::Examples;
use quetsch::dir::{self, ModelDir};
use quetsch::metrics;
use quetsch::runtime::Classifier;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A stage with everything resolved.
pub struct Job<'a> {
    /// Its name.
    pub id: &'a str,
    /// What it does.
    pub kind: &'a Kind,
    /// The data, in files that are here.
    pub data: &'a Data,
    /// Texts without labels, likewise.
    pub unlabelled: Option<PathBuf>,
    /// Seed of the validation split.
    pub seed: u64,
    /// Model directories by role: model, teacher.
    pub inputs: BTreeMap<&'static str, PathBuf>,
    /// What its card says that nobody can know.
    pub card: &'a Card,
    /// Its folder.
    pub out: PathBuf,
    /// Folder for the teacher's logits, shared by the stages of a run; without one they live beside the state.
    pub cache: Option<PathBuf>,
    /// Threads.
    pub threads: usize,
    /// Replace what is there.
    pub force: bool,
    /// Go on from a saved training state.
    pub resume: bool,
}

/// The report's file name.
pub const REPORT: &str = "report.json";

/// What a stage made, before it is measured and written.
pub struct Made {
    /// The model.
    pub checkpoint: quetsch::checkpoint::Checkpoint,
    /// Its tokenizer.
    pub tokenizer: quetsch::tokenizer::TokenizerFiles,
    /// What the stage has to tell.
    pub report: Map<String, Value>,
    /// More files for its folder.
    pub files: Vec<(&'static str, Vec<u8>)>,
}

impl Job<'_> {
    /// The model directory of a role.
    pub fn input(&self, role: &str) -> Result<&Path> {
        let path = self.inputs.get(role).map(PathBuf::as_path);
        path.ok_or_else(|| usage(format!("no {role} given: pass --{role} DIR")))
    }

    /// Where the training state lives until the stage is done: a hidden sibling of its folder.
    pub fn state(&self) -> PathBuf {
        let name = self.out.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        self.out.with_file_name(format!(".{name}.training"))
    }

    /// For the card: what it is made from and what people said.
    fn origin(&self) -> card::Origin {
        let parent = if matches!(self.kind, Kind::Distill(_)) { "teacher" } else { "model" };
        let [train, test] = [&self.data.train, &self.data.test].map(|file| file.as_ref().map(Path::new));
        card::origin(self.card, self.inputs.get(parent).map(PathBuf::as_path), train, test)
    }

    /// What the output is, or would be, made from.
    pub fn provenance(&self) -> Result<Provenance> {
        let mut inputs = BTreeMap::new();
        for (role, path) in &self.inputs {
            inputs.insert(role.to_string(), corpus::hash_model(path)?);
        }
        let reads = match self.kind {
            Kind::Train(_) | Kind::Distill(_) | Kind::Prune(_) => true,
            Kind::Quantize(s) => s.reads(self.data),
            _ => false,
        };
        if let Some(file) = self.data.train.as_ref().filter(|_| reads) {
            inputs.insert("train".into(), corpus::hash_file(file.as_ref())?);
            let reading = (&self.data.text_col, &self.data.label_col, self.data.validation, self.seed);
            let reading = match (&self.data.label_separator, self.data.task) {
                (None, None) => format!("{reading:?}"),
                more => format!("{reading:?} {more:?}"),
            };
            inputs.insert("reading".into(), corpus::hash_of(&[&reading]));
        }
        if let Kind::Distill(s) = self.kind {
            if let Some(file) = &self.unlabelled {
                inputs.insert("unlabelled".into(), corpus::hash_file(file)?);
            }
            if s.out_of_fold {
                inputs
                    .insert("out-of-fold".into(), corpus::hash_file(&self.input("teacher")?.join(folds::LOGITS))?);
            }
        }
        if let Kind::Prune(s) = self.kind
            && let Some(plan) = &s.plan
        {
            inputs.insert("plan".into(), corpus::hash_file(plan.as_ref())?);
        }
        if let Kind::Prune(s) = self.kind
            && let Some(table) = &s.latency_table
        {
            inputs.insert("latency-table".into(), corpus::hash_file(table.as_ref())?);
        }
        let section = serde_json::to_value(self.kind)?;
        Provenance::new(self.kind.name(), &section[self.kind.name()], inputs)
    }

    /// Runs the stage, or finds it done. Returns its report.
    pub fn run(&self, ui: &Ui) -> Result<Value> {
        let provenance = self.provenance()?;
        let found = Provenance::read(&self.out);
        tracing::debug!(id = self.id, key = provenance.key, inputs = ?provenance.inputs, "provenance");
        if found.as_ref().is_some_and(|f| f.key == provenance.key) {
            return self.done_before(ui);
        }
        if let Some(found) = found.filter(|_| !self.force) {
            let changes = differences(&found, &provenance).join(", ");
            let out = self.out.display();
            anyhow::bail!("{out} was made from something else ({changes}); pass --force to make it again");
        }
        let state = self.state();
        if state.exists() && !self.resume {
            let saved = [state.join("state"), thin::cut(&state, 1)];
            if saved.iter().any(|s| s.exists()) && !self.force {
                let out = self.out.display();
                anyhow::bail!(
                    "the training of {out} was interrupted: pass --resume to go on, or --force to start again"
                );
            }
            std::fs::remove_dir_all(&state).with_context(|| format!("cannot remove {}", state.display()))?;
        }
        let is_out = |path: &PathBuf| match (path.canonicalize(), self.out.canonicalize()) {
            (Ok(input), Ok(out)) => input == out,
            _ => false,
        };
        if let Some((role, _)) = self.inputs.iter().find(|(_, path)| is_out(path)) {
            return Err(usage(format!("--out {} is the {role} itself: name another folder", self.out.display())));
        }
        // Asked for now, so that a place that cannot be written is known before hours of work.
        let folder = Folder::create(&self.out, self.force)?;
        ui.note(format!("== {} ({})", self.id, self.kind.name()));
        let started = Instant::now();
        let made = make::make(self, &provenance.key, ui)?;
        let mut report = Map::from_iter([
            ("id".to_string(), json!(self.id)),
            ("stage".to_string(), json!(self.kind.name())),
            ("parameters".to_string(), json!(made.checkpoint.parameters())),
        ]);
        report.extend(made.report);
        let model = ModelDir { checkpoint: made.checkpoint, tokenizer: made.tokenizer };
        let test = self.test(&model, ui)?;
        if let Some(test) = test {
            report.insert("test".into(), test);
        }
        report.insert("seconds".into(), json!(round(started.elapsed().as_secs_f64(), 1)));
        dir::write_into(&folder, &model)?;
        report.insert("disk_bytes".into(), json!(corpus::disk_bytes(folder.path())));
        report.insert("origin".into(), serde_json::to_value(self.origin())?);
        let report = Value::Object(report);
        let config = serde_json::from_slice(&std::fs::read(folder.path().join("config.json"))?)?;
        let settings = Value::Object(provenance.settings.clone());
        card::put(&folder, &self.out, &card::for_dir(&self.out, &config, &report, &settings), ui)?;
        folder.write(provenance::FILE, &provenance.to_json()?)?;
        folder.write(REPORT, &pretty(&report)?)?;
        for (name, bytes) in &made.files {
            folder.write(name, bytes)?;
        }
        folder.commit()?;
        if state.exists() {
            std::fs::remove_dir_all(&state).with_context(|| format!("cannot remove {}", state.display()))?;
        }
        ui.say(format!("{} -> {}", summary(&report), self.out.display()))?;
        Ok(report)
    }

    /// A stage whose output is there: measured again only if the test data are others.
    fn done_before(&self, ui: &Ui) -> Result<Value> {
        let path = self.out.join(REPORT);
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut report: Value =
            serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        let before = report.clone();
        report["origin"] = serde_json::to_value(self.origin())?;
        let wanted = self.data.test.as_ref().map(|t| corpus::hash_file(t.as_ref())).transpose()?;
        if wanted.is_some() && report["test"]["data"].as_str() != wanted.as_deref() {
            let model = dir::read(&self.out)?;
            if let Some(test) = self.test(&model, ui)? {
                report["test"] = test;
            }
        }
        if report != before {
            write_file(&path, &pretty(&report)?)?;
            card::refresh(&self.out)?;
        }
        ui.say(format!("{} -> {} (there already, nothing to do)", summary(&report), self.out.display()))?;
        Ok(report)
    }

    /// The model's figures on the test data, if there are any.
    pub fn test(&self, model: &ModelDir, ui: &Ui) -> Result<Option<Value>> {
        let Some(test) = corpus::test(self.data, (&model.checkpoint).into(), ui)? else { return Ok(None) };
        let classifier = Classifier::new(model, None)?;
        let (examples, logits) = classifier.answers(&test.set, self.threads)?;
        warn_of_lost_words(&examples, "test data", ui);
        let problem = classifier.task().problem;
        let figures = metrics::measure(problem, &logits, examples.targets(), classifier.labels());
        let mut figures = serde_json::to_value(&figures)?;
        figures["data"] = json!(test.hash);
        Ok(Some(figures))
    }
}

/// Says how many words have no answer.
pub fn warn_of_lost_words(examples: &Examples, what: &str, ui: &Ui) {
    if examples.lost_words > 0 {
        let (lost, all) = (examples.lost_words, examples.lost_words + examples.count());
        ui.warn(format!(
            "{what}: {lost} of {all} words stand behind the longest text (max-length) or have no token; they are left out"
        ));
    }
}

/// The right to write into a folder, which is made, for as long as the file lives. While another process has it, `wait`
/// says whether to wait.
pub fn alone(folder: &Path, wait: impl FnOnce() -> bool) -> Result<File> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(".lock");
    let cannot = || format!("cannot lock {}", path.display());
    let file = File::options().create(true).write(true).truncate(false).open(&path).with_context(cannot)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) if wait() => file.lock().with_context(cannot)?,
        Err(TryLockError::WouldBlock) => anyhow::bail!("{}: another process is writing there", folder.display()),
        // A file system without locks: there is nothing to wait for.
        Err(TryLockError::Error(e)) => tracing::debug!(%e, "no lock"),
    }
    Ok(file)
}

/// JSON for a file.
pub fn pretty(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    Ok(json)
}

/// To so many decimals, for figures that are read by people too.
pub fn round(x: f64, decimals: i32) -> f64 {
    let scale = 10f64.powi(decimals);
    (x * scale).round() / scale
}

/// `student: 92.5% accuracy, 17.3 M parameters, 69.3 MB, 3 min 12 s`.
fn summary(report: &Value) -> String {
    let mut parts = vec![];
    if let Some(accuracy) = report["test"]["accuracy"].as_f64() {
        parts.push(format!("test accuracy {}", percent(accuracy)));
    }
    for (key, name) in [("micro_f1", "micro-F1"), ("r2", "R2"), ("mae", "mean absolute error")] {
        if let Some(x) = report["test"][key].as_f64() {
            parts.push(format!("test {name} {x:.4}"));
        }
    }
    if let Some(n) = report["parameters"].as_f64() {
        parts.push(format!("{:.2} M parameters", n / 1e6));
    }
    if let Some(bytes) = report["disk_bytes"].as_u64() {
        parts.push(format!("{:.1} MB", mb(bytes)));
    }
    if let Some(s) = report["seconds"].as_f64() {
        parts.push(duration(s));
    }
    format!("{}: {}", report["id"].as_str().unwrap_or("?"), parts.join(", "))
}

/// What differs between two provenances, in words.
fn differences(a: &Provenance, b: &Provenance) -> Vec<String> {
    let mut found = vec![];
    if a.stage != b.stage {
        found.push(format!("stage {}, now {}", a.stage, b.stage));
    }
    if a.tool != b.tool {
        found.push(format!("{}, now {}", a.tool, b.tool));
    }
    for (role, hash) in &b.inputs {
        if a.inputs.get(role) != Some(hash) {
            found.push(format!("another {role}"));
        }
    }
    for (key, new) in &b.settings {
        match a.settings.get(key) {
            Some(old) if old == new => {}
            Some(old) => found.push(format!("{key} was {old}, is {new}")),
            None => found.push(format!("{key} is {new}")),
        }
    }
    match found.is_empty() {
        true => vec!["other settings".into()],
        false => found,
    }
}
