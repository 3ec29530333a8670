//! Talking to people: results on stdout, everything else on stderr, bars only on a terminal.

use crate::args::Format;
use crate::exit;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Prints an error and turns it into the exit code.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    let code = exit::code(error);
    anstream::eprintln!("{}", exit::describe(error));
    ExitCode::from(code)
}

/// How this process talks.
#[derive(Clone, Debug)]
pub struct Ui {
    /// How results are printed.
    pub format: Format,
    /// Results and errors only.
    quiet: bool,
    /// `inspect` shows all there is.
    pub verbose: bool,
    /// Nothing is fetched from the hub.
    pub offline: bool,
    bars: bool,
    threads: Option<usize>,
}

impl Ui {
    /// From the global flags.
    pub fn new(format: Format, quiet: bool, no_progress: bool, threads: Option<usize>) -> Ui {
        let bars = !quiet && !no_progress && std::io::stderr().is_terminal();
        Ui { format, quiet, verbose: false, offline: false, bars, threads }
    }

    /// Threads to compute with: the flag, else the recipe's number, else all that this process may use.
    pub fn threads(&self, recipe: Option<usize>) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.or(recipe).unwrap_or_else(all).max(1)
    }

    /// Whether results are printed for people.
    pub fn human(&self) -> bool {
        self.format == Format::Human
    }

    /// A line about what is going on.
    pub fn note(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            anstream::eprintln!("{text}");
        }
    }

    /// Something the user should know, although it works.
    pub fn warn(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            anstream::eprintln!("warning: {text}");
        }
    }

    /// A result: text for people, or the same as JSON.
    pub fn result(&self, human: impl std::fmt::Display, json: &impl Serialize) -> anyhow::Result<()> {
        match self.human() {
            true => out(&format!("{human}\n")),
            false => out(&format!("{}\n", serde_json::to_string_pretty(json)?)),
        }
    }

    /// A result for people only; the JSON document comes at the end.
    pub fn say(&self, text: impl std::fmt::Display) -> anyhow::Result<()> {
        match self.human() {
            true => out(&format!("{text}\n")),
            false => Ok(()),
        }
    }

    /// A bar over `total` steps: drawn on a terminal, else a line now and then.
    pub fn bar(&self, total: u64, what: impl Into<String>) -> Bar {
        let what = what.into();
        let bar = match self.bars {
            true => ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr()),
            false => ProgressBar::hidden(),
        };
        let style = ProgressStyle::with_template("{prefix:<12} {bar:24} {pos}/{len}  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(what.clone());
        Bar { bar, what, total, lines: !self.bars && !self.quiet, last_line: Instant::now() }
    }
}

/// Writes to stdout; a reader that has gone away (`| head`) ends the program quietly.
pub fn out(text: &str) -> anyhow::Result<()> {
    let mut stdout = anstream::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => Ok(result?),
    }
}

/// Progress of something with a known end.
pub struct Bar {
    bar: ProgressBar,
    what: String,
    total: u64,
    lines: bool,
    last_line: Instant,
}

/// Without a terminal, progress is a line this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Bar {
    /// `position` of the total is done.
    pub fn at(&mut self, position: u64, message: impl FnOnce() -> String) {
        if self.lines {
            if self.last_line.elapsed() >= LINE_EVERY {
                self.last_line = Instant::now();
                anstream::eprintln!("{} {position}/{}  {}", self.what, self.total, message());
            }
        } else if !self.bar.is_hidden() {
            self.bar.set_message(message());
            self.bar.set_position(position);
        }
    }

    /// There is more to do than was thought.
    pub fn extend(&mut self, total: u64) {
        self.total = self.total.max(total);
        self.bar.set_length(self.total);
    }

    /// A line that stays.
    pub fn line(&mut self, text: impl std::fmt::Display) {
        self.last_line = Instant::now();
        if self.lines {
            anstream::eprintln!("{text}");
        } else if !self.bar.is_hidden() {
            // `suspend` holds the bar's lock: nothing of the bar may be asked inside.
            self.bar.suspend(|| anstream::eprintln!("{text}"));
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets the first Ctrl-C end the work in good order; the second one ends the program at once.
pub fn catch_interrupts() -> anyhow::Result<()> {
    Ok(ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        anstream::eprintln!("interrupted: finishing the step and saving; once more ends at once");
    })?)
}

/// Ends the work in good order, as Ctrl-C does, when standard input closes.
pub fn end_with_stdin() {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink()); // an error is an end, too
        INTERRUPTED.store(true, Ordering::SeqCst);
    });
}

/// Whether Ctrl-C was pressed.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// `12 s`, `3 min 05 s`, `1 h 02 min`.
pub fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

/// 0.9318 as `93.18%`.
pub fn percent(share: f64) -> String {
    format!("{:.2}%", 100.0 * share)
}

/// Bytes in MB of 1,000,000.
pub fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
