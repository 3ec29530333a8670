//! Tests of `recipe`.

use super::*;
use crate::values::Amount;

const GOOD: &str = r#"
model = "minilm"
[data]
train = "train.csv"
[[stage]]
[stage.train]
id = "teacher"
epochs = 6
[[stage]]
[stage.distill]
layers = [1, 3, 5]
[[stage]]
[stage.prune]
heads = 12
[[stage]]
[stage.quantize]
id = "int8"
[[stage]]
[stage.quantize]
id = "nf4"
quant = "nf4"
[[stage]]
[stage.compare]
"#;

fn resolve(text: &str, environment: &[(&str, &str)], flags: &[&str]) -> Result<Recipe> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("r.toml");
    std::fs::write(&file, text)?;
    let environment = environment.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let flags: Vec<_> = flags.iter().map(|f| f.to_string()).collect();
    read(&file, &environment, &flags)
}

#[test]
fn inputs_are_wired_by_default() {
    let recipe = resolve(GOOD, &[], &[]).expect("a good recipe");
    let name = |s: &str| Some(s.to_string());
    let inputs: Vec<_> = recipe.stages.iter().map(|s| s.kind.inputs()).collect();
    assert_eq!(inputs[0], [("model", name("minilm"))]);
    assert_eq!(inputs[1], [("teacher", name("teacher"))]);
    assert_eq!(inputs[2], [("model", name("distill")), ("teacher", name("teacher"))]);
    assert_eq!(inputs[3], [("model", name("prune"))]);
    assert_eq!(inputs[4], [("model", name("prune"))], "a second scheme starts from the same parent");
    assert_eq!(inputs[5].len(), 5);
    assert_eq!(recipe.out, Path::new("r"));
    let again = resolve(&recipe.to_toml().expect("TOML"), &[], &[]).expect("the resolved recipe is a recipe");
    assert_eq!(again.stages, recipe.stages);
}

#[test]
fn flag_over_environment_over_recipe_over_default() {
    let epochs = |environment: &[(&str, &str)], flags: &[&str]| {
        let recipe = resolve(GOOD, environment, flags).expect("a good recipe");
        let Kind::Train(train) = &recipe.stages[0].kind else { panic!("the first stage trains") };
        let Kind::Prune(prune) = &recipe.stages[2].kind else { panic!("the third stage prunes") };
        (train.training.epochs, train.training.seed, prune.heads.clone(), recipe.data.test)
    };
    assert_eq!(epochs(&[], &[]), (6, Some(42), Amount::Count(12), None));
    let environment = [("QUETSCH_TEACHER_EPOCHS", "7"), ("QUETSCH_SEED", "1"), ("QUETSCH_TEST", "t.csv")];
    assert_eq!(epochs(&environment, &[]), (7, Some(1), Amount::Count(12), Some("t.csv".into())));
    let flags = ["teacher.epochs=8", "prune.heads=0.5", "data.test=u.csv"];
    assert_eq!(epochs(&environment, &flags), (8, Some(1), Amount::Share(0.5), Some("u.csv".into())));
}

#[test]
fn complaints_name_their_place() {
    let rows: [(&str, &str, &[&str], &[&str]); 17] = [
        (
            "alpha out of range",
            "model='m'\n[[stage]]\n[stage.distill]\n  alpha = 1.5",
            &[],
            &["r.toml:4:3", "[0, 1]"],
        ),
        (
            "unknown key",
            "model='m'\n[[stage]]\n[stage.distill]\nalpa = 0.3",
            &[],
            &["r.toml:4:1", "unknown key `alpa`"],
        ),
        ("underscore", "model='m'\n[[stage]]\n[stage.train]\nbatch_size = 3", &[], &["r.toml:4:1", "`batch-size`"]),
        ("wrong type", "model='m'\n[[stage]]\n[stage.train]\nepochs = \"six\"", &[], &["r.toml:4:1", "six"]),
        ("negative", "model='m'\n[[stage]]\n[stage.train]\nepochs = -1", &[], &["r.toml:4:1", "-1"]),
        ("syntax", "model = \n", &[], &["r.toml:1:"]),
        ("unknown stage", "[[stage]]\n[stage.squeeze]", &[], &["r.toml:2:8", "`squeeze`"]),
        ("two sections", "[[stage]]\n[stage.train]\n[stage.prune]", &[], &["r.toml:3:8", "[[stage]]"]),
        ("no stage", "model='m'", &[], &["no [[stage]]"]),
        ("top key", "modle='m'\n[[stage]]\n[stage.train]", &[], &["r.toml:1:1", "`modle`"]),
        ("data key", "[data]\ntrian='m'\n[[stage]]\n[stage.train]", &[], &["r.toml:2:1", "`trian`"]),
        (
            "same id",
            "model='m'\n[[stage]]\n[stage.train]\n[[stage]]\n[stage.train]",
            &[],
            &["r.toml:5:8", "`train` is taken"],
        ),
        (
            "later input",
            "[[stage]]\n[stage.train]\nmodel='x'\n[[stage]]\n[stage.prune]\nid='x'\nheads=1",
            &[],
            &["r.toml:3:1", "not before"],
        ),
        ("no model", "[[stage]]\n[stage.train]", &[], &["r.toml:2:8", "no `model`"]),
        ("flag", GOOD, &["distill.alpha=2"], &["--set distill.alpha=2", "[0, 1]"]),
        ("flag without stage", GOOD, &["student.alpha=2"], &["`student`", "teacher, distill"]),
        ("flag without value", GOOD, &["student"], &["KEY=VALUE"]),
    ];
    let mut failures = vec![];
    for (what, text, flags, wanted) in rows {
        match resolve(text, &[], flags) {
            Ok(_) => failures.push(format!("{what}: accepted")),
            Err(e) => {
                let message = format!("{e:#}");
                if !wanted.iter().all(|w| message.contains(w)) {
                    failures.push(format!("{what}: {message}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn unusual_values_warn() {
    let recipe = resolve("model='m'\n[[stage]]\n[stage.distill]\nalpha = 0.9", &[], &[]).expect("only a warning");
    assert_eq!(recipe.warnings.len(), 1);
    assert!(recipe.warnings[0].contains("r.toml:4:1"), "{:?}", recipe.warnings);
}
