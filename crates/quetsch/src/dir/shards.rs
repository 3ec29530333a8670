//! The files with a model directory's weights, memory-mapped, as one table of named tensors.

use super::{PICKLE, PICKLE_INDEX, WEIGHTS, WEIGHTS_INDEX, pickle};
use crate::config::Shapes;
use crate::error::{Error, Result};
use quetsch_kernels::map::Map;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One tensor of the file.
#[derive(Clone, Debug)]
pub struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    shard: usize,
    range: Range<usize>,
}

/// All weights of a folder. The files are opened once: one that is replaced by another of its name (written
/// beside it and renamed) is still the old one here.
pub struct Shards {
    files: Vec<(Arc<File>, PathBuf)>,
    maps: Vec<Map>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    pub fn open(dir: &Path) -> Result<Shards> {
        let (files, index) = find(dir)?;
        let mut shards = Shards { files: vec![], maps: vec![], entries: BTreeMap::new() };
        for file in files {
            shards.add(file)?;
        }
        let promised = index.weight_map.iter();
        let broken: Vec<_> = promised.filter(|(name, _)| !shards.entries.contains_key(&rename(name))).collect();
        if !broken.is_empty() {
            let list: Vec<_> = broken.iter().map(|(name, file)| format!("{name} in {file}")).collect();
            return Err(Error::file(
                dir.join(WEIGHTS_INDEX),
                format!("lists tensors that are not there: {}", list.join(", ")),
            ));
        }
        Ok(shards)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        // Asked first: to open a pipe is to wait for its writer.
        let kind = std::fs::metadata(&path).map_err(Error::io(&path))?.file_type();
        if !kind.is_file() {
            let found = if kind.is_dir() { "a folder" } else { "no regular file" };
            return Err(Error::file(&path, format!("is {found}, expected a file with weights")));
        }
        let file = File::open(&path).map_err(Error::io(&path))?;
        // Model files are written whole and renamed into place, never changed where they stand.
        let map = Map::of(&file).map_err(Error::io(&path))?;
        let found = match path.extension().is_some_and(|e| e == "bin") {
            _ if map.starts_with(LFS_POINTER) => {
                Err("is a Git LFS pointer, not the file it points to: fetch that with `git lfs pull`".into())
            }
            true => pickle::tensors(&map).map_err(|e| format!("{e}; {}", convert(path.parent().unwrap_or(&path)))),
            false => header(&map),
        };
        let found = found.map_err(|message| Error::file(&path, message))?;
        for (name, dtype, shape, range) in found {
            let name = rename(&name);
            let entry = Entry { dtype, shape, shard: self.maps.len(), range };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(Error::file(&path, format!("tensor {name} stands in the file or the shards twice")));
            }
        }
        self.maps.push(map);
        self.files.push((Arc::new(file), path));
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.maps[entry.shard][entry.range.clone()]
    }

    /// The file of an entry, its path, and where in it the entry starts.
    pub fn place(&self, entry: &Entry) -> (Arc<File>, &Path, u64) {
        let (file, path) = &self.files[entry.shard];
        (file.clone(), path, entry.range.start as u64)
    }

    /// Gives the memory of all pages read so far back; they are read again from the file when they are wanted again.
    pub fn release(&self) {
        self.maps.iter().for_each(Map::release);
    }

    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.entries.keys()
    }

    pub fn shapes(&self) -> Shapes {
        self.entries.iter().map(|(name, e)| (name.clone(), e.shape.clone())).collect()
    }
}

/// How a text begins that git keeps in place of a large file.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// What to do with a pickle that is not read.
fn convert(dir: &Path) -> String {
    let place = dir.display();
    format!(
        "convert once with: python3 -c \"from transformers \
         import AutoModelForSequenceClassification as M; M.from_pretrained('{place}').save_pretrained('{place}')\" \
         (AutoModel for a bare encoder)"
    )
}

/// LayerNorm's names in very old files.
fn rename(name: &str) -> String {
    match name.strip_suffix("LayerNorm.gamma") {
        Some(p) => format!("{p}LayerNorm.weight"),
        None => match name.strip_suffix("LayerNorm.beta") {
            Some(p) => format!("{p}LayerNorm.bias"),
            None => name.to_owned(),
        },
    }
}

/// The files with the weights of a folder, and the index if there is one. safetensors come first; old repositories have
/// pickles only.
fn find(dir: &Path) -> Result<(Vec<PathBuf>, Index)> {
    for (single, index) in [(WEIGHTS, WEIGHTS_INDEX), (PICKLE, PICKLE_INDEX)] {
        let single = dir.join(single);
        if single.exists() {
            return Ok((vec![single], Index { weight_map: BTreeMap::new() }));
        }
        let index = dir.join(index);
        if index.exists() {
            return listed(dir, &index);
        }
    }
    let looked = [WEIGHTS, WEIGHTS_INDEX, PICKLE, PICKLE_INDEX].join(", ");
    Err(Error::file(dir, format!("no weights found; looked for {looked}")))
}

fn listed(dir: &Path, index: &Path) -> Result<(Vec<PathBuf>, Index)> {
    let json = std::fs::read(index).map_err(Error::io(index))?;
    let parsed: Index =
        serde_json::from_slice(&json).map_err(|e| Error::file(index, format!("not a shard index: {e}")))?;
    let files: BTreeSet<&String> = parsed.weight_map.values().collect();
    if let Some(outside) = files.iter().find(|f| Path::new(f).file_name() != Some(f.as_ref())) {
        return Err(Error::file(index, format!("shard {outside:?} is not a plain file name")));
    }
    if files.is_empty() {
        return Err(Error::file(index, "weight_map is empty"));
    }
    Ok((files.into_iter().map(|f| dir.join(f)).collect(), parsed))
}

pub(super) type Found = Vec<(String, Dtype, Vec<usize>, Range<usize>)>;

/// Name, type, shape and byte range of every tensor of a safetensors file. Nothing is allocated on the word of the
/// file: lengths are compared with the file's own first.
fn header(file: &[u8]) -> std::result::Result<Found, String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("is {} bytes long, too short for a safetensors file", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    let Some(json) = usize::try_from(length).ok().and_then(|n| rest.get(..n)) else {
        return Err(format!(
            "the safetensors header says it is {length} bytes long, the file has {} after it: truncated or no \
             safetensors file",
            rest.len()
        ));
    };
    let metadata: Metadata =
        serde_json::from_slice(json).map_err(|e| format!("the safetensors header cannot be read: {e}"))?;
    let data = rest.len() - json.len();
    if metadata.data_len() != data {
        return Err(format!(
            "the safetensors header describes {} bytes of tensors, the file holds {data}: truncated or damaged",
            metadata.data_len()
        ));
    }
    let start = 8 + json.len();
    let one = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (from, to) = info.data_offsets;
        (name, info.dtype, info.shape.clone(), start + from..start + to)
    };
    Ok(metadata.tensors().into_iter().map(one).collect())
}
