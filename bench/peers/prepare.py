"""Converts a model directory into what the other engines read.

    python bench/peers/prepare.py MODEL ART --train TRAIN.csv [--steps onnx,fused,dynamic,openvino,nncf,ctranslate2]

onnx: ONNX Runtime's fp32 graph; fused: its transformer optimiser's; dynamic: both in dynamic int8; openvino: the same
graph for OpenVINO; nncf: quantised by NNCF with 512 training sentences; ctranslate2: pruned heads written as zeros.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np

import common

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("art", type=Path)
parser.add_argument("--train", type=Path)
parser.add_argument("--calibration", type=int, default=512, help="sentences for NNCF")
parser.add_argument("--steps", default="onnx,fused,dynamic,openvino,nncf")
a = parser.parse_args()
a.art.mkdir(parents=True, exist_ok=True)
config = json.loads((a.model / "config.json").read_text())


def two_sentences():
    """A batch of two lengths, so that an exported graph is seen to read its mask."""
    ids, mask = common.one_sentence(16, config["vocab_size"])
    ids, mask = ids.repeat(2, 0), mask.repeat(2, 0)
    mask[1, 10:] = 0
    return ids, mask


def run_onnx(path, ids, mask):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {"input_ids": ids, "attention_mask": mask}
    types = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
    return session.run(None, {i.name: given[i.name].astype(types[i.type]) for i in session.get_inputs()})[0]


def onnx():
    import torch

    from student import StudentHFModel

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask).logits

    model = Logits(StudentHFModel.from_pretrained(a.model)).eval()
    ids, mask = two_sentences()
    tensors = torch.from_numpy(ids), torch.from_numpy(mask)
    both = {0: "batch", 1: "tokens"}
    torch.onnx.export(
        model,
        tensors,
        str(a.art / "model.onnx"),
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes={"input_ids": both, "attention_mask": both, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    with torch.no_grad():
        expected = model(*tensors).numpy()
    print("largest difference to PyTorch:", np.abs(run_onnx(a.art / "model.onnx", ids, mask) - expected).max())


def fused():
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    pruned = bool(config.get("student_pruned_heads"))  # heads and width are then found layer by layer
    graph = optimizer.optimize_model(
        str(a.art / "model.onnx"),
        model_type="bert",
        num_heads=0 if pruned else config["num_attention_heads"],
        hidden_size=0 if pruned else config["hidden_size"],
        optimization_options=FusionOptions("bert"),
        opt_level=0,
    )
    print("fused:", graph.get_fused_operator_statistics())
    graph.save_model_to_file(str(a.art / "fused.onnx"))
    ids, mask = two_sentences()
    difference = run_onnx(a.art / "model.onnx", ids, mask) - run_onnx(a.art / "fused.onnx", ids, mask)
    print("largest difference to the plain graph:", np.abs(difference).max())


def dynamic():
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name, options in (("model", None), ("fused", {"DefaultTensorType": 1})):  # 1: the fused nodes' type is f32
        quantize_dynamic(
            str(a.art / f"{name}.onnx"),
            str(a.art / f"{name}_int8.onnx"),
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options=options,
        )


def openvino():
    import openvino

    model = openvino.convert_model(str(a.art / "model.onnx"))
    openvino.save_model(model, str(a.art / "openvino.xml"), compress_to_fp16=False)


def nncf():
    import nncf
    import openvino

    texts, _ = common.read_split(a.train, a.model)
    chosen = np.random.RandomState(0).permutation(len(texts))[: a.calibration]
    encoded = common.encode(common.tokenizer(a.model), [texts[i] for i in chosen])
    given = [dict(zip(("input_ids", "attention_mask"), common.pad([e]))) for e in encoded]
    quantised = nncf.quantize(
        openvino.Core().read_model(str(a.art / "openvino.xml")),
        nncf.Dataset(given),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(given),
    )
    openvino.save_model(quantised, str(a.art / "openvino_int8.xml"), compress_to_fp16=False)


def ctranslate2():
    import ctranslate2
    import torch
    from transformers import BertModel

    from student import StudentHFModel

    model = StudentHFModel.from_pretrained(a.model).eval()
    dense = BertModel(type(model.config)(**{k: v for k, v in config.items() if "pruned_heads" not in k})).eval()
    dim = model.config.hidden_size // model.config.num_attention_heads
    state = dense.state_dict()
    for name, value in model.backbone.state_dict().items():
        if state[name].shape != value.shape:
            attention = model.backbone.encoder.layer[int(name.split(".")[2])].attention
            heads = [h for h in range(model.config.num_attention_heads) if h not in attention.pruned_heads]
            kept = torch.cat([torch.arange(h * dim, (h + 1) * dim) for h in heads])
            whole = torch.zeros_like(state[name])
            if name.endswith("attention.output.dense.weight"):
                whole[:, kept] = value
            else:
                whole[kept] = value
            value = whole
        state[name] = value
    dense.load_state_dict(state)
    source = a.art / "ctranslate2_source"
    dense.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (a.model / name).exists():
            shutil.copy(a.model / name, source)
    converter = ctranslate2.converters.TransformersConverter(str(source))
    converter.convert(str(a.art / "ctranslate2_int8"), quantization="int8", force=True)
    head = {n: p.detach().numpy() for n, p in model.head.named_parameters()}
    np.savez(a.art / "head.npz", **head)
    shutil.rmtree(source)


for step in a.steps.split(","):
    start = time.time()
    {f.__name__: f for f in (onnx, fused, dynamic, openvino, nncf, ctranslate2)}[step]()
    print(f"{step}: {time.time() - start:.0f} s", flush=True)
