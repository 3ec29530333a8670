//! Models and data sets of the Hugging Face hub, by name: found in the cache that Python's tools share, fetched into it
//! where they are not. What is here is used without a word to the network: an argument that exists is local, and files
//! of a revision that the cache knows are not asked for again.
//!
//! Without the cargo feature `hub` the names are known, and an error says what to do.

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod choose;
#[cfg(feature = "hub")]
mod environment;
#[cfg(feature = "hub")]
mod fetch;
// Without the feature nobody asks for folders and files.
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
mod name;
#[cfg(feature = "hub")]
mod wire;

#[cfg(feature = "hub")]
pub use fetch::fetch_from;

use crate::settings::Data;
use crate::ui::Ui;
use anyhow::Result;
use name::PREFIX;
pub use name::Repo;
use std::path::{Path, PathBuf};

/// The folder of the model that a flag or a recipe names.
///
/// # Errors
/// A name of the hub that cannot be found there or in the cache, or cannot be fetched.
pub fn model(name: &Path, revision: Option<&str>, ui: &Ui) -> Result<PathBuf> {
    let found = name.to_str().map(Repo::model).transpose()?.flatten();
    match (found, revision) {
        (Some(repo), None) => fetch::model(repo, ui),
        (Some(repo), Some(revision)) => fetch::model(repo.at(revision)?, ui),
        (None, None) => Ok(name.to_path_buf()),
        (None, Some(_)) => Err(crate::exit::usage(format!(
            "--revision is of a model on the hub (ORG/NAME), {} is a path",
            name.display()
        ))),
    }
}

/// The file of the table that a flag or a recipe names; `split` is the part of a data set if the name has none.
///
/// # Errors
/// As [`model`].
pub fn table(name: &Path, split: &str, ui: &Ui) -> Result<PathBuf> {
    match name.to_str().map(Repo::dataset).transpose()?.flatten() {
        None => Ok(name.to_path_buf()),
        Some((repo, part)) => fetch::dataset(repo, part, split, ui),
    }
}

/// Whether a name will be looked for on the hub.
pub fn is_remote(name: &Path) -> bool {
    name.to_str().is_some_and(|n| n.starts_with(PREFIX) || matches!(Repo::model(n), Ok(Some(_))))
}

impl Data {
    /// The same with files that are here.
    ///
    /// # Errors
    /// As [`model`].
    pub fn local(&self, ui: &Ui) -> Result<Data> {
        let here = |name: &Option<String>, split: &str| -> Result<Option<String>> {
            let path = name.as_ref().map(|n| table(n.as_ref(), split, ui)).transpose()?;
            Ok(path.map(|p| p.to_string_lossy().into_owned()))
        };
        Ok(Data { train: here(&self.train, "train")?, test: here(&self.test, "test")?, ..self.clone() })
    }
}

/// What stands in for the network in a program without it.
#[cfg(not(feature = "hub"))]
mod fetch {
    use super::name::{Repo, Split};
    use crate::exit::usage;
    use crate::ui::Ui;
    use anyhow::Result;
    use std::path::PathBuf;

    pub fn model(repo: Repo, _: &Ui) -> Result<PathBuf> {
        Err(usage(format!(
            "{repo}: no such folder, and this quetsch was built without the hub (cargo feature `hub`); download the \
             model and give its folder"
        )))
    }

    pub fn dataset(repo: Repo, _: Option<Split>, _: &str, _: &Ui) -> Result<PathBuf> {
        Err(usage(format!(
            "hf:{repo}: this quetsch was built without the hub (cargo feature `hub`); download the data set and give \
             its file"
        )))
    }
}
