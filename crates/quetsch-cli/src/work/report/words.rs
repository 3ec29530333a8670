//! The report's words in English and Chinese. Keys are the template's; names of files, figures and labels stay as they
//! are.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Language of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Lang {
    /// English
    #[default]
    En,
    /// Chinese
    Zh,
}

impl Lang {
    /// For the page's `lang`.
    pub fn code(self) -> &'static str {
        match self {
            Lang::En => "en",
            Lang::Zh => "zh-CN",
        }
    }

    /// One of two texts.
    pub fn pick<'a>(self, en: &'a str, zh: &'a str) -> &'a str {
        match self {
            Lang::En => en,
            Lang::Zh => zh,
        }
    }

    /// Every word of the page.
    pub fn words(self) -> BTreeMap<&'static str, &'static str> {
        WORDS.iter().map(|(key, en, zh)| (*key, self.pick(en, zh))).collect()
    }
}

/// (key, English, Chinese).
const WORDS: &[(&str, &str, &str)] = &[
    ("tile_size", "on disk", "磁盘"),
    ("tile_latency", "a sentence (p50)", "单句延迟（p50）"),
    ("tile_memory", "memory (peak)", "内存峰值"),
    ("variants", "All variants", "所有模型"),
    ("variant", "variant", "模型"),
    ("params", "params", "参数量"),
    ("disk", "disk MB", "磁盘 MB"),
    ("accuracy", "accuracy", "准确率"),
    ("macro_f1", "macro-F1", "宏 F1"),
    ("weighted_f1", "weighted F1", "加权 F1"),
    ("top_3", "top-3", "前三命中率"),
    ("worst", "worst label's recall", "最差类别召回率"),
    ("ece", "ECE", "ECE"),
    ("parent", "parent", "对照模型"),
    ("delta", "difference, points", "差值（百分点）"),
    ("flips", "flips", "答案改变"),
    ("p", "McNemar p", "McNemar p"),
    ("p50", "p50 ms", "延迟 p50 ms"),
    ("p99", "p99 ms", "延迟 p99 ms"),
    ("throughput", "sentences/s", "句/秒"),
    ("memory", "memory MB", "内存 MB"),
    (
        "legend",
        "Difference, flips (changed answers) and McNemar's exact p are against the parent: the model it was made \
         from, unless the first one was asked for. Below a figure: its 95% interval (Wilson for an accuracy, paired \
         bootstrap for a difference), the share of flips, the label found least often and its sentences. p50 and \
         p99: one sentence at a time, tokenising included, each model in a process of its own. \
         Memory is the peak of that process. 1 MB = 1,000,000 bytes.",
        "差值、答案改变数与 McNemar 精确 p 值均相对于对照模型（默认为其来源模型，也可指定为第一个模型）。\
         数字下方依次为 95% 区间（准确率用 Wilson 区间，差值用配对自助法）、答案改变的比例、召回率最低的类别及其句数。p50 与 p99 为逐句推理的延迟（含分词），每个模型在独立进程中测量。\
         内存为该进程的峰值。1 MB = 1,000,000 字节。",
    ),
    ("gates", "Quality gates", "质量门槛"),
    ("gate", "gate", "门槛"),
    ("found", "found", "实测"),
    ("met", "met", "通过"),
    ("missed", "not met", "未通过"),
    ("tradeoff", "What smaller costs", "变小的代价"),
    ("pareto_latency", "Accuracy against latency", "准确率与延迟"),
    ("pareto_size", "Accuracy against size", "准确率与体积"),
    ("x_latency", "ms for one sentence (p50), log scale", "单句延迟（p50，毫秒，对数轴）"),
    ("x_size", "MB on disk, log scale", "磁盘体积（MB，对数轴）"),
    ("y_accuracy", "accuracy", "准确率"),
    ("key_front", "no other variant is both cheaper and better", "没有其他模型既更省又更准"),
    ("key_dominated", "another variant is at least as good for less", "另有模型更省且不差"),
    ("key_below", "below the TF-IDF baseline", "低于 TF-IDF 基线"),
    ("key_baseline", "TF-IDF baseline", "TF-IDF 基线"),
    ("key_pick", "recommended", "推荐"),
    ("key_interval", "numbers: lines of the table; bars: 95% interval", "数字：上表中的序号；竖线：95% 区间"),
    ("size", "What the bytes are spent on", "体积构成"),
    ("embeddings", "embeddings", "词嵌入"),
    ("encoder", "encoder", "编码器"),
    ("head", "head", "分类头"),
    ("unused", "not used", "未使用"),
    (
        "unused_about",
        "Not used: a pooler that stands in the file because other programs expect one; no answer needs it.",
        "未使用：其他程序要求文件中存在的 pooler，回答并不需要它。",
    ),
    ("part_by_part", "Part by part", "各部分大小"),
    ("kept", "How weights are stored", "权重的存储方式"),
    (
        "kept_why",
        "LayerNorms and biases have no quantised form. Embedding tables and the last linear stay as they are unless asked: \
         the last linear decides between close labels and is small.",
        "LayerNorm 与偏置没有量化形式。词嵌入表与最后一个线性层默认保持不变：后者体积小，且决定相近类别的取舍。",
    ),
    ("in_float", "in float", "保留浮点"),
    (
        "why_last",
        "the last linear: decides between close labels, and is small",
        "最后一个线性层：体积小，且决定相近类别的取舍",
    ),
    ("why_asked", "asked for", "由配置指定"),
    ("why_measured", "measured: they mind most, see below", "实测：对量化最敏感，见下文"),
    ("and_more", "and N more", "等，另有 N 个"),
    ("sensitivity", "How much each layer minds being quantised", "各层对量化的敏感度"),
    (
        "sensitivity_about",
        "Each layer quantised alone, on validation sentences: mean KL divergence of the answers, and how many answers \
         change. Marked layers stay in float: the fewest that meet the budget, in points of accuracy.",
        "在验证句子上仅量化该层时，回答分布的平均 KL 散度与答案改变数。带标记的层保留浮点：即满足准确率预算（百分点）所需的最少几层。",
    ),
    (
        "sensitivity_of",
        "measured on N sentences; layers stay in float until at most B points of accuracy are lost",
        "在 N 个句子上测得；保留浮点的层以最多损失 B 个百分点的准确率为限",
    ),
    ("classes", "Label by label", "各类别表现"),
    (
        "classes_about",
        "The labels that are found least often first; the last column is the F1 of the first model.",
        "召回率最低的类别在前；最后一列为第一个模型的 F1。",
    ),
    ("label_count", "labels", "个类别"),
    ("label", "label", "类别"),
    ("precision", "precision", "精确率"),
    ("recall", "recall", "召回率"),
    ("first_f1", "F1 before", "原 F1"),
    ("linears", "linears", "个线性层"),
    ("training", "Training", "训练过程"),
    ("step", "step", "步"),
    ("loss", "loss: ", "损失："),
    (
        "loss_about",
        "Means over neighbouring steps. CE: cross-entropy with the labels. KL: divergence from the teacher's answers at \
         temperature T. Losses of different formulas do not compare.",
        "相邻步的平均值。CE：与标签的交叉熵；KL：温度 T 下与教师答案的散度。不同公式的损失不可相互比较。",
    ),
    ("calibration", "Do its probabilities mean what they say?", "概率是否可信?"),
    ("reliability", "Reliability diagram", "可靠性图"),
    ("confidence", "confidence", "置信度"),
    ("right", "share right", "正确比例"),
    ("ideal", "ideal", "理想"),
    (
        "reliability_about",
        "15 bins of equal width; the larger a point, the more sentences; bars: 95% interval. Faint and not joined: fewer than \
         10 sentences. Below the diagonal: too sure of itself.",
        "15 个等宽区间；点越大，句子越多；竖线为 95% 区间。颜色浅且不相连的点少于 10 个句子。位于对角线下方表示过于自信。",
    ),
    ("temperature", "temperature", "温度"),
    ("at_bound", "(an end of what is tried: not to be trusted)", "（已到搜索边界，不可信）"),
    ("ece_before", "ECE as it is", "原始 ECE"),
    ("ece_after", "ECE with it", "校准后 ECE"),
    (
        "temperature_about",
        "Temperature scaling, fitted on data that no figure above was measured on. The models were not changed.",
        "温度缩放在独立于上述测试数据的数据上拟合；模型本身没有改变。",
    ),
    ("confusions", "Most frequent confusions of", "最常见的混淆："),
    ("truth", "truth", "正确类别"),
    ("predicted", "predicted", "预测类别"),
    ("count", "sentences", "句数"),
    ("flipped", "Sentences whose answer changed", "答案改变的句子"),
    ("flipped_of", "against", "对照"),
    ("flipped_count", "N answers changed", "N 个答案改变"),
    ("flipped_lost", "N became wrong", "N 个由对变错"),
    ("flipped_won", "N became right", "N 个由错变对"),
    ("flipped_other", "N wrong before and after", "N 个前后皆错"),
    ("flipped_shown", "N are listed", "列出 N 个"),
    ("sentence", "sentence", "句子"),
    ("was", "was", "原答案"),
    ("is", "is", "新答案"),
    ("repeat", "How to repeat it", "如何复现"),
    ("machine", "machine", "机器"),
    ("version", "version", "版本"),
    ("threads", "threads", "线程"),
    ("data", "test data", "测试数据"),
    ("baseline_on", "baseline fitted on", "基线训练数据"),
    ("measured_at", "measured", "测量时间"),
    ("command", "Command", "命令"),
    ("compare_command", "The comparison alone", "仅重做对比"),
    ("recipe", "Recipe, with nothing left open", "完整配方"),
    ("made_from", "What every model was made from", "每个模型的来源"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_there_once_in_both_languages() {
        assert_eq!(Lang::En.words().len(), WORDS.len(), "a key occurs twice");
        for (key, en, zh) in WORDS {
            assert!(!en.is_empty() && !zh.is_empty(), "{key}");
        }
    }
}
