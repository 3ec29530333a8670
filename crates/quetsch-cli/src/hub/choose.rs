//! Which files of a repository are wanted. `get` gives a file's path, from the cache or from the hub.

use super::name::{Repo, Split};
use crate::exit::usage;
use anyhow::{Context, Result, bail, ensure};
use quetsch::dir::{PICKLE, PICKLE_INDEX, TOKENIZER_FILES, WEIGHTS, WEIGHTS_INDEX};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Gives a file of the repository.
pub type Get<'g> = &'g mut dyn FnMut(&str) -> Result<PathBuf>;

/// The files of a model: config, tokenizer, card, and the weights once: safetensors, else PyTorch's.
pub fn model(repo: &Repo, names: &[String], get: Get) -> Result<()> {
    let has = |name: &str| names.iter().any(|n| n == name);
    ensure!(has("config.json"), "{repo} has no config.json: it is no model that Quetsch reads");
    get("config.json")?;
    let weights = [WEIGHTS, WEIGHTS_INDEX, PICKLE, PICKLE_INDEX].into_iter().find(|name| has(name));
    let weights = weights.with_context(|| {
        format!("{repo} has neither {WEIGHTS} nor {PICKLE}, nor an index of either: no weights")
    })?;
    // The card names the licence of what will be made from this.
    for name in TOKENIZER_FILES.into_iter().chain(["README.md"]).filter(|name| has(name)) {
        get(name)?;
    }
    let path = get(weights)?;
    if weights == WEIGHTS_INDEX || weights == PICKLE_INDEX {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let index: Index =
            serde_json::from_slice(&text).with_context(|| format!("{repo}: {weights} is no index"))?;
        for shard in index.weight_map.into_values().collect::<BTreeSet<_>>() {
            ensure!(has(&shard), "{repo}: {weights} lists {shard:?}, which the repository does not have");
            get(&shard)?;
        }
    }
    Ok(())
}

/// The files of a part of a data set: a path below the repository, with `*` where there are several. `converted` says
/// that the hub's own Parquet files are looked at: CONFIG/SPLIT/0000.parquet.
pub fn dataset(repo: &Repo, names: &[String], wanted: &Split, converted: bool, get: Get) -> Result<String> {
    let chosen = match converted {
        true => of_conversion(repo, names, wanted)?,
        false => of_repository(repo, names, wanted)?,
    };
    for name in &chosen {
        get(name)?;
    }
    pattern(&chosen).with_context(|| {
        let list = chosen.join(", ");
        format!("{repo}: `{}` is several files, which are no parts of one table: {list}", wanted.split)
    })
}

fn of_conversion(repo: &Repo, names: &[String], wanted: &Split) -> Result<Vec<String>> {
    let mut found: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
    for name in names.iter().filter(|n| n.ends_with(".parquet")) {
        if let [config, split, _] = name.split('/').collect::<Vec<_>>()[..] {
            found.entry((config, split)).or_default().push(name.clone());
        }
    }
    let configs: BTreeSet<&str> = found.keys().map(|(config, _)| *config).collect();
    let config = match &wanted.config {
        Some(config) => config.as_str(),
        None if configs.contains("default") => "default",
        None => match configs.iter().collect::<Vec<_>>()[..] {
            [one] => one,
            _ => {
                let (list, split) = (Vec::from_iter(configs).join(", "), &wanted.split);
                return Err(usage(format!(
                    "{repo} has several configurations: {list}; say which, as in hf:{repo}:CONFIG/{split}"
                )));
            }
        },
    };
    if let Some(files) = found.remove(&(config, wanted.split.as_str())) {
        return Ok(files);
    }
    let there: Vec<_> = found.keys().map(|(config, split)| format!("{config}/{split}")).collect();
    let (split, list) = (&wanted.split, there.join(", "));
    Err(usage(format!("{repo} has no {config}/{split}; there are: {list} (hf:{repo}:CONFIG/SPLIT)")))
}

/// Tables with the split in their path, as a word of its own: `train.csv`, `data/train-00000-of-00002.parquet`.
fn of_repository(repo: &Repo, names: &[String], wanted: &Split) -> Result<Vec<String>> {
    let tables: Vec<&String> = names.iter().filter(|n| rank(n).is_some()).collect();
    let is_of = |name: &str| {
        let mut words = name.split(|c: char| !c.is_ascii_alphanumeric());
        let in_config = wanted.config.as_ref().is_none_or(|c| name.split('/').any(|level| level == c));
        in_config && words.any(|word| word.eq_ignore_ascii_case(&wanted.split))
    };
    let best = tables.iter().filter(|n| is_of(n)).filter_map(|n| rank(n)).min();
    let Some(best) = best else {
        let list = tables.iter().map(|n| n.as_str()).take(20).collect::<Vec<_>>().join(", ");
        let list = if list.is_empty() { "none".into() } else { list };
        bail!("{repo} has no table (.parquet, .csv, .tsv, .jsonl) of the split `{}`; tables: {list}", wanted.split);
    };
    let chosen = tables.into_iter().filter(|n| is_of(n) && rank(n) == Some(best));
    Ok(chosen.cloned().collect())
}

/// Formats in order of preference: Parquet knows the names of the labels.
fn rank(name: &str) -> Option<usize> {
    let extension = Path::new(name).extension()?.to_str()?;
    ["parquet", "csv", "tsv", "jsonl", "ndjson"].iter().position(|e| *e == extension)
}

/// One path for all files: of a folder of Parquet files, with `*` for what differs.
fn pattern(names: &[String]) -> Option<String> {
    let [first, .., last] = names else { return names.first().cloned() };
    let folder = |name: &String| name.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
    if names.iter().any(|n| folder(n) != folder(first) || !n.ends_with(".parquet")) {
        return None;
    }
    // The names are sorted, so what first and last share all of them share.
    let shared = first.chars().zip(last.chars()).take_while(|(a, b)| a == b && !a.is_ascii_digit()).count();
    let shared: String = first.chars().take(shared).collect();
    Some(format!("{}*.parquet", if shared.len() < folder(first).len() { folder(first) } else { shared }))
}

#[cfg(test)]
mod tests {
    use super::super::name::Kind;
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|n| n.to_string()).collect()
    }

    fn repo(kind: Kind) -> Repo {
        Repo { kind, id: "org/name".into(), revision: None }
    }

    #[test]
    fn only_what_is_needed_of_a_model() {
        let dir = tempfile::tempdir().expect("a folder");
        let index = dir.path().join("index");
        let taken = |list: &[&str], index_text: &str| {
            std::fs::write(&index, index_text).expect("written");
            let mut taken = vec![];
            let mut get = |name: &str| {
                taken.push(name.to_string());
                Ok(index.clone())
            };
            model(&repo(Kind::Model), &names(list), &mut get)
                .map(|()| taken.join(" "))
                .map_err(|e| format!("{e:#}"))
        };
        let whole =
            ["config.json", "vocab.txt", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "1.png"];
        assert_eq!(taken(&whole, ""), Ok("config.json vocab.txt model.safetensors".into()));
        let old = ["pytorch_model.bin", "config.json", "README.md", "flax_model.msgpack"];
        assert_eq!(taken(&old, ""), Ok("config.json README.md pytorch_model.bin".into()));
        let shards = ["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"];
        let text = r#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}"#;
        let want = "config.json model.safetensors.index.json a.safetensors b.safetensors";
        assert_eq!(taken(&shards, text), Ok(want.into()));
        for (list, text, word) in [
            (&["vocab.txt"][..], "", "config.json"),
            (&["config.json", "tf_model.h5"], "", "weights"),
            (&shards, r#"{"weight_map": {"x": "../../x"}}"#, "../../x"),
            (&shards, "[]", "index"),
        ] {
            assert!(taken(list, text).is_err_and(|e| e.contains(word)), "{list:?} {text}");
        }
    }

    #[test]
    fn splits_are_found() {
        let read = |list: &[&str], split: &str, converted| {
            let (_, split) = Repo::dataset(&format!("hf:org/name:{split}")).expect(split).expect(split);
            let mut get = |_: &str| Ok(PathBuf::new());
            dataset(&repo(Kind::Dataset), &names(list), &split.expect("a split"), converted, &mut get)
                .map_err(|e| format!("{e:#}"))
        };
        let converted = ["default/test/0000.parquet", "default/train/0000.parquet", "default/train/0001.parquet"];
        assert_eq!(read(&converted, "test", true), Ok("default/test/0000.parquet".into()));
        assert_eq!(read(&converted, "train", true), Ok("default/train/*.parquet".into()));
        let two = ["a/test/0000.parquet", "b/test/0000.parquet"];
        assert_eq!(read(&two, "b/test", true), Ok("b/test/0000.parquet".into()));
        assert!(read(&two, "test", true).is_err_and(|e| e.contains("a, b")));
        assert!(read(&converted, "validation", true).is_err_and(|e| e.contains("default/train")));
        let pushed = ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];
        assert_eq!(read(&pushed, "train", false), Ok("data/train-*.parquet".into()));
        let plain = ["README.md", "train.csv", "test.csv", "old/constraint.csv"];
        assert_eq!(read(&plain, "train", false), Ok("train.csv".into()));
        assert!(read(&plain, "dev", false).is_err_and(|e| e.contains("test.csv")));
        assert!(read(&["a/train.csv", "b/train.csv"], "train", false).is_err_and(|e| e.contains("a/train.csv")));
        assert_eq!(read(&["a/train.csv", "b/train.csv"], "b/train", false), Ok("b/train.csv".into()));
    }
}
