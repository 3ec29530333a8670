//! House rules that a program can see: layers, file lengths, where `unsafe` stands, licences. The tests below run them
//! in `cargo test --workspace`.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The floor of every crate. A crate may depend on lower floors only, so neighbours on one floor never meet.
const FLOORS: [(&str, u8); 6] = [
    ("quetsch-kernels", 0),
    ("quetsch", 1),
    ("quetsch-train", 2),
    ("quetsch-serve", 2),
    ("quetsch-cli", 3),
    ("xtask", 4),
];

/// A file longer than the first is a question (printed), longer than the second an error. Tests and benches apart.
const LINES: (usize, usize) = (500, 800);

/// The one crate that may say `unsafe`, and what the manifests say to the compiler about all others.
const UNSAFE_HOME: &str = "quetsch-kernels";
const WORKSPACE_FORBIDS: &str = "[workspace.lints.rust]\nunsafe_code = \"forbid\"\n";
const CRATE_FORBIDS: &str = "[lints.rust]\nunsafe_code = \"forbid\"\n";
const TAKES_LINTS: &str = "[lints]\nworkspace = true\n";

/// The crates that an application embeds: whatever they depend on, nothing of it opens a connection.
const SILENT: [&str; 3] = ["quetsch-kernels", "quetsch", "quetsch-train"];
const NETWORK: [&str; 7] = ["hyper", "native-tls", "reqwest", "rustls", "socket2", "tokio", "ureq"];

/// What a dependency's licence may be. Of "A OR B" one suffices, of "A AND B" all count.
const LICENCES: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    // Of the certificates of webpki-roots: to be passed on with its text, nothing else.
    "CDLA-Permissive-2.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

/// Layers, lengths and `unsafe`.
pub fn check(root: &Path) -> Result<()> {
    let faults = [layers(root)?, network(root)?, lengths(root)?, unsafe_code(root)?].concat();
    ensure!(faults.is_empty(), "house rules:\n  {}", faults.join("\n  "));
    Ok(())
}

fn layers(root: &Path) -> Result<Vec<String>> {
    let metadata = metadata(root, &["--no-deps", "--locked"])?;
    let floor = |name: &str| FLOORS.iter().find(|(n, _)| *n == name).map(|(_, floor)| *floor);
    let mut faults = vec![];
    for package in list(&metadata["packages"]) {
        let name = text(&package["name"]);
        let Some(own) = floor(name) else {
            faults.push(format!("crate {name} has no floor in xtask/src/house.rs"));
            continue;
        };
        let below = list(&package["dependencies"]).iter().map(|d| text(&d["name"]));
        for (other, at) in below.filter_map(|d| Some((d, floor(d)?))) {
            if at >= own {
                faults
                    .push(format!("{name} (floor {own}) depends on {other} (floor {at}): arrows point down only"));
            }
        }
    }
    Ok(faults)
}

/// Ways from a silent crate to one of the network, tests apart.
fn network(root: &Path) -> Result<Vec<String>> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let metadata = metadata(root, &["--locked", "--filter-platform", &platform])?;
    let names: HashMap<&str, &str> =
        list(&metadata["packages"]).iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
    let name = |id: &str| names.get(id).copied().unwrap_or("");
    let normal = |dep: &&Value| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
    let nodes: HashMap<&str, Vec<&str>> = list(&metadata["resolve"]["nodes"])
        .iter()
        .map(|n| (text(&n["id"]), list(&n["deps"]).iter().filter(normal).map(|d| text(&d["pkg"])).collect()))
        .collect();
    let mut faults = vec![];
    for start in nodes.keys().filter(|id| SILENT.contains(&name(id))) {
        let (mut seen, mut open) = (HashSet::from([*start]), vec![*start]);
        while let Some(id) = open.pop() {
            for dep in nodes.get(id).into_iter().flatten().filter(|dep| seen.insert(**dep)) {
                open.push(dep);
                if NETWORK.contains(&name(dep)) {
                    faults.push(format!(
                        "{} reaches {} through {}: it must stay without network",
                        name(start),
                        name(dep),
                        name(id)
                    ));
                }
            }
        }
    }
    Ok(faults)
}

fn lengths(root: &Path) -> Result<Vec<String>> {
    let mut faults = vec![];
    for file in sources(root)? {
        let apart = file.iter().any(|part| part == "tests" || part == "benches");
        let lines = fs::read_to_string(root.join(&file))?.lines().count();
        match lines {
            n if apart || n <= LINES.0 => {}
            n if n <= LINES.1 => eprintln!("{}: {n} lines; should it be two files?", file.display()),
            n => faults.push(format!("{}: {n} lines, at most {}", file.display(), LINES.1)),
        }
    }
    Ok(faults)
}

/// Crates but the one named that do not take the lints which forbid it. What `forbid` says no code can allow again.
fn unsafe_code(root: &Path) -> Result<Vec<String>> {
    let read = |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
    let metadata = metadata(root, &["--no-deps", "--locked"])?;
    let crates = list(&metadata["packages"]).iter().filter(|p| text(&p["name"]) != UNSAFE_HOME);
    let mut rules =
        vec![(root.join("Cargo.toml"), WORKSPACE_FORBIDS), (root.join("fuzz/Cargo.toml"), CRATE_FORBIDS)];
    rules.extend(crates.map(|p| (PathBuf::from(text(&p["manifest_path"])), TAKES_LINTS)));
    let mut faults = vec![];
    for (manifest, rule) in rules {
        if !read(&manifest)?.contains(rule) {
            faults.push(format!("{}: expected {rule:?}", manifest.display()));
        }
    }
    Ok(faults)
}

/// Every dependency of every platform comes from the registry under a licence of the list.
pub fn licences(root: &Path) -> Result<()> {
    let metadata = metadata(root, &["--locked"])?;
    let mut faults = vec![];
    for package in list(&metadata["packages"]) {
        let (name, licence) = (text(&package["name"]), text(&package["license"]));
        if !allowed(licence) {
            faults.push(format!("{name}: licence {licence:?} is not in the list of xtask/src/house.rs"));
        }
        if !package["source"].is_null() && !text(&package["source"]).starts_with("registry+") {
            faults.push(format!("{name} comes from {}, not from the registry", text(&package["source"])));
        }
    }
    ensure!(faults.is_empty(), "dependencies:\n  {}", faults.join("\n  "));
    Ok(())
}

/// Good enough for the expressions in use: "A OR B", "A/B" (old style), "(A OR B) AND C".
fn allowed(licence: &str) -> bool {
    let all = |part: &str| {
        part.split(['(', ')'])
            .map(|p| p.trim().trim_matches('/').trim())
            .all(|p| p.is_empty() || LICENCES.contains(&p))
    };
    licence
        .split(" AND ")
        .all(|term| term.replace('/', " OR ").split(" OR ").any(|choice| !choice.trim().is_empty() && all(choice)))
}

fn metadata(root: &Path, args: &[&str]) -> Result<Value> {
    let out = crate::cargo(["metadata", "--format-version", "1"]).args(args).current_dir(root).output()?;
    if !out.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&out.stderr));
    }
    serde_json::from_slice(&out.stdout).context("what cargo metadata printed")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

/// Every Rust file, relative to `root`.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    let mut folders = vec![root.join("crates"), root.join("xtask")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path.strip_prefix(root)?.to_path_buf());
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrows_point_down_only() {
        assert_eq!(layers(crate::root()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn the_library_has_no_network() {
        assert_eq!(network(crate::root()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn no_file_is_too_long() {
        assert_eq!(lengths(crate::root()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn only_one_crate_may_be_unsafe() {
        assert_eq!(unsafe_code(crate::root()).unwrap(), Vec::<String>::new());
    }

    /// The code in the READMEs is that of an example, which the compiler sees.
    #[test]
    fn readme_code_is_the_examples() {
        let read = |file: &str| fs::read_to_string(crate::root().join(file)).unwrap();
        let example = read("crates/quetsch/examples/classify.rs").replace("\n    ", "\n");
        for file in ["README.md", "README.zh-CN.md"] {
            let readme = read(file);
            let code = readme.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
            assert!(example.contains(code), "{file}: not in classify.rs:\n{code}");
        }
    }

    #[test]
    fn licence_expressions_are_read() {
        let rows = [
            ("MIT OR Apache-2.0", true),
            ("MIT/Apache-2.0", true),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
            ("Apache-2.0 WITH LLVM-exception OR MIT", true),
            ("GPL-3.0-only OR MIT", true),
            ("MIT AND GPL-3.0-only", false),
            ("GPL-3.0-only", false),
            ("", false),
        ];
        for (licence, want) in rows {
            assert_eq!(allowed(licence), want, "{licence:?}");
        }
    }
}
