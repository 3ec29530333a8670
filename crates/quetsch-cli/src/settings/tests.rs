//! Tests of `settings`.

use super::*;

#[test]
fn defaults_are_clean_and_ranges_are_checked() {
    let errors = |f: Vec<Finding>| f.iter().filter(|f| f.level == Level::Error).count();
    let distill =
        |alpha, temperature| Distill { kd: Kd { alpha, temperature, ..Default::default() }, ..Default::default() };
    let rows = [
        (distill(0.3, 3.0), 0, 0),
        (distill(0.2, 2.0), 0, 0),
        (distill(0.5, 4.0), 0, 0),
        (distill(0.1, 3.0), 0, 1),
        (distill(0.9, 8.0), 0, 2),
        (distill(1.5, 3.0), 1, 0),
        (distill(-0.1, 0.0), 2, 0),
        (distill(f64::NAN, f64::NAN), 2, 0),
    ];
    for (settings, e, w) in rows {
        let found = settings.check();
        assert_eq!((errors(found.clone()), found.len() - errors(found.clone())), (e, w), "{found:?}");
    }
    assert_eq!(errors(Prune::default().check()), 1, "pruning nothing is an error");
    assert_eq!(Train::default().check(), vec![]);
    let training = |t: Training| errors(Train { training: t, ..Default::default() }.check());
    let base = Training { epochs: 5, keep: KeepEpoch::Best, ..Default::default() };
    for (t, e) in [
        (Training { patience: 2, ..base.clone() }, 0),
        (Training { patience: 5, ..base.clone() }, 1),
        (Training { patience: 2, keep: KeepEpoch::Last, ..base.clone() }, 1),
        (Training { label_smoothing: 0.99, ..base.clone() }, 0),
        (Training { label_smoothing: 1.0, ..base.clone() }, 1),
        (Training { label_smoothing: f64::NAN, ..base.clone() }, 1),
    ] {
        assert_eq!(training(t.clone()), e, "{t:?}");
    }
}

#[test]
fn points_are_written_with_and_without_their_unit() {
    for text in ["budget = 0.25", "budget = \"0.25pt\""] {
        assert_eq!(toml::from_str::<Quantize>(text).expect(text).budget, crate::values::Points(0.25));
    }
}

#[test]
fn vocabularies_are_written_as_they_are_read() {
    for (text, want) in
        [("all", Vocab::All), ("train", Vocab::Train { first: 0 }), ("train+10000", Vocab::Train { first: 10_000 })]
    {
        assert_eq!(text.parse(), Ok(want));
        assert_eq!(want.to_string(), text);
    }
    for text in ["", "some", "train+", "train+0", "train+x", "train+-1", "train 5"] {
        assert!(text.parse::<Vocab>().is_err_and(|e| e.contains("train+N")), "{text}");
    }
}

#[test]
fn flags_and_keys_have_the_same_defaults() {
    fn same<T: Settings + PartialEq + std::fmt::Debug + clap::FromArgMatches>() {
        let command = T::augment_args(clap::Command::new("x").no_binary_name(true));
        let flags = T::from_arg_matches(&command.get_matches_from(Vec::<String>::new())).expect("defaults parse");
        assert_eq!(flags, T::default());
        let keys: T = toml::from_str("").expect("all keys are optional");
        assert_eq!(keys, T::default());
        let written = toml::to_string(&T::default()).expect("settings are TOML");
        for key in toml::from_str::<toml::Table>(&written).expect("own TOML").keys() {
            assert!(T::keys().contains(key), "{key} is a key without a flag");
        }
        assert_eq!(toml::from_str::<T>(&written).expect("round trip"), T::default());
    }
    same::<Data>();
    same::<Train>();
    same::<Distill>();
    same::<Prune>();
    same::<Quantize>();
    same::<Eval>();
    same::<Compare>();
    same::<Search>();
    same::<Space>();
}
