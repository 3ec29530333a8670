//! One module per command.

mod bench;
mod compare;
mod demo;
mod eval;
mod export;
mod init;
mod inspect;
mod predict;
mod run;
mod search;
mod serve;
mod shell;
mod stage;

#[cfg(test)]
pub use bench::Latency;
pub use bench::Speed;
pub use run::{expected, shapes};

use crate::logs::Logs;
use crate::recipe::Kind;
use crate::settings;
use crate::ui::Ui;
use anyhow::Result;
use clap::Subcommand;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The whole path on embedded data, without any download
    Demo(demo::Demo),
    /// Run the stages of a recipe
    Run(run::Run),
    /// Look for the smallest models within a budget of accuracy
    Search(search::Search),
    /// Fine-tune an encoder on labelled texts
    Train(Box<stage::Stage<settings::Train>>),
    /// Teach a smaller student from a teacher's logits
    Distill(Box<stage::Stage<settings::Distill>>),
    /// Cut attention heads, feed-forward channels or layers, then recover
    Prune(Box<stage::Stage<settings::Prune>>),
    /// Store linears in fewer bits
    Quantize(Box<stage::Stage<settings::Quantize>>),
    /// Measure a model on labelled texts
    Eval(eval::Eval),
    /// Measure several models side by side
    Compare(compare::CompareModels),
    /// Print the most likely labels of texts
    Predict(predict::Predict),
    /// Answer requests over HTTP
    Serve(serve::Serve),
    /// Measure latency, throughput, loading time and memory
    Bench(bench::Bench),
    /// Print shapes, parameters and bytes of a model
    Inspect(inspect::Inspect),
    /// Write a model for other programs
    Export(export::Export),
    /// Write a commented recipe for a data file
    Init(init::Init),
    /// Print a completion script for a shell
    Completions(shell::Completions),
    /// Print the manual page
    Man,
}

impl Command {
    /// How the command logs.
    pub fn logs(&self) -> Logs {
        match self {
            Command::Serve(s) => s.logs(),
            _ => Logs::default(),
        }
    }
}

/// Runs a command.
pub fn dispatch(command: Command, ui: &Ui) -> Result<()> {
    match command {
        Command::Demo(c) => demo::run(&c, ui),
        Command::Run(c) => run::run(&c, ui),
        Command::Search(c) => search::run(&c, ui),
        Command::Train(c) => stage::run(*c, Kind::Train, ui),
        Command::Distill(c) => stage::run(*c, Kind::Distill, ui),
        Command::Prune(c) => stage::run(*c, Kind::Prune, ui),
        Command::Quantize(c) => stage::run(*c, Kind::Quantize, ui),
        Command::Eval(c) => eval::run(&c, ui),
        Command::Compare(c) => compare::run(&c, ui),
        Command::Predict(c) => predict::run(&c, ui),
        Command::Serve(c) => serve::run(&c, ui),
        Command::Bench(c) => bench::run(&c, ui),
        Command::Inspect(c) => inspect::run(&c, ui),
        Command::Export(c) => export::run(&c, ui),
        Command::Init(c) => init::run(&c, ui),
        Command::Completions(c) => shell::completions(c),
        Command::Man => shell::man(),
    }
}
