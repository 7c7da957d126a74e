"""Lists that carry their texts: JSONL of {"query", "pos", "neg", "pos_scores", "neg_scores"}, as
FlagEmbedding, sentence-transformers' users and most exports have them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.cache import cached, from_cache
from data.command import BadInput, Progress, say
from data.packed import reading, unpacked
from data.runs import atomic_write
from data.texts import SURROGATE, json_object

SIDES = ("pos", "neg")
HIGHEST = float(np.finfo(np.float32).max)
EXPECTED = '{"query": "...", "pos": ["..."], "neg": ["..."]}'


def carries_texts(name: str | Path | None) -> bool:
    """Whether a file of lists is, by its name, JSONL."""
    return bool(re.search(r"\.jsonl?(\.gz|\.zst)?$", str(name or "")))


class ListFile:
    """A JSONL of lists by line, gzip and zstd too; and the dataset of their texts, for all that
    asks for texts by id: the query of line 17 is "line17", its documents "line17.0", "line17.1",
    ..., the relevant ones first.

    The file is looked through once, and the cache keeps where its lines begin and what they hold:
    nothing of millions of lines is a Python object. A plain file is read where it lies, a packed
    one is kept unpacked in the cache.

    Attributes, one row per line that is not blank: numbers, from 1; starts [lines + 1], where its
    documents begin in positive, first and scores [documents]: whether it is relevant, whether its
    text stands in the list for the first time, its teacher's score (NaN: none).

    Raises:
        BadInput: FILE:LINE of a line that is none of EXPECTED, or whose scores are not one finite
            number a text.
    """

    folder = None  # of no folder in BEIR layout

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        if not path.is_file():
            raise BadInput(f"{path}: not found")
        folder = cached("lists", f"lists {self.fingerprint()}", partial(_index, path))
        with from_cache(folder):
            parts = ("spans", "numbers", "starts", "positive", "first", "scores")
            self.spans, self.numbers, self.starts, self.positive, self.first, self.scores = (
                np.load(folder / f"{part}.npy", mmap_mode="r") for part in parts)
            unpacked_lines = folder / "lines.jsonl"
            self.lines = os.open(unpacked_lines if unpacked_lines.exists() else path, os.O_RDONLY)
        self.all_queries = _Queries(self)
        repeated = len(self.first) - int(self.first.sum())
        if repeated:
            say(f"{path}: {repeated:,} texts stand in their list twice; the first one counts, a "
                "relevant one before others")

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, line: int) -> dict:
        """The object of a line, from 0, as it stands in the file."""
        start, size = self.spans[line].tolist()
        return json.loads(os.pread(self.lines, size, start))

    def line_of(self, name: str) -> int:
        """The line, from 0, of the id of a query or document."""
        return int(np.searchsorted(self.numbers, int(name.removeprefix("line").partition(".")[0])))

    def qid(self, line: int) -> str:
        return f"line{self.numbers[line]}"

    def docids(self, line: int) -> list[str]:
        qid = self.qid(line)
        return [f"{qid}.{i}" for i in range(self.starts[line + 1] - self.starts[line])]

    def documents(self, docids: Iterable[str]) -> dict[str, str]:
        """{docid: text}."""
        found, texts_of = {}, {}
        for docid in docids:
            qid, _, place = docid.partition(".")
            if qid not in texts_of:
                texts_of[qid] = _texts(self.row(self.line_of(qid)))
            found[docid] = SURROGATE.sub("\ufffd", texts_of[qid][int(place)])
        return found

    def corpus(self) -> Iterator[tuple[str, str]]:
        """(docid, text) of every document, in the order of the file."""
        for line in range(len(self)):
            texts = _texts(self.row(line))
            for docid, text in zip(self.docids(line), texts, strict=True):
                yield docid, SURROGATE.sub("\ufffd", text)

    def fingerprint(self) -> str:
        """Changes when the file does (size and time), for caches."""
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"

    def digest(self) -> str:
        """Of queries and judgments beside the texts: there are none."""
        return ""

    def reopen(self) -> None:
        """A forked worker reads by position: it may share the file."""

    def run(self) -> Mapping[str, dict[str, float]]:
        """All lists as a run, {qid: {docid: 0.0}}, made line by line when asked for."""
        return _Candidates(self)

    def where(self, line: int) -> str:
        return f"{self.path}:{self.numbers[line]}"


class _ByQuery(Mapping):
    """{qid: something of its line}."""

    def __init__(self, file: ListFile) -> None:
        self.file = file

    def __len__(self) -> int:
        return len(self.file)

    def __iter__(self) -> Iterator[str]:
        return map(self.file.qid, range(len(self.file)))


class _Queries(_ByQuery):
    """{qid: text}."""

    def __getitem__(self, qid: str) -> str:
        return SURROGATE.sub("\ufffd", self.file.row(self.file.line_of(qid))["query"])


class _Candidates(_ByQuery):
    """{qid: {docid: 0.0}}."""

    def __getitem__(self, qid: str) -> dict[str, float]:
        return dict.fromkeys(self.file.docids(self.file.line_of(qid)), 0.0)


def write_scored(out: Path, scores: Iterable[tuple[str, dict[str, float]]], file: ListFile) -> None:
    """The lines of `file` with these scores (a qid and {docid: score} for every line, in order) in
    place of their own; all else of a line is kept."""
    with atomic_write(out) as lines:
        for line, (_, ranked) in enumerate(scores):
            row = file.row(line)
            values = iter([float(ranked[docid]) for docid in file.docids(line)])
            for side in SIDES:
                row[f"{side}_scores"] = [next(values) for _ in row.get(side) or []]
            lines.write(SURROGATE.sub("\ufffd", json.dumps(row, ensure_ascii=False)) + "\n")


# ------------------------------------------------------------------------------------- the index


def _texts(row: dict) -> list[str]:
    return [text for side in SIDES for text in row.get(side) or []]


def _index(path: Path, folder: Path) -> None:
    """Fills a folder of the cache with what ListFile keeps of a file."""
    spans, numbers, starts = array("q"), array("q"), array("q", [0])
    positive, first, scores = array("b"), array("b"), array("d")
    mended = 0
    for number, (offset, line) in enumerate(_lines(path, folder / "lines.jsonl"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = json_object(line, where)
        texts, values = _checked(row, where)
        seen = set()
        for text in texts:
            first.append(text not in seen)
            seen.add(text)
        relevant = len(row.get("pos") or [])
        positive.extend([True] * relevant + [False] * (len(texts) - relevant))
        scores.extend(values)
        spans.extend((offset, len(line)))
        numbers.append(number)
        starts.append(len(scores))
        mended += b"\\u" in line and any(map(SURROGATE.search, [row["query"], *texts]))
    if not numbers:
        raise BadInput(f"{path}:1: nothing in it; expected {EXPECTED} on a line")
    if mended:
        say(f"{path}: {mended:,} lines hold halves of surrogate pairs; each is read as U+FFFD")
    kept = {"spans": np.frombuffer(spans, np.int64).reshape(-1, 2),
            "numbers": np.frombuffer(numbers, np.int64), "starts": np.frombuffer(starts, np.int64),
            "positive": np.array(positive, bool), "first": np.array(first, bool),
            "scores": np.array(scores, np.float64)}
    for name, values in kept.items():
        np.save(folder / f"{name}.npy", values)


def _lines(path: Path, copy: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a file; those of a packed one are written to `copy`, where the offset is
    theirs."""
    with reading(path), contextlib.ExitStack() as stack:
        raw = stack.enter_context(pa.OSFile(str(path)))
        bar = stack.enter_context(Progress(total=path.stat().st_size, desc=f"read {path.name}",
                                           unit="B", unit_scale=True, leave=False))
        content, offset, keep = unpacked(raw), 0, lambda line: None
        if content is not raw:
            keep = stack.enter_context(open(copy, "wb")).write
        for line in io.BufferedReader(content):
            yield offset, line
            keep(line)
            offset += len(line)
            bar.update(raw.tell() - bar.n)


def _checked(row: dict, where: str) -> tuple[list[str], list[float]]:
    """(texts of the documents, relevant ones first; their scores, NaN where there are none) of a
    line; BadInput where it is not as expected."""
    for side in SIDES:
        texts = row.get(side) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadInput(f'{where}: "{side}" must be a list of texts; expected {EXPECTED}')
    texts = _texts(row)
    if not isinstance(row.get("query"), str) or not texts:
        raise BadInput(f"{where}: expected {EXPECTED}; further keys are ignored")
    sides = [side for side in SIDES if row.get(side)]
    scored = [side for side in sides if row.get(f"{side}_scores")]
    if not scored:
        return texts, [np.nan] * len(texts)
    if scored != sides:
        raise BadInput(f'{where}: has "{scored[0]}_scores" alone; give both sides scores, or none')
    return texts, [score for side in sides for score in _scores(row, side, where)]


def _scores(row: dict, side: str, where: str) -> list[float]:
    scores, texts = row[f"{side}_scores"], row[side]
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise BadInput(f'{where}: "{side}_scores" must be {len(texts)} numbers, one for each text '
                       f'of "{side}"')
    for score in scores:
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not number or not abs(score) <= HIGHEST:
            raise BadInput(f'{where}: "{side}_scores" holds {json.dumps(score)[:40]}, no finite '
                           "number (fp32)")
    return scores
