//! The `quetsch` program: distil, prune, quantise, compare and run BERT-style text classifiers. A library only so that
//! fuzz targets reach its readers; [`main`] is all of it that `src/main.rs` needs.

mod args;
mod commands;
mod exit;
mod hub;
mod logs;
pub mod recipe;
mod settings;
mod ui;
mod values;
mod work;

#[cfg(feature = "hub")]
#[doc(hidden)]
pub use hub::fetch_from;
#[doc(hidden)]
pub use work::{card, folds};

use std::process::ExitCode;

/// Runs the program with the arguments of this process.
pub fn main() -> ExitCode {
    let (cli, ui, _logs) = match args::parse() {
        Ok(parsed) => parsed,
        Err(e) => return ui::fail(&e),
    };
    if let Err(e) = quetsch::runtime::Isa::from_env() {
        return ui::fail(&exit::usage(e));
    }
    if let Some(why) = quetsch::runtime::amx_fault() {
        tracing::warn!("{why}");
    }
    match commands::dispatch(cli.command, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => ui::fail(&e),
    }
}
