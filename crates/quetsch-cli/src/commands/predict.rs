//! `quetsch predict`: texts in, labels and scores out.

mod words;

use crate::args::Format;
use crate::exit::usage;
use crate::hub;
use crate::settings::ComputeIn;
use crate::ui::{self, Ui};
use anyhow::Result;
use clap::Args;
use quetsch::data::Texts;
use quetsch::metrics::top_k;
use quetsch::runtime::Classifier;
use quetsch::runtime::stream::stream;
use quetsch::task::{Level, Problem, THRESHOLD, Task, sigmoid};
use serde::Serialize;
use std::io::IsTerminal;
use std::path::PathBuf;

/// Flags of `predict`.
#[derive(Debug, Args)]
pub struct Predict {
    /// Model directory, or ORG/NAME on the hub
    #[arg(long, alias = "model-id", value_name = "DIR")]
    model: PathBuf,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long)]
    revision: Option<String>,
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
    /// What linears with float weights are multiplied in
    #[arg(long, value_enum, default_value_t)]
    compute: ComputeIn,
}

/// A label with its probability, or an output with its number.
#[derive(Serialize)]
pub struct Guess<'a> {
    /// The label.
    pub label: &'a str,
    /// Its softmax or sigmoid score; of a regression the number.
    pub score: f32,
}

/// The answer for one text.
#[derive(Serialize)]
pub struct Answer<'a> {
    /// The text.
    pub text: &'a str,
    /// The most likely labels in falling score; of a regression all outputs in their order.
    pub predictions: Vec<Guess<'a>>,
    /// Several labels: those that are given, whose score is at least 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<&'a str>>,
    /// Raw logits by label index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits: Option<&'a [f32]>,
}

/// The `k` most likely labels of one row of logits; all outputs of a regression.
pub fn guesses<'a>(problem: Problem, logits: &[f32], labels: &'a [String], k: usize) -> Vec<Guess<'a>> {
    let mut scores = logits.to_vec();
    problem.scores(&mut scores);
    let order = match problem {
        Problem::Regression => (0..labels.len()).collect(),
        _ => top_k(logits, k),
    };
    order.into_iter().map(|i| Guess { label: &labels[i], score: scores[i] }).collect()
}

/// Several labels: those that a row is given.
pub fn given<'a>(logits: &[f32], labels: &'a [String]) -> Vec<&'a str> {
    let given = logits.iter().zip(labels).filter(|(x, _)| sigmoid(**x) >= THRESHOLD);
    given.map(|(_, label)| label.as_str()).collect()
}

/// Runs `predict`.
pub fn run(p: &Predict, ui: &Ui) -> Result<()> {
    let model = hub::model(&p.model, p.revision.as_deref(), ui)?;
    let classifier = Classifier::load_for(&model, p.max_length, p.compute.into())?;
    let labels = classifier.labels();
    let Task { problem, level } = classifier.task();
    if let (Some(k), true) = (p.top_k, problem == Problem::Regression || level == Level::Token) {
        return Err(usage(format!(
            "--top-k {k}: this model's task is {}, its answers have no order",
            classifier.task()
        )));
    }
    let k = match p.top_k {
        None if problem == Problem::Regression => labels.len(),
        Some(k) if k == 0 || k > labels.len() => {
            return Err(usage(format!("--top-k {k}: this model has {} labels, give 1 to {0}", labels.len())));
        }
        Some(k) => k,
        None => 3.min(labels.len()),
    };
    if level == Level::Token {
        return words::run(p, &classifier, ui);
    }
    let show = |texts: &[String], logits: &[f32]| -> Result<String> {
        let mut shown = String::new();
        for (text, row) in texts.iter().zip(logits.chunks(labels.len())) {
            let answer = Answer {
                text,
                predictions: guesses(problem, row, labels, k),
                labels: (problem == Problem::MultiLabel).then(|| given(row, labels)),
                logits: p.logits.then_some(row),
            };
            shown += &match ui.format {
                Format::Human => human(&answer),
                Format::Jsonl => serde_json::to_string(&answer)? + "\n",
                Format::Json => {
                    let json = serde_json::to_string_pretty(&answer)?;
                    format!("  {},\n", json.replace('\n', "\n  "))
                }
                Format::Csv => {
                    let columns = answer.predictions.iter().flat_map(|g| [g.label.into(), g.score.to_string()]);
                    csv_line(std::iter::once(text.clone()).chain(columns))?
                }
            };
        }
        Ok(shown)
    };
    let columns = (1..=k).flat_map(|i| [format!("label_{i}"), format!("score_{i}")]);
    let columns = std::iter::once("text".to_string()).chain(columns).collect();
    let mut document = Document { format: ui.format, columns, begun: false, held: String::new() };
    if p.input.is_none() && !p.text.is_empty() {
        document.add(show(&p.text, &classifier.logits(&p.text, ui.threads(None))?)?)?;
        return document.end();
    }
    if p.input.is_none() && std::io::stdin().is_terminal() {
        return Err(usage("no text: give some as arguments, --input FILE, or pipe them in"));
    }
    let input = p.input.as_deref().map(|file| hub::table(file, "test", ui)).transpose()?;
    let texts = Texts::open(input.as_deref(), p.text_col.as_deref())?;
    let answer = |texts: Vec<String>, logits: Vec<f32>| show(&texts, &logits);
    stream(&classifier, texts, ui.threads(None), answer, |shown| document.add(shown?))?;
    document.end()
}

/// What stands around the answers: brackets and commas of a JSON list, the header of a CSV file.
struct Document {
    format: Format,
    /// CSV: the header.
    columns: Vec<String>,
    begun: bool,
    /// JSON: the comma and line break after the last answer, until another one comes.
    held: String,
}

impl Document {
    fn add(&mut self, mut answers: String) -> Result<()> {
        self.begin()?;
        if self.format == Format::Json && !answers.is_empty() {
            let tail = answers.split_off(answers.len() - ",\n".len());
            answers.insert_str(0, &std::mem::replace(&mut self.held, tail));
        }
        ui::out(&answers)
    }

    fn begin(&mut self) -> Result<()> {
        match (self.format, std::mem::replace(&mut self.begun, true)) {
            (Format::Json, false) => ui::out("[\n"),
            (Format::Csv, false) => ui::out(&csv_line(std::mem::take(&mut self.columns).into_iter())?),
            _ => Ok(()),
        }
    }

    fn end(mut self) -> Result<()> {
        self.begin()?;
        match self.format {
            Format::Json => ui::out("\n]\n"),
            _ => Ok(()),
        }
    }
}

fn csv_line(fields: impl Iterator<Item = String>) -> Result<String> {
    let mut line = csv::Writer::from_writer(vec![]);
    line.write_record(fields)?;
    Ok(String::from_utf8(line.into_inner()?)?)
}

/// A text and its labels for people.
pub fn human(answer: &Answer) -> String {
    let width = answer.predictions.iter().map(|g| g.label.chars().count()).max().unwrap_or(0);
    let mut text = format!("{}\n", answer.text);
    for (i, guess) in answer.predictions.iter().enumerate() {
        let given = answer.labels.as_ref().is_some_and(|given| given.contains(&guess.label));
        let mark = if given { "  *" } else { "" };
        text += &format!("  {}. {:width$}  {:.4}{mark}\n", i + 1, guess.label, guess.score);
    }
    text
}
