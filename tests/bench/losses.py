"""The fused losses against their formulas in plain torch: bytes, launches, memory; times on a GPU.

    python tests/bench losses [--queries 16] [--list 100] [--dtype float32] [--device auto]

Bytes and launches are counted, not estimated: the kernels run in Triton's interpreter, which
reports the bytes of every load and store they make (masked lanes move nothing; a second read of the
same address counts again, though a cache would serve it). Plain torch is counted operator by
operator: each one that is not a view is a launch that reads its tensor arguments and writes its
results. Memory is the allocator's, above the arguments, at its highest during loss and gradient of
one query. All figures are of loss and gradient together.
"""

import argparse
import json
import os
import subprocess
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.clock import add_device_flag, device_of

KINDS = {
    "bce": {},
    "hinge": {},
    "marginmse": {"pairs": "all"},
    "infonce": {},
    "ranknet": {},
    "adrmse": {},
    "kl": {},
    "mse": {},
}
SIZES = (100, 1000, 4000)  # list lengths of the memory table


def inputs(queries, columns, dtype, device):
    """-> scores [queries, columns] that ask for a gradient, targets fp32, lengths int64, all of
    them full."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(queries, columns, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(0, 2, (queries, columns), generator=generator).float().to(device)
    return scores, targets, torch.full((queries,), columns, device=device)


def step(name, scores, targets, lengths):
    from kernels import losses

    scores.grad = None
    losses.LOSSES[name](scores, targets, lengths, **KINDS[name]).backward()


def launches(sizes=(8, 100, 1024, 4096), dtypes=("float32", "bfloat16", "float16")):
    """Yield (name, call) of every kernel: the call launches it as a loss does, to compile it ahead
    of time."""
    from kernels import losses

    for name in losses._KERNELS:
        for columns in sizes:
            for dtype in dtypes:
                scores, targets, lengths = inputs(2, columns, getattr(torch, dtype), "cpu")
                arguments = scores.detach(), targets, lengths, name, 1.0
                yield f"{name} {dtype} {columns}", lambda a=arguments: losses._fused(*a)


class Operators(TorchDispatchMode):
    """Counts launches and bytes of torch's operators: all but views, bare allocations and the
    CPU-only look at the lengths' range."""

    free = ("empty", "empty_like", "detach", "aminmax", "_local_scalar_dense")
    launches = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func.__name__.split(".")[
            0] not in self.free:
            self.launches += 1
            tensors = [x for x in tree_leaves((args, result)) if torch.is_tensor(x)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


class Kernels:
    """Counts launches and bytes of the kernels that the interpreter runs."""

    launches = bytes = 0

    def __enter__(self):
        from triton.runtime import interpreter

        self.executor, self.builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
        self.call, self.load = self.executor.__call__, self.builder.create_masked_load
        self.store = self.builder.create_masked_store
        counter = self

        def call(executor, *args, **kwargs):
            counter.launches += 1
            return counter.call(executor, *args, **kwargs)

        def load(builder, pointers, mask, *rest):
            counter.bytes += int(
                mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return counter.load(builder, pointers, mask, *rest)

        def store(builder, pointers, value, mask, *rest):
            counter.bytes += int(
                mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return counter.store(builder, pointers, value, mask, *rest)

        self.executor.__call__ = call
        self.builder.create_masked_load, self.builder.create_masked_store = load, store
        return self

    def __exit__(self, *_):
        self.executor.__call__ = self.call
        self.builder.create_masked_load, self.builder.create_masked_store = self.load, self.store


def count(queries, columns, dtype):
    """{loss: [launches, bytes] of the kernels, [launches, bytes] of plain torch}; needs
    TRITON_INTERPRET=1."""
    from kernels import losses

    found = {}
    for name in KINDS:
        arguments = inputs(queries, columns, getattr(torch, dtype), "cpu")
        both = []
        for losses._kernels in (True, False):
            with Operators() as operators, Kernels() as kernels:
                step(name, *arguments)
            both.append((operators.launches + kernels.launches, operators.bytes + kernels.bytes))
        found[name] = both
    return found


class _Withheld:
    """Stands for a kernel where only the launcher's allocations are of interest."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def peak_bytes(name, arguments):
    """Highest number of bytes allocated above the arguments during loss and gradient."""
    if arguments[0].is_cuda:
        step(name, *arguments)
        arguments[0].grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, *arguments)
        return torch.cuda.max_memory_allocated() - before
    arguments[0].grad = None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(name, *arguments)
    live = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


def memory(device):
    """{loss: [(kernel, plain torch) bytes at each of SIZES]} for one query in fp32."""
    from kernels import losses

    real, mean = dict(losses._KERNELS), losses._mean_kernel
    found = {}
    try:
        # the launcher's allocations alone: a list of 4,000 takes the interpreter minutes
        if device == "cpu":
            losses._KERNELS.update(dict.fromkeys(real, _Withheld()))
            losses._mean_kernel = _Withheld()
        for name in KINDS:
            found[name] = []
            for columns in SIZES:
                arguments = inputs(1, columns, torch.float32, device)
                both = []
                for losses._kernels in (True, False):
                    both.append(peak_bytes(name, arguments))
                found[name].append(both)
    finally:
        losses._KERNELS.update(real)
        losses._mean_kernel, losses._kernels = mean, None
    return found


def sides(name, arguments, compiled=False):
    """{side: loss and gradient of `arguments`}: the kernel, the formula in plain torch, and that
    compiled."""
    from kernels import losses

    formula = torch.compile(losses.LOSSES[name], dynamic=True) if compiled else None

    def run(kernels, function=losses.LOSSES[name]):
        scores, targets, lengths = arguments
        losses._kernels = kernels
        try:
            loss = function(scores, targets, lengths, **KINDS[name])
            # not autograd's graph: while it lives a capture fails
            return loss.detach(), *torch.autograd.grad(loss, scores)
        finally:
            losses._kernels = None

    found = {"kernel": lambda: run(True), "plain torch": lambda: run(False)}
    if compiled:
        found["torch.compile"] = lambda: run(False, formula)
    return found


def times(queries, columns, dtype):
    """{loss: (kernel, plain torch)} milliseconds of loss and gradient on the GPU, medians."""
    from triton.testing import do_bench

    found = {}
    for name in KINDS:
        both = sides(name, inputs(queries, columns, getattr(torch, dtype), "cuda")).values()
        found[name] = [do_bench(run, return_mode="median") for run in both]
    return found


def kib(number):
    return f"{number / 1024:,.1f}" if number < 2**20 else f"{number / 1024:,.0f}"


def counted(argv):
    """count()'s result from a process of its own, None where it fails, after saying why.

    The interpreter is chosen when a kernel is decorated: here a GPU's kernels stay real.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tests/bench", "losses", "--counts", *argv]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        reason = child.stderr.strip().splitlines()[-1]
        print(f"Launches and bytes were not counted, since Triton's interpreter failed: {reason}")
        return None
    return json.loads(child.stdout)


def print_counts(counts, queries, columns, dtype):
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    # scores and targets read, the gradient written, lengths
    least = queries * (columns * (2 * size + 4) + 8)
    print(f"Least possible: {kib(least)} KiB (scores, targets and lengths read once, the gradient "
          "written once).\n")
    print("| loss | launches: kernel | plain torch | KiB moved: kernel | of the least "
          "| plain torch | of the least |\n|---|---|---|---|---|---|---|")
    for name, ((k_launches, k_bytes), (t_launches, t_bytes)) in counts.items():
        ratios = [kib(k_bytes), f"{k_bytes / least:.2f}", kib(t_bytes), f"{t_bytes / least:.1f}"]
        print(f"| {name} | {k_launches} | {t_launches} | " + " | ".join(ratios) + " |")


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python tests/bench losses", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--list", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add_device_flag(parser)
    parser.add_argument(
        "--counts", action="store_true", help=argparse.SUPPRESS
    )  # the interpreted half, as JSON
    args = parser.parse_args(argv)
    shape = args.queries, args.list, args.dtype
    if args.counts:
        print(json.dumps(count(*shape)))
        return 0

    print(f"{args.queries} queries of {args.list} documents, {args.dtype} scores, fp32 targets; "
          "loss and gradient.")
    counts = counted(argv)
    if counts:
        print_counts(counts, *shape)

    device = device_of(args.device).type
    print(f"\nPeak extra memory of one query in KiB, fp32, measured on {device}: kernel / plain "
          "torch.\n")
    print("| loss | " + " | ".join(f"list {n:,}" for n in SIZES) + " |\n|---|"
          + "---|" * len(SIZES))
    for name, row in memory(device).items():
        print(f"| {name} | " + " | ".join(f"{kib(kernel)} / {kib(plain)}" for kernel, plain in row)
              + " |")

    if device == "cpu":
        print("\nNo GPU: times are not measured.")
        return 0
    print(f"\nMedian milliseconds of loss and gradient on {torch.cuda.get_device_name()}.\n")
    print("| loss | kernel | plain torch | ratio |\n|---|---|---|---|")
    for name, (kernel, plain) in times(*shape).items():
        print(f"| {name} | {kernel:.4f} | {plain:.4f} | {plain / kernel:.2f} |")
    return 0
