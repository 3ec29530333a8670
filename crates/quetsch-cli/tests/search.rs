//! `quetsch search` on a tiny model: what it finds, that it goes on, that it repeats, that a trial may fail.

mod common;

use common::Place;
use serde_json::Value;
use std::collections::BTreeSet;

const SEARCH: &str = r#"
model = "model"
out = "found"
[data]
train = "train.csv"
test = "test.csv"
validation = 0.25
[search]
trials = 4
rungs = [1, 2]
points = 4
max-drop = 100
[space]
layers = [1, 2]
heads = [0.0, 0.5]
ffn = [0.0, 0.5]
[train]
epochs = 2
[distill]
epochs = 1
[prune]
score-batches = 2
max-per-layer = 1.0
[[quantize]]
id = "int8"
[[quantize]]
id = "nf4"
quant = "nf4"
"#;

fn place() -> Place {
    let place = Place::new();
    place.write("search.toml", SEARCH.as_bytes());
    place
}

fn record(place: &Place) -> Value {
    serde_json::from_slice(&place.read("found/search.json")).expect("search.json is JSON")
}

fn list<'a>(record: &'a Value, key: &str) -> Vec<&'a Value> {
    record[key].as_array().map(|a| a.iter().collect()).unwrap_or_default()
}

fn of_stage<'a>(record: &'a Value, stage: &str) -> Vec<&'a Value> {
    list(record, "trials").into_iter().filter(|t| t["stage"] == stage).collect()
}

#[test]
fn a_search_halves_stores_measures_and_recommends() {
    let place = place();
    let done = place.ok("search search.toml --threads 1");
    assert!(done.stdout.contains("recommended") && done.stdout.contains("hypervolume"), "{}", done.stdout);
    let r = record(&place);
    assert_eq!(r["finished"], true);
    let trained = |rung: usize| of_stage(&r, "round").iter().filter(|t| t["rung"] == rung).count();
    assert_eq!((trained(0), trained(1)), (4, 2), "half of the shapes survive a round");
    assert_eq!(of_stage(&r, "student").len(), 2, "one student a depth is shared by its shapes");
    assert!(list(&r, "trials").iter().all(|t| t["status"] == "done"), "{r:#}");
    let logits = std::fs::read_dir(place.path("found/cache")).expect("the cache").count();
    assert_eq!(logits, 1, "the teacher answers the training sentences once");

    let points = list(&r, "points");
    assert_eq!(points[0]["name"], "teacher");
    for point in &points {
        assert!(point["latency_ms"]["p50"].as_f64().is_some() && point["disk_bytes"].as_u64() > Some(0), "{point}");
    }
    let named = |end: &str| points.iter().any(|p| p["name"].as_str().is_some_and(|n| n.ends_with(end)));
    assert!(named("-int8") && named("-nf4") && named("-v-int8"), "{points:#?}");
    let worth = points.iter().skip(1).filter(|p| p["below_baseline"] == false);
    let p50 = |p: &Value| p["latency_ms"]["p50"].as_f64().unwrap_or(f64::MAX);
    let fastest = worth.min_by(|a, b| p50(a).total_cmp(&p50(b))).map(|p| p["name"].clone());
    assert_eq!(
        r["recommended"],
        fastest.unwrap_or(Value::Null),
        "with any loss allowed, the fastest that beats TF-IDF"
    );

    // Trials are recipe runs with a provenance, and cannot see the test data.
    for trial in list(&r, "trials") {
        let dir = trial["dir"].as_str().expect("a folder");
        place.read(&format!("{dir}/provenance.json"));
        let recipe = String::from_utf8_lossy(&place.read(&format!("{dir}/../recipe.toml"))).into_owned();
        assert!(!recipe.contains("test.csv") && recipe.contains("validation.csv"), "{recipe}");
    }
    let report = String::from_utf8_lossy(&place.read("found/report.html")).into_owned();
    assert!(report.contains("The test data had no part in it") && report.contains("<svg"), "{report}");
    // The teacher, four points and the baseline at most.
    assert!((2..=6).contains(&r["test_accuracy"].as_object().map_or(0, |t| t.len())), "{}", r["test_accuracy"]);

    let before = place.read("found/search.json");
    let again = place.ok("search search.toml --threads 1");
    assert!(again.stderr.contains("done already"), "{}", again.stderr);
    assert_eq!(again.stdout, done.stdout);
    assert_eq!(place.read("found/search.json"), before);
}

/// Everything but what was timed.
fn choices(r: &Value) -> BTreeSet<String> {
    let trial = |t: &&Value| format!("{} {} {} {}", t["name"], t["key"], t["validation_accuracy"], t["disk_bytes"]);
    list(r, "trials").iter().map(trial).collect()
}

#[test]
fn a_killed_search_goes_on_and_ends_the_same() {
    let whole = place();
    whole.ok("search search.toml --threads 2 --jobs 2");
    let broken = place();
    let mut killed = std::process::Command::new(env!("CARGO_BIN_EXE_quetsch"))
        .current_dir(broken.path("."))
        .args(["search", "search.toml", "--threads", "2", "--jobs", "2"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("starts");
    let start = std::time::Instant::now();
    let students = || {
        let trials = std::fs::read_dir(broken.path("found/trials")).into_iter().flatten().flatten();
        trials.filter(|t| t.path().join("model").exists()).count()
    };
    while students() < 2 && start.elapsed().as_secs() < 120 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    killed.kill().expect("kill -9");
    killed.wait().expect("it is gone");
    let stamp = |place: &Place, r: &Value| {
        let dir = of_stage(r, "teacher")[0]["dir"].as_str().expect("a folder").to_string();
        std::fs::metadata(place.path(&dir).join("model.safetensors")).and_then(|m| m.modified()).expect("a model")
    };
    let early = record(&broken);
    assert!(early["finished"] == false && !of_stage(&early, "teacher").is_empty(), "{early:#}");
    let teacher = stamp(&broken, &early);
    broken.ok("search search.toml --threads 2 --jobs 2");
    let r = record(&broken);
    assert_eq!(stamp(&broken, &r), teacher, "what is done is not done again");
    assert_eq!(choices(&r), choices(&record(&whole)), "the same seed makes the same choices");
}

#[test]
fn a_failing_trial_is_written_down_and_the_rest_goes_on() {
    let place = place();
    // More heads than a layer may lose.
    let line = "search search.toml --threads 1 --set space.heads=[0.0,0.9] --set space.layers=[2]";
    place.ok(&format!("{line} --set prune.max-per-layer=0.5"));
    let r = record(&place);
    let failed: Vec<_> = list(&r, "trials").into_iter().filter_map(|t| t["status"]["failed"].as_str()).collect();
    assert!(failed.len() == 2 && failed.iter().all(|why| why.contains("head")), "{failed:?}");
    assert!(r["finished"] == true && list(&r, "points").len() > 1);
}

#[test]
fn time_that_is_up_ends_the_training_not_the_search() {
    let place = place();
    place.ok("search search.toml --threads 1 --minutes 0.000001");
    let r = record(&place);
    assert!(list(&r, "trials").iter().any(|t| t["status"] == "out_of_time"), "{r:#}");
    assert!(r["finished"] == true && list(&r, "points").len() > 1, "what is trained is stored and timed: {r:#}");
    place.ok("search search.toml --threads 1 --minutes 0");
    assert!(list(&record(&place), "trials").iter().all(|t| t["status"] == "done"), "more time goes on from there");
}

#[test]
fn a_first_round_may_cut_without_training() {
    let place = place();
    let line =
        "search search.toml --threads 1 --set search.rungs=[0,1] --set prune.score=fisher --set prune.tune=weights";
    place.ok(line);
    let r = record(&place);
    let (cut, trained): (Vec<&Value>, Vec<&Value>) =
        of_stage(&r, "round").into_iter().partition(|t| t["epochs"] == 0);
    // Four shapes: each that is cut is cut once; the better two are trained, from what they were cut to.
    assert!(trained.len() == 2 && !cut.is_empty() && cut.iter().all(|t| t["rung"] == 0), "{r:#}");
    let is_cut = |t: &Value| t["name"].as_str().is_some_and(|n| n.contains("-h") || n.contains("-f"));
    assert!(cut.iter().all(|t| is_cut(t)), "what is not cut is the student itself: {cut:?}");
    for t in trained.into_iter().filter(|t| is_cut(t)) {
        let recipe =
            String::from_utf8_lossy(&place.read(&format!("{}/../recipe.toml", t["dir"].as_str().expect("a dir"))))
                .into_owned();
        assert!(recipe.contains("stage.distill") && recipe.contains(".r0-"), "{recipe}");
    }
}

#[test]
fn layers_that_mind_may_stay_in_float() {
    let place = place();
    let text = SEARCH.replace("id = \"int8\"", "id = \"int8\"\nquant = \"fp4\"\nkeep = [\"auto\"]\nbudget = 0.0");
    place.write("search.toml", text.as_bytes());
    let line = "search search.toml --threads 1 --set search.trials=1 --set search.rungs=[1]";
    // Two sentences a label: the layers are measured on one of them.
    place.ok(&format!("{line} --set data.validation=0.5"));
    let r = record(&place);
    assert!(list(&r, "trials").iter().all(|t| t["status"] == "done"), "{r:#}");
    let page = String::from_utf8_lossy(&place.read("found/report.html")).into_owned();
    assert!(page.contains("How much each layer minds being quantised"));
}

#[test]
fn models_are_timed_again_when_asked() {
    let place = place();
    let line = "search search.toml --threads 1 --set search.trials=1 --set search.rungs=[1]";
    place.ok(line);
    let before = record(&place);
    let done = place.ok(&format!("{line} --again"));
    assert!(!done.stderr.contains("done already"), "{}", done.stderr);
    let after = record(&place);
    assert_eq!(choices(&before), choices(&after), "nothing is trained again");
    assert_ne!(list(&before, "points")[0]["latency_ms"], list(&after, "points")[0]["latency_ms"], "but timed");
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_with_130_and_says_how_to_go_on() {
    let place = place();
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_quetsch"))
        .current_dir(place.path("."))
        .args(["search", "search.toml", "--threads", "1", "--set", "train.epochs=400"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("starts");
    let state = || {
        let trials = std::fs::read_dir(place.path("found/trials")).into_iter().flatten().flatten();
        trials.map(|t| t.path().join(".model.training/metrics.jsonl")).any(|m| m.exists())
    };
    let start = std::time::Instant::now();
    while !state() && start.elapsed().as_secs() < 120 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // As a terminal does it: the whole group of processes.
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().expect("kill").success());
    let done = child.wait_with_output().expect("ends");
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(130) && text.contains("Run the same command to go on"), "{text}");
    let r = record(&place);
    assert!(r["finished"] == false && list(&r, "trials").len() == 1, "{r:#}");
}

#[test]
fn a_teacher_may_be_given() {
    let place = place();
    place.ok("train --model model --train train.csv --epochs 1 --out mine");
    let text = SEARCH.replace("model = \"model\"", "teacher = \"mine\"").replace("test = \"test.csv\"\n", "");
    place.write("search.toml", text.as_bytes());
    let done = place.ok("search search.toml --threads 1 --set space.layers=[1] --set search.trials=1");
    assert!(done.stderr.contains("the teacher is given"), "{}", done.stderr);
    let r = record(&place);
    assert!(of_stage(&r, "teacher")[0]["dir"] == "mine" && r["test_accuracy"] == serde_json::json!({}));
}

#[test]
fn complaints_come_before_any_training() {
    let place = place();
    for (line, says) in [
        ("search search.toml --set space.layers=[9]", "the teacher has"),
        ("search search.toml --jobs 0", "--jobs 0"),
        ("search search.toml --set data.validation=0.9", "[0, 0.5]"),
        ("search search.toml --max-drop much", "points"),
    ] {
        let done = place.run(line);
        assert!(done.code == 2 && done.stderr.contains(says), "{line}: {} {}", done.code, done.stderr);
    }
}
