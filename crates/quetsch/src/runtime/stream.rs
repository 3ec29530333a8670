//! Many texts through a classifier as a pipeline: reading, tokenising and computing overlap, answers come out in order,
//! and memory does not grow with their number.

use super::{Classifier, Session};
use crate::data::Texts;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError, mpsc};

/// Texts that a thread takes at a time: several chunks of the forward, yet so few that all threads end together.
const PART: usize = 64;

/// Sends all texts through the model on `threads` threads. A thread reads the next part, tokenises it, computes, and
/// makes an answer of texts and logits `[texts, labels]`; `out` gets the answers in the order of the texts, on the
/// thread that called. Answers that are early wait, but no thread runs ahead by more than a few parts.
///
/// # Errors
/// Texts that cannot be read or answered, after all answers before them; or what `out` returns.
pub fn stream<A: Send, E: From<Error>>(
    classifier: &Classifier,
    texts: Texts,
    threads: usize,
    answer: impl Fn(Vec<String>, Vec<f32>) -> A + Sync,
    mut out: impl FnMut(A) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let ahead = 4 * threads.max(1);
    // The texts to come, the parts and the texts that are gone.
    let feed = Mutex::new((texts, 0, 0));
    let (written, moved) = (Mutex::new(0), Condvar::new());
    let (send, receive) = mpsc::channel();
    let lock = |m| -> std::sync::MutexGuard<usize> { Mutex::lock(m).unwrap_or_else(PoisonError::into_inner) };
    let work = |send: mpsc::Sender<(usize, Result<A>)>| {
        let session = Session::new(1);
        loop {
            let (part, first, texts) = {
                let mut feed = feed.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(texts) = feed.0.part(PART).transpose() else { return };
                let (part, first) = (feed.1, feed.2);
                feed.1 += 1;
                feed.2 += texts.as_ref().map_or(0, Vec::len);
                (part, first, texts)
            };
            let far = |written: &mut usize| part >= written.saturating_add(ahead);
            drop(moved.wait_while(lock(&written), far).unwrap_or_else(PoisonError::into_inner));
            let answered = texts.and_then(|texts| {
                let logits = classifier.logits_from(&session, &texts, first)?;
                Ok(answer(texts, logits))
            });
            if send.send((part, answered)).is_err() {
                return; // nobody listens any more
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            let send = send.clone();
            scope.spawn(|| work(send));
        }
        drop(send);
        let mut write = || {
            let (mut early, mut next) = (BTreeMap::new(), 0);
            for (part, answered) in &receive {
                early.insert(part, answered);
                while let Some(answered) = early.remove(&next) {
                    out(answered?)?;
                    next += 1;
                    *lock(&written) = next;
                    moved.notify_all();
                }
            }
            Ok(())
        };
        let result = write();
        drop(receive);
        *lock(&written) = usize::MAX;
        moved.notify_all();
        result
    })
}
