"""Re-rank a first stage with a cross-encoder; also the data access that the other scripts use.

    python rerank.py --model runs/tiny-infonce --dataset pydocs --first-stage bm25 --depth 100 --out tiny.run
    python rerank.py --model DIR|HUB-ID --dataset msmarco-passage/trec-dl-2019/judged --run bm25.run --out reranked.run
    python rerank.py --model DIR|HUB-ID --dataset my-corpus/ --first-stage bm25 --long-docs max --out reranked.run
    python rerank.py --model DIR|HUB-ID --query "how do vaccines work" passages.txt
    torchrun --nproc_per_node 4 -- rerank.py ...     same flags, the same file (without the --, torchrun takes --run)

A dataset is an ir_datasets id, a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; FOLDER/SPLIT
picks one) or `pydocs`, known-item search over the docstrings of the installed Python packages. Runs are TREC runs.
An interrupted run continues where it stopped when the same command is given again.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; guarded() takes over
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

import evaluate
from evaluate import BadInput, Parser, at_least, guarded, read_qrels

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cross-encoder-study"
BLOCK_PAIRS = 4096  # pairs scored, written and, after an interruption, redone together
MARK = b"# # # # # "
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, alone: no character
NOT_AN_ID = re.compile(r"[\s\x00-\x1f\x7f\ud800-\udfff]|^$")


def say(message: str) -> None:
    """One line of progress on stderr, from rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        (tqdm.write if sys.stderr.isatty() else print)(message, file=sys.stderr)


class Progress(tqdm):
    """tqdm on rank 0: a bar on a terminal; elsewhere, as in a log file, a line every 30 seconds."""

    every = 30

    def __init__(self, *args, disable=False, **settings) -> None:
        self.lines = not sys.stderr.isatty()
        if self.lines:
            settings |= dict(mininterval=self.every, maxinterval=self.every, delay=self.every, miniters=1, position=0,
                             bar_format="{desc}: {n_fmt}/{total_fmt}{unit} in {elapsed}, {remaining} to go, "
                                        "{rate_fmt}{postfix}")
        super().__init__(*args, disable=disable or int(os.environ.get("RANK", 0)) > 0, **settings)

    def status_printer(self, file):
        return (lambda line: print(line, file=file, flush=True)) if self.lines else super().status_printer(file)

    def close(self) -> None:
        if self.lines:
            self.last_print_t = 0  # as if it had shown nothing: there is no bar to take away
        super().close()


# ---------------------------------------------------------------------------------------------------- datasets


class Texts:
    """Queries, documents and relevance judgments of a dataset, documents read on demand.

    Args:
        dataset: ir_datasets id, BEIR folder, or `pydocs`; a folder and pydocs take `/train`, `/dev` or `/test`.
        split: the split where the name has none: `train`, `dev` or `test`.

    Attributes:
        queries: {qid: text}; with qrels, those of the split. all_queries: every query there is.
        qrels: {qid: {docid: grade}}, empty where the dataset has none.

    Raises:
        BadInput: an unknown dataset, a broken file (FILE:LINE), or data that is neither here nor to be had.
    """

    def __init__(self, dataset: str, split: str = "test") -> None:
        self.name, self.folder, self.irds, self.split, self._mended = dataset, None, None, split, False
        path, last = Path(dataset), Path(dataset).name
        if dataset == "pydocs" or dataset.startswith("pydocs/"):
            self.folder, self.split = pydocs_folder(), dataset.partition("/")[2] or split
        elif path.is_dir():
            self.folder = path
        elif path.parent.is_dir() and (path.parent / "qrels" / f"{last}.tsv").is_file():
            self.folder, self.split = path.parent, last
        if self.folder:
            self._open_folder()
        else:
            self._open_irds()

    def _open_folder(self) -> None:
        corpus, queries = self.folder / "corpus.jsonl", self.folder / "queries.jsonl"
        for file in (corpus, queries):
            if not file.is_file():
                raise BadInput(f"{file}: not found; a BEIR folder holds corpus.jsonl, queries.jsonl, qrels/*.tsv")
        self._where, self._corpus = {}, corpus
        for offset, row in _json_lines(corpus, self._where):  # offsets only: the text is read when it is asked for
            self._where[row["_id"]] = offset
        self._open_corpus = open(corpus, "rb")  # noqa: SIM115
        self.all_queries = {}
        for _, row in _json_lines(queries, self.all_queries):
            self.all_queries[row["_id"]] = SURROGATE.sub("\ufffd", row["text"])
        qrels = self.folder / "qrels" / f"{self.split}.tsv"
        if not qrels.is_file():
            found = sorted(p.stem for p in qrels.parent.glob("*.tsv"))
            if found:
                raise BadInput(f"{qrels}: not found; splits here: {', '.join(found)} (name one as {self.folder}/SPLIT)")
            say(f"{self.folder}: no qrels/*.tsv, so nothing here is judged; all {len(self.all_queries):,} queries used")
            self.qrels, self.queries = {}, self.all_queries
            return
        self.qrels = read_qrels(qrels)
        unknown = [q for q in self.qrels if q not in self.all_queries]
        if unknown:
            raise BadInput(f"{qrels}: query {unknown[0]!r} ({len(unknown)} in all) is not in {queries}")
        absent = sum(d not in self._where for judged in self.qrels.values() for d in judged)
        if absent:
            say(f"{qrels}: {absent:,} judged documents are not in {corpus.name}")
        self.queries = {q: self.all_queries[q] for q in self.qrels}

    def other_splits(self) -> set[str]:
        """Queries that the qrels of other splits of a folder judge, and not this one's: to be kept out of training."""
        files = self.folder.glob("qrels/*.tsv") if self.folder and self.qrels else []
        return {q for file in files if file.stem != self.split for q in read_qrels(file)} - set(self.qrels)

    def _open_irds(self) -> None:
        import ir_datasets

        try:
            self.irds = ir_datasets.load(self.name)
        except KeyError:
            raise BadInput(
                f"dataset {self.name!r}: neither a folder nor an ir_datasets id nor pydocs; "
                "ids are listed at https://ir-datasets.com"
            ) from None
        for part in ("docs", "queries"):
            if not getattr(self.irds, f"has_{part}")():
                raise BadInput(f"dataset {self.name!r}: ir_datasets has no {part} for it; take an id that has docs and "
                               "queries: https://ir-datasets.com")
            kind = getattr(self.irds, f"{part}_cls")()
            if not hasattr(kind, "default_text"):
                raise BadInput(f"dataset {self.name!r}: ir_datasets knows no default text of its {part} "
                               f"({kind.__name__}); write them as a folder in BEIR layout")
        with self._fetching():
            self.all_queries = {check_id(q.query_id, self.name): self._text(q) for q in self.irds.queries_iter()}
            qrels = self.irds.qrels_dict() if self.irds.has_qrels() else {}
            self.qrels = {q: {d: int(grade) for d, grade in judged.items()} for q, judged in qrels.items()}
            self._store = self.irds.docs_store()
        judged = [q for q in self.qrels if q in self.all_queries]
        self.queries = {q: self.all_queries[q] for q in judged} if judged else self.all_queries

    @contextlib.contextmanager
    def _fetching(self) -> Iterator[None]:
        try:
            yield
        except (BadInput, KeyboardInterrupt):
            raise
        except Exception as e:  # ir_datasets raises whatever its downloader met
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise BadInput(
                f"dataset {self.name!r} could not be read or fetched ({reason}); offline, copy a filled "
                "ir_datasets folder here and set IR_DATASETS_HOME, or pass a folder in BEIR layout"
            ) from e

    def documents(self, docids: Iterable[str]) -> dict[str, str]:
        """{docid: text} of those of `docids` that the dataset holds; titled documents read "title text"."""
        if self.folder:
            found = {}
            for docid in docids:
                if docid in self._where:
                    # one pread per document: no shared file position, so threads may call this
                    found[docid] = _document_text(json.loads(self._line(self._where[docid])))
            return found
        with self._fetching():
            found = self._store.get_many(list(docids))
            return {check_id(d, self.name): self._text(doc) for d, doc in found.items()}

    def _text(self, row) -> str:
        """Text of a query or document of ir_datasets."""
        text = row.default_text()
        cleaned = SURROGATE.sub("\ufffd", text)
        if cleaned != text and not self._mended:
            say(f"{self.name}: texts hold halves of surrogate pairs, {row[0]!r} the first; each is read as U+FFFD")
        self._mended |= cleaned != text
        return cleaned

    def _line(self, offset: int) -> bytes:
        size, fd = 1 << 13, self._open_corpus.fileno()
        while True:
            piece = os.pread(fd, size, offset)
            end = piece.find(b"\n")
            if end >= 0 or len(piece) < size:
                return piece if end < 0 else piece[:end]
            size *= 4

    def missing(self, docids: Iterable[str], read: bool = False) -> list[str]:
        """Those of `docids` that a BEIR folder lacks; of an ir_datasets corpus this is only known when they are `read`,
        and none are returned else."""
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
                yield docid, _document_text(json.loads(self._line(offset)))
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
        with contextlib.suppress(Exception):  # datasets over one corpus share its name; several have none to tell
            space = self.irds.docs_namespace() or space
        return f"ir_datasets-{importlib.metadata.version('ir_datasets')}-{space}-{len(self)}"

    def digest(self) -> str:
        """sha256 of the queries and judgments, by content: what was begun with others is another run."""
        content = json.dumps([self.all_queries, self.qrels], sort_keys=True, default=str)
        return hashlib.sha256(content.encode(errors="replace")).hexdigest()

    def reopen(self) -> None:
        """Own file handles for a forked worker process."""
        if self.irds:
            import ir_datasets

            self._store = ir_datasets.load(self.name).docs_store()

    def scoreddocs(self) -> dict[str, dict[str, float]]:
        """The first stage that ir_datasets ships with this dataset, as a run."""
        if not self.irds or not self.irds.has_scoreddocs():
            raise BadInput(f"dataset {self.name!r} ships no scoreddocs; use --first-stage bm25 or --run FILE")
        run: dict[str, dict[str, float]] = {}
        with self._fetching():
            for row in self.irds.scoreddocs_iter():
                run.setdefault(row.query_id, {})[row.doc_id] = float(row.score)
        return run


def _json_lines(path: Path, seen: dict) -> Iterator[tuple[int, dict]]:
    """(offset, {"_id": ..., "text": ...}) of each line that is not blank; BadInput names the line that is wrong. The
    caller puts every id into `seen` before it asks for the next."""
    offset, mended = 0, 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            offset += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise BadInput(f"{where}: not UTF-8; convert the file (iconv -t UTF-8)") from None
            except (ValueError, RecursionError) as e:  # RecursionError: nested thousands deep
                hint = "gzip data: gunzip it" if line[:2] == b"\x1f\x8b" else str(e).partition(": line")[0]
                raise BadInput(f"{where}: not a JSON object ({hint}); one object per line expected") from None
            if not isinstance(row, dict) or not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
                raise BadInput(f'{where}: expected {{"_id": "...", "text": "..."}} with strings')
            if check_id(row["_id"], where) in seen:
                raise BadInput(f"{where}: id {row['_id']!r} occurs twice; ids must be unique")
            mended += b"\\u" in line and SURROGATE.search(f"{row.get('title')}{row['text']}") is not None
            yield offset - len(line), row
    if not seen:
        raise BadInput(f"{path}:1: nothing in it; one object per line expected")
    if mended:
        say(f"{path}: {mended:,} texts hold halves of surrogate pairs; each is read as U+FFFD")


def check_id(name: str, where: str) -> str:
    """The id of a query or document as it is; BadInput where it is none that a line of a TREC run can hold."""
    if NOT_AN_ID.search(name):
        raise BadInput(f"{where}: the id {name[:60]!r} is empty or holds a blank or control character; no line of a "
                       "TREC run can hold it: rename it here and in the qrels")
    return name


def _document_text(row: dict) -> str:
    text = f"{row['title']} {row['text']}" if row.get("title") else row["text"]
    return SURROGATE.sub("\ufffd", text)


def irds_home() -> Path:
    """The folder of ir_datasets' files. Worked out here because importing ir_datasets would already create it."""
    return Path(os.environ.get("IR_DATASETS_HOME", Path.home() / ".ir_datasets"))


def downloads(dataset: str) -> list[tuple[str, int | None, str | None, bool]]:
    """(what, bytes, md5, whether it is here) of each file behind a dataset; None: not known. Fetches and makes nothing.

    ir_datasets' own list is read as a file, because importing the package already makes its folder. Sizes that count
    rows (nano-beir) are left out. `msmarco-passage/train/docpairs` names the triples of that dataset.
    """
    home, package = irds_home(), Path(importlib.util.find_spec("ir_datasets").origin).parent
    known = json.loads((package / "etc" / "downloads.json").read_text(encoding="utf-8"))
    benchmark, _, rest = dataset.partition("/")
    if dataset == "msmarco-passage/train":
        parts = {"collectionandqueries": "collection.tsv", "queries": "train/queries.tsv", "train/qrels": "train/qrels"}
    elif dataset == "msmarco-passage/train/docpairs":
        parts = {"train/docpairs": "../teachers/docpairs.tsv"}  # where teacher.py keeps them
    elif benchmark == "nano-beir":
        entries = [known[benchmark][f"{rest}/{part}"] for part in ("docs", "queries", "qrels")]
        here = all((home / benchmark / e["cache_path"]).exists() for e in entries)
        return [(f"{dataset} (docs, queries, qrels)", None, ", ".join(e["expected_md5"] for e in entries), here)]
    elif benchmark == "pydocs" and not Path(dataset).is_dir():
        return []  # made here, from the packages that are installed
    else:
        size = sum(f.stat().st_size for f in Path(dataset).glob("*.jsonl"))
        return [(dataset, size or None, None, Path(dataset).is_dir() or (home / benchmark).is_dir())]
    entries = [(known[benchmark][key], path) for key, path in parts.items()]
    return [(e["url"].rpartition("/")[2], e["size_hint"], e["expected_md5"],
             any((home / benchmark / p).exists() for p in (e["cache_path"], path))) for e, path in entries]


def pydocs_folder() -> Path:
    """The BEIR folder of `pydocs`, built at first use and cached by the versions of the packages it is made of."""
    from kernels import pydocs

    versions = [sys.version] + [importlib.metadata.version(name) for name in pydocs.PACKAGES]
    key = hashlib.sha256("\n".join([*versions, Path(pydocs.__file__).read_text(encoding="utf-8")]).encode())
    folder = CACHE / f"pydocs-{key.hexdigest()[:16]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        pydocs.build_pydocs(folder)
    return folder


# ------------------------------------------------------------------------------------------------ first stages


@contextlib.contextmanager
def from_cache(path: Path) -> Iterator[None]:
    """Inside, a file or folder of the cache is read; BadInput where it is damaged."""
    try:
        yield
    except Exception as e:  # whatever numpy and bm25s make of it
        raise BadInput(f"{path}: damaged ({str(e)[:100]}); remove it: it is made anew") from e


def into_cache(temporary: Path, folder: Path) -> None:
    """Gives a folder that is whole its name in the cache; where another process was faster, that one's stays."""
    with contextlib.suppress(OSError):
        temporary.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)


def bm25(texts: Texts, queries: dict[str, str], depth: int) -> dict[str, dict[str, float]]:
    """BM25 (bm25s, Lucene's variant, k1=0.9, b=0.4, English stop words, Snowball stemmer) as a run.

    The index is cached on disk by dataset and opened memory-mapped. Documents that share no term with the query
    are left out. Ties are cut as trec_eval orders them, by document id descending.
    """
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    key = hashlib.sha256(f"{texts.fingerprint()} bm25s-{bm25s.__version__} k1=0.9 b=0.4 english".encode()).hexdigest()
    folder = CACHE / f"bm25-{key[:16]}"
    if not folder.is_dir():
        say(f"BM25: indexing {len(texts):,} documents of {texts.name} (once; kept in the cache)")
        docids, tokens, vocabulary = [], [], {}
        corpus = iter(Progress(texts.corpus(), total=len(texts), desc="index", unit=" documents"))
        while batch := list(itertools.islice(corpus, 10_000)):
            docids += [d for d, _ in batch]
            words = bm25s.tokenize(
                [t for _, t in batch], stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
            )
            tokens += [np.array([vocabulary.setdefault(w, len(vocabulary)) for w in ws], np.int32) for ws in words]
        index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
        vocabulary.setdefault("", len(vocabulary))
        index.index((tokens, vocabulary), show_progress=False)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{folder}.{os.getpid()}")
        index.save(temporary, show_progress=False)
        (temporary / "docids.txt").write_text("\n".join(docids), encoding="utf-8")
        into_cache(temporary, folder)
    with from_cache(folder):
        index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        docids = (folder / "docids.txt").read_text(encoding="utf-8").split("\n")
    words = bm25s.tokenize(
        list(queries.values()), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
    )
    vocabulary, run = index.vocab_dict, {}
    for qid, ws in zip(Progress(queries, desc="BM25", unit=" queries", leave=False), words, strict=True):
        ids = [vocabulary[w] for w in ws if w in vocabulary]
        scores = index.get_scores_from_ids(ids) if ids else np.zeros(0, np.float32)
        run[qid] = best(docids, scores, depth)
    empty = sum(not ranked for ranked in run.values())
    if empty:
        say(f"BM25: {empty:,} of {len(run):,} queries match no document and have an empty list")
    return run


def splade(texts: Texts, queries: dict[str, str], depth: int, name: str) -> dict:
    """SPLADE (Formal et al. 2021) as a run: term weights max over positions of log(1 + relu(logits)), inner product.

    The vectors of the documents are kept in the cache as one SciPy sparse matrix by term, opened memory-mapped, and a
    query adds up the columns of its terms. SciPy because it is the best kept of all sparse libraries and exact: at
    8.8 million passages of about 130 terms the matrix takes 9 GB of disk (and up to four times that in memory, once,
    while it is put together) and a query touches its own columns alone.

    Args:
        name: a masked language model trained as SPLADE, folder or hub id (the paper's: naver/splade-v3-distilbert).
    """
    import scipy.sparse as sparse
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from kernels.encoder import from_hub

    with from_hub(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loading = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True)
    if loading["missing_keys"]:
        raise BadInput(f"{name}: no masked language model, so no SPLADE (its weights lack "
                       f"{', '.join(sorted(loading['missing_keys'])[:3])})")
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(batch: list[str]) -> sparse.csr_array:
        order = np.argsort([-len(t) for t in batch], kind="stable")
        rows = []
        for part in np.array_split(order, max(len(batch) // 32, 1)):
            tokens = tokenizer([batch[i] for i in part], padding=True, truncation=True, max_length=256,
                               return_tensors="pt").to(model.device)
            with torch.inference_mode():
                weights = torch.log1p(model(**tokens).logits.float().relu()) * tokens["attention_mask"][..., None]
            rows.append(sparse.csr_array(weights.amax(1).cpu().numpy()))
        return sparse.vstack(rows, format="csr")[np.argsort(order)]

    key = hashlib.sha256(f"{texts.fingerprint()} splade {model_stamp(name)}".encode()).hexdigest()
    folder = CACHE / f"splade-{key[:16]}"
    if not folder.is_dir():
        say(f"SPLADE: encoding {len(texts):,} documents of {texts.name} (once; kept in the cache)")
        docids, parts = [], []
        corpus = iter(Progress(texts.corpus(), total=len(texts), desc="SPLADE", unit=" documents"))
        while batch := list(itertools.islice(corpus, 1024)):
            docids += [d for d, _ in batch]
            parts.append(encode([t for _, t in batch]))
        matrix = sparse.vstack(parts, format="csc")
        temporary = Path(f"{folder}.{os.getpid()}")
        temporary.mkdir(parents=True)
        for part in ("data", "indices", "indptr"):
            np.save(temporary / f"{part}.npy", getattr(matrix, part))
        (temporary / "docids.txt").write_text("\n".join(docids), encoding="utf-8")
        into_cache(temporary, folder)
    with from_cache(folder):
        docids = (folder / "docids.txt").read_text(encoding="utf-8").split("\n")
        data, indices, indptr = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("data", "indices", "indptr"))
    vectors, run = encode(list(queries.values())), {}
    for row, qid in enumerate(Progress(queries, desc="SPLADE", unit=" queries", leave=False)):
        scores, query = np.zeros(len(docids), np.float32), vectors[[row]]
        for term, weight in zip(query.indices, query.data, strict=True):
            span = slice(indptr[term], indptr[term + 1])
            scores[indices[span]] += weight * data[span]
        run[qid] = best(docids, scores, depth)
    return run


def best(docids: list[str], scores: np.ndarray, depth: int) -> dict[str, float]:
    """The `depth` documents of largest score above 0, in trec_eval's order: ties with the last place are sorted too."""
    kept = np.flatnonzero(scores > 0)  # most of a large collection has 0, and partition is slow among equals
    if len(kept) > depth:
        kept = kept[scores[kept] >= np.partition(scores[kept], -depth)[-depth]]
    return dict(trec_order([(docids[i], float(scores[i])) for i in kept])[:depth])


def trec_order(ranked: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """(docid, score) by trec_eval's rule: score descending, ties by document id descending."""
    return sorted(ranked, key=lambda pair: (pair[1], pair[0]), reverse=True)


def candidates(
    texts: Texts, run: Path | None, kind: str | None, depth: int, skip_missing: bool = False
) -> evaluate.Columns:
    """The first stage in columns: a TREC run, or one made here; the best `depth` of each query in trec_eval's order.

    Raises:
        BadInput: an id of the run that the dataset does not hold, with the line of the run; with `skip_missing`
            such documents are left out and counted.
    """
    if run is None:
        made = (texts.scoreddocs() if kind == "scoreddocs" else bm25(texts, texts.queries, depth) if kind == "bm25"
                else splade(texts, texts.queries, depth, kind.removeprefix("splade:")))
        columns = evaluate.Columns.of(made)
    else:
        columns = evaluate.read_columns(run, evaluate.RUN)
        for qid in columns.qids:
            if qid not in texts.all_queries:
                raise BadInput(f"{run}:{line_of(run, qid)}: query {qid!r} is not in dataset {texts.name}")
    counts, order = np.diff(columns.starts), evaluate.trec_order(columns)
    keep = np.arange(len(order)) - np.repeat(columns.starts[:-1], counts) < depth
    if run is not None:
        if not keep.all():
            say(f"{run}: {(counts > depth).sum():,} of {len(counts):,} queries cut to their best {depth:,} documents "
                "(--depth)")
        lost = pa.array(texts.missing(columns.docids.unique().to_pylist()), pa.large_string())
        gone = pc.is_in(columns.docids, lost).to_numpy(zero_copy_only=False)[order] & keep
        if gone.any() and not skip_missing:
            row = order[np.flatnonzero(gone)].min()
            qid, docid = columns.qids[np.searchsorted(columns.starts, row, "right") - 1], columns.docids[row].as_py()
            raise BadInput(
                f"{run}:{line_of(run, qid, docid)}: document {docid!r} is not in dataset {texts.name}; "
                "is it the corpus that the run was made on? (--skip-missing leaves such documents out)"
            )
        if gone.any():
            say(f"{run}: {gone.sum():,} documents are not in {texts.name} and are left out (--skip-missing)")
        keep &= ~gone
    return columns.take(order[keep], np.concatenate([[0], np.cumsum(keep)])[columns.starts])


def first_stage(
    texts: Texts, run: Path | None, kind: str | None, depth: int, skip_missing: bool = False
) -> dict[str, dict[str, float]]:
    """`candidates` as {qid: {docid: score}}, best first."""
    return candidates(texts, run, kind, depth, skip_missing).nested()


def line_of(run: Path, qid: str, docid: str | None = None) -> int:
    """The line of a TREC run that first names this query (and document); runs are only re-read to report an error."""
    for number, line in enumerate(evaluate.read_bytes(run).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        field = line.split()  # as bytes: the blanks of Unicode are of an id
        if field and field[0] == qid.encode() and (docid is None or field[2] == docid.encode()):
            return number
    return 0


# ----------------------------------------------------------------------------------------------------- scoring


def blocks_of(run: dict[str, dict[str, float]], pairs: int = BLOCK_PAIRS) -> list[list[str]]:
    """Query ids in the order of the run, cut into blocks of whole queries of about `pairs` pairs.

    The blocks depend on nothing but the run, so a resumed or sharded run scores the same micro-batches.
    """
    blocks, count = [], pairs
    for qid, ranked in run.items():
        if count >= pairs:
            blocks.append([])
            count = 0
        blocks[-1].append(qid)
        count += len(ranked)
    return blocks


class DocumentTokens:
    """Token ids of documents by id; each is read and tokenised once, the newest 16 million tokens are kept (64 MB).

    Args:
        texts: the dataset.
        tokenize: kernels.encoder.CrossEncoder.tokenize.
        limit: tokens kept of a document, None for all. `truncated` and `missing` hold the ids of documents that
            were cut, and of those that the dataset lacks.
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
        ids = self.tokenize(list(found.values()), None if self.limit is None else self.limit + 1)
        for docid, tokens in zip(found, ids, strict=True):
            if self.limit is not None and len(tokens) > self.limit:
                self.truncated.add(docid)
                tokens = tokens[: self.limit]
            self.kept[docid] = tokens
            self.tokens += len(tokens)
        return {d: self.kept[d] for d in docids if d in self.kept}


class PairScorer:
    """Scores blocks of a run with a cross-encoder: text read and tokenised in a thread, one block ahead.

    Args:
        model: kernels.encoder.CrossEncoder.
        texts: the dataset.
        run: {qid: {docid: score}}; the scores are not used.
        long_docs: "first" scores the first doc_length tokens; "max" every passage of doc_length tokens, `stride`
            tokens apart, the last one ending the document, and keeps the best (MaxP, Dai and Callan 2019).
        skip_missing: leave documents out that the dataset lacks, and count them, instead of raising BadInput.

    After use: pairs, passages, truncated_queries, seconds, waited (seconds without text to score).
    """

    def __init__(self, model, texts, run, max_tokens=None, long_docs="first", stride=128, skip_missing=False):
        self.model, self.texts, self.run, self.max_tokens = model, texts, run, max_tokens
        self.long_docs, self.stride, self.skip_missing = long_docs, stride, skip_missing
        self.documents = DocumentTokens(texts, model.tokenize, model.doc_length if long_docs == "first" else None)
        self.pairs = self.passages = self.truncated_queries = 0
        self.seconds = self.waited = 0.0

    def _prepare(self, block: list[str]):
        """Token ids of the block's pairs: (pair keys, query tokens, passage tokens, passages per pair)."""
        limit = self.model.query_length
        documents = self.documents([d for q in block for d in self.run[q]])
        lost = [d for q in block for d in self.run[q] if d not in documents]
        if lost and not self.skip_missing:
            raise BadInput(
                f"document {lost[0]!r} ({len(lost)} in this block) is not in dataset {self.texts.name}; "
                "is it the corpus that the run was made on? (--skip-missing leaves such documents out)"
            )
        keys, query_ids, passage_ids, counts = [], [], [], []
        queries = self.model.tokenize([self.texts.all_queries[q] for q in block], limit + 1)
        self.truncated_queries += sum(len(ids) > limit for ids in queries)
        for qid, ids in zip(block, queries, strict=True):
            for docid in self.run[qid]:
                if docid in documents:
                    passages = [documents[docid]]
                    if self.long_docs == "max":
                        passages = split_passages(documents[docid], self.model.doc_length, self.stride)
                    keys.append((qid, docid))
                    counts.append(len(passages))
                    passage_ids += passages
                    query_ids += [ids[:limit]] * len(passages)
        return keys, query_ids, passage_ids, counts

    def __call__(self, blocks: list[list[str]]) -> Iterator[dict[str, dict[str, float]]]:
        """Yields {qid: {docid: fp32 score}} for each block. Raises BadInput on a missing document or a score
        that is not finite, naming the queries.

        A GPU is given a block before the scores of the one before it are fetched, so that it never waits for this.
        """
        start, launched = time.perf_counter(), None
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._prepare, blocks[0]) if blocks else None
            for i, block in enumerate(blocks):
                mark = time.perf_counter()
                keys, query_ids, passage_ids, counts = coming.result()
                if i:  # nothing could overlap the first
                    self.waited += time.perf_counter() - mark
                if i + 1 < len(blocks):
                    coming = ahead.submit(self._prepare, blocks[i + 1])
                scores = self.model.start(query_ids, passage_ids, self.max_tokens)
                if launched:
                    yield self._result(start, *launched)
                launched = block, keys, counts, scores
            if launched:
                yield self._result(start, *launched)

    def _result(self, start, block, keys, counts, scores) -> dict[str, dict[str, float]]:
        try:
            scores = scores().numpy()
        except FloatingPointError as e:
            owner = np.repeat(np.arange(len(counts)), counts)
            bad = list(dict.fromkeys(keys[owner[i]][0] for i in e.pairs))
            raise BadInput(f"scores not finite, first of queries {bad[:5]}; has the model diverged?") from e
        self.pairs += len(counts)
        self.passages += len(scores)
        if len(scores) > len(counts):
            scores = np.maximum.reduceat(scores, np.cumsum([0, *counts[:-1]]))
        result: dict[str, dict[str, float]] = {qid: {} for qid in block}
        for (qid, docid), score in zip(keys, scores, strict=True):
            result[qid][docid] = score
        self.seconds = time.perf_counter() - start
        return result

    def summary(self) -> str:
        """What was scored, how fast, and everything that was cut or left out, in one line."""
        parts = [f"{self.pairs:,} pairs in {self.seconds:.1f} s ({self.pairs / max(self.seconds, 1e-9):,.0f} pairs/s)"]
        if self.long_docs == "max":
            parts.append(f"{self.passages:,} passages of {self.model.doc_length} tokens")
        elif self.documents.truncated:
            parts.append(f"{len(self.documents.truncated):,} documents cut to {self.model.doc_length} tokens")
        if self.truncated_queries:
            parts.append(f"{self.truncated_queries:,} queries cut to {self.model.query_length} tokens")
        if self.documents.missing:
            parts.append(f"{len(self.documents.missing):,} documents missing from the dataset and left out")
        return "; ".join(parts)


def split_passages(ids: np.ndarray, length: int, stride: int) -> list[np.ndarray]:
    """Windows [0, length), [stride, stride + length), ... of a document's tokens; the last ends with the document."""
    if len(ids) <= length:
        return [ids]
    starts = list(range(0, len(ids) - length, stride)) + [len(ids) - length]
    return [ids[s : s + length] for s in starts]


def score_run(model, texts: Texts, run: dict, max_tokens: int | None = None, progress: str = "") -> dict:
    """The whole run re-scored in memory: {qid: {docid: score}}. `progress` names a progress bar."""
    scorer, scores = PairScorer(model, texts, run, max_tokens), {}
    with Progress(total=sum(map(len, run.values())), desc=progress, unit=" pairs", leave=False,
                  disable=not progress) as bar:
        for result in scorer(blocks_of(run, 1024)):
            scores |= result
            bar.update(sum(map(len, result.values())))
    return {q: {d: float(s) for d, s in ranked.items()} for q, ranked in scores.items()}


# --------------------------------------------------------------------------------------------- runs and devices


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name complete and on the disk, or not at all (.gz and .zst packed)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as raw:  # no name and no time in the gzip header: same content, same bytes
            binary = raw
            if path.suffix == ".gz":
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


def run_lines(qid: str, ranked: dict[str, float], tag: str) -> str:
    """TREC lines of one query, best first; a float32 score is written with the fewest digits that keep it exact."""
    rows = trec_order(ranked.items())
    return "".join(f"{qid} Q0 {docid} {rank} {score!s} {tag}\n" for rank, (docid, score) in enumerate(rows, 1))


def sealed(block: bytes, check: int) -> tuple[bytes, int]:
    """(the line behind a whole block of an unfinished run, CRC-32 up to here); check: the CRC-32 up to this block.

    MARK counts as the end of the block, so that a line of this kind that stands twice is no empty block.
    """
    check = zlib.crc32(block + MARK, check)
    return MARK + b"%08x\n" % check, check


def run_tag(model: str) -> str:
    """The last column of a run: a model's name, with _ for what would be taken for another column."""
    return re.sub(r"\s+|[\x00-\x1f\x7f\ud800-\udfff]", "_", Path(model).name) or "run"


def write_run(path: str | Path, run: dict[str, dict[str, float]], tag: str = "run") -> None:
    """Writes a TREC run (gzip where the name ends in .gz), complete or not at all."""
    with atomic_write(Path(path)) as file:
        for qid, ranked in run.items():
            file.write(run_lines(qid, ranked, tag))


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Inside, this process alone writes `out`. The system gives the lock beside it back when the process ends, by
    whatever cause; it is not inherited by forked workers. BadInput names the process that holds it."""
    path = out.resolve().parent / f".{out.resolve().name}.lock"
    if not path.parent.is_dir():
        raise BadInput(f"{out}: the folder {out.parent} does not exist")
    if int(os.environ.get("RANK", 0)):  # rank 0 has it for all
        yield
        return
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # taken away since it was opened: its owner ended just now
                raise BlockingIOError
        except BlockingIOError:
            file.seek(0)
            raise BadInput(f"{out}: being written by {file.read() or 'another process'}; wait for it, or give another "
                           "--out") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def refuse_overwrite(path: Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Raises BadInput where `path` is a folder or one of `inputs`, or exists and --overwrite was not given."""
    if path.is_dir():
        raise BadInput(f"{path}: a folder; --out names the file to write")
    for file in inputs:
        if file and path.exists() and Path(file).exists() and path.samefile(file):
            raise BadInput(f"{path}: is read by this very command; --out names another file")
    if path.exists() and not overwrite:
        raise BadInput(f"{path}: exists; give --overwrite to replace it, or another --out")


def join_processes() -> tuple[int, int]:
    """(rank, world size); under torchrun the process group is opened, gloo or NCCL by what the machine has."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", 0)), world


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """What stands inside is done by rank 0, then by the others, who find the caches that it has filled."""
    rank, world = join_processes()
    if world > 1:
        import torch.distributed as dist

        if rank:
            dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def write_in_blocks(
    out: Path, plan: dict, run: dict, tag: str, score: Callable[[list], Iterator[dict]], overwrite: bool = False
) -> bool:
    """Scores the blocks of `run` into the TREC run `out`, sharded over ranks and safe against interruption.

    Each rank appends whole blocks to OUT.part-RANK, each with a checksum; the same command goes on after the last that
    is whole. At the end rank 0 joins the parts in the order of `run` and renames: the file is the one that a single
    uninterrupted process writes.

    Args:
        plan: what decides the scores (JSON); parts that were begun with another plan are refused.
        score: blocks -> one {qid: {docid: score}} per block.
    Returns:
        True on the rank that wrote `out`.
    """
    rank, world = join_processes()
    blocks = blocks_of(run)
    mine, part = blocks[rank::world], Path(f"{out}.part-{rank}")
    header = json.dumps({**plan, "world": world, "blocks": len(blocks)}, sort_keys=True) + "\n"
    if overwrite and part.exists():
        part.unlink()
    done = check = 0
    if part.exists():
        with open(part, "rb") as lines:
            if lines.readline() != header.encode():
                raise BadInput(f"{part}: begun by a command with other flags or data, or damaged; finish that one, or "
                               "--overwrite")
            keep, block = len(header.encode()), bytearray()
            for line in lines:
                end, after = sealed(block, check) if line.startswith(MARK) else (b"", check)
                if line == end:
                    keep, check, done, block = keep + len(block) + len(line), after, done + 1, bytearray()
                else:
                    block += line
        if MARK in block:
            say(f"{part}: damaged behind block {done:,}; from there on scored anew")
        os.truncate(part, keep)
        say(f"{part}: going on after {done:,} of {len(mine):,} blocks")
    else:
        with atomic_write(part) as file:  # a part without its whole header could not be told from another command's
            file.write(header)
    total = sum(len(run[q]) for b in mine for q in b)
    skipped = sum(len(run[q]) for b in mine[:done] for q in b)
    with (
        open(part, "ab") as file,
        Progress(total=total, initial=skipped, desc=tag, unit=" pairs") as bar,
    ):
        for block, result in zip(mine[done:], score(mine[done:]), strict=True):
            lines = "".join(run_lines(q, result[q], tag) for q in block).encode()
            end, check = sealed(lines, check)
            file.write(lines + end)
            file.flush()
            bar.update(sum(len(run[q]) for q in block))
    if world > 1:
        import torch.distributed as dist

        dist.barrier()
    if rank == 0:
        with contextlib.ExitStack() as stack:
            parts = [stack.enter_context(open(f"{out}.part-{r}", encoding="utf-8")) for r in range(world)]
            file = stack.enter_context(atomic_write(out))
            for lines in parts:
                lines.readline()
            for b in range(len(blocks)):
                for line in parts[b % world]:
                    if line.startswith(MARK.decode()):
                        break
                    file.write(line)
        for r in range(world):
            os.unlink(f"{out}.part-{r}")
    if world > 1:
        dist.barrier()
    return rank == 0


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script with a model shares."""
    parser.add_argument("--device", type=device_name, default="auto", metavar="auto|cpu|cuda",
                        help="default: cuda where there is one")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="auto: bfloat16 on CUDA and, for scoring, on CPUs with native bfloat16, else float32")
    parser.add_argument("--max-tokens", type=at_least(1),
                        help="token budget of one micro-batch (default: measured per device)")
    parser.add_argument("--query-length", type=at_least(1), help="tokens kept of a query (default: the model's, or 32)")
    parser.add_argument("--doc-length", type=at_least(1),
                        help="tokens kept of a document (default: the model's, or 256)")
    parser.add_argument("--seed", type=at_least(0), default=1, help="seed of everything random (default 1)")


def add_first_stage_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose candidates."""
    parser.add_argument("--dataset", required=False, help="ir_datasets id, folder in BEIR layout, or pydocs[/SPLIT]")
    parser.add_argument("--run", type=Path, help="first stage: a TREC run (.gz and .zst too)")
    parser.add_argument("--first-stage", type=first_stage_name, metavar="bm25|scoreddocs|splade[:MODEL]",
                        help="make the first stage: BM25, what ir_datasets ships, or SPLADE (default model: the "
                        "paper's, naver/splade-v3-distilbert)")
    parser.add_argument("--depth", type=at_least(1), default=1000, help="candidates re-ranked per query (default 1000)")
    parser.add_argument("--skip-missing", action="store_true",
                        help="leave out documents that the dataset lacks (counted) instead of stopping")


def device_name(text: str) -> str:
    """The value of --device; a card that is asked for and not there is an error, not a slower run."""
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: auto, cpu or cuda")
    if text == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("torch sees no CUDA device here; give auto or cpu")
    return text


def first_stage_name(text: str) -> str:
    """The value of --first-stage, SPLADE with its model named."""
    if text not in ("bm25", "scoreddocs", "splade") and not text.startswith("splade:"):
        raise argparse.ArgumentTypeError(f"{text!r}: bm25, scoreddocs, splade or splade:MODEL")
    return "splade:naver/splade-v3-distilbert" if text == "splade" else text


def sha256_of(path: str | Path) -> str:
    """Of a file's content, which is not taken into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_stamp(name: str) -> str:
    """A model folder's files by size and time: a retrained model, or another tokenizer, is another to a resumed run."""
    kinds = (".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".jinja")
    files = sorted(f for depth in ("*", "*/*") for f in Path(name).glob(depth) if f.suffix in kinds and f.is_file())
    ours = ("args.json", "checkpoint.pt")  # of train.py: no part of the model
    stamps = (f"{f.relative_to(name)}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files if f.name not in ours)
    return " ".join([name, *stamps])


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    add_first_stage_flags(parser)
    parser.add_argument("--out", type=Path, help="the TREC run to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    parser.add_argument("--long-docs", choices=["first", "max"], default="first",
                        help="documents beyond --doc-length: their first passage (default), or the best of all (MaxP)")
    parser.add_argument("--stride", type=at_least(1), default=128,
                        help="tokens between the starts of passages (MaxP; default 128)")
    parser.add_argument("--query", help="re-rank the lines of a text file for this query and print them")
    parser.add_argument("file", nargs="?", default="-", help="with --query: the file, - for stdin (default -)")
    add_model_flags(parser)
    args = parser.parse_args()
    from kernels.encoder import CrossEncoder  # here, so that --help and usage errors need no torch

    if args.query is not None and (args.dataset or args.run or args.first_stage or args.out or args.long_docs == "max"):
        parser.error("--query ranks lines of a file: no --dataset, --run, --first-stage, --out or --long-docs with it")
    if args.query is None and args.file != "-":
        parser.error(f"{args.file}: a file of lines goes with --query TEXT")
    if args.query is None:
        if not (args.dataset and args.out):
            parser.error("--dataset and --out are needed (or --query TEXT FILE)")
        if (args.run is None) == (args.first_stage is None):
            parser.error("give either --run FILE or --first-stage bm25|scoreddocs")
        refuse_overwrite(args.out, args.overwrite, inputs=[args.run])
    with locked(args.out) if args.out else contextlib.nullcontext():
        join_processes()
        model = CrossEncoder.from_pretrained(args.model, dtype=args.dtype, device=args.device,
                                             query_length=args.query_length, doc_length=args.doc_length).eval()
        if args.query is not None:
            print_ranking(model, args.query, args.file, args.max_tokens)
        else:
            rerank(model, args)
    return 0


def print_ranking(model, query: str, file: str, max_tokens: int | None) -> None:
    """The lines of a text file (`-`: stdin), best first, behind their scores."""
    data = evaluate.read_bytes(file) if file != "-" else sys.stdin.buffer.read()
    lines = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            lines += [line.decode().rstrip("\r")] if line.strip() else []
        except UnicodeDecodeError:
            raise BadInput(f"{file}:{number}: not UTF-8; convert the file (iconv -t UTF-8)") from None
    if not lines:
        raise BadInput(f"{file}: no text lines to rank")
    try:
        scores = model.score([SURROGATE.sub("\ufffd", query)] * len(lines), lines, max_tokens).tolist()
    except FloatingPointError as e:
        raise BadInput(f"{file}: {e}; has the model diverged?") from e
    if model.truncated:
        say(f"{model.truncated:,} texts cut: the query to {model.query_length} tokens, lines to {model.doc_length}")
    for score, line in sorted(zip(scores, lines, strict=True), key=lambda pair: -pair[0]):
        print(f"{score:.6f}\t{line}")


def rerank(model, args) -> None:
    """The candidates re-scored and written, with what it took in OUT.json."""
    if args.long_docs == "max" and args.stride > model.doc_length:
        raise BadInput(f"--stride {args.stride}: beyond the {model.doc_length} tokens of a passage, so that the text "
                       "between passages would never be scored; lower it")
    with rank_0_first():
        texts = Texts(args.dataset)
        run = first_stage(texts, args.run, args.first_stage, args.depth, args.skip_missing)
    if not any(run.values()):
        raise BadInput(f"{args.run or args.first_stage}: no document to score; is it a run on {args.dataset}?")
    scorer = PairScorer(model, texts, run, args.max_tokens, args.long_docs, args.stride, args.skip_missing)
    plan = {k: str(v) for k, v in vars(args).items() if k not in ("out", "overwrite", "query", "file")}
    plan |= {"model": model_stamp(args.model), "corpus": texts.fingerprint(), "queries": texts.digest(),
             "dtype": str(model.model.dtype)}
    if args.run:
        plan["run"] = sha256_of(args.run)
    if write_in_blocks(args.out, plan, run, run_tag(args.model), scorer, args.overwrite):
        say(f"{args.out}: {len(run):,} queries, {scorer.summary()}")
        if not scorer.pairs:  # all had been scored before an interruption: there is no speed to tell
            return
        with atomic_write(Path(f"{args.out}.json")) as file:
            json.dump({"seconds": scorer.seconds, "waited": scorer.waited, "pairs": scorer.pairs, "model": args.model,
                       "device": str(model.device), "dtype": str(model.model.dtype)}, file)


if __name__ == "__main__":
    sys.exit(guarded(main))
