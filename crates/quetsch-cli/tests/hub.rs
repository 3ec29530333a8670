//! The real binary against a hub on this machine (`HF_ENDPOINT`), with a cache of its own (`HF_HOME`).
#![cfg(feature = "hub")]
#![allow(missing_docs)]

mod common;

use common::hub::{Hub, Manners, commit};
use common::{Done, Place};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use std::path::{Path, PathBuf};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The name that git gives a file.
fn git(bytes: &[u8]) -> String {
    let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

const MODEL: &str = "models/org/tiny@main";

/// A hub with the tiny student as `org/tiny`, its weights large, and files that nobody needs.
fn hub(place: &Place) -> Hub {
    let hub = Hub::start();
    for entry in std::fs::read_dir(place.path("model")).expect("the model").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let bytes = std::fs::read(entry.path()).expect("a file");
        let etag = if name.ends_with(".safetensors") { sha256(&bytes) } else { git(&bytes) };
        hub.add(MODEL, &commit('a'), &name, &bytes, &etag);
    }
    for name in ["pytorch_model.bin", "onnx/model.onnx", ".gitattributes"] {
        hub.add(MODEL, &commit('a'), name, b"not needed", &git(b"not needed"));
    }
    std::fs::remove_dir_all(place.path("model")).expect("removed");
    hub
}

fn run_with(place: &Place, hub: &Hub, line: &str, env: &[(&str, &str)]) -> Done {
    let mut command = place.command();
    command.env_remove("HF_HUB_OFFLINE").env_remove("TRANSFORMERS_OFFLINE").env_remove("HF_TOKEN");
    command.env("HF_ENDPOINT", hub.url()).args(line.split_whitespace());
    command.envs(env.iter().copied());
    let out = command.output().expect("the program runs");
    Done {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

fn ok(place: &Place, hub: &Hub, line: &str) -> Done {
    let done = run_with(place, hub, line, &[]);
    assert_eq!(done.code, 0, "{line}\n{}\n{:#?}", done.stderr, hub.asked());
    done
}

fn fails(place: &Place, hub: &Hub, line: &str, words: &[&str]) {
    let done = run_with(place, hub, line, &[]);
    assert!(matches!(done.code, 1 | 2), "{line}: {}\n{}", done.code, done.stderr);
    for word in words {
        assert!(done.stderr.contains(word), "{word:?} is not in\n{}", done.stderr);
    }
}

const PREDICT: &str = "predict --model org/tiny --format json lost";

/// Every file below a folder, links too.
fn files(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (vec![], vec![root.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type().is_ok_and(|t| t.is_dir()) {
                true => folders.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_model_is_fetched_once_and_only_what_is_needed() {
    let place = Place::new();
    let want = place.ok("predict --model model --format json lost").stdout;
    let weights = place.read("model/model.safetensors");
    let hub = hub(&place);

    let first = ok(&place, &hub, PREDICT);
    assert_eq!(first.stdout, want);
    let asked = hub.asked();
    for unwanted in ["pytorch_model.bin", "onnx", ".gitattributes"] {
        assert!(!asked.iter().any(|a| a.contains(unwanted)), "{unwanted}: {asked:#?}");
    }
    let a = commit('a');
    assert_eq!(asked[0], "GET /api/models/org/tiny/revision/main");
    assert!(asked.contains(&format!("HEAD /org/tiny/resolve/{a}/model.safetensors")), "{asked:#?}");
    assert!(asked.contains(&format!("GET /lfs/org/tiny/resolve/{a}/model.safetensors")), "{asked:#?}");

    // The layout of huggingface_hub.
    let repo = "hf/hub/models--org--tiny";
    assert_eq!(place.read(&format!("{repo}/refs/main")), a.as_bytes());
    let link = place.path(&format!("{repo}/snapshots/{a}/model.safetensors"));
    let blob = PathBuf::from("../../blobs").join(sha256(&weights));
    assert_eq!(std::fs::read_link(&link).expect("a link"), blob);
    assert_eq!(std::fs::read(&link).expect("the weights"), weights);
    assert!(files(&place.path(repo)).iter().all(|f| !f.to_string_lossy().ends_with(".incomplete")));

    // Nothing is asked again; offline, under other names of the variables, it is the same.
    assert_eq!(ok(&place, &hub, PREDICT).stdout, want);
    assert_eq!(ok(&place, &hub, &format!("predict --model hf:org/tiny@{a} --format json lost")).stdout, want);
    assert_eq!(ok(&place, &hub, &format!("{PREDICT} --revision {a}")).stdout, want);
    for env in [("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "true")] {
        assert_eq!(run_with(&place, &hub, PREDICT, &[env]).stdout, want, "{env:?}");
    }
    assert_eq!(ok(&place, &hub, &format!("{PREDICT} --offline")).stdout, want);
    let cache = place.path("hf/hub");
    let cache = cache.to_str().expect("UTF-8");
    for variable in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        let done = run_with(&place, &hub, PREDICT, &[("HF_HOME", "/nowhere"), (variable, cache)]);
        assert_eq!(done.stdout, want, "{variable}\n{}", done.stderr);
    }
    assert_eq!(hub.asked(), Vec::<String>::new());

    // What is not in the cache is not to be had offline, and the error names what forbids it.
    let done = run_with(&place, &hub, "predict --model org/other x", &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(done.code, 1);
    for word in ["org/other", "HF_HUB_OFFLINE", "HF_HOME", "hf/hub"] {
        assert!(done.stderr.contains(word), "{word}: {}", done.stderr);
    }
    assert_eq!(hub.asked(), Vec::<String>::new());
}

#[test]
fn what_is_here_is_local() {
    let place = Place::new();
    let hub = Hub::start();
    place.copy_model("org/tiny");
    ok(&place, &hub, "predict --model org/tiny lost");
    // `org` is a folder here: a name in it is a path that is wrong.
    fails(&place, &hub, "predict --model org/tinny lost", &["org/tinny", "no such folder"]);
    fails(&place, &hub, "predict --model org/tiny --revision main lost", &["--revision", "is a path"]);
    assert_eq!(hub.asked(), Vec::<String>::new());
}

#[test]
fn other_files_than_those_python_fetched_are_asked_for() {
    let place = Place::new();
    let hub = hub(&place);
    // As AutoConfig leaves the cache: one file, no list of the others.
    let a = commit('a');
    ok(&place, &hub, PREDICT);
    let repo = "hf/hub/models--org--tiny";
    std::fs::remove_dir_all(place.path(&format!("{repo}/.quetsch"))).expect("removed");
    std::fs::remove_file(place.path(&format!("{repo}/snapshots/{a}/vocab.txt"))).expect("removed");
    hub.asked();
    ok(&place, &hub, PREDICT);
    let asked = hub.asked();
    // Its content is still among the blobs.
    assert_eq!(
        asked,
        ["GET /api/models/org/tiny/revision/main".to_string(), format!("HEAD /org/tiny/resolve/{a}/vocab.txt")]
    );
    // A hub that cannot be reached does not matter while the cache suffices.
    std::fs::remove_dir_all(place.path(&format!("{repo}/.quetsch"))).expect("removed");
    let done = run_with(&place, &hub, PREDICT, &[("HF_ENDPOINT", "http://127.0.0.1:9")]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(done.stderr.contains("using the cache's org/tiny"), "{}", done.stderr);
}

#[test]
fn downloads_survive_a_bad_line() {
    let place = Place::new();
    let want = place.ok("predict --model model --format json lost").stdout;
    let hub = hub(&place);
    hub.behave(Manners { cuts: 3, busy: 2, ..Manners::default() });
    assert_eq!(ok(&place, &hub, PREDICT).stdout, want);
    let asked = hub.asked();
    assert!(asked.iter().any(|a| a.contains("bytes=") && !a.contains("bytes=0-0")), "goes on: {asked:#?}");
}

/// A download that stopped is taken up, by a server that knows ranges and by one that does not; what is left of
/// something else is noticed.
#[test]
fn a_partial_download_goes_on() {
    let partial = |place: &Place, bytes: &[u8], weights: &[u8]| {
        let path = format!("hf/hub/models--org--tiny/blobs/{}.incomplete", sha256(weights));
        place.write(&path, bytes);
    };
    for (no_range, rubbish) in [(false, false), (true, false), (false, true)] {
        let place = Place::new();
        let want = place.ok("predict --model model --format json lost").stdout;
        let weights = place.read("model/model.safetensors");
        let hub = hub(&place);
        hub.behave(Manners { no_range, ..Manners::default() });
        let mut half = weights[..weights.len() / 2].to_vec();
        if rubbish {
            half[7] ^= 1;
        }
        partial(&place, &half, &weights);
        assert_eq!(ok(&place, &hub, PREDICT).stdout, want, "no_range {no_range}, rubbish {rubbish}");
        let asked = hub.asked();
        let range = format!("model.safetensors bytes={}-", weights.len() / 2);
        assert!(asked.iter().any(|a| a.ends_with(&range)), "{asked:#?}");
    }
}

#[test]
fn mirrors_without_head_do() {
    for head in [403, 405, 500] {
        let place = Place::new();
        let want = place.ok("predict --model model --format json lost").stdout;
        let hub = hub(&place);
        hub.behave(Manners { head: Some(head), ..Manners::default() });
        assert_eq!(ok(&place, &hub, PREDICT).stdout, want, "HEAD {head}");
        assert!(hub.asked().iter().any(|a| a.ends_with("config.json bytes=0-0")));
    }
}

#[test]
fn a_wrong_content_is_refused_and_not_kept() {
    let place = Place::new();
    let hub = hub(&place);
    let wrong = sha256(b"something else");
    hub.add(MODEL, &commit('a'), "model.safetensors", b"these bytes", &wrong);
    fails(&place, &hub, PREDICT, &["model.safetensors", &wrong, &sha256(b"these bytes"), "HF_ENDPOINT"]);
    let cache = files(&place.path("hf/hub/models--org--tiny"));
    assert!(cache.iter().all(|f| !f.to_string_lossy().contains(&wrong)), "{cache:#?}");
    // The same for git's names.
    hub.add(MODEL, &commit('a'), "config.json", b"{}", &git(b"something else"));
    std::fs::remove_dir_all(place.path("hf")).expect("removed");
    fails(&place, &hub, PREDICT, &["config.json", &git(b"{}")]);
}

#[test]
fn tokens_open_and_stay_at_home() {
    let place = Place::new();
    let hub = hub(&place);
    let other = Hub::start();
    let weights = common_weights();
    other.add(MODEL, &commit('a'), "model.safetensors", &weights, &sha256(&weights));
    hub.behave(Manners { token: Some("secret".into()), elsewhere: Some(other.port), ..Manners::default() });
    fails(&place, &hub, PREDICT, &["401", "Invalid username or password.", "HF_TOKEN", "org/tiny"]);
    let done = run_with(&place, &hub, PREDICT, &[("HF_TOKEN", "wrong")]);
    assert!(done.stderr.contains("the token of HF_TOKEN"), "{}", done.stderr);
    let off = [("HF_TOKEN", "secret"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
    assert_eq!(run_with(&place, &hub, PREDICT, &off).code, 1);
    place.write("token", b"secret\n");
    let path = place.path("token");
    let done = run_with(&place, &hub, PREDICT, &[("HF_TOKEN_PATH", path.to_str().expect("UTF-8"))]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(!done.stderr.contains("secret"));
    let elsewhere = other.asked();
    assert_eq!(elsewhere.len(), 1, "{elsewhere:#?}");
    assert!(elsewhere[0].starts_with("GET /lfs/") && !elsewhere[0].contains("token"), "{elsewhere:#?}");
}

fn common_weights() -> Vec<u8> {
    Place::new().read("model/model.safetensors")
}

#[test]
fn what_is_not_there_says_so() {
    let place = Place::new();
    let hub = hub(&place);
    fails(&place, &hub, "predict --model org/none x", &["org/none at main", "404", "no such repository"]);
    fails(&place, &hub, "predict --model org/tiny@v9 x", &["org/tiny at v9", "404"]);
    fails(&place, &hub, "eval --model org/tiny --data hf:org/none", &["org/none", "404"]);
    hub.add("models/org/empty@main", &commit('b'), "README.md", b"x", &git(b"x"));
    fails(&place, &hub, "predict --model org/empty x", &["org/empty has no config.json"]);
    let nowhere = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    let done = run_with(&place, &hub, "predict --model org/new x", &nowhere);
    assert_eq!(done.code, 1);
    for word in ["http://127.0.0.1:9", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME"] {
        assert!(done.stderr.contains(word), "{word}: {}", done.stderr);
    }
    let done = run_with(&place, &hub, PREDICT, &[("HF_ENDPOINT", "hf-mirror.com")]);
    assert_eq!(done.code, 2);
    assert!(done.stderr.contains("https://hf-mirror.com"), "{}", done.stderr);
}

#[test]
fn a_hostile_hub_writes_nothing_outside() {
    let listed = |name: &str| Manners { listed: vec![name.into()], ..Manners::default() };
    let of_commit = |c: &str| Manners { other_commit: Some(c.into()), ..Manners::default() };
    let rows = [
        (listed("../../../outside"), "is no name for a file"),
        (listed("/etc/passwd"), "is no name for a file"),
        (listed("a\\..\\b"), "is no name for a file"),
        (listed("a\u{1b}[2Jb"), "is no name for a file"),
        (of_commit("../../../../outside"), "40 hexadecimal digits"),
        (of_commit("main"), "40 hexadecimal digits"),
    ];
    for (manners, word) in rows {
        let place = Place::new();
        let hub = hub(&place);
        hub.behave(manners);
        fails(&place, &hub, PREDICT, &[word]);
        assert_eq!(files(&place.path("hf")), Vec::<PathBuf>::new(), "{word}");
    }
    // A name of content that is a path.
    for etag in ["../../../../outside", "/tmp/x", "a/b", ".hidden", ""] {
        let place = Place::new();
        let hub = hub(&place);
        hub.add(MODEL, &commit('a'), "config.json", b"{}", etag);
        fails(&place, &hub, PREDICT, &["config.json", "ETag"]);
        let left = files(&place.path("hf"));
        assert_eq!(left, Vec::<PathBuf>::new(), "{etag:?}");
    }
    // Shards that lead out, and a link in the cache that somebody put there.
    let place = Place::new();
    let hub = hub(&place);
    let index = br#"{"weight_map": {"x": "../../outside"}}"#;
    let sharded = "models/org/shards@main";
    hub.add(sharded, &commit('c'), "config.json", b"{}", &git(b"{}"));
    hub.add(sharded, &commit('c'), "model.safetensors.index.json", index, &git(index));
    fails(&place, &hub, "predict --model org/shards x", &["../../outside"]);
    ok(&place, &hub, PREDICT);
    let config = place.path(&format!("hf/hub/models--org--tiny/snapshots/{}/config.json", commit('a')));
    std::fs::remove_file(&config).expect("removed");
    std::os::unix::fs::symlink(place.path("train.csv"), &config).expect("a link");
    fails(&place, &hub, PREDICT, &["config.json", "outside of its repository"]);
    for name in ["hf:../x/y", "hf:a/b/c", "hf:a/..", "hf:-a/b", "hf:a/b@../c"] {
        assert_eq!(run_with(&place, &hub, &format!("predict --model {name} x"), &[]).code, 2, "{name}");
    }
}

#[test]
fn stages_and_recipes_name_models_and_data() {
    let place = Place::new();
    let hub = hub(&place);
    let data = "datasets/org/cards@main";
    for (name, file) in [("data/train.csv", "train.csv"), ("data/test.csv", "test.csv")] {
        let bytes = place.read(file);
        hub.add(data, &commit('d'), name, &bytes, &git(&bytes));
        std::fs::remove_file(place.path(file)).expect("removed");
    }
    let recipe = "model = \"org/tiny@main\"\nout = \"out\"\n[data]\ntrain = \"hf:org/cards\"\ntest = \"hf:org/cards\"\n\
                  [[stage]]\n[stage.quantize]\nid = \"int8\"\n";
    place.write("recipe.toml", recipe.as_bytes());
    // A dry run fetches nothing.
    let dry = ok(&place, &hub, "run recipe.toml --dry-run");
    assert!(dry.stdout.contains("from the hub, to be fetched"), "{}", dry.stdout);
    assert_eq!(hub.asked(), Vec::<String>::new());
    let done = ok(&place, &hub, "run recipe.toml");
    assert!(done.stdout.contains("test accuracy"), "{}", done.stdout);
    let resolved = String::from_utf8(place.read("out/recipe.resolved.toml")).expect("UTF-8");
    for name in ["org/tiny@main", "hf:org/cards"] {
        assert!(resolved.contains(name), "{resolved}");
    }
    hub.asked();
    let again = ok(&place, &hub, "run recipe.toml");
    assert!(again.stdout.contains("nothing to do"), "{}", again.stdout);
    assert_eq!(hub.asked(), Vec::<String>::new());
    ok(
        &place,
        &hub,
        "train --model org/tiny --train hf:org/cards:train --test hf:org/cards:test --epochs 1 --out trained",
    );
    ok(
        &place,
        &hub,
        "distill --teacher hf:org/tiny --revision main --train hf:org/cards --epochs 1 --layers 0 --out student",
    );
    let eval = ok(&place, &hub, "eval --model-id org/tiny --data hf:org/cards@main:test --format json");
    assert!(eval.stdout.contains("accuracy"), "{}", eval.stdout);
    fails(&place, &hub, "eval --model org/tiny --data hf:org/cards:dev", &["dev", "data/test.csv"]);
}

/// The hub's own Parquet files: parts of a split, labels by their names, and what the card then knows.
#[test]
fn data_sets_are_read_from_the_hubs_parquet() {
    let place = Place::new();
    let hub = hub(&place);
    let readme = b"---\nlicense: apache-2.0\n---\n# Tiny\n";
    hub.add(MODEL, &commit('a'), "README.md", readme, &git(readme));
    let fixture = |name: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parquet");
        std::fs::read(folder.join(name)).expect("the fixture")
    };
    let data = "datasets/org/intents@refs/convert/parquet";
    for (name, file) in [
        ("default/train/0000.parquet", "part-0.parquet"),
        ("default/train/0001.parquet", "part-1.parquet"),
        ("default/test/0000.parquet", "cards.parquet"),
    ] {
        let bytes = fixture(file);
        hub.add(data, &commit('e'), name, &bytes, &sha256(&bytes));
    }
    let eval = ok(&place, &hub, "eval --model org/tiny --data hf:org/intents:train --format json");
    let both = ok(&place, &hub, "eval --model org/tiny --data hf:org/intents --format json");
    assert_eq!(eval.stdout, both.stdout, "the two parts are the whole");
    assert!(hub.asked().iter().any(|a| a.contains("/datasets/org/intents/resolve/")));
    ok(&place, &hub, "eval --model org/tiny --data hf:org/intents:default/test --gate accuracy>=0%");
    let compared =
        ok(&place, &hub, "compare org/tiny --data hf:org/intents --no-speed --no-baseline --format json");
    assert!(compared.stdout.contains("\"name\": \"tiny\""), "{}", compared.stdout);
    let info = ok(&place, &hub, "inspect org/tiny --revision main");
    assert!(info.stdout.contains("parameters"), "{}", info.stdout);
    let refs = place.read("hf/hub/datasets--org--intents/refs/refs/convert/parquet");
    assert_eq!(refs, commit('e').as_bytes());
    ok(
        &place,
        &hub,
        "train --model org/tiny --train hf:org/intents --test hf:org/intents --epochs 1 --out trained",
    );
    ok(&place, &hub, "predict --model trained --input hf:org/intents:test --format jsonl");
    assert_eq!(hub.asked(), Vec::<String>::new());
    let card = String::from_utf8(place.read("trained/README.md")).expect("UTF-8");
    let a = commit('a');
    for part in [
        "base_model: \"org/tiny\"\nbase_model_relation: \"finetune\"\ndatasets: [\"org/intents\"]",
        "\"dataset\":{\"type\":\"org/intents\"",
        &format!("- made from org/tiny (commit {a}), whose card states the licence apache-2.0\n"),
        &format!("- trained on org/intents (commit {})\n", commit('e')),
        "licence of this model: not stated",
    ] {
        assert!(card.contains(part), "{part:?} is not in\n{card}");
    }
    assert!(!card.contains("license:"), "{card}");
    fails(
        &place,
        &hub,
        "eval --model org/tiny --data hf:org/intents:dev",
        &["default/dev", "default/test, default/train"],
    );
    fails(&place, &hub, "eval --model org/tiny --data hf:org/intents:other/test", &["other/test"]);
}
