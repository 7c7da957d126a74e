"""`python tests/bench data`: a triples file of 40 million rows, as large as Hofstätter's, and a
JSONL of a million lists with their texts, opened and sampled.

The files are generated in a temporary folder (about 1.6 and 2.6 GB, removed at the end). The first
opening of triples writes their columns to an Arrow file of the cache (as large again), which is
memory-mapped; of lists the cache keeps where each line begins, and their scores. Batches of triples
are the ids and teacher scores of a step, without text or tokens; batches of lists are read with
their texts. What is resident counts the pages of mapped files, which the system takes back when
others need them; `of its own` does not.
"""

import argparse
import json
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


def generate_lists(path: Path, rows: int) -> None:
    """Lists of one relevant passage and eight others of 40 words, with scores; a block of 20,000 is
    drawn and repeated."""
    rng, size = np.random.default_rng(0), min(rows, 20_000)
    words = np.array(["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(5000)])
    block = []
    for _ in range(size):
        query, *texts = [" ".join(rng.choice(words, n)) for n in (6, *[40] * 9)]
        scores = rng.normal(0, 6, 9).round(4).tolist()
        block.append(json.dumps({"query": query, "pos": texts[:1], "neg": texts[1:],
                                 "pos_scores": scores[:1], "neg_scores": scores[1:]}) + "\n")
    with open(path, "w") as file:
        for start in range(0, rows, size):
            file.writelines(block[: rows - start])


OPEN = """
import resource, sys, time
from pathlib import Path
from data.list_file import ListFile
from data.lists import Batches, TextLists, Triples
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, path = time.perf_counter(), Path(sys.argv[1])
texts = ListFile(path) if path.suffix == ".jsonl" else None
source = TextLists(texts, "kl", 8) if texts else Triples(path, "marginmse")
n = len(source)
opened = time.perf_counter() - start
batches = Batches(source, None, None, size=32, seed=1, query_length=32, doc_length=256)
start, k, pairs = time.perf_counter(), 0, 0
while time.perf_counter() - start < 5:
    for _, qid, docids, _ in batches.ids(k):
        if texts:
            texts.all_queries[qid], texts.documents(docids)
        pairs += len(docids)
    k += 1
rate = pairs / (time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(n, opened, rate, peak / 2**20, int(status["RssAnon"].split()[0]) / 2**20, before / 2**20)
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python tests/bench data", description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000_000, help="triples (0: none)")
    parser.add_argument("--lists", type=int, default=1_000_000, help="lists (0: none)")
    args = parser.parse_args(argv)
    print(f"python tests/bench data --rows {args.rows} --lists {args.lists}; "
          f"{os.cpu_count()} cores\n")
    print("| | opened in | batches of 32 | peak resident | of its own at the end | imports |\n"
          "|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, rows, make in (("triples.tsv", args.rows, generate),
                                 ("lists.jsonl", args.lists, generate_lists)):
            if rows:
                measure(Path(folder) / name, rows, make)


def measure(file: Path, rows: int, make) -> None:
    """The lines of the table on a file of `make`."""
    start = time.perf_counter()
    make(file, rows)
    seconds, size = time.perf_counter() - start, file.stat().st_size / 1e9
    print(f"generated {rows:,} rows, {size:.2f} GB in {seconds:.0f} s", file=sys.stderr)
    for name in ("first time", "again"):
        done = subprocess.run([sys.executable, "-c", OPEN, str(file)], capture_output=True,
                              text=True, cwd=Path(__file__).resolve().parents[2],
                              env={**os.environ, "XDG_CACHE_HOME": str(file.parent)})
        if done.returncode:
            sys.exit(done.stderr)
        found, opened, rate, peak, own, before = map(float, done.stdout.split())
        assert found == rows
        print(f"| {file.name}, {name} | {opened:.2f} s | {rate:,.0f} pairs/s | {peak:.2f} GiB | "
              f"{own:.2f} GiB | {before:.2f} GiB |")
