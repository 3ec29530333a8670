//! Parquet files as tables of strings, by the crate `parquet` and its record interface (no Arrow): rows in their order,
//! over several files too, with the names of the labels that Hugging Face's `datasets` writes into the file.

use super::table::{Cell, Row, Table};
use crate::{Error, Result};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Rows read at a time.
const BLOCK_ROWS: usize = 1024;

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
        let reader = guarded(&path, || SerializedFileReader::new(file))?;
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
