"""Training speed of an encoder classifier in PyTorch on a CPU, to be timed beside ours; prints one JSON line.

    python bench/peers/torch_train.py [--shape 6x384|12x768] [--precision fp32|bf16] [--freeze-embeddings]
    python bench/peers/torch_train.py --data TRAIN.csv --model MODEL [--limit BATCHES]

Without --data: steps of 32 sentences x 32 tokens (16 x 32 at width 768), no padding. With it: batches of 32 sentences of
like length (the best padding strategy), in shuffled order. bf16 is autocast with fp32 master weights; AdamW, dropout 0.1.
"""

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

parser = argparse.ArgumentParser()
parser.add_argument("--shape", default="6x384")
parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch", type=int)
parser.add_argument("--freeze-embeddings", action="store_true")
parser.add_argument("--data")
parser.add_argument("--model")
parser.add_argument("--limit", type=int)
a = parser.parse_args()
torch.set_num_threads(a.threads)
torch.manual_seed(42)
LAYERS, WIDTH = map(int, a.shape.split("x"))
HEADS, FFN, DROPOUT, VOCABULARY, LABELS = 12, 4 * WIDTH, 0.1, 30522, 77


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, 1e-12) for _ in range(2))

    def forward(self, x, mask):
        sentences, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(sentences, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=DROPOUT)
        context = context.transpose(1, 2).reshape(sentences, tokens, WIDTH)
        x = self.norms[0](x + F.dropout(self.out(context), DROPOUT))
        return self.norms[1](x + F.dropout(self.down(F.gelu(self.up(x))), DROPOUT))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.word, self.position, self.kind = (nn.Embedding(n, WIDTH) for n in (VOCABULARY, 512, 2))
        self.norm = nn.LayerNorm(WIDTH, 1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.dense, self.classifier = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, LABELS)

    def forward(self, ids, mask):
        positions = torch.arange(ids.shape[1])
        x = self.norm(self.word(ids) + self.kind(torch.zeros_like(ids)) + self.position(positions))
        x = F.dropout(x, DROPOUT)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :].bool())
        weight = mask.unsqueeze(-1).to(x.dtype)
        return self.classifier(F.gelu(self.dense((x * weight).sum(1) / weight.sum(1))))


model = Classifier().train()
model.word.weight.requires_grad_(not a.freeze_embeddings)
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)


def step(ids, mask, labels):
    with torch.autocast("cpu", torch.bfloat16, enabled=a.precision == "bf16"):
        loss = F.cross_entropy(model(ids, mask).float(), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


result = {"engine": "torch", "shape": a.shape, "precision": a.precision, "frozen": a.freeze_embeddings}
if a.data:
    texts, labels = common.read_split(a.data, a.model)
    encoded = common.encode(common.tokenizer(a.model), texts)
    batches = common.sorted_batches(encoded, a.batch or 32)
    np.random.RandomState(0).shuffle(batches)
    batches = batches[: a.limit]

    def train(batch):
        ids, mask = common.pad([encoded[i] for i in batch])
        step(torch.from_numpy(ids), torch.from_numpy(mask).float(), torch.from_numpy(labels[batch]))

    for batch in batches[:3]:
        train(batch)
    start = time.perf_counter()
    for batch in batches:
        train(batch)
    seconds = time.perf_counter() - start
    count = sum(map(len, batches))
    result |= {"sentences": count, "seconds": round(seconds, 2), "sentences_per_s": round(count / seconds, 1)}
else:
    count = a.batch or (32 if WIDTH == 384 else 16)
    given = torch.randint(1000, 30000, (count, 32)), torch.ones(count, 32), torch.randint(0, LABELS, (count,))
    for _ in range(3):
        step(*given)
    times = []
    for _ in range(a.steps):
        start = time.perf_counter()
        step(*given)
        times.append(time.perf_counter() - start)
    result |= {"batch": count, "step_ms": round(float(np.median(times)) * 1e3, 1)}
result["peak_rss_mb"] = round(common.memory_mb())
print(json.dumps(result))
