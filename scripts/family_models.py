"""fixtures/families: small random classifiers of the families beside BERT, and a Chinese BERT, each with its own kind of
tokenizer."""

import json

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    CamembertConfig,
    CamembertForSequenceClassification,
    CamembertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizerFast,
    ElectraConfig,
    ElectraForSequenceClassification,
    ElectraTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizerFast,
)

from fixture_files import dump, empty
from tiny_models import CHARACTERS, MAX_LENGTH, PIECES, WORDS, answers, centre, randomise, vocabulary

LABELS = ["lost_card", "double_charge", "change_pin"]
# Special tokens that a text spells out: RoBERTa's positions pass over <pad>.
MORE = ["help <pad> me <mask> with </s> my <pad> card", "top up"]
FRENCH = ["J'ai perdu ma carte à l'étranger", "Où est l'argent de mon compte ? Déjà 2 jours…"]
CHINESE = [
    "我的Visa卡在ATM被吞了，怎么办？",
    "为什么收了我两次手续费 twice 2次",
    "怎样修改pin码；更换新卡",
    "余额不足，充值100元：銀行卡、㐀𠀀龍",
]
BEGIN = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
MARKED = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "layer_norm_eps": 1e-5, "type_vocab_size": 1}
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
SIZES = NAMES | {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}


def word_piece(folder, kind, vocab=None):
    """WordPiece, as BERT's."""
    (folder / "vocab.txt").write_text("\n".join(vocab or vocabulary()) + "\n")
    return kind(vocab_file=str(folder / "vocab.txt"), model_max_length=24)


def byte_level(folder):
    """Byte-level BPE whose merges spell out WORDS from the left."""
    vocab, merges = dict(BEGIN), []
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte] = len(vocab)
    for word in WORDS[:60]:
        left = "Ġ"
        for letter in word if word.isalpha() else "":
            merges.append(f"{left} {letter}")
            left += letter
            vocab.setdefault(left, len(vocab))
    vocab["<mask>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    files = {"vocab_file": str(folder / "vocab.json"), "merges_file": str(folder / "merges.txt")}
    return RobertaTokenizerFast(**files, model_max_length=24)


def unigram(kind, words=WORDS):
    """Unigram, as sentencepiece has it; longer pieces are likelier than their letters."""
    pieces = ["▁"] + ["▁" + word for word in words] + [p.removeprefix("##") for p in PIECES] + CHARACTERS
    scores = [[p, -2.0 - 0.02 * i] for i, p in enumerate(dict.fromkeys(pieces))]
    scores = [[name, 0.0] for name in BEGIN] + scores + [["<mask>", 0.0]]
    t = Tokenizer(Unigram([tuple(s) for s in scores], unk_id=BEGIN["<unk>"], byte_fallback=False))
    t.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    t.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return kind(tokenizer_object=t, model_max_length=24)


def distilbert(folder):
    sizes = {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40, "max_position_embeddings": 24}
    tokenizer = word_piece(folder, DistilBertTokenizerFast)
    config = DistilBertConfig(vocab_size=len(tokenizer), **sizes, **NAMES)
    model = DistilBertForSequenceClassification(config)
    return tokenizer, model, model.classifier.bias


def roberta(folder):
    tokenizer = byte_level(folder)
    config = RobertaConfig(vocab_size=len(tokenizer), **SIZES | MARKED | {"max_position_embeddings": 26})
    model = RobertaForSequenceClassification(config)
    return tokenizer, model, model.classifier.out_proj.bias


def xlm_roberta(folder):
    tokenizer = unigram(XLMRobertaTokenizerFast)
    config = XLMRobertaConfig(vocab_size=len(tokenizer), **SIZES | MARKED | {"max_position_embeddings": 26})
    model = XLMRobertaForSequenceClassification(config)
    return tokenizer, model, model.classifier.out_proj.bias


def electra(folder):
    tokenizer = word_piece(folder, ElectraTokenizerFast)
    model = ElectraForSequenceClassification(ElectraConfig(vocab_size=len(tokenizer), embedding_size=16, **SIZES))
    return tokenizer, model, model.classifier.out_proj.bias


def camembert(folder):
    tokenizer = unigram(CamembertTokenizerFast, " ".join(FRENCH).lower().replace("'", "' ").split())
    config = CamembertConfig(vocab_size=len(tokenizer), **SIZES | MARKED | {"max_position_embeddings": 26})
    model = CamembertForSequenceClassification(config)
    return tokenizer, model, model.classifier.out_proj.bias


def chinese_bert(folder):
    """Chinese characters are words of their own, some known and some not; Latin words between them are not cut by them."""
    characters = dict.fromkeys(c for c in "".join(CHINESE) if "一" <= c <= "龥" and c not in "龍銀")
    words = ["visa", "atm", "pin", "twice", *"0123456789", *"，？；：、"]
    vocab = [*vocabulary()[:5], *characters, *words, *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = word_piece(folder, BertTokenizerFast, vocab + [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"])
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **SIZES))
    return tokenizer, model, model.classifier.bias


OWN = {"camembert": FRENCH, "chinese_bert": CHINESE}


def write(root):
    empty(root)
    for seed, make in enumerate([distilbert, roberta, xlm_roberta, electra, camembert, chinese_bert]):
        folder = empty(root / make.__name__)
        torch.manual_seed(seed)
        tokenizer, model, bias = make(folder)
        model.prune_heads({1: [seed % 3]})
        centre(randomise(model, 10 + seed), bias, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        expected = {"max_length": MAX_LENGTH, "inputs": answers(folder, more=MORE + OWN.get(make.__name__, []))}
        dump(root / f"{make.__name__}_expected.json", expected)
