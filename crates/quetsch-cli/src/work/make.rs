//! What each stage makes: checkpoint in, checkpoint out.

use super::corpus::{self, Training as Corpus, Wanted};
use super::fit::{self, Encoded, Fit, Trained};
use super::teacher::{Inside, measure, soft};
use super::{Job, Made, folds, quantize, thin};
use crate::exit::usage;
use crate::recipe::Kind;
use crate::settings::{self, Data, Distill, Head, MORE_TEACHERS, Train, Training};
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use quetsch::atomic::write_file;
use quetsch::checkpoint::Checkpoint;
use quetsch::data::Examples;
use quetsch::dir::{self, ModelDir};
use quetsch::head::{HeadKind, with_head};
use quetsch::prune;
use quetsch::runtime::Model;
use quetsch::task::{Level, Problem, Task};
use quetsch::tokenizer::Tokenizer;
use quetsch_train::student::{Shape, random_student};
use quetsch_train::{ClassWeights, Hard, Loss, Objective, Qat, Sparsity};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Makes the stage's model.
pub fn make(job: &Job, key: &str, ui: &Ui) -> Result<Made> {
    match job.kind {
        Kind::Train(s) => train(job, s, key, ui),
        Kind::Distill(s) => distill(job, s, key, ui),
        Kind::Prune(s) => thin::prune(job, s, key, ui),
        Kind::Quantize(s) => quantize::quantize(job, s, key, ui),
        Kind::Eval(_) | Kind::Compare(_) => bail!("{} makes no model", job.kind.name()),
    }
}

pub(super) fn read_model(path: &Path, ui: &Ui) -> Result<ModelDir> {
    let model = dir::read(path)?;
    for warning in &model.checkpoint.warnings {
        ui.warn(format!("{}: {warning}", path.display()));
    }
    Ok(model)
}

fn train(job: &Job, s: &Train, key: &str, ui: &Ui) -> Result<Made> {
    let model = read_model(job.input("model")?, ui)?;
    let corpus = corpus_for(job.data, &model.checkpoint, job.seed, ui)?;
    let task = corpus.train.task;
    let kind = match (task.level, s.head) {
        (Level::Token, _) => HeadKind::Tokens,
        (Level::Sentence, Head::Mean) => HeadKind::Mean,
        (Level::Sentence, Head::Pooler) => HeadKind::Pooler,
    };
    let seed = s.training.seed.unwrap_or(job.seed);
    let start = with_head(&model.checkpoint.to_f32(), kind, corpus.train.names.clone(), seed)?;
    let start = start.with_problem(task.problem);
    let n = corpus.train.len();
    if s.folds > n {
        return Err(usage(format!("`folds` is {}, the training data has {n} sentences", s.folds)));
    }
    let length = fit::length(&model.checkpoint, s.training.max_length);
    let encoded = fit::encode(&corpus, &model.tokenizer, length, job.threads)?;
    let weights = class_weights(&s.training, &encoded, &corpus)?;
    let objective = Objective::CrossEntropy(hard(&s.training, &weights, corpus.train.task));
    let run = Run {
        job,
        corpus: &corpus,
        encoded: &encoded,
        model: &model,
        settings: &s.training,
        sparsity: sparsity(&s.training),
        key,
    };
    let (trained, report) = run.fit(&start, objective, ui)?;
    let mut files = trained.files;
    if s.folds > 0 {
        files.extend(folds::train(&run, &start, objective, s.folds, seed, ui)?);
    }
    Ok(Made { checkpoint: trained.checkpoint, tokenizer: model.tokenizer, report, files })
}

/// Training data in the model's own label order if they fit it, else in their own: a model fine-tuned for something
/// else gets a new head.
fn corpus_for(data: &Data, model: &Checkpoint, seed: u64, ui: &Ui) -> Result<Corpus> {
    if !model.labels.is_empty()
        && let Ok(corpus) = corpus::training(data, model.into(), seed, ui)
    {
        return Ok(corpus);
    }
    let corpus = corpus::training(data, Wanted::default(), seed, ui)?;
    if !model.labels.is_empty() {
        ui.warn("the model's labels are not those of the data: its head is replaced by a new one");
    }
    Ok(corpus)
}

fn distill(job: &Job, s: &Distill, key: &str, ui: &Ui) -> Result<Made> {
    let teacher = read_model(job.input("teacher")?, ui)?;
    let start = match job.inputs.get("model") {
        Some(path) => {
            let student = read_model(path, ui)?;
            if !s.layers.is_empty() {
                let student = path.display();
                bail!(
                    "`layers` are taken from the teacher, but the student is given: {student}; leave out one of them"
                );
            }
            same_language(&teacher, &student, "teacher", "student")?;
            student.checkpoint.to_f32()
        }
        None if s.random => random(&teacher.checkpoint, s, s.training.seed.unwrap_or(job.seed))?,
        None if s.layers.is_empty() => teacher.checkpoint.to_f32(),
        None => prune::keep_layers(&teacher.checkpoint.to_f32(), &s.layers)?,
    };
    let inside = Inside::new(&s.kd, &teacher.checkpoint, &start.spec)?;
    let mut corpus = corpus::training(job.data, (&teacher.checkpoint).into(), job.seed, ui)?;
    let labelled = corpus.hash.clone();
    if let Some(path) = &job.unlabelled {
        corpus.add_unlabelled(path, job.data)?;
        ui.note(format!("{}: {} texts without labels", job.id, corpus.unlabelled.len()));
    }
    let length = fit::length(&teacher.checkpoint, s.training.max_length);
    let encoded = fit::encode(&corpus, &teacher.tokenizer, length, job.threads)?;
    let sparsity = sparsity(&s.training);
    let run =
        Run { job, corpus: &corpus, encoded: &encoded, model: &teacher, settings: &s.training, sparsity, key };
    let mut logits = run.teacher_logits(&teacher.checkpoint, "teacher", ui)?;
    if s.out_of_fold {
        let (n, labels) = (encoded.train.units.count(corpus.train.len()), teacher.checkpoint.labels.len());
        let found = folds::read(job.input("teacher")?, &labelled, n, labels)?;
        logits[..n * labels].copy_from_slice(&found);
    }
    run.add_teachers(s, &mut logits, ui)?;
    let weights = class_weights(&s.training, &encoded, &corpus)?;
    let features = inside.as_ref().map(|i| i.features(&encoded.train.encodings));
    let objective =
        Objective::Distill(hard(&s.training, &weights, corpus.train.task), soft(&s.kd, &logits, features));
    let (trained, report) = run.fit(&start, objective, ui)?;
    Ok(Made { checkpoint: trained.checkpoint, tokenizer: teacher.tokenizer, report, files: trained.files })
}

/// A student of its own shape with random weights.
fn random(teacher: &Checkpoint, s: &Distill, seed: u64) -> Result<Checkpoint> {
    let spec = &teacher.spec;
    let shape = Shape {
        layers: if s.layers.is_empty() { spec.layers.len() } else { s.layers.len() },
        hidden: s.student_hidden.unwrap_or(spec.hidden),
        heads: s.student_heads.unwrap_or(spec.original_heads.into()),
        ffn: s.student_ffn.or_else(|| spec.layers.iter().map(|l| l.ffn).max()).unwrap_or(0),
    };
    Ok(random_student(teacher, shape, seed)?)
}

/// What the settings say about weights that are exactly 0.
pub(super) fn sparsity(s: &Training) -> Sparsity {
    if s.keep_zeros { Sparsity::Keep } else { Sparsity::Free }
}

pub(super) fn class_weights(s: &Training, encoded: &Encoded, corpus: &Corpus) -> Result<Vec<f32>> {
    let how = match s.class_weights {
        settings::ClassWeights::None => ClassWeights::None,
        settings::ClassWeights::Balanced => ClassWeights::Balanced,
        settings::ClassWeights::Sqrt => ClassWeights::Sqrt,
    };
    let task = corpus.train.task;
    for (key, set) in [("class-weights", how != ClassWeights::None), ("label-smoothing", s.label_smoothing != 0.0)]
    {
        if set && task.problem != Problem::SingleLabel {
            return Err(usage(format!("`{key}` is for tasks with a single label, this one is {task}")));
        }
    }
    Ok(how.of(&encoded.train.labels, corpus.train.names.len()))
}

pub(super) fn hard<'a>(s: &Training, class_weights: &'a [f32], task: Task) -> Hard<'a> {
    let loss = match task.problem {
        Problem::SingleLabel => Loss::CrossEntropy,
        Problem::MultiLabel => Loss::Binary,
        Problem::Regression => Loss::Distance(measure(s.regression_loss)),
    };
    Hard { loss, label_smoothing: s.label_smoothing as f32, class_weights }
}

/// Teacher and student must read the same ids and mean the same labels.
pub(super) fn same_language(a: &ModelDir, b: &ModelDir, a_name: &str, b_name: &str) -> Result<()> {
    if Tokenizer::new(&a.tokenizer)?.fingerprint() != Tokenizer::new(&b.tokenizer)?.fingerprint() {
        bail!(
            "the tokenizers of {a_name} and {b_name} differ: the same text gives them different ids. Distil between \
             models with one tokenizer"
        );
    }
    same_labels(a, b, a_name, b_name)
}

fn same_labels(a: &ModelDir, b: &ModelDir, a_name: &str, b_name: &str) -> Result<()> {
    if let (Some(x), Some(y)) = (a.checkpoint.task(), b.checkpoint.task())
        && x != y
    {
        bail!("the tasks of {a_name} ({x}) and {b_name} ({y}) differ");
    }
    let (a, b) = (&a.checkpoint.labels, &b.checkpoint.labels);
    if a != b {
        let at = a.iter().zip(b).position(|(x, y)| x != y).unwrap_or(a.len().min(b.len()));
        let name = |l: &[String]| l.get(at).map_or("no label".into(), |n| format!("{n:?}"));
        bail!(
            "the labels of {a_name} ({}) and {b_name} ({}) differ: label {at} is {} and {}",
            a.len(),
            b.len(),
            name(a),
            name(b)
        );
    }
    Ok(())
}

/// A stage that trains, with its data.
pub(super) struct Run<'a> {
    pub job: &'a Job<'a>,
    pub corpus: &'a Corpus,
    pub encoded: &'a Encoded,
    pub model: &'a ModelDir,
    pub settings: &'a Training,
    pub sparsity: Sparsity,
    pub key: &'a str,
}

impl Run<'_> {
    pub fn fit(&self, start: &Checkpoint, objective: Objective, ui: &Ui) -> Result<(Trained, Map<String, Value>)> {
        self.fit_quantised(start, objective, None, ui)
    }

    /// With quantisation in the forward, if there is any: then what comes out is quantised.
    pub fn fit_quantised(
        &self,
        start: &Checkpoint,
        objective: Objective,
        quant: Option<Qat>,
        ui: &Ui,
    ) -> Result<(Trained, Map<String, Value>)> {
        let test = corpus::test(self.job.data, start.into(), ui)?;
        let facts = corpus::facts(self.corpus, test.as_ref());
        ui.note(format!(
            "{}: {}; {} training sentences, {} for validation, {} labels, {:.2} M parameters",
            self.job.id,
            self.corpus.train.task,
            facts.train,
            facts.validation,
            facts.labels,
            start.parameters() as f64 / 1e6,
        ));
        if facts.overlap != quetsch::data::Overlap::default() {
            ui.note(format!("{}: {}", self.job.id, facts.overlap));
        }
        if facts.overlap.leaked_into_test > 0 {
            let n = facts.overlap.leaked_into_test;
            ui.warn(format!("{n} test sentences stand in the training data too: the test accuracy flatters"));
        }
        super::warn_of_lost_words(&self.encoded.train, "training data", ui);
        let fit = Fit {
            name: self.job.id,
            start,
            tokenizer: &self.model.tokenizer,
            encoded: self.encoded,
            objective,
            settings: self.settings,
            sparsity: self.sparsity,
            quant,
            threads: self.job.threads,
            state: &self.job.state(),
            key: self.key,
            resume: self.job.resume,
        };
        let trained = fit.run(ui)?;
        let trained_on = match facts.validation {
            0 => "all training data",
            _ => "training data without the validation part",
        };
        let mut report = Map::from_iter([
            ("data".to_string(), serde_json::to_value(&facts)?),
            ("trained_on".to_string(), json!(trained_on)),
            ("epochs".to_string(), serde_json::to_value(&trained.epochs)?),
            ("steps".to_string(), json!(trained.steps)),
            ("kept_epoch".to_string(), json!(trained.kept_epoch)),
        ]);
        if !trained.layer_weights.is_empty() {
            report.insert("layer_weights".into(), serde_json::to_value(&trained.layer_weights)?);
        }
        Ok((trained, report))
    }

    /// The teacher's logits on the training sentences: computed once, then read from the cache.
    pub fn teacher_logits(&self, teacher: &Checkpoint, role: &str, ui: &Ui) -> Result<Vec<f32>> {
        let model = corpus::hash_model(self.job.input(role)?)?;
        let length = self.encoded.max_length.to_string();
        let name = corpus::hash_of(&[&model, &self.corpus.hash, &length]);
        let cache = self.job.cache.clone().unwrap_or_else(|| self.job.state().join("cache"));
        let path = cache.join(format!("logits-{}.f32", &name[..16]));
        let expected = self.encoded.train.count() * teacher.spec.head.labels();
        if let Ok(bytes) = std::fs::read(&path)
            && bytes.len() == 4 * expected
        {
            tracing::info!(path = %path.display(), "teacher logits from the cache");
            return Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect());
        }
        let logits = self.by_parts(teacher, &self.encoded.train, "teacher", ui)?;
        std::fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        write_file(&path, &bytes)?;
        Ok(logits)
    }

    /// Turns the first teacher's logits into the weighted mean over all teachers; each reads the texts its own way.
    fn add_teachers(&self, s: &Distill, logits: &mut [f32], ui: &Ui) -> Result<()> {
        let all = 1 + s.teachers.len();
        let weights = if s.teacher_weights.is_empty() { vec![1.0; all] } else { s.teacher_weights.clone() };
        let share = |i: usize| (weights[i] / weights.iter().sum::<f64>()) as f32;
        logits.iter_mut().for_each(|x| *x *= share(0));
        for (i, role) in (1..all).zip(MORE_TEACHERS) {
            let other = read_model(self.job.input(role)?, ui)?;
            same_labels(self.model, &other, "teacher", role)?;
            let length = fit::length(&other.checkpoint, self.settings.max_length);
            let encoded = fit::encode(self.corpus, &other.tokenizer, length, self.job.threads)?;
            let run = Run { encoded: &encoded, model: &other, ..*self };
            if encoded.train.count() != self.encoded.train.count() {
                bail!("{role} reads another number of words than the first teacher: raise max-length");
            }
            let more = run.teacher_logits(&other.checkpoint, role, ui)?;
            logits.iter_mut().zip(more).for_each(|(x, y)| *x += share(i) * y);
        }
        Ok(())
    }

    /// Logits of all units with a bar.
    fn by_parts(&self, ck: &Checkpoint, examples: &Examples, what: &str, ui: &Ui) -> Result<Vec<f32>> {
        let model = Model::pack(ck);
        let mut bar = ui.bar(examples.len() as u64, format!("{} {what}", self.job.id));
        let mut logits = Vec::with_capacity(examples.count() * ck.spec.head.labels());
        for first in (0..examples.len()).step_by(512) {
            let part = first..examples.len().min(first + 512);
            bar.at(first as u64, || "sentences read by the teacher".into());
            let units = examples.units.subset(part.clone());
            logits.extend(model.answers(&examples.encodings[part], &units, self.job.threads)?);
            if crate::ui::is_interrupted() {
                return Err(crate::exit::interrupted(format!("{}: interrupted", self.job.id)));
            }
        }
        Ok(logits)
    }

    /// The figure on the first training sentences: what a cut destroyed, without looking at the test data.
    pub fn train_score(&self, ck: &Checkpoint) -> Result<(&'static str, f64)> {
        let n = self.corpus.train.len().min(1000);
        fit::score(ck, &self.encoded.train.subset(0..n), self.job.threads)
    }
}
