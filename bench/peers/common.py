"""What all peers share: texts, token ids, batches, memory. No torch here: it would count as the peer's memory."""

import csv
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def read_split(path, model):
    """Texts and label numbers of a CSV file (text and label column by their usual names), labels as the model has them."""
    names = json.loads((Path(model) / "config.json").read_text())["id2label"]
    number = {name: int(i) for i, name in names.items()}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    column = next(c for c in ("label", "category", "intent", "target", "class") if c in rows[0])
    return [row["text"] for row in rows], np.array([number.get(row[column], -1) for row in rows])


def tokenizer(model, max_length=256):
    made = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    made.no_padding()
    made.enable_truncation(max_length)
    return made


def encode(made, texts):
    return [e.ids for e in made.encode_batch(texts)]


def pad(ids):
    """Token ids -> ids and mask [batch, longest]."""
    longest = max(map(len, ids))
    out, mask = (np.zeros((len(ids), longest), np.int64) for _ in range(2))
    for row, sentence in enumerate(ids):
        out[row, : len(sentence)] = sentence
        mask[row, : len(sentence)] = 1
    return out, mask


def sorted_batches(encoded, size):
    """Sentences of like length together: the padding strategy that is best for engines that pad."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def one_sentence(tokens, vocabulary):
    """A sentence of this many tokens, [CLS] and [SEP] included."""
    ids = np.random.RandomState(tokens).randint(min(1000, vocabulary // 2), vocabulary, (1, tokens))
    ids[0, 0], ids[0, -1] = 101, 102
    return ids.astype(np.int64), np.ones((1, tokens), np.int64)


def memory_mb(key="VmHWM"):
    """A line of /proc/self/status, in MB of 1,000,000 bytes. VmHWM: the highest resident memory so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


def size_mb(*paths):
    files = (f for p in map(Path, paths) for f in ([p] if p.is_file() else p.rglob("*")))
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e6
