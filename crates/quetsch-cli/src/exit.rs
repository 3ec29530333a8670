//! How the program ends. 0 ok, 1 failure, 2 usage, 3 a quality gate is not met, 4 two things that must agree do not,
//! 130 interrupted.

use std::fmt;

/// An error with an exit code of its own; every other error is a failure (1).
#[derive(Debug)]
pub struct Exit {
    /// The exit code.
    pub code: u8,
    /// What to print after `error: `.
    pub message: String,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}

fn exit(code: u8, message: impl Into<String>) -> anyhow::Error {
    Exit { code, message: message.into() }.into()
}

/// The command or the recipe asks for something that cannot be.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    exit(2, message)
}

/// A quality gate is not met.
pub fn gate(message: impl Into<String>) -> anyhow::Error {
    exit(3, message)
}

/// Interrupted from the keyboard; the message says how to go on.
pub fn interrupted(message: impl Into<String>) -> anyhow::Error {
    exit(130, message)
}

/// The exit code of an error.
pub fn code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<Exit>().map_or(1, |e| e.code)
}

/// `error: ...` and its causes, one a line.
pub fn describe(error: &anyhow::Error) -> String {
    let mut lines = vec![format!("error: {error}")];
    let mut last = error.to_string();
    for cause in error.chain().skip(1).map(|c| c.to_string()) {
        // thiserror's messages often repeat their source.
        if !last.contains(&cause) {
            lines.push(format!("  because: {cause}"));
        }
        last = cause;
    }
    lines.join("\n")
}
