//! `quetsch export`: model directories for other programs.

use crate::exit::usage;
use crate::hub;
use crate::settings::{Card, Data, Settings};
use crate::ui::{Ui, mb};
use crate::work::card;
use crate::work::corpus::{self, disk_bytes};
use crate::work::pretty;
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use quetsch::atomic::Folder;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::dir::ModelDir;
use quetsch::family::Family;
use quetsch::prune::dense;
use quetsch::quant::{self, Scheme};
use quetsch::runtime::Classifier;
use quetsch::spec::{HeadSpec, Lin, Role, Tensor, TensorDef};
use quetsch::task::Task;
use quetsch::{config, dir, metrics};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Flags of `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// Model directory, or ORG/NAME on the hub
    #[arg(long, alias = "model-id", value_name = "DIR")]
    model: PathBuf,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long)]
    revision: Option<String>,
    /// What reads it
    #[arg(long, value_enum)]
    to: Target,
    /// Pruned shapes as they are, or written back to the original shape with zeros
    #[arg(long, value_enum, default_value_t = Layout::Compact)]
    layout: Layout,
    /// Labelled texts that the model was neither trained nor is measured on: one temperature is fitted on them and
    /// divided into the last linear, so that every program gives calibrated probabilities
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    card: Card,
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

/// What temperature scaling found and did, on the data that it was fitted on.
#[derive(Serialize)]
struct Calibration {
    temperature: f64,
    sentences: usize,
    loss: [f64; 2],
    ece: [f64; 2],
}

/// Divides the last linear by the temperature that gives these texts the lowest loss (Guo et al. 2017).
fn calibrate(model: &mut ModelDir, file: &Path, ui: &Ui) -> Result<Calibration> {
    let set = corpus::read(file, &Data::default(), (&model.checkpoint).into())?;
    if set.task != Task::default() {
        return Err(usage(format!(
            "--calibration: a temperature is of one label a text, this task is {}",
            set.task
        )));
    }
    let classifier = Classifier::new(model, None)?;
    let logits = classifier.logits(&set.texts, ui.threads(None))?;
    let temperature = metrics::temperature(&logits, &set.labels, set.names.len());
    for tensor in [Tensor::W(Lin::Classifier), Tensor::B(Lin::Classifier)] {
        if !matches!(model.checkpoint.get(tensor), Stored::Float { .. }) {
            bail!(
                "the last linear is quantised: calibrate its float parent, or quantise with the last linear kept"
            );
        }
        let scaled = model.checkpoint.values(tensor).iter().map(|w| (f64::from(*w) / temperature) as f32).collect();
        model.checkpoint.set(tensor, Stored::f32(scaled));
    }
    let scaled: Vec<f32> = logits.iter().map(|x| (f64::from(*x) / temperature) as f32).collect();
    let [before, after] = [&logits, &scaled].map(|l| metrics::evaluate(l, &set.labels, &set.names));
    Ok(Calibration {
        temperature,
        sentences: set.len(),
        loss: [before.loss, after.loss],
        ece: [before.ece, after.ece],
    })
}

/// Runs `export`.
pub fn run(e: &Export, ui: &Ui) -> Result<()> {
    super::stage::report(e.card.check(), ui)?;
    let source = hub::model(&e.model, e.revision.as_deref(), ui)?;
    let mut model = dir::read(&source)?;
    let calibration = e.calibration.as_deref().map(|file| hub::table(file, "validation", ui)).transpose()?;
    let calibration = calibration.as_deref().map(|file| calibrate(&mut model, file, ui)).transpose()?;
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
    let bytes = disk_bytes(folder.path());
    // The source's own card speaks of other files: only what it states is taken over.
    let origin = card::origin(&e.card, Some(&source), None, None);
    let report = json!({ "stage": "export", "parameters": model.checkpoint.parameters(),
        "disk_bytes": bytes, "origin": origin });
    let config = serde_json::from_slice(&std::fs::read(folder.path().join("config.json"))?)?;
    card::put(&folder, &e.out, &card::for_dir(&e.out, &config, &report, &Value::Null), ui)?;
    folder.commit()?;
    let facts = json!({ "out": e.out, "disk_bytes": bytes, "parameters": model.checkpoint.parameters(),
        "calibration": calibration });
    let mut line = format!("{}: {:.1} MB", e.out.display(), mb(bytes));
    if let Some(c) = calibration {
        let ([loss, lower], [ece, less]) = (c.loss, c.ece);
        line += &format!(
            "\ntemperature {:.3}, fitted on {} texts: loss {loss:.4} -> {lower:.4}, ECE {ece:.4} -> {less:.4} there",
            c.temperature, c.sentences
        );
    }
    ui.result(line, &facts)
}
