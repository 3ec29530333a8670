//! `config.json` of a Hugging Face model directory <-> [`ModelSpec`], labels and per-site schemes.
//!
//! Standard keys hold what they can; our own `quetsch` key holds the rest: heads and FFN width of every layer, head
//! width, scheme of every quantised linear. Where the config is silent, the tensors of the file decide.

use crate::checkpoint::{Checkpoint, FloatType, Stored};
use crate::error::{Error, Result};
use crate::family::{Facts, Family, MODEL_TYPES};
use crate::quant::{Compute, Scheme, int8};
use crate::spec::{Activation, HeadSpec, LayerShape, Lin, MOST_HEADS, ModelSpec, Norm, Role, Tensor, TensorDef};
use crate::task::Problem;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Tensor names of a file with their shapes as stored.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// What a `config.json` says.
#[derive(Clone, Debug)]
pub struct Config {
    /// The model's shape.
    pub spec: ModelSpec,
    /// Label names by class index; empty for a bare body.
    pub labels: Vec<String>,
    /// Longest input in tokens (`max_length`).
    pub max_length: Option<usize>,
    /// Scheme by module name of linears and embedding tables, from our own key.
    pub sites: BTreeMap<String, Scheme>,
    /// What 4-bit linears compute in (`bnb_4bit_compute_dtype`).
    pub compute: Compute,
    /// Outlier threshold of int8 linears that our own key does not name (`llm_int8_threshold`).
    pub threshold: f32,
    /// What was odd but could be read.
    pub warnings: Vec<String>,
}

/// Version of our own key; a reader refuses a higher one.
const VERSION: u32 = 1;

/// Our own key.
#[derive(Serialize, Deserialize)]
struct Ours {
    version: u32,
    #[serde(default)]
    head_dim: Option<usize>,
    #[serde(default)]
    layers: Option<Vec<OurLayer>>,
    #[serde(default)]
    sites: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
struct OurLayer {
    heads: Vec<u16>,
    ffn: usize,
}

/// Keys under which pruned heads are found: the reference student class, transformers 4, remote-code exports.
const PRUNED_KEYS: [&str; 3] = ["student_pruned_heads", "pruned_heads", "kept_pruned_heads"];

/// Reads a config. `shapes` are the tensors of the file beside it, `path` is for messages.
///
/// # Errors
/// Another model type, an activation or a position embedding that is not built, numbers that cannot be a model,
/// labels with gaps, keys that contradict each other.
pub fn parse(map: &Map<String, Value>, shapes: &Shapes, path: &Path) -> Result<Config> {
    let model_type = map.get("model_type").and_then(Value::as_str).unwrap_or(MODEL_TYPES[0]);
    let facts = Family::of(model_type, 0, 0).unwrap_or_default().facts();
    Parser { facts, map, shapes, path }.parse()
}

struct Parser<'a> {
    facts: &'static Facts,
    map: &'a Map<String, Value>,
    shapes: &'a Shapes,
    path: &'a Path,
}

impl Parser<'_> {
    fn parse(&self) -> Result<Config> {
        self.refuse_other_families()?;
        let (ours, facts) = (self.ours()?, self.facts);
        let (prefix, kind) = self.architecture()?;
        let family = self.family(&prefix)?;
        // Names come from the spec alone, and need nothing of it but these two.
        let names = ModelSpec { family, prefix: prefix.clone(), ..blank() };
        let hidden = self.size(facts.hidden, &names.name(Tensor::Beta(Norm::Attention(0))), 0)?;
        let (heads_key, usual_heads) = facts.heads;
        let original_heads = self.usize(heads_key)?.unwrap_or(usual_heads);
        let head_dim = match ours.as_ref().and_then(|o| o.head_dim) {
            Some(d) => d,
            None if original_heads > 0 && hidden % original_heads == 0 => hidden / original_heads,
            None => {
                let hidden_key = facts.hidden.0;
                return self
                    .bad(format!("{hidden_key} {hidden} is not a multiple of {heads_key} {original_heads}"));
            }
        };
        // Before a list of them is made for each layer.
        let Some(original_heads) = u16::try_from(original_heads).ok().filter(|n| *n <= MOST_HEADS) else {
            return self.bad(format!("{heads_key} is {original_heads}, expected at most {MOST_HEADS}"));
        };
        let layers = self.layers(ours.as_ref(), &names, original_heads)?;
        let head = |labels| match kind {
            Kind::Body => HeadSpec::None,
            Kind::Student => HeadSpec::MeanMlp { labels },
            Kind::Stock => HeadSpec::Pooler { labels },
            Kind::Tokens => HeadSpec::Tokens { labels },
        };
        let last = ModelSpec { head: head(0), ..names.clone() }.name(Tensor::B(Lin::Classifier));
        let mut warnings = vec![];
        let labels = match kind {
            Kind::Body => vec![],
            _ => self.labels(self.shapes.get(&last).and_then(|s| s.first()).copied(), &mut warnings)?,
        };
        let has_pooler = self.shapes.contains_key(&names.name(Tensor::W(Lin::UnusedPooler)));
        let spec = ModelSpec {
            vocab: self.size(("vocab_size", 30522), &names.name(Tensor::Word), 0)?,
            positions: self.size(("max_position_embeddings", 512), &names.name(Tensor::Position), 0)?,
            token_types: match family {
                Family::DistilBert => 0,
                _ => self.size(("type_vocab_size", 2), &names.name(Tensor::TokenType), 0)?,
            },
            hidden,
            head_dim,
            original_heads,
            layers,
            ffn_activation: self.activation()?,
            norm_eps: match facts.norm_eps {
                Some(key) => self.f64(key)?.unwrap_or(1e-12) as f32,
                None => 1e-12,
            },
            head: head(labels.len()),
            unused_pooler: has_pooler && !(kind == Kind::Stock && facts.head_is_pooler()),
            ..names
        };
        spec.validate().map_err(|e| Error::file(self.path, e.to_string()))?;
        Ok(Config {
            spec,
            labels,
            max_length: self.usize("max_length")?.filter(|&n| n > 0),
            sites: self.sites(ours.as_ref())?,
            compute: self.compute()?,
            threshold: self.threshold()?,
            warnings,
        })
    }

    /// The family with what only it has in its config.
    fn family(&self, prefix: &str) -> Result<Family> {
        let pad = self.usize("pad_token_id")?.unwrap_or(1);
        let Ok(pad) = u32::try_from(pad) else {
            return self.bad(format!("pad_token_id is {pad}, expected at most {}", u32::MAX));
        };
        let word = format!("{prefix}embeddings.word_embeddings.weight");
        let embedding = self.size(("embedding_size", 128), &word, 1)?;
        Ok(Family::of(self.facts.model_type, pad, embedding).unwrap_or_default())
    }

    fn bad<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::file(self.path, message))
    }

    /// A value that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn typed<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match read(v) {
                Some(t) => Ok(Some(t)),
                None => self.bad(format!("{key} is {}, expected {expected}", short(v))),
            },
        }
    }

    fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn text(&self, key: &str) -> Result<Option<String>> {
        self.typed(key, "a string", |v| v.as_str().map(str::to_owned))
    }

    /// A size from the config, else from a tensor's shape, else what transformers takes.
    fn size(&self, (key, default): (&str, usize), tensor: &str, axis: usize) -> Result<usize> {
        let seen = || self.shapes.get(tensor).and_then(|s| s.get(axis)).copied();
        Ok(self.usize(key)?.or_else(seen).unwrap_or(default))
    }

    fn refuse_other_families(&self) -> Result<()> {
        if let Some(found) = self.text("model_type")?
            && !MODEL_TYPES.contains(&found.as_str())
        {
            return self
                .bad(format!("model_type {found:?} is not supported; supported are: {}", MODEL_TYPES.join(", ")));
        }
        if let Some(found) = self.text("position_embedding_type")?
            && found != "absolute"
        {
            return self.bad(format!("position_embedding_type {found:?} is not supported; supported is: absolute"));
        }
        for key in ["is_decoder", "add_cross_attention"] {
            if self.get(key) == Some(&Value::Bool(true)) {
                return self.bad(format!("{key} is true; only encoders are supported"));
            }
        }
        Problem::of_config(self.map, 0).or_else(|e| self.bad(e)).map(drop)
    }

    fn activation(&self) -> Result<Activation> {
        let key = self.facts.activation;
        match self.text(key)?.as_deref() {
            None | Some("gelu") => Ok(Activation::Gelu),
            Some("relu") => Ok(Activation::Relu),
            Some(other) => self.bad(format!("{key} {other:?} is not supported; supported are: gelu, relu")),
        }
    }

    fn ours(&self) -> Result<Option<Ours>> {
        let Some(value) = self.get("quetsch") else { return Ok(None) };
        if let Some(version) = value.get("version").and_then(Value::as_u64)
            && version > VERSION as u64
        {
            return self.bad(format!(
                "key `quetsch` has version {version}, this program reads {VERSION}: use a newer Quetsch"
            ));
        }
        match Ours::deserialize(value) {
            Ok(ours) => Ok(Some(ours)),
            Err(e) => self.bad(format!("key `quetsch`: {e}")),
        }
    }

    /// The body's prefix and the kind of head.
    fn architecture(&self) -> Result<(String, Kind)> {
        let names: Vec<&str> = match self.get("architectures") {
            None => vec![],
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            Some(v) => return self.bad(format!("architectures is {}, expected a list of names", short(v))),
        };
        let (has, facts) = (|name: &str| self.shapes.contains_key(name), self.facts);
        let found = |p: &&str| has(&format!("{p}embeddings.word_embeddings.weight"));
        let prefix = [facts.prefix, "backbone.", ""].into_iter().find(found);
        let kind = names.iter().find_map(|&name| match name.strip_prefix(facts.class) {
            Some("ForSequenceClassification") => Some(Kind::Stock),
            Some("ForTokenClassification") => Some(Kind::Tokens),
            Some("Model" | "ForMaskedLM" | "ForPreTraining") => Some(Kind::Body),
            _ if name == "StudentHFModel" => Some(Kind::Student),
            _ => None, // somebody's own class: the tensors decide
        });
        let has_stock = |p: &str| facts.head.iter().all(|name| has(&format!("{}.weight", name.replace("{p}", p))));
        let kind = kind.unwrap_or_else(|| match prefix {
            _ if has("head.1.weight") && has("head.4.weight") => Kind::Student,
            Some(p) if has_stock(p) => Kind::Stock,
            _ => Kind::Body,
        });
        let usual = match kind {
            Kind::Student => "backbone.",
            Kind::Stock | Kind::Tokens => facts.prefix,
            Kind::Body => "",
        };
        Ok((prefix.unwrap_or(usual).to_owned(), kind))
    }

    fn layers(&self, ours: Option<&Ours>, names: &ModelSpec, original_heads: u16) -> Result<Vec<LayerShape>> {
        let up = |l: usize| names.name(Tensor::B(Lin::Up(l)));
        let seen = || (0..).take_while(|&l| self.shapes.contains_key(&up(l))).count();
        let (key, usual) = self.facts.layers;
        let n = match self.usize(key)? {
            Some(n) if n > 1024 => return self.bad(format!("{key} is {n}, expected at most 1024")),
            Some(n) => n,
            None if !self.shapes.is_empty() => seen(),
            None => usual,
        };
        let ffn = self.size(self.facts.ffn, &up(0), 0)?;
        let pruned = self.pruned_heads(n, original_heads)?;
        let kept = |l: usize| match &pruned {
            Some(p) => (0..original_heads).filter(|h| !p[l].contains(h)).collect(),
            None => (0..original_heads).collect::<Vec<u16>>(),
        };
        let Some(listed) = ours.and_then(|o| o.layers.as_ref()) else {
            return Ok((0..n).map(|l| LayerShape { heads: kept(l), ffn }).collect());
        };
        if listed.len() != n {
            return self.bad(format!("{key} is {n}, but key `quetsch` lists {} layers", listed.len()));
        }
        for (l, layer) in listed.iter().enumerate() {
            if pruned.is_some() && layer.heads != kept(l) {
                return self.bad(format!(
                    "layer {l}: key `quetsch` keeps heads {:?}, the pruned-heads key keeps {:?}; remove the stale one",
                    layer.heads,
                    kept(l)
                ));
            }
        }
        Ok(listed.iter().map(|l| LayerShape { heads: l.heads.clone(), ffn: l.ffn }).collect())
    }

    /// Original indices of the removed heads per layer; `None` when no key says anything.
    fn pruned_heads(&self, layers: usize, original_heads: u16) -> Result<Option<Vec<BTreeSet<u16>>>> {
        let mut found: Option<(&str, Vec<BTreeSet<u16>>)> = None;
        for key in PRUNED_KEYS {
            let Some(value) = self.get(key) else { continue };
            let Value::Object(entries) = value else {
                return self.bad(format!("{key} is {}, expected {{\"layer\": [heads]}}", short(value)));
            };
            if entries.is_empty() {
                continue; // transformers 4 writes an empty one beside the student's
            }
            let mut removed = vec![BTreeSet::new(); layers];
            for (layer, heads) in entries {
                let Some(l) = layer.trim().parse().ok().filter(|l: &usize| *l < layers) else {
                    return self.bad(format!("{key}: {layer:?} is no layer; there are {layers}"));
                };
                let head = |v: &Value| {
                    v.as_u64().filter(|h| *h < original_heads as u64).map(|h| h as u16).ok_or_else(|| v.clone())
                };
                match heads.as_array().map(|a| a.iter().map(head).collect::<std::result::Result<Vec<_>, _>>()) {
                    Some(Ok(heads)) => removed[l].extend(heads),
                    Some(Err(v)) => {
                        return self.bad(format!(
                            "{key}: layer {l} names head {}, expected 0 to {}",
                            short(&v),
                            original_heads.saturating_sub(1)
                        ));
                    }
                    None => return self.bad(format!("{key}: layer {l} is {}, expected a list", short(heads))),
                }
            }
            match &found {
                Some((other, heads)) if *heads != removed => {
                    return self.bad(format!("{other} and {key} remove different heads"));
                }
                _ => found = Some((key, removed)),
            }
        }
        Ok(found.map(|(_, heads)| heads))
    }

    fn labels(&self, classifier: Option<usize>, warnings: &mut Vec<String>) -> Result<Vec<String>> {
        let declared = self.usize("num_labels")?;
        let entries = match self.get("id2label") {
            None => None,
            Some(Value::Object(m)) if m.is_empty() => None,
            Some(Value::Object(m)) => Some(m),
            Some(v) => return self.bad(format!("id2label is {}, expected {{\"0\": \"name\", ..}}", short(v))),
        };
        let Some(entries) = entries else {
            let n = declared.or(classifier).unwrap_or(2);
            if n > 1 << 20 {
                return self.bad(format!("num_labels is {n}, expected at most {}", 1 << 20));
            }
            return Ok((0..n).map(|i| format!("LABEL_{i}")).collect());
        };
        let mut by_id = BTreeMap::new();
        for (id, name) in entries {
            let Ok(i) = id.trim().parse::<usize>() else {
                return self.bad(format!("id2label: key {id:?} is not a class index"));
            };
            let Some(name) = name.as_str() else {
                return self.bad(format!("id2label: class {i} is {}, expected a name", short(name)));
            };
            if by_id.insert(i, name.to_owned()).is_some() {
                return self.bad(format!("id2label: class {i} stands there twice"));
            }
        }
        if let Some(gap) = (0..by_id.len()).find(|i| !by_id.contains_key(i)) {
            return self.bad(format!(
                "id2label has {} names but none for class {gap}; expected 0 to {} without gaps",
                by_id.len(),
                by_id.len() - 1
            ));
        }
        let labels: Vec<String> = by_id.into_values().collect();
        if declared.is_some_and(|n| n != labels.len()) {
            warnings.push(format!(
                "{}: num_labels and id2label disagree; id2label's {} names are used",
                self.path.display(),
                labels.len()
            ));
        }
        if let Some(Value::Object(ids)) = self.get("label2id") {
            let differs = |(i, l): &(usize, &String)| ids.get(*l).is_none_or(|v| v.as_u64() != Some(*i as u64));
            if let Some((i, name)) = labels.iter().enumerate().find(differs) {
                warnings.push(format!(
                    "{}: label2id disagrees with id2label at class {i} ({name}); id2label is used",
                    self.path.display()
                ));
            }
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = labels.iter().find(|l| !seen.insert(*l)) {
            warnings.push(format!("{}: id2label has the name {twice:?} twice", self.path.display()));
        }
        Ok(labels)
    }

    fn sites(&self, ours: Option<&Ours>) -> Result<BTreeMap<String, Scheme>> {
        let mut sites = BTreeMap::new();
        for (site, name) in ours.iter().flat_map(|o| &o.sites) {
            match name.parse() {
                Ok(scheme) => sites.insert(site.clone(), scheme),
                Err(e) => return self.bad(format!("key `quetsch`, site {site}: {e}")),
            };
        }
        Ok(sites)
    }

    fn quantization(&self, key: &str) -> Result<Option<&Value>> {
        match self.get("quantization_config") {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(map.get(key).filter(|v| !v.is_null())),
            Some(v) => self.bad(format!("quantization_config is {}, expected {{\"key\": value, ..}}", short(v))),
        }
    }

    /// bitsandbytes itself defaults to float32.
    fn compute(&self) -> Result<Compute> {
        let key = "bnb_4bit_compute_dtype";
        let Some(value) = self.quantization(key)? else { return Ok(Compute::F32) };
        match value.as_str().and_then(Compute::named) {
            Some(compute) => Ok(compute),
            None => self.bad(format!("{key} is {}, expected float32, float16 or bfloat16", short(value))),
        }
    }

    fn threshold(&self) -> Result<f32> {
        match self.quantization("llm_int8_threshold")? {
            None => Ok(int8::THRESHOLD),
            Some(v) => match v.as_f64().filter(|t| t.is_finite() && *t >= 0.0) {
                Some(t) => Ok(t as f32),
                None => self.bad(format!("llm_int8_threshold is {}, expected a number >= 0", short(v))),
            },
        }
    }
}

/// A spec that says nothing yet.
fn blank() -> ModelSpec {
    ModelSpec {
        family: Family::Bert,
        prefix: String::new(),
        vocab: 0,
        positions: 0,
        token_types: 0,
        hidden: 0,
        head_dim: 0,
        original_heads: 0,
        layers: vec![],
        ffn_activation: Activation::Gelu,
        norm_eps: 0.0,
        head: HeadSpec::None,
        unused_pooler: false,
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Body,
    Student,
    Stock,
    Tokens,
}

/// A value for a message: never longer than a line.
fn short(v: &Value) -> String {
    let s = v.to_string();
    match s.char_indices().nth(60) {
        Some((i, _)) => format!("{}..", &s[..i]),
        None => s,
    }
}

/// The name of the class that has this head.
pub(crate) fn architecture(spec: &ModelSpec) -> String {
    let class = spec.family.facts().class;
    match spec.head {
        HeadSpec::None => format!("{class}Model"),
        HeadSpec::MeanMlp { .. } => "StudentHFModel".to_owned(),
        HeadSpec::Pooler { .. } => format!("{class}ForSequenceClassification"),
        HeadSpec::Tokens { .. } => format!("{class}ForTokenClassification"),
    }
}

/// The `config.json` of a checkpoint: what it was read from, with everything that the spec decides written anew.
///
/// # Errors
/// 4-bit linears that compute in different types or int8 linears with different thresholds: the format has one each.
pub fn render(ck: &Checkpoint) -> Result<Map<String, Value>> {
    let (spec, mut map) = (&ck.spec, ck.config.clone());
    let mut set = |key: &str, value: Value| {
        map.insert(key.into(), value);
    };
    let facts = spec.family.facts();
    set("architectures", json!([architecture(spec)]));
    set("model_type", json!(facts.model_type));
    set("vocab_size", json!(spec.vocab));
    set("max_position_embeddings", json!(spec.positions));
    if spec.token_types > 0 {
        set("type_vocab_size", json!(spec.token_types));
    }
    match spec.family {
        Family::Roberta { pad, .. } => set("pad_token_id", json!(pad)),
        Family::Electra { embedding } => set("embedding_size", json!(embedding)),
        Family::Bert | Family::DistilBert => {}
    }
    set(facts.hidden.0, json!(spec.hidden));
    set(facts.heads.0, json!(spec.original_heads));
    set(facts.layers.0, json!(spec.layers.len()));
    // Uneven widths have no standard key; the widest is the least wrong, our own key has them all.
    if let Some(ffn) = spec.layers.iter().map(|l| l.ffn).max() {
        set(facts.ffn.0, json!(ffn));
    }
    set(facts.activation, json!(if spec.ffn_activation == Activation::Relu { "relu" } else { "gelu" }));
    if let Some(key) = facts.norm_eps {
        // The shortest decimal of the f32, not the f32's digits as f64.
        set(key, json!(spec.norm_eps.to_string().parse::<f64>().unwrap_or(spec.norm_eps as f64)));
    }
    let dtype = if let Stored::Float { dtype, .. } = ck.get(Tensor::Word) { *dtype } else { FloatType::F32 };
    set("dtype", json!(dtype.name()));
    if !ck.labels.is_empty() {
        let names = ck.labels.iter().enumerate();
        set("id2label", names.clone().map(|(i, l)| (i.to_string(), json!(l))).collect::<Map<_, _>>().into());
        set("label2id", names.map(|(i, l)| (l.clone(), json!(i))).collect::<Map<_, _>>().into());
        set("problem_type", json!(ck.task().unwrap_or_default().problem.config_name()));
    }
    if let Some(n) = ck.max_length {
        set("max_length", json!(n));
    }
    // What the spec or the standard keys now say, or what only the old files could keep.
    let stale = ["torch_dtype", "num_labels", "auto_map", "quantization_config"].into_iter().chain(PRUNED_KEYS);
    stale.for_each(|key| drop(map.shift_remove(key)));
    if ck.labels.is_empty() {
        ["id2label", "label2id", "problem_type"].into_iter().for_each(|key| drop(map.shift_remove(key)));
    }
    let pruned = pruned_heads(spec);
    if !pruned.is_empty() {
        let key = if matches!(spec.head, HeadSpec::MeanMlp { .. }) { PRUNED_KEYS[0] } else { PRUNED_KEYS[1] };
        map.insert(key.into(), pruned.into());
    }
    map.entry("pad_token_id").or_insert(json!(0));
    let linears = quantised(ck, Role::Weight);
    if !linears.is_empty() {
        map.insert("quantization_config".into(), quantization_config(ck, &linears)?);
    }
    let mut ours = map.get("quetsch").and_then(Value::as_object).cloned().unwrap_or_default();
    ours.insert("version".into(), json!(VERSION));
    ours.insert("head_dim".into(), json!(spec.head_dim));
    let layers = spec.layers.iter().map(|l| json!({"heads": l.heads, "ffn": l.ffn}));
    ours.insert("layers".into(), layers.collect());
    ours.shift_remove("sites");
    let sites: BTreeMap<_, _> = quantised(ck, Role::Embedding).into_iter().chain(linears).collect();
    if !sites.is_empty() {
        let names = sites.iter().map(|(site, s)| (site.clone(), json!(s.name())));
        ours.insert("sites".into(), names.collect::<Map<_, _>>().into());
    }
    map.insert("quetsch".into(), ours.into());
    Ok(map)
}

fn pruned_heads(spec: &ModelSpec) -> Map<String, Value> {
    let removed = |l: &LayerShape| (0..spec.original_heads).filter(|h| !l.heads.contains(h)).collect::<Vec<_>>();
    let layers = spec.layers.iter().map(removed).enumerate().filter(|(_, r)| !r.is_empty());
    layers.map(|(l, r)| (l.to_string(), json!(r))).collect()
}

/// Module name and scheme of every quantised tensor of one role.
fn quantised(ck: &Checkpoint, role: Role) -> BTreeMap<String, Scheme> {
    let module = |def: TensorDef| def.name.trim_end_matches(".weight").to_owned();
    let all = ck.tensors().filter(|(def, _)| def.role == role).map(|(def, t)| (module(def), Scheme::of(t)));
    all.filter(|(_, scheme)| scheme.float().is_none()).collect()
}

/// The block that makes transformers build bitsandbytes linears. The skip list is always written: its default differs
/// between transformers versions.
fn quantization_config(ck: &Checkpoint, sites: &BTreeMap<String, Scheme>) -> Result<Value> {
    let four_bit = |s: &Scheme| match *s {
        Scheme::Nf4 { double_quant, compute, .. } => Some(("nf4", double_quant, compute)),
        Scheme::Fp4 { double_quant, compute, .. } => Some(("fp4", double_quant, compute)),
        _ => None,
    };
    let four: Vec<_> = sites.values().filter_map(four_bit).collect();
    if four.windows(2).any(|w| w[0].2 != w[1].2) {
        return Err(Error::invalid("4-bit sites compute in different types; config.json has one for all of them"));
    }
    let threshold = |s: &Scheme| if let Scheme::BnbInt8 { threshold } = *s { Some(threshold) } else { None };
    let thresholds: Vec<f32> = sites.values().filter_map(threshold).collect();
    if thresholds.windows(2).any(|w| w[0] != w[1]) {
        return Err(Error::invalid(
            "bnb-int8 sites have different thresholds; config.json has one for all of them",
        ));
    }
    // With 4-bit and int8 sites in one file no loader of today reads all: the int8 ones stand here as skipped, and the
    // shape that they are stored in stops who takes them for floats. Ours goes by what is stored.
    let is_four = !four.is_empty();
    let (kind, double_quant, compute) = four.first().copied().unwrap_or(("fp4", false, Compute::F32));
    let converted = |s: &Scheme| four_bit(s).is_some() == is_four;
    let skipped = ck.spec.linears().into_iter().map(|(s, _, _)| ck.spec.module(s));
    let skipped: Vec<String> = skipped.filter(|m| !sites.get(m).is_some_and(converted)).collect();
    Ok(json!({
        "_load_in_4bit": is_four,
        "_load_in_8bit": !is_four,
        "bnb_4bit_compute_dtype": compute.name(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": thresholds.first().copied().unwrap_or(int8::THRESHOLD) as f64,
        "load_in_4bit": is_four,
        "load_in_8bit": !is_four,
        "quant_method": "bitsandbytes",
    }))
}
