use serde_json::{Value, json};

use super::*;

/// `fixtures/metrics.json`: scikit-learn's and scipy's values for two sets of logits.
fn fixture() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/metrics.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    let rows = value.as_array().unwrap().iter();
    rows.flat_map(|row| row.as_array().unwrap()).map(|x| x.as_f64().unwrap() as f32).collect()
}

fn truth(fixture: &Value) -> Vec<u32> {
    fixture["truth"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

fn names(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("LABEL_{i}")).collect()
}

/// All numbers of `expected` that `found` has under the same keys, within 1e-6: the logits went through f32.
fn differences(path: &str, expected: &Value, found: &Value) -> Vec<String> {
    match (expected, found) {
        (Value::Object(expected), found) => {
            expected.iter().flat_map(|(k, v)| differences(&format!("{path}.{k}"), v, &found[k])).collect()
        }
        (Value::Array(expected), Value::Array(found)) if expected.len() == found.len() => {
            let pairs = expected.iter().zip(found).enumerate();
            pairs.flat_map(|(i, (e, f))| differences(&format!("{path}[{i}]"), e, f)).collect()
        }
        _ => match (expected.as_f64(), found.as_f64()) {
            (Some(e), Some(f)) if (e - f).abs() < 1e-6 => Vec::new(),
            _ => vec![format!("{path}: expected {expected}, found {found}")],
        },
    }
}

#[test]
fn as_scikit_learn_and_scipy() {
    let fixture = fixture();
    let (truth, labels) = (truth(&fixture), fixture["labels"].as_u64().unwrap() as usize);
    let (parent, child) = (floats(&fixture["parent_logits"]), floats(&fixture["child_logits"]));
    let mut wrong = Vec::new();
    for (side, logits) in [("parent", &parent), ("child", &child)] {
        let mut found = serde_json::to_value(evaluate(logits, &truth, &names(labels))).unwrap();
        for key in ["precision", "recall", "f1", "support"] {
            let column: Vec<Value> =
                found["per_class"].as_array().unwrap().iter().map(|c| c[key].clone()).collect();
            found[key] = column.into();
        }
        // scikit-learn's matrix with our counts in the place of those that we list.
        let matrix: Vec<Vec<u64>> = serde_json::from_value(fixture[side]["confusion_matrix"].clone()).unwrap();
        let mut own = matrix.clone();
        let mut listed = u64::MAX;
        let index = |name: &Value| name.as_str().unwrap().trim_start_matches("LABEL_").parse::<usize>().unwrap();
        for c in found["confusions"].as_array().unwrap() {
            let (truth, predicted, count) =
                (index(&c["truth"]), index(&c["predicted"]), c["count"].as_u64().unwrap());
            (own[truth][predicted], listed) = (count, listed.min(count));
        }
        assert!(found["confusions"].as_array().unwrap().len() == CONFUSIONS, "{side}: enough to fill the list");
        let of_rank = |m: &[Vec<u64>]| {
            let cells = (0..labels).flat_map(|t| (0..labels).map(move |p| (t, p))).filter(|(t, p)| t != p);
            let mut counts: Vec<u64> = cells.map(|(t, p)| m[t][p]).collect();
            counts.sort_unstable_by(|a, b| b.cmp(a));
            counts[CONFUSIONS - 1]
        };
        assert_eq!(listed, of_rank(&matrix), "{side}: the most frequent ones are listed");
        found["confusion_matrix"] = json!(own);
        found["temperature"] = temperature(logits, &truth, labels).into();
        // A golden-section search ends within a thousandth of the best; its value differs from scipy's by no more.
        let expected = fixture[side]["temperature"].as_f64().unwrap();
        let t = found["temperature"].as_f64().unwrap();
        assert!((t / expected).ln().abs() < 1e-3, "{side}: temperature {t}, scipy's {expected}");
        found["temperature"] = expected.into();
        wrong.extend(differences(side, &fixture[side], &found));
    }
    let found = agreement(&parent, &child, &truth, labels);
    wrong.extend(differences("agreement", &fixture["agreement"], &serde_json::to_value(&found).unwrap()));
    for case in fixture["mcnemar"].as_array().unwrap() {
        let count = |key: &str| case[key].as_u64().unwrap() as usize;
        let p = mcnemar(count("parent_only"), count("child_only"));
        let expected = case["p"].as_f64().unwrap();
        if (p - expected).abs() > 1e-9 * expected {
            wrong.push(format!("{case}: {p}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");

    // Two bootstraps of other random numbers: an end of 2,000 resamples has a
    // standard error of about 0.002 here, and means of 200 rows are multiples of 0.005.
    for (bound, expected) in found.delta_interval.into_iter().zip(fixture["bootstrap_interval"].as_array().unwrap())
    {
        let expected = expected.as_f64().unwrap();
        assert!((bound - expected).abs() <= 0.0051, "{:?}, scipy's end {expected}", found.delta_interval);
    }
    // The normal approximation of a paired difference has nearly the interval of the bootstrap.
    let n = truth.len() as f64;
    let (delta, discordant) = (found.accuracy_delta, (found.mcnemar.parent_only + found.mcnemar.child_only) as f64);
    let half = Z_95 * ((discordant / n - delta * delta) / n).sqrt();
    for (bound, expected) in found.delta_interval.into_iter().zip([delta - half, delta + half]) {
        assert!((bound - expected).abs() < 0.01, "{:?}, expected about {expected}", found.delta_interval);
    }
    assert_eq!(found.delta_interval, agreement(&parent, &child, &truth, labels).delta_interval);
}

#[test]
fn by_hand() {
    // Predictions 0, 1, 1, 0 for truths 0, 1, 0, 0; label 2 never occurs and stays out of the macro mean.
    let logits = [3.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 1.0, 1.0, 0.0];
    let m = evaluate(&logits, &[0, 1, 0, 0], &names(3));
    assert_eq!((m.n, m.accuracy, m.top_3), (4, 0.75, 1.0));
    assert_eq!(m.per_class[0].precision, 1.0);
    assert_eq!(m.per_class[0].recall, 2.0 / 3.0);
    assert_eq!([m.per_class[0].f1, m.per_class[1].f1, m.per_class[2].f1], [0.8, 2.0 / 3.0, 0.0]);
    assert!((m.macro_f1 - (0.8 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
    assert_eq!(m.confusions, [Confusion { truth: "LABEL_0".into(), predicted: "LABEL_1".into(), count: 1 }]);

    // Two equal rows out of two flipped; two labels, so that top 3 is all.
    let a = agreement(&[1.0, 0.0, 1.0, 0.0], &[0.0, 1.0, 0.0, 1.0], &[0, 1], 2);
    assert_eq!((a.flips, a.flip_rate, a.agreement, a.flipped), (2, 1.0, 0.0, vec![0, 1]));
    assert_eq!(a.mcnemar, McNemar { parent_only: 1, child_only: 1, p: 1.0 });
    // KL((s, 1 - s) || (1 - s, s)) = (2s - 1) ln(s / (1 - s)), here with s = sigmoid(1): tanh(1/2) * 1.
    assert!((a.mean_kl - 0.5f64.tanh()).abs() < 1e-12);
    assert_eq!(evaluate(&[1.0, 0.0], &[1], &names(2)).top_3, 1.0);

    let same = agreement(&logits, &logits, &[0, 1, 0, 0], 3);
    assert_eq!((same.flips, same.mean_kl, same.accuracy_delta, same.delta_interval), (0, 0.0, 0.0, [0.0, 0.0]));
}

#[test]
fn ties_go_to_the_lowest_index_and_nan_is_last() {
    let nan = f32::NAN;
    let table: [(&[f32], &[usize]); 6] = [
        (&[1.0, 3.0, 3.0, 2.0], &[1, 2, 3]),
        (&[0.0, -0.0, 0.0], &[0, 1, 2]),
        (&[nan, 1.0, nan, 2.0], &[3, 1, 0]),
        (&[nan, nan], &[0, 1]),
        (&[f32::NEG_INFINITY, nan, f32::INFINITY], &[2, 0, 1]),
        (&[], &[]),
    ];
    for (row, expected) in table {
        assert_eq!(top_k(row, 3), expected, "{row:?}");
        assert_eq!(argmax(row), expected.first().copied().unwrap_or(0), "{row:?}");
    }
}

#[test]
fn strange_numbers_never_panic() {
    let rows = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, f32::MAX];
    let logits: Vec<f32> = rows.iter().flat_map(|&a| rows.map(|b| [a, b])).flatten().collect();
    let truth = vec![1; logits.len() / 2];
    let m = evaluate(&logits, &truth, &names(2));
    assert!(m.loss.is_nan() && m.accuracy > 0.0);
    assert_eq!(serde_json::to_value(&m).unwrap()["loss"], json!(null));
    assert!(agreement(&logits, &logits, &truth, 2).mean_kl.is_nan());
    // Certainty is not a NaN.
    let certain = [0.0, f32::NEG_INFINITY];
    assert_eq!(agreement(&certain, &certain, &[0], 2).mean_kl, 0.0);
    // Nothing measured.
    assert!(evaluate(&[], &[], &names(2)).accuracy.is_nan());
    assert_eq!(agreement(&[], &[], &[], 2).flips, 0);
}

#[test]
fn softmax_sums_to_one() {
    let mut row = [1000.0, 1000.0, -1000.0];
    softmax(&mut row);
    assert_eq!(row, [0.5, 0.5, 0.0]);
}

#[test]
fn wilson_stays_in_bounds() {
    // 1 / (1 + n / z^2) and its mirror image.
    let edge = Z_95 * Z_95 / (10.0 + Z_95 * Z_95);
    for (correct, n, expected) in [(0, 10, [0.0, edge]), (10, 10, [1.0 - edge, 1.0]), (0, 0, [0.0, 1.0])] {
        let found = wilson(correct, n);
        let close = found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-12);
        assert!(close, "{correct} of {n}: {found:?}, expected {expected:?}");
    }
}

#[test]
fn reliability_bins_hold_every_row_and_make_the_ece() {
    let fixture = fixture();
    let (truth, labels) = (truth(&fixture), fixture["labels"].as_u64().unwrap() as usize);
    let m = evaluate(&floats(&fixture["parent_logits"]), &truth, &names(labels));
    assert_eq!(m.reliability.iter().map(|bin| bin.n).sum::<usize>(), m.n);
    let gaps = m.reliability.iter().map(|bin| bin.n as f64 * (bin.confidence - bin.accuracy).abs());
    assert!((gaps.sum::<f64>() / m.n as f64 - m.ece).abs() < 1e-12);
    assert!(m.reliability.windows(2).all(|w| w[0].confidence < w[1].confidence));
}

/// Of ten rows at logit `x` against 0, eight are right: the best probability is 0.8, its logit ln 4.
#[test]
fn a_temperature_beyond_the_search_is_known_as_such() {
    // Always right: the surer the better. Always wrong: the less sure the better.
    for truth in [[0, 1], [1, 0]] {
        let t = temperature(&[3.0, 0.0, 0.0, 3.0], &truth, 2);
        assert!(is_at_bound(t), "{truth:?}: {t}");
    }
    assert!(!is_at_bound(1.0));
}

#[test]
fn temperature_finds_the_frequencies() {
    let truth: Vec<u32> = (0..10).map(|i| u32::from(i >= 8)).collect();
    for x in [0.5f32, 1.0, 4.0, 9.0] {
        let logits: Vec<f32> = [x, 0.0].repeat(10);
        let found = temperature(&logits, &truth, 2);
        let expected = f64::from(x) / 4f64.ln();
        assert!((found / expected - 1.0).abs() < 2e-3, "{x}: {found}, expected {expected}");
    }
}
