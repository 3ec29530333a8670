//! What each stage makes: checkpoint in, checkpoint out.

use super::corpus::{self, Training as Corpus};
use super::fit::{self, Encoded, Fit, Trained};
use super::teacher::{Inside, soft};
use super::{Job, Made, round};
use crate::recipe::Kind;
use crate::settings::{self, ComputeType, Data, Distill, Head, Prune, Quantize, Score, Train, Training, Vocab};
use crate::ui::{Ui, percent};
use crate::values::{Amount, Place};
use anyhow::{Context, Result, bail};
use quetsch::atomic::write_file;
use quetsch::batch::Encoding;
use quetsch::checkpoint::Checkpoint;
use quetsch::dir::{self, ModelDir};
use quetsch::head::{HeadKind, with_head};
use quetsch::prune::{self, Budget, Cut, Magnitude, Plan, Scope, Scores};
use quetsch::quant::{self, Compute, Scheme};
use quetsch::runtime::Model;
use quetsch::spec::ModelSpec;
use quetsch::tokenizer::Tokenizer;
use quetsch::vocab;
use quetsch_train::scores::{Sample, ffn_scores, head_scores};
use quetsch_train::{ClassWeights, Hard, Objective, TrainSet};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Makes the stage's model.
pub fn make(job: &Job, key: &str, ui: &Ui) -> Result<Made> {
    match job.kind {
        Kind::Train(s) => train(job, s, key, ui),
        Kind::Distill(s) => distill(job, s, key, ui),
        Kind::Prune(s) => prune(job, s, key, ui),
        Kind::Quantize(s) => quantize(job, s, ui),
        Kind::Eval(_) | Kind::Compare(_) => bail!("{} makes no model", job.kind.name()),
    }
}

fn read_model(path: &Path, ui: &Ui) -> Result<ModelDir> {
    let model = dir::read(path)?;
    for warning in &model.checkpoint.warnings {
        ui.warn(format!("{}: {warning}", path.display()));
    }
    Ok(model)
}

fn train(job: &Job, s: &Train, key: &str, ui: &Ui) -> Result<Made> {
    let model = read_model(job.input("model")?, ui)?;
    let corpus = corpus_for(job.data, &model.checkpoint, job.seed, ui)?;
    let kind = match s.head {
        Head::Mean => HeadKind::Mean,
        Head::Pooler => HeadKind::Pooler,
    };
    let seed = s.training.seed.unwrap_or(job.seed);
    let start = with_head(&model.checkpoint.to_f32(), kind, corpus.train.names.clone(), seed)?;
    let encoded = fit::encode(&corpus, &model.tokenizer, s.training.max_length, job.threads)?;
    let weights = class_weights(&s.training, &corpus);
    let objective = Objective::CrossEntropy(hard(&s.training, &weights));
    let run = Run { job, corpus: &corpus, encoded: &encoded, model: &model, settings: &s.training, key };
    let (trained, report) = run.fit(&start, objective, ui)?;
    Ok(Made { checkpoint: trained.checkpoint, tokenizer: model.tokenizer, report, files: trained.files })
}

/// Training data in the model's own label order if they fit it, else in their own: a model fine-tuned for something
/// else gets a new head.
fn corpus_for(data: &Data, model: &Checkpoint, seed: u64, ui: &Ui) -> Result<Corpus> {
    if !model.labels.is_empty()
        && let Ok(corpus) = corpus::training(data, &model.labels, seed, ui)
    {
        return Ok(corpus);
    }
    let corpus = corpus::training(data, &[], seed, ui)?;
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
        None if s.layers.is_empty() => teacher.checkpoint.to_f32(),
        None => prune::keep_layers(&teacher.checkpoint.to_f32(), &s.layers)?,
    };
    let inside = Inside::new(&s.kd, &teacher.checkpoint, &start.spec)?;
    let corpus = corpus::training(job.data, &teacher.checkpoint.labels, job.seed, ui)?;
    let encoded = fit::encode(&corpus, &teacher.tokenizer, s.training.max_length, job.threads)?;
    let run = Run { job, corpus: &corpus, encoded: &encoded, model: &teacher, settings: &s.training, key };
    let teacher_logits = run.teacher_logits(&teacher.checkpoint, "teacher", ui)?;
    let weights = class_weights(&s.training, &corpus);
    let features = inside.as_ref().map(|i| i.features(&encoded.train));
    let objective = Objective::Distill(hard(&s.training, &weights), soft(&s.kd, &teacher_logits, features));
    let (trained, report) = run.fit(&start, objective, ui)?;
    Ok(Made { checkpoint: trained.checkpoint, tokenizer: teacher.tokenizer, report, files: trained.files })
}

fn class_weights(s: &Training, corpus: &Corpus) -> Vec<f32> {
    let how = match s.class_weights {
        settings::ClassWeights::None => ClassWeights::None,
        settings::ClassWeights::Balanced => ClassWeights::Balanced,
        settings::ClassWeights::Sqrt => ClassWeights::Sqrt,
    };
    how.of(&corpus.train.labels, corpus.train.names.len())
}

fn hard<'a>(s: &Training, class_weights: &'a [f32]) -> Hard<'a> {
    Hard { label_smoothing: s.label_smoothing as f32, class_weights }
}

/// Teacher and student must read the same ids and mean the same labels.
fn same_language(a: &ModelDir, b: &ModelDir, a_name: &str, b_name: &str) -> Result<()> {
    if Tokenizer::new(&a.tokenizer)?.fingerprint() != Tokenizer::new(&b.tokenizer)?.fingerprint() {
        bail!(
            "the tokenizers of {a_name} and {b_name} differ: the same text gives them different ids. Distil between \
             models with one tokenizer"
        );
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

fn prune(job: &Job, s: &Prune, key: &str, ui: &Ui) -> Result<Made> {
    let model = read_model(job.input("model")?, ui)?;
    let parent = model.checkpoint.to_f32();
    let learns = s.training.epochs > 0 || (s.score == Score::Gradient && needs_scores(s));
    if !learns && s.vocab == Vocab::All {
        let plan = plan(s, &parent, scores_by_weight(s, &parent))?;
        ui.note(&plan);
        return Ok(Made {
            checkpoint: prune::apply(&parent, &plan)?,
            tokenizer: model.tokenizer,
            report: Map::from_iter([("plan".to_string(), json!(plan.to_string()))]),
            files: vec![("plan.json", super::pretty(&plan)?)],
        });
    }
    let corpus = corpus::training(job.data, &parent.labels, job.seed, ui)?;
    let encoded = fit::encode(&corpus, &model.tokenizer, s.training.max_length, job.threads)?;
    let run = Run { job, corpus: &corpus, encoded: &encoded, model: &model, settings: &s.training, key };
    let teacher = match job.inputs.get("teacher") {
        Some(path) => {
            let teacher = read_model(path, ui)?;
            same_language(&teacher, &model, "teacher", "model")?;
            Some(teacher.checkpoint)
        }
        None => None,
    };
    let (teacher, role) = teacher.as_ref().map_or((&model.checkpoint, "model"), |t| (t, "teacher"));
    let logits = if learns { run.teacher_logits(teacher, role, ui)? } else { vec![] };
    let weights = class_weights(&s.training, &corpus);
    let objective = |features| Objective::Distill(hard(&s.training, &weights), soft(&s.kd, &logits, features));
    let scores = match s.score {
        Score::Gradient if needs_scores(s) => run.gradient_scores(s, &parent, &objective(None), ui)?,
        _ => scores_by_weight(s, &parent),
    };
    let plan = plan(s, &parent, scores)?;
    ui.note(&plan);
    let cut = prune::apply(&parent, &plan)?;
    let (small, small_encoded);
    let (cut, run) = match s.vocab {
        Vocab::All => (cut, run),
        Vocab::Train => {
            let whole = ModelDir { checkpoint: cut, tokenizer: model.tokenizer.clone() };
            small = vocab::prune(&whole, &corpus.train.texts, job.threads)?.model;
            ui.note(format!(
                "{}: {} of {} words of the vocabulary kept",
                job.id, small.checkpoint.spec.vocab, parent.spec.vocab
            ));
            small_encoded = fit::encode(&corpus, &small.tokenizer, s.training.max_length, job.threads)?;
            (small.checkpoint.clone(), Run { encoded: &small_encoded, model: &small, ..run })
        }
    };
    let after_cut = run.train_accuracy(&cut)?;
    ui.note(format!(
        "{}: after the cut, before any recovery: {} of a training sample right",
        job.id,
        percent(after_cut)
    ));
    let (checkpoint, mut report, mut files) = match s.training.epochs {
        0 => (cut, Map::new(), vec![]),
        _ => {
            let inside = Inside::new(&s.kd, teacher, &cut.spec)?;
            let features = inside.as_ref().map(|i| i.features(&encoded.train));
            let (trained, report) = run.fit(&cut, objective(features), ui)?;
            (trained.checkpoint, report, trained.files)
        }
    };
    report.insert("plan".into(), json!(plan.to_string()));
    report.insert("train_accuracy_after_cut".into(), json!(round(after_cut, 4)));
    report.insert("vocabulary".into(), json!(checkpoint.spec.vocab));
    files.push(("plan.json", super::pretty(&plan)?));
    let tokenizer = run.model.tokenizer.clone();
    Ok(Made { checkpoint, tokenizer, report, files })
}

fn needs_scores(s: &Prune) -> bool {
    let ranked = |a: &Amount| !a.is_none() && !matches!(a, Amount::List(_));
    ranked(&s.heads) || ranked(&s.ffn)
}

fn scores_by_weight(s: &Prune, parent: &Checkpoint) -> Scores {
    let norm = if s.score == Score::L1 { Magnitude::L1 } else { Magnitude::L2 };
    prune::magnitude(parent, norm)
}

fn plan(s: &Prune, parent: &Checkpoint, scores: Scores) -> Result<Plan> {
    let by_layer = |list: &[Place]| -> Result<BTreeMap<usize, Vec<usize>>> {
        let mut map: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for place in list {
            let Some(head) = place.head else {
                bail!("`heads` lists {place}, expected layer:head, such as {place}:0");
            };
            map.entry(place.layer).or_default().push(head.into());
        }
        Ok(map)
    };
    let layers = match &s.layers {
        Amount::List(list) if list.iter().any(|p| p.head.is_some()) => {
            bail!("`layers` lists heads, expected layers")
        }
        Amount::List(list) => prune::Amount::List(list.iter().map(|p| p.layer).collect()),
        other => simple(other),
    };
    let heads = match &s.heads {
        Amount::List(list) => prune::Amount::List(by_layer(list)?),
        other => simple(other),
    };
    let heads = Cut { amount: heads, scope: Scope::Global, max_per_layer: s.max_per_layer, ..Cut::default() };
    let ffn = Cut { amount: simple(&s.ffn), scope: Scope::PerLayer, ..Cut::default() };
    Ok(prune::plan(&parent.spec, &scores, &Budget { layers, heads, ffn })?)
}

fn simple<L>(amount: &Amount) -> prune::Amount<L> {
    match amount {
        Amount::Share(s) if *s > 0.0 => prune::Amount::Fraction(*s),
        Amount::Count(n) if *n > 0 => prune::Amount::Count(*n),
        _ => prune::Amount::Nothing,
    }
}

/// The patterns of what stays in float: the default ones, unless `none` is given, and those given.
pub fn kept(s: &Quantize, spec: &ModelSpec) -> Vec<String> {
    let none = s.keep.iter().any(|k| k == "none");
    let default = if none { vec![] } else { quant::default_keep(spec) };
    default.into_iter().chain(s.keep.iter().filter(|k| *k != "none").cloned()).collect()
}

fn quantize(job: &Job, s: &Quantize, ui: &Ui) -> Result<Made> {
    let model = read_model(job.input("model")?, ui)?;
    let rules = rules(s)?;
    let keep = kept(s, &model.checkpoint.spec);
    let checkpoint = quant::quantise(&model.checkpoint, &rules, &keep)?;
    let sites: Map<String, Value> = checkpoint
        .spec
        .linears()
        .into_iter()
        .map(|(lin, ..)| {
            let scheme = Scheme::of(checkpoint.get(quetsch::spec::Tensor::W(lin)));
            (quant::site(&checkpoint.spec, lin), json!(scheme.name()))
        })
        .collect();
    let floats = sites.iter().filter(|(_, s)| matches!(s.as_str(), Some("f32" | "f16" | "bf16")));
    let kept: Vec<_> = floats.map(|(site, _)| site.clone()).collect();
    let name = &s.quant;
    let words = Scheme::of(checkpoint.get(quetsch::spec::Tensor::Word)).name();
    ui.note(format!(
        "{}: {} of {} linears in {name}; in float: {}; word embeddings in {words}",
        job.id,
        sites.len() - kept.len(),
        sites.len(),
        if kept.is_empty() { "none".into() } else { kept.join(", ") }
    ));
    let report = Map::from_iter([
        ("quant".to_string(), json!(name)),
        ("embeddings".to_string(), json!(words)),
        ("sites".to_string(), Value::Object(sites)),
    ]);
    Ok(Made { checkpoint, tokenizer: model.tokenizer, report, files: vec![] })
}

/// The schemes by site pattern, in the order in which they hold.
pub fn rules(s: &Quantize) -> Result<Vec<(String, Scheme)>> {
    let compute = match s.compute {
        ComputeType::Bf16 => Compute::Bf16,
        ComputeType::F32 => Compute::F32,
    };
    let double_quant = !s.no_double_quant;
    let scheme = |name: &str| -> Result<Scheme> {
        Ok(match name.parse()? {
            Scheme::Nf4 { .. } => Scheme::Nf4 { double_quant, compute },
            Scheme::Fp4 { .. } => Scheme::Fp4 { double_quant, compute },
            other => other,
        })
    };
    let mut rules = vec![("*".to_string(), scheme(&s.quant)?)];
    for rule in &s.site {
        rules.push((rule.site.clone(), scheme(&rule.scheme)?));
    }
    Ok(rules)
}

/// A stage that trains, with its data.
struct Run<'a> {
    job: &'a Job<'a>,
    corpus: &'a Corpus,
    encoded: &'a Encoded,
    model: &'a ModelDir,
    settings: &'a Training,
    key: &'a str,
}

impl Run<'_> {
    fn fit(&self, start: &Checkpoint, objective: Objective, ui: &Ui) -> Result<(Trained, Map<String, Value>)> {
        let test = corpus::test(self.job.data, &start.labels, ui)?;
        let facts = corpus::facts(self.corpus, test.as_ref());
        ui.note(format!(
            "{}: {} training sentences, {} for validation, {} labels, {:.2} M parameters",
            self.job.id,
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
        let fit = Fit {
            name: self.job.id,
            start,
            tokenizer: &self.model.tokenizer,
            corpus: self.corpus,
            encoded: self.encoded,
            objective,
            settings: self.settings,
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
        let report = Map::from_iter([
            ("data".to_string(), serde_json::to_value(&facts)?),
            ("trained_on".to_string(), json!(trained_on)),
            ("epochs".to_string(), serde_json::to_value(&trained.epochs)?),
            ("steps".to_string(), json!(trained.steps)),
            ("kept_epoch".to_string(), json!(trained.kept_epoch)),
        ]);
        Ok((trained, report))
    }

    /// The teacher's logits on the training sentences: computed once, then read from the cache.
    fn teacher_logits(&self, teacher: &Checkpoint, role: &str, ui: &Ui) -> Result<Vec<f32>> {
        let model = corpus::hash_model(self.job.input(role)?)?;
        let length = self.settings.max_length.to_string();
        let name = corpus::hash_of(&[&model, &self.corpus.hash, &length]);
        let cache = self.job.cache.clone().unwrap_or_else(|| self.job.state().join("cache"));
        let path = cache.join(format!("logits-{}.f32", &name[..16]));
        let expected = self.corpus.train.len() * teacher.spec.head.labels();
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

    /// Logits with a bar.
    fn by_parts(&self, ck: &Checkpoint, sentences: &[Encoding], what: &str, ui: &Ui) -> Result<Vec<f32>> {
        let model = Model::pack(ck);
        let mut bar = ui.bar(sentences.len() as u64, format!("{} {what}", self.job.id));
        let mut logits = Vec::with_capacity(sentences.len() * ck.spec.head.labels());
        for (i, part) in sentences.chunks(512).enumerate() {
            bar.at(512 * i as u64, || "sentences read by the teacher".into());
            logits.extend(model.logits(part, self.job.threads)?);
            if crate::ui::is_interrupted() {
                return Err(crate::exit::interrupted(format!("{}: interrupted", self.job.id)));
            }
        }
        Ok(logits)
    }

    fn gradient_scores(&self, s: &Prune, parent: &Checkpoint, objective: &Objective, ui: &Ui) -> Result<Scores> {
        let set = TrainSet { encodings: &self.encoded.train, labels: &self.corpus.train.labels };
        let sample = Sample {
            batch_size: s.training.batch_size,
            batches: s.score_batches,
            seed: s.training.seed.unwrap_or(self.job.seed),
            threads: self.job.threads,
        };
        let ranked = |a: &Amount| !a.is_none() && !matches!(a, Amount::List(_));
        ui.note(format!("{}: scoring by gradients over {} batches", self.job.id, s.score_batches));
        let mut scores = Scores::default();
        if ranked(&s.heads) {
            scores.heads = head_scores(parent, &set, objective, sample)?;
        }
        if ranked(&s.ffn) {
            scores.ffn = ffn_scores(parent, &set, objective, sample)?;
        }
        // A layer has no mask of its own: layers are ranked by their weights.
        if !s.layers.is_none() {
            scores.layers = scores_by_weight(s, parent).layers;
        }
        Ok(scores)
    }

    /// Accuracy on the first training sentences: what a cut destroyed, without looking at the test data.
    fn train_accuracy(&self, ck: &Checkpoint) -> Result<f64> {
        let n = self.encoded.train.len().min(1000);
        fit::accuracy(ck, &self.encoded.train[..n], &self.corpus.train.labels[..n], self.job.threads)
    }
}
