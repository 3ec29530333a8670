//! Tests of `report`, on a comparison made by hand.

use super::*;
use crate::work::compare::{Chosen, Flip, Measured};
use crate::work::gate::Checked;
use crate::work::machine;
use crate::work::parts::{Part, Storage};
use crate::work::quantize::{Drop, Sensitivity, Site};
use quetsch::metrics;

const EVIL: &str = "<script>alert('&|\"')</script>";

/// Two models and a baseline; every text that a user can choose is [`EVIL`].
fn comparison() -> Comparison {
    let names = vec![EVIL.to_string(), "b".to_string(), "c".to_string()];
    let truth = [0, 0, 1, 1, 2, 2];
    let old = [3., 0., 0., 2., 0., 1., 0., 3., 0., 0., 2., 0., 0., 0., 3., 1., 0., 2.];
    let mut new = old;
    new.swap(0, 1);
    let variant = |name: &str, logits: &[f32], ms: f64, bytes: usize| Variant {
        name: name.into(),
        dir: Some("x".into()),
        parent: None,
        parameters: bytes,
        disk_bytes: bytes as u64,
        parts: vec![Part { part: "embeddings", parameters: bytes, bytes }],
        storage: Some(Storage { linears: BTreeMap::from([("int8", vec![EVIL.to_string()])]), embeddings: "f16" }),
        figures: metrics::Figures::Labels(metrics::evaluate(logits, &truth, &names)),
        sensitivity: None,
        distance_to_parent: None,
        worst_recall: None,
        below_baseline: Some(false),
        calibrated: None,
        against_parent: None,
        against_first: None,
        flipped: vec![],
        flipped_from_first: vec![],
        speed: Some(Speed {
            isa: "scalar".into(),
            threads: 1,
            threads_for_one: 1,
            load_ms: 1.0,
            first_answer_ms: 1.0,
            latency_ms: crate::commands::Latency { p50: ms, p99: ms },
            by_length: vec![],
            sentences_per_s: 1.0,
            peak_rss_mb: None,
            memory_mb: None,
            work: None,
            against: None,
        }),
        loss_curve: vec![[1.0, 2.0], [2.0, 1.0]],
        provenance: None,
    };
    let first = variant(EVIL, &old, 2.0, 4_000_000);
    let mut second = variant("small", &new, 1.0, 1_000_000);
    second.parent = Some(EVIL.into());
    second.against_parent = Some(metrics::agreement(&old, &new, &truth, 3));
    second.below_baseline = Some(true);
    let minds = |kl, flips| Drop { loss: 1.0, accuracy: 0.5, kl, flips };
    let site = |name: &str, kl, flips| Site { site: name.into(), alone: minds(kl, flips), all_but: minds(0.1, 1) };
    second.storage = Some(Storage {
        linears: BTreeMap::from([
            ("f32", vec!["layer.0.ffn_down".into(), "head.4".into(), "layer.9.query".into()]),
            ("int8", vec![EVIL.to_string()]),
        ]),
        embeddings: "f16",
    });
    second.sensitivity = Some(Sensitivity {
        sentences: 6,
        budget: 0.1,
        float: minds(0.0, 0),
        all: minds(0.5, 3),
        sites: vec![site("layer.0.ffn_down", 0.25, 2), site(EVIL, 0.05, 1)],
        kept: vec!["layer.0.ffn_down".into()],
        result: minds(0.1, 1),
    });
    second.flipped =
        vec![Flip { row: 0, text: EVIL.into(), truth: EVIL.into(), parent_says: EVIL.into(), says: "b".into() }];
    let mut baseline = variant("TF-IDF baseline", &old, 1.0, 0);
    (baseline.dir, baseline.speed, baseline.parts) = (None, None, vec![]);
    Comparison {
        version: 1,
        tool: "quetsch",
        sentences: 6,
        labels: 3,
        threads: 1,
        machine: machine::this(),
        data: Measured { test: EVIL.into(), test_blake3: "0".into(), train: Some(EVIL.into()), held_out: false },
        measured_at: "2026-01-02 03:04 UTC".into(),
        command: EVIL.into(),
        compare_command: format!("quetsch compare {EVIL}"),
        recipe: Some(EVIL.into()),
        chosen: None,
        variants: vec![first, second, baseline],
        gates: vec![Checked { gate: EVIL.into(), variant: "small".into(), found: "1".into(), met: false }],
    }
}

#[test]
fn nothing_that_a_user_wrote_is_markup() {
    let c = comparison();
    for lang in [Lang::En, Lang::Zh] {
        let page = c.html(EVIL, lang).expect("a page");
        assert!(!page.contains("<script"), "{lang:?}");
        assert!(page.contains("&lt;script&gt;"), "{lang:?}: but it is there");
        assert!(page.starts_with("<!doctype html>"), "{lang:?}: {}", &page[..40]);
        assert!(page.contains(&format!("<html lang=\"{}\">", lang.code())));
        for outside in ["http://", "https://", "@import", "url(", "src="] {
            assert!(!page.contains(outside), "{outside}: the page stands alone");
        }
        assert!(!page.contains("NaN") && !page.contains("undefined"), "{lang:?}: every number is one");
        let markdown = c.markdown(lang);
        let fences = markdown.split("```").step_by(2).collect::<String>();
        assert!(!fences.contains("<script") && fences.contains("&lt;script&gt;"), "{markdown}");
    }
}

#[test]
fn the_page_shows_every_part() {
    let page = comparison().html("t", Lang::En).expect("a page");
    for part in [
        "What smaller costs",
        "Training",
        "Reliability diagram",
        "Sentences whose answer changed",
        "not met",
        "2026-01-02",
        "The comparison alone",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let words = Lang::En.words();
    for (site, why) in
        [("layer.0.ffn_down", "why_measured"), ("head.4", "why_last"), ("layer.9.query", "why_asked")]
    {
        assert!(page.contains(&format!("{site} ({})", words[why])), "{site}: why it is in float");
    }
    for part in ["width: 20.0%", "How much each layer minds", "Label by label"] {
        assert!(page.contains(part), "{part}");
    }
    assert_eq!(page.matches("<svg").count(), 5, "two trade-offs, two losses, one reliability diagram");
    assert!(page.contains("class=\"below\""), "points below the baseline are marked");
    assert!(page.contains("s1 few"), "a bin of few sentences is faint");
    assert!(
        page.contains("No smaller model is recommended") && !page.contains("class=\"tiles\""),
        "nothing is praised"
    );
}

#[test]
fn the_summary_says_what_was_measured() {
    let mut c = comparison();
    c.variants[0].name = "big".into();
    let text = |c: &Comparison, lang| {
        let summary = c.summary(lang);
        summary.sentences.into_iter().chain(summary.cost).collect::<Vec<_>>().join(" ")
    };
    let en = text(&c, Lang::En);
    assert_eq!(c.summary(Lang::En).recommended, None);
    assert!(
        en.contains("The nearest is small; it loses 16.67 points, where 0.5 are allowed, and misses the gate"),
        "{en}"
    );
    assert!(en.contains("and is below the TF-IDF baseline"), "{en}");
    assert!(
        en.contains("Of 6 test sentences small answers 5 (83.33%) right, big 6 (100.00%): -16.67 points"),
        "{en}"
    );
    assert!(en.contains("a loss above 0.5 is not excluded"), "{en}");
    assert!(en.contains("4.0 times smaller") && en.contains("2.0 times as fast"), "{en}");
    assert!(en.contains("below that, so not worth running: small"), "{en}");
    assert!(en.contains("0 of 1 conditions are met"), "{en}");
    assert!(text(&c, Lang::Zh).contains("最接近的是 small") && text(&c, Lang::Zh).contains("速度为原来的 2.0 倍"));
    c.gates.clear();
    c.variants[1].figures = c.variants[0].figures.clone();
    assert_eq!(c.summary(Lang::En).recommended, None, "what is below the baseline is not worth running");
    c.variants[1].below_baseline = Some(false);
    assert_eq!(c.summary(Lang::En).heading, "Recommended: small");
    assert!(c.html("t", Lang::En).expect("a page").contains("4.0 times smaller than big (4.00 MB)"));
    assert_eq!(c.summary(Lang::En).recommended.as_deref(), Some("small"));
    c.data.held_out = true;
    assert!(
        text(&c, Lang::En).contains("No test data were given") && text(&c, Lang::Zh).contains("没有提供测试数据")
    );
    c.variants.truncate(1);
    assert!(text(&c, Lang::En).contains("of 6 test sentences right"));
    c.html("one model", Lang::En).expect("one model alone is a page too");
    c.variants.clear();
    c.html("nothing", Lang::Zh).expect("so is nothing");
}

#[test]
fn a_search_does_not_recommend_what_the_test_data_show_to_be_below_the_baseline() {
    let mut c = comparison();
    c.gates.clear();
    c.chosen = Some(Chosen { variant: Some("small".into()), max_drop: 0.005 });
    let said = |c: &Comparison| c.summary(Lang::En).sentences.join(" ");
    assert!(
        c.summary(Lang::En).recommended.is_none()
            && said(&c).contains("small, is below the TF-IDF baseline on the test")
    );
    c.chosen = Some(Chosen { variant: None, max_drop: 0.005 });
    assert!(said(&c).contains("On the validation data no smaller model"), "{}", said(&c));
    c.chosen = Some(Chosen { variant: Some("small".into()), max_drop: 0.005 });
    c.variants[1].below_baseline = Some(false);
    assert_eq!(c.summary(Lang::En).recommended.as_deref(), Some("small"), "its loss was judged on other data");
    assert!(said(&c).contains("The test data had no part in it"), "{}", said(&c));
}

#[test]
fn flips_of_the_shown_model_are_against_the_first_one() {
    let mut c = comparison();
    let w = Lang::En.words();
    c.variants[1].against_first = c.variants[1].against_parent.clone();
    c.variants[1].parent = Some("between".into());
    c.variants[1].flipped_from_first = vec![Flip { text: "seen".into(), ..c.variants[1].flipped[0].clone() }];
    let flips = c.flips(&w);
    assert_eq!((flips[0]["from"].as_str(), flips[1]["from"].as_str()), (Some(EVIL), Some("between")));
    assert_eq!((&flips[0]["open"], &flips[1]["open"]), (&json!(true), &json!(false)));
    assert_eq!(flips[0]["rows"][0]["text"], "seen");
    assert_eq!(flips[0]["lost"], "1 became wrong");
}

#[test]
fn small_figures_have_digits() {
    for (x, decimals, text) in [
        (91.575, 1, "91.6"),
        (0.0412, 1, "0.0412"),
        (0.0, 1, "0.0"),
        (0.137, 2, "0.137"),
        (28.92, 2, "28.92"),
        (128.4, 0, "128"),
        (4.0, 1, "4.00"),
    ] {
        assert_eq!(figure(x, decimals), text);
    }
}

#[test]
fn a_chinese_report_is_chinese() {
    let mut c = comparison();
    c.variants[0].name = "big".into();
    let markdown = c.markdown(Lang::Zh);
    assert!(markdown.contains("| 模型 | 参数量 |") && !markdown.contains("sentences"), "{markdown}");
}
