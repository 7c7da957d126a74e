"""train.py: the sampler, the exact step, the schedule, resumption to the byte, several processes, the command."""

import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

import rerank
import train
from evaluate import BadInput
from kernels import losses
from kernels.encoder import CrossEncoder, micro_batches

ROOT = Path(train.__file__).resolve().parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    rerank.CACHE = train.CACHE = folder / "cache" / "cross-encoder-study"
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    toy.corpus(folder / "corpus")
    toy.model(folder / "model", dropout=0.1)
    texts = rerank.Texts(str(folder / "corpus"))
    run = rerank.bm25(texts, texts.all_queries, 12)
    rng = np.random.default_rng(0)
    rerank.write_run(folder / "teacher.run", {
        q: dict(zip(list(ranked)[: 6 + 3 * i % 9], rng.standard_normal(12).round(1).tolist(), strict=False))
        for i, (q, ranked) in enumerate(run.items())})  # 6, 9 or 12 documents, with ties
    with open(folder / "triples.tsv", "w") as file:
        file.writelines(f"q{i % 20}\td{i % 20}\td{(i * 7 + 21) % 60}\n" for i in range(50))
    with open(folder / "scored.tsv", "w") as file:
        file.writelines(f"{i * 0.25}\t{-i}\tq{i % 20}\td{i % 20}\td{(i * 7 + 21) % 60}\n" for i in range(50))
    return folder


def arguments(place, **changes):
    flags = {"backbone": place / "model", "dataset": place / "corpus", "steps": 6, "batch-size": 4, "lr": 1e-3,
             "out": place / "out", "dtype": "float32", "device": "cpu", **changes}
    return train.parse([w for k, v in flags.items() if v is not None
                        for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])])


# -------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 1000, 4097])
def test_permuted_is_a_permutation_drawn_by_the_seed(n):
    index = np.arange(n)
    got = train.permuted(index, n, 7)
    assert sorted(got) == list(range(n))
    assert np.array_equal(got, np.concatenate([train.permuted(index[i : i + 1], n, 7) for i in range(n)]))
    if n >= 64:
        assert not np.array_equal(got, train.permuted(index, n, 8))
        assert np.mean(np.abs(np.diff(got)) == 1) < 0.2  # neighbours do not stay together


def test_permuted_is_uniform_in_the_first_place():
    first = np.array([train.permuted(np.zeros(1, np.int64), 8, seed)[0] for seed in range(4000)])
    counts = np.bincount(first, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-square, 7 degrees: P < 0.0001


def test_triples_lines(place):
    source = train.Triples(place / "triples.tsv", "bce")
    assert len(source) == 50
    assert source.item(49, None) == ("q9", ["d9", "d4"], [1.0, 0.0])
    scored = train.Triples(place / "scored.tsv", "marginmse")
    assert scored.item(3, None) == ("q3", ["d3", "d42"], [0.75, -3.0])
    assert train.Triples(place / "scored.tsv", "hinge").item(3, None)[2] == [1.0, 0.0]


@pytest.mark.parametrize("content, where, what", [
    (b"q1\td1\td2\nq1\td1\n", ":2", "2 tab-separated columns, 3"),
    (b"q1\td1\n", ":1", "2 tab-separated columns"),
    (b"", "", "empty"),
    (b"\x1f\x8bxxxx\n", "", "gzip"),
])
def test_broken_triples(tmp_path, place, content, where, what):
    file = tmp_path / "t.tsv"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(f"t.tsv{where}") + f".*{what}"):
        train.Triples(file, "bce")


def test_triples_with_a_score_that_is_no_number(tmp_path, place):
    file = tmp_path / "t.tsv"
    file.write_text("1.0\t2.0\tq1\td1\td2\n1.0\tnan\tq1\td1\td2")  # and no newline at the end
    source = train.Triples(file, "marginmse")
    assert len(source) == 2 and source.item(0, None)[2] == [1.0, 2.0]
    with pytest.raises(BadInput, match=r"t.tsv:2"):
        source.item(1, None)


def test_a_last_line_without_a_newline_at_the_end_of_a_chunk_is_read(tmp_path, place):
    """The file is exactly one chunk of the indexer, 16 MiB, and does not end in a newline."""
    line = b"q1\td1\td2\n"
    body = line * ((1 << 24) // len(line))
    (tmp_path / "t.tsv").write_bytes(body[: (1 << 24) - 20].rpartition(b"\n")[0] + b"\n" + b"q2\td1\t")
    short = (1 << 24) - (tmp_path / "t.tsv").stat().st_size
    with open(tmp_path / "t.tsv", "ab") as file:
        file.write(b"d" * short)
    source = train.Triples(tmp_path / "t.tsv", "bce")
    assert source.item(len(source) - 1, None)[0] == "q2" and source.item(0, None)[0] == "q1"


def test_three_columns_have_no_teacher(place):
    with pytest.raises(BadInput, match="three columns"):
        train.Triples(place / "triples.tsv", "marginmse")


def lists(place, loss="infonce", size=5, **how):
    texts = rerank.Texts(str(place / "corpus"), split="train")
    run = rerank.candidates(texts, place / "teacher.run", None, 100)
    return train.Lists(run, texts, loss, size, **how), run.nested(), texts


def test_label_lists_hold_one_relevant_and_unjudged_others(place):
    source, run, texts = lists(place)
    for i in range(len(source)):
        qid, docids, targets = source.item(i, i)
        assert targets == [1.0, 0.0, 0.0, 0.0, 0.0] and len(set(docids)) == 5
        assert texts.qrels[qid].get(docids[0], 0) > 0
        assert all(d in run[qid] and texts.qrels[qid].get(d, 0) == 0 for d in docids[1:])
        assert source.item(i, i) == (qid, docids, targets)
    assert source.item(0, 5)[1] != source.item(0, 6)[1]


def test_teacher_lists_hold_the_runs_scores(place):
    source, run, texts = lists(place, "ranknet", 50)
    assert len(run) == 20 and {run for run in map(source.run.qids.__getitem__, source.queries)} == set(texts.qrels)
    qid, docids, targets = source.item(0, 0)
    assert dict(zip(docids, targets, strict=True)) == pytest.approx(run[qid])
    few, _, _ = lists(place, "kl", 3)
    drawn = [few.item(0, s)[1] for s in range(30)]
    assert {len(d) for d in drawn} == {3} and set().union(*drawn) == set(run[qid])


def test_marginmse_lists_start_with_the_relevant_document(place):
    source, run, texts = lists(place, "marginmse", 4)
    for i in range(len(source)):
        qid, docids, targets = source.item(i, i)
        relevant = [d for d in docids if texts.qrels.get(qid, {}).get(d, 0) > 0]
        assert docids[0] == relevant[0] if relevant else targets[0] == max(targets)
        assert targets == pytest.approx([run[qid][d] for d in docids])


def test_shared_lists_are_the_same_for_every_loss(place):
    drawn = {}
    for loss in losses.LOSSES:
        source, run, texts = lists(place, loss, 4, shared=True)
        items = [source.item(i, i) for i in range(len(source))]
        drawn[loss] = [(qid, docids) for qid, docids, _ in items]
        if loss in train.FROM_TEACHER:
            assert all(t == pytest.approx([run[q][d] for d in ds]) for q, ds, t in items)
        else:
            assert all(t == [1.0, 0.0, 0.0, 0.0] for _, _, t in items)
    assert all(d == drawn["bce"] for d in drawn.values())


def test_max_teacher_margin_leaves_out_likely_false_negatives(place):
    source, run, texts = lists(place, max_margin=0.5)
    for i in range(len(source)):
        qid, docids, _ = source.item(i, 0)
        (relevant,) = texts.qrels[qid]
        if relevant in run[qid]:
            assert all(run[qid][d] <= run[qid][relevant] - 0.5 + 1e-6 for d in docids[1:])


def test_random_negatives_are_never_the_relevant_one(place):
    everywhere, run, texts = lists(place, random_share=1.0)
    nowhere, _, _ = lists(place, random_share=0.0)
    outside = 0
    for i in range(len(everywhere)):
        for seed in range(20):
            qid, docids, _ = everywhere.item(i, seed)
            assert len(set(docids)) == 5 and not set(texts.qrels[qid]) & set(docids[1:])
            outside += sum(d not in run[qid] for d in docids[1:])
            assert all(d in run[qid] for d in nowhere.item(i, seed)[1][1:])
    assert outside > 500


def batches(place, rank=0, world=1, **changes):
    args = arguments(place, **changes)
    texts = rerank.Texts(str(place / "corpus"), split="train")
    model = CrossEncoder.from_pretrained(place / "model", dtype="float32", device="cpu")
    return train.Batches(train.open_source(args, texts), texts, model.tokenize, args, rank, world), model, args


def test_batch_k_is_a_pure_function_of_seed_and_k(place):
    made, _, _ = batches(place)
    again, _, _ = batches(place)
    later = [again.ids(k) for k in (9, 3, 5)]
    assert [made.ids(k) for k in (3, 5, 9)] == [later[1], later[2], later[0]]
    assert made.ids(0) != batches(place, seed=2)[0].ids(0)
    seen = [row for k in range(4) for row, *_ in made.ids(k)]  # 16 queries, 4 a step: one pass
    assert sorted(seen) == list(range(16))
    assert [row for k in range(4, 8) for row, *_ in made.ids(k)] != seen  # another order in the next pass


def test_ranks_share_a_batch(place):
    whole = batches(place)[0][2]
    parts = [batches(place, rank, 3)[0][2] for rank in range(3)]
    assert sorted(torch.cat([p["own"] for p in parts]).tolist()) == whole["own"].tolist()
    for part in parts:
        assert part["qids"] == whole["qids"] and torch.equal(part["targets"], whole["targets"])
        for where, q, d in zip(part["own"].tolist(), part["queries"], part["documents"], strict=True):
            i = whole["own"].tolist().index(where)
            assert np.array_equal(q, whole["queries"][i]) and np.array_equal(d, whole["documents"][i])


# --------------------------------------------------------------------------------------------------- the step


def gradients(place, loss, max_tokens=None, keep=None, dtype="float32", dropout=True, k=1):
    made, model, args = batches(place, loss=loss, lists=place / "teacher.run",
                                **{"max-tokens": max_tokens, "list-size": 12, "dtype": dtype})
    model.train(dropout)
    step = train.Step(model, loss, None, args, 0, 1)
    step.keep = keep if keep is not None else step.keep
    value = step.gradients(k, made[k])
    return value.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, made[k], model


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_two_passes_equal_one(place, loss):
    """The same micro-batches, graphs kept or not: dropout on, ragged lists, every loss."""
    one = gradients(place, loss, 100, keep=10**9)
    two = gradients(place, loss, 100, keep=0)
    assert len(set(one[2]["lengths"].tolist())) > 1 and len(micro_batches([9] * len(one[2]["own"]), 100)) > 2
    assert one[0] == two[0] and math.isfinite(one[0]) and one[0] > 0
    scale = max(g.abs().max() for g in one[1].values())  # the bias of the head has gradient 0 but for rounding
    for name, g in one[1].items():
        assert (two[1][name] - g).abs().max() <= 1e-6 * scale, name


def test_two_passes_under_bf16(place):
    one = gradients(place, "infonce", 100, keep=10**9, dtype="bfloat16")
    two = gradients(place, "infonce", 100, keep=0, dtype="bfloat16")
    rounding = 1e-6 * max(g.norm() for g in one[1].values())  # infonce's gradient of the head's bias is nothing else
    for name, g in one[1].items():
        assert (two[1][name] - g).norm() <= 2**-7 * g.norm() + rounding, name


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
    assert len(micro_batches([9] * len(results[0][2]["own"]), 60)) > 4
    for value, got, *_ in results[2:]:
        assert value == results[0][0] and all(torch.equal(g, results[0][1][name]) for name, g in got.items())


def test_threads_share_the_memory_of_a_step(place, monkeypatch):
    """Without --max-tokens, what all threads hold at once stays near 4 GiB, down to 512 tokens each."""
    made, model, args = batches(place)
    config = model.model.config
    monkeypatch.setattr(config, "num_hidden_layers", 12)
    monkeypatch.setattr(config, "hidden_size", 768)
    held = {}
    for number in (1, 2, 3, 4, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        step = train.Step(model, "infonce", None, args, 0, 1)
        held[number] = step.max_tokens
        assert step.keep == 2**32 // (34 * 4 * 12 * 768)
    assert held == {1: 1664, 2: 1664, 3: step.keep // 3, 4: step.keep // 4, 64: 512}
    args.max_tokens = 5000
    assert train.Step(model, "infonce", None, args, 0, 1).max_tokens == 5000


ARENAS = """
import ctypes, os, sys, threading
sys.path.insert(0, sys.argv[1])
import train, torch
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
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's malloc alone")
def test_threads_share_one_malloc_arena():
    env = {k: v for k, v in os.environ.items() if k not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    done = subprocess.run([sys.executable, "-c", ARENAS, ROOT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<heap nr=") == 1, done.stdout


@pytest.mark.parametrize("loss", ["infonce", "ranknet"])
def test_the_step_is_the_gradient_of_the_loss_on_whole_lists(place, loss):
    """Against one padded forward of Hugging Face's own model and autograd through the loss."""
    value, got, batch, model = gradients(place, loss, 60, keep=0, dropout=False)
    names = dict(model.named_parameters())
    model.zero_grad()
    rows, width = batch["targets"].shape
    scores = torch.zeros(rows * width)
    pairs = [[2, *q.tolist(), 3, *d.tolist(), 3] for q, d in zip(batch["queries"], batch["documents"], strict=True)]
    types = [[0] * (len(q) + 2) + [1] * (len(d) + 1) for q, d in zip(batch["queries"], batch["documents"], strict=True)]
    pad = max(map(len, pairs))
    ids = torch.tensor([p + [0] * (pad - len(p)) for p in pairs])
    mask = torch.tensor([[1] * len(p) + [0] * (pad - len(p)) for p in pairs])
    kinds = torch.tensor([t + [0] * (pad - len(t)) for t in types])
    logits = model.model(input_ids=ids, attention_mask=mask, token_type_ids=kinds).logits[:, 0]
    expected = losses.LOSSES[loss](scores.index_put((batch["own"],), logits).view(rows, width), batch["targets"],
                                   batch["lengths"])
    expected.backward()
    assert abs(value - expected.item()) < 1e-5
    for name, g in got.items():
        assert (names[name].grad.to_dense() - g).abs().max() < 1e-5, name


def test_out_of_memory_halves_the_budget_and_repeats_the_step(place, monkeypatch, capsys):
    """A forward pass that fails above 70 tokens, as a full card would: the step ends with the parameters of a step
    that had the halved budget from the start."""
    results = []
    for start, room in ((100, 70), (50, 10**9)):
        made, model, args = batches(place, **{"max-tokens": start})
        step = train.Step(model, "infonce", torch.optim.AdamW(model.parameters()), args, 0, 1)
        forward = CrossEncoder.forward

        def limited(self, packed, room=room, forward=forward):
            if sum(packed.lengths) > room:
                raise torch.OutOfMemoryError("full")
            return forward(self, packed)

        monkeypatch.setattr(CrossEncoder, "forward", limited)
        model.train()
        results.append((step(0, made[0]), [p.clone() for p in model.parameters()]))
        monkeypatch.setattr(CrossEncoder, "forward", forward)
    assert "micro-batches of 50 tokens" in capsys.readouterr().err
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_worker_processes_make_the_same_batches(place):
    made, _, _ = batches(place)
    for k, batch in zip(range(2, 8), made.loader(2, 8, 2), strict=True):
        own = made[k]
        assert batch["qids"] == own["qids"] and torch.equal(batch["targets"], own["targets"])
        assert all(np.array_equal(a, b) for a, b in zip(batch["documents"], own["documents"], strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(batch["queries"], own["queries"], strict=True))


def test_learning_rate_rises_and_falls_linearly(place):
    made, model, args = batches(place, steps=10, warmup=4, lr=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    step, rates = train.Step(model, "infonce", optimizer, args, 0, 1), []
    step.gradients = lambda k, batch: torch.zeros(())
    for k in range(10):
        step(k, made[0])
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 5 / 3, 4 / 3, 1.0, 2 / 3, 1 / 3])


def test_a_loss_that_is_not_finite_stops_and_names_the_queries(place):
    made, model, args = batches(place)
    before = {n: p.clone() for n, p in model.named_parameters()}
    step = train.Step(model, "infonce", torch.optim.AdamW(model.parameters()), args, 0, 1)
    model.model.classifier.bias.data.fill_(math.inf)
    with pytest.raises(BadInput) as e:
        step(0, made[0])
    assert all(q in str(e.value) for q in made[0]["qids"]) and "step 1:" in str(e.value)
    assert "there is no checkpoint yet" in str(e.value)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n != "model.classifier.bias")


# ----------------------------------------------------------------------------------------------- whole runs


def command(place, **changes):
    args = arguments(place, **changes)
    return train.train(args, 0, 1), args


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_run_folder(place, capsys):
    code, args = command(place, out=place / "full", steps=8, **{"eval-every": 3})
    assert code == 0
    made = json.loads((args.out / "args.json").read_text())
    assert made["flags"]["seed"] == 1 and made["versions"]["torch"] == torch.__version__
    log = [json.loads(line) for line in open(args.out / "log.jsonl")]
    assert [r["step"] for r in log if "RR@10" in r] == [3, 6, 8]
    assert {r["step"] for r in log if "loss" in r} == set(range(1, 9))
    out = capsys.readouterr().out
    assert re.search(r"\| BM25 +\|", out) and "nDCG@10" in out and "AP" in out
    card = (args.out / "README.md").read_text()
    assert card.startswith("---\n") and "BM25" in card
    assert CrossEncoder.from_pretrained(args.out).doc_length == 32
    with pytest.raises(BadInput, match="--resume"):
        command(place, out=place / "full", steps=8, **{"eval-every": 3})
    before = (args.out / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(args.out / "last")  # a finished run needs no checkpoint to be known as one
    assert command(place, out=place / "full", steps=8, resume=True, **{"eval-every": 3})[0] == 0
    assert (args.out / "model.safetensors").stat().st_mtime_ns == before  # not trained again
    with pytest.raises(BadInput, match=r"--lr 0.001 \(now 0.5\)"):
        command(place, out=place / "full", steps=8, lr=0.5, resume=True, **{"eval-every": 3})


def test_the_best_step_is_kept(place, monkeypatch):
    scores = iter([0.2, 0.7, 0.4])
    monkeypatch.setattr(train.Validation, "__call__", lambda *_: {"score": next(scores), "collapsed": False})
    kept = []
    monkeypatch.setattr(train, "save_model", lambda model, out: kept.append(1) or model.save_pretrained(out))
    command(place, out=place / "best", steps=6, **{"eval-every": 2})
    assert len(kept) == 2
    assert json.loads((place / "best/log.jsonl").read_text().splitlines()[-1])["score"] == 0.4


def test_collapse_is_reported(place, capsys):
    made, model, args = batches(place)
    model.model.classifier.weight.data.zero_()
    validation = train.Validation([str(place / "corpus/dev")], "RR@10", 20, None, 0, 1)
    assert validation(model)["collapsed"]
    model.model.classifier.weight.data.fill_(0.3)
    assert not validation(model)["collapsed"]
    assert train.collapsed({"q": {"a": 1.0, "b": 1.0 + 9e-7}}) and not train.collapsed({"q": {"a": 1.0, "b": 1.000002}})


def test_collapse_is_reported_in_the_log_and_the_closing_table(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(CrossEncoder, "start", lambda self, q, d, m=None: lambda: torch.full((len(q),), 0.25))
    command(place, out=tmp_path / "flat", steps=2, **{"eval-every": 2})
    shown = capsys.readouterr()
    assert re.search(r"\| flat \(COLLAPSED: all scores equal\) +\|", shown.out) and "COLLAPSED" in shown.err
    assert json.loads((tmp_path / "flat/log.jsonl").read_text().splitlines()[-1])["collapsed"] is True
    assert "COLLAPSED" in (tmp_path / "flat/README.md").read_text()


def test_resuming_on_other_data_is_refused(place, tmp_path):
    lists, how = tmp_path / "t.run", dict(loss="ranknet", lists=tmp_path / "t.run", steps=3, out=tmp_path / "run")
    lists.write_bytes((place / "teacher.run").read_bytes())
    assert command(place, **how)[0] == 0
    (tmp_path / "run/README.md").unlink()  # as if interrupted after its last step
    lines = lists.read_text().splitlines(keepends=True)
    lists.write_text("".join(lines[:-1]))
    with pytest.raises(BadInput, match="t.run changed since"):
        command(place, resume=True, **how)
    lists.write_text("".join(lines))
    assert command(place, resume=True, **how)[0] == 0 and (tmp_path / "run/README.md").exists()


def test_validation_is_sharded(place, monkeypatch):
    """Three ranks score a third each, no pair twice, and agree on the measure of the whole."""
    _, model, _ = batches(place)
    folder = str(place / "corpus/train")
    one = train.Validation([folder], "nDCG@10", 20, None, 0, 1)(model)
    pairs, shares = [], []

    def counted(model, texts, run, max_tokens):
        pairs.append(sum(map(len, run.values())))
        shares.append(rerank.score_run(model, texts, run, max_tokens))
        return shares[-1]

    monkeypatch.setattr(train, "score_run", counted)
    ranks = [train.Validation([folder], "nDCG@10", 20, None, rank, 3) for rank in range(3)]
    monkeypatch.setattr(train.dist, "all_gather_object", lambda shares, own: None)
    for rank in ranks:
        with pytest.raises(AttributeError):  # nothing was gathered
            rank(model)
    gathered = list(shares)
    assert [list(s) for s in gathered] == [list(ranks[0].sets[0][2])[r::3] for r in range(3)]
    assert sum(pairs) == sum(map(len, ranks[0].sets[0][2].values())) and max(pairs) < 0.5 * sum(pairs)
    monkeypatch.setattr(train.dist, "all_gather_object", lambda shares, own: shares.__setitem__(slice(None), gathered))
    assert all(rank(model) == pytest.approx(one) for rank in ranks)


def test_validation_is_the_measure_of_the_reranked_run(place):
    from evaluate import evaluate, mean

    _, model, _ = batches(place)
    texts = rerank.Texts(str(place / "corpus/dev"))
    run = rerank.score_run(model, texts, rerank.bm25(texts, texts.queries, 20))
    expected = mean(evaluate(texts.qrels, run, ["nDCG@10"]))["nDCG@10"]
    validation = train.Validation([str(place / "corpus/dev")], "nDCG@10", 20, None, 0, 1)
    assert validation(model)["score"] == pytest.approx(expected, abs=1e-12)


ZYGOTE = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np, torch
torch.set_num_threads(1)
import train
from rerank import guarded

def child(out):
    pid = os.fork()
    if pid == 0:
        sys.argv = ["train.py", *{argv!r}, "--out", out, "--resume"]
        null = os.open(os.devnull, os.O_WRONLY); os.dup2(null, 1); os.dup2(null, 2)
        os._exit(guarded(train.main))
    return pid

start = time.time()
assert os.waitpid(child({whole!r}), 0)[1] == 0
length, rng, kills, sure = time.time() - start, np.random.default_rng(3), 0, 0
while True:
    pid = child({broken!r})
    if kills == {kills}:
        assert os.waitpid(pid, 0)[1] == 0
        break
    limit = time.time() + rng.uniform(0.2, 0.55) * length
    while time.time() < limit and os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.002)
    else:
        if time.time() < limit:  # it came to its end first: begin anew
            import shutil
            shutil.rmtree({broken!r})
            sure += 1
            assert sure < 20
            continue
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills += 1
print("kills", kills, "finished early", sure)
"""


def test_killed_at_any_instant_it_ends_with_the_same_bytes(place, tmp_path):
    argv = ["--backbone", place / "model", "--dataset", place / "corpus", "--steps", "60", "--batch-size", "4", "--lr",
            "1e-3", "--save-every", "2", "--eval-every", "15", "--device", "cpu", "--dtype", "float32"]
    script = ZYGOTE.format(root=str(ROOT), tests=str(ROOT / "tests"), argv=[str(a) for a in argv], kills=30,
                           whole=str(tmp_path / "whole"), broken=str(tmp_path / "broken"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kills 30" in done.stdout
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    loads = [torch.load(tmp_path / n / "last/checkpoint.pt") for n in ("whole", "broken")]
    assert loads[0]["step"] == loads[1]["step"] == 60 and loads[0]["history"] == loads[1]["history"]
    for a, b in zip(loads[0]["model"].values(), loads[1]["model"].values(), strict=True):
        assert torch.equal(a, b)


def spawn(place, *extra, runner=(), env=None, script=ROOT / "train.py", **how):
    argv = [sys.executable, *runner, str(script), "--backbone", place / "model", "--dataset",
            place / "corpus", "--batch-size", "4", "--lr", "1e-3", "--device", "cpu", "--dtype", "float32", *extra]
    return subprocess.Popen([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **how)


FOREVER = ("--steps", 100000, "--eval-dataset", "none", "--eval-every", 10)  # a line in the log each step


def wait_for_steps(process, out, lines=3):
    while process.poll() is None and not (log := out / "log.jsonl").exists():
        time.sleep(0.05)
    while process.poll() is None and log.read_text().count("\n") < lines:
        time.sleep(0.05)


def test_workers_tokenise_after_the_fork(place, tmp_path):
    """Texts are tokenised before the fork too, by threads that the workers do not have; and workers change nothing."""
    weights = []
    for workers in (0, 2):
        process = spawn(place, "--steps", 4, "--workers", workers, "--out", tmp_path / str(workers),
                        env={"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"})
        try:
            _, error = process.communicate(timeout=120)
        finally:
            subprocess.run(["pkill", "-KILL", "-P", str(process.pid)])
            process.kill()
        assert process.returncode == 0, error[-2000:]
        weights.append((tmp_path / str(workers) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(place, tmp_path, number, code):
    process = spawn(place, *FOREVER, "--out", tmp_path / "run")
    wait_for_steps(process, tmp_path / "run")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "checkpoint written; --resume" in error
    assert 0 < torch.load(tmp_path / "run/last/checkpoint.pt")["step"] < 100000


def test_a_second_signal_leaves_at_once():
    """A step that never ends holds the first one back; the second does not wait for it."""
    script = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import train\n"
              "with train.Stop():\n    print('ready', flush=True)\n    while True: time.sleep(0.05)")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143


def test_signals_to_the_whole_group_spare_the_workers(place, tmp_path):
    """As a terminal and torchrun send them: the workers hand over the batches of the step in hand. Also, tokenising
    in a forked process ends though the parent's tokenizer has threads."""
    process = spawn(place, *FOREVER, "--workers", 2, "--out", tmp_path / "run",
                    env={"TOKENIZERS_PARALLELISM": "true", "XDG_CACHE_HOME": str(place / "cache")},
                    start_new_session=True)
    try:
        wait_for_steps(process, tmp_path / "run")
        os.killpg(process.pid, signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143 and "checkpoint written; --resume" in error
    assert torch.load(tmp_path / "run/last/checkpoint.pt")["step"] > 0


@pytest.mark.parametrize("share, said", [(0.6, "the last checkpoint is intact"), (0.1, "there is no checkpoint yet")])
def test_a_full_disk_leaves_the_last_checkpoint(place, tmp_path, monkeypatch, share, said):
    """No file may grow beyond a share of a checkpoint's size: at 0.1 the weights do not fit, at 0.6 the
    checkpoint that the resumed run goes on to write does not."""
    import resource

    how = {"save-every": 2, "eval-every": 2, "workers": 0}
    assert command(place, out=tmp_path / "whole", steps=8, **how)[0] == 0
    size = (tmp_path / "whole/last/checkpoint.pt").stat().st_size
    out, kept = tmp_path / "run", tmp_path / "run/last/checkpoint.pt"
    if share > 0.1:  # the first of its checkpoints succeeds
        whole = train.save_checkpoint
        monkeypatch.setattr(train, "save_checkpoint", lambda *a: (whole(*a), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            command(place, out=out, steps=8, **how)
        good = kept.read_bytes()
        monkeypatch.undo()
    limit = int(size * share)
    process = spawn(place, "--steps", 8, *[w for k, v in how.items() for w in (f"--{k}", v)], "--out", out, "--resume",
                    env={"XDG_CACHE_HOME": str(place / "cache")},
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ") and "cannot write" in last and said in last and "Traceback" not in error
    assert not list(out.rglob("*.new"))  # what could not be finished does not fill the disk
    if share > 0.1:
        assert kept.read_bytes() == good
        assert command(place, out=out, steps=8, resume=True, **how)[0] == 0  # space again
        assert weights(out) == weights(tmp_path / "whole")
        assert torch.load(kept)["step"] == 8


@pytest.mark.parametrize("size", range(0, 4096, 512))
def test_a_checkpoint_cut_short_anywhere_is_a_full_disk(tmp_path, size):
    """torch.save meets a short write with an OSError or with words of its own, by where it falls."""
    import resource

    def child():
        torch.set_num_threads(1)  # the others were not forked
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 + size,) * 2)
        try:
            train.save_checkpoint(tmp_path / "last", {"w": torch.zeros(40_000)})
        except OSError as e:
            os._exit(0 if e.errno in train.FULL and not (tmp_path / "last/checkpoint.pt.new").exists() else 4)
        except BaseException:
            os._exit(5)
        os._exit(6)

    train.save_checkpoint(tmp_path / "last", {"w": torch.ones(3)})
    pid = os.fork()
    if pid == 0:
        child()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert torch.equal(torch.load(tmp_path / "last/checkpoint.pt")["w"], torch.ones(3))


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_train_the_same_model(place, tmp_path, world):
    toy.model(tmp_path / "model", dropout=0.0)
    extra = ["--backbone", tmp_path / "model", "--steps", 20, "--eval-every", 10, "--loss", "ranknet", "--lists",
             place / "teacher.run", "--list-size", 9, "--batch-size", 5]
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    single = spawn(place, *extra, "--out", tmp_path / "1")
    several = spawn(place, *extra, "--out", tmp_path / "n", runner=runner)
    for process in (single, several):
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-2000:]
    a, b = (torch.load(tmp_path / n / "last/checkpoint.pt") for n in "1n")
    for name in a["model"]:
        # a key bias and, under a loss of differences, the bias of the head do not change the loss: their gradients are
        # rounding, which Adam makes steps of
        if not name.endswith(("key.bias", "classifier.bias")):
            assert (a["model"][name] - b["model"][name]).abs().max() < 1e-5, name
    assert a["history"] == b["history"]


SHORT_OF_MEMORY = {  # what fails on rank 1 alone
    "activations": """
forward = CrossEncoder.forward
def limited(self, packed):
    if rank == "1" and self.training and sum(packed.lengths) > 70:
        raise torch.OutOfMemoryError("full")
    return forward(self, packed)
CrossEncoder.forward = limited
""",
    "cuBLAS": """
forward = CrossEncoder.forward
def limited(self, packed):
    if rank == "1" and self.training and sum(packed.lengths) > 70:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    return forward(self, packed)
CrossEncoder.forward = limited
""",
    "the buffer of all gradients": """
left = [1]
def once(function, size):
    def limited(*args, **kwargs):
        if rank == "1" and left and size(args[0]) > 5000:
            left.pop()
            raise torch.OutOfMemoryError("full")
        return function(*args, **kwargs)
    return limited
gradients = train.Step.gradients
def inside(self, k, batch):
    zeros, cat = torch.zeros, torch.cat
    torch.zeros = once(zeros, lambda n: n if isinstance(n, int) else 0)
    torch.cat = once(cat, lambda tensors: sum(t.numel() for t in tensors))
    try:
        return gradients(self, k, batch)
    finally:
        torch.zeros, torch.cat = zeros, cat
train.Step.gradients = inside
""",
}


@pytest.mark.parametrize("kind", SHORT_OF_MEMORY)
def test_out_of_memory_on_one_rank_halves_the_budget_of_all(place, tmp_path, kind):
    """Rank 1 alone has no room: both repeat the step, and the model is that of one process."""
    toy.model(tmp_path / "model", dropout=0.0)
    (tmp_path / "run.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from kernels.encoder import CrossEncoder
rank = os.environ["RANK"]
{SHORT_OF_MEMORY[kind]}
sys.exit(train.guarded(train.main))
""")
    extra = ["--backbone", tmp_path / "model", "--steps", 5, "--max-tokens", 100, "--batch-size", 6]
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    single = spawn(place, *extra, "--out", tmp_path / "1")
    several = spawn(place, *extra, "--out", tmp_path / "n", runner=runner, script=tmp_path / "run.py")
    for process in (single, several):
        try:
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, error[-2000:]
    assert error.count("micro-batches of 50 tokens from here on") == 1
    a, b = (torch.load(tmp_path / n / "last/checkpoint.pt")["model"] for n in "1n")
    for name in a:
        if not name.endswith(("key.bias", "classifier.bias")):  # see above
            assert (a[name] - b[name]).abs().max() < 1e-5, name


def test_bad_input_is_said_once_by_all_ranks(place, tmp_path):
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = spawn(place, "--out", tmp_path, runner=runner)
    (tmp_path / "notes.txt").write_text("a folder with other things in it, which each rank sees by itself")
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0 and error.count("error: ") == 1, error


def test_a_rank_that_dies_ends_all(place, tmp_path):
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = spawn(place, *FOREVER, "--out", tmp_path / "run", runner=runner)
    wait_for_steps(process, tmp_path / "run")
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode not in (0, None)


def test_dry_run_touches_nothing(tmp_path):
    """In a process of its own, with an empty home: importing ir_datasets alone would make a folder there."""
    argv = [sys.executable, "-B", ROOT / "train.py", "--backbone", "modernbert", "--loss", "infonce", "--dry-run"]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "IR_DATASETS"))}
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env={**keep, "HOME": str(tmp_path)})
    out = done.stdout
    assert done.returncode == 0, done.stderr
    assert "200,000" in out and "4 lists of 8 documents" in out and "5,000" in out and "1e-05" in out
    assert "file       weights of answerdotai/ModernBERT-base, 0.598 GB, md5 unknown, not here" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, word", [
    ({"loss": "ranknet"}, "teacher"), ({"dataset": "no/such"}, "no/such"), ({"backbone": "no/such"}, "no/such"),
    ({"steps": 0}, "--steps"), ({"lists": "nowhere.run"}, "nowhere.run"), ({"bogus": 1}, "--bogus"),
    ({"loss": "foo"}, "--loss"), ({"lr": -1}, "--lr"), ({"lr": "nan"}, "--lr"), ({"clip": 0}, "--clip"),
    ({"warmup": -3}, "--warmup"), ({"steps": 4, "warmup": 9}, "--warmup"), ({"weight-decay": -1}, "--weight-decay"),
    ({"workers": -1}, "--workers"), ({"max-tokens": 0}, "--max-tokens"), ({"query-length": 0}, "--query-length"),
    ({"doc-length": -4}, "--doc-length"), ({"list-size": 1}, "--list-size"), ({"eval-queries": 0}, "--eval-queries"),
    ({"eval-measure": "foo"}, "unknown measure `foo`"), ({"log": "foo"}, "--log"), ({"device": "foo"}, "--device"),
    ({"lists": "TEACHER", "first-stage": "bm25"}, "one of --triples"),
    ({"triples": "TRIPLES", "list-size": 8}, "--list-size"), ({"triples": "TRIPLES", "depth": 8}, "--depth"),
    ({"triples": "TRIPLES", "negatives": "shared"}, "--negatives"),
    ({"triples": "TRIPLES", "max-teacher-margin": 1}, "--max-teacher-margin"),
    ({"out": "TRIPLES"}, "a file"), ({"eval-dataset": "UNJUDGED"}, "no relevance judgments"),
    pytest.param({"device": "cuda"}, "--device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a card")),
])
def test_bad_input(place, tmp_path, capsys, monkeypatch, flags, word):
    if "eval-dataset" in flags:
        (tmp_path / "bare").mkdir()
        for name in ("corpus.jsonl", "queries.jsonl"):
            (tmp_path / "bare" / name).write_bytes((place / "corpus" / name).read_bytes())
    files = {"TEACHER": place / "teacher.run", "TRIPLES": place / "triples.tsv", "UNJUDGED": tmp_path / "bare"}
    flags = {k: files.get(v, v) for k, v in flags.items()}
    given = {"backbone": place / "model", "dataset": place / "corpus", "out": tmp_path / "out", **flags}
    monkeypatch.setattr(sys, "argv", ["train.py", *[str(w) for k, v in given.items() for w in (f"--{k}", v)]])
    assert rerank.guarded(train.main) == 2
    error = [line for line in capsys.readouterr().err.strip().splitlines() if "no qrels" not in line]
    assert error[-1].startswith("error: ") and word in error[-1] and "usage:" not in "".join(error)
    assert not (tmp_path / "out").exists() and (place / "triples.tsv").is_file()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("line, what", [
    (b"nobody\td1\td2\n", "t.tsv:2: query 'nobody'"), (b"q1\td1\tgone\n", "t.tsv:2: document 'gone'"),
    (b"q1\td\xff\td2\n", "t.tsv:2: not UTF-8")])
def test_a_bad_triple_is_named_whoever_reads_it(place, tmp_path, capsys, monkeypatch, workers, line, what):
    """Also from a worker process, whose exceptions torch would print with a traceback."""
    (tmp_path / "t.tsv").write_bytes(b"q1\td1\td2\n" + line)
    argv = ["--backbone", place / "model", "--dataset", place / "corpus", "--out", tmp_path / "out", "--steps", 3,
            "--triples", tmp_path / "t.tsv", "--workers", workers, "--eval-dataset", "none", "--batch-size", 2]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    assert rerank.guarded(train.main) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and what in last


def test_a_folder_that_holds_other_things_is_left_alone(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/.args.json.77").write_text("")  # what a run killed at its first file leaves
    (tmp_path / "mine/README.md").write_text("mine")
    with pytest.raises(BadInput, match="other things"):
        command(place, out=tmp_path / "mine", steps=1)
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [".args.json.77", "README.md"]
    assert (tmp_path / "mine/README.md").read_text() == "mine"
    (tmp_path / "mine/README.md").unlink()
    assert command(place, out=tmp_path / "mine", steps=1)[0] == 0
