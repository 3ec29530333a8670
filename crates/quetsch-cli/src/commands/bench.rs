//! `quetsch bench`: latency, throughput, loading time, memory, and the share of what this machine can compute. `compare`
//! runs it in a process of its own for every model, so that the memory of one does not count for another.

use crate::hub;
use crate::settings::ComputeIn;
use crate::ui::{self, Ui};
use crate::work::round;
use anyhow::{Context, Result, ensure};
use clap::Args;
use quetsch::batch::Encoding;
use quetsch::cost::CostOps;
use quetsch::data;
use quetsch::dir::Source;
use quetsch::quant::Scheme;
use quetsch::runtime::peak::operations_per_second;
use quetsch::runtime::stream::stream;
use quetsch::runtime::{Classifier, Session};
use quetsch::spec::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Flags of `bench`.
#[derive(Debug, Args)]
pub struct Bench {
    /// Model directory, or ORG/NAME on the hub
    #[arg(long, alias = "model-id", value_name = "DIR")]
    model: PathBuf,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long)]
    revision: Option<String>,
    /// File of texts [default: the demo's sample questions]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Name of the text column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    text_col: Option<String>,
    /// Texts timed one by one; they are taken evenly from the file
    #[arg(long, value_name = "N", default_value_t = 500)]
    samples: usize,
    /// Lengths in tokens to time, one sentence at a time; those that the model cannot read are left out
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [8, 16, 32, 64, 128, 256, 512])]
    lengths: Vec<usize>,
    /// Time for each length, in seconds
    #[arg(long, value_name = "S", default_value_t = 0.25)]
    seconds: f64,
    /// Passes over all texts; the fastest counts
    #[arg(long, value_name = "N", default_value_t = 3)]
    passes: usize,
    /// Another model to time in turn with this one
    #[arg(long, value_name = "DIR")]
    against: Option<PathBuf>,
    /// What linears with float weights are multiplied in
    #[arg(long, value_enum, default_value_t)]
    compute: ComputeIn,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Speed {
    /// Threads.
    pub threads: usize,
    /// Threads that a single text is split over.
    #[serde(default = "one")]
    pub threads_for_one: usize,
    /// The instruction set whose kernels ran.
    pub isa: String,
    /// Reading and packing the model.
    pub load_ms: f64,
    /// From the start of loading to the first answer.
    pub first_answer_ms: f64,
    /// Batch 1, tokenising included, over the texts.
    pub latency_ms: Latency,
    /// Batch 1, token ids in, logits out, by length.
    pub by_length: Vec<ByLength>,
    /// All texts, reading them from memory, tokenising included; the fastest pass.
    pub sentences_per_s: f64,
    /// Highest resident memory of the process.
    pub peak_rss_mb: Option<f64>,
    /// What the memory is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<Memory>,
    /// What was computed, and what could be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<Work>,
    /// This model beside another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
}

fn one() -> usize {
    1
}

/// Quantiles of a latency.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// Latency at one length.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ByLength {
    /// Tokens of the sentence.
    pub tokens: usize,
    /// Times it was run.
    pub n: usize,
    /// Batch 1.
    pub latency_ms: Latency,
    /// Operations per second at the median, in 10^9; a multiply-accumulate is two.
    pub gop_per_s: f64,
    /// The same as a share of the peak.
    pub peak_share: f64,
}

/// Resident memory by part, in MB. What the system does not tell is nothing.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Memory {
    /// Before anything was loaded: the program, and the texts.
    pub process: Option<f64>,
    /// Packed linears and LayerNorms.
    pub weights: f64,
    /// Embedding tables, and the rows that were read from the file.
    pub embeddings: f64,
    /// The rest of what loading took: the tokeniser.
    pub tokenizer: Option<f64>,
    /// What answering took on top.
    pub activations: Option<f64>,
}

/// The cost of the forward.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Work {
    /// Multiply-accumulates of the linears for one token, by scheme, in 10^6.
    pub linear_mmac_per_token: BTreeMap<String, f64>,
    /// The kind of arithmetic that most of them are here: `f32`, `bf16` or `int8`.
    pub arithmetic: String,
    /// What this machine does of it in registers on all threads, in 10^9 operations per second.
    pub peak_gop_per_s: f64,
    /// Operations per second over all texts, in 10^9.
    pub gop_per_s: f64,
    /// The same as a share of the peak.
    pub peak_share: f64,
}

/// Ratios to another model, each the median of rounds in which both were timed one after the other.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Against {
    /// The other model.
    pub model: PathBuf,
    /// This model's latency through the other's, by length in tokens.
    pub latency_ratio: BTreeMap<usize, f64>,
    /// This model's sentences per second through the other's.
    pub throughput_ratio: f64,
}

/// Runs `bench`.
pub fn run(b: &Bench, ui: &Ui) -> Result<()> {
    ensure!(b.seconds.is_finite() && b.seconds >= 0.0, "--seconds {}: expected a time", b.seconds);
    let texts = match &b.data {
        Some(path) => data::read_texts(Some(&hub::table(path, "test", ui)?), b.text_col.as_deref())?,
        None => super::demo::SAMPLES.lines().map(str::to_string).collect(),
    };
    let path = hub::model(&b.model, b.revision.as_deref(), ui)?;
    let other = b.against.as_deref().map(|other| hub::model(other, None, ui)).transpose()?;
    let threads = ui.threads(None);
    let before = resident_mb();
    let start = Instant::now();
    let classifier = Classifier::load_for(&path, None, b.compute.into())?;
    let load_ms = ms(start);
    let loaded = resident_mb();
    let first = texts.first().context("no text to measure with")?;
    let session = Session::new(threads);
    classifier.logits_in(&session, std::slice::from_ref(first))?;
    let first_answer_ms = ms(start);

    let latency_ms = over_texts(&classifier, &session, &texts, b.samples)?;
    let passes = (0..b.passes.max(1)).map(|_| pass(&classifier, &texts, threads)).collect::<Result<Vec<_>>>()?;
    let seconds = passes.into_iter().fold(f64::INFINITY, f64::min);
    // Memory is asked for before anything is loaded that only measuring needs.
    let peak_rss_mb = peak_rss_mb();
    let model = classifier.model();
    let (weights, embeddings) = (ui::mb(model.weight_bytes() as u64), ui::mb(model.embedding_bytes() as u64));
    let rest = |more: f64, less: f64| round((more - less).max(0.0), 1);
    let memory_mb = Memory {
        process: before,
        weights: round(weights, 1),
        embeddings: round(embeddings, 1),
        tokenizer: loaded.zip(before).map(|(after, before)| rest(after, before + weights + embeddings)),
        activations: peak_rss_mb.zip(loaded).map(|(peak, loaded)| rest(peak, loaded)),
    };

    let linear_mmac_per_token = by_scheme(&path)?;
    let arithmetic = model.arithmetic();
    let peak = operations_per_second(arithmetic, threads);
    let lengths: Vec<usize> =
        b.lengths.iter().copied().filter(|n| (1..=model.spec().longest()).contains(n)).collect();
    let mut by_length = vec![];
    for &tokens in &lengths {
        let mut times = timed(&classifier, &session, tokens, b.seconds)?;
        let (operations, n) = (operations(&classifier, &[tokens])?, times.len());
        let latency_ms = latency(&mut times);
        let rate = operations / (latency_ms.p50 / 1e3);
        let (gop_per_s, peak_share) = (round(rate / 1e9, 1), round(rate / peak, 3));
        by_length.push(ByLength { tokens, n, latency_ms, gop_per_s, peak_share });
    }
    let counted: Vec<usize> = classifier.encode(&texts, threads)?.iter().map(|e| e.ids.len()).collect();
    let rate = operations(&classifier, &counted)? / seconds;
    let work = Work {
        linear_mmac_per_token,
        arithmetic: arithmetic.name().to_string(),
        peak_gop_per_s: round(peak / 1e9, 1),
        gop_per_s: round(rate / 1e9, 1),
        peak_share: round(rate / peak, 3),
    };
    let against = other.as_ref().map(|other| against(&classifier, &session, other, &texts, &lengths, threads, b));
    let speed = Speed {
        threads,
        threads_for_one: session.threads_for_one(),
        isa: quetsch::runtime::isa().name().to_string(),
        load_ms: round(load_ms, 1),
        first_answer_ms: round(first_answer_ms, 1),
        latency_ms,
        by_length,
        sentences_per_s: round(texts.len() as f64 / seconds, 1),
        peak_rss_mb,
        memory_mb: Some(memory_mb),
        work: Some(work),
        against: against.transpose()?,
    };
    ui.result(human(&speed).trim_end(), &speed)
}

/// Batch 1 over some of the texts, tokenising included.
fn over_texts(classifier: &Classifier, session: &Session, texts: &[String], wanted: usize) -> Result<Latency> {
    let wanted = wanted.clamp(1, 1_000_000);
    let mut sample: Vec<&String> = texts.iter().step_by(texts.len().div_ceil(wanted).max(1)).collect();
    // A handful of texts is timed several times over: a percentile needs some.
    let few = sample.clone();
    while sample.len() < wanted.min(50) {
        sample.extend(&few);
    }
    let answer = |text: &String| classifier.logits_in(session, std::slice::from_ref(text));
    for text in sample.iter().take(10) {
        answer(text)?;
    }
    let mut times = vec![];
    for text in sample {
        let start = Instant::now();
        answer(text)?;
        times.push(ms(start));
    }
    Ok(latency(&mut times))
}

/// Seconds for all texts.
fn pass(classifier: &Classifier, texts: &[String], threads: usize) -> Result<f64> {
    let texts = texts.to_vec().into();
    let start = Instant::now();
    stream(classifier, texts, threads, |_, logits| logits, |_| Ok::<_, quetsch::Error>(()))?;
    Ok(start.elapsed().as_secs_f64())
}

/// Times in ms of a sentence of `tokens` tokens, for `seconds`, at least 5 times.
fn timed(classifier: &Classifier, session: &Session, tokens: usize, seconds: f64) -> Result<Vec<f64>> {
    let vocabulary = classifier.model().spec().vocab as u32;
    // Ids all over the table, by a multiplicative hash: what they are does not matter.
    let ids = (1..=tokens as u32).map(|i| i.wrapping_mul(2_654_435_769) % vocabulary).collect();
    let sentence = [Encoding { ids, types: vec![] }];
    let answer = || session.logits(classifier.model(), &sentence);
    for _ in 0..5 {
        answer()?;
    }
    let (mut times, end) = (vec![], Instant::now() + Duration::from_secs_f64(seconds.min(3600.0)));
    while times.len() < 5 || Instant::now() < end {
        let start = Instant::now();
        answer()?;
        times.push(ms(start));
    }
    Ok(times)
}

/// Operations for sentences of these lengths: two for every multiply-accumulate of linears and attention.
fn operations(classifier: &Classifier, lengths: &[usize]) -> Result<f64> {
    Ok(2.0 * CostOps::run(classifier.model().spec(), lengths)?.macs() as f64)
}

/// Multiply-accumulates of the encoder's linears for one token by the scheme they are stored in, in 10^6.
fn by_scheme(model: &Path) -> Result<BTreeMap<String, f64>> {
    let mut source = Source::open(model)?;
    let mut macs = BTreeMap::new();
    for (lin, n, k) in source.spec().linears() {
        let scheme = Scheme::of(source.part(&[Tensor::W(lin)])?.get(Tensor::W(lin))).name();
        *macs.entry(scheme.to_string()).or_insert(0.0) += (n * k) as f64 / 1e6;
    }
    Ok(macs)
}

/// Times both models in turn.
fn against(
    own: &Classifier,
    session: &Session,
    dir: &Path,
    texts: &[String],
    lengths: &[usize],
    threads: usize,
    b: &Bench,
) -> Result<Against> {
    const ROUNDS: usize = 5;
    let other = Classifier::load_for(dir, None, b.compute.into())?;
    let middle = |ratios: &mut Vec<f64>| round(latency(ratios).p50, 3);
    let mut latency_ratio = BTreeMap::new();
    for &tokens in lengths.iter().filter(|n| **n <= other.model().spec().longest()) {
        let mut ratios = vec![];
        for _ in 0..ROUNDS {
            let share = b.seconds / ROUNDS as f64;
            let [mine, theirs] = [own, &other].map(|c| timed(c, session, tokens, share));
            ratios.push(latency(&mut mine?).p50 / latency(&mut theirs?).p50);
        }
        latency_ratio.insert(tokens, middle(&mut ratios));
    }
    let mut ratios = vec![];
    for _ in 0..b.passes.max(1) {
        let mine = pass(own, texts, threads)?;
        ratios.push(pass(&other, texts, threads)? / mine);
    }
    Ok(Against { model: dir.to_path_buf(), latency_ratio, throughput_ratio: middle(&mut ratios) })
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Nearest-rank quantiles.
fn latency(ms: &mut [f64]) -> Latency {
    ms.sort_by(f64::total_cmp);
    let at =
        |q: f64| ms.get(((q * ms.len() as f64).ceil() as usize).saturating_sub(1)).copied().unwrap_or(f64::NAN);
    Latency { p50: round(at(0.5), 4), p99: round(at(0.99), 4) }
}

/// The kernel's high-water mark of resident memory (`VmHWM`), in MB.
fn peak_rss_mb() -> Option<f64> {
    memory(|status| status.vmhwm)
}

/// Resident memory now (`VmRSS`), in MB.
fn resident_mb() -> Option<f64> {
    memory(|status| status.vmrss)
}

fn memory(of: fn(procfs::process::Status) -> Option<u64>) -> Option<f64> {
    let status = procfs::process::Process::myself().ok()?.status().ok()?;
    Some(round(ui::mb(1024 * of(status)?), 1))
}

fn human(s: &Speed) -> String {
    let mut text = format!(
        "threads        {}, {} for a single text\nkernels        {}\nload           {:.1} ms\nfirst answer   {:.1} ms\nlatency        p50 {:.2} ms, p99 {:.2} ms, tokenising included\n",
        s.threads, s.threads_for_one, s.isa, s.load_ms, s.first_answer_ms, s.latency_ms.p50, s.latency_ms.p99
    );
    for at in &s.by_length {
        let l = &at.latency_ms;
        text += &format!(
            "  {:>4} tokens  p50 {:.3} ms, p99 {:.3} ms, {:.0} GOP/s, {:.0}% of the peak\n",
            at.tokens,
            l.p50,
            l.p99,
            at.gop_per_s,
            100.0 * at.peak_share
        );
    }
    text += &format!("throughput     {:.0} sentences/s, tokenising included", s.sentences_per_s);
    if let Some(work) = &s.work {
        let linears: Vec<_> =
            work.linear_mmac_per_token.iter().map(|(scheme, macs)| format!("{macs:.2} in {scheme}")).collect();
        text += &format!(
            ", {:.0} GOP/s, {:.0}% of the peak\npeak           {:.0} GOP/s of {} in registers\nlinears        {} \
             million multiply-accumulates a token\n",
            work.gop_per_s,
            100.0 * work.peak_share,
            work.peak_gop_per_s,
            work.arithmetic,
            linears.join(", ")
        );
    } else {
        text += "\n";
    }
    if let Some(rss) = s.peak_rss_mb {
        text += &format!("peak memory    {rss:.1} MB");
    }
    if let Some(m) = &s.memory_mb {
        let known = |part: Option<f64>| part.map_or_else(|| "?".to_string(), |mb| format!("{mb:.1}"));
        text += &format!(
            ": program {}, weights {:.1}, embeddings {:.1}, tokeniser {}, activations {}\n",
            known(m.process),
            m.weights,
            m.embeddings,
            known(m.tokenizer),
            known(m.activations)
        );
    }
    if let Some(against) = &s.against {
        let at = |(tokens, ratio): (&usize, &f64)| format!("{tokens}: {ratio:.2}");
        text += &format!(
            "against {}\n  latency through its latency at {}\n  throughput through its throughput {:.2}\n",
            against.model.display(),
            against.latency_ratio.iter().map(at).collect::<Vec<_>>().join(", "),
            against.throughput_ratio
        );
    }
    text
}
