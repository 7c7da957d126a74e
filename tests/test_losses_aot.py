"""The loss kernels compile for the cards they are meant for, without spilling; no GPU is needed.

With the Triton that is installed, and with the one in the folder that SECOND_TRITON names, if any.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A process of its own: the test process may hold Triton's interpreter in the compiler's place.
COMPILE = """
import json, sys
import triton
from kernels.bench.aot import SHARED_LIMIT, compile_launches
from kernels.bench.losses import launches

arch, sizes, dtypes = json.loads(sys.argv[1])
rows = []
for name, launch in launches(sizes, dtypes):
    for found in compile_launches(launch, arch):
        rows.append([name, found.kernel, found.registers, found.spill_bytes, found.shared, SHARED_LIMIT[arch]])
print(json.dumps([triton.__version__, rows]))
"""


def compiled(arch, sizes, dtypes, cache, site=None):
    """-> Triton's version, {(variant, kernel): (registers, spilled bytes, shared bytes, limit of shared bytes)}."""
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, [site])),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, json.dumps([arch, sizes, dtypes])]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    version, rows = json.loads(run.stdout.splitlines()[-1])
    return version, {(name, kernel): figures for name, kernel, *figures in rows}


@pytest.mark.parametrize("second", [False, True], ids=["installed", "second"])
@pytest.mark.parametrize(
    ("arch", "sizes", "dtypes"),
    [
        (80, [100, 1024, 4096], ["float32"]),
        (80, [4096], ["bfloat16", "float16"]),  # the fewest registers and the longest lists
        (90, [8, 1024], ["float32", "bfloat16"]),  # one block, the smallest and the largest
        (100, [100, 4096], ["float16"]),
    ],
)
def test_every_kernel_compiles_without_spills(arch, sizes, dtypes, second, tmp_path):
    pytest.importorskip("triton")
    site = os.environ.get("SECOND_TRITON") if second else None
    if second and not site:
        pytest.skip("set SECOND_TRITON to a folder with another version of Triton")
    version, found = compiled(arch, sizes, dtypes, tmp_path, site)
    losses = {variant.split()[0] for variant, kernel in found if kernel != "_mean_kernel"}
    assert losses == {
        "bce",
        "hinge",
        "marginmse_first",
        "marginmse_all",
        "infonce",
        "ranknet",
        "adrmse",
        "kl",
    }
    assert len(found) == 2 * len(losses) * len(sizes) * len(dtypes)
    for (variant, kernel), (registers, spilled, shared, limit) in found.items():
        assert spilled == 0, f"{variant} {kernel} sm_{arch} triton {version}: {spilled} bytes spilled"
        assert 0 < registers < 256 and shared <= limit, (variant, kernel, registers, shared)
