"""What the table of kernels/README.md says can be copied out works in an empty folder, with what it
names."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LOSS = "print(losses.infonce(torch.zeros(1, 4), torch.eye(4)[:1]).item())"  # ln 4
RUN = r"open('x.run', 'w').write('q Q0 a 1 2.0 t\nq Q0 b 2 1.0 t\n'); "
HELP = ("import sys, runpy; sys.argv = ['{0}.py', '--help']; "
        "runpy.run_path('{0}.py', None, '__main__')")
RANK = ("from kernels.encoder import CrossEncoder; "
        "texts = ['a red fox runs', 'the moon is bright', 'rain falls'] * 9; "
        "CrossEncoder(*tiny.build_tiny(texts, 1)).save_pretrained('m'); "
        "model = CrossEncoder.from_pretrained('m', device='cpu'); "
        "ranking = model.rank('red fox', texts[:3], 2, sigmoid=True, progress=True); "
        "scores = model.score(['red fox'] * 3, texts[:3], sigmoid=True).tolist(); "
        "assert ranking == sorted(enumerate(scores), key=lambda row: -row[1])[:2], scores; ")
UNITS = {  # unit: (code, what it prints first)
    "kernels/losses.py": (f"import torch, losses; {LOSS}", "1.386294"),
    "kernels/flash.py": ("import flash; print(flash.flash_varlen.__name__)", "flash_varlen"),
    "kernels/fused.py": ("import fused; print(fused.add_norm.__name__)", "add_norm"),
    "kernels/exact.py": (
        "import sys; from kernels.exact import ListGradient; print('transformers' in sys.modules)",
        "False"),
    "kernels/": (
        "import torch; from kernels import encoder, exact, fused, losses, step, tiny; "
        f"{RANK}{LOSS}",
        "1.386294"),
    "data/runs.py": (f"{RUN}import runs; print(runs.read_run('x.run')['q']['b'])", "1.0"),
    "data/significance.py": (
        "import numpy as np, significance; print(significance.holm([0.01, 0.04])[0])", "0.02"),
    "evaluate.py": (
        f"{RUN}from evaluate import evaluate, read_run; "
        "print(evaluate({'q': {'b': 1}}, read_run('x.run'), ['RR@10'])['q']['RR@10'])", "0.5"),
    "rerank.py": (HELP.format("rerank"), "usage: rerank.py"),
    "teacher.py": (HELP.format("teacher"), "usage: teacher.py"),
    "train.py": (HELP.format("train"), "usage: train.py"),
}


def table() -> dict[str, list[str]]:
    """{unit: what has to lie beside it} of that table."""
    text = (ROOT / "kernels/README.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", text, re.M)
    return {unit: re.findall(r"`([^`]+)`", beside) for unit, beside in rows
            if unit.endswith((".py", "/"))}


def test_the_table_names_all_that_is_tried():
    assert table().keys() == UNITS.keys()


@pytest.mark.parametrize("unit", UNITS)
def test_a_copy_works(unit, tmp_path):
    beside = table()[unit]
    for name in [unit, *beside]:
        # a file alone stands at the top, one that names others of its room in its room
        target = tmp_path / (name if beside else Path(name).name)
        target.parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    code, begins = UNITS[unit]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(begins)
