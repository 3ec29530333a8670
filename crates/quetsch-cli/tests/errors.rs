//! Every wrong input ends with one clear error, its exit code, and no panic.

mod common;

use common::Place;

/// (what, command, exit code, words that the error must have)
type Row<'a> = (&'a str, &'a str, i32, &'a [&'a str]);

fn check(place: &Place, rows: &[Row]) {
    let mut failures = vec![];
    for (what, line, code, words) in rows {
        let done = place.run(line);
        let clear = done.stderr.matches("error: ").count() == 1
            && !done.stderr.contains("panicked")
            && words.iter().all(|w| done.stderr.contains(w));
        if done.code != *code || !clear {
            failures.push(format!("{what}: quetsch {line}\n  exit {}, wanted {code}\n{}", done.code, done.stderr));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn flags() {
    check(
        &Place::new(),
        &[
            ("unknown command", "squeeze", 2, &["squeeze"]),
            ("unknown flag", "predict --model model --topk 3 x", 2, &["--topk"]),
            ("top-k too large", "predict --model model --top-k 6 x", 2, &["--top-k 6", "5 labels"]),
            ("top-k zero", "predict --model model --top-k 0 x", 2, &["--top-k 0"]),
            ("no GPU", "predict --model model --device cuda x", 2, &["CPU only"]),
            ("no GPU 1", "predict --model model --device cuda:1 x", 2, &["CPU only"]),
            ("no thread", "predict --model model --threads 0 x", 2, &["--threads 0"]),
            ("csv elsewhere", "inspect model --format csv", 2, &["predict only"]),
            (
                "alpha above 1",
                "distill --teacher model --train train.csv --out o --alpha 1.5",
                2,
                &["--alpha", "[0, 1]"],
            ),
            ("alpha NaN", "distill --teacher model --train train.csv --out o --alpha NaN", 2, &["--alpha"]),
            (
                "temperature",
                "distill --teacher model --train train.csv --out o --temperature 0",
                2,
                &["--temperature"],
            ),
            (
                "patience without keep",
                "train --model model --train train.csv --out o --patience 1",
                2,
                &["--patience", "keep", "best"],
            ),
            (
                "patience without validation",
                "train --model model --train train.csv --out o --patience 1 --keep best",
                2,
                &["patience", "--validation"],
            ),
            (
                "label smoothing",
                "distill --teacher model --train train.csv --out o --label-smoothing 1",
                2,
                &["--label-smoothing", "[0, 1)"],
            ),
            (
                "class weights",
                "train --model model --train train.csv --out o --class-weights log",
                2,
                &["balanced"],
            ),
            (
                "logits",
                "distill --teacher model --train train.csv --out o --logits=-1",
                2,
                &["--logits", "0 or more"],
            ),
            (
                "hidden map",
                "distill --teacher model --train train.csv --out o --hidden 1 --hidden-map first",
                2,
                &["first", "uniform"],
            ),
            (
                "hidden map without a weight",
                "distill --teacher model --train train.csv --out o --hidden-map last",
                2,
                &["--hidden-map", "`hidden`"],
            ),
            ("no model", "train --train train.csv --out o", 2, &["--model"]),
            ("no data", "train --model model --out o", 2, &["--train"]),
            ("nothing to prune", "prune --model model --out o", 2, &["heads"]),
            ("scheme", "quantize --model model --out o --quant int3", 2, &["int3", "nf4"]),
            ("gate", "compare model --data test.csv --gate accuracy>0.9", 2, &["accuracy>0.9"]),
        ],
    );
}

#[test]
fn recipes() {
    let place = Place::new();
    place.write("key.toml", b"model = \"model\"\n[[stage]]\n[stage.distill]\n  alpa = 0.3\n");
    place.write("alpha.toml", b"model = \"model\"\n[[stage]]\n[stage.distill]\nalpha = 1.5\n");
    place.write("good.toml", b"model = \"model\"\n[[stage]]\n[stage.train]\n");
    check(
        &place,
        &[
            ("no file", "run none.toml", 1, &["none.toml"]),
            ("bad key", "run key.toml", 2, &["key.toml:4:3", "`alpa`"]),
            ("alpha", "run alpha.toml", 2, &["alpha.toml:4:1", "[0, 1]"]),
            ("override", "run good.toml --set train.epochs=none", 2, &["--set train.epochs=none"]),
            ("until", "run good.toml --until end", 2, &["--until end", "train"]),
            ("no data", "run good.toml", 2, &["--train"]),
        ],
    );
}

#[test]
fn files() {
    let place = Place::new();
    let weights = place.read("model/model.safetensors");
    place.copy_model("short");
    place.write("short/model.safetensors", &weights[..weights.len() / 2]);
    place.copy_model("absurd");
    place.write("absurd/model.safetensors", &[&u64::MAX.to_le_bytes()[..], &weights[8..]].concat());
    place.copy_model("mute");
    for name in ["tokenizer.json", "vocab.txt"] {
        std::fs::remove_file(place.path("mute").join(name)).expect("the fixture has it");
    }
    place.copy_model("other");
    let tokenizer = String::from_utf8(place.read("other/tokenizer.json")).expect("UTF-8");
    place.write(
        "other/tokenizer.json",
        tokenizer
            .replace("\"lowercase\":true", "\"lowercase\":false")
            .replace("\"lowercase\": true", "\"lowercase\": false")
            .as_bytes(),
    );
    place.write("empty.csv", b"");
    place.write("header.csv", b"text,label\n");
    place.write("unknown.csv", b"text,label\nhello,lost_dog\n");
    place.write("latin.csv", b"text,label\ncaf\xe9,lost_card\n");
    place.write("columns.csv", b"a,b\nhello,lost_card\n");
    place.write("file", b"in the way");
    place.write("taken/something", b"precious");
    check(
        &place,
        &[
            ("no model", "predict --model none x", 1, &["none"]),
            ("truncated weights", "predict --model short x", 1, &["model.safetensors"]),
            ("absurd header", "predict --model absurd x", 1, &["model.safetensors"]),
            ("no tokenizer", "predict --model mute x", 1, &["tokenizer"]),
            ("no data file", "eval --model model --data none.csv", 1, &["none.csv"]),
            ("empty file", "eval --model model --data empty.csv", 1, &["empty.csv"]),
            ("header only", "eval --model model --data header.csv", 1, &["header.csv"]),
            ("unknown label", "eval --model model --data unknown.csv", 1, &["lost_dog", "2"]),
            ("not UTF-8", "eval --model model --data latin.csv", 1, &["latin.csv", "UTF-8"]),
            ("no column", "eval --model model --data columns.csv", 1, &["columns.csv", "text"]),
            ("output in a file", "train --model model --train train.csv --out file/x", 1, &["file"]),
            ("output taken", "quantize --model model --out taken", 1, &["taken", "--force"]),
            (
                "two tokenizers",
                "distill --teacher model --model other --train train.csv --out o",
                1,
                &["tokenizers", "differ"],
            ),
            ("layer 9", "distill --teacher model --layers 1,9 --train train.csv --out o", 1, &["layer 9"]),
            (
                "hidden map of other layers",
                "distill --teacher model --layers 1 --train train.csv --out o --hidden 1 --hidden-map 1:1",
                1,
                &["1:1", "1 layers"],
            ),
            (
                "relation heads",
                "distill --teacher model --train train.csv --out o --relations 1 --relation-heads 7",
                1,
                &["7 relation heads", "student layer 2"],
            ),
            ("too many heads", "prune --model model --heads 40 --train train.csv --out o", 1, &["40"]),
            ("quantised twice", "export --model none --to hf --out o", 1, &["none"]),
        ],
    );
    assert!(!place.path("o").exists(), "a failed stage leaves no folder");
    assert_eq!(place.read("taken/something"), b"precious");
    let left: Vec<_> = std::fs::read_dir(place.path("."))
        .expect("the folder")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.contains("tmp"))
        .collect();
    assert_eq!(left, Vec::<String>::new(), "no temporary folder is left");
}

#[test]
fn a_loss_that_is_not_a_number_stops_training() {
    let place = Place::new();
    let mut weights = place.read("model/model.safetensors");
    let n = weights.len();
    weights[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    place.write("model/model.safetensors", &weights);
    let done = place.run("train --model model --train train.csv --out o --epochs 1");
    assert_eq!(done.code, 1, "{}", done.stderr);
    assert!(!place.path("o").exists() && !done.stderr.contains("panicked"), "{}", done.stderr);
}

#[test]
fn an_instruction_set_that_is_none() {
    let place = Place::new();
    let out = place.command().env("QUETSCH_ISA", "mmx").args(["inspect", "model"]).output().expect("it runs");
    let words = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2));
    assert!(words.contains("QUETSCH_ISA=mmx") && words.contains("avx512vnni"), "{words}");
}
