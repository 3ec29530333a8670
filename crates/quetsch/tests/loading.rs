//! A model loaded from its files, whose word embeddings stay there, answers as the same model packed from memory.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

use quetsch::batch::Encoding;
use quetsch::checkpoint::{Checkpoint, FloatType, Stored};
use quetsch::dir::{self, ModelDir, Source};
use quetsch::quant::{Compute, Scheme, quantise};
use quetsch::runtime::{Classifier, Model};
use quetsch::spec::{Activation, Family, HeadSpec, LayerShape, ModelSpec, Tensor};
use std::fs;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn write(path: &Path, checkpoint: &Checkpoint) {
    let tokenizer = dir::read_tokenizer(fixture("tiny_student")).unwrap();
    dir::write(path, &ModelDir { checkpoint: checkpoint.clone(), tokenizer }, true).unwrap();
}

fn load(path: &Path) -> quetsch::Result<Model> {
    Model::load(Source::open(path)?)
}

/// Sentences that between them have every word piece; some of them twice.
fn sentences(model: &Model) -> Vec<Encoding> {
    let ids: Vec<u32> = (0..model.spec().vocab as u32).chain(0..5).collect();
    ids.chunks(model.spec().longest().min(9)).map(|c| Encoding { ids: c.to_vec(), types: vec![] }).collect()
}

fn bits(model: &Model) -> Vec<u32> {
    model.logits(&sentences(model), 2).unwrap().iter().map(|v| v.to_bits()).collect()
}

#[test]
fn rows_in_the_file_are_the_rows_in_memory() {
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    for scheme in ["f32", "f16", "bf16", "int8", "nf4", "fp4"] {
        let mut rules = vec![("*".to_owned(), scheme.parse().unwrap())];
        rules.push(("embeddings.*".to_owned(), scheme.parse().unwrap()));
        let ck = quantise(&source, &rules, &[]).unwrap();
        let out = temporary.path().join(scheme);
        write(&out, &ck);
        let (loaded, packed) = (load(&out).unwrap(), Model::pack(&ck));
        let want = bits(&packed);
        assert_eq!(bits(&loaded), want, "{scheme}: rows read");
        assert_eq!(bits(&loaded), want, "{scheme}: rows kept");
    }
    for stock in ["tiny_bert", "families/electra", "families/roberta", "families/distilbert"] {
        let ck = dir::read_checkpoint(fixture(stock)).unwrap();
        assert_eq!(bits(&load(&fixture(stock)).unwrap()), bits(&Model::pack(&ck)), "{stock}");
    }
}

/// 4-bit blocks do not end where rows do, nor rows where bytes do.
#[test]
fn rows_of_4_bits_in_the_file_are_the_decoded_rows() {
    let temporary = tempfile::tempdir().unwrap();
    for (width, nested, source) in
        [(33, true, None), (33, false, Some(FloatType::F16)), (48, true, Some(FloatType::Bf16)), (7, false, None)]
    {
        let spec = ModelSpec {
            family: Family::Bert,
            prefix: "bert.".into(),
            vocab: 61,
            positions: 16,
            token_types: 2,
            hidden: width,
            head_dim: width,
            original_heads: 1,
            layers: vec![LayerShape { heads: vec![0], ffn: 5 }],
            ffn_activation: Activation::Gelu,
            norm_eps: 1e-6,
            head: HeadSpec::Pooler { labels: 3 },
            unused_pooler: false,
        };
        let scheme = Scheme::Nf4 { double_quant: nested, compute: Compute::F32, source };
        let ck = Checkpoint::random(spec, ["a", "b", "c"].map(String::from).to_vec(), 3).unwrap();
        let ck = quantise(&ck, &[("embeddings.word_embeddings".into(), scheme)], &[]).unwrap();
        let out = temporary.path().join(format!("{width}{nested}"));
        write(&out, &ck);
        let loaded = load(&out).unwrap();
        let want = bits(&Model::pack(&ck.to_f32()));
        assert_eq!(bits(&loaded), want, "{width} {nested}: rows read");
        assert_eq!(bits(&loaded), want, "{width} {nested}: rows kept");
    }
}

#[test]
fn a_file_that_is_replaced_is_still_the_old_one() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("model");
    let mut ck = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    write(&out, &ck);
    let (first, loaded) = (bits(&Model::pack(&ck)), load(&out).unwrap());
    let words = ck.values(Tensor::Word).iter().map(|w| w * 2.0).collect();
    ck.set(Tensor::Word, Stored::f32(words));
    write(&out, &ck);
    assert_eq!(bits(&loaded), first);
    assert_ne!(bits(&load(&out).unwrap()), first, "the new file is another model");
}

#[test]
fn a_file_cut_short_while_it_is_used_is_an_error() {
    let temporary = tempfile::tempdir().unwrap();
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    for scheme in ["f32", "int8", "nf4"] {
        let out = temporary.path().join(scheme);
        write(&out, &quantise(&source, &[("embeddings.*".into(), scheme.parse().unwrap())], &[]).unwrap());
        let loaded = load(&out).unwrap();
        fs::OpenOptions::new().write(true).open(out.join(dir::WEIGHTS)).unwrap().set_len(9).unwrap();
        let error = loaded.logits(&sentences(&loaded), 1).unwrap_err().to_string();
        assert!(error.contains(dir::WEIGHTS), "{scheme}: {error}");
    }
}

/// Whatever is wrong, loading for inference says what reading the checkpoint says.
#[test]
fn what_is_wrong_is_said_in_the_same_words() {
    let temporary = tempfile::tempdir().unwrap();
    let good = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let spoilt = |t: Tensor| {
        let mut ck = good.clone();
        let mut values = ck.values(t).into_owned();
        *values.last_mut().unwrap() = f32::NAN;
        ck.set(t, Stored::f32(values));
        ck
    };
    let first_linear = Tensor::W(quetsch::spec::Lin::Query(0));
    for (i, t) in [Tensor::Word, Tensor::Position, first_linear].into_iter().enumerate() {
        let out = temporary.path().join(i.to_string());
        write(&out, &spoilt(t));
        let (loading, reading) = (load(&out).err().unwrap(), dir::read_checkpoint(&out).unwrap_err());
        assert_eq!(loading.to_string(), reading.to_string());
        assert!(loading.to_string().contains("NaN"), "{loading}");
    }
    // A table of another size, and tensors that config.json does not know.
    for (key, value) in [("vocab_size", good.spec.vocab + 1), ("num_hidden_layers", 2)] {
        let out = temporary.path().join(key);
        write(&out, &good);
        let mut json: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        json[key] = value.into();
        json.as_object_mut().unwrap().remove("quetsch");
        fs::write(out.join("config.json"), json.to_string()).unwrap();
        let (loading, reading) = (load(&out).err().unwrap(), dir::read_checkpoint(&out).unwrap_err());
        assert_eq!(loading.to_string(), reading.to_string(), "{key}");
    }
    let bare = temporary.path().join("bare");
    fs::create_dir(&bare).unwrap();
    let error = Classifier::load(&bare, None).err().unwrap().to_string();
    assert!(error.contains("config.json"), "{error}");
}
