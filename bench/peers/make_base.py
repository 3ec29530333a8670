"""Writes a classifier of BERT-base's shape (12 layers, width 768) with random weights: speed and memory do not depend on
them. Labels and tokenizer are those of another model.

    python bench/peers/make_base.py MODEL OUT
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import BertConfig

from student import StudentHFModel

model, out = map(Path, sys.argv[1:3])
labels = json.loads((model / "config.json").read_text())["id2label"]
torch.manual_seed(0)
config = BertConfig(
    id2label={int(i): name for i, name in labels.items()},
    label2id={name: int(i) for i, name in labels.items()},
)
StudentHFModel(config).save_pretrained(out)
for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
    if (model / name).exists():
        shutil.copy(model / name, out)
