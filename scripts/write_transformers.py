"""Writes a model directory with Hugging Face transformers, quantised by bitsandbytes.

    python scripts/write_transformers.py FROM TO float|int8|nf4|nf4-single|fp4
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

source, out, scheme = sys.argv[1:]
options = {"dtype": torch.float32}
if scheme == "int8":
    options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
elif scheme != "float":
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme.split("-")[0],
        bnb_4bit_use_double_quant=scheme == "nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
if "quantization_config" in options:
    options["device_map"] = {"": "cpu"}
model = AutoModelForSequenceClassification.from_pretrained(source, **options)
# Before any forward: the first one repacks 4-bit weights on some CPUs.
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
assert (Path(out) / "model.safetensors").exists()
