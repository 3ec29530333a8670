//! What people write for a repository of the Hugging Face hub, and which of it can be trusted as part of a path or a
//! URL. Nothing here knows the network.

use crate::exit::usage;
use anyhow::{Result, bail, ensure};
use std::fmt;
use std::path::Path;

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

/// A repository at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    /// What it holds.
    pub kind: Kind,
    /// `org/name`, or `name` alone for the oldest ones.
    pub id: String,
    /// Branch, tag or commit, if one is named.
    pub revision: Option<String>,
}

/// Part of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// The data set's configuration, if one is named.
    pub config: Option<String>,
    /// `train`, `test`.
    pub split: String,
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.revision {
            None => f.write_str(&self.id),
            Some(revision) => write!(f, "{}@{revision}", self.id),
        }
    }
}

/// In front of a name that is one of the hub, whatever is here.
pub const PREFIX: &str = "hf:";

impl Repo {
    /// The model that a flag or a recipe names, if it is not here: `hf:NAME[@REVISION]`, or `ORG/NAME[@REVISION]`
    /// where there is no such path, nor a folder `ORG` that it would lie in.
    ///
    /// # Errors
    /// `hf:` and no name that the hub could have.
    pub fn model(text: &str) -> Result<Option<Repo>> {
        if let Some(name) = text.strip_prefix(PREFIX) {
            return Repo::parse(Kind::Model, name).map(Some);
        }
        let Some((org, name)) = text.split_once('/') else { return Ok(None) };
        let is_here = Path::new(text).exists() || Path::new(org).exists();
        if is_here || name.contains('/') && !name.contains('@') {
            return Ok(None);
        }
        // What cannot be a name is a path, and the reader says that it is not there.
        Ok(Repo::parse(Kind::Model, text).ok())
    }

    /// The data that a flag or a recipe names, if on the hub: `hf:NAME[@REVISION][:[CONFIG/]SPLIT]`.
    ///
    /// # Errors
    /// `hf:` and no name that the hub could have.
    pub fn dataset(text: &str) -> Result<Option<(Repo, Option<Split>)>> {
        let Some(text) = text.strip_prefix(PREFIX) else { return Ok(None) };
        let (name, split) = match text.split_once(':') {
            None => (text, None),
            Some((name, split)) => (name, Some(split)),
        };
        let split = split.map(|text| {
            let (config, split) = match text.split_once('/') {
                None => (None, text),
                Some((config, split)) => (Some(config.to_string()), split),
            };
            let plain = config.iter().map(String::as_str).chain([split]).all(is_plain);
            ensure!(plain, "{PREFIX}{name}:{text}: expected a split (train) or CONFIG/SPLIT (default/train)");
            Ok(Split { config, split: split.to_string() })
        });
        let split = split.transpose().map_err(|e| usage(e.to_string()))?;
        Ok(Some((Repo::parse(Kind::Dataset, name)?, split)))
    }

    fn parse(kind: Kind, text: &str) -> Result<Repo> {
        let (id, revision) = match text.split_once('@') {
            None => (text, None),
            Some((id, revision)) => (id, Some(revision)),
        };
        let parts: Vec<&str> = id.split('/').collect();
        let fine = (1..=2).contains(&parts.len()) && parts.iter().all(|part| is_id(part));
        if !fine {
            return Err(usage(format!(
                "{text:?} is no name of a hub repository: expected ORG/NAME, of letters, digits, `-`, `_` and `.`"
            )));
        }
        let repo = Repo { kind, id: id.to_string(), revision: None };
        match revision {
            None => Ok(repo),
            Some(revision) => repo.at(revision),
        }
    }

    /// The same at a branch, tag or commit.
    pub fn at(mut self, revision: &str) -> Result<Repo> {
        let fine = !revision.is_empty() && revision.split('/').all(is_plain);
        if !fine {
            return Err(usage(format!("{revision:?} is no revision: expected a branch, a tag or a commit")));
        }
        self.revision = Some(revision.to_string());
        Ok(self)
    }

    /// Its folder in the cache, as huggingface_hub names it.
    pub fn folder(&self) -> String {
        let kind = if self.kind == Kind::Model { "models" } else { "datasets" };
        format!("{kind}--{}", self.id.replace('/', "--"))
    }

    /// The repository and the commit that a path lies in, if it is one of the cache.
    pub fn of_path(path: &Path) -> Option<Repo> {
        let parts: Vec<&str> = path.iter().filter_map(|p| p.to_str()).collect();
        let at = parts.windows(3).rposition(|w| w[1] == "snapshots" && is_commit(w[2]))?;
        let (kind, id) = parts[at].split_once("--")?;
        let kind = match kind {
            "models" => Kind::Model,
            "datasets" => Kind::Dataset,
            _ => return None,
        };
        let id = id.replace("--", "/");
        let fine = id.split('/').count() <= 2 && id.split('/').all(is_id);
        fine.then(|| Repo { kind, id, revision: Some(parts[at + 2].to_string()) })
    }
}

/// Half of an id; the hub's own rule.
fn is_id(part: &str) -> bool {
    is_plain(part) && !part.contains("--") && !part.ends_with(['-', '.'])
}

/// Something that names one level of a path and nothing else: no `..`, no `.hidden`, no option of a command.
fn is_plain(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=96).contains(&part.len())
        && part.chars().all(plain)
        && !part.starts_with(['.', '-'])
        && !part.contains("..")
}

/// A commit: 40 hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Checks the name of a file as a server told it: it must stay inside its folder on every system.
///
/// # Errors
/// It would not.
pub fn check_file(name: &str) -> Result<()> {
    let level = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.len() <= 255
            && !part.ends_with(['.', ' '])
            && !part.chars().any(|c| c.is_control() || matches!(c, '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|'))
    };
    if name.len() > 1024 || !name.split('/').all(level) {
        let shown: String = name.chars().take(80).collect();
        bail!("{shown:?} is no name for a file inside a folder");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn models_are_told_from_paths() {
        let model = |id: &str, revision: Option<&str>| {
            Some(Repo { kind: Kind::Model, id: id.into(), revision: revision.map(str::to_string) })
        };
        let rows = [
            ("org/name", model("org/name", None)),
            ("org/name@v1.0", model("org/name", Some("v1.0"))),
            ("org/name@refs/pr/1", model("org/name", Some("refs/pr/1"))),
            ("hf:org/name", model("org/name", None)),
            ("hf:bert-base-uncased", model("bert-base-uncased", None)),
            // A path: because it cannot be a name, or because it could lie in a folder that is here (`src`).
            ("name", None),
            ("./org/name", None),
            ("../name", None),
            ("/org/name", None),
            ("org/name/deeper", None),
            ("org/..", None),
            ("org/a b", None),
            ("src/no-such-model", None),
        ];
        for (text, want) in rows {
            assert_eq!(Repo::model(text).expect(text), want, "{text}");
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let ids = [
            "",
            "/",
            "a/",
            "/a",
            "a/b/c",
            "../etc",
            "a/..",
            ".a/b",
            "a/.b",
            "a/-b",
            "a--b/c",
            "a/b c",
            "a/b\n",
            "a\\b",
            "a/b%2f",
            "a/b?x",
            "a/b#x",
            "ä/b",
            "a/b.",
            "a/b@",
            "a/b@..",
            "a/b@x/../y",
            "a/b@/x",
            "a/b@x y",
            "a/b@-x",
        ];
        for id in ids {
            assert!(Repo::model(&format!("hf:{id}")).is_err(), "model {id:?}");
            assert!(Repo::dataset(&format!("hf:{id}")).is_err(), "data set {id:?}");
        }
        for split in ["", "..", "a/..", "../a", "a/b/c", "/", "a b", "a*"] {
            assert!(Repo::dataset(&format!("hf:a/b:{split}")).is_err(), "split {split:?}");
        }
        let files =
            ["", "/etc/passwd", "../x", "a/../x", "a//x", "a/.", "C:x", "a\\x", "a\nx", "a\0x", "x ", "x.", "a*"];
        for file in files {
            assert!(check_file(file).is_err(), "file {file:?}");
        }
        for file in ["config.json", ".gitattributes", "data/train-00000-of-00001.parquet", "ein Modell/ä.json"] {
            assert!(check_file(file).is_ok(), "file {file:?}");
        }
        for commit in ["main", "", &SHA[1..], &SHA.to_uppercase(), "../../../../../../../../../../../../etc"] {
            assert!(!is_commit(commit), "{commit:?}");
        }
        assert!(is_commit(SHA));
    }

    #[test]
    fn data_sets_have_splits() {
        let read = |text: &str| Repo::dataset(text).expect(text);
        assert_eq!(read("data/train.csv"), None);
        let (repo, split) = read("hf:org/name@v1:default/train").expect("on the hub");
        assert_eq!((repo.to_string(), repo.folder()), ("org/name@v1".into(), "datasets--org--name".into()));
        assert_eq!(split, Some(Split { config: Some("default".into()), split: "train".into() }));
        assert_eq!(read("hf:name").map(|(r, s)| (r.id, s)), Some(("name".to_string(), None)));
    }

    #[test]
    fn a_path_of_the_cache_says_what_it_is() {
        let of = |path: String| Repo::of_path(Path::new(&path)).map(|r| (r.kind, r.id));
        let rows = [
            (format!("/h/models--org--name/snapshots/{SHA}"), Some((Kind::Model, "org/name".to_string()))),
            (
                format!("h/datasets--name/snapshots/{SHA}/default/*.parquet"),
                Some((Kind::Dataset, "name".to_string())),
            ),
            (format!("/h/spaces--a--b/snapshots/{SHA}"), None),
            (format!("/h/models--a--b--c/snapshots/{SHA}"), None),
            ("/h/models--a--b/snapshots/main".to_string(), None),
            ("teacher".to_string(), None),
        ];
        for (path, want) in rows {
            assert_eq!(of(path.clone()), want, "{path}");
        }
    }
}
