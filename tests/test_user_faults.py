"""What users run into, by public reports and by trying: each input here once failed silently or
with a traceback."""

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

import evaluate
import rerank
import toy
import train
from data import cache, parts
from data.command import BadInput, Progress, guarded
from data.first_stages import bm25
from data.lists import Triples
from data.runs import read_run, run_tag
from kernels import losses

ROOT = Path(train.__file__).resolve().parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    toy.corpus(folder / "corpus")
    toy.model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "CACHE", folder / "cache" / "cross-encoder-study")
        texts = rerank.Texts(str(folder / "corpus"))
        rerank.write_run(folder / "bm25.run", bm25(texts, texts.all_queries, 10))
        yield folder


@pytest.fixture
def call(monkeypatch, capsys):
    """A script run in this process: (exit code, stdout, stderr)."""

    def call(script, *argv):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        code = guarded(script.main)
        return code, *capsys.readouterr()

    return call


def flags(place, **changes):
    given = {"backbone": place / "model", "dataset": place / "corpus", "steps": 3, "batch-size": 4,
             "lr": 1e-3, "eval-dataset": "none", "device": "cpu", "dtype": "float32", **changes}
    return [word for k, v in given.items() if v is not None
            for word in ([f"--{k}"] if v is True else [f"--{k}", v])]


def copied(place, folder, **files):
    """A copy of the corpus; files by stem of their name with _ for /: a text, or a function of the
    old text."""
    shutil.copytree(place / "corpus", folder)
    for name, content in files.items():
        (path,) = [p for p in folder.rglob("*.*") if str(p.relative_to(folder)).split(".")[0]
                   == name.replace("_", "/")]
        path.write_text(content if isinstance(content, str) else content(path.read_text()),
                        encoding="utf-8")
    return folder


def one_error(result, *words):
    """Exit code 2 and a last line on stderr that begins with `error:` and holds the words; nothing
    of a traceback."""
    code, _, err = result
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in err, err
    assert len(last) < 400 and all(word in last for word in map(str, words)), last


# -------------------------------------------------------------------------------------- collections


@pytest.mark.parametrize("wrong", ["d 7", "", "d\n7", "d\t7", "d\u00a07", "\x00", "\ud83d", " d7"])
@pytest.mark.parametrize("file", ["corpus", "queries"])
def test_ids_that_no_run_can_hold_are_refused(place, tmp_path, call, file, wrong):
    line = json.dumps({"_id": wrong, "text": "ka lo"}) + "\n"
    folder = copied(place, tmp_path / "c", **{file: lambda text: text + line})
    number = 61 if file == "corpus" else 21
    argv = ["--model", place / "model", "--dataset", folder, "--first-stage", "bm25", "--out",
            tmp_path / "out"]
    one_error(call(rerank, *argv), folder / f"{file}.jsonl:{number}", "id")
    assert not (tmp_path / "out").exists()


def test_a_tag_is_one_column(place, tmp_path, call):
    model = shutil.copytree(place / "model", tmp_path / "my own\u00a0model")
    out = tmp_path / "x.run"
    code, _, err = call(rerank, "--model", model, "--dataset", place / "corpus", "--first-stage",
                        "bm25", "--out", out)
    assert code == 0, err
    assert {line.split()[5] for line in out.read_text().splitlines()} == {"my_own_model"}
    assert read_run(out) and run_tag("/") == "run" and run_tag("a/b\nc") == "b_c"


def test_half_surrogates_are_replaced_and_counted(place, tmp_path, call):
    folder = copied(place, tmp_path / "c",
                    corpus=lambda text: text.replace('"text": "', '"text": "\\ud83d ', 2),
                    queries=lambda text: text.replace('"text": "',
                                                      '"text": "\\udc00 \\ud83d\\ude00 ', 3))
    texts = rerank.Texts(str(folder))
    assert texts.documents(["d0"])["d0"].startswith("\ufffd ")
    assert dict(texts.corpus())["d1"].startswith("\ufffd ")
    assert texts.all_queries["q2"].startswith("\ufffd \U0001f600 ")
    argv = ["--model", place / "model", "--dataset", f"{folder}/train", "--first-stage", "bm25"]
    code, _, err = call(rerank, *argv, "--out", tmp_path / "x.run")
    assert code == 0 and "corpus.jsonl: 2 texts" in err and "queries.jsonl: 3 texts" in err, err
    out = call(rerank, "--model", place / "model", "--query", "kaba \udcff",
               tmp_path / "c" / "corpus.jsonl")
    assert out[0] == 0, out[2]


@pytest.mark.parametrize("line, words", [("[" * 100_000, "recursion"),
                                         ('{"_id": ' + "7" * 5000 + "}", "JSON"),
                                         ('{"_id": "x"', "JSON"), ('["x"]', "_id"),
                                         ("\ud83d", "JSON")])
def test_damaged_lines_of_a_corpus(place, tmp_path, call, line, words):
    folder = copied(place, tmp_path / "c")
    with open(folder / "corpus.jsonl", "ab") as file:
        file.write(line.encode(errors="surrogatepass") + b"\n")
    one_error(call(evaluate, "--dataset", folder, "--diff", place / "bm25.run", place / "bm25.run"),
              "corpus.jsonl:61", words)


def test_blank_lines_are_no_documents(place, tmp_path):
    folder = copied(place, tmp_path / "c", corpus=lambda text: text.replace("\n", "\n\n", 5)
                    + "\n \n", queries=lambda text: "\ufeff" + text + "\n")
    assert dict(rerank.Texts(str(folder)).corpus()) == dict(
        rerank.Texts(str(place / "corpus")).corpus())


@pytest.mark.parametrize("file", ["corpus", "queries"])
def test_an_empty_collection_is_refused(place, tmp_path, file):
    with pytest.raises(BadInput, match=f"{file}.jsonl:1: nothing in it"):
        rerank.Texts(str(copied(place, tmp_path / "c", **{file: "\n"})))


def test_every_id_of_ir_datasets_opens_or_says_what_it_lacks(monkeypatch):
    """Without a network and files: none may end in anything but BadInput."""
    import ir_datasets

    def none(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", none)
    monkeypatch.setattr(socket, "getaddrinfo", none)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    said = {}
    for name in list(ir_datasets.registry._registered):
        try:
            texts = rerank.Texts(name)
            assert texts.fingerprint() and len(texts) >= 0
        except BadInput as e:
            said[name] = str(e)
    assert len(said) > 700 and all(name in message for name, message in said.items())
    assert "no queries" in said["antique"] and "no docs" in said["beir"]
    assert "default text" in said["codesearchnet/test"]
    assert "fetched" in said["cranfield"] and "fetched" in said["beir/scifact/test"]


@pytest.mark.parametrize("name", ["cranfield", "vaswani", "argsme/2020-04-01", "trec-tot/2025",
                                  "beir/scifact"])
def test_fingerprints_of_datasets_without_a_namespace(name):
    import ir_datasets

    texts = rerank.Texts.__new__(rerank.Texts)
    texts.name, texts.folder, texts.irds = name, None, ir_datasets.load(name)
    texts.__class__ = type("Counted", (rerank.Texts,), {"__len__": lambda self: 7})
    assert name.split("/")[0] in texts.fingerprint()


# --------------------------------------------------------------------------------------- re-ranking


def test_lines_to_rank(place, tmp_path, call):
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfkaba lodor\r\n\n" + b"mifin " * 60 + b"\n")
    code, out, err = call(rerank, "--model", place / "model", "--query", "kaba",
                          tmp_path / "lines.txt")
    lines = {line.split("\t")[1] for line in out.splitlines()}
    assert code == 0 and lines == {"kaba lodor", "mifin " * 60}
    assert "1 texts cut" in err and "32" in err


def test_weights_that_are_nan_are_said_for_a_query(place, tmp_path, call):
    import torch
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(place / "model", tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    nan = {name: torch.full_like(tensor, np.nan) for name, tensor in tensors.items()}
    save_file(nan, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "lines.txt").write_text("kaba\nlodor\n")
    one_error(call(rerank, "--model", model, "--query", "kaba", tmp_path / "lines.txt"),
              "not finite")


def test_out_is_never_an_input(place, tmp_path, call):
    run = shutil.copy(place / "bm25.run", tmp_path / "first.run")
    (tmp_path / "link").symlink_to(run)
    argv = ["--model", place / "model", "--dataset", place / "corpus", "--run", run, "--overwrite",
            "--out"]
    one_error(call(rerank, *argv, tmp_path / "link"), "read by this very command")
    assert read_run(run) == read_run(place / "bm25.run")


def test_a_run_is_packed_as_it_is_named(place, tmp_path, call):
    argv = ["--model", place / "model", "--dataset", place / "corpus", "--first-stage", "bm25",
            "--out"]
    for name in ("x.run", "x.run.gz", "x.run.zst"):
        assert call(rerank, *argv, tmp_path / name)[0] == 0
    plain = (tmp_path / "x.run").read_bytes()
    assert gzip.decompress((tmp_path / "x.run.gz").read_bytes()) == plain
    assert zstandard.ZstdDecompressor().decompressobj().decompress(
        (tmp_path / "x.run.zst").read_bytes()) == plain


def test_passages_leave_nothing_out(place, tmp_path, call):
    argv = ["--model", place / "model", "--dataset", place / "corpus", "--first-stage", "bm25",
            "--out", tmp_path / "x"]
    one_error(call(rerank, *argv, "--long-docs", "max", "--stride", 33), "--stride 33", "32")
    assert call(rerank, *argv, "--long-docs", "max", "--stride", 32)[0] == 0


def test_a_run_of_unknown_documents_is_refused(place, tmp_path, call):
    (tmp_path / "far.run").write_text("q1 Q0 nowhere 1 1.0 x\n")
    one_error(call(rerank, "--model", place / "model", "--dataset", place / "corpus", "--run",
                   tmp_path / "far.run", "--skip-missing", "--out", tmp_path / "x"), "far.run",
              "no document")


@pytest.mark.parametrize("damage", ["digit", "bit", "random", "doubled", "mark", "header"])
def test_a_damaged_part_is_scored_anew(place, tmp_path, call, monkeypatch, damage):
    monkeypatch.setattr(rerank.blocks_of, "__defaults__", (40,))
    argv = ["--model", place / "model", "--dataset", place / "corpus", "--run", place / "bm25.run",
            "--out"]
    assert call(rerank, *argv, tmp_path / "whole")[0] == 0
    monkeypatch.setattr(parts, "atomic_write", _killed_at(parts.atomic_write, "x"))
    with pytest.raises(ZeroDivisionError):
        call(rerank, *argv, tmp_path / "x")
    monkeypatch.undo()
    monkeypatch.setattr(rerank.blocks_of, "__defaults__", (40,))
    part = tmp_path / "x.part-0"
    content = part.read_bytes()
    header, _, rest = content.partition(b"\n")
    lines = rest.splitlines(keepends=True)
    block = next(i for i, line in enumerate(lines) if line.startswith(b"# #"))
    third = rest.index(b"Q0", len(rest) // 3)
    damaged = {
        "digit": rest.replace(b" 1 ", b" 7 ", 1),
        "random": rest[:third] + os.urandom(40) + rest[third + 40 :],
        "bit": rest[:third] + bytes([rest[third] ^ 4]) + rest[third + 1 :],
        "doubled": b"".join(lines[: block + 1]) + rest,
        "header": rest,
        "mark": b"".join([*lines[: block + 1], *lines[block:]]),
    }[damage]
    part.write_bytes((header[:9] if damage == "header" else header) + b"\n" + damaged)
    code, _, err = result = call(rerank, *argv, tmp_path / "x")
    if damage == "header":
        return one_error(result, "x.part-0", "damaged", "--overwrite")
    assert code == 0 and "damaged" in err and "scored anew" in err, err
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()


def _killed_at(write, name):
    def writing(path):
        if path.name == name:
            raise ZeroDivisionError
        return write(path)

    return writing


@pytest.mark.parametrize("what", ["queries", "tokenizer", "run"])
def test_a_run_goes_on_only_over_the_same_data(place, tmp_path, call, monkeypatch, what):
    folder, model = copied(place, tmp_path / "c"), shutil.copytree(place / "model", tmp_path / "m")
    run = shutil.copy(place / "bm25.run", tmp_path / "first.run")
    argv = ["--model", model, "--dataset", folder, "--run", run, "--out", tmp_path / "x"]
    monkeypatch.setattr(parts, "atomic_write", _killed_at(parts.atomic_write, "x"))
    with pytest.raises(ZeroDivisionError):
        call(rerank, *argv)
    monkeypatch.undo()
    if what == "queries":
        text = (folder / "queries.jsonl").read_text()
        (folder / "queries.jsonl").write_text(text.replace("ka", "lo", 1))
    elif what == "tokenizer":
        os.utime(model / "tokenizer.json", (1, 1))
    else:
        run.write_text(run.read_text().replace(".", ".1", 1))
    monkeypatch.setattr(sys, "argv", ["rerank.py", *map(str, argv)])
    with pytest.raises(BadInput, match="other flags or data"):
        rerank.main()


def test_one_process_writes_an_output(place, tmp_path, call):
    """The second says who holds it; a killed process holds nothing."""
    holder = ("import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
              "from data.command import locked\n"
              "with locked(Path(sys.argv[2])):\n    print('held', flush=True)\n    "
              "time.sleep(60)")
    argv = ["--model", place / "model", "--dataset", place / "corpus", "--first-stage", "bm25",
            "--out", tmp_path / "x"]
    process = subprocess.Popen([sys.executable, "-c", holder, ROOT, tmp_path / "x"],
                               stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        one_error(call(rerank, *argv), f"process {process.pid} on")
        one_error(call(train, *flags(place, out=tmp_path / "x")), f"process {process.pid} on")
    finally:
        process.kill()
        process.wait()
    assert call(rerank, *argv)[0] == 0 and not (tmp_path / ".x.lock").exists()


# ----------------------------------------------------------------------------------------- training


def test_resume_looks_at_all_data(place, tmp_path, call):
    folder, model = copied(place, tmp_path / "c"), shutil.copytree(place / "model", tmp_path / "m")
    argv = flags(place, dataset=folder, backbone=model, out=tmp_path / "run",
                 **{"eval-dataset": f"{folder}/dev"})
    assert call(train, *argv)[0] == 0
    (tmp_path / "run" / "README.md").unlink()
    assert call(train, *argv, "--resume")[0] == 0
    files = [folder / "qrels/train.tsv", model / "tokenizer.json", folder / "queries.jsonl",
             folder / "qrels/dev.tsv"]
    before = {file: (file.read_bytes(), file.stat()) for file in files}
    said = ["queries and qrels", "backbone", "queries and qrels", "validation"]
    for (file, (content, stat)), words in zip(before.items(), said, strict=True):
        (tmp_path / "run" / "README.md").unlink(missing_ok=True)
        file.write_bytes(content.rsplit(b"\n", 2)[0] + b"\n" if file.suffix != ".json" else content
                         + b" ")
        if file.name == "queries.jsonl":
            file.write_bytes(content.replace(b'"text": "', b'"text": "lo ', 1))
        one_error(call(train, *argv, "--resume"), "begun on other data", words, "size and time")
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_nothing_to_learn_is_said_before_the_first_step(place, tmp_path, call):
    run = read_run(place / "bm25.run")
    train_queries = list(rerank.Texts(f"{place / 'corpus'}/train").qrels)
    tied = {q: dict.fromkeys(ranked, 1.0) for q, ranked in run.items()}
    rerank.write_run(tmp_path / "tied.run", tied)
    argv = flags(place, loss="ranknet", lists=tmp_path / "tied.run", out=tmp_path / "run")
    one_error(call(train, *argv), "tied.run", "scores all tie")
    rerank.write_run(tmp_path / "tied.run", tied | {q: run[q] for q in train_queries[:6]})
    code, _, err = call(train, *argv)
    assert (
        code == 0
        and f"{len(train_queries) - 6} of 20 queries left out: the teacher's scores all tie" in err
    ), err
    small = {q: {d: s * 1e-50 for d, s in ranked.items()} for q, ranked in run.items()}
    rerank.write_run(tmp_path / "small.run", small)  # all alike in single precision
    one_error(call(train, *flags(place, loss="ranknet", lists=tmp_path / "small.run",
                                 out=tmp_path / "2")), "tie")
    rerank.write_run(tmp_path / "large.run", {q: {d: 1e39 + s for d, s in r.items()} for q,
                                              r in run.items()})
    for loss in ("ranknet", "kl", "marginmse", "mse"):
        argv = flags(place, loss=loss, lists=tmp_path / "large.run", out=tmp_path / "3")
        one_error(call(train, *argv), "large.run", "single precision")
    (tmp_path / "t.tsv").write_text("".join(f"0.5\t0.5\tq{i}\td{i}\td{i + 20}\n" for i in range(8)))
    one_error(call(train, *flags(place, loss="ranknet", triples=tmp_path / "t.tsv",
                                 out=tmp_path / "4")), "t.tsv")


def test_names_that_are_not_utf_8_in_tables_and_files(place, tmp_path, call):
    odd = [os.fsdecode(name) for name in (b"a\xff.run", b"a\xfe.run")]
    for name in odd:
        shutil.copy(place / "bm25.run", tmp_path / name)
    qrels = shutil.copy(place / "corpus/qrels/test.tsv", os.fsencode(tmp_path) + b"/q\xff")
    files = ["--plot", tmp_path / "x.svg", "--per-query", tmp_path / "x.tsv"]
    runs = [tmp_path / name for name in odd]
    code, out, _ = call(evaluate, "--qrels", os.fsdecode(qrels), *runs, "--baseline", runs[1],
                        *files)
    assert code == 0 and all(rf"a\udc{byte}" in out
                             and rf"a\udc{byte}" in (tmp_path / "x.tsv").read_text()
                             for byte in ("ff", "fe")) and r"q\udcff: " in out, out
    code, out, _ = call(evaluate, "--qrels", os.fsdecode(qrels), "--diff", *runs)
    assert code == 0 and r"a\udcff.run" in out


@pytest.mark.parametrize("negatives", ["recipe", "shared"])
def test_a_query_whose_candidates_are_all_missing(place, tmp_path, call, negatives):
    run = read_run(place / "bm25.run")
    bare = next(iter(rerank.Texts(f"{place / 'corpus'}/train").qrels))
    rerank.write_run(tmp_path / "x.run", run | {bare: {"nowhere": 2.0, "nor-this": 1.0}})
    argv = flags(place, loss="ranknet", lists=tmp_path / "x.run", out=tmp_path / "run",
                 negatives=negatives)
    code, _, err = call(train, *argv, "--skip-missing")
    why = {"recipe": "fewer than two candidates",
           "shared": "the relevant document is not among the candidates"}
    assert code == 0 and f"left out: {why[negatives]}" in err, err


def test_a_backbone_that_cannot_be_saved_again(place, tmp_path, call):
    model = shutil.copytree(place / "model", tmp_path / "m")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"backend": "\ud800"}))
    one_error(call(train, *flags(place, backbone=model, out=tmp_path / "run")), str(model),
              "saving it again")


def test_a_run_folder_has_a_name_of_text(place, tmp_path, call):
    """safetensors writes to no other; said before the first step, with nothing made."""
    one_error(call(train, *flags(place, out=os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))),
              "not UTF-8")
    assert not list(tmp_path.iterdir())


def test_steps_without_a_gradient_are_counted(place, tmp_path, call, monkeypatch):
    monkeypatch.setattr(losses, "hinge", lambda scores, *_: (scores * 0).sum())
    code, _, err = call(train, *flags(place, loss="hinge", out=tmp_path / "run"))
    assert code == 0 and "3 of 3 steps had no gradient" in err


def test_positives_that_the_corpus_lacks_are_left_out(place, tmp_path, call):
    def change(text):
        return text.replace("\td1\t", "\tgone\t") + "q2\tlost\t1\n"

    folder = copied(place, tmp_path / "c", qrels_train=change)
    code, _, err = call(train, *flags(place, dataset=folder, steps=8, out=tmp_path / "run"))
    assert code == 0 and "2 relevant documents are not in dataset" in err, err
    assert "1 of 16 queries left out: no relevant document" in err


@pytest.mark.parametrize("loss", ["marginmse", "kl", "infonce"])
def test_queries_of_another_split_are_left_out(place, tmp_path, call, loss):
    code, _, err = call(train, *flags(place, loss=loss, lists=place / "bm25.run",
                                      out=tmp_path / "run"))
    assert code == 0 and "16 queries with lists" in err
    assert "4 of 20 queries left out: judged in another split" in err
    (tmp_path / "t.tsv").write_text("".join(f"{i}.5\t0.5\tq{i}\td{i}\td{i + 20}\n"
                                            for i in range(20)))
    code, _, err = call(train, *flags(place, loss="bce", triples=tmp_path / "t.tsv",
                                      out=tmp_path / "2"))
    assert code == 0 and "4 of 20 triples left out: their query is of another split" in err, err


@pytest.mark.parametrize("documents", [3, 2])
def test_a_corpus_smaller_than_a_list(place, tmp_path, call, documents):
    folder = tmp_path / "small"
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": f"d{i}", "text": f"kaba lodor {toy.WORDS[i]}" * (i > 0)})
            for i in range(documents)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{i}", "text": "kaba"})
                                                  + "\n" for i in (0, 1)))
    (folder / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    code, _, err = call(train, "--backbone", "tiny", "--dataset", folder, "--steps", 2, "--device",
                        "cpu", "--out", tmp_path / "run")
    assert code == 0, err
    assert "2 queries have fewer than 7 negatives; their lists are shorter" in err
    assert "validation RR@10 on nothing" in err


def test_tiny_validates_on_the_folder_it_trains_on(place, tmp_path, monkeypatch):
    folder = copied(place, tmp_path / "sub" / "mine")
    for name in (str(folder), f"{folder}/train"):
        args = train.parse(["--backbone", "tiny", "--dataset", name])
        assert args.eval_dataset == [f"{folder}/dev"]
    (folder / "qrels" / "dev.tsv").unlink()
    assert train.parse(["--backbone", "tiny", "--dataset", str(folder)]).eval_dataset == []
    assert train.parse(["--backbone", "tiny", "--dataset", "beir/scifact/train"]).eval_dataset == []
    assert train.parse(["--backbone", "tiny"]).eval_dataset == ["pydocs/dev"]


@pytest.mark.parametrize("columns", [3, 5])
def test_triples_with_a_header_a_bom_and_blank_lines(place, tmp_path, capsys, columns):
    texts = rerank.Texts(str(place / "corpus"), split="train")
    lines = [["0.5", "-1", f"q{i}", f"d{i}", f"d{i + 20}"][5 - columns :] for i in range(4)]
    body = "".join("\t".join(line) + "\n" for line in lines)
    header = "\t".join(["pos_score", "neg_score", "qid", "pos_pid",
                        "neg_pid"][5 - columns :]) + "\n"
    (tmp_path / "plain.tsv").write_text(body)
    plain = Triples(tmp_path / "plain.tsv", "bce", texts)
    items = [plain.item(i, None) for i in range(4)]
    for number, text in enumerate([header + body, "\ufeff" + body, "\ufeff" + header + body,
                                   body + "\n\n", (header + body).replace("\n", "\r\n") + "\r\n"]):
        (tmp_path / f"{number}.tsv").write_bytes(text.encode())
        source = Triples(tmp_path / f"{number}.tsv", "bce", texts)
        assert [source.item(i, None) for i in range(len(source))] == items
        headed = "qid" in text
        assert source.where(2).endswith(f":{3 + headed}")
        assert ("taken for a header" in capsys.readouterr().err) == headed
    (tmp_path / "wrong.tsv").write_text(body[: len(body) // 2] + "\n\n" + body)
    with pytest.raises(BadInput, match=r"wrong.tsv:\d: "):
        Triples(tmp_path / "wrong.tsv", "bce", texts)


def test_passages_in_place_of_ids(place, tmp_path, call):
    text = "kaba lodor " * 120
    for row in (f"kaba\t{text}\t{text}\n", f"q0\t{text}\t{text}\n"):
        (tmp_path / "t.tsv").write_text(row * 5)
        one_error(call(train, *flags(place, loss="bce", triples=tmp_path / "t.tsv",
                                     out=tmp_path / "r")), "t.tsv:1")


@pytest.fixture(scope="module")
def begun(place, tmp_path_factory):
    """A run of 4 steps, its closing files taken away: as if interrupted before the model card."""
    out = tmp_path_factory.mktemp("begun") / "run"
    every = {"eval-dataset": place / "corpus" / "dev", "eval-every": 2, "save-every": 2}
    argv = flags(place, steps=4, out=out, **every)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        assert guarded(train.main) == 0
    (out / "README.md").unlink()
    return out, argv


def checkpoint(change):
    def damage(path):
        import torch

        state = torch.load(path, weights_only=True)
        torch.save(change(state), path)

    return damage


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


DAMAGES = {"cut": lambda path: os.truncate(path, path.stat().st_size // 2),
           "empty": lambda path: os.truncate(path, 0),
           "random": lambda path: path.write_bytes(os.urandom(5000)),
           "bit": flipped,
           "list": checkpoint(lambda state: [1, 2]),
           "key": checkpoint(lambda state: state.pop("best") and state or state),
           "negative": checkpoint(lambda state: state | {"step": -3}),
           "beyond": checkpoint(lambda state: state | {"step": 99}),
           "other": checkpoint(lambda state: state | {"model": {}})}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_names_itself(begun, tmp_path, call, damage):
    out, argv = begun
    copy = shutil.copytree(out, tmp_path / "run")
    DAMAGES[damage](copy / "last" / "checkpoint.pt")
    argv = [copy if word == out else word for word in argv]
    one_error(call(train, *argv, "--resume"), "checkpoint.pt: damaged", "--overwrite")


@pytest.mark.parametrize("content", ["", "\x00", "[]", "{}",
                                     '{"flags": 3, "data": {}, "versions": {}}', "[" * 99999])
def test_damaged_args_name_themselves(begun, tmp_path, call, content):
    out, argv = begun
    copy = shutil.copytree(out, tmp_path / "run")
    (copy / "args.json").write_text(content)
    argv = [copy if word == out else word for word in argv]
    one_error(call(train, *argv, "--resume"), "args.json: damaged", "--overwrite")


@pytest.mark.parametrize("damage", ["missing", "torn", "random", "no step", "list", "empty"])
def test_a_training_goes_on_without_its_log(begun, tmp_path, call, damage):
    out, argv = begun
    copy = shutil.copytree(out, tmp_path / "run")
    log = copy / "log.jsonl"
    text = log.read_text()
    if damage == "missing":
        log.unlink()
    else:
        log.write_bytes({"torn": text[:-10].encode(), "random": os.urandom(3000), "empty": b"",
                         "list": b"[1]\n3\n", "no step": b'{"loss": 1}\n{"step": "x"}\n'
                         + text.encode()}[damage])
    argv = [copy if word == out else word for word in argv]
    code, _, err = call(train, *argv, "--resume")
    assert code == 0 and "log.jsonl: " in err and "goes on" in err, err
    assert all(json.loads(line)["step"] > 0 for line in log.read_text().splitlines())
    assert (copy / "README.md").is_file()


def test_a_step_that_never_ends_is_left_after_a_while():
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from data.command import Stop\nStop.grace = 1\n"
        "with Stop():\n    print('ready', flush=True)\n    while True: time.sleep(0.05)")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", script], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143 and "--resume" in process.stderr.read()


def test_a_log_file_gets_lines_of_progress(place, tmp_path, call, monkeypatch):
    monkeypatch.setattr(Progress, "every", 0.0)
    code, _, err = call(train, *flags(place, steps=5, out=tmp_path / "run"))
    lines = [line for line in err.splitlines() if "/5 steps in" in line]
    assert code == 0 and len(lines) >= 5 and "\r" not in err
    pattern = r"\d/5 steps in \d\d:\d\d, .* to go, .*step.*, loss \d\.\d{4}"
    assert all(re.search(pattern, line) for line in lines[1:])
    argv = ["--model", place / "model", "--dataset", place / "corpus", "--first-stage", "bm25"]
    code, _, err = call(rerank, *argv, "--out", tmp_path / "x.run")
    assert re.search(r"model: \d+/\d+ pairs in ", err) and "\r" not in err


@pytest.mark.parametrize("content", ["null", "[]", '{"query_length": "x"}', '{"doc_length": 1.5}',
                                     "{", "[" * 99999, '{"query_length": -1}'])
def test_a_backbone_with_a_wrong_config(place, tmp_path, call, content):
    model = shutil.copytree(place / "model", tmp_path / "m")
    (model / "config.json").write_text(content)
    one_error(call(train, *flags(place, backbone=model, out=tmp_path / "run")), "config.json")


def test_help_needs_no_torch():
    for script in ("train", "rerank", "teacher", "evaluate"):
        code = (f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = "
                f"['{script}.py', '--help']\n"
                f"try: runpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')\n"
                "except SystemExit: print('torch' in sys.modules)")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              timeout=60)
        assert done.stdout.rstrip().endswith("False"), (script, done.stderr)


@pytest.mark.parametrize("script", ["train", "rerank", "teacher", "evaluate"])
def test_an_interruption_while_importing_leaves_no_traceback(tmp_path, script):
    for name in ("pyarrow.py", "numpy.py"):
        (tmp_path / name).write_text("import time; print('importing', flush=True); time.sleep(30)")
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", "--help"],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        # ignored behind `&`
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT and process.stderr.read() == ""


@pytest.mark.parametrize("file", ["bm25-*/docids.txt", "bm25-*/*.npy", "triples-*/*"])
def test_a_damaged_cache_names_itself(place, tmp_path, call, monkeypatch, file):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    (tmp_path / "t.tsv").write_text("".join(f"q{i}\td{i}\td{i + 20}\n" for i in range(8)))
    argv = flags(place, loss="bce", out=tmp_path / "run")
    of_triples = file.startswith("triples")
    argv += ["--triples", tmp_path / "t.tsv"] if of_triples else ["--first-stage", "bm25"]
    assert call(train, *argv)[0] == 0
    for path in (tmp_path / "cache").glob(file):
        path.write_bytes(b"\xff" * 9)
    one_error(call(train, *argv, "--overwrite"), tmp_path / "cache", "damaged", "remove it")


def test_a_run_ended_within_a_validation_makes_up_for_it(place, tmp_path, call, monkeypatch):
    every = {"eval-dataset": place / "corpus" / "dev", "eval-every": 2, "save-every": 4}
    assert call(train, *flags(place, steps=5, out=tmp_path / "whole", **every))[0] == 0
    for ends in (1, 3):  # within the first validation, and within the one behind the last step
        seen = []

        def validate(self, *args, ends=ends, seen=seen, whole=train.Validation.__call__):
            seen.append(1)
            if len(seen) == ends:
                raise KeyboardInterrupt
            return whole(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(train.Validation, "__call__", validate)
            assert call(train, *flags(place, steps=5, out=tmp_path / str(ends), **every))[0] == 130
        code, _, err = call(train, *flags(place, steps=5, out=tmp_path / str(ends), **every),
                            "--resume")
        assert code == 0 and f"going on after step {(2, None, 5)[ends - 1]}" in err
        states = [torch.load(tmp_path / run / "last" / "checkpoint.pt")
                  for run in (str(ends), "whole")]
        assert states[0]["history"] == states[1]["history"]
        for file in ("model.safetensors", "log.jsonl"):
            both = [(tmp_path / run / file).read_bytes() for run in ("whole", str(ends))]
            assert file == "log.jsonl" or both[0] == both[1]
            assert both[0].count(b"\n") == both[1].count(b"\n")
