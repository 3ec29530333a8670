//! `quetsch predict`: texts in, labels and scores out.

use crate::args::Format;
use crate::exit::usage;
use crate::ui::{self, Ui};
use anyhow::Result;
use clap::Args;
use quetsch::data;
use quetsch::metrics::{softmax, top_k};
use quetsch::runtime::Classifier;
use serde::Serialize;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// Flags of `predict`.
#[derive(Debug, Args)]
pub struct Predict {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Texts; without any, and without --input, they are read from standard input
    text: Vec<String>,
    /// File of texts: .txt (one a line), .csv, .tsv, .jsonl, or - for standard input
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    input: Option<PathBuf>,
    /// Name of the text column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    text_col: Option<String>,
    /// Labels to print for each text, the most likely first [default: 3]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// With --format json or jsonl: add the raw logits of all labels
    #[arg(long)]
    logits: bool,
    /// Longest text in tokens; longer ones are cut [default: what the model says, else 256]
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<usize>,
}

/// A label with its probability.
#[derive(Serialize)]
pub struct Guess<'a> {
    /// The label.
    pub label: &'a str,
    /// Its softmax score.
    pub score: f32,
}

/// The answer for one text.
#[derive(Serialize)]
pub struct Answer<'a> {
    /// The text.
    pub text: &'a str,
    /// The most likely labels in falling score.
    pub predictions: Vec<Guess<'a>>,
    /// Raw logits by label index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits: Option<&'a [f32]>,
}

/// The `k` most likely labels of one row of logits.
pub fn guesses<'a>(logits: &[f32], labels: &'a [String], k: usize) -> Vec<Guess<'a>> {
    let mut scores = logits.to_vec();
    softmax(&mut scores);
    top_k(logits, k).into_iter().map(|i| Guess { label: &labels[i], score: scores[i] }).collect()
}

/// Texts are answered in parts of this many, so that results appear while the rest is computed.
const PART: usize = 512;

/// Runs `predict`.
pub fn run(p: &Predict, ui: &Ui) -> Result<()> {
    let classifier = Classifier::load(&p.model, p.max_length)?;
    let labels = classifier.labels();
    let k = match p.top_k {
        Some(k) if k == 0 || k > labels.len() => {
            return Err(usage(format!("--top-k {k}: this model has {} labels, give 1 to {0}", labels.len())));
        }
        Some(k) => k,
        None => 3.min(labels.len()),
    };
    let texts = match (&p.input, p.text.is_empty()) {
        (Some(path), _) => data::read_texts(Some(path), p.text_col.as_deref())?,
        (None, false) => p.text.clone(),
        (None, true) if std::io::stdin().is_terminal() => {
            return Err(usage("no text: give some as arguments, --input FILE, or pipe them in"));
        }
        (None, true) => data::read_texts(Some(Path::new("-")), p.text_col.as_deref())?,
    };
    let mut csv = csv::Writer::from_writer(vec![]);
    if ui.format == Format::Csv {
        let columns = (1..=k).flat_map(|i| [format!("label_{i}"), format!("score_{i}")]);
        csv.write_record(std::iter::once("text".to_string()).chain(columns))?;
    }
    let mut all = vec![];
    for part in texts.chunks(PART) {
        let logits = classifier.logits(part, ui.threads(None))?;
        let answers = part.iter().zip(logits.chunks(labels.len())).map(|(text, row)| Answer {
            text,
            predictions: guesses(row, labels, k),
            logits: p.logits.then_some(row),
        });
        match ui.format {
            Format::Human => ui::out(&answers.map(|a| human(&a)).collect::<String>())?,
            Format::Jsonl => {
                let mut lines = String::new();
                for answer in answers {
                    lines += &(serde_json::to_string(&answer)? + "\n");
                }
                ui::out(&lines)?;
            }
            Format::Json => {
                for answer in answers {
                    all.push(serde_json::to_value(&answer)?);
                }
            }
            Format::Csv => {
                for a in answers {
                    let columns = a.predictions.iter().flat_map(|g| [g.label.to_string(), g.score.to_string()]);
                    csv.write_record(std::iter::once(a.text.to_string()).chain(columns))?;
                }
                csv.flush()?;
                ui::out(&String::from_utf8_lossy(csv.get_ref()))?;
                csv = csv::Writer::from_writer(vec![]);
            }
        }
    }
    match ui.format {
        Format::Json => ui::out(&(serde_json::to_string_pretty(&all)? + "\n")),
        // With no text at all there is still the header.
        Format::Csv if texts.is_empty() => {
            csv.flush()?;
            ui::out(&String::from_utf8_lossy(csv.get_ref()))
        }
        _ => Ok(()),
    }
}

/// A text and its labels for people.
pub fn human(answer: &Answer) -> String {
    let width = answer.predictions.iter().map(|g| g.label.chars().count()).max().unwrap_or(0);
    let mut text = format!("{}\n", answer.text);
    for (i, guess) in answer.predictions.iter().enumerate() {
        text += &format!("  {}. {:width$}  {:.4}\n", i + 1, guess.label, guess.score);
    }
    text
}
