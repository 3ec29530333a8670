//! Whole classifiers, text in, logits out, against what transformers and bitsandbytes wrote (scripts/make_fixtures.py).

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::dir;
use quetsch::head::{HeadKind, with_head};
use quetsch::metrics::top_k;
use quetsch::prune;
use quetsch::quant::calibrate::{self, Observer};
use quetsch::quant::{self, Compute, FourBit, Int8Input, Int8Rows};
use quetsch::runtime::Classifier;
use quetsch::spec::{Lin, Tensor};
use serde_json::Value;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The single texts (not the pairs) of a fixture, and their numbers.
fn texts(v: &Value) -> (Vec<String>, Vec<usize>) {
    let rows = v["inputs"].as_array().unwrap().iter().enumerate().filter(|(_, r)| r.get("pair").is_none());
    rows.map(|(i, r)| (r["text"].as_str().unwrap().to_string(), i)).unzip()
}

/// Single texts, their ids and logits.
fn cases(v: &Value) -> (Vec<String>, Vec<Vec<u32>>, Vec<f32>) {
    let (text, rows) = texts(v);
    let ids = rows.iter().map(|r| serde_json::from_value(v["inputs"][r]["ids"].clone()).unwrap()).collect();
    let logits = |r: &usize| serde_json::from_value::<Vec<f32>>(v["inputs"][r]["logits"].clone()).unwrap();
    (text, ids, rows.iter().flat_map(logits).collect())
}

#[test]
fn float_models_give_the_logits_of_transformers() {
    for (name, expected) in [
        ("tiny_student", "tiny_student_expected.json"),
        ("tiny_bert", "tiny_bert_expected.json"),
        ("five/float", "five/expected.json"),
    ] {
        let expected = json(expected);
        let (texts, ids, logits) = cases(&expected);
        let c = Classifier::load(&fixture(name), Some(16)).unwrap();
        let encodings = c.encode(&texts, 2).unwrap();
        assert_eq!(encodings.iter().map(|e| e.ids.clone()).collect::<Vec<_>>(), ids, "{name}");
        let together = c.logits(&texts, 2).unwrap();
        assert!(worst(&together, &logits) < 1e-4, "{name}: {}", worst(&together, &logits));
        let alone: Vec<f32> = texts.iter().flat_map(|t| c.logits(&[t], 1).unwrap()).collect();
        assert_eq!(together, alone, "{name}: an answer depends on its neighbours");
        let width = c.labels().len();
        for (a, b) in together.chunks(width).zip(logits.chunks(width)) {
            assert_eq!(top_k(a, 3), top_k(b, 3), "{name}");
        }
    }
}

const FAMILIES: [&str; 6] = ["distilbert", "roberta", "xlm_roberta", "electra", "camembert", "chinese_bert"];

/// One forward for all families and languages: texts and pairs of texts, each with its own kind of tokenizer.
#[test]
fn other_families_give_the_logits_of_transformers() {
    for name in FAMILIES {
        let expected = json(&format!("families/{name}_expected.json"));
        let c = Classifier::load(&fixture(&format!("families/{name}")), Some(16)).unwrap();
        let (mut encodings, mut want) = (vec![], vec![]);
        for row in expected["inputs"].as_array().unwrap() {
            let text = |key: &str| row[key].as_str();
            let e = match text("pair") {
                Some(pair) => c.tokenizer().encode_pair(text("text").unwrap(), pair, 16),
                None => c.tokenizer().encode(text("text").unwrap(), 16),
            };
            encodings.push(e.unwrap());
            let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            assert_eq!(encodings[encodings.len() - 1].ids, ids, "{name} {row}");
            want.extend(serde_json::from_value::<Vec<f32>>(row["logits"].clone()).unwrap());
        }
        let got = c.model().logits(&encodings, 2).unwrap();
        assert!(worst(&got, &want) < 1e-4, "{name}: {}", worst(&got, &want));
    }
}

/// Written and read again, pruned heads written back as zeros, and nearly so in 8 bits: the same answers.
#[test]
fn other_families_survive_every_stage() {
    let temporary = tempfile::tempdir().unwrap();
    for name in FAMILIES {
        let model = dir::read(fixture(&format!("families/{name}"))).unwrap();
        let texts = ["I lost my card", "why is the fee not zero?", ""];
        let logits = |model: &dir::ModelDir| {
            let out = temporary.path().join(name);
            dir::write(&out, model, true).unwrap();
            Classifier::load(&out, Some(16)).unwrap().logits(&texts, 1).unwrap()
        };
        let want = logits(&model);
        let with = |checkpoint| dir::ModelDir { checkpoint, tokenizer: model.tokenizer.clone() };
        let dense = with(prune::dense(&model.checkpoint).unwrap());
        assert_ne!(dense.checkpoint.spec.layers, model.checkpoint.spec.layers);
        assert!(worst(&logits(&dense), &want) < 1e-5, "{name}");
        let keep = quant::default_keep(&model.checkpoint.spec);
        for (site, scheme, tolerance) in [
            ("*", "f16", 0.05),
            ("*", "int8", 0.5),
            ("*", "int8-weight", 0.5),
            ("*", "bnb-int8", 0.5),
            ("*", "nf4", 6.0),
            ("embeddings.*", "int8", 0.5),
            ("embeddings.*", "nf4", 6.0),
        ] {
            let scheme = (site.to_owned(), scheme.parse().unwrap());
            let quantised = quant::quantise(&model.checkpoint, std::slice::from_ref(&scheme), &keep).unwrap();
            let far = worst(&logits(&with(quantised)), &want);
            assert!(far > 0.0 && far < tolerance, "{name} {site} {}: {far}", scheme.1);
        }
        // A new head of either kind, and from there on as BERT.
        for kind in [HeadKind::Mean, HeadKind::Pooler] {
            let names = vec!["a".to_owned(), "b".to_owned()];
            let new = with(with_head(&model.checkpoint, kind, names, 1).unwrap());
            assert_eq!(logits(&new).len(), 6, "{name} {kind:?}");
        }
    }
}

/// f32 arithmetic on the decoded weights: no rounding of ours or theirs in between.
fn in_f32(mut ck: Checkpoint) -> Checkpoint {
    let tensors: Vec<_> = ck.tensors().map(|(d, _)| d.tensor).collect();
    for t in tensors {
        if let Stored::FourBit(q) = ck.get(t) {
            let q = FourBit { compute: Compute::F32, ..q.clone() };
            ck.set(t, Stored::FourBit(q));
        }
    }
    ck
}

#[test]
fn quantised_models_give_the_logits_of_bitsandbytes() {
    // Weights are random, so rounding is not small beside them: f32 logits are 2.4 to 4.4 away, those of int8 0.23. Sums in
    // another order are 1e-7 apart; where that changes an integer of an input, logits are some 0.05 apart. There is one
    // in about 30,000, so half of the sentences have none.
    let expected = json("bnb/expected.json");
    let student = dir::read(fixture("tiny_student")).unwrap();
    for (name, float, tolerance) in [
        ("nf4", false, 2e-2),
        ("nf4", true, 1e-4),
        ("nf4_single", true, 1e-4),
        ("fp4", true, 1e-4),
        ("int8", false, 0.1),
    ] {
        let checkpoint = dir::read_checkpoint(fixture(&format!("bnb/{name}"))).unwrap();
        let checkpoint = if float { in_f32(checkpoint) } else { checkpoint };
        let model = dir::ModelDir { checkpoint, tokenizer: student.tokenizer.clone() };
        let c = Classifier::new(&model, Some(16)).unwrap();
        let (texts, rows) = texts(&expected);
        let key = if float { "logits_float" } else { "logits" };
        let want: Vec<Vec<f32>> = serde_json::from_value(expected[name][key].clone()).unwrap();
        let got: Vec<Vec<f32>> = texts.iter().map(|t| c.logits(&[t], 1).unwrap()).collect();
        let mut far: Vec<f32> = got.iter().zip(&rows).map(|(got, r)| worst(got, &want[*r])).collect();
        far.sort_by(f32::total_cmp);
        assert!(far[far.len() - 1] < tolerance, "{name} {key}: {far:?}");
        assert!(name != "int8" || far[far.len() / 2] < 1e-5, "{name} {key}: {far:?}");
        assert_eq!(got.concat(), c.logits(&texts, 2).unwrap(), "{name}: an answer depends on its neighbours");
    }
}

/// As transformers 5 writes and answers them, in every type of products.
#[test]
fn quantised_models_give_the_logits_of_transformers_5() {
    let expected = json("five/expected.json");
    let tokenizer = dir::read_tokenizer(fixture("five/float")).unwrap();
    let (texts, rows) = texts(&expected);
    for (name, tolerance) in [
        ("fp4", 1e-4),
        ("nf4", 2e-2),
        ("nf4_bf16", 2e-2),
        ("fp4_bf16", 2e-2),
        ("nf4_f16", 1e-3),
        ("fp4_f16", 1e-3),
        ("int8", 0.1),
    ] {
        let want: Vec<Vec<f32>> = serde_json::from_value(expected[name].clone()).unwrap();
        let far = |checkpoint| {
            let model = dir::ModelDir { checkpoint, tokenizer: tokenizer.clone() };
            let c = Classifier::new(&model, Some(16)).unwrap();
            let got = texts.iter().map(|t| c.logits(&[t], 1).unwrap());
            got.zip(&rows).map(|(got, r)| worst(&got, &want[*r])).fold(0.0, f32::max)
        };
        let checkpoint = dir::read_checkpoint(fixture(&format!("five/{name}"))).unwrap();
        let as_stored = far(checkpoint.clone());
        assert!(as_stored < tolerance, "{name}: {as_stored}");
        let in_float = far(in_f32(checkpoint));
        assert!(!name.ends_with("16") || in_float > 4.0 * as_stored, "{name}: {as_stored}, in f32 {in_float}");
    }
}

/// A linear and an embedding table of int8 rows that nothing multiplies in integers compute as their decoded values.
#[test]
fn weight_only_int8_is_its_decoded_values() {
    let student = dir::read(fixture("tiny_student")).unwrap();
    let (texts, ..) = cases(&json("tiny_student_expected.json"));
    let rules = ["*=int8-weight", "embeddings.*=int8"].map(|r| r.split_once('=').unwrap());
    let rules = rules.map(|(site, scheme)| (site.to_owned(), scheme.parse().unwrap()));
    let checkpoint = quant::quantise(&student.checkpoint, &rules, &[]).unwrap();
    let decoded = checkpoint.to_f32();
    let logits = |checkpoint| {
        let model = dir::ModelDir { checkpoint, tokenizer: student.tokenizer.clone() };
        Classifier::new(&model, Some(16)).unwrap().logits(&texts, 1).unwrap()
    };
    assert_eq!(logits(checkpoint), logits(decoded));
}

/// Static int8: near float, the file keeps every scale, and equalising before it changes not a bit in float.
#[test]
fn static_int8_is_near_float_and_equalising_is_exact() {
    let student = dir::read(fixture("tiny_student")).unwrap();
    let (texts, ..) = cases(&json("tiny_student_expected.json"));
    let with = |checkpoint| dir::ModelDir { checkpoint, tokenizer: student.tokenizer.clone() };
    let logits = |model: &dir::ModelDir| Classifier::new(model, Some(16)).unwrap().logits(&texts, 1).unwrap();
    let float = logits(&student);
    let sentences = Classifier::new(&student, Some(16)).unwrap().encode(&texts, 1).unwrap();
    let ck = &student.checkpoint;
    let seen = calibrate::observe(ck, &sentences).unwrap();
    let even = calibrate::equalise(ck, &seen).unwrap();
    let moved = |t| even.values(t) != ck.values(t);
    assert!(moved(Tensor::W(Lin::Value(0))) && moved(Tensor::B(Lin::Value(0))) && moved(Tensor::W(Lin::Out(0))));
    assert_eq!(logits(&with(even)), float);
    let rules = [("*".to_owned(), "int8-static".parse().unwrap())];
    for (observer, _) in Observer::ALL {
        let ranges = seen.iter().map(|(lin, s)| (*lin, s.absmax(observer))).collect();
        let static_ = with(quant::quantise_calibrated(ck, &rules, &[], &ranges).unwrap());
        let far = worst(&logits(&static_), &float);
        // Weights are random: one scale for all inputs is coarser than one per token, and clipping coarser still.
        assert!(far > 1e-4 && far < 3.0, "{observer}: {far}");
        let temporary = tempfile::tempdir().unwrap();
        let out = temporary.path().join("static");
        dir::write(&out, &static_, false).unwrap();
        let read = dir::read(&out).unwrap();
        assert!(read.checkpoint.tensors().zip(static_.checkpoint.tensors()).all(|(a, b)| a == b), "{observer}");
    }
}

/// The integer path is the dequantised one up to the rounding of the activations.
#[test]
fn dynamic_int8_is_near_float() {
    let student = dir::read(fixture("tiny_student")).unwrap();
    let (texts, _, logits) = cases(&json("tiny_student_expected.json"));
    let mut quantised = student.clone();
    for (site, n, k) in student.checkpoint.spec.linears() {
        assert_eq!(student.checkpoint.get(Tensor::W(site)).len(), n * k);
        let w = student.checkpoint.values(Tensor::W(site)).into_owned();
        let q = Int8Rows::encode(&w, k, Int8Input::Dynamic);
        quantised.checkpoint.set(Tensor::W(site), Stored::Int8(q));
    }
    let c = Classifier::new(&quantised, Some(16)).unwrap();
    let got = c.logits(&texts, 2).unwrap();
    let far = worst(&got, &logits);
    assert!(far > 1e-4 && far < 0.5, "{far}");
}
