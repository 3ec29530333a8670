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
const PAGE: i64 = 32 << 20;
/// And how many times its packed length a larger page may have.
const PACKED: i64 = 100;

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

/// A file that the crate reads from. The crate believes what its headers say: it makes room for as many bytes, and steps
/// through as many truth values, which take none. What cannot be true is an error here.
struct Chunks(File);

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<File>;

    /// At the footer once, then at the header of each page.
    fn get_read(&self, start: u64) -> parquet::errors::Result<BufReader<File>> {
        let mut read = self.0.get_read(start)?;
        if start.saturating_add(FOOTER_SIZE as u64) < self.len() {
            let header = read.fill_buf()?;
            let Some((unpacked, packed, values)) = sizes(header) else {
                return Err(ParquetError::General(format!("no page header at byte {start}")));
            };
            if unpacked > PAGE && unpacked / PACKED > packed {
                let message = format!("the page at byte {start} says that {packed} bytes unpack to {unpacked}");
                return Err(ParquetError::General(message));
            }
            if values > unpacked {
                let message = format!("the page at byte {start} says that {unpacked} bytes are {values} values");
                return Err(ParquetError::General(message));
            }
            check(header, start)?;
        }
        Ok(read)
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let end = start.checked_add(length as u64).filter(|end| *end <= self.len()).ok_or_else(|| {
            ParquetError::EOF(format!("{length} bytes at byte {start} reach beyond the end of the file"))
        })?;
        let bytes = self.0.get_bytes(start, length)?;
        if end + FOOTER_SIZE as u64 == self.len() {
            check(&bytes, start)?;
        }
        Ok(bytes)
    }
}

/// Unpacked and packed length of a page and, of a dictionary, the number of its values. All writers begin the header with
/// its kind and these two, each an i32; a checksum may follow, then the part for its kind.
fn sizes(header: &[u8]) -> Option<(i64, i64, i64)> {
    const DICTIONARY: i64 = 2;
    const I32: u8 = 0x15;
    let mut thrift = Thrift { bytes: header, foreign: None };
    let (kind, unpacked, packed) = (thrift.field(I32)?, thrift.field(I32)?, thrift.field(I32)?);
    if kind != DICTIONARY {
        return Some((unpacked, packed, 0));
    }
    let part = match thrift.field(I32) {
        Some(_checksum) => 0x3c,
        None => 0x4c,
    };
    (thrift.byte()? == part).then(|| thrift.field(I32))?.map(|values| (unpacked, packed, values))
}

/// That a struct, as far as it is there, has no list of truth values and no map: Parquet has neither.
fn check(bytes: &[u8], start: u64) -> parquet::errors::Result<()> {
    let mut thrift = Thrift { bytes, foreign: None };
    thrift.skip(12, 64);
    thrift
        .foreign
        .map_or(Ok(()), |what| Err(ParquetError::General(format!("the header at byte {start} has {what}"))))
}

/// Bytes in Thrift's compact protocol.
struct Thrift<'a> {
    bytes: &'a [u8],
    /// What was met that Parquet does not have.
    foreign: Option<&'static str>,
}

impl Thrift<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.bytes.split_off_first().copied()
    }

    /// An i32 that follows this byte for type and distance of its field, which else stays.
    fn field(&mut self, head: u8) -> Option<i64> {
        self.bytes = self.bytes.strip_prefix(&[head])?;
        let n = i64::try_from(self.number()?).ok().filter(|n| *n <= i64::from(u32::MAX))?;
        Some((n >> 1) ^ -(n & 1))
    }

    /// Groups of seven bits, the lowest first.
    fn number(&mut self) -> Option<u64> {
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

    fn skip_bytes(&mut self, count: u64) -> Option<()> {
        self.bytes.split_off(..usize::try_from(count).ok()?).map(drop)
    }

    /// Skips a value of this type; nothing where it does not end, is no Thrift or is foreign.
    fn skip(&mut self, kind: u8, depth: u8) -> Option<()> {
        let below = depth.checked_sub(1)?;
        match kind {
            // A truth value of a struct is in its type.
            1 | 2 => Some(()),
            3 => self.skip_bytes(1),
            4..=6 => self.number().map(drop),
            7 => self.skip_bytes(8),
            8 => self.number().and_then(|length| self.skip_bytes(length)),
            // A list or a set.
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { self.number()? } else { u64::from(head >> 4) };
                match head & 15 {
                    1 | 2 => self.met("a list of truth values"),
                    kind => (0..count).try_for_each(|_| self.skip(kind, below)),
                }
            }
            11 => self.met("a map"),
            // A struct: fields up to one of type 0.
            12 => loop {
                let head = self.byte()?;
                if head & 15 == 0 {
                    break Some(());
                }
                if head >> 4 == 0 {
                    self.number()?;
                }
                self.skip(head & 15, below)?;
            },
            _ => None,
        }
    }

    fn met(&mut self, what: &'static str) -> Option<()> {
        self.foreign = Some(what);
        None
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
