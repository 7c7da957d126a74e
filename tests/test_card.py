"""What only a card can show: the whole encoder and train.py's step on it. `pytest -m gpu` runs these
and the kernels' own tests there; without a card they are skipped.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_encoder import SIDES, build, padded_logits, random_sides

import train
from kernels.attention import dropout_from

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")]
FAMILIES = ["bert", "roberta", "electra-projected", "modernbert", "modernbert-mean", "modernbert-last-local",
            "deberta", "deberta-c2p"]  # fmt: skip


def padded_on_the_card(encoder, sides):
    """Hugging Face's logits in fp32, products without TF32."""
    tokenizer = encoder.tokenizer
    texts = [[" ".join(tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in side] for side in sides]
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
        with torch.set_grad_enabled(gradient), dropout_from(seed, encoder.device):
            with torch.autocast("cuda", torch.bfloat16):
                return encoder(packed)

    first = run(3, False)
    assert torch.equal(first, run(3, True)) and not torch.allclose(first, run(4, False), atol=1e-3)
    run(5, True).sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def step_and_batch(loss="infonce"):
    encoder = build("bert", dropout=0.1).cuda().train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    args = SimpleNamespace(max_tokens=None, dtype="bfloat16", seed=1, lr=1e-3, warmup=0, steps=10**6, clip=1.0,
                           out=Path("nowhere"))  # fmt: skip
    queries, documents = random_sides([(3, 5 + i) for i in range(16)])
    batch = {"qids": ["a", "b"], "own": torch.arange(16), "lengths": torch.full((2,), 8), "queries": queries,
             "targets": F.one_hot(torch.zeros(2, dtype=torch.int64), 8).float(), "documents": documents}
    return train.Step(encoder, loss, optimizer, args, 0, 1), batch


@pytest.mark.parametrize("loss", ["infonce", "ranknet"])
def test_nothing_in_a_step_waits_for_the_card(loss):
    step, batch = step_and_batch(loss)
    for k in range(3):  # kernels are compiled, AdamW's state and the tables made
        step(k, batch)
    step.flush()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(3, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(x) for pair in step.flush() for x in pair)


def test_the_card_itself_leaves_the_weights_where_a_loss_is_not_finite():
    step, batch = step_and_batch()
    step(0, batch)
    step.flush()
    before, loss = [p.detach().clone() for p in step.parameters], step.loss
    step.loss = lambda *how: loss(*how) * math.inf
    step(1, batch)
    step.loss = loss
    with pytest.raises(train.BadInput, match="step 2: .*queries a, b"):
        step(2, batch)
    assert all(map(torch.equal, before, step.parameters))
