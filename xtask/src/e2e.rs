//! The whole path on real data: recipes/banking77.toml through the release program. Gates on accuracy, never on time.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const RECIPE: &str = "recipes/banking77.toml";

/// Where things are.
struct Options {
    model: PathBuf,
    data: PathBuf,
    out: PathBuf,
}

impl Options {
    fn parse(args: &[String]) -> Result<Options> {
        let (mut model, mut data, mut out) = (None, None, crate::root().join("target/e2e"));
        for pair in args.chunks(2) {
            match pair {
                [flag, value] if flag == "--model" => model = Some(value),
                [flag, value] if flag == "--data" => data = Some(value),
                [flag, value] if flag == "--out" => out = fs::canonicalize(".")?.join(value),
                _ => bail!("e2e: unexpected {pair:?}; expected\n{}", crate::USAGE),
            }
        }
        let there = |path: Option<&String>, what| {
            let path = path.with_context(|| format!("e2e: no {what} given; expected\n{}", crate::USAGE))?;
            fs::canonicalize(path).with_context(|| path.clone())
        };
        Ok(Options { model: there(model, "--model")?, data: there(data, "--data")?, out })
    }
}

/// Trains, distils, prunes, quantises and compares; a run that was cut off goes on.
pub fn run(args: &[String]) -> Result<()> {
    let Options { model, data, out } = Options::parse(args)?;
    let set = |key: &str, path: &Path| format!("{key}={:?}", path.display().to_string());
    let mut command =
        crate::cargo(["run", "--release", "--package", "quetsch-cli", "--", "run", RECIPE, "--resume"]);
    for (key, path) in [
        ("model", &model),
        ("data.train", &data.join("train.csv")),
        ("data.test", &data.join("test.csv")),
        ("out", &out),
    ] {
        command.args(["--set".into(), set(key, path)]);
    }
    crate::run(&mut command)?;
    let report = json(&out.join("compare/report.json"))?;
    let student = json(&out.join(parent(&report, "int8")?).join("config.json"))?;
    let mut missed = 0;
    for gate in gates(&report, &student)? {
        missed += usize::from(!gate.holds());
        println!("{gate}");
    }
    ensure!(missed == 0, "{missed} gates are not met");
    Ok(())
}

fn json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}

/// A figure in points or percent, with its bound.
struct Gate {
    what: &'static str,
    value: f64,
    at_least: bool,
    bound: f64,
}

impl Gate {
    fn holds(&self) -> bool {
        // 0.9250 is stored as 0.924999..
        let slack = 1e-9;
        if self.at_least { self.value >= self.bound - slack } else { self.value <= self.bound + slack }
    }
}

impl std::fmt::Display for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let (sign, word) = (if self.at_least { ">=" } else { "<=" }, if self.holds() { "ok" } else { "MISSED" });
        write!(f, "{word:<7}{:<44}{:>8.2}  {sign} {}", self.what, self.value, self.bound)
    }
}

fn variant<'a>(report: &'a Value, name: &str) -> Result<&'a Value> {
    let variants = report["variants"].as_array().map_or(&[][..], Vec::as_slice);
    variants.iter().find(|v| v["name"] == name).with_context(|| format!("the comparison has no {name:?}"))
}

/// The name of the float student that a quantised one was made from.
fn parent<'a>(report: &'a Value, name: &str) -> Result<&'a str> {
    variant(report, name)?["parent"].as_str().with_context(|| format!("{name} has no parent"))
}

fn gates(report: &Value, student_config: &Value) -> Result<Vec<Gate>> {
    let number = |v: &Value, what: &str| v.as_f64().with_context(|| format!("the report has no {what}"));
    let accuracy =
        |name: &str| Ok::<_, anyhow::Error>(100.0 * number(&variant(report, name)?["accuracy"], "accuracy")?);
    let student = accuracy(parent(report, "int8")?)?;
    let flips = &variant(report, "int8")?["against_parent"]["flip_rate"];
    let layers =
        student_config["quetsch"]["layers"].as_array().context("the student's config.json has no layers")?;
    let heads: usize = layers.iter().map(|l| l["heads"].as_array().map_or(0, Vec::len)).sum();
    let all = number(&student_config["num_attention_heads"], "num_attention_heads")? * layers.len() as f64;
    let at_least = |what, value, bound| Gate { what, value, at_least: true, bound };
    let at_most = |what, value, bound| Gate { what, value, at_least: false, bound };
    Ok(vec![
        at_least("teacher, accuracy", accuracy("teacher")?, 93.0),
        at_least("student, accuracy", student, 92.5),
        at_most("student, layers", layers.len() as f64, 3.0),
        at_least("student, heads removed, %", 100.0 * (1.0 - heads as f64 / all), 30.0),
        at_most("int8, points from its parent", (accuracy("int8")? - student).abs(), 0.2),
        at_most("int8, flipped predictions, %", 100.0 * number(flips, "flip_rate")?, 1.0),
        at_most("NF4, points below its parent", student - accuracy("nf4")?, 0.6),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn gates_are_met_and_missed() {
        let report = |int8: f64, flips: f64| {
            json!({ "variants": [
                { "name": "teacher", "accuracy": 0.93 },
                { "name": "pruned", "accuracy": 0.925 },
                { "name": "int8", "parent": "pruned", "accuracy": int8, "against_parent": { "flip_rate": flips } },
                { "name": "nf4", "parent": "pruned", "accuracy": 0.919 },
            ] })
        };
        let layer = |heads: usize| json!({ "heads": (0..heads).collect::<Vec<_>>(), "ffn": 8 });
        let config =
            |heads| json!({ "num_attention_heads": 12, "quetsch": { "layers": [layer(12), layer(heads)] } });
        for (int8, flips, heads, missed) in
            [(0.923, 0.01, 4, 0), (0.9229, 0.01, 4, 1), (0.925, 0.0101, 4, 1), (0.925, 0.0, 5, 1)]
        {
            let gates = gates(&report(int8, flips), &config(heads)).unwrap();
            let found = gates.iter().filter(|g| !g.holds()).count();
            assert_eq!(found, missed, "int8 {int8}, flips {flips}, heads {heads}");
        }
        assert!(gates(&json!({ "variants": [] }), &config(4)).is_err());
    }
}
