//! The queue between requests and workers: bounded, first in first out, handed out in batches under a token budget.
//!
//! A worker never waits for a batch to fill: it takes what is there. Batches grow by themselves when requests come
//! faster than they are answered, and a lone request goes straight through.

use crate::sync::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::PoisonError;

/// Entries with their size in tokens.
pub struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    capacity: usize,
}

struct State<T> {
    entries: VecDeque<(usize, T)>,
    closed: bool,
}

/// Why entries were not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No room for all of them.
    Full,
    /// The queue takes nothing any more.
    Closed,
}

impl<T> Queue<T> {
    /// Room for `capacity` entries.
    pub fn new(capacity: usize) -> Queue<T> {
        let state = State { entries: VecDeque::new(), closed: false };
        Queue { state: Mutex::new(state), changed: Condvar::new(), capacity }
    }

    /// No code panics while it holds the lock, and every change is whole, so a poisoned lock is as good as a clean one.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends all entries, `(tokens, entry)`, or none.
    ///
    /// # Errors
    /// There is no room for all of them, or the queue is closed.
    pub fn push(&self, entries: Vec<(usize, T)>) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.entries.len() + entries.len() > self.capacity {
            return Err(Refused::Full);
        }
        let one = entries.len() == 1;
        state.entries.extend(entries);
        drop(state);
        match one {
            true => self.changed.notify_one(),
            false => self.changed.notify_all(),
        }
        Ok(())
    }

    /// Waits for entries and takes the first, then those behind it while they go `together` with it and fit into
    /// `budget` tokens. `None` when the queue is closed and empty.
    pub fn take(&self, budget: usize, together: impl Fn(&T, &T) -> bool) -> Option<Vec<T>> {
        let mut state = self.lock();
        while state.entries.is_empty() {
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut batch: Vec<T> = vec![];
        let mut left = budget;
        while let Some((tokens, entry)) = state.entries.front() {
            let fits = batch.first().is_none_or(|first| *tokens <= left && together(first, entry));
            if !fits {
                break;
            }
            left = left.saturating_sub(*tokens);
            batch.extend(state.entries.pop_front().map(|(_, entry)| entry));
        }
        Some(batch)
    }

    /// Takes nothing more; what is in it is still handed out.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Entries that wait.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }
}
