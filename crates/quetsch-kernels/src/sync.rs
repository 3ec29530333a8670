//! What [`crate::team`] takes from the standard library; its model test takes the same from loom.

pub use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
pub use std::sync::{Arc, Mutex};
pub use std::thread;
use std::time::{Duration, Instant};

/// How long a thread spins before it sleeps. The serial stretches of a forward are shorter; waking up takes about as long.
const SPIN: Duration = Duration::from_micros(100);

/// Waits for `done`, but not for long; says whether it came.
pub fn spin(done: impl Fn() -> bool) -> bool {
    let end = Instant::now() + SPIN;
    loop {
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if Instant::now() >= end {
            return false;
        }
    }
}
