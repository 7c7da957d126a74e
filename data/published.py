"""Published files by name: the teachers of the paper, fetched and checked; and what every dataset
would download, for a plan."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np

from data.command import BadInput, Progress
from data.runs import atomic_write
from data.texts import first_line

HOFSTAETTER = "https://zenodo.org/record/4068216/files"
SCHLATT = "https://zenodo.org/records/12528410/files"
HUB = "webis/rank-distillm"  # dataset on the Hugging Face hub; parquet with qid, docno, score
TRIPLES = "msmarcopassage_train_scores_ids.tsv"
RUN, PARQUET = "msmarco-passage-train-judged.run", "msmarco-passage-train-judged.parquet"
SAMPLED = "__rankzephyr-colbert-10000-sampled"
PUBLISHED = {  # name: (where, file, md5)
    "ensemble-t1": (HOFSTAETTER, f"bertbase_cat_{TRIPLES}", "a2575af08a19b47c2041e67c9efcd917"),
    "ensemble-t2": (HOFSTAETTER, f"bert_cat_ensemble_{TRIPLES}",
                    "4d99696386f96a7f1631076bcc53ac3c"),
    "colbert": (SCHLATT, f"__colbert__{RUN}", "6ed152027f7270f32fcbfaaa6def951e"),
    "bm25": (SCHLATT, f"__bm25__{RUN}", "835372b2ab4d20acf10addeae526c559"),
    "rankzephyr-10": (SCHLATT, f"{SAMPLED}-10__{RUN}", "619bc815bd133bdca44d6331b241d39a"),
    "rankzephyr-50": (SCHLATT, f"{SAMPLED}-50__{RUN}", "c37b78874d4893a00566ab40aa453c56"),
    "rankzephyr-100": (SCHLATT, f"{SAMPLED}-100__{RUN}", "49f8dbf2c1ee7a2ca1fe517eda528af6"),
    "rankzephyr-bm25-100": (SCHLATT, f"__rankzephyr-bm25-10000-sampled-100__{RUN}",
                            "05e3137ea3526671e1565cc90f9a2c8a"),
    "hf-colbert": (HUB, f"__colbert__{PARQUET}", "1e927d52af085516bf5a3de2865809d5"),
    "hf-rankzephyr-100": (HUB, f"{SAMPLED}-100__{PARQUET}", "38f69a3c8a5ed21c639e882a6c2eff7c"),
    "hf-set-encoder": (HUB, f"__set-encoder-colbert-all-100__{PARQUET}",
                       "a47206da7dc551e3ebd4e5b6866be78a"),
    "hf-monoelectra": (HUB, f"__monoelectra-colbert-all-100__{PARQUET}",
                       "6561f33476a6c8408737f38ea85c848f"),
    "docpairs": ("ir_datasets", "docpairs.tsv", None),
}


def kept_at(name: str) -> Path:
    """Where `published` keeps the file of that name (it need not be there), under ir_datasets'
    home."""
    path = irds_home() / "teachers" / PUBLISHED[name][1]
    return path.with_suffix(".run") if path.suffix == ".parquet" else path


def published(name: str) -> Path:
    """The file of a published teacher (a name of PUBLISHED), fetched at first use, checked, kept.

    ir_datasets' downloader fetches (progress, checksum, resumes a broken transfer) into its own
    cache; the parquet files come through huggingface_hub and are written there once as TREC runs;
    `docpairs` is `qid pos neg`.

    Raises:
        BadInput: no such name, or not to be had (with the way without a network), or a wrong
            checksum.
    """
    if name not in PUBLISHED:
        raise BadInput(f"{name}: neither a file nor the name of a published one "
                       f"({', '.join(PUBLISHED)})")
    where, file, md5 = PUBLISHED[name]
    path, url = kept_at(name), f"{where}/{file}"
    way = f"download {url} elsewhere (md5 {md5}) and give its path in place of the name"
    if where == HUB:
        url = f"https://huggingface.co/datasets/{HUB}/resolve/main/{file}"
        way = f"download {url} elsewhere (md5 {md5}) and give its path in place of the name"
    if where == "ir_datasets":
        way = "copy a filled ir_datasets folder here and set IR_DATASETS_HOME, or give a TSV"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks, or commands in a loop, find the file
        try:
            return _fetch(where, url, md5, path)
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as e:  # requests, huggingface_hub and ir_datasets each have their own
            raise BadInput(f"{name}: could not be fetched ({first_line(e)}); offline, {way}") from e


def _fetch(where: str, url: str, md5: str | None, path: Path) -> Path:
    from ir_datasets.util import Download, RequestsDownload

    if where == "ir_datasets":
        return path if path.exists() else _docpairs(path)
    if where == HUB:
        return path if path.exists() else _from_parquet(url.rpartition("/")[2], md5, path)
    return Path(Download([RequestsDownload(url)], cache_path=str(path), expected_md5=md5).path())


def _docpairs(path: Path) -> Path:
    import ir_datasets

    pairs = ir_datasets.load("msmarco-passage/train").docpairs_iter()
    with atomic_write(path) as file:
        for pair in Progress(pairs, desc="docpairs", unit=" triples", unit_scale=True):
            file.write(f"{pair.query_id}\t{pair.doc_id_a}\t{pair.doc_id_b}\n")
    return path


def _from_parquet(file: str, md5: str, path: Path) -> Path:
    import pyarrow as pa
    from huggingface_hub import hf_hub_download
    from pyarrow import csv, parquet

    source = hf_hub_download(HUB, file, repo_type="dataset")
    with open(source, "rb") as data:
        found = hashlib.file_digest(data, "md5").hexdigest()
    if found != md5:
        raise OSError(f"Expected md5 hash to be {md5} but got {found}")
    table = parquet.read_table(source, columns=["qid", "docno", "score"]).combine_chunks()
    # queries are numbered as they first appear
    query = table["qid"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.lexsort((-table["score"].to_numpy(), query))
    starts = np.flatnonzero(np.diff(query[order], prepend=-1))
    rank = np.arange(1, len(order) + 1) - np.repeat(starts, np.diff(starts, append=len(order)))
    table, tag = table.take(order), pa.repeat(path.stem.strip("_"), len(order))
    columns = [table["qid"], pa.repeat("Q0", len(order)), table["docno"], rank, table["score"], tag]
    temporary = path.with_suffix(".tmp")
    csv.write_csv(pa.table(columns, names=list("123456")), temporary,
                  csv.WriteOptions(include_header=False, delimiter=" ", quoting_style="none"))
    os.replace(temporary, path)
    return path


def irds_home() -> Path:
    """The folder of ir_datasets' files. Worked out here because importing ir_datasets would already
    create it."""
    return Path(os.environ.get("IR_DATASETS_HOME", Path.home() / ".ir_datasets"))


def downloads(dataset: str) -> list[tuple[str, int | None, str | None, bool]]:
    """(what, bytes, md5, whether it is here) of each file behind a dataset; None: not known.
    Fetches and makes nothing.

    ir_datasets' own list is read as a file, because importing the package already makes its folder.
    Sizes that count rows (nano-beir) are left out. `msmarco-passage/train/docpairs` names the
    triples of that dataset.
    """
    home, benchmark = irds_home(), dataset.partition("/")[0]
    if dataset == "msmarco-passage/train":
        parts = {"collectionandqueries": "collection.tsv", "queries": "train/queries.tsv",
                 "train/qrels": "train/qrels"}
    elif dataset == "msmarco-passage/train/docpairs":
        parts = {"train/docpairs": "../teachers/docpairs.tsv"}
    elif benchmark == "nano-beir":
        kinds = [f"{dataset.partition('/')[2]}/{part}" for part in ("docs", "queries", "qrels")]
        entries = [_in_ir_datasets(benchmark)[kind] for kind in kinds]
        here = all((home / benchmark / entry["cache_path"]).exists() for entry in entries)
        md5s = ", ".join(entry["expected_md5"] for entry in entries)
        return [(f"{dataset} (docs, queries, qrels)", None, md5s, here)]
    elif benchmark == "pydocs" and not Path(dataset).is_dir():
        return []  # made here, from the packages that are installed
    else:
        size = sum(file.stat().st_size for file in Path(dataset).glob("*.jsonl"))
        here = Path(dataset).is_dir() or (home / benchmark).is_dir()
        return [(dataset, size or None, None, here)]
    rows = []
    for key, path in parts.items():
        entry = _in_ir_datasets(benchmark)[key]
        here = any((home / benchmark / p).exists() for p in (entry["cache_path"], path))
        rows.append((entry["url"].rpartition("/")[2], entry["size_hint"], entry["expected_md5"],
                     here))
    return rows


def listed(source: str) -> list[tuple[str, int | None, str | None, bool]]:
    """The same of a run, triples or lists, by their path or published name."""
    if Path(source).exists():
        return [(source, Path(source).stat().st_size, None, True)]
    if source == "docpairs":
        return downloads("msmarco-passage/train/docpairs")
    if source in PUBLISHED:
        _, file, md5 = PUBLISHED[source]
        return [(f"{source}: {file}", None, md5, kept_at(source).exists())]
    return [(source, None, None, False)]


def _in_ir_datasets(benchmark: str) -> dict:
    """ir_datasets' own list of a benchmark's files."""
    package = Path(importlib.util.find_spec("ir_datasets").origin).parent
    return json.loads((package / "etc" / "downloads.json").read_text(encoding="utf-8"))[benchmark]
