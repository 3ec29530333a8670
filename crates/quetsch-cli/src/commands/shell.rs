//! `quetsch completions SHELL` and `quetsch man`.

use crate::{args, ui};
use anyhow::Result;
use clap::Args;

/// Flags of `completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

/// Prints a completion script.
pub fn completions(c: Completions) -> Result<()> {
    let mut script = vec![];
    clap_complete::generate(c.shell, &mut args::command(), "quetsch", &mut script);
    ui::out(&String::from_utf8_lossy(&script))
}

/// Prints the manual page.
pub fn man() -> Result<()> {
    let mut page = vec![];
    clap_mangen::Man::new(args::command()).render(&mut page)?;
    ui::out(&String::from_utf8_lossy(&page))
}
