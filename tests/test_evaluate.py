"""evaluate.py against trec_eval's own expected output, definitions written out here, and scipy."""

import contextlib
import doctest
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import scipy.stats

import evaluate as e
from data.command import guarded
from data.paper import LOSSES
from data.run_names import run_called, short_names
from data.runs import BEIR, QRELS, _read_arrow, _read_lines
from data.significance import bootstrap, compare, holm, paired_t, randomization
from data.tables import Entry, backbone_and_loss, entries, latex

ROOT = Path(e.__file__).parent
DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no SHARED_DATA")


def write_run(path, run, tag="t", score="{!r}"):
    rank = {q: {d: i for i, d in enumerate(sorted(ds, key=ds.get, reverse=True), 1)}
            for q, ds in run.items()}
    lines = [f"{q} Q0 {d} {rank[q][d]} {score.format(s)} {tag}"
             for q, ds in run.items() for d, s in ds.items()]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_qrels(path, qrels):
    path.write_text("".join(f"{q} 0 {d} {r}\n" for q, ds in qrels.items() for d, r in ds.items()))
    return str(path)


def generated(seed, queries=30, documents=60):
    """A run with ties, equal only in single precision too, negative scores, no order; missing and
    unjudged queries."""
    rng = np.random.default_rng(seed)
    qrels, run = {}, {}
    for q in range(queries):
        names = [f"d{i}" for i in rng.permutation(200)]
        if q % 7 != 1:  # without qrels
            grades = rng.integers(-1, 4, 40).tolist()
            qrels[f"q{q}"] = dict(zip(names[:40], grades, strict=True))
            if q % 7 == 2:
                qrels[f"q{q}"] = dict.fromkeys(names[:5], 0)  # nothing relevant
        if q % 7 != 3:  # missing
            found = rng.permutation(names[: 20 + documents])[:documents]
            scores = rng.integers(-8, 8, documents) * 10.0 ** rng.integers(-6, 6)
            scores += rng.choice([0, 1e-13], documents)
            run[f"q{q}"] = {str(d): float(s) for d, s in zip(found, scores, strict=True)}
    run["q0"] = dict(list(run["q0"].items())[:3])  # shorter than any cutoff
    return qrels, run


def definition(measure, judged, documents):
    """A measure of one query from its definition, in float64."""
    name, rel, k = re.fullmatch(r"(\w+)(?:\(rel=(\d)\))?(?:@(\d+))?", measure).groups()
    rel, k = int(rel or 1), int(k) if k else 10**9
    ranked = sorted(documents, key=lambda d: (np.float32(documents[d]), d), reverse=True)
    grades = [max(judged.get(d, 0), 0) for d in ranked]
    hits = [g >= rel for g in grades][:k]
    relevant = sum(g >= rel for g in judged.values())
    if name == "nDCG":
        ideal = sorted((g for g in judged.values() if g > 0), reverse=True)[:k]
        gain = [sum(g / math.log2(i + 2) for i, g in enumerate(gs)) for gs in (grades[:k], ideal)]
        return gain[0] / gain[1] if gain[1] else 0.0
    if name == "RR":
        return next((1 / i for i, hit in enumerate(hits, 1) if hit), 0.0)
    if name == "AP":
        precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        return sum(precisions) / relevant if relevant else 0.0
    if name == "Judged":
        return sum(d in judged for d in ranked[:k]) / min(k, len(ranked)) if ranked else 0.0
    return {
        "R": sum(hits) / relevant if relevant else 0.0,
        "P": sum(hits) / k,
        "Success": float(any(hits)),
    }[name]


MEASURES = ["nDCG@10", "nDCG", "nDCG@1000", "RR", "RR@10", "RR@3", "RR(rel=2)@10", "AP", "AP@20",
            "AP(rel=2)", "AP(rel=3)@5", "R@10", "R(rel=2)@100", "P@5", "P(rel=2)@10", "Success@1",
            "Success(rel=3)@5", "Judged@5", "Judged@100"]


# ----------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("score", ["{!r}", "{:.12e}", "{:+.13f}"])
def test_measures_are_their_definitions(seed, score, tmp_path):
    qrels, run = generated(seed)
    path = write_run(tmp_path / "x.run", run, score=score)
    read = {q: {d: float(score.format(s)) for d, s in ds.items()} for q, ds in run.items()}
    for given in (read, e.read_run(path), e.read_columns(path, e.RUN)):
        values = e.evaluate(qrels, given, MEASURES)
        assert list(values) == list(qrels)
        for q in qrels:
            for m in MEASURES:
                expected = definition(m, qrels[q], read.get(q, {}))
                assert values[q][m] == pytest.approx(expected, abs=1e-12), (q, m)
    assert all(v == 0 for q in qrels if q not in run for v in values[q].values())


@pytest.mark.parametrize("seed", range(3))
def test_cut_down_rankings_equal_whole_ones(seed):
    """The fillers and trims change nothing: every measure of trec_eval against pytrec_eval on the
    run as it is."""
    qrels, run = generated(10 + seed, documents=120)
    every = pytrec_eval.supported_measures - {"runid", "relstring"}
    whole = pytrec_eval.RelevanceEvaluator(qrels, every).evaluate(run)
    names = [m for m in next(iter(whole.values())) if m not in ("P", "runid")]
    ours = e.evaluate(qrels, run, names)
    assert len(names) > 60 and len(whole) > 10
    for q, expected in whole.items():
        for m in names:
            assert ours[q][m] == pytest.approx(expected[m], abs=1e-12), m
    pairs = {"AP": "map", "nDCG": "ndcg", "RR": "recip_rank", "R@100": "recall_100", "P@10": "P_10",
             "nDCG@10": "ndcg_cut_10", "AP@10": "map_cut_10", "Success@5": "success_5"}  # fmt: skip
    ours = e.evaluate(qrels, run, list(pairs))
    for q, expected in whole.items():
        assert ours[q] == pytest.approx({m: expected[t] for m, t in pairs.items()}, abs=1e-12)


@needs_data
def test_trec_evals_own_expected_output():
    folder = DATA / "trec-eval-selftest"
    qrels, run = e.read_qrels(folder / "qrels.test"), e.read_run(folder / "results.test")
    expected = {}
    for line in (folder / "out.test.aq").read_text().splitlines():
        measure, query, value = line.split()
        expected.setdefault(query, {})[measure] = value
    names = []
    for measure in expected["301"]:
        with contextlib.suppress(e.BadInput):
            names.append(e.parse_measure(measure).name)
    per_query = e.evaluate(qrels, run, names)
    wrong, compared = [], 0
    for query, values in [*per_query.items(), ("all", e.mean(per_query))]:
        for m in names:
            compared += 1
            if f"{values[m]:.4f}" != f"{float(expected[query][m]):.4f}":
                wrong.append((query, m, values[m], expected[query][m]))
    # the expected output is of trec_eval 10, which rounds the rank of a recall point where 9, and
    # pytrec_eval, cuts
    rounded = {("301", "iprec_at_recall_0.10"), ("302", "iprec_at_recall_0.60"),
               ("302", "11pt_avg")}
    rounded |= {("all", m) for _, m in rounded}
    assert {(q, m) for q, m, *_ in wrong} == rounded, wrong
    assert set(per_query) == {"301", "302", "303"} and compared == 360
    unknown_to_9 = {"relstring", "rbp", "rbp_resid", "unj_5", "unj_10", "unj_20"}
    assert set(expected["301"]) - set(names) == unknown_to_9


@needs_data
@pytest.mark.parametrize(
    "folder, qrels, run, value",
    [
        ("trec-dl-2019", "test", "bm25.top100", 0.5058),
        ("trec-dl-2019", "test", "bm25-rm3.top100", 0.5216),
        ("trec-dl-2019", "test", "d-bert-kd-tasb.top100", 0.7210),
        ("trec-dl-2019", "test", "open-ai-ada2.top100", 0.7035),
        ("trec-dl-2019", "test", "splade-p-p-ensemble-distil.top100", 0.7308),
        ("trec-dl-2019", "test", "teacher-rankvicuna.bm25.top100", 0.6682),
        ("trec-dl-2021", "test", "bm25.top100", 0.4458),
        ("scifact", "test", "bm25.test.top100", 0.6762),
        ("trec-dl-2020", "test", "bm25.top100", 0.4796),
    ],
)
def test_published_values(folder, qrels, run, value):
    if not (DATA / folder).is_dir():
        pytest.skip(f"no {folder} in SHARED_DATA")
    run = e.read_columns(DATA / folder / "runs" / f"{run}.txt", e.RUN)
    for form in ("trec", "tsv"):
        judged = e.read_qrels(DATA / folder / "qrels" / f"{qrels}.{form}")
        assert round(e.mean(e.evaluate(judged, run, ["nDCG@10"]))["nDCG@10"], 4) == value


def test_ties_fall_to_the_larger_document_id():
    qrels = {"q": {"d3": 1}}
    measures = ["nDCG@10", "RR@10", "RR"]
    first = e.evaluate(qrels, {"q": {"d1": 1.0, "d2": 1.0, "d3": 1.0}}, measures)["q"]
    assert first == dict.fromkeys(measures, 1.0)
    late = e.evaluate(qrels, {"q": {"d3": 1.0, "d4": 1.0, "d5": 1.0}}, measures)["q"]
    assert late == pytest.approx({"nDCG@10": 0.5, "RR@10": 1 / 3, "RR": 1 / 3})
    # equal in single precision, as trec_eval stores scores; ids compare by bytes
    for relevant, ranking in (("a", {"a": 1 + 1e-9, "b": 1.0}),
                              ("z", {"é": 1.0, "z": 1.0, "Z": 1.0})):
        values = e.evaluate({"q": {relevant: 1}}, {"q": ranking}, ["RR"])
        assert values["q"]["RR"] == 0.5


TIES = [
    # (scores of a query's documents, best first; tied neighbours, neighbours in its first 11 ranks)
    ([1.0] * 50, (10, 10)),
    ([3, 3, 2, 2, 2, 1], (3, 5)),
    ([*range(50, 39, -1), *[0] * 30], (0, 10)),  # ties further down
    ([*range(9, -1, -1), 0], (1, 10)),  # across the cutoff
    ([1 + 1e-9, 1, 0], (1, 2)),  # equal in single precision
    ([1e39, 1e38, 1e40], (1, 2)),
    ([7.0], (0, 0)),
]


def test_ties_are_counted_in_the_first_ranks():
    rng = np.random.default_rng(0)
    run = {}
    for i, (scores, _) in enumerate(TIES):
        names = [f"d{j}" for j in rng.permutation(len(scores))]
        pairs = list(zip(names, map(float, scores), strict=True))
        run[f"q{i}"] = {pairs[j][0]: pairs[j][1] for j in rng.permutation(len(pairs))}
        columns = e.Columns.of({"q": run[f"q{i}"]})
        assert e.tied_on_top(columns, e.trec_order(columns)) == TIES[i][1]
    columns = e.Columns.of({"none": {}, **run})
    assert e.tied_on_top(columns, e.trec_order(columns)) == tuple(
        map(sum, zip(*(counts for _, counts in TIES), strict=True)))


@pytest.mark.parametrize("tied, warned", [(10, True), (4, True), (3, False), (0, False)])
def test_runs_whose_ties_make_the_order_are_warned_of(tied, warned, tmp_path, capsys):
    """A third of the neighbours, 9 of them, is not yet too many."""
    scores = [float(-max(j - tied, 0)) for j in range(10)]
    write_run(tmp_path / "x.run", {f"q{i}": {f"d{j}": s for j, s in enumerate(scores)}
                                   for i in range(8)})
    write_qrels(tmp_path / "qrels.txt", {f"q{i}": {"d9": 1} for i in range(8)})
    status, out, err = script(capsys, "--qrels", tmp_path / "qrels.txt", tmp_path / "x.run")
    assert (status, err) == (0, "")
    line = (f"{tmp_path}/x.run: {8 * min(tied, 9)} of the 72 pairs of neighbours in the first 11 "
            "ranks have equal scores: their order is that of the document ids, descending")
    assert (line in out) == ("equal scores" in out) == warned


@needs_data
def test_real_runs_are_not_warned_of():
    files = sorted(DATA.glob("*/runs/*.txt"))
    for file in files:
        said = []
        run = e.read_columns(file, e.RUN, said.append)
        tied, neighbours = e.tied_on_top(run, e.trec_order(run))
        assert 3 * tied <= neighbours and not said, (file, tied, neighbours, said)
    assert len(files) > 3


def test_gains_are_linear():
    qrels, run = {"q": {"a": 1, "b": 3, "c": 0}}, {"q": {"a": 3, "b": 2, "c": 1}}
    value = e.evaluate(qrels, run, ["nDCG@10"])["q"]["nDCG@10"]
    assert value == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)), abs=1e-12)


@pytest.mark.parametrize("name", [
    "nDCG(rel=2)@10", "P", "R", "nDGC@10", "RR@0", "ndcg_cut", "relstring", "runid", "x", "",
    "Recall", "nDCG@99999999999999999999", "R@1000000000", "nDCG@1\u0663", "P_0", "P_05", "P_5,10",
    "P_0.5", "P_5\n", "P_99999999999", "G_5", "ndcg_5", "Rndcg_10", "ndcg_rel_5", "success_0.50",
    "utility_5", "utility_1,0,0,0", "map_5", "set_F_2", "iprec_at_recall_99999999999.00",
    "Rprec_mult_1000000000.00", "all_trec", "prefs",
])
def test_unknown_measures(name):
    """Of these, what has a base that trec_eval knows ends its process or is a KeyError."""
    with pytest.raises(e.BadInput, match="unknown measure"):
        e.evaluate({"q": {"a": 1}}, {"q": {"a": 1.0}}, [name])


def test_measures_have_the_other_names_of_the_field():
    qrels, run = generated(20)
    same = {"Recall@20": "R@20", "recall@20": "R@20", "Recall(rel=2)@20": "R(rel=2)@20",
            "Precision@5": "P@5", "Hit@3": "Success@3", "MRR@10": "RR@10", "MAP": "AP",
            "NDCG@10": "nDCG@10", "ndcg": "nDCG", "P@999999999": "P_999999999",
            "mAP": "AP", "mrr@10": "RR@10", "ndcg@10": "nDCG@10",
            "ndcg_at_10": "nDCG@10", "recall_at_20": "R@20", "MAP_at_5": "AP@5",
            "hit_rate@3": "Success@3", "HitRate@3": "Success@3", "Hits@3": "Success@3",
            "accuracy_at_3": "Success@3", "ndcg_cut_10": "nDCG@10", "ndcg_cut.10": "nDCG@10",
            "recip_rank": "RR", "map": "AP", "recall_20": "R@20", "P_5": "P@5", "P.5": "P@5",
            "success_3": "Success@3", "map_cut.5": "AP@5"}
    for values in e.evaluate(qrels, run, [*same, *same.values()]).values():
        assert all(values[name] == values[known] for name, known in same.items())
    for name in ("Recall", "Precision", "Hit", "HitRate", "hit_rate", "accuracy", "MAP"):
        for cut in ("@5", "_at_5"):
            deep_learning = e.measure_for(name + cut, "msmarco-passage/trec-dl-2019/judged")
            assert deep_learning == f"{name}(rel=2){cut}"
            assert e.parse_measure(deep_learning)[1:3] == (e.parse_measure(name + cut).trec, 2)
            assert e.measure_for(name + cut, "beir/nq") == name + cut
    for name in ("nDCG@5", "ndcg_at_5", "Judged@5", "RR(rel=1)@5", "P_5"):
        assert e.measure_for(name, "msmarco-passage/trec-dl-2019/judged") == name


@pytest.mark.parametrize("name, nearest", [
    ("nDGC@10", "ndcg@10"), ("recal@100", "recall@100"), ("Recall", "recall@10"), ("P", "p@10"),
    ("MRR10", "mrr@10"), ("ndcg_cut", "ndcg_cut_10"), ("map_5", "map@5"), ("Bpref", "bpref"),
    ("R-Prec", "Rprec"), ("nDCG@10,AP", "ndcg@10"), ("good.run", None), ("F1@10", None),
    ("rbp", None), ("", None),
])
def test_unknown_measures_are_told_the_nearest_name(name, nearest):
    with pytest.raises(e.BadInput) as caught:
        e.parse_measure(name)
    hint = re.search("did you mean (.+?)\\?: nDCG@k", str(caught.value))
    assert (hint and hint[1]) == nearest
    if nearest:
        e.parse_measure(nearest)


def test_what_ends_trec_eval_is_kept_from_it():
    """In a process of its own: queries without a grade from 0 on, and without a document, were
    segmentation faults."""
    code = """if True:
        import json, evaluate as e, pytrec_eval
        names = [m for m in pytrec_eval.supported_measures if e.TREC_NAMES.fullmatch(m)]
        names += [f"{m}_5" for m in ("P", "recall", "success", "relative_P", "map_cut")]
        names += ["ndcg_cut_5", "P_999999999", "iprec_at_recall_0.10", "iprec_at_recall_9.99",
                  "Rprec_mult_0.00", "Rprec_mult_9.99"]
        qrels = {"q1": {"a": 3}, "q2": {"a": -2, "b": -2}, "q3": {"a": 1}, "q4": {},
                 "q5": {"a": -2}}
        run = {"q1": {"a": 1.0}, "q2": {"a": 2.0, "c": 1.0}, "q3": {}, "q4": {"a": 1.0},
               "q5": {"z": 1.0}}
        values = e.evaluate(qrels, run, names + ["Judged@2"])
        print(json.dumps([names, values, e.evaluate({}, run), e.mean({})]))
        """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    names, values, *empty = json.loads(done.stdout)
    assert len(names) == 36 - 12 + 11 and empty == [{}, {}]
    assert values["q1"]["ndcg"] == 1
    assert values["q2"]["Judged@2"] == 0.5 and values["q2"]["num_ret"] == 2
    counts = "gm_", "num_", "Judged", "utility"
    for q in ("q2", "q3", "q4", "q5"):
        assert not any(v for m, v in values[q].items() if not m.startswith(counts)), q
        assert values[q]["gm_map"] == pytest.approx(math.log(1e-5))  # as trec_eval -c, not log(1)


@pytest.mark.parametrize("wrong", [10_001, -10_001, 2**31 - 1, 2**32, 2**62, -(2**63), 10**400, 0.5,
                                   math.nan, math.inf, None, "high", [1]])
def test_grades_that_trec_eval_cannot_hold_name_the_query(wrong):
    message = "query 'q2': a grade must be a whole number from -10,000 to 10,000"
    with pytest.raises(e.BadInput, match=message):
        e.evaluate({"q": {"a": 1}, "q2": {"a": wrong}}, {"q": {"a": 1.0}}, ["AP"])


def test_grades_and_scores_of_other_types():
    grades = {"a": True, "b": np.int64(2), "c": 3.0, "d": np.int8(-1), "e": 10_000}
    run = {"q": {d: np.float32(i) for i, d in enumerate(grades)}}
    plain = {d: int(g) for d, g in grades.items()}
    assert e.evaluate({"q": grades}, run) == e.evaluate({"q": plain}, run)
    for odd in ("a\0", "a\nb", "\ud800", 5, None):
        for qrels in ({odd: {"a": 1}}, {"q": {odd: 1}}):
            with pytest.raises(e.BadInput, match="an id text of one line"):
                e.evaluate(qrels, {"q": {"a": 1.0}})
    for ranking in ({"\ud800": 1.0}, {5: 1.0, "a": 2.0}, {"a": {}}, {"a": 10**400}, {"a": "high"}):
        with pytest.raises(e.BadInput, match="scores that are numbers"):
            e.evaluate({"q": {"a": 1}}, {"q": ranking})


def test_scores_that_are_not_finite_name_the_query():
    with pytest.raises(e.BadInput, match="query q2"):
        e.evaluate({"q": {"a": 1}}, {"q": {"a": 1.0}, "q2": {"b": math.nan}})


def test_drop_identical(tmp_path):
    nested = {"a": {"a": 9.0, "b": 2.0}, "b": {"c": 1.0}, "c": {"a": 1.0, "d": 3.0, "c": 2.0}}
    run = e.Columns.of(nested)
    kept, dropped = e.drop_identical(run)
    others = {"a": {"b": 2.0}, "b": {"c": 1.0}, "c": {"a": 1.0, "d": 3.0}}
    assert dropped == 2 and kept.nested() == others
    path = write_run(tmp_path / "x.run", run.nested())
    names = ("beir/quora/test", "nano-beir/quora", "beir/arguana", "nano-beir/arguana",
             "beir/nq", None)
    assert [e.load_run(path, name)[1] for name in names] == [2, 2, 2, 2, 0, 0]


# ------------------------------------------------------------------------------------------ reading

GOOD = "q1 Q0 d1 1 2.5 t\nq2 Q0 d1 1 -1e-3 t\nq1 Q0 d0 2 7 t\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD[:-1],
        GOOD.replace(" ", "\t"),
        GOOD.replace(" ", "  \t "),
        "  " + GOOD,
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\n\n"),
        GOOD.replace("2.5", "+2.5"),
        GOOD.replace(" d", '\t"d').replace('"', ""),
    ],
)
def test_runs_are_read_in_every_customary_form(text, tmp_path):
    path = tmp_path / "x.run"
    path.write_bytes(text.encode())
    run = e.read_run(path)
    assert run == {"q1": {"d1": 2.5, "d0": 7.0}, "q2": {"d1": -0.001}}
    assert list(run) == ["q1", "q2"] and list(run["q1"]) == ["d1", "d0"]
    assert all(type(s) is float for ds in run.values() for s in ds.values())


def test_quotes_and_null_words_are_ordinary_ids(tmp_path):
    text = 'NA Q0 "d" 1 2 t\nnull Q0 nan 1 1 t\n'
    (tmp_path / "x.run").write_text(text)
    assert e.read_run(tmp_path / "x.run") == {"NA": {'"d"': 2.0}, "null": {"nan": 1.0}}


def test_packed_files_are_known_by_their_content(tmp_path):
    import pyarrow as pa

    expected = _read_lines("", GOOD.encode(), e.RUN)
    packed = {
        "a.run.gz": gzip.compress(GOOD.encode()),
        "two.gz": gzip.compress(GOOD[:17].encode()) + gzip.compress(GOOD[17:].encode()),
        "b.run": gzip.compress(GOOD.encode()),
        "c.run.zst": pa.compress(GOOD.encode(), "zstd", asbytes=True),
    }
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
        assert e.read_run(tmp_path / name) == expected
        (tmp_path / "cut").write_bytes(data[: len(data) // 2])
        with pytest.raises(e.BadInput, match="damaged"):
            e.read_run(tmp_path / "cut")


@pytest.mark.parametrize(
    "text, line, what",
    [
        (GOOD + "q1 Q0 d1 3 1 t", 4, "twice"),
        (GOOD + "q3 Q0 d1 1 t\n", 4, "5 columns"),
        ("q3 Q0 d 1 1 my tag\n" + GOOD, 1, "7 columns"),
        (GOOD + "q3 Q0 d1 1 nan t\n", 4, "finite"),
        (GOOD + "q3 Q0 d1 1 -inf t\n", 4, "finite"),
        (GOOD + "q3 Q0 d1 1 high t\n", 4, "not a number"),
        (GOOD + "q3 Q0 d1 1 1_0 t\n", 4, "not a number"),
        (b"q Q0 d\xff 1 1 t\n", 1, "UTF-8"),
        ("", 1, "empty"),
        (" \n\n", 1, "empty"),
    ],
)
def test_wrong_runs_are_refused_with_file_and_line(text, line, what, tmp_path):
    path = tmp_path / "x.run"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(e.BadInput) as caught:
        e.read_run(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archives_or_not_there(tmp_path):
    (tmp_path / "x.run.gz").write_text(GOOD)
    with pytest.raises(e.BadInput, match="x.run.gz:1: named .gz"):
        e.read_run(tmp_path / "x.run.gz")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(e.BadInput, match=str(path)):
            e.read_run(path)


def test_qrels(tmp_path):
    path, expected = tmp_path / "q", {"1": {"a": 2, "b": -1}, "2": {"c": 0}}
    for text in (
        "1 0 a 2\n1 0 b -1\n2 0 c 0\n",
        "1\t0\ta\t2\n1\tQ0\tb\t-1\n2\t0\tc\t0",
        "query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t-1\n2\tc\t0\n",
        "query-id\tcorpus-id\tscore\r\n1\ta\t2\r\n1\tb\t-1\r\n2\tc\t0\r\n",
        "\ufeffquery_id\tcorpus_id\trelevance\n1\ta\t2\n1\tb\t-1\n2\tc\t0\n",
        "\nqid\tdid\trel\n\n1\ta\t2\n1\tb\t-1\n2\tc\t0\n",
        "1\ta\t2\n1\tb\t-1\n2\tc\t0\n",  # no header
        "1\ta \t2.0\n1\tb\t-1.00\n2\tc\t0.0\n",  # as pandas writes them
        "1 0 a 2.0\n1 0 b -1.\n2 0 c 0\n",
        "1\t0\ta 2\n1\t0\tb -1\n2 0\tc\t0\n",
    ):
        path.write_text(text, newline="")
        assert e.read_qrels(path) == expected
    for text, message in (
        ("1 0 a 2\n1 0 a 2\n", "2: document a appears twice"),
        ("1 0 a 1.5\n", "1: `1.5` is not a whole number"),
        (f"1 0 a 1\n1 0 b {2**63}\n", f"2: `{2**63}` is not a whole number"),
        ("1 0 a 10000\n1 0 b 10001\n", "2: `10001` is not a whole number from -10,000 to 10,000"),
        ("1\ta\t1\n1\tb\t-10001\n", "2: `-10001` is not a whole number"),
        ("query-id\tcorpus-id\tscore\n1\ta\t0.5\n", "2: `0.5` is not a whole number"),
        ("1\ta\t0.5\n", "1: `0.5` is not a whole number"),  # no header: its last field is a number
        (f"1 0 a {'9' * 5000}\n", f"1: `{'9' * 40}` is not a whole number"),
        ("1 0 a 0x1F\n", "1: `0x1F` is not a whole number"),
        ("1 0 a\0 1\n", "1: an id that is empty or holds a NUL"),
        ("1 a 1\n", "1: 3 columns"),
        ("query-id\tcorpus-id\tscore\n", "1: there are no judgments"),
        ("query-id\tcorpus-id\tscore\n1\ta\n", "2: 2 columns"),
    ):
        path.write_text(text)
        with pytest.raises(e.BadInput, match=re.escape(message)):
            e.read_qrels(path)


def test_qrels_are_told_apart_by_their_content(folder, capsys):
    """TREC qrels, with blanks or tabs, under the name of a BEIR folder's file."""
    corpus, expected = folder / "trec-dl-2042", e.read_qrels(folder / "qrels.txt")
    assert e.load_qrels(str(corpus)) == expected
    for between in (" ", "\t"):
        text = (folder / "qrels.txt").read_text().replace(" ", between)
        (corpus / "qrels" / "test.tsv").write_text(text)
        assert e.load_qrels(str(corpus)) == expected


def test_scores_that_fall_towards_rank_one_are_said(tmp_path, capsys, monkeypatch):
    def said(score, rank="{rank}", head=""):
        lines = [f"q{q} Q0 d{r} {rank.format(rank=r)} {score(q, r)} t\n" for q in range(9)
                 for r in range(1, 9)]
        (tmp_path / "x.run").write_text(head + "".join(lines))
        e.read_run(tmp_path / "x.run")
        return capsys.readouterr().err

    line = f"{tmp_path}/x.run: scores fall towards rank 1: are they ranks or distances?"
    falling = (lambda q, r: r, lambda q, r: math.sqrt(r) - 9, lambda q, r: r // 2,
               lambda q, r: r if q < 5 else -r)
    for score in falling:
        err = said(score)
        assert err.startswith(line) and "Higher must be better" in err and err.count("\n") == 1
    others = (lambda q, r: -r, lambda q, r: 1, lambda q, r: r * (-1) ** r,
              lambda q, r: r if q < 4 else -r)
    for score in others:
        assert said(score) == ""
    for rank in ("1", "0", "x", "-"):
        assert said(lambda q, r: r, rank) == ""
    assert said(lambda q, r: r, head="z Q0 d 1 1 t\n")
    assert said(lambda q, r: r, head="z Q0 d\t1 1 t\n")
    # only the head of a long file is looked at, and its last line is cut
    long = "".join(f"z Q0 d{i} {i} {i}.25 t\n" for i in range(9000))
    assert said(lambda q, r: -r, head=long).startswith(line)
    monkeypatch.setenv("RANK", "1")
    assert said(lambda q, r: r) == ""


@pytest.mark.parametrize("rank, score, contradicted", [
    (lambda r: r, lambda q, r: r if q == "q3" and r == 9 else -r, ["q3"]),
    (lambda r: 9 - r, lambda q, r: r if q < "q5" else -r, ["q5", "q6", "q7", "q8"]),
    (lambda r: r, lambda q, r: r * (-1) ** r, [f"q{q}" for q in range(9)]),
    (lambda r: r, lambda q, r: r % 9, [f"q{q}" for q in range(9)]),
    (lambda r: r, lambda q, r: -(r // 3), []),  # ties
    (lambda r: r, lambda q, r: 1 + (-1) ** r * 1e-12, []),  # and in single precision
    (lambda r: 0, lambda q, r: r * (-1) ** r, []),  # no ranks
    (lambda r: "-", lambda q, r: r * (-1) ** r, []),
    (lambda r: r, lambda q, r: r, None),  # said of the whole run, on stderr
])
@pytest.mark.parametrize("shuffled", [False, True])
def test_scores_that_contradict_the_ranks_are_warned_of(rank, score, contradicted, shuffled,
                                                        tmp_path, capsys):
    lines = [f"q{q} Q0 d{r} {rank(r)} {score(f'q{q}', r)} t\n" for q in range(9)
             for r in range(1, 10)]
    if shuffled:
        np.random.default_rng(0).shuffle(lines)
    (tmp_path / "x.run").write_text("".join(lines))
    write_qrels(tmp_path / "qrels.txt", {f"q{q}": {"d1": 1} for q in range(9)})
    status, out, err = script(capsys, "--qrels", tmp_path / "qrels.txt", tmp_path / "x.run")
    assert status == 0 and ("scores fall towards rank 1" in err) == (contradicted is None)
    found = re.findall(r"contradict the rank column.* in (\d+) of the 9 queries in its first 64 kB "
                       r"\(e.g. (q\d)\)", out)
    assert len(found) == bool(contradicted) and out.count("contradict the") == len(found)
    for count, query in found:
        assert int(count) == len(contradicted) and query in contradicted
    e.read_run(tmp_path / "x.run")
    assert (capsys.readouterr().err == "") == (contradicted is not None)


ODD_LINES = {
    e.RUN: [
        "q Q0  1 2 t\n", "q Q0 d 1 2 \n", "q  d 1 2 t\n", " Q0 d 1 2 t\n", "q Q0 d 1 2 ",
        "q Q0 d 1 2 t\rq Q0 e 1 2 t\n", "q Q0 d\vx 1 2 t\n", "q Q0 d\f 1 2 t\n", "q Q0 d\0 1 2 t",
        "q Q0 d\u2003 1 2 t\n", "q Q0 \xa0d 1 2 t\n", "q Q0 d\x1c 1 2 t\n", "q Q0 d\x85 1 2 t\n",
        *(f"q Q0 d 1 {score} t\n"
          for score in ("0x1F", "1e400", "NA", "nan", "1_0", "\u0661", "+1", "1.", ".5")),
    ],
    QRELS: [f"q 0 d {grade}\n"
            for grade in ("0x1F", "1.0", "1.5", "10001", "-0", "007", "null", "1e2", "2.")],
    BEIR: ["q \td\t1\n", "q\t d\t1\n", "q\td\t1\r\n", "q\td\t1\t\n", "q\t\t1\n", "\td\t1\n"],
}


@pytest.mark.parametrize(
    "layout, text", [(layout, text) for layout, texts in ODD_LINES.items() for text in texts])
def test_what_both_readers_accept_is_the_same(layout, text):
    try:
        slow = _read_lines("x", text.encode(), layout)
    except e.BadInput:
        slow = None
    fast = _read_arrow(text.encode(), layout)
    assert fast is None or fast.nested() == slow


def test_both_readers_agree(tmp_path):
    _, run = generated(5)
    path = write_run(tmp_path / "x.run", run)
    data = path and Path(path).read_bytes()
    shuffled = data.splitlines(keepends=True)
    np.random.default_rng(0).shuffle(shuffled)
    for text in (data, b"".join(shuffled)):
        fast = _read_arrow(text, e.RUN)
        slow = _read_lines("", text, e.RUN)
        assert fast.nested() == slow and list(fast.qids) == list(slow)
        assert [list(ds) for ds in fast.nested().values()] == [list(ds) for ds in slow.values()]


# ------------------------------------------------------------------------------------- significance


def test_paired_t_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 40))
    expected = scipy.stats.ttest_rel(a, b).pvalue
    assert paired_t([(a - b)[:, None]])[0] == pytest.approx(expected, rel=1e-12)
    # over two datasets: the unpooled sum of two independent means, as Welch's test has it for their
    # difference
    c, d = rng.normal(0.2, 1, 12), rng.normal(0.1, 3, 30)
    welch = scipy.stats.ttest_ind(c, -d, equal_var=False).pvalue
    assert paired_t([c[:, None], d[:, None]])[0] == pytest.approx(welch, rel=1e-12)
    assert paired_t([np.zeros((9, 1))])[0] == 1 and paired_t([np.ones((9, 1))])[0] == 0
    assert paired_t([np.ones((1, 1))])[0] == 1


def test_randomization_counts_sign_patterns():
    rng = np.random.default_rng(1)
    d = rng.normal(0.3, 1, 11)
    d[3] = 0.0
    patterns = (np.arange(1 << 11)[:, None] >> np.arange(11) & 1) * 2 - 1
    exact = (np.abs(patterns @ d) >= abs(d.sum()) - 1e-12).mean()
    p = randomization([np.stack([d, -d, d * 0], 1)], 100_000, seed=3)
    by_chance = 4 * math.sqrt(exact * (1 - exact) / 1e5) + 1e-5
    assert p == pytest.approx([exact, exact, 1.0], abs=by_chance)
    one, same = (randomization([d[:, None]], 1000, seed=3) for _ in range(2))
    assert one == same
    # two datasets of different size: the flips weigh as the mean of means does
    c = np.array([1.5, -1.2, 0.3])
    both = np.concatenate([d / 11, c / 3])
    patterns = (np.arange(1 << 14)[:, None] >> np.arange(14) & 1) * 2 - 1
    exact = (np.abs(patterns @ both) >= abs(both.sum()) - 1e-12).mean()
    assert randomization([d[:, None], c[:, None]], 100_000)[0] == pytest.approx(exact, abs=0.007)
    pooled = (np.abs(patterns @ np.concatenate([d, c])) >= d.sum() + c.sum() - 1e-12).mean()
    assert abs(pooled - exact) > 0.05
    # never 0: the data are one of the patterns
    assert randomization([np.ones((40, 1))], 999)[0] == 1 / 1000


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0] and holm([]).tolist() == []


def test_bootstrap():
    values = np.random.default_rng(2).beta(2, 3, 80)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile",
                                   rng=np.random.default_rng(0))
    expected = theirs.confidence_interval
    assert bootstrap([values]) == pytest.approx(tuple(expected), abs=0.003)
    low, high = bootstrap([values, values + 1])
    narrow = (high - low) / (expected.high - expected.low)
    assert narrow == pytest.approx(math.sqrt(0.5), abs=0.04) and low < values.mean() + 0.5 < high
    assert bootstrap([values], seed=1) == bootstrap([values], seed=1)


@pytest.mark.parametrize("baseline, test", [(None, "t"), ("s0", "t"), (None, "randomization")])
def test_family_wise_error_stays_at_five_percent(baseline, test, tables=2000):
    """Tables of four runs and two measures that differ by chance: at most one in twenty shows any
    difference."""
    rng, errors = np.random.default_rng(0), 0
    for i in range(tables):
        hard = dict(zip("xy", rng.normal(0, 1, (2, 50)), strict=True))
        table = {f"s{s}": {c: [1 / (1 + np.exp(-(hard[c] + rng.normal(0, 1, 50))))] for c in hard}
                 for s in range(4)}
        found = compare(table, baseline, test, permutations=499, seed=i)
        assert len(found) == (6 if baseline else 12)
        errors += any(c.p_holm < 0.05 for c in found)
    assert 0.005 < errors / tables < 0.05 + 2 * math.sqrt(0.05 * 0.95 / tables)


def test_compare_finds_what_is_there_and_leaves_out_what_is_absent():
    rng = np.random.default_rng(0)
    a = rng.random(100)
    table = {
        "a": {"x": [a], "y": None},
        "b": {"x": [a + 0.1 + rng.normal(0, 0.1, 100)], "y": [a]},
        "c": {"x": [a.copy()], "y": [a]},
    }
    found = {(c.first, c.second, c.column): c for c in compare(table)}
    assert set(found) == {("a", "b", "x"), ("a", "c", "x"), ("b", "c", "x"), ("b", "c", "y")}
    assert found["a", "b", "x"].p_holm < 1e-6 and found["a", "b", "x"].difference < 0
    assert found["a", "c", "x"].p == found["b", "c", "y"].p == 1.0
    shown = entries(table, compare(table), None, 4)
    assert (shown["b"]["x"].marks, shown["a"]["x"].marks) == ("ac", "")
    assert shown["a"]["y"].text == "absent"
    corrected = [c._replace(p=0.01, p_holm=0.06) for c in compare(table)]
    unmarked = entries(table, corrected, None, 4)
    assert not any(x.marks for row in unmarked.values() for x in row.values())
    daggers = entries(table, compare(table, "b"), "b", 4)
    assert [row["x"].marks for row in daggers.values()] == ["‡", "", "‡"]


# ------------------------------------------------------------------------- the script and its forms


@pytest.fixture
def folder(tmp_path):
    """qrels, three runs (good, bad and a copy of good) and a BEIR folder of the same queries."""
    rng = np.random.default_rng(0)
    qrels = {f"q{i}": {f"d{j}": int(j < 3) + int(j < 1) for j in range(8)} for i in range(40)}
    runs = {}
    for name, noise in (("good", 0.6), ("bad", 4)):
        runs[name] = {q: {f"d{j}": float(-j + noise * rng.normal()) for j in range(20)}
                      for q in qrels}
    runs["a_copy"] = runs["good"]
    write_qrels(tmp_path / "qrels.txt", qrels)
    for name, run in runs.items():
        write_run(tmp_path / f"{name}.run", run)
    corpus = tmp_path / "trec-dl-2042"
    (corpus / "qrels").mkdir(parents=True)
    texts = [{"_id": f"d{j}", "title": "", "text": f"passage number {j} | with a bar"}
             for j in range(20)]
    (corpus / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    queries = [{"_id": q, "text": f"question {q}"} for q in qrels]
    (corpus / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    rows = [f"{q}\t{d}\t{r}" for q, ds in qrels.items() for d, r in ds.items()]
    (corpus / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    return tmp_path


def script(capsys, *arguments):
    status = guarded(lambda: e.main(list(map(str, arguments))))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_markdown(folder, capsys):
    names = [folder / f"{n}.run" for n in ("good", "bad", "a_copy")]
    status, out, err = script(capsys, "--qrels", folder / "qrels.txt", *names)
    lines = [line for line in out.splitlines() if line.startswith("|")]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert status == 0 and err == "" and len(set(map(len, lines))) == 1
    assert rows[0] == ["run", "nDCG@10", "RR@10", "AP"]
    assert [r[0] for r in rows[2:]] == ["a good", "b bad", "c a_copy"]
    values = e.mean(e.evaluate(e.read_qrels(folder / "qrels.txt"), e.read_run(names[0])))
    for row, marks in zip(rows[2:], ("ᵇ", "", "ᵇ"), strict=True):
        for cell, m in zip(row[1:], rows[0][1:], strict=True):
            assert cell == f"**{values[m]:.4f}**{marks}" if marks else "*" not in cell
    how = "two-sided paired t-test over queries; Holm correction over all 9 comparisons"
    assert how in out and "40 queries" in out


def test_baseline_and_randomization(folder, capsys):
    base = folder / "good.run"
    status, out, _ = script(capsys, "--qrels", folder / "qrels.txt", folder / "bad.run",
                            "--baseline", base, "--test", "randomization", "--measures", "nDCG@10",
                            "--intervals")
    assert status == 0 and re.search(r"bad +\| +0\.\d{4}‡ \[0\.\d{4}, 0\.\d{4}\]", out)
    for text in ("†/‡: better/worse than good", "100,000 permutations", "all 1 comparisons"):
        assert text in out
    status, _, err = script(capsys, "--qrels", folder / "qrels.txt", base, "--baseline", "nobody")
    assert status == 2 and err.startswith("error: --baseline nobody") and err.count("\n") == 1


def test_json_csv_and_per_query_hold_full_precision(folder, capsys):
    runs = [folder / "good.run", folder / "bad.run"]
    per_query = {p.stem: e.evaluate(e.read_qrels(folder / "qrels.txt"), e.read_run(p))
                 for p in runs}
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", *runs, "--format", "json",
                       "--intervals")
    table = json.loads(out)
    for name, values in per_query.items():
        for m, value in e.mean(values).items():
            entry = table["runs"][name][m]
            assert entry["value"] == pytest.approx(value, abs=1e-15)
            low, high = entry["interval"]
            assert low <= value <= high and (low < high or value == 1)
    test = next(t for t in table["tests"] if t["column"] == "AP")
    pairs = [[v["AP"] for v in per_query[n].values()] for n in ("good", "bad")]
    assert test["p"] == pytest.approx(scipy.stats.ttest_rel(*pairs).pvalue, rel=1e-9)
    assert test["significant"]
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", *runs, "--format", "csv")
    rows = [line.split(",") for line in out.splitlines() if not line.startswith("#")]
    assert len(rows) == 7 and float(rows[1][3]) == table["runs"]["good"]["nDCG@10"]["value"]
    tsv = folder / "values.tsv"
    status, out, _ = script(capsys, "--qrels", folder / "qrels.txt", *runs, "--per-query", tsv)
    lines = [line.split("\t") for line in tsv.read_text().splitlines()]
    assert lines[0] == ["run", "dataset", "query", "measure", "value"]
    assert len(lines) == 1 + 2 * 3 * 40 and out.startswith("| run")
    assert all(float(v) == per_query[r][q][m] for r, _, q, m, v in lines[1:])
    before = tsv.read_bytes()
    status, out, err = script(capsys, "--qrels", folder / "qrels.txt", *runs, "--per-query", tsv)
    assert (status, out, tsv.read_bytes()) == (2, "", before) and "--overwrite" in err
    status, _, _ = script(capsys, "--qrels", folder / "qrels.txt", *runs, "--per-query", tsv,
                          "--overwrite")
    assert status == 0
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", *runs, "--per-query")
    assert [line.split("\t") for line in out.splitlines()] == lines


def test_latex(folder, capsys):
    runs = [folder / f"{n}.run" for n in ("good", "bad", "a_copy")]
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", *runs, "--format", "latex",
                       "--measures", "nDCG@10", "P@5")
    for text in (r"\begin{tabular}{lrr}", r"\toprule", r"$^{c}$ a\_copy & \textbf{0.",
                 r"\underline{0.", "$^{b}$", "p $<$ 0.05"):
        assert text in out
    assert r"m & $-$0.1000 \\" in latex("run", {"m": {"AP": Entry(-0.1, "-0.1000")}}, {}, [])
    booktabs = ["kpsewhich", "booktabs.sty"]
    if shutil.which("kpsewhich") and subprocess.run(booktabs, capture_output=True).stdout:
        source = folder / "x.tex"
        source.write_text(r"\documentclass{article}\usepackage{booktabs}\begin{document}" + out
                          + r"\end{document}")
        command = ["pdflatex", "-halt-on-error", "-interaction=batchmode", "-output-directory",
                   folder, source]
        assert subprocess.run(command, capture_output=True).returncode == 0


def test_captions_say_how_and_comments_what_may_be_wrong(folder, capsys):
    run = e.read_run(folder / "good.run")
    del run["q3"]
    write_run(folder / "less.run", run)
    write_run(folder / "lost.run", {q: {"x": 1.0} for q in run})
    arguments = ["--dataset", folder / "trec-dl-2042", folder / "less.run", folder / "lost.run",
                 "--format"]
    missing = f"{folder}/less.run: 1 queries of the qrels are missing and count 0 (q3)."
    nothing = f"{folder}/lost.run: NONE of its documents is judged: are its ids those of the qrels?"
    how = "40 queries", "grades from 2", "two-sided paired t-test"
    _, out, _ = script(capsys, *arguments, "latex")
    caption = next(line for line in out.splitlines() if line.startswith(r"\caption"))
    comments = [line.removeprefix("% ") for line in out.splitlines() if line.startswith("% ")]
    assert all(text in caption for text in how)
    assert "missing" not in caption and "NONE" not in caption
    # and q3 of the other, and the package
    assert {missing, nothing} < set(comments) and len(comments) == 4
    for form in ("markdown", "csv", "json"):
        _, out, _ = script(capsys, *arguments, form)
        notes = [line.removeprefix("# ") for line in out.splitlines()]
        if form == "json":
            notes = json.loads(out)["notes"]
        assert {missing, nothing} < set(notes)
        assert all(any(text in note for note in notes) for text in how)
    # documents that are judged, for other queries
    write_run(folder / "turned.run", {"q0": {"d19": 1.0}, "x": {"d1": 1.0}})
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", folder / "turned.run",
                       folder / "good.run")
    assert "turned.run: NONE of its documents" in out and "good.run: NONE" not in out
    judged = {"q": {"a": 0, "b": -1}}
    write_qrels(folder / "zero.txt", judged)
    write_run(folder / "zero.run", {"q": {"b": 1.0}})
    assert "NONE" not in script(capsys, "--qrels", folder / "zero.txt", folder / "zero.run")[1]


def test_absent_datasets_stay_out_of_captions(suite, capsys):
    arguments = ["--suite", "paper", "--runs", suite / "runs", "--qrels", suite / "judged",
                 "--compare", "paper"]
    _, out, _ = script(capsys, *arguments, "--format", "latex")
    caption = next(line for line in out.splitlines() if line.startswith(r"\caption"))
    comments = " ".join(line for line in out.splitlines() if line.startswith("% "))
    for text in ("dl20 is absent", "mine.run", "absent: without run", "bm25: no row of the paper"):
        assert text in comments and text not in caption
    assert "results whose id is the query's own were dropped" in caption and "paper: " in caption


def test_a_measure_named_twice_is_one_column(folder, capsys):
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", folder / "good.run", "--measures",
                       "AP", "AP")
    qrels, run = e.read_qrels(folder / "qrels.txt"), e.read_run(folder / "good.run")
    value = e.mean(e.evaluate(qrels, run, ["AP"]))["AP"]
    assert f"| good | {value:.4f} |" in out


def test_queries_that_only_one_side_has_are_said(folder, capsys):
    run = e.read_run(folder / "good.run")
    del run["q3"], run["q5"]
    run["extra"] = {"d1": 1.0}
    write_run(folder / "less.run", run)
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", folder / "less.run", "--measures",
                       "Success@20")
    assert "| less |     0.9500 |" in out  # 38 of 40
    assert "2 queries of the qrels are missing and count 0 (q3, q5)" in out
    assert "1 queries are not in the qrels and are left out (extra)" in out
    write_run(folder / "other.run", {"x": {"d1": 1.0}})
    status, out, err = script(capsys, "--qrels", folder / "qrels.txt", folder / "other.run")
    assert status == 2 and "other.run: no query of it is judged" in err and out == ""


def test_seeds_are_averaged_per_query(folder, capsys):
    qrels = e.read_qrels(folder / "qrels.txt")
    (folder / "m-seed1").mkdir()
    (folder / "m-seed2").mkdir()
    for seed, name in ((1, "good"), (2, "bad")):
        shutil.copy(folder / f"{name}.run", folder / f"m-seed{seed}" / "x.run")
        shutil.copy(folder / f"{name}.run", folder / f"f-seed{seed}.run")
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", *folder.glob("m-seed*/x.run"),
                       *folder.glob("f-s*.run"), folder / "bad.run", "--measures", "AP", "--format",
                       "json")
    table = json.loads(out)
    assert set(table["runs"]) == {"x (2 seeds)", "f (2 seeds)", "bad"}
    runs = [e.read_run(folder / f"{n}.run") for n in ("good", "bad")]
    ap = [np.array([v["AP"] for v in e.evaluate(qrels, run, ["AP"]).values()]) for run in runs]
    assert table["runs"]["x (2 seeds)"]["AP"]["value"] == pytest.approx(np.mean(ap), abs=1e-12)
    test = next(t for t in table["tests"] if t["first"].startswith("x") and t["second"] == "bad")
    assert test["p"] == pytest.approx(scipy.stats.ttest_rel(np.mean(ap, 0), ap[1]).pvalue, rel=1e-6)


@pytest.mark.parametrize("names", [
    {"bm25.run": "bm25", "x/bert.run.gz": "bert"},
    {"r/a/x.run.gz": "a", "r/b/x.run.gz": "b", "bm25.run": "bm25", "first/x.run.gz": "first"},
    {"/r/a/x.run": "a", "/r/b/x.run.zst": "b", "./x.run": "./x.run"},
    {"r/a/x.run": "a/x", "r/a/y.run": "a/y", "r/b/x.run": "b/x", "r/b/y.run": "b/y"},
    {"r/a/x.run": "a/x", "r/a/y.run": "y", "r/b/x.run": "b"},  # b's is called x as well
    {"r/a/x.run": "r/a", "s/a/x.run": "s/a", "s/b/x.run": "b"},
    {"r/a/x.run": "r/a/x.run", "r/a/x.run.gz": "r/a/x.run.gz", "r/b.run": "b"},
    {"x.run": "x.run", "a/x.run": "a"},
    {"a.run": "a.run", "r/a/x.run": "r/a", "r/b/x.run": "b"},
    {"/a.run": "/a.run", "r/a.run": "r"},
    {".run": ".run", "r/.run": "r"},
])
def test_runs_are_called_by_the_shortest_part_that_tells_them_apart(names):
    for order in (list(names), list(names)[::-1]):
        assert short_names(order) == names
        groups = e.grouped(order)
        assert groups == {names[path]: [path] for path in order}
        for path, name in names.items():
            assert run_called(path, groups) == run_called(f"./{path}".replace(".//", "/"), groups)
            assert run_called(path, groups) == run_called(name, groups) == name


def test_short_names_and_their_baseline(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    paths = {}
    for model, seed, kind in (("tiny-bce", 1, "bad"), ("tiny-bce", 2, "a_copy"),
                              ("tiny-kl", 1, "good"), ("tiny-kl", 2, "good")):
        paths[model, seed] = Path("runs", f"{model}-seed{seed}", "pydocs-test.run.gz")
        paths[model, seed].parent.mkdir(parents=True)
        data = Path(f"{kind}.run").read_bytes()
        paths[model, seed].write_bytes(gzip.compress(data))
    arguments = ["--qrels", "qrels.txt", *paths.values(), "bad.run", "--measures", "AP", "--format",
                 "json", "--baseline"]
    tables = []
    for baseline in (paths["tiny-bce", 2], f"./{paths['tiny-bce', 1]}", "tiny-bce",
                     "tiny-bce (2 seeds)", "tiny-bce-seed2", folder / "bad.run", "bad", "bad.run"):
        status, out, err = script(capsys, *arguments, baseline)
        assert status == 0, err
        tables.append(json.loads(out))
        assert list(tables[-1]["runs"])[-3:] == ["tiny-bce (2 seeds)", "tiny-kl (2 seeds)", "bad"]
    assert all(table == tables[0] for table in tables[1:5])
    assert {t["first"] for t in tables[0]["tests"]} == {"tiny-kl (2 seeds)", "bad"}
    assert {t["second"] for t in tables[0]["tests"]} == {"tiny-bce (2 seeds)"}
    assert tables[-1] == tables[-2] and {t["second"] for t in tables[-1]["tests"]} == {"bad"}
    status, _, err = script(capsys, *arguments, "pydocs-test")
    assert status == 2 and "not one of the runs: tiny-bce (2 seeds), tiny-kl (2 seeds), bad" in err


def test_binary_measures_on_trec_dl_take_grade_two(folder, capsys):
    corpus, run = folder / "trec-dl-2042", folder / "bad.run"
    _, out, _ = script(capsys, "--dataset", corpus, run, "--measures", "AP", "nDCG@10",
                       "RR(rel=1)@10", "--format", "json")
    table = json.loads(out)
    qrels = e.read_qrels(folder / "qrels.txt")
    expected = e.mean(e.evaluate(qrels, e.read_run(run), ["AP(rel=2)", "nDCG@10", "RR@10", "AP"]))
    assert {m: v["value"] for m, v in table["runs"]["bad"].items()} == pytest.approx(
        {"AP(rel=2)": expected["AP(rel=2)"], "nDCG@10": expected["nDCG@10"],
         "RR(rel=1)@10": expected["RR@10"]})
    assert expected["AP"] != expected["AP(rel=2)"] and "grades from 2" in " ".join(table["notes"])
    # by --qrels the measures are as asked, whatever the file's name
    shutil.copy(folder / "qrels.txt", folder / "trec-dl-2019.txt")
    _, out, _ = script(capsys, "--qrels", folder / "trec-dl-2019.txt", run, "--measures", "AP",
                       "--format", "json")
    assert json.loads(out)["runs"]["bad"]["AP"]["value"] == pytest.approx(expected["AP"])


@pytest.fixture
def suite(folder, monkeypatch):
    """runs/<model>/<dataset>.run of two models, dl19 of two seeds; qrels/ with what they need but
    dl20's."""
    monkeypatch.setenv("IR_DATASETS_DL_TRIES", "1")
    runs, qrels = folder / "runs", folder / "judged"
    qrels.mkdir()
    judged = e.read_qrels(folder / "qrels.txt")
    lotte = [f"lotte-{t}" for t in ("writing", "recreation", "science", "technology", "lifestyle")]
    for name in ("dl19", "scifact", "nq", *lotte):
        write_qrels(qrels / f"{name}.qrels", judged)
    write_qrels(qrels / "arguana.qrels", {"d5": {"d1": 1}})
    for model, kind in (("minilm-infonce-seed1", "good"), ("minilm-infonce-seed2", "bad"),
                        ("bm25", "bad")):
        (runs / model).mkdir(parents=True)
        for dataset in ("dl19", "dl20", "scifact", *lotte[:4]):
            shutil.copy(folder / f"{kind}.run", runs / model / f"{dataset}.run")
        write_run(runs / model / "arguana.run", {"d5": {"d5": 9.0, "d1": 1.0}})
    for model in ("minilm-infonce-seed1", "minilm-infonce-seed2"):
        data = (folder / "good.run").read_bytes()
        (runs / model / "lotte-lifestyle.run.gz").write_bytes(gzip.compress(data))
    shutil.copy(folder / "good.run", runs / "bm25" / "mine.run")
    return folder


def test_suite(suite, capsys):
    arguments = ["--suite", "paper", "--runs", suite / "runs", "--qrels", suite / "judged",
                 "--format", "json"]
    status, out, _ = script(capsys, *arguments)
    table = json.loads(out)
    rows = {n: {c: x["value"] for c, x in row.items()} for n, row in table["runs"].items()}
    text = {n: {c: x["text"] for c, x in row.items()} for n, row in table["runs"].items()}
    assert status == 0 and list(rows) == ["bm25", "minilm-infonce (2 seeds)"]
    assert list(rows["bm25"]) == ["MSM dev", "DL19", "DL20", "BEIR13", "LoTTE-S", "Rob04"]
    qrels = e.read_qrels(suite / "qrels.txt")
    good, bad = (e.mean(e.evaluate(qrels, e.read_run(suite / f"{n}.run"), ["nDCG@10"]))["nDCG@10"]
                 for n in ("good", "bad"))
    model = rows["minilm-infonce (2 seeds)"]
    assert model["DL19"] == pytest.approx((good + bad) / 2)
    assert rows["bm25"]["DL19"] == pytest.approx(bad)
    # the mean of five means
    assert model["LoTTE-S"] == pytest.approx((4 * (good + bad) / 2 + good) / 5)
    assert model["BEIR13"] is None and text["bm25"]["BEIR13"] == "absent (2/13)"
    assert text["bm25"]["LoTTE-S"] == "absent (4/5)"
    assert text["bm25"]["MSM dev"] == text["bm25"]["DL20"] == text["bm25"]["Rob04"] == "absent"
    notes = " ".join(table["notes"])
    assert "dl20 is absent, its 2 runs have no qrels" in notes and "mine.run" in notes
    assert "beir/arguana: 3 results whose id is the query's own were dropped" in notes
    assert "grades from 2" not in notes
    assert {t["column"] for t in table["tests"]} == {"DL19"}
    _, out, _ = script(capsys, *arguments, "--per-dataset", "--measures", "AP", "RR@10")
    first, second = json.loads(out)
    assert (first["title"], second["title"]) == ("AP", "RR@10")
    assert first["runs"]["bm25"]["arguana"]["value"] == 1.0  # the query itself is off the top
    expected = e.mean(e.evaluate(qrels, e.read_run(suite / "bad.run"), ["AP(rel=2)"]))["AP(rel=2)"]
    assert first["runs"]["bm25"]["dl19"]["value"] == pytest.approx(expected)
    assert "grades from 2" in " ".join(first["notes"])


OWN = """\ufeff# the collections of the house
beir/scifact/test   # its own column

./trec-dl-2042/\r
LoTTE: lotte/writing/test/search
LoTTE :lotte/science/test/search
all of it: beir/scifact/test
all of it: ./trec-dl-2042/
trec-dl-2042/test
"""


def test_a_suite_of_ones_own(suite, capsys, monkeypatch):
    """Names with / as - and full names, packed or not; a BEIR folder's own qrels, with or without
    the split; means of columns."""
    monkeypatch.chdir(suite)
    Path("own.txt").write_text(OWN)
    for model, kind in (("bm25", "bad"), ("mine-seed1", "good"), ("mine-seed2", "bad")):
        runs = Path("own", model)
        (runs / "beir/scifact").mkdir(parents=True)
        shutil.copy(f"{kind}.run", runs / "trec-dl-2042.run")
        shutil.copy(f"{kind}.run", runs / "beir/scifact/test.run")
        data = Path("a_copy.run").read_bytes()
        (runs / "trec-dl-2042-test.run.gz").write_bytes(gzip.compress(data))
        (runs / "lotte-writing-test-search.run.gz").write_bytes(gzip.compress(data))
    judged = e.read_qrels("qrels.txt")
    for name in ("beir-scifact-test.qrels", "lotte-writing-test-search.txt"):
        write_qrels(suite / "judged" / name, judged)
    write_qrels(suite / "judged" / "trec-dl-2042-test.5.qrels", {"q0": {"d9": 1}})  # another's
    arguments = ["--suite", "own.txt", "--runs", "own", "--qrels", "judged", "--format", "json",
                 "--digits", 6]
    status, out, err = script(capsys, *arguments, "--measures", "AP")
    assert (status, err) == (0, "")
    table = json.loads(out)
    cells = {n: {c: x["text"] for c, x in row.items()} for n, row in table["runs"].items()}
    values = {(n, m): e.mean(e.evaluate(judged, e.read_run(f"{n}.run"), [m]))[m]
              for n in ("good", "bad") for m in ("AP", "AP(rel=2)")}
    bad, both = ({m: v for (n, m), v in values.items() if n == "bad"},
                 {m: (values["good", m] + values["bad", m]) / 2 for m in ("AP", "AP(rel=2)")})
    assert list(cells) == ["bm25", "mine (2 seeds)"]
    for row, known in zip(cells.values(), (bad, both), strict=True):
        assert row == {
            "beir-scifact-test": f"{known['AP']:.6f}",
            "trec-dl-2042": f"{known['AP(rel=2)']:.6f}",
            "LoTTE": "absent (1/2)",
            "all of it": f"{(known['AP'] + known['AP(rel=2)']) / 2:.6f}",
            "trec-dl-2042-test": f"{values['good', 'AP(rel=2)']:.6f}",
        }
    notes = " ".join(table["notes"])
    assert "grades from 2" in notes and "left out" not in notes
    status, out, _ = script(capsys, *arguments, "--per-dataset", "--baseline", "own/mine-seed2")
    rows = json.loads(out)["runs"]
    assert list(rows["bm25"]) == ["beir-scifact-test", "trec-dl-2042", "lotte-writing-test-search",
                                  "lotte-science-test-search", "trec-dl-2042-test"]
    assert rows["bm25"]["beir-scifact-test"]["marks"] == "‡"


@pytest.mark.parametrize("text, what", [
    (b"nq\nnq fiqa\n", "2: `nq fiqa`: a line is a dataset, or `column: dataset`"),
    (b"mean:\n", "1: `mean:`"), (b": nq\n", "1: `: nq`"), (b"a: b: c\n", "1: `a: b: c`"),
    (b"/\n", "1: `/`"), (b"nq\n\0\n", "2: `\0`"),
    (b"nq\n# x\nnq\n", "3: nq stands in nq twice"),
    (b"m: a/b\nm: a/b\n", "2: a/b stands in m twice"),
    (b"a/b\nm: a-b\n", "2: the run files of a-b would have the name of a/b's, a-b.run"),
    (b"nq\nn\xffq\n", "2: not UTF-8"), (b"", "1: no dataset in it"), (b"# nq\n\n", "1: no"),
])
def test_bad_lines_of_a_suite_are_named(text, what, suite, capsys, monkeypatch):
    monkeypatch.chdir(suite)
    Path("own.txt").write_bytes(text)
    status, out, err = script(capsys, "--suite", "own.txt", "--runs", "runs", "--plot", "x.svg")
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: own.txt:{what}")
    assert not Path("x.svg").exists()


def test_compare_with_the_paper(suite, capsys):
    arguments = ["--suite", "paper", "--runs", suite / "runs", "--qrels", suite / "judged",
                 "--compare", "paper"]
    shutil.copytree(suite / "runs/bm25", suite / "runs/minilm-mse")  # a loss that it has not
    status, out, _ = script(capsys, *arguments)
    lines = [[c.strip() for c in line.split("|")] for line in out.splitlines() if "|" in line]
    rows = {name: cells for _, name, *cells, _ in lines}
    paper = rows["minilm-infonce (2 seeds): paper, MiniLM-L12 (33M) InfoNCE"]
    assert paper == ["0.469", "0.758", "0.737", "0.500", "0.521", "0.489"]
    ours = float(re.sub(r"[^\d.]", "", rows["b minilm-infonce (2 seeds)"][1]))
    gaps = rows["minilm-infonce (2 seeds): ours - paper"]
    assert gaps[0] == "" and float(gaps[1]) == pytest.approx(ours - 0.758, abs=1.1e-4)
    assert "bm25: no row of the paper" in out and "minilm-mse: no row of the paper" in out
    assert status == 0 and not any(name.startswith("minilm-mse:") for name in rows)


@pytest.mark.parametrize("name, pair", [
    ("bert-mse", ("bert", "mse")),
    ("bert-marginmse (3 seeds)", ("bert", "marginmse")),
    ("my-bert-mse", ("my-bert", "mse")),
    ("bert-ADR-MSE", None),
    ("bert-margin-mse", None),
])
def test_the_backbone_and_loss_of_a_name(name, pair):
    assert backbone_and_loss(name) == pair


def test_the_papers_table_is_whole():
    data = json.loads((ROOT / "results" / "paper-ndcg10.json").read_text())
    means = {loss: np.mean([r["values"] for r in data["rows"] if r["loss"] == loss], 0)
             for loss in LOSSES[:6]}
    assert len(data["rows"]) == 54 and list(e.SUITES["paper"]) == data["columns"]
    assert means["infonce"] == pytest.approx([0.456, 0.732, 0.718, 0.484, 0.525, 0.452], abs=6e-4)
    assert means["bce"] == pytest.approx([0.396, 0.629, 0.622, 0.413, 0.459, 0.331], abs=6e-4)
    assert len(e.SUITES["paper"]["BEIR13"]) == len(e.SUITES["nanobeir"]["NanoBEIR"]) == 13


@pytest.mark.parametrize(
    "arguments, what",
    [
        ([], "give RUN files"),
        (["good.run"], "--dataset or --qrels"),
        (["--qrels", "none.txt", "good.run"], "none.txt"),
        (["--qrels", "qrels.txt", "none.run"], "none.run"),
        (["--qrels", "qrels.txt", "--measures", "AP", "good.run"], "RUN files"),
        (["--qrels", "qrels.txt", "good.run", "--frmat", "x"], "unrecognized"),
        (["--qrels", "qrels.txt", "good.run", "--measures", "num_ret"], "not a mean"),
        (["--dataset", "no/such/thing", "good.run"], "no/such/thing"),
        (["--dataset", "runs", "good.run"], "runs"),
        (["--suite", "paper", "--runs", "nowhere"], "nowhere"),
        (["--suite", "nanobeir"], "--suite"),
        (["--suite", "papers", "--runs", "runs"],
         "--suite papers: neither paper nor nanobeir nor a file of datasets"),
        (["--suite", "qrels.txt", "--runs", "runs"], "qrels.txt:1: `q0 0 d0 2`: a line is a"),
        (["--suite", "qrels.txt", "--runs", "runs", "--compare", "paper"], "--compare"),
        (["--suite", "qrels.txt", "--runs", "runs", "--per-query", "qrels.txt", "--overwrite"],
         "reads it"),
        (["--qrels", "qrels.txt", "good.run", "--digits", "-1"], "--digits"),
        (["--qrels", "qrels.txt", "good.run", "--digits", str(2**31)], "--digits"),
        (["--qrels", "qrels.txt", "good.run", "--measures", "a\nb"], "unknown measure `a b`"),
        (["--qrels", "loop.txt", "good.run"], "loop.txt"),
        (["--qrels", "qrels.txt", "good.run", "--seed", "-1", "--intervals"], "--seed"),
        (["--qrels", "qrels.txt", "--diff", "good.run", "bad.run", "--top", "0"], "--top"),
        (["--qrels", "qrels.txt", "--diff", "good.run", "bad.run", "--plot", "x.png"], "--plot"),
        (["--qrels", "qrels.txt", "good.run", "--per-query", "nowhere/x.tsv"], "folder nowhere"),
        (["--qrels", "qrels.txt", "good.run", "--compare", "paper"], "--compare"),
        (["--qrels", "qrels.txt", "good.run", "bad.run", "a_copy.run", "--plot", "x.png",
          "--plot-kind", "difference"], "two runs"),
        (["--qrels", "qrels.txt", *(f"m{i}.run" for i in range(9)), "--plot", "x.png"],
         "bars is legible up to 8 runs, not 9"),
        (["--qrels", "qrels.txt", "good.run", "--plot", "x.png", "--plot-kind", "heatmap"],
         "BACKBONE-LOSS"),
        (["--qrels", "qrels.txt", "good.run", "--plot", "x.png", "--plot-kind", "latency"],
         "RUN.json"),
        (["--qrels", "qrels.txt", "good.run", "--plot", "x.jpg"], "x.jpg: name it .png, .pdf or"),
        (["--qrels", "qrels.txt", "good.run", "--plot", "x"], "x: name it .png, .pdf or .svg"),
        # before any work
        (["--qrels", "none.txt", "none.run", "--plot", ".png"], ".png: name it .png"),
    ],
)
def test_bad_usage_is_one_line_and_status_two(arguments, what, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("IR_DATASETS_HOME", str(folder / "irds"))
    (folder / "loop.txt").symlink_to("loop.txt")
    for i in range(9):
        (folder / f"m{i}.run").symlink_to("bad.run")
    status, out, err = script(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and what in err
    assert not (folder / "x.png").exists()


@pytest.mark.parametrize("arguments", [
    ["--qrels", "qrels.txt", "good.run", "--per-query", "./good.run"],
    ["--qrels", "qrels.txt", "good.run", "--per-query", "qrels.txt"],
    ["--qrels", "qrels.txt", "bad.run", "--per-query", "good.run", "--baseline", "good.run"],
    ["--qrels", "qrels.txt", "good.run", "--per-query", "good.run.json"],
    ["--qrels", "qrels.txt", "good.run", "--per-query", "link.txt"],
    ["--dataset", "trec-dl-2042", "good.run", "--per-query", "trec-dl-2042/qrels/test.tsv"],
    ["--dataset", "trec-dl-2042/test", "good.run", "--per-query", "trec-dl-2042/qrels/test.tsv"],
    ["--suite", "paper", "--runs", "runs", "--qrels", "judged",
     "--per-query", "runs/bm25/dl19.run"],
    ["--suite", "paper", "--runs", "runs", "--qrels", "judged", "--per-query", "judged/dl19.qrels"],
    ["--qrels", "qrels.txt", "good.run", "--per-query", "new.png", "--plot", "./new.png"],
])
def test_no_output_takes_the_place_of_an_input_or_another(arguments, suite, capsys, monkeypatch):
    monkeypatch.chdir(suite)
    (suite / "good.run.json").write_text('{"seconds": 1, "pairs": 2}')
    (suite / "link.txt").symlink_to("good.run")
    before = {p: p.read_bytes() for p in suite.rglob("*") if p.is_file()}
    status, out, err = script(capsys, *arguments, "--overwrite")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "reads it, or writes it already: choose another" in err
    assert {p: p.read_bytes() for p in suite.rglob("*") if p.is_file()} == before


def test_outputs_are_whole_and_processes_do_not_meet(folder, capsys, monkeypatch):
    command = "--qrels", folder / "qrels.txt", folder / "good.run", "--per-query", folder / "x.tsv"
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(a).name), replace(a, b)))
    assert script(capsys, *command)[0] == 0 and moved == [f"x.tsv.{os.getpid()}.tmp"]
    before = (folder / "x.tsv").read_bytes()

    def no_space(part, path):
        raise OSError(28, "No space left", str(part))

    monkeypatch.setattr(os, "replace", no_space)
    status, _, err = script(capsys, *command, "--overwrite")
    assert status == 2 and "No space left" in err and (folder / "x.tsv").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


DAMAGED_RUN_JSON = [
    *(f'{{"seconds": {seconds}, "pairs": 9}}'
      for seconds in ("0", "-1", "NaN", "Infinity", "1e300", "1e-300", "null")),
    *(f'{{"seconds": 1, "pairs": {pairs}}}'
      for pairs in ("0", "-9", "NaN", "Infinity", "[9]", "9" * 5000, 10**400, "")),
    '{"seconds": -1, "pairs": -9}', f'{{"seconds": {10**400}, "pairs": 1}}', '{"seconds": 1}',
    '{"seconds": 1, "pa', "[1]", "null", "", "\0", "\xff", "[" * 100_000, '{"a":' * 100_000,
]


@pytest.mark.parametrize("content", DAMAGED_RUN_JSON, ids=range(len(DAMAGED_RUN_JSON)))
def test_damaged_run_json_is_one_line(content, tmp_path):
    (tmp_path / "x.run.json").write_text(content, encoding="latin-1")
    with pytest.raises(e.BadInput, match=re.escape(f"{tmp_path}/x.run.json:1: not rerank.py's")):
        e.Judge([]).time("x", tmp_path / "x.run.json")


def test_run_json_of_seeds_adds_up(tmp_path):
    (tmp_path / "x.run.json").write_text('{"seconds": 1.5, "pairs": 10, "model": "m"}')
    judge = e.Judge([])
    judge.time("x", tmp_path / "x.run.json")
    judge.time("x", tmp_path / "x.run.json")
    assert judge.timing == {"x": (3.0, 20)}


def test_pictures_are_what_their_name_says(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, start in (("x.pdf", b"%PDF"), ("x.svg", b"<?xml"), ("x.PNG", b"\x89PNG")):
        made = []
        for date in (1, 2):
            monkeypatch.setenv("SOURCE_DATE_EPOCH", f"{date}00000")
            command = ["--qrels", folder / "qrels.txt", folder / "good.run", "--plot",
                       folder / name, "--overwrite"]
            assert script(capsys, *command)[0] == 0
            made.append((folder / name).read_bytes())
        assert made[0].startswith(start) and made[0] == made[1] and b"CreationDate" not in made[0]
        assert b"<dc:date>" not in made[0]


def test_pictures(folder, capsys):
    pytest.importorskip("matplotlib")
    for name, seconds in (("good", 10.0), ("bad", 1.0)):
        (folder / f"{name}.run.json").write_text(json.dumps({"seconds": seconds, "pairs": 800}))
        for loss in ("bce", "infonce"):
            shutil.copy(folder / f"{name}.run", folder / f"{name}-{loss}.run")
    pair = [folder / "good.run", folder / "bad.run"]
    grid = [folder / f"{b}-{x}.run" for b in ("good", "bad") for x in ("bce", "infonce")]
    for kind, runs in {"bars": pair, "difference": pair, "latency": pair, "heatmap": grid}.items():
        png = folder / f"{kind}.png"
        command = ["--qrels", folder / "qrels.txt", *runs, "--plot", png, "--plot-kind", kind]
        status, out, err = script(capsys, *command)
        assert kind == "difference" or err == ""
        assert status == 0, err
        assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
        assert out.startswith("| run") and script(capsys, *command)[0] == 2
        again = png.read_bytes()
        assert script(capsys, *command, "--overwrite")[0] == 0 and png.read_bytes() == again


def test_pictures_say_what_is_absent_and_stay_legible():
    """What stands in the figures: the cells' text and its colour on the map, `absent` where a bar
    would be."""
    pytest.importorskip("matplotlib")
    from data import pictures

    half = [np.full(9, 0.5)]
    table = {"bert-bce": {"x": half, "y": half}, "bert-infonce": {"x": half, "y": None}}
    axes = pictures.heatmap(table).axes
    cells = [[(t.get_text(), t.get_color()) for t in axis.texts] for axis in axes]
    # equal: the darkest
    assert cells == [[(".500", "white")] * 2, [(".500", "white"), ("absent", "black")]]
    (axis,) = pictures.bars(table, seed=0).axes
    assert [(t.get_text(), round(t.get_position()[0], 9)) for t in axis.texts] == [("absent", 1.2)]
    assert axis.get_xlim() == (-0.5, 1.5)


CELLS = [
    {"minilm-bce (3 seeds)": ("minilm", "bce"), "ettin-17m-kl": ("ettin-17m", "kl"), "bm25": None,
     "minilm-bce-extra": None, "modernbert-large-kl": ("modernbert-large", "kl")},
    # how the lists were drawn tells rows apart, the dataset unless it is everyone's
    {"pydocs-tiny-bce (2 seeds)": ("tiny", "bce"), "pydocs-tiny-hinge-docs": ("tiny-docs", "hinge"),
     "pydocs-tiny-bce-shared": ("tiny-shared", "bce"), "pydocs-test": None,
     "pydocs-modernbert-kl-shared-docs (2 seeds)": ("modernbert-shared-docs", "kl")},
    {"msmarco-passage-train-bert-bce": ("msmarco-passage-train-bert", "bce"),
     "pydocs-bert-bce": ("pydocs-bert", "bce")},
    {"scifact-all-minilm-l6-v2-kl": ("scifact-all-minilm-l6-v2", "kl"),
     "scifact-bert-kl": ("scifact-bert", "kl")},
    {f"corpora-mine-bert-{loss} (3 seeds)": ("bert", loss) for loss in LOSSES},
    {"a\nb-docs": None},
]


@pytest.mark.parametrize("cells", CELLS, ids=range(len(CELLS)))
def test_cells_of_the_map_are_known_by_name(cells):
    pytest.importorskip("matplotlib")
    from data import pictures

    assert pictures.cells_of(cells) == {name: cell for name, cell in cells.items() if cell}


@pytest.mark.parametrize("name", ["{b}-{l}-seed{s}", "msmarco-passage-train-{b}-{l}-seed{s}"])
@pytest.mark.parametrize("by_suite", [False, True])
def test_heat_maps_of_the_loops_folders(name, by_suite, folder, capsys, monkeypatch):
    """Cells are the means over seeds; the first stage has the same file name and is left out."""
    pytest.importorskip("matplotlib")
    from data import pictures

    monkeypatch.chdir(folder)
    kinds = {"minilm": ("good", "good"), "modernbert-large": ("good", "bad")}
    runs = [Path("first", "dl19.run")]
    for b, (first, second) in kinds.items():
        for loss in ("infonce", "bce"):
            runs += [Path("runs", name.format(b=b, l=loss, s=s), "dl19.run") for s in (1, 2)]
            for run, kind in zip(runs[-2:], (first, second), strict=True):
                run.parent.mkdir(parents=True)
                shutil.copy(f"{kind}.run", run)
    Path("first").mkdir()
    shutil.copy("bad.run", "first/dl19.run")
    Path("judged").mkdir()
    shutil.copy("qrels.txt", "judged/dl19.qrels")
    maps, draw = [], pictures.heatmap
    monkeypatch.setattr(pictures, "heatmap", lambda table: maps.append(draw(table)) or maps[-1])
    where = ["--suite", "paper", "--runs", "runs", "--qrels", "judged"]
    if not by_suite:
        where = ["--qrels", "qrels.txt", *runs, "--measures", "nDCG@10"]
    status, _, err = script(capsys, *where, "--plot", "x.png", "--plot-kind", "heatmap")
    assert status == 0 and err == ("" if by_suite else
                                   "not in the picture, not named BACKBONE-LOSS: first\n")
    (axis,) = maps[0].axes
    rows, columns = ([label.get_text() for label in labels()]
                     for labels in (axis.get_yticklabels, axis.get_xticklabels))
    assert (rows, columns) == (["minilm", "modernbert-large"], ["bce", "infonce"])
    qrels = e.read_qrels("qrels.txt")
    good, bad = (e.mean(e.evaluate(qrels, e.read_run(f"{n}.run"), ["nDCG@10"]))["nDCG@10"]
                 for n in ("good", "bad"))
    rows = [f"{value:.3f}".removeprefix("0") for value in (good, (good + bad) / 2)]
    assert [text.get_text() for text in axis.texts] == [rows[0], rows[0], rows[1], rows[1]]


def test_pictures_leave_the_process_as_it_is(folder, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    command = ["--qrels", folder / "qrels.txt", folder / "good.run", "--plot", folder / "x.svg"]
    assert script(capsys, *command)[0] == 0
    assert dict(matplotlib.rcParams) == before


def test_no_picture_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "data.pictures", raising=False)
    monkeypatch.delattr(sys.modules["data"], "pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["--qrels", folder / "qrels.txt", folder / "good.run", "--plot", folder / "x.svg"]
    assert script(capsys, *command) == (
        2, "", "error: --plot needs matplotlib: pip install matplotlib\n")


@pytest.mark.parametrize("kind, dataset, status", [
    ("heatmap", "nq", 2), ("difference", "nq", 2), ("bars", "nq", 0), ("difference", "dl19", 0),
    ("heatmap", "dl19", 0),
])
def test_pictures_of_columns_that_are_absent(kind, dataset, status, folder, capsys):
    pytest.importorskip("matplotlib")
    for model in ("good", "bad"):
        (folder / "runs" / f"{model}-bce").mkdir(parents=True)
        shutil.copy(folder / f"{model}.run", folder / "runs" / f"{model}-bce" / f"{dataset}.run")
    (folder / "judged").mkdir()
    shutil.copy(folder / "qrels.txt", folder / "judged" / f"{dataset}.qrels")
    found, _, err = script(capsys, "--suite", "paper", "--runs", folder / "runs", "--qrels",
                           folder / "judged", "--plot", folder / "x.svg", "--plot-kind", kind)
    assert (found, err.count("\n")) == (status, status // 2), err


def test_diff_shows_the_passages_that_moved(folder, capsys):
    status, out, err = script(capsys, "--dataset", folder / "trec-dl-2042", "--diff",
                              folder / "good.run", folder / "bad.run", "--top", 3)
    assert status == 0, err
    qrels = e.read_qrels(folder / "qrels.txt")
    runs = [e.read_run(folder / f"{n}.run") for n in ("good", "bad")]
    a, b = (e.evaluate(qrels, run, ["nDCG@10"]) for run in runs)
    change = {q: b[q]["nDCG@10"] - a[q]["nDCG@10"] for q in qrels}
    shown = re.findall(r"^## (\S+) question \1$", out, re.MULTILINE)
    assert shown == sorted(change, key=lambda q: (-abs(change[q]), q))[:3]
    assert f"B - A {change[shown[0]]:+.4f}" in out
    line = r"^\| +(\d+) \| +(\d+) \| +(\S+) \| (d\d+) passage number (\d+) \\\| with a bar \|$"
    rows = re.findall(line, out.split("\n## ")[1], re.MULTILINE)
    rankings = [run[shown[0]] for run in runs]
    ranks = [{d: i for i, d in enumerate(sorted(r, key=r.get, reverse=True), 1)} for r in rankings]
    moved = [(ranks[0][d], ranks[1][d], d) for d in ranks[0]
             if ranks[0][d] != ranks[1][d] and min(r[d] for r in ranks) <= 10]
    assert [(int(x), int(y), d) for x, y, _, d, _ in rows] == sorted(moved, key=lambda row: row[1])
    for _, _, grade, d, number in rows:
        assert grade == str(qrels[shown[0]].get(d, "-")) and d == f"d{number}"
    _, out, _ = script(capsys, "--qrels", folder / "qrels.txt", "--diff", folder / "good.run",
                       folder / "a_copy.run")
    assert "B higher 0, lower 0" in out and "##" not in out


def test_works_with_data_beside_it_alone(folder):
    copy = folder / "copy"
    copy.mkdir()
    shutil.copy(ROOT / "evaluate.py", copy)
    shutil.copytree(ROOT / "data", copy / "data", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)

    # as a module it is used without the packages that make pictures, read texts or run models
    code = """if True:
        import sys
        for name in ("torch", "transformers", "triton", "matplotlib", "ir_datasets", "scipy"):
            sys.modules[name] = None
        from evaluate import evaluate, markdown_table, mean, read_qrels, read_run
        values = evaluate(read_qrels(sys.argv[1]), read_run(sys.argv[2]), ["RR@10"])
        print(mean(values)["RR@10"], markdown_table({"good": values}), sep="\\n")
        """
    done = call("-c", code, folder / "qrels.txt", folder / "good.run")
    assert done.returncode == 0 and "\n| good |" in done.stdout, done.stderr
    done = call("evaluate.py", "--dataset", folder / "trec-dl-2042", folder / "good.run")
    assert done.returncode == 0 and "RR(rel=2)@10" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("module", ["runs", "significance"])
def test_modules_that_work_copied_alone(module, folder):
    """An error of runs.py is a ValueError then: BadInput is the command's."""
    copy = folder / "copy"
    copy.mkdir()
    shutil.copy(ROOT / "data" / f"{module}.py", copy)
    code = {
        "runs": """if True:
            import runs
            run = runs.read_run("../good.run")
            runs.write_run("again.run.gz", run)
            assert runs.BadInput is ValueError and runs.read_run("again.run.gz") == run
            try:
                runs.read_qrels("../good.run")
            except ValueError as e:
                print(e)
            """,
        "significance": """if True:
            import numpy, significance
            table = {"a": {"x": [numpy.ones(4)]}, "b": {"x": [numpy.zeros(4)]}}
            print(significance.compare(table)[0].p)
            """,
    }[module]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True,
                          env=environment)
    said = {"runs": "../good.run:1: 6 columns, a TREC qrels has 4: `qid 0 docno relevance`\n",
            "significance": "0.0\n"}[module]
    assert (done.returncode, done.stdout) == (0, said), done.stderr


@pytest.mark.parametrize("function", [e.judged_ranks, e.trec_order, e.tied_on_top, short_names])
def test_examples_in_docstrings_hold(function):
    names = dict(function.__globals__)
    (example,) = doctest.DocTestFinder().find(function, function.__name__, globs=names)
    found = doctest.DocTestRunner().run(example)
    assert found.attempted and not found.failed


def test_a_reader_that_has_seen_enough_ends_it_quietly(folder):
    command = [sys.executable, ROOT / "evaluate.py", "--qrels", folder / "qrels.txt",
               folder / "good.run"]
    command += ["--per-query", "--measures", *(f"P@{k}" for k in range(1, 60))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"run\tdataset\tquery\tmeasure\tvalue\n"
    process.stdout.close()  # with more to come than a pipe holds
    assert (process.wait(60), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_ctrl_c_is_one_line_and_status_130(folder):
    os.mkfifo(folder / "pipe")
    command = [sys.executable, ROOT / "evaluate.py", "--qrels", folder / "pipe",
               folder / "good.run"]
    # as a shell starts it, whatever the test runner made of the signal
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with open(folder / "pipe", "wb"):  # opens when the other side reads
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"interrupted\n")
    assert process.returncode == 130


@needs_data
def test_ir_datasets_id(folder):
    home = folder / "irds"
    shutil.copytree(DATA / "ir_datasets_home", home)
    subprocess.run(["chmod", "-R", "u+w", home], check=True)
    run = DATA / "scifact" / "runs" / "bm25.test.top100.txt"
    command = [sys.executable, ROOT / "evaluate.py", "--dataset", "beir/scifact/test", run]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "IR_DATASETS_HOME": str(home)})
    assert done.returncode == 0 and "| bm25.test.top100 |  0.6762 |" in done.stdout, done.stderr


def test_markdown_table_for_other_scripts():
    results = {"BM25": {"1": {"AP": 0.5}, "2": {"AP": 0.25}},
               "model": {"2": {"AP": 1.0}, "1": {"AP": 0.5}}}
    assert e.markdown_table(results) == ("| run   |         AP |\n"
                                         "| ---   |       ---: |\n"
                                         "| BM25  |     0.3750 |\n"
                                         "| model | **0.7500** |")
    assert "all 1 comparisons" in e.markdown_table(results, ["AP"], baseline="BM25", test="t")
