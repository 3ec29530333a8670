//! The whole path on real data.

use anyhow::{Result, bail};

/// Trains, distils, prunes and quantises with recipes/banking77.toml, then gates on accuracy.
pub fn run(_options: &[String]) -> Result<()> {
    bail!("WIP")
}
