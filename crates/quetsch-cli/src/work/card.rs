//! The model card, README.md: what a model is, what it was made of, what that cost, how to load it. Everything in it is
//! read off files of the model and of its parents or said by the user; what nobody said is "not stated". No time stands in
//! it, and of paths the folder's name: the same model under the same name has the same card.
//!
//! A card has a line that says who wrote it. A README.md without that line is somebody's own and stays as it is, also
//! where its folder is replaced (`--force`).

mod loading;

use super::{REPORT, provenance};
use crate::hub::Repo;
use crate::settings::Card;
use crate::ui::{Ui, mb, percent};
use anyhow::Result;
use loading::Model;
use quetsch::atomic::{Folder, write_file};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The file's name.
pub const FILE: &str = "README.md";

/// The line that tells our cards from others.
const MARK: &str = "<!-- Written by quetsch. Without this line the file is yours, and quetsch leaves it alone. -->";

/// The figures that a card shows, in its order: key in a report, name, the hub's name of the metric.
const FIGURES: [(&str, &str, &str); 5] = [
    ("accuracy", "accuracy", "accuracy"),
    ("macro_f1", "macro-F1", "f1"),
    ("micro_f1", "micro-F1", "f1"),
    ("r2", "R2", "r_squared"),
    ("mae", "mean absolute error", "mae"),
];

/// What is known about a model's origin: its own `report.json` has it for the cards of what will be made from it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// What people said, here or for a parent.
    #[serde(flatten)]
    pub said: Card,
    /// The data set of the test data, if it came from the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tested_on: Option<String>,
    /// The models that it was made from, the first one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<Parent>,
}

/// A model that another one was made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Parent {
    /// Its folder, or what the hub calls it.
    pub name: String,
    /// What made it, if we did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Its size, as far as it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<u64>,
    /// Bytes of its weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Its figures on test data, with the hash of these (`data`).
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub test: Map<String, Value>,
}

/// The origin of what is made from the model in `parent`, with training data in `train` and test data in `test`.
pub fn origin(said: &Card, parent: Option<&Path>, train: Option<&Path>, test: Option<&Path>) -> Origin {
    let mut origin = Origin::default();
    if let Some(dir) = parent {
        let report = json_file(&dir.join(REPORT));
        origin = serde_json::from_value(report["origin"].clone()).unwrap_or_default();
        let repo = Repo::of_path(dir);
        if let Some(repo) = &repo {
            origin.said.base_model.get_or_insert_with(|| repo.id.clone());
            let licence = front_matter(dir, "license").map_or("no licence".into(), |l| format!("the licence {l}"));
            let commit = repo.revision.as_deref().unwrap_or_default();
            add(
                &mut origin.said.credits,
                format!("made from {} (commit {commit}), whose card states {licence}", repo.id),
            );
        }
        let weights = super::corpus::disk_bytes(dir);
        let kept = |key: &str| FIGURES.iter().any(|(k, ..)| *k == key) || key == "data" || key == "n";
        let test = report["test"].as_object().into_iter().flatten().filter(|(k, _)| kept(k));
        origin.parents.push(Parent {
            name: repo.map_or_else(|| name_of(dir), |r| r.id),
            stage: report["stage"].as_str().map(str::to_string),
            parameters: report["parameters"].as_u64(),
            disk_bytes: (weights > 0).then_some(weights),
            test: test.map(|(k, v)| (k.clone(), v.clone())).collect(),
        });
    }
    if let Some(repo) = train.and_then(Repo::of_path) {
        add(&mut origin.said.datasets, repo.id.clone());
        let commit = repo.revision.as_deref().unwrap_or_default();
        add(&mut origin.said.credits, format!("trained on {} (commit {commit})", repo.id));
    }
    origin.tested_on = test.and_then(Repo::of_path).map(|repo| repo.id);
    origin.said.license = said.license.clone().or(origin.said.license);
    origin.said.base_model = said.base_model.clone().or(origin.said.base_model);
    said.datasets.iter().for_each(|d| add(&mut origin.said.datasets, d.clone()));
    said.languages.iter().for_each(|l| add(&mut origin.said.languages, l.clone()));
    said.credits.iter().for_each(|c| add(&mut origin.said.credits, c.clone()));
    origin
}

fn add(list: &mut Vec<String>, item: String) {
    if !list.contains(&item) {
        list.push(item);
    }
}

/// A file of a model directory, or nothing.
fn json_file(path: &Path) -> Value {
    std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// A value of one line in the YAML at the head of a directory's card.
fn front_matter(dir: &Path, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(dir.join(FILE)).ok()?;
    let head = text.strip_prefix("---")?.split("\n---").next()?;
    let value = head.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let value = value.trim().trim_matches(['"', '\'']);
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-+_ ".contains(c);
    (!value.is_empty() && value.len() <= 60 && value.chars().all(plain)).then(|| value.to_string())
}

/// Puts the card into a folder that is being written for `target`; somebody's own one that stands there is kept.
pub fn put(folder: &Folder, target: &Path, card: &str, ui: &Ui) -> Result<()> {
    match std::fs::read(target.join(FILE)) {
        Ok(own) if !is_ours(&own) => {
            ui.note(format!("{}: not written by quetsch, left as it is", target.join(FILE).display()));
            folder.write(FILE, &own)?;
        }
        _ => folder.write(FILE, card.as_bytes())?,
    }
    Ok(())
}

/// Writes the card of a directory anew if its files now say something else.
pub fn refresh(dir: &Path) -> Result<()> {
    let path = dir.join(FILE);
    let card = of_dir(dir);
    match std::fs::read(&path) {
        Ok(old) if old != card.as_bytes() && is_ours(&old) => Ok(write_file(&path, card.as_bytes())?),
        _ => Ok(()),
    }
}

fn is_ours(card: &[u8]) -> bool {
    String::from_utf8_lossy(card).contains(MARK)
}

/// The card of a directory, from its files.
fn of_dir(dir: &Path) -> String {
    let [config, report, made] = ["config.json", REPORT, provenance::FILE].map(|name| json_file(&dir.join(name)));
    card(&name_of(dir), &config, &report, &made["settings"])
}

/// What a model in this folder is called.
fn name_of(dir: &Path) -> String {
    let last = |dir: &Path| dir.file_name().map(|name| name.to_string_lossy().into_owned());
    last(dir).or_else(|| last(&dir.canonicalize().ok()?)).unwrap_or("model".into())
}

/// The card of a model for the folder `dir`, with this config.json, report.json and settings.
pub fn for_dir(dir: &Path, config: &Value, report: &Value, settings: &Value) -> String {
    card(&name_of(dir), config, report, settings)
}

fn card(name: &str, config: &Value, report: &Value, settings: &Value) -> String {
    let origin: Origin = serde_json::from_value(report["origin"].clone()).unwrap_or_default();
    let model = Model::new(config);
    let mut text = metadata(&origin, &model, name, report);
    text += &format!("\n{MARK}\n\n# {}\n\n", one_line(name));
    text += &format!(
        "{} with {} {}, {} layers, {}.\n\n",
        model.architecture,
        model.labels,
        if model.labels == 1 { "output" } else { "labels" },
        model.layers.len(),
        model.storage()
    );
    text += &made(&origin, &model, report, settings);
    text += &table(&origin, name, report);
    text += &model.loading();
    text + &rights(&origin)
}

/// YAML: the hub's metadata. Values are written as JSON, which is YAML, so that no text can end its line.
fn metadata(origin: &Origin, model: &Model, name: &str, report: &Value) -> String {
    let said = &origin.said;
    let stages = origin.parents.iter().filter_map(|p| p.stage.clone());
    let mut tags = vec!["quetsch".to_string()];
    stages.chain(report["stage"].as_str().map(str::to_string)).for_each(|stage| add(&mut tags, stage));
    model.schemes.iter().for_each(|scheme| add(&mut tags, scheme.clone()));
    let kinds = [("quantized", model.is_quantised()), ("bitsandbytes", model.is_bitsandbytes())];
    kinds.iter().filter(|(_, holds)| *holds).for_each(|(tag, _)| add(&mut tags, tag.to_string()));
    let mut lines = vec![];
    let mut line = |key: &str, value: Value| lines.push(format!("{key}: {value}"));
    if let Some(license) = &said.license {
        line("license", json!(license));
    }
    if let Some(base) = &said.base_model {
        line("base_model", json!(base));
        line("base_model_relation", json!(if model.is_quantised() { "quantized" } else { "finetune" }));
    }
    for (key, list) in [("datasets", &said.datasets), ("language", &said.languages), ("tags", &tags)] {
        if !list.is_empty() {
            line(key, json!(list));
        }
    }
    line("library_name", json!(if model.is_stock() { "transformers" } else { "quetsch" }));
    line("pipeline_tag", json!(model.pipeline()));
    let measured = figures(&report["test"]);
    if !measured.is_empty() {
        let mut metrics = vec![];
        measured.iter().for_each(|(_, _, hub, _)| add(&mut metrics, hub.to_string()));
        line("metrics", json!(metrics));
    }
    // The hub wants the name of the data set beside every result.
    let one = said.datasets.first().filter(|_| said.datasets.len() == 1);
    if let (false, Some(set)) = (measured.is_empty(), origin.tested_on.as_ref().or(one)) {
        let metrics: Vec<Value> =
            measured.iter().map(|(_, name, hub, x)| json!({ "type": hub, "name": name, "value": x })).collect();
        let result = json!({ "task": { "type": model.pipeline() },
            "dataset": { "type": set, "name": set, "split": "test" }, "metrics": metrics });
        line("model-index", json!([{ "name": name, "results": [result] }]));
    }
    format!("---\n{}\n---\n", lines.join("\n"))
}

/// Key, name, the hub's name and value of every figure of a test.
fn figures(test: &Value) -> Vec<(&'static str, &'static str, &'static str, f64)> {
    FIGURES.iter().filter_map(|(key, name, hub)| Some((*key, *name, *hub, test[key].as_f64()?))).collect()
}

/// A share in percent, another number to four decimals.
fn shown_as(key: &str, x: f64) -> String {
    match key {
        "r2" | "mae" => format!("{x:.4}"),
        _ => percent(x),
    }
}

fn made(origin: &Origin, model: &Model, report: &Value, settings: &Value) -> String {
    let mut steps: Vec<String> = origin
        .parents
        .iter()
        .map(|p| match &p.stage {
            Some(stage) => format!("{} ({stage})", one_line(&p.name)),
            None => one_line(&p.name),
        })
        .collect();
    let stage = report["stage"].as_str().unwrap_or("export");
    steps.push(format!("this model ({stage})"));
    let version = env!("CARGO_PKG_VERSION");
    let mut text = format!("## How it was made\n\n{}, by quetsch {version}.\n\n", steps.join(" -> "));
    if let Some(trained_on) = report["trained_on"].as_str() {
        let n = report["data"]["train"].as_u64().map_or(String::new(), |n| format!("{n} texts: "));
        text += &format!("Trained on {n}{trained_on}.\n\n");
    }
    let calibration = &report["calibration"];
    if let (true, Some(n), Some(observer)) =
        (model.is_static(), calibration["sentences"].as_u64(), calibration["observer"].as_str())
    {
        text += &format!(
            "Ranges of inputs from {n} training texts, observer {observer}; `report.json` lists them.\n\n"
        );
    }
    let settings: Map<String, Value> = settings
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, v)| !v.is_null())
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let section = json!({ "stage": [{ stage: settings }] });
    if let (false, Ok(toml)) = (settings.is_empty(), toml::to_string(&section)) {
        text += &format!("The last step as a section of a recipe:\n\n```toml\n{toml}```\n\n");
    }
    text
}

/// This model below those it was made from. A figure on other test data is no comparison and left out.
fn table(origin: &Origin, name: &str, report: &Value) -> String {
    let own = &report["test"];
    // A model that was not measured itself (an export) still shows what it was made from.
    let measured =
        origin.parents.iter().rev().map(|p| Value::Object(p.test.clone())).find(|t| !figures(t).is_empty());
    let reference = if own.is_null() { measured.unwrap_or_default() } else { own.clone() };
    let shown = figures(&reference);
    let mut header = vec!["model", "parameters", "weights MB"];
    header.extend(shown.iter().map(|(_, name, ..)| *name));
    let none = || "-".to_string();
    let row = |name: &str, parameters: Option<u64>, bytes: Option<u64>, test: Option<&Value>| {
        let mut cells = vec![
            name.to_string(),
            parameters.map_or_else(none, |n| format!("{:.2} M", n as f64 / 1e6)),
            bytes.map_or_else(none, |b| format!("{:.1}", mb(b))),
        ];
        let value = |key: &str| test.and_then(|t| t[key].as_f64()).map_or_else(none, |x| shown_as(key, x));
        cells.extend(shown.iter().map(|(key, ..)| value(key)));
        format!("| {} |\n", cells.join(" | "))
    };
    let mut text = format!(
        "## Before and after\n\n| {} |\n| --- |{}\n",
        header.join(" | "),
        " ---: |".repeat(header.len() - 1)
    );
    for parent in &origin.parents {
        let test = Value::Object(parent.test.clone());
        let same = !reference["data"].is_null() && test["data"] == reference["data"];
        text += &row(&one_line(&parent.name), parent.parameters, parent.disk_bytes, same.then_some(&test));
    }
    text += &row(
        &format!("**{}**", one_line(name)),
        report["parameters"].as_u64(),
        report["disk_bytes"].as_u64(),
        Some(own),
    );
    if let (Some(n), Some(hash)) = (reference["n"].as_u64(), reference["data"].as_str()) {
        let hash: String = hash.chars().take(16).collect();
        text +=
            &format!("\nMeasured on {n} test examples (blake3 of the file {hash}..); `-`: not measured on them.\n");
    }
    if let Some(worst) = worst(own) {
        text += &format!("\nThe label with the lowest F1 is {worst}.\n");
    }
    if own.is_null() {
        text += "\nThis model was not measured: no test data were given.\n";
    }
    text + "\n"
}

/// Name and figures of the label that a test finds hardest.
fn worst(test: &Value) -> Option<String> {
    let number = |class: &Value, key: &str| class[key].as_f64().unwrap_or_default();
    let seen = test["per_class"].as_array()?.iter().filter(|c| number(c, "support") > 0.0);
    let class = seen.min_by(|a, b| number(a, "f1").total_cmp(&number(b, "f1")))?;
    let shown = |key: &str| percent(number(class, key));
    Some(format!(
        "{}: recall {}, F1 {} on {} examples",
        one_line(class["label"].as_str()?),
        shown("recall"),
        shown("f1"),
        class["support"]
    ))
}

fn rights(origin: &Origin) -> String {
    let said = &origin.said;
    let stated = |x: &Option<String>| x.as_ref().map_or("not stated".into(), |x| one_line(x));
    let list = |x: &Vec<String>| if x.is_empty() { "not stated".to_string() } else { one_line(&x.join(", ")) };
    let mut text = format!(
        "## Licence and credits\n\n- licence of this model: {}\n- base model: {}\n- data: {}\n- languages: {}\n",
        stated(&said.license),
        stated(&said.base_model),
        list(&said.datasets),
        list(&said.languages)
    );
    said.credits.iter().for_each(|c| text += &format!("- {}\n", one_line(c)));
    text + "\nThe licences of the base model and of the data bind this model, too.\n"
}

/// Fit for one line of Markdown, and for a cell of a table.
fn one_line(text: &str) -> String {
    let escaped = |c: char| match c {
        '|' | '<' | '>' | '`' | '[' | ']' => format!("\\{c}"),
        c if c.is_control() => " ".into(),
        c => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Value {
        json!({ "architectures": ["BertForSequenceClassification"], "num_attention_heads": 4, "num_hidden_layers": 2 })
    }

    #[test]
    fn what_nobody_said_is_not_stated() {
        let text = card("m", &config(), &json!({ "stage": "train", "parameters": 5 }), &Value::Null);
        assert!(text.contains("licence of this model: not stated") && text.contains("was not measured"), "{text}");
        let head = text.split("---").nth(1).expect("metadata");
        for key in ["license", "base_model", "datasets", "model-index", "metrics"] {
            assert!(!head.contains(key), "{key}: {head}");
        }
    }

    /// Whatever stands in a value, the head ends where it ends and a table's row is a row.
    #[test]
    fn texts_cannot_break_out() {
        let said = Card {
            credits: vec!["a\n---\n# b <script>".into()],
            license: Some("x\n---".into()),
            ..Card::default()
        };
        let origin =
            Origin { said, tested_on: None, parents: vec![Parent { name: "p | q\n".into(), ..Parent::default() }] };
        let report = json!({ "stage": "train", "origin": origin });
        let text = card("m|\n---", &config(), &report, &Value::Null);
        assert_eq!(text.lines().filter(|l| *l == "---").count(), 2, "{text}");
        for row in ["| p \\| q  | - | - |", "| **m\\| ---** | - | - |"] {
            assert!(text.lines().any(|l| l == row), "{row}\n{text}");
        }
        assert!(!text.contains("<script>"), "{text}");
    }

    #[test]
    fn foreign_cards_are_read_for_one_line() {
        let dir = tempfile::tempdir().expect("a folder");
        let of = |text: &str| {
            std::fs::write(dir.path().join(FILE), text).expect("written");
            front_matter(dir.path(), "license")
        };
        assert_eq!(of("---\nlanguage: en\nlicense: apache-2.0\n---\n# x"), Some("apache-2.0".into()));
        assert_eq!(of("---\r\nlicense: 'mit'\r\n---\r\n"), Some("mit".into()));
        assert_eq!(of("---\nlanguage: en\n---\nlicense: mit"), None, "the text is no metadata");
        assert_eq!(of("license: mit"), None);
        assert_eq!(of("---\nlicense:\n- mit\n---"), None);
        assert_eq!(of("---\nlicense: \u{1b}[2J\n---"), None);
    }
}
