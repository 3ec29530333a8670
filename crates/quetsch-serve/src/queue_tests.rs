//! The queue's rules, and its threads as the machine happens to run them; `tests/queue_model.rs` tries all orders.

use crate::queue::{Queue, Refused};
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn batches_keep_order_and_budget() {
    let all = |_: &usize, _: &usize| true;
    // sizes in tokens, budget, sizes of the batches
    let rows: [(&[usize], usize, &[usize]); 5] = [
        (&[10], 100, &[1]),
        (&[40, 40, 40], 100, &[2, 1]),
        (&[500, 10], 100, &[1, 1]), // too long alone is still served
        (&[10, 500, 10], 100, &[1, 1, 1]),
        (&[100, 0, 0], 100, &[3]),
    ];
    for (sizes, budget, want) in rows {
        let queue = Queue::new(10);
        queue.push(sizes.iter().copied().zip(0..).collect()).unwrap();
        queue.close();
        let mut next = 0..;
        let mut found = vec![];
        while let Some(batch) = queue.take(budget, all) {
            found.push(batch.len());
            assert!(batch.into_iter().all(|entry| Some(entry) == next.next()), "{sizes:?}: order");
        }
        assert_eq!(found, want, "{sizes:?}");
    }
}

#[test]
fn entries_that_do_not_go_together_are_apart() {
    let queue = Queue::new(10);
    queue.push(["a1", "a2", "b1", "a3"].map(|e| (1, e)).to_vec()).unwrap();
    queue.close();
    let take = || queue.take(100, |a, b| a[..1] == b[..1]);
    assert_eq!(take(), Some(vec!["a1", "a2"]));
    assert_eq!(take(), Some(vec!["b1"]));
    assert_eq!(take(), Some(vec!["a3"]));
    assert_eq!(take(), None);
}

#[test]
fn all_or_nothing_and_never_beyond_capacity() {
    let queue = Queue::new(3);
    assert_eq!(queue.push(vec![(1, 0), (1, 1)]), Ok(()));
    assert_eq!(queue.push(vec![(1, 2), (1, 3)]), Err(Refused::Full));
    assert_eq!(queue.len(), 2);
    assert_eq!(queue.push(vec![(1, 2)]), Ok(()));
    queue.close();
    assert_eq!(queue.push(vec![]), Err(Refused::Closed));
    assert_eq!(queue.take(9, |_, _| true), Some(vec![0, 1, 2]));
}

/// Many producers and consumers: every accepted entry comes out once, and everybody ends.
#[test]
fn nothing_is_lost_or_doubled_between_threads() {
    const PRODUCERS: usize = 4;
    const EACH: usize = 2_000;
    let queue = Queue::new(8);
    let seen: Vec<AtomicUsize> = (0..PRODUCERS * EACH).map(|_| AtomicUsize::new(0)).collect();
    std::thread::scope(|s| {
        let consume = || {
            while let Some(batch) = queue.take(5, |_, _| true) {
                for i in batch {
                    let i: usize = i;
                    seen[i].fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        (0..3).for_each(|_| drop(s.spawn(consume)));
        let produce = |p: usize| {
            for pair in (p * EACH..(p + 1) * EACH).collect::<Vec<_>>().chunks(2) {
                while queue.push(pair.iter().map(|i| (1 + i % 4, *i)).collect()).is_err() {
                    std::thread::yield_now();
                }
            }
        };
        let producers: Vec<_> = (0..PRODUCERS).map(|p| s.spawn(move || produce(p))).collect();
        producers.into_iter().for_each(|p| p.join().unwrap());
        queue.close();
    });
    assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
}
