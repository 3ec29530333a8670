//! What works: every command on a tiny model.

mod common;

use common::Place;
use serde_json::Value;

const RECIPE: &str = r#"
model = "model"
out = "out"
[data]
train = "train.csv"
test = "test.csv"
[[stage]]
[stage.train]
id = "teacher"
epochs = 2
[[stage]]
[stage.distill]
id = "student"
layers = [0, 1]
epochs = 1
[[stage]]
[stage.prune]
heads = 1
ffn = 0.25
epochs = 1
[[stage]]
[stage.quantize]
id = "int8"
[[stage]]
[stage.quantize]
id = "nf4"
quant = "nf4"
[[stage]]
[stage.eval]
[[stage]]
[stage.compare]
"#;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn help_names_the_commands_that_exist() {
    let help = Place::new().ok("--help").stdout;
    for command in [
        "demo",
        "run",
        "search",
        "train",
        "distill",
        "prune",
        "quantize",
        "eval",
        "compare",
        "predict",
        "bench",
        "inspect",
        "export",
        "init",
        "serve",
        "completions",
        "man",
    ] {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is not in the help:\n{help}");
    }
    assert!(Place::new().ok("completions bash").stdout.contains("quetsch"));
    assert!(Place::new().ok("man").stdout.contains(".TH"));
}

#[test]
fn predict_prints_every_format() {
    let place = Place::new();
    let done = place.ok("predict --model model hello --format json --logits");
    let answers = json(&done.stdout);
    let first = &answers[0];
    assert_eq!(first["text"], "hello");
    let scores: Vec<f64> =
        first["predictions"].as_array().expect("a list").iter().filter_map(|p| p["score"].as_f64()).collect();
    assert_eq!(scores.len(), 3, "Top-3 by default");
    assert!(scores.windows(2).all(|w| w[0] >= w[1]), "falling: {scores:?}");
    assert_eq!(first["logits"].as_array().map(Vec::len), Some(5));

    place.write("texts.txt", b"one\ntwo, three\n");
    let lines = place.ok("predict --model model --input texts.txt --format jsonl --top-k 1").stdout;
    assert_eq!(lines.lines().map(|l| json(l)["text"].clone()).collect::<Vec<_>>(), ["one", "two, three"]);
    let csv = place.ok("predict --model model --input texts.txt --format csv --top-k 1").stdout;
    assert!(csv.starts_with("text,label_1,score_1\none,"), "{csv}");
    assert!(csv.contains("\"two, three\""), "{csv}");

    let mut command = place.command();
    let piped = command.args(["predict", "--model", "model", "--format", "jsonl"]).write_stdin("a\nb\n").output();
    let piped = piped.expect("runs");
    assert_eq!(String::from_utf8_lossy(&piped.stdout).lines().count(), 2);

    let human = place.ok("predict --model model hello").stdout;
    assert!(human.starts_with("hello\n  1. "), "{human}");
    let fewer = place.command().env("QUETSCH_TOP_K", "1").args(["predict", "--model", "model", "hello"]).output();
    assert_eq!(String::from_utf8_lossy(&fewer.expect("runs").stdout).lines().count(), 2, "the environment counts");
}

/// Other column names, another delimiter, another alphabet, labels that the model does not know, one of them once.
#[test]
fn init_and_run_need_no_edits() {
    let place = Place::new();
    let mut rows = String::from("nr;frage;thema\n");
    for i in 0..12 {
        rows += &format!("{i};wo ist meine karte {i};Karte\n{i};neue pin bitte {i};PIN ändern\n");
        rows += if i < 6 { "9;退款在哪里;退款\n" } else { "" };
    }
    place.write("fragen.csv", format!("{rows}77;\"sonst; etwas\";Sonstiges\n").as_bytes());
    let said = place.ok("init fragen.csv --model model");
    assert!(said.stderr.contains("`frage` looks like the text and `thema` like the label"), "{}", said.stderr);
    assert!(said.stderr.contains("unknown to this encoder"), "{}", said.stderr);
    let done = place.ok("run quetsch.toml");
    assert!(done.stdout.contains("TF-IDF baseline") && place.path("quetsch/compare/report.html").exists());

    // The commented stages are a recipe, too.
    let recipe = String::from_utf8_lossy(&place.read("quetsch.toml")).into_owned();
    let (before, rest) = recipe.split_once("to have it.\n").expect("the optional stages");
    let (plain, after) = rest.split_once("\n# 5.").expect("the last stage");
    let plain =
        plain.lines().map(|l| l.trim_start_matches("# ").trim_end_matches('#')).collect::<Vec<_>>().join("\n");
    place.write("plain.toml", format!("{before}\n{plain}\n# 5.{after}").as_bytes());
    let done = place.ok("run plain.toml --set out=quetsch");
    assert!(done.stdout.contains("nothing to do") && done.stdout.contains("plain"), "{}", done.stdout);
    let report = json(&String::from_utf8_lossy(&place.read("quetsch/compare/report.json")));
    let parameters = |name: &str| {
        let all = report["variants"].as_array().expect("variants").iter();
        all.filter(|v| v["name"] == name).map(|v| v["parameters"].as_u64()).next().flatten()
    };
    assert!(parameters("plain").is_some() && parameters("plain") == parameters("pruned"), "of the same size");
}

/// `docs/recipes.md`: what the teacher is worth.
#[test]
fn a_plain_student_has_the_same_shape_and_no_teacher_in_its_loss() {
    let place = Place::new();
    let distill = |id: &str, alpha: f64| {
        format!("[[stage]]\n[stage.distill]\nid = \"{id}\"\nlayers = [0, 2]\nalpha = {alpha:.1}\nepochs = 1\n")
    };
    let head = "model = \"model\"\nout = \"out\"\n[data]\ntrain = \"train.csv\"\ntest = \"test.csv\"\nvalidation = 0\n\
                [[stage]]\n[stage.train]\nid = \"teacher\"\nepochs = 1\n";
    let recipe = format!(
        "{head}{}{}[[stage]]\n[stage.compare]\nno-speed = true\n",
        distill("student", 0.3),
        distill("plain", 1.0)
    );
    place.write("r.toml", recipe.as_bytes());
    place.ok("run r.toml");
    let report = json(&String::from_utf8_lossy(&place.read("out/compare/report.json")));
    assert_eq!(report["variants"][1]["parameters"], report["variants"][2]["parameters"]);
    for (id, has_kl) in [("student", true), ("plain", false)] {
        let metrics = String::from_utf8_lossy(&place.read(&format!("out/{id}/metrics.jsonl"))).into_owned();
        let first = json(metrics.lines().next().expect("a step"));
        let number = |key: &str| first[key].as_f64().unwrap_or(0.0);
        assert_eq!((number("loss") - number("ce")).abs() > 1e-9, has_kl, "{id}: {first}");
    }
}

#[test]
fn init_says_why_a_recipe_would_not_run() {
    let place = Place::new();
    let rows = |n: usize, label: &dyn Fn(usize) -> String| {
        (0..n).fold("text,label\n".to_string(), |t, i| t + &format!("hello number {i},{}\n", label(i)))
    };
    let cases: [(&str, String, &[&str]); 4] = [
        ("one.csv", rows(20, &|_| "only".into()), &["every row has the label `only`"]),
        ("few.csv", rows(8, &|i| format!("l{}", i % 4)), &["--test FILE", "8 sentences are too few"]),
        ("score.csv", rows(20, &|i| format!("{}.5", i)), &["--test FILE", "regression"]),
        (
            "empty.csv",
            rows(20, &|i| if i == 3 { String::new() } else { format!("l{}", i % 2) }),
            &["line 5", "empty"],
        ),
    ];
    for (file, text, said) in cases {
        place.write(file, text.as_bytes());
        let done = place.run(&format!("init {file} --model model --out {file}.toml"));
        assert!(done.code != 0 && said.iter().all(|s| done.stderr.contains(s)), "{file}: {}", done.stderr);
        assert!(!place.path(&format!("{file}.toml")).exists(), "{file}: no recipe");
    }
    let stars = rows(40, &|i| (1 + i % 5).to_string());
    place.write("stars.csv", stars.as_bytes());
    let done = place.ok("init stars.csv --model model --out stars.toml");
    assert!(done.stdout.contains("40 sentences and 5 labels"), "{}", done.stdout);
    let headerless = "wo ist meine karte|karte\n".repeat(3) + &"neue pin bitte|pin\n".repeat(3);
    place.write("bare.csv", headerless.as_bytes());
    let done = place.run("init bare.csv --model model --test test.csv --out bare.toml");
    assert!(done.stderr.contains("first line looks like data"), "{}", done.stderr);
}

#[test]
fn without_test_data_the_part_set_aside_stands_in() {
    let place = Place::new();
    let without = RECIPE.replace("test = \"test.csv\"", "validation = 0.25");
    place.write("r.toml", without.replace("[[stage]]\n[stage.eval]\n", "").as_bytes());
    let done = place.ok("run r.toml --gate accuracy>=0%");
    assert!(done.stderr.contains("no test data") && done.stdout.contains("TF-IDF baseline"), "{}", done.stderr);
    let report = json(&String::from_utf8_lossy(&place.read("out/compare/report.json")));
    assert!(
        report["data"]["held_out"] == true && report["sentences"] == 5,
        "one sentence a label: {}",
        report["data"]
    );
    let rows = |file: &str| String::from_utf8_lossy(&place.read(file)).lines().skip(1).count();
    assert_eq!(
        (rows("out/data/train.csv"), rows("out/data/validation.csv")),
        (15, 5),
        "the baseline sees the rest"
    );
    let report = String::from_utf8_lossy(&place.read("out/compare/report.html")).into_owned();
    assert!(report.contains("No test data were given"));
}

#[test]
fn what_cannot_be_measured_is_known_before_training() {
    let place = Place::new();
    let complains = |recipe: &str, says: &str| {
        place.write("r.toml", recipe.as_bytes());
        let done = place.run("run r.toml");
        assert!(done.code != 0 && done.stderr.contains(says), "{says}: {} {}", done.code, done.stderr);
        assert!(!place.path("out/teacher").exists(), "nothing was trained");
    };
    let without = RECIPE.replace("test = \"test.csv\"", "");
    complains(&without, "which stage eval measures on");
    complains(&without.replace("[[stage]]\n[stage.eval]\n", ""), "data.validation = 0.1");
    // A label that no training sentence has.
    place.write("strange.csv", b"text,label\nwhat is this,never_seen\n");
    complains(&RECIPE.replace("test.csv", "strange.csv"), "never_seen");
}

#[test]
fn a_recipe_runs_once_and_is_then_done() {
    let place = Place::new();
    place.write("r.toml", RECIPE.as_bytes());
    let plan = place.ok("run r.toml --dry-run").stdout;
    assert!(plan.contains("teacher (train): will run") && !place.path("out").exists(), "{plan}");

    place.ok("run r.toml --until student");
    assert!(place.path("out/student/model.safetensors").exists() && !place.path("out/prune").exists());
    let first = place.ok("run r.toml");
    assert!(first.stdout.contains("teacher: ") && first.stdout.contains("nothing to do"), "{}", first.stdout);
    assert!(first.stdout.contains("TF-IDF baseline"), "{}", first.stdout);
    for file in [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "provenance.json",
        "report.json",
        "metrics.jsonl",
        "events.out.tfevents.quetsch",
    ] {
        assert!(place.path("out/student").join(file).exists(), "{file}");
    }
    for file in ["out/prune/plan.json", "out/recipe.resolved.toml", "out/report.json", "out/compare/report.html"] {
        assert!(place.path(file).exists(), "{file}");
    }
    let before = place.read("out/int8/model.safetensors");
    let again = place.ok("run r.toml --format json");
    assert_eq!(again.stderr.matches("==").count(), 0, "nothing runs twice: {}", again.stderr);
    let report = json(&again.stdout);
    let stages = report["stages"].as_array().expect("stages");
    assert_eq!(stages.len(), 7);
    let variants = stages[6]["comparison"]["variants"].as_array().expect("variants");
    assert_eq!(variants[3]["parent"], "prune", "int8 is compared with what it was made from");
    assert!(variants[0]["latency_ms"]["p50"].as_f64().is_some() && variants[0]["accuracy"].as_f64().is_some());

    let other = place.run("run r.toml --set student.alpha=0.4");
    assert_eq!(other.code, 1);
    assert!(other.stderr.contains("alpha was 0.3, is 0.4") && other.stderr.contains("--force"), "{}", other.stderr);
    assert_eq!(place.read("out/int8/model.safetensors"), before);

    let resolved = place.ok("run out/recipe.resolved.toml");
    assert!(!resolved.stderr.contains("=="), "the resolved recipe is the same recipe: {}", resolved.stderr);
    let gate = place.run("run r.toml --gate disk<=0.001MB");
    assert_eq!(gate.code, 3, "{}", gate.stderr);
    place.ok("run r.toml --gate accuracy>=0%");
}

#[test]
fn the_same_command_makes_the_same_bytes() {
    let place = Place::new();
    for out in ["a", "b"] {
        place.ok(&format!("train --model model --train train.csv --epochs 2 --threads 2 --out {out}"));
    }
    for file in ["model.safetensors", "config.json", "provenance.json", "metrics.jsonl"] {
        assert_eq!(place.read(&format!("a/{file}")), place.read(&format!("b/{file}")), "{file}");
    }
    place.ok("train --model model --train train.csv --epochs 2 --validation 0.5 --keep best --out c");
}

#[test]
fn a_killed_training_resumes_to_the_same_bytes() {
    let place = Place::new();
    let line = "train --model model --train train.csv --epochs 150 --batch-size 2 --save-every 7 --threads 1 --out";
    place.ok(&format!("{line} whole"));
    let mut killed = std::process::Command::new(env!("CARGO_BIN_EXE_quetsch"))
        .current_dir(place.path("."))
        .args(line.split_whitespace().chain(["broken"]))
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("starts");
    let state = place.path(".broken.training/state/state.safetensors");
    let start = std::time::Instant::now();
    while !state.exists() && start.elapsed().as_secs() < 60 {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    killed.kill().expect("kill -9");
    killed.wait().expect("it is gone");
    assert!(!place.path("broken").exists(), "killed before the end");
    let plain = place.run(&format!("{line} broken"));
    assert_eq!(plain.code, 1);
    assert!(plain.stderr.contains("--resume") && plain.stderr.contains("--force"), "{}", plain.stderr);
    let resumed = place.ok(&format!("{line} broken --resume"));
    assert!(resumed.stderr.contains("going on after step"), "{}", resumed.stderr);
    for file in ["model.safetensors", "metrics.jsonl", "provenance.json"] {
        assert_eq!(place.read(&format!("whole/{file}")), place.read(&format!("broken/{file}")), "{file}");
    }
    assert!(!place.path(".broken.training").exists(), "the state is gone when it is not needed");
}

#[test]
fn small_commands() {
    let place = Place::new();
    let inspect = json(&place.ok("inspect model --format json").stdout);
    assert_eq!(inspect["layers"][0]["pruned_heads"], serde_json::json!([1, 3]));
    let eval = json(&place.ok("eval --model model --data test.csv --format json").stdout);
    assert_eq!(eval["n"], 5);
    for (gate, code) in [("accuracy>=0%", 0), ("accuracy>=101%", 2), ("disk<=0.001MB", 3), ("accuracy>=-1pt", 2)] {
        let done = place.run(&format!("eval --model model --data test.csv --gate {gate}"));
        assert_eq!(done.code, code, "{gate}: {}", done.stderr);
    }
    let bench = json(
        &place
            .ok("bench --model model --against model --samples 20 --seconds 0.01 --lengths 8,16,4000 --format json")
            .stdout,
    );
    assert!(bench["latency_ms"]["p99"].as_f64() >= bench["latency_ms"]["p50"].as_f64());
    let lengths = bench["by_length"].as_array().expect("a list");
    assert_eq!(lengths.iter().map(|l| l["tokens"].as_u64()).collect::<Vec<_>>(), [Some(8), Some(16)]);
    assert_eq!(bench["work"]["arithmetic"], "f32");
    assert!(bench["memory_mb"]["weights"].is_f64() && bench["against"]["latency_ratio"]["8"].is_f64());
    place.ok("export --model model --to hf --layout dense --out dense");
    let dense = json(&place.ok("inspect dense --format json").stdout);
    assert_eq!(dense["layers"][0]["pruned_heads"], serde_json::json!([]));
    let logits = |dir: &str| {
        let done = place.ok(&format!("predict --model {dir} hello --logits --format json"));
        json(&done.stdout)[0]["logits"]
            .as_array()
            .expect("logits")
            .iter()
            .filter_map(Value::as_f64)
            .collect::<Vec<_>>()
    };
    for (a, b) in logits("model").iter().zip(logits("dense")) {
        assert!((a - b).abs() < 1e-5, "the dense layout computes the same: {a} {b}");
    }
    place.ok("export --model model --to bnb-nf4 --out four");
    let four = json(&place.ok("inspect four --format json").stdout);
    assert_eq!((&four["sites"]["layer.0.query"], &four["sites"]["head.4"]), (&"nf4".into(), &"f32".into()));
    place.ok("init train.csv --model model --test test.csv");
    place.ok("run quetsch.toml --dry-run");
    let html = place.ok("compare model dense --data test.csv --no-speed --report r.html");
    assert!(html.stdout.contains("dense") && place.read("r.html").starts_with(b"<!doctype html>"));
    let compare = "compare model dense --data test.csv --no-speed";
    place.ok(&format!("{compare} --gate flips<=0% --gate disk<=2x --report zh.html --report zh.json --lang zh"));
    assert!(String::from_utf8_lossy(&place.read("zh.html")).contains("准确率"));
    assert_eq!(json(&String::from_utf8_lossy(&place.read("zh.json")))["gates"][0]["met"], true);
    for (gate, code, says) in [
        ("disk<=0.000001MB", 3, "1 of 1 conditions are not met"),
        ("latency<=1x", 2, "--no-speed"),
        ("acuracy>=1%", 2, "worst_recall"),
    ] {
        let done = place.run(&format!("{compare} --gate {gate}"));
        assert!(done.code == code && done.stderr.contains(says), "{gate}: {} {}", done.code, done.stderr);
    }
}

/// The bar is hidden then, and once held its lock twice.
#[test]
fn a_quiet_training_says_nothing_and_ends() {
    let place = Place::new();
    let done = place.ok("train --quiet --model model --train train.csv --epochs 2 --out quiet");
    assert_eq!(done.stderr, "");
    assert!(place.path("quiet/model.safetensors").exists());
}

/// A rate so low that no answer changes: the second epoch is no better than the first.
#[test]
fn training_stops_when_validation_gets_no_better() {
    let place = Place::new();
    place
        .ok("train --model model --train train.csv --validation 0.5 --learning-rate 1e-12 --epochs 6 --keep best \
         --patience 1 --class-weights sqrt --label-smoothing 0.1 --out a");
    let report = json(&String::from_utf8_lossy(&place.read("a/report.json")));
    assert_eq!(report["epochs"].as_array().map(Vec::len), Some(2), "{report}");
    assert_eq!(report["kept_epoch"], 1);
}

#[test]
fn a_pruned_vocabulary_gives_the_same_answers_on_what_it_was_pruned_for() {
    let place = Place::new();
    place.ok("prune --model model --train train.csv --vocab train --epochs 0 --out small");
    let rows = |dir: &str| {
        json(&String::from_utf8_lossy(&place.read(&format!("{dir}/config.json"))))["vocab_size"].clone()
    };
    assert!(rows("small").as_u64() < rows("model").as_u64(), "{} < {}", rows("small"), rows("model"));
    let answers = |dir: &str, text: &str| {
        let done = place.command().args(["predict", "--model", dir, text, "--logits", "--format", "json"]).output();
        json(&String::from_utf8_lossy(&done.expect("runs").stdout))[0]["logits"].clone()
    };
    assert_eq!(answers("small", "I lost my card, please!"), answers("model", "I lost my card, please!"));
    assert!(answers("small", "quite another sentence").is_array());
    place.ok("prune --model model --train train.csv --vocab train+150 --epochs 0 --out first");
    let entries = ["small", "first", "model"].map(|dir| rows(dir).as_u64().expect("a number"));
    assert!(entries[0] < entries[1] && entries[1] < entries[2], "{entries:?}");
    place.ok("prune --model model --train train.csv --test test.csv --vocab train --heads 1 --epochs 1 --out both");
    assert_eq!(rows("both"), rows("small"));
    let none = place.run("prune --model model --vocab train --epochs 0 --out o");
    assert!(none.code == 2 && none.stderr.contains("--train"), "{}", none.stderr);
}

#[test]
fn a_student_learns_from_inside_its_teacher() {
    let place = Place::new();
    place.ok(
        "distill --teacher model --train train.csv --layers 0,2 --epochs 2 --logits 0.1 --logits-loss l1 --hidden 0.5 \
         --hidden-map 0:0,1:1+2 --embeddings 0.2 --attention 0.4 --attention-map 0:0,1:2 --relations 0.6 \
         --relation-heads 2 --relations-of key,value --out a",
    );
    let report = json(&String::from_utf8_lossy(&place.read("a/report.json")));
    let metrics = place.read("a/metrics.jsonl");
    let first = json(String::from_utf8_lossy(&metrics).lines().next().expect("a line"));
    let part = |key: &str| first[key].as_f64().expect("a number");
    let weights = [("logits", 0.1), ("hidden", 0.5), ("embeddings", 0.2), ("attention", 0.4), ("relations", 0.6)];
    let inside: f64 = weights.iter().map(|(key, w)| w * part(key)).sum();
    assert!((part("loss") - 0.3 * part("ce") - 0.7 * part("kl") - inside).abs() < 1e-6, "{first}");
    assert!(weights.iter().all(|(key, _)| report["epochs"][0][*key].as_f64() > Some(0.0)), "{report}");
    place.ok(
        "prune --model model --train train.csv --heads 1 --vocab train --epochs 1 --hidden 1 --attention 1 --out b",
    );
    place.ok("distill --teacher b --train train.csv --epochs 1 --out c");
    let report = json(&String::from_utf8_lossy(&place.read("c/report.json")));
    assert!(report["layer_weights"].is_null(), "{report}");
    place.ok("distill --teacher model --layers 0,2 --train train.csv --epochs 1 --hidden 1 --hidden-map weighted --out d");
    let weighted = json(&String::from_utf8_lossy(&place.read("d/report.json")));
    let weights = |layer: &str| -> Vec<f64> {
        weighted["layer_weights"][layer].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
    };
    for layer in ["0", "1"] {
        assert!(weights(layer).len() == 3 && (weights(layer).iter().sum::<f64>() - 1.0).abs() < 1e-5, "{weighted}");
    }
    assert!(report["epochs"][0]["hidden"].is_null(), "what is no part is not reported: {report}");
}

#[test]
fn pruning_without_training_keeps_its_budget() {
    let place = Place::new();
    let made = place.run(
        "prune --model model --train train.csv --validation 0.2 --score fisher --keep-macs 0.5 --align 8 --rearrange \
         --tune weights --epochs 0 --out half",
    );
    assert!(made.code == 0, "{}", made.stderr);
    let report = json(&String::from_utf8_lossy(&place.read("half/report.json")));
    assert!(
        report["validation_accuracy"].is_number() && report["train_accuracy_after_cut"].is_number(),
        "{report}"
    );
    let facts = |dir: &str| json(&place.ok(&format!("inspect {dir} --format json")).stdout);
    let (whole, half) = (facts("model"), facts("half"));
    let widths = |f: &Value| -> Vec<u64> {
        f["layers"].as_array().expect("layers").iter().filter_map(|l| l["ffn"].as_u64()).collect()
    };
    assert!(widths(&half).iter().all(|w| w % 8 == 0 && *w > 0), "{half}");
    assert!(widths(&half).iter().sum::<u64>() < widths(&whole).iter().sum(), "{half}");
    // The same plan again, from its file, is the same model but for what was fitted.
    place.ok("prune --model model --plan half/plan.json --epochs 0 --out again");
    assert_eq!(facts("again")["layers"], half["layers"]);
    for flags in [
        "--score taylor --keep-parameters 0.6",
        "--score activation --heads 2 --ffn 8 --layers 1",
        "--score taylor --tune mask --heads 1 --ffn 16 --ffn-scope global",
    ] {
        place.ok(&format!("prune --model model --train train.csv {flags} --epochs 0 --force --out other"));
    }
    place.ok("prune --model model --train train.csv --score fisher --keep-macs 0.7 --epochs 1 --out trained");
}

#[test]
fn zeros_stay_through_recovery_and_later_training() {
    let place = Place::new();
    place.ok(
        "prune --model model --train train.csv --sparsity 0.5 --sparsity-scope per-layer --epochs 1 --out once",
    );
    place.ok(
        "prune --model model --train train.csv --sparsity 0.6 --sparsity-schedule cubic --epochs 4 --out slowly",
    );
    place.ok("distill --teacher model --model once --train train.csv --epochs 1 --keep-zeros --out kept");
    place.ok("distill --teacher model --model once --train train.csv --epochs 1 --alpha-end 0.5 --temperature-end 1 --out dense");
    for (dir, share) in [("once", 0.5), ("slowly", 0.6), ("kept", 0.5)] {
        let facts = json(&place.ok(&format!("inspect {dir} --format json")).stdout);
        let sites = facts["sparsity"].as_object().expect("sites with zeros");
        assert!(sites.len() >= 16, "{dir}: {facts}");
        assert!(sites.values().all(|s| (s.as_f64().expect("a share") - share).abs() < 0.01), "{dir}: {facts}");
    }
    assert!(json(&place.ok("inspect dense --format json").stdout)["sparsity"].is_null());
}

/// Labels that nothing in the texts tells: whoever was trained on a text knows its own, nobody else does.
#[test]
fn out_of_fold_logits_are_of_models_that_did_not_see_the_text() {
    let place = Place::new();
    let names = ["add_money", "card_fee", "change_pin", "double_charge", "lost_card"];
    let mut rows = "text,label\n".to_string();
    let label = |i: usize| (31 * i * i + 17 * i + 5) % 97 % 5;
    for i in 0..40 {
        let word = |k: usize| ["card", "money", "pin", "fee", "lost", "charge", "today", "please"][(i / k) % 8];
        rows += &format!("{} {} {}{},{}\n", word(1), word(8), i, word(3), names[label(i)]);
    }
    place.write("d.csv", rows.as_bytes());
    place.ok(
        "train --model model --train d.csv --epochs 60 --batch-size 8 --learning-rate 3e-3 --dropout 0 --folds 4 --out t",
    );
    let order: Vec<String> = json(&String::from_utf8_lossy(&place.read("t/config.json")))["id2label"]
        .as_object()
        .map(|l| (0..l.len()).map(|i| l[&i.to_string()].as_str().unwrap_or_default().to_string()).collect())
        .expect("labels");
    let bytes = place.read("t/out-of-fold.f32");
    let logits: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let best =
        |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| order[i].clone());
    let right = logits.chunks(5).enumerate().filter(|(i, row)| best(row).as_deref() == Some(names[label(*i)]));
    let (unseen, seen) = (right.count(), json(&place.ok("eval --model t --data d.csv --format json").stdout));
    let seen = seen["accuracy"].as_f64().expect("accuracy") * 40.0;
    assert!(seen >= 34.0 && unseen <= 20, "{seen} of 40 that were trained on, {unseen} out of fold");
}

#[test]
fn several_teachers_unlabelled_texts_and_out_of_fold_logits() {
    let place = Place::new();
    place.write("more.txt", b"please block my card\n\nwhat is this charge\n");
    place.ok("train --model model --train train.csv --epochs 2 --folds 2 --out teacher");
    let logits = place.read("teacher/out-of-fold.f32");
    assert_eq!(logits.len(), 4 * 5 * 20, "4 bytes, 5 labels, 20 sentences");
    place.ok("train --model model --train train.csv --epochs 1 --seed 7 --out second");
    place.ok("distill --teacher teacher --train train.csv --epochs 1 --out alone");
    // Without a part set aside the seed decides nothing about the data.
    place.ok("distill --teacher teacher --train train.csv --epochs 1 --out-of-fold --seed 9 --out folds");
    place.ok(
        "distill --teacher teacher --teachers second,model --teacher-weights 2,1,1 --train train.csv --epochs 1 \
         --unlabelled more.txt --out many",
    );
    place.ok("distill --teacher teacher --teachers teacher --train train.csv --epochs 1 --out twice");
    let first = |dir: &str| {
        let metrics = place.read(&format!("{dir}/metrics.jsonl"));
        json(String::from_utf8_lossy(&metrics).lines().next().expect("a line"))["kl"].as_f64().expect("a number")
    };
    assert!((first("alone") - first("twice")).abs() < 1e-6, "the mean of a teacher with itself");
    assert!((first("alone") - first("folds")).abs() > 1e-6 && (first("alone") - first("many")).abs() > 1e-6);
    // A weighted mean: of two in either order, the same one named twice, one that is everything.
    let mean = |teacher: &str, more: &str, weights: &str| {
        place.ok(&format!(
            "distill --teacher {teacher} --teachers {more} --teacher-weights {weights} --model model --train train.csv \
             --epochs 1 --force --out mean"
        ));
        first("mean")
    };
    place.ok("distill --teacher teacher --model model --train train.csv --epochs 1 --out start");
    let (one, three) = (mean("teacher", "second", "1,1"), mean("teacher", "second", "1,3"));
    assert!((one - three).abs() > 1e-6);
    assert!((three - mean("second", "teacher", "3,1")).abs() < 1e-6);
    assert!((three - mean("teacher", "second,second", "2,5,1")).abs() < 1e-6);
    assert!((first("start") - mean("teacher", "second", "1e9,1")).abs() < 1e-6);
    place.ok(
        "distill --teacher teacher --random --layers 0,1 --student-hidden 24 --student-heads 3 --student-ffn 20 --hidden 1 \
         --train train.csv --test test.csv --epochs 1 --out small",
    );
    let facts = json(&place.ok("inspect small --format json").stdout);
    assert_eq!((&facts["hidden"], &facts["layers"][1]["ffn"]), (&24.into(), &20.into()), "{facts}");
    place.write("other.csv", b"text,label\nlost my card,lost_card\ncharged twice,double_charge\n");
    for (line, words) in [
        ("distill --teacher teacher --train other.csv --out-of-fold --out o", "other training data"),
        ("distill --teacher second --train train.csv --out-of-fold --out o", "out-of-fold"),
        (
            "distill --teacher teacher --teachers second --teacher-weights 1 --train train.csv --out o",
            "1 weights for 2",
        ),
        ("distill --teacher teacher --train train.csv --student-hidden 8 --out o", "`random`"),
        ("distill --teacher teacher --train train.csv --random --student-heads 5 --out o", "heads that divide"),
        ("train --model model --train train.csv --folds 1 --out o", "at least 2"),
    ] {
        let done = place.run(line);
        assert!(done.code != 0 && done.stderr.contains(words), "{line}\n{}", done.stderr);
    }
}
