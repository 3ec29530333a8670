//! How much each group matters.

use super::groups::{Axis, Kind, coupling, unit};
use crate::checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};

/// One number per group, a larger one matters more. Whole models of a kind may be absent: `heads`, `ffn` and `layers`
/// are each empty or complete. Scores of any source fit, such as gradients of a mask:
/// `Scores { heads: gradients, ..Scores::default() }`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// Per layer, in the order of `spec.layers[l].heads`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<Vec<f32>>,
    /// Per layer, by channel position.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ffn: Vec<Vec<f32>>,
    /// Per layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<f32>,
}

/// A norm of a group's weights, divided by its number of elements so that groups of different sizes compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Magnitude {
    /// Mean of |w|.
    L1,
    /// Root of the mean of w^2.
    #[default]
    L2,
}

/// A running mean of |w| or w^2.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    n: usize,
}

impl Mean {
    fn add(&mut self, norm: Magnitude, slice: &[f32]) {
        self.sum += match norm {
            Magnitude::L1 => slice.iter().map(|w| w.abs() as f64).sum::<f64>(),
            Magnitude::L2 => slice.iter().map(|w| *w as f64 * *w as f64).sum(),
        };
        self.n += slice.len();
    }

    fn get(self, norm: Magnitude) -> f32 {
        let mean = self.sum / self.n.max(1) as f64;
        match norm {
            Magnitude::L1 => mean as f32,
            Magnitude::L2 => mean.sqrt() as f32,
        }
    }
}

/// Scores by weight magnitude over all slices of each group, biases included; a layer's score is over all its groups.
pub fn magnitude(ck: &Checkpoint, norm: Magnitude) -> Scores {
    let layers = &ck.spec.layers;
    let mut heads: Vec<_> = layers.iter().map(|s| vec![Mean::default(); s.heads.len()]).collect();
    let mut ffn: Vec<_> = layers.iter().map(|s| vec![Mean::default(); s.ffn]).collect();
    for (def, _) in ck.tensors() {
        let Some((kind, l, axis)) = coupling(def.tensor) else { continue };
        if def.is_empty() {
            continue;
        }
        let groups = match kind {
            Kind::Head => &mut heads[l],
            Kind::Channel => &mut ffn[l],
        };
        let values = ck.values(def.tensor);
        let (unit, columns) = (unit(&ck.spec, kind), def.shape.get(1).copied().unwrap_or(1));
        // A group is one run of the tensor along rows, one run per row along columns.
        let run = match axis {
            Axis::Rows => unit * columns,
            Axis::Columns => unit,
        };
        for (i, slice) in values.chunks(run).enumerate() {
            let n = groups.len();
            groups[i % n].add(norm, slice);
        }
    }
    let whole = |l: usize| {
        let parts = heads[l].iter().chain(&ffn[l]);
        parts.fold(Mean::default(), |a, b| Mean { sum: a.sum + b.sum, n: a.n + b.n }).get(norm)
    };
    let finish = |groups: &[Vec<Mean>]| -> Vec<Vec<f32>> {
        groups.iter().map(|g| g.iter().map(|m| m.get(norm)).collect()).collect()
    };
    Scores { heads: finish(&heads), ffn: finish(&ffn), layers: (0..layers.len()).map(whole).collect() }
}
