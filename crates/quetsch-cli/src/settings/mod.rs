//! The settings of every stage, once: each struct is both a recipe section (serde) and a group of flags (clap), so
//! `quetsch distill --alpha 0.3` and `[stage.distill] alpha = 0.3` are the same thing with the same default and the
//! same check. Key `max-length` is flag `--max-length`.

mod search;
mod training;

pub use search::{Search, Space};
pub use training::{ClassWeights, Kd, KeepEpoch, Measure, Precision, Qkv, Schedule, Training};

use crate::values::{Amount, SiteRule};
use crate::work::report::Lang;
use clap::{Args, ValueEnum};
use quetsch::quant::Scheme;
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
    /// Training data: .csv, .tsv or .jsonl with a text and a label column
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
    /// Name of the label column; found by its usual names if not given
    #[arg(long, value_name = "NAME")]
    pub label_col: Option<String>,
}

impl Settings for Data {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        c.error((0.0..=0.5).contains(&self.validation), "validation", || {
            format!("is {}, must lie in [0, 0.5]", self.validation)
        });
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
    /// Model directory to start from; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Head to add when the model has none
    #[arg(long, value_enum, default_value_t = Head::Mean)]
    pub head: Head,
    /// The training loop.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

impl Settings for Train {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        c.error(self.training.epochs > 0, "epochs", || "is 0, must be at least 1".into());
        self.training.check_into(&mut c);
        c.0
    }
}

/// `[stage.distill]`: a student made of the teacher's own layers learns from the teacher's logits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Distill {
    /// Teacher's directory; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Student to start from, if not layers of the teacher; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Teacher layers that the student starts from, counted from 0; none given keeps all
    #[arg(long, value_delimiter = ',', value_name = "LAYER")]
    pub layers: Vec<usize>,
    /// The loss.
    #[command(flatten)]
    #[serde(flatten)]
    pub kd: Kd,
    /// The training loop.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

impl Settings for Distill {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        c.error(self.layers.windows(2).all(|w| w[0] < w[1]), "layers", || {
            format!("is {:?}, must rise from each layer to the next", self.layers)
        });
        self.kd.check_into(&mut c);
        self.training.check_into(&mut c);
        c.0
    }
}

/// What says how much a head, channel or layer matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Sum of |loss gradient of its mask| over training batches (Michel et al. 2019).
    #[default]
    Gradient,
    /// Sum of absolute weights.
    L1,
    /// Root of the sum of squared weights.
    L2,
}

/// Which entries of the vocabulary stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Vocab {
    /// All.
    #[default]
    All,
    /// Those that the training texts use, special tokens and single characters.
    Train,
}

/// `[stage.prune]`: cut heads, feed-forward channels or layers, then recover with the teacher's help.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Prune {
    /// Model to prune; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Teacher for the recovery, default: the model before it was pruned; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Attention heads to cut: a share (0.3), a number (12) or a list of layer:head (0:1,0:7,2:3)
    #[arg(long, default_value_t = Amount::default())]
    pub heads: Amount,
    /// Feed-forward channels to cut in every layer: a share (0.25) or a number (256)
    #[arg(long, default_value_t = Amount::default())]
    pub ffn: Amount,
    /// Layers to cut: a number (1), a share (0.5) or a list of layers (3,5)
    #[arg(long, default_value_t = Amount::default())]
    pub layers: Amount,
    /// Vocabulary to keep: all, or what the training texts use besides special tokens and single characters (train)
    #[arg(long, value_enum, default_value_t = Vocab::All)]
    pub vocab: Vocab,
    /// What says how much a head or a channel matters
    #[arg(long, value_enum, default_value_t = Score::Gradient)]
    pub score: Score,
    /// Training batches that the gradient score looks at
    #[arg(long, default_value_t = Prune::default().score_batches)]
    pub score_batches: usize,
    /// Largest share of its heads that one layer may lose
    #[arg(long, default_value_t = Prune::default().max_per_layer)]
    pub max_per_layer: f64,
    /// The recovery's loss.
    #[command(flatten)]
    #[serde(flatten)]
    pub kd: Kd,
    /// The recovery's training loop; `epochs = 0` is no recovery.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

impl Default for Prune {
    fn default() -> Self {
        Prune {
            model: None,
            teacher: None,
            heads: Amount::default(),
            ffn: Amount::default(),
            layers: Amount::default(),
            vocab: Vocab::All,
            score: Score::Gradient,
            score_batches: 40,
            max_per_layer: 0.5,
            kd: Kd::default(),
            training: Training::default(),
        }
    }
}

impl Settings for Prune {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        let amounts = [("heads", &self.heads), ("ffn", &self.ffn), ("layers", &self.layers)];
        for (key, amount) in amounts {
            if let Amount::Share(share) = amount {
                c.range(key, *share, 0.0, 1.0);
            }
        }
        let anything = amounts.iter().any(|(_, a)| !a.is_none()) || self.vocab != Vocab::All;
        c.error(anything, "heads", || {
            "nothing to prune: say how many `heads`, `ffn` channels or `layers` to cut, or set `vocab`".into()
        });
        c.error(!matches!(self.ffn, Amount::List(_)), "ffn", || {
            "is a list, must be a share (0.25) or a number (256)".into()
        });
        c.range("max-per-layer", self.max_per_layer, 0.0, 1.0);
        c.error(self.score_batches > 0, "score-batches", || "is 0, must be at least 1".into());
        self.kd.check_into(&mut c);
        self.training.check_into(&mut c);
        c.0
    }
}

/// What 4-bit linears multiply in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ComputeType {
    /// bfloat16 inputs and weights, f32 sums: as bitsandbytes with `bnb_4bit_compute_dtype=bfloat16`.
    #[default]
    Bf16,
    /// f32 throughout.
    F32,
}

/// `[stage.quantize]`: store linears in fewer bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Quantize {
    /// Model to quantise; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Scheme: f32, f16, bf16, int8, int8-weight, bnb-int8, nf4 or fp4
    #[arg(long, value_name = "SCHEME", default_value_t = Quantize::default().quant)]
    pub quant: String,
    /// Sites left in float, besides the last linear of the model; `none` quantises that one too
    #[arg(long, value_delimiter = ',', value_name = "SITE")]
    pub keep: Vec<String>,
    /// Another scheme for some sites, later rules win: SITE=SCHEME, such as embeddings.*=int8
    #[arg(long, value_delimiter = ',', value_name = "SITE=SCHEME")]
    pub site: Vec<SiteRule>,
    /// 4-bit: store block scales as f32 instead of quantising them too
    #[arg(long)]
    pub no_double_quant: bool,
    /// 4-bit: what to multiply in
    #[arg(long, value_enum, default_value_t = ComputeType::Bf16)]
    pub compute: ComputeType,
}

impl Default for Quantize {
    fn default() -> Self {
        Quantize {
            model: None,
            quant: "int8".into(),
            keep: vec![],
            site: vec![],
            no_double_quant: false,
            compute: ComputeType::Bf16,
        }
    }
}

impl Settings for Quantize {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        let mut scheme = |key, name: &str| {
            if let Err(e) = name.parse::<Scheme>() {
                c.error(false, key, || format!("is {name}: {e}"));
            }
        };
        scheme("quant", &self.quant);
        self.site.iter().for_each(|rule| scheme("site", &rule.scheme));
        c.0
    }
}

/// `[stage.eval]`: measure one model on the test data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Eval {
    /// Model directory; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
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
