//! Places in a recipe: from a path of keys to line and column.

use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A step on the way to a value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// A key of a table.
    Key(String),
    /// An element of an array.
    Index(usize),
}

/// Steps through tables only.
pub fn path(steps: &[&str]) -> Vec<Step> {
    steps.iter().map(|s| Step::Key(s.to_string())).collect()
}

/// Where the value at `steps` stands: the span of its key, or of the whole for an element of an array.
pub fn locate(table: &DeTable, steps: &[Step]) -> Option<Range<usize>> {
    let [Step::Key(first), rest @ ..] = steps else { return None };
    let (key, mut value): (_, &Spanned<DeValue>) = table.iter().find(|(k, _)| k.get_ref() == first)?;
    let mut span = key.span();
    for step in rest {
        match (step, value.get_ref()) {
            (Step::Key(name), DeValue::Table(t)) => {
                let Some((key, next)) = t.iter().find(|(k, _)| k.get_ref() == name) else { return Some(span) };
                (span, value) = (key.span(), next);
            }
            (Step::Index(i), DeValue::Array(a)) => {
                let Some(next) = a.get(*i) else { return Some(span) };
                (span, value) = (next.span(), next);
            }
            _ => return Some(span),
        }
    }
    Some(span)
}

/// `:line:column`, both from 1, the column in characters.
pub fn line_and_column(text: &str, span: &Range<usize>) -> String {
    let before = &text[..text.floor_char_boundary(span.start)];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!(":{line}:{column}")
}
