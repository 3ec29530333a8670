//! What a model does on sample texts: scores by activation, and least squares after a cut. Nothing here needs a gradient.

use super::groups::{Kind, unit};
use super::plan::Plan;
use super::scores::Scores;
use crate::batch::{Batch, Encoding};
use crate::checkpoint::{Checkpoint, FloatType, Stored};
use crate::error::{Error, Result};
use crate::hooks::Record;
use crate::ops::{Inspect, With, attended, channels, embedded, encode, fed, heads};
use crate::runtime::{Act, CpuOps, Model, Workspace};
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

/// How many inner values the groups of a kind have.
fn width(spec: &ModelSpec, kind: Kind, layer: usize) -> usize {
    match kind {
        Kind::Head => spec.inner(layer),
        Kind::Channel => spec.layers[layer].ffn,
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

/// Runs `see` on all chunks and adds its results up. Chunks are dealt to threads in turn: the result depends on their
/// number, not on time.
fn observe<C: Send>(
    chunks: &mut [C],
    threads: usize,
    zero: impl Fn() -> Vec<Vec<f32>> + Sync,
    see: impl Fn(&mut Vec<Vec<f32>>, &mut C, &mut Workspace) -> Result<()> + Sync,
) -> Result<Vec<Vec<f32>>> {
    let mut hands: Vec<Vec<&mut C>> = (0..threads.max(1)).map(|_| vec![]).collect();
    let n = hands.len();
    chunks.iter_mut().enumerate().for_each(|(i, chunk)| hands[i % n].push(chunk));
    let work = |hand: Vec<&mut C>| -> Result<Vec<Vec<f32>>> {
        let (mut sum, mut ws) = (zero(), Workspace::default());
        hand.into_iter().try_for_each(|chunk| see(&mut sum, chunk, &mut ws))?;
        Ok(sum)
    };
    let parts: Vec<Result<Vec<Vec<f32>>>> = std::thread::scope(|s| {
        let work = &work;
        let all: Vec<_> = hands.into_iter().map(|hand| s.spawn(move || work(hand))).collect();
        all.into_iter().map(|h| h.join().expect("a calibration thread never panics")).collect()
    });
    let mut sum = zero();
    for part in parts {
        sum.iter_mut().zip(part?).for_each(|(a, b)| quetsch_kernels::math::add(a, &b));
    }
    Ok(sum)
}

/// Adds x^T y, x `[rows, n]`, y `[rows, m]`, to `out` `[n, m]`.
fn add_product(x: &[f32], n: usize, y: &[f32], m: usize, out: &mut [f32]) {
    if n > 0 && m > 0 {
        gemm(Size { m: n, n: m, k: x.len() / n }, 1.0, View::rows(x, n).t(), View::rows(y, m), out, m, Write::Add);
    }
}

/// Adds a h W^T, h `[rows, n]`, W `[hidden, n]`, to `out` `[rows, hidden]`.
fn add_output(a: f32, h: &[f32], w: &[f32], n: usize, out: &mut [f32], hidden: usize) {
    if n > 0 {
        let size = Size { m: out.len() / hidden, n: hidden, k: n };
        gemm(size, a, View::rows(h, n), View::rows(w, n).t(), out, hidden, Write::Add);
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
    let width = |(kind, l): (Kind, usize)| width(spec, kind, l);
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
    let see = |sum: &mut Vec<Vec<f32>>, chunk: &mut &[Encoding], ws: &mut Workspace| {
        let batch = Batch::new(spec, *chunk)?;
        let mut record = Record { want: want.clone(), got: BTreeMap::new() };
        let mut ops = CpuOps::new(&model, ws);
        encode(&mut With { ops: &mut ops, hook: &mut record }, spec, &batch);
        let seen = record.got;
        for (i, p) in places.iter().enumerate() {
            let (x, n) = (&seen[&exit(p.0, p.1).1], width(*p));
            match p.0 {
                Kind::Head => add_product(x, n, x, n, &mut sum[i]),
                Kind::Channel => x.iter().enumerate().for_each(|(j, v)| sum[i][j % n] += v * v),
            }
        }
        let (angles, tokens) = sum[places.len()..].split_at_mut(1);
        for (l, angle) in angles[0].iter_mut().enumerate() {
            let rows = |at: At| seen[&at].chunks_exact(spec.hidden);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let far = rows(before(spec, Kind::Head, l)).zip(rows(At::Hidden(l)));
            *angle += far
                .map(|(a, b)| 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f32::MIN_POSITIVE))
                .sum::<f32>();
        }
        tokens[0][0] += batch.tokens() as f32;
        Ok(())
    };
    let mut chunks: Vec<&[Encoding]> = sentences.chunks(CHUNK).collect();
    let mut sums = observe(&mut chunks, threads, zero, see)?;
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

/// Tokens that least squares look at: their residual streams are in memory, those of both models.
const TOKENS: usize = 1 << 17;

/// `child`, which `plan` made of `parent`, with `Out` and `Down` of each layer fitted by least squares, first layer
/// first: `min || (x + W h) - (x' + W' h') ||^2 + ridge || W' - W ||^2` over the tokens of these sentences (an even
/// choice of them where they are many), primes for the child as fitted so far. LayerNorm comes after the sum that is
/// fitted. Both models go through their halves of layers side by side, so each computes a layer once or twice.
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
    if parent.is_quantised() || child.is_quantised() {
        return Err(Error::invalid("least squares after a cut needs float weights"));
    }
    let tokens: usize = sentences.iter().map(|s| s.ids.len()).sum();
    let some = sentences.iter().step_by(tokens.div_ceil(TOKENS).max(1)).collect::<Vec<_>>();
    let original = Model::pack(parent);
    let (mut tuned, mut model) = (child.clone(), Model::pack(child));
    let mut ws = Workspace::default();
    let pair = |sentences: &[&Encoding]| -> Result<Pair> {
        let mut stream = |model| Stream::new(model, sentences, &mut ws);
        Ok(Pair { parent: stream(&original)?, child: stream(&model)? })
    };
    let mut pairs: Vec<Pair> = some.chunks(CHUNK).map(pair).collect::<Result<_>>()?;
    for l in 0..child.spec.layers.len() {
        for kind in [Kind::Head, Kind::Channel] {
            let fitted = fit((&original, parent), (&model, &tuned), (kind, l), &mut pairs, threads)?;
            let (site, n) = (exit(kind, l).0, width(&tuned.spec, kind, l));
            let weights = match how {
                _ if n == 0 => vec![],
                Tune::Weights => fitted.weights(&tuned, site, n),
                Tune::Mask => fitted.mask(&tuned, site, n, unit(&tuned.spec, kind)),
            };
            let dtype = match tuned.get(Tensor::W(site)) {
                Stored::Float { dtype, .. } => *dtype,
                _ => FloatType::F32,
            };
            let data = weights.into_iter().map(|w| dtype.round(w)).collect();
            tuned.set(Tensor::W(site), Stored::Float { dtype, data });
            model = Model::pack(&tuned);
            observe(&mut pairs, threads, Vec::new, |_, pair, ws| {
                pair.child.pass(&model, (kind, l), ws);
                Ok(())
            })?;
        }
    }
    Ok(tuned)
}

/// A residual stream in front of the heads or the channels of a layer.
struct Stream {
    batch: Batch,
    /// `[tokens, hidden]`
    x: Vec<f32>,
}

impl Stream {
    fn new(model: &Model, sentences: &[&Encoding], ws: &mut Workspace) -> Result<Stream> {
        let batch = Batch::new(model.spec(), sentences.iter().copied())?;
        let mut ops = CpuOps::new(model, ws);
        let x = embedded(&mut ops, model.spec(), &batch);
        let x = ops.values(&x);
        Ok(Stream { batch, x })
    }

    /// The inner values of a half of a layer: contexts of heads, or channels.
    fn inner(&self, model: &Model, half: (Kind, usize), ws: &mut Workspace) -> Vec<f32> {
        let mut ops = CpuOps::new(model, ws);
        let (h, x) = self.open(&mut ops, half);
        ops.recycle(x);
        let values = ops.values(&h);
        ops.recycle(h);
        values
    }

    fn open(&self, ops: &mut CpuOps, (kind, l): (Kind, usize)) -> (Act, Act) {
        let x = ops.resume(&self.batch, &self.x);
        let h = match kind {
            Kind::Head => heads(ops, l, &x, &self.batch),
            Kind::Channel => channels(ops, l, &x),
        };
        (h, x)
    }

    /// Goes through a half of a layer; its inner values.
    fn pass(&mut self, model: &Model, half: (Kind, usize), ws: &mut Workspace) -> Vec<f32> {
        let mut ops = CpuOps::new(model, ws);
        let (h, x) = self.open(&mut ops, half);
        let inner = ops.values(&h);
        let x = match half {
            (Kind::Head, l) => attended(&mut ops, l, h, x, &self.batch),
            (Kind::Channel, l) => fed(&mut ops, l, h, x, &self.batch),
        };
        self.x = ops.values(&x);
        ops.recycle(x);
        inner
    }
}

/// The same sentences in both models.
struct Pair {
    parent: Stream,
    child: Stream,
}

/// The normal equations of one output matrix.
struct Normal {
    /// h'^T h' `[n, n]`
    gram: Vec<f32>,
    /// h'^T r `[n, hidden]`, r what is missing.
    missing: Vec<f32>,
}

/// The normal equations of a half of a layer, which the parent's streams pass.
fn fit(
    (original, parent): (&Model, &Checkpoint),
    (model, tuned): (&Model, &Checkpoint),
    half: (Kind, usize),
    pairs: &mut [Pair],
    threads: usize,
) -> Result<Normal> {
    let (hidden, site) = (tuned.spec.hidden, exit(half.0, half.1).0);
    let (w, v) = (parent.values(Tensor::W(site)), tuned.values(Tensor::W(site)));
    let (m, n) = (width(&parent.spec, half.0, half.1), width(&tuned.spec, half.0, half.1));
    let zero = || vec![vec![0.0; n * n], vec![0.0; n * hidden]];
    let see = |sum: &mut Vec<Vec<f32>>, pair: &mut Pair, ws: &mut Workspace| {
        // r = (x + h W^T) - (x' + h' V^T); the biases are the same.
        let mut r = pair.parent.x.clone();
        r.iter_mut().zip(&pair.child.x).for_each(|(r, x)| *r -= x);
        let (h, k) = (pair.parent.pass(original, half, ws), pair.child.inner(model, half, ws));
        add_output(1.0, &h, &w, m, &mut r, hidden);
        add_output(-1.0, &k, &v, n, &mut r, hidden);
        add_product(&k, n, &k, n, &mut sum[0]);
        add_product(&k, n, &r, hidden, &mut sum[1]);
        Ok(())
    };
    let mut sums = observe(pairs, threads, zero, see)?;
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
