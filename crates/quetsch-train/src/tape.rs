//! The tape: the forward's ops recorded as nodes, each op's backward right after its forward.
//!
//! A node's values are dropped as soon as neither a later op nor a backward reads them: ops that consume their input
//! take its buffer. Buffers come from [`Buffers`] and go back there, so steps after the first allocate next to
//! nothing.

use crate::params::{Grads, Params};
use quetsch::batch::Batch;
use quetsch::ops::{Inspect, Ops};
use quetsch::rng::key;
use quetsch::spec::{Activation, At, DropSite, Lin, Norm, Pool, Tensor};
use quetsch_kernels::attention::{self, Heads, ProbsDropout};
use quetsch_kernels::gemm::{Size, View, Write, gemm};
use quetsch_kernels::{math, norm, rows};
use std::collections::BTreeMap;

/// A value on the tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node(usize);

struct Value {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
    op: Op,
}

enum Op {
    /// LayerNorm of the three tables' sum.
    Embed { z: Vec<f32>, inv: Vec<f32> },
    /// f(x W^T + b) with the matrices of `parts` side by side; `pre` is the value before f.
    Linear { x: Node, parts: Vec<Lin>, f: Activation, pre: Vec<f32> },
    /// softmax(q k^T) v; `probs` before their dropout.
    Attention { layer: usize, qkv: Node, probs: Vec<f32> },
    /// LayerNorm(x + residual).
    AddNorm { site: Norm, x: Node, residual: Node, z: Vec<f32>, inv: Vec<f32> },
    /// Mean or first token.
    Pool { how: Pool, x: Node },
    /// x * mask(key).
    Dropout { site: DropSite, x: Node },
    /// x[:, c] * scale[group of c], whose gradient is wanted.
    ScaleColumns { x: Node, before: Vec<f32>, scale: Vec<f32>, at: At },
}

/// Rates of dropout.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropout {
    /// After embeddings, attention output and FFN.
    pub hidden: f32,
    /// On attention probabilities.
    pub attention: f32,
    /// In the classification head.
    pub head: f32,
}

/// What names a dropout mask besides its place: the same (seed, step, example, token) has the same mask, however
/// examples are gathered into batches.
#[derive(Clone, Copy)]
pub struct Draw<'a> {
    /// The rates.
    pub rate: Dropout,
    /// The run's seed.
    pub seed: u64,
    /// The optimiser step.
    pub step: u64,
    /// Example number of each sentence of the batch.
    pub examples: &'a [usize],
}

impl Draw<'_> {
    fn rate_at(&self, site: DropSite) -> f32 {
        match site {
            DropSite::Embedded | DropSite::Attention(_) | DropSite::Ffn(_) => self.rate.hidden,
            DropSite::HeadIn | DropSite::Classifier => self.rate.head,
        }
    }

    fn site_key(&self, site: DropSite) -> u64 {
        let (kind, layer) = match site {
            DropSite::Embedded => (0, 0),
            DropSite::Attention(l) => (1, l),
            DropSite::Ffn(l) => (2, l),
            DropSite::HeadIn => (3, 0),
            DropSite::Classifier => (4, 0),
        };
        key(&[self.seed, self.step, kind, layer as u64])
    }

    /// The mask of a whole activation, whose rows are tokens or (in the head) sentences.
    fn apply(&self, site: DropSite, x: &mut [f32], width: usize, batch: &Batch) {
        let (how, base) = (rows::Dropout::new(self.rate_at(site)), self.site_key(site));
        let per_sentence = matches!(site, DropSite::HeadIn | DropSite::Classifier);
        let mut row = x.chunks_exact_mut(width);
        for (s, range) in batch.ranges().enumerate() {
            for token in 0..if per_sentence { 1 } else { range.len() } {
                let Some(row) = row.next() else { return };
                rows::dropout(row, how, key(&[base, self.examples[s] as u64, token as u64]));
            }
        }
    }

    /// Calls `f` with the dropout of a layer's attention probabilities, if there is one.
    fn with_probs<R>(&self, layer: usize, f: impl FnOnce(Option<&ProbsDropout>) -> R) -> R {
        if self.rate.attention == 0.0 {
            return f(None);
        }
        let base = key(&[self.seed, self.step, 5, layer as u64]);
        let row = |s: usize, head: usize, query: usize| {
            key(&[base, self.examples[s] as u64, ((head as u64) << 32) | query as u64])
        };
        f(Some(&ProbsDropout { how: rows::Dropout::new(self.rate.attention), key: &row }))
    }
}

/// Free buffers, reused from step to step.
#[derive(Default)]
pub struct Buffers(Vec<Vec<f32>>);

impl Buffers {
    /// A buffer of exactly `len` floats with arbitrary content.
    fn take(&mut self, len: usize) -> Vec<f32> {
        let fits = (0..self.0.len()).rev().filter(|i| self.0[*i].capacity() >= len);
        if let Some(i) = fits.min_by_key(|i| self.0[*i].capacity()) {
            let mut b = self.0.swap_remove(i);
            b.resize(len, 0.0);
            return b;
        }
        // The largest makes room for a larger one, so that small ones do not pile up.
        if let Some(i) = (0..self.0.len()).max_by_key(|i| self.0[*i].capacity()) {
            self.0.swap_remove(i);
        }
        vec![0.0; len]
    }

    fn give(&mut self, b: Vec<f32>) {
        if b.capacity() > 0 {
            self.0.push(b);
        }
    }
}

/// One forward's record.
pub struct Tape<'a> {
    params: &'a Params,
    draw: Draw<'a>,
    buffers: &'a mut Buffers,
    batch: Batch,
    values: Vec<Value>,
}

impl<'a> Tape<'a> {
    /// An empty tape.
    pub fn new(params: &'a Params, draw: Draw<'a>, buffers: &'a mut Buffers) -> Tape<'a> {
        Tape { params, draw, buffers, batch: Batch::default(), values: vec![] }
    }

    /// A node's values, unless a later op took them.
    pub fn value(&self, n: Node) -> &[f32] {
        &self.values[n.0].data
    }

    fn push(&mut self, rows: usize, cols: usize, data: Vec<f32>, op: Op) -> Node {
        self.values.push(Value { rows, cols, data, op });
        Node(self.values.len() - 1)
    }

    fn heads(&self, layer: usize) -> Heads {
        Heads { count: self.params.spec.layers[layer].heads.len(), dim: self.params.spec.head_dim }
    }

    /// Adds the gradients of all parameters to `grads`, given those of some nodes, and returns those of the
    /// masks. The tape's buffers are free afterwards.
    pub fn backward(mut self, of: Vec<(Node, Vec<f32>)>, grads: &mut Grads) -> BTreeMap<At, Vec<f32>> {
        let mut masks = BTreeMap::new();
        let mut nodes: Vec<Vec<f32>> = self.values.iter().map(|_| vec![]).collect();
        for (node, gradient) in of {
            self.accumulate(&mut nodes[node.0], gradient);
        }
        while let Some(v) = self.values.pop() {
            let dy = std::mem::take(&mut nodes[self.values.len()]);
            let (rows, cols) = (v.rows, v.cols);
            match v.op {
                Op::Embed { z, inv } => {
                    let dx = self.norm_back(Norm::Embeddings, &z, &inv, &dy, grads);
                    self.embed_back(&dx, grads);
                    [z, inv, dx].into_iter().for_each(|b| self.buffers.give(b));
                }
                Op::Linear { x, parts, f, pre } => {
                    let mut d = dy;
                    math::activation_back(&pre, &mut d, f);
                    let dx = self.project_back(x, &parts, &d, rows, cols, grads);
                    self.accumulate(&mut nodes[x.0], dx);
                    self.buffers.give(pre);
                    self.buffers.give(d);
                    self.buffers.give(v.data);
                    continue;
                }
                Op::Attention { layer, qkv, probs } => {
                    let x = &self.values[qkv.0].data;
                    let mut dx = self.buffers.take(x.len());
                    let (heads, starts) = (self.heads(layer), &self.batch.starts);
                    self.draw.with_probs(layer, |drop| {
                        attention::attention_back(x, heads, starts, drop, &probs, None, &dy, &mut dx);
                    });
                    self.accumulate(&mut nodes[qkv.0], dx);
                    self.buffers.give(probs);
                }
                Op::AddNorm { site, x, residual, z, inv } => {
                    let dx = self.norm_back(site, &z, &inv, &dy, grads);
                    let mut copy = self.buffers.take(dx.len());
                    copy.copy_from_slice(&dx);
                    self.accumulate(&mut nodes[residual.0], copy);
                    self.accumulate(&mut nodes[x.0], dx);
                    [z, inv].into_iter().for_each(|b| self.buffers.give(b));
                }
                Op::Pool { how, x } => {
                    let mut dx = self.buffers.take(self.batch.tokens() * cols);
                    rows::pool_back(how, &dy, cols, &self.batch.starts, &mut dx);
                    self.accumulate(&mut nodes[x.0], dx);
                }
                Op::Dropout { site, x } => {
                    let mut dx = dy;
                    self.draw.apply(site, &mut dx, cols, &self.batch);
                    self.accumulate(&mut nodes[x.0], dx);
                    self.buffers.give(v.data);
                    continue;
                }
                Op::ScaleColumns { x, before, scale, at } => {
                    let group = cols / scale.len().max(1);
                    let mut dscale = vec![0.0; scale.len()];
                    for (i, (d, b)) in dy.iter().zip(&before).enumerate() {
                        dscale[i % cols / group] += d * b;
                    }
                    masks.insert(at, dscale);
                    let mut dx = dy;
                    rows::scale_columns(&mut dx, cols, &scale);
                    self.accumulate(&mut nodes[x.0], dx);
                    self.buffers.give(before);
                    self.buffers.give(v.data);
                    continue;
                }
            }
            self.buffers.give(dy);
            self.buffers.give(v.data);
        }
        masks
    }

    fn accumulate(&mut self, into: &mut Vec<f32>, dx: Vec<f32>) {
        if into.is_empty() {
            *into = dx;
        } else {
            math::add(into, &dx);
            self.buffers.give(dx);
        }
    }

    fn embed_back(&self, dx: &[f32], grads: &mut Grads) {
        let (p, width, b) = (self.params, self.params.spec.embedding(), &self.batch);
        if grads.word.is_used() {
            for (id, d) in b.ids.iter().zip(dx.chunks_exact(width)) {
                math::add(grads.word.row_mut(*id), d);
            }
        }
        for (table, ids) in [(Tensor::Position, &b.positions), (Tensor::TokenType, &b.types)] {
            let Some(g) = p.find(table).map(|i| &mut grads.dense[i]).filter(|g| !g.is_empty()) else { continue };
            for (id, d) in ids.iter().zip(dx.chunks_exact(width)) {
                math::add(&mut g[*id as usize * width..][..width], d);
            }
        }
    }

    /// y[:, parts side by side] = f(x W_p^T + b_p).
    fn project(&mut self, parts: Vec<Lin>, x: Node, f: Activation) -> Node {
        let (rows, k) = (self.values[x.0].rows, self.values[x.0].cols);
        let p = self.params;
        let bias: Vec<f32> = parts.iter().flat_map(|s| p.get(Tensor::B(*s)).iter().copied()).collect();
        let n = bias.len();
        let mut pre = self.buffers.take(rows * n);
        let mut at = 0;
        for s in &parts {
            let (width, w) = (p.get(Tensor::B(*s)).len(), p.get(Tensor::W(*s)));
            let x = View::rows(&self.values[x.0].data, k);
            let out = pre.get_mut(at..).unwrap_or_default();
            gemm(Size { m: rows, n: width, k }, 1.0, x, View::rows(w, k).t(), out, n, Write::Set);
            at += width;
        }
        math::bias_activation(&mut pre, bias.len(), &bias, Activation::Identity);
        if f == Activation::Identity {
            return self.push(rows, n, pre, Op::Linear { x, parts, f, pre: vec![] });
        }
        let mut y = self.buffers.take(rows * n);
        math::activation(&pre, &mut y, f);
        self.push(rows, n, y, Op::Linear { x, parts, f, pre })
    }

    /// dW = d^T x, db = column sums of d, dx = d W.
    fn project_back(
        &mut self,
        x: Node,
        parts: &[Lin],
        d: &[f32],
        rows: usize,
        n: usize,
        g: &mut Grads,
    ) -> Vec<f32> {
        let k = self.values[x.0].cols;
        let mut dx = self.buffers.take(rows * k);
        let (p, x) = (self.params, &self.values[x.0].data);
        let mut at = 0;
        for (i, s) in parts.iter().enumerate() {
            let (w_id, b_id) = (p.id(Tensor::W(*s)), p.id(Tensor::B(*s)));
            let width = p.data[b_id].len();
            let dp = View::rows(d.get(at..).unwrap_or_default(), n);
            let (gw, gb) = (&mut g.dense[w_id], at..at + width);
            if !gw.is_empty() {
                gemm(Size { m: width, n: k, k: rows }, 1.0, dp.t(), View::rows(x, k), gw, k, Write::Add);
            }
            let gb_to = &mut g.dense[b_id];
            if !gb_to.is_empty() {
                d.chunks_exact(n).for_each(|row| math::add(gb_to, &row[gb.clone()]));
            }
            let write = if i == 0 { Write::Set } else { Write::Add };
            gemm(Size { m: rows, n: k, k: width }, 1.0, dp, View::rows(&p.data[w_id], k), &mut dx, k, write);
            at += width;
        }
        dx
    }

    fn norm(&mut self, site: Norm, x: &[f32], residual: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let p = self.params;
        let (gamma, beta) = (p.get(Tensor::Gamma(site)), p.get(Tensor::Beta(site)));
        let rows = x.len() / gamma.len();
        let (mut y, mut z, mut inv) =
            (self.buffers.take(x.len()), self.buffers.take(x.len()), self.buffers.take(rows));
        norm::layer_norm_keep(x, residual, gamma, beta, p.spec.norm_eps, &mut y, &mut z, &mut inv);
        (y, z, inv)
    }

    fn norm_back(&mut self, site: Norm, z: &[f32], inv: &[f32], dy: &[f32], g: &mut Grads) -> Vec<f32> {
        let p = self.params;
        let (gamma_id, beta_id) = (p.id(Tensor::Gamma(site)), p.id(Tensor::Beta(site)));
        let mut dx = self.buffers.take(dy.len());
        let width = p.data[gamma_id].len();
        let (mut dgamma, mut dbeta) = (vec![0.0; width], vec![0.0; width]);
        norm::layer_norm_back(dy, z, inv, &p.data[gamma_id], &mut dx, &mut dgamma, &mut dbeta);
        math::add(&mut g.dense[gamma_id], &dgamma);
        math::add(&mut g.dense[beta_id], &dbeta);
        dx
    }

    /// Takes a consumed node's buffer.
    fn consume(&mut self, x: Node) -> Vec<f32> {
        std::mem::take(&mut self.values[x.0].data)
    }
}

impl Ops for Tape<'_> {
    type Act = Node;

    fn embed(&mut self, batch: &Batch) -> Node {
        let (p, width, count) = (self.params, self.params.spec.embedding(), batch.tokens());
        self.batch = batch.clone();
        let mut x = self.buffers.take(count * width);
        rows::gather(p.get(Tensor::Word), width, &batch.ids, &mut x);
        let tables = rows::Tables {
            position: p.get(Tensor::Position),
            token_type: p.find(Tensor::TokenType).map_or(&[], |i| &p.data[i]),
            width,
        };
        rows::add_embeddings(tables, &batch.types, &batch.positions, &mut x);
        let (y, z, inv) = self.norm(Norm::Embeddings, &x, &[]);
        self.buffers.give(x);
        self.push(count, width, y, Op::Embed { z, inv })
    }

    fn qkv(&mut self, l: usize, x: &Node) -> Node {
        self.project(vec![Lin::Query(l), Lin::Key(l), Lin::Value(l)], *x, Activation::Identity)
    }

    fn attention(&mut self, layer: usize, qkv: Node, batch: &Batch) -> Node {
        let heads = self.heads(layer);
        let (rows, inner) = (self.values[qkv.0].rows, self.values[qkv.0].cols / 3);
        let mut context = self.buffers.take(rows * inner);
        let mut probs = self.buffers.take(heads.probs_len(&batch.starts));
        let x = &self.values[qkv.0].data;
        self.draw.with_probs(layer, |drop| {
            attention::attention_keep(x, heads, &batch.starts, drop, &mut probs, &mut context);
        });
        self.push(rows, inner, context, Op::Attention { layer, qkv, probs })
    }

    fn ffn_up(&mut self, l: usize, x: &Node) -> Node {
        self.project(vec![Lin::Up(l)], *x, self.params.spec.ffn_activation)
    }

    fn linear(&mut self, site: Lin, x: Node, f: Activation) -> Node {
        self.project(vec![site], x, f)
    }

    fn add_norm(&mut self, site: Norm, x: Node, residual: Node) -> Node {
        let data = self.consume(x);
        let other = std::mem::take(&mut self.values[residual.0].data);
        let (y, z, inv) = self.norm(site, &data, &other);
        self.values[residual.0].data = other; // linears that read the residual stream need it in their backward
        self.buffers.give(data);
        let (rows, cols) = (self.values[x.0].rows, self.values[x.0].cols);
        self.push(rows, cols, y, Op::AddNorm { site, x, residual, z, inv })
    }

    fn pool(&mut self, how: Pool, x: Node, batch: &Batch) -> Node {
        let cols = self.values[x.0].cols;
        let mut y = self.buffers.take(batch.sentences() * cols);
        rows::pool(how, &self.values[x.0].data, cols, &batch.starts, &mut y);
        self.push(batch.sentences(), cols, y, Op::Pool { how, x })
    }

    fn dropout(&mut self, site: DropSite, x: Node, batch: &Batch) -> Node {
        if self.draw.rate_at(site) == 0.0 {
            return x;
        }
        let mut data = self.consume(x);
        let (rows, cols) = (self.values[x.0].rows, self.values[x.0].cols);
        self.draw.apply(site, &mut data, cols, batch);
        self.push(rows, cols, data, Op::Dropout { site, x })
    }
}

impl Inspect for Tape<'_> {
    fn values(&self, x: &Node) -> Vec<f32> {
        self.value(*x).to_vec()
    }

    fn scale_columns(&mut self, at: At, x: Node, scale: &[f32]) -> Node {
        let (rows, cols) = (self.values[x.0].rows, self.values[x.0].cols);
        let before = self.consume(x);
        let mut y = self.buffers.take(before.len());
        y.copy_from_slice(&before);
        rows::scale_columns(&mut y, cols, scale);
        self.push(rows, cols, y, Op::ScaleColumns { x, before, scale: scale.to_vec(), at })
    }
}
