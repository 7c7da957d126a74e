"""All that a CPU wants to be fast: threads, weights laid out for oneDNN, dropout's numbers, memory.

Importing it changes nothing in the process; `prepare` is for the main of a command.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, lru_cache

import numpy as np
import torch


def prepare(training: bool) -> None:
    """Settings of a process that scores or trains, before its first product. What the user has set
    in the environment stays.

    oneDNN keeps the machine code of its last 1,024 products, megabytes for one number of rows:
    hundreds of MB where no two batches are alike. Training keeps more of them than scoring: in bf16
    the attention of every length takes products of its own, both ways.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256" if training else "16")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")


# ----------------------------------------------------------------------------------------- threads


def in_threads(work, items, spare=False):
    """Yields work(i) for i in items, in order: as many at a time as torch has threads, each
    computed by one.

    Threads that share every small product wait for each other more than they work; a thread of its
    own for every micro-batch also makes the last bits independent of how many there are. spare:
    threads beyond the number of items share the products all the same (where speed on a large
    machine counts more than those bits).
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    each = threads // workers if spare and workers else 1
    if workers <= 1 and each == threads:
        yield from map(work, items)
        return
    cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alone(item):  # autocast, like the number of threads, is a setting of the calling thread
        with torch.autocast("cpu", dtype, enabled=cast):
            return work(item)

    torch.set_num_threads(each)  # of this thread, and MKL's, which is one for all
    pending = deque(_pool(threads // each, each).submit(alone, item) for item in items)
    try:
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _pool(workers, each):
    """Kept from call to call: new threads would leave the memory that malloc keeps for the old ones
    lying idle."""
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of the threads
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,))


# ----------------------------------------------------------------------------------------- dropout


def dropout_numbers(seed: int) -> np.random.Generator:
    """What `dropout` draws from; one for each thread, as torch's is one for all."""
    return np.random.Generator(np.random.SFC64(seed))


def dropout(x, p: float, numbers: np.random.Generator):
    """x with each element zeroed with probability p and scaled by 1 / (1 - p) else, 0 < p < 1.

    p is rounded to 1/65536, in both places: 16 bits a mask element are drawn several times as fast
    as torch's Bernoulli numbers, which cost an eighth of a training step.
    """
    kept = min(max(round((1 - p) * 65536), 1), 65535)
    draws = torch.from_numpy(numbers.integers(-32768, 32768, x.shape, dtype=np.int16))
    return x * (draws < kept - 32768).to(x.dtype).mul_(65536 / kept)


# ---------------------------------------------------------------------------------------- products


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def lays_out(dtype) -> bool:
    """Whether torch has oneDNN's products over weights laid out beforehand, and this CPU runs
    them."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability()[:3] != "AVX":
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and native_bf16()


class LaidOut:
    """A linear map whose weight [out, in] is laid out as oneDNN wants it for about `rows` rows: 10
    to 20 % faster than F.linear. The one place of torch's private operators for it (`lays_out`)."""

    def __init__(self, weight, bias, rows: int):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = bias

    def __call__(self, x, gelu: bool = False):
        """x weight^T + bias, and its exact GELU in the same pass."""
        how = ("gelu", [], "none") if gelu else ("none", [], "")
        x = x.to(self.weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *how)
