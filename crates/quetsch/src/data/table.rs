//! CSV, TSV and JSONL files as one table of strings, with the line each row starts at.

use std::path::{Path, PathBuf};

use csv::{ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// A file's rows.
pub(super) struct Table {
    pub(super) path: PathBuf,
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Row>,
}

/// A row; `cells` has one entry a column.
pub(super) struct Row {
    /// Where it starts in the file, counted from 1.
    pub(super) line: usize,
    cells: Vec<Cell>,
}

/// A value, or what stands in its place.
type Cell = std::result::Result<String, &'static str>;

impl Table {
    /// Reads a file of a kind that its extension tells; at least one row.
    pub(super) fn read(path: &Path) -> Result<Table> {
        let read = || utf8(path, std::fs::read(path).map_err(Error::io(path))?);
        let (columns, rows) = match extension(path).as_str() {
            "csv" => {
                let content = read()?;
                delimited(path, &content, sniff_delimiter(&content))?
            }
            "tsv" => delimited(path, &read()?, b'\t')?,
            "jsonl" | "ndjson" => json_lines(path, &read()?)?,
            other => {
                let found = if other.is_empty() { "none".into() } else { format!(".{other}") };
                let message =
                    format!("the extension tells the format: expected .csv, .tsv or .jsonl, found {found}");
                return Err(Error::file(path, message));
            }
        };
        if rows.is_empty() {
            let found = if columns.is_empty() { "the file is empty" } else { "a header and no rows" };
            return Err(Error::file(path, format!("{found}; expected at least one row")));
        }
        Ok(Table { path: path.to_path_buf(), columns, rows })
    }

    /// The column called `wanted`, or without it the first of the `usual` names that the file has.
    pub(super) fn column(&self, wanted: Option<&str>, usual: &[&str], what: &str) -> Result<usize> {
        let position = |name: &str| {
            let exact = self.columns.iter().position(|column| column == name);
            exact.or_else(|| self.columns.iter().position(|column| column.to_lowercase() == name.to_lowercase()))
        };
        let found = match wanted {
            Some(name) => position(name),
            None => usual.iter().find_map(|name| position(name)),
        };
        found.ok_or_else(|| {
            let there = self.columns.join("`, `");
            Error::file(
                &self.path,
                match wanted {
                    Some(name) => format!("no column `{name}` for the {what}; the file has `{there}`"),
                    None => format!(
                        "no column for the {what}: expected one of {}, the file has `{there}`; name it with --{what}-col",
                        usual.join(", ")
                    ),
                },
            )
        })
    }

    /// The values of one column.
    pub(super) fn texts(&self, column: usize) -> Result<Vec<String>> {
        let value = |row: &Row| {
            row.cells[column].clone().map_err(|found| {
                let name = &self.columns[column];
                let message = format!("line {}: `{name}` is {found}; expected a string or a number", row.line);
                Error::file(&self.path, message)
            })
        };
        self.rows.iter().map(value).collect()
    }
}

/// The extension in lower case, empty without one.
pub(super) fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

/// The bytes as text without a byte order mark, or where they stop being UTF-8.
pub(super) fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    let mut content = String::from_utf8(bytes).map_err(|e| {
        let (before, after) = e.as_bytes().split_at(e.utf8_error().valid_up_to());
        let line = 1 + before.iter().filter(|&&b| b == b'\n').count();
        let column = 1 + before.iter().rev().take_while(|&&b| b != b'\n').count();
        let found = after.first().copied().unwrap_or(0);
        let place = format!("line {line}, byte {column} of it (byte {} of the file)", before.len() + 1);
        Error::file(path, format!("{place}: 0x{found:02x} is not UTF-8; save the file as UTF-8"))
    })?;
    if content.starts_with('\u{feff}') {
        content.drain(..'\u{feff}'.len_utf8());
    }
    Ok(content)
}

/// Spreadsheets write `.csv` with `;` or tabs in some countries: the delimiter that cuts the header into most columns.
fn sniff_delimiter(content: &str) -> u8 {
    let columns =
        |delimiter: u8| reader(content, delimiter).records().next().map_or(0, |r| r.map_or(0, |r| r.len()));
    // `max_by_key` returns the last of equals: the comma.
    b"\t;,".iter().copied().max_by_key(|&d| columns(d)).unwrap_or(b',')
}

fn reader(content: &str, delimiter: u8) -> csv::Reader<&[u8]> {
    ReaderBuilder::new().delimiter(delimiter).has_headers(false).flexible(true).from_reader(content.as_bytes())
}

fn delimited(path: &Path, content: &str, delimiter: u8) -> Result<(Vec<String>, Vec<Row>)> {
    let mut reader = reader(content, delimiter);
    let mut record = StringRecord::new();
    let mut columns: Option<Vec<String>> = None;
    let mut rows = Vec::new();
    // The reader counts a record's line from the end of the last one, before blank lines; we count ourselves.
    let (mut line, mut counted, mut last) = (1, 0, 0);
    loop {
        let from = reader.position().byte() as usize;
        if !reader.read_record(&mut record).map_err(|e| Error::file(path, e.to_string()))? {
            break;
        }
        let blank = content[from..].len() - content[from..].trim_start_matches(['\r', '\n']).len();
        last = from + blank;
        line += newlines(&content[counted..last]);
        counted = last;
        let Some(columns) = &columns else {
            columns = Some(record.iter().map(|name| name.trim().to_string()).collect());
            continue;
        };
        if record.len() != columns.len() {
            unclosed_quote(path, &content[last..], delimiter, line)?;
            let message = format!(
                "line {line}: expected {} fields as in the header, found {}; a field that holds the delimiter `{}` \
                 must be in double quotes",
                columns.len(),
                record.len(),
                (delimiter as char).escape_default()
            );
            return Err(Error::file(path, message));
        }
        rows.push(Row { line, cells: record.iter().map(|cell| Ok(cell.to_string())).collect() });
    }
    let Some(columns) = columns else {
        return Ok((Vec::new(), rows));
    };
    unclosed_quote(path, &content[last..], delimiter, line)?;
    Ok((columns, rows))
}

/// A quote that is never closed swallows the rest of the file, and the csv crate does not mind. It is open when a line
/// put after the last record does not become a record of its own.
fn unclosed_quote(path: &Path, from_last_record: &str, delimiter: u8, line: usize) -> Result<()> {
    let probed = format!("{from_last_record}\nx");
    if reader(&probed, delimiter).records().count() < 2 {
        return Err(Error::file(path, format!("line {line}: a double quote opens a field and never closes")));
    }
    Ok(())
}

fn newlines(content: &str) -> usize {
    content.bytes().filter(|&b| b == b'\n').count()
}

/// The columns are the keys of the first object; others are not looked at.
fn json_lines(path: &Path, content: &str) -> Result<(Vec<String>, Vec<Row>)> {
    let (mut columns, mut rows) = (Vec::new(), Vec::new());
    for (line, json) in (1..).zip(content.lines()).filter(|(_, json)| !json.trim().is_empty()) {
        let mut object: Map<String, Value> = serde_json::from_str(json)
            .map_err(|e| Error::file(path, format!("line {line}: expected one JSON object a line: {e}")))?;
        if rows.is_empty() {
            columns = object.keys().cloned().collect();
        }
        let cells = columns.iter().map(|key| match object.remove(key) {
            Some(Value::String(text)) => Ok(text),
            Some(Value::Number(number)) => Ok(number.to_string()),
            Some(Value::Bool(truth)) => Ok(truth.to_string()),
            Some(Value::Null) => Err("null"),
            Some(Value::Array(_)) => Err("a list"),
            Some(Value::Object(_)) => Err("an object"),
            None => Err("missing"),
        });
        rows.push(Row { line, cells: cells.collect() });
    }
    Ok((columns, rows))
}
