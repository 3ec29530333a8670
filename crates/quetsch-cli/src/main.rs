//! The `quetsch` program: distil, prune, quantise, compare and run BERT-style text classifiers.

mod args;
mod commands;
mod exit;
mod recipe;
mod settings;
mod ui;
mod values;
mod work;

use std::process::ExitCode;

fn main() -> ExitCode {
    let (cli, ui) = match args::parse() {
        Ok(parsed) => parsed,
        Err(e) => return ui::fail(&e),
    };
    match commands::dispatch(cli.command, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => ui::fail(&e),
    }
}
