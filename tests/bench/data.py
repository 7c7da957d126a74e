"""`python tests/bench data`: a triples file of 40 million rows, as large as Hofstätter's, opened
and sampled.

The file is generated in a temporary folder (about 1.6 GB, removed at the end). The first opening
writes its columns to an Arrow file of the cache (as large again), which is memory-mapped; nothing
of it is held as Python objects. Batches are the ids and teacher scores of a step, without text or
tokens. What is resident counts the pages of the mapped file, which the system takes back when
others need them; `of its own` does not.
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
    """Rows of Hofstätter's form; a block of 200,000 is drawn and repeated, which changes nothing
    measured."""
    rng, size = np.random.default_rng(0), min(rows, 200_000)
    scores = rng.normal(0, 6, (size, 2)).round(6).tolist()
    ids = rng.integers(1, 8_841_823, (size, 3)).tolist()
    block = [f"{a}\t{b}\t{q}\t{p}\t{d}\n" for (a, b), (q, p, d) in zip(scores, ids, strict=True)]
    with open(path, "w") as file:
        for start in range(0, rows, size):
            file.writelines(block[: rows - start])


OPEN = """
import resource, sys, time
from pathlib import Path
from data.lists import Batches, Triples
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
source = Triples(Path(sys.argv[1]), "marginmse")
n = len(source)
opened = time.perf_counter() - start
batches = Batches(source, None, None, size=32, seed=1, query_length=32, doc_length=256)
start, k, pairs = time.perf_counter(), 0, 0
while time.perf_counter() - start < 5:
    pairs += sum(len(docids) for _, _, docids, _ in batches.ids(k))
    k += 1
rate = pairs / (time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(n, opened, rate, peak / 2**20, int(status["RssAnon"].split()[0]) / 2**20, before / 2**20)
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python tests/bench data", description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000_000)
    args = parser.parse_args(argv)
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "triples.tsv"
        start = time.perf_counter()
        generate(file, args.rows)
        seconds = time.perf_counter() - start
        size = file.stat().st_size / 1e9
        print(f"generated {args.rows:,} rows, {size:.2f} GB in {seconds:.0f} s", file=sys.stderr)
        print(f"python tests/bench data --rows {args.rows}; {os.cpu_count()} cores\n")
        print("| | opened in | batches of 32 triples | peak resident | of its own at the end "
              "| imports |\n"
              "|---|---:|---:|---:|---:|---:|")
        for name in ("first time", "again"):
            done = subprocess.run([sys.executable, "-c", OPEN, str(file)], cwd=root,
                                  capture_output=True, text=True,
                                  env={**os.environ, "XDG_CACHE_HOME": folder})
            if done.returncode:
                sys.exit(done.stderr)
            rows, opened, rate, peak, own, before = map(float, done.stdout.split())
            assert rows == args.rows
            print(f"| {name} | {opened:.2f} s | {rate:,.0f} pairs/s | {peak:.2f} GiB | "
                  f"{own:.2f} GiB | {before:.2f} GiB |")
