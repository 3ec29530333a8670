//! A plain scalar f64 twin of the whole forward, for tests: no trait, no kernels, no packing, one loop per formula.
//! It shares nothing with the runtime but the checkpoint and the batch. Quantised weights are dequantised, so it is
//! the oracle for weight-only schemes and an upper bound for the others' distance.
#![allow(dead_code, clippy::unwrap_used)] // each test binary uses its part

use quetsch::batch::Batch;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::rng::Rng;
use quetsch::spec::{Activation, At, Family, HeadSpec, LayerShape, Lin, ModelSpec, Norm, RobertaLike, Tensor};
use std::collections::BTreeMap;

/// Masks by place, as `prune::masks` makes them.
pub type Masks = BTreeMap<At, Vec<f32>>;

/// Every activation by its place, row-major; what the forward returns is at `Logits`, or at the last `Hidden` (at
/// `Embedded` without layers) for a bare body.
pub type Trace = BTreeMap<At, Vec<f64>>;

/// The result of [`trace`]'s forward.
pub fn forward(ck: &Checkpoint, batch: &Batch, masks: &Masks) -> Vec<f64> {
    let mut trace = trace(ck, batch, masks);
    let last = match (ck.spec.head, ck.spec.layers.len()) {
        (HeadSpec::None, 0) if ck.spec.is_projected() => At::Projected,
        (HeadSpec::None, 0) => At::Embedded,
        (HeadSpec::None, n) => At::Hidden(n - 1),
        _ => At::Logits,
    };
    trace.remove(&last).unwrap()
}

/// Runs the model and keeps every activation (after its mask).
pub fn trace(ck: &Checkpoint, batch: &Batch, masks: &Masks) -> Trace {
    let spec = &ck.spec;
    let (h, e, d) = (spec.hidden, spec.embedding(), spec.head_dim);
    let (tokens, sentences) = (batch.tokens(), batch.sentences());
    let mut taps = Trace::new();

    let table = |t: Tensor, ids: &[u32]| -> Vec<f64> {
        let w = values(ck, t);
        ids.iter().flat_map(|&i| w[i as usize * e..(i as usize + 1) * e].to_vec()).collect()
    };
    let word = table(Tensor::Word, &batch.ids);
    let position = table(Tensor::Position, &batch.positions);
    let mut x = add(word, &position);
    if spec.token_types > 0 {
        x = add(x, &table(Tensor::TokenType, &batch.types));
    }
    let mut x = tap(&mut taps, masks, At::Embedded, e, norm(ck, Norm::Embeddings, x));
    if e != h {
        x = tap(&mut taps, masks, At::Projected, h, linear(ck, Lin::EmbedProjection, &x, tokens));
    }

    for (l, layer) in spec.layers.iter().enumerate() {
        let (heads, inner) = (layer.heads.len(), spec.inner(l));
        let [q, k, v] = [Lin::Query(l), Lin::Key(l), Lin::Value(l)].map(|s| linear(ck, s, &x, tokens));
        let beside = |t: usize| [&q, &k, &v].map(|a| a[t * inner..(t + 1) * inner].to_vec()).concat();
        taps.insert(At::Qkv(l), (0..tokens).flat_map(beside).collect());

        let mut context = vec![0.0; tokens * inner];
        for range in batch.ranges() {
            for head in 0..heads {
                let part = |a: &[f64], t: usize, i: usize| a[t * inner + head * d + i];
                for t in range.clone() {
                    let dot = |s: usize| (0..d).map(|i| part(&q, t, i) * part(&k, s, i)).sum::<f64>();
                    let scores: Vec<f64> = range.clone().map(|s| dot(s) / (d as f64).sqrt()).collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for i in 0..d {
                        let mix = range.clone().zip(&weights).map(|(s, w)| w / sum * part(&v, s, i));
                        context[t * inner + head * d + i] = mix.sum();
                    }
                }
            }
        }
        let context = tap(&mut taps, masks, At::Context(l), inner, context);
        let y = linear(ck, Lin::Out(l), &context, tokens);
        x = tap(&mut taps, masks, At::Attended(l), h, norm(ck, Norm::Attention(l), add(y, &x)));

        let up = linear(ck, Lin::Up(l), &x, tokens);
        let up = up.into_iter().map(|x| activate(spec.ffn_activation, x)).collect();
        let up = tap(&mut taps, masks, At::FfnHidden(l), layer.ffn, up);
        let y = linear(ck, Lin::Down(l), &up, tokens);
        x = tap(&mut taps, masks, At::Hidden(l), h, norm(ck, Norm::Ffn(l), add(y, &x)));
    }

    let (labels, f) = match spec.head {
        HeadSpec::None => return taps,
        HeadSpec::Tokens { labels } => {
            let y = linear(ck, Lin::Classifier, &x, tokens);
            tap(&mut taps, masks, At::Logits, labels, y);
            return taps;
        }
        HeadSpec::MeanMlp { labels } => (labels, Activation::Gelu),
        HeadSpec::Pooler { labels } => match spec.family {
            Family::Bert | Family::Roberta { .. } => (labels, Activation::Tanh),
            Family::DistilBert => (labels, Activation::Relu),
            Family::Electra { .. } => (labels, Activation::Gelu),
        },
    };
    let mut pooled = vec![];
    for range in batch.ranges() {
        for i in 0..h {
            pooled.push(match spec.head {
                HeadSpec::MeanMlp { .. } => range.clone().map(|t| x[t * h + i]).sum::<f64>() / range.len() as f64,
                _ => x[range.start * h + i],
            });
        }
    }
    let pooled = tap(&mut taps, masks, At::Pooled, h, pooled);
    let y = linear(ck, Lin::HeadDense, &pooled, sentences).into_iter().map(|x| activate(f, x)).collect();
    let y = tap(&mut taps, masks, At::HeadHidden, h, y);
    let y = linear(ck, Lin::Classifier, &y, sentences);
    tap(&mut taps, masks, At::Logits, labels, y);
    taps
}

fn values(ck: &Checkpoint, t: Tensor) -> Vec<f64> {
    ck.values(t).iter().map(|&x| x as f64).collect()
}

/// `x[:, c] *= mask[c / (width / mask.len())]`, then remembers x `[rows, width]`.
fn tap(taps: &mut Trace, masks: &Masks, at: At, width: usize, mut x: Vec<f64>) -> Vec<f64> {
    if let Some(mask) = masks.get(&at) {
        assert_eq!(width % mask.len(), 0, "{at:?}: {} masks on a width of {width}", mask.len());
        let run = width / mask.len();
        x.iter_mut().enumerate().for_each(|(i, v)| *v *= mask[i % width / run] as f64);
    }
    taps.insert(at, x.clone());
    x
}

fn add(mut x: Vec<f64>, y: &[f64]) -> Vec<f64> {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    x
}

/// x W^T + b. `x: [rows, k]`, `W: [n, k]` -> `[rows, n]`; k may be 0, then every row is b.
fn linear(ck: &Checkpoint, site: Lin, x: &[f64], rows: usize) -> Vec<f64> {
    let (w, b) = (values(ck, Tensor::W(site)), values(ck, Tensor::B(site)));
    let (k, n) = (x.len() / rows, b.len());
    let cell = |r: usize, o: usize| (0..k).map(|i| x[r * k + i] * w[o * k + i]).sum::<f64>() + b[o];
    (0..rows * n).map(|i| cell(i / n, i % n)).collect()
}

/// LayerNorm over rows (Ba et al. 2016), biased variance.
fn norm(ck: &Checkpoint, site: Norm, mut x: Vec<f64>) -> Vec<f64> {
    let (gamma, beta) = (values(ck, Tensor::Gamma(site)), values(ck, Tensor::Beta(site)));
    let n = gamma.len() as f64;
    for row in x.chunks_mut(gamma.len()) {
        let mean = row.iter().sum::<f64>() / n;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let scale = 1.0 / (variance + ck.spec.norm_eps as f64).sqrt();
        row.iter_mut().enumerate().for_each(|(i, x)| *x = (*x - mean) * scale * gamma[i] + beta[i]);
    }
    x
}

fn activate(f: Activation, x: f64) -> f64 {
    match f {
        Activation::Identity => x,
        Activation::Gelu => 0.5 * x * (1.0 + statrs::function::erf::erf(x / std::f64::consts::SQRT_2)),
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
    }
}

/// Weights, biases and LayerNorms that are all alive: nothing is 0 or 1 as in a fresh model, so that a forgotten bias
/// or an identity LayerNorm cannot hide.
pub fn lively(spec: ModelSpec, seed: u64) -> Checkpoint {
    let mut rng = Rng::new(seed);
    let labels = (0..spec.head.labels()).map(|i| format!("label {i}")).collect();
    Checkpoint::from_fn(spec, labels, |def| {
        let (mean, spread) = match def.tensor {
            Tensor::Gamma(_) => (1.0, 0.2),
            Tensor::Beta(_) | Tensor::B(_) => (0.0, 0.2),
            _ => (0.0, 0.4),
        };
        Ok(Stored::f32((0..def.len()).map(|_| mean + spread * rng.normal()).collect()))
    })
    .unwrap()
}

/// A small spec, uneven on purpose: three heads, none, one; other widths; hidden != heads * head_dim.
pub fn uneven(head: HeadSpec) -> ModelSpec {
    let layer = |heads: &[u16], ffn| LayerShape { heads: heads.to_vec(), ffn };
    ModelSpec {
        family: Family::Bert,
        prefix: "bert.".into(),
        vocab: 30,
        positions: 16,
        token_types: 2,
        hidden: 24,
        head_dim: 8,
        original_heads: 6,
        layers: vec![layer(&[0, 2, 5], 20), layer(&[], 12), layer(&[3], 8)],
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head,
        unused_pooler: false,
    }
}

/// The families, each with what only it can vary.
pub const FAMILIES: [Family; 4] = [
    Family::Bert,
    Family::DistilBert,
    Family::Roberta { of: RobertaLike::XlmRoberta, pad: 1 },
    Family::Electra { embedding: 10 },
];

/// The same shape in another family.
pub fn in_family(spec: ModelSpec, family: Family) -> ModelSpec {
    let token_types = match family {
        Family::Bert | Family::Electra { .. } => spec.token_types,
        Family::Roberta { .. } => 1,
        Family::DistilBert => 0,
    };
    let prefix = if spec.prefix == "bert." { family.facts().prefix.to_owned() } else { spec.prefix };
    ModelSpec { family, prefix, token_types, positions: spec.positions + family.unused_positions(), ..spec }
}

/// The largest distance of two rows of numbers.
pub fn worst(a: &[f64], b: impl IntoIterator<Item = f64>) -> f64 {
    let b: Vec<f64> = b.into_iter().collect();
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d.is_nan() { f64::NAN } else { m.max(d) })
}
