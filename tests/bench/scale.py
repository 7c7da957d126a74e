"""`python tests/bench scale`: rerank.py as a user runs it: its start, and its cost as the work
grows.

Start: `rerank.py --query` on 100 lines of 20 words beside a process that imports torch and
transformers and loads the same model and tokenizer, in turns, --repeats times; medians. Growth:
runs of --pairs pairs, 100 documents a query, documents drawn from 20,000 (the passages of
$SHARED_DATA's TREC-DL collections, else random words of their lengths), queries the first eight
words of passages. Seconds are rerank.py's own for scoring, loading left out; `waiting` is the part
of them with nothing tokenised to score; memory is the peak of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.scoring import DATA, minilm

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import sys, torch, transformers
transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
"""


def passages(n: int) -> tuple[list[str], str]:
    """n distinct passages, real ones first, and where they are from."""
    found, source = [], "TREC-DL passages"
    for name in ("trec-dl-2019", "trec-dl-2021", "trec-dl-2022"):
        if (DATA / name / "corpus.jsonl").is_file():
            with open(DATA / name / "corpus.jsonl", encoding="utf-8") as file:
                found += [json.loads(line)["text"] for line in file]
    found = list(dict.fromkeys(found))[:n]
    if len(found) < n:
        rng, source = np.random.default_rng(
            0), f"{len(found):,} TREC-DL passages, the others random words"
        found += [" ".join(f"w{i}" for i in rng.integers(0, 5000, int(k)))
                  for k in np.clip(rng.lognormal(4.0, 0.42, n - len(found)), 20, 230)]
    return found, source


def finished(argv: list) -> tuple[float, float]:
    """(seconds, peak resident GiB) of a process that has to end well."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(error.decode())
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python tests/bench scale", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--dtype", default="auto", help="as of rerank.py (default auto)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    texts, source = passages(20_000)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        name = minilm(str(folder / "model"))
        (folder / "lines.txt").write_text("".join(" ".join(text.split()[:20]) + "\n"
                                                  for text in texts[:100]))
        both = {"import torch, transformers; load": ["-c", LOAD, folder / "model"],
                "rerank.py --query, 100 lines": ["rerank.py", "--model", folder / "model",
                                                 "--dtype", args.dtype, "--query",
                                                 "how do vaccines work", folder / "lines.txt"]}
        seconds = {side: [] for side in both}
        for repeat in range(args.repeats + 1):
            for side, command in both.items():
                took, _ = finished(command)
                seconds[side] += [took] * (repeat > 0)
        seconds = {side: statistics.median(times) for side, times in seconds.items()}
        first = next(iter(seconds.values()))
        print(f"{name}, {args.dtype}, {torch.get_num_threads()} threads, torch "
              f"{torch.__version__}; {source}\n\n"
              "| | seconds | ratio |\n|---|---:|---:|")
        for side, took in seconds.items():
            print(f"| {side} | {took:.2f} | {took / first:.2f} |")
        (folder / "corpus").mkdir()
        with open(folder / "corpus/corpus.jsonl", "w") as file:
            file.writelines(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i,
                            text in enumerate(texts))
        queries = max(args.pairs) // 100
        with open(folder / "corpus/queries.jsonl", "w") as file:
            file.writelines(json.dumps({"_id": f"q{i}", "text": " ".join(texts[i].split()[:8])})
                            + "\n" for i in range(queries))
        rng = np.random.default_rng(0)
        rows = [[f"q{i} Q0 d{d} {rank} {-rank} x\n" for rank,
                 d in enumerate(rng.choice(len(texts), 100, False), 1)] for i in range(queries)]
        print("\n| pairs | seconds | ms a pair | waiting | peak GiB |\n|---:|---:|---:|---:|---:|",
              flush=True)
        for n in sorted(args.pairs):
            (folder / "run").write_text("".join(line for row in rows[: n // 100] for line in row))
            out = folder / f"{n}.run"
            _, peak = finished(["rerank.py", "--model", folder / "model", "--dtype", args.dtype,
                                "--dataset", folder / "corpus", "--run", folder / "run", "--out",
                                out])
            done = json.loads(Path(f"{out}.json").read_text())
            print(f"| {done['pairs']:,} | {done['seconds']:.1f} | "
                  f"{1000 * done['seconds'] / done['pairs']:.2f} | "
                  f"{done['waited'] / done['seconds']:.1%} | {peak:.2f} |", flush=True)
