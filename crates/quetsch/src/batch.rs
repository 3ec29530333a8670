//! A ragged batch: sentences packed end to end, no padding anywhere.

use crate::error::{Error, Result};
use crate::spec::ModelSpec;
use std::ops::Range;

/// One tokenised sentence (or pair of sentences) as the model reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Token types; empty means all 0.
    pub types: Vec<u32>,
}

/// Sentences packed end to end: sentence `i` is `ids[starts[i]..starts[i + 1]]`. `positions` and `types` run beside
/// `ids`.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids. `[tokens]`
    pub ids: Vec<u32>,
    /// Position ids. `[tokens]`
    pub positions: Vec<u32>,
    /// Token types. `[tokens]`
    pub types: Vec<u32>,
    /// Sentence borders. `[sentences + 1]`
    pub starts: Vec<usize>,
}

impl Batch {
    /// Packs sentences; positions by the family's rule.
    ///
    /// # Errors
    /// An empty sentence, one longer than the position table, or an id outside the vocabulary.
    pub fn new<'a>(spec: &ModelSpec, sentences: impl IntoIterator<Item = &'a Encoding>) -> Result<Batch> {
        let mut b = Batch { starts: vec![0], ..Batch::default() };
        for e in sentences {
            b.push(spec, e)?;
        }
        Ok(b)
    }

    fn push(&mut self, spec: &ModelSpec, e: &Encoding) -> Result<()> {
        let (n, i) = (e.ids.len(), self.sentences());
        if n == 0 {
            return Err(Error::invalid(format!(
                "sentence {i} has no token; even an empty text has [CLS] and [SEP]"
            )));
        }
        if n > spec.longest() {
            return Err(Error::invalid(format!(
                "sentence {i} has {n} tokens, the model's position table has {}; truncate with max_length",
                spec.longest()
            )));
        }
        if let Some(id) = e.ids.iter().find(|id| **id as usize >= spec.vocab) {
            return Err(Error::invalid(format!(
                "sentence {i} has token id {id}, the model's vocabulary has {} rows: tokenizer and model differ",
                spec.vocab
            )));
        }
        if !e.types.is_empty() && e.types.len() != n {
            return Err(Error::invalid(format!("sentence {i} has {n} ids and {} token types", e.types.len())));
        }
        // A tokenizer may number the two texts of a pair for a model that does not tell them apart.
        let types = if spec.family.reads_types() { &e.types[..] } else { &[] };
        if let Some(t) = types.iter().find(|t| **t as usize >= spec.token_types) {
            return Err(Error::invalid(format!(
                "sentence {i} has token type {t}, the model knows {}",
                spec.token_types
            )));
        }
        self.ids.extend_from_slice(&e.ids);
        self.positions.extend(spec.family.positions(&e.ids));
        self.types.extend_from_slice(types);
        self.types.resize(self.ids.len(), 0);
        self.starts.push(self.ids.len());
        Ok(())
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of sentences.
    pub fn sentences(&self) -> usize {
        self.starts.len() - 1
    }

    /// The token range of each sentence.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.starts.windows(2).map(|w| w[0]..w[1])
    }
}
