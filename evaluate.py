"""Judges runs: measures under trec_eval's rules, significance, the tables and pictures of a paper.

    python evaluate.py --dataset my-corpus/ bm25.run model.run     a folder in BEIR layout
    python evaluate.py --dataset beir/scifact/test model.run       an ir_datasets id
    python evaluate.py --qrels qrels.txt bm25.run model.run --baseline bm25.run \\
        --measures nDCG@10 "AP(rel=2)" R@100
    python evaluate.py --suite paper --runs FOLDER --compare paper
                                                                   FOLDER/<model>/<dataset>.run
    python evaluate.py --suite datasets.txt --runs FOLDER          a file of datasets, one a line
    python evaluate.py --dataset my-corpus/ --diff bm25.run model.run
                                                                   the queries that differ most

Rules: ties by document id descending, the rank column ignored, linear gains, a query without a
ranking counts 0, RR@k cuts at k first. Needs data/ beside it, and nothing of models.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from data import command

if __name__ == "__main__":
    command.quiet_imports()
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.command import BadInput, Parser, at_least
from data.paper import SUITES
from data.run_names import grouped, run_called, text_of
from data.runs import (
    GRADE,
    RUN,
    Columns,
    grade,
    read_bytes,
    read_columns,
    read_qrels,
    read_run,  # noqa: F401  what judges runs is where a user looks for it
    trec_order,
)
from data.significance import compare
from data.suites import columns_of, datasets_of, load_suite, qrels_of, runs_of
from data.tables import (
    LETTERS,
    add_paper,
    as_csv,
    as_json,
    entries,
    latex,
    letters_of,
    markdown,
    what_was_tested,
)
from data.texts import Texts, load_qrels

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "AP")


# ---------------------------------------------------------------------------------------- measures
# pytrec_eval computes every value; a run is only cut down first to what its values depend on. It is
# imported where it computes: train.py imports this file, and its --help comes without it.


class Measure(NamedTuple):
    name: str  # as the user wrote it: the key of the results
    trec: str  # as trec_eval calls it in its results
    rel: int  # the lowest grade that counts as relevant, for measures that are binary
    cut: int | None  # the documents below this rank are taken off the run first
    trim: bool  # unjudged documents at the end of the run cannot change the value
    judged: bool  # counts judged documents in place of relevant ones


IR_MEASURES = re.compile(r"([A-Za-z_]+)(?:\(rel=([1-9])\))?(?:(?:@|_at_)([1-9][0-9]{0,8}))?")
FAMILIES = {  # ir_measures' name: trec_eval's without and with a cutoff
    "ndcg": ("ndcg", "ndcg_cut"),
    **dict.fromkeys(("ap", "map"), ("map", "map_cut")),
    **dict.fromkeys(("rr", "mrr"), ("recip_rank", "recip_rank")),
    **dict.fromkeys(("p", "precision", "judged"), (None, "P")),
    **dict.fromkeys(("r", "recall"), (None, "recall")),
    **dict.fromkeys(("success", "hit", "hits", "hitrate", "hit_rate", "accuracy"),
                    (None, "success")),
}
GRADED = ("ndcg", "judged")  # no grade parts what is relevant to them from what is not
# its own; others, or these with and without what belongs behind them, can end the process
TREC_NAMES = re.compile(
    r"11pt_avg|G|Rndcg|Rprec|binG|bpref|gm_bpref|gm_map|infAP|map|ndcg|ndcg_rel|recip_rank|utility"
    r"|num_(nonrel_judged_ret|q|rel|rel_ret|ret)|set_(F|P|map|recall|relative_P)"
    r"|(P|recall|success|relative_P|map_cut|ndcg_cut)_[1-9][0-9]{0,8}"
    r"|(iprec_at_recall|Rprec_mult)_[0-9]\.[0-9][0-9]"
)


def parse_measure(name):
    """Measure of an ir_measures name (nDCG@10, AP(rel=2), RR(rel=2)@10; MTEB's ndcg_at_10) or of
    trec_eval's own (bpref, P_5, P.5). Raises BadInput for any other."""
    if match := IR_MEASURES.fullmatch(name):
        family, rel, cut = match[1].lower(), match[2], match[3]
        without_cut, with_cut = FAMILIES.get(family, (None, None))
        trec = with_cut if cut else without_cut
        if trec and not (rel and family in GRADED):
            if cut and trec != "recip_rank":  # of which trec_eval knows no cutoff
                trec = f"{trec}_{cut}"
            cut = int(cut) if cut else None
            return Measure(name, trec, int(rel or 1), cut, cut is None, family == "judged")
    trec = re.sub(r"(?<=[A-Za-z])\.(?=[0-9]+$)", "_", name)  # what it prints as P_5 is -m P.5
    if TREC_NAMES.fullmatch(trec):
        return Measure(name, trec, rel=1, cut=None, trim=False, judged=False)
    raise BadInput(
        f"unknown measure `{name}`{nearest_measure(name)}: nDCG@k nDCG RR@k RR AP@k AP P@k R@k "
        "Success@k Judged@k, where relevance is binary with a grade, AP(rel=2) RR(rel=2)@10, or "
        "trec_eval's own, bpref P_5; k < 10^9; RUN files go before --measures")


def nearest_measure(name):
    """`, did you mean ndcg@10?` of what is nearly a measure's name; else nothing."""
    k = (re.findall(r"(?<![0-9])[1-9][0-9]{0,8}(?![0-9])", name) or ["10"])[-1]
    known = ["bpref", "infAP", "Rprec", "recip_rank"]
    known += [f"{trec}_{k}" for trec in ("P", "recall", "success", "map_cut", "ndcg_cut")]
    known += [family for family, (without_cut, _) in FAMILIES.items() if without_cut]
    known += [f"{family}@{k}" for family in FAMILIES]
    by_lower = {written.lower(): written for written in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    if name.lower() in FAMILIES:  # P, which looks more like AP than like P@10
        near = [f"{name.lower()}@{k}"]
    return f", did you mean {by_lower[near[0]]}?" if near else ""


def judged_ranks(qrels, run, order):
    """Where the judged documents stand: {qid: (documents returned, [(rank, docid), ...])} of the
    queries that the qrels and the run have, ranks rising from 0. `order` is trec_order(run).

    >>> qrels = {"q1": {"b": 1, "c": 0}, "q2": {"a": 1}, "q3": {"a": 1}}
    >>> run = Columns.of({"q1": {"a": 0.9, "b": 0.2, "c": 0.7}, "q2": {"b": 0.5}})
    >>> judged_ranks(qrels, run, trec_order(run))
    {'q1': (3, [(1, 'c'), (2, 'b')]), 'q2': (1, [])}
    """
    found = {}
    for qid, returned in zip(run.qids, np.diff(run.starts).tolist(), strict=True):
        if returned and qid in qrels:
            found[qid] = returned, []
    # Few of a run's documents are judged for any query. Arrow finds these, and only their ids
    # become Python's strings: a run may have millions of lines.
    judged = pa.array({d for documents in qrels.values() for d in documents}, pa.large_string())
    may_count = pc.is_in(run.docids, value_set=judged).to_numpy(zero_copy_only=False)
    places = np.flatnonzero(may_count[order])  # of the order; a query's begin where its rows do
    queries = np.searchsorted(run.starts, places, side="right") - 1
    ranks = places - run.starts[queries]
    docids = run.docids.take(pa.array(order[places])).to_pylist()
    for query, rank, docid in zip(queries.tolist(), ranks.tolist(), docids, strict=True):
        qid = run.qids[query]
        if docid in qrels.get(qid, ()):
            found[qid][1].append((rank, docid))
    return found


def rankings(ranks, cut, trim):
    """judged_ranks() as the runs pytrec_eval takes, in parts: the rankings of all queries at once
    would fill the memory. The value of the measure is the whole run's, the building much faster.

    A document without judgment matters only by the rank it takes, so a filler stands for it (no id
    read from a line holds a newline). The scores are the ranks: no ties are left to break.
    """
    deepest = max((returned for returned, _ in ranks.values()), default=0)
    fillers = [f"\n{rank}" for rank in range(deepest)]
    scores = [-float(rank) for rank in range(deepest)]
    qids = list(ranks)
    for start in range(0, len(qids), 256):
        part = {}
        for qid in qids[start : start + 256]:
            returned, judged = ranks[qid]
            depth = min(returned, cut or returned)
            if trim:
                last = judged[-1][0] if judged else 0
                depth = min(depth, last + 1)
            docids = fillers[:depth]
            for rank, docid in judged:
                if rank < depth:
                    docids[rank] = docid
            part[qid] = dict(zip(docids, scores, strict=False))
        yield part


def checked_qrels(qrels):
    """The qrels as trec_eval can hold them, or BadInput: its C code takes anything else for what it
    is not."""
    held = {}
    for q, documents in qrels.items():
        try:
            held[q] = {d: grade(g) for d, g in documents.items()}
            if re.search("[\0\n\ud800-\udfff]", "".join([q, *documents])):
                raise ValueError("no id of a text file")
        except (TypeError, ValueError, OverflowError):
            raise BadInput(f"qrels of query {q!r}: a grade must be a {GRADE}, an id text of one "
                           "line") from None
        if max(held[q].values(), default=0) < 0:
            # its table of grades starts at 0, and it reads on where that is empty
            held[q]["\n"] = 0
    return held


def checked_run(run):
    """The run as Columns, or BadInput where a score is not finite or something else than text and
    numbers is in it."""
    try:
        columns = run if isinstance(run, Columns) else Columns.of(run)
        infinite = np.flatnonzero(~np.isfinite(columns.values.astype(float)))
    except (TypeError, ValueError, OverflowError):  # Arrow's and Unicode's errors are of these
        raise BadInput("the run must be {qid: {docid: score}}, ids of text and scores that are "
                       "numbers") from None
    if len(infinite):
        query = columns.qids[columns.query_of_rows()[infinite[0]]]
        raise BadInput(f"the run has scores that are not finite, e.g. for query {query}: check the "
                       "model")
    return columns


def evaluate(qrels, run, measures=DEFAULT_MEASURES, order=None):
    """{qid: {measure: value}} for every query of the qrels, equal to trec_eval's; a query the run
    lacks has 0.0.

    qrels {qid: {docid: int}}, run {qid: {docid: float}} (or read_columns' Columns), measures by
    ir_measures' names. RR@k cuts the run at rank k first, as MS MARCO does; nDCG has linear gains;
    Judged@k divides by the smaller of k and the number of documents returned; gm_* are logarithms,
    at least of 0.00001. order: trec_order(run), where it is known. BadInput: what it cannot hold.
    """
    parsed = [parse_measure(m) for m in measures]
    qrels = checked_qrels(qrels)
    run = checked_run(run)
    ranks = judged_ranks(qrels, run, trec_order(run) if order is None else order)
    unranked = {m.name: math.log(1e-5) if m.trec.startswith("gm_") else 0.0 for m in parsed}
    values = {q: dict(unranked) for q in qrels}
    together = {}  # what takes the same part of the run and counts the same in it
    for m in parsed:
        together.setdefault((m.rel, m.cut, m.trim, m.judged), []).append(m)
    for group in together.values():
        for q, found in values_of_group(qrels, ranks, group):
            values[q].update(found)
    return values


def values_of_group(qrels, ranks, group):
    """Pairs (qid, {measure: value}) of measures that differ in their names alone."""
    import pytrec_eval

    rel, cut, trim, judged = group[0][2:]
    if judged:
        qrels = {q: dict.fromkeys(documents, 1) for q, documents in qrels.items()}
    wanted = {re.sub(r"_(?=[0-9.]+$)", ".", m.trec) for m in group}  # ndcg_cut.10 is ndcg_cut_10
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, wanted, relevance_level=rel)
    for part in rankings(ranks, cut, trim):
        for q, result in evaluator.evaluate(part).items():
            scale = 1.0
            if judged:  # P@k divides by k, though fewer were returned
                scale = cut / min(cut, ranks[q][0])
            yield q, {m.name: result[m.trec] * scale for m in group}


def mean(per_query):
    """{measure: value over all queries} of evaluate()'s result: the mean, for num_* and gm_* what
    trec_eval prints."""
    import pytrec_eval

    rows = list(per_query.values())
    if not rows:
        return {}
    total = pytrec_eval.compute_aggregated_measure
    return {m: float(total(m, [row[m] for row in rows])) for m in rows[0]}


# ------------------------------------------------------------------------------------------ tables
# Per-query values become a table through data/significance.py (means, intervals, paired tests) and
# data/tables.py (what is shown, and in which form).


def markdown_table(results, measures=None, baseline=None, test=None, digits=4):
    """Markdown table of {name: evaluate()'s result}: a row per name, a column per measure, the best
    in bold.

    With test="t" or "randomization" also marks of significance, against `baseline` or between all
    pairs.
    """
    first = next(iter(results.values()))
    queries = list(first)
    measures = list(measures or first[queries[0]])
    table = {name: {} for name in results}
    for name, per_query in results.items():
        for measure in measures:
            table[name][measure] = [np.array([per_query[q][measure] for q in queries])]
    comparisons = compare(table, baseline, test) if test and len(table) > 1 else []
    notes = [what_was_tested(table, comparisons, baseline, test)] if comparisons else []
    shown = entries(table, comparisons, baseline, digits)
    return markdown("run", shown, letters_of(table, comparisons, baseline), notes)


# ---------------------------------------------------------------------------------- runs and suites


def is_one_of(dataset, names):
    """Whether a dataset has one of these names (a pattern), by the end of its id or path; None
    (qrels from a file) has none."""
    path = Path(dataset or "-")
    if path.exists():
        path = path.resolve()
    return bool(re.search(rf"\b({names})\b", "/".join(path.parts[-2:])))


def measure_for(measure, dataset):
    """The measure as the field has it on a dataset: on TREC-DL grade 1 is not relevant to a binary
    measure."""
    match = IR_MEASURES.fullmatch(measure)
    binary = match and not match[2] and match[1].lower() in FAMILIES.keys() - set(GRADED)
    if binary and is_one_of(dataset, r"trec-dl-(?:20\d\d|hard)"):
        return f"{match[1]}(rel=2){measure[match.end(1) :]}"
    return measure


def load_run(path, dataset, warn=None):
    """(Columns of a run, documents dropped): on ArguAna and Quora those that are their own query,
    as BEIR does. `warn` is told where scores contradict ranks."""
    run = read_columns(path, RUN, warn)
    return drop_identical(run) if is_one_of(dataset, "arguana|quora") else (run, 0)


def drop_identical(run):
    """(Columns without the documents whose id is the query's, how many they were): BEIR's rule."""
    qids = pa.array(run.qids, pa.large_string()).take(pa.array(run.query_of_rows()))
    own = pc.equal(run.docids, qids).to_numpy(zero_copy_only=False)
    keep = np.flatnonzero(~own)
    return run.take(keep, np.searchsorted(keep, run.starts)), len(own) - len(keep)


TOP = 10  # ties further down move little of what is measured


def tied_on_top(run, order):
    """(neighbours with equal scores, neighbours), of the TOP + 1 first ranks of every query; order
    is trec_order(run).

    >>> run = Columns.of({"q1": {"a": 0.5, "b": 0.9, "c": 0.5}, "q2": {"a": 1.0}})
    >>> tied_on_top(run, trec_order(run))
    (1, 2)
    """
    above = run.starts[:-1, None] + np.arange(TOP)  # [queries, TOP] places in the order
    above = above[above + 1 < run.starts[1:, None]]
    with np.errstate(over="ignore"):  # in single precision, as trec_eval keeps scores
        upper, lower = (run.values[order[at]].astype(np.float32) for at in (above, above + 1))
    return int((upper == lower).sum()), len(above)


class Judge:
    """Evaluates runs and keeps what tables and pictures need.

    Attributes:
        files: {run: [its path, or a path per seed]}, as grouped() gives them.
        values: {run: {dataset: {measure: array over queries}}}, measures as they were asked for.
        queries: {dataset: [qid]}.
        actual: {dataset: [the measures as they were computed]}, see measure_for.
        timing: {run: (seconds, pairs)} from the RUN.json that rerank.py leaves.
        notes: how it was judged, as a caption says.
        warnings: what may be wrong.
    """

    def __init__(self, measures):
        self.measures = measures
        self.files = {}
        self.values = {}
        self.queries = {}
        self.actual = {}
        self.timing = {}
        self.notes = []
        self.warnings = []

    def add(self, name, qrels, files, dataset=None):
        """files {run: [path of each seed]}: values are means over the seeds, per query.

        `dataset`, the name if it is known, brings its customs: grades from 2 on TREC-DL, identical
        ids dropped.
        """
        self.queries[name] = list(qrels)
        self.actual[name] = [measure_for(m, dataset) for m in self.measures]
        if self.actual[name] != self.measures:
            self.notes.append(
                f"{name}: binary measures take grades from 2 as relevant, as TREC-DL does.")
        dropped = 0
        for run_name, paths in files.items():
            means = {m: np.zeros(len(qrels)) for m in self.measures}
            for path in paths:
                run, own = load_run(path, dataset, self.warnings.append)
                dropped += own
                order = trec_order(run)
                found = evaluate(qrels, run, self.actual[name], order)
                self.count(path, run, order, qrels, found)
                for asked, actual in zip(self.measures, self.actual[name], strict=True):
                    means[asked] += np.array([found[q][actual] for q in qrels]) / len(paths)
                if os.path.exists(f"{path}.json"):
                    self.time(run_name, f"{path}.json")
            self.values.setdefault(run_name, {})[name] = means
        if dropped:
            self.notes.append(f"{name}: {dropped:,} results whose id is the query's own were "
                              "dropped, as BEIR does.")

    def time(self, run_name, path):
        """Adds the seconds and pairs that rerank.py noted beside a run."""
        try:
            spent = json.loads(read_bytes(path))
            seconds, pairs = float(spent["seconds"]), int(spent["pairs"])
            if not (0 < pairs < 1e15 and 1e-9 < seconds / pairs < 1e9):
                raise ValueError("nothing that took time")
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            raise BadInput(
                f'{path}:1: not rerank.py\'s {{"seconds": ..., "pairs": ...}}, above 0: remove it'
            ) from None
        seconds_before, pairs_before = self.timing.get(run_name, (0.0, 0))
        self.timing[run_name] = seconds_before + seconds, pairs_before + pairs

    def count(self, path, run, order, qrels, found):
        """Warns of the queries that only the run or only the qrels have, of scores that leave the
        order to the ids, and of a run without a judged document."""
        here = set(run.qids)
        missing = [q for q in qrels if q not in here]
        extra = [q for q in run.qids if q not in qrels]
        if len(missing) == len(qrels):
            raise BadInput(
                f"{path}: no query of it is judged in the qrels: is it a run on this dataset?")
        for queries, what in ((missing, "queries of the qrels are missing and count 0"),
                              (extra, "queries are not in the qrels and are left out")):
            if queries:
                ids = ", ".join(queries[:5] + ["..."] if len(queries) > 5 else queries)
                self.warnings.append(f"{path}: {len(queries):,} {what} ({ids}).")
        tied, neighbours = tied_on_top(run, order)
        if 3 * tied > neighbours:  # BM25, and what is rounded to 3 decimals, stay below a third
            self.warnings.append(
                f"{path}: {tied:,} of the {neighbours:,} pairs of neighbours in the first "
                f"{TOP + 1} ranks have equal scores: their order is that of the document ids, "
                "descending, as trec_eval breaks ties, and not the model's.")
        if any(value > 0 for row in found.values() for value in row.values()):
            return
        ranks = judged_ranks(qrels, run, order)
        if not any(judged for _, judged in ranks.values()):
            self.warnings.append(
                f"{path}: NONE of its documents is judged: are its ids those of the qrels?")

    def table(self, columns):
        """(table, {(run, column): text of an absent cell}); columns {name: [(dataset,
        measure)]}."""
        table, absent = {name: {} for name in self.values}, {}
        for name, known in self.values.items():
            for column, parts in columns.items():
                cell = [known[dataset][measure] for dataset, measure in parts if dataset in known]
                table[name][column] = cell if len(cell) == len(parts) else None
                absent[name, column] = f"absent ({len(cell)}/{len(parts)})" if cell else "absent"
        return table, absent

    def per_query(self):
        """Every value as lines of TSV, the measures as they were computed."""
        lines = ["run\tdataset\tquery\tmeasure\tvalue"]
        for name, by_dataset in self.values.items():
            for dataset, by_measure in by_dataset.items():
                for actual, values in zip(self.actual[dataset], by_measure.values(), strict=True):
                    for query, value in zip(self.queries[dataset], values.tolist(), strict=True):
                        lines.append(f"{name}\t{dataset}\t{query}\t{actual}\t{value!r}")
        return "\n".join(lines) + "\n"


def judge_suite(suite, folder, qrels_folder, measures):
    """Judge of FOLDER/<model>/<dataset>.run; what has no run or no qrels stays absent, with a
    note."""
    judge, used = Judge(measures), set()
    folders = sorted(path for path in Path(folder).glob("*") if path.is_dir())
    judge.files = grouped(folders)
    judge.values = {model: {} for model in judge.files}
    for short, dataset in datasets_of(suite).items():
        files = {}
        for model, seeds in judge.files.items():
            found = runs_of(short, dataset, seeds)
            used.update(found)
            if len(found) == len(seeds):
                files[model] = found
            elif found:
                judge.warnings.append(
                    f"{model}: {short} is absent, {len(found)} files for {len(seeds)} seeds.")
        if not files:
            continue
        try:
            qrels = qrels_of(short, dataset, qrels_folder)
        except BadInput as e:
            judge.warnings.append(f"{short} is absent, its {len(files)} runs have no qrels: {e}")
            continue
        judge.add(dataset, qrels, files, dataset)
    stray = [str(path) for folder in folders for path in sorted(folder.rglob("*.run*"))
             if path not in used and path.suffix != ".json"]
    if stray:
        judge.warnings.append(
            f"Not named as a dataset of the suite (--help) and left out: {', '.join(stray)}.")
    if not judge.queries:
        nothing = f"{folder}: no FOLDER/<model>/<dataset>.run to judge (--help)."
        raise BadInput(" ".join([nothing, *judge.warnings]))
    return judge


# ------------------------------------------------------------------------------------- differences


def print_differences(paths, qrels, dataset, measure, top):
    """The `top` queries on which two runs differ most, with the texts that moved within, into or
    out of the top 10. Without a dataset there are no texts."""
    runs = [load_run(path, dataset)[0] for path in paths]
    measure = measure_for(measure, dataset)
    before, after = ({q: row[measure] for q, row in evaluate(qrels, run, [measure]).items()}
                     for run in runs)
    ranks_a, ranks_b = map(ranks_of, runs)
    texts = Texts(dataset) if dataset else None
    change = {q: after[q] - before[q] for q in qrels}
    higher = sum(c > 0 for c in change.values())
    lower = sum(c < 0 for c in change.values())
    for letter, path in zip("AB", paths, strict=True):
        print(f"{letter} = {text_of(path)}")
    print(f"{measure} of {len(qrels)} queries: B higher {higher}, lower {lower}.")
    changed = sorted((q for q in qrels if change[q]), key=lambda q: (-abs(change[q]), q))
    for q in changed[:top]:
        a, b = ranks_a.get(q, {}), ranks_b.get(q, {})
        moved = moved_documents(a, b)
        question = texts.queries.get(q, "") if texts else ""
        passages = texts.documents(moved) if texts else {}
        print(f"\n## {q} {question}\n")
        print(f"{measure}: A {before[q]:.4f}, B {after[q]:.4f}, B - A {change[q]:+.4f}\n")
        print("|   A |   B | grade | document |\n| ---: | ---: | ---: | --- |")
        for d in moved:
            text = passages.get(d, "").replace("|", "\\|")
            text = textwrap.shorten(text, 240, placeholder=" ...")
            judged = qrels[q].get(d, "-")
            print(f"| {a.get(d, '-'):>3} | {b.get(d, '-'):>3} | {judged:>5} | {d} {text} |")


def ranks_of(run):
    """{qid: {docid: rank from 1}} of Columns."""
    ranked = run.take(trec_order(run), run.starts).nested()
    return {q: {d: rank for rank, d in enumerate(documents, 1)} for q, documents in ranked.items()}


def moved_documents(a, b):
    """The documents of {docid: rank} whose rank is not the same in both, one of them in the top 10;
    in the order of b, those that it lacks behind."""
    moved = [d for d in b | a if a.get(d) != b.get(d)]
    moved = [d for d in moved if min(a.get(d, 11), b.get(d, 11)) <= 10]
    return sorted(moved, key=lambda d: (b.get(d, len(b) + 1), a.get(d, len(a) + 1)))


# ---------------------------------------------------------------------------------------- pictures

PLOTS = ("bars", "heatmap", "difference", "latency")
PICTURES = (".png", ".pdf", ".svg")


def picture(path, kind, table, judge, dataset, seed):
    """The bytes of a picture, of the kind its name says. Raises BadInput where the table has not
    what the picture shows. matplotlib is imported here only: nothing else needs it."""
    try:
        from data import pictures
    except ImportError:
        raise BadInput("--plot needs matplotlib: pip install matplotlib") from None
    with pictures.look():
        if kind == "bars":
            figure = pictures.bars(table, seed)
        elif kind == "heatmap":
            figure = pictures.heatmap(table)
        elif kind == "difference":
            figure = pictures.difference(table, judge.queries, dataset)
        else:
            figure = pictures.latency(table, judge.timing, seed)
        return pictures.saved(figure, Path(path).suffix.lower())


# ------------------------------------------------------------------------------------ command line


def parse_args(argv):
    """The flags, checked as far as that is possible before any file is read."""
    args = flag_parser().parse_args(argv)
    ways = [bool(way) for way in (args.runs, args.folder, args.diff)]
    if sum(ways) != 1 or bool(args.suite) != bool(args.folder):
        raise BadInput("give RUN files, or --suite NAME|FILE --runs FOLDER, or --diff A B (see "
                       "--help)")
    judgments = [bool(source) for source in (args.dataset, args.qrels)]
    of_the_suite = args.suite and not args.dataset
    if sum(judgments) != 1 and not of_the_suite:
        raise BadInput("give --dataset or --qrels, and one only (see --help)")
    if args.diff and (args.plot or args.per_query or args.format != "markdown"):
        raise BadInput("--diff prints Markdown alone: leave out --format, --plot and --per-query")
    default = ["nDCG@10"] if args.suite else DEFAULT_MEASURES
    args.measures = list(dict.fromkeys(args.measures or default))
    for measure in args.measures:
        if parse_measure(measure).trec.startswith(("num_", "gm_")):
            raise BadInput(f"{measure} is not a mean over queries, as a table needs")
    if args.compare and (args.suite != "paper" or args.measures != ["nDCG@10"] or args.per_dataset):
        raise BadInput("--compare paper is for --suite paper with nDCG@10, all that is known of it")
    if args.plot and Path(args.plot).suffix.lower() not in PICTURES:
        raise BadInput(f"--plot {args.plot}: name it .png, .pdf or .svg")
    inputs = [*args.runs, args.baseline, args.qrels, args.folder, args.dataset, args.suite]
    if args.dataset:
        inputs.append(f"{args.dataset}/../qrels")  # of the folder, where a split is named
    check_outputs([args.plot, args.per_query], inputs, args.overwrite)
    return args


def flag_parser():
    names = ["names of the run files of the suites:"]
    for suite, columns in SUITES.items():
        lines = "; ".join(f"{column} = {' '.join(group)}" for column, group in columns.items())
        names.append(textwrap.fill(f"{suite}: {lines}", 110, initial_indent="  ",
                                   subsequent_indent="    "))
    parser = Parser(prog="evaluate.py", description=__doc__, epilog="\n".join(names) + "\n",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN",
        help="TREC runs, also .gz .zst; X-seed1 X-seed2 are averaged per query")
    add("--dataset", metavar="ID|FOLDER|pydocs",
        help="an ir_datasets id, a BEIR folder or pydocs (or these/SPLIT)")
    add("--qrels", metavar="FILE",
        help="TREC or BEIR qrels; with --suite a folder of NAME.qrels or BEIR folders NAME/")
    add("--suite", metavar=f"{'|'.join(SUITES)}|FILE",
        help="the columns of a paper, or of a file: a dataset a line (ID or FOLDER[/SPLIT]), or "
             "`column: dataset` for means, # comments; a mean is shown only if complete")
    add("--runs", dest="folder", metavar="FOLDER",
        help="FOLDER/<model>/<dataset>.run (also .gz .zst; a/b/c is a-b-c); X-seedN are averaged")
    add("--per-dataset", action="store_true",
        help="a column per dataset of the suite in place of its means")
    add("--measures", nargs="+", metavar="M",
        help="default nDCG@10 RR@10 AP, for suites nDCG@10; also R@k P@k Success@k Judged@k "
             "AP(rel=2) MRR@k recall_100 ...; on TREC-DL datasets binary measures of ir_measures' "
             "names are (rel=2)")
    add("--baseline", metavar="RUN",
        help="tests every run against this one, a path or a name in the table (default: all pairs)")
    add("--test", choices=("t", "randomization", "none"), default="t",
        help="paired by query (default: t)")
    add("--intervals", action="store_true", help="95 %% bootstrap intervals beside the values")
    add("--compare", choices=["paper"],
        help="the paper's nDCG@10 and the difference below each run of --suite paper")
    add("--format", choices=("markdown", "latex", "json", "csv"), default="markdown",
        help="default: markdown")
    add("--digits", type=at_least(0, 15), default=4, help="decimals (default: 4)")
    add("--per-query", nargs="?", const="-", metavar="FILE",
        help="all values as TSV; without FILE to stdout alone")
    add("--plot", metavar="FILE.png",
        help="a picture of the first table; also .pdf .svg (matplotlib)")
    add("--plot-kind", choices=PLOTS, default="bars",
        help="bars (default); heatmap: backbone x loss of runs named BACKBONE-LOSS, or in "
             "train.py's folders; difference: two runs query by query; latency: against RUN.json's "
             "timing")
    add("--diff", nargs=2, metavar=("A", "B"),
        help="prints the queries two runs differ on, by the first measure")
    add("--top", type=at_least(1), default=10, help="how many queries for --diff (default: 10)")
    add("--seed", type=at_least(0), default=0, help="of bootstrap and randomisation (default: 0)")
    add("--overwrite", action="store_true", help="write over existing files")
    return parser


def check_outputs(outputs, inputs, overwrite):
    """BadInput where an output cannot be written, exists without --overwrite, or would take the
    place of an input, of the RUN.json beside one, or of another output."""
    taken = {Path(os.path.realpath(f"{path}{end}")) for path in inputs if path
             for end in ("", ".json")}
    for path in outputs:
        if path in (None, "-"):
            continue
        if Path(path).exists() and not overwrite:
            raise BadInput(f"{path}: exists already: choose another name or add --overwrite")
        place = Path(os.path.realpath(path))  # resolve() raises where a link leads to itself
        inside_input = place.exists() and not taken.isdisjoint(place.parents)
        if place in taken or inside_input:
            raise BadInput(
                f"{path}: this command reads it, or writes it already: choose another name")
        taken.add(place)
        if not Path(path).parent.is_dir():
            raise BadInput(f"{path}: the folder {Path(path).parent} does not exist: make it first")


def report(judge, columns, title, *, form, baseline, test, compare_paper, intervals, digits, seed):
    """(table, text in the chosen form) of one table."""
    table, absent = judge.table(columns)
    notes = [text_of(note) for note in judge.notes]
    warnings = [text_of(warning) for warning in judge.warnings]
    baseline = run_called(baseline, judge.files) if baseline else None
    comparisons = []
    if baseline is None and test != "none" and len(table) > len(LETTERS):
        warnings.append(f"Not tested: {len(table)} runs are too many for letters; test against one "
                        "with --baseline.")
    elif test != "none" and len(table) > 1:
        comparisons = compare(table, baseline, test, seed=seed)
    shown = entries(table, comparisons, baseline, digits, intervals, seed, absent)
    if any(cell is None for row in table.values() for cell in row.values()):
        warnings.append(
            "absent: without run or qrels; no mean is formed over a part of its datasets.")
    if intervals:
        notes.append("[low, high]: 95 % interval of the mean, percentile bootstrap over queries, "
                     "10,000 resamples.")
    if comparisons:
        notes.append(what_was_tested(table, comparisons, baseline, test))
    if compare_paper:
        shown = add_paper(shown, digits, notes, warnings)
    letters = letters_of(table, comparisons, baseline)
    if form == "json":
        return table, as_json(title, shown, letters, comparisons, [*notes, *warnings])
    write = {"markdown": markdown, "latex": latex, "csv": as_csv}[form]
    return table, write(title, shown, letters, notes, warnings)


def judge_runs(paths, dataset, qrels_file, baseline, measures):
    """(Judge, {title: columns}) of run files on one dataset; a baseline that is a file is one of
    them."""
    given = {os.path.abspath(path) for path in paths}
    if baseline and os.path.isfile(baseline) and os.path.abspath(baseline) not in given:
        paths = [baseline, *paths]
    name = text_of(dataset or qrels_file)
    qrels = load_qrels(dataset) if dataset else read_qrels(qrels_file)
    judge = Judge(measures)
    judge.files = grouped(paths)
    judge.add(name, qrels, judge.files, dataset)
    judge.notes.insert(0, f"{name}: {len(qrels):,} queries.")
    columns = {actual: [(name, asked)]
               for actual, asked in zip(judge.actual[name], measures, strict=True)}
    return judge, {"run": columns}


def write_whole(path, content):
    """A file that appears under its name when it is complete: no reader meets half of it."""
    part = Path(f"{path}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main(argv=None):
    args = parse_args(argv)
    if args.diff:
        qrels = load_qrels(args.dataset) if args.dataset else read_qrels(args.qrels)
        print_differences(args.diff, qrels, args.dataset, args.measures[0], args.top)
        return 0
    if args.suite:
        suite = load_suite(args.suite)
        judge = judge_suite(suite, args.folder, args.qrels, args.measures)
        tables = columns_of(suite, args.measures, args.per_dataset)
    else:
        judge, tables = judge_runs(args.runs, args.dataset, args.qrels, args.baseline,
                                   args.measures)
    done = [report(judge, columns, title, form=args.format, baseline=args.baseline, test=args.test,
                   compare_paper=args.compare, intervals=args.intervals, digits=args.digits,
                   seed=args.seed)
            for title, columns in tables.items()]
    files = {}
    if args.plot:
        files[args.plot] = picture(args.plot, args.plot_kind, done[0][0], judge, args.dataset,
                                   args.seed)
    if args.per_query:
        files[args.per_query] = judge.per_query().encode()
    for path, content in files.items():
        if path != "-":
            write_whole(path, content)
    texts = [text for _, text in done]
    if args.format == "json" and len(texts) > 1:
        texts = ["[" + ",\n".join(texts) + "]"]
    print(files["-"].decode().rstrip("\n") if "-" in files else "\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main, "interrupted"))
