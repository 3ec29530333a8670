//! The settings that every training shares: the loop's and distillation's.

use super::Check;
use clap::{Args, ValueEnum};
use quetsch_train::LayerMap;
use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// To zero in a straight line over the remaining steps.
    #[default]
    Linear,
    /// To zero along half a cosine.
    Cosine,
    /// Not at all.
    Constant,
}

/// Which epoch's weights are the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum KeepEpoch {
    /// The last one's.
    #[default]
    Last,
    /// Those with the highest validation accuracy, the earliest of equals.
    Best,
}

/// How classes of different sizes are weighed in the cross-entropy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ClassWeights {
    /// All alike.
    #[default]
    None,
    /// By 1 / size of the class.
    Balanced,
    /// By the root of that.
    Sqrt,
}

/// What the matrix products of training are computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// bf16 where this CPU multiplies it faster than f32, else f32.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// Inputs rounded to bfloat16, sums in f32; weights and the optimiser stay f32.
    Bf16,
}

impl Precision {
    /// What this CPU trains in.
    pub fn here(self) -> quetsch_train::Precision {
        match self {
            Precision::F32 => quetsch_train::Precision::F32,
            Precision::Bf16 => quetsch_train::Precision::Bf16,
            Precision::Auto => quetsch_train::Precision::fastest(),
        }
    }
}

/// The settings of the one training loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Training {
    /// Passes over the training data
    #[arg(long, default_value_t = Training::default().epochs)]
    pub epochs: usize,
    /// Sentences per forward and backward
    #[arg(long, default_value_t = Training::default().batch_size)]
    pub batch_size: usize,
    /// Batches whose gradients are summed for one step
    #[arg(long, default_value_t = Training::default().accumulate)]
    pub accumulate: usize,
    /// Highest learning rate of the body
    #[arg(long, default_value_t = Training::default().learning_rate)]
    pub learning_rate: f64,
    /// Highest learning rate of the head [default: 3 times the body's]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_learning_rate: Option<f64>,
    /// Share of the target probability spread over all labels
    #[arg(long, default_value_t = Training::default().label_smoothing)]
    pub label_smoothing: f64,
    /// How much the classes weigh in the cross-entropy: alike, by 1 / size (balanced) or by its root (sqrt)
    #[arg(long, value_enum, default_value_t = Training::default().class_weights)]
    pub class_weights: ClassWeights,
    /// Labels that are numbers: the distance of outputs from them, mse or l1
    #[arg(long, value_enum, default_value_t = Measure::Mse)]
    pub regression_loss: Measure,
    /// Decoupled weight decay; never on biases and LayerNorm
    #[arg(long, default_value_t = Training::default().weight_decay)]
    pub weight_decay: f64,
    /// Share of all steps during which the learning rate rises
    #[arg(long, default_value_t = Training::default().warmup)]
    pub warmup: f64,
    /// How the learning rate falls afterwards
    #[arg(long, value_enum, default_value_t = Training::default().schedule)]
    pub schedule: Schedule,
    /// Largest norm of all gradients together; 0 turns clipping off
    #[arg(long, default_value_t = Training::default().clip)]
    pub clip: f64,
    /// Dropout in the body: hidden states and attention probabilities
    #[arg(long, default_value_t = Training::default().dropout)]
    pub dropout: f64,
    /// Dropout in the classification head
    #[arg(long, default_value_t = Training::default().head_dropout)]
    pub head_dropout: f64,
    /// What matrix products are computed in: bf16 where this CPU is faster at it (auto), f32 or bf16
    #[arg(long, value_enum, default_value_t = Training::default().precision)]
    pub precision: Precision,
    /// Compute what is inside a layer again in the backward (gradient checkpointing): less memory for long texts, a
    /// third more time, the same result
    #[arg(long)]
    pub recompute: bool,
    /// Leave tensors unchanged whose name contains one of these, such as word_embeddings
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub freeze: Vec<String>,
    /// Longest text in tokens; longer ones are cut
    #[arg(long, default_value_t = Training::default().max_length)]
    pub max_length: usize,
    /// Leave weights of the layers that are exactly 0 as they are: a sparse model stays sparse
    #[arg(long)]
    pub keep_zeros: bool,
    /// Which epoch's weights are kept
    #[arg(long, value_enum, default_value_t = Training::default().keep)]
    pub keep: KeepEpoch,
    /// Stop after so many epochs without a better validation accuracy; 0 never stops early
    #[arg(long, default_value_t = Training::default().patience)]
    pub patience: usize,
    /// Save the training state every so many steps, besides after every epoch; 0 saves after epochs only
    #[arg(long, default_value_t = Training::default().save_every)]
    pub save_every: usize,
    /// Seed of order, dropout and new weights [default: 42]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for Training {
    fn default() -> Self {
        Training {
            epochs: 3,
            batch_size: 32,
            accumulate: 1,
            learning_rate: 1e-4,
            head_learning_rate: None,
            label_smoothing: 0.0,
            class_weights: ClassWeights::None,
            regression_loss: Measure::Mse,
            weight_decay: 0.01,
            warmup: 0.1,
            schedule: Schedule::Linear,
            clip: 1.0,
            dropout: 0.1,
            head_dropout: 0.2,
            precision: Precision::Auto,
            recompute: false,
            freeze: vec![],
            max_length: 256,
            keep_zeros: false,
            keep: KeepEpoch::Last,
            patience: 0,
            save_every: 200,
            seed: None,
        }
    }
}

impl Training {
    pub(super) fn check_into(&self, c: &mut Check) {
        let finite = |x: f64| x.is_finite() && x >= 0.0;
        c.error(self.batch_size > 0, "batch-size", || "is 0, must be at least 1".into());
        c.error(self.accumulate > 0, "accumulate", || "is 0, must be at least 1".into());
        c.error(self.max_length >= 3, "max-length", || format!("is {}, must be at least 3", self.max_length));
        c.error(self.learning_rate.is_finite() && self.learning_rate > 0.0, "learning-rate", || {
            format!("is {}, must be above 0", self.learning_rate)
        });
        c.warn(self.learning_rate <= 1e-2, "learning-rate", || {
            format!("is {}; encoders seldom survive more than 0.001", self.learning_rate)
        });
        if let Some(r) = self.head_learning_rate {
            c.error(r.is_finite() && r > 0.0, "head-learning-rate", || format!("is {r}, must be above 0"));
        }
        c.error(finite(self.weight_decay), "weight-decay", || {
            format!("is {}, must be 0 or more", self.weight_decay)
        });
        c.error(finite(self.clip), "clip", || format!("is {}, must be 0 or more", self.clip));
        c.range("warmup", self.warmup, 0.0, 1.0);
        let e = self.label_smoothing;
        c.error((0.0..1.0).contains(&e), "label-smoothing", || format!("is {e}, must lie in [0, 1)"));
        c.error(self.patience == 0 || self.epochs == 0 || self.patience < self.epochs, "patience", || {
            format!("is {}, must be below the {} epochs to have an effect", self.patience, self.epochs)
        });
        c.error(self.patience == 0 || self.keep == KeepEpoch::Best, "patience", || {
            "stops after epochs that were no better, so the last one is not the one to keep: set `keep` to best"
                .into()
        });
        c.error(self.regression_loss != Measure::Cosine, "regression-loss", || {
            "is cosine, must be mse or l1".into()
        });
        for (key, p) in [("dropout", self.dropout), ("head-dropout", self.head_dropout)] {
            c.error((0.0..1.0).contains(&p), key, || format!("is {p}, must lie in [0, 1)"));
        }
    }

    /// The learning rate of the head.
    pub fn head_learning_rate(&self) -> f64 {
        self.head_learning_rate.unwrap_or(3.0 * self.learning_rate)
    }
}

/// Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * KL(teacher/T || student/T) (Hinton et al. 2015), and beside
/// them, each with a weight of its own, what student and teacher differ in inside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
pub struct Kd {
    /// Weight of the true labels' cross-entropy; the teacher's part has the rest
    #[arg(long, default_value_t = Kd::default().alpha)]
    pub alpha: f64,
    /// Temperature that softens both distributions
    #[arg(long, default_value_t = Kd::default().temperature)]
    pub temperature: f64,
    /// What alpha becomes by the last step, in a straight line [default: as it is]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_end: Option<f64>,
    /// The same for the temperature
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature_end: Option<f64>,
    /// Weight of the distance between the logits, beside the two
    #[arg(long, value_name = "WEIGHT", default_value_t = Kd::default().logits)]
    pub logits: f64,
    /// That distance
    #[arg(long, value_enum, default_value_t = Measure::Mse)]
    pub logits_loss: Measure,
    /// Numbers of a sequence of words: weight of the distance of their first differences, from word to word
    #[arg(long, value_name = "WEIGHT", default_value_t = Kd::default().differences)]
    pub differences: f64,
    /// Weight of the distance between hidden states, layer to layer
    #[arg(long, value_name = "WEIGHT", default_value_t = Kd::default().hidden)]
    pub hidden: f64,
    /// Weight of the distance between embeddings
    #[arg(long, value_name = "WEIGHT", default_value_t = Kd::default().embeddings)]
    pub embeddings: f64,
    /// The distance of hidden states and embeddings
    #[arg(long, value_enum, default_value_t = Measure::Mse)]
    pub hidden_loss: Measure,
    /// Which student layer learns from which teacher layers: uniform, mean, weighted (a learned mean of all), last, or
    /// pairs from 0 (0:1,1:2+3)
    #[arg(long, value_name = "MAP", default_value_t = LayerMap::Uniform)]
    pub hidden_map: LayerMap,
    /// Weight of the divergence between attention maps
    #[arg(long, value_name = "WEIGHT", default_value_t = Kd::default().attention)]
    pub attention: f64,
    /// Layers whose attention maps are compared: uniform, last, or pairs
    #[arg(long, value_name = "MAP", default_value_t = LayerMap::Uniform)]
    pub attention_map: LayerMap,
    /// Weight of the divergence between relations of queries, of keys and of values
    #[arg(long, value_name = "WEIGHT", default_value_t = Kd::default().relations)]
    pub relations: f64,
    /// Which of the three have relations
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kd::default().relations_of)]
    pub relations_of: Vec<Qkv>,
    /// Heads that relations are cut into on both sides [default: the teacher's attention heads]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relation_heads: Option<usize>,
    /// Layers whose relations are compared: uniform, last, or pairs
    #[arg(long, value_name = "MAP", default_value_t = LayerMap::Last)]
    pub relations_map: LayerMap,
}

/// How far two rows of numbers lie apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Mean of the squared differences.
    #[default]
    Mse,
    /// Mean of the absolute differences.
    L1,
    /// 1 - cosine.
    Cosine,
}

/// What attention is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Qkv {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
}

impl Default for Kd {
    fn default() -> Self {
        Kd {
            alpha: 0.3,
            temperature: 3.0,
            alpha_end: None,
            temperature_end: None,
            logits: 0.0,
            logits_loss: Measure::Mse,
            differences: 0.0,
            hidden: 0.0,
            embeddings: 0.0,
            hidden_loss: Measure::Mse,
            hidden_map: LayerMap::Uniform,
            attention: 0.0,
            attention_map: LayerMap::Uniform,
            relations: 0.0,
            relations_of: vec![Qkv::Query, Qkv::Key, Qkv::Value],
            relation_heads: None,
            relations_map: LayerMap::Last,
        }
    }
}

impl Kd {
    pub(super) fn check_into(&self, c: &mut Check) {
        let (a, t) = (self.alpha, self.temperature);
        let weights = [
            ("logits", self.logits),
            ("differences", self.differences),
            ("hidden", self.hidden),
            ("embeddings", self.embeddings),
            ("attention", self.attention),
            ("relations", self.relations),
        ];
        for (key, w) in weights {
            c.error(w.is_finite() && w >= 0.0, key, || format!("is {w}, must be 0 or more"));
        }
        let maps = [
            ("hidden-map", &self.hidden_map, self.hidden, Kd::default().hidden_map),
            ("attention-map", &self.attention_map, self.attention, Kd::default().attention_map),
            ("relations-map", &self.relations_map, self.relations, Kd::default().relations_map),
        ];
        for (key, map, weight, default) in maps {
            let part = key.trim_end_matches("-map");
            c.error(*map == default || weight != 0.0, key, || {
                format!("is {map}, but `{part}` is no part of the loss: set it to a weight above 0")
            });
        }
        let parts = Kd::default();
        let distances = self.hidden + self.embeddings;
        let ways = [
            ("logits-loss", self.logits_loss != parts.logits_loss, self.logits, "logits"),
            ("hidden-loss", self.hidden_loss != parts.hidden_loss, distances, "hidden` or `embeddings"),
            ("relations-of", self.relations_of != parts.relations_of, self.relations, "relations"),
            ("relation-heads", self.relation_heads.is_some(), self.relations, "relations"),
        ];
        for (key, set, weight, part) in ways {
            c.error(!set || weight != 0.0, key, || {
                format!("is set, but what it is about is no part of the loss: give `{part}` a weight above 0")
            });
        }
        let twice = (1..self.relations_of.len()).any(|i| self.relations_of[..i].contains(&self.relations_of[i]));
        c.error(!twice, "relations-of", || "names one of query, key and value twice".into());
        if let Some(end) = self.alpha_end {
            c.range("alpha-end", end, 0.0, 1.0);
        }
        if let Some(end) = self.temperature_end {
            c.error(end.is_finite() && end > 0.0, "temperature-end", || format!("is {end}, must be above 0"));
        }
        c.error(self.relation_heads != Some(0), "relation-heads", || "is 0, must be at least 1".into());
        c.error(!self.relations_of.is_empty(), "relations-of", || "is empty: name query, key or value".into());
        c.range("alpha", a, 0.0, 1.0);
        c.warn(!(0.0..=1.0).contains(&a) || (0.2..=0.5).contains(&a), "alpha", || {
            format!("is {a}; values from 0.2 to 0.5 usually work best")
        });
        c.error(t.is_finite() && t > 0.0, "temperature", || format!("is {t}, must be above 0"));
        c.warn(!(t.is_finite() && t > 0.0) || (2.0..=4.0).contains(&t), "temperature", || {
            format!("is {t}; values from 2 to 4 usually work best")
        });
    }
}
