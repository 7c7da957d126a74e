"""What the README says can be copied out works in an empty folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("what, code", [
    ("kernels/losses.py", "import torch, losses; print(losses.infonce(torch.zeros(1, 4), torch.eye(4)[:1]).item())"),
    ("kernels", "import torch; from kernels import encoder, flash, fused, losses, pydocs, tiny; "
     "print(losses.infonce(torch.zeros(1, 4), torch.eye(4)[:1]).item())"),
    ("evaluate.py", "import evaluate; print(evaluate.evaluate({'q': {'a': 1}}, {'q': {'b': 2.0, 'a': 1.0}}, "
     "['RR@10'])['q']['RR@10'])"),
])
def test_a_copy_works_alone(tmp_path, what, code):
    source = ROOT / what
    if source.is_dir():
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = 0.5 if what == "evaluate.py" else 1.3862943611  # ln 4
    assert abs(float(done.stdout) - expected) < 1e-6
