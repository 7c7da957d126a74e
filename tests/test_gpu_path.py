"""The way of a GPU, taken on a CPU: fused kernels and attention in Triton's interpreter, joined
bf16 weights, a step that reads its figures late. What only a card can show is in `pytest -m gpu`
and `python tests/bench gpu`; on a card nothing of this runs.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.step import batch_of, lists_of, positive_first, step_of
from kernels import attention, fused, layers, losses, packing
from kernels.attention import dropout_from, next_draw
from kernels.exact import ListGradient
from kernels.linears import Narrow
from kernels.step import NonFiniteStep, Step
from test_encoder import build, padded_logits, random_sides

SIDES = [(1, 0), (3, 4), (4, 9)]  # short: an interpreted program costs milliseconds
FAMILIES = ["bert", "electra-projected", "modernbert-mean", "modernbert-narrow", "deberta-own-keys",
            "deberta-c2p"]
DAILY = ("modernbert-mean", "deberta-own-keys")
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(),
                                reason="tests/test_card.py runs the same on the card")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu_path(monkeypatch):
    monkeypatch.setattr(attention, "_gpu_path", True)


@pytest.fixture
def attention_of_a_cpu(monkeypatch):
    """The interpreter is slow with products of bf16, and wrong in Triton 3.9."""
    runs = layers.varlen_attention

    def by_runs(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_gpu_path", None)
            return runs(*args, **kwargs)

    monkeypatch.setattr(layers, "varlen_attention", by_runs)


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def gradients(encoder, logits):
    encoder.zero_grad()
    weight = torch.randn(len(logits), generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    return {n: p.grad for n, p in encoder.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [name if name in DAILY else slow(name) for name in FAMILIES])
def test_logits_and_gradients_equal_padded_eager(name, monkeypatch):
    encoder, sides = build(name), random_sides(SIDES)
    expected = padded_logits(encoder, *sides)
    wanted = gradients(encoder, expected)
    monkeypatch.setattr(attention, "_gpu_path", True)
    with torch.no_grad():
        torch.testing.assert_close(encoder(encoder.pack(*sides)), expected, rtol=1e-5, atol=1e-5)
    logits = encoder(encoder.pack(*sides))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    got = gradients(encoder, logits)
    assert got.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    # both sides are fp32; some gradients are rounding alone: hence the floor
    for n, g in wanted.items():
        scale = max(float(g.abs().max()), 2e-2 * largest)
        assert (got[n] - g).abs().max() <= 2e-5 * scale, n


def formulas(monkeypatch):
    """The fused kernels as formulas in fp32, rounded where they round: as exact and, on a CPU,
    quick."""

    def add_norm(branch, residual, weight, bias, eps, *, branch_bias=None, dtype=None,
                 pre_norm=False):
        total = branch.float() + residual.float()
        total = total if branch_bias is None else total + branch_bias
        y = torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps)
        first = total if pre_norm else y
        return first.to(residual.dtype), y.to(dtype or residual.dtype)

    def rotary(x, cos, sin, positions, *, parts):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_gpu_path", None)
            return layers.turned(x, (cos, sin, positions), parts)

    def geglu(x):
        inner, gate = x.float().chunk(2, -1)
        return (torch.nn.functional.gelu(inner) * gate).to(x.dtype)

    for function in (add_norm, rotary, geglu):
        monkeypatch.setattr(fused, function.__name__, function)


@pytest.mark.parametrize("name", ["bert", "electra-projected", "modernbert", "deberta"])
def test_bf16_is_no_further_from_fp32_than_autocast(name, monkeypatch, attention_of_a_cpu):
    """Scores and all gradients, as one vector each, against those of fp32; the mean over weights
    and batches, as a single one is nearer or further by half through luck alone."""
    encoder = build(name)

    def errors(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            for n, p in encoder.model.named_parameters():
                p.copy_(0.3 * torch.randn_like(p) + (p.dim() == 1 and n.endswith("weight")))
        sides = random_sides([(1 + i, 5 * i) for i in range(8)], seed)
        packed = encoder.pack(*sides)
        exact = encoder(packed)
        wanted = gradients(encoder, exact)
        with torch.autocast("cpu", torch.bfloat16):
            logits = encoder(packed)
        found = gradients(encoder, logits)
        logits, exact = logits.detach(), exact.detach()
        difference = torch.cat([(found[n] - g).flatten() for n, g in wanted.items()])
        size = torch.cat([g.flatten() for g in wanted.values()])
        return float((logits - exact).norm() / exact.norm()), float(difference.norm() / size.norm())

    autocast = np.log([errors(seed) for seed in range(8)]).mean(0)
    monkeypatch.setattr(attention, "_gpu_path", True)
    formulas(monkeypatch)
    ours = np.log([errors(seed) for seed in range(8)]).mean(0)
    print(f"{name}: scores and gradients off by", np.exp(ours), "autocast's by", np.exp(autocast))
    assert (ours <= autocast + math.log(1.3)).all()  # a standard error of the ratio is 0.07 to 0.1


def test_copies_of_weights_are_autocasts_own_and_never_stale():
    """Products and gradients bit for bit those of autocast, also after a weight has changed, by a
    hand or by an optimizer that does not say so."""
    torch.manual_seed(0)
    q, k, v, out = (torch.nn.Linear(24, n) for n in (24, 24, 24, 7))
    alone = torch.nn.Linear(24, 5, bias=False)
    x = torch.randn(9, 24)
    leaves = [p for linear in (q, k, v, out, alone) for p in linear.parameters()]

    def run(project):
        a, b, c = project(x, q, k, v)
        joined, single = project((a + b + c).float(), out), project(x, alone)
        return joined.float().sum() + single.float().square().sum()

    def by_autocast(x, *linears):
        with torch.autocast("cpu", torch.bfloat16):
            outs = [linear(x) for linear in linears]
        return outs if len(outs) > 1 else outs[0]

    with torch.inference_mode():  # scoring comes first: what it makes serves training
        narrow = Narrow([(q, k, v), (out,), (alone,)], torch.bfloat16)
        narrow.projector()
    optimizer, before = torch.optim.AdamW(leaves, lr=0.1, fused=True), None
    for change in ("by hand", "by the optimizer", "none"):
        want, got = run(by_autocast), run(narrow.projector())
        assert torch.equal(want, got)
        assert before is None or not torch.equal(want, before)
        before = want
        for a, b in zip(*(torch.autograd.grad(y, leaves) for y in (want, got)), strict=True):
            assert b.dtype == torch.float32 and torch.equal(a, b)
        if change == "by hand":
            with torch.no_grad():
                k.weight.mul_(0.5)
        elif change == "by the optimizer":
            for leaf in leaves:
                leaf.grad = torch.ones_like(leaf)
            optimizer.step()
    with torch.no_grad():
        assert torch.equal(narrow.projector()(x, alone), by_autocast(x, alone))


def test_part_of_a_group_and_maps_without_their_bias():
    q, k, v = (torch.nn.Linear(8, 8) for _ in range(3))
    narrow, x = Narrow([(q, k, v)], torch.bfloat16), torch.randn(5, 8).bfloat16()
    project = narrow.projector()
    whole = project(x, q, k, v)
    assert all(map(torch.equal, project(x, q, k), whole[:2]))
    assert torch.equal(project(x, v), whole[2])
    assert all(map(torch.equal, project(x, v, q), (whole[2], whole[0])))
    lone = Narrow([(q,)], torch.bfloat16).projector()
    bare = torch.nn.functional.linear(x, q.weight.bfloat16())
    assert torch.equal(lone(x, q, bias=False), bare)
    want = torch.nn.functional.linear(x, q.weight[2:5].bfloat16(), q.bias[2:5].bfloat16())
    assert torch.equal(lone(x, q, part=slice(2, 5)), want)


@pytest.mark.parametrize("name", ["bert", slow("modernbert"), slow("deberta")])
def test_the_same_seed_drops_the_same(name, gpu_path):
    """Two passes under one seed, without and with gradient; another seed is another mask."""
    encoder = build(name, dropout=0.2).train()
    packed = encoder.pack(*random_sides(SIDES[1:]))

    def run(seed, gradient):
        with dropout_from(seed, CPU), torch.set_grad_enabled(gradient):
            return encoder(packed)

    first = run(5, False)
    assert torch.equal(first, run(5, True)) and not torch.allclose(first, run(6, False), atol=1e-3)
    with torch.no_grad():
        # without a seed each pass draws anew
        assert not torch.equal(encoder(packed), encoder(packed))


def test_every_dropout_of_a_pass_has_a_number_of_its_own():
    with dropout_from(2**62 + 5, CPU):
        draws = [next_draw(CPU) for _ in range(3)]
    assert [site for _, site in draws] == [1, 2, 3]
    assert all(seed.tolist() == [2**62 + 5] and seed.dtype == torch.int64 for seed, _ in draws)
    torch.manual_seed(3)
    (one, _), (other, _) = next_draw(CPU), next_draw(CPU)
    torch.manual_seed(3)
    assert torch.equal(next_draw(CPU)[0], one) and not torch.equal(one, other)


# ---------------------------------------------------------------------------------------- the step


def one_pass(encoder, loss="infonce", **how):
    """The step of a loss, which keeps all graphs."""
    step = step_of(encoder, loss, **how)
    step.gradient.keep = 10**6
    return step


def batch(k):
    """Two lists of three, drawn by k, which their queries are named after."""
    rng = np.random.default_rng(k)
    lengths = [(int(rng.integers(1, 4)), int(rng.integers(1, 6))) for _ in range(6)]
    made = batch_of(*random_sides(lengths, k), positive_first(2, 3))
    return made._replace(qids=[f"k{k}q0", f"k{k}q1"])


def test_a_step_moves_the_weights_as_on_a_cpu(monkeypatch):
    """Three steps with clipping and decay, dropout off: the same losses, norms and weights."""
    ends, figures = [], []
    for path in (None, True):
        monkeypatch.setattr(attention, "_gpu_path", path)
        encoder = build("bert").train()
        step = one_pass(encoder, lr=1e-3, clip=0.05, weight_decay=0.01)
        if path:
            formulas(monkeypatch)
        found = [pair for k in range(3) for pair in step(k, batch(k))]
        if path:
            assert len(found) == 2  # the last step's figures are on their way
        figures.append(found + step.flush())
        ends.append([p.detach().clone() for p in encoder.parameters()])
    assert figures[0] == [pytest.approx(pair, rel=1e-4) for pair in figures[1]]
    assert all(norm > 0.05 for _, norm in figures[0]), "nothing was clipped"
    for (n, _), a, b in zip(encoder.named_parameters(), *ends, strict=True):
        # gradient 0 but for rounding
        if not n.endswith(("key.bias", "classifier.out_proj.bias", "classifier.bias")):
            assert (a - b).abs().max() < 5e-5, n  # a twentieth of a step's lr


@pytest.mark.parametrize("keep", [10**6, 0])
def test_two_passes_equal_one(gpu_path, keep):
    encoder = build("minilm", dropout=0.3).train()  # of one layer: interpreted programs are slow
    gradient = ListGradient(encoder, losses.ranknet, seed=1, max_tokens=40)
    results = []
    for tokens in (10**6, keep):
        encoder.zero_grad()
        gradient.keep = tokens
        loss = gradient(0, *lists_of(batch(4)))
        results.append((loss, [p.grad.clone() for p in gradient.parameters]))
    (one, expected), (two, found) = results
    assert one == two and one > 0
    scale = max(g.abs().max() for g in expected)
    assert all((a - b).abs().max() <= 1e-6 * scale for a, b in zip(expected, found, strict=True))


def test_a_figure_that_is_not_finite_is_named_a_step_later_and_moves_no_weight(
        gpu_path, monkeypatch):
    formulas(monkeypatch)
    encoder = build("minilm").train()
    step = one_pass(encoder)
    assert step(0, batch(0)) == []
    assert math.isfinite(step(1, batch(1))[0][0])
    step.flush()
    before = [p.detach().clone() for p in encoder.parameters()]
    loss = step.gradient.loss
    step.gradient.loss = lambda *lists: loss(*lists) * math.inf
    assert step(2, batch(2)) == []
    step.gradient.loss = loss
    with pytest.raises(NonFiniteStep, match="step 3: .*k2q0, k2q1"):
        step(3, batch(3))  # finite by itself, but begun before the other was read
    assert all(map(torch.equal, before, encoder.parameters()))


def test_an_optimizer_that_cannot_skip_is_refused(gpu_path):
    encoder = build("bert")
    gradient = ListGradient(encoder, losses.infonce, seed=1)
    slow = torch.optim.AdamW(encoder.parameters(), fused=False)
    with pytest.raises(ValueError, match="fused"):
        Step(gradient, slow, lr=1e-3, warmup=0, steps=9, clip=1.0)


def test_how_much_is_kept_follows_the_free_memory(gpu_path, monkeypatch):
    """0.8 of what is free, less the gradients and what is reserved: AdamW's two moments, until they
    are there."""
    formulas(monkeypatch)
    encoder = build("bert")
    gradient = step_of(encoder, "infonce", "bfloat16", max_tokens=60).gradient
    numbers = sum(p.numel() for p in encoder.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20 + 12 * numbers, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    a_token = 40 * 32 * 3
    assert gradient._room() == int(0.8 * 3 * 2**20) // a_token
    gradient.dtype = "float32"
    assert gradient._room() == int(0.8 * 3 * 2**20) // (2 * a_token)
    assert gradient.keep is None
    gradient(0, *lists_of(batch(1)))
    assert gradient.keep == int(0.8 * 3 * 2**20) // (2 * a_token)
    gradient.reserve = 0
    assert gradient._room() == int(0.8 * (3 * 2**20 + 8 * numbers)) // (2 * a_token)
    deberta = build("deberta").model.config
    assert packing.kept_bytes(deberta, torch.bfloat16) == 3 * (40 * 32 + 4 * 2 * 512)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
])  # fmt: skip
def test_memory_that_runs_out_in_cublas_or_triton_halves_the_budget_too(error, monkeypatch, capsys):
    encoder = build("bert").train()
    step, forward = one_pass(encoder, max_tokens=60), type(encoder).forward

    def limited(self, packed):
        if sum(packed.lengths) > 40:
            raise error
        return forward(self, packed)

    monkeypatch.setattr(type(encoder), "forward", limited)
    assert len(step(0, batch(0))) == 1
    assert step.gradient.max_tokens == 30
    assert "micro-batches of 30 tokens" in capsys.readouterr().out


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch):
    encoder = build("bert").train()
    step = one_pass(encoder)
    monkeypatch.setattr(type(encoder), "forward",
                        lambda self, packed: 1 + torch.zeros(3) @ torch.zeros(4))
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch|shapes"):
        step(0, batch(0))


# --------------------------------------------------------------------------- what goes to the card


def test_a_packed_batch_is_one_buffer_of_aligned_parts():
    tensors = [torch.arange(5), torch.arange(100, 108), torch.arange(3, dtype=torch.int32),
               torch.arange(0)]
    together, places = packing.one_buffer(tensors)
    assert together.dtype == torch.int32 and len(together) == 8 + 8 + 4
    for place, t in zip(places, tensors, strict=True):
        assert place.start % 4 == 0 and torch.equal(together[place], t.int())


def test_tables_are_made_once():
    """DeBERTa's slots and the angles of rotary positions: kept, and right after scoring too."""
    deberta, modern = build("deberta"), build("modernbert")
    for encoder in (deberta, modern):
        sides = random_sides(SIDES)
        encoder.score_tokens(*sides)  # in inference mode, whose tensors no backward pass could save
        encoder.train()
        encoder(encoder.pack(*sides)).sum().backward()
    assert layers.distance_slots(9, 256, 512, CPU)[2] is layers.distance_slots(9, 256, 512, CPU)[2]
    kinds = set(modern.model.config.layer_types)
    assert {kind for kind, _ in modern._ropes} == kinds
    for kind in kinds:
        cos, sin = modern._rope(modern.body, kind)
        want = modern.body.rotary_emb(torch.empty(0), torch.tensor([[4, 77]]), kind)
        assert torch.equal(cos[[4, 77]], want[0][0]) and torch.equal(sin[[4, 77]], want[1][0])


def test_the_groups_of_products():
    """Queries, keys and values as one; in the last layer of a [CLS] head the queries by
    themselves."""
    encoder = build("deberta-own-keys")
    blocks = encoder.body.encoder.layer
    for on_cls in (True, False):
        groups = layers.product_groups(encoder.body, on_cls)
        linears = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
        assert sorted(map(id, linears)) == sorted(id(m) for group in groups for m in group)
        for block in blocks:
            own = block.attention.self
            q, k, v = own.query_proj, own.key_proj, own.value_proj
            alone = on_cls and block is blocks[-1]
            assert ((q, k, v) in groups) != alone and ((q,) in groups and (k, v) in groups) == alone
            assert (own.pos_key_proj,) in groups and (block.output.dense,) in groups


# ---------------------------------------------------------------------------------------- launches


@pytest.mark.slow
def test_launches_of_a_step_keep_their_marks():
    """At most 450 kernels for BERT's shapes, 650 for ModernBERT's, 750 for DeBERTa's, and far fewer
    than the same loop over Hugging Face's padded model; nothing is cast at every use."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "tests/bench", "launches", "--models",
               "bert", "modernbert", "deberta"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    head, rows = table[0], [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    assert head[:3] == ["model", "side", "kernels"] and len(rows) == 6
    counts = {(row["model"], row["side"]): int(row["kernels"]) for row in rows}
    for row in rows:
        assert int(row["kernels"]) == sum(int(row[kind]) for kind in head[3:-1])
        if row["side"] == "ours":
            assert int(row["casts"]) <= 50
    for model, mark in (("bert", 450), ("modernbert", 650), ("deberta", 750)):
        assert 200 < counts[model, "ours"] <= mark, counts
        assert counts[model, "Hugging Face padded"] > 2.2 * counts[model, "ours"], counts


def test_launches_over_lists_of_tensors():
    """As multi_tensor_apply cuts them: 320 chunks of 65,536 numbers or the list's limit of tensors
    a launch."""
    from bench.launches import list_launches

    small, large = torch.empty(10), torch.empty(65536 * 321, device="meta")
    assert list_launches([[small] * 110]) == 1 and list_launches([[small] * 111]) == 2
    assert list_launches([[small] * 37] * 4) == 2 and list_launches([[small] * 36] * 4) == 1
    assert list_launches([[large]]) == 2 and list_launches([[large, large]]) == 3
