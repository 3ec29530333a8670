//! What a stage's output was made from. Two outputs with the same provenance are the same; so a stage that finds its
//! own provenance has nothing to do. No time, no path: those stand in `report.json`.

use super::corpus::hash_of;
use crate::settings::Precision;
use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// The file's name.
pub const FILE: &str = "provenance.json";

/// Settings that do not change the result: where inputs lie (their hashes count), how often the state is saved.
const NOT_CONTENT: [&str; 3] = ["model", "teacher", "save-every"];

/// What an output was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Provenance {
    /// Version of this file's layout.
    pub version: u32,
    /// Program and version.
    pub tool: String,
    /// Kind of stage.
    pub stage: String,
    /// blake3 of every input by its role: model, teacher, train.
    pub inputs: BTreeMap<String, String>,
    /// Resolved settings.
    pub settings: Map<String, Value>,
    /// blake3 of all of the above.
    pub key: String,
}

impl Provenance {
    /// For a stage with these settings and inputs.
    pub fn new(stage: &str, settings: &impl Serialize, inputs: BTreeMap<String, String>) -> Result<Provenance> {
        let Value::Object(mut settings) = serde_json::to_value(settings)? else {
            anyhow::bail!("settings of {stage} are not an object");
        };
        settings.retain(|k, _| !NOT_CONTENT.contains(&k.as_str()));
        // What `auto` means depends on the CPU, and the result on what it means.
        if let Some(precision) = settings.get_mut("precision") {
            let chosen: Precision = serde_json::from_value(precision.clone())?;
            *precision = chosen.here().name().into();
        }
        let tool = concat!("quetsch ", env!("CARGO_PKG_VERSION")).to_string();
        let (version, stage) = (1, stage.to_string());
        let key = hash_of(&[
            &version.to_string(),
            &tool,
            &stage,
            &serde_json::to_string(&inputs)?,
            &serde_json::to_string(&settings)?,
        ]);
        Ok(Provenance { version, tool, stage, inputs, settings, key })
    }

    /// Of an output, if it is there and readable.
    pub fn read(dir: &Path) -> Option<Provenance> {
        serde_json::from_slice(&std::fs::read(dir.join(FILE)).ok()?).ok()
    }

    /// As JSON.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        Ok(json)
    }
}
