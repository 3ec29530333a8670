//! The `quetsch` program; all of it is in the library.

fn main() -> std::process::ExitCode {
    quetsch_cli::main()
}
