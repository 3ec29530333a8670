//! Sentences through a model on several threads, in one of two ways: many chunks, each on a thread of its own without
//! any synchronisation, or one sentence on all threads.

use super::{Model, Workspace};
use crate::batch::{Batch, Encoding};
use crate::error::{Error, Result};
use crate::spec::HeadSpec;
use quetsch_kernels::team::Team;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Tokens of a chunk: its activations stay in the second-level cache.
const CHUNK: usize = 128;

/// Threads and buffers, kept from one call to the next; the threads start with the first work for them, and sleep when
/// there is none.
pub struct Session {
    team: Team,
    spaces: Mutex<Vec<Workspace>>,
    together: bool,
}

impl Session {
    /// With `threads` threads, the caller's included. If this process may not use so many at a time (its CPU quota or
    /// affinity), a sentence is not split: its threads would wait for one another.
    pub fn new(threads: usize) -> Session {
        let together = threads > 1 && std::thread::available_parallelism().is_ok_and(|n| threads <= n.get());
        Session { team: Team::new(threads), spaces: Mutex::default(), together }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// Threads that a single sentence is split over.
    pub fn threads_for_one(&self) -> usize {
        if self.together { self.team.threads() } else { 1 }
    }

    /// [`Model::forward`] of one batch, on all threads; on the caller's alone if they cannot run at the same time.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn forward(&self, model: &Model, ws: &mut Workspace, batch: &Batch) -> Result<Vec<f32>> {
        match self.together {
            true => model.forward_on(&self.team, ws, batch),
            false => model.forward(ws, batch),
        }
    }

    /// Logits `[sentences, labels]`, or `[tokens, labels]` of a head on tokens, in the order given. Sentences are packed into chunks of about `CHUNK` tokens that
    /// the threads take one after the other; with fewer chunks than threads, all threads work on each. An answer
    /// depends neither on who shares its chunk nor on the number of threads.
    ///
    /// # Errors
    /// A sentence that the model cannot read (see [`Batch::new`]), or a model without a head.
    pub fn logits(&self, model: &Model, sentences: &[Encoding]) -> Result<Vec<f32>> {
        if model.spec.head == HeadSpec::None {
            return Err(Error::invalid("this model has no classification head: train one first"));
        }
        let chunks = chunks(sentences);
        let done = Mutex::new(Vec::with_capacity(chunks.len()));
        let run = |together: bool, chunk: &Range<usize>| {
            let batch = Batch::new(&model.spec, &sentences[chunk.clone()]);
            let mut space = self.spaces.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
            let logits = batch.and_then(|batch| match together {
                true => self.forward(model, &mut space, &batch),
                false => model.forward(&mut space, &batch),
            });
            self.spaces.lock().unwrap_or_else(PoisonError::into_inner).push(space);
            done.lock().unwrap_or_else(PoisonError::into_inner).push((chunk.start, logits));
        };
        let threads = self.team.threads();
        if chunks.len() < threads && self.together {
            chunks.iter().for_each(|chunk| run(true, chunk));
        } else {
            let next = AtomicUsize::new(0);
            self.team.fork(threads.min(chunks.len()), |_| {
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    run(false, chunk);
                }
            });
        }
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable_by_key(|(start, _)| *start);
        let mut out = Vec::with_capacity(sentences.len() * model.spec.head.labels());
        for (_, logits) in done {
            out.extend(logits?);
        }
        Ok(out)
    }
}

/// Neighbours of together at most `CHUNK` tokens; a longer sentence is a chunk.
fn chunks(sentences: &[Encoding]) -> Vec<Range<usize>> {
    let mut chunks = vec![];
    let (mut first, mut tokens) = (0, 0);
    for (i, e) in sentences.iter().enumerate() {
        if tokens + e.ids.len() > CHUNK && i > first {
            chunks.push(first..i);
            (first, tokens) = (i, 0);
        }
        tokens += e.ids.len();
    }
    if first < sentences.len() {
        chunks.push(first..sentences.len());
    }
    chunks
}
