"""Judges runs: measures under trec_eval's rules, tests of significance, the tables and pictures of a paper.

    python evaluate.py --dataset my-corpus/ bm25.run model.run           a folder in BEIR layout: a Markdown table
    python evaluate.py --dataset beir/scifact/test model.run             an ir_datasets id
    python evaluate.py --qrels qrels.txt bm25.run model.run --baseline bm25.run --measures nDCG@10 "AP(rel=2)" R@100
    python evaluate.py --suite paper --runs FOLDER --compare paper       FOLDER/<model>/<dataset>.run
    python evaluate.py --dataset my-corpus/ --diff bm25.run model.run    the queries that differ most, with the texts

Rules: ties by document id descending, the rank column ignored, linear gains, a query without a ranking counts 0,
RR@k cuts at k first. Works copied alone; only `pydocs` and the texts of --diff need rerank.py beside it.
"""

import argparse
import csv
import errno
import io
import json
import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; guarded() takes over
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

FULL = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)  # of a disk or quota
DEFAULT_MEASURES = ("nDCG@10", "RR@10", "AP")
ALPHA = 0.05


class BadInput(ValueError):
    """The user's input is wrong. str() is one line: `FILE:LINE: what is wrong and what to do`."""


# ----------------------------------------------------------------------------------------------------- reading
# Arrow's CSV reader takes the files that are as they should be; anything unusual goes to a plain reader of lines,
# which either understands it (mixed blanks) or names the line that is wrong.


class Layout(NamedTuple):
    name: str
    columns: int
    query: int
    document: int
    value: int
    number: type
    line: str


RUN = Layout("TREC run", 6, 0, 2, 4, float, "qid Q0 docno rank score tag")
QRELS = Layout("TREC qrels", 4, 0, 2, 3, np.int64, "qid 0 docno relevance")
BEIR = Layout("BEIR qrels", 3, 0, 1, 2, np.int64, "query-id<TAB>corpus-id<TAB>score")


class Columns(NamedTuple):
    """A run or qrels with the lines of a query together: query i has the rows starts[i] to starts[i + 1]."""

    qids: list[str]
    starts: np.ndarray  # int64 [queries + 1]
    docids: pa.LargeStringArray  # [rows]
    values: np.ndarray  # float64 (run) or int64 (qrels) [rows]

    @classmethod
    def of(cls, nested):
        """Columns of {qid: {docid: value}}."""
        docids = pa.array([d for documents in nested.values() for d in documents], pa.large_string())
        values = np.array([v for documents in nested.values() for v in documents.values()])
        return cls(list(nested), np.cumsum([0, *map(len, nested.values())]), docids, values)

    def nested(self):
        """{qid: {docid: value}} of plain Python strings and numbers."""
        docids, values, starts = self.docids.to_pylist(), self.values.tolist(), self.starts.tolist()
        bounds = zip(self.qids, starts, starts[1:], strict=False)
        return {q: dict(zip(docids[a:b], values[a:b], strict=True)) for q, a, b in bounds}

    def take(self, rows, starts):
        """The same queries with other rows, or these in another order."""
        return self._replace(starts=starts, docids=self.docids.take(pa.array(rows)), values=self.values[rows])


def read_bytes(path):
    """Content of a file, unpacked if it begins as gzip or zstd does."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror or e}") from None
    for name, magic, suffix in (("gzip", b"\x1f\x8b", ".gz"), ("zstd", b"\x28\xb5\x2f\xfd", ".zst")):
        if data.startswith(magic):
            try:
                return pa.CompressedInputStream(pa.BufferReader(data), name).read()
            except (OSError, pa.ArrowException) as e:
                raise BadInput(f"{path}: damaged {name} data, fetch or write it again ({e})") from None
        if str(path).endswith(suffix):
            raise BadInput(f"{path}:1: named {suffix} but the content is not {name}: rename or repack it")
    return data


def read_columns(path, layout):
    """A file as Columns in its own order. Raises BadInput naming file and line."""
    data = read_bytes(path)
    if not data or data.isspace():
        raise BadInput(f"{path}:1: the file is empty: a {layout.name} has lines of `{layout.line}`")
    if layout is QRELS and data.removeprefix(b"\xef\xbb\xbf").startswith(b"query-id\t"):
        layout = BEIR
    return read_arrow(data, layout) or Columns.of(read_lines(path, data, layout))


def read_arrow(data, layout):
    """Columns of well-formed text with one blank or one tab between columns; None for anything else."""
    delimiter = b"\t" if b"\t" in data[: data.find(b"\n")] else b" "
    if layout is not BEIR and data.find(b" " if delimiter == b"\t" else b"\t") >= 0:
        return None
    names = [str(i) for i in range(layout.columns)]
    query, document, value = (names[i] for i in layout[2:5])
    number = pa.float64() if layout is RUN else pa.int64()
    types = {query: pa.string(), document: pa.large_string(), value: number}
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            pa.csv.ReadOptions(column_names=names, skip_rows=int(layout is BEIR)),
            pa.csv.ParseOptions(delimiter=delimiter.decode(), quote_char=False),
            pa.csv.ConvertOptions(column_types=types, include_columns=list(types)),
        )
    except pa.ArrowInvalid:
        return None
    rows, values, docids = len(table), table[value].to_numpy(), table[document].combine_chunks()
    if not rows or not np.isfinite(values).all() or not pc.min(pc.binary_length(docids)).as_py():
        return None
    change = pc.not_equal(table[query].slice(1), table[query].slice(0, rows - 1)).to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(change) + 1, [rows]])
    qids = table[query].take(pa.array(starts[:-1])).to_pylist()
    whole = Columns(qids, starts, docids, values)
    if len(set(qids)) < len(qids):  # the lines of a query are scattered: bring them together, their order kept
        first = {q: i for i, q in enumerate(dict.fromkeys(qids))}
        which = np.repeat([first[q] for q in qids], np.diff(starts))
        starts = np.concatenate([[0], np.cumsum(np.bincount(which))])
        whole = whole._replace(qids=list(first)).take(np.argsort(which, kind="stable"), starts)
    bounds = zip(starts.tolist(), starts[1:].tolist(), strict=False)
    once = all(b - a == 1 or len(whole.docids.slice(a, b - a).unique()) == b - a for a, b in bounds)
    return whole if once and "" not in qids else None


def read_lines(path, data, layout):
    """{qid: {docid: value}} from text with any blanks between columns. Raises BadInput at the first wrong line."""
    nested = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip() or (layout is BEIR and number == 1):
            continue
        fields, where = line.split(b"\t") if layout is BEIR else line.split(), f"{path}:{number}"
        if len(fields) != layout.columns:
            raise BadInput(f"{where}: {len(fields)} columns, a {layout.name} has {layout.columns}: `{layout.line}`")
        try:
            query, document, text = (fields[i].decode().strip() for i in layout[2:5])
        except UnicodeDecodeError as e:
            raise BadInput(f"{where}: not UTF-8 ({e.reason}): convert the file to UTF-8") from None
        try:
            value = layout.number(text.replace("_", "?"))  # Python alone would read 1_000 as a number
        except (ValueError, OverflowError):
            kind = "number" if layout is RUN else "whole number below 2^63"
            raise BadInput(f"{where}: `{text}` is not a {kind}: the line should be `{layout.line}`") from None
        if not np.isfinite(value):
            raise BadInput(f"{where}: document {document} of query {query} has the score {text}: it must be finite")
        if not query or not document:
            raise BadInput(f"{where}: an empty query or document id: the line should be `{layout.line}`")
        if document in nested.setdefault(query, {}):
            raise BadInput(f"{where}: document {document} appears twice for query {query}: keep one of the lines")
        nested[query][document] = value
    if not nested:
        raise BadInput(f"{path}:1: there are no judgments below the header")
    return nested


def read_run(path):
    """{qid: {docid: score}} of a TREC run (plain, gzip or zstd), queries and documents in the order of the file.

    Raises BadInput (`FILE:LINE: ...`) for a wrong number of columns, a score that is no finite number, a document
    listed twice for a query, bytes that are not UTF-8, a damaged archive or an empty file.
    """
    return read_columns(path, RUN).nested()


def read_qrels(path):
    """{qid: {docid: relevance}} of TREC qrels or of a BEIR .tsv with its header; as strict as read_run."""
    return read_columns(path, QRELS).nested()


# ---------------------------------------------------------------------------------------------------- measures
# pytrec_eval computes every value; a run is only cut down first to what its values depend on. It is
# imported where it computes: train.py and rerank.py import this file, and still run without it.


class Measure(NamedTuple):
    name: str  # as the user wrote it: the key of the results
    trec: str  # as trec_eval calls it in its results
    rel: int  # the lowest grade that counts as relevant, for measures that are binary
    cut: int | None  # the documents below this rank are taken off the run first
    trim: bool  # unjudged documents at the end of the run cannot change the value
    judged: bool  # counts judged documents in place of relevant ones


FAMILIES = {  # ir_measures' name: trec_eval's without and with a cutoff
    **dict.fromkeys(("ndcg",), ("ndcg", "ndcg_cut")),
    **dict.fromkeys(("ap", "map"), ("map", "map_cut")),
    **dict.fromkeys(("rr", "mrr"), ("recip_rank", "recip_rank")),
    **dict.fromkeys(("p", "judged"), (None, "P")),
    "r": (None, "recall"),
    "success": (None, "success"),
}


def parse_measure(name):
    """Measure of an ir_measures name (nDCG@10, AP(rel=2), RR(rel=2)@10) or of trec_eval's own (bpref, P_5)."""
    match = re.fullmatch(r"([A-Za-z]+)(?:\(rel=([1-9])\))?(?:@([1-9]\d*))?", name)
    family = match and match[1].lower()
    trec = match and FAMILIES.get(family, (None, None))[bool(match[3])]
    if trec and not (match[2] and family in ("ndcg", "judged")):
        cut = int(match[3]) if match[3] else None
        trec = f"{trec}_{cut}" if cut and trec != "recip_rank" else trec
        return Measure(name, trec, int(match[2] or 1), cut, cut is None, family == "judged")
    import pytrec_eval

    try:
        trial = pytrec_eval.RelevanceEvaluator({"q": {"d": 1}}, {asked(name)}).evaluate({"q": {"d": 1.0}})["q"]
    except ValueError:
        trial = {}
    if name in trial and name not in ("relstring", "runid"):
        return Measure(name, name, 1, None, False, False)
    raise BadInput(
        f"unknown measure `{name}`: nDCG@k nDCG RR@k RR AP@k AP P@k R@k Success@k Judged@k, where relevance is binary "
        "with a grade, AP(rel=2) RR(rel=2)@10, or trec_eval's own, bpref P_5; RUN files go before --measures"
    )


def asked(trec):
    """The request for a result of pytrec_eval: ndcg_cut.10 for ndcg_cut_10."""
    return re.sub(r"_(?=[0-9.]+$)", ".", trec)


def trec_order(run):
    """int64 [rows], the rows of Columns as trec_eval orders them: per query by score, ties by document id descending.

    trec_eval keeps scores in single precision, so two that differ only beyond it are tied.
    """
    with np.errstate(over="ignore"):
        scores = run.values.astype(np.float32)

    def not_below():  # rows whose score is not below that of the row before them in their query
        rows = np.flatnonzero(scores[1:] >= scores[:-1]) + 1
        return rows[~np.isin(rows, run.starts)]

    rows, order = not_below(), np.arange(len(scores))
    if (scores[rows] > scores[rows - 1]).any():
        order = np.lexsort((-scores, np.repeat(np.arange(len(run.qids)), np.diff(run.starts))))
        scores = scores[order]
        rows = not_below()
    tied = np.union1d(rows, rows - 1)
    names = pa.table({"group": np.cumsum(~np.isin(tied, rows)), "docid": run.docids.take(pa.array(order[tied]))})
    by = pc.sort_indices(names, sort_keys=[("group", "ascending"), ("docid", "descending")])
    order[tied] = order[tied][by.to_numpy()]
    return order


def drop_identical(run):
    """(Columns without the documents whose id is the query's, how many they were): BEIR's rule."""
    query = np.repeat(np.arange(len(run.qids)), np.diff(run.starts))
    own = pc.equal(run.docids, pa.array(run.qids, pa.large_string()).take(pa.array(query)))
    keep = np.flatnonzero(~own.to_numpy(zero_copy_only=False))
    return run.take(keep, np.searchsorted(keep, run.starts)), len(query) - len(keep)


def judged_ranks(qrels, run, order):
    """{qid: (documents returned, [(rank from 0, docid) of the judged ones])} of the queries in both."""
    found = {q: (n, []) for q, n in zip(run.qids, np.diff(run.starts).tolist(), strict=True) if q in qrels}
    known = pa.array({d for documents in qrels.values() for d in documents}, pa.large_string())
    rows = np.flatnonzero(pc.is_in(run.docids, value_set=known).to_numpy(zero_copy_only=False))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    rows = rows[np.argsort(place[rows])]
    query = np.searchsorted(run.starts, rows, side="right") - 1
    docids, ranks = run.docids.take(pa.array(rows)).to_pylist(), (place[rows] - run.starts[query]).tolist()
    for i, rank, docid in zip(query.tolist(), ranks, docids, strict=True):
        if docid in qrels.get(run.qids[i], ()):
            found[run.qids[i]][1].append((rank, docid))
    return found


FILLERS, SCORES = [], []  # "\n0", "\n1", ... and 0.0, -1.0, ...: grown as needed, shared by all queries


def compact(returned, judged, cut, trim):
    """A query's ranking for pytrec_eval: the value of the measure is the whole run's, the building much faster.

    A document without judgment matters only by the rank it takes, so a shared filler stands for it (no id read from
    a line holds a newline). The scores are the ranks: no ties are left to break.
    """
    depth = min(returned, cut or returned)
    if trim:
        depth = min(depth, judged[-1][0] + 1 if judged else 1)
    FILLERS.extend(f"\n{i}" for i in range(len(FILLERS), depth))
    SCORES.extend(-float(i) for i in range(len(SCORES), depth))
    docids = FILLERS[:depth]
    for rank, docid in judged:
        if rank >= depth:
            break
        docids[rank] = docid
    return dict(zip(docids, SCORES, strict=False))


def evaluate(qrels, run, measures=DEFAULT_MEASURES):
    """{qid: {measure: value}} for every query of the qrels, equal to trec_eval's; a query the run lacks has 0.0.

    qrels {qid: {docid: int}}, run {qid: {docid: float}} (or read_columns' Columns), measures by ir_measures' names.
    RR@k cuts the run at rank k first, as MS MARCO does; nDCG has linear gains; Judged@k divides by the smaller of k
    and the number of documents returned. Raises BadInput for an unknown measure or a score that is not finite.
    """
    import pytrec_eval

    parsed = [parse_measure(m) for m in measures]
    run = run if isinstance(run, Columns) else Columns.of(run)
    if not np.isfinite(run.values.astype(float)).all():
        at = np.searchsorted(run.starts, np.flatnonzero(~np.isfinite(run.values.astype(float))), side="right") - 1
        raise BadInput(f"the run has scores that are not finite, e.g. for query {run.qids[at[0]]}: check the model")
    ranks = judged_ranks(qrels, run, trec_order(run))
    values = {q: dict.fromkeys(measures, 0.0) for q in qrels}
    for key in dict.fromkeys(m[2:] for m in parsed):
        rel, cut, trim, judged = key
        names = {m.name: m.trec for m in parsed if m[2:] == key}
        known = {q: dict.fromkeys(documents, 1) for q, documents in qrels.items()} if judged else qrels
        evaluator = pytrec_eval.RelevanceEvaluator(known, {asked(t) for t in names.values()}, relevance_level=rel)
        queries = list(ranks)
        for i in range(0, len(queries), 256):  # in parts, or the rankings of all queries would fill the memory
            part = {q: compact(*ranks[q], cut, trim) for q in queries[i : i + 256]}
            for q, result in evaluator.evaluate(part).items():
                scale = cut / max(1, min(cut, ranks[q][0])) if judged else 1.0
                values[q].update({name: result[trec] * scale for name, trec in names.items()})
    return values


def mean(per_query):
    """{measure: value over all queries} of evaluate()'s result: the mean, for num_* and gm_* what trec_eval prints."""
    import pytrec_eval

    rows = list(per_query.values())
    total = pytrec_eval.compute_aggregated_measure
    return {m: float(total(m, [row[m] for row in rows])) for m in rows[0]} if rows else {}


# ------------------------------------------------------------------------------------------------ significance
# A cell is a list of arrays: the values of all queries, an array per dataset that the column averages over, queries
# in one order for all runs. A column over several datasets is the mean of their means. A table is
# {run: {column: cell, or None where the run lacks a dataset}}.


class Comparison(NamedTuple):
    first: str
    second: str
    column: str
    difference: float  # of the means, first - second
    p: float
    p_holm: float


def value_of(cell):
    return float(np.mean([values.mean() for values in cell]))


def paired_t(differences):
    """Two-sided p [pairs] of the paired t-test; differences is a list, per dataset, of arrays [queries, pairs].

    Over one dataset this is scipy.stats.ttest_rel. Over several, the mean of the mean differences is divided by its
    standard error, the strata being independent, with the degrees of freedom of Welch and Satterthwaite.
    """
    from scipy.stats import t

    if min(map(len, differences)) < 2:
        return np.ones(differences[0].shape[1])
    effect = np.mean([d.mean(0) for d in differences], 0)
    parts = np.stack([d.var(0, ddof=1) / len(d) for d in differences]) / len(differences) ** 2
    freedom = np.array([[len(d) - 1] for d in differences])
    with np.errstate(divide="ignore", invalid="ignore"):  # where two runs differ by the same on every query
        p = 2 * t.sf(np.abs(effect) / np.sqrt(parts.sum(0)), parts.sum(0) ** 2 / (parts**2 / freedom).sum(0))
    return np.where(parts.sum(0) > 0, p, effect == 0)


def randomization(differences, permutations=100_000, seed=0):
    """Two-sided p [pairs] of Fisher's randomisation test: without a difference each query's sign is a coin toss.

    One set of tosses serves all pairs. p = (1 + tosses at least as extreme) / (1 + permutations).
    """
    weighted = np.concatenate([d / (len(d) * len(differences)) for d in differences])
    weighted = weighted[(weighted != 0).any(1)]
    effect, extreme = weighted.sum(0), np.zeros(weighted.shape[1])
    rng, step = np.random.default_rng(seed), max(1, (1 << 22) // max(1, len(weighted)))
    for start in range(0, permutations, step):
        tosses = rng.integers(0, 256, (min(step, permutations - start), -(-len(weighted) // 8)), np.uint8)
        flipped = np.unpackbits(tosses, axis=1, count=len(weighted)).astype(float) @ weighted
        extreme += (np.abs(effect - 2 * flipped) >= np.abs(effect) - 1e-12).sum(0)
    return (1 + extreme) / (1 + permutations)


def holm(p):
    """Holm's adjusted p: the k-th smallest of m times m - k + 1, not below the one before it, at most 1."""
    p = np.asarray(p, float)
    order, adjusted = np.argsort(p, kind="stable"), np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def bootstrap(cell, resamples=10_000, seed=0):
    """95 % percentile interval (low, high) of the value of a cell, queries drawn anew within each dataset."""
    rng, means = np.random.default_rng(seed), np.zeros(resamples)
    for values in cell:
        for part in np.array_split(np.arange(resamples), -(-resamples * len(values) // (1 << 22))):
            means[part] += values[rng.integers(0, len(values), (len(part), len(values)))].mean(1) / len(cell)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def compare(table, baseline=None, test="t", permutations=100_000, seed=0):
    """[Comparison] in every column of each run with the baseline, or of all pairs, Holm's correction over them all."""
    names, found = list(table), []
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if baseline is not None:
        pairs = [(a, baseline) for a in names if a != baseline]
    for column in table[names[0]]:
        here = [(table[a][column], table[b][column]) for a, b in pairs]
        some = [i for i, (a, b) in enumerate(here) if a is not None and b is not None]
        if not some:
            continue
        # rounded, for means over seeds that were summed in another order differ in their last bit
        parts = range(len(here[some[0]][0]))
        differences = [np.round(np.stack([here[i][0][d] - here[i][1][d] for i in some], 1), 12) for d in parts]
        effects = np.mean([d.mean(0) for d in differences], 0).tolist()
        p = paired_t(differences) if test == "t" else randomization(differences, permutations, seed)
        found += [Comparison(*pairs[i], column, e, q, 1.0) for i, e, q in zip(some, effects, p.tolist(), strict=True)]
    return [c._replace(p_holm=q) for c, q in zip(found, holm([c.p for c in found]).tolist(), strict=True)]


# ------------------------------------------------------------------------------------------------------ tables

LETTERS = "abcdefghijklmnoprstuvwxyz"  # without q: Unicode has no raised one
RAISED = str.maketrans(LETTERS, "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ")


class Entry(NamedTuple):
    """What a table shows in one place."""

    value: float | None
    text: str
    place: int = 0  # 1 the best of its column, 2 the second, of those that differ in the digits shown
    marks: str = ""
    interval: tuple | None = None

    def between(self):
        """The interval with as many decimals as the value."""
        places = len(self.text.partition(".")[2])
        return f" [{self.interval[0]:.{places}f}, {self.interval[1]:.{places}f}]" if self.interval else ""


def entries(table, comparisons, baseline, digits, intervals=False, seed=0, absent=None):
    """{run: {column: Entry}} of a table, with the marks of the significant comparisons."""
    names, shown = list(table), {n: {} for n in table}
    for column in table[names[0]]:
        rounded = {n: round(value_of(table[n][column]), digits) for n in names if table[n][column] is not None}
        places = sorted(set(rounded.values()), reverse=True)[:2] if len(rounded) > 1 else []
        won = {n: "" for n in names}
        for c in comparisons:
            if c.p_holm >= ALPHA or c.column != column:
                continue
            if baseline is not None:
                won[c.first] = "†" if c.difference > 0 else "‡"
            elif c.difference > 0:
                won[c.first] += LETTERS[names.index(c.second)]
            else:
                won[c.second] += LETTERS[names.index(c.first)]
        for n in names:
            if n not in rounded:
                shown[n][column] = Entry(None, (absent or {}).get((n, column), "absent"))
                continue
            place = places.index(rounded[n]) + 1 if rounded[n] in places else 0
            interval = bootstrap(table[n][column], seed=seed) if intervals else None
            text, marks = f"{rounded[n]:.{digits}f}", "".join(sorted(won[n]))
            shown[n][column] = Entry(value_of(table[n][column]), text, place, marks, interval)
    return shown


def what_was_tested(table, comparisons, baseline, test):
    """What the marks mean and how they were tested."""
    how = "paired t-test" if test == "t" else "paired randomisation test with 100,000 permutations"
    several = any(cell and len(cell) > 1 for row in table.values() for cell in row.values())
    marks = f"†/‡: better/worse than {baseline}" if baseline else "Raised letters: better than the run of that letter"
    return (
        f"{marks}, p < {ALPHA}; two-sided {how} over queries{', stratified by dataset' * several}; Holm correction "
        f"over all {len(comparisons)} comparisons of this table."
    )


def markdown(title, shown, letters, notes):
    """Aligned Markdown, the best of each column in bold."""
    columns = list(next(iter(shown.values())))
    rows = [[title, *columns], ["---", *["---:"] * len(columns)]]
    for name, row in shown.items():
        bold = [f"**{e.text}**" if e.place == 1 else e.text for e in row.values()]
        cells = [b + e.marks.translate(RAISED) + e.between() for b, e in zip(bold, row.values(), strict=True)]
        rows.append([f"{letters[name]} {name}" if name in letters else name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows]
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + [f"\n{note}" for note in notes])


def latex(title, shown, letters, notes):
    """A table for booktabs: the best of each column bold, the second underlined, the notes as its caption."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"†": r"\dag{}", "‡": r"\ddag{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}"}
    special = str.maketrans(special | {c: f"\\{c}" for c in "&%$#_{}"})
    form = ("%s", r"\textbf{%s}", r"\underline{%s}")
    columns = list(next(iter(shown.values())))
    lines = [" & ".join(c.translate(special) for c in [title, *columns]) + r" \\", r"\midrule"]
    for name, row in shown.items():
        label = (f"$^{{{letters[name]}}}$ " if name in letters else "") + name.translate(special)
        marks = [e.marks.replace("†", r"\dag").replace("‡", r"\ddag") for e in row.values()]
        marks = [f"$^{{{m}}}$" if m else "" for m in marks]
        texts = [e.text.replace("-", "$-$") for e in row.values()]  # a hyphen is no minus sign
        cells = [form[e.place] % t + m + e.between() for e, t, m in zip(row.values(), texts, marks, strict=True)]
        lines.append(" & ".join([label, *cells]) + r" \\")
    return "\n".join([
        "% \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule", *lines, r"\bottomrule", r"\end{tabular}",
        rf"\caption{{{' '.join(notes).translate(special)}}}", r"\end{table}",
    ])  # fmt: skip


def as_csv(title, shown, letters, notes):
    """A line per run and column, values at full precision; the notes are comments at the end."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "letter", "column", "value", "low", "high", "marks"])
    for name, row in shown.items():
        for column, e in row.items():
            value = e.text if e.value is None else repr(e.value)
            writer.writerow([name, letters.get(name, ""), column, value, *(e.interval or ("", "")), e.marks])
    return text.getvalue() + "\n".join(f"# {note}" for note in notes)


def markdown_table(results, measures=None, baseline=None, test=None, digits=4):
    """Markdown table of {name: evaluate()'s result}: a row per name, a column per measure, the best in bold.

    With test="t" or "randomization" also marks of significance, against `baseline` or between all pairs.
    """
    queries = list(next(iter(results.values())))
    measures = list(measures or results[next(iter(results))][queries[0]])
    table = {n: {m: [np.array([r[q][m] for q in queries])] for m in measures} for n, r in results.items()}
    comparisons = compare(table, baseline, test) if test and len(table) > 1 else []
    letters = dict(zip(table, LETTERS, strict=False)) if comparisons and baseline is None else {}
    notes = [what_was_tested(table, comparisons, baseline, test)] if comparisons else []
    return markdown("run", entries(table, comparisons, baseline, digits), letters, notes)


# ---------------------------------------------------------------------------------------------- data and suites

BEIR13 = (
    "arguana climate-fever dbpedia-entity/test fever/test fiqa/test hotpotqa/test nfcorpus/test nq quora/test scidocs "
    "scifact/test webis-touche2020/v2 trec-covid"
).split()
SUITES = {  # column: {name of the run file: ir_datasets id}, in the paper's order
    "paper": {
        "MSM dev": {"msmarco-dev": "msmarco-passage/dev/small"},
        "DL19": {"dl19": "msmarco-passage/trec-dl-2019/judged"},
        "DL20": {"dl20": "msmarco-passage/trec-dl-2020/judged"},
        "BEIR13": {path.split("/")[0]: f"beir/{path}" for path in BEIR13},
        "LoTTE-S": {
            f"lotte-{topic}": f"lotte/{topic}/test/search"
            for topic in ("writing", "recreation", "science", "technology", "lifestyle")
        },
        "Rob04": {"robust04": "disks45/nocr/trec-robust-2004"},
    }
}
SUITES["nanobeir"] = {
    "NanoBEIR": {d: f"nano-beir/{d}" for d in sorted({*SUITES["paper"]["BEIR13"], "msmarco"} - {"trec-covid"})}
}
LOSSES = ("bce", "hinge", "marginmse", "infonce", "ranknet", "adrmse", "kl")


def texts_of(dataset):
    """rerank.py's Texts: queries and passages."""
    try:
        from rerank import Texts
    except ModuleNotFoundError as e:
        raise BadInput(f"{dataset}: rerank.py reads it, and {e.name} is not here") from None
    return Texts(dataset)


def load_qrels(dataset):
    """Qrels of pydocs[/SPLIT], a BEIR FOLDER[/SPLIT] (test by default) or an ir_datasets id."""
    path = Path(dataset)
    for file in (path / "qrels" / "test.tsv", path.parent / "qrels" / f"{path.name}.tsv"):
        if file.is_file():
            return read_qrels(file)
    if path.is_dir():
        splits = ", ".join(sorted(f"{path}/{p.stem}" for p in path.glob("qrels/*.tsv")))
        raise BadInput(f"{path}: no qrels/test.tsv" + (f"; splits: {splits}" if splits else ", so no BEIR folder"))
    if dataset.split("/")[0] == "pydocs":
        return texts_of(dataset).qrels
    try:
        import ir_datasets

        return ir_datasets.load(dataset).qrels_dict()
    except ImportError:
        raise BadInput(f"dataset {dataset}: no such folder; for ir_datasets ids: pip install ir_datasets") from None
    except KeyError:
        raise BadInput(f"dataset {dataset}: neither a folder nor an id that ir_datasets knows") from None
    except Exception as e:  # ir_datasets lets through whatever its downloads raise
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadInput(f"dataset {dataset}: ir_datasets could not get it ({reason}): give --qrels") from None


def is_one_of(dataset, names):
    """Whether a dataset has one of these names, by the end of its id or path; None (qrels from a file) has none."""
    path = Path(dataset or "-")
    return bool(re.search(rf"\b({names})\b", "/".join((path.resolve() if path.exists() else path).parts[-2:])))


def measure_for(measure, dataset):
    """The measure as the field has it on a dataset: on TREC-DL grade 1 is not relevant to a binary measure."""
    binary = re.fullmatch(r"(M?RR|M?AP|P|R|Success)((?:@\d+)?)", measure, re.IGNORECASE)
    deep_learning = is_one_of(dataset, r"trec-dl-(?:20\d\d|hard)")
    return f"{binary[1]}(rel=2){binary[2]}" if binary and deep_learning else measure


def load_run(path, dataset):
    """(Columns of a run, documents dropped): on ArguAna and Quora those that are their own query, as BEIR does."""
    run = read_columns(path, RUN)
    return drop_identical(run) if is_one_of(dataset, "arguana|quora") else (run, 0)


def without_seed(path):
    """The path without -seedN at the end of a folder's or file's name: one model's seeds become equal."""
    return re.sub(r"-seed\d+(?=[./]|$)", "", str(path))


def grouped(paths):
    """{name for the table: [a path per seed]}; the file's name, or the whole path where names clash."""
    seeds = {}
    for path in dict.fromkeys(map(str, paths)):
        seeds.setdefault(without_seed(path), []).append(path)
    short = {p: re.sub(r"(\.(run|txt|trec|gz|zst))+$", "", Path(p).name) or p for p in seeds}
    clash = len(set(short.values())) < len(short)
    return {(p if clash else short[p]) + f" ({len(s)} seeds)" * (len(s) > 1): s for p, s in seeds.items()}


class Judge:
    """Evaluates runs and keeps what tables and pictures need.

    values {run: {dataset: {measure: array over queries}}}, queries {dataset: [qid]}, notes: what a reader must know,
    timing {run: [seconds, pairs]} from the RUN.json that rerank.py leaves beside a run.
    """

    def __init__(self, measures):
        self.measures, self.values, self.queries, self.notes, self.timing = measures, {}, {}, [], {}

    def add(self, name, qrels, files, dataset=None):
        """files {run: [path of each seed]}: values are means over the seeds, per query.

        `dataset`, the name if it is known, brings its customs: grades from 2 on TREC-DL, identical ids dropped.
        """
        actual, dropped = [measure_for(m, dataset) for m in self.measures], 0
        if actual != self.measures:
            self.notes.append(f"{name}: binary measures take grades from 2 as relevant, as TREC-DL does.")
        self.queries[name] = list(qrels)
        for run_name, paths in files.items():
            kept = self.values.setdefault(run_name, {})[name] = {m: np.zeros(len(qrels)) for m in self.measures}
            for path in paths:
                run, own = load_run(path, dataset)
                dropped += own
                self.count(path, run.qids, qrels)
                found = evaluate(qrels, run, actual)
                for m, a in zip(self.measures, actual, strict=True):
                    kept[m] += np.array([found[q][a] for q in qrels]) / len(paths)
                if os.path.exists(f"{path}.json"):
                    self.time(run_name, f"{path}.json")
        if dropped:
            self.notes.append(f"{name}: {dropped:,} results whose id is the query's own were dropped, as BEIR does.")

    def time(self, run_name, path):
        """Adds the seconds and pairs that rerank.py noted beside a run."""
        try:
            spent = json.loads(read_bytes(path))
            more = float(spent["seconds"]), int(spent["pairs"])
        except (ValueError, KeyError, TypeError):
            raise BadInput(f'{path}:1: not rerank.py\'s {{"seconds": ..., "pairs": ...}}: remove it') from None
        self.timing[run_name] = tuple(np.add(self.timing.get(run_name, (0, 0)), more).tolist())

    def count(self, path, qids, qrels):
        """Notes the queries that only the run or only the qrels have."""
        here = set(qids)
        missing, extra = [q for q in qrels if q not in here], [q for q in qids if q not in qrels]
        if len(missing) == len(qrels):
            raise BadInput(f"{path}: no query of it is judged in the qrels: is it a run on this dataset?")
        what = "queries of the qrels are missing and count 0", "queries are not in the qrels and are left out"
        for some, text in zip((missing, extra), what, strict=True):
            if some:
                ids = ", ".join(some[:5]) + ", ..." * (len(some) > 5)
                self.notes.append(f"{path}: {len(some):,} {text} ({ids}).")

    def table(self, columns):
        """(table, {(run, column): text of an absent cell}); columns {name: [(dataset, measure)]}."""
        table, absent = {n: {} for n in self.values}, {}
        for n, known in self.values.items():
            for column, parts in columns.items():
                cell = [known[d][m] for d, m in parts if d in known]
                table[n][column] = cell if len(cell) == len(parts) else None
                absent[n, column] = f"absent ({len(cell)}/{len(parts)})" if cell else "absent"
        return table, absent


def judge_suite(suite, folder, qrels_folder, measures):
    """Judge of FOLDER/<model>/<dataset>.run; what has no run or no qrels stays absent, with a note."""
    judge, used = Judge(measures), set()
    folders = sorted(p for p in Path(folder).glob("*") if p.is_dir())
    models = grouped(folders)
    judge.values = {m: {} for m in models}
    for short, dataset in {k: v for group in SUITES[suite].values() for k, v in group.items()}.items():
        files, stems = {}, (short, dataset.replace("/", "-"), dataset)
        for model, seeds in models.items():
            paths = [[Path(f, s + ".run" + e) for s in stems for e in ("", ".gz", ".zst")] for f in seeds]
            found = [p for names in paths for p in names if p.is_file()]
            used.update(found)
            if len(found) == len(seeds):
                files[model] = found
            elif found:
                judge.notes.append(f"{model}: {short} is absent, {len(found)} files for {len(seeds)} seeds.")
        if files:
            try:
                local = sorted(Path(qrels_folder).glob(f"{short}*")) if qrels_folder else []
                local = next((p for p in local if p.name.split(".")[0] == short), None)
                qrels = read_qrels(local) if local and local.is_file() else load_qrels(str(local or dataset))
            except BadInput as e:
                judge.notes.append(f"{short} is absent, its {len(files)} runs have no qrels: {e}")
                continue
            judge.add(dataset, qrels, files, dataset)
    stray = [str(p) for f in folders for p in sorted(f.rglob("*.run*")) if p not in used and p.suffix != ".json"]
    if stray:
        judge.notes.append(f"Not named as a dataset of the suite (--help) and left out: {', '.join(stray)}.")
    if not judge.queries:
        raise BadInput(" ".join([f"{folder}: no FOLDER/<model>/<dataset>.run to judge (--help).", *judge.notes]))
    return judge


def backbone_and_loss(name):
    """("minilm", "infonce") of a run named minilm-infonce; None for other names."""
    match = re.fullmatch(rf"(.+)-({'|'.join(LOSSES)})( \(\d+ seeds\))?", name.lower())
    return match and (match[1], match[2])


def add_paper(shown, digits, notes):
    """The rows, below each that is named BACKBONE-LOSS the paper's figures and the difference."""
    data = json.loads(read_bytes(Path(__file__).with_name("results") / "paper-ndcg10.json"))
    known = {(row["backbone"], row["loss"]): row for row in data["rows"]}
    rows, notes[:] = {}, [*notes, f"paper: {data['what']} ({data['source']})."]
    for name, row in shown.items():
        rows[name], theirs = row, known.get(backbone_and_loss(name))
        if theirs is None:
            notes.append(f"{name}: no row of the paper; its names are BACKBONE-LOSS, e.g. minilm-infonce.")
            continue
        values = dict(zip(data["columns"], theirs["values"], strict=True))
        rows[f"{name}: paper, {' '.join(theirs['paper'])}"] = {c: Entry(values[c], f"{values[c]:.3f}") for c in row}
        change = {c: None if e.value is None else e.value - values[c] for c, e in row.items()}
        rows[f"{name}: ours - paper"] = {
            c: Entry(d, "" if d is None else f"{d:+.{digits}f}") for c, d in change.items()
        }
    return rows


def print_differences(args, qrels):
    """The queries on which two runs differ most, with the text of the documents that moved within, into or out of
    the top 10."""
    runs = [load_run(path, args.dataset)[0] for path in args.diff]
    measure = measure_for(args.measures[0], args.dataset)
    before, after = ({q: row[measure] for q, row in evaluate(qrels, run, [measure]).items()} for run in runs)
    ranked = [run.take(trec_order(run), run.starts).nested() for run in runs]
    texts = texts_of(args.dataset) if args.dataset else None
    change = {q: after[q] - before[q] for q in qrels}
    higher, lower = (sum(sign * c > 0 for c in change.values()) for sign in (1, -1))
    print("A = {}\nB = {}".format(*args.diff))
    print(f"{measure} of {len(qrels)} queries: B higher {higher}, lower {lower}.")
    for q in sorted(filter(change.get, qrels), key=lambda q: (-abs(change[q]), q))[: args.top]:
        ranks = [{d: i for i, d in enumerate(run.get(q, {}), 1)} for run in ranked]
        moved = [d for d in ranks[1] | ranks[0] if ranks[0].get(d) != ranks[1].get(d)]
        moved = [d for d in moved if min(r.get(d, 11) for r in ranks) <= 10]
        moved.sort(key=lambda d: [ranks[i].get(d, len(ranks[i]) + 1) for i in (1, 0)])
        passages = texts.documents(moved) if texts else {}
        print(f"\n## {q} {texts.queries.get(q, '') if texts else ''}\n")
        print(f"{measure}: A {before[q]:.4f}, B {after[q]:.4f}, B - A {change[q]:+.4f}\n")
        print("|   A |   B | grade | document |\n| ---: | ---: | ---: | --- |")
        for d in moved:
            text = textwrap.shorten(passages.get(d, "").replace("|", "\\|"), 240, placeholder=" ...")
            a, b = (r.get(d, "-") for r in ranks)
            print(f"| {a:>3} | {b:>3} | {qrels[q].get(d, '-'):>5} | {d} {text} |")


# ---------------------------------------------------------------------------------------------------- pictures

# Okabe and Ito's colours differ for every kind of colour vision; the hatches for prints without colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "++")


def left_out(table, shown, why):
    if len(shown) < len(table):
        print(f"not in the picture, {why}: {', '.join(n for n in table if n not in shown)}", file=sys.stderr)


def plot_bars(plt, judge, table, args):
    columns = list(next(iter(table.values())))
    if len(table) > len(COLOURS):
        raise BadInput(f"--plot-kind bars is legible up to {len(COLOURS)} runs, not {len(table)}: take heatmap")
    figure, axis = plt.subplots(figsize=(min(7.5, max(4.5, 1 + 0.4 * len(table) * len(columns))), 3.6))
    for i, (name, row) in enumerate(table.items()):
        here = [j for j, c in enumerate(columns) if row[c] is not None]
        values = np.array([value_of(row[columns[j]]) for j in here])
        intervals = np.array([bootstrap(row[columns[j]], seed=args.seed) for j in here]).reshape(-1, 2).T
        place, width = (i - (len(table) - 1) / 2) * 0.8 / len(table), 0.74 / len(table)
        for j in set(range(len(columns))) - set(here):
            axis.text(j + place, 0.01, "absent", rotation=90, ha="center", va="bottom", fontsize=7)
        where = np.array(here) + place
        axis.bar(where, values, width, label=name, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", linewidth=0)
        axis.errorbar(where, values, np.abs(intervals - values), fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylabel("mean, 95 % bootstrap interval")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def plot_heatmap(plt, judge, table, args):
    named = {n: pair for n in table if (pair := backbone_and_loss(n))}
    if not named:
        raise BadInput("--plot-kind heatmap needs runs named BACKBONE-LOSS, e.g. minilm-infonce")
    left_out(table, named, "not named BACKBONE-LOSS")
    backbones = list(dict.fromkeys(backbone for backbone, _ in named.values()))
    losses = [loss for loss in LOSSES if loss in {x for _, x in named.values()}]
    columns = [c for c in next(iter(table.values())) if any(table[n][c] is not None for n in named)]
    across, down = min(3, len(columns)), -(-len(columns) // 3)
    size = 1 + across * (0.1 + 0.36 * len(losses)), down * (0.9 + 0.28 * len(backbones))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, column in zip(axes.flat, columns, strict=False):
        grid = np.full((len(backbones), len(losses)), np.nan)
        for n, (backbone, loss) in named.items():
            if table[n][column] is not None:
                grid[backbones.index(backbone), losses.index(loss)] = value_of(table[n][column])
        axis.imshow(grid, cmap="cividis", aspect="auto")
        dark = np.nanmin(grid) + 0.42 * np.ptp(grid[~np.isnan(grid)])
        for (i, j), value in np.ndenumerate(grid):
            colour, text = ("white" if value <= dark else "black"), ("absent" if np.isnan(value) else f"{value:.3f}")
            axis.text(j, i, text.removeprefix("0"), ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(column)
        axis.set_xticks(range(len(losses)), losses, rotation=35, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(backbones)), backbones)
    return figure


def plot_difference(plt, judge, table, args):
    if len(table) != 2 or len(judge.queries) > 1:
        raise BadInput("--plot-kind difference takes two runs on one dataset")
    (first, second), column, (queries,) = table, next(iter(next(iter(table.values())))), judge.queries.values()
    delta = table[second][column][0] - table[first][column][0]
    order = np.argsort(delta, kind="stable")
    delta, better, worse = delta[order], int((delta > 0).sum()), int((delta < 0).sum())
    try:
        asked_for = texts_of(args.dataset).queries if args.dataset else {}
    except BadInput:
        asked_for = {}
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.bar(range(len(delta)), delta, 0.85, color=np.where(delta < 0, COLOURS[5], COLOURS[0]))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks([])
    axis.set_xlabel(f"{len(delta)} queries: {better} better, {worse} worse, {len(delta) - better - worse} equal")
    axis.set_ylabel(f"difference in {column}")
    axis.set_title(f"{second} − {first}", fontsize=9)
    axis.set_ylim(*(np.abs(delta).max(initial=0.01) * np.array([-1.1, 1.1])))  # free corners for the lists of queries
    best = range(len(delta) - 1, len(delta) - 1 - min(5, better), -1)
    corners = ("worst", range(min(5, worse)), 0.02, "left", "top"), ("best", best, 0.98, "right", "bottom")
    for title, places, x, side, edge in corners:
        lines = [f"{delta[i]:+.2f} {queries[order[i]]} {asked_for.get(queries[order[i]], '')}".strip() for i in places]
        text = "\n".join([title, *(line if len(line) <= 52 else line[:50] + " …" for line in lines)])
        axis.text(x, 1 - x, text, transform=axis.transAxes, ha=side, va=edge, fontsize=7.5)
    return figure


def plot_latency(plt, judge, table, args):
    column = next(iter(next(iter(table.values()))))
    points = {n: judge.timing[n] for n in table if n in judge.timing and table[n][column] is not None}
    if not points:
        raise BadInput("--plot-kind latency needs the RUN.json with timing that rerank.py writes beside a run")
    left_out(table, points, "without RUN.json")
    figure, axis = plt.subplots(figsize=(4.8, 3.6))
    for i, (n, (seconds, pairs)) in enumerate(points.items()):
        y, (low, high) = value_of(table[n][column]), bootstrap(table[n][column], seed=args.seed)
        look = {"fmt": "osD^vPX*"[i % 8], "color": COLOURS[i % 6], "capsize": 2, "elinewidth": 0.8}
        axis.errorbar(1000 * seconds / pairs, y, [[y - low], [high - y]], label=n, **look)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axis.set_xscale("log")
    axis.margins(x=0.2)
    low, high = axis.get_xlim()
    ticks = [x for x in (m * 10.0**k for k in range(-3, 6) for m in (1, 2, 3, 5, 7)) if low <= x <= high]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("milliseconds per query-document pair")
    axis.set_ylabel(f"{column}, 95 % bootstrap interval")
    return figure


PLOTS = {"bars": plot_bars, "heatmap": plot_heatmap, "difference": plot_difference, "latency": plot_latency}


def picture(judge, table, args):
    """PNG of the chosen kind. matplotlib is imported here only: nothing else needs it."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}
    with plt.rc_context(look | {"text.parse_math": False}):  # a query may hold dollar signs
        figure, png = PLOTS[args.plot_kind](plt, judge, table, args), io.BytesIO()
        figure.savefig(png, format="png", dpi=200, bbox_inches="tight")
        plt.close(figure)
    return png.getvalue()


# ------------------------------------------------------------------------------------------------ command line


def guarded(main):
    """Runs a script's main: bad input ends with one line on stderr and exit code 2, what is interrupted with 130."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read the results has seen enough (head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except OSError as e:
        if not e.filename and e.errno not in FULL:
            raise
        hint = "; free some space and give the same command again: it goes on from what is written"
        why = f"{e.filename or 'cannot write'}: {e.strerror}{hint * (e.errno in FULL)}"
    except ValueError as e:
        encoder = sys.modules.get("kernels.encoder")  # --help and usage errors need no torch
        if not isinstance(e, (BadInput, encoder.ModelError if encoder else BadInput)):
            raise
        why = e
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)  # torchrun ends all ranks when rank 0 has failed: what it said too is not said again
    print(f"error: {why}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse whose errors are BadInput: one line, as for every other bad input."""

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def at_least(least):
    """The type of a flag that takes whole numbers from `least` on."""

    def whole(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is too small: {least} or more")
        return int(text)

    return whole


def parse_args(argv):
    names = ""
    for suite, columns in SUITES.items():
        lines = "; ".join(f"{column} = {' '.join(group)}" for column, group in columns.items())
        names += textwrap.fill(f"{suite}: {lines}", 110, initial_indent="  ", subsequent_indent="    ") + "\n"
    form = argparse.RawDescriptionHelpFormatter
    epilog = f"names of the run files of the suites:\n{names}"
    parser = Parser(prog="evaluate.py", description=__doc__, epilog=epilog, formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="TREC runs, also .gz .zst; X-seed1 X-seed2 are averaged per query")
    add("--dataset", metavar="ID|FOLDER|pydocs", help="an ir_datasets id, a BEIR folder or pydocs (or these/SPLIT)")
    add("--qrels", metavar="FILE", help="TREC or BEIR qrels; with --suite a folder of NAME.qrels or BEIR folders NAME/")
    add("--suite", choices=SUITES, help="the columns of a paper, from --runs; a mean is shown only if complete")
    add("--runs", dest="folder", metavar="FOLDER", help="FOLDER/<model>/<dataset>.run; folders X-seedN are averaged")
    add("--per-dataset", action="store_true", help="a column per dataset of the suite in place of its means")
    add("--measures", nargs="+", metavar="M", help="default nDCG@10 RR@10 AP, for suites nDCG@10; also R@k P@k "
        "Success@k Judged@k AP(rel=2) bpref ...; on TREC-DL datasets binary measures are (rel=2)")  # fmt: skip
    add("--baseline", metavar="RUN", help="tests every run against this one (default: all pairs)")
    add("--test", choices=("t", "randomization", "none"), default="t", help="paired by query (default: t)")
    add("--intervals", action="store_true", help="95 %% bootstrap intervals beside the values")
    add("--compare", choices=["paper"], help="the paper's nDCG@10 and the difference below each run of --suite paper")
    add("--format", choices=("markdown", "latex", "json", "csv"), default="markdown", help="default: markdown")
    add("--digits", type=at_least(0), default=4, help="decimals (default: 4)")
    add("--per-query", nargs="?", const="-", metavar="FILE", help="all values as TSV; without FILE to stdout alone")
    add("--plot", metavar="FILE.png", help="a picture of the first table (matplotlib)")
    add("--plot-kind", choices=PLOTS, default="bars", help="bars (default); heatmap: backbone x loss of runs named "
        "so; difference: two runs query by query; latency: against RUN.json's timing")  # fmt: skip
    add("--diff", nargs=2, metavar=("A", "B"), help="prints the queries two runs differ on, by the first measure")
    add("--top", type=at_least(1), default=10, help="how many queries for --diff (default: 10)")
    add("--seed", type=at_least(0), default=0, help="of bootstrap and randomisation (default: 0)")
    add("--overwrite", action="store_true", help="write over existing files")
    args = parser.parse_args(argv)
    if bool(args.runs) + bool(args.folder) + bool(args.diff) != 1 or bool(args.suite) != bool(args.folder):
        raise BadInput("give RUN files, or --suite NAME --runs FOLDER, or --diff A B (see --help)")
    if bool(args.dataset) + bool(args.qrels) != 1 and not (args.suite and not args.dataset):
        raise BadInput("give --dataset or --qrels, and one only (see --help)")
    if args.diff and (args.plot or args.per_query or args.format != "markdown"):
        raise BadInput("--diff prints Markdown alone: leave out --format, --plot and --per-query")
    args.measures = list(dict.fromkeys(args.measures or (["nDCG@10"] if args.suite else DEFAULT_MEASURES)))
    for measure in args.measures:
        if parse_measure(measure).trec.startswith(("num_", "gm_")):
            raise BadInput(f"{measure} is not a mean over queries, as a table needs")
    if args.compare and (args.suite != "paper" or args.measures != ["nDCG@10"] or args.per_dataset):
        raise BadInput("--compare paper is for --suite paper with nDCG@10, all that is known of it")
    for path in {args.plot, args.per_query} - {None, "-"}:
        if Path(path).exists() and not args.overwrite:
            raise BadInput(f"{path}: exists already: choose another name or add --overwrite")
        if not Path(path).parent.is_dir():
            raise BadInput(f"{path}: the folder {Path(path).parent} does not exist: make it first")
    return args


def report(judge, columns, title, args):
    """(table, text in the chosen format) of one table."""
    table, absent = judge.table(columns)
    notes, baseline = list(judge.notes), None
    if args.baseline:
        near = {args.baseline, *grouped([args.baseline])}
        baseline = next((n for n in table if n in near or n.partition(" (")[0] in map(without_seed, near)), None)
        if baseline is None:
            raise BadInput(f"--baseline {args.baseline}: not one of the runs: {', '.join(table)}")
    tested = args.test != "none" and len(table) > 1
    if tested and baseline is None and len(table) > len(LETTERS):
        notes.append(f"Not tested: {len(table)} runs are too many for letters; test against one with --baseline.")
        tested = False
    comparisons = compare(table, baseline, args.test, seed=args.seed) if tested else []
    letters = dict(zip(table, LETTERS, strict=False)) if comparisons and baseline is None else {}
    shown = entries(table, comparisons, baseline, args.digits, args.intervals, args.seed, absent)
    if any(cell is None for row in table.values() for cell in row.values()):
        notes.append("absent: without run or qrels; no mean is formed over a part of its datasets.")
    if args.intervals:
        notes.append("[low, high]: 95 % interval of the mean, percentile bootstrap over queries, 10,000 resamples.")
    if comparisons:
        notes.append(what_was_tested(table, comparisons, baseline, args.test))
    if args.compare:
        shown = add_paper(shown, args.digits, notes)
    if args.format != "json":
        write = {"markdown": markdown, "latex": latex, "csv": as_csv}[args.format]
        return table, write(title, shown, letters, notes)
    runs = {n: {c: e._asdict() for c, e in row.items()} for n, row in shown.items()}
    tests = [c._asdict() | {"significant": c.p_holm < ALPHA} for c in comparisons]
    what = {"title": title, "letters": letters, "runs": runs, "tests": tests, "notes": notes}
    return table, json.dumps(what, indent=1, ensure_ascii=False)


def main(argv=None):
    args = parse_args(argv)
    if args.diff:
        print_differences(args, load_qrels(args.dataset) if args.dataset else read_qrels(args.qrels))
        return 0
    if args.suite:
        judge = judge_suite(args.suite, args.folder, args.qrels, args.measures)
        groups = SUITES[args.suite]
        if args.per_dataset:
            groups = {name: {name: dataset} for group in groups.values() for name, dataset in group.items()}
        tables = {m: {c: [(d, m) for d in group.values()] for c, group in groups.items()} for m in args.measures}
    else:
        if args.baseline and os.path.isfile(args.baseline) and args.baseline not in args.runs:
            args.runs.insert(0, args.baseline)
        judge, name = Judge(args.measures), args.dataset or args.qrels
        qrels = load_qrels(name) if args.dataset else read_qrels(name)
        judge.add(name, qrels, grouped(args.runs), args.dataset)
        judge.notes.insert(0, f"{name}: {len(judge.queries[name]):,} queries.")
        tables = {"run": {measure_for(m, args.dataset): [(name, m)] for m in args.measures}}
    done = [report(judge, columns, title, args) for title, columns in tables.items()]
    files = {args.plot: picture(judge, done[0][0], args)} if args.plot else {}
    if args.per_query:
        lines = ["run\tdataset\tquery\tmeasure\tvalue"]
        for n, by_dataset in judge.values.items():
            for d, by_measure in by_dataset.items():
                for m, values in by_measure.items():
                    start = f"{n}\t{d}\t"
                    pairs = zip(judge.queries[d], values.tolist(), strict=True)
                    shown = m if args.qrels and not args.suite else measure_for(m, d)
                    lines += [f"{start}{q}\t{shown}\t{value!r}" for q, value in pairs]
        files[args.per_query] = ("\n".join(lines) + "\n").encode()
    for path, content in files.items():
        if path != "-":
            Path(f"{path}.tmp").write_bytes(content)  # renamed when whole: no reader meets half a file
            os.replace(f"{path}.tmp", path)
    texts = [text for _, text in done]
    if args.format == "json" and len(texts) > 1:
        texts = ["[" + ",\n".join(texts) + "]"]
    print(files["-"].decode().rstrip("\n") if "-" in files else "\n\n".join(texts))
    return 0


if __name__ == "__main__":
    # rerank.py imports this file as `evaluate`. Run under that name, or there would be two classes BadInput and the
    # one that rerank raises would pass the `except` of the other.
    import evaluate as this

    sys.exit(this.guarded(this.main))
