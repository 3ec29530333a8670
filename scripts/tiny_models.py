"""fixtures/tiny_student, tiny_bert and bnb: small random models as transformers writes them, and what they answer."""

import json

import bitsandbytes
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizerFast, BitsAndBytesConfig

from check_transformers import StudentHFModel, load
from fixture_files import dump, empty

MAX_LENGTH = 16
WORDS = """
i my the a an is are was to of on in at for and not it you your what why how when where can do did has have been will
with this that from me we card cash account money bank transfer payment pin fee top up charge charged twice lost stolen
new app apple pay change open close wait still need want help please don ' t s m ve abroad atm machine swallow
balance update identity check spare cafe uber resume naive
""".split()
PIECES = """
ing ed er est ly s es ion tion al able ness ment ful less un re ##a ##b ##c ##d ##e ##f ##g ##h ##i ##j ##k ##l ##m
##n ##o ##p ##q ##r ##s ##t ##u ##v ##w ##x ##y ##z ##0 ##1 ##2 ##3 ##4 ##5 ##6 ##7 ##8 ##9 ##ing ##ed ##er ##ly ##es
##tion ##al ##ness ##ment ##card ##up
""".split()
CHARACTERS = (
    list('!"#$%&()*+,-./:;?@[]_~0123456789abcdefghijklmnopqrstuvwxyz€£') + list("我的银行卡丢了日本") + ["α", "ж"]
)
TEXTS = [
    "I lost my card, what can I do?",
    "Why was I charged TWICE for the payment at the café?",
    "",
    " \t\n ",
    "我的银行卡丢了!",
    "Naïve résumé — ÜBER-Angström ﬁne",
    "help 😀 me 👍🏽 please",
    "...!!! ??? (#$%) [x] a_b ~ 12:30 £5.00/€7",
    "the transfer has not arrived and I still wait for the money to top up my account at the bank in the new app",
    "[CLS] my [SEP] pin [MASK] [UNK]",
    "zero\u200bwidth, soft\u00adhyphen, nul\u0000byte, nbsp\u00a0here, \ufffd",
    "don't I'm we've ATM1234 unhelpfulness cardcardcard",
    "日本 αβ жук ไทย हिन्दी العربية 한국어",
    "x" * 101 + " pin",
]
PAIRS = [
    ["I lost my card", "what can I do?"],
    ["", "the fee"],
    [
        "the transfer has not arrived and I still wait for the money",
        "why is the balance not up to date in the new app?",
    ],
]


def vocabulary():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys(special + CHARACTERS + WORDS + PIECES))


def randomise(model, seed):
    """Larger than the usual initialisation, so that the logits differ from text to text."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        x = torch.randn(p.shape, generator=g)
        plain = 1 + 0.1 * x if name.endswith(".weight") else 0.1 * x  # a vector named weight is a LayerNorm's
        p.data = plain if p.dim() == 1 else (0.5 if "embeddings" in name else 0.3) * x
    return model.eval()


@torch.no_grad()
def centre(model, bias, tokenizer):
    """Moves the last bias so that the predictions are not all of one class."""
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", truncation=True, max_length=MAX_LENGTH)
    bias -= model(**inputs).logits.mean(0)


@torch.no_grad()
def answers(folder, model=None, more=()):
    """Ids, and logits one text at a time (no padding), for TEXTS, `more` and PAIRS; of another model, if given."""
    model = model or load(folder)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = [{"text": t} for t in [*TEXTS, *more]] + [{"text": a, "pair": b} for a, b in PAIRS]
    for x in inputs:
        e = tokenizer(x["text"], x.get("pair"), truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        x["ids"] = e["input_ids"][0].tolist()
        x["types"] = e["token_type_ids"][0].tolist() if "token_type_ids" in e else []
        x["logits"] = model(**e).logits[0].float().tolist()
    return inputs


def tiny_student(fixtures):
    folder = empty(fixtures / "tiny_student")
    labels = ["lost_card", "double_charge", "change_pin", "top_up", "abroad"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        intermediate_size=48,
        max_position_embeddings=32,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        student_pruned_heads={"0": [1, 3], "2": [0]},
        architectures=["StudentHFModel"],
    )
    model = randomise(StudentHFModel(config), 1)
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=32)
    centre(model, model.head[4].bias, tokenizer)
    model.save_pretrained(folder)
    # transformers 4.57 takes max_length for a setting of text generation and refuses to write it.
    facts = json.loads((folder / "config.json").read_text()) | {"max_length": MAX_LENGTH}
    (folder / "config.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    # A trap that real models hold: truncation and padding inside tokenizer.json, which a reader must override.
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=12)
    tokenizer.save_pretrained(folder)
    dump(fixtures / "tiny_student_expected.json", {"max_length": MAX_LENGTH, "inputs": answers(folder)})


def tiny_bert(fixtures):
    folder = empty(fixtures / "tiny_bert")
    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    model = BertForSequenceClassification(config)
    model.prune_heads({1: [2]})
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    centre(randomise(model, 2), model.classifier.bias, BertTokenizerFast(vocab_file=str(folder / "vocab.txt")))
    model.half().save_pretrained(folder, max_shard_size="36KB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    torch.save(model.float().state_dict(), fixtures / "tiny_bert_pytorch_model.bin")
    dump(fixtures / "tiny_bert_expected.json", {"max_length": MAX_LENGTH, "inputs": answers(folder)})


def dequantised(model):
    """Name -> f32 weight of every quantised linear."""
    weights = {}
    for name, m in model.named_modules():
        if isinstance(m, bitsandbytes.nn.Linear4bit):
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
        elif isinstance(m, bitsandbytes.nn.Linear8bitLt):
            weights[f"{name}.weight"] = m.weight.CB.float() * m.weight.SCB[:, None] / 127
    assert all(w.dtype == torch.float32 for w in weights.values())
    return weights


def bnb(fixtures):
    """tiny_student quantised by bitsandbytes, saved before any forward (a forward may repack the weights)."""
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_type": "nf4"}
    keep = {"llm_int8_skip_modules": ["head.4"]}  # what transformers 4.57 skips by itself, but then it writes null
    schemes = {
        "nf4": four | {"bnb_4bit_use_double_quant": True},
        "nf4_single": four | keep,
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"} | keep,
        "int8": {"load_in_8bit": True} | keep,
    }
    source, root = fixtures / "tiny_student", empty(fixtures / "bnb")
    inputs = [{k: x[k] for k in x if k != "logits"} for x in answers(source)]
    expected = {"max_length": MAX_LENGTH, "inputs": inputs}
    for name, scheme in schemes.items():
        options = {"dtype": torch.float32, "device_map": {"": "cpu"}}
        config = BitsAndBytesConfig(**scheme)
        StudentHFModel.from_pretrained(source, quantization_config=config, **options).save_pretrained(root / name)
        model, info = load(root / name)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        weights = dequantised(model)
        save_file(weights, root / name / "dequantised.safetensors")
        float_model, _ = load(source)
        float_model.load_state_dict(weights, strict=False)
        expected[name] = {
            "logits": [x["logits"] for x in answers(source, model)],
            "logits_float": [x["logits"] for x in answers(source, float_model)],
        }
    dump(root / "expected.json", expected)
