//! Token ids as transformers 4.57.6 gives them (`fixtures/*_expected.json`), and tokenizers made here.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

use quetsch::batch::Encoding;
use quetsch::dir;
use quetsch::tokenizer::{Tokenizer, TokenizerFiles, train_wordpiece};
use serde_json::{Value, json};
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// Text, its pair, ids, types.
type Case = (String, Option<String>, Vec<u32>, Vec<u32>);

fn expected(name: &str) -> (usize, Vec<Case>) {
    let json: Value = serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap();
    let ids = |v: &Value| v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect::<Vec<_>>();
    let text = |v: &Value| v.as_str().map(str::to_owned);
    let inputs = json["inputs"].as_array().unwrap();
    let inputs =
        inputs.iter().map(|x| (text(&x["text"]).unwrap(), text(&x["pair"]), ids(&x["ids"]), ids(&x["types"])));
    (json["max_length"].as_u64().unwrap() as usize, inputs.collect())
}

fn full(e: Encoding) -> (Vec<u32>, Vec<u32>) {
    let types = if e.types.is_empty() { vec![0; e.ids.len()] } else { e.types };
    (e.ids, types)
}

#[test]
fn ids_are_those_of_transformers() {
    // tokenizer.json with truncation and padding in it that must not count, and vocab.txt alone.
    for model in ["tiny_student", "tiny_bert"] {
        let t = Tokenizer::new(&dir::read_tokenizer(fixture(model)).unwrap()).unwrap();
        let (max_length, inputs) = expected(&format!("{model}_expected.json"));
        for (text, pair, ids, types) in &inputs {
            let e = match pair {
                Some(pair) => t.encode_pair(text, pair, max_length),
                None => t.encode(text, max_length),
            };
            assert_eq!(full(e.unwrap()), (ids.clone(), types.clone()), "{model} {text:?} {pair:?}");
        }
        let texts: Vec<&String> = inputs.iter().map(|(text, ..)| text).collect();
        let one = t.encode_all(&texts, max_length, 1).unwrap();
        for threads in [0, 2, 3, 100] {
            assert_eq!(t.encode_all(&texts, max_length, threads).unwrap(), one);
        }
    }
}

#[test]
fn the_fingerprint_is_of_the_ids_not_of_the_files() {
    let json = dir::read_tokenizer(fixture("tiny_student")).unwrap();
    let vocab = dir::read_tokenizer(fixture("tiny_bert")).unwrap();
    assert!(json.files.contains_key("tokenizer.json") && !vocab.files.contains_key("tokenizer.json"));
    let print = |files: &TokenizerFiles| Tokenizer::new(files).unwrap().fingerprint();
    assert_eq!(print(&json), print(&vocab));
    let changed = |from: &str, to: &str| {
        let mut files = json.clone();
        let text = String::from_utf8(files.files["tokenizer.json"].clone()).unwrap();
        assert!(text.contains(from));
        files.files.insert("tokenizer.json".into(), text.replacen(from, to, 1).into_bytes());
        print(&files)
    };
    for (from, to, equal) in [
        ("\"strip_accents\": null", "\"strip_accents\": true", true),
        ("\"strip_accents\": null", "\"strip_accents\": false", false),
        ("\"lowercase\": true", "\"lowercase\": false", false),
        ("\"max_length\": 8", "\"max_length\": 9", true),
        ("\"card\"", "\"cards\"", false),
    ] {
        assert_eq!(changed(from, to) == print(&json), equal, "{from} -> {to}");
    }
}

#[test]
fn a_cased_vocabulary_says_so_in_its_config() {
    let vocab = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nA\na\n\xc3\xa4\n\xe4\xb8\xad\xe6\x96\x87\n\xe4\xb8\xad\n";
    let ids = |config: &str| {
        let files = [("vocab.txt", &vocab[..]), ("tokenizer_config.json", config.as_bytes())];
        let files = files.into_iter().map(|(n, b)| (n.to_owned(), b.to_vec())).collect();
        Tokenizer::new(&TokenizerFiles { files }).unwrap().encode("A ä 中文", 16).unwrap().ids
    };
    assert_eq!(ids("{}"), [2, 6, 6, 9, 1, 3]);
    assert_eq!(ids(r#"{"do_lower_case": false}"#), [2, 5, 7, 9, 1, 3]);
    assert_eq!(ids(r#"{"do_lower_case": false, "strip_accents": true}"#), [2, 5, 6, 9, 1, 3]);
    assert_eq!(ids(r#"{"strip_accents": false}"#), [2, 6, 7, 9, 1, 3]);
    assert_eq!(ids(r#"{"tokenize_chinese_chars": false}"#), [2, 6, 6, 8, 3]);
}

#[test]
fn broken_tokenizers_are_clear_errors() {
    let files = |name: &str, bytes: &[u8]| TokenizerFiles { files: [(name.to_owned(), bytes.to_vec())].into() };
    let cases = [
        (TokenizerFiles::default(), "looked for tokenizer.json and vocab.txt"),
        (files("tokenizer.json", b"{}"), "tokenizer.json"),
        (files("tokenizer.json", b"\xff"), "tokenizer.json"),
        (files("vocab.txt", b"a\nb\n"), "vocab.txt has no [PAD]"),
        (files("vocab.txt", b"\xff\n"), "vocab.txt"),
    ];
    for (files, message) in cases {
        let e = Tokenizer::new(&files).err().unwrap().to_string();
        assert!(e.contains(message), "{e}");
    }
    // What the tokenizers library panics on: a decoder that ends early, a table of characters that is none.
    let json =
        String::from_utf8(dir::read_tokenizer(fixture("tiny_student")).unwrap().files["tokenizer.json"].clone());
    let whole: Value = serde_json::from_str(&json.unwrap()).unwrap();
    let text = whole.to_string();
    let cut = text.split_at(text.find("\"decoder\":{").unwrap() + 12).0;
    let e = Tokenizer::new(&files("tokenizer.json", cut.as_bytes())).err().unwrap().to_string();
    assert!(e.contains("not JSON"), "{e}");
    let mut table = whole.clone();
    table["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "?"});
    let e = Tokenizer::new(&files("tokenizer.json", table.to_string().as_bytes())).err().unwrap().to_string();
    assert!(e.contains("tokenizer.json: the tokenizers library cannot use it"), "{e}");
    let t = Tokenizer::new(&dir::read_tokenizer(fixture("tiny_bert")).unwrap()).unwrap();
    assert!(t.encode("card", 2).unwrap_err().to_string().contains("max_length is 2"));
    assert_eq!(t.encode("card", 3).unwrap().ids.len(), 3);
}

#[test]
fn training_gives_the_same_files_every_time() {
    let words = ["card", "cards", "lost", "transfer", "transfers", "pending", "naïve", "café", "exchange", "rate"];
    let texts: Vec<String> =
        (0..400).map(|i| format!("{} {}: {} £{}?", words[i % 10], words[i * 7 % 9], words[i * 3 % 8], i)).collect();
    let files = train_wordpiece(&texts, 150).unwrap();
    for _ in 0..5 {
        assert_eq!(train_wordpiece(&texts, 150).unwrap(), files);
    }
    let names: Vec<&String> = files.files.keys().collect();
    assert_eq!(names, ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]);
    let t = Tokenizer::new(&files).unwrap();
    assert_eq!((t.vocab_size(), t.rows()), (150, 150));
    assert!(!t.encode("lost cards, pending transfers £7 cafe; Zürich!", 64).unwrap().ids.contains(&1), "no [UNK]");
    let mut vocab_only = files.clone();
    vocab_only.files.remove("tokenizer.json");
    assert_eq!(Tokenizer::new(&vocab_only).unwrap().fingerprint(), t.fingerprint());
    assert!(train_wordpiece(&texts, 100).unwrap_err().to_string().contains("too small"));
}

/// Only the beginning of a long text is tokenised, and nothing shows it.
#[test]
fn long_texts_are_cut_to_the_same_ids() {
    let files = dir::read_tokenizer(fixture("tiny_student")).unwrap();
    let tokenizer = Tokenizer::new(&files).unwrap();
    let words = ["card ", "  payment\n", "café\u{a0}", "\u{4e2d}\u{6587}", "xx-yy? ", "\t1,000.50 ", "z"];
    for (seed, max_length) in [(1, 16), (2, 300), (3, 9000)] {
        let mut rng = quetsch::rng::Rng::new(seed);
        let text: String = (0..40_000).map(|_| words[rng.below(words.len())]).collect();
        // Far beyond max_length tokens, and far below the length at which a text is long.
        let short: String = text.chars().take(2_000).collect();
        let long = tokenizer.encode(&text, max_length).unwrap();
        assert_eq!(long.ids.len(), max_length);
        let common = max_length.min(300) - 1; // the last id of a cut text is [SEP]
        assert_eq!(long.ids[..common], tokenizer.encode(&short, 301).unwrap().ids[..common], "{max_length}");
        let pair = tokenizer.encode_pair("card", &text, max_length).unwrap();
        assert_eq!(pair.ids.len(), max_length);
    }
    let one_word = "x".repeat(200_000);
    assert_eq!(tokenizer.encode(&one_word, 16).unwrap().ids.len(), 3, "[CLS] [UNK] [SEP]");
    let blank = " ".repeat(200_000);
    assert_eq!(tokenizer.encode(&blank, 16).unwrap().ids.len(), 2);
}

/// Whichever of a WordPiece tokenizer's files are there, all four are written, and they give the same ids.
#[test]
fn missing_files_are_made_from_the_others() {
    let whole = dir::read_tokenizer(fixture("tiny_student")).unwrap();
    let ids = |files: &TokenizerFiles| {
        let text = "I lost my C\u{e4}rd, \u{4f60}\u{597d} 2 times!";
        (Tokenizer::new(files).unwrap().encode(text, 16).unwrap().ids, Tokenizer::new(files).unwrap().fingerprint())
    };
    let parsed = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
    let rows: [&[&str]; 4] = [
        &["tokenizer.json"],
        &["vocab.txt"],
        &["tokenizer.json", "tokenizer_config.json"],
        &["vocab.txt", "tokenizer_config.json"],
    ];
    for names in rows {
        let mut some = whole.clone();
        some.files.retain(|name, _| names.contains(&name.as_str()));
        let made = some.complete(16).unwrap();
        assert!(made.files.keys().eq(whole.files.keys()), "{names:?}: {:?}", made.files.keys());
        assert!(names.iter().all(|n| made.files[*n] == whole.files[*n]), "{names:?}: what is there stays");
        assert_eq!(made.files["vocab.txt"], whole.files["vocab.txt"], "{names:?}");
        let map = "special_tokens_map.json";
        assert_eq!(parsed(&made.files[map]), parsed(&whole.files[map]), "{names:?}");
        for name in ["tokenizer.json", "vocab.txt"] {
            let mut alone = made.clone();
            alone.files.retain(|n, _| n == name || n == "tokenizer_config.json");
            assert_eq!(ids(&alone), ids(&whole), "{names:?}: {name}");
        }
    }
    // What transformers 5 notes about the computer that it ran on does not go further; other kinds are left alone.
    let mut noted = whole.clone();
    let config = r#"{"is_local": true, "local_files_only": false, "cls_token": "[CLS]"}"#;
    noted.files.insert("tokenizer_config.json".into(), config.into());
    assert_eq!(
        parsed(&noted.complete(16).unwrap().files["tokenizer_config.json"]),
        parsed(br#"{"cls_token": "[CLS]"}"#)
    );
    let other = dir::read_tokenizer(fixture("families/xlm_roberta")).unwrap();
    assert_eq!(other.complete(16).unwrap(), other);
}
