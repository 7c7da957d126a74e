"""`python tests/bench [NAME] [flags]` runs one benchmark and prints a Markdown table; without NAME,
`scoring`."""

import importlib
import sys
from pathlib import Path

NAMES = {
    "scoring": "pairs scored per second against sentence-transformers",
    "training": "a training step against sentence-transformers and padded Hugging Face",
    "deberta": "DeBERTa-v3 packed against Hugging Face padded",
    "scale": "rerank.py: its start, its cost and memory as the work grows, time without text to "
             "score",
    "launches": "kernels that a training step launches, counted without a card",
    "gpu": "all of it on a card, in one command: values, tests, speed and memory",
    "losses": "fused losses: bytes, launches, memory; time on a GPU",
    "aot": "registers, spills and shared memory of every kernel on sm_80, sm_90, sm_100 (no GPU "
           "needed)",
    "roofline": "the figures of kernels/ROOFLINE.md",
    "memory": "peak memory of a training step at 100, 400 and 1,600 documents per query",
    "data": "a 40-million-row triples file: opening, memory, batches per second",
    "evaluate": "a run of 7 million lines",
}
SAME_MODULE = {"training": "scoring", "deberta": "scoring"}


def main() -> int:
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("scoring", [])
    if name not in NAMES:
        names = "\n".join(f"  {name:10} {what}" for name, what in NAMES.items())
        print(f"usage: python tests/bench NAME\n{names}")
        return 0 if name in ("-h", "--help") else 2
    one_malloc_arena()  # as train.py does, before a library starts a thread
    module = importlib.import_module(f"bench.{SAME_MODULE.get(name, name)}")
    return module.main([name, *rest] if name in SAME_MODULE or name == "scoring" else rest) or 0


ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # not this folder: its files have names of others
from data.command import one_malloc_arena  # noqa: E402  the path has to be there

sys.exit(main())
