//! The tape: the forward's ops recorded as nodes, each op's backward right after its forward.
//!
//! A node's values are dropped as soon as neither a later op nor a backward reads them: ops that consume their input
//! take its buffer. Buffers come from [`Buffers`] and go back there, so steps after the first allocate next to
//! nothing.

use crate::params::{Grads, Params};
use crate::qat::Site;
use quetsch::batch::Batch;
use quetsch::ops::{self, Inspect, Ops};
use quetsch::rng::key;
use quetsch::runtime::linear::Input;
use quetsch::runtime::reads::Reads;
use quetsch::runtime::{ALONE, Workspace};
use quetsch::spec::{Activation, At, DropSite, Lin, Norm, Pool, Tensor};
use quetsch_kernels::attention::{Heads, ProbsDropout, attention};
use quetsch_kernels::attention_train::{self, attention_back, attention_keep};
use quetsch_kernels::gemm::Write;
use quetsch_kernels::panels::{Left, Precision, Source, multiply, pack_panels, pack_rows};
use quetsch_kernels::window::Window;
use quetsch_kernels::{math, norm, rows};
use std::collections::BTreeMap;

/// Rows of a product whose bias and activation are done while they are in the cache.
const BLOCK: usize = 128;

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
    /// f(x W^T + b); `pre` is the value before f, empty for the identity.
    Linear { x: Node, site: Lin, f: Activation, pre: Vec<f32> },
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
    /// A whole layer, whose ops the backward records again.
    Layer { layer: usize, x: Node },
}

impl Op {
    /// What it kept for its backward.
    fn kept(self) -> [Vec<f32>; 2] {
        match self {
            Op::Embed { z, inv } | Op::AddNorm { z, inv, .. } => [z, inv],
            Op::Linear { pre: kept, .. } | Op::Attention { probs: kept, .. } => [kept, vec![]],
            Op::ScaleColumns { before, .. } => [before, vec![]],
            Op::Pool { .. } | Op::Dropout { .. } | Op::Layer { .. } => [vec![], vec![]],
        }
    }
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
        let per_sentence = x.len() == batch.sentences() * width;
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
pub struct Buffers {
    floats: Free<f32>,
    words: Free<u32>,
    attention: attention_train::Scratch,
    runtime: Workspace,
}

#[derive(Default)]
struct Free<T>(Vec<Vec<T>>);

impl<T: Copy + Default> Free<T> {
    /// A buffer of exactly `len` values with arbitrary content.
    fn take(&mut self, len: usize) -> Vec<T> {
        let fits = (0..self.0.len()).rev().filter(|i| self.0[*i].capacity() >= len);
        if let Some(i) = fits.min_by_key(|i| self.0[*i].capacity()) {
            let mut b = self.0.swap_remove(i);
            b.resize(len, T::default());
            return b;
        }
        // The largest makes room for a larger one, so that small ones do not pile up.
        if let Some(i) = (0..self.0.len()).max_by_key(|i| self.0[*i].capacity()) {
            self.0.swap_remove(i);
        }
        vec![T::default(); len]
    }

    fn give(&mut self, b: Vec<T>) {
        if b.capacity() > 0 {
            self.0.push(b);
        }
    }
}

impl Buffers {
    fn take(&mut self, len: usize) -> Vec<f32> {
        self.floats.take(len)
    }

    fn give(&mut self, b: Vec<f32>) {
        self.floats.give(b);
    }
}

/// One forward's record.
pub struct Tape<'a> {
    params: &'a Params,
    draw: Draw<'a>,
    buffers: &'a mut Buffers,
    batch: Batch,
    values: Vec<Value>,
    recompute: bool,
    /// The input of the layer that is being recorded.
    input: Option<Node>,
}

impl<'a> Tape<'a> {
    /// An empty tape.
    pub fn new(params: &'a Params, draw: Draw<'a>, buffers: &'a mut Buffers) -> Tape<'a> {
        Tape { params, draw, buffers, batch: Batch::default(), values: vec![], recompute: false, input: None }
    }

    /// Whether only the output of each layer is kept, and its ops are run once more in the backward (Chen et al. 2016,
    /// "Training Deep Nets with Sublinear Memory Cost"): memory for one layer's activations instead of all, for a
    /// third more time. Gradients are the same to the bit; nothing inside a layer can be tapped or masked.
    pub fn recompute(mut self, recompute: bool) -> Tape<'a> {
        self.recompute = recompute;
        self
    }

    /// Keeps the output of a layer, the last node, and nothing else after the layer's input.
    fn keep_output(&mut self, layer: usize, input: Node, output: Node) -> Node {
        debug_assert_eq!(output.0 + 1, self.values.len());
        let (rows, cols) = (self.values[output.0].rows, self.values[output.0].cols);
        let data = self.consume(output);
        for v in self.values.drain(input.0 + 1..) {
            v.op.kept().into_iter().chain([v.data]).for_each(|b| self.buffers.give(b));
        }
        self.push(rows, cols, data, Op::Layer { layer, x: input })
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
    /// masks, a row `[groups]` for each sentence. The tape's buffers are free afterwards.
    pub fn backward(mut self, of: Vec<(Node, Vec<f32>)>, grads: &mut Grads) -> BTreeMap<At, Vec<f32>> {
        self.recompute = false; // from here on layers are recorded to be read
        let mut masks = BTreeMap::new();
        let mut nodes: Vec<Vec<f32>> = self.values.iter().map(|_| vec![]).collect();
        // Copied: the caller's buffers would add to the free ones, more of them after every batch.
        for (node, gradient) in of {
            let mut own = self.buffers.take(gradient.len());
            own.copy_from_slice(&gradient);
            self.accumulate(&mut nodes[node.0], own);
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
                Op::Linear { x, site, f, pre } => {
                    let mut d = dy;
                    self.project_back(x, site, f, &pre, &mut d, rows, &mut nodes[x.0], grads);
                    self.buffers.give(pre);
                    self.buffers.give(d);
                    self.buffers.give(v.data);
                    continue;
                }
                Op::Attention { layer, qkv, probs } => {
                    let x = &self.values[qkv.0].data;
                    let mut dx = self.buffers.take(x.len());
                    let (heads, starts, scratch) =
                        (self.heads(layer), &self.batch.starts, &mut self.buffers.attention);
                    self.draw.with_probs(layer, |drop| {
                        attention_back(x, heads, starts, drop, &probs, None, &dy, &mut dx, scratch);
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
                Op::Layer { layer, x } => {
                    self.buffers.give(v.data);
                    let batch = self.batch.clone();
                    let output = ops::layer(&mut self, layer, x, &batch);
                    nodes.resize(self.values.len(), vec![]);
                    nodes[output.0] = dy;
                    continue;
                }
                Op::ScaleColumns { x, before, scale, at } => {
                    let group = cols / scale.len().max(1);
                    let mut dscale = vec![0.0; self.batch.sentences() * scale.len()];
                    for (tokens, dscale) in self.batch.ranges().zip(dscale.chunks_exact_mut(scale.len().max(1))) {
                        let range = tokens.start * cols..tokens.end * cols;
                        for (i, (d, b)) in dy[range.clone()].iter().zip(&before[range]).enumerate() {
                            dscale[i % cols / group] += d * b;
                        }
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

    /// Borders of the sequences in an activation: after the pool every row is one.
    fn borders(&self, rows: usize) -> Vec<usize> {
        if rows == self.batch.tokens() { self.batch.starts.clone() } else { (0..=rows).collect() }
    }

    /// y = f(x W^T + b), run as the deployed model runs it.
    fn project_quantised(&mut self, quantised: &Site, site: Lin, x: Node, f: Activation) -> Node {
        let (rows, n) = (self.values[x.0].rows, quantised.linear.n());
        let (mut pre, starts) = (self.buffers.take(rows * n), self.borders(rows));
        let input = Input { values: &self.values[x.0].data, int8: None, rows, starts: &starts };
        quantised.linear.run(&input, Activation::Identity, &ALONE, &mut self.buffers.runtime, &mut pre);
        if f == Activation::Identity {
            return self.push(rows, n, pre, Op::Linear { x, site, f, pre: vec![] });
        }
        let mut y = self.buffers.take(rows * n);
        y.copy_from_slice(&pre);
        math::bias_activation(&mut Window::new(&mut y, rows, n, n), &vec![0.0; n], f);
        self.push(rows, n, y, Op::Linear { x, site, f, pre })
    }

    /// y = f(x W^T + b).
    fn project(&mut self, site: Lin, x: Node, f: Activation) -> Node {
        let params = self.params;
        let pack = params.linear(site);
        if let Some(quantised) = &pack.quantised {
            return self.project_quantised(quantised, site, x, f);
        }
        let (p, rows, n, k) = (self.params.precision, self.values[x.0].rows, pack.n, pack.k);
        let (mut words, mut pre) = (vec![], self.buffers.take(rows * n));
        let mut y = self.buffers.take(if f == Activation::Identity { 0 } else { rows * n });
        let source = Source { data: &self.values[x.0].data, stride: k };
        let left = match p {
            Precision::F32 => Left::f32_rows(source),
            Precision::Bf16 => {
                words = self.buffers.words.take(p.rows_len(rows, k));
                pack_rows(p, source, rows, k, &mut words);
                Left::rows(&words, p, k)
            }
        };
        // Bias and activation follow while a block of rows is still in the cache.
        for (first, m) in (0..rows).step_by(BLOCK).map(|r| (r, BLOCK.min(rows - r))) {
            let pre = &mut pre[first * n..(first + m) * n];
            multiply(p, left.below(first), &pack.forward, m, n, k, pre, n, Write::Set);
            let y = y.get_mut(first * n..(first + m) * n).unwrap_or_default();
            math::bias_activation_keep(pre, &pack.bias, y, f);
        }
        self.buffers.words.give(words);
        if f == Activation::Identity {
            self.buffers.give(y);
            return self.push(rows, n, pre, Op::Linear { x, site, f, pre: vec![] });
        }
        self.push(rows, n, y, Op::Linear { x, site, f, pre })
    }

    /// d <- d f'(pre); dW = d^T x, db = column sums of d, dx += d W (empty: nothing has come to x yet).
    #[allow(clippy::too_many_arguments)] // what the forward recorded
    fn project_back(
        &mut self,
        x: Node,
        site: Lin,
        f: Activation,
        pre: &[f32],
        d: &mut [f32],
        rows: usize,
        dx: &mut Vec<f32>,
        g: &mut Grads,
    ) {
        let pack = self.params.linear(site);
        let (p, n, k) = (self.params.precision, pack.n, pack.k);
        let mut db = self.buffers.take(n);
        db.fill(0.0);
        math::activation_back(pre, d, &mut db, f);

        let mut write = Write::Add;
        if dx.is_empty() {
            (*dx, write) = (self.buffers.take(rows * k), Write::Set);
        }
        let before = pack.quantised.as_ref().and_then(|q| clipped(q, &self.values[x.0].data, dx, write));
        let source = Source { data: d, stride: n };
        match p {
            Precision::F32 => {
                let left = Left::f32_rows(source);
                multiply(p, left, &pack.backward, rows, k, n, dx, k, write);
            }
            Precision::Bf16 => {
                let mut words = self.buffers.words.take(p.rows_len(rows, n));
                pack_rows(p, source, rows, n, &mut words);
                multiply(p, Left::rows(&words, p, n), &pack.backward, rows, k, n, dx, k, write);
                self.buffers.words.give(words);
            }
        }
        before.into_iter().flatten().for_each(|(i, v)| dx[i] = v);

        // The input's panels: what this part's product read, the same as the part before it as a rule.
        let mut right = self.buffers.words.take(p.panels_len(rows, k));
        let mut packed = None;
        let mut at = 0;
        for (i, part) in pack.parts.iter().enumerate() {
            let columns = at..at + part.rows;
            if !g.dense[part.w].is_empty() {
                let reads = pack.quantised.as_ref().map_or(Reads::Floats, |q| q.reads[i]);
                if packed != Some(reads) {
                    self.pack_input(x, rows, k, reads, &mut right);
                    packed = Some(reads);
                }
                let write = g.write(part.w);
                let mut left = self.buffers.words.take(p.panels_len(rows, part.rows));
                pack_panels(p, |r| &d[r * n..][columns.clone()], rows, part.rows, &mut left);
                let left_t = Left::panels(&left, p, rows);
                multiply(p, left_t, &right, part.rows, k, rows, &mut g.dense[part.w], k, write);
                self.buffers.words.give(left);
            }
            if !g.dense[part.b].is_empty() {
                math::add(&mut g.dense[part.b], &db[columns.clone()]);
            }
            at = columns.end;
        }
        self.buffers.words.give(right);
        self.buffers.give(db);
    }

    /// Packs an activation as right operand, as a product read it.
    fn pack_input(&mut self, x: Node, rows: usize, k: usize, reads: Reads, right: &mut [u32]) {
        let (p, values) = (self.params.precision, &self.values[x.0].data);
        if reads == Reads::Floats {
            return pack_panels(p, |r| &values[r * k..(r + 1) * k], rows, k, right);
        }
        let (mut read, starts) = (self.buffers.take(rows * k), self.borders(rows));
        let input = Input { values: &self.values[x.0].data, int8: None, rows, starts: &starts };
        reads.apply(&input, k, &mut self.buffers.runtime, &mut read);
        pack_panels(p, |r| &read[r * k..(r + 1) * k], rows, k, right);
        self.buffers.give(read);
    }

    fn norm(&mut self, site: Norm, x: &[f32], residual: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let p = self.params;
        let (gamma, beta) = (p.read(Tensor::Gamma(site)), p.read(Tensor::Beta(site)));
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
        norm::layer_norm_back(dy, z, inv, p.read(Tensor::Gamma(site)), &mut dx, &mut dgamma, &mut dbeta);
        math::add(&mut g.dense[gamma_id], &dgamma);
        math::add(&mut g.dense[beta_id], &dbeta);
        dx
    }

    /// Takes a consumed node's buffer.
    fn consume(&mut self, x: Node) -> Vec<f32> {
        std::mem::take(&mut self.values[x.0].data)
    }
}

/// Where a static range clipped the input, and the gradient that stays there, if all matrices have that range.
fn clipped(site: &Site, x: &[f32], dx: &[f32], write: Write) -> Option<Vec<(usize, f32)>> {
    let absmax = site.reads[0].clips()?;
    let stays = |i: usize| if write == Write::Add { dx[i] } else { 0.0 };
    let out = x.iter().enumerate().filter(|(_, v)| v.abs() > absmax).map(|(i, _)| (i, stays(i)));
    site.reads.iter().all(|r| *r == site.reads[0]).then(|| out.collect())
}

impl Ops for Tape<'_> {
    type Act = Node;

    fn embed(&mut self, batch: &Batch) -> Node {
        let (p, width, count) = (self.params, self.params.spec.embedding(), batch.tokens());
        self.batch = batch.clone();
        let mut x = self.buffers.take(count * width);
        p.read_words(&batch.ids, &mut x);
        let tables = rows::Tables {
            position: p.read(Tensor::Position),
            token_type: p.find(Tensor::TokenType).map_or(&[], |_| p.read(Tensor::TokenType)),
            width,
        };
        rows::add_embeddings(tables, &batch.types, &batch.positions, &mut x);
        let (y, z, inv) = self.norm(Norm::Embeddings, &x, &[]);
        self.buffers.give(x);
        self.push(count, width, y, Op::Embed { z, inv })
    }

    fn qkv(&mut self, l: usize, x: &Node) -> Node {
        self.project(Lin::Query(l), *x, Activation::Identity)
    }

    fn attention(&mut self, layer: usize, qkv: Node, batch: &Batch) -> Node {
        let heads = self.heads(layer);
        let (rows, inner) = (self.values[qkv.0].rows, self.values[qkv.0].cols / 3);
        let mut context = self.buffers.take(rows * inner);
        let mut probs = self.buffers.take(heads.probs_len(&batch.starts));
        let (x, scratch) = (&self.values[qkv.0].data, &mut self.buffers.attention);
        self.draw.with_probs(layer, |drop| {
            attention_keep(x, heads, &batch.starts, drop, &mut probs, &mut context, scratch);
        });
        if self.params.quant.is_some() && self.draw.rate.attention == 0.0 {
            // The same but for rounding, which quantising may enlarge: as the deployed model does it.
            let longest = batch.ranges().map(|s| s.len()).max().unwrap_or(0);
            let mut scratch = self.buffers.take(heads.scratch_len(longest));
            attention(&self.values[qkv.0].data, heads, &batch.starts, &mut context, &mut scratch);
            self.buffers.give(scratch);
        }
        self.push(rows, inner, context, Op::Attention { layer, qkv, probs })
    }

    fn ffn_up(&mut self, l: usize, x: &Node) -> Node {
        self.project(Lin::Up(l), *x, self.params.spec.ffn_activation)
    }

    fn linear(&mut self, site: Lin, x: Node, f: Activation) -> Node {
        self.project(site, x, f)
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

    fn tap(&mut self, at: At, x: Node) -> Node {
        if !self.recompute {
            return x;
        }
        let x = match (at, self.input) {
            (At::Embedded | At::Projected, _) => x,
            (At::Hidden(layer), Some(input)) => self.keep_output(layer, input, x),
            _ => return x,
        };
        self.input = Some(x);
        x
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
