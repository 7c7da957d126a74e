"""What graphs of a step stand on: padding to their sizes, and which sizes are captured. A capture
itself needs a card (tests/test_card.py): here a stand-in runs the pass at every replay.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.step import batch_of, positive_first, step_of
from kernels import attention, graphs, layers, packing
from kernels.graphs import Graphs
from kernels.packing import Size, padded, size_of
from test_encoder import ARCHITECTURES, build, random_sides

SIDES = [(1, 0), (3, 9), (2, 30), (5, 4)]


@pytest.mark.parametrize("seed", range(5))
def test_no_pair_of_the_tail_is_empty(seed):
    rng = np.random.default_rng(seed)
    encoder = build("bert")
    for count in (1, 15, 16, 17, 32, 64):
        batch = encoder.pack(*random_sides([(1, int(n)) for n in rng.integers(0, 60, count)]))
        size = size_of(batch)
        assert size.tokens % 256 == 0 and size.pairs % 16 == 1
        whole = padded(batch, size)
        tail = whole.lengths[count:]
        assert whole.lengths[:count] == batch.lengths and sum(whole.lengths) == size.tokens
        assert len(whole.lengths) == size.pairs and tail[:-1] == [1] * (len(tail) - 1)
        assert 1 <= tail[-1] <= 256 and len(tail) <= 16
        starts = [0, *np.cumsum(whole.lengths).tolist()]
        assert whole.cu_seqlens.tolist() == starts and whole.cu_seqlens.dtype == torch.int32
        for before, after in zip(batch.tensors()[1:], whole.tensors()[1:], strict=True):
            used = sum(batch.lengths)
            assert torch.equal(after[:used], before) and len(after) == size.tokens
            assert (after[used:] == before[0]).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tail_changes_neither_scores_nor_gradients(name):
    encoder = build(name).train()
    batch = encoder.pack(*random_sides(SIDES))
    whole = padded(batch, Size(96, 9))
    slopes = torch.randn(len(SIDES), generator=torch.Generator().manual_seed(1))
    found = []
    for packed in (batch, whole):
        scores = encoder(packed)
        assert scores.isfinite().all()
        scores = scores[: len(SIDES)]
        parameters = list(encoder.parameters())
        gradients = torch.autograd.grad(scores, parameters, slopes, allow_unused=True)
        found.append((scores.detach(), gradients))
    (scores, gradients), (scores_of_whole, gradients_of_whole) = found
    torch.testing.assert_close(scores_of_whole, scores, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, gradients_of_whole, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * max(1, float(a.abs().max())))


class Run:
    """Stands for a captured graph: what it holds is run at each replay. The generator is left as a
    capture leaves it."""

    count = 0

    def __init__(self, run, pool):
        before = torch.get_rng_state()
        run()
        torch.set_rng_state(before)
        self.run = run
        Run.count += 1

    def replay(self):
        self.run()


@pytest.fixture
def on_a_card(monkeypatch):
    """A GPU's way on a CPU, but for its kernels, which the interpreter runs slowly; small sizes."""
    attend = layers.varlen_attention

    def by_runs(q, k, v, cu_seqlens, *args, lengths, **how):
        # a batch to be replayed says of lengths how many there are
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_gpu_path", None)
            return attend(q, k, v, cu_seqlens, *args, lengths=cu_seqlens.diff().tolist(), **how)

    monkeypatch.setattr(attention, "_gpu_path", True)
    monkeypatch.setattr(layers, "varlen_attention", by_runs)
    monkeypatch.setattr(layers, "fuses", lambda x: False)
    monkeypatch.setattr(graphs, "captured", Run)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(packing, "TOKENS", 16)
    monkeypatch.setattr(packing, "PAIRS", 4)
    monkeypatch.setattr(Run, "count", 0)


def batch(k):
    """Two lists of three; 36, 42 or 48 tokens."""
    sides = random_sides([(2, 1 + k % 3)] * 6, seed=k)
    return batch_of(*sides, positive_first(2, 3))


def steps(count, dtype="bfloat16", captures=True, name="minilm"):
    """A model, its graphs, and the figures of so many steps of it, the last in micro-batches."""
    encoder = build(name, dropout=0.3).train()
    step = step_of(encoder, "infonce", dtype, lr=1e-2)
    step.gradient.keep = 10**6
    step.gradient.graphs = own = Graphs(encoder, dtype)
    own.captures = captures
    figures = []
    for k in range(count):
        if k == count - 1:
            step.gradient.max_tokens = 30
        figures += step(k, batch(k))
    return encoder, own, figures + step.flush()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["minilm", "electra-projected", "modernbert-mean", "deberta",
                                  "deberta-own-keys"])
def test_replayed_steps_are_those_that_run(on_a_card, name, dtype):
    """The same figures and weights to the bit, dropout on, weights moving, batches of two sizes."""
    (encoder, own, figures), (other, none, expected) = (
        steps(7, dtype, captures, name) for captures in (True, False))
    assert len(own.kept) == 2 and Run.count == 4 and not none.kept
    assert figures == expected and len(figures) == 7
    assert len(set(figures)) == 7 and all(math.isfinite(x) for pair in figures for x in pair)
    assert all(map(torch.equal, encoder.parameters(), other.parameters()))


def test_nothing_of_an_earlier_replay_is_left(on_a_card, monkeypatch):
    """Neither what was not finite nor the slope of a pair that is now of the tail."""
    monkeypatch.setattr(packing, "TOKENS", 48)
    encoder = build("bert").train()
    encoder.unused = torch.nn.Parameter(torch.zeros(2))
    own, packed = Graphs(encoder, "float32"), encoder.pack(*random_sides(SIDES))
    fewer = encoder.pack(*random_sides(SIDES[1:]))
    for slope in (1.0, math.nan, 1.0):
        own.gradients(own.scores(packed, 1), torch.full((4,), slope))
    scores = own.scores(fewer, 1)
    found = own.gradients(scores, torch.ones(3))
    assert len(own.kept) == 1 and own.replayed and len(scores) == 3
    known = torch.autograd.grad(encoder(fewer), own.parameters, torch.ones(3), allow_unused=True)
    assert [a is None for a in found] == [p is encoder.unused for p in own.parameters]
    for a, b in zip(found, known, strict=True):
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_sizes_are_captured_when_they_come_again_and_the_least_used_goes(monkeypatch):
    own = Graphs(build("bert"), "float32")
    monkeypatch.setattr(graphs, "MOST", 2)

    def come(tokens):
        size = Size(tokens, 5)
        own.uses[size] += 1
        if size not in own.kept and own._worth(size):
            own.kept[size] = SimpleNamespace()
        return {size.tokens for size in own.kept}

    assert come(16) == set() and come(16) == {16} and come(16) == {16}
    assert come(32) == {16} and come(32) == {16, 32}
    assert come(48) == {16, 32} and come(48) == {16, 32}  # used as often as 32, no more
    assert come(48) == {16, 48} and come(64) == {16, 48}
    own.captures = False
    assert [come(64) for _ in range(9)] == [{16, 48}] * 9


def test_without_the_memory_to_capture_steps_go_on(on_a_card, monkeypatch, capsys):
    def fails(run, pool):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(graphs, "captured", fails)
    _, own, figures = steps(4)
    assert not own.kept and not own.captures and len(figures) == 4
    assert capsys.readouterr().out.count("no memory for CUDA graphs") == 1


def test_pairs_beyond_the_models_own_lengths_run_as_they_are(on_a_card):
    encoder = build("bert").train()
    own = Graphs(encoder, "float32")
    own.longest = 20
    packed = encoder.pack(*random_sides(SIDES))
    for _ in range(3):
        scores = own.scores(packed, 1)
    assert len(scores) == len(SIDES) and not own.kept and not own.uses


def test_a_last_layer_that_crops_runs_as_it_is(on_a_card):
    names = [name for name in ARCHITECTURES if not build(name).fixed_launches]
    assert names == ["modernbert-last-local", "modernbert-narrow"]
    encoder = build(names[0]).train()
    own, packed = Graphs(encoder, "float32"), encoder.pack(*random_sides(SIDES))
    for _ in range(3):
        scores = own.scores(packed, 1)
    torch.testing.assert_close(scores, encoder(packed), rtol=1e-5, atol=1e-5)
    assert not own.kept


def test_halving_gives_the_memory_back(on_a_card):
    encoder, own, _ = steps(4)
    step = step_of(encoder, "infonce")
    step.gradient.graphs = own
    assert own.kept
    step.gradient.halve()
    assert not own.kept and own.totals is None and not own.captures
