//! A whole classifier: tokeniser, packed model, labels.

use super::{Arithmetic, Model, Session};
use crate::batch::Encoding;
use crate::data::{Dataset, Examples};
use crate::dir::{self, Source};
use crate::error::{Error, Result};
use crate::spec::ModelSpec;
use crate::task::{Level, Task};
use crate::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};

/// Text in, logits out.
pub struct Classifier {
    model: Model,
    tokenizer: Tokenizer,
    labels: Vec<String>,
    task: Task,
    max_length: usize,
    /// Where it was read, for messages.
    path: Option<PathBuf>,
}

impl Classifier {
    /// Loads a model directory. Texts are cut to `max_length` tokens; by default to what config.json says, else 256,
    /// and never beyond the position table.
    ///
    /// # Errors
    /// Whatever is wrong with the directory, or a model without a classification head.
    pub fn load(path: &Path, max_length: Option<usize>) -> Result<Classifier> {
        Classifier::load_for(path, max_length, Arithmetic::F32)
    }

    /// As [`Classifier::load`], for `floats` as in [`Model::pack_for`].
    ///
    /// # Errors
    /// As [`Classifier::load`].
    pub fn load_for(path: &Path, max_length: Option<usize>, floats: Arithmetic) -> Result<Classifier> {
        let source = Source::open(path)?;
        let (spec, labels) = (source.spec().clone(), source.labels().to_vec());
        let (task, max_length) = (source.task().unwrap_or_default(), max_length.or(source.max_length()));
        has_head(&spec).map_err(|e| Error::file(path, e.to_string()))?;
        // Half of the time until the first answer is the tokeniser's.
        let (model, tokenizer) = std::thread::scope(|scope| {
            let tokenizer = scope.spawn(|| Tokenizer::new(&dir::read_tokenizer(path)?));
            let model = Model::load_for(source, floats);
            (model, tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let (model, tokenizer) = (model?, tokenizer.map_err(|e| Error::file(path, e.to_string()))?);
        let classifier = Classifier::assemble(model, tokenizer, labels, task, max_length);
        Ok(Classifier { path: Some(path.to_owned()), ..classifier })
    }

    /// As [`Classifier::load`], from a directory that is in memory.
    ///
    /// # Errors
    /// A model without a head, a tokeniser with more ids than the model has rows.
    pub fn new(dir: &dir::ModelDir, max_length: Option<usize>) -> Result<Classifier> {
        let ck = &dir.checkpoint;
        has_head(&ck.spec)?;
        let tokenizer = Tokenizer::new(&dir.tokenizer)?;
        let (task, max_length) = (ck.task().unwrap_or_default(), max_length.or(ck.max_length));
        Ok(Classifier::assemble(Model::pack(ck), tokenizer, ck.labels.clone(), task, max_length))
    }

    fn assemble(
        model: Model,
        tokenizer: Tokenizer,
        labels: Vec<String>,
        task: Task,
        max_length: Option<usize>,
    ) -> Classifier {
        let max_length = max_length.unwrap_or(256).min(model.spec().longest());
        Classifier { model, tokenizer, labels, task, max_length, path: None }
    }

    /// What it is asked.
    pub fn task(&self) -> Task {
        self.task
    }

    /// Label names by class index.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The packed model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tokeniser.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Longest input in tokens.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Token ids of texts.
    ///
    /// # Errors
    /// A tokeniser that cannot encode.
    pub fn encode<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<Vec<Encoding>> {
        self.tokenizer.encode_all(texts, self.max_length, threads)
    }

    /// Logits `[texts, labels]`, by a session for this one call: [`Classifier::logits_in`] keeps threads and buffers.
    /// `[tokens, labels]` of a model that answers for words, see [`Classifier::words`].
    ///
    /// # Errors
    /// A tokeniser that cannot encode, ids that the model does not have, or an answer that is no number.
    pub fn logits<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<Vec<f32>> {
        self.logits_in(&Session::new(threads), texts)
    }

    /// Logits `[texts, labels]` by the threads of a session: a single text on all of them, many texts in chunks.
    ///
    /// # Errors
    /// As [`Classifier::logits`].
    pub fn logits_in<T: AsRef<str> + Sync>(&self, session: &Session, texts: &[T]) -> Result<Vec<f32>> {
        self.logits_from(session, texts, 0)
    }

    /// As [`Classifier::logits_in`], of texts that `first` others stand before.
    pub(super) fn logits_from<T: AsRef<str> + Sync>(
        &self,
        session: &Session,
        texts: &[T],
        first: usize,
    ) -> Result<Vec<f32>> {
        let encodings = self.encode(texts, session.threads())?;
        self.finite(session.logits(&self.model, &encodings)?, &encodings, first)
    }

    /// The output `[texts, labels]` or `[tokens, labels]` of these sentences, if all of it is finite: finite weights can be
    /// so large that their sums are not. `first` sentences stand before them.
    fn finite(&self, output: Vec<f32>, encodings: &[Encoding], first: usize) -> Result<Vec<f32>> {
        let Some(at) = output.iter().position(|x| !x.is_finite()) else { return Ok(output) };
        let (mut row, mut text) = (at / self.labels.len(), 0);
        let rows = |text: usize| if self.task.level == Level::Sentence { 1 } else { encodings[text].ids.len() };
        while row >= rows(text) {
            row -= rows(text);
            text += 1;
        }
        let message = format!(
            "the answer to text {} is {} for label {}, expected a finite number: some weights or scales of the model \
             are too large",
            first + text + 1,
            output[at],
            self.labels[at % self.labels.len()]
        );
        Err(self.path.as_ref().map_or_else(|| Error::invalid(&message), |path| Error::file(path, &message)))
    }

    /// A labelled set as this model reads it, and the logits `[units, labels]` on it.
    ///
    /// # Errors
    /// As [`Classifier::logits`], but for the words.
    pub fn answers(&self, set: &Dataset, threads: usize) -> Result<(Examples, Vec<f32>)> {
        let examples = Examples::read(set, &self.tokenizer, self.max_length, threads)?;
        let output = self.finite(self.model.logits(&examples.encodings, threads)?, &examples.encodings, 0)?;
        let tokens = examples.encodings.iter().map(|e| e.ids.len());
        let logits = examples.units.gather(output, self.labels.len(), tokens);
        Ok((examples, logits))
    }

    /// Logits `[labels]` of each word of each sentence; none for words that are cut off or have no token.
    ///
    /// # Errors
    /// As [`Classifier::logits`], or a model that answers for sentences.
    pub fn words(&self, sentences: &[Vec<String>], threads: usize) -> Result<Vec<Vec<Option<Vec<f32>>>>> {
        if self.task.level == Level::Sentence {
            return Err(Error::invalid("this model answers for texts, not for their words"));
        }
        let read = self.tokenizer.encode_words_all(sentences, self.max_length, threads)?;
        let (encodings, places): (Vec<_>, Vec<_>) = read.into_iter().unzip();
        let output = self.finite(self.model.logits(&encodings, threads)?, &encodings, 0)?;
        let (width, mut start) = (self.labels.len(), 0);
        let mut answers = vec![];
        for (encoding, places) in encodings.iter().zip(places) {
            let row = |place: u32| output[(start + place as usize) * width..][..width].to_vec();
            answers.push(places.into_iter().map(|place| place.map(row)).collect());
            start += encoding.ids.len();
        }
        Ok(answers)
    }
}

fn has_head(spec: &ModelSpec) -> Result<()> {
    match spec.head.labels() {
        0 => Err(Error::invalid(
            "this model has no classification head; give it one with `quetsch train --model DIR`",
        )),
        _ => Ok(()),
    }
}
