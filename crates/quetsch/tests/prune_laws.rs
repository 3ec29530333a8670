//! The laws of pruning, on random small models, against the plain f64 forward and against the runtime.

#![allow(clippy::unwrap_used)]

mod reference;

use proptest::prelude::*;
use quetsch::batch::{Batch, Encoding};
use quetsch::checkpoint::{Checkpoint, FloatType, Stored};
use quetsch::hooks;
use quetsch::ops::{self, Inspect, With};
use quetsch::prune::{Amount, Budget, Cut, Magnitude, Plan, Scope, Scores};
use quetsch::prune::{Tune, activation, apply, compact, dense, keep_layers, magnitude, masks, plan, tune};
use quetsch::quant::{Scheme, quantise};
use quetsch::rng::Rng;
use quetsch::runtime::{CpuOps, Model, Workspace};
use quetsch::spec::{Activation, At, Family, HeadSpec, LayerShape, Lin, ModelSpec, Tensor};
use reference::{Masks, forward, lively, worst};

/// The f64 forward sums in order, so zero terms change nothing: the largest distance of 20,000 random models was 0.
const TINY: f64 = 1e-12;
/// f32 against f32 of other shapes, and against f64: the largest distance of 20,000 random models was 3e-6.
const SMALL: f64 = 1e-4;

/// A small spec; layers without heads and without channels included. The large epsilon keeps LayerNorm from magnifying
/// rounding where a row of so few numbers happens to be nearly constant.
fn specs() -> impl Strategy<Value = ModelSpec> {
    let layer = (prop::collection::vec(any::<bool>(), 4), 0..9usize);
    let head = prop_oneof![
        Just(HeadSpec::None),
        (1..4usize).prop_map(|labels| HeadSpec::MeanMlp { labels }),
        (1..4usize).prop_map(|labels| HeadSpec::Pooler { labels }),
        (1..4usize).prop_map(|labels| HeadSpec::Tokens { labels }),
    ];
    let layers = prop::collection::vec(layer, 1..4);
    let family = prop::sample::select(reference::FAMILIES.to_vec());
    (layers, 4..9usize, 1..4usize, 1..5u16, head, any::<bool>(), family).prop_map(
        |(layers, hidden, head_dim, original_heads, head, gelu, family)| {
            let spec = ModelSpec {
                family: Family::Bert,
                prefix: if head == HeadSpec::None { "".into() } else { "bert.".into() },
                vocab: 20,
                positions: 8,
                token_types: 2,
                hidden,
                head_dim,
                original_heads,
                layers: layers
                    .into_iter()
                    .map(|(keep, ffn)| LayerShape {
                        heads: (0..original_heads).filter(|h| keep[*h as usize]).collect(),
                        ffn,
                    })
                    .collect(),
                ffn_activation: if gelu { Activation::Gelu } else { Activation::Relu },
                norm_eps: 1e-2,
                head,
                unused_pooler: false,
            };
            reference::in_family(spec, family)
        },
    )
}

/// Three sentences of random length.
fn batch(spec: &ModelSpec, seed: u64) -> Batch {
    let mut rng = Rng::new(seed);
    let sentences: Vec<Encoding> = (0..3)
        .map(|_| {
            let n = 1 + rng.below(spec.longest());
            let ids = (0..n).map(|_| rng.below(spec.vocab) as u32).collect();
            Encoding { ids, types: (0..n).map(|_| rng.below(spec.token_types.max(1)) as u32).collect() }
        })
        .collect();
    Batch::new(spec, &sentences).unwrap()
}

/// The runtime's forward, masked at the taps.
fn run(ck: &Checkpoint, batch: &Batch, masks: Masks) -> Vec<f64> {
    let (model, mut ws) = (Model::pack(ck), Workspace::default());
    let mut cpu = CpuOps::new(&model, &mut ws);
    let y = ops::forward(&mut With { ops: &mut cpu, hook: &hooks::Masks(masks) }, &ck.spec, batch);
    cpu.values(&y).into_iter().map(f64::from).collect()
}

/// A random plan that is legal: where a layer would lose everything, its channels stay.
fn random_plan(spec: &ModelSpec, seed: u64) -> Plan {
    let mut plan = plan(spec, &Scores::default(), &Budget::default()).unwrap();
    let mut rng = Rng::new(seed);
    for (l, layer) in spec.layers.iter().enumerate() {
        let mut coin = || rng.below(2) == 0;
        let heads: Vec<u16> = layer.heads.iter().copied().filter(|_| coin()).collect();
        let ffn: Vec<usize> = (0..layer.ffn).filter(|_| coin()).collect();
        let nothing_left = heads.len() == layer.heads.len() && ffn.len() == layer.ffn;
        if !nothing_left {
            (plan.heads[l], plan.ffn[l]) = (heads, ffn);
        }
    }
    plan
}

fn random_scores(spec: &ModelSpec, seed: u64) -> Scores {
    let mut rng = Rng::new(seed);
    // Few different values, so that ties happen.
    let mut some = |n: usize| (0..n).map(|_| rng.below(6) as f32).collect::<Vec<_>>();
    Scores {
        heads: spec.layers.iter().map(|s| some(s.heads.len())).collect(),
        ffn: spec.layers.iter().map(|s| some(s.ffn)).collect(),
        layers: some(spec.layers.len()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    /// Masking the groups, then forward == applying the plan, then forward.
    #[test]
    fn masking_is_pruning(spec in specs(), seed in any::<u64>()) {
        let ck = lively(spec.clone(), seed);
        let (plan, batch) = (random_plan(&spec, seed ^ 1), batch(&spec, seed ^ 2));
        let masked = forward(&ck, &batch, &masks(&spec, &plan).unwrap());
        let pruned = apply(&ck, &plan).unwrap();
        prop_assert!(worst(&masked, forward(&pruned, &batch, &Masks::new())) < TINY);
        prop_assert_eq!(plan.parameters(), pruned.parameters());
        prop_assert_eq!(plan.child(&spec).unwrap(), pruned.spec);
    }

    /// The same law on the runtime, and the runtime against the plain f64 forward.
    #[test]
    fn masking_is_pruning_in_the_runtime(spec in specs(), seed in any::<u64>()) {
        let ck = lively(spec.clone(), seed);
        let (plan, batch) = (random_plan(&spec, seed ^ 1), batch(&spec, seed ^ 2));
        let masks = masks(&spec, &plan).unwrap();
        let masked = run(&ck, &batch, masks.clone());
        let pruned = apply(&ck, &plan).unwrap();
        prop_assert!(worst(&masked, run(&pruned, &batch, Masks::new())) < SMALL);
        prop_assert!(worst(&masked, forward(&ck, &batch, &masks)) < SMALL);
        let dense = dense(&pruned).unwrap();
        prop_assert!(worst(&masked, run(&dense, &batch, Masks::new())) < SMALL);
    }

    /// The layers that are kept are those, tensor by tensor of the file.
    #[test]
    fn kept_layers_are_copied_whole(spec in specs(), seed in any::<u64>()) {
        let ck = lively(spec.clone(), seed);
        let mut layers: Vec<usize> = (0..spec.layers.len()).collect();
        let mut rng = Rng::new(seed);
        rng.shuffle(&mut layers);
        layers.truncate(1 + rng.below(layers.len()));
        let kept = keep_layers(&ck, &layers).unwrap();
        let named: std::collections::HashMap<String, Vec<f32>> =
            ck.tensors().map(|(def, _)| (def.name.clone(), ck.values(def.tensor).into_owned())).collect();
        let mut seen = 0;
        for (def, _) in kept.tensors() {
            let place = |l: usize| format!("layer.{l}.");
            let here = (0..layers.len()).find(|l| def.name.contains(&place(*l)));
            let name = here.map_or(def.name.clone(), |l| def.name.replace(&place(l), &place(layers[l])));
            prop_assert_eq!(&named[&name], &*kept.values(def.tensor), "{} from {}", def.name, name);
            seen += usize::from(here.is_some());
        }
        prop_assert!(seen >= layers.len());
    }

    /// Two plans one after the other == the two as one.
    #[test]
    fn plans_add_up(spec in specs(), seed in any::<u64>(), drops in any::<[bool; 2]>()) {
        let ck = lively(spec.clone(), seed);
        let some = |spec: &ModelSpec, seed: u64, drops: bool| {
            let mut plan = random_plan(spec, seed);
            if drops && spec.layers.len() > 1 {
                let l = Rng::new(seed).below(spec.layers.len());
                plan.layers.push(l);
                plan.heads[l].clear();
                plan.ffn[l].clear();
            }
            plan
        };
        let first = some(&spec, seed ^ 1, drops[0]);
        let between = apply(&ck, &first).unwrap();
        let second = some(&between.spec, seed ^ 2, drops[1]);
        let both = first.then(&spec, &second).unwrap();
        let (steps, once) = (apply(&between, &second).unwrap(), apply(&ck, &both).unwrap());
        prop_assert_eq!(&steps.spec, &once.spec);
        for (def, _) in steps.tensors() {
            prop_assert_eq!(steps.values(def.tensor), once.values(def.tensor), "{}", def.name);
        }
        prop_assert!(second.then(&between.spec, &first).is_err() || first.parent == second.parent);
    }

    /// Dropping layers and cutting groups in one plan == keeping the layers, then cutting.
    #[test]
    fn dropping_is_keeping_the_others(spec in specs(), seed in any::<u64>(), drop in 0..3usize) {
        prop_assume!(spec.layers.len() > 1 && drop < spec.layers.len());
        let ck = lively(spec.clone(), seed);
        let mut both = random_plan(&spec, seed ^ 1);
        both.layers = vec![drop];
        both.heads[drop].clear();
        both.ffn[drop].clear();
        let kept = keep_layers(&ck, &both.kept_layers()).unwrap();
        let mut rest = plan(&kept.spec, &Scores::default(), &Budget::default()).unwrap();
        rest.heads = both.kept_layers().into_iter().map(|l| both.heads[l].clone()).collect();
        rest.ffn = both.kept_layers().into_iter().map(|l| both.ffn[l].clone()).collect();
        let (once, twice) = (apply(&ck, &both).unwrap(), apply(&kept, &rest).unwrap());
        prop_assert_eq!(&once.spec, &twice.spec);
        prop_assert!(once.tensors().eq(twice.tensors()));
        prop_assert_eq!(both.parameters(), once.parameters());
    }

    /// The dense layout computes the same.
    #[test]
    fn dense_changes_no_answer(spec in specs(), seed in any::<u64>()) {
        let (ck, batch) = (lively(spec.clone(), seed), batch(&spec, seed));
        let dense = dense(&ck).unwrap();
        let all: Vec<u16> = (0..spec.original_heads).collect();
        let widest = spec.layers.iter().map(|s| s.ffn).max().unwrap();
        prop_assert!(dense.spec.layers.iter().all(|s| s.heads == all && s.ffn == widest));
        let (compact, dense) = (forward(&ck, &batch, &Masks::new()), forward(&dense, &batch, &Masks::new()));
        prop_assert!(worst(&compact, dense) < TINY);
    }

    /// What a dense layout adds, `compact` finds and takes out again: the same values or int8 codes, to the bit.
    #[test]
    fn compact_undoes_dense(spec in specs(), seed in any::<u64>(), scheme in 0..3usize) {
        let scheme = [Scheme::F32, Scheme::Bf16, Scheme::Int8][scheme];
        let ck = quantise(&lively(spec, seed), &[("*".into(), scheme)], &[]).unwrap();
        let back = compact(&dense(&ck).unwrap()).unwrap();
        prop_assert_eq!(&back.spec, &ck.spec);
        prop_assert!(back.tensors().eq(ck.tensors()));
    }

    /// Groups that write and read nothing go, whatever their queries and keys are, and no answer changes.
    #[test]
    fn compact_changes_no_answer(spec in specs(), seed in any::<u64>()) {
        let (mut ck, plan, batch) = (lively(spec.clone(), seed), random_plan(&spec, seed ^ 1), batch(&spec, seed));
        let (kept, padded) = (apply(&ck, &plan).unwrap(), dense(&apply(&ck, &plan).unwrap()).unwrap());
        let zeros = |l: usize| [Lin::Value(l), Lin::Out(l)].map(Tensor::W).into_iter().chain([Tensor::B(Lin::Value(l))]);
        for l in (0..spec.layers.len()).filter(|l| spec.layers[*l].heads.len() == usize::from(spec.original_heads)) {
            zeros(l).for_each(|t| ck.set(t, padded.get(t).clone()));
        }
        let small = compact(&ck).unwrap();
        for (l, shape) in spec.layers.iter().enumerate() {
            let whole = shape.heads.len() == usize::from(spec.original_heads);
            let expected = if whole { &kept.spec.layers[l].heads } else { &shape.heads };
            prop_assert_eq!(&small.spec.layers[l].heads, expected);
        }
        let (with, without) = (forward(&ck, &batch, &Masks::new()), forward(&small, &batch, &Masks::new()));
        prop_assert!(worst(&with, without) < TINY);
    }

    /// Whatever the budget: an error in words, or a plan that keeps its promises.
    #[test]
    fn plans_keep_their_budget(
        spec in specs(), seed in any::<u64>(), share in 0.0..1.0f64, limit in 0.0..1.0f64, align in 1..5usize,
        global in any::<bool>(),
    ) {
        let scope = if global { Scope::Global } else { Scope::PerLayer };
        let cut = Cut { amount: Amount::Fraction(share), scope, max_per_layer: limit, align };
        let budget = Budget { heads: cut.clone(), ffn: cut, layers: Amount::Nothing };
        let scores = random_scores(&spec, seed);
        let Ok(plan) = plan(&spec, &scores, &budget) else { return Ok(()) };
        let heads: Vec<Vec<usize>> = spec.layers.iter().zip(&plan.heads)
            .map(|(s, p)| p.iter().map(|h| s.heads.iter().position(|x| x == h).unwrap()).collect()).collect();
        let sizes = |f: &dyn Fn(&LayerShape) -> usize| spec.layers.iter().map(f).collect::<Vec<_>>();
        for (removed, sizes, scores) in [
            (&heads, sizes(&|s| s.heads.len()), &scores.heads),
            (&plan.ffn, sizes(&|s| s.ffn), &scores.ffn),
        ] {
            let total: usize = removed.iter().map(Vec::len).sum();
            if global {
                let wanted = (share * sizes.iter().sum::<usize>() as f64).round() as usize;
                prop_assert!(total <= wanted && (align > 1 || total == wanted));
            }
            for (l, &n) in sizes.iter().enumerate() {
                let kept = n - removed[l].len();
                prop_assert!(removed[l].len() as f64 <= limit * n as f64 + 1e-6);
                prop_assert!(kept == n || kept % align == 0);
                let wanted = (share * n as f64).round() as usize;
                prop_assert!(global || align > 1 || removed[l].len() == wanted);
                // The lowest of the layer go, the first of equals.
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|&a, &b| scores[l][a].total_cmp(&scores[l][b]));
                let mut lowest = order[..removed[l].len()].to_vec();
                lowest.sort_unstable();
                prop_assert_eq!(&lowest, &removed[l]);
            }
        }
        let json = serde_json::to_string(&plan).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Plan>(&json).unwrap(), &plan);
        prop_assert!(apply(&lively(spec, seed), &plan).is_ok());
    }
}

/// A few float types go through surgery untouched.
#[test]
fn float_types_survive() {
    let mut ck = lively(reference::uneven(HeadSpec::MeanMlp { labels: 3 }), 1);
    for (tensor, dtype) in [(Tensor::W(Lin::Out(0)), FloatType::F16), (Tensor::B(Lin::Up(0)), FloatType::Bf16)] {
        let data = ck.values(tensor).iter().map(|&x| dtype.round(x)).collect();
        ck.set(tensor, Stored::Float { dtype, data });
    }
    let cut = Cut { amount: Amount::Count(2), ..Cut::default() };
    let budget = Budget { heads: cut.clone(), ffn: cut, ..Budget::default() };
    let plan = plan(&ck.spec, &magnitude(&ck, Magnitude::L2), &budget).unwrap();
    let pruned = apply(&ck, &plan).unwrap();
    let kind = |ck: &Checkpoint, t| match ck.get(t) {
        Stored::Float { dtype, .. } => Some(*dtype),
        _ => None,
    };
    for ck in [&pruned, &dense(&pruned).unwrap(), &keep_layers(&ck, &[0]).unwrap()] {
        assert_eq!(kind(ck, Tensor::W(Lin::Out(0))), Some(FloatType::F16));
        assert_eq!(kind(ck, Tensor::B(Lin::Up(0))), Some(FloatType::Bf16));
        assert_eq!(kind(ck, Tensor::W(Lin::Up(0))), Some(FloatType::F32));
    }
}

/// What a model has at a place on these sentences.
fn seen(ck: &Checkpoint, sentences: &[Encoding], at: At) -> Vec<f64> {
    let (model, mut ws) = (Model::pack(ck), Workspace::default());
    let batch = Batch::new(&ck.spec, sentences).unwrap();
    let mut record = hooks::Record { want: vec![at], got: Default::default() };
    ops::forward(&mut With { ops: &mut CpuOps::new(&model, &mut ws), hook: &mut record }, &ck.spec, &batch);
    record.got.remove(&at).unwrap().into_iter().map(f64::from).collect()
}

fn some_sentences(spec: &ModelSpec, n: usize, seed: u64) -> Vec<Encoding> {
    let mut rng = Rng::new(seed);
    let mut one = |_| {
        let len = 1 + rng.below(spec.longest());
        Encoding { ids: (0..len).map(|_| rng.below(spec.vocab) as u32).collect(), types: vec![] }
    };
    (0..n).map(&mut one).collect()
}

/// By their definition, in f64: the root of the mean squared length of what a group adds.
#[test]
fn activation_scores_are_what_groups_add() {
    let ck = lively(reference::uneven(HeadSpec::MeanMlp { labels: 3 }), 1);
    let sentences = some_sentences(&ck.spec, 70, 4);
    let tokens: usize = sentences.iter().map(|s| s.ids.len()).sum();
    let hidden = ck.spec.hidden;
    let length = |at: At, site: Lin, from: usize, to: usize| {
        let (x, w) = (seen(&ck, &sentences, at), ck.values(Tensor::W(site)));
        let n = w.len() / hidden;
        let added = x.chunks(n).flat_map(|h| {
            let w = &w;
            (0..hidden).map(move |o| (from..to).map(|i| f64::from(w[o * n + i]) * h[i]).sum::<f64>())
        });
        (added.map(|v| v * v).sum::<f64>() / tokens as f64).sqrt()
    };
    let cosine = |l: usize| {
        let before = seen(&ck, &sentences, if l == 0 { At::Embedded } else { At::Hidden(l - 1) });
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let after = seen(&ck, &sentences, At::Hidden(l));
        let rows = before.chunks(hidden).zip(after.chunks(hidden));
        let far = rows.map(|(a, b)| 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).sum::<f64>();
        far / tokens as f64
    };
    for threads in [1, 2] {
        let scores = activation(&ck, &sentences, threads).unwrap();
        let close =
            |got: f32, want: f64| assert!((f64::from(got) - want).abs() < 1e-4 * want.max(1.0), "{got} {want}");
        for (l, layer) in ck.spec.layers.iter().enumerate() {
            let d = ck.spec.head_dim;
            assert_eq!((scores.heads[l].len(), scores.ffn[l].len()), (layer.heads.len(), layer.ffn));
            for (h, s) in scores.heads[l].iter().enumerate() {
                close(*s, length(At::Context(l), Lin::Out(l), h * d, (h + 1) * d));
            }
            for (c, s) in scores.ffn[l].iter().enumerate() {
                close(*s, length(At::FfnHidden(l), Lin::Down(l), c, c + 1));
            }
            close(scores.layers[l], cosine(l));
        }
    }
    assert!(activation(&ck, &[], 1).is_err());
}

/// The fitted matrices solve their normal equations, in f64; and what was removed but can be told from the rest is back.
#[test]
fn tuning_is_least_squares() {
    let mut parent = lively(reference::uneven(HeadSpec::MeanMlp { labels: 3 }), 1);
    let (hidden, ffn) = (parent.spec.hidden, parent.spec.layers[0].ffn);
    // The second channel of layer 0 does what the first does, loud enough for the ridge not to hold its factor back.
    let mut twin = |t: Tensor, at: &dyn Fn(usize) -> usize, step: usize, n: usize, loud: f32| {
        let mut w = parent.values(t).into_owned();
        (0..n).for_each(|i| w[at(0) + i * step] *= loud);
        (0..n).for_each(|i| w[at(1) + i * step] = w[at(0) + i * step]);
        parent.set(t, Stored::f32(w));
    };
    twin(Tensor::W(Lin::Up(0)), &|c| c * hidden, 1, hidden, 8.0);
    twin(Tensor::B(Lin::Up(0)), &|c| c, 1, 1, 8.0);
    twin(Tensor::W(Lin::Down(0)), &|c| c, ffn, hidden, 1.0);
    let sentences = some_sentences(&parent.spec, 90, 4);
    let cut = |heads: &[(usize, Vec<usize>)], ffn: &[(usize, Vec<usize>)]| {
        let list = |l: &[(usize, Vec<usize>)]| Amount::List(l.iter().cloned().collect());
        let cut = |l| Cut { amount: list(l), ..Cut::default() };
        let budget = Budget { heads: cut(heads), ffn: cut(ffn), ..Budget::default() };
        plan(&parent.spec, &Scores::default(), &budget).unwrap()
    };
    let logits = |ck: &Checkpoint| Model::pack(ck).logits(&sentences, 1).unwrap();
    let far = |ck: &Checkpoint| -> f64 {
        logits(ck).iter().zip(logits(&parent)).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    let plan = cut(&[], &[(0, vec![1])]);
    let child = apply(&parent, &plan).unwrap();
    for how in [Tune::Mask, Tune::Weights] {
        let tuned = tune(&parent, &child, &plan, &sentences, how, 2).unwrap();
        assert!(far(&tuned) < 0.02 * far(&child), "{how:?}: {} of {}", far(&tuned), far(&child));
        let same = tune(&parent, &parent, &cut(&[], &[]), &sentences, how, 2).unwrap();
        assert!(far(&same) < 1e-6, "nothing is missing: {}", far(&same));
    }
    let gone = parent.spec.layers[0].heads[0].into();
    let plan = cut(&[(0, vec![gone])], &[(0, vec![1, 2]), (2, vec![0])]);
    let child = apply(&parent, &plan).unwrap();
    let (site, at) = (Tensor::W(Lin::Out(0)), At::Context(0));
    let (h, k) = (seen(&parent, &sentences, at), seen(&child, &sentences, at));
    let values = |ck: &Checkpoint| ck.values(site).iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
    let (w, v) = (values(&parent), values(&child));
    let (m, n) = (w.len() / hidden, v.len() / hidden);
    for (how, unit) in [(Tune::Weights, 1), (Tune::Mask, parent.spec.head_dim)] {
        let tuned = tune(&parent, &child, &plan, &sentences, how, 1).unwrap();
        let fitted = values(&tuned);
        let groups = n / unit;
        // What is free, and what a step of it adds to the output: an element of the matrix, or a factor of its group.
        let free = |o: usize, i: usize| if how == Tune::Mask { i / unit } else { o * n + i };
        let slope = |o: usize, i: usize| if how == Tune::Mask { v[o * n + i] } else { 1.0 };
        let mut gradient = vec![0.0; if how == Tune::Mask { groups } else { v.len() }];
        let (mut diagonal, mut size) = (0.0, 0.0f64);
        for (h, k) in h.chunks(m).zip(k.chunks(n)) {
            for o in 0..hidden {
                let dot = |w: &[f64], x: &[f64], n: usize| (0..n).map(|i| w[o * n + i] * x[i]).sum::<f64>();
                let r = dot(&fitted, k, n) - dot(&w, h, m);
                (0..n).for_each(|i| gradient[free(o, i)] += r * k[i] * slope(o, i));
                size = size.max((dot(&v, k, n) - dot(&w, h, m)).abs());
                // The trace of the normal matrix over its rows; that of the weights is the same for every output.
                let add = |g: usize| (g * unit..(g + 1) * unit).map(|i| k[i] * slope(o, i)).sum::<f64>().powi(2);
                let outputs = if how == Tune::Mask { 1.0 } else { hidden as f64 };
                diagonal += (0..groups).map(add).sum::<f64>() / groups as f64 / outputs;
            }
        }
        let moved = |o: usize, i: usize| (fitted[o * n + i] - v[o * n + i]) / slope(o, i);
        for (o, i) in (0..hidden).flat_map(|o| (0..n).map(move |i| (o, i))) {
            // Every element of a group tells the same factor: the first is asked.
            if how == Tune::Weights || o == 0 && i % unit == 0 {
                gradient[free(o, i)] += 0.01 * diagonal * moved(o, i);
            }
        }
        let worst = gradient.iter().fold(0.0f64, |m, g| m.max(g.abs()));
        assert!(worst < 1e-3 * diagonal * size, "{how:?}: {worst} with {diagonal} and {size}");
        // All tokens' logits come nearer where every weight is free; a factor for each group only serves its own sum.
        assert!(how == Tune::Mask || far(&tuned) < far(&child), "{} of {}", far(&tuned), far(&child));
    }
    let other = cut(&[], &[(1, vec![0])]);
    assert!(tune(&parent, &child, &other, &sentences, Tune::Mask, 1).is_err());
    // Later layers are fitted to what the ones before give now: an uncut layer after a cut moves back towards the parent.
    let plan = cut(&[], &[(0, vec![0, 1, 2])]);
    let child = apply(&parent, &plan).unwrap();
    let tuned = tune(&parent, &child, &plan, &sentences, Tune::Weights, 1).unwrap();
    let mut first = child.clone();
    for t in [Tensor::W(Lin::Out(0)), Tensor::W(Lin::Down(0))] {
        first.set(t, tuned.get(t).clone());
    }
    assert!(far(&tuned) < far(&first) && far(&first) < far(&child), "{} {}", far(&tuned), far(&first));
}

/// 4-bit blocks run across heads: what a layout changes comes out as the values it had, what it leaves alone keeps its
/// codes; and so does all of int8.
#[test]
fn layouts_of_quantised_models_keep_what_they_can() {
    let spec = reference::uneven(HeadSpec::Pooler { labels: 3 });
    for scheme in ["nf4", "fp4", "int8", "bnb-int8"] {
        let ck = quantise(&lively(spec.clone(), 5), &[("*".into(), scheme.parse().unwrap())], &[]).unwrap();
        let padded = dense(&ck).unwrap();
        for ((def, stored), (_, old)) in padded.tensors().zip(ck.tensors()) {
            let cut = def.len() != old.len();
            match stored {
                Stored::Float { .. } => assert!(cut || matches!(old, Stored::Float { .. }), "{}", def.name),
                _ => assert!(!(cut && scheme.ends_with("4")), "{}", def.name),
            }
        }
        let back = compact(&padded).unwrap();
        assert_eq!(back.spec, ck.spec, "{scheme}");
        back.tensors()
            .zip(ck.tensors())
            .for_each(|((def, a), (_, b))| assert_eq!(a.values(), b.values(), "{}", def.name));
    }
}
