//! The files of a WordPiece tokenizer that are missing, from those that are there. transformers 5 saves two of the four,
//! older programs read the other two: `vocab.txt` and `special_tokens_map.json`.

use super::{BertOptions, Tokenizer, TokenizerFiles};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use tokenizers::{ModelWrapper, NormalizerWrapper};

/// What transformers 5 notes in `tokenizer_config.json` about the computer that it ran on.
const LOCAL: [&str; 2] = ["is_local", "local_files_only"];

impl TokenizerFiles {
    /// All four files of a WordPiece tokenizer; those that are there stay as they are, but for notes about somebody's
    /// computer. Texts are of at most `longest` tokens. Other tokenizers, and files that cannot be read, have nothing added.
    ///
    /// # Errors
    /// JSON that cannot be written.
    pub fn complete(&self, longest: usize) -> Result<TokenizerFiles> {
        let mut all = self.clone();
        if let Some(config) = self.files.get("tokenizer_config.json")
            && let Ok(mut map) = serde_json::from_slice::<Map<String, Value>>(config)
            && LOCAL.iter().filter(|key| map.shift_remove(**key).is_some()).count() > 0
        {
            all.files.insert("tokenizer_config.json".into(), pretty(&map.into())?.into_bytes());
        }
        let missing = |name: &str| !self.files.contains_key(name);
        if !["tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"]
            .into_iter()
            .any(missing)
        {
            return Ok(all);
        }
        let Ok(tokenizer) = Tokenizer::new(self) else { return Ok(all) };
        let ModelWrapper::WordPiece(_) = tokenizer.inner().get_model() else { return Ok(all) };
        let mut add = |name: &str, text: String| {
            all.files.entry(name.into()).or_insert(text.into_bytes());
        };
        if missing("tokenizer.json") {
            let json = tokenizer.inner().to_string(true);
            add("tokenizer.json", json.map_err(|e| Error::invalid(format!("tokenizer.json: {e}")))?);
        }
        if let Some(lines) = vocab(&tokenizer) {
            add("vocab.txt", lines);
        }
        if let Some(options) = options(self, &tokenizer)? {
            let special = special(&options, &tokenizer);
            add("special_tokens_map.json", pretty(&special.clone().into())?);
            add("tokenizer_config.json", pretty(&config(special, &options, longest))?);
        }
        Ok(all)
    }
}

/// A line a token in the order of ids; nothing where ids have gaps or a token would be two lines.
fn vocab(tokenizer: &Tokenizer) -> Option<String> {
    let mut tokens: Vec<(u32, String)> =
        tokenizer.inner().get_vocab(false).into_iter().map(|(token, id)| (id, token)).collect();
    tokens.sort_unstable();
    let fits = |(i, (id, token)): (usize, &(u32, String))| *id as usize == i && !token.contains(['\n', '\r']);
    tokens.iter().enumerate().all(fits).then(|| tokens.iter().map(|(_, token)| format!("{token}\n")).collect())
}

/// BERT's options: what `tokenizer_config.json` says, else what `tokenizer.json` does; nothing if that is not BERT's way.
fn options(files: &TokenizerFiles, tokenizer: &Tokenizer) -> Result<Option<BertOptions>> {
    if files.files.contains_key("tokenizer_config.json") || !files.files.contains_key("tokenizer.json") {
        return BertOptions::read(files).map(Some);
    }
    Ok(match tokenizer.inner().get_normalizer() {
        Some(NormalizerWrapper::BertNormalizer(bert)) => Some(BertOptions {
            lowercase: bert.lowercase,
            strip_accents: bert.strip_accents,
            chinese: bert.handle_chinese_chars,
            ..BertOptions::default()
        }),
        _ => None,
    })
}

/// The special tokens that there are, by transformers' names for them.
fn special(options: &BertOptions, tokenizer: &Tokenizer) -> Map<String, Value> {
    let named = ["pad", "unk", "cls", "sep", "mask"].into_iter().zip(&options.special);
    let there = named.filter(|(_, token)| tokenizer.inner().token_to_id(token).is_some());
    there.map(|(name, token)| (format!("{name}_token"), json!(token))).collect()
}

fn config(mut special: Map<String, Value>, options: &BertOptions, longest: usize) -> Value {
    let more = json!({"do_lower_case": options.lowercase, "strip_accents": options.strip_accents,
        "tokenize_chinese_chars": options.chinese, "do_basic_tokenize": true, "never_split": null,
        "model_max_length": longest, "padding_side": "right", "tokenizer_class": "BertTokenizer"});
    special.extend(more.as_object().cloned().unwrap_or_default());
    special.into()
}

fn pretty(value: &Value) -> Result<String> {
    serde_json::to_string_pretty(value).map(|s| s + "\n").map_err(|e| Error::invalid(format!("JSON: {e}")))
}
