//! The report's bars and tables of one variant: what its bytes are spent on, how its weights are stored and why, how much
//! each layer minds being quantised, what it was made from.

use super::Words;
use crate::ui::{mb, percent};
use crate::work::compare::Variant;
use quetsch::quant::Scheme;
use serde_json::{Value, json};

/// Sites named one by one; more are a number.
const NAMED: usize = 3;

/// The figures of a variant that decide, each with what the first one has.
pub fn tiles(first: &Variant, v: &Variant, w: &Words) -> Vec<Value> {
    let is_first = first.name == v.name;
    let tile = |what: &str, value: String, before: String| {
        let about = if is_first { String::new() } else { format!("{} {before}", w["before"]) };
        json!({ "what": what, "value": value, "about": about })
    };
    let smaller = |old: f64, new: f64| format!("{:.1}x", old / new.max(1e-9));
    let (old, new) = (mb(first.disk_bytes), mb(v.disk_bytes));
    let mut tiles = vec![
        tile(w["accuracy"], percent(v.labels().accuracy), percent(first.labels().accuracy)),
        tile(w["tile_size"], format!("{new:.1} MB"), format!("{old:.1} MB ({})", smaller(old, new))),
    ];
    if let (Some(a), Some(b)) = (&first.speed, &v.speed) {
        let (old, new) = (a.latency_ms.p50, b.latency_ms.p50);
        tiles.push(tile(w["tile_latency"], format!("{new:.2} ms"), format!("{old:.2} ms ({})", smaller(old, new))));
        if let (Some(old), Some(new)) = (a.peak_rss_mb, b.peak_rss_mb) {
            tiles.push(tile(
                w["tile_memory"],
                format!("{new:.0} MB"),
                format!("{old:.0} MB ({})", smaller(old, new)),
            ));
        }
    }
    tiles
}

/// Bytes by part, as shares of the largest variant's.
pub fn size_bar(v: &Variant, largest: usize) -> Value {
    let share = |bytes: usize| crate::work::round(100.0 * bytes as f64 / largest.max(1) as f64, 2);
    let parts = v.parts.iter().map(|p| {
        let size = format!("{:.1} MB", mb(p.bytes as u64));
        json!({ "part": p.part, "share": share(p.bytes), "size": size, "parameters": p.parameters })
    });
    let total: usize = v.parts.iter().map(|p| p.bytes).sum();
    json!({ "name": v.name, "parts": parts.collect::<Vec<_>>(), "total": format!("{:.1} MB", mb(total as u64)) })
}

/// How a variant's weights are stored, many sites as a number, few by name; and of a quantised one, what stayed in float
/// and why.
pub fn store(v: &Variant, w: &Words) -> Option<Value> {
    let storage = v.storage.as_ref()?;
    let is_float = |scheme: &str| scheme.parse::<Scheme>().is_ok_and(|s| s.float().is_some());
    let schemes = storage.linears.iter().map(|(scheme, sites)| {
        let names = (sites.len() <= NAMED).then(|| sites.join(", "));
        json!({ "scheme": scheme, "n": sites.len(), "names": names })
    });
    let is_quantised = storage.linears.keys().any(|s| !is_float(s));
    let float = storage.linears.iter().filter(|(s, _)| is_quantised && is_float(s)).flat_map(|(_, sites)| sites);
    let kept = float.map(|site| json!({ "site": site, "why": why(v, site, w) }));
    Some(json!({
        "name": v.name,
        "embeddings": storage.embeddings,
        "schemes": schemes.collect::<Vec<_>>(),
        "kept": kept.collect::<Vec<_>>(),
    }))
}

/// Why a linear of a quantised model is in float: it was measured, it is the last one, or somebody said so.
fn why(v: &Variant, site: &str, w: &Words) -> String {
    let measured = v.sensitivity.iter().find(|s| s.kept.iter().any(|k| k == site));
    if let Some(found) = measured.and_then(|s| s.sites.iter().find(|m| m.site == site)) {
        return format!("{} {} (KL {:.1e})", w["why_measured"], found.alone.flips, found.alone.kl);
    }
    // The last linear is the head's.
    let is_head = ["classifier", "head.", "qa_outputs"].iter().any(|head| site.contains(head));
    w[if is_head { "why_last" } else { "why_asked" }].into()
}

/// Bars of the mean KL that quantising each site alone causes, the most sensitive first.
pub fn sensitivity(v: &Variant) -> Option<Value> {
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
        "sentences": found.sentences,
        "budget": found.budget,
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
