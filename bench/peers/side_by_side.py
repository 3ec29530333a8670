"""Times Quetsch and other engines in turn, in processes of their own, and prints medians of the ratios as Markdown.

    python bench/peers/side_by_side.py --quetsch target/release/quetsch --ours MODEL_INT8 --model MODEL --art ART \\
        --data TEST.csv [--engines ort_int8_fused,openvino_2streams] [--rounds 5] [--threads 2] [--isa avx512vnni] [--compute int8]

--ours is our model directory, --model the float one that the peers' files in ART were made from (prepare.py). In every
round each engine runs once, ours first; a ratio compares two runs of one round, and the table holds its median. The last
lines say how many times faster than the fastest peer of each round ours is. --json FILE keeps what was measured.

Ours: latency of `quetsch bench` at batch 1, token ids in, logits out; sentences_per_s, texts in, labels out; the time
from starting `quetsch predict` to its answer; the memory of `quetsch predict` over the data.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--quetsch", required=True)
parser.add_argument("--ours", required=True)
parser.add_argument("--model")
parser.add_argument("--art")
parser.add_argument("--data", required=True)
parser.add_argument("--engines", default="")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--lengths", default="16,32,128")
parser.add_argument("--isa", help="QUETSCH_ISA for ours")
parser.add_argument("--compute", default="f32", help="what our float weights are multiplied in: f32, bf16 or int8 (4-bit ones too)")
parser.add_argument("--json", type=Path)
a = parser.parse_args()
engines = [e for e in a.engines.split(",") if e]
lengths = [n for n in a.lengths.split(",") if n]
environment = os.environ | ({"QUETSCH_ISA": a.isa} if a.isa else {})


def last_json(command, tries=1):
    for _ in range(tries):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not done.returncode:
            return done.stdout
        print(f"{' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
    sys.exit(1)


def run_and_wait(command):
    """Wall time in ms and highest resident memory in MB. This program is smaller than what it starts, so it does not
    count (Linux keeps the memory of before `exec` in ru_maxrss)."""
    start = time.perf_counter()
    null = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(command[0], command, environment, file_actions=null)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return (time.perf_counter() - start) * 1e3, usage.ru_maxrss * 1024 / 1e6


def ours():
    program = str(Path(a.quetsch).resolve())
    threads = ["--threads", str(a.threads), "--compute", a.compute]
    bench = [program, "bench", "--model", a.ours, "--data", a.data, "--format", "json", "--quiet", *threads]
    found = json.loads(last_json([*bench, "--lengths", ",".join(lengths), "--seconds", "1.5", "--passes", "2"]))
    found["latency_ms"] = {str(at["tokens"]): at["latency_ms"]["p50"] for at in found["by_length"]}
    predict = [program, "predict", "--model", a.ours, "--format", "csv", *threads]
    found["first_answer_process_ms"], _ = run_and_wait([*predict, "I lost my card"])
    found["predict_ms"], found["predict_rss_mb"] = run_and_wait([*predict, "--input", a.data])
    return found


def peer(engine):
    command = [sys.executable, str(Path(__file__).parent / "peer.py"), engine, a.model, a.art, "--data", a.data]
    # OpenVINO 2026 once aborted ("terminate called without an active exception") in some fifty runs.
    printed = last_json([*command, "--threads", str(a.threads), "--lengths", ",".join(lengths)], tries=3)
    return json.loads(printed.strip().splitlines()[-1])


rounds = []
for i in range(a.rounds):
    rounds.append({"quetsch": ours()} | {e: peer(e) for e in engines})
    print(f"round {i + 1} of {a.rounds}", file=sys.stderr)
if a.json:
    a.json.write_text(json.dumps(rounds, indent=1))


def median(get):
    found = [value for value in map(get, rounds) if value is not None]
    return statistics.median(found) if found else None


def cell(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def latency(engine, n):
    return lambda r: r[engine].get("latency_ms", {}).get(n)


def fastest(r, get, best):
    return best(v for v in (get(e)(r) for e in engines) if v is not None)


print(f"{a.ours}, {a.threads} threads, {rounds[0]['quetsch']['isa']}, {a.rounds} rounds, medians\n")
header = ["", *(f"{n} tokens, ms" for n in lengths), "texts in, labels out, 1/s", "peak memory, MB"]
print("| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
for engine in ("quetsch", *engines):
    cells = [cell(median(latency(engine, n)), 3) for n in lengths]
    cells.append(cell(median(lambda r: r[engine].get("sentences_per_s")), 0))
    memory = "predict_rss_mb" if engine == "quetsch" else "peak_rss_mb"
    cells.append(cell(median(lambda r: r[engine].get(memory)), 1))
    print(f"| {engine} | " + " | ".join(cells) + " |")
for engine in engines:
    cells = []
    for n in lengths:
        get = latency(engine, n)
        cells.append(cell(median(lambda r: get(r) and get(r) / latency("quetsch", n)(r)), 2))
    rate = lambda r: r["quetsch"]["sentences_per_s"] / r[engine]["sentences_per_s"]  # noqa: E731
    print(f"| times faster than {engine} | " + " | ".join([*cells, cell(median(rate), 2), ""]) + " |")
if engines:
    cells = []
    for n in lengths:
        best = lambda r: fastest(r, lambda e: latency(e, n), min) / latency("quetsch", n)(r)  # noqa: E731
        cells.append(cell(median(best), 2))
    rate = lambda r: r["quetsch"]["sentences_per_s"] / fastest(  # noqa: E731
        r, lambda e: lambda r: r[e].get("sentences_per_s"), max
    )
    print("| **times faster than the fastest peer** | " + " | ".join([*cells, cell(median(rate), 2), ""]) + " |")
q = lambda key: cell(median(lambda r: r["quetsch"][key]), 1)  # noqa: E731
share = cell(median(lambda r: 100 * r["quetsch"]["work"]["peak_share"]), 0)
print(
    f"\nloading {q('load_ms')} ms; process start to first answer {q('first_answer_process_ms')} ms; `predict` over the "
    f"data {q('predict_ms')} ms, {q('predict_rss_mb')} MB; {share}% of the machine's peak over the data"
)
