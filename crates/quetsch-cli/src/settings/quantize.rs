//! The settings of quantisation, and of the training that makes up for it.

use super::{Check, Data, Finding, Kd, Precision, Settings, Training};
use crate::values::{Points, SiteRule};
use clap::{Args, ValueEnum};
use quetsch::checkpoint::FloatType;
use quetsch::quant::Scheme;
use quetsch::quant::calibrate::Observer;
use serde::{Deserialize, Serialize};

/// The loop's settings that quantisation-aware training has; the others are the defaults of [`Training`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Recovery {
    /// Passes over the training data with quantised weights and inputs; 0 quantises without training
    #[arg(long, default_value_t = Recovery::default().epochs)]
    pub epochs: usize,
    /// Sentences per forward and backward
    #[arg(long, default_value_t = Recovery::default().batch_size)]
    pub batch_size: usize,
    /// Highest learning rate of the body; the head's is 3 times that
    #[arg(long, default_value_t = Recovery::default().learning_rate)]
    pub learning_rate: f64,
    /// Decoupled weight decay; never on biases and LayerNorm
    #[arg(long, default_value_t = Recovery::default().weight_decay)]
    pub weight_decay: f64,
    /// Share of all steps during which the learning rate rises
    #[arg(long, default_value_t = Recovery::default().warmup)]
    pub warmup: f64,
    /// Dropout in the body; with 0 here and in the head, training computes what the quantised model will
    #[arg(long, default_value_t = Recovery::default().dropout)]
    pub dropout: f64,
    /// Dropout in the classification head
    #[arg(long, default_value_t = Recovery::default().head_dropout)]
    pub head_dropout: f64,
    /// What the backward's matrix products are computed in: bf16 where this CPU is faster at it (auto), f32 or bf16
    #[arg(long, value_enum, default_value_t = Recovery::default().precision)]
    pub precision: Precision,
    /// Leave tensors unchanged whose name contains one of these, such as word_embeddings
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub freeze: Vec<String>,
    /// Save the training state every so many steps, besides after every epoch; 0 saves after epochs only
    #[arg(long, default_value_t = Recovery::default().save_every)]
    pub save_every: usize,
    /// Seed of order and dropout [default: 42]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for Recovery {
    fn default() -> Self {
        let Training { batch_size, weight_decay, warmup, precision, save_every, .. } = Training::default();
        Recovery {
            epochs: 0,
            batch_size,
            learning_rate: 2e-5,
            weight_decay,
            warmup,
            dropout: 0.0,
            head_dropout: 0.0,
            precision,
            freeze: vec![],
            save_every,
            seed: None,
        }
    }
}

impl Recovery {
    /// The loop's settings.
    pub fn with_length(&self, max_length: usize) -> Training {
        let s = self.clone();
        Training {
            epochs: s.epochs,
            batch_size: s.batch_size,
            learning_rate: s.learning_rate,
            weight_decay: s.weight_decay,
            warmup: s.warmup,
            dropout: s.dropout,
            head_dropout: s.head_dropout,
            precision: s.precision,
            freeze: s.freeze,
            save_every: s.save_every,
            seed: s.seed,
            max_length,
            ..Training::default()
        }
    }
}

/// A type of floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Float {
    /// bfloat16.
    #[value(alias = "bfloat16")]
    Bf16,
    /// IEEE half precision.
    #[value(alias = "float16")]
    F16,
    /// f32.
    #[value(alias = "float32")]
    F32,
}

impl From<Float> for FloatType {
    fn from(float: Float) -> Self {
        match float {
            Float::Bf16 => Self::Bf16,
            Float::F16 => Self::F16,
            Float::F32 => Self::F32,
        }
    }
}

/// What linears are multiplied in whose weights are not int8 for int8 inputs already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ComputeIn {
    /// f32; 4-bit weights in what their file says.
    #[default]
    F32,
    /// bf16, sums in f32; 4-bit weights in what their file says.
    Bf16,
    /// int8: float and 4-bit weights are quantised by row when the model is loaded, inputs by token.
    Int8,
}

impl From<ComputeIn> for quetsch::runtime::Arithmetic {
    fn from(compute: ComputeIn) -> Self {
        match compute {
            ComputeIn::F32 => Self::F32,
            ComputeIn::Bf16 => Self::Bf16,
            ComputeIn::Int8 => Self::Int8,
        }
    }
}

const BNB_INT8: &str = "bnb-int8";

/// `[stage.quantize]`: store linears in fewer bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Quantize {
    /// Model to quantise; a recipe may name an earlier stage
    #[arg(long, alias = "model-id", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Scheme: f32, f16, bf16, int8, int8-static, int8-weight, bnb-int8, nf4 or fp4
    #[arg(long, value_name = "SCHEME", default_value_t = Quantize::default().quant)]
    pub quant: String,
    /// Sites left in float, besides the last linear of the model; `none` quantises that one too, `auto` keeps the
    /// fewest that meet the budget
    #[arg(long, value_delimiter = ',', value_name = "SITE")]
    pub keep: Vec<String>,
    /// Another scheme for some sites, later rules win: SITE=SCHEME, such as embeddings.*=int8
    #[arg(long, value_delimiter = ',', value_name = "SITE=SCHEME")]
    pub site: Vec<SiteRule>,
    /// 4-bit: store block scales as f32 instead of quantising them too
    #[arg(long)]
    pub no_double_quant: bool,
    /// 4-bit: what to multiply in; inputs, weights and results are rounded to it, sums are f32
    #[arg(long, alias = "compute-dtype", value_enum, default_value_t = Quantize::default().compute)]
    pub compute: Float,
    /// 4-bit: the type that weights are rounded to first and decoded to [default: the one that the model stores]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_dtype: Option<Float>,
    /// bnb-int8: columns of an input with an element of this magnitude stay in float; 0 turns that off [default: 6]
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outlier_threshold: Option<f32>,
    /// Training sentences that int8-static looks at, spread over labels and lengths
    #[arg(long, value_name = "N", default_value_t = Quantize::default().calibration)]
    pub calibration: usize,
    /// int8-static: how the scale of an input is chosen: min-max, moving-average, percentile, mse or entropy
    #[arg(long, value_name = "OBSERVER", default_value_t = Quantize::default().observer)]
    pub observer: String,
    /// Even out the channels between values and attention output first: exact in float, better in integers
    #[arg(long, alias = "equalize")]
    pub equalise: bool,
    /// `keep = auto`: points of accuracy on validation data that quantising may cost
    #[arg(long, value_name = "POINTS", default_value_t = Quantize::default().budget)]
    pub budget: Points,
    /// What quantisation-aware training learns from: a teacher, or the float model itself
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Quantisation-aware training; `epochs = 0` is none.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Recovery,
    /// What it learns.
    #[command(flatten)]
    #[serde(flatten)]
    pub kd: Kd,
}

impl Quantize {
    /// Whether it trains.
    pub fn trains(&self) -> bool {
        self.training.epochs > 0
    }

    /// Whether it looks at training data: because it must, or to count the outlier columns where `data` are given.
    pub fn reads(&self, data: &Data) -> bool {
        let counts = self.names(BNB_INT8) && data.train.is_some();
        self.trains() || self.calibrates() || self.measures_sites() || counts
    }

    /// Whether it measures how much each layer minds.
    pub fn measures_sites(&self) -> bool {
        self.keep.iter().any(|k| k == "auto")
    }

    /// Whether it looks at the inputs of linears.
    pub fn calibrates(&self) -> bool {
        self.equalise || self.names(Scheme::Int8Static.name())
    }

    /// Whether some sites are to have a scheme.
    fn names(&self, scheme: &str) -> bool {
        self.quant == scheme || self.site.iter().any(|rule| rule.scheme == scheme)
    }
}

impl Default for Quantize {
    fn default() -> Self {
        Quantize {
            model: None,
            quant: "int8".into(),
            keep: vec![],
            site: vec![],
            no_double_quant: false,
            compute: Float::Bf16,
            source_dtype: None,
            outlier_threshold: None,
            calibration: 512,
            observer: Observer::default().to_string(),
            equalise: false,
            budget: Points(0.1),
            teacher: None,
            training: Recovery::default(),
            kd: Kd::default(),
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
        if let Err(e) = self.observer.parse::<Observer>() {
            c.error(false, "observer", || e.to_string());
        }
        c.error(self.calibration > 0, "calibration", || "is 0, must be at least 1".into());
        let enough = !self.calibrates() || (512..=2000).contains(&self.calibration);
        c.warn(enough, "calibration", || format!("is {}, usual are 512 to 2000", self.calibration));
        c.range("budget", self.budget.0, 0.0, 100.0);
        let four_bit = self.names("nf4") || self.names("fp4");
        c.error(self.source_dtype.is_none() || four_bit, "source-dtype", || {
            "is there, but no site is nf4 or fp4".into()
        });
        c.error(self.outlier_threshold.is_none() || self.names(BNB_INT8), "outlier-threshold", || {
            "is there, but no site is bnb-int8".into()
        });
        let threshold = self.outlier_threshold.unwrap_or_default();
        c.error(threshold.is_finite() && threshold >= 0.0, "outlier-threshold", || {
            format!("is {threshold}, must be 0 (off) or a larger number")
        });
        let observes = self.names(Scheme::Int8Static.name()) || self.observer == Quantize::default().observer;
        c.error(observes, "observer", || {
            format!(
                "is {}, but nothing is observed: it is about int8-static, and no site has that scheme",
                self.observer
            )
        });
        c.error(self.trains() || self.teacher.is_none(), "teacher", || {
            "is there, but nothing learns from it: set `epochs` above 0".into()
        });
        self.kd.check_into(&mut c);
        self.training.with_length(Training::default().max_length).check_into(&mut c);
        c.0
    }
}
