//! The settings of every stage, once: each struct is both a recipe section (serde) and a group of flags (clap), so
//! `quetsch distill --alpha 0.3` and `[stage.distill] alpha = 0.3` are the same thing with the same default and the
//! same check. Key `max-length` is flag `--max-length`.

mod card;
mod prune;
mod quantize;
mod search;
mod training;

pub use card::Card;
pub use prune::{Prune, Scope, Score, SparsitySchedule, Tune, Vocab};
pub use quantize::{ComputeIn, Quantize};
pub use search::{Search, Space};
pub use training::{ClassWeights, Kd, KeepEpoch, Measure, Precision, Qkv, Schedule, Training};

use crate::work::report::Lang;
use clap::{Args, ValueEnum};
use quetsch::task::Problem;
use serde::{Deserialize, Serialize};

/// How serious a finding about a setting is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Cannot work.
    Error,
    /// Works, but outside the range that is known to work well.
    Warning,
}

/// Something to say about the value of one key.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// The key, as in the recipe.
    pub key: &'static str,
    /// What is wrong with its value.
    pub message: String,
    /// Whether it stops the run.
    pub level: Level,
}

/// Collects findings.
#[derive(Default)]
struct Check(Vec<Finding>);

impl Check {
    fn error(&mut self, ok: bool, key: &'static str, message: impl FnOnce() -> String) {
        if !ok {
            self.0.push(Finding { key, message: message(), level: Level::Error });
        }
    }

    fn warn(&mut self, ok: bool, key: &'static str, message: impl FnOnce() -> String) {
        if !ok {
            self.0.push(Finding { key, message: message(), level: Level::Warning });
        }
    }

    /// NaN is in no range.
    fn range(&mut self, key: &'static str, value: f64, low: f64, high: f64) {
        self.error((low..=high).contains(&value), key, || format!("is {value}, must lie in [{low}, {high}]"));
    }
}

/// What can be a recipe section.
pub trait Settings: Args + Serialize + for<'de> Deserialize<'de> + Default {
    /// Everything there is to say about the values.
    fn check(&self) -> Vec<Finding> {
        vec![]
    }

    /// The recipe keys of this section: the long names of its flags.
    fn keys() -> Vec<String> {
        let command = Self::augment_args(clap::Command::new(""));
        command.get_arguments().filter_map(|a| a.get_long().map(str::to_string)).collect()
    }
}

/// Where texts and labels come from: `[data]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Data {
    /// Training data with a text and a label column: .csv, .tsv, .jsonl or .parquet, or hf:ORG/NAME[@REVISION][:SPLIT] on
    /// the hub
    #[arg(long, value_name = "FILE")]
    pub train: Option<String>,
    /// Test data, only ever measured on
    #[arg(long, value_name = "FILE")]
    pub test: Option<String>,
    /// Share of the training data set aside for choosing settings; 0 trains on everything
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub validation: f64,
    /// Name of the text column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    pub text_col: Option<String>,
    /// Name of the label column, or of several with a number each (valence,arousal); found by its usual names if not
    /// given
    #[arg(long, value_name = "NAME")]
    pub label_col: Option<String>,
    /// Several labels in one field are separated by this, such as | [default: | where the task is multi-label]
    #[arg(long, value_name = "TEXT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_separator: Option<String>,
    /// What the labels mean, if not what they look like or what the model has
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
}

/// What labels mean. Whether they are of texts or of words is told by the data: lists of words have lists of labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// One of the labels is right.
    SingleLabel,
    /// Each label is right or not.
    MultiLabel,
    /// Labels are numbers.
    Regression,
}

impl Task {
    /// As the library has it.
    pub fn problem(self) -> Problem {
        match self {
            Task::SingleLabel => Problem::SingleLabel,
            Task::MultiLabel => Problem::MultiLabel,
            Task::Regression => Problem::Regression,
        }
    }
}

impl Settings for Data {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        c.error((0.0..=0.5).contains(&self.validation), "validation", || {
            format!("is {}, must lie in [0, 0.5]", self.validation)
        });
        let separator = self.label_separator.as_deref();
        c.error(separator != Some(""), "label-separator", || "is empty".into());
        let alone = separator.is_none() || matches!(self.task, None | Some(Task::MultiLabel));
        c.error(alone, "label-separator", || "separates several labels: the task is multi-label".into());
        c.0
    }
}

/// The classification head put on a body that has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Head {
    /// Mean of all tokens, then two linear layers (`StudentHFModel`).
    #[default]
    Mean,
    /// The family's own (stock BERT: first token, pooler, classifier).
    Pooler,
}

/// `[stage.train]`: fine-tune an encoder on labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Train {
    /// Model to start from: a directory, or ORG/NAME[@REVISION] on the hub; a recipe may name an earlier stage
    #[arg(long, alias = "model-id", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Head to add when the model has none and labels are of texts; those of words need no choice
    #[arg(long, value_enum, default_value_t = Head::Mean)]
    pub head: Head,
    /// Also train so many models, each without its part of the data, and keep their logits on that part: targets for a
    /// student (`out-of-fold`)
    #[arg(long, default_value_t = 0)]
    pub folds: usize,
    /// The training loop.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

impl Settings for Train {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        c.error(self.training.epochs > 0, "epochs", || "is 0, must be at least 1".into());
        c.error(self.folds != 1, "folds", || "is 1, must be 0 (none) or at least 2".into());
        self.training.check_into(&mut c);
        c.0
    }
}

/// `[stage.distill]`: a student made of the teacher's own layers learns from the teacher's logits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Distill {
    /// Teacher: a directory, or ORG/NAME[@REVISION] on the hub; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Student to start from, if not layers of the teacher; a recipe may name an earlier stage
    #[arg(long, alias = "model-id", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Teacher layers that the student starts from, counted from 0; none given keeps all
    #[arg(long, value_delimiter = ',', value_name = "LAYER")]
    pub layers: Vec<usize>,
    /// More teachers with the same labels: the target is the mean of all teachers' logits
    #[arg(long, value_delimiter = ',', value_name = "DIR")]
    pub teachers: Vec<String>,
    /// Their weights in the mean, the first one that of the teacher [default: all alike]
    #[arg(long, value_delimiter = ',', value_name = "WEIGHT")]
    pub teacher_weights: Vec<f64>,
    /// Take the teacher's logits on training sentences from models that did not see them (its training had `folds`)
    #[arg(long)]
    pub out_of_fold: bool,
    /// Texts without labels, learned from the teacher alone: .txt, or a text column
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unlabelled: Option<String>,
    /// Start from random weights, with as many layers as `layers` lists
    #[arg(long)]
    pub random: bool,
    /// Random student: width of the hidden states [default: the teacher's]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub student_hidden: Option<usize>,
    /// Random student: attention heads per layer [default: the teacher's]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub student_heads: Option<usize>,
    /// Random student: width of the feed-forward networks [default: the teacher's widest]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub student_ffn: Option<usize>,
    /// The loss.
    #[command(flatten)]
    #[serde(flatten)]
    pub kd: Kd,
    /// The training loop.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

/// The roles of the teachers besides the first.
pub const MORE_TEACHERS: [&str; 7] =
    ["teacher-2", "teacher-3", "teacher-4", "teacher-5", "teacher-6", "teacher-7", "teacher-8"];

impl Settings for Distill {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        let most = MORE_TEACHERS.len();
        c.error(self.teachers.len() <= most, "teachers", || {
            format!("lists {} teachers, at most {most} besides the first", self.teachers.len())
        });
        c.error(self.training.epochs > 0, "epochs", || "is 0, must be at least 1".into());
        let (weights, all) = (&self.teacher_weights, 1 + self.teachers.len());
        c.error(weights.is_empty() || weights.len() == all, "teacher-weights", || {
            format!("has {} weights for {all} teachers", weights.len())
        });
        c.error(weights.iter().all(|w| w.is_finite() && *w > 0.0), "teacher-weights", || {
            format!("is {weights:?}, each must be above 0")
        });
        c.error(!self.random || self.model.is_none(), "random", || {
            "starts a student from nothing, but `model` gives one: leave out one of them".into()
        });
        let shapes = [
            ("student-hidden", self.student_hidden),
            ("student-heads", self.student_heads),
            ("student-ffn", self.student_ffn),
        ];
        for (key, n) in shapes {
            c.error(n.is_none() || self.random, key, || "is the shape of a random student: set `random`".into());
        }
        c.error(self.layers.windows(2).all(|w| w[0] < w[1]), "layers", || {
            format!("is {:?}, must rise from each layer to the next", self.layers)
        });
        self.kd.check_into(&mut c);
        self.training.check_into(&mut c);
        c.0
    }
}

/// `[stage.eval]`: measure one model on the test data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Eval {
    /// Model directory; a recipe may name an earlier stage
    #[arg(long, alias = "model-id", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

impl Settings for Eval {}

/// `[stage.compare]`: all variants side by side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Compare {
    /// In a recipe: the stages to compare [default: all before this one]
    #[arg(long, hide = true, value_delimiter = ',')]
    pub models: Vec<String>,
    /// Leave out the TF-IDF baseline
    #[arg(long)]
    pub no_baseline: bool,
    /// Leave out latency, throughput and memory
    #[arg(long)]
    pub no_speed: bool,
    /// Compare every model with the first one, not with the one it was made from
    #[arg(long)]
    pub against_first: bool,
    /// Language of the reports for people
    #[arg(long, value_enum, default_value_t = Lang::En)]
    pub lang: Lang,
}

impl Settings for Compare {}

#[cfg(test)]
mod tests;
