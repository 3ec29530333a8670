//! A model directory is replaced while requests are coming in.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Server, fixture, start};
use quetsch_serve::ModelSource;
use serde_json::json;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A copy of the tiny student whose labels begin with `prefix`.
fn write_model(to: &Path, prefix: &str) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(fixture("tiny_student")).unwrap().flatten() {
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if entry.file_name() == "config.json" {
            let mut config: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            let names: serde_json::Map<_, _> =
                (0..5).map(|i| (i.to_string(), json!(format!("{prefix}{i}")))).collect();
            config["label2id"] = names
                .iter()
                .map(|(i, l)| (l.as_str().unwrap().to_owned(), json!(i.parse::<u32>().unwrap())))
                .collect::<serde_json::Map<_, _>>()
                .into();
            config["id2label"] = names.into();
            bytes = config.to_string().into_bytes();
        }
        std::fs::write(to.join(entry.file_name()), bytes).unwrap();
    }
}

/// The best label's first letter.
fn letter(server: &Server) -> String {
    let found = server.post("/predict", &json!({ "inputs": "top up", "top_k": 1 }));
    assert_eq!(found.status, 200, "{}", found.body);
    found.json()[0]["label"].as_str().unwrap()[..1].to_owned()
}

fn wait_for(server: &Server, want: &str) {
    let begin = Instant::now();
    while letter(server) != want {
        assert!(begin.elapsed() < Duration::from_secs(20), "still {}", letter(server));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(unix)]
#[test]
fn a_new_model_takes_over_without_a_lost_request() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    for name in ["a", "b", "c"] {
        write_model(&at(name), name);
    }
    // As deployments do: a link is switched from one directory to the next.
    let switch = |to: &str| {
        std::os::unix::fs::symlink(to, at("next")).unwrap();
        std::fs::rename(at("next"), at("model")).unwrap();
    };
    switch("a");
    let server = start(|c| c.models = vec![ModelSource { name: "tiny".into(), path: at("model") }]);
    let (done, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|s| {
        let ask = || {
            let mut client = server.connect();
            let body = json!({ "inputs": [["top up"], ["I lost my card"]] });
            while !done.load(Ordering::Relaxed) {
                let found = client.post("/predict", &body);
                assert_eq!(found.status, 200, "{}", found.body);
                // Both answers are of one model.
                let first = |i: usize| found.json()[i][0]["label"].as_str().unwrap()[..1].to_owned();
                assert_eq!(first(0), first(1));
                answered.fetch_add(1, Ordering::Relaxed);
            }
        };
        (0..3).for_each(|_| drop(s.spawn(ask)));
        for name in ["b", "c", "a", "b"] {
            switch(name);
            server.reload();
            wait_for(&server, name);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(answered.load(Ordering::Relaxed) > 10);

    // A directory that cannot be read changes nothing, and the server is still ready.
    std::fs::write(at("c").join("model.safetensors"), b"broken").unwrap();
    switch("c");
    server.reload();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((letter(&server).as_str(), server.get("/health").status), ("b", 200));
    switch("a");
    server.reload();
    wait_for(&server, "a");
    server.finish().unwrap();
}

#[test]
fn a_changed_directory_is_seen() {
    let place = tempfile::tempdir().unwrap();
    write_model(place.path(), "a");
    let server = start(|c| {
        c.models = vec![ModelSource { name: "tiny".into(), path: place.path().into() }];
        c.reload_interval = Some(Duration::from_millis(20));
    });
    wait_for(&server, "a");
    write_model(place.path(), "long-names-");
    wait_for(&server, "l");
    // Half a model stays out until the rest of it is there.
    std::fs::remove_file(place.path().join("config.json")).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(letter(&server), "l");
    write_model(place.path(), "b");
    wait_for(&server, "b");
}
