//! A pruning plan: what goes, decided before anything is cut.

use super::budget::{Amount, Budget, ByLayer, Cut, check_scores, choose, choose_layers};
use super::groups::Kind;
use super::scores::Scores;
use crate::error::{Error, Result};
use crate::spec::{At, LayerShape, ModelSpec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// The version of the JSON form that this program writes and reads.
pub const VERSION: u32 = 1;

/// What to remove from one particular parent. Its JSON may be edited by hand; every use checks it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`VERSION`].
    pub version: u32,
    /// The model that this plan is for.
    pub parent: Parent,
    /// Layers to drop, ascending.
    pub layers: Vec<usize>,
    /// Per layer of the parent: ORIGINAL indices of the heads to remove, ascending.
    pub heads: Vec<Vec<u16>>,
    /// Per layer of the parent: positions of the feed-forward channels to remove, ascending.
    pub ffn: Vec<Vec<usize>>,
    /// The scores behind the choice, of those kinds that the budget touched: for the reader, not for `apply`.
    #[serde(default)]
    pub scores: Scores,
}

/// The shape of a plan's parent, as far as a plan has to know it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// [`fingerprint`] of its spec.
    pub fingerprint: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Number of parameters.
    pub parameters: usize,
    /// Its layers.
    pub layers: Vec<ParentLayer>,
}

/// A layer of a plan's parent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentLayer {
    /// Its heads by original index.
    pub heads: Vec<u16>,
    /// Width of its feed-forward network.
    pub ffn: usize,
}

/// A name for everything about a spec that pruning depends on: the table of tensors, head indices and head width.
/// Training changes weights, not this.
pub fn fingerprint(spec: &ModelSpec) -> String {
    let mut hash = blake3::Hasher::new();
    for def in spec.tensors() {
        hash.update(format!("{} {:?}\n", def.name, def.shape).as_bytes());
    }
    hash.update(format!("{} heads of {}\n", spec.original_heads, spec.head_dim).as_bytes());
    for layer in &spec.layers {
        hash.update(format!("{:?}\n", layer.heads).as_bytes());
    }
    hash.finalize().to_hex().to_string()
}

impl Parent {
    fn of(spec: &ModelSpec) -> Parent {
        Parent {
            fingerprint: fingerprint(spec),
            hidden: spec.hidden,
            head_dim: spec.head_dim,
            parameters: spec.tensors().iter().map(|d| d.len()).sum(),
            layers: spec.layers.iter().map(|s| ParentLayer { heads: s.heads.clone(), ffn: s.ffn }).collect(),
        }
    }

    pub(super) fn describe(&self) -> String {
        let heads: Vec<usize> = self.layers.iter().map(|s| s.heads.len()).collect();
        let ffn: Vec<usize> = self.layers.iter().map(|s| s.ffn).collect();
        format!("hidden {}, heads per layer {heads:?}, feed-forward {ffn:?}", self.hidden)
    }
}

/// Decides what to remove.
///
/// # Errors
/// An amount that cannot be met, scores that are missing, do not fit or are not finite, a list that names what is not
/// there, or a plan that would leave a layer without any group.
pub fn plan(spec: &ModelSpec, scores: &Scores, budget: &Budget) -> Result<Plan> {
    let layers = choose_layers(&budget.layers, &scores.layers, spec.layers.len())?;
    let pick = |kind: Kind, cut: &Cut, scores: &[Vec<f32>], what: &str, size: &dyn Fn(&LayerShape) -> usize| {
        let sizes: Vec<usize> = spec.layers.iter().map(size).collect();
        let ranked = matches!(cut.amount, Amount::Fraction(_) | Amount::Count(1..));
        check_scores(what, scores, &sizes, ranked)?;
        let live = sizes.iter().enumerate().map(|(l, &n)| if layers.contains(&l) { 0 } else { n });
        choose(kind, cut, scores, &live.collect::<Vec<_>>())
    };
    let heads = match &budget.heads.amount {
        Amount::List(list) => {
            let name = |h: usize| {
                u16::try_from(h)
                    .map_err(|_| Error::invalid(format!("head {h} is listed, heads end at {}", u16::MAX)))
            };
            let lists = by_layer(list, spec.layers.len(), "heads")?;
            lists.into_iter().map(|list| list.into_iter().map(name).collect()).collect::<Result<Vec<_>>>()?
        }
        _ => {
            let positions = pick(Kind::Head, &budget.heads, &scores.heads, "head", &|s| s.heads.len())?;
            let name = |(layer, p): (&LayerShape, Vec<usize>)| p.into_iter().map(|i| layer.heads[i]).collect();
            spec.layers.iter().zip(positions).map(name).collect()
        }
    };
    let ffn = match &budget.ffn.amount {
        Amount::List(list) => by_layer(list, spec.layers.len(), "channels")?,
        _ => pick(Kind::Channel, &budget.ffn, &scores.ffn, "channel", &|s| s.ffn)?,
    };
    let touched = Scores {
        heads: if budget.heads.amount == Amount::Nothing { vec![] } else { scores.heads.clone() },
        ffn: if budget.ffn.amount == Amount::Nothing { vec![] } else { scores.ffn.clone() },
        layers: if budget.layers == Amount::Nothing { vec![] } else { scores.layers.clone() },
    };
    let plan = Plan { version: VERSION, parent: Parent::of(spec), layers, heads, ffn, scores: touched };
    plan.child(spec)?;
    Ok(plan)
}

fn by_layer(list: &ByLayer, layers: usize, what: &str) -> Result<Vec<Vec<usize>>> {
    if let Some((l, _)) = list.iter().find(|(l, _)| **l >= layers) {
        return Err(Error::invalid(format!("{what} of layer {l} are listed, the model has {layers} layers")));
    }
    let mut out = vec![vec![]; layers];
    for (&l, indices) in list {
        out[l].clone_from(indices);
        out[l].sort_unstable();
    }
    Ok(out)
}

impl Plan {
    /// Whether nothing is removed.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty() && self.heads.iter().all(Vec::is_empty) && self.ffn.iter().all(Vec::is_empty)
    }

    /// The layers that stay, by their index in the parent.
    pub fn kept_layers(&self) -> Vec<usize> {
        (0..self.parent.layers.len()).filter(|l| !self.layers.contains(l)).collect()
    }

    /// This plan and then `next`, a plan for what this one leaves of `parent`, as one. Without scores: those of the two
    /// are of different models.
    ///
    /// # Errors
    /// As [`Plan::child`] of either.
    pub fn then(&self, parent: &ModelSpec, next: &Plan) -> Result<Plan> {
        next.child(&self.child(parent)?)?;
        let mut both = Plan { scores: Scores::default(), ..self.clone() };
        for (i, l) in self.kept_layers().into_iter().enumerate() {
            if next.layers.contains(&i) {
                both.layers.push(l);
                both.heads[l].clear();
                both.ffn[l].clear();
                continue;
            }
            both.heads[l].extend(&next.heads[i]);
            both.heads[l].sort_unstable();
            let left: Vec<usize> = (0..parent.layers[l].ffn).filter(|c| !self.ffn[l].contains(c)).collect();
            both.ffn[l].extend(next.ffn[i].iter().map(|&c| left[c]));
            both.ffn[l].sort_unstable();
        }
        both.layers.sort_unstable();
        Ok(both)
    }

    /// The spec that `parent` has after this plan. All checks of a plan are here.
    ///
    /// # Errors
    /// A plan of another version or for another parent; indices that do not exist, are listed twice or out of order;
    /// a layer left without any group; a model left without any layer.
    pub fn child(&self, parent: &ModelSpec) -> Result<ModelSpec> {
        let bad = |what: String| Err(Error::invalid(format!("pruning plan: {what}")));
        if self.version != VERSION {
            return bad(format!("version {}, expected {VERSION}; make the plan again", self.version));
        }
        let found = Parent::of(parent);
        if self.parent != found {
            return bad(format!(
                "made for a parent with {}; this model has {}. Shapes and tensor names must be the same, also of \
                 embeddings and classifier: make the plan again",
                self.parent.describe(),
                found.describe()
            ));
        }
        let n = parent.layers.len();
        if self.heads.len() != n || self.ffn.len() != n {
            return bad(format!(
                "lists heads of {} layers and channels of {}, the parent has {n} layers",
                self.heads.len(),
                self.ffn.len()
            ));
        }
        if let Some(what) = list_fault(&self.layers, |l| *l < n) {
            return bad(format!("layer {what}; the parent has {n} layers"));
        }
        if self.layers.len() == n && n > 0 {
            return bad(format!("drops all {n} layers, at least one must stay"));
        }
        let mut spec = parent.clone();
        for (l, layer) in spec.layers.iter_mut().enumerate() {
            let (heads, ffn) = (&self.heads[l], &self.ffn[l]);
            if heads.is_empty() && ffn.is_empty() {
                continue;
            }
            if self.layers.contains(&l) {
                return bad(format!("layer {l} is dropped, yet heads or channels of it are listed"));
            }
            if let Some(what) = list_fault(heads, |h| layer.heads.contains(h)) {
                return bad(format!("layer {l}: head {what}; its heads are {:?}", layer.heads));
            }
            if let Some(what) = list_fault(ffn, |c| *c < layer.ffn) {
                return bad(format!("layer {l}: channel {what}; it has {} channels", layer.ffn));
            }
            layer.heads.retain(|h| !heads.contains(h));
            layer.ffn -= ffn.len();
            if layer.heads.is_empty() && layer.ffn == 0 {
                return bad(format!("layer {l} would lose every head and every channel; drop the layer instead"));
            }
        }
        spec.layers = self.kept_layers().into_iter().map(|l| spec.layers[l].clone()).collect();
        Ok(spec)
    }

    /// Number of parameters after this plan; of one that [`Plan::child`] refuses, it means nothing.
    pub fn parameters(&self) -> usize {
        let p = &self.parent;
        let times = usize::saturating_mul;
        let head = times(p.head_dim, times(4, p.hidden).saturating_add(3));
        let channel = times(2, p.hidden).saturating_add(1);
        let gone = p.layers.iter().enumerate().flat_map(|(l, layer)| match self.layers.contains(&l) {
            // Two LayerNorms and the biases of Out and Down belong to no group.
            true => [times(layer.heads.len(), head), times(layer.ffn, channel), times(6, p.hidden)],
            false => [times(self.heads_of(l).len(), head), times(self.ffn_of(l).len(), channel), 0],
        });
        gone.fold(p.parameters, usize::saturating_sub)
    }
}

/// What is wrong with the first bad entry of an ascending list.
fn list_fault<T: PartialOrd + fmt::Display>(list: &[T], exists: impl Fn(&T) -> bool) -> Option<String> {
    if let Some(x) = list.iter().find(|x| !exists(x)) {
        return Some(format!("{x} does not exist"));
    }
    list.windows(2).find_map(|w| match w[0].partial_cmp(&w[1]) {
        Some(std::cmp::Ordering::Less) => None,
        Some(std::cmp::Ordering::Equal) => Some(format!("{} is listed twice", w[0])),
        _ => Some(format!("{} stands after {}, expected ascending order", w[1], w[0])),
    })
}

/// The masks that silence in the parent what the plan removes: 0 for a removed group, 1 for a kept one, at
/// [`At::Context`] and [`At::FfnHidden`] of every layer that loses something. A dropped layer has no mask: residual
/// streams have no group.
///
/// # Errors
/// As [`Plan::child`].
pub fn masks(spec: &ModelSpec, plan: &Plan) -> Result<BTreeMap<At, Vec<f32>>> {
    plan.child(spec)?;
    let mut out = BTreeMap::new();
    for (l, layer) in spec.layers.iter().enumerate() {
        let (heads, ffn) = (&plan.heads[l], &plan.ffn[l]);
        if !heads.is_empty() {
            let mask = layer.heads.iter().map(|h| if heads.contains(h) { 0.0 } else { 1.0 });
            out.insert(At::Context(l), mask.collect());
        }
        if !ffn.is_empty() {
            let mut mask = vec![1.0; layer.ffn];
            ffn.iter().for_each(|&c| mask[c] = 0.0);
            out.insert(At::FfnHidden(l), mask);
        }
    }
    Ok(out)
}

/// A table for people. It never fails, also not on a plan whose lists do not fit its header.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let p = &self.parent;
        let (before, after) = (p.parameters, self.parameters());
        let count = |all: &dyn Fn(&ParentLayer) -> usize| p.layers.iter().map(all).fold(0, usize::saturating_add);
        let stay = |size: &dyn Fn(&ParentLayer) -> usize, gone: &dyn Fn(usize) -> usize| -> usize {
            let kept = self.kept_layers().into_iter().map(|l| size(&p.layers[l]).saturating_sub(gone(l)));
            kept.fold(0, usize::saturating_add)
        };
        let (heads, ffn) = (|s: &ParentLayer| s.heads.len(), |s: &ParentLayer| s.ffn);
        writeln!(
            f,
            "Pruning plan: {} of {} layers, {} of {} heads, {} of {} channels stay",
            self.kept_layers().len(),
            p.layers.len(),
            stay(&heads, &|l| self.heads_of(l).len()),
            count(&heads),
            stay(&ffn, &|l| self.ffn_of(l).len()),
            count(&ffn),
        )?;
        let change = 100.0 * (after as f64 - before as f64) / before.max(1) as f64;
        writeln!(f, "parameters: {before} -> {after} ({change:+.1}%)")?;
        writeln!(f, "layer  heads     channels       removed (score)")?;
        for (l, layer) in p.layers.iter().enumerate() {
            let of = |n: usize, gone: usize| format!("{} of {n}", n.saturating_sub(gone));
            let heads = of(layer.heads.len(), self.heads_of(l).len());
            let ffn = of(layer.ffn, self.ffn_of(l).len());
            let (heads, ffn) = if self.layers.contains(&l) { Default::default() } else { (heads, ffn) };
            writeln!(f, "{l:>5}  {heads:<8}  {ffn:<13}  {}", self.removed(l))?;
        }
        Ok(())
    }
}

impl Plan {
    pub(super) fn heads_of(&self, layer: usize) -> &[u16] {
        self.heads.get(layer).map_or(&[], Vec::as_slice)
    }

    pub(super) fn ffn_of(&self, layer: usize) -> &[usize] {
        self.ffn.get(layer).map_or(&[], Vec::as_slice)
    }

    /// What goes of one layer, in words.
    fn removed(&self, l: usize) -> String {
        /// So many channels are listed one by one, more are counted.
        const FEW: usize = 8;
        let score = |s: Option<&f32>| s.map_or(String::new(), |s| format!(" ({s:.4})"));
        if self.layers.contains(&l) {
            return format!("the layer{}", score(self.scores.layers.get(l)));
        }
        let mut parts = vec![];
        if !self.heads_of(l).is_empty() {
            let name = |h: &u16| {
                let place = self.parent.layers[l].heads.iter().position(|x| x == h);
                format!("{h}{}", score(place.and_then(|p| self.scores.heads.get(l)?.get(p))))
            };
            parts.push(format!("heads {}", self.heads_of(l).iter().map(name).collect::<Vec<_>>().join(", ")));
        }
        let ffn = self.ffn_of(l);
        let scores = self.scores.ffn.get(l);
        let of = |c: &usize| scores.and_then(|s| s.get(*c));
        match ffn.len() {
            0 => {}
            1..=FEW => {
                let names: Vec<String> = ffn.iter().map(|c| format!("{c}{}", score(of(c)))).collect();
                parts.push(format!("channels {}", names.join(", ")));
            }
            n => {
                let ends = |(low, high): (f32, f32), s: &f32| (low.min(*s), high.max(*s));
                let (low, high) = ffn.iter().filter_map(of).fold((f32::INFINITY, f32::NEG_INFINITY), ends);
                let range = if low <= high { format!(" ({low:.4} to {high:.4})") } else { String::new() };
                parts.push(format!("{n} channels{range}"));
            }
        }
        if parts.is_empty() { "-".into() } else { parts.join("; ") }
    }
}
