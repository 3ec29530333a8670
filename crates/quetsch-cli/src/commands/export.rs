//! `quetsch export`: model directories for other programs.

use crate::ui::{Ui, mb};
use crate::work::corpus::disk_bytes;
use anyhow::Result;
use clap::{Args, ValueEnum};
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::dir;
use quetsch::prune::dense;
use quetsch::quant::{self, Scheme};
use quetsch::spec::{Role, TensorDef};
use serde_json::json;
use std::path::PathBuf;

/// Flags of `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What reads it
    #[arg(long, value_enum)]
    to: Target,
    /// Pruned shapes as they are, or written back to the original shape with zeros
    #[arg(long, value_enum, default_value_t = Layout::Compact)]
    layout: Layout,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace what is there
    #[arg(long)]
    force: bool,
}

/// What reads the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// transformers, f32 weights
    Hf,
    /// transformers with bitsandbytes, 8 bits
    BnbInt8,
    /// transformers with bitsandbytes, NF4 with double quantisation
    BnbNf4,
}

/// Where pruned heads and channels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// Gone: the smallest files; pruned heads are named in config.json
    Compact,
    /// Back as zeros: loads as a plain BERT, computes the same
    Dense,
}

/// Runs `export`.
pub fn run(e: &Export, ui: &Ui) -> Result<()> {
    let mut model = dir::read(&e.model)?;
    let scheme: Option<Scheme> = match e.to {
        Target::Hf => None,
        Target::BnbInt8 => Some("bnb-int8".parse()?),
        Target::BnbNf4 => Some("nf4".parse()?),
    };
    let linear = |d: &TensorDef| d.role == Role::Weight;
    let stored_so = |ck: &Checkpoint| {
        let mut linears = ck.tensors().filter(|(d, _)| linear(d)).map(|(_, t)| Scheme::of(t));
        scheme.is_some() && linears.all(|s| s.float().is_some() || Some(s) == scheme)
    };
    if e.layout == Layout::Dense || !stored_so(&model.checkpoint) {
        if model.checkpoint.is_quantised() {
            ui.warn("the model is quantised: its weights are exported as they are after rounding");
        }
        model.checkpoint = model.checkpoint.to_f32();
    }
    // No other program reads quantised tables.
    for def in model.checkpoint.spec.tensors().into_iter().filter(|d| d.role == Role::Embedding) {
        if !matches!(model.checkpoint.get(def.tensor), Stored::Float { .. }) {
            ui.note(format!("{}: decoded to f32, because no other program reads it quantised", def.name));
            let values = model.checkpoint.values(def.tensor).into_owned();
            model.checkpoint.set(def.tensor, Stored::f32(values));
        }
    }
    if e.layout == Layout::Dense {
        model.checkpoint = dense(&model.checkpoint)?;
    }
    if let Some(scheme) = scheme.filter(|_| !model.checkpoint.is_quantised()) {
        let keep = quant::default_keep(&model.checkpoint.spec);
        model.checkpoint = quant::quantise(&model.checkpoint, &[("*".into(), scheme)], &keep)?;
    }
    dir::write(&e.out, &model, e.force)?;
    let bytes = disk_bytes(&e.out);
    let facts = json!({ "out": e.out, "disk_bytes": bytes, "parameters": model.checkpoint.parameters() });
    ui.result(format!("{}: {:.1} MB", e.out.display(), mb(bytes)), &facts)
}
