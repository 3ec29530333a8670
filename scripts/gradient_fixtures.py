"""fixtures/gradients: a small BERT with uneven layers in plain PyTorch: activations, losses, gradients, ten steps.

transformers cannot hold a layer without heads or FFN widths that differ, so the encoder (Devlin et al. 2019) is
written out here. Sentences run one at a time: there is no padding and no mask, as in a ragged batch.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fixture_files import dump, empty

HIDDEN, HEAD_DIM, ORIGINAL_HEADS, VOCAB, POSITIONS, TYPES, LABELS, EPS = 24, 8, 6, 30, 16, 2, 3, 1e-12
LAYERS = [([0, 2, 5], 20), ([], 12), ([3], 8)]  # (surviving heads, feed-forward width)
ALPHA, T = 0.3, 3.0
STEPS, WARMUP, LR, HEAD_LR, DECAY, CLIP = 10, 2, 1e-3, 5e-3, 0.01, 1.0
PREFIX = {"student": "backbone.", "pooler": "bert."}
HEAD = {"student": ("head.1", "head.4"), "pooler": ("bert.pooler.dense", "classifier")}
IDS = [[2, 7, 11, 3], [2], [2, 29, 4, 7, 7, 15, 3]]
TOKEN_TYPES = [[0, 0, 0, 0], [0], [0, 0, 0, 0, 1, 1, 1]]
TARGETS = [2, 0, 1]


def shapes(kind):
    """Name -> shape of every tensor, in the order of the forward."""
    p, h = PREFIX[kind], HIDDEN
    out = {}

    def linear(name, n, k):
        out[f"{name}.weight"], out[f"{name}.bias"] = [n, k], [n]

    def norm(name):
        out[f"{name}.weight"], out[f"{name}.bias"] = [h], [h]

    for table, rows in [("word", VOCAB), ("position", POSITIONS), ("token_type", TYPES)]:
        out[f"{p}embeddings.{table}_embeddings.weight"] = [rows, h]
    norm(f"{p}embeddings.LayerNorm")
    for i, (heads, ffn) in enumerate(LAYERS):
        layer, inner = f"{p}encoder.layer.{i}", len(heads) * HEAD_DIM
        for name in ["query", "key", "value"]:
            linear(f"{layer}.attention.self.{name}", inner, h)
        linear(f"{layer}.attention.output.dense", h, inner)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", ffn, h)
        linear(f"{layer}.output.dense", h, ffn)
        norm(f"{layer}.output.LayerNorm")
    linear(HEAD[kind][0], h, h)
    linear(HEAD[kind][1], LABELS, h)
    return out


def random_weights(kind, seed):
    """Larger than BERT's N(0, 0.02), so that softmax, GELU and tanh leave their linear range."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes(kind).items():
        x = torch.randn(shape, generator=g)
        if name.endswith("LayerNorm.weight"):
            x = 1 + 0.1 * x
        elif name.endswith("bias"):
            x = 0.1 * x
        else:
            x = (0.5 if "embeddings" in name else 0.3) * x
        out[name] = x
    return out


def forward_one(w, kind, ids, types):
    """One sentence -> (logits [labels], the activations by name)."""
    p, n, seen = PREFIX[kind], len(ids), {}

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, [HIDDEN], w[f"{name}.weight"], w[f"{name}.bias"], EPS)

    e = f"{p}embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.token_type_embeddings.weight"][types]
    x = norm(f"{e}.LayerNorm", x + w[f"{e}.position_embeddings.weight"][:n])
    seen["embedded"] = x
    for i, (heads, _) in enumerate(LAYERS):
        layer = f"{p}encoder.layer.{i}"
        q, k, v = (
            linear(f"{layer}.attention.self.{s}", x).view(n, len(heads), HEAD_DIM).transpose(0, 1)
            for s in ["query", "key", "value"]
        )
        probabilities = torch.softmax(q @ k.transpose(1, 2) / HEAD_DIM**0.5, -1)
        context = (probabilities @ v).transpose(0, 1).reshape(n, len(heads) * HEAD_DIM)
        x = norm(f"{layer}.attention.output.LayerNorm", linear(f"{layer}.attention.output.dense", context) + x)
        seen[f"attended.{i}"] = x
        up = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", up) + x)
        seen[f"hidden.{i}"] = x
    dense, last = HEAD[kind]
    x = x.mean(0) if kind == "student" else x[0]
    seen["pooled"] = x[None]
    x = linear(dense, x)
    x = F.gelu(x) if kind == "student" else torch.tanh(x)
    return linear(last, x), seen


def forward(w, kind):
    """The batch -> (logits [sentences, labels], activations packed end to end [tokens, hidden])."""
    rows = [forward_one(w, kind, ids, types) for ids, types in zip(IDS, TOKEN_TYPES)]
    return torch.stack([r[0] for r in rows]), {k: torch.cat([r[1][k] for r in rows]) for k in rows[0][1]}


def kd_loss(logits, teacher, targets, alpha, temperature, label_smoothing=0.0):
    """alpha * CE + (1 - alpha) * T^2 * KL(teacher || student) at temperature T -> (total, CE, KL without T^2)."""
    ce = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    student = F.log_softmax(logits / temperature, -1)
    kl = F.kl_div(student, F.softmax(teacher / temperature, -1), reduction="batchmean")
    return alpha * ce + (1 - alpha) * temperature**2 * kl, ce, kl


def schedule(step):
    """get_linear_schedule_with_warmup: the factor of the learning rate in step 0, 1, .."""
    return step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)


def is_head(name):
    return name.startswith(("head.", "classifier.")) or ".pooler." in name


def optimiser(w):
    """AdamW groups: the head has its own rate, biases and LayerNorms do not decay."""
    groups = {}
    for name, x in w.items():
        plain = name.endswith("bias") or "LayerNorm" in name
        key = (HEAD_LR if is_head(name) else LR, 0.0 if plain else DECAY)
        groups.setdefault(key, []).append(x)
    groups = [{"params": x, "lr": lr, "weight_decay": decay} for (lr, decay), x in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)


def run(kind, weights, teacher, dtype):
    """Everything that the fixture holds -> (tensors, numbers)."""
    w = {k: v.to(dtype).clone().requires_grad_() for k, v in weights.items()}
    teacher, targets = teacher.to(dtype), torch.tensor(TARGETS)
    logits, seen = forward(w, kind)
    total, ce, kl = kd_loss(logits, teacher, targets, ALPHA, T)
    tensors = {"logits": logits, "teacher": teacher, **{f"a.{k}": v for k, v in seen.items()}}
    tensors |= {f"w.{k}": v.detach().clone() for k, v in w.items()}
    for key, loss in [("ce", ce), ("kd", total)]:
        gradients = torch.autograd.grad(loss, list(w.values()), retain_graph=True)
        tensors |= {f"g.{key}.{k}": g for k, g in zip(w, gradients)}
    numbers = {"ce": ce.item(), "kl": kl.item(), "kl_times_t2": T * T * kl.item(), "kd": total.item()}

    adam = optimiser(w)
    factor = torch.optim.lr_scheduler.LambdaLR(adam, schedule)
    names = ["loss", "ce", "kl_times_t2", "gradient_norm", "learning_rate", "head_learning_rate"]
    steps = {name: [] for name in names}
    for _ in range(STEPS):
        total, ce, kl = kd_loss(forward(w, kind)[0], teacher, targets, ALPHA, T)
        adam.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(w.values()), CLIP)
        rates = {g["lr"] for g in adam.param_groups}
        row = [total.item(), ce.item(), T * T * kl.item(), norm.item(), min(rates), max(rates)]
        for values, x in zip(steps.values(), row):
            values.append(x)
        adam.step()
        factor.step()
    tensors |= {f"final.{k}": v for k, v in w.items()}
    numbers["steps"] = steps
    numbers["loss_after"] = kd_loss(forward(w, kind)[0], teacher, targets, ALPHA, T)[0].item()
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}, numbers


def differences(a, b):
    """Largest |f32 - f64| by kind of tensor: what rounding alone does, and so the floor of any tolerance."""
    worst = {}
    for name, x in a.items():
        group = name.split(".")[0] if name[:2] != "g." else name[:4]
        # A key bias adds the same number to a whole row of attention scores, so its true gradient is 0. What is left
        # is rounding noise, and Adam scales noise up to the learning rate: such entries mean nothing.
        if group != "w" and name.endswith("key.bias"):
            group += " of key biases"
        if x.numel():
            worst[group] = max(worst.get(group, 0.0), (x.double() - b[name]).abs().max().item())
    return worst


def write(folder, seed):
    """Writes FOLDER/{student,pooler}.{safetensors,json}."""
    empty(folder)
    for i, kind in enumerate(PREFIX):
        weights = random_weights(kind, seed + i)
        teacher = 2 * torch.randn(len(IDS), LABELS, generator=torch.Generator().manual_seed(seed + 10))
        tensors, numbers = run(kind, weights, teacher, torch.float32)
        exact, exact_numbers = run(kind, weights, teacher, torch.float64)
        save_file(tensors, folder / f"{kind}.safetensors")
        facts = {
            "spec": {
                "prefix": PREFIX[kind],
                "head": {"student": "mean", "pooler": "pooler"}[kind],
                "hidden": HIDDEN,
                "head_dim": HEAD_DIM,
                "original_heads": ORIGINAL_HEADS,
                "vocab": VOCAB,
                "positions": POSITIONS,
                "token_types": TYPES,
                "norm_eps": EPS,
                "labels": LABELS,
                "layers": [{"heads": heads, "ffn": ffn} for heads, ffn in LAYERS],
            },
            "batch": {"ids": IDS, "types": TOKEN_TYPES, "labels": TARGETS, "teacher": teacher.tolist()},
            "alpha": ALPHA,
            "temperature": T,
            "adamw": {
                "learning_rate": LR,
                "head_learning_rate": HEAD_LR,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": DECAY,
                "no_decay": "biases and LayerNorm",
                "clip": CLIP,
                "schedule": "linear",
                "warmup_steps": WARMUP,
                "steps": STEPS,
            },
            "result": numbers,
            "result_f64": exact_numbers,
            "max_difference_from_f64": differences(tensors, exact),
            "notes": [
                "w.NAME weights, a.NAME activations [tokens or sentences, hidden], g.ce.NAME and g.kd.NAME gradients, "
                "final.NAME weights after ten steps. Layer 1 has no head: its q, k, v have 0 rows and "
                "attention.output.dense.weight has 0 columns.",
                "The first step has learning rate 0 (warmup from 0), so the first two losses are equal.",
                "gradient_norm is the norm before clipping; the gradients are scaled by min(1, clip / (norm + 1e-6)).",
                "Leave key biases out of comparisons of gradients and final weights: their true gradient is 0 "
                "(softmax does not see a shift of a row), so Adam turns rounding noise into steps.",
            ],
        }
        dump(folder / f"{kind}.json", facts)
