//! Vectors of f32 behind one trait, for kernels whose blocking a compiler does not find by itself. A kernel is written
//! once over [`Lanes`], inlined as a whole into a function with the vector's target features, and [`Eight`] is its
//! portable twin.

/// A vector of f32.
///
/// # Safety
/// Every method wants a CPU with the vector's instruction set and runs in a function compiled for it; pointers are
/// valid for what is read or written.
pub(crate) trait Lanes: Copy {
    /// Number of lanes; divides 16.
    const N: usize;
    /// Rows of a register block that is two vectors wide: even, at most 8.
    const ROWS: usize;
    unsafe fn splat(x: f32) -> Self;
    /// `N` floats.
    unsafe fn load(at: *const f32) -> Self;
    /// `N` floats.
    unsafe fn store(self, at: *mut f32);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// self * b + c, rounded once where the instruction set can.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger one, `b` where one of them is not a number.
    unsafe fn max(self, b: Self) -> Self;
    /// The largest lane.
    unsafe fn largest(self) -> f32;
    /// The sum of all lanes.
    unsafe fn total(self) -> f32;
    /// A block of 16 x 16 turned, row to column.
    #[inline(always)]
    unsafe fn transpose(block: &mut [[f32; 16]; 16]) {
        for i in 1..16 {
            let (above, row) = block.split_at_mut(i);
            above.iter_mut().zip(&mut row[0]).for_each(|(a, b)| std::mem::swap(&mut a[i], b));
        }
    }
    /// Lanes from `n` on replaced by those of `b`.
    unsafe fn first(self, n: usize, b: Self) -> Self;
    /// self * 2^i for the integer i in the low mantissa bits of `z`, at least -126.
    unsafe fn times_two_to(self, z: Self) -> Self;
}

/// e^(x ln 2) = 2^x for x <= 0, clamped at 2^-126: as [`crate::math::exp`], a reduction to [-1/2, 1/2] and its
/// polynomial, here with the powers of ln 2 in the coefficients.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp2<V: Lanes>(x: V) -> V {
    const LN2: f64 = std::f64::consts::LN_2;
    const fn taylor(n: u32) -> f32 {
        let (mut c, mut i) = (1.0, 1);
        while i <= n {
            c *= LN2 / i as f64;
            i += 1;
        }
        c as f32
    }
    const COEFFICIENTS: [f32; 7] = [taylor(6), taylor(5), taylor(4), taylor(3), taylor(2), taylor(1), taylor(0)];
    // SAFETY: the caller's promise is that of `Lanes`.
    unsafe {
        let magic = V::splat(12_582_912.0); // 1.5 * 2^23: rounds to an integer that sits in the low mantissa bits
        let t = V::splat(-126.0).max(x);
        let z = t.add(magic);
        let f = t.sub(z.sub(magic));
        let mut p = V::splat(taylor(7));
        for c in COEFFICIENTS {
            p = p.mul_add(f, V::splat(c));
        }
        p.times_two_to(z)
    }
}

/// The portable vector: plain Rust, for what has no other.
#[derive(Clone, Copy)]
pub(crate) struct Eight([f32; 8]);

impl Eight {
    #[inline(always)]
    fn map(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Eight(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Lanes for Eight {
    const N: usize = 8;
    const ROWS: usize = 2;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Eight([x; 8])
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the caller's promise; an array of f32 is aligned as an f32.
        Eight(unsafe { at.cast::<[f32; 8]>().read() })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: as above.
        unsafe { at.cast::<[f32; 8]>().write(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.map(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.map(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.map(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        self.map(b, |a, b| a * b).map(c, |a, c| a + c)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.map(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn total(self) -> f32 {
        self.0.into_iter().sum()
    }
    #[inline(always)]
    unsafe fn first(self, n: usize, b: Self) -> Self {
        Eight(std::array::from_fn(|i| if i < n { self.0[i] } else { b.0[i] }))
    }
    #[inline(always)]
    unsafe fn times_two_to(self, z: Self) -> Self {
        self.map(z, |a, z| a * f32::from_bits((z.to_bits() << 23).wrapping_add(127 << 23)))
    }
}

/// The methods that are one instruction each.
#[cfg(target_arch = "x86_64")]
macro_rules! one_instruction {
    ($set:ident $load:ident $store:ident $add:ident $sub:ident $mul:ident $fma:ident $max:ident) => {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the caller's promise, here and below.
            unsafe { $set(x) }
        }
        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            // SAFETY: as above.
            unsafe { $load(at) }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            // SAFETY: as above.
            unsafe { $store(at, self) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { $add(self, b) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { $sub(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { $mul(self, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            unsafe { $fma(self, b, c) }
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { $max(self, b) }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    impl Lanes for __m512 {
        const N: usize = 16;
        const ROWS: usize = 8;
        one_instruction!(_mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_add_ps _mm512_sub_ps _mm512_mul_ps
            _mm512_fmadd_ps _mm512_max_ps);
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            // SAFETY: the caller's promise, here and below.
            unsafe { _mm512_reduce_max_ps(self) }
        }
        #[inline(always)]
        unsafe fn total(self) -> f32 {
            // SAFETY: as above.
            unsafe { _mm512_reduce_add_ps(self) }
        }
        #[inline(always)]
        unsafe fn transpose(block: &mut [[f32; 16]; 16]) {
            // SAFETY: as above; f32 and u32 have the same size and alignment, and every bit pattern is valid for both.
            unsafe { crate::panels::transpose(&mut *std::ptr::from_mut(block).cast()) }
        }
        #[inline(always)]
        unsafe fn first(self, n: usize, b: Self) -> Self {
            // SAFETY: the caller's promise.
            unsafe { _mm512_mask_mov_ps(b, ((1u32 << n.min(16)) - 1) as u16, self) }
        }
        #[inline(always)]
        unsafe fn times_two_to(self, z: Self) -> Self {
            // SAFETY: the caller's promise.
            unsafe {
                let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(z));
                let power = _mm512_add_epi32(power, _mm512_set1_epi32(127 << 23));
                _mm512_mul_ps(self, _mm512_castsi512_ps(power))
            }
        }
    }

    impl Lanes for __m256 {
        const N: usize = 8;
        const ROWS: usize = 6;
        one_instruction!(_mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_add_ps _mm256_sub_ps _mm256_mul_ps
            _mm256_fmadd_ps _mm256_max_ps);
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            // SAFETY: the caller's promise, here and below.
            unsafe {
                let x = _mm_max_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
                let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_max_ps(x, _mm_movehdup_ps(x)))
            }
        }
        #[inline(always)]
        unsafe fn total(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let x = _mm_add_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
                let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_add_ps(x, _mm_movehdup_ps(x)))
            }
        }
        #[inline(always)]
        unsafe fn first(self, n: usize, b: Self) -> Self {
            // SAFETY: the caller's promise.
            unsafe {
                let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                let inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lane);
                _mm256_blendv_ps(b, self, _mm256_castsi256_ps(inside))
            }
        }
        #[inline(always)]
        unsafe fn times_two_to(self, z: Self) -> Self {
            // SAFETY: the caller's promise.
            unsafe {
                let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(z));
                let power = _mm256_add_epi32(power, _mm256_set1_epi32(127 << 23));
                _mm256_mul_ps(self, _mm256_castsi256_ps(power))
            }
        }
    }
}
