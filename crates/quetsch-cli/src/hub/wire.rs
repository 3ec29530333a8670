//! What is said to the hub: the list of a repository's files, what is known about one of them, its bytes.
//!
//! The crate hf-hub would do this, but its 0.5 checks neither size nor hash, appends a whole file to a partial one when
//! a server ignores `Range`, takes `ETag` as a file name whatever it is, panics at a redirect without `Location`, does
//! not try a metadata request again, and brings a dependency under the MPL. So this is ureq and the hub's paths.

mod answer;

use super::cache::{Cache, make_parent};
use super::environment::Environment;
use super::name::{Kind, Repo, check_file, is_commit};
use crate::ui::{self, Ui};
use answer::{
    Facts, absolute, check, content_range, escape, facts_of, facts_without_size, header_of, printable, same_host,
    size_of,
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

/// Tries of one request, and of a download that makes no progress.
const TRIES: u32 = 5;
/// The wait after the first try; it doubles.
const WAIT: Duration = Duration::from_millis(250);
/// The longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
/// Without an answer, or without a byte of it, for so long a connection counts as broken.
const SILENCE: Duration = Duration::from_secs(30);
const REDIRECTS: usize = 10;
/// The largest answer that is not a file.
const LIST_BYTES: u64 = 64 << 20;

/// Connections to the hub.
pub struct Wire<'a> {
    agent: Agent,
    env: &'a Environment,
    ui: &'a Ui,
}

/// A repository's files at one commit.
pub struct Listing {
    /// The commit.
    pub commit: String,
    /// The files.
    pub names: Vec<String>,
}

/// Why a request has no answer.
struct Refused {
    error: anyhow::Error,
    /// How long to wait before another try, if another may help.
    again: Option<Option<Duration>>,
}

impl From<anyhow::Error> for Refused {
    fn from(error: anyhow::Error) -> Refused {
        Refused { error, again: None }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Method {
    Head,
    Get,
}

/// Which redirects are followed.
#[derive(Clone, Copy, PartialEq)]
enum Follow {
    /// Those of renamed repositories. One that leads to another host is itself the answer: it has the headers.
    SameHost,
    All,
}

/// A request that does not find a repository or a file, told from others.
#[derive(Debug)]
pub struct NotFound(String);

impl NotFound {
    /// With what to say.
    pub fn new(message: String) -> NotFound {
        NotFound(message)
    }
}

impl std::fmt::Display for NotFound {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotFound {}

impl<'a> Wire<'a> {
    /// For the endpoint of the environment.
    pub fn new(env: &'a Environment, ui: &'a Ui) -> Wire<'a> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("quetsch/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE));
        Wire { agent: config.build().into(), env, ui }
    }

    /// The files of a repository.
    pub fn listing(&self, repo: &Repo, revision: &str) -> Result<Listing> {
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        let kind = if repo.kind == Kind::Model { "models" } else { "datasets" };
        let url = format!("{}/api/{kind}/{}/revision/{}", self.env.endpoint, repo.id, revision.replace('/', "%2F"));
        let what = format!("{} at {revision}", repo.id);
        let mut response = self.patient(|| self.ask(Method::Get, &url, None, Follow::All, &what))?;
        let text = response.body_mut().with_config().limit(LIST_BYTES).read_to_vec();
        let text = text.with_context(|| format!("{what}: no list of files from {}", self.env.endpoint))?;
        let info: Info = serde_json::from_slice(&text).map_err(|e| {
            anyhow!(
                "{what}: {url} did not answer with the list of a repository's files ({e}); is HF_ENDPOINT a hub?"
            )
        })?;
        ensure!(
            is_commit(&info.sha),
            "{what}: the hub names the commit {:?}: 40 hexadecimal digits expected",
            info.sha
        );
        let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        for name in &names {
            check_file(name).with_context(|| format!("{what} is refused: the hub lists a file that is none"))?;
        }
        Ok(Listing { commit: info.sha, names })
    }

    /// Puts a file of a commit into the cache.
    pub fn fetch(&self, cache: &Cache, repo: &Repo, commit: &str, name: &str) -> Result<PathBuf> {
        let kind = if repo.kind == Kind::Model { "" } else { "datasets/" };
        let url = format!("{}/{kind}{}/resolve/{commit}/{}", self.env.endpoint, repo.id, escape(name));
        let what = format!("{}: {name}", repo.id);
        let facts = self.facts(&url, commit, &what)?;
        let blob = cache.blob(&facts.etag);
        let _lock = cache.lock(&facts.etag)?;
        // Another commit's file may have the same content, and another process may have been faster.
        if !blob.exists() {
            self.download(&url, &blob, &facts, &what)?;
        }
        cache.link(commit, name, &facts.etag)
    }

    /// Size and content of a file, from a HEAD request. Some mirrors refuse it or answer without the headers: then from
    /// a request for the first byte.
    fn facts(&self, url: &str, commit: &str, what: &str) -> Result<Facts> {
        let head = self.ask(Method::Head, url, None, Follow::SameHost, what);
        match head.map_err(|r| r.error).and_then(|response| facts_of(&response, commit)) {
            Ok(facts) => return Ok(facts),
            Err(e) => tracing::debug!(url, "HEAD: {e:#}; asking for the first byte"),
        }
        let first = Some("bytes=0-0".to_string());
        let response = self.patient(|| self.ask(Method::Get, url, first.clone(), Follow::SameHost, what))?;
        if response.status().is_redirection() && size_of(&response).is_none() {
            // The pointer has no size: the place it points to has.
            let target = self.patient(|| self.ask(Method::Get, url, first.clone(), Follow::All, what))?;
            let size = size_of(&target).with_context(|| format!("{what}: {url} says no size"))?;
            return Ok(Facts { size, ..facts_without_size(&response, commit).with_context(|| what.to_string())? });
        }
        facts_of(&response, commit).with_context(|| format!("{what}: {url}"))
    }

    /// The bytes of a file, checked; goes on where an earlier try stopped.
    fn download(&self, url: &str, blob: &Path, facts: &Facts, what: &str) -> Result<()> {
        make_parent(blob)?;
        let mut partial = blob.as_os_str().to_owned();
        partial.push(".incomplete");
        let partial = PathBuf::from(partial);
        let cannot = || format!("cannot write {}", partial.display());
        let file = File::options().create(true).append(true).read(true).open(&partial);
        let mut file = file.with_context(cannot)?;
        let mut bar = self.ui.bar(facts.size / 1_000_000, "download");
        let mut resumed = file.metadata().with_context(cannot)?.len() > 0;
        let (mut most, mut tries) = (0, 0);
        loop {
            let before = file.metadata().with_context(cannot)?.len();
            if before > facts.size {
                file.set_len(0).with_context(cannot)?;
                continue;
            }
            if before == facts.size {
                let found = check(&mut file, facts).with_context(cannot)?;
                match found {
                    None => break,
                    Some(found) => {
                        file.set_len(0).with_context(cannot)?;
                        if !std::mem::take(&mut resumed) {
                            let _ = std::fs::remove_file(&partial); // the mismatch is the error to report
                            bail!(
                                "{what}: {} bytes came with the hash {found}, expected {}; nothing was kept. Try again, \
                                 or another mirror (HF_ENDPOINT, now {})",
                                facts.size,
                                facts.etag,
                                self.env.endpoint
                            );
                        }
                        // What an earlier run had left was of something else: once more from the start.
                        most = 0;
                        continue;
                    }
                }
            }
            let part = self.part(url, &mut file, before, facts.size, what, &mut bar);
            let there = file.metadata().with_context(cannot)?.len();
            if there > facts.size {
                let _ = std::fs::remove_file(&partial); // that there is too much is the error to report
                bail!(
                    "{what}: more than the {} bytes that were promised; nothing was kept. Try again, or another mirror \
                     (HF_ENDPOINT, now {})",
                    facts.size,
                    self.env.endpoint
                );
            }
            let broken = match part {
                Ok(()) if there == facts.size => continue,
                Ok(()) => Refused { error: anyhow!("{what}: the connection ended early"), again: Some(None) },
                Err(refused) => refused,
            };
            // A server that starts over, a byte more and a byte less, gets nowhere.
            if there > most {
                (most, tries) = (there, 0);
            }
            tries += 1;
            match broken.again {
                Some(wait) if tries < TRIES => self.pause(tries, wait, &broken.error)?,
                _ => {
                    return Err(broken.error.context(format!(
                        "{what}: {there} of {} bytes are here; the same command goes on from there",
                        facts.size
                    )));
                }
            }
        }
        file.sync_all().with_context(cannot)?;
        std::fs::rename(&partial, blob).with_context(|| format!("cannot write {}", blob.display()))
    }

    /// Appends what comes from byte `from` on, until the end or until the connection breaks.
    fn part(
        &self,
        url: &str,
        file: &mut File,
        from: u64,
        size: u64,
        what: &str,
        bar: &mut ui::Bar,
    ) -> Result<(), Refused> {
        let range = (from > 0).then(|| format!("bytes={from}-"));
        let response = self.ask(Method::Get, url, range, Follow::All, what)?;
        let goes_on = response.status() == StatusCode::PARTIAL_CONTENT
            && content_range(&response).is_some_and(|(start, _)| start == from);
        let mut at = from;
        if from > 0 && !goes_on {
            // The server ignores ranges, or this one.
            file.set_len(0).context("cannot shorten a partial download")?;
            at = 0;
        }
        // A server that sends more than it promised is not read to its end.
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader().take(size + 1 - at);
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) => {
                    let error = anyhow!("{what}: the connection broke: {e}");
                    return Err(Refused { error, again: Some(None) });
                }
            };
            file.write_all(&buffer[..n]).context("cannot write a partial download")?;
            at += n as u64;
            bar.at(at / 1_000_000, || format!("MB  {what}"));
            if ui::is_interrupted() {
                return Err(
                    crate::exit::interrupted(format!("{what}: interrupted; the same command goes on")).into()
                );
            }
        }
    }

    /// Asks again while that may help.
    fn patient(&self, ask: impl Fn() -> Result<Response<Body>, Refused>) -> Result<Response<Body>> {
        for tried in 1.. {
            match ask() {
                Ok(response) => return Ok(response),
                Err(Refused { again: Some(wait), error, .. }) if tried < TRIES => {
                    self.pause(tried, wait, &error)?
                }
                Err(Refused { error, .. }) => return Err(error),
            }
        }
        unreachable!("tries are counted to an end")
    }

    /// One request with its redirects. The token goes to the endpoint's host only.
    fn ask(
        &self,
        method: Method,
        url: &str,
        range: Option<String>,
        follow: Follow,
        what: &str,
    ) -> Result<Response<Body>, Refused> {
        let mut url = url.to_string();
        for _ in 0..REDIRECTS {
            let mut request = match method {
                Method::Head => self.agent.head(&url),
                Method::Get => self.agent.get(&url),
            };
            // Compressed, sizes and ranges would be those of something else.
            request = request.header(header::ACCEPT_ENCODING, "identity");
            if let Some(range) = &range {
                request = request.header(header::RANGE, range);
            }
            let is_home = same_host(&url, &self.env.endpoint);
            if let Some(token) = self.env.token.as_ref().filter(|_| is_home) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call().map_err(|e| self.unreachable(&url, what, &e))?;
            let status = response.status();
            tracing::debug!(url, %status, "asked the hub");
            if !status.is_redirection() {
                return match status.is_success() {
                    true => Ok(response),
                    false => Err(self.refused(&response, &url, what)),
                };
            }
            let target = header_of(&response, "location").and_then(|to| absolute(&url, to));
            let Some(target) = target else {
                return Err(anyhow!("{what}: {url} answers {status} and does not say where to").into());
            };
            let leaves = !same_host(&target, &url);
            if follow == Follow::SameHost && leaves {
                return Ok(response);
            }
            if url.starts_with("https:") && !target.starts_with("https:") {
                return Err(anyhow!("{what}: {url} leads to {target}, which is not encrypted").into());
            }
            url = target;
        }
        Err(anyhow!("{what}: more than {REDIRECTS} redirects, the last to {url}").into())
    }

    fn unreachable(&self, url: &str, what: &str, error: &ureq::Error) -> Refused {
        let error = anyhow!(
            "{what}: no answer from {url}: {error}. HF_ENDPOINT names a mirror (now {}); with HF_HUB_OFFLINE=1 or \
             --offline only the cache is used (HF_HOME, HF_HUB_CACHE; now {})",
            self.env.endpoint,
            self.env.cache.display()
        );
        Refused { error, again: Some(None) }
    }

    /// A status that is no answer, in words.
    fn refused(&self, response: &Response<Body>, url: &str, what: &str) -> Refused {
        let status = response.status();
        let said = header_of(response, "x-error-message").map(printable).filter(|m| !m.is_empty());
        let said = said.map_or(String::new(), |m| format!(" ({m})"));
        let token = match self.env.token {
            Some(_) => "the token of HF_TOKEN or of the file HF_TOKEN_PATH does not open it",
            None => "if it is private or gated, set HF_TOKEN (or HF_TOKEN_PATH) to a token that may read it",
        };
        let hint = match status.as_u16() {
            401 => format!("there is no such repository, or it is not open to everybody: {token}"),
            403 => format!(
                "access is not allowed: {token}, or the conditions of a gated repository are not accepted; some \
                 mirrors (HF_ENDPOINT, now {}) refuse, too",
                self.env.endpoint
            ),
            404 => {
                "there is no such repository, revision or file; a folder here must exist to be meant".to_string()
            }
            429 => "too many requests: wait some minutes; with a token (HF_TOKEN) more are allowed".to_string(),
            _ => format!("try again later, or another mirror (HF_ENDPOINT, now {})", self.env.endpoint),
        };
        let message = format!("{what}: {url} answers {status}{said}: {hint}");
        let error = match status {
            StatusCode::NOT_FOUND => NotFound(message).into(),
            _ => anyhow!(message),
        };
        let seconds =
            header_of(response, "retry-after").and_then(|s| s.trim().parse().ok()).map(Duration::from_secs);
        let passing = matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504);
        let again = (passing && seconds.is_none_or(|s| s <= LONGEST_WAIT)).then_some(seconds);
        Refused { error, again }
    }

    /// Waits before another try: as long as the server says, else twice as long each time.
    fn pause(&self, tried: u32, asked: Option<Duration>, why: &anyhow::Error) -> Result<()> {
        let wait = asked.unwrap_or(WAIT * 2u32.pow(tried - 1));
        tracing::info!("{why:#}; trying again in {} s", wait.as_secs_f32());
        (self.env.sleep)(wait);
        match ui::is_interrupted() {
            true => Err(crate::exit::interrupted("interrupted while waiting for the hub")),
            false => Ok(()),
        }
    }
}
