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
import math
import os
import re
import signal
import sys
import textwrap
import time
from collections import namedtuple
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
MAX_GRADE = 10_000  # trec_eval's time for `ndcg` grows with the square of the highest grade: here 17 ms a query
GRADE = f"whole number from {-MAX_GRADE:,} to {MAX_GRADE:,}"


class BadInput(ValueError):
    """The user's input is wrong. str() is one line: `FILE:LINE: what is wrong and what to do`."""


# ----------------------------------------------------------------------------------------------------- reading
# Arrow's CSV reader takes the files that are as they should be; anything unusual goes to a plain reader of lines,
# which either understands it (mixed blanks) or names the line that is wrong.


def grade(value):
    """A grade of relevance, text or number, as int. Raises ValueError for what is not a GRADE."""
    number = float(value)
    if not number.is_integer() or abs(number) > MAX_GRADE:
        raise ValueError(f"not a {GRADE}")
    return int(number)


Layout = namedtuple("Layout", "name columns query document value number kind line")  # 3 places of columns
RUN = Layout("TREC run", 6, 0, 2, 4, float, "number", "qid Q0 docno rank score tag")
QRELS = Layout("TREC qrels", 4, 0, 2, 3, grade, GRADE, "qid 0 docno relevance")
BEIR = Layout("BEIR qrels", 3, 0, 1, 2, grade, GRADE, "query-id<TAB>corpus-id<TAB>score")


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
    start = len(data) - len(data.lstrip())
    if start == len(data):
        raise BadInput(f"{path}:1: the file is empty: a {layout.name} has lines of `{layout.line}`")
    fields = data[start:].split(b"\n", 1)[0].split(b"\t") if layout is QRELS else ()
    if len(fields) == BEIR.columns and len(fields[-1].split()) == 1:
        layout = BEIR
        try:
            float(fields[-1].decode())
        except ValueError:  # a header: its line is left empty, so that the others keep their numbers
            data = data[:start] + data[start + len(b"\t".join(fields)) :]
    columns = read_arrow(data, layout) or Columns.of(read_lines(path, data, layout))
    if layout is RUN and int(os.environ.get("RANK", 0)) == 0 and falls_towards_first(data[: 1 << 16]):
        print(f"{path}: scores fall towards rank 1: are they ranks or distances? Higher must be better: negate them",
              file=sys.stderr)  # fmt: skip
    return columns


def falls_towards_first(head):
    """Whether the scores fall, line by line, from the last rank to the first in most queries of these lines."""
    ranked = {}
    for fields in map(bytes.split, head.splitlines()):
        if len(fields) == RUN.columns and fields[3].isdigit():
            ranked.setdefault(fields[0], {})[float(fields[3])] = float(fields[4].decode())
    lists = [[scores[rank] for rank in sorted(scores)] for scores in ranked.values() if len(scores) > 1]
    return 2 * sum(x[0] < x[-1] and x == sorted(x) for x in lists) > len(lists)


def read_arrow(data, layout):
    """Columns of well-formed text with one blank or one tab between columns; None for anything else."""
    delimiter, other = (b"\t", b" ") if b"\t" in data[: data.find(b"\n", 1)] else (b" ", b"\t")
    text, odd = np.frombuffer(data, np.uint8), (other, b"\r", b"\v", b"\f", b"\0")
    parts = (text[i : i + (1 << 20) + 1] for i in range(0, len(text), 1 << 20))
    empty = any(((part[:-1] == delimiter[0]) & (part[1:] <= 32)).any() for part in parts)  # between two delimiters
    if empty or data.endswith(delimiter) or any(byte in data for byte in odd):
        return None
    names = [str(i) for i in range(layout.columns)]
    query, document, value = (names[i] for i in layout[2:5])
    types = {query: pa.string(), document: pa.large_string(), value: pa.float64()}
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            pa.csv.ReadOptions(column_names=names),
            pa.csv.ParseOptions(delimiter=delimiter.decode(), quote_char=False),
            pa.csv.ConvertOptions(column_types=types, include_columns=list(types)),
        )
    except pa.ArrowInvalid:
        return None
    rows, values, docids = len(table), table[value].to_numpy(), table[document].combine_chunks()
    if not rows or not np.isfinite(values).all() or not pc.min(pc.binary_length(docids)).as_py():
        return None
    if layout is not RUN and ((values != np.rint(values)) | (np.abs(values) > MAX_GRADE)).any():
        return None
    change = pc.not_equal(table[query].slice(1), table[query].slice(0, rows - 1)).to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(change) + 1, [rows]])
    qids = table[query].take(pa.array(starts[:-1])).to_pylist()
    whole = Columns(qids, starts, docids, values if layout is RUN else values.astype(np.int64))
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
        if not line.strip():
            continue
        fields, where = line.split(b"\t") if layout is BEIR else line.split(), f"{path}:{number}"
        if len(fields) != layout.columns:
            raise BadInput(f"{where}: {len(fields)} columns, a {layout.name} has {layout.columns}: `{layout.line}`")
        try:
            query, document, text = (fields[i].strip().decode() for i in layout[2:5])
        except UnicodeDecodeError as e:
            raise BadInput(f"{where}: not UTF-8 ({e.reason}): convert the file to UTF-8") from None
        try:
            value = layout.number(text.replace("_", "?"))  # Python alone would read 1_000 as a number
        except (ValueError, OverflowError):
            raise BadInput(f"{where}: `{text[:40]}` is not a {layout.kind}: the line must be `{layout.line}`") from None
        if not np.isfinite(value):
            raise BadInput(f"{where}: document {document} of query {query} has the score {text[:40]}: not finite")
        if not query or not document or "\0" in query + document:
            raise BadInput(f"{where}: an id that is empty or holds a NUL: the line should be `{layout.line}`")
        if document in nested.setdefault(query, {}):
            raise BadInput(f"{where}: document {document} appears twice for query {query}: keep one of the lines")
        nested[query][document] = value
    if not nested:
        raise BadInput(f"{path}:1: there are no judgments below the header")
    return nested


def read_run(path):
    """{qid: {docid: score}} of a TREC run (plain, gzip or zstd) in the order of the file; BadInput is FILE:LINE: ..."""
    return read_columns(path, RUN).nested()


def read_qrels(path):
    """{qid: {docid: relevance}} of TREC qrels or of BEIR's, told apart by what they hold; as strict as read_run."""
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
    "ndcg": ("ndcg", "ndcg_cut"),
    **dict.fromkeys(("ap", "map"), ("map", "map_cut")),
    **dict.fromkeys(("rr", "mrr"), ("recip_rank", "recip_rank")),
    **dict.fromkeys(("p", "precision", "judged"), (None, "P")),
    **dict.fromkeys(("r", "recall"), (None, "recall")),
    **dict.fromkeys(("success", "hit"), (None, "success")),
}
TREC_NAMES = re.compile(  # its own; others, or these with and without what belongs behind them, can end the process
    r"11pt_avg|G|Rndcg|Rprec|binG|bpref|gm_bpref|gm_map|infAP|map|ndcg|ndcg_rel|num_(nonrel_judged_ret|q|rel|rel_ret|ret)"
    r"|recip_rank|set_(F|P|map|recall|relative_P)|utility|(P|recall|success|relative_P|map_cut|ndcg_cut)_[1-9][0-9]{0,8}"
    r"|(iprec_at_recall|Rprec_mult)_[0-9]\.[0-9][0-9]"
)


def parse_measure(name):
    """Measure of an ir_measures name (nDCG@10, AP(rel=2), RR(rel=2)@10) or of trec_eval's own (bpref, P_5)."""
    match = re.fullmatch(r"([A-Za-z]+)(?:\(rel=([1-9])\))?(?:@([1-9][0-9]{0,8}))?", name)
    family = match and match[1].lower()
    trec = match and FAMILIES.get(family, (None, None))[bool(match[3])]
    if trec and not (match[2] and family in ("ndcg", "judged")):
        cut = int(match[3]) if match[3] else None
        trec = f"{trec}_{cut}" if cut and trec != "recip_rank" else trec
        return Measure(name, trec, int(match[2] or 1), cut, cut is None, family == "judged")
    if TREC_NAMES.fullmatch(name):
        return Measure(name, name, 1, None, False, False)
    raise BadInput(
        f"unknown measure `{name}`: nDCG@k nDCG RR@k RR AP@k AP P@k R@k Success@k Judged@k, where relevance is binary "
        "with a grade, AP(rel=2) RR(rel=2)@10, or trec_eval's own, bpref P_5; k < 10^9; RUN files go before --measures"
    )


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
    found = {q: (n, []) for q, n in zip(run.qids, np.diff(run.starts).tolist(), strict=True) if n and q in qrels}
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
        if rank < depth:
            docids[rank] = docid
    return dict(zip(docids, SCORES, strict=False))


def checked(qrels):
    """The qrels as trec_eval can hold them, or BadInput: its C code takes anything else for what it is not."""
    held = {}
    for q, documents in qrels.items():
        try:
            held[q] = {d: grade(g) for d, g in documents.items()}
            if re.search("[\0\n\ud800-\udfff]", "".join([q, *documents])):
                raise ValueError("no id of a text file")
        except (TypeError, ValueError, OverflowError):
            raise BadInput(f"qrels of query {q!r}: a grade must be a {GRADE}, an id text of one line") from None
        if max(held[q].values(), default=0) < 0:
            held[q]["\n"] = 0  # its table of grades starts at 0, and it reads on where that is empty
    return held


def evaluate(qrels, run, measures=DEFAULT_MEASURES):
    """{qid: {measure: value}} for every query of the qrels, equal to trec_eval's; a query the run lacks has 0.0.

    qrels {qid: {docid: int}}, run {qid: {docid: float}} (or read_columns' Columns), measures by ir_measures' names.
    RR@k cuts the run at rank k first, as MS MARCO does; nDCG has linear gains; Judged@k divides by the smaller of k
    and the number of documents returned; gm_* are logarithms, at least of 0.00001. BadInput: what it cannot hold.
    """
    import pytrec_eval

    parsed, qrels = [parse_measure(m) for m in measures], checked(qrels)
    try:
        run = run if isinstance(run, Columns) else Columns.of(run)
        infinite = np.flatnonzero(~np.isfinite(run.values.astype(float)))
    except (TypeError, ValueError, OverflowError):  # Arrow's and Unicode's errors are of these
        raise BadInput("the run must be {qid: {docid: score}}, ids of text and scores that are numbers") from None
    if len(infinite):
        at = np.searchsorted(run.starts, infinite[0], side="right") - 1
        raise BadInput(f"the run has scores that are not finite, e.g. for query {run.qids[at]}: check the model")
    ranks = judged_ranks(qrels, run, trec_order(run))
    values = {q: {m.name: math.log(1e-5) if m.trec.startswith("gm_") else 0.0 for m in parsed} for q in qrels}
    for key in dict.fromkeys(m[2:] for m in parsed):
        rel, cut, trim, judged = key
        names = {m.name: m.trec for m in parsed if m[2:] == key}
        known = {q: dict.fromkeys(documents, 1) for q, documents in qrels.items()} if judged else qrels
        wanted = {re.sub(r"_(?=[0-9.]+$)", ".", trec) for trec in names.values()}  # ndcg_cut.10 gives ndcg_cut_10
        evaluator = pytrec_eval.RelevanceEvaluator(known, wanted, relevance_level=rel)
        for i in range(0, len(ranks), 256):  # in parts, or the rankings of all queries would fill the memory
            part = {q: compact(*ranks[q], cut, trim) for q in list(ranks)[i : i + 256]}
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


Comparison = namedtuple("Comparison", "first second column difference p p_holm")  # of the means, first - second


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
    tests = f"two-sided {how} over queries{', stratified by dataset' * several}"
    return f"{marks}, p < {ALPHA}; {tests}; Holm correction over all {len(comparisons)} comparisons of this table."


def markdown(title, shown, letters, notes, warnings=()):
    """Aligned Markdown, the best of each column in bold."""
    columns = list(next(iter(shown.values())))
    rows = [[title, *columns], ["---", *["---:"] * len(columns)]]
    for name, row in shown.items():
        bold = [f"**{e.text}**" if e.place == 1 else e.text for e in row.values()]
        cells = [b + e.marks.translate(RAISED) + e.between() for b, e in zip(bold, row.values(), strict=True)]
        rows.append([f"{letters[name]} {name}" if name in letters else name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows]
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + [f"\n{note}" for note in [*notes, *warnings]])


def latex(title, shown, letters, notes, warnings=()):
    """A table for booktabs: best of each column bold, second underlined, notes as caption, warnings as comments."""
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
        *(f"% {w}" for w in warnings), "% \\usepackage{booktabs}", r"\begin{table}", r"\centering",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}",
        rf"\caption{{{' '.join(notes).translate(special)}}}", r"\end{table}",
    ])  # fmt: skip


def as_csv(title, shown, letters, notes, warnings=()):
    """A line per run and column, values at full precision; the notes are comments at the end."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "letter", "column", "value", "low", "high", "marks"])
    for name, row in shown.items():
        for column, e in row.items():
            value = e.text if e.value is None else repr(e.value)
            writer.writerow([name, letters.get(name, ""), column, value, *(e.interval or ("", "")), e.marks])
    return text.getvalue() + "\n".join(f"# {note}" for note in [*notes, *warnings])


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

BEIR13 = """arguana climate-fever dbpedia-entity/test fever/test fiqa/test hotpotqa/test nfcorpus/test nq quora/test
scidocs scifact/test webis-touche2020/v2 trec-covid""".split()
LOTTE = "writing recreation science technology lifestyle".split()
SUITES = {  # column: {name of the run file: ir_datasets id}, in the paper's order
    "paper": {
        "MSM dev": {"msmarco-dev": "msmarco-passage/dev/small"},
        "DL19": {"dl19": "msmarco-passage/trec-dl-2019/judged"},
        "DL20": {"dl20": "msmarco-passage/trec-dl-2020/judged"},
        "BEIR13": {path.split("/")[0]: f"beir/{path}" for path in BEIR13},
        "LoTTE-S": {f"lotte-{topic}": f"lotte/{topic}/test/search" for topic in LOTTE},
        "Rob04": {"robust04": "disks45/nocr/trec-robust-2004"},
    }
}
NANO = sorted({*SUITES["paper"]["BEIR13"], "msmarco"} - {"trec-covid"})
SUITES["nanobeir"] = {"NanoBEIR": {name: f"nano-beir/{name}" for name in NANO}}
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
    binary = re.fullmatch(r"(M?RR|M?AP|P|Precision|R|Recall|Success|Hit)((?:@\d+)?)", measure, re.IGNORECASE)
    deep_learning = is_one_of(dataset, r"trec-dl-(?:20\d\d|hard)")
    return f"{binary[1]}(rel=2){binary[2]}" if binary and deep_learning else measure


def load_run(path, dataset):
    """(Columns of a run, documents dropped): on ArguAna and Quora those that are their own query, as BEIR does."""
    run = read_columns(path, RUN)
    return drop_identical(run) if is_one_of(dataset, "arguana|quora") else (run, 0)


def without_seed(path):
    """The path without -seedN at the end of a folder's or file's name: one model's seeds become equal."""
    return re.sub(r"-seed\d+(?=[./]|$)", "", str(path))


def text_of(path):
    """A path as it can be written: names of files may hold bytes that are not UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()


def grouped(paths):
    """{name for the table: [a path per seed]}; the file's name, or the whole path where names clash."""
    seeds = {}
    for path in dict.fromkeys(map(str, paths)):
        seeds.setdefault(without_seed(path), []).append(path)
    short = {p: re.sub(r"(\.(run|txt|trec|gz|zst))+$", "", Path(p).name) or p for p in seeds}
    clash = len(set(short.values())) < len(short)
    return {text_of(p if clash else short[p]) + f" ({len(s)} seeds)" * (len(s) > 1): s for p, s in seeds.items()}


class Judge:
    """Evaluates runs and keeps what tables and pictures need.

    values {run: {dataset: {measure: array over queries}}}, queries {dataset: [qid]}, notes: how it was judged, as a
    caption says, warnings: what may be wrong, timing {run: [seconds, pairs]} from the RUN.json that rerank.py leaves.
    """

    def __init__(self, measures):
        self.measures, self.values, self.queries, self.timing, self.notes, self.warnings = measures, {}, {}, {}, [], []

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
                found = evaluate(qrels, run, actual)
                self.count(path, run, qrels, found)
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
            more = seconds, pairs = float(spent["seconds"]), int(spent["pairs"])
            if not (0 < pairs < 1e15 and 1e-9 < seconds / pairs < 1e9):
                raise ValueError("nothing that took time")
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            raise BadInput(f'{path}:1: not rerank.py\'s {{"seconds": ..., "pairs": ...}}, above 0: remove it') from None
        self.timing[run_name] = tuple(np.add(self.timing.get(run_name, (0, 0)), more).tolist())

    def count(self, path, run, qrels, found):
        """Warns of the queries that only the run or only the qrels have, and of a run without a judged document."""
        here = set(run.qids)
        missing, extra = [q for q in qrels if q not in here], [q for q in run.qids if q not in qrels]
        if len(missing) == len(qrels):
            raise BadInput(f"{path}: no query of it is judged in the qrels: is it a run on this dataset?")
        what = "queries of the qrels are missing and count 0", "queries are not in the qrels and are left out"
        for some, text in zip((missing, extra), what, strict=True):
            if some:
                ids = ", ".join(some[:5]) + ", ..." * (len(some) > 5)
                self.warnings.append(f"{path}: {len(some):,} {text} ({ids}).")
        nothing = not any(value > 0 for row in found.values() for value in row.values())
        if nothing and not any(judged for _, judged in judged_ranks(qrels, run, trec_order(run)).values()):
            self.warnings.append(f"{path}: NONE of its documents is judged: are its ids those of the qrels?")

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
                judge.warnings.append(f"{model}: {short} is absent, {len(found)} files for {len(seeds)} seeds.")
        if files:
            try:
                local = sorted(Path(qrels_folder).glob(f"{short}*")) if qrels_folder else []
                local = next((p for p in local if p.name.split(".")[0] == short), None)
                qrels = read_qrels(local) if local and local.is_file() else load_qrels(str(local or dataset))
            except BadInput as e:
                judge.warnings.append(f"{short} is absent, its {len(files)} runs have no qrels: {e}")
                continue
            judge.add(dataset, qrels, files, dataset)
    stray = [str(p) for f in folders for p in sorted(f.rglob("*.run*")) if p not in used and p.suffix != ".json"]
    if stray:
        judge.warnings.append(f"Not named as a dataset of the suite (--help) and left out: {', '.join(stray)}.")
    if not judge.queries:
        raise BadInput(" ".join([f"{folder}: no FOLDER/<model>/<dataset>.run to judge (--help).", *judge.warnings]))
    return judge


def backbone_and_loss(name):
    """("minilm", "infonce") of a run named minilm-infonce; None for other names."""
    match = re.fullmatch(rf"(.+)-({'|'.join(LOSSES)})( \(\d+ seeds\))?", name.lower())
    return match and (match[1], match[2])


def add_paper(shown, digits, notes, warnings):
    """The rows, below each that is named BACKBONE-LOSS the paper's figures and the difference."""
    data = json.loads(read_bytes(Path(__file__).with_name("results") / "paper-ndcg10.json"))
    rows, known = {}, {(row["backbone"], row["loss"]): row for row in data["rows"]}
    notes.append(f"paper: {data['what']} ({data['source']}).")
    for name, row in shown.items():
        rows[name], theirs = row, known.get(backbone_and_loss(name))
        if theirs is None:
            warnings.append(f"{name}: no row of the paper; its names are BACKBONE-LOSS, e.g. minilm-infonce.")
            continue
        values = dict(zip(data["columns"], theirs["values"], strict=True))
        rows[f"{name}: paper, {' '.join(theirs['paper'])}"] = {c: Entry(values[c], f"{values[c]:.3f}") for c in row}
        gap = {c: None if e.value is None else e.value - values[c] for c, e in row.items()}
        rows[f"{name}: ours - paper"] = {c: Entry(d, "" if d is None else f"{d:+.{digits}f}") for c, d in gap.items()}
    return rows


def print_differences(args, qrels):
    """The queries on which two runs differ most, with the texts that moved within, into or out of the top 10."""
    runs = [load_run(path, args.dataset)[0] for path in args.diff]
    measure = measure_for(args.measures[0], args.dataset)
    before, after = ({q: row[measure] for q, row in evaluate(qrels, run, [measure]).items()} for run in runs)
    ranked = [run.take(trec_order(run), run.starts).nested() for run in runs]
    texts = texts_of(args.dataset) if args.dataset else None
    change = {q: after[q] - before[q] for q in qrels}
    higher, lower = (sum(sign * c > 0 for c in change.values()) for sign in (1, -1))
    print("A = {}\nB = {}".format(*map(text_of, args.diff)))
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
            print(f"| {ranks[0].get(d, '-'):>3} | {ranks[1].get(d, '-'):>3} | {qrels[q].get(d, '-'):>5} | {d} {text} |")


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
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylabel="mean, 95 % bootstrap interval")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def plot_heatmap(plt, judge, table, args):
    named = {n: pair for n in table if (pair := backbone_and_loss(n))}
    columns = [c for c in next(iter(table.values())) if any(table[n][c] is not None for n in named)]
    if not columns:
        raise BadInput("--plot-kind heatmap needs runs named BACKBONE-LOSS, e.g. minilm-infonce, and a whole column")
    left_out(table, named, "not named BACKBONE-LOSS")
    backbones = list(dict.fromkeys(backbone for backbone, _ in named.values()))
    losses = [loss for loss in LOSSES if loss in {x for _, x in named.values()}]
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
        axis.set_xticks(range(len(losses)), losses, rotation=35, ha="right", rotation_mode="anchor")
        axis.set(title=column, yticks=range(len(backbones)), yticklabels=backbones)
    return figure


def plot_difference(plt, judge, table, args):
    columns = [c for c in next(iter(table.values())) if all(row[c] is not None for row in table.values())]
    if len(table) != 2 or len(judge.queries) > 1 or not columns:
        raise BadInput("--plot-kind difference takes two runs on one dataset")
    (first, second), column, (queries,) = table, columns[0], judge.queries.values()
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
    counts = f"{len(delta)} queries: {better} better, {worse} worse, {len(delta) - better - worse} equal"
    axis.set(xticks=[], xlabel=counts, ylabel=f"difference in {column}")
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
    axis.set(xscale="log", xlabel="milliseconds per query-document pair", ylabel=f"{column}, 95 % bootstrap interval")
    axis.margins(x=0.2)
    low, high = axis.get_xlim()
    ticks = [x for x in (m * 10.0**k for k in range(-3, 6) for m in (1, 2, 3, 5, 7)) if low <= x <= high]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set_xticks([], minor=True)
    return figure


PLOTS = {"bars": plot_bars, "heatmap": plot_heatmap, "difference": plot_difference, "latency": plot_latency}
PICTURES = {".png": None, ".pdf": "CreationDate", ".svg": "Date"}  # what matplotlib calls the time it writes in them


def picture(judge, table, args):
    """The picture's bytes, of the kind its name says. matplotlib is imported here only: nothing else needs it."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}
    with plt.rc_context(look | {"text.parse_math": False, "svg.hashsalt": ""}):  # a query may hold dollar signs
        figure, file, kind = PLOTS[args.plot_kind](plt, judge, table, args), io.BytesIO(), args.plot[-4:].lower()
        undated = PICTURES[kind] and {PICTURES[kind]: None}  # the same table gives the same bytes
        figure.savefig(file, format=kind[1:], dpi=200, bbox_inches="tight", metadata=undated)
        plt.close(figure)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ command line


def guarded(main, interrupted="interrupted; the same command goes on where this one stopped"):
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
        print(interrupted, file=sys.stderr)
        return 130
    except MemoryError as e:
        why = f"out of memory ({e}); a smaller --batch-size, --list-size, --depth or --max-tokens takes less"
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
    print(f"error: {' '.join(str(why).splitlines())}", file=sys.stderr)  # names may hold line breaks
    return 2


class Parser(argparse.ArgumentParser):
    """argparse whose errors are BadInput: one line, as for every other bad input."""

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def at_least(least, most=10**9):
    """The type of a flag that takes whole numbers from `least` to `most`."""

    def whole(text):
        if not re.fullmatch(r"-?[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: a whole number from {least} to {most:,}")
        return int(text)

    return whole


def parse_args(argv):
    names = "names of the run files of the suites:\n"
    for suite, columns in SUITES.items():
        lines = "; ".join(f"{column} = {' '.join(group)}" for column, group in columns.items())
        names += textwrap.fill(f"{suite}: {lines}", 110, initial_indent="  ", subsequent_indent="    ") + "\n"
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="evaluate.py", description=__doc__, epilog=names, formatter_class=form)
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
    add("--digits", type=at_least(0, 15), default=4, help="decimals (default: 4)")
    add("--per-query", nargs="?", const="-", metavar="FILE", help="all values as TSV; without FILE to stdout alone")
    add("--plot", metavar="FILE.png", help="a picture of the first table; also .pdf .svg (matplotlib)")
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
    if args.plot and Path(args.plot).suffix.lower() not in PICTURES:
        raise BadInput(f"--plot {args.plot}: name it .png, .pdf or .svg")
    read = *args.runs, args.baseline, args.qrels, args.folder, args.dataset, args.dataset and f"{args.dataset}/../qrels"
    taken = {Path(os.path.realpath(f"{path}{end}")) for path in read if path for end in ("", ".json")}
    for path in [p for p in (args.plot, args.per_query) if p not in (None, "-")]:
        if Path(path).exists() and not args.overwrite:
            raise BadInput(f"{path}: exists already: choose another name or add --overwrite")
        place = Path(os.path.realpath(path))  # resolve() raises where a link leads to itself
        if place in taken or (place.exists() and taken & set(place.parents)):
            raise BadInput(f"{path}: this command reads it, or writes it already: choose another name")
        taken.add(place)
        if not Path(path).parent.is_dir():
            raise BadInput(f"{path}: the folder {Path(path).parent} does not exist: make it first")
    return args


def report(judge, columns, title, args):
    """(table, text in the chosen format) of one table."""
    table, absent = judge.table(columns)
    notes, warnings, baseline = list(map(text_of, judge.notes)), list(map(text_of, judge.warnings)), None
    if args.baseline:
        near = {args.baseline, *grouped([args.baseline])}
        baseline = next((n for n in table if n in near or n.partition(" (")[0] in map(without_seed, near)), None)
        if baseline is None:
            raise BadInput(f"--baseline {args.baseline}: not one of the runs: {', '.join(table)}")
    tested = args.test != "none" and len(table) > 1
    if tested and baseline is None and len(table) > len(LETTERS):
        warnings.append(f"Not tested: {len(table)} runs are too many for letters; test against one with --baseline.")
        tested = False
    comparisons = compare(table, baseline, args.test, seed=args.seed) if tested else []
    letters = dict(zip(table, LETTERS, strict=False)) if comparisons and baseline is None else {}
    shown = entries(table, comparisons, baseline, args.digits, args.intervals, args.seed, absent)
    if any(cell is None for row in table.values() for cell in row.values()):
        warnings.append("absent: without run or qrels; no mean is formed over a part of its datasets.")
    if args.intervals:
        notes.append("[low, high]: 95 % interval of the mean, percentile bootstrap over queries, 10,000 resamples.")
    if comparisons:
        notes.append(what_was_tested(table, comparisons, baseline, args.test))
    if args.compare:
        shown = add_paper(shown, args.digits, notes, warnings)
    if args.format != "json":
        write = {"markdown": markdown, "latex": latex, "csv": as_csv}[args.format]
        return table, write(title, shown, letters, notes, warnings)
    runs = {n: {c: e._asdict() for c, e in row.items()} for n, row in shown.items()}
    tests = [c._asdict() | {"significant": c.p_holm < ALPHA} for c in comparisons]
    what = {"title": title, "letters": letters, "runs": runs, "tests": tests, "notes": notes + warnings}
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
        judge, name = Judge(args.measures), text_of(args.dataset or args.qrels)
        qrels = load_qrels(args.dataset) if args.dataset else read_qrels(args.qrels)
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
                    pairs = zip(judge.queries[d], values.tolist(), strict=True)
                    shown = m if args.qrels and not args.suite else measure_for(m, d)
                    lines += [f"{n}\t{d}\t{q}\t{shown}\t{value!r}" for q, value in pairs]
        files[args.per_query] = ("\n".join(lines) + "\n").encode()
    for path, content in files.items():
        if path != "-":
            part = Path(f"{path}.{os.getpid()}.tmp")
            try:
                part.write_bytes(content)  # renamed when whole: no reader meets half a file
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
    texts = [text for _, text in done]
    if args.format == "json" and len(texts) > 1:
        texts = ["[" + ",\n".join(texts) + "]"]
    print(files["-"].decode().rstrip("\n") if "-" in files else "\n\n".join(texts))
    return 0


if __name__ == "__main__":
    # rerank.py imports this file as `evaluate`. Run under that name, or there would be two classes BadInput and the
    # one that rerank raises would pass the `except` of the other.
    import evaluate as this

    sys.exit(this.guarded(this.main, "interrupted"))
