//! The environment variables of Hugging Face's own tools, with their meanings.

use crate::exit::usage;
use crate::ui::Ui;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::time::Duration;

/// What the environment says about the hub.
#[derive(Clone)]
pub struct Environment {
    /// Where the hub is, without a slash at the end.
    pub endpoint: String,
    /// The cache.
    pub cache: PathBuf,
    /// Only the cache is used.
    pub offline: bool,
    /// The token that is sent to the endpoint.
    pub token: Option<String>,
    /// How to wait before another try.
    pub sleep: fn(Duration),
}

impl Environment {
    /// Of this process.
    pub fn of_process(ui: &Ui) -> Result<Environment> {
        let env = Environment::read(|name| std::env::var(name).ok())?;
        Ok(Environment { offline: env.offline || ui.offline, ..env })
    }

    /// From variables.
    pub fn read(var: impl Fn(&str) -> Option<String>) -> Result<Environment> {
        let var = |name: &str| var(name).filter(|v| !v.trim().is_empty());
        let is_on = |name: &str| {
            var(name).is_some_and(|v| matches!(v.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        let path = |name: &str| var(name).map(|v| expanded(&v, &var));
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let endpoint = endpoint.trim().trim_end_matches('/').to_string();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(usage(format!("HF_ENDPOINT={endpoint}: expected a URL such as https://hf-mirror.com")));
        }
        let home = || -> Option<PathBuf> {
            let below = |cache: PathBuf| cache.join("huggingface");
            path("HF_HOME")
                .or_else(|| path("XDG_CACHE_HOME").map(below))
                .or_else(|| std::env::home_dir().map(|home| below(home.join(".cache"))))
        };
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let cache = cache.or_else(|| home().map(|home| home.join("hub")));
        let cache = cache.context("no home directory for the hub's cache: set HF_HOME")?;
        let file = || std::fs::read_to_string(path("HF_TOKEN_PATH").or_else(|| Some(home()?.join("token")))?).ok();
        let token = match is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            true => None,
            false => var("HF_TOKEN").or_else(file),
        };
        let token = token.map(|t| t.trim().to_string()).filter(|t| !t.is_empty());
        if token.as_ref().is_some_and(|t| !t.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(usage("the token of HF_TOKEN or HF_TOKEN_PATH has characters that no token has"));
        }
        let offline = is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE");
        Ok(Environment { endpoint, cache, offline, token, sleep: std::thread::sleep })
    }

    /// Whether what is sent to the endpoint can be read on the way.
    pub fn is_open(&self) -> bool {
        let host = self.endpoint.strip_prefix("http://");
        host.is_some_and(|h| {
            !["127.0.0.1", "localhost", "[::1]"]
                .iter()
                .any(|own| h.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '/'])))
        })
    }
}

/// `~` at the start is the home directory.
fn expanded(path: &str, var: &impl Fn(&str) -> Option<String>) -> PathBuf {
    match (path.strip_prefix("~/"), var("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Variables and their values.
    type Set<'a> = &'a [(&'a str, &'a str)];

    fn read(set: Set) -> Environment {
        let found = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        Environment::read(found).expect("sound")
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let rows: [(Set, &str); 5] = [
            (&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/h/hub"),
            (&[("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/c"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "~/h"), ("HOME", "/me")], "/me/h/hub"),
        ];
        for (set, want) in rows {
            assert_eq!(read(set).cache, PathBuf::from(want), "{set:?}");
        }
    }

    #[test]
    fn tokens_come_from_the_variable_or_a_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("token");
        std::fs::write(&path, "from-file\n").expect("written");
        let (home, path) = (dir.path().to_str().expect("UTF-8"), path.to_str().expect("UTF-8"));
        let rows: [(Set, Option<&str>); 5] = [
            (&[("HF_HOME", home), ("HF_TOKEN", " t ")], Some("t")),
            (&[("HF_HOME", home)], Some("from-file")),
            (&[("HF_HOME", "/nowhere"), ("HF_TOKEN_PATH", path)], Some("from-file")),
            (&[("HF_HOME", "/nowhere")], None),
            (&[("HF_HOME", home), ("HF_TOKEN", "t"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
        ];
        for (set, want) in rows {
            assert_eq!(read(set).token.as_deref(), want, "{set:?}");
        }
    }

    #[test]
    fn switches_and_endpoints() {
        let h = ("HF_HOME", "/h");
        assert_eq!(read(&[h, ("HF_ENDPOINT", "https://hf-mirror.com/")]).endpoint, "https://hf-mirror.com");
        for (endpoint, want) in [
            ("https://a.example", false),
            ("http://a.example", true),
            ("http://localhost:80", false),
            ("http://127.0.0.1", false),
            ("http://localhost.example", true),
        ] {
            assert_eq!(read(&[h, ("HF_ENDPOINT", endpoint)]).is_open(), want, "{endpoint}");
        }
        for (name, value, want) in [
            ("HF_HUB_OFFLINE", "1", true),
            ("TRANSFORMERS_OFFLINE", "yes", true),
            ("HF_HUB_OFFLINE", "0", false),
            ("HF_HUB_OFFLINE", "", false),
        ] {
            assert_eq!(read(&[h, (name, value)]).offline, want, "{name}={value}");
        }
        for bad in [("HF_ENDPOINT", "hf-mirror.com"), ("HF_TOKEN", "a\nb")] {
            let found = |name: &str| [h, bad].iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
            assert!(Environment::read(found).is_err(), "{bad:?}");
        }
    }
}
