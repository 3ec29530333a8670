//! config.json, with the `quetsch` key and `quantization_config`, beside tensors of a small model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch::config;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

static SHAPES: LazyLock<BTreeMap<String, Vec<usize>>> = LazyLock::new(|| {
    let table = quetsch_fuzz::models()[0].spec.tensors();
    table.into_iter().map(|def| (def.name, def.shape)).collect()
});

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let Ok(map) = serde_json::from_slice::<Map<String, Value>>(data) else { return };
        for shapes in [&*SHAPES, &BTreeMap::new()] {
            if let Ok(config) = config::parse(&map, shapes, Path::new("config.json")) {
                for def in config.spec.tensors() {
                    def.len();
                }
            }
        }
    }
);

/// The configs of all fixtures, and those of small models in every scheme.
fn seeds() -> Vec<Vec<u8>> {
    let mut folders = vec![quetsch_fuzz::root().join("fixtures")];
    let mut found = vec![];
    while let Some(folder) = folders.pop() {
        let inside = fs::read_dir(folder).expect("fixtures").map(|e| e.expect("an entry").path());
        let (more, files): (Vec<PathBuf>, Vec<PathBuf>) = inside.partition(|p| p.is_dir());
        folders.extend(more);
        found.extend(files.into_iter().filter(|f| f.ends_with("config.json")));
    }
    let mut seeds: Vec<_> = found.iter().map(|f| fs::read(f).expect("a config")).collect();
    seeds.extend(quetsch_fuzz::schemes().map(|ck| quetsch_fuzz::files(&ck).0));
    seeds
}
