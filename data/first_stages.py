"""The candidates of each query: a TREC run, BM25, what ir_datasets ships, or SPLADE."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.cache import cached, from_cache, model_stamp
from data.command import BadInput, Progress, say
from data.runs import RUN, Columns, best_first, line_of, read_columns, trec_order
from data.texts import Texts

SPLADE = "naver/splade-v3-distilbert"  # the paper's


def first_stage_name(text: str) -> str:
    """The value of --first-stage, SPLADE with its model named."""
    if text not in ("bm25", "scoreddocs", "splade") and not text.startswith("splade:"):
        wanted = "bm25, scoreddocs, splade or splade:MODEL"
        raise argparse.ArgumentTypeError(f"{text!r}: {wanted}")
    return f"splade:{SPLADE}" if text == "splade" else text


def first_stage(texts: Texts, run: Path | None, kind: str | None, depth: int,
                skip_missing: bool = False) -> dict[str, dict[str, float]]:
    """`candidates` as {qid: {docid: score}}, best first."""
    return candidates(texts, run, kind, depth, skip_missing).nested()


def candidates(texts: Texts, run: Path | None, kind: str | None, depth: int,
               skip_missing: bool = False) -> Columns:
    """The first stage in columns: a TREC run, or one made here by `kind`; the best `depth` of each
    query in trec_eval's order.

    Raises:
        BadInput: an id of the run that the dataset does not hold, with the line of the run; with
            `skip_missing` such documents are left out and counted.
    """
    if run is None:
        columns = Columns.of(make(texts, kind, depth))
        return columns.take(*_best(columns, depth))
    columns = read_columns(run, RUN)
    for qid in columns.qids:
        if qid not in texts.all_queries:
            raise BadInput(f"{run}:{line_of(run, qid)}: query {qid!r} is not in dataset "
                           f"{texts.name}")
    rows, starts = _best(columns, depth)
    if len(rows) < len(columns.docids):
        counts = np.diff(columns.starts)
        say(f"{run}: {(counts > depth).sum():,} of {len(counts):,} queries cut to their best "
            f"{depth:,} documents (--depth)")
    best = columns.take(rows, starts)
    lost = pa.array(texts.missing(best.docids.unique().to_pylist()), pa.large_string())
    gone = pc.is_in(best.docids, lost).to_numpy(zero_copy_only=False)
    if not gone.any():
        return best
    if not skip_missing:
        first = np.where(gone, rows, len(columns.docids)).argmin()  # in the order of the file
        qid, docid = best.qids[best.query_of_rows()[first]], best.docids[first].as_py()
        raise BadInput(f"{run}:{line_of(run, qid, docid)}: document {docid!r} is not in dataset "
                       f"{texts.name}; is it the corpus that the run was made on? (--skip-missing "
                       "leaves such documents out)")
    say(f"{run}: {gone.sum():,} documents are not in {texts.name} and are left out "
        "(--skip-missing)")
    return best.take(np.flatnonzero(~gone), np.cumsum([0, *~gone])[starts])


def _best(columns: Columns, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, starts) of the best `depth` documents of each query, in trec_eval's order."""
    counts = np.diff(columns.starts)
    rank = np.arange(len(columns.docids)) - np.repeat(columns.starts[:-1], counts)
    return trec_order(columns)[rank < depth], np.cumsum([0, *np.minimum(counts, depth)])


def make(texts: Texts, kind: str, depth: int) -> dict[str, dict[str, float]]:
    """The run of a first stage by its name (first_stage_name)."""
    if kind == "scoreddocs":
        return texts.scoreddocs()
    if kind == "bm25":
        return bm25(texts, texts.queries, depth)
    return splade(texts, texts.queries, depth, kind.removeprefix("splade:"))


def bm25(texts: Texts, queries: dict[str, str], depth: int) -> dict[str, dict[str, float]]:
    """BM25 (bm25s, Lucene's variant, k1=0.9, b=0.4, English stop words, Snowball stemmer) as a run.

    The index is cached on disk by dataset and opened memory-mapped. Documents that share no term
    with the query are left out. Ties are cut as trec_eval orders them, by document id descending.
    """
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")

    def words_of(batch):
        return bm25s.tokenize(batch, stopwords="en", stemmer=stemmer, return_ids=False,
                              show_progress=False)

    def index(folder):
        say(f"BM25: indexing {len(texts):,} documents of {texts.name} (once; kept in the cache)")
        docids, tokens, vocabulary = [], [], {}
        for batch in _batches(texts, "index", 10_000):
            docids += [d for d, _ in batch]
            for words in words_of([text for _, text in batch]):
                ids = [vocabulary.setdefault(word, len(vocabulary)) for word in words]
                tokens.append(np.array(ids, np.int32))
        vocabulary.setdefault("", len(vocabulary))
        made = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
        made.index((tokens, vocabulary), show_progress=False)
        made.save(folder, show_progress=False)
        (folder / "docids.txt").write_text("\n".join(docids), encoding="utf-8")

    what = f"{texts.fingerprint()} bm25s-{bm25s.__version__} k1=0.9 b=0.4 english"
    folder = cached("bm25", what, index)
    with from_cache(folder):
        opened = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        docids = (folder / "docids.txt").read_text(encoding="utf-8").split("\n")
    vocabulary, run = opened.vocab_dict, {}
    bar = Progress(queries, desc="BM25", unit=" queries", leave=False)
    for qid, words in zip(bar, words_of(list(queries.values())), strict=True):
        ids = [vocabulary[word] for word in words if word in vocabulary]
        scores = opened.get_scores_from_ids(ids) if ids else np.zeros(0, np.float32)
        run[qid] = best(docids, scores, depth)
    empty = sum(not ranked for ranked in run.values())
    if empty:
        say(f"BM25: {empty:,} of {len(run):,} queries match no document and have an empty list")
    return run


def splade(texts: Texts, queries: dict[str, str], depth: int, name: str) -> dict:
    """SPLADE (Formal et al. 2021) as a run: inner products of the term weights of SpladeEncoder.

    The vectors of the documents are kept in the cache as one SciPy sparse matrix by term, opened
    memory-mapped, and a query adds up the columns of its terms. SciPy because it is the best kept
    of all sparse libraries and exact: at 8.8 million passages of about 130 terms the matrix takes
    9 GB of disk (and up to four times that in memory, once, while it is put together) and a query
    touches its own columns alone.

    Args:
        name: a masked language model trained as SPLADE, folder or hub id.
    """
    import scipy.sparse as sparse

    encode = SpladeEncoder(name)

    def index(folder):
        say(f"SPLADE: encoding {len(texts):,} documents of {texts.name} (once; kept in the cache)")
        docids, parts = [], []
        for batch in _batches(texts, "SPLADE", 1024):
            docids += [d for d, _ in batch]
            parts.append(encode([text for _, text in batch]))
        matrix = sparse.vstack(parts, format="csc")
        for part in ("data", "indices", "indptr"):
            np.save(folder / f"{part}.npy", getattr(matrix, part))
        (folder / "docids.txt").write_text("\n".join(docids), encoding="utf-8")

    folder = cached("splade", f"{texts.fingerprint()} splade {model_stamp(name)}", index)
    with from_cache(folder):
        docids = (folder / "docids.txt").read_text(encoding="utf-8").split("\n")
        weights, rows, columns = (np.load(folder / f"{part}.npy", mmap_mode="r")
                                  for part in ("data", "indices", "indptr"))
    vectors, run = encode(list(queries.values())), {}
    for i, qid in enumerate(Progress(queries, desc="SPLADE", unit=" queries", leave=False)):
        scores, query = np.zeros(len(docids), np.float32), vectors[[i]]
        for term, weight in zip(query.indices, query.data, strict=True):
            span = slice(columns[term], columns[term + 1])
            scores[rows[span]] += weight * weights[span]
        run[qid] = best(docids, scores, depth)
    return run


class SpladeEncoder:
    """Term weights of texts: max over positions of log(1 + relu(logits)) of a masked language model
    (Formal et al. 2021). Raises BadInput for a folder or hub id that is none."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, report = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of the tokenizers is no Exception
            why = " ".join(f"{type(e).__name__}: {e}".split())[:180]
            if Path(name).is_dir():
                raise BadInput(f"{name}: cannot be loaded as a model folder: {why}") from e
            raise BadInput(f"{name}: neither a folder here nor to be had from the hub ({why}). "
                           "Without a network pass a folder (`hf download "
                           f"{name} --local-dir FOLDER` elsewhere) or set HF_HUB_OFFLINE=1 to use "
                           "the cache") from e
        if lost := sorted(report["missing_keys"]):
            raise BadInput(f"{name}: no masked language model, so no SPLADE (its weights lack "
                           f"{', '.join(lost[:3])})")
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, texts: list[str]):
        """SciPy csr_array [texts, vocabulary], fp32."""
        import scipy.sparse as sparse
        import torch

        order = np.argsort([-len(text) for text in texts], kind="stable")
        rows = []
        for part in np.array_split(order, max(len(texts) // 32, 1)):
            tokens = self.tokenizer([texts[i] for i in part], padding=True, truncation=True,
                                    max_length=256, return_tensors="pt").to(self.model.device)
            with torch.inference_mode():
                weights = torch.log1p(self.model(**tokens).logits.float().relu())
            weights = (weights * tokens["attention_mask"][..., None]).amax(1)
            rows.append(sparse.csr_array(weights.cpu().numpy()))
        return sparse.vstack(rows, format="csr")[np.argsort(order)]


def _batches(texts: Texts, what: str, size: int):
    """Lists of up to `size` (docid, text) of the whole corpus, with a bar."""
    corpus = iter(Progress(texts.corpus(), total=len(texts), desc=what, unit=" documents"))
    while batch := list(itertools.islice(corpus, size)):
        yield batch


def best(docids: list[str], scores: np.ndarray, depth: int) -> dict[str, float]:
    """The `depth` documents of largest score above 0, in trec_eval's order: ties with the last
    place are sorted too."""
    kept = np.flatnonzero(scores > 0)  # most of a large collection has 0, partition is slow there
    if len(kept) > depth:
        kept = kept[scores[kept] >= np.partition(scores[kept], -depth)[-depth]]
    return dict(best_first([(docids[i], float(scores[i])) for i in kept])[:depth])
