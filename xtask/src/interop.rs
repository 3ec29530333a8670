//! Both directions between Quetsch and transformers with bitsandbytes: what we write loads there and gives our logits,
//! what it writes (the golden fixtures, and models written now) loads here and gives its own.

use anyhow::{Context, Result, bail, ensure};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a Python must have: prints the versions, or fails with the name of what it lacks.
const VERSIONS: &str = "import torch, transformers, bitsandbytes; \
    print(transformers.__version__, torch.__version__, bitsandbytes.__version__)";
/// What the environments that are made here hold, each pinned.
const REQUIREMENTS: [&str; 2] = ["scripts/requirements.txt", "scripts/requirements-5.txt"];
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
}

// docs/numerics.md has the reasons.
const FLOAT: Near = Near::Within(1e-4);
const BF16: Near = Near::Within(3.2e-2);
const F16: Near = Near::Within(4e-3);

struct Python {
    program: PathBuf,
    transformers: String,
}

/// One model directory that both sides read.
#[derive(Clone)]
struct Case {
    name: String,
    dir: PathBuf,
    /// The directory whose answers are ours: the same, or, where transformers cannot know how we mean it, a copy that
    /// says what transformers takes it for.
    ours: PathBuf,
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

/// `--python FILE`, once for each environment; without any `INTEROP_PYTHONS`, a list as in `PATH`; without that, two are
/// made below `target`. `--out DIR`.
pub fn run(args: &[String]) -> Result<()> {
    let (mut programs, mut out) = (vec![], target().join("interop"));
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
    if programs.is_empty() {
        programs = REQUIREMENTS.map(environment).into_iter().collect::<Result<_>>()?;
    }
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
    let cases = [golden(&out)?, written(&out)?].concat();
    let mut rows = vec![];
    for case in &cases {
        expect(&out, case)?;
        let outcomes: Vec<_> = pythons.iter().map(|p| check(case, p)).collect::<Result<_>>()?;
        println!("{:44}{}", case.name, outcomes.iter().map(|o| format!("{o:>22}")).collect::<String>());
        rows.push((case.name.clone(), outcomes));
    }
    rows.extend(read_back(&out, &pythons)?);
    report(&pythons, &rows)
}

/// The Python of a virtual environment with these requirements: made below `target`, or the one that is there already
/// from the same file.
fn environment(requirements: &str) -> Result<PathBuf> {
    let file = crate::root().join(requirements);
    let wanted = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let folder = target().join("python").join(name);
    // Written last: an environment without it is not whole.
    let (program, mark) = (folder.join("bin/python"), folder.join("requirements.txt"));
    if fs::read(&mark).is_ok_and(|made| made == wanted) {
        return Ok(program);
    }
    println!("making {} from {requirements}", folder.display());
    let base = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    crate::run(Command::new(base).args(["-m", "venv", "--clear"]).arg(&folder))?;
    crate::run(Command::new(&program).args(["-m", "pip", "install", "--quiet", "-r"]).arg(&file))?;
    fs::write(&mark, wanted).with_context(|| format!("cannot write {}", mark.display()))?;
    Ok(program)
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| crate::root().join("target"), PathBuf::from)
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
    let mut command = Command::new(target().join("debug/quetsch"));
    let done = command.args(words).current_dir(out).output().context("cannot start quetsch")?;
    let why = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(done.status.success(), "quetsch {}\n{why}", words.join(" "));
    Ok(done)
}

/// The fixtures that transformers 4.57.6 and bitsandbytes wrote, quantised ones with the tokenizer of the float model.
fn golden(out: &Path) -> Result<Vec<Case>> {
    // transformers 5 does not read `pruned_heads`, which all stock ones have.
    let rows = [
        ("tiny_student", FLOAT, true),
        ("tiny_bert", FLOAT, false),
        ("families/distilbert", FLOAT, false),
        ("families/roberta", FLOAT, false),
        ("families/xlm_roberta", FLOAT, false),
        ("families/electra", FLOAT, false),
        ("families/camembert", FLOAT, false),
        ("families/chinese_bert", FLOAT, false),
        ("bnb/int8", Near::Integers, true),
        // Its skip list is null, which transformers 5 takes for other layers than 4.57 does.
        ("bnb/nf4", BF16, false),
        ("bnb/nf4_single", BF16, true),
        ("bnb/fp4", FLOAT, true),
    ];
    let fixtures = crate::root().join("fixtures");
    let mut cases = vec![];
    for (path, near, five) in rows {
        let name = format!("golden-{}", path.replace('/', "-"));
        let dir = out.join(&name);
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let tokenizer = path.starts_with("bnb/").then(|| fixtures.join("tiny_student"));
        for from in tokenizer.into_iter().chain([fixtures.join(path)]) {
            for entry in fs::read_dir(&from).with_context(|| format!("cannot read {}", from.display()))? {
                let entry = entry?;
                fs::copy(entry.path(), dir.join(entry.file_name()))?;
            }
        }
        cases.push(Case { name, ours: dir.clone(), dir, near, remote: false, five });
    }
    Ok(cases)
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
                    let dir = out.join(&name);
                    cases.push(Case { name, ours: dir.clone(), dir, near, remote, five });
                }
            }
        }
        let float = if model == "bert" { "bert-pruned-dense-hf" } else { "student-pruned-dense-hf" };
        let dense = out.join(float);
        let dense = dense.to_string_lossy();
        let schemes: [(&str, &[&str], Near); 9] = [
            ("f16", &[], FLOAT),
            ("bf16", &[], FLOAT),
            ("int8", &[], Near::Integers),
            ("int8-weight", &[], Near::Integers),
            ("fp4", &[], BF16),
            ("nf4", &["--compute", "f32"], FLOAT),
            ("nf4", &["--compute", "f16"], F16),
            ("nf4", &["--no-double-quant"], BF16),
            ("bnb-int8", &["--keep", "none"], Near::Integers),
        ];
        for (scheme, more, near) in schemes {
            let name = format!("{model}-dense-{scheme}{}", more.concat());
            let line = ["quantize", "--model", &dense, "--quant", scheme, "--out", &name];
            quetsch(out, &[&line[..], more].concat())?;
            let dir = out.join(&name);
            let ours = if scheme == "int8" || scheme == "int8-weight" { as_llm_int8(&dir)? } else { dir.clone() };
            cases.push(Case { name, dir, ours, near, remote: false, five: true });
        }
    }
    for family in ["distilbert", "roberta", "electra", "camembert", "chinese_bert"] {
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
            let dir = out.join(&name);
            cases.push(Case { name, ours: dir.clone(), dir, near, remote: layout == "remote-code", five: true });
        }
    }
    Ok(cases)
}

/// A copy without the schemes of the `quetsch` key: its int8 linears are LLM.int8() then, which is what transformers
/// takes them for.
fn as_llm_int8(dir: &Path) -> Result<PathBuf> {
    let copy = PathBuf::from(format!("{}-as-llm-int8", dir.display()));
    fs::create_dir(&copy).with_context(|| format!("cannot make {}", copy.display()))?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        fs::copy(entry.path(), copy.join(entry.file_name()))?;
    }
    let config = copy.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&config)?)?;
    let sites = json["quetsch"].as_object_mut().and_then(|ours| ours.remove("sites"));
    ensure!(sites.is_some(), "{}: no sites in key `quetsch`", config.display());
    fs::write(&config, json.to_string())?;
    Ok(copy)
}

/// Our own logits, beside the directory.
fn expect(out: &Path, case: &Case) -> Result<()> {
    let ours = case.ours.to_string_lossy();
    let line = ["predict", "--model", &ours, "--input", "texts.txt", "--logits", "--format", "jsonl"];
    Ok(fs::write(case.dir.with_extension("jsonl"), quetsch(out, &line)?.stdout)?)
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
            let dir = out.join(&name);
            let case = Case { name, ours: dir.clone(), dir, near, remote: false, five: true };
            outcomes.push(match expect(out, &case) {
                Ok(()) => check(&case, p)?,
                Err(e) => Outcome::Failed(e.to_string()),
            });
        }
        rows.push((format!("written by transformers: {scheme}"), outcomes));
    }
    Ok(rows)
}
