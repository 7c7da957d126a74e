"""Kernels that a training step launches, by kind, counted without a card; and what it keeps.

    python tests/bench launches [--models bert ...]

train.py's own step takes a card's way on a CPU, in bf16, on eight documents (the paper's batches
are one micro-batch too, so the number changes nothing). Every operator that is neither a view nor
an allocation counts as the kernels that torch 2.11 launches for it, by its sources (KERNELS; lists
of tensors by the chunks of its multi-tensor kernels); every Triton launch as one. Beside it a loop
over Hugging Face's padded forward (autocast, SDPA, its fused attention as one and three, clipping,
fused AdamW). `kept` is what a forward pass leaves for the backward pass, a token.

A count is not a time: gpu.md says what a launch costs, `python tests/bench gpu` measures.
"""

import argparse
import contextlib
from collections import Counter
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from bench.memory import list_step
from bench.scoring import DEBERTA_V3_BASE, word_tokenizer
from bench.step import fused_adamw
from kernels import attention, losses
from kernels import step as steps
from kernels.encoder import CrossEncoder

MODELS = {  # by train.py's names
    "minilm": transformers.BertConfig(hidden_size=384, intermediate_size=1536, num_labels=1),
    "bert": transformers.BertConfig(num_labels=1),
    "modernbert": transformers.ModernBertConfig(classifier_pooling="mean", num_labels=1),
    "deberta": transformers.DebertaV2Config(**DEBERTA_V3_BASE, num_labels=1),
}
DOCUMENTS = 8
# views and allocations; aminmax looks at lengths on the host
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach",
        "_local_scalar_dense", "lift_fresh", "is_same_size", "_reshape_alias",
        "aminmax"}  # fmt: skip
KERNELS = {  # of one call, where it is not one
    "embedding_dense_backward": 8,  # sorted by index; 2 up to 3,072 indices, but slow ones
    "native_layer_norm_backward": 2,
    "index_put_": 9,
    "_index_put_impl_": 9,
    "index_put": 2,
    "linalg_vector_norm": 2,
}
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "attention": ("flash_forward", "flash_backward", "_forward_kernel", "_backward_q_kernel",
                  "_backward_kv_kernel"),
    "casts": ("_to_copy", "_foreach_copy_"),
    "sums": ("add", "add_", "sum", "_foreach_add_", "zeros", "zero_", "zeros_like", "new_zeros"),
}  # fmt: skip
# of torch's multi-tensor kernels: numbers of a chunk, chunks of a launch
CHUNK, BLOCKS = 65536, 320
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of a launch, by the number of lists


def list_launches(lists) -> int:
    """Launches of a multi-tensor kernel over lists of tensors of equal sizes."""
    launches = tensors = chunks = 0
    for tensor in lists[0]:
        tensors += 1
        left = -(-tensor.numel() // CHUNK)
        while left:
            taken = min(left, BLOCKS - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == BLOCKS:
                launches, chunks, tensors = launches + 1, 0, int(left > 0)
        if tensors == TENSORS[len(lists)]:
            launches, chunks, tensors = launches + 1, 0, 0
    return launches + (chunks > 0)


class Launches(TorchDispatchMode):
    """Counts kernels by the name of their operator. `now`: the one that stand-ins count for."""

    now = None

    def __init__(self):
        super().__init__()
        self.found = Counter()
        Launches.now = self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if func.namespace == "aten" and not func.is_view and name not in FREE:
            self.found[name] += self._kernels(name, args)
        return result

    @staticmethod
    def _kernels(name, args) -> int:
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and torch.is_tensor(a[0])]
        if name == "_foreach_norm":
            return list_launches(lists[:1]) + 2
        if "_fused_adam" in name:
            return list_launches(lists[:4])
        if lists and name.startswith("_foreach"):
            return list_launches(lists)
        return KERNELS.get(name, 1)

    def by_kind(self) -> dict[str, int]:
        kinds = dict.fromkeys([*KINDS, "rest"], 0)
        for name, count in self.found.items():
            kind = next((kind for kind, names in KINDS.items() if name in names), "rest")
            kinds[kind] += count
        return kinds


class Attention(torch.autograd.Function):
    """Stands for a fused attention of torch's: its name is counted, its numbers are not
    computed."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        Launches.now.found["flash_forward"] += 1
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, gradient):
        Launches.now.found["flash_backward"] += 3
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def padded_attention(query, key, value, *args, **how):
    return Attention.apply(query, key, value)


def dropped(x, p=0.5, training=True, inplace=False):
    """As on a card: one kernel."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


@contextlib.contextmanager
def as_on_a_card():
    """Inside, a CPU takes a card's way, Triton's launches and FlashAttention are counted and
    withheld."""

    def withheld(kernel, *args, **kwargs):
        Launches.now.found[kernel.fn.__name__] += 1

    def to_host(tensor):
        return lambda: torch.zeros(2)

    with contextlib.ExitStack() as stack:
        for target, name, stand_in in (
            (attention, "_gpu_path", True),
            (losses, "_kernels", True),
            (steps, "to_host", to_host),
            (F, "dropout", dropped),
            (F, "scaled_dot_product_attention", padded_attention),
            (triton.runtime.jit.JITFunction, "run", withheld),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        yield


def our_step(model):
    """-> run(), train.py's step in bf16 over one list; the encoder; its packed batch."""
    encoder = CrossEncoder(model, word_tokenizer(model.config.vocab_size)).train()
    step, batch = list_step(encoder, DOCUMENTS, "bfloat16")
    step.gradient.keep = 10**6
    return (lambda: step(1, batch)), encoder, encoder.pack(batch.queries, batch.documents)


def padded_step(model):
    """-> run(), the loop over Hugging Face's forward of one padded batch."""
    model.train()
    optimizer = fused_adamw(model)
    lengths = torch.arange(30, 30 + DOCUMENTS)
    ids = torch.zeros(DOCUMENTS, int(lengths.max()), dtype=torch.int64)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    positives = torch.zeros(1, dtype=torch.int64)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(input_ids=ids, attention_mask=mask).logits
        F.cross_entropy(scores.float().view(1, DOCUMENTS), positives).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def counted(run) -> Launches:
    """The launches of the second call: the first one makes AdamW's state and what is kept."""
    Launches()
    run()
    with Launches() as launches:
        run()
    return launches


def kept_bytes(encoder, packed) -> float:
    """Bytes a token that a forward pass in bf16 keeps, weights and their copies left out."""
    kept = {}
    copies = encoder.narrow(torch.bfloat16).copies
    weights = {t.untyped_storage()._cdata for t in (*encoder.parameters(), *copies)}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", torch.bfloat16):
        encoder(packed)
    return sum(size for size, _ in kept.values()) / sum(packed.lengths)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/bench launches", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--names", action="store_true",
                        help="the operators too, most launched first")
    args = parser.parse_args(argv)
    kinds = [*KINDS, "rest"]
    print(f"| model | side | kernels | {' | '.join(kinds)} | kept, kB a token |")
    print("|---|---|" + "---:|" * (len(kinds) + 2))
    for name in args.models:
        model = transformers.AutoModelForSequenceClassification.from_config(MODELS[name])
        with as_on_a_card():
            theirs = counted(padded_step(model))
            run, encoder, packed = our_step(model)
            ours = counted(run)
            Launches()
            kept = kept_bytes(encoder, packed)
        for side, launches, last in (("Hugging Face padded", theirs, ""),
                                     ("ours", ours, f"{kept / 1e3:.0f}")):
            found = launches.by_kind()
            cells = " | ".join(str(found[kind]) for kind in kinds)
            print(f"| {name} | {side} | {sum(found.values())} | {cells} | {last} |", flush=True)
            if args.names:
                print(", ".join(f"{op} {n}" for op, n in launches.found.most_common()), flush=True)
    return 0
