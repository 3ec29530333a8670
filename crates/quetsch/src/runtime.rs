//! Inference on the CPU.
//!
//! Three states of a weight, three types: canonical ([`Stored`](crate::checkpoint::Stored), what the file holds),
//! packed ([`linear::Linear`], in RAM only, made once by [`Model::pack`]), and nothing else: a forward never changes a
//! weight. An activation owns its buffer; buffers come from a [`Workspace`] and go back to it.

pub mod classifier;
pub mod linear;
mod outliers;
pub mod reads;
mod session;
mod split;
pub mod stream;
mod words;

use crate::batch::{Batch, Encoding};
use crate::checkpoint::Checkpoint;
use crate::dir::Source;
use crate::error::{Error, Result};
use crate::ops::{Inspect, Ops, forward};
use crate::quant::default_keep;
use crate::spec::{Activation, At, HeadSpec, Lin, ModelSpec, Norm, Pool, Tensor};
use crate::task::Units;
use linear::{Input, Linear};
use quetsch_kernels::attention::Heads;
use quetsch_kernels::int8::{self, Range};
use quetsch_kernels::window::Window;
use quetsch_kernels::{attention, norm, rows};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::result::Result as Outcome;
use std::sync::LazyLock;
use words::Words;

pub use classifier::Classifier;
pub use quetsch_kernels::isa::{Isa, amx_fault, isa};
pub use quetsch_kernels::peak::{self, Arithmetic};
pub use quetsch_kernels::team::Team;
pub use session::Session;

/// The team of one thread.
pub static ALONE: LazyLock<Team> = LazyLock::new(|| Team::new(1));

/// A model packed for this machine; lives in RAM only.
pub struct Model {
    spec: ModelSpec,
    words: Words,
    position: Vec<f32>,
    token_type: Vec<f32>,
    norms: BTreeMap<Norm, (Vec<f32>, Vec<f32>)>,
    qkv: Vec<Linear>,
    linears: BTreeMap<Lin, Linear>,
}

impl Model {
    /// Packs a checkpoint in memory. The unused pooler is left out.
    pub fn pack(ck: &Checkpoint) -> Model {
        Model::pack_for(ck, Arithmetic::F32)
    }

    /// As [`Model::pack`]; linears with float weights are multiplied in `floats`. Bf16: inputs, weights and results are
    /// rounded to bfloat16, products are summed in f32. Int8: these weights and 4-bit ones become int8, absmax by row of
    /// the output, and their inputs int8 by token, as scheme `int8` stores them; what [`default_keep`] names stays.
    pub fn pack_for(ck: &Checkpoint, floats: Arithmetic) -> Model {
        let part = |_: &[Tensor]| Ok::<_, Infallible>(Cow::Borrowed(ck));
        let Ok(model) = Model::build(&ck.spec, Words::copy(ck), floats, part);
        model
    }

    /// Packs an opened directory tensor by tensor, so that memory never holds the weights twice; word embeddings stay
    /// in the file, which is kept open.
    ///
    /// # Errors
    /// Everything that is wrong with the tensors.
    pub fn load(source: Source) -> Result<Model> {
        Model::load_for(source, Arithmetic::F32)
    }

    /// As [`Model::load`], for `floats` as in [`Model::pack_for`].
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_for(mut source: Source, floats: Arithmetic) -> Result<Model> {
        let words = Words::open(&mut source)?;
        let spec = source.spec().clone();
        let model = Model::build(&spec, words, floats, |tensors| source.part(tensors).map(Cow::Owned))?;
        if spec.unused_pooler {
            source.part(&[Tensor::W(Lin::UnusedPooler), Tensor::B(Lin::UnusedPooler)])?;
        }
        source.finish()?;
        Ok(model)
    }

    /// `part` gives a checkpoint that has at least the tensors asked for.
    fn build<'c, E>(
        spec: &ModelSpec,
        words: Words,
        floats: Arithmetic,
        mut part: impl FnMut(&[Tensor]) -> Outcome<Cow<'c, Checkpoint>, E>,
    ) -> Outcome<Model, E> {
        let mut table = |t: Tensor| Ok(part(&[t])?.values(t).into_owned());
        let mut norms = BTreeMap::new();
        for n in spec.norms() {
            norms.insert(n, (table(Tensor::Gamma(n))?, table(Tensor::Beta(n))?));
        }
        let position = table(Tensor::Position)?;
        let token_type = if spec.token_types > 0 { table(Tensor::TokenType)? } else { vec![] };
        let kept = default_keep(spec);
        let mut pack = |sites: &[Lin]| {
            let tensors: Vec<_> = sites.iter().flat_map(|s| [Tensor::W(*s), Tensor::B(*s)]).collect();
            let stays = floats == Arithmetic::Int8 && kept.contains(&spec.module(sites[0]));
            Ok(Linear::pack(&*part(&tensors)?, sites, if stays { Arithmetic::F32 } else { floats }))
        };
        let layers = 0..spec.layers.len();
        let qkv = layers.map(|l| pack(&[Lin::Query(l), Lin::Key(l), Lin::Value(l)])).collect::<Outcome<_, E>>()?;
        let single = |s: &Lin| !matches!(s, Lin::Query(_) | Lin::Key(_) | Lin::Value(_) | Lin::UnusedPooler);
        let linears = spec.linears().into_iter().map(|(s, ..)| s).filter(single);
        let linears = linears.map(|s| Ok((s, pack(&[s])?))).collect::<Outcome<_, E>>()?;
        Ok(Model { spec: spec.clone(), words, position, token_type, norms, qkv, linears })
    }

    /// Bytes of memory that packed linears and LayerNorms take.
    pub fn weight_bytes(&self) -> usize {
        let norms: usize = self.norms.values().map(|(gamma, beta)| 4 * (gamma.len() + beta.len())).sum();
        norms + self.qkv.iter().chain(self.linears.values()).map(Linear::bytes).sum::<usize>()
    }

    /// Bytes of memory that the embedding tables take now; rows of word embeddings come in as they are read.
    pub fn embedding_bytes(&self) -> usize {
        self.words.memory_bytes() + 4 * (self.position.len() + self.token_type.len())
    }

    /// The kind of most multiply-adds of the linears.
    pub fn arithmetic(&self) -> Arithmetic {
        let mut sums = [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8].map(|kind| (0, kind));
        for (kind, macs) in self.qkv.iter().chain(self.linears.values()).flat_map(Linear::arithmetic) {
            sums.iter_mut().filter(|s| s.1 == kind).for_each(|s| s.0 += macs);
        }
        sums.into_iter().max_by_key(|s| s.0).map_or(Arithmetic::F32, |s| s.1)
    }

    /// The shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The linear that reads what a LayerNorm writes; the pool reads the last one.
    fn reader(&self, site: Norm) -> Option<&Linear> {
        match site {
            Norm::Embeddings if self.spec.is_projected() => self.linears.get(&Lin::EmbedProjection),
            Norm::Embeddings => self.qkv.first(),
            Norm::Attention(l) => self.linears.get(&Lin::Up(l)),
            Norm::Ffn(l) if l + 1 == self.qkv.len() && matches!(self.spec.head, HeadSpec::Tokens { .. }) => {
                self.linears.get(&Lin::Classifier)
            }
            Norm::Ffn(l) => self.qkv.get(l + 1),
        }
    }

    /// Logits `[sentences, labels]` or `[tokens, labels]` of a batch, or hidden states `[tokens, hidden]` of a bare body.
    ///
    /// # Errors
    /// The file that holds the word embeddings cannot be read any more.
    pub fn forward(&self, ws: &mut Workspace, batch: &Batch) -> Result<Vec<f32>> {
        self.forward_on(&ALONE, ws, batch)
    }

    /// As [`Model::forward`], the same bits, computed by a whole team: sooner for a batch of few tokens.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn forward_on(&self, team: &Team, ws: &mut Workspace, batch: &Batch) -> Result<Vec<f32>> {
        let mut ops = CpuOps { team, ..CpuOps::new(self, ws) };
        let y = forward(&mut ops, &self.spec, batch);
        let out = y.values[..y.rows * y.width].to_vec();
        ops.recycle(y);
        ops.failed.map_or(Ok(out), Err)
    }

    /// [`Session::logits`] of a session for this one call: its threads start and end here.
    ///
    /// # Errors
    /// As [`Session::logits`].
    pub fn logits(&self, sentences: &[Encoding], threads: usize) -> Result<Vec<f32>> {
        Session::new(threads).logits(self, sentences)
    }

    /// Logits `[units, labels]` of what has an answer.
    ///
    /// # Errors
    /// As [`Model::logits`].
    pub fn answers(&self, sentences: &[Encoding], units: &Units, threads: usize) -> Result<Vec<f32>> {
        let output = self.logits(sentences, threads)?;
        Ok(units.gather(output, self.spec.head.labels(), sentences.iter().map(|e| e.ids.len())))
    }
}

/// Free buffers, one workspace a thread. A buffer keeps its length, so nothing is zeroed again; with those of the
/// largest batch seen, it is quiet.
#[derive(Default)]
pub struct Workspace {
    floats: Vec<Vec<f32>>,
    bytes: Vec<Vec<i8>>,
    words: Vec<Vec<u32>>,
}

/// A buffer of at least `len`. They come in powers of four: what a batch of other length frees fits again, a small
/// request takes no large buffer from those who need it, and of a new one only what is written becomes resident.
fn take<T: Clone + Default>(free: &mut Vec<Vec<T>>, len: usize) -> Vec<T> {
    let size = 1 << len.next_power_of_two().trailing_zeros().next_multiple_of(2);
    // The one freed last is still in cache.
    match free.iter().rposition(|buffer| buffer.len() == size) {
        Some(i) => free.remove(i),
        None => vec![T::default(); size],
    }
}

impl Workspace {
    fn floats(&mut self, len: usize) -> Vec<f32> {
        take(&mut self.floats, len)
    }
    fn bytes(&mut self, len: usize) -> Vec<i8> {
        take(&mut self.bytes, len)
    }

    fn words(&mut self, len: usize) -> Vec<u32> {
        take(&mut self.words, len)
    }

    /// Room for `[rows, k]` as int8.
    fn int8(&mut self, rows: usize, k: usize, range: Range) -> Int8 {
        Int8 { rows, k, range, q: self.bytes(rows * int8::stride(k)), scale: self.floats(rows) }
    }

    fn quantise(&mut self, team: &Team, values: &[f32], rows: usize, k: usize, range: Range) -> Int8 {
        let mut x = self.int8(rows, k, range);
        let (q, scale) = x.parts();
        split::quantise(team, values, k, range, q, scale);
        x
    }

    fn free(&mut self, x: Int8) {
        self.bytes.push(x.q);
        self.floats.push(x.scale);
    }
}

/// Rows quantised to int8; its buffers may be longer.
pub(super) struct Int8 {
    rows: usize,
    k: usize,
    range: Range,
    q: Vec<i8>,
    scale: Vec<f32>,
}

impl Int8 {
    fn parts(&mut self) -> (&mut [i8], &mut [f32]) {
        (&mut self.q[..self.rows * int8::stride(self.k)], &mut self.scale[..self.rows])
    }

    fn rows(&self) -> int8::Rows<'_> {
        int8::Rows { q: &self.q[..self.rows * int8::stride(self.k)], scale: &self.scale[..self.rows] }
    }
}

/// A ragged activation `[rows, width]`; its buffer may be longer.
pub struct Act {
    rows: usize,
    width: usize,
    values: Vec<f32>,
    /// The same as integers, where an int8 linear reads it.
    int8: Option<Int8>,
}

/// The forward's operations on a [`Model`].
pub struct CpuOps<'a> {
    model: &'a Model,
    team: &'a Team,
    ws: &'a mut Workspace,
    /// Row borders of the sequences in the activations: LLM.int8() looks for outliers within one.
    starts: Vec<usize>,
    /// Operations cannot fail, reading word embeddings can: told by [`Model::forward`] when all is done.
    failed: Option<Error>,
}

impl<'a> CpuOps<'a> {
    /// Ready for one batch after the other.
    pub fn new(model: &'a Model, ws: &'a mut Workspace) -> CpuOps<'a> {
        CpuOps { model, team: &ALONE, ws, starts: vec![], failed: None }
    }

    /// Float rows of a batch `[tokens, width]`, to go on from.
    pub(crate) fn resume(&mut self, batch: &Batch, from: &[f32]) -> Act {
        self.starts.clone_from(&batch.starts);
        let mut values = self.ws.floats(from.len());
        values[..from.len()].copy_from_slice(from);
        Act { rows: batch.tokens(), width: from.len() / batch.tokens().max(1), values, int8: None }
    }

    pub(crate) fn recycle(&mut self, x: Act) {
        self.ws.floats.push(x.values);
        if let Some(x) = x.int8 {
            self.ws.free(x);
        }
    }

    /// f(x W^T + b), and the same quantised for a reader of integers.
    fn project(&mut self, linear: &Linear, x: &Act, f: Activation, reader: Option<&Linear>) -> Act {
        let (rows, width) = (x.rows, linear.n());
        let mut values = self.ws.floats(rows * width);
        let input = Input {
            values: &x.values[..rows * x.width],
            int8: x.int8.as_ref().map(|x| (x.rows(), x.range)),
            rows,
            starts: &self.starts,
        };
        linear.run(&input, f, self.team, self.ws, &mut values[..rows * width]);
        self.finish(rows, width, values, reader)
    }

    /// An activation, quantised where its reader wants integers.
    fn finish(&mut self, rows: usize, width: usize, values: Vec<f32>, reader: Option<&Linear>) -> Act {
        let wanted = reader.and_then(Linear::reads_int8);
        let int8 = wanted.map(|range| self.ws.quantise(self.team, &values[..rows * width], rows, width, range));
        Act { rows, width, values, int8 }
    }

    /// LayerNorm(x + residual).
    fn normalise(&mut self, site: Norm, mut x: Act, residual: &[f32]) -> Act {
        let model = self.model;
        let (gamma, beta) = &model.norms[&site];
        x.int8 = model.reader(site).and_then(Linear::reads_int8).map(|range| self.ws.int8(x.rows, x.width, range));
        let share = split::rows(self.team, x.rows, x.width);
        let mut int8 = x.int8.as_mut().map(|x| {
            let (step, range, (q, scale)) = (int8::stride(x.k), x.range, x.parts());
            q.chunks_mut(share * step).zip(scale.chunks_mut(share)).map(move |(q, scale)| (range, q, scale))
        });
        let pieces = x.values[..x.rows * x.width].chunks_mut(share * x.width).enumerate().map(|(i, x)| {
            let first = i * share * gamma.len();
            let residual = residual.get(first..first + x.len()).unwrap_or_default();
            (x, residual, int8.as_mut().and_then(Iterator::next))
        });
        self.team.each(pieces.collect(), |(x, residual, int8)| {
            norm::add_layer_norm(x, residual, gamma, beta, model.spec.norm_eps, int8);
        });
        x
    }
}

impl Ops for CpuOps<'_> {
    type Act = Act;

    fn embed(&mut self, batch: &Batch) -> Act {
        let (m, rows, width) = (self.model, batch.tokens(), self.model.spec.embedding());
        self.starts.clone_from(&batch.starts);
        let mut values = self.ws.floats(rows * width);
        let x = &mut values[..rows * width];
        if let Err(error) = m.words.gather(&batch.ids, width, x) {
            x.fill(0.0);
            self.failed = Some(error);
        }
        let tables = rows::Tables { position: &m.position, token_type: &m.token_type, width };
        rows::add_embeddings(tables, &batch.types, &batch.positions, x);
        self.normalise(Norm::Embeddings, Act { rows, width, values, int8: None }, &[])
    }

    fn qkv(&mut self, l: usize, x: &Act) -> Act {
        let model = self.model;
        self.project(&model.qkv[l], x, Activation::Identity, None)
    }

    fn attention(&mut self, l: usize, qkv: Act, batch: &Batch) -> Act {
        let model = self.model;
        let heads = Heads { count: model.spec.layers[l].heads.len(), dim: model.spec.head_dim };
        let (rows, width) = (qkv.rows, qkv.width / 3);
        let longest = batch.ranges().map(|s| s.len()).max().unwrap_or(0);
        let mut values = self.ws.floats(rows * width);
        let context = Window::new(&mut values, rows, width, width);
        let macs = 2 * heads.dim * heads.probs_len(&batch.starts);
        let pieces = split::columns(self.team, context, macs, split::ATTENTION, heads.dim);
        let mut scratch = split::buffers(self.ws, pieces.len(), heads.scratch_len(longest));
        let pieces = pieces.into_iter().zip(&mut scratch).collect();
        self.team.each(pieces, |((first, context), scratch)| {
            let some = first / heads.dim..(first + context.width()) / heads.dim;
            attention::attention_of_heads(&qkv.values, heads, some, &batch.starts, context, scratch);
        });
        self.ws.floats.append(&mut scratch);
        self.recycle(qkv);
        self.finish(rows, width, values, model.linears.get(&Lin::Out(l)))
    }

    fn ffn_up(&mut self, l: usize, x: &Act) -> Act {
        let model = self.model;
        let down = model.linears.get(&Lin::Down(l));
        self.project(&model.linears[&Lin::Up(l)], x, model.spec.ffn_activation, down)
    }

    fn linear(&mut self, site: Lin, x: Act, f: Activation) -> Act {
        let model = self.model;
        let reader = match site {
            Lin::EmbedProjection => model.qkv.first(),
            Lin::HeadDense => model.linears.get(&Lin::Classifier),
            _ => None,
        };
        let y = self.project(&model.linears[&site], &x, f, reader);
        self.recycle(x);
        y
    }

    fn add_norm(&mut self, site: Norm, x: Act, residual: Act) -> Act {
        let y = self.normalise(site, x, &residual.values[..residual.rows * residual.width]);
        self.recycle(residual);
        y
    }

    fn pool(&mut self, how: Pool, x: Act, batch: &Batch) -> Act {
        let (rows, width) = (batch.sentences(), x.width);
        let mut values = self.ws.floats(rows * width);
        rows::pool(how, &x.values, width, &batch.starts, &mut values[..rows * width]);
        self.recycle(x);
        self.starts.clear();
        self.starts.extend(0..=rows);
        let model = self.model;
        self.finish(rows, width, values, model.linears.get(&Lin::HeadDense))
    }
}

impl Inspect for CpuOps<'_> {
    fn values(&self, x: &Act) -> Vec<f32> {
        x.values[..x.rows * x.width].to_vec()
    }

    fn scale_columns(&mut self, _at: At, mut x: Act, scale: &[f32]) -> Act {
        let values = &mut x.values[..x.rows * x.width];
        rows::scale_columns(values, x.width, scale);
        if let Some(int8) = &mut x.int8 {
            let range = int8.range;
            let (q, row_scale) = int8.parts();
            int8::quantise(values, x.width, range, q, row_scale);
        }
        x
    }
}
