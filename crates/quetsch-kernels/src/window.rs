//! A rectangle of a row-major matrix that is to be written: what one thread of several writes of a result that they
//! share.

use std::marker::PhantomData;
use std::ops::Range;

/// `[rows, width]`, `stride` floats from one row to the next; what stands between the rows belongs to others.
pub struct Window<'a> {
    data: *mut f32,
    rows: usize,
    width: usize,
    stride: usize,
    lent: PhantomData<&'a mut [f32]>,
}

// SAFETY: as `&mut [f32]`: a window alone reaches its elements, and they have no ties to a thread.
unsafe impl Send for Window<'_> {}

impl<'a> Window<'a> {
    /// The first `width` columns of `rows` rows.
    ///
    /// # Panics
    /// When `data` is shorter than that, or rows overlap.
    pub fn new(data: &'a mut [f32], rows: usize, width: usize, stride: usize) -> Window<'a> {
        assert!(rows == 0 || width == 0 || (width <= stride && (rows - 1) * stride + width <= data.len()));
        Window { data: data.as_mut_ptr(), rows, width, stride, lent: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Floats from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// A rectangle inside.
    ///
    /// # Panics
    /// When it is not inside.
    pub fn part(&mut self, rows: Range<usize>, columns: Range<usize>) -> Window<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(columns.start <= columns.end && columns.end <= self.width);
        let data = self.data.wrapping_add(rows.start * self.stride + columns.start);
        Window { data, rows: rows.len(), width: columns.len(), stride: self.stride, lent: PhantomData }
    }

    /// Side by side windows of `width` columns, the last one of what is left, each with its first column.
    pub fn columns(self, width: usize) -> Vec<(usize, Window<'a>)> {
        let piece = |first: usize| {
            let data = self.data.wrapping_add(first);
            (first, Window { data, width: width.min(self.width - first), ..self })
        };
        (0..self.width).step_by(width.max(1)).map(piece).collect()
    }

    /// One row.
    pub fn row(&mut self, r: usize) -> &mut [f32] {
        assert!(r < self.rows);
        // SAFETY: `new` checked that the row lies in the slice that is lent; windows side by side do not overlap, and
        // this one is borrowed for as long as the row.
        unsafe { std::slice::from_raw_parts_mut(self.data.wrapping_add(r * self.stride), self.width) }
    }

    /// The first element: those of the window may be written through it.
    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_cover_every_element_once() {
        for (rows, width, extra, piece) in [(3, 7, 0, 3), (1, 1, 5, 9), (4, 16, 1, 16), (0, 5, 0, 2), (5, 0, 3, 4)]
        {
            let stride = width + extra;
            let mut data = vec![0.0; rows * stride];
            for (first, mut part) in Window::new(&mut data, rows, width, stride).columns(piece) {
                for r in 0..part.rows() {
                    part.row(r).iter_mut().enumerate().for_each(|(c, v)| *v += (r * stride + first + c + 1) as f32);
                }
                let (rows, width) = (part.rows(), part.width());
                part.part(0..rows, width..width);
            }
            for (i, v) in data.iter().enumerate() {
                let inside = i % stride < width;
                assert_eq!(
                    *v,
                    if inside { (i + 1) as f32 } else { 0.0 },
                    "{rows}x{width}+{extra} by {piece} at {i}"
                );
            }
        }
    }

    #[test]
    #[should_panic]
    fn a_window_lies_in_its_matrix() {
        Window::new(&mut [0.0; 11], 3, 4, 4);
    }
}
