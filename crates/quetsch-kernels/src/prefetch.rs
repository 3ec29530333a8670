//! Weights that come next, fetched into the second-level cache while others are multiplied. They lie in a slower cache or
//! in memory, and the streams that a CPU finds by itself end with every panel.

/// The share of one block of rows: the blocks that multiply by a group of panels fetch the next group together.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86-64 fetches ahead"))]
pub(crate) struct Ahead {
    /// Bytes from where the next group begins.
    from: usize,
    to: usize,
    /// Lines for each vector of a panel.
    lines: usize,
}

/// Bytes of a line of cache.
const LINE: usize = 64;

impl Ahead {
    pub const NOTHING: Ahead = Ahead { from: 0, to: 0, lines: 0 };

    /// That of block `i` of `blocks`, of a group of `panels` panels of `vectors` lines each.
    pub fn of(i: usize, blocks: usize, panels: usize, vectors: usize) -> Ahead {
        let line = |i: usize| panels * vectors * i / blocks * LINE;
        Ahead { from: line(i), to: line(i + 1), lines: panels.div_ceil(blocks) }
    }

    /// The next group stands at `at`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn behind<T>(self, at: *const T) -> Next {
        let at = at.cast::<i8>();
        Next { at: at.wrapping_add(self.from), end: at.wrapping_add(self.to), lines: self.lines }
    }
}

/// What is still to be fetched.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Next {
    at: *const i8,
    end: *const i8,
    lines: usize,
}

#[cfg(target_arch = "x86_64")]
impl Next {
    /// As many lines as one vector of each of `PANELS` panels has to fetch.
    #[inline(always)]
    pub fn fetch<const PANELS: usize>(&mut self) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        if self.at < self.end {
            for i in 0..PANELS {
                if i < self.lines {
                    // SAFETY: SSE is part of x86-64, and a prefetch may name any address.
                    unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at.wrapping_add(i * LINE)) };
                }
            }
            self.at = self.at.wrapping_add(self.lines * LINE);
        }
    }
}
