//! From a name to files: out of the cache if they are there, else from the hub.

use super::cache::Cache;
use super::choose::{self, Get};
use super::environment::Environment;
use super::name::{Repo, Split};
use super::wire::{NotFound, Wire};
use crate::args::Format;
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// The branch that a repository without a named revision is read at.
const MAIN: &str = "main";
/// Where the hub puts the Parquet files that it makes of every public data set.
const CONVERTED: &str = "refs/convert/parquet";

/// The folder of a model.
pub fn model(repo: Repo, ui: &Ui) -> Result<PathBuf> {
    model_of(repo, Environment::of_process(ui)?, ui)
}

/// The file, or the pattern of the files, of a part of a data set.
pub fn dataset(repo: Repo, part: Option<Split>, default: &str, ui: &Ui) -> Result<PathBuf> {
    let part = part.unwrap_or_else(|| Split { config: None, split: default.to_string() });
    dataset_of(repo, part, Environment::of_process(ui)?, ui)
}

/// The model (`hf:ORG/NAME`) or the data (`hf:ORG/NAME:SPLIT`) of a hub, fetched into a cache without waiting between
/// tries: for the fuzz target.
///
/// # Errors
/// As [`super::model`].
#[doc(hidden)]
pub fn fetch_from(endpoint: &str, cache: &Path, name: &str) -> Result<PathBuf> {
    let (endpoint, cache) = (endpoint.to_owned(), cache.to_owned());
    let env = Environment { endpoint, cache, offline: false, token: None, sleep: drop };
    let ui = Ui::new(Format::Human, true, true, Some(1));
    match Repo::dataset(name)? {
        Some((repo, Some(part))) => dataset_of(repo, part, env, &ui),
        _ => model_of(Repo::model(name)?.with_context(|| format!("{name} is here"))?, env, &ui),
    }
}

fn model_of(repo: Repo, env: Environment, ui: &Ui) -> Result<PathBuf> {
    let revision = repo.revision.clone().unwrap_or_else(|| MAIN.into());
    let visit = Visit::new(&repo, env, ui);
    let (folder, ()) = visit.run(&revision, |names, get| choose::model(&repo, names, get))?;
    Ok(folder)
}

fn dataset_of(repo: Repo, part: Split, env: Environment, ui: &Ui) -> Result<PathBuf> {
    let visit = Visit::new(&repo, env, ui);
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
    fn new(repo: &'a Repo, env: Environment, ui: &'a Ui) -> Visit<'a> {
        let cache = Cache::new(&env.cache, repo);
        Visit { repo, env, cache, ui }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    /// What a hub leads to whose file of 6 bytes comes as these bodies, one after the other and again.
    fn error_of(bodies: &'static [&'static str]) -> String {
        const LISTING: &str = r#"{"sha": "0123456789abcdef0123456789abcdef01234567",
            "siblings": [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]}"#;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let mut bodies = bodies.iter().cycle();
        let mut answer = move |stream: TcpStream| {
            let mut stream = BufReader::new(stream);
            let mut request = String::new();
            while !request.ends_with("\r\n\r\n") {
                assert!(stream.read_line(&mut request).expect("a request") > 0);
            }
            let (size, body) = match &request[..4] {
                "HEAD" => (6, ""),
                _ if request.starts_with("GET /api") => (LISTING.len(), LISTING),
                _ => bodies.next().map(|b| (b.len().max(6), *b)).expect("a body"),
            };
            let head = format!("HTTP/1.1 200 OK\r\nETag: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n");
            stream.get_mut().write_all(&[head, body.into()].concat().into_bytes()).expect("a client");
        };
        std::thread::spawn(move || listener.incoming().flatten().for_each(&mut answer));
        let cache = tempfile::tempdir().expect("a folder");
        let found = fetch_from(&endpoint, cache.path(), "hf:org/tiny");
        format!("{:#}", found.expect_err("no such file"))
    }

    /// Both were asked for without end.
    #[test]
    fn a_file_that_never_is_whole_is_an_error() {
        for (bodies, word) in [(&["seven b"][..], "more than the 6 bytes"), (&["abc", "ab"], "of 6 bytes are here")]
        {
            let error = error_of(bodies);
            assert!(error.contains(word), "{bodies:?}: {error}");
        }
    }
}
