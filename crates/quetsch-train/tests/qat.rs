//! Quantisation-aware training: the forward is the deployed model's, the backward its straight-through derivative.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

mod common;

use common::{lively, sentences, settings, uneven, worst};
use quetsch::batch::{Batch, Encoding};
use quetsch::checkpoint::{Checkpoint, FloatType, Stored};
use quetsch::metrics;
use quetsch::ops::forward;
use quetsch::quant::calibrate::{Observer, observe};
use quetsch::quant::{self, Compute, Int8Input, Scheme};
use quetsch::runtime::{Model, Workspace};
use quetsch::spec::{HeadSpec, Lin, Norm, Tensor};
use quetsch_kernels::int8;
use quetsch_train::params::Params;
use quetsch_train::step::{Task, Worker, gradients};
use quetsch_train::tape::{Buffers, Draw, Tape};
use quetsch_train::{
    Dropout, Event, FitError, FitSettings, Hard, Loss, Objective, Precision, Qat, Soft, State, Stop, TrainSet, fit,
};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

const HEAD: HeadSpec = HeadSpec::MeanMlp { labels: 3 };
const CE: Objective =
    Objective::CrossEntropy(Hard { loss: Loss::CrossEntropy, label_smoothing: 0.0, class_weights: &[] });

fn nf4(compute: Compute) -> Scheme {
    Scheme::Nf4 { double_quant: true, compute, source: None }
}

/// Every scheme on all linears, and several at once with tables, biases and LayerNorms.
fn all_rules() -> Vec<Vec<(String, Scheme)>> {
    let one = |scheme| vec![("*".to_string(), scheme)];
    let mut all: Vec<_> = Scheme::NAMES.iter().map(|n| one(n.parse().unwrap())).collect();
    let from_bf16 = Scheme::Fp4 { double_quant: false, compute: Compute::F16, source: Some(FloatType::Bf16) };
    all.extend([Scheme::BnbInt8 { threshold: 1.0 }, nf4(Compute::F32), nf4(Compute::F16), from_bf16].map(one));
    let mixed = [
        ("*", Scheme::Bf16),
        ("*", Scheme::Int8),
        ("layer.0.key", Scheme::Int8Static),
        ("layer.1.ffn_down", nf4(Compute::Bf16)),
        ("layer.2.*", Scheme::Int8Static),
        ("embeddings.*", Scheme::Int8Weight),
    ];
    all.push(mixed.map(|(p, s)| (p.to_string(), s)).to_vec());
    all
}

fn qat(ck: &Checkpoint, rules: Vec<(String, Scheme)>, sample: &[Encoding]) -> Qat {
    let seen = observe(ck, sample).unwrap();
    let ranges = seen.iter().map(|(lin, s)| (*lin, s.absmax(Observer::Percentile))).collect();
    Qat { rules, ranges, sample: sample.to_vec(), ..Qat::default() }
}

fn deployed(ck: &Checkpoint, q: &Qat) -> Checkpoint {
    quant::quantise_calibrated(ck, &q.rules, &q.keep, &q.ranges).unwrap()
}

fn labels(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i * 7 % 3).collect()
}

#[test]
fn the_forward_is_the_deployed_models_to_the_bit() {
    let (ck, encodings) = (lively(uneven(HEAD), 3), sentences(9, 30, 5));
    for rules in all_rules() {
        let q = qat(&ck, rules.clone(), &encodings);
        let mut params = Params::new(&ck, &[]);
        params.quantise(&q, 2).unwrap();
        let batch = Batch::new(&ck.spec, &encodings).unwrap();
        let (mut buffers, examples) = (Buffers::default(), (0..9).collect::<Vec<_>>());
        let draw = Draw { rate: Dropout::default(), seed: 1, step: 0, examples: &examples };
        let mut tape = Tape::new(&params, draw, &mut buffers);
        let y = forward(&mut tape, &ck.spec, &batch);
        let model = Model::pack(&deployed(&ck, &q));
        let want = model.forward(&mut Workspace::default(), &batch).unwrap();
        assert_eq!(tape.value(y), want, "{rules:?}");
    }
}

/// What a step of training reports is the loss of the checkpoint that was deployed after the step before.
#[test]
fn every_loss_is_that_of_the_deployed_checkpoint() {
    let (ck, encodings, truth) = (lively(uneven(HEAD), 3), sentences(24, 30, 5), labels(24));
    let set = TrainSet::sentences(&encodings, &truth);
    for rules in all_rules() {
        let q = qat(&ck, rules.clone(), &encodings);
        let s = FitSettings {
            epochs: 4,
            batch_size: 24,
            dropout: Dropout::default(),
            quant: Some(q.clone()),
            learning_rate: 5e-3,
            ..settings()
        };
        // The ranges move before the second epoch: its loss is not that of the first one's result.
        let is_static = rules.iter().any(|(_, s)| *s == Scheme::Int8Static);
        let (mut promised, mut compared) = (vec![], 0);
        fit(&ck, &set, &CE, &s, None, &mut |e| {
            match e {
                Event::Epoch { checkpoint, .. } => {
                    let logits = Model::pack(checkpoint).logits(&encodings, 1).unwrap();
                    promised.push(metrics::evaluate(&logits, &truth, &ck.labels).loss);
                }
                Event::Step(p) if p.step > 1 && !(is_static && p.step == 2) => {
                    let (want, got) = (promised[p.step - 2], p.losses.total);
                    assert!((want - got).abs() < 1e-5 * want, "{rules:?} step {}: {got} != {want}", p.step);
                    compared += 1;
                }
                _ => {}
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        assert!(compared >= 2 && promised[3] < promised[0], "{rules:?}: {promised:?}");
    }
}

#[test]
fn integers_and_sums_are_those_of_the_format() {
    let (ck, encodings) = (lively(uneven(HEAD), 3), sentences(4, 30, 5));
    let q = qat(&ck, vec![("head.1".into(), Scheme::Int8)], &encodings);
    let pooled = pooled(&ck, &encodings);
    let (k, rows) = (ck.spec.hidden, 4);
    let Stored::Int8(w) = deployed(&ck, &q).get(Tensor::W(Lin::HeadDense)).clone() else { panic!("not int8") };
    let bias = ck.values(Tensor::B(Lin::HeadDense)).into_owned();
    let (mut codes, mut scale) = (vec![0; rows * int8::stride(k)], vec![0.0; rows]);
    int8::quantise(&pooled, k, int8::Range::Row, &mut codes, &mut scale);
    let mut params = Params::new(&ck, &[]);
    params.quantise(&q, 1).unwrap();
    let mut buffers = Buffers::default();
    let draw = Draw { rate: Dropout::default(), seed: 1, step: 0, examples: &[0, 1, 2, 3] };
    let mut tape = Tape::new(&params, draw, &mut buffers);
    let mut hidden = vec![];
    let hook = Keep { at: quetsch::spec::At::HeadHidden, values: &mut hidden };
    forward(&mut quetsch::ops::With { ops: &mut tape, hook }, &ck.spec, &Batch::new(&ck.spec, &encodings).unwrap());
    for r in 0..rows {
        for c in 0..w.scb.len() {
            let products =
                (0..k).map(|i| i32::from(codes[r * int8::stride(k) + i]) * i32::from(w.values[c * k + i]));
            let want = products.sum::<i32>() as f32 * (scale[r] * (w.scb[c] / 127.0)) + bias[c];
            assert_eq!(hidden[r * w.scb.len() + c], quetsch_kernels::math::gelu(want), "row {r}, column {c}");
        }
    }
}

/// Copies what passes one tap.
struct Keep<'a> {
    at: quetsch::spec::At,
    values: &'a mut Vec<f32>,
}

impl<O: quetsch::ops::Inspect> quetsch::ops::Hook<O> for Keep<'_> {
    fn at(&mut self, ops: &mut O, at: quetsch::spec::At, x: O::Act) -> O::Act {
        if at == self.at {
            *self.values = ops.values(&x);
        }
        x
    }
}

/// What the head reads.
fn pooled(ck: &Checkpoint, encodings: &[Encoding]) -> Vec<f32> {
    let (model, mut ws, mut values) = (Model::pack(ck), Workspace::default(), vec![]);
    let mut ops = quetsch::runtime::CpuOps::new(&model, &mut ws);
    let hook = Keep { at: quetsch::spec::At::Pooled, values: &mut values };
    let batch = Batch::new(&ck.spec, encodings).unwrap();
    forward(&mut quetsch::ops::With { ops: &mut ops, hook }, &ck.spec, &batch);
    values
}

fn step(params: &Params, encodings: &[Encoding]) -> Worker {
    let (truth, examples) = (labels(encodings.len()), (0..encodings.len()).collect::<Vec<_>>());
    let set = TrainSet::sentences(encodings, &truth);
    let task =
        Task { params, set, objective: CE, dropout: Dropout::default(), seed: 1, masks: None, recompute: false };
    let mut team = Worker::team(params, 1);
    gradients(&task, 0, &examples, encodings.len(), &mut team).unwrap();
    team.remove(0)
}

/// Where inputs are not rounded, the straight-through gradient at W is the plain one at the decoded weights.
#[test]
fn weight_only_gradients_are_those_of_the_decoded_model() {
    let (ck, encodings) = (lively(uneven(HEAD), 3), sentences(6, 30, 5));
    for scheme in [Scheme::Int8Weight, nf4(Compute::F32), Scheme::Bf16] {
        let rules = vec![("*".to_string(), scheme), ("embeddings.*".to_string(), Scheme::Int8)];
        let q = qat(&ck, rules, &encodings);
        let mut params = Params::new(&ck, &[]);
        params.quantise(&q, 1).unwrap();
        let plain = Params::new(&deployed(&ck, &q).to_f32(), &[]);
        let (got, want) = (step(&params, &encodings), step(&plain, &encodings));
        let mut moved = 0;
        for (i, def) in params.table.iter().enumerate() {
            assert!(worst(&got.grads.dense[i], &want.grads.dense[i]) < 2e-5, "{scheme}: {}", def.name);
            moved += usize::from(got.grads.dense[i].iter().any(|g| *g != 0.0));
        }
        assert!(moved > params.table.len() / 2);
        assert!(worst(&got.grads.word.data, &want.grads.word.data) < 2e-5, "{scheme}: words");
    }
}

/// The surrogate of straight-through training: x + (Q(x) - x) with the second part a constant (nothing where a static
/// range clips), times the decoded weights. Its finite differences in f64, for the head's hidden layer.
#[test]
fn gradients_are_finite_differences_of_the_surrogate() {
    let (ck, encodings) = (lively(uneven(HEAD), 3), sentences(5, 30, 5));
    let (x, truth) = (pooled(&ck, &encodings), labels(5));
    let k = ck.spec.hidden;
    let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    for scheme in [
        Scheme::Int8,
        Scheme::Int8Static,
        Scheme::BnbInt8 { threshold: 0.5 * largest },
        nf4(Compute::Bf16),
        nf4(Compute::F16),
    ] {
        let mut q = qat(&ck, vec![("head.1".into(), scheme)], &encodings);
        q.ranges.insert(Lin::HeadDense, 0.4 * largest);
        let mut params = Params::new(&ck, &[]);
        params.quantise(&q, 1).unwrap();
        let got = step(&params, &encodings).grads;
        let stored = deployed(&ck, &q);
        let stored = stored.get(Tensor::W(Lin::HeadDense)).clone();
        let (read, clip) = read(&stored, &x, k);
        let mut w: Vec<f64> = decoded(&stored).iter().map(|v| f64::from(*v)).collect();
        let get = |t| ck.values(t).iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
        let (b, out, out_b) =
            (get(Tensor::B(Lin::HeadDense)), get(Tensor::W(Lin::Classifier)), get(Tensor::B(Lin::Classifier)));
        let loss = |w: &[f64], nudge: &[f64]| -> f64 {
            let row = |r: usize| {
                let x: Vec<f64> = (0..k)
                    .map(|c| f64::from(read[r * k + c]) + if clip[r * k + c] { 0.0 } else { nudge[c] })
                    .collect();
                let h: Vec<f64> = b
                    .iter()
                    .enumerate()
                    .map(|(j, b)| gelu(b + x.iter().zip(&w[j * k..]).map(|(x, w)| x * w).sum::<f64>()))
                    .collect();
                let y: Vec<f64> = out_b
                    .iter()
                    .enumerate()
                    .map(|(j, b)| b + h.iter().zip(&out[j * h.len()..]).map(|(h, w)| h * w).sum::<f64>())
                    .collect();
                y.iter().map(|v| v.exp()).sum::<f64>().ln() - y[truth[r] as usize]
            };
            (0..5).map(row).sum::<f64>() / 5.0
        };
        let (mut nudge, eps) = (vec![0.0; k], 1e-5);
        let i = params.id(Tensor::W(Lin::HeadDense));
        // The runtime rounds what a bfloat16 product writes; the surrogate does not.
        let tolerance = if matches!(scheme, Scheme::Nf4 { .. }) { 2e-3 } else { 3e-5 };
        for e in (0..w.len()).step_by(7) {
            let before = w[e];
            let mut at = |v| {
                w[e] = v;
                loss(&w, &nudge)
            };
            let want = (at(before + eps) - at(before - eps)) / (2.0 * eps);
            w[e] = before;
            let got = f64::from(got.dense[i][e]);
            assert!((got - want).abs() < tolerance, "{scheme} dW[{e}]: {got} != {want}");
        }
        // What the last LayerNorm's beta adds to, the mean over tokens passes on whole.
        let beta = params.id(Tensor::Beta(Norm::Ffn(ck.spec.layers.len() - 1)));
        for c in 0..k {
            let mut at = |v| {
                nudge[c] = v;
                loss(&w, &nudge)
            };
            let want = (at(eps) - at(-eps)) / (2.0 * eps);
            nudge[c] = 0.0;
            let got = f64::from(got.dense[beta][c]);
            assert!((got - want).abs() < tolerance, "{scheme} dx[{c}]: {got} != {want}");
        }
        assert!(scheme != Scheme::Int8Static || clip.iter().any(|c| *c), "nothing was clipped");
    }
}

/// x Phi(x), erf by its Maclaurin series.
fn gelu(x: f64) -> f64 {
    let z = x * std::f64::consts::FRAC_1_SQRT_2;
    let (mut term, mut sum) = (z, z);
    for n in 1..200 {
        term *= -z * z / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    0.5 * x * (1.0 + std::f64::consts::FRAC_2_SQRT_PI * sum)
}

fn decoded(stored: &Stored) -> Vec<f32> {
    match stored {
        Stored::Float { data, .. } => data.clone(),
        Stored::Int8(q) => q.dequantise(),
        Stored::FourBit(q) => q.dequantise().iter().map(|v| q.compute.round(*v)).collect(),
    }
}

/// Inputs as a weight reads them, by the formulas, and which are clipped. A row of the pool is a sequence of its own.
fn read(stored: &Stored, x: &[f32], k: usize) -> (Vec<f32>, Vec<bool>) {
    let rounded =
        |x: f32, absmax: f32| (x / absmax * 127.0).clamp(-127.0, 127.0).round_ties_even() * absmax / 127.0;
    let by_row = |f: &dyn Fn(&[f32]) -> Vec<f32>| x.chunks(k).flat_map(f).collect::<Vec<f32>>();
    let none = vec![false; x.len()];
    let absmax = |row: &mut dyn Iterator<Item = f32>| row.fold(0f32, |m, v| m.max(v.abs()));
    match stored {
        Stored::Int8(q) => match q.input {
            Int8Input::Static { absmax: a } => {
                (x.iter().map(|v| rounded(*v, a)).collect(), x.iter().map(|v| v.abs() > a).collect())
            }
            Int8Input::Dynamic => {
                (by_row(&|row| row.iter().map(|v| rounded(*v, absmax(&mut row.iter().copied()))).collect()), none)
            }
            Int8Input::Mixed { threshold } => {
                let half = |v: f32| FloatType::F16.round(v);
                let one = |row: &[f32]| {
                    let a = absmax(&mut row.iter().map(|v| half(*v)).filter(|v| v.abs() < threshold));
                    let value = |v: &f32| if half(*v).abs() >= threshold { half(*v) } else { rounded(half(*v), a) };
                    row.iter().map(value).collect()
                };
                (by_row(&one), none)
            }
            Int8Input::Float => (x.to_vec(), none),
        },
        Stored::FourBit(q) => (x.iter().map(|v| q.compute.round(*v)).collect(), none),
        Stored::Float { .. } => (x.to_vec(), none),
    }
}

/// A quantised student of its own float self comes nearer to it than quantising alone.
#[test]
fn training_recovers_what_quantising_lost() {
    let (ck, encodings) = (lively(uneven(HEAD), 3), sentences(64, 30, 5));
    let (parent, truth) = (Model::pack(&ck).logits(&encodings, 1).unwrap(), labels(64));
    let set = TrainSet::sentences(&encodings, &truth);
    let soft = Soft { alpha: 0.0, temperature: 1.0, logits: &parent, ..Soft::default() };
    for precision in [Precision::F32, Precision::Bf16] {
        for scheme in [nf4(Compute::Bf16), Scheme::Int8Static] {
            let mut q = qat(&ck, vec![("*".into(), scheme), ("embeddings.*".into(), Scheme::Int8)], &encodings);
            if scheme == Scheme::Int8Static {
                q.ranges.values_mut().for_each(|r| *r *= 0.5); // clips badly, as a short calibration may
                q.sample = vec![];
            }
            let distance = |child: &Checkpoint| {
                let child = Model::pack(child).logits(&encodings, 1).unwrap();
                metrics::agreement(&parent, &child, &truth, 3).mean_kl
            };
            let s = FitSettings {
                epochs: 12,
                dropout: Dropout::default(),
                learning_rate: 2e-3,
                precision,
                quant: Some(q.clone()),
                ..settings()
            };
            let fitted = fit(&ck, &set, &Objective::Distill(Hard::default(), soft), &s, None, &mut |_| {
                ControlFlow::Continue(())
            })
            .unwrap();
            let (before, after) = (distance(&deployed(&ck, &q)), distance(&fitted.checkpoint));
            assert!(after < 0.5 * before, "{scheme} {precision:?}: KL {before} -> {after}");
            assert_eq!(Scheme::of(fitted.checkpoint.get(Tensor::W(Lin::Up(0)))), scheme);
            assert_eq!(Scheme::of(fitted.checkpoint.get(Tensor::Word)), Scheme::Int8Weight);
        }
    }
}

/// Interrupted anywhere, resumed: the ranges that moved are part of the state.
#[test]
fn a_resumed_run_ends_with_the_same_bytes() {
    let (ck, encodings, truth) = (lively(uneven(HEAD), 3), sentences(30, 30, 21), labels(30));
    let set = TrainSet::sentences(&encodings, &truth);
    let q = qat(&ck, vec![("*".into(), Scheme::Int8Static)], &encodings[..8]);
    let s = FitSettings { epochs: 3, freeze: vec!["layer.1.".into()], quant: Some(q.clone()), ..settings() };
    let mut go_on = |_: Event| ControlFlow::Continue(());
    let whole = fit(&ck, &set, &CE, &s, None, &mut go_on).unwrap().checkpoint;
    let range = |ck: &Checkpoint| match ck.get(Tensor::W(Lin::HeadDense)) {
        Stored::Int8(q) => q.input,
        _ => panic!("not int8"),
    };
    assert_ne!(range(&whole), Int8Input::Static { absmax: q.ranges[&Lin::HeadDense] }, "the ranges move");
    let dir = tempfile::tempdir().unwrap();
    for stop_at in [3, 5, 6, 11] {
        let place = dir.path().join(stop_at.to_string());
        let state = |resume| State { dir: &place, every_steps: 1, resume, key: "k".into() };
        let stopped = fit(&ck, &set, &CE, &s, Some(&state(false)), &mut |e| match e {
            Event::Step(p) if p.step == stop_at => ControlFlow::Break(Stop::Interrupted),
            _ => ControlFlow::Continue(()),
        });
        assert!(matches!(stopped, Err(FitError::Interrupted { .. })));
        let rest = fit(&ck, &set, &CE, &s, Some(&state(true)), &mut go_on).unwrap().checkpoint;
        assert!(rest.tensors().zip(whole.tensors()).all(|((_, a), (_, b))| a == b), "stopped at {stop_at}");
    }
}

#[test]
fn what_cannot_be_trained_is_refused_before_the_first_step() {
    let (ck, encodings, truth) = (lively(uneven(HEAD), 3), sentences(4, 30, 5), labels(4));
    let set = TrainSet::sentences(&encodings, &truth);
    let rule = |p: &str, s| vec![(p.to_string(), s)];
    for (rules, ranges, want) in [
        (rule("embeddings.*", nf4(Compute::Bf16)), BTreeMap::new(), "freeze it"),
        (rule("*", Scheme::Int8Static), BTreeMap::new(), "needs calibration"),
        (rule("layer.9.*", Scheme::Int8), BTreeMap::new(), "matches nothing"),
    ] {
        let quant = Some(Qat { rules, ranges, ..Qat::default() });
        let error =
            fit(&ck, &set, &CE, &FitSettings { quant, ..settings() }, None, &mut |_| ControlFlow::Continue(()));
        let error = error.err().unwrap().to_string();
        assert!(error.contains(want), "{error}");
    }
    let quant = Some(Qat { rules: rule("embeddings.*", nf4(Compute::Bf16)), ..Qat::default() });
    let frozen = FitSettings { quant, freeze: vec!["embeddings.".into()], ..settings() };
    fit(&ck, &set, &CE, &frozen, None, &mut |_| ControlFlow::Continue(())).unwrap();
}
