//! `quetsch init`: a commented recipe for a data file and a model.

use crate::hub;
use crate::settings::Data;
use crate::ui::{Ui, percent};
use crate::work::corpus::{self, Wanted};
use anyhow::Result;
use clap::Args;
use quetsch::atomic::write_file;
use quetsch::batch::Encoding;
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

/// Steps of the teacher's training that gave what it can on the sets tried (`docs/tutorial.md`), in batches of this many.
const STEPS: usize = 850;
const BATCH: usize = 64;
/// Share of the data that is not set aside.
const TRAINED_ON: f64 = 0.9;
/// Epochs of a teacher: few are enough where there is much data, and many never take long where there is little.
const EPOCHS: std::ops::RangeInclusive<usize> = 3..=40;
/// A share of unknown tokens that is worth a warning.
const MANY_UNKNOWN: f64 = 0.05;

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
    let steps = ((TRAINED_ON * set.len() as f64) as usize).div_ceil(BATCH).max(1);
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
        text_col = line("text-col", &data.text_col, "\"text\""),
        label_col = line("label-col", &data.label_col, "\"label\""),
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
