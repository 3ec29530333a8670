//! Labelled texts from files: which columns hold what, which number each label gets, and a clear error with the line
//! for what cannot be used.
//!
//! **Columns.** The text is the first of `text`, `sentence`, `utterance`, `query`, `question` that the file has, the
//! label the first of `label`, `labels`, `category`, `intent`, `target`, `class`, `score`, `tags`, `ner_tags`; upper and lower case are the same. Names given
//! by the caller are used instead.
//!
//! **Label order**, the first that applies:
//! 1. names given by the caller, such as a model's `id2label`: other labels in the file are errors;
//! 2. the names that a Parquet file of Hugging Face's `datasets` has for its label numbers (`ClassLabel`), else
//!    `categories.json`, a JSON list of names, in the folder of the file: likewise;
//! 3. labels that are all integers number the classes themselves: `LABEL_0`, `LABEL_1`, ... up to the largest;
//! 4. first appearance in the file.
//!
//! With names (1 and 2), a column of integers none of which is itself a name is taken as indices into the names.
//! A test file has to be read with the names of its training file (1), or it may number its labels differently.
//!
//! **Task.** Without a word from the caller: lists of words (`tokens`, `words`) make it a task on words, whose labels are
//! lists of the same length; numbers with a point are regressed; lists, or a separator given, are several labels.
//!
//! White space around labels and column names is dropped; texts are kept as they are. An empty text is still a text
//! (the tokenizer makes `[CLS] [SEP]` of it) and becomes a counted warning.

mod examples;
#[cfg(feature = "parquet")]
mod parquet;
#[cfg(not(feature = "parquet"))]
#[path = "data/no_parquet.rs"]
mod parquet;
mod split;
mod table;
mod targets;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

pub use examples::Examples;
pub use split::{Overlap, overlap, split};
use table::{Blocks, Cell, Table};

use crate::task::{Level, Problem, Task, UNLABELLED};
use crate::{Error, Result};

/// Names of text columns, in order of preference.
pub const TEXT_COLUMNS: [&str; 5] = ["text", "sentence", "utterance", "query", "question"];
/// Names of columns with lists of words, in order of preference.
pub const TOKEN_COLUMNS: [&str; 2] = ["tokens", "words"];
/// Names of label columns, in order of preference.
pub const LABEL_COLUMNS: [&str; 9] =
    ["label", "labels", "category", "intent", "target", "class", "score", "tags", "ner_tags"];

/// Integer labels above this are taken for something else (an identifier, a year) rather than for classes.
const MAX_INTEGER_LABEL: u32 = 65_535;

/// Texts with what is true of them, or of each of their words: of each *unit*.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    /// What is asked.
    pub task: Task,
    /// One text a row; its words with blanks between them where they are the units.
    pub texts: Vec<String>,
    /// The words of each row, where they are the units; else empty.
    pub words: Vec<Vec<String>>,
    /// Single label: the class of each unit, an index into `names`, or [`UNLABELLED`]; else empty.
    pub labels: Vec<u32>,
    /// Other problems: `[units, names]`, 1 and 0 for labels that are right and wrong, or numbers; a row of NaN where
    /// nothing is known. Else empty.
    pub values: Vec<f32>,
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

    /// How many units each label has; of numbers all count.
    pub fn counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.names.len()];
        self.labels.iter().filter(|label| **label != UNLABELLED).for_each(|&label| counts[label as usize] += 1);
        for (i, value) in self.values.iter().enumerate() {
            let counts_in = if self.task.problem == Problem::MultiLabel { *value == 1.0 } else { !value.is_nan() };
            counts[i % self.names.len()] += usize::from(counts_in);
        }
        counts
    }

    /// Some of the rows, with the same names and without the warnings.
    pub fn subset(&self, rows: impl IntoIterator<Item = usize>) -> Dataset {
        let mut starts = vec![0];
        self.words.iter().for_each(|words| starts.push(starts[starts.len() - 1] + words.len()));
        let units = |row: usize| match self.task.level {
            Level::Sentence => row..row + 1,
            Level::Token => starts[row]..starts[row + 1],
        };
        let width = self.names.len();
        let mut some = Dataset { task: self.task, names: self.names.clone(), ..Dataset::default() };
        for row in rows {
            some.texts.push(self.texts[row].clone());
            some.words.extend(self.words.get(row).cloned());
            some.labels.extend_from_slice(self.labels.get(units(row)).unwrap_or(&[]));
            let values = units(row).start * width..units(row).end * width;
            some.values.extend_from_slice(self.values.get(values).unwrap_or(&[]));
        }
        some
    }

    /// Appends the rows of a set of the same task and names.
    pub fn extend(&mut self, other: &Dataset) {
        self.texts.extend_from_slice(&other.texts);
        self.words.extend_from_slice(&other.words);
        self.labels.extend_from_slice(&other.labels);
        self.values.extend_from_slice(&other.values);
    }

    /// What is true of each row, as something to compare: rows of the same text may differ in it.
    fn truths(&self) -> Vec<String> {
        let width = self.names.len();
        let mut unit = 0;
        let row = |row: usize| {
            let units = self.words.get(row).map_or(1, Vec::len);
            let truth = match self.values.get(unit * width..(unit + units) * width).filter(|v| !v.is_empty()) {
                Some(values) => format!("{values:?}"),
                None => format!(
                    "{:?}",
                    self.labels
                        .get(unit..unit + units)
                        .map(|labels| { labels.iter().map(|l| self.names.get(*l as usize)).collect::<Vec<_>>() })
                ),
            };
            unit += units;
            truth
        };
        (0..self.len()).map(row).collect()
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
    /// `--task`, or a model's; without it the labels tell.
    pub problem: Option<Problem>,
    /// A model's; without it the columns tell.
    pub level: Option<Level>,
    /// `--label-separator`.
    pub separator: Option<String>,
}

/// The files of a table: the one named, or for `train-*.parquet` all that the name fits, in their order.
///
/// # Errors
/// No file fits.
pub fn files(path: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let path = path.as_ref();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some((before, after)) = name.split_once('*').filter(|_| !path.exists()) else {
        return Ok(vec![path.to_path_buf()]);
    };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(before));
        if rest.is_some_and(|rest| rest.ends_with(after)) {
            found.push(entry.path());
        }
    }
    found.sort();
    match found.is_empty() {
        true => Err(Error::file(path, "no file fits this name; `*` stands for any characters of the last part")),
        false => Ok(found),
    }
}

/// Reads a labelled `.csv`, `.tsv`, `.jsonl` or `.parquet` file.
///
/// # Errors
/// The file cannot be read, or something in it is not what it must be: the error names the line.
pub fn read(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Dataset> {
    let path = path.as_ref();
    let table = Table::read(path)?;
    let level = options.level.unwrap_or_else(|| match (&options.text_col, table.first_of(&TOKEN_COLUMNS)) {
        (None, Some(_)) if table.first_of(&TEXT_COLUMNS).is_none() => Level::Token,
        _ => Level::Sentence,
    });
    let (column, words) = match level {
        Level::Sentence => (table.column(options.text_col.as_deref(), &TEXT_COLUMNS, "text")?, vec![]),
        Level::Token => {
            let column = table.column(options.text_col.as_deref(), &TOKEN_COLUMNS, "text")?;
            (column, table.words(column)?)
        }
    };
    let texts = match level {
        Level::Sentence => table.texts(column)?,
        Level::Token => words.iter().map(|words| words.join(" ")).collect(),
    };
    let lengths: Vec<usize> = words.iter().map(Vec::len).collect();
    let lengths = (level == Level::Token).then_some(&lengths[..]);
    let targets::Found { problem, labels, values, names } = targets::read(&table, lengths, column, options)?;
    let task = Task { problem, level };
    let mut dataset = Dataset { task, texts, words, labels, values, names, warnings: Vec::new() };
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

/// The columns of a table and its cells as they are written; a cell that is no text, or a list, is empty.
pub fn cells(path: impl AsRef<Path>) -> Result<(Vec<String>, Vec<Vec<String>>)> {
    let Table { columns, rows, .. } = Table::read(path.as_ref())?;
    let text = |cell: Cell| match cell {
        Cell::Text(text) => text,
        Cell::List(_) | Cell::Not(_) => String::new(),
    };
    Ok((columns, rows.into_iter().map(|row| row.cells.into_iter().map(text).collect()).collect()))
}

/// Sentences of words to predict: the lists of the words' column of a `.jsonl` or `.parquet` file, else lines or texts cut at white
/// space.
///
/// # Errors
/// As [`Texts::open`], or a list holds something else than words.
pub fn read_words(path: Option<&Path>, text_col: Option<&str>) -> Result<Vec<Vec<String>>> {
    let listed = path.filter(|p| matches!(table::extension(p).as_str(), "jsonl" | "ndjson" | "parquet"));
    if let Some(path) = listed {
        let table = Table::read(path)?;
        if text_col.is_some() || table.first_of(&TOKEN_COLUMNS).is_some() {
            let column = table.column(text_col, &TOKEN_COLUMNS, "text")?;
            return table.words(column);
        }
    }
    Ok(read_texts(path, text_col)?.iter().map(|text| split_words(text)).collect())
}

/// A text's words: what stands between white space.
pub fn split_words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_string).collect()
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
                let no_text = self.text_col.is_none() && table.first_of(&TEXT_COLUMNS).is_none();
                Ok(Some(match table.first_of(&TOKEN_COLUMNS).filter(|_| no_text) {
                    Some(words) => table.words(words)?.iter().map(|words| words.join(" ")).collect(),
                    None => table.texts(table.column(self.text_col.as_deref(), &TEXT_COLUMNS, "text")?)?,
                }))
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
