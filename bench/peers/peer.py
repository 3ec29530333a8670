"""Times one engine on one model in a process of its own; prints one JSON line.

    python bench/peers/peer.py ENGINE MODEL ART --data TEST.csv [--threads 2] [--lengths 16,32,128] [--passes 2]

latency_ms: median at batch 1, token ids in, logits out, by length in tokens. sentences_per_s: texts in, labels out:
tokenising (once, on one thread of the tokenizers library) plus the best of the passes over batches of 32 sentences of
like length. ready_s: process start to the first answer. peak_rss_mb: highest resident memory.
"""

import argparse
import functools
import json
import os
import time

START = time.perf_counter()
ENGINES = (
    "ort_fp32 ort_fp32_fused ort_int8 ort_int8_fused openvino openvino_f32 openvino_2streams openvino_int8 "
    "openvino_int8_2streams torch_fp32 torch_bf16 bnb_nf4 bnb_int8 ctranslate2_int8"
).split()

parser = argparse.ArgumentParser()
parser.add_argument("engine", choices=ENGINES)
parser.add_argument("model")
parser.add_argument("art")
parser.add_argument("--data", required=True)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--lengths", default="16,32,128")
parser.add_argument("--passes", type=int, default=2)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--seconds", type=float, default=1.5, help="time for each length")
a = parser.parse_args()
os.environ.setdefault("OMP_NUM_THREADS", str(a.threads))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402

import common  # noqa: E402


def onnxruntime_engine():
    import onnxruntime

    file = {"fp32": "model", "fp32_fused": "fused", "int8": "model_int8", "int8_fused": "fused_int8"}[a.engine[4:]]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = a.threads, 1
    session = onnxruntime.InferenceSession(f"{a.art}/{file}.onnx", options, providers=["CPUExecutionProvider"])
    types = {i.name: np.int32 if "int32" in i.type else np.int64 for i in session.get_inputs()}

    def run(ids, mask):
        given = {"input_ids": ids, "attention_mask": mask}
        return session.run(None, {name: given[name].astype(t, copy=False) for name, t in types.items()})[0]

    return run


def openvino_model(streams):
    import openvino

    graph = "openvino_int8" if "int8" in a.engine else "openvino"
    settings = {"INFERENCE_NUM_THREADS": a.threads}
    if streams:
        settings["NUM_STREAMS"] = streams
    else:
        settings["PERFORMANCE_HINT"] = "LATENCY"
    if a.engine.endswith("_f32"):  # else its default: bf16 where the CPU has it
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    return openvino.Core().compile_model(f"{a.art}/{graph}.xml", "CPU", settings)


def openvino_engine():
    compiled = openvino_model(None)
    request, output = compiled.create_infer_request(), compiled.output(0)

    def run(ids, mask):
        return np.array(request.infer({"input_ids": ids, "attention_mask": mask}, share_inputs=True)[output])

    return run


def torch_engine():
    import torch
    from student import StudentHFModel

    torch.set_num_threads(a.threads)
    settings = {}
    if a.engine.startswith("bnb"):
        from transformers import BitsAndBytesConfig

        settings = {"device_map": {"": "cpu"}, "attn_implementation": "eager"}
        settings["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if a.engine == "bnb_int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        )
    model = StudentHFModel.from_pretrained(a.model, **settings).eval()
    for module in model.modules():
        # Its packed path fails where in_features is no multiple of 64, as pruned layers have.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if a.engine == "torch_bf16":
        model = model.to(torch.bfloat16)

    def run(ids, mask):
        with torch.inference_mode():
            return model(torch.from_numpy(ids), torch.from_numpy(mask)).logits.float().numpy()

    return run


def ctranslate2_engine():
    import ctranslate2
    from scipy.special import erf

    encoder = ctranslate2.Encoder(
        f"{a.art}/ctranslate2_int8", device="cpu", compute_type="int8", intra_threads=a.threads, inter_threads=1
    )
    head = np.load(f"{a.art}/head.npz")

    def run(ids, mask):
        view = ctranslate2.StorageView.from_array
        out = encoder.forward_batch(view(ids.astype(np.int32)), view(mask.sum(1).astype(np.int32)))
        hidden, weight = np.array(out.last_hidden_state), mask[:, :, None].astype(np.float32)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        x = pooled @ head["1.weight"].T + head["1.bias"]
        return (0.5 * x * (1 + erf(x / np.sqrt(2)))) @ head["4.weight"].T + head["4.bias"]

    return run


def median_ms(run, ids, mask):
    for _ in range(5):
        run(ids, mask)
    times, end = [], time.perf_counter() + a.seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run(ids, mask)
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)) * 1e3, 4)


def one_pass(encoded, labels, run):
    """Seconds and logits of the whole test set."""
    logits = np.zeros((len(encoded), labels), np.float32)
    start = time.perf_counter()
    for batch in common.sorted_batches(encoded, a.batch):
        logits[batch] = run(*common.pad([encoded[i] for i in batch]))
    return time.perf_counter() - start, logits


def one_pass_streams(encoded, labels, compiled, streams):
    """The same with OpenVINO's queue of several requests at a time."""
    import openvino

    logits = np.zeros((len(encoded), labels), np.float32)
    queue = openvino.AsyncInferQueue(compiled, streams)
    queue.set_callback(lambda request, batch: logits.__setitem__(batch, request.get_output_tensor(0).data))
    start = time.perf_counter()
    for batch in common.sorted_batches(encoded, a.batch):
        ids, mask = common.pad([encoded[i] for i in batch])
        queue.start_async({"input_ids": ids, "attention_mask": mask}, batch)
    queue.wait_all()
    return time.perf_counter() - start, logits


config = json.load(open(f"{a.model}/config.json"))
labels = len(config["id2label"])
tokenizer = common.tokenizer(a.model)
texts, truth = common.read_split(a.data, a.model)
result = {"engine": a.engine, "threads": a.threads, "n": len(texts)}
streams = a.engine.endswith("_2streams") and 2
if streams:
    compiled = openvino_model(streams)
    passes = functools.partial(one_pass_streams, labels=labels, compiled=compiled, streams=streams)
else:
    kinds = {"ort": onnxruntime_engine, "ope": openvino_engine, "ctr": ctranslate2_engine}
    run = kinds.get(a.engine[:3], torch_engine)()
    run(*common.pad(common.encode(tokenizer, texts[:1])))
    result["ready_s"] = round(time.perf_counter() - START, 3)
    lengths = [int(n) for n in a.lengths.split(",") if n]
    result["latency_ms"] = {
        str(n): median_ms(run, *common.one_sentence(n, config["vocab_size"])) for n in lengths
    }
    passes = functools.partial(one_pass, labels=labels, run=run)
if a.passes:
    start = time.perf_counter()
    encoded = common.encode(tokenizer, texts)
    tokenising = time.perf_counter() - start
    seconds, logits = min((passes(encoded) for _ in range(a.passes)), key=lambda p: p[0])
    result["encoder_sentences_per_s"] = round(len(texts) / seconds, 1)
    result["sentences_per_s"] = round(len(texts) / (seconds + tokenising), 1)
    result["accuracy"] = round(float((logits.argmax(1) == truth).mean()), 5)
result["peak_rss_mb"] = round(common.memory_mb(), 1)
print(json.dumps(result))
