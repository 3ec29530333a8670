//! Hugging Face model directories: `config.json`, safetensors (one file or shards) and the tokenizer's files.
//!
//! Every tensor is read by what is stored, never by a skip list. A wrong file gives one error with every missing,
//! extra and wrong tensor in it.

mod pickle;
mod rows;
mod shards;
mod tensor;

use crate::atomic::Folder;
use crate::checkpoint::Checkpoint;
use crate::config::{self, Config};
use crate::error::{Error, Result};
use crate::spec::{ModelSpec, Tensor, TensorDef};
use crate::task::Task;
use crate::tokenizer::TokenizerFiles;
use serde_json::{Map, Value};
use shards::Shards;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

pub use rows::{RowType, Rows};

/// A model directory in memory.
#[derive(Clone, Debug)]
pub struct ModelDir {
    /// Shape, labels, weights, config.
    pub checkpoint: Checkpoint,
    /// The tokenizer's files, byte for byte.
    pub tokenizer: TokenizerFiles,
}

/// The weights' file name.
pub const WEIGHTS: &str = "model.safetensors";
/// Which shard has which tensor, if there are several.
pub const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// The weights' file name in old directories; read only where there is none of the above.
pub const PICKLE: &str = "pytorch_model.bin";
/// Its index.
pub const PICKLE_INDEX: &str = "pytorch_model.bin.index.json";

/// Files that belong to the tokenizer.
pub const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
];

/// Reads a model directory. Tokenizer files that are not there are left out: `Tokenizer::new` says what it misses.
///
/// # Errors
/// A file is missing or cannot be read, the config is not supported, or the tensors are not those of the config.
pub fn read(path: impl AsRef<Path>) -> Result<ModelDir> {
    let path = path.as_ref();
    let checkpoint = read_checkpoint(path)?;
    Ok(ModelDir { checkpoint, tokenizer: read_tokenizer(path)? })
}

/// The tokenizer files of a model directory.
///
/// # Errors
/// A file is there and cannot be read.
pub fn read_tokenizer(path: impl AsRef<Path>) -> Result<TokenizerFiles> {
    let mut files = BTreeMap::new();
    for name in TOKENIZER_FILES {
        let file = path.as_ref().join(name);
        match std::fs::read(&file) {
            Ok(bytes) => drop(files.insert(name.to_owned(), bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(file)(e)),
        }
    }
    Ok(TokenizerFiles { files })
}

/// Reads shape, labels and weights of a model directory.
///
/// # Errors
/// As [`read`].
pub fn read_checkpoint(path: impl AsRef<Path>) -> Result<Checkpoint> {
    Source::open(path)?.checkpoint()
}

/// A model directory that is open: its shape is known, tensors are read when they are wanted.
pub struct Source {
    path: PathBuf,
    json: Map<String, Value>,
    config: Config,
    shards: Shards,
    table: HashMap<Tensor, TensorDef>,
    /// Entries of the files that were asked for.
    used: HashSet<String>,
}

impl Source {
    /// Reads config.json and the headers of the weights.
    ///
    /// # Errors
    /// A file is missing or is not what its name says, or the config is not supported.
    pub fn open(path: impl AsRef<Path>) -> Result<Source> {
        let path = path.as_ref();
        if !path.is_dir() {
            let found = if path.exists() { "is not a folder" } else { "no such folder" };
            return Err(Error::file(
                path,
                format!("{found}; expected a model directory with config.json and {WEIGHTS}"),
            ));
        }
        let config_path = path.join("config.json");
        let json = std::fs::read(&config_path).map_err(Error::io(&config_path))?;
        let json: Map<String, Value> = serde_json::from_slice(&json)
            .map_err(|e| Error::file(&config_path, format!("not a JSON object: {e}")))?;
        let shards = Shards::open(path)?;
        let config = config::parse(&json, &shards.shapes(), &config_path)?;
        let table = config.spec.tensors().into_iter().map(|def| (def.tensor, def)).collect();
        Ok(Source { path: path.to_owned(), json, config, shards, table, used: HashSet::new() })
    }

    /// The shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.config.spec
    }

    /// Label names by class index.
    pub fn labels(&self) -> &[String] {
        &self.config.labels
    }

    /// What the model is asked; nothing for a bare body.
    pub fn task(&self) -> Option<Task> {
        Task::of(&self.config.spec, &self.json)
    }

    /// Longest input in tokens that the model was made for, if it says so.
    pub fn max_length(&self) -> Option<usize> {
        self.config.max_length
    }

    /// All tensors.
    ///
    /// # Errors
    /// Everything that is wrong with the tensors.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let mut used = HashSet::new();
        let mut reader = tensor::Reader::new(&self.shards, &self.config, &mut used);
        let table = self.config.spec.tensors();
        let mut stored = table.iter().map(|def| reader.read(def)).collect::<Vec<_>>().into_iter();
        let problems = reader.finish();
        self.shards.release();
        self.report(&problems)?;
        let next = |def: &TensorDef| {
            stored
                .next()
                .flatten()
                .ok_or_else(|| Error::file(&self.path, format!("tensor {} was not read", def.name)))
        };
        let mut checkpoint = Checkpoint::from_fn(self.config.spec.clone(), self.config.labels.clone(), next)?;
        checkpoint.max_length = self.config.max_length;
        checkpoint.config = self.json.clone();
        checkpoint.warnings = self.config.warnings.clone();
        Ok(checkpoint)
    }

    /// Some tensors; the pages of the file that held them are given back.
    ///
    /// # Errors
    /// As [`Source::checkpoint`]: what is wrong with all of them.
    pub fn part(&mut self, tensors: &[Tensor]) -> Result<Checkpoint> {
        let mut reader = tensor::Reader::new(&self.shards, &self.config, &mut self.used);
        let read = |t: &Tensor| Some((*t, reader.read(self.table.get(t)?)?));
        let read: Option<Vec<_>> = tensors.iter().map(read).collect();
        self.shards.release();
        match read {
            Some(tensors) => Ok(Checkpoint::part(self.config.spec.clone(), tensors)),
            None => Err(self.broken()),
        }
    }

    /// The rows of a table, left in the file.
    ///
    /// # Errors
    /// As [`Source::part`].
    pub fn rows(&mut self, tensor: Tensor) -> Result<Rows> {
        let mut reader = tensor::Reader::new(&self.shards, &self.config, &mut self.used);
        let rows = self.table.get(&tensor).and_then(|def| reader.rows(def));
        self.shards.release();
        match rows {
            Some(rows) if rows.is_finite()? => Ok(rows),
            _ => Err(self.broken()),
        }
    }

    /// That no tensor is left in the files that nobody asked for.
    ///
    /// # Errors
    /// There is one.
    pub fn finish(mut self) -> Result<()> {
        let problems = tensor::Reader::new(&self.shards, &self.config, &mut self.used).finish();
        self.report(&problems)
    }

    fn report(&self, problems: &[String]) -> Result<()> {
        if problems.is_empty() {
            return Ok(());
        }
        let (n, spec) = (problems.len(), &self.config.spec);
        Err(Error::file(
            &self.path,
            format!(
                "{n} {} with config.json ({} of {} layers and {} labels):\n  {}",
                if n == 1 { "tensor does not agree" } else { "tensors do not agree" },
                config::architecture(spec),
                spec.layers.len(),
                spec.head.labels(),
                problems.join("\n  ")
            ),
        ))
    }

    /// One tensor cannot be used: the error that names all of them.
    fn broken(&self) -> Error {
        let changed = || Error::file(&self.path, "the weights changed while they were read");
        self.checkpoint().err().unwrap_or_else(changed)
    }
}

/// Writes a model directory: it appears whole or not at all.
///
/// # Errors
/// `path` exists and `force` is off, the disk is full, or the checkpoint cannot be said in config.json.
pub fn write(path: impl AsRef<Path>, model: &ModelDir, force: bool) -> Result<()> {
    let folder = Folder::create(path, force)?;
    write_into(&folder, model)?;
    folder.commit()
}

/// Writes a model directory's files into a folder in the making, those of a WordPiece tokenizer that are missing included.
///
/// # Errors
/// As [`write()`].
pub fn write_into(folder: &Folder, model: &ModelDir) -> Result<()> {
    let config = config::render(&model.checkpoint)?;
    let mut json =
        serde_json::to_string_pretty(&config).map_err(|e| Error::invalid(format!("config.json: {e}")))?;
    json.push('\n');
    folder.write("config.json", json.as_bytes())?;
    folder.write(WEIGHTS, &tensor::serialize(&model.checkpoint)?)?;
    let longest = model.checkpoint.max_length.unwrap_or_else(|| model.checkpoint.spec.longest());
    for (name, bytes) in &model.tokenizer.complete(longest)?.files {
        folder.write(name, bytes)?;
    }
    Ok(())
}
