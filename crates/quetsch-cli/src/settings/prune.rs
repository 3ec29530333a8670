//! The settings of pruning.

use super::{Check, Finding, Kd, Settings, Training};
use crate::values::Amount;
use clap::{Args, ValueEnum};
use quetsch::quant::Scheme;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What says how much a head, channel or layer matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Sum of |loss gradient of its mask| over training batches (Michel et al. 2019).
    #[default]
    Gradient,
    /// Mean of that over single sentences (Molchanov et al. 2017).
    Taylor,
    /// Mean of its square over single sentences (Kwon et al. 2022).
    Fisher,
    /// Length of what it adds to the hidden states, on training sentences.
    Activation,
    /// Mean of the absolute weights (Li et al. 2017).
    L1,
    /// Root of the mean of the squared weights.
    L2,
}

/// What a group competes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// The groups of all layers.
    #[default]
    Global,
    /// Those of its layer.
    PerLayer,
}

/// When single weights become zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SparsitySchedule {
    /// At once, before the recovery.
    #[default]
    OneShot,
    /// During the recovery, along a cubic curve (Zhu & Gupta 2017).
    Cubic,
}

/// What is fitted by least squares after a cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Tune {
    /// Nothing.
    #[default]
    None,
    /// A factor for every head and channel that stays (Kwon et al. 2022).
    Mask,
    /// The output matrices of attention and feed-forward network.
    Weights,
}

/// Which entries of the vocabulary stay: `all`, `train` or `train+10000`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Vocab {
    /// All.
    #[default]
    All,
    /// Those that the training texts use, special tokens and single characters.
    Train {
        /// And so many from the vocabulary's beginning.
        first: usize,
    },
}

impl FromStr for Vocab {
    type Err = String;

    fn from_str(text: &str) -> Result<Vocab, String> {
        let first = match text {
            "all" => return Ok(Vocab::All),
            "train" => Some(0),
            more => more.strip_prefix("train+").and_then(|n| n.parse().ok()).filter(|n| *n > 0),
        };
        let expected = || format!("is `{text}`, expected all, train or train+N (`train+10000`)");
        first.map(|first| Vocab::Train { first }).ok_or_else(expected)
    }
}

impl TryFrom<String> for Vocab {
    type Error = String;

    fn try_from(text: String) -> Result<Vocab, String> {
        text.parse()
    }
}

impl fmt::Display for Vocab {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Vocab::All => f.write_str("all"),
            Vocab::Train { first: 0 } => f.write_str("train"),
            Vocab::Train { first } => write!(f, "train+{first}"),
        }
    }
}

impl From<Vocab> for String {
    fn from(vocab: Vocab) -> String {
        vocab.to_string()
    }
}

/// `[stage.prune]`: cut heads, feed-forward channels or layers, then recover with the teacher's help.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Prune {
    /// Model to prune; a recipe may name an earlier stage
    #[arg(long, alias = "model-id", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Teacher for the recovery, default: the model before it was pruned; a recipe may name an earlier stage
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Attention heads to cut: a share (0.3), a number (12) or a list of layer:head (0:1,0:7,2:3)
    #[arg(long, default_value_t = Amount::default())]
    pub heads: Amount,
    /// Feed-forward channels to cut, in every layer if their scope is per-layer: a share (0.25) or a number (256)
    #[arg(long, default_value_t = Amount::default())]
    pub ffn: Amount,
    /// Layers to cut: a number (2: any two), a share (0.5) or a list of layers (3,5; layer 3 alone: 3,)
    #[arg(long, default_value_t = Amount::default())]
    pub layers: Amount,
    /// Vocabulary to keep: all; what the training texts use besides special tokens and single characters (train); and the
    /// first so many entries (train+10000)
    #[arg(long, value_name = "WHICH", default_value_t = Vocab::All)]
    pub vocab: Vocab,
    /// What says how much a head or a channel matters
    #[arg(long, value_enum, default_value_t = Score::Gradient)]
    pub score: Score,
    /// Training batches that scores and least squares look at
    #[arg(long, default_value_t = Prune::default().score_batches)]
    pub score_batches: usize,
    /// Largest share of its heads that one layer may lose [default: 0.5; 1 with keep-macs, keep-parameters or keep-latency]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_per_layer: Option<f64>,
    /// Share of the multiply-accumulates of all heads and channels that stays, chosen over both kinds together
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_macs: Option<f64>,
    /// The same for their parameters
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_parameters: Option<f64>,
    /// The same for the time of a sentence on this machine, by a table of what layers of every size take
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_latency: Option<f64>,
    /// A latency.json of an earlier run to go by instead of measuring
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_table: Option<String>,
    /// Tokens of the sentence that is timed [default: the mean of the training sentences]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_tokens: Option<usize>,
    /// What the layers are stored as when they are timed: what the model will be quantised to
    #[arg(long, value_name = "SCHEME", default_value_t = Prune::default().latency_scheme)]
    pub latency_scheme: String,
    /// What a head competes with
    #[arg(long, value_enum, default_value_t = Scope::Global)]
    pub heads_scope: Scope,
    /// What a channel competes with
    #[arg(long, value_enum, default_value_t = Scope::PerLayer)]
    pub ffn_scope: Scope,
    /// Feed-forward widths stay multiples of this; 32 keeps kernels at full speed
    #[arg(long, default_value_t = Prune::default().align)]
    pub align: usize,
    /// Choose again within each layer, looking at what goes together (needs the fisher score)
    #[arg(long)]
    pub rearrange: bool,
    /// What is fitted to the model before the cut by least squares on training sentences
    #[arg(long, value_enum, default_value_t = Tune::None)]
    pub tune: Tune,
    /// Share of the single weights of all layers that become zero, the smallest; no shape changes, nothing runs faster
    #[arg(long, value_name = "SHARE", default_value_t = Prune::default().sparsity)]
    pub sparsity: f64,
    /// What a single weight competes with: all matrices, or its own (per-layer)
    #[arg(long, value_enum, default_value_t = Scope::PerLayer)]
    pub sparsity_scope: Scope,
    /// When single weights become zero
    #[arg(long, value_enum, default_value_t = SparsitySchedule::OneShot)]
    pub sparsity_schedule: SparsitySchedule,
    /// Cubic schedule: the share of the steps after which the zeros stay as they are
    #[arg(long, value_name = "SHARE", default_value_t = Prune::default().sparsity_until)]
    pub sparsity_until: f64,
    /// Gradual pruning: the cut is made in so many parts, each followed by its part of the epochs [default: 1]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cuts: Option<usize>,
    /// A plan.json to apply instead of making a plan
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
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
            max_per_layer: None,
            keep_macs: None,
            keep_parameters: None,
            keep_latency: None,
            latency_table: None,
            latency_tokens: None,
            latency_scheme: Scheme::F32.name().into(),
            heads_scope: Scope::Global,
            ffn_scope: Scope::PerLayer,
            align: 1,
            rearrange: false,
            tune: Tune::None,
            sparsity: 0.0,
            sparsity_scope: Scope::PerLayer,
            sparsity_schedule: SparsitySchedule::OneShot,
            sparsity_until: 0.7,
            cuts: None,
            plan: None,
            kd: Kd::default(),
            training: Training::default(),
        }
    }
}

impl Prune {
    /// The budgets over heads and channels together that are set.
    pub fn budgets(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let all = [
            ("keep-macs", self.keep_macs),
            ("keep-parameters", self.keep_parameters),
            ("keep-latency", self.keep_latency),
        ];
        all.into_iter().filter_map(|(key, share)| Some((key, share?)))
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
        let budget = self.budgets().next().is_some();
        let cuts = amounts.iter().any(|(_, a)| !a.is_none());
        let others = self.plan.is_some() || self.vocab != Vocab::All || self.sparsity != 0.0;
        c.error(cuts || budget || others, "heads", || {
            "nothing to prune: say how many `heads`, `ffn` channels or `layers` to cut, or set `keep-macs`, \
             `keep-parameters`, `keep-latency`, `plan`, `sparsity` or `vocab`"
                .into()
        });
        if let Some(n) = self.cuts {
            c.error(n > 0, "cuts", || "is 0, must be at least 1".into());
            c.error(n <= self.training.epochs.max(1), "cuts", || {
                format!("is {n}, but each is followed by an epoch or more: `epochs` is {}", self.training.epochs)
            });
            let lists = amounts.iter().any(|(_, a)| matches!(a, Amount::List(_)));
            c.error(n == 1 || !lists && self.plan.is_none() && (cuts || budget), "cuts", || {
                "parts a share, a number or a budget: set one, and no list and no `plan`".into()
            });
            c.error(n == 1 || self.latency_table.is_none(), "cuts", || {
                "times what is left after each cut, so no `latency-table` can be given".into()
            });
        }
        c.error(self.plan.is_none() || !(cuts || budget || self.rearrange), "plan", || {
            "says what to cut: leave out heads, ffn, layers, all budgets (keep-..) and rearrange".into()
        });
        for (key, share) in self.budgets() {
            c.error(share > 0.0 && share <= 1.0, key, || format!("is {share}, must lie in (0, 1]"));
            c.error(!cuts, key, || "chooses heads and channels itself: leave out heads, ffn and layers".into());
            c.error(matches!(self.score, Score::Taylor | Score::Fisher), key, || {
                "compares heads with channels, which needs scores of one unit: set `score` to fisher or taylor"
                    .into()
            });
        }
        if let (Some((one, _)), Some((other, _))) = (self.budgets().next(), self.budgets().nth(1)) {
            c.error(false, one, || format!("and {other} are two budgets: leave out one"));
        }
        let scheme = self.latency_scheme.parse::<Scheme>();
        let timed = [
            ("latency-table", self.latency_table.is_some()),
            ("latency-tokens", self.latency_tokens.is_some()),
            ("latency-scheme", self.latency_scheme != Scheme::F32.name()),
        ];
        for (key, set) in timed {
            c.error(!set || self.keep_latency.is_some(), key, || "is about `keep-latency`: set that".into());
            c.error(!set || key == "latency-table" || self.latency_table.is_none(), key, || {
                "says how to measure, but `latency-table` is a measurement: leave out one of them".into()
            });
        }
        c.error(scheme.is_ok(), "latency-scheme", || {
            format!("is {}, must be one of {}", self.latency_scheme, Scheme::NAMES.join(", "))
        });
        c.error(self.latency_tokens != Some(0), "latency-tokens", || "is 0, must be at least 1".into());
        c.error(!self.rearrange || self.score == Score::Fisher, "rearrange", || {
            "needs second order: set `score` to fisher".into()
        });
        let listed = matches!(self.heads, Amount::List(_));
        c.error(!self.rearrange || !listed, "rearrange", || {
            "chooses heads again within each layer, but `heads` lists them: leave out one of them".into()
        });
        c.error(self.tune == Tune::None || self.layers.is_none(), "tune", || {
            "fits every layer to what it was, so none may go: cut `layers` in a stage of its own".into()
        });
        c.range("sparsity", self.sparsity, 0.0, 1.0);
        let until = self.sparsity_until;
        c.error(until > 0.0 && until <= 1.0, "sparsity-until", || format!("is {until}, must lie in (0, 1]"));
        let cubic = self.sparsity_schedule == SparsitySchedule::Cubic;
        c.error(!cubic || self.sparsity > 0.0, "sparsity-schedule", || "is cubic, but `sparsity` is 0".into());
        c.error(!cubic || self.training.epochs > 0, "sparsity-schedule", || {
            "is cubic, which happens during the recovery: set `epochs` above 0".into()
        });
        c.error(self.align > 0, "align", || "is 0, must be at least 1".into());
        c.error(!matches!(self.ffn, Amount::List(_)), "ffn", || {
            "is a list, must be a share (0.25) or a number (256)".into()
        });
        c.range("max-per-layer", self.max_per_layer.unwrap_or(0.5), 0.0, 1.0);
        c.error(self.score_batches > 0, "score-batches", || "is 0, must be at least 1".into());
        self.kd.check_into(&mut c);
        self.training.check_into(&mut c);
        c.0
    }
}
