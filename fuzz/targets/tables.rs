//! Labelled and unlabelled files: CSV, TSV, JSONL, text, and the list of labels beside them. The first two bytes say
//! what kind and how it is read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch::data::{self, ReadOptions};
use quetsch::task::{Level, Problem};
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

static PLACE: LazyLock<PathBuf> = LazyLock::new(quetsch_fuzz::folder);
const KINDS: [&str; 5] = ["a.csv", "a.tsv", "a.jsonl", "a.txt", "categories.json"];

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let [kind, how, content @ ..] = data else { return };
        let name = KINDS[*kind as usize % KINDS.len()];
        let path = PLACE.join(name);
        fs::write(&path, content).expect("a file in memory");
        if name == "categories.json" {
            fs::write(PLACE.join("b.csv"), "text,label\nhello,a\nworld,1\n").expect("a file in memory");
            let _ = data::read(PLACE.join("b.csv"), &ReadOptions::default());
            fs::remove_file(path).expect("it was written");
            return;
        }
        let bit = |i: u8| how >> i & 1 == 1;
        let options = ReadOptions {
            text_col: bit(0).then(|| "text".into()),
            label_col: bit(1).then(|| "label".into()),
            names: bit(2).then(|| vec!["a".into(), "b".into()]),
            problem: match how >> 3 & 3 {
                0 => None,
                1 => Some(Problem::SingleLabel),
                2 => Some(Problem::MultiLabel),
                _ => Some(Problem::Regression),
            },
            level: bit(5).then_some(if bit(6) { Level::Token } else { Level::Sentence }),
            separator: bit(7).then(|| "|".into()),
        };
        if let Ok(set) = data::read(&path, &options) {
            set.counts();
            let (train, validation) = data::split(&set, 0.3, 1);
            assert_eq!(train.len() + validation.len(), set.len());
            data::overlap(&set, &set);
        }
        let _ = data::read_texts(Some(&path), options.text_col.as_deref());
        let _ = data::read_words(Some(&path), options.text_col.as_deref());
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let rows: [(u8, u8, &str); 16] = [
        (0, 0, "text,label\ni lost my card,a\n\"why, \"\"me\"\"?\",b\n"),
        (0, 0, "\u{feff}label;text\r\n1;hello\r\n0;\"two\nlines\"\r\n\r\n"),
        (0, 24, "text,label\na,0.5\nb,1e3\n"),
        (0, 128, "text,label\na,x|y\nb,\n"),
        (0, 2, "text,labels\na,\"never closed\n"),
        (1, 0, "text\tlabel\nhello\t3\nworld\t1\n"),
        (2, 0, "{\"text\": \"hello\", \"label\": \"a\"}\n{\"text\": \"x\", \"label\": 3}\n"),
        (2, 0, "{\"tokens\": [\"my\", \"card\"], \"labels\": [\"O\", \"B\"]}\n"),
        (2, 24, "{\"tokens\": [\"my\", \"card\"], \"labels\": [0.5, null]}\n"),
        (2, 96, "{\"words\": [\"my\"], \"ner_tags\": [-100]}\n"),
        (2, 16, "{\"text\": \"a\", \"labels\": [\"fee\", \"card\"]}\n{\"text\": \"b\", \"labels\": []}\n"),
        (2, 24, "{\"text\": \"a\", \"score\": [0.5, 1]}\n{\"text\": \"b\", \"score\": [2, 3]}\n"),
        (2, 4, "{\"text\": \"\\ud83d\\ude00\", \"label\": true}\n"),
        (3, 0, "one\n\ntwo\n"),
        (4, 0, "[\"a\", \"b\"]"),
        (0, 4, "text,label\nx,c\n"),
    ];
    rows.iter().map(|(kind, how, text)| [&[*kind, *how], text.as_bytes()].concat()).collect()
}
