"""Batches of pairs without padding, cut into micro-batches; their way to the device and back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

TOKENS, PAIRS = 256, 16  # steps of the sizes that batches are padded to


@dataclass
class Packed:
    """A batch of pairs without padding. Rows of one pair are consecutive, pairs in the order given.

    input_ids, token_types, positions int64 [tokens] (int32 on a GPU); cu_seqlens int32 [pairs+1];
    lengths: tokens per pair, on the host.
    """

    input_ids: torch.Tensor
    token_types: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: list[int]

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    def tensors(self) -> list[torch.Tensor]:
        return [self.cu_seqlens, self.input_ids, self.token_types, self.positions]

    def holding(self, tensors: list[torch.Tensor]) -> "Packed":
        """The same batch with these in place of its `tensors`."""
        cu_seqlens, *rows = tensors
        return Packed(*rows, cu_seqlens, self.lengths)

    def to(self, device) -> "Packed":
        device = torch.device(device)
        if device == self.input_ids.device:
            return self
        tensors = self.tensors()
        if device.type == "cuda":
            together, places = one_buffer(tensors)
            (there,) = to_device(device, together)
            tensors = [there[place] for place in places]
        return self.holding([tensor.to(device) for tensor in tensors])


def one_buffer(tensors) -> tuple[torch.Tensor, list[slice]]:
    """int32 copies of the tensors one after the other, and the place of each: at multiples of 16
    bytes, or Triton would compile kernels for both alignments."""
    rooms = [-(-len(t) // 4) * 4 for t in tensors]
    together = torch.zeros(sum(rooms), dtype=torch.int32)
    starts = np.cumsum([0, *rooms]).tolist()
    places = [slice(start, start + len(t)) for start, t in zip(starts, tensors, strict=False)]
    for place, t in zip(places, tensors, strict=True):
        together[place] = t
    return together, places


class Size(NamedTuple):
    """Of a batch: tokens, a multiple of TOKENS, and pairs, one more than a multiple of PAIRS."""

    tokens: int
    pairs: int


def size_of(packed: Packed) -> Size:
    """The least size that holds the batch and a tail of at least one pair."""
    count = len(packed.lengths)
    pairs = -(-count // PAIRS) * PAIRS + 1
    tokens = sum(packed.lengths) + pairs - count
    return Size(-(-tokens // TOKENS) * TOKENS, pairs)


def padded(packed: Packed, size: Size) -> Packed:
    """The batch, on the host, and a tail of [CLS] tokens at the first position: pairs of one token,
    the last one of all that are left. So no pair and no row is empty, and each pair attends to
    itself alone."""
    count, used = len(packed.lengths), sum(packed.lengths)
    tail = [1] * (size.pairs - count)
    tail[-1] = size.tokens - used - len(tail) + 1

    def filled(tensor):
        return F.pad(tensor, (0, size.tokens - used), value=int(tensor[0]))

    ends = used + torch.tensor(tail, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packed(filled(packed.input_ids), filled(packed.token_types), filled(packed.positions),
                  torch.cat([packed.cu_seqlens, ends]), packed.lengths + tail)


def micro_batches(lengths: Sequence[int], max_tokens: int, threads: int = 1) -> list[list[int]]:
    """Indices of the pairs in micro-batches, longest first, each within max_tokens (a longer pair
    stands alone).

    threads: as many micro-batches for each of them, alike to a pair's length, as far as this leaves
    1,024 tokens to each.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    total, longest = sum(lengths), max(lengths, default=0)
    if threads > 1 and total > 1024 and max_tokens >= 2 * longest:
        needed = -(-total // (max_tokens - longest))
        wanted = min(-(-needed // threads) * threads, max(total // 1024, needed))
        batches, before = [[] for _ in range(wanted)], 0
        for i in order:
            batches[before * wanted // total].append(i)
            before += lengths[i]
        return [batch for batch in batches if batch]
    batches, room = [], 0
    for i in order:
        if lengths[i] > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def default_max_tokens(device, training: bool) -> int:
    """Tokens of a micro-batch. On a CPU small ones win: their buffers stay in the cache; a GPU
    wants large ones."""
    if torch.device(device).type == "cpu":
        return 1664 if training else 2048
    return 16384 if training else 65536


def kept_bytes(config, dtype) -> int:
    """Bytes that a token's forward pass keeps for the backward pass, products in dtype: in bf16 36
    to 37 a layer and hidden unit by count (`python tests/bench launches`, and attention's result),
    taken for 40; twice in fp32; DeBERTa's two tables besides."""
    units = 40 * config.hidden_size
    if config.model_type == "deberta-v2":
        buckets = config.position_buckets
        slots = 2 * (buckets if buckets > 0 else config.max_position_embeddings)
        units += 2 * 2 * config.num_attention_heads * slots
    return config.num_hidden_layers * units * dtype.itemsize // 2


def to_device(device, *tensors):
    """Tensors of the host on the device, without waiting for what it computes."""
    if device.type != "cuda":
        return tensors
    return [t.pin_memory().to(device, non_blocking=True) for t in tensors]


def to_host(tensor) -> Callable[[], torch.Tensor]:
    """Begins to copy a tensor of the device; the function returned waits for it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait():
        copied.synchronize()
        return host

    return wait
