"""sentence-transformers' CrossEncoderTrainer on the very batches that train.py draws.

    python results/peer.py --loss bce|lambda FLAGS of train.py
    TRAIN=results/peer.py LOSSES="bce lambda" TEACHER=... bash results/study.sh MODEL

bce is BinaryCrossEntropyLoss; lambda is LambdaLoss, of the listwise ones the one that its
documentation recommends. The flags name backbone, data, lists, rate, steps, seed, precision,
validation and output folder, so that nothing stands twice. The best of the validations is kept and
written down in log.jsonl, as train.py does; an interrupted run starts afresh. Last it prints the
seconds of training, validations left out.

Needs `pip install "sentence-transformers[train]"`.
"""

import argparse
import itertools
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Dataset  # noqa: E402
from sentence_transformers import CrossEncoder  # noqa: E402
from sentence_transformers.cross_encoder import (  # noqa: E402
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    losses,
)
from transformers import TrainerCallback  # noqa: E402

import train  # noqa: E402
from data.lists import Batches  # noqa: E402
from data.texts import Texts  # noqa: E402
from evaluate import evaluate, mean  # noqa: E402


def rows_of(args) -> tuple[list[dict], list[int]]:
    """The lists of every step in its order, and how many rows are a step's: pairs for bce."""
    texts = Texts(args.dataset, split="train")
    batches = Batches(train.open_source(args, texts), texts, None, size=args.batch_size,
                      seed=args.seed, query_length=args.query_length, doc_length=args.doc_length)
    rows, sizes = [], []
    for k in range(args.steps):
        before = len(rows)
        for _, qid, docids, labels in batches.ids(k):
            query, found = texts.all_queries[qid], texts.documents(docids)
            documents = [found[d] for d in docids]
            if args.loss == "bce":
                rows += [{"query": query, "document": d, "label": float(label)}
                         for d, label in zip(documents, labels, strict=True)]
            else:
                rows.append({"query": query, "documents": documents, "labels": labels})
        sizes.append(len(rows) - before)
    return rows, sizes


class Steps:
    """A batch sampler of rows in their order, `sizes` of them a step."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.batch_size, self.drop_last = sizes, max(sizes), False

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self):
        rows = itertools.count()
        return (list(itertools.islice(rows, size)) for size in self.sizes)

    def set_epoch(self, epoch: int) -> None:
        """There is one."""


class Validation(TrainerCallback):
    """Re-ranks every --eval-every steps, as train.py does, and keeps the best model."""

    def __init__(self, args, model: CrossEncoder) -> None:
        self.args, self.model, self.best, self.seconds = args, model, -1.0, 0.0
        self.folder = args.out.with_name(f"{args.out.name}.part")  # until all is trained
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        ((_, self.texts, self.run),) = train.Validation(
            args.eval_dataset, args.eval_run, args.eval_measure, args.eval_depth,
            args.eval_queries, 0, 1).sets

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step % self.args.eval_every and state.global_step < self.args.steps:
            return
        start = time.perf_counter()
        value = self.measured()
        with open(self.folder / "log.jsonl", "a") as log:
            print(json.dumps({"step": state.global_step, "score": value}), file=log)
        if value > self.best:
            self.best = value
            self.model.save_pretrained(str(self.folder))
        self.seconds += time.perf_counter() - start

    def measured(self) -> float:
        pairs = [(qid, docid) for qid, ranked in self.run.items() for docid in ranked]
        found = self.texts.documents({docid for _, docid in pairs})
        scores = self.model.predict([(self.texts.queries[q], found[d]) for q, d in pairs])
        run = {qid: {} for qid in self.run}
        for (qid, docid), score in zip(pairs, scores, strict=True):
            run[qid][docid] = float(score)
        measure = self.args.eval_measure
        return mean(evaluate(self.texts.qrels, run, [measure]))[measure]


def main(flags: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--loss", choices=["bce", "lambda"], required=True)
    chosen, flags = parser.parse_known_args(flags)
    args = train.parse(["--loss", "bce" if chosen.loss == "bce" else "infonce", *flags])
    rows, sizes = rows_of(args)
    model = CrossEncoder(str(args.backbone), num_labels=1,
                         max_length=args.query_length + args.doc_length + 3)
    if chosen.loss == "bce":
        objective = losses.BinaryCrossEntropyLoss(model)
    else:
        objective = losses.LambdaLoss(model, mini_batch_size=-1)  # all pairs of a step at once
    validation = Validation(args, model)
    settings = CrossEncoderTrainingArguments(
        str(validation.folder), num_train_epochs=1, per_device_train_batch_size=max(sizes),
        batch_sampler=lambda *_, **__: Steps(sizes), learning_rate=args.lr,
        warmup_steps=args.warmup, weight_decay=args.weight_decay, max_grad_norm=args.clip,
        bf16=args.dtype == "bfloat16", use_cpu=True, seed=args.seed, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_steps=args.eval_every)
    trainer = CrossEncoderTrainer(model, settings, Dataset.from_list(rows), loss=objective,
                                  callbacks=[validation])
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start - validation.seconds
    validation.folder.rename(args.out)
    print(f"best {args.eval_measure} {validation.best:.4f}; {args.steps} steps, "
          f"{sum(sizes):,} rows: {seconds:.1f} s without validations")


if __name__ == "__main__":
    main(sys.argv[1:])
