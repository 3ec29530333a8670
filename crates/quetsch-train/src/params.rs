//! f32 master weights, and gradients beside them.

use crate::qat::{Assigned, Qat, Site, is_four_bit};
use crate::threads::parallel;
use quetsch::Result;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::rng::{Rng, key};
use quetsch::spec::{Lin, ModelSpec, Role, Tensor, TensorDef};
use quetsch_kernels::gemm::Write;
use quetsch_kernels::panels::{Precision, pack_panels, pack_panels_across};
use quetsch_kernels::rows;
use std::collections::{BTreeMap, HashMap};

/// The weights being trained: one f32 vector per row of the table of tensors.
pub struct Params {
    /// The shape.
    pub spec: ModelSpec,
    /// The table of tensors.
    pub table: Vec<TensorDef>,
    /// The values, by row of the table.
    pub data: Vec<Vec<f32>>,
    /// Which rows are trained: not frozen and not unused.
    pub trained: Vec<bool>,
    /// What the products of linear layers are computed in.
    pub precision: Precision,
    index: HashMap<Tensor, usize>,
    packs: HashMap<Lin, Pack>,
    pub(crate) quant: Option<Assigned>,
    /// Beside `data` where the forward reads quantised values: tables, biases and LayerNorms.
    quantised: Vec<Option<Vec<f32>>>,
}

/// A linear layer's weights as the products read them; q, k and v of a layer lie side by side.
pub struct Pack {
    /// The matrices, top to bottom.
    pub parts: Vec<Part>,
    /// Rows of all parts.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Biases of all parts.
    pub bias: Vec<f32>,
    /// W^T `[k, n]`: right operand of the forward.
    pub forward: Vec<u32>,
    /// W `[n, k]`: right operand of the input's gradient.
    pub backward: Vec<u32>,
    /// What the forward runs instead, in quantisation-aware training.
    pub(crate) quantised: Option<Site>,
}

/// One matrix of a [`Pack`]: rows of the table of W and b, and the rows of the matrix.
pub struct Part {
    /// Row of the table.
    pub w: usize,
    /// Row of the table.
    pub b: usize,
    /// Rows of the matrix.
    pub rows: usize,
}

impl Pack {
    fn new(p: Precision, table: &[TensorDef], index: &HashMap<Tensor, usize>, sites: &[Lin]) -> Pack {
        let part = |s: &Lin| {
            let (w, b) = (index[&Tensor::W(*s)], index[&Tensor::B(*s)]);
            Part { w, b, rows: table[b].len() }
        };
        let parts: Vec<Part> = sites.iter().map(part).collect();
        let (n, k) = (parts.iter().map(|p| p.rows).sum(), table[parts[0].w].shape[1]);
        let (forward, backward) = (vec![0; p.panels_len(k, n)], vec![0; p.panels_len(n, k)]);
        Pack { parts, n, k, bias: vec![], forward, backward, quantised: None }
    }

    /// Row `r` of all parts.
    fn row<'a>(parts: &[Part], data: &'a [Vec<f32>], k: usize, mut r: usize) -> &'a [f32] {
        for p in parts {
            if r < p.rows {
                return &data[p.w][r * k..(r + 1) * k];
            }
            r -= p.rows;
        }
        &[]
    }
}

impl Params {
    /// The weights of a checkpoint, for training in f32; tensors whose name contains one of `freeze` stay as they are.
    pub fn new(ck: &Checkpoint, freeze: &[String]) -> Params {
        Params::with(ck, freeze, Precision::F32, 1)
    }

    /// The weights of a checkpoint; tensors whose name contains one of `freeze` stay as they are.
    pub fn with(ck: &Checkpoint, freeze: &[String], precision: Precision, threads: usize) -> Params {
        let table = ck.spec.tensors();
        let unused =
            |d: &TensorDef| matches!(d.tensor, Tensor::W(Lin::UnusedPooler) | Tensor::B(Lin::UnusedPooler));
        let trained =
            table.iter().map(|d| !unused(d) && !freeze.iter().any(|f| d.name.contains(f.as_str()))).collect();
        let index: HashMap<Tensor, usize> = table.iter().enumerate().map(|(i, d)| (d.tensor, i)).collect();
        let data = table.iter().map(|d| ck.values(d.tensor).into_owned()).collect();
        let pack = |d: &TensorDef| match d.tensor {
            Tensor::W(Lin::Key(_) | Lin::Value(_) | Lin::UnusedPooler) => None,
            Tensor::W(q @ Lin::Query(l)) => {
                Some((q, Pack::new(precision, &table, &index, &[q, Lin::Key(l), Lin::Value(l)])))
            }
            Tensor::W(s) => Some((s, Pack::new(precision, &table, &index, &[s]))),
            _ => None,
        };
        let packs = table.iter().filter_map(pack).collect();
        let (spec, quantised) = (ck.spec.clone(), vec![None; table.len()]);
        let mut p = Params { spec, table, data, trained, precision, index, packs, quant: None, quantised };
        p.pack(threads, |_| true);
        p
    }

    /// What the products read of a linear layer; of [`Lin::Query`] it is q, k and v.
    pub fn linear(&self, site: Lin) -> &Pack {
        &self.packs[&site]
    }

    /// Brings what the products read up to date after `data` changed.
    pub fn repack(&mut self, threads: usize) {
        let trained = std::mem::take(&mut self.trained);
        self.pack(threads, |part| trained[part.w] || trained[part.b]);
        self.read_again(|i| trained[i]);
        self.trained = trained;
    }

    /// From now on the forward reads what quantising these weights gives; see [`Qat`].
    ///
    /// # Errors
    /// The rules do not fit the model, or a 4-bit embedding table is to be trained.
    pub fn quantise(&mut self, qat: &Qat, threads: usize) -> Result<()> {
        self.quant = Some(qat.assigned(&self.spec, &self.table, &self.trained)?);
        self.pack(threads, |_| true);
        self.read_again(|_| true);
        Ok(())
    }

    /// Other ranges of static inputs.
    pub(crate) fn set_ranges(&mut self, ranges: BTreeMap<Lin, f32>, threads: usize) {
        if let Some(quant) = &mut self.quant {
            quant.qat.ranges = ranges;
            self.pack(threads, |_| true);
        }
    }

    /// The values that the forward reads of a tensor that is no matrix and not the word table.
    pub fn read(&self, tensor: Tensor) -> &[f32] {
        let i = self.id(tensor);
        self.quantised[i].as_deref().unwrap_or(&self.data[i])
    }

    /// The rows of the word table that the forward reads. x: `[ids, width]`
    pub(crate) fn read_words(&self, ids: &[u32], x: &mut [f32]) {
        let (word, width) = (self.id(Tensor::Word), self.spec.embedding());
        rows::gather(self.quantised[word].as_ref().unwrap_or(&self.data[word]), width, ids, x);
        if let Some(quant) = self.quant.as_ref().filter(|_| self.quantised[word].is_none()) {
            // Rows are quantised one by one, so those that a batch reads will do.
            let read = quant.read(word, x, width);
            read.inspect(|read| x.copy_from_slice(read));
        }
    }

    /// Brings `quantised` up to date.
    fn read_again(&mut self, wanted: impl Fn(usize) -> bool) {
        let Some(quant) = &self.quant else { return };
        for (i, d) in self.table.iter().enumerate().filter(|(i, d)| d.role != Role::Weight && wanted(*i)) {
            if d.tensor != Tensor::Word || quant.scheme(i).is_some_and(is_four_bit) {
                self.quantised[i] = quant.read(i, &self.data[i], d.shape.last().copied().unwrap_or(1));
            }
        }
    }

    fn pack(&mut self, threads: usize, wanted: impl Fn(&Part) -> bool) {
        let (data, precision) = (&self.data, self.precision);
        let mut packs: Vec<(&Lin, &mut Pack)> = self.packs.iter_mut().collect();
        packs.retain(|(_, pack)| pack.parts.iter().any(&wanted));
        // Neighbours of the same size go to different threads.
        packs.sort_by_key(|(site, pack)| (pack.n * pack.k, **site));
        if let Some(quant) = &self.quant {
            let (spec, table) = (&self.spec, &self.table);
            parallel(packs, threads, |(_, pack)| {
                let (site, weights) = quant.site(spec, table, data, &pack.parts);
                pack.quantised = Some(site);
                let row = |r| &weights[r * pack.k..(r + 1) * pack.k];
                pack_panels(precision, row, pack.n, pack.k, &mut pack.backward);
            });
            return;
        }
        let mut jobs = vec![];
        for (_, pack) in packs {
            let Pack { parts, n, k, bias, forward, backward, quantised: _ } = pack;
            bias.clear();
            parts.iter().for_each(|p| bias.extend_from_slice(&data[p.b]));
            let (parts, n, k) = (&*parts, *n, *k);
            jobs.push((parts, n, k, true, forward));
            jobs.push((parts, n, k, false, backward));
        }
        parallel(jobs, threads, |(parts, n, k, is_forward, out)| {
            let row = |r| Pack::row(parts, data, k, r);
            match is_forward {
                true => pack_panels_across(precision, row, k, n, out),
                false => pack_panels(precision, row, n, k, out),
            }
        });
    }

    /// Adds a projection `[to, from]`, random: it keeps the scale of what it maps.
    pub fn add_projection(&mut self, i: usize, (to, from): (usize, usize), seed: u64) {
        let mut rng = Rng::new(key(&[seed, 0x9407, i as u64]));
        let data = (0..to * from).map(|_| rng.normal() / (from as f32).sqrt()).collect();
        self.add(Tensor::Projection(i), vec![to, from], Role::Weight, data);
    }

    /// Adds the weights of so many layers of a teacher, all alike at first. Weight decay would pull them back there.
    pub fn add_layer_weights(&mut self, i: usize, layers: usize) {
        self.add(Tensor::LayerWeights(i), vec![layers], Role::Bias, vec![0.0; layers]);
    }

    fn add(&mut self, tensor: Tensor, shape: Vec<usize>, role: Role, data: Vec<f32>) {
        self.index.insert(tensor, self.table.len());
        self.table.push(TensorDef { tensor, name: self.spec.name(tensor), shape, role });
        self.data.push(data);
        self.trained.push(true);
        self.quantised.push(None);
    }

    /// Row of the table.
    pub fn id(&self, tensor: Tensor) -> usize {
        self.index[&tensor]
    }

    /// Row of the table of a tensor that not every family has.
    pub fn find(&self, tensor: Tensor) -> Option<usize> {
        self.index.get(&tensor).copied()
    }

    /// A tensor's values.
    pub fn get(&self, tensor: Tensor) -> &[f32] {
        &self.data[self.id(tensor)]
    }

    /// `like` with these weights, stored as f32.
    ///
    /// # Errors
    /// Never for the checkpoint these parameters came from.
    pub fn to_checkpoint(&self, like: &Checkpoint) -> Result<Checkpoint> {
        let mut ck = Checkpoint::from_fn(self.spec.clone(), like.labels.clone(), |d| {
            Ok(Stored::f32(self.get(d.tensor).to_vec()))
        })?;
        ck.max_length = like.max_length;
        ck.config.clone_from(&like.config);
        Ok(ck)
    }
}

/// Gradients: dense for all tensors but the word table, whose touched rows alone are kept.
pub struct Grads {
    /// By row of the table; empty where nothing is trained, and for the word table.
    pub dense: Vec<Vec<f32>>,
    /// The linears' weights in `dense`.
    matrices: Vec<usize>,
    /// Which of `dense` hold nothing yet: what they contain is of an earlier step and counts as zeros.
    pub fresh: Vec<bool>,
    /// The word table's.
    pub word: SparseRows,
}

impl Grads {
    /// Zeros for what is trained.
    pub fn new(p: &Params) -> Grads {
        let word = p.id(Tensor::Word);
        let dense = |(i, d): (usize, &TensorDef)| vec![0.0; if p.trained[i] && i != word { d.len() } else { 0 }];
        let rows = if p.trained[word] { p.spec.vocab } else { 0 };
        Grads {
            dense: p.table.iter().enumerate().map(dense).collect(),
            fresh: vec![false; p.table.len()],
            matrices: p.packs.values().flat_map(|pack| pack.parts.iter().map(|part| part.w)).collect(),
            word: SparseRows::new(rows, p.spec.embedding()),
        }
    }

    /// Back to zeros. Weights of linears, which are most of the bytes, are marked: their next gradient overwrites them.
    pub fn clear(&mut self) {
        self.matrices.iter().for_each(|i| self.fresh[*i] = true);
        let small = self.dense.iter_mut().zip(&self.fresh).filter(|(_, fresh)| !**fresh);
        small.for_each(|(g, _)| g.fill(0.0));
        self.word.clear();
    }

    /// How the next gradient of a linear's weights is written.
    pub(crate) fn write(&mut self, i: usize) -> Write {
        if std::mem::take(&mut self.fresh[i]) { Write::Set } else { Write::Add }
    }
}

/// Rows of a table that were touched, in the order of first touch.
pub struct SparseRows {
    slot: Vec<u32>,
    /// Row numbers.
    pub rows: Vec<u32>,
    /// `[rows.len(), width]`
    pub data: Vec<f32>,
    width: usize,
}

const NONE: u32 = u32::MAX;

impl SparseRows {
    fn new(table_rows: usize, width: usize) -> SparseRows {
        SparseRows { slot: vec![NONE; table_rows], rows: vec![], data: vec![], width }
    }

    /// Whether rows are collected at all (false for a frozen table).
    pub fn is_used(&self) -> bool {
        !self.slot.is_empty()
    }

    /// The row's gradient, zeros on first touch.
    pub fn row_mut(&mut self, row: u32) -> &mut [f32] {
        if self.slot[row as usize] == NONE {
            self.slot[row as usize] = self.rows.len() as u32;
            self.rows.push(row);
            self.data.resize(self.data.len() + self.width, 0.0);
        }
        let start = self.slot[row as usize] as usize * self.width;
        &mut self.data[start..start + self.width]
    }

    /// The row's gradient, if it was touched.
    pub fn row(&self, row: usize) -> Option<&[f32]> {
        let slot = self.slot[row];
        (slot != NONE).then(|| &self.data[slot as usize * self.width..][..self.width])
    }

    /// Adds another's rows.
    pub fn add(&mut self, other: &SparseRows) {
        for (row, g) in other.rows.iter().zip(other.data.chunks_exact(other.width)) {
            quetsch_kernels::math::add(self.row_mut(*row), g);
        }
    }

    fn clear(&mut self) {
        for row in self.rows.drain(..) {
            self.slot[row as usize] = NONE;
        }
        self.data.clear();
    }
}
