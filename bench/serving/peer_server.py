"""What a Python team runs: FastAPI and uvicorn over ONNX Runtime's dynamic int8, the same `/predict`.

    MODEL=OUT/bert-6x384 uvicorn peer_server:app --port 3001 --workers 2 --log-level error

One worker process for every core, one ONNX Runtime thread in each: what was fastest here for single requests.
"""

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer

MODEL = Path(os.environ["MODEL"])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("ORT_THREADS", "1"))
session = onnxruntime.InferenceSession(MODEL / "model_int8.onnx", options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.enable_truncation(256)
labels = [label for _, label in sorted(json.loads((MODEL / "config.json").read_text())["id2label"].items(),
                                       key=lambda item: int(item[0]))]
names = [i.name for i in session.get_inputs()]
app = FastAPI()


class Request(BaseModel):
    inputs: str
    top_k: int | None = None


@app.get("/health")
def health():
    return {}


@app.post("/predict")
def predict(request: Request):
    e = tokenizer.encode(request.inputs)
    values = {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
    feed = {n: np.array([values[n]], dtype=np.int64) for n in names}
    logits = session.run(["logits"], feed)[0][0]
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    order = np.argsort(-scores)[: request.top_k]
    return [{"score": float(scores[i]), "label": labels[i]} for i in order]
