//! BERT's tokenizer for ASCII texts, the same ids as the `tokenizers` crate gives: that keeps for every character where it
//! came from, which takes longer than a small model's forward on one thread.
//!
//! On ASCII BERT's normaliser only lower-cases and turns tabs and ends of lines into spaces; words end at white space, and
//! a punctuation mark is a word. WordPiece (Wu et al. 2016) takes the longest piece from the front, again and again.

use super::call;
use tokenizers::{ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

/// Lookup by pieces of words: open addressing over one string of all pieces.
struct Pieces {
    text: Vec<u8>,
    pieces: Vec<Piece>,
    /// 1 + the index of a piece, 0 where there is none; a power of two, at most half of them taken.
    slots: Vec<u32>,
}

struct Piece {
    start: u32,
    len: u32,
    id: u32,
    /// Whether it goes on with a word (`##..` in the vocabulary).
    inside: bool,
}

/// FNV-1a, byte by byte: the hashes of all beginnings of a word cost one pass.
#[derive(Clone, Copy)]
struct Hash(u64);

impl Hash {
    fn new(inside: bool) -> Hash {
        Hash(0xcbf2_9ce4_8422_2325).then(u8::from(inside))
    }

    fn then(self, byte: u8) -> Hash {
        Hash((self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
    }
}

impl Pieces {
    fn new(vocab: impl ExactSizeIterator<Item = (String, u32)>, prefix: &str) -> Pieces {
        let slots = vec![0; (2 * vocab.len()).next_power_of_two().max(2)];
        let mut all = Pieces { text: vec![], pieces: Vec::with_capacity(vocab.len()), slots };
        for (token, id) in vocab {
            let (inside, token) = match token.strip_prefix(prefix) {
                Some(rest) => (true, rest.as_bytes()),
                None => (false, token.as_bytes()),
            };
            let hash = token.iter().fold(Hash::new(inside), |h, b| h.then(*b));
            let slot = all.probe(hash).find(|slot| all.slots[*slot] == 0);
            if let Some(slot) = slot {
                all.slots[slot] = all.pieces.len() as u32 + 1;
            }
            all.pieces.push(Piece { start: all.text.len() as u32, len: token.len() as u32, id, inside });
            all.text.extend(token);
        }
        all
    }

    fn probe(&self, hash: Hash) -> impl Iterator<Item = usize> + use<> {
        let mask = self.slots.len() - 1;
        let first = (hash.0 ^ hash.0 >> 32) as usize;
        (0..=mask).map(move |i| (first + i) & mask)
    }

    fn find(&self, hash: Hash, inside: bool, text: &[u8]) -> Option<u32> {
        for slot in self.probe(hash) {
            let piece = self.pieces.get((self.slots[slot] as usize).checked_sub(1)?)?;
            let range = piece.start as usize..(piece.start + piece.len) as usize;
            if piece.inside == inside && self.text[range] == *text {
                return Some(piece.id);
            }
        }
        None
    }
}

/// Bytes of a word; BERT's tokenizers take at most 100.
const LONGEST_WORD: usize = 128;

/// A BERT tokenizer as far as ASCII goes.
pub struct Ascii {
    pieces: Pieces,
    unknown: u32,
    /// Longer words are unknown.
    longest_word: usize,
    lowercase: bool,
    /// With these bytes a text may hold an added token, such as `[MASK]`.
    others: [bool; 128],
    /// Ids around those of one text.
    before: Vec<u32>,
    after: Vec<u32>,
}

impl Ascii {
    /// If this tokenizer is BERT's, and its added tokens are searched for in the text as it is.
    pub fn of(tokenizer: &Tokenizer) -> Option<Ascii> {
        let Some(NormalizerWrapper::BertNormalizer(normalizer)) = tokenizer.get_normalizer() else { return None };
        let Some(PreTokenizerWrapper::BertPreTokenizer(_)) = tokenizer.get_pre_tokenizer() else { return None };
        let ModelWrapper::WordPiece(model) = tokenizer.get_model() else { return None };
        let added = tokenizer.get_added_tokens_decoder();
        let prefix = &model.continuing_subword_prefix;
        if !normalizer.clean_text
            || prefix.is_empty()
            || model.max_input_chars_per_word > LONGEST_WORD
            || added.values().any(|token| token.normalized || token.content.is_empty()) {
            return None;
        }
        let mut others = [false; 128];
        for byte in 0..128u8 {
            // The normaliser takes out all control characters but these.
            let foreign = byte.is_ascii_control() && !b"\t\n\r".contains(&byte);
            others[usize::from(byte)] = foreign || added.values().any(|t| t.content.as_bytes()[0] == byte);
        }
        let vocab = tokenizers::Model::get_vocab(model);
        let unknown = *vocab.get(&model.unk_token)?;
        let pieces = Pieces::new(vocab.into_iter(), prefix);
        // What stands around a text is seen on one of a single token.
        let whole = call("tokenizer", || tokenizer.post_process(tokenizer.encode_fast("a", false)?, None, true)).ok()?;
        let place = whole.get_special_tokens_mask().iter().position(|special| *special == 0)?;
        let own = whole.get_special_tokens_mask().iter().filter(|special| **special == 0).count();
        if own != 1 || whole.get_type_ids().iter().any(|kind| *kind != 0) {
            return None;
        }
        Some(Ascii {
            pieces,
            unknown,
            longest_word: model.max_input_chars_per_word,
            lowercase: normalizer.lowercase,
            others,
            before: whole.get_ids()[..place].to_vec(),
            after: whole.get_ids()[place + 1..].to_vec(),
        })
    }

    /// The ids of a text with those around it, at most `most` of its own, the first or the `last` ones. `None` if the
    /// text is not for this one.
    pub fn encode(&self, text: &str, most: usize, last: bool) -> Option<Vec<u32>> {
        let text = text.as_bytes();
        if text.iter().any(|byte| self.others.get(usize::from(*byte)).is_none_or(|other| *other)) {
            return None;
        }
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        ids.extend(&self.before);
        let (first, mut at) = (ids.len(), 0);
        let mut hashes = vec![];
        while at < text.len() && (last || ids.len() - first < most) {
            let start = at;
            let is = |at: usize, f: fn(&u8) -> bool| text.get(at).is_some_and(f);
            at += 1;
            if is(start, u8::is_ascii_whitespace) {
                continue;
            }
            if !is(start, u8::is_ascii_punctuation) {
                while is(at, |b| !b.is_ascii_whitespace() && !b.is_ascii_punctuation()) {
                    at += 1;
                }
            }
            self.word(&text[start..at], &mut hashes, &mut ids);
        }
        match last {
            true => drop(ids.drain(first..ids.len().saturating_sub(most).max(first))),
            false => ids.truncate(first + most),
        }
        ids.extend(&self.after);
        Some(ids)
    }

    /// Appends the ids of a word.
    fn word(&self, word: &[u8], hashes: &mut Vec<Hash>, ids: &mut Vec<u32>) {
        let (first, mut start) = (ids.len(), 0);
        if word.len() > self.longest_word {
            return ids.push(self.unknown);
        }
        let mut lower = [0; LONGEST_WORD];
        let lower = &mut lower[..word.len()];
        lower.copy_from_slice(word);
        if self.lowercase {
            lower.make_ascii_lowercase();
        }
        while start < lower.len() {
            let (rest, inside) = (&lower[start..], start > 0);
            hashes.clear();
            hashes.extend(rest.iter().scan(Hash::new(inside), |hash, byte| {
                *hash = hash.then(*byte);
                Some(*hash)
            }));
            let longest = (1..=rest.len()).rev().find_map(|len| {
                let id = self.pieces.find(hashes[len - 1], inside, &rest[..len])?;
                Some((len, id))
            });
            let Some((len, id)) = longest else {
                ids.truncate(first);
                return ids.push(self.unknown);
            };
            ids.push(id);
            start += len;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::dir::read_tokenizer;
    use crate::tokenizer::{Cut, Tokenizer, TokenizerFiles};
    use proptest::prelude::*;
    use std::path::PathBuf;
    use std::sync::LazyLock;

    /// Lower-casing, with tokenizer.json and without; and one that keeps case.
    static ALL: LazyLock<Vec<(Tokenizer, Tokenizer)>> = LazyLock::new(|| {
        let fixture = |name| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name);
        let mut files = ["tiny_student", "tiny_bert"].map(|name| read_tokenizer(&fixture(name)).unwrap()).to_vec();
        let vocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nA\na\nab\n##a\n##b\n##bab\n!\n#\nCard\n##s\n";
        let cased = [("vocab.txt", vocab), ("tokenizer_config.json", "{\"do_lower_case\": false}")];
        let cased = cased.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()));
        files.push(TokenizerFiles { files: cased.into() });
        let both = |files: TokenizerFiles| {
            let (fast, plain) = (Tokenizer::new(&files).unwrap(), Tokenizer::new(&files).unwrap());
            assert!(fast.ascii.is_some());
            (fast, Tokenizer { ascii: None, ..plain })
        };
        files.into_iter().map(both).collect()
    });

    fn check(text: &str) {
        for (i, (fast, plain)) in ALL.iter().enumerate() {
            for (max_length, cut) in [(3, Cut::Right), (9, Cut::Right), (9, Cut::Left), (usize::MAX, Cut::Right)] {
                let ids = |t: &Tokenizer| t.encode_cut(text, None, max_length, cut).unwrap();
                assert_eq!(ids(fast), ids(plain), "tokenizer {i}, {text:?} cut to {max_length} {cut:?}");
            }
        }
    }

    #[test]
    fn ids_are_those_of_the_crate() {
        let rows = [
            "",
            " \t\r\n",
            "I lost my card!",
            "Card CARDS cards' (x)-y_z",
            "[MASK] [CLS]a[SEP]",
            "a\u{0}b a\u{7f}b a\u{b}b a\u{c}b a\u{1b}b",
            "caf\u{e9} \u{4e2d}",
            "abababab ababb # ## ##a",
        ];
        rows.into_iter().for_each(check);
        check(&"x".repeat(100));
        check(&"x".repeat(101));
        check(&"a".repeat(129));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_ascii_text(text in "[ -~\t\n]{0,60}") {
            check(&text);
        }

        #[test]
        fn words(text in "((what|card|Lost|transfers?|ab|bab|A|my|[a-z]{1,4}|'|#|[0-9])[ ,.]?){0,12}") {
            check(&text);
        }
    }
}
