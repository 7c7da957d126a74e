"""The loss kernels compile for the cards they are meant for, without spilling; no GPU is needed.

With the Triton that is installed, and with the one in the folder that SECOND_TRITON names, if any.
What was compiled once is not compiled again (bench.aot.printed_apart).
"""

import json
import os

import pytest

pytest.importorskip("triton")

from bench.aot import SHARED_LIMIT, printed_apart
from kernels import losses

OTHER = os.environ.get("SECOND_TRITON")
# The kernel that sums over queries is the same for every loss: once for a card.
COMPILE = """
import json, sys
import triton
from bench.aot import compile_launches
from bench.losses import launches

arch, size, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rows, known = [], set()
for name, launch in launches([size], [dtype]):
    for found in compile_launches(launch, arch, without=known & {"_mean_kernel"}):
        figures = found.registers, found.spill_bytes, found.shared
        rows.append([name.split()[0], found.kernel, *figures])
        known.add(found.kernel)
print(json.dumps([triton.__version__, rows]))
"""


def case(arch, size, dtype, slow=True):
    marks = pytest.mark.slow if slow else []
    return pytest.param(arch, size, dtype, marks=marks, id=f"{arch}-{size}-{dtype}")


@pytest.mark.parametrize("second", [False, True], ids=["installed", "second"])
@pytest.mark.parametrize(
    ("arch", "size", "dtype"),
    [
        case(80, 4096, "bfloat16", slow=False),  # the fewest registers and the longest lists
        case(80, 4096, "float16"),
        case(80, 4096, "float32"),
        case(90, 1024, "float32", slow=False),  # one block, the largest
        case(90, 8, "bfloat16"),  # and the smallest
        case(100, 100, "float16", slow=False),
        case(100, 4096, "float16"),
    ],
)
def test_every_kernel_compiles_without_spills(arch, size, dtype, second):
    if second and not OTHER:
        pytest.skip("set SECOND_TRITON to a folder with another version of Triton")
    sources = ["kernels/losses.py", "tests/bench/losses.py"]
    site = OTHER if second else None
    printed = printed_apart(COMPILE, arch, size, dtype, sources=sources, site=site)
    version, rows = json.loads(printed.splitlines()[-1])
    compiled = [kernel for _, kernel, *_ in rows]
    assert {name for name, *_ in rows} == losses._KERNELS.keys()
    assert len(compiled) == len(set(compiled)) == len(losses._KERNELS) + 1
    for name, kernel, registers, spilled, shared in rows:
        what = f"{name} {kernel} sm_{arch} triton {version}"
        assert spilled == 0, f"{what}: {spilled} bytes spilled"
        assert 0 < registers < 256 and shared <= SHARED_LIMIT[arch], (what, registers, shared)
