//! The word embeddings of a packed model: by far its largest table, of which a sentence needs a few rows.

use crate::checkpoint::{Checkpoint, Stored};
use crate::dir::{Rows, Source};
use crate::error::Result;
use crate::quant::{FourBit, Int8Rows};
use crate::spec::Tensor;
use quetsch_kernels::rows;

/// Where the rows are.
pub enum Words {
    /// In the model's file, read when they are wanted.
    File(Rows),
    /// f32 rows in memory: those of a checkpoint that has no file.
    Float(Vec<f32>),
    /// int8 rows in memory.
    Int8(Int8Rows),
    /// 4-bit blocks in memory.
    FourBit(FourBit),
}

impl Words {
    /// From a checkpoint in memory.
    pub fn copy(ck: &Checkpoint) -> Words {
        match ck.get(Tensor::Word) {
            Stored::Float { data, .. } => Words::Float(data.clone()),
            Stored::Int8(q) => Words::Int8(q.clone()),
            Stored::FourBit(q) => Words::FourBit(q.clone()),
        }
    }

    /// From a directory: the rows stay in the file.
    ///
    /// # Errors
    /// The file cannot be read, or is not what its config says.
    pub fn open(source: &mut Source) -> Result<Words> {
        source.rows(Tensor::Word).map(Words::File)
    }

    /// x[t] = row ids[t] as f32. `x: [tokens, width]`
    ///
    /// # Errors
    /// The file cannot be read any more.
    pub fn gather(&self, ids: &[u32], width: usize, x: &mut [f32]) -> Result<()> {
        let each = ids.iter().map(|&id| id as usize).zip(x.chunks_exact_mut(width));
        match self {
            Words::File(rows) => rows.gather(ids, x)?,
            Words::Float(table) => rows::gather(table, width, ids, x),
            Words::Int8(q) => each.for_each(|(id, x)| {
                let row = &q.values[id * width..(id + 1) * width];
                row.iter().zip(x).for_each(|(v, x)| *x = f32::from(*v) * q.scb[id] / 127.0);
            }),
            Words::FourBit(q) => each.for_each(|(id, x)| {
                let row = id * width..(id + 1) * width;
                q.values(&q.packed[FourBit::bytes_of(row.clone())], row).zip(x).for_each(|(v, x)| *x = v);
            }),
        }
        Ok(())
    }

    /// Bytes of memory that the table takes now.
    pub fn memory_bytes(&self) -> usize {
        match self {
            Words::File(rows) => rows.memory_bytes(),
            Words::Float(table) => 4 * table.len(),
            Words::Int8(q) => q.values.len() + 4 * q.scb.len(),
            Words::FourBit(q) => q.bytes(),
        }
    }
}
