//! The search for small models: cheap screens first (costs that are counted, cuts without training), short trainings for
//! many shapes, longer ones for few (successive halving, Jamieson and Talwalkar 2016), every trained shape stored in every
//! way, and the survivors measured.
//!
//! Choices are made on a validation part of the training data, by accuracy and by costs that are counted, not timed:
//! so the same seed makes the same choices. Latency and memory are measured at the end and decide the Pareto set. The
//! test data are read once, for the final points. Every trial is a recipe run in a folder of its own, named by the
//! hash of all that it is made from: a search that goes on finds what is done, and trials share what they can.

mod finish;
mod pool;
mod space;
mod trial;

use super::corpus::{Wanted, hash_file, hash_model, hash_of, write_parts};
use super::pareto;
use crate::exit::{interrupted, usage};
use crate::recipe::{Kind, SearchFile};
use crate::settings::{Data, Distill, Train};
use crate::ui::{Bar, Ui, duration, percent};
use anyhow::{Context, Result, bail};
use pool::{End, Share, Task};
use quetsch::atomic::write_file;
use quetsch::baseline::TfIdf;
use quetsch::data::Dataset;
use quetsch::dir;
use quetsch::metrics;
use quetsch::runtime::Classifier;
use quetsch::spec::ModelSpec;
use quetsch::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use space::{Shape, cover, macs, shapes, spread_layers, survivors};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;
use trial::{Status, Trial};

pub use finish::Found;
use finish::Outcome;

/// The search's own record.
const RECORD: &str = "search.json";
/// Share of the time that is left for storing and measuring what was trained.
const RESERVE: f64 = 0.1;
/// Sentences whose lengths stand for all in the cost model.
const LENGTHS: usize = 256;

/// How to search.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Trials at a time.
    pub jobs: usize,
    /// Threads of all trials together.
    pub threads: usize,
    /// Time the models of a finished search again.
    pub again: bool,
}

/// A search on its way.
struct Search<'a> {
    file: &'a SearchFile,
    options: Options,
    ui: &'a Ui,
    /// Hash of what decides the result.
    key: String,
    /// Trials read this in place of the user's files: the test data are out of their reach.
    data: Data,
    data_hash: String,
    lengths: Vec<usize>,
    /// Accuracy of the TF-IDF baseline on the validation part.
    baseline: f64,
    started: Instant,
    /// Seconds that earlier runs of this search took.
    before_s: f64,
    trials: Vec<Trial>,
    bar: Bar,
}

/// `search.json`.
#[derive(Serialize, JsonSchema)]
struct Record<'a> {
    /// Layout of this JSON.
    version: u32,
    /// Hash of the search file, the data and the program's version.
    key: &'a str,
    /// Whether the search is at its end; before it there are the trials so far.
    finished: bool,
    /// What all runs of the search took.
    seconds: f64,
    #[serde(flatten)]
    outcome: Option<Outcome<'a>>,
    /// In the order in which they were planned.
    trials: &'a [Trial],
}

/// What `search.json` of an interrupted search tells.
#[derive(Deserialize)]
struct Earlier {
    key: String,
    seconds: f64,
    #[serde(default)]
    finished: bool,
}

/// Runs a search, or goes on with it.
pub fn search(file: &SearchFile, options: Options, ui: &Ui) -> Result<Found> {
    let _alone = super::alone(&file.out, || false)?;
    file.warnings.iter().for_each(|w| ui.warn(w));
    let local = file.fetched(ui)?;
    let (named, file) = (file, &local);
    // What cannot be asked for is known before anything is trained.
    if let Some(start) = file.teacher.as_ref().or(file.model.as_ref()) {
        shapes(&file.space, &dir::read_checkpoint(start)?.spec)?;
    }
    let split = split(file, ui)?;
    let key = hash_of(&[&serde_json::to_string(named)?, &split.hash, env!("CARGO_PKG_VERSION")]);
    let earlier =
        std::fs::read(file.out.join(RECORD)).ok().and_then(|b| serde_json::from_slice::<Earlier>(&b).ok());
    if earlier.as_ref().is_some_and(|e| e.finished && e.key == key) && !options.again {
        ui.note(format!("{}: this search is done already", file.out.display()));
        return Found::read(&file.out.join(RECORD));
    }
    let baseline = baseline(&split.train, &split.validation);
    // Rounds of halving, a student a depth, and the teacher.
    let rounds = std::iter::successors(Some(file.search.trials), |n| Some(survivors(*n, file.search.keep)));
    let expected = 1 + file.space.layers.len() + rounds.take(file.search.rungs.len()).sum::<usize>();
    let mut s = Search {
        file,
        options: Options { jobs: options.jobs.max(1), ..options },
        ui,
        key,
        data: split.data,
        data_hash: split.hash,
        lengths: vec![],
        baseline,
        started: Instant::now(),
        before_s: earlier.map_or(0.0, |e| e.seconds),
        trials: vec![],
        bar: ui.bar(expected as u64, "search"),
    };
    let (rows, held) = (split.train.len(), split.validation.len());
    s.say(format!("{rows} sentences to train on, {held} to choose on; TF-IDF reaches {} there", percent(baseline)));
    let outcome = s.run(&split.train);
    // What is known so far is worth having, whatever ended the search.
    if outcome.is_err() {
        s.save(None)?;
        if crate::ui::is_interrupted() {
            let done = s.trials.iter().filter(|t| t.status == Status::Done).count();
            return Err(interrupted(format!(
                "interrupted; {done} models are done, a training that was on its way is saved. Run the same command to go \
                 on"
            )));
        }
    }
    outcome
}

/// The data of the trials.
struct Split {
    train: Dataset,
    validation: Dataset,
    data: Data,
    hash: String,
}

/// Writes the two parts of the training data as files of their own.
fn split(file: &SearchFile, ui: &Ui) -> Result<Split> {
    let whole = super::corpus::training(&file.data, Wanted::default(), file.seed, ui)?;
    if whole.train.task != quetsch::task::Task::default() {
        return Err(usage(format!(
            "a search compares accuracies of one label a text; this task is {}",
            whole.train.task
        )));
    }
    let (train, validation) = (whole.train, whole.validation);
    if validation.is_empty() {
        return Err(usage(format!(
            "{} sentences are too few to set {} of each label aside: a search chooses on a validation part",
            train.len(),
            percent(file.data.validation)
        )));
    }
    let parts = [("train", &train), ("validation", &validation)];
    let paths = write_parts(&file.out.join("data"), &file.data, parts)?;
    let hash = hash_of(&[&hash_file(paths[0].as_ref())?, &hash_file(paths[1].as_ref())?]);
    let data = Data {
        train: Some(paths[0].clone()),
        test: Some(paths[1].clone()),
        validation: 0.0,
        text_col: file.data.text_col.clone(),
        label_col: file.data.label_col.clone(),
        ..Data::default()
    };
    Ok(Split { train, validation, data, hash })
}

fn baseline(train: &Dataset, validation: &Dataset) -> f64 {
    let model = TfIdf::fit(&train.texts, &train.labels, train.names.len());
    let scores: Vec<f32> = validation.texts.iter().flat_map(|t| model.scores(t)).collect();
    metrics::evaluate(&scores, &validation.labels, &validation.names).accuracy
}

impl Search<'_> {
    fn say(&mut self, text: impl std::fmt::Display) {
        self.bar.line(text);
    }

    fn seconds(&self) -> f64 {
        self.before_s + self.started.elapsed().as_secs_f64()
    }

    fn run(&mut self, train: &Dataset) -> Result<Found> {
        let teacher = self.teacher()?;
        let folder = self.trials[teacher].dir.clone();
        let spec = dir::read_checkpoint(&folder)?.spec;
        self.lengths = lengths(&folder, train, self.file.distill.training.max_length, self.options.threads)?;
        self.trials[teacher].macs = macs(&spec, &self.lengths)?;

        let chosen = self.screen(&spec)?;
        let students = self.students(&spec, &chosen)?;
        let finals = self.halving(&spec, chosen, &students)?;
        self.finish(teacher, finals)
    }

    /// The teacher: trained without the validation part, or given.
    fn teacher(&mut self) -> Result<usize> {
        let f = self.file;
        if let Some(given) = &f.teacher {
            return self.given(Path::new(given));
        }
        let model = f.model.clone().context("a search file names a model or a teacher")?;
        let kind = Kind::Train(Train { model: Some(trial::place(model.as_ref())), ..f.train.clone() });
        let parent = hash_model(model.as_ref())?;
        let i = self.plan("teacher".into(), "teacher", kind, &parent, f.train.training.epochs, 0.0)?;
        self.run_trials(&[i])?;
        match &self.trials[i].status {
            Status::Done => Ok(i),
            other => bail!("the teacher could not be trained: {other}"),
        }
    }

    /// A teacher that was trained before.
    fn given(&mut self, folder: &Path) -> Result<usize> {
        let classifier = Classifier::load(folder, None)?;
        let path = self.data.test.as_deref().context("the validation part has a file")?;
        let set = super::corpus::read(path.as_ref(), &self.data, (&classifier).into())?;
        let logits = classifier.logits(&set.texts, self.options.threads)?;
        let figures = metrics::evaluate(&logits, &set.labels, classifier.labels());
        let teacher = Trial {
            accuracy: Some(figures.accuracy),
            parameters: dir::read_checkpoint(folder)?.parameters() as u64,
            disk_bytes: super::corpus::disk_bytes(folder),
            ..Trial::given("teacher", hash_model(folder)?, folder)
        };
        self.say(format!(
            "the teacher is given, {} on the validation part; if it was trained on that, accuracies here flatter",
            percent(figures.accuracy)
        ));
        self.trials.push(teacher);
        Ok(self.trials.len() - 1)
    }

    /// The shapes that are worth a training: as many as the file says, spread over the costs of the space.
    fn screen(&mut self, teacher: &ModelSpec) -> Result<Vec<Shape>> {
        let all = shapes(&self.file.space, teacher)?;
        let costs =
            all.iter().map(|s| Ok(macs(&s.spec(teacher), &self.lengths)?.ln())).collect::<Result<Vec<_>>>()?;
        let chosen = cover(&costs, self.file.search.trials, self.file.seed);
        let dearest = costs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let cheapest = costs.iter().copied().fold(f64::INFINITY, f64::min);
        let search = &self.file.search;
        let mean = chosen.iter().map(|&i| costs[i].exp()).sum::<f64>() / chosen.len().max(1) as f64;
        let alive = std::iter::successors(Some(chosen.len()), |n| Some(survivors(*n, search.keep)));
        let epochs: usize = alive.zip(&search.rungs).map(|(n, epochs)| n * epochs).sum();
        let depths: Vec<usize> = chosen.iter().map(|&i| all[i].layers).collect();
        let plan = self.pace().map_or_else(String::new, |pace| {
            format!("; {epochs} epochs of them take about {}", duration(pace * mean * epochs as f64))
        });
        self.say(format!(
            "{} shapes in the space, {} are tried, of {} to {} layers; the dearest computes {:.1} times as much as the \
             cheapest{plan}",
            all.len(),
            chosen.len(),
            depths.iter().min().unwrap_or(&0),
            depths.iter().max().unwrap_or(&0),
            (dearest - cheapest).exp()
        ));
        Ok(chosen.into_iter().map(|i| all[i].clone()).collect())
    }

    /// One student for each depth, which all shapes of that depth start from.
    fn students(&mut self, teacher: &ModelSpec, shapes: &[Shape]) -> Result<BTreeMap<usize, usize>> {
        let all = teacher.layers.len();
        let mut of_depth = BTreeMap::from([(all, 0)]);
        let mut new = vec![];
        for shape in shapes {
            if of_depth.contains_key(&shape.layers) {
                continue;
            }
            let plain = Shape { heads: 0.0, ffn: 0.0, ..shape.clone() };
            let base = &self.file.distill;
            let kind = Kind::Distill(Distill {
                layers: spread_layers(shape.layers, all),
                teacher: Some(trial::place(&self.trials[0].dir)),
                ..base.clone()
            });
            let (cost, parent) = (macs(&plain.spec(teacher), &self.lengths)?, self.trials[0].key.clone());
            let name = format!("d{}", shape.layers);
            let i = self.plan(name, "student", kind, &parent, base.training.epochs, cost)?;
            of_depth.insert(shape.layers, i);
            new.push(i);
        }
        self.run_trials(&new)?;
        Ok(of_depth)
    }

    /// Trains all shapes a little, the better ones more. Returns the last trial of every shape that has one.
    fn halving(
        &mut self,
        teacher: &ModelSpec,
        shapes: Vec<Shape>,
        students: &BTreeMap<usize, usize>,
    ) -> Result<Vec<usize>> {
        let rungs = self.file.search.rungs.clone();
        let mut latest: Vec<(Shape, usize, bool)> =
            shapes.into_iter().map(|s| (students[&s.layers], s)).map(|(i, s)| (s, i, false)).collect();
        let mut alive: Vec<usize> = (0..latest.len()).collect();
        for (rung, epochs) in rungs.into_iter().enumerate() {
            if rung > 0 {
                let points: Vec<(f64, f64)> = alive
                    .iter()
                    .map(|&at| &self.trials[latest[at].1])
                    .map(|t| (t.macs.ln(), t.accuracy.unwrap_or(0.0)))
                    .collect();
                let most = points.iter().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
                let least = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
                // A point below the worst and dearer than the dearest: every shape adds something at first.
                let reference = (most + 2f64.ln(), least - 0.01);
                let keep = survivors(alive.len(), self.file.search.keep);
                let mut kept: Vec<usize> =
                    pareto::select(&points, keep, reference).into_iter().map(|i| alive[i]).collect();
                kept.sort_unstable();
                alive = kept;
            }
            let (mut new, mut gone) = (vec![], vec![]);
            for &at in &alive {
                let (shape, parent) = (latest[at].0.clone(), latest[at].1);
                // Without training, a shape that is not cut is the student that it starts from.
                if epochs == 0 && !shape.is_cut() {
                    continue;
                }
                let cost = macs(&shape.spec(teacher), &self.lengths)?;
                let folder = |i: usize| Some(trial::place(&self.trials[i].dir));
                let kind = match self.trials[parent].shape.is_none() && shape.is_cut() {
                    true => {
                        let stage = shape.prune(&self.file.prune, epochs);
                        Kind::Prune(crate::settings::Prune { model: folder(parent), teacher: folder(0), ..stage })
                    }
                    false => {
                        let stage = shape.distill(&self.file.distill, epochs);
                        Kind::Distill(Distill { model: folder(parent), teacher: folder(0), ..stage })
                    }
                };
                if self.trials[parent].status != Status::Done {
                    gone.push(at);
                    continue;
                }
                let inputs = hash_of(&[&self.trials[parent].key, &self.trials[0].key]);
                let i = self.plan(format!("{}.r{rung}", shape.name()), "round", kind, &inputs, epochs, cost)?;
                self.trials[i].shape = Some(shape);
                self.trials[i].rung = Some(rung);
                new.push((at, i));
            }
            self.run_trials(&new.iter().map(|n| n.1).collect::<Vec<_>>())?;
            let (mut done, tried) = (0, alive.len());
            for (at, i) in new {
                if self.trials[i].status == Status::Done {
                    (latest[at].1, latest[at].2) = (i, true);
                    done += 1;
                } else {
                    gone.push(at);
                }
            }
            alive.retain(|at| !gone.contains(at));
            self.say(match epochs {
                0 => format!("round {}: {done} shapes cut, none trained", rung + 1),
                _ => format!("round {}: {epochs} epochs for {tried} shapes, {done} trained", rung + 1),
            });
        }
        Ok(latest.into_iter().filter(|l| l.2).map(|l| l.1).collect())
    }

    /// Notes a trial down: its folder is named by everything that it is made from.
    fn plan(
        &mut self,
        name: String,
        stage: &'static str,
        kind: Kind,
        parent: &str,
        epochs: usize,
        macs: f64,
    ) -> Result<usize> {
        let key = trial::key(&kind, parent, &self.data_hash, self.file.seed)?;
        let trial = Trial::planned(name, stage, key, &self.file.out.join("trials"), kind);
        self.trials.push(Trial { epochs, macs, ..trial });
        self.bar.extend(self.trials.len() as u64);
        Ok(self.trials.len() - 1)
    }

    /// Runs trials of one level side by side; none of them needs another.
    fn run_trials(&mut self, which: &[usize]) -> Result<()> {
        let tasks: Vec<Task> = which.iter().map(|&i| self.trials[i].write(self)).collect::<Result<_>>()?;
        let share = Share {
            jobs: self.options.jobs,
            threads: (self.options.threads / self.options.jobs.min(which.len().max(1))).max(1),
        };
        let search = std::cell::RefCell::new(self);
        let mut may_start = |i: usize| {
            let mut s = search.borrow_mut();
            s.show(which[i]);
            s.is_affordable(which[i])
        };
        let mut ended = |i: usize, end: End| {
            let mut s = search.borrow_mut();
            s.trials[which[i]].end(end);
            let line = s.trials[which[i]].line();
            s.bar.line(line);
            s.save(None).map(drop)
        };
        pool::run(&tasks, share, &mut may_start, &mut ended)
    }

    /// Whether a training would end within the time; what is done or begun already is always worth looking at.
    fn is_affordable(&self, i: usize) -> bool {
        let limit = 60.0 * self.file.search.minutes;
        let trial = &self.trials[i];
        if limit == 0.0 || trial.epochs == 0 || trial.stage == "teacher" || trial.is_there() {
            return true;
        }
        let expected = self.pace().map_or(0.0, |pace| pace * trial.work());
        self.seconds() + expected <= limit * (1.0 - RESERVE)
    }

    /// Seconds for a multiply-accumulate of one sentence and epoch, by the trainings so far.
    fn pace(&self) -> Option<f64> {
        let done = self.trials.iter().filter(|t| t.status == Status::Done && t.work() > 0.0);
        let (seconds, work) = done.fold((0.0, 0.0), |sum, t| (sum.0 + t.seconds, sum.1 + t.work()));
        (work > 0.0 && seconds > 0.0).then_some(seconds / work)
    }

    /// What is going on, for the bar.
    fn show(&mut self, i: usize) {
        let ended = self.trials.iter().filter(|t| t.status != Status::Planned).count();
        let best = self.trials.iter().skip(1).filter_map(|t| Some((t.accuracy?, &t.name)));
        let best = best.max_by(|a, b| a.0.total_cmp(&b.0));
        let best = best.map_or_else(String::new, |(a, name)| format!(", best {} ({name})", percent(a)));
        let left = self.trials.iter().filter(|t| t.status == Status::Planned).map(Trial::work).sum::<f64>();
        let left = self.pace().map_or_else(String::new, |pace| {
            format!(", this round {} more", duration(pace * left / self.options.jobs as f64))
        });
        let (name, time) = (self.trials[i].name.clone(), duration(self.seconds()));
        self.bar.at(ended as u64, || format!("{name}{best}, {time} so far{left}"));
    }

    /// Writes what is known so far, or what was found.
    fn save(&self, outcome: Option<Outcome>) -> Result<Value> {
        let record = Record {
            version: 1,
            key: &self.key,
            finished: outcome.is_some(),
            seconds: super::round(self.seconds(), 1),
            outcome,
            trials: &self.trials,
        };
        write_file(self.file.out.join(RECORD), &super::pretty(&record)?)?;
        Ok(serde_json::to_value(record)?)
    }
}

/// Lengths in tokens of some training sentences, evenly taken.
fn lengths(teacher: &Path, train: &Dataset, longest: usize, threads: usize) -> Result<Vec<usize>> {
    let tokenizer = Tokenizer::new(&dir::read_tokenizer(teacher)?)?;
    let step = train.len().div_ceil(LENGTHS).max(1);
    let texts: Vec<&String> = train.texts.iter().step_by(step).collect();
    Ok(tokenizer.encode_all(&texts, longest, threads)?.iter().map(|e| e.ids.len()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_schema_is_that_of_the_record() {
        crate::work::compare::tests::assert_published::<Record>("search.schema.json");
    }
}
