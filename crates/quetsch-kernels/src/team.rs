//! A few threads that share the work of one thread, part by part: a fork wakes nobody while
//! they are awake.
//!
//! [`Team::fork`] offers numbered parts; its caller and the threads of the team take one after the other until none is
//! left. A part is not meant for a certain thread, so one that sleeps, or that the system has taken off its core, is
//! not waited for: only parts that were begun are. A thread without work spins for a moment (`sync::spin`: forks
//! follow each other closely inside a forward) and then parks, so that an idle team costs nothing.

use crate::sync::{Arc, AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Mutex, Ordering, spin, thread};
use std::any::Any;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::PoisonError;

/// Threads that [`Team::fork`] splits work among, its caller being one of them. They are started by the first fork and
/// end with the team.
pub struct Team {
    threads: usize,
    shared: Arc<Shared>,
    /// Held while a fork is under way.
    started: Mutex<Option<Vec<thread::JoinHandle<()>>>>,
}

/// Each on a line of cache of its own: all threads look at what is offered, while parts are finished.
#[repr(align(64))]
struct Line<T>(T);

struct Shared {
    /// The number of the fork, and in the lower bits how many of its parts nobody has taken.
    offer: Line<AtomicU64>,
    /// What the parts are parts of; a `Job` on the stack of the caller of `fork`.
    job: AtomicPtr<Job<'static>>,
    /// Parts that are not finished.
    pending: Line<AtomicUsize>,
    closing: AtomicBool,
    /// What the last part that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    caller: thread::Thread,
}

/// Bits of `offer` that count parts.
const BITS: u32 = 16;
const PARTS: u64 = (1 << BITS) - 1;

impl Team {
    /// `threads` threads with the one that will call; 0 is as good as 1.
    pub fn new(threads: usize) -> Team {
        let shared = Shared {
            offer: Line(AtomicU64::new(0)),
            job: AtomicPtr::new(std::ptr::null_mut()),
            pending: Line(AtomicUsize::new(0)),
            closing: AtomicBool::new(false),
            panic: Mutex::new(None),
        };
        Team { threads: threads.max(1), shared: Arc::new(shared), started: Mutex::new(None) }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work` on every number below `parts`, each once, and returns when all are done. If the team is at work
    /// already, for another thread or for the fork that `work` is part of, the caller does all by itself.
    ///
    /// # Panics
    /// When `work` panics, with the same payload, after all parts have ended; with 2^16 parts or more.
    pub fn fork(&self, parts: usize, work: impl Fn(usize) + Sync) {
        if parts <= 1 || self.threads == 1 {
            return (0..parts).for_each(work);
        }
        assert!((parts as u64) <= PARTS, "{parts} parts");
        let Ok(mut started) = self.started.try_lock() else {
            return (0..parts).for_each(work);
        };
        let others = started.get_or_insert_with(|| self.start());
        let (shared, job) = (&*self.shared, Job { work: &work, caller: thread::current() });
        shared.pending.0.store(parts, Ordering::Relaxed);
        shared.job.store((&raw const job).cast_mut().cast(), Ordering::Relaxed);
        // The last part is the caller's own. Only forks store here while nothing is on offer.
        let number = (shared.offer.0.load(Ordering::Relaxed) >> BITS) + 1;
        shared.offer.0.store(number << BITS | (parts as u64 - 1), Ordering::Release);
        others.iter().take(parts - 1).for_each(|t| t.thread().unpark());
        let mut mine = Some(parts - 1);
        while let Some(part) = mine {
            shared.run(&job, part);
            mine = shared.take();
        }
        let done = || shared.pending.0.load(Ordering::Acquire) == 0;
        if !spin(done) {
            while !done() {
                thread::park();
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(started);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Runs `work` on every item.
    ///
    /// # Panics
    /// As [`Team::fork`].
    pub fn each<T: Send>(&self, items: Vec<T>, work: impl Fn(T) + Sync) {
        if items.len() <= 1 || self.threads == 1 {
            return items.into_iter().for_each(work);
        }
        let items = Items(items.into_iter().map(ManuallyDrop::new).collect());
        // SAFETY: `fork` runs each number once.
        self.fork(items.0.len(), |i| work(unsafe { items.take(i) }));
    }

    /// The other threads; as many as the system gives, because the caller can do every part.
    fn start(&self) -> Vec<thread::JoinHandle<()>> {
        let start = |i: usize| {
            let shared = self.shared.clone();
            thread::Builder::new().name(format!("team-{i}")).spawn(move || shared.work()).ok()
        };
        (1..self.threads).map_while(start).collect()
    }
}

/// Items that are taken one by one, each by one thread. Without a lock, which would send their line of cache to and fro.
struct Items<T>(Vec<ManuallyDrop<T>>);

// SAFETY: threads share it to move items out, which `T: Send` allows.
unsafe impl<T: Send> Sync for Items<T> {}

impl<T> Items<T> {
    /// # Safety
    /// Once for each `i`.
    unsafe fn take(&self, i: usize) -> T {
        // SAFETY: the caller's promise: it was not taken yet.
        ManuallyDrop::into_inner(unsafe { std::ptr::read(&self.0[i]) })
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        let started = self.started.lock().unwrap_or_else(PoisonError::into_inner).take();
        for thread in started.into_iter().flatten() {
            thread.thread().unpark();
            let _ = thread.join(); // it catches the panics of its parts
        }
    }
}

impl Shared {
    /// One of the threads: works, spins, sleeps. `unpark` is remembered, so an offer between the last look and `park`
    /// is not slept through.
    fn work(&self) {
        let closing = || self.closing.load(Ordering::Acquire);
        let offered = || self.offer.0.load(Ordering::Relaxed) & PARTS != 0;
        while !closing() {
            while let Some(part) = self.take() {
                // SAFETY: the part is pending, so the `fork` that owns the job has not returned; `take` acquired what
                // that `fork` released after it stored the address.
                let job = unsafe { &*self.job.load(Ordering::Relaxed) };
                let caller = job.caller.clone(); // after its last part the job may be gone
                if self.run(job, part) {
                    caller.unpark();
                }
            }
            if !spin(|| offered() || closing()) {
                thread::park();
            }
        }
    }

    /// Takes a part. The number of the fork is in the word that is compared, so that a thread which was held up
    /// between its two accesses cannot take what a later fork offers for what it saw.
    fn take(&self) -> Option<usize> {
        let offer = &self.offer.0;
        let mut now = offer.load(Ordering::Relaxed);
        while now & PARTS != 0 {
            match offer.compare_exchange_weak(now, now - 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some((now & PARTS) as usize - 1),
                Err(other) => now = other,
            }
        }
        None
    }

    /// Runs one part; says whether it was the last to end.
    fn run(&self, job: &Job, part: usize) -> bool {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.work)(part))) {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        self.pending.0.fetch_sub(1, Ordering::AcqRel) == 1
    }
}
