"""data/lists.py: what a training list holds, and batch k as a pure function of seed and k."""

import numpy as np
import pytest

import train
import training
from data.command import BadInput
from data.first_stages import candidates
from data.lists import FROM_TEACHER, Lists, Triples, permuted
from data.runs import Columns
from data.texts import Texts
from kernels import losses
from training import batches, run_main

place = pytest.fixture(scope="module")(training.make_place)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 1000, 4097])
def test_permuted_is_a_permutation_drawn_by_the_seed(n):
    index = np.arange(n)
    got = permuted(index, n, 7)
    assert sorted(got) == list(range(n))
    one_by_one = [permuted(index[i : i + 1], n, 7) for i in range(n)]
    assert np.array_equal(got, np.concatenate(one_by_one))
    if n >= 64:
        assert not np.array_equal(got, permuted(index, n, 8))
        assert np.mean(np.abs(np.diff(got)) == 1) < 0.2  # neighbours do not stay together


def test_permuted_is_uniform_in_the_first_place():
    first = np.array([permuted(np.zeros(1, np.int64), 8, seed)[0] for seed in range(4000)])
    counts = np.bincount(first, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-square, 7 degrees: P < 0.0001


# ----------------------------------------------------------------------------------------- triples


def test_triples_are_lists_of_two_with_the_targets_of_the_loss(place):
    source = Triples(place / "triples.tsv", "bce")
    assert len(source) == 50
    assert source.item(49, None) == ("q9", ["d9", "d4"], [1.0, 0.0])
    scored = Triples(place / "scored.tsv", "marginmse")
    assert scored.item(3, None) == ("q3", ["d3", "d42"], [0.75, -3.0])
    assert Triples(place / "scored.tsv", "mse").item(3, None) == scored.item(3, None)
    assert Triples(place / "scored.tsv", "hinge").item(3, None)[2] == [1.0, 0.0]


def test_three_columns_have_no_teacher(place):
    with pytest.raises(BadInput, match="three columns"):
        Triples(place / "triples.tsv", "marginmse")


@pytest.mark.parametrize("loss", ["marginmse", "hinge"])
def test_a_score_that_is_no_finite_number_is_named_with_its_line(tmp_path, place, loss):
    file = tmp_path / "t.tsv"
    for score in ("nan", "1e39", "x"):
        # and no newline at the end
        file.write_text(f"1.0\t2.0\tq1\td1\td2\n1.0\t{score}\tq1\td1\td2")
        source = Triples(file, loss)
        expected = [1.0, 2.0] if loss == "marginmse" else [1.0, 0.0]
        assert len(source) == 2 and source.item(0, None)[2] == expected
        with pytest.raises(BadInput, match=r"t.tsv:2: scores '1.0' '" + score):
            source.item(1, None)


def test_triples_that_teach_nothing_are_left_out_and_lines_keep_their_numbers(
        tmp_path, place, capsys):
    """Of another split, or tied where RankNet reads the teacher's order; behind a header."""
    header = "pos_score\tneg_score\tqid\tpos\tneg\n"
    lines = ["1\t1\tq0\td0\td5\n",  # tied
             "2\t1\tq8\td8\td5\n",  # a query of dev
             "2\t1\tq1\td1\td5\n",
             "2\tnan\tq2\td2\td5\n"]
    texts, file = Texts(str(place / "corpus"), split="train"), tmp_path / "t.tsv"
    file.write_text(header + "".join(lines[:3]))
    source = Triples(file, "ranknet", texts)
    assert len(source) == 1 and source.item(0, None) == ("q1", ["d1", "d5"], [2.0, 1.0])
    assert source.where(0) == f"{file}:4"
    said = capsys.readouterr().err
    assert f"{file}:1: taken for a header" in said
    assert "1 of 3 triples left out: the teacher's scores tie" in said
    assert "1 of 3 triples left out: their query is of another split" in said
    assert len(Triples(file, "hinge", texts)) == 2
    file.write_text(header + "".join(lines))
    with pytest.raises(BadInput, match=r"t.tsv:5: scores '2' 'nan'"):
        Triples(file, "ranknet", texts)
    file.write_text(header + lines[0])
    with pytest.raises(BadInput, match="no triple can be trained on"):
        Triples(file, "ranknet", texts)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("line, what", [
    (b"nobody\td1\td2\n", "t.tsv:2: query 'nobody'"),
    (b"q1\td1\tgone\n", "t.tsv:2: document 'gone'"),
    (b"q1\td\xff\td2\n", "t.tsv:2: not UTF-8"),
])
def test_a_bad_triple_is_named_whoever_reads_it(place, tmp_path, capsys, monkeypatch, workers,
                                                line, what):
    """Also from a worker process, whose exceptions torch would print with a traceback."""
    (tmp_path / "t.tsv").write_bytes(b"q1\td1\td2\n" + line)
    flags = {"out": tmp_path / "out", "steps": 3, "triples": tmp_path / "t.tsv",
             "workers": workers, "eval-dataset": "none", "batch-size": 2}
    assert run_main(monkeypatch, train, *training.words_of(place, **flags)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and what in last


# ------------------------------------------------------------------------------------------- lists


def lists(place, loss="infonce", size=5, **how):
    """(Lists of the teacher's run, the run, the texts)."""
    texts = Texts(str(place / "corpus"), split="train")
    run = candidates(texts, place / "teacher.run", None, 100)
    return Lists(run, texts, loss, size, **how), run.nested(), texts


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
    assert len(run) == 20 and {source.run.qids[i] for i in source.queries} == set(texts.qrels)
    qid, docids, targets = source.item(0, 0)
    assert dict(zip(docids, targets, strict=True)) == pytest.approx(run[qid])
    few, _, _ = lists(place, "kl", 3)
    drawn = [few.item(0, seed)[1] for seed in range(30)]
    assert {len(docids) for docids in drawn} == {3}
    assert set().union(*drawn) == set(run[qid])


def test_marginmse_lists_start_with_the_relevant_document(place):
    source, run, texts = lists(place, "marginmse", 4)
    for i in range(len(source)):
        qid, docids, targets = source.item(i, i)
        relevant = [d for d in docids if texts.qrels.get(qid, {}).get(d, 0) > 0]
        assert docids[0] == relevant[0] if relevant else targets[0] == max(targets)
        assert targets == pytest.approx([run[qid][d] for d in docids])


@pytest.mark.parametrize("loss, scores, ranks", [
    ("mse", [3, 2, 1], True),
    ("mse", [9, 5, 3], True),  # of a list with gaps
    ("mse", [3, 2, 2], False),  # grades
    ("mse", [3, 2, 1.5], False),
    ("adrmse", [3, 2, 1], False),
])
def test_mse_is_told_of_ranks_in_place_of_logits(place, capsys, loss, scores, ranks):
    run = {"q1": {"d1": 2, "d3": 1}, "q2": dict(zip(["d2", "d4", "d5"], scores, strict=True))}
    source = Lists(Columns.of(run), Texts(str(place / "corpus"), split="train"), loss, 8)
    assert len(source) == 2
    assert capsys.readouterr().err.count("depth - rank + 1") == ranks


@pytest.mark.parametrize("loss, kept, why", [
    ("mse", ["q1", "q2"], "no candidate"),
    ("kl", ["q2"], "fewer than two candidates"),
])
def test_a_candidate_alone_teaches_a_pointwise_student(place, capsys, loss, kept, why):
    run = Columns.of({"q0": {}, "q1": {"d1": 0.5}, "q2": {"d2": 1.5, "d4": -1.0}})
    source = Lists(run, Texts(str(place / "corpus"), split="train"), loss, 8)
    assert [source.item(i, 0)[0] for i in range(len(source))] == kept
    assert f"{3 - len(kept)} of 3 queries left out: {why}" in capsys.readouterr().err
    if loss == "mse":
        assert source.item(0, 0) == ("q1", ["d1"], [0.5])


def test_shared_lists_are_the_same_for_every_loss(place):
    drawn = {}
    for loss in losses.LOSSES:
        source, run, _ = lists(place, loss, 4, shared=True)
        items = [source.item(i, i) for i in range(len(source))]
        drawn[loss] = [(qid, docids) for qid, docids, _ in items]
        for qid, docids, targets in items:
            scores = [run[qid][d] for d in docids]
            expected = scores if loss in FROM_TEACHER else [1.0, 0.0, 0.0, 0.0]
            assert targets == pytest.approx(expected)
    assert all(items == drawn["bce"] for items in drawn.values())


def test_max_teacher_margin_leaves_out_likely_false_negatives(place, capsys):
    source, run, texts = lists(place, max_margin=0.5)
    assert "negatives left out, scored above their positive minus 0.5" in capsys.readouterr().err
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


# ----------------------------------------------------------------------------------------- batches


def test_batch_k_is_a_pure_function_of_seed_and_k(place):
    made, _, _ = batches(place)
    again, _, _ = batches(place)
    later = [again.ids(k) for k in (9, 3, 5)]
    assert [made.ids(k) for k in (3, 5, 9)] == [later[1], later[2], later[0]]
    assert made.ids(0) != batches(place, seed=2)[0].ids(0)
    seen = [row for k in range(4) for row, *_ in made.ids(k)]  # 16 queries, 4 a step: one pass
    assert sorted(seen) == list(range(16))
    # another order in the next pass
    assert [row for k in range(4, 8) for row, *_ in made.ids(k)] != seen


def test_a_batch_is_padded_to_its_longest_list(place):
    made, _, _ = batches(place, loss="kl", lists=place / "teacher.run", **{"list-size": 12})
    batch, items = made[1], made.ids(1)
    assert batch.targets.dtype == np.float32 and len(set(batch.lengths.tolist())) > 1
    assert batch.targets.shape == (4, batch.lengths.max())
    for row, length, (_, _, _, targets) in zip(batch.targets, batch.lengths, items, strict=True):
        assert row[:length].tolist() == np.float32(targets).tolist() and not row[length:].any()


def test_ranks_share_a_batch(place):
    whole = batches(place)[0][2]
    parts = [batches(place, rank, 3)[0][2] for rank in range(3)]
    places = whole.place.tolist()
    assert sorted(np.concatenate([part.place for part in parts]).tolist()) == places
    for part in parts:
        assert part.qids == whole.qids and np.array_equal(part.targets, whole.targets)
        assert np.array_equal(part.lengths, whole.lengths)
        for where, query, document in zip(part.place, part.queries, part.documents, strict=True):
            i = places.index(where)
            assert np.array_equal(query, whole.queries[i])
            assert np.array_equal(document, whole.documents[i])


def test_worker_processes_make_the_same_batches(place):
    made, _, _ = batches(place)
    for k, batch in zip(range(2, 8), made.loader(2, 8, 2), strict=True):
        own = made[k]
        assert batch.qids == own.qids and np.array_equal(batch.targets, own.targets)
        assert all(map(np.array_equal, batch.documents, own.documents))
        assert all(map(np.array_equal, batch.queries, own.queries))
        assert len(batch.queries) == len(own.queries) == len(batch.documents) == 32
