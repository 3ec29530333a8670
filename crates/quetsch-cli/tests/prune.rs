//! Pruning from the command line: budgets in measured time, plans as files, and what cannot be pruned.

mod common;

use common::Place;
use serde_json::Value;

fn json(text: &[u8]) -> Value {
    serde_json::from_slice(text).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(text)))
}

/// Heads and channels by layer.
fn shape(place: &Place, dir: &str) -> Vec<(u64, u64)> {
    let facts = json(place.ok(&format!("inspect {dir} --format json")).stdout.as_bytes());
    let layers = facts["layers"].as_array().expect("layers").iter();
    layers.map(|l| (l["heads"].as_array().map_or(0, Vec::len) as u64, l["ffn"].as_u64().unwrap_or(0))).collect()
}

#[test]
fn a_budget_in_measured_time_and_the_same_plan_from_its_table() {
    let place = Place::new();
    let common = "prune --model model --train train.csv --score fisher --align 8 --epochs 0";
    let made =
        place.run(&format!("{common} --keep-latency 0.5 --latency-tokens 12 --latency-scheme int8 --out timed"));
    assert!(made.code == 0 && made.stderr.contains("Latency of a layer: 12 tokens, int8"), "{}", made.stderr);
    let table = json(&place.read("timed/latency.json"));
    assert_eq!((&table["tokens"], &table["scheme"]), (&12.into(), &"int8".into()), "{table}");
    // What is in the report is the table's time of the layers before and after.
    let us = |layers: &[(u64, u64)]| -> f64 {
        let at = |kind: &str, n: u64| {
            let points = table[kind].as_array().expect("points");
            points.iter().find(|p| p[0].as_u64() == Some(n)).expect("a size that was measured")[1].as_f64()
        };
        let layer = |(heads, ffn): &(u64, u64)| {
            table["rest_us"].as_f64().expect("a time")
                + at("heads", *heads).expect("a time")
                + at("ffn", *ffn).expect("a time")
        };
        layers.iter().map(layer).sum()
    };
    let report = json(&place.read("timed/report.json"));
    for (when, dir) in [("before", "model"), ("after", "timed")] {
        let reported = report["latency_us"][when].as_f64().expect("a time");
        assert!((reported - us(&shape(&place, dir))).abs() < 0.1, "{report}");
    }
    assert!(shape(&place, "timed").iter().all(|(_, ffn)| *ffn > 0 && ffn % 8 == 0));
    // Times of a made-up machine whose channels cost nothing: all heads go that may.
    let mut free = table.clone();
    free["ffn"] = table["ffn"].as_array().expect("points").iter().map(|p| serde_json::json!([p[0], 0.0])).collect();
    free["heads"] = table["heads"]
        .as_array()
        .expect("points")
        .iter()
        .map(|p| serde_json::json!([p[0], p[0].as_f64()]))
        .collect();
    place.write("free.json", free.to_string().as_bytes());
    place.ok(&format!("{common} --keep-latency 0.5 --latency-table free.json --out free"));
    let (whole, thin) = (shape(&place, "model"), shape(&place, "free"));
    assert!(whole.iter().zip(&thin).all(|(a, b)| a.1 == b.1), "{whole:?} {thin:?}");
    let heads = |layers: &[(u64, u64)]| layers.iter().map(|l| l.0).sum::<u64>();
    assert_eq!(heads(&thin), heads(&whole) / 2);
    // A table is a measurement that can be kept: the same plan without measuring, from flags and from a recipe.
    place.ok(&format!("{common} --keep-latency 0.5 --latency-table timed/latency.json --out again"));
    assert_eq!(place.read("again/plan.json"), place.read("timed/plan.json"));
    assert_eq!(place.read("again/latency.json"), place.read("timed/latency.json"));
    place.write(
        "r.toml",
        b"model = \"model\"\nout = \"r\"\n[data]\ntrain = \"train.csv\"\n[[stage]]\n[stage.prune]\nscore = \"fisher\"\n\
          align = 8\nepochs = 0\nkeep-latency = 0.5\nlatency-table = \"timed/latency.json\"\n[[stage]]\n[stage.prune]\n\
          id = \"replayed\"\nmodel = \"model\"\nplan = \"timed/plan.json\"\nepochs = 0\n",
    );
    place.ok("run r.toml");
    assert_eq!(place.read("r/prune/plan.json"), place.read("timed/plan.json"));
    assert_eq!(shape(&place, "r/replayed"), shape(&place, "timed"));
}

#[test]
fn gradual_pruning_reaches_the_same_shape_in_parts() {
    let place = Place::new();
    let common = "prune --model model --train train.csv --test test.csv";
    place.ok(&format!("{common} --heads 4 --ffn 0.5 --layers 1 --score l2 --epochs 3 --cuts 3 --out parts"));
    place.ok("prune --model model --plan parts/plan.json --epochs 0 --out replayed");
    assert_eq!(shape(&place, "parts"), shape(&place, "replayed"), "the plan is of the original model");
    let (whole, parts) = (shape(&place, "model"), shape(&place, "parts"));
    let heads = |layers: &[(u64, u64)]| layers.iter().map(|l| l.0).sum::<u64>();
    assert!(parts.len() == whole.len() - 1 && heads(&parts) <= heads(&whole) - 4, "{whole:?} {parts:?}");
    assert!(
        parts.iter().all(|l| whole.iter().any(|w| l.1 * 2 == w.1)),
        "half of the channels: {whole:?} {parts:?}"
    );
    let report = json(&place.read("parts/report.json"));
    let numbers: Vec<_> = report["epochs"].as_array().expect("epochs").iter().map(|e| e["epoch"].clone()).collect();
    assert_eq!((numbers, report["cuts"].as_array().map(Vec::len)), (vec![1.into(), 2.into(), 3.into()], Some(3)));
    assert!(!place.path(".parts.training").exists());
    // A budget is of the original model, too, and the words and zeros wait for the last cut.
    place.ok(&format!(
        "{common} --score fisher --keep-parameters 0.5 --cuts 2 --epochs 2 --vocab train --sparsity 0.3 --out budget"
    ));
    let size = |layers: &[(u64, u64)]| layers.iter().map(|l| l.0 * 4 * 8 * 32 + l.1 * 2 * 32).sum::<u64>() as f64;
    let share = size(&shape(&place, "budget")) / size(&whole);
    assert!((0.3..0.56).contains(&share), "{share}");
    let zeros = json(&place.read("budget/report.json"))["sparsity"].clone();
    assert!(zeros.as_object().is_some_and(|z| z.len() > 4), "{zeros}");
}

#[test]
fn the_best_epoch_has_all_zeros() {
    let place = Place::new();
    place.ok(
        "prune --model model --train train.csv --validation 0.25 --sparsity 0.5 --sparsity-schedule cubic --keep best \
         --epochs 8 --batch-size 8 --out o",
    );
    let report = json(&place.read("o/report.json"));
    assert!(report["kept_epoch"].as_u64() >= Some(6), "{report}");
    let zeros = report["sparsity"].as_object().expect("by site").values();
    assert!(zeros.filter(|z| (z.as_f64().expect("a share") - 0.5).abs() < 0.01).count() >= 16, "{report}");
}

#[test]
fn plans_are_printed_and_compared() {
    let place = Place::new();
    place.ok("prune --model model --heads 0:0 --ffn 8 --score l2 --epochs 0 --out a");
    place.ok("prune --model model --heads 0:0,1:2 --epochs 0 --out b");
    let printed = place.ok("inspect a/plan.json").stdout;
    assert!(printed.starts_with("Pruning plan:") && printed.contains("heads 0"), "{printed}");
    assert_eq!(
        json(place.ok("inspect a/plan.json --format json").stdout.as_bytes()),
        json(&place.read("a/plan.json"))
    );
    let diff = json(place.ok("inspect a/plan.json --against b/plan.json --format json").stdout.as_bytes());
    // Layer 0 has the heads 0 and 2, the layers 1 and 2 have 4 and 3.
    assert_eq!(diff["first"]["heads"], serde_json::json!([[], [], []]));
    assert_eq!(diff["second"]["heads"], serde_json::json!([[], [2], []]));
    let channels = diff["first"]["ffn"].as_array().expect("layers").iter();
    assert!(channels.map(|l| l.as_array().map(Vec::len)).all(|n| n == Some(8)), "{diff}");
    let parameters =
        |dir: &str| json(place.ok(&format!("inspect {dir} --format json")).stdout.as_bytes())["parameters"].clone();
    assert_eq!(diff["parameters"], Value::from(vec![parameters("a"), parameters("b")]));
    let table = place.ok("inspect a/plan.json --against b/plan.json").stdout;
    assert!(table.contains("8 channels") && table.contains("heads 2"), "{table}");
    assert!(place.ok("inspect a/plan.json --against a/plan.json").stdout.contains("both remove the same"));
    place.ok("prune --model a --heads 1:0 --epochs 0 --out c");
    let refused = place.run("inspect a/plan.json --against c/plan.json");
    assert!(refused.code == 1 && refused.stderr.contains("different parents"), "{}", refused.stderr);
}

#[test]
fn what_cannot_be_pruned() {
    let place = Place::new();
    let (layers, config) =
        (shape(&place, "model"), String::from_utf8(place.read("model/config.json")).expect("UTF-8"));
    place.copy_model("labels");
    place.write("labels/config.json", config.replace("lost_card", "card_lost").as_bytes());
    assert_ne!(place.read("labels/config.json"), place.read("model/config.json"));
    place.ok("prune --model model --heads 0:0 --epochs 0 --out less");
    place.write("table.json", b"{}");
    let too_many = layers.iter().map(|l| l.0).sum::<u64>() + 1;
    let scored = "prune --model model --train train.csv --score fisher --epochs 0 --out o";
    for (line, code, words) in [
        (
            "distill --teacher labels --model model --train train.csv --out o".into(),
            1,
            "labels of teacher (5) and student (5) differ",
        ),
        (
            "prune --model model --teacher labels --heads 1 --train train.csv --out o".into(),
            1,
            "labels of teacher (5) and model (5) differ",
        ),
        ("distill --teacher labels --train train.csv --out o".into(), 1, "lost_card"),
        (format!("prune --model model --heads {too_many} --score l2 --epochs 0 --out o"), 1, "heads"),
        ("prune --model model --heads 0:97 --epochs 0 --out o".into(), 1, "head 97 does not exist"),
        ("prune --model less --heads 0:0 --epochs 0 --out o".into(), 1, "head 0 does not exist"),
        ("prune --model model --ffn 99999 --score l2 --epochs 0 --out o".into(), 1, "channels"),
        (
            "prune --model model --heads 0:0,0:2 --ffn 1.0 --score l2 --epochs 0 --out o".into(),
            1,
            "layer 0 would lose every head and every channel",
        ),
        (format!("prune --model model --layers {} --score l2 --epochs 0 --out o", layers.len()), 1, "layers"),
        ("prune --model model --plan less/config.json --epochs 0 --out o".into(), 1, "no pruning plan"),
        ("prune --model less --plan less/plan.json --epochs 0 --out o".into(), 1, "made for a parent"),
        ("prune --model less --heads 0:2 --epochs 0 --force --out less".into(), 2, "is the model itself"),
        (
            "prune --model model --teacher less --heads 1 --train train.csv --force --out less".into(),
            2,
            "the teacher",
        ),
        (format!("{scored} --heads 0:0 --rearrange"), 2, "`heads` lists them"),
        (format!("{scored} --heads 2 --cuts 2"), 2, "`epochs` is 0"),
        ("prune --model model --heads 0:0 --cuts 2 --train train.csv --out o".into(), 2, "no list"),
        ("prune --model model --sparsity 0.5 --cuts 2 --train train.csv --out o".into(), 2, "parts a share"),
        ("distill --teacher model --relation-heads 2 --train train.csv --out o".into(), 2, "no part of the loss"),
        ("distill --teacher model --hidden-loss l1 --train train.csv --out o".into(), 2, "no part of the loss"),
        (
            "distill --teacher model --relations 1 --relations-of key,key --train train.csv --out o".into(),
            2,
            "twice",
        ),
        ("distill --teacher model --epochs 0 --train train.csv --out o".into(), 2, "at least 1"),
        ("train --model model --folds 500 --train train.csv --out o".into(), 2, "`folds` is 500"),
        (format!("{scored} --keep-latency 0.5 --keep-macs 0.5"), 2, "two budgets"),
        (format!("{scored} --keep-latency 1.5"), 2, "(0, 1]"),
        (format!("{scored} --keep-latency 0.5 --latency-scheme int3"), 2, "int3"),
        (format!("{scored} --keep-latency 0.5 --latency-scheme int8-static"), 1, "calibration"),
        (format!("{scored} --keep-latency 0.5 --latency-tokens 9999"), 1, "9999 tokens"),
        (format!("{scored} --keep-latency 0.5 --latency-table table.json"), 1, "no latency table"),
        (format!("{scored} --keep-latency 0.5 --latency-table none.json"), 1, "none.json"),
        (format!("{scored} --keep-macs 0.5 --latency-tokens 9"), 2, "--latency-tokens"),
        (
            format!("{scored} --keep-latency 0.5 --latency-tokens 9 --latency-table table.json"),
            2,
            "is a measurement",
        ),
        (format!("{scored} --keep-latency 0.01 --align 16"), 1, "1.0% of the time cannot be met"),
    ] {
        let done = place.run(&line);
        let clear = done.stderr.matches("error: ").count() == 1 && !done.stderr.contains("panicked");
        assert!(
            done.code == code && clear && done.stderr.contains(words),
            "quetsch {line}\n{}: {}",
            done.code,
            done.stderr
        );
    }
    assert!(!place.path("o").exists());
}
