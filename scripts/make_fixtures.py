"""Writes the project's golden fixtures: python scripts/make_fixtures.py [PART ..]   (parts: see PARTS; default all)

Pins (requirements.txt): Python 3.11, torch 2.15.0, transformers 4.57.6, bitsandbytes 0.50.2, CPU, one thread.
The parts are independent but for `bnb`, which quantises fixtures/tiny_student.
"""

import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers

import family_models
import gradient_fixtures
import number_fixtures
import parquet_fixtures
import task_fixtures
import tiny_models

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SEED = 42


PARTS = {
    "gradients": lambda: gradient_fixtures.write(FIXTURES / "gradients", SEED),
    "tiny_student": lambda: tiny_models.tiny_student(FIXTURES),
    "tiny_bert": lambda: tiny_models.tiny_bert(FIXTURES),
    "families": lambda: family_models.write(FIXTURES / "families"),
    "bnb": lambda: tiny_models.bnb(FIXTURES),
    "losses": lambda: number_fixtures.losses(FIXTURES, SEED),
    "metrics": lambda: number_fixtures.metrics(FIXTURES, SEED + 1),
    "parquet": lambda: parquet_fixtures.write(FIXTURES / "parquet"),
    "tasks": lambda: task_fixtures.write(FIXTURES / "tasks", SEED + 2),
}


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Some non-default generation parameters")  # max_length in config.json
    logging.disable(logging.WARNING)  # bitsandbytes repeats "inputs will be cast" at every matrix product
    for part in sys.argv[1:] or PARTS:
        print(part)
        PARTS[part]()
    for path in sorted(FIXTURES.rglob("*")):
        if path.is_file() and path.stat().st_size >= 300_000:
            sys.exit(f"{path} has {path.stat().st_size} bytes, expected fewer than 300,000")


if __name__ == "__main__":
    main()
