//! The model card, README.md, of what the program writes.
#![allow(missing_docs)]

mod common;

use common::Place;

fn card(place: &Place, dir: &str) -> String {
    String::from_utf8(place.read(&format!("{dir}/README.md"))).expect("UTF-8")
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn a_stage_says_what_it_made_of_what() {
    let place = Place::new();
    let train = "train --model model --train train.csv --test test.csv --epochs 1 --seed 7";
    place.ok(&format!(
        "{train} --out teacher --license mit --base-model org/base --languages en,de --datasets org/cards"
    ));
    let teacher = card(&place, "teacher");
    has(
        &teacher,
        &[
            "license: \"mit\"\nbase_model: \"org/base\"\nbase_model_relation: \"finetune\"\ndatasets: [\"org/cards\"]\nlanguage: [\"en\",\"de\"]\n",
            "tags: [\"quetsch\",\"train\"]\nlibrary_name: \"quetsch\"\npipeline_tag: \"text-classification\"\n",
            "metrics: [\"accuracy\",\"f1\"]\nmodel-index: [{",
            concat!("model -> this model (train), by quetsch ", env!("CARGO_PKG_VERSION"), ".\n"),
            "[stage.train]\n",
            "epochs = 1\n",
            "Trained on 20 texts: all training data.",
            "| model | parameters | weights MB | accuracy | macro-F1 |",
            "Measured on 5 test examples",
            "The label with the lowest F1 is ",
            "--layout remote-code",
        ],
    );
    // No time: once more, the same bytes.
    place.ok(&format!(
        "{train} --out again/teacher --license mit --base-model org/base --languages en,de --datasets org/cards"
    ));
    assert_eq!(card(&place, "again/teacher"), teacher);

    // What was said about the teacher holds for what is made from it, and its figures stand in the table.
    place.ok("quantize --model teacher --test test.csv --out int8 --credits Somebody");
    let int8 = card(&place, "int8");
    has(
        &int8,
        &[
            "license: \"mit\"",
            "base_model_relation: \"quantized\"\n",
            "tags: [\"quetsch\",\"train\",\"quantize\",\"int8\",\"quantized\"]\n",
            "model -> teacher (train) -> this model (quantize)",
            "- Somebody\n",
        ],
    );
    let rows: Vec<&str> = int8.lines().filter(|l| l.starts_with("| ")).collect();
    assert_eq!(rows.len(), 5, "{rows:#?}"); // header, rule, model, teacher, int8
    assert!(rows[2].starts_with("| model | - |") && rows[2].ends_with("| - | - |"), "{rows:#?}");
    assert!(rows[3].starts_with("| teacher |") && !rows[3].contains("| - "), "{rows:#?}");
    assert!(rows[4].starts_with("| **int8** |"), "{rows:#?}");
}

/// The settings in a card are a section of a recipe, rules by site included.
#[test]
fn the_recipe_of_a_card_is_one() {
    let place = Place::new();
    let calibrated = "--train train.csv --calibration 10 --observer mse";
    place.ok(&format!(
        "quantize --model model --quant int8-static --site layer.1.*=nf4,head.4=bf16 {calibrated} --out q"
    ));
    let text = card(&place, "q");
    has(&text, &["Ranges of inputs from 10 training texts, observer mse", "[[stage.quantize.site]]"]);
    let toml = text.split("```toml\n").nth(1).and_then(|t| t.split("```").next()).expect("a recipe");
    place.write(
        "r.toml",
        format!("model = \"model\"\nout = \"out\"\n[data]\ntrain = \"train.csv\"\n{toml}").as_bytes(),
    );
    place.ok("run r.toml");
    assert_eq!(place.read("out/quantize/model.safetensors"), place.read("q/model.safetensors"));
    assert!(!text.contains("\"bitsandbytes\""), "{text}");
    place.ok("quantize --model model --quant nf4 --out four");
    has(&card(&place, "four"), &["\"nf4\",\"quantized\",\"bitsandbytes\"]"]);
}

#[test]
fn nothing_is_invented() {
    let place = Place::new();
    place.ok("quantize --model model --out int8");
    let text = card(&place, "int8");
    let head = text.split("---\n").nth(1).expect("metadata");
    for key in ["license", "base_model", "datasets", "language:", "metrics", "model-index"] {
        assert!(!head.contains(key), "{key}: {head}");
    }
    has(
        &text,
        &["licence of this model: not stated", "base model: not stated", "data: not stated", "was not measured"],
    );
    let bad = place.run("quantize --model model --out x --license Apache!");
    assert_eq!(bad.code, 2);
    has(&bad.stderr, &["--license", "apache-2.0"]);
}

#[test]
fn a_card_follows_the_recipe_and_leaves_others_alone() {
    let place = Place::new();
    let recipe = |card: &str| {
        format!(
            "model = \"model\"\nout = \"out\"\n[data]\ntest = \"test.csv\"\n[card]\n{card}\n[[stage]]\n[stage.quantize]\nid = \"int8\"\n"
        )
    };
    place.write("r.toml", recipe("license = \"mit\"").as_bytes());
    place.ok("run r.toml");
    has(&card(&place, "out/int8"), &["license: \"mit\""]);
    has(&String::from_utf8_lossy(&place.read("out/recipe.resolved.toml")), &["[card]\nlicense = \"mit\""]);
    let provenance = place.read("out/int8/provenance.json");
    // Another licence makes another card of the same model.
    let done = place.ok("run r.toml --set card.license=apache-2.0");
    has(&done.stdout, &["nothing to do"]);
    has(&card(&place, "out/int8"), &["license: \"apache-2.0\""]);
    assert_eq!(place.read("out/int8/provenance.json"), provenance);

    // A card of one's own stays, whatever happens to the model.
    place.write("out/int8/README.md", b"# Mine\n");
    place.ok("run r.toml");
    assert_eq!(card(&place, "out/int8"), "# Mine\n");
    let done = place.ok("run r.toml --set int8.quant=nf4 --force");
    has(&done.stderr, &["README.md: not written by quetsch, left as it is"]);
    assert_eq!(card(&place, "out/int8"), "# Mine\n");

    let typo = place.run("run r.toml --set card.licence=mit");
    assert_eq!(typo.code, 2);
    has(&typo.stderr, &["unknown key `licence`", "license"]);
}

#[test]
fn an_export_has_its_own_card() {
    let place = Place::new();
    place.ok("train --model model --train train.csv --test test.csv --epochs 1 --out teacher --license mit");
    place.write("teacher/README.md", b"# Mine\n");
    place.ok("export --model teacher --to hf --layout remote-code --out hf --credits Somebody");
    assert_eq!(card(&place, "teacher"), "# Mine\n");
    let text = card(&place, "hf");
    has(
        &text,
        &[
            "license: \"mit\"",
            "library_name: \"transformers\"",
            "trust_remote_code=True",
            "- Somebody",
            "teacher (train) -> this model (export)",
            "| accuracy |",
            "was not measured",
        ],
    );
    place.write("hf/README.md", b"# Mine, too\n");
    place.ok("export --model teacher --to hf --out hf --force");
    assert_eq!(card(&place, "hf"), "# Mine, too\n");
}
