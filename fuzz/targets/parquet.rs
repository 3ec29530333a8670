//! Parquet files of labelled texts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch::data::{self, ReadOptions};
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

static FILE: LazyLock<PathBuf> = LazyLock::new(|| quetsch_fuzz::folder().join("a.parquet"));

fuzz_target!(
    init: {
        quetsch_fuzz::allow_panics_of("/parquet-");
        quetsch_fuzz::seeds(seeds);
    },
    |data: &[u8]| {
        fs::write(&*FILE, data).expect("a file in memory");
        if let Ok(set) = data::read(&*FILE, &ReadOptions::default()) {
            set.counts();
        }
        let _ = data::read_texts(Some(&FILE), None);
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let files = fs::read_dir(quetsch_fuzz::root().join("fixtures/parquet")).expect("the fixtures");
    files.map(|f| fs::read(f.expect("an entry").path()).expect("a file")).collect()
}
