"""What only a card can show: the whole encoder and train.py's step on it. `pytest -m gpu` runs
these and the kernels' own tests there; without a card they are skipped.
"""

import math

import pytest
import torch

from bench.step import batch_of, positive_first, step_of
from kernels.attention import dropout_from
from kernels.graphs import Graphs
from kernels.step import NonFiniteStep
from test_encoder import SIDES, build, padded_logits, random_sides

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="needs a card")]
FAMILIES = ["bert", "roberta", "electra-projected", "modernbert", "modernbert-mean",
            "modernbert-last-local", "deberta", "deberta-c2p"]  # fmt: skip


def padded_on_the_card(encoder, sides):
    """Hugging Face's logits in fp32, products without TF32."""
    tokenizer = encoder.tokenizer
    texts = [[" ".join(tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in side]
             for side in sides]
    batch = tokenizer(*texts, padding=True, return_tensors="pt").to("cuda")
    return encoder.model(**batch).logits.squeeze(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_on_the_card(name):
    encoder, sides = build(name), random_sides(SIDES)
    want = padded_logits(encoder, *sides).detach()
    encoder.cuda()
    torch.testing.assert_close(padded_on_the_card(encoder, sides).cpu(), want, rtol=1e-4, atol=1e-4)
    weight = torch.randn(len(want), generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for logits in (padded_on_the_card(encoder, sides), encoder(encoder.pack(*sides))):
        torch.testing.assert_close(logits.detach().cpu(), want, rtol=1e-4, atol=1e-4)
        encoder.zero_grad()
        (logits * weight).sum().backward()
        found.append([p.grad for p in encoder.parameters()])
    scale = max(float(g.abs().max()) for g in found[0] if g is not None)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= 1e-4 * scale
    torch.testing.assert_close(encoder.score_tokens(*sides), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("back_end", ["torch", "triton"])
@pytest.mark.parametrize("name", ["bert", "modernbert-mean", "deberta"])
def test_bf16_on_the_card(name, back_end, monkeypatch):
    """Scores near those of fp32, and both passes of a step under the same dropout."""
    monkeypatch.setenv("ATTENTION", back_end)
    encoder, sides = build(name, dropout=0.2).cuda(), random_sides(SIDES)
    packed = encoder.pack(*sides)
    with torch.no_grad():
        exact = encoder(packed)
        with torch.autocast("cuda", torch.bfloat16):
            rounded = encoder(packed)
    assert (rounded - exact).abs().max() < 0.15 * exact.std() + 0.02
    encoder.train()

    def run(seed, gradient):
        cast = torch.autocast("cuda", torch.bfloat16)
        with torch.set_grad_enabled(gradient), dropout_from(seed, encoder.device), cast:
            return encoder(packed)

    first = run(3, False)
    assert torch.equal(first, run(3, True)) and not torch.allclose(first, run(4, False), atol=1e-3)
    run(5, True).sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def step_and_batch(loss="infonce"):
    encoder = build("bert", dropout=0.1).cuda().train()
    batch = batch_of(*random_sides([(3, 5 + i) for i in range(16)]), positive_first(2, 8))
    return step_of(encoder, loss, "bfloat16", lr=1e-3), batch


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("loss", ["infonce", "ranknet"])
def test_nothing_in_a_step_waits_for_the_card(loss, graphs):
    step, batch = step_and_batch(loss)
    if graphs:
        step.gradient.graphs = Graphs(step.gradient.model, "bfloat16", warn=pytest.fail)
    for k in range(3):  # kernels are compiled, AdamW's state and the tables made
        step(k, batch)
    step.flush()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(3, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not graphs or step.gradient.graphs.replayed
    assert all(math.isfinite(x) for pair in step.flush() for x in pair)


def test_the_card_itself_leaves_the_weights_where_a_loss_is_not_finite():
    step, batch = step_and_batch()
    step(0, batch)
    step.flush()
    gradient = step.gradient
    before, loss = [p.detach().clone() for p in gradient.parameters], gradient.loss
    gradient.loss = lambda *lists: loss(*lists) * math.inf
    step(1, batch)
    gradient.loss = loss
    with pytest.raises(NonFiniteStep, match="step 2: .*queries q0, q1"):
        step(2, batch)
    assert all(map(torch.equal, before, gradient.parameters))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "modernbert-last-local"])
def test_a_replayed_pass_is_one_that_runs(name, dropout):
    """Scores bit for bit, dropout too; gradients to the rounding of bf16, as sums by atomics differ
    between any two runs."""
    encoder = build(name, dropout).cuda().train()
    runs, replays = (Graphs(encoder, "bfloat16", warn=pytest.fail) for _ in range(2))
    runs.captures = False
    kept = []
    for k, seed in enumerate((1, 2, 3, 3, 1, 2)):
        packed = encoder.pack(*random_sides([(3, 5 + i) for i in range(6 + 16 * (k % 2))]))
        slopes = torch.randn(len(packed.lengths), device="cuda")
        found = []
        for graphs in (runs, replays):
            scores = graphs.scores(packed, seed)
            gradients = graphs.gradients(scores, slopes)
            flat = torch.cat([g.flatten() for g in gradients if g is not None])
            found.append((scores.detach().clone(), flat))
        (scores, gradient), (replayed, of_replay) = found
        assert torch.equal(scores, replayed)
        assert (gradient - of_replay).norm() <= 1e-3 * gradient.norm()
        kept.append(scores)
    assert len(replays.kept) == 2 and not runs.kept
    assert torch.equal(kept[0], kept[4]) and not (dropout and torch.equal(kept[0], kept[2]))


@pytest.mark.parametrize("name", ["bert", "modernbert-mean", "deberta"])
def test_steps_by_graphs_end_where_others_do(name):
    """Two hundred steps on the same eight batches: the loss falls to the same."""
    ends = []
    for captures in (True, False):
        encoder = build(name, dropout=0.1).cuda().train()
        step = step_of(encoder, "infonce", "bfloat16", lr=1e-3)
        step.gradient.graphs = Graphs(encoder, "bfloat16", warn=pytest.fail)
        step.gradient.graphs.captures = captures
        batches = [batch_of(*random_sides([(3, 5 + i) for i in range(16)], seed),
                            positive_first(2, 8)) for seed in range(8)]
        figures = [pair for k in range(200) for pair in step(k, batches[k % 8])] + step.flush()
        losses = [loss for loss, _ in figures]
        ends.append((sum(losses[:8]) / 8, sum(losses[-24:]) / 24))
    (first, last), (first_run, last_run) = ends
    assert first == pytest.approx(first_run, rel=0.02)
    assert last < 0.75 * first and abs(last - last_run) < 0.15 * first, ends


def test_masks_of_replays_keep_what_they_should():
    """Over 400 seeds the scores are those of passes that run, and their mean is that of other
    seeds."""
    encoder = build("bert", dropout=0.25).cuda().train()
    runs, replays = (Graphs(encoder, "bfloat16", warn=pytest.fail) for _ in range(2))
    runs.captures = False
    packed = encoder.pack(*random_sides([(3, 5 + i) for i in range(6)]))
    found = torch.stack([torch.stack([graphs.scores(packed, seed).detach().clone()
                                      for graphs in (runs, replays)])
                         for seed in (1, 1, *range(400))])[2:]  # [seeds, 2, pairs]
    other = torch.stack([replays.scores(packed, seed).clone() for seed in range(400, 800)])
    spread = other.std(0) * (2 / 400) ** 0.5
    assert torch.equal(found[:, 0], found[:, 1])
    assert ((found[:, 1].mean(0) - other.mean(0)).abs() < 4.5 * spread).all()
    assert len(found[:, 1, 0].unique()) > 350
