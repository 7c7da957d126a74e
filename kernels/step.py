"""An optimizer step on the exact gradient of its lists: linear warm-up and decay, clipping,
AdamW."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch

from kernels.exact import ListGradient
from kernels.packing import to_host


class NonFiniteStep(FloatingPointError):
    """A loss or gradient norm that is NaN or infinite: `.step` (from 1), `.loss`, `.norm`,
    `.qids`."""

    def __init__(self, step: int, loss: float, norm: float, qids: list[str]):
        names = ", ".join(dict.fromkeys(qids))
        super().__init__(f"step {step}: loss {loss}, gradient norm {norm}; queries {names}")
        self.step, self.loss, self.norm, self.qids = step, loss, norm, qids


class Step:
    """One optimizer step after the other.

    On a GPU nothing in a step waits for the card: loss and gradient norm are read a step later.
    Where one is not finite the card itself leaves the weights as they are, in that step and all
    after it, until it is read.

    Args:
        gradient: kernels.exact.ListGradient.
        optimizer: AdamW; fused on a GPU, or ValueError.
        lr, warmup, steps: the highest rate, the steps up to it, all steps: then linearly to 0.
        clip: largest gradient norm.
        warn: is told where memory ran out and the step is repeated in smaller micro-batches.
    """

    def __init__(self, gradient: ListGradient, optimizer, *, lr: float, warmup: int, steps: int,
                 clip: float, warn: Callable[[str], None] = print) -> None:
        self.gradient, self.optimizer, self.warn = gradient, optimizer, warn
        self.lr, self.warmup, self.steps, self.clip = lr, warmup, steps, clip
        self.unread = deque()  # (step, queries, loss and norm on their way from the card)
        if gradient.on_gpu:
            if not getattr(optimizer, "_step_supports_amp_scaling", False):
                raise ValueError("the optimizer has to be fused on a GPU: it clips, and skips what "
                                 "is not finite")
            device = gradient.model.device
            # 1 from the first step on that was not finite
            optimizer.found_inf = torch.zeros((), device=device)
            self.one = torch.ones((), device=device)

    def __call__(self, k: int, batch) -> list[tuple[float, float]]:
        """Step k of the schedule (from 0) on a batch (queries, documents, place, targets, lengths
        as ListGradient takes them, and qids).

        Returns (loss, gradient norm) of the steps that are finished and were not returned yet: on a
        CPU this one, on a GPU the one before. Raises NonFiniteStep, and torch.OutOfMemoryError
        where smaller micro-batches do not help.
        """
        rising = (k + 1) / max(self.warmup, 1)
        falling = (self.steps - k) / max(self.steps - self.warmup, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(rising, falling, 1.0)
        lists = batch.queries, batch.documents, batch.place, batch.targets, batch.lengths
        loss = None
        try:
            loss = self.gradient(k, *lists)
        except torch.OutOfMemoryError:
            self.gradient.halve()
        if loss is None:  # outside `except`, whose traceback holds the tensors of the failed try
            self.warn(f"step {k + 1}: out of GPU memory; micro-batches of "
                      f"{self.gradient.max_tokens:,} tokens from here on, step repeated")
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            try:
                loss = self.gradient(k, *lists)
            except torch.OutOfMemoryError:
                raise torch.OutOfMemoryError(
                    f"step {k + 1}: out of GPU memory with micro-batches of "
                    f"{self.gradient.max_tokens:,} tokens too") from None
        return self._update(k, batch.qids, loss)

    def _update(self, k: int, qids: list[str], loss: torch.Tensor) -> list[tuple[float, float]]:
        """Clips the gradients and lets AdamW take them, but where the loss or their norm is not
        finite."""
        parameters = self.gradient.parameters
        if self.gradient.on_gpu:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            figures, found_inf = torch.stack([loss, norm]), self.optimizer.found_inf
            torch._amp_foreach_non_finite_check_and_unscale_([figures], found_inf, self.one)
            self.optimizer.grad_scale = (norm / self.clip).clamp(min=1.0)  # AdamW divides by it
            self.optimizer.step()
            self.unread.append((k, qids, to_host(figures)))
            finished = self.flush(but=1)
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            self.unread.append((k, qids, to_host(torch.stack([loss, norm.to(loss.dtype)]))))
            finished = self.flush()
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finished

    def flush(self, but: int = 0) -> list[tuple[float, float]]:
        """(loss, gradient norm) of the steps that were not returned yet, all but the last `but`;
        waits for them."""
        finished = []
        while len(self.unread) > but:
            k, qids, figures = self.unread.popleft()
            loss, norm = figures().tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteStep(k + 1, loss, norm, qids)
            finished.append((loss, norm))
        return finished
