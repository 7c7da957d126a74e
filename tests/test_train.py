"""train.py as a command: the run folder, validation, flags and what is said of wrong ones."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
import torch.distributed as dist

import teacher
import toy
import train
import training
from data.command import BadInput
from data.first_stages import bm25
from data.run_folder import read_log
from data.runs import read_run, write_run
from data.texts import Texts
from evaluate import evaluate, mean
from kernels.encoder import CrossEncoder
from kernels.exact import ListGradient
from rerank import score_run
from training import ROOT, arguments, batches, run_main, train_here

place = pytest.fixture(scope="module")(training.make_place)


def logged(out) -> list[dict]:
    rows, damaged = read_log(out / "log.jsonl")
    assert not damaged
    return rows


# ---------------------------------------------------------------------------------- the run folder


def test_run_folder(place, capsys):
    how = {"out": place / "full", "steps": 8, "eval-every": 3}
    assert train_here(place, **how) == 0
    out = place / "full"
    made = json.loads((out / "args.json").read_text())
    assert made["flags"]["seed"] == 1 and made["versions"]["torch"] == torch.__version__
    rows = logged(out)
    assert [row["step"] for row in rows if "RR@10" in row] == [3, 6, 8]
    assert {row["step"] for row in rows if "loss" in row} == set(range(1, 9))
    shown = capsys.readouterr().out
    assert re.search(r"\| BM25 +\|", shown) and "nDCG@10" in shown and "AP" in shown
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "BM25" in card
    assert CrossEncoder.from_pretrained(out).doc_length == 32
    with pytest.raises(BadInput, match="--resume"):
        train_here(place, **how)
    before = (out / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "last")  # a finished run needs no checkpoint to be known as one
    assert train_here(place, resume=True, **how) == 0
    assert (out / "model.safetensors").stat().st_mtime_ns == before  # not trained again
    with pytest.raises(BadInput, match=r"--lr 0.001 \(now 0.5\)"):
        train_here(place, resume=True, lr=0.5, **how)


def test_the_best_step_is_kept(place, tmp_path, monkeypatch):
    scores, kept = iter([0.2, 0.7, 0.4]), []
    monkeypatch.setattr(train.Validation, "__call__",
                        lambda *_: {"score": next(scores), "collapsed": False})
    save = train.Run.save_model
    monkeypatch.setattr(train.Run, "save_model", lambda run: kept.append(save(run)))
    out = tmp_path / "best"
    assert train_here(place, out=out, steps=6, **{"eval-every": 2}) == 0
    assert len(kept) == 2 and (out / "model.safetensors").is_file()
    assert logged(out)[-1]["score"] == 0.4


def test_a_folder_that_holds_other_things_is_left_alone(place, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / ".args.json.77").write_text("")  # what a run killed at its first file leaves
    (out / "README.md").write_text("mine")
    with pytest.raises(BadInput, match="other things"):
        train_here(place, out=out, steps=1)
    assert sorted(file.name for file in out.iterdir()) == [".args.json.77", "README.md"]
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    assert train_here(place, out=out, steps=1) == 0


def infinite(self, *lists):
    return torch.tensor(math.inf)


def out_of_memory(self, *lists):
    raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize("failing, said", [
    (infinite,
     "step 1: loss inf, gradient norm 0.0; queries q.*. Training stopped, there is no checkpoint "
     "yet. Try a lower --lr, more --warmup or --dtype float32"),
    (out_of_memory,
     "step 1: out of GPU memory with micro-batches of 832 tokens too; there is no checkpoint yet. "
     "Begin anew with a lower --max-tokens"),
])
def test_a_step_that_fails_says_what_is_kept_and_what_to_try(place, tmp_path, monkeypatch, failing,
                                                             said):
    monkeypatch.setattr(ListGradient, "__call__", failing)
    with pytest.raises(BadInput, match=f"^{said}$"):
        train_here(place, out=tmp_path / "out")


def test_a_student_by_mse_reaches_its_teachers_logits(place, tmp_path, monkeypatch):
    """teacher.py's scores of another model: the numbers are learned, not their order alone."""
    large = CrossEncoder.from_pretrained(toy.model(tmp_path / "large", seed=5))
    large.model.classifier.weight.data *= 8
    large.model.classifier.bias.data -= 10
    large.save_pretrained(tmp_path / "large")
    run, out = tmp_path / "teacher.run", tmp_path / "out"
    assert run_main(monkeypatch, teacher, "cross-encoder", "--model", tmp_path / "large",
                    "--dataset", place / "corpus/train", "--first-stage", "bm25", "--depth", 4,
                    "--out", run, "--device", "cpu", "--dtype", "float32") == 0
    assert train_here(place, backbone=toy.model(tmp_path / "small"), loss="mse", lists=run, out=out,
                      steps=60, lr=5e-3, **{"batch-size": 8, "eval-dataset": "none"}) == 0
    losses, logits = [row["loss"] for row in logged(out)], read_run(run)
    student = CrossEncoder.from_pretrained(out, dtype="float32", device="cpu")
    scores = score_run(student, Texts(str(place / "corpus"), split="train"), logits)
    pairs = [(t, scores[q][d]) for q, ranked in logits.items() for d, t in ranked.items()]
    theirs, ours = np.array(pairs).T
    error = np.square(theirs - ours).mean()
    assert len(pairs) == 64 and abs(theirs.mean()) > 1 and theirs.var() > 1
    assert losses[0] > 20 * losses[-1] and error < 0.03 * theirs.var()


# -------------------------------------------------------------------------------------- validation


def validation_of(place, split, measure="nDCG@10", rank=0, world=1):
    return train.Validation([str(place / "corpus" / split)], None, measure, 20, None, rank, world)


def test_validation_is_the_measure_of_the_reranked_run(place):
    _, model, _ = batches(place)
    texts = Texts(str(place / "corpus/dev"))
    run = score_run(model, texts, bm25(texts, texts.queries, 20))
    expected = mean(evaluate(texts.qrels, run, ["nDCG@10"]))["nDCG@10"]
    assert validation_of(place, "dev")(model)["score"] == pytest.approx(expected, abs=1e-12)


def test_validation_is_sharded(place, monkeypatch):
    """Three ranks score a third each, no pair twice, and agree on the measure of the whole."""
    _, model, _ = batches(place)
    one = validation_of(place, "train")(model)
    ranks = [validation_of(place, "train", rank=rank, world=3) for rank in range(3)]
    shares = []

    def kept(model, texts, run, max_tokens):
        shares.append(score_run(model, texts, run, max_tokens))
        return shares[-1]

    monkeypatch.setattr(train, "score_run", kept)
    monkeypatch.setattr(dist, "all_gather_object", lambda gathered, own: None)
    for rank in ranks:
        with pytest.raises(AttributeError):  # nothing was gathered
            rank(model)
    everyone, run = list(shares), ranks[0].sets[0][2]
    assert [list(share) for share in everyone] == [list(run)[rank::3] for rank in range(3)]
    pairs = [sum(map(len, share.values())) for share in everyone]
    assert sum(pairs) == sum(map(len, run.values())) and max(pairs) < 0.5 * sum(pairs)

    def gather(gathered, own):
        gathered[:] = everyone

    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert all(rank(model) == pytest.approx(one) for rank in ranks)


def test_collapse_is_seen(place):
    _, model, _ = batches(place)
    model.model.classifier.weight.data.zero_()
    validation = validation_of(place, "dev")
    assert validation(model)["collapsed"]
    model.model.classifier.weight.data.fill_(0.3)
    assert not validation(model)["collapsed"]
    assert train.collapsed({"q": {"a": 1.0, "b": 1.0 + 9e-7}})
    assert not train.collapsed({"q": {"a": 1.0, "b": 1.000002}})


def test_collapse_is_reported_in_the_log_and_the_closing_table(place, tmp_path, monkeypatch,
                                                               capsys):
    monkeypatch.setattr(CrossEncoder, "start", lambda self, queries, documents, max_tokens=None:
                        lambda: torch.full((len(queries),), 0.25))
    assert train_here(place, out=tmp_path / "flat", steps=2, **{"eval-every": 2}) == 0
    shown = capsys.readouterr()
    assert re.search(r"\| flat \(COLLAPSED: all scores equal\) +\|", shown.out)
    assert "COLLAPSED" in shown.err
    assert logged(tmp_path / "flat")[-1]["collapsed"] is True
    assert "COLLAPSED" in (tmp_path / "flat/README.md").read_text()


def test_eval_run_is_what_validation_and_the_closing_table_rerank(place, tmp_path, capsys):
    """Its first 5 of one query of dev; the other has no candidates and counts 0."""
    texts, how = Texts(str(place / "corpus/dev")), {"eval-depth": 5, "steps": 2, "eval-every": 2}
    judged = list(texts.queries)
    ranked = {f"d{i}": float(-i) for i in range(4, 20)}
    write_run(tmp_path / "mine.run", {judged[0]: ranked, "q0": ranked})
    assert train_here(place, out=tmp_path / "out", lists=place / "teacher.run",
                      **{"eval-run": tmp_path / "mine.run"}, **how) == 0
    model = CrossEncoder.from_pretrained(tmp_path / "out")
    first = {judged[0]: dict(list(ranked.items())[:5])}
    scores = score_run(model, texts, first)
    measures = ["nDCG@10", "RR@10", "AP"]
    before, after = (mean(evaluate(texts.qrels, run, measures)) for run in (first, scores))
    assert logged(tmp_path / "out")[-1]["RR@10"] == pytest.approx(after["RR@10"], abs=1e-12)
    shown = capsys.readouterr()
    for name, row in (("mine.run", before), ("out", after)):
        cells = " \\| +".join(rf"\*{{0,2}}{row[m]:.4f}\*{{0,2}}" for m in measures)
        assert re.search(rf"\| {name} +\| +{cells}", shown.out), (row, shown.out)
    assert f"no candidates of 1 of {len(judged)} queries" in shown.err
    assert "the first 5 of mine.run and the same re-ranked (by these the step was" in shown.out
    card = (tmp_path / "out/README.md").read_text()
    assert "its validation on the first 5 of mine.run" in card and "| mine.run " in card
    args = json.loads((tmp_path / "out/args.json").read_text())
    assert str(tmp_path / "mine.run") in args["data"]
    write_run(tmp_path / "mine.run", {"q0": ranked})
    with pytest.raises(BadInput, match="candidates of no judged query"):
        train_here(place, out=tmp_path / "none", **{"eval-run": tmp_path / "mine.run"}, **how)


def test_the_closing_table_can_be_left_out(place, tmp_path, capsys):
    how = {"steps": 1, "eval-dataset": "none"}
    assert train_here(place, out=tmp_path / "a", **{"no-table": True}, **how) == 0
    assert train_here(place, out=tmp_path / "b", lists=place / "teacher.run", **how) == 0
    shown = capsys.readouterr()
    assert "nDCG" not in shown.out and shown.err.count("no closing table") == 1
    assert "Not tested" in (tmp_path / "a/README.md").read_text()


def test_every_line_of_the_log_has_its_time(place, tmp_path):
    assert train_here(place, out=tmp_path / "out", steps=2, **{"eval-every": 1}) == 0
    times = [datetime.fromisoformat(row["time"]) for row in logged(tmp_path / "out")]
    assert len(times) == 4 and times == sorted(times)
    assert abs((datetime.now(UTC) - times[-1]).total_seconds()) < 60


# ------------------------------------------------------------------------------------------- flags


def test_dry_run_touches_nothing(tmp_path):
    """In a process of its own, with an empty home: importing ir_datasets alone would make a folder
    there."""
    command = [sys.executable, "-B", ROOT / "train.py", "--backbone", "modernbert", "--loss",
               "infonce", "--dry-run"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "IR_DATASETS"))}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=kept | {"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    for part in ("200,000", "4 lists of 8 documents", "5,000", "1e-05"):
        assert part in done.stdout
    weights = "file       weights of answerdotai/ModernBERT-base, 0.598 GB, md5 unknown, not here"
    assert weights in done.stdout
    assert not list(tmp_path.iterdir())


def test_empty_lists_of_a_shells_unset_variable_are_none(place):
    args = arguments(place, lists="", triples=None)
    assert args.lists is None and args.first_stage == "bm25" and args.list_size == 8
    args = train.parse(["--backbone", "bert", "--triples", ""])
    assert (args.triples, args.lists, args.depth) == (None, "colbert", 500)


without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="a card")


@pytest.mark.parametrize("flags, word", [
    ({"loss": "ranknet"}, "teacher"),
    ({"dataset": "no/such"}, "no/such"),
    ({"dataset": ""}, "a BEIR folder holds"),
    ({"backbone": "no/such"}, "no/such"),
    ({"steps": 0}, "--steps"),
    ({"lists": "nowhere.run"}, "nowhere.run"),
    ({"bogus": 1}, "--bogus"),
    ({"loss": "foo"}, "--loss"),
    ({"lr": -1}, "--lr"),
    ({"lr": "nan"}, "--lr"),
    ({"clip": 0}, "--clip"),
    ({"warmup": -3}, "--warmup"),
    ({"steps": 4, "warmup": 9}, "--warmup"),
    ({"weight-decay": -1}, "--weight-decay"),
    ({"workers": -1}, "--workers"),
    ({"max-tokens": 0}, "--max-tokens"),
    ({"query-length": 0}, "--query-length"),
    ({"doc-length": -4}, "--doc-length"),
    ({"list-size": 1}, "--list-size"),
    ({"eval-queries": 0}, "--eval-queries"),
    ({"eval-measure": "foo"}, "unknown measure `foo`"),
    ({"log": "foo"}, "--log"),
    ({"device": "foo"}, "--device"),
    ({"lists": "TEACHER", "first-stage": "bm25"}, "one of --triples"),
    ({"triples": "TRIPLES", "list-size": 8}, "--list-size"),
    ({"triples": "TRIPLES", "depth": 8}, "--depth"),
    ({"triples": "TRIPLES", "negatives": "shared"}, "--negatives"),
    ({"triples": "TRIPLES", "max-teacher-margin": 1}, "--max-teacher-margin"),
    ({"out": "TRIPLES"}, "a file"),
    ({"eval-dataset": "UNJUDGED"}, "no relevance judgments"),
    pytest.param({"device": "cuda"}, "--device", marks=without_card),
    pytest.param({"graphs": "on"}, "--graphs on", marks=without_card),
])
def test_bad_input(place, tmp_path, capsys, monkeypatch, flags, word):
    bare = tmp_path / "bare"
    if "eval-dataset" in flags:
        bare.mkdir()
        for name in ("corpus.jsonl", "queries.jsonl"):
            shutil.copy(place / "corpus" / name, bare)
    files = {"TEACHER": place / "teacher.run", "TRIPLES": place / "triples.tsv", "UNJUDGED": bare}
    given = {"backbone": place / "model", "dataset": place / "corpus", "out": tmp_path / "out"}
    given |= {name: files.get(value, value) for name, value in flags.items()}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert run_main(monkeypatch, train, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    error = [line for line in lines if "no qrels" not in line]
    assert error[-1].startswith("error: ") and word in error[-1]
    assert "usage:" not in "".join(error)
    assert not (tmp_path / "out").exists() and (place / "triples.tsv").is_file()
