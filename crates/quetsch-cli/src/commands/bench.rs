//! `quetsch bench`: loading time, first answer, latency at batch 1 by length, throughput and peak memory of this
//! process.

use crate::ui::{self, Ui};
use crate::work::round;
use anyhow::{Context, Result};
use clap::Args;
use quetsch::data;
use quetsch::runtime::Classifier;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Instant;

/// Flags of `bench`.
#[derive(Debug, Args)]
pub struct Bench {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// File of texts [default: the demo's sample questions]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Name of the text column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    text_col: Option<String>,
    /// Texts timed one by one; they are taken evenly from the file
    #[arg(long, value_name = "N", default_value_t = 500)]
    samples: usize,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Speed {
    /// Threads.
    pub threads: usize,
    /// The instruction set whose kernels ran.
    pub isa: String,
    /// Reading and packing the model.
    pub load_ms: f64,
    /// From the start of loading to the first answer.
    pub first_answer_ms: f64,
    /// Batch 1, tokenising included.
    pub latency_ms: Latency,
    /// The same by length in tokens.
    pub by_length: Vec<ByLength>,
    /// All texts at once, tokenising included.
    pub sentences_per_s: f64,
    /// Highest resident memory of the process.
    pub peak_rss_mb: Option<f64>,
}

/// Quantiles of a latency.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// Latency of the texts up to a length.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ByLength {
    /// Longest of the group, in tokens.
    pub tokens: usize,
    /// Texts timed.
    pub n: usize,
    /// Batch 1.
    pub latency_ms: Latency,
}

/// Runs `bench`.
pub fn run(b: &Bench, ui: &Ui) -> Result<()> {
    let texts = match &b.data {
        Some(path) => data::read_texts(Some(path), b.text_col.as_deref())?,
        None => super::demo::SAMPLES.lines().map(str::to_string).collect(),
    };
    let threads = ui.threads(None);
    let start = Instant::now();
    let classifier = Classifier::load(&b.model, None)?;
    let load_ms = ms(start);
    let first = texts.first().context("no text to measure with")?;
    classifier.logits(std::slice::from_ref(first), threads)?;
    let first_answer_ms = ms(start);

    let wanted = b.samples.clamp(1, 1_000_000);
    let step = texts.len().div_ceil(wanted).max(1);
    let mut sample: Vec<&String> = texts.iter().step_by(step).collect();
    // A handful of texts is timed several times over: a percentile needs some.
    let few = sample.clone();
    while sample.len() < wanted.min(50) {
        sample.extend(&few);
    }
    for text in sample.iter().take(10) {
        classifier.logits(std::slice::from_ref(*text), threads)?;
    }
    let mut timed = vec![];
    for text in sample {
        let tokens = classifier.encode(std::slice::from_ref(text), 1)?[0].ids.len();
        let start = Instant::now();
        classifier.logits(std::slice::from_ref(text), threads)?;
        timed.push((tokens, ms(start)));
    }
    let by_length = [8, 16, 32, 64, 128, 256, usize::MAX].windows(2).scan(0, |low, w| {
        let (from, to) = (std::mem::replace(low, w[0]), w[0]);
        Some((from, to))
    });
    let by_length = by_length
        .filter_map(|(from, to)| {
            let group: Vec<f64> = timed.iter().filter(|(n, _)| *n > from && *n <= to).map(|t| t.1).collect();
            (!group.is_empty()).then(|| ByLength { tokens: to, n: group.len(), latency_ms: latency(group) })
        })
        .collect();
    let start = Instant::now();
    classifier.logits(&texts, threads)?;
    let sentences_per_s = round(texts.len() as f64 / start.elapsed().as_secs_f64(), 1);
    let speed = Speed {
        threads,
        isa: quetsch::runtime::isa().name().to_string(),
        load_ms: round(load_ms, 1),
        first_answer_ms: round(first_answer_ms, 1),
        latency_ms: latency(timed.iter().map(|t| t.1).collect()),
        by_length,
        sentences_per_s,
        peak_rss_mb: peak_rss_mb(),
    };
    ui.result(human(&speed).trim_end(), &speed)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Nearest-rank quantiles.
fn latency(mut ms: Vec<f64>) -> Latency {
    ms.sort_by(f64::total_cmp);
    let at =
        |q: f64| ms.get(((q * ms.len() as f64).ceil() as usize).saturating_sub(1)).copied().unwrap_or(f64::NAN);
    Latency { p50: round(at(0.5), 3), p99: round(at(0.99), 3) }
}

/// The kernel's high-water mark of resident memory (`VmHWM`), in MB.
fn peak_rss_mb() -> Option<f64> {
    let status = procfs::process::Process::myself().ok()?.status().ok()?;
    Some(round(ui::mb(1024 * status.vmhwm?), 1))
}

fn human(s: &Speed) -> String {
    let mut text = format!(
        "threads        {}\nkernels        {}\nload           {:.1} ms\nfirst answer   {:.1} ms\nlatency        p50 {:.2} ms, p99 {:.2} ms\n",
        s.threads, s.isa, s.load_ms, s.first_answer_ms, s.latency_ms.p50, s.latency_ms.p99
    );
    for group in &s.by_length {
        let l = &group.latency_ms;
        text += &format!(
            "  up to {:>3} tokens  p50 {:.2} ms, p99 {:.2} ms  ({} texts)\n",
            group.tokens, l.p50, l.p99, group.n
        );
    }
    text += &format!("throughput     {:.0} sentences/s\n", s.sentences_per_s);
    if let Some(rss) = s.peak_rss_mb {
        text += &format!("peak memory    {rss:.1} MB\n");
    }
    text
}
