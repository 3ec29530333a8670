//! Labelled texts as a model reads them.

use super::Dataset;
use crate::Result;
use crate::batch::Encoding;
use crate::task::{Level, Targets, Units};
use crate::tokenizer::Tokenizer;

/// Token ids, the output rows that answer, and what is true of these.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    /// Tokens, by sentence.
    pub encodings: Vec<Encoding>,
    /// What has an answer.
    pub units: Units,
    /// As [`Dataset::labels`], of the units that have an output row.
    pub labels: Vec<u32>,
    /// As [`Dataset::values`], likewise.
    pub values: Vec<f32>,
    /// Words without an output row: cut off, or of no token. They are not learned from and not scored.
    pub lost_words: usize,
    outputs: usize,
}

impl Examples {
    /// Tokenises a set.
    ///
    /// # Errors
    /// `max_length` has no room for the special tokens.
    pub fn read(set: &Dataset, tokenizer: &Tokenizer, max_length: usize, threads: usize) -> Result<Examples> {
        let outputs = set.names.len();
        if set.task.level == Level::Sentence {
            let encodings = tokenizer.encode_all(&set.texts, max_length, threads)?;
            let (labels, values) = (set.labels.clone(), set.values.clone());
            return Ok(Examples { encodings, labels, values, outputs, ..Examples::default() });
        }
        let mut examples = Examples { units: Units::words(), outputs, ..Examples::default() };
        let mut word = 0;
        for (encoding, first) in tokenizer.encode_words_all(&set.words, max_length, threads)? {
            for place in &first {
                match place {
                    None => examples.lost_words += 1,
                    Some(_) => {
                        examples.labels.extend(set.labels.get(word));
                        let row = set.values.get(word * outputs..(word + 1) * outputs);
                        examples.values.extend_from_slice(row.unwrap_or(&[]));
                    }
                }
                word += 1;
            }
            examples.encodings.push(encoding);
            examples.units.push(first.into_iter().flatten());
        }
        Ok(examples)
    }

    /// Number of sentences.
    pub fn len(&self) -> usize {
        self.encodings.len()
    }

    /// Whether there is no sentence.
    pub fn is_empty(&self) -> bool {
        self.encodings.is_empty()
    }

    /// Number of units.
    pub fn count(&self) -> usize {
        self.units.count(self.len())
    }

    /// What is true.
    pub fn targets(&self) -> Targets<'_> {
        match self.values.is_empty() {
            true => Targets::Classes(&self.labels),
            false => Targets::Values { values: &self.values, outputs: self.outputs },
        }
    }

    /// Adds sentences that nothing is known about.
    pub fn extend_unlabelled(&mut self, others: Examples, is_numbers: bool) {
        let units = others.count();
        for (i, encoding) in others.encodings.into_iter().enumerate() {
            self.encodings.push(encoding);
            self.units.push(others.units.tokens(i).unwrap_or(&[]).iter().copied());
        }
        match is_numbers {
            true => self.values.resize(self.values.len() + units * self.outputs, f32::NAN),
            false => self.labels.resize(self.labels.len() + units, crate::task::UNLABELLED),
        }
    }

    /// Some of the sentences.
    pub fn subset(&self, sentences: impl IntoIterator<Item = usize>) -> Examples {
        let sentences: Vec<usize> = sentences.into_iter().collect();
        let units = || sentences.iter().flat_map(|s| self.units.range(*s));
        let outputs = self.outputs;
        Examples {
            encodings: sentences.iter().map(|s| self.encodings[*s].clone()).collect(),
            units: self.units.subset(sentences.iter().copied()),
            labels: units().filter_map(|u| self.labels.get(u).copied()).collect(),
            values: units()
                .filter_map(|u| self.values.get(u * outputs..(u + 1) * outputs))
                .flatten()
                .copied()
                .collect(),
            lost_words: 0,
            outputs,
        }
    }
}
