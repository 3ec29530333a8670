//! Work dealt to threads in a fixed way.

/// Runs `f` on every item on `threads` threads; items are dealt in turn, so results do not depend on timing.
pub(crate) fn parallel<T: Send, R: Send>(items: Vec<T>, threads: usize, f: impl Fn(T) -> R + Sync) -> Vec<R> {
    if threads <= 1 {
        return items.into_iter().map(f).collect();
    }
    let count = items.len();
    let mut hands: Vec<Vec<(usize, T)>> = (0..threads).map(|_| vec![]).collect();
    items.into_iter().enumerate().for_each(|(i, t)| hands[i % threads].push((i, t)));
    let mut results: Vec<Option<R>> = (0..count).map(|_| None).collect();
    std::thread::scope(|s| {
        let f = &f;
        let run =
            |hand: Vec<(usize, T)>| s.spawn(move || hand.into_iter().map(|(i, t)| (i, f(t))).collect::<Vec<_>>());
        for h in hands.into_iter().map(run).collect::<Vec<_>>() {
            for (i, r) in h.join().expect("this work never panics") {
                results[i] = Some(r);
            }
        }
    });
    results.into_iter().flatten().collect()
}
