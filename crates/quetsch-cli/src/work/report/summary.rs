//! What a manager reads: a few sentences about the recommended model, in one language.

use super::choice::Objection;
use super::{Lang, figure, p_value, points};
use crate::ui::{mb, percent};
use crate::work::compare::{Comparison, Variant};
use quetsch::metrics::Agreement;
use serde::Serialize;

/// Said where there were no test data.
const HELD_OUT: (&str, &str) = (
    "No test data were given: all figures are of a part of the training data that was set aside, and what was chosen on \
     that part looks better here than it is.",
    "没有提供测试数据：所有数字均来自训练数据中留出的部分；凡在该部分上做出的选择，在此会显得偏好。",
);

/// What a manager reads, in one language.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// What it is about.
    pub heading: String,
    /// Name of the recommended variant; none if something stands against every one.
    pub recommended: Option<String>,
    /// In the order in which they are read.
    pub sentences: Vec<String>,
    /// Size and speed against the first model; on the page they are figures.
    pub cost: Option<String>,
}

/// A variant against the first one.
pub fn to_first(v: &Variant) -> Option<&Agreement> {
    v.against_first.as_ref().or(v.against_parent.as_ref())
}

/// Rows answered right. Two such counts differ by what their difference says; two rounded percentages may not.
pub fn right(v: &Variant) -> i64 {
    (v.labels().accuracy * v.labels().n as f64).round() as i64
}

impl Comparison {
    /// About the recommended variant against the first one.
    pub(super) fn summary(&self, lang: Lang) -> Summary {
        let mut summary = Summary { heading: String::new(), recommended: None, sentences: vec![], cost: None };
        let (Some(first), Some(shown)) = (self.models().next(), self.shown()) else { return summary };
        if self.is_numbers() {
            // Which loss of R2 is small enough is not for us to say.
            let r2 = |v: &Variant| format!("{}: R2 {:.4}", v.name, v.figures.main().1);
            summary.sentences = self.models().map(r2).collect();
            return summary;
        }
        summary.recommended = self.recommended().map(|v| v.name.clone());
        let s = &mut summary.sentences;
        if self.data.held_out {
            s.push(lang.pick(HELD_OUT.0, HELD_OUT.1).into());
        }
        if shown.name == first.name {
            summary.heading = shown.name.clone();
            s.push(self.alone(shown, lang));
        } else {
            summary.heading = match (&summary.recommended, lang) {
                (Some(name), Lang::En) => format!("Recommended: {name}"),
                (Some(name), Lang::Zh) => format!("推荐：{name}"),
                (None, Lang::En) => "No smaller model is recommended".into(),
                (None, Lang::Zh) => "没有值得推荐的较小模型".into(),
            };
            s.extend(self.why(shown, lang));
            s.extend(self.difference(first, shown, lang));
            summary.cost = Some(cost(first, shown, lang));
        }
        s.extend(self.about_baseline(lang));
        if !self.gates.is_empty() {
            let (met, all) = (self.gates.iter().filter(|g| g.met).count(), self.gates.len());
            s.push(match lang {
                Lang::Zh => format!("质量门槛：{all} 项中通过 {met} 项。"),
                Lang::En => format!("Quality gates: {met} of {all} conditions are met."),
            });
        }
        summary
    }

    /// What was counted: sentences, or words where each of them has a label.
    fn rows(&self, v: &Variant, lang: Lang) -> String {
        let n = v.labels().n;
        match n == self.sentences {
            true => format!("{n}{}", lang.pick(" test sentences", " 个测试句子")),
            false => format!("{n}{}", lang.pick(" words of the test data", " 个测试词")),
        }
    }

    fn alone(&self, v: &Variant, lang: Lang) -> String {
        let (name, rows, accuracy) = (&v.name, self.rows(v, lang), percent(v.labels().accuracy));
        let [low, high] = v.labels().accuracy_interval.map(percent);
        match lang {
            Lang::Zh => format!("{name} 在 {rows}上的准确率为 {accuracy}（95% 区间 {low} 至 {high}）。"),
            Lang::En => format!("{name} answers {accuracy} of {rows} right (95% interval {low} to {high})."),
        }
    }

    /// Why this one, or why not even this one.
    fn why(&self, shown: &Variant, lang: Lang) -> Option<String> {
        let (name, drop) = (&shown.name, 100.0 * self.max_drop());
        let against = self.objections(shown).iter().map(|o| objection(o, drop, lang)).collect::<Vec<_>>();
        let against = against.join(lang.pick(", and ", "，并且"));
        let is_recommended = against.is_empty() && self.recommended().is_some();
        Some(match (&self.chosen, is_recommended, lang) {
            (Some(_), true, Lang::Zh) => format!(
                "{name} 是搜索的推荐：在验证数据上损失不超过 {drop} 个百分点的模型中最快的一个。测试数据未参与选择。"
            ),
            (Some(_), true, Lang::En) => format!(
                "{name} is the search's choice: the fastest that loses at most {drop} points on the validation data. The \
                 test data had no part in it."
            ),
            (Some(chosen), false, _) => {
                let none = match (&chosen.variant, lang) {
                    (Some(choice), Lang::Zh) => {
                        format!("搜索在验证数据上选出的 {choice} 在测试数据上低于 TF-IDF 基线。")
                    }
                    (Some(choice), Lang::En) => format!(
                        "What the search chose on the validation data, {choice}, is below the TF-IDF baseline on the test \
                         data."
                    ),
                    (None, Lang::Zh) => format!(
                        "在验证数据上，没有任何较小的模型既将损失控制在 {drop} 个百分点以内，又高于 TF-IDF 基线。测试数据未参与选择。"
                    ),
                    (None, Lang::En) => format!(
                        "On the validation data no smaller model loses at most {drop} points and stays above the TF-IDF \
                         baseline. The test data had no part in it."
                    ),
                };
                let nearest = lang.pick(" The most accurate on the test data:", "测试数据上最准确的是：");
                format!("{none}{nearest}{}{name}{}", lang.pick(" ", ""), lang.pick(".", "。"))
            }
            (None, false, Lang::Zh) => format!("最接近的是 {name}，但它{against}。"),
            (None, false, Lang::En) => format!("The nearest is {name}; it {against}."),
            // One of one: nothing was chosen.
            (None, true, _) if self.models().count() < 3 => return None,
            (None, true, Lang::Zh) => format!(
                "{name} 是损失不超过 {drop} 个百分点的模型中最{}的一个；选择就在这些测试数据上做出，因此它在此略显偏好。",
                if self.is_timed() { "快" } else { "小" }
            ),
            (None, true, Lang::En) => format!(
                "It is the {} that loses at most {drop} points. It was chosen on these very test data, so it looks a \
                 little better here than it is.",
                if self.is_timed() { "fastest" } else { "smallest" }
            ),
        })
    }

    /// What its answers lose against the first one's.
    fn difference(&self, first: &Variant, shown: &Variant, lang: Lang) -> Option<String> {
        let d = to_first(shown)?;
        let [a, b] = [shown, first].map(|v| format!("{} ({})", right(v), percent(v.labels().accuracy)));
        let [low, high] = d.delta_interval.map(|x| points(x, 2));
        let (delta, p, flips) = (points(d.accuracy_delta, 2), p_value(d.mcnemar.p), percent(d.flip_rate));
        let drop = 100.0 * self.max_drop();
        let (name, old, rows) = (&shown.name, &first.name, self.rows(shown, lang));
        let may_lose_more = d.delta_interval[0] < -self.max_drop();
        Some(match lang {
            Lang::Zh => {
                let [a, b] = [a, b].map(|x| x.replace(" (", "（").replace(')', "）"));
                let more = format!("；不能排除损失超过 {drop} 个百分点");
                let chance = if d.mcnemar.p >= 0.05 { "未超出偶然范围" } else { "并非偶然" };
                format!(
                    "{rows}中 {name} 答对 {a}，{old} 答对 {b}：相差 {delta} 个百分点（95% 区间 {low} 至 {high}{}）。\
                     这一差异{chance}（McNemar p：{p}）；{flips} 的答案有变。",
                    if may_lose_more { more } else { String::new() }
                )
            }
            Lang::En => {
                let more = format!(": a loss above {drop} is not excluded");
                let chance = if d.mcnemar.p >= 0.05 { "may be chance" } else { "is not chance" };
                format!(
                    "Of {rows} {name} answers {a} right, {old} {b}: {delta} points (95% interval {low} to {high}{}). \
                     That difference {chance} (McNemar p: {p}); {flips} of the answers changed.",
                    if may_lose_more { more } else { String::new() }
                )
            }
        })
    }

    fn about_baseline(&self, lang: Lang) -> Option<String> {
        let base = percent(self.baseline()?.labels().accuracy);
        let below: Vec<&str> =
            self.models().filter(|v| v.below_baseline == Some(true)).map(|v| v.name.as_str()).collect();
        Some(match (below.is_empty(), lang) {
            (true, Lang::Zh) => format!("不用神经网络的 TF-IDF 基线为 {base}，所有模型均不低于它。"),
            (true, Lang::En) => format!("Plain word statistics (TF-IDF) reach {base}; no model is below that."),
            (false, Lang::Zh) => {
                format!("不用神经网络的 TF-IDF 基线为 {base}；低于它、因而不值得使用的模型：{}。", below.join("、"))
            }
            (false, Lang::En) => format!(
                "Plain word statistics (TF-IDF) reach {base}; below that, so not worth running: {}.",
                below.join(", ")
            ),
        })
    }
}

/// What stands against a model, after its name.
fn objection(o: &Objection, drop: f64, lang: Lang) -> String {
    match (o, lang) {
        (Objection::Loses(loss), Lang::Zh) => format!("损失 {:.2} 个百分点（最多允许 {drop}）", 100.0 * loss),
        (Objection::Loses(loss), Lang::En) => format!("loses {:.2} points, where {drop} are allowed", 100.0 * loss),
        (Objection::Misses(g), Lang::Zh) => format!("未通过门槛 {}（实测 {}）", g.gate, g.found),
        (Objection::Misses(g), Lang::En) => format!("misses the gate {} (found {})", g.gate, g.found),
        (Objection::BelowBaseline, Lang::Zh) => "低于 TF-IDF 基线".into(),
        (Objection::BelowBaseline, Lang::En) => "is below the TF-IDF baseline".into(),
    }
}

/// Size and speed against the first model.
fn cost(first: &Variant, v: &Variant, lang: Lang) -> String {
    let (old, new) = (mb(first.disk_bytes), mb(v.disk_bytes));
    let times = old / new.max(1e-9);
    let [old, new] = [old, new].map(|x| figure(x, 1));
    let mut text = match lang {
        Lang::Zh => format!("体积 {new} MB，原为 {old} MB（缩小到 1/{times:.1}）"),
        Lang::En => format!("It takes {new} MB instead of {old} MB ({times:.1} times smaller)"),
    };
    if let (Some(a), Some(b)) = (&first.speed, &v.speed) {
        let (old, new) = (a.latency_ms.p50, b.latency_ms.p50);
        let times = old / new.max(1e-9);
        let [old, new] = [old, new].map(|x| figure(x, 2));
        text += &match lang {
            Lang::Zh => format!("，单句用时 {new} ms，原为 {old} ms（速度为原来的 {times:.1} 倍）"),
            Lang::En => format!(" and {new} ms instead of {old} ms a sentence ({times:.1} times as fast)"),
        };
    }
    text + lang.pick(".", "。")
}
