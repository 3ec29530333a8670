//! Out-of-fold logits: what a teacher says about sentences that it was not trained on.

use super::fit::{Encoded, Fit};
use super::make::Run;
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use quetsch::atomic::write_file;
use quetsch::checkpoint::Checkpoint;
use quetsch::rng::{Rng, key};
use quetsch::runtime::Model;
use quetsch_train::Objective;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The logits `[sentences, labels]` as little-endian f32.
pub const LOGITS: &str = "out-of-fold.f32";
/// What they belong to.
pub const FACTS: &str = "out-of-fold.json";

#[derive(Serialize, Deserialize)]
struct Facts {
    /// Hash of the training data and its split.
    data: String,
    /// Sentences, or words that have an answer.
    sentences: usize,
    labels: usize,
}

fn to_bytes(logits: &[f32]) -> Vec<u8> {
    logits.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn from_bytes(bytes: &[u8], expected: usize) -> Option<Vec<f32>> {
    let whole = bytes.len() == 4 * expected;
    whole.then(|| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// Trains `folds` models from `start`, each without one part of the training sentences, and gathers each one's logits
/// on its part. The files for the stage's folder.
pub(super) fn train(
    run: &Run,
    start: &Checkpoint,
    objective: Objective,
    folds: usize,
    seed: u64,
    ui: &Ui,
) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let (n, labels) = (run.corpus.train.len(), start.spec.head.labels());
    let mut order: Vec<usize> = (0..n).collect();
    Rng::new(key(&[seed, 0xf01d])).shuffle(&mut order);
    let all = &run.encoded.train;
    let units = all.count();
    let mut logits = vec![0.0; units * labels];
    for fold in 0..folds {
        let (mut inside, mut outside) = (vec![], vec![]);
        for (i, row) in order.iter().enumerate() {
            if i % folds == fold { outside.push(*row) } else { inside.push(*row) }
        }
        inside.sort_unstable();
        let state = run.job.state().join(format!("fold-{fold}"));
        let done = state.join("logits.f32");
        let before = std::fs::read(&done).ok().filter(|_| run.job.resume);
        let left_out = all.subset(outside.iter().copied());
        let found = match before.and_then(|b| from_bytes(&b, left_out.count() * labels)) {
            Some(found) => found,
            None => {
                let encoded = Encoded {
                    max_length: run.encoded.max_length,
                    train: all.subset(inside.iter().copied()),
                    validation: run.encoded.validation.clone(),
                };
                let fit = Fit {
                    name: &format!("{} {}/{folds}", run.job.id, fold + 1),
                    start,
                    tokenizer: &run.model.tokenizer,
                    encoded: &encoded,
                    objective,
                    settings: run.settings,
                    sparsity: run.sparsity,
                    quant: None,
                    threads: run.job.threads,
                    state: &state,
                    key: &format!("{} fold {fold} of {folds}", run.key),
                    resume: run.job.resume,
                };
                let trained = fit.run(ui)?;
                let model = Model::pack(&trained.checkpoint);
                let found = model.answers(&left_out.encodings, &left_out.units, run.job.threads)?;
                write_file(&done, &to_bytes(&found))?;
                found
            }
        };
        let rows = outside.iter().flat_map(|row| all.units.range(*row));
        for (unit, found) in rows.zip(found.chunks_exact(labels)) {
            logits[unit * labels..(unit + 1) * labels].copy_from_slice(found);
        }
    }
    let facts = Facts { data: run.corpus.hash.clone(), sentences: units, labels };
    Ok(vec![(LOGITS, to_bytes(&logits)), (FACTS, super::pretty(&facts)?)])
}

/// A teacher's out-of-fold logits on these training sentences.
pub fn read(teacher: &Path, data: &str, sentences: usize, labels: usize) -> Result<Vec<f32>> {
    let (path, file) = (teacher.join(FACTS), teacher.join(LOGITS));
    let bytes = std::fs::read(&path)
        .with_context(|| format!("{} has no out-of-fold logits: train it with `folds`", teacher.display()))?;
    let facts: Facts = serde_json::from_slice(&bytes).with_context(|| format!("cannot read {}", path.display()))?;
    if facts.data != data || (facts.sentences, facts.labels) != (sentences, labels) {
        bail!(
            "{}: made from other training data ({} sentences, {} labels; now {sentences} and {labels}): the same file, \
             columns, validation share and seed are needed",
            path.display(),
            facts.sentences,
            facts.labels
        );
    }
    let bytes = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    from_bytes(&bytes, sentences * labels)
        .with_context(|| format!("{}: {} bytes, expected {}", file.display(), bytes.len(), 4 * sentences * labels))
}
