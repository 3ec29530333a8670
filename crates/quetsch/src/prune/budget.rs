//! How much to remove, and which groups that means.

use super::groups::Kind;
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Indices by layer.
pub type ByLayer = BTreeMap<usize, Vec<usize>>;

/// How much to remove.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Amount<List> {
    /// Nothing.
    #[default]
    Nothing,
    /// This share, to the nearest whole number; `0.0..=1.0`.
    Fraction(f64),
    /// This many.
    Count(usize),
    /// Exactly these; no score is needed.
    List(List),
}

/// What an [`Amount`] is counted over, and what a group competes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// All layers together.
    #[default]
    Global,
    /// Each layer by itself.
    PerLayer,
}

/// What to remove of one kind of group.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    /// How much. A list names heads by their original index and channels by their position in the parent.
    pub amount: Amount<ByLayer>,
    /// Over all layers or in each.
    pub scope: Scope,
    /// No layer loses more than this share (rounded down). The reference recipe's heads: 0.5.
    pub max_per_layer: f64,
    /// The kept number of a layer is rounded up to a multiple of this (never above what is there), so that kernels
    /// see whole blocks.
    pub align: usize,
}

impl Default for Cut {
    fn default() -> Cut {
        Cut { amount: Amount::Nothing, scope: Scope::Global, max_per_layer: 1.0, align: 1 }
    }
}

/// What to remove of a model. Layers go first: the other two count over the layers that stay.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Budget {
    /// Whole layers.
    pub layers: Amount<Vec<usize>>,
    /// Attention heads.
    pub heads: Cut,
    /// Feed-forward channels.
    pub ffn: Cut,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Head => "head",
            Kind::Channel => "channel",
        }
    }
}

/// The number that an amount means out of `n`; a list is not counted.
fn number<L>(amount: &Amount<L>, n: usize, what: &str) -> Result<usize> {
    match *amount {
        Amount::Fraction(f) if (0.0..=1.0).contains(&f) => Ok((f * n as f64).round() as usize),
        Amount::Fraction(f) => {
            Err(Error::invalid(format!("the fraction of {what}s to remove is {f}, expected 0 to 1")))
        }
        Amount::Count(c) => Ok(c),
        Amount::Nothing | Amount::List(_) => Ok(0),
    }
}

/// Scores must be absent or complete, and finite; absent ones only where nothing has to be ranked.
pub(super) fn check_scores(what: &str, scores: &[Vec<f32>], sizes: &[usize], needed: bool) -> Result<()> {
    if scores.is_empty() {
        return match needed && !sizes.is_empty() {
            true => Err(Error::invalid(format!(
                "removing {what}s by number needs {what} scores: score the weights first, or list the {what}s"
            ))),
            false => Ok(()),
        };
    }
    if scores.len() != sizes.len() {
        return Err(Error::invalid(format!(
            "{what} scores are for {} layers, the model has {}",
            scores.len(),
            sizes.len()
        )));
    }
    for (l, (s, &n)) in scores.iter().zip(sizes).enumerate() {
        if s.len() != n {
            return Err(Error::invalid(format!(
                "{what} scores of layer {l}: expected {n}, one per {what} that the model has, found {}",
                s.len()
            )));
        }
        if let Some(i) = s.iter().position(|x| !x.is_finite()) {
            return Err(Error::invalid(format!(
                "{what} score {i} of layer {l} is {}: the weights or the data that made it hold NaN or infinity",
                s[i]
            )));
        }
    }
    Ok(())
}

/// Layers to drop, ascending.
pub(super) fn choose_layers(amount: &Amount<Vec<usize>>, scores: &[f32], layers: usize) -> Result<Vec<usize>> {
    let per_layer: Vec<Vec<f32>> = scores.iter().map(|s| vec![*s]).collect();
    let n = number(amount, layers, "layer")?;
    check_scores("layer", &per_layer, &vec![1; layers], n > 0)?;
    let mut chosen = match amount {
        Amount::List(list) => list.clone(),
        _ if n > layers => {
            return Err(Error::invalid(format!("cannot drop {n} layers, the model has {layers}")));
        }
        _ => {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
            order[..n].to_vec()
        }
    };
    chosen.sort_unstable();
    Ok(chosen)
}

/// Positions to remove per layer, ascending: the lowest scores first, ties by layer and position. `sizes` is 0 for a
/// layer that is dropped. Not for lists.
pub(super) fn choose(kind: Kind, cut: &Cut, scores: &[Vec<f32>], sizes: &[usize]) -> Result<Vec<Vec<usize>>> {
    let what = kind.word();
    if !(0.0..=1.0).contains(&cut.max_per_layer) {
        return Err(Error::invalid(format!("max_per_layer of {what}s is {}, expected 0 to 1", cut.max_per_layer)));
    }
    if cut.align == 0 {
        return Err(Error::invalid(format!("align of {what}s is 0, expected at least 1")));
    }
    // The epsilon keeps 0.3 * 10 at 3.
    let caps: Vec<usize> = sizes.iter().map(|&n| (cut.max_per_layer * n as f64 + 1e-9) as usize).collect();
    let too_many = |wanted: usize, place: String, exist: usize, cap: usize| {
        let limit = match cap < exist {
            true => format!("; max_per_layer {} permits {cap}", cut.max_per_layer),
            false => String::new(),
        };
        Err(Error::invalid(format!("cannot remove {wanted} {what}s{place}: {exist} exist{limit}")))
    };
    let (quotas, total) = match cut.scope {
        Scope::Global => {
            let (exist, cap) = (sizes.iter().sum(), caps.iter().sum());
            let total = number(&cut.amount, exist, what)?;
            if total > cap {
                return too_many(total, String::new(), exist, cap);
            }
            (caps, total)
        }
        Scope::PerLayer => {
            let mut quotas = vec![];
            for (l, (&n, &cap)) in sizes.iter().zip(&caps).enumerate() {
                let quota = number(&cut.amount, n, what)?;
                if quota > cap && n > 0 {
                    return too_many(quota, format!(" of layer {l}"), n, cap);
                }
                quotas.push(quota.min(n));
            }
            let total = quotas.iter().sum();
            (quotas, total)
        }
    };
    let mut chosen = vec![vec![]; sizes.len()];
    if total == 0 {
        return Ok(chosen);
    }
    let mut order: Vec<(usize, usize)> =
        sizes.iter().enumerate().flat_map(|(l, &n)| (0..n).map(move |i| (l, i))).collect();
    order.sort_by(|&(l, i), &(m, j)| scores[l][i].total_cmp(&scores[m][j]));
    let mut left = total;
    for (l, i) in order {
        if left > 0 && chosen[l].len() < quotas[l] {
            chosen[l].push(i);
            left -= 1;
        }
    }
    for (removed, &n) in chosen.iter_mut().zip(sizes) {
        // Rounding up gives back the best of what was removed: it stands last.
        let kept = (n - removed.len()).next_multiple_of(cut.align).min(n);
        removed.truncate(n - kept);
        removed.sort_unstable();
    }
    Ok(chosen)
}
