//! The locks of the queue. `tests/queue_model.rs` compiles the queue a second time, with loom's in their place.

pub use std::sync::{Condvar, Mutex, MutexGuard};
