//! Training as the program does it: the library's one loop with a bar, `metrics.jsonl`, validation after every epoch,
//! a state to resume from, and a good end on Ctrl-C.

use super::corpus::Training as Corpus;
use super::events::{self, Events};
use crate::exit::{interrupted, usage};
use crate::settings::{KeepEpoch, Schedule, Training};
use crate::ui::{self, Ui, duration, percent};
use anyhow::{Context, Result, anyhow};
use quetsch::checkpoint::Checkpoint;
use quetsch::data::Examples;
use quetsch::dir::{self, ModelDir};
use quetsch::metrics;
use quetsch::runtime::Model;
use quetsch::task::Problem;
use quetsch::tokenizer::{Tokenizer, TokenizerFiles};
use quetsch_train::fit::Progress;
use quetsch_train::{
    Dropout, Event, FitError, FitSettings, Losses, Objective, Qat, Sparsity, State, Stop, TrainSet, fit,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The training sentences as the model reads them.
pub struct Encoded {
    /// Where texts are cut.
    pub max_length: usize,
    /// What is trained on.
    pub train: Examples,
    /// What settings are chosen on.
    pub validation: Examples,
}

/// Where texts are cut if that is asked for: no later than the model cuts them when it is used.
pub fn length(ck: &Checkpoint, asked: usize) -> usize {
    asked.min(ck.max_length.unwrap_or(usize::MAX)).min(ck.spec.longest())
}

/// Tokenises the training data.
pub fn encode(corpus: &Corpus, tokenizer: &TokenizerFiles, max_length: usize, threads: usize) -> Result<Encoded> {
    let tokenizer = Tokenizer::new(tokenizer)?;
    let mut train = Examples::read(&corpus.train, &tokenizer, max_length, threads)?;
    if !corpus.unlabelled.is_empty() {
        let open = Examples::read(&corpus.open(), &tokenizer, max_length, threads)?;
        train.extend_unlabelled(open, corpus.train.task.problem != Problem::SingleLabel);
    }
    let validation = Examples::read(&corpus.validation, &tokenizer, max_length, threads)?;
    Ok(Encoded { max_length, train, validation })
}

/// One epoch of a report.
#[derive(Clone, Debug, Serialize)]
pub struct Epoch {
    epoch: usize,
    loss: f64,
    ce: f64,
    /// The teacher's parts.
    #[serde(flatten)]
    parts: BTreeMap<&'static str, f64>,
    /// `validation_accuracy`, or what the task has in its place.
    #[serde(flatten)]
    validation: BTreeMap<String, f64>,
}

/// What training made.
pub struct Trained {
    /// The weights that were kept.
    pub checkpoint: Checkpoint,
    /// Mean losses and validation accuracy by epoch; a resumed run lists the epochs since.
    pub epochs: Vec<Epoch>,
    /// Optimiser steps.
    pub steps: usize,
    /// The epoch whose weights were kept.
    pub kept_epoch: usize,
    /// By layer of the student: what the weights of the teacher's layers became.
    pub layer_weights: BTreeMap<usize, Vec<f32>>,
    /// `metrics.jsonl`, and the same for TensorBoard.
    pub files: Vec<(&'static str, Vec<u8>)>,
}

/// Everything that one training needs.
pub struct Fit<'a> {
    /// Name for the bar.
    pub name: &'a str,
    /// Where it starts.
    pub start: &'a Checkpoint,
    /// Goes into the kept epochs' folders.
    pub tokenizer: &'a TokenizerFiles,
    /// Tokens.
    pub encoded: &'a Encoded,
    /// What is minimised.
    pub objective: Objective<'a>,
    /// How.
    pub settings: &'a Training,
    /// What happens to weights that are exactly 0.
    pub sparsity: Sparsity,
    /// Quantisation in the forward.
    pub quant: Option<Qat>,
    /// Threads.
    pub threads: usize,
    /// Folder for the state, the best epoch and `metrics.jsonl`.
    pub state: &'a Path,
    /// Hash of inputs and settings.
    pub key: &'a str,
    /// Go on from the state.
    pub resume: bool,
}

/// The best epoch so far, beside its weights.
#[derive(Serialize, Deserialize)]
struct Best {
    epoch: usize,
    accuracy: f64,
}

impl Fit<'_> {
    /// Trains.
    pub fn run(&self, ui: &Ui) -> Result<Trained> {
        let s = self.settings;
        if s.patience > 0 && self.encoded.validation.is_empty() {
            return Err(usage("`patience` needs validation data: set --validation, such as 0.1"));
        }
        fs::create_dir_all(self.state).with_context(|| format!("cannot make {}", self.state.display()))?;
        let (best_dir, state_dir) = (self.state.join("best"), self.state.join("state"));
        // Killed before the first save, a run has nothing to go on from.
        let resume = self.resume && state_dir.exists();
        if !resume && best_dir.exists() {
            fs::remove_dir_all(&best_dir).with_context(|| format!("cannot remove {}", best_dir.display()))?;
        }
        let mut metrics = Metrics::open(self.state, resume)?;
        ui.note(format!("{}: matrix products in {}", self.name, s.precision.here().name()));
        let set = TrainSet::from(&self.encoded.train);
        let state = State { dir: &state_dir, every_steps: s.save_every, resume, key: self.key.to_string() };
        let (mut epochs, mut trouble): (Vec<Epoch>, Option<anyhow::Error>) = (vec![], None);
        let mut bar: Option<ui::Bar> = None;
        let (mut last, mut at) = (0, 0);
        let started = Instant::now();
        let mut on = |event: Event| -> ControlFlow<Stop> {
            let mut enough = false;
            let handled = match event {
                Event::Resumed { step, epoch } => {
                    ui.note(format!("{}: going on after step {step}", self.name));
                    (last, enough) = (epoch, self.is_enough(epoch, &best_dir));
                    metrics.cut_after(step)
                }
                Event::Step(p) => {
                    let bar = bar.get_or_insert_with(|| ui.bar(p.steps as u64, self.name));
                    bar.at(p.step as u64, || describe(&p));
                    at = p.step;
                    metrics.write(&p)
                }
                Event::Epoch { epoch, epochs: total, checkpoint, mean } => {
                    self.validate(checkpoint, epoch, &best_dir).and_then(|accuracy| {
                        let validation = accuracy.map(|score| format!(", validation {}", shown(score)));
                        let line = format!(
                            "{}: epoch {epoch}/{total}  loss {:.4}{}  {}",
                            self.name,
                            mean.total,
                            validation.unwrap_or_default(),
                            duration(started.elapsed().as_secs_f64())
                        );
                        match &mut bar {
                            Some(bar) => bar.line(line),
                            None => ui.note(line),
                        }
                        epochs.push(Epoch {
                            epoch,
                            loss: mean.total,
                            ce: mean.ce,
                            parts: present(&mean),
                            validation: accuracy
                                .map(|(name, x)| (format!("validation_{name}"), x))
                                .into_iter()
                                .collect(),
                        });
                        (last, enough) = (epoch, self.is_enough(epoch, &best_dir));
                        let tag = accuracy.map(|(name, x)| (format!("validation/{name}"), x));
                        let validation = tag.iter().map(|(tag, x)| (tag.as_str(), *x));
                        metrics.events.scalars(at, validation.chain([("epoch/loss", mean.total)]))
                    })
                }
            };
            match handled {
                Err(e) => {
                    trouble = Some(e);
                    ControlFlow::Break(Stop::Interrupted)
                }
                Ok(()) if enough => ControlFlow::Break(Stop::Enough),
                Ok(()) if ui::is_interrupted() => ControlFlow::Break(Stop::Interrupted),
                Ok(()) => ControlFlow::Continue(()),
            }
        };
        let fitted = fit(self.start, &set, &self.objective, &self.fit_settings(), Some(&state), &mut on);
        drop(bar);
        if let Some(e) = trouble {
            return Err(e);
        }
        let fitted = fitted.map_err(|e| self.explain(e))?;
        if last < s.epochs {
            ui.note(format!("{}: no better for {} epochs, stopped after epoch {last}", self.name, s.patience));
        }
        let (checkpoint, kept_epoch) = match (s.keep, read_best(&best_dir)) {
            (KeepEpoch::Best, Some(best)) if best.epoch != last => {
                let mut kept = dir::read_checkpoint(&best_dir)?;
                kept.config.clone_from(&self.start.config);
                (kept, best.epoch)
            }
            _ => (fitted.checkpoint, last),
        };
        drop(metrics);
        let read = |name| {
            let path = self.state.join(name);
            Ok((name, fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?))
        };
        let files = [METRICS, events::FILE].into_iter().map(read).collect::<Result<_>>()?;
        let layer_weights = fitted.layer_weights.into_iter().collect();
        Ok(Trained { checkpoint, epochs, steps: fitted.steps, kept_epoch, layer_weights, files })
    }

    fn fit_settings(&self) -> FitSettings {
        let s = self.settings;
        FitSettings {
            epochs: s.epochs,
            batch_size: s.batch_size,
            accumulate: s.accumulate,
            learning_rate: s.learning_rate as f32,
            head_learning_rate: s.head_learning_rate() as f32,
            weight_decay: s.weight_decay as f32,
            warmup: s.warmup as f32,
            schedule: match s.schedule {
                Schedule::Linear => quetsch_train::Schedule::Linear,
                Schedule::Cosine => quetsch_train::Schedule::Cosine,
                Schedule::Constant => quetsch_train::Schedule::Constant,
            },
            clip: s.clip as f32,
            dropout: Dropout { hidden: s.dropout as f32, attention: s.dropout as f32, head: s.head_dropout as f32 },
            freeze: s.freeze.clone(),
            seed: s.seed.unwrap_or(42),
            threads: self.threads,
            precision: s.precision.here(),
            sparsity: self.sparsity,
            recompute: s.recompute,
            quant: self.quant.clone(),
        }
    }

    /// The validation figure, and the weights kept if it is the best so far.
    fn validate(
        &self,
        checkpoint: &Checkpoint,
        epoch: usize,
        best_dir: &Path,
    ) -> Result<Option<(&'static str, f64)>> {
        if self.encoded.validation.is_empty() {
            return Ok(None);
        }
        let (name, accuracy) = score(checkpoint, &self.encoded.validation, self.threads)?;
        let better = read_best(best_dir).is_none_or(|b| accuracy > b.accuracy);
        if self.settings.keep == KeepEpoch::Best && better && self.is_thin(epoch) {
            let folder = quetsch::atomic::Folder::create(best_dir, true)?;
            let model = ModelDir { checkpoint: checkpoint.clone(), tokenizer: self.tokenizer.clone() };
            dir::write_into(&folder, &model)?;
            folder.write("best.json", &serde_json::to_vec(&Best { epoch, accuracy })?)?;
            folder.commit()?;
        }
        Ok(Some((name, accuracy)))
    }

    /// Whether all zeros are there after this epoch: one that still has more weights is another model.
    fn is_thin(&self, epoch: usize) -> bool {
        match self.sparsity {
            Sparsity::Cubic { until, .. } => epoch as f64 >= until * self.settings.epochs as f64,
            Sparsity::Free | Sparsity::Keep => true,
        }
    }

    /// Whether the best epoch lies so far back that more of them are not worth it.
    fn is_enough(&self, epoch: usize, best_dir: &Path) -> bool {
        let patience = self.settings.patience;
        patience > 0 && read_best(best_dir).is_some_and(|b| epoch >= b.epoch + patience)
    }

    fn explain(&self, error: FitError) -> anyhow::Error {
        let name = self.name;
        match error {
            FitError::Interrupted { step, steps } => interrupted(format!(
                "{name}: interrupted after step {step} of {steps}; the training state is saved. Run the same command \
                 with --resume to go on"
            )),
            e @ FitError::NotFinite { .. } => match self.state.join("state").exists() {
                true => anyhow!("{name}: {e}. The state saved last is kept in {}", self.state.display()),
                false => anyhow!("{name}: {e}. No state had been saved before"),
            },
            FitError::Quetsch(e) => e.into(),
        }
    }
}

fn read_best(dir: &Path) -> Option<Best> {
    serde_json::from_slice(&fs::read(dir.join("best.json")).ok()?).ok()
}

/// The figure that models are ranked by, with its name: accuracy, micro-F1 or R2.
pub fn score(ck: &Checkpoint, examples: &Examples, threads: usize) -> Result<(&'static str, f64)> {
    let logits = Model::pack(ck).answers(&examples.encodings, &examples.units, threads)?;
    let problem = ck.task().unwrap_or_default().problem;
    Ok(metrics::measure(problem, &logits, examples.targets(), &ck.labels).main())
}

/// That figure for people.
pub fn shown((name, x): (&'static str, f64)) -> String {
    if name == "accuracy" { percent(x) } else { format!("{name} {x:.4}") }
}

/// The parts of a loss beside the cross-entropy: the KL, and what else is there.
fn present(losses: &Losses) -> BTreeMap<&'static str, f64> {
    losses.parts().into_iter().filter(|(name, x)| *name == "kl" || *x != 0.0).collect()
}

/// How far training is, for the bar.
fn describe(p: &Progress) -> String {
    let l = &p.losses;
    let parts: String =
        l.parts().iter().filter(|p| p.1 > 0.0).map(|(name, x)| format!(", {name} {x:.3}")).collect();
    format!(
        "epoch {}/{}  loss {:.3} (ce {:.3}{parts})  lr {:.1e}  {:.0} sentences/s  {} left",
        p.epoch,
        p.epochs,
        l.total,
        l.ce,
        p.learning_rate,
        p.sentences_per_s,
        duration(p.eta_s)
    )
}

/// One line a step. Nothing in it depends on time, so a resumed run ends with the same bytes.
const METRICS: &str = "metrics.jsonl";

/// [`METRICS`], and beside it the same with times for TensorBoard.
struct Metrics {
    path: PathBuf,
    file: File,
    events: Events,
}

impl Metrics {
    fn open(folder: &Path, resume: bool) -> Result<Metrics> {
        let path = folder.join(METRICS);
        let cannot = || format!("cannot write {}", path.display());
        let mut options = OpenOptions::new();
        options.create(true).append(resume).write(true).truncate(!resume);
        let file = options.open(&path).with_context(cannot)?;
        Ok(Metrics { file, events: Events::open(&folder.join(events::FILE), resume)?, path })
    }

    fn write(&mut self, p: &Progress) -> Result<()> {
        let mut line = json!({
            "step": p.step,
            "epoch": p.epoch,
            "loss": p.losses.total,
            "ce": p.losses.ce,
            "learning_rate": p.learning_rate,
            "gradient_norm": p.gradient_norm,
        });
        for (name, x) in present(&p.losses) {
            line[name] = x.into();
        }
        // One write a line: what a killed run was at must be in the file when it goes on.
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", self.path.display()))?;
        let numbers = line.as_object().into_iter().flatten().filter(|(tag, _)| *tag != "step");
        self.events.scalars(p.step, numbers.filter_map(|(tag, x)| Some((tag.as_str(), x.as_f64()?))))
    }

    /// Drops what a killed run wrote after the step that it goes on from.
    fn cut_after(&mut self, step: usize) -> Result<()> {
        #[derive(Deserialize)]
        struct Step {
            step: usize,
        }
        let mut kept = vec![];
        for line in BufReader::new(File::open(&self.path)?).lines() {
            let line = line?;
            match serde_json::from_str::<Step>(&line) {
                Ok(s) if s.step <= step => kept.extend_from_slice(format!("{line}\n").as_bytes()),
                _ => break,
            }
        }
        fs::write(&self.path, kept).with_context(|| format!("cannot write {}", self.path.display()))?;
        // The old handle would go on at its own place.
        self.file = OpenOptions::new().append(true).open(&self.path)?;
        Ok(())
    }
}
