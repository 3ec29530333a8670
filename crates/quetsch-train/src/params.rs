//! f32 master weights, and gradients beside them.

use quetsch::Result;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::rng::{Rng, key};
use quetsch::spec::{Lin, ModelSpec, Role, Tensor, TensorDef};
use std::collections::HashMap;

/// The weights being trained: one f32 vector per row of the table of tensors.
#[derive(Clone)]
pub struct Params {
    /// The shape.
    pub spec: ModelSpec,
    /// The table of tensors.
    pub table: Vec<TensorDef>,
    /// The values, by row of the table.
    pub data: Vec<Vec<f32>>,
    /// Which rows are trained: not frozen and not unused.
    pub trained: Vec<bool>,
    index: HashMap<Tensor, usize>,
}

impl Params {
    /// The weights of a checkpoint; tensors whose name contains one of `freeze` stay as they are.
    pub fn new(ck: &Checkpoint, freeze: &[String]) -> Params {
        let table = ck.spec.tensors();
        let unused =
            |d: &TensorDef| matches!(d.tensor, Tensor::W(Lin::UnusedPooler) | Tensor::B(Lin::UnusedPooler));
        let trained =
            table.iter().map(|d| !unused(d) && !freeze.iter().any(|f| d.name.contains(f.as_str()))).collect();
        let index = table.iter().enumerate().map(|(i, d)| (d.tensor, i)).collect();
        let data = table.iter().map(|d| ck.values(d.tensor).into_owned()).collect();
        Params { spec: ck.spec.clone(), table, data, trained, index }
    }

    /// Adds a projection `[to, from]`, random: it keeps the scale of what it maps.
    pub fn add_projection(&mut self, i: usize, (to, from): (usize, usize), seed: u64) {
        let tensor = Tensor::Projection(i);
        let mut rng = Rng::new(key(&[seed, 0x9407, i as u64]));
        self.index.insert(tensor, self.table.len());
        let name = self.spec.name(tensor);
        self.table.push(TensorDef { tensor, name, shape: vec![to, from], role: Role::Weight });
        self.data.push((0..to * from).map(|_| rng.normal() / (from as f32).sqrt()).collect());
        self.trained.push(true);
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
            word: SparseRows::new(rows, p.spec.embedding()),
        }
    }

    /// Back to zeros.
    pub fn clear(&mut self) {
        self.dense.iter_mut().for_each(|g| g.fill(0.0));
        self.word.clear();
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
