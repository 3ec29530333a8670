//! f32 matrix products through the `gemm-f32` crate (`gemm` without its other number types, which take minutes to
//! build), behind a safe door.

use crate::window::Window;

/// A strided read-only matrix view.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    row: usize,
    col: usize,
}

impl<'a> View<'a> {
    /// Row-major with `stride` floats from one row to the next.
    pub fn rows(data: &'a [f32], stride: usize) -> View<'a> {
        View { data, row: stride, col: 1 }
    }

    /// The transpose.
    pub fn t(self) -> View<'a> {
        View { row: self.col, col: self.row, ..self }
    }

    fn fits(&self, rows: usize, cols: usize) -> bool {
        (rows - 1) * self.row + (cols - 1) * self.col < self.data.len()
    }
}

/// What happens to the old content of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Overwritten.
    Set,
    /// Added to.
    Add,
}

/// Sizes of a product: `[m, k] x [k, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Inner length.
    pub k: usize,
}

/// out `[m, n]` (row stride `stride`) = or += scale * a `[m, k]` b `[k, n]`, on the calling thread.
///
/// # Panics
/// When a slice is shorter than the sizes say.
pub fn gemm(size: Size, scale: f32, a: View, b: View, out: &mut [f32], stride: usize, write: Write) {
    gemm_into(size.k, scale, a, b, Window::new(out, size.m, size.n, stride), write);
}

/// As [`gemm()`], into a window of a larger matrix.
///
/// # Panics
/// When a slice is shorter than the sizes say.
pub fn gemm_into(k: usize, scale: f32, a: View, b: View, mut out: Window, write: Write) {
    let (m, n, stride) = (out.rows(), out.width(), out.stride());
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if write == Write::Set {
            (0..m).for_each(|r| out.row(r).fill(0.0));
        }
        return;
    }
    assert!(a.fits(m, k) && b.fits(k, n));
    // Its microkernels write columns, so a row-major result is computed as its transpose: out^T = b^T a^T.
    let (m, n, [down, right], a, b) = match stride {
        0..=1 => (m, n, [stride, 1], a, b),
        _ => (n, m, [1, stride], b.t(), a.t()),
    };
    // SAFETY: the asserts above keep every address that the product forms inside its slice; the window is exclusively
    // borrowed.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            m,
            n,
            k,
            out.as_mut_ptr(),
            right as isize,
            down as isize,
            write == Write::Add,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}

/// out `[m, n]` (row stride `stride`) = x `[m, k]` w `[k, n]`, with the same bits for a row whatever rows stand beside
/// it.
///
/// The `gemm-f32` crate takes another summation order for one row, for one column, and (by its choice of block length)
/// for at most 64 rows times at most 64 columns: one row is computed as two, one column by dot products, and narrow
/// results in blocks of at most 64 rows.
///
/// # Panics
/// When a slice is shorter than the sizes say.
pub fn matmul(size: Size, x: &[f32], w: &[f32], out: &mut [f32], stride: usize) {
    let Size { m, n, k } = size;
    if n == 1 {
        for r in 0..m {
            out[r * stride] = dot(&x[r * k..(r + 1) * k], w);
        }
        return;
    }
    let block = if n <= 64 { 64 } else { m.max(1) };
    for r in (0..m).step_by(block) {
        let rows = block.min(m - r);
        let (x, out) = (&x[r * k..(r + rows) * k], &mut out[r * stride..]);
        if rows > 1 {
            gemm(Size { m: rows, n, k }, 1.0, View::rows(x, k), View::rows(w, n), out, stride, Write::Set);
        } else {
            // A row stride of 0 reads the one row twice; the second result is thrown away.
            let mut two = vec![0.0; 2 * n];
            gemm(
                Size { m: 2, n, k },
                1.0,
                View { data: x, row: 0, col: 1 },
                View::rows(w, n),
                &mut two,
                n,
                Write::Set,
            );
            out[..n].copy_from_slice(&two[..n]);
        }
    }
}

kernel! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        crate::math::dot(a, b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
            .collect()
    }

    #[test]
    fn products_are_right_for_odd_sizes() {
        for (m, n, k) in [(1, 1, 1), (1, 5, 3), (3, 1, 7), (2, 77, 384), (17, 33, 1), (5, 9, 0), (65, 64, 70)] {
            let (a, b) = (noise(m * k, 1), noise(k * n, 2));
            let mut out = vec![9.0; m * n];
            matmul(Size { m, n, k }, &a, &b, &mut out, n);
            for r in 0..m {
                for c in 0..n {
                    let want: f64 = (0..k).map(|i| f64::from(a[r * k + i]) * f64::from(b[i * n + c])).sum();
                    let got = f64::from(out[r * n + c]);
                    assert!((got - want).abs() < 1e-4, "{m}x{n}x{k} at {r},{c}: {got} != {want}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        for (n, k) in
            [(1, 40), (2, 768), (5, 768), (64, 1536), (77, 384), (384, 1536), (384, 384), (1152, 384), (768, 3072)]
        {
            let rows = 150;
            let (x, w) = (noise(rows * k, 3), noise(k * n, 4));
            let mut all = vec![0.0; rows * n];
            matmul(Size { m: rows, n, k }, &x, &w, &mut all, n);
            for (start, len) in [(0, 1), (149, 1), (3, 2), (7, 13), (40, 64), (10, 65), (1, 130)] {
                let mut some = vec![0.0; len * n];
                matmul(Size { m: len, n, k }, &x[start * k..(start + len) * k], &w, &mut some, n);
                assert!(some == all[start * n..(start + len) * n], "n {n} k {k} rows {start}+{len}");
            }
        }
    }
}
