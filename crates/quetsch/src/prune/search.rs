//! Heads and channels together under one budget: Kwon et al. 2022 (A Fast Post-Training Pruning Framework for
//! Transformers), algorithm 1 and equation 11.
//!
//! All heads cost the same and all channels cost the same, so for every number of heads the best choice is known: the
//! heads with the highest scores, and as many of the best channels as what is left pays for. The number of heads with
//! the highest sum of scores wins. Scores of heads and channels must have one unit (what a loss would lose).

use super::budget::{Amount, Budget, Cut, check_scores};
use super::scores::Scores;
use crate::cost::CostOps;
use crate::error::{Error, Result};
use crate::spec::{LayerShape, ModelSpec};

/// What one head and one channel cost; the sum over all of them is what a share is of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Of one head.
    pub head: f64,
    /// Of one channel.
    pub channel: f64,
}

impl Costs {
    /// Multiply-accumulates on sentences of these lengths (in tokens).
    ///
    /// # Errors
    /// A length of 0 or above the position table.
    pub fn macs(spec: &ModelSpec, lengths: &[usize]) -> Result<Costs> {
        let macs = |heads: u16, ffn: usize| -> Result<f64> {
            let layers = vec![LayerShape { heads: (0..heads).collect(), ffn }];
            let one = ModelSpec { layers, original_heads: heads.max(1), ..spec.clone() };
            Ok(CostOps::run(&one, lengths)?.macs() as f64)
        };
        let none = macs(0, 0)?;
        Ok(Costs { head: macs(1, 0)? - none, channel: macs(0, 1)? - none })
    }

    /// Parameters.
    pub fn parameters(spec: &ModelSpec) -> Costs {
        let head = spec.head_dim * (4 * spec.hidden + 3);
        Costs { head: head as f64, channel: (2 * spec.hidden + 1) as f64 }
    }

    /// Of all heads and channels of a model.
    pub fn of(&self, spec: &ModelSpec) -> f64 {
        spec.layers.iter().map(|l| self.head * l.heads.len() as f64 + self.channel * l.ffn as f64).sum()
    }
}

/// How much of the heads' and channels' cost stays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keep {
    /// The share that stays, above 0, at most 1.
    pub share: f64,
    /// No layer loses more than this share of its heads (rounded down).
    pub max_heads_per_layer: f64,
    /// Channels of a layer stay in blocks of so many, the last block may be smaller.
    pub align: usize,
}

impl Keep {
    /// Of so many heads of a layer these stay at least. The epsilon keeps 0.3 * 10 at 3.
    pub(super) fn least_heads(&self, heads: usize) -> usize {
        heads - (self.max_heads_per_layer * heads as f64 + 1e-9) as usize
    }

    /// What no budget takes, in words.
    pub(super) fn must_stay(&self) -> String {
        format!(
            "heads (max_per_layer {}) and a block of {} channels in every layer must stay",
            self.max_heads_per_layer, self.align
        )
    }
}

/// The groups of every layer, best first; ties by position.
pub(super) struct Order {
    pub heads: Vec<Vec<usize>>,
    pub ffn: Vec<Vec<usize>>,
}

/// The order, once scores and budget are known to make sense.
///
/// # Errors
/// Scores that do not fit or are negative, or numbers out of range.
pub(super) fn checked(spec: &ModelSpec, scores: &Scores, keep: &Keep) -> Result<Order> {
    let heads: Vec<usize> = spec.layers.iter().map(|l| l.heads.len()).collect();
    let ffn: Vec<usize> = spec.layers.iter().map(|l| l.ffn).collect();
    check_scores("head", &scores.heads, &heads, true)?;
    check_scores("channel", &scores.ffn, &ffn, true)?;
    let bad = |m: String| Err(Error::invalid(m));
    if !(keep.share > 0.0 && keep.share <= 1.0) {
        return bad(format!("the share of the cost that stays is {}, expected above 0 and at most 1", keep.share));
    }
    if !(0.0..=1.0).contains(&keep.max_heads_per_layer) || keep.align == 0 {
        let (max, align) = (keep.max_heads_per_layer, keep.align);
        return bad(format!("max_per_layer is {max}, expected 0 to 1; align is {align}, expected at least 1"));
    }
    if let Some(s) = scores.heads.iter().chain(&scores.ffn).flatten().find(|s| **s < 0.0) {
        return bad(format!("a score is {s}: a budget over heads and channels needs scores from 0"));
    }
    let order = |scores: &Vec<f32>| {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        order
    };
    Ok(Order { heads: scores.heads.iter().map(order).collect(), ffn: scores.ffn.iter().map(order).collect() })
}

/// Lists of what goes, given positions by layer.
pub(super) fn removed(spec: &ModelSpec, mut heads: Vec<Vec<usize>>, ffn: Vec<Vec<usize>>) -> Budget {
    for (list, layer) in heads.iter_mut().zip(&spec.layers) {
        list.iter_mut().for_each(|i| *i = layer.heads[*i].into());
    }
    let cut = |lists: Vec<Vec<usize>>| Cut {
        amount: Amount::List(lists.into_iter().enumerate().filter(|(_, list)| !list.is_empty()).collect()),
        ..Cut::default()
    };
    Budget { layers: Amount::Nothing, heads: cut(heads), ffn: cut(ffn) }
}

/// Some groups of a layer that stay or go together.
struct Block {
    layer: usize,
    members: Vec<usize>,
    score: f64,
    forced: bool,
}

/// Best first, those that must stay before all others; ties by layer and position.
fn ranked(scores: &[Vec<f32>], order: &[Vec<usize>], block: usize, forced: impl Fn(usize) -> usize) -> Vec<Block> {
    let mut all = vec![];
    for (layer, (scores, order)) in scores.iter().zip(order).enumerate() {
        for (i, members) in order.chunks(block).enumerate() {
            let score = members.iter().map(|m| f64::from(scores[*m])).sum();
            all.push(Block { layer, members: members.to_vec(), score, forced: i < forced(layer) });
        }
    }
    let mean = |b: &Block| b.score / b.members.len() as f64;
    all.sort_by(|a, b| b.forced.cmp(&a.forced).then(mean(b).total_cmp(&mean(a))));
    all
}

/// The heads and channels to remove, as lists of a [`Budget`]. Every layer keeps at least its best block of channels,
/// so that it keeps a group whatever happens to its heads.
///
/// # Errors
/// Scores that do not fit or are negative, or a share that cannot be met.
pub fn search(spec: &ModelSpec, scores: &Scores, costs: &Costs, keep: &Keep) -> Result<Budget> {
    let order = checked(spec, scores, keep)?;
    let heads = ranked(&scores.heads, &order.heads, 1, |l| keep.least_heads(spec.layers[l].heads.len()));
    let blocks = ranked(&scores.ffn, &order.ffn, keep.align, |_| 1);
    let must = |b: &[Block]| b.iter().filter(|b| b.forced).count();
    let (must_heads, must_blocks) = (must(&heads), must(&blocks));
    // Cost and score of the first k blocks.
    let mut sums = vec![(0.0, 0.0)];
    for b in &blocks {
        let (cost, score) = sums[sums.len() - 1];
        sums.push((cost + costs.channel * b.members.len() as f64, score + b.score));
    }
    let total = costs.of(spec);
    // A share that means a whole number of groups is not lost to rounding.
    let budget = keep.share * total * (1.0 + 1e-9);
    let mut best: Option<(f64, usize, usize)> = None;
    let mut head_score = 0.0;
    for n in 0..=heads.len() {
        if n > 0 {
            head_score += heads[n - 1].score;
        }
        let left = budget - costs.head * n as f64;
        let k = sums.partition_point(|(cost, _)| *cost <= left);
        if n < must_heads || k <= must_blocks {
            continue;
        }
        let score = head_score + sums[k - 1].1;
        if best.is_none_or(|(s, ..)| score > s) {
            best = Some((score, n, k - 1));
        }
    }
    let Some((_, n, k)) = best else {
        let least = (costs.head * must_heads as f64 + sums[must_blocks].0) / total;
        return Err(Error::invalid(format!(
            "{:.1}% of the cost cannot be met: {must_heads} {}, {:.1}%",
            100.0 * keep.share,
            keep.must_stay(),
            100.0 * least
        )));
    };
    let gone = |blocks: &[Block]| {
        let mut lists = vec![vec![]; spec.layers.len()];
        blocks.iter().for_each(|b| lists[b.layer].extend_from_slice(&b.members));
        lists
    };
    Ok(removed(spec, gone(&heads[n..]), gone(&blocks[k..])))
}

/// Which `removed.len()` groups of a layer to remove instead, given `fisher = sum over examples of g g^T` with g the
/// gradient by the masks (Kwon et al. 2022, section 3.2.2): groups that stay are taken into the removed ones in order of
/// importance, and each time the one leaves them whose staying lowers `(1 - m)^T F (1 - m)` the most.
pub fn rearrange(fisher: &[f32], removed: &[usize]) -> Vec<usize> {
    let n = (fisher.len() as f64).sqrt() as usize;
    let f = |i: usize, j: usize| f64::from(fisher[i * n + j]);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| f(*a, *a).total_cmp(&f(*b, *b)));
    let mut out = vec![false; n];
    removed.iter().for_each(|i| out[*i] = true);
    // pull[j] = sum over removed i of F[i, j]
    let mut pull: Vec<f64> = (0..n).map(|j| removed.iter().map(|i| f(*i, j)).sum()).collect();
    let move_by = |pull: &mut [f64], i: usize, sign: f64| {
        pull.iter_mut().enumerate().for_each(|(j, p)| *p += sign * f(i, j));
    };
    let candidates: Vec<usize> = order.into_iter().filter(|i| !out[*i]).collect();
    for i in candidates.into_iter().filter(|_| !removed.is_empty()) {
        out[i] = true;
        move_by(&mut pull, i, 1.0);
        // Without j, the sum falls by 2 pull[j] - F[j, j].
        let gain = |j: &usize| 2.0 * pull[*j] - f(*j, *j);
        let best = (0..n).filter(|j| out[*j]).max_by(|a, b| gain(a).total_cmp(&gain(b)).then(b.cmp(a)));
        if let Some(j) = best {
            out[j] = false;
            move_by(&mut pull, j, -1.0);
        }
    }
    (0..n).filter(|i| out[*i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use crate::spec::{Activation, Family, HeadSpec};

    fn spec(layers: &[(u16, usize)]) -> ModelSpec {
        ModelSpec {
            family: Family::Bert,
            prefix: "bert.".into(),
            vocab: 9,
            positions: 8,
            token_types: 1,
            hidden: 6,
            head_dim: 2,
            original_heads: 4,
            layers: layers.iter().map(|(h, ffn)| LayerShape { heads: (0..*h).collect(), ffn: *ffn }).collect(),
            ffn_activation: Activation::Gelu,
            norm_eps: 1e-12,
            head: HeadSpec::Pooler { labels: 2 },
            unused_pooler: false,
        }
    }

    #[test]
    fn costs_are_those_of_the_forward_and_of_the_plan() {
        let (whole, less) = (spec(&[(4, 7), (3, 5)]), spec(&[(1, 7), (0, 2)]));
        let lengths = [3, 8, 5];
        let macs = |s: &ModelSpec| CostOps::run(s, &lengths).unwrap().macs() as f64;
        let costs = Costs::macs(&whole, &lengths).unwrap();
        assert!((costs.of(&whole) - costs.of(&less) - (macs(&whole) - macs(&less))).abs() < 1e-6);
        let parameters = |s: &ModelSpec| s.tensors().iter().map(|d| d.len()).sum::<usize>() as f64;
        let costs = Costs::parameters(&whole);
        assert_eq!(costs.of(&whole) - costs.of(&less), parameters(&whole) - parameters(&less));
    }

    /// Every subset that the budget allows, and the best of them.
    fn brute_force(spec: &ModelSpec, scores: &Scores, costs: &Costs, keep: &Keep) -> Option<f64> {
        let groups: Vec<(f64, f64)> = scores
            .heads
            .iter()
            .flatten()
            .map(|s| (f64::from(*s), costs.head))
            .chain(scores.ffn.iter().flatten().map(|s| (f64::from(*s), costs.channel)))
            .collect();
        let heads = scores.heads.iter().flatten().count();
        let mut best = None;
        for set in 0..1u32 << groups.len() {
            let kept = |i: usize| set >> i & 1 == 1;
            let sum = |f: fn(&(f64, f64)) -> f64| -> f64 {
                groups.iter().enumerate().filter(|(i, _)| kept(*i)).map(|(_, g)| f(g)).sum()
            };
            let mut at = heads;
            let fed = spec.layers.iter().all(|l| {
                at += l.ffn;
                (at - l.ffn..at).any(kept)
            });
            if fed && sum(|g| g.1) <= keep.share * costs.of(spec) + 1e-9 {
                best = best.max(Some((sum(|g| g.0) * 1e6) as i64));
            }
        }
        best.map(|b| b as f64 / 1e6)
    }

    #[test]
    fn the_search_finds_the_best_subset() {
        let mut rng = Rng::new(3);
        let spec = spec(&[(3, 4), (2, 5)]);
        for share in [0.15, 0.3, 0.5, 0.77, 1.0] {
            let mut random = |n: usize| (0..n).map(|_| rng.normal().abs()).collect::<Vec<f32>>();
            let scores =
                Scores { heads: vec![random(3), random(2)], ffn: vec![random(4), random(5)], layers: vec![] };
            let costs = Costs::parameters(&spec);
            let keep = Keep { share, max_heads_per_layer: 1.0, align: 1 };
            let budget = search(&spec, &scores, &costs, &keep).unwrap();
            let plan = super::super::plan(&spec, &scores, &budget).unwrap();
            let child = plan.child(&spec).unwrap();
            assert!(costs.of(&child) <= share * costs.of(&spec) + 1e-6);
            let mut kept: f64 = scores.heads.iter().chain(&scores.ffn).flatten().map(|s| f64::from(*s)).sum();
            for l in 0..2 {
                kept -= plan.heads[l].iter().map(|h| f64::from(scores.heads[l][*h as usize])).sum::<f64>();
                kept -= plan.ffn[l].iter().map(|c| f64::from(scores.ffn[l][*c])).sum::<f64>();
            }
            let best = brute_force(&spec, &scores, &costs, &keep).unwrap();
            assert!((kept - best).abs() < 1e-4, "{share}: {kept} != {best}");
        }
    }

    #[test]
    fn blocks_limits_and_refusals() {
        let spec = spec(&[(4, 32), (4, 32)]);
        let ramp = |n: usize, by: f32| (0..n).map(|i| 1.0 + by * i as f32).collect::<Vec<f32>>();
        let scores = Scores {
            heads: vec![ramp(4, 1.0), ramp(4, 2.0)],
            ffn: vec![ramp(32, 0.1), ramp(32, 0.2)],
            layers: vec![],
        };
        let costs = Costs::parameters(&spec);
        let keep = |share, max_heads_per_layer, align| Keep { share, max_heads_per_layer, align };
        for (share, max, align) in [(0.5, 0.5, 8), (0.7, 0.25, 16), (0.4, 1.0, 8)] {
            let plan = super::super::plan(
                &spec,
                &scores,
                &search(&spec, &scores, &costs, &keep(share, max, align)).unwrap(),
            );
            let child = plan.unwrap().child(&spec).unwrap();
            assert!(child.layers.iter().all(|l| l.ffn % align == 0 && l.ffn > 0), "{child:?}");
            assert!(child.layers.iter().all(|l| l.heads.len() as f64 >= 4.0 * (1.0 - max)), "{child:?}");
        }
        let refusals = [
            (keep(0.1, 0.25, 8), scores.clone(), "cannot be met"),
            (keep(0.0, 1.0, 1), scores.clone(), "above 0"),
            (keep(0.5, 1.5, 1), scores.clone(), "max_per_layer"),
            (keep(0.5, 1.0, 0), scores.clone(), "align"),
            (keep(0.5, 1.0, 1), Scores { heads: vec![], ..scores.clone() }, "head scores"),
            (keep(0.5, 1.0, 1), Scores { heads: vec![ramp(4, -1.0), ramp(4, 1.0)], ..scores }, "scores from 0"),
        ];
        for (keep, scores, words) in refusals {
            let e = search(&spec, &scores, &costs, &keep).unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
    }

    #[test]
    fn rearranging_lowers_the_cost_of_what_goes() {
        let (n, k) = (7, 3);
        let mut rng = Rng::new(5);
        let cost = |f: &[f32], out: &[usize]| -> f32 {
            out.iter().flat_map(|i| out.iter().map(move |j| f[i * n + j])).sum()
        };
        for _ in 0..20 {
            let g: Vec<f32> = (0..4 * n).map(|_| rng.normal()).collect();
            let f: Vec<f32> = (0..n * n).map(|i| g.chunks(n).map(|row| row[i / n] * row[i % n]).sum()).collect();
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| f[a * n + a].total_cmp(&f[b * n + b]));
            let after = rearrange(&f, &order[..k]);
            assert_eq!(after.len(), k);
            assert!(cost(&f, &after) <= cost(&f, &order[..k]) + 1e-5);
        }
        // 0 and 1 nearly cancel each other: together they cost less than 0 and 2, which are the least alone.
        let f = [4.0, -4.0, 0.0, -4.0, 5.0, 0.0, 0.0, 0.0, 1.0];
        assert_eq!(rearrange(&f, &[0, 2]), [0, 1]);
        assert_eq!(rearrange(&f, &[]), [0usize; 0]);
    }
}
