//! GELU (Hendrycks & Gimpel 2016), exact: x Phi(x) = max(x, 0) - r(|x|) with r(t) = t (1 - Phi(t)), by polynomials on
//! short pieces. One division less than by a formula of erf, and no exponential; the coefficients of all pieces
//! fit into ten vector registers, where AVX-512 looks them up.
//!
//! Piece i is for t near i / `SCALE`. Its polynomial in f = `SCALE` t - i, -1/2 <= f <= 1/2, meets r at five points,
//! both ends among them, so that neighbours meet too. All is within 1e-7 of exact (`tests`).

#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, isa};

const PIECES: usize = 32;
/// Pieces in a unit. The last piece is 0: in front of it r is below 4e-8.
const SCALE: f32 = 5.375;
/// Coefficients of f^0 to f^4, piece after piece.
static COEFFICIENTS: [[f32; PIECES]; 5] = coefficients();

/// 1.5 * 2^23: rounds to an integer that sits in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// t (1 - Phi(t)), by 1 - Phi(t) = 1/2 - phi(t) (t + t^3 / 3 + t^5 / (3 5) + ..).
const fn rest(t: f64) -> f64 {
    // phi(t) = bell / sqrt(2 pi); bell by the series of exp at 1/64 of its argument, squared six times.
    let y = -0.5 * t * t / 64.0;
    let (mut bell, mut term, mut n) = (1.0, 1.0, 1);
    while n < 20 {
        term *= y / n as f64;
        bell += term;
        n += 1;
    }
    let mut i = 0;
    while i < 6 {
        bell *= bell;
        i += 1;
    }
    let (mut sum, mut term, mut n) = (t, t, 1);
    while n < 120 {
        term *= t * t / (2 * n + 1) as f64;
        sum += term;
        n += 1;
    }
    const SQRT_OF_TAU: f64 = std::f64::consts::SQRT_2 / std::f64::consts::FRAC_2_SQRT_PI * 2.0;
    t * (0.5 - bell / SQRT_OF_TAU * sum)
}

const fn coefficients() -> [[f32; PIECES]; 5] {
    let mut all = [[0.0; PIECES]; 5];
    let mut piece = 0;
    while piece + 1 < PIECES {
        // Values at f = -1/2, -1/4, 0, 1/4, 1/2.
        let (mut y, mut i) = ([0.0; 5], 0);
        while i < 5 {
            y[i] = rest((piece as f64 + (i as f64 - 2.0) / 4.0) / SCALE as f64);
            i += 1;
        }
        // The odd and the even part, in powers of 4 f.
        let (odd, even) = ([(y[3] - y[1]) / 2.0, (y[4] - y[0]) / 2.0], [(y[3] + y[1]) / 2.0, (y[4] + y[0]) / 2.0]);
        let cubic = (odd[1] - 2.0 * odd[0]) / 6.0;
        let fourth = (even[1] - 4.0 * even[0] + 3.0 * y[2]) / 12.0;
        let powers = [y[2], odd[0] - cubic, even[0] - y[2] - fourth, cubic, fourth];
        let (mut k, mut four) = (0, 1.0);
        while k < 5 {
            all[k][piece] = (powers[k] * four) as f32;
            four *= 4.0;
            k += 1;
        }
        piece += 1;
    }
    all
}

/// x Phi(x).
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    let s = (x.abs() * SCALE).min((PIECES - 1) as f32);
    let z = s + ROUND;
    let (f, i) = (s - (z - ROUND), z.to_bits() as usize % PIECES);
    let c = &COEFFICIENTS;
    let rest = (((c[4][i] * f + c[3][i]) * f + c[2][i]) * f + c[1][i]) * f + c[0][i];
    (if x < 0.0 { 0.0 } else { x }) - rest
}

/// x = gelu(x), the same bits on every instruction set.
#[inline(always)]
pub(crate) fn gelu_of_all(x: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 {
        // SAFETY: `isa()` is at most what this CPU has; one row.
        return unsafe { x86::gelu_of_rows(x.as_mut_ptr(), 1, x.len(), x.len()) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx2 {
        // SAFETY: as above.
        return unsafe { x86::gelu_on_avx2(x) };
    }
    for v in x {
        *v = gelu(*v);
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::{COEFFICIENTS, PIECES, ROUND, SCALE};
    use std::arch::x86_64::*;

    /// [`COEFFICIENTS`] in registers.
    #[derive(Clone, Copy)]
    struct Table([[__m512; 2]; 5]);

    impl Table {
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn load() -> Table {
            // SAFETY: 32 floats in a row.
            let half = |k: usize, i: usize| unsafe { _mm512_loadu_ps(COEFFICIENTS[k].as_ptr().add(16 * i)) };
            Table(std::array::from_fn(|k| [half(k, 0), half(k, 1)]))
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        fn gelu(&self, x: __m512) -> __m512 {
            let splat = |x: f32| _mm512_set1_ps(x);
            let s = _mm512_min_ps(_mm512_mul_ps(_mm512_abs_ps(x), splat(SCALE)), splat((PIECES - 1) as f32));
            let z = _mm512_add_ps(s, splat(ROUND));
            let f = _mm512_sub_ps(s, _mm512_sub_ps(z, splat(ROUND)));
            // The lookup reads the low five bits of an index.
            let i = _mm512_castps_si512(z);
            let coefficient = |k: usize| _mm512_permutex2var_ps(self.0[k][0], i, self.0[k][1]);
            let mut rest = coefficient(4);
            for k in [3, 2, 1, 0] {
                rest = _mm512_add_ps(_mm512_mul_ps(rest, f), coefficient(k));
            }
            // The second operand where one of them is not a number.
            _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), rest)
        }
    }

    /// [`gelu`](super::gelu) of 16 numbers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn gelu(x: __m512) -> __m512 {
        Table::load().gelu(x)
    }

    /// As [`gelu_of_all`](super::gelu_of_all), eight numbers at a time.
    #[target_feature(enable = "avx2")]
    pub fn gelu_on_avx2(x: &mut [f32]) {
        let splat = |x: f32| _mm256_set1_ps(x);
        let (eights, rest) = x.as_chunks_mut::<8>();
        for eight in eights {
            // SAFETY: eight floats.
            let x = unsafe { _mm256_loadu_ps(eight.as_ptr()) };
            let t = _mm256_andnot_ps(splat(-0.0), x);
            let s = _mm256_min_ps(_mm256_mul_ps(t, splat(SCALE)), splat((PIECES - 1) as f32));
            let z = _mm256_add_ps(s, splat(ROUND));
            let f = _mm256_sub_ps(s, _mm256_sub_ps(z, splat(ROUND)));
            // A lookup in eight reads the low three bits of the index; the next two choose among four of them, as signs.
            let i = _mm256_castps_si256(z);
            let eights = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(i));
            let halves = _mm256_castsi256_ps(_mm256_slli_epi32::<27>(i));
            let coefficient = |k: usize| {
                let part = |p: usize| {
                    // SAFETY: 32 floats in a row.
                    _mm256_permutevar8x32_ps(unsafe { _mm256_loadu_ps(COEFFICIENTS[k].as_ptr().add(8 * p)) }, i)
                };
                let low = _mm256_blendv_ps(part(0), part(1), eights);
                _mm256_blendv_ps(low, _mm256_blendv_ps(part(2), part(3), eights), halves)
            };
            let mut rest = coefficient(4);
            for k in [3, 2, 1, 0] {
                rest = _mm256_add_ps(_mm256_mul_ps(rest, f), coefficient(k));
            }
            // The second operand where one of them is not a number.
            let y = _mm256_sub_ps(_mm256_max_ps(_mm256_setzero_ps(), x), rest);
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), y) };
        }
        rest.iter_mut().for_each(|v| *v = super::gelu(*v));
    }

    /// x = gelu(x) for `width` numbers of each of `rows` rows that are `step` floats apart.
    ///
    /// # Safety
    /// They may be read and written.
    #[inline(never)] // the table takes ten registers
    #[target_feature(enable = "avx512f")]
    pub unsafe fn gelu_of_rows(x: *mut f32, rows: usize, width: usize, step: usize) {
        let table = Table::load();
        for r in 0..rows {
            for c in (0..width).step_by(16) {
                let (at, mask) = (x.wrapping_add(r * step + c), u16::MAX >> (16 - (width - c).min(16)));
                // SAFETY: passed on; only what the mask names is read and written.
                unsafe { _mm512_mask_storeu_ps(at, mask, table.gelu(_mm512_maskz_loadu_ps(mask, at))) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Phi by a long Taylor series in f64: sum of (-1)^n x^(2n+1) / (2^n n! (2n+1)).
    fn cdf(x: f64) -> f64 {
        let (mut term, mut total) = (x, 0.0);
        for n in 0..200 {
            total += term / (2 * n + 1) as f64;
            term *= -x * x / (2.0 * (n + 1) as f64);
        }
        0.5 + total / std::f64::consts::TAU.sqrt()
    }

    #[test]
    fn it_is_close_to_exact() {
        for i in -60_000..=60_000 {
            let x = i as f32 / 10_000.0;
            let (got, want) = (f64::from(gelu(x)), f64::from(x) * cdf(f64::from(x)));
            // Beside the error of r one rounding of the result.
            let bound = 1e-7 + 6e-8 * want.abs();
            assert!((got - want).abs() < bound, "gelu({x}) = {got}, want {want}");
        }
    }

    #[test]
    fn the_edges() {
        assert_eq!(gelu(0.0), 0.0);
        assert_eq!((gelu(7.0), gelu(-7.0)), (7.0, 0.0));
        assert_eq!((gelu(f32::MAX), gelu(f32::MIN)), (f32::MAX, 0.0));
        assert_eq!((gelu(f32::INFINITY), gelu(f32::NEG_INFINITY)), (f32::INFINITY, 0.0));
        assert!(gelu(f32::NAN).is_nan());
    }

    #[test]
    fn every_tier_gives_the_same_bits() {
        let edges = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-40, 5.859, 5.86];
        let many = (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)));
        let near = (0..100_000).map(|i| (i - 50_000) as f32 * 1.3e-4);
        let mut x: Vec<f32> = edges.into_iter().chain(many).chain(near).chain([1.0; 7]).collect();
        let want: Vec<f32> = x.iter().map(|x| gelu(*x)).collect();
        gelu_of_all(&mut x);
        for ((got, want), i) in x.iter().zip(&want).zip(0..) {
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{i}: {got} {want}");
        }
    }
}
