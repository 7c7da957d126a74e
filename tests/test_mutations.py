"""Mutated inputs never end a script by a traceback, a signal or not at all; and how that is judged.

    MUTATIONS=2000 MUTATION_SEED=7 python -m pytest tests/test_mutations.py
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mutations

ROWS = b"q1 Q0 d1 1 2.5 t\nq1 Q0 d2 2 1.5 t\nq2 Q0 d1 1 0.5 t\n"
LINES = b'{"_id": "d1", "text": "kaba"}\n{"_id": "d2", "text": "kador"}\n'


@pytest.mark.slow
def test_mutated_inputs_end_well(tmp_path):
    number, seed = os.environ.get("MUTATIONS", "200"), os.environ.get("MUTATION_SEED", "1")
    which = ["--cases", number, "--seed", seed]
    command = [sys.executable, mutations.__file__, *which, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout or done.stderr
    assert f"{number} cases of seed {seed}" in done.stdout


@pytest.mark.parametrize(
    "way, data",
    [
        (mutations.in_bytes, ROWS),
        (mutations.in_columns, ROWS),
        (mutations.odd_run, ROWS),
        (mutations.in_json_lines, LINES),
        (mutations.in_json, LINES.splitlines()[0]),
    ],
)
def test_a_mutation_is_a_function_of_its_seed(way, data):
    every = [way(random.Random(f"7 {number}"), data) for number in range(200)]
    assert every == [way(random.Random(f"7 {number}"), data) for number in range(200)]
    assert len({mutated for _, mutated in every}) > 5 and all(what for what, _ in every)


TRACEBACK = f"""said before
Traceback (most recent call last):
  File "{mutations.ROOT}/evaluate.py", line 12, in guarded
    code = main()
  File "{mutations.ROOT}/rerank.py", line 34, in main
    int(text)
  File "/elsewhere/library.py", line 56, in check
    raise Wrong(value)
    ^^^^^^^^^^^^^^^^^^
library.Wrong: of two
  lines
"""


@pytest.mark.parametrize(
    "status, stderr, wrong",
    [
        (0, "a line of progress\n", None),
        (2, "a line of progress\nerror: x.run:1: empty\n", None),
        (2, "", "exit 2: not one line"),
        (2, "error: x.run:1: of two\nlines\n", "exit 2: not one line"),
        (2, "error: x.run:1: empty\nerror: y.run:1: empty\n", "exit 2: not one line"),
        (1, "usage\n", "exit 1: usage"),
        (1, TRACEBACK, "library.Wrong (rerank.py:34): of two"),
        (0, TRACEBACK, "library.Wrong (rerank.py:34): of two"),
        (-signal.SIGSEGV, "", "killed by SIGSEGV"),
        (None, "", "did not end in 60 s"),
        (mutations.UNFIT, "said\nunfit: printed nothing\n", "unfit: printed nothing"),
    ],
)
def test_verdict(status, stderr, wrong):
    got = mutations.verdict(status, stderr)
    assert got is None if wrong is None else got.startswith(wrong)


def test_a_command_as_it_stands_has_to_succeed():
    assert mutations.verdict(2, "error: no\n", unchanged=True) == "exit 2: error: no"


@pytest.mark.slow
def test_children_are_waited_for_and_killed(tmp_path):
    """Each way to end; a file tells that the grandchild of the one that hung is gone too."""
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(mutations.__file__).parent)!r})
import mutations
from pathlib import Path
def hang():
    if os.fork() == 0:
        time.sleep(10)
        Path("late").touch()
    time.sleep(100)
def wrong():
    raise KeyError("x")
for work in (lambda: 0, lambda: 2, wrong, os.abort, hang):
    child = mutations.fork(Path({str(tmp_path)!r}), work)
    print(mutations.wait_for({{child: time.monotonic()}}, 5)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "2", "1", str(-signal.SIGABRT), "None"]
    assert "KeyError: 'x'" in done.stderr and not (tmp_path / "late").exists()
