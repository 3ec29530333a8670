//! Parquet as Hugging Face's `datasets` writes it (`fixtures/parquet`, by `scripts/make_fixtures.py`).
#![cfg(feature = "parquet")]
#![allow(missing_docs)]

use proptest::prelude::*;
use quetsch::data::{self, Dataset, ReadOptions, files, read, read_texts, read_words};
use quetsch::task::{Level, Problem, UNLABELLED};
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parquet").join(name)
}

fn cards(options: &ReadOptions) -> Dataset {
    read(fixture("cards.parquet"), options).unwrap_or_else(|e| panic!("{e}"))
}

fn names(list: &[&str]) -> Option<Vec<String>> {
    Some(list.iter().map(|n| n.to_string()).collect())
}

#[test]
fn numbers_get_the_names_in_the_file() {
    let set = cards(&ReadOptions::default());
    assert_eq!(set.names, ["lost_card", "change_pin", "top_up"]);
    assert_eq!(set.labels, [0, 1, 0, 2, 2]);
    assert_eq!(set.texts[3], "größer, \"quoted\"\nand broken");
    assert_eq!(set.warnings, ["1 text is empty (the first at line 3)"]);

    // A model with another order of the names; one that only counts; one with other labels.
    let given = |list: &[&str]| ReadOptions { names: names(list), ..ReadOptions::default() };
    assert_eq!(cards(&given(&["top_up", "lost_card", "other", "change_pin"])).labels, [1, 3, 1, 0, 0]);
    assert_eq!(cards(&given(&["LABEL_0", "LABEL_1", "LABEL_2"])).labels, [0, 1, 0, 2, 2]);
    let error = read(fixture("cards.parquet"), &given(&["yes", "no"])).expect_err("other labels").to_string();
    assert!(error.contains("line 1: unknown label `lost_card`"), "{error}");
}

#[test]
fn lists_and_fractions_are_read() {
    let column = |text: &str, label: &str| ReadOptions {
        text_col: Some(text.into()),
        label_col: Some(label.into()),
        ..ReadOptions::default()
    };
    let words = cards(&ReadOptions { level: Some(Level::Token), ..column("tokens", "ner_tags") });
    assert_eq!(words.names, ["O", "B", "I"]);
    assert_eq!(words.labels, [0, 1, 0, 0, 0, 1, 2, 0, 0, 0, 1, 2, 0, 0, UNLABELLED]);
    assert_eq!(words.words[1], ["a", "new", "pin", "please"]);
    let numbers = cards(&column("text", "score"));
    assert_eq!((numbers.task.problem, numbers.values), (Problem::Regression, vec![0.5, 1.25, 2.0, -0.001, 3.0]));
    // The last rows have a -100, which is a label of words only.
    let several = read(fixture("part-0.parquet"), &column("text", "ner_tags")).expect("lists of labels");
    assert_eq!(several.names, ["O", "B", "I"]);
    let error = read(fixture("cards.parquet"), &column("text", "ner_tags")).expect_err("-100").to_string();
    assert!(error.contains("line 5: the label -100"), "{error}");
    assert_eq!(several.task.problem, Problem::MultiLabel);
}

#[test]
fn several_files_are_one_table() {
    let options = ReadOptions::default();
    assert_eq!(read(fixture("part-*.parquet"), &options).expect("both"), cards(&options));
    let texts = read_texts(Some(&fixture("part-*.parquet")), None).expect("both");
    assert_eq!(texts, cards(&options).texts);
    assert_eq!(files(fixture("part-*.parquet")).expect("both").len(), 2);
    assert_eq!(files("one.csv").expect("as it is"), [PathBuf::from("one.csv")]);
    let error = read(fixture("none-*.parquet"), &options).expect_err("nothing fits").to_string();
    assert!(error.contains("no file fits"), "{error}");
    assert_eq!(
        read_words(Some(&fixture("cards.parquet")), Some("tokens")).expect("words")[0],
        ["my", "card", "is", "lost"]
    );
}

#[test]
fn what_is_no_parquet_says_so() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("x.parquet");
    std::fs::write(&path, b"text,label\n").expect("written");
    let error = read(&path, &ReadOptions::default()).expect_err("a CSV file").to_string();
    assert!(error.contains("x.parquet: cannot be read as Parquet"), "{error}");
    let error = data::Texts::open(Some(&path), None).err().expect("a CSV file").to_string();
    assert!(error.contains("Parquet"), "{error}");
}

/// The first page is at byte 4, a dictionary: four numbers, of which the second is its unpacked length (92, two bytes) and
/// the last, after the byte for its part, how many values it has.
#[test]
fn no_room_is_made_for_pages_that_cannot_be() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("x.parquet");
    let message = |at: std::ops::Range<usize>, number: &[u8]| {
        let mut bytes = std::fs::read(fixture("cards.parquet")).expect("the fixture");
        assert_eq!(bytes[4..15], [0x15, 4, 0x15, 0xb8, 1, 0x15, 0xbe, 1, 0x4c, 0x15, 10]);
        bytes.splice(at, number.iter().copied());
        std::fs::write(&path, bytes).expect("written");
        read(&path, &ReadOptions::default()).expect_err("a damaged page").to_string()
    };
    // 2^31 - 1 in zigzag.
    let most = [0xfe, 0xff, 0xff, 0xff, 0xf];
    let error = message(7..9, &most);
    assert!(
        error.contains("x.parquet") && error.contains("at byte 4 says that 95 bytes unpack to 2147483647"),
        "{error}"
    );
    let error = message(14..15, &most);
    assert!(error.contains("at byte 4 says that 92 bytes are a dictionary of 2147483647 values"), "{error}");
    let error = message(4..5, &[0xff]);
    assert!(error.contains("the page at byte 4 has no header"), "{error}");
}

/// A footer is a struct, then its length and `PAR1`. Here it begins with a list of 2^31 - 1 truth values, a map of as many,
/// and a schema of one element with as many children.
#[test]
fn footers_that_cannot_be_are_errors() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("x.parquet");
    let message = |fields: &[u8], keep: bool| {
        let mut bytes = std::fs::read(fixture("cards.parquet")).expect("the fixture");
        let length = bytes.len() - 8;
        let footer = u32::from_le_bytes(bytes[length..][..4].try_into().expect("four bytes")) as usize;
        let kept = if keep { footer } else { 0 };
        bytes.splice(length - footer..length - kept, fields.iter().copied());
        let length = bytes.len() - 8;
        bytes[length..][..4].copy_from_slice(&((kept + fields.len()) as u32).to_le_bytes());
        std::fs::write(&path, bytes).expect("written");
        read(&path, &ReadOptions::default()).expect_err("a damaged footer").to_string()
    };
    for fields in [&[0xf9, 0xf1, 0xff, 0xff, 0xff, 0xff, 7][..], &[0xfb, 0xff, 0xff, 0xff, 0xff, 7, 0x11]] {
        let error = message(fields, true);
        assert!(
            error.contains("x.parquet") && error.contains("the footer is not whole, or none of Parquet"),
            "{error}"
        );
    }
    // Version 1, a list of one struct: field 4 a name, field 5 the children; rows, no row groups.
    let schema = [0x15, 2, 0x19, 0x1c, 0x48, 1, b'x', 0x15, 0xfe, 0xff, 0xff, 0xff, 0xf, 0, 0x16, 0, 0x19, 0xc, 0];
    let error = message(&schema, false);
    assert!(error.contains("the footer has a schema of 1 elements with 2147483647 children"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A damaged file is an answer or an error.
    #[test]
    fn damage_never_ends_the_program(at in 0.0..1.0f64, value: u8, cut in prop::option::of(0.0..1.0f64)) {
        let mut bytes = std::fs::read(fixture("cards.parquet")).expect("the fixture");
        let place = |share: f64| (share * bytes.len() as f64) as usize;
        let (at, cut) = (place(at), cut.map(place));
        bytes[at] = value;
        if let Some(cut) = cut {
            bytes.remove(cut);
        }
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("x.parquet");
        std::fs::write(&path, bytes).expect("written");
        let _ = read(&path, &ReadOptions::default());
    }
}
