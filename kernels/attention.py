"""Attention over packed sequences: one row per token, no padding.

`varlen_attention` on CUDA runs one of three (`backend` says which):

    triton      kernels.flash, which takes everything. Its dropout is exact and all but DeBERTa's
                tables has the same bits each time.
    torch       torch's own FlashAttention-2 (aten::_flash_attention_forward): bf16 and fp16 from
                Ampere on, without a bias; nothing to build. Its dropout rounds p to 8 bits: at
                p = 0.1 it keeps 230 of 256 and scales by 1 / 0.9 (mean 0.9983), and dq beyond 128
                keys is summed by atomics, in any order.
    flash-attn  the package flash-attn 2.8, where it is installed and asked for.

The environment variable ATTENTION=torch|triton|flash-attn asks for one. On a CPU torch's products
run on runs of sequences of equal length (sequences sorted by length make long runs; any order is
right).
"""

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F

from kernels import cpu

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


LONG = 384  # tokens
_of_thread = threading.local()
# for tests and counts: True takes a GPU's way on a CPU, kernels interpreted or withheld
_gpu_path = None


def on_gpu(device) -> bool:
    return device.type == "cuda" if _gpu_path is None else _gpu_path


@contextmanager
def dropout_from(seed: int | torch.Tensor, device):
    """Dropout inside follows from `seed`, a 63-bit integer.

    On CUDA torch's generator of the device is seeded, and kernels that draw by themselves get the
    seed and a number of their own (`next_draw`). On a CPU by a generator of the calling thread, as
    torch's is one for all threads and micro-batches run side by side.

    A pass that is captured to be replayed takes int64 [1] on the device instead, which holds the
    seed when it is replayed; `seed_generator` comes before each replay.
    """
    if isinstance(seed, torch.Tensor):
        _of_thread.seed = seed
    else:
        if on_gpu(device):
            seed_generator(seed, device)
        else:
            _of_thread.numbers = cpu.dropout_numbers(seed)
        _of_thread.seed = torch.full((1,), seed, dtype=torch.int64, device=device)
    _of_thread.site = 0
    try:
        yield
    finally:
        _of_thread.numbers = _of_thread.seed = None


def seed_generator(seed: int, device) -> None:
    """torch's generator of the device as `seed` makes it."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.manual_seed(seed)


def next_draw(device):
    """(seed int64 [1] on the device, number of this dropout), for a kernel that draws its own mask.

    Under dropout_from the numbers count the dropouts of the forward pass, so the same pass again
    draws the same masks; else the seed is drawn from torch's generator of the device.
    """
    seed = getattr(_of_thread, "seed", None)
    if seed is None:
        return torch.randint(2**62, (1,), device=device), 0
    _of_thread.site += 1
    return seed, _of_thread.site


def dropout(x, p: float):
    """x with each element zeroed with probability p and scaled by 1 / (1 - p) else; see
    dropout_from (and cpu.dropout, which rounds p)."""
    numbers = getattr(_of_thread, "numbers", None)
    if numbers is None or not 0 < p < 1:
        return F.dropout(x, p)
    return cpu.dropout(x, p, numbers)


@dataclass(frozen=True)
class DisentangledBias:
    """DeBERTa's two position terms (He et al. 2021, eq. 4).

    score(i, j) = scale * (q_i . k_j + q_i . pos_key[slot] + k_j . pos_query[slot]), slot of the
    distance i - j.

    pos_key, pos_query [slots, heads, head_dim] or None where the model lacks the term;
    lut int64 or int32 [2M-1]: slot of the distance i - j stands at lut[i - j + M - 1], M >= the
    longest sequence.
    """

    pos_key: torch.Tensor | None
    pos_query: torch.Tensor | None
    lut: torch.Tensor

    def products(self, q, k):
        """q . pos_key and k . pos_query, [rows, heads, slots] each; zeros for the term that the
        model lacks."""
        slots = (self.pos_query if self.pos_key is None else self.pos_key).shape[0]

        def product(x, table):
            if table is None:
                return x.new_zeros(*x.shape[:2], slots)
            return torch.einsum("thd,shd->ths", x, table)

        return product(q, self.pos_key), product(k, self.pos_query)


def varlen_attention(
    q, k, v, cu_seqlens, max_seqlen, *, lengths=None, cu_seqlens_q=None, max_seqlen_q=None,
    window=None, bias=None, scale=None, dropout=0.0, deterministic=False,
):  # fmt: skip
    """softmax(scale * q k^T + bias) v within every sequence of a packed batch -> like q.

    q [query rows, heads, head_dim], k and v [tokens, heads, head_dim], one dtype; cu_seqlens int32
    [sequences + 1], the starts of the sequences and the total; max_seqlen: of the longest, on the
    host; lengths: all of them on the host (a list of int; used on a CPU, where it spares a
    computation). cu_seqlens_q with max_seqlen_q = 1 says that q holds one row per sequence, its
    first token's (the [CLS]-only last layer); without them q has a row for every token.
    window w: only keys with |i - j| <= w, both ends included; None: all. scale: head_dim ** -0.5 by
    default. dropout: of the attention probabilities, drawn as dropout_from says. deterministic:
    the same bits each time on CUDA. Never waits for the card.
    ValueError on another q than the two above, or a back end asked for that is not there.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    one_row = cu_seqlens_q is not None
    if one_row and (window is not None or max_seqlen_q != 1):
        raise ValueError("queries other than all tokens: one row per sequence and no window "
                         "(crop the keys instead)")
    if not on_gpu(q.device):
        if lengths is None:
            lengths = cu_seqlens.diff().tolist()
        return _by_runs(q, k, v, tuple(lengths), one_row, window, bias, scale, dropout)
    rows = (cu_seqlens_q, 1) if one_row else (cu_seqlens, max_seqlen)
    runs = {"torch": _by_torch, "flash-attn": _by_flash_attn, "triton": _by_triton}
    run = runs[backend(q, bias, deterministic, dropout, window, max_seqlen)]
    return run(q, k, v, *rows, cu_seqlens, max_seqlen, window, bias, scale, dropout, deterministic)


def backend(q, bias=None, deterministic=False, dropout=0.0, window=None, longest=0) -> str:
    """"torch", "triton" or "flash-attn": what runs attention on CUDA tensors like q.

    By default the quickest on an H200 (results/gpu.md): torch's for long sequences with dropout,
    whose backward pass is the better one there, else Triton's.

    FlashAttention-2 takes fp16 and bf16, head dimensions that are multiples of 8 up to 256, cards
    from Ampere (8.0) on, and no bias.
    """
    wanted = os.environ.get("ATTENTION") or "auto"
    if wanted not in ("auto", "torch", "triton", "flash-attn"):
        raise ValueError(f"ATTENTION={wanted}: choose torch, triton or flash-attn, or unset it")
    if wanted == "flash-attn" and flash_attn_varlen_func is None:
        raise ValueError("ATTENTION=flash-attn: the package is not installed: "
                         "pip install flash-attn --no-build-isolation, or unset it")
    if wanted == "torch" and not torch_has_flash_attention():
        raise ValueError(
            "ATTENTION=torch: this torch has no FlashAttention-2 of the known form; unset it")
    taken = (
        q.is_cuda
        and bias is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
    if not taken or wanted == "triton":
        return "triton"
    if wanted == "flash-attn":
        return "flash-attn"
    if deterministic or not torch_has_flash_attention():
        return "triton"
    quicker = longest > LONG and dropout and window is None
    return "torch" if quicker or wanted == "torch" else "triton"


@cache
def torch_has_flash_attention() -> bool:
    """Whether torch was built with FlashAttention-2 and its operator is the one `_by_torch` calls:
    a private one, whose schema is the same in torch 2.11 and 2.13 (there with two more at its
    end)."""
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return flash_schema_is_known(operator.default._schema)


def flash_schema_is_known(schema) -> bool:
    names = [argument.name for argument in schema.arguments]
    known = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
             "is_causal", "return_debug_mask", "scale", "window_size_left", "window_size_right"]
    optional = all(argument.has_default_value() for argument in schema.arguments[len(known) :])
    return names[: len(known)] == known and optional and len(schema.returns) == 5


def _by_torch(q, k, v, cu_q, max_q, cu_k, max_k, window, bias, scale, p, deterministic):
    sides = {}
    if window is not None:
        sides = {"window_size_left": window, "window_size_right": window}
    attend = torch.ops.aten._flash_attention_forward
    return attend(q, k, v, cu_q, cu_k, max_q, max_k, p, False, False, scale=scale, **sides)[0]


def _by_flash_attn(q, k, v, cu_q, max_q, cu_k, max_k, window, bias, scale, p, deterministic):
    # Positional names as in flash-attn 2.8's source. Its windows are aligned to the bottom right
    # corner where queries and keys differ in number; that case never has a window here.
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        dropout_p=p, softmax_scale=scale, causal=False, deterministic=deterministic,
        window_size=(-1, -1) if window is None else (window, window),
    )  # fmt: skip


def _by_triton(q, k, v, cu_q, max_q, cu_k, max_k, window, bias, scale, p, deterministic):
    from kernels.flash import flash_varlen

    tables = {}
    if bias is not None:
        c2p, p2c = bias.products(q, k)
        tables = {"c2p": c2p, "p2c": p2c, "lut": bias.lut.to(torch.int32)}
    seed, site = next_draw(q.device) if p else (None, 0)
    return flash_varlen(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window=window, dropout=p, seed=seed,
        site=site, deterministic=deterministic, **tables,
    )  # fmt: skip


def _by_runs(q, k, v, lengths, one_row, window, bias, scale, p):
    """The CPU path: consecutive sequences of equal length are a dense batch, viewed in place."""
    runs = [(sum(1 for _ in run), length) for length, run in groupby(lengths)]
    tokens = [n * length for n, length in runs]
    rows = [n for n, _ in runs] if one_row else tokens
    outs = []
    # torch's fused attention has no dropout on a CPU, and in bf16 a backward pass 3 to 5 times as
    # slow as the products
    fused = bias is None and not p and not (q.requires_grad and q.dtype == torch.bfloat16)
    parts = q.split(rows), k.split(tokens), v.split(tokens)
    for (n, length), *qkv in zip(runs, *parts, strict=True):
        # [n, heads, rows, head_dim] without a copy: the heads of a packed row stay where the
        # product wrote them
        q_run, k_run, v_run = (t.unflatten(0, (n, -1)).transpose(1, 2) for t in qkv)
        mask = _band(length, window) if window is not None and length > window + 1 else None
        if fused:
            out = F.scaled_dot_product_attention(q_run, k_run, v_run, attn_mask=mask, scale=scale)
        else:
            scores = q_run @ k_run.transpose(-1, -2)
            if bias is not None:
                add = _add_bias_of_cls if one_row else _add_bias_of_all
                scores = add(scores, q_run, k_run, bias, length)
            scores = scale * scores
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            out = dropout(scores.softmax(-1), p) @ v_run
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@lru_cache(maxsize=64)
def _band(length, window):
    position = torch.arange(length)
    return (position[:, None] - position[None, :]).abs() <= window


def _add_bias_of_all(scores, q, k, bias, length):
    """scores + content-to-position + position-to-content, [n, heads, length, length], unscaled.

    The tables are laid out by distance first (2 length - 1 of them), so that one product gives
    every term of a row and row i's own window starts one column further left than row i-1's:
    reading the product with a row one element shorter is that shift, a view instead of a gather.
    """
    centre = bias.lut.shape[0] // 2
    near = bias.lut[centre - length + 1 : centre + length]  # distances -(length-1) .. length-1
    if bias.pos_key is not None:
        table = bias.pos_key[near.flip(0)].permute(1, 2, 0)  # column c: distance length-1-c
        scores = scores + _shear(q @ table, length)
    if bias.pos_query is not None:
        # row j, column c: distance c-(length-1) = i-j
        table = bias.pos_query[near].permute(1, 2, 0)
        scores = scores + _shear(k @ table, length).transpose(-1, -2)
    return scores


def _shear(product, length):
    """[..., length, 2 length - 1] -> [..., length, length]: element (i, j) is product[i, j - i +
    length - 1]."""
    if length == 1:
        return product
    flat = product.flatten(-2)[..., length - 1 : length - 1 + length * (2 * length - 2)]
    return flat.unflatten(-1, (length, 2 * length - 2))[..., :length]


def _add_bias_of_cls(scores, q, k, bias, length):
    """The same for the first row only, [n, heads, 1, length]: the distances are 0, -1, ...,
    -(length-1)."""
    centre = bias.lut.shape[0] // 2
    slots = bias.lut[centre - length + 1 : centre + 1].flip(0)
    if bias.pos_key is not None:
        scores = scores + q @ bias.pos_key[slots].permute(1, 2, 0)
    if bias.pos_query is not None:
        scores = scores + (k * bias.pos_query[slots].transpose(0, 1)).sum(-1).unsqueeze(-2)
    return scores
