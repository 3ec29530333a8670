//! One module per command.

mod predict;
mod shell;

use crate::ui::Ui;
use anyhow::Result;
use clap::Subcommand;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the most likely labels of texts
    Predict(predict::Predict),
    /// Print a completion script for a shell
    Completions(shell::Completions),
    /// Print the manual page
    Man,
}

/// Runs a command.
pub fn dispatch(command: Command, ui: &Ui) -> Result<()> {
    match command {
        Command::Predict(c) => predict::run(c, ui),
        Command::Completions(c) => shell::completions(c),
        Command::Man => shell::man(),
    }
}
