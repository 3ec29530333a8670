//! The tape against finite differences and the runtime; the loop's laws.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

mod common;

use common::{FAMILIES, in_family, lively, sentences, settings, uneven, worst};
use quetsch::batch::Batch;
use quetsch::checkpoint::Checkpoint;
use quetsch::hooks::Masks;
use quetsch::ops::forward;
use quetsch::prune::Scores;
use quetsch::runtime::{Model, Workspace};
use quetsch::spec::{At, HeadSpec, ModelSpec, Tensor};
use quetsch_train::features::{Compare, Link, Qkv};
use quetsch_train::optim::{AdamW, Rates};
use quetsch_train::params::Params;
use quetsch_train::scores::Sample;
use quetsch_train::step::{Task, TrainSet, Worker, gradients};
use quetsch_train::tape::{Buffers, Draw, Tape};
use quetsch_train::{
    ClassWeights, Criterion, Dropout, Event, Features, FitError, FitSettings, Fitted, Hard, Loss, Measure,
    Objective, Precision, Schedule, Soft, Sparsity, State, Stop, UNLABELLED, fit, mask_gradients,
};
use std::ops::ControlFlow;

const HEADS: [HeadSpec; 2] = [HeadSpec::MeanMlp { labels: 3 }, HeadSpec::Pooler { labels: 3 }];
const CE: Objective =
    Objective::CrossEntropy(Hard { loss: Loss::CrossEntropy, label_smoothing: 0.1, class_weights: &[] });
const DROPOUT: Dropout = Dropout { hidden: 0.2, attention: 0.3, head: 0.25 };

fn labels(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i * 7 % 3).collect()
}

#[test]
fn tape_and_runtime_agree() {
    for (head, family) in HEADS.into_iter().flat_map(|h| FAMILIES.map(|f| (h, f))) {
        let ck = lively(in_family(uneven(head), family), 3);
        let params = Params::new(&ck, &[]);
        let batch = Batch::new(&ck.spec, &sentences(7, 30, 5)).unwrap();
        let mut buffers = Buffers::default();
        let examples: Vec<usize> = (0..7).collect();
        let draw = Draw { rate: Dropout::default(), seed: 1, step: 0, examples: &examples };
        let mut tape = Tape::new(&params, draw, &mut buffers);
        let y = forward(&mut tape, &ck.spec, &batch);
        let got = Model::pack(&ck).forward(&mut Workspace::default(), &batch).unwrap();
        assert!(worst(tape.value(y), &got) < 1e-5, "{head:?} {family:?}");
    }
}

/// Every parameter and every mask, with dropout on: the masks of dropout are functions of their keys, so the loss is
/// a fixed function of the weights.
#[test]
fn gradients_are_finite_differences() {
    for head in HEADS {
        for (dropout, frozen) in
            [(Dropout::default(), vec![]), (DROPOUT, vec![]), (DROPOUT, vec!["word_emb".to_string()])]
        {
            check_differences(lively(uneven(head), 11), dropout, &frozen);
        }
    }
    for family in FAMILIES.into_iter().skip(1) {
        check_differences(lively(in_family(uneven(HEADS[1]), family), 11), DROPOUT, &[]);
    }
    // ReLU has a kink, which finite differences step over; a smaller step and other weights keep away from it.
    let relu = ModelSpec { ffn_activation: quetsch::spec::Activation::Relu, ..uneven(HEADS[0]) };
    check_differences(lively(relu, 23), Dropout::default(), &[]);
}

fn check_differences(ck: Checkpoint, dropout: Dropout, frozen: &[String]) {
    let (encodings, labels) = (sentences(5, 30, 9), labels(5));
    let set = TrainSet::sentences(&encodings, &labels);
    let mut params = Params::new(&ck, frozen);
    let ones = |n: usize| vec![1.0f32; n];
    let layers = ck.spec.layers.iter().enumerate();
    let mut masks = Masks(
        layers
            .flat_map(|(l, s)| [(At::Context(l), ones(s.heads.len())), (At::FfnHidden(l), ones(s.ffn))])
            .collect(),
    );
    fn task<'a>(params: &'a Params, set: TrainSet<'a>, dropout: Dropout, masks: &'a Masks) -> Task<'a> {
        Task { params, set, objective: CE, dropout, seed: 5, masks: Some(masks), recompute: false }
    }
    let examples = [0, 1, 2, 3, 4];
    let mut team = Worker::team(&params, 1);
    let (_, mask_grads) = gradients(&task(&params, set, dropout, &masks), 3, &examples, 5, &mut team).unwrap();
    let loss = |params: &Params, masks: &Masks| {
        let mut team = Worker::team(params, 1);
        gradients(&task(params, set, dropout, masks), 3, &examples, 5, &mut team).unwrap().0.total
    };
    let step = 2e-3f32;
    let mut bad = vec![];
    let mut compare = |name: String, got: f32, up: f64, down: f64| {
        let want = ((up - down) / f64::from(2.0 * step)) as f32;
        if (got - want).abs() > 3e-4 + 0.02 * want.abs() {
            bad.push(format!("{name}: {got} != {want}"));
        }
    };
    for i in 0..params.table.len() {
        let def = params.table[i].clone();
        let stride = (def.len() / 6).max(1);
        for e in (0..def.len()).step_by(stride) {
            let got = match def.tensor {
                _ if !params.trained[i] => continue,
                Tensor::Word => {
                    let width = ck.spec.embedding();
                    team[0].grads.word.row(e / width).map_or(0.0, |r| r[e % width])
                }
                _ => team[0].grads.dense[i][e],
            };
            let keep = params.data[i][e];
            params.data[i][e] = keep + step;
            params.repack(1);
            let up = loss(&params, &masks);
            params.data[i][e] = keep - step;
            params.repack(1);
            let down = loss(&params, &masks);
            params.data[i][e] = keep;
            params.repack(1);
            compare(format!("{} [{e}]", def.name), got, up, down);
        }
    }
    for (at, rows) in &mask_grads {
        let units = masks.0[at].len();
        let sum = |e: usize| rows.iter().skip(e).step_by(units.max(1)).sum::<f32>();
        for (e, got) in (0..units).map(sum).enumerate() {
            let mut nudge = |by: f32| masks.0.get_mut(at).unwrap()[e] += by;
            nudge(step);
            let up = loss(&params, &masks);
            masks.0.get_mut(at).unwrap()[e] -= 2.0 * step;
            let down = loss(&params, &masks);
            masks.0.get_mut(at).unwrap()[e] = 1.0;
            compare(format!("{at:?} [{e}]"), got, up, down);
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

/// bf16 keeps 8 bits: a product of rounded inputs is off by up to 2^-8, a sum of many by less; through three layers and
/// back a tensor's gradient is within 4% of the f32 one (L2), its direction within 0.1% (cosine).
#[test]
fn gradients_in_bf16_are_near_those_in_f32() {
    let (encodings, labels) = (sentences(40, 30, 9), labels(40));
    let set = TrainSet::sentences(&encodings, &labels);
    let examples: Vec<usize> = (0..40).collect();
    for (head, dropout) in [(HEADS[0], DROPOUT), (HEADS[1], Dropout::default())] {
        let ck = lively(uneven(head), 11);
        let gradient = |precision| {
            let params = Params::with(&ck, &[], precision, 2);
            let task =
                Task { params: &params, set, objective: CE, dropout, seed: 5, masks: None, recompute: false };
            let mut team = Worker::team(&params, 1);
            let (loss, _) = gradients(&task, 3, &examples, 40, &mut team).unwrap();
            (loss.total, team.remove(0).grads)
        };
        let ((exact_loss, exact), (loss, near)) = (gradient(Precision::F32), gradient(Precision::Bf16));
        assert!((loss - exact_loss).abs() < 0.01 * exact_loss && loss != exact_loss, "{loss} {exact_loss}");
        for (i, def) in ck.spec.tensors().iter().enumerate() {
            let of = |g: &quetsch_train::params::Grads| match def.tensor {
                Tensor::Word => (0..30).flat_map(|r| g.word.row(r).unwrap_or(&[0.0; 24]).to_vec()).collect(),
                _ => g.dense[i].clone(),
            };
            let (a, b): (Vec<f32>, Vec<f32>) = (of(&exact), of(&near));
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let (size, other) = (dot(&a, &a).sqrt(), dot(&b, &b).sqrt());
            let off: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
            // A key bias moves all scores of a query alike: its true gradient is 0.
            if size == 0.0 || def.name.ends_with("key.bias") {
                continue;
            }
            assert!(dot(&off, &off).sqrt() < 0.04 * size, "{}: {}", def.name, dot(&off, &off).sqrt() / size);
            assert!(dot(&a, &b) > 0.999 * size * other, "{}", def.name);
        }
    }
}

/// Rows that wait for their steps end where dense AdamW takes them: to the bit while the gap is at most 256 steps and
/// the row had a gradient before, to f32 rounding otherwise.
#[test]
fn lazy_rows_are_dense_adamw() {
    let ck = lively(uneven(HEADS[0]), 3);
    let mut params = Params::new(&ck, &[]);
    let (word, width, steps) = (params.id(Tensor::Word), 24, 700);
    let mut adamw = AdamW::new(&params);
    let mut team = Worker::team(&params, 2);
    let mut dense = params.data[word].clone();
    let (mut m, mut v) = (vec![0.0; dense.len()], vec![0.0; dense.len()]);
    // Row r has a gradient every so many steps; row 7 once, row 8 never.
    let has = |r: usize, t: usize| match r {
        7 => t == 5,
        8 => false,
        r => t % (1 + r * r / 3) == r % 2,
    };
    for t in 0..steps {
        let rate = 1e-2 * (1.0 - t as f32 / steps as f32);
        let ids: Vec<u32> = (0..30).filter(|r| has(*r, t)).map(|r| r as u32).collect();
        adamw.catch_up(&mut params, ids.iter());
        let mut g = vec![0.0; dense.len()];
        for id in ids {
            let row = &mut g[id as usize * width..][..width];
            row.iter_mut().enumerate().for_each(|(i, g)| *g = ((i * 7 + t * 13 + id as usize) % 11) as f32 - 4.0);
            team[t % 2].grads.word.row_mut(id).copy_from_slice(row);
        }
        let rates = Rates { body: rate, head: rate, decay: 0.1, clip: 0.0 };
        adamw.update(&mut params, &mut team, rates);
        let [a, b] = [0.9f32, 0.999].map(|beta| f64::from(beta).powi(t as i32 + 1));
        let setting = quetsch_kernels::optim::AdamW {
            rate,
            decay: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            correction1: (1.0 - a) as f32,
            correction2: (1.0 - b) as f32,
            scale: 1.0,
        };
        quetsch_kernels::optim::adamw(&mut dense, &g, &mut m, &mut v, setting);
    }
    let got = adamw.checkpoint(&params, &ck).unwrap();
    let got = got.values(Tensor::Word);
    // Dense AdamW rounds every weight, up to about 1, 700 times.
    assert!(worst(&got, &dense) < 2e-5, "{}", worst(&got, &dense));
    let start = ck.values(Tensor::Word);
    for r in [0, 2, 5, 20] {
        assert_eq!(got[r * width..][..width], dense[r * width..][..width], "row {r}");
    }
    assert!(worst(&got[8 * width..9 * width], &start[8 * width..9 * width]) > 1e-3, "decay moves every row");
    assert_ne!(params.data[word], got.to_vec(), "rows wait");
}

fn run(ck: &Checkpoint, n: usize, s: &FitSettings) -> Fitted {
    let (encodings, labels) = (sentences(n, 30, 21), labels(n));
    let set = TrainSet::sentences(&encodings, &labels);
    fit(ck, &set, &CE, s, None, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn distance(a: &Checkpoint, b: &Checkpoint) -> f32 {
    a.tensors().map(|(d, _)| worst(&a.values(d.tensor), &b.values(d.tensor))).fold(0.0, f32::max)
}

/// Dropout on: its masks do not depend on how examples are gathered.
#[test]
fn accumulating_4x8_is_1x32() {
    let ck = lively(uneven(HEADS[0]), 3);
    // One sum of gradients is rounded in two ways; SGD-like settings keep Adam from blowing that up.
    let s = FitSettings {
        epochs: 1,
        dropout: DROPOUT,
        learning_rate: 1e-4,
        head_learning_rate: 1e-4,
        warmup: 0.0,
        ..settings()
    };
    // The second has batches of more tokens than one forward sees.
    for (n, whole, part) in [(96, 32, 8), (768, 256, 64)] {
        let one = run(&ck, n, &FitSettings { batch_size: whole, accumulate: 1, ..s.clone() });
        let four = run(&ck, n, &FitSettings { batch_size: part, accumulate: 4, ..s.clone() });
        assert_eq!((one.steps, four.steps), (3, 3));
        assert!((one.last.total - four.last.total).abs() < 1e-5, "{:?} {:?}", one.last, four.last);
        assert!(distance(&one.checkpoint, &four.checkpoint) < 1e-4);
    }
    let one = run(&ck, 96, &FitSettings { batch_size: 32, ..s.clone() });
    let other = run(&ck, 96, &FitSettings { batch_size: 32, seed: 8, ..s });
    assert!((one.last.total - other.last.total).abs() > 1e-4, "another seed is another run");
}

#[test]
fn same_seed_same_bytes_and_frozen_stays() {
    let ck = lively(uneven(HEADS[1]), 3);
    let s = FitSettings { freeze: vec!["embeddings.word_embeddings".into()], ..settings() };
    let (a, b) = (run(&ck, 40, &s), run(&ck, 40, &s));
    assert_eq!(distance(&a.checkpoint, &b.checkpoint), 0.0);
    assert_eq!(a.checkpoint.values(Tensor::Word), ck.values(Tensor::Word));
    assert_ne!(a.checkpoint.values(Tensor::Position), ck.values(Tensor::Position));
}

#[test]
fn small_models_learn() {
    let s = FitSettings {
        epochs: 60,
        learning_rate: 5e-3,
        head_learning_rate: 5e-3,
        dropout: Dropout::default(),
        ..settings()
    };
    let s = FitSettings { schedule: Schedule::Cosine, ..s };
    for (family, head) in FAMILIES.into_iter().zip([HEADS[0], HEADS[1], HEADS[1], HEADS[1]]) {
        let fitted = run(&lively(in_family(uneven(head), family), 3), 24, &s);
        let last = fitted.last;
        assert!(last.total < 0.45, "{family:?}: label smoothing 0.1 has a floor near 0.39: {last:?}");
    }
}

/// Interrupted anywhere, resumed: the bytes of an uninterrupted run.
#[test]
fn resumed_is_uninterrupted() {
    for precision in [Precision::F32, Precision::Bf16] {
        check_resumed(&FitSettings { precision, ..settings() });
    }
}

fn check_resumed(settings: &FitSettings) {
    let ck = lively(uneven(HEADS[0]), 3);
    let (encodings, labels) = (sentences(50, 30, 21), labels(50));
    let set = TrainSet::sentences(&encodings, &labels);
    let whole = run(&ck, 50, settings);
    let dir = tempfile::tempdir().unwrap();
    for stop_at in [1, 3, 7, 9] {
        let place = dir.path().join(format!("state-{stop_at}"));
        let state = |resume| State { dir: &place, every_steps: 2, resume, key: "k".into() };
        // The state on disk is that of the last periodic save, as after a kill.
        let mut stop = |e: Event| match e {
            Event::Step(p) if p.step == stop_at => ControlFlow::Break(Stop::Interrupted),
            _ => ControlFlow::Continue(()),
        };
        let stopped = fit(&ck, &set, &CE, settings, Some(&state(false)), &mut stop);
        assert!(matches!(stopped, Err(FitError::Interrupted { step, .. }) if step == stop_at));
        let mut resumed = None;
        let rest = fit(&ck, &set, &CE, settings, Some(&state(true)), &mut |e| {
            if let Event::Resumed { step, .. } = e {
                resumed = Some(step);
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(resumed, Some(stop_at));
        assert_eq!(distance(&rest.checkpoint, &whole.checkpoint), 0.0, "stopped at {stop_at}");
        let other = State { key: "other".into(), ..state(true) };
        let refused = fit(&ck, &set, &CE, settings, Some(&other), &mut |_| ControlFlow::Continue(()));
        assert!(refused.err().unwrap().to_string().contains("other inputs or settings"));
        // A file that says it has taken 10^18 steps is not believed: nothing of that size is asked for.
        let file = place.join("state.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let text = String::from_utf8(bytes[8..8 + header].to_vec()).unwrap();
        let said = text.split("\"step\":\"").nth(1).and_then(|t| t.split('"').next()).unwrap();
        let text = text.replace(&format!("\"step\":\"{said}\""), "\"step\":\"1000000000000000000\"");
        std::fs::write(&file, [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &bytes[8 + header..]].concat())
            .unwrap();
        let refused = fit(&ck, &set, &CE, settings, Some(&state(true)), &mut |_| ControlFlow::Continue(()));
        let refused = refused.err().unwrap().to_string();
        assert!(refused.contains("history") && refused.contains("expected those of"), "{refused}");
    }
}

/// Class weights and label smoothing are of the step, however it is cut into forwards.
#[test]
fn accumulating_is_one_batch_with_class_weights_too() {
    let ck = lively(uneven(HEADS[0]), 3);
    let (encodings, labels) = (sentences(96, 30, 21), labels(96));
    let set = TrainSet::sentences(&encodings, &labels);
    let teacher: Vec<f32> = (0..288).map(|i| (i % 7) as f32 - 3.0).collect();
    let hard = Hard { label_smoothing: 0.1, class_weights: &[0.3, 1.0, 2.5], ..Hard::default() };
    let soft = Soft { alpha: 0.5, temperature: 2.0, logits: &teacher, logits_weight: 0.1, ..Soft::default() };
    for objective in [Objective::CrossEntropy(hard), Objective::Distill(hard, soft)] {
        let params = Params::new(&ck, &[]);
        let task = Task {
            params: &params,
            set,
            objective,
            dropout: Dropout::default(),
            seed: 1,
            masks: None,
            recompute: false,
        };
        let examples: Vec<usize> = (0..32).collect();
        let gradient = |micro, threads| {
            let mut team = Worker::team(&params, threads);
            let (loss, _) = gradients(&task, 0, &examples, micro, &mut team).unwrap();
            let mut sum = team[0].grads.dense.clone();
            for w in &team[1..] {
                sum.iter_mut().zip(&w.grads.dense).for_each(|(a, b)| quetsch_kernels::math::add(a, b));
            }
            (loss, sum.concat())
        };
        let (one, g) = gradient(32, 1);
        for (micro, threads) in [(8, 1), (5, 2)] {
            let (parts, h) = gradient(micro, threads);
            assert!((one.total - parts.total).abs() < 1e-6 && (one.ce - parts.ce).abs() < 1e-6);
            assert!(worst(&g, &h) < 1e-5, "{micro} {threads}");
        }
    }
}

#[test]
fn class_weights_are_scikit_learns() {
    // compute_class_weight("balanced", classes=[0, 1, 2], y=labels) is 8 / (3 * [5, 2, 1]).
    let labels = [0, 0, 1, 0, 2, 0, 1, 0];
    assert_eq!(ClassWeights::None.of(&labels, 3), Vec::<f32>::new());
    let balanced = ClassWeights::Balanced.of(&labels, 3);
    assert!(worst(&balanced, &[8.0 / 15.0, 8.0 / 6.0, 8.0 / 3.0]) < 1e-6, "{balanced:?}");
    let roots: Vec<f32> = balanced.iter().map(|w| w.sqrt()).collect();
    assert!(worst(&ClassWeights::Sqrt.of(&labels, 3), &roots) < 1e-6);
    assert_eq!(ClassWeights::Balanced.of(&labels, 4)[3], 1.0, "a class without a sentence");
}

/// At a constant rate, 5 epochs that stop after 2 are 2 epochs; resumed, they stop at once.
#[test]
fn stopping_early_is_training_shorter() {
    let ck = lively(uneven(HEADS[0]), 3);
    let (encodings, labels) = (sentences(40, 30, 21), labels(40));
    let set = TrainSet::sentences(&encodings, &labels);
    let s = |epochs| FitSettings { epochs, warmup: 0.0, schedule: Schedule::Constant, ..settings() };
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("state");
    let state = State { dir: &place, every_steps: 0, resume: true, key: "k".into() };
    let short = run(&ck, 40, &s(2));
    let mut seen = 0;
    let stopped = fit(&ck, &set, &CE, &s(5), Some(&state), &mut |e| match e {
        Event::Epoch { epoch, .. } => {
            seen = epoch;
            if epoch == 2 { ControlFlow::Break(Stop::Enough) } else { ControlFlow::Continue(()) }
        }
        _ => ControlFlow::Continue(()),
    })
    .unwrap();
    assert_eq!((seen, stopped.steps, distance(&stopped.checkpoint, &short.checkpoint)), (2, short.steps, 0.0));
    let resumed = fit(&ck, &set, &CE, &s(5), Some(&state), &mut |e| match e {
        Event::Resumed { epoch: 2, .. } => ControlFlow::Break(Stop::Enough),
        _ => panic!("there is nothing left to do"),
    })
    .unwrap();
    assert_eq!((resumed.steps, distance(&resumed.checkpoint, &short.checkpoint)), (short.steps, 0.0));
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update() {
    let ck = lively(uneven(HEADS[0]), 3);
    let (encodings, labels) = (sentences(40, 30, 21), labels(40));
    let set = TrainSet::sentences(&encodings, &labels);
    let s = FitSettings {
        learning_rate: 1e30,
        head_learning_rate: 1e30,
        clip: 0.0,
        warmup: 0.0,
        epochs: 5,
        ..settings()
    };
    let mut last = 0;
    let e = fit(&ck, &set, &CE, &s, None, &mut |e| {
        if let Event::Step(p) = e {
            last = p.step;
        }
        ControlFlow::Continue(())
    });
    assert!(matches!(e, Err(FitError::NotFinite { step, .. }) if step == last + 1));
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let ck = lively(uneven(HEADS[0]), 3);
    let (encodings, labels) = (sentences(4, 30, 21), labels(4));
    let set = TrainSet::sentences(&encodings, &labels);
    let kd = |alpha, temperature, logits| {
        Objective::Distill(Hard::default(), Soft { alpha, temperature, logits, ..Soft::default() })
    };
    let hard = |label_smoothing, class_weights| {
        Objective::CrossEntropy(Hard { label_smoothing, class_weights, ..Hard::default() })
    };
    let rows: [(Objective, FitSettings, &str); 12] = [
        (CE, FitSettings { epochs: 0, ..settings() }, "at least 1"),
        (CE, FitSettings { warmup: 1.5, ..settings() }, "warmup"),
        (CE, FitSettings { dropout: Dropout { hidden: 1.0, ..DROPOUT }, ..settings() }, "dropout"),
        (CE, FitSettings { learning_rate: f32::NAN, ..settings() }, "learning_rate"),
        (hard(1.0, &[]), settings(), "label_smoothing"),
        (hard(0.0, &[1.0, 2.0]), settings(), "2 class weights, the model has 3 labels"),
        (hard(0.0, &[1.0, 0.0, 1.0]), settings(), "class weight is 0"),
        (hard(0.0, &[1.0, f32::NAN, 1.0]), settings(), "class weight is NaN"),
        (kd(1.5, 3.0, &[0.0; 12]), settings(), "alpha"),
        (kd(0.5, 0.0, &[0.0; 12]), settings(), "temperature"),
        (kd(0.5, 3.0, &[0.0; 9]), settings(), "teacher logits"),
        (kd(0.5, 3.0, &[f32::NAN; 12]), settings(), "not a finite"),
    ];
    for (objective, s, words) in rows {
        let e = fit(&ck, &set, &objective, &s, None, &mut |_| ControlFlow::Continue(())).err().unwrap().to_string();
        assert!(e.contains(words), "{e}");
    }
}

/// A unit whose output is thrown away by the next matrix has score 0; the scores are those of the masks' gradients.
#[test]
fn scores_find_the_idle_unit() {
    let mut ck = lively(uneven(HEADS[0]), 3);
    let out = Tensor::W(quetsch::spec::Lin::Out(0));
    let mut w = ck.values(out).into_owned();
    w.chunks_mut(24).for_each(|row| row[8..16].fill(0.0)); // head 2, the second of layer 0
    ck.set(out, quetsch::checkpoint::Stored::f32(w));
    let (encodings, labels) = (sentences(30, 30, 21), labels(30));
    let set = TrainSet::sentences(&encodings, &labels);
    let sample = Sample { batch_size: 8, batches: 3, seed: 1, threads: 2 };
    let found = mask_gradients(&ck, &set, &CE, sample, false).unwrap();
    for criterion in [Criterion::Gradient, Criterion::Taylor, Criterion::Fisher] {
        let scores = found.scores(criterion);
        let heads = &scores.heads;
        assert_eq!(heads.iter().map(Vec::len).collect::<Vec<_>>(), [3, 0, 1]);
        assert!(heads[0][1] == 0.0 && heads[0][0] > 0.0 && heads[0][2] > 0.0 && heads[2][0] > 0.0);
        assert!(criterion != Criterion::Gradient || (heads[2][0] - 1.0).abs() < 1e-6);
        assert_eq!(scores.ffn.iter().map(Vec::len).collect::<Vec<_>>(), [20, 12, 8]);
        assert!(scores.ffn.iter().flatten().chain(&scores.layers).all(|s| *s > 0.0));
    }
}

/// Everything that can be learned from inside a teacher of this shape, at once.
fn all_links(student: &ModelSpec, teacher: &ModelSpec) -> Vec<Link> {
    let one = |s: usize, t: usize| (s, vec![t]);
    let hidden = [(0, vec![0, 1]), one(2, 2), one(2, 0)];
    let heads = student.head_dim.min(teacher.head_dim) / 2;
    let weighted = |measure, s| {
        let links = Link::of(Compare::Hidden(measure), &[(s, vec![0, 1, 2])], 0.9);
        links.into_iter().map(|l| Link { weighted: true, ..l }).collect()
    };
    [
        Link::of(Compare::Hidden(Measure::Mse), &hidden, 0.5),
        Link::of(Compare::Hidden(Measure::Cosine), &[one(1, 1)], 0.4),
        Link::of(Compare::Embeddings(Measure::L1), &[one(0, 0)], 0.3),
        Link::of(Compare::Attention, &[one(0, 0), one(2, 2)], 0.7),
        Link::of(Compare::Relation(Qkv::Query, heads), &[one(2, 0)], 0.6),
        Link::of(Compare::Relation(Qkv::Value, 1), &[one(2, 2), one(0, 2)], 0.8),
        weighted(Measure::Mse, 1),
        weighted(Measure::Cosine, 2),
    ]
    .concat()
}

/// All parts and projections together, by finite differences; a teacher of another width.
#[test]
fn gradients_from_inside_are_finite_differences() {
    let ck = lively(uneven(HEADS[0]), 11);
    for (width, head_dim) in [(24, 8), (16, 4)] {
        let shape = ModelSpec { hidden: width, head_dim, ..uneven(HEADS[1]) };
        let teacher = Model::pack(&lively(shape, 12));
        let (encodings, labels) = (sentences(5, 30, 9), labels(5));
        let logits = teacher.logits(&encodings, 1).unwrap();
        let links = all_links(&ck.spec, teacher.spec());
        let features = Features { teacher: &teacher, encodings: &encodings, links: &links };
        let soft = Soft {
            alpha: 0.4,
            temperature: 2.0,
            logits: &logits,
            logits_weight: 0.3,
            logits_loss: Measure::Cosine,
            features: Some(features),
            ..Soft::default()
        };
        let objective = Objective::Distill(
            Hard { label_smoothing: 0.1, class_weights: &[0.5, 1.0, 2.0], ..Hard::default() },
            soft,
        );
        let mut params = Params::new(&ck, &[]);
        let model = params.table.len();
        features.add_parameters(&mut params, 3);
        // A projection for each of the seven links of hidden states and embeddings, weights for two.
        assert_eq!(params.table.len() - model, if width == 24 { 2 } else { 9 });
        for i in model..params.table.len() {
            if let Tensor::LayerWeights(_) = params.table[i].tensor {
                params.data[i] = vec![0.3, -0.8, 0.5];
            }
        }
        let run = |params: &Params, team: &mut [Worker]| {
            let set = TrainSet::sentences(&encodings, &labels);
            let task = Task { params, set, objective, dropout: DROPOUT, seed: 5, masks: None, recompute: false };
            gradients(&task, 3, &[0, 1, 2, 3, 4], 5, team).unwrap().0
        };
        let mut team = Worker::team(&params, 1);
        let parts = run(&params, &mut team).parts();
        // Differences are those of neighbouring words; sentences have none.
        assert!(parts.iter().all(|(name, x)| (*x > 0.0) != (*name == "differences")), "{parts:?}");
        let (mut bad, mut checked) = (vec![], 0);
        for i in 1..params.table.len() {
            let def = params.table[i].clone();
            for e in (0..def.len()).step_by((def.len() / 6).max(1)) {
                let keep = params.data[i][e];
                let mut at = |w: f32| {
                    params.data[i][e] = w;
                    params.repack(1);
                    run(&params, &mut Worker::team(&params, 1)).total
                };
                let step = 2e-3f32;
                let want = ((at(keep + step) - at(keep - step)) / f64::from(2.0 * step)) as f32;
                at(keep);
                let got = team[0].grads.dense[i][e];
                if (got - want).abs() > 6e-4 + 0.02 * want.abs() {
                    bad.push(format!("{} [{e}]: {got} != {want}", def.name));
                }
                checked += 1;
            }
        }
        assert!(bad.is_empty() && checked > 200, "{checked}: {}", bad.join("\n"));
    }
}

/// A run that computes layers again in its backward ends with the same bytes, also where it learns hidden states; what
/// is inside a layer cannot be learned then.
#[test]
fn recomputed_layers_change_no_bit() {
    let (encodings, labels) = (sentences(40, 30, 9), labels(40));
    let set = TrainSet::sentences(&encodings, &labels);
    let run = |ck: &Checkpoint, objective: &Objective, precision, recompute| {
        let s = FitSettings { epochs: 2, dropout: DROPOUT, precision, recompute, ..settings() };
        fit(ck, &set, objective, &s, None, &mut |_| ControlFlow::Continue(()))
    };
    let same = |ck: &Checkpoint, objective: &Objective, precision| {
        let [kept, again] = [false, true].map(|recompute| run(ck, objective, precision, recompute).unwrap());
        assert_eq!(distance(&kept.checkpoint, &again.checkpoint), 0.0, "{precision:?}");
    };
    for (family, precision) in FAMILIES.into_iter().zip([Precision::F32, Precision::Bf16].into_iter().cycle()) {
        same(&lively(in_family(uneven(HEADS[1]), family), 11), &CE, precision);
    }
    let ck = lively(uneven(HEADS[0]), 11);
    let teacher = Model::pack(&lively(ModelSpec { hidden: 16, ..uneven(HEADS[1]) }, 12));
    let logits = teacher.logits(&encodings, 1).unwrap();
    let links = |compare| Link::of(compare, &[(0, vec![0]), (2, vec![2])], 1.0);
    let kd = |links| {
        let features = Some(Features { teacher: &teacher, encodings: &encodings, links });
        Objective::Distill(
            Hard::default(),
            Soft { alpha: 0.5, temperature: 2.0, logits: &logits, features, ..Soft::default() },
        )
    };
    let (hidden, relations) = (links(Compare::Hidden(Measure::Mse)), links(Compare::Relation(Qkv::Value, 1)));
    same(&ck, &kd(&hidden), Precision::F32);
    let refused = run(&ck, &kd(&relations), Precision::F32, true).err().unwrap().to_string();
    assert!(refused.contains("recompute"), "{refused}");
}

/// A student learns the hidden states of a narrower teacher, and goes on after an interruption to the same bytes.
#[test]
fn projections_learn_and_resume() {
    let ck = lively(uneven(HEADS[0]), 11);
    let teacher = Model::pack(&lively(ModelSpec { hidden: 16, ..uneven(HEADS[1]) }, 12));
    let (encodings, labels) = (sentences(40, 30, 9), labels(40));
    let logits = teacher.logits(&encodings, 1).unwrap();
    let set = TrainSet::sentences(&encodings, &labels);
    let other = sentences(40, 30, 10);
    let kd = |features| {
        let soft = Soft { alpha: 1.0, temperature: 2.0, logits: &logits, features, ..Soft::default() };
        Objective::Distill(Hard::default(), soft)
    };
    let hidden = |s, t: Vec<usize>, weight| Link::of(Compare::Hidden(Measure::Mse), &[(s, t)], weight);
    let links = hidden(2, vec![2], 1.0);
    let objective = kd(Some(Features { teacher: &teacher, encodings: &encodings, links: &links }));
    let s = FitSettings { epochs: 6, ..settings() };
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("state");
    let state = State { dir: &place, every_steps: 0, resume: true, key: "k".into() };
    let mut means = vec![];
    let whole = fit(&ck, &set, &objective, &s, None, &mut |e| {
        if let Event::Epoch { mean, .. } = e {
            means.push(mean.hidden);
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(means[5] < 0.9 * means[0], "{means:?}");
    assert!(whole.layer_weights.is_empty());
    let stopped = fit(&ck, &set, &objective, &s, Some(&state), &mut |e| match e {
        Event::Step(p) if p.step == 13 => ControlFlow::Break(Stop::Interrupted),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(stopped, Err(FitError::Interrupted { step: 13, .. })));
    let rest = fit(&ck, &set, &objective, &s, Some(&state), &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(distance(&whole.checkpoint, &rest.checkpoint), 0.0);

    let link = |compare, s, t| Link::of(compare, &[(s, vec![t])], 1.0);
    let weighted = |links: Vec<Link>| links.into_iter().map(|l| Link { weighted: true, ..l }).collect();
    let rows = [
        (weighted(link(Compare::Attention, 0, 0)), &encodings, "no weights of layers"),
        (hidden(3, vec![2], 1.0), &encodings, "3:2"),
        (hidden(2, vec![], 1.0), &encodings, "no teacher layer"),
        (hidden(2, vec![2], f32::NAN), &encodings, "weight of Hidden"),
        (hidden(2, vec![2], 1.0), &other, "numbers of tokens"),
        (link(Compare::Attention, 1, 0), &encodings, "no attention head"),
        (link(Compare::Attention, 0, 2), &encodings, "every head"),
        (link(Compare::Relation(Qkv::Key, 5), 0, 0), &encodings, "5 relation heads"),
        (Link::of(Compare::Attention, &[(0, vec![0, 2])], 1.0), &encodings, "from one layer"),
    ];
    for (links, encodings, words) in &rows {
        let objective = kd(Some(Features { teacher: &teacher, encodings, links }));
        let e = fit(&ck, &set, &objective, &s, None, &mut |_| ControlFlow::Continue(())).err().unwrap().to_string();
        assert!(e.contains(words), "{e}");
    }
}

/// A student that is the teacher's layer 1 finds out which layer that is, and an interruption changes nothing.
#[test]
fn layer_weights_find_the_layer_and_resume() {
    let ck = lively(uneven(HEADS[0]), 11);
    let teacher = Model::pack(&ck);
    let (encodings, labels) = (sentences(40, 30, 9), labels(40));
    let logits = teacher.logits(&encodings, 1).unwrap();
    let set = TrainSet::sentences(&encodings, &labels);
    let link = Link::of(Compare::Hidden(Measure::Mse), &[(1, vec![0, 1, 2])], 1.0);
    let links: Vec<Link> = link.into_iter().map(|l| Link { weighted: true, ..l }).collect();
    let features = Some(Features { teacher: &teacher, encodings: &encodings, links: &links });
    let soft = Soft { alpha: 0.0, temperature: 2.0, logits: &logits, features, ..Soft::default() };
    let objective = Objective::Distill(Hard::default(), soft);
    // The student stands still, its weights of layers move.
    let s = FitSettings {
        epochs: 6,
        learning_rate: 0.0,
        head_learning_rate: 0.2,
        freeze: vec!["head".into(), "classifier".into(), "pooler".into()],
        ..settings()
    };
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("state");
    let state = State { dir: &place, every_steps: 0, resume: true, key: "k".into() };
    let run = |state, stop: usize| {
        fit(&ck, &set, &objective, &s, state, &mut |e| match e {
            Event::Step(p) if p.step == stop => ControlFlow::Break(Stop::Interrupted),
            _ => ControlFlow::Continue(()),
        })
    };
    let whole = run(None, usize::MAX).unwrap();
    assert_eq!(distance(&whole.checkpoint, &ck), 0.0);
    let [(1, weights)] = &whole.layer_weights[..] else { panic!("{:?}", whole.layer_weights) };
    assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6 && weights[1] > 0.8, "{weights:?}");
    assert!(matches!(run(Some(&state), 13), Err(FitError::Interrupted { step: 13, .. })));
    assert_eq!(run(Some(&state), usize::MAX).unwrap().layer_weights, whole.layer_weights);
    // Equal weights are the mean, one that has all is that layer.
    let hidden = |links: &[Link], logits_of_weights: Option<[f32; 3]>| {
        let features = Features { teacher: &teacher, encodings: &encodings, links };
        let objective = Objective::Distill(Hard::default(), Soft { features: Some(features), ..soft });
        let mut params = Params::new(&ck, &[]);
        features.add_parameters(&mut params, 1);
        if let Some(v) = logits_of_weights {
            let id = params.id(Tensor::LayerWeights(0));
            params.data[id] = v.to_vec();
        }
        let params = &params;
        let task = Task { params, set, objective, dropout: DROPOUT, seed: 5, masks: None, recompute: false };
        gradients(&task, 3, &[0, 1, 2], 3, &mut Worker::team(params, 1)).unwrap().0.hidden
    };
    let one = |teacher: &[usize]| Link::of(Compare::Hidden(Measure::Mse), &[(1, teacher.to_vec())], 1.0);
    for (v, plain) in [([0.0; 3], one(&[0, 1, 2])), ([0.0, 0.0, 90.0], one(&[2]))] {
        let (weighted, plain) = (hidden(&links, Some(v)), hidden(&plain, None));
        assert!(plain > 1e-3 && (weighted - plain).abs() < 1e-6 * plain, "{weighted} {plain}");
    }
}

/// The criteria of heads, channels and layers from the losses of single sentences, by finite differences of the masks.
#[test]
fn scores_are_those_of_single_examples() {
    let ck = lively(uneven(HEADS[1]), 5);
    let (encodings, labels) = (sentences(12, 30, 21), labels(12));
    let set = TrainSet::sentences(&encodings, &labels);
    let params = Params::new(&ck, &[]);
    let ce = Objective::CrossEntropy(Hard::default());
    let loss = |at: At, units: usize, example: usize, unit: usize, value: f32| {
        let mut mask = vec![1.0; units];
        mask[unit] = value;
        let masks = Masks([(at, mask)].into());
        let dropout = Dropout::default();
        let task =
            Task { params: &params, set, objective: ce, dropout, seed: 0, masks: Some(&masks), recompute: false };
        gradients(&task, 0, &[example], 1, &mut Worker::team(&params, 1)).unwrap().0.total
    };
    let step = 1e-2f32;
    // By sentence and unit.
    let differences = |at: At, units: usize| -> Vec<Vec<f64>> {
        let one = |e: usize, u: usize| {
            (loss(at, units, e, u, 1.0 + step) - loss(at, units, e, u, 1.0 - step)) / f64::from(2.0 * step)
        };
        (0..12).map(|e| (0..units).map(|u| one(e, u)).collect()).collect()
    };
    let close = |got: f32, want: f64, n: usize| {
        assert!((f64::from(got) - want).abs() < n as f64 * 2e-4 + 0.01 * want.abs(), "{got} {want}");
    };
    let layer = 2;
    let shape = &ck.spec.layers[layer];
    assert!(!shape.heads.is_empty() && shape.ffn > 0);
    let all = [
        (At::Context(0), ck.spec.layers[0].heads.len()),
        (At::Context(layer), shape.heads.len()),
        (At::FfnHidden(layer), shape.ffn),
    ];
    let all = all.map(|(at, units)| (at, units, differences(at, units)));
    for threads in [1, 2] {
        let sample = Sample { batch_size: 5, batches: 9, seed: 1, threads };
        let found = mask_gradients(&ck, &set, &ce, sample, true).unwrap();
        // All sentences in one batch: the mean loss, and the layer's L2 norm as the unit.
        let sample = Sample { batch_size: 12, batches: 1, seed: 1, threads };
        let whole = mask_gradients(&ck, &set, &ce, sample, false).unwrap().scores(Criterion::Gradient);
        let (taylor, fisher) = (found.scores(Criterion::Taylor), found.scores(Criterion::Fisher));
        let mut of_layer = [0.0; 3];
        for (at, units, g) in &all {
            let units = *units;
            let mean = |f: &dyn Fn(&[f64]) -> f64| g.iter().map(|row| f(row)).sum::<f64>() / 12.0;
            let of = |s: &Scores| match at {
                At::Context(l) => s.heads[*l].clone(),
                At::FfnHidden(l) => s.ffn[*l].clone(),
                _ => vec![],
            };
            let batch: Vec<f64> = (0..units).map(|u| mean(&|row| row[u]).abs()).collect();
            let norm = batch.iter().map(|x| x * x).sum::<f64>().sqrt();
            for u in 0..units {
                let (absolute, square) = (mean(&|row| row[u].abs()), mean(&|row| row[u] * row[u]));
                close(of(&taylor)[u], absolute, 1);
                close(of(&fisher)[u], square, 1);
                close(of(&whole)[u], batch[u] / norm, 1);
                (0..units)
                    .for_each(|v| close(found.fisher(*at)[u * units + v] / 12.0, mean(&|row| row[u] * row[v]), 1));
                if matches!(at, At::Context(l) | At::FfnHidden(l) if *l == layer) {
                    of_layer.iter_mut().zip([absolute, square, batch[u]]).for_each(|(sum, x)| *sum += x);
                }
            }
        }
        let n = shape.heads.len() + shape.ffn;
        for (scores, sum) in [&taylor, &fisher, &whole].into_iter().zip(of_layer) {
            close(scores.layers[layer], sum, n);
        }
        assert!(found.fisher(At::Context(1)).is_empty(), "a layer without heads");
    }
}

/// Zeros stay through training and an interruption, and a schedule ends at its share.
#[test]
fn zeros_stay_and_become_more() {
    use quetsch::prune::{Scope, sparse, sparsity};
    let dense = lively(uneven(HEADS[0]), 3);
    let ck = sparse(&dense, 0.4, Scope::Global).unwrap();
    let (encodings, labels) = (sentences(50, 30, 21), labels(50));
    let set = TrainSet::sentences(&encodings, &labels);
    let in_layers = |ck: &Checkpoint| -> Vec<f32> {
        let sites = quetsch::prune::sparse_sites(&ck.spec);
        sites.into_iter().flat_map(|s| ck.values(Tensor::W(s)).into_owned()).collect()
    };
    let zeros = |ck: &Checkpoint| in_layers(ck).iter().filter(|w| **w == 0.0).count();
    let n = in_layers(&ck).len();
    assert_eq!(zeros(&ck), (0.4 * n as f64).round() as usize);
    let go = |start: &Checkpoint, sparsity, state: Option<&State>, stop: usize| {
        let s = FitSettings { epochs: 5, sparsity, ..settings() };
        fit(start, &set, &CE, &s, state, &mut |e| match e {
            Event::Step(p) if p.step == stop => ControlFlow::Break(Stop::Interrupted),
            _ => ControlFlow::Continue(()),
        })
    };
    let kept = go(&ck, Sparsity::Keep, None, 0).unwrap().checkpoint;
    let same = in_layers(&ck).iter().zip(in_layers(&kept)).all(|(a, b)| (*a == 0.0) == (b == 0.0));
    assert!(same && distance(&kept, &ck) > 1e-3, "the same zeros, other weights");
    assert_eq!(zeros(&go(&ck, Sparsity::Free, None, 0).unwrap().checkpoint), 0);
    for (scope, until) in [(Scope::Global, 0.6), (Scope::PerLayer, 1.0)] {
        let cubic = Sparsity::Cubic { share: 0.8, scope, until };
        let whole = go(&dense, cubic, None, 0).unwrap().checkpoint;
        match scope {
            Scope::Global => assert_eq!(zeros(&whole), (0.8 * n as f64).round() as usize),
            Scope::PerLayer => {
                let inside = sparsity(&whole).into_iter().filter(|(_, share)| *share > 0.0);
                assert!(inside.into_iter().all(|(_, share)| (share - 0.8).abs() < 0.05));
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("state");
        let state = State { dir: &place, every_steps: 0, resume: true, key: "k".into() };
        assert!(go(&dense, cubic, Some(&state), 16).is_err());
        let rest = go(&dense, cubic, Some(&state), 0).unwrap().checkpoint;
        assert_eq!(distance(&rest, &whole), 0.0, "{scope:?}");
    }
    for (share, until) in [(0.0, 0.5), (1.5, 0.5), (0.5, 0.0), (f64::NAN, 0.5)] {
        let cubic = Sparsity::Cubic { share, scope: Scope::Global, until };
        let e = go(&ck, cubic, None, 0).err().unwrap().to_string();
        assert!(e.contains("sparsity"), "{e}");
    }
}

/// Alpha and temperature move in a straight line; without an end they stay.
#[test]
fn objectives_move_in_a_line() {
    let soft = Soft {
        alpha: 0.1,
        temperature: 4.0,
        alpha_end: Some(0.9),
        temperature_end: Some(1.0),
        logits: &[0.0],
        ..Soft::default()
    };
    let at = |soft, progress| Objective::Distill(Hard::default(), soft).at(progress).soft().unwrap();
    for (progress, alpha, temperature) in [(0.0, 0.1, 4.0), (0.5, 0.5, 2.5), (1.0, 0.9, 1.0)] {
        let now = at(soft, progress);
        assert!((now.alpha - alpha).abs() < 1e-6 && (now.temperature - temperature).abs() < 1e-6);
    }
    let fixed = at(Soft { alpha_end: None, temperature_end: None, ..soft }, 0.7);
    assert_eq!((fixed.alpha, fixed.temperature), (0.1, 4.0));
    let ck = lively(uneven(HEADS[0]), 3);
    let (encodings, labels) = (sentences(40, 30, 21), labels(40));
    let set = TrainSet::sentences(&encodings, &labels);
    let teacher: Vec<f32> = (0..120).map(|i| (i % 7) as f32 - 3.0).collect();
    let objective = Objective::Distill(Hard::default(), Soft { logits: &teacher, ..soft });
    let mut shares = vec![];
    let s = FitSettings { epochs: 1, dropout: Dropout::default(), ..settings() };
    fit(&ck, &set, &objective, &s, None, &mut |e| {
        if let Event::Step(p) = e {
            shares.push((p.losses.total - p.losses.kl) / (p.losses.ce - p.losses.kl));
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!((shares[0] - 0.1).abs() < 1e-4 && (shares[shares.len() - 1] - 0.9).abs() < 1e-4, "{shares:?}");
    let bad = Objective::Distill(Hard::default(), Soft { logits: &teacher, alpha_end: Some(2.0), ..soft });
    assert!(fit(&ck, &set, &bad, &s, None, &mut |_| ControlFlow::Continue(())).is_err());
}

/// A sentence without a label has the KL alone, and the cross-entropy is the mean over the others.
#[test]
fn unlabelled_sentences_learn_from_the_teacher_alone() {
    use quetsch_train::loss::{Shares, losses};
    let logits = [0.5, -1.0, 2.0, 1.5, 0.0, -0.5];
    let teacher = [1.0, 0.0, 0.5, -1.0, 2.0, 0.0];
    let soft = Soft { alpha: 0.3, temperature: 2.0, logits: &teacher, ..Soft::default() };
    let run = |logits: &[f32], labels: &[u32], examples: &[usize], soft: Soft| {
        let objective = Objective::Distill(Hard::default(), soft);
        let shares = Shares::of(&objective, examples.iter().map(|e| labels[*e]), 1);
        let mut d = vec![9.0; logits.len()];
        (losses(logits, labels.into(), examples, &[], &objective, shares, &mut d), d)
    };
    let (both, d) = run(&logits, &[2, UNLABELLED], &[0, 1], soft);
    let (first, _) = run(&logits[..3], &[2], &[0], soft);
    let (second, kl) = run(&logits[3..], &[0, 0], &[1], Soft { alpha: 0.0, ..soft });
    assert!((both.ce - first.ce).abs() < 1e-6 && (both.kl - (first.kl + second.kl) / 2.0).abs() < 1e-6);
    // Half the step's sentences, and 1 - alpha of the weight.
    let want: Vec<f32> = kl.iter().map(|g| 0.5 * 0.7 * g).collect();
    assert!(worst(&d[3..], &want) < 1e-6);
    let none = run(&logits, &[UNLABELLED; 2], &[0, 1], soft).0;
    assert!(none.ce == 0.0 && none.total.is_finite());
    assert_eq!(ClassWeights::Balanced.of(&[0, UNLABELLED, 1, 1], 2), ClassWeights::Balanced.of(&[0, 1, 1], 2));
    let ck = lively(uneven(HEADS[0]), 3);
    let (encodings, labels) = (sentences(2, 30, 21), [0, UNLABELLED]);
    let set = TrainSet::sentences(&encodings, &labels);
    assert!(fit(&ck, &set, &CE, &settings(), None, &mut |_| ControlFlow::Continue(())).is_err(), "no teacher");
    let go = Objective::Distill(Hard::default(), soft);
    assert!(fit(&ck, &set, &go, &settings(), None, &mut |_| ControlFlow::Continue(())).is_ok());
}

#[test]
fn random_students_have_the_shape_asked_for() {
    use quetsch_train::student::{Shape, random_student};
    for family in FAMILIES {
        let teacher = lively(in_family(uneven(HEADS[1]), family), 3);
        let shape = Shape { layers: 2, hidden: 12, heads: 3, ffn: 7 };
        let student = random_student(&teacher, shape, 1).unwrap();
        assert_eq!((student.spec.hidden, student.spec.head_dim, student.spec.layers.len()), (12, 4, 2));
        assert_eq!(student.labels, teacher.labels);
        let logits = Model::pack(&student).logits(&sentences(3, 30, 2), 1).unwrap();
        assert!(logits.iter().all(|v| v.is_finite()));
        assert_ne!(
            random_student(&teacher, shape, 2).unwrap().values(Tensor::Position),
            student.values(Tensor::Position)
        );
        for (layers, hidden, heads) in [(0, 12, 3), (2, 12, 5), (2, 12, 0), (2, 0, 1)] {
            assert!(random_student(&teacher, Shape { layers, hidden, heads, ffn: 4 }, 1).is_err());
        }
    }
}
