"""Writes fixtures/requests.json: requests of public clients and protocols, each with the answer that belongs to it.

    pip install 'tritonclient[http,grpc]==2.73.0' huggingface_hub==2.4.0
    python scripts/request_fixtures.py

The bodies marked `by` are the bytes that those clients send. The numbers in the answers are softmax over the logits that
transformers computed for fixtures/tiny_student (`tiny_student_expected.json`), not this project's own.
In an answer {"$": "hex"}, {"$": "integer"} or {"$": "string"} stands for any of its kind.
"""

import base64
import json
import math
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.grpc._utils as triton_grpc_utils
import tritonclient.http as triton_http
from huggingface_hub.inference._providers import get_provider_helper

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
LABELS = ["lost_card", "double_charge", "change_pin", "top_up", "abroad"]
MODEL = "tiny"
EXPECTED = json.loads((FIXTURES / "tiny_student_expected.json").read_text())["inputs"]
SINGLE = [e for e in EXPECTED if e["text"] and "pair" not in e]
TEXTS = [SINGLE[0], SINGLE[1]]
PAIR = next(e for e in EXPECTED if "pair" in e)


def softmax(logits):
    top = max(logits)
    e = [math.exp(x - top) for x in logits]
    return [x / sum(e) for x in e]


def ranked(case, raw=False, k=len(LABELS)):
    scores = case["logits"] if raw else softmax(case["logits"])
    order = sorted(range(len(LABELS)), key=lambda i: -scores[i])[:k]
    return [{"score": scores[i], "label": LABELS[i]} for i in order]


def request(name, path, body, answer, status=200, by=None, headers=None, method="POST"):
    case = {"name": name, "method": method, "path": path}
    if by:
        case["by"] = by
    case["headers"] = {"content-type": "application/json"} if headers is None else headers
    if isinstance(body, bytes):
        case["body_base64"] = base64.b64encode(body).decode()
    elif body is not None:
        case["body"] = body
    return case | {"status": status, "answer": answer}


def tei():
    a, b = TEXTS
    text = lambda case: case["text"]
    error = lambda message, kind: {"error": message, "error_type": kind}
    any_error = lambda kind: error({"$": "string"}, kind)
    yield request("one text", "/predict", {"inputs": text(a)}, ranked(a))
    yield request("every field", "/predict",
                  {"inputs": text(a), "raw_scores": True, "truncate": True, "truncation_direction": "Right"},
                  ranked(a, raw=True))
    yield request("null truncate", "/predict", {"inputs": text(a), "raw_scores": False, "truncate": None}, ranked(a))
    yield request("batch", "/predict", {"inputs": [[text(a)], [text(b)]]}, [ranked(a), ranked(b)])
    yield request("a flat list of two is a pair", "/predict", {"inputs": [PAIR["text"], PAIR["pair"]]}, ranked(PAIR))
    yield request("batch of a text and a pair", "/predict", {"inputs": [[text(a)], [PAIR["text"], PAIR["pair"]]]},
                  [ranked(a), ranked(PAIR)])
    yield request("SageMaker", "/invocations", {"inputs": text(a)}, ranked(a))
    yield request("root", "/", {"inputs": text(a)}, ranked(a))
    yield request("empty text", "/predict", {"inputs": ""}, any_error("Empty"), 400)
    yield request("three strings", "/predict", {"inputs": ["a", "b", "c"]}, any_error("Validation"), 422)
    yield request("batch too large", "/predict", {"inputs": [["a"]] * 33},
                  error("batch size 33 > maximum allowed batch size 32", "Validation"), 422)
    yield request("text too long", "/predict", {"inputs": "card " * 30, "truncate": False},
                  error("Input validation error: `inputs` must have less than 16 tokens. Given: 32", "Validation"), 422)
    yield request("health", "/health", None, None, method="GET")
    yield request("info", "/info", None, {
        "model_id": MODEL, "model_sha": None, "model_dtype": "float32", "served_model_name": MODEL,
        "model_type": {"classifier": {"id2label": {str(i): l for i, l in enumerate(LABELS)},
                                      "label2id": {l: i for i, l in enumerate(LABELS)}}},
        "max_concurrent_requests": 512, "max_input_length": 16, "max_batch_tokens": {"$": "integer"},
        "max_batch_requests": None, "max_client_batch_size": 32, "auto_truncate": True,
        "tokenization_workers": {"$": "integer"}, "version": {"$": "string"}, "sha": None, "docker_label": None,
    }, method="GET")


def hugging_face():
    """What `InferenceClient(model=URL).text_classification(..)` sends; it reads the first list of the answer."""
    helper = get_provider_helper("hf-inference", task="text-classification", model="http://localhost/")
    for name, parameters, answer in [
        ("defaults", {"function_to_apply": None, "top_k": None}, ranked(TEXTS[0])),
        ("top 2, raw", {"function_to_apply": "none", "top_k": 2}, ranked(TEXTS[0], raw=True, k=2)),
    ]:
        prepared = helper.prepare_request(inputs=TEXTS[0]["text"], parameters=parameters, headers={},
                                          model="http://localhost/", api_key=None)
        yield request(name, "/", prepared.json, [answer], by="huggingface_hub 2.4.0")


def outputs(cases, k=len(LABELS)):
    """The three output tensors."""
    rows = [ranked(c, k=k) for c in cases]
    tensor = lambda name, datatype, shape, data: {"name": name, "shape": shape, "datatype": datatype, "data": data}
    n = len(cases)
    return [
        tensor("label", "BYTES", [n, k], [p["label"] for row in rows for p in row]),
        tensor("score", "FP32", [n, k], [p["score"] for row in rows for p in row]),
        tensor("logits", "FP32", [n, len(LABELS)], [x for c in cases for x in c["logits"]]),
    ]


def padded(cases):
    width = max(len(c["ids"]) for c in cases)
    ids = [c["ids"] + [0] * (width - len(c["ids"])) for c in cases]
    mask = [[1] * len(c["ids"]) + [0] * (width - len(c["ids"])) for c in cases]
    return np.array(ids, dtype=np.int64), np.array(mask, dtype=np.int64)


def rest():
    url = f"/v2/models/{MODEL}/infer"
    answer = lambda outputs, **more: {"model_name": MODEL, "model_version": "1", **more, "outputs": outputs}
    texts = [c["text"] for c in TEXTS]
    yield request("server live", "/v2/health/live", None, {"live": True}, method="GET")
    yield request("server ready", "/v2/health/ready", None, {"ready": True}, method="GET")
    yield request("server", "/v2", None,
                  {"name": {"$": "string"}, "version": {"$": "string"}, "extensions": ["binary_tensor_data"]}, method="GET")
    yield request("model ready", f"/v2/models/{MODEL}/ready", None, {"name": MODEL, "ready": True}, method="GET")
    yield request("texts", url, {
        "id": "42", "inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": texts}],
        "parameters": {"top_k": 3},
    }, answer(outputs(TEXTS, 3), id="42"))
    ids, mask = padded(TEXTS)
    tensor = lambda name, data: {"name": name, "shape": list(data.shape), "datatype": "INT64", "data": data.tolist()}
    yield request("ids", f"/v2/models/{MODEL}/versions/1/infer",
                  {"inputs": [tensor("input_ids", ids), tensor("attention_mask", mask)], "outputs": [{"name": "logits"}]},
                  answer(outputs(TEXTS)[2:]))
    yield request("unknown model", "/v2/models/none/infer", {"inputs": []}, {"error": {"$": "string"}}, 404)

    by = "tritonclient.http 2.73.0"
    text = triton_http.InferInput("text", [2], "BYTES")
    for name, binary in [("JSON", False), ("binary", True)]:
        text.set_data_from_numpy(np.array([t.encode() for t in texts], dtype=object), binary_data=binary)
        wanted = None if binary else [triton_http.InferRequestedOutput(o, binary_data=False) for o in ("label", "score")]
        body, length = triton_http.InferenceServerClient.generate_request_body([text], outputs=wanted, request_id="7")
        headers = {} if length is None else {"inference-header-content-length": str(length)}
        yield request(f"texts, {name}", url, bytes(body),
                      answer(outputs(TEXTS)[: None if binary else 2], id="7"), by=by, headers=headers)
    inputs = []
    for name, data in [("input_ids", ids), ("attention_mask", mask)]:
        inputs.append(triton_http.InferInput(name, data.shape, "INT64"))
        inputs[-1].set_data_from_numpy(data)
    mixed = [triton_http.InferRequestedOutput("logits", binary_data=True),
             triton_http.InferRequestedOutput("label", binary_data=False)]
    body, length = triton_http.InferenceServerClient.generate_request_body(inputs, outputs=mixed)
    yield request("ids, binary; outputs mixed", url, bytes(body), answer([outputs(TEXTS)[0], outputs(TEXTS)[2]]),
                  by=by, headers={"inference-header-content-length": str(length)})


def grpc():
    """Serialised ModelInferRequest messages."""
    by = "tritonclient.grpc 2.73.0"
    answer = lambda outputs, id: {"model_name": MODEL, "model_version": "1", "id": id, "outputs": outputs}

    def message(inputs, outputs=None, request_id="", parameters=None):
        m = triton_grpc_utils._get_inference_request(
            model_name=MODEL, inputs=inputs, model_version="", request_id=request_id, outputs=outputs, sequence_id=0,
            sequence_start=False, sequence_end=False, priority=0, timeout=None, parameters=parameters)
        return m

    text = triton_grpc.InferInput("text", [2], "BYTES")
    text.set_data_from_numpy(np.array([c["text"].encode() for c in TEXTS], dtype=object))
    m = message([text], request_id="9", parameters={"top_k": 2})
    yield request("texts, raw", "ModelInfer", m.SerializeToString(), answer(outputs(TEXTS, 2), "9"), by=by)

    ids, mask = padded(TEXTS)
    inputs = []
    for name, data in [("input_ids", ids), ("attention_mask", mask)]:
        inputs.append(triton_grpc.InferInput(name, data.shape, "INT64"))
        inputs[-1].set_data_from_numpy(data)
    m = message(inputs, outputs=[triton_grpc.InferRequestedOutput("logits")])
    yield request("ids, raw", "ModelInfer", m.SerializeToString(), answer(outputs(TEXTS)[2:], ""), by=by)

    m = message([], request_id="t")
    tensor = m.inputs.add()
    tensor.name, tensor.datatype = "text", "BYTES"
    tensor.shape.extend([2])
    tensor.contents.bytes_contents.extend(c["text"].encode() for c in TEXTS)
    yield request("texts, typed", "ModelInfer", m.SerializeToString(), answer(outputs(TEXTS), "t"),
                  by="the published protobuf messages")


def vllm():
    def answer(cases):
        data = []
        for i, c in enumerate(cases):
            probs = softmax(c["logits"])
            label = LABELS[probs.index(max(probs))]
            data.append({"index": i, "label": label, "probs": probs, "num_classes": len(LABELS)})
        tokens = sum(len(c["ids"]) for c in cases)
        return {"id": {"$": "classify"}, "object": "list", "created": {"$": "integer"}, "model": MODEL, "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0,
                          "prompt_tokens_details": None}}

    one, both = TEXTS[0]["text"], [c["text"] for c in TEXTS]
    yield request("one text", "/classify", {"model": MODEL, "input": one}, answer(TEXTS[:1]))
    yield request("texts", "/v1/classify", {"model": MODEL, "input": both}, answer(TEXTS))
    yield request("token ids", "/classify", {"model": MODEL, "input": TEXTS[0]["ids"]}, answer(TEXTS[:1]))
    yield request("lists of token ids", "/classify", {"model": MODEL, "input": [c["ids"] for c in TEXTS]}, answer(TEXTS))
    error = {"message": {"$": "string"}, "type": "NotFoundError", "param": None, "code": 404}
    yield request("unknown model", "/classify", {"model": "none", "input": one}, {"error": error}, 404)


def main():
    parts = {"tei": tei, "hugging_face": hugging_face, "oip_rest": rest, "oip_grpc": grpc, "vllm": vllm}
    text = json.dumps({name: list(part()) for name, part in parts.items()}, ensure_ascii=False, indent=1)
    (FIXTURES / "requests.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
