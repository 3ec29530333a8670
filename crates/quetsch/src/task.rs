//! What a model is asked. From a [`Task`] follow how data are read, the loss, what answers are made of, and the figures.
//!
//! The problem is Hugging Face's `problem_type`; the level follows from the head: `..ForTokenClassification` answers for
//! every word of a sentence, all others for the sentence.

use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::metrics::softmax;
use crate::spec::{HeadSpec, ModelSpec};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// What outputs mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Problem {
    /// One of the labels is right: softmax, cross-entropy.
    #[default]
    SingleLabel,
    /// Each label is right or not: sigmoid, binary cross-entropy.
    MultiLabel,
    /// Outputs are numbers.
    Regression,
}

/// What answers are about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// One answer a text.
    #[default]
    Sentence,
    /// One answer a word.
    Token,
}

/// A problem at a level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Task {
    /// What outputs mean.
    pub problem: Problem,
    /// What they are about.
    pub level: Level,
}

/// The probability from which on a label of a multi-label task is given.
pub const THRESHOLD: f32 = 0.5;

/// The class of a unit without one: it is not scored, and is learned from a teacher alone.
pub const UNLABELLED: u32 = u32::MAX;

impl Problem {
    /// Every problem with its name and that in config.json.
    pub const ALL: [(Problem, &str, &str); 3] = [
        (Problem::SingleLabel, "single-label", "single_label_classification"),
        (Problem::MultiLabel, "multi-label", "multi_label_classification"),
        (Problem::Regression, "regression", "regression"),
    ];

    /// Its `problem_type` in config.json.
    pub fn config_name(self) -> &'static str {
        Problem::ALL.iter().find(|(p, ..)| *p == self).map_or("", |(_, _, name)| name)
    }

    /// What a config.json says. One that is silent means one label of many; with a single output, that label or not, as
    /// transformers' pipelines read it.
    pub fn of_config(config: &Map<String, Value>, outputs: usize) -> Result<Problem, String> {
        match config.get("problem_type").filter(|v| !v.is_null()) {
            None if outputs == 1 => Ok(Problem::MultiLabel),
            None => Ok(Problem::SingleLabel),
            Some(found) => {
                let known = Problem::ALL.iter().find(|(_, _, name)| found.as_str() == Some(name));
                known.map(|(p, ..)| *p).ok_or_else(|| {
                    let names = Problem::ALL.map(|(_, _, name)| name).join(", ");
                    format!("problem_type {found} is not supported; supported are: {names}")
                })
            }
        }
    }

    /// Turns the logits of one unit into its scores: softmax, sigmoid, or the numbers themselves.
    pub fn scores(self, row: &mut [f32]) {
        match self {
            Problem::SingleLabel => softmax(row),
            Problem::MultiLabel => row.iter_mut().for_each(|x| *x = sigmoid(*x)),
            Problem::Regression => {}
        }
    }
}

/// 1 / (1 + exp(-x))
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(Problem::ALL.iter().find(|(p, ..)| p == self).map_or("", |(_, name, _)| name))
    }
}

impl FromStr for Problem {
    type Err = Error;

    fn from_str(name: &str) -> Result<Problem, Error> {
        let found = Problem::ALL.iter().find(|(_, n, _)| *n == name).map(|(p, ..)| *p);
        let names = Problem::ALL.map(|(_, n, _)| n).join(", ");
        found.ok_or_else(|| Error::invalid(format!("unknown task {name:?}, expected one of {names}")))
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level {
            Level::Sentence => write!(f, "{}", self.problem),
            Level::Token => write!(f, "{} for each word", self.problem),
        }
    }
}

impl Task {
    /// Of a model; nothing for a bare body.
    pub fn of(spec: &ModelSpec, config: &Map<String, Value>) -> Option<Task> {
        let level = match spec.head {
            HeadSpec::None => return None,
            HeadSpec::Tokens { .. } => Level::Token,
            HeadSpec::MeanMlp { .. } | HeadSpec::Pooler { .. } => Level::Sentence,
        };
        // A config that was read has a problem that is known; one made here may be empty.
        let problem = if config.is_empty() {
            Ok(Problem::SingleLabel)
        } else {
            Problem::of_config(config, spec.head.labels())
        };
        Some(Task { problem: problem.unwrap_or_default(), level })
    }
}

impl Checkpoint {
    /// What the model is asked; nothing for a bare body.
    pub fn task(&self) -> Option<Task> {
        Task::of(&self.spec, &self.config)
    }

    /// The same weights, asked otherwise.
    pub fn with_problem(mut self, problem: Problem) -> Checkpoint {
        self.config.insert("problem_type".into(), json!(problem.config_name()));
        self
    }
}

/// The rows of a model's output that answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Units {
    /// One row a sentence, all of them.
    #[default]
    Sentences,
    /// Rows are tokens; a word's answer stands at its first one.
    Words {
        /// Borders of the sentences in `tokens`. `[sentences + 1]`
        starts: Vec<usize>,
        /// The first token of each word, counted within its sentence.
        tokens: Vec<u32>,
    },
}

impl Units {
    /// Words, of no sentence yet.
    pub fn words() -> Units {
        Units::Words { starts: vec![0], tokens: vec![] }
    }

    /// Adds a sentence by the first tokens of its words.
    pub fn push(&mut self, first: impl IntoIterator<Item = u32>) {
        if let Units::Words { starts, tokens } = self {
            tokens.extend(first);
            starts.push(tokens.len());
        }
    }

    /// Numbers of a sentence's units.
    pub fn range(&self, sentence: usize) -> Range<usize> {
        match self {
            Units::Sentences => sentence..sentence + 1,
            Units::Words { starts, .. } => starts[sentence]..starts[sentence + 1],
        }
    }

    /// First tokens of a sentence's words; nothing where the sentence itself is the unit.
    pub fn tokens(&self, sentence: usize) -> Option<&[u32]> {
        match self {
            Units::Sentences => None,
            Units::Words { tokens, .. } => Some(&tokens[self.range(sentence)]),
        }
    }

    /// How many units so many sentences have.
    pub fn count(&self, sentences: usize) -> usize {
        if sentences == 0 { 0 } else { self.range(sentences - 1).end }
    }

    /// Those of some sentences.
    pub fn subset(&self, sentences: impl IntoIterator<Item = usize>) -> Units {
        let Units::Words { .. } = self else { return Units::Sentences };
        let mut some = Units::words();
        sentences.into_iter().for_each(|s| some.push(self.tokens(s).unwrap_or(&[]).iter().copied()));
        some
    }

    /// The output rows that answer, `[units, width]`, of `[sentences, width]` or `[tokens, width]`; `lengths` are the
    /// sentences' tokens.
    pub fn gather(&self, output: Vec<f32>, width: usize, lengths: impl IntoIterator<Item = usize>) -> Vec<f32> {
        let Units::Words { tokens, .. } = self else { return output };
        let (mut rows, mut first) = (Vec::with_capacity(tokens.len() * width), 0);
        for (sentence, length) in lengths.into_iter().enumerate() {
            for &token in self.tokens(sentence).unwrap_or(&[]) {
                rows.extend_from_slice(&output[(first + token as usize) * width..][..width]);
            }
            first += length;
        }
        rows
    }
}

/// What is true of units.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// The class of each, or [`UNLABELLED`].
    Classes(&'a [u32]),
    /// `[units, outputs]`: 1 and 0 for labels that are right and wrong, or numbers. NaN where nothing is known.
    Values {
        /// The numbers, row-major.
        values: &'a [f32],
        /// Outputs of the model.
        outputs: usize,
    },
}

impl<'a> From<&'a [u32]> for Targets<'a> {
    fn from(classes: &'a [u32]) -> Targets<'a> {
        Targets::Classes(classes)
    }
}

impl<'a> From<&'a Vec<u32>> for Targets<'a> {
    fn from(classes: &'a Vec<u32>) -> Targets<'a> {
        Targets::Classes(classes)
    }
}

impl<'a, const N: usize> From<&'a [u32; N]> for Targets<'a> {
    fn from(classes: &'a [u32; N]) -> Targets<'a> {
        Targets::Classes(classes)
    }
}

impl<'a> Targets<'a> {
    /// Number of units.
    pub fn len(&self) -> usize {
        match self {
            Targets::Classes(classes) => classes.len(),
            Targets::Values { values, outputs } => values.len() / (*outputs).max(1),
        }
    }

    /// Whether there is no unit.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The class of a unit: 0 where targets are numbers, [`UNLABELLED`] where nothing is known.
    pub fn class(&self, unit: usize) -> u32 {
        match self {
            Targets::Classes(classes) => classes[unit],
            Targets::Values { .. } if self.row(unit).iter().any(|v| v.is_nan()) => UNLABELLED,
            Targets::Values { .. } => 0,
        }
    }

    /// The numbers of a unit; none where it has a class.
    pub fn row(&self, unit: usize) -> &'a [f32] {
        match *self {
            Targets::Classes(_) => &[],
            Targets::Values { values, outputs } => &values[unit * outputs..][..outputs],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_those_of_transformers() {
        let config = |json: Value| json.as_object().cloned().unwrap();
        for (problem, name, in_config) in Problem::ALL {
            assert_eq!((problem.to_string().as_str(), name.parse().unwrap()), (name, problem));
            assert_eq!(Problem::of_config(&config(json!({ "problem_type": in_config })), 1), Ok(problem));
        }
        assert_eq!(Problem::of_config(&config(json!({ "problem_type": null })), 3), Ok(Problem::SingleLabel));
        assert_eq!(Problem::of_config(&Map::new(), 1), Ok(Problem::MultiLabel));
        assert!(Problem::of_config(&config(json!({ "problem_type": "ranking" })), 2).is_err());
        assert!("single".parse::<Problem>().is_err());
    }

    #[test]
    fn units_are_rows_of_the_output() {
        let mut words = Units::words();
        words.push([1, 3]);
        words.push([]);
        words.push([2]);
        assert_eq!((words.range(0), words.range(1), words.range(2)), (0..2, 2..2, 2..3));
        assert_eq!((words.count(0), words.count(3)), (0, 3));
        let output: Vec<f32> = (0..22).map(|i| i as f32).collect();
        assert_eq!(words.gather(output, 2, [5, 2, 4]), [2.0, 3.0, 6.0, 7.0, 18.0, 19.0]);
        assert_eq!(words.subset([2, 0]).tokens(1), Some(&[1, 3][..]));
        assert_eq!(Units::Sentences.gather(vec![1.0, 2.0], 1, [5, 5]), [1.0, 2.0]);
    }
}
