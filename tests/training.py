"""What the tests of training share: a small collection with a teacher's run and triples, the flags
of a small run, its batches, and processes that run train.py."""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data.cache
import toy
import train
from data import command
from data.first_stages import bm25
from data.lists import Batches
from data.runs import write_run
from data.texts import Texts
from kernels import cpu, losses
from kernels.encoder import CrossEncoder
from kernels.exact import ListGradient
from kernels.step import Step

ROOT = Path(train.__file__).resolve().parent
# a line in the log each step
FOREVER = {"steps": 100000, "eval-dataset": "none", "eval-every": 10}


def make_place(tmp_path_factory):
    """The fixture `place` of a test file, for its module: a folder with corpus/, model/,
    teacher.run, triples.tsv and scored.tsv, and the cache of these tests; and one thread, as on
    small shapes several wait for each other."""
    folder, threads = tmp_path_factory.mktemp("train"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(data.cache, "CACHE", folder / "cache" / "cross-encoder-study")
        toy.corpus(folder / "corpus")
        toy.model(folder / "model", dropout=0.1)
        write_run(folder / "teacher.run", teacher_of(Texts(str(folder / "corpus"))))
        triples = [f"q{i % 20}\td{i % 20}\td{(i * 7 + 21) % 60}\n" for i in range(50)]
        (folder / "triples.tsv").write_text("".join(triples))
        scored = [f"{i * 0.25}\t{-i}\t{triple}" for i, triple in enumerate(triples)]
        (folder / "scored.tsv").write_text("".join(scored))
        yield folder
    torch.set_num_threads(threads)


def teacher_of(texts):
    """A run of 6, 9 or 12 documents a query, with ties."""
    rng, run = np.random.default_rng(0), {}
    for i, (qid, ranked) in enumerate(bm25(texts, texts.all_queries, 12).items()):
        scores = rng.standard_normal(12).round(1).tolist()
        run[qid] = dict(zip(list(ranked)[: 6 + 3 * i % 9], scores, strict=False))
    return run


def words_of(place, **flags) -> list[str]:
    """The command line of a small run; True is a flag alone, None leaves one out."""
    given = {"backbone": place / "model", "dataset": place / "corpus", "steps": 6,
             "batch-size": 4, "lr": 1e-3, "out": place / "out", "dtype": "float32",
             "device": "cpu", **flags}
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def arguments(place, **flags):
    return train.parse(words_of(place, **flags))


def batches(place, rank=0, world=1, **flags):
    """(Batches, the model, the flags)."""
    args = arguments(place, **flags)
    texts = Texts(str(place / "corpus"), split="train")
    model = CrossEncoder.from_pretrained(place / "model", dtype="float32", device="cpu")
    made = Batches(train.open_source(args, texts), texts, model.tokenize, size=args.batch_size,
                   seed=args.seed, query_length=args.query_length, doc_length=args.doc_length,
                   rank=rank, world=world)
    return made, model, args


def gradient_by(args, model) -> ListGradient:
    return ListGradient(model, losses.LOSSES[args.loss], seed=args.seed, dtype=args.dtype,
                        max_tokens=args.max_tokens)


def step_by(args, model, **how) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    return Step(gradient_by(args, model), optimizer, lr=args.lr, warmup=args.warmup,
                steps=args.steps, clip=args.clip, **how)


def train_here(place, **flags) -> int:
    """The training in this process; raises what a command would say."""
    return train.train(arguments(place, **flags), 0, 1)


def run_main(monkeypatch, script, *words) -> int:
    """A script's whole command in this process, whose settings stay as they are."""
    monkeypatch.setattr(cpu, "prepare", lambda training: None)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    return command.guarded(script.main)


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------- processes
# Forked from a process that has imported train.py and done nothing else: no threads or locks of
# the tests are in them, and they start at once.

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["training"])


class Training:
    """train.py with these words as a process on one thread, which has begun.

    before: a function of some module, called first: it takes away memory or disk. group: a file by
    which the ranks of `environment` find each other.
    """

    def __init__(self, folder: Path, words: list[str], before=None, group=None, **environment):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"log-{len(list(folder.iterdir()))}"
        inherited = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
        with pytest.MonkeyPatch.context() as patch:  # read where the server starts
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            multiprocessing.forkserver.ensure_running()
        self.process = FORKS.Process(target=_run, args=(
            self.log, data.cache.CACHE, words, before, group, inherited | environment))
        self.process.start()
        self.pid = self.process.pid
        while not self.log.exists():  # the first one waits for the imports
            assert self.process.is_alive()
            time.sleep(0.01)

    def end(self, seconds=120) -> int:
        """The exit status, once it has come to its end; -9 where it did not in time."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for_steps(self, out, lines=3):
        """Until it has logged so many."""
        log = out / "log.jsonl"
        while not log.exists() or log.read_text().count("\n") < lines:
            assert self.process.is_alive(), self.said
            time.sleep(0.05)


def _run(log, cache, words, before, group, environment):
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers, as in a shell
    data.cache.CACHE = cache
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if group:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", f"file://{group}", rank=rank, world_size=world)
    if before:
        before()
    sys.argv = ["train.py", *words]
    sys.exit(command.guarded(train.main))


def train_on_ranks(folder: Path, world: int, words: list[str], before=None, seconds=120):
    """(exit statuses, all that was said) of train.py on `world` processes of one gloo group. As
    torchrun does, ends all when one has failed."""
    ranks = [Training(folder / f"rank-{rank}", words, before, folder / "group", RANK=str(rank),
                      WORLD_SIZE=str(world)) for rank in range(world)]
    until = time.time() + seconds
    while any(rank.process.is_alive() for rank in ranks) and time.time() < until:
        if any(rank.process.exitcode for rank in ranks):
            break
        time.sleep(0.05)
    statuses = [rank.end(seconds=0) for rank in ranks]
    return statuses, "".join(rank.said for rank in ranks)
