//! Labelled texts from files: which columns hold what, which number each label gets, and a clear error with the line
//! for what cannot be used.
//!
//! **Columns.** The text is the first of `text`, `sentence`, `utterance`, `query`, `question` that the file has, the
//! label the first of `label`, `category`, `intent`, `target`, `class`; upper and lower case are the same. Names given
//! by the caller are used instead.
//!
//! **Label order**, the first that applies:
//! 1. names given by the caller, such as a model's `id2label`: other labels in the file are errors;
//! 2. `categories.json`, a JSON list of names, in the folder of the file: likewise;
//! 3. labels that are all integers number the classes themselves: `LABEL_0`, `LABEL_1`, ... up to the largest;
//! 4. first appearance in the file.
//!
//! With names (1 and 2), a column of integers none of which is itself a name is taken as indices into the names.
//! A test file has to be read with the names of its training file (1), or it may number its labels differently.
//!
//! White space around labels and column names is dropped; texts are kept as they are. An empty text is still a text
//! (the tokenizer makes `[CLS] [SEP]` of it) and becomes a counted warning.

mod split;
mod table;

use std::collections::{HashMap, HashSet};
use std::path::Path;

pub use split::{Overlap, overlap, split};
use table::{Blocks, Table};

use crate::{Error, Result};

/// Names of text columns, in order of preference.
pub const TEXT_COLUMNS: [&str; 5] = ["text", "sentence", "utterance", "query", "question"];
/// Names of label columns, in order of preference.
pub const LABEL_COLUMNS: [&str; 5] = ["label", "category", "intent", "target", "class"];

/// Integer labels above this are taken for something else (an identifier, a year) rather than for classes.
const MAX_INTEGER_LABEL: u32 = 65_535;

/// Texts with their labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    /// One text a row.
    pub texts: Vec<String>,
    /// The label of each row, an index into `names`.
    pub labels: Vec<u32>,
    /// The names of the labels, in the order of the model's outputs.
    pub names: Vec<String>,
    /// What a user should know about this file, counted; never the texts themselves.
    pub warnings: Vec<String>,
}

impl Dataset {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// How many rows each label has.
    pub fn counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.names.len()];
        self.labels.iter().for_each(|&label| counts[label as usize] += 1);
        counts
    }

    /// Some of the rows, with the same names and without the warnings.
    pub fn subset(&self, rows: impl IntoIterator<Item = usize>) -> Dataset {
        let (texts, labels) = rows.into_iter().map(|i| (self.texts[i].clone(), self.labels[i])).unzip();
        Dataset { texts, labels, names: self.names.clone(), warnings: Vec::new() }
    }
}

/// What the caller knows better than the sniffer.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// `--text-col`.
    pub text_col: Option<String>,
    /// `--label-col`.
    pub label_col: Option<String>,
    /// The names of the labels in their order, such as a model's `id2label`.
    pub names: Option<Vec<String>>,
}

/// Reads a labelled `.csv`, `.tsv` or `.jsonl` file.
pub fn read(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Dataset> {
    let path = path.as_ref();
    let table = Table::read(path)?;
    let text = table.column(options.text_col.as_deref(), &TEXT_COLUMNS, "text")?;
    let label = table.column(options.label_col.as_deref(), &LABEL_COLUMNS, "label")?;
    if text == label {
        let name = &table.columns[text];
        return Err(Error::file(path, format!("column `{name}` cannot be both the text and the label")));
    }
    let texts = table.texts(text)?;
    let written = table.texts(label)?;
    let written: Vec<&str> = written.iter().map(|label| label.trim()).collect();
    if let Some(row) = written.iter().position(|label| label.is_empty()) {
        let (line, name) = (table.rows[row].line, &table.columns[label]);
        return Err(Error::file(path, format!("line {line}: the label (column `{name}`) is empty")));
    }

    let known = match &options.names {
        Some(names) => Some((names.clone(), "the names given".to_string())),
        None => categories(path)?,
    };
    let (labels, names) = match known {
        Some((names, source)) => (by_name(&table, &written, &names, &source)?, names),
        None => numbered(&table, &written)?,
    };

    let mut dataset = Dataset { texts, labels, names, warnings: Vec::new() };
    let is_empty = |text: &String| text.trim().is_empty();
    if let Some(first) = dataset.texts.iter().position(is_empty) {
        let (empty, line) = (dataset.texts.iter().filter(|text| is_empty(text)).count(), table.rows[first].line);
        let texts = if empty == 1 { "text is" } else { "texts are" };
        dataset.warnings.push(format!("{empty} {texts} empty (the first at line {line})"));
    }
    let counts = dataset.counts();
    let unused: Vec<&String> =
        dataset.names.iter().zip(counts).filter(|(_, n)| *n == 0).map(|(name, _)| name).collect();
    if let Some(first) = unused.first() {
        let (unused, all) = (unused.len(), dataset.names.len());
        let warning = format!("{unused} of {all} labels have no row (the first is `{first}`)");
        dataset.warnings.push(warning);
    }
    Ok(dataset)
}

/// Texts to predict, all of them at once; see [`Texts::open`].
pub fn read_texts(path: Option<&Path>, text_col: Option<&str>) -> Result<Vec<String>> {
    let mut texts = Texts::open(path, text_col)?;
    let mut all = Vec::new();
    while let Some(part) = texts.part(usize::MAX)? {
        all.extend(part);
    }
    Ok(all)
}

/// Texts that are read as they are asked for.
pub struct Texts {
    /// Nothing for texts that are in memory.
    blocks: Option<Blocks>,
    text_col: Option<String>,
    ready: std::vec::IntoIter<String>,
}

impl Texts {
    /// The lines of a `.txt` file or of standard input (`None` or `-`), or the text column of a `.csv`, `.tsv` or
    /// `.jsonl` file. Blank lines are kept, so that the n-th answer belongs to the n-th line.
    ///
    /// # Errors
    /// The file cannot be read, has no text, or begins with something else than texts.
    pub fn open(path: Option<&Path>, text_col: Option<&str>) -> Result<Texts> {
        let blocks = match path.filter(|path| *path != Path::new("-")) {
            None => Blocks::lines(Path::new("standard input"), Box::new(std::io::stdin())),
            Some(path) if table::extension(path) == "txt" => {
                Blocks::lines(path, Box::new(std::fs::File::open(path).map_err(Error::io(path))?))
            }
            Some(path) => Blocks::open(path)?,
        };
        let text_col = text_col.map(str::to_string);
        let mut texts = Texts { blocks: Some(blocks), text_col, ready: Vec::new().into_iter() };
        match texts.block()? {
            true => Ok(texts),
            false => Err(texts.blocks.map_or_else(|| Error::invalid("no text"), |blocks| blocks.no_row())),
        }
    }

    /// The next texts, at most `most`, as many as are there without waiting; nothing at the end, or after an error.
    ///
    /// # Errors
    /// What comes next cannot be read.
    pub fn part(&mut self, most: usize) -> Result<Option<Vec<String>>> {
        if self.ready.len() == 0 && !self.block()? {
            return Ok(None);
        }
        Ok(Some(self.ready.by_ref().take(most).collect()))
    }

    /// Reads the next block; whether there was one.
    fn block(&mut self) -> Result<bool> {
        let Some(blocks) = &mut self.blocks else { return Ok(false) };
        let read = blocks.next().and_then(|table| match table {
            None => Ok(None),
            Some(table) if blocks.is_lines() => Ok(Some(table.texts(0)?)),
            Some(table) => {
                Ok(Some(table.texts(table.column(self.text_col.as_deref(), &TEXT_COLUMNS, "text")?)?))
            }
        });
        if read.is_err() {
            self.blocks = None;
        }
        let texts = read?;
        let found = texts.is_some();
        self.ready = texts.unwrap_or_default().into_iter();
        Ok(found)
    }
}

impl From<Vec<String>> for Texts {
    fn from(texts: Vec<String>) -> Texts {
        Texts { blocks: None, text_col: None, ready: texts.into_iter() }
    }
}

/// The names in `categories.json` beside `path`, and where they come from, in words.
fn categories(path: &Path) -> Result<Option<(Vec<String>, String)>> {
    let beside = path.with_file_name("categories.json");
    let bytes = match std::fs::read(&beside) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(&beside)(e)),
    };
    let names: Vec<String> = serde_json::from_slice(&bytes)
        .map_err(|e| Error::file(&beside, format!("expected a JSON list of label names: {e}")))?;
    let mut seen = HashSet::new();
    if let Some(twice) = names.iter().find(|name| !seen.insert(name.as_str())) {
        return Err(Error::file(&beside, format!("the label `{twice}` is listed twice")));
    }
    Ok(Some((names, beside.display().to_string())))
}

/// Label numbers when the names are fixed.
fn by_name(table: &Table, written: &[&str], names: &[String], source: &str) -> Result<Vec<u32>> {
    let number: HashMap<&str, u32> = names.iter().map(String::as_str).zip(0..).collect();
    let integers = integers(written).filter(|_| !written.iter().any(|label| number.contains_key(label)));
    let found: Vec<Option<u32>> = match integers {
        Some(integers) => integers.into_iter().map(|i| Some(i).filter(|&i| (i as usize) < names.len())).collect(),
        None => written.iter().map(|label| number.get(label).copied()).collect(),
    };
    if let Some(row) = found.iter().position(Option::is_none) {
        let others = found.iter().filter(|label| label.is_none()).count() - 1;
        let also = if others > 0 { format!("; {others} more such rows") } else { String::new() };
        let message = format!(
            "line {}: unknown label `{}`; nearest of the {} known: {} (from {source}){also}",
            table.rows[row].line,
            shorten(written[row]),
            names.len(),
            nearest(written[row], names),
        );
        return Err(Error::file(&table.path, message));
    }
    Ok(found.into_iter().flatten().collect())
}

/// Label numbers and names when the file alone decides.
fn numbered(table: &Table, written: &[&str]) -> Result<(Vec<u32>, Vec<String>)> {
    if let Some(integers) = integers(written) {
        let largest = integers.iter().copied().max().unwrap_or(0);
        if largest > MAX_INTEGER_LABEL {
            let row = integers.iter().position(|&i| i == largest).unwrap_or(0);
            let message = format!(
                "line {}: integer labels number the classes from 0, and {largest} is above {MAX_INTEGER_LABEL}; \
                 choose the label column with --label-col or give the label names",
                table.rows[row].line
            );
            return Err(Error::file(&table.path, message));
        }
        return Ok((integers, (0..=largest).map(|i| format!("LABEL_{i}")).collect()));
    }
    let (mut number, mut names) = (HashMap::new(), Vec::new());
    let labels = written.iter().map(|&label| {
        *number.entry(label).or_insert_with(|| {
            names.push(label.to_string());
            (names.len() - 1) as u32
        })
    });
    Ok((labels.collect(), names))
}

fn integers(written: &[&str]) -> Option<Vec<u32>> {
    written.iter().map(|label| label.parse().ok()).collect()
}

/// The known names nearest to `label`, for a message.
fn nearest(label: &str, names: &[String]) -> String {
    let wanted: Vec<char> = label.to_lowercase().chars().take(200).collect();
    let mut names: Vec<(usize, &String)> = names.iter().map(|name| (edits(&wanted, name), name)).collect();
    names.sort_by_key(|(edits, _)| *edits);
    names.iter().take(3).map(|(_, name)| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Levenshtein's distance, upper and lower case the same.
fn edits(a: &[char], b: &str) -> usize {
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (i, y) in b.to_lowercase().chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &x) in a.iter().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[a.len()]
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}

#[cfg(test)]
mod tests;
