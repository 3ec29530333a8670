//! The command line: global flags, the list of commands, and the environment variable behind every flag.

use crate::commands::Command;
use crate::exit::usage;
use crate::logs;
use crate::ui::Ui;
use anyhow::Result;
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, ValueEnum};

/// Distil, prune, quantise, compare and run BERT-style text classifiers.
///
/// Every flag with a value can also be set by the environment: --max-length by QUETSCH_MAX_LENGTH. A flag wins over
/// the environment, the environment over a recipe, a recipe over the default.
#[derive(Debug, Parser)]
#[command(name = "quetsch", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Human,
    /// One JSON document.
    Json,
    /// One JSON object a line (predict only).
    Jsonl,
    /// Comma-separated values with a header (predict only).
    Csv,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// How to print results: human or json; predict also jsonl and csv
    #[arg(long, global = true, value_enum, default_value_t, hide_possible_values = true)]
    format: Format,
    /// Print results and errors only
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Print more; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// No progress bars
    #[arg(long, global = true)]
    no_progress: bool,
    /// Threads to compute with [default: all that this process may use]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// Fetch nothing from the Hugging Face hub: only its cache is used (also HF_HUB_OFFLINE=1)
    #[arg(long, global = true)]
    offline: bool,
    /// Where to compute: cpu, or auto for the best there is
    #[arg(long, global = true, default_value = "cpu")]
    device: String,
}

/// The program's command line with an environment variable for every flag that takes a value.
pub fn command() -> clap::Command {
    with_environment(Cli::command())
}

fn with_environment(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|arg| match arg.get_long() {
        Some(long) if arg.get_action().takes_values() && arg.get_env().is_none() && long != "set" => {
            let name = format!("QUETSCH_{}", long.to_uppercase().replace('-', "_"));
            arg.env(name).hide_env(true)
        }
        _ => arg,
    });
    command.mut_subcommands(with_environment)
}

/// Reads the command line; clap itself ends the program on `--help` and on usage errors.
pub fn parse() -> Result<(Cli, Ui, logs::Guard)> {
    let matches = command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let g = &cli.global;
    match g.device.as_str() {
        "cpu" | "auto" => {}
        cuda if cuda == "cuda" || cuda.starts_with("cuda:") => {
            return Err(usage(
                "this build of quetsch computes on the CPU only; leave out --device or use --device cpu",
            ));
        }
        other => return Err(usage(format!("--device {other}: expected cpu or auto"))),
    }
    if g.threads == Some(0) {
        return Err(usage("--threads 0: must be at least 1"));
    }
    let mut ui = Ui::new(g.format, g.quiet, g.no_progress, g.threads);
    ui.verbose = g.verbose > 0;
    ui.offline = g.offline;
    let guard = logs::start(g.quiet, g.verbose, &cli.command.logs())?;
    if matches!(g.format, Format::Jsonl | Format::Csv) && !matches!(cli.command, Command::Predict(_)) {
        return Err(usage("--format jsonl and csv are for predict only; use human or json"));
    }
    Ok((cli, ui, guard))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_sound() {
        super::command().debug_assert();
    }
}
