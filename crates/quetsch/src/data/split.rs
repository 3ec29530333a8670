//! A validation part that stays put, and what a file repeats.

use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::Serialize;

use super::Dataset;
use crate::rng;
use crate::task::{Level, Problem, Task};

/// Two texts are the same when they differ in case and white space only.
fn normalised(text: &str) -> String {
    text.split_whitespace().map(str::to_lowercase).collect::<Vec<_>>().join(" ")
}

/// Splits into (train, validation), stratified where each text has one class: each label gives its share, rounded, to validation, but never its last
/// text, because a label never trained on cannot be validated.
///
/// Texts of a label stand in the order of a hash of the seed and the normalised text, and the first ones validate. The
/// order depends on nothing but the texts themselves, so rows that are added later do not reshuffle: a new text of a
/// label moves at most one other, the one at the border. Repeated texts are all on one side (a text that has several
/// labels goes with the first).
pub fn split(set: &Dataset, fraction: f64, seed: u64) -> (Dataset, Dataset) {
    let place = |text: &String| {
        let hash = blake3::hash(normalised(text).as_bytes());
        let words = hash.as_bytes().chunks_exact(8).map(|b| b.iter().fold(0, |word, &b| word << 8 | u64::from(b)));
        rng::key(&[seed].into_iter().chain(words).collect::<Vec<_>>())
    };
    let places: Vec<u64> = set.texts.iter().map(place).collect();
    let mut seen = HashSet::new();
    // Rows of words, several labels or numbers have no one class to spread by.
    let classes = matches!(set.task, Task { problem: Problem::SingleLabel, level: Level::Sentence });
    let mut by_label: Vec<Vec<u64>> = vec![vec![]; if classes { set.names.len() } else { 1 }];
    for (i, &place) in places.iter().enumerate() {
        if seen.insert(place) {
            by_label[if classes { set.labels[i] as usize } else { 0 }].push(place);
        }
    }
    let mut validates: HashSet<u64> = HashSet::new();
    for mut places in by_label {
        places.sort_unstable();
        let share = (fraction * places.len() as f64).round() as usize; // NaN and below 0 are 0
        validates.extend(places.iter().take(share.min(places.len().saturating_sub(1))));
    }
    let (validation, train): (Vec<usize>, Vec<usize>) =
        (0..set.len()).partition(|row| validates.contains(&places[*row]));
    (set.subset(train), set.subset(validation))
}

/// What two files repeat, by texts that differ in case and white space only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Overlap {
    /// Rows of the training file whose text an earlier row has.
    pub duplicates_in_train: usize,
    /// Rows of the test file whose text an earlier row has.
    pub duplicates_in_test: usize,
    /// Distinct texts that carry more than one label, in both files together.
    pub conflicting_labels: usize,
    /// Rows of the test file whose text is in the training file.
    pub leaked_into_test: usize,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Overlap { duplicates_in_train, duplicates_in_test, conflicting_labels, leaked_into_test } = self;
        write!(
            f,
            "repeated rows: {duplicates_in_train} in train, {duplicates_in_test} in test; \
             texts with more than one label: {conflicting_labels}; test rows also in train: {leaked_into_test}"
        )
    }
}

/// Counts repeated texts in and between a training and a test file.
pub fn overlap(train: &Dataset, test: &Dataset) -> Overlap {
    let mut overlap = Overlap::default();
    let mut labels_of: HashMap<String, HashSet<String>> = HashMap::new();
    for (text, truth) in train.texts.iter().zip(train.truths()) {
        let labels = labels_of.entry(normalised(text)).or_default();
        overlap.duplicates_in_train += usize::from(!labels.is_empty());
        labels.insert(truth);
    }
    let in_train: HashSet<String> = labels_of.keys().cloned().collect();
    let mut in_test = HashSet::new();
    for (text, truth) in test.texts.iter().zip(test.truths()) {
        let text = normalised(text);
        overlap.leaked_into_test += usize::from(in_train.contains(&text));
        labels_of.entry(text.clone()).or_default().insert(truth);
        overlap.duplicates_in_test += usize::from(!in_test.insert(text));
    }
    overlap.conflicting_labels = labels_of.values().filter(|labels| labels.len() > 1).count();
    overlap
}
