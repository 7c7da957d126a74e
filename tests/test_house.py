"""The house: who imports whom, what importing changes, and the style that no linter checks."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "teacher", "rerank", "evaluate")
ROOMS = ("data", "kernels")
# who may import whom: a script or room, and what of this repository it may name
MAY = {
    "kernels": {"kernels"},
    "data": {"data"},
    "rerank": {"data", "kernels"},
    "evaluate": {"data"},
    "teacher": {"rerank", "data", "kernels"},
    "train": {"rerank", "evaluate", "data", "kernels"},
}


def modules() -> dict[str, Path]:
    """{dotted name: file} of the scripts and rooms."""
    files = [ROOT / f"{name}.py" for name in SCRIPTS]
    files += [file for room in ROOMS for file in sorted((ROOT / room).glob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file
            for name, file in zip(names, files, strict=True)}


def imports_of(file: Path, known: set[str]) -> set[str]:
    """Names of this repository's modules that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(file, set(known)) - {name} for name, file in known.items()}


def test_nobody_imports_upwards(arrows):
    assert {"data.runs", "kernels.exact", "train", "evaluate"} <= set(arrows)
    for name, imported in arrows.items():
        room = name.partition(".")[0]
        for other in imported:
            assert other.partition(".")[0] in MAY[room], f"{name} imports {other}"


def test_no_circle(arrows):
    """A module is done when all that it imports are; with a circle some never would be."""
    left = {name: imported - set(ROOMS) for name, imported in arrows.items()}
    while ready := [name for name, imported in left.items() if not imported & set(left)]:
        for name in ready:
            del left[name]
    assert not left


IMPORTED = """
import contextlib, ctypes, importlib, json, os, signal, sys, threading
import torch

for module, names in json.loads(sys.argv[1]).items():  # what libraries do is not asked
    with contextlib.suppress(ImportError):  # one that is optional
        for name in names:
            getattr(importlib.import_module(module), name, None)

def state():
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    return {"environment": dict(os.environ), "threads": threading.active_count(),
            "signals": [str(signal.getsignal(kind)) for kind in kinds], "folder": os.getcwd(),
            "files": sorted(os.listdir(".")), "torch": torch.get_num_threads()}

def changed_by(name):
    seen, library = [], ctypes.CDLL
    class Watched(library):
        def __getattr__(self, function):
            if function == "mallopt":
                seen.append(function)
            return super().__getattr__(function)
    ctypes.CDLL, os.register_at_fork = Watched, lambda **how: seen.append("a hook on forks")
    before = state()
    __import__(name)
    after = state()
    return seen + [kind for kind in before if before[kind] != after[kind]]

for name in sys.argv[2:]:  # each in a process that has imported none of the others
    if not os.fork():
        print(json.dumps([name, changed_by(name)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


def libraries() -> dict[str, list[str]]:
    """{module of a library: names that the scripts and rooms import from it}."""
    found: dict[str, list[str]] = {}
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found.setdefault(alias.name, [""])
            elif isinstance(node, ast.ImportFrom):
                found.setdefault(node.module, []).extend(alias.name for alias in node.names)
    ours = (*SCRIPTS, *ROOMS, "__future__")
    return {name: names for name, names in found.items() if name.partition(".")[0] not in ours}


def test_importing_changes_nothing(tmp_path):
    """Not the environment, malloc's options, signals, fork hooks, nor threads; and nothing is
    written."""
    environment, names = {**os.environ, "PYTHONPATH": str(ROOT)}, sorted(modules())
    command = [sys.executable, "-W", "ignore", "-c", IMPORTED, json.dumps(libraries()), *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found == {name: [] for name in names}


def python_files() -> list[Path]:
    return [*modules().values(), *sorted((ROOT / "tests").rglob("*.py"))]


def test_no_conditional_expression_within_another():
    for file in python_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.IfExp):
                inner = [x for child in ast.iter_child_nodes(node) for x in ast.walk(child)]
                nested = any(isinstance(x, ast.IfExp) for x in inner)
                assert not nested, f"{file}:{node.lineno}"


def test_exceptions_from_the_linter_are_few_and_say_why():
    """`# noqa: CODE` has its reason behind it; in the scripts and rooms fewer than ten in all."""
    found = []
    for file in modules().values():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if "# noqa" in line:
                reason = re.search(r"# noqa: [A-Z0-9]+ +\S", line)
                assert reason, f"{file.name}:{number}: an exception without its reason"
                found.append(f"{file.name}:{number}")
    assert len(found) < 10, found
