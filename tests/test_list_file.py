"""Lists that carry their texts: what is drawn from them, what train.py and teacher.py make of
them."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import data.cache
import teacher
import teaching
import toy
import train
import training
from data.command import BadInput
from data.first_stages import candidates
from data.list_file import ListFile
from data.lists import TextLists
from data.runs import read_run, write_run
from data.texts import Texts
from kernels.encoder import CrossEncoder
from training import ROOT, run_main, train_here, weights

place = pytest.fixture(scope="module")(training.make_place)

ROWS = [  # the line that each stands in is its place + 2: the first is blank
    {"query": "a", "pos": ["p0", "p1"], "neg": ["n0", "n1", "n2"], "pos_scores": [3, 1.5],
     "neg_scores": [-1, 2.5, 0.25], "prompt": "of FlagEmbedding"},
    {"query": "b é\ud800", "pos": ["p0"], "neg": ["n0", "p0", "n1", "n0"], "pos_scores": None},
    {"query": "c", "pos": [], "neg": ["n0", "n1"], "pos_scores": [], "neg_scores": [1.0, 2.0]},
    {"query": "d", "pos": ["p0"], "neg": None},
    {"query": "e", "pos": ["p0"], "neg": ["n0"], "pos_scores": [0.5], "neg_scores": [0.5]},
]


def written(path: Path, rows) -> Path:
    content = "\n" + "".join(json.dumps(row) + "\n" for row in rows)
    pack = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.write_bytes(pack.get(path.suffix, bytes)(content.encode()))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data.cache, "CACHE", tmp_path / "cache")


def items(source, i, draws=60):
    """What is drawn of list i: {(text, target), ...} of many draws, and their lengths."""
    drawn = [source.item(i, (1, seed)) for seed in range(draws)]
    texts = [source.file.documents(docids) for _, docids, _ in drawn]
    pairs = [[(found[d], target) for d, target in zip(docids, targets, strict=True)]
             for found, (_, docids, targets) in zip(texts, drawn, strict=True)]
    return pairs


# ------------------------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz", "mine.json.zst"])
def test_lists_of_labels_hold_one_relevant_text_and_others(tmp_path, capsys, name):
    source = TextLists(ListFile(written(tmp_path / name, ROWS)), "infonce", 3)
    assert [source.where(i) for i in range(len(source))] == [
        f"{tmp_path / name}:{line}" for line in (2, 3, 6)]
    drawn = items(source, 0)
    assert all(len(pairs) == 3 and pairs[0][1] == 1.0 for pairs in drawn)
    assert {pairs[0][0] for pairs in drawn} == {"p0", "p1"}
    others = {pair for pairs in drawn for pair in pairs[1:]}
    assert others == {("n0", 0.0), ("n1", 0.0), ("n2", 0.0)}
    # what stands there twice counts once, the relevant one before the other
    assert {tuple(sorted(pairs)) for pairs in items(source, 1)} == {
        (("n0", 0.0), ("n1", 0.0), ("p0", 1.0))}
    qid = source.item(1, 0)[0]
    assert (qid, source.file.all_queries[qid]) == ("line3", "b é\ufffd")
    said = capsys.readouterr().err
    for word in ("2 texts stand in their list twice", "1 of 5 lists left out: no relevant text",
                 "1 of 5 lists left out: no text that is not relevant", "1 lists have fewer than 2",
                 "1 lines hold halves of surrogate pairs"):
        assert word in said


def test_losses_on_a_teacher_get_the_files_scores(tmp_path, capsys):
    file = ListFile(written(tmp_path / "mine.jsonl", ROWS))
    source = TextLists(file, "kl", 50)
    assert [source.where(i).rpartition(":")[2] for i in range(len(source))] == ["2", "4", "6"]
    assert sorted(items(source, 0)[0]) == [
        ("n0", -1.0), ("n1", 2.5), ("n2", 0.25), ("p0", 3.0), ("p1", 1.5)]
    assert len({tuple(pairs) for pairs in items(source, 0)}) > 20  # in orders of their own
    assert all(len(pairs) == 2 for pairs in items(TextLists(file, "adrmse", 2), 0))
    said = capsys.readouterr().err
    assert "1 of 5 lists left out: no scores" in said
    assert "1 of 5 lists left out: fewer than two texts" in said
    assert "up to 5 texts in a list; 2 of them drawn anew" in said
    margins = TextLists(file, "marginmse", 2)
    assert {tuple(pairs) for pairs in items(margins, 0)} == {
        ((p, t), (n, u)) for p, t in (("p0", 3.0), ("p1", 1.5))
        for n, u in (("n0", -1.0), ("n1", 2.5), ("n2", 0.25))}
    assert [margins.where(i).rpartition(":")[2] for i in range(len(margins))] == ["2", "6"]
    assert len(TextLists(file, "ranknet", 2)) == 2  # without line 6, whose scores tie
    lone = written(tmp_path / "lone.jsonl", [{"query": "f", "pos": ["p0"], "pos_scores": [0.5]}])
    assert items(TextLists(ListFile(lone), "mse", 8), 0)[0] == [("p0", 0.5)]


def test_shared_lists_are_the_same_for_every_loss(tmp_path):
    file = ListFile(written(tmp_path / "mine.jsonl", ROWS[:1]))
    drawn = {loss: TextLists(file, loss, 3, shared=True).item(0, (1, 5))
             for loss in ("bce", "infonce", "adrmse", "marginmse", "ranknet")}
    assert len({tuple(docids) for _, docids, _ in drawn.values()}) == 1
    _, docids, targets = drawn["adrmse"]
    by_text = dict(zip(["p0", "p1", "n0", "n1", "n2"], [3, 1.5, -1, 2.5, 0.25], strict=True))
    texts = file.documents(docids)
    assert targets == [by_text[texts[d]] for d in docids]
    assert drawn["bce"][2] == [1.0, 0.0, 0.0]


def test_likely_relevant_texts_are_left_out(tmp_path, capsys):
    """Above the lowest relevant score, 1.5, minus 1.25: n1 and not n2, which is level."""
    source = TextLists(ListFile(written(tmp_path / "m.jsonl", ROWS)), "bce", 4, max_margin=1.25)
    assert {text for pairs in items(source, 0) for text, _ in pairs[1:]} == {"n0", "n2"}
    said = capsys.readouterr().err
    assert "2 texts left out, scored above" in said  # n1, and line 6's, as high as its relevant one
    assert len(source) == 2
    with pytest.raises(BadInput, match="no scores in it"):
        TextLists(ListFile(written(tmp_path / "n.jsonl", ROWS[1:2])), "bce", 4, max_margin=1)


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("line, said", [
    ("{", "not a JSON object"),
    ("[1]", "expected {"),
    ('{"query": 7, "pos": ["a"], "neg": ["b"]}', "expected {"),
    ('{"query": "q", "pos": "a", "neg": ["b"]}', '"pos" must be a list of texts'),
    ('{"query": "q", "pos": ["a"], "neg": [null]}', '"neg" must be a list of texts'),
    ('{"query": "q", "positive": "a", "negative": "b"}', "expected {"),
    ('{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1]}', "both sides"),
    ('{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1, 2], "neg_scores": [1]}',
     '"pos_scores" must be 1 numbers'),
    ('{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": [NaN]}', "NaN"),
    ('{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [true], "neg_scores": [1]}', "true"),
    ('{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": ["1"], "neg_scores": [1]}', '"1"'),
    ('{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1e39], "neg_scores": [1]}',
     "no finite"),
])
def test_a_wrong_line_is_named(tmp_path, monkeypatch, capsys, line, said):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(ROWS[0]) + f"\n\n{line}\n")
    code = run_main(monkeypatch, train, "--backbone", "tiny", "--lists", file, "--out",
                    tmp_path / "out")
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith(f"error: {file}:3: ") and said in error
    assert not (tmp_path / "out").exists() and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("flags, said", [
    (["--loss", "kl"], "no scores in it, but --loss kl"),
    (["--dataset", "pydocs"], "--dataset does nothing"),
    (["--depth", "5"], "--depth does nothing"),
    (["--eval-run", "x.run"], "--eval-run names 1 runs, --eval-dataset 0 datasets"),
    (["--lists", "nowhere.jsonl"], "nowhere.jsonl: not found"),
])
def test_what_does_not_go_with_lists_of_texts(tmp_path, monkeypatch, capsys, flags, said):
    file = written(tmp_path / "mine.jsonl", ROWS[1:2])
    code = run_main(monkeypatch, train, "--backbone", "tiny", "--lists", file, "--out",
                    tmp_path / "out", *flags)
    assert code == 2 and said in capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("loss", ["infonce", "ranknet"])
def test_a_run_and_its_texts_train_the_same_model(place, tmp_path, loss):
    """The same lists once as a run on a dataset and once with their texts: equal weights."""
    texts, run, rows = Texts(str(place / "corpus"), split="train"), {}, []
    teachers = read_run(place / "teacher.run")
    for qid, judged in texts.qrels.items():
        relevant = next(iter(judged))
        ranked = {relevant: 9.5} | {d: s for d, s in teachers[qid].items() if d != relevant}
        run[qid] = dict(sorted(ranked.items(), key=lambda pair: (-pair[1], pair[0])))
        documents = texts.documents(run[qid])
        rows.append({"query": texts.queries[qid], "pos": [documents[relevant]],
                     "neg": [documents[d] for d in run[qid] if d != relevant],
                     "pos_scores": [9.5], "neg_scores": list(run[qid].values())[1:]})
    write_run(tmp_path / "lists.run", run)
    best = candidates(texts, tmp_path / "lists.run", None, 100)
    for row, (_, ranked) in zip(rows, best.nested().items(), strict=True):  # ties in its order
        documents = texts.documents(list(ranked)[1:])
        row |= {"neg": list(documents.values()), "neg_scores": list(ranked.values())[1:]}
    written(tmp_path / "lists.jsonl", rows)
    how = {"loss": loss, "steps": 4, "list-size": 4, "eval-dataset": "none", "workers": 0}
    train_here(place, lists=tmp_path / "lists.run", out=tmp_path / "a", **how)
    train_here(place, lists=tmp_path / "lists.jsonl", dataset=None, out=tmp_path / "b", **how)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    card = (tmp_path / "b/README.md").read_text()
    assert "lists.jsonl with their texts" in card and "A collection of the user's own" in card


def test_tiny_learns_its_words_from_the_lists(tmp_path, monkeypatch, capsys):
    rows = [{"query": f"kaba {i}", "pos": [f"kaba lodor {i}"], "neg": ["mifin", f"ze {i}"]}
            for i in range(8)]
    file = written(tmp_path / "mine.jsonl.gz", rows)
    monkeypatch.chdir(tmp_path)
    words = ["--backbone", "tiny", "--lists", file, "--steps", 2, "--workers", 0]
    assert run_main(monkeypatch, train, *words) == 0
    model = CrossEncoder.from_pretrained(tmp_path / "runs/mine-tiny-infonce-seed1")
    assert model.tokenizer.decode(model.tokenize(["kaba lodor"], None)[0]) == "kaba lodor"
    assert "no closing table" in capsys.readouterr().err
    assert run_main(monkeypatch, train, *words, "--resume") == 0


def test_a_csv_becomes_lists(tmp_path, monkeypatch):
    """The lines of data/README.md, on a table of judged pairs."""
    readme = (ROOT / "data/README.md").read_text()
    snippet = re.search(r"^import collections, csv.*?(?=^```)", readme, re.M | re.S)
    (tmp_path / "pairs.csv").write_text(
        'query,passage,label\nwho,"me, myself",1\nwhat,it,0\nwho,they,0\nwhat,this,1\n')
    monkeypatch.chdir(tmp_path)
    exec(snippet[0], {})
    source = TextLists(ListFile(Path("mine.jsonl")), "infonce", 2)
    drawn = {source.file.all_queries[qid]: list(source.file.documents(docids).values())
             for qid, docids, _ in map(source.item, range(2), range(2))}
    assert drawn == {"who": ["me, myself", "they"], "what": ["this", "it"]}


# ---------------------------------------------------------------------------------------- a teacher


def test_teacher_writes_its_scores_into_the_lists(place, tmp_path, monkeypatch, capsys):
    words = np.random.default_rng(0).choice(toy.WORDS, (9, 5))
    query, *documents = [" ".join(row) for row in words]
    rows = [ROWS[0] | {"query": query, "pos": documents[:2], "neg": documents[2:5]},
            {"query": documents[0], "pos": [], "neg": documents[5:]}]
    file, out = written(tmp_path / "mine.jsonl", rows), tmp_path / "scored.jsonl.gz"
    toy.model(tmp_path / "other", seed=1)
    models = [place / "model", tmp_path / "other"]
    how = ["--lists", file, "--out", out, "--device", "cpu", "--dtype", "float32", "--keep-each"]
    assert run_main(monkeypatch, teacher, "cross-encoder", "--model", *models, *how) == 0
    assert "5 of its 8 texts have scores, which are replaced" in capsys.readouterr().err
    members = [CrossEncoder.from_pretrained(model) for model in models]
    got = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    for row, scored in zip(rows, got, strict=True):
        assert {k: v for k, v in scored.items() if "scores" not in k} == {
            k: v for k, v in row.items() if "scores" not in k}
        texts = row["pos"] + row["neg"]
        expected = sum(m.score([row["query"]] * len(texts), texts).double() for m in members) / 2
        assert np.allclose(scored["pos_scores"] + scored["neg_scores"], expected, atol=1e-6)
    names = sorted(path.name for path in tmp_path.glob("scored*"))
    assert names == ["scored.jsonl.gz", "scored.jsonl.gz.json", "scored.member-1.jsonl.gz",
                     "scored.member-2.jsonl.gz"]
    assert len(TextLists(ListFile(out), "kl", 50)) == 2
    assert run_main(monkeypatch, teacher, "cross-encoder", "--model", *models, *how) == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    how[3] = tmp_path / "scored.run"
    assert run_main(monkeypatch, teacher, "cross-encoder", "--model", *models, *how) == 2
    assert "name it .jsonl" in capsys.readouterr().err


def test_a_language_model_scores_lists_as_it_scores_a_run(tmp_path, monkeypatch):
    graded = teaching.graded_texts(tmp_path)
    teaching.small_llm(tmp_path / "llm")
    assert teaching.pointwise(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run") == 0
    texts = Texts(str(graded / "corpus"))
    rows = [{"query": texts.queries[qid], "pos": list(texts.documents(ranked).values())}
            for qid, ranked in read_run(graded / "first.run").items()]
    file, out = written(tmp_path / "mine.jsonl", rows), tmp_path / "scored.jsonl"
    assert run_main(monkeypatch, teacher, "pointwise", "--model", tmp_path / "llm", "--lists", file,
                    "--device", "cpu", "--out", out) == 0
    expected = read_run(tmp_path / "t.run")
    for qid, line in zip(expected, out.read_text().splitlines(), strict=True):
        docids = list(read_run(graded / "first.run")[qid])
        assert json.loads(line)["pos_scores"] == [expected[qid][d] for d in docids]
    assert not list(tmp_path.glob("*scores-*"))
