"""kernels.flash compiles for sm_80, sm_90 and sm_100, spills next to nothing, fits in shared memory
and has two variants for a kind of layer; no GPU is needed.

What was compiled once is not compiled again (bench.aot.printed_apart). SECOND_TRITON, a folder with
another Triton, runs the same under that one. `python tests/bench aot` prints every variant; these
are the heaviest.
"""

import os

import pytest

from bench.aot import SHARED_LIMIT, printed_apart

SLOW = pytest.mark.slow
OTHER = os.environ.get("SECOND_TRITON")
FLASH = ["kernels/flash.py"]
KERNELS = ["_forward_kernel", "_backward_q_kernel", "_backward_kv_kernel"]
SCRIPT = """
import sys, torch, triton
from bench import aot
arch, dtype, name = int(sys.argv[1]), *sys.argv[2].split(" ", 1)
flags = aot.flash_variants()[name]
print("triton from", triton.__file__)
for c in aot.compile_launches(lambda: aot.launch_flash(getattr(torch, dtype), **flags), arch):
    print("compiled", c.kernel, c.arch, c.registers, c.spill_bytes, c.shared, sep="|")
"""
VARIANTS = """
import collections, math
import numpy as np, torch, triton
from kernels import flash
from bench.aot import _Card

heads, d, docs = 12, 64, 32
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

def step(kind, number, lengths):
    tokens, longest = int(lengths.sum()), int(lengths.max())
    cu = some(tokens + docs + 1, dtype=torch.int32)[tokens:]  # sent to the card in one piece
    seed = some(2, dtype=torch.int64)[number % 2 :][:1]
    whole, k, v = some(tokens, 3, heads, d).unbind(1)
    for q, max_q in ((whole, longest), (some(docs, heads, d), 1)):
        c2p = p2c = lut = None
        if kind == "bias":
            slots = 2 * bucket(longest - 1) + 1
            c2p, p2c = (some(heads, len(x), slots).transpose(0, 1) for x in (q, k))
            lut = some(2 * longest, dtype=torch.int32)[number % 2 :][: 2 * longest - 1]
        dropout = 0.1 if kind in ("dropout", "bias") else 0.0
        where = (cu, cu, max_q, longest, d**-0.5, 64 if kind == "window" else -1, c2p, p2c, lut,
                 dropout, seed if dropout else None, number % 24)
        out, lse = flash.launch_forward(q, k, v, *where)
        flash.launch_backward(torch.empty_like(out), q, k, v, out, lse, *where, False)

triton.runtime.driver.set_active(_Card(90))
triton.runtime.jit.JITFunction.run = bind
rng = np.random.default_rng(0)
for kind in ("plain", "dropout", "window", "bias"):
    for number in range(1000):
        step(kind, number, np.clip(rng.lognormal(4.3, 0.42, docs), 20, 291).astype(int))
    for name, seen in keys.items():
        print(kind, name, len(seen))
    keys.clear()
"""


def compiled(arch, name, folder=None):
    """[(kernel, arch, registers, spilled bytes, shared bytes)] of three launches."""
    text = printed_apart(SCRIPT, arch, name, sources=FLASH, site=folder)
    assert folder is None or f"triton from {folder}" in text
    rows = [line.split("|")[1:] for line in text.splitlines() if line.startswith("compiled")]
    return [(kernel, *map(int, figures)) for kernel, *figures in rows]


without_other = pytest.mark.skipif(not OTHER, reason="set SECOND_TRITON to a folder")


@pytest.mark.parametrize(
    "folder", [pytest.param(None, id="installed"), pytest.param(OTHER, marks=without_other)]
)
@pytest.mark.parametrize(
    "name", ["bfloat16 d=64 bias dropout", pytest.param("float16 d=32 dropout", marks=SLOW)]
)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_and_fit(arch, name, folder):
    rows = compiled(arch, name, folder)
    assert [row[0] for row in rows] == KERNELS
    allowed = 16 if arch == 100 else 0  # Triton 3.6 spills 8 there
    for kernel, target, registers, spilled, shared in rows:
        assert target == arch
        figures = f"{kernel}: {registers} registers, {spilled} bytes spilled"
        assert 16 <= registers <= 255 and spilled <= allowed, figures
        assert 0 < shared <= SHARED_LIMIT[arch], f"{kernel}: {shared} bytes of shared memory"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_fp32_of_large_heads_spills_little(arch):
    """With 64 query rows to a program the forward kernel spills 1 to 2 kB a thread here."""
    for kernel, _, _, spilled, _ in compiled(arch, "float32 d=96"):
        assert spilled <= 128, f"{kernel}: {spilled} bytes spilled"


def test_two_variants_of_each_kernel_in_a_thousand_steps():
    """One for whole rows and one for the last layer's [CLS] rows, whatever a step's lengths."""
    lines = printed_apart(VARIANTS, sources=FLASH).splitlines()
    kinds = ("plain", "dropout", "window", "bias")
    assert lines == [f"{kind} {name} 2" for kind in kinds for name in KERNELS]


# --------------------------------------------------------------------------------- kernels.roofline


def hugging_face(name):
    import transformers

    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=96,
                 vocab_size=50, num_labels=1)  # fmt: skip
    eager = dict(attn_implementation="eager")
    if name == "bert":
        config = transformers.BertConfig(**sizes)
    elif name == "modernbert":
        config = transformers.ModernBertConfig(
            **sizes, pad_token_id=0, local_attention=128, global_attn_every_n_layers=3,
            classifier_pooling="cls",
        )  # fmt: skip
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

    from kernels.roofline import config_of, flops_per_step

    config, model = hugging_face(name)
    ids = torch.ones(3, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    sizes = config_of(config)
    counted = flops_per_step(sizes, [40] * 3, train=False, cls_only=False)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-2)
    assert flops_per_step(sizes, [40] * 3, cls_only=False) == 3 * counted


def test_operations_of_the_last_layer_and_the_window():
    from kernels.roofline import flops_per_step

    h, i, n = 8, 16, 10
    sizes = dict(hidden=h, layers=1, intermediate=i, heads=2, vocab=9)
    every_row = n * (8 * h * h + 4 * h * i + 4 * h * n) + 2 * h * h
    on_cls = n * 4 * h * h + 4 * h * h + 4 * h * i + 4 * h * n + 2 * h * h
    assert flops_per_step(sizes, [n], train=False, cls_only=False) == every_row
    assert flops_per_step(sizes, [n], train=False) == on_cls
    assert flops_per_step(sizes | dict(mean_pooled=True), [n], train=False) == every_row
    two_layers = sizes | dict(layers=2, window=2, global_every=2)
    local = flops_per_step(two_layers, [n], train=False, cls_only=False)
    within = sum(abs(r - c) <= 2 for r in range(n) for c in range(n))
    assert local == 2 * (every_row - 2 * h * h) + 2 * h * h - 4 * h * (n * n - within)
