//! Orders in which threads can run the team's code, all with a few preemptions, by loom: each part of each fork runs once and before the fork
//! returns, nobody sleeps through an offer, and all threads end. Loom counts a thread that waits for ever as a failure.
#![allow(missing_docs)]

use loom::sync::atomic::{AtomicUsize, Ordering};
use team::Team;

/// What `team.rs` asks its crate for.
mod sync {
    pub use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
    pub use loom::sync::{Arc, Mutex};
    pub use loom::thread;

    /// Looks twice: with that, parking comes into every order.
    pub fn spin(done: impl Fn() -> bool) -> bool {
        done() || {
            thread::yield_now();
            done()
        }
    }
}

#[path = "../src/team.rs"]
#[allow(dead_code)]
mod team;

fn model(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(f);
}

/// Forks one after the other, whose work lives on the stack; then the team ends.
fn forks(team: &Team, counts: &[usize]) {
    for &parts in counts {
        let seen: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
        team.fork(parts, |i| {
            seen[i].fetch_add(1, Ordering::Relaxed);
        });
        for (i, n) in seen.iter().enumerate() {
            assert_eq!(n.load(Ordering::Relaxed), 1, "part {i} of {parts}");
        }
    }
}

#[test]
fn two_threads_share_forks_one_after_the_other() {
    model(3, || forks(&Team::new(2), &[2, 2]));
}

#[test]
fn three_threads_share_a_fork() {
    model(2, || forks(&Team::new(3), &[3]));
}

#[test]
fn a_thread_that_is_late_takes_nothing_of_an_old_fork() {
    model(2, || forks(&Team::new(2), &[3, 2, 1, 2]));
}

#[test]
fn a_fork_inside_a_fork_is_done_by_one_thread() {
    model(2, || {
        let (team, seen) = (Team::new(2), AtomicUsize::new(0));
        team.fork(2, |_| {
            team.fork(2, |_| {
                seen.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(seen.load(Ordering::Relaxed), 4);
    });
}
