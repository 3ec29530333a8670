"""fixtures/tasks: models of other tasks as transformers writes them, with what they answer; losses.json by torch (float64)
and figures.json by scikit-learn and scipy."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error, r2_score
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForTokenClassification,
)

from fixture_files import dump, empty
from tiny_models import MAX_LENGTH, TEXTS, randomise, vocabulary

SENTENCES = [
    ["I", "lost", "my", "card", ",", "what", "can", "I", "do", "?"],
    ["Why", "was", "I", "charged", "TWICE", "at", "the", "caf\u00e9", "Uber"],
    ["unhelpfulness", "cardcardcard", "don't", "12:30"],
    ["one"],
    ["", "pin", "\u200b", "top up", "again"],
    "the transfer has not arrived and I still wait for the money to top up my account at the bank".split(),
]


def names(labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def shape(labels):
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40}
    return BertConfig(vocab_size=len(vocabulary()), max_position_embeddings=32, **sizes, **names(labels))


def save(folder, model, seed, **problem):
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    model.config.update(problem)
    randomise(model, seed).save_pretrained(folder)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)


@torch.no_grad()
def of_texts(kind, folder):
    """Logits one text at a time (no padding)."""
    model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        e = tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        rows.append({"text": text, "ids": e["input_ids"][0].tolist(), "logits": model(**e).logits[0].tolist()})
    return rows


@torch.no_grad()
def of_words(kind, folder):
    """Logits of each word: those of its first token; null where it has none or is cut off."""
    model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for words in SENTENCES:
        e = tokenizer(words, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        word_of, logits = e.word_ids(0), model(**{k: e[k] for k in ["input_ids", "attention_mask"]}).logits[0].tolist()
        first = [word_of.index(i) if i in word_of else None for i in range(len(words))]
        row = {"tokens": words, "ids": e["input_ids"][0].tolist()}
        rows.append(row | {"logits": [None if i is None else logits[i] for i in first]})
    return rows


def models(root):
    tags = ["O", "B-WHEN", "I-WHEN", "B-WHAT"]
    folder = empty(root / "token")
    save(folder, BertForTokenClassification(shape(tags)), 1)
    dump(root / "token_expected.json", of_words(BertForTokenClassification, folder))
    folder = empty(root / "token_distilbert")
    sizes = {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40, "max_position_embeddings": 32}
    config = DistilBertConfig(vocab_size=len(vocabulary()), **sizes, **names(tags))
    save(folder, DistilBertForTokenClassification(config), 2)
    dump(root / "token_distilbert_expected.json", of_words(DistilBertForTokenClassification, folder))
    for seed, (problem, labels) in enumerate(
        [("multi_label_classification", ["card", "fee", "pin"]), ("regression", ["urgency", "anger"])], 3
    ):
        folder = empty(root / problem)
        save(folder, BertForSequenceClassification(shape(labels)), seed, problem_type=problem)
        dump(root / f"{problem}_expected.json", of_texts(BertForSequenceClassification, folder))


def losses(rng):
    """Rows of two sentences of 4 and 3 units; nothing is known of one unit (null)."""
    starts, width, rows = [0, 4, 7], 3, []
    student, teacher = (np.round(2 * rng.normal(size=(7, width)), 3) for _ in range(2))
    many, numbers = rng.integers(0, 2, (7, width)).astype(float), np.round(rng.normal(size=(7, width)), 3)
    known = [0, 1, 2, 4, 5, 6]
    distance = {"mse": F.mse_loss, "l1": F.l1_loss}
    for kind in ["binary", "mse", "l1"]:
        for alpha, temperature, beta in [(1.0, 1.0, 0.0), (0.3, 2.0, 0.0), (0.4, 1.0, 0.7)]:
            s = torch.tensor(student, dtype=torch.float64, requires_grad=True)
            t, y = torch.tensor(teacher), torch.tensor(many if kind == "binary" else numbers)
            parts = {"differences": torch.zeros(())}
            if kind == "binary":
                p = torch.sigmoid(t / temperature)
                parts["ce"] = F.binary_cross_entropy_with_logits(s[known], y[known])
                entropy = F.binary_cross_entropy(p, p)
                soft = F.binary_cross_entropy_with_logits(s / temperature, p)
                parts["kl"] = temperature**2 * (soft - entropy)
                beta = 0.0
            else:
                far = distance[kind]
                steps = [(a, b) for a, b in zip(starts, starts[1:])]
                delta = lambda x: torch.cat([x[a + 1 : b] - x[a : b - 1] for a, b in steps])
                parts |= {"ce": far(s[known], y[known]), "kl": far(s, t), "differences": far(delta(s), delta(t))}
            loss = alpha * parts["ce"] + (1 - alpha) * parts["kl"] + beta * parts["differences"]
            (g,) = torch.autograd.grad(loss, s)
            row = {"kind": kind, "alpha": alpha, "temperature": temperature, "beta": beta, "loss": loss.item()}
            rows.append(row | {k: v.item() for k, v in parts.items()} | {"gradient": g.tolist()})
    truth = {"binary": many.tolist(), "numbers": numbers.tolist()}
    return {"starts": starts, "unknown": 3, "student": student.tolist(), "teacher": teacher.tolist(), **truth, "cases": rows}


def figures(rng):
    truth = rng.integers(0, 2, (60, 4))
    logits = np.round(1.5 * rng.normal(size=truth.shape) + 2 * truth - 1, 3)
    p = 1 / (1 + np.exp(-logits))
    given = (p >= 0.5).astype(int)
    loss = -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).mean()
    many = {
        "accuracy": accuracy_score(truth, given),
        "micro_f1": f1_score(truth, given, average="micro"),
        "macro_f1": f1_score(truth, given, average="macro"),
        "weighted_f1": f1_score(truth, given, average="weighted"),
        "loss": loss,
    }
    wanted, found = np.round(rng.normal(size=(50, 2)), 3), None
    found = np.round(0.7 * wanted + 0.4 * rng.normal(size=wanted.shape), 3)
    numbers = {
        "mse": mean_squared_error(wanted, found),
        "mae": mean_absolute_error(wanted, found),
        "r2": r2_score(wanted, found),
        "pearson": float(np.mean([pearsonr(wanted[:, o], found[:, o]).statistic for o in range(2)])),
    }
    return {
        "multi_label": {"truth": truth.tolist(), "logits": logits.tolist(), **many},
        "regression": {"truth": wanted.tolist(), "outputs": found.tolist(), **numbers},
    }


def write(root, seed):
    rng = np.random.default_rng(seed)
    empty(root)
    models(root)
    dump(root / "losses.json", losses(rng))
    dump(root / "figures.json", figures(rng))
