#!/usr/bin/env bash
# Every figure of docs/serving.md: bench/serving/run.sh WHAT, on a machine with nothing else to do.
#   WHAT: throughput distilbert peer cold idle quota soak overload sigterm kill all
# QUETSCH the release binary, MODEL the 6-layer int8 model, DATA texts (.csv or .txt); for the peer MODELS, what
# make_models.py wrote, and PYTHON, an interpreter with requirements.txt. SECONDS_EACH shortens a trial run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
quetsch=${QUETSCH:-target/release/quetsch}
seconds=${SECONDS_EACH:-30}
work=$(mktemp -d)
server=
stop() { if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; server=; fi; }
trap 'stop; rm -rf "$work"' EXIT

need() { for name in "$@"; do [ -n "${!name:-}" ] || { echo "set $name (see the head of $0)" >&2; exit 2; }; done; }
pairs() { # MODEL FILE
    "$quetsch" predict --model "$1" --input "$DATA" --format jsonl --top-k 3 --quiet | python3 "$here/pairs.py" >"$2"
}
ready() { until curl -sf "http://127.0.0.1:$1/health" >/dev/null; do sleep 0.05; done; }
serve() { # MODEL PORT
    "$quetsch" serve --model "$1" --port "$2" >/dev/null & server=$!
    ready "$2"
}
load() { # THREADS CONNECTIONS PORT PAIRS
    wrk -t "$1" -c "$2" -d "${seconds}s" --latency -s "$here/load.lua" "http://127.0.0.1:$3/predict" -- "$4" | tail -1
}
rss() { awk '/VmRSS|VmHWM/ { printf "%s %.1f MB  ", $1, $2 * 1024 / 1e6 } END { print "" }' "/proc/$1/status"; }
check() { python3 "$here/checks.py" "$@"; }

throughput() {
    need MODEL DATA; pairs "$MODEL" "$work/pairs"
    serve "$MODEL" 3080
    echo "$MODEL, 32 connections, one text a request"
    load 1 32 3080 "$work/pairs" >/dev/null # warm
    load 1 32 3080 "$work/pairs"
    echo "one connection"; load 1 1 3080 "$work/pairs"
    rss "$server"; stop
}
distilbert() { # 16 tokens: [CLS], 14 words of the vocabulary, [SEP]; one connection per core
    need MODELS
    python3 - "$work/16" <<'PY'
import sys
words = "the of and to in is was for on that with as by at from it an be this which".split()
lines = [" ".join(words[(i + j * (1 + i % 3)) % len(words)] for j in range(14)) for i in range(200)]
open(sys.argv[1] + ".txt", "w").write("\n".join(lines) + "\n")
PY
    local model=$work/distilbert-int8
    "$quetsch" quantize --model "$MODELS/distilbert-6x768" --quant int8 --out "$model" --quiet
    DATA="$work/16.txt" pairs "$model" "$work/16"
    serve "$model" 3080
    local cores; cores=$(nproc)
    echo "DistilBERT shape, int8, 16 tokens, $cores connections"
    load 1 "$cores" 3080 "$work/16" >/dev/null
    load 1 "$cores" 3080 "$work/16"
    rss "$server"; stop
}
peer() { # the same weights in both servers, one after the other, three times
    need MODELS DATA PYTHON
    local model=$work/bert-int8
    "$quetsch" quantize --model "$MODELS/bert-6x384" --quant int8 --out "$model" --quiet
    pairs "$model" "$work/pairs"
    for round in 1 2 3; do
        serve "$model" 3080; load 1 32 3080 "$work/pairs" >/dev/null
        echo "round $round, quetsch:"; load 1 32 3080 "$work/pairs"; stop
        (cd "$here" && MODEL="$MODELS/bert-6x384" exec "$PYTHON" -m uvicorn peer_server:app --port 3081 \
            --workers "$(nproc)" --log-level error) & server=$!
        ready 3081; load 1 32 3081 "$work/pairs" >/dev/null
        echo "round $round, FastAPI + ONNX Runtime int8:"; load 1 32 3081 "$work/pairs"; stop
    done
}
with_pairs() { need MODEL DATA; pairs "$MODEL" "$work/pairs"; check "$1" "$quetsch" "$MODEL" "$work/pairs" "${@:2}"; }
cold() { with_pairs cold --times 20; }
idle() { with_pairs idle --seconds "$seconds"; }
quota() { with_pairs quota --seconds "$seconds"; } # as root
soak() { with_pairs soak --requests "${REQUESTS:-1000000}" --seconds "$seconds"; }
overload() { with_pairs overload --seconds "${OVERLOAD_SECONDS:-120}"; }
sigterm() { with_pairs sigterm --times 20; }
kill_9() { with_pairs kill --times 20; }

case ${1:-} in
throughput | distilbert | peer | cold | idle | quota | soak | overload | sigterm) "$1" ;;
kill) kill_9 ;;
all) for what in throughput distilbert peer cold idle quota overload sigterm kill_9 soak; do echo "== $what"; $what; done ;;
*) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
