//! Recipes: TOML with one-key stages. [`Source`] is the file as written, with overrides laid over it; [`Recipe`] is
//! resolved and checked: every stage has an id and settings, every input is named.
//!
//! Every complaint points at its place: line and column of the key in the file, or the flag or environment variable
//! that overrode it.

mod fetched;
mod overrides;
mod place;
mod search;

use crate::exit::usage;
use crate::settings::{Card, Compare, Data, Distill, Eval, Level, MORE_TEACHERS, Prune, Quantize, Settings, Train};
use anyhow::{Context, Result};
pub use fetched::Fetched;
use overrides::{Override, from_environment};
use place::{Step, line_and_column, locate, path};
pub use search::{SearchFile, read as read_search};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::de::DeTable;
use toml::{Table, Value};

/// The keys beside `[data]` and `[[stage]]`.
const TOP_KEYS: [&str; 5] = ["model", "out", "seed", "threads", "cache"];

/// What a stage does, with its settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Fine-tune.
    Train(Train),
    /// Distil a student.
    Distill(Distill),
    /// Prune and recover.
    Prune(Prune),
    /// Quantise.
    Quantize(Quantize),
    /// Measure one model.
    Eval(Eval),
    /// Measure all variants.
    Compare(Compare),
}

impl Kind {
    const NAMES: [&str; 6] = ["train", "distill", "prune", "quantize", "eval", "compare"];

    /// The section's name.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Train(_) => "train",
            Kind::Distill(_) => "distill",
            Kind::Prune(_) => "prune",
            Kind::Quantize(_) => "quantize",
            Kind::Eval(_) => "eval",
            Kind::Compare(_) => "compare",
        }
    }

    /// Whether the stage leaves a model directory behind.
    pub fn makes_model(&self) -> bool {
        !matches!(self, Kind::Eval(_) | Kind::Compare(_))
    }
}

/// One stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Unique name: folder of its output, prefix of `--set`.
    pub id: String,
    /// What it does.
    pub kind: Kind,
}

/// A resolved and checked recipe.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Model directory that the first stage starts from.
    pub model: Option<String>,
    /// Folder for everything the run writes.
    pub out: PathBuf,
    /// Seed of every stage that does not name its own.
    pub seed: u64,
    /// Threads, if the recipe says.
    pub threads: Option<usize>,
    /// Folder for teachers' logits, if not one in `out`: recipes with one teacher may share it.
    pub cache: Option<PathBuf>,
    /// The data.
    pub data: Data,
    /// What the models' cards say.
    pub card: Card,
    /// The stages in order.
    pub stages: Vec<Stage>,
    /// Values outside their usual range.
    pub warnings: Vec<String>,
    /// What was fetched for it, if anything has been looked for.
    pub fetched: Option<Fetched>,
}

/// A recipe file with overrides.
struct Source {
    file: PathBuf,
    text: String,
    table: Table,
    /// Which values are not the file's own.
    overridden: BTreeMap<Vec<Step>, String>,
}

/// Reads a recipe, lays `environment` and then `flags` over it, resolves and checks it.
pub fn read(file: &Path, environment: &BTreeMap<String, String>, flags: &[String]) -> Result<Recipe> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read the recipe {}", file.display()))?;
    from_text(file, text, environment, flags)
}

/// As [`read`], of a recipe that is in memory; `file` is for messages.
pub fn from_text(
    file: &Path,
    text: String,
    environment: &BTreeMap<String, String>,
    flags: &[String],
) -> Result<Recipe> {
    let mut source = Source::parse(file, text)?;
    let ids = source.stage_ids()?;
    let mut overrides = from_environment(environment, &ids);
    for flag in flags {
        overrides.push(Override::from_flag(flag)?);
    }
    for o in &overrides {
        source.lay_over(o, &ids)?;
    }
    source.resolve(&ids)
}

impl Source {
    fn parse(file: &Path, text: String) -> Result<Source> {
        let table = match toml::from_str(&text) {
            Ok(table) => table,
            Err(e) => {
                let place = e.span().map(|s| line_and_column(&text, &s)).unwrap_or_default();
                return Err(usage(format!("{}{place}: {}", file.display(), e.message())));
            }
        };
        Ok(Source { file: file.into(), text, table, overridden: BTreeMap::new() })
    }

    /// An error about the value at `steps`.
    fn fault(&self, steps: &[Step], message: impl std::fmt::Display) -> anyhow::Error {
        usage(format!("{}: {message}", self.place(steps)))
    }

    /// `file:line:column`, or the override that set the value.
    fn place(&self, steps: &[Step]) -> String {
        if let Some(origin) = self.overridden.get(steps) {
            return origin.clone();
        }
        let spans = DeTable::parse(&self.text).ok().and_then(|t| locate(t.get_ref(), steps));
        let place = spans.map(|s| line_and_column(&self.text, &s)).unwrap_or_default();
        format!("{}{place}", self.file.display())
    }

    /// The (kind, section) of every stage.
    fn sections(&self) -> Result<Vec<(String, Table)>> {
        let stages = match self.table.get("stage") {
            Some(Value::Array(stages)) => stages.as_slice(),
            None => &[],
            Some(_) => {
                return Err(self.fault(&path(&["stage"]), "stages are written [[stage]], in double brackets"));
            }
        };
        let mut sections = vec![];
        for (i, stage) in stages.iter().enumerate() {
            let at = vec![Step::Key("stage".into()), Step::Index(i)];
            let kinds = Kind::NAMES.map(|k| format!("[stage.{k}]")).join(", ");
            let Some(table) = stage.as_table() else {
                return Err(self.fault(&at, format!("a stage is a table with one section: {kinds}")));
            };
            let mut keys = table.keys();
            let Some(kind) = keys.next() else {
                return Err(self.fault(&at, format!("an empty stage, expected one of {kinds}")));
            };
            let below = |key: &str| [at.clone(), path(&[key])].concat();
            for key in table.keys() {
                if !Kind::NAMES.contains(&key.as_str()) {
                    let hint = format!("unknown stage `{key}`, expected one of {kinds}");
                    return Err(self.fault(&below(key), hint));
                }
            }
            if let Some(second) = keys.next() {
                let hint = format!("a second section `{second}` in the stage of `{kind}`; begin it with [[stage]]");
                return Err(self.fault(&below(second), hint));
            }
            let Some(section) = table[kind].as_table() else {
                return Err(self.fault(&below(kind), format!("`{kind}` must be a section [stage.{kind}]")));
            };
            sections.push((kind.clone(), section.clone()));
        }
        Ok(sections)
    }

    /// The id of every stage: as written, else its kind. Duplicates are an error.
    fn stage_ids(&self) -> Result<Vec<String>> {
        let mut ids: Vec<String> = vec![];
        for (i, (kind, section)) in self.sections()?.iter().enumerate() {
            let mut at = vec![Step::Key("stage".into()), Step::Index(i), Step::Key(kind.clone())];
            let id = match section.get("id") {
                None => kind.clone(),
                Some(Value::String(id)) => {
                    at.push(Step::Key("id".into()));
                    id.clone()
                }
                Some(_) => return Err(self.fault(&at, "`id` must be a text")),
            };
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if id.is_empty() || !id.chars().all(plain) || id.starts_with('-') {
                let hint = "an id is made of letters, digits, - and _: it names a folder";
                return Err(self.fault(&at, format!("id `{id}`: {hint}")));
            }
            if id == "data" || id == "card" || ids.contains(&id) {
                let hint = format!("the id `{id}` is taken; give this stage one of its own: id = \"...\"");
                return Err(self.fault(&at, hint));
            }
            ids.push(id);
        }
        Ok(ids)
    }

    fn lay_over(&mut self, o: &Override, ids: &[String]) -> Result<()> {
        let value = o.value();
        let (table, steps) = match o.key.split_once('.') {
            None => (&mut self.table, path(&[&o.key])),
            Some((name @ ("data" | "card"), key)) => {
                let section = self.table.entry(name).or_insert_with(|| Value::Table(Table::new()));
                let fault = || usage(format!("`{name}` must be a section [{name}]"));
                (section.as_table_mut().ok_or_else(fault)?, path(&[name, key]))
            }
            Some((id, key)) => {
                let Some(i) = ids.iter().position(|other| other == id) else {
                    let known = ids.join(", ");
                    return Err(usage(format!("{}: no stage has the id `{id}`; there are: {known}", o.origin)));
                };
                let kind = self.sections()?[i].0.clone();
                let section = &mut self.table["stage"][i][&kind];
                let at = [vec![Step::Key("stage".into()), Step::Index(i)], path(&[&kind, key])].concat();
                (section.as_table_mut().ok_or_else(|| usage(format!("`{kind}` must be a section")))?, at)
            }
        };
        let Some(Step::Key(last)) = steps.last().cloned() else { unreachable!("steps end in a key") };
        // A seed of digits is a number also where the key wants a text; paths such as 2024 stay usable in quotes.
        table.insert(last, value);
        self.overridden.insert(steps, o.origin.clone());
        Ok(())
    }

    /// One section's settings, with every complaint at its key.
    fn section<T: Settings>(&self, at: &[Step], table: &Table, warnings: &mut Vec<String>) -> Result<T> {
        let settings = self.keys_of(at, table)?;
        self.judge(at, table, &settings, warnings)?;
        Ok(settings)
    }

    /// One section's settings, whose values nobody has looked at yet.
    fn keys_of<T: Settings>(&self, at: &[Step], table: &Table) -> Result<T> {
        let keys = T::keys();
        let below = |key: &str| [at, &path(&[key])[..]].concat();
        for (key, value) in table {
            if !keys.contains(key) {
                let dashed = key.replace('_', "-");
                let hint = match keys.contains(&dashed) {
                    true => format!("did you mean `{dashed}`?"),
                    false => format!("known keys: {}", keys.join(", ")),
                };
                return Err(self.fault(&below(key), format!("unknown key `{key}`; {hint}")));
            }
            // All keys are optional, so a section of this key alone must be readable: that finds the guilty one.
            let alone = Value::Table(Table::from_iter([(key.clone(), value.clone())]));
            if let Err(e) = T::deserialize(alone) {
                return Err(self.fault(&below(key), format!("`{key}`: {}", e.message())));
            }
        }
        T::deserialize(Value::Table(table.clone())).map_err(|e| self.fault(at, e.message()))
    }

    /// What there is to say about the values of a section.
    fn judge<T: Settings>(
        &self,
        at: &[Step],
        table: &Table,
        settings: &T,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        for finding in settings.check() {
            let steps = match table.contains_key(finding.key) {
                true => [at, &path(&[finding.key])[..]].concat(),
                false => at.to_vec(),
            };
            let message = format!("`{}` {}", finding.key, finding.message);
            match finding.level {
                Level::Error => return Err(self.fault(&steps, message)),
                Level::Warning => warnings.push(format!("{}: {message}", self.place(&steps))),
            }
        }
        Ok(())
    }

    fn value<T: for<'de> Deserialize<'de>>(&self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        T::deserialize(value.clone())
            .map(Some)
            .map_err(|e| self.fault(&path(&[key]), format!("`{key}`: {}", e.message())))
    }

    fn resolve(&self, ids: &[String]) -> Result<Recipe> {
        for key in self.table.keys() {
            if !TOP_KEYS.contains(&key.as_str()) && !["data", "card", "stage"].contains(&key.as_str()) {
                let known = TOP_KEYS.join(", ");
                let hint = format!("unknown key `{key}`; known keys: {known}, [data], [card], [[stage]]");
                return Err(self.fault(&path(&[key]), hint));
            }
        }
        let mut warnings = vec![];
        let data = match self.table.get("data") {
            None => Data::default(),
            Some(Value::Table(table)) => self.section(&path(&["data"]), table, &mut warnings)?,
            Some(_) => return Err(self.fault(&path(&["data"]), "`data` must be a section [data]")),
        };
        let mut recipe = Recipe {
            model: self.value("model")?,
            out: self
                .value("out")?
                .unwrap_or_else(|| self.file.with_extension("").file_name().map(PathBuf::from).unwrap_or_default()),
            seed: self.value("seed")?.unwrap_or(42),
            threads: self.value("threads")?,
            cache: self.value("cache")?,
            data,
            card: match self.table.get("card") {
                None => Card::default(),
                Some(Value::Table(table)) => self.section(&path(&["card"]), table, &mut warnings)?,
                Some(_) => return Err(self.fault(&path(&["card"]), "`card` must be a section [card]")),
            },
            stages: vec![],
            warnings: vec![],
            fetched: None,
        };
        let sections = self.sections()?;
        if sections.is_empty() {
            return Err(usage(format!("{}: no [[stage]] in it", self.file.display())));
        }
        for (i, ((kind, mut table), id)) in sections.into_iter().zip(ids).enumerate() {
            table.remove("id");
            let at = vec![Step::Key("stage".into()), Step::Index(i), Step::Key(kind.clone())];
            let w = &mut warnings;
            let mut kind = match kind.as_str() {
                "train" => Kind::Train(self.section(&at, &table, w)?),
                "distill" => Kind::Distill(self.section(&at, &table, w)?),
                "prune" => Kind::Prune(self.section(&at, &table, w)?),
                "quantize" => Kind::Quantize(self.section(&at, &table, w)?),
                "eval" => Kind::Eval(self.section(&at, &table, w)?),
                _ => Kind::Compare(self.section(&at, &table, w)?),
            };
            self.wire(&recipe, &mut kind, &at, &ids[i..])?;
            recipe.stages.push(Stage { id: id.clone(), kind });
        }
        recipe.warnings = warnings;
        Ok(recipe)
    }

    /// Names the inputs that the recipe leaves open, and refuses those that come later.
    fn wire(&self, recipe: &Recipe, kind: &mut Kind, at: &[Step], later: &[String]) -> Result<()> {
        let latest =
            |wanted: fn(&Kind) -> bool| recipe.stages.iter().rev().find(|s| wanted(&s.kind)).map(|s| s.id.clone());
        let before = || latest(Kind::makes_model).or(recipe.model.clone());
        let unquantised =
            || latest(|k| k.makes_model() && !matches!(k, Kind::Quantize(_))).or(recipe.model.clone());
        let trained = || latest(|k| matches!(k, Kind::Train(_)));
        match kind {
            Kind::Train(s) => {
                s.model = s.model.take().or(recipe.model.clone());
                s.training.seed.get_or_insert(recipe.seed);
            }
            Kind::Distill(s) => {
                s.teacher = s.teacher.take().or_else(|| trained().or_else(unquantised));
                s.training.seed.get_or_insert(recipe.seed);
            }
            Kind::Prune(s) => {
                s.model = s.model.take().or_else(unquantised);
                s.teacher = s.teacher.take().or_else(|| trained().or_else(unquantised));
                s.training.seed.get_or_insert(recipe.seed);
            }
            Kind::Quantize(s) => {
                s.model = s.model.take().or_else(unquantised);
                if s.trains() {
                    s.teacher = s.teacher.take().or_else(|| trained().or_else(unquantised));
                    s.training.seed.get_or_insert(recipe.seed);
                }
            }
            Kind::Eval(s) => s.model = s.model.take().or_else(before),
            Kind::Compare(s) => {
                if s.models.is_empty() {
                    s.models = results(&recipe.stages).map(|s| s.id.clone()).collect();
                }
            }
        }
        for (key, name) in kind.inputs() {
            let steps = [at, &path(&[key])[..]].concat();
            match name {
                None => {
                    let hint = format!("no `{key}`: set it here, or `model` at the top of the recipe");
                    return Err(self.fault(at, hint));
                }
                Some(name) if later.contains(&name) => {
                    return Err(self
                        .fault(&steps, format!("`{key}` names the stage `{name}`, which is not before this one")));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The stages whose models answer the data's labels: all that make one, but for shapes that a later `train` starts from.
pub fn results(stages: &[Stage]) -> impl Iterator<Item = &Stage> {
    let is_start = move |stage: &Stage| {
        let untrained = matches!(&stage.kind, Kind::Prune(s) if s.training.epochs == 0);
        let starts = |s: &Stage| matches!(&s.kind, Kind::Train(t) if t.model.as_ref() == Some(&stage.id));
        untrained && stages.iter().any(starts)
    };
    stages.iter().filter(move |s| s.kind.makes_model() && !is_start(s))
}

impl Kind {
    /// The models that the stage reads: (key, stage id or directory).
    pub fn inputs(&self) -> Vec<(&'static str, Option<String>)> {
        match self {
            Kind::Train(s) => vec![("model", s.model.clone())],
            Kind::Distill(s) => {
                let start = s.model.clone().map(|m| ("model", Some(m)));
                let more = MORE_TEACHERS.into_iter().zip(&s.teachers).map(|(role, t)| (role, Some(t.clone())));
                std::iter::once(("teacher", s.teacher.clone())).chain(start).chain(more).collect()
            }
            Kind::Prune(s) => vec![("model", s.model.clone()), ("teacher", s.teacher.clone())],
            Kind::Quantize(s) => {
                let teacher = s.teacher.clone().map(|t| ("teacher", Some(t)));
                std::iter::once(("model", s.model.clone())).chain(teacher).collect()
            }
            Kind::Eval(s) => vec![("model", s.model.clone())],
            Kind::Compare(s) => s.models.iter().map(|m| ("models", Some(m.clone()))).collect(),
        }
    }
}

impl Kind {
    /// Texts without labels.
    pub fn unlabelled(&self) -> Option<&str> {
        match self {
            Kind::Distill(s) => s.unlabelled.as_deref(),
            _ => None,
        }
    }

    /// The seed, for stages that have one.
    pub fn seed(&self) -> Option<u64> {
        match self {
            Kind::Train(s) => s.training.seed,
            Kind::Distill(s) => s.training.seed,
            Kind::Prune(s) => s.training.seed,
            Kind::Quantize(s) => s.training.seed,
            _ => None,
        }
    }

    /// Epochs that the stage trains.
    pub fn epochs(&self) -> usize {
        match self {
            Kind::Train(s) => s.training.epochs,
            Kind::Distill(s) => s.training.epochs,
            Kind::Prune(s) => s.training.epochs,
            Kind::Quantize(s) => s.training.epochs,
            Kind::Eval(_) | Kind::Compare(_) => 0,
        }
    }
}

impl Recipe {
    /// The recipe with nothing left open, as a recipe again.
    pub fn to_toml(&self) -> Result<String> {
        #[derive(Serialize)]
        struct Top<'a> {
            #[serde(skip_serializing_if = "Option::is_none")]
            model: &'a Option<String>,
            out: &'a Path,
            seed: u64,
            #[serde(skip_serializing_if = "Option::is_none")]
            threads: Option<usize>,
            #[serde(skip_serializing_if = "Option::is_none")]
            cache: &'a Option<PathBuf>,
            data: &'a Data,
            #[serde(skip_serializing_if = "is_default")]
            card: &'a Card,
        }
        fn is_default(card: &Card) -> bool {
            *card == Card::default()
        }
        let top = Top {
            model: &self.model,
            out: &self.out,
            seed: self.seed,
            threads: self.threads,
            cache: &self.cache,
            data: &self.data,
            card: &self.card,
        };
        let mut text = toml::to_string(&top)?;
        for stage in &self.stages {
            let mut table = Table::try_from(&stage.kind)?;
            if let Some(Value::Table(section)) = table.get_mut(stage.kind.name()) {
                section.insert("id".into(), Value::String(stage.id.clone()));
            }
            let one = Table::from_iter([("stage".to_string(), Value::Array(vec![Value::Table(table)]))]);
            text += &format!("\n{}", toml::to_string(&one)?);
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests;
