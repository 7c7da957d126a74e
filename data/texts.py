"""Queries, documents and relevance judgments of a dataset, and the tokens of its documents.

A dataset is an ir_datasets id, a folder in BEIR layout (corpus.jsonl, queries.jsonl,
qrels/SPLIT.tsv; FOLDER/SPLIT picks one) or `pydocs`, known-item search over the docstrings of the
installed Python packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data.cache import sha256_of
from data.command import BadInput, say
from data.runs import BOM, read_bytes, read_qrels

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, alone: no character
NOT_AN_ID = re.compile(r"[\s\x00-\x1f\x7f\ud800-\udfff]|^$")


def folder_of(dataset: str, split: str) -> tuple[Path | None, str]:
    """(folder in BEIR layout, split) that a dataset's name means; (None, split) for an id of
    ir_datasets. `split` counts where the name has none."""
    path = Path(dataset)
    if dataset == "pydocs" or dataset.startswith("pydocs/"):
        from data.pydocs import pydocs_folder

        return pydocs_folder(), dataset.partition("/")[2] or split
    if path.is_dir():
        return path, split
    if (path.parent / "qrels" / f"{path.name}.tsv").is_file():
        return path.parent, path.name
    return None, split


def check_dataset(dataset: str, split: str = "test") -> None:
    """BadInput for what Texts cannot open, as far as this is known without reading or fetching
    it."""
    folder, split = folder_of(dataset, split)
    if folder:
        files_of(folder)
        qrels_of(folder, split)
    else:
        irds_of(dataset)


def files_of(folder: Path) -> tuple[Path, Path]:
    """corpus.jsonl and queries.jsonl of a folder in BEIR layout; BadInput where one is missing."""
    files = folder / "corpus.jsonl", folder / "queries.jsonl"
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file}: not found; a BEIR folder holds corpus.jsonl, "
                           "queries.jsonl, qrels/*.tsv")
    return files


def qrels_of(folder: Path, split: str) -> Path | None:
    """qrels/SPLIT.tsv of a folder; None where nothing in it is judged, BadInput where only other
    splits are."""
    file = folder / "qrels" / f"{split}.tsv"
    if file.is_file():
        return file
    if found := ", ".join(splits_of(folder)):
        raise BadInput(f"{file}: not found; splits here: {found} (name one as {folder}/SPLIT)")
    return None


def irds_of(dataset: str):
    """The dataset of ir_datasets by its id, not read yet; BadInput where there is none with
    documents and queries as text."""
    import ir_datasets

    try:
        found = ir_datasets.load(dataset)
    except KeyError:
        raise BadInput(f"dataset {dataset!r}: neither a folder nor an ir_datasets id nor "
                       "pydocs; ids are listed at https://ir-datasets.com") from None
    for part in ("docs", "queries"):
        if not getattr(found, f"has_{part}")():
            raise BadInput(f"dataset {dataset!r}: ir_datasets has no {part} for it; take an "
                           "id that has docs and queries: https://ir-datasets.com")
        kind = getattr(found, f"{part}_cls")()
        if not hasattr(kind, "default_text"):
            raise BadInput(f"dataset {dataset!r}: ir_datasets knows no default text of its "
                           f"{part} ({kind.__name__}); write them as a folder in BEIR layout")
    return found


class Texts:
    """Queries, documents and relevance judgments of a dataset, documents read on demand.

    Args:
        dataset: ir_datasets id, BEIR folder, or `pydocs`; a folder and pydocs take `/train`, `/dev`
            or `/test`.
        split: the split where the name has none: `train`, `dev` or `test`.

    Attributes:
        queries: {qid: text}; with qrels, those of the split. all_queries: every query there is.
        qrels: {qid: {docid: grade}}, empty where the dataset has none.

    Raises:
        BadInput: an unknown dataset, a broken file (FILE:LINE), or data that is neither here nor to
            be had.
    """

    def __init__(self, dataset: str, split: str = "test") -> None:
        self.name, self.irds, self._mended = dataset, None, False
        self.folder, self.split = folder_of(dataset, split)
        if self.folder:
            self._open_folder()
        else:
            self._open_irds()

    def _open_folder(self) -> None:
        self._corpus, queries = files_of(self.folder)
        self._where: dict[str, int] = {}  # offsets only: a text is read when it is asked for
        for offset, row in _json_lines(self._corpus, self._where):
            self._where[row["_id"]] = offset
        self._open_corpus = open(self._corpus, "rb")  # noqa: SIM115  open as long as the dataset
        self.all_queries = {}
        for _, row in _json_lines(queries, self.all_queries):
            self.all_queries[row["_id"]] = SURROGATE.sub("\ufffd", row["text"])
        self.qrels = self._folder_qrels(queries)
        self.queries = self.all_queries
        if self.qrels:
            self.queries = {q: self.all_queries[q] for q in self.qrels}

    def _folder_qrels(self, queries: Path) -> dict[str, dict[str, int]]:
        file = qrels_of(self.folder, self.split)
        if file is None:
            say(f"{self.folder}: no qrels/*.tsv, so nothing here is judged; all "
                f"{len(self.all_queries):,} queries used")
            return {}
        qrels = read_qrels(file)
        if unknown := [q for q in qrels if q not in self.all_queries]:
            raise BadInput(f"{file}: query {unknown[0]!r} ({len(unknown)} in all) is not in "
                           f"{queries}")
        absent = sum(d not in self._where for judged in qrels.values() for d in judged)
        if absent:
            say(f"{file}: {absent:,} judged documents are not in {self._corpus.name}")
        return qrels

    def other_splits(self) -> set[str]:
        """Queries that the qrels of other splits of a folder judge, and not this one's: to be kept
        out of training."""
        files = self.folder.glob("qrels/*.tsv") if self.folder and self.qrels else []
        others = [read_qrels(file) for file in files if file.stem != self.split]
        return {q for qrels in others for q in qrels} - set(self.qrels)

    def _open_irds(self) -> None:
        self.irds = irds_of(self.name)
        with self._fetching():
            self.all_queries = {check_id(q.query_id, self.name): self._text(q)
                                for q in self.irds.queries_iter()}
            qrels = self.irds.qrels_dict() if self.irds.has_qrels() else {}
            self.qrels = {q: {d: int(grade) for d, grade in judged.items()}
                          for q, judged in qrels.items()}
            self._store = self.irds.docs_store()
        judged = [q for q in self.qrels if q in self.all_queries]
        self.queries = self.all_queries
        if judged:
            self.queries = {q: self.all_queries[q] for q in judged}

    @contextlib.contextmanager
    def _fetching(self) -> Iterator[None]:
        try:
            yield
        except (BadInput, KeyboardInterrupt):
            raise
        except Exception as e:  # ir_datasets raises whatever its downloader met
            raise BadInput(
                f"dataset {self.name!r} could not be read or fetched ({first_line(e)}); offline, "
                "copy a filled ir_datasets folder here and set IR_DATASETS_HOME, or pass a folder "
                "in BEIR layout") from e

    def documents(self, docids: Iterable[str]) -> dict[str, str]:
        """{docid: text} of those of `docids` that the dataset holds; titled documents read "title
        text"."""
        if self.folder:
            return {d: self._document_at(self._where[d]) for d in docids if d in self._where}
        with self._fetching():
            found = self._store.get_many(list(docids))
            return {check_id(d, self.name): self._text(doc) for d, doc in found.items()}

    def _document_at(self, offset: int) -> str:
        """The document of the line at `offset`; one pread at a time, so threads may call this."""
        size, fd = 1 << 13, self._open_corpus.fileno()
        while True:
            piece = os.pread(fd, size, offset)
            end = piece.find(b"\n")
            if end >= 0 or len(piece) < size:
                break
            size *= 4
        row = json.loads(piece if end < 0 else piece[:end])
        text = f"{row['title']} {row['text']}" if row.get("title") else row["text"]
        return SURROGATE.sub("\ufffd", text)

    def _text(self, row) -> str:
        """Text of a query or document of ir_datasets."""
        text = row.default_text()
        cleaned = SURROGATE.sub("\ufffd", text)
        if cleaned != text and not self._mended:
            self._mended = True
            say(f"{self.name}: texts hold halves of surrogate pairs, {row[0]!r} the first; each is "
                "read as U+FFFD")
        return cleaned

    def missing(self, docids: Iterable[str], read: bool = False) -> list[str]:
        """Those of `docids` that a BEIR folder lacks; of an ir_datasets corpus this is only known
        when they are `read`, and none are returned else."""
        if self.folder:
            return [d for d in docids if d not in self._where]
        docids, lost = list(docids) if read else [], []
        for start in range(0, len(docids), 10_000):
            found = self.documents(docids[start : start + 10_000])
            lost += [d for d in docids[start : start + 10_000] if d not in found]
        return lost

    def corpus(self) -> Iterator[tuple[str, str]]:
        """(docid, text) of every document, in the order of the collection."""
        if self.folder:
            for docid, offset in self._where.items():
                yield docid, self._document_at(offset)
        else:
            with self._fetching():
                for doc in self.irds.docs_iter():
                    yield check_id(doc.doc_id, self.name), self._text(doc)

    def __len__(self) -> int:
        return len(self._where) if self.folder else self.irds.docs_count() or 0

    def fingerprint(self) -> str:
        """Changes when the corpus does (file size and time), for caches."""
        if self.folder:
            stat = self._corpus.stat()
            return f"{self._corpus.resolve()}-{stat.st_size}-{stat.st_mtime_ns}"
        space = self.name
        with contextlib.suppress(Exception):  # datasets over one corpus share its name, if it tells
            space = self.irds.docs_namespace() or space
        version = importlib.metadata.version("ir_datasets")
        return f"ir_datasets-{version}-{space}-{len(self)}"

    def digest(self) -> str:
        """sha256 of the queries and judgments, by content: what was begun with others is another
        run."""
        content = json.dumps([self.all_queries, self.qrels], sort_keys=True, default=str)
        return hashlib.sha256(content.encode(errors="replace")).hexdigest()

    def stamp(self, run: Path | None) -> dict[str, str]:
        """What scores of these queries depend on beside model and flags, with the file of the first
        stage."""
        stamp = {"corpus": self.fingerprint(), "queries": self.digest()}
        if run:
            stamp["run"] = sha256_of(run)
        return stamp

    def reopen(self) -> None:
        """Own file handles for a forked worker process."""
        if self.irds:
            import ir_datasets

            self._store = ir_datasets.load(self.name).docs_store()

    def scoreddocs(self) -> dict[str, dict[str, float]]:
        """The first stage that ir_datasets ships with this dataset, as a run."""
        if not self.irds or not self.irds.has_scoreddocs():
            raise BadInput(f"dataset {self.name!r} ships no scoreddocs; use --first-stage bm25 or "
                           "--run FILE")
        run: dict[str, dict[str, float]] = {}
        with self._fetching():
            for row in self.irds.scoreddocs_iter():
                run.setdefault(row.query_id, {})[row.doc_id] = float(row.score)
        return run


def text_lines(file: str) -> dict[int, str]:
    """{number: text} of the lines of a text file (`-`: stdin) that are not blank."""
    data = sys.stdin.buffer.read() if file == "-" else read_bytes(file)
    lines = {}
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        try:
            if line.strip():
                lines[number] = line.decode().rstrip("\r")
        except UnicodeDecodeError:
            raise BadInput(f"{file}:{number}: not UTF-8; convert the file (iconv -t UTF-8)"
                           ) from None
    return lines


def load_qrels(dataset: str) -> dict[str, dict[str, int]]:
    """Qrels of pydocs[/SPLIT], a BEIR FOLDER[/SPLIT] (test by default) or an ir_datasets id; no
    text is read."""
    folder, split = folder_of(dataset, "test")
    if folder:
        file = folder / "qrels" / f"{split}.tsv"
        if file.is_file():
            return read_qrels(file)
        splits = ", ".join(f"{folder}/{name}" for name in splits_of(folder))
        hint = f"; splits: {splits}" if splits else ", so no BEIR folder"
        raise BadInput(f"{folder}: no qrels/{split}.tsv{hint}")
    try:
        import ir_datasets

        return ir_datasets.load(dataset).qrels_dict()
    except ImportError:
        raise BadInput(f"dataset {dataset}: no such folder; for ir_datasets ids: "
                       "pip install ir_datasets") from None
    except KeyError:
        raise BadInput(f"dataset {dataset}: neither a folder nor an id that ir_datasets knows"
                       ) from None
    except Exception as e:  # ir_datasets lets through whatever its downloads raise
        raise BadInput(f"dataset {dataset}: ir_datasets could not get it ({first_line(e)}): give "
                       "--qrels") from None


def splits_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("qrels/*.tsv"))


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _json_lines(path: Path, seen: dict) -> Iterator[tuple[int, dict]]:
    """(offset, {"_id": ..., "text": ...}) of each line that is not blank; BadInput names the line
    that is wrong. The caller puts every id into `seen` before it asks for the next."""
    offset, mended = 0, 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            offset += len(line)
            if not line.strip():
                continue
            row = _json_row(line, where)
            if check_id(row["_id"], where) in seen:
                raise BadInput(f"{where}: id {row['_id']!r} occurs twice; ids must be unique")
            mended += b"\\u" in line and bool(SURROGATE.search(f"{row.get('title')}{row['text']}"))
            yield offset - len(line), row
    if not seen:
        raise BadInput(f"{path}:1: nothing in it; one object per line expected")
    if mended:
        say(f"{path}: {mended:,} texts hold halves of surrogate pairs; each is read as U+FFFD")


def _json_row(line: bytes, where: str) -> dict:
    """{"_id": str, "text": str, ...} of a line."""
    row = json_object(line, where)
    if not all(isinstance(row.get(k), str) for k in ("_id", "text")):
        raise BadInput(f'{where}: expected {{"_id": "...", "text": "..."}} with strings')
    return row


def json_object(line: bytes, where: str) -> dict:
    """The JSON object of a line; BadInput, beginning with `where`, for anything else."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise BadInput(f"{where}: not UTF-8; convert the file (iconv -t UTF-8)") from None
    except (ValueError, RecursionError) as e:  # RecursionError: nested thousands deep
        hint = str(e).partition(": line")[0]
        if line[:2] == b"\x1f\x8b":
            hint = "gzip data: gunzip it"
        raise BadInput(f"{where}: not a JSON object ({hint}); one object per line expected"
                       ) from None
    return row if isinstance(row, dict) else {}


def check_id(name: str, where: str) -> str:
    """The id of a query or document as it is; BadInput where it is none that a line of a TREC run
    can hold."""
    if NOT_AN_ID.search(name):
        raise BadInput(f"{where}: the id {name[:60]!r} is empty or holds a blank or control "
                       "character; no line of a TREC run can hold it: rename it here and in the "
                       "qrels")
    return name


class DocumentTokens:
    """Token ids of documents by id; each is read and tokenised once, the newest 16 million tokens
    are kept (64 MB).

    Args:
        texts: the dataset.
        tokenize: kernels.encoder.CrossEncoder.tokenize.
        limit: tokens kept of a document, None for all.

    `truncated` and `missing` hold the ids of documents that were cut, and of those that the dataset
    lacks.
    """

    def __init__(self, texts: Texts, tokenize: Callable, limit: int | None) -> None:
        self.texts, self.tokenize, self.limit = texts, tokenize, limit
        self.kept: dict[str, np.ndarray] = {}
        self.tokens, self.truncated, self.missing = 0, set(), set()

    def __call__(self, docids: list[str]) -> dict[str, np.ndarray]:
        """{docid: int32 ids} of those of `docids` that the dataset holds."""
        while self.tokens > 16_000_000:
            self.tokens -= len(self.kept.pop(next(iter(self.kept))))
        wanted = [d for d in dict.fromkeys(docids) if d not in self.kept]
        found = self.texts.documents(wanted)
        self.missing.update(d for d in wanted if d not in found)
        # one token more than is used tells a document that is cut from one that just fits
        longest = None if self.limit is None else self.limit + 1
        for docid, ids in zip(found, self.tokenize(list(found.values()), longest), strict=True):
            if self.limit is not None and len(ids) > self.limit:
                self.truncated.add(docid)
                ids = ids[: self.limit]
            self.kept[docid] = ids
            self.tokens += len(ids)
        return {d: self.kept[d] for d in docids if d in self.kept}
