"""Time and memory of evaluate.py on a run of MS MARCO's size, against the C program trec_eval and
plain pytrec_eval.

    python tests/bench evaluate [--queries 6980 --documents 1000 --repeat 3]

trec_eval is taken from $TREC_EVAL or the PATH and left out where there is none. Each side is a
process of its own, from the files to the means; the sides alternate, the table has medians.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PLAIN = """
import sys, pytrec_eval
qrels = pytrec_eval.parse_qrel(open(sys.argv[1]))
run = pytrec_eval.parse_run(open(sys.argv[2]))
values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map"}).evaluate(run)
top = {q: dict(sorted(d.items(), key=lambda x: x[::-1], reverse=True)[:10]) for q, d in run.items()}
first = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
sums = [sum(v[m] for v in values.values()) for m in ("ndcg_cut_10", "map")]
print(*[x / len(qrels) for x in (sums[0], sum(v["recip_rank"] for v in first.values()), sums[1])])
"""


def write_files(folder, queries, documents, seed=0):
    """(qrels, run): one or two relevant documents per query, where found at a log-uniform rank; ids
    as MS MARCO's."""
    rng = np.random.default_rng(seed)
    qrels, run = folder / "qrels.txt", folder / "model.run"
    with open(qrels, "w") as q_file, open(run, "w") as run_file:
        for query in range(1_000_000, 1_000_000 + queries):
            drawn = np.unique(rng.integers(0, 8_841_823, documents + 50))[: documents + 2]
            ids = rng.permutation(drawn).astype(str)
            judged = 2 if query % 15 == 0 else 1
            ranked, relevant = ids[:documents], ids[documents : documents + judged]
            for docid in relevant:
                q_file.write(f"{query} 0 {docid} 1\n")
                if rng.random() < 0.9:
                    ranked[int(documents ** rng.random()) - 1] = docid
            scores = np.sort(rng.normal(0, 5, documents))[::-1]
            rows = enumerate(zip(ranked, scores, strict=True), 1)
            run_file.writelines(f"{query} Q0 {d} {i} {s:.6f} model\n" for i, (d, s) in rows)
    return qrels, run


def measured(command):
    """(wall seconds, CPU seconds, peak resident MiB, standard output) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"error: {command[0]} failed with status {status}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output


def values_of(side, output):
    """nDCG@10, RR@10 and AP from what a side printed."""
    lines = output.split("\n")
    if side == "evaluate.py":
        return " ".join(f"{float(line.split(',')[3]):.4f}" for line in lines[1:4])
    if side == "plain pytrec_eval":
        return " ".join(f"{float(x):.4f}" for x in lines[0].split())
    found = dict(line.split("all") for line in lines if "all" in line)
    found = {key.strip(): value.strip() for key, value in found.items()}
    return f"{found['ndcg_cut_10']} ({found['recip_rank']} uncut) {found['map']}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python tests/bench evaluate",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=6980)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    script = Path(__file__).resolve().parents[2] / "evaluate.py"
    trec_eval = os.environ.get("TREC_EVAL") or shutil.which("trec_eval")
    with tempfile.TemporaryDirectory() as folder:
        qrels, run = map(str, write_files(Path(folder), args.queries, args.documents))
        sides = {"evaluate.py": [sys.executable, str(script), "--qrels", qrels, run,
                                 "--format", "csv"]}
        if trec_eval:
            # recip_rank without the cut at 10, which would need a second pass over the files: in
            # its favour
            sides["trec_eval (C)"] = [trec_eval, "-c", "-m", "ndcg_cut.10", "-m", "recip_rank",
                                      "-m", "map", qrels, run]
        sides["plain pytrec_eval"] = [sys.executable, "-c", PLAIN, qrels, run]
        results = {name: [] for name in sides}
        for _ in range(args.repeat):
            for name, command in sides.items():
                results[name].append(measured(command))
        size = Path(run).stat().st_size / 2**20
    ours = statistics.median(r[0] for r in results["evaluate.py"])
    print(f"{args.queries:,} queries x {args.documents:,} documents, {size:,.0f} MiB; "
          f"nDCG@10, RR@10, AP; medians of {args.repeat}\n")
    print("| | seconds | CPU seconds | peak MiB | evaluate.py's seconds / its | nDCG@10 RR@10 AP |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for name, runs in results.items():
        wall, cpu, peak = (statistics.median(r[i] for r in runs) for i in range(3))
        values = values_of(name, runs[0][3])
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak:,.0f} | {ours / wall:.2f} | {values} |")
    if not trec_eval:
        print("\nThe C program trec_eval was not found; set TREC_EVAL=/path/to/trec_eval to "
              "compare with it.")
