//! Files and folders that appear whole or not at all: written under a hidden temporary name beside the target,
//! flushed to the disk, then renamed.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Replaces `path` by `bytes`: after a crash there is the old file or the new one, never a half.
///
/// # Errors
/// No folder, no permission, full disk; the temporary file is removed.
pub fn write_file(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let temporary = hidden_sibling(path)?;
    let done = write_synced(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path).map_err(Error::io(path)))
        .and_then(|()| sync_folder(&parent(path)));
    if done.is_err() {
        let _ = fs::remove_file(&temporary); // the first error is the one to report
    }
    done
}

/// A folder in the making. Dropping it uncommitted removes everything.
#[derive(Debug)]
pub struct Folder {
    target: PathBuf,
    temporary: PathBuf,
    committed: bool,
    force: bool,
}

impl Folder {
    /// Starts a folder that will stand at `target`, parents included.
    ///
    /// # Errors
    /// `target` exists with something in it and `force` is off, is an ancestor of the current folder, or cannot be
    /// written.
    pub fn create(target: impl AsRef<Path>, force: bool) -> Result<Folder> {
        // A link is replaced at the place it points to.
        let target = fs::canonicalize(target.as_ref()).unwrap_or_else(|_| target.as_ref().to_path_buf());
        if occupied(&target)? {
            if !force {
                return Err(Error::file(&target, "exists; pass --force to replace it"));
            }
            if std::env::current_dir().is_ok_and(|here| here.starts_with(&target)) {
                return Err(Error::file(&target, "is or holds the current folder and will not be replaced"));
            }
        }
        let temporary = hidden_sibling(&target)?;
        fs::create_dir_all(parent(&target)).map_err(Error::io(parent(&target)))?;
        remove_leftovers(&target);
        fs::create_dir(&temporary).map_err(Error::io(&target))?;
        Ok(Folder { target, temporary, committed: false, force })
    }

    /// Where to write until the commit.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Writes a file of the folder; `name` may have folders in front.
    ///
    /// # Errors
    /// The disk is full or the folder cannot be written.
    pub fn write(&self, name: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
        let path = self.temporary.join(name.as_ref());
        fs::create_dir_all(parent(&path)).map_err(Error::io(self.target.join(name.as_ref())))?;
        write_synced(&path, bytes).map_err(|e| match e {
            Error::Io { source, .. } => Error::io(self.target.join(name.as_ref()))(source),
            other => other,
        })
    }

    /// Puts the folder in its place. An old one is moved aside first and removed last, and comes back if the new
    /// one cannot take its place.
    ///
    /// # Errors
    /// The target appeared meanwhile and `force` is off, or a rename fails.
    pub fn commit(mut self) -> Result<()> {
        sync_folder(&self.temporary)?;
        let mut aside = None;
        if occupied(&self.target)? {
            if !self.force {
                return Err(Error::file(&self.target, "appeared meanwhile; pass --force to replace it"));
            }
            let place = hidden_sibling(&self.target)?;
            fs::rename(&self.target, &place).map_err(Error::io(&self.target))?;
            aside = Some(place);
        }
        if let Err(e) = fs::rename(&self.temporary, &self.target) {
            if let Some(old) = aside {
                fs::rename(old, &self.target).map_err(Error::io(&self.target))?;
            }
            return Err(Error::io(&self.target)(e));
        }
        self.committed = true;
        sync_folder(&parent(&self.target))?;
        match aside {
            Some(old) if old.is_dir() => fs::remove_dir_all(&old).map_err(Error::io(&old)),
            Some(old) => fs::remove_file(&old).map_err(Error::io(&old)),
            None => Ok(()),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.temporary); // nobody is left to tell
        }
    }
}

/// Whether something that is not an empty folder stands at `path`.
fn occupied(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => Ok(path.exists()),
        Err(e) => Err(Error::io(path)(e)),
    }
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// `.name.PID-N.tmp` beside `path`.
fn hidden_sibling(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        return Err(Error::file(path, "is not a name that can be written to"));
    };
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!(".{}.{}-{n}.tmp", name.to_string_lossy(), std::process::id());
    Ok(parent(path).join(name))
}

/// Removes what processes that were killed left of their attempts at `target`. A process that lives keeps its own;
/// where nobody can tell who lives (no /proc), nothing is removed.
fn remove_leftovers(target: &Path) {
    let (Some(name), Ok(entries)) = (target.file_name(), fs::read_dir(parent(target))) else { return };
    let start = format!(".{}.", name.to_string_lossy());
    for entry in entries.flatten() {
        let file = entry.file_name();
        let ours = file.to_str().and_then(|f| f.strip_prefix(&start)?.strip_suffix(".tmp")?.split_once('-'));
        let Some((Ok(process), Ok(_))) = ours.map(|(p, n)| (p.parse::<u32>(), n.parse::<u64>())) else { continue };
        if Path::new("/proc/self").exists() && !Path::new(&format!("/proc/{process}")).exists() {
            let _ = fs::remove_dir_all(entry.path()); // it is in nobody's way
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(path))
}

/// A rename survives a power cut only when its folder has been flushed too.
fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(unix) { File::open(path).and_then(|f| f.sync_all()).map_err(Error::io(path)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut n: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        n.sort();
        n
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["a.json"]);
        assert!(write_file(dir.path().join("no/such/folder"), b"x").is_err());
        fs::create_dir(dir.path().join("b")).unwrap();
        assert!(write_file(dir.path().join("b"), b"x").is_err(), "a folder stands there");
        assert_eq!(names(dir.path()), ["a.json", "b"], "no temporary is left");
    }

    #[test]
    fn a_folder_appears_at_commit() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("deep/model");
        let folder = Folder::create(&target, false).unwrap();
        folder.write("config.json", b"{}").unwrap();
        folder.write("1_Pooling/config.json", b"{}").unwrap();
        assert!(!target.exists());
        folder.commit().unwrap();
        assert_eq!(names(&target), ["1_Pooling", "config.json"]);
        let message = Folder::create(&target, false).unwrap_err().to_string();
        assert!(message.contains("--force"), "{message}");
        let again = Folder::create(&target, true).unwrap();
        again.write("other", b"").unwrap();
        again.commit().unwrap();
        assert_eq!(names(&target), ["other"]);
        assert_eq!(names(&dir.path().join("deep")), ["model"]);
    }

    /// Process ids end at 2^22 on Linux.
    #[test]
    fn leftovers_of_the_dead_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mine = format!(".m.{}-7.tmp", std::process::id());
        for name in [".m.4194305-0.tmp", ".m.4194305-x.tmp", ".other.4194305-0.tmp", &mine] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Folder::create(dir.path().join("m"), false).unwrap().commit().unwrap();
        let mut left = vec![".m.4194305-x.tmp", ".other.4194305-0.tmp", &mine, "m"];
        left.sort_unstable();
        if Path::new("/proc/self").exists() {
            assert_eq!(names(dir.path()), left);
        }
    }

    #[test]
    fn dropped_uncommitted_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        Folder::create(&target, false).unwrap().write("x", b"y").unwrap();
        assert!(names(dir.path()).is_empty());
        let late = Folder::create(&target, false).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("theirs"), b"").unwrap();
        assert!(late.commit().is_err());
        assert_eq!(names(dir.path()), ["model"]);
    }

    #[test]
    fn an_empty_folder_is_free_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        fs::create_dir(&target).unwrap();
        Folder::create(&target, false).unwrap().commit().unwrap();
        fs::remove_dir(&target).unwrap();
        fs::write(&target, b"a file").unwrap();
        assert!(Folder::create(&target, false).is_err());
        let folder = Folder::create(&target, true).unwrap();
        folder.write("x", b"").unwrap();
        folder.commit().unwrap();
        assert_eq!(names(&target), ["x"]);
        assert!(Folder::create("/", true).is_err());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error() {
        let message = write_synced(Path::new("/dev/full"), b"x").unwrap_err().to_string();
        assert!(message.contains("/dev/full") && message.contains("No space left"), "{message}");
    }
}
