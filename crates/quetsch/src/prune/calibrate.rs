//! What a model does on sample texts: scores by activation, and least squares after a cut. Nothing here needs a gradient.

use super::groups::{Kind, unit};
use super::plan::Plan;
use super::scores::Scores;
use crate::batch::{Batch, Encoding};
use crate::checkpoint::{Checkpoint, FloatType, Stored};
use crate::error::{Error, Result};
use crate::hooks::Record;
use crate::ops::{With, encode};
use crate::runtime::{CpuOps, Model, Workspace};
use crate::spec::{At, Lin, ModelSpec, Tensor};
use quetsch_kernels::gemm::{Size, View, Write, gemm};
use std::collections::BTreeMap;

/// Where the groups of a kind act on the residual stream: the linear that they leave by, and its input.
fn exit(kind: Kind, layer: usize) -> (Lin, At) {
    match kind {
        Kind::Head => (Lin::Out(layer), At::Context(layer)),
        Kind::Channel => (Lin::Down(layer), At::FfnHidden(layer)),
    }
}

/// The residual stream in front of a layer's heads or channels.
fn before(spec: &ModelSpec, kind: Kind, layer: usize) -> At {
    match (kind, layer) {
        (Kind::Channel, l) => At::Attended(l),
        (Kind::Head, 0) if spec.is_projected() => At::Projected,
        (Kind::Head, 0) => At::Embedded,
        (Kind::Head, l) => At::Hidden(l - 1),
    }
}

/// Sentences of one forward: enough for products at full speed.
const CHUNK: usize = 32;

/// Runs `see` on the wanted activations of all sentences, chunk after chunk, and adds its results up by `add`. Chunks
/// are dealt to threads in turn: the result depends on their number, not on time.
fn observe<T: Send>(
    models: &[(&Model, &[At])],
    sentences: &[Encoding],
    threads: usize,
    zero: impl Fn() -> T + Sync,
    see: impl Fn(&mut T, &Batch, &[BTreeMap<At, Vec<f32>>]) + Sync,
    mut add: impl FnMut(&mut T, T),
) -> Result<T> {
    let work = |first: usize| -> Result<T> {
        let (mut sum, mut ws) = (zero(), Workspace::default());
        for chunk in sentences.chunks(CHUNK).skip(first).step_by(threads.max(1)) {
            let mut seen = vec![];
            let mut last = Batch::default();
            for (model, want) in models {
                last = Batch::new(model.spec(), chunk)?;
                let mut record = Record { want: want.to_vec(), got: BTreeMap::new() };
                let mut ops = CpuOps::new(model, &mut ws);
                encode(&mut With { ops: &mut ops, hook: &mut record }, model.spec(), &last);
                seen.push(record.got);
            }
            see(&mut sum, &last, &seen);
        }
        Ok(sum)
    };
    let parts: Vec<Result<T>> = std::thread::scope(|s| {
        let work = &work;
        let all: Vec<_> = (0..threads.max(1)).map(|t| s.spawn(move || work(t))).collect();
        all.into_iter().map(|h| h.join().expect("a calibration thread never panics")).collect()
    });
    let mut sum = zero();
    for part in parts {
        add(&mut sum, part?);
    }
    Ok(sum)
}

fn add_all(a: &mut [Vec<f32>], b: Vec<Vec<f32>>) {
    a.iter_mut().zip(b).for_each(|(a, b)| quetsch_kernels::math::add(a, &b));
}

/// Adds x^T y, x `[rows, n]`, y `[rows, m]`, to `out` `[n, m]`.
fn add_product(x: &[f32], n: usize, y: &[f32], m: usize, out: &mut [f32]) {
    if n > 0 && m > 0 {
        gemm(Size { m: n, n: m, k: x.len() / n }, 1.0, View::rows(x, n).t(), View::rows(y, m), out, m, Write::Add);
    }
}

/// Scores by what a group does on these sentences: the root of the mean (over tokens) of the squared length of what it
/// adds to the residual stream, `||W_g h_g||` (as Wanda, Sun et al. 2024, for whole groups); of a layer the mean of
/// 1 - cosine between its input and its output (block influence, Men et al. 2024).
///
/// # Errors
/// No sentence, or one that the model cannot read.
pub fn activation(ck: &Checkpoint, sentences: &[Encoding], threads: usize) -> Result<Scores> {
    if sentences.is_empty() {
        return Err(Error::invalid("activation scores need sentences"));
    }
    let (spec, model) = (&ck.spec, Model::pack(ck));
    let layers = spec.layers.len();
    let places: Vec<(Kind, usize)> = (0..layers).flat_map(|l| [(Kind::Head, l), (Kind::Channel, l)]).collect();
    let width = |(kind, l): (Kind, usize)| match kind {
        Kind::Head => spec.inner(l),
        Kind::Channel => spec.layers[l].ffn,
    };
    let mut want: Vec<At> = places.iter().map(|(k, l)| exit(*k, *l).1).collect();
    want.extend((0..layers).flat_map(|l| [before(spec, Kind::Head, l), At::Hidden(l)]));
    // Second moments by place, then the layers' angles and the number of tokens.
    let zero = || -> Vec<Vec<f32>> {
        let moments = places.iter().map(|p| match p.0 {
            Kind::Head => vec![0.0; width(*p) * width(*p)],
            Kind::Channel => vec![0.0; width(*p)],
        });
        moments.chain([vec![0.0; layers], vec![0.0]]).collect()
    };
    let see = |sum: &mut Vec<Vec<f32>>, batch: &Batch, seen: &[BTreeMap<At, Vec<f32>>]| {
        for (i, p) in places.iter().enumerate() {
            let (x, n) = (&seen[0][&exit(p.0, p.1).1], width(*p));
            match p.0 {
                Kind::Head => add_product(x, n, x, n, &mut sum[i]),
                Kind::Channel => x.iter().enumerate().for_each(|(j, v)| sum[i][j % n] += v * v),
            }
        }
        let (angles, tokens) = sum[places.len()..].split_at_mut(1);
        for (l, angle) in angles[0].iter_mut().enumerate() {
            let rows = |at: At| seen[0][&at].chunks_exact(spec.hidden);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let far = rows(before(spec, Kind::Head, l)).zip(rows(At::Hidden(l)));
            *angle += far
                .map(|(a, b)| 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f32::MIN_POSITIVE))
                .sum::<f32>();
        }
        tokens[0][0] += batch.tokens() as f32;
    };
    let mut sums = observe(&[(&model, &want)], sentences, threads, zero, see, |a, b| add_all(a, b))?;
    let tokens = sums.pop().unwrap_or_default()[0].max(1.0);
    let angles = sums.pop().unwrap_or_default();
    let mut scores = Scores { layers: angles.iter().map(|a| a / tokens).collect(), ..Scores::default() };
    for (p, moments) in places.iter().zip(&sums) {
        let (kind, n, d) = (p.0, width(*p), unit(spec, p.0));
        let gram = output_gram(ck, exit(kind, p.1).0, n);
        // sum over i, j of the group of E[h_i h_j] w_i . w_j
        let group = |g: usize| -> f32 {
            let cells = (g * d..(g + 1) * d).flat_map(|i| (g * d..(g + 1) * d).map(move |j| (i, j)));
            let of = |(i, j): (usize, usize)| match kind {
                Kind::Head => moments[i * n + j] * gram[i * n + j],
                Kind::Channel => moments[i] * gram[i * n + i],
            };
            (cells.map(of).sum::<f32>() / tokens).max(0.0).sqrt()
        };
        let all = (0..n / d).map(group).collect();
        if kind == Kind::Head { scores.heads.push(all) } else { scores.ffn.push(all) }
    }
    Ok(scores)
}

/// W^T W of a linear `[hidden, n]`.
fn output_gram(ck: &Checkpoint, site: Lin, n: usize) -> Vec<f32> {
    let w = ck.values(Tensor::W(site));
    let mut gram = vec![0.0; n * n];
    add_product(&w, n, &w, n, &mut gram);
    gram
}

/// What is fitted after a cut, so that each half of a layer gives what it gave before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tune {
    /// One factor for each group that stays (Kwon et al. 2022, section 3.2.3).
    Mask,
    /// The whole output matrices (He, Zhang & Sun 2017, section 3.1, for attention and feed-forward).
    Weights,
}

/// The share of the mean diagonal that is added to the diagonal of the normal equations: what the sample does not
/// determine stays as it is.
const RIDGE: f64 = 0.01;

/// `child`, which `plan` made of `parent`, with `Out` and `Down` of each layer fitted by least squares, first layer
/// first: `min || (x + W h) - (x' + W' h') ||^2 + ridge || W' - W ||^2` over the tokens of these sentences, primes for
/// the child as fitted so far. LayerNorm comes after the sum that is fitted.
///
/// # Errors
/// A plan that drops layers or does not belong to the two, a quantised checkpoint, or a sentence that they cannot read.
pub fn tune(
    parent: &Checkpoint,
    child: &Checkpoint,
    plan: &Plan,
    sentences: &[Encoding],
    how: Tune,
    threads: usize,
) -> Result<Checkpoint> {
    if plan.child(&parent.spec)?.layers != child.spec.layers || parent.spec.layers.len() != child.spec.layers.len()
    {
        return Err(Error::invalid(
            "least squares after a cut needs a plan that keeps all layers, and the model that it made",
        ));
    }
    let mut tuned = child.clone();
    let original = Model::pack(parent);
    for l in 0..child.spec.layers.len() {
        for kind in [Kind::Head, Kind::Channel] {
            let (site, at) = exit(kind, l);
            let n = match kind {
                Kind::Head => tuned.spec.inner(l),
                Kind::Channel => tuned.spec.layers[l].ffn,
            };
            if n == 0 {
                continue;
            }
            let fitted =
                fit(&original, parent, &tuned, (site, at, before(&tuned.spec, kind, l)), sentences, threads)?;
            let weights = match how {
                Tune::Weights => fitted.weights(&tuned, site, n),
                Tune::Mask => fitted.mask(&tuned, site, n, unit(&tuned.spec, kind)),
            };
            let dtype = match tuned.get(Tensor::W(site)) {
                Stored::Float { dtype, .. } => *dtype,
                _ => FloatType::F32,
            };
            let data = weights.into_iter().map(|w| dtype.round(w)).collect();
            tuned.set(Tensor::W(site), Stored::Float { dtype, data });
        }
    }
    Ok(tuned)
}

/// The normal equations of one output matrix.
struct Normal {
    /// h'^T h' `[n, n]`
    gram: Vec<f32>,
    /// h'^T r `[n, hidden]`, r what is missing.
    missing: Vec<f32>,
}

fn fit(
    original: &Model,
    parent: &Checkpoint,
    tuned: &Checkpoint,
    (site, at, stream): (Lin, At, At),
    sentences: &[Encoding],
    threads: usize,
) -> Result<Normal> {
    let hidden = tuned.spec.hidden;
    let (w, v) = (parent.values(Tensor::W(site)), tuned.values(Tensor::W(site)));
    let (m, n) = (w.len() / hidden, v.len() / hidden);
    let model = Model::pack(tuned);
    let want = [at, stream];
    let zero = || vec![vec![0.0; n * n], vec![0.0; n * hidden]];
    let see = |sum: &mut Vec<Vec<f32>>, batch: &Batch, seen: &[BTreeMap<At, Vec<f32>>]| {
        let rows = batch.tokens();
        let (before, after) = (&seen[0], &seen[1]);
        // r = (x + h W^T) - (x' + h' V^T); the biases are the same.
        let mut r = before[&stream].clone();
        r.iter_mut().zip(&after[&stream]).for_each(|(r, x)| *r -= x);
        let (h, k) = (View::rows(&before[&at], m), View::rows(&after[&at], n));
        gemm(Size { m: rows, n: hidden, k: m }, 1.0, h, View::rows(&w, m).t(), &mut r, hidden, Write::Add);
        gemm(Size { m: rows, n: hidden, k: n }, -1.0, k, View::rows(&v, n).t(), &mut r, hidden, Write::Add);
        add_product(&after[&at], n, &after[&at], n, &mut sum[0]);
        add_product(&after[&at], n, &r, hidden, &mut sum[1]);
    };
    let models: [(&Model, &[At]); 2] = [(original, &want), (&model, &want)];
    let mut sums = observe(&models, sentences, threads, zero, see, |a, b| add_all(a, b))?;
    let missing = sums.pop().unwrap_or_default();
    Ok(Normal { gram: sums.pop().unwrap_or_default(), missing })
}

impl Normal {
    /// W' = W + D^T with (G + ridge) D = h'^T r. `[hidden, n]`
    fn weights(&self, ck: &Checkpoint, site: Lin, n: usize) -> Vec<f32> {
        let mut w = ck.values(Tensor::W(site)).into_owned();
        let hidden = w.len() / n;
        let d = solve(&self.gram, n, &self.missing, hidden);
        for (i, w) in w.iter_mut().enumerate() {
            *w += d[i % n * hidden + i / n] as f32;
        }
        w
    }

    /// The columns of W in groups of `unit`, each times its factor 1 + d. The column of group g in the least squares is
    /// the part of W h' that g makes, so the normal equations are those of the weights, seen through W:
    /// `A[g, f] = sum over i in g, j in f of G[i, j] (W^T W)[i, j]`.
    fn mask(&self, ck: &Checkpoint, site: Lin, n: usize, unit: usize) -> Vec<f32> {
        let mut w = ck.values(Tensor::W(site)).into_owned();
        let (hidden, groups) = (w.len() / n, n / unit);
        let gram = output_gram(ck, site, n);
        let (mut a, mut b) = (vec![0.0; groups * groups], vec![0.0; groups]);
        for i in 0..n {
            for j in 0..n {
                a[i / unit * groups + j / unit] += self.gram[i * n + j] * gram[i * n + j];
            }
            b[i / unit] += (0..hidden).map(|o| w[o * n + i] * self.missing[i * hidden + o]).sum::<f32>();
        }
        let d = solve(&a, groups, &b, 1);
        w.iter_mut().enumerate().for_each(|(i, w)| *w *= 1.0 + d[i % n / unit] as f32);
        w
    }
}

/// x `[n, m]` of (A + ridge I) x = b, A symmetric and positive semidefinite, by Cholesky's A = L L^T in f64. All zeros
/// where A is.
fn solve(a: &[f32], n: usize, b: &[f32], m: usize) -> Vec<f64> {
    let mean = (0..n).map(|i| f64::from(a[i * n + i])).sum::<f64>() / n as f64;
    if mean <= 0.0 {
        return vec![0.0; n * m];
    }
    let mut l: Vec<f64> = a.iter().map(|v| f64::from(*v)).collect();
    for i in 0..n {
        let (above, row) = l.split_at_mut(i * n);
        row[i] += RIDGE * mean;
        for j in 0..i {
            let dot: f64 = row[..j].iter().zip(&above[j * n..j * n + j]).map(|(x, y)| x * y).sum();
            row[j] = (row[j] - dot) / above[j * n + j];
        }
        let square: f64 = row[..i].iter().map(|x| x * x).sum();
        // Rounding of the f32 sums cannot reach the ridge; a floor all the same, for what is not finite.
        row[i] = (row[i] - square).max(f64::MIN_POSITIVE).sqrt();
    }
    let mut x: Vec<f64> = b.iter().map(|v| f64::from(*v)).collect();
    for i in 0..n {
        let (above, row) = x.split_at_mut(i * m);
        for j in 0..i {
            let f = l[i * n + j];
            row[..m].iter_mut().zip(&above[j * m..]).for_each(|(x, y)| *x -= f * y);
        }
        row[..m].iter_mut().for_each(|x| *x /= l[i * n + i]);
    }
    for i in (0..n).rev() {
        let (head, below) = x.split_at_mut((i + 1) * m);
        let row = &mut head[i * m..];
        for j in i + 1..n {
            let f = l[j * n + i];
            row.iter_mut().zip(&below[(j - i - 1) * m..]).for_each(|(x, y)| *x -= f * y);
        }
        row.iter_mut().for_each(|x| *x /= l[i * n + i]);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn solutions_solve() {
        let mut rng = Rng::new(1);
        for (n, m) in [(1, 1), (5, 1), (7, 3)] {
            let g: Vec<f32> = (0..20 * n).map(|_| rng.normal()).collect();
            let mut a = vec![0.0; n * n];
            add_product(&g, n, &g, n, &mut a);
            let b: Vec<f32> = (0..n * m).map(|_| rng.normal()).collect();
            let x = solve(&a, n, &b, m);
            let ridge = RIDGE * (0..n).map(|i| f64::from(a[i * n + i])).sum::<f64>() / n as f64;
            for (i, b) in b.iter().enumerate() {
                let (r, c) = (i / m, i % m);
                let ax: f64 = (0..n).map(|j| f64::from(a[r * n + j]) * x[j * m + c]).sum();
                assert!((ax + ridge * x[i] - f64::from(*b)).abs() < 1e-9, "{n} {m}");
            }
        }
        assert_eq!(solve(&[0.0; 4], 2, &[1.0, 2.0], 1), [0.0, 0.0]);
    }
}
