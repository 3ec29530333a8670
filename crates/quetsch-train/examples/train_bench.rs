//! How fast training runs here, as one line of JSON.
//!
//! ```text
//! train_bench step SHAPE PRECISION [--batch N] [--tokens N] [--steps N] [--freeze] [--recompute]
//!     full steps on sentences of 32 (or --tokens) random tokens, random weights; SHAPE is layers x width, such as 6x384
//!     or 12x768
//! train_bench epoch DIR FILE PRECISION [--batch N] [--steps N] [--freeze] [--recompute]
//!     one epoch of FILE (a text and a label column) from the model in DIR; with --steps, so many steps of it
//! ```
//! PRECISION is auto, f32 or bf16; --freeze keeps the word table; --recompute runs layers again in the
//! backward; 2 threads, or --threads N.

use quetsch::batch::Encoding;
use quetsch::checkpoint::Checkpoint;
use quetsch::head::{HeadKind, with_head};
use quetsch::rng::Rng;
use quetsch::spec::{Activation, Family, HeadSpec, LayerShape, ModelSpec};
use quetsch::tokenizer::Tokenizer;
use quetsch::{data, dir};
use quetsch_train::{
    Dropout, Event, FitError, FitSettings, Hard, Objective, Precision, Schedule, Sparsity, Stop, TrainSet, fit,
};
use std::ops::ControlFlow;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

struct Work {
    name: String,
    start: Checkpoint,
    encodings: Vec<Encoding>,
    labels: Vec<u32>,
    batch: usize,
    steps: usize,
}

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let (freeze, recompute) = (flag(&mut args, "--freeze"), flag(&mut args, "--recompute"));
    let mut number = |name: &str| -> Result<Option<usize>> {
        let Some(at) = args.iter().position(|a| a == name) else { return Ok(None) };
        let value = args.get(at + 1).ok_or(format!("{name} needs a number"))?.parse()?;
        args.drain(at..at + 2);
        Ok(Some(value))
    };
    let (batch, steps, threads) = (number("--batch")?, number("--steps")?, number("--threads")?.unwrap_or(2));
    let tokens = number("--tokens")?.unwrap_or(32);
    let (work, precision) = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["step", shape, precision] => (random(shape, batch, tokens, steps.unwrap_or(10))?, precision),
        ["epoch", dir, file, precision] => (real(dir, file, batch.unwrap_or(64), steps, threads)?, precision),
        _ => return Err("expected: step SHAPE PRECISION, or: epoch DIR FILE PRECISION".into()),
    };
    let precision = match precision {
        "auto" => Precision::fastest(),
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        other => return Err(format!("precision {other}: expected auto, f32 or bf16").into()),
    };
    measure(&work, precision, [freeze, recompute], threads)
}

fn flag(args: &mut Vec<String>, name: &str) -> bool {
    let before = args.len();
    args.retain(|a| a != name);
    args.len() < before
}

fn random(shape: &str, batch: Option<usize>, tokens: usize, steps: usize) -> Result<Work> {
    let (layers, width) = shape.split_once('x').ok_or(format!("shape {shape}: expected layers x width"))?;
    let (layers, hidden): (usize, usize) = (layers.parse()?, width.parse()?);
    let layer = LayerShape { heads: (0..12).collect(), ffn: 4 * hidden };
    let spec = ModelSpec {
        family: Family::Bert,
        prefix: "bert.".into(),
        vocab: 30522,
        positions: 512,
        token_types: 2,
        hidden,
        head_dim: hidden / 12,
        original_heads: 12,
        layers: vec![layer; layers],
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head: HeadSpec::MeanMlp { labels: 77 },
        unused_pooler: false,
    };
    let batch = batch.unwrap_or(if hidden <= 384 { 32 } else { 16 });
    let mut rng = Rng::new(42);
    let mut sentence =
        || Encoding { ids: (0..tokens).map(|_| 1000 + rng.below(29000) as u32).collect(), types: vec![] };
    let encodings: Vec<Encoding> = (0..batch * (WARM_UP + steps)).map(|_| sentence()).collect();
    let labels = (0..encodings.len() as u32).map(|i| i % 77).collect();
    let start = Checkpoint::random(spec, (0..77).map(|i| i.to_string()).collect(), 42)?;
    Ok(Work { name: format!("step {shape}"), start, encodings, labels, batch, steps: WARM_UP + steps })
}

fn real(path: &str, file: &str, batch: usize, steps: Option<usize>, threads: usize) -> Result<Work> {
    let model = dir::read(path)?;
    let set = data::read(file, &data::ReadOptions::default())?;
    let encodings = Tokenizer::new(&model.tokenizer)?.encode_all(&set.texts, 256, threads)?;
    let start = with_head(&model.checkpoint.to_f32(), HeadKind::Mean, set.names.clone(), 42)?;
    let all = encodings.len().div_ceil(batch);
    let steps = steps.map_or(all, |s| (s + WARM_UP).min(all));
    Ok(Work { name: "epoch".into(), start, encodings, labels: set.labels, batch, steps })
}

/// Steps that are not counted.
const WARM_UP: usize = 3;

fn measure(work: &Work, precision: Precision, [freeze, recompute]: [bool; 2], threads: usize) -> Result<()> {
    let settings = FitSettings {
        epochs: 1,
        batch_size: work.batch,
        accumulate: 1,
        learning_rate: 1e-4,
        head_learning_rate: 3e-4,
        weight_decay: 0.01,
        warmup: 0.1,
        schedule: Schedule::Linear,
        clip: 1.0,
        dropout: Dropout { hidden: 0.1, attention: 0.1, head: 0.2 },
        freeze: if freeze { vec!["word_embeddings".into()] } else { vec![] },
        seed: 42,
        threads,
        precision,
        sparsity: Sparsity::Free,
        recompute,
        quant: None,
    };
    let set = TrainSet::sentences(&work.encodings, &work.labels);
    let (mut ms, mut last) = (vec![], Instant::now());
    let mut on = |e: Event| {
        if let Event::Step(p) = e {
            let now = Instant::now();
            ms.push((now - last).as_secs_f64() * 1e3);
            last = now;
            if p.step == work.steps {
                return ControlFlow::Break(Stop::Interrupted);
            }
        }
        ControlFlow::Continue(())
    };
    match fit(&work.start, &set, &Objective::CrossEntropy(Hard::default()), &settings, None, &mut on) {
        Ok(_) | Err(FitError::Interrupted { .. }) => {}
        Err(e) => return Err(e.into()),
    }
    let counted = &mut ms[WARM_UP.min(work.steps - 1)..];
    let sentences_per_s = (counted.len() * work.batch) as f64 / counted.iter().sum::<f64>() * 1e3;
    counted.sort_by(f64::total_cmp);
    println!(
        r#"{{"work": "{}", "batch": {}, "precision": "{}", "isa": "{}", "threads": {threads}, "frozen": {freeze}, "recompute": {recompute}, "steps": {}, "ms_median": {:.1}, "ms_min": {:.1}, "sentences_per_s": {sentences_per_s:.0}, "peak_rss_mb": {:.0}}}"#,
        work.name,
        work.batch,
        precision.name(),
        quetsch::runtime::isa().name(),
        counted.len(),
        counted[counted.len() / 2],
        counted[0],
        peak_rss_mb(),
    );
    Ok(())
}

/// `VmHWM`; 0 where the system does not tell.
fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kb = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok());
    kb.unwrap_or(0.0) / 1024.0
}
