"""Requests and the answers that belong to them, for `load.lua` and `checks.py`: one line each, tab between both.

    quetsch predict --model DIR --input TEXTS --format jsonl --top-k 3 | python pairs.py > FILE

The answers are those of `quetsch predict`, digit for digit.
"""

import json
import sys

for line in sys.stdin:
    case = json.loads(line, parse_float=lambda digits: digits)
    request = {"inputs": case["text"], "top_k": 3}
    # Numbers stay as they were written.
    answer = ",".join('{"score":%s,"label":%s}' % (p["score"], json.dumps(p["label"], ensure_ascii=False))
                      for p in case["predictions"])
    print(json.dumps(request, ensure_ascii=False), f"[{answer}]", sep="\t")
