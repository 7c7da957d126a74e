"""`python -m kernels.bench data`: a triples file of 40 million rows, as large as Hofstätter's, opened and sampled.

The file is generated in a temporary folder (about 1.6 GB, removed at the end). Opening finds the lines once and keeps
their offsets on disk; nothing of the file stays in memory. Batches are the ids and teacher scores of a step, without
text or tokens.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def generate(path: Path, rows: int) -> None:
    """Rows of Hofstätter's form; a block of 200,000 is drawn and repeated, which changes nothing measured."""
    rng, size = np.random.default_rng(0), min(rows, 200_000)
    scores, ids = rng.normal(0, 6, (size, 2)).round(6).tolist(), rng.integers(1, 8_841_823, (size, 3)).tolist()
    block = [f"{a}\t{b}\t{q}\t{p}\t{d}\n" for (a, b), (q, p, d) in zip(scores, ids, strict=True)]
    with open(path, "w") as file:
        for start in range(0, rows, size):
            file.writelines(block[: rows - start])


OPEN = """
import resource, sys, time
from pathlib import Path
import numpy as np
import train
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
source = train.Triples(Path(sys.argv[1]), "marginmse")
n = len(source)
opened = time.perf_counter() - start
class Args: batch_size, seed, query_length, doc_length = 32, 1, 32, 256
batches = train.Batches(source, None, None, Args, 0, 1)
start, k, pairs = time.perf_counter(), 0, 0
while time.perf_counter() - start < 5:
    pairs += sum(len(docids) for _, _, docids, _ in batches.ids(k))
    k += 1
rate = pairs / (time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(n, opened, rate, peak / 2**20, before / 2**20)
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench data", description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000_000)
    args = parser.parse_args(argv)
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "triples.tsv"
        start = time.perf_counter()
        generate(file, args.rows)
        seconds = time.perf_counter() - start
        print(f"generated {args.rows:,} rows, {file.stat().st_size / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)
        print(f"python -m kernels.bench data --rows {args.rows}; {os.cpu_count()} cores\n")
        print("| | opened in | batches of 32 triples | peak resident | of which imports |\n|---|---:|---:|---:|---:|")
        for name in ("first time", "again"):
            done = subprocess.run([sys.executable, "-c", OPEN, str(file)], cwd=root, capture_output=True, text=True,
                                  env={**os.environ, "XDG_CACHE_HOME": folder})
            if done.returncode:
                sys.exit(done.stderr)
            rows, opened, rate, peak, before = map(float, done.stdout.split())
            assert rows == args.rows
            print(f"| {name} | {opened:.2f} s | {rate:,.0f} pairs/s | {peak:.2f} GiB | {before:.2f} GiB |")
