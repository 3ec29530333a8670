//! The data of a run: read, checked, split and named by the hash of its bytes.

use crate::settings::Data;
use crate::ui::Ui;
use anyhow::{Context, Result, anyhow};
use quetsch::atomic::write_file;
use quetsch::checkpoint::Checkpoint;
use quetsch::data::{self, Dataset, Overlap, ReadOptions};
use quetsch::runtime::Classifier;
use quetsch::task::{Level, Task};
use serde::Serialize;
use std::path::Path;

/// Training data, without its validation part.
pub struct Training {
    /// What is trained on.
    pub train: Dataset,
    /// What settings are chosen on; may be empty.
    pub validation: Dataset,
    /// Texts that only a teacher says something about; they stand behind the others.
    pub unlabelled: Vec<String>,
    /// blake3 of the file, and of the split.
    pub hash: String,
}

impl Training {
    /// Adds texts without labels.
    pub fn add_unlabelled(&mut self, path: &Path, data: &Data) -> Result<()> {
        self.unlabelled = data::read_texts(Some(path), data.text_col.as_deref())?;
        self.unlabelled.retain(|t| !t.trim().is_empty());
        self.hash = hash_of(&[&self.hash, &hash_file(path)?]);
        Ok(())
    }

    /// The texts without labels as a set.
    pub fn open(&self) -> Dataset {
        let words = match self.train.task.level {
            Level::Sentence => vec![],
            Level::Token => self.unlabelled.iter().map(|text| data::split_words(text)).collect(),
        };
        let (task, names) = (self.train.task, self.train.names.clone());
        Dataset { task, names, words, texts: self.unlabelled.clone(), ..Dataset::default() }
    }
}

/// Test data.
pub struct Test {
    /// What is measured on.
    pub set: Dataset,
    /// blake3 of the file.
    pub hash: String,
}

/// The data's part of a report.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// Sentences trained on.
    pub train: usize,
    /// Sentences that settings were chosen on; 0 means that the model was trained on all training data.
    pub validation: usize,
    /// Sentences measured on.
    pub test: usize,
    /// Number of labels.
    pub labels: usize,
    /// Duplicates and leaks.
    #[serde(flatten)]
    pub overlap: Overlap,
}

/// What labels must be, if the data are not to tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted<'a> {
    /// The label order.
    names: &'a [String],
    /// The task.
    task: Option<Task>,
}

impl<'a> From<&'a Checkpoint> for Wanted<'a> {
    fn from(ck: &'a Checkpoint) -> Wanted<'a> {
        Wanted { names: &ck.labels, task: ck.task() }
    }
}

impl<'a> From<&'a Classifier> for Wanted<'a> {
    fn from(model: &'a Classifier) -> Wanted<'a> {
        Wanted { names: model.labels(), task: Some(model.task()) }
    }
}

impl<'a> From<&'a Dataset> for Wanted<'a> {
    fn from(set: &'a Dataset) -> Wanted<'a> {
        Wanted { names: &set.names, task: Some(set.task) }
    }
}

/// The settings that say how a file is read, in one line; as it was before there were more than two.
pub fn columns(data: &Data) -> String {
    let mut columns = format!("{:?} {:?}", data.text_col, data.label_col);
    if data.label_separator.is_some() || data.task.is_some() {
        columns += &format!(" {:?} {:?}", data.label_separator, data.task);
    }
    columns
}

/// Reads labelled data.
pub fn read(path: &Path, data: &Data, wanted: Wanted) -> Result<Dataset> {
    let asked = data.task.map(|t| t.problem());
    if let (Some(asked), Some(task)) = (asked, wanted.task.filter(|t| Some(t.problem) != asked)) {
        return Err(crate::exit::usage(format!("--task {asked}, but the model's task is {task}")));
    }
    let options = ReadOptions {
        text_col: data.text_col.clone(),
        label_col: data.label_col.clone(),
        names: (!wanted.names.is_empty()).then(|| wanted.names.to_vec()),
        problem: asked.or(wanted.task.map(|t| t.problem)),
        level: wanted.task.map(|t| t.level),
        separator: data.label_separator.clone(),
    };
    let set = data::read(path, &options)?;
    if set.is_empty() {
        return Err(anyhow!("{}: no row in it; expected a text and a label a row", path.display()));
    }
    Ok(set)
}

/// Reads and splits the training data.
pub fn training(data: &Data, wanted: Wanted, seed: u64, ui: &Ui) -> Result<Training> {
    let path = data.train.as_ref().ok_or_else(|| crate::exit::usage("no training data: give --train FILE"))?;
    let set = read(path.as_ref(), data, wanted)?;
    for warning in &set.warnings {
        ui.warn(format!("{path}: {warning}"));
    }
    let bytes = hash_file(path.as_ref())?;
    // Without a part set aside, the seed of the split decides nothing.
    let split = if data.validation == 0.0 { String::new() } else { format!("{} {seed}", data.validation) };
    let hash = hash_of(&[&bytes, &split, &columns(data)]);
    let (train, validation) = data::split(&set, data.validation, seed);
    Ok(Training { train, validation, unlabelled: vec![], hash })
}

/// Reads the test data, if there is any.
pub fn test(data: &Data, wanted: Wanted, ui: &Ui) -> Result<Option<Test>> {
    let Some(path) = &data.test else { return Ok(None) };
    let set = read(path.as_ref(), data, wanted)?;
    for warning in &set.warnings {
        ui.warn(format!("{path}: {warning}"));
    }
    Ok(Some(Test { set, hash: hash_file(path.as_ref())? }))
}

/// The report's part on the data.
pub fn facts(training: &Training, test: Option<&Test>) -> Facts {
    let empty = training.train.subset([]);
    let mut all = training.train.clone();
    all.extend(&training.validation);
    let measured = test.map_or(&empty, |t| &t.set);
    Facts {
        train: training.train.len(),
        validation: training.validation.len(),
        test: measured.len(),
        labels: all.names.len(),
        overlap: data::overlap(&all, measured),
    }
}

/// Writes the parts of a split as tables, `NAME.csv`, and their label order beside them. One label a text; `data` names
/// the columns. Returns the paths.
pub fn write_parts<const N: usize>(
    folder: &Path,
    data: &Data,
    parts: [(&str, &Dataset); N],
) -> Result<[String; N]> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let columns = [data.text_col.as_deref().unwrap_or("text"), data.label_col.as_deref().unwrap_or("label")];
    let mut paths = [const { String::new() }; N];
    for (path, (name, set)) in paths.iter_mut().zip(parts) {
        let mut csv = csv::Writer::from_writer(vec![]);
        csv.write_record(columns)?;
        for (text, label) in set.texts.iter().zip(&set.labels) {
            csv.write_record([text, &set.names[*label as usize]])?;
        }
        let file = folder.join(format!("{name}.csv"));
        write_file(&file, &csv.into_inner().context("a table in memory")?)?;
        *path = file.display().to_string();
        // The order of the labels is that of the user's file, whatever comes first in a part of it.
        write_file(folder.join("categories.json"), &super::pretty(&set.names)?)?;
    }
    Ok(paths)
}

/// blake3 of a file's bytes; where a name fits several files, of their hashes.
pub fn hash_file(path: &Path) -> Result<String> {
    let one = |path: &Path| -> Result<String> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(blake3::hash(&bytes).to_hex().to_string())
    };
    match &data::files(path)?[..] {
        [file] => one(file),
        files => {
            let hashes = files.iter().map(|file| one(file)).collect::<Result<Vec<_>>>()?;
            Ok(hash_of(&hashes.iter().map(String::as_str).collect::<Vec<_>>()))
        }
    }
}

/// blake3 of several texts, their borders included.
pub fn hash_of(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// blake3 of a model directory: its config, weights and tokenizer, not its reports.
pub fn hash_model(dir: &Path) -> Result<String> {
    // PyTorch's own files are read only where there are no others.
    let (mut names, mut pickles): (Vec<String>, Vec<String>) = (vec![], vec![]);
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read the model {}", dir.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("pytorch_model") && name.ends_with(".bin") {
            pickles.push(name);
            continue;
        }
        let counts = name.ends_with(".safetensors")
            || name == "config.json"
            || quetsch::dir::TOKENIZER_FILES.contains(&name.as_str());
        if counts {
            names.push(name);
        }
    }
    if !names.iter().any(|name| name.ends_with(".safetensors")) {
        names.extend(pickles);
    }
    names.sort();
    let mut parts = vec![];
    for name in names {
        parts.push(hash_file(&dir.join(&name))?);
        parts.push(name);
    }
    Ok(hash_of(&parts.iter().map(String::as_str).collect::<Vec<_>>()))
}

/// Bytes of a model directory's weights and of its other model files.
pub fn disk_bytes(dir: &Path) -> u64 {
    let weights = |name: &str| name.ends_with(".safetensors");
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|e| weights(&e.file_name().to_string_lossy()))
        .filter_map(|e| std::fs::metadata(e.path()).ok()) // of what a link of the hub's cache points to
        .map(|m| m.len())
        .sum()
}
