//! tokenizer.json, and vocab.txt with tokenizer_config.json: what is read also encodes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch::tokenizer::{Cut, Tokenizer, TokenizerFiles};
use std::fs;

/// Between vocab.txt and tokenizer_config.json.
const END: u8 = 0;
const TEXTS: [&str; 5] =
    ["i lost my card", "", "Straße ﬁ 我们 \u{200b}\u{fffd} [SEP] <s>", "1,000.5 don't", "\n\t a"];

fuzz_target!(
    init: {
        quetsch_fuzz::allow_panics_of("/tokenizers-");
        quetsch_fuzz::seeds(seeds);
    },
    |data: &[u8]| {
        let mut files = TokenizerFiles::default();
        let mut add = |name: &str, bytes: &[u8]| drop(files.files.insert(name.to_owned(), bytes.to_vec()));
        match data.first() {
            Some(b'{') => add("tokenizer.json", data),
            _ => match data.iter().position(|b| *b == END) {
                Some(at) => {
                    add("vocab.txt", &data[..at]);
                    add("tokenizer_config.json", &data[at + 1..]);
                }
                None => add("vocab.txt", data),
            },
        }
        let Ok(tokenizer) = Tokenizer::new(&files) else { return };
        tokenizer.fingerprint();
        tokenizer.rows();
        for text in TEXTS {
            for length in [3, 8, 100] {
                if let Ok(e) = tokenizer.encode(text, length) {
                    assert!(e.ids.len() <= length, "{} ids, at most {length}", e.ids.len());
                }
                let _ = tokenizer.encode_pair(text, "my card", length);
                let _ = tokenizer.encode_cut(text, None, length, Cut::Left);
            }
            let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
            let _ = tokenizer.encode_words(&words, 8);
        }
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let fixtures = quetsch_fuzz::root().join("fixtures");
    let read = |path: &str| fs::read(fixtures.join(path)).expect(path);
    let vocab = read("tiny_student/vocab.txt");
    let config = read("tiny_student/tokenizer_config.json");
    let mut seeds =
        vec![vocab.clone(), [&vocab[..], &[END], &config].concat(), b"[UNK]\n[CLS]\n[SEP]\na\n##b".to_vec()];
    seeds.extend(
        ["tiny_student", "families/distilbert", "families/roberta", "families/xlm_roberta", "families/electra"]
            .into_iter()
            .filter_map(|folder| fs::read(fixtures.join(folder).join("tokenizer.json")).ok()),
    );
    seeds
}
