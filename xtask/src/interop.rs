//! Both directions between Quetsch and transformers with bitsandbytes: what we write loads there and gives our logits,
//! what it writes loads here and gives its own.

use anyhow::{Context, Result, bail, ensure};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a Python must have: prints the versions, or fails with the name of what it lacks.
const VERSIONS: &str = "import torch, transformers, bitsandbytes; \
    print(transformers.__version__, torch.__version__, bitsandbytes.__version__)";
/// The same texts for everything.
const TEXTS: &str = "i lost my card\nwhy was i charged twice?\nhello\nset a new pin now please\nadd money to my account\n\
    fees in another country\nwhere is my card?\nplease add money\nthe pin is lost\ncharged again today\n";

/// How near both sides must be.
#[derive(Clone, Copy)]
enum Near {
    /// Largest difference of a logit: f32 sums in another order, or bf16 products, which keep 8 bits.
    Within(f64),
    /// The same integers: sums in another order are 1e-7 apart, and where that changes an integer of an input, the
    /// logits of these random models are some 0.05 apart. That is one integer of about 30,000, so most texts have none.
    Integers,
    /// They quantise inputs otherwise than we do: not farther apart than our logits are from those of this float model.
    Rounding(&'static str),
}

const FLOAT: Near = Near::Within(1e-4);
const BF16: Near = Near::Within(3e-2);

struct Python {
    program: PathBuf,
    transformers: String,
}

/// One directory that Quetsch wrote.
struct Case {
    name: String,
    dir: PathBuf,
    near: Near,
    remote: bool,
    /// Whether transformers 5 can read it: it no longer prunes heads by itself.
    five: bool,
}

enum Outcome {
    Same(String),
    NotFor5,
    Failed(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Outcome::Same(difference) => difference,
            Outcome::NotFor5 => "not for 5",
            Outcome::Failed(_) => "FAILED",
        })
    }
}

/// `--python FILE`, once for each environment; without any `INTEROP_PYTHONS`, a list as in `PATH`. `--out DIR`.
pub fn run(args: &[String]) -> Result<()> {
    let (mut programs, mut out) = (vec![], crate::root().join("target/interop"));
    for pair in args.chunks(2) {
        match pair {
            [flag, value] if flag == "--python" => programs.push(PathBuf::from(value)),
            [flag, value] if flag == "--out" => out = PathBuf::from(value),
            _ => bail!("interop: unexpected {pair:?}; expected\n{}", crate::USAGE),
        }
    }
    if programs.is_empty() {
        programs =
            std::env::var_os("INTEROP_PYTHONS").map(|p| std::env::split_paths(&p).collect()).unwrap_or_default();
    }
    ensure!(
        !programs.is_empty(),
        "interop: no Python given; make environments with scripts/requirements.txt (transformers 4.57.6) and with \
         transformers 5.23.0, bitsandbytes 0.50.2 and CPU torch in both, and name each with --python"
    );
    let pythons: Vec<Python> = programs.into_iter().map(python).collect::<Result<_>>()?;
    for major in ["4.", "5."] {
        if !pythons.iter().any(|p| p.transformers.starts_with(major)) {
            println!("no environment has transformers {major}x: that half is not checked");
        }
    }
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    fs::write(out.join("texts.txt"), TEXTS)?;
    crate::run(&mut crate::cargo(["build", "--package", "quetsch-cli"]))?;
    let cases = written(&out)?;
    let mut rows = vec![];
    for case in &cases {
        expect(&out, &case.dir)?;
        let outcomes: Vec<_> = pythons.iter().map(|p| check(case, p)).collect::<Result<_>>()?;
        println!("{:44}{}", case.name, outcomes.iter().map(|o| format!("{o:>22}")).collect::<String>());
        rows.push((case.name.clone(), outcomes));
    }
    rows.extend(read_back(&out, &pythons)?);
    report(&pythons, &rows)
}

fn report(pythons: &[Python], rows: &[(String, Vec<Outcome>)]) -> Result<()> {
    let versions: String = pythons.iter().map(|p| format!("{:>22}", p.transformers)).collect();
    println!("\n{:44}{versions}", "largest |logit difference| (int8: median of texts first)");
    let mut failures = vec![];
    for (name, outcomes) in rows {
        println!("{name:44}{}", outcomes.iter().map(|o| format!("{o:>22}")).collect::<String>());
        for (outcome, p) in outcomes.iter().zip(pythons) {
            if let Outcome::Failed(why) = outcome {
                failures.push(format!("{name}, transformers {}:\n{why}", p.transformers));
            }
        }
    }
    ensure!(failures.is_empty(), "{} failed\n\n{}", failures.len(), failures.join("\n\n"));
    Ok(())
}

fn python(program: PathBuf) -> Result<Python> {
    let found = Command::new(&program).args(["-W", "ignore", "-c", VERSIONS]).output();
    let found = found.with_context(|| format!("cannot start {}", program.display()))?;
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    let why = String::from_utf8_lossy(&found.stderr).lines().last().unwrap_or_default().to_owned();
    ensure!(found.status.success(), "{}: {why}", program.display());
    println!("{}: transformers, torch, bitsandbytes {}", program.display(), text.trim());
    let transformers = text.lines().last().and_then(|l| l.split(' ').next()).unwrap_or_default().to_owned();
    Ok(Python { program, transformers })
}

fn quetsch(out: &Path, words: &[&str]) -> Result<Output> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| crate::root().join("target"), PathBuf::from);
    let mut command = Command::new(target.join("debug/quetsch"));
    let done = command.args(words).current_dir(out).output().context("cannot start quetsch")?;
    let why = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(done.status.success(), "quetsch {}\n{why}", words.join(" "));
    Ok(done)
}

/// Quantises, prunes and exports the tiny models in every way that transformers is to read.
fn written(out: &Path) -> Result<Vec<Case>> {
    let mut cases = vec![];
    for (model, fixture) in [("student", "tiny_student"), ("bert", "tiny_bert")] {
        let fixture = crate::root().join("fixtures").join(fixture);
        let source = fixture.to_string_lossy();
        // Uneven: heads and channels go where they do least, and one layer loses all its heads.
        let uneven = format!("{model}-uneven");
        let prune = ["--heads", "0:0,0:1,0:2,0:3", "--ffn", "0.25", "--score", "l2", "--max-per-layer", "1"];
        quetsch(
            out,
            &[
                &["prune", "--model", &source, "--epochs", "0", "--ffn-scope", "global", "--out", &uneven],
                &prune[..],
            ]
            .concat(),
        )
        .or_else(|_| {
            // Heads of the layer that are gone already cannot go again.
            let prune = ["--ffn", "0.25", "--ffn-scope", "global", "--score", "l2"];
            quetsch(out, &[&["prune", "--model", &source, "--epochs", "0", "--out", &uneven], &prune[..]].concat())
        })?;
        for (what, from) in [("pruned", source.as_ref()), ("uneven", uneven.as_str())] {
            for layout in ["compact", "dense", "remote-code"] {
                if (what, layout) == ("uneven", "compact") {
                    continue; // only Quetsch reads uneven widths
                }
                for (to, near) in [("hf", FLOAT), ("bnb-int8", Near::Integers), ("bnb-nf4", BF16)] {
                    let name = format!("{model}-{what}-{layout}-{to}");
                    quetsch(out, &["export", "--model", from, "--to", to, "--layout", layout, "--out", &name])?;
                    let (remote, five) = (layout == "remote-code", layout != "compact" || model == "student");
                    cases.push(Case { dir: out.join(&name), name, near, remote, five });
                }
            }
        }
        let float = if model == "bert" { "bert-pruned-dense-hf" } else { "student-pruned-dense-hf" };
        let dense = out.join(float);
        let dense = dense.to_string_lossy();
        let schemes: [(&str, &[&str], Near); 8] = [
            ("f16", &[], FLOAT),
            ("bf16", &[], FLOAT),
            ("int8", &[], Near::Rounding(float)),
            ("int8-weight", &[], Near::Rounding(float)),
            ("fp4", &[], BF16),
            ("nf4", &["--compute", "f32"], FLOAT),
            ("nf4", &["--no-double-quant"], BF16),
            ("bnb-int8", &["--keep", "none"], Near::Integers),
        ];
        for (scheme, more, near) in schemes {
            let name = format!("{model}-dense-{scheme}{}", more.concat());
            let line = ["quantize", "--model", &dense, "--quant", scheme, "--out", &name];
            quetsch(out, &[&line[..], more].concat())?;
            cases.push(Case { dir: out.join(&name), name, near, remote: false, five: true });
        }
    }
    for family in ["distilbert", "roberta", "electra"] {
        let fixture = crate::root().join("fixtures/families").join(family);
        let source = fixture.to_string_lossy();
        let pruned = format!("{family}-uneven");
        let prune = ["--heads", "1", "--ffn", "0.25", "--ffn-scope", "global", "--score", "l2"];
        quetsch(out, &[&["prune", "--model", &source, "--epochs", "0", "--out", &pruned], &prune[..]].concat())?;
        for (layout, to, near) in [
            ("dense", "hf", FLOAT),
            ("dense", "bnb-int8", Near::Integers),
            ("dense", "bnb-nf4", BF16),
            ("remote-code", "hf", FLOAT),
        ] {
            if (family, layout) == ("distilbert", "remote-code") {
                continue; // refused, with the dense layout as advice
            }
            let name = format!("{pruned}-{layout}-{to}");
            quetsch(out, &["export", "--model", &pruned, "--to", to, "--layout", layout, "--out", &name])?;
            cases.push(Case { dir: out.join(&name), name, near, remote: layout == "remote-code", five: true });
        }
    }
    Ok(cases)
}

/// Our own logits of a directory, beside it.
fn expect(out: &Path, dir: &Path) -> Result<PathBuf> {
    let dir_name = dir.to_string_lossy();
    let line = ["predict", "--model", &dir_name, "--input", "texts.txt", "--logits", "--format", "jsonl"];
    let path = dir.with_extension("jsonl");
    fs::write(&path, quetsch(out, &line)?.stdout)?;
    Ok(path)
}

/// The largest difference between the logits of two such files.
fn distance(a: &Path, b: &Path) -> Result<f64> {
    let read = |path: &Path| -> Result<Vec<f64>> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let lines = text.lines().map(serde_json::from_str::<serde_json::Value>).collect::<Result<Vec<_>, _>>()?;
        Ok(lines.iter().filter_map(|l| l["logits"].as_array()).flatten().filter_map(|v| v.as_f64()).collect())
    };
    let (a, b) = (read(a)?, read(b)?);
    ensure!(a.len() == b.len() && !a.is_empty(), "{} and {} logits", a.len(), b.len());
    Ok(a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max))
}

fn check(case: &Case, python: &Python) -> Result<Outcome> {
    if !case.five && python.transformers.starts_with("5.") {
        return Ok(Outcome::NotFor5);
    }
    let mut command = Command::new(&python.program);
    command.args(["-W", "ignore"]).arg(crate::root().join("scripts/check_transformers.py")).arg(&case.dir);
    command.arg("--expect").arg(case.dir.with_extension("jsonl"));
    let (most, median) = match case.near {
        Near::Within(most) => (most, most),
        Near::Integers => (0.1, 1e-5),
        Near::Rounding(float) => {
            let moved =
                distance(&case.dir.with_extension("jsonl"), &case.dir.with_file_name(format!("{float}.jsonl")))?;
            (moved, moved)
        }
    };
    command.args(["--tolerance", &most.to_string(), "--median", &median.to_string(), "--batch", "1"]);
    if case.remote {
        command.arg("--trust-remote-code");
    }
    let done = command.output().with_context(|| format!("cannot start {}", python.program.display()))?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        let last: Vec<_> = text.lines().rev().take(12).collect();
        return Ok(Outcome::Failed(last.into_iter().rev().collect::<Vec<_>>().join("\n")));
    }
    let number = |after: &str| text.split(after).nth(1).and_then(|t| t.split(' ').next());
    let (largest, median) = (number("largest |logit difference| "), number("|logit difference of a text| "));
    let largest = largest.context("the script printed no difference")?.to_owned();
    Ok(Outcome::Same(match (case.near, median) {
        (Near::Integers, Some(median)) => format!("{median} ({largest})"),
        _ => largest,
    }))
}

/// What each environment writes, read by us and compared with what it computes itself.
fn read_back(out: &Path, pythons: &[Python]) -> Result<Vec<(String, Vec<Outcome>)>> {
    let mut rows = vec![];
    for (scheme, near) in
        [("float", FLOAT), ("int8", Near::Integers), ("nf4", BF16), ("nf4-single", BF16), ("fp4", BF16)]
    {
        let mut outcomes = vec![];
        for p in pythons {
            let name = format!("theirs-{scheme}-{}", p.transformers);
            let mut command = Command::new(&p.program);
            command.args(["-W", "ignore"]).arg(crate::root().join("scripts/write_transformers.py"));
            let done = command.arg(out.join("bert-pruned-dense-hf")).arg(out.join(&name)).arg(scheme).output()?;
            let why = String::from_utf8_lossy(&done.stderr).into_owned();
            ensure!(done.status.success(), "transformers {} cannot write {scheme}:\n{why}", p.transformers);
            let case = Case { dir: out.join(&name), name, near, remote: false, five: true };
            outcomes.push(match expect(out, &case.dir) {
                Ok(_) => check(&case, p)?,
                Err(e) => Outcome::Failed(e.to_string()),
            });
        }
        rows.push((format!("written by transformers: {scheme}"), outcomes));
    }
    Ok(rows)
}
