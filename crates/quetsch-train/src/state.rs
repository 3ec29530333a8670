//! Training state on disk: what a run needs to go on after it was killed and end with the same bytes.
//!
//! One safetensors file with the trained weights and both moments, written under a temporary name, synced and
//! renamed; its metadata holds the step and the key of the run (a hash of its inputs and settings).

use crate::optim::AdamW;
use crate::params::Params;
use quetsch::{Error, Result};
use safetensors::tensor::{Dtype, SafeTensors, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

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

const FORMAT: &str = "quetsch-training-state-1";

struct Floats<'a>(&'a [f32]);

impl View for Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        std::slice::from_ref(&LENGTHS[0]).get(..0).unwrap_or_default()
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.0.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
    }
    fn data_len(&self) -> usize {
        self.0.len() * 4
    }
}
