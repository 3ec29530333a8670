//! A little hub on this machine: the paths, headers and bad manners that a client meets, and a record of what it asked.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// A file of a repository.
#[derive(Clone)]
pub struct File {
    pub bytes: Vec<u8>,
    /// The name of its content.
    pub etag: String,
    /// Large files are pointed to: the answer is a redirect to `/lfs/...`.
    pub large: bool,
}

/// How the server behaves; everything else is as the hub does it.
#[derive(Clone, Default)]
pub struct Manners {
    /// HEAD is refused with this status.
    pub head: Option<u16>,
    /// So many requests are answered with 429 first.
    pub busy: usize,
    /// So many answers with bytes of a file end in the middle.
    pub cuts: usize,
    /// `Range` is ignored.
    pub no_range: bool,
    /// Without this token: 401.
    pub token: Option<String>,
    /// `X-Repo-Commit` and the list name this commit in place of the right one.
    pub other_commit: Option<String>,
    /// Files listed beside those that are there.
    pub listed: Vec<String>,
    /// Large files are on another host (port).
    pub elsewhere: Option<u16>,
}

#[derive(Default)]
struct State {
    /// By `models/org/name@revision` or `datasets/...`: commit and files.
    repos: HashMap<String, (String, HashMap<String, File>)>,
    manners: Manners,
    /// Method, path, `Range`, whether a token came.
    asked: Vec<String>,
}

/// The server; it ends with the test's process.
#[derive(Clone)]
pub struct Hub {
    pub port: u16,
    state: Arc<Mutex<State>>,
}

/// A commit of these digits.
pub fn commit(digit: char) -> String {
    digit.to_string().repeat(40)
}

impl Hub {
    pub fn start() -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let hub = Hub { port: listener.local_addr().expect("a port").port(), state: Arc::default() };
        let served = hub.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hub = served.clone();
                // A client that goes away is no fault of the server.
                std::thread::spawn(move || hub.serve(stream).ok());
            }
        });
        hub
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Adds a file: small ones are named by a digest of git's kind, large ones by SHA-256.
    pub fn add(&self, repo: &str, commit: &str, name: &str, bytes: &[u8], etag: &str) -> &Hub {
        let file = File { bytes: bytes.to_vec(), etag: etag.into(), large: etag.len() == 64 };
        let mut state = self.state.lock().expect("state");
        let entry = state.repos.entry(repo.into()).or_insert_with(|| (commit.into(), HashMap::new()));
        entry.1.insert(name.into(), file);
        drop(state);
        self
    }

    pub fn behave(&self, manners: Manners) {
        self.state.lock().expect("state").manners = manners;
    }

    /// What was asked since the last call.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().expect("state").asked)
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut stream = stream;
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 {
            let mut words = line.split_whitespace();
            let (method, path) = (words.next().unwrap_or("").to_string(), words.next().unwrap_or("").to_string());
            let (mut range, mut token) = (None, None);
            loop {
                line.clear();
                if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
                    break;
                }
                let (key, value) = line.trim().split_once(':').unwrap_or((line.trim(), ""));
                match key.to_lowercase().as_str() {
                    "range" => range = Some(value.trim().to_string()),
                    "authorization" => token = value.trim().strip_prefix("Bearer ").map(str::to_string),
                    _ => {}
                }
            }
            line.clear();
            if !self.answer(&mut stream, &method, &path, range, token)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether the connection stays.
    fn answer(
        &self,
        to: &mut TcpStream,
        method: &str,
        path: &str,
        range: Option<String>,
        token: Option<String>,
    ) -> std::io::Result<bool> {
        let mut state = self.state.lock().expect("state");
        let shown = range.as_ref().map_or(String::new(), |r| format!(" {r}"));
        let with = if token.is_some() { " token" } else { "" };
        state.asked.push(format!("{method} {path}{shown}{with}"));
        let manners = state.manners.clone();
        let is_head = method == "HEAD";
        let mut say = |status: &str, headers: &[(&str, String)], body: &[u8]| -> std::io::Result<bool> {
            let mut head = format!("HTTP/1.1 {status}\r\n");
            if !headers.iter().any(|(k, _)| *k == "Content-Length") {
                head += &format!("Content-Length: {}\r\n", body.len());
            }
            headers.iter().for_each(|(k, v)| head += &format!("{k}: {v}\r\n"));
            to.write_all(head.as_bytes())?;
            to.write_all(b"\r\n")?;
            if !is_head {
                to.write_all(body)?;
            }
            to.flush()?;
            Ok(true)
        };
        if let Some(status) = manners.head.filter(|_| is_head) {
            return say(&format!("{status} No"), &[], b"");
        }
        if state.manners.busy > 0 {
            state.manners.busy -= 1;
            return say("429 Too Many Requests", &[("Retry-After", "0".into())], b"slow down");
        }
        let is_pointed_to = path.starts_with("/lfs/");
        if manners.token.is_some() && manners.token != token && !is_pointed_to {
            let message = ("X-Error-Message", "Invalid username or password.".to_string());
            return say("401 Unauthorized", &[message], b"");
        }
        let kind = |rest: &str| match rest.strip_prefix("datasets/") {
            Some(rest) => format!("datasets/{rest}"),
            None => format!("models/{}", rest.strip_prefix("models/").unwrap_or(rest)),
        };
        if let Some((repo, revision)) = path.strip_prefix("/api/").and_then(|p| p.split_once("/revision/")) {
            let key = format!("{}@{}", kind(repo), revision.replace("%2F", "/"));
            let Some((commit, files)) = state.repos.get(&key) else {
                return say("404 Not Found", &[("X-Error-Code", "RevisionNotFound".into())], b"{}");
            };
            let names = files.keys().chain(&manners.listed);
            let siblings: Vec<_> = names.map(|n| serde_json::json!({ "rfilename": n })).collect();
            let sha = manners.other_commit.as_ref().unwrap_or(commit);
            let body = serde_json::json!({ "sha": sha, "siblings": siblings }).to_string();
            return say("200 OK", &[], body.as_bytes());
        }
        let Some((repo, rest)) =
            path.trim_start_matches("/lfs").strip_prefix('/').and_then(|p| p.split_once("/resolve/"))
        else {
            return say("404 Not Found", &[], b"");
        };
        let Some((wanted, name)) = rest.split_once('/') else { return say("404 Not Found", &[], b"") };
        let of = format!("{}@", kind(repo));
        let found = state.repos.iter().find(|(key, (commit, _))| key.starts_with(&of) && commit == wanted);
        let name = name.replace("%20", " ");
        let Some(file) = found.and_then(|(_, (_, files))| files.get(&name)).cloned() else {
            return say("404 Not Found", &[("X-Error-Code", "EntryNotFound".into())], b"");
        };
        let commit = manners.other_commit.clone().unwrap_or_else(|| wanted.to_string());
        let quoted = format!("\"{}\"", file.etag);
        if file.large && !is_pointed_to {
            let port = manners.elsewhere.unwrap_or(self.port);
            let place = match manners.elsewhere {
                None => format!("/lfs{path}"),
                Some(_) => format!("http://127.0.0.1:{port}/lfs{path}"),
            };
            let headers = [
                ("Location", place),
                ("X-Repo-Commit", commit),
                ("X-Linked-Etag", quoted),
                ("X-Linked-Size", file.bytes.len().to_string()),
            ];
            return say("302 Found", &headers, b"moved");
        }
        let mut headers = vec![("ETag", quoted.clone()), ("X-Repo-Commit", commit)];
        if is_pointed_to {
            headers.push(("X-Linked-Etag", quoted));
        }
        let size = file.bytes.len();
        let range = range.filter(|_| !manners.no_range);
        let asked = range.as_ref().and_then(|r| r.strip_prefix("bytes=")?.split_once('-'));
        let (status, from, to_byte) = match asked {
            None => ("200 OK", 0, size),
            Some((from, end)) => {
                let from: usize = from.parse().unwrap_or(0);
                let end = end.parse::<usize>().map_or(size, |e| e + 1).min(size);
                headers.push(("Content-Range", format!("bytes {from}-{}/{size}", end.max(1) - 1)));
                ("206 Partial Content", from.min(end), end)
            }
        };
        let body = &file.bytes[from..to_byte];
        if !is_head && state.manners.cuts > 0 && body.len() > 1 {
            state.manners.cuts -= 1;
            headers.push(("Content-Length", body.len().to_string()));
            say(status, &headers, &body[..body.len() / 2])?;
            return Ok(false);
        }
        say(status, &headers, body)
    }
}
