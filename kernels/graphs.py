"""A step's passes as CUDA graphs: captured once for batches of a size, then replayed.

The paper's recipes score 32 or 64 pairs a step: a few milliseconds of a card, but hundreds of
kernels, and to launch them takes the host several times as long. A captured pass is one launch.

A graph is of one shape. So batches are padded to sizes (kernels.packing): a tail of pairs that
nobody reads the scores of, from which no gradient comes.

A size is run the first time, captured the second and replayed from then on. It is padded the first
time too: whether a pass is replayed changes no bit of it (but for what no two runs share, see
kernels.attention). All graphs have one pool of memory, as no two run at once, and one set of
gradients.

    graphs = Graphs(encoder, dtype="bfloat16")
    gradient = ListGradient(encoder, losses.infonce, seed=1, dtype="bfloat16", graphs=graphs)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from kernels import packing
from kernels.attention import seed_generator
from kernels.exact import scored
from kernels.packing import Packed, Size

MOST = 24  # sizes whose graphs are kept


class CaptureError(RuntimeError):
    """A pass does what a graph cannot hold, as waiting for the card."""


def captured(run: Callable[[], None], pool) -> torch.cuda.CUDAGraph:
    """What run() launches, as a graph. Other threads of the process may go on meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph


class Passes(NamedTuple):
    """The graphs of one size, what they read and what they write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # int32, as one_buffer lays them out
    scores: torch.Tensor  # fp32, of the tail too
    slopes: torch.Tensor  # likewise, d loss / d scores


class Graphs:
    """Scores of batches and the gradients of the parameters; see above.

    Args:
        model: kernels.encoder.CrossEncoder on a GPU, in train(); its weights stay where they are.
        dtype: "float32" or "bfloat16" (autocast) of the products.
        warn: is told why nothing is captured or replayed any more.
    """

    def __init__(self, model, dtype: str, warn: Callable[[str], None] = print) -> None:
        self.model, self.dtype, self.warn = model, dtype, warn
        self.device = model.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.narrow = model.narrow(torch.bfloat16) if dtype == "bfloat16" else None
        self.longest = max(model.pair_length(model.query_length, model.doc_length), packing.TOKENS)
        self.pads = self.captures = model.fixed_launches
        self.uses: Counter[Size] = Counter()
        self.kept: dict[Size, Passes] = {}
        self.replayed: Passes | None = None  # by the last `scores`
        self.seed = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.pool = self.totals = None  # of the gradients; both from the first capture on

    def scores(self, packed: Packed, seed: int) -> torch.Tensor:
        """fp32 [pairs] of a batch on the host, its dropout from `seed`; `gradients` comes next."""
        self.replayed = None
        if not self.pads or max(packed.lengths) > self.longest:  # texts beyond the model's lengths
            return scored(self.model, packed, seed, self.device, self.dtype)
        size, count = packing.size_of(packed), len(packed.lengths)
        batch = packing.padded(packed, size)
        host, places = packing.one_buffer(batch.tensors())
        (inputs,) = packing.to_device(self.device, host)
        # all that the host may know of batches of a size: the longest length that there can be
        batch = replace(batch.holding([inputs[place] for place in places]),
                        lengths=[self.longest] * size.pairs)
        self.uses[size] += 1
        if size not in self.kept and self._worth(size):
            self._capture(size, inputs, batch)
        if size not in self.kept:
            return scored(self.model, batch, seed, self.device, self.dtype)[:count]
        self.replayed = passes = self.kept[size]
        passes.inputs.copy_(inputs)
        seed_generator(seed, self.device)
        self.seed.fill_(seed)
        if self.narrow:
            self.narrow.refresh()
        passes.forward.replay()
        return passes.scores[:count]

    def gradients(self, scores: torch.Tensor, slopes: torch.Tensor) -> list[torch.Tensor | None]:
        """d loss / d parameters from d loss / d scores [pairs] of the last `scores`; None where a
        parameter is not used. What a replay gives holds until the next one."""
        passes = self.replayed
        if passes is None:
            return torch.autograd.grad(scores, self.parameters, slopes, allow_unused=True)
        passes.slopes.zero_()
        passes.slopes[: len(slopes)].copy_(slopes)
        passes.backward.replay()
        return self.totals

    def close(self) -> None:
        """Gives the memory back; from here on every batch runs."""
        self.captures = False
        self.kept.clear()
        self.pool = self.totals = self.replayed = None

    def _worth(self, size: Size) -> bool:
        """Whether to capture: it was seen before, and where there is no room more often than the
        least used, which goes."""
        if not self.captures or self.uses[size] < 2:
            return False
        if len(self.kept) >= MOST:
            least = min(self.kept, key=self.uses.__getitem__)
            if self.uses[least] >= self.uses[size]:
                return False
            del self.kept[least]
        return True

    def _capture(self, size: Size, inputs: torch.Tensor, batch: Packed) -> None:
        """Keeps the passes of a size, which read the batch that lies in `inputs`; without the
        memory for them no size from here on. CaptureError where a pass cannot be captured, after
        which this process may be of no use."""
        first = self.pool is None
        if first:
            self.pool = torch.cuda.graph_pool_handle()
            self.totals = [torch.empty_like(p) for p in self.parameters]
        scores, slopes = torch.zeros(2, size.pairs, device=self.device)
        # The parameters by other names: where a graph of autograd is left of an earlier pass, their
        # own names belong to the stream that it ran on, and a capture may not touch another stream.
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        leaves = [p.detach().requires_grad_() for p in self.parameters]
        by_names = dict(zip(names, leaves, strict=True))
        model, under_way = partial(torch.func.functional_call, self.model, by_names), []

        def forward():
            if first:
                self._reserve(size)
            with self._standing_in(leaves):
                out = scored(model, batch, self.seed, self.device, self.dtype)
            scores.copy_(out.detach())
            under_way.append(out)

        def backward():
            with self._standing_in(leaves):
                out = under_way.pop()
                self._keep(torch.autograd.grad(out, leaves, slopes, allow_unused=True))

        if self.narrow:
            self.narrow.refresh()
        try:
            passes = captured(forward, self.pool), captured(backward, self.pool)
        except torch.OutOfMemoryError:
            self.close()
            self.warn("no memory for CUDA graphs: every step is launched kernel by kernel")
            return
        except RuntimeError as e:
            raise CaptureError(f"a step cannot be captured as CUDA graphs: {e}") from e
        self.kept[size] = Passes(*passes, inputs, scores, slopes)

    def _standing_in(self, leaves: list[torch.Tensor]):
        """Inside, the joined weights' gradients are those of `leaves`, written to `totals`."""
        if not self.narrow:
            return nullcontext()
        both = (dict(zip(self.parameters, of, strict=True)) for of in (leaves, self.totals))
        return self.narrow.standing_in(*both)

    def _reserve(self, size: Size) -> None:
        """Takes the memory of the first size in one piece and lets it go, with a seventh to spare:
        in pieces of the first size's tensors the pool would hold the next size's badly."""
        per_token = packing.kept_bytes(self.model.model.config, getattr(torch, self.dtype))
        torch.empty(size.tokens * per_token, dtype=torch.uint8, device=self.device)

    def _keep(self, found) -> None:
        """Writes gradients to `totals`, but those that are there already."""
        self.totals = [None if g is None else total
                       for g, total in zip(found, self.totals, strict=True)]
        apart = [(total, g) for total, g in zip(self.totals, found, strict=True)
                 if g is not None and g.data_ptr() != total.data_ptr()]
        torch._foreach_copy_(*map(list, zip(*apart, strict=True)))
