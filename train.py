"""Train a cross-encoder re-ranker with any of seven objectives: the recipes of arXiv 2603.03010 are the defaults.

    python train.py --backbone tiny --dataset pydocs                   a first run: minutes on a CPU, no network
    python train.py --backbone modernbert --loss infonce               the paper's run: MS MARCO, 200,000 steps
    python train.py --backbone DIR --loss ranknet --dataset my-corpus/ --lists teacher.run --steps 2000
    torchrun --nproc_per_node 4 train.py ...                           same flags, same result
    for b in bert electra deberta; do python train.py --backbone $b --loss marginmse --resume; done

Batch k is a pure function of the seed and k, so resuming, sharding over ranks and cutting into micro-batches cannot
change what is trained on. A step scores its lists in packed micro-batches, computes the loss once on the whole
lists, and sends its gradient back through the micro-batches; where these do not fit in memory together they are
scored twice, first without gradient. --dry-run prints the plan of any command and touches nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter, deque
from functools import partial
from pathlib import Path

# Before any library starts a thread: one malloc arena (M_ARENA_MAX, -8) for all of them. The others of glibc lie in
# heaps of 64 MB, which hold buffers of 10 MB badly and now and then fail to grow: half as much memory again.
if hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-8, 1)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; guarded() takes over
import numpy as np
import pyarrow as pa

from evaluate import (
    FULL,
    LOSSES,
    SUITES,
    BadInput,
    Parser,
    at_least,
    evaluate,
    guarded,
    markdown_table,
    mean,
    parse_measure,
)
from rerank import (
    CACHE,
    SURROGATE,
    DocumentTokens,
    Progress,
    Texts,
    add_model_flags,
    atomic_write,
    candidates,
    downloads,
    first_stage,
    first_stage_name,
    from_cache,
    join_processes,
    line_of,
    locked,
    model_stamp,
    rank_0_first,
    say,
    score_run,
    sha256_of,
)


def import_torch() -> None:
    """What takes seconds to import: as a command, once its flags are read, so that --help and a wrong flag come at
    once."""
    global attention, dist, encoder, linears, losses, torch
    # Before kernels.encoder's own 16: in bf16 the attention of every length takes products of its own, both ways.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    import torch
    import torch.distributed as dist

    from kernels import attention, encoder, linears, losses


if __name__ != "__main__":
    import_torch()

# name: (hub id, group); shapes are in kernels/bench/roofline.py
BACKBONES = {
    "minilm": ("microsoft/MiniLM-L12-H384-uncased", "mini"),
    "bert": ("bert-base-uncased", "base"),
    "roberta": ("FacebookAI/roberta-base", "base"),
    "electra": ("google/electra-base-discriminator", "base"),
    "deberta": ("microsoft/deberta-v3-base", "base"),
    "ettin-17m": ("jhu-clsp/ettin-encoder-17m", "mini"),
    "ettin-32m": ("jhu-clsp/ettin-encoder-32m", "mini"),
    "ettin-68m": ("jhu-clsp/ettin-encoder-68m", "mini"),
    "ettin-150m": ("jhu-clsp/ettin-encoder-150m", "base"),
    "modernbert": ("answerdotai/ModernBERT-base", "base"),
    "modernbert-large": ("answerdotai/ModernBERT-large", "base"),
}
PAPER_BACKBONES = [name for name in BACKBONES if not name.startswith("modernbert")]
# arXiv 2603.03010, sections 4 and 5 of its configuration: per backbone group, and per loss the data and the lists
GROUPS = {"base": dict(documents=32, lr=1e-5), "mini": dict(documents=64, lr=7e-6)}
PAPER_LISTS = {"bce": "docpairs", "hinge": "docpairs", "marginmse": "ensemble-t2", "infonce": "colbert",
               "ranknet": "rankzephyr-50", "adrmse": "rankzephyr-50", "kl": "rankzephyr-50"}
SHARED_LISTS = "hf-monoelectra"  # ColBERTv2's first 100, scored by a cross-encoder: labels and a teacher for every loss
LIST_SIZE = {"bce": 2, "hinge": 2, "marginmse": 2, "infonce": 8, "ranknet": 50, "adrmse": 50, "kl": 50}
FROM_TEACHER = ("marginmse", "ranknet", "adrmse", "kl")
TOKENS = 90  # of a pair of MS MARCO on the average, for the plan's estimates


# ------------------------------------------------------------------------------------------- what is trained on


def permuted(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where a random permutation of 0..n-1 sends `index`, in constant memory: a Feistel network, walked into range.

    index [k] int64 in [0, n) -> [k] int64; the permutation is a pure function of (n, seed).
    """
    half = max((int(n - 1).bit_length() + 1) // 2, 1)
    keys = np.random.default_rng([seed, n]).integers(1, 2**63, 6, dtype=np.uint64)
    value, outside = index.astype(np.uint64), np.ones(len(index), bool)
    low = np.uint64((1 << half) - 1)
    while outside.any():
        x = value[outside]
        left, right = x >> np.uint64(half), x & low
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= n
    return value.astype(np.int64)


class Triples:
    """A TSV of (query, positive, negative), one list of two documents per line, read by line from the disk.

    Lines are `qid pos neg`, or Hofstätter's `pos_score neg_score qid pos_pid neg_pid`, whose scores are the teacher's.
    The offsets of the lines are found once and kept in the cache; nothing of the file itself stays in memory. A header
    is skipped; with `texts` the lines are looked through once, where that is a folder or the loss may learn nothing.
    """

    def __init__(self, path: Path, loss: str, texts=None) -> None:
        self.path, self.loss = path, loss
        if not path.is_file():
            raise BadInput(f"{path}: not found")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        index = CACHE / f"lines-{key}.npy"
        if not index.is_file():
            self._index(index)
        with from_cache(index):
            self.offsets = np.load(index, mmap_mode="r")
        self.rows = range(len(self.offsets) - 1)  # the lines, from 0, that are trained on
        with open(path, "rb") as file:
            self.columns = len(file.readline().split(b"\t"))
        self.file = open(path, "rb")  # noqa: SIM115
        if self.columns == 3 and loss in FROM_TEACHER:
            raise BadInput(f"{path}:1: three columns, but --loss {loss} needs the teacher's scores: "
                           "pos_score neg_score qid pos_pid neg_pid (teacher.py cross-encoder --triples makes them)")
        if texts:
            self._look_through(texts)

    def _look_through(self, texts) -> None:
        known = [self._fields(i)[-3] in texts.all_queries for i in range(min(2, len(self)))]
        if not any(known):
            raise BadInput(f"{self.path}:1: query {self._fields(0)[-3][:60]!r} is not in dataset {texts.name}; triples "
                           "hold ids, not texts: qid pos neg")
        if not known[0]:
            say(f"{self.path}:1: taken for a header and skipped")
            self.rows = self.rows[1:]
        if not texts.folder and not (self.loss == "ranknet" and self.columns == 5):
            return
        rows, left, elsewhere = [], Counter(), texts.other_splits()
        for i in Progress(range(len(self)), desc=self.path.name, unit=" triples", leave=False):
            qid, docids, targets = self.item(i, None)
            refuse_unknown(self, i, qid, texts.missing(docids), texts)
            if qid in elsewhere:
                left["their query is of another split"] += 1
            elif self.loss == "ranknet" and np.float32(targets[0]) == np.float32(targets[1]):
                left["the teacher's scores tie"] += 1
            else:
                rows.append(self.rows[i])
        for why, number in left.items():
            say(f"{self.path}: {number:,} of {len(self):,} triples left out: {why}")
        if not rows:
            raise BadInput(f"{self.path}: no triple can be trained on")
        self.rows = np.array(rows)

    def _index(self, index: Path) -> None:
        """Offsets of the lines, int64, every line checked to have as many columns as the first: 3 or 5."""
        offsets, base, columns, lines, rest = [np.zeros(1, np.int64)], 0, None, 0, b""
        with open(self.path, "rb") as file, Progress(
            total=file.seek(0, 2), desc=f"index {self.path.name}", unit="B", unit_scale=True, leave=False
        ) as bar:
            file.seek(max(bar.total - 65536, 0))
            tail = file.read()
            size = bar.total - len(tail) + len(tail.rstrip(b"\r\n"))  # without the blank lines at the end
            file.seek(0)
            while chunk := file.read(min(1 << 24, size - file.tell())):
                data = rest + chunk
                end = len(data) if file.tell() == size else data.rfind(b"\n") + 1
                whole, rest = data[:end], data[end:]
                if not whole:
                    continue
                if whole[-1:] != b"\n":
                    whole += b"\n"
                if lines == 0:
                    if whole[:2] == b"\x1f\x8b":
                        raise BadInput(f"{self.path}: gzip data; lines are read at random, so gunzip it first")
                    columns = whole[: whole.index(b"\n")].count(b"\t") + 1
                    if columns not in (3, 5):
                        raise BadInput(f"{self.path}:1: {columns} tab-separated columns; expected qid pos neg, or "
                                       "pos_score neg_score qid pos_pid neg_pid")
                view = np.frombuffer(whole, np.uint8)
                ends = np.flatnonzero(view == 10)
                tabs = np.diff(np.searchsorted(np.flatnonzero(view == 9), ends), prepend=0)
                wrong = np.flatnonzero(tabs != columns - 1)
                if len(wrong):
                    raise BadInput(f"{self.path}:{lines + wrong[0] + 1}: {tabs[wrong[0]] + 1} tab-separated columns, "
                                   f"{columns} in the lines before; mend or remove the line")
                offsets.append(base + ends + 1)
                base, lines = base + len(whole), lines + len(ends)
                bar.update(len(chunk))
        if not lines:
            raise BadInput(f"{self.path}: empty; expected one triple per line")
        index.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{index}.{os.getpid()}", "wb") as file:
            np.save(file, np.concatenate(offsets))
        os.replace(f"{index}.{os.getpid()}", index)

    def __len__(self) -> int:
        return len(self.rows)

    def _fields(self, i: int) -> list[str]:
        start, end = map(int, self.offsets[self.rows[i] : self.rows[i] + 2])
        try:
            return os.pread(self.file.fileno(), end - start, start).decode("utf-8-sig").rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            raise BadInput(f"{self.where(i)}: not UTF-8; convert the file (iconv -t UTF-8)") from None

    def item(self, i: int, seed) -> tuple[str, list[str], list[float]]:
        """(qid, [positive, negative], their targets) of triple i."""
        field = self._fields(i)
        if self.columns == 3:
            return field[0], field[1:], [1.0, 0.0]
        try:
            scores = [float(field[0]), float(field[1])]
        except ValueError:
            scores = [math.nan]
        if not np.isfinite(np.float32(scores)).all():
            raise BadInput(f"{self.where(i)}: scores {field[0][:30]!r} {field[1][:30]!r} are not finite numbers (fp32)")
        return field[2], field[3:], scores if self.loss in FROM_TEACHER else [1.0, 0.0]

    def where(self, i: int) -> str:
        return f"{self.path}:{self.rows[i] + 1}"


class Lists:
    """Candidate lists of a run in columns, and how a training list is drawn from one.

    Losses on labels (bce, hinge, infonce) get one relevant document of the qrels and list_size - 1 of the candidates
    that are not judged relevant. Losses on a teacher get list_size candidates with the run's scores, all of them
    where there are no more; marginmse has its relevant document first (without qrels: the teacher's best). With
    `shared` every loss gets the lists of the first kind, drawn alike, from queries whose relevant document is among
    the candidates. `random_share`: the part of the negatives drawn from the whole corpus instead.
    """

    def __init__(self, run, texts, loss, list_size, shared=False, max_margin=None, random_share=None, run_path=None):
        self.texts, self.loss, self.size, self.path, self.run = texts, loss, list_size, run_path, run
        self.teacher, self.shared, self.random_share = loss in FROM_TEACHER, shared, random_share
        if random_share is not None:
            self.corpus = pa.array([d for d, _ in texts.corpus()], pa.large_string())
        labelled = not self.teacher or shared
        self.queries, self.positives, self.sizes, rows = [], [], [], []  # rows of `run` that a list is drawn from
        skipped, filtered, short, longest, elsewhere = Counter(), 0, 0, 0, texts.other_splits()
        with np.errstate(over="ignore"):
            scores = run.values.astype(np.float32)
        if self.teacher and not np.isfinite(scores).all():
            i = np.searchsorted(run.starts, np.flatnonzero(~np.isfinite(scores))[0], "right") - 1
            raise BadInput(f"{run_path}: query {run.qids[i]!r} has scores beyond the range of single precision")
        positives = {q: [d for d, grade in texts.qrels.get(q, {}).items() if grade > 0] for q in run.qids}
        lost = set(texts.missing(dict.fromkeys(d for some in positives.values() for d in some), read=labelled))
        if lost:
            say(f"lists: {len(lost):,} relevant documents are not in dataset {texts.name} and are left out")

        def left_out(qid, relevant, inside, mine, size):
            if qid in elsewhere:
                return "judged in another split of the dataset"
            if not labelled and len(mine) < 2:
                return "fewer than two candidates"
            if labelled and not relevant:
                return "no relevant document"
            if shared and not inside:
                return "the relevant document is not among the candidates"
            if labelled and size < 2:
                return "no candidate that is not relevant"
            tied = self.loss == "ranknet" and np.ptp(scores[start:end]) == 0
            return "the teacher's scores all tie" if tied else ""

        for i, qid in enumerate(run.qids):
            start, end = int(run.starts[i]), int(run.starts[i + 1])
            known = dict(zip(run.docids[start:end].to_pylist(), range(start, end), strict=True))
            relevant = [d for d in positives[qid] if d not in lost]
            inside = [d for d in relevant if d in known]
            mine = np.arange(start, end)
            if labelled:
                mine = np.delete(mine, [known[d] - start for d in inside])
                if max_margin is not None and inside:
                    kept = mine[run.values[mine] <= min(run.values[known[d]] for d in inside) - max_margin]
                    filtered, mine = filtered + len(mine) - len(kept), kept
            size = min(list_size, 1 + (len(mine) if random_share is None else len(self.corpus) - len(relevant)))
            why = left_out(qid, relevant, inside, mine, size)
            if why:
                skipped[why] += 1
                continue
            short += labelled and size < list_size
            longest = max(longest, len(mine))
            self.queries.append(i)
            self.sizes.append(size)
            self.positives.append([(d, float(run.values[known[d]]) if d in known else math.nan)
                                   for d in (inside if shared else relevant)])
            rows.append(mine)
        self.rows = np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64)
        self.starts = np.cumsum([0, *map(len, rows)])
        for why, number in skipped.items():
            say(f"lists: {number:,} of {len(run.qids):,} queries left out: {why}")
        if filtered:
            say(f"lists: {filtered:,} negatives left out, scored above their positive minus {max_margin:g}")
        if short:
            say(f"lists: {short:,} queries have fewer than {list_size - 1} negatives; their lists are shorter")
        if not labelled and longest > list_size:
            say(f"lists: up to {longest:,} candidates per query; {list_size} of them drawn anew at every pass")
        if not self.queries:
            raise BadInput(f"{run_path or 'lists'}: no query can be trained on ({', '.join(skipped)}); do qrels and "
                           "run belong together?")

    def __len__(self) -> int:
        return len(self.queries)

    def item(self, i: int, seed) -> tuple[str, list[str], list[float]]:
        """(qid, docids, targets) of a list of query i; every draw comes from `seed`."""
        rng = np.random.default_rng(seed)
        run, qid, rows = self.run, self.run.qids[self.queries[i]], self.rows[self.starts[i] : self.starts[i + 1]]
        if self.teacher and not self.shared:
            rows = rng.permutation(rows)[: self.size]
            names, targets = run.docids.take(pa.array(rows)).to_pylist(), run.values[rows].tolist()
            if self.loss == "marginmse":
                relevant = {d for d, _ in self.positives[i]}
                first = max(range(len(names)), key=lambda j: (names[j] in relevant, targets[j]))
                names.insert(0, names.pop(first))
                targets.insert(0, targets.pop(first))
            return qid, names, targets
        positive, score = self.positives[i][rng.integers(len(self.positives[i]))]
        anywhere = rng.binomial(self.size - 1, self.random_share) if self.random_share else 0
        rows = rng.permutation(rows)[: self.size - 1 - anywhere]
        names = [positive, *run.docids.take(pa.array(rows)).to_pylist()]
        targets = [score, *run.values[rows].tolist()] if self.teacher else [1.0] + [0.0] * len(rows)
        relevant = self.texts.qrels.get(qid, {})
        while len(names) < self.sizes[i] and self.random_share:
            other = self.corpus[int(rng.integers(len(self.corpus)))].as_py()
            if relevant.get(other, 0) <= 0 and other not in names:
                names.append(other)
                targets.append(0.0)
        return qid, names, targets

    def where(self, i: int) -> str:
        qid = self.run.qids[self.queries[i]]
        return f"{self.path}:{line_of(self.path, qid)}" if self.path else f"query {qid!r}"


def refuse_unknown(source, i: int, qid: str, unknown: list[str], texts) -> None:
    """BadInput, naming the line of list i of `source`, for documents or a query that the dataset does not hold."""
    if unknown or qid not in texts.all_queries:
        what = f"document {unknown[0][:60]!r}" if unknown else f"query {qid[:60]!r}"
        raise BadInput(f"{source.where(i)}: {what} is not in dataset {texts.name}")


class Batches:
    """Batch k of the training, a pure function of (seed, k): `self[k]` is what this rank computes of it.

    Every rank knows the ids and targets of the whole batch; text is read and tokenised for its own share alone.
    """

    def __init__(self, source, texts, tokenize, args, rank, world):
        self.source, self.texts, self.rank, self.world = source, texts, rank, world
        self.size, self.seed, self.query_length = args.batch_size, args.seed, args.query_length
        self.tokenize, self.documents = tokenize, DocumentTokens(texts, tokenize, args.doc_length)

    def __len__(self) -> int:
        return 1 << 62

    def ids(self, k: int) -> list[tuple[int, str, list[str], list[float]]]:
        """(row of the source, qid, docids, targets) of every list of batch k."""
        index, n = np.arange(k * self.size, (k + 1) * self.size), len(self.source)
        rows = np.concatenate([permuted(part % n, n, hash_of(self.seed, int(part[0]) // n))
                               for part in np.split(index, np.flatnonzero(index % n == 0)) if len(part)])
        return [(int(row), *self.source.item(int(row), (self.seed, int(i))))
                for i, row in zip(index, rows, strict=True)]

    def __getitem__(self, k: int) -> dict | BadInput:
        """Batch k; in a worker process bad input is handed over, as torch would wrap what is raised in a traceback."""
        try:
            return self.make(k)
        except BadInput as e:
            if torch.utils.data.get_worker_info() is None:
                raise
            return e

    def make(self, k: int) -> dict:
        items = self.ids(k)
        width = max(len(docids) for _, _, docids, _ in items)
        targets = torch.zeros(len(items), width)
        for i, (_, _, _, t) in enumerate(items):
            targets[i, : len(t)] = torch.tensor(t)
        own = range(self.rank, len(items), self.world)
        found = self.documents([d for i in own for d in items[i][2]])
        for i in own:
            row, qid, docids, _ = items[i]
            refuse_unknown(self.source, row, qid, [d for d in docids if d not in found], self.texts)
        queries = self.tokenize([self.texts.all_queries[items[i][1]] for i in own], self.query_length)
        return {
            "qids": [qid for _, qid, _, _ in items], "targets": targets,
            "lengths": torch.tensor([len(docids) for _, _, docids, _ in items]),
            "own": torch.tensor([i * width + j for i in own for j in range(len(items[i][2]))], dtype=torch.int64),
            "queries": [q for i, q in zip(own, queries, strict=True) for _ in items[i][2]],
            "documents": [found[d] for i in own for d in items[i][2]],
        }

    def loader(self, start: int, steps: int, workers: int) -> torch.utils.data.DataLoader:
        """Batches start..steps-1 in order, prefetched by worker processes (0: made when asked for)."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said at all, or every fork is warned of
        return torch.utils.data.DataLoader(
            self, batch_size=None, sampler=range(start, steps), num_workers=workers,
            prefetch_factor=8 if workers else None, worker_init_fn=self._reopen, persistent_workers=bool(workers),
        )

    def _reopen(self, _worker: int) -> None:
        self.texts.reopen()  # a document store must not share its file position with its siblings
        torch.set_num_threads(1)
        # the threads of the tokenizer did not live through the fork: waiting for them would never end
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.setpgid(0, 0)  # Ctrl-C and torchrun's SIGTERM go to the whole group; the step in hand needs its batches


def hash_of(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


# -------------------------------------------------------------------------------------------------- one step


class Step:
    """One optimizer step on one batch, exact at any list length and over any number of ranks.

    One pass: every micro-batch is scored with its graph kept. Two passes, where the step exceeds `keep` tokens: all
    scores without gradient, then each micro-batch again under the same dropout (the generator is seeded by step and
    micro-batch), so that memory does not grow with the list. On a CPU each thread takes a micro-batch of its own and
    their gradients are added in order. In both ways the loss and d loss / d scores are computed once, on the lists of
    the whole batch, all ranks included: a ragged share weighs what it should.

    On a GPU nothing in a step waits for the card: loss and gradient norm are read a step later. Where one is not finite
    the card itself leaves the weights as they are, in that step and all after it, until it is read.
    """

    def __init__(self, model, loss, optimizer, args, rank, world):
        self.model, self.loss, self.optimizer, self.args = model, getattr(losses, loss), optimizer, args
        self.rank, self.world = rank, world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.flat = None  # every gradient in one buffer, where they are summed over ranks or threads
        self.unread = deque()  # (step, queries, loss and norm on their way from the card)
        config, device = model.model.config, model.device
        self.on_gpu = attention.on_gpu(device)
        self.max_tokens = args.max_tokens or encoder.default_max_tokens(device, training=True)
        self.keep = None if self.on_gpu else self.max_tokens  # None: by the memory that is free at the first step
        if self.on_gpu and optimizer:
            if not getattr(optimizer, "_step_supports_amp_scaling", False):
                raise ValueError("the optimizer has to be fused on a GPU: it clips, and skips what is not finite")
            optimizer.found_inf = torch.zeros((), device=device)  # 1 from the first step on that was not finite
            self.one = torch.ones((), device=device)
        if not self.on_gpu and not args.max_tokens:
            # about 34 fp32 values per token, layer and hidden unit are kept for the backward pass; up to 4 GiB of them,
            # by one pass or by all threads together (beyond 4 GiB only where that leaves a thread less than 512 tokens)
            fit = 2**32 // (34 * 4 * config.num_hidden_layers * config.hidden_size)
            self.keep = max(self.keep, fit)
            self.max_tokens = min(self.max_tokens, max(fit // torch.get_num_threads(), 512))
        if not self.on_gpu:  # the gradient of a vocabulary has few rows that are not zero, and 47 MB of the others
            for module in model.modules():
                if isinstance(module, torch.nn.Embedding):
                    module.sparse = True

    def _forward(self, batch, part, seed, gradient):
        device = self.model.device
        packed = self.model.pack([batch["queries"][i] for i in part], [batch["documents"][i] for i in part])
        with (torch.set_grad_enabled(gradient), attention.dropout_from(seed, device),
              torch.autocast(device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16")):
            return self.model(packed)

    def gradients(self, k: int, batch: dict) -> torch.Tensor:
        """Adds d loss / d parameters of batch k to .grad, summed over ranks; returns the loss, a scalar."""
        device = self.model.device
        lengths = [self.model.pair_length(len(q), len(d))
                   for q, d in zip(batch["queries"], batch["documents"], strict=True)]
        parts = encoder.micro_batches(lengths, self.max_tokens, 1 if self.on_gpu else torch.get_num_threads())
        each = map if self.on_gpu else partial(encoder.in_threads, spare=True)
        seeds = [hash_of(self.args.seed, k, self.rank, m) for m in range(len(parts))]
        if self.keep is None:
            self.keep = max(self._room(), self.max_tokens)
        one_pass = len(parts) <= 1 or sum(lengths) <= self.keep
        order = torch.tensor([i for part in parts for i in part], dtype=torch.int64)
        place, targets, listed = encoder.to_device(device, batch["own"][order], batch["targets"], batch["lengths"])
        outs = self._agreed(
            lambda: list(each(lambda m: self._forward(batch, parts[m], seeds[m], one_pass), range(len(parts)))))
        flat = torch.cat(outs) if outs else torch.zeros(0, device=device)
        leaf = flat.detach().requires_grad_()
        rows, width = batch["targets"].shape
        scores = torch.zeros(rows * width, device=device).index_put((place,), leaf)
        if self.world > 1:
            everyone = scores.detach().clone()
            dist.all_reduce(everyone)
            scores = scores + (everyone - scores.detach())
        loss = self.loss(scores.view(rows, width), targets, listed)
        loss.backward()
        shares = leaf.grad.split([len(part) for part in parts]) if parts else []

        def backward(m):
            out = outs[m] if one_pass else self._forward(batch, parts[m], seeds[m], True)
            outs[m] = None
            return torch.autograd.grad(out, self.parameters, shares[m], allow_unused=True)

        def add_up():
            sums = self._sums()  # not later, between a micro-batch's buffers
            for gradients in each(backward, range(len(parts))):  # added in order, whichever was computed first
                self._add(sums, gradients)
                del gradients  # else they would lie beside those of the next micro-batch
            if self.world > 1:
                for p, total in zip(self.parameters, sums, strict=True):
                    p.grad = total

        self._agreed(add_up)
        if self.world > 1:
            dist.all_reduce(self.flat)
        return loss.detach()

    def _room(self) -> int:
        """Tokens whose forward passes fit in the card's memory, beside the gradients and what AdamW still lacks."""
        device = self.model.device
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        copies = 1 if self.optimizer and self.optimizer.state else 3
        free -= 4 * copies * sum(p.numel() for p in self.parameters)
        return max(int(0.8 * free), 0) // encoder.kept_bytes(self.model.model.config, getattr(torch, self.args.dtype))

    def _sums(self) -> list:
        """Where gradients are added up: zeros, in one buffer that is the same in every step. None on a single GPU,
        where the first micro-batch's own tensors do."""
        if self.on_gpu and self.world == 1:
            return [None] * len(self.parameters)
        if self.flat is None:
            self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=self.model.device)
        else:
            self.flat.zero_()
        parts = self.flat.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def _add(self, sums, gradients) -> None:
        """Adds a micro-batch's gradients to .grad, which is the parameter's place in `sums` from its first one on."""
        there, more = [], []
        for p, total, gradient in zip(self.parameters, sums, gradients, strict=True):
            if gradient is None:
                continue
            if p.grad is None:
                p.grad = gradient.contiguous() if total is None else total
                if total is None:
                    continue
            there.append(p.grad)
            more.append(gradient)
        if there:
            torch._foreach_add_(there, more)

    def _agreed(self, work):
        """work(); torch.OutOfMemoryError on every rank where memory ran out on one, so that all repeat the step."""
        result = failure = None
        try:
            result = work()
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
            failure = e
        if self.world > 1:
            votes = torch.tensor([int(failure is not None)])
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            if votes and not failure:
                failure = torch.OutOfMemoryError("another rank is out of memory")
        if failure:
            try:
                if isinstance(failure, torch.OutOfMemoryError):
                    raise failure
                raise torch.OutOfMemoryError(str(failure)) from failure
            finally:
                failure = None  # its traceback holds this frame: a cycle, in which the failed try's tensors would stay
        return result

    def __call__(self, k: int, batch: dict) -> list[tuple[float, float]]:
        """Step k of the schedule (from 0). Returns (loss, gradient norm) of the steps that are finished and were not
        returned yet: on a CPU this one, on a GPU the one before. Raises BadInput where one is not finite."""
        args = self.args
        lr = args.lr * min((k + 1) / max(args.warmup, 1), (args.steps - k) / max(args.steps - args.warmup, 1), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        try:
            loss = self.gradients(k, batch)
        except torch.OutOfMemoryError:
            self.max_tokens //= 2
            self.keep = self.max_tokens
            say(f"step {k + 1}: out of GPU memory; micro-batches of {self.max_tokens:,} tokens from here on, step "
                "repeated")
            loss = None
        if loss is None:  # outside `except`, whose traceback holds the tensors of the failed try
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            try:
                loss = self.gradients(k, batch)
            except torch.OutOfMemoryError:
                raise BadInput(f"step {k + 1}: out of GPU memory with micro-batches of {self.max_tokens:,} tokens too; "
                               f"{checkpoint_kept(args.out)}. Begin anew with a lower --max-tokens") from None
        return self._update(k, batch["qids"], loss)

    def _update(self, k, qids, loss) -> list[tuple[float, float]]:
        """Clips the gradients and lets AdamW take them, but where the loss or their norm is not finite."""
        if not self.on_gpu:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.clip)
            self.unread.append((k, qids, encoder.to_host(torch.stack([loss, norm.to(loss.dtype)]))))
            finished = self.flush()
            self.optimizer.step()
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            figures = torch.stack([loss, norm])
            torch._amp_foreach_non_finite_check_and_unscale_([figures], self.optimizer.found_inf, self.one)
            self.optimizer.grad_scale = (norm / self.args.clip).clamp(min=1.0)  # AdamW divides by it
            self.optimizer.step()
            self.unread.append((k, qids, encoder.to_host(figures)))
            finished = self.flush(but=1)
        self.optimizer.zero_grad()
        return finished

    def flush(self, but: int = 0) -> list[tuple[float, float]]:
        """(loss, gradient norm) of the steps that were not returned yet, all but the last `but`; waits for them."""
        finished = []
        while len(self.unread) > but:
            k, qids, figures = self.unread.popleft()
            loss, norm = figures().tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                names = ", ".join(dict.fromkeys(qids))
                raise BadInput(f"step {k + 1}: loss {loss}, gradient norm {norm}; queries {names}. Training stopped, "
                               f"{checkpoint_kept(self.args.out)}. Try a lower --lr, more --warmup or --dtype float32")
            finished.append((loss, norm))
        return finished


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's own error, or cuBLAS's and Triton's, which are known by their words alone."""
    words = ("CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def checkpoint_kept(out: Path) -> str:
    there = (out / "last" / "checkpoint.pt").is_file()
    return "the last checkpoint is intact" if there else "there is no checkpoint yet"


# ----------------------------------------------------------------------------------------- validation, checkpoints


class Validation:
    """Re-ranks the first stages of one or more datasets, sharded over ranks, and averages one measure."""

    def __init__(self, names, measure, depth, queries, rank, world):
        self.measure, self.rank, self.world, self.sets = measure, rank, world, []
        for name in names:
            texts = Texts(name, split="dev")
            if not any(q in texts.qrels for q in texts.queries):
                raise BadInput(f"--eval-dataset {name}: has no relevance judgments to measure by")
            run = first_stage(texts, None, "bm25", depth)
            chosen = list(texts.queries)[:queries] if queries else list(texts.queries)
            texts.qrels = {q: texts.qrels[q] for q in chosen}
            self.sets.append((name, texts, {q: run.get(q, {}) for q in chosen}))

    def __call__(self, model, max_tokens=None) -> dict:
        """{"score": mean of the measure over datasets, "collapsed": one of them is, NAME: measure, ...}"""
        result, flat = {}, False
        for name, texts, run in self.sets:
            scores = score_run(model, texts, {q: run[q] for q in list(run)[self.rank :: self.world]}, max_tokens)
            if self.world > 1:
                shares = [None] * self.world
                dist.all_gather_object(shares, scores)
                scores = {q: ranked for share in shares for q, ranked in share.items()}
            flat |= collapsed(scores)
            result[name] = mean(evaluate(texts.qrels, scores, [self.measure]))[self.measure]
        return {"score": sum(result.values()) / len(result), "collapsed": flat, **result}


def collapsed(run: dict) -> bool:
    """Whether all scores of a run are equal within 1e-6: a ranking of nothing, whatever its measures say."""
    values = [s for ranked in run.values() for s in ranked.values()]
    return len(values) > 1 and max(values) - min(values) <= 1e-6


def save_checkpoint(folder: Path, state: dict) -> None:
    """Writes folder/checkpoint.pt: the old one stays until the new one is whole and on the disk."""
    folder.mkdir(exist_ok=True)
    temporary = folder / "checkpoint.pt.new"
    try:
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError:  # torch's words for a write that was cut short: on a full disk the next one says so
                file.write(bytes(1 << 20))
                file.flush()
                raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "checkpoint.pt")
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def load_checkpoint(path: Path, model, optimizer, steps: int) -> tuple[int, float, list]:
    """(step, best score, history) of a checkpoint whose weights and optimizer state are put in place."""
    try:
        if wrong := zipfile.ZipFile(path).testzip():  # torch looks at no checksum
            raise ValueError(f"{wrong}: wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if not 0 < state["step"] <= steps:
            raise ValueError(f"step {state['step']} of {steps}")
        for p, kept in optimizer.state.items():
            if kept["exp_avg"].shape != p.shape or kept["exp_avg_sq"].shape != p.shape or kept["step"] < 0:
                raise ValueError("moments of other weights")
        return int(state["step"]), float(state["best"]), [[int(step), float(score)] for step, score in state["history"]]
    except Exception as e:  # whatever torch and pickle make of a damaged file
        raise damaged(path, e) from e


def begun_with(path: Path) -> dict:
    """args.json of a run folder."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        return {name: made[name] | {} for name in ("flags", "data", "versions")}  # | is an error of what is no object
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise damaged(path, e) from e


def damaged(path: Path, error: Exception) -> BadInput:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return BadInput(f"{path}: damaged ({why}); put a copy in its place, or --overwrite starts afresh")


def save_model(model: encoder.CrossEncoder, folder: Path) -> None:
    """The model in Hugging Face's layout, each file put in place whole, the weights last."""
    temporary = folder / ".model.new"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        for file in sorted(temporary.iterdir(), key=lambda f: f.suffix == ".safetensors"):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
            os.replace(file, folder / file.name)
    except Exception as e:  # safetensors wraps the system's errors, of which only the words are left
        if number := re.search(r"os error (\d+)", str(e)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from e
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def load_backbone(args, texts) -> encoder.CrossEncoder:
    """The model to train in float32, its fresh weights drawn from --seed."""
    torch.manual_seed(hash_of(args.seed, "head"))
    if args.backbone == "tiny":
        from kernels.tiny import build_tiny

        built, tokenizer = build_tiny([text for _, text in texts.corpus()], args.seed)
        return encoder.CrossEncoder(built, tokenizer, args.query_length, args.doc_length)
    name = BACKBONES[args.backbone][0] if args.backbone in BACKBONES else args.backbone
    model = encoder.CrossEncoder.from_pretrained(name, "float32", args.device, args.query_length, args.doc_length,
                                                 fresh_head=True)
    with encoder.from_hub(name, "saving it again: "), tempfile.TemporaryDirectory() as trial:
        for part in (model.tokenizer, model.model.config):  # what cannot be saved is said before the first step
            part.save_pretrained(trial)
    if model.new_weights:
        say(f"{name}: {len(model.new_weights)} new weights drawn from --seed: {', '.join(model.new_weights)}")
    return model


def open_source(args, texts):
    """What the batches are drawn from: --triples, --lists, or lists made by --first-stage."""
    path = args.triples or args.lists
    if path and not Path(path).exists():
        from teacher import published  # the paper's files by name, fetched at first use

        path = published(str(path))
    if path and (args.triples or str(path).endswith(".tsv")):
        return Triples(Path(path), args.loss, texts)
    if path is None and args.loss in FROM_TEACHER:
        raise BadInput(f"--loss {args.loss} learns from a teacher's scores: make a run with teacher.py and give it as "
                       "--lists")
    run = candidates(texts, path and Path(path), args.first_stage, args.depth, args.skip_missing)
    return Lists(run, texts, args.loss, args.list_size, args.negatives == "shared", args.max_teacher_margin,
                 args.random_share, path and Path(path))


# ----------------------------------------------------------------------------------------------------- the command


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="tiny", help=f"tiny, {', '.join(BACKBONES)}, or a hub id or folder of BERT, RoBERTa, "
        "ELECTRA, DeBERTa-v3 or ModernBERT kind (default tiny)")
    add("--loss", default="infonce", choices=sorted(LOSSES), help="the objective (default infonce)")
    add("--out", type=Path, help="run folder (default runs/DATASET-BACKBONE-LOSS-seedN)")
    data = parser.add_argument_group("data").add_argument
    data("--dataset", help="ir_datasets id, BEIR folder or pydocs (default: msmarco-passage/train; for tiny, pydocs)")
    data("--lists", help="TREC run of candidates; its scores are the teacher's for marginmse, ranknet, adrmse and kl; "
         "or the name of a published file (colbert, rankzephyr-50, ...)")
    data("--triples", help="TSV: qid pos neg, or pos_score neg_score qid pos_pid neg_pid; or ensemble-t2, ensemble-t1")
    data("--first-stage", type=first_stage_name, metavar="bm25|scoreddocs|splade[:MODEL]",
         help="make the lists (default bm25 where none are given)")
    data("--depth", type=at_least(1), help="candidates per query that are kept of a list (default 100)")
    data("--list-size", type=at_least(1), help="documents per list (2 for bce, hinge, marginmse; infonce 8; others 50)")
    data("--negatives", choices=["recipe", "shared"], default="recipe",
         help="shared: every loss gets the same lists, one relevant document and list-size - 1 others, and as many of "
         f"them per step (MS MARCO: {SHARED_LISTS}, 8 documents; default recipe)")
    data("--max-teacher-margin", type=float, metavar="X",
         help="leave out negatives that the run scores above their positive minus X (likely false negatives)")
    data("--skip-missing", action="store_true", help="leave out documents of --lists that the dataset lacks (counted)")
    budget = parser.add_argument_group("budget (defaults: the paper's, by backbone and loss)").add_argument
    budget("--batch-size", type=at_least(1), help="queries (lists) per step (as many as make 32 documents, mini 64)")
    budget("--lr", type=float, help="highest learning rate (base 1e-5, mini 7e-6)")
    budget("--steps", type=at_least(1), help="optimizer steps (200,000)")
    budget("--budget", choices=["steps", "docs"], default="steps",
           help="docs: as many steps as see the documents of --steps steps of the infonce recipe (32 a step; mini "
           "group 64, tiny 128), whatever this loss sees per step: the losses at equal documents")
    budget("--warmup", type=at_least(0), help="steps of linear warm-up (a fortieth of --steps, tiny a tenth); linear "
           "decay to 0 follows")
    budget("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    budget("--clip", type=float, default=1.0, help="largest gradient norm (default 1.0)")
    watch = parser.add_argument_group("watch").add_argument
    watch("--eval-dataset", nargs="+", help="validated on: ids, folders (their dev split), or nanobeir (default: the "
          "dataset's own dev split, nanobeir for MS MARCO), re-ranking BM25; none: keep the last step")
    watch("--eval-every", type=at_least(1), help="steps between validations (default: a 40th of --steps, at least 100)")
    watch("--eval-measure", default="RR@10", help="any of evaluate.py's measures (default RR@10)")
    watch("--eval-depth", type=at_least(1), help="candidates re-ranked per query (default 100)")
    watch("--eval-queries", type=at_least(1), help="validate on the first N queries (default: all)")
    watch("--log", default="jsonl", help="jsonl, tensorboard, wandb, with commas between (default jsonl)")
    go_on = parser.add_argument_group("go on").add_argument
    go_on("--resume", action="store_true", help="continue OUT/last where there is one; a finished run stays as it is")
    go_on("--save-every", type=at_least(1), help="steps between checkpoints (default: --eval-every)")
    go_on("--overwrite", action="store_true", help="start afresh in a folder that holds a run")
    go_on("--workers", type=at_least(0), help="processes that read and tokenise (default: 2 for ir_datasets, else 0)")
    go_on("--dry-run", action="store_true", help="print the plan: data, steps, documents, tokens; touches nothing")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if sum(x is not None for x in (args.triples, args.lists, args.first_stage)) > 1:
        parser.error("give one of --triples, --lists and --first-stage")
    if args.triples:  # its lists are what they are
        unused = {"--list-size": args.list_size not in (None, 2), "--negatives shared": args.negatives == "shared",
                  "--max-teacher-margin": args.max_teacher_margin is not None, "--depth": args.depth is not None,
                  "--skip-missing": args.skip_missing}
        for flag in (flag for flag, given in unused.items() if given):
            parser.error(f"{flag} is of lists and does nothing to --triples: leave it out")
    for name, value in (("lr", args.lr), ("clip", args.clip), ("weight-decay", args.weight_decay)):
        if value is not None and not (0 < value < math.inf or value == 0 and name == "weight-decay"):
            parser.error(f"--{name} {value:g}: " + ("0 or more" if name == "weight-decay" else "above 0"))
    if args.list_size == 1:
        parser.error("--list-size 1: a list has two documents or more")
    for kind in args.log.split(","):
        if kind not in ("jsonl", "tensorboard", "wandb"):
            parser.error(f"--log {args.log}: {kind!r} is none of jsonl, tensorboard, wandb (commas between)")
        if kind != "jsonl" and importlib.util.find_spec(kind) is None:
            parser.error(f"--log {kind}: {kind} is not installed; pip install {kind}, or leave it out")
    parse_measure(args.eval_measure)
    import_torch()
    return fill(args)


def fill(args: argparse.Namespace) -> argparse.Namespace:
    """Every default that depends on another flag: the paper's recipes (arXiv 2603.03010) and the preset of `tiny`."""
    def default(name, value):
        if getattr(args, name) is None:
            setattr(args, name, value)

    tiny, shared = args.backbone == "tiny", args.negatives == "shared"
    default("dataset", "pydocs" if tiny else "msmarco-passage/train")
    paper = args.dataset == "msmarco-passage/train" and not tiny
    args.random_share = None
    if paper and not (args.lists or args.triples or args.first_stage):
        if shared:
            args.lists = SHARED_LISTS
        else:
            setattr(args, "triples" if LIST_SIZE[args.loss] == 2 else "lists", PAPER_LISTS[args.loss])
    if not (args.lists or args.triples):
        default("first_stage", "bm25")
    if tiny:
        from kernels.tiny import PRESET, RANDOM_SHARE

        for name, value in PRESET.items():
            default(name, value)
        if not (args.lists or args.triples):
            args.random_share = RANDOM_SHARE
    group = GROUPS[BACKBONES[args.backbone][1] if args.backbone in BACKBONES else "base"]
    default("list_size", 2 if args.triples else 8 if shared else LIST_SIZE[args.loss])
    default("batch_size", group["documents"] if args.list_size == 2 else max(group["documents"] // args.list_size, 1))
    default("lr", group["lr"])
    default("steps", 200_000)
    if args.budget == "docs":
        documents = PRESET["batch_size"] * PRESET["list_size"] if tiny else group["documents"]
        args.steps = math.ceil(args.steps * documents / max(args.batch_size * args.list_size, 1))
    default("warmup", args.steps // (10 if tiny else 40))
    default("eval_every", max(args.steps // 40, min(args.steps, 100)))
    default("save_every", args.eval_every)
    config = Path(args.backbone) / "config.json"  # a model trained here knows its lengths
    try:
        known = json.loads(config.read_text()) if config.is_file() else {}
        known = {name: at_least(1)(str(known.get(name, value))) for name, value in
                 (("query_length", 32), ("doc_length", 256))}
    except (ValueError, AttributeError, RecursionError, argparse.ArgumentTypeError) as e:
        raise BadInput(f"{config}: not the config of a model ({str(e)[:100]})") from e
    default("depth", 500 if args.lists == "colbert" else 100)
    default("eval_depth", 100)
    default("query_length", known["query_length"])
    default("doc_length", known["doc_length"])
    if args.dataset.split("/")[0] == "pydocs":
        default("eval_dataset", ["pydocs/dev"])
    default("eval_dataset", ["nanobeir"] if paper else None)
    short = "-".join(Path(args.dataset).parts[-2:]) + "-" + Path(args.backbone).name
    ways = "-shared" * shared + "-docs" * (args.budget == "docs")
    default("out", Path("runs") / f"{short}-{args.loss}{ways}-seed{args.seed}")
    if args.eval_dataset is None:
        folder = Path(args.dataset) if Path(args.dataset).is_dir() else Path(args.dataset).parent
        args.eval_dataset = [str(folder / "dev")] if (folder / "qrels" / "dev.tsv").is_file() else []
    elif args.eval_dataset == ["none"]:
        args.eval_dataset = []
    elif args.eval_dataset == ["nanobeir"]:
        args.eval_dataset = list(SUITES["nanobeir"]["NanoBEIR"].values())
    if args.dtype == "auto":
        has_gpu = args.device != "cpu" and torch.cuda.is_available()
        narrow = has_gpu and linears.native_bf16("cuda")
        args.dtype = "bfloat16" if narrow else "float32"  # on a CPU the same bits everywhere
    if args.warmup > args.steps:
        raise BadInput(f"--warmup {args.warmup}: longer than --steps {args.steps}")
    return args


def compute(args, documents: int) -> list[str]:
    """A line on the operations of the run, where the backbone's shape is known (formulas: kernels/ROOFLINE.md)."""
    from kernels.bench.roofline import MODELS, cell_hours, flops_per_step

    if args.backbone not in MODELS:
        return []
    step = flops_per_step(MODELS[args.backbone], [TOKENS] * documents)
    hours, _ = cell_hours(args.backbone, documents, args.steps, TOKENS)
    return [f"compute    {step / 1e12:.2f} TFLOP a step at {TOKENS} tokens a pair, {step * args.steps / 1e18:.2f} "
            f"EFLOP in all: never below {hours:.1f} h on an H100 in bf16 (kernels/ROOFLINE.md), validation not counted"]


def files(args) -> list[str]:
    """A line for each file that the run reads: size and md5 where they are known, and whether it is here already."""
    from huggingface_hub import try_to_load_from_cache

    from kernels.bench.roofline import MODELS, parameters
    from teacher import PUBLISHED, kept_at

    rows, source = [], args.triples or args.lists  # (what, bytes, md5, is here), None where it is not known
    if args.backbone in BACKBONES:
        hub = BACKBONES[args.backbone][0]
        here = [try_to_load_from_cache(hub, name) for name in ("model.safetensors", "pytorch_model.bin")]
        size = 4 * sum(parameters(MODELS[args.backbone]))
        rows.append((f"weights of {hub}", size, None, any(isinstance(path, str) for path in here)))
    rows += downloads(args.dataset)
    if source == "docpairs" and not Path(source).exists():
        rows += downloads("msmarco-passage/train/docpairs")
    elif source in PUBLISHED and not Path(source).exists():
        rows.append((f"{source}: {PUBLISHED[source][1]}", None, PUBLISHED[source][2], kept_at(source).exists()))
    elif source:
        here = Path(source).exists()
        rows.append((source, Path(source).stat().st_size if here else None, None, here))
    for name in args.eval_dataset:
        rows += downloads(name) if name.startswith("nano-beir/") else []
    return [f"file       {what}, {f'{size / 1e9:.3f} GB' if size else 'size unknown'}, md5 {md5 or 'unknown'}, "
            f"{'here' if here else 'not here'}" for what, size, md5, here in rows]


def plan(args) -> str:
    """What the command would do, from the flags alone."""
    source = f"triples {args.triples}" if args.triples else f"lists {args.lists or args.first_stage}"
    documents = args.batch_size * args.list_size
    most = args.query_length + args.doc_length + 4  # RoBERTa has four special tokens, the others three
    lines = [
        f"backbone   {args.backbone} ({BACKBONES[args.backbone][0] if args.backbone in BACKBONES else 'as given'})",
        f"loss       {args.loss}, {args.negatives} negatives",
        f"data       {args.dataset}, {source}, seed {args.seed}",
        f"step       {args.batch_size:,} lists of {args.list_size} documents = {documents:,} documents, about "
        f"{documents * TOKENS:,} tokens, at most {documents * most:,}",
        f"steps      {args.steps:,}: {args.warmup:,} of warm-up to lr {args.lr:g}, then linearly to 0; AdamW, weight "
        f"decay {args.weight_decay:g}, clip {args.clip:g}, {args.dtype}",
        f"documents  {args.steps * documents:,} in all",
        *compute(args, documents),
        f"validation {args.eval_measure} on {', '.join(args.eval_dataset) or 'nothing (the last step is kept)'} every "
        f"{args.eval_every:,} steps, BM25's first {args.eval_depth} re-ranked",
    ]
    return "\n".join(lines)


class Stop:
    """Inside `with`, SIGTERM and Ctrl-C are only noted, for the step in hand to be finished and saved. A second one
    ends the run at once, and so does a step that is not finished `grace` seconds later."""

    grace = 25  # schedulers wait 30 before they kill

    def __enter__(self):
        self.signal, self.timer = 0, None
        self.before = [(number, signal.signal(number, self._note)) for number in (signal.SIGINT, signal.SIGTERM)]
        return self

    def __exit__(self, *_):
        for number, handler in self.before:
            signal.signal(number, handler)
        if self.timer:
            self.timer.cancel()

    def _note(self, number, _frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self.timer = threading.Timer(self.grace, self._give_up)
        self.timer.daemon = True
        self.timer.start()

    def _give_up(self):
        os.write(2, b"\nstopped within a step that did not end; --resume goes on from the last checkpoint\n")
        os._exit(128 + self.signal)


class Log:
    """log.jsonl always; TensorBoard and Weights & Biases where asked and installed."""

    def __init__(self, args, step):
        self.path, self.writers = args.out / "log.jsonl", []
        rows, damaged = self.read(self.path) if step else ([], 0)
        if step and (damaged or not rows):
            say(f"{self.path}: {damaged:,} damaged lines left out, {len(rows):,} kept; the training goes on without")
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        kinds = args.log.split(",")
        if "tensorboard" in kinds:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(args.out / "tensorboard", purge_step=step)
            self.writers.append(lambda row: [board.add_scalar(k, v, row["step"]) for k, v in row.items()])
        if "wandb" in kinds:
            import wandb

            wandb.init(project="cross-encoder-study", name=args.out.name, config=flags(args))
            self.writers.append(lambda row: wandb.log(row, step=row["step"]))

    @staticmethod
    def read(path) -> tuple[list[dict], int]:
        """(rows, number of lines that are none) of a log.jsonl, which a full disk may have torn."""
        lines, rows = path.read_text("utf-8", "replace").splitlines() if path.is_file() else [], []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                row = json.loads(line)
                rows += [row] if row["step"] >= 0 else []
        return rows, len(lines) - len(rows)

    def __call__(self, **row):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for write in self.writers:
            write({k: v for k, v in row.items() if isinstance(v, (int, float))})


def flags(args) -> dict:
    """The flags that decide the result, as JSON: those that a resumed run must share."""
    ways = ("out", "resume", "overwrite", "dry_run", "log", "workers", "save_every", "random_share", "budget")
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items()) if k not in ways}


def provenance(args, texts, validation) -> dict:
    """What it takes to repeat the run: flags, versions, commit, data."""
    import transformers

    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    files = [Path(p) for p in (args.lists, args.triples) if p and Path(p).is_file()]
    return {
        "flags": flags(args),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "transformers": transformers.__version__, "numpy": np.__version__},
        "commit": git or None,
        "data": {"corpus": texts.fingerprint(), "queries and qrels": texts.digest(),
                 "backbone": model_stamp(args.backbone)}
        | {f"validation {name}": f"{t.fingerprint()} {t.digest()}" for name, t, _ in validation.sets}
        | {str(f): sha256_of(f) for f in files},
    }


def train(args, rank: int, world: int) -> int:
    out, last = args.out, args.out / "last"
    begun = (out / "args.json").is_file()
    if begun and not (args.resume or args.overwrite):
        raise BadInput(f"{out}: holds a run; --resume continues it, --overwrite starts afresh, --out names another")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: a file; --out names a folder")
    if SURROGATE.search(str(out)):
        raise BadInput(f"--out {str(out)!r}: not UTF-8, and weights cannot be written under such a name; give another")
    # names with a dot: what a run that was killed before its first file leaves
    if out.is_dir() and not (begun or args.overwrite) and any(f.name[0] != "." for f in out.iterdir()):
        raise BadInput(f"{out}: a folder with other things in it; --overwrite writes there all the same, --out names "
                       "another")
    if begun and args.resume:
        before = begun_with(out / "args.json")
        other = [f"--{k.replace('_', '-')} {before['flags'].get(k)} (now {v})"
                 for k, v in flags(args).items() if before["flags"].get(k) != v]
        if other:
            raise BadInput(f"{out}: begun with other flags: {', '.join(other)}; give the same, or another --out")
        if (out / "README.md").is_file():  # written last; so `last/` may go once a run is finished
            say(f"{out}: finished already ({args.steps:,} steps); nothing to do")
            return 0
    resumed = begun and args.resume and (last / "checkpoint.pt").is_file()
    has_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu else "cpu"
    with rank_0_first():
        texts = Texts(args.dataset, split="train")
        model = load_backbone(args, texts).to(device)
        source = open_source(args, texts)
        validation = Validation(args.eval_dataset, args.eval_measure, args.eval_depth, args.eval_queries, rank, world)
    now = provenance(args, texts, validation) if rank == 0 else None
    if begun and args.resume and rank == 0:
        changed = [name for name, digest in now["data"].items() if before["data"].get(name, digest) != digest]
        if changed:
            raise BadInput(f"{out}: begun on other data: {', '.join(changed)} changed since (corpus and backbone by "
                           "size and time, all else by content); bring the old back, or give another --out")
        if before["versions"] != now["versions"]:
            say(f"{out}: begun with {before['versions']}, now {now['versions']}: other bytes than of one run")
    say(plan(args))
    say(f"data       {len(source):,} {'triples' if isinstance(source, Triples) else 'queries with lists'}; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {world} process{'es' * (world > 1)} on {device}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    step = Step(model, args.loss, optimizer, args, rank, world)
    start, best, history = 0, -math.inf, []
    if rank == 0 and not resumed:
        if out.is_dir():
            shutil.rmtree(last, ignore_errors=True)
            (out / "README.md").unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / "args.json") as file:
            json.dump(now, file, indent=1)
    if resumed:
        start, best, history = load_checkpoint(last / "checkpoint.pt", model, optimizer, args.steps)
        say(f"{out}: going on after step {start:,}")
    log = Log(args, start) if rank == 0 else None

    def checkpoint(done):
        if rank == 0:
            save_checkpoint(last, {"step": done, "model": model.model.state_dict(), "optimizer": optimizer.state_dict(),
                                   "best": best, "history": history})

    def measured(done):
        nonlocal best
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            result = validation(model, args.max_tokens)
        history.append([done, result["score"]])
        if rank == 0:
            log(**{"step": done, args.eval_measure: result["score"], **result})
            word = f"step {done:,}: {args.eval_measure} {result['score']:.4f}"
            if result["collapsed"]:
                word += "; COLLAPSED: the model gives every document the same score"
            if result["score"] > best:
                save_model(model, out)
                word += " (best so far, saved)"
            say(word)
        best = max(best, result["score"])

    def due(done):
        return bool(validation.sets) and (done % args.eval_every == 0 or done == args.steps)

    if start and due(start) and start not in dict(history):
        measured(start)
        checkpoint(start)
    batches = Batches(source, texts, model.tokenize, args, rank, world)
    workers = (0 if texts.folder else 2) if args.workers is None else args.workers
    loader = iter(batches.loader(start, args.steps, workers))
    bar = Progress(total=args.steps, initial=start, desc=args.out.name, unit=" steps")
    model.train()
    mark, waited, pairs, tokens, total, since, idle, speed = time.perf_counter(), 0.0, 0, 0, 0.0, start, 0, ""
    every = max(min(args.eval_every, args.steps) // 10, 1)
    with Stop() as stop:
        for k in range(start, args.steps):
            begin = time.perf_counter()
            batch = next(loader)
            if isinstance(batch, BadInput):
                raise batch
            waited += time.perf_counter() - begin
            done = k + 1
            logs = done % every == 0 or done == args.steps
            validates = due(done)
            finished = step(k, batch)
            if logs or validates:
                finished += step.flush()
            total += sum(loss for loss, _ in finished)
            idle += sum(norm == 0 for _, norm in finished)
            pairs += int(batch["lengths"].sum())
            tokens += sum(map(len, batch["queries"])) + sum(map(len, batch["documents"]))
            bar.set_postfix_str(f"loss {total / (done - since):.4f}{speed}", refresh=False)
            bar.update()
            if rank == 0 and logs:
                seconds = time.perf_counter() - mark
                memory = (torch.cuda.max_memory_allocated() if model.device.type == "cuda"
                          else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30
                row = dict(step=done, loss=total / (done - since), lr=optimizer.param_groups[0]["lr"],
                           grad_norm=finished[-1][1],
                           pairs_per_second=pairs / seconds, tokens_per_second=tokens * world / seconds,
                           waiting=waited / seconds, memory_gib=memory)
                log(**row)
                speed = (f", lr {row['lr']:.1e}, {row['pairs_per_second']:,.0f} pairs/s, "
                         f"{row['tokens_per_second']:,.0f} tokens/s, waiting {row['waiting']:.0%}, {memory:.1f} GiB")
                mark, waited, pairs, tokens, total, since = time.perf_counter(), 0.0, 0, 0, 0.0, done
            if validates:
                checkpoint(done)  # no signal waits for a long validation: it is made up for when the run goes on
                measured(done)
                mark, waited, pairs, tokens, total, since = time.perf_counter(), 0.0, 0, 0, 0.0, done
            halt = stop.signal
            if world > 1:
                votes = torch.tensor([halt])
                dist.all_reduce(votes, dist.ReduceOp.MAX)
                halt = int(votes)
            if done % args.save_every == 0 or done == args.steps or halt:
                total += sum(loss for loss, _ in step.flush())  # nothing is saved that was not seen to be finite
                checkpoint(done)
            if halt and done < args.steps:
                bar.close()
                say(f"{signal.Signals(halt).name}: stopped after step {done:,}, checkpoint written; --resume goes on")
                return 128 + halt
    bar.close()
    if idle:
        say(f"{idle:,} of {args.steps - start:,} steps had no gradient: their lists held nothing to learn")
    if rank == 0:
        if not validation.sets:
            save_model(model, out)
        finish(args, model, history)
    if world > 1:
        dist.barrier()
    return 0


def finish(args, model, history) -> None:
    """The closing table on the dataset's test split, where it has one, and the model card."""
    table, name = "", args.dataset.removesuffix("/train")
    if name == "pydocs" or (Path(name) / "qrels" / "test.tsv").is_file():
        texts = Texts(name, split="test")
        run = first_stage(texts, None, "bm25", args.eval_depth)
        best = encoder.CrossEncoder.from_pretrained(args.out, dtype="float32", device=model.device.type)
        scores = score_run(best, texts, run, args.max_tokens, progress="test")
        measures = ["nDCG@10", "RR@10", "AP"]
        row = args.out.name + " (COLLAPSED: all scores equal)" * collapsed(scores)
        table = markdown_table({"BM25": evaluate(texts.qrels, run, measures),
                                row: evaluate(texts.qrels, scores, measures)})
        print(f"\n{name} test: {len(run):,} queries, BM25's first {args.eval_depth} documents and the same re-ranked"
              f"\n\n{table}\n")
    with atomic_write(args.out / "README.md") as file:
        file.write(model_card(args, history, table))
    say(f"model in {args.out}; re-rank with: python rerank.py --model {args.out} --dataset {args.dataset} "
        "--first-stage bm25 --out reranked.run")


def data_licence(args) -> str:
    """Under what terms the training data stand, as far as they are known here."""
    if args.dataset.split("/")[0] == "pydocs":
        return ("Docstrings of installed packages, under the licences of those: Python (PSF License), numpy and torch "
                "(BSD-3-Clause and others that they bundle), transformers (Apache-2.0).")
    if args.dataset.startswith("msmarco"):
        return ("MS MARCO, which Microsoft offers for non-commercial research purposes only. The lists and teacher's "
                f"scores (`{args.triples or args.lists or args.first_stage}`) are derived from it; those that were "
                "published name their terms where they are kept (PUBLISHED in teacher.py).")
    if Path(args.dataset).is_dir():
        return "A collection of the user's own; what its licence allows is for its owner to say here."
    return f"Through ir_datasets, whose page of `{args.dataset}` names the source and its terms: https://ir-datasets.com."


def model_card(args, history, table: str) -> str:
    """README.md of the run folder, with the hub's front matter: what it is, its data and recipe, what it reaches, how
    to use it, its limits. history: [step, score] of every validation; table: the measures on the test split."""
    from huggingface_hub import ModelCardData

    base = BACKBONES[args.backbone][0] if args.backbone in BACKBONES else args.backbone
    fresh = args.backbone == "tiny" or Path(base).exists()
    front = ModelCardData(
        base_model=None if fresh else base, license="other", license_name="see-training-data",
        datasets=["microsoft/ms_marco"] if args.dataset.startswith("msmarco") else None,
        library_name="sentence-transformers", pipeline_tag="text-ranking", tags=["cross-encoder", "reranker"])
    validation = "Not validated: the weights of the last step."
    if history:  # the kept model is that of the first best score; its row of the log has the score of each set
        best = max(history, key=lambda row: row[1])[0]
        rows = [row for row in Log.read(args.out / "log.jsonl")[0] if row["step"] == best]
        known = {k: v for row in rows for k, v in row.items() if isinstance(v, float)}
        known["mean"] = max(score for _, score in history)
        cells = [f"| {name} | {known[name]:.4f} |" for name in [*args.eval_dataset, "mean"] if name in known]
        validation = "\n".join([f"Step {best:,} is kept; its validation on BM25's first {args.eval_depth}:", "",
                                f"| dataset | {args.eval_measure} |", "|---|---:|", *cells])
    if table:
        table = f"Test split, BM25's first {args.eval_depth} and the same re-ranked:\n\n{table}"
    return f"""---
{front.to_yaml()}
---

# Cross-encoder {args.backbone}, {args.loss}

Re-ranks documents for a query; one raw logit per pair, higher is more relevant (no sigmoid).

## Training data

{data_licence(args)} The model's own licence has to respect these terms and those of its backbone.

## Recipe

After arXiv 2603.03010; every flag, version and checksum is in args.json.

```
{plan(args)}
```

## Results

{validation}

{table or "No test split beside the training data: evaluate.py judges runs on others."}

## Use

```python
from sentence_transformers import CrossEncoder
CrossEncoder("{args.out}").predict([("query", "document")])
```

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{args.out}")
model = AutoModelForSequenceClassification.from_pretrained("{args.out}").eval()
with torch.no_grad():
    scores = model(**tokenizer(["query"], ["document"], return_tensors="pt")).logits[:, 0]
```

```
python rerank.py --model {args.out} --dataset DATASET --first-stage bm25 --out reranked.run
```

## Limits

Trained on queries cut to {args.query_length} tokens and documents cut to {args.doc_length}: what stands behind is not
seen (`rerank.py --long-docs max` scores passages). Scores order the documents of one query; they are no probabilities
and do not compare across queries. Candidates unlike those of the training (first stage, language, domain) were not
tested here, nor bias in what is ranked high. One seed ({args.seed}); others differ.
"""


def main() -> int:
    args = parse()
    if args.dry_run:
        print(plan(args), *files(args), f"out        {args.out}", sep="\n")
        return 0
    rank, world = join_processes()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(args.out):
            return train(args, rank, world)
    except OSError as e:
        if e.errno in FULL:
            raise BadInput(f"{args.out}: cannot write ({e.strerror}); {checkpoint_kept(args.out)}. Free some space and "
                           "--resume") from e
        raise
    except KeyboardInterrupt:  # outside the steps, where Stop does not note it
        say(f"interrupted; {checkpoint_kept(args.out)}. --resume goes on")
        return 130
    finally:
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(guarded(main))
