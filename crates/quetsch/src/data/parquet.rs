//! Parquet files as tables of strings, by the crate `parquet` and its record interface (no Arrow): rows in their order,
//! over several files too, with the names of the labels that Hugging Face's `datasets` writes into the file.

use super::table::{Cell, Row, Table};
use crate::{Error, Result};
use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::FOOTER_SIZE;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Rows read at a time.
const BLOCK_ROWS: usize = 1024;
/// Bytes that a page may have when it is unpacked, whatever it is packed to; writers aim at one MiB.
const PAGE: i32 = 32 << 20;
/// And how many times its packed length a larger page may have.
const PACKED: i32 = 100;
/// Bytes that the header of a page may have; writers leave out statistics of more than 4 KiB.
const HEADER: usize = 64 << 10;

/// The files of a table that are still to be read.
pub(super) struct Rows {
    /// As the caller named it.
    path: PathBuf,
    files: std::vec::IntoIter<PathBuf>,
    /// The file that is read.
    open: Option<(PathBuf, RowIter<'static>)>,
    columns: Vec<String>,
    classes: HashMap<String, Vec<String>>,
    /// Rows read so far.
    row: usize,
}

impl Rows {
    /// Of a file, or of all files that a name with `*` fits.
    pub(super) fn open(path: &Path) -> Result<Rows> {
        let files = super::files(path)?.into_iter();
        let (columns, classes) = (Vec::new(), HashMap::new());
        let mut rows = Rows { path: path.to_path_buf(), files, open: None, columns, classes, row: 0 };
        rows.next_file()?;
        Ok(rows)
    }

    /// Opens the next file; whether there is one.
    fn next_file(&mut self) -> Result<bool> {
        let Some(path) = self.files.next() else { return Ok(false) };
        let file = File::open(&path).map_err(Error::io(&path))?;
        let reader = guarded(&path, || SerializedFileReader::new(Chunks(file)))?;
        let metadata = reader.metadata().file_metadata();
        let columns: Vec<String> =
            metadata.schema().get_fields().iter().map(|field| field.name().to_string()).collect();
        if !self.columns.is_empty() && self.columns != columns {
            let (first, own) = (self.columns.join("`, `"), columns.join("`, `"));
            let message = format!("its columns are `{own}`, those of the files before it `{first}`");
            return Err(Error::file(path, message));
        }
        let written = metadata.key_value_metadata().into_iter().flatten().find(|entry| entry.key == "huggingface");
        self.classes = written.and_then(|entry| entry.value.as_deref()).map_or_else(HashMap::new, classes);
        self.columns = columns;
        self.open = Some((path, RowIter::from_file_into(Box::new(reader))));
        Ok(true)
    }

    /// The next rows, at least one; nothing at the end.
    pub(super) fn next(&mut self) -> Result<Option<Table>> {
        let mut rows = Vec::new();
        while let Some((path, open)) = &mut self.open {
            while rows.len() < BLOCK_ROWS {
                let Some(read) = guarded(path, || open.next().transpose())? else { break };
                self.row += 1;
                let cells = read.into_columns().into_iter().map(|(_, field)| cell(field)).collect();
                rows.push(Row { line: self.row, cells });
            }
            if rows.len() == BLOCK_ROWS {
                break;
            }
            if !self.next_file()? {
                self.open = None;
            }
        }
        let (path, columns, classes) = (self.path.clone(), self.columns.clone(), self.classes.clone());
        Ok((!rows.is_empty()).then_some(Table { path, columns, rows, classes }))
    }
}

/// A file that the crate reads from. It believes the numbers of headers and makes room for as much; whether they can be
/// true is looked at here, before it has them.
struct Chunks(File);

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<File>;

    /// At the last bytes once, then at the header of each page.
    fn get_read(&self, start: u64) -> parquet::errors::Result<BufReader<File>> {
        let mut read = BufReader::with_capacity(HEADER, self.0.get_read(start)?.into_inner());
        if start.saturating_add(FOOTER_SIZE as u64) < self.len() {
            check_page(read.fill_buf()?)
                .map_err(|what| ParquetError::General(format!("the page at byte {start} {what}")))?;
        }
        Ok(read)
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let end = start.checked_add(length as u64).filter(|end| *end <= self.len()).ok_or_else(|| {
            ParquetError::EOF(format!("{length} bytes at byte {start} reach beyond the end of the file"))
        })?;
        let bytes = self.0.get_bytes(start, length)?;
        if end + FOOTER_SIZE as u64 == self.len() {
            check_footer(&bytes).map_err(|what| ParquetError::General(format!("the footer {what}")))?;
        }
        Ok(bytes)
    }
}

/// PageHeader of parquet.thrift.
fn check_page(header: &[u8]) -> std::result::Result<(), String> {
    let (mut unpacked, mut packed, mut values) = (0, 0, 0);
    let whole = numbers(header, |fields, n| match fields {
        [2] => unpacked = n as i32,
        [3] => packed = n as i32,
        [7, 1] => values = n as i32,
        _ => {}
    });
    if !whole {
        Err("has no header".into())
    } else if unpacked > PAGE && unpacked / PACKED > packed {
        Err(format!("says that {packed} bytes unpack to {unpacked}"))
    } else if values > unpacked {
        Err(format!("says that {unpacked} bytes are a dictionary of {values} values"))
    } else {
        Ok(())
    }
}

/// FileMetaData of parquet.thrift: the schema is a tree, written as a list.
fn check_footer(footer: &[u8]) -> std::result::Result<(), String> {
    let (mut elements, mut children) = (0, 0);
    let whole = numbers(footer, |fields, n| match fields {
        [2] => elements = n,
        [2, 5] => children += i64::from(n as i32).max(0),
        _ => {}
    });
    match whole {
        false => Err("is not whole, or none of Parquet".into()),
        // All but the root are below one.
        true if children > 0 && children >= elements => {
            Err(format!("has a schema of {elements} elements with {children} children"))
        }
        true => Ok(()),
    }
}

/// Shows `see` every integer of a struct in Thrift's compact protocol, and the length of every list, with the numbers of
/// the fields that lead there; whether the struct is whole. Maps and lists of truth values, which Parquet has none of,
/// are not: the crate skips such a value without a byte, as often as the length says.
fn numbers(bytes: &[u8], see: impl FnMut(&[i64], i64)) -> bool {
    Thrift { bytes, fields: vec![], see }.value(12, 64).is_some()
}

struct Thrift<'a, F> {
    bytes: &'a [u8],
    fields: Vec<i64>,
    see: F,
}

impl<F: FnMut(&[i64], i64)> Thrift<'_, F> {
    /// Reads a value of this type.
    fn value(&mut self, kind: u8, depth: u8) -> Option<()> {
        let below = depth.checked_sub(1)?;
        match kind {
            // A truth value of a struct is in its type.
            1 | 2 => {}
            3 => self.skip(1)?,
            4..=6 => {
                let n = self.zigzag()?;
                (self.see)(&self.fields, n);
            }
            7 => self.skip(8)?,
            8 => {
                let length = self.varint()?;
                self.skip(length)?;
            }
            // A list or a set.
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
                (self.see)(&self.fields, i64::try_from(count).ok()?);
                let kind = Some(head & 15).filter(|kind| !matches!(kind, 1 | 2))?;
                (0..count).try_for_each(|_| self.value(kind, below))?;
            }
            // A struct: fields up to one of type 0.
            12 => {
                let mut field = 0;
                loop {
                    let head = self.byte()?;
                    if head & 15 == 0 {
                        break;
                    }
                    field = if head >> 4 == 0 { self.zigzag()? } else { field + i64::from(head >> 4) };
                    self.fields.push(field);
                    self.value(head & 15, below)?;
                    self.fields.pop();
                }
            }
            _ => return None,
        }
        Some(())
    }

    fn byte(&mut self) -> Option<u8> {
        self.bytes.split_off_first().copied()
    }

    fn skip(&mut self, count: u64) -> Option<()> {
        self.bytes.split_off(..usize::try_from(count).ok()?).map(drop)
    }

    /// Groups of seven bits, the lowest first.
    fn varint(&mut self) -> Option<u64> {
        let mut n = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            n |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(n);
            }
        }
        None
    }

    /// 0, -1, 1, -2, ..
    fn zigzag(&mut self) -> Option<i64> {
        let n = self.varint()?;
        Some((n >> 1) as i64 ^ -((n & 1) as i64))
    }
}

/// What the crate answers; on damaged files some versions of it panic, and a file must never end the program.
fn guarded<T>(path: &Path, read: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    let damaged = |what: String| Error::file(path, format!("cannot be read as Parquet: {what}"));
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|e| damaged(e.to_string())),
        Err(_) => Err(damaged("the file is damaged".into())),
    }
}

/// Names of labels by column, of `{"info": {"features": {"label": {"names": [..], "_type": "ClassLabel"}}}}`; lists of
/// labels have them one level further down.
fn classes(json: &str) -> HashMap<String, Vec<String>> {
    let json: Value = serde_json::from_str(json).unwrap_or_default();
    let names = |feature: &Value| -> Option<Vec<String>> {
        let inner = feature.get("feature").or_else(|| feature.get(0)).unwrap_or(feature);
        let is_class = inner.get("_type")?.as_str()? == "ClassLabel";
        let names = inner.get("names").filter(|_| is_class)?.as_array()?;
        names.iter().map(|name| name.as_str().map(str::to_string)).collect()
    };
    let features = json["info"]["features"].as_object().into_iter().flatten();
    features.filter_map(|(column, feature)| Some((column.clone(), names(feature)?))).collect()
}

fn cell(field: Field) -> Cell {
    match value(field) {
        Value::String(text) => Cell::Text(text),
        Value::Null => Cell::Not("null"),
        Value::Bool(truth) => Cell::Text(truth.to_string()),
        Value::Number(number) => Cell::Text(number.to_string()),
        Value::Array(list) => Cell::List(list),
        Value::Object(_) => Cell::Not("an object"),
    }
}

/// As JSON. A number that is written in a form of its own (a decimal, a time) is text.
fn value(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(truth) => truth.into(),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float16(x) => x.to_f64().into(),
        // By its own digits: 0.1 stays 0.1.
        Field::Float(x) => x.to_string().parse::<f64>().map_or(Value::Null, Value::from),
        Field::Double(x) => x.into(),
        Field::Str(text) => text.into(),
        // Old writers leave strings without a type.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => Value::Object(Map::new()),
        },
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::Group(_) | Field::MapInternal(_) => Value::Object(Map::new()),
        other => other.to_string().into(),
    }
}
