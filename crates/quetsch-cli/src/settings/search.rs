//! What `quetsch search` varies, and how much it may try.

use super::{Check, Finding, Settings, Vocab};
use crate::values::Points;
use clap::Args;
use serde::{Deserialize, Serialize};

/// `[search]`: the budget and the successive halving (Jamieson and Talwalkar 2016).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Search {
    /// Points of validation accuracy that the recommended model may lose against the teacher
    #[arg(long, value_name = "POINTS", default_value_t = Search::default().max_drop)]
    pub max_drop: Points,
    /// Minutes that the search may take; what would end later is not begun. 0 sets no limit
    #[arg(long, default_value_t = Search::default().minutes)]
    pub minutes: f64,
    /// Shapes that are trained, spread over the costs that the space has
    #[arg(long, default_value_t = Search::default().trials)]
    pub trials: usize,
    /// Epochs that a shape gets in each round; only the survivors of a round go on. A first 0 cuts without training
    #[arg(long, value_delimiter = ',', default_values_t = Search::default().rungs)]
    pub rungs: Vec<usize>,
    /// Share of the shapes that survives a round
    #[arg(long, default_value_t = Search::default().keep)]
    pub keep: f64,
    /// Largest number of models that are measured on the test data
    #[arg(long, default_value_t = Search::default().points)]
    pub points: usize,
}

impl Default for Search {
    fn default() -> Self {
        Search { max_drop: Points(0.5), minutes: 45.0, trials: 12, rungs: vec![1, 2, 4], keep: 0.5, points: 12 }
    }
}

impl Settings for Search {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        c.range("max-drop", self.max_drop.0, 0.0, 100.0);
        c.range("minutes", self.minutes, 0.0, 1e6);
        c.error(self.trials > 0, "trials", || "is 0, must be at least 1".into());
        let trained = self.rungs.strip_prefix(&[0]).unwrap_or(&self.rungs);
        c.error(!trained.is_empty() && !trained.contains(&0), "rungs", || {
            format!(
                "is {:?}, must hold the epochs of one round or more, each at least 1; a 0 may stand before them",
                self.rungs
            )
        });
        c.error(self.keep > 0.0 && self.keep <= 1.0, "keep", || format!("is {}, must lie in (0, 1]", self.keep));
        c.error(self.points > 0, "points", || "is 0, must be at least 1".into());
        c.0
    }
}

/// `[space]`: what shapes there are to choose from. Every list is combined with every other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Space {
    /// How many of the teacher's layers a student starts from, evenly spread, the last one included
    #[arg(long, value_delimiter = ',', default_values_t = Space::default().layers)]
    pub layers: Vec<usize>,
    /// Shares of the attention heads to cut
    #[arg(long, value_delimiter = ',', default_values_t = Space::default().heads)]
    pub heads: Vec<f64>,
    /// Shares of the feed-forward channels to cut
    #[arg(long, value_delimiter = ',', default_values_t = Space::default().ffn)]
    pub ffn: Vec<f64>,
    /// Vocabularies: all, what the training texts use (train), and the first so many entries (train+10000)
    #[arg(long, value_name = "WHICH,..", value_delimiter = ',', default_values_t = Space::default().vocab)]
    pub vocab: Vec<Vocab>,
    /// Weights of the true labels' cross-entropy [default: that of the training sections]
    #[arg(long, value_delimiter = ',')]
    pub alpha: Vec<f64>,
    /// Temperatures of the distillation [default: that of the training sections]
    #[arg(long, value_delimiter = ',')]
    pub temperature: Vec<f64>,
}

impl Default for Space {
    fn default() -> Self {
        Space {
            layers: vec![1, 2, 3, 4],
            heads: vec![0.0, 0.33],
            ffn: vec![0.0, 0.5],
            vocab: vec![Vocab::All, Vocab::Train { first: 0 }, Vocab::Train { first: 10_000 }],
            alpha: vec![],
            temperature: vec![],
        }
    }
}

impl Settings for Space {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        let lists = [
            ("layers", self.layers.is_empty()),
            ("heads", self.heads.is_empty()),
            ("ffn", self.ffn.is_empty()),
            ("vocab", self.vocab.is_empty()),
        ];
        for (key, is_empty) in lists {
            c.error(!is_empty, key, || "is empty, must hold one value or more".into());
        }
        c.error(!self.layers.contains(&0), "layers", || "holds 0, a student has at least 1 layer".into());
        for (key, shares) in [("heads", &self.heads), ("ffn", &self.ffn)] {
            for share in shares {
                c.error((0.0..1.0).contains(share), key, || format!("holds {share}, shares lie in [0, 1)"));
            }
        }
        for alpha in &self.alpha {
            c.error((0.0..=1.0).contains(alpha), "alpha", || format!("holds {alpha}, must lie in [0, 1]"));
        }
        for t in &self.temperature {
            c.error(t.is_finite() && *t > 0.0, "temperature", || format!("holds {t}, must be above 0"));
        }
        c.0
    }
}
