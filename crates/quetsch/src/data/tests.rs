use std::fs;

use proptest::prelude::*;

use super::*;

/// Reads `content` from a file of this name, with a `categories.json` beside it if given.
fn read_as(name: &str, content: &[u8], categories: Option<&str>, options: &ReadOptions) -> Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), content).unwrap();
    if let Some(json) = categories {
        fs::write(folder.path().join("categories.json"), json).unwrap();
    }
    read(folder.path().join(name), options)
}

fn columns(text: &str, label: &str) -> ReadOptions {
    ReadOptions { text_col: Some(text.into()), label_col: Some(label.into()), ..ReadOptions::default() }
}

fn names(names: &[&str]) -> ReadOptions {
    ReadOptions { names: Some(names.iter().map(|s| s.to_string()).collect()), ..Default::default() }
}

/// All rows of a table at once: what failed, not only what failed first.
fn report(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn formats_and_columns() {
    let sniff = ReadOptions::default();
    let other = columns("Body", "topic");
    let two: (&[&str], &[u32]) = (&["a, b", "c"], &[0, 1]);
    type Case<'a> = (&'a str, &'a str, &'a str, &'a ReadOptions, (&'a [&'a str], &'a [u32]));
    let table: Vec<Case> = vec![
        ("comma", "a.csv", "text,label\n\"a, b\",x\nc,y\n", &sniff, two),
        ("case, spaces, order", "a.CSV", "id, Category ,Text\n1,x,\"a, b\"\n2, y ,c", &sniff, two),
        ("semicolon", "a.csv", "utterance;intent\na, b;x\nc;y\n", &sniff, two),
        ("tab in csv", "a.csv", "query\tclass\na, b\tx\nc\ty\n", &sniff, two),
        ("tsv", "a.tsv", "question\ttarget\na, b\tx\nc\ty\n", &sniff, two),
        ("byte order mark, CRLF", "a.csv", "\u{feff}sentence,label\r\n\"a, b\",x\r\nc,y\r\n", &sniff, two),
        ("names given", "a.csv", "text,label,body,topic\n1,2,\"a, b\",x\n1,2,c,y\n", &other, two),
        ("text before utterance", "a.csv", "utterance,text,label\n1,\"a, b\",x\n1,c,y\n", &sniff, two),
        ("quotes", "a.csv", "text,label\n\"say \"\"a\"\"\nb\",x\nc,y\n", &sniff, (&["say \"a\"\nb", "c"], &[0, 1])),
        (
            "jsonl",
            "a.jsonl",
            "{\"text\":\"a, b\",\"label\":\"x\"}\n\n{\"label\":\"y\",\"text\":\"c\"}",
            &sniff,
            two,
        ),
        (
            "jsonl integers",
            "a.ndjson",
            "{\"query\":\"a, b\",\"intent\":0}\n{\"query\":\"c\",\"intent\":1}",
            &sniff,
            two,
        ),
        ("blank lines", "a.csv", "text,label\n\n\"a, b\",x\n\n\nc,y\n\n", &sniff, two),
    ];
    let mut wrong = Vec::new();
    for (what, name, content, options, (texts, labels)) in table {
        match read_as(name, content.as_bytes(), None, options) {
            Ok(set) if set.texts == texts && set.labels == labels && set.warnings.is_empty() => {}
            found => wrong.push(format!("{what}: {found:?}")),
        }
    }
    report(wrong);
}

#[test]
fn label_order() {
    let csv = "text,label\n1,b\n2,a\n3,b\n";
    let integers = "text,label\n1,2\n2,0\n3,2\n";
    let list = Some(r#"["a", "b", "c"]"#);
    let (given, sniff) = (names(&["c", "b", "a"]), ReadOptions::default());
    type Case<'a> = (&'a str, &'a str, Option<&'a str>, &'a ReadOptions, &'a [u32], &'a [&'a str]);
    let table: Vec<Case> = vec![
        ("first appearance", csv, None, &sniff, &[0, 1, 0], &["b", "a"]),
        ("categories.json", csv, list, &sniff, &[1, 0, 1], &["a", "b", "c"]),
        ("given names win", csv, list, &given, &[1, 2, 1], &["c", "b", "a"]),
        ("integers alone", integers, None, &sniff, &[2, 0, 2], &["LABEL_0", "LABEL_1", "LABEL_2"]),
        ("integers without 0", "text,label\n1,5\n2,1\n3,5\n", None, &sniff, &[1, 0, 1], &["1", "5"]),
        ("bars", "text|label\n1, a|b\n2|a\n", None, &sniff, &[0, 1], &["b", "a"]),
        ("integers and names", integers, list, &sniff, &[2, 0, 2], &["a", "b", "c"]),
        ("names that are integers", integers, Some(r#"["2", "0"]"#), &sniff, &[0, 1, 0], &["2", "0"]),
    ];
    let mut wrong = Vec::new();
    for (what, content, categories, options, labels, names) in table {
        match read_as("a.csv", content.as_bytes(), categories, options) {
            Ok(set) if set.labels == labels && set.names == names => {}
            found => wrong.push(format!("{what}: {found:?}")),
        }
    }
    report(wrong);
}

#[test]
fn each_error_says_where() {
    let sniff = ReadOptions::default();
    let (body, same) = (columns("body", "label"), columns("text", "text"));
    let cards = names(&["card_arrival", "card_lost", "top_up", "pin"]);
    type Case<'a> = (&'a str, &'a [u8], Option<&'a str>, &'a ReadOptions, &'a [&'a str]);
    let table: Vec<Case> = vec![
        ("a.csv", b"", None, &sniff, &["a.csv", "the file is empty"]),
        ("a.csv", b"\n\n", None, &sniff, &["the file is empty"]),
        ("a.jsonl", b"\n", None, &sniff, &["the file is empty"]),
        ("a.csv", b"text,label\n", None, &sniff, &["a header and no rows"]),
        ("a.arrow", b"ARROW1", None, &sniff, &["expected .csv, .tsv, .jsonl or .parquet", ".arrow"]),
        (
            "a.csv",
            b"title,label\nx,y\n",
            None,
            &sniff,
            &["no column for the text", "`title`, `label`", "--text-col"],
        ),
        (
            "a.csv",
            b"text,topic\nx,y\n",
            None,
            &sniff,
            &["no column for the label", "`text`, `topic`", "--label-col"],
        ),
        ("a.csv", b"text,label\nx,y\n", None, &body, &["no column `body`", "`text`, `label`"]),
        ("a.csv", b"text,label\nx,y\n", None, &same, &["both the text and the label"]),
        (
            "a.csv",
            b"text,label\nx,y\n\n\"a\nb\",y\na,b,y\n",
            None,
            &sniff,
            &["line 6", "expected 2 fields", "found 3"],
        ),
        ("a.csv", b"text,label\nx\n", None, &sniff, &["line 2", "expected 2 fields", "found 1"]),
        ("a.csv", b"text,label\na,x\n\"b,y\nc,z\n", None, &sniff, &["line 3", "never closes"]),
        ("a.csv", b"label,text\nx,a\ny,\"b\nz,c\n", None, &sniff, &["line 3", "never closes"]),
        ("a.csv", b"text,label\na,x\nb, \n", None, &sniff, &["line 3", "`label`", "empty"]),
        ("a.csv", b"text,label\na,x\nol\xe9,y\n", None, &sniff, &["line 3, byte 3", "byte 18 of the file", "0xe9"]),
        ("a.csv", b"\xff\xfet\0e\0x\0t\0", None, &sniff, &["UTF-16", "iconv"]),
        ("a.csv", b"text,label\na,99999999\nb,2\n", None, &sniff, &["line 2", "99999999", "--label-col"]),
        ("a.jsonl", b"{\"text\":\"a\",\"label\":\"x\"}\n{\"text\":", None, &sniff, &["line 2", "JSON object"]),
        (
            "a.jsonl",
            b"{\"text\":\"a\",\"label\":\"x\"}\n{\"text\":\"b\"}",
            None,
            &sniff,
            &["line 2", "`label` is missing"],
        ),
        ("a.jsonl", b"{\"text\":\"a\",\"label\":{\"x\":1}}", None, &sniff, &["line 1", "`label` is "]),
        ("a.csv", b"text,label\na,x\n", Some("{}"), &sniff, &["categories.json", "JSON list"]),
        ("a.csv", b"text,label\na,x\n", Some(r#"["x","x"]"#), &sniff, &["categories.json", "`x` is listed twice"]),
        ("a.csv", b"text,label\na,z\n", Some(r#"["x"]"#), &sniff, &["unknown label `z`", "categories.json"]),
        (
            "a.csv",
            b"text,label\na,pin\nb,card_arival\nc,Pin\n",
            None,
            &cards,
            &["line 3", "unknown label `card_arival`", "`card_arrival`, `card_lost`", "1 more such row"],
        ),
        ("a.csv", b"text,label\na,1\nb,4\n", None, &cards, &["line 3", "unknown label `4`"]),
    ];
    let mut wrong = Vec::new();
    for (name, content, categories, options, expected) in table {
        let found = match read_as(name, content, categories, options) {
            Ok(set) => format!("{set:?}"),
            Err(e) => e.to_string(),
        };
        if let Some(missing) = expected.iter().find(|part| !found.contains(*part)) {
            wrong.push(format!("{:?}: no `{missing}` in: {found}", String::from_utf8_lossy(content)));
        }
    }
    report(wrong);
    let missing = read("no/such.csv", &sniff).unwrap_err().to_string();
    assert!(missing.starts_with("no/such.csv: "), "{missing}");
}

#[test]
fn warnings_are_counted() {
    let set = read_as("a.csv", b"text,label\na,x\n\" \",x\n\"\",y\n", None, &names(&["x", "y", "z", "w"])).unwrap();
    let expected = ["2 texts are empty (the first at line 3)", "2 of 4 labels have no row (the first is `z`)"];
    assert_eq!(set.warnings, expected);
    assert_eq!((set.len(), set.counts()), (3, vec![2, 1, 0, 0]));
}

#[test]
fn texts_to_predict() {
    let folder = tempfile::tempdir().unwrap();
    let table: [(&str, &str, &[&str]); 4] = [
        ("a.txt", "\u{feff}one\r\n\ntwo, \"2\"\n", &["one", "", "two, \"2\""]),
        ("a.csv", "id,text\n1,\"one\n\"\n2,two\n", &["one\n", "two"]),
        ("a.tsv", "sentence\tid\none\t1\n", &["one"]),
        ("a.jsonl", "{\"query\": \"one\"}\n", &["one"]),
    ];
    for (name, content, expected) in table {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        assert_eq!(read_texts(Some(&path), None).unwrap(), expected, "{name}");
    }
    assert_eq!(read_texts(Some(&folder.path().join("a.csv")), Some("id")).unwrap(), ["1", "2"]);
    let empty = folder.path().join("b.txt");
    fs::write(&empty, "").unwrap();
    assert!(read_texts(Some(&empty), None).unwrap_err().to_string().contains("no text in it"));
}

/// Rows that begin in one block of the file and end in another, quoted line breaks and all.
#[test]
fn long_files_are_read_block_by_block() {
    let folder = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..20_000)
        .map(|i| match i % 3 {
            0 => format!("plain {i}"),
            1 => format!("\n\nline breaks,\n\n and \"quotes\" {i}\n"),
            _ => "x".repeat(if i == 11_000 { 300_000 } else { i % 50 }) + "y",
        })
        .collect();
    let path = folder.path().join("a.csv");
    let mut csv = csv::Writer::from_path(&path).unwrap();
    csv.write_record(["id", "text"]).unwrap();
    texts.iter().enumerate().for_each(|(i, t)| csv.write_record([&i.to_string(), t]).unwrap());
    csv.into_inner().unwrap();
    assert_eq!(read_texts(Some(&path), None).unwrap(), texts);
    let mut parts = Texts::open(Some(&path), None).unwrap();
    assert_eq!(parts.part(7).unwrap().unwrap(), texts[..7]);
    assert!(parts.part(usize::MAX).unwrap().unwrap().len() < 15_000, "not all at once");

    // What is wrong far behind is found, in the right line.
    let lines = 2 + fs::read_to_string(&path).unwrap().lines().count();
    let wrong: [(&[u8], String); 3] = [
        (b"\n1,2,3\n4,5\n", format!("line {lines}: expected 2 fields")),
        (b"\n1,\"open\n4,5\n", format!("line {lines}: a double quote")),
        (b"\n1,\xff\n4,5\n", format!("line {lines}, byte 3")),
    ];
    for (end, message) in wrong {
        let other = folder.path().join("b.csv");
        fs::write(&other, [&fs::read(&path).unwrap(), end].concat()).unwrap();
        let error = read_texts(Some(&other), None).unwrap_err().to_string();
        assert!(error.contains(&message), "{error} has no {message}");
    }
}

fn set(rows: &[(&str, u32)], n_labels: usize) -> Dataset {
    let (texts, labels) = rows.iter().map(|(text, label)| (text.to_string(), *label)).unzip();
    let names = (0..n_labels).map(|i| format!("LABEL_{i}")).collect();
    Dataset { texts, labels, names, ..Dataset::default() }
}

#[test]
fn overlaps_are_counted() {
    let train = set(&[("a b", 0), ("A  b ", 0), ("c", 1), ("C", 0), ("d", 1)], 2);
    let test = set(&[("D", 0), ("d", 1), ("e", 1), ("a b", 0)], 2);
    let expected =
        Overlap { duplicates_in_train: 2, duplicates_in_test: 1, conflicting_labels: 2, leaked_into_test: 3 };
    assert_eq!(overlap(&train, &test), expected);
    assert_eq!(overlap(&set(&[], 0), &set(&[], 0)), Overlap::default());
}

#[test]
fn split_edges() {
    let rows = set(&[("a", 0), ("A ", 1), ("b", 0), ("c", 1), ("only", 2)], 4);
    for (fraction, train_len) in [(0.0, 5), (-1.0, 5), (f64::NAN, 5)] {
        assert_eq!(split(&rows, fraction, 1).0.len(), train_len, "{fraction}");
    }
    // Even when everything is asked for, each label still trains.
    for seed in 0..20 {
        let (train, validation) = split(&rows, 1.0, seed);
        assert!(train.counts()[..3].iter().all(|&n| n > 0), "{train:?}");
        assert_eq!(train.len() + validation.len(), rows.len());
    }
    assert_ne!(split(&many(200), 0.5, 1), split(&many(200), 0.5, 2));
}

/// `n` different texts of four labels.
fn many(n: usize) -> Dataset {
    let texts = (0..n).map(|i| format!("text {i}")).collect();
    let labels = (0..n as u32).map(|i| i % 4).collect();
    Dataset { texts, labels, ..set(&[], 4) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// A row added later moves at most one other: the one at the border of its label.
    #[test]
    fn added_rows_do_not_reshuffle(n in 0usize..60, fraction in 0.0..1.0f64, seed: u64) {
        let side = |set: &Dataset| -> HashSet<String> { split(set, fraction, seed).1.texts.into_iter().collect() };
        let (before, after) = (side(&many(n)), side(&many(n + 1)));
        let new = format!("text {n}");
        let moved: Vec<&String> = before.symmetric_difference(&after).filter(|t| **t != new).collect();
        prop_assert!(moved.len() <= 1, "{moved:?}");
    }

    /// Each label gives its fraction, to half a text; repeated texts stay together.
    #[test]
    fn the_fraction_is_kept(fraction in 0.05..0.95f64, seed: u64) {
        let mut rows = many(400);
        rows.texts.extend_from_within(..);
        rows.labels.extend_from_within(..);
        let (train, validation) = split(&rows, fraction, seed);
        for count in validation.counts() {
            prop_assert!((count as f64 / 2.0 - 100.0 * fraction).abs() <= 0.5, "{count} of 200 at {fraction}");
        }
        prop_assert_eq!(overlap(&train, &validation).leaked_into_test, 0);
    }

    /// Whatever the bytes, an answer and no panic.
    #[test]
    fn any_bytes(content: Vec<u8>, text in "[a,;\"\n\t]{0,40}") {
        for name in ["a.csv", "a.tsv", "a.jsonl"] {
            let _ = read_as(name, &content, None, &ReadOptions::default());
            let _ = read_as(name, format!("text,label\n{text}").as_bytes(), None, &ReadOptions::default());
        }
    }
}
