//! The most arithmetic that this machine does: multiply-adds between registers, without memory. What a kernel reaches
//! is a share of this; a multiply-add is two operations.

#[cfg(target_arch = "x86_64")]
use crate::amx;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, bf16_dot, isa};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32, as the `gemm-f32` crate does it: it picks the instruction set on its own.
    F32,
    /// bf16 summed in f32, where [`bf16_is_fast`](crate::isa::bf16_is_fast): tiles of AMX, or `vdpbf16ps`.
    Bf16,
    /// 8-bit integers summed in 32 bits, with the instructions of [`isa()`](crate::isa::isa).
    Int8,
}

impl Arithmetic {
    /// `f32`, `bf16` or `int8`.
    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::F32 => "f32",
            Arithmetic::Bf16 => "bf16",
            Arithmetic::Int8 => "int8",
        }
    }
}

/// Operations per second of `threads` threads that compute at the same time. Takes about 50 ms.
pub fn operations_per_second(what: Arithmetic, threads: usize) -> f64 {
    let burst = burst(what);
    let one = || {
        let (mut best, end) = (0.0f64, Instant::now() + Duration::from_millis(50));
        while Instant::now() < end {
            let start = Instant::now();
            let multiply_adds = burst();
            best = best.max(2.0 * multiply_adds as f64 / start.elapsed().as_secs_f64());
        }
        best
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (1..threads).map(|_| scope.spawn(one)).collect();
        let own = one();
        own + running.into_iter().map(|r| r.join().unwrap_or_default()).sum::<f64>()
    })
}

/// Steps of a burst, enough to hide reading the clock.
const STEPS: usize = 20_000;
/// Sums that do not wait for each other: the latency of an instruction times how many start in a cycle, and more.
const SUMS: usize = 16;

/// The loop for this CPU; it returns how many multiply-adds it did.
fn burst(what: Arithmetic) -> fn() -> usize {
    #[cfg(target_arch = "x86_64")]
    match (what, isa(), Isa::best()) {
        // SAFETY: `Isa::best()` saw the features on this CPU, and `isa()` is at most that.
        (Arithmetic::F32, _, best) if best >= Isa::Avx512 => return || unsafe { x86::f32_avx512() },
        // SAFETY: as above.
        (Arithmetic::F32, _, best) if best >= Isa::Avx2 => return || unsafe { x86::f32_avx2() },
        // SAFETY: as above; AMX's state is ready.
        (Arithmetic::Bf16, Isa::Amx, _) => return || unsafe { amx::burst::<true>(STEPS / 16) },
        // SAFETY: `bf16_dot` saw the features.
        (Arithmetic::Bf16, ..) if bf16_dot() => return || unsafe { x86::bf16_dot() },
        // SAFETY: AMX's state is ready.
        (Arithmetic::Int8, Isa::Amx, _) => return || unsafe { amx::burst::<false>(STEPS / 16) },
        // SAFETY: as above.
        (Arithmetic::Int8, isa, _) if isa >= Isa::Avx512Vnni => return || unsafe { x86::int8_vnni() },
        // SAFETY: as above.
        (Arithmetic::Int8, isa, _) if isa >= Isa::Avx512 => return || unsafe { x86::int8_avx512() },
        // SAFETY: as above.
        (Arithmetic::Int8, isa, _) if isa >= Isa::Avx2 => return || unsafe { x86::int8_avx2() },
        _ => {}
    }
    match what {
        Arithmetic::F32 | Arithmetic::Bf16 => plain_f32,
        Arithmetic::Int8 => plain_int8,
    }
}

/// Width of the plain loops' vectors, which the compiler makes of what the CPU has.
const LANES: usize = 8;

fn plain_f32() -> usize {
    let (a, b) = (black_box([0.99f32; LANES]), black_box([0.01f32; LANES]));
    let mut sums = [[0.0f32; LANES]; SUMS];
    for _ in 0..STEPS {
        sums.iter_mut().for_each(|s| s.iter_mut().zip(a).zip(b).for_each(|((s, a), b)| *s = *s * a + b));
    }
    black_box(sums);
    STEPS * SUMS * LANES
}

fn plain_int8() -> usize {
    let a = black_box([3i16; LANES]);
    let mut sums = [[1i32; LANES]; SUMS];
    for _ in 0..STEPS {
        for s in &mut sums {
            s.iter_mut().zip(a).for_each(|(s, a)| *s = s.wrapping_add(i32::from(*s as i16) * i32::from(a)));
        }
    }
    black_box(sums);
    STEPS * SUMS * LANES
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{STEPS, SUMS, black_box};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub fn f32_avx512() -> usize {
        let (a, b) = (_mm512_set1_ps(black_box(0.99)), _mm512_set1_ps(black_box(0.01)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|s| *s = _mm512_fmadd_ps(*s, a, b));
        }
        black_box(sums);
        STEPS * SUMS * 16
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn f32_avx2() -> usize {
        const SUMS: usize = 12; // of 16 registers
        let (a, b) = (_mm256_set1_ps(black_box(0.99)), _mm256_set1_ps(black_box(0.01)));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|s| *s = _mm256_fmadd_ps(*s, a, b));
        }
        black_box(sums);
        STEPS * SUMS * 8
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16_dot() -> usize {
        let pairs = |x| _mm512_cvtne2ps_pbh(_mm512_set1_ps(x), _mm512_set1_ps(x));
        let (a, b) = (pairs(black_box(0.99)), pairs(black_box(0.01)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|s| *s = _mm512_dpbf16_ps(*s, a, b));
        }
        black_box(sums);
        STEPS * SUMS * 32
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8_vnni() -> usize {
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|s| *s = _mm512_dpbusd_epi32(*s, a, b));
        }
        black_box(sums);
        STEPS * SUMS * 64
    }

    /// Without VNNI, exact products take pairs of 16 bits: one multiply of pairs, one addition.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn int8_avx512() -> usize {
        let a = _mm512_set1_epi16(black_box(3));
        let mut sums = [_mm512_set1_epi16(1); SUMS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|s| *s = _mm512_add_epi32(*s, _mm512_madd_epi16(*s, a)));
        }
        black_box(sums);
        STEPS * SUMS * 32
    }

    /// As with AVX-512, half as wide.
    #[target_feature(enable = "avx2")]
    pub fn int8_avx2() -> usize {
        const SUMS: usize = 12; // of 16 registers
        let a = _mm256_set1_epi16(black_box(3));
        let mut sums = [_mm256_set1_epi16(1); SUMS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|s| *s = _mm256_add_epi32(*s, _mm256_madd_epi16(*s, a)));
        }
        black_box(sums);
        STEPS * SUMS * 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faster than any core there is: then the compiler took the loop away.
    #[test]
    fn the_loops_are_run() {
        for what in [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8] {
            let found = operations_per_second(what, 1);
            assert!(found > 0.0 && found < 1e14, "{what:?}: {found:.3e} operations/s");
        }
    }
}
