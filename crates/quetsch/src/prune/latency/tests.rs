//! The search against all subsets, and tables.

use super::super::{Costs, plan, search};
use super::*;
use crate::rng::Rng;
use crate::spec::Family;

fn spec(layers: &[(&[u16], usize)]) -> ModelSpec {
    ModelSpec {
        family: Family::Bert,
        prefix: "bert.".into(),
        vocab: 9,
        positions: 8,
        token_types: 1,
        hidden: 6,
        head_dim: 2,
        original_heads: 4,
        layers: layers.iter().map(|(h, ffn)| LayerShape { heads: h.to_vec(), ffn: *ffn }).collect(),
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head: HeadSpec::Pooler { labels: 2 },
        unused_pooler: false,
    }
}

fn table(heads: &[(usize, f64)], ffn: &[(usize, f64)]) -> LatencyTable {
    LatencyTable {
        version: TABLE_VERSION,
        machine: String::new(),
        isa: "scalar".into(),
        tokens: 4,
        scheme: "f32".into(),
        hidden: 6,
        head_dim: 2,
        rest_us: 1.0,
        heads: heads.to_vec(),
        ffn: ffn.to_vec(),
    }
}

fn random_scores(spec: &ModelSpec, rng: &mut Rng) -> Scores {
    let mut random = |n: usize| (0..n).map(|_| rng.normal().abs()).collect::<Vec<f32>>();
    Scores {
        heads: spec.layers.iter().map(|l| random(l.heads.len())).collect(),
        ffn: spec.layers.iter().map(|l| random(l.ffn)).collect(),
        layers: vec![],
    }
}

/// The highest sum over every subset of groups that leaves each layer a channel and takes at most `us`.
fn brute_force(spec: &ModelSpec, scores: &Scores, table: &LatencyTable, us: f64) -> f64 {
    let sizes: Vec<usize> = spec.layers.iter().flat_map(|l| [l.heads.len(), l.ffn]).collect();
    let all: Vec<f32> =
        scores.heads.iter().zip(&scores.ffn).flat_map(|(h, f)| h.iter().chain(f)).copied().collect();
    let mut best = f64::NEG_INFINITY;
    for set in 0..1u32 << all.len() {
        let (mut at, mut time, mut is_fed) = (0, 0.0, true);
        for (i, n) in sizes.iter().enumerate() {
            let kept = (at..at + n).filter(|g| set >> g & 1 == 1).count();
            time += if i % 2 == 0 { table.heads_us(kept) } else { table.ffn_us(kept) };
            is_fed &= i % 2 == 0 || kept > 0;
            at += n;
        }
        if is_fed && time <= us + 1e-9 {
            let kept = (0..all.len()).filter(|g| set >> g & 1 == 1);
            best = best.max(kept.map(|g| f64::from(all[g])).sum());
        }
    }
    best
}

fn kept(spec: &ModelSpec, scores: &Scores, budget: &Budget) -> (ModelSpec, f64) {
    let plan = plan(spec, &Scores::default(), budget).unwrap();
    let mut sum = 0.0;
    for (l, layer) in spec.layers.iter().enumerate() {
        let stays = layer.heads.iter().zip(&scores.heads[l]).filter(|(h, _)| !plan.heads[l].contains(h));
        sum += stays.map(|(_, s)| f64::from(*s)).sum::<f64>();
        let stays = (0..layer.ffn).filter(|c| !plan.ffn[l].contains(c));
        sum += stays.map(|c| f64::from(scores.ffn[l][c])).sum::<f64>();
    }
    (plan.child(spec).unwrap(), sum)
}

#[test]
fn the_search_finds_the_best_subset_of_times_that_are_not_linear() {
    let mut rng = Rng::new(3);
    // Heads with the original indices 1 and 3; a head more may cost nothing, or time may even fall.
    let spec = spec(&[(&[0, 1, 3], 4), (&[1, 3], 5)]);
    let table =
        table(&[(0, 0.0), (1, 5.0), (2, 5.5), (3, 9.0)], &[(0, 0.0), (1, 4.0), (2, 3.0), (4, 7.0), (5, 12.0)]);
    for share in [0.3, 0.45, 0.6, 0.8, 1.0] {
        for _ in 0..5 {
            let scores = random_scores(&spec, &mut rng);
            let keep = Keep { share, max_heads_per_layer: 1.0, align: 1 };
            let budget = search_latency(&spec, &scores, &table, &keep).unwrap();
            let (child, sum) = kept(&spec, &scores, &budget);
            let us = share * table.of(&spec);
            assert!(table.of(&child) <= 1.001 * us, "{share}: {} of {us}", table.of(&child));
            // The steps are rounded: the sum lies between the best of the budget and of a little more.
            let (least, most) =
                (brute_force(&spec, &scores, &table, us), brute_force(&spec, &scores, &table, 1.001 * us));
            assert!(sum >= least - 1e-5 && sum <= most + 1e-5, "{share}: {sum}, best {least} to {most}");
        }
    }
}

#[test]
fn with_linear_times_it_is_the_search_over_costs() {
    let mut rng = Rng::new(4);
    let spec = spec(&[(&[0, 1, 2, 3], 12), (&[0, 1, 2, 3], 12), (&[2], 8)]);
    let costs = Costs { head: 7.0, channel: 2.0 };
    let linear = |n: usize, by: f64| (0..=n).map(|i| (i, by * i as f64)).collect::<Vec<_>>();
    let table = table(&linear(4, costs.head), &linear(12, costs.channel));
    assert_eq!(table.of(&spec), costs.of(&spec));
    for (share, max_heads_per_layer, align) in [(0.5, 0.5, 4), (0.6, 1.0, 4), (0.75, 0.25, 2), (1.0, 1.0, 4)] {
        let scores = random_scores(&spec, &mut rng);
        let keep = Keep { share, max_heads_per_layer, align };
        let (by_time, time) = kept(&spec, &scores, &search_latency(&spec, &scores, &table, &keep).unwrap());
        let (_, linear) = kept(&spec, &scores, &search(&spec, &scores, &costs, &keep).unwrap());
        // That search takes blocks in one order, this one all mixtures.
        assert!(time >= linear - 1e-5, "{time} {linear}");
        for (child, parent) in by_time.layers.iter().zip(&spec.layers) {
            let least = parent.heads.len() as f64 * (1.0 - max_heads_per_layer);
            assert!(child.heads.len() as f64 >= least && child.ffn > 0 && child.ffn % align == 0);
        }
    }
}

#[test]
fn between_points_time_is_linear() {
    let points = [(0, 0.0), (2, 4.0), (5, 10.0)];
    for (n, us) in [(0, 0.0), (1, 2.0), (2, 4.0), (3, 6.0), (5, 10.0), (9, 10.0)] {
        assert_eq!(at(&points, n), us, "{n}");
    }
    assert_eq!(widths(96, 32), [32, 64, 96]);
    assert_eq!(widths(70, 32), [32, 64, 70]);
    assert_eq!(widths(0, 32), [0; 0]);
    assert!(widths(3072, 1).len() <= WIDTHS && widths(3072, 1).last() == Some(&3072));
}

#[test]
fn what_is_measured_fits_the_model_and_comes_back_from_json() {
    let uneven =
        Checkpoint::random(spec(&[(&[], 12), (&[0, 1, 3], 0), (&[2], 8)]), vec!["a".into(), "b".into()], 1);
    let uneven = uneven.unwrap();
    for scheme in [Scheme::F32, Scheme::Int8] {
        let table = measure(&uneven, Timing { tokens: 5, scheme, align: 4 }).unwrap();
        table.check(&uneven.spec).unwrap();
        let sizes = |points: &[(usize, f64)]| points.iter().map(|p| p.0).collect::<Vec<_>>();
        assert_eq!((sizes(&table.heads), sizes(&table.ffn)), (vec![0, 1, 2, 3], vec![0, 4, 8, 12]));
        assert!(table.rest_us > 0.0 && table.scheme == scheme.name());
        let json = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<LatencyTable>(&json).unwrap(), table);
        assert!(table.to_string().contains("5 tokens"), "{table}");
    }
    for (tokens, scheme, align, words) in [
        (9, Scheme::F32, 1, "1 to 8"),
        (0, Scheme::F32, 1, "1 to 8"),
        (4, Scheme::F32, 0, "align is 0"),
        (4, Scheme::Int8Static, 1, "calibration"),
    ] {
        let e = measure(&uneven, Timing { tokens, scheme, align }).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let spec = spec(&[(&[0, 1, 2], 4)]);
    let scores = random_scores(&spec, &mut Rng::new(1));
    let good = table(&[(0, 0.0), (3, 3.0)], &[(0, 0.0), (4, 4.0)]);
    let keep = |share| Keep { share, max_heads_per_layer: 0.0, align: 4 };
    assert!(search_latency(&spec, &scores, &good, &keep(1.0)).is_ok());
    let refusals = [
        (good.clone(), 0.5, "50.0% of the time cannot be met: heads (max_per_layer 0) and a block of 4"),
        (LatencyTable { version: 9, ..good.clone() }, 1.0, "version 9"),
        (LatencyTable { hidden: 7, ..good.clone() }, 1.0, "hidden width 7"),
        (LatencyTable { heads: vec![(0, 0.0), (2, 3.0)], ..good.clone() }, 1.0, "ends at 2 heads"),
        (LatencyTable { ffn: vec![(0, 0.0), (4, f64::NAN)], ..good.clone() }, 1.0, "4 channels take NaN"),
        (LatencyTable { ffn: vec![(4, 3.0)], ..good }, 1.0, "begin with 0"),
    ];
    for (table, share, words) in refusals {
        let e = search_latency(&spec, &scores, &table, &keep(share)).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}
