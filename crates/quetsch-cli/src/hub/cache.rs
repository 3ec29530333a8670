//! The cache that huggingface_hub, transformers and datasets share, in the layout of huggingface_hub:
//! `models--org--name/refs/main` holds a commit, `snapshots/COMMIT/config.json` is a link to `blobs/ETAG`.
//! Our own is `.quetsch/COMMIT`: which files the repository has, so that a later run need not ask.

use super::name::{Repo, check_file, is_commit};
use anyhow::{Context, Result, bail, ensure};
use quetsch::atomic::write_file;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A repository's part of the cache.
pub struct Cache {
    /// The whole cache.
    root: PathBuf,
    /// Its folder.
    folder: PathBuf,
}

impl Cache {
    /// Of a repository.
    pub fn new(root: &Path, repo: &Repo) -> Cache {
        Cache { root: root.to_path_buf(), folder: root.join(repo.folder()) }
    }

    /// The repository's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit of a revision, if it is known.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return self.snapshot(revision).is_dir().then(|| revision.to_string());
        }
        let text = std::fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Remembers what a revision is.
    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        write(&self.folder.join("refs").join(revision), commit.as_bytes())
    }

    /// The folder of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The files of a commit, as the hub listed them.
    pub fn listing(&self, commit: &str) -> Option<Vec<String>> {
        let names: Vec<String> =
            serde_json::from_slice(&std::fs::read(self.folder.join(".quetsch").join(commit)).ok()?).ok()?;
        names.iter().all(|name| check_file(name).is_ok()).then_some(names)
    }

    /// Remembers the files of a commit.
    pub fn set_listing(&self, commit: &str, names: &[String]) -> Result<()> {
        write(&self.folder.join(".quetsch").join(commit), &serde_json::to_vec(names)?)
    }

    /// The files of a commit that are here, whoever fetched them.
    pub fn present(&self, commit: &str) -> Vec<String> {
        let root = self.snapshot(commit);
        let (mut names, mut folders) = (vec![], vec![root.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let path = entry.path();
                match entry.file_type().is_ok_and(|t| t.is_dir()) {
                    true => folders.push(path),
                    false => names.extend(path.strip_prefix(&root).ok().and_then(|n| n.to_str()).map(slashes)),
                }
            }
        }
        names.sort();
        names
    }

    /// A file of a commit, if it is here.
    ///
    /// # Errors
    /// It is a link to somewhere outside the repository's folder.
    pub fn file(&self, commit: &str, name: &str) -> Result<Option<PathBuf>> {
        let path = self.snapshot(commit).join(name);
        let Ok(real) = path.canonicalize() else { return Ok(None) };
        let home = self.folder.canonicalize().with_context(|| self.folder.display().to_string())?;
        ensure!(
            real.starts_with(&home),
            "{} is a link to {}, outside of its repository's folder; remove it",
            path.display(),
            real.display()
        );
        Ok(Some(path))
    }

    /// Where a file's content goes, under the name that its server gives it.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// The right to write a blob, for as long as the file lives; that of huggingface_hub's `WeakFileLock`.
    pub fn lock(&self, etag: &str) -> Result<File> {
        let name = self.folder.file_name().context("the cache has a name")?;
        let path = self.root.join(".locks").join(name).join(format!("{etag}.lock"));
        make_parent(&path)?;
        let file = File::options().create(true).write(true).truncate(false).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        // A file system without locks: two downloads at once would both write, and both check what they wrote.
        let _ = file.lock();
        Ok(file)
    }

    /// Puts a blob into a commit under its name.
    pub fn link(&self, commit: &str, name: &str, etag: &str) -> Result<PathBuf> {
        let path = self.snapshot(commit).join(name);
        make_parent(&path)?;
        let cannot = || format!("cannot write {}", path.display());
        if path.symlink_metadata().is_ok() {
            std::fs::remove_file(&path).with_context(cannot)?;
        }
        let up = "../".repeat(2 + name.matches('/').count());
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &path);
        // Links need a privilege on Windows; huggingface_hub copies there, too.
        #[cfg(not(unix))]
        let linked = std::fs::copy(self.blob(etag), &path).map(|_| drop(up));
        linked.with_context(cannot)?;
        match self.file(commit, name)? {
            Some(path) => Ok(path),
            None => bail!("{} is not there after it was written", path.display()),
        }
    }
}

/// The name of a path inside a repository.
fn slashes(name: &str) -> String {
    name.replace(std::path::MAIN_SEPARATOR, "/")
}

/// Makes the folder that a file goes to.
pub fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)
        .with_context(|| format!("cannot make {}; HF_HOME names another place", parent.display()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    make_parent(path)?;
    Ok(write_file(path, bytes)?)
}
