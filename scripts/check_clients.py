"""Talks to a running server with the clients that people use, and compares every answer with transformers' numbers.

    quetsch serve --model tiny=fixtures/tiny_student --grpc-port 3001 &
    pip install 'tritonclient[http,grpc]' huggingface_hub
    python scripts/check_clients.py [--url http://127.0.0.1:3000] [--grpc 127.0.0.1:3001] [--key KEY]

The expected numbers are those of fixtures/tiny_student_expected.json. Ends with 1 if anything differs.
"""

import argparse
import json
import math
import urllib.request
from pathlib import Path

import numpy as np
import tritonclient
import tritonclient.grpc
import tritonclient.http
import huggingface_hub
from huggingface_hub import InferenceClient

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
LABELS = ["lost_card", "double_charge", "change_pin", "top_up", "abroad"]
CASES = [c for c in json.loads((FIXTURES / "tiny_student_expected.json").read_text())["inputs"]
         if c["text"] and "pair" not in c]
TEXTS = [c["text"] for c in CASES]
MODEL = "tiny"


def softmax(logits):
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


def ranked(case):
    scores = softmax(case["logits"])
    return sorted(zip(LABELS, scores), key=lambda p: -p[1])


def close(found, want):
    np.testing.assert_allclose(np.array(found, dtype=np.float64), np.array(want), atol=1e-5, rtol=0)


def post(url, body, key=None):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


def check_tei(args):
    for case in CASES:
        found = post(f"{args.url}/predict", {"inputs": case["text"]}, args.key)
        assert [p["label"] for p in found] == [l for l, _ in ranked(case)]
        close([p["score"] for p in found], [s for _, s in ranked(case)])
    batch = post(f"{args.url}/predict", {"inputs": [[t] for t in TEXTS], "raw_scores": True}, args.key)
    for case, found in zip(CASES, batch):
        close([p["score"] for p in found], sorted(case["logits"], reverse=True))


def check_vllm(args):
    found = post(f"{args.url}/v1/classify", {"model": MODEL, "input": TEXTS}, args.key)
    for case, row in zip(CASES, found["data"], strict=True):
        close(row["probs"], softmax(case["logits"]))


def check_hugging_face(args):
    client = InferenceClient(model=args.url, token=args.key)
    for case in CASES:
        found = client.text_classification(case["text"])
        assert [p.label for p in found] == [l for l, _ in ranked(case)]
        close([p.score for p in found], [s for _, s in ranked(case)])
    raw = client.text_classification(TEXTS[0], top_k=2, function_to_apply="none")
    close([p.score for p in raw], sorted(CASES[0]["logits"], reverse=True)[:2])


def tensors(module):
    texts = module.InferInput("text", [len(TEXTS)], "BYTES")
    texts.set_data_from_numpy(np.array([t.encode() for t in TEXTS], dtype=object))
    width = max(len(c["ids"]) for c in CASES)
    ids = np.array([c["ids"] + [0] * (width - len(c["ids"])) for c in CASES], dtype=np.int64)
    mask = np.array([[1] * len(c["ids"]) + [0] * (width - len(c["ids"])) for c in CASES], dtype=np.int64)
    inputs = []
    for name, data in [("input_ids", ids), ("attention_mask", mask)]:
        inputs.append(module.InferInput(name, data.shape, "INT64"))
        inputs[-1].set_data_from_numpy(data)
    return [texts], inputs


def check_triton(module, client, key):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(MODEL, headers=headers)
    client.get_server_metadata(headers=headers), client.get_model_metadata(MODEL, headers=headers)
    for inputs in tensors(module):
        found = client.infer(MODEL, inputs, headers=headers, request_id="1")
        close(found.as_numpy("logits"), [c["logits"] for c in CASES])
        close(found.as_numpy("score"), [[s for _, s in ranked(c)] for c in CASES])
        labels = [[l.decode() for l in row] for row in found.as_numpy("label")]
        assert labels == [[l for l, _ in ranked(c)] for c in CASES]
    only = module.InferRequestedOutput("logits")
    found = client.infer(MODEL, inputs, outputs=[only], headers=headers)
    assert found.as_numpy("label") is None and found.as_numpy("logits").shape == (len(CASES), len(LABELS))
    try:
        client.infer("none", inputs, headers=headers)
    except tritonclient.utils.InferenceServerException as e:
        assert "there is no model `none`" in str(e), e
    else:
        raise AssertionError("a model that is not there answers")


def check_triton_http(args):
    client = tritonclient.http.InferenceServerClient(args.url.split("://")[1])
    check_triton(tritonclient.http, client, args.key)
    # Without the binary extension.
    (texts,), _ = tensors(tritonclient.http)
    texts.set_data_from_numpy(np.array(TEXTS, dtype=object), binary_data=False)
    wanted = tritonclient.http.InferRequestedOutput("logits", binary_data=False)
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    found = client.infer(MODEL, [texts], outputs=[wanted], headers=headers)
    close(found.as_numpy("logits"), [c["logits"] for c in CASES])


def check_triton_grpc(args):
    check_triton(tritonclient.grpc, tritonclient.grpc.InferenceServerClient(args.grpc), args.key)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--grpc", default="127.0.0.1:3001")
    parser.add_argument("--key")
    args = parser.parse_args()
    from importlib.metadata import version
    checks = [("requests as text-embeddings-inference's", check_tei), ("requests as vLLM's", check_vllm),
              (f"huggingface_hub {huggingface_hub.__version__} InferenceClient", check_hugging_face),
              (f"tritonclient.http {version('tritonclient')}", check_triton_http),
              (f"tritonclient.grpc {version('tritonclient')}", check_triton_grpc)]
    for name, check in checks:
        check(args)
        print(f"ok  {name}: {len(CASES)} texts")


if __name__ == "__main__":
    main()
