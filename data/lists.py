"""What is trained on: lists of a run, lists with their texts, triples of a TSV, and batch k as a
pure function of seed and k.

Every source of lists has `len()`, `item(i, seed)` -> (qid, docids, targets) of list i, drawn from
`seed` alone, and `where(i)`, the place in a file that an error names.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data.command import BadInput, Progress, say
from data.list_file import ListFile
from data.runs import Columns, line_of
from data.texts import DocumentTokens, Texts
from data.triples import TripleFile

FROM_TEACHER = ("marginmse", "ranknet", "adrmse", "kl", "mse")  # the losses on a teacher's scores


class LeftOut(Exception):
    """A query that no list is drawn from; str() says why."""


class Lists:
    """Candidate lists of a run in columns, and how a training list is drawn from one.

    Losses on labels (bce, hinge, infonce) get one relevant document of the qrels and list_size - 1
    of the candidates that are not judged relevant. Losses on a teacher get list_size candidates
    with the run's scores, all of them where there are no more; marginmse has its relevant document
    first (without qrels: the teacher's best). With `shared` every loss gets the lists of the first
    kind, drawn alike, from queries whose relevant document is among the candidates.

    Args:
        max_margin: leave out negatives that the run scores above their positive minus this.
        random_share: the part of the negatives drawn from the whole corpus instead.
        run_path: of the run, for errors; None where it was made here.
    """

    def __init__(self, run: Columns, texts: Texts, loss: str, list_size: int, shared: bool = False,
                 max_margin: float | None = None, random_share: float | None = None,
                 run_path: Path | None = None) -> None:
        self.run, self.texts, self.loss, self.size = run, texts, loss, list_size
        self.shared, self.max_margin, self.random_share = shared, max_margin, random_share
        self.path, self.teacher = run_path, loss in FROM_TEACHER
        self.labelled = shared or not self.teacher
        if random_share is not None:
            self.corpus = pa.array([d for d, _ in texts.corpus()], pa.large_string())
        with np.errstate(over="ignore"):
            self.scores = run.values.astype(np.float32)
        self._check_scores()
        if self.loss == "mse" and self._are_ranks():
            say("lists: the scores are whole numbers without ties, as ranks are in an LLM's run "
                "(depth - rank + 1): mse learns the numbers themselves; ranknet and adrmse learn "
                "an order")
        self.relevant = self._relevant()
        self.elsewhere, self.filtered = texts.other_splits(), 0
        self.queries, self.positives, self.sizes, rows, left = [], [], [], [], Counter()
        for i in range(len(run.qids)):
            try:
                positives, mine, size = self._labelled(i) if self.labelled else self._ranked(i)
            except LeftOut as why:
                left[str(why)] += 1
                continue
            self.queries.append(i)
            self.positives.append(positives)
            self.sizes.append(size)
            rows.append(mine)
        self.starts = np.cumsum([0, *map(len, rows)])  # of a query's rows of the run, in self.rows
        self.rows = np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64)
        self._report(left)

    def _check_scores(self) -> None:
        bad = np.flatnonzero(~np.isfinite(self.scores))
        if self.teacher and len(bad):
            qid = self.run.qids[self.run.query_of_rows()[bad[0]]]
            raise BadInput(f"{self.path}: query {qid!r} has scores beyond the range of single "
                           "precision")

    def _are_ranks(self) -> bool:
        """Whether every query's scores are whole numbers, no two alike."""
        lists = (self.scores[self._rows(i)] for i in range(len(self.run.qids)))
        return all((s % 1 == 0).all() and len(np.unique(s)) == len(s) for s in lists)

    def _relevant(self) -> dict[str, list[str]]:
        """{qid: relevant documents that the dataset holds}; counts those that it lacks."""
        relevant = {q: [d for d, grade in self.texts.qrels.get(q, {}).items() if grade > 0]
                    for q in self.run.qids}
        distinct = dict.fromkeys(d for docids in relevant.values() for d in docids)
        lost = set(self.texts.missing(distinct, read=self.labelled))
        if lost:
            say(f"lists: {len(lost):,} relevant documents are not in dataset {self.texts.name} "
                "and are left out")
        return {q: [d for d in docids if d not in lost] for q, docids in relevant.items()}

    def _row_of(self, i: int) -> dict[str, int]:
        """{docid: row of the run} of query i; LeftOut where another split judges the query."""
        if self.run.qids[i] in self.elsewhere:
            raise LeftOut("judged in another split of the dataset")
        start, end = int(self.run.starts[i]), int(self.run.starts[i + 1])
        return dict(zip(self.run.docids[start:end].to_pylist(), range(start, end), strict=True))

    def _rows(self, i: int) -> np.ndarray:
        """The rows of the run that are query i's."""
        return np.arange(self.run.starts[i], self.run.starts[i + 1])

    def _labelled(self, i: int) -> tuple[list, np.ndarray, int]:
        """(relevant documents with their scores, rows of its negatives, documents of a list) of
        query i, for lists of one relevant document and others."""
        row_of, relevant = self._row_of(i), self.relevant[self.run.qids[i]]
        inside = [d for d in relevant if d in row_of]
        if not relevant:
            raise LeftOut("no relevant document")
        if self.shared and not inside:
            raise LeftOut("the relevant document is not among the candidates")
        rows = self._rows(i)
        rows = np.delete(rows, [row_of[d] - rows[0] for d in inside])
        if self.max_margin is not None and inside:
            lowest = min(self.run.values[row_of[d]] for d in inside)
            kept = rows[self.run.values[rows] <= lowest - self.max_margin]
            self.filtered += len(rows) - len(kept)
            rows = kept
        others = len(rows)
        if self.random_share is not None:
            others = len(self.corpus) - len(relevant)
        if others < 1:
            raise LeftOut("no candidate that is not relevant")
        self._learns(i)
        return (self._scored(inside if self.shared else relevant, row_of), rows,
                min(self.size, 1 + others))

    def _ranked(self, i: int) -> tuple[list, np.ndarray, int]:
        """The same for lists of candidates in a teacher's order: rows are all of them."""
        row_of, rows = self._row_of(i), self._rows(i)
        if self.loss != "mse" and len(rows) < 2:
            raise LeftOut("fewer than two candidates")
        if len(rows) < 1:
            raise LeftOut("no candidate")
        self._learns(i)
        positives = self._scored(self.relevant[self.run.qids[i]], row_of)
        return positives, rows, min(self.size, len(rows))

    def _learns(self, i: int) -> None:
        if self.loss == "ranknet" and np.ptp(self.scores[self._rows(i)]) == 0:
            raise LeftOut("the teacher's scores all tie")

    def _scored(self, docids: list[str], row_of: dict[str, int]) -> list[tuple[str, float]]:
        """With the run's scores; NaN for those that are not among the candidates."""
        values = self.run.values
        return [(d, float(values[row_of[d]]) if d in row_of else math.nan) for d in docids]

    def _report(self, left: Counter) -> None:
        """Everything that is left out or shorter than asked, once."""
        for why, number in left.items():
            say(f"lists: {number:,} of {len(self.run.qids):,} queries left out: {why}")
        if self.filtered:
            say(f"lists: {self.filtered:,} negatives left out, scored above their positive minus "
                f"{self.max_margin:g}")
        short = sum(size < self.size for size in self.sizes) if self.labelled else 0
        if short:
            say(f"lists: {short:,} queries have fewer than {self.size - 1} negatives; their lists "
                "are shorter")
        longest = max(np.diff(self.starts), default=0)
        if not self.labelled and longest > self.size:
            say(f"lists: up to {longest:,} candidates per query; {self.size} of them drawn anew at "
                "every pass")
        if not self.queries:
            raise BadInput(f"{self.path or 'lists'}: no query can be trained on "
                           f"({', '.join(left)}); do qrels and run belong together?")

    def __len__(self) -> int:
        return len(self.queries)

    def item(self, i: int, seed) -> tuple[str, list[str], list[float]]:
        """(qid, docids, targets) of a list of query i; every draw comes from `seed`."""
        rng = np.random.default_rng(seed)
        rows = self.rows[self.starts[i] : self.starts[i + 1]]
        draw = self._draw_labelled if self.labelled else self._draw_ranked
        return self.run.qids[self.queries[i]], *draw(i, rows, rng)

    def _draw_ranked(self, i: int, rows, rng) -> tuple[list[str], list[float]]:
        rows = rng.permutation(rows)[: self.size]
        docids, targets = self._taken(rows)
        if self.loss == "marginmse":
            relevant = {d for d, _ in self.positives[i]}
            first = max(range(len(docids)), key=lambda j: (docids[j] in relevant, targets[j]))
            docids.insert(0, docids.pop(first))
            targets.insert(0, targets.pop(first))
        return docids, targets

    def _draw_labelled(self, i: int, rows, rng) -> tuple[list[str], list[float]]:
        positive, score = self.positives[i][rng.integers(len(self.positives[i]))]
        anywhere = rng.binomial(self.size - 1, self.random_share) if self.random_share else 0
        docids, scores = self._taken(rng.permutation(rows)[: self.size - 1 - anywhere])
        docids, scores = [positive, *docids], [score, *scores]
        if not self.teacher:
            scores = [1.0] + [0.0] * (len(docids) - 1)
        if self.random_share:
            judged = self.texts.qrels.get(self.run.qids[self.queries[i]], {})
            while len(docids) < self.sizes[i]:
                other = self.corpus[int(rng.integers(len(self.corpus)))].as_py()
                if judged.get(other, 0) <= 0 and other not in docids:
                    docids.append(other)
                    scores.append(0.0)
        return docids, scores

    def _taken(self, rows) -> tuple[list[str], list[float]]:
        return self.run.docids.take(pa.array(rows)).to_pylist(), self.run.values[rows].tolist()

    def where(self, i: int) -> str:
        qid = self.run.qids[self.queries[i]]
        return f"{self.path}:{line_of(self.path, qid)}" if self.path else f"query {qid!r}"


# -------------------------------------------------------------------------- lists with their texts


class TextLists:
    """Training lists of a ListFile.

    Losses on labels, and marginmse, get one relevant text and list_size - 1 others; the other
    losses on a teacher get list_size texts of a line with their scores, all where there are no
    more. With `shared` every loss gets the lists of the first kind, drawn alike. All draws are
    anew at every pass.

    Args:
        max_margin: leave out others that the file scores above their relevant text minus this.
    """

    def __init__(self, file: ListFile, loss: str, list_size: int, shared: bool = False,
                 max_margin: float | None = None) -> None:
        self.file, self.size, self.loss = file, list_size, loss
        self.teacher = loss in FROM_TEACHER
        self.labelled = shared or not self.teacher or loss == "marginmse"
        if self.teacher and np.isnan(file.scores).all():
            raise BadInput(f"{file.path}: no scores in it, but --loss {loss} learns from a "
                           "teacher's: teacher.py cross-encoder --lists writes them into it")
        line = np.repeat(np.arange(len(file)), np.diff(file.starts))  # of each document
        self.kept = np.array(file.first)
        if max_margin is not None and self.labelled:
            self.kept &= ~self._likely_relevant(line, max_margin)
        self.queries = self._trained_on(line)

    def _likely_relevant(self, line: np.ndarray, max_margin: float) -> np.ndarray:
        """bool [documents]; scores that are not there say nothing of their document."""
        file, lowest = self.file, np.full(len(self.file), np.inf)
        if np.isnan(file.scores).all():
            raise BadInput(f"{file.path}: no scores in it, which --max-teacher-margin compares")
        np.fmin.at(lowest, line[file.positive], file.scores[file.positive])
        likely = ~file.positive & (file.scores > lowest[line] - max_margin)
        if likely.any():
            say(f"{file.path}: {likely.sum():,} texts left out, scored above their relevant text "
                f"minus {max_margin:g}")
        return likely

    def _trained_on(self, line: np.ndarray) -> np.ndarray:
        """The lines that lists are drawn from; all others are counted by what they lack."""
        file, n = self.file, len(self.file)
        relevant = np.bincount(line[self.kept & file.positive], minlength=n)
        others = np.bincount(line[self.kept & ~file.positive], minlength=n)
        lacks = {}
        if self.labelled:
            lacks = {"no relevant text": relevant == 0, "no text that is not relevant": others == 0}
        elif self.loss != "mse":  # which compares no texts with each other
            lacks = {"fewer than two texts": relevant + others < 2}
        if self.teacher:
            lacks["no scores"] = np.isnan(file.scores[file.starts[:-1]])
        if self.loss == "ranknet":
            scores = file.scores.astype(np.float32)
            low, high = np.full(n, np.inf, np.float32), np.full(n, -np.inf, np.float32)
            np.fmin.at(low, line, scores)
            np.fmax.at(high, line, scores)
            lacks["the teacher's scores all tie"] = low == high
        left = np.zeros(n, bool)
        for why, lines in lacks.items():
            if (lines & ~left).any():
                say(f"{file.path}: {(lines & ~left).sum():,} of {n:,} lists left out: {why}")
            left |= lines
        if left.all():
            raise BadInput(f"{file.path}: no list can be trained on")
        self._report(relevant[~left], others[~left])
        return np.flatnonzero(~left)

    def _report(self, relevant: np.ndarray, others: np.ndarray) -> None:
        """Lists that are shorter or longer than asked, once."""
        short, longest = (others < self.size - 1).sum(), (relevant + others).max()
        if self.labelled and short:
            say(f"{self.file.path}: {short:,} lists have fewer than {self.size - 1} texts that are "
                "not relevant and are shorter")
        if not self.labelled and longest > self.size:
            say(f"{self.file.path}: up to {longest:,} texts in a list; {self.size} of them drawn "
                "anew at every pass")

    def __len__(self) -> int:
        return len(self.queries)

    def item(self, i: int, seed) -> tuple[str, list[str], list[float]]:
        """(qid, docids, targets) of a list of line i; every draw comes from `seed`."""
        file, rng, line = self.file, np.random.default_rng(seed), int(self.queries[i])
        start, end = file.starts[line : line + 2].tolist()
        rows = start + np.flatnonzero(self.kept[start:end])
        if self.labelled:
            relevant, others = rows[file.positive[rows]], rows[~file.positive[rows]]
            first = relevant[rng.integers(len(relevant))]
            rows = np.array([first, *rng.permutation(others)[: self.size - 1]])
        else:
            rows = rng.permutation(rows)[: self.size]
        targets = file.scores[rows] if self.teacher else file.positive[rows].astype(float)
        docids = file.docids(line)
        return file.qid(line), [docids[row - start] for row in rows], targets.tolist()

    def where(self, i: int) -> str:
        return self.file.where(int(self.queries[i]))


# ----------------------------------------------------------------------------------------- triples


class Triples:
    """Lists of two documents from a TripleFile: the positive, then the negative.

    Losses on labels learn from 1 and 0, losses on a teacher from the file's scores. With `texts`
    the lines are looked through once, where that is a folder or the loss may learn nothing.
    """

    def __init__(self, path: Path, loss: str, texts: Texts | None = None) -> None:
        self.file = TripleFile(path, texts)
        self.path, self.loss, self.teacher = path, loss, loss in FROM_TEACHER
        self.rows = range(len(self.file))  # the lines that are trained on
        if self.file.columns == 3 and self.teacher:
            raise BadInput(f"{path}:1: three columns, but --loss {loss} needs the teacher's scores:"
                           " pos_score neg_score qid pos_pid neg_pid (teacher.py cross-encoder "
                           "--triples makes them)")
        may_tie = loss == "ranknet" and self.file.columns == 5
        if texts and (texts.folder or may_tie):
            self._look_through(texts)

    def _look_through(self, texts: Texts) -> None:
        rows, left, elsewhere = [], Counter(), texts.other_splits()
        for i in Progress(self.rows, desc=self.path.name, unit=" triples", leave=False):
            qid, docids, targets = self.item(i, None)
            refuse_unknown(self, i, qid, texts.missing(docids), texts)
            if qid in elsewhere:
                left["their query is of another split"] += 1
            elif self.loss == "ranknet" and np.float32(targets[0]) == np.float32(targets[1]):
                left["the teacher's scores tie"] += 1
            else:
                rows.append(i)
        for why, number in left.items():
            say(f"{self.path}: {number:,} of {len(self):,} triples left out: {why}")
        if not rows:
            raise BadInput(f"{self.path}: no triple can be trained on")
        self.rows = np.array(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, i: int, seed) -> tuple[str, list[str], list[float]]:
        """(qid, [positive, negative], their targets) of triple i."""
        field = self.file.fields(int(self.rows[i]))
        targets = [1.0, 0.0]
        if self.file.columns == 5:
            scores = [_number(text) for text in field[:2]]
            with np.errstate(over="ignore"):
                finite = np.isfinite(np.float32(scores)).all()
            if not finite:
                raise BadInput(f"{self.where(i)}: scores {field[0][:30]!r} {field[1][:30]!r} are "
                               "not finite numbers (fp32)")
            targets = scores if self.teacher else targets
        return field[-3], field[-2:], targets

    def where(self, i: int) -> str:
        return self.file.where(int(self.rows[i]))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def refuse_unknown(source, i: int, qid: str, unknown: list[str], texts: Texts) -> None:
    """BadInput, naming the line of list i of `source`, for documents or a query that the dataset
    does not hold."""
    what = None
    if unknown:
        what = f"document {unknown[0][:60]!r}"
    elif qid not in texts.all_queries:
        what = f"query {qid[:60]!r}"
    if what:
        raise BadInput(f"{source.where(i)}: {what} is not in dataset {texts.name}")


# ----------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """The lists of one step, of which this rank scores its own; kernels.exact says how."""

    qids: list[str]
    targets: np.ndarray  # float32 [queries, list]
    lengths: np.ndarray  # int64 [queries]
    place: np.ndarray  # int64 [own pairs], in the targets read as one row
    queries: list[np.ndarray]  # int32 token ids of the own pairs
    documents: list[np.ndarray]


class Batches:
    """Batch k of the training, a pure function of (seed, k): `self[k]` is what this rank computes
    of it.

    Every rank knows the ids and targets of the whole batch; text is read and tokenised for its own
    share alone.

    Args:
        source: Lists, TextLists or Triples. size: lists in a batch.
        texts: the dataset; of TextLists their file.
        tokenize: kernels.encoder.CrossEncoder.tokenize.
        query_length, doc_length: tokens kept.
    """

    def __init__(self, source, texts: Texts | ListFile, tokenize, *, size: int, seed: int,
                 query_length: int, doc_length: int, rank: int = 0, world: int = 1) -> None:
        self.source, self.texts, self.tokenize, self.size = source, texts, tokenize, size
        self.seed, self.query_length, self.rank, self.world = seed, query_length, rank, world
        self.documents = DocumentTokens(texts, tokenize, doc_length)

    def __len__(self) -> int:
        return 1 << 62

    def ids(self, k: int) -> list[tuple[int, str, list[str], list[float]]]:
        """(row of the source, qid, docids, targets) of every list of batch k."""
        index, n = np.arange(k * self.size, (k + 1) * self.size), len(self.source)
        # each pass has an order of its own
        passes = np.split(index, np.flatnonzero(index % n == 0))
        rows = np.concatenate([permuted(part % n, n, hash_of(self.seed, int(part[0]) // n))
                               for part in passes if len(part)])
        return [(int(row), *self.source.item(int(row), (self.seed, int(i))))
                for i, row in zip(index, rows, strict=True)]

    def __getitem__(self, k: int) -> Batch | BadInput:
        """Batch k. Bad input is handed over, for torch would wrap what a worker raises in a
        traceback."""
        try:
            return self.make(k)
        except BadInput as e:
            return e

    def make(self, k: int) -> Batch:
        """Batch k; BadInput names the line of a document that the dataset lacks."""
        items = self.ids(k)
        width = max(len(docids) for _, _, docids, _ in items)
        targets = np.zeros((len(items), width), np.float32)
        for row, (*_, values) in zip(targets, items, strict=True):
            row[: len(values)] = values
        own = range(self.rank, len(items), self.world)
        found = self.documents([d for i in own for d in items[i][2]])
        for i in own:
            row, qid, docids, _ = items[i]
            missing = [d for d in docids if d not in found]
            refuse_unknown(self.source, row, qid, missing, self.texts)
        texts = [self.texts.all_queries[items[i][1]] for i in own]
        queries = zip(own, self.tokenize(texts, self.query_length), strict=True)
        return Batch(
            qids=[qid for _, qid, _, _ in items],
            targets=targets,
            lengths=np.array([len(docids) for _, _, docids, _ in items]),
            place=np.array([i * width + j for i in own for j in range(len(items[i][2]))], np.int64),
            queries=[q for i, q in queries for _ in items[i][2]],
            documents=[found[d] for i in own for d in items[i][2]],
        )

    def loader(self, start: int, steps: int, workers: int):
        """A DataLoader of batches start..steps-1 in order, prefetched by worker processes (0: made
        when asked for)."""
        from torch.utils.data import DataLoader

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, or every fork is warned of
        return DataLoader(
            self, batch_size=None, sampler=range(start, steps), num_workers=workers,
            prefetch_factor=8 if workers else None, persistent_workers=bool(workers),
            collate_fn=_as_it_is, worker_init_fn=self._start_worker)

    def _start_worker(self, _number: int) -> None:
        import torch

        self.texts.reopen()  # a document store must not share its file position with its siblings
        torch.set_num_threads(1)
        # the threads of the tokenizer did not live through the fork: waiting for them never ends
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # Ctrl-C and torchrun's SIGTERM go to the whole group; the step in hand needs its batches
        os.setpgid(0, 0)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def permuted(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where a random permutation of 0..n-1 sends `index`, in constant memory: a Feistel network,
    walked into range.

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


def hash_of(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
