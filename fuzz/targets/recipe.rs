//! Recipes and search files, with values laid over them. The first line of an input is a flag, as of `--set`; a search
//! file is known by its sections. A recipe that is accepted is written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch_cli::recipe;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

static PLACE: LazyLock<PathBuf> = LazyLock::new(|| quetsch_fuzz::folder().join("search.toml"));

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let Ok(text) = std::str::from_utf8(data) else { return };
        let Some((flag, text)) = text.split_once('\n') else { return };
        let flags: Vec<String> = if flag.is_empty() { vec![] } else { vec![flag.to_owned()] };
        let from_text = |text: &str, flags: &[String]| {
            recipe::from_text(Path::new("recipe.toml"), text.to_owned(), &BTreeMap::new(), flags)
        };
        if let Ok(recipe) = from_text(text, &flags) {
            let written = recipe.to_toml().expect("what was read can be written");
            let again = from_text(&written, &[]).unwrap_or_else(|e| panic!("{e:#}\n{written}"));
            assert_eq!(again.to_toml().ok().as_ref(), Some(&written));
        }
        fs::write(&*PLACE, text).expect("a file in memory");
        let _ = recipe::read_search(&PLACE, &flags);
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let inside = fs::read_dir(quetsch_fuzz::root().join("recipes")).expect("recipes");
    let files = inside.map(|e| fs::read_to_string(e.expect("an entry").path()).expect("a recipe"));
    // Without comments: what is changed should matter.
    let bare = |text: String| -> String {
        text.lines()
            .map(|l| l.split(" #").next().unwrap_or(l))
            .filter(|l| !l.starts_with('#'))
            .map(|l| format!("{l}\n"))
            .collect()
    };
    let files: Vec<String> = files.map(bare).collect();
    files
        .iter()
        .flat_map(|f| [format!("\n{f}"), format!("seed=7\n{f}"), format!("student.alpha=0.4\n{f}")])
        .map(String::into_bytes)
        .collect()
}
