"""The way of a GPU, taken on a CPU: fused kernels and attention in Triton's interpreter, joined bf16
weights, a step that reads its figures late. What only a card can show is in `pytest -m gpu` and
`python -m kernels.bench gpu`; on a card nothing of this runs.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_encoder import build, padded_logits, random_sides

import kernels.encoder as encoders
import train
from evaluate import BadInput
from kernels import attention, fused, layers
from kernels.attention import dropout_from, next_draw
from kernels.linears import Narrow

SIDES = [(1, 0), (3, 4), (4, 9)]  # short: an interpreted program costs milliseconds
FAMILIES = ["bert", "electra-projected", "modernbert-mean", "modernbert-narrow", "deberta-own-keys", "deberta-c2p"]
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_card.py runs the same on the card")
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


def gradients(encoder, logits):
    encoder.zero_grad()
    weight = torch.randn(len(logits), generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    return {n: p.grad for n, p in encoder.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
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
    for n, g in wanted.items():  # both sides are fp32; some gradients are rounding alone: hence the floor
        scale = max(float(g.abs().max()), 2e-2 * largest)
        assert (got[n] - g).abs().max() <= 2e-5 * scale, n


def formulas(monkeypatch):
    """The fused kernels as formulas in fp32, rounded where they round: as exact and, on a CPU, quick."""

    def add_norm(branch, residual, weight, bias, eps, *, branch_bias=None, dtype=None, pre_norm=False):
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
    """Scores and all gradients, as one vector each, against those of fp32; the mean over weights and
    batches, as a single one is nearer or further by half through luck alone."""
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
    """Products and gradients bit for bit those of autocast, also after a weight has changed."""
    torch.manual_seed(0)
    q, k, v, out = (torch.nn.Linear(24, n) for n in (24, 24, 24, 7))
    alone = torch.nn.Linear(24, 5, bias=False)
    x = torch.randn(9, 24)
    leaves = [p for linear in (q, k, v, out, alone) for p in linear.parameters()]

    def run(project):
        a, b, c = project(x, q, k, v)
        return project((a + b + c).float(), out).float().sum() + project(x, alone).float().square().sum()

    def by_autocast(x, *linears):
        with torch.autocast("cpu", torch.bfloat16):
            outs = [linear(x) for linear in linears]
        return outs if len(outs) > 1 else outs[0]

    with torch.inference_mode():  # scoring comes first: what it makes serves training
        narrow = Narrow([(q, k, v), (out,), (alone,)], torch.bfloat16)
        narrow.projector()
    for _ in range(2):
        want, got = run(by_autocast), run(narrow.projector())
        assert torch.equal(want, got)
        for a, b in zip(*(torch.autograd.grad(y, leaves) for y in (want, got)), strict=True):
            assert b.dtype == torch.float32 and torch.equal(a, b)
        with torch.no_grad():
            k.weight.mul_(0.5)
    with torch.no_grad():
        assert torch.equal(narrow.projector()(x, alone), by_autocast(x, alone))


def test_part_of_a_group_and_maps_without_their_bias():
    q, k, v = (torch.nn.Linear(8, 8) for _ in range(3))
    narrow, x = Narrow([(q, k, v)], torch.bfloat16), torch.randn(5, 8).bfloat16()
    project = narrow.projector()
    whole = project(x, q, k, v)
    assert all(map(torch.equal, project(x, q, k), whole[:2])) and torch.equal(project(x, v), whole[2])
    assert all(map(torch.equal, project(x, v, q), (whole[2], whole[0])))
    lone = Narrow([(q,)], torch.bfloat16).projector()
    bare = torch.nn.functional.linear(x, q.weight.bfloat16())
    assert torch.equal(lone(x, q, bias=False), bare)
    want = torch.nn.functional.linear(x, q.weight[2:5].bfloat16(), q.bias[2:5].bfloat16())
    assert torch.equal(lone(x, q, part=slice(2, 5)), want)


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta"])
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
        assert not torch.equal(encoder(packed), encoder(packed))  # without a seed each pass draws anew


def test_every_dropout_of_a_pass_has_a_number_of_its_own():
    with dropout_from(2**62 + 5, CPU):
        draws = [next_draw(CPU) for _ in range(3)]
    assert [site for _, site in draws] == [1, 2, 3]
    assert all(seed.tolist() == [2**62 + 5] and seed.dtype == torch.int64 for seed, _ in draws)
    torch.manual_seed(3)
    (one, _), (other, _) = next_draw(CPU), next_draw(CPU)
    torch.manual_seed(3)
    assert torch.equal(next_draw(CPU)[0], one) and not torch.equal(one, other)


# ------------------------------------------------------------------------------------ the step


def step_of(encoder, loss="infonce", optimizer=True, **changes):
    args = dict(max_tokens=None, dtype="float32", seed=1, lr=1e-3, warmup=0, steps=100, clip=0.05, out=None)
    made = None
    if optimizer:
        made = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    args = SimpleNamespace(**args | changes)
    args.out = Path("nowhere")
    step = train.Step(encoder, loss, made, args, 0, 1)
    step.keep = 10**6
    return step


def batch_of(k, lists=2, width=3):
    rng = np.random.default_rng(k)
    n = lists * width
    queries, documents = random_sides([(int(rng.integers(1, 4)), int(rng.integers(1, 6))) for _ in range(n)], k)
    targets = torch.zeros(lists, width)
    targets[:, 0] = 1
    return {"qids": [f"k{k}q{i}" for i in range(lists)], "own": torch.arange(n), "targets": targets,
            "lengths": torch.full((lists,), width), "queries": queries, "documents": documents}  # fmt: skip


def test_a_step_moves_the_weights_as_on_a_cpu(monkeypatch):
    """Three steps with clipping and decay, dropout off: the same losses, norms and weights."""
    ends, figures = [], []
    for path in (None, True):
        monkeypatch.setattr(attention, "_gpu_path", path)
        encoder = build("bert").train()
        step = step_of(encoder)
        if path:
            formulas(monkeypatch)
        found = [pair for k in range(3) for pair in step(k, batch_of(k))]
        if path:
            assert len(found) == 2  # the last step's figures are on their way
        figures.append(found + step.flush())
        ends.append([p.detach().clone() for p in encoder.parameters()])
    assert figures[0] == [pytest.approx(pair, rel=1e-4) for pair in figures[1]]
    assert all(norm > 0.05 for _, norm in figures[0]), "nothing was clipped"
    for (n, _), a, b in zip(encoder.named_parameters(), *ends, strict=True):
        if not n.endswith(("key.bias", "classifier.out_proj.bias", "classifier.bias")):  # gradient 0 but for rounding
            assert (a - b).abs().max() < 5e-5, n  # a twentieth of a step's lr


@pytest.mark.parametrize("keep", [10**6, 0])
def test_two_passes_equal_one(gpu_path, keep):
    encoder = build("minilm", dropout=0.3).train()  # of one layer: interpreted programs are slow
    step = step_of(encoder, "ranknet", optimizer=False, max_tokens=40)
    one = step.gradients(0, batch_of(4)), [p.grad.clone() for p in step.parameters]
    encoder.zero_grad()
    step.keep = keep
    two = step.gradients(0, batch_of(4)), [p.grad for p in step.parameters]
    assert one[0] == two[0] and one[0] > 0
    scale = max(g.abs().max() for g in one[1])
    assert all((a - b).abs().max() <= 1e-6 * scale for a, b in zip(one[1], two[1], strict=True))


def test_a_figure_that_is_not_finite_is_named_a_step_later_and_moves_no_weight(gpu_path, monkeypatch):
    formulas(monkeypatch)
    encoder = build("minilm").train()
    step = step_of(encoder)
    assert step(0, batch_of(0)) == []
    assert math.isfinite(step(1, batch_of(1))[0][0])
    step.flush()
    before = [p.detach().clone() for p in encoder.parameters()]
    loss = step.loss
    step.loss = lambda *how: loss(*how) * math.inf
    assert step(2, batch_of(2)) == []
    step.loss = loss
    with pytest.raises(BadInput, match="step 3: .*k2q0, k2q1.*no checkpoint yet"):
        step(3, batch_of(3))  # finite by itself, but begun before the other was read
    assert all(map(torch.equal, before, encoder.parameters()))


def test_an_optimizer_that_cannot_skip_is_refused(gpu_path):
    encoder = build("bert")
    args = SimpleNamespace(max_tokens=None, dtype="float32")
    with pytest.raises(ValueError, match="fused"):
        train.Step(encoder, "infonce", torch.optim.AdamW(encoder.parameters(), fused=False), args, 0, 1)


def test_how_much_is_kept_follows_the_free_memory(gpu_path, monkeypatch):
    """0.8 of what is free, less gradients and AdamW's two moments until they are there."""
    formulas(monkeypatch)
    encoder = build("bert")
    step = step_of(encoder, dtype="bfloat16", max_tokens=60)
    numbers = sum(p.numel() for p in encoder.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20 + 12 * numbers, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    a_token = 40 * 32 * 3
    assert step._room() == int(0.8 * 3 * 2**20) // a_token
    step.args.dtype = "float32"
    assert step._room() == int(0.8 * 3 * 2**20) // (2 * a_token)
    step.keep = None
    step.gradients(0, batch_of(1))
    assert step.keep == int(0.8 * 3 * 2**20) // (2 * a_token)
    deberta = build("deberta").model.config
    assert encoders.kept_bytes(deberta, torch.bfloat16) == 3 * (40 * 32 + 4 * 2 * 512)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
])  # fmt: skip
def test_memory_that_runs_out_in_cublas_or_triton_halves_the_budget_too(error, monkeypatch, capsys):
    encoder = build("bert").train()
    step, forward = step_of(encoder, max_tokens=60), type(encoder).forward

    def limited(self, packed):
        if sum(packed.lengths) > 40:
            raise error
        return forward(self, packed)

    monkeypatch.setattr(type(encoder), "forward", limited)
    assert len(step(0, batch_of(0))) == 1
    assert step.max_tokens == 30 and "micro-batches of 30 tokens" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch):
    encoder = build("bert").train()
    step = step_of(encoder)
    monkeypatch.setattr(type(encoder), "forward", lambda self, packed: 1 + torch.zeros(3) @ torch.zeros(4))
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch|shapes"):
        step(0, batch_of(0))


# ------------------------------------------------------------------------------------ what goes to the card


def test_a_packed_batch_is_one_buffer_of_aligned_parts():
    tensors = [torch.arange(5), torch.arange(100, 108), torch.arange(3, dtype=torch.int32), torch.arange(0)]
    together, places = encoders.one_buffer(tensors)
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
    """Queries, keys and values as one; in the last layer of a [CLS] head the queries by themselves."""
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


# ------------------------------------------------------------------------------------ launches


def test_launches_of_a_step_keep_their_marks():
    """At most 450 kernels for BERT's shapes, 650 for ModernBERT's, 750 for DeBERTa's, and far fewer than
    the same loop over Hugging Face's padded model; nothing is cast at every use."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "kernels.bench", "launches"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    head, rows = table[0], [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    assert head[:3] == ["model", "side", "kernels"] and len(rows) == 8
    counts = {(row["model"], row["side"]): int(row["kernels"]) for row in rows}
    for row in rows:
        assert int(row["kernels"]) == sum(int(row[kind]) for kind in head[3:-1])
        if row["side"] == "ours":
            assert int(row["casts"]) < 50
    for model, mark in (("minilm", 450), ("bert", 450), ("modernbert", 650), ("deberta", 750)):
        assert 200 < counts[model, "ours"] <= mark, counts
        assert counts[model, "Hugging Face padded"] > 2.2 * counts[model, "ours"], counts


def test_launches_over_lists_of_tensors():
    """As multi_tensor_apply cuts them: 320 chunks of 65,536 numbers or the list's limit of tensors a launch."""
    from kernels.bench.launches import list_launches

    small, large = torch.empty(10), torch.empty(65536 * 321, device="meta")
    assert list_launches([[small] * 110]) == 1 and list_launches([[small] * 111]) == 2
    assert list_launches([[small] * 37] * 4) == 2 and list_launches([[small] * 36] * 4) == 1
    assert list_launches([[large]]) == 2 and list_launches([[large, large]]) == 3
