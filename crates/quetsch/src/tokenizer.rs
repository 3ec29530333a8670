//! Text -> token ids, by the `tokenizers` crate: from `tokenizer.json`, or built from `vocab.txt` alone as
//! transformers builds BERT's. Truncation and padding in the file are overridden: published files carry settings
//! (128 tokens, padded) that are not the model's.

mod complete;

use crate::batch::Encoding;
use crate::error::{Error, Result};
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, EncodeInput, Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PostProcessor,
    PreTokenizedString, PreTokenizer, Trainer, TruncationDirection, TruncationParams, truncate_encodings,
};

/// The tokenizer's files of a model directory, as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerFiles {
    /// Bytes by file name.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// Which end of a text that is too long is cut off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cut {
    /// The beginning.
    Left,
    /// The end, as everywhere in training and `predict`.
    #[default]
    Right,
}

/// A tokenizer: immutable, shared between threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

/// BERT's special tokens in the order of a vocabulary made here.
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

fn invalid(what: &str) -> impl FnOnce(tokenizers::Error) -> Error {
    move |e| Error::invalid(format!("{what}: {e}"))
}

/// A call of the tokenizers library, which panics on some of what it cannot use (a decoder of no known kind, a damaged
/// table of characters): then the tokenizer's files are wrong as well.
fn guarded<T>(what: &str, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    // What f changes is not used after a panic: it is an error of the whole call.
    let done = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| {
        Err("the tokenizers library cannot use it; write it again with \
             AutoTokenizer.from_pretrained(..).save_pretrained(..)"
            .into())
    });
    done.map_err(invalid(what))
}

impl Tokenizer {
    /// From `tokenizer.json`, else from `vocab.txt` and, where it is there, `tokenizer_config.json`.
    ///
    /// # Errors
    /// Neither is there, or it cannot be read.
    pub fn new(files: &TokenizerFiles) -> Result<Tokenizer> {
        let mut inner = match (files.files.get("tokenizer.json"), files.files.get("vocab.txt")) {
            (Some(json), _) => {
                serde_json::from_slice::<IgnoredAny>(json)
                    .map_err(|e| Error::invalid(format!("tokenizer.json: not JSON: {e}")))?;
                guarded("tokenizer.json", || tokenizers::Tokenizer::from_bytes(json))?
            }
            (None, Some(vocab)) => bert(vocab, &BertOptions::read(files)?)?,
            (None, None) => {
                return Err(Error::invalid(
                    "the model directory has no tokenizer; looked for tokenizer.json and vocab.txt (WordPiece \
                     alone): copy them from the model it was made from, or write tokenizer.json with \
                     AutoTokenizer.from_pretrained(..).save_pretrained(..)",
                ));
            }
        };
        guarded("tokenizer", || inner.with_truncation(None).map(|_| ()))?;
        inner.with_padding(None);
        Ok(Tokenizer { inner })
    }

    /// The ids of one text, special tokens included, cut on the right to `max_length`.
    ///
    /// # Errors
    /// `max_length` has no room for the special tokens.
    pub fn encode(&self, text: &str, max_length: usize) -> Result<Encoding> {
        self.encode_cut(text, None, max_length, Cut::Right)
    }

    /// The ids of a pair of texts; the longer one is cut first.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(&self, a: &str, b: &str, max_length: usize) -> Result<Encoding> {
        self.encode_cut(a, Some(b), max_length, Cut::Right)
    }

    /// Many texts on `threads` threads; the result does not depend on their number.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_all(
        &self,
        texts: &[impl AsRef<str> + Sync],
        max_length: usize,
        threads: usize,
    ) -> Result<Vec<Encoding>> {
        spread(texts, threads, |text| self.encode(text.as_ref(), max_length))
    }

    /// The ids of a sentence that is cut into words, and the place of each word's first token; none for words behind
    /// `max_length` and for those that have no token. As `is_split_into_words` in transformers.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_words(&self, words: &[String], max_length: usize) -> Result<(Encoding, Vec<Option<u32>>)> {
        let special = self.room_for_special(false, max_length)?;
        let cut = TruncationParams { max_length: max_length - special, ..TruncationParams::default() };
        let e = guarded("tokenizer", || {
            let plain = self.inner.encode(EncodeInput::from(words), false)?;
            let (plain, _) = truncate_encodings(plain, None, &cut)?;
            self.inner.post_process(plain, None, true)
        })?;
        let mut first = vec![None; words.len()];
        for (token, word) in (0..).zip(e.get_word_ids()) {
            if let Some(place) = word.and_then(|w| first.get_mut(w as usize)) {
                place.get_or_insert(token);
            }
        }
        Ok((Encoding { ids: e.get_ids().to_vec(), types: vec![] }, first))
    }

    /// Many sentences of words on `threads` threads.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_words_all(
        &self,
        sentences: &[Vec<String>],
        max_length: usize,
        threads: usize,
    ) -> Result<Vec<(Encoding, Vec<Option<u32>>)>> {
        spread(sentences, threads, |words| self.encode_words(words, max_length))
    }

    fn room_for_special(&self, is_pair: bool, max_length: usize) -> Result<usize> {
        let special = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(is_pair));
        if max_length <= special {
            return Err(Error::invalid(format!(
                "max_length is {max_length}, expected more than the {special} special tokens"
            )));
        }
        Ok(special)
    }

    /// The ids of a text or a pair, cut at the end that `cut` says. With `max_length` `usize::MAX` nothing is cut.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_cut(&self, a: &str, b: Option<&str>, max_length: usize, cut: Cut) -> Result<Encoding> {
        let special = self.room_for_special(b.is_some(), max_length)?;
        // Cut on the left, a text's end is wanted, so all of it is read.
        let (direction, enough) = match cut {
            Cut::Left => (TruncationDirection::Left, usize::MAX),
            Cut::Right => (TruncationDirection::Right, max_length),
        };
        let plain = |text| self.beginning(text, enough);
        let cut = TruncationParams { max_length: max_length - special, direction, ..TruncationParams::default() };
        let pair = b.map(plain).transpose()?;
        let a = plain(a)?;
        let e = guarded("tokenizer", || {
            let (a, b) = truncate_encodings(a, pair, &cut)?;
            self.inner.post_process(a, b, true)
        })?;
        let types = e.get_type_ids();
        let types = if types.iter().all(|&t| t == 0) { vec![] } else { types.to_vec() };
        Ok(Encoding { ids: e.get_ids().to_vec(), types })
    }

    /// The tokens of a text, without special ones; of a long text only the beginning, at least `enough` tokens of it.
    ///
    /// Tokenisers take a text apart at white space first, so that its beginning up to white space has the tokens that
    /// it has in the whole text, but for the last few: a cut may join or part white space differently.
    fn beginning(&self, text: &str, enough: usize) -> Result<tokenizers::Encoding> {
        const LONG: usize = 1 << 14; // bytes
        const LAST_FEW: usize = 16;
        let encode = |text: &str| guarded("tokenizer", || self.inner.encode_fast(EncodeInput::from(text), false));
        let mut size = LONG;
        while size < text.len() && enough < usize::MAX {
            let cut = text.char_indices().skip_while(|(i, _)| *i < size).find(|(_, c)| c.is_whitespace());
            let Some((cut, _)) = cut else { break };
            let e = encode(&text[..cut])?;
            if e.len() >= enough.saturating_add(LAST_FEW) {
                return Ok(e);
            }
            size = 4 * cut;
        }
        encode(text)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The highest token id + 1: the rows that the word embedding table must have.
    pub fn rows(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// A hash of what decides the ids: equal for tokenizers that give equal ids, whichever files they come from.
    pub fn fingerprint(&self) -> String {
        let t = &self.inner;
        let mut vocab: Vec<(u32, String)> = t.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        vocab.sort();
        let mut added: Vec<_> = t.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        let added: Vec<_> = added
            .iter()
            .map(|(id, a)| json!([id, a.content, a.single_word, a.lstrip, a.rstrip, a.normalized]))
            .collect();
        let mut model = serde_json::to_value(t.get_model()).unwrap_or_default();
        if let Some(m) = model.as_object_mut().filter(|m| m.get("vocab").is_some_and(Value::is_object)) {
            m.shift_remove("vocab"); // written in hash order; `vocab` above is the same, sorted
        }
        let parts = json!({
            "vocab": vocab,
            "added": added,
            "model": model,
            "normalizer": t.get_normalizer().map(resolved),
            "pre_tokenizer": serde_json::to_value(t.get_pre_tokenizer()).unwrap_or_default(),
            "post_processor": self.special_layout(),
        });
        blake3::hash(parts.to_string().as_bytes()).to_hex().to_string()
    }

    /// What the post-processor does to one and two texts: `BertProcessing` and `TemplateProcessing` can say the same.
    fn special_layout(&self) -> Value {
        let probe = || guarded("tokenizer", || self.inner.encode_fast("a", false)).unwrap_or_default();
        [None, Some(probe())]
            .into_iter()
            .map(|pair| {
                let e = guarded("tokenizer", || self.inner.post_process(probe(), pair, true)).unwrap_or_default();
                json!([e.get_ids(), e.get_type_ids()])
            })
            .collect()
    }
}

/// `f` of all items, dealt to threads, in order.
fn spread<I: Sync, O: Send>(items: &[I], threads: usize, f: impl Fn(&I) -> Result<O> + Sync) -> Result<Vec<O>> {
    let part = items.len().div_ceil(threads.max(1)).max(1);
    let all = |items: &[I]| items.iter().map(&f).collect::<Result<Vec<O>>>();
    if items.len() <= part {
        return all(items);
    }
    let parts = std::thread::scope(|scope| {
        let all = &all;
        let running: Vec<_> = items.chunks(part).map(|items| scope.spawn(move || all(items))).collect();
        running.into_iter().map(|r| r.join()).collect::<Vec<_>>()
    });
    let mut done = Vec::with_capacity(items.len());
    for part in parts {
        done.extend(part.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
    }
    Ok(done)
}

/// A normalizer's JSON with `strip_accents` null replaced by what it means.
fn resolved(normalizer: &tokenizers::NormalizerWrapper) -> Value {
    let mut json = serde_json::to_value(normalizer).unwrap_or_default();
    if json["type"] == "BertNormalizer" && json["strip_accents"].is_null() {
        json["strip_accents"] = json["lowercase"].clone();
    }
    json
}

/// What `tokenizer_config.json` says about BERT's own tokenization.
struct BertOptions {
    lowercase: bool,
    strip_accents: Option<bool>,
    chinese: bool,
    /// Content of the special tokens, in the order of [`SPECIAL`].
    special: [String; 5],
}

impl Default for BertOptions {
    fn default() -> Self {
        BertOptions { lowercase: true, strip_accents: None, chinese: true, special: SPECIAL.map(str::to_owned) }
    }
}

impl BertOptions {
    fn read(files: &TokenizerFiles) -> Result<BertOptions> {
        let mut options = BertOptions::default();
        let Some(bytes) = files.files.get("tokenizer_config.json") else { return Ok(options) };
        let map: Map<String, Value> = serde_json::from_slice(bytes)
            .map_err(|e| Error::invalid(format!("tokenizer_config.json: not a JSON object: {e}")))?;
        let flag = |key: &str| map.get(key).and_then(Value::as_bool);
        options.lowercase = flag("do_lower_case").unwrap_or(true);
        options.strip_accents = flag("strip_accents");
        options.chinese = flag("tokenize_chinese_chars").unwrap_or(true);
        for (token, key) in options.special.iter_mut().zip(["pad", "unk", "cls", "sep", "mask"]) {
            // A string, or an added token with its content.
            let value = map.get(&format!("{key}_token"));
            let content = value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
            if let Some(content) = content {
                *token = content.to_owned();
            }
        }
        Ok(options)
    }

    fn normalizer(&self) -> BertNormalizer {
        BertNormalizer::new(true, self.chinese, self.strip_accents, self.lowercase)
    }
}

/// BERT's WordPiece tokenizer over the lines of a `vocab.txt`.
fn bert(vocab: &[u8], options: &BertOptions) -> Result<tokenizers::Tokenizer> {
    let [_, unk, cls, sep, _] = &options.special;
    let model = WordPiece::builder()
        .vocab(WordPiece::read_bytes(vocab).map_err(invalid("vocab.txt"))?)
        .unk_token(unk.clone())
        .continuing_subword_prefix("##".into())
        .max_input_chars_per_word(100)
        .build()
        .map_err(invalid("vocab.txt"))?;
    let mut ids = vec![];
    for token in &options.special {
        let missing = || Error::invalid(format!("vocab.txt has no {token}"));
        ids.push(model.token_to_id(token).ok_or_else(missing)?);
    }
    let template = TemplateProcessing::builder()
        .try_single(format!("{cls}:0 $A:0 {sep}:0"))
        .and_then(|b| b.try_pair(format!("{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1")))
        .map_err(|e| Error::invalid(format!("special tokens: {e}")))?
        .special_tokens(vec![(cls.clone(), ids[2]), (sep.clone(), ids[3])])
        .build()
        .map_err(|e| Error::invalid(format!("special tokens: {e}")))?;
    let mut t = tokenizers::Tokenizer::new(model);
    t.with_normalizer(Some(options.normalizer())).map_err(invalid("normalizer"))?;
    t.with_pre_tokenizer(Some(BertPreTokenizer));
    t.with_post_processor(Some(template));
    t.with_decoder(Some(tokenizers::decoders::wordpiece::WordPiece::default()));
    t.add_special_tokens(options.special.iter().map(|s| AddedToken::from(s.clone(), true)))
        .map_err(invalid("special tokens"))?;
    Ok(t)
}

/// Trains a lower-casing WordPiece vocabulary and writes the four files that every loader of BERT tokenizers reads.
/// The same texts give the same files.
///
/// # Errors
/// `vocab_size` has no room for the special tokens and the alphabet.
pub fn train_wordpiece(texts: &[impl AsRef<str> + Sync], vocab_size: usize) -> Result<TokenizerFiles> {
    let options = BertOptions::default();
    let mut words = vec![];
    for text in texts {
        words.extend(split(text.as_ref(), &options)?);
    }
    // The trainer numbers `##x` in the order of a hash map, and numbers break its ties: pin all single characters by
    // asking for them first, as if they were special. Printable ASCII is among them, so that no common text of later
    // days is unknown.
    let common = || ('!'..='~').filter(|c| !c.is_ascii_uppercase());
    let alphabet: BTreeSet<char> = words.iter().flat_map(|w| w.chars()).chain(common()).collect();
    let inner = words.iter().flat_map(|w| w.chars().skip(1));
    let inner: BTreeSet<char> = inner.chain(common().filter(char::is_ascii_alphanumeric)).collect();
    let least = SPECIAL.len() + inner.len() + alphabet.len();
    if vocab_size < least {
        return Err(Error::invalid(format!(
            "vocabulary size {vocab_size} is too small: special tokens and single characters take {least}"
        )));
    }
    let single = alphabet.iter().map(char::to_string).chain(inner.iter().map(|c| format!("##{c}")));
    let first = SPECIAL.iter().map(|s| s.to_string()).chain(single);
    let mut trainer = WordPieceTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(first.map(|t| AddedToken::from(t, true)).collect())
        .build();
    trainer.feed(words.iter(), |word| Ok(vec![word.to_owned()])).map_err(invalid("WordPiece training"))?;
    let mut model = WordPiece::default();
    trainer.train(&mut model).map_err(invalid("WordPiece training"))?;
    let mut vocab: Vec<(u32, String)> = model.get_vocab().into_iter().map(|(token, id)| (id, token)).collect();
    vocab.sort_unstable();
    let lines: String = vocab.into_iter().map(|(_, token)| token + "\n").collect();
    TokenizerFiles { files: BTreeMap::from([("vocab.txt".to_owned(), lines.into_bytes())]) }.complete(512)
}

/// A text's words as BERT sees them before WordPiece.
fn split(text: &str, options: &BertOptions) -> Result<Vec<String>> {
    let mut normalized = NormalizedString::from(text);
    options.normalizer().normalize(&mut normalized).map_err(invalid("normalizer"))?;
    let mut words = PreTokenizedString::from(normalized);
    BertPreTokenizer.pre_tokenize(&mut words).map_err(invalid("pre-tokenizer"))?;
    let splits = words.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).collect())
}
