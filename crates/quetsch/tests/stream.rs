//! The pipeline: every answer, in order, whatever the number of threads; errors after the answers before them.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

use quetsch::Error;
use quetsch::data::Texts;
use quetsch::runtime::Classifier;
use quetsch::runtime::stream::stream;
use std::path::PathBuf;

fn classifier() -> Classifier {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    Classifier::load(&fixtures.join("tiny_student"), None).unwrap()
}

/// Texts of very different lengths, so that some parts take longer than others.
fn texts(n: usize) -> Vec<String> {
    (0..n).map(|i| "how do i change my pin ".repeat(1 + (i * i) % 7) + &i.to_string()).collect()
}

#[test]
fn answers_come_in_order() {
    let (classifier, texts) = (classifier(), texts(2_000));
    let expected = classifier.logits(&texts, 1).unwrap();
    for threads in [1, 2, 5] {
        let (mut seen, mut logits) = (vec![], vec![]);
        let pair = |texts, logits| (texts, logits);
        stream(&classifier, texts.clone().into(), threads, pair, |(t, l): (Vec<String>, Vec<f32>)| {
            seen.extend(t);
            logits.extend(l);
            Ok::<_, Error>(())
        })
        .unwrap();
        assert_eq!(seen, texts, "{threads} threads");
        assert!(
            logits.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()) && logits.len() == expected.len()
        );
    }
    stream(&classifier, vec![].into(), 2, |t, _| t, |_| Err(Error::invalid("no text, no answer"))).unwrap();
}

#[test]
fn an_error_comes_after_the_answers_before_it() {
    let (classifier, folder) = (classifier(), tempfile::tempdir().unwrap());
    let path = folder.path().join("texts.txt");
    let mut bytes = texts(9_000).join("\n").into_bytes();
    bytes.extend(b"\n\xff\n");
    std::fs::write(&path, bytes).unwrap();
    let mut answers = 0;
    let count = |t: Vec<String>| {
        answers += t.len();
        Ok::<_, Error>(())
    };
    let read = Texts::open(Some(&path), None).unwrap();
    let error = stream(&classifier, read, 3, |t, _| t, count).unwrap_err().to_string();
    assert!(error.contains("line 9001") && answers > 0, "{answers} answers, {error}");
}

#[test]
fn who_reads_the_answers_may_stop() {
    let (classifier, mut left) = (classifier(), 3);
    let stop = |_: Vec<String>| {
        left -= 1;
        if left == 0 { Err(Error::invalid("enough")) } else { Ok(()) }
    };
    let error = stream(&classifier, texts(5_000).into(), 4, |t, _| t, stop).unwrap_err();
    assert!(error.to_string().contains("enough"));
    assert_eq!(left, 0);
}
