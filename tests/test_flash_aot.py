"""kernels.flash compiles for sm_80, sm_90 and sm_100, spills next to nothing, fits in shared memory
and has two variants for a kind of layer; no GPU is needed.

Compiled in a process of its own, because this one may hold Triton's interpreter. SECOND_TRITON, a folder with
another Triton, runs the same under that one. `python -m kernels.bench aot` prints every variant; these are
the heaviest.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHER = os.environ.get("SECOND_TRITON")
SCRIPT = """
import sys, torch, triton
from kernels.bench import aot
arch, variants = int(sys.argv[1]), aot.flash_variants()
print("triton from", triton.__file__)
for name in sys.argv[2:]:
    dtype, name = name.split(" ", 1)
    for c in aot.compile_launches(lambda: aot.launch_flash(getattr(torch, dtype), **variants[name]), arch):
        print("compiled", c.kernel, c.arch, c.registers, c.spill_bytes, c.shared, sep="|")
"""


VARIANTS = """
import collections, math, sys
import numpy as np, torch, triton
from kernels import flash
from kernels.bench.aot import _Card

kind, heads, d, docs = sys.argv[1], 12, 64, 32
keys, binders = collections.defaultdict(set), {}

def bind(self, *args, grid, warmup, **kwargs):
    name = self.__name__
    if name not in binders:
        binders[name] = self.create_binder()[-1]
    _, specialization, options = binders[name](*args, debug=False, **kwargs)
    keys[name].add(f"{specialization} {options}")

def bucket(distance):  # of DeBERTa-v3: linear up to 128
    if distance <= 128:
        return distance
    return 128 + math.ceil(math.log(distance / 128) / math.log(511 / 128) * 127)

def some(rows, *shape, dtype=torch.bfloat16):  # on meta: an address, nothing behind it
    return torch.empty(rows, *shape, dtype=dtype, device="meta")

triton.runtime.driver.set_active(_Card(90))
triton.runtime.jit.JITFunction.run = bind
rng = np.random.default_rng(0)
for step in range(1000):
    lengths = np.clip(rng.lognormal(4.3, 0.42, docs), 20, 291).astype(int)
    tokens, longest = int(lengths.sum()), int(lengths.max())
    cu = some(tokens + docs + 1, dtype=torch.int32)[tokens:]  # sent to the card in one piece
    seed = some(2, dtype=torch.int64)[step % 2 :][:1]
    whole, k, v = some(tokens, 3, heads, d).unbind(1)
    for q, max_q in ((whole, longest), (some(docs, heads, d), 1)):
        c2p = p2c = lut = None
        if kind == "bias":
            slots = 2 * bucket(longest - 1) + 1
            c2p, p2c = (some(heads, len(x), slots).transpose(0, 1) for x in (q, k))
            lut = some(2 * longest, dtype=torch.int32)[step % 2 :][: 2 * longest - 1]
        dropout = 0.1 if kind in ("dropout", "bias") else 0.0
        where = (cu, cu, max_q, longest, d**-0.5, 64 if kind == "window" else -1, c2p, p2c, lut,
                 dropout, seed if dropout else None, int(rng.integers(24)))
        out, lse = flash.launch_forward(q, k, v, *where)
        flash.launch_backward(torch.empty_like(out), q, k, v, out, lse, *where, False)
for name, seen in keys.items():
    print("variants", name, len(seen))
"""


def printed(script, arguments, folder, cache):
    """What a script prints where Triton's interpreter is not asked for."""
    path = os.pathsep.join(filter(None, [folder, str(ROOT)]))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], cwd=ROOT,
                         env=environment, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def compiled(arch, names, folder, cache):
    """[(kernel, arch, registers, spilled bytes, shared bytes)] of three launches per name."""
    text = printed(SCRIPT, [str(arch), *names], folder, cache)
    assert folder is None or f"triton from {folder}" in text
    rows = [line.split("|")[1:] for line in text.splitlines() if line.startswith("compiled")]
    return [(kernel, *map(int, figures)) for kernel, *figures in rows]


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(None, id="installed"),
        pytest.param(OTHER, id="other", marks=pytest.mark.skipif(not OTHER, reason="set SECOND_TRITON to a folder")),
    ],
)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_and_fit(arch, folder, tmp_path):
    from kernels.bench.aot import SHARED_LIMIT

    names = ["bfloat16 d=64 bias dropout", "float16 d=32 dropout"]
    rows = compiled(arch, names, folder, tmp_path)
    assert [row[0] for row in rows] == ["_forward_kernel", "_backward_q_kernel", "_backward_kv_kernel"] * len(names)
    allowed = 16 if arch == 100 else 0  # Triton 3.6 spills 8 there
    for kernel, target, registers, spilled, shared in rows:
        assert target == arch
        figures = f"{kernel}: {registers} registers, {spilled} bytes spilled"
        assert 16 <= registers <= 255 and spilled <= allowed, figures
        assert 0 < shared <= SHARED_LIMIT[arch], f"{kernel}: {shared} bytes of shared memory"


@pytest.mark.parametrize("arch", [90, 100])
def test_fp32_of_large_heads_spills_little(arch, tmp_path):
    """With 64 query rows to a program the forward kernel spills 1 to 2 kB a thread here."""
    for kernel, _, _, spilled, _ in compiled(arch, ["float32 d=96"], None, tmp_path):
        assert spilled <= 128, f"{kernel}: {spilled} bytes spilled"


@pytest.mark.parametrize("kind", ["plain", "dropout", "window", "bias"])
def test_two_variants_of_each_kernel_in_a_thousand_steps(kind, tmp_path):
    """One for whole rows and one for the last layer's [CLS] rows, whatever a step's lengths."""
    lines = printed(VARIANTS, [kind], None, tmp_path).splitlines()
    kernels = ["_forward_kernel", "_backward_q_kernel", "_backward_kv_kernel"]
    assert lines == [f"variants {name} 2" for name in kernels]


# ---------------------------------------------------------------------------------------- kernels.bench.roofline


def hugging_face(name):
    import transformers

    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=96, vocab_size=50,
                 num_labels=1)  # fmt: skip
    eager = dict(attn_implementation="eager")
    if name == "bert":
        config = transformers.BertConfig(**sizes)
    elif name == "modernbert":
        config = transformers.ModernBertConfig(
            **sizes, pad_token_id=0, local_attention=128, global_attn_every_n_layers=3, classifier_pooling="cls"
        )
    else:
        eager = {}
        config = transformers.DebertaV2Config(
            **sizes, relative_attention=True, position_buckets=16, max_relative_positions=-1,
            pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
        )  # fmt: skip
    return config, transformers.AutoModelForSequenceClassification.from_config(config, **eager)


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta"])
def test_operations_against_torchs_counter(name):
    """Every product of Hugging Face's own forward, counted by torch, all rows of all layers."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kernels.bench.roofline import config_of, flops_per_step

    config, model = hugging_face(name)
    ids = torch.ones(3, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    sizes = config_of(config)
    counted = flops_per_step(sizes, [40] * 3, train=False, cls_only=False)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-2)
    assert flops_per_step(sizes, [40] * 3, cls_only=False) == 3 * counted


def test_operations_of_the_last_layer_and_the_window():
    from kernels.bench.roofline import flops_per_step

    h, i, n = 8, 16, 10
    sizes = dict(hidden=h, layers=1, intermediate=i, heads=2, vocab=9)
    every_row = n * (8 * h * h + 4 * h * i + 4 * h * n) + 2 * h * h
    on_cls = n * 4 * h * h + 4 * h * h + 4 * h * i + 4 * h * n + 2 * h * h
    assert flops_per_step(sizes, [n], train=False, cls_only=False) == every_row
    assert flops_per_step(sizes, [n], train=False) == on_cls
    assert flops_per_step(sizes | dict(mean_pooled=True), [n], train=False) == every_row
    local = flops_per_step(sizes | dict(layers=2, window=2, global_every=2), [n], train=False, cls_only=False)
    within = sum(abs(r - c) <= 2 for r in range(n) for c in range(n))
    assert local == 2 * (every_row - 2 * h * h) + 2 * h * h - 4 * h * (n * n - within)
