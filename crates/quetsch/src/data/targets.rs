//! From what a file says about its texts or words to [`Dataset`]'s labels and values.

use super::table::{Cell, Table};
use super::{LABEL_COLUMNS, MAX_INTEGER_LABEL, ReadOptions, categories, nearest, shorten};
use crate::task::{Problem, UNLABELLED};
use crate::{Error, Result};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;

/// What separates labels in one field if nobody says.
const SEPARATOR: &str = "|";
/// What frameworks write where a word has no label.
const IGNORED: &str = "-100";

/// What is true, as [`super::Dataset`] has it.
pub(super) struct Found {
    pub problem: Problem,
    pub labels: Vec<u32>,
    pub values: Vec<f32>,
    pub names: Vec<String>,
}

/// What stands in the place of one unit's label.
enum Written {
    Nothing,
    One(String),
    Many(Vec<String>),
}

/// A unit's label with its line in the file.
struct Unit {
    line: usize,
    written: Written,
}

/// Reads the labels of a table; `words` has each row's number of words where they have the labels.
pub(super) fn read(table: &Table, words: Option<&[usize]>, text: usize, options: &ReadOptions) -> Result<Found> {
    let columns = columns(table, options)?;
    if let Some(&c) = columns.iter().find(|c| **c == text) {
        let name = &table.columns[c];
        return Err(Error::file(&table.path, format!("column `{name}` cannot be both the text and the label")));
    }
    let mut units = units(table, words, &columns)?;
    let classes = table.classes.get(&table.columns[columns[0]]);
    // A model whose labels have no names of their own counts them as the data do.
    let by_number = |names: &Vec<String>| names.iter().enumerate().all(|(i, name)| *name == format!("LABEL_{i}"));
    if let Some(classes) = classes.filter(|_| !options.names.as_ref().is_some_and(by_number)) {
        name_classes(table, &table.columns[columns[0]], &mut units, classes)?;
    }
    let known = match (&options.names, classes) {
        (Some(names), _) => Some((names.clone(), "the names given".to_string())),
        (None, Some(classes)) => Some((classes.clone(), "the names in the file".to_string())),
        (None, None) => categories(&table.path)?,
    };
    let several = columns.len() > 1;
    let problem = options.problem.unwrap_or_else(|| infer(&units, several, known.is_some(), options));
    let reader = Reader { table, units: &units, column: &table.columns[columns[0]] };
    match problem {
        Problem::SingleLabel => reader.single(known),
        Problem::MultiLabel => reader.multi(known, options.separator.as_deref().unwrap_or(SEPARATOR)),
        Problem::Regression => {
            let own = match (several, words) {
                (true, _) => Some(columns.iter().map(|c| table.columns[*c].clone()).collect()),
                (false, None) => Some(vec![table.columns[columns[0]].clone()]),
                (false, Some(_)) => None,
            };
            reader.regression(options.names.clone(), own)
        }
    }
}

/// The column with the labels, or several with a number each.
fn columns(table: &Table, options: &ReadOptions) -> Result<Vec<usize>> {
    let one = |name| table.column(Some(name), &[], "label");
    if let Some(wanted) = &options.label_col {
        // A column may have a comma in its name.
        if table.columns.contains(wanted) || !wanted.contains(',') {
            return Ok(vec![one(wanted)?]);
        }
        return wanted.split(',').map(|name| one(name.trim())).collect();
    }
    if let (Some(Problem::Regression), Some(names)) = (options.problem, &options.names)
        && let Ok(found) = names.iter().map(|name| one(name)).collect::<Result<Vec<_>>>()
    {
        return Ok(found);
    }
    Ok(vec![table.column(None, &LABEL_COLUMNS, "label")?])
}

fn units(table: &Table, words: Option<&[usize]>, columns: &[usize]) -> Result<Vec<Unit>> {
    let mut units = vec![];
    for (i, row) in table.rows.iter().enumerate() {
        let line = row.line;
        let bad = |found: String| Error::file(&table.path, format!("line {line}: {found}"));
        let name = &table.columns[columns[0]];
        if let &[first, _, ..] = columns {
            let mut many = vec![];
            for &c in columns {
                match &row.cells[c] {
                    Cell::Text(text) => many.push(text.trim().to_string()),
                    other => {
                        return Err(bad(format!("`{}` is {}; expected a number", table.columns[c], other.what())));
                    }
                }
            }
            if words.is_some() {
                return Err(bad(format!(
                    "words have their labels in one list; only `{}` can be it",
                    table.columns[first]
                )));
            }
            units.push(Unit { line, written: Written::Many(many) });
            continue;
        }
        match (&row.cells[columns[0]], words) {
            (Cell::List(list), Some(words)) => {
                if list.len() != words[i] {
                    return Err(bad(format!("{} tokens and {} labels (column `{name}`)", words[i], list.len())));
                }
                for label in list {
                    let written = of_word(label).map_err(|found| {
                        bad(format!("a label (column `{name}`) is {found}; expected a string, a number or a list"))
                    })?;
                    units.push(Unit { line, written });
                }
            }
            (other, Some(words)) => {
                let what = other.what();
                return Err(bad(format!(
                    "`{name}` is {what}; expected a list of {} labels, one a token",
                    words[i]
                )));
            }
            (Cell::List(list), None) => {
                let many: Option<Vec<String>> = list.iter().map(scalar).collect();
                match many {
                    Some(many) => units.push(Unit { line, written: Written::Many(many) }),
                    None => return Err(bad(format!("`{name}` holds something else than strings and numbers"))),
                }
            }
            (Cell::Text(text), None) => {
                units.push(Unit { line, written: Written::One(text.trim().to_string()) });
            }
            (Cell::Not(found), None) => {
                return Err(bad(format!("`{name}` is {found}; expected a string, a number or a list")));
            }
        }
    }
    Ok(units)
}

/// Puts names in place of the numbers of a `ClassLabel` column: another file or model may count them otherwise.
fn name_classes(table: &Table, column: &str, units: &mut [Unit], classes: &[String]) -> Result<()> {
    for unit in units {
        let line = unit.line;
        let name = |text: &mut String| {
            let class = text.parse::<usize>().ok().and_then(|i| classes.get(i));
            let unknown = || {
                let n = classes.len();
                let message =
                    format!("line {line}: the label {text} (column `{column}`) is none of the file's {n} classes");
                let hint = "; -1 means that the labels of this split are not published";
                Error::file(&table.path, if text == "-1" { message + hint } else { message })
            };
            *text = class.ok_or_else(unknown)?.clone();
            Ok(())
        };
        match &mut unit.written {
            Written::Nothing => {}
            Written::One(text) => name(text)?,
            Written::Many(many) => many.iter_mut().try_for_each(name)?,
        }
    }
    Ok(())
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.trim().to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}

fn of_word(value: &Value) -> std::result::Result<Written, &'static str> {
    match value {
        Value::Null => Ok(Written::Nothing),
        Value::Array(list) => {
            list.iter().map(scalar).collect::<Option<_>>().map(Written::Many).ok_or("a list of lists")
        }
        Value::Object(_) => Err("an object"),
        other => match scalar(other) {
            Some(text) if text == IGNORED => Ok(Written::Nothing),
            Some(text) => Ok(Written::One(text)),
            None => Err("nothing known"),
        },
    }
}

/// A number that is written with a point or an exponent, so that it is no class.
fn is_fraction(text: &str) -> bool {
    let starts = text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.'));
    starts && text.parse::<i64>().is_err() && text.parse::<f64>().is_ok_and(f64::is_finite)
}

fn is_number(text: &str) -> bool {
    text.parse::<i64>().is_ok() || is_fraction(text)
}

/// What labels look like: fractions are regressed, lists are several labels.
fn infer(units: &[Unit], several: bool, named: bool, options: &ReadOptions) -> Problem {
    let (mut all_numbers, mut fraction, mut list) = (true, false, false);
    for unit in units {
        let mut see = |text: &String| {
            all_numbers &= is_number(text);
            fraction |= is_fraction(text);
        };
        match &unit.written {
            Written::Nothing => {}
            Written::One(text) => see(text),
            Written::Many(many) => {
                list = true;
                many.iter().for_each(see);
            }
        }
    }
    match () {
        _ if options.separator.is_some() => Problem::MultiLabel,
        _ if several || all_numbers && fraction && !named => Problem::Regression,
        _ if list => Problem::MultiLabel,
        _ => Problem::SingleLabel,
    }
}

type Known = Option<(Vec<String>, String)>;

struct Reader<'a> {
    table: &'a Table,
    units: &'a [Unit],
    column: &'a str,
}

impl Reader<'_> {
    fn bad<T>(&self, line: usize, message: impl AsRef<str>) -> Result<T> {
        Err(Error::file(&self.table.path, format!("line {line}: {}", message.as_ref())))
    }

    fn single(&self, known: Known) -> Result<Found> {
        let (mut lines, mut written, mut at) = (vec![], vec![], vec![]);
        for (i, unit) in self.units.iter().enumerate() {
            match &unit.written {
                Written::Nothing => continue,
                Written::One(text) if text.is_empty() => {
                    return self.bad(unit.line, format!("the label (column `{}`) is empty", self.column));
                }
                Written::One(text) => written.push(text.as_str()),
                Written::Many(_) => {
                    return self.bad(
                        unit.line,
                        format!(
                            "`{}` is a list; expected one label (several need the task multi-label)",
                            self.column
                        ),
                    );
                }
            }
            lines.push(unit.line);
            at.push(i);
        }
        let (found, names) = number(&self.table.path, &lines, &written, known)?;
        let mut labels = vec![UNLABELLED; self.units.len()];
        at.into_iter().zip(found).for_each(|(i, label)| labels[i] = label);
        Ok(Found { problem: Problem::SingleLabel, labels, values: vec![], names })
    }

    fn multi(&self, known: Known, separator: &str) -> Result<Found> {
        let (mut lines, mut written, mut at) = (vec![], vec![], vec![]);
        for (i, unit) in self.units.iter().enumerate() {
            let labels: Vec<&str> = match &unit.written {
                Written::Nothing => continue,
                Written::One(text) => text.split(separator).map(str::trim).collect(),
                Written::Many(many) => many.iter().map(String::as_str).collect(),
            };
            for label in labels.into_iter().filter(|label| !label.is_empty()) {
                lines.push(unit.line);
                written.push(label);
                at.push(i);
            }
        }
        if written.is_empty() {
            let message =
                format!("no row has a label (column `{}`); expected some, separated by `{separator}`", self.column);
            return Err(Error::file(&self.table.path, message));
        }
        let (found, names) = number(&self.table.path, &lines, &written, known)?;
        let outputs = names.len();
        let mut values = vec![0.0; self.units.len() * outputs];
        for (unit, row) in self.units.iter().zip(values.chunks_exact_mut(outputs)) {
            if matches!(unit.written, Written::Nothing) {
                row.fill(f32::NAN);
            }
        }
        at.into_iter().zip(found).for_each(|(i, label)| values[i * outputs + label as usize] = 1.0);
        Ok(Found { problem: Problem::MultiLabel, labels: vec![], values, names })
    }

    /// `given` are the names of a model's outputs, `own` those that the columns have.
    fn regression(&self, given: Option<Vec<String>>, own: Option<Vec<String>>) -> Result<Found> {
        let width = |unit: &Unit| match &unit.written {
            Written::Nothing => None,
            Written::One(_) => Some(1),
            Written::Many(many) => Some(many.len()),
        };
        let first = self.units.iter().find_map(width).unwrap_or(0);
        let numbered = || (0..first).map(|i| format!("LABEL_{i}")).collect::<Vec<_>>();
        if let (Some(given), Some(own @ [_, _, ..])) = (&given, own.as_deref())
            && *given != numbered()
            && given != own
        {
            let (found, expected) = (own.join(", "), given.join(", "));
            return Err(Error::file(
                &self.table.path,
                format!("numbers of the columns {found}, expected those of {expected}, in this order"),
            ));
        }
        let names = given.or(own.filter(|own| own.len() == first)).unwrap_or_else(numbered);
        if names.is_empty() {
            return Err(Error::file(&self.table.path, format!("no number in it (column `{}`)", self.column)));
        }
        let mut values = Vec::with_capacity(self.units.len() * names.len());
        for unit in self.units {
            let many = match &unit.written {
                Written::Nothing => {
                    values.resize(values.len() + names.len(), f32::NAN);
                    continue;
                }
                Written::One(text) => std::slice::from_ref(text),
                Written::Many(many) => many,
            };
            if many.len() != names.len() {
                let (found, expected) = (many.len(), names.len());
                return self
                    .bad(unit.line, format!("{found} numbers (column `{}`), expected {expected}", self.column));
            }
            for text in many {
                match text.parse::<f32>().ok().filter(|v| v.is_finite()) {
                    Some(value) => values.push(value),
                    None => {
                        let found = shorten(text);
                        return self
                            .bad(unit.line, format!("`{found}` (column `{}`) is no finite number", self.column));
                    }
                }
            }
        }
        Ok(Found { problem: Problem::Regression, labels: vec![], values, names })
    }
}

/// Label numbers and names.
fn number(path: &Path, lines: &[usize], written: &[&str], known: Known) -> Result<(Vec<u32>, Vec<String>)> {
    match known {
        Some((names, source)) => Ok((by_name(path, lines, written, &names, &source)?, names)),
        None => numbered(path, lines, written),
    }
}

/// Label numbers when the names are fixed.
fn by_name(path: &Path, lines: &[usize], written: &[&str], names: &[String], source: &str) -> Result<Vec<u32>> {
    let number: HashMap<&str, u32> = names.iter().map(String::as_str).zip(0..).collect();
    let integers = integers(written).filter(|_| !written.iter().any(|label| number.contains_key(label)));
    let found: Vec<Option<u32>> = match integers {
        Some(integers) => integers.into_iter().map(|i| Some(i).filter(|&i| (i as usize) < names.len())).collect(),
        None => written.iter().map(|label| number.get(label).copied()).collect(),
    };
    if let Some(row) = found.iter().position(Option::is_none) {
        let rows = |i: &usize| found[*i].is_none();
        let others = (0..found.len()).filter(rows).map(|i| lines[i]).collect::<HashSet<_>>().len() - 1;
        let also = if others > 0 { format!("; {others} more such rows") } else { String::new() };
        let message = format!(
            "line {}: unknown label `{}`; nearest of the {} known: {} (from {source}){also}",
            lines[row],
            shorten(written[row]),
            names.len(),
            nearest(written[row], names),
        );
        return Err(Error::file(path, message));
    }
    Ok(found.into_iter().flatten().collect())
}

/// Label numbers and names when the file alone decides.
fn numbered(path: &Path, lines: &[usize], written: &[&str]) -> Result<(Vec<u32>, Vec<String>)> {
    if let Some(integers) = integers(written) {
        let largest = integers.iter().copied().max().unwrap_or(0);
        if largest > MAX_INTEGER_LABEL {
            let row = integers.iter().position(|&i| i == largest).unwrap_or(0);
            let message = format!(
                "line {}: integer labels number the classes from 0, and {largest} is above {MAX_INTEGER_LABEL}; \
                 choose the label column with --label-col or give the label names",
                lines[row]
            );
            return Err(Error::file(path, message));
        }
        let own: BTreeSet<u32> = integers.iter().copied().collect();
        // Without a 0 they are not counted from it: stars, grades and years are names, in their order.
        if !own.contains(&0) {
            let number: HashMap<u32, u32> = own.iter().copied().zip(0..).collect();
            let labels = integers.iter().map(|i| number[i]).collect();
            return Ok((labels, own.iter().map(u32::to_string).collect()));
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
