//! An embedding table that stays in its file: rows are read where they stand (`pread`), those read first are kept.
//!
//! A memory map would do the same with less code, but the kernel maps 64 KB around every page touched: the 800 pages
//! that a test set of short questions needs of an int8 table made all of its 11 MB resident.

use crate::checkpoint::FloatType;
use crate::error::{Error, Result};
use crate::quant::FourBit;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// How the rows are stored.
pub enum RowType {
    /// Floats.
    Float(FloatType),
    /// 8-bit integers with the absmax of each row: w = q * SCB / 127. `scb: [rows]`
    Int8 {
        /// Row absmax.
        scb: Vec<f32>,
    },
    /// 4-bit blocks, which do not end where rows do: all of them but the codes.
    FourBit(FourBit),
}

impl RowType {
    /// The bytes of the table that hold some of its elements.
    fn bytes_of(&self, elements: Range<usize>) -> Range<usize> {
        let size = match self {
            RowType::Float(FloatType::F32) => 4,
            RowType::Float(_) => 2,
            RowType::Int8 { .. } => 1,
            RowType::FourBit(_) => return FourBit::bytes_of(elements),
        };
        size * elements.start..size * elements.end
    }
}

/// Kept rows take up to this many bytes.
const KEPT_BYTES: usize = 1 << 20;

/// A table `[rows, width]` in a file.
pub struct Rows {
    file: Arc<File>,
    path: PathBuf,
    /// Where row 0 starts in the file.
    start: u64,
    rows: usize,
    width: usize,
    kind: RowType,
    /// Row `i` may stand in slot `i % len`. A slot is filled once, so readers need no lock; word pieces are numbered
    /// by falling frequency, so the frequent ones rarely meet.
    kept: Vec<OnceLock<(u32, Box<[u8]>)>>,
}

impl Rows {
    /// A table of `rows` rows that starts at byte `start`.
    pub(super) fn new(
        file: Arc<File>,
        path: PathBuf,
        start: u64,
        rows: usize,
        width: usize,
        kind: RowType,
    ) -> Rows {
        let slots = (KEPT_BYTES / kind.bytes_of(0..width).len().max(1)).clamp(1, rows.max(1));
        let kept = (0..slots).map(|_| OnceLock::new()).collect();
        Rows { file, path, start, rows, width, kind, kept }
    }

    /// How the rows are stored.
    pub fn kind(&self) -> &RowType {
        &self.kind
    }

    /// Bytes of memory that the table takes now.
    pub fn memory_bytes(&self) -> usize {
        let scales = match &self.kind {
            RowType::Float(_) => 0,
            RowType::Int8 { scb } => 4 * scb.len(),
            RowType::FourBit(q) => q.bytes(),
        };
        let rows: usize = self.kept.iter().filter_map(|slot| slot.get()).map(|(_, row)| row.len()).sum();
        scales + rows + std::mem::size_of_val(&self.kept[..])
    }

    /// Writes the rows `ids` into `out` as f32, one after the other.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn gather(&self, ids: &[u32], out: &mut [f32]) -> Result<()> {
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.width)) {
            let slot = &self.kept[id as usize % self.kept.len()];
            match slot.get() {
                Some((kept, row)) if *kept == id => self.decode(id, row, out),
                taken => {
                    let row = self.read(self.elements(id))?.into_boxed_slice();
                    self.decode(id, &row, out);
                    if taken.is_none() {
                        let _ = slot.set((id, row)); // another thread may have been first
                    }
                }
            }
        }
        Ok(())
    }

    fn elements(&self, id: u32) -> Range<usize> {
        id as usize * self.width..(id as usize + 1) * self.width
    }

    /// The bytes of some elements.
    fn read(&self, elements: Range<usize>) -> Result<Vec<u8>> {
        let bytes = self.kind.bytes_of(elements);
        let mut buffer = vec![0; bytes.len()];
        read_exact_at(&self.file, &mut buffer, self.start + bytes.start as u64).map_err(Error::io(&self.path))?;
        Ok(buffer)
    }

    fn decode(&self, id: u32, row: &[u8], out: &mut [f32]) {
        match &self.kind {
            RowType::Int8 { scb } => {
                let scale = scb[id as usize];
                row.iter().zip(out).for_each(|(q, o)| *o = f32::from(*q as i8) * scale / 127.0);
            }
            RowType::Float(dtype) => dtype.decode(row, out),
            RowType::FourBit(q) => {
                q.values(row, self.elements(id)).zip(out).for_each(|(v, o)| *o = v);
            }
        }
    }

    /// Whether all floats are finite; looked at once, before anybody multiplies with them.
    pub(super) fn is_finite(&self) -> Result<bool> {
        let RowType::Float(dtype) = &self.kind else { return Ok(true) }; // scales are checked where they are read
        const BLOCK: usize = 1 << 14; // elements
        let (all, mut floats) = (self.rows * self.width, vec![0.0; BLOCK]);
        for first in (0..all).step_by(BLOCK) {
            let n = BLOCK.min(all - first);
            dtype.decode(&self.read(first..first + n)?, &mut floats[..n]);
            // Without a way out of the middle of a block, so that it vectorises.
            if !floats[..n].iter().fold(true, |all, x| all & x.is_finite()) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, buffer, offset)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        (buffer, offset) = (&mut buffer[n..], offset + n as u64);
    }
    Ok(())
}
