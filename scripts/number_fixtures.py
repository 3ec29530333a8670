"""fixtures/losses.json (torch, float64) and fixtures/metrics.json (scikit-learn and scipy)."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest, bootstrap
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from fixture_files import dump
from gradient_fixtures import kd_loss

LABELS, BINS = 7, 15


def losses(fixtures, seed):
    """CE and distillation losses with their gradients by the logits."""
    rng, weights_rng = np.random.default_rng(seed), np.random.default_rng(seed + 1)

    def case(n, labels, scale):
        logits, teacher = (np.round(scale * rng.normal(size=(n, labels)), 3) for _ in range(2))
        return {"logits": logits.tolist(), "teacher": teacher.tolist(), "labels": rng.integers(0, labels, n).tolist()}

    inputs = [
        case(4, 5, 2.0),
        case(1, 2, 1.0),
        case(3, 4, 200.0),
    ]  # the last: exp overflows unless the max is taken off
    inputs.append({**inputs[0], "teacher": inputs[0]["logits"]})  # the student equals the teacher: KL is 0
    ce_rows, kd_rows, all_rows = [], [], []
    for i, x in enumerate(inputs):
        teacher, labels = torch.tensor(x["teacher"], dtype=torch.float64), torch.tensor(x["labels"])
        for smoothing in [0.0, 0.1]:
            logits = torch.tensor(x["logits"], dtype=torch.float64, requires_grad=True)
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            (g,) = torch.autograd.grad(loss, logits)
            ce_rows.append({"input": i, "label_smoothing": smoothing, "loss": loss.item(), "gradient": g.tolist()})
        weights = np.round(weights_rng.uniform(0.2, 3.0, len(x["logits"][0])), 3).tolist()
        for smoothing, alpha, temperature in [(0.0, 1.0, 1.0), (0.1, 0.3, 2.0)]:
            logits = torch.tensor(x["logits"], dtype=torch.float64, requires_grad=True)
            w = torch.tensor(weights, dtype=torch.float64)
            _, _, kl = kd_loss(logits, teacher, labels, alpha, temperature)
            parts = {
                "ce": F.cross_entropy(logits, labels, weight=w, label_smoothing=smoothing),
                "kl_times_t2": temperature**2 * kl,
            }
            loss = alpha * parts["ce"] + (1 - alpha) * parts["kl_times_t2"]
            (g,) = torch.autograd.grad(loss, logits)
            row = {"input": i, "class_weights": weights, "label_smoothing": smoothing, "alpha": alpha}
            row |= {"temperature": temperature, **{k: v.item() for k, v in parts.items()}}
            all_rows.append(row | {"loss": loss.item(), "gradient": g.tolist()})
        for alpha in [0.0, 0.3, 1.0]:
            for temperature in [1.0, 2.0, 4.0]:
                logits = torch.tensor(x["logits"], dtype=torch.float64, requires_grad=True)
                loss, ce, kl = kd_loss(logits, teacher, labels, alpha, temperature)
                (g,) = torch.autograd.grad(loss, logits)
                row = {"input": i, "alpha": alpha, "temperature": temperature, "ce": ce.item(), "kl": kl.item()}
                kd_rows.append(row | {"loss": loss.item(), "gradient": g.tolist()})
    note = "loss = alpha * ce + (1 - alpha) * temperature^2 * kl; kl is batchmean, without temperature^2"
    rows = {"cross_entropy": ce_rows, "distillation": kd_rows, "weighted": all_rows}
    rows |= {"measures": measures(rng), "relations": relations(rng)}
    dump(fixtures / "losses.json", {"note": note, "inputs": inputs, **rows})


def measures(rng):
    """Distances of rows, a mean over the rows, with their gradients by the student's."""
    student, teacher = (torch.tensor(np.round(rng.normal(size=(3, 5)), 3), dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    losses = {
        "mse": F.mse_loss(student, teacher),
        "l1": F.l1_loss(student, teacher),
        "cosine": F.cosine_embedding_loss(student, teacher, torch.ones(3)),
    }
    gradients = {k: torch.autograd.grad(v, student)[0].tolist() for k, v in losses.items()}
    rows = {"student": student.tolist(), "teacher": teacher.tolist()}
    return rows | {k: {"loss": v.item(), "gradient": gradients[k]} for k, v in losses.items()}


def relations(rng):
    """MiniLM (equation 4) and MiniLMv2 (equations 4 to 7): KL of softmax(A B^T / sqrt(d)), teacher to student, a mean
    over heads and tokens; sentences of 4, 1 and 3 tokens, q, k and v side by side."""
    starts, rows = [0, 4, 5, 8], []
    student, teacher = (np.round(rng.normal(size=(8, 3 * inner)), 3) for inner in [6, 12])
    for a, b, heads, dims in [
        (0, 1, [[0, 1], [2, 2]], [2, 4]),  # attention maps of 3 heads of 2 and of 3 heads of 4, of which two match
        (0, 0, [[0, 0], [1, 1]], [3, 6]),
        (1, 1, [[0, 0], [1, 1], [2, 2]], [2, 4]),
        (2, 2, [[0, 0]], [6, 12]),
    ]:
        x = torch.tensor(student, dtype=torch.float64, requires_grad=True)
        loss = 0.0
        for hs, ht in heads:
            for first, last in zip(starts, starts[1:]):
                scores = []
                for side, head, d in [(x, hs, dims[0]), (torch.tensor(teacher, dtype=torch.float64), ht, dims[1])]:
                    one, two = (side[first:last].chunk(3, 1)[i][:, head * d : (head + 1) * d] for i in [a, b])
                    scores.append(F.log_softmax(one @ two.T / d**0.5, -1))
                loss = loss + F.kl_div(scores[0], scores[1], log_target=True, reduction="sum")
        loss = loss / (len(heads) * starts[-1])
        (g,) = torch.autograd.grad(loss, x)
        rows.append({"of": [a, b], "heads": heads, "dims": dims, "loss": loss.item(), "gradient": g.tolist()})
    return {"student": student.tolist(), "teacher": teacher.tolist(), "starts": starts, "cases": rows}


def calibration_error(p, truth):
    """ECE (Guo et al. 2017): 15 equal bins (low, high] of the top probability, |accuracy - confidence| weighted."""
    confidence, hit = p.max(1), p.argmax(1) == truth
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    inside = [bins == b for b in range(BINS) if (bins == b).any()]
    return sum(i.mean() * abs(hit[i].mean() - confidence[i].mean()) for i in inside)


def evaluation(logits, truth):
    p, guess, labels = np.exp(log_softmax(logits, axis=1)), logits.argmax(1), np.arange(LABELS)
    correct = int((guess == truth).sum())
    interval = binomtest(correct, len(truth)).proportion_ci(0.95, method="wilson")
    hit, confidence = guess == truth, p.max(1)
    right, mean = calibration_curve(hit, confidence, n_bins=BINS, strategy="uniform")
    inverse = minimize_scalar(lambda b: log_loss(truth, np.exp(log_softmax(b * logits, axis=1)), labels=labels), (0.1, 1), tol=1e-9)
    precision, recall, f1, support = precision_recall_fscore_support(truth, guess, labels=labels, zero_division=0)
    return {
        "accuracy": accuracy_score(truth, guess),
        "accuracy_interval": [interval.low, interval.high],
        "macro_f1": f1_score(truth, guess, labels=labels, average="macro", zero_division=0),
        "weighted_f1": f1_score(truth, guess, labels=labels, average="weighted", zero_division=0),
        "top_3": top_k_accuracy_score(truth, logits, k=3, labels=labels),
        "ece": calibration_error(p, truth),
        "loss": log_loss(truth, p, labels=labels),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
        "support": support.tolist(),
        "confusion_matrix": confusion_matrix(truth, guess, labels=labels).tolist(),
        "reliability": [{"confidence": c, "accuracy": a} for c, a in zip(mean.tolist(), right.tolist(), strict=True)],
        "temperature": 1 / inverse.x,
    }


def mcnemar(parent_only, child_only):
    """Exact two-sided McNemar test: the discordant pairs are fair coin tosses."""
    n = parent_only + child_only
    return binomtest(parent_only, n, 0.5).pvalue if n else 1.0


def metrics(fixtures, seed):
    rng = np.random.default_rng(seed)
    truth = rng.choice(LABELS, 200, p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.06, 0.04])
    parent = np.round(1.5 * rng.normal(size=(200, LABELS)) + 3 * np.eye(LABELS)[truth], 4)
    child = np.round(0.8 * parent + 1.0 * rng.normal(size=parent.shape), 4)
    assert all(len(set(row)) == LABELS for row in [*parent, *child]), "ties would leave the order open"
    right, kept = parent.argmax(1) == truth, child.argmax(1) == truth
    parent_only, child_only = int((right & ~kept).sum()), int((~right & kept).sum())
    p, q = log_softmax(parent, axis=1), log_softmax(child, axis=1)
    flipped = np.flatnonzero(parent.argmax(1) != child.argmax(1))
    # Paired: whole rows are drawn.
    interval = bootstrap((kept.astype(float) - right,), np.mean, n_resamples=100_000, method="percentile", batch=1_000, rng=seed)
    pairs = [(0, 0), (1, 0), (5, 5), (10, 2), (2, 10), (60, 100), (0, 30)]
    value = {
        "labels": LABELS,
        "truth": truth.tolist(),
        "parent_logits": parent.tolist(),
        "child_logits": child.tolist(),
        "parent": evaluation(parent, truth),
        "child": evaluation(child, truth),
        "agreement": {
            "agreement": 1 - len(flipped) / 200,
            "flips": len(flipped),
            "flipped": flipped.tolist(),
            "mean_kl": float((np.exp(p) * (p - q)).sum(1).mean()),
            "mcnemar": {"parent_only": parent_only, "child_only": child_only, "p": mcnemar(parent_only, child_only)},
            "accuracy_delta": float(kept.mean() - right.mean()),
        },
        "bootstrap_interval": list(interval.confidence_interval),
        "mcnemar": [{"parent_only": a, "child_only": b, "p": mcnemar(a, b)} for a, b in pairs],
        "note": "mean_kl is KL(parent || child); an ECE bin is (low, high]; logits have no ties",
    }
    dump(fixtures / "metrics.json", value)
