//! Vocabulary pruning: the rows of the word table, and the tokenizer's entries, that given texts need.
//!
//! Kept are the special and added tokens, every single character and `##` character (so that a text that could be
//! tokenised still can be), the pieces seen in the texts, and the first so many entries if that is asked for: BERT's are
//! listed by how frequent they are, so these are the likely ones of texts to come. WordPiece takes the longest piece that matches; a subset
//! of the pieces that has a text's pieces gives the same pieces, and so the same logits to the bit. (A word that was
//! unknown may be known afterwards: the piece that led into the dead end may be gone.)

use crate::checkpoint::{Checkpoint, Stored};
use crate::dir::ModelDir;
use crate::error::{Error, Result};
use crate::spec::{ModelSpec, Tensor};
use crate::tokenizer::{Tokenizer, TokenizerFiles};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// What is left of a model.
pub struct Pruned {
    /// The model with the smaller table and tokenizer.
    pub model: ModelDir,
    /// The old id of each new one, ascending.
    pub kept: Vec<u32>,
}

/// Cuts the vocabulary down to what `texts` need and its `first` entries, those that BERT left unused aside.
///
/// # Errors
/// A tokenizer that is not WordPiece, ids without a row in the word table, or a quantised word table.
pub fn prune(model: &ModelDir, texts: &[impl AsRef<str> + Sync], first: usize, threads: usize) -> Result<Pruned> {
    let tokenizer = Tokenizer::new(&model.tokenizer)?;
    let rows = model.checkpoint.spec.vocab;
    if tokenizer.rows() > rows {
        return Err(Error::invalid(format!(
            "the tokenizer has ids up to {}, the word table {rows} rows: they are not of one model",
            tokenizer.rows() - 1
        )));
    }
    let kept = needed(&tokenizer, texts, first, threads)?;
    let files = rewrite(&model.tokenizer, &tokenizer, &kept)?;
    let checkpoint = keep_rows(&model.checkpoint, &kept)?;
    Ok(Pruned { model: ModelDir { checkpoint, tokenizer: files }, kept })
}

/// The ids to keep, ascending.
fn needed(
    tokenizer: &Tokenizer,
    texts: &[impl AsRef<str> + Sync],
    first: usize,
    threads: usize,
) -> Result<Vec<u32>> {
    let t = tokenizer.inner();
    let tokenizers::ModelWrapper::WordPiece(model) = t.get_model() else {
        return Err(Error::invalid("only a WordPiece vocabulary can be pruned, the tokenizer has another model"));
    };
    let mut keep: BTreeSet<u32> = t.get_added_tokens_decoder().into_keys().collect();
    let prefix = &model.continuing_subword_prefix;
    for (token, id) in t.get_vocab(true) {
        let piece = token.strip_prefix(prefix.as_str()).unwrap_or(&token);
        let is_first = (id as usize) < first && !token.starts_with("[unused");
        if is_first || piece.chars().count() == 1 || token.chars().count() == 1 || token == model.unk_token {
            keep.insert(id);
        }
    }
    for encoding in tokenizer.encode_all(texts, usize::MAX, threads)? {
        keep.extend(encoding.ids);
    }
    Ok(keep.into_iter().collect())
}

/// The checkpoint with these rows of the word table, in this order.
fn keep_rows(parent: &Checkpoint, kept: &[u32]) -> Result<Checkpoint> {
    let (width, spec) = (parent.spec.embedding(), ModelSpec { vocab: kept.len(), ..parent.spec.clone() });
    let mut child = Checkpoint::from_fn(spec, parent.labels.clone(), |def| match parent.get(def.tensor) {
        stored if def.tensor != Tensor::Word => Ok(stored.clone()),
        Stored::Float { dtype, data } => {
            let rows = kept.iter().flat_map(|id| &data[*id as usize * width..][..width]).copied();
            Ok(Stored::Float { dtype: *dtype, data: rows.collect() })
        }
        _ => Err(Error::invalid(format!("{} is quantised: prune the vocabulary before quantising", def.name))),
    })?;
    child.max_length = parent.max_length;
    child.config.clone_from(&parent.config);
    for key in ["pad_token_id", "cls_token_id", "sep_token_id", "unk_token_id", "mask_token_id"] {
        if let Some(id) = child.config.get_mut(key) {
            // An id that is gone names nothing any more.
            *id = new_id(kept, id, key).unwrap_or(Value::Null);
        }
    }
    Ok(child)
}

/// The new id of an old one.
fn new_id(kept: &[u32], old: &Value, place: &str) -> Result<Value> {
    let found = old.as_u64().and_then(|id| kept.binary_search(&u32::try_from(id).ok()?).ok());
    let unknown = || Error::invalid(format!("{place}: token id {old} is not in the vocabulary"));
    found.map(|i| json!(i)).ok_or_else(unknown)
}

/// The tokenizer's files with the kept tokens, numbered anew.
fn rewrite(files: &TokenizerFiles, tokenizer: &Tokenizer, kept: &[u32]) -> Result<TokenizerFiles> {
    let token =
        |id: &u32| tokenizer.token(*id).ok_or_else(|| Error::invalid(format!("token id {id} has no token")));
    let tokens: Vec<String> = kept.iter().map(token).collect::<Result<_>>()?;
    let mut new = files.clone();
    for (name, bytes) in &mut new.files {
        let rewritten = match name.as_str() {
            "vocab.txt" => tokens.iter().map(|t| format!("{t}\n")).collect(),
            "tokenizer.json" | "tokenizer_config.json" | "added_tokens.json" => {
                let mut json: Value =
                    serde_json::from_slice(bytes).map_err(|e| Error::invalid(format!("{name}: {e}")))?;
                match name.as_str() {
                    "tokenizer.json" => tokenizer_json(&mut json, kept)?,
                    "tokenizer_config.json" => tokenizer_config(&mut json, kept)?,
                    _ => each(&mut json, |_, id| renumber(id, kept, name))?,
                }
                serde_json::to_string_pretty(&json).map_err(|e| Error::invalid(format!("{name}: {e}")))? + "\n"
            }
            _ => continue,
        };
        *bytes = rewritten.into_bytes();
    }
    let check = Tokenizer::new(&new)?;
    match tokens.iter().enumerate().find(|(i, t)| check.inner().token_to_id(t) != Some(*i as u32)) {
        Some((i, t)) => Err(Error::invalid(format!(
            "the tokenizer's files are not understood: {t} should have the id {i} afterwards, it has {:?}",
            check.inner().token_to_id(t)
        ))),
        None => Ok(new),
    }
}

fn renumber(id: &mut Value, kept: &[u32], place: &str) -> Result<()> {
    *id = new_id(kept, id, place)?;
    Ok(())
}

/// Calls `f` on every entry of an object.
fn each(json: &mut Value, mut f: impl FnMut(&str, &mut Value) -> Result<()>) -> Result<()> {
    json.as_object_mut().into_iter().flatten().try_for_each(|(k, v)| f(k, v))
}

fn tokenizer_json(json: &mut Value, kept: &[u32]) -> Result<()> {
    let vocab = json["model"]["vocab"].as_object().cloned().unwrap_or_default();
    let mut pieces: Vec<(String, Value)> =
        vocab.into_iter().filter_map(|(token, id)| Some((token, new_id(kept, &id, "vocab").ok()?))).collect();
    pieces.sort_by_key(|(_, id)| id.as_u64());
    json["model"]["vocab"] = pieces.into_iter().collect::<Map<_, _>>().into();
    for added in json["added_tokens"].as_array_mut().into_iter().flatten() {
        renumber(&mut added["id"], kept, "added_tokens")?;
    }
    if let Some(pad) = json.get_mut("padding").and_then(|p| p.get_mut("pad_id")) {
        renumber(pad, kept, "padding")?;
    }
    json.get_mut("post_processor").filter(|p| !p.is_null()).map_or(Ok(()), |p| post_processor(p, kept))
}

fn post_processor(json: &mut Value, kept: &[u32]) -> Result<()> {
    let kind = json["type"].as_str().unwrap_or_default().to_owned();
    match kind.as_str() {
        "ByteLevel" => Ok(()),
        "TemplateProcessing" => each(&mut json["special_tokens"], |_, token| {
            token["ids"].as_array_mut().into_iter().flatten().try_for_each(|id| renumber(id, kept, &kind))
        }),
        "BertProcessing" | "RobertaProcessing" => {
            ["sep", "cls"].into_iter().try_for_each(|key| renumber(&mut json[key][1], kept, &kind))
        }
        "Sequence" => {
            json["processors"].as_array_mut().into_iter().flatten().try_for_each(|p| post_processor(p, kept))
        }
        _ => Err(Error::invalid(format!("tokenizer.json: cannot renumber the post-processor {kind:?}"))),
    }
}

/// Added tokens stand here by their id.
fn tokenizer_config(json: &mut Value, kept: &[u32]) -> Result<()> {
    let Some(added) = json.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) else { return Ok(()) };
    let mut new = Map::new();
    for (id, token) in std::mem::take(added) {
        let old = json!(id.parse::<u64>().ok());
        new.insert(new_id(kept, &old, "added_tokens_decoder")?.to_string(), token);
    }
    *added = new;
    Ok(())
}
