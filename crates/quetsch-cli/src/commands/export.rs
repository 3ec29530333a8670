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
use quetsch::prune::{compact, dense};
use quetsch::quant::{self, Compute, Int8Input, Int8Rows, Scheme, int8};
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
    /// Where pruned heads and channels are
    #[arg(long, value_enum, default_value_t = Layout::AsIs)]
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

impl Target {
    /// What linears become. 4-bit ones are stored and computed as those of the model are, if it has any.
    fn scheme(self, ck: &Checkpoint) -> Option<Scheme> {
        let mut stored = ck.tensors().filter(|(def, _)| is_linear(def)).map(|(_, t)| Scheme::of(t));
        match self {
            Target::Hf => None,
            Target::BnbInt8 => {
                let own = stored.find(|s| matches!(s, Scheme::BnbInt8 { .. }));
                Some(own.unwrap_or(Scheme::BnbInt8 { threshold: int8::THRESHOLD }))
            }
            Target::BnbNf4 => {
                let own = stored.find_map(|s| match s {
                    Scheme::Nf4 { double_quant, compute, .. } | Scheme::Fp4 { double_quant, compute, .. } => {
                        Some((double_quant, compute))
                    }
                    _ => None,
                });
                let (double_quant, compute) = own.unwrap_or((true, Compute::Bf16));
                Some(Scheme::Nf4 { double_quant, compute, source: None })
            }
        }
    }
}

/// Where pruned heads and channels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// Where they are in the model; pruned heads are named in config.json
    AsIs,
    /// Gone, those too that are there as zeros: the smallest files
    Compact,
    /// Back as zeros: loads as a plain BERT, computes the same
    Dense,
    /// As is, with Python code beside the weights: loads where `trust_remote_code=True` lets it run
    RemoteCode,
}

/// The compact layout, and what that took out.
fn taken_out(source: &Checkpoint, ui: &Ui) -> Result<Checkpoint> {
    let compact = compact(source)?;
    let count = |ck: &Checkpoint| ck.spec.layers.iter().fold((0, 0), |n, l| (n.0 + l.heads.len(), n.1 + l.ffn));
    let ((heads, channels), (heads_left, channels_left)) = (count(source), count(&compact));
    let (heads, channels) = (heads - heads_left, channels - channels_left);
    if heads + channels > 0 {
        ui.note(format!(
            "taken out: {heads} heads and {channels} channels that are exactly zero; no answer changes"
        ));
    }
    Ok(compact)
}

fn is_linear(def: &TensorDef) -> bool {
    def.role == Role::Weight && !def.is_empty()
}

fn is_float(stored: &Stored) -> bool {
    matches!(stored, Stored::Float { .. })
}

/// The linears that stay in float: those that do in a quantised model, the usual ones of a float model.
fn keep(source: &Checkpoint) -> Vec<String> {
    let linears = || source.tensors().filter(|(def, _)| is_linear(def));
    if linears().all(|(_, t)| is_float(t)) {
        return quant::default_keep(&source.spec);
    }
    let floats = linears().filter(|(_, t)| is_float(t));
    floats.map(|(def, _)| def.name.trim_end_matches(".weight").to_string()).collect()
}

/// All linears of the source, which has got its layout, in one scheme, but for those to keep. Codes of that scheme stay
/// as they are, and int8 rows are those of LLM.int8() already; of what else is quantised there are only rounded values
/// left, which are rounded once more.
fn store_as(source: &Checkpoint, mut laid_out: Checkpoint, scheme: Scheme, ui: &Ui) -> Result<Checkpoint> {
    let mut twice = vec![];
    for def in laid_out.spec.tensors().into_iter().filter(is_linear) {
        let now = match (laid_out.get(def.tensor), scheme) {
            (Stored::Int8(rows), Scheme::BnbInt8 { threshold }) => {
                Stored::Int8(Int8Rows { input: Int8Input::Mixed { threshold }, ..rows.clone() })
            }
            (stored, _) if Scheme::of(stored) == scheme || is_float(source.get(def.tensor)) => continue,
            (stored, _) => {
                twice.push(def.name.clone());
                if is_float(stored) { stored.clone() } else { Stored::f32(stored.values().into_owned()) }
            }
        };
        laid_out.set(def.tensor, now);
    }
    if let Some(first) = twice.first() {
        ui.warn(format!(
            "{} linears ({first}{}) were quantised already and are so once more, as {scheme}, from their rounded weights: \
             4-bit blocks run across heads and channels, and other codes say other values. Where the float model is at \
             hand, export that one",
            twice.len(),
            if twice.len() > 1 { ", .." } else { "" }
        ));
    }
    Ok(quant::quantise(&laid_out, &[("*".into(), scheme)], &keep(source))?)
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
    let stored = &model.checkpoint;
    let laid_out = match e.layout {
        Layout::Dense => dense(stored)?,
        Layout::Compact => taken_out(stored, ui)?,
        Layout::AsIs | Layout::RemoteCode => stored.clone(),
    };
    model.checkpoint = match e.to.scheme(stored) {
        Some(scheme) => store_as(stored, laid_out, scheme, ui)?,
        None => {
            if stored.is_quantised() {
                ui.warn("the model is quantised: its weights are exported as they are after rounding");
            }
            laid_out.to_f32()
        }
    };
    // No other program reads quantised tables.
    for def in model.checkpoint.spec.tensors().into_iter().filter(|d| d.role == Role::Embedding) {
        if !is_float(model.checkpoint.get(def.tensor)) {
            ui.note(format!("{}: decoded to f32, because no other program reads it quantised", def.name));
            let values = model.checkpoint.values(def.tensor).into_owned();
            model.checkpoint.set(def.tensor, Stored::f32(values));
        }
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
