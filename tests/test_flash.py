"""kernels.flash against attention in float64 and Hugging Face's eager DeBERTa-v2 attention.

Without a GPU the kernels run in Triton's interpreter; `pytest -m gpu` on a card runs the same tests
there.
"""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import flash
from kernels.flash import flash_varlen

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
SLOW = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Triton 3.9's interpreter multiplies the bit patterns of bf16 matrices: take the numbers."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def values(x):
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(values(a), values(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def offsets(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)


def attention(q, k, v, lengths_q, lengths_k, scale, window=None, c2p=None, p2c=None, lut=None,
              z=None):
    """The formulas at the top of kernels/flash.py, one sequence at a time, in the dtype of q.

    z: [tokens_q, heads, longest]
    """
    outs, a, b = [], 0, 0
    for n, m in zip(lengths_q, lengths_k, strict=True):
        s = torch.einsum("rhd,chd->hrc", q[a : a + n], k[b : b + m])
        rows, columns = (torch.arange(length, device=q.device) for length in (n, m))
        delta = rows[:, None] - columns[None, :]
        if c2p is not None:
            slot = lut.long()[delta + (len(lut) - 1) // 2].expand(s.shape)
            s = s + c2p[a : a + n].transpose(0, 1).gather(2, slot)
            s = s + p2c[b : b + m].transpose(0, 1).gather(2, slot.transpose(1, 2)).transpose(1, 2)
        s = s * scale
        if window is not None:
            s = s.masked_fill(delta.abs() > window, -math.inf)
        p = s.softmax(-1).nan_to_num(0.0) if m else s  # a row without any key: zeros
        if z is not None:
            p = p * z[a : a + n, :, :m].transpose(0, 1).to(p.dtype)
        outs.append(torch.einsum("hrc,chd->rhd", p, v[b : b + m]))
        a, b = a + n, b + m
    return torch.cat(outs)


def inputs(lengths_q, lengths_k, d, heads=2, dtype=torch.float32, slots=0, seed=0):
    """Leaves q, k, v (and tables), the gradient of the output; k and v slices of one product."""
    g = torch.Generator().manual_seed(seed)
    nq, nk = sum(lengths_q), sum(lengths_k)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    leaves = [normal(nq, heads, d), *normal(nk, 2, heads, d).unbind(1)]
    if slots:  # the second table in the layout of a batched product over heads
        leaves += [normal(nq, heads, slots), normal(heads, nk, slots).transpose(0, 1)]
    return [x.detach().requires_grad_() for x in leaves], normal(nq, heads, d)


def check(leaves, dout, lengths_q, lengths_k, tolerance=1e-5, scale=None, z=None, lut=None,
          window=None, **flags):
    """Output and all gradients against float64, relative to the largest element of each.

    Returns (out, gradients).
    """
    names = ["q", "k", "v", "c2p", "p2c"][: len(leaves)]
    tables = dict(zip(names[3:], leaves[3:], strict=True)) | ({} if lut is None else {"lut": lut})
    out = flash_varlen(
        *leaves[:3], offsets(lengths_q), offsets(lengths_k), max(lengths_q), max(lengths_k),
        scale=scale, window=window, **tables, **flags,
    )  # fmt: skip
    gradients = torch.autograd.grad(out, leaves, dout)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    tables = dict(zip(names[3:], exact[3:], strict=True)) | ({} if lut is None else {"lut": lut})
    scale = exact[0].shape[-1] ** -0.5 if scale is None else scale
    want = attention(*exact[:3], lengths_q, lengths_k, scale, window=window, z=z, **tables)
    wanted = torch.autograd.grad(want, exact, dout.double())
    for name, x, y in zip(["out", *names], [out, *gradients], [want, *wanted], strict=True):
        error, size = (x.double() - y).abs().max().item(), max(1.0, y.abs().max().item())
        assert error <= tolerance * size, f"{name}: error {error:.2e} at values up to {size:.2e}"
    return out, gradients


def log_buckets(longest, slots=512):
    """DeBERTa-v3's slot of delta = r - c: the reference's own operation. int32 [2 longest - 1]"""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    delta = torch.arange(-longest + 1, longest)
    bucket = make_log_bucket_position(delta, slots // 2, 512).long()
    return (bucket + slots // 2).clamp(0, slots - 1).int().to(DEVICE)


@pytest.mark.parametrize("d", [64, 96, pytest.param(32, marks=SLOW), pytest.param(128, marks=SLOW)])
def test_head_dimensions(d):
    lengths = [1, 0, 7, 65, 0]
    check(*inputs(lengths, lengths, d), lengths, lengths)


def test_lengths_on_both_sides_of_a_tile():
    lengths = [130, 1, 33, 2, 31, 32, 65, 64, 63]
    check(*inputs(lengths, lengths, 32, heads=1), lengths, lengths)


def test_other_head_dimensions_and_scale():
    lengths = [40, 3]
    check(*inputs(lengths, lengths, 24), lengths, lengths, scale=0.7)


@pytest.mark.parametrize("window", [0, 64])
def test_window_is_inclusive(window):
    lengths = [1, 64, 130]
    check(*inputs(lengths, lengths, 32, heads=1), lengths, lengths, window=window)


def test_window_64_lets_exactly_129_keys_in():
    n, w = 300, 64
    q, k = torch.zeros(n, 1, 32, device=DEVICE), torch.zeros(n, 1, 32, device=DEVICE)
    v = torch.eye(n, device=DEVICE)[:, None, 120:152].contiguous()  # value i marks key 120 + i
    out = flash_varlen(q, k, v, offsets([n]), offsets([n]), n, n, window=w)[:, 0]
    for i, key in enumerate(range(120, 152)):
        seen = (out[:, i] > 0).nonzero().flatten()
        assert (seen.min().item(), seen.max().item(), len(seen)) == (key - w, key + w, 2 * w + 1)
        assert torch.allclose(out[key, i].cpu(), torch.tensor(1 / 129))


def test_cls_only_queries():
    lengths = [1, 90, 17, 64]
    ones = [1] * len(lengths)
    leaves, dout = inputs(lengths, lengths, 64, heads=1)
    everything, _ = check(leaves, dout, lengths, lengths)
    leaves[0] = leaves[0].detach()[offsets(lengths)[:-1].long()].requires_grad_()
    out, _ = check(leaves, dout[: len(lengths)], ones, lengths)
    assert torch.allclose(out, everything[offsets(lengths)[:-1].long()], atol=1e-6)


def test_rows_without_keys_are_zero():
    """More queries than keys, a window that misses them all, no keys, no queries."""
    lengths_q, lengths_k = [50, 5, 0, 3], [3, 0, 4, 3]
    leaves, dout = inputs(lengths_q, lengths_k, 32)
    out, gradients = check(leaves, dout, lengths_q, lengths_k, window=10)
    assert (out[13:55] == 0).all() and (gradients[0][13:55] == 0).all()
    assert (gradients[1][3:7] == 0).all() and (gradients[2][3:7] == 0).all()


def test_large_scores_stay_finite():
    lengths = [70, 40]
    leaves, dout = inputs(lengths, lengths, 32, heads=1)
    leaves[0] = (leaves[0].detach() * 100).requires_grad_()  # scores of several hundred
    check(leaves, dout, lengths, lengths, tolerance=1e-3)
    leaves[0] = (leaves[0].detach() * 1e4).requires_grad_()
    cu = offsets(lengths)
    out = flash_varlen(*leaves, cu, cu, 70, 70)
    gradients = torch.autograd.grad(out, leaves, dout)
    assert all(torch.isfinite(x).all() for x in (out, *gradients))


# ------------------------------------------------------------------------------------------ dropout


def philox(counter, key):
    """Philox-4x32-10 (Salmon et al. 2011), written from the paper.

    counter: four uint64 arrays below 2^32. key: 64 bits.
    """
    c, k0, k1 = list(np.broadcast_arrays(*counter)), key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high, low = np.uint64(32), np.uint64(0xFFFFFFFF)
        c = [b >> high ^ c[1] ^ np.uint64(k0), b & low, a >> high ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c


def dropout_factors(tokens, heads, longest, p, seed, site=0):
    """Z [tokens, heads, longest]: word c % 4 of counter (c // 4, packed row, head, site)."""
    row, head, quarter = np.ogrid[:tokens, :heads, : -(-longest // 4)]
    site = np.full(1, site)
    words = philox([x.astype(np.uint64) for x in (quarter, row, head, site)], seed)
    words = np.stack(words, -1).reshape(tokens, heads, -1)[:, :, :longest]
    keep = words >> np.uint64(8) >= round(p * 2**24)
    return torch.from_numpy(keep / (1 - round(p * 2**24) / 2**24)).to(DEVICE)


def test_philox_of_this_test_gives_the_published_words():
    zero = np.zeros(1, np.uint64)
    published = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word[0]) for word in philox([zero] * 4, 0)] == published


@pytest.mark.parametrize("p, seed, site, window", [(0.1, 1, 0, None), (0.5, 2**40 + 7, 11, 20)])
def test_dropout_forward_and_gradients(p, seed, site, window):
    lengths = [1, 40, 0]
    leaves, dout = inputs(lengths, lengths, 32)
    z = dropout_factors(sum(lengths), 2, max(lengths), p, seed, site)
    flags = dict(dropout=p, seed=seed, site=site, window=window)
    out, _ = check(leaves, dout, lengths, lengths, z=z, **flags)
    cu = offsets(lengths)
    again, *others = (
        flash_varlen(*leaves, cu, cu, 40, 40, **(flags | change))
        for change in ({}, dict(seed=seed + 1), dict(site=site + 1))
    )
    assert torch.equal(out, again)
    assert not any(torch.allclose(out, other) for other in others)


def test_the_kernels_read_a_seed_on_the_device():
    """Whatever it holds as they run, both ways: what a captured CUDA graph needs."""
    lengths = [20, 3]
    leaves, dout = inputs(lengths, lengths, 32)
    cu, seed = offsets(lengths), torch.tensor([5], device=DEVICE)

    def run(seed):
        out = flash_varlen(*leaves, cu, cu, 20, 20, dropout=0.3, seed=seed, site=2)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    first, changed, back = run(seed), run(seed.fill_(2**33 + 5)), run(seed.fill_(5))
    assert all(map(torch.equal, first, back)) and all(map(torch.equal, first, run(5)))
    assert not any(map(torch.allclose, first, changed))
    assert all(map(torch.equal, changed, run(2**33 + 5)))


def test_dropout_mask_does_not_depend_on_the_tiles():
    """Sixteen query rows go through smaller tiles than sixty-four, by the same rows' mask."""
    leaves, _ = inputs([64], [64], 32)
    q, k, v = leaves
    few, all_of_them = offsets([16]), offsets([64])
    long = flash_varlen(q, k, v, all_of_them, all_of_them, 64, 64, dropout=0.3, seed=5)
    short = flash_varlen(q[:16], k, v, few, all_of_them, 16, 64, dropout=0.3, seed=5)
    assert torch.allclose(long[:16], short, atol=1e-6)


def test_dropout_rate_and_mean():
    z = dropout_factors(512, 4, 512, 0.1, 3)
    five_deviations = 0.0015  # of 2^20 draws
    assert abs((z == 0).double().mean().item() - 0.1) < five_deviations
    ones, zeros = torch.ones(64, 1, 32, device=DEVICE), torch.zeros(64, 1, 32, device=DEVICE)
    cu = offsets([64])
    out = flash_varlen(zeros, zeros, ones, cu, cu, 64, 64, dropout=0.5, seed=11)
    five_deviations = 5 / 64  # of the mean of 4,096 draws
    assert abs(out[:, :, 0].mean().item() - 1.0) < five_deviations


# ------------------------------------------------------------------------------------------ DeBERTa


@pytest.mark.parametrize("deterministic", [False, True])
def test_disentangled_bias(deterministic):
    """Few slots, so that many keys of a row share one; dropout too."""
    lengths = [1, 0, 50]
    leaves, dout = inputs(lengths, lengths, 32, slots=24)
    delta = torch.arange(-149, 150, device=DEVICE)
    lut = delta.div(7, rounding_mode="floor").clamp(-12, 11).int() + 12
    z = dropout_factors(sum(lengths), 2, 50, 0.2, 9)
    flags = dict(lut=lut, scale=96**-0.5, dropout=0.2, seed=9, deterministic=deterministic)
    _, gradients = check(leaves, dout, lengths, lengths, z=z, **flags)
    if deterministic:
        cu = offsets(lengths)
        out = flash_varlen(*leaves[:3], cu, cu, 50, 50, c2p=leaves[3], p2c=leaves[4], **flags)
        assert all(map(torch.equal, gradients, torch.autograd.grad(out, leaves, dout)))


def test_disentangled_bias_in_any_order_of_slots():
    """Slots that come back after others, as no log bucket does: the deterministic sums hold."""
    lengths = [70, 20]
    leaves, dout = inputs(lengths, lengths, 32, heads=1, slots=5)
    lut = (torch.arange(-69, 70, device=DEVICE) % 5).int()
    check(leaves, dout, lengths, lengths, lut=lut, deterministic=True)


def test_disentangled_bias_cls_only():
    lengths = [1, 90, 200]
    leaves, dout = inputs([1, 1, 1], lengths, 64, heads=1, slots=512)
    check(leaves, dout, [1, 1, 1], lengths, lut=log_buckets(200), scale=192**-0.5)


@pytest.mark.parametrize("lengths, deterministic", [([170, 1], True), ([150, 1, 33], False)])
def test_against_hugging_face_deberta(lengths, deterministic):
    """Output and all gradients, packed, against DisentangledSelfAttention on each sequence."""
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    torch.manual_seed(0)
    config = DebertaV2Config(hidden_size=64, num_attention_heads=1, relative_attention=True,
                             position_buckets=256, max_relative_positions=-1,
                             max_position_embeddings=512, pos_att_type=["p2c", "c2p"],
                             share_att_key=True, hidden_dropout_prob=0.0,
                             attention_probs_dropout_prob=0.0)  # fmt: skip
    layer = DisentangledSelfAttention(config).to(DEVICE)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.15 if name.endswith("weight") else 0.1)
    hidden = torch.randn(sum(lengths), 64, device=DEVICE, requires_grad=True)
    rel = torch.randn(512, 64, device=DEVICE, requires_grad=True)
    dout = torch.randn(sum(lengths), 64, device=DEVICE)

    def products(x):
        return [projection(x).view(-1, 1, 64)
                for projection in (layer.query_proj, layer.key_proj, layer.value_proj)]

    q, k, v = products(hidden)
    pos_q, pos_k, _ = products(rel)
    c2p, p2c = torch.einsum("rhd,shd->rhs", q, pos_k), torch.einsum("chd,shd->chs", k, pos_q)
    middle = (q, k, v, pos_q, pos_k)
    cu, longest = offsets(lengths), max(lengths)
    got = flash_varlen(q, k, v, cu, cu, longest, longest, scale=192**-0.5, c2p=c2p, p2c=p2c,
                       lut=log_buckets(longest), deterministic=deterministic)  # fmt: skip
    got = got.view(-1, 64)
    leaves = [hidden, rel, *layer.parameters()]
    gradients = torch.autograd.grad(got, [*leaves, *middle], dout)

    # outputs of the three projections, in the order Hugging Face calls them
    seen = {"q": [], "k": [], "v": []}
    projections = {"q": layer.query_proj, "k": layer.key_proj, "v": layer.value_proj}
    for n, projection in projections.items():
        projection.register_forward_hook(lambda _m, _i, out, n=n: seen[n].append(out))
    want = []
    for x in hidden.split(lengths):
        mask = torch.ones(1, 1, len(x), len(x), device=DEVICE)
        want.append(layer(x[None], mask, rel_embeddings=rel)[0][0])
    want = torch.cat(want)
    own = [x for n in "qkv" for x in seen[n]]
    wanted = torch.autograd.grad(want, [*leaves, *own], dout)
    wanted, own = wanted[: len(leaves)], dict(zip(map(id, own), wanted[len(leaves) :], strict=True))

    def joined(n, of_positions):
        """Gradients of a projection's outputs: of the tokens, or (summed) of the positions."""
        parts = [own[id(x)][0] for x in seen[n] if (x.shape[1] == 512) == of_positions]
        return sum(parts) if of_positions else torch.cat(parts)

    names = ["hidden", "rel", *(name for name, _ in layer.named_parameters()), "q", "k", "v",
             "pos_q", "pos_k"]
    wanted = [*wanted, *(joined(n, False) for n in "qkv"), joined("q", True), joined("k", True)]
    for name, x, y in zip(["out", *names], [got, *gradients], [want, *wanted], strict=True):
        error, size = (x.reshape(y.shape) - y).abs().max().item(), max(1.0, y.abs().max().item())
        assert error <= 1e-5 * size, f"{name}: error {error:.2e} at values up to {size:.2e}"


# ------------------------------------------------------------------------------ precision and frame


@pytest.mark.parametrize(
    "dtype, case",
    [
        (torch.bfloat16, "bias"),
        (torch.float16, "window"),
        pytest.param(torch.bfloat16, "plain", marks=SLOW),
        pytest.param(torch.bfloat16, "window", marks=SLOW),
        pytest.param(torch.float16, "plain", marks=SLOW),
        pytest.param(torch.float16, "bias", marks=SLOW),
    ],
)
def test_low_precision_rule(dtype, case):
    """Errors against float64 of at most 2 (output) and 3 (gradients) times those of torch."""
    lengths = [128, 1, 90]
    slots = 512 if case == "bias" else 0
    leaves, dout = inputs(lengths, lengths, 64, heads=1, dtype=dtype, slots=slots)
    flags = dict(window=20) if case == "window" else {}
    tables = dict(c2p=3, p2c=4) if case == "bias" else {}
    scale = (192 if case == "bias" else 64) ** -0.5

    def run(function, x, grad):
        bias = {n: x[i] for n, i in tables.items()}
        if tables:
            bias["lut"] = log_buckets(128)
        out = function(x, bias)
        return [out, *torch.autograd.grad(out, x, grad)]

    def reference(x, bias):
        return attention(*x[:3], lengths, lengths, scale, **bias, **flags)

    def packed(x, bias):
        cu = offsets(lengths)
        return flash_varlen(*x[:3], cu, cu, 128, 128, scale=scale, **bias, **flags)

    ours = run(packed, leaves, dout)
    torchs = run(reference, leaves, dout)
    exact = run(reference, [x.detach().double().requires_grad_() for x in leaves], dout.double())
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact, strict=True)):
        error, allowed = ((x.double() - c).abs().max().item() for x in (a, b))
        allowed *= 2 if i == 0 else 3
        assert a.dtype == dtype
        assert error <= allowed, f"tensor {i}: error {error:.2e}, allowed {allowed:.2e}"


def test_offsets_beyond_32_bits():
    """Rows 2^30 elements apart in memory, never touched in between: the third is beyond an int32,
    in the first sequence of one packing and as the second sequence of the other."""
    far = torch.empty(2**31 + 3 * 32, dtype=torch.float16, device=DEVICE)
    q, k, v = (far.as_strided((3, 1, 32), (2**30, 32, 1), 32 * i) for i in range(3))
    near = [torch.randn(3, 1, 32, device=DEVICE).half().requires_grad_() for _ in range(3)]
    for x, y in zip((q, k, v), near, strict=True):
        x.copy_(y.detach())
    dout = torch.randn(3, 1, 32, device=DEVICE).half()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for cu in (offsets([3]), offsets([2, 1])):
        want, got = flash_varlen(*near, cu, cu, 3, 3), flash_varlen(*leaves, cu, cu, 3, 3)
        assert torch.equal(got, want)
        gradients = torch.autograd.grad(got, leaves, dout)
        assert all(map(torch.equal, gradients, torch.autograd.grad(want, near, dout)))


class Seen(TorchDispatchMode):
    """Names of the operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def test_registered_operator_and_compile():
    """Compiled, a call is one operator each way; eager goes without and gives the same."""
    lengths = [5, 20]
    leaves, dout = inputs(lengths, lengths, 32, slots=6)
    cu, lut = offsets(lengths), torch.arange(-19, 20, device=DEVICE).clamp(-3, 2).int() + 3
    nodes = []

    def call(q, k, v, c2p, p2c):
        return flash_varlen(q, k, v, cu, cu, 20, 20, c2p=c2p, p2c=p2c, lut=lut, dropout=0.1, seed=4,
                            deterministic=True) * 2  # fmt: skip

    def backend(module, examples):
        nodes.extend(str(node.target) for node in module.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(module, examples)

    with Seen() as seen:
        want = call(*leaves)
        wanted = torch.autograd.grad(want, leaves, dout)
    assert "aten::mul.Tensor" in seen.names
    assert not [name for name in seen.names if name.startswith("kernels_flash")]
    got = torch.compile(call, fullgraph=True, backend=backend)(*leaves)
    assert [node for node in nodes if "kernels_flash" in node] == ["kernels_flash.forward.default"]
    assert torch.equal(got, want)
    with Seen() as seen:
        gradients = torch.autograd.grad(got, leaves, dout)
    assert [name for name in seen.names if "flash" in name] == ["kernels_flash::backward"]
    for a, b in zip(gradients, wanted, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()

    q, k, v, c2p, p2c = leaves
    seed, ops = torch.full((1,), 4, device=DEVICE), torch.ops.kernels_flash
    call = (cu, cu, 20, 20, 0.2, -1, c2p, p2c, lut, 0.1, seed, 7, True)
    torch.library.opcheck(ops.forward.default, (q, k, v, *call),
                          test_utils=("test_schema", "test_faketensor",
                                      "test_autograd_registration"))  # fmt: skip
    tensors = [x.detach() for x in (dout, q, k, v, *ops.forward(q, k, v, *call))]
    torch.library.opcheck(ops.backward.default, (*tensors, *call),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_what_is_not_needed_is_not_saved(monkeypatch):
    leaves, _ = inputs([5], [5], 32)
    saved = []
    monkeypatch.setattr(flash, "_save", lambda ctx, inputs, output: saved.append(output))
    plain = [x.detach() for x in leaves]
    flash_varlen(*plain, offsets([5]), offsets([5]), 5, 5)
    assert not saved
    flash_varlen(*plain[:2], leaves[2], offsets([5]), offsets([5]), 5, 5)
    assert len(saved) == 1


def test_a_second_derivative_is_refused():
    leaves, dout = inputs([5], [5], 32)
    out = flash_varlen(*leaves, offsets([5]), offsets([5]), 5, 5)
    gradient = torch.autograd.grad(out, leaves[0], dout, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), leaves[0])


def test_gradients_of_tables_share_one_filling_and_one_cast():
    """In the layout of each table, one with gaps in memory too: that one is copied."""
    lengths = [5, 20]
    leaves, dout = inputs(lengths, lengths, 32, dtype=torch.float16, slots=8)
    cu, lut = offsets(lengths), torch.arange(-19, 20, device=DEVICE).clamp(-3, 2).int() + 3

    def run(leaves, c2p, deterministic=True):
        out = flash_varlen(*leaves[:3], cu, cu, 20, 20, c2p=c2p, p2c=leaves[4], lut=lut,
                           deterministic=deterministic)  # fmt: skip
        with Seen() as seen:
            return seen.names, torch.autograd.grad(out, leaves, dout)

    names, _ = run(leaves, leaves[3], deterministic=False)  # else the turns are cast as well
    assert sum(name.startswith("aten::zeros") for name in names) == 1
    assert names.count("aten::_to_copy") == 1
    _, gradients = run(leaves, leaves[3])
    for x, gradient in zip(leaves[3:], gradients[3:], strict=True):
        assert gradient.dtype == x.dtype and gradient.stride() == x.stride()
    wide = torch.cat([leaves[3].detach(), leaves[3].detach()], 2).requires_grad_()
    _, with_gaps = run([*leaves[:3], wide, leaves[4]], wide[:, :, :8])
    assert torch.equal(with_gaps[3][:, :, :8], gradients[3]) and not with_gaps[3][:, :, 8:].any()
    assert all(map(torch.equal, with_gaps[:3], gradients[:3]))
    assert torch.equal(with_gaps[4], gradients[4])


@pytest.mark.parametrize("bias", [False, True])
def test_every_launch_on_the_card_of_its_tensors(bias, monkeypatch):
    """The three launches, withheld, of fake tensors: nothing on the way waits for their content."""
    current, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    class Withheld:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append((self.name, *current))

    kernels = "_forward_kernel", "_backward_q_kernel", "_backward_kv_kernel"
    for name in kernels:
        monkeypatch.setattr(flash, name, Withheld(name))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with FakeTensorMode():
        q, k, v, c2p, p2c = (
            torch.empty(9, 2, n, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
            for n in (32, 32, 32, 6, 6)
        )
        tables = dict(c2p=c2p, p2c=p2c, lut=torch.empty(17, dtype=torch.int32, device=DEVICE))
        cu = torch.empty(3, dtype=torch.int32, device=DEVICE)
        out = flash_varlen(q, k, v, cu, cu, 9, 9, dropout=0.1, **(tables if bias else {}))
        out.sum().backward()
    assert launched == [(name, q.device) for name in kernels]


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can be waited for")
def test_no_synchronisation():
    lengths = [90, 200]
    leaves, dout = inputs(lengths, lengths, 64, slots=512)
    lut, cu = log_buckets(200), offsets(lengths)
    kwargs = dict(c2p=leaves[3], p2c=leaves[4], lut=lut, dropout=0.1, seed=1, deterministic=True)
    flash_varlen(*leaves[:3], cu, cu, 200, 200, **kwargs).backward(dout)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_varlen(*leaves[:3], cu, cu, 200, 200, **kwargs).backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lut=None), "come together"),
        (dict(k=torch.zeros(9, 3, 32)), "same heads"),
        (dict(v=torch.zeros(9, 2, 32).half()), "want one of"),
        (dict.fromkeys("qkv", torch.zeros(9, 2, 160)), "at most 128"),
        (dict(cu_seqlens_q=torch.tensor([0, 9])), "int32"),
        (dict(dropout=1.0), "probability"),
        (dict(p2c=torch.zeros(9, 2, 7)), "slots"),
        (dict(p2c=torch.zeros(9, 2, 6).half()), "one dtype"),
        (dict(lut=torch.zeros(15, dtype=torch.int32)), "lut"),
        (dict(seed=torch.zeros(2, dtype=torch.int64)), "seed"),
        (dict(seed=torch.zeros(1, dtype=torch.int32)), "seed"),
        (dict(seed=torch.zeros(1, dtype=torch.int64, device="meta")), "seed"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x = torch.zeros(9, 2, 32)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    table = torch.zeros(9, 2, 6)
    call = dict(q=x, k=x, v=x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=9, max_seqlen_k=9,
                c2p=table, p2c=table, lut=torch.zeros(17, dtype=torch.int32))  # fmt: skip
    with pytest.raises(ValueError, match=message):
        flash_varlen(**(call | change))
