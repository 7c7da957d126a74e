"""Triples in a TSV, read by line at random: `qid pos neg`, or with a teacher's scores before."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from data.cache import cached, from_cache
from data.command import BadInput, Progress, say
from data.packed import reading, unpacked
from data.texts import Texts

BLOCK = 1 << 24  # bytes of the file that are read at a time


class TripleFile:
    """A TSV of `qid pos neg`, or of Hofstätter's `pos_score neg_score qid pos_pid neg_pid`, gzip
    and zstd too, by line.

    pyarrow reads it once into an Arrow file of the cache, which is memory-mapped: 40 million lines
    open in seconds, and nothing of them is held as Python objects. With `texts` the first line is a
    header where its query is none of the dataset's and the second's is. Blank lines at the end are
    left out.

    Attributes: columns, 3 or 5; header: whether there is one; len(): the lines without it.

    Raises:
        BadInput: FILE:LINE of a line with another number of columns, without a query or not UTF-8;
            a damaged file; queries of another dataset.
    """

    def __init__(self, path: Path, texts: Texts | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise BadInput(f"{path}: not found")
        stat = path.stat()
        stamp = f"triples {path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        file = cached("triples", stamp, partial(_to_arrow, path)) / "lines.arrow"
        with from_cache(file):
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.starts = np.cumsum([0, *map(len, self.batches)])
        self.columns, self.header = self.batches[0].num_columns, 0
        if texts:
            self._find_header(texts)

    def _find_header(self, texts: Texts) -> None:
        known = [self.fields(i)[-3] in texts.all_queries for i in range(min(2, len(self)))]
        if not any(known):
            raise BadInput(f"{self.path}:1: query {self.fields(0)[-3][:60]!r} is not in dataset "
                           f"{texts.name}; triples hold ids, not texts: qid pos neg")
        if not known[0]:
            say(f"{self.path}:1: taken for a header and skipped")
            self.header = 1

    def __len__(self) -> int:
        return int(self.starts[-1]) - self.header

    def fields(self, i: int) -> list[str]:
        """The columns of line i, from 0 behind the header."""
        row = i + self.header
        batch = int(np.searchsorted(self.starts, row, "right")) - 1
        at = row - int(self.starts[batch])
        return self._decoded(i, [column[at].as_py() for column in self.batches[batch].columns])

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        """(qid, positive, negative) of every line, in order."""
        for start, batch in zip(self.starts.tolist(), self.batches, strict=False):
            ids = [column.to_pylist() for column in batch.columns[-3:]]
            for i, row in enumerate(zip(*ids, strict=True), start - self.header):
                if i >= 0:  # -1: the header
                    yield tuple(self._decoded(i, row))

    def _decoded(self, i: int, columns: Iterable[bytes]) -> list[str]:
        """Text of columns of line i; BadInput where it is not UTF-8."""
        try:
            return [column.decode() for column in columns]
        except UnicodeDecodeError:
            raise BadInput(f"{self.where(i)}: not UTF-8; convert the file (iconv -t UTF-8)"
                           ) from None

    def where(self, i: int) -> str:
        return f"{self.path}:{i + self.header + 1}"


def _to_arrow(path: Path, folder: Path) -> None:
    """The lines of a TSV as folder/lines.arrow, their columns as bytes; blank lines at the end are
    left out. BadInput names a line that is wrong."""
    columns = _columns_of(path)
    try:
        rows, regular = _convert(path, columns, folder / "lines.arrow")
    except BadInput:
        _check_lines(path, columns)
        raise
    if not regular and _check_lines(path, columns) != rows:
        raise BadInput(f"{path}: lines hold carriage returns; convert the file (dos2unix)")


def _columns_of(path: Path) -> int:
    """3 or 5, by the first line."""
    with reading(path), pa.OSFile(str(path)) as raw, io.BufferedReader(unpacked(raw)) as lines:
        first = lines.readline()
    if not first.strip():
        raise BadInput(f"{path}: empty; expected one triple per line")
    columns = first.count(b"\t") + 1
    if columns not in (3, 5):
        raise BadInput(f"{path}:1: {columns} tab-separated columns; expected qid pos neg, or "
                       "pos_score neg_score qid pos_pid neg_pid")
    return columns


def _convert(path: Path, columns: int, to: Path) -> tuple[int, bool]:
    """Writes the lines up to the first that is blank or has no query: (their number, whether none
    is left out)."""
    names, rows, regular = [str(i) for i in range(columns)], 0, True

    def odd(row):
        nonlocal regular
        regular = False
        return "error" if row.text.strip() else "skip"

    with (
        reading(path),
        pa.OSFile(str(path)) as raw,
        unpacked(raw) as source,
        Progress(total=path.stat().st_size, desc=f"read {path.name}", unit="B", unit_scale=True,
                 leave=False) as bar,
        pa.OSFile(str(to), "wb") as sink,
    ):
        reader = pa.csv.open_csv(
            source,
            pa.csv.ReadOptions(column_names=names, block_size=BLOCK),
            pa.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False,
                                invalid_row_handler=odd),
            pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary())),
        )
        with pa.ipc.new_file(sink, reader.schema) as writer:
            for batch in reader:
                # a line that is quite empty is no odd row to pyarrow, but one of empty columns
                gaps = pc.indices_nonzero(pc.equal(pc.binary_length(batch.column(columns - 3)), 0))
                whole = batch.slice(0, gaps[0].as_py()) if len(gaps) else batch
                writer.write_batch(whole)
                rows += len(whole)
                if len(gaps):
                    return rows, False
                bar.update(raw.tell() - bar.n)
    return rows, regular


def _check_lines(path: Path, columns: int) -> int:
    """The number of lines; BadInput for the first with another number of columns, or without a
    query. Blank lines may come last and are not counted."""
    blank, whole = None, 0
    with reading(path), pa.OSFile(str(path)) as raw, io.BufferedReader(unpacked(raw)) as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split(b"\t")
            if not line.strip():
                blank = blank or (number, len(fields))
            elif blank or len(fields) != columns:
                number, found = blank or (number, len(fields))
                raise BadInput(f"{path}:{number}: {found} tab-separated columns, {columns} in the "
                               "lines before; mend or remove the line")
            elif not fields[-3]:
                raise BadInput(f"{path}:{number}: the id of its query is empty; mend or remove the "
                               "line")
            else:
                whole = number
    return whole
