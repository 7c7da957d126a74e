"""`python tests/bench memory`: peak memory of one training step at 100, 400 and 1,600
documents per query.

One query of N documents, 91 tokens a pair (all alike: of drawn lengths a longer list's first
micro-batch would hold longer documents, which is another matter), the weights of all-MiniLM-L6-v2,
fp32: forward, RankNet and backward in two passes at every size, no optimizer. The other side is
sentence-transformers' RankNetLoss and ListNetLoss with mini_batch_size 32, which cuts the forward
pass but keeps every graph. Each figure is of a process of its own: on a CPU its peak resident
memory less that before the step, on a card the allocator's peak less what was allocated before.
Sizes beyond --limit GiB, by the growth seen, are not run for the other side.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import torch

from bench.clock import ROOT, add_device_flag, device_of, wait
from bench.scoring import minilm
from bench.step import batch_of, lists_of, step_of
from kernels import cpu
from kernels.encoder import CrossEncoder

SIZES = (100, 400, 1600)
QUERY, DOCUMENT = 8, 80  # tokens; 91 a pair with the special ones


def list_step(encoder, documents: int, dtype: str, two_passes=False):
    """(train.py's RankNet step over one list of `documents`, its batch).

    two_passes: for the shortest list too, of which a card's own micro-batches would hold the whole.
    """
    step = step_of(encoder, "ranknet", dtype)
    if two_passes:
        gradient = step.gradient
        gradient.keep, gradient.max_tokens = 0, min(gradient.max_tokens, 4096)
    rng, words = np.random.default_rng(0), min(20_000, encoder.model.config.vocab_size)

    def draw(tokens):
        return rng.integers(min(1000, words // 2), words, tokens).astype(np.int32)

    targets = torch.randn(1, documents, generator=torch.Generator().manual_seed(0))
    queries = [draw(QUERY)] * documents
    return step, batch_of(queries, [draw(DOCUMENT) for _ in range(documents)], targets)


def our_step(folder, documents, device):
    encoder = CrossEncoder.from_pretrained(folder, "float32", device).train()
    step, batch = list_step(encoder, documents, "float32", two_passes=True)
    return lambda: step.gradient(0, *lists_of(batch))


def peer_step(loss, folder, documents, device):
    """The forward and backward pass of one of sentence-transformers' listwise losses."""
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.cross_encoder import losses

    model = Peer(folder, device=device.type, num_labels=1)
    model.train()
    loss = getattr(losses, loss)(model, mini_batch_size=32)
    words = [w for w in model.tokenizer.get_vocab() if w.isalnum() and len(w) > 3]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, DOCUMENT)) for _ in range(documents)]
    query = " ".join(rng.choice(words, QUERY))
    labels = torch.randn(documents)
    return lambda: loss([[query], [texts]], [labels]).backward()


def peak_gib(step, device) -> float:
    """GiB that one call of `step` takes at the most beyond what this process had before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def measure(side: str, documents: int, folder: str, device) -> None:
    """What the process of one figure runs: prints the peak."""
    warnings.filterwarnings("ignore")
    cpu.prepare(training=True)
    if side == "ours":
        step = our_step(folder, documents, device)
    else:
        step = peer_step(side, folder, documents, device)
    print(peak_gib(step, device))


def measured(side: str, documents: int, folder: str, device) -> float:
    """peak_gib of a process of its own."""
    command = [sys.executable, "tests/bench", "memory", "--device", device.type,
               "--measure", side, str(documents), folder]
    settings = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}  # as of train.py
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | settings)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python tests/bench memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=16.0,
                        help="GiB that a side may take (default 16)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # the process of one figure
    add_device_flag(parser)
    args = parser.parse_args(argv)
    device = device_of(args.device)
    if args.measure:
        side, documents, folder = args.measure
        return measure(side, int(documents), folder, device)
    with tempfile.TemporaryDirectory() as folder:
        name = minilm(folder)
        print(f"peak memory of a step beyond the loaded model, GiB, {name}, {device.type}\n")
        columns = " | ".join(f"{n:,}" for n in SIZES)
        print(f"| documents per query | {columns} | last / first |")
        print("|---|---:|---:|---:|---:|")
        for side in ("ours", "RankNetLoss", "ListNetLoss"):
            figures = []
            for n in SIZES:
                beyond = side != "ours" and figures and (figures[-1] or args.limit) * 4 > args.limit
                figures.append(None if beyond else measured(side, n, folder, device))
            cells = [f"over {args.limit:.0f}" if f is None else f"{f:.2f}" for f in figures]
            ratio = "-" if None in figures else f"{figures[-1] / figures[0]:.2f}"
            name = side if side == "ours" else f"sentence-transformers {side}"
            print(f"| {name} | " + " | ".join(cells) + f" | {ratio} |", flush=True)
