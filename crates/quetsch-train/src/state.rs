//! Training state on disk: what a run needs to go on after it was killed and end with the same bytes.
//!
//! One safetensors file with the trained weights and both moments, in a folder that appears whole; its metadata holds
//! the step and the key of the run (a hash of its inputs and settings). Everything else that a run depends on is a
//! function of the seed and the step.

use crate::optim::AdamW;
use crate::params::Params;
use quetsch::{Error, Result, atomic};
use safetensors::tensor::{Dtype, SafeTensors, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

/// Where and how often the state is saved.
#[derive(Clone, Debug)]
pub struct State<'a> {
    /// The folder; made if it is not there.
    pub dir: &'a Path,
    /// Saved every so many steps, besides every epoch; 0 for epochs only.
    pub every_steps: usize,
    /// Go on from a state that is there; otherwise one that is there is overwritten.
    pub resume: bool,
    /// Hash of the run's inputs and settings: a state of another run is refused.
    pub key: String,
}

const FORMAT: &str = "quetsch-training-state-2";
const UPDATED: &str = "word.updated";
const HISTORY: &str = "history";
/// absmax of static inputs, in the order of the linears: they move during quantisation-aware training.
const RANGES: &str = "input.absmax";
const FILE: &str = "state.safetensors";

struct Floats<'a> {
    data: &'a [f32],
    shape: [usize; 1],
}

impl View for &Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
    }
    fn data_len(&self) -> usize {
        self.data.len() * 4
    }
}

impl State<'_> {
    /// Saves weights, moments and step.
    pub(crate) fn save(&self, p: &Params, adamw: &AdamW) -> Result<()> {
        let trained = || p.table.iter().enumerate().filter(|(i, _)| p.trained[*i]);
        let mut tensors = vec![];
        for (i, d) in trained() {
            for (kind, data) in [("w", &p.data[i]), ("m", &adamw.m[i]), ("v", &adamw.v[i])] {
                tensors.push((format!("{kind}.{}", d.name), Floats { data, shape: [data.len()] }));
            }
        }
        // Rows of the word table wait for their steps: how long each has, and which those were.
        let updated: Vec<f32> = adamw.updated.iter().map(|u| *u as f32).collect();
        for (name, data) in [(UPDATED, &updated[..]), (HISTORY, adamw.history().as_flattened())] {
            tensors.push((name.to_string(), Floats { data, shape: [data.len()] }));
        }
        let ranges: Vec<f32> = p.quant.iter().flat_map(|q| q.qat.ranges.values().copied()).collect();
        if !ranges.is_empty() {
            tensors.push((RANGES.to_string(), Floats { data: &ranges, shape: [ranges.len()] }));
        }
        let meta = HashMap::from([
            ("format".to_string(), FORMAT.to_string()),
            ("step".to_string(), adamw.step.to_string()),
            ("key".to_string(), self.key.clone()),
        ]);
        let folder = atomic::Folder::create(self.dir, true)?;
        let path = folder.path().join(FILE);
        let views = tensors.iter().map(|(n, t)| (n.as_str(), t));
        safetensors::serialize_to_file(views, Some(meta), &path).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => Error::io(self.dir.join(FILE))(e),
            e => Error::file(self.dir.join(FILE), e.to_string()),
        })?;
        File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io(&path))?;
        folder.commit()
    }

    /// Puts a saved state into weights and optimiser; false if there is none.
    pub(crate) fn load(&self, p: &mut Params, adamw: &mut AdamW) -> Result<bool> {
        let path = self.dir.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(b) => b,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::io(&path)(e)),
        };
        let bad = |m: String| Error::file(&path, format!("{m}; start again without --resume, or remove it"));
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let empty = HashMap::new();
        let meta = header.metadata().as_ref().unwrap_or(&empty);
        if meta.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(bad("is not a training state of this version".into()));
        }
        if meta.get("key") != Some(&self.key) {
            return Err(bad("belongs to a run with other inputs or settings".into()));
        }
        let step: usize = meta.get("step").and_then(|s| s.parse().ok()).ok_or_else(|| bad("has no step".into()))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let read = |name: &str, data: &mut [f32]| {
            let t = tensors.tensor(name).map_err(|e| bad(format!("{name}: {e}")))?;
            if t.dtype() != Dtype::F32 || t.data().len() != data.len() * 4 {
                return Err(bad(format!("{name}: expected {} floats, found {:?}", data.len(), t.shape())));
            }
            let values = t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            data.iter_mut().zip(values).for_each(|(d, v)| *d = v);
            Ok(())
        };
        for (i, d) in p.table.iter().enumerate().filter(|(i, _)| p.trained[*i]) {
            for (kind, data) in [("w", &mut p.data[i]), ("m", &mut adamw.m[i]), ("v", &mut adamw.v[i])] {
                read(&format!("{kind}.{}", d.name), data)?;
            }
        }
        let mut updated = vec![0.0; adamw.updated.len()];
        read(UPDATED, &mut updated)?;
        if updated.iter().any(|u| !(0.0..=step as f32).contains(u)) {
            return Err(bad(format!("{UPDATED}: a row is ahead of step {step}")));
        }
        // The file's word for a size is not taken: what is there tells how much is allocated.
        let held = tensors.tensor(HISTORY).map_err(|e| bad(format!("{HISTORY}: {e}")))?.data().len();
        if step.checked_mul(8) != Some(held) {
            return Err(bad(format!("{HISTORY}: {held} bytes, expected those of {step} steps")));
        }
        let mut history = vec![[0.0; 2]; step];
        read(HISTORY, history.as_flattened_mut())?;
        let mut ranges = p.quant.as_ref().map(|q| q.qat.ranges.clone()).unwrap_or_default();
        let mut absmax = vec![0.0; ranges.len()];
        if !ranges.is_empty() {
            read(RANGES, &mut absmax)?;
        }
        ranges.values_mut().zip(absmax).for_each(|(to, from)| *to = from);
        adamw.resume(updated.iter().map(|u| *u as u32).collect(), &history);
        p.repack(1);
        p.set_ranges(ranges, 1);
        Ok(true)
    }

    /// Removes the state: the run is complete.
    ///
    /// # Errors
    /// The folder cannot be removed.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(self.dir)(e)),
            _ => Ok(()),
        }
    }
}
