//! Where the models and data are that a recipe names.

use super::Recipe;
use crate::hub;
use crate::settings::Data;
use crate::ui::Ui;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What was looked for, and found.
#[derive(Clone, Debug, Default)]
pub struct Fetched {
    /// Models and texts without labels, by name.
    paths: BTreeMap<String, PathBuf>,
    /// The data.
    data: Data,
}

impl Recipe {
    /// The recipe with everything here that it names on the hub.
    pub fn fetched(&self, ui: &Ui) -> Result<Recipe> {
        let mut paths = BTreeMap::new();
        for kind in self.stages.iter().map(|s| &s.kind) {
            for (_, name) in kind.inputs() {
                if let Some(name) =
                    name.filter(|n| !paths.contains_key(n) && self.stages.iter().all(|s| s.id != *n))
                {
                    let path = hub::model(name.as_ref(), None, ui)?;
                    paths.insert(name, path);
                }
            }
            if let Some(name) = kind.unlabelled() {
                paths.insert(name.to_string(), hub::table(name.as_ref(), "train", ui)?);
            }
        }
        Ok(Recipe { fetched: Some(Fetched { paths, data: self.data.local(ui)? }), ..self.clone() })
    }

    /// Where a model or a file is that the recipe names.
    pub fn place(&self, name: &str) -> PathBuf {
        let found = self.fetched.as_ref().and_then(|f| f.paths.get(name));
        found.cloned().unwrap_or_else(|| PathBuf::from(name))
    }

    /// The data, in files that are here if they were fetched.
    pub fn local_data(&self) -> &Data {
        self.fetched.as_ref().map_or(&self.data, |f| &f.data)
    }
}
