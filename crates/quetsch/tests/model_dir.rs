//! Model directories: what is written reads back, what transformers wrote reads, what is broken is one clear error.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

use proptest::prelude::*;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::config;
use quetsch::dir::{self, ModelDir};
use quetsch::quant::{Scheme, quantise, quantise_calibrated};
use quetsch::runtime::Model;
use quetsch::spec::{Activation, Family, HeadSpec, LayerShape, ModelSpec, RobertaLike, Tensor};
use quetsch::tokenizer::TokenizerFiles;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn write(path: &Path, checkpoint: &Checkpoint) {
    let tokenizer = TokenizerFiles::default();
    dir::write(path, &ModelDir { checkpoint: checkpoint.clone(), tokenizer }, true).unwrap();
}

fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(a.spec, b.spec);
    assert_eq!(a.labels, b.labels);
    assert_eq!(a.max_length, b.max_length);
    for ((def, x), (_, y)) in a.tensors().zip(b.tensors()) {
        assert_eq!(x, y, "{}", def.name);
    }
}

#[test]
fn reads_what_transformers_wrote() {
    let student = dir::read(fixture("tiny_student")).unwrap();
    let (spec, ck) = (&student.checkpoint.spec, &student.checkpoint);
    assert_eq!(spec.prefix, "backbone.");
    assert_eq!(
        spec.layers.iter().map(|l| &l.heads[..]).collect::<Vec<_>>(),
        [&[0, 2][..], &[0, 1, 2, 3], &[1, 2, 3]]
    );
    assert_eq!((spec.head, spec.unused_pooler), (HeadSpec::MeanMlp { labels: 5 }, true));
    assert_eq!((ck.labels[2].as_str(), ck.max_length), ("change_pin", Some(16)));
    assert_eq!(student.tokenizer.files.len(), 4);
    // Sharded, f16, no names for the labels.
    let bert = dir::read_checkpoint(fixture("tiny_bert")).unwrap();
    assert_eq!(bert.spec.layers[1].heads, [0, 1, 3]);
    assert_eq!((bert.spec.head, bert.spec.unused_pooler), (HeadSpec::Pooler { labels: 2 }, false));
    assert_eq!(bert.labels, ["LABEL_0", "LABEL_1"]);
    assert!(student.checkpoint.warnings.is_empty() && bert.warnings.is_empty());
}

#[test]
fn unknown_keys_and_tokenizer_files_survive() {
    let mut model = dir::read(fixture("tiny_student")).unwrap();
    model.checkpoint.config.insert("attn_implementation".into(), json!("eager"));
    model.checkpoint.config.insert("torch_dtype".into(), json!("float64"));
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("out");
    dir::write(&out, &model, false).unwrap();
    assert!(dir::write(&out, &model, false).unwrap_err().to_string().contains("--force"));
    let again = dir::read(&out).unwrap();
    assert_eq!(again.tokenizer, model.tokenizer);
    assert_same(&again.checkpoint, &model.checkpoint);
    let config = &again.checkpoint.config;
    assert_eq!(config["attn_implementation"], "eager");
    assert_eq!(config["student_pruned_heads"], json!({"0": [1, 3], "2": [0]}));
    assert_eq!(config["dtype"], "float32");
    assert!(!config.contains_key("torch_dtype"));
    let weights = |p: &Path| fs::read(p.join("model.safetensors")).unwrap();
    assert!(weights(&out) == weights(&fixture("tiny_student")), "the same tensors are the same file");
}

fn small(head: HeadSpec, prefix: &str, unused_pooler: bool) -> ModelSpec {
    let layers = vec![
        LayerShape { heads: vec![0, 2], ffn: 6 },
        LayerShape { heads: vec![], ffn: 9 },
        LayerShape { heads: vec![0, 1, 2, 3], ffn: 0 },
    ];
    ModelSpec {
        family: Family::Bert,
        prefix: prefix.into(),
        vocab: 11,
        positions: 7,
        token_types: 2,
        hidden: 8,
        head_dim: 2,
        original_heads: 4,
        layers,
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head,
        unused_pooler,
    }
}

#[test]
fn every_scheme_reads_back_as_written() {
    let temporary = tempfile::tempdir().unwrap();
    let labels = || vec!["a".to_owned(), "b".to_owned(), "c ü".to_owned()];
    let heads = [
        (HeadSpec::MeanMlp { labels: 3 }, "backbone.", true, labels()),
        (HeadSpec::Pooler { labels: 3 }, "bert.", false, labels()),
        (HeadSpec::Pooler { labels: 3 }, "distilbert.", false, labels()),
        (HeadSpec::Pooler { labels: 3 }, "roberta.", true, labels()),
        (HeadSpec::Pooler { labels: 3 }, "electra.", false, labels()),
        (HeadSpec::Tokens { labels: 3 }, "bert.", false, labels()),
        (HeadSpec::Tokens { labels: 3 }, "distilbert.", false, labels()),
        (HeadSpec::None, "", true, vec![]),
        (HeadSpec::None, "bert.", false, vec![]),
    ];
    for (i, (head, prefix, unused, labels)) in heads.into_iter().enumerate() {
        let mut spec = small(head, prefix, unused);
        (spec.family, spec.token_types) = match prefix {
            "distilbert." => (Family::DistilBert, 0),
            "roberta." => (Family::Roberta { of: RobertaLike::Camembert, pad: 5 }, 1),
            "electra." => (Family::Electra { embedding: 3 }, 2),
            _ => (Family::Bert, 2),
        };
        let mut ck = Checkpoint::random(spec, labels, 7).unwrap();
        ck.max_length = Some(5);
        for scheme in ["f32", "f16", "bf16", "int8", "bnb-int8", "nf4", "fp4"] {
            let q = quantise(&ck, &[("*".into(), scheme.parse().unwrap())], &[]).unwrap();
            let out = temporary.path().join(format!("{i}-{scheme}"));
            write(&out, &q);
            assert_same(&q, &dir::read_checkpoint(&out).unwrap());
        }
        // Several schemes in one model.
        let rules = [("*", "bf16"), ("layer.0.*", "int8"), ("layer.0.ffn_*", "nf4"), ("layer.2.query", "bnb-int8")];
        let rules: Vec<_> = rules.iter().map(|(p, s)| (p.to_string(), s.parse().unwrap())).collect();
        let q = quantise(&ck, &rules, &[]).unwrap();
        let out = temporary.path().join(format!("{i}-mixed"));
        write(&out, &q);
        assert_same(&q, &dir::read_checkpoint(&out).unwrap());
    }
}

prop_compose! {
    fn any_layer(original: u16)(heads in proptest::collection::btree_set(0..original, 0..=original as usize), ffn in 0usize..20)
        -> LayerShape { LayerShape { heads: heads.into_iter().collect(), ffn } }
}

prop_compose! {
    fn any_spec()(original_heads in 1u16..6)(
        layers in proptest::collection::vec(any_layer(original_heads), 0..4),
        (vocab, positions, token_types) in (1usize..40, 1usize..20, 1usize..4),
        (hidden, head_dim) in (1usize..20, 1usize..9),
        original_heads in Just(original_heads),
        relu in any::<bool>(),
        norm_eps in prop::sample::select(vec![1e-12f32, 1e-5, 1e-7, 0.1]),
        (kind, labels, pooler) in (0..4, 1usize..9, any::<bool>()),
        (family, pad, embedding) in (0..6, 0u32..9, 1usize..20),
    ) -> ModelSpec {
        let like = |of| Family::Roberta { of, pad };
        let family = match family {
            0 => Family::DistilBert,
            1 => like(RobertaLike::Roberta),
            2 => like(RobertaLike::XlmRoberta),
            3 => like(RobertaLike::Camembert),
            4 => Family::Electra { embedding },
            _ => Family::Bert,
        };
        let own = family.facts().prefix;
        let (prefix, head) = match kind {
            0 => ("", HeadSpec::None),
            1 => (own, HeadSpec::None),
            2 => ("backbone.", HeadSpec::MeanMlp { labels }),
            _ => (own, HeadSpec::Pooler { labels }),
        };
        let is_distilbert = family == Family::DistilBert;
        let token_types = if is_distilbert { 0 } else { token_types };
        let norm_eps = if is_distilbert { 1e-12 } else { norm_eps };
        let positions = positions + family.unused_positions();
        ModelSpec {
            family,
            prefix: prefix.into(), vocab, positions, token_types, hidden, head_dim, original_heads, layers,
            ffn_activation: if relu { Activation::Relu } else { Activation::Gelu },
            norm_eps, head, unused_pooler: pooler && !(kind == 3 && family == Family::Bert),
        }
    }
}

proptest! {
    #[test]
    fn spec_to_config_to_spec(spec in any_spec(), max_length in proptest::option::of(1usize..99)) {
        let labels: Vec<String> = (0..spec.head.labels()).map(|i| format!("label \"{i}\"")).collect();
        let mut ck = Checkpoint::random(spec, labels, 1).unwrap();
        ck.max_length = max_length;
        let rendered = config::render(&ck).unwrap();
        // Through text, as a file would go.
        let map: Map<String, Value> = serde_json::from_str(&serde_json::to_string(&rendered).unwrap()).unwrap();
        let shapes = ck.spec.tensors().into_iter().map(|d| (d.name, d.shape)).collect();
        let read = config::parse(&map, &shapes, Path::new("config.json")).unwrap();
        prop_assert_eq!(&read.spec, &ck.spec);
        prop_assert_eq!(&read.labels, &ck.labels);
        prop_assert_eq!(read.max_length, max_length);
        prop_assert!(read.warnings.is_empty(), "{:?}", read.warnings);
        // Rendering what was read changes nothing.
        ck.config = map.clone();
        prop_assert_eq!(config::render(&ck).unwrap(), map);
    }
}

/// tiny_student with an edited config.
fn with_config(edit: impl FnOnce(&mut Map<String, Value>)) -> quetsch::Result<Checkpoint> {
    let temporary = tempfile::tempdir().unwrap();
    let source = fixture("tiny_student");
    let mut map = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    edit(&mut map);
    fs::write(temporary.path().join("config.json"), serde_json::to_vec(&map).unwrap()).unwrap();
    fs::copy(source.join("model.safetensors"), temporary.path().join("model.safetensors")).unwrap();
    dir::read_checkpoint(temporary.path())
}

#[test]
fn configs_that_are_refused() {
    let table: [(&str, Value, &str); 32] = [
        ("model_type", json!("mpnet"), "supported are: bert, distilbert, roberta"),
        ("model_type", json!("modernbert"), "electra"),
        ("position_embedding_type", json!("relative_key"), "supported is: absolute"),
        ("hidden_act", json!("gelu_new"), "supported are: gelu, relu"),
        ("is_decoder", json!(true), "only encoders"),
        ("problem_type", json!("ranking"), "single_label_classification"),
        ("hidden_size", json!(33), "not a multiple"),
        ("hidden_size", json!(-1), "a whole number"),
        ("num_attention_heads", json!(0), "not a multiple"),
        ("num_attention_heads", json!(70000), "not a multiple"),
        ("num_hidden_layers", json!(1e9), "a whole number"),
        ("num_hidden_layers", json!(1000000000), "at most 1024"),
        ("vocab_size", json!(0), "vocab_size is 0"),
        ("layer_norm_eps", json!(0), "layer_norm_eps"),
        ("architectures", json!("StudentHFModel"), "a list of names"),
        ("id2label", json!({"0": "a", "2": "b"}), "none for class 1"),
        ("id2label", json!({"0": "a", "x": "b"}), "not a class index"),
        ("id2label", json!({"0": "a", "00": "b"}), "twice"),
        ("id2label", json!({"0": 5}), "expected a name"),
        ("id2label", json!(["a", "b"]), "id2label is"),
        ("student_pruned_heads", json!({"3": [0]}), "no layer"),
        ("student_pruned_heads", json!({"0": [4]}), "expected 0 to 3"),
        ("student_pruned_heads", json!({"0": [-1]}), "expected 0 to 3"),
        ("student_pruned_heads", json!([0]), "student_pruned_heads is"),
        ("pruned_heads", json!({"0": [1]}), "remove different heads"),
        ("quantization_config", json!("int8"), "quantization_config is \"int8\""),
        ("quantization_config", json!({"bnb_4bit_compute_dtype": "float8_e4m3fn"}), "float32, float16 or bfloat16"),
        ("quantization_config", json!({"bnb_4bit_compute_dtype": 16}), "bnb_4bit_compute_dtype is 16"),
        ("quantization_config", json!({"llm_int8_threshold": -1}), "expected a number >= 0"),
        ("quetsch", json!({"version": 99}), "newer Quetsch"),
        ("quetsch", json!({"version": 1, "layers": [{"heads": [0], "ffn": 48}]}), "lists 1 layers"),
        ("quetsch", json!({"version": 1, "sites": {"head.1": "int3"}}), "site head.1"),
    ];
    for (key, value, message) in table {
        let e = with_config(|c| drop(c.insert(key.into(), value.clone()))).unwrap_err().to_string();
        assert!(e.contains(message) && e.contains("config.json"), "{key} = {value}: {e}");
    }
    let stale = json!({"version": 1, "layers": vec![json!({"heads": [0], "ffn": 48}); 3]});
    let e = with_config(|c| drop(c.insert("quetsch".into(), stale))).unwrap_err().to_string();
    assert!(e.contains("layer 0: key `quetsch` keeps heads [0]"), "{e}");
    // Refused before 1,024 lists of 65,535 heads are made.
    let crowded = with_config(|c| {
        c.insert("quetsch".into(), json!({"version": 1, "head_dim": 1}));
        c.insert("num_attention_heads".into(), json!(65535));
        c.insert("num_hidden_layers".into(), json!(1024));
    });
    let e = crowded.unwrap_err().to_string();
    assert!(e.contains("num_attention_heads is 65535, expected at most 4096"), "{e}");
}

#[test]
fn configs_that_are_odd_but_fine() {
    let same = |c: &Checkpoint| assert_eq!(c.spec, dir::read_checkpoint(fixture("tiny_student")).unwrap().spec);
    // Silent where the tensors speak.
    let quiet = with_config(|c| {
        for key in ["architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "id2label"] {
            c.shift_remove(key);
        }
        for key in
            ["intermediate_size", "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps"]
        {
            c.shift_remove(key);
        }
    });
    let quiet = quiet.unwrap();
    same(&quiet);
    assert_eq!(quiet.labels[4], "LABEL_4");
    let own_class = with_config(|c| drop(c.insert("architectures".into(), json!(["MyStudent"])))).unwrap();
    same(&own_class);
    for (key, value, warning) in [
        ("label2id", json!({"lost_card": 3}), "label2id disagrees"),
        ("num_labels", json!(7), "num_labels and id2label disagree"),
        ("id2label", json!({"0": "a", "1": "a", "2": "c", "3": "d", "4": "e"}), "twice"),
    ] {
        let c = with_config(|c| drop(c.insert(key.into(), value))).unwrap();
        assert!(c.warnings.iter().any(|w| w.contains(warning)), "{key}: {:?}", c.warnings);
    }
    let nulls = with_config(|c| {
        c.insert("problem_type".into(), Value::Null);
        c.insert("pruned_heads".into(), json!({}));
    });
    same(&nulls.unwrap());
}

fn parts(path: &Path) -> (Map<String, Value>, Vec<u8>) {
    let file = fs::read(path.join("model.safetensors")).unwrap();
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + n]).unwrap(), file[8 + n..].to_vec())
}

fn join(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// tiny_student's config beside other weights.
fn with_weights(bytes: &[u8]) -> quetsch::Result<Checkpoint> {
    let temporary = tempfile::tempdir().unwrap();
    fs::copy(fixture("tiny_student/config.json"), temporary.path().join("config.json")).unwrap();
    fs::write(temporary.path().join("model.safetensors"), bytes).unwrap();
    dir::read_checkpoint(temporary.path())
}

#[test]
fn one_error_lists_every_wrong_tensor() {
    let (mut header, data) = parts(&fixture("tiny_student"));
    let rename = |h: &mut Map<String, Value>, from: &str, to: &str| {
        let v = h.shift_remove(from).unwrap();
        h.insert(to.into(), v);
    };
    rename(&mut header, "head.4.bias", "head.5.bias");
    rename(&mut header, "head.1.bias", "cls.predictions.bias");
    rename(
        &mut header,
        "backbone.encoder.layer.0.output.LayerNorm.bias",
        "backbone.encoder.layer.0.output.LayerNorm.beta",
    );
    header["head.4.weight"]["shape"] = json!([32, 5]);
    header["backbone.pooler.dense.weight"]["dtype"] = json!("I32");
    let e = with_weights(&join(&Value::from(header.clone()).to_string(), &data)).unwrap_err().to_string();
    for line in [
        "5 tensors do not agree",
        "missing head.4.bias [5]",
        "missing head.1.bias [32]",
        "extra head.5.bias [5]",
        "head.4.weight: expected shape [5, 32], found [32, 5]",
        "backbone.pooler.dense.weight: type I32",
    ] {
        assert!(e.contains(line), "{line}: {e}");
    }
    assert!(!e.contains("cls.") && !e.contains("LayerNorm"), "{e}");
}

#[test]
fn a_number_that_is_none_is_named() {
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let mut ck = dir::read_checkpoint(fixture("tiny_student")).unwrap();
        let mut word = ck.values(Tensor::Word).into_owned();
        word[37] = value;
        ck.set(Tensor::Word, Stored::f32(word));
        let temporary = tempfile::tempdir().unwrap();
        let out = temporary.path().join("out");
        write(&out, &ck);
        let e = dir::read_checkpoint(&out).unwrap_err().to_string();
        assert!(e.contains("word_embeddings.weight: element 37") && e.contains(shown), "{e}");
    }
}

/// What torch 2.15 saved of `tiny_bert`'s state dict, in f32: the same values.
#[test]
fn old_pytorch_files_are_read_as_safetensors_are() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    fs::copy(fixture("tiny_bert/config.json"), here.join("config.json")).unwrap();
    fs::copy(fixture("tiny_bert_pytorch_model.bin"), here.join("pytorch_model.bin")).unwrap();
    let (old, new) = (dir::read_checkpoint(here).unwrap(), dir::read_checkpoint(fixture("tiny_bert")).unwrap());
    assert_eq!(old.spec, new.spec);
    for def in new.spec.tensors() {
        assert!(old.values(def.tensor) == new.values(def.tensor), "{}", def.name);
    }
}

/// Entries of quantised tensors that do not fit together: each is an error that names file, entry, what was expected and
/// what was found; none a panic.
#[test]
fn hostile_quantised_entries_are_named() {
    /// What becomes of an entry.
    enum Edit {
        /// Of its text (a quant_state), the first such part.
        Text(&'static str, &'static str),
        /// Its content, as the same type.
        Bytes(Vec<u8>),
        /// Its first element.
        First(f32),
        /// Its type, of as many bytes an element.
        Type(Dtype),
        Gone,
    }
    use Edit::{Bytes, First, Gone, Text, Type};
    const WEIGHT: &str = "backbone.encoder.layer.0.intermediate.dense.weight";
    const SCB: &str = "backbone.encoder.layer.0.intermediate.dense.SCB";
    const OFFSET: &str = "\"nested_offset\": 0.7853837013244629";
    const RANGE: &str = "backbone.encoder.layer.0.intermediate.dense.input_absmax";
    let beside = |what: &str| format!("{WEIGHT}.{what}");
    let state = || beside("quant_state.bitsandbytes__nf4");
    let floats = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    // Model, entry, edit, what the error says.
    let table: [(&str, String, Edit, &str); 40] = [
        ("nf4", state(), Text("{", "["), "expected"),
        ("nf4", state(), Bytes(vec![]), "EOF"),
        ("nf4", state(), Bytes(vec![0xff, b'{']), "expected value"),
        ("nf4", state(), Gone, "missing"),
        ("nf4", state(), Text("\"blocksize\": 64", "\"blocksize\": 0"), "blocksize is 0, expected 1 to 65536"),
        ("nf4", state(), Text("\"blocksize\": 64", "\"blocksize\": 32"), "absmax: expected shape [48], found [24]"),
        (
            "nf4",
            state(),
            Text("\"blocksize\": 64", "\"blocksize\": 65537"),
            "blocksize is 65537, expected 1 to 65536",
        ),
        ("nf4", state(), Text("\"blocksize\": 64", "\"blocksize\": -1"), "invalid value: integer `-1`"),
        ("nf4", state(), Text("\"blocksize\": 64", "\"blocksize\": 1e99"), "expected usize"),
        ("nf4", state(), Text("\"blocksize\": 64, ", ""), "missing field `blocksize`"),
        ("nf4", state(), Text("\"shape\": [48", "\"shape\": [47"), "expected shape [48, 32], found [47, 32]"),
        (
            "nf4",
            state(),
            Text("\"shape\": [48", "\"shape\": [18446744073709551615"),
            "expected shape [48, 32], found [18446744073709551615, 32]",
        ),
        ("nf4", state(), Text("float32\", \"shape", "float8\", \"shape"), "dtype is \"float8\", expected"),
        (
            "nf4",
            state(),
            Text("\"quant_type\": \"nf4\"", "\"quant_type\": \"int4\""),
            "quant_type is \"int4\", expected",
        ),
        (
            "nf4",
            state(),
            Text("\"nested_blocksize\": 256", "\"nested_blocksize\": 0"),
            "nested_blocksize is 0, expected",
        ),
        ("nf4", state(), Text("\"nested_dtype\": \"float32\"", "\"nested_dtype\": \"int8\""), "nested_dtype is"),
        ("nf4", state(), Text(OFFSET, "\"nested_offset\": 1e999"), "number out of range"),
        ("nf4", state(), Text(OFFSET, "\"nested_offset\": 1e39"), "nested_offset is"),
        ("nf4", state(), Text(OFFSET, "\"nested_offset\": null"), "nested_offset is None"),
        ("nf4", beside("absmax"), Bytes(vec![5]), "absmax: expected shape [24], found [1]"),
        ("nf4", beside("absmax"), Type(Dtype::I8), "absmax: type I8 with nested_blocksize Some(256), expected"),
        ("nf4", beside("absmax"), Gone, "absmax"),
        ("nf4", beside("nested_absmax"), First(f32::NAN), "nested_absmax: element 0 is NaN"),
        ("nf4", beside("nested_absmax"), Bytes(floats(&[1.0; 2])), "nested_absmax: expected shape [1], found [2]"),
        ("nf4", beside("quant_map"), First(f32::INFINITY), "quant_map: element 0 is inf"),
        ("nf4", beside("quant_map"), Bytes(floats(&[0.5; 15])), "quant_map: expected shape [16], found [15]"),
        ("nf4", WEIGHT.into(), Bytes(vec![0; 3]), "3 packed bytes, expected 768"),
        ("nf4", WEIGHT.into(), Type(Dtype::BOOL), "type BOOL, expected F32, F16, BF16, I8 or U8"),
        ("nf4_single", beside("absmax"), First(f32::NAN), "absmax: element 0 is NaN"),
        ("nf4_single", beside("absmax"), First(-1.0), "absmax: element 0 is -1, expected 0 or more"),
        ("nf4", beside("nested_absmax"), First(-1.0), "nested_absmax: element 0 is -1, expected 0 or more"),
        (
            "nf4_single",
            beside("absmax"),
            Type(Dtype::I32),
            "absmax: type I32 with nested_blocksize None, expected F32",
        ),
        ("int8", SCB.into(), First(f32::NAN), "SCB: element 0 is NaN"),
        ("int8", SCB.into(), First(f32::INFINITY), "SCB: element 0 is inf"),
        ("int8", SCB.into(), First(-1.0), "SCB: element 0 is -1, expected 0 or more"),
        ("int8", SCB.into(), Bytes(floats(&[1.0])), "SCB: expected shape [48], found [1]"),
        ("int8", SCB.into(), Type(Dtype::I32), "SCB: type I32, expected F32"),
        ("static", RANGE.into(), First(f32::NAN), "input_absmax: element 0 is NaN"),
        ("static", RANGE.into(), First(-2.0), "input_absmax: element 0 is -2, expected 0 or more"),
        ("static", RANGE.into(), Gone, "missing backbone.encoder.layer.0.intermediate.dense.input_absmax [1]"),
    ];
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    let calibrated = here.join("static");
    let ck = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let ranges = ck.spec.linears().into_iter().map(|(lin, ..)| (lin, 3.0)).collect();
    write(&calibrated, &quantise_calibrated(&ck, &[("*".into(), Scheme::Int8Static)], &[], &ranges).unwrap());
    for (model, name, edit, expected) in table {
        let folder = if model == "static" { calibrated.clone() } else { fixture("bnb").join(model) };
        fs::copy(folder.join("config.json"), here.join("config.json")).unwrap();
        let file = fs::read(folder.join("model.safetensors")).unwrap();
        let read = SafeTensors::deserialize(&file).unwrap();
        let mut tensors: Vec<_> =
            read.iter().map(|(n, t)| (n.to_owned(), t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
        let place =
            tensors.iter().position(|(n, ..)| *n == name).unwrap_or_else(|| panic!("{model} has no {name}"));
        let (_, dtype, _, data) = &mut tensors[place];
        match edit {
            Text(from, to) => {
                let text = String::from_utf8(data.clone()).unwrap();
                assert!(text.contains(from), "{text} has no {from}");
                *data = text.replacen(from, to, 1).into_bytes();
            }
            Bytes(bytes) => *data = bytes,
            First(x) => data[..4].copy_from_slice(&x.to_le_bytes()),
            Type(other) => *dtype = other,
            Gone => drop(tensors.remove(place)),
        }
        if let Some((_, dtype, shape, data)) = tensors.get_mut(place).filter(|(n, ..)| *n == name) {
            let elements = data.len() / (dtype.bitsize() / 8);
            if shape.iter().product::<usize>() != elements {
                *shape = if shape.len() > 1 { vec![elements, 1] } else { vec![elements] };
            }
        }
        let views = tensors
            .iter()
            .map(|(n, dtype, shape, data)| (n.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        fs::write(here.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        let error = dir::read_checkpoint(here).unwrap_err().to_string();
        for part in [expected, "layer.0.intermediate.dense", &here.display().to_string()] {
            assert!(error.contains(part), "{model} {name}: {error}\nexpected {part}");
        }
        let loaded = dir::Source::open(here).and_then(Model::load).err().unwrap().to_string();
        assert_eq!(loaded, error, "loaded tensor by tensor");
    }
}

#[test]
fn missing_files_are_named() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    let fails = |path: &Path| dir::read_checkpoint(path).unwrap_err().to_string();
    assert!(fails(&here.join("nowhere")).contains("no such folder"));
    assert!(fails(here).contains("config.json"));
    fs::copy(fixture("tiny_bert/config.json"), here.join("config.json")).unwrap();
    assert!(fails(&here.join("config.json")).contains("not a folder"));
    let e = fails(here);
    assert!(e.contains("model.safetensors") && e.contains("model.safetensors.index.json"), "{e}");
    // Whatever is wrong with it, the way to a file that can be read is told.
    let mut damaged = fs::read(fixture("tiny_bert_pytorch_model.bin")).unwrap();
    damaged.truncate(damaged.len() / 2);
    for bytes in [vec![], damaged] {
        fs::write(here.join("pytorch_model.bin"), bytes).unwrap();
        assert!(fails(here).contains("save_pretrained"));
    }
    for (index, message) in [
        ("{", "not a shard index"),
        (r#"{"weight_map": {}}"#, "empty"),
        (r#"{"weight_map": {"a": "../x"}}"#, "plain file name"),
        (r#"{"weight_map": {"a": "gone.safetensors"}}"#, "gone.safetensors"),
    ] {
        fs::write(here.join("model.safetensors.index.json"), index).unwrap();
        let e = fails(here);
        assert!(e.contains(message), "{e}");
    }
    for f in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        fs::copy(fixture("tiny_bert").join(f), here.join(f)).unwrap();
    }
    let index = fs::read_to_string(fixture("tiny_bert/model.safetensors.index.json")).unwrap();
    let index = index.replacen("\"bert.", "\"bart.", 1);
    fs::write(here.join("model.safetensors.index.json"), index).unwrap();
    assert!(fails(here).contains("not there: bart."));
    fs::write(here.join("config.json"), b"[1, 2]").unwrap();
    assert!(fails(here).contains("not a JSON object"));
}

/// What stands under the name of the weights and is something else; a pipe that nobody writes to would be read for ever.
#[test]
fn what_are_no_weights_is_said() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    fs::copy(fixture("tiny_student/config.json"), here.join("config.json")).unwrap();
    let weights = here.join("model.safetensors");
    let fails = || dir::read_checkpoint(here).unwrap_err().to_string();
    fs::create_dir(&weights).unwrap();
    assert!(fails().contains("model.safetensors: is a folder, expected a file"), "{}", fails());
    fs::remove_dir(&weights).unwrap();
    #[cfg(unix)]
    {
        let socket = std::os::unix::net::UnixListener::bind(&weights).unwrap();
        assert!(fails().contains("is no regular file"), "{}", fails());
        drop(socket);
        fs::remove_file(&weights).unwrap();
    }
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 133466304\n";
    fs::write(&weights, pointer).unwrap();
    assert!(fails().contains("Git LFS pointer") && fails().contains("git lfs pull"), "{}", fails());
}

/// int8 linears beside 4-bit ones are stored in a shape that no float linear has, and read back as they were.
#[test]
fn mixed_files_stop_loaders_that_expect_floats() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    let ck = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let rules: [(&str, Scheme); 2] = [("*", Scheme::Int8), ("layer.0.*", "nf4".parse().unwrap())];
    let rules = rules.map(|(p, s)| (p.to_owned(), s));
    let mixed = quantise(&ck, &rules, &["head.4".into()]).unwrap();
    write(here, &mixed);
    let file = fs::read(here.join("model.safetensors")).unwrap();
    let name = "backbone.encoder.layer.1.attention.self.query.weight";
    assert_eq!(SafeTensors::deserialize(&file).unwrap().tensor(name).unwrap().shape(), [32 * 32, 1]);
    assert_same(&mixed, &dir::read_checkpoint(here).unwrap());
}

#[test]
fn hostile_files_are_errors() {
    let (header, data) = parts(&fixture("tiny_student"));
    let text = Value::from(header.clone()).to_string();
    assert!(with_weights(&join(&text, &data)).is_ok());
    let edited = |edit: &dyn Fn(&mut Map<String, Value>)| {
        let mut h = header.clone();
        edit(&mut h);
        join(&Value::from(h).to_string(), &data)
    };
    let huge = u64::MAX / 8;
    let chain: Map<String, Value> = (0..9u64)
        .map(|i| {
            (
                i.to_string(),
                json!({"dtype": "U8", "shape": [huge], "data_offsets": [i * huge, (i + 1).saturating_mul(huge)]}),
            )
        })
        .collect();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("seven bytes", vec![0; 7]),
        ("length 2^64 - 1", [&[0xff; 8][..], b"{}"].concat()),
        ("length 2^40", [&(1u64 << 40).to_le_bytes()[..], &data].concat()),
        ("no JSON", join("hello", &data)),
        ("not an object", join("[]", &data)),
        ("not UTF-8", [&2u64.to_le_bytes()[..], &[0xff, 0xfe], &data].concat()),
        ("deep", join(&"[".repeat(100_000), &data)),
        ("data cut", join(&text, &data[..data.len() - 1])),
        ("data too long", join(&text, &[&data[..], b"x"].concat())),
        ("offsets near 2^64", join(&Value::from(chain).to_string(), &data)),
        ("shape too large", edited(&|h| h["head.4.bias"]["shape"] = json!([u64::MAX, u64::MAX]))),
        ("overlap", edited(&|h| h["head.4.bias"]["data_offsets"] = json!([0, 20]))),
        ("backwards", edited(&|h| h["head.4.bias"]["data_offsets"] = json!([20, 0]))),
        ("unknown type", edited(&|h| h["head.4.bias"]["dtype"] = json!("F12"))),
    ];
    for (name, bytes) in cases {
        let e = with_weights(&bytes).err().unwrap_or_else(|| panic!("{name} was read")).to_string();
        assert!(e.contains("model.safetensors"), "{name}: {e}");
    }
}

/// Every cut and many flips of small valid files: an error or a checkpoint, never a panic.
#[test]
fn damaged_files_never_panic() {
    let temporary = tempfile::tempdir().unwrap();
    let mut spec = small(HeadSpec::MeanMlp { labels: 2 }, "backbone.", true);
    spec.layers.truncate(2);
    let ck = Checkpoint::random(spec, vec!["a".into(), "b".into()], 3).unwrap();
    for scheme in ["f16", "int8", "nf4"] {
        let out = temporary.path().join(scheme);
        write(&out, &quantise(&ck, &[("*".into(), scheme.parse().unwrap())], &[]).unwrap());
        let good = fs::read(out.join("model.safetensors")).unwrap();
        let config = fs::read(out.join("config.json")).unwrap();
        let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        let place = out.join("model.safetensors");
        for cut in (0..good.len()).step_by(53) {
            fs::write(&place, &good[..cut]).unwrap();
            assert!(dir::read_checkpoint(&out).is_err(), "{scheme} cut at {cut}");
        }
        let mut rng = quetsch::rng::Rng::new(5);
        let mut next = |n: usize| (rng.normal().abs() * 1e6) as usize % n;
        for i in 0..600 {
            let mut bad = good.clone();
            // Half of the flips hit the header, the other half anything.
            let at = if i % 2 == 0 { next(header) } else { next(bad.len()) };
            bad[at] = match i % 3 {
                0 => b'0' + (next(10) as u8),
                1 => bad[at] ^ (1 << next(8)),
                _ => next(256) as u8,
            };
            fs::write(&place, &bad).unwrap();
            if let Ok(read) = dir::read_checkpoint(&out) {
                read.to_f32();
            }
        }
        fs::write(&place, &good).unwrap();
        for i in 0..600 {
            let mut bad = config.clone();
            let at = next(bad.len());
            bad[at] = if i % 2 == 0 { b'0' + (next(10) as u8) } else { bad[at] ^ (1 << next(8)) };
            fs::write(out.join("config.json"), &bad).unwrap();
            if let Ok(read) = dir::read_checkpoint(&out) {
                read.to_f32();
            }
        }
    }
}
