//! Elementwise mathematics: exp, activations, softmax, biases, sums.

use crate::gelu::gelu_of_all;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, isa};
use crate::window::Window;

pub use crate::gelu::gelu;

/// The non-linearity after a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// f(x) = x.
    Identity,
    /// Exact GELU, x * Phi(x) (Hendrycks & Gimpel 2016).
    Gelu,
    /// max(x, 0).
    Relu,
    /// tanh(x).
    Tanh,
}

/// e^x by range reduction to [-ln2/2, ln2/2] and a degree-7 Taylor polynomial; relative error about 2e-7 for
/// -87 < x < 87, clamped outside.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let t = (x * std::f32::consts::LOG2_E).clamp(-126.0, 126.0);
    let z = t + 12_582_912.0; // 1.5 * 2^23: rounds to an integer that sits in the low mantissa bits
    let f = (t - (z - 12_582_912.0)) * std::f32::consts::LN_2;
    let p = f * (1.0 / 5040.0) + 1.0 / 720.0;
    let p = p * f + 1.0 / 120.0;
    let p = (((p * f + 1.0 / 24.0) * f + 1.0 / 6.0) * f + 0.5) * f * f + f + 1.0;
    p * f32::from_bits((z.to_bits() << 23).wrapping_add(127 << 23))
}

/// The normal distribution function by Abramowitz & Stegun 7.1.26 (absolute error below 1.5e-7 before rounding), and
/// exp(-x^2 / 2), which it needs.
#[inline(always)]
fn cdf_and_bell(x: f32) -> (f32, f32) {
    let a = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = ((((1.061_405_4 * t - 1.453_152) * t + 1.421_413_7) * t - 0.284_496_74) * t + 0.254_829_6) * t;
    let bell = exp(-a * a);
    let half = 0.5 * p * bell;
    (if x > 0.0 { 1.0 - half } else { half }, bell)
}

/// d gelu / dx = Phi(x) + x * phi(x).
#[inline(always)]
pub fn gelu_slope(x: f32) -> f32 {
    let (cdf, bell) = cdf_and_bell(x);
    cdf + x * 0.398_942_3 * bell
}

/// Sum of f(x) in 16 fixed lanes: vectorisable, and the same order on every machine.
#[inline(always)]
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0f32; 16];
    for c in chunks {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l += f(*v);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|v| f(*v)).sum::<f32>()
}

/// Sum of a[i] * b[i] in 16 fixed lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((ca, ra), (cb, rb)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut lanes = [0f32; 16];
    for (a, b) in ca.iter().zip(cb) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + ra.iter().zip(rb).map(|(a, b)| a * b).sum::<f32>()
}

/// x = f(x). Plain loops: a closure handed to an iterator may be compiled apart, for the base instruction set.
#[inline(always)]
pub(crate) fn activate(x: &mut [f32], f: Activation) {
    match f {
        Activation::Identity => {}
        Activation::Gelu => gelu_of_all(x),
        Activation::Relu => {
            for v in x {
                *v = v.max(0.0);
            }
        }
        Activation::Tanh => {
            for v in x {
                *v = v.tanh();
            }
        }
    }
}

/// y = f(y + bias).
pub fn bias_activation(y: &mut Window, bias: &[f32], f: Activation) {
    bias_activation_rounded(y, bias, f, Rounding::F32);
}

kernel! {
    /// x += bias on every row of `bias.len()`, then y = f(x): for training, where x is kept. `y` is not written for the
    /// identity.
    pub fn bias_activation_keep(x: &mut [f32], bias: &[f32], y: &mut [f32], f: Activation) {
        if bias.is_empty() {
            return;
        }
        for (r, x) in x.chunks_exact_mut(bias.len()).enumerate() {
            x.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            if f != Activation::Identity {
                let y = &mut y[r * bias.len()..(r + 1) * bias.len()];
                y.copy_from_slice(x);
                activate(y, f);
            }
        }
    }
}

kernel! {
    /// dy *= f'(x), where x is the input of the activation (not read for the identity); the sums of its columns are added
    /// to `sums`.
    pub fn activation_back(x: &[f32], dy: &mut [f32], sums: &mut [f32], f: Activation) {
        #[inline(always)]
        fn both(x: &[f32], dy: &mut [f32], sums: &mut [f32], slope: impl Fn(f32) -> f32) {
            let n = sums.len();
            for (x, dy) in x.chunks_exact(n).zip(dy.chunks_exact_mut(n)) {
                for ((d, x), s) in dy.iter_mut().zip(x).zip(sums.iter_mut()) {
                    *d *= slope(*x);
                    *s += *d;
                }
            }
        }
        match f {
            _ if sums.is_empty() => {}
            Activation::Identity => {
                for row in dy.chunks_exact(sums.len()) {
                    sums.iter_mut().zip(row).for_each(|(s, d)| *s += d);
                }
            }
            Activation::Gelu => both(x, dy, sums, gelu_slope),
            Activation::Relu => both(x, dy, sums, |v| if v > 0.0 { 1.0 } else { 0.0 }),
            Activation::Tanh => both(x, dy, sums, |v| 1.0 - v.tanh() * v.tanh()),
        }
    }
}

#[inline(always)]
pub(crate) fn softmax_row(row: &mut [f32]) {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m });
    row.iter_mut().for_each(|v| *v = exp(*v - max));
    let inv = 1.0 / sum(row, |v| v);
    row.iter_mut().for_each(|v| *v *= inv);
}

kernel! {
    /// Softmax of every row of `width`.
    pub fn softmax(x: &mut [f32], width: usize) {
        x.chunks_exact_mut(width.max(1)).for_each(softmax_row);
    }
}

kernel! {
    /// into += from.
    pub fn add(into: &mut [f32], from: &[f32]) {
        into.iter_mut().zip(from).for_each(|(a, b)| *a += b);
    }
}

kernel! {
    /// `into[c] += sum over rows of x[:, c]`.
    pub fn add_column_sums(x: &[f32], into: &mut [f32]) {
        if into.is_empty() {
            return;
        }
        for row in x.chunks_exact(into.len()) {
            into.iter_mut().zip(row).for_each(|(a, b)| *a += b);
        }
    }
}

kernel! {
    /// Sum of squares, in f64 over blocks of 4,096 so that neither length nor thread count moves the last bits.
    pub fn sum_of_squares(x: &[f32]) -> f64 {
        x.chunks(4096).map(|c| f64::from(sum(c, |v| v * v))).sum()
    }
}

kernel! {
    /// Rounds every value to bfloat16, ties to even; NaN stays NaN.
    pub fn round_to_bf16(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = bf16(*x));
    }
}

kernel! {
    /// y = f(round(y + round(bias))).
    pub fn bias_activation_rounded(y: &mut Window, bias: &[f32], f: Activation, to: Rounding) {
        for r in 0..y.rows() {
            let row = y.row(r);
            match to {
                Rounding::F32 => row.iter_mut().zip(bias).for_each(|(y, b)| *y += b),
                Rounding::F16 => row.iter_mut().zip(bias).for_each(|(y, b)| *y = f16(*y + f16(*b))),
                Rounding::Bf16 => row.iter_mut().zip(bias).for_each(|(y, b)| *y = bf16(*y + bf16(*b))),
            }
            activate(row, f);
        }
    }
}

/// Rounds every value to IEEE half precision, ties to even; beyond its range to infinity.
pub fn round_to_f16(x: &[f32], y: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 {
        // SAFETY: `isa()` is at most what this CPU has.
        return unsafe { f16_on_avx512(x, y) };
    }
    f16_plain(x, y);
}

kernel! {
    fn f16_plain(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = f16(*x));
    }
}

/// By the CPU's own conversion.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn f16_on_avx512(x: &[f32], y: &mut [f32]) {
    use std::arch::x86_64::*;
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<16>(), y.as_chunks_mut::<16>());
    for (x, y) in x.iter().zip(y) {
        // SAFETY: 16 floats each.
        unsafe {
            let half =
                _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm512_loadu_ps(x.as_ptr()));
            _mm512_storeu_ps(y.as_mut_ptr(), _mm512_cvtph_ps(half));
        }
    }
    y_rest.iter_mut().zip(x_rest).for_each(|(y, x)| *y = f16(*x));
}

kernel! {
    /// The largest absolute value of each column of rows of `out.len()`.
    pub fn column_absmax(x: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        for row in x.chunks_exact(out.len().max(1)) {
            out.iter_mut().zip(row).for_each(|(m, v)| *m = if v.abs() > *m { v.abs() } else { *m });
        }
    }
}

kernel! {
    /// y += a x.
    pub fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
    }
}

/// The type that values are rounded to; they stay in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// None.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Rounding {
    /// One value.
    #[inline(always)]
    pub fn of(self, x: f32) -> f32 {
        match self {
            Rounding::F32 => x,
            Rounding::F16 => f16(x),
            Rounding::Bf16 => bf16(x),
        }
    }

    /// y = x, rounded.
    pub fn all(self, x: &[f32], y: &mut [f32]) {
        match self {
            Rounding::F32 => y.copy_from_slice(x),
            Rounding::F16 => round_to_f16(x, y),
            Rounding::Bf16 => round_to_bf16(x, y),
        }
    }
}

/// The nearest half-precision number, ties to even.
#[inline(always)]
pub fn f16(x: f32) -> f32 {
    let bits = x.to_bits() & 0x7fff_ffff;
    let size = f32::from_bits(bits);
    let normal = f32::from_bits(bits.wrapping_add(0xfff + ((bits >> 13) & 1)) & 0xffff_e000);
    // Below 2^-14 numbers lie 2^-24 apart, as f32 do between 1/2 and 1.
    let small = (size + 0.5) - 0.5;
    let rounded = if size < 6.103_515_6e-5 { small } else { normal };
    let rounded = if rounded > 65504.0 { f32::INFINITY } else { rounded };
    f32::from_bits(if x.is_nan() { x.to_bits() } else { rounded.to_bits() | (x.to_bits() & 0x8000_0000) })
}

/// The nearest bfloat16, ties to even.
#[inline(always)]
pub fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    f32::from_bits(if x.is_nan() { bits | 0x0040_0000 } else { rounded })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Phi by a long Taylor series in f64: sum of (-1)^n x^(2n+1) / (2^n n! (2n+1)).
    fn cdf64(x: f64) -> f64 {
        let (mut term, mut total) = (x, 0.0);
        for n in 0..200 {
            total += term / (2 * n + 1) as f64;
            term *= -x * x / (2.0 * (n + 1) as f64);
        }
        0.5 + total / std::f64::consts::TAU.sqrt()
    }

    #[test]
    fn exp_is_close_to_exact() {
        for i in -8700..8700 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 1e-5 * f64::from(x.abs()).max(1.0) * 0.1, "exp({x}) = {got}");
        }
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn the_slope_of_gelu_is_close_to_exact() {
        for i in -500..=500 {
            let x = i as f32 / 100.0;
            let x64 = f64::from(x);
            let phi = (-0.5 * x64 * x64).exp() / std::f64::consts::TAU.sqrt();
            assert!((f64::from(gelu_slope(x)) - cdf64(x64) - x64 * phi).abs() < 1e-6, "slope({x})");
        }
    }

    #[test]
    fn bf16_rounds_to_even() {
        let half = 1.0 / 256.0; // of the distance between neighbours above 1
        let rows = [
            (1.0, 1.0),
            (1.0 + half, 1.0),
            (1.0 + 3.0 * half, 1.0 + 4.0 * half),
            (-1.0 - half, -1.0),
            (3.0e38, 3.0e38),
        ];
        for (x, want) in rows {
            assert!((bf16(x) - want).abs() <= want.abs() * 0.004, "{x} -> {}", bf16(x));
            assert_eq!(bf16(x).to_bits() & 0xffff, 0);
        }
        assert_eq!(bf16(1.0 + half), 1.0);
        assert_eq!(bf16(1.0 + 3.0 * half), 1.0 + 4.0 * half);
        assert!(bf16(f32::NAN).is_nan());
    }

    #[test]
    fn f16_rounds_to_even_and_keeps_its_edges() {
        let step = 2f32.powi(-10); // between neighbours above 1
        let tiny = 2f32.powi(-24); // the smallest
        let rows = [
            (1.0 + 0.5 * step, 1.0),
            (1.0 + 1.5 * step, 1.0 + 2.0 * step),
            (-1.0 - 0.75 * step, -1.0 - step),
            (0.5 * tiny, 0.0),
            (0.75 * tiny, tiny),
            (-2.5 * tiny, -2.0 * tiny),
            (65519.0, 65504.0),
            (65520.0, f32::INFINITY),
            (-1e30, f32::NEG_INFINITY),
            (f32::INFINITY, f32::INFINITY),
            (0.0, 0.0),
        ];
        for (x, want) in rows {
            assert_eq!(f16(x), want, "{x}");
        }
        assert!(f16(f32::NAN).is_nan() && f16(-0.0).is_sign_negative());
    }

    #[test]
    fn every_tier_rounds_to_f16_the_same() {
        let x: Vec<f32> = (0..200_003u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
        let mut y = vec![9.0; x.len()];
        round_to_f16(&x, &mut y);
        for (x, y) in x.iter().zip(y) {
            assert!(y.to_bits() == f16(*x).to_bits() || y.is_nan() && x.is_nan(), "{x}: {y} {}", f16(*x));
        }
    }

    #[test]
    fn softmax_sums_to_one() {
        let mut x: Vec<f32> = (0..37 * 3).map(|i| (i * 7919 % 101) as f32 / 9.0 - 5.0).collect();
        softmax(&mut x, 37);
        for row in x.chunks(37) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }
}
