//! Answers for each word of a sentence.

use super::{Document, Predict, csv_line, given};
use crate::args::Format;
use crate::exit::usage;
use crate::ui::Ui;
use anyhow::Result;
use quetsch::data;
use quetsch::metrics::argmax;
use quetsch::runtime::Classifier;
use quetsch::task::Problem;
use serde::Serialize;
use serde_json::{Value, json};
use std::io::IsTerminal;

/// Sentences that are answered at a time.
const PART: usize = 256;

/// The answer for one sentence; lists have an entry a word, `null` where it is cut off or has no token.
#[derive(Serialize)]
struct Answer<'a> {
    tokens: &'a [String],
    /// One label, a list of labels, or numbers (one, or a list).
    labels: Vec<Value>,
    /// Probabilities: of the label, or of all labels in their order; none for numbers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    scores: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logits: Option<Vec<Option<Vec<f32>>>>,
}

/// Runs `predict` for a model that answers for words.
pub(super) fn run(p: &Predict, classifier: &Classifier, ui: &Ui) -> Result<()> {
    let sentences = match (&p.input, p.text.is_empty()) {
        (None, false) => p.text.iter().map(|text| data::split_words(text)).collect(),
        (None, true) if std::io::stdin().is_terminal() => {
            return Err(usage("no text: give some as arguments, --input FILE, or pipe them in"));
        }
        (input, _) => data::read_words(input.as_deref(), p.text_col.as_deref())?,
    };
    let columns = ["sentence", "token", "label", "score"].map(str::to_string).to_vec();
    let mut document = Document { format: ui.format, columns, begun: false, held: String::new() };
    for (i, part) in sentences.chunks(PART).enumerate() {
        let answers = classifier.words(part, ui.threads(None))?;
        let mut shown = String::new();
        for (j, (tokens, words)) in part.iter().zip(answers).enumerate() {
            shown += &show(p, classifier, ui.format, i * PART + j, tokens, words)?;
        }
        document.add(shown)?;
    }
    document.end()
}

fn show(
    p: &Predict,
    classifier: &Classifier,
    format: Format,
    number: usize,
    tokens: &[String],
    words: Vec<Option<Vec<f32>>>,
) -> Result<String> {
    let (problem, names) = (classifier.task().problem, classifier.labels());
    let label = |logits: &[f32]| match problem {
        Problem::SingleLabel => json!(names[argmax(logits)]),
        Problem::MultiLabel => json!(given(logits, names)),
        Problem::Regression if logits.len() == 1 => json!(logits[0]),
        Problem::Regression => json!(logits),
    };
    let score = |logits: &[f32]| {
        let mut scores = logits.to_vec();
        problem.scores(&mut scores);
        match problem {
            Problem::SingleLabel => json!(scores[argmax(logits)]),
            _ => json!(scores),
        }
    };
    let each = |f: &dyn Fn(&[f32]) -> Value| -> Vec<Value> {
        words.iter().map(|word| word.as_ref().map_or(Value::Null, |logits| f(logits))).collect()
    };
    let scores = if problem == Problem::Regression { vec![] } else { each(&score) };
    let answer = Answer { tokens, labels: each(&label), scores, logits: p.logits.then(|| words.clone()) };
    // JSON without the quotes of a string.
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
    let score_of = |i: usize| answer.scores.get(i).map(&plain).unwrap_or_default();
    Ok(match format {
        Format::Jsonl => serde_json::to_string(&answer)? + "\n",
        Format::Json => format!("  {},\n", serde_json::to_string_pretty(&answer)?.replace('\n', "\n  ")),
        Format::Csv => {
            let row = |i: usize| {
                let label = plain(&answer.labels[i]);
                csv_line([number.to_string(), tokens[i].clone(), label, score_of(i)].into_iter())
            };
            (0..tokens.len()).map(row).collect::<Result<String>>()?
        }
        Format::Human => {
            let width = tokens.iter().map(|t| t.chars().count()).max().unwrap_or(0);
            let line = |i: usize| {
                let text = format!("  {:width$}  {}  {}", tokens[i], plain(&answer.labels[i]), score_of(i));
                text.trim_end().to_string() + "\n"
            };
            format!("{}\n{}", tokens.join(" "), (0..tokens.len()).map(line).collect::<String>())
        }
    })
}
