//! wip
use crate::ui::Ui;
use anyhow::Result;
/// x
#[derive(Debug, clap::Args)]
pub struct Predict {}
/// x
pub fn run(_: Predict, _: &Ui) -> Result<()> {
    Ok(())
}
