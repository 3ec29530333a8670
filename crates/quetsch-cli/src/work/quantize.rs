//! Stage quantize: which tensor gets which scheme, calibration, and how much every linear minds.

use super::corpus;
use super::fit::Trained;
use super::make::Run;
use super::teacher::{Inside, soft};
use super::{Job, Made, fit, make, round};
use crate::exit::usage;
use crate::settings::Quantize;
use crate::ui::{Ui, percent};
use anyhow::Result;
use quetsch::batch::Encoding;
use quetsch::checkpoint::Checkpoint;
use quetsch::data::Examples;
use quetsch::dir::ModelDir;
use quetsch::metrics;
use quetsch::quant::calibrate::{self, Seen};
use quetsch::quant::{self, Scheme, int8};
use quetsch::runtime::Model;
use quetsch::spec::{Lin, ModelSpec, Role, Tensor};
use quetsch::task::{Level, Problem};
use quetsch_train::{Objective, Qat, Sparsity};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The patterns of what stays in float: the default ones, unless `none` is given, and those given.
pub fn kept(s: &Quantize, spec: &ModelSpec) -> Vec<String> {
    let none = s.keep.iter().any(|k| k == "none");
    let default = if none { vec![] } else { quant::default_keep(spec) };
    let given = s.keep.iter().filter(|k| !matches!(k.as_str(), "none" | "auto"));
    default.into_iter().chain(given.cloned()).collect()
}

/// The schemes by site pattern, in the order in which they hold.
pub fn rules(s: &Quantize) -> Result<Vec<(String, Scheme)>> {
    let (compute, source) = (s.compute.into(), s.source_dtype.map(Into::into));
    let double_quant = !s.no_double_quant;
    let scheme = |name: &str| -> Result<Scheme> {
        Ok(match name.parse()? {
            Scheme::Nf4 { .. } => Scheme::Nf4 { double_quant, compute, source },
            Scheme::Fp4 { .. } => Scheme::Fp4 { double_quant, compute, source },
            Scheme::BnbInt8 { threshold } => {
                Scheme::BnbInt8 { threshold: s.outlier_threshold.unwrap_or(threshold) }
            }
            other => other,
        })
    };
    let mut rules = vec![("*".to_string(), scheme(&s.quant)?)];
    for rule in &s.site {
        rules.push((rule.site.clone(), scheme(&rule.scheme)?));
    }
    Ok(rules)
}

/// Quantises a model: checkpoint in, checkpoint out.
pub fn quantize(job: &Job, s: &Quantize, key: &str, ui: &Ui) -> Result<Made> {
    let model = make::read_model(job.input("model")?, ui)?;
    let rules = rules(s)?;
    let mut report = Map::from_iter([("quant".to_string(), json!(s.quant))]);
    let mut source = model.checkpoint;
    let mut keep = kept(s, &source.spec);
    let mut ranges = BTreeMap::new();
    let mut trained = None;
    if s.reads(job.data) {
        let corpus = corpus::training(job.data, (&source).into(), job.seed, ui)?;
        let length = fit::length(&source, 256);
        let encoded = fit::encode(&corpus, &model.tokenizer, length, job.threads)?;
        // Labels of words are not labels of rows.
        let labels = if corpus.train.task.level == Level::Sentence { &corpus.train.labels[..] } else { &[] };
        let rows = calibrate::choose(labels, &encoded.train.encodings, s.calibration);
        if rows.len() < s.calibration && s.calibrates() {
            let (id, n) = (job.id, rows.len());
            ui.note(format!(
                "{id}: calibrated on all {n} training sentences, `calibration` asks for {}",
                s.calibration
            ));
        }
        let sample: Vec<Encoding> = rows.iter().map(|r| encoded.train.encodings[*r].clone()).collect();
        let mut seen = calibrate::observe(&source, &sample)?;
        if s.equalise {
            source = calibrate::equalise(&source, &seen)?;
            seen = calibrate::observe(&source, &sample)?;
        }
        let observer = s.observer.parse()?;
        ranges = seen.iter().map(|(lin, seen)| (*lin, seen.absmax(observer))).collect();
        let threshold = s.outlier_threshold.unwrap_or(int8::THRESHOLD);
        let site = |(lin, seen): (&Lin, &Seen)| {
            let facts = json!({
                "absmax": ranges[lin], "largest": seen.max(), "outlier_columns": seen.outliers(threshold), "columns": seen.channels.len(),
            });
            (quant::site(&source.spec, *lin), facts)
        };
        let sites: Map<String, Value> = seen.iter().map(site).collect();
        // Row numbers of the training part of the data, whose hash is in the provenance.
        let facts = json!({ "observer": s.observer, "sentences": rows.len(), "rows": rows, "inputs": sites });
        report.insert("calibration".into(), facts);
        if s.measures_sites() {
            if corpus.train.task.problem == Problem::Regression {
                return Err(usage(
                    "`keep = auto` measures accuracy, which numbers do not have: name the sites to keep",
                ));
            }
            let trial =
                Trial { job, source: &source, rules: &rules, ranges: &ranges, validation: &encoded.validation };
            let found = trial.sensitivity(&keep, s.budget.0, ui)?;
            keep.extend(found.kept.iter().cloned());
            report.insert("sensitivity".into(), serde_json::to_value(&found)?);
        }
        if s.trains() {
            let (rules, keep) = (rules.clone(), keep.clone());
            let is_static = quant::assign(&source.spec, &rules, &keep)?
                .iter()
                .any(|(_, scheme)| *scheme == Some(Scheme::Int8Static));
            let sample = if is_static { sample } else { vec![] };
            let qat = Qat { rules, keep, ranges: ranges.clone(), observer, sample };
            let training = s.training.with_length(length);
            let run = Run {
                job,
                corpus: &corpus,
                encoded: &encoded,
                model: &ModelDir { checkpoint: source.clone(), tokenizer: model.tokenizer.clone() },
                settings: &training,
                sparsity: Sparsity::Free,
                key,
            };
            let (made, facts) = train(&run, s, qat, ui)?;
            report.extend(facts);
            trained = Some(made);
        }
    }
    let (checkpoint, files) = match trained {
        Some(trained) => (trained.checkpoint, trained.files),
        None => (quant::quantise_calibrated(&source, &rules, &keep, &ranges)?, vec![]),
    };
    let scheme = |t: Tensor| Scheme::of(checkpoint.get(t)).name();
    let linears = checkpoint.spec.linears().into_iter();
    let sites: Map<String, Value> =
        linears.map(|(lin, ..)| (quant::site(&checkpoint.spec, lin), json!(scheme(Tensor::W(lin))))).collect();
    let mut by_scheme: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (site, scheme) in &sites {
        by_scheme.entry(scheme.as_str().unwrap_or_default()).or_default().push(site);
    }
    let is_float = |scheme: &str| matches!(scheme, "f32" | "f16" | "bf16");
    let counts = by_scheme.iter().map(|(scheme, sites)| match is_float(scheme) {
        true => format!("{} in {scheme} ({})", sites.len(), sites.join(", ")),
        false => format!("{} in {scheme}", sites.len()),
    });
    ui.note(format!(
        "{}: of {} linears {}; word embeddings in {}",
        job.id,
        sites.len(),
        counts.collect::<Vec<_>>().join(", "),
        scheme(Tensor::Word)
    ));
    if quant::is_mixed(&checkpoint) {
        ui.warn(format!(
            "{}: int8 and 4-bit linears in one file: no other program reads that, transformers stops with an error",
            job.id
        ));
    }
    report.insert("embeddings".into(), json!(scheme(Tensor::Word)));
    report.insert("distortion".into(), serde_json::to_value(quant::distortions(&source, &checkpoint)?)?);
    report.insert("sites".into(), Value::Object(sites));
    Ok(Made { checkpoint, tokenizer: model.tokenizer, report, files })
}

/// Quantisation-aware training: learns from a teacher or, without one, from the float model itself.
fn train(run: &Run, s: &Quantize, qat: Qat, ui: &Ui) -> Result<(Trained, Map<String, Value>)> {
    let (job, start) = (run.job, run.model.checkpoint.to_f32());
    let validation = &run.encoded.validation;
    let validated = |ck: &Checkpoint| -> Result<Option<f64>> {
        match validation.encodings.is_empty() {
            true => Ok(None),
            false => Ok(Some(round(fit::score(ck, validation, job.threads)?.1, 5))),
        }
    };
    let before = validated(&quant::quantise_calibrated(&start, &qat.rules, &qat.keep, &qat.ranges)?)?;
    let teacher = match job.inputs.get("teacher") {
        Some(path) => {
            let teacher = make::read_model(path, ui)?;
            make::same_language(&teacher, run.model, "teacher", "model")?;
            Some(teacher.checkpoint)
        }
        None => None,
    };
    let (teacher, role) = teacher.as_ref().map_or((&run.model.checkpoint, "model"), |t| (t, "teacher"));
    let logits = run.teacher_logits(teacher, role, ui)?;
    let inside = Inside::new(&s.kd, teacher, &start.spec)?;
    let features = inside.as_ref().map(|i| i.features(&run.encoded.train.encodings));
    let weights = make::class_weights(run.settings, run.encoded, run.corpus)?;
    let hard = make::hard(run.settings, &weights, run.corpus.train.task);
    let objective = Objective::Distill(hard, soft(&s.kd, &logits, features));
    let (trained, mut report) = run.fit_quantised(&start, objective, Some(qat), ui)?;
    if let Some(before) = before {
        let after = validated(&trained.checkpoint)?;
        report.insert("validation_score".into(), json!({ "quantised": before, "trained": after }));
    }
    Ok((trained, report))
}

/// What quantising does to the answers on validation data, beside the model it was made from.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Drop {
    /// Cross-entropy.
    pub loss: f64,
    /// Share of right answers.
    pub accuracy: f64,
    /// Mean of KL(parent || this), nats.
    pub kl: f64,
    /// Sentences with another answer.
    pub flips: usize,
}

/// One site: what quantising it alone does, and all others without it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Site {
    /// Its name; `embeddings.*` are the tables together.
    pub site: String,
    /// It alone is quantised.
    pub alone: Drop,
    /// All others are.
    pub all_but: Drop,
}

/// What `keep = auto` found.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Sensitivity {
    /// Sentences measured on.
    pub sentences: usize,
    /// Largest loss of accuracy allowed, in points.
    pub budget: f64,
    /// Nothing quantised.
    pub float: Drop,
    /// Everything quantised that the settings say.
    pub all: Drop,
    /// By falling KL alone.
    pub sites: Vec<Site>,
    /// The fewest first ones of `sites` in float that meet the budget.
    pub kept: Vec<String>,
    /// What is left then.
    pub result: Drop,
}

impl Sensitivity {
    /// Of a model that was made with `keep = auto`.
    pub fn read(model: &Path) -> Option<Sensitivity> {
        let mut report: Value = serde_json::from_slice(&std::fs::read(model.join(super::REPORT)).ok()?).ok()?;
        serde_json::from_value(report.get_mut("sensitivity")?.take()).ok()
    }
}

/// Quantising with other choices of what to keep.
struct Trial<'a> {
    job: &'a Job<'a>,
    source: &'a Checkpoint,
    rules: &'a [(String, Scheme)],
    ranges: &'a BTreeMap<Lin, f32>,
    validation: &'a Examples,
}

impl Trial<'_> {
    fn sensitivity(&self, keep: &[String], budget: f64, ui: &Ui) -> Result<Sensitivity> {
        let validation = self.validation;
        if validation.is_empty() {
            return Err(usage("`keep = auto` measures on validation data: set one aside with --validation 0.1"));
        }
        let answers =
            |ck: &Checkpoint| Model::pack(ck).answers(&validation.encodings, &validation.units, self.job.threads);
        let parent = answers(self.source)?;
        let measure = |keep: &[String]| -> Result<Drop> {
            let child = quant::quantise_calibrated(self.source, self.rules, keep, self.ranges)?;
            let child = answers(&child)?;
            if crate::ui::is_interrupted() {
                return Err(crate::exit::interrupted(format!("{}: interrupted", self.job.id)));
            }
            Ok(self.drop(&parent, &child))
        };
        let sites = self.sites(keep)?;
        let with = |more: &[String]| [keep, more].concat();
        let mut bar = ui.bar(2 * sites.len() as u64, format!("{} sensitivity", self.job.id));
        let mut measured = vec![];
        for (i, site) in sites.iter().enumerate() {
            bar.at(2 * i as u64, || site.clone());
            let others: Vec<String> = sites.iter().filter(|s| *s != site).cloned().collect();
            let (alone, all_but) = (measure(&with(&others))?, measure(&with(std::slice::from_ref(site)))?);
            measured.push(Site { site: site.clone(), alone, all_but });
        }
        measured.sort_by(|a, b| b.alone.kl.total_cmp(&a.alone.kl));
        let (float, all) = (self.drop(&parent, &parent), measure(keep)?);
        let order: Vec<String> = measured.iter().map(|m| m.site.clone()).collect();
        let (mut n, mut result) = (0, all);
        // Less than any sentence weighs; the rounding of the two accuracies stays below it.
        let slack = 1e-5;
        while float.accuracy - result.accuracy > budget / 100.0 + slack && n < order.len() {
            n += 1;
            result = measure(&with(&order[..n]))?;
        }
        let kept = order[..n].to_vec();
        let worst = measured.first().map(|m| format!("; {} minds most", m.site)).unwrap_or_default();
        ui.note(format!(
            "{}: on {} validation sentences float {}, all quantised {}, {} kept in float {}{worst}",
            self.job.id,
            validation.len(),
            percent(float.accuracy),
            percent(all.accuracy),
            n,
            percent(result.accuracy),
        ));
        Ok(Sensitivity { sentences: validation.len(), budget, float, all, sites: measured, kept, result })
    }

    /// What is quantised: linears by their short names, the embedding tables as one.
    fn sites(&self, keep: &[String]) -> Result<Vec<String>> {
        let spec = &self.source.spec;
        let mut sites = vec![];
        for (def, scheme) in quant::assign(spec, self.rules, keep)? {
            let quantised = scheme.is_some_and(|s| s.float().is_none());
            match def.tensor {
                Tensor::W(lin) if quantised && lin != Lin::UnusedPooler => sites.push(quant::site(spec, lin)),
                _ if quantised && def.role == Role::Embedding => sites.push("embeddings.*".into()),
                _ => {}
            }
        }
        sites.dedup();
        Ok(sites)
    }

    fn drop(&self, parent: &[f32], child: &[f32]) -> Drop {
        let (targets, labels) = (self.validation.targets(), &self.source.labels);
        let problem = self.source.task().unwrap_or_default().problem;
        let figures = metrics::measure(problem, child, targets, labels);
        let (loss, accuracy) = figures.labels().map_or((f64::NAN, f64::NAN), |m| (m.loss, m.accuracy));
        let against = metrics::agree(problem, parent, child, targets, labels.len());
        let (kl, flips) = against.map_or((f64::NAN, 0), |a| (a.mean_kl, a.flips));
        Drop { loss: round(loss, 5), accuracy: round(accuracy, 5), kl, flips }
    }
}
