//! LayerNorm (Ba, Kiros & Hinton 2016) with its residual, forward and backward.

use crate::int8;
use crate::math::{dot, sum};

/// `total` is the sum of x.
#[inline(always)]
fn norm_row(x: &mut [f32], total: f32, gamma: &[f32], beta: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = total / n;
    let inv = 1.0 / (sum(x, |v| (v - mean) * (v - mean)) / n + eps).sqrt();
    for ((x, g), b) in x.iter_mut().zip(gamma).zip(beta) {
        *x = (*x - mean) * inv * g + b;
    }
    (mean, inv)
}

/// x += r; the sum of the result, in the order of [`sum`].
#[inline(always)]
fn add_and_sum(x: &mut [f32], r: &[f32]) -> f32 {
    let ((chunks, rest), (r_chunks, r_rest)) = (x.as_chunks_mut::<16>(), r.as_chunks::<16>());
    let mut lanes = [0f32; 16];
    for (x, r) in chunks.iter_mut().zip(r_chunks) {
        for i in 0..16 {
            x[i] += r[i];
            lanes[i] += x[i];
        }
    }
    rest.iter_mut().zip(r_rest).for_each(|(x, r)| *x += r);
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

kernel! {
    /// x = LayerNorm(x + residual) on every row of `gamma.len()`, without a residual where it is empty; quantises the
    /// result too where `int8` is given (range, and rows as in [`int8::Rows`]).
    pub fn add_layer_norm(
        x: &mut [f32], residual: &[f32], gamma: &[f32], beta: &[f32], eps: f32,
        int8: Option<(int8::Range, &mut [i8], &mut [f32])>,
    ) {
        let n = gamma.len();
        let mut int8 = int8.map(|(range, q, scale)| (range.fixed(), q, scale));
        for (r, row) in x.chunks_exact_mut(n).enumerate() {
            let total = match residual.is_empty() {
                true => sum(row, |v| v),
                false => add_and_sum(row, &residual[r * n..(r + 1) * n]),
            };
            norm_row(row, total, gamma, beta, eps);
            if let Some((fixed, q, scale)) = &mut int8 {
                let q = &mut q[r * int8::stride(n)..(r + 1) * int8::stride(n)];
                scale[r] = int8::quantise_row(row, *fixed, q);
            }
        }
    }
}

kernel! {
    /// As [`add_layer_norm`] (no residual where it is empty), keeping for the backward the normalised rows
    /// z = (x - mean) / sigma in `z` and 1 / sigma in `inv`; the result goes to `y`.
    pub fn layer_norm_keep(
        x: &[f32], residual: &[f32], gamma: &[f32], beta: &[f32], eps: f32,
        y: &mut [f32], z: &mut [f32], inv: &mut [f32],
    ) {
        let n = gamma.len();
        for (r, i) in inv.iter_mut().enumerate() {
            let cols = r * n..(r + 1) * n;
            let (y, z) = (&mut y[cols.clone()], &mut z[cols.clone()]);
            y.copy_from_slice(&x[cols.clone()]);
            if !residual.is_empty() {
                y.iter_mut().zip(&residual[cols]).for_each(|(y, r)| *y += r);
            }
            z.copy_from_slice(y);
            let (mean, one_over_sigma) = norm_row(y, sum(y, |v| v), gamma, beta, eps);
            z.iter_mut().for_each(|z| *z = (*z - mean) * one_over_sigma);
            *i = one_over_sigma;
        }
    }
}

kernel! {
    /// dx = inv (dz - mean(dz) - z mean(dz z)) with dz = dy gamma; adds dy z to `dgamma` and dy to `dbeta`.
    pub fn layer_norm_back(
        dy: &[f32], z: &[f32], inv: &[f32], gamma: &[f32],
        dx: &mut [f32], dgamma: &mut [f32], dbeta: &mut [f32],
    ) {
        let n = gamma.len();
        for (r, inv) in inv.iter().enumerate() {
            let cols = r * n..(r + 1) * n;
            let (dy, z, dx) = (&dy[cols.clone()], &z[cols.clone()], &mut dx[cols]);
            for c in 0..n {
                dx[c] = dy[c] * gamma[c];
                dgamma[c] += dy[c] * z[c];
                dbeta[c] += dy[c];
            }
            let mean = sum(dx, |v| v) / n as f32;
            let slope = dot(dx, z) / n as f32;
            dx.iter_mut().zip(z).for_each(|(d, z)| *d = inv * (*d - mean - z * slope));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_mean_beta_and_deviation_gamma() {
        for range in [int8::Range::Row, int8::Range::Fixed(3.0)] {
            let mut x: Vec<f32> = (0..3 * 50).map(|i| ((i * 31) % 17) as f32).collect();
            let (mut q, mut scale) = ([9; 3 * 64], [0.0; 3]);
            add_layer_norm(&mut x, &[], &[2.0; 50], &[1.0; 50], 1e-12, Some((range, &mut q, &mut scale)));
            for row in x.chunks(50) {
                let mean = row.iter().sum::<f32>() / 50.0;
                let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / 50.0;
                assert!((mean - 1.0).abs() < 1e-5 && (var - 4.0).abs() < 1e-4, "{mean} {var}");
            }
            let (mut own, mut own_scale) = ([8; 3 * 64], [0.0; 3]);
            int8::quantise(&x, 50, range, &mut own, &mut own_scale);
            assert_eq!((q, scale), (own, own_scale), "{range:?}: the same integers as quantising later");
        }
    }

    #[test]
    fn keeping_changes_no_bit() {
        let x: Vec<f32> = (0..4 * 33).map(|i| ((i * 29) % 23) as f32 * 0.1).collect();
        let r: Vec<f32> = (0..4 * 33).map(|i| ((i * 37) % 19) as f32 * 0.2).collect();
        let (gamma, beta) = (vec![1.5; 33], vec![0.25; 33]);
        let mut plain = x.clone();
        add_layer_norm(&mut plain, &r, &gamma, &beta, 1e-5, None);
        let (mut y, mut z, mut inv) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; 4]);
        layer_norm_keep(&x, &r, &gamma, &beta, 1e-5, &mut y, &mut z, &mut inv);
        assert_eq!(plain, y);
    }
}
