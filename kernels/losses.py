"""Ranking and distillation losses for cross-encoders, on ragged lists of scores.

    loss = losses.infonce(scores, targets, lengths)      # scalar, differentiable in scores

    scores   [queries, list]  float32, bfloat16 or float16 logits (float64: for checking gradients)
    targets  [queries, list]  labels or teacher scores, any real dtype; never differentiated
    lengths  [queries]        int32 or int64, documents of each list; columns beyond are ignored
                              whatever they hold, NaN included. None: every column is a document.

s is a query's list of scores, t its targets. Sums run over the whole batch before they are divided,
so a query weighs as much as it has units (documents, pairs, or itself). A query without a unit (no
pair, no positive, a single document) counts neither above nor below the fraction line; a batch
without any gives 0 with zero gradient. The arithmetic is float32 (float64 for float64 scores), and
so is the loss.

On CUDA a Triton kernel computes a loss and its gradient in one launch; elsewhere, and for float64,
the formula in the body of each function runs. The two agree to rounding. This file needs nothing
but torch (and triton on CUDA).

Sources: Morand et al., "Reproducing and Comparing Distillation Techniques for Cross-Encoders",
arXiv 2603.03010, and the code it ran (xpmir, xpm-torch); Schlatt et al., "Rank-DistiLLM", arXiv
2405.07920 (RankNet, ADR-MSE); Hofstätter et al., arXiv 2010.02666 (MarginMSE); the recipe of the
ettin-reranker models (MSE on logits).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None

MAX_BLOCK = 1024  # documents that one program holds in registers; longer lists go by blocks
TILE = 4  # documents j that meet a block of documents i at a time in the pairwise losses


def bce(scores, targets, lengths=None, *, pos_weight=1.0):
    """Binary cross-entropy with logits, the pointwise loss.

        mean over documents of  -pos_weight t log sigmoid(s) - (1 - t) log(1 - sigmoid(s))

    targets are labels in [0, 1], soft ones too. A list of one document counts: the unit is the
    document. arXiv 2603.03010 (there: torch.nn.BCEWithLogitsLoss over triples).
    """
    lengths = _check(scores, targets, lengths, pos_weight=pos_weight)
    if _use_kernels(scores):
        return _fused(scores, targets, lengths, "bce", pos_weight)[0]
    s, t, valid = _ragged(scores, targets, lengths)
    return _mean(-pos_weight * t * F.logsigmoid(s) - (1 - t) * F.logsigmoid(-s), valid)


def hinge(scores, targets, lengths=None, *, margin=1.0):
    """Pairwise hinge loss.

        mean over pairs (i, j) of a list with t_i > 0 >= t_j of  max(0, margin - (s_i - s_j))

    The slope at the kink is 0. xpm-torch losses/pairwise.py; arXiv 2603.03010 with margin 1.
    """
    lengths = _check(scores, targets, lengths, margin=margin)
    if _use_kernels(scores):
        return _fused(scores, targets, lengths, "hinge", margin)[0]
    s, t, valid = _ragged(scores, targets, lengths)
    i, j = t[:, :, None], t[:, None, :]
    return _mean(F.relu(margin - _differences(s)), _pairs(valid) & (i > 0) & (j <= 0))


def marginmse(scores, targets, lengths=None, *, pairs="first"):
    """MarginMSE: the student's margins against the teacher's.

        mean over pairs (i, j) of  ((s_i - s_j) - (t_i - t_j))^2

    pairs="first": the document of column 0 with each other one of its list (a triple is a list of
    two, the positive first); pairs="all": every i < j. Hofstätter et al., arXiv 2010.02666; arXiv
    2603.03010.
    """
    if pairs not in ("first", "all"):
        raise ValueError(
            f'pairs is {pairs!r}: choose "first" (column 0 with each other) or "all" (every i < j)'
        )
    lengths = _check(scores, targets, lengths)
    if _use_kernels(scores):
        return _fused(scores, targets, lengths, f"marginmse_{pairs}", 0.0)[0]
    s, t, valid = _ragged(scores, targets, lengths)
    if pairs == "first":
        errors = (s[:, :1] - s) - (t[:, :1] - t)
        return _mean(errors[:, 1:].square(), valid[:, 1:])
    errors = _differences(s) - _differences(t)
    return _mean(errors.square(), _pairs(valid).triu(diagonal=1))


def infonce(scores, targets, lengths=None, *, temperature=1.0):
    """InfoNCE on the explicit list: softmax cross-entropy of the positives.

        mean over queries of  mean over i with t_i > 0 of  -log( exp(s_i / T) / sum_j exp(s_j / T) )

    The sum runs over all documents of the list. A query needs a positive and another document to
    count. xpmir letor/distillation/listwise.py (`ListwiseInfoNCE`); arXiv 2603.03010: 1 positive
    and 7 negatives.
    """
    lengths = _check(scores, targets, lengths, temperature=temperature)
    if _use_kernels(scores):
        return _fused(scores, targets, lengths, "infonce", temperature)[0]
    s, t, valid = _ragged(scores, targets, lengths)
    positive = valid & (t > 0)
    positives = positive.sum(1)
    surprise = -_log_softmax(s / temperature, valid).masked_fill(~positive, 0).sum(1)
    return _mean(surprise / positives.clamp(min=1), (positives > 0) & (valid.sum(1) > 1))


def ranknet(scores, targets, lengths=None):
    """RankNet on a teacher's order (DistillRankNET).

        mean over pairs (i, j) of a list with t_i > t_j of  log(1 + exp(-(s_i - s_j)))

    Ties of the teacher give no pair. xpmir letor/distillation/listwise.py; Rank-DistiLLM; arXiv
    2603.03010.
    """
    lengths = _check(scores, targets, lengths)
    if _use_kernels(scores):
        return _fused(scores, targets, lengths, "ranknet", 0.0)[0]
    s, t, valid = _ragged(scores, targets, lengths)
    return _mean(-F.logsigmoid(_differences(s)), _pairs(valid) & (_differences(t) > 0))


def adrmse(scores, targets, lengths=None, *, temperature=1.0):
    """ADR-MSE: approximate ranks of the student against the teacher's, top ranks weighing most.

        mean over documents of  (pi_i - r_i)^2 / log2(pi_i + 1)
        r_i  = 1 + sum over j != i of sigmoid((s_j - s_i) / T)
        pi_i = rank of t_i in its list from 1 (highest t first), ties share their mean rank

    A list of one document is not counted. Rank-DistiLLM (ApproxRankMSE, discount log2); arXiv
    2603.03010.
    """
    lengths = _check(scores, targets, lengths, temperature=temperature)
    if _use_kernels(scores):
        return _fused(scores, targets, lengths, "adrmse", temperature)[0]
    s, t, valid = _ragged(scores, targets, lengths)
    pair = _pairs(valid)
    lead = -_differences(t)  # lead[query, i, j] > 0: the teacher has j before i
    approximate = 1 + torch.sigmoid(-_differences(s) / temperature).masked_fill(~pair, 0).sum(2)
    rank = 1 + (torch.sign(lead) + 1).masked_fill(~pair, 0).sum(2) / 2
    errors = (rank - approximate).square() / torch.log2(rank + 1)
    return _mean(errors, valid & (valid.sum(1, keepdim=True) > 1))


def kl(scores, targets, lengths=None, *, temperature=1.0):
    """Kullback-Leibler divergence of the student's distribution over the list from the teacher's.

        mean over queries of  sum_i p_i (log p_i - log q_i)
        p = softmax(t / T),  q = softmax(s / T)

    A list of one document is not counted. No factor T^2 is applied.
    """
    lengths = _check(scores, targets, lengths, temperature=temperature)
    if _use_kernels(scores):
        return _fused(scores, targets, lengths, "kl", temperature)[0]
    s, t, valid = _ragged(scores, targets, lengths)
    log_p, log_q = _log_softmax(t / temperature, valid), _log_softmax(s / temperature, valid)
    terms = (log_p.exp() * (log_p - log_q)).masked_fill(~valid, 0)
    return _mean(terms.sum(1), valid.sum(1) > 1)


def mse(scores, targets, lengths=None):
    """Mean squared error on a teacher's raw logits, pointwise distillation.

        mean over documents of  (s_i - t_i)^2

    The student takes over the teacher's scale, so targets are logits; of ranks it would learn the
    numbers. A list of one document counts: the unit is the document. The recipe of the
    ettin-reranker models (huggingface/blog ettin-reranker.md, May 2026; sentence-transformers'
    cross-encoder MSELoss); not in arXiv 2603.03010.
    """
    lengths = _check(scores, targets, lengths)
    if _use_kernels(scores):
        return _fused(scores, targets, lengths, "mse", 0.0)[0]
    s, t, valid = _ragged(scores, targets, lengths)
    return _mean((s - t).square(), valid)


LOSSES = {
    "bce": bce,
    "hinge": hinge,
    "marginmse": marginmse,
    "infonce": infonce,
    "ranknet": ranknet,
    "adrmse": adrmse,
    "kl": kl,
    "mse": mse,
}


def _check(scores, targets, lengths, **parameters):
    """Raise ValueError on arguments no loss can mean; return lengths on the device of scores, or
    None.

    Only shapes, dtypes and host values are looked at, so CUDA is never waited for: lengths that lie
    outside 0..list raise when they are on the CPU and are clamped when they are on the GPU.
    """
    if scores.dim() != 2 or targets.shape != scores.shape:
        shapes = f"scores {list(scores.shape)} and targets {list(targets.shape)}"
        raise ValueError(f"{shapes}: both must be [queries, list]")
    if not scores.is_floating_point():
        raise ValueError(f"scores are {scores.dtype}: pass the floating-point logits")
    if targets.is_complex():
        raise ValueError(f"targets are {targets.dtype}: pass real labels or teacher scores")
    if targets.device != scores.device:
        places = f"scores on {scores.device}, targets on {targets.device}"
        raise ValueError(f"{places}: move them to one device")
    for name, value in parameters.items():
        if not math.isfinite(value) or value < 0 or (name == "temperature" and value == 0):
            raise ValueError(f"{name} is {value}: pass a finite, positive number")
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        kind = getattr(lengths, "dtype", type(lengths).__name__)
        raise ValueError(f"lengths are {kind}: pass an int32 or int64 tensor")
    if lengths.shape != scores.shape[:1]:
        shape = list(lengths.shape)
        raise ValueError(f"lengths are {shape}: pass [{scores.shape[0]}], one per query")
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in lengths.aminmax())
        if least < 0 or most > scores.shape[1]:
            columns = scores.shape[1]
            raise ValueError(f"lengths run from {least} to {most}: they must lie in 0..{columns}")
    return lengths.to(scores.device, non_blocking=True)


def _ragged(scores, targets, lengths):
    """-> s, t [queries, list] in the dtype of the arithmetic, 0 outside the lists; valid, their
    bool mask."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    valid = torch.ones_like(scores, dtype=torch.bool)
    if lengths is not None:
        valid = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    s, t = scores.to(dtype), targets.detach().to(dtype)
    return s.masked_fill(~valid, 0), t.masked_fill(~valid, 0), valid


def _differences(x):
    """x [queries, list] -> x_i - x_j at [query, i, j]."""
    return x[:, :, None] - x[:, None, :]


def _pairs(valid):
    """valid [queries, list] -> True at [query, i, j] for two different documents of the list."""
    others = ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return valid[:, :, None] & valid[:, None, :] & others


def _log_softmax(x, valid):
    # The lowest finite number, not -inf: a list without documents must not make a NaN to be hidden.
    return torch.log_softmax(x.masked_fill(~valid, torch.finfo(x.dtype).min), dim=1)


def _mean(values, counted):
    """Mean of the counted values (bool of the same shape); 0 where nothing counts."""
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


# Triton. Every kernel runs one program per query and takes the same arguments:
#
#     scores    [queries, columns] fp32, bf16 or fp16, contiguous
#     targets   [queries, columns] any real dtype, contiguous
#     lengths   [queries] int32 or int64, or None for full lists
#     gradient  [queries, columns] fp32, written: d(sum of the query's units) / d scores, 0 beyond
#     partials  [2, queries] fp32, written: the query's sum and its number of units
#     columns   int;  parameter: the loss's pos_weight, margin or temperature
#
# ONE_BLOCK (columns <= BLOCK): scores and targets are read once and stay in registers; a pairwise
# loss takes its tile of documents j out of the block of documents i by tl.gather. A longer list is
# walked in blocks, each tile read again (from L1 or L2). Either way the [BLOCK, TILE] pairs live in
# registers only. Nothing is added atomically: the same input gives the same bits.
# No program knows the number of units of the whole batch, so the gradient is divided by it where
# the upstream gradient is multiplied in, and stays fp32 until then: a sum over pairs can exceed
# fp16.


def _jit(function):
    return triton.jit(function, do_not_specialize=["columns"]) if triton else function


@_jit
def _row(scores, targets, gradient, lengths, columns):
    """The three pointers moved to this program's query, by a 64-bit offset, and its number of
    documents."""
    query = tl.program_id(0).to(tl.int64)
    n = columns
    if lengths is not None:
        n = tl.minimum(tl.maximum(tl.load(lengths + query), 0), columns).to(tl.int32)
    return scores + query * columns, targets + query * columns, gradient + query * columns, n


@_jit
def _read(row, i, n):
    """row[i] in fp32; 0 at i >= n, where memory is not touched."""
    return tl.load(row + i, mask=i < n, other=0).to(tl.float32)


@_jit
def _tile(block, row, j, n, ONE_BLOCK: tl.constexpr):
    """row[j] in fp32: out of the registers that hold the list, or read from memory."""
    if ONE_BLOCK:
        return tl.gather(block, j, 0)
    return _read(row, j, n)


@_jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], exact to rounding where 1 + x is not."""
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u


@_jit
def _softmax_mass(top, mass, x, sharpness):
    """Maximum of a list so far, and its sum of exp((x - maximum) / T), with the next block x
    added."""
    higher = tl.maximum(top, tl.max(x, 0))
    mass = mass * tl.exp((top - higher) * sharpness) + tl.sum(tl.exp((x - higher) * sharpness), 0)
    return higher, mass


@_jit
def _finish(partials, total, units):
    """Write this query's sum and number of units."""
    query = tl.program_id(0).to(tl.int64)
    tl.store(partials + query, total)
    tl.store(partials + tl.num_programs(0) + query, units)


@_jit
def _bce_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i  w t softplus(-s) + (1 - t) softplus(s)
    gradient  (1 - t) sigmoid(s) - w t sigmoid(-s)
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    total = 0.0
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        s, t = _read(scores, i, n), _read(targets, i, n)
        e = tl.exp(-tl.abs(s))
        tail = _log1p(e)  # softplus(x) = max(x, 0) + tail
        softplus, softplus_minus = tl.maximum(s, 0.0) + tail, tl.maximum(-s, 0.0) + tail
        each = parameter * t * softplus_minus + (1.0 - t) * softplus
        up = tl.where(s >= 0, 1.0, e) / (1.0 + e)  # sigmoid(s)
        down = tl.where(s >= 0, e, 1.0) / (1.0 + e)  # sigmoid(-s)
        slope = (1.0 - t) * up - parameter * t * down
        total += tl.sum(tl.where(i < n, each, 0.0), 0)
        tl.store(gradient + i, tl.where(i < n, slope, 0.0), mask=i < columns)
    _finish(partials, total, n)


@_jit
def _hinge_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum over t_i > 0 >= t_j of max(0, margin - (s_i - s_j))
    gradient  each pair above 0 gives -1 to i, +1 to j
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    i = tl.arange(0, BLOCK)
    s, t = _read(scores, i, n), _read(targets, i, n)
    total = 0.0
    positives = 0.0
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        side = tl.where(t > 0, 1.0, -1.0)
        slack = tl.zeros([BLOCK], tl.float32)
        active = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, TILE):
            j = first + tl.arange(0, TILE)
            s_j = _tile(s, scores, j, n, ONE_BLOCK)
            t_j = _tile(t, targets, j, n, ONE_BLOCK)
            pair = (i < n)[:, None] & (j < n)[None, :] & ((t > 0)[:, None] != (t_j > 0)[None, :])
            gap = parameter - side[:, None] * (s[:, None] - s_j[None, :])
            gap = tl.where(pair, tl.maximum(gap, 0.0), 0.0)
            slack += tl.sum(gap, 1)
            active += tl.sum(tl.where(gap > 0, 1.0, 0.0), 1)
        total += tl.sum(tl.where(t > 0, slack, 0.0), 0)
        positives += tl.sum(tl.where((i < n) & (t > 0), 1.0, 0.0), 0)
        tl.store(gradient + i, -side * active, mask=i < columns)
    _finish(partials, total, positives * (n - positives))


@_jit
def _marginmse_first_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_j e_j^2,  e_j = (s_0 - s_j) - (t_0 - t_j)
    gradient  -2 e_j at j > 0,  2 sum_j e_j at 0
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    i = tl.arange(0, BLOCK)
    s, t = _read(scores, i, n), _read(targets, i, n)
    s_0, t_0 = tl.sum(tl.where(i == 0, s, 0.0), 0), tl.sum(tl.where(i == 0, t, 0.0), 0)
    total = 0.0
    pull = 0.0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        error = tl.where(i < n, (s_0 - s) - (t_0 - t), 0.0)
        total += tl.sum(error * error, 0)
        pull += tl.sum(error, 0)
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        error = tl.where(i < n, (s_0 - s) - (t_0 - t), 0.0)
        tl.store(gradient + i, 2.0 * tl.where(i == 0, pull, -error), mask=i < columns)
    _finish(partials, total, tl.maximum(n - 1, 0))


@_jit
def _marginmse_all_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum over i < j of (d_i - d_j)^2,  d_i = (s_i - s_0) - (t_i - t_0)
    gradient  2 n (d_i - m),  m = mean d

    The sum equals n sum_i (d_i - m)^2, which spares the n^2 pairs. Column 0 is taken off first so
    that scores far from 0 lose no more digits than in a difference of two of them.
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    size = n.to(tl.float32)
    i = tl.arange(0, BLOCK)
    s, t = _read(scores, i, n), _read(targets, i, n)
    s_0, t_0 = tl.sum(tl.where(i == 0, s, 0.0), 0), tl.sum(tl.where(i == 0, t, 0.0), 0)
    mean = 0.0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        mean += tl.sum(tl.where(i < n, (s - s_0) - (t - t_0), 0.0), 0) / size
    total = 0.0
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        off = tl.where(i < n, (s - s_0) - (t - t_0) - mean, 0.0)
        total += size * tl.sum(off * off, 0)
        tl.store(gradient + i, 2.0 * size * off, mask=i < columns)
    _finish(partials, total, size * (size - 1.0) / 2.0)


@_jit
def _infonce_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i -y_i log p_i,  p = softmax(s / T),  y_i = [t_i > 0] / positives
    gradient  (p_i - y_i) / T
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    sharpness = 1.0 / parameter
    i = tl.arange(0, BLOCK)
    s, t = _read(scores, i, n), _read(targets, i, n)
    top = float("-inf")
    mass = 0.0
    positives = 0.0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        top, mass = _softmax_mass(top, mass, tl.where(i < n, s, float("-inf")), sharpness)
        positives += tl.sum(tl.where((i < n) & (t > 0), 1.0, 0.0), 0)
    counts = (n > 1) & (positives > 0)
    mass = tl.where(counts, mass, 1.0)
    share = tl.where(counts, 1.0 / tl.maximum(positives, 1.0), 0.0)
    total = 0.0
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        inside = (i < n) & counts
        z = tl.where(inside, s - top, 0.0) * sharpness
        target = tl.where(inside & (t > 0), share, 0.0)
        total += tl.sum(target * (tl.log(mass) - z), 0)
        slope = (tl.exp(z) / mass - target) * sharpness
        tl.store(gradient + i, tl.where(inside, slope, 0.0), mask=i < columns)
    _finish(partials, total, tl.where(counts, 1.0, 0.0))


@_jit
def _ranknet_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum over t_i > t_j of softplus(-x),  x = s_i - s_j
    gradient  each pair gives -sigmoid(-x) to i, sigmoid(-x) to j
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    i = tl.arange(0, BLOCK)
    s, t = _read(scores, i, n), _read(targets, i, n)
    total = 0.0
    pairs = 0.0
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        loss = tl.zeros([BLOCK], tl.float32)
        below = tl.zeros([BLOCK], tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, TILE):
            j = first + tl.arange(0, TILE)
            s_j = _tile(s, scores, j, n, ONE_BLOCK)
            t_j = _tile(t, targets, j, n, ONE_BLOCK)
            inside = (i < n)[:, None] & (j < n)[None, :]
            better = inside & (t[:, None] > t_j[None, :])
            worse = inside & (t[:, None] < t_j[None, :])
            side = tl.where(better, 1.0, 0.0) - tl.where(worse, 1.0, 0.0)
            # how far the pair is ordered as the teacher has it
            margin = side * (s[:, None] - s_j[None, :])
            e = tl.exp(-tl.abs(margin))
            loss += tl.sum(tl.where(better, tl.maximum(-margin, 0.0) + _log1p(e), 0.0), 1)
            slope -= tl.sum(side * tl.where(margin >= 0, e, 1.0) / (1.0 + e), 1)
            below += tl.sum(tl.where(better, 1.0, 0.0), 1)
        total += tl.sum(loss, 0)
        pairs += tl.sum(below, 0)
        tl.store(gradient + i, slope, mask=i < columns)
    _finish(partials, total, pairs)


@_jit
def _adrmse_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter, weights,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i (r_i - pi_i)^2 / log2(pi_i + 1)
    gradient  sum_j (w_j - w_i) sigmoid'((s_i - s_j) / T) / T
    w_i = 2 (r_i - pi_i) / log2(pi_i + 1)

    as d r_j / d s_i = sigmoid'((s_i - s_j) / T) / T and d r_i / d s_i is minus their sum over j.
    weights [queries, columns] fp32 keeps w of lists longer than a block (not touched otherwise):
    the gradient of a document needs the w of all.
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    weights += tl.program_id(0).to(tl.int64) * columns
    sharpness = 1.0 / parameter
    i = tl.arange(0, BLOCK)
    s, t = _read(scores, i, n), _read(targets, i, n)
    w = tl.zeros([BLOCK], tl.float32)
    total = 0.0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        beaten = tl.zeros([BLOCK], tl.float32)  # r_i - 1
        behind = tl.zeros([BLOCK], tl.float32)  # pi_i - 1
        for first in range(0, n, TILE):
            j = first + tl.arange(0, TILE)
            s_j = _tile(s, scores, j, n, ONE_BLOCK)
            t_j = _tile(t, targets, j, n, ONE_BLOCK)
            pair = (i < n)[:, None] & (j < n)[None, :] & (i[:, None] != j[None, :])
            x = (s[:, None] - s_j[None, :]) * sharpness
            e = tl.exp(-tl.abs(x))
            beaten += tl.sum(tl.where(pair, tl.where(x >= 0, e, 1.0) / (1.0 + e), 0.0), 1)
            level = tl.where(t[:, None] == t_j[None, :], 0.5, 0.0)
            lead = tl.where(t[:, None] < t_j[None, :], 1.0, level)
            behind += tl.sum(tl.where(pair, lead, 0.0), 1)
        error = tl.where(i < n, beaten - behind, 0.0)
        discount = tl.log2(behind + 2.0)
        total += tl.sum(error * error / discount, 0)
        w = 2.0 * error / discount
        if not ONE_BLOCK:
            tl.store(weights + i, w, mask=i < n)
    if not ONE_BLOCK:
        tl.debug_barrier()  # the weights written by all threads of the program, before any is read
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, w = _read(scores, i, n), _read(weights, i, n)
        slope = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, TILE):
            j = first + tl.arange(0, TILE)
            s_j = _tile(s, scores, j, n, ONE_BLOCK)
            w_j = _tile(w, weights, j, n, ONE_BLOCK)
            inside = (i < n)[:, None] & (j < n)[None, :]
            e = tl.exp(-tl.abs(s[:, None] - s_j[None, :]) * sharpness)
            pull = (w_j[None, :] - w[:, None]) * e / ((1.0 + e) * (1.0 + e))
            slope += tl.sum(tl.where(inside, pull, 0.0), 1)
        tl.store(gradient + i, slope * sharpness, mask=i < columns)
    _finish(partials, total, tl.where(n > 1, n, 0))


@_jit
def _kl_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i p_i (log p_i - log q_i),  p = softmax(t / T),  q = softmax(s / T)
    gradient  (q_i - p_i) / T
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    sharpness = 1.0 / parameter
    i = tl.arange(0, BLOCK)
    s, t = _read(scores, i, n), _read(targets, i, n)
    s_top, t_top = float("-inf"), float("-inf")
    s_mass, t_mass = 0.0, 0.0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        s_top, s_mass = _softmax_mass(s_top, s_mass, tl.where(i < n, s, float("-inf")), sharpness)
        t_top, t_mass = _softmax_mass(t_top, t_mass, tl.where(i < n, t, float("-inf")), sharpness)
    counts = n > 1
    s_mass, t_mass = tl.where(counts, s_mass, 1.0), tl.where(counts, t_mass, 1.0)
    total = 0.0
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if not ONE_BLOCK:
            s, t = _read(scores, i, n), _read(targets, i, n)
        inside = (i < n) & counts
        log_q = tl.where(inside, s - s_top, 0.0) * sharpness - tl.log(s_mass)
        log_p = tl.where(inside, t - t_top, 0.0) * sharpness - tl.log(t_mass)
        q, p = tl.exp(log_q), tl.exp(log_p)
        total += tl.sum(tl.where(inside, p * (log_p - log_q), 0.0), 0)
        tl.store(gradient + i, tl.where(inside, (q - p) * sharpness, 0.0), mask=i < columns)
    _finish(partials, total, tl.where(counts, 1.0, 0.0))


@_jit
def _mse_kernel(
    scores, targets, lengths, gradient, partials, columns, parameter,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i (s_i - t_i)^2
    gradient  2 (s_i - t_i)
    """
    scores, targets, gradient, n = _row(scores, targets, gradient, lengths, columns)
    total = 0.0
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        error = _read(scores, i, n) - _read(targets, i, n)  # 0 at i >= n
        total += tl.sum(error * error, 0)
        tl.store(gradient + i, 2.0 * error, mask=i < columns)
    _finish(partials, total, n)


@_jit
def _mean_kernel(partials, loss, scale, queries, BLOCK: tl.constexpr):
    """partials [2, queries] -> loss [] = sum / units, scale [] = 1 / units; without units 0, 1."""
    total = tl.zeros([BLOCK], tl.float32)
    units = tl.zeros([BLOCK], tl.float32)
    for start in range(0, queries, BLOCK):
        query = start + tl.arange(0, BLOCK)
        total += _read(partials, query, queries)
        units += _read(partials + queries, query, queries)
    number = tl.maximum(tl.sum(units, 0), 1.0)
    tl.store(loss, tl.sum(total, 0) / number)
    tl.store(scale, 1.0 / number)


_KERNELS = {
    "bce": _bce_kernel,
    "hinge": _hinge_kernel,
    "marginmse_first": _marginmse_first_kernel,
    "marginmse_all": _marginmse_all_kernel,
    "infonce": _infonce_kernel,
    "ranknet": _ranknet_kernel,
    "adrmse": _adrmse_kernel,
    "kl": _kl_kernel,
    "mse": _mse_kernel,
}

# For tests and benchmarks: True runs the kernels (interpreted on a CPU), False the formulas.
_kernels = None


def _use_kernels(scores):
    wanted = scores.is_cuda if _kernels is None else _kernels
    return wanted and triton is not None and scores.dtype != torch.float64 and scores.numel() > 0


def _configuration(name, columns):
    """Compile-time arguments of a loss's kernel for lists of so many columns, and its number of
    warps."""
    block = min(max(16, triton.next_power_of_2(columns)), MAX_BLOCK)
    # A thread holds 4 to 8 pairs, or 8 documents: with more of them ptxas begins to spill.
    warps = block // 32 if name in ("hinge", "ranknet", "adrmse") else block // 256
    if name == "adrmse" and columns > block:
        warps = 8  # with 16, ptxas held to 64 registers on sm_80 spills 8 bytes (Triton 3.9)
    return {"BLOCK": block, "TILE": TILE, "ONE_BLOCK": columns <= block}, min(max(warps, 1), 16)


# Named after the module, so that a copy of this file and the original can live in one process.
@torch.library.custom_op(
    f"{__name__.replace('.', '_')}::fused",
    mutates_args=(),
    schema="(Tensor scores, Tensor targets, Tensor? lengths, str name, float parameter)"
    " -> (Tensor, Tensor, Tensor)",
)
def _fused(scores, targets, lengths, name, parameter):
    """-> loss [], gradient of the sum [queries, columns], 1 / units []; all fp32.

    Two launches, the loss's kernel and the sum of its partials over queries; the host waits for
    neither.
    """
    queries, columns = scores.shape
    scores, targets = scores.contiguous(), targets.contiguous()
    lengths = lengths if lengths is None else lengths.contiguous()
    if targets.dtype == torch.bool:
        targets = targets.view(torch.uint8)
    gradient = torch.empty(queries, columns, dtype=torch.float32, device=scores.device)
    partials = torch.empty(2, queries, dtype=torch.float32, device=scores.device)
    loss, scale = (torch.empty((), dtype=torch.float32, device=scores.device) for _ in range(2))
    meta, warps = _configuration(name, columns)
    if name == "adrmse":
        meta["weights"] = gradient if meta["ONE_BLOCK"] else torch.empty_like(gradient)
    with torch.cuda.device_of(scores):
        _KERNELS[name][queries,](
            scores, targets, lengths, gradient, partials, columns, parameter,
            num_warps=warps, **meta,
        )  # fmt: skip
        _mean_kernel[1,](partials, loss, scale, queries, BLOCK=MAX_BLOCK, num_warps=4)
    return loss, gradient, scale


@_fused.register_fake
def _(scores, targets, lengths, name, parameter):
    return tuple(scores.new_empty(shape, dtype=torch.float32) for shape in ((), scores.shape, ()))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *internal):
    if any(grad is not None for grad in internal):
        raise NotImplementedError("the fused losses have no second derivative: use float64 scores")
    gradient, scale = ctx.saved_tensors
    return (gradient * (upstream * scale)).to(ctx.dtype), None, None, None, None


_fused.register_autograd(_backward, setup_context=_save)
