//! The team as the machine happens to run it; `tests/team_model.rs` tries all orders.

use crate::team::Team;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

fn check(team: &Team, parts: usize) {
    let seen: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
    team.fork(parts, |i| _ = seen[i].fetch_add(1, Ordering::Relaxed));
    assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{parts} parts on {} threads", team.threads());
}

#[test]
fn every_part_runs_once_on_any_number_of_threads() {
    for threads in [0, 1, 2, 3, 5, 9] {
        let team = Team::new(threads);
        for i in 0..2_000 {
            check(&team, i % 12);
        }
        check(&team, 10_000);
    }
}

#[test]
fn a_team_that_slept_works_again() {
    let team = Team::new(3);
    for _ in 0..20 {
        check(&team, 3);
        std::thread::sleep(Duration::from_millis(2)); // longer than it spins
        check(&team, 2);
    }
}

#[test]
fn items_are_handed_out_with_what_they_borrow() {
    let team = Team::new(4);
    let mut rows = vec![0; 1000];
    for _ in 0..100 {
        team.each(rows.chunks_mut(300).collect(), |piece| piece.iter_mut().for_each(|v| *v += 1));
    }
    assert!(rows.iter().all(|v| *v == 100));
}

#[test]
fn a_panic_comes_out_after_all_parts_and_the_team_lives_on() {
    let team = Team::new(3);
    for guilty in 0..4 {
        let done = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            team.fork(4, |i| {
                assert!(i != guilty, "part {guilty}");
                std::thread::sleep(Duration::from_millis(1));
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let said = outcome.unwrap_err().downcast::<String>().unwrap();
        assert_eq!((*said, done.load(Ordering::Relaxed)), (format!("part {guilty}"), 3));
        check(&team, 5);
    }
}

#[test]
fn a_busy_team_leaves_the_work_to_who_asks() {
    let team = Team::new(2);
    let sums = Mutex::new(vec![]);
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                for _ in 0..500 {
                    let sum = AtomicUsize::new(0);
                    team.fork(4, |i| team.fork(2, |j| _ = sum.fetch_add(10 * i + j, Ordering::Relaxed)));
                    sums.lock().unwrap().push(sum.into_inner());
                }
            });
        }
    });
    let sums = sums.into_inner().unwrap();
    assert!(sums.len() == 1500 && sums.iter().all(|s| *s == 2 * 60 + 4));
}
