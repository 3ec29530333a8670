"""Loads a model directory with Hugging Face transformers and compares its logits.

    python scripts/check_transformers.py DIR --expect FILE.jsonl [--tolerance 1e-4]   compare; exit 1 if they differ
        --median T: and half of the texts differ by at most T
    python scripts/check_transformers.py DIR --texts FILE                             print {"text", "logits"} lines

FILE.jsonl holds lines {"text": .., "logits": [..]}, as `quetsch predict --logits --format jsonl` prints them.
Works with transformers 4.57.6 and 5.23.0 (requirements.txt), float and bitsandbytes directories, on CPU.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


BITSANDBYTES = torch.library.Library("bitsandbytes", "IMPL")  # kept: its kernels live as long as it does


class StudentHFModel(BertPreTrainedModel):
    """A `backbone` (the reference's is BERT, any family will do), masked mean pooling, a two-layer `head`; heads pruned
    as config.student_pruned_heads says."""

    config_class = BertConfig
    base_model_prefix = "backbone"

    def __init__(self, config):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config, attn_implementation="eager")
        for layer, heads in (getattr(config, "student_pruned_heads", None) or {}).items():
            layers = getattr(self.backbone, "encoder", None) or self.backbone.transformer
            prune_heads(layers.layer[int(layer)].attention, {int(h) for h in heads})
        h = config.hidden_size
        self.head = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(h, h), nn.GELU(), nn.Dropout(0.2), nn.Linear(h, config.num_labels)
        )
        self.post_init()

    def forward(self, input_ids, attention_mask, token_type_ids=None, **_):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        x = self.backbone(input_ids, attention_mask=attention_mask, **types).last_hidden_state
        mask = attention_mask[..., None].to(x.dtype)
        pooled = (x * mask).sum(1) / mask.sum(1).clamp(min=1e-6)
        return SequenceClassifierOutput(logits=self.head(pooled))


def prune_heads(attention, heads):
    """Removes heads by original index. transformers 5 has no prune_heads, so there the layers are replaced here."""
    if hasattr(attention, "prune_heads"):
        return attention.prune_heads(heads)
    inner = attention.self
    inner.num_attention_heads -= len(heads)
    inner.all_head_size = width = inner.num_attention_heads * inner.attention_head_size
    for name in ["query", "key", "value"]:
        setattr(inner, name, nn.Linear(getattr(inner, name).in_features, width))
    attention.output.dense = nn.Linear(width, attention.output.dense.out_features)


def decode_exactly():
    """Replaces the CPU decoder of 4-bit weights by the plain one that bitsandbytes also has.

    The AVX-512 kernel of 0.50.2 is wrong where in_features is a multiple of 16 and not of 64 (96, 224, 288 ..), which
    is common after pruning heads: blocks of 64 run over the flat weight, the kernel starts one in each row.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    def dequantize(a, absmax, blocksize, quant_type, shape, dtype):
        code = _get_4bit_code(quant_type, a.device)
        return _dequantize_4bit_compute(a.view(torch.uint8).reshape(-1), absmax, code, blocksize, shape, dtype)

    BITSANDBYTES.impl("dequantize_4bit", dequantize, "CPU", allow_override=True)


def load(folder, trust_remote_code=False):
    """-> (model, loading info). Quantised linears stay so; everything else becomes f32."""
    config = json.loads((folder / "config.json").read_text())
    student = "StudentHFModel" in config.get("architectures", []) and not trust_remote_code
    options = {"dtype": torch.float32, "output_loading_info": True}
    if config.get("pruned_heads") and int(transformers.__version__.split(".")[0]) >= 5:
        sys.exit(f"{folder}: transformers 5 no longer reads pruned_heads; export the dense or the remote-code layout")
    if "quantization_config" in config:
        options["device_map"] = {"": "cpu"}
        decode_exactly()
    if student:
        options["config"] = AutoConfig.from_pretrained(folder)
    else:
        options |= {"attn_implementation": "eager", "trust_remote_code": trust_remote_code}
    model, info = (StudentHFModel if student else AutoModelForSequenceClassification).from_pretrained(folder, **options)
    # transformers 5.23 leaves weights of remote-code classes in their stored type where others are quantised.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights for AVX512-BF16 on first use, which rounds; take the exact path.
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model.eval(), info


@torch.no_grad()
def logits_of(model, tokenizer, texts, max_length, batch):
    rows = []
    for i in range(0, len(texts), batch):
        inputs = tokenizer(
            texts[i : i + batch], truncation=True, max_length=max_length, padding=batch > 1, return_tensors="pt"
        )
        rows += model(**inputs).logits.float().tolist()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--texts", type=Path, help="one text a line; without --expect the logits are printed")
    parser.add_argument("--expect", type=Path, help="JSONL with text and logits")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest allowed |difference| (default 1e-4)")
    parser.add_argument("--median", type=float, help="largest allowed median of the texts' |difference|")
    parser.add_argument("--max-length", type=int, help="default: max_length of config.json, else 256")
    parser.add_argument("--batch", type=int, default=16, help="1 means no padding at all (default 16)")
    parser.add_argument("--trust-remote-code", action="store_true", help="for directories with auto_map")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it repeats one remark at every matrix product

    model, info = load(args.dir, args.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(args.dir)
    config = json.loads((args.dir / "config.json").read_text())
    # RoBERTa counts positions from pad_token_id + 1.
    offset = config["pad_token_id"] + 1 if config["model_type"] in ["roberta", "xlm-roberta", "camembert"] else 0
    longest = config["max_position_embeddings"] - offset
    max_length = args.max_length or min(config.get("max_length") or 256, longest)
    linears = [type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)]
    say = lambda *what: print(*what, file=sys.stderr)
    say(f"transformers {transformers.__version__}, torch {torch.__version__}, {type(model).__name__}")
    say("linears:", ", ".join(f"{linears.count(kind)} {kind}" for kind in sorted(set(linears))))
    for key in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
        say(f"{key}: {sorted(map(str, info[key]))}")
    # The student never uses its BERT pooler, so that one may be absent.
    missing = [k for k in info["missing_keys"] if not k.startswith("backbone.pooler.")]
    bad = bool(missing or info["unexpected_keys"] or info["mismatched_keys"])

    # LLM.int8() looks for outlier columns over the whole batch, so a batch would change its answers.
    batch = 1 if "Linear8bitLt" in linears else args.batch
    if args.expect:
        rows = [json.loads(line) for line in args.expect.read_text().split("\n") if line.strip()]
        found = logits_of(model, tokenizer, [r["text"] for r in rows], max_length, batch)
        expected = torch.tensor([r["logits"] for r in rows], dtype=torch.float64)
        found = torch.tensor(found, dtype=torch.float64)
        if expected.shape != found.shape:
            sys.exit(f"expected logits of shape {list(expected.shape)}, found {list(found.shape)}")
        difference = (expected - found).abs().amax(1)
        worst = int(difference.argmax())
        same = int((expected.argmax(1) == found.argmax(1)).sum())
        print(f"{len(rows)} texts, max_length {max_length}, batch {batch}")
        print(f"largest |logit difference| {difference[worst]:.3g} (allowed {args.tolerance:g})")
        print(f"  at text {worst}: {rows[worst]['text'][:60]!r}")
        print(f"same prediction {same}/{len(rows)}")
        bad |= not bool(difference.max() <= args.tolerance)  # NaN is a difference too
        if args.median is not None:
            print(f"median |logit difference of a text| {difference.median():.3g} (allowed {args.median:g})")
            bad |= not bool(difference.median() <= args.median)
    elif args.texts:
        texts = [t for t in args.texts.read_text().split("\n") if t]
        for text, row in zip(texts, logits_of(model, tokenizer, texts, max_length, batch)):
            print(json.dumps({"text": text, "logits": row}, ensure_ascii=False))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
