//! What is laid over a recipe: environment variables, then `--set`.

use super::TOP_KEYS;
use crate::exit::usage;
use crate::settings::{Card, Data, Settings};
use anyhow::Result;
use std::collections::BTreeMap;
use toml::{Table, Value};

/// A value that a flag or the environment puts over the file's.
#[derive(Clone, Debug)]
pub struct Override {
    /// `model`, `data.train`, `student.alpha`.
    pub key: String,
    /// As typed.
    pub value: String,
    /// How to name it in messages: `--set student.alpha=2`.
    pub origin: String,
}

impl Override {
    /// From `--set KEY=VALUE`.
    pub fn from_flag(text: &str) -> Result<Override> {
        let (key, value) =
            text.split_once('=').ok_or_else(|| usage(format!("--set {text}: expected KEY=VALUE")))?;
        Ok(Override {
            key: key.trim().into(),
            value: value.trim().into(),
            origin: format!("--set {}", text.trim()),
        })
    }

    /// A value is TOML if it can be read as TOML, else text: epochs=3, layers=[1,3], out=my-folder.
    pub fn value(&self) -> Value {
        let value = toml::from_str::<Table>(&format!("v = {}", self.value)).ok().and_then(|mut t| t.remove("v"));
        value.unwrap_or_else(|| Value::String(self.value.clone()))
    }
}

/// `QUETSCH_SEED`, `QUETSCH_TRAIN`, `QUETSCH_STUDENT_ALPHA` as overrides of `seed`, `data.train`, `student.alpha`.
pub fn from_environment(environment: &BTreeMap<String, String>, ids: &[String]) -> Vec<Override> {
    let upper = |s: &str| s.to_uppercase().replace(['-', '.'], "_");
    let mut keys: Vec<String> = TOP_KEYS.iter().map(|k| k.to_string()).collect();
    keys.extend(Data::keys().iter().map(|k| format!("data.{k}")));
    keys.extend(Card::keys().iter().map(|k| format!("card.{k}")));
    let mut found = vec![];
    for (name, value) in environment {
        let Some(rest) = name.strip_prefix("QUETSCH_") else { continue };
        let top =
            keys.iter().find(|k| upper(k.trim_start_matches("data.").trim_start_matches("card.")) == rest).cloned();
        let staged = || {
            let matching = ids.iter().filter_map(|id| Some((id, rest.strip_prefix(&format!("{}_", upper(id)))?)));
            let (id, key) = matching.max_by_key(|(id, _)| id.len())?;
            Some(format!("{id}.{}", key.to_lowercase().replace('_', "-")))
        };
        if let Some(key) = top.or_else(staged) {
            found.push(Override { key, value: value.clone(), origin: format!("{name}={value}") });
        }
    }
    found
}
