//! `quetsch export`: model directories for other programs.

use crate::ui::{Ui, mb};
use crate::work::corpus::disk_bytes;
use crate::work::pretty;
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use quetsch::atomic::Folder;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::family::Family;
use quetsch::prune::dense;
use quetsch::quant::{self, Scheme};
use quetsch::spec::{HeadSpec, Role, TensorDef};
use quetsch::{config, dir};
use serde_json::{Map, Value, json};
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
    /// As compact, with Python code beside the weights: loads where `trust_remote_code=True` lets it run
    RemoteCode,
}

/// The code of [`Layout::RemoteCode`], our own.
const MODULE: &str = "modeling_quetsch";
const CODE: &str = include_str!("export/modeling_quetsch.py");

/// The keys of config.json that make transformers load a model with [`CODE`].
fn remote_code(ck: &Checkpoint) -> Result<Map<String, Value>> {
    let spec = &ck.spec;
    let family = spec.family.facts().class;
    if spec.family == Family::DistilBert || spec.head == HeadSpec::None {
        bail!("the remote-code layout is for classifiers of BERT, RoBERTa and ELECTRA; export the dense layout");
    }
    let student = if matches!(spec.head, HeadSpec::MeanMlp { .. }) { "Student" } else { "" };
    let class = format!("Quetsch{family}{student}");
    let map = json!({ "AutoModelForSequenceClassification": format!("{MODULE}.{class}") });
    Ok(Map::from_iter([("architectures".to_string(), json!([class])), ("auto_map".to_string(), map)]))
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
    let folder = Folder::create(&e.out, e.force)?;
    dir::write_into(&folder, &model)?;
    if e.layout == Layout::RemoteCode {
        ui.warn(format!("{MODULE}.py is code: who loads this model runs it, with trust_remote_code=True"));
        let mut config = config::render(&model.checkpoint)?;
        // transformers 4 would prune by these once more; `quetsch.layers` says it all.
        ["student_pruned_heads", "pruned_heads"].into_iter().for_each(|key| drop(config.shift_remove(key)));
        config.extend(remote_code(&model.checkpoint)?);
        folder.write("config.json", &pretty(&config)?)?;
        folder.write(format!("{MODULE}.py"), CODE.as_bytes())?;
    }
    folder.commit()?;
    let bytes = disk_bytes(&e.out);
    let facts = json!({ "out": e.out, "disk_bytes": bytes, "parameters": model.checkpoint.parameters() });
    ui.result(format!("{}: {:.1} MB", e.out.display(), mb(bytes)), &facts)
}
