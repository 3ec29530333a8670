//! The real binary in a temporary folder, with a tiny model and a little data.
#![allow(dead_code)] // every test file uses its own part
#![allow(missing_docs)]

use assert_cmd::Command;
use std::path::{Path, PathBuf};

pub mod hub;

/// A folder of its own with `model/` (5 labels, 3 layers), `train.csv` and `test.csv`.
pub struct Place {
    dir: tempfile::TempDir,
}

/// What a command left behind.
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

const LABELS: [(&str, &str); 5] = [
    ("lost_card", "i lost my card"),
    ("double_charge", "charged two times"),
    ("change_pin", "set a new pin"),
    ("top_up", "add money to my account"),
    ("abroad", "fees in another country"),
];

impl Place {
    pub fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().expect("a temporary folder") };
        place.copy_model("model");
        for (file, words) in [("train.csv", &["please", "hello", "now", "today"][..]), ("test.csv", &["again"])] {
            let mut rows = String::from("text,label\n");
            for (label, text) in LABELS {
                words.iter().for_each(|w| rows += &format!("{text} {w},{label}\n"));
            }
            place.write(file, rows.as_bytes());
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> &Place {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
        self
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// A copy of the tiny student.
    pub fn copy_model(&self, name: &str) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny_student");
        for entry in std::fs::read_dir(from).expect("the fixture").flatten() {
            let bytes = std::fs::read(entry.path()).expect("a file of the fixture");
            self.write(&format!("{name}/{}", entry.file_name().to_string_lossy()), &bytes);
        }
    }

    pub fn command(&self) -> Command {
        let mut command = Command::cargo_bin("quetsch").expect("the binary");
        command.current_dir(self.dir.path()).env_remove("RUST_LOG");
        // A path that is not there must not become a question to the real hub.
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.path("hf"));
        command
    }

    /// Runs `quetsch` with words separated by blanks; the folder is the current one.
    pub fn run(&self, line: &str) -> Done {
        self.run_args(&line.split_whitespace().collect::<Vec<_>>())
    }

    pub fn run_args(&self, args: &[&str]) -> Done {
        let out = self.command().args(args).output().expect("the program runs");
        Done {
            code: out.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        }
    }

    /// Runs and expects success.
    pub fn ok(&self, line: &str) -> Done {
        let done = self.run(line);
        assert_eq!(done.code, 0, "quetsch {line}\n{}\n{}", done.stdout, done.stderr);
        done
    }
}
