//! Search files: what [`crate::work::search`] varies, the settings that all trials share (the sections of the stages,
//! under the names of the stages), and the budget.

use super::Source;
use super::overrides::Override;
use super::place::{Step, path};
use crate::exit::usage;
use crate::hub;
use crate::settings::{Data, Distill, Prune, Quantize, Search, Space, Train};
use crate::ui::Ui;
use crate::values::{Amount, SiteRule};
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The keys beside the sections.
const KEYS: [&str; 5] = ["model", "teacher", "out", "seed", "threads"];
/// The sections of a search file.
const SECTIONS: [&str; 6] = ["data", "search", "space", "train", "distill", "prune"];
/// Share of the training data that trials are chosen on, if the file does not say.
const VALIDATION: f64 = 0.1;

/// A way to store weights that every trained shape is tried with.
#[derive(Clone, Debug, Serialize)]
pub struct Storing {
    /// Name of the variant.
    pub id: String,
    /// How.
    #[serde(flatten)]
    pub settings: Quantize,
}

/// A resolved and checked search file.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SearchFile {
    /// Pretrained encoder that the teacher is made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// A teacher that is there already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Folder for everything that the search writes.
    pub out: PathBuf,
    /// Seed of the split, of the choice of shapes and of every trial.
    pub seed: u64,
    /// Threads, if the file says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// The data.
    pub data: Data,
    /// Budget and rounds.
    pub search: Search,
    /// What is varied.
    pub space: Space,
    /// How the teacher is trained.
    pub train: Train,
    /// How students learn, first and in later rounds.
    pub distill: Distill,
    /// How cut students recover.
    pub prune: Prune,
    /// How weights are stored, besides as they are.
    pub quantize: Vec<Storing>,
    /// Values outside their usual range.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

impl SearchFile {
    /// The same with everything here that it names on the hub.
    pub fn fetched(&self, ui: &Ui) -> Result<SearchFile> {
        let here = |name: &Option<String>| -> Result<Option<String>> {
            let path = name.as_ref().map(|n| hub::model(n.as_ref(), None, ui)).transpose()?;
            Ok(path.map(|p| p.to_string_lossy().into_owned()))
        };
        let (model, teacher) = (here(&self.model)?, here(&self.teacher)?);
        Ok(SearchFile { model, teacher, data: self.data.local(ui)?, ..self.clone() })
    }
}

/// Reads a search file and lays `flags` over it: `out=DIR`, `search.minutes=30`.
pub fn read(file: &Path, flags: &[String]) -> Result<SearchFile> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read the search {}", file.display()))?;
    let mut source = Source::parse(file, text)?;
    for flag in flags {
        source.lay_over_section(&Override::from_flag(flag)?)?;
    }
    source.resolve_search()
}

impl Source {
    fn lay_over_section(&mut self, o: &Override) -> Result<()> {
        match o.key.split_once('.') {
            Some((section, _)) if !SECTIONS.contains(&section) => {
                let known = SECTIONS.join(", ");
                Err(usage(format!("{}: no section `{section}`; there are: {known}", o.origin)))
            }
            Some((section, key)) => {
                let table = self.table.entry(section).or_insert_with(|| Value::Table(Table::new()));
                let table = table.as_table_mut();
                table
                    .ok_or_else(|| usage(format!("`{section}` must be a section [{section}]")))?
                    .insert(key.into(), o.value());
                self.overridden.insert(path(&[section, key]), o.origin.clone());
                Ok(())
            }
            None => {
                self.table.insert(o.key.clone(), o.value());
                self.overridden.insert(path(&[&o.key]), o.origin.clone());
                Ok(())
            }
        }
    }

    /// The section under `name`, empty if it is not there.
    fn table_of(&self, name: &str) -> Result<Table> {
        match self.table.get(name) {
            None => Ok(Table::new()),
            Some(Value::Table(table)) => Ok(table.clone()),
            Some(_) => Err(self.fault(&path(&[name]), format!("`{name}` must be a section [{name}]"))),
        }
    }

    fn resolve_search(&self) -> Result<SearchFile> {
        for key in self.table.keys() {
            if !KEYS.contains(&key.as_str()) && !SECTIONS.contains(&key.as_str()) && key != "quantize" {
                let sections = SECTIONS.map(|s| format!("[{s}]")).join(", ");
                let keys = KEYS.join(", ");
                let hint = format!("unknown key `{key}`; known keys: {keys}, {sections}, [[quantize]]");
                return Err(self.fault(&path(&[key]), hint));
            }
        }
        let mut warnings = vec![];
        let w = &mut warnings;
        let mut data: Data = self.section(&path(&["data"]), &self.table_of("data")?, w)?;
        if data.validation == 0.0 {
            data.validation = VALIDATION;
        }
        let prune = {
            let (at, table) = (path(&["prune"]), self.table_of("prune")?);
            let prune: Prune = self.keys_of(&at, &table)?;
            // How much is cut is the space's business; everything else has to be right.
            self.judge(&at, &table, &Prune { heads: Amount::Count(1), ..prune.clone() }, w)?;
            prune
        };
        let distill: Distill = self.section(&path(&["distill"]), &self.table_of("distill")?, w)?;
        let train: Train = self.section(&path(&["train"]), &self.table_of("train")?, w)?;
        for (at, taken) in [
            (path(&["prune", "heads"]), !prune.heads.is_none()),
            (path(&["prune", "ffn"]), !prune.ffn.is_none()),
            (path(&["prune", "layers"]), !prune.layers.is_none()),
            (path(&["distill", "layers"]), !distill.layers.is_empty()),
        ] {
            if taken {
                return Err(self.fault(&at, "is for [space] to say: it is what the search varies"));
            }
        }
        for (at, given) in [
            (["train", "model"], train.model.is_some()),
            (["distill", "model"], distill.model.is_some()),
            (["distill", "teacher"], distill.teacher.is_some()),
            (["prune", "model"], prune.model.is_some()),
            (["prune", "teacher"], prune.teacher.is_some()),
        ] {
            if given {
                return Err(
                    self.fault(&path(&at), "the search names inputs itself; set `model` or `teacher` at the top")
                );
            }
        }
        let file = SearchFile {
            model: self.value("model")?,
            teacher: self.value("teacher")?,
            out: self
                .value("out")?
                .unwrap_or_else(|| self.file.with_extension("").file_name().map(PathBuf::from).unwrap_or_default()),
            seed: self.value("seed")?.unwrap_or(42),
            threads: self.value("threads")?,
            data,
            search: self.section(&path(&["search"]), &self.table_of("search")?, w)?,
            space: self.section(&path(&["space"]), &self.table_of("space")?, w)?,
            train,
            distill,
            prune,
            quantize: self.storings(w)?,
            warnings: vec![],
        };
        let name = self.file.display();
        match (&file.model, &file.teacher) {
            (None, None) => return Err(usage(format!("{name}: set `model` (a pretrained encoder) or `teacher`"))),
            (Some(_), Some(_)) => {
                return Err(
                    self.fault(&path(&["teacher"]), "a teacher is made of `model`, or it is there: leave out one")
                );
            }
            _ => {}
        }
        if file.data.train.is_none() {
            return Err(usage(format!("{name}: no training data: set data.train")));
        }
        Ok(SearchFile { warnings, ..file })
    }

    /// The `[[quantize]]` sections; without any, int8 with the embedding tables, most of a small encoder, as well.
    fn storings(&self, warnings: &mut Vec<String>) -> Result<Vec<Storing>> {
        let sections = match self.table.get("quantize") {
            None => {
                let tables = SiteRule { site: "embeddings.*".into(), scheme: "int8".into() };
                let settings = Quantize { site: vec![tables], ..Quantize::default() };
                return Ok(vec![Storing { id: "int8".into(), settings }]);
            }
            Some(Value::Array(sections)) => sections.as_slice(),
            Some(_) => {
                return Err(
                    self.fault(&path(&["quantize"]), "sections are written [[quantize]], in double brackets")
                );
            }
        };
        let mut found: Vec<Storing> = vec![];
        for (i, section) in sections.iter().enumerate() {
            let at = vec![Step::Key("quantize".into()), Step::Index(i)];
            let Some(mut table) = section.as_table().cloned() else {
                return Err(self.fault(&at, "a section [[quantize]] holds keys"));
            };
            let id = match table.remove("id") {
                Some(Value::String(id)) => id,
                Some(_) => return Err(self.fault(&at, "`id` must be a text")),
                None => table.get("quant").and_then(Value::as_str).unwrap_or("int8").to_string(),
            };
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if id.is_empty() || !id.chars().all(plain) {
                return Err(self.fault(&at, format!("id `{id}`: an id is made of letters, digits and _")));
            }
            if id == "vocab" || found.iter().any(|s| s.id == id) {
                return Err(self.fault(&at, format!("the id `{id}` is taken; give this section another `id`")));
            }
            let settings: Quantize = self.section(&at, &table, warnings)?;
            if settings.model.is_some() {
                return Err(self.fault(&at, "the search names inputs itself: leave out `model`"));
            }
            found.push(Storing { id, settings });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(text: &str, flags: &[&str]) -> Result<SearchFile> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("s.toml");
        std::fs::write(&file, text)?;
        read(&file, &flags.iter().map(|f| f.to_string()).collect::<Vec<_>>())
    }

    const GOOD: &str = "model='m'\n[data]\ntrain='t.csv'\n";

    #[test]
    fn five_lines_are_enough() {
        let file = resolve(GOOD, &[]).expect("a good search");
        assert_eq!((file.data.validation, file.search.clone()), (VALIDATION, Search::default()));
        assert_eq!(file.out, Path::new("s"));
        assert_eq!(file.quantize[0].id, "int8");
        let flags = ["search.max-drop=1pt", "space.layers=[1]", "search.rungs=[3]", "out=o", "data.validation=0.2"];
        let file = resolve(GOOD, &flags).expect("with flags");
        assert_eq!((file.search.max_drop.0, file.space.layers, file.search.rungs), (1.0, vec![1], vec![3]));
        assert_eq!((file.out, file.data.validation), (PathBuf::from("o"), 0.2));
    }

    #[test]
    fn complaints_name_their_place() {
        let rows: [(&str, &str, &[&str], &[&str]); 13] = [
            ("no model", "[data]\ntrain='t'", &[], &["set `model`"]),
            ("both", "model='m'\nteacher='t'\n[data]\ntrain='t'", &[], &["s.toml:2:1", "leave out one"]),
            ("no data", "model='m'", &[], &["data.train"]),
            ("top key", "modle='m'", &[], &["s.toml:1:1", "`modle`"]),
            ("key", "model='m'\n[space]\nlayer=[1]", &[], &["s.toml:3:1", "unknown key `layer`"]),
            ("value", "model='m'\n[search]\nkeep=0", &[], &["s.toml:3:1", "(0, 1]"]),
            ("share", "model='m'\n[space]\nffn=[1.0]", &[], &["s.toml:3:1", "[0, 1)"]),
            ("varied", "model='m'\n[prune]\nheads=3", &[], &["s.toml:3:1", "[space]"]),
            ("input", "model='m'\n[distill]\nteacher='x'", &[], &["s.toml:3:1", "at the top"]),
            ("scheme", "model='m'\n[[quantize]]\nquant='int3'", &[], &["s.toml:3:1", "int3"]),
            ("twice", "model='m'\n[[quantize]]\n[[quantize]]", &[], &["s.toml:3:", "taken"]),
            ("flag", GOOD, &["search.rungs=[0]"], &["--set search.rungs=[0]", "at least 1"]),
            ("flag's section", GOOD, &["serach.rungs=[1]"], &["no section `serach`"]),
        ];
        let mut failures = vec![];
        for (what, text, flags, wanted) in rows {
            match resolve(text, flags) {
                Ok(_) => failures.push(format!("{what}: accepted")),
                Err(e) => {
                    let message = format!("{e:#}");
                    if !wanted.iter().all(|w| message.contains(w)) {
                        failures.push(format!("{what}: {message}"));
                    }
                }
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}
