"""Registers, spilled bytes and shared memory of every kernel, compiled ahead of time without a GPU.

    python tests/bench aot [--only flash|fused|losses] [--arch 80 90 100] [--dtype bfloat16 float32]

The launchers themselves run, on CPU tensors of real shapes, under a driver that names the card;
Triton compiles what they launch to a cubin and the launch is withheld. So signature, alignment,
constants, warps and stages are those of a real call. Registers and spills are ptxas' own words,
shared memory is Triton's request.
"""

import argparse
import contextlib
import functools
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench.clock import ROOT
from data.cache import cached

# Bytes a block may ask for: CUDA C++ programming guide, specifications per compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SEQLEN = 512  # longest sequence of the compiled flash kernels: long enough for the large tiles


@dataclass
class Compiled:
    kernel: str
    arch: int
    registers: int
    spill_bytes: int  # stores + loads, per thread
    shared: int  # bytes per block
    warps: int


class _Card:
    """What Triton's launcher asks the driver.

    The device number is new at each call, so nothing comes from the memory of an earlier
    compilation, perhaps for another card.
    """

    calls = itertools.count()

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return next(self.calls)

    def get_current_stream(self, device):
        return 0


def compile_launches(launch, arch, without=()):
    """[Compiled] of every Triton launch of `launch()`, compiled for sm_<arch> and withheld.

    without: names of kernels that are withheld only.
    """
    run, found = triton.runtime.jit.JITFunction.run, []
    driver, knobs = triton.runtime.driver, triton.knobs

    def compile_only(self, *args, grid, warmup, **kwargs):
        if self.__name__ in without:
            return None
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        registers = re.search(r"Used (\d+) registers", log.getvalue())
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
        if not registers or not spills:
            raise RuntimeError(f"ptxas said nothing of registers and spills: {log.getvalue()!r}")
        spilled = int(spills[1]) + int(spills[2])
        made = kernel.metadata
        found.append(Compiled(self.__name__, made.target.arch, int(registers[1]), spilled,
                              made.shared, made.num_warps))
        return kernel

    before = driver._active
    always, dump = knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log
    try:
        driver.set_active(_Card(arch))
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        triton.runtime.jit.JITFunction.run = compile_only
        launch()
    finally:
        triton.runtime.jit.JITFunction.run = run
        knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = always, dump
        driver._active = before
    return found


def printed_apart(script, *arguments, sources, site=None):
    """What a script prints in a process of its own: this one may hold Triton's interpreter.

    It is kept in the cache, as compilers need long, until the script, its arguments, one of
    `sources` (files under the repository's root that decide what it prints) or Triton changes.
    site: a folder with another Triton, of which nothing is kept. AssertionError where it fails.
    """
    arguments = [str(argument) for argument in arguments]
    if site:
        return _printed(script, arguments, site)
    texts = [(ROOT / source).read_text() for source in ("tests/bench/aot.py", *sources)]
    versions = [triton.__version__, torch.__version__]

    def make(folder):
        (folder / "printed").write_text(_printed(script, arguments))

    made_of = "\0".join([script, *arguments, *versions, *texts])
    return (cached("aot", made_of, make) / "printed").read_text()


def _printed(script, arguments, site=None):
    folders = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as binaries:
        environment = os.environ | {"TRITON_CACHE_DIR": binaries}
        environment["PYTHONPATH"] = os.pathsep.join([site, *folders] if site else folders)
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def flash_variants():
    """{name: flags}: what the supported encoders ask for, and the rest of the surface once."""
    variants = {f"d={d}": dict(d=d) for d in (32, 64, 96, 128)}
    variants |= {f"d={d} dropout": dict(d=d, dropout=0.1) for d in (32, 64, 96, 128)}
    variants["d=64 window"] = dict(d=64, window=64)
    variants["d=64 window dropout"] = dict(d=64, window=64, dropout=0.1)
    variants["d=64 bias"] = dict(d=64, bias=True)
    variants["d=64 bias dropout"] = dict(d=64, bias=True, dropout=0.1)
    biased = variants["d=64 bias dropout"]
    variants["d=64 bias dropout deterministic"] = biased | dict(deterministic=True)
    variants["d=64 [CLS]"] = dict(d=64, cls=True)
    variants["d=64 bias dropout [CLS]"] = biased | dict(cls=True)
    return variants


def launch_flash(dtype, d, window=-1, dropout=0.0, bias=False, deterministic=False, cls=False):
    """One forward and one backward launch of kernels.flash as an encoder of 12 heads makes them."""
    from kernels import flash

    heads, sequences, slots = 12, 4, 512
    tokens = sequences * 32
    cu = torch.arange(sequences + 1, dtype=torch.int32)
    q, k, v = torch.zeros(tokens, 3, heads, d, dtype=dtype).unbind(1)
    cu_k, cu_q, max_q = cu * 32, cu * 32, SEQLEN
    if cls:
        q, cu_q, max_q = torch.zeros(sequences, heads, d, dtype=dtype), cu, 1
    c2p = p2c = lut = None
    if bias:
        c2p = torch.zeros(q.shape[0], heads, slots, dtype=dtype)
        p2c = torch.zeros(tokens, heads, slots, dtype=dtype)
        lut = torch.zeros(2 * SEQLEN - 1, dtype=torch.int32)
    seed = torch.ones(1, dtype=torch.int64) if dropout else None
    where = cu_q, cu_k, max_q, SEQLEN, d**-0.5, window, c2p, p2c, lut, dropout, seed, 1
    out, lse = flash.launch_forward(q, k, v, *where)
    flash.launch_backward(torch.zeros_like(out), q, k, v, out, lse, *where, deterministic)


def flash_launches(dtypes):
    """[(name, launch)] of every variant in every dtype, by torch's name for it."""
    return [
        (f"{dtype} {name}", functools.partial(launch_flash, getattr(torch, dtype), **flags))
        for dtype, (name, flags) in itertools.product(dtypes, flash_variants().items())
    ]


def loss_launches(dtypes):
    from bench import losses

    return losses.launches(dtypes=dtypes)


def launch_fused(dtype, hidden, pre_norm):
    """add_norm, rotary and geglu both ways, as a layer of `hidden` units has them in autocast."""
    from kernels import fused

    def zeros(*shape, kind=dtype):
        return torch.zeros(*shape, dtype=kind, requires_grad=True)

    residual = zeros(9, hidden, kind=torch.float32)
    weight, bias, branch_bias = (zeros(hidden, kind=torch.float32) for _ in range(3))
    how = dict(dropout=0.1, seed=torch.ones(1, dtype=torch.int64), site=1, dtype=dtype,
               pre_norm=pre_norm)
    if pre_norm:
        bias = None
    else:
        how["branch_bias"] = branch_bias
    outs = fused.add_norm(zeros(9, hidden), residual, weight, bias, 1e-5, **how)
    if pre_norm:  # ModernBERT
        table, rows = torch.zeros(50, 64), torch.zeros(9, dtype=torch.int32)
        outs += tuple(fused.rotary(zeros(9, 3, hidden // 64, 64), table, table, rows, parts=2))
        outs += (fused.geglu(zeros(9, 3 * hidden)),)
    sum(out.sum() for out in dict.fromkeys(outs)).backward()


def fused_launches(dtypes):
    return [
        (f"{dtype} {hidden} {'pre' if pre_norm else 'post'}-norm",
         functools.partial(launch_fused, getattr(torch, dtype), hidden, pre_norm))
        for dtype, hidden, pre_norm in itertools.product(dtypes, (384, 768, 1024), (False, True))
    ]  # fmt: skip


# What --only names: word before the variant's name, and dtypes -> [(name, launch)] of its kernels.
SOURCES = {
    "flash": ("flash", flash_launches),
    "fused": ("fused", fused_launches),
    "losses": ("loss", loss_launches),
}


def main(argv):
    parser = argparse.ArgumentParser(prog="python tests/bench aot",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=list(SOURCES))
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100],
                        choices=list(SHARED_LIMIT))
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", nargs="+", default=dtypes, choices=dtypes)
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("error: TRITON_INTERPRET=1 replaces the compiler: unset it", file=sys.stderr)
        return 2
    launches = [
        (f"{word} {name}", launch)
        for source, (word, launches_of) in SOURCES.items()
        if args.only in (None, source)
        for name, launch in launches_of(args.dtype)
    ]
    print(f"triton {triton.__version__}; registers / bytes spilled per thread / KiB of shared "
          "memory (warps)\n")
    print("| variant | kernel | " + " | ".join(f"sm_{arch}" for arch in args.arch) + " |")
    print("|---|---|" + "---|" * len(args.arch))
    too_large = 0
    for name, launch in launches:
        for row in zip(*(compile_launches(launch, arch) for arch in args.arch), strict=True):
            cells = []
            for c in row:
                over = c.shared > SHARED_LIMIT[c.arch]
                too_large += over
                figures = f"{c.registers} / {c.spill_bytes} / {c.shared / 1024:.1f} ({c.warps})"
                cells.append(f"{figures} too large" if over else figures)
            print(f"| {name} | {row[0].kernel.strip('_')} | " + " | ".join(cells) + " |",
                  flush=True)
    return 1 if too_large else 0
