//! By hand: what is scored, chosen, cut, printed and refused. The laws on random models are in `tests/prune_laws.rs`.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::checkpoint::{Checkpoint, Stored};
use crate::spec::{Activation, Family, HeadSpec, LayerShape, Lin, ModelSpec, Tensor};

fn spec(layers: &[(&[u16], usize)]) -> ModelSpec {
    ModelSpec {
        family: Family::Bert,
        prefix: String::new(),
        vocab: 3,
        positions: 2,
        token_types: 1,
        hidden: 2,
        head_dim: 1,
        original_heads: 4,
        layers: layers.iter().map(|&(h, ffn)| LayerShape { heads: h.to_vec(), ffn }).collect(),
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head: HeadSpec::None,
        unused_pooler: false,
    }
}

/// Every tensor counts 1, 2, 3, ..
fn counting(spec: ModelSpec) -> Checkpoint {
    Checkpoint::from_fn(spec, vec![], |def| Ok(Stored::f32((1..=def.len()).map(|i| i as f32).collect()))).unwrap()
}

fn list(items: &[(usize, &[usize])]) -> Amount<ByLayer> {
    Amount::List(items.iter().map(|(l, i)| (*l, i.to_vec())).collect())
}

fn heads(amount: Amount<ByLayer>) -> Budget {
    Budget { heads: Cut { amount, ..Cut::default() }, ..Budget::default() }
}

fn ffn(amount: Amount<ByLayer>) -> Budget {
    Budget { ffn: Cut { amount, ..Cut::default() }, ..Budget::default() }
}

#[test]
fn surgery_by_hand() {
    let ck = counting(spec(&[(&[0, 2, 3], 3)]));
    let budget = Budget {
        heads: Cut { amount: list(&[(0, &[2])]), ..Cut::default() },
        ffn: Cut { amount: list(&[(0, &[0])]), ..Cut::default() },
        ..Budget::default()
    };
    let plan = plan(&ck.spec, &Scores::default(), &budget).unwrap();
    let pruned = apply(&ck, &plan).unwrap();
    assert_eq!(pruned.spec.layers, [LayerShape { heads: vec![0, 3], ffn: 2 }]);
    let padded = dense(&pruned).unwrap();
    let rows: [(Tensor, &[f32], &[f32]); 9] = [
        (Tensor::W(Lin::Query(0)), &[1., 2., 5., 6.], &[1., 2., 0., 0., 0., 0., 5., 6.]),
        (Tensor::W(Lin::Key(0)), &[1., 2., 5., 6.], &[1., 2., 0., 0., 0., 0., 5., 6.]),
        (Tensor::B(Lin::Value(0)), &[1., 3.], &[1., 0., 0., 3.]),
        (Tensor::W(Lin::Out(0)), &[1., 3., 4., 6.], &[1., 0., 0., 3., 4., 0., 0., 6.]),
        (Tensor::B(Lin::Out(0)), &[1., 2.], &[1., 2.]),
        (Tensor::W(Lin::Up(0)), &[3., 4., 5., 6.], &[3., 4., 5., 6.]),
        (Tensor::B(Lin::Up(0)), &[2., 3.], &[2., 3.]),
        (Tensor::W(Lin::Down(0)), &[2., 3., 5., 6.], &[2., 3., 5., 6.]),
        (Tensor::B(Lin::Down(0)), &[1., 2.], &[1., 2.]),
    ];
    for (tensor, compact, dense) in rows {
        assert_eq!(*pruned.values(tensor), *compact, "{tensor:?}");
        assert_eq!(*padded.values(tensor), *dense, "{tensor:?}, dense");
    }
}

#[test]
fn layers_in_the_order_given() {
    let mut ck = counting(spec(&[(&[0], 1), (&[1], 2), (&[2], 3)]));
    ck.max_length = Some(7);
    ck.config.insert("kept".into(), true.into());
    let kept = keep_layers(&ck, &[2, 0]).unwrap();
    assert_eq!(kept.spec.layers, [ck.spec.layers[2].clone(), ck.spec.layers[0].clone()]);
    assert_eq!((kept.max_length, kept.config.len()), (Some(7), 1));
    for (bad, words) in [(vec![], "0 to 2"), (vec![3], "layer 3"), (vec![1, 1], "twice")] {
        let error = keep_layers(&ck, &bad).unwrap_err().to_string();
        assert!(error.contains(words), "{bad:?}: {error}");
    }
}

#[test]
fn magnitudes_by_hand() {
    // hidden 2, head_dim 1, two heads, one channel; all weights 1 but those of head 3 (the second), which are -3.
    let mut ck = counting(spec(&[(&[1, 3], 1), (&[], 0)]));
    for lin in [Lin::Query(0), Lin::Key(0), Lin::Value(0)] {
        ck.set(Tensor::W(lin), Stored::f32(vec![1., 1., -3., -3.]));
        ck.set(Tensor::B(lin), Stored::f32(vec![1., -3.]));
    }
    ck.set(Tensor::W(Lin::Out(0)), Stored::f32(vec![1., -3., 1., -3.]));
    ck.set(Tensor::W(Lin::Up(0)), Stored::f32(vec![2., 4.]));
    ck.set(Tensor::B(Lin::Up(0)), Stored::f32(vec![-6.]));
    ck.set(Tensor::W(Lin::Down(0)), Stored::f32(vec![0., 8.]));
    let l1 = magnitude(&ck, Magnitude::L1);
    let l2 = magnitude(&ck, Magnitude::L2);
    assert_eq!((&l1.heads, &l2.heads), (&vec![vec![1., 3.], vec![]], &vec![vec![1., 3.], vec![]]));
    assert_eq!((&l1.ffn, &l2.ffn), (&vec![vec![4.], vec![]], &vec![vec![24f32.sqrt()], vec![]]));
    assert_eq!(l1.layers, [(11. + 33. + 20.) / 27., 0.]);
    assert_eq!(l2.layers, [((11. + 99. + 120.) / 27f64).sqrt() as f32, 0.]);
}

#[test]
fn choices() {
    let spec = spec(&[(&[0, 1, 2, 3], 6), (&[0, 2], 6), (&[], 6)]);
    let scores = Scores {
        heads: vec![vec![0.1, 0.2, 0.3, 0.4], vec![0.5, 0.05], vec![]],
        ffn: vec![vec![1., 2., 3., 4., 5., 6.], vec![6., 5., 4., 3., 2., 1.], vec![9.; 6]],
        layers: vec![3., 1., 2.],
    };
    let cut = |amount, scope, max_per_layer, align| Cut { amount, scope, max_per_layer, align };
    let (global, each) = (Scope::Global, Scope::PerLayer);
    let rows: [(Cut, [&[u16]; 3]); 8] = [
        (cut(Amount::Count(3), global, 1.0, 1), [&[0, 1], &[2], &[]]),
        (cut(Amount::Fraction(0.5), global, 1.0, 1), [&[0, 1], &[2], &[]]),
        (cut(Amount::Count(3), global, 0.5, 1), [&[0, 1], &[2], &[]]),
        (cut(Amount::Count(4), global, 1.0, 1), [&[0, 1, 2], &[2], &[]]),
        (cut(Amount::Fraction(0.5), each, 0.5, 1), [&[0, 1], &[2], &[]]),
        (cut(Amount::Fraction(0.25), each, 1.0, 1), [&[0], &[2], &[]]),
        (cut(Amount::Count(4), global, 1.0, 2), [&[0, 1], &[], &[]]),
        (cut(list(&[(1, &[2, 0])]), global, 0.0, 1), [&[], &[0, 2], &[]]),
    ];
    for (cut, want) in rows {
        let budget = Budget { heads: cut, ..Budget::default() };
        let got = plan(&spec, &scores, &budget).unwrap().heads;
        assert_eq!(got, want, "{budget:?}");
    }
    let rows: [(Cut, [&[usize]; 3]); 4] = [
        (cut(Amount::Count(2), each, 1.0, 1), [&[0, 1], &[4, 5], &[0, 1]]),
        (cut(Amount::Count(3), each, 1.0, 4), [&[0, 1], &[4, 5], &[0, 1]]),
        (cut(Amount::Count(3), each, 1.0, 32), [&[], &[], &[]]),
        (cut(Amount::Fraction(1. / 3.), global, 1.0, 1), [&[0, 1, 2], &[3, 4, 5], &[]]),
    ];
    for (cut, want) in rows {
        let budget = Budget { ffn: cut, ..Budget::default() };
        let got = plan(&spec, &scores, &budget).unwrap().ffn;
        assert_eq!(got, want, "{budget:?}");
    }
    for (amount, want) in [
        (Amount::Count(2), vec![1, 2]),
        (Amount::Fraction(0.3), vec![1]),
        (Amount::List(vec![2, 0]), vec![0, 2]),
        (Amount::Nothing, vec![]),
    ] {
        // Layers go first: heads are counted over what stays.
        let budget = Budget { layers: amount, ..heads(Amount::Fraction(0.0)) };
        assert_eq!(plan(&spec, &scores, &budget).unwrap().layers, want, "{budget:?}");
    }
    let budget = Budget { layers: Amount::Count(1), ..heads(Amount::Fraction(0.5)) };
    let plan = plan(&spec, &scores, &budget).unwrap();
    assert_eq!((&plan.layers[..], &plan.heads[..]), (&[1][..], &[vec![0, 1], vec![], vec![]][..]));
}

/// The reference recipe: 12 of 36 heads by layer-normalised gradients, at most half of a layer; its own numbers.
#[test]
fn a_layer_keeps_its_half() {
    let spec = ModelSpec { original_heads: 12, ..spec(&[(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11][..], 1); 3]) };
    let weak = |from: f32| (0..12).map(|i| from + i as f32).collect::<Vec<f32>>();
    let scores = Scores { heads: vec![weak(0.), weak(100.), weak(3.5)], ..Scores::default() };
    let mut budget = heads(Amount::Count(12));
    budget.heads.max_per_layer = 0.5;
    let plan = plan(&spec, &scores, &budget).unwrap();
    assert_eq!(plan.heads, [vec![0, 1, 2, 3, 4, 5], vec![], vec![0, 1, 2, 3, 4, 5]]);
}

#[test]
fn refusals() {
    let spec = spec(&[(&[0, 2], 2), (&[1], 1)]);
    let all = |heads: Vec<Vec<f32>>, ffn: Vec<Vec<f32>>| Scores { heads, ffn, layers: vec![1., 2.] };
    let good = || all(vec![vec![1., 2.], vec![3.]], vec![vec![1., 2.], vec![3.]]);
    let nan = all(vec![vec![1., f32::NAN], vec![3.]], vec![]);
    let none = Scores::default;
    let with = |mut budget: Budget, f: &dyn Fn(&mut Budget)| {
        f(&mut budget);
        budget
    };
    let everything = with(heads(list(&[(0, &[0, 2])])), &|b| b.ffn.amount = list(&[(0, &[0, 1])]));
    let rows: Vec<(Scores, Budget, &str)> = vec![
        (none(), heads(Amount::Count(1)), "needs head scores"),
        (none(), ffn(Amount::Fraction(0.1)), "needs channel scores"),
        (none(), Budget { layers: Amount::Count(1), ..Budget::default() }, "needs layer scores"),
        (nan, heads(Amount::Count(1)), "head score 1 of layer 0 is NaN"),
        (all(vec![vec![1., 2.]], vec![]), heads(Amount::Count(1)), "for 1 layers, the model has 2"),
        (all(vec![vec![1.; 3], vec![3.]], vec![]), heads(Amount::Count(1)), "layer 0: expected 2"),
        (good(), heads(Amount::Count(4)), "cannot remove 4 heads: 3 exist"),
        (good(), with(heads(Amount::Count(2)), &|b| b.heads.max_per_layer = 0.5), "max_per_layer 0.5 permits 1"),
        (good(), with(heads(Amount::Count(2)), &|b| b.heads.scope = Scope::PerLayer), "of layer 1: 1 exist"),
        (good(), heads(Amount::Fraction(1.5)), "is 1.5, expected 0 to 1"),
        (good(), heads(Amount::Fraction(f64::NAN)), "expected 0 to 1"),
        (good(), with(ffn(Amount::Count(1)), &|b| b.ffn.align = 0), "align of channels is 0"),
        (good(), with(ffn(Amount::Count(1)), &|b| b.ffn.max_per_layer = -1.0), "expected 0 to 1"),
        (none(), heads(list(&[(0, &[1])])), "layer 0: head 1 does not exist; its heads are [0, 2]"),
        (none(), heads(list(&[(0, &[70_000])])), "70000"),
        (none(), heads(list(&[(5, &[0])])), "layer 5"),
        (none(), heads(list(&[(0, &[2, 2])])), "head 2 is listed twice"),
        (none(), ffn(list(&[(1, &[1])])), "channel 1 does not exist; it has 1"),
        (none(), everything, "layer 0 would lose every head and every channel; drop the layer"),
        (none(), Budget { layers: Amount::List(vec![0, 1]), ..Budget::default() }, "drops all 2 layers"),
        (none(), Budget { layers: Amount::List(vec![2]), ..Budget::default() }, "layer 2 does not exist"),
        (good(), Budget { layers: Amount::Count(3), ..Budget::default() }, "cannot drop 3 layers"),
        (
            none(),
            Budget { layers: Amount::List(vec![0]), ..heads(list(&[(0, &[2])])) },
            "layer 0 is dropped, yet heads",
        ),
    ];
    let mut wrong = vec![];
    for (scores, budget, words) in rows {
        match plan(&spec, &scores, &budget) {
            Err(e) if e.to_string().contains(words) => {}
            other => wrong.push(format!("{words}: {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_plan_is_for_its_parent_only() {
    let ck = counting(spec(&[(&[0, 2], 2), (&[1], 1)]));
    let good = plan(&ck.spec, &Scores::default(), &heads(list(&[(0, &[2])]))).unwrap();
    let other = counting(spec(&[(&[0, 3], 2), (&[1], 1)]));
    let pruned = apply(&ck, &good).unwrap();
    for wrong in [&other, &pruned] {
        let error = apply(wrong, &good).unwrap_err().to_string();
        assert!(error.contains("made for a parent with"), "{error}");
    }
    type Edit = fn(&mut Plan);
    let edits: [(&str, Edit); 5] = [
        ("made for a parent with hidden 18446744073709551615", |p| {
            p.parent.hidden = usize::MAX;
            p.parent.layers.iter_mut().for_each(|l| l.ffn = usize::MAX);
        }),
        ("version 9, expected 1", |p| p.version = 9),
        ("heads of 1 layers", |p| p.heads.truncate(1)),
        ("head 0 stands after 2", |p| p.heads[0] = vec![2, 0]),
        ("channel 7 does not exist", |p| p.ffn[1] = vec![7]),
    ];
    for (words, edit) in edits {
        let mut plan = good.clone();
        edit(&mut plan);
        let error = apply(&ck, &plan).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
        assert!(plan.to_string().contains("Pruning plan"), "printing never fails");
    }
    assert!(serde_json::from_str::<Plan>(r#"{"version": 1, "heats": []}"#).is_err());
}

#[test]
fn a_quantised_parent_is_refused() {
    let mut ck = counting(spec(&[(&[0, 2], 2)]));
    let plan = plan(&ck.spec, &Scores::default(), &heads(list(&[(0, &[2])]))).unwrap();
    let rows = crate::quant::Int8Rows {
        values: vec![1; 4],
        scb: vec![1.0; 2],
        input: crate::quant::int8::Int8Input::Dynamic,
    };
    ck.set(Tensor::W(Lin::Query(0)), Stored::Int8(rows));
    let error = apply(&ck, &plan).unwrap_err().to_string();
    assert!(error.contains("query.weight") && error.contains("quantise last"), "{error}");
    assert!(keep_layers(&ck, &[0]).is_ok(), "whole layers move as they are");
}

#[test]
fn printed() {
    let ck = counting(spec(&[(&[0, 1, 2, 3], 12), (&[0, 2], 12), (&[], 12)]));
    let scores = Scores {
        heads: vec![vec![0.5, 0.25, 1., 1.], vec![1., 0.125], vec![]],
        ffn: vec![(0..12).map(|i| i as f32).collect(), (100..112).map(|i| i as f32).collect(), vec![200.; 12]],
        layers: vec![2., 3., 1.],
    };
    let mut budget = Budget { layers: Amount::Count(1), ..heads(Amount::Count(3)) };
    budget.ffn.amount = Amount::Count(10);
    let plan = plan(&ck.spec, &scores, &budget).unwrap();
    let want = "\
Pruning plan: 2 of 3 layers, 3 of 6 heads, 14 of 36 channels stay
parameters: 298 -> 143 (-52.0%)
layer  heads     channels       removed (score)
    0  2 of 4    2 of 12        heads 0 (0.5000), 1 (0.2500); 10 channels (0.0000 to 9.0000)
    1  1 of 2    12 of 12       heads 2 (0.1250)
    2                           the layer (1.0000)
";
    assert_eq!(plan.to_string(), want);
    assert_eq!(apply(&ck, &plan).unwrap().parameters(), plan.parameters());
}
