//! Laws of vocabulary pruning, on a `tokenizer.json` and on a `vocab.txt` alone.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

use quetsch::dir::{self, ModelDir};
use quetsch::quant::{Scheme, quantise};
use quetsch::rng::Rng;
use quetsch::runtime::Model;
use quetsch::spec::Tensor;
use quetsch::tokenizer::Tokenizer;
use quetsch::vocab;
use std::collections::BTreeSet;
use std::path::PathBuf;

fn model(name: &str) -> ModelDir {
    dir::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)).unwrap()
}

const SEEN: [&str; 4] = ["I lost my card", "Why is my transfer pending?", "exchange rate", ""];
const OTHER: [&str; 5] = ["Cards, transferred!", "my PIN is 1234", "top up", "naïve café", "中文 zzzxq"];

fn logits(m: &ModelDir, texts: &[&str]) -> Vec<f32> {
    let encodings = Tokenizer::new(&m.tokenizer).unwrap().encode_all(texts, 32, 1).unwrap();
    Model::pack(&m.checkpoint).logits(&encodings, 1).unwrap()
}

#[test]
fn seen_texts_have_the_same_logits_and_others_still_encode() {
    for name in ["tiny_student", "tiny_bert"] {
        let whole = model(name);
        let cut = vocab::prune(&whole, &SEEN, 0, 2).unwrap();
        let (old, new) = (Tokenizer::new(&whole.tokenizer).unwrap(), Tokenizer::new(&cut.model.tokenizer).unwrap());
        let n = cut.kept.len();
        assert!(n < whole.checkpoint.spec.vocab, "{name}: {n}");
        assert_eq!((cut.model.checkpoint.spec.vocab, new.rows(), new.vocab_size()), (n, n, n), "{name}");
        assert_eq!(logits(&whole, &SEEN), logits(&cut.model, &SEEN), "{name}: to the bit");
        let rows = cut.model.checkpoint.values(Tensor::Word).len();
        assert_eq!(rows, n * whole.checkpoint.spec.hidden);

        let token = |t: &Tokenizer, id: u32| t.token(id).unwrap();
        for text in SEEN.iter().chain(&OTHER) {
            let (a, b) = (old.encode(text, 64).unwrap().ids, new.encode(text, 64).unwrap().ids);
            let spelled = |t: &Tokenizer, ids: &[u32]| -> String {
                ids.iter().map(|id| token(t, *id).replace("##", "")).collect()
            };
            assert_eq!(spelled(&old, &a), spelled(&new, &b), "{name}: {text:?} is spelled the same");
            let pair = |t: &Tokenizer| t.encode_pair(text, "card", 64).unwrap();
            assert_eq!(spelled(&old, &pair(&old).ids), spelled(&new, &pair(&new).ids));
        }
        for (new_id, old_id) in cut.kept.iter().enumerate() {
            assert_eq!(token(&old, *old_id), token(&new, new_id as u32));
        }
        // With the first entries, what a text to come would have kept.
        let more = vocab::prune(&whole, &SEEN, n, 1).unwrap();
        let unused = |id: u32| token(&old, id).starts_with("[unused");
        let wanted = (0..n as u32).filter(|id| !unused(*id)).chain(cut.kept.iter().copied());
        assert_eq!(more.kept, wanted.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>(), "{name}");
        assert!(more.kept.len() > n && more.kept.len() < whole.checkpoint.spec.vocab, "{name}");
        // Nothing more to cut.
        let again = vocab::prune(&cut.model, &SEEN, 0, 1).unwrap();
        assert_eq!(again.kept, (0..n as u32).collect::<Vec<_>>());
    }
}

/// Whatever texts decide: theirs have the same logits to the bit, and every piece of a word that is gone is spelled.
#[test]
fn any_texts_can_decide() {
    for name in ["tiny_student", "tiny_bert"] {
        let whole = model(name);
        let old = Tokenizer::new(&whole.tokenizer).unwrap();
        for seed in 0..12 {
            let mut rng = Rng::new(seed);
            let mut text = || -> String {
                let piece = |rng: &mut Rng| {
                    let token = old.token(rng.below(whole.checkpoint.spec.vocab) as u32).unwrap();
                    if token.starts_with('[') { "card".into() } else { token.replace("##", "") }
                };
                let n = 1 + rng.below(8);
                (0..n).map(|_| piece(&mut rng) + if rng.below(3) == 0 { "" } else { " " }).collect()
            };
            let (seen, other): (Vec<String>, Vec<String>) =
                ((0..5).map(|_| text()).collect(), (0..5).map(|_| text()).collect());
            let cut = vocab::prune(&whole, &seen, 0, 1).unwrap().model;
            let texts: Vec<&str> = seen.iter().map(String::as_str).collect();
            assert_eq!(logits(&whole, &texts), logits(&cut, &texts), "{name} {seed}");
            let new = Tokenizer::new(&cut.tokenizer).unwrap();
            let spelled = |t: &Tokenizer, text: &str| -> String {
                let ids = t.encode(text, 200).unwrap().ids;
                ids.iter().map(|id| t.token(*id).unwrap().replace("##", "")).collect()
            };
            for text in other.iter().filter(|text| !spelled(&old, text).contains("[UNK]")) {
                assert_eq!(spelled(&old, text), spelled(&new, text), "{name} {seed}: {text:?}");
            }
        }
    }
}

#[test]
fn the_files_agree_and_survive_the_disk() {
    let whole = model("tiny_student");
    let cut = vocab::prune(&whole, &SEEN, 0, 1).unwrap().model;
    let place = tempfile::tempdir().unwrap();
    dir::write(place.path().join("m"), &cut, false).unwrap();
    let back = dir::read(place.path().join("m")).unwrap();
    assert_eq!(logits(&back, &OTHER), logits(&cut, &OTHER));
    let mut vocab_only = back.tokenizer.clone();
    vocab_only.files.remove("tokenizer.json").unwrap();
    let print = |files| Tokenizer::new(files).unwrap().fingerprint();
    assert_eq!(print(&vocab_only), print(&back.tokenizer), "vocab.txt and tokenizer.json say the same");
}

#[test]
fn ids_move_wherever_they_stand() {
    let mut m = model("tiny_student");
    // The special tokens at the end, after everything that can go.
    let swap = |text: &str| {
        let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
        let rows = m.checkpoint.spec.vocab as u64;
        let moved = |id: u64| (id + rows - 5) % rows;
        let change = |v: &mut serde_json::Value| *v = moved(v.as_u64().unwrap()).into();
        json["model"]["vocab"].as_object_mut().unwrap().values_mut().for_each(change);
        json["added_tokens"].as_array_mut().unwrap().iter_mut().for_each(|t| change(&mut t["id"]));
        let sep = moved(3);
        let cls = moved(2);
        json["post_processor"] =
            serde_json::json!({"type": "BertProcessing", "sep": ["[SEP]", sep], "cls": ["[CLS]", cls]});
        json["padding"]["pad_id"] = moved(0).into();
        json.to_string()
    };
    let text = swap(std::str::from_utf8(&m.tokenizer.files["tokenizer.json"]).unwrap());
    m.tokenizer.files.retain(|name, _| name == "special_tokens_map.json");
    m.tokenizer.files.insert("tokenizer.json".into(), text.into_bytes());
    m.checkpoint.config.insert("pad_token_id".into(), (m.checkpoint.spec.vocab - 5).into());
    let cut = vocab::prune(&m, &SEEN, 0, 1).unwrap();
    let n = cut.kept.len();
    assert!(n < m.checkpoint.spec.vocab);
    assert_eq!(cut.model.checkpoint.config["pad_token_id"], n - 5);
    assert_eq!(logits(&m, &SEEN), logits(&cut.model, &SEEN));
}

#[test]
fn what_cannot_be_pruned_is_a_clear_error() {
    let m = model("tiny_student");
    let mut fewer = m.clone();
    fewer.checkpoint = quetsch::checkpoint::Checkpoint::random(
        quetsch::spec::ModelSpec { vocab: 9, ..m.checkpoint.spec.clone() },
        m.checkpoint.labels.clone(),
        1,
    )
    .unwrap();
    assert!(vocab::prune(&fewer, &SEEN, 0, 1).err().unwrap().to_string().contains("9 rows"));
    let f16 = quantise(&m.checkpoint, &[("*".into(), Scheme::F16)], &[]).unwrap();
    let f16 = vocab::prune(&ModelDir { checkpoint: f16, ..m.clone() }, &SEEN, 0, 1);
    assert!(f16.is_ok(), "float types other than f32 are kept");
    let edited = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut odd = m.clone();
        let text = odd.tokenizer.files.get_mut("tokenizer.json").unwrap();
        let mut json = serde_json::from_slice(text).unwrap();
        edit(&mut json);
        *text = json.to_string().into_bytes();
        vocab::prune(&odd, &SEEN, 0, 1).err().unwrap().to_string()
    };
    let e = edited(&|json| {
        json["model"] = serde_json::json!({"type": "WordLevel", "vocab": {"[UNK]": 1}, "unk_token": "[UNK]"});
    });
    assert!(e.contains("WordPiece"), "{e}");
    // It is read without a name, too; whose ids are where would be a guess.
    let e = edited(&|json| {
        json["post_processor"].as_object_mut().unwrap().remove("type");
    });
    assert!(e.contains("cannot renumber the post-processor"), "{e}");
}
