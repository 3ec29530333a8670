//! The pruning stage: score, plan, cut, fit, recover.

use super::corpus;
use super::fit;
use super::make::{Run, class_weights, hard, read_model, same_language, sparsity};
use super::teacher::{Inside, soft};
use super::{Job, Made, round};
use crate::recipe::Kind;
use crate::settings::{self, Data, Prune, Score, SparsitySchedule, Training, Tune, Vocab};
use crate::ui::Ui;
use crate::values::{Amount, Place};
use anyhow::{Context, Result, bail};
use quetsch::batch::Encoding;
use quetsch::checkpoint::Checkpoint;
use quetsch::dir::ModelDir;
use quetsch::prune::{self, Budget, Costs, Cut, Keep, LatencyTable, Magnitude, Plan, Scope, Scores, Timing};
use quetsch::quant;
use quetsch::spec::At;
use quetsch::vocab;
use quetsch_train::scores::Sample;
use quetsch_train::{Criterion, MaskGradients, Objective, Sparsity, TrainSet, mask_gradients};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The file with what was cut.
const PLAN: &str = "plan.json";

/// Runs the stage.
pub fn prune(job: &Job, s: &Prune, key: &str, ui: &Ui) -> Result<Made> {
    match s.cuts {
        Some(cuts @ 2..) => gradually(job, s, cuts, key, ui),
        _ => at_once(job, s, key, ui),
    }
}

/// Where the model after cut `i` (from 1) lives until the stage is done.
pub fn cut(state: &Path, i: usize) -> PathBuf {
    state.join(format!("cut-{i}"))
}

/// Several cuts, each a whole pruning stage that starts from what the one before left. A stage that was interrupted finds
/// those that are done.
fn gradually(job: &Job, s: &Prune, cuts: usize, key: &str, ui: &Ui) -> Result<Made> {
    let original = job.input("model")?;
    let spec = read_model(original, ui)?.checkpoint.spec;
    let data = Data { test: None, ..job.data.clone() };
    let mut inputs = job.inputs.clone();
    inputs.entry("teacher").or_insert_with(|| original.into());
    // All cuts have the same teacher, whose logits are computed once.
    let cache = Some(job.cache.clone().unwrap_or_else(|| job.state().join("cache")));
    std::fs::create_dir_all(job.state()).with_context(|| format!("cannot make {}", job.state().display()))?;
    let (mut plan, mut epochs, mut reports) = (None::<Plan>, vec![], vec![]);
    let mut add = |report: &Value, next: Plan| -> Result<()> {
        let of_cut = |key: &String| key == "plan" || key == "kept_epoch" || key.starts_with("train_");
        let facts: BTreeMap<_, _> = report.as_object().into_iter().flatten().filter(|(k, _)| of_cut(k)).collect();
        reports.push(json!(facts));
        for epoch in report["epochs"].as_array().into_iter().flatten() {
            let mut epoch = epoch.clone();
            epoch["epoch"] = json!(epochs.len() + 1);
            epochs.push(epoch);
        }
        plan = Some(match plan.take() {
            Some(before) => before.then(&spec, &next)?,
            None => next,
        });
        Ok(())
    };
    for i in 1..cuts {
        let kind = Kind::Prune(part(s, i, cuts));
        let out = cut(&job.state(), i);
        let id = format!("{} cut {i} of {cuts}", job.id);
        let (inputs_now, cache) = (inputs.clone(), cache.clone());
        let step =
            Job { id: &id, kind: &kind, data: &data, unlabelled: None, inputs: inputs_now, out, cache, ..*job };
        add(&step.run(ui)?, read_plan(&step.out.join(PLAN))?)?;
        inputs.insert("model", step.out);
    }
    let last = Job { unlabelled: None, inputs, out: job.out.clone(), cache, ..*job };
    let mut made = at_once(&last, &part(s, cuts, cuts), key, ui)?;
    let (name, bytes) = made.files.iter_mut().find(|(name, _)| *name == PLAN).context("no plan was made")?;
    add(&Value::Object(made.report.clone()), serde_json::from_slice(bytes).context(*name)?)?;
    let plan = plan.context("no plan was made")?;
    ui.note(&plan);
    *bytes = super::pretty(&plan)?;
    made.report.insert("plan".into(), json!(plan.to_string()));
    made.report.insert("epochs".into(), json!(epochs));
    made.report.insert("cuts".into(), json!(reports));
    Ok(made)
}

/// Cut `i` (from 1) of `cuts`, equal steps of the original model; shares are of what the one before left.
fn part(s: &Prune, i: usize, cuts: usize) -> Prune {
    let (before, now) = ((i - 1) as f64 / cuts as f64, i as f64 / cuts as f64);
    let kept = |gone: f64| (1.0 - gone * now) / (1.0 - gone * before);
    let whole = |n: usize| n * i / cuts - n * (i - 1) / cuts;
    let amount = |a: &Amount| match a {
        Amount::Share(gone) => Amount::Share(1.0 - kept(*gone)),
        Amount::Count(n) => Amount::Count(whole(*n)),
        Amount::List(list) => Amount::List(list.clone()),
    };
    let budget = |share: Option<f64>| share.map(|share| kept(1.0 - share));
    let mut part = Prune {
        cuts: None,
        heads: amount(&s.heads),
        ffn: amount(&s.ffn),
        layers: amount(&s.layers),
        keep_macs: budget(s.keep_macs),
        keep_parameters: budget(s.keep_parameters),
        keep_latency: budget(s.keep_latency),
        training: Training { epochs: whole(s.training.epochs), ..s.training.clone() },
        ..s.clone()
    };
    if i < cuts {
        // Words and single weights go last.
        let all = Prune::default();
        part.vocab = all.vocab;
        (part.sparsity, part.sparsity_schedule) = (all.sparsity, all.sparsity_schedule);
    }
    part
}

fn at_once(job: &Job, s: &Prune, key: &str, ui: &Ui) -> Result<Made> {
    let model = read_model(job.input("model")?, ui)?;
    if model.checkpoint.is_quantised() {
        ui.note(format!(
            "{}: the model is quantised; what is pruned are its weights as they are now, in f32",
            job.id
        ));
    }
    let parent = model.checkpoint.to_f32();
    let recovers = s.training.epochs > 0;
    let learns = recovers || needs_scores(s) && sees_data(s.score);
    if !learns && s.tune == Tune::None && s.vocab == Vocab::All {
        let plan = match given(s)? {
            Some(plan) => plan,
            None => plan(s, &parent, by_weight(s.score, &parent))?,
        };
        ui.note(&plan);
        return Ok(Made {
            checkpoint: thinned(s, prune::apply(&parent, &plan)?)?,
            tokenizer: model.tokenizer,
            report: Map::from_iter([("plan".to_string(), json!(plan.to_string()))]),
            files: vec![(PLAN, super::pretty(&plan)?)],
        });
    }
    let corpus = corpus::training(job.data, (&parent).into(), job.seed, ui)?;
    let length = fit::length(&model.checkpoint, s.training.max_length);
    let encoded = fit::encode(&corpus, &model.tokenizer, length, job.threads)?;
    let run = Run {
        job,
        corpus: &corpus,
        encoded: &encoded,
        model: &model,
        settings: &s.training,
        sparsity: zeros(s),
        key,
    };
    let teacher = match job.inputs.get("teacher") {
        Some(path) => {
            let teacher = read_model(path, ui)?;
            same_language(&teacher, &model, "teacher", "model")?;
            Some(teacher.checkpoint)
        }
        None => None,
    };
    let (teacher, role) = teacher.as_ref().map_or((&model.checkpoint, "model"), |t| (t, "teacher"));
    let logits = if recovers { run.teacher_logits(teacher, role, ui)? } else { vec![] };
    let weights = class_weights(&s.training, &encoded, &corpus)?;
    let hard = hard(&s.training, &weights, corpus.train.task);
    let objective = |features| match recovers {
        true => Objective::Distill(hard, soft(&s.kd, &logits, features)),
        false => Objective::CrossEntropy(hard),
    };
    let (plan, table) = match given(s)? {
        Some(plan) => (plan, None),
        None => Thinning { s, run: &run, parent: &parent }.plan(&objective(None), ui)?,
    };
    ui.note(&plan);
    let mut cut = prune::apply(&parent, &plan)?;
    // Where nothing is cut there is nothing to make up for.
    if s.tune != Tune::None && cut.spec.layers != parent.spec.layers {
        let (how, what) = match s.tune {
            Tune::Weights => (prune::Tune::Weights, "output matrices"),
            _ => (prune::Tune::Mask, "a factor for every head and channel"),
        };
        ui.note(format!("{}: fitting {what} by least squares", job.id));
        cut = prune::tune(&parent, &cut, &plan, &sample_of(s, &encoded.train.encodings), how, job.threads)?;
    }
    let cut = thinned(s, cut)?;
    let (small, small_encoded);
    let (cut, run) = match s.vocab {
        Vocab::All => (cut, run),
        Vocab::Train { first } => {
            let whole = ModelDir { checkpoint: cut, tokenizer: model.tokenizer.clone() };
            small = vocab::prune(&whole, &corpus.train.texts, first, job.threads)?.model;
            ui.note(format!(
                "{}: {} of {} words of the vocabulary kept",
                job.id, small.checkpoint.spec.vocab, parent.spec.vocab
            ));
            small_encoded = fit::encode(&corpus, &small.tokenizer, length, job.threads)?;
            (small.checkpoint.clone(), Run { encoded: &small_encoded, model: &small, ..run })
        }
    };
    let (figure, after_cut) = run.train_score(&cut)?;
    ui.note(format!(
        "{}: after the cut, before any recovery, on a training sample: {}",
        job.id,
        fit::shown((figure, after_cut))
    ));
    let (checkpoint, mut report, mut files) = match recovers {
        false => (cut, Map::new(), vec![]),
        true => {
            let inside = Inside::new(&s.kd, teacher, &cut.spec)?;
            let features = inside.as_ref().map(|i| i.features(&encoded.train.encodings));
            let (trained, report) = run.fit(&cut, objective(features), ui)?;
            (trained.checkpoint, report, trained.files)
        }
    };
    report.insert("plan".into(), json!(plan.to_string()));
    report.insert(format!("train_{figure}_after_cut"), json!(round(after_cut, 4)));
    if !run.encoded.validation.is_empty() {
        let (figure, x) = fit::score(&checkpoint, &run.encoded.validation, job.threads)?;
        report.insert(format!("validation_{figure}"), json!(round(x, 4)));
        ui.note(format!("{}: validation: {}", job.id, fit::shown((figure, x))));
    }
    report.insert("vocabulary".into(), json!(checkpoint.spec.vocab));
    if s.sparsity > 0.0 {
        let zeros = prune::sparsity(&checkpoint).into_iter();
        let zeros: BTreeMap<_, _> =
            zeros.map(|(lin, share)| (quant::site(&checkpoint.spec, lin), round(share, 4))).collect();
        report.insert("sparsity".into(), json!(zeros));
    }
    files.push((PLAN, super::pretty(&plan)?));
    if let Some(table) = &table {
        let layers = |spec| json!(round(table.layers_us(spec), 1));
        report.insert(
            "latency_us".into(),
            json!({"before": layers(&parent.spec), "after": layers(&checkpoint.spec)}),
        );
        files.push(("latency.json", super::pretty(table)?));
    }
    let tokenizer = run.model.tokenizer.clone();
    Ok(Made { checkpoint, tokenizer, report, files })
}

/// Single weights set to zero at once, if that is asked for.
fn thinned(s: &Prune, ck: Checkpoint) -> Result<Checkpoint> {
    match s.sparsity_schedule {
        SparsitySchedule::OneShot if s.sparsity > 0.0 => {
            Ok(prune::sparse(&ck, s.sparsity, scope(s.sparsity_scope))?)
        }
        _ => Ok(ck),
    }
}

/// What the recovery does with zeros.
fn zeros(s: &Prune) -> Sparsity {
    let (share, scope) = (s.sparsity, scope(s.sparsity_scope));
    match s.sparsity_schedule {
        _ if share == 0.0 => sparsity(&s.training),
        SparsitySchedule::OneShot => Sparsity::Keep,
        SparsitySchedule::Cubic => Sparsity::Cubic { share, scope, until: s.sparsity_until },
    }
}

/// A plan that was made before.
pub fn read_plan(path: &Path) -> Result<Plan> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the plan {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is no pruning plan", path.display()))
}

/// The plan that the settings name.
fn given(s: &Prune) -> Result<Option<Plan>> {
    s.plan.as_ref().map(|path| read_plan(path.as_ref())).transpose()
}

fn is_budget(s: &Prune) -> bool {
    s.budgets().next().is_some()
}

fn needs_scores(s: &Prune) -> bool {
    let ranked = |a: &Amount| !a.is_none() && !matches!(a, Amount::List(_));
    is_budget(s) || ranked(&s.heads) || ranked(&s.ffn) || ranked(&s.layers)
}

fn sees_data(score: Score) -> bool {
    !matches!(score, Score::L1 | Score::L2)
}

fn by_weight(score: Score, parent: &Checkpoint) -> Scores {
    let norm = if score == Score::L1 { Magnitude::L1 } else { Magnitude::L2 };
    prune::magnitude(parent, norm)
}

/// As many sentences as the scores look at, spread evenly over the training data.
fn sample_of(s: &Prune, sentences: &[Encoding]) -> Vec<Encoding> {
    let n = (s.score_batches * s.training.batch_size).clamp(1, sentences.len().max(1));
    (0..n).filter_map(|i| sentences.get(i * sentences.len() / n).cloned()).collect()
}

/// What decides a plan.
struct Thinning<'a> {
    s: &'a Prune,
    run: &'a Run<'a>,
    parent: &'a Checkpoint,
}

impl Thinning<'_> {
    fn plan(&self, objective: &Objective, ui: &Ui) -> Result<(Plan, Option<LatencyTable>)> {
        let (s, parent) = (self.s, self.parent);
        let id = self.run.job.id;
        let criterion = match s.score {
            Score::Gradient => Criterion::Gradient,
            Score::Taylor => Criterion::Taylor,
            Score::Fisher => Criterion::Fisher,
            Score::Activation if needs_scores(s) => {
                ui.note(format!("{id}: scoring by activations over {} batches", s.score_batches));
                let sample = sample_of(s, &self.run.encoded.train.encodings);
                let scores = prune::activation(parent, &sample, self.run.job.threads)?;
                return Ok((plan(s, parent, scores)?, None));
            }
            _ => return Ok((plan(s, parent, by_weight(s.score, parent))?, None)),
        };
        if !needs_scores(s) {
            return Ok((plan(s, parent, Scores::default())?, None));
        }
        ui.note(format!("{id}: scoring by gradients over {} batches", s.score_batches));
        let set = TrainSet::from(&self.run.encoded.train);
        let sample = Sample {
            batch_size: s.training.batch_size,
            batches: s.score_batches,
            seed: s.training.seed.unwrap_or(self.run.job.seed),
            threads: self.run.job.threads,
        };
        let gradients = mask_gradients(parent, &set, objective, sample, s.rearrange)?;
        let scores = gradients.scores(criterion);
        let (made, table) = match s.budgets().next() {
            Some((_, share)) => {
                let (budget, table) = self.budget(&scores, share, ui)?;
                (prune::plan(&parent.spec, &scores, &budget)?, table)
            }
            None => (plan(s, parent, scores)?, None),
        };
        Ok((if s.rearrange { rearranged(made, &gradients) } else { made }, table))
    }

    /// The budget over heads and channels together, on the lengths of the training sentences.
    fn budget(&self, scores: &Scores, share: f64, ui: &Ui) -> Result<(Budget, Option<LatencyTable>)> {
        let (s, spec) = (self.s, &self.parent.spec);
        let lengths: Vec<usize> = self.run.encoded.train.encodings.iter().map(|e| e.ids.len()).collect();
        let keep = Keep { share, max_heads_per_layer: s.max_per_layer.unwrap_or(1.0), align: s.align };
        if s.keep_latency.is_some() {
            let table = self.table(&lengths, ui)?;
            ui.note(&table);
            return Ok((prune::search_latency(spec, scores, &table, &keep)?, Some(table)));
        }
        let costs = match s.keep_macs {
            Some(_) => Costs::macs(spec, &lengths)?,
            None => Costs::parameters(spec),
        };
        Ok((prune::search(spec, scores, &costs, &keep)?, None))
    }

    /// What layers of every size take: read, or measured on a sentence of mean length.
    fn table(&self, lengths: &[usize], ui: &Ui) -> Result<LatencyTable> {
        let s = self.s;
        if let Some(path) = &s.latency_table {
            let bytes = std::fs::read(path).with_context(|| format!("cannot read the latency table {path}"))?;
            return serde_json::from_slice(&bytes).with_context(|| format!("{path} is no latency table"));
        }
        let mean = lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64;
        let tokens = s.latency_tokens.unwrap_or((mean.round() as usize).max(1));
        ui.note(format!("{}: timing layers of every size, {} tokens", self.run.job.id, tokens));
        let timing = Timing { tokens, scheme: s.latency_scheme.parse()?, align: s.align };
        let table = prune::measure_latency(self.parent, timing)?;
        Ok(LatencyTable { machine: super::machine::this().cpu, ..table })
    }
}

/// The same numbers of heads and channels a layer, chosen by what they do together.
fn rearranged(mut plan: Plan, gradients: &MaskGradients) -> Plan {
    for l in plan.kept_layers() {
        let all = &plan.parent.layers[l].heads;
        let gone: Vec<usize> = (0..all.len()).filter(|i| plan.heads[l].contains(&all[*i])).collect();
        if !gone.is_empty() {
            let chosen = prune::rearrange(gradients.fisher(At::Context(l)), &gone);
            plan.heads[l] = chosen.into_iter().map(|i| all[i]).collect();
        }
        if !plan.ffn[l].is_empty() {
            plan.ffn[l] = prune::rearrange(gradients.fisher(At::FfnHidden(l)), &plan.ffn[l]);
        }
    }
    plan
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
    let max_per_layer = s.max_per_layer.unwrap_or(0.5);
    let heads = Cut { amount: heads, scope: scope(s.heads_scope), max_per_layer, ..Cut::default() };
    let ffn = Cut { amount: simple(&s.ffn), scope: scope(s.ffn_scope), align: s.align, ..Cut::default() };
    Ok(prune::plan(&parent.spec, &scores, &Budget { layers, heads, ffn })?)
}

fn scope(s: settings::Scope) -> Scope {
    match s {
        settings::Scope::Global => Scope::Global,
        settings::Scope::PerLayer => Scope::PerLayer,
    }
}

fn simple<L>(amount: &Amount) -> prune::Amount<L> {
    match amount {
        Amount::Share(s) if *s > 0.0 => prune::Amount::Fraction(*s),
        Amount::Count(n) if *n > 0 => prune::Amount::Count(*n),
        _ => prune::Amount::Nothing,
    }
}
