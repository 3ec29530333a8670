//! The report's bars and tables of one variant: what its bytes are spent on, how its weights are stored and why, how much
//! each layer minds being quantised, what it was made from.

use super::{Lang, Words, figure, points, summary};
use crate::ui::{mb, percent};
use crate::work::compare::Variant;
use quetsch::quant::Scheme;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Sites named one by one; of more, the first and a number.
const NAMED: usize = 3;

/// The figures of a variant that decide, each beside what the first one has.
pub fn tiles(first: &Variant, v: &Variant, lang: Lang) -> Vec<Value> {
    let w = lang.words();
    let is_first = first.name == v.name;
    let tile = |what: &str, value: String, about: String| {
        let about = if is_first { String::new() } else { about };
        json!({ "what": what, "value": value, "about": about })
    };
    let times = |(en, zh): (&str, &str), old: f64, new: f64, unit: &str, decimals| {
        let x = format!("{:.1}", old / new.max(1e-9));
        let before = format!("{} {unit}", figure(old, decimals));
        match lang {
            Lang::En => format!("{x} {en} {} ({before})", first.name),
            Lang::Zh => format!("{} 为 {before}，{}", first.name, zh.replace('N', &x)),
        }
    };
    let (old, new) = (mb(first.disk_bytes), mb(v.disk_bytes));
    let smaller = ("times smaller than", "缩小到 1/N");
    let delta = summary::to_first(v).map_or_else(String::new, |d| {
        let more = summary::right(v) - summary::right(first);
        let (points, n, name) = (points(d.accuracy_delta, 2), more.abs(), &first.name);
        match (lang, more) {
            (Lang::En, 0) => format!("as many right as {name}"),
            (Lang::En, ..0) => format!("{points} points: {n} fewer right than {name}"),
            (Lang::En, _) => format!("{points} points: {n} more right than {name}"),
            (Lang::Zh, 0) => format!("与 {name} 答对的一样多"),
            (Lang::Zh, ..0) => format!("{points} 个百分点：比 {name} 少答对 {n} 个"),
            (Lang::Zh, _) => format!("{points} 个百分点：比 {name} 多答对 {n} 个"),
        }
    });
    let mut tiles = vec![
        tile(w["accuracy"], percent(v.labels().accuracy), delta),
        tile(w["tile_size"], format!("{} MB", figure(new, 1)), times(smaller, old, new, "MB", 1)),
    ];
    if let (Some(a), Some(b)) = (&first.speed, &v.speed) {
        let (old, new) = (a.latency_ms.p50, b.latency_ms.p50);
        let faster = ("times as fast as", "速度为其 N 倍");
        tiles.push(tile(w["tile_latency"], format!("{} ms", figure(new, 2)), times(faster, old, new, "ms", 2)));
        if let (Some(old), Some(new)) = (a.peak_rss_mb, b.peak_rss_mb) {
            let less = ("times less than", "缩小到 1/N");
            tiles.push(tile(w["tile_memory"], format!("{} MB", figure(new, 0)), times(less, old, new, "MB", 0)));
        }
    }
    tiles
}

/// Bytes by part, as shares of the largest variant's.
pub fn size_bar(v: &Variant, largest: usize) -> Value {
    let share = |bytes: usize| crate::work::round(100.0 * bytes as f64 / largest.max(1) as f64, 2);
    let parts = v.parts.iter().map(|p| {
        let size = format!("{} MB", figure(mb(p.bytes as u64), 1));
        json!({ "part": p.part, "share": share(p.bytes), "size": size, "parameters": p.parameters })
    });
    let total: usize = v.parts.iter().map(|p| p.bytes).sum();
    json!({ "name": v.name, "parts": parts.collect::<Vec<_>>(), "total": format!("{} MB", figure(mb(total as u64), 1)) })
}

/// How a variant's weights are stored, many sites as a number, few by name; and of a quantised one, what stayed in float,
/// by the reason.
pub fn store(v: &Variant, w: &Words) -> Option<Value> {
    let storage = v.storage.as_ref()?;
    let is_float = |scheme: &str| scheme.parse::<Scheme>().is_ok_and(|s| s.float().is_some());
    let schemes = storage.linears.iter().map(|(scheme, sites)| {
        let names = (sites.len() <= NAMED).then(|| sites.join(", "));
        json!({ "scheme": scheme, "n": sites.len(), "names": names })
    });
    let is_quantised = storage.linears.keys().any(|s| !is_float(s));
    let float = storage.linears.iter().filter(|(s, _)| is_quantised && is_float(s)).flat_map(|(_, sites)| sites);
    let mut kept: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    float.for_each(|site| kept.entry(why(v, site)).or_default().push(site));
    let kept = kept.into_iter().map(|(why, sites)| {
        let more = sites.len().saturating_sub(NAMED);
        let more =
            if more > 0 { format!(" {}", w["and_more"].replace('N', &more.to_string())) } else { String::new() };
        let sites = sites[..sites.len().min(NAMED)].join(", ") + &more;
        json!({ "sites": sites, "why": w[why] })
    });
    Some(json!({
        "name": v.name,
        "embeddings": storage.embeddings,
        "schemes": schemes.collect::<Vec<_>>(),
        "kept": kept.collect::<Vec<_>>(),
    }))
}

/// Why a linear of a quantised model is in float: it was measured, it is the last one, or somebody said so.
fn why(v: &Variant, site: &str) -> &'static str {
    let measured = v.sensitivity.as_ref().is_some_and(|s| s.kept.iter().any(|k| k == site));
    // The last linear is the head's.
    let is_head = ["classifier", "head.", "qa_outputs"].iter().any(|head| site.contains(head));
    match (measured, is_head) {
        (true, _) => "why_measured",
        (false, true) => "why_last",
        (false, false) => "why_asked",
    }
}

/// Bars of the mean KL that quantising each site alone causes, the most sensitive first.
pub fn sensitivity(v: &Variant, w: &Words) -> Option<Value> {
    let found = v.sensitivity.as_ref()?;
    let largest = found.sites.iter().map(|s| s.alone.kl).fold(f64::MIN_POSITIVE, f64::max);
    let rows = found.sites.iter().map(|s| {
        json!({
            "site": s.site,
            "share": crate::work::round(100.0 * s.alone.kl / largest, 2),
            "kl": format!("{:.1e}", s.alone.kl),
            "flips": s.alone.flips,
            "kept": found.kept.contains(&s.site),
        })
    });
    Some(json!({
        "name": v.name,
        "about": w["sensitivity_of"].replace("N", &found.sentences.to_string()).replace("B", &found.budget.to_string()),
        "rows": rows.collect::<Vec<_>>(),
    }))
}

/// Program, stage, inputs and settings.
pub fn made_from(v: &Variant) -> Option<String> {
    let p = v.provenance.as_ref()?;
    let short = |hash: &String| hash.chars().take(12).collect::<String>();
    let inputs: Vec<_> = p.inputs.iter().map(|(role, hash)| format!("{role} {}", short(hash))).collect();
    let settings: Vec<_> = p.settings.iter().map(|(key, value)| format!("{key} {value}")).collect();
    Some(format!("{} | {} | {} | {}", p.tool, p.stage, inputs.join(", "), settings.join(", ")))
}
