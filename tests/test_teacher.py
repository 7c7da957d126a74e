"""teacher.py: ensembles against the members' own runs, published files from a local server, LLM rankers."""

import contextlib
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import toy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import rerank
import teacher
from evaluate import BadInput, read_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    rerank.CACHE = folder / "cache"
    toy.corpus(folder / "corpus")
    for seed, (hidden, query_length, doc_length) in enumerate([(32, 8, 32), (64, 4, 16), (32, 6, 24)]):
        model = toy.model(folder / f"model{seed}", seed=seed, hidden=hidden)
        config = json.loads((model / "config.json").read_text())
        config |= {"query_length": query_length, "doc_length": doc_length}
        (model / "config.json").write_text(json.dumps(config))
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]  # the words of each model have ids of their own
        tokenizer["model"]["vocab"] = {w: i if i < 5 else 5 + (i + 7 * seed) % 40 for w, i in vocabulary.items()}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    lines = [f"q{q} Q0 d{(7 * q + 3 * i) % 60} {i + 1} {100 - i}.5 first\n" for q in range(12) for i in range(20)]
    (folder / "first.run").write_text("".join(lines))
    return folder


def run(monkeypatch, script, *argv):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, argv)])
    return rerank.guarded(script.main)


@pytest.fixture(scope="module")
def member_runs(place):
    """What rerank.py writes for each member."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for i in range(3):
            assert run(monkeypatch, rerank, "--model", place / f"model{i}", "--dataset", place / "corpus", "--run",
                       place / "first.run", "--out", place / f"member{i}.run") == 0
    return [read_run(place / f"member{i}.run") for i in range(3)]


def ensemble(monkeypatch, place, out, *more, members=3):
    return run(monkeypatch, teacher, "cross-encoder", "--model", *[place / f"model{i}" for i in range(members)],
               "--dataset", place / "corpus", "--out", out, *more)


# ------------------------------------------------------------------------------------------------------ ensembles


@pytest.mark.parametrize("how", ["none", "zscore", "minmax"])
def test_mean_of_members(place, member_runs, monkeypatch, tmp_path, how):
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run", "--normalize", how) == 0
    got = read_run(tmp_path / "t.run")
    assert list(got) == list(member_runs[0])
    for qid in got:
        assert got[qid].keys() == member_runs[0][qid].keys() and len(got[qid]) == 20
        columns = {}
        for m, scores in enumerate(member_runs):
            values = np.array(list(scores[qid].values()), np.float64)
            for docid, s in scores[qid].items():
                if how == "zscore":
                    s = (s - values.sum() / 20) / np.sqrt(((values - values.sum() / 20) ** 2).sum() / 20)
                if how == "minmax":
                    s = (s - values.min()) / (values.max() - values.min())
                columns[docid, m] = s
        for docid, s in got[qid].items():
            assert abs(s - sum(columns[docid, m] for m in range(3)) / 3) < 1e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.run", "t.run.json"]
    summary = json.loads((tmp_path / "t.run.json").read_text())
    assert [m["pairs"] for m in summary["members"]] == [240] * 3
    assert [m["doc_length"] for m in summary["members"]] == [32, 16, 24]


def test_one_model_is_reranks_run(place, member_runs, monkeypatch, tmp_path):
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run", members=1) == 0
    assert (tmp_path / "t.run").read_bytes() == (place / "member0.run").read_bytes()


def test_one_member_is_loaded_at_a_time(place, monkeypatch, tmp_path):
    from kernels.encoder import CrossEncoder

    load, loaded = CrossEncoder.from_pretrained, []

    def watched(*args):
        assert all(model() is None for model in loaded)
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(CrossEncoder, "from_pretrained", watched)
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run") == 0 and len(loaded) == 3


def test_equal_scores_normalize_to_zero():
    for how in ("zscore", "minmax"):
        assert teacher.normalized(np.full(4, 2.5), how).tolist() == [0.0] * 4
    assert teacher.normalized(np.array([3.0]), "none").tolist() == [3.0]


def test_keep_each(place, member_runs, monkeypatch, tmp_path):
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run", "--keep-each",
                    "--normalize", "zscore") == 0
    for i in range(3):
        assert read_run(tmp_path / f"t.member-{i + 1}.run") == member_runs[i]


@pytest.mark.parametrize("columns", [3, 5])
def test_triples(place, member_runs, monkeypatch, tmp_path, columns):
    """Hofstätter's layout; the pairs occur again and again and are scored once."""
    triples = [(f"q{q}", f"d{7 * q % 60}", f"d{(7 * q + 3 * i) % 60}") for q in (2, 0, 2) for i in (1, 2, 5, 2)]
    (tmp_path / "in.tsv").write_text("".join("\t".join(("9", "8") * (columns == 5) + t) + "\n" for t in triples))
    assert ensemble(monkeypatch, place, tmp_path / "out.tsv", "--triples", tmp_path / "in.tsv", "--keep-each") == 0
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert [tuple(r[2:]) for r in rows] == triples
    for pos_score, neg_score, qid, pos, neg in rows:
        for docid, score in ((pos, pos_score), (neg, neg_score)):
            assert abs(float(score) - np.mean([m[qid][docid] for m in member_runs])) < 1e-6
    summary = json.loads((tmp_path / "out.tsv.json").read_text())
    assert [m["pairs"] for m in summary["members"]] == [8] * 3 and summary["pairs"] == 8
    kept = (tmp_path / "out.member-2.tsv").read_text().splitlines()
    assert abs(float(kept[0].split("\t")[0]) - member_runs[1]["q2"]["d14"]) < 1e-6


@pytest.mark.parametrize("line, what", [
    ("q1\td1\n", "in.tsv:2: 2 tab-separated columns"), ("nobody\td1\td2\n", "in.tsv:2: query 'nobody'"),
    ("q1\td1\tnowhere\n", "in.tsv:2: document 'nowhere'"), ("q1\t\td2\n", "in.tsv:2: 3 tab-separated columns")])
def test_broken_triples(place, monkeypatch, tmp_path, capsys, line, what):
    (tmp_path / "in.tsv").write_text("q1\td1\td2\n" + line)
    assert ensemble(monkeypatch, place, tmp_path / "out.tsv", "--triples", tmp_path / "in.tsv") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and what in error
    assert [p.name for p in tmp_path.iterdir()] == ["in.tsv"]


@pytest.mark.parametrize("head, line, tail", [
    ("\ufeff", "q1\td7\td10\n", ""), ("qid\tpos\tneg\n", "q1\td7\td10\n", ""), ("", "q1\td7\td10\n", "\n \n\n"),
    ("query_id\tpos\tneg\r\n", "q1\td7\td10\r\n", "\r\n"), ("", "q1\td7\td10\n", ""),
    ("\ufeffpos_score\tneg_score\tqid\tpos\tneg\n", "-1.5\tnan\tq1\td7\td10\n", "\n")])
def test_triples_as_other_programs_write_them(place, capsys, tmp_path, head, line, tail):
    (tmp_path / "in.tsv").write_bytes((head + line * 2).removesuffix("\n" * (not tail)).encode() + tail.encode())
    texts, skipped = rerank.Texts(str(place / "corpus")), len(head) > 1
    rows = list(teacher.triples(tmp_path / "in.tsv", texts.all_queries))
    assert rows == [(i + skipped, "q1", "d7", "d10") for i in (1, 2)]
    assert teacher.pairs_of(tmp_path / "in.tsv", texts, False) == {"q1": {"d7": 0.0, "d10": 0.0}}
    assert capsys.readouterr().err.count("in.tsv:1: taken for a header and left out") == skipped


def test_triples_of_texts_and_gaps(place, tmp_path):
    """Texts in place of ids are quoted short, and whatever stands in the file its line is named."""
    texts, path = rerank.Texts(str(place / "corpus")), tmp_path / "in.tsv"
    whole = gzip.compress(b"q1\td7\td10\n" * 9999)
    for content, what in (
        (b"a header\t1\t2\n" + b"words " * 400 + b"\td1\td2\n", f":2: query {('words ' * 10)!r} is not in .* ids are"),
        (b"q1\td1\t" + b"words " * 400, f":1: document {('words ' * 10)!r} is not in .* ids are expected"),
        (b"q1\td1\td2\n\nq1\td1\td3\n", ":2: 1 tab-separated"), (b"q1\td1\td2\nq1\t\xff\td2\n", ":2: not UTF-8"),
        (b"1\t2\tnobody\td1\td2\n", ":1: query 'nobody'"), (whole[: len(whole) // 2], "damaged gzip")):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=what) as e:
            teacher.pairs_of(path, texts, False)
        assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_triples_without_their_documents_are_counted(place, member_runs, monkeypatch, tmp_path, capsys):
    (tmp_path / "in.tsv").write_text("q1\td7\td10\nq1\td7\tnowhere\nq1\tnowhere\td10\n")
    assert ensemble(monkeypatch, place, tmp_path / "o.tsv", "--triples", tmp_path / "in.tsv", "--skip-missing") == 0
    assert len((tmp_path / "o.tsv").read_text().splitlines()) == 1
    assert "2 triples left out" in capsys.readouterr().err


def test_interrupted_ensemble_goes_on(place, member_runs, monkeypatch, tmp_path):
    """Interrupted in the second member's second block: the first member and the whole block are not scored again."""
    monkeypatch.setattr(rerank.blocks_of, "__defaults__", (60,))
    whole = rerank.PairScorer.__call__
    scored = []

    def stop_after(limit):
        def call(self, blocks):
            for result in whole(self, blocks):
                if len(scored) == limit:
                    raise KeyboardInterrupt
                scored.append(list(result))
                yield result
        monkeypatch.setattr(rerank.PairScorer, "__call__", call)

    arguments = (place, tmp_path / "t.run", "--run", place / "first.run")
    stop_after(5)
    assert ensemble(monkeypatch, *arguments) == 130 and not (tmp_path / "t.run").exists()
    stop_after(1000)
    assert ensemble(monkeypatch, *arguments) == 0
    assert len(scored) == 3 * 4 and len({tuple(s) for s in scored}) == 4
    assert ensemble(monkeypatch, place, tmp_path / "u.run", "--run", place / "first.run") == 0
    assert (tmp_path / "t.run").read_bytes() == (tmp_path / "u.run").read_bytes()


def test_damaged_scores_of_a_member_are_made_again(place, member_runs, monkeypatch, tmp_path, capsys):
    """A digit, a cut, or nothing left: what a member has scored is only taken as it was written."""
    arguments = (monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run")
    mean_of = teacher.mean_of

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher, "mean_of", full)
    assert ensemble(*arguments, "--keep-each", members=2) == 2 and "goes on from what" in capsys.readouterr().err
    first, second = sorted(tmp_path.glob("t.run.scores-*"))
    for damage in (lambda b: b.replace(b"q3 Q0 d21 ", b"q3 Q0 d22 "), lambda b: b[:-1] + b"x", lambda b: b[:500],
                   lambda b: b"", lambda b: b"\xff" * 99):
        first.write_bytes(damage(first.read_bytes()))
        assert ensemble(*arguments, "--keep-each", members=2) == 2
        said = capsys.readouterr().err
        assert f"{first}: damaged and left out, {place / 'model0'} scores anew" in said
        assert f"{place / 'model1'}: scored before" in said and f"{place / 'model0'}: scored before" not in said
    monkeypatch.setattr(teacher, "mean_of", mean_of)
    assert ensemble(*arguments, "--keep-each", members=2) == 0
    assert [read_run(tmp_path / f"t.member-{i + 1}.run") for i in range(2)] == member_runs[:2]
    assert len(list(tmp_path.iterdir())) == 4


def test_the_disk_full_at_the_end_leaves_a_command_that_goes_on(place, member_runs, graded, serve, monkeypatch,
                                                                tmp_path, capsys):
    """Whichever of its files cannot be written: OUT is the last, so that it is not taken for finished."""
    whole, url = rerank.atomic_write, serve(lambda handler, number, body: completion(handler, perfect(body)))[0]
    for name, command in (
        ("t", lambda: ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run", "--keep-each",
                               members=2)),
        ("u", lambda: llm(monkeypatch, graded, url, tmp_path / "u.run"))):
        for file in (f"{name}.member-2.run", f"{name}.run.json", f"{name}.run"):
            def full(path, file=file):
                if path.name == file:
                    raise OSError(28, "No space left on device")
                return whole(path)

            monkeypatch.setattr(teacher, "atomic_write", full)
            if (name, file) != ("u", "u.member-2.run"):
                assert command() == 2 and not (tmp_path / f"{name}.run").exists()
                assert "give the same command again: it goes on" in capsys.readouterr().err
        monkeypatch.setattr(teacher, "atomic_write", whole)
        assert command() == 0 and (tmp_path / f"{name}.run").exists()


def test_another_plan_is_another_run(graded, place, serve, monkeypatch, tmp_path, capsys):
    """A query that reads otherwise is another question, whatever its id."""
    url, seen = serve(lambda handler, number, body: reply(handler, 400, b"no") if number else completion(
        handler, perfect(body)))
    shutil.copytree(graded, tmp_path / "g")
    assert llm(monkeypatch, tmp_path / "g", url, tmp_path / "t.run", "--concurrency", 1) == 2
    queries = tmp_path / "g" / "corpus" / "queries.jsonl"
    queries.write_text(queries.read_text().replace("query q4", "query q4 of another"))
    assert llm(monkeypatch, tmp_path / "g", url, tmp_path / "t.run", "--concurrency", 1) == 2
    assert "t.run.answers-0.jsonl:1: damaged, or begun by a command with other flags" in capsys.readouterr().err
    assert len(seen) == 2


def test_tags_are_one_column(place, graded, serve, monkeypatch, tmp_path):
    shutil.copytree(place / "model0", tmp_path / "my model\t1")
    assert run(monkeypatch, teacher, "cross-encoder", "--model", tmp_path / "my model\t1", place / "model1",
               "--dataset", place / "corpus", "--run", place / "first.run", "--out", tmp_path / "t.run",
               "--keep-each") == 0
    url, _ = serve(lambda handler, number, body: completion(handler, perfect(body)))
    assert llm(monkeypatch, graded, url, tmp_path / "u.run", "--model", "my judge\n") == 0
    for name, tag in (("t.member-1", "my_model_1"), ("t", "ensemble"), ("u", "my_judge_")):
        assert {tuple(line.split(" ")[5:]) for line in (tmp_path / f"{name}.run").read_text().splitlines()} == {(tag,)}


def test_out_is_none_of_the_files_read(place, monkeypatch, tmp_path, capsys):
    source = tmp_path / "in.run"
    shutil.copy(place / "first.run", source)
    (tmp_path / "link.run").symlink_to(source)
    (tmp_path / "in.tsv").write_text("q1\td7\td10\n")
    for command in ("cross-encoder", "listwise", "pointwise"):
        for flag, file, out in (
            ("--run", source, "in.run"), ("--run", source, "link.run"), ("--triples", tmp_path / "in.tsv", "in.tsv"),
            ("--run", source, f"../{tmp_path.name}/in.run"),
        ):
            if flag == "--run" or command == "cross-encoder":
                assert run(monkeypatch, teacher, command, "--model", "m", "--dataset", place / "corpus", flag, file,
                           "--out", tmp_path / out, "--overwrite") == 2
                assert f"{tmp_path / out}: is read by this very command" in capsys.readouterr().err
    assert source.read_bytes() == (place / "first.run").read_bytes()


def test_nothing_to_score(place, monkeypatch, tmp_path, capsys):
    (tmp_path / "in.run").write_text("q1 Q0 gone 1 2 t\nq2 Q0 lost 1 1 t\n")
    (tmp_path / "in.tsv").write_text("q1\tgone\tlost\n")
    for command, source in (("cross-encoder", "--run"), ("listwise", "--run"), ("pointwise", "--run"),
                            ("cross-encoder", "--triples")):
        file = tmp_path / ("in.run" if source == "--run" else "in.tsv")
        assert run(monkeypatch, teacher, command, "--model", place / "model0", "--dataset", place / "corpus", source,
                   file, "--skip-missing", "--out", tmp_path / "o") == 2
        assert f"error: {file}: none of its documents is in dataset" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.run", "in.tsv"]


def test_a_teacher_with_one_score_for_all_is_said(place, monkeypatch, tmp_path, capsys):
    def flat(self, blocks):
        for block in blocks:
            yield {q: dict.fromkeys(self.run[q], np.float32(0.25)) for q in block}

    monkeypatch.setattr(rerank.PairScorer, "__call__", flat)
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run", members=2) == 0
    assert "12 queries, each with one score for all its documents: WARNING" in capsys.readouterr().err
    first = rerank.PairScorer.__call__
    monkeypatch.setattr(rerank.PairScorer, "__call__", lambda self, blocks: (
        {q: ranked if q != "q1" else {d: np.float32(len(d)) for d in ranked} for q, ranked in result.items()}
        for result in first(self, blocks)))
    assert ensemble(monkeypatch, place, tmp_path / "u.run", "--run", place / "first.run", members=2) == 0
    assert "WARNING" not in capsys.readouterr().err


def test_usage(place, monkeypatch, tmp_path, capsys):
    (tmp_path / "t.run").write_text("mine")
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run") == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "t.run").read_text() == "mine"
    for more in ([], ["--run", place / "first.run", "--first-stage", "bm25"]):
        assert ensemble(monkeypatch, place, tmp_path / "u.run", *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: give one of --run FILE") and error.count("\n") == 1
    for command, flag, value in (
        ("listwise", "--depth", 0), ("listwise", "--batch-size", 0), ("listwise", "--concurrency", 0),
        ("listwise", "--retries", -1), ("listwise", "--passage-words", 0), ("listwise", "--device", "tpu"),
        ("listwise", "--model", "no/such"), ("listwise", "--endpoint", "host:80"), ("listwise", "--window", 1),
        ("pointwise", "--doc-length", 0), ("pointwise", "--device", "tpu"), ("cross-encoder", "--device", "tpu"),
    ):
        assert run(monkeypatch, teacher, command, "--model", "m", "--dataset", place / "corpus", "--run",
                   place / "first.run", "--out", tmp_path / "u.run", flag, value) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and str(value) in error
    assert [p.name for p in tmp_path.iterdir()] == ["t.run"]  # the next try, with other flags, finds nothing begun


# --------------------------------------------------------------------------------------------------- local servers


@pytest.fixture
def serve():
    """serve(handle) -> (url, list of requests seen); handle(handler, number, body) answers request `number`."""
    servers = []

    def start(handle):
        seen, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    seen.append((self.path, dict(self.headers), body))
                    number = len(seen) - 1
                handle(self, number, body)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(handler, status, content, headers=(), length=None):
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


# ----------------------------------------------------------------------------------------------------- published

FILE = b"".join(f"{q} Q0 {d} {r + 1} {5 - r} t\n".encode() for q in range(2000) for r, d in enumerate((7, 3, 9)))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """PUBLISHED with one file on a local server."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "irds"))
    monkeypatch.setenv("IR_DATASETS_DL_DISABLE_PBAR", "true")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def put(url, md5=hashlib.md5(FILE).hexdigest()):  # noqa: B008
        monkeypatch.setitem(teacher.PUBLISHED, "rankzephyr-50", (url, "teacher.run", md5))
        return tmp_path / "irds" / "teachers" / "teacher.run"

    return put


def test_published_is_fetched_once(serve, shelf):
    url, seen = serve(lambda handler, number, body: reply(handler, 200, FILE))
    path = shelf(url)
    assert teacher.published("rankzephyr-50") == path and path.read_bytes() == FILE
    assert teacher.published("rankzephyr-50") == path and [p for p, *_ in seen] == ["/teacher.run"]
    assert read_run(path)["5"] == {"7": 5.0, "3": 4.0, "9": 3.0}


def test_published_is_fetched_by_one_process_at_a_time(serve, shelf):
    def slow(handler, number, body):
        time.sleep(0.3)
        reply(handler, 200, FILE)

    url, seen = serve(slow)
    path = shelf(url)
    with ThreadPoolExecutor(3) as pool:  # each call locks a file that it opened itself, as processes do
        assert set(pool.map(teacher.published, ["rankzephyr-50"] * 3)) == {path}
    assert len(seen) == 1 and path.read_bytes() == FILE


def test_published_with_another_checksum(serve, shelf):
    url, _ = serve(lambda handler, number, body: reply(handler, 200, FILE[:-1] + b"!"))
    path = shelf(url)
    with pytest.raises(BadInput, match=f"md5.*{hashlib.md5(FILE).hexdigest()}") as e:
        teacher.published("rankzephyr-50")
    assert "\n" not in str(e.value) and not path.exists() and not list(path.parent.glob("*.tmp"))


def test_published_resumes_a_broken_transfer(serve, shelf):
    def half(handler, number, body):
        start = int((handler.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
        piece = FILE[start:] if number else FILE[: len(FILE) // 2]
        reply(handler, 206 if start else 200, piece, [("Accept-Ranges", "bytes")], len(FILE) - start)

    url, seen = serve(half)
    path = shelf(url)
    assert teacher.published("rankzephyr-50").read_bytes() == FILE and path.exists()
    ranges = [{k.lower(): v for k, v in headers.items()}.get("range") for _, headers, _ in seen]
    assert ranges[0] is None and int(ranges[1][6:-1]) > 0 and len(seen) == 2


def test_published_offline_and_unknown(shelf, monkeypatch):
    monkeypatch.setenv("IR_DATASETS_DL_TRIES", "1")
    path = shelf("http://127.0.0.1:9")
    with pytest.raises(BadInput, match="offline, download http://127.0.0.1:9/teacher.run elsewhere .* its path") as e:
        teacher.published("rankzephyr-50")
    assert "\n" not in str(e.value) and not path.exists()
    with pytest.raises(BadInput, match="offline, download https://huggingface.co/datasets/webis/rank-distillm"):
        teacher.published("hf-colbert")  # the hub is off in these tests
    with pytest.raises(BadInput, match="no-such.run: neither a file nor .*ensemble-t2"):
        teacher.published("no-such.run")


def test_published_parquet_becomes_a_run(shelf, monkeypatch, tmp_path):
    import huggingface_hub
    import pyarrow
    import pyarrow.parquet

    shelf("")
    rows = [("30", "d2", 1.0), ("30", "d9", 7.0), ("4", "d1", 2.0), ("30", "d5", 3.0), ("4", "d7", 2.5)]
    table = pyarrow.table([list(column) for column in zip(*rows, strict=True)], names=["qid", "docno", "score"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "x.parquet"))
    with pytest.raises(BadInput, match="Expected md5"):
        teacher.published("hf-colbert")
    where, file, _ = teacher.PUBLISHED["hf-colbert"]
    md5 = hashlib.md5((tmp_path / "x.parquet").read_bytes()).hexdigest()
    monkeypatch.setitem(teacher.PUBLISHED, "hf-colbert", (where, file, md5))
    path = teacher.published("hf-colbert")
    assert read_run(path) == {"30": {"d9": 7.0, "d5": 3.0, "d2": 1.0}, "4": {"d7": 2.5, "d1": 2.0}}
    assert [line.split()[2:4] for line in path.read_text().splitlines()] == [
        ["d9", "1"], ["d5", "2"], ["d2", "3"], ["d7", "1"], ["d1", "2"]]


def test_docpairs(shelf, monkeypatch):
    import ir_datasets
    from ir_datasets.formats import GenericDocPair

    shelf("")

    class Train:
        def docpairs_iter(self):
            yield from [GenericDocPair("1", "22", "33"), GenericDocPair("2", "5", "6")]

    monkeypatch.setattr(ir_datasets, "load", {"msmarco-passage/train": Train()}.__getitem__)
    assert teacher.published("docpairs").read_text() == "1\t22\t33\n2\t5\t6\n"


def test_real_llm_orders_are_read_as_they_are(shared_data):
    for name in ("rankgpt-3.5", "rankvicuna"):
        teacher_run = read_run(shared_data / "trec-dl-2019" / "runs" / f"teacher-{name}.bm25.top100.txt")
        assert len(teacher_run) == 43 and all(len(ranked) == 100 for ranked in teacher_run.values())
        for ranked in teacher_run.values():
            scores = list(ranked.values())
            assert scores == sorted(scores, reverse=True) and len(set(scores)) > 50


# ------------------------------------------------------------------------------------------- listwise: the algorithm


@pytest.mark.parametrize("text, order, wrong", [
    ("[3] > [1] > [4] > [2]", [2, 0, 3, 1], []),
    (" [2]>[1] >[3]>  [4]\n", [1, 0, 2, 3], []),
    ("[3] > [1]", [2, 0, 1, 3], ["missing"]),
    ("[3] > [1] > [3] > [2] > [4]", [2, 0, 1, 3], ["repeated"]),
    ("[9] > [2] > [0] > [1] > [3] > [4]", [1, 0, 2, 3], ["out of range"]),
    ("3, 1, 2, 4", [2, 0, 1, 3], ["malformed"]),
    ("I cannot rank these.", [0, 1, 2, 3], ["malformed", "missing"]),
    ("", [0, 1, 2, 3], ["malformed", "missing"]),
    ("[4] > [4] > [7] and so on", [3, 0, 1, 2], ["malformed", "repeated", "out of range", "missing"]),
    ("<think>[1] > [2]?</think>[4] > [3] > [2] > [1]", [3, 2, 1, 0], []),
    ("[" + "1" * 5000 + "] > [2]", [1, 0, 2, 3], ["out of range", "missing"]),
    ("[²] > [2] > [1] > [3] > [4]", [1, 0, 2, 3], ["malformed"]),
])
def test_permutations_are_repaired(text, order, wrong):
    assert teacher.parse_permutation(text, 4) == (order, wrong)


@pytest.mark.parametrize("n, window, stride, spans", [
    (100, 20, 10, [(80, 100), (70, 90), (60, 80), (50, 70), (40, 60), (30, 50), (20, 40), (10, 30), (0, 20)]),
    (25, 10, 5, [(15, 25), (10, 20), (5, 15), (0, 10)]), (23, 10, 4, [(13, 23), (9, 19), (5, 15), (1, 11), (0, 7)]),
    (12, 20, 10, [(0, 12)]), (20, 20, 10, [(0, 20)]), (2, 20, 10, [(0, 2)]), (1, 20, 10, []), (0, 20, 10, [])])
def test_windows(n, window, stride, spans):
    assert teacher.windows(n, window, stride) == spans


def test_prompts_as_published():
    """The conversations of the two papers, spelled out for two passages."""
    system, user = teacher.conversation("rankzephyr", "what is [1] ir", ["one  two three [12] x", "four"], 4)
    assert system == {"role": "system", "content": "You are RankLLM, an intelligent assistant that can rank passages "
                      "based on their relevancy to the query"}
    assert user == {"role": "user", "content": (
        "I will provide you with 2 passages, each indicated by a numerical identifier []. Rank the passages based on "
        "their relevance to the search query: what is (1) ir.\n[1] one two three (12)\n[2] four\nSearch Query: what is "
        "(1) ir.\nRank the 2 passages above based on their relevance to the search query. All the passages should be "
        "included and listed using identifiers, in descending order of relevance. The output format should be [] > [], "
        "e.g., [2] > [1], Answer concisely and directly and only respond with the ranking results, do not say any word "
        "or explain.")}
    turns = teacher.conversation("rankgpt", "q", ["one", "two"], 300)
    assert [t["role"] for t in turns] == ["system", *["user", "assistant"] * 3, "user"]
    assert [t["content"] for t in turns[1:-1]] == [
        "I will provide you with 2 passages, each indicated by number identifier []. \nRank the passages based on "
        "their relevance to query: q.", "Okay, please provide the passages.", "[1] one", "Received passage [1].",
        "[2] two", "Received passage [2]."]
    assert turns[-1]["content"] == (
        "Search Query: q. \nRank the 2 passages above based on their relevance to the search query. The passages "
        "should be listed in descending order using identifiers. The most relevant passages should be listed first. "
        "The output format should be [] > [], e.g., [1] > [2]. Only response the ranking results, do not say any word "
        "or explain.")


# --------------------------------------------------------------------------------------------- listwise: an endpoint


def grade(qid, docid):
    """The relevance that the perfect judge sees, a number of its own for each document of a query."""
    return int(docid[1:]) * 37 % 61 if int(qid[1:]) % 2 else int(docid[1:]) * 23 % 61


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Five queries, the first over 40 documents, the last over one; texts are just ids for the judge."""
    folder = tmp_path_factory.mktemp("graded")
    (folder / "corpus").mkdir()
    with open(folder / "corpus" / "corpus.jsonl", "w") as file:
        for d in range(60):
            file.write(json.dumps({"_id": f"d{d}", "text": f"text d{d} " + "more and more " * (d % 5)}) + "\n")
    with open(folder / "corpus" / "queries.jsonl", "w") as file:
        for q in range(5):
            file.write(json.dumps({"_id": f"q{q}", "text": f"query q{q}"}) + "\n")
    with open(folder / "first.run", "w") as file:
        for q, n in enumerate((40, 33, 25, 6, 1)):
            order = np.random.default_rng(q).permutation(60)[:n]
            file.write("".join(f"q{q} Q0 d{d} {r + 1} {n - r} bm25\n" for r, d in enumerate(order)))
    return folder


def judged(body):
    """(qid, docids in the order shown) of a request, by the text of its conversation."""
    said = "\n".join(m["content"] for m in json.loads(body)["messages"] if m["role"] == "user")
    return re.search(r"query (q\d+)", said)[1], re.findall(r"^\[\d+\] text (d\d+)", said, re.M)


def perfect(body):
    qid, docids = judged(body)
    return " > ".join(f"[{i + 1}]" for i in sorted(range(len(docids)), key=lambda i: -grade(qid, docids[i])))


def completion(handler, text, finish="stop"):
    content = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
               "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    reply(handler, 200, json.dumps(content).encode())


def llm(monkeypatch, graded, url, out, *more):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(teacher.Endpoint, "first_pause", 0.01)
    return run(monkeypatch, teacher, "listwise", "--endpoint", f"{url}/v1", "--model", "judge", "--dataset",
               graded / "corpus", "--run", graded / "first.run", "--window", 10, "--stride", 5, "--out", out, *more)


def expected(graded, answer=None, depth=100):
    """The published algorithm on its own: {qid: {docid: depth - rank + 1}}."""
    result = {}
    for qid, ranked in read_run(graded / "first.run").items():
        items, end = list(ranked)[:depth], min(len(ranked), depth)
        start = end - 10
        while len(items) > 1:
            low = max(start, 0)
            items[low:end] = sorted(items[low:end], key=lambda d: -grade(qid, d))
            if start <= 0:
                break
            start, end = start - 5, end - 5
        result[qid] = {d: float(depth - r) for r, d in enumerate(items)}
    return result


@pytest.mark.parametrize("prompt", ["rankzephyr", "rankgpt"])
def test_perfect_judge(graded, serve, monkeypatch, tmp_path, prompt):
    together, most, lock = 0, 0, threading.Lock()

    def handle(handler, number, body):
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.02)
        with lock:
            together -= 1
        completion(handler, perfect(body))

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--prompt", prompt) == 0
    got = read_run(tmp_path / "t.run")
    assert got == expected(graded) and list(got) == [f"q{q}" for q in range(5)]
    for qid, first in read_run(graded / "first.run").items():  # the top window - stride of the whole list are exact
        best = sorted(first, key=lambda d: -grade(qid, d))[:5]
        assert list(got[qid])[:5] == best and list(got[qid].values())[:1] == [100.0]
    assert most > 1 and {p for p, *_ in seen} == {"/v1/chat/completions"}
    bodies = [json.loads(b) for *_, b in seen]
    assert all(b["model"] == "judge" and b["temperature"] == 0 and b["max_tokens"] > 50 for b in bodies[:1])
    summary = json.loads((tmp_path / "t.run.json").read_text())
    assert summary["counts"] == {"answers": 18, "in order": 18, "prompt tokens": 1800, "answer tokens": 180}
    assert len(seen) == 18 and sorted(p.name for p in tmp_path.iterdir()) == [
        "t.run", "t.run.answers-0.jsonl", "t.run.json"]


def test_malformed_truncated_late_and_failing_answers(graded, serve, monkeypatch, tmp_path, capsys):
    """Failures are tried again until the answer comes; answers out of form are repaired and counted by kind."""
    faults = {0: 500, 1: 429, 2: "late", 3: "short", 4: "nonsense", 5: "hang up", 6: 503, 7: 502}

    def handle(handler, number, body):
        fault = faults.get(number)
        if isinstance(fault, int):
            return reply(handler, fault, b"busy", [("Retry-After", "0")] if fault == 429 else ())
        if fault == "late":
            time.sleep(5)
        if fault == "short":
            return reply(handler, 200, b'{"choices": [{"mess', length=500)
        if fault == "nonsense":
            return reply(handler, 200, b"<html>a proxy speaks</html>")
        if fault == "hang up":
            return handler.connection.close()
        qid, docids = judged(body)
        if qid == "q3":
            return completion(handler, "[2] > [2] > [77", "length")
        if qid == "q1":
            return completion(handler, f"Sure! {perfect(body)}")
        completion(handler, perfect(body))

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--timeout", 2, "--retries", 9, "--concurrency", 3) == 0
    want = expected(graded)
    first = list(read_run(graded / "first.run")["q3"])
    want["q3"] = {d: 100.0 - r for r, d in enumerate([first[1], first[0], *first[2:]])}
    assert read_run(tmp_path / "t.run") == want
    counts = json.loads((tmp_path / "t.run.json").read_text())["counts"]
    assert (counts["answers"], counts["in order"], counts["malformed"]) == (18, 11, 7)
    assert [counts[k] for k in ("repeated", "out of range", "missing", "cut off")] == [1, 1, 1, 1]
    assert len(seen) == 18 + 8 and "7 malformed" in capsys.readouterr().err


def test_replies_of_many_forms(graded, serve, monkeypatch, tmp_path):
    """What is no chat completion is asked again, what is one in another form is read; nothing is a traceback."""
    message = {"role": "assistant", "content": "x"}
    broken = [b"[]", b"null", b"5", b'"text"', b"{}", b'{"choices": []}', b'{"choices": null}', b'{"choices": [null]}',
              b'{"choices": [{"message": null}]}', b'{"choices": [{"message": {"content": 5}}]}', b"[" * 99999,
              b'{"choices": [{"message": {"content": [5]}}]}', b"\xff\xfe", b'{"error": {"message": "down"}}',
              json.dumps({"choices": [{"message": message}], "usage": {"prompt_tokens": "many"}}).encode(),
              json.dumps({"choices": [{"message": message}], "usage": [7]}).encode(),
              b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": Infinity}}']

    def handle(handler, number, body):
        if number % 2 == 0 and number < 2 * len(broken):
            return reply(handler, 200, broken[number // 2])
        qid, content = judged(body)[0], perfect(body)
        parts = {"q0": content, "q1": [{"type": "text", "text": content[:7]}, {"type": "text", "text": content[7:]},
                                       {"type": "image", "text": None}], "q2": content, "q3": None}[qid]
        usage = {"q0": None, "q1": {"prompt_tokens": None}, "q2": {}, "q3": {"completion_tokens": 3}}[qid]
        message = {"content": parts, "refusal": "no"}
        reply(handler, 200, json.dumps({"choices": [{"message": message}], "usage": usage}).encode())

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--retries", 1, "--concurrency", 1) == 0
    want, got, first = expected(graded), read_run(tmp_path / "t.run"), read_run(graded / "first.run")
    assert {q: got[q] for q in want if q != "q3"} == {q: want[q] for q in want if q != "q3"}
    assert list(got["q3"]) == list(first["q3"]) and len(seen) == 18 + len(broken)
    counts = json.loads((tmp_path / "t.run.json").read_text())["counts"]
    assert counts["malformed"] == 1 and counts["answer tokens"] == 3 and counts["queries kept in order"] == 1


@pytest.mark.parametrize("fault", ["500", "html", "hang up"])
def test_a_server_that_is_down_is_asked_by_one_thread_at_a_time(graded, serve, monkeypatch, tmp_path, capsys, fault):
    together, lock, most, four = [], threading.Lock(), [], threading.Barrier(4)

    def handle(handler, number, body):
        with lock:
            together.append(number)
            most.append(len(together))
        if number < 4:
            four.wait(10)
        with lock:
            together.remove(number)
        if fault == "hang up":
            return handler.connection.close()
        reply(handler, 500 if fault == "500" else 200, b"<html>the proxy\nspeaks</html>")

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 4, "--retries", 3) == 2
    assert len(seen) == 4 + 3 and max(most[4:]) == 1  # the four that were under way, then one after the other
    said = capsys.readouterr().err.splitlines()[1:]
    pauses = [line.rpartition("; tried again in ")[2] for line in said[:-1]]
    assert pauses == ["0.01 s", "0.02 s", "0.04 s"]
    assert said[-1].startswith(f"error: {url}/v1/chat/completions: no answer in 4 tries (the last: ")
    assert ("HTTP 500: <html>the proxy speaks</html>" if fault == "500" else "no chat completion") in said[-1]


def test_a_request_that_fails_alone_has_its_own_tries(graded, serve, monkeypatch, tmp_path, capsys):
    """The others' answers in between end the failures in a row, not the tries that the request has had itself."""
    left = {"q1": 4}

    def handle(handler, number, body):
        if left.get(judged(body)[0], 0):
            left[judged(body)[0]] -= 1
            return reply(handler, 500, b"busy")
        time.sleep(0.03)
        completion(handler, perfect(body))

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 3, "--retries", 4) == 0
    assert read_run(tmp_path / "t.run") == expected(graded) and len(seen) == 18 + 4
    left["q1"] = 10**6
    assert llm(monkeypatch, graded, url, tmp_path / "u.run", "--concurrency", 3, "--retries", 4) == 2
    assert 10**6 - left["q1"] == 5 and "no answer in 5 tries" in capsys.readouterr().err
    left["q1"] = 0
    assert llm(monkeypatch, graded, url, tmp_path / "u.run") == 0 and read_run(tmp_path / "u.run") == expected(graded)


def test_threads_that_wait_stop_at_once(graded, serve, monkeypatch, tmp_path, capsys):
    three = threading.Barrier(3)

    def handle(handler, number, body):
        three.wait(60)  # all are under way before the first is told to wait
        if number:
            time.sleep(0.3)
            return reply(handler, 403, b"no")
        reply(handler, 503, b"busy", [("Retry-After", "500")])

    url, _ = serve(handle)
    start = time.perf_counter()
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 3) == 2
    assert time.perf_counter() - start < 30 and "HTTP 403: no" in capsys.readouterr().err


def test_parameters_that_the_server_refuses(graded, serve, monkeypatch, tmp_path, capsys):
    """The newer OpenAI models: each refusal is said once, and the form they want is kept for all that follows."""
    refusals = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
        "seed": "Unrecognized request argument supplied: seed"}

    def handle(handler, number, body):
        named = [name for name in refusals if name in json.loads(body)]
        if named:
            return reply(handler, 422 if named[0] == "seed" else 400, refusals[named[0]].encode())
        completion(handler, perfect(body))

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 4) == 0
    assert read_run(tmp_path / "t.run") == expected(graded)
    bodies = [json.loads(body) for *_, body in seen]
    taken = [b for b in bodies if b.keys() == {"model", "messages", "max_completion_tokens"}]
    assert len(taken) == 18 and taken[-8:] == bodies[-8:]  # every thread is refused thrice at the most
    assert len(bodies) <= 18 + 12 and {b["max_completion_tokens"] for b in taken} == {80, 64, 48}
    said = capsys.readouterr().err
    assert [said.count(f"refuses {name} (HTTP 4") for name in refusals] == [1, 1, 1]
    refusing, seen = serve(lambda handler, number, body: reply(handler, 400, b"temperature and seed: never"))
    assert llm(monkeypatch, graded, refusing, tmp_path / "u.run", "--concurrency", 1) == 2
    assert len(seen) == 2 and "HTTP 400: temperature and seed: never" in capsys.readouterr().err


@pytest.mark.parametrize("status, text", [
    (400, "This model's maximum context length is 80 tokens, max_tokens is 80"), (400, "context_length_exceeded"),
    (400, "the request exceeds the available context size, try increasing it"), (413, ""), (422, "prompt is too long")])
def test_windows_beyond_the_servers_context(graded, serve, monkeypatch, tmp_path, capsys, status, text):
    """Only they are asked again, with shorter passages; what was shortened is counted."""
    limit = 60

    def handle(handler, number, body):
        said = json.loads(body)["messages"][1]["content"]
        if len(re.findall("more|and", said)) > limit:
            return reply(handler, status, text.encode())
        completion(handler, perfect(body))

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    assert read_run(tmp_path / "t.run") == expected(graded)
    counts = json.loads((tmp_path / "t.run.json").read_text())["counts"]
    rows = [json.loads(line) for line in (tmp_path / "t.run.answers-0.jsonl").read_text().splitlines()[1:]]
    assert 0 < counts["passages shortened"] == sum(row["shortened"] for row in rows) < 18 < len(seen)
    limit = -1
    assert llm(monkeypatch, graded, url, tmp_path / "u.run", "--concurrency", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: query 'q0': 10 passages of one word are too long") and "lower --window" in error


def answered(file):
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


DAMAGE = {  # of the line with q0's third answer: (what is put there, answers asked again)
    "torn": lambda line: line[:40], "garbage": lambda line: b"\xff\x00\xfe" * 9, "deep": lambda line: b"[" * 99999,
    "empty": lambda line: b"", "number": lambda line: b"17", "no text": lambda line: line.replace(b'"text"', b'"next"'),
    "another type": lambda line: line.replace(b'"window": 2', b'"window": "2"'),
    "another window": lambda line: line.replace(b'"window": 2', b'"window": 3'),
    "another query": lambda line: line.replace(b'"q0"', b'"q1"'),
    "a digit": lambda line: re.sub(rb"\[(\d+)\] > \[(\d+)\]", rb"[\2] > [\1]", line, count=1),
    "a query that is a list": lambda line: line.replace(b'"q0"', b'["q0"]'), "twice": lambda line: line + b"\n" + line}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_answers_alone_are_asked_again(graded, serve, monkeypatch, tmp_path, capsys, damage):
    url, seen = serve(lambda handler, number, body: completion(handler, perfect(body)))
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    (tmp_path / "t.run").unlink()
    file = tmp_path / "t.run.answers-0.jsonl"
    lines, rows = file.read_bytes().splitlines(), answered(file)
    place = next(i for i, row in enumerate(rows, 1) if (row["qid"], row["window"]) == ("q0", 2))
    behind = [row for row in rows[place:] if row["qid"] == "q0"]
    lines[place] = DAMAGE[damage](lines[place])
    file.write_bytes(b"\n".join(lines))  # and the last one's end is lost
    capsys.readouterr()
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    assert read_run(tmp_path / "t.run") == expected(graded)
    again = 0 if damage == "twice" else 1 + len(behind)
    left = {"twice": 1, "empty": len(behind)}.get(damage, again)
    assert len(seen) == 18 + again
    assert f"going on after {18 - again} answers; {left} damaged lines left out\n" in capsys.readouterr().err
    rows = answered(file)
    assert len(rows) == 18 and sorted(Counter(row["qid"] for row in rows).values()) == [1, 4, 6, 7]


@pytest.mark.parametrize("header", [b"", b"\n", b"\xff\x00", b'{"command": "li', b"[" * 99999 + b"\n", b"null\n"])
def test_answers_with_a_wrong_header(graded, serve, monkeypatch, tmp_path, capsys, header):
    url, seen = serve(lambda handler, number, body: completion(handler, perfect(body)))
    file = tmp_path / "t.run.answers-0.jsonl"
    file.write_bytes(header)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 2
    error = capsys.readouterr().err.splitlines()[1:]
    assert len(error) == 1 and error[0].startswith(f"error: {file}:1: damaged, or begun by a command with other flags")
    assert "give --overwrite" in error[0] and file.read_bytes() == header and not seen
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--overwrite") == 0 and len(seen) == 18


def test_answers_on_a_full_disk(graded, serve, monkeypatch, tmp_path, capsys):
    """The file may not grow: one line says so, and with room again nothing that is kept is asked twice."""
    url, seen = serve(lambda handler, number, body: completion(handler, perfect(body)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (1600, 2500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 2) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = capsys.readouterr().err
        assert "free some space" in said.splitlines()[-1] and "Traceback" not in said
    assert 4 < len(seen) < 18
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 2) == 0
    assert read_run(tmp_path / "t.run") == expected(graded) and len(seen) <= 18 + 2 * 2


def test_a_judge_that_is_no_teacher_is_said(graded, serve, monkeypatch, tmp_path, capsys):
    answers = {"t": "I cannot.", "u": " > ".join(f"[{i}]" for i in range(1, 11)), "v": "Sure! [2] > [1]"}
    for name, text in answers.items():
        url, _ = serve(lambda handler, number, body, text=text: completion(handler, text))
        assert llm(monkeypatch, graded, url, tmp_path / f"{name}.run") == 0
        what = "answers, all malformed or no query reordered: WARNING, this run is no teacher"
        assert f"18 {what}" in capsys.readouterr().err.splitlines()[-1]
        assert json.loads((tmp_path / f"{name}.run.json").read_text())["counts"][what] == 18


def test_pauses_double_and_follow_the_server(graded, serve, monkeypatch, tmp_path):
    def handle(handler, number, body):
        if number < 5:
            return reply(handler, 500 + number, b"busy", [("Retry-After", "7")] if number == 4 else ())
        completion(handler, perfect(body))

    class Clock(threading.Event):
        def wait(self, pause):
            pauses.append(pause)

    url, seen = serve(handle)
    pauses, start = [], teacher.Endpoint.__init__

    def init(self, args):
        start(self, args)
        self.stopping = Clock()

    monkeypatch.setattr(teacher.Endpoint, "__init__", init)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 1) == 0
    assert pauses == [0.01, 0.02, 0.04, 0.08, 7.0] and len(seen) == 18 + 5


def test_interrupted_listwise_asks_nothing_twice(graded, serve, monkeypatch, tmp_path, capsys):
    refuse = {"from": 8}

    def handle(handler, number, body):
        if refuse["from"] <= number < refuse["from"] + 50:
            return reply(handler, 400, b"no money left")
        time.sleep(0.01)
        completion(handler, perfect(body))

    url, seen = serve(handle)
    asked = []
    for _ in range(2):
        assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 2) == 2
        assert "HTTP 400: no money left" in capsys.readouterr().err and not (tmp_path / "t.run").exists()
        partial = tmp_path / "t.run.partial-0"
        finished = read_run(partial) if partial.stat().st_size else {}
        assert all(finished[q] == expected(graded)[q] for q in finished)
        asked += [b for n, (*_, b) in enumerate(seen) if n < refuse["from"]][len(asked):]
        del seen[len(asked):]  # what was refused was not answered
        refuse["from"] += 6
    assert len(finished) >= 1
    refuse["from"] = 10**6
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 2) == 0
    assert read_run(tmp_path / "t.run") == expected(graded)
    assert max(Counter(b for *_, b in seen).values()) == 1 and len(seen) == 18
    assert json.loads((tmp_path / "t.run.json").read_text())["counts"]["answers"] == 18
    (tmp_path / "t.run").unlink()  # the answers alone make the run again
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0 and len(seen) == 18
    assert read_run(tmp_path / "t.run") == expected(graded)
    (tmp_path / "t.run").unlink()
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--prompt", "rankgpt") == 2
    assert "other flags" in capsys.readouterr().err and len(seen) == 18


def test_killed_listwise_goes_on(graded, serve, monkeypatch, tmp_path):
    killed = threading.Event()

    def handle(handler, number, body):
        if number == 8:  # is under way when the process is killed
            killed.wait(60)
        with contextlib.suppress(ConnectionError):
            completion(handler, perfect(body))

    url, seen = serve(handle)
    arguments = (graded, url, tmp_path / "t.run", "--concurrency", 1)
    process = multiprocessing.get_context("fork").Process(target=llm, args=(monkeypatch, *arguments))
    process.start()
    while len(seen) < 9 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    killed.set()
    answered = [json.loads(line) for line in (tmp_path / "t.run.answers-0.jsonl").read_text().splitlines()[1:]]
    assert len(answered) == 8 and read_run(tmp_path / "t.run.partial-0").keys() == {"q0"}
    with open(tmp_path / "t.run.answers-0.jsonl", "a") as file:
        file.write('{"qid": "q1", "te')  # as a power cut leaves it
    assert llm(monkeypatch, *arguments) == 0
    assert read_run(tmp_path / "t.run") == expected(graded)
    again = Counter(b for *_, b in seen)
    assert len(again) == 18 and sum(n - 1 for n in again.values()) <= 1  # the one that was under way
    (tmp_path / "t.run").unlink()
    assert llm(monkeypatch, *arguments) == 0 and sum(again.values()) == len(seen)
    assert read_run(tmp_path / "t.run") == expected(graded)


def test_answers_under_way_are_kept_when_one_fails(graded, serve, monkeypatch, tmp_path):
    three, refused = threading.Barrier(3), threading.Event()

    def handle(handler, number, body):
        if number < 3:
            three.wait(60)  # all are under way before one fails
        if judged(body)[0] == "q1" or number >= 3:
            reply(handler, 403, b"no")
            return refused.set()
        refused.wait(60)
        time.sleep(0.3)
        completion(handler, perfect(body))

    url, _ = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 3) == 2
    answered = [json.loads(line) for line in (tmp_path / "t.run.answers-0.jsonl").read_text().splitlines()[1:]]
    assert sorted(row["qid"] for row in answered) == ["q0", "q2"]


def test_the_key_is_sent_and_never_shown(graded, serve, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    answer = lambda handler, number, body: completion(handler, perfect(body))  # noqa: E731
    url, seen = serve(answer)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    assert {h["Authorization"] for _, h, _ in seen} == {"Bearer sk-very-secret"}
    refusing, _ = serve(lambda handler, number, body: reply(handler, 401, b"wrong key: sk-very-secret"))
    assert llm(monkeypatch, graded, refusing, tmp_path / "u.run") == 2
    away, there = serve(lambda handler, number, body: reply(handler, 302, b"", [("Location", f"{url}/elsewhere")]))
    before = len(seen)
    assert llm(monkeypatch, graded, away, tmp_path / "v.run") == 2 and len(seen) == before and len(there) >= 1
    shown = capsys.readouterr()
    assert "HTTP 401: wrong key: ***" in shown.err and "HTTP 302" in shown.err
    written = "".join(p.read_text() for p in tmp_path.iterdir())
    assert "secret" not in shown.err + shown.out + written


def test_no_server(graded, monkeypatch, tmp_path, capsys):
    assert llm(monkeypatch, graded, "http://127.0.0.1:9", tmp_path / "t.run", "--retries", 2) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: http://127.0.0.1:9/v1/chat/completions: no answer in 3 tries")


def test_documents_that_the_dataset_lacks(graded, serve, monkeypatch, tmp_path, capsys):
    """An ir_datasets corpus only tells when it is read: the query is named, or the rest is ranked and counted."""
    url, seen = serve(lambda handler, number, body: completion(handler, perfect(body)))
    whole, lost = rerank.Texts.documents, list(read_run(graded / "first.run")["q3"])[2]
    monkeypatch.setattr(rerank.Texts, "documents",
                        lambda self, ids: {d: t for d, t in whole(self, ids).items() if d != lost})
    small_llm(tmp_path / "llm")
    for command in (lambda out, *more: llm(monkeypatch, graded, url, out, *more),
                    lambda out, *more: pointwise(monkeypatch, graded, tmp_path / "llm", out, *more)):
        assert command(tmp_path / "t.run") == 2
        assert re.search(f"query 'q\\d': document '{lost}' is not in", capsys.readouterr().err)
        assert command(tmp_path / "u.run", "--skip-missing") == 0
        capsys.readouterr()
        first, got = read_run(graded / "first.run"), read_run(tmp_path / "u.run")
        assert {q: ranked.keys() for q, ranked in got.items()} == {q: r.keys() - {lost} for q, r in first.items()}
        counts = json.loads((tmp_path / "u.run.json").read_text())["counts"]
        assert counts["documents missing"] >= 1
        (tmp_path / "u.run").unlink()


def test_depth_and_bad_windows(graded, serve, monkeypatch, tmp_path, capsys):
    url, seen = serve(lambda handler, number, body: completion(handler, perfect(body)))
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--depth", 15) == 0
    assert read_run(tmp_path / "t.run") == expected(graded, depth=15)
    for flags, what in ((["--stride", 11], "stride <= window"), (["--stride", 0], "--stride")):
        assert llm(monkeypatch, graded, url, tmp_path / "u.run", *flags) == 2
        assert what in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- language models

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ROLELESS = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>")


def small_tokenizer(template=CHATML, context=4096):
    """Byte-level BPE made on the spot; yes, no, true and false and the identifiers are single tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "</s>"]
    words = [*["yes", "no", "true", "false"] * 50, "text query passages relevance ranking more and " * 9]
    backend.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>",
                                   model_max_length=context, chat_template=template)
    fast.add_tokens([f"[{i}]" for i in range(1, 7)])
    return fast


def small_llm(folder, template=CHATML, context=4096, absolute=False):
    """A Llama of two layers whose greedy answers are full of identifiers; or a GPT-2, with absolute positions."""
    torch.manual_seed(0)
    fast = small_tokenizer(template, context)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(fast), n_embd=48, n_layer=2, n_head=4, n_positions=context, initializer_range=0.4,
        tie_word_embeddings=False)) if absolute else LlamaForCausalLM(LlamaConfig(
        vocab_size=len(fast), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.4, eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id, bos_token_id=None))
    with torch.no_grad():
        model.lm_head.weight[fast.convert_tokens_to_ids([f"[{i}]" for i in range(1, 7)])] *= 3
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return model.eval(), fast


def local(monkeypatch, graded, folder, out, *more):
    return run(monkeypatch, teacher, "listwise", "--model", folder, "--dataset", graded / "corpus", "--run",
               graded / "first.run", "--window", 6, "--stride", 3, "--depth", 12, "--device", "cpu", "--out", out,
               *more)


@pytest.mark.parametrize("template", [CHATML, ROLELESS])
def test_small_llm_end_to_end(graded, monkeypatch, tmp_path, template):
    """The run is that of asking window by window, unbatched, with the template written out by hand."""
    model, fast = small_llm(tmp_path / "llm", template)
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", "--batch-size", 3) == 0
    texts, moved, most = rerank.Texts(str(graded / "corpus")), 0, len(fast.encode("[1] > [2] > [3] > [4] > [5] > [6]"))
    got = read_run(tmp_path / "t.run")
    for qid, ranked in read_run(graded / "first.run").items():
        items = list(ranked)[:12]
        for low, high in {12: [(6, 12), (3, 9), (0, 6)], 6: [(0, 6)], 1: []}[len(items)]:
            found = texts.documents(items)
            system, user = (m["content"] for m in teacher.rankzephyr(
                texts.all_queries[qid], [" ".join(found[d].split()) for d in items[low:high]]))
            prompt = (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
                      "<|im_start|>assistant\n") if template == CHATML else (
                          f"<|im_start|>{system}\n\n{user}<|im_end|><|im_start|>")
            ids = fast(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
            answer, cache = [], None
            for _ in range(most + 8):
                with torch.no_grad():
                    out = model(ids, past_key_values=cache, use_cache=True)
                ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                if ids.item() == fast.eos_token_id:
                    break
                answer.append(ids.item())
            answer = fast.decode(answer, skip_special_tokens=True)
            numbers = [int(x) for x in re.findall(r"\d+", answer)]
            numbers = [n for n in dict.fromkeys(numbers) if 1 <= n <= high - low]
            numbers += [n for n in range(1, high - low + 1) if n not in numbers]
            moved += numbers != sorted(numbers)
            items[low:high] = [items[low + n - 1] for n in numbers]
        assert got[qid] == {d: 12.0 - r for r, d in enumerate(items)}
    counts = json.loads((tmp_path / "t.run.json").read_text())["counts"]
    assert counts["answers"] == 10 and moved >= 5 and counts.get("missing", 0) > 0


def test_interrupted_llm_goes_on(graded, monkeypatch, tmp_path):
    small_llm(tmp_path / "llm")
    whole, batches = teacher.LocalModel.finished, []

    def stop_after(limit):
        def finished(self):
            if len(batches) == limit:
                raise KeyboardInterrupt
            batches.append([qid for qid, *_ in self.waiting])
            return whole(self)
        monkeypatch.setattr(teacher.LocalModel, "finished", finished)

    stop_after(3)
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", "--batch-size", 2) == 130
    stop_after(100)
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", "--batch-size", 2) == 0
    assert Counter(itertools.chain(*batches)) == {"q0": 3, "q1": 3, "q2": 3, "q3": 1}
    assert [len(set(batch)) for batch in batches] == [2] * 4 + [1] * 2  # of two queries, as long as there are two
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "u.run", "--batch-size", 2) == 0
    assert (tmp_path / "t.run").read_bytes() == (tmp_path / "u.run").read_bytes()


def test_passages_are_shortened_to_the_context(graded, monkeypatch, tmp_path, capsys):
    small_llm(tmp_path / "llm", context=600)
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run") == 0
    assert "passages shortened" in capsys.readouterr().err
    small_llm(tmp_path / "smaller", context=300)
    assert local(monkeypatch, graded, tmp_path / "smaller", tmp_path / "u.run") == 2
    assert "lower --window" in capsys.readouterr().err
    fast = small_tokenizer(None)
    fast.save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "chat_template.jinja").unlink(missing_ok=True)
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "v.run") == 2
    assert "no chat template" in capsys.readouterr().err
    settings = json.loads((tmp_path / "llm" / "tokenizer_config.json").read_text())
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": ""}))
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "w.run") == 2
    assert "invalid literal for int() with base 10: ''" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "llm" / "chat_template.jinja").write_text("{{ range(5, 0, 0) }}")
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "x.run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'llm'}: cannot be loaded") and "must not be zero" in error


def test_a_model_whose_files_lack_weights(graded, monkeypatch, tmp_path, capsys):
    """Random weights in place of lost ones would make a teacher without a word; tied ones are not lost."""
    from safetensors.torch import load_file, save_file

    for tied in (False, True):
        folder = tmp_path / f"tied-{tied}"
        model, fast = small_llm(folder)
        if tied:
            model.config.tie_word_embeddings = True
            LlamaForCausalLM(model.config).save_pretrained(folder)
        teacher.load_llm(str(folder), "float32", "cpu")
        weights = load_file(folder / "model.safetensors")
        assert ("lm_head.weight" in weights) != tied
        lost = "model.embed_tokens.weight" if tied else "model.layers.1.self_attn.q_proj.weight"
        save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
        capsys.readouterr()
        for command in (local, pointwise):
            assert command(monkeypatch, graded, folder, tmp_path / "t.run") == 2
            *before, error = capsys.readouterr().err.splitlines()
            assert error.startswith(f"error: {folder}: its files lack ") and lost in error
            assert not any("MISSING" in line for line in before)
    assert not list(tmp_path.glob("t.run*"))


def test_a_model_that_fails_at_its_first_batch(graded, monkeypatch, tmp_path, capsys):
    """A folder whose files do not fit each other: read without a word, one line when it is run."""
    small_llm(tmp_path / "llm")
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, **_: {}["index out of range"])
    for command in (local, pointwise):
        assert command(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {tmp_path / 'llm'}: cannot be ") and "index out of range" in error


def test_arguments_that_are_not_utf8(graded, monkeypatch, tmp_path, capsys):
    for flag in (["--instruction", "caf\udce9"], ["--answers", "oui", "n\udcff"]):
        assert pointwise(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", *flag) == 2
        assert capsys.readouterr().err == "error: --instruction and --answers are to be UTF-8 (see --help)\n"


def test_pointwise_of_one_score_is_said(graded, monkeypatch, tmp_path, capsys):
    small_llm(tmp_path / "llm")
    monkeypatch.setattr(teacher.YesNo, "logits", lambda self, ids: np.zeros(len(ids), np.float32))
    assert pointwise(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", "--doc-length", 2) == 0
    what = "queries, each with one score for all its documents: WARNING, this run is no teacher"
    assert f"4 {what}" in capsys.readouterr().err  # the fifth has one document
    (tmp_path / "t.run").unlink()
    (tmp_path / "t.run.json").unlink()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher, "write_summary", full)
    assert pointwise(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", "--doc-length", 2) == 2
    assert not (tmp_path / "t.run").exists() and "goes on from what is written" in capsys.readouterr().err


def pointwise(monkeypatch, graded, folder, out, *more):
    return run(monkeypatch, teacher, "pointwise", "--model", folder, "--dataset", graded / "corpus", "--run",
               graded / "first.run", "--device", "cpu", "--out", out, *more)


@pytest.mark.parametrize("template", ["qwen3", "chat", "monot5"])
def test_pointwise_causal(graded, monkeypatch, tmp_path, template):
    model, fast = small_llm(tmp_path / "llm", absolute=template == "monot5")
    more = ["--max-tokens", 700] + ["--template", template] * (template != "chat")  # chat: what ChatML without think is
    assert pointwise(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", *more) == 0
    texts, got = rerank.Texts(str(graded / "corpus")), read_run(tmp_path / "t.run")
    for qid, ranked in read_run(graded / "first.run").items():
        for docid in list(ranked)[:8]:
            query, document = texts.all_queries[qid], texts.documents([docid])[docid]
            system = ("Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
                      'Note that the answer can only be "yes" or "no".')
            user = ("<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
                    f"<Query>: {query}\n<Document>: {document}")
            prompt = (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
                      "<|im_start|>assistant\n")
            if template == "qwen3":
                prompt += "<think>\n\n</think>\n\n"
            words = ("yes", "no")
            if template == "monot5":
                prompt, words = f"Query: {query} Document: {document} Relevant:", ("true", "false")
            with torch.no_grad():
                logits = model(fast(prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
            yes, no = (logits[fast.convert_tokens_to_ids(w)] for w in words)
            assert abs(got[qid][docid] - float(yes - no)) < 1e-4
    assert {len(v) for v in got.values()} == {40, 33, 25, 6, 1}


def test_pointwise_seq2seq(graded, monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    texts, first = rerank.Texts(str(graded / "corpus")), read_run(graded / "first.run")
    fast, prompts, cut = small_tokenizer(None), {}, set()
    for qid, ranked in first.items():
        for docid in ranked:
            ids = fast(texts.documents([docid])[docid])["input_ids"]
            cut.update([docid] * (len(ids) > 12))
            prompts[qid, docid] = f"Query: {texts.all_queries[qid]} Document: {fast.decode(ids[:12])} Relevant:"
    fast.model_max_length = max(len(fast(prompt)["input_ids"]) for prompt in prompts.values())
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(fast), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=3.0,
        decoder_start_token_id=fast.pad_token_id, pad_token_id=fast.pad_token_id)).eval()
    model.save_pretrained(tmp_path / "t5")
    fast.save_pretrained(tmp_path / "t5")
    assert pointwise(monkeypatch, graded, tmp_path / "t5", tmp_path / "t.run", "--doc-length", 12) == 0
    got, start = read_run(tmp_path / "t.run"), torch.tensor([[fast.pad_token_id]])
    assert [list(sorted(v)) for v in got.values()] == [list(sorted(v)) for v in first.values()]
    for (qid, docid), prompt in prompts.items():
        with torch.no_grad():
            logits = model(**fast(prompt, return_tensors="pt"), decoder_input_ids=start).logits[0, 0]
        want = float(logits[fast.convert_tokens_to_ids("true")] - logits[fast.convert_tokens_to_ids("false")])
        assert abs(got[qid][docid] - want) < 1e-4
    assert cut and f"{len(cut)} documents cut" in capsys.readouterr().err
    assert pointwise(monkeypatch, graded, tmp_path / "t5", tmp_path / "u.run", "--answers", "relevant", "no") == 2
    assert "'relevant' is" in capsys.readouterr().err
    assert pointwise(monkeypatch, graded, tmp_path / "t5", tmp_path / "u.run", "--doc-length", 60) == 2
    assert "lower --doc-length" in capsys.readouterr().err
    assert local(monkeypatch, graded, tmp_path / "t5", tmp_path / "u.run") == 2
    assert "listwise needs a causal one" in capsys.readouterr().err
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    model.save_pretrained(tmp_path / "t5")
    assert pointwise(monkeypatch, graded, tmp_path / "t5", tmp_path / "v.run", "--doc-length", 12) == 2
    assert "scores not finite, first of queries ['q0'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- several processes


def test_two_processes_write_the_same_files(place, graded, serve, monkeypatch, tmp_path):
    """torchrun's environment for two forked processes over gloo: byte for byte what one process writes."""
    monkeypatch.setattr(rerank.blocks_of, "__defaults__", (60,))
    url, seen = serve(lambda handler, number, body: completion(handler, perfect(body)))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def both(name):
        return [lambda: ensemble(monkeypatch, place, tmp_path / f"{name}.run", "--run", place / "first.run", members=2),
                lambda: llm(monkeypatch, graded, url, tmp_path / f"{name}-llm.run")]

    def process(rank):
        torch.set_num_threads(1)
        values = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({key: str(value) for key, value in values.items()})
        os._exit(max(command() for command in both("two")))

    processes = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        p.kill()  # one that waits for the other for ever
    assert [p.exitcode for p in processes] == [0, 0] and len(seen) == 18
    assert [command() for command in both("one")] == [0, 0]
    for suffix in (".run", "-llm.run"):
        assert (tmp_path / f"two{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()
    assert json.loads((tmp_path / "two-llm.run.json").read_text())["counts"]["answers"] == 18
