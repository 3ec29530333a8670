//! From a name to files: out of the cache if they are there, else from the hub.

use super::cache::Cache;
use super::choose::{self, Get};
use super::environment::Environment;
use super::name::{Repo, Split};
use super::wire::{NotFound, Wire};
use crate::ui::Ui;
use anyhow::{Result, bail};
use std::path::PathBuf;

/// The branch that a repository without a named revision is read at.
const MAIN: &str = "main";
/// Where the hub puts the Parquet files that it makes of every public data set.
const CONVERTED: &str = "refs/convert/parquet";

/// The folder of a model.
pub fn model(repo: Repo, ui: &Ui) -> Result<PathBuf> {
    let revision = repo.revision.clone().unwrap_or_else(|| MAIN.into());
    let visit = Visit::new(&repo, ui)?;
    let (folder, ()) = visit.run(&revision, |names, get| choose::model(&repo, names, get))?;
    Ok(folder)
}

/// The file, or the pattern of the files, of a part of a data set.
pub fn dataset(repo: Repo, part: Option<Split>, default: &str, ui: &Ui) -> Result<PathBuf> {
    let part = part.unwrap_or_else(|| Split { config: None, split: default.to_string() });
    let visit = Visit::new(&repo, ui)?;
    let at = |revision: &str, converted: bool| -> Result<PathBuf> {
        let pick = |names: &[String], get: Get| choose::dataset(&repo, names, &part, converted, get);
        let (folder, pattern) = visit.run(revision, pick)?;
        Ok(folder.join(pattern))
    };
    match &repo.revision {
        Some(revision) if revision == CONVERTED => at(revision, true),
        Some(revision) => at(revision, false),
        // What was read of the repository itself once is read there again.
        None if visit.knows(MAIN) && !visit.knows(CONVERTED) => at(MAIN, false),
        None => match at(CONVERTED, true) {
            // Nobody converted it: a private data set, or a mirror that has none of them.
            Err(e) if e.downcast_ref::<NotFound>().is_some() => at(MAIN, false),
            found => found,
        },
    }
}

/// One repository.
struct Visit<'a> {
    repo: &'a Repo,
    env: Environment,
    cache: Cache,
    ui: &'a Ui,
}

impl<'a> Visit<'a> {
    fn new(repo: &'a Repo, ui: &'a Ui) -> Result<Visit<'a>> {
        let mut env = Environment::read(|name| std::env::var(name).ok())?;
        env.offline |= ui.offline;
        let cache = Cache::new(&env.cache, repo);
        Ok(Visit { repo, env, cache, ui })
    }

    /// Whether a revision was read before.
    fn knows(&self, revision: &str) -> bool {
        self.cache.commit(revision).is_some_and(|commit| self.cache.snapshot(&commit).is_dir())
    }

    /// Gets what `pick` wants of the repository's files. Returns their folder.
    fn run<T>(&self, revision: &str, pick: impl Fn(&[String], Get) -> Result<T>) -> Result<(PathBuf, T)> {
        let known = self.cache.commit(revision);
        // Python's tools leave no list of what else there is; offline what they fetched is all there is.
        let listed = known.as_ref().and_then(|commit| self.cache.listing(commit));
        if let (Some(commit), true) = (&known, self.env.offline || listed.is_some()) {
            let names = listed.unwrap_or_else(|| self.cache.present(commit));
            match self.cached(commit, &names, &pick) {
                Ok(found) => return Ok((self.cache.snapshot(commit), found)),
                Err(e) if self.env.offline => return Err(e),
                Err(_) => {}
            }
        }
        if self.env.offline {
            let why = format!(
                "{} at {revision} is not in the cache {} (HF_HUB_CACHE, HF_HOME), and HF_HUB_OFFLINE, \
                 TRANSFORMERS_OFFLINE or --offline forbids to fetch it",
                self.repo.id,
                self.env.cache.display()
            );
            return Err(NotFound::new(why).into());
        }
        if self.env.token.is_some() && self.env.is_open() {
            let endpoint = &self.env.endpoint;
            self.ui.warn(format!("HF_ENDPOINT {endpoint} is not encrypted: others on the way can read the token"));
        }
        let wire = Wire::new(&self.env, self.ui);
        let listing = match (wire.listing(self.repo, revision), &known) {
            (Ok(listing), _) => listing,
            (Err(e), Some(commit)) if e.downcast_ref::<NotFound>().is_none() => {
                let Ok(found) = self.cached(commit, &self.cache.present(commit), &pick) else { return Err(e) };
                self.ui.warn(format!("{e:#}; using the cache's {} at {revision}, commit {commit}", self.repo.id));
                return Ok((self.cache.snapshot(commit), found));
            }
            (Err(e), _) => return Err(e),
        };
        let commit = &listing.commit;
        let mut said = false;
        let mut get = |name: &str| -> Result<PathBuf> {
            if let Some(path) = self.cache.file(commit, name)? {
                return Ok(path);
            }
            if !std::mem::replace(&mut said, true) {
                let (repo, from) = (&self.repo.id, &self.env.endpoint);
                self.ui.note(format!("{repo} at {revision} (commit {}) from {from}", &commit[..7]));
            }
            wire.fetch(&self.cache, self.repo, commit, name)
        };
        let found = pick(&listing.names, &mut get)?;
        self.cache.set_listing(commit, &listing.names)?;
        self.cache.set_commit(revision, commit)?;
        Ok((self.cache.snapshot(commit), found))
    }

    fn cached<T>(&self, commit: &str, names: &[String], pick: &impl Fn(&[String], Get) -> Result<T>) -> Result<T> {
        let mut get = |name: &str| match self.cache.file(commit, name)? {
            Some(path) => Ok(path),
            None => bail!(
                "{}: {name} of the commit {commit} is not in the cache {}; without HF_HUB_OFFLINE, \
                 TRANSFORMERS_OFFLINE and --offline it is fetched",
                self.repo.id,
                self.cache.folder().display()
            ),
        };
        pick(names, &mut get)
    }
}
