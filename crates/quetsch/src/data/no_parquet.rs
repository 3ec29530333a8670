//! In place of `parquet` in a library without the feature: the error that says so.

use super::table::Table;
use crate::{Error, Result};
use std::path::Path;

/// Never made.
pub(super) enum Rows {}

impl Rows {
    pub(super) fn open(path: &Path) -> Result<Rows> {
        Err(Error::file(
            path,
            "this build of the library reads no Parquet (cargo feature `parquet`); save it as .csv",
        ))
    }

    pub(super) fn next(&mut self) -> Result<Option<Table>> {
        match *self {}
    }
}
