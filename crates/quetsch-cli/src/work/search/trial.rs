//! One trial: a recipe with one stage, and how it went.

use super::pool::{End, Task};
use super::{Search, Shape};
use crate::recipe::{Kind, Recipe, Stage};
use crate::ui::{duration, percent};
use crate::work::corpus::hash_of;
use crate::work::provenance;
use anyhow::{Context, Result};
use quetsch::atomic::write_file;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use std::fmt;
use std::path::{Path, PathBuf};

/// The stage of a trial's recipe, and so the folder of its model.
const MODEL: &str = "model";
/// Share of the validation part that `keep = ["auto"]` measures on; the rest calibrates.
const SENSITIVITY: f64 = 0.5;

/// How far a trial is.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Not begun, or not at its end.
    Planned,
    /// Its model is there.
    Done,
    /// Its message.
    Failed(String),
    /// It would not have ended in time.
    OutOfTime,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Status::Planned => f.write_str("not done"),
            Status::Done => f.write_str("done"),
            Status::Failed(why) => write!(f, "failed: {why}"),
            Status::OutOfTime => f.write_str("not begun: it would not have ended in time"),
        }
    }
}

/// A model that the search makes.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Trial {
    /// Shape, and what was done with it.
    pub name: String,
    /// teacher, student, round, vocabulary or storage.
    pub stage: &'static str,
    /// Hash of all that the model is made from.
    pub key: String,
    /// Folder of the model.
    pub dir: PathBuf,
    /// Its shape, in the rounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<Shape>,
    /// The round, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rung: Option<usize>,
    /// Epochs of this trial alone.
    pub epochs: usize,
    /// Multiply-accumulates of one sentence.
    pub macs: f64,
    /// How far it is.
    pub status: Status,
    /// What it took.
    pub seconds: f64,
    /// On the validation part.
    #[serde(rename = "validation_accuracy", skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of the weights' files.
    pub disk_bytes: u64,
    /// Its stage; a model that is there before the search has none.
    #[serde(skip)]
    pub kind: Option<Kind>,
}

/// Hash of a stage without the places of its inputs, which `inputs` stands for.
pub fn key(kind: &Kind, inputs: &str, data: &str, seed: u64) -> Result<String> {
    let mut section = serde_json::to_value(kind)?[kind.name()].take();
    if let Value::Object(keys) = &mut section {
        keys.retain(|k, _| !["model", "teacher"].contains(&k.as_str()));
    }
    let tool = env!("CARGO_PKG_VERSION");
    Ok(hash_of(&[tool, kind.name(), &section.to_string(), inputs, data, &seed.to_string()]))
}

/// A folder as recipes name it, which is never taken for the id of a stage.
pub fn place(dir: &Path) -> String {
    match dir.components().count() > 1 || dir.is_absolute() {
        true => dir.display().to_string(),
        false => Path::new(".").join(dir).display().to_string(),
    }
}

impl Trial {
    /// One that is to be run in a folder under `trials`, which the key names.
    pub fn planned(name: String, stage: &'static str, key: String, trials: &Path, kind: Kind) -> Trial {
        let dir = trials.join(format!("{name}-{}", &key[..8])).join(MODEL);
        let planned = Trial::given(&name, key, &dir);
        Trial { stage, status: Status::Planned, kind: Some(kind), ..planned }
    }

    /// A model that is there before the search.
    pub fn given(name: &str, key: String, folder: &Path) -> Trial {
        Trial {
            name: name.into(),
            stage: "teacher",
            key,
            dir: folder.to_path_buf(),
            shape: None,
            rung: None,
            epochs: 0,
            macs: 0.0,
            status: Status::Done,
            seconds: 0.0,
            accuracy: None,
            parameters: 0,
            disk_bytes: 0,
            kind: None,
        }
    }

    /// Whether the trial is done, or begun and can go on.
    pub fn is_there(&self) -> bool {
        let state = self.dir.with_file_name(format!(".{MODEL}.training"));
        self.dir.join(provenance::FILE).exists() || state.exists()
    }

    /// What a training costs: multiply-accumulates times epochs, for each sentence.
    pub fn work(&self) -> f64 {
        self.macs * self.epochs as f64
    }

    /// Writes the recipe.
    pub fn write(&self, search: &Search) -> Result<Task> {
        let out = self.dir.parent().context("a trial's model has a folder")?.to_path_buf();
        let mut data = search.data.clone();
        // How much each layer minds being quantised is measured on what choices are made on; no weight is trained on it.
        if let Some(Kind::Quantize(s)) = &self.kind
            && s.measures_sites()
            && !s.trains()
        {
            (data.train, data.validation) = (data.test.clone(), SENSITIVITY);
        }
        let recipe = Recipe {
            model: None,
            out: out.clone(),
            seed: search.file.seed,
            threads: None,
            cache: Some(search.file.out.join("cache")),
            fetched: None,
            card: Default::default(),
            data,
            stages: self.kind.iter().map(|kind| Stage { id: MODEL.into(), kind: kind.clone() }).collect(),
            warnings: vec![],
        };
        std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
        let task = Task { recipe: out.join("recipe.toml"), log: out.join("log.txt") };
        write_file(&task.recipe, recipe.to_toml()?.as_bytes())?;
        Ok(task)
    }

    /// Takes down how it went.
    pub fn end(&mut self, end: End) {
        self.status = match end {
            End::Refused => Status::OutOfTime,
            End::Failed(why) => Status::Failed(why),
            End::Done => match self.read() {
                Ok(()) => Status::Done,
                Err(e) => Status::Failed(format!("{e:#}")),
            },
        };
    }

    /// Reads the figures of the stage's report.
    fn read(&mut self) -> Result<()> {
        let path = self.dir.join(crate::work::REPORT);
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let report: Value =
            serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        self.accuracy = report["test"]["accuracy"].as_f64();
        self.seconds = report["seconds"].as_f64().unwrap_or(0.0);
        self.parameters = report["parameters"].as_u64().unwrap_or(0);
        self.disk_bytes = report["disk_bytes"].as_u64().unwrap_or(0);
        Ok(())
    }

    /// For the log.
    pub fn line(&self) -> String {
        match (&self.status, self.accuracy) {
            (Status::Done, Some(a)) => {
                let seconds = duration(self.seconds);
                format!("{:24} {} on the validation part, {seconds}", self.name, percent(a))
            }
            (status, _) => format!("{:24} {status}", self.name),
        }
    }
}
