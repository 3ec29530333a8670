//! What a manager reads: a few sentences about the recommended model, in one language.

use super::{Lang, points};
use crate::ui::{mb, percent};
use crate::work::compare::{Comparison, Variant};
use quetsch::metrics::Agreement;
use serde::Serialize;

/// Said where there were no test data.
const HELD_OUT: (&str, &str) = (
    "No test data were given: all figures are of a part of the training data that was set aside, and what was chosen on \
     that part looks better here than it is.",
    "没有提供测试数据:所有数字均来自训练数据中留出的部分;凡在该部分上做出的选择,在此会显得偏好。",
);

/// What a manager reads, in one language.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Name of the recommended variant; none if every one loses too much.
    pub recommended: Option<String>,
    /// In the order in which they are read.
    pub sentences: Vec<String>,
    /// Size and speed against the first model; on the page they are figures.
    pub cost: Option<String>,
}

/// A variant against the first one.
fn to_first(v: &Variant) -> Option<&Agreement> {
    v.against_first.as_ref().or(v.against_parent.as_ref())
}

impl Comparison {
    /// About the recommended variant against the first one.
    pub(super) fn summary(&self, lang: Lang) -> Summary {
        let (Some(first), Some(shown)) = (self.models().next(), self.shown()) else {
            return Summary { recommended: None, sentences: vec![], cost: None };
        };
        if self.is_numbers() {
            // Which loss of R2 is small enough is not for us to say.
            let r2 = |v: &Variant| format!("{}: R2 {:.4}", v.name, v.figures.main().1);
            return Summary { recommended: None, sentences: self.models().map(r2).collect(), cost: None };
        }
        let zh = lang == Lang::Zh;
        let (n, a, b) = (self.sentences, percent(shown.labels().accuracy), percent(first.labels().accuracy));
        let (name, old) = (&shown.name, &first.name);
        let mut s = vec![];
        if self.data.held_out {
            s.push(lang.pick(HELD_OUT.0, HELD_OUT.1).into());
        }
        if shown.name == first.name {
            let [low, high] = shown.labels().accuracy_interval.map(percent);
            s.push(match zh {
                true => format!("{name} 在 {n} 个测试句子上的准确率为 {a}(95% 区间 {low} 至 {high})。"),
                false => format!("{name} answers {a} of {n} test sentences right (95% interval {low} to {high})."),
            });
        } else {
            let drop = 100.0 * self.max_drop();
            if self.recommended().is_none() {
                s.push(match zh {
                    true => format!("没有任何较小的模型能将损失控制在 {old} 的 {drop} 个百分点以内并通过所有门槛;最接近的是 {name}。"),
                    false => format!("No smaller model stays within {drop} points of {old} and meets every gate; the nearest is {name}."),
                });
            } else if self.chosen.is_some() {
                s.push(match zh {
                    true => format!("{name} 是搜索的推荐:在验证数据上损失不超过 {drop} 个百分点的模型中最快的一个。测试数据未参与选择。"),
                    false => format!(
                        "{name} is the search's choice: the fastest that loses at most {drop} points on the validation \
                         data. The test data had no part in it."
                    ),
                });
            }
            let delta = to_first(shown).map(|d| {
                let [low, high] = d.delta_interval.map(|x| points(x, 2));
                (points(d.accuracy_delta, 2), low, high, d.mcnemar.p, percent(d.flip_rate))
            });
            let (delta, low, high, p, flips) = delta.unwrap_or_default();
            s.push(match zh {
                true => format!(
                    "{name} 在 {n} 个测试句子上答对 {a},{old} 答对 {b}(相差 {delta} 个百分点,95% 区间 {low} 至 {high})。"
                ),
                false => format!(
                    "{name} answers {a} of {n} test sentences right, {old} {b} ({delta} points, 95% interval {low} to \
                     {high})."
                ),
            });
            s.push(match (p >= 0.05, zh) {
                (true, true) => format!("这一差异未超出偶然范围(McNemar p = {p:.2});{flips} 的句子答案有变。"),
                (true, false) => format!(
                    "That difference may be chance (McNemar p = {p:.2}); the answer changed for {flips} of the sentences."
                ),
                (false, true) => format!("这一差异并非偶然(McNemar p = {p:.3});{flips} 的句子答案有变。"),
                (false, false) => format!(
                    "That difference is not chance (McNemar p = {p:.3}); the answer changed for {flips} of the sentences."
                ),
            });
        }
        let cost = (shown.name != first.name).then(|| cost(first, shown, zh));
        if let Some(base) = self.baseline() {
            let base_accuracy = percent(base.labels().accuracy);
            let below: Vec<&str> =
                self.models().filter(|v| v.below_baseline == Some(true)).map(|v| v.name.as_str()).collect();
            s.push(match (below.is_empty(), zh) {
                (true, true) => format!("不用神经网络的 TF-IDF 基线为 {base_accuracy},所有模型均不低于它。"),
                (true, false) => {
                    format!("Plain word statistics (TF-IDF) reach {base_accuracy}; no model is below that.")
                }
                (false, true) => {
                    format!("不用神经网络的 TF-IDF 基线为 {base_accuracy};低于它的模型:{}。", below.join("、"))
                }
                (false, false) => format!(
                    "Plain word statistics (TF-IDF) reach {base_accuracy}; below that, so not worth running: {}.",
                    below.join(", ")
                ),
            });
        }
        if !self.gates.is_empty() {
            let (met, all) = (self.gates.iter().filter(|g| g.met).count(), self.gates.len());
            s.push(match zh {
                true => format!("质量门槛:{all} 项中通过 {met} 项。"),
                false => format!("Quality gates: {met} of {all} conditions are met."),
            });
        }
        Summary { recommended: self.recommended().map(|v| v.name.clone()), sentences: s, cost }
    }
}

/// Size and speed against the first model.
fn cost(first: &Variant, v: &Variant, zh: bool) -> String {
    let (old, new) = (mb(first.disk_bytes), mb(v.disk_bytes));
    let times = old / new.max(1e-9);
    let mut text = match zh {
        true => format!("体积 {new:.1} MB,原为 {old:.1} MB(缩小到 1/{times:.1})"),
        false => format!("It takes {new:.1} MB instead of {old:.1} MB ({times:.1} times smaller)"),
    };
    if let (Some(a), Some(b)) = (&first.speed, &v.speed) {
        let (old, new) = (a.latency_ms.p50, b.latency_ms.p50);
        let times = old / new.max(1e-9);
        text += &match zh {
            true => format!(",单句用时 {new:.2} ms,原为 {old:.2} ms(快 {times:.1} 倍)"),
            false => format!(" and {new:.2} ms instead of {old:.2} ms a sentence ({times:.1} times as fast)"),
        };
    }
    text + if zh { "。" } else { "." }
}
