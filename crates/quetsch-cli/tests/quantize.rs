//! `quetsch quantize` as a user runs it: calibration, what to keep, training with quantised weights.
#![allow(missing_docs)]

mod common;

use common::Place;
use serde_json::Value;

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).expect("JSON")
}

fn logits(place: &Place, model: &str) -> Vec<f64> {
    let lines = place.ok(&format!("predict --model {model} --input texts.txt --format jsonl --logits --top-k 1"));
    let row = |line: &str| -> Vec<f64> {
        let answer = json(line.as_bytes());
        answer["logits"].as_array().expect("logits").iter().filter_map(Value::as_f64).collect()
    };
    lines.stdout.lines().flat_map(row).collect()
}

#[test]
fn training_with_quantised_weights_comes_nearer_to_the_float_model() {
    let place = Place::new();
    let rows = String::from_utf8(place.read("train.csv")).expect("UTF-8");
    let texts: Vec<&str> = rows.lines().skip(1).filter_map(|row| Some(row.rsplit_once(',')?.0)).collect();
    place.write("texts.txt", texts.join("\n").as_bytes());
    place.ok("train --model model --train train.csv --epochs 30 --learning-rate 1e-3 --out float");
    let float = logits(&place, "float");
    let distance =
        |model: &str| -> f64 { logits(&place, model).iter().zip(&float).map(|(a, b)| (a - b).powi(2)).sum() };
    for (scheme, observer) in [("nf4", ""), ("int8-static", "--observer mse ")] {
        let line = format!(
            "quantize --model float --quant {scheme} --site embeddings.*=int8 --train train.csv --validation 0.2 {observer}--out {scheme}"
        );
        let qat = "--epochs 30 --learning-rate 5e-4 --alpha 0 --logits 1";
        place.ok(&line);
        place.ok(&format!("{line}-qat {qat}"));
        let (before, after) = (distance(scheme), distance(&format!("{scheme}-qat")));
        println!("{scheme}: {before} -> {after}");
        assert!(after < before, "{scheme}: {before} -> {after}");
        let report = json(&place.read(&format!("{scheme}-qat/report.json")));
        assert_eq!(report["sites"]["layer.0.query"], scheme);
        assert_eq!(report["embeddings"], "int8-weight");
        assert!(report["validation_score"]["trained"].is_f64() && report["steps"].is_u64(), "{report}");
        assert!(place.path(&format!("{scheme}-qat/metrics.jsonl")).exists());
    }
    let refused = place.run("quantize --model float --quant nf4 --teacher float --out x");
    assert_eq!(refused.code, 2);
    assert!(refused.stderr.contains("epochs"), "{}", refused.stderr);
    let four_bits =
        "quantize --model float --quant nf4 --site embeddings.*=nf4 --epochs 1 --train train.csv --out y";
    assert!(place.run(four_bits).stderr.contains("freeze it"));
    place.ok(&format!("{four_bits} --freeze embeddings."));
}

#[test]
fn keep_auto_takes_the_first_sites_that_meet_the_budget() {
    let place = Place::new();
    place.ok("train --model model --train train.csv --epochs 30 --learning-rate 1e-3 --out float");
    let line = "quantize --model float --quant fp4 --keep auto --train train.csv --validation 0.5 --budget";
    for (budget, out) in [("0pt", "strict"), ("100", "loose")] {
        place.ok(&format!("{line} {budget} --out {out}"));
        let report = json(&place.read(&format!("{out}/report.json")));
        let found = &report["sensitivity"];
        let number = |v: &Value| v.as_f64().expect("a number");
        let (float, result) = (number(&found["float"]["accuracy"]), number(&found["result"]["accuracy"]));
        assert!(float - result <= number(&found["budget"]) / 100.0 + 1e-5, "{found}");
        let sites = found["sites"].as_array().expect("sites");
        assert!(sites.windows(2).all(|w| number(&w[0]["alone"]["kl"]) >= number(&w[1]["alone"]["kl"])));
        let kept = found["kept"].as_array().expect("kept");
        assert!(kept.iter().zip(sites).all(|(k, s)| *k == s["site"]), "the first ones of the order: {found}");
        // One fewer would not do.
        let all = number(&found["all"]["accuracy"]);
        assert_eq!(kept.is_empty(), float - all <= number(&found["budget"]) / 100.0 + 1e-5, "{found}");
        for site in kept {
            assert_eq!(report["sites"][site.as_str().expect("a name")], "f32");
        }
    }
}

/// A model that is right about every text because the labels are its own answers, quantised so coarsely that some change:
/// sites have to stay in float, and one fewer of them is not enough.
#[test]
fn keep_auto_keeps_what_it_must_and_no_more() {
    let place = Place::new();
    let words =
        ["i", "lost", "my", "card", "charged", "two", "times", "set", "a", "new", "pin", "add", "money", "fees"];
    let texts: String = (0..words.len().pow(2))
        .map(|i| format!("{} {} {}\n", words[i % words.len()], words[i / words.len()], words[i * 5 % words.len()]))
        .collect();
    place.write("texts.txt", texts.as_bytes());
    let said = place.ok("predict --model model --input texts.txt --format jsonl --top-k 1").stdout;
    let mut rows = String::from("text,label\n");
    for line in said.lines() {
        let answer = json(line.as_bytes());
        let text = |v: &Value| v.as_str().unwrap_or_else(|| panic!("{answer}")).to_owned();
        rows += &format!("{},{}\n", text(&answer["text"]), text(&answer["predictions"][0]["label"]));
    }
    place.write("train.csv", rows.as_bytes());
    let found = |keep: &[String], out: &str| {
        let keep: String = keep.iter().map(|k| format!("--keep {k} ")).collect();
        place.ok(&format!(
            "quantize --model model --quant fp4 --keep auto {keep}--budget 15 --train train.csv --validation 0.5 --out {out}"
        ));
        json(&place.read(&format!("{out}/report.json")))["sensitivity"].clone()
    };
    let accuracy = |v: &Value| v["accuracy"].as_f64().expect("a number");
    let first = found(&[], "first");
    assert_eq!(accuracy(&first["float"]), 1.0);
    assert!(accuracy(&first["all"]) < 0.85, "the case is too easy: {first}");
    assert!(accuracy(&first["result"]) >= 0.85, "{first}");
    let kept: Vec<String> =
        first["kept"].as_array().expect("kept").iter().map(|k| k.as_str().expect("a name").to_owned()).collect();
    let sites = first["sites"].as_array().expect("sites").len();
    assert!(!kept.is_empty() && kept.len() < sites, "{kept:?} of {sites}");
    let fewer = found(&kept[..kept.len() - 1], "fewer");
    assert!(accuracy(&fewer["all"]) < 0.85, "{fewer}");
    let same = found(&kept, "same");
    assert_eq!((accuracy(&same["all"]), &same["kept"]), (accuracy(&first["result"]), &Value::Array(vec![])));
}

#[test]
fn a_calibrated_model_runs_and_says_on_what_it_was_calibrated() {
    let place = Place::new();
    place.write("texts.txt", b"i lost my card now\n");
    place.ok("quantize --model model --quant int8-static --train train.csv --calibration 12 --out static");
    let report = json(&place.read("static/report.json"));
    let calibration = &report["calibration"];
    assert_eq!(
        (calibration["observer"].as_str(), calibration["sentences"].as_u64()),
        (Some("percentile"), Some(12))
    );
    assert_eq!(calibration["rows"].as_array().map(Vec::len), Some(12));
    assert!(calibration["inputs"]["layer.0.query"]["absmax"].as_f64().is_some_and(|a| a > 0.0));
    let (float, quantised) = (logits(&place, "model"), logits(&place, "static"));
    assert_ne!(float, quantised);
    // Logits span 4; twelve short sentences calibrate badly, but nothing is far off.
    assert!(float.iter().zip(&quantised).all(|(a, b)| (a - b).abs() < 0.2), "{float:?} {quantised:?}");
    let inspected = json(place.ok("inspect static --format json").stdout.as_bytes());
    assert_eq!(inspected["sites"]["layer.0.query"], "int8-static");
    assert!(inspected.get("distortion").is_none(), "only when asked for");
    let recorded = json(place.ok("inspect static --verbose --format json").stdout.as_bytes());
    let measured = json(place.ok("inspect static --against model --format json").stdout.as_bytes());
    assert_eq!(recorded["distortion"], measured["distortion"]);
    let one = &measured["distortion"]["backbone.encoder.layer.0.output.dense.weight"];
    assert!(one["sqnr_db"].as_f64().is_some_and(|db| (35.0..60.0).contains(&db)), "int8 has about 40 dB: {one}");
    assert!(one["max_abs"].as_f64() > one["mean_abs"].as_f64(), "{one}");
    assert!(place.ok("inspect static --verbose").stdout.contains("SQNR dB"));
    let without = place.run("quantize --model model --quant int8-static --out other");
    assert!(without.code != 0 && without.stderr.contains("--train"), "{}", without.stderr);
}

/// The threshold stands in the file; how many columns reach it is counted where there are training data, and shown.
#[test]
fn outlier_columns_are_counted_and_their_threshold_is_a_setting() {
    let place = Place::new();
    let config = |dir: &str| json(&place.read(&format!("{dir}/config.json")))["quantization_config"].clone();
    let line = "quantize --model model --quant bnb-int8 --train train.csv";
    place.ok(&format!("{line} --outlier-threshold 1.5 --out low"));
    place.ok(&format!("{line} --out usual"));
    place.ok(&format!("{line} --outlier-threshold 0 --out off"));
    place.ok("quantize --model model --quant bnb-int8 --out blind");
    let outliers = |dir: &str| -> Vec<u64> {
        let shown = json(place.ok(&format!("inspect {dir} --verbose --format json")).stdout.as_bytes());
        let inputs = shown["inputs"].as_object().cloned().unwrap_or_default();
        inputs.values().filter_map(|i| i["outlier_columns"].as_u64()).collect()
    };
    assert!(outliers("low").iter().any(|n| *n > 0), "{:?}", outliers("low"));
    assert!(outliers("usual").iter().sum::<u64>() < outliers("low").iter().sum());
    assert!(outliers("off").iter().all(|n| *n == 0) && !outliers("off").is_empty());
    assert!(outliers("blind").is_empty(), "no data, nothing seen");
    for (dir, threshold) in [("low", 1.5), ("usual", 6.0), ("off", 0.0), ("blind", 6.0)] {
        assert_eq!(config(dir)["llm_int8_threshold"], threshold, "{dir}");
    }
    assert!(place.ok("inspect low --verbose").stdout.contains("outlier columns"));
    for (line, named) in [
        ("quantize --model model --quant nf4 --outlier-threshold 5 --out x", "bnb-int8"),
        ("quantize --model model --quant bnb-int8 --outlier-threshold=-1 --out x", "outlier-threshold"),
        ("quantize --model model --quant int8 --source-dtype f16 --out x", "nf4"),
    ] {
        let refused = place.run(line);
        assert!(refused.code == 2 && refused.stderr.contains(named), "{line}: {}", refused.stderr);
    }
    std::fs::remove_file(place.path("blind/report.json")).expect("a report");
    let hint = place.ok("inspect blind --verbose").stderr;
    assert!(hint.contains("--against"), "{hint}");
}

#[test]
fn types_of_4_bit_weights_are_settings() {
    let place = Place::new();
    place.ok("quantize --model model --quant nf4 --compute f16 --source-dtype bf16 --out made");
    place.ok("quantize --model model --quant nf4 --compute-dtype float16 --source-dtype bfloat16 --out known");
    assert_eq!(place.read("known/config.json"), place.read("made/config.json"), "as bitsandbytes has it");
    place.ok("quantize --model model --quant bf16 --out bf16");
    place.ok("quantize --model bf16 --quant nf4 --out stepwise");
    let config = json(&place.read("made/config.json"));
    assert_eq!(config["quantization_config"]["bnb_4bit_compute_dtype"], "float16");
    assert_eq!(config["dtype"], "float32", "what is not quantised keeps its type");
    let values = |dir: &str| {
        let shown = place.ok(&format!("inspect {dir} --against model --format json"));
        json(shown.stdout.as_bytes())["distortion"]["backbone.encoder.layer.0.output.dense.weight"].clone()
    };
    assert!(values("made").is_object());
    assert_eq!(values("made"), values("stepwise"));
    assert!(String::from_utf8_lossy(&place.read("made/model.safetensors")).contains("\"dtype\": \"bfloat16\""));
}

/// The temperature goes into the last linear: all logits are divided by it, and no text of the calibration data has a
/// lower loss at another one.
#[test]
fn an_export_holds_its_temperature() {
    let place = Place::new();
    place.write("texts.txt", b"i lost my card now\n");
    // The model is right about all texts but one in four.
    let said = place.ok("predict --model model --input train.csv --format jsonl --top-k 1").stdout;
    let mut rows = String::from("text,label\n");
    for (i, line) in said.lines().enumerate() {
        let answer = json(line.as_bytes());
        let label = answer["predictions"][0]["label"].as_str().unwrap_or_else(|| panic!("{answer}"));
        let label = if i % 4 > 0 {
            label
        } else if label == "abroad" {
            "top_up"
        } else {
            "abroad"
        };
        rows += &format!("{},{label}\n", answer["text"].as_str().expect("the text"));
    }
    place.write("train.csv", rows.as_bytes());
    let done = place.ok("export --model model --to hf --calibration train.csv --out scaled --format json");
    let facts = json(done.stdout.as_bytes());
    let found = &facts["calibration"];
    let temperature = found["temperature"].as_f64().expect("a number");
    assert!((temperature - 1.0).abs() > 0.05, "a temperature that would not be seen: {temperature}");
    for (scaled, plain) in logits(&place, "scaled").iter().zip(logits(&place, "model")) {
        assert!((scaled * temperature - plain).abs() < 1e-5, "{scaled} {plain}");
    }
    let loss = |dir: &str| {
        let done = place.ok(&format!("eval --model {dir} --data train.csv --format json"));
        json(done.stdout.as_bytes())["loss"].as_f64().expect("a loss")
    };
    let (before, after) = (loss("model"), loss("scaled"));
    assert!((before - found["loss"][0].as_f64().expect("before")).abs() < 1e-6);
    assert!((after - found["loss"][1].as_f64().expect("after")).abs() < 1e-5 && after < before, "{before} {after}");
    let again = json(
        place
            .ok("export --model scaled --to hf --calibration train.csv --out twice --format json")
            .stdout
            .as_bytes(),
    );
    let again = again["calibration"]["temperature"].as_f64().expect("a number");
    assert!((again - 1.0).abs() < 2e-3, "{again}");
    place.ok("quantize --model model --quant int8 --keep none --out whole");
    let refused = place.run("export --model whole --to bnb-int8 --calibration train.csv --out no");
    assert!(refused.code == 1 && refused.stderr.contains("last linear"), "{}", refused.stderr);
}

/// What a quantised model keeps in float stays in float, whatever is made of it, and codes that need not change do not.
#[test]
fn an_export_keeps_what_its_model_keeps() {
    let place = Place::new();
    let site = "backbone.encoder.layer.1.output.dense"; // layer.1.ffn_down
    place.ok("quantize --model model --quant nf4 --keep layer.1.ffn_down --compute f32 --out four");
    place.ok("quantize --model model --quant int8 --keep layer.1.ffn_down --out eight");
    for (from, to, layout, rounded_twice) in [
        ("four", "bnb-nf4", "compact", false),
        ("four", "bnb-nf4", "dense", true),
        ("four", "bnb-int8", "dense", true),
        ("eight", "bnb-int8", "compact", false),
        ("eight", "bnb-int8", "dense", false),
        ("eight", "bnb-nf4", "compact", true),
    ] {
        let row = format!("{from} --to {to} --layout {layout}");
        let done = place.ok(&format!("export --model {row} --out {from}-{to}-{layout}"));
        assert_eq!(done.stderr.contains("once more, as"), rounded_twice, "{row}: {}", done.stderr);
        let config = json(&place.read(&format!("{from}-{to}-{layout}/config.json")));
        let sites = config["quetsch"]["sites"].as_object().expect("sites");
        assert!(!sites.contains_key(site) && sites.len() > 10, "{row}: {sites:?}");
        let quantization = &config["quantization_config"];
        let skipped = quantization["llm_int8_skip_modules"].as_array().expect("a list");
        assert!(skipped.contains(&site.into()) && skipped.contains(&"head.4".into()), "{row}: {skipped:?}");
        if to == "bnb-nf4" {
            let compute = if from == "four" { "float32" } else { "bfloat16" };
            assert_eq!(quantization["bnb_4bit_compute_dtype"], compute, "{row}");
        }
    }
    let weights = |dir: &str| place.read(&format!("{dir}/model.safetensors"));
    assert_eq!(weights("four-bnb-nf4-compact"), weights("four"));
    assert_eq!(weights("eight-bnb-int8-compact"), weights("eight"));
}

/// Dense and back: the heads are gone again, and the weights are the same bytes.
#[test]
fn a_dense_export_is_made_compact_again() {
    let place = Place::new();
    place.ok("export --model model --to hf --out compact");
    place.ok("export --model model --to hf --layout dense --out dense");
    let done = place.ok("export --model dense --to hf --layout compact --out again");
    // The student's layers keep 2, 4 and 3 of 4 heads, and their feed-forward networks are of one width.
    assert!(done.stderr.contains("taken out: 3 heads and 0 channels"), "{}", done.stderr);
    assert_eq!(place.read("again/model.safetensors"), place.read("compact/model.safetensors"));
    assert_eq!(json(&place.read("again/config.json")), json(&place.read("compact/config.json")));
    place.ok("quantize --model model --quant bnb-int8 --out eight");
    place.ok("export --model eight --to bnb-int8 --layout dense --out eight-dense");
    place.ok("export --model eight-dense --to bnb-int8 --layout compact --out eight-again");
    assert_eq!(place.read("eight-again/model.safetensors"), place.read("eight/model.safetensors"));
}

#[test]
fn a_remote_code_export_names_its_code_and_reads_back() {
    let place = Place::new();
    place.write("texts.txt", b"i lost my card now\n");
    let done = place.ok("export --model model --to hf --layout remote-code --out remote");
    assert!(done.stderr.contains("trust_remote_code"), "{}", done.stderr);
    let config = json(&place.read("remote/config.json"));
    let class = config["architectures"][0].as_str().expect("a class");
    assert_eq!(config["auto_map"]["AutoModelForSequenceClassification"], format!("modeling_quetsch.{class}"));
    let code = String::from_utf8(place.read("remote/modeling_quetsch.py")).expect("text");
    assert!(code.contains(&format!("class {class}(")), "{class}");
    assert!(config.get("student_pruned_heads").is_none(), "transformers 4 would prune once more");
    assert_eq!(logits(&place, "remote"), logits(&place, "model"));
}

/// Every scheme is counted, what no other program reads is warned of, and settings that nothing reads are errors.
#[test]
fn what_was_done_is_said() {
    let place = Place::new();
    let mixed =
        place.ok("quantize --model model --quant int8-static --site layer.0.*=nf4 --train train.csv --out mixed");
    for says in [
        "linears 1 in f32 (head.4), 14 in int8-static, 6 in nf4; word embeddings in f32",
        "int8 and 4-bit linears in one file",
        "calibrated on all 20 training sentences, `calibration` asks for 512",
    ] {
        assert!(mixed.stderr.contains(says), "{says:?} is not in {}", mixed.stderr);
    }
    let plain = place.ok("quantize --model model --quant nf4 --out four");
    assert!(!plain.stderr.contains("one file") && !plain.stderr.contains("calibrated"), "{}", plain.stderr);
    let idle = place.run("quantize --model model --quant int8 --observer mse --out x");
    assert_eq!(idle.code, 2, "{}", idle.stderr);
    assert!(idle.stderr.contains("--observer") && idle.stderr.contains("int8-static"), "{}", idle.stderr);
}

/// Scales that are finite and far too large: no answer is better than one that is no number.
#[test]
fn answers_that_are_no_numbers_are_errors() {
    let place = Place::new();
    place.ok("quantize --model model --quant nf4 --no-double-quant --out huge");
    let mut file = place.read("huge/model.safetensors");
    let length = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header = json(&file[8..8 + length]);
    let place_of = &header["backbone.encoder.layer.1.intermediate.dense.weight.absmax"]["data_offsets"];
    let at = |i: usize| 8 + length + place_of[i].as_u64().expect("an offset") as usize;
    for scale in file[at(0)..at(1)].chunks_exact_mut(4) {
        scale.copy_from_slice(&3e38f32.to_le_bytes());
    }
    place.write("huge/model.safetensors", &file);
    place.write("texts.txt", b"i lost my card\n");
    for line in [
        "predict --model huge hello",
        "predict --model huge --input texts.txt",
        "eval --model huge --data test.csv",
        "compare model huge --data test.csv --no-speed",
    ] {
        let done = place.run(line);
        assert_eq!(done.code, 1, "{line}: {}", done.stdout);
        let named = done.stderr.contains("huge: the answer to text 1 is ") && done.stderr.contains("finite");
        assert!(named, "{line}: {}", done.stderr);
    }
}
