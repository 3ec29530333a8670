//! One sentence on several threads: the bits of one thread, whatever the shape and the storage of the weights.

#![allow(clippy::unwrap_used)]

mod reference;

use proptest::prelude::*;
use quetsch::batch::{Batch, Encoding};
use quetsch::quant::quantise;
use quetsch::rng::Rng;
use quetsch::runtime::{Arithmetic, Model, Session, Team, Workspace};
use quetsch::spec::{Activation, Family, HeadSpec, LayerShape, ModelSpec};
use reference::lively;

/// Odd sizes, large enough that every operation is split; layers without heads too.
fn specs() -> impl Strategy<Value = ModelSpec> {
    let layer = (prop::collection::vec(any::<bool>(), 5), prop::sample::select(vec![0, 1, 77, 256, 1003]));
    (prop::collection::vec(layer, 1..3), 60..200usize, 5..40usize).prop_map(|(layers, hidden, head_dim)| {
        ModelSpec {
            family: Family::Bert,
            prefix: "bert.".into(),
            vocab: 50,
            positions: 128,
            token_types: 2,
            hidden,
            head_dim,
            original_heads: 5,
            layers: layers
                .into_iter()
                .map(|(keep, ffn)| LayerShape { heads: (0..5).filter(|h| keep[usize::from(*h)]).collect(), ffn })
                .collect(),
            ffn_activation: Activation::Gelu,
            norm_eps: 1e-6,
            head: HeadSpec::Pooler { labels: 77 },
            unused_pooler: false,
        }
    })
}

fn sentences(lengths: &[usize], seed: u64) -> Vec<Encoding> {
    let mut rng = Rng::new(seed);
    let ids = |n: &usize| Encoding { ids: (0..*n).map(|_| rng.below(50) as u32).collect(), types: vec![] };
    lengths.iter().map(ids).collect()
}

const SCHEMES: [&str; 6] = ["f32", "int8", "bnb-int8", "nf4", "fp4", "int8-weight"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn an_answer_does_not_depend_on_the_number_of_threads(
        spec in specs(), lengths in prop::collection::vec(1..100usize, 1..4), seed in any::<u64>(),
        schemes in prop::sample::subsequence(vec!["query", "value", "attention_out", "ffn_up", "ffn_down"], 0..5),
        first in 0..SCHEMES.len(), floats in prop::sample::select(vec![Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8]),
    ) {
        let rules: Vec<_> = schemes.iter().enumerate().map(|(i, site)| {
            (format!("layer.*.{site}"), SCHEMES[(first + i) % SCHEMES.len()].parse().unwrap())
        }).collect();
        let model = Model::pack_for(&quantise(&lively(spec, seed), &rules, &[]).unwrap(), floats);
        let batch = Batch::new(model.spec(), &sentences(&lengths, seed)).unwrap();
        let bits = |threads: usize| -> Vec<u32> {
            let (team, mut ws) = (Team::new(threads), Workspace::default());
            // Twice: the second time buffers hold old values, and the threads are awake.
            let first = model.forward_on(&team, &mut ws, &batch).unwrap();
            assert_eq!(first, model.forward_on(&team, &mut ws, &batch).unwrap());
            first.into_iter().map(f32::to_bits).collect()
        };
        let alone: Vec<u32> =
            model.forward(&mut Workspace::default(), &batch).unwrap().into_iter().map(f32::to_bits).collect();
        for threads in [1, 2, 3, 5] {
            prop_assert_eq!(&bits(threads), &alone, "{} threads", threads);
        }
    }
}

#[test]
fn a_session_gives_the_answers_of_one_thread_in_order() {
    let model = Model::pack(&lively(reference::uneven(HeadSpec::Pooler { labels: 3 }), 5));
    let all: Vec<Encoding> = (0..200).map(|i| sentences(&[1 + i % 16], i as u64).remove(0)).map(small).collect();
    let alone: Vec<f32> = all.iter().flat_map(|e| model.logits(std::slice::from_ref(e), 1).unwrap()).collect();
    for threads in [0, 1, 2, 3, 7] {
        let session = Session::new(threads);
        for n in [200, 1, 0, 9, 200] {
            assert_eq!(session.logits(&model, &all[..n]).unwrap(), alone[..3 * n], "{n} texts, {threads} threads");
        }
    }
    let wrong = Encoding { ids: vec![30_000], types: vec![] };
    assert!(Session::new(2).logits(&model, &[all[0].clone(), wrong]).is_err());
    assert!(Session::new(2).threads_for_one() <= std::thread::available_parallelism().map_or(1, usize::from));
}

/// Ids that the uneven model has.
fn small(mut e: Encoding) -> Encoding {
    e.ids.iter_mut().for_each(|id| *id %= 30);
    e
}
