"""One exact training step on lists of any length: the loss and its gradient, as if the whole batch
had been in memory at once.

A listwise loss needs every score of a list before it has a gradient. Keeping the graph of every
score takes memory that grows with the list; a list cut into pieces is another loss. So, after Gao
et al. 2021 (arXiv 2101.06983), at the level of scores:

    1. the pairs of the batch are packed into micro-batches of at most `max_tokens`, longest first;
    2. every micro-batch is scored without a graph                           scores [queries, list]
    3. the loss is computed once on the whole lists, and d loss / d scores
    4. every micro-batch is scored again, with its graph and the same dropout (each has a seed of
       its own), and its share of d loss / d scores goes back through it
    5. gradients are added up in the order of the micro-batches

A step of no more than `keep` tokens keeps the graphs of 2 and skips the second scoring of 4. Over
several ranks each scores its own pairs, scores are exchanged before 3 and gradients added after 5:
a ragged share weighs what it should.

    gradient = ListGradient(encoder, losses.infonce, seed=1, dtype="bfloat16")
    loss = gradient(step, query_ids, document_ids, place, targets, lengths)     # fills .grad
    optimizer.step(); optimizer.zero_grad()

To copy it: with kernels/attention.py, cpu.py and packing.py (and flash.py, where attention of yours
goes through attention.py on a GPU); for Hugging Face's cross-encoders also with encoder.py,
layers.py, linears.py, loading.py, modular.py, sigmoid.py and tokenizers.py. Any other model will do
that has pack, pair_length, device, model.config and a forward pass from packed pairs to fp32
logits, and draws its dropout as kernels.attention.dropout does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from kernels.attention import dropout_from, on_gpu
from kernels.cpu import in_threads
from kernels.packing import default_max_tokens, kept_bytes, micro_batches, to_device


class ListGradient:
    """Loss and gradients of one batch after the other; see above.

    Args:
        model: kernels.encoder.CrossEncoder, fp32 weights, in train().
        loss: (scores [queries, list], targets, lengths) -> scalar, as kernels.losses has them.
        seed: of dropout, with step, rank and micro-batch.
        dtype: "float32" or "bfloat16" (autocast) of the products.
        max_tokens: of a micro-batch; None: by the device, and on a CPU by its memory.
        rank, world: this process and how many there are, of torch's process group.
        reserve: numbers (4 bytes) for every parameter that the card must have room for beside its
            gradient: 2 where AdamW has no moments yet.
        graphs: kernels.graphs.Graphs of the model, of the same dtype: steps of one micro-batch are
            replayed. None: every step is launched kernel by kernel.

    Attributes: max_tokens; keep (tokens of a step that goes in one pass; on a GPU None until the
    first step, which measures the memory that is free); parameters.
    """

    def __init__(self, model, loss: Callable, *, seed: int, dtype: str = "float32",
                 max_tokens: int | None = None, rank: int = 0, world: int = 1, reserve: int = 0,
                 graphs=None):
        self.model, self.loss, self.seed, self.dtype = model, loss, seed, dtype
        self.rank, self.world, self.reserve, self.graphs = rank, world, reserve, graphs
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.flat = None  # every gradient in one buffer, where ranks or threads add theirs up
        self.on_gpu = on_gpu(model.device)
        self.max_tokens = max_tokens or default_max_tokens(model.device, training=True)
        self.keep = None if self.on_gpu else self.max_tokens
        self.each, self.threads = map, 1  # a micro-batch after the other; on a CPU one a thread
        if not self.on_gpu:
            self.each, self.threads = partial(in_threads, spare=True), torch.get_num_threads()
            if not max_tokens:
                self._fit_memory()
            for module in model.modules():  # a vocabulary's gradient: few rows that are not zero
                if isinstance(module, torch.nn.Embedding):
                    module.sparse = True

    def _fit_memory(self):
        """About 34 fp32 values a token, layer and hidden unit are kept for the backward pass: up to
        4 GiB of them, by one pass or by all threads together (beyond 4 GiB only where that leaves a
        thread less than 512 tokens)."""
        config = self.model.model.config
        fit = 2**32 // (34 * 4 * config.num_hidden_layers * config.hidden_size)
        self.keep = max(self.keep, fit)
        self.max_tokens = min(self.max_tokens, max(fit // self.threads, 512))

    def __call__(self, step: int, queries: list[np.ndarray], documents: list[np.ndarray],
                 place: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """The loss, a scalar on the device; adds d loss / d parameters to .grad, over all ranks.

        step: counts dropout on. queries, documents: token ids of this rank's pairs. place int64
        [pairs]: where in targets, read as one row, each pair stands. targets fp32 [queries, list]
        and lengths int64 [queries]: of the whole batch, all ranks included.

        Raises torch.OutOfMemoryError on every rank where memory ran out on one: .grad is to be
        cleared, and the step can be repeated with less (`halve`).
        """
        device = self.model.device
        tokens = [self.model.pair_length(len(q), len(d))
                  for q, d in zip(queries, documents, strict=True)]
        parts = micro_batches(tokens, self.max_tokens, self.threads)
        if self.keep is None:
            self.keep = max(self._room(), self.max_tokens)
        one_pass = len(parts) <= 1 or sum(tokens) <= self.keep
        graphs = self.graphs if len(parts) == 1 else None
        order = [i for part in parts for i in part]
        on_host = place[order], targets, lengths
        place, targets, lengths = to_device(device, *map(torch.as_tensor, on_host))

        def scores_of(m, graph):
            packed = self.model.pack([queries[i] for i in parts[m]],
                                     [documents[i] for i in parts[m]])
            seed = seed_of(self.seed, step, self.rank, m)
            if graphs:
                return graphs.scores(packed, seed)
            return scored(self.model, packed, seed, device, self.dtype, graph)

        outs = self._agreed(lambda: list(self.each(partial(scores_of, graph=one_pass),
                                                   range(len(parts)))))
        loss, slopes = self._on_lists(outs, place, targets, lengths)

        def gradient_of(m):
            out = outs[m] if one_pass else scores_of(m, graph=True)
            outs[m] = None
            if graphs:
                return graphs.gradients(out, slopes[m])
            return torch.autograd.grad(out, self.parameters, slopes[m], allow_unused=True)

        self._agreed(lambda: self._add_up(self.each(gradient_of, range(len(parts)))))
        if self.world > 1:
            dist.all_reduce(self.flat)
        return loss

    def halve(self) -> None:
        """Half as many tokens a micro-batch, two passes beyond that many, and no graphs."""
        self.max_tokens //= 2
        self.keep = self.max_tokens
        if self.graphs:
            self.graphs.close()

    def _on_lists(self, outs, place, targets, lengths):
        """(loss, [d loss / d scores of each micro-batch]), computed on the whole lists."""
        own = torch.cat(outs).detach() if outs else torch.zeros(0, device=targets.device)
        own.requires_grad_()
        scores = torch.zeros(targets.numel(), device=own.device).index_put((place,), own)
        if self.world > 1:  # the other ranks' scores, which are no function of this rank's
            everyone = scores.detach().clone()
            dist.all_reduce(everyone)
            scores = scores + (everyone - scores.detach())
        loss = self.loss(scores.view_as(targets), targets, lengths)
        loss.backward()
        return loss.detach(), own.grad.split([len(out) for out in outs]) if outs else []

    def _add_up(self, gradients) -> None:
        """The gradients of all micro-batches, added in order, whichever was computed first."""
        sums = self._sums()  # before the first of them: not later, between their buffers
        for one in gradients:
            self._add(sums, one)
            del one  # else they would lie beside those of the next micro-batch
        if self.world > 1:
            for p, total in zip(self.parameters, sums, strict=True):
                p.grad = total

    def _sums(self) -> list:
        """Where gradients are added up: zeros, in one buffer that is the same in every step. None
        on a single GPU, where the first micro-batch's own tensors do."""
        if self.on_gpu and self.world == 1:
            return [None] * len(self.parameters)
        sizes = [p.numel() for p in self.parameters]
        if self.flat is None:
            self.flat = torch.zeros(sum(sizes), device=self.model.device)
        else:
            self.flat.zero_()
        return [part.view_as(p)
                for part, p in zip(self.flat.split(sizes), self.parameters, strict=True)]

    def _add(self, sums, gradients) -> None:
        """Adds a micro-batch's gradients to .grad, which is the parameter's place in `sums` from
        its first one on."""
        there, more = [], []
        for p, total, gradient in zip(self.parameters, sums, gradients, strict=True):
            if gradient is None:
                continue
            if p.grad is None and total is None:
                p.grad = gradient.contiguous()
                continue
            if p.grad is None:
                p.grad = total
            there.append(p.grad)
            more.append(gradient)
        if there:
            torch._foreach_add_(there, more)

    def _room(self) -> int:
        """Tokens whose forward passes fit in the card's memory, beside the gradients and
        `reserve`."""
        device = self.model.device
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free -= 4 * (1 + self.reserve) * sum(p.numel() for p in self.parameters)
        per_token = kept_bytes(self.model.model.config, getattr(torch, self.dtype))
        return max(int(0.8 * free), 0) // per_token

    def _agreed(self, work):
        """work(); torch.OutOfMemoryError on every rank where memory ran out on one, so that all
        repeat the step."""
        result = failure = None
        try:
            result = work()
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
            failure = e
        if self.world > 1:
            votes = torch.tensor([int(failure is not None)])
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            if votes and not failure:
                failure = torch.OutOfMemoryError("another rank is out of memory")
        if failure is None:
            return result
        try:
            if isinstance(failure, torch.OutOfMemoryError):
                raise failure
            raise torch.OutOfMemoryError(str(failure)) from failure
        finally:
            failure = None  # its traceback holds this frame, and so the failed try's tensors


def scored(model, packed, seed, device, dtype: str, graph: bool = True) -> torch.Tensor:
    """The scores of a micro-batch, its dropout from `seed` (see dropout_from); graph: with that of
    autograd."""
    cast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.set_grad_enabled(graph), dropout_from(seed, device), cast:
        return model(packed)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's own error, or cuBLAS's and Triton's, which are known by their
    words alone."""
    words = ("CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def seed_of(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
