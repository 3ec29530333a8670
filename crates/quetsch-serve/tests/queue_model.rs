//! Every order in which threads can run the queue's code, by loom: the hand-over from requests to workers loses
//! nothing, doubles nothing, leaves nobody asleep and ends. Loom counts a thread that waits for ever as a failure.
#![allow(missing_docs)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use queue::{Queue, Refused};

/// The locks that `queue.rs` asks its crate for.
mod sync {
    pub use loom::sync::{Condvar, Mutex, MutexGuard};
}

#[path = "../src/queue.rs"]
#[allow(dead_code)]
mod queue;

/// Takes until the queue is closed and empty; counts every entry.
fn worker(queue: Arc<Queue<usize>>, seen: Arc<[AtomicUsize; 3]>, budget: usize) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        while let Some(batch) = queue.take(budget, |_, _| true) {
            assert!(!batch.is_empty(), "a worker that is woken for nothing must go back to sleep");
            for i in batch {
                seen[i].fetch_add(1, Ordering::Relaxed);
            }
        }
    })
}

fn counters() -> Arc<[AtomicUsize; 3]> {
    Arc::new([(); 3].map(|()| AtomicUsize::new(0)))
}

#[test]
fn one_entry_wakes_one_of_two_workers() {
    loom::model(|| {
        let (queue, seen) = (Arc::new(Queue::new(2)), counters());
        let workers = [(); 2].map(|()| worker(queue.clone(), seen.clone(), 9));
        assert_eq!(queue.push(vec![(1, 0)]), Ok(()));
        queue.close();
        workers.into_iter().for_each(|w| w.join().unwrap());
        assert_eq!(seen[0].load(Ordering::Relaxed), 1);
    });
}

#[test]
fn what_is_accepted_while_the_queue_closes_is_answered() {
    loom::model(|| {
        let (queue, seen) = (Arc::new(Queue::new(3)), counters());
        let consumer = worker(queue.clone(), seen.clone(), 1);
        let producer = {
            let queue = queue.clone();
            thread::spawn(move || [queue.push(vec![(1, 0), (1, 1)]), queue.push(vec![(1, 2)])])
        };
        queue.close();
        let [both, one] = producer.join().unwrap();
        consumer.join().unwrap();
        let seen = [0, 1, 2].map(|i: usize| seen[i].load(Ordering::Relaxed));
        let times = |accepted: Result<(), Refused>| usize::from(accepted.is_ok());
        assert_eq!(seen, [times(both), times(both), times(one)]);
        assert!(both.is_ok() || one == Err(Refused::Closed), "a closed queue stays closed");
    });
}

#[test]
fn two_producers_never_pass_the_capacity() {
    loom::model(|| {
        let (queue, seen) = (Arc::new(Queue::new(2)), counters());
        let producer = {
            let queue = queue.clone();
            thread::spawn(move || queue.push(vec![(1, 0), (1, 1)]))
        };
        let mine = queue.push(vec![(1, 2)]);
        let theirs = producer.join().unwrap();
        // One of them fills it; nobody takes anything yet, so the other finds no room.
        assert!(matches!((mine, theirs), (Ok(()), Err(Refused::Full)) | (Err(Refused::Full), Ok(()))));
        let consumer = worker(queue.clone(), seen.clone(), 9);
        queue.close();
        consumer.join().unwrap();
        let seen = [0, 1, 2].map(|i: usize| seen[i].load(Ordering::Relaxed));
        assert_eq!(seen, if mine.is_ok() { [0, 0, 1] } else { [1, 1, 0] });
    });
}
