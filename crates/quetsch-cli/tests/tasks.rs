//! Tasks other than one label a text, from the command line: each is learned, distilled, pruned, quantised, compared
//! and answered.

mod common;

use common::Place;
use serde_json::Value;

const FILLERS: [&str; 8] = [
    "i lost my",
    "why is the",
    "where was a",
    "please help with the",
    "my new",
    "what is this",
    "how can i open the",
    "the bank and the",
];
const THINGS: [&str; 4] = ["card", "fee", "pin", "app"];

/// All pairs of things in all frames: (words, which things are in it).
fn sentences() -> Vec<(Vec<&'static str>, Vec<&'static str>)> {
    let mut all = vec![];
    for (i, filler) in FILLERS.iter().enumerate() {
        for (j, a) in THINGS.iter().enumerate() {
            let b = THINGS[(i + j) % 4];
            let words = filler.split(' ').chain([*a, "for", b, "today"]).collect();
            let mut things = vec![*a, b];
            things.dedup();
            all.push((words, things));
        }
    }
    all
}

fn number(thing: &str) -> f32 {
    match thing {
        "card" => 1.0,
        "fee" => -1.0,
        "pin" => 0.5,
        _ => 0.0,
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

const LEARN: &str = "--epochs 40 --batch-size 8 --learning-rate 3e-3 --dropout 0 --head-dropout 0 --precision f32";

/// Trains, distils with `kd`, prunes and quantises on `file`, checks that every model's `figure` is at least `least`,
/// and returns the last one's lines of `predict --input input`.
fn every_stage(place: &Place, data: &str, kd: &str, figure: &str, least: f64, input: &str) -> Vec<Value> {
    let file = data.split(' ').next().unwrap_or_default();
    place.ok(&format!("train --model model --train {data} --test {file} --out teacher --validation 0.1 {LEARN}"));
    place.ok(&format!("distill --teacher teacher --layers 0,1 --train {data} --out student {kd} {LEARN}"));
    place.ok(&format!("prune --model student --train {data} --heads 1 --ffn 0.25 --out pruned {LEARN}"));
    place.ok("quantize --model pruned --out int8");
    for model in ["teacher", "student", "pruned", "int8"] {
        let done = place.ok(&format!("eval --model {model} --data {file} --format json"));
        let found = json(&done.stdout)[figure].as_f64().unwrap_or(f64::NAN);
        assert!(found >= least, "{model}: {figure} {found}, expected {least}\n{}", done.stdout);
        place.ok(&format!("inspect {model}"));
    }
    let config = json(&String::from_utf8_lossy(&place.read("int8/config.json")));
    assert_eq!(
        config["problem_type"],
        json(&String::from_utf8_lossy(&place.read("teacher/config.json")))["problem_type"]
    );
    let compared = place
        .ok(&format!("compare teacher student pruned int8 --data {file} --no-speed --format json --report r.md"));
    let compared = json(&compared.stdout);
    assert!(compared["variants"][3][figure].as_f64().is_some_and(|x| x >= least), "{compared}");
    place.ok(&format!("compare teacher int8 --data {file} --no-speed"));
    let done = place.ok(&format!("predict --model int8 --input {input} --format jsonl"));
    for format in ["human", "json", "csv"] {
        place.ok(&format!("predict --model int8 --input {input} --format {format}"));
    }
    done.stdout.lines().map(json).collect()
}

#[test]
fn several_labels() {
    let place = Place::new();
    let mut rows = "text,labels\n".to_string();
    for (words, things) in sentences() {
        // An app is no label: some rows have none.
        let labels: Vec<_> = things.into_iter().filter(|t| *t != "app").collect();
        rows += &format!("{},{}\n", words.join(" "), labels.join("|"));
    }
    place.write("d.csv", rows.as_bytes());
    let failed = place.run(&format!("train --model model --train d.csv --task regression --out x {LEARN}"));
    assert!(failed.code != 0 && failed.stderr.contains("is no finite number"), "{}", failed.stderr);
    let separated = "d.csv --label-separator |";
    place.write("texts.txt", b"i lost my card for fee today\nthe app for app today\n");
    let answers = every_stage(&place, separated, "--alpha 0.3", "micro_f1", 0.9, "texts.txt");
    assert_eq!(answers.len(), 2);
    // The labels given are those from one half on, and a thing that is there is found.
    for answer in &answers {
        let sure = |p: &&Value| p["score"].as_f64().is_some_and(|x| x >= 0.5);
        let given = answer["labels"].as_array().map(Vec::len);
        let predictions = answer["predictions"].as_array().expect("a list");
        assert_eq!(given, Some(predictions.iter().filter(sure).count()), "{answer}");
    }
    assert!(answers[0]["labels"].to_string().contains("fee"), "{answers:?}");
    let gate = place.run("eval --model int8 --data d.csv --gate r2>=0.5");
    assert!(gate.code == 2 && gate.stderr.contains("micro_f1"), "{}", gate.stderr);
    place.ok("eval --model int8 --data d.csv --gate micro_f1>=50%");
    let refused =
        place.run(&format!("train --model model --train {separated} --label-smoothing 0.1 --out y {LEARN}"));
    assert!(refused.code == 2 && refused.stderr.contains("label-smoothing"), "{}", refused.stderr);
}

#[test]
fn numbers() {
    let place = Place::new();
    let mut rows = "text,score\n".to_string();
    for (words, things) in sentences() {
        rows += &format!("{},{:.2}\n", words.join(" "), things.iter().map(|t| number(t)).sum::<f32>());
    }
    place.write("d.csv", rows.as_bytes());
    place.write("texts.txt", b"i lost my card for card today\nwhy is the fee for fee today\n");
    let answers = every_stage(&place, "d.csv", "--regression-loss l1", "r2", 0.5, "texts.txt");
    let score = |row: usize| answers[row]["predictions"][0]["score"].as_f64().expect("a number");
    assert!(answers[0]["predictions"][0]["label"] == "score" && score(0) > score(1), "{answers:?}");
    let gate = place.run("eval --model int8 --data d.csv --gate accuracy>=0.5");
    assert!(gate.code == 2 && gate.stderr.contains("regression"), "{}", gate.stderr);
    place.write("bad.csv", b"text,score\na,0.5\nb,much\n");
    let bad = place.run("eval --model int8 --data bad.csv");
    assert!(bad.code != 0 && bad.stderr.contains("line 3") && bad.stderr.contains("`much`"), "{}", bad.stderr);
    let page = place.run("compare teacher int8 --data d.csv --no-speed --report r.html");
    assert!(page.code == 2 && page.stderr.contains(".md"), "{}", page.stderr);
}

#[test]
fn columns_of_numbers_are_those_of_the_model() {
    let place = Place::new();
    place.write(
        "d.csv",
        b"text,valence,arousal\ni lost my card,0.1,0.9\nadd money please,0.8,0.2\nwhy is the fee,0.3,0.6\n",
    );
    place.ok("train --model model --train d.csv --label-col valence,arousal --epochs 1 --out teacher");
    place.ok("eval --model teacher --data d.csv");
    for line in [
        "eval --model teacher --data d.csv --label-col arousal,valence",
        "distill --teacher teacher --train d.csv --label-col arousal,valence --epochs 1 --out o",
    ] {
        let refused = place.run(line);
        assert!(
            refused.code == 1 && refused.stderr.contains("expected those of valence, arousal"),
            "{}",
            refused.stderr
        );
    }
}

/// JSON lines of words and what `label` says of each.
fn words(label: impl Fn(&str) -> Value) -> String {
    let row = |(words, _): (Vec<&str>, _)| {
        let labels: Vec<Value> = words.iter().map(|w| label(w)).collect();
        serde_json::json!({"tokens": words, "labels": labels}).to_string() + "\n"
    };
    sentences().into_iter().map(row).collect()
}

#[test]
fn labels_of_words() {
    let place = Place::new();
    let tag = |w: &str| if THINGS[..3].contains(&w) { w.to_uppercase().into() } else { Value::from("O") };
    place.write("d.jsonl", words(tag).as_bytes());
    let answers = every_stage(&place, "d.jsonl", "--hidden 0.1", "macro_f1", 0.6, "d.jsonl");
    assert_eq!(answers.len(), sentences().len());
    assert_eq!(answers[0]["labels"].as_array().map(Vec::len), Some(sentences()[0].0.len()));
    assert!(answers.iter().any(|a| a["labels"].to_string().contains("CARD")), "{answers:?}");
    let text = place.ok("predict --model int8 --format jsonl thecard").stdout;
    assert_eq!(json(&text)["tokens"][0], "thecard");
    place.write("bad.jsonl", b"{\"tokens\":[\"a\",\"b\"],\"labels\":[\"O\"]}\n");
    let bad = place.run("eval --model int8 --data bad.jsonl");
    assert!(bad.code != 0 && bad.stderr.contains("2 tokens and 1 labels"), "{}", bad.stderr);
    let other = place.run("eval --model int8 --data train.csv");
    assert!(other.code != 0 && other.stderr.contains("tokens"), "{}", other.stderr);
    let served = place.run("serve --model int8 --port 0");
    assert!(served.code != 0 && served.stderr.contains("each word"), "{}", served.stderr);
}

#[test]
fn numbers_of_words_with_first_differences() {
    let place = Place::new();
    place.write("d.jsonl", words(|w| number(w).into()).as_bytes());
    let answers = every_stage(&place, "d.jsonl", "--differences 0.5", "r2", 0.5, "d.jsonl");
    assert!(answers[0]["labels"][0].is_f64(), "{}", answers[0]);
    let metrics = String::from_utf8_lossy(&place.read("student/metrics.jsonl")).into_owned();
    assert!(json(metrics.lines().next().unwrap_or("")).get("differences").is_some(), "{metrics}");
    let failed = place.run(&format!("distill --teacher model --train train.csv --differences 1 --out x {LEARN}"));
    assert!(failed.code != 0 && failed.stderr.contains("first differences"), "{}", failed.stderr);
}
