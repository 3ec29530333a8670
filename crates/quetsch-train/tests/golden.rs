//! Against PyTorch: logits, losses, all gradients, ten AdamW steps.

mod common;

use common::{Golden, fixture, settings, worst};
use quetsch::batch::Batch;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::hooks::Record;
use quetsch::ops::{With, forward};
use quetsch::runtime::{CpuOps, Model, Workspace};
use quetsch::spec::At;
use quetsch::task::{Targets, Units};
use quetsch_train::features::{Compare, Features, Link, Side, relation, rows as compare_rows};
use quetsch_train::loss::{Hard, Loss, Objective, Shares, Soft, losses};
use quetsch_train::params::Params;
use quetsch_train::step::{Task, TrainSet, Worker, gradients};
use quetsch_train::{Dropout, Event, FitSettings, Measure, fit};
use std::ops::ControlFlow;

#[test]
fn the_runtime_gives_pytorchs_activations_and_logits() {
    for name in ["student", "pooler"] {
        let g = Golden::load(name);
        let model = Model::pack(&g.checkpoint());
        let batch = Batch::new(&g.spec, &g.encodings).unwrap();
        let mut ws = Workspace::default();
        assert!(worst(&model.forward(&mut ws, &batch).unwrap(), &g.tensor("logits")) < 1e-5, "{name}");
        let want = [
            At::Embedded,
            At::Attended(0),
            At::Hidden(0),
            At::Attended(1),
            At::Hidden(1),
            At::Hidden(2),
            At::Pooled,
        ];
        let mut record = Record { want: want.to_vec(), got: Default::default() };
        let mut ops = CpuOps::new(&model, &mut ws);
        forward(&mut With { ops: &mut ops, hook: &mut record }, &g.spec, &batch);
        for (at, key) in want.iter().zip([
            "a.embedded",
            "a.attended.0",
            "a.hidden.0",
            "a.attended.1",
            "a.hidden.1",
            "a.hidden.2",
            "a.pooled",
        ]) {
            assert!(worst(&record.got[at], &g.tensor(key)) < 1e-5, "{name} {at:?}");
        }
    }
}

#[test]
fn gradients_are_pytorchs() {
    for name in ["student", "pooler"] {
        let g = Golden::load(name);
        let ck = g.checkpoint();
        let params = Params::new(&ck, &[]);
        let teacher = g.tensor("teacher");
        let (alpha, temperature) = (0.3, 3.0);
        let kd =
            Objective::Distill(Hard::default(), Soft { alpha, temperature, logits: &teacher, ..Soft::default() });
        for (objective, key, total) in [(Objective::CrossEntropy(Hard::default()), "ce", "ce"), (kd, "kd", "kd")] {
            for threads in [1, 2] {
                let set = TrainSet::sentences(&g.encodings, &g.labels);
                let task = Task {
                    params: &params,
                    set,
                    objective,
                    dropout: Dropout::default(),
                    seed: 1,
                    masks: None,
                    recompute: false,
                };
                let mut team = Worker::team(&params, threads);
                let (loss, _) = gradients(&task, 0, &[0, 1, 2], 3, &mut team).unwrap();
                assert!((loss.total - g.json["result"][total].as_f64().unwrap()).abs() < 1e-5, "{name} {key}");
                if key == "kd" {
                    assert!((loss.ce - g.json["result"]["ce"].as_f64().unwrap()).abs() < 1e-5);
                    assert!((loss.kl - g.json["result"]["kl_times_t2"].as_f64().unwrap()).abs() < 1e-5);
                }
                for (i, def) in params.table.iter().enumerate() {
                    let want = g.tensor(&format!("g.{key}.{}", def.name));
                    let mut got = vec![0.0; want.len()];
                    for w in &team {
                        for (r, row) in got.chunks_mut(g.spec.hidden).enumerate().filter(|_| i == 0) {
                            quetsch_kernels::math::add(row, w.grads.word.row(r).unwrap_or(&[]));
                        }
                        quetsch_kernels::math::add(&mut got, &w.grads.dense[i]);
                    }
                    let size = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                    assert!(worst(&got, &want) < 1e-5 + 1e-4 * size, "{name} {key} {}", def.name);
                }
            }
        }
    }
}

#[test]
fn ten_steps_are_pytorchs() {
    for name in ["student", "pooler"] {
        let g = Golden::load(name);
        let teacher = g.tensor("teacher");
        let objective = Objective::Distill(
            Hard::default(),
            Soft { alpha: 0.3, temperature: 3.0, logits: &teacher, ..Soft::default() },
        );
        let s = FitSettings {
            epochs: 10,
            batch_size: 3,
            learning_rate: 1e-3,
            head_learning_rate: 5e-3,
            warmup: 0.2,
            dropout: Dropout::default(),
            ..settings()
        };
        let set = TrainSet::sentences(&g.encodings, &g.labels);
        let mut seen = vec![];
        let fitted = fit(&g.checkpoint(), &set, &objective, &s, None, &mut |e| {
            if let Event::Step(p) = e {
                seen.push((p.losses.total, p.gradient_norm, f64::from(p.learning_rate)));
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        let steps = &g.json["result"]["steps"];
        for (i, (loss, norm, rate)) in seen.iter().enumerate() {
            assert!((loss - steps["loss"][i].as_f64().unwrap()).abs() < 2e-4, "{name} step {i}: loss {loss}");
            let want = steps["gradient_norm"][i].as_f64().unwrap();
            assert!((norm - want).abs() < 2e-3 * want, "{name} step {i}: norm {norm} != {want}");
            assert!((rate - steps["learning_rate"][i].as_f64().unwrap()).abs() < 1e-8, "{name} step {i}: rate");
        }
        assert_eq!(seen.len(), 10);
        // A key bias moves all scores of a query alike: its true gradient is 0, and Adam makes steps of the noise.
        for def in g.spec.tensors().into_iter().filter(|d| !d.name.ends_with("key.bias")) {
            let want = g.tensor(&format!("final.{}", def.name));
            let got = fitted.checkpoint.values(def.tensor);
            // Adam divides by the root of the second moment: where a gradient is nearly 0, its rounding decides the
            // direction of a step of up to the learning rate.
            let far = got.iter().zip(&want).filter(|(a, b)| (*a - *b).abs() > 2e-5).count();
            assert!(
                far * 100 <= want.len() && worst(&got, &want) < 5e-3,
                "{name} {}: {far} of {}",
                def.name,
                want.len()
            );
        }
    }
}

#[test]
fn losses_and_their_gradients_are_pytorchs() {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture("losses.json")).unwrap()).unwrap();
    let rows = |v: &serde_json::Value| -> Vec<Vec<f32>> { serde_json::from_value(v.clone()).unwrap() };
    let mut checked = 0;
    for kind in ["cross_entropy", "distillation", "weighted"] {
        for case in json[kind].as_array().unwrap_or_else(|| panic!("{kind} cases")) {
            let input = &json["inputs"][case["input"].as_u64().unwrap() as usize];
            let logits = rows(&input["logits"]).concat();
            let teacher = rows(&input["teacher"]).concat();
            let labels: Vec<u32> = serde_json::from_value(input["labels"].clone()).unwrap();
            let number = |key: &str| case[key].as_f64().unwrap_or(0.0) as f32;
            let weights: Option<Vec<f32>> = serde_json::from_value(case["class_weights"].clone()).unwrap();
            let weights = weights.unwrap_or_default();
            let hard =
                Hard { label_smoothing: number("label_smoothing"), class_weights: &weights, ..Hard::default() };
            let soft = Soft {
                alpha: number("alpha"),
                temperature: number("temperature"),
                logits: &teacher,
                ..Soft::default()
            };
            let objective = match kind {
                "cross_entropy" => Objective::CrossEntropy(hard),
                _ => Objective::Distill(hard, soft),
            };
            let examples: Vec<usize> = (0..labels.len()).collect();
            let mut d = vec![0.0; logits.len()];
            let shares = Shares::of(&objective, labels.iter().copied(), 1);
            let got = losses(&logits, (&labels).into(), &examples, &[], &objective, shares, &mut d);
            let want = case["loss"].as_f64().unwrap();
            assert!((got.total - want).abs() < 1e-5 * want.abs().max(1.0), "{case}: {got:?}");
            if kind == "weighted" {
                for (part, key) in [(got.ce, "ce"), (got.kl, "kl_times_t2")] {
                    let want = case[key].as_f64().unwrap();
                    assert!((part - want).abs() < 1e-5 * want.abs().max(1.0), "{key} of {case}: {got:?}");
                }
            }
            let gradient = rows(&case["gradient"]).concat();
            let size = gradient.iter().fold(1f32, |m, v| m.max(v.abs()));
            assert!(worst(&d, &gradient) < 2e-6 * size, "{case}: {d:?}");
            checked += 1;
        }
    }
    assert!(checked > 20);
}

/// Several labels and numbers: units of two sentences, of one of which nothing is known.
#[test]
fn losses_of_other_tasks_are_pytorchs() {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("tasks/losses.json")).unwrap()).unwrap();
    let (logits, teacher) = (flat(&json["student"]), flat(&json["teacher"]));
    let width = logits.len() / 7;
    let unknown = json["unknown"].as_u64().unwrap() as usize;
    let starts: Vec<usize> = serde_json::from_value(json["starts"].clone()).unwrap();
    let units: Vec<usize> = (0..7).collect();
    for case in json["cases"].as_array().unwrap() {
        let (loss, truth) = match case["kind"].as_str().unwrap() {
            "binary" => (Loss::Binary, "binary"),
            "mse" => (Loss::Distance(Measure::Mse), "numbers"),
            _ => (Loss::Distance(Measure::L1), "numbers"),
        };
        let mut values = flat(&json[truth]);
        values[unknown * width..(unknown + 1) * width].fill(f32::NAN);
        let targets = Targets::Values { values: &values, outputs: width };
        let number = |key: &str| case[key].as_f64().unwrap();
        let soft = Soft {
            alpha: number("alpha") as f32,
            temperature: number("temperature") as f32,
            differences: number("beta") as f32,
            logits: &teacher,
            ..Soft::default()
        };
        let objective = Objective::Distill(Hard { loss, ..Hard::default() }, soft);
        let shares = Shares::of(&objective, units.iter().map(|u| targets.class(*u)), 1).with_pairs(5);
        let mut d = vec![0.0; logits.len()];
        let got = losses(&logits, targets, &units, &starts, &objective, shares, &mut d);
        for (got, key) in [(got.total, "loss"), (got.ce, "ce"), (got.kl, "kl")] {
            assert!((got - number(key)).abs() < 1e-5 * number(key).abs().max(1.0), "{key} of {case}: {got}");
        }
        if soft.differences > 0.0 && loss != Loss::Binary {
            assert!((got.differences - number("differences")).abs() < 1e-5, "{case}: {got:?}");
        }
        assert!(worst(&d, &flat(&case["gradient"])) < 2e-6, "{case}: {d:?}");
    }
}

/// The gradient through a head on tokens, with dropout, against finite differences.
#[test]
fn gradients_on_words_are_those_of_finite_differences() {
    let mut spec = Golden::load("student").checkpoint().spec;
    spec.head = quetsch::spec::HeadSpec::Tokens { labels: 2 };
    spec.prefix = "bert.".into();
    spec.unused_pooler = false;
    let names = vec!["a".to_string(), "b".to_string()];
    let ck = Checkpoint::random(spec, names, 7).unwrap();
    let g = Golden::load("student");
    let mut words = Units::words();
    g.encodings.iter().for_each(|e| words.push([0, e.ids.len() as u32 - 1].into_iter().take(e.ids.len())));
    let n = words.count(g.encodings.len());
    let values: Vec<f32> = (0..2 * n).map(|i| (i as f32 * 0.7).sin()).collect();
    let teacher: Vec<f32> = values.iter().map(|v| 0.5 * v + 0.2).collect();
    let set = TrainSet {
        encodings: &g.encodings,
        units: &words,
        targets: Targets::Values { values: &values, outputs: 2 },
    };
    let soft = Soft { alpha: 0.4, temperature: 1.0, differences: 0.7, logits: &teacher, ..Soft::default() };
    let objective = Objective::Distill(Hard { loss: Loss::Distance(Measure::Mse), ..Hard::default() }, soft);
    let dropout = Dropout { hidden: 0.1, attention: 0.1, head: 0.2 };
    let examples: Vec<usize> = (0..g.encodings.len()).collect();
    let run = |ck: &Checkpoint| {
        let params = Params::new(ck, &[]);
        let task = Task { params: &params, set, objective, dropout, seed: 3, masks: None, recompute: false };
        let mut team = Worker::team(&params, 2);
        let (loss, _) = gradients(&task, 0, &examples, 8, &mut team).unwrap();
        (loss.total, team, params.table)
    };
    let (_, team, table) = run(&ck);
    for (i, def) in table.iter().enumerate().skip(1) {
        let at = def.len() / 2;
        if def.is_empty() || def.name.ends_with("key.bias") {
            continue;
        }
        let got: f32 = team.iter().map(|w| w.grads.dense[i][at]).sum();
        let moved = |by: f32| {
            let mut other = ck.clone();
            let mut data = other.values(def.tensor).into_owned();
            data[at] += by;
            other.set(def.tensor, Stored::f32(data));
            run(&other).0
        };
        let h = 1e-2;
        let want = (moved(h) - moved(-h)) / (2.0 * f64::from(h));
        assert!((f64::from(got) - want).abs() < 2e-3 + 2e-2 * want.abs(), "{}: {got}, expected {want}", def.name);
    }
}

fn losses_json() -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(fixture("losses.json")).expect("the fixture is there"))
        .expect("the fixture is JSON")
}

fn flat(v: &serde_json::Value) -> Vec<f32> {
    serde_json::from_value::<Vec<Vec<f32>>>(v.clone()).expect("rows of numbers").concat()
}

#[test]
fn distances_of_rows_are_pytorchs() {
    let json = &losses_json()["measures"];
    let (student, teacher) = (flat(&json["student"]), flat(&json["teacher"]));
    for (measure, key) in [(Measure::Mse, "mse"), (Measure::L1, "l1"), (Measure::Cosine, "cosine")] {
        let (loss, d) = compare_rows(measure, &student, &teacher, 5, 1.0 / 3.0);
        assert!((loss / 3.0 - json[key]["loss"].as_f64().unwrap()).abs() < 1e-6, "{key}: {loss}");
        assert!(worst(&d, &flat(&json[key]["gradient"])) < 1e-6, "{key}: {d:?}");
    }
    let zero = compare_rows(Measure::Cosine, &[0.0; 5], &teacher[..5], 5, 1.0);
    assert_eq!(zero, (1.0, vec![0.0; 5]), "a row of zeros has no direction");
}

#[test]
fn attention_maps_and_relations_are_pytorchs() {
    let json = &losses_json()["relations"];
    let (student, teacher) = (flat(&json["student"]), flat(&json["teacher"]));
    let starts: Vec<usize> = serde_json::from_value(json["starts"].clone()).unwrap();
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let heads: Vec<(usize, usize)> = serde_json::from_value(case["heads"].clone()).unwrap();
        let dims: (usize, usize) = serde_json::from_value(case["dims"].clone()).unwrap();
        let of: (usize, usize) = serde_json::from_value(case["of"].clone()).unwrap();
        let s = Side { x: &student, inner: 6, dim: dims.0, of };
        let t = Side { x: &teacher, inner: 12, dim: dims.1, of };
        let (loss, d) = relation(&s, &t, &heads, &starts, 1.0 / 8.0);
        assert!((loss / 8.0 - case["loss"].as_f64().unwrap()).abs() < 1e-6, "{of:?}: {loss}");
        assert!(worst(&d, &flat(&case["gradient"])) < 1e-6, "{of:?}: {d:?}");
    }
}

/// Two models of PyTorch's, one the teacher of the other: the loss of hidden states is that of PyTorch's activations,
/// and what is tapped changes no logit.
#[test]
fn the_loss_of_hidden_states_is_pytorchs() {
    let (g, t) = (Golden::load("student"), Golden::load("pooler"));
    let (params, teacher) = (Params::new(&g.checkpoint(), &[]), Model::pack(&t.checkpoint()));
    let pairs = [(0, vec![0, 1]), (2, vec![2])];
    let links = [
        Link::of(Compare::Hidden(Measure::Mse), &pairs, 0.7),
        Link::of(Compare::Embeddings(Measure::Mse), &[(0, vec![0])], 0.2),
    ]
    .concat();
    let features = Some(Features { teacher: &teacher, encodings: &t.encodings, links: &links });
    let logits = t.tensor("logits");
    let soft =
        Soft { alpha: 0.3, temperature: 2.0, logits: &logits, logits_weight: 0.2, features, ..Soft::default() };
    let set = TrainSet::sentences(&g.encodings, &g.labels);
    let mse =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / a.len() as f64;
    let state = |g: &Golden, l: usize| g.tensor(&format!("a.hidden.{l}"));
    let mean: Vec<f32> = state(&t, 0).iter().zip(state(&t, 1)).map(|(a, b)| (a + b) / 2.0).collect();
    let hidden = (mse(&state(&g, 0), &mean) + mse(&state(&g, 2), &state(&t, 2))) / 2.0;
    let embeddings = mse(&g.tensor("a.embedded"), &t.tensor("a.embedded"));
    for threads in [1, 2] {
        let loss = |objective| {
            let task = Task {
                params: &params,
                set,
                objective,
                dropout: Dropout::default(),
                seed: 1,
                masks: None,
                recompute: false,
            };
            gradients(&task, 0, &[0, 1, 2], 3, &mut Worker::team(&params, threads)).unwrap().0
        };
        let objective = Objective::Distill(Hard::default(), soft);
        let (with, without) = (loss(objective), loss(objective.on_logits()));
        assert_eq!((with.ce, with.kl, with.logits), (without.ce, without.kl, without.logits));
        for (got, want) in [(with.hidden, hidden), (with.embeddings, embeddings)] {
            assert!((got - want).abs() < 1e-5 * want, "{got} != {want}");
        }
        assert!((with.total - without.total - 0.7 * hidden - 0.2 * embeddings).abs() < 1e-5);
        assert!((with.logits - mse(&g.tensor("logits"), &logits)).abs() < 1e-4);
    }
}
