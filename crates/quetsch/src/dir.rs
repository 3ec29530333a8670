//! Hugging Face model directories: `config.json`, safetensors (one file or shards) and the tokenizer's files.
//!
//! Every tensor is read by what is stored, never by a skip list. A wrong file gives one error with every missing,
//! extra and wrong tensor in it.

mod pickle;
mod shards;
mod tensor;

use crate::atomic::Folder;
use crate::checkpoint::Checkpoint;
use crate::config;
use crate::error::{Error, Result};
use crate::tokenizer::TokenizerFiles;
use serde_json::{Map, Value};
use shards::Shards;
use std::collections::BTreeMap;
use std::path::Path;

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
    let map: Map<String, Value> =
        serde_json::from_slice(&json).map_err(|e| Error::file(&config_path, format!("not a JSON object: {e}")))?;
    let shards = Shards::open(path)?;
    assemble(map, &shards, &config_path, path)
}

fn assemble(map: Map<String, Value>, shards: &Shards, config_path: &Path, path: &Path) -> Result<Checkpoint> {
    let config = config::parse(&map, &shards.shapes(), config_path)?;
    let mut reader = tensor::Reader::new(shards, &config);
    let table = config.spec.tensors();
    let mut stored = table.iter().map(|def| reader.read(def)).collect::<Vec<_>>().into_iter();
    let problems = reader.finish();
    if !problems.is_empty() {
        let n = problems.len();
        return Err(Error::file(
            path,
            format!(
                "{n} {} with config.json ({} layers, {:?}):\n  {}",
                if n == 1 { "tensor does not agree" } else { "tensors do not agree" },
                config.spec.layers.len(),
                config.spec.head,
                problems.join("\n  ")
            ),
        ));
    }
    let next = |def: &crate::spec::TensorDef| {
        stored.next().flatten().ok_or_else(|| Error::file(path, format!("tensor {} was not read", def.name)))
    };
    let mut checkpoint = Checkpoint::from_fn(config.spec, config.labels, next)?;
    checkpoint.max_length = config.max_length;
    checkpoint.config = map;
    checkpoint.warnings = config.warnings;
    Ok(checkpoint)
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

/// Writes a model directory's files into a folder in the making.
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
    for (name, bytes) in &model.tokenizer.files {
        folder.write(name, bytes)?;
    }
    Ok(())
}
