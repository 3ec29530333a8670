//! `quetsch init`: a commented recipe for a data file and a model.

use crate::hub;
use crate::settings::Data;
use crate::ui::Ui;
use crate::work::corpus::{self, Wanted};
use anyhow::Result;
use clap::Args;
use quetsch::atomic::write_file;
use quetsch::dir;
use quetsch::tokenizer::Tokenizer;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

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

/// Runs `init`.
pub fn run(i: &Init, ui: &Ui) -> Result<()> {
    if i.out.exists() && !i.force {
        anyhow::bail!("{} exists; pass --force to replace it", i.out.display());
    }
    let mut data = Data { text_col: i.text_col.clone(), label_col: i.label_col.clone(), ..Data::default() };
    let train = hub::table(i.train.as_ref(), "train", ui)?;
    let model = hub::model(i.model.as_ref(), None, ui)?;
    let read = corpus::read(&train, &data, Wanted::default());
    let set = match (read, columns(&train)) {
        (Err(_), Some((text, label))) if data.text_col.is_none() && data.label_col.is_none() => {
            ui.note(format!("{}: `{text}` looks like the text and `{label}` like the label", i.train));
            (data.text_col, data.label_col) = (Some(text), Some(label));
            corpus::read(&train, &data, Wanted::default())?
        }
        (read, _) => read?,
    };
    for warning in &set.warnings {
        ui.warn(format!("{}: {warning}", i.train));
    }
    let checkpoint = dir::read_checkpoint(&model)?;
    let tokenizer = Tokenizer::new(&dir::read_tokenizer(&model)?)?;
    let longest = checkpoint.spec.longest();
    let mut lengths: Vec<usize> =
        tokenizer.encode_all(&set.texts, longest, ui.threads(None))?.iter().map(|e| e.ids.len()).collect();
    lengths.sort_unstable();
    let at = |q: f64| lengths[((q * lengths.len() as f64) as usize).min(lengths.len() - 1)];
    // Room for all but one text in a hundred, in steps that people write.
    let max_length = [32, 64, 128, 256, 512].into_iter().find(|n| *n >= at(0.99)).unwrap_or(512).min(longest);
    let layers = checkpoint.spec.layers.len();
    let kept: Vec<usize> = (0..layers).skip(1 % layers.max(1)).step_by(2).collect();
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
        text_col = line("text-col", &data.text_col, "\"text\""),
        label_col = line("label-col", &data.label_col, "\"label\""),
        max_length = max_length,
        all_layers = layers,
        layers = format!("{kept:?}"),
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

/// The columns of a table without the usual names that look like the label (fewest values, each more than once on the
/// whole) and the text (the longest of the others).
fn columns(path: &Path) -> Option<(String, String)> {
    let bytes = std::fs::read(path).ok()?;
    let reader = |delimiter| csv::ReaderBuilder::new().delimiter(delimiter).from_reader(bytes.as_slice());
    let width = |d: &u8| reader(*d).headers().map_or(0, csv::StringRecord::len);
    let mut reader = reader(*[b'\t', b';', b','].iter().max_by_key(|d| width(d))?);
    let names: Vec<String> = reader.headers().ok()?.iter().map(|n| n.trim().to_string()).collect();
    let rows: Vec<csv::StringRecord> = reader.records().collect::<Result<_, _>>().ok()?;
    let values = |c: usize| rows.iter().filter_map(move |r| r.get(c));
    let distinct = |c: usize| values(c).collect::<BTreeSet<_>>().len();
    let label =
        (0..names.len()).filter(|c| (2..=rows.len() / 2).contains(&distinct(*c))).min_by_key(|c| distinct(*c))?;
    let text = (0..names.len()).filter(|c| *c != label).max_by_key(|c| values(*c).map(str::len).sum::<usize>())?;
    Some((names[text].clone(), names[label].clone()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_are_found_by_what_they_hold() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("d.csv");
        let found = |text: &str| {
            std::fs::write(&path, text).expect("written");
            super::columns(&path)
        };
        let rows = "1;wo ist meine karte;karte\n2;karte weg;karte\n3;neue pin bitte;pin\n4;pin vergessen;pin\n";
        let want = Some(("frage".to_string(), "thema".to_string()));
        assert_eq!(found(&format!("nr;frage;thema\n{rows}")), want);
        assert_eq!(found("a,b\nx,y\n"), None, "one row says nothing");
        assert_eq!(found(""), None);
    }
}
