"""kernels/exact.py and kernels/step.py: one exact step in one pass or two, on any number of threads
and ranks, with little memory."""

import ctypes
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

import toy
import training
from bench.step import lists_of
from kernels import losses
from kernels.encoder import CrossEncoder, micro_batches
from kernels.exact import ListGradient
from kernels.step import NonFiniteStep
from training import ROOT, batches, gradient_by, step_by, train_here, train_on_ranks, words_of

place = pytest.fixture(scope="module")(training.make_place)


def gradients(place, loss, max_tokens=None, keep=None, dtype="float32", dropout=True):
    """(loss, {parameter: gradient}, batch, model) of batch 1."""
    flags = {"max-tokens": max_tokens, "list-size": 12, "dtype": dtype}
    made, model, args = batches(place, loss=loss, lists=place / "teacher.run", **flags)
    model.train(dropout)
    gradient = gradient_by(args, model)
    if keep is not None:
        gradient.keep = keep
    value = gradient(1, *lists_of(made[1])).item()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return value, found, made[1], model


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_two_passes_equal_one(place, loss):
    """The same micro-batches, graphs kept or not: dropout on, ragged lists, every loss."""
    value, one, batch, _ = gradients(place, loss, 100, keep=10**9)
    again, two, _, _ = gradients(place, loss, 100, keep=0)
    assert len(set(batch.lengths.tolist())) > 1
    assert len(micro_batches([9] * len(batch.place), 100)) > 2
    assert value == again and math.isfinite(value) and value > 0
    # the bias of the head has gradient 0 but for rounding
    scale = max(g.abs().max() for g in one.values())
    for name, g in one.items():
        assert (two[name] - g).abs().max() <= 1e-6 * scale, name


def test_two_passes_under_bf16(place):
    _, one, _, _ = gradients(place, "infonce", 100, keep=10**9, dtype="bfloat16")
    _, two, _, _ = gradients(place, "infonce", 100, keep=0, dtype="bfloat16")
    # infonce's gradient of the head's bias is nothing else
    rounding = 1e-6 * max(g.norm() for g in one.values())
    for name, g in one.items():
        assert (two[name] - g).norm() <= 2**-7 * g.norm() + rounding, name


def hf_scores(model, batch):
    """Scores [queries, list] by one padded forward of Hugging Face's own model."""
    pairs, types = [], []
    for query, document in zip(batch.queries, batch.documents, strict=True):
        pairs.append(torch.tensor([2, *query.tolist(), 3, *document.tolist(), 3]))
        types.append(torch.tensor([0] * (len(query) + 2) + [1] * (len(document) + 1)))
    pad = torch.nn.utils.rnn.pad_sequence
    ids, types = pad(pairs, batch_first=True), pad(types, batch_first=True)
    mask = pad([torch.ones_like(pair) for pair in pairs], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits[:, 0]
    scores = torch.zeros(batch.targets.size).index_put((torch.as_tensor(batch.place),), logits)
    return scores.view(*batch.targets.shape)


@pytest.mark.parametrize("loss", ["infonce", "ranknet"])
def test_the_step_is_the_gradient_of_the_loss_on_whole_lists(place, loss):
    """Against one padded forward of Hugging Face's own model and autograd through the loss."""
    value, got, batch, model = gradients(place, loss, 60, keep=0, dropout=False)
    names = dict(model.named_parameters())
    model.zero_grad()
    expected = losses.LOSSES[loss](hf_scores(model.model, batch), torch.as_tensor(batch.targets),
                                   torch.as_tensor(batch.lengths))
    expected.backward()
    assert abs(value - expected.item()) < 1e-5
    for name, g in got.items():
        assert (names[name].grad.to_dense() - g).abs().max() < 1e-5, name


# ---------------------------------------------------------------------------------------- the step


def test_learning_rate_rises_and_falls_linearly(place, monkeypatch):
    made, model, args = batches(place, steps=10, warmup=4, lr=2.0)
    step, rates = step_by(args, model), []
    monkeypatch.setattr(ListGradient, "__call__", lambda self, *lists: torch.zeros(()))
    for k in range(10):
        step(k, made[0])
        rates.append(step.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 5 / 3, 4 / 3, 1.0, 2 / 3, 1 / 3])


def test_a_loss_that_is_not_finite_moves_no_weight_and_names_the_queries(place):
    made, model, args = batches(place)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.model.classifier.bias.data.fill_(math.inf)
    with pytest.raises(NonFiniteStep, match="step 1: loss nan, gradient norm nan; ") as caught:
        step_by(args, model)(0, made[0])
    assert all(qid in str(caught.value) for qid in made[0].qids)
    assert caught.value.step == 1 and math.isnan(caught.value.loss)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()
               if name != "model.classifier.bias")


# ----------------------------------------------------------------------------------------- threads


def test_a_step_does_not_depend_on_the_number_of_threads(place):
    """Micro-batches side by side, each with dropout of its own, their gradients added in order."""
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results += [gradients(place, "ranknet", 60, keep=keep) for keep in (0, 10**9)]
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    first, expected, batch, _ = results[0]
    assert len(micro_batches([9] * len(batch.place), 60)) > 4
    for value, got, *_ in results[2:]:
        assert value == first
        assert all(torch.equal(g, expected[name]) for name, g in got.items())


def test_threads_share_the_memory_of_a_step(place, monkeypatch):
    """Without --max-tokens, what all threads hold at once stays near 4 GiB, down to 512 tokens
    each."""
    _, model, args = batches(place)
    config = model.model.config
    monkeypatch.setattr(config, "num_hidden_layers", 12)
    monkeypatch.setattr(config, "hidden_size", 768)
    held, fit = {}, 2**32 // (34 * 4 * 12 * 768)
    for number in (1, 2, 3, 4, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        gradient = gradient_by(args, model)
        held[number] = gradient.max_tokens
        assert gradient.keep == fit
    assert held == {1: 1664, 2: 1664, 3: fit // 3, 4: fit // 4, 64: 512}
    args.max_tokens = 5000
    assert gradient_by(args, model).max_tokens == 5000


ARENAS = """
import ctypes, runpy, sys, threading
sys.path.insert(0, sys.argv[1])
from data import command

def count_arenas(out):
    import torch
    barrier = threading.Barrier(3)
    def hold():
        kept = torch.ones(10**6)
        barrier.wait()
        barrier.wait()
        return kept
    for _ in range(2):
        threading.Thread(target=hold).start()
    barrier.wait()
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
    barrier.wait()
    libc.fflush(None)
    sys.exit(0)

command.locked = count_arenas  # what main calls last before it trains
sys.argv[:2] = ["train.py"]
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU alone")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's malloc alone")
def test_threads_of_the_command_share_one_malloc_arena(place, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", ARENAS, ROOT, *words_of(place, out=tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<heap nr=") == 1, done.stdout


# ------------------------------------------------------------------------------------------- ranks


def assert_same_training(one, other):
    """Two run folders' last checkpoints, but for a key's bias and, under a loss of differences, the
    head's: they do not change the loss, and Adam makes whole steps of gradients that are rounding.
    """
    a, b = (torch.load(folder / "last/checkpoint.pt") for folder in (one, other))
    for name in a["model"]:
        if not name.endswith(("key.bias", "classifier.bias")):
            assert (a["model"][name] - b["model"][name]).abs().max() < 1e-5, name
    assert a["history"] == b["history"]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_the_same_model(place, tmp_path, world):
    flags = {"backbone": toy.model(tmp_path / "model"), "steps": 20, "eval-every": 10,
             "loss": "ranknet", "lists": place / "teacher.run", "list-size": 9, "batch-size": 5}
    assert train_here(place, out=tmp_path / "1", **flags) == 0
    words = words_of(place, out=tmp_path / "n", **flags)
    statuses, said = train_on_ranks(tmp_path / "ranks", world, words)
    assert statuses == [0] * world, said
    assert_same_training(tmp_path / "1", tmp_path / "n")


def limited_forward(error):
    """Makes rank 1 fail with `error` above 70 tokens, as a full card would."""
    forward = CrossEncoder.forward

    def limited(self, packed):
        if os.environ["RANK"] == "1" and self.training and sum(packed.lengths) > 70:
            raise error
        return forward(self, packed)

    CrossEncoder.forward = limited


def short_of_activations():
    limited_forward(torch.OutOfMemoryError("full"))


def short_in_cublas():
    limited_forward(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling "
                                 "`cublasCreate(handle)`"))


def short_of_the_sum():
    """Rank 1 has no room for the buffer of all gradients, the first time."""
    sums, failed = ListGradient._sums, []

    def limited(self):
        if os.environ["RANK"] == "1" and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("full")
        return sums(self)

    ListGradient._sums = limited


@pytest.mark.parametrize("short", [short_of_activations, short_in_cublas, short_of_the_sum])
def test_out_of_memory_on_one_rank_halves_the_budget_of_all(place, tmp_path, short):
    """Rank 1 alone has no room: both repeat the step, and the model is that of one process."""
    flags = {"backbone": toy.model(tmp_path / "model"), "steps": 5, "max-tokens": 100,
             "batch-size": 6}
    assert train_here(place, out=tmp_path / "1", **flags) == 0
    words = words_of(place, out=tmp_path / "n", **flags)
    statuses, said = train_on_ranks(tmp_path / "ranks", 2, words, before=short)
    assert statuses == [0, 0], said
    assert said.count("micro-batches of 50 tokens from here on") == 1
    assert_same_training(tmp_path / "1", tmp_path / "n")


# ------------------------------------------------------------------------------------------ memory


def limit(monkeypatch, tokens):
    """Forward passes above so many tokens fail, as on a full card."""
    forward = CrossEncoder.forward

    def limited(self, packed):
        if sum(packed.lengths) > tokens:
            raise torch.OutOfMemoryError("full")
        return forward(self, packed)

    monkeypatch.setattr(CrossEncoder, "forward", limited)


def test_out_of_memory_halves_the_budget_and_repeats_the_step(place, monkeypatch):
    """The step ends with the parameters of one that had the halved budget from the start."""
    results, warned = [], []
    for start, room in ((100, 70), (50, 10**9)):
        made, model, args = batches(place, **{"max-tokens": start})
        step = step_by(args, model.train(), warn=warned.append)
        with monkeypatch.context() as patch:
            limit(patch, room)
            figures = step(0, made[0])
        results.append((figures, [p.clone() for p in model.parameters()]))
    assert warned == ["step 1: out of GPU memory; micro-batches of 50 tokens from here on, step "
                      "repeated"]
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_out_of_memory_twice_is_an_error_that_names_the_budget(place, monkeypatch):
    made, model, args = batches(place, **{"max-tokens": 100})
    step = step_by(args, model.train(), warn=lambda line: None)
    limit(monkeypatch, 10)
    with pytest.raises(torch.OutOfMemoryError, match="step 1: .* micro-batches of 50 tokens too"):
        step(0, made[0])


# ------------------------------------------------------------------------------------------ a copy


NEEDED = ["exact", "attention", "cpu", "packing", "encoder", "layers", "linears", "loading",
          "modular", "sigmoid", "tokenizers"]
COPY = """
import sys
sys.path.insert(0, sys.argv[1])                 # of the toy tokenizer alone
import numpy as np, torch, toy
from transformers import BertConfig, BertForSequenceClassification
sys.path.pop(0)
from kernels.encoder import CrossEncoder
from kernels.exact import ListGradient

def softmax_of_the_first(scores, targets, lengths):
    inside = torch.arange(scores.shape[1]) < lengths[:, None]
    return -scores.masked_fill(~inside, -1e9).log_softmax(1)[:, 0].mean()

config = BertConfig(vocab_size=len(toy.WORDS) + 5, hidden_size=32, num_hidden_layers=2,
                    num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=1,
                    initializer_range=0.2)      # else every list's loss is nearly the same
torch.manual_seed(1)
ours, theirs = (BertForSequenceClassification(config).train() for _ in range(2))
theirs.load_state_dict(ours.state_dict())
encoder = CrossEncoder(ours, toy.tokenizer(), 8, 32).train()
gradient = ListGradient(encoder, softmax_of_the_first, seed=1, max_tokens=60)
gradient.keep = 0                               # two passes
optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]

rng, lengths = np.random.default_rng(0), np.array([6, 4, 5])
place = np.flatnonzero(np.arange(6) < lengths[:, None])
for step in range(5):
    queries, documents = ([rng.integers(5, config.vocab_size, rng.integers(2, longest), np.int32)
                           for _ in place] for longest in (6, 20))
    loss = gradient(step, queries, documents, place, np.zeros((3, 6), np.float32), lengths)

    width = max(len(q) + len(d) for q, d in zip(queries, documents)) + 3
    ids, types, mask = torch.zeros(3, len(place), width, dtype=torch.int64)
    for i, (q, d) in enumerate(zip(queries, documents)):
        end = len(q) + len(d) + 3
        ids[i, :end] = torch.tensor([2, *q, 3, *d, 3])
        types[i, len(q) + 2 : end] = 1
        mask[i, :end] = 1
    logits = theirs(input_ids=ids, token_type_ids=types, attention_mask=mask).logits[:, 0]
    scores = torch.zeros(18).index_put((torch.as_tensor(place),), logits).view(3, 6)
    expected = softmax_of_the_first(scores, None, torch.as_tensor(lengths))
    expected.backward()

    print(step, loss.item(), expected.item())
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.slow
def test_copied_with_what_it_needs_it_takes_the_steps_of_the_padded_model(tmp_path):
    """The files that its docstring names, in an empty folder: five steps in two passes, with
    losses equal to those of Hugging Face's padded model on whole lists."""
    from kernels import exact

    said = exact.__doc__[exact.__doc__.index("To copy it:") :]
    assert all(name in said for name in NEEDED[1:])
    (tmp_path / "kernels").mkdir()
    for name in NEEDED:
        shutil.copy(ROOT / "kernels" / f"{name}.py", tmp_path / "kernels")
    done = subprocess.run([sys.executable, "-c", COPY, ROOT / "tests"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [int(step) for step, *_ in rows] == list(range(5))
    found = [float(loss) for _, loss, _ in rows]
    assert found == pytest.approx([float(loss) for *_, loss in rows], abs=1e-4)
    assert all(map(math.isfinite, found)) and len(set(found)) == 5
