//! Trials as processes: each is `quetsch run` on a recipe of its own, a few at a time. A trial ends in good order when
//! this program does, however it ends: its standard input closes then.

use crate::exit::interrupted;
use crate::ui::is_interrupted;
use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A recipe to run.
#[derive(Clone, Debug)]
pub struct Task {
    /// The recipe's file.
    pub recipe: PathBuf,
    /// Where what it prints goes.
    pub log: PathBuf,
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// Its outputs are there.
    Done,
    /// With this message.
    Failed(String),
    /// It was not begun.
    Refused,
}

/// How many at a time, with how many threads each.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Processes.
    pub jobs: usize,
    /// Threads of each.
    pub threads: usize,
}

/// How often running trials are looked at.
const POLL: Duration = Duration::from_millis(20);
/// The exit code of a trial that was interrupted and saved its state.
const INTERRUPTED: i32 = 130;

/// Runs tasks. `may_start` is asked before each; `ended` is told in the order of their ends.
///
/// # Errors
/// Ctrl-C: all trials have saved their state and ended then.
pub fn run(
    tasks: &[Task],
    share: Share,
    may_start: &mut dyn FnMut(usize) -> bool,
    ended: &mut dyn FnMut(usize, End) -> Result<()>,
) -> Result<()> {
    let mut waiting: VecDeque<usize> = (0..tasks.len()).collect();
    let mut running: Vec<(usize, Child)> = vec![];
    while !waiting.is_empty() || !running.is_empty() {
        if is_interrupted() {
            return Err(stop(running));
        }
        while running.len() < share.jobs
            && let Some(i) = waiting.pop_front()
        {
            // `ended` may change what `may_start` says: both are asked one task at a time.
            match may_start(i) {
                true => running.push((i, start(&tasks[i], share.threads)?)),
                false => ended(i, End::Refused)?,
            }
        }
        for at in (0..running.len()).rev() {
            let Some(status) = running[at].1.try_wait().context("cannot wait for a trial")? else { continue };
            let (task, _) = running.remove(at);
            match status.code() {
                Some(0) => ended(task, End::Done)?,
                // The trial saw Ctrl-C before this loop did.
                Some(INTERRUPTED) => return Err(stop(running)),
                _ => ended(task, End::Failed(reason(&tasks[task].log, &status.to_string())))?,
            }
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Lets all trials save their state and end.
fn stop(running: Vec<(usize, Child)>) -> anyhow::Error {
    for (_, mut child) in running {
        drop(child.stdin.take());
        // How it ended is found out by the search that goes on from here.
        let _ = child.wait();
    }
    interrupted("interrupted")
}

fn start(task: &Task, threads: usize) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let open = || {
        let log = OpenOptions::new().create(true).append(true).open(&task.log);
        log.with_context(|| format!("cannot write {}", task.log.display()))
    };
    let mut command = Command::new(program);
    command.arg("run").arg(&task.recipe).args(["--resume", "--attached", "--no-progress"]);
    command.args(["--threads", &threads.to_string()]);
    // The recipe says everything; a variable that stands over a recipe's key is for the recipes that people write.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("QUETSCH_") && name != "QUETSCH_ISA") {
        command.env_remove(name);
    }
    command.stdin(Stdio::piped()).stdout(open()?).stderr(open()?).spawn().context("cannot start a trial")
}

/// The last complaint in a log.
fn reason(log: &Path, status: &str) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    match text.rfind("error: ") {
        Some(at) => text[at + "error: ".len()..].trim().replace('\n', " "),
        None => format!("ended with {status}; its log is {}", log.display()),
    }
}
