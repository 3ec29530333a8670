//! Text, CSV, TSV, JSONL and Parquet files as tables of strings, with the line each row starts at (of Parquet its number):
//! whole, or block by block as they are read.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use csv::{ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use super::parquet::Rows;
use crate::{Error, Result};

/// How a file is cut into rows.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// One text a line, blank ones too.
    Lines,
    /// With this delimiter; without one the first block tells.
    Delimited(Option<u8>),
    JsonLines,
}

/// Bytes read at a time.
const BLOCK: usize = 1 << 16;

/// A file that is read block by block.
pub(super) struct Blocks {
    path: PathBuf,
    kind: Kind,
    source: Box<dyn Read + Send>,
    /// In place of the source: a Parquet file is no stream.
    parquet: Option<Rows>,
    /// What was read and is in no row yet.
    pending: Vec<u8>,
    /// Where `pending` starts in the file: line (from 1) and byte (from 0).
    line: usize,
    byte: usize,
    columns: Vec<String>,
    /// Something is wrong, and the rest of the file says what.
    to_the_end: bool,
    ended: bool,
}

impl Blocks {
    /// Opens a file of a kind that its extension tells.
    pub(super) fn open(path: &Path) -> Result<Blocks> {
        let kind = match extension(path).as_str() {
            "csv" => Kind::Delimited(None),
            "tsv" => Kind::Delimited(Some(b'\t')),
            "jsonl" | "ndjson" => Kind::JsonLines,
            "parquet" => {
                let (nothing, parquet) = (Box::new(std::io::empty()), Some(Rows::open(path)?));
                return Ok(Blocks { parquet, ..Blocks::new(path, Kind::JsonLines, nothing) });
            }
            other => {
                let found = if other.is_empty() { "none".into() } else { format!(".{other}") };
                let message = format!(
                    "the extension tells the format: expected .csv, .tsv, .jsonl or .parquet, found {found}"
                );
                return Err(Error::file(path, message));
            }
        };
        Ok(Blocks::new(path, kind, Box::new(File::open(path).map_err(Error::io(path))?)))
    }

    /// Lines of text; `path` is for messages.
    pub(super) fn lines(path: &Path, source: Box<dyn Read + Send>) -> Blocks {
        Blocks::new(path, Kind::Lines, source)
    }

    fn new(path: &Path, kind: Kind, source: Box<dyn Read + Send>) -> Blocks {
        let path = path.to_path_buf();
        let (pending, columns) = (Vec::new(), Vec::new());
        Blocks {
            path,
            kind,
            source,
            parquet: None,
            pending,
            line: 1,
            byte: 0,
            columns,
            to_the_end: false,
            ended: false,
        }
    }

    /// The next rows, at least one; what has not arrived yet (of a pipe) is not waited for. Nothing at the end.
    pub(super) fn next(&mut self) -> Result<Option<Table>> {
        if let Some(parquet) = &mut self.parquet {
            return parquet.next();
        }
        while !self.ended {
            self.ended = !self.fill()?;
            if self.to_the_end && !self.ended {
                continue;
            }
            let whole = match self.ended {
                true => self.pending.len(),
                false => self.pending.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1),
            };
            let mut pending = std::mem::take(&mut self.pending);
            let bom = if self.byte == 0 && whole > 0 && pending.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
            let content = utf8(&self.path, &pending[bom..whole], self.line, self.byte + bom)?;
            let (rows, used) = match self.kind {
                Kind::Lines => {
                    let row = |(line, text): (usize, &str)| Row { line, cells: vec![Cell::Text(text.to_string())] };
                    ((self.line..).zip(content.lines()).map(row).collect(), content.len())
                }
                Kind::Delimited(_) => self.delimited(content)?,
                Kind::JsonLines => (self.json_lines(content)?, content.len()),
            };
            self.line += newlines(&content[..used]);
            if whole > 0 {
                self.byte += bom + used;
                pending.drain(..bom + used);
            }
            self.pending = pending;
            if !rows.is_empty() {
                let (path, columns) = (self.path.clone(), self.columns.clone());
                return Ok(Some(Table { path, columns, rows, classes: HashMap::new() }));
            }
        }
        Ok(None)
    }

    /// Reads once; whether there was anything.
    fn fill(&mut self) -> Result<bool> {
        let old = self.pending.len();
        self.pending.resize(old + BLOCK.max(old), 0); // a row longer than a block is not looked at too often
        let read = loop {
            match self.source.read(&mut self.pending[old..]) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                result => break result.map_err(Error::io(&self.path))?,
            }
        };
        self.pending.truncate(old + read);
        Ok(read > 0)
    }
    /// Whether a row is a line of text, and there are no columns.
    pub(super) fn is_lines(&self) -> bool {
        self.kind == Kind::Lines
    }

    /// That there is no row, for a file that has to have one.
    pub(super) fn no_row(&self) -> Error {
        let message = match (self.kind, self.columns.is_empty()) {
            (Kind::Lines, _) => "no text in it; expected one text a line",
            (_, true) => "the file is empty; expected at least one row",
            (_, false) => "a header and no rows; expected at least one row",
        };
        Error::file(&self.path, message)
    }

    /// The records of a block, and how many bytes they are: before the end of the file the last one may go on in the
    /// next block.
    fn delimited(&mut self, content: &str) -> Result<(Vec<Row>, usize)> {
        let delimiter = match self.kind {
            Kind::Delimited(Some(delimiter)) => delimiter,
            _ if content.is_empty() => return Ok((Vec::new(), 0)),
            _ => sniff_delimiter(content),
        };
        self.kind = Kind::Delimited(Some(delimiter));
        let mut reader = reader(content, delimiter);
        let mut record = StringRecord::new();
        let mut rows = Vec::new();
        // The reader counts a record's line from the end of the last one, before blank lines; we count ourselves.
        let (mut line, mut counted, mut last, mut any) = (self.line, 0, 0, false);
        loop {
            let from = reader.position().byte() as usize;
            if !reader.read_record(&mut record).map_err(|e| Error::file(&self.path, e.to_string()))? {
                break;
            }
            let blank = content[from..].len() - content[from..].trim_start_matches(['\r', '\n']).len();
            last = from + blank;
            line += newlines(&content[counted..last]);
            (counted, any) = (last, true);
            if !self.ended && reader.position().byte() as usize >= content.len() {
                return Ok((rows, last));
            }
            if self.columns.is_empty() {
                self.columns = record.iter().map(|name| name.trim().to_string()).collect();
                continue;
            }
            if record.len() != self.columns.len() {
                if !self.ended {
                    self.to_the_end = true;
                    return Ok((rows, last));
                }
                unclosed_quote(&self.path, &content[last..], delimiter, line)?;
                let message = format!(
                    "line {line}: expected {} fields as in the header, found {}; a field that holds the delimiter \
                     `{}` must be in double quotes",
                    self.columns.len(),
                    record.len(),
                    (delimiter as char).escape_default()
                );
                return Err(Error::file(&self.path, message));
            }
            rows.push(Row { line, cells: record.iter().map(|cell| Cell::Text(cell.to_string())).collect() });
        }
        if self.ended && any {
            unclosed_quote(&self.path, &content[last..], delimiter, line)?;
        }
        Ok((rows, content.len()))
    }

    /// The columns are the keys of the first object; others are not looked at.
    fn json_lines(&mut self, content: &str) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (line, json) in (self.line..).zip(content.lines()).filter(|(_, json)| !json.trim().is_empty()) {
            let mut object: Map<String, Value> = serde_json::from_str(json).map_err(|e| {
                Error::file(&self.path, format!("line {line}: expected one JSON object a line: {e}"))
            })?;
            if self.columns.is_empty() {
                self.columns = object.keys().cloned().collect();
            }
            let cells = self.columns.iter().map(|key| match object.remove(key) {
                Some(Value::String(text)) => Cell::Text(text),
                Some(Value::Number(number)) => Cell::Text(number.to_string()),
                Some(Value::Bool(truth)) => Cell::Text(truth.to_string()),
                Some(Value::Array(list)) => Cell::List(list),
                Some(Value::Null) => Cell::Not("null"),
                Some(Value::Object(_)) => Cell::Not("an object"),
                None => Cell::Not("missing"),
            });
            rows.push(Row { line, cells: cells.collect() });
        }
        Ok(rows)
    }
}

/// Rows of a file.
pub(super) struct Table {
    pub(super) path: PathBuf,
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Row>,
    /// Names of the labels that a column has as numbers, where the file says them (Parquet).
    pub(super) classes: HashMap<String, Vec<String>>,
}

/// A row; `cells` has one entry a column.
pub(super) struct Row {
    /// Where it starts in the file, counted from 1.
    pub(super) line: usize,
    pub(super) cells: Vec<Cell>,
}

/// What stands in a row's column.
pub(super) enum Cell {
    /// A string, or a number or a truth value as it is written.
    Text(String),
    /// Of JSON.
    List(Vec<Value>),
    /// Something else.
    Not(&'static str),
}

impl Cell {
    /// In words.
    pub(super) fn what(&self) -> &'static str {
        match self {
            Cell::Text(_) => "a string or a number",
            Cell::List(_) => "a list",
            Cell::Not(found) => found,
        }
    }
}

impl Table {
    /// Reads a file of a kind that its extension tells; at least one row.
    pub(super) fn read(path: &Path) -> Result<Table> {
        let mut blocks = Blocks::open(path)?;
        let Some(mut all) = blocks.next()? else { return Err(blocks.no_row()) };
        while let Some(more) = blocks.next()? {
            all.rows.extend(more.rows);
        }
        Ok(all)
    }

    /// The column of a name; upper and lower case are the same if it is not there as written.
    fn position(&self, name: &str) -> Option<usize> {
        let exact = self.columns.iter().position(|column| column == name);
        exact.or_else(|| self.columns.iter().position(|column| column.to_lowercase() == name.to_lowercase()))
    }

    /// The first column of these names.
    pub(super) fn first_of(&self, names: &[&str]) -> Option<usize> {
        names.iter().find_map(|name| self.position(name))
    }

    /// The column called `wanted`, or without it the first of the `usual` names that the file has.
    pub(super) fn column(&self, wanted: Option<&str>, usual: &[&str], what: &str) -> Result<usize> {
        let position = |name: &str| self.position(name);
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
            match &row.cells[column] {
                Cell::Text(text) => Ok(text.clone()),
                other => {
                    // Lines of text have no name, and are text.
                    let (name, found) = (&self.columns[column], other.what());
                    let message = format!("line {}: `{name}` is {found}; expected a string or a number", row.line);
                    Err(Error::file(&self.path, message))
                }
            }
        };
        self.rows.iter().map(value).collect()
    }

    /// The lists of words of one column.
    pub(super) fn words(&self, column: usize) -> Result<Vec<Vec<String>>> {
        let value = |row: &Row| {
            let name = &self.columns[column];
            let bad = |found: &str| {
                let message = format!("line {}: `{name}` is {found}; expected a list of words", row.line);
                Err(Error::file(&self.path, message))
            };
            let Cell::List(list) = &row.cells[column] else { return bad(row.cells[column].what()) };
            let word = |word: &Value| match word {
                Value::String(word) => Some(word.clone()),
                Value::Number(number) => Some(number.to_string()),
                _ => None,
            };
            match list.iter().map(word).collect() {
                Some(words) => Ok(words),
                None => bad("a list with something else than strings"),
            }
        };
        self.rows.iter().map(value).collect()
    }
}

/// The extension in lower case, empty without one.
pub(super) fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

/// The bytes as text, or where they stop being UTF-8. They start at `line` (from 1) and `byte` (from 0) of the file.
fn utf8<'a>(path: &Path, bytes: &'a [u8], line: usize, byte: usize) -> Result<&'a str> {
    if byte == 0 && (bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff")) {
        return Err(Error::file(path, "the file is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)"));
    }
    std::str::from_utf8(bytes).map_err(|e| {
        let (before, after) = bytes.split_at(e.valid_up_to());
        let line = line + before.iter().filter(|&&b| b == b'\n').count();
        let column = 1 + before.iter().rev().take_while(|&&b| b != b'\n').count();
        let found = after.first().copied().unwrap_or(0);
        let place = format!("line {line}, byte {column} of it (byte {} of the file)", byte + before.len() + 1);
        Error::file(
            path,
            format!(
                "{place}: 0x{found:02x} is not UTF-8; older programs write Latin-1 or Windows-1252 \
                 (iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW), in China GB18030"
            ),
        )
    })
}

/// Spreadsheets write `.csv` with `;` or tabs in some countries, databases with `|`: the delimiter that cuts the header
/// into most columns.
fn sniff_delimiter(content: &str) -> u8 {
    let columns =
        |delimiter: u8| reader(content, delimiter).records().next().map_or(0, |r| r.map_or(0, |r| r.len()));
    // `max_by_key` returns the last of equals: the comma.
    b"|\t;,".iter().copied().max_by_key(|&d| columns(d)).unwrap_or(b',')
}

fn reader(content: &str, delimiter: u8) -> csv::Reader<&[u8]> {
    ReaderBuilder::new().delimiter(delimiter).has_headers(false).flexible(true).from_reader(content.as_bytes())
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
