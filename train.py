"""Train a cross-encoder re-ranker with any of eight objectives, by the recipes of arXiv 2603.03010.

    python train.py --backbone tiny --dataset pydocs        a first run: minutes on a CPU, offline
    python train.py --backbone modernbert --loss infonce    the paper's: MS MARCO, 200,000 steps
    python train.py --backbone DIR --loss ranknet --dataset my-corpus/ --lists teacher.run
    python train.py --backbone minilm --loss infonce --lists mine.jsonl
                                                            lists that carry their texts: a line
                                                            {"query": "", "pos": [""], "neg": [""]}
    torchrun --nproc_per_node 4 train.py ...                same flags, same result
    for b in bert electra; do python train.py --backbone $b --loss marginmse --resume; done

Batch k is a pure function of the seed and k, so resuming, sharding over ranks and cutting into
micro-batches cannot change what is trained on. A step scores its lists in packed micro-batches,
computes the loss once on the whole lists, and sends its gradient back through the micro-batches;
where these do not fit in memory together they are scored twice, first without gradient. --dry-run
prints the plan of any command and touches nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data import command

if __name__ == "__main__":
    command.quiet_imports()
    command.one_malloc_arena()
from data.cache import model_stamp, sha256_of
from data.command import FULL, BadInput, Parser, Progress, at_least, say
from data.first_stages import candidates, first_stage, first_stage_name
from data.list_file import ListFile, carries_texts
from data.lists import FROM_TEACHER, Batches, Lists, TextLists, Triples, hash_of
from data.model_card import candidates_named, model_card
from data.paper import BACKBONES, LOSSES, SHARED_LISTS, recipe
from data.published import downloads, listed, published
from data.run_folder import (
    Log,
    begun_with,
    checkpoint_kept,
    load_checkpoint,
    save_checkpoint,
    save_whole,
)
from data.runs import atomic_write
from data.texts import SURROGATE, Texts
from evaluate import evaluate, markdown_table, mean, parse_measure
from rerank import score_run

TOKENS = 90  # of a pair of MS MARCO on the average, for the plan's estimates


# ------------------------------------------------------------------------------- flags and recipes


def parse(argv=None) -> argparse.Namespace:
    """The flags, those that were not given filled in by `recipe`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--backbone", default="tiny",
        help=f"tiny, {', '.join(BACKBONES)}, or a hub id or folder of "
        "BERT, (XLM-)RoBERTa, ELECTRA, DeBERTa-v3 or ModernBERT kind, a re-ranker in modules of "
        "sentence-transformers too (default tiny)")
    add("--loss", default="infonce", choices=sorted(LOSSES), help="the objective (default infonce)")
    add("--out", type=Path, help="run folder (default runs/DATASET-BACKBONE-LOSS-seedN)")
    add_data_flags(parser.add_argument_group("data").add_argument)
    group = "budget (defaults: the paper's, by backbone and loss)"
    add_budget_flags(parser.add_argument_group(group).add_argument)
    add_watch_flags(parser.add_argument_group("watch").add_argument)
    go_on = parser.add_argument_group("go on").add_argument
    go_on("--resume", action="store_true",
          help="continue OUT/last where there is one; a finished run stays as it is")
    go_on("--save-every", type=at_least(1),
          help="steps between checkpoints (default: --eval-every)")
    go_on("--overwrite", action="store_true", help="start afresh in a folder that holds a run")
    go_on("--workers", type=at_least(0),
          help="processes that read and tokenise (default: 2 for ir_datasets, else 0)")
    go_on("--dry-run", action="store_true",
          help="print the plan: data, steps, documents, tokens; touches nothing")
    command.add_model_flags(parser)
    add("--graphs", choices=["auto", "on", "off"], default="auto",
        help="on CUDA, replay the passes of a step as CUDA graphs instead of launching kernel by "
        "kernel (default auto: in bfloat16 on one card)")
    args = parser.parse_args(argv)
    refuse_contradictions(args, parser.error)
    args = recipe(args)
    if args.eval_run and len(args.eval_run) != len(args.eval_dataset):
        parser.error(f"--eval-run names {len(args.eval_run)} runs, --eval-dataset "
                     f"{len(args.eval_dataset)} datasets: one for each is needed")
    return args


def add_data_flags(add) -> None:
    add("--dataset",
        help="ir_datasets id, BEIR folder or pydocs "
        "(default: msmarco-passage/train; for tiny, pydocs)")
    add("--lists",
        help=f"TREC run of candidates; its scores are the teacher's for {', '.join(FROM_TEACHER)} "
        "(mse: raw logits, not ranks); or the name of a published file (colbert, rankzephyr-50, "
        f"...; on MS MARCO mse takes {SHARED_LISTS}); or JSONL with texts, no --dataset then: "
        '{"query": "...", "pos": ["..."], "neg": ["..."]} a line, and a teacher\'s "pos_scores": '
        '[1.5], "neg_scores": [-2] (.gz and .zst too)')
    add("--triples",
        help="TSV: qid pos neg, or pos_score neg_score qid pos_pid neg_pid; or ensemble-t2, "
        "ensemble-t1")
    add("--first-stage", type=first_stage_name, metavar="bm25|scoreddocs|splade[:MODEL]",
        help="make the lists (default bm25 where none are given)")
    add("--depth", type=at_least(1),
        help="candidates per query that are kept of a list (default 100)")
    add("--list-size", type=at_least(1),
        help="documents per list (2 for bce, hinge, marginmse; infonce, mse 8; others 50)")
    add("--negatives", choices=["recipe", "shared"], default="recipe",
        help="shared: every loss gets the same lists, one relevant document and list-size - 1 "
        "others, and as many of them per step "
        f"(MS MARCO: {SHARED_LISTS}, 8 documents; default recipe)")
    add("--max-teacher-margin", type=float, metavar="X",
        help="leave out negatives that the run scores above their positive minus X (likely false "
        "negatives)")
    add("--skip-missing", action="store_true",
        help="leave out documents of --lists that the dataset lacks (counted)")


def add_budget_flags(add) -> None:
    add("--batch-size", type=at_least(1),
        help="queries (lists) per step (as many as make 32 documents, mini 64)")
    add("--lr", type=float, help="highest learning rate (base 1e-5, mini 7e-6)")
    add("--steps", type=at_least(1), help="optimizer steps (200,000)")
    add("--budget", choices=["steps", "docs"], default="steps",
        help="docs: as many steps as see the documents of --steps steps of the infonce recipe "
        "(32 a step; mini group 64, tiny 128), whatever this loss sees per step: the losses at "
        "equal documents")
    add("--warmup", type=at_least(0),
        help="steps of linear warm-up (a fortieth of --steps, tiny a tenth); linear decay to 0 "
        "follows")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default 1.0)")


def add_watch_flags(add) -> None:
    add("--eval-dataset", nargs="+",
        help="validated on: ids, folders (their dev split), or nanobeir (default: the dataset's "
        "own dev split, nanobeir for MS MARCO), re-ranking BM25; none: keep the last step")
    add("--eval-run", nargs="+", type=Path, metavar="RUN",
        help="the candidates to re-rank, a TREC run for each --eval-dataset; the closing table is "
        "on these too (default: BM25's)")
    add("--eval-every", type=at_least(1),
        help="steps between validations (default: a 40th of --steps, at least 100)")
    add("--eval-measure", default="RR@10", help="any of evaluate.py's measures (default RR@10)")
    add("--eval-depth", type=at_least(1), help="candidates re-ranked per query (default 100)")
    add("--eval-queries", type=at_least(1), help="validate on the first N queries (default: all)")
    add("--log", default="jsonl",
        help="jsonl, tensorboard, wandb, with commas between (default jsonl)")
    add("--no-table", action="store_true",
        help="leave out the closing table (else: BM25 and the model over it on the test split, or "
        "--eval-run and the model over it)")


def refuse_contradictions(args: argparse.Namespace, error) -> None:
    """error(message) for flags that do not go together or have impossible values."""
    refuse_other_sources(args, error)
    for name, value in (("lr", args.lr), ("clip", args.clip)):
        if value is not None and not 0 < value < math.inf:
            error(f"--{name} {value:g}: above 0")
    if not 0 <= args.weight_decay < math.inf:
        error(f"--weight-decay {args.weight_decay:g}: 0 or more")
    if args.list_size == 1:
        error("--list-size 1: a list has two documents or more")
    for kind in args.log.split(","):
        if kind not in ("jsonl", "tensorboard", "wandb"):
            error(f"--log {args.log}: {kind!r} is none of jsonl, tensorboard, wandb (commas "
                  "between)")
        if kind != "jsonl" and importlib.util.find_spec(kind) is None:
            error(f"--log {kind}: {kind} is not installed; pip install {kind}, or leave it out")
    parse_measure(args.eval_measure)


def refuse_other_sources(args: argparse.Namespace, error) -> None:
    """error(message) for flags that do nothing to where the lists come from."""
    if sum(x is not None for x in (args.triples, args.lists, args.first_stage)) > 1:
        error("give one of --triples, --lists and --first-stage")
    of_runs = {  # flag: whether it was given
        "--depth": args.depth is not None,
        "--skip-missing": args.skip_missing,
    }
    of_lists = of_runs | {
        "--list-size": args.list_size not in (None, 2),
        "--negatives shared": args.negatives == "shared",
        "--max-teacher-margin": args.max_teacher_margin is not None,
    }
    for flag, given in of_lists.items():
        if args.triples and given:
            error(f"{flag} is of lists and does nothing to --triples: leave it out")
    for flag, given in (of_runs | {"--dataset": args.dataset}).items():
        if carries_texts(args.lists) and given:
            error(f"{flag} does nothing to --lists {args.lists}, which has its texts: leave it out "
                  "(--eval-dataset names what is validated on)")


def result_flags(args: argparse.Namespace) -> dict:
    """The flags that decide the result, as JSON: those that a resumed run must share."""
    ways = ("out", "resume", "overwrite", "dry_run", "log", "workers", "save_every", "random_share",
            "budget", "no_table")
    kept = {name: value for name, value in sorted(vars(args).items()) if name not in ways}
    if args.eval_run:
        kept["eval_run"] = [str(path) for path in args.eval_run]
    if args.graphs == "auto":
        del kept["graphs"]
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


# ---------------------------------------------------------------------------------------- the plan


def plan(args: argparse.Namespace) -> str:
    """What the command would do, from the flags alone."""
    source = f"{args.dataset}, lists {args.lists or args.first_stage}"
    if args.triples:
        source = f"{args.dataset}, triples {args.triples}"
    elif args.dataset is None:
        source = f"lists {args.lists} with their texts"
    documents = args.batch_size * args.list_size
    most = args.query_length + args.doc_length + 4  # RoBERTa has four special tokens, others three
    sets = ", ".join(args.eval_dataset) or "nothing (the last step is kept)"
    return "\n".join([
        f"backbone   {args.backbone} ({BACKBONES.get(args.backbone, ['as given'])[0]})",
        f"loss       {args.loss}, {args.negatives} negatives",
        f"data       {source}, seed {args.seed}",
        f"step       {args.batch_size:,} lists of {args.list_size} documents = {documents:,} "
        f"documents, about {documents * TOKENS:,} tokens, at most {documents * most:,}",
        f"steps      {args.steps:,}: {args.warmup:,} of warm-up to lr {args.lr:g}, then linearly "
        f"to 0; AdamW, weight decay {args.weight_decay:g}, clip {args.clip:g}, {args.dtype}",
        f"documents  {args.steps * documents:,} in all",
        *operations(args.backbone, documents, args.steps),
        f"validation {args.eval_measure} on {sets} every {args.eval_every:,} steps, "
        f"{candidates_named(args.eval_run, args.eval_depth)} re-ranked",
    ])


def operations(backbone: str, documents: int, steps: int) -> list[str]:
    """A line on the operations of the run, where the backbone's shape is known."""
    from kernels.roofline import MODELS, cell_hours, flops_per_step

    if backbone not in MODELS:
        return []
    step = flops_per_step(MODELS[backbone], [TOKENS] * documents)
    hours, _ = cell_hours(backbone, documents, steps, TOKENS)
    return [f"compute    {step / 1e12:.2f} TFLOP a step at {TOKENS} tokens a pair, "
            f"{step * steps / 1e18:.2f} EFLOP in all: never below {hours:.1f} h on an H100 in bf16 "
            "(kernels/ROOFLINE.md), validation not counted"]


def files(args: argparse.Namespace) -> list[str]:
    """A line for each file that the run reads: size and md5 where they are known, and whether it is
    here already."""
    from huggingface_hub import try_to_load_from_cache

    from kernels.roofline import MODELS, parameters

    rows = []
    if args.backbone in BACKBONES:
        hub, weights = BACKBONES[args.backbone][0], ("model.safetensors", "pytorch_model.bin")
        here = any(isinstance(try_to_load_from_cache(hub, name), str) for name in weights)
        size = 4 * sum(parameters(MODELS[args.backbone]))
        rows.append((f"weights of {hub}", size, None, here))
    rows += downloads(args.dataset) if args.dataset else []
    for source in [args.triples or args.lists, *(args.eval_run or [])]:
        rows += listed(str(source)) if source else []
    for name in args.eval_dataset:
        rows += downloads(name) if name.startswith("nano-beir/") else []
    lines = []
    for what, size, md5, here in rows:
        bytes_ = f"{size / 1e9:.3f} GB" if size else "size unknown"
        there = "here" if here else "not here"
        lines.append(f"file       {what}, {bytes_}, md5 {md5 or 'unknown'}, {there}")
    return lines


# ------------------------------------------------------------------------------- what is opened


def look_into(out: Path, wanted: dict, resume: bool, overwrite: bool) -> dict | None:
    """args.json of the run in `out` that is to be continued, None where one begins afresh. BadInput
    for a folder that holds something else. wanted: result_flags of this command."""
    begun = (out / "args.json").is_file()
    if begun and not (resume or overwrite):
        raise BadInput(f"{out}: holds a run; --resume continues it, --overwrite starts afresh, "
                       "--out names another")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: a file; --out names a folder")
    if SURROGATE.search(str(out)):
        raise BadInput(f"--out {str(out)!r}: not UTF-8, and weights cannot be written under such a "
                       "name; give another")
    # names with a dot: what a run that was killed before its first file leaves
    others = [file for file in out.glob("*") if file.name[0] != "."]
    if others and not begun and not overwrite:
        raise BadInput(f"{out}: a folder with other things in it; --overwrite writes there all the "
                       "same, --out names another")
    if not (begun and resume):
        return None
    before = begun_with(out / "args.json")
    other = [f"--{name.replace('_', '-')} {before['flags'].get(name)} (now {value})"
             for name, value in wanted.items() if before["flags"].get(name) != value]
    if other:
        raise BadInput(f"{out}: begun with other flags: {', '.join(other)}; give the same, or "
                       "another --out")
    return before


def open_texts(dataset: str | None, lists: str | None) -> Texts | ListFile:
    """The texts to train on: of the dataset, or of the lists themselves."""
    if dataset is None:
        return ListFile(Path(lists))
    return Texts(dataset, split="train")


def load_backbone(backbone: str, texts: Texts | ListFile, device: str, query_length: int,
                  doc_length: int, seed: int):
    """The model to train in float32, its fresh weights drawn from the seed."""
    import torch

    from kernels.encoder import CrossEncoder
    from kernels.loading import from_hub

    torch.manual_seed(hash_of(seed, "head"))
    if backbone == "tiny":
        from kernels.tiny import build_tiny

        built, tokenizer = build_tiny([text for _, text in texts.corpus()], seed)
        return CrossEncoder(built, tokenizer, query_length, doc_length)
    name = BACKBONES.get(backbone, [backbone])[0]
    model = CrossEncoder.from_pretrained(name, "float32", device, query_length, doc_length,
                                         fresh_head=True)
    # what cannot be saved is said before the first step
    with from_hub(name, "saving it again: "), tempfile.TemporaryDirectory() as trial:
        model.tokenizer.save_pretrained(trial)
        model.model.config.save_pretrained(trial)
    if model.new_weights:
        say(f"{name}: {len(model.new_weights)} new weights drawn from --seed: "
            f"{', '.join(model.new_weights)}")
    return model


def open_source(args: argparse.Namespace, texts: Texts | ListFile) -> Lists | TextLists | Triples:
    """What the batches are drawn from: --triples, --lists, or lists made by --first-stage."""
    if isinstance(texts, ListFile):
        return TextLists(texts, args.loss, args.list_size, args.negatives == "shared",
                         args.max_teacher_margin)
    path = args.triples or args.lists
    if path and not Path(path).exists():
        path = published(path)  # the paper's files by name, fetched at first use
    path = path and Path(path)
    if path and (args.triples or path.suffix == ".tsv"):
        return Triples(path, args.loss, texts)
    if path is None and args.loss in FROM_TEACHER:
        raise BadInput(f"--loss {args.loss} learns from a teacher's scores: make a run with "
                       "teacher.py and give it as --lists")
    run = candidates(texts, path, args.first_stage, args.depth, args.skip_missing)
    return Lists(run, texts, args.loss, args.list_size, args.negatives == "shared",
                 args.max_teacher_margin, args.random_share, path)


class Validation:
    """Re-ranks the first stages of one or more datasets, sharded over ranks, and averages one
    measure."""

    def __init__(self, names: list[str], runs: list[Path] | None, measure: str, depth: int,
                 queries: int | None, rank: int, world: int) -> None:
        self.measure, self.rank, self.world, self.sets = measure, rank, world, []
        for name, path in zip(names, runs or [None] * len(names), strict=True):
            texts = Texts(name, split="dev")
            if not any(q in texts.qrels for q in texts.queries):
                raise BadInput(f"--eval-dataset {name}: has no relevance judgments to measure by")
            run = first_stage(texts, path, "bm25", depth)
            chosen = list(texts.queries)[:queries]
            if path:
                refuse_other_queries(run, path, chosen, name)
            texts.qrels = {q: texts.qrels[q] for q in chosen}
            self.sets.append((name, texts, {q: run.get(q, {}) for q in chosen}))

    def __call__(self, model, max_tokens: int | None = None) -> dict:
        """{"score": mean of the measure over datasets, "collapsed": one of them is, NAME: measure,
        ...}"""
        result, flat = {}, False
        for name, texts, run in self.sets:
            mine = {q: run[q] for q in list(run)[self.rank :: self.world]}
            scores = score_run(model, texts, mine, max_tokens)
            if self.world > 1:
                import torch.distributed as dist

                shares = [None] * self.world
                dist.all_gather_object(shares, scores)
                scores = {q: ranked for share in shares for q, ranked in share.items()}
            flat |= collapsed(scores)
            result[name] = mean(evaluate(texts.qrels, scores, [self.measure]))[self.measure]
        return {"score": sum(result.values()) / len(result), "collapsed": flat, **result}


def refuse_other_queries(run: dict, path: Path, judged: list[str], name: str) -> None:
    """BadInput for a run of --eval-run with candidates of no judged query; some that lack them are
    counted."""
    without = sum(not run.get(q) for q in judged)
    if without == len(judged):
        raise BadInput(f"--eval-run {path}: has candidates of no judged query of {name}; do they "
                       "belong together?")
    if without:
        say(f"{path}: no candidates of {without:,} of {len(judged):,} queries of {name}, which "
            "count 0")


def collapsed(run: dict) -> bool:
    """Whether all scores of a run are equal within 1e-6: a ranking of nothing, whatever its
    measures say."""
    values = [score for ranked in run.values() for score in ranked.values()]
    return len(values) > 1 and max(values) - min(values) <= 1e-6


def provenance(args: argparse.Namespace, texts: Texts | ListFile, validation: Validation) -> dict:
    """What it takes to repeat the run: flags, versions, commit, data."""
    import numpy
    import torch
    import transformers

    git = ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    data = {"corpus": texts.fingerprint(), "queries and qrels": texts.digest(),
            "backbone": model_stamp(args.backbone)}
    for name, of_set, _ in validation.sets:
        data[f"validation {name}"] = f"{of_set.fingerprint()} {of_set.digest()}"
    for file in (args.lists, args.triples, *(args.eval_run or [])):
        if file and Path(file).is_file():
            data[str(Path(file))] = sha256_of(file)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "transformers": transformers.__version__, "numpy": numpy.__version__}
    return {"flags": result_flags(args), "versions": versions, "commit": commit or None,
            "data": data}


def refuse_changes(out: Path, before: dict, now: dict) -> None:
    """BadInput where a run is continued on other data than it was begun on."""
    changed = [name for name, digest in now["data"].items()
               if before["data"].get(name, digest) != digest]
    if changed:
        raise BadInput(f"{out}: begun on other data: {', '.join(changed)} changed since (corpus "
                       "and backbone by size and time, all else by content); bring the old back, "
                       "or give another --out")
    if before["versions"] != now["versions"]:
        say(f"{out}: begun with {before['versions']}, now {now['versions']}: other bytes than of "
            "one run")


# ------------------------------------------------------------------------------------ the training


class Meter:
    """What the log says of the steps since its last line."""

    def __init__(self, start: int, world: int) -> None:
        self.world, self.without_gradient, self.speed = world, 0, ""
        self.begin(start)

    def begin(self, done: int) -> None:
        """From here on anew; `done` steps are behind."""
        self.since, self.mark = done, time.perf_counter()
        self.waited, self.pairs, self.tokens, self.total = 0.0, 0, 0, 0.0

    def next_of(self, loader):
        """The next batch, the time without one counted."""
        begin = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - begin
        return batch

    def add(self, batch, finished: list[tuple[float, float]]) -> None:
        self.total += sum(loss for loss, _ in finished)
        self.without_gradient += sum(norm == 0 for _, norm in finished)
        self.pairs += int(batch.lengths.sum())
        self.tokens += sum(map(len, batch.queries)) + sum(map(len, batch.documents))

    def loss(self, done: int) -> float:
        return self.total / (done - self.since)

    def row(self, done: int, lr: float, grad_norm: float, on_gpu: bool) -> dict:
        """A line of the log, and `speed` for the bar."""
        import torch

        seconds = time.perf_counter() - self.mark
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if on_gpu:
            used = torch.cuda.max_memory_reserved()  # the pool of CUDA graphs included
        row = dict(step=done, loss=self.loss(done), lr=lr, grad_norm=grad_norm,
                   pairs_per_second=self.pairs / seconds,
                   tokens_per_second=self.tokens * self.world / seconds,
                   waiting=self.waited / seconds, memory_gib=used / 2**30)
        self.speed = (f", lr {lr:.1e}, {row['pairs_per_second']:,.0f} pairs/s, "
                      f"{row['tokens_per_second']:,.0f} tokens/s, waiting {row['waiting']:.0%}, "
                      f"{row['memory_gib']:.1f} GiB")
        return row


class Run:
    """The training under way: what is kept of it, and the validations that choose the model.

    Attributes: start, the steps that are behind when it begins; history, [step, score] of every
    validation; log.
    """

    def __init__(self, args: argparse.Namespace, model, optimizer, validation, rank: int) -> None:
        self.out, self.last, self.steps = args.out, args.out / "last", args.steps
        self.every, self.measure, self.dtype = args.eval_every, args.eval_measure, args.dtype
        self.max_tokens, self.model, self.optimizer = args.max_tokens, model, optimizer
        self.validation, self.rank = validation, rank
        self.start, self.best, self.history = 0, -math.inf, []
        self.log_kinds, self.flags = args.log.split(","), result_flags(args)

    def begin(self, made_of: dict) -> None:
        """A folder with args.json alone, whatever was trained there before."""
        if self.out.is_dir():
            shutil.rmtree(self.last, ignore_errors=True)
            (self.out / "README.md").unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.out / "args.json") as file:
            json.dump(made_of, file, indent=1)

    def resume(self) -> None:
        self.start, self.best, self.history = load_checkpoint(
            self.last / "checkpoint.pt", self.model.model, self.optimizer, self.steps)
        say(f"{self.out}: going on after step {self.start:,}")

    def open_log(self) -> None:
        """Then the validation that a stop has cut off is made up for."""
        if self.rank == 0:
            self.log = Log(self.out, self.log_kinds, self.start, self.flags)
        if self.start and self.is_due(self.start) and self.start not in dict(self.history):
            self.validate(self.start)
            self.checkpoint(self.start)

    def is_due(self, done: int) -> bool:
        """Whether a validation follows step `done`."""
        return bool(self.validation.sets) and (done % self.every == 0 or done == self.steps)

    def checkpoint(self, done: int) -> None:
        if self.rank == 0:
            state = {"step": done, "model": self.model.model.state_dict(),
                     "optimizer": self.optimizer.state_dict(), "best": self.best,
                     "history": self.history}
            save_checkpoint(self.last, state)

    def validate(self, done: int) -> None:
        """Scores the validation sets; the model is saved where it is the best so far."""
        import torch

        cast = self.dtype == "bfloat16"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=cast):
            result = self.validation(self.model, self.max_tokens)
        score = result["score"]
        self.history.append([done, score])
        if self.rank == 0:
            self.log(**{"step": done, self.measure: score, **result})
            word = f"step {done:,}: {self.measure} {score:.4f}"
            if result["collapsed"]:
                word += "; COLLAPSED: the model gives every document the same score"
            if score > self.best:
                self.save_model()
                word += " (best so far, saved)"
            say(word)
        self.best = max(self.best, score)

    def save_model(self) -> None:
        save_whole(self.model.save_pretrained, self.out)


def train(args: argparse.Namespace, rank: int, world: int) -> int:
    """Trains into args.out; the exit code."""
    import torch

    from kernels.encoder import CrossEncoder

    before = look_into(args.out, result_flags(args), args.resume, args.overwrite)
    if before and (args.out / "README.md").is_file():  # written last: `last/` may be gone by then
        say(f"{args.out}: finished already ({args.steps:,} steps); nothing to do")
        return 0
    has_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu else "cpu"
    if args.graphs == "on" and not has_gpu:
        raise BadInput("--graphs on: no CUDA device is used here; leave it out")
    with command.rank_0_first():
        texts = open_texts(args.dataset, args.lists)
        model = load_backbone(args.backbone, texts, args.device, args.query_length,
                              args.doc_length, args.seed).to(device)
        source = open_source(args, texts)
        validation = Validation(args.eval_dataset, args.eval_run, args.eval_measure,
                                args.eval_depth, args.eval_queries, rank, world)
    made_of = provenance(args, texts, validation) if rank == 0 else None
    if before and rank == 0:
        refuse_changes(args.out, before, made_of)
    say(plan(args))
    say(opened(source, args.steps * args.batch_size, model, world, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                  fused=True)
    run = Run(args, model, optimizer, validation, rank)
    if before and (run.last / "checkpoint.pt").is_file():
        run.resume()
    elif rank == 0:
        run.begin(made_of)
    run.open_log()
    step = exact_step(args, model, optimizer, rank, world)
    with explained(args.out):
        batches = prefetched(args, run.start, source, texts, model.tokenize, rank, world)
        stopped = run_steps(run, step, batches, args.save_every, world)
    if stopped:
        return 128 + stopped
    if rank == 0:
        if not validation.sets:
            run.save_model()
        kept = CrossEncoder.from_pretrained(args.out, "float32", device.partition(":")[0])
        close(args, run.history, closing_table(args, kept, validation))
    command.wait_for_all()
    return 0


def opened(source: Lists | TextLists | Triples, lists: int, model, world: int, device: str) -> str:
    """A line on what is trained, on what and where. lists: of all steps together."""
    kind = "triples" if isinstance(source, Triples) else "queries with lists"
    numbers = sum(p.numel() for p in model.parameters())
    processes = "1 process" if world == 1 else f"{world} processes"
    return (f"data       {len(source):,} {kind}, seen {lists / len(source):,.1f} times; "
            f"{numbers:,} parameters; {processes} on {device}")


def exact_step(args: argparse.Namespace, model, optimizer, rank: int, world: int):
    """kernels.step.Step of these flags: the loss, its exact gradient, the optimizer."""
    from kernels import losses
    from kernels.exact import ListGradient
    from kernels.graphs import Graphs
    from kernels.step import Step

    # over several cards graphs were never tried
    auto = model.device.type == "cuda" and args.dtype == "bfloat16" and world == 1
    wanted = {"on": True, "off": False, "auto": auto}[args.graphs]
    graphs = Graphs(model, args.dtype, warn=say) if wanted else None
    gradient = ListGradient(model, getattr(losses, args.loss), seed=args.seed, dtype=args.dtype,
                            max_tokens=args.max_tokens, rank=rank, world=world, graphs=graphs,
                            reserve=0 if optimizer.state else 2)  # AdamW's two moments
    return Step(gradient, optimizer, lr=args.lr, warmup=args.warmup, steps=args.steps,
                clip=args.clip, warn=say)


def prefetched(args: argparse.Namespace, start: int, source: Lists | TextLists | Triples,
               texts: Texts | ListFile, tokenize, rank: int, world: int):
    """The batches from step `start` on, made by worker processes where texts are slow to read."""
    batches = Batches(source, texts, tokenize, size=args.batch_size, seed=args.seed,
                      query_length=args.query_length, doc_length=args.doc_length, rank=rank,
                      world=world)
    default = 0 if texts.folder else 2
    workers = default if args.workers is None else args.workers
    return batches.loader(start, args.steps, workers)


@contextlib.contextmanager
def explained(out: Path):
    """Inside, what ends a training says in one line what is kept and what to try."""
    import torch

    from kernels.graphs import CaptureError
    from kernels.step import NonFiniteStep

    try:
        yield
    except CaptureError as e:
        raise BadInput(f"{e}; {checkpoint_kept(out)}. Begin anew with --graphs off") from e
    except NonFiniteStep as e:
        raise BadInput(f"{e}. Training stopped, {checkpoint_kept(out)}. Try a lower --lr, more "
                       "--warmup or --dtype float32") from e
    except torch.OutOfMemoryError as e:
        raise BadInput(f"{e}; {checkpoint_kept(out)}. Begin anew with a lower --max-tokens") from e


def run_steps(run: Run, step, loader, save_every: int, world: int) -> int:
    """All steps from run.start on, logged, validated and kept. The signal that stopped them, or 0.
    """
    batches, meter = iter(loader), Meter(run.start, world)
    log_every = max(min(run.every, run.steps) // 10, 1)
    bar = Progress(total=run.steps, initial=run.start, desc=run.out.name, unit=" steps")
    run.model.train()
    with command.Stop() as stop:
        for done in range(run.start + 1, run.steps + 1):
            batch = meter.next_of(batches)
            if isinstance(batch, BadInput):
                raise batch
            finished = step(done - 1, batch)
            logs, validates = done % log_every == 0 or done == run.steps, run.is_due(done)
            if logs or validates:
                finished += step.flush()
            meter.add(batch, finished)
            bar.set_postfix_str(f"loss {meter.loss(done):.4f}{meter.speed}", refresh=False)
            bar.update()
            if run.rank == 0 and logs:
                lr, norm = run.optimizer.param_groups[0]["lr"], finished[-1][1]
                run.log(**meter.row(done, lr, norm, step.gradient.on_gpu))
                meter.begin(done)
            if validates:
                run.checkpoint(done)  # no signal waits for a long validation: it is made up for
                run.validate(done)
                meter.begin(done)
            halt = highest_of_all(stop.signal, world)
            if done % save_every == 0 or done == run.steps or halt:
                # nothing is saved that was not seen to be finite
                meter.total += sum(loss for loss, _ in step.flush())
                run.checkpoint(done)
            if halt and done < run.steps:
                bar.close()
                name = signal.Signals(halt).name
                say(f"{name}: stopped after step {done:,}, checkpoint written; --resume goes on")
                return halt
    bar.close()
    if meter.without_gradient:
        say(f"{meter.without_gradient:,} of {run.steps - run.start:,} steps had no gradient: their "
            "lists held nothing to learn")
    return 0


def highest_of_all(number: int, world: int) -> int:
    """The highest of all ranks' numbers."""
    if world == 1:
        return number
    import torch
    import torch.distributed as dist

    votes = torch.tensor([number])
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return int(votes)


# ----------------------------------------------------------------------------------------- the end


def closing_table(args: argparse.Namespace, model, validation: Validation) -> str:
    """What the kept model makes of the candidates of --eval-run, or of BM25's on the dataset's test
    split; printed, and returned as Markdown. Lists from elsewhere hold candidates of another kind
    than BM25's: without --eval-run there is no table."""
    if args.no_table:
        return ""
    sets = []
    if args.eval_run:
        sets = validation.sets
    elif args.first_stage:
        sets = test_set(args.dataset.removesuffix("/train"), args.eval_depth)
    else:
        say("no closing table: the lists are not BM25's; --eval-run names candidates to re-rank")
    tables, measures = [], ["nDCG@10", "RR@10", "AP"]
    for (name, texts, run), path in zip(sets, args.eval_run or [None] * len(sets), strict=True):
        scores = score_run(model, texts, run, args.max_tokens, progress=name)
        row, chosen = args.out.name, ""
        if path:
            chosen = " (by these the step was chosen)"
        if collapsed(scores):
            row += " (COLLAPSED: all scores equal)"
        table = markdown_table({path.name if path else "BM25": evaluate(texts.qrels, run, measures),
                                row: evaluate(texts.qrels, scores, measures)})
        candidates = candidates_named(path and [path], args.eval_depth)
        tables.append(f"{name}: {len(run):,} queries, {candidates} and the same re-ranked"
                      f"{chosen}\n\n{table}")
    if tables:
        print("", *tables, sep="\n", end="\n\n")
    return "\n\n".join(tables)


def test_set(dataset: str, depth: int) -> list[tuple[str, Texts, dict]]:
    """[(name, the test split, BM25's run on it)] of a folder or pydocs; [] where there is none."""
    if dataset != "pydocs" and not (Path(dataset) / "qrels" / "test.tsv").is_file():
        return []
    texts = Texts(dataset, split="test")
    return [(f"{dataset} test", texts, first_stage(texts, None, "bm25", depth))]


def close(args: argparse.Namespace, history: list, table: str) -> None:
    """The model card, written last: with it the run is finished."""
    with atomic_write(args.out / "README.md") as file:
        file.write(model_card(args.out, result_flags(args), plan(args), history, table))
    where = f"--dataset {args.dataset or 'DATASET'} --first-stage bm25"
    if args.eval_run:
        where = f"--dataset {args.eval_dataset[0]} --run {args.eval_run[0]}"
    say(f"model in {args.out}; re-rank with: python rerank.py --model {args.out} {where} --out "
        "reranked.run")


def main() -> int:
    args = parse()
    if args.dry_run:
        print(plan(args), *files(args), f"out        {args.out}", sep="\n")
        return 0
    from kernels import cpu

    cpu.prepare(training=True)
    rank, world = command.join_processes()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with command.locked(args.out):
            return train(args, rank, world)
    except OSError as e:
        if e.errno in FULL:
            raise BadInput(f"{args.out}: cannot write ({e.strerror}); {checkpoint_kept(args.out)}. "
                           "Free some space and --resume") from e
        raise
    except KeyboardInterrupt:  # outside the steps, where Stop does not note it
        say(f"interrupted; {checkpoint_kept(args.out)}. --resume goes on")
        return 130
    finally:
        command.leave_processes()


if __name__ == "__main__":
    sys.exit(command.guarded(main))
