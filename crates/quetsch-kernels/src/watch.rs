//! A system allocator that is watched, for tests and fuzz targets.
//!
//! ```
//! use quetsch_kernels::watch::Watched;
//!
//! #[global_allocator]
//! static ALLOCATOR: Watched = Watched::new(1 << 10, usize::MAX);
//!
//! let (buffers, bytes) = (ALLOCATOR.buffers(), ALLOCATOR.bytes());
//! let buffer = vec![0u8; 1 << 10];
//! assert!(ALLOCATOR.buffers() > buffers && ALLOCATOR.bytes() >= bytes + buffer.len());
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts what is asked for, and ends the process when too much is asked for at once.
pub struct Watched {
    large: usize,
    most: usize,
    buffers: AtomicUsize,
    bytes: AtomicUsize,
}

impl Watched {
    /// Counts allocations of `large` bytes and more as buffers; one of more than `most` bytes aborts the process.
    pub const fn new(large: usize, most: usize) -> Watched {
        Watched { large, most, buffers: AtomicUsize::new(0), bytes: AtomicUsize::new(0) }
    }

    /// Buffers allocated so far, those freed again included.
    pub fn buffers(&self) -> usize {
        self.buffers.load(Ordering::Relaxed)
    }

    /// Bytes allocated now.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn took(&self, size: usize) {
        if size > self.most {
            eprintln!("an allocation of {size} bytes, more than {}", self.most);
            std::process::abort();
        }
        self.buffers.fetch_add(usize::from(size >= self.large), Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
    }

    fn gave(&self, size: usize) {
        self.bytes.fetch_sub(size, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came, or the process ends.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.took(layout.size());
        // SAFETY: the caller's promises are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.took(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.took(size);
        self.gave(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        self.gave(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(old, layout) }
    }
}
