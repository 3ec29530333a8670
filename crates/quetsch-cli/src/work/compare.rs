//! Variants of a model side by side: size, accuracy, what changed against the parent, speed and memory. Every variant
//! is timed in a fresh process, so that no allocator or cache is shared.

use super::gate::{self, Checked, Gate};
use super::machine::{self, Machine};
use super::parts::{self, Part, Storage};
use super::provenance::Provenance;
use super::quantize::Sensitivity;
use super::{corpus, round};
use crate::commands::Speed;
use crate::settings::{self, Data};
use crate::ui::Ui;
use anyhow::{Context, Result, anyhow, bail};
use quetsch::baseline::TfIdf;
use quetsch::data::{Dataset, Examples};
use quetsch::dir;
use quetsch::metrics::{self, Agreement, Distance, Figures, Metrics, Regression};
use quetsch::runtime::Classifier;
use quetsch::task::{Problem, Task};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

/// Changed answers that are written out for each variant; the counts are of all.
const FLIPS_SHOWN: usize = 40;
/// Points of a loss curve; each is a mean over as many steps as needed.
const CURVE_POINTS: usize = 100;

/// One line of the comparison.
#[derive(Serialize, JsonSchema)]
pub struct Variant {
    /// Stage id or folder.
    pub name: String,
    /// Its folder; none for a baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// What it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Number of parameters.
    pub parameters: usize,
    /// Bytes of the weights' files.
    pub disk_bytes: u64,
    /// What the bytes are spent on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
    /// How the weights are stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
    /// How much each of its layers minds being quantised, if that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<Sensitivity>,
    /// On the data.
    #[serde(flatten)]
    pub figures: Figures,
    /// The label that is found least often.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst_recall: Option<Worst>,
    /// Whether its accuracy is below the baseline's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub below_baseline: Option<bool>,
    /// With probabilities rescaled on data of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibrated: Option<Calibrated>,
    /// Against the parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub against_parent: Option<Agreement>,
    /// Against the first variant, if that is not the parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub against_first: Option<Agreement>,
    /// Numbers against those of the parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance_to_parent: Option<Distance>,
    /// The first changed answers, those that became wrong before all others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flipped: Vec<Flip>,
    /// The same against the first variant, if that is not the parent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flipped_from_first: Vec<Flip>,
    /// In a process of its own.
    #[serde(flatten)]
    pub speed: Option<Speed>,
    /// How the training loss fell: `[step, mean loss]`, if the model was trained.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub loss_curve: Vec<[f64; 2]>,
    /// What it was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provenance: Option<Provenance>,
}

impl Variant {
    /// The figures of labels; NaN where answers are numbers.
    pub fn labels(&self) -> &Metrics {
        static NONE: LazyLock<Metrics> = LazyLock::new(|| metrics::evaluate(&[], &[], &[]));
        self.figures.labels().unwrap_or(&NONE)
    }

    /// The figures of numbers.
    pub fn numbers(&self) -> Option<&Regression> {
        match &self.figures {
            Figures::Numbers(r) => Some(r),
            Figures::Labels(_) => None,
        }
    }
}

/// The label with the lowest recall.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Worst {
    /// The label.
    pub label: String,
    /// The share of its rows that are found.
    pub recall: f64,
    /// Its rows.
    pub support: usize,
}

/// Figures on the test data with logits divided by a temperature fitted on other data. Reported only: the model stays.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Calibrated {
    /// The temperature.
    pub temperature: f64,
    /// Expected calibration error with it.
    pub ece: f64,
    /// Loss with it.
    pub loss: f64,
}

/// One changed answer.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Flip {
    /// Row of the test data, from 0.
    pub row: usize,
    /// The sentence.
    pub text: String,
    /// Its label.
    pub truth: String,
    /// The answer of the parent, or of the first variant.
    pub parent_says: String,
    /// This variant's answer.
    pub says: String,
}

/// The data measured on.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct Measured {
    /// The file.
    pub test: String,
    /// blake3 of its bytes.
    pub test_blake3: String,
    /// The file that the baseline was fitted on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<String>,
    /// Whether the test data are a part of the training data, set aside and looked at before.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub held_out: bool,
}

/// Everything that a report shows. Layout: `docs/report.md`.
#[derive(Serialize, JsonSchema)]
pub struct Comparison {
    /// Layout of this JSON.
    pub version: u32,
    /// Program and version.
    pub tool: &'static str,
    /// Sentences measured on.
    pub sentences: usize,
    /// Number of labels.
    pub labels: usize,
    /// Threads used for timing.
    pub threads: usize,
    /// Where it was measured.
    pub machine: Machine,
    /// What it was measured on.
    pub data: Measured,
    /// When it was measured, in UTC.
    pub measured_at: String,
    /// The command that does it again.
    pub command: String,
    /// The command that does the comparison alone again.
    pub compare_command: String,
    /// The resolved recipe, if one was run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// The variant chosen on other data than these, if a search chose one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Chosen>,
    /// The variants in the order asked for, the baseline last.
    pub variants: Vec<Variant>,
    /// Gates and whether they are met.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<Checked>,
}

/// A choice made on validation data.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Chosen {
    /// The variant; none if every one loses too much.
    pub variant: Option<String>,
    /// The accuracy, in shares, that it was allowed to lose.
    pub max_drop: f64,
}

/// What to compare, on what.
pub struct Plan<'a> {
    /// (name, folder).
    pub models: Vec<(String, PathBuf)>,
    /// Test data, and training data for the baseline.
    pub data: &'a Data,
    /// Data to fit temperatures on, which no model was trained or is tested on.
    pub calibration: Option<Dataset>,
    /// What to leave out, and what is compared with what.
    pub settings: &'a settings::Compare,
    /// Conditions.
    pub gates: &'a [Gate],
    /// Models that the conditions pass over.
    pub skip_gates: usize,
    /// Threads.
    pub threads: usize,
}

/// Measures everything.
pub fn compare(plan: &Plan, ui: &Ui) -> Result<Comparison> {
    gate::possible(plan.gates, plan.settings.no_speed)?;
    let mut variants: Vec<Variant> = vec![];
    let (mut hashes, mut all_logits): (Vec<String>, Vec<Vec<f32>>) = (vec![], vec![]);
    let mut truth: Option<Dataset> = None;
    let mut known: Option<Examples> = None;
    let test = plan.data.test.as_ref().context("no test data: give --data FILE")?;
    let steps = plan.models.len() as u64;
    let mut bar = ui.bar(steps, "compare");
    for (i, (name, path)) in plan.models.iter().enumerate() {
        bar.at(i as u64, || name.clone());
        let model = dir::read(path)?;
        let named = |e| anyhow!("{}: {e}", path.display());
        let classifier = Classifier::new(&model, None).map_err(named)?;
        if truth.is_none() {
            truth = Some(corpus::read(test.as_ref(), plan.data, (&classifier).into())?);
            gate::sensible(plan.gates, classifier.task())?;
        }
        let Some(set) = &truth else { unreachable!("set above") };
        if classifier.labels() != set.names || classifier.task() != set.task {
            let what = if classifier.task() != set.task { "task is not that" } else { "labels are not those" };
            bail!("{}: its {what} of {}", path.display(), plan.models[0].1.display());
        }
        let (examples, logits) = classifier.answers(set, plan.threads).map_err(named)?;
        if known.as_ref().is_some_and(|first| first.count() != examples.count()) {
            bail!(
                "{}: it reads {} words of the data, {} reads {}: their answers do not stand side by side",
                path.display(),
                examples.count(),
                plan.models[0].1.display(),
                known.map_or(0, |first| first.count())
            );
        }
        let problem = set.task.problem;
        let hash = corpus::hash_model(path)?;
        let provenance = Provenance::read(path);
        let first = (i > 0).then_some(0);
        let parent = match plan.settings.against_first {
            true => first,
            false => parent_of(provenance.as_ref(), &hashes).or(first),
        };
        let outputs = set.names.len();
        let against = |p: usize| metrics::agree(problem, &all_logits[p], &logits, examples.targets(), outputs);
        let against_parent = parent.and_then(against);
        let not_parent = first.filter(|_| parent != first);
        let against_first = not_parent.and_then(against);
        let flipped = |against: Option<&Agreement>, from: Option<usize>| match against.zip(from) {
            Some((a, p)) if set.task == Task::default() => flips(a, &all_logits[p], &logits, set),
            _ => vec![],
        };
        let figures = metrics::measure(problem, &logits, examples.targets(), &set.names);
        let is_numbers = problem == Problem::Regression;
        let distance = parent.filter(|_| is_numbers).map(|p| metrics::distance(&all_logits[p], &logits, outputs));
        let calibrated = calibrated(plan, &classifier, &logits, set)?;
        if let Some(c) = calibrated.as_ref().filter(|c| metrics::is_at_bound(c.temperature)) {
            bar.line(format!(
                "warning: {name}: its temperature, {:.2}, is an end of those that are tried; the calibration data say \
                 little about this model",
                c.temperature
            ));
        }
        variants.push(Variant {
            name: name.clone(),
            dir: Some(path.clone()),
            parent: parent.map(|p| variants[p].name.clone()),
            parameters: model.checkpoint.parameters(),
            disk_bytes: corpus::disk_bytes(path),
            parts: parts::coarse(&model.checkpoint),
            storage: Some(parts::storage(&model.checkpoint)),
            sensitivity: Sensitivity::read(path),
            worst_recall: figures.labels().and_then(worst),
            below_baseline: None,
            calibrated,
            figures,
            flipped: flipped(against_parent.as_ref(), parent),
            flipped_from_first: flipped(against_first.as_ref(), not_parent),
            against_parent,
            distance_to_parent: distance,
            against_first,
            speed: None,
            loss_curve: loss_curve(path),
            provenance,
        });
        hashes.push(hash);
        all_logits.push(logits);
        known.get_or_insert(examples);
    }
    if !plan.settings.no_speed {
        for variant in &mut variants {
            bar.at(steps, || format!("timing {}", variant.name));
            if let Some(path) = &variant.dir {
                variant.speed = Some(measure(path, plan.data, plan.threads)?);
            }
        }
    }
    drop(bar);
    let set = truth.context("no model to compare")?;
    // The baseline gives each text one label.
    let has_baseline = !plan.settings.no_baseline && set.task == Task::default();
    if let Some(train) = plan.data.train.as_ref().filter(|_| has_baseline) {
        let train = corpus::read(train.as_ref(), plan.data, (&set).into())?;
        let baseline = TfIdf::fit(&train.texts, &train.labels, set.names.len());
        let scores: Vec<f32> = set.texts.iter().flat_map(|t| baseline.scores(t)).collect();
        let figures = metrics::evaluate(&scores, &set.labels, &set.names);
        variants.iter_mut().for_each(|v| v.below_baseline = Some(v.labels().accuracy < figures.accuracy));
        variants.push(Variant {
            name: BASELINE.into(),
            dir: None,
            parent: None,
            parameters: 0,
            disk_bytes: 0,
            parts: vec![],
            storage: None,
            sensitivity: None,
            worst_recall: worst(&figures),
            below_baseline: None,
            calibrated: None,
            figures: Figures::Labels(figures),
            against_parent: None,
            against_first: None,
            distance_to_parent: None,
            flipped: vec![],
            flipped_from_first: vec![],
            speed: None,
            loss_curve: vec![],
            provenance: None,
        });
    }
    let gates = gate::check(plan.gates, &variants, plan.skip_gates)?;
    Ok(Comparison {
        version: 1,
        tool: concat!("quetsch ", env!("CARGO_PKG_VERSION")),
        sentences: set.len(),
        labels: set.names.len(),
        threads: plan.threads,
        machine: machine::this(),
        data: Measured {
            test: test.clone(),
            test_blake3: corpus::hash_file(test.as_ref())?,
            train: plan.data.train.clone().filter(|_| has_baseline),
            held_out: false,
        },
        measured_at: chrono::Utc::now().format("%Y-%m-%d %H:%M UTC").to_string(),
        command: machine::command_line(),
        compare_command: command_of(plan),
        recipe: None,
        chosen: None,
        variants,
        gates,
    })
}

/// `quetsch compare` of the same models on the same data.
fn command_of(plan: &Plan) -> String {
    let (settings, data) = (plan.settings, plan.data);
    let mut words = vec!["compare".to_string()];
    words.extend(plan.models.iter().map(|(_, dir)| dir.display().to_string()));
    let values = [
        ("--data", &data.test),
        ("--train", &data.train),
        ("--text-col", &data.text_col),
        ("--label-col", &data.label_col),
        ("--label-separator", &data.label_separator),
    ];
    for (flag, value) in values {
        words.extend(value.iter().flat_map(|v| [flag.to_string(), v.clone()]));
    }
    let flags = [
        ("--no-baseline", settings.no_baseline),
        ("--no-speed", settings.no_speed),
        ("--against-first", settings.against_first),
    ];
    words.extend(flags.into_iter().filter(|f| f.1).map(|f| f.0.to_string()));
    words.extend(plan.gates.iter().flat_map(|g| ["--gate".to_string(), g.to_string()]));
    words.extend(["--threads".to_string(), plan.threads.to_string(), "--report".into(), "report.html".into()]);
    machine::quoted(words)
}

/// The name of the baseline's line.
pub const BASELINE: &str = "TF-IDF baseline";

/// The variant that this one was made from, by its provenance.
fn parent_of(provenance: Option<&Provenance>, hashes: &[String]) -> Option<usize> {
    let made_from = provenance.and_then(|p| p.inputs.get("model").or_else(|| p.inputs.get("teacher")))?;
    hashes.iter().position(|h| h == made_from)
}

fn worst(figures: &Metrics) -> Option<Worst> {
    let seen = figures.per_class.iter().filter(|c| c.support > 0);
    let worst = seen.min_by(|a, b| a.recall.total_cmp(&b.recall))?;
    Some(Worst { label: worst.label.clone(), recall: worst.recall, support: worst.support })
}

fn calibrated(plan: &Plan, model: &Classifier, logits: &[f32], test: &Dataset) -> Result<Option<Calibrated>> {
    // A temperature is of one label a text.
    let Some(set) = plan.calibration.as_ref().filter(|set| set.task == Task::default()) else { return Ok(None) };
    let own = model.logits(&set.texts, plan.threads)?;
    let temperature = metrics::temperature(&own, &set.labels, set.names.len());
    let scaled: Vec<f32> = logits.iter().map(|&x| (f64::from(x) / temperature) as f32).collect();
    let with = metrics::evaluate(&scaled, &test.labels, &test.names);
    Ok(Some(Calibrated { temperature, ece: with.ece, loss: with.loss }))
}

/// What became wrong first, then what became right, then one wrong answer for another.
fn flips(against: &Agreement, parent: &[f32], own: &[f32], set: &Dataset) -> Vec<Flip> {
    let labels = set.names.len();
    let says = |logits: &[f32], row: usize| metrics::argmax(&logits[row * labels..][..labels]);
    let rank = |row: usize| {
        let truth = set.labels[row] as usize;
        if says(parent, row) == truth { 0 } else { 1 + u8::from(says(own, row) != truth) }
    };
    let mut rows = against.flipped.clone();
    rows.sort_by_key(|&row| (rank(row), row));
    let flip = |row: usize| Flip {
        row,
        text: set.texts[row].clone(),
        truth: set.names[set.labels[row] as usize].clone(),
        parent_says: set.names[says(parent, row)].clone(),
        says: set.names[says(own, row)].clone(),
    };
    rows.into_iter().take(FLIPS_SHOWN).map(flip).collect()
}

/// From `metrics.jsonl`; empty without one.
fn loss_curve(dir: &Path) -> Vec<[f64; 2]> {
    #[derive(Deserialize)]
    struct Step {
        step: f64,
        loss: f64,
    }
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap_or_default();
    let steps: Vec<Step> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let chunks = steps.chunks(steps.len().div_ceil(CURVE_POINTS).max(1));
    let mean = |chunk: &[Step]| {
        let n = chunk.len() as f64;
        [chunk.iter().map(|s| s.step).sum::<f64>() / n, round(chunk.iter().map(|s| s.loss).sum::<f64>() / n, 5)]
    };
    chunks.map(mean).filter(|[_, loss]| loss.is_finite()).collect()
}

/// `quetsch bench` in a process of its own.
pub fn measure(model: &Path, data: &Data, threads: usize) -> Result<Speed> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.arg("bench").arg("--model").arg(model).args(["--format", "json", "--quiet"]);
    command.args(["--samples", "300", "--seconds", "0.1"]);
    command.args(["--threads", &threads.to_string()]);
    if let Some(test) = &data.test {
        command.args(["--data", test]);
    }
    if let Some(column) = &data.text_col {
        command.args(["--text-col", column]);
    }
    let done = command.stdin(Stdio::null()).output().context("cannot start the process that measures")?;
    if !done.status.success() {
        bail!("measuring {} failed: {}", model.display(), String::from_utf8_lossy(&done.stderr).trim());
    }
    serde_json::from_slice(&done.stdout).context("the process that measures wrote no JSON")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use schemars::generate::SchemaSettings;

    /// `docs/FILE` describes what is written. `QUETSCH_UPDATE=1` writes it anew.
    pub fn assert_published<T: JsonSchema>(file: &str) {
        let generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
        let found = serde_json::to_string_pretty(&generator.into_root_schema_for::<T>()).expect("JSON") + "\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(file);
        if std::env::var_os("QUETSCH_UPDATE").is_some() {
            std::fs::write(&path, &found).expect("written");
        }
        let published = std::fs::read_to_string(&path).expect("the schema");
        assert!(published == found, "{file}: run this test with QUETSCH_UPDATE=1 and look at what changed");
    }

    #[test]
    fn the_published_schema_is_that_of_the_report() {
        assert_published::<Comparison>("report.schema.json");
    }
}
