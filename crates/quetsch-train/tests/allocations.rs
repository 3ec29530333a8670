//! After the first steps, a step allocates lists of indices, but no buffer: neither activations nor gradients nor packed
//! operands. Recomputing layers needs the activations of one layer instead of all.

#![allow(clippy::unwrap_used)]

mod common;

use common::sentences;
use quetsch::batch::Encoding;
use quetsch::checkpoint::Checkpoint;
use quetsch::runtime::Model;
use quetsch::spec::{Activation, Family, HeadSpec, LayerShape, ModelSpec};
use quetsch_kernels::watch::Watched;
use quetsch_train::features::{Compare, Features, Link};
use quetsch_train::optim::{AdamW, Rates};
use quetsch_train::params::Params;
use quetsch_train::step::{Task, TrainSet, Worker, gradients};
use quetsch_train::{Dropout, Hard, Measure, Objective, Precision, Soft};
use std::sync::Mutex;

/// An index list of a batch stays below this; the smallest buffer, of 200 tokens times 64, is three times as large.
const LARGE: usize = 16 << 10;

#[global_allocator]
static ALLOCATOR: Watched = Watched::new(LARGE, usize::MAX);
/// Held by a test while it counts.
static COUNT: Mutex<()> = Mutex::new(());

/// A model of so many layers and positions.
fn spec(layers: usize, positions: usize) -> ModelSpec {
    let layer = LayerShape { heads: vec![0, 1, 2, 3], ffn: 128 };
    ModelSpec {
        family: Family::Bert,
        prefix: "bert.".into(),
        vocab: 30,
        positions,
        token_types: 2,
        hidden: 64,
        head_dim: 16,
        original_heads: 4,
        layers: vec![layer; layers],
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head: HeadSpec::MeanMlp { labels: 3 },
        unused_pooler: false,
    }
}

#[test]
fn steps_after_the_first_allocate_no_buffer() {
    let _alone = COUNT.lock().unwrap();
    let spec = spec(3, 16);
    let labels = ["a", "b", "c"].map(String::from).to_vec();
    let ck = Checkpoint::random(spec, labels, 1).unwrap();
    let encodings = sentences(300, 30, 4);
    let labels: Vec<u32> = (0..300).map(|i| i % 3).collect();
    let set = TrainSet::sentences(&encodings, &labels);
    let objective = Objective::CrossEntropy(Hard::default());
    let dropout = Dropout { hidden: 0.1, attention: 0.1, head: 0.1 };
    for precision in [Precision::F32, Precision::Bf16] {
        let mut params = Params::with(&ck, &[], precision, 2);
        let mut adamw = AdamW::new(&params);
        let mut team = Worker::team(&params, 2);
        let rates = Rates { body: 1e-4, head: 1e-4, decay: 0.01, clip: 1.0 };
        let mut counts = vec![];
        for round in 0..8 {
            for first in [0, 100, 200] {
                let before = ALLOCATOR.buffers();
                let examples: Vec<usize> = (first..first + 100).collect();
                adamw.catch_up(&mut params, examples.iter().flat_map(|e| &encodings[*e].ids));
                let task =
                    Task { params: &params, set, objective, dropout, seed: 1, masks: None, recompute: false };
                gradients(&task, round, &examples, 100, &mut team).unwrap();
                adamw.update(&mut params, &mut team, rates);
                counts.push(ALLOCATOR.buffers() - before);
            }
        }
        assert!(counts[0] > 10, "the first step makes the buffers: {counts:?}");
        // Batches of other sizes settle on buffers that fit all of them.
        assert!(counts[15..].iter().all(|n| *n == 0), "{precision:?}: {counts:?}");
    }
}

/// What a worker keeps for its forwards, twelve layers and sentences of 200 tokens.
#[test]
fn recomputing_needs_the_memory_of_a_layer() {
    let _alone = COUNT.lock().unwrap();
    let labels = ["a", "b", "c"].map(String::from).to_vec();
    let ck = Checkpoint::random(spec(12, 200), labels, 1).unwrap();
    let encodings: Vec<Encoding> = (0..3).map(|i| Encoding { ids: vec![i; 200], ..Encoding::default() }).collect();
    let labels = [0, 1, 2];
    let set = TrainSet::sentences(&encodings, &labels);
    let objective = Objective::CrossEntropy(Hard::default());
    let params = Params::with(&ck, &[], Precision::F32, 1);
    let activations = |recompute| {
        let mut team = Worker::team(&params, 1);
        let task =
            Task { params: &params, set, objective, dropout: Dropout::default(), seed: 1, masks: None, recompute };
        let before = ALLOCATOR.bytes();
        gradients(&task, 0, &[0, 1, 2], 3, &mut team).unwrap();
        ALLOCATOR.bytes() - before
    };
    let (all, one) = (activations(false), activations(true));
    // One layer's and twelve outputs: of the about 25 rows of width 64 that a token keeps in a layer, one is the output.
    assert!(one < all / 4, "{one} of {all} bytes");
}

/// Gradients that come from outside the tape, of logits and of hidden states, are not kept: no step leaves more memory
/// in use than the steps before it.
#[test]
fn learning_from_hidden_states_keeps_no_more_from_step_to_step() {
    let _alone = COUNT.lock().unwrap();
    let labels = ["a", "b", "c"].map(String::from).to_vec();
    let ck = Checkpoint::random(spec(3, 16), labels, 1).unwrap();
    let teacher = Model::pack(&ck);
    let encodings = sentences(100, 30, 4);
    let (labels, examples): (Vec<u32>, Vec<usize>) = ((0..100).map(|i| i % 3).collect(), (0..100).collect());
    let logits = teacher.logits(&encodings, 1).unwrap();
    let links = Link::of(Compare::Hidden(Measure::Mse), &[(0, vec![0]), (1, vec![1]), (2, vec![2])], 1.0);
    let features = Some(Features { teacher: &teacher, encodings: &encodings, links: &links });
    let soft = Soft { alpha: 0.5, temperature: 2.0, logits: &logits, features, ..Soft::default() };
    let params = Params::with(&ck, &[], Precision::F32, 1);
    let mut team = Worker::team(&params, 1);
    let task = Task {
        params: &params,
        set: TrainSet::sentences(&encodings, &labels),
        objective: Objective::Distill(Hard::default(), soft),
        dropout: Dropout::default(),
        seed: 1,
        masks: None,
        recompute: false,
    };
    let mut in_use = |steps: std::ops::Range<u64>| {
        steps.for_each(|step| drop(gradients(&task, step, &examples, 100, &mut team).unwrap()));
        ALLOCATOR.bytes()
    };
    let (settled, later) = (in_use(0..4), in_use(4..12));
    assert!(later <= settled + LARGE, "{settled} bytes, eight steps later {later}");
}
