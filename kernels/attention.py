"""Attention over packed sequences: one row per token, no padding.

`varlen_attention` runs flash-attn's `flash_attn_varlen_func` where it is installed and takes the inputs, this
project's Triton kernel (`kernels.flash`) on any other CUDA tensor, and on a CPU torch's own products on runs of
sequences of equal length (sequences sorted by length make long runs; any order is right).
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


_of_thread = threading.local()


@contextmanager
def dropout_from(seed: int, device):
    """Dropout inside follows from `seed`. On a CPU by a generator of the calling thread, as torch's own is one for all
    threads and micro-batches run side by side; on CUDA by torch's generators, which are seeded."""
    if device.type != "cpu":
        torch.manual_seed(seed)
        yield
        return
    _of_thread.generator = np.random.Generator(np.random.SFC64(seed))
    try:
        yield
    finally:
        _of_thread.generator = None


def dropout(x, p: float):
    """x with each element zeroed with probability p and scaled by 1 / (1 - p) else; see dropout_from.

    Under dropout_from on a CPU p is rounded to 1/65536, in both places: 16 bits a mask element are drawn several times
    as fast as torch's Bernoulli numbers, which cost an eighth of a training step.
    """
    generator = getattr(_of_thread, "generator", None)
    if generator is None or not 0 < p < 1:
        return F.dropout(x, p)
    kept = min(max(round((1 - p) * 65536), 1), 65535)
    draws = torch.from_numpy(generator.integers(-32768, 32768, x.shape, dtype=np.int16))
    return x * (draws < kept - 32768).to(x.dtype).mul_(65536 / kept)


@dataclass(frozen=True)
class DisentangledBias:
    """DeBERTa's two position terms (He et al. 2021, eq. 4).

    score(i, j) = scale * (q_i . k_j + q_i . pos_key[slot] + k_j . pos_query[slot]), slot of the distance i - j.

    pos_key, pos_query [slots, heads, head_dim] or None where the model lacks the term;
    lut int64 [2M-1]: slot of the distance i - j stands at lut[i - j + M - 1], M >= the longest sequence.
    """

    pos_key: torch.Tensor | None
    pos_query: torch.Tensor | None
    lut: torch.Tensor


def varlen_attention(q, k, v, cu_seqlens, max_seqlen, *, lengths=None, cu_seqlens_q=None, max_seqlen_q=None,
                     window=None, bias=None, scale=None, dropout=0.0, seed=None, deterministic=False):
    """softmax(scale * q k^T + bias) v within every sequence of a packed batch -> [query rows, heads, head_dim].

    q [query rows, heads, head_dim], k and v [tokens, heads, head_dim], one dtype; cu_seqlens int32
    [sequences+1], the starts of the sequences and the total; lengths: the same on the host (a list of int: spares
    a device synchronisation; used on a CPU). cu_seqlens_q and max_seqlen_q = 1 say that q holds one row per
    sequence, its first token's (the [CLS]-only last layer); without them q has a row for every token.
    window w: only keys with |i - j| <= w, both ends included; None: all. scale: head_dim ** -0.5 by default.
    dropout: of the attention probabilities. It follows torch's generator (or dropout_from's) on a CPU and flash-attn's
    own rule with flash-attn; the Triton kernel takes `seed`, drawn from torch's CPU generator when None, so restoring
    the state of torch's generators brings the same mask back. deterministic: of the backward pass on CUDA.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    one_row = cu_seqlens_q is not None
    if one_row and (window is not None or max_seqlen_q != 1):
        raise ValueError("queries other than all tokens: one row per sequence and no window (crop the keys instead)")
    if not q.is_cuda:
        if lengths is None:
            lengths = cu_seqlens.diff().tolist()
        return _by_runs(q, k, v, tuple(lengths), one_row, window, bias, scale, dropout)
    if cu_seqlens_q is None:
        cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
    if bias is None and _flash_attn_takes(q):
        # Positional names as in flash-attn 2.8's source. Its windows and causal masks are aligned to the bottom
        # right corner where queries and keys differ in number; that case never has a window here (checked above).
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen, dropout_p=dropout, softmax_scale=scale, causal=False,
            window_size=(-1, -1) if window is None else (window, window), deterministic=deterministic,
        )
    from kernels.flash import flash_varlen

    tables = {}
    if bias is not None:
        if bias.pos_key is not None:
            tables["c2p"] = torch.einsum("thd,shd->ths", q, bias.pos_key)
        if bias.pos_query is not None:
            tables["p2c"] = torch.einsum("thd,shd->ths", k, bias.pos_query)
        tables["lut"] = bias.lut.to(torch.int32)
    if dropout and seed is None:
        seed = int(torch.randint(2**31 - 1, ()))
    return flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale=scale, window=window,
                        dropout=dropout, seed=seed or 0, deterministic=deterministic, **tables)


def _flash_attn_takes(q):
    """flash-attn 2.8 takes fp16 and bf16, head dimensions up to 256 and cards from Ampere (8.0) on."""
    return (flash_attn_varlen_func is not None and q.dtype in (torch.float16, torch.bfloat16)
            and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0))


def _by_runs(q, k, v, lengths, one_row, window, bias, scale, p):
    """The CPU path: consecutive sequences of equal length are a dense batch, viewed in place."""
    runs = [(sum(1 for _ in run), length) for length, run in groupby(lengths)]
    tokens = [n * length for n, length in runs]
    rows = [n for n, _ in runs] if one_row else tokens
    outs = []
    # torch's fused attention has no dropout on a CPU, and in bf16 a backward pass 3 to 5 times as slow as the products
    fused = bias is None and not p and not (q.requires_grad and q.dtype == torch.bfloat16)
    for (n, length), q_run, k_run, v_run in zip(runs, q.split(rows), k.split(tokens), v.split(tokens), strict=True):
        # [n, heads, rows, head_dim] without a copy: the heads of a packed row stay where the product wrote them
        q_run, k_run, v_run = (t.unflatten(0, (n, -1)).transpose(1, 2) for t in (q_run, k_run, v_run))
        mask = _band(length, window) if window is not None and length > window + 1 else None
        if fused:
            out = F.scaled_dot_product_attention(q_run, k_run, v_run, attn_mask=mask, scale=scale)
        else:
            add = _bias_of_cls if one_row else _bias_of_all
            scores = scale * (q_run @ k_run.transpose(-1, -2) if bias is None else add(q_run, k_run, bias, length))
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            out = dropout(scores.softmax(-1), p) @ v_run
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@lru_cache(maxsize=64)
def _band(length, window):
    position = torch.arange(length)
    return (position[:, None] - position[None, :]).abs() <= window


def _bias_of_all(q, k, bias, length):
    """q.k + content-to-position + position-to-content, [n, heads, length, length], unscaled.

    The tables are laid out by distance first (2 length - 1 of them), so that one product gives every term of a row
    and row i's own window starts one column further left than row i-1's: reading the product with a row one
    element shorter is that shift, a view instead of a gather.
    """
    centre = bias.lut.shape[0] // 2
    near = bias.lut[centre - length + 1 : centre + length]  # slots of the distances -(length-1) .. length-1
    scores = q @ k.transpose(-1, -2)
    if bias.pos_key is not None:
        table = bias.pos_key[near.flip(0)].permute(1, 2, 0)  # column c: distance length-1-c
        scores = scores + _shear(q @ table, length)
    if bias.pos_query is not None:
        table = bias.pos_query[near].permute(1, 2, 0)  # row j, column c: distance c-(length-1) = i-j
        scores = scores + _shear(k @ table, length).transpose(-1, -2)
    return scores


def _shear(product, length):
    """[..., length, 2 length - 1] -> [..., length, length]: element (i, j) is product[i, j - i + length - 1]."""
    if length == 1:
        return product
    flat = product.flatten(-2)[..., length - 1 : length - 1 + length * (2 * length - 2)]
    return flat.unflatten(-1, (length, 2 * length - 2))[..., :length]


def _bias_of_cls(q, k, bias, length):
    """The same for the first row only, [n, heads, 1, length]: the distances are 0, -1, ..., -(length-1)."""
    centre = bias.lut.shape[0] // 2
    slots = bias.lut[centre - length + 1 : centre + 1].flip(0)
    scores = q @ k.transpose(-1, -2)
    if bias.pos_key is not None:
        scores = scores + q @ bias.pos_key[slots].permute(1, 2, 0)
    if bias.pos_query is not None:
        scores = scores + (k * bias.pos_query[slots].transpose(0, 1)).sum(-1).unsqueeze(-2)
    return scores
