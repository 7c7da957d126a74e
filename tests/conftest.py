"""Shared by all tests: the repository root on sys.path, Triton's interpreter where there is no GPU,
the real data, two workers, and no traces of one file's tests in the next."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

import data.cache  # noqa: E402

# read by triton when a kernel is decorated: it must be set before the first import
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import triton
    from triton.runtime import interpreter

    # its interpreter takes int() of one-element arrays: not with numpy 2.4
    if triton.__version__.startswith("3.6"):
        patch_tensor = interpreter._patch_lang_tensor

        def with_index(tensor, scope):
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = with_index


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two workers where pytest-xdist is installed and the user says nothing else.

    `-n` in addopts would fail where it is not. `-n 0` is one process, as --pdb needs it.
    worksteal: a worker takes tests from the other when it has no more. Most of a file stays
    together, so what a file's fixtures make for all of it is made once or twice, and the longest
    file does not run alone at the end, as it would by loadfile.
    """
    options = config.option
    in_worker = hasattr(config, "workerinput")
    if in_worker or options.usepdb or getattr(options, "numprocesses", 0) is not None:
        return
    options.numprocesses = 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of one thread each, on two cores
    if options.dist == "no":
        options.dist = "worksteal"


# set for the process by kernels.cpu.prepare, where a test runs the main of a script in its own
BY_MAIN = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
BY_LIBRARIES = ("PYTEST_", "TORCHINDUCTOR_", "KMP_")  # at their first use


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_changed():
    """The environment and the cache's folder are after a file's tests what they were before."""

    def now():
        variables = {k: v for k, v in os.environ.items() if not k.startswith(BY_LIBRARIES)}
        return variables | {"data.cache.CACHE": data.cache.CACHE}

    before = now()
    yield
    for name in BY_MAIN:
        if name not in before:
            os.environ.pop(name, None)
    after = now()
    changed = sorted(k for k in before.keys() | after if before.get(k) != after.get(k))
    assert not changed, f"the tests of this file leave changed: {', '.join(changed)}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real collections, $SHARED_DATA or ../shared/data; without it a test skips."""
    folder = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real test collections not found: set SHARED_DATA")
    return folder
