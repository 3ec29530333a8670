//! Development tasks: `cargo xtask check` is what a change must pass, `cargo xtask e2e` is the whole path on real
//! data, `cargo xtask portable` runs kernel tests on emulated CPUs, `cargo xtask fixtures` writes the golden files again.

mod e2e;
mod house;
mod interop;
mod portable;

use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use std::process::Command;

const USAGE: &str = "\
cargo xtask check [PART..]                           all parts, or some of: fmt house licences clippy docs tests
cargo xtask e2e --model DIR --data DIR [--out DIR]   recipes/banking77.toml on real data; gates on accuracy, never on time
cargo xtask interop [--python FILE..] [--out DIR]    both directions with transformers 4.57 and 5 and bitsandbytes
cargo xtask portable                                 kernel tests on CPUs that this machine is not (qemu-user)
cargo xtask fixtures [PART..]                        write fixtures/ again with Python (scripts/make_fixtures.py)";

/// A part of `check`: its name and what it does.
type Part = (&'static str, fn() -> Result<()>);

/// The parts of `check`, quick ones first.
const PARTS: [Part; 6] = [
    ("fmt", || run(&mut cargo(["fmt", "--all", "--check"]))),
    ("house", || house::check(root())),
    ("licences", || house::licences(root())),
    ("clippy", || run(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))),
    ("docs", || run(cargo(["doc", "--no-deps", "--workspace"]).env("RUSTDOCFLAGS", "-D warnings"))),
    ("tests", || run(&mut cargo(["test", "--workspace"]))),
];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((task, parts)) if task == "check" => check(parts),
        Some((task, options)) if task == "e2e" => e2e::run(options),
        Some((task, options)) if task == "interop" => interop::run(options),
        Some((task, [])) if task == "portable" => portable::run(),
        Some((task, parts)) if task == "fixtures" => run(python("scripts/make_fixtures.py").args(parts)),
        _ => bail!("expected one of\n{USAGE}"),
    }
}

fn check(wanted: &[String]) -> Result<()> {
    for name in wanted {
        ensure!(PARTS.iter().any(|(part, _)| part == name), "check has no part {name:?}; expected\n{USAGE}");
    }
    for (name, part) in PARTS.iter().filter(|(n, _)| wanted.is_empty() || wanted.iter().any(|w| w == n)) {
        eprintln!("== {name}");
        part().with_context(|| format!("{name} failed; again: cargo xtask check {name}"))?;
    }
    Ok(())
}

/// The repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository")
}

fn cargo<const N: usize>(args: [&str; N]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Python of `PYTHON` (a virtual environment with scripts/requirements.txt), else `python3`.
fn python(script: &str) -> Command {
    let mut command = Command::new(std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into()));
    command.arg(script).current_dir(root());
    command
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
