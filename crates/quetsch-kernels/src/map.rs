//! A file as a slice.

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::ops::Deref;

/// A whole file, mapped read-only. As with every memory map, another process that truncates the file meanwhile stops
/// this one with SIGBUS: for files that are written whole and renamed into place, never changed where they stand.
#[derive(Debug)]
pub struct Map(Mmap);

impl Map {
    /// Fails where the file cannot be mapped.
    pub fn of(file: &File) -> io::Result<Map> {
        // SAFETY: the map is read-only, and whoever asks for one says that the file stays as it is.
        Ok(Map(unsafe { Mmap::map(file) }?))
    }

    /// Gives the memory of all pages read so far back; they are read again from the file when they are wanted again.
    pub fn release(&self) {
        // SAFETY: MADV_DONTNEED drops changes of private pages. These are never changed: the map is read-only.
        // A kernel that refuses leaves the pages where they are.
        #[cfg(unix)]
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_reads_the_same_after_its_pages_were_given_back() {
        let path = std::env::temp_dir().join(format!("quetsch-map-{}", std::process::id()));
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Map::of(&File::open(&path).unwrap()).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(*map, bytes);
        map.release();
        assert_eq!(*map, bytes);
    }
}
