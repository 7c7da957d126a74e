"""teacher.py cross-encoder: ensembles against the members' own runs, triples in and out, what an
interrupted command leaves."""

import json
import shutil
import weakref

import numpy as np
import pytest

import data.cache
import rerank
import teacher
import teaching
import toy
from data import parts
from data.command import BadInput
from data.lists import TripleFile
from data.runs import read_run
from data.texts import Texts
from teaching import by_two_processes, run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, a first stage of 12 queries with 20 documents each, and three models."""
    folder = tmp_path_factory.mktemp("teacher")
    toy.corpus(folder / "corpus")
    lengths = [(32, 8, 32), (64, 4, 16), (32, 6, 24)]
    for seed, (hidden, query_length, doc_length) in enumerate(lengths):
        model = toy.model(folder / f"model{seed}", seed=seed, hidden=hidden)
        config = json.loads((model / "config.json").read_text())
        config |= {"query_length": query_length, "doc_length": doc_length}
        (model / "config.json").write_text(json.dumps(config))
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]  # the words of each model have ids of their own
        tokenizer["model"]["vocab"] = {word: i if i < 5 else 5 + (i + 7 * seed) % 40
                                       for word, i in vocabulary.items()}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    lines = [f"q{q} Q0 d{(7 * q + 3 * i) % 60} {i + 1} {100 - i}.5 first\n" for q in range(12)
             for i in range(20)]
    (folder / "first.run").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(data.cache, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def member_runs(place):
    """What rerank.py writes for each member."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for i in range(3):
            assert run(monkeypatch, rerank, "--model", place / f"model{i}", "--dataset",
                       place / "corpus", "--run", place / "first.run", "--out",
                       place / f"member{i}.run") == 0
    return [read_run(place / f"member{i}.run") for i in range(3)]


def ensemble(monkeypatch, place, out, *more, members=3):
    models = [place / f"model{i}" for i in range(members)]
    return run(monkeypatch, teacher, "cross-encoder", "--model", *models, "--dataset",
               place / "corpus", "--out", out, *more)


# ---------------------------------------------------------------------------------------- the means


def zscore(scores):
    mean = sum(scores.values()) / len(scores)
    deviation = np.sqrt(sum((s - mean) ** 2 for s in scores.values()) / len(scores))
    return {docid: (s - mean) / deviation for docid, s in scores.items()}


def minmax(scores):
    low, high = min(scores.values()), max(scores.values())
    return {docid: (s - low) / (high - low) for docid, s in scores.items()}


@pytest.mark.parametrize("how, scaled", [("none", dict), ("zscore", zscore), ("minmax", minmax)])
def test_mean_of_members(place, member_runs, monkeypatch, tmp_path, how, scaled):
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run",
                    "--normalize", how) == 0
    got = read_run(tmp_path / "t.run")
    assert list(got) == list(member_runs[0])
    for qid in got:
        assert got[qid].keys() == member_runs[0][qid].keys() and len(got[qid]) == 20
        together = [scaled(member[qid]) for member in member_runs]
        for docid, score in got[qid].items():
            assert abs(score - sum(scores[docid] for scores in together) / 3) < 1e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.run", "t.run.json"]
    summary = json.loads((tmp_path / "t.run.json").read_text())
    assert [m["pairs"] for m in summary["members"]] == [240] * 3
    assert [m["doc_length"] for m in summary["members"]] == [32, 16, 24]
    assert summary["flags"]["normalize"] == how
    assert summary["flags"]["run"] == str(place / "first.run")


def test_one_model_is_reranks_run(place, member_runs, monkeypatch, tmp_path):
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run",
                    members=1) == 0
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
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run") == 0
    assert len(loaded) == 3


def test_equal_scores_normalize_to_zero():
    for how in ("zscore", "minmax"):
        assert teacher.normalized(np.full(4, 2.5), how).tolist() == [0.0] * 4
    assert teacher.normalized(np.array([3.0]), "none").tolist() == [3.0]


def test_keep_each(place, member_runs, monkeypatch, tmp_path):
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run",
                    "--keep-each", "--normalize", "zscore") == 0
    for i in range(3):
        assert read_run(tmp_path / f"t.member-{i + 1}.run") == member_runs[i]


def test_the_first_stage_is_made_here(place, monkeypatch, tmp_path):
    for script in (teacher, rerank):
        command = ["cross-encoder"] if script is teacher else []
        assert run(monkeypatch, script, *command, "--model", place / "model0", "--dataset",
                   place / "corpus", "--first-stage", "bm25", "--depth", 5, "--out",
                   tmp_path / f"{script.__name__}.run") == 0
    assert (tmp_path / "teacher.run").read_bytes() == (tmp_path / "rerank.run").read_bytes()


def test_tags_are_one_column(place, monkeypatch, tmp_path):
    shutil.copytree(place / "model0", tmp_path / "my model\t1")
    assert run(monkeypatch, teacher, "cross-encoder", "--model", tmp_path / "my model\t1",
               place / "model1", "--dataset", place / "corpus", "--run", place / "first.run",
               "--out", tmp_path / "t.run", "--keep-each") == 0
    for name, tag in (("t.member-1", "my_model_1"), ("t", "ensemble")):
        lines = (tmp_path / f"{name}.run").read_text().splitlines()
        assert {tuple(line.split(" ")[5:]) for line in lines} == {(tag,)}


def test_a_teacher_with_one_score_for_all_is_said(place, monkeypatch, tmp_path, capsys):
    score = {"q1": lambda docid: np.float32(0.25)}

    def scored(self, blocks):
        for block in blocks:
            yield {q: {d: score.get(q, score["q1"])(d) for d in self.run[q]} for q in block}

    monkeypatch.setattr(rerank.PairScorer, "__call__", scored)
    arguments = ("--run", place / "first.run")
    assert ensemble(monkeypatch, place, tmp_path / "t.run", *arguments, members=2) == 0
    warning = "12 queries, each with one score for all its documents: WARNING"
    assert warning in capsys.readouterr().err
    score["q2"] = lambda docid: np.float32(len(docid))  # one query that says something is enough
    assert ensemble(monkeypatch, place, tmp_path / "u.run", *arguments, members=2) == 0
    assert "WARNING" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ triples


@pytest.mark.parametrize("scores", [[], ["9", "8"]])
def test_triples(place, member_runs, monkeypatch, tmp_path, scores):
    """Hofstätter's layout; the pairs occur again and again and are scored once."""
    triples = [[f"q{q}", f"d{7 * q % 60}", f"d{(7 * q + 3 * i) % 60}"] for q in (2, 0, 2)
               for i in (1, 2, 5, 2)]
    lines = ["\t".join(scores + triple) + "\n" for triple in triples]
    (tmp_path / "in.tsv").write_text("".join(lines))
    assert ensemble(monkeypatch, place, tmp_path / "out.tsv", "--triples", tmp_path / "in.tsv",
                    "--keep-each") == 0
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert [row[2:] for row in rows] == triples
    for pos_score, neg_score, qid, pos, neg in rows:
        for docid, score in ((pos, pos_score), (neg, neg_score)):
            assert abs(float(score) - np.mean([m[qid][docid] for m in member_runs])) < 1e-6
    summary = json.loads((tmp_path / "out.tsv.json").read_text())
    assert [m["pairs"] for m in summary["members"]] == [8] * 3 and summary["pairs"] == 8
    kept = (tmp_path / "out.member-2.tsv").read_text().splitlines()
    assert abs(float(kept[0].split("\t")[0]) - member_runs[1]["q2"]["d14"]) < 1e-6


@pytest.mark.parametrize("line, what", [
    ("q1\td1\n", "in.tsv:2: 2 tab-separated columns"),
    ("nobody\td1\td2\n", "in.tsv:2: query 'nobody'"),
    ("q1\td1\tnowhere\n", "in.tsv:2: document 'nowhere'"),
    ("q1\t\td2\n", "in.tsv:2: document ''"),
    ("\td1\td2\n", "in.tsv:2: the id of its query is empty"),
])
def test_broken_triples(place, monkeypatch, tmp_path, capsys, line, what):
    (tmp_path / "in.tsv").write_text("q1\td1\td2\n" + line)
    assert ensemble(monkeypatch, place, tmp_path / "out.tsv", "--triples", tmp_path / "in.tsv") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and what in error
    assert [p.name for p in tmp_path.iterdir()] == ["in.tsv"]


def test_pairs_behind_a_header(place, capsys, tmp_path):
    (tmp_path / "in.tsv").write_text("qid\tpos\tneg\n" + "q1\td7\td10\n" * 2 + "q1\td7\td3\n")
    texts = Texts(str(place / "corpus"))
    pairs = teacher.pairs_of(TripleFile(tmp_path / "in.tsv", texts), texts, False)
    assert pairs == {"q1": {"d7": 0.0, "d10": 0.0, "d3": 0.0}}
    said = capsys.readouterr().err
    assert said.count("in.tsv:1: taken for a header") == 1
    assert said.endswith("in.tsv: 3 distinct pairs of 1 queries\n")


@pytest.mark.parametrize("content, what", [
    ("qid\tpos\tneg\nq1\td7\td10\n" + "words " * 400 + "\td1\td2\n",
     f":3: query {('words ' * 10)!r} is not in .* ids are expected"),
    ("q1\td1\t" + "words " * 400,
     f":1: document {('words ' * 10)!r} is not in .* ids are expected"),
])
def test_texts_in_place_of_ids_are_quoted_short(place, tmp_path, content, what):
    texts = Texts(str(place / "corpus"))
    (tmp_path / "in.tsv").write_text(content)
    with pytest.raises(BadInput, match=what) as e:
        teacher.pairs_of(TripleFile(tmp_path / "in.tsv", texts), texts, False)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_triples_without_their_documents_are_counted(place, monkeypatch, tmp_path, capsys):
    (tmp_path / "in.tsv").write_text("q1\td7\td10\nq1\td7\tnowhere\nq1\tnowhere\td10\n")
    assert ensemble(monkeypatch, place, tmp_path / "o.tsv", "--triples", tmp_path / "in.tsv",
                    "--skip-missing") == 0
    assert len((tmp_path / "o.tsv").read_text().splitlines()) == 1
    said = capsys.readouterr().err
    assert "in.tsv: 2 distinct pairs of 1 queries" in said and "2 triples left out" in said


# ----------------------------------------------------------------------------------- interruptions


def test_interrupted_ensemble_goes_on(place, monkeypatch, tmp_path):
    """Interrupted in the second member's second block: the first member and the whole block are not
    scored again."""
    monkeypatch.setattr(parts.blocks_of, "__defaults__", (60,))
    whole, scored = rerank.PairScorer.__call__, []

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


def test_damaged_scores_of_a_member_are_made_again(place, member_runs, monkeypatch, tmp_path,
                                                   capsys):
    """A digit, a cut, or nothing left: what a member has scored is only taken as it was written."""

    def command():
        return ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run",
                        "--keep-each", members=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "mean_of", full)
        assert command() == 2 and "goes on from what" in capsys.readouterr().err
        first, _ = sorted(tmp_path.glob("t.run.scores-*"))
        for damage in (lambda b: b.replace(b"q3 Q0 d21 ", b"q3 Q0 d22 "), lambda b: b[:-1] + b"x",
                       lambda b: b[:500], lambda b: b"", lambda b: b"\xff" * 99):
            first.write_bytes(damage(first.read_bytes()))
            assert command() == 2
            said = capsys.readouterr().err
            assert f"{first}: damaged and left out, {place / 'model0'} scores anew" in said
            assert f"{place / 'model1'}: scored before" in said
            assert f"{place / 'model0'}: scored before" not in said
    assert command() == 0
    assert [read_run(tmp_path / f"t.member-{i + 1}.run") for i in range(2)] == member_runs[:2]
    assert len(list(tmp_path.iterdir())) == 4


def test_the_disk_full_at_the_end_leaves_a_command_that_goes_on(place, monkeypatch, tmp_path,
                                                                capsys):
    """Whichever of its files cannot be written: OUT is the last, so that it is not taken for
    finished."""
    out = tmp_path / "t.run"

    def command():
        return ensemble(monkeypatch, place, out, "--run", place / "first.run", "--keep-each",
                        members=2)

    for file in ("t.member-2.run", "t.run.json", "t.run"):
        with teaching.full_disk(monkeypatch, file):
            assert command() == 2 and not out.exists()
        assert "give the same command again: it goes on" in capsys.readouterr().err
    assert command() == 0 and out.exists()


def test_two_processes_write_the_same_file(place, monkeypatch, tmp_path):
    """Byte for byte what one process writes."""
    monkeypatch.setattr(parts.blocks_of, "__defaults__", (60,))

    def command(name):
        return ensemble(monkeypatch, place, tmp_path / name, "--run", place / "first.run",
                        members=2)

    assert by_two_processes(lambda: command("two.run")) == [0, 0] and command("one.run") == 0
    assert (tmp_path / "two.run").read_bytes() == (tmp_path / "one.run").read_bytes()


# -------------------------------------------------------------------------------------------- usage


def test_out_is_none_of_the_files_read(place, monkeypatch, tmp_path, capsys):
    source, triples = tmp_path / "in.run", tmp_path / "in.tsv"
    shutil.copy(place / "first.run", source)
    triples.write_text("q1\td7\td10\n")
    (tmp_path / "link.run").symlink_to(source)
    names = ["in.run", "link.run", f"../{tmp_path.name}/in.run"]
    outs = [("--run", source, name) for name in names]
    for command in ("cross-encoder", "listwise", "pointwise"):
        mine = [*outs, ("--triples", triples, "in.tsv")] if command == "cross-encoder" else outs
        for flag, file, out in mine:
            assert run(monkeypatch, teacher, command, "--model", "m", "--dataset",
                       place / "corpus", flag, file, "--out", tmp_path / out, "--overwrite") == 2
            assert f"{tmp_path / out}: is read by this very command" in capsys.readouterr().err
    assert source.read_bytes() == (place / "first.run").read_bytes()


@pytest.mark.parametrize("command, flag, name", [
    ("cross-encoder", "--run", "in.run"), ("listwise", "--run", "in.run"),
    ("pointwise", "--run", "in.run"), ("cross-encoder", "--triples", "in.tsv")])
def test_nothing_to_score(place, monkeypatch, tmp_path, capsys, command, flag, name):
    (tmp_path / "in.run").write_text("q1 Q0 gone 1 2 t\nq2 Q0 lost 1 1 t\n")
    (tmp_path / "in.tsv").write_text("q1\tgone\tlost\n")
    assert run(monkeypatch, teacher, command, "--model", place / "model0", "--dataset",
               place / "corpus", flag, tmp_path / name, "--skip-missing", "--out",
               tmp_path / "o") == 2
    error = f"error: {tmp_path / name}: none of its documents is in dataset"
    assert error in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.run", "in.tsv"]


def test_out_that_exists_and_sources(place, monkeypatch, tmp_path, capsys):
    (tmp_path / "t.run").write_text("mine")
    assert ensemble(monkeypatch, place, tmp_path / "t.run", "--run", place / "first.run") == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "t.run").read_text() == "mine"
    for more in ([], ["--run", place / "first.run", "--first-stage", "bm25"]):
        assert ensemble(monkeypatch, place, tmp_path / "u.run", *more) == 2
        error = capsys.readouterr().err
        assert error == ("error: give one of --run FILE, --first-stage bm25|scoreddocs, "
                         "--triples TSV, --lists JSONL (see --help)\n")
    assert run(monkeypatch, teacher, "pointwise", "--model", "m", "--dataset", "d", "--out",
               tmp_path / "u.run") == 2
    assert capsys.readouterr().err == ("error: give one of --run FILE, --first-stage "
                                       "bm25|scoreddocs, --lists JSONL (see --help)\n")


@pytest.mark.parametrize("command, flag, value", [
    ("listwise", "--depth", 0), ("listwise", "--batch-size", 0), ("listwise", "--concurrency", 0),
    ("listwise", "--retries", -1), ("listwise", "--passage-words", 0),
    ("listwise", "--device", "tpu"), ("listwise", "--model", "no/such"),
    ("listwise", "--endpoint", "host:80"), ("listwise", "--window", 1),
    ("pointwise", "--doc-length", 0), ("pointwise", "--device", "tpu"),
    ("cross-encoder", "--device", "tpu")])
def test_values_that_are_none(place, monkeypatch, tmp_path, capsys, command, flag, value):
    assert run(monkeypatch, teacher, command, "--model", "m", "--dataset", place / "corpus",
               "--run", place / "first.run", "--out", tmp_path / "u.run", flag, value) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(value) in error
    assert not list(tmp_path.iterdir())  # the next try, with other flags, finds nothing begun


@pytest.mark.parametrize("command", ["cross-encoder", "listwise", "pointwise"])
def test_help(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, teacher, command, "--help")
    assert e.value.code == 0 and "--skip-missing" in capsys.readouterr().out
