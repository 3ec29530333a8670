//! Models of other tasks than one label a sentence, against what transformers, torch, scikit-learn and scipy wrote
//! (scripts/task_fixtures.py); their data and what is refused in them.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

use quetsch::data::{self, Dataset, ReadOptions};
use quetsch::dir;
use quetsch::metrics::{self, Figures};
use quetsch::quant;
use quetsch::runtime::Classifier;
use quetsch::task::{Level, Problem, Targets, Task, UNLABELLED};
use serde_json::Value;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tasks").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

type Words = Vec<Vec<Option<Vec<f32>>>>;

fn flat(words: &Words) -> Vec<f32> {
    words.iter().flatten().flatten().flatten().copied().collect()
}

#[test]
fn words_have_the_logits_of_transformers() {
    let temporary = tempfile::tempdir().unwrap();
    for name in ["token", "token_distilbert"] {
        let expected = json(&format!("{name}_expected.json"));
        let column =
            |key: &str| -> Vec<Value> { expected.as_array().unwrap().iter().map(|r| r[key].clone()).collect() };
        let sentences: Vec<Vec<String>> = serde_json::from_value(column("tokens").into()).unwrap();
        let want: Words = serde_json::from_value(column("logits").into()).unwrap();
        let ids: Vec<Vec<u32>> = serde_json::from_value(column("ids").into()).unwrap();
        let model = dir::read(fixture(name)).unwrap();
        assert_eq!(model.checkpoint.task(), Some(Task { problem: Problem::SingleLabel, level: Level::Token }));
        let check = |model: &dir::ModelDir, tolerance: f32| {
            let out = temporary.path().join(name);
            dir::write(&out, model, true).unwrap();
            let c = Classifier::load(&out, Some(16)).unwrap();
            let got = c.words(&sentences, 2).unwrap();
            for (got, want) in got.iter().zip(&want) {
                let has = |words: &[Option<Vec<f32>>]| words.iter().map(Option::is_some).collect::<Vec<_>>();
                assert_eq!(has(got), has(want), "{name}: which words have an answer");
            }
            let far = worst(&flat(&got), &flat(&want));
            assert!(far < tolerance, "{name}: {far}");
            let alone: Words =
                sentences.iter().flat_map(|s| c.words(std::slice::from_ref(s), 1).unwrap()).collect();
            assert_eq!(got, alone, "{name}: an answer depends on its neighbours");
        };
        check(&model, 1e-4);
        let c = Classifier::new(&model, Some(16)).unwrap();
        for (words, ids) in sentences.iter().zip(&ids) {
            assert_eq!(c.tokenizer().encode_words(words, 16).unwrap().0.ids, *ids, "{name} {words:?}");
        }
        let config = quetsch::config::render(&model.checkpoint).unwrap();
        let class = if name == "token" { "BertForTokenClassification" } else { "DistilBertForTokenClassification" };
        assert_eq!(config["architectures"][0], class);
        let keep = quant::default_keep(&model.checkpoint.spec);
        assert_eq!(keep, ["classifier"]);
        for (scheme, keep) in [("int8", &keep[..]), ("int8", &[]), ("bnb-int8", &[])] {
            let rule = ("*".to_string(), scheme.parse().unwrap());
            let checkpoint = quant::quantise(&model.checkpoint, &[rule], keep).unwrap();
            check(&dir::ModelDir { checkpoint, tokenizer: model.tokenizer.clone() }, 0.5);
        }
    }
}

#[test]
fn problems_of_sentences_have_the_logits_of_transformers() {
    let temporary = tempfile::tempdir().unwrap();
    for (name, problem) in
        [("multi_label_classification", Problem::MultiLabel), ("regression", Problem::Regression)]
    {
        let expected = json(&format!("{name}_expected.json"));
        let rows = expected.as_array().unwrap();
        let texts: Vec<String> = rows.iter().map(|r| r["text"].as_str().unwrap().to_string()).collect();
        let want = rows.iter().flat_map(|r| serde_json::from_value::<Vec<f32>>(r["logits"].clone()).unwrap());
        let model = dir::read(fixture(name)).unwrap();
        dir::write(temporary.path().join(name), &model, true).unwrap();
        let c = Classifier::load(&temporary.path().join(name), Some(16)).unwrap();
        assert_eq!(c.task(), Task { problem, level: Level::Sentence });
        assert!(worst(&c.logits(&texts, 2).unwrap(), &want.collect::<Vec<_>>()) < 1e-4, "{name}");
        assert!(c.words(&[vec!["a".into()]], 1).is_err());
        let config = quetsch::config::render(&model.checkpoint).unwrap();
        assert_eq!(config["problem_type"], name);
    }
}

#[test]
fn figures_are_those_of_scikit_learn() {
    let json = json("figures.json");
    let rows = |v: &Value| serde_json::from_value::<Vec<Vec<f32>>>(v.clone()).unwrap();
    let near = |got: f64, want: &Value, what: &str| {
        let want = want.as_f64().unwrap();
        assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{what}: {got}, expected {want}");
    };
    let names = |n: usize| (0..n).map(|i| format!("l{i}")).collect::<Vec<_>>();

    let many = &json["multi_label"];
    let (mut truth, mut logits) = (rows(&many["truth"]).concat(), rows(&many["logits"]).concat());
    // A unit of which nothing is known counts for nothing.
    truth.extend([f32::NAN; 4]);
    logits.extend([9.0; 4]);
    let targets = Targets::Values { values: &truth, outputs: 4 };
    let figures = metrics::measure(Problem::MultiLabel, &logits, targets, &names(4));
    let Figures::Labels(m) = &figures else { panic!("{figures:?}") };
    near(m.accuracy, &many["accuracy"], "accuracy");
    near(m.micro_f1.unwrap(), &many["micro_f1"], "micro F1");
    near(m.macro_f1, &many["macro_f1"], "macro F1");
    near(m.weighted_f1, &many["weighted_f1"], "weighted F1");
    near(m.loss, &many["loss"], "loss");
    assert_eq!((m.n, figures.main().0), (60, "micro_f1"));
    let same = metrics::agree(Problem::MultiLabel, &logits, &logits, targets, 4).unwrap();
    assert!(same.flips == 0 && same.mean_kl.abs() < 1e-12);
    let other: Vec<f32> = logits.iter().map(|x| -x).collect();
    let other = metrics::agree(Problem::MultiLabel, &logits, &other, targets, 4).unwrap();
    assert!(other.agreement == 0.0 && other.mean_kl > 0.1);

    let numbers = &json["regression"];
    let (truth, outputs) = (rows(&numbers["truth"]).concat(), rows(&numbers["outputs"]).concat());
    let targets = Targets::Values { values: &truth, outputs: 2 };
    let Figures::Numbers(r) = metrics::measure(Problem::Regression, &outputs, targets, &names(2)) else { panic!() };
    for (got, key) in [(r.mse, "mse"), (r.mae, "mae"), (r.r2, "r2"), (r.pearson, "pearson")] {
        near(got, &numbers[key], key);
    }
    let far = metrics::distance(&truth, &outputs, 2);
    near(far.mean, &numbers["mae"], "distance");
    near(far.pearson, &numbers["pearson"], "correlation");
}

fn read(name: &str, content: &str, options: &ReadOptions) -> Result<Dataset, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    data::read(&path, options).map_err(|e| e.to_string())
}

#[test]
fn labels_tell_the_task() {
    let own = ReadOptions::default();
    let task = |problem, level| Task { problem, level };
    let set = read("d.csv", "text,score\na,0.5\nb,-1\n", &own).unwrap();
    assert_eq!(
        (set.task, set.values, set.names),
        (task(Problem::Regression, Level::Sentence), vec![0.5, -1.0], vec!["score".to_string()])
    );
    let two = ReadOptions { label_col: Some("x,y".into()), ..ReadOptions::default() };
    let set = read("d.csv", "text,x,y\na,1,2\nb,3,4\n", &two).unwrap();
    assert_eq!((set.values, set.names), (vec![1.0, 2.0, 3.0, 4.0], vec!["x".to_string(), "y".to_string()]));
    let bar = ReadOptions { separator: Some("|".into()), ..ReadOptions::default() };
    let set = read("d.csv", "text,labels\na,fee|card\nb,\nc,card\n", &bar).unwrap();
    assert_eq!(set.names, ["fee", "card"]);
    assert_eq!(set.values, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
    assert_eq!(set.counts(), [1, 2]);
    let set = read("d.jsonl", "{\"text\":\"a\",\"labels\":[\"x\",\"y\"]}\n{\"text\":\"b\",\"labels\":[]}\n", &own)
        .unwrap();
    assert_eq!((set.task.problem, &set.values[..]), (Problem::MultiLabel, &[1.0, 1.0, 0.0, 0.0][..]));
    let words = "{\"tokens\":[\"a\",\"b\"],\"labels\":[\"O\",\"B\"]}\n{\"tokens\":[\"c\"],\"labels\":[-100]}\n";
    let set = read("d.jsonl", words, &own).unwrap();
    assert_eq!(set.task, task(Problem::SingleLabel, Level::Token));
    assert_eq!((&set.labels[..], set.texts.join(";").as_str()), (&[0, 1, UNLABELLED][..], "a b;c"));
    assert_eq!(set.subset([1]).labels, [UNLABELLED]);
    let numbers = "{\"tokens\":[\"a\",\"b\"],\"labels\":[0.5,1]}\n{\"tokens\":[\"c\"],\"labels\":[null]}\n";
    let set = read("d.jsonl", numbers, &own).unwrap();
    assert_eq!((set.task, set.values[..2].to_vec()), (task(Problem::Regression, Level::Token), vec![0.5, 1.0]));
    assert!(set.values[2].is_nan());
    let pairs = "{\"tokens\":[\"a\"],\"labels\":[[0.5,2.0]]}\n";
    assert_eq!(read("d.jsonl", pairs, &own).unwrap().names, ["LABEL_0", "LABEL_1"]);
    let several = "{\"tokens\":[\"a\",\"b\"],\"labels\":[[\"x\",\"y\"],[]]}\n";
    let set = read("d.jsonl", several, &own).unwrap();
    assert_eq!((set.task.problem, set.values), (Problem::MultiLabel, vec![1.0, 1.0, 0.0, 0.0]));
    // What looks like numbers may still be names.
    let forced = ReadOptions { problem: Some(Problem::SingleLabel), ..ReadOptions::default() };
    assert_eq!(read("d.csv", "text,label\na,1.0\nb,2.0\n", &forced).unwrap().names, ["1.0", "2.0"]);
}

#[test]
fn bad_labels_are_named_with_their_line() {
    let regression = ReadOptions { problem: Some(Problem::Regression), ..ReadOptions::default() };
    let two = ReadOptions { names: Some(vec!["x".into(), "y".into()]), ..regression.clone() };
    let multi = ReadOptions {
        problem: Some(Problem::MultiLabel),
        names: Some(vec!["fee".into(), "card".into()]),
        ..ReadOptions::default()
    };
    let own = ReadOptions::default();
    let single = ReadOptions { problem: Some(Problem::SingleLabel), ..ReadOptions::default() };
    let words = ReadOptions { level: Some(Level::Token), ..ReadOptions::default() };
    for (name, content, options, parts) in [
        ("d.csv", "text,label\na,0.5\nb,high\n", &regression, ["line 3", "`high`", "no finite number"]),
        ("d.csv", "text,label\na,0.5\nb,inf\n", &regression, ["line 3", "`inf`", "no finite number"]),
        ("d.csv", "text,label\na,0.5\n", &two, ["line 2", "1 numbers", "expected 2"]),
        ("d.csv", "text,label\na,fee|cart\n", &multi, ["line 2", "unknown label `cart`", "`card`"]),
        ("d.jsonl", "{\"tokens\":[\"a\",\"b\"],\"labels\":[\"O\"]}\n", &own, ["line 1", "2 tokens", "1 labels"]),
        (
            "d.jsonl",
            "{\"tokens\":\"a b\",\"labels\":[\"O\"]}\n",
            &own,
            ["line 1", "`tokens`", "expected a list of words"],
        ),
        ("d.jsonl", "{\"tokens\":[\"a\"],\"labels\":\"O\"}\n", &own, ["line 1", "`labels`", "a list of 1 labels"]),
        ("d.jsonl", "{\"tokens\":[\"a\"],\"labels\":[{}]}\n", &own, ["line 1", "an object", "`labels`"]),
        ("d.jsonl", "{\"text\":\"a\",\"labels\":[\"x\"]}\n", &single, ["line 1", "a list", "expected one label"]),
        ("d.csv", "text,label\na,x\n", &words, ["d.csv", "tokens", "`text`"]),
        (
            "d.csv",
            "text,label\na,\nb,\n",
            &ReadOptions { separator: Some("|".into()), ..own.clone() },
            ["d.csv", "no row has a label", "`|`"],
        ),
    ] {
        let message = read(name, content, options).unwrap_err();
        parts.iter().for_each(|part| assert!(message.contains(part), "{content}: {message}"));
    }
}
