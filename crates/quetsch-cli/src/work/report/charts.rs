//! The report's plots: accuracy against cost, losses, reliability.

use super::Words;
use super::figure;
use super::plot::{Axis, Line, Mark, Plot};
use crate::ui::mb;
use crate::work::compare::{Comparison, Variant};
use crate::work::pareto::front;
use anyhow::Result;
use quetsch::metrics::wilson;
use serde_json::{Value, json};

/// A bin of fewer sentences says little: its point is faint, and no line leads to it.
const FEW: usize = 10;

impl Comparison {
    /// Accuracy against latency, where it was measured, and against size. Points bear the numbers of the table.
    pub(super) fn tradeoffs(&self, w: &Words) -> Result<Vec<Value>> {
        type Cost = fn(&Variant) -> Option<f64>;
        let plots: [(&str, &str, &str, Cost); 2] = [
            (w["pareto_latency"], w["x_latency"], "ms", |v| v.speed.as_ref().map(|s| s.latency_ms.p50)),
            (w["pareto_size"], w["x_size"], "MB", |v| v.dir.as_ref().map(|_| mb(v.disk_bytes))),
        ];
        let baseline = self.baseline().map(|b| 100.0 * b.labels().accuracy);
        let intervals = self.models().flat_map(|v| v.labels().accuracy_interval).map(|a| 100.0 * a);
        let y = Axis::around(w["y_accuracy"], "%", intervals.chain(baseline));
        let mut drawn = vec![];
        for (title, label, unit, cost) in plots {
            let models: Vec<(usize, &Variant, f64)> =
                self.models().enumerate().filter_map(|(i, v)| Some((i + 1, v, cost(v)?))).collect();
            if models.is_empty() {
                continue;
            }
            let x = Axis::log(label, models.iter().map(|m| m.2));
            let accuracy = |v: &Variant| 100.0 * v.labels().accuracy;
            let beaten_by_none = front(&models.iter().map(|(_, v, c)| ([*c], accuracy(v))).collect::<Vec<_>>());
            let mut marks: Vec<Mark> = (models.iter().zip(&beaten_by_none))
                .map(|((number, v, c), on_front)| {
                    let is_pick = self.recommended().is_some_and(|r| std::ptr::eq(r, *v));
                    let class = match (is_pick, v.below_baseline == Some(true), on_front) {
                        (true, _, _) => "pick",
                        (_, true, _) => "below",
                        (_, _, true) => "front",
                        _ => "dominated",
                    };
                    Mark {
                        class,
                        at: (*c, accuracy(v)),
                        r: if is_pick { 30 } else { 20 },
                        interval: Some(v.labels().accuracy_interval.map(|a| 100.0 * a)),
                        label: number.to_string(),
                        tip: format!("{number} {}: {:.2}%, {} {unit}", v.name, accuracy(v), figure(*c, 2)),
                    }
                })
                .collect();
            marks.sort_by_key(|m| ["dominated", "below", "front", "pick"].iter().position(|c| *c == m.class));
            let mut best: Vec<(f64, f64)> = models
                .iter()
                .zip(&beaten_by_none)
                .filter(|p| *p.1)
                .map(|((_, v, c), _)| (*c, accuracy(v)))
                .collect();
            best.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (left, right) = x.ends();
            let mut lines = vec![Line { class: "frontier", points: steps(&best, right) }];
            lines.extend(baseline.map(|b| Line { class: "baseline", points: vec![(left, b), (right, b)] }));
            drawn.push(figure_of(Plot { title: title.into(), x, y: y.clone(), lines, marks })?);
        }
        Ok(drawn)
    }

    /// How the losses of what was trained fell.
    pub(super) fn losses(&self, w: &Words) -> Result<Vec<Value>> {
        let trained = self.models().filter_map(|v| Some((v, v.loss_curve.last()?[0])));
        let plot = |(v, last): (&Variant, f64)| {
            let highest = v.loss_curve.iter().map(|p| p[1]).fold(0.0, f64::max);
            figure_of(Plot {
                title: v.name.clone(),
                x: Axis::new(w["step"], "", 0.0, last),
                y: Axis::new(&format!("{}{}", w["loss"], loss_of(v)), "", 0.0, 1.05 * highest),
                lines: vec![Line { class: "s1", points: v.loss_curve.iter().map(|p| (p[0], p[1])).collect() }],
                marks: vec![],
            })
        };
        trained.map(plot).collect()
    }

    /// The first and the shown variant.
    fn pair(&self) -> Vec<&Variant> {
        let first = self.models().next();
        let shown = self.shown().filter(|v| first.is_none_or(|f| f.name != v.name));
        first.into_iter().chain(shown).collect()
    }

    /// Confidence against the share that is right, in bins.
    pub(super) fn reliability(&self, w: &Words) -> Result<Value> {
        let mut lines = vec![Line { class: "ideal", points: vec![(0.0, 0.0), (1.0, 1.0)] }];
        let mut marks = vec![];
        for (v, [class, faint]) in self.pair().into_iter().zip([["s0", "s0 few"], ["s1", "s1 few"]]) {
            let bins = &v.labels().reliability;
            let many = bins.iter().filter(|b| b.n >= FEW).map(|b| (b.confidence, b.accuracy)).collect();
            lines.push(Line { class, points: many });
            marks.extend(bins.iter().map(|b| Mark {
                class: if b.n >= FEW { class } else { faint },
                at: (b.confidence, b.accuracy),
                r: (8.0 + 24.0 * (b.n as f64 / v.labels().n.max(1) as f64).sqrt()) as i32,
                interval: Some(wilson((b.accuracy * b.n as f64).round() as usize, b.n)),
                label: String::new(),
                tip: format!("{}: {:.2} -> {:.2} ({})", v.name, b.confidence, b.accuracy, b.n),
            }));
        }
        let axis = |label| Axis::around(label, "", [0.0, 1.0].into_iter());
        figure_of(Plot {
            title: w["reliability"].into(),
            x: axis(w["confidence"]),
            y: axis(w["right"]),
            lines,
            marks,
        })
    }

    /// What the colours of [`Comparison::reliability`] stand for.
    pub(super) fn reliability_keys(&self) -> Vec<(&str, String)> {
        let keys = self.pair().into_iter().zip(["s0", "s1"]);
        keys.map(|(v, class)| (class, format!("{} (ECE {:.3})", v.name, v.labels().ece))).collect()
    }
}

fn figure_of(plot: Plot) -> Result<Value> {
    Ok(json!({ "title": plot.title, "svg": plot.svg()? }))
}

/// The best accuracy for each cost: it rises where a point stands, and stays until the next.
fn steps(points: &[(f64, f64)], right: f64) -> Vec<(f64, f64)> {
    let ends = points.iter().skip(1).map(|p| p.0).chain([right]);
    points.iter().zip(ends).flat_map(|(p, end)| [*p, (end, p.1)]).collect()
}

/// The formula of a model's loss, as far as the stage's settings weigh its terms.
fn loss_of(v: &Variant) -> String {
    let Some(p) = v.provenance.as_ref().filter(|p| p.stage != "train") else { return "CE".into() };
    let weight = |key: &str| p.settings.get(key).and_then(Value::as_f64).filter(|x| *x > 0.0);
    let Some(alpha) = p.settings.get("alpha").and_then(Value::as_f64) else { return "CE".into() };
    let round = |x: f64| crate::work::round(x, 4);
    let own = (alpha > 0.0).then(|| format!("{} CE", round(alpha)));
    let soft = (alpha < 1.0).then(|| format!("{} T² KL", round(1.0 - alpha)));
    let more = ["logits", "differences", "hidden", "embeddings", "attention", "relations"];
    let more = more.into_iter().filter_map(|key| Some(format!("{} {key}", round(weight(key)?))));
    own.into_iter().chain(soft).chain(more).collect::<Vec<_>>().join(" + ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_front_is_a_staircase() {
        let found = super::steps(&[(1.0, 90.0), (2.0, 91.0)], 5.0);
        assert_eq!(found, [(1.0, 90.0), (2.0, 90.0), (2.0, 91.0), (5.0, 91.0)]);
        assert!(super::steps(&[], 5.0).is_empty());
    }
}
