"""Writes fixtures/five: a tiny BERT as transformers 5 and bitsandbytes write it: python scripts/five_fixtures.py

Pins (requirements-5.txt): Python 3.11, torch 2.15.0, transformers 5.23.0, bitsandbytes 0.50.2, CPU, one thread.
"""

import logging
import warnings
from pathlib import Path

import bitsandbytes
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, BitsAndBytesConfig

from check_transformers import decode_exactly, load
from fixture_files import dump, empty
from tiny_models import MAX_LENGTH, answers, centre, dequantised, randomise, vocabulary

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


def model(folder):
    """The float model and its tokenizer."""
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=24)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=24,
        max_position_embeddings=24,
        id2label={0: "lost_card", 1: "double_charge", 2: "change_pin"},
        label2id={"lost_card": 0, "double_charge": 1, "change_pin": 2},
    )
    bert = randomise(BertForSequenceClassification(config), 7)
    centre(bert, bert.classifier.bias, tokenizer)
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink()  # transformers 5 writes tokenizer.json alone


def schemes():
    """Name -> (dtype of the load, scheme)."""
    keep = {"llm_int8_skip_modules": ["classifier"]}
    yield "int8", torch.float32, {"load_in_8bit": True} | keep
    four = {"load_in_4bit": True} | keep
    bf16 = {"bnb_4bit_compute_dtype": torch.bfloat16}
    yield "nf4", torch.float32, four | bf16 | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    yield "fp4", torch.float32, four | {"bnb_4bit_quant_type": "fp4"}
    for kind in ["nf4", "fp4"]:
        for name, dtype in HALF.items():
            types = {"bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": dtype}
            yield f"{kind}_{name}", dtype, four | types | {"bnb_4bit_use_double_quant": kind == "nf4"}


def blocks(path):
    """66 x 64 numbers in blocks of other sizes; the test makes the same numbers, all of them exact in f16."""
    w = torch.tensor([i * 7919 % 2003 - 1001 for i in range(66 * 64)], dtype=torch.float32).reshape(66, 64) / 1024
    out = {}
    for kind in ["nf4", "fp4"]:
        for size in [32, 128, 512, 4096]:
            for nested in [False, True]:
                packed, state = quantize_4bit(w, blocksize=size, compress_statistics=nested, quant_type=kind)
                at = f"{kind}.{size}.{'nested' if nested else 'plain'}"
                out |= {f"{at}.packed": packed.flatten(), f"{at}.absmax": state.absmax}
                if nested:
                    out |= {f"{at}.nested_absmax": state.state2.absmax, f"{at}.offset": state.offset.reshape(1)}
                    if kind == "nf4":
                        out[f"{at}.values"] = dequantize_4bit(packed, state).half()
    save_file(out, path)


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    assert transformers.__version__ == "5.23.0" and bitsandbytes.__version__ == "0.50.2"
    root = empty(FIXTURES / "five")
    source = empty(root / "float")
    model(source)
    inputs = answers(source)
    expected = {"max_length": MAX_LENGTH, "inputs": inputs}
    for name, dtype, scheme in schemes():
        config = BitsAndBytesConfig(**scheme)
        options = {"dtype": dtype, "device_map": {"": "cpu"}, "quantization_config": config}
        BertForSequenceClassification.from_pretrained(source, **options).save_pretrained(root / name)
        bert, info = load(root / name)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        if dtype == torch.float32:
            save_file(dequantised(bert), root / name / "dequantised.safetensors")
        expected[name] = [x["logits"] for x in answers(source, bert)]
    decode_exactly()
    blocks(root / "blocks.safetensors")
    dump(root / "expected.json", expected)


if __name__ == "__main__":
    main()
