//! Kernel tests on CPUs that this machine is not, by qemu's user emulation (Debian: qemu-user, gcc-aarch64-linux-gnu).

use anyhow::{Context, Result};
use std::process::Command;

/// Target, qemu's name of the CPU, and which tier that is.
const CPUS: [(&str, &str, &str); 3] = [
    ("x86_64-unknown-linux-gnu", HASWELL, "AVX2 and FMA, no AVX-512"),
    ("x86_64-unknown-linux-gnu", "qemu-x86_64 -cpu Nehalem", "SSE4.2, no AVX"),
    ("aarch64-unknown-linux-gnu", "qemu-aarch64 -L /usr/aarch64-linux-gnu", "NEON"),
];

/// Without what qemu cannot do and would tell once a thread; none of it is a kernel's.
const HASWELL: &str = "qemu-x86_64 -cpu Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm";

/// Runs them all.
pub fn run() -> Result<()> {
    for (target, emulator, what) in CPUS {
        eprintln!("== {emulator}: {what}");
        let key = target.to_uppercase().replace('-', "_");
        let mut test = crate::cargo(["test", "--package", "quetsch-kernels"]);
        test.env(format!("CARGO_TARGET_{key}_RUNNER"), emulator);
        if !target.starts_with(std::env::consts::ARCH) {
            let linker = format!("{}-linux-gnu-gcc", target.split('-').next().unwrap_or_default());
            test.args(["--target", target]).env(format!("CARGO_TARGET_{key}_LINKER"), linker);
        }
        emulated(&mut test)
            .with_context(|| format!("{emulator}: is it installed, and `rustup target add {target}`?"))?;
    }
    Ok(())
}

/// An emulator is some 20 times slower: property tests try fewer cases.
fn emulated(test: &mut Command) -> Result<()> {
    crate::run(test.env("PROPTEST_CASES", "8").env_remove("QUETSCH_ISA"))
}
