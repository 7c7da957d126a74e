"""kernels.fused against float64 written from its formulas, torch and Hugging Face, in Triton's
interpreter where there is no GPU; compiled for sm_80, sm_90 and sm_100 in any case.
"""

import importlib.util
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.aot import SHARED_LIMIT, printed_apart
from kernels import fused
from kernels.fused import add_norm, geglu, rotary
from test_flash import philox

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5


@pytest.fixture(autouse=True)
def bfloat16_rounding(monkeypatch):
    """Triton's interpreter cuts fp32 to bf16, a card rounds to the nearest: let it round too."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fp_trunc(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return self.cast_impl(src, dst_type)
        bits = src.data.astype(np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return TensorHandle((rounded >> np.uint32(16)).astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)


def normal(*shape, dtype=FP32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def seeds(value):
    return torch.tensor([value], device=DEVICE)


def leaf(x):
    return None if x is None else x.detach().clone().requires_grad_()


def rounded_once(name, got, want, tolerance=1e-5):
    """got is float64's want, rounded once to its dtype; and fp32 noise relative to the largest."""
    want, size = want.detach(), max(1.0, want.abs().max().item())
    allowed = torch.finfo(got.dtype).eps / 2 * want.abs() + tolerance * size
    excess = ((got.detach().double() - want).abs() - allowed).max().item()
    assert got.shape == want.shape and excess <= 0, f"{name}: {excess:.2e} too far"


# ---------------------------------------------------------------------------------------- add_norm


def formula(branch, residual, weight, bias, eps, z=1.0, pre_norm=False, branch_bias=0.0):
    """The formula at the top of kernels/fused.py in the dtype of the arguments -> first, second."""
    s = residual + z * (branch + branch_bias)
    mean = s.mean(1, keepdim=True)
    variance = (s - mean).square().mean(1, keepdim=True)
    y = (s - mean) / torch.sqrt(variance + eps) * weight + (0.0 if bias is None else bias)
    return (s if pre_norm else y), y


def factors(rows, hidden, p, seed, site):
    """Z [rows, hidden] float64: word column % 4 of the counter (column // 4, row, 0, site)."""
    row, quarter = np.ogrid[:rows, : -(-hidden // 4)]
    counter = quarter.astype(np.uint64), row.astype(np.uint64), np.uint64(0), np.uint64(site)
    words = np.stack(philox(counter, seed), -1).reshape(rows, -1)[:, :hidden]
    keep = words >> np.uint64(8) >= round(p * 2**24)
    return torch.from_numpy(keep / (1 - round(p * 2**24) / 2**24)).to(DEVICE)


def layer(rows, hidden, branch=FP32, residual=FP32, weight=FP32, bias=True, seed=0):
    """Leaves branch, residual, weight, bias or None."""
    parts = [
        normal(rows, hidden, dtype=branch, seed=seed),
        normal(rows, hidden, dtype=residual, seed=seed + 1, scale=2.0),
        normal(hidden, dtype=weight, seed=seed + 2) + 1,
        normal(hidden, dtype=weight, seed=seed + 3) if bias else None,
    ]
    return [leaf(x) for x in parts]


def check(leaves, used=(True, True), z=1.0, pre_norm=False, branch_bias=None, tolerance=1e-5,
          **how):  # fmt: skip
    """Results and gradients of the used ones of the two results against float64 -> all of them."""
    names = ["branch", "residual", "weight", "bias", "branch_bias"]
    leaves = dict(zip(names, [*leaves, branch_bias], strict=True))
    leaves = {name: x for name, x in leaves.items() if x is not None}
    exact = {name: leaf(x.double()) for name, x in leaves.items()}
    got = add_norm(**dict(bias=None) | leaves, eps=EPS, pre_norm=pre_norm, **how)
    want = formula(**dict(bias=None) | exact, eps=EPS, z=z, pre_norm=pre_norm)
    rounded_once("first", got[0], want[0])
    rounded_once("second", got[1], want[1])
    grads = [normal(*x.shape, dtype=x.dtype, seed=9 + i) for i, x in enumerate(got)]
    got, want, grads = ([x[i] for i in range(2) if used[i]] for x in (got, want, grads))
    doubles = [x.double() for x in grads]
    gradients = torch.autograd.grad(got, list(leaves.values()), grads, allow_unused=True)
    wanted = torch.autograd.grad(want, list(exact.values()), doubles, allow_unused=True)
    gradients, wanted = (dict(zip(leaves, x, strict=True)) for x in (gradients, wanted))
    for name, x in gradients.items():
        if wanted[name] is None:
            assert x is None
        else:
            assert x.dtype == leaves[name].dtype
            rounded_once("d " + name, x, wanted[name], tolerance)
    return got, gradients


@pytest.mark.parametrize(
    "rows, hidden, bias, pre_norm",
    [
        (1, 24, True, False),
        (5, 100, True, True),
        (5, 100, False, False),
        (9, 768, False, True),
        (5, 1, True, False),
        (2, 4096, True, True),
    ],
)
def test_add_norm(rows, hidden, bias, pre_norm):
    z = factors(rows, hidden, 0.2, 2**40 + 7, 3)
    how = dict(dropout=0.2, seed=seeds(2**40 + 7), site=3)
    tolerance = 1e-5
    if hidden == 1 and DEVICE == "cuda":  # variance 0: what rounding leaves times 1 / sqrt(eps)
        tolerance = 1e-6 * EPS**-0.5
    check(layer(rows, hidden, bias=bias), pre_norm=pre_norm, tolerance=tolerance)
    check(layer(rows, hidden, bias=bias, seed=5), z=z, pre_norm=pre_norm, tolerance=tolerance,
          **how)  # fmt: skip


@pytest.mark.parametrize("pre_norm", [False, True])
def test_many_rows_to_a_program(pre_norm):
    z = factors(37, 768, 0.1, 1, 0)
    check(layer(37, 768), z=z, pre_norm=pre_norm, dropout=0.1, seed=seeds(1))


@pytest.mark.parametrize(
    "dropout, pre_norm, bias, used",
    [
        (0.2, False, True, (True, True)),
        (0.0, False, True, (True, False)),
        (0.2, False, False, (False, True)),
        (0.0, True, True, (True, True)),
        (0.2, True, False, (True, False)),
        (0.0, True, True, (True, False)),
        (0.2, True, True, (False, True)),
    ],
)
def test_branch_bias(dropout, pre_norm, bias, used):
    """Added to branch before it drops; the gradient of pre-norm's s alone has its sums too."""
    branch_bias = leaf(normal(100, seed=20))
    how = dict(dropout=dropout, seed=seeds(1), dtype=BF16, z=factors(9, 100, dropout, 1, 0))
    leaves = layer(9, 100, branch=BF16, bias=bias)
    check(leaves, used, pre_norm=pre_norm, branch_bias=branch_bias, **how)


def test_branch_bias_may_be_all_that_is_trained():
    branch, residual, weight, bias = (x.detach() for x in layer(3, 24))
    branch_bias = leaf(normal(24, seed=20))
    y, _ = add_norm(branch, residual, weight, bias, EPS, branch_bias=branch_bias)
    (got,) = torch.autograd.grad(y, branch_bias, torch.ones_like(y))
    leaves = [x.double() for x in (branch, residual, weight, bias)]
    exact = leaf(branch_bias.double())
    want = torch.autograd.grad(formula(*leaves, EPS, branch_bias=exact)[0].sum(), exact)[0]
    rounded_once("d branch_bias", got, want)


@pytest.mark.parametrize(
    "branch, dropout, pre_norm",
    [(BF16, 0.1, False), (BF16, 0.0, True), (FP16, 0.1, True), (FP16, 0.0, False)],
)
def test_narrow_branch_with_wide_residual(branch, dropout, pre_norm):
    leaves = layer(19, 100, branch=branch, weight=FP32)
    how = dict(dropout=dropout, seed=seeds(1), dtype=branch, z=factors(19, 100, dropout, 1, 0))
    (first, second), _ = check(leaves, pre_norm=pre_norm, **how)
    assert first.dtype == FP32 and second.dtype == branch
    if not pre_norm:
        assert torch.equal(second, first.to(branch))


def test_dtypes_of_all_tensors_differ():
    leaves = layer(7, 24, branch=FP32, residual=BF16, weight=FP16)
    (first, second), _ = check(leaves, dtype=FP16)
    assert first.dtype == BF16 and second.dtype == FP16


def test_one_tensor_where_the_dtypes_are_equal():
    for dtype in (None, FP32):
        first, second = add_norm(*layer(3, 24), EPS, dtype=dtype)
        assert first is second
        first, second = add_norm(*layer(3, 24), EPS, dtype=dtype, pre_norm=True)
        assert first is not second and first.dtype == second.dtype == FP32
    with torch.no_grad():
        first, second = add_norm(*layer(3, 24), EPS)
    assert first is second


@pytest.mark.parametrize("dtype, pre_norm", [(BF16, False), (FP16, True)])
def test_add_norm_low_precision_rule(dtype, pre_norm):
    """Everything narrow: errors of at most 2 (results) and 3 (gradients) times those of torch."""
    leaves = layer(29, 100, dtype, dtype, dtype)
    grads = [normal(29, 100, dtype=dtype, seed=9 + i) for i in range(2)]

    def torchs(branch, residual, weight, bias):
        s = residual + branch
        y = F.layer_norm(s, s.shape[1:], weight, bias, EPS)
        return (s if pre_norm else y), y

    def run(function, x, wide=False):
        out = function(*x)
        dout = [g.double() if wide else g for g in grads]
        return [*out, *torch.autograd.grad(out, x, dout)]

    ours = run(lambda *x: add_norm(*x, EPS, pre_norm=pre_norm), leaves)
    theirs = run(torchs, leaves)
    exact = run(torchs, [leaf(x.double()) for x in leaves], wide=True)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, allowed = ((x.double() - c).abs().max().item() for x in (a, b))
        allowed *= 2 if i < 2 else 3
        assert a.dtype == dtype
        assert error <= allowed, f"tensor {i}: {error:.2e}, allowed {allowed:.2e}"


def test_statistics_of_pre_norm_are_of_the_sum_before_rounding():
    branch, residual, weight, bias = layer(9, 100, branch=BF16, residual=BF16)
    s, y = add_norm(branch, residual, weight, bias, EPS, dtype=FP32, pre_norm=True)
    want = formula(*(x.double() for x in (branch, residual, weight, bias)), EPS)[1]
    rounded_once("y", y, want)
    assert s.dtype == BF16 and torch.equal(s, branch + residual)


@pytest.mark.parametrize(
    "used, pre_norm, dropout",
    [
        ((True, False), False, 0.0),
        ((False, True), False, 0.4),
        ((True, False), True, 0.4),
        ((True, False), True, 0.0),
        ((False, True), True, 0.0),
    ],
)
def test_a_result_without_gradient(used, pre_norm, dropout):
    """Pre-norm's s alone: no gradient for weight and bias."""
    leaves = layer(11, 24, branch=BF16)
    how = dict(dropout=dropout, seed=seeds(1), dtype=BF16, z=factors(11, 24, dropout, 1, 0))
    _, gradients = check(leaves, used, pre_norm=pre_norm, **how)
    assert (gradients["weight"] is None) == (pre_norm and not used[1])


def test_rows_far_from_zero():
    """Mean 1e4: what fp32 leaves of the deviations decides, so torch's error is the measure."""
    for pre_norm in (False, True):
        leaves = layer(9, 768)
        leaves[1] = leaf(leaves[1] + 1e4)
        exact = [leaf(x.double()) for x in leaves]
        got = add_norm(*leaves, EPS, pre_norm=pre_norm)
        want = formula(*exact, EPS, pre_norm=pre_norm)
        theirs = F.layer_norm(leaves[0] + leaves[1], (768,), leaves[2], leaves[3], EPS)
        dout = normal(9, 768, seed=9)
        ours = [got[1], *torch.autograd.grad(got[1], leaves, dout)]
        theirs = [theirs, *torch.autograd.grad(theirs, leaves, dout)]
        exact = [want[1], *torch.autograd.grad(want[1], exact, dout.double())]
        for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
            error, allowed = (a - c).abs().max().item(), 2 * (b - c).abs().max().item()
            assert error <= allowed, f"tensor {i}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("value", [0.0, 3.3, 1e4, -1e30])
def test_constant_rows(value):
    """y = bias exactly, though BERT's eps of 1e-12 magnifies what is left a million times."""
    branch = torch.full((3, 768), value / 2, device=DEVICE).requires_grad_()
    residual = torch.full((3, 768), value / 2, device=DEVICE).requires_grad_()
    _, _, weight, bias = layer(3, 768)
    y, _ = add_norm(branch, residual, weight, bias, 1e-12)
    assert torch.equal(y, bias.expand(3, 768))
    dout = normal(3, 768, seed=9)
    dbranch, _, dweight, dbias = torch.autograd.grad(y, [branch, residual, weight, bias], dout)
    g = (dout * weight).double()
    rounded_once("d branch", dbranch * 1e-6, g - g.mean(1, keepdim=True))
    rounded_once("d bias", dbias, dout.double().sum(0))
    assert not dweight.any()


def test_large_and_small_numbers_stay_finite():
    for scale in (1e-20, 1e15):
        leaves = layer(3, 100)
        leaves[:2] = [leaf(x * scale) for x in leaves[:2]]
        y, _ = add_norm(*leaves, 1e-12)
        gradients = torch.autograd.grad(y, leaves, normal(3, 100, seed=9))
        assert all(torch.isfinite(x).all() for x in (y, *gradients))


def test_strided_inputs_and_gradients():
    branch, residual, weight, bias = layer(6, 24)
    wide = [torch.zeros(24, 12, device=DEVICE).T[::2] for _ in range(2)]
    for x, y in zip(wide, (branch, residual), strict=True):
        x.copy_(y.detach())
    strided = [x.detach().requires_grad_() for x in wide]
    assert not strided[0].is_contiguous()
    y, again = (add_norm(*x, weight, bias, EPS)[0] for x in ((branch, residual), strided))
    assert torch.equal(y, again)
    (want,) = torch.autograd.grad(y, branch, torch.ones_like(y))
    (got,) = torch.autograd.grad(again.sum(), strided[0])  # an expanded gradient
    assert torch.equal(got, want)


class Recorder:
    """Stands in for a kernel: keeps its arguments; runs it if asked to."""

    def __init__(self, kernel, runs=True):
        self.kernel, self.runs, self.calls = kernel, runs, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.calls.append(args)
            if self.runs:
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("pre_norm", [False, True])
def test_nothing_is_kept_without_a_backward_pass(pre_norm, monkeypatch):
    recorder = Recorder(fused._add_norm_kernel)
    monkeypatch.setattr(fused, "_add_norm_kernel", recorder)
    leaves = layer(5, 24)
    want = add_norm(*leaves, EPS, pre_norm=pre_norm)
    total, statistics = recorder.calls[-1][7:9]
    assert (total is None) == pre_norm and statistics.shape == (5, 2)
    detached = [x.detach() for x in leaves]
    for mode, arguments in [(torch.no_grad, leaves), (torch.inference_mode, leaves),
                            (torch.enable_grad, detached)]:  # fmt: skip
        with mode():
            got = add_norm(*arguments, EPS, pre_norm=pre_norm)
        assert recorder.calls[-1][7:9] == (None, None)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert not any(x.requires_grad for x in got)


def test_one_gradient_for_branch_and_residual_without_dropout(monkeypatch):
    """Neither computed nor written twice, and neither changed by what is added to the other."""
    recorder = Recorder(fused._add_norm_backward_kernel)
    monkeypatch.setattr(fused, "_add_norm_backward_kernel", recorder)
    leaves = layer(5, 24)
    branch, residual = (2 * x for x in leaves[:2])
    y, _ = add_norm(branch, residual, *leaves[2:], EPS)
    loss = (y * normal(5, 24, seed=9)).sum() + residual.square().sum() + branch.sum()
    got = torch.autograd.grad(loss, leaves)
    assert recorder.calls[-1][7] is None
    exact = [leaf(x.double()) for x in leaves]
    y, _ = formula(2 * exact[0], 2 * exact[1], *exact[2:], EPS)
    loss = (y * normal(5, 24, seed=9)).sum() + (2 * exact[1]).square().sum() + 2 * exact[0].sum()
    for i, (x, y) in enumerate(zip(got, torch.autograd.grad(loss, exact), strict=True)):
        rounded_once(f"gradient {i}", x, y)


@pytest.mark.parametrize("p, seed, site", [(0.1, 0, 0), (0.5, 2**40 + 7, 1), (0.9, -3, 2**31 - 1)])
def test_mask_is_philoxs_words(p, seed, site):
    """branch 1 and residual 0 show Z; the gradient of branch for ones shows the same Z."""
    branch, residual, weight, _ = layer(21, 100)
    with torch.no_grad():
        branch.fill_(1.0), residual.fill_(0.0)
    how = dict(dropout=p, seed=seeds(seed), site=site, pre_norm=True)
    s, _ = add_norm(branch, residual, weight, None, EPS, **how)
    assert torch.equal(s, factors(21, 100, p, seed & 2**64 - 1, site).to(FP32))
    assert torch.equal(torch.autograd.grad(s, branch, torch.ones_like(s))[0], s)


def drawn(seed, site=0, rows=8, hidden=100, p=0.5):
    """Z, read as above."""
    one, zero = torch.ones(rows, hidden, device=DEVICE), torch.zeros(rows, hidden, device=DEVICE)
    weight = torch.ones(hidden, device=DEVICE)
    how = dict(dropout=p, seed=seed, site=site, pre_norm=True)
    return add_norm(one, zero, weight, None, EPS, **how)[0]


def test_masks_repeat_and_differ():
    """By the seed's content when the kernel runs: the tensor is the same one."""
    seed = seeds(4)
    z = drawn(seed)
    assert torch.equal(drawn(seed), z) and torch.equal(drawn(seeds(4)), z)
    others = [drawn(seed, site=1), drawn(seed, site=2)]
    seed.fill_(5)
    others.append(drawn(seed))
    seed.fill_(4 + 2**32)
    others.append(drawn(seed))
    for other in others:
        assert 0.4 < (other == z).float().mean().item() < 0.6  # 5 standard deviations are 0.09
    seed.fill_(4)
    assert torch.equal(drawn(seed), z)


def test_a_seed_changed_before_the_backward_pass_is_noticed():
    leaves, seed = layer(3, 24), seeds(1)
    y, _ = add_norm(*leaves, EPS, dropout=0.5, seed=seed)
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_rate_and_mean():
    z = drawn(seeds(3), rows=64, hidden=1024, p=0.1)
    assert abs((z == 0).double().mean().item() - 0.1) < 0.006  # 5 standard deviations of 2^16 draws
    assert abs(z.double().mean().item() - 1) < 0.007


def test_gradients_have_the_same_bits_every_time():
    leaves = layer(9, 100, branch=BF16)
    runs = []
    for _ in range(2):
        out = add_norm(*leaves, EPS, dropout=0.1, seed=seeds(1), dtype=BF16)
        runs.append(torch.autograd.grad(out[1], leaves, normal(9, 100, dtype=BF16, seed=9)))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("processors", [1, 100])
def test_gradients_whatever_the_number_of_programs(processors, monkeypatch):
    monkeypatch.setattr(fused, "_processors", lambda x: processors)
    check(layer(21, 24))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_no_rows(pre_norm):
    leaves = layer(0, 24)
    out = add_norm(*leaves, EPS, dropout=0.1, seed=seeds(1), pre_norm=pre_norm)
    gradients = torch.autograd.grad(out[1].sum(), leaves)
    assert out[0].shape == (0, 24)
    assert [g.shape for g in gradients] == [(0, 24), (0, 24), (24,), (24,)]
    assert not gradients[2].any() and not gradients[3].any()


# ------------------------------------------------------------------------------------------ rotary


def tables(positions, d):
    """cos, sin [positions, d] as Hugging Face makes them."""
    angle = torch.arange(positions)[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)
    angle = torch.cat([angle, angle], 1).float()
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def turned(x, cos, sin, positions):
    """The halves as real and imaginary part, times cos + i sin.  x [tokens, heads, d] float64"""
    half = x.shape[2] // 2
    angle = torch.complex(cos.double(), sin.double())[positions.long(), None, :half]
    y = torch.complex(x[..., :half], x[..., half:]) * angle
    return torch.cat([y.real, y.imag], -1)


def laid_out(x, order):
    """x with its memory in another order of dimensions, the last one last."""
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.detach().permute(order).contiguous().permute(back)


def check_rotary(x, parts, positions, used=None, order=(0, 1, 2)):
    """Results and gradient against float64 -> these; order: of the gradients' memory."""
    cos, sin = tables(50, x.shape[3])
    got = rotary(x, cos, sin, positions, parts=parts)
    exact = leaf(x.double())
    want = list(exact.unbind(1))
    want[:parts] = [turned(t, cos, sin, positions) for t in want[:parts]]
    used = range(x.shape[1]) if used is None else used
    grads = [laid_out(normal(*got[i].shape, dtype=x.dtype, seed=9 + i), order) for i in used]
    (gradient,) = torch.autograd.grad([got[i] for i in used], x, grads)
    (wanted,) = torch.autograd.grad([want[i] for i in used], exact, [g.double() for g in grads])
    assert gradient.dtype == x.dtype and gradient.is_contiguous()
    assert len(got) == x.shape[1]
    for i, (a, b) in enumerate([*zip(got, want, strict=True), (gradient, wanted)]):
        assert a.dtype == x.dtype
        rounded_once(f"tensor {i}", a, b, tolerance=1e-6)
    assert all(t.is_contiguous() for t in got[:parts])
    for i in range(parts, x.shape[1]):
        assert got[i].data_ptr() == x[:, i].data_ptr() and got[i].stride() == x[:, i].stride()
    return got, gradient


@pytest.mark.parametrize(
    "n, parts, tokens, heads, d",
    [
        (1, 1, 1, 1, 2),
        (2, 1, 5, 3, 16),
        (2, 2, 19, 2, 6),
        (3, 1, 5, 3, 16),
        (3, 2, 3, 12, 64),
        (3, 3, 19, 2, 6),
    ],
)
def test_rotary(n, parts, tokens, heads, d):
    x = normal(tokens, n, heads, d).requires_grad_()
    check_rotary(x, parts, torch.arange(tokens, device=DEVICE) * 7 % 50)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rotary_of_narrow_numbers_is_rounded_once(dtype, kind):
    x = normal(9, 3, 2, 16, dtype=dtype).requires_grad_()
    check_rotary(x, 2, torch.tensor([0, 1, 2, 3, 0, 1, 49, 0, 1], dtype=kind, device=DEVICE))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_rotary_without_some_gradients(used):
    x = normal(5, 3, 2, 8).requires_grad_()
    _, gradient = check_rotary(x, 2, torch.arange(5, device=DEVICE), used)
    for i in set(range(3)) - set(used):
        assert not gradient[:, i].any()


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 1, 0, 3), (1, 2, 0, 3)])
def test_rotary_of_any_strides(order):
    x = laid_out(normal(5, 3, 2, 8), order).requires_grad_()
    assert not x.is_contiguous()
    check_rotary(x, 2, torch.arange(5, device=DEVICE))


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_rotary_with_gradients_of_any_strides(order):
    x = normal(5, 3, 2, 8).requires_grad_()
    check_rotary(x, 2, torch.arange(5, device=DEVICE), order=order)
    cos, sin = tables(50, 8)
    v = rotary(x, cos, sin, torch.arange(5, device=DEVICE), parts=2)[2]
    (gradient,) = torch.autograd.grad(v.sum(), x)  # an expanded gradient
    assert (gradient[:, 2] == 1).all() and not gradient[:, :2].any()


def test_rotary_inside_a_graph():
    """Of a product, whose weight is the leaf, with v used twice."""
    weight, h = normal(48, 24).requires_grad_(), normal(7, 24, seed=1)
    cos, sin = tables(50, 8)
    positions = torch.arange(7, device=DEVICE)

    def loss(q, k, v):
        return (q * k).sum() + (v * v).sum() + v.exp().sum()

    x = F.linear(h, weight).unflatten(1, (3, 2, 8))
    got = torch.autograd.grad(loss(*rotary(x, cos, sin, positions, parts=2)), weight)[0]
    exact = leaf(weight.double())
    q, k, v = F.linear(h.double(), exact).unflatten(1, (3, 2, 8)).unbind(1)
    q, k = (turned(t, cos, sin, positions) for t in (q, k))
    rounded_once("weight", got, torch.autograd.grad(loss(q, k, v), exact)[0])


def test_v_is_a_view_that_cannot_be_changed_behind_autograds_back():
    x = normal(5, 3, 2, 8).requires_grad_()
    cos, sin = tables(50, 8)
    positions = torch.arange(5, device=DEVICE)
    q, _, v = rotary(2 * x, cos, sin, positions, parts=2)
    with pytest.raises(RuntimeError, match="view"):
        v.add_(1)
    q.mul_(2)  # nothing of the forward pass is needed: a result may be changed
    assert torch.isfinite(torch.autograd.grad(q.sum(), x)[0]).all()
    with torch.no_grad():
        q, _, v = rotary(x, cos, sin, positions, parts=2)
    assert not q.requires_grad and v.data_ptr() == x[:, 2].data_ptr()


def test_rotary_is_hugging_faces():
    from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

    x = normal(20, 3, 2, 16).requires_grad_()
    cos, sin = tables(50, 16)
    positions = torch.arange(20, device=DEVICE) + 30
    q, k, v = rotary(x, cos, sin, positions, parts=2)
    rows = cos[positions][None], sin[positions][None]
    wants = apply_rotary_pos_emb(*(t.transpose(0, 1)[None] for t in x.unbind(1)[:2]), *rows)
    wants = [*(t[0].transpose(0, 1) for t in wants), x[:, 2]]
    grads = [normal(20, 2, 16, seed=9 + i) for i in range(3)]
    for got, want in zip((q, k, v), wants, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    got, want = (torch.autograd.grad(t, x, grads)[0] for t in ((q, k, v), wants))
    assert torch.allclose(got, want, atol=1e-6)


def test_rotary_offsets_beyond_32_bits():
    """Tokens 2^30 numbers apart in memory that is never touched in between."""
    far = torch.empty(2**31 + 64, dtype=FP16, device=DEVICE)
    far = far.as_strided((3, 2, 2, 16), (2**30, 32, 16, 1))
    near = normal(3, 2, 2, 16, dtype=FP16)
    far.copy_(near)
    cos, sin = tables(50, 16)
    positions = torch.arange(3, device=DEVICE)
    got, want = (rotary(x, cos, sin, positions, parts=2) for x in (far, near))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("parts", [1, 2])
def test_rotary_of_no_tokens(parts):
    x = torch.zeros(0, 3, 2, 8, device=DEVICE).requires_grad_()
    cos, sin = tables(50, 8)
    q, _, _ = rotary(x, cos, sin, torch.zeros(0, dtype=torch.int64, device=DEVICE), parts=parts)
    assert torch.autograd.grad(q.sum(), x)[0].shape == x.shape


# ------------------------------------------------------------------------------------------- geglu


def geglu64(x):
    a, b = x.chunk(2, 1)
    return F.gelu(a) * b


@pytest.mark.parametrize(
    "rows, n, dtype",
    [
        (1, 24, BF16),
        (5, 100, FP32),
        (5, 100, FP16),
        (67, 37, FP32),
        (2, 2624, BF16),
        (3, 1, FP32),
    ],
)
def test_geglu(rows, n, dtype):
    x = normal(rows, 2 * n, dtype=dtype, scale=2.0).requires_grad_()
    exact, dy = leaf(x.double()), normal(rows, n, dtype=dtype, seed=9)
    got, want = geglu(x), geglu64(exact)
    rounded_once("y", got, want, tolerance=1e-6)
    (gradient,) = torch.autograd.grad(got, x, dy)
    rounded_once("dx", gradient, torch.autograd.grad(want, exact, dy.double())[0], tolerance=1e-6)
    assert got.dtype == gradient.dtype == dtype


def test_geglu_far_from_zero():
    a = torch.tensor([0.0, -0.0, 1e4, -1e4, 30.0, -30.0, -6.0, 6.0, 1e-30, -1e-30], device=DEVICE)
    x = torch.cat([a, torch.full_like(a, -2.0)])[None].requires_grad_()
    exact = leaf(x.double())
    got, want = geglu(x), geglu64(exact)
    rounded_once("y", got, want, tolerance=1e-9)
    rounded_once("dx", *(torch.autograd.grad(y.sum(), t)[0] for y, t in ((got, x), (want, exact))))


def test_geglu_of_strided_rows_and_of_none():
    x = normal(40, 6).T.requires_grad_()
    assert not x.is_contiguous()
    got, want = geglu(x), geglu(x.contiguous())
    assert torch.equal(got, want)
    got, want = (torch.autograd.grad(y.sum(), x)[0] for y in (got, want))
    assert torch.equal(got, want)
    none = torch.zeros(0, 8, device=DEVICE).requires_grad_()
    assert torch.autograd.grad(geglu(none).sum(), none)[0].shape == (0, 8)


# ------------------------------------------------------------------------------------------- frame


def calls(device=DEVICE, dtype=FP32, hidden=24, n=24, d=8, rows=5):
    """{name: function -> results, leaves} of every public function, dropout included."""

    def zeros(*shape, kind=dtype):
        return torch.zeros(*shape, dtype=kind, device=device).requires_grad_(kind.is_floating_point)

    def norm(pre_norm, site=3, rows=rows):
        leaves = zeros(rows, hidden), zeros(rows, hidden, kind=FP32), zeros(hidden, kind=FP32)
        bias = branch_bias = None
        if not pre_norm:
            bias, branch_bias = zeros(hidden, kind=FP32), zeros(hidden, kind=FP32)
        seed = zeros(1, kind=torch.int64)
        out = add_norm(*leaves, bias, EPS, branch_bias=branch_bias, dropout=0.1, seed=seed,
                       site=site, dtype=dtype, pre_norm=pre_norm)  # fmt: skip
        return (out[:1] if out[0] is out[1] else out), leaves

    def turn(n=3, parts=2, rows=rows):
        x, table = zeros(rows, n, max(hidden // d, 1), d), zeros(50, d, kind=FP32).detach()
        return rotary(x, table, table, zeros(rows, kind=torch.int64), parts=parts), (x,)

    def gate(rows=rows):
        x = zeros(rows, 2 * n)
        return (geglu(x),), (x,)

    return {
        "post-norm": lambda **how: norm(False, **how),
        "pre-norm": lambda **how: norm(True, **how),
        "rotary": turn,
        "geglu": gate,
    }


def both_ways(call):
    """Forward and backward pass -> results, leaves, gradients."""
    out, leaves = call()
    return out, leaves, torch.autograd.grad(out, leaves, [torch.zeros_like(x) for x in out])


@pytest.mark.parametrize("name", calls())
def test_a_second_derivative_is_refused(name):
    out, leaves = calls()[name]()
    grads = [torch.zeros_like(x).requires_grad_() for x in out]
    (gradient, *_) = torch.autograd.grad(out, leaves, grads, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", calls())
def test_launches_happen_on_the_card_of_the_tensors(name, monkeypatch):
    """Triton launches on the current card: it must be that of the tensors at each launch."""
    entered, launches = [], []

    @contextmanager
    def device_of(x):
        entered.append(x)
        yield
        entered.pop()

    class Launch(Recorder):
        def __getitem__(self, grid):
            launches.append([x.shape for x in entered])
            return super().__getitem__(grid)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernels = [k for k in vars(fused) if k.endswith("_kernel")]
    for kernel in kernels:
        monkeypatch.setattr(fused, kernel, Launch(getattr(fused, kernel), runs=False))
    both_ways(calls()[name])
    assert len(kernels) == 5 and len(launches) == 2
    assert all(len(x) == 1 and x[0][0] == 5 for x in launches)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(branch=torch.zeros(9, 25)), r"both must be \[rows, hidden\]"),
        (dict(branch=torch.zeros(24), residual=torch.zeros(24)), r"both must be \[rows, hidden\]"),
        (dict(branch=torch.zeros(1, 4097), residual=torch.zeros(1, 4097)), "at most 4096"),
        (dict(weight=torch.zeros(1, 24)), r"must be \[24\]"),
        (dict(bias=torch.zeros(25)), r"must be \[24\]"),
        (dict(branch_bias=torch.zeros(25)), r"must be \[24\]"),
        (dict(branch_bias=torch.zeros(24).double()), "want float32"),
        (dict(branch=torch.zeros(9, 24).double()), "want float32"),
        (dict(residual=torch.zeros(9, 24).long()), "want float32"),
        (dict(weight=torch.zeros(24).double()), "want float32"),
        (dict(dtype=torch.float64), "want float32"),
        (dict(bias=torch.zeros(24, device="meta")), "one device"),
        (dict(dropout=1.0), "probability"),
        (dict(dropout=1 - 1e-9), "probability"),
        (dict(dropout=float("nan")), "probability"),
        (dict(dropout=-0.1), "probability"),
        (dict(seed=None), "needs a seed"),
        (dict(seed=torch.tensor(1)), "needs a seed"),
        (dict(seed=torch.tensor([1], dtype=torch.int32)), "needs a seed"),
        (dict(seed=torch.tensor([1], device="meta")), "move them to one"),
        (dict(site=-1), "site"),
        (dict(site=2**31), "site"),
    ],
)
def test_add_norm_refuses_what_does_not_fit(change, message):
    call = dict(branch=torch.zeros(9, 24), residual=torch.zeros(9, 24), weight=torch.zeros(24),
                bias=torch.zeros(24), eps=EPS, dropout=0.1, seed=torch.tensor([1]))  # fmt: skip
    with pytest.raises(ValueError, match=message):
        add_norm(**call | change)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(9, 2, 8)), "want .tokens, n, heads, d."),
        (dict(x=torch.zeros(9, 4, 2, 8)), "parts <= n <= 3"),
        (dict(parts=0), "parts <= n <= 3"),
        (dict(parts=4), "parts <= n <= 3"),
        (dict(x=torch.zeros(9, 3, 2, 7)), "d even"),
        (dict(x=torch.zeros(9, 3, 8, 2).transpose(2, 3)), "stride 1"),
        (dict(x=torch.zeros(9, 3, 2, 8).double()), "want float32"),
        (dict(cos=torch.zeros(50, 4)), r"must be \[positions, 8\]"),
        (dict(cos=torch.zeros(50, 4), sin=torch.zeros(50, 4)), r"must be \[positions, 8\]"),
        (dict(cos=torch.zeros(50, 8).bfloat16()), "float32 tables"),
        (dict(sin=torch.zeros(8, 50).T), "contiguous"),
        (dict(sin=torch.zeros(50, 8, device="meta")), "one device"),
        (dict(positions=torch.zeros(8, dtype=torch.int64)), r"int64 \[9\]"),
        (dict(positions=torch.zeros(9)), r"int32 or int64"),
        (dict(positions=torch.zeros(9, dtype=torch.int64, device="meta")), "on cpu"),
        (dict(positions=torch.zeros(18, dtype=torch.int64)[::2]), "contiguous"),
    ],
)
def test_rotary_refuses_what_does_not_fit(change, message):
    call = dict(x=torch.zeros(9, 3, 2, 8), cos=torch.zeros(50, 8), sin=torch.zeros(50, 8),
                positions=torch.zeros(9, dtype=torch.int64), parts=2)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rotary(**call | change)


@pytest.mark.parametrize("x", [torch.zeros(8), torch.zeros(2, 7), torch.zeros(2, 8).double()])
def test_geglu_refuses_what_does_not_fit(x):
    with pytest.raises(ValueError, match="want"):
        geglu(x)


def test_the_file_works_copied_alone(tmp_path):
    copy = tmp_path / "layer_kernels.py"
    copy.write_bytes(Path(fused.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("layer_kernels", copy)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    leaves = layer(5, 24)
    assert torch.equal(alone.add_norm(*leaves, EPS)[0], add_norm(*leaves, EPS)[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can be waited for")
@pytest.mark.parametrize("name", calls())
def test_no_synchronisation(name):
    both_ways(calls()[name])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_ways(calls()[name])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
def test_a_captured_graph_draws_by_the_seed_of_its_replay():
    seed = seeds(1)
    first = drawn(seed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = drawn(seed)
    graph.replay()
    assert torch.equal(z, first)
    seed.fill_(2)
    graph.replay()
    assert torch.equal(z, drawn(seeds(2))) and not torch.equal(z, first)


# ----------------------------------------------------------------------------------- ahead of time

COMPILE = """
import re, sys, torch, triton
from bench import aot
from test_fused import both_ways, calls

run, narrow = triton.runtime.jit.JITFunction.run, []

def counting(*args, **kwargs):
    kernel = run(*args, **kwargs)
    narrow.append(len(re.findall(r"(?:ld|st)\\.global[.\\w]*[.]b16", kernel.asm["ptx"])))
    return kernel

triton.runtime.jit.JITFunction.run = counting
for layer in sys.argv[2:]:
    dtype, hidden = layer.split()
    made = calls("cpu", getattr(torch, dtype), int(hidden), n=3 * int(hidden) // 2, d=64)
    for name, call in made.items():
        if hidden == "4096" and "norm" not in name:
            continue
        for c in aot.compile_launches(lambda: both_ways(call), int(sys.argv[1])):
            figures = c.arch, c.registers, c.spill_bytes, c.shared, narrow.pop(0)
            print("compiled", layer, name, c.kernel, *figures, sep="|")
"""

COUNT = """
import random, torch, triton
from collections import defaultdict
from bench.aot import _Card
from test_fused import both_ways, calls

keys, binders = defaultdict(set), {}

def run(self, *args, grid, warmup, **options):
    if self not in binders:
        binders[self] = self.create_binder()[-1]
    _, specialization, options = binders[self](*args, debug=False, **options)
    keys[self.__name__].add(str(specialization) + str(options))

triton.runtime.driver.set_active(_Card(90))
triton.runtime.jit.JITFunction.run = run
random.seed(0)
for name, call in calls("meta", torch.bfloat16, 768, n=1152, d=64).items():
    for step in range(250):
        rows = random.choice([step + 1, 16 * step + 16, random.randrange(1, 100_000)])
        site = dict(site=random.choice([step, 16 * step])) if "norm" in name else {}
        both_ways(lambda: call(rows=rows, **site))
    for kernel, seen in keys.items():
        print("compiled", name, kernel, len(seen), sep="|")
    keys.clear()
"""


def apart(script, *arguments):
    """Rows that the script prints in a process of its own without the interpreter."""
    sources = ["kernels/fused.py", "tests/test_fused.py"]
    printed = printed_apart(script, *arguments, sources=sources)
    return [x.split("|")[1:] for x in printed.splitlines() if x.startswith("compiled")]


NORMS = [("post-norm", "_add_norm_kernel"), ("post-norm", "_add_norm_backward_kernel"),
         ("pre-norm", "_add_norm_kernel"), ("pre-norm", "_add_norm_backward_kernel")]  # fmt: skip
TURNS = [("rotary", "_rotary_kernel"), ("rotary", "_rotary_kernel")]
GATES = [("geglu", "_geglu_kernel"), ("geglu", "_geglu_backward_kernel")]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "layers",
    [
        {"bfloat16 768": NORMS + TURNS + GATES},
        pytest.param(
            {"float32 768": NORMS + TURNS + GATES, "bfloat16 4096": NORMS}, marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_kernels_compile_and_fit(arch, layers):
    rows = apart(COMPILE, arch, *layers)
    for layer, kernels in layers.items():
        assert [(name, kernel) for at, name, kernel, *_ in rows if at == layer] == kernels
    for layer, name, kernel, *figures in rows:
        target, registers, spilled, shared, narrow = map(int, figures)
        what = f"{layer} {name} {kernel}"
        assert target == arch and 16 <= registers <= 255
        allowed = 24 if layer.endswith("4096") else 0
        assert spilled <= allowed, f"{what}: {spilled} bytes spilled"
        assert shared <= SHARED_LIMIT[arch], f"{what}: {shared} bytes of shared memory"
        assert narrow == 0, f"{what}: {narrow} loads and stores of single numbers"


def test_a_thousand_steps_compile_each_kernel_once():
    """Any number of rows, any site: the keys by which Triton tells compiled kernels apart."""
    rows = apart(COUNT)
    assert [(name, kernel) for name, kernel, _ in rows] == [
        ("post-norm", "_add_norm_kernel"),
        ("post-norm", "_add_norm_backward_kernel"),
        ("pre-norm", "_add_norm_kernel"),
        ("pre-norm", "_add_norm_backward_kernel"),
        ("rotary", "_rotary_kernel"),
        ("geglu", "_geglu_kernel"),
        ("geglu", "_geglu_backward_kernel"),
    ]
    # rotary's kernel is one each way
    assert [int(count) for _, _, count in rows] == [1, 1, 1, 1, 2, 1, 1], rows
