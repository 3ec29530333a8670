"""Two models of the sizes that are measured, with random weights (speed does not depend on them), for both servers.

    python make_models.py TOKENIZER_DIR OUT

OUT/bert-6x384 and OUT/distilbert-6x768: Hugging Face directories with 77 labels and the tokenizer of TOKENIZER_DIR
(BERT's uncased vocabulary); in each `model_int8.onnx`, ONNX Runtime's dynamic int8 for `peer_server.py`.
"""

import sys
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import (AutoTokenizer, BertConfig, BertForSequenceClassification, DistilBertConfig,
                          DistilBertForSequenceClassification)

LABELS = 77


def main():
    tokenizer_dir, out = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    labels = {i: f"label_{i}" for i in range(LABELS)}
    sizes = dict(vocab_size=len(tokenizer), id2label=labels, label2id={v: k for k, v in labels.items()})
    torch.manual_seed(1)
    models = {
        "bert-6x384": BertForSequenceClassification(BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **sizes)),
        "distilbert-6x768": DistilBertForSequenceClassification(DistilBertConfig(**sizes)),
    }
    for name, model in models.items():
        model.eval().save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        example = tokenizer(["a sentence", "and a longer one"], padding=True, return_tensors="pt")
        names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in example and
                 not (n == "token_type_ids" and name.startswith("distil"))]
        axes = {n: {0: "batch", 1: "tokens"} for n in names} | {"logits": {0: "batch"}}
        torch.onnx.export(model, tuple(), out / name / "model.onnx", kwargs={n: example[n] for n in names},
                          input_names=names, output_names=["logits"], dynamic_axes=axes, opset_version=17, dynamo=False)
        quantize_dynamic(out / name / "model.onnx", out / name / "model_int8.onnx", weight_type=QuantType.QInt8,
                         per_channel=True)
        print(out / name)


if __name__ == "__main__":
    main()
