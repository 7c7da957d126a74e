"""TREC runs and qrels: read into columns or dictionaries, put in trec_eval's order, written whole.

Arrow's CSV reader takes the files that are as they should be; anything unusual goes to a plain
reader of lines, which either understands it (mixed blanks) or names the line that is wrong.

Works copied alone (it needs numpy and pyarrow); its errors are plain ValueErrors then.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

try:
    from data.command import BadInput
except ImportError:  # copied alone
    BadInput = ValueError

MAX_GRADE = 10_000  # trec_eval's `ndcg` takes the square of the highest grade: 17 ms a query here
GRADE = f"whole number from {-MAX_GRADE:,} to {MAX_GRADE:,}"
BOM = b"\xef\xbb\xbf"
HEAD = 1 << 16  # bytes of a run whose rank column is compared with the scores
PACKED = {"gzip": (b"\x1f\x8b", ".gz"), "zstd": (b"\x28\xb5\x2f\xfd", ".zst")}


def grade(value) -> int:
    """A grade of relevance, text or number, as int. Raises ValueError for what is not a GRADE."""
    number = float(value)
    if not number.is_integer() or abs(number) > MAX_GRADE:
        raise ValueError(f"not a {GRADE}")
    return int(number)


# query, document, value: their columns. number: reads a value. kind: what a value is called
Layout = namedtuple("Layout", "name columns query document value number kind line")
RUN = Layout("TREC run", 6, 0, 2, 4, float, "number", "qid Q0 docno rank score tag")
QRELS = Layout("TREC qrels", 4, 0, 2, 3, grade, GRADE, "qid 0 docno relevance")
BEIR = Layout("BEIR qrels", 3, 0, 1, 2, grade, GRADE, "query-id<TAB>corpus-id<TAB>score")


class Columns(NamedTuple):
    """A run or qrels with the lines of a query together: query i has the rows starts[i] to
    starts[i + 1]."""

    qids: list[str]
    starts: np.ndarray  # int64 [queries + 1]
    docids: pa.LargeStringArray  # [rows]
    values: np.ndarray  # float64 (run) or int64 (qrels) [rows]

    @classmethod
    def of(cls, nested: dict[str, dict[str, float]]) -> Columns:
        """Columns of {qid: {docid: value}}."""
        docids = [d for documents in nested.values() for d in documents]
        values = [v for documents in nested.values() for v in documents.values()]
        starts = np.cumsum([0, *map(len, nested.values())])
        return cls(list(nested), starts, pa.array(docids, pa.large_string()), np.array(values))

    def nested(self) -> dict[str, dict[str, float]]:
        """{qid: {docid: value}} of plain Python strings and numbers."""
        docids, values = self.docids.to_pylist(), self.values.tolist()
        starts = self.starts.tolist()
        bounds = zip(self.qids, starts, starts[1:], strict=False)
        return {q: dict(zip(docids[a:b], values[a:b], strict=True)) for q, a, b in bounds}

    def take(self, rows, starts) -> Columns:
        """The same queries with other rows, or these in another order."""
        docids = self.docids.take(pa.array(rows))
        return self._replace(starts=starts, docids=docids, values=self.values[rows])

    def query_of_rows(self) -> np.ndarray:
        """int64 [rows]: the number of the query that each row belongs to."""
        return np.repeat(np.arange(len(self.qids)), np.diff(self.starts))


# ----------------------------------------------------------------------------------------- reading


def read_run(path) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} of a TREC run (plain, gzip or zstd) in the order of the file.

    Raises:
        BadInput: FILE:LINE: what is wrong and what to do.
    """
    return read_columns(path, RUN).nested()


def read_qrels(path) -> dict[str, dict[str, int]]:
    """{qid: {docid: relevance}} of TREC qrels or of BEIR's, told apart by what they hold; as strict
    as read_run."""
    return read_columns(path, QRELS).nested()


def read_columns(path, layout: Layout, warn: Callable[[str], None] | None = None) -> Columns:
    """A file as Columns in its own order. Raises BadInput naming file and line. `warn` is called
    with a line of text where the scores of a run contradict its rank column."""
    data = read_bytes(path)
    start = len(data) - len(data.lstrip())
    if start == len(data):
        raise BadInput(f"{path}:1: the file is empty: a {layout.name} has lines of "
                       f"`{layout.line}`")
    fields = data[start:].split(b"\n", 1)[0].split(b"\t") if layout is QRELS else ()
    if len(fields) == BEIR.columns and len(fields[-1].split()) == 1:
        layout = BEIR
        try:
            float(fields[-1].decode())
        except ValueError:  # a header: its line is left empty, the others keep their numbers
            data = data[:start] + data[start + len(b"\t".join(fields)) :]
    columns = _read_arrow(data, layout) or Columns.of(_read_lines(path, data, layout))
    if layout is RUN:
        _compare_ranks(path, data[:HEAD], warn)
    return columns


def read_bytes(path) -> bytes:
    """Content of a file, unpacked if it begins as gzip or zstd does."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror or e}") from None
    for name, (magic, suffix) in PACKED.items():
        if data.startswith(magic):
            try:
                return pa.CompressedInputStream(pa.BufferReader(data), name).read()
            except (OSError, pa.ArrowException) as e:
                raise BadInput(
                    f"{path}: damaged {name} data, fetch or write it again ({e})") from None
        if str(path).endswith(suffix):
            raise BadInput(f"{path}:1: named {suffix} but the content is not {name}: rename or "
                           "repack it")
    return data


def _compare_ranks(path, head: bytes, warn: Callable[[str], None] | None) -> None:
    """Says on stderr that the scores of these lines fall towards rank 1, or else calls `warn` where
    a score is above that of a better rank."""
    ranked = _scores_by_rank(head)
    if _fall_towards_first(ranked.values()):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{path}: scores fall towards rank 1: are they ranks or distances? Higher must "
                  "be better: negate them", file=sys.stderr)
        return
    contradicted = [q.decode() for q, scores in ranked.items() if _rise(scores)]
    if warn and contradicted:
        warn(f"{path}: the scores contradict the rank column, which is ignored as by trec_eval, in "
             f"{len(contradicted)} of the {len(ranked)} queries in its first {HEAD >> 10} kB (e.g. "
             f"{contradicted[0]}): is the order that is meant in the ranks?")


def _scores_by_rank(head: bytes) -> dict[bytes, list[float]]:
    """{query: its scores from the best rank to the last} of lines of a run; without the queries
    that have one rank only."""
    ranked: dict[bytes, dict[float, float]] = {}
    for fields in map(bytes.split, head.splitlines()):
        if len(fields) == RUN.columns and fields[3].isdigit():
            ranked.setdefault(fields[0], {})[float(fields[3])] = float(fields[4].decode())
    return {q: [scores[rank] for rank in sorted(scores)] for q, scores in ranked.items()
            if len(scores) > 1}


def _fall_towards_first(lists: Iterable[list[float]]) -> bool:
    """Whether the scores fall, line by line, from the last rank to the first in most queries."""
    return 2 * sum(x[0] < x[-1] and x == sorted(x) for x in lists) > len(lists)


def _rise(scores: list[float]) -> bool:
    """Whether a score is above the one before it, in trec_eval's single precision."""
    with np.errstate(over="ignore"):
        single = np.float32(scores)
    return bool((single[1:] > single[:-1]).any())


def _read_arrow(data: bytes, layout: Layout) -> Columns | None:
    """Columns of well-formed text with one blank or one tab between columns; None for anything
    else."""
    delimiter, other = b" ", b"\t"
    if b"\t" in data[: data.find(b"\n", 1)]:
        delimiter, other = other, delimiter
    odd = (other, b"\r", b"\v", b"\f", b"\0")
    if data.endswith(delimiter) or any(byte in data for byte in odd) or _gap(data, delimiter):
        return None
    names = [str(i) for i in range(layout.columns)]
    query, document, value = (names[i] for i in (layout.query, layout.document, layout.value))
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
    values, docids = table[value].to_numpy(), table[document].combine_chunks()
    if not len(table) or not np.isfinite(values).all():
        return None
    if not pc.min(pc.binary_length(docids)).as_py():
        return None
    if layout is not RUN:
        if ((values != np.rint(values)) | (np.abs(values) > MAX_GRADE)).any():
            return None
        values = values.astype(np.int64)
    return _gathered(table[query], docids, values)


def _gap(data: bytes, delimiter: bytes) -> bool:
    """Whether nothing stands between two delimiters, or a delimiter and the end of a line."""
    text = np.frombuffer(data, np.uint8)
    parts = (text[i : i + (1 << 20) + 1] for i in range(0, len(text), 1 << 20))
    return any(((part[:-1] == delimiter[0]) & (part[1:] <= 32)).any() for part in parts)


def _gathered(query, docids, values) -> Columns | None:
    """Columns of rows in the order of a file, scattered lines of a query brought together; None
    where a document appears twice or a query has no name."""
    rows = len(values)
    change = pc.not_equal(query.slice(1), query.slice(0, rows - 1)).to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(change) + 1, [rows]])
    qids = query.take(pa.array(starts[:-1])).to_pylist()
    whole = Columns(qids, starts, docids, values)
    if len(set(qids)) < len(qids):
        first = {q: i for i, q in enumerate(dict.fromkeys(qids))}
        which = np.repeat([first[q] for q in qids], np.diff(starts))
        starts = np.concatenate([[0], np.cumsum(np.bincount(which))])
        whole = whole._replace(qids=list(first)).take(np.argsort(which, kind="stable"), starts)
    bounds = zip(starts.tolist(), starts[1:].tolist(), strict=False)
    once = all(b - a == 1 or len(whole.docids.slice(a, b - a).unique()) == b - a
               for a, b in bounds)
    return whole if once and "" not in qids else None


def _read_lines(path, data: bytes, layout: Layout) -> dict[str, dict[str, float]]:
    """{qid: {docid: value}} from text with any blanks between columns. Raises BadInput at the
    first wrong line."""
    nested: dict[str, dict[str, float]] = {}
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        if not line.strip():
            continue
        query, document, value = _fields_of(line, f"{path}:{number}", layout)
        if document in nested.setdefault(query, {}):
            raise BadInput(f"{path}:{number}: document {document} appears twice for query {query}: "
                           "keep one of the lines")
        nested[query][document] = value
    if not nested:
        raise BadInput(f"{path}:1: there are no judgments below the header")
    return nested


def _fields_of(line: bytes, where: str, layout: Layout) -> tuple[str, str, float]:
    """(query, document, value) of a line; BadInput where it is none of the layout."""
    fields = line.split(b"\t") if layout is BEIR else line.split()
    if len(fields) != layout.columns:
        raise BadInput(f"{where}: {len(fields)} columns, a {layout.name} has {layout.columns}: "
                       f"`{layout.line}`")
    try:
        places = layout.query, layout.document, layout.value
        query, document, text = (fields[i].strip().decode() for i in places)
    except UnicodeDecodeError as e:
        raise BadInput(f"{where}: not UTF-8 ({e.reason}): convert the file to UTF-8") from None
    try:
        value = layout.number(text.replace("_", "?"))  # Python alone would read 1_000 as a number
    except (ValueError, OverflowError):
        raise BadInput(f"{where}: `{text[:40]}` is not a {layout.kind}: the line must be "
                       f"`{layout.line}`") from None
    if not np.isfinite(value):
        raise BadInput(f"{where}: document {document} of query {query} has the score {text[:40]}: "
                       "not finite")
    if not query or not document or "\0" in query + document:
        raise BadInput(f"{where}: an id that is empty or holds a NUL: the line should be "
                       f"`{layout.line}`")
    return query, document, value


def line_of(run: Path, qid: str, docid: str | None = None) -> int:
    """The line of a TREC run that first names this query (and document); runs are only read again
    to report an error."""
    for number, line in enumerate(read_bytes(run).removeprefix(BOM).split(b"\n"), 1):
        field = line.split()  # as bytes: the blanks of Unicode are of an id
        if field and field[0] == qid.encode() and (docid is None or field[2] == docid.encode()):
            return number
    return 0


# ------------------------------------------------------------------------------------------- order


def trec_order(run: Columns) -> np.ndarray:
    """int64 [rows]: the rows of `run` as trec_eval ranks them, query by query: the score falls,
    ties by document id descending. Scores that differ only beyond single precision are tied, as
    trec_eval keeps floats. The result has the rows of query i at starts[i] to starts[i + 1].

    >>> run = Columns.of({"q": {"d1": 0.5, "d2": 0.9, "d3": 0.5, "d4": 0.1}})
    >>> trec_order(run).tolist()  # d3 goes before d1
    [1, 2, 0, 3]
    """
    with np.errstate(over="ignore"):
        scores = run.values.astype(np.float32)
    order, query = np.arange(len(scores)), run.query_of_rows()
    same_query = query[1:] == query[:-1]
    if (same_query & (scores[1:] > scores[:-1])).any():  # not sorted as it stands in the file
        order = np.lexsort((-scores, query))
        scores = scores[order]
    # of the places in the order: those tied with the place before, and whoever is in a tie
    as_before = np.flatnonzero(same_query & (scores[1:] == scores[:-1])) + 1
    tied = np.union1d(as_before - 1, as_before)
    group = np.cumsum(~np.isin(tied, as_before))  # a new one where the place before is not tied
    names = pa.table({"group": group, "docid": run.docids.take(pa.array(order[tied]))})
    by = [("group", "ascending"), ("docid", "descending")]
    order[tied] = order[tied][pc.sort_indices(names, sort_keys=by).to_numpy()]
    return order


def best_first(ranked: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """(docid, score) by trec_eval's rule: score descending, ties by document id descending."""
    return sorted(ranked, key=lambda pair: (pair[1], pair[0]), reverse=True)


# ----------------------------------------------------------------------------------------- writing


def write_run(path: str | Path, run: dict[str, dict[str, float]], tag: str = "run") -> None:
    """Writes a TREC run (packed where the name ends in .gz or .zst), complete or not at all."""
    with atomic_write(Path(path)) as file:
        for qid, ranked in run.items():
            file.write(run_lines(qid, ranked, tag))


def run_lines(qid: str, ranked: dict[str, float], tag: str) -> str:
    """TREC lines of one query, best first; a float32 score is written with the fewest digits that
    keep it exact."""
    rows = enumerate(best_first(ranked.items()), 1)
    return "".join(f"{qid} Q0 {docid} {rank} {score!s} {tag}\n" for rank, (docid, score) in rows)


def run_tag(model: str) -> str:
    """The last column of a run: a model's name, with _ for what would be taken for another
    column."""
    return re.sub(r"\s+|[\x00-\x1f\x7f\ud800-\udfff]", "_", Path(model).name) or "run"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name complete and on the disk, or not at all (.gz and .zst
    packed)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as raw:
            binary = raw
            if path.suffix == ".gz":  # no name and no time in its header: same content, same bytes
                binary = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
            elif path.suffix == ".zst":
                binary = pa.CompressedOutputStream(pa.PythonFile(raw, "w"), "zstd")
            with io.TextIOWrapper(binary, encoding="utf-8") as file:
                yield file
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
