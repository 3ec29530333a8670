//! int8 rows: symmetric quantisation by row absmax and the integer product. Accumulators are exact i32.

kernel! {
    /// q = round(x * 127 / absmax), ties to even, and scale = absmax / 127, for every row of `width`; a row of zeros
    /// has scale 0.
    pub fn quantise(x: &[f32], width: usize, q: &mut [i8], scale: &mut [f32]) {
        for (r, scale) in scale.iter_mut().enumerate() {
            let cols = r * width..(r + 1) * width;
            let (x, q) = (&x[cols.clone()], &mut q[cols]);
            let max = x.iter().fold(0f32, |m, v| if v.abs() > m { v.abs() } else { m });
            let inv = if max > 0.0 { 127.0 / max } else { 0.0 };
            x.iter().zip(q).for_each(|(x, q)| *q = (x * inv).round_ties_even() as i8);
            *scale = max / 127.0;
        }
    }
}

/// An int8 matrix `[n, k]` with one scale per row, as the product reads it.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// `[n, k]`, row-major.
    pub values: Vec<i8>,
    /// What an accumulator is multiplied by. `[n]`
    pub scale: Vec<f32>,
    /// Columns.
    pub k: usize,
}

kernel! {
    /// out `[rows, n]` (row stride `stride`) = (q w^T) as exact integers * scale * w.scale.
    pub fn matmul(q: &[i8], scale: &[f32], w: &Matrix, out: &mut [f32], stride: usize) {
        const ROWS: usize = 4; // rows of x that share one pass over a row of w
        let (n, k) = (w.scale.len(), w.k);
        for first in (0..scale.len()).step_by(ROWS) {
            let rows = ROWS.min(scale.len() - first);
            for c in 0..n {
                let wrow = &w.values[c * k..(c + 1) * k];
                for r in first..first + rows {
                    let acc = dot(&q[r * k..(r + 1) * k], wrow);
                    out[r * stride + c] = acc as f32 * (scale[r] * w.scale[c]);
                }
            }
        }
    }
}

/// Exact in i32 for up to 2^17 columns: 127 * 127 * 2^17 < 2^31.
#[inline(always)]
fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_is_the_exact_integer_one() {
        for (rows, n, k) in [(1, 1, 1), (5, 7, 33), (9, 77, 384), (3, 2, 0)] {
            let q: Vec<i8> = (0..rows * k).map(|i| (i * 97 % 255) as u8 as i8).collect();
            let values: Vec<i8> = (0..n * k).map(|i| (i * 61 % 251) as u8 as i8).collect();
            let w = Matrix { values, scale: vec![1.0; n], k };
            let mut out = vec![0.5; rows * n];
            matmul(&q, &vec![1.0; rows], &w, &mut out, n);
            for r in 0..rows {
                for c in 0..n {
                    let want: i64 = (0..k).map(|i| i64::from(q[r * k + i]) * i64::from(w.values[c * k + i])).sum();
                    assert_eq!(out[r * n + c], want as f32, "{rows}x{n}x{k}");
                }
            }
        }
    }

    #[test]
    fn quantising_keeps_zero_and_the_extremes() {
        let x = [0.0, -2.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0];
        let (mut q, mut s) = ([9i8; 8], [0f32; 2]);
        quantise(&x, 4, &mut q, &mut s);
        assert_eq!(q, [0, -127, 64, 32, 0, 0, 0, 0]);
        assert_eq!(s, [2.0 / 127.0, 0.0]);
    }
}
