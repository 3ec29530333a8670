//! The small files that a stage reads back. The first byte of an input is the reader; several files are parted by lines
//! of `%%`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch::batch::Encoding;
use quetsch::checkpoint::Checkpoint;
use quetsch::dir::{self, ModelDir};
use quetsch::prune::{self, Amount, Budget, Cut, Keep, LatencyTable, Magnitude, Plan, Scores};
use quetsch::tokenizer::{Tokenizer, TokenizerFiles};
use quetsch::vocab;
use quetsch_cli::{card, folds};
use quetsch_fuzz::{BETWEEN, parts};
use quetsch_train::{
    Dropout, Event, FitSettings, Hard, Loss, Objective, Precision, Schedule, Sparsity, State, Stop, TrainSet, fit,
};
use serde_json::Value;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::LazyLock;

const READERS: [fn(&[u8]) -> Option<()>; 6] = [latency, plans, state, model_card, out_of_fold, vocabulary];

static PARENT: LazyLock<Checkpoint> = LazyLock::new(|| quetsch_fuzz::models().remove(0));
static SCORES: LazyLock<Scores> = LazyLock::new(|| prune::magnitude(&PARENT, Magnitude::L2));

/// A folder with the name of one in the hub's cache: what is made from there says so.
static PLACE: LazyLock<PathBuf> = LazyLock::new(|| {
    let place = quetsch_fuzz::folder().join(format!("models--org--name/snapshots/{}", "a".repeat(40)));
    fs::create_dir_all(&place).expect("a folder in memory");
    place
});

fuzz_target!(
    init: {
        quetsch_fuzz::allow_panics_of("/tokenizers-");
        quetsch_fuzz::seeds(seeds);
    },
    |data: &[u8]| {
        let [reader, content @ ..] = data else { return };
        READERS[*reader as usize % READERS.len()](content);
    }
);

/// A table of times: what is found with it is within the time.
fn latency(json: &[u8]) -> Option<()> {
    let table: LatencyTable = serde_json::from_slice(json).ok()?;
    let _ = table.to_string();
    for share in [0.9, 0.5, 0.3] {
        let keep = Keep { share, max_heads_per_layer: 1.0, align: 2 };
        let budget = prune::search_latency(&PARENT.spec, &SCORES, &table, &keep).ok()?;
        let plan = prune::plan(&PARENT.spec, &SCORES, &budget).expect("a budget of this model");
        let child = plan.child(&PARENT.spec).expect("a plan of this model");
        let (most, found) = (share * table.of(&PARENT.spec), table.of(&child));
        assert!(found <= most * 1.001 || !most.is_finite(), "{found} us, at most {most}");
    }
    Some(())
}

/// A plan and one for what it leaves: together they do what one after the other does.
fn plans(data: &[u8]) -> Option<()> {
    let [first, next] = parts(data)[..] else { return None };
    let read = |json| serde_json::from_slice::<Plan>(json).ok();
    let (first, next) = (read(first)?, read(next)?);
    let both = first.then(&PARENT.spec, &next).ok()?;
    let at_once = prune::apply(&PARENT, &both).expect("it was checked");
    let apart =
        prune::apply(&prune::apply(&PARENT, &first).expect("it was checked"), &next).expect("it was checked");
    assert_eq!(at_once.spec, apart.spec);
    Some(())
}

/// The state of a run that was killed: the run goes on to its end, or it says why not.
fn state(bytes: &[u8]) -> Option<()> {
    let place = quetsch_fuzz::folder().join("state");
    fs::create_dir_all(&place).expect("a folder in memory");
    fs::write(place.join("state.safetensors"), bytes).expect("a file in memory");
    train(&State { dir: &place, every_steps: 0, resume: true, key: "k".into() }, usize::MAX)
}

/// Four steps, or so many.
fn train(state: &State, stop_at: usize) -> Option<()> {
    let encodings: Vec<Encoding> =
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 0]].map(|ids| Encoding { ids: ids.into(), types: vec![] }).into();
    let labels = vec![0, 1, 2, 0];
    let objective =
        Objective::CrossEntropy(Hard { loss: Loss::CrossEntropy, label_smoothing: 0.1, class_weights: &[] });
    let settings = FitSettings {
        epochs: 2,
        batch_size: 2,
        accumulate: 1,
        learning_rate: 1e-3,
        head_learning_rate: 1e-3,
        weight_decay: 0.01,
        warmup: 0.1,
        schedule: Schedule::Linear,
        clip: 1.0,
        dropout: Dropout { hidden: 0.1, attention: 0.1, head: 0.1 },
        freeze: vec![],
        seed: 7,
        threads: 1,
        precision: Precision::F32,
        recompute: false,
        sparsity: Sparsity::Free,
        quant: None,
    };
    let mut on = |event: Event| match event {
        Event::Step(p) if p.step == stop_at => ControlFlow::Break(Stop::Interrupted),
        _ => ControlFlow::Continue(()),
    };
    fit(&PARENT, &TrainSet::sentences(&encodings, &labels), &objective, &settings, Some(state), &mut on)
        .ok()
        .map(drop)
}

/// README.md, report.json and config.json of a model that another one is made from. A card is written again as it is.
fn model_card(data: &[u8]) -> Option<()> {
    let [readme, report, config] = parts(data)[..] else { return None };
    for (name, bytes) in [("README.md", readme), ("report.json", report), ("config.json", config)] {
        fs::write(PLACE.join(name), bytes).expect("a file in memory");
    }
    card::origin(&Default::default(), Some(&PLACE), Some(&PLACE), Some(&PLACE));
    card::refresh(&PLACE).expect("a folder in memory");
    let once = fs::read(PLACE.join("README.md")).expect("it was written");
    card::refresh(&PLACE).expect("a folder in memory");
    assert_eq!(fs::read(PLACE.join("README.md")).ok(), Some(once));
    Some(())
}

/// A teacher's logits and what they belong to.
fn out_of_fold(data: &[u8]) -> Option<()> {
    let [facts, logits] = parts(data)[..] else { return None };
    for (name, bytes) in [(folds::FACTS, facts), (folds::LOGITS, logits)] {
        fs::write(PLACE.join(name), bytes).expect("a file in memory");
    }
    let found = folds::read(&PLACE, "hash", 2, 1).ok()?;
    assert_eq!(found.len(), 2);
    Some(())
}

/// A WordPiece tokenizer that is cut down: texts of known words have the pieces that they had.
fn vocabulary(json: &[u8]) -> Option<()> {
    static MODEL: LazyLock<ModelDir> =
        LazyLock::new(|| dir::read(quetsch_fuzz::root().join("fixtures/tiny_student")).expect("the fixture"));
    const TEXTS: [&str; 3] = ["i lost my card", "Why was I charged TWICE?", "[MASK] 12 \u{e9}"];
    let files = |json: &[u8]| TokenizerFiles {
        files: [("tokenizer.json".to_owned(), json.to_owned())].into_iter().collect(),
    };
    let model = ModelDir { checkpoint: MODEL.checkpoint.clone(), tokenizer: files(json) };
    let pruned = vocab::prune(&model, &TEXTS, 0, 1).ok()?;
    assert_eq!(pruned.model.checkpoint.spec.vocab, pruned.kept.len());
    let read = |files| Tokenizer::new(files).expect("it was read");
    let (old, new) = (read(&model.tokenizer), read(&pruned.model.tokenizer));
    let json: Value = serde_json::from_slice(json).expect("it was read");
    let unknown = json["model"]["unk_token"].as_str();
    for text in TEXTS {
        let ids = |t: &Tokenizer| t.encode(text, usize::MAX).expect("it was encoded").ids;
        let before = ids(&old);
        let after: Vec<u32> = ids(&new).into_iter().map(|id| pruned.kept[id as usize]).collect();
        let all_known = before.iter().all(|id| old.token(*id).as_deref() != unknown);
        assert!(before == after || !all_known, "{text}: {before:?}, now {after:?}");
    }
    Some(())
}

/// One or more of what each reader reads.
fn seeds() -> Vec<Vec<u8>> {
    let table = LatencyTable {
        version: prune::TABLE_VERSION,
        machine: "a machine".into(),
        isa: "scalar".into(),
        tokens: 3,
        scheme: "f32".into(),
        hidden: PARENT.spec.hidden,
        head_dim: PARENT.spec.head_dim,
        rest_us: 1.0,
        heads: vec![(0, 0.0), (1, 2.5), (2, 4.0)],
        ffn: vec![(0, 0.0), (2, 1.0), (6, 4.0)],
    };
    let plan_of = |parent: &Checkpoint, ffn: usize| {
        let cut = Cut { amount: Amount::Count(ffn), align: 1, ..Cut::default() };
        let budget = Budget { ffn: cut, ..Budget::default() };
        prune::plan(&parent.spec, &prune::magnitude(parent, Magnitude::L2), &budget).expect("a plan")
    };
    let json = |plan: &Plan| serde_json::to_string(plan).expect("JSON");
    let two = |first: &Plan| {
        let next = plan_of(&prune::apply(&PARENT, first).expect("a smaller model"), 2);
        [json(first), json(&next)].join(BETWEEN)
    };
    let first = plan_of(&PARENT, 3);
    let mut no_layer = Plan { layers: vec![1], ..first.clone() };
    no_layer.ffn[1].clear();
    let place = quetsch_fuzz::folder().join("state");
    train(&State { dir: &place, every_steps: 0, resume: false, key: "k".into() }, 1);
    let state = fs::read(place.join("state.safetensors")).expect("a state");
    let fixtures = quetsch_fuzz::root().join("fixtures");
    let read = |path: &str| fs::read_to_string(fixtures.join(path)).expect("a fixture");
    let report = r#"{"stage": "distill", "parameters": 400, "disk_bytes": 1600, "test": {"accuracy": 0.5, "macro_f1": 0.4, "n": 9,
        "data": "hash", "per_label": [{"label": "a", "f1": 0.1, "support": 3}]}, "calibration": {"n": 3}, "version": "1",
        "origin": {"license": "mit", "base_model": "org/base", "datasets": ["org/data"], "languages": ["en"],
        "credits": ["thanks"], "tested_on": "org/data", "parents": [{"name": "parent", "stage": "finetune",
        "parameters": 800, "disk_bytes": 3200, "test": {"accuracy": 0.6, "data": "hash"}}]}}"#;
    let ours = "---\nlicense: mit\n---\n<!-- Written by quetsch. Without this line the file is yours, and quetsch leaves \
                it alone. -->\n";
    let card = |readme: &str, config: &str| [readme, report, config].join(BETWEEN);
    let logits: Vec<u8> = [0.5f32, -1.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let facts = format!("{{\"data\": \"hash\", \"sentences\": 2, \"labels\": 1}}{BETWEEN}");
    let seeds: [(u8, Vec<u8>); 10] = [
        (0, serde_json::to_vec(&table).expect("JSON")),
        (1, two(&first).into_bytes()),
        (1, two(&no_layer).into_bytes()),
        (2, state),
        (3, card(ours, &read("tiny_student/config.json")).into_bytes()),
        (3, card(ours, &read("tiny_bert/config.json")).into_bytes()),
        (3, card("---\nlicense: 'apache-2.0'\n---\nMine.", "{}").into_bytes()),
        (4, [facts.as_bytes(), &logits].concat()),
        (5, read("tiny_student/tokenizer.json").into_bytes()),
        (5, read("families/electra/tokenizer.json").into_bytes()),
    ];
    for (i, (reader, content)) in seeds.iter().enumerate() {
        assert!(READERS[usize::from(*reader)](content).is_some(), "seed {i} is refused");
    }
    seeds.into_iter().map(|(reader, content)| [&[reader], &content[..]].concat()).collect()
}
