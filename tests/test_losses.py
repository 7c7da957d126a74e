"""The losses, plain torch and Triton kernels, against float64 loops written from the formulas.

The kernels run on the GPU where there is one, else in Triton's interpreter.
"""

import functools
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import losses

NAN = float("nan")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# One query at a time: (sum, number of units) from the formula. s, t: lists of Python floats.
def loop_bce(s, t, pos_weight=1.0):
    total = 0.0
    for x, y in zip(s, t, strict=True):
        log_sigmoid = -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
        log_other = log_sigmoid - x
        total += -pos_weight * y * log_sigmoid - (1 - y) * log_other
    return total, len(s)


def loop_hinge(s, t, margin=1.0):
    n = len(s)
    pairs = [(i, j) for i in range(n) for j in range(n) if t[i] > 0 >= t[j]]
    return math.fsum(max(0.0, margin - s[i] + s[j]) for i, j in pairs), len(pairs)


def loop_marginmse(s, t, pairs="first"):
    n = len(s)
    chosen = [(i, j) for i in range(n) for j in range(i + 1, n) if pairs == "all" or i == 0]
    return math.fsum(((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i, j in chosen), len(chosen)


def log_softmax(x, temperature):
    top = max(x)
    norm = math.log(math.fsum(math.exp((v - top) / temperature) for v in x))
    return [(v - top) / temperature - norm for v in x]


def loop_infonce(s, t, temperature=1.0):
    positives = [i for i in range(len(s)) if t[i] > 0]
    if not positives or len(s) < 2:
        return 0.0, 0
    log_p = log_softmax(s, temperature)
    return -math.fsum(log_p[i] for i in positives) / len(positives), 1


def loop_ranknet(s, t):
    margins = [s[i] - s[j] for i in range(len(s)) for j in range(len(s)) if t[i] > t[j]]
    return math.fsum(max(-m, 0.0) + math.log1p(math.exp(-abs(m))) for m in margins), len(margins)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def loop_adrmse(s, t, temperature=1.0):
    n = len(s)
    if n < 2:
        return 0.0, 0
    terms = []
    best_first = sorted(t, reverse=True)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        approximate = 1 + math.fsum(sigmoid((s[j] - s[i]) / temperature) for j in others)
        places = [place for place, value in enumerate(best_first, start=1) if value == t[i]]
        rank = sum(places) / len(places)
        terms.append((rank - approximate) ** 2 / math.log2(rank + 1))
    return math.fsum(terms), n


def loop_kl(s, t, temperature=1.0):
    if len(s) < 2:
        return 0.0, 0
    log_p, log_q = log_softmax(t, temperature), log_softmax(s, temperature)
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)), 1


def loop_mse(s, t):
    return math.fsum((x - y) ** 2 for x, y in zip(s, t, strict=True)), len(s)


# name, arguments, kind of targets
CASES = [
    ("bce", {}, "labels"),
    ("bce", {"pos_weight": 3.5}, "soft"),
    ("hinge", {}, "labels"),
    ("hinge", {"margin": 0.25}, "labels"),
    ("marginmse", {}, "logits"),
    ("marginmse", {"pairs": "all"}, "logits"),
    ("marginmse", {"pairs": "all"}, "ranks"),
    ("infonce", {}, "labels"),
    ("infonce", {"temperature": 0.5}, "labels"),
    ("ranknet", {}, "ranks"),
    ("ranknet", {}, "logits"),
    ("ranknet", {}, "tied"),
    ("adrmse", {}, "ranks"),
    ("adrmse", {}, "tied"),
    ("adrmse", {"temperature": 2.0}, "logits"),
    ("kl", {}, "logits"),
    ("kl", {"temperature": 3.0}, "ranks"),
    ("mse", {}, "logits"),
]
IDS = ["-".join([name, *(str(v) for v in args.values()), kind]) for name, args, kind in CASES]
every_case = pytest.mark.parametrize(("name", "args", "kind"), CASES, ids=IDS)
ONE_EACH = (0, 2, 4, 5, 7, 9, 12, 15, 17)  # every kernel once
every_kernel = pytest.mark.parametrize(
    ("name", "args", "kind"), [CASES[k] for k in ONE_EACH], ids=[IDS[k] for k in ONE_EACH]
)
POINTWISE = ("bce", "mse")  # a list of one document counts
every_kernel_daily = pytest.mark.parametrize(
    ("name", "args", "kind"),
    [pytest.param(*case, id=IDS[k], marks=[] if k in ONE_EACH else pytest.mark.slow)
     for k, case in enumerate(CASES)],
)  # fmt: skip


@pytest.fixture(params=["formula", pytest.param("kernel", marks=pytest.mark.gpu)])
def path(request, monkeypatch):
    """Which side of the functions runs; float64 is the formula's on both."""
    if request.param == "kernel":
        pytest.importorskip("triton")
    monkeypatch.setattr(losses, "_kernels", request.param == "kernel")


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(losses, "_kernels", True)


def loop(name, scores, targets, lengths, **args):
    """The whole batch in float64, from the sums of the queries."""
    total, units = 0.0, 0
    rows = scores.double().tolist(), targets.double().tolist(), lengths.tolist()
    for s, t, n in zip(*rows, strict=True):
        value, count = globals()["loop_" + name](s[:n], t[:n], **args)
        total, units = total + value, units + count
    return total / units if units else 0.0


def teacher(kind, queries, columns, generator):
    if kind == "labels":
        return (torch.rand(queries, columns, generator=generator) < 0.3).float()
    if kind == "soft":
        return torch.rand(queries, columns, generator=generator)
    if kind == "tied":
        return torch.randint(0, 4, (queries, columns), generator=generator).float()
    if kind == "ranks":  # as a run writes them: depth - rank + 1
        orders = [torch.randperm(columns, generator=generator) for _ in range(queries)]
        return torch.stack(orders) + 1.0
    return 4 * torch.randn(queries, columns, generator=generator)


def batch(lengths, kind="logits", seed=0, scale=3.0):
    """-> scores, targets [queries, longest] fp32 with NaN beyond the lengths, lengths int64."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths, default=0)
    scores = scale * torch.randn(len(lengths), columns, generator=generator)
    targets = teacher(kind, len(lengths), columns, generator)
    lengths = torch.tensor(lengths, dtype=torch.int64)
    beyond = torch.arange(columns) >= lengths[:, None]
    return scores.masked_fill(beyond, NAN), targets.masked_fill(beyond, NAN), lengths


def value_and_gradient(name, scores, targets, lengths, upstream=1.0, **args):
    scores = scores.detach().clone().to(DEVICE).requires_grad_()
    lengths = lengths if lengths is None else lengths.to(DEVICE)
    loss = losses.LOSSES[name](scores, targets.to(DEVICE), lengths, **args)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype, device=DEVICE))
    return loss.detach().cpu(), scores.grad.cpu()


def exact_gradient(name, scores, targets, lengths, **args):
    """Gradient of the reference in float64, which gradcheck and the loops vouch for."""
    return value_and_gradient(name, scores.double(), targets.double(), lengths, **args)[1]


def close(actual, expected, rtol=2e-5, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


LENGTHS = [1, 2, 3, 7, 0, 31, 32, 33]


@pytest.mark.usefixtures("path")
@every_case
def test_value_is_the_formulas(name, args, kind):
    scores, targets, lengths = batch(LENGTHS, kind)
    expected = loop(name, scores, targets, lengths, **args)
    assert expected > 1e-3
    loss, _ = value_and_gradient(name, scores.double(), targets, lengths, **args)
    close(loss, expected, rtol=1e-12, atol=0)
    loss, gradient = value_and_gradient(name, scores, targets, lengths, **args)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.float32
    close(loss, expected)


@every_case
def test_gradient_by_finite_differences(name, args, kind):
    scores, targets, lengths = batch([1, 2, 5, 0, 6], kind, seed=1)
    scores = scores.double().nan_to_num().requires_grad_()

    def loss_of(s):
        return losses.LOSSES[name](s, targets, lengths, **args)

    assert torch.autograd.gradcheck(loss_of, scores, fast_mode=True)
    # The loops' own differences: gradcheck alone would accept a wrong value with its derivative.
    gradient, step = exact_gradient(name, scores.detach(), targets, lengths, **args), 1e-5
    for query, column in [(1, 0), (2, 3), (4, 5)]:
        moved = scores.detach().repeat(2, 1, 1)
        moved[0, query, column] += step
        moved[1, query, column] -= step
        up, down = (loop(name, m, targets, lengths, **args) for m in moved)
        slope = pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)
        assert gradient[query, column].item() == slope


@pytest.mark.usefixtures("path")
@every_kernel
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_half_precision_scores_are_computed_in_float32(name, args, kind, dtype):
    scores, targets, lengths = batch(LENGTHS, kind, seed=2)
    half = scores.to(dtype)
    loss, gradient = value_and_gradient(name, half, targets, lengths, **args)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    close(loss, loop(name, half, targets, lengths, **args))
    exact = exact_gradient(name, half, targets, lengths, **args)
    close(gradient, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.usefixtures("path")
@every_kernel_daily
def test_extreme_and_equal_scores(name, args, kind):
    for pattern in ([1e4, -1e4, 0.0, 1e4, -1e4, 3.0, 1e4], [-1e4] * 7, [0.5] * 7):
        scores = torch.tensor([pattern, pattern[::-1]])
        _, targets, lengths = batch([7, 4], kind, seed=3)
        loss, gradient = value_and_gradient(name, scores, targets, lengths, **args)
        close(loss, loop(name, scores, targets, lengths, **args))
        close(gradient, exact_gradient(name, scores, targets, lengths, **args))
        # The teacher may be as extreme as the student.
        if kind == "logits":
            targets = 2500 * targets
            loss, _ = value_and_gradient(name, scores, targets, lengths, **args)
            close(loss, loop(name, scores, targets, lengths, **args))


@pytest.mark.usefixtures("path")
@every_kernel
def test_queries_without_units_change_nothing(name, args, kind):
    scores, targets, lengths = batch([5, 8], kind, seed=4)
    loss, gradient = value_and_gradient(name, scores, targets, lengths, **args)
    row = torch.arange(8.0)
    idle = [(torch.zeros(8), 0)]  # (targets, length) of queries that offer this loss nothing
    if name not in POINTWISE:
        idle.append((torch.ones(8), 1))
    if name in ("hinge", "infonce"):
        idle.append((torch.zeros(8), 8))
    if name in ("hinge", "ranknet"):
        idle.append((torch.ones(8), 8))
    padded = torch.cat([scores, row.repeat(len(idle), 1)])
    more = torch.cat([targets, torch.stack([t for t, _ in idle])])
    counts = torch.cat([lengths, torch.tensor([n for _, n in idle])])
    same, wide = value_and_gradient(name, padded, more, counts, **args)
    assert torch.equal(same, loss)
    assert torch.equal(wide[:2], gradient) and not wide[2:].any()


@pytest.mark.usefixtures("path")
@every_kernel
def test_nothing_to_count_is_zero_with_zero_gradient(name, args, kind):
    alone = 0 if name in POINTWISE else 1
    for shape, lengths in [((0, 5), []), ((3, 0), [0] * 3), ((2, 6), [0, 0]),
                           ((2, 6), [alone, alone])]:
        scores = torch.full(shape, NAN)
        for query, n in enumerate(lengths):
            scores[query, :n] = 2.0
        targets = torch.ones(shape)
        lengths = torch.tensor(lengths, dtype=torch.int64)
        loss, gradient = value_and_gradient(name, scores, targets, lengths, **args)
        assert loss.item() == 0 and gradient.shape == shape and not gradient.any()


@pytest.mark.usefixtures("path")
@every_kernel
def test_columns_beyond_the_lengths_are_ignored(name, args, kind):
    scores, targets, lengths = batch([4, 9, 2], kind, seed=5)
    beyond = torch.arange(9) >= lengths[:, None]
    seen = []
    for filling in (0.0, NAN, float("inf"), -1e30):
        s, t = scores.masked_fill(beyond, filling), targets.masked_fill(beyond, filling)
        seen.append(value_and_gradient(name, s, t, lengths.to(torch.int32), **args))
    for loss, gradient in seen:
        assert torch.equal(loss, seen[0][0]) and torch.equal(gradient, seen[0][1])
        assert not gradient[beyond].any()


@pytest.mark.usefixtures("path")
@every_kernel
def test_without_lengths_every_column_counts(name, args, kind):
    scores, targets, lengths = batch([6, 6], kind, seed=6)
    loss, gradient = value_and_gradient(name, scores, targets, None, **args)
    full, same = value_and_gradient(name, scores, targets, lengths, **args)
    assert torch.equal(loss, full) and torch.equal(gradient, same)


@pytest.mark.usefixtures("path")
def test_upstream_gradients_scale_the_gradient():
    scores, targets, lengths = batch([6, 4], "logits", seed=7)
    _, gradient = value_and_gradient("kl", scores, targets, lengths)
    _, scaled = value_and_gradient("kl", scores, targets, lengths, upstream=-2.5)
    close(scaled, -2.5 * gradient.double())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", losses.LOSSES)
def test_targets_of_any_real_dtype(name):
    scores, targets, lengths = batch([6, 4], "labels", seed=8)
    targets = targets.nan_to_num()
    loss, gradient = value_and_gradient(name, scores, targets, lengths)
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float64):
        other, same = value_and_gradient(name, scores, targets.to(dtype), lengths)
        assert torch.equal(other, loss) and torch.equal(same, gradient)


@pytest.mark.usefixtures("path")
def test_targets_receive_no_gradient():
    scores, targets, lengths = batch([6, 4], "logits", seed=9)
    for name in losses.LOSSES:
        student = scores.to(DEVICE, copy=True).requires_grad_()
        teacher_scores = targets.to(DEVICE, copy=True).requires_grad_()
        losses.LOSSES[name](student, teacher_scores, lengths).backward()
        assert teacher_scores.grad is None


@pytest.mark.usefixtures("path")
def test_published_values():
    """Numbers worked by hand or published, so that a wrong formula cannot hide in both sides."""
    table = functools.partial(torch.tensor, device=DEVICE)
    equal = table([[0.0] * 100])
    ranks = table([[100.0 - i for i in range(100)]])
    assert losses.adrmse(equal, ranks).item() == pytest.approx(211.2, abs=0.05)
    assert losses.adrmse(equal[:, :50], ranks[:, :50]).item() == pytest.approx(66.0, abs=0.05)
    assert losses.ranknet(equal, ranks).item() == pytest.approx(math.log(2))
    assert losses.infonce(equal, (ranks == 100).float()).item() == pytest.approx(math.log(100))
    assert losses.kl(equal, equal).item() == 0
    # Tied teacher scores share their mean rank: published for scores (5,0,0,0), labels (1,0,0,0).
    first = table([[1.0, 0, 0, 0]])
    assert losses.adrmse(5 * first, first).item() == pytest.approx(0.00012, abs=5e-6)
    # Several positives: the mean of -log p over them.
    two = table([[1.0, 1, 0, 0]])
    assert losses.infonce(table([[2.0, 1, 0, -1]]), two).item() == pytest.approx(0.940, abs=5e-4)
    assert losses.marginmse(table([[3.0, 1]]), table([[2.0, -2]])).item() == 4
    assert losses.mse(table([[3.0, 1], [5, 0]]), table([[2.0, -2], [1, 7]])).item() == 75 / 4
    one = table([2, 1])  # a list of one document counts as every other
    of_three = losses.mse(table([[3.0, 1], [5, 0]]), table([[2.0, -2], [1, 7]]), one)
    assert of_three.item() == pytest.approx(26 / 3)
    assert losses.hinge(table([[0.25, 0]]), table([[1, 0]])).item() == 0.75
    weighted = losses.bce(table([[0.0, 0]]), table([[1.0, 0]]), pos_weight=3.0)
    assert weighted.item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(6)}, "must be .queries, list."),
        ({"targets": torch.zeros(2, 2)}, "must be .queries, list."),
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, "floating-point"),
        ({"targets": torch.zeros(2, 3, dtype=torch.complex64)}, "real labels"),
        ({"targets": torch.zeros(2, 3, device="meta")}, "one device"),
        ({"lengths": torch.tensor([3])}, "one per query"),
        ({"lengths": torch.tensor([3.0, 2.0])}, "int32 or int64"),
        ({"lengths": torch.tensor([3, 4])}, "must lie in 0..3"),
        ({"lengths": torch.tensor([-1, 2])}, "must lie in 0..3"),
        ({"lengths": [3, 2]}, "int32 or int64"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    s = torch.zeros(2, 3)
    arguments = {"scores": s, "targets": s, "lengths": torch.tensor([3, 2])} | change
    for loss in losses.LOSSES.values():
        with pytest.raises(ValueError, match=message):
            loss(**arguments)


def test_bad_parameters_are_refused():
    s = torch.zeros(2, 3)
    for name, bad in [
        ("bce", {"pos_weight": -1.0}),
        ("hinge", {"margin": NAN}),
        ("marginmse", {"pairs": "some"}),
        ("infonce", {"temperature": 0.0}),
        ("adrmse", {"temperature": -1.0}),
        ("kl", {"temperature": float("inf")}),
    ]:
        with pytest.raises(ValueError, match=next(iter(bad))):
            losses.LOSSES[name](s, s, **bad)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@every_kernel
def test_long_and_short_lists_in_one_batch(name, args, kind, monkeypatch):
    monkeypatch.setattr(losses, "TILE", 64)  # the interpreter pays per operation, not per element
    scores, targets, lengths = batch([1, 2, 3, 7, 31, 32, 33, 100, 300], kind, seed=10)
    loss, gradient = value_and_gradient(name, scores, targets, lengths, **args)
    close(loss, loop(name, scores, targets, lengths, **args))
    exact = exact_gradient(name, scores, targets, lengths, **args)
    close(gradient, exact, rtol=1e-4, atol=1e-6 * exact.abs().max().item())


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@every_kernel_daily
def test_lists_longer_than_a_block(name, args, kind, monkeypatch):
    monkeypatch.setattr(losses, "MAX_BLOCK", 16)
    monkeypatch.setattr(losses, "TILE", 8)
    scores, targets, lengths = batch([40, 1, 16, 0, 17, 35], kind, seed=11)
    loss, gradient = value_and_gradient(name, scores, targets, lengths, **args)
    close(loss, loop(name, scores, targets, lengths, **args))
    exact = exact_gradient(name, scores, targets, lengths, **args)
    close(gradient, exact, rtol=1e-4, atol=1e-6 * exact.abs().max().item())


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_more_queries_than_the_last_program_reads_at_once(monkeypatch):
    monkeypatch.setattr(losses, "MAX_BLOCK", 16)
    scores, targets, lengths = batch([2] * 37, "logits", seed=12)
    loss, _ = value_and_gradient("marginmse", scores, targets, lengths)
    close(loss, loop("marginmse", scores, targets, lengths))


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@every_kernel
def test_the_same_bits_every_time_whatever_the_strides(name, args, kind):
    scores, targets, lengths = batch([6, 20, 9], kind, seed=13)
    loss, gradient = value_and_gradient(name, scores, targets, lengths, **args)
    strided = [x.T.repeat_interleave(2, dim=1).T[::2] for x in (scores, targets)]
    assert not strided[0].is_contiguous()
    again, same = value_and_gradient(name, *strided, lengths.repeat_interleave(2)[::2], **args)
    assert torch.equal(again, loss) and torch.equal(same, gradient)


@pytest.mark.gpu
@pytest.mark.usefixtures("path")
def test_compiled_under_autocast():
    """All losses in one graph, weighing differently, so that a gradient is known by its loss."""
    scores, targets, lengths = (x.to(DEVICE) for x in batch([6, 9], "ranks", seed=14))

    def step(x):
        found = [losses.LOSSES[CASES[k][0]](x * 1, targets, lengths, **CASES[k][1])
                 for k in ONE_EACH]  # fmt: skip
        return torch.stack(found) * torch.arange(1, 1 + len(ONE_EACH), device=DEVICE)

    torch.compiler.reset()
    eager, compiled = (scores.clone().requires_grad_() for _ in range(2))
    step(eager).sum().backward()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = torch.compile(step, backend="aot_eager", fullgraph=True)(compiled)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    close(loss.detach().cpu(), step(scores).cpu())
    close(compiled.grad.cpu(), eager.grad.cpu().double())


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_the_custom_op_keeps_its_promises():
    scores, targets, lengths = (x.to(DEVICE) for x in batch([6, 9], seed=15))
    for name in losses._KERNELS:
        arguments = (scores.nan_to_num().requires_grad_(), targets.nan_to_num(), lengths, name, 1.0)
        torch.library.opcheck(losses._fused, arguments,
                              test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("kernels")
def test_a_second_derivative_is_refused():
    scores = torch.zeros(1, 3, device=DEVICE, requires_grad=True)
    loss = losses.kl(scores, torch.arange(3.0, device=DEVICE)[None])
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


@every_kernel
def test_cuda_takes_the_kernel_and_never_waits_for_it(name, args, kind, monkeypatch):
    """Fake CUDA tensors have no values: reading one on the host, as if it waited, raises."""
    pytest.importorskip("triton")
    fused, called = losses._fused, []

    def recorded(*arguments):
        called.append(arguments[3])
        return fused(*arguments)

    monkeypatch.setattr(losses, "_fused", recorded)
    with FakeTensorMode(), torch.no_grad():
        scores, targets = torch.empty(2, 2, 5, device="cuda")
        lengths = torch.empty(2, dtype=torch.int64, device="cuda")
        loss = losses.LOSSES[name](scores, targets, lengths, **args)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
    assert len(called) == 1 and called[0].startswith(name)


@pytest.mark.usefixtures("kernels")
def test_the_file_works_copied_alone(tmp_path):
    copy = tmp_path / "ranking_losses.py"
    copy.write_bytes(Path(losses.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("ranking_losses", copy)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    alone._kernels = True
    scores, targets, lengths = (x.to(DEVICE) for x in batch([6, 9], seed=16))
    assert torch.equal(alone.kl(scores, targets, lengths), losses.kl(scores, targets, lengths))
