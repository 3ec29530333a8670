//! `quetsch init`: a commented recipe for a data file and a model.

use crate::exit::usage;
use crate::hub;
use crate::settings::Data;
use crate::ui::{Ui, percent};
use crate::work::corpus::{self, Wanted};
use anyhow::Result;
use clap::Args;
use quetsch::atomic::write_file;
use quetsch::batch::Encoding;
use quetsch::data::{self, Dataset};
use quetsch::dir;
use quetsch::task::{Problem, Task};
use quetsch::tokenizer::Tokenizer;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Flags of `init`.
#[derive(Debug, Args)]
pub struct Init {
    /// Labelled training data: .csv, .tsv, .jsonl or .parquet, or hf:ORG/NAME:SPLIT
    #[arg(value_name = "DATA")]
    train: String,
    /// Pretrained model: a directory, or ORG/NAME[@REVISION] on the hub
    #[arg(long, alias = "model-id", value_name = "DIR")]
    model: String,
    /// Test data
    #[arg(long, value_name = "FILE")]
    test: Option<String>,
    /// Name of the text column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    text_col: Option<String>,
    /// Name of the label column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    label_col: Option<String>,
    /// Recipe to write
    #[arg(long, value_name = "FILE", default_value = "quetsch.toml")]
    out: PathBuf,
    /// Replace what is there
    #[arg(long)]
    force: bool,
}

/// Steps of the teacher's training that gave what it can on the sets tried (`docs/tutorial.md`), in batches of this many.
const STEPS: usize = 850;
const BATCH: usize = 64;
/// What the recipe says: its seed, and the share of the data that is not trained on.
const SEED: u64 = 42;
const SET_ASIDE: f64 = 0.1;
/// Epochs of a teacher: few are enough where there is much data, and many never take long where there is little.
const EPOCHS: std::ops::RangeInclusive<usize> = 3..=40;
/// A share of unknown tokens that is worth a warning.
const MANY_UNKNOWN: f64 = 0.05;

/// Runs `init`.
pub fn run(i: &Init, ui: &Ui) -> Result<()> {
    if i.out.exists() && !i.force {
        anyhow::bail!("{} exists; pass --force to replace it", i.out.display());
    }
    let mut named = Data { text_col: i.text_col.clone(), label_col: i.label_col.clone(), ..Data::default() };
    let train = hub::table(i.train.as_ref(), "train", ui)?;
    let model = hub::model(i.model.as_ref(), None, ui)?;
    let read = corpus::read(&train, &named, Wanted::default());
    let (names, rows) = data::cells(&train)?;
    let set = match (read, columns(&names, &rows)) {
        (Err(_), Some((text, label))) if named.text_col.is_none() && named.label_col.is_none() => {
            ui.note(format!("{}: `{text}` looks like the text and `{label}` like the label", i.train));
            if is_headerless(&names, &rows, &text, &label) {
                ui.warn(format!(
                    "{}: its first line looks like data; the names of the columns belong there, such as text,label",
                    i.train
                ));
            }
            (named.text_col, named.label_col) = (Some(text), Some(label));
            corpus::read(&train, &named, Wanted::default())?
        }
        (read, _) => read?,
    };
    if let Some(why) = obstacle(&set, i.test.is_some()) {
        return Err(usage(format!("{}: {why}", i.train)));
    }
    for warning in &set.warnings {
        ui.warn(format!("{}: {warning}", i.train));
    }
    let checkpoint = dir::read_checkpoint(&model)?;
    let tokenizer = Tokenizer::new(&dir::read_tokenizer(&model)?)?;
    let longest = checkpoint.spec.longest();
    let encoded = tokenizer.encode_all(&set.texts, longest, ui.threads(None))?;
    let mut lengths: Vec<usize> = encoded.iter().map(|e| e.ids.len()).collect();
    lengths.sort_unstable();
    let unknown = unknown_share(&tokenizer, &encoded);
    if unknown > MANY_UNKNOWN {
        ui.warn(format!(
            "{}: {} of the tokens are unknown to this encoder; one that was pretrained on this language will do better",
            i.train,
            percent(unknown)
        ));
    }
    let at = |q: f64| lengths[((q * lengths.len() as f64) as usize).min(lengths.len() - 1)];
    // Room for all but one text in a hundred, in steps that people write.
    let max_length = [32, 64, 128, 256, 512].into_iter().find(|n| *n >= at(0.99)).unwrap_or(512).min(longest);
    let layers = checkpoint.spec.layers.len();
    let kept: Vec<usize> = (0..layers).skip(1 % layers.max(1)).step_by(2).collect();
    let dropped: Vec<usize> = (0..layers).filter(|l| !kept.contains(l)).collect();
    let steps = (((1.0 - SET_ASIDE) * set.len() as f64) as usize).div_ceil(BATCH).max(1);
    let epochs = STEPS.div_ceil(steps).clamp(*EPOCHS.start(), *EPOCHS.end());
    let more = epochs.div_ceil(2).max(*EPOCHS.start());
    let counts = set.counts();
    let (fewest, most) = (counts.iter().min().unwrap_or(&0), counts.iter().max().unwrap_or(&0));
    let text = |s: &str| toml::Value::String(s.into()).to_string();
    let line = |key: &str, value: &Option<String>, hint: &str| match value {
        Some(v) => format!("{key} = {}", text(v)),
        None => format!("# {key} = {hint}"),
    };
    let recipe = format!(
        include_str!("init.toml.in"),
        train_file = i.train,
        rows = set.len(),
        labels = set.names.len(),
        fewest = fewest,
        most = most,
        p50 = at(0.5),
        p99 = at(0.99),
        max = lengths[lengths.len() - 1],
        model = text(&i.model),
        train = text(&i.train),
        test = line("test", &i.test, "\"test.csv\""),
        text_col = line("text-col", &named.text_col, "\"text\""),
        label_col = line("label-col", &named.label_col, "\"label\""),
        max_length = max_length,
        all_layers = layers,
        layers = format!("{kept:?}"),
        dropped = format!("{dropped:?}"),
        unknown = percent(unknown),
        steps = steps,
        wanted = STEPS,
        epochs = epochs,
        more = more,
        all = epochs + 2 * more,
        seed = SEED,
        validation = SET_ASIDE,
    );
    write_file(&i.out, recipe.as_bytes())?;
    let out = i.out.display();
    ui.result(
        format!(
            "{out}: a recipe for {} sentences and {} labels. Run it: quetsch run {out}",
            set.len(),
            set.names.len()
        ),
        &json!({ "recipe": i.out, "sentences": set.len(), "labels": set.names.len(), "max_length": max_length }),
    )
}

/// The share of tokens that stand for "not in the vocabulary".
fn unknown_share(tokenizer: &Tokenizer, encoded: &[Encoding]) -> f64 {
    let unknown = |id: &u32| tokenizer.token(*id).is_some_and(|t| t == "[UNK]" || t == "<unk>");
    let ids: BTreeSet<u32> = encoded.iter().flat_map(|e| e.ids.iter().copied()).filter(unknown).collect();
    let (mut all, mut bad) = (0usize, 0usize);
    for e in encoded {
        all += e.ids.len();
        bad += e.ids.iter().filter(|id| ids.contains(id)).count();
    }
    bad as f64 / all.max(1) as f64
}

/// The text's and the label's column of a table: by their usual names, else the label has the fewest values, each more
/// than once on the whole, and the text is the longest of the others that people may have written.
fn columns(names: &[String], rows: &[Vec<String>]) -> Option<(String, String)> {
    let usual = |usual: &[&str]| usual.iter().find_map(|u| names.iter().position(|n| n.to_lowercase() == *u));
    let values = |c: usize| rows.iter().filter_map(move |r| r.get(c));
    let distinct = |c: usize| values(c).collect::<BTreeSet<_>>().len();
    let written = |c: usize| 2 * values(c).filter(|v| is_language(v)).count() > rows.len();
    let text = usual(&data::TEXT_COLUMNS);
    let label = usual(&data::LABEL_COLUMNS).or_else(|| {
        let few = |c: &usize| (2..=rows.len() / 2).contains(&distinct(*c));
        (0..names.len()).filter(|c| Some(*c) != text).filter(few).min_by_key(|c| distinct(*c))
    })?;
    let text = text.or_else(|| {
        let others = (0..names.len()).filter(|c| *c != label);
        others.max_by_key(|c| (written(*c), values(*c).map(String::len).sum::<usize>()))
    })?;
    Some((names[text].clone(), names[label].clone()))
}

/// Whether a value may be a sentence: letters mostly, and more than one word unless its script does without blanks. An
/// address, a date or a key is none.
fn is_language(value: &str) -> bool {
    let letters = value.chars().filter(|c| c.is_alphabetic()).count();
    let words =
        value.trim().contains(char::is_whitespace) || value.chars().any(|c| c.is_alphabetic() && !c.is_ascii());
    2 * letters > value.chars().count() && words && !value.contains("://")
}

/// Whether the names of the columns look like a row: the label's is one of its labels, or the text's is a sentence.
fn is_headerless(names: &[String], rows: &[Vec<String>], text: &str, label: &str) -> bool {
    let column = names.iter().position(|n| n == label);
    let is_label = column.is_some_and(|c| rows.iter().any(|r| r.get(c).is_some_and(|v| v == label)));
    is_label || text.split_whitespace().count() > 3
}

/// Why a recipe for these data could not be run to its end.
fn obstacle(set: &Dataset, has_test: bool) -> Option<String> {
    if let (Task { problem: Problem::SingleLabel, .. }, [only]) = (set.task, &set.names[..]) {
        return Some(format!("every row has the label `{only}`; a classifier needs at least two labels"));
    }
    if has_test {
        return None;
    }
    if set.task != Task::default() {
        let task = set.task;
        return Some(format!(
            "give test data (--test FILE): with the task {task} no part of the training data stands in for them"
        ));
    }
    let (_, validation) = data::split(set, SET_ASIDE, SEED);
    let n = set.len();
    validation.is_empty().then(|| {
        format!("give test data (--test FILE): {n} sentences are too few to set a tenth of each label aside for want of them")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> (Vec<String>, Vec<Vec<String>>) {
        let cells = |line: &str| line.split(';').map(str::to_string).collect::<Vec<_>>();
        (text.lines().take(1).flat_map(cells).collect(), text.lines().skip(1).map(cells).collect())
    }

    #[test]
    fn columns_are_found_by_their_names_and_by_what_they_hold() {
        let rows = "1;wo ist meine karte;karte\n2;karte weg;karte\n3;neue pin bitte;pin\n4;pin vergessen;pin\n";
        let mail = "1;2026-01-02 10:00;web;i lost my card;lost\n2;2026-01-02 11:00;web;card gone;gone\n\
                    3;2026-01-03 12:00;app;where is it;lost\n4;2026-01-03 12:30;app;found it again;found\n";
        let links = "https://example.org/a/very/long/address/1;gut gemacht;ja\nhttps://example.org/a/very/long/address/2;so schlecht;\
                     nein\nhttps://example.org/a/very/long/address/3;geht so;ja\nhttps://example.org/a/very/long/address/4;na ja;nein\n";
        let chinese = "http://a.cn/some/long/address;退款在哪里;退款\nb;卡丢了;卡\nc;退款慢;退款\nd;新卡;卡\n";
        for (head, rows, want) in [
            ("nr;frage;thema", rows, Some(("frage", "thema"))),
            ("id;date;channel;message;intent", mail, Some(("message", "intent"))),
            ("id;date;channel;message;Reason", mail, Some(("message", "channel"))),
            ("url;satz;urteil", links, Some(("satz", "urteil"))),
            ("url;Sentence;urteil", links, Some(("Sentence", "urteil"))),
            ("网址;评论;情感", chinese, Some(("评论", "情感"))),
            ("a;b", "x;y\n", None),
            ("", "", None),
        ] {
            let (names, rows) = table(&format!("{head}\n{rows}"));
            let want = want.map(|(text, label)| (text.to_string(), label.to_string()));
            assert_eq!(columns(&names, &rows), want, "{head}");
        }
    }

    #[test]
    fn a_file_without_a_header_is_known() {
        for (text, want) in
            [("frage;thema\nwo ist es;karte", false), ("wo ist meine karte;karte\nkarte weg;karte", true)]
        {
            let (names, rows) = table(text);
            assert_eq!(is_headerless(&names, &rows, &names[0], &names[1]), want, "{text}");
        }
    }
}
