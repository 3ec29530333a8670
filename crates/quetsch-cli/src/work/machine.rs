//! The machine that measured, and the command that measures again.

use crate::ui::mb;
use procfs::{CpuInfo, Current, Meminfo};
use schemars::JsonSchema;
use serde::Serialize;

/// What a reader of timings must know.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Machine {
    /// Model of the CPU.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Instruction set that the kernels use.
    pub instruction_set: &'static str,
    /// Memory of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<f64>,
    /// Operating system and architecture.
    pub system: String,
}

/// This machine; what it does not say is left out.
pub fn this() -> Machine {
    let cpu = CpuInfo::current().ok().and_then(|c| c.model_name(0).map(str::to_string));
    Machine {
        cpu: cpu.unwrap_or_else(|| "unknown CPU".into()),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        instruction_set: quetsch::runtime::isa().name(),
        memory_mb: Meminfo::current().ok().map(|m| mb(m.mem_total).round()),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    }
}

/// The command line of this process, quoted for a shell; the program by its name.
pub fn command_line() -> String {
    quoted(std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()))
}

/// A command of this program, quoted for a shell.
pub fn quoted(words: impl IntoIterator<Item = String>) -> String {
    words.into_iter().fold("quetsch".into(), |line, word| line + " " + &quote(&word))
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,+%@".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn words_survive_a_shell() {
        for (word, want) in
            [("a/b.csv", "a/b.csv"), ("a b", "'a b'"), ("it's", "'it'\\''s'"), ("", "''"), ("a>=1", "'a>=1'")]
        {
            assert_eq!(super::quote(word), want);
        }
    }
}
