//! Whole rows: embedding lookup, pooling, column masks, dropout.

/// How a sentence's rows become one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// Mean over the sentence's tokens.
    Mean,
    /// The first token (`[CLS]`).
    First,
}

/// The small tables of a BERT embedding, each `[rows, width]`.
#[derive(Clone, Copy)]
pub struct Tables<'a> {
    /// Position embeddings.
    pub position: &'a [f32],
    /// Token-type embeddings; empty for a model without token types.
    pub token_type: &'a [f32],
    /// Width of all.
    pub width: usize,
}

/// `out[t] = table[ids[t]]`.
pub fn gather(table: &[f32], width: usize, ids: &[u32], out: &mut [f32]) {
    for (&id, out) in ids.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&table[id as usize * width..][..width]);
    }
}

kernel! {
    /// `x[t] = (x[t] + token_type[types[t]]) + position[positions[t]]`, x being word embeddings: transformers' order.
    pub fn add_embeddings(tables: Tables, types: &[u32], positions: &[u32], x: &mut [f32]) {
        let row = |table: &'_ [f32], i: u32| -> std::ops::Range<usize> {
            let start = i as usize * tables.width;
            debug_assert!(start + tables.width <= table.len());
            start..start + tables.width
        };
        for (t, x) in x.chunks_exact_mut(tables.width).enumerate() {
            let position = &tables.position[row(tables.position, positions[t])];
            if tables.token_type.is_empty() {
                x.iter_mut().zip(position).for_each(|(x, p)| *x += p);
                continue;
            }
            let kind = &tables.token_type[row(tables.token_type, types[t])];
            x.iter_mut().zip(kind).zip(position).for_each(|((x, k), p)| *x = (*x + k) + p);
        }
    }
}

kernel! {
    /// `out[s]` = mean of the sentence's rows, or its first row.
    pub fn pool(how: Pool, x: &[f32], width: usize, starts: &[usize], out: &mut [f32]) {
        for (s, out) in starts.windows(2).zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&x[s[0] * width..(s[0] + 1) * width]);
            if how == Pool::Mean {
                for row in x[(s[0] + 1) * width..s[1] * width].chunks_exact(width) {
                    out.iter_mut().zip(row).for_each(|(o, v)| *o += v);
                }
                let share = 1.0 / (s[1] - s[0]) as f32;
                out.iter_mut().for_each(|o| *o *= share);
            }
        }
    }
}

kernel! {
    /// dx of [`pool`]: every row of `dx` is written.
    pub fn pool_back(how: Pool, dy: &[f32], width: usize, starts: &[usize], dx: &mut [f32]) {
        for (s, dy) in starts.windows(2).zip(dy.chunks_exact(width)) {
            let rows = &mut dx[s[0] * width..s[1] * width];
            match how {
                Pool::Mean => {
                    let share = 1.0 / (s[1] - s[0]) as f32;
                    for row in rows.chunks_exact_mut(width) {
                        row.iter_mut().zip(dy).for_each(|(dx, d)| *dx = share * d);
                    }
                }
                Pool::First => {
                    rows.fill(0.0);
                    rows[..width].copy_from_slice(dy);
                }
            }
        }
    }
}

kernel! {
    /// x[:, c] *= scale[c / (width / scale.len())].
    pub fn scale_columns(x: &mut [f32], width: usize, scale: &[f32]) {
        if width == 0 || scale.is_empty() {
            return;
        }
        let group = width / scale.len();
        for row in x.chunks_exact_mut(width) {
            for (part, s) in row.chunks_exact_mut(group).zip(scale) {
                part.iter_mut().for_each(|v| *v *= s);
            }
        }
    }
}

/// Dropout of one row (Srivastava et al. 2014): element c is kept when a hash of (key, c) says so, and scaled by
/// 1 / (1 - rate). The mask is a function of the key, so the backward recomputes it.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    threshold: u32,
    scale: f32,
}

impl Dropout {
    /// Dropout at `rate` in [0, 1).
    pub fn new(rate: f32) -> Dropout {
        Dropout { threshold: (f64::from(rate) * 4_294_967_296.0) as u32, scale: 1.0 / (1.0 - rate) }
    }

    /// The factor of element `c`: 0 or 1 / (1 - rate).
    #[inline(always)]
    fn factor(self, key: u64, c: u32) -> f32 {
        // A 32-bit finaliser per half of the key: vectorises, unlike a 64-bit one.
        let x = finalise(finalise(c ^ key as u32) ^ (key >> 32) as u32);
        if x >= self.threshold { self.scale } else { 0.0 }
    }
}

/// A bijection on u32 that scatters its bits: Wellons' "lowbias32" constants.
#[inline(always)]
fn finalise(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

kernel! {
    /// `x[c] *= factor(key, c)`; used forward and backward alike.
    pub fn dropout(x: &mut [f32], how: Dropout, key: u64) {
        x.iter_mut().enumerate().for_each(|(c, v)| *v *= how.factor(key, c as u32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_keeps_the_mean_and_depends_on_the_key_alone() {
        let how = Dropout::new(0.3);
        let (mut a, mut b, mut c) = (vec![1.0; 100_000], vec![1.0; 100_000], vec![1.0; 100_000]);
        dropout(&mut a, how, 7 << 32);
        dropout(&mut b, how, 7 << 32);
        dropout(&mut c, how, 8 << 32);
        assert_eq!(a, b);
        let share = |x: &[f32]| x.iter().filter(|v| **v == 0.0).count() as f64 / x.len() as f64;
        assert!((share(&a) - 0.3).abs() < 0.01 && (share(&c) - 0.3).abs() < 0.01);
        let both = a.iter().zip(&c).filter(|(a, c)| **a == 0.0 && **c == 0.0).count() as f64 / 1e5;
        assert!((both - 0.09).abs() < 0.01, "masks of two keys are independent: {both}");
        let neighbours = a.windows(2).filter(|w| w[0] == 0.0 && w[1] == 0.0).count() as f64 / 1e5;
        assert!((neighbours - 0.09).abs() < 0.01, "columns are independent: {neighbours}");
    }

    #[test]
    fn embedding_adds_rows_of_two_or_three_tables() {
        let (word, position, token_type) = ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [100.0, 200.0]);
        let mut out = [0.0; 4];
        for (token_type, want) in [(&token_type[..], [113.0, 224.0, 131.0, 242.0]), (&[], [13.0, 24.0, 31.0, 42.0])]
        {
            gather(&word, 2, &[1, 0], &mut out);
            add_embeddings(Tables { position: &position, token_type, width: 2 }, &[0, 0], &[0, 1], &mut out);
            assert_eq!(out, want);
        }
    }

    #[test]
    fn pooling_and_its_backward_are_adjoint() {
        let (width, starts) = (5, [0, 3, 4, 9]);
        let x: Vec<f32> = (0..45).map(|i| ((i * 7) % 11) as f32).collect();
        let dy: Vec<f32> = (0..15).map(|i| ((i * 5) % 7) as f32).collect();
        for how in [Pool::Mean, Pool::First] {
            let (mut y, mut dx) = (vec![0.0; 15], vec![9.0; 45]);
            pool(how, &x, width, &starts, &mut y);
            pool_back(how, &dy, width, &starts, &mut dx);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            assert!((dot(&y, &dy) - dot(&x, &dx)).abs() < 1e-3);
        }
    }
}
