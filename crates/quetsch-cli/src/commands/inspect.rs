//! `quetsch inspect`: shapes, parameters and bytes by part, heads by layer, what is quantised and what is kept; or a
//! pruning plan, also beside another one.

use crate::hub;
use crate::ui::{Ui, mb, percent};
use crate::work::REPORT;
use crate::work::parts::{bytes, part_of};
use crate::work::thin::read_plan;
use anyhow::{Context, Result};
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use quetsch::dir;
use quetsch::prune;
use quetsch::quant::{self, Distortion, Scheme};
use quetsch::spec::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Flags of `inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// Model directory, or ORG/NAME on the hub; or a pruning plan (plan.json)
    dir: PathBuf,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long)]
    revision: Option<String>,
    /// Of a quantised model, the float model that it was made from: how far every tensor lies from it. Without it
    /// --verbose shows what was recorded when it was quantised, outlier columns of inputs, too. Of a plan, another one:
    /// what each removes alone
    #[arg(long, value_name = "DIR|FILE")]
    against: Option<PathBuf>,
}

#[derive(Default, Serialize)]
struct Part {
    parameters: usize,
    bytes: usize,
}

#[derive(Serialize)]
struct Layer {
    heads: Vec<u16>,
    pruned_heads: Vec<u16>,
    ffn: usize,
}

#[derive(Serialize)]
struct Facts {
    parameters: usize,
    bytes: usize,
    family: &'static str,
    hidden: usize,
    head_dim: usize,
    vocab: usize,
    positions: usize,
    head: String,
    labels: Vec<String>,
    /// What the model is asked; none for a bare body.
    #[serde(skip_serializing_if = "Option::is_none")]
    task: Option<String>,
    parts: BTreeMap<&'static str, Part>,
    layers: Vec<Layer>,
    sites: BTreeMap<String, &'static str>,
    /// Share of zeros of the linears that have any to speak of.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    sparsity: BTreeMap<String, f64>,
    /// Of quantised tensors, from the float ones they were made from.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    distortion: BTreeMap<String, Distortion>,
    /// Of the calibration sentences, by the linear that reads it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    inputs: BTreeMap<String, Seen>,
    warnings: Vec<String>,
}

/// What the stage that quantised a model wrote down.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Recorded {
    distortion: BTreeMap<String, Distortion>,
    calibration: Calibration,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Calibration {
    inputs: BTreeMap<String, Seen>,
}

/// An input of a linear.
#[derive(Deserialize, Serialize)]
struct Seen {
    largest: f64,
    outlier_columns: usize,
    columns: usize,
}

/// Runs `inspect`.
pub fn run(i: &Inspect, ui: &Ui) -> Result<()> {
    if i.dir.is_file() {
        return plan(i, ui);
    }
    let folder = hub::model(&i.dir, i.revision.as_deref(), ui)?;
    let ck = dir::read_checkpoint(&folder)?;
    let spec = &ck.spec;
    let mut parts: BTreeMap<&'static str, Part> = BTreeMap::new();
    for (def, stored) in ck.tensors() {
        let part = parts.entry(part_of(def.tensor, def.role)).or_default();
        part.parameters += stored.len();
        part.bytes += bytes(stored);
    }
    let layers = spec.layers.iter().map(|l| Layer {
        heads: l.heads.clone(),
        pruned_heads: (0..spec.original_heads).filter(|h| !l.heads.contains(h)).collect(),
        ffn: l.ffn,
    });
    let sites =
        spec.linears().into_iter().map(|(l, ..)| (quant::site(spec, l), Scheme::of(ck.get(Tensor::W(l))).name()));
    // A weight that is 0 by chance is no sparsity, nor one that rounding to 8 or 4 bits made 0 (up to a tenth of them).
    let by_chance = |l| if Scheme::of(ck.get(Tensor::W(l))).float().is_some() { 0.001 } else { 0.1 };
    let zeros = prune::sparsity(&ck).into_iter().filter(|(l, share)| *share >= by_chance(*l));
    let recorded = if ui.verbose { recorded(&folder)? } else { None };
    if ui.verbose && recorded.is_none() && i.against.is_none() && ck.is_quantised() {
        let folder = folder.display();
        ui.note(format!("{folder} has no {REPORT} that says what quantising lost: --against PARENT measures it"));
    }
    let recorded = recorded.unwrap_or_default();
    let distortion = match &i.against {
        Some(parent) => quant::distortions(&dir::read_checkpoint(hub::model(parent, None, ui)?)?, &ck)?,
        None => recorded.distortion,
    };
    let facts = Facts {
        distortion,
        inputs: recorded.calibration.inputs,
        sparsity: zeros.map(|(l, share)| (quant::site(spec, l), share)).collect(),
        parameters: ck.parameters(),
        bytes: parts.values().map(|p| p.bytes).sum(),
        family: spec.family.facts().model_type,
        hidden: spec.hidden,
        head_dim: spec.head_dim,
        vocab: spec.vocab,
        positions: spec.longest(),
        head: match spec.head {
            quetsch::spec::HeadSpec::None => "none (a bare body)".into(),
            quetsch::spec::HeadSpec::Tokens { labels } => format!("every token, 1 linear, {labels} labels"),
            quetsch::spec::HeadSpec::MeanMlp { labels } => format!("mean pool, 2 linears, {labels} labels"),
            quetsch::spec::HeadSpec::Pooler { labels } => match spec.family.facts().head_is_pooler() {
                true => format!("first token, pooler, {labels} labels"),
                false => format!("first token, 2 linears, {labels} labels"),
            },
        },
        labels: ck.labels.clone(),
        task: ck.task().map(|task| task.to_string()),
        layers: layers.collect(),
        sites: sites.collect(),
        warnings: ck.warnings.clone(),
        parts,
    };
    ui.result(human(&facts), &facts)
}

/// A plan, or what differs between two.
fn plan(i: &Inspect, ui: &Ui) -> Result<()> {
    let plan = read_plan(&i.dir)?;
    match &i.against {
        None => ui.result(plan.to_string(), &plan),
        Some(other) => {
            let diff = prune::diff(&plan, &read_plan(other)?)?;
            ui.result(diff.to_string(), &diff)
        }
    }
}

/// What stands in a model's report, if it has one.
fn recorded(dir: &Path) -> Result<Option<Recorded>> {
    let path = dir.join(REPORT);
    let Ok(text) = std::fs::read(&path) else { return Ok(None) };
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

fn table(header: &[&str], left: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for (i, column) in table.column_iter_mut().enumerate() {
        if !left.contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn human(f: &Facts) -> String {
    let mut parts = table(&["part", "parameters", "MB"], &[0]);
    for (name, p) in &f.parts {
        parts.add_row([name.to_string(), p.parameters.to_string(), format!("{:.2}", mb(p.bytes as u64))]);
    }
    parts.add_row(["all".to_string(), f.parameters.to_string(), format!("{:.2}", mb(f.bytes as u64))]);
    let mut layers = table(&["layer", "heads", "ffn", "kept heads", "pruned heads"], &[3, 4]);
    let list = |heads: &[u16]| match heads.is_empty() {
        true => "-".to_string(),
        false => heads.iter().map(u16::to_string).collect::<Vec<_>>().join(" "),
    };
    for (l, layer) in f.layers.iter().enumerate() {
        let (heads, ffn) = (layer.heads.len().to_string(), layer.ffn.to_string());
        layers.add_row([l.to_string(), heads, ffn, list(&layer.heads), list(&layer.pruned_heads)]);
    }
    let mut schemes: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (site, scheme) in &f.sites {
        schemes.entry(scheme).or_default().push(site);
    }
    let schemes: Vec<_> = schemes
        .iter()
        .map(|(scheme, sites)| match sites.len() {
            n if n > 4 => format!("  {scheme}: {n} linears"),
            _ => format!("  {scheme}: {}", sites.join(", ")),
        })
        .collect();
    let mut text = format!(
        "{}: hidden {}, head width {}, vocabulary {}, up to {} tokens\nhead: {}\n\n{parts}\n\n{layers}\n\nlinears by scheme:\n{}",
        f.family,
        f.hidden,
        f.head_dim,
        f.vocab,
        f.positions,
        f.head,
        schemes.join("\n")
    );
    if !f.distortion.is_empty() {
        let mut distortion = table(&["quantised tensor", "mean |error|", "max |error|", "SQNR dB"], &[0]);
        for (name, d) in &f.distortion {
            let sqnr = d.sqnr_db.map_or("-".into(), |db| format!("{db:.1}"));
            distortion.add_row([name.clone(), format!("{:.2e}", d.mean_abs), format!("{:.2e}", d.max_abs), sqnr]);
        }
        text += &format!("\n\n{distortion}");
    }
    if !f.inputs.is_empty() {
        let mut inputs = table(&["input of", "largest", "outlier columns", "of"], &[0]);
        for (site, seen) in &f.inputs {
            let (outliers, all) = (seen.outlier_columns.to_string(), seen.columns.to_string());
            inputs.add_row([site.clone(), format!("{:.2}", seen.largest), outliers, all]);
        }
        text += &format!("\n\n{inputs}");
    }
    if !f.sparsity.is_empty() {
        text += "\n\nzeros (they take the same time and space as other weights):";
        for (site, share) in &f.sparsity {
            text += &format!("\n  {site}: {}", percent(*share));
        }
    }
    for warning in &f.warnings {
        text += &format!("\nnote: {warning}");
    }
    text
}
