//! `quetsch demo`: the whole path on data that is part of the program.

use super::predict::{Answer, guesses, human};
use crate::exit::usage;
use crate::recipe;
use crate::ui::{self, Ui, duration};
use crate::work::pipeline::{self, Options};
use crate::work::pretty;
use crate::work::report::Lang;
use anyhow::{Context, Result};
use clap::Args;
use quetsch::atomic::write_file;
use quetsch::checkpoint::Checkpoint;
use quetsch::dir::{self, ModelDir};
use quetsch::runtime::Classifier;
use quetsch::spec::{Activation, Family, HeadSpec, LayerShape, ModelSpec};
use quetsch::task::Problem;
use quetsch::tokenizer::{Tokenizer, train_wordpiece};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The embedded training sentences.
const TRAIN: &str = include_str!("../../demo/train.csv");
/// The embedded test sentences.
const TEST: &str = include_str!("../../demo/test.csv");
/// Twelve questions that a bank's customers ask.
pub const SAMPLES: &str = include_str!("../../demo/samples.txt");

/// What the figures mean, said where they are printed.
const ABOUT: &str = "The sentences were written for this project; no test sentence shares a template with a training \
                     sentence. The teacher was trained from scratch, without any pretraining, so the plain TF-IDF \
                     baseline beats it here: the demo shows what distilling, pruning and quantising cost, not how \
                     good a pretrained encoder is.";

/// Flags of `demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Folder to write
    #[arg(long, value_name = "DIR", default_value = "quetsch-demo")]
    out: PathBuf,
    /// Put a value over the demo's recipe: teacher.epochs=10
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on with an interrupted training
    #[arg(long)]
    resume: bool,
    /// Make everything again
    #[arg(long)]
    force: bool,
}

/// The demo's untrained encoder.
const VOCABULARY: usize = 2500;
const HIDDEN: usize = 128;
const HEAD_DIM: usize = 32;
const LAYERS: usize = 3;
const POSITIONS: usize = 64;

/// Runs `demo`.
pub fn run(d: &Demo, ui: &Ui) -> Result<()> {
    let started = Instant::now();
    ui::catch_interrupts()?;
    ui.note("The whole path on embedded data: train a teacher, distil, prune, quantise, compare, predict.");
    let data = d.out.join("data");
    std::fs::create_dir_all(&data).with_context(|| format!("cannot make {}", data.display()))?;
    for (name, text) in [("train.csv", TRAIN), ("test.csv", TEST), ("samples.txt", SAMPLES)] {
        write_file(data.join(name), text.as_bytes())?;
    }
    let body = d.out.join("body");
    let train = quetsch::data::read(data.join("train.csv"), &Default::default())?;
    write_body(&body, &train.texts)?;
    let text = |path: PathBuf| format!("{:?}", path.display().to_string());
    let mut flags = vec![
        format!("model={}", text(body)),
        format!("out={}", text(d.out.clone())),
        format!("data.train={}", text(data.join("train.csv"))),
        format!("data.test={}", text(data.join("test.csv"))),
    ];
    flags.extend(d.set.iter().cloned());
    let recipe =
        recipe::from_text(Path::new("demo.toml"), include_str!("demo.toml").into(), &BTreeMap::new(), &flags)?;
    if recipe.stages.is_empty() {
        return Err(usage("the demo's recipe has no stage"));
    }
    let options = Options { resume: d.resume, force: d.force, ..Options::default() };
    let finished = pipeline::run(&recipe, &options, ui)?;
    let comparison = finished.comparison.context("the demo's recipe has no comparison")?;

    ui.say(format!("\n{ABOUT}"))?;

    // The smallest model answers.
    let classifier = Classifier::load(&recipe.stage_dir("int8"), None)?;
    let samples: Vec<&str> = SAMPLES.lines().collect();
    let logits = classifier.logits(&samples, ui.threads(None))?;
    let rows = samples.iter().zip(logits.chunks(classifier.labels().len()));
    let answers: Vec<Answer> = rows
        .map(|(text, row)| Answer {
            text,
            predictions: guesses(Problem::SingleLabel, row, classifier.labels(), 3),
            labels: None,
            logits: None,
        })
        .collect();
    let printed: String = answers.iter().map(human).collect();
    ui.say(format!("\nTop-3 labels of the int8 model:\n{printed}"))?;

    let markdown = format!(
        "# Quetsch demo\n\n{ABOUT}\n\n{}\n## Top-3 of the int8 model\n\n```\n{printed}```\n",
        comparison.markdown(Lang::En)
    );
    let report = json!({
        "seconds": crate::work::round(started.elapsed().as_secs_f64(), 1),
        "comparison": comparison,
        "predictions": answers,
        "stages": finished.report["stages"],
    });
    write_file(d.out.join("report.md"), markdown.as_bytes())?;
    write_file(d.out.join("report.html"), comparison.html("Quetsch demo", Lang::En)?.as_bytes())?;
    write_file(d.out.join("report.json"), &pretty(&report)?)?;
    let took = duration(started.elapsed().as_secs_f64());
    let out = d.out.display();
    ui.say(format!("Done in {took}. Models, report.md and report.html are in {out}. Try:\n  quetsch predict --model {out}/int8 \"my card is gone\""))?;
    match ui.human() {
        true => Ok(()),
        false => ui.result("", &report),
    }
}

/// A tokenizer made from the training sentences and an encoder with random weights.
fn write_body(path: &Path, texts: &[String]) -> Result<()> {
    let tokenizer = train_wordpiece(texts, VOCABULARY)?;
    let spec = ModelSpec {
        family: Family::Bert,
        prefix: String::new(),
        vocab: Tokenizer::new(&tokenizer)?.rows(),
        positions: POSITIONS,
        token_types: 2,
        hidden: HIDDEN,
        head_dim: HEAD_DIM,
        original_heads: (HIDDEN / HEAD_DIM) as u16,
        layers: vec![LayerShape { heads: (0..(HIDDEN / HEAD_DIM) as u16).collect(), ffn: 4 * HIDDEN }; LAYERS],
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head: HeadSpec::None,
        unused_pooler: false,
    };
    let checkpoint = Checkpoint::random(spec, vec![], 42)?;
    Ok(dir::write(path, &ModelDir { checkpoint, tokenizer }, true)?)
}
