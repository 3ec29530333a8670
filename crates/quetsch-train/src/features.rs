//! Distillation of what happens inside a teacher, beside its logits. Every part is a mean over the links of its map and
//! over all tokens of a step.
//!
//! - Hidden states and embeddings (Romero et al. 2015; Sun et al. 2019; Jiao et al. 2020): `D(h_s W^T, h_t)` with a
//!   [`Measure`] D; W is learned where the widths differ, one a link, else there is none. h_t may be the mean of
//!   several layers, or their sum with weights softmax(v), v learned from v = 0 (the mean), as the layers of a body are
//!   mixed in Peters et al. 2018, equation 1.
//! - Attention maps (Wang et al. 2020, MiniLM, equation 4): `KL(A_t || A_s)` of `A = softmax(Q K^T / sqrt(d))`, a mean
//!   over the heads, which are matched by their original index.
//! - Relations (Wang et al. 2021, MiniLMv2, equations 4 to 7): the same between queries and queries, keys and keys,
//!   values and values, each cut into as many relation heads on both sides, so that widths and heads may differ.
//!
//! The teacher's activations are computed again in every step: for a whole training set they are too large to keep.

use crate::loss::{Losses, Measure};
use crate::params::{Grads, Params};
use crate::step::TrainSet;
use crate::tape::{Node, Tape};
use quetsch::batch::{Batch, Encoding};
use quetsch::hooks::Record;
use quetsch::ops::{Hook, With, encode};
use quetsch::runtime::{CpuOps, Model, Workspace};
use quetsch::spec::{At, ModelSpec, Tensor};
use quetsch::{Error, Result};
use quetsch_kernels::gemm::{Size, View, Write, gemm};
use quetsch_kernels::math::softmax;
use std::borrow::Cow;
use std::collections::BTreeMap;

pub use crate::layer_map::LayerMap;

/// The inner part of an objective.
#[derive(Clone, Copy)]
pub struct Features<'a> {
    /// The teacher.
    pub teacher: &'a Model,
    /// The training sentences as the teacher reads them, with as many tokens as the student's.
    pub encodings: &'a [Encoding],
    /// What is compared.
    pub links: &'a [Link],
}

/// What two activations are compared by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Compare {
    /// Hidden states of a layer, row by row.
    Hidden(Measure),
    /// The embeddings, row by row.
    Embeddings(Measure),
    /// Attention maps, head by head.
    Attention,
    /// Relations of one of query, key and value with itself, over so many relation heads.
    Relation(Qkv, usize),
}

/// One of the three that attention is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qkv {
    /// The query.
    Query,
    /// The key.
    Key,
    /// The value.
    Value,
}

/// One comparison of a student's activation with a teacher's.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    /// How.
    pub compare: Compare,
    /// Layer of the student; 0 for embeddings.
    pub student: usize,
    /// Layers of the teacher whose mean is the target; `[0]` for embeddings.
    pub teacher: Vec<usize>,
    /// Whether their weights in that mean are learned; of hidden states alone.
    pub weighted: bool,
    /// Weight in the objective, beside the other losses.
    pub weight: f32,
    /// Share in the part that is logged: 1 / links of the part.
    pub share: f32,
}

impl Link {
    /// The links of one part: the comparison at every pair of a map.
    pub fn of(compare: Compare, pairs: &[(usize, Vec<usize>)], weight: f32) -> Vec<Link> {
        let share = 1.0 / pairs.len() as f32;
        let link = |(student, teacher): &(usize, Vec<usize>)| Link {
            compare,
            student: *student,
            teacher: teacher.clone(),
            weighted: false,
            weight,
            share,
        };
        pairs.iter().map(link).collect()
    }

    fn at(&self, layer: usize) -> At {
        match self.compare {
            Compare::Hidden(_) => At::Hidden(layer),
            Compare::Embeddings(_) => At::Embedded,
            Compare::Attention | Compare::Relation(..) => At::Qkv(layer),
        }
    }

    fn add_to(&self, sum: &mut Losses, loss: f64) {
        sum.total += f64::from(self.weight) * loss;
        match self.compare {
            Compare::Hidden(_) => sum.hidden += loss,
            Compare::Embeddings(_) => sum.embeddings += loss,
            Compare::Attention => sum.attention += loss,
            Compare::Relation(..) => sum.relations += loss,
        }
    }

    /// The shape `[to, from]` of the projection that this link learns, if it has one.
    fn projection(&self, student: &ModelSpec, teacher: &ModelSpec) -> Option<(usize, usize)> {
        let (to, from) = match self.compare {
            Compare::Hidden(_) => (teacher.hidden, student.hidden),
            Compare::Embeddings(_) => (teacher.embedding(), student.embedding()),
            Compare::Attention | Compare::Relation(..) => return None,
        };
        (to != from).then_some((to, from))
    }

    fn check(&self, student: &ModelSpec, teacher: &ModelSpec) -> Result<()> {
        let bad = |m: String| Err(Error::invalid(m));
        if !(self.weight.is_finite() && self.weight >= 0.0) {
            return bad(format!("the weight of {:?} is {}, expected 0 or more", self.compare, self.weight));
        }
        let pair = [(self.student, self.teacher.clone())];
        LayerMap::Pairs(pair.to_vec()).pairs(student.layers.len(), teacher.layers.len())?;
        if self.weighted && !matches!(self.compare, Compare::Hidden(_)) {
            return bad(format!("{:?} has no weights of layers: they are learned for hidden states", self.compare));
        }
        if let Compare::Hidden(_) | Compare::Embeddings(_) = self.compare {
            return Ok(());
        }
        let (s, &[t]) = (self.student, &self.teacher[..]) else {
            return bad("attention maps and relations are learned from one layer, a mean has no meaning".into());
        };
        let (wide, tall) = (student.inner(s), teacher.inner(t));
        if wide == 0 || tall == 0 {
            let (whose, layer) = if wide == 0 { ("student", s) } else { ("teacher", t) };
            return bad(format!(
                "layer {layer} of the {whose} has no attention head, so there is no map or relation to compare: leave \
                 it out of the layer map"
            ));
        }
        match self.compare {
            Compare::Relation(_, heads) if heads == 0 || wide % heads != 0 || tall % heads != 0 => bad(format!(
                "{heads} relation heads must divide the attention widths of student layer {s} ({wide}) and teacher \
                 layer {t} ({tall}): set another number of relation heads"
            )),
            Compare::Attention if shared_heads(self, student, teacher).is_none() => bad(format!(
                "student layer {s} has heads {:?} of {}, teacher layer {t} {:?} of {}: attention maps need every head \
                 of the student in the teacher; relations do not",
                student.layers[s].heads, student.original_heads, teacher.layers[t].heads, teacher.original_heads
            )),
            _ => Ok(()),
        }
    }
}

/// Places of the student's heads in the student and in the teacher.
fn shared_heads(link: &Link, student: &ModelSpec, teacher: &ModelSpec) -> Option<Vec<(usize, usize)>> {
    let (s, t) = (&student.layers[link.student].heads, &teacher.layers[*link.teacher.first()?].heads);
    let place = |(i, h): (usize, &u16)| t.binary_search(h).ok().map(|j| (i, j));
    let all = s.iter().enumerate().map(place).collect();
    if student.original_heads == teacher.original_heads { all } else { None }
}

/// The tape's nodes at the wanted places; what is computed stays the same.
#[derive(Default)]
pub struct Taps {
    want: Vec<At>,
    got: BTreeMap<At, Node>,
}

impl Taps {
    /// At a student's end of these links.
    pub fn new(links: &[Link]) -> Taps {
        Taps { want: links.iter().map(|l| l.at(l.student)).collect(), got: BTreeMap::new() }
    }
}

impl Hook<Tape<'_>> for &mut Taps {
    fn at(&mut self, _: &mut Tape, at: At, x: Node) -> Node {
        if self.want.contains(&at) {
            self.got.insert(at, x);
        }
        x
    }
}

/// Gradients by nodes, where a backward begins.
type Seeds = Vec<(Node, Vec<f32>)>;

impl Features<'_> {
    /// Whether this can work for a student and its data.
    pub(crate) fn check(&self, student: &ModelSpec, set: &TrainSet, recompute: bool) -> Result<()> {
        self.links.iter().try_for_each(|l| l.check(student, self.teacher.spec()))?;
        if recompute && self.links.iter().any(|l| matches!(l.compare, Compare::Attention | Compare::Relation(..))) {
            return Err(Error::invalid(
                "attention maps and relations compare what `recompute` does not keep: learn hidden states, or leave \
                 `recompute` out",
            ));
        }
        let tokens = |e: &[Encoding]| e.iter().map(|e| e.ids.len()).collect::<Vec<_>>();
        if tokens(self.encodings) != tokens(set.encodings) {
            return Err(Error::invalid(
                "student and teacher cut the training sentences into different numbers of tokens: their activations \
                 do not stand side by side",
            ));
        }
        Ok(())
    }

    /// Adds what is learned beside the student: projections, and weights of the teacher's layers.
    pub fn add_parameters(&self, params: &mut Params, seed: u64) {
        for (i, link) in self.links.iter().enumerate() {
            if let Some(shape) = link.projection(&params.spec, self.teacher.spec()) {
                params.add_projection(i, shape, seed);
            }
            if link.weighted {
                params.add_layer_weights(i, link.teacher.len());
            }
        }
    }

    /// What the weights of the teacher's layers have become: (layer of the student, a weight for each layer).
    pub(crate) fn layer_weights(&self, params: &Params) -> Vec<(usize, Vec<f32>)> {
        let weighted = self.links.iter().enumerate().filter(|(_, l)| l.weighted);
        weighted.map(|(i, l)| (l.student, shares(i, l, params))).collect()
    }

    /// The teacher's activations on these sentences.
    fn record(&self, batch: &Batch, ws: &mut Workspace) -> BTreeMap<At, Vec<f32>> {
        let spec = self.teacher.spec();
        let want = self.links.iter().flat_map(|l| l.teacher.iter().map(|t| l.at(*t))).collect();
        let mut record = Record { want, got: BTreeMap::new() };
        encode(&mut With { ops: &mut CpuOps::new(self.teacher, ws), hook: &mut record }, spec, batch);
        record.got
    }

    /// These sentences' share in the step's losses, and the gradient by the student's activations; that by the
    /// projections is added to `grads`. `token` is 1 / tokens of the step.
    pub(crate) fn losses(
        &self,
        (params, tape, taps): (&Params, &Tape, &Taps),
        examples: &[usize],
        token: f32,
        ws: &mut Workspace,
        grads: &mut Grads,
    ) -> Result<(Losses, Seeds)> {
        let (student, teacher) = (&params.spec, self.teacher.spec());
        let batch = Batch::new(teacher, examples.iter().map(|e| &self.encodings[*e]))
            .map_err(|e| Error::invalid(format!("training examples {examples:?}, for the teacher: {e}")))?;
        let (mut sum, mut seeds) = (Losses::default(), vec![]);
        let seen = self.record(&batch, ws);
        for (i, link) in self.links.iter().enumerate() {
            let parts: Vec<&[f32]> = link.teacher.iter().map(|t| &seen[&link.at(*t)][..]).collect();
            let shares = shares(i, link, params);
            let target = mixed(&parts, &shares);
            let node = taps.got[&link.at(link.student)];
            let x = tape.value(node);
            let part = token * link.share;
            let scale = part * link.weight;
            let (loss, d) = match link.compare {
                Compare::Hidden(m) | Compare::Embeddings(m) => {
                    let width = target.len() / batch.tokens();
                    let projection =
                        link.projection(student, teacher).map(|shape| (shape, params.id(Tensor::Projection(i))));
                    let y = match projection {
                        None => Cow::Borrowed(x),
                        Some((shape, id)) => project(x, &params.data[id], shape).into(),
                    };
                    let (loss, dy) = rows(m, &y, &target, width, scale);
                    if link.weighted {
                        // Distances are symmetric: the gradient by the target is that of its own distance from y.
                        let (_, d) = rows(m, &target, &y, width, scale);
                        let id = params.id(Tensor::LayerWeights(i));
                        shares_back(&parts, &shares, &d, &mut grads.dense[id]);
                    }
                    let dx = match projection {
                        None => dy,
                        Some((shape, id)) => project_back(x, &dy, &params.data[id], shape, &mut grads.dense[id]),
                    };
                    (loss, dx)
                }
                Compare::Attention | Compare::Relation(..) => {
                    let layer = (link.student, link.teacher[0]);
                    let (pairs, dims, of) = match link.compare {
                        Compare::Relation(of, heads) => {
                            let dims = (student.inner(layer.0) / heads, teacher.inner(layer.1) / heads);
                            ((0..heads).map(|h| (h, h)).collect(), dims, (of as usize, of as usize))
                        }
                        _ => {
                            let heads = shared_heads(link, student, teacher).unwrap_or_default();
                            (heads, (student.head_dim, teacher.head_dim), (0, 1))
                        }
                    };
                    let s = Side { x, inner: student.inner(layer.0), dim: dims.0, of };
                    let t = Side { x: &target, inner: teacher.inner(layer.1), dim: dims.1, of };
                    relation(&s, &t, &pairs, &batch.starts, scale)
                }
            };
            link.add_to(&mut sum, f64::from(part) * loss);
            seeds.push((node, d));
        }
        Ok((sum, seeds))
    }
}

/// The measure summed over rows, and `scale` times its gradient by `x`.
pub fn rows(m: Measure, x: &[f32], target: &[f32], width: usize, scale: f32) -> (f64, Vec<f32>) {
    let mut d = vec![0.0; x.len()];
    let rows = x.chunks_exact(width).zip(target.chunks_exact(width)).zip(d.chunks_exact_mut(width));
    (rows.map(|((x, t), d)| m.add(x, t, scale, d)).sum(), d)
}

/// x W^T with W `[to, from]`.
fn project(x: &[f32], w: &[f32], (to, from): (usize, usize)) -> Vec<f32> {
    let n = x.len() / from;
    let mut y = vec![0.0; n * to];
    gemm(Size { m: n, n: to, k: from }, 1.0, View::rows(x, from), View::rows(w, from).t(), &mut y, to, Write::Set);
    y
}

/// The gradient by x of [`project`]; that by W is added to `dw`, if it is wanted.
fn project_back(x: &[f32], dy: &[f32], w: &[f32], (to, from): (usize, usize), dw: &mut [f32]) -> Vec<f32> {
    let n = x.len() / from;
    let mut dx = vec![0.0; x.len()];
    let dy = View::rows(dy, to);
    if !dw.is_empty() {
        gemm(Size { m: to, n: from, k: n }, 1.0, dy.t(), View::rows(x, from), dw, from, Write::Add);
    }
    gemm(Size { m: n, n: from, k: to }, 1.0, dy, View::rows(w, from), &mut dx, from, Write::Set);
    dx
}

/// The weights of a link's teacher layers in its target: softmax(v), or all alike.
fn shares(i: usize, link: &Link, params: &Params) -> Vec<f32> {
    let n = link.teacher.len();
    if !link.weighted {
        return vec![1.0 / n as f32; n];
    }
    let mut shares = params.get(Tensor::LayerWeights(i)).to_vec();
    softmax(&mut shares, n);
    shares
}

/// The sum of the layers' activations with these weights.
fn mixed(parts: &[&[f32]], shares: &[f32]) -> Vec<f32> {
    let mut sum = vec![0.0; parts[0].len()];
    for (part, share) in parts.iter().zip(shares) {
        sum.iter_mut().zip(*part).for_each(|(s, v)| *s += share * v);
    }
    sum
}

/// Adds to `dv` the gradient by the logits v of the weights, given that by the mixture:
/// d / dv_j = a_j (g_j - sum_k a_k g_k) with a = softmax(v) and g_j = <d, h_j>.
fn shares_back(parts: &[&[f32]], shares: &[f32], d: &[f32], dv: &mut [f32]) {
    let dot = |h: &&[f32]| h.iter().zip(d).map(|(h, d)| f64::from(h * d)).sum::<f64>();
    let by_share: Vec<f64> = parts.iter().map(dot).collect();
    let mean: f64 = by_share.iter().zip(shares).map(|(g, a)| g * f64::from(*a)).sum();
    for ((dv, g), a) in dv.iter_mut().zip(by_share).zip(shares) {
        *dv += a * (g - mean) as f32;
    }
}

/// Queries, keys and values side by side, `[tokens, 3 * inner]`, and which two of the three (0, 1, 2) are compared
/// with each other, in heads of `dim`.
pub struct Side<'a> {
    /// The values.
    pub x: &'a [f32],
    /// Width of each of the three.
    pub inner: usize,
    /// Width of a head.
    pub dim: usize,
    /// A and B of softmax(A B^T / sqrt(dim)).
    pub of: (usize, usize),
}

impl Side<'_> {
    /// Where the head's columns of A or B begin in the rows from `start`.
    fn place(&self, which: usize, start: usize, head: usize) -> usize {
        (3 * start + which) * self.inner + head * self.dim
    }

    fn view(&self, which: usize, start: usize, head: usize) -> View<'_> {
        View::rows(&self.x[self.place(which, start, head)..], 3 * self.inner)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// A B^T / sqrt(dim) of one head of one sentence, and its softmax by row.
    fn map(&self, start: usize, len: usize, head: usize) -> (Vec<f32>, Vec<f32>) {
        let mut scores = vec![0.0; len * len];
        let (a, b) = (self.view(self.of.0, start, head), self.view(self.of.1, start, head));
        gemm(Size { m: len, n: len, k: self.dim }, self.scale(), a, b.t(), &mut scores, len, Write::Set);
        let mut p = scores.clone();
        softmax(&mut p, len);
        (scores, p)
    }
}

/// log(sum(exp(scores))) of a row whose softmax is p: the largest probability never underflows.
fn log_sum(scores: &[f32], p: &[f32]) -> f64 {
    let best = (0..p.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap_or(0);
    f64::from(scores[best]) - f64::from(p[best]).ln()
}

/// Sum over tokens of the mean over heads of KL(teacher's map || student's), and `scale` times its gradient by the
/// student's side. `heads` are (head of the student, head of the teacher).
pub fn relation(
    student: &Side,
    teacher: &Side,
    heads: &[(usize, usize)],
    starts: &[usize],
    scale: f32,
) -> (f64, Vec<f32>) {
    let (mut sum, mut d) = (0.0, vec![0.0; student.x.len()]);
    for s in starts.windows(2) {
        let (start, len) = (s[0], s[1] - s[0]);
        for &(hs, ht) in heads {
            let ((a, mut p), (b, q)) = (student.map(start, len, hs), teacher.map(start, len, ht));
            for r in (0..len * len).step_by(len) {
                let row = r..r + len;
                let off = log_sum(&b[row.clone()], &q[row.clone()]) - log_sum(&a[row.clone()], &p[row.clone()]);
                sum += row.map(|i| f64::from(q[i]) * (f64::from(b[i]) - f64::from(a[i]) - off)).sum::<f64>();
            }
            // d KL / d scores = p - q; scores = A B^T / sqrt(dim).
            let factor = scale / heads.len() as f32;
            p.iter_mut().zip(&q).for_each(|(p, q)| *p = factor * (*p - q));
            let (by, stride) = (View::rows(&p, len), 3 * student.inner);
            let (first, second) = student.of;
            let size = Size { m: len, n: student.dim, k: len };
            let to = student.place(first, start, hs);
            gemm(size, student.scale(), by, student.view(second, start, hs), &mut d[to..], stride, Write::Add);
            let to = student.place(second, start, hs);
            gemm(size, student.scale(), by.t(), student.view(first, start, hs), &mut d[to..], stride, Write::Add);
        }
    }
    (sum / heads.len().max(1) as f64, d)
}
