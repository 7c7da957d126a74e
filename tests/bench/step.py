"""The step of train.py for a benchmark or a test to call: its gradient, its optimizer, a batch."""

import numpy as np
import torch

from data.lists import Batch
from kernels import losses
from kernels.exact import ListGradient
from kernels.graphs import Graphs
from kernels.step import Step


def fused_adamw(module, lr=1e-5, weight_decay=0.0):
    return torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def peer_step_of(model, losses):
    """The step of others: losses() yields parts of the loss, each is sent back before the next is
    made; clipping, AdamW. step() returns their sum."""
    optimizer = fused_adamw(model)

    def step():
        total = 0.0
        for loss in losses():
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def step_of(encoder, loss: str, dtype="float32", max_tokens=None, lr=1e-5, clip=1.0,
            weight_decay=0.0, graphs=False) -> Step:
    """By a loss's name. Without warm-up; the decay over 10**6 steps is nothing to the first few.
    graphs: by kernels.graphs."""
    gradient = ListGradient(encoder, losses.LOSSES[loss], seed=1, dtype=dtype,
                            max_tokens=max_tokens, reserve=2,
                            graphs=Graphs(encoder, dtype) if graphs else None)
    optimizer = fused_adamw(encoder, lr, weight_decay)
    return Step(gradient, optimizer, lr=lr, warmup=0, steps=10**6, clip=clip)


def batch_of(queries, documents, targets) -> Batch:
    """Whole lists of equal length.

    queries, documents: token ids of each pair, in the order of targets [queries, list].
    """
    targets = np.asarray(targets, np.float32)
    rows, width = targets.shape
    return Batch(qids=[f"q{i}" for i in range(rows)], targets=targets,
                 lengths=np.full(rows, width), place=np.arange(rows * width), queries=queries,
                 documents=documents)


def positive_first(rows: int, width: int) -> np.ndarray:
    """Labels [rows, width]: 1 in column 0."""
    return np.eye(1, width, dtype=np.float32).repeat(rows, 0)


def lists_of(batch: Batch) -> tuple:
    """What ListGradient takes of a batch, behind the number of the step."""
    return batch.queries, batch.documents, batch.place, batch.targets, batch.lengths
