"""Re-rank a first stage with a cross-encoder.

    python rerank.py --model runs/mine --dataset pydocs --first-stage bm25 --depth 100 --out my.run
    python rerank.py --model DIR|HUB-ID --dataset msmarco-passage/trec-dl-2019/judged \\
        --run bm25.run --out reranked.run
    python rerank.py --model DIR --dataset my-corpus/ --run bm25.run --long-docs max --out max.run
    python rerank.py --model DIR --query "how do vaccines work" passages.txt --top 3 --json
    python rerank.py --dataset my-corpus/ --first-stage bm25 --out bm25.run         the first stage
    python rerank.py --model runs/*-seed* --dataset D1 D2 --run 1.run 2.run --out runs
    torchrun --nproc_per_node 4 -- rerank.py ...            same flags, the same file
                                                            (without the --, torchrun takes --run)

A dataset is an ir_datasets id, a folder in BEIR layout (corpus.jsonl, queries.jsonl,
qrels/SPLIT.tsv; FOLDER/SPLIT picks one) or `pydocs`, known-item search over the docstrings of the
installed Python packages. Runs are TREC runs. An interrupted run continues where it stopped when
the same command is given again.

With several models or datasets --out is a folder: OUT/<model>/<dataset>.run.gz, / in a dataset's
name as -, as `evaluate.py --suite` reads them. Runs that are there, made from the same models, data
and flags (OUT.json knows), are skipped; a model is loaded once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data import command

if __name__ == "__main__":
    command.quiet_imports()
import numpy as np

from data.cache import model_stamp
from data.command import BadInput, Parser, Progress, at_least, say
from data.first_stages import SPLADE, first_stage, first_stage_name
from data.parts import blocks_of, digest_of, is_finished, note_of, write_in_blocks
from data.run_names import run_name
from data.runs import atomic_write, run_tag
from data.runs import read_run as read_run  # of this stage, for who imports from here
from data.runs import write_run as write_run
from data.texts import SURROGATE, DocumentTokens, Texts, check_dataset, text_lines
from kernels.sigmoid import sigmoid_in_order


class PairScorer:
    """Scores blocks of a run with a cross-encoder: text read and tokenised in a thread, one block
    ahead.

    Args:
        model: kernels.encoder.CrossEncoder.
        texts: the dataset.
        run: {qid: {docid: score}}; the scores are not used.
        long_docs: "first" scores the first doc_length tokens; "max" every passage of doc_length
            tokens, `stride` tokens apart, the last one ending the document, and keeps the best
            (MaxP, Dai and Callan 2019).
        skip_missing: leave documents out that the dataset lacks, and count them, instead of raising
            BadInput.
        sigmoid: sigmoid_in_order of each query's scores instead of logits.

    After use: pairs, passages, truncated_queries, seconds, waited (seconds without text to score).
    """

    def __init__(self, model, texts: Texts, run: dict, max_tokens: int | None = None,
                 long_docs: str = "first", stride: int = 128, skip_missing: bool = False,
                 sigmoid: bool = False) -> None:
        self.model, self.texts, self.run, self.max_tokens = model, texts, run, max_tokens
        self.long_docs, self.stride, self.skip_missing = long_docs, stride, skip_missing
        self.sigmoid = sigmoid
        limit = model.doc_length if long_docs == "first" else None
        self.documents = DocumentTokens(texts, model.tokenize, limit)
        self.pairs = self.passages = self.truncated_queries = 0
        self.seconds = self.waited = 0.0

    def __call__(self, blocks: list[list[str]]) -> Iterator[dict[str, dict[str, float]]]:
        """Yields {qid: {docid: fp32 score}} for each block. Raises BadInput on a missing document
        or a score that is not finite, naming the queries.

        A GPU is given a block before the scores of the one before it are fetched, so that it never
        waits for this.
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

    def _prepare(self, block: list[str]) -> tuple[list, list, list, list[int]]:
        """Token ids of the block's pairs: ((qid, docid) of each pair, query tokens and passage
        tokens of each passage, passages of each pair)."""
        limit = self.model.query_length
        documents = self.documents([d for q in block for d in self.run[q]])
        lost = [d for q in block for d in self.run[q] if d not in documents]
        if lost and not self.skip_missing:
            raise BadInput(f"document {lost[0]!r} ({len(lost)} in this block) is not in dataset "
                           f"{self.texts.name}; is it the corpus that the run was made on? "
                           "(--skip-missing leaves such documents out)")
        queries = self.model.tokenize([self.texts.all_queries[q] for q in block], limit + 1)
        self.truncated_queries += sum(len(ids) > limit for ids in queries)
        keys, query_ids, passage_ids, counts = [], [], [], []
        for qid, ids in zip(block, queries, strict=True):
            for docid in self.run[qid]:
                if docid not in documents:
                    continue
                passages = [documents[docid]]
                if self.long_docs == "max":
                    length = self.model.doc_length
                    passages = split_passages(documents[docid], length, self.stride)
                keys.append((qid, docid))
                counts.append(len(passages))
                passage_ids += passages
                query_ids += [ids[:limit]] * len(passages)
        return keys, query_ids, passage_ids, counts

    def _result(self, start: float, block: list[str], keys: list, counts: list[int],
                scores: Callable) -> dict[str, dict[str, float]]:
        """The scores of a block's passages, waited for, as the best of each pair."""
        try:
            scores = scores().numpy()
        except FloatingPointError as e:
            owner = np.repeat(np.arange(len(counts)), counts)
            bad = list(dict.fromkeys(keys[owner[i]][0] for i in e.pairs))
            raise BadInput(f"scores not finite, first of queries {bad[:5]}; has the model diverged?"
                           ) from e
        self.pairs += len(counts)
        self.passages += len(scores)
        if len(scores) > len(counts):
            scores = np.maximum.reduceat(scores, np.cumsum([0, *counts[:-1]]))
        result: dict[str, dict[str, float]] = {qid: {} for qid in block}
        for (qid, docid), score in zip(keys, scores, strict=True):
            result[qid][docid] = score
        if self.sigmoid:
            for ranked in result.values():
                ranked.update(zip(ranked, sigmoid_in_order(np.array(list(ranked.values()))),
                                  strict=True))
        self.seconds = time.perf_counter() - start
        return result

    def summary(self) -> str:
        """What was scored, how fast, and everything that was cut or left out, in one line."""
        speed = self.pairs / max(self.seconds, 1e-9)
        parts = [f"{self.pairs:,} pairs in {self.seconds:.1f} s ({speed:,.0f} pairs/s)"]
        cut, missing = len(self.documents.truncated), len(self.documents.missing)
        if self.long_docs == "max":
            parts.append(f"{self.passages:,} passages of {self.model.doc_length} tokens")
        elif cut:
            parts.append(f"{cut:,} documents cut to {self.model.doc_length} tokens")
        if self.truncated_queries:
            length = self.model.query_length
            parts.append(f"{self.truncated_queries:,} queries cut to {length} tokens")
        if missing:
            parts.append(f"{missing:,} documents missing from the dataset and left out")
        return "; ".join(parts)


def split_passages(ids: np.ndarray, length: int, stride: int) -> list[np.ndarray]:
    """Windows [0, length), [stride, stride + length), ... of a document's tokens; the last ends
    with the document."""
    if len(ids) <= length:
        return [ids]
    starts = [*range(0, len(ids) - length, stride), len(ids) - length]
    return [ids[start : start + length] for start in starts]


def score_run(model, texts: Texts, run: dict, max_tokens: int | None = None,
              progress: str = "") -> dict[str, dict[str, float]]:
    """The whole run re-scored in memory: {qid: {docid: score}}. `progress` names a progress bar."""
    scorer, scores = PairScorer(model, texts, run, max_tokens), {}
    pairs = sum(map(len, run.values()))
    with Progress(total=pairs, desc=progress, unit=" pairs", leave=False,
                  disable=not progress) as bar:
        for result in scorer(blocks_of(run, 1024)):
            scores |= result
            bar.update(sum(map(len, result.values())))
    return {q: {d: float(s) for d, s in ranked.items()} for q, ranked in scores.items()}


# ------------------------------------------------------------------------------------- the command


def add_first_stage_flags(parser: argparse.ArgumentParser, **how) -> None:
    """The flags that choose candidates; `how`: what else argparse gets for --dataset and --run."""
    add = parser.add_argument
    add("--dataset", help="ir_datasets id, folder in BEIR layout, or pydocs[/SPLIT]", **how)
    add("--run", type=Path, help="first stage: a TREC run (.gz and .zst too)", **how)
    add("--first-stage", type=first_stage_name, metavar="bm25|scoreddocs|splade[:MODEL]",
        help="make the first stage: BM25, what ir_datasets ships, or SPLADE (default model: the "
        f"paper's, {SPLADE})")
    add("--depth", type=at_least(1), default=1000,
        help="candidates re-ranked per query (default 1000)")
    add("--skip-missing", action="store_true",
        help="leave out documents that the dataset lacks (counted) instead of stopping")


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model", nargs="+", help="model folders or hub ids, in modules of sentence-transformers "
        "(ettin-reranker) too; without one --first-stage itself is written")
    add_first_stage_flags(parser, nargs="+")
    add("--out", type=Path, help="the TREC run to write, or the folder of several")
    add("--overwrite", action="store_true", help="replace --out where it exists; in a folder, the "
        "runs that other models, flags or data have made")
    add("--sigmoid", action="store_true", help="scores between 0 and 1, for thresholds, in place "
        "of logits; the order stays the same")
    add("--long-docs", choices=["first", "max"], default="first", help="documents beyond "
        "--doc-length: their first passage (default), or the best of all (MaxP)")
    add("--stride", type=at_least(1), default=128,
        help="tokens between the starts of passages (MaxP; default 128)")
    add("--query", help="re-rank the lines of a text file for this query and print them")
    add("file", nargs="?", default="-", help="with --query: the file, - for stdin (default -)")
    add("--top", type=at_least(1), metavar="N", help="with --query: print the best N only")
    add("--json", action="store_true", help="with --query: a JSON object a line (rank, score, line "
        "number, text)")
    command.add_model_flags(parser)
    args = parser.parse_args()
    if args.query is None:
        check_runs(parser, args)
    else:
        check_query(parser, args)
    return args


def check_query(parser: Parser, args: argparse.Namespace) -> None:
    of_a_run = (args.dataset, args.run, args.first_stage, args.out, args.long_docs == "max")
    if any(of_a_run):
        parser.error("--query ranks lines of a file: no --dataset, --run, --first-stage, --out "
                     "or --long-docs with it")
    if args.model and len(args.model) == 2 and args.file == "-":
        args.file = args.model.pop()  # --model DIR FILE: argparse takes both for models
    if not args.model or len(args.model) > 1:
        parser.error("--query TEXT takes one --model")


def check_runs(parser: Parser, args: argparse.Namespace) -> None:
    if args.file != "-":
        parser.error(f"{args.file}: a file of lines goes with --query TEXT")
    if args.top or args.json:
        parser.error("--top and --json go with --query TEXT")
    if not (args.dataset and all(args.dataset) and args.out):
        parser.error("--dataset and --out are needed, and --model to re-rank (or --model and "
                     "--query TEXT FILE)")
    if (args.run is None) == (args.first_stage is None):
        parser.error("give either --run FILE or --first-stage bm25|scoreddocs")
    if args.run and len(args.run) != len(args.dataset):
        parser.error(f"{len(args.run)} --run for {len(args.dataset)} --dataset: a run for each, in "
                     "the same order")
    of_a_model = (args.run, args.sigmoid, args.long_docs == "max", len(args.dataset) > 1)
    if not args.model and any(of_a_model):
        parser.error("--model is missing; without one only --first-stage of one --dataset is "
                     "written, for --run to read")


def outputs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of each run to write, by model and then dataset. BadInput where one cannot be
    written, or two are the same file, or a first stage is not there."""
    runs = args.run or [None] * len(args.dataset)
    wanted = [argparse.Namespace(**vars(args) | {"model": model, "dataset": dataset, "run": run})
              for model in args.model or [None]
              for dataset, run in zip(args.dataset, runs, strict=True)]
    if len(wanted) == 1:
        command.refuse_overwrite(args.out, args.overwrite, inputs=runs)
        return wanted
    if args.out.exists() and not args.out.is_dir():
        raise BadInput(f"{args.out}: no folder, as --out is of several models or datasets")
    for run in runs:
        if run and not run.exists():
            raise BadInput(f"{run}: No such file or directory")
    first: dict[Path, argparse.Namespace] = {}
    for one in wanted:
        one.out = args.out / run_name(one.model, one.dataset)
        other = first.setdefault(one.out, one)
        if other is not one:
            raise BadInput(f"{one.out}: of {other.model} on {other.dataset} and of {one.model} on "
                           f"{one.dataset}; rename one, or give it another --out")
        command.refuse_overwrite(one.out, overwrite=True, inputs=runs)
    return wanted


def main() -> int:
    args = parse()
    if args.query is not None:
        print_ranking(open_model(args.model[0], args), args)
        return 0
    wanted = outputs(args)
    if len(wanted) > 1:
        rerank_several(wanted)
        return 0
    (one,) = wanted
    with command.locked(one.out):
        if one.model is None:
            write_first_stage(one)
        else:
            rerank(open_model(one.model, args), one)
    return 0


def open_model(name: str, args: argparse.Namespace):
    """kernels.encoder.CrossEncoder by the flags."""
    from kernels import cpu  # here, so that --help and usage errors need no torch
    from kernels.encoder import CrossEncoder

    cpu.prepare(training=False)
    command.join_processes()
    return CrossEncoder.from_pretrained(name, args.dtype, args.device, args.query_length,
                                        args.doc_length).eval()


def open_candidates(args: argparse.Namespace) -> tuple[Texts, dict[str, dict[str, float]]]:
    """(dataset, the candidates of each query)."""
    with command.rank_0_first():
        texts = Texts(args.dataset)
        run = first_stage(texts, args.run, args.first_stage, args.depth, args.skip_missing)
    if not any(run.values()):
        raise BadInput(f"{args.run or args.first_stage}: no document to score; is it a run on "
                       f"{args.dataset}?")
    return texts, run


def write_first_stage(args: argparse.Namespace) -> None:
    """The candidates as they are, tagged with the first stage's name."""
    _, run = open_candidates(args)
    if command.rank_of_process() == 0:
        write_run(args.out, run, args.first_stage.partition(":")[0])
        say(f"{args.out}: {len(run):,} queries, {sum(map(len, run.values())):,} documents")


def rerank_several(wanted: list[argparse.Namespace]) -> None:
    """The runs that are not finished, each model loaded once for its own. What is wrong with a
    dataset's name or a finished run is said before anything is scored."""

    @functools.cache  # a dataset is opened once for the finished runs of all models
    def stamp(dataset, run):
        with command.rank_0_first():
            return Texts(dataset).stamp(run)

    with command.rank_0_first():
        for dataset in dict.fromkeys(one.dataset for one in wanted):
            check_dataset(dataset)
    left = [one for one in wanted if not is_finished(
        one.out, lambda one=one: plan_of(one, stamp(one.dataset, one.run)), one.overwrite)]
    if len(left) < len(wanted):
        say(f"{len(wanted) - len(left):,} of {len(wanted):,} runs are finished and skipped")
    for name, of_model in itertools.groupby(left, key=lambda one: one.model):
        model = open_model(name, wanted[0])
        for one in of_model:
            one.out.parent.mkdir(parents=True, exist_ok=True)
            with command.locked(one.out):
                rerank(model, one)
        del model  # the next one gets its memory


def plan_of(args: argparse.Namespace, stamp: dict[str, str]) -> dict[str, str]:
    """What decides the scores; stamp: of Texts.stamp."""
    elsewhere = ("out", "overwrite", "query", "file", "top", "json")
    plan = {flag: str(value) for flag, value in vars(args).items() if flag not in elsewhere}
    return plan | stamp | {"model": model_stamp(str(Path(args.model)))}


def rerank(model, args: argparse.Namespace) -> None:
    """The candidates re-scored and written, with what it took in OUT.json."""
    if args.long_docs == "max" and args.stride > model.doc_length:
        raise BadInput(f"--stride {args.stride}: beyond the {model.doc_length} tokens of a "
                       "passage, so that the text between passages would never be scored; lower "
                       "it")
    texts, run = open_candidates(args)
    scorer = PairScorer(model, texts, run, args.max_tokens, args.long_docs, args.stride,
                        args.skip_missing, args.sigmoid)
    plan, dtype = plan_of(args, texts.stamp(args.run)), str(model.model.dtype)
    if write_in_blocks(args.out, plan | {"dtype": dtype}, run, run_tag(args.model), scorer,
                       args.overwrite):
        say(f"{args.out}: {len(run):,} queries, {scorer.summary()}")
        if scorer.pairs:  # else all had been scored before an interruption: no speed to tell
            took = {"seconds": scorer.seconds, "waited": scorer.waited, "pairs": scorer.pairs,
                    "model": args.model, "device": str(model.device), "dtype": dtype,
                    "plan": digest_of(plan)}
            with atomic_write(note_of(args.out)) as file:
                json.dump(took, file)


def print_ranking(model, args: argparse.Namespace) -> None:
    """The lines of a text file (`-`: stdin), best first, behind their scores or as JSON."""
    query, lines = SURROGATE.sub("\ufffd", args.query), text_lines(args.file)
    if not lines:
        raise BadInput(f"{args.file}: no text lines to rank")
    try:
        ranking = model.rank(query, list(lines.values()), args.top, args.max_tokens, args.sigmoid)
    except FloatingPointError as e:
        raise BadInput(f"{args.file}: {e}; has the model diverged?") from e
    if model.truncated:
        say(f"{model.truncated:,} texts cut: the query to {model.query_length} tokens, lines to "
            f"{model.doc_length}")
    numbers = list(lines)
    for rank, (i, score) in enumerate(ranking, 1):
        text = lines[numbers[i]]
        if args.json:
            shortest = float(str(np.float32(score)))  # the fewest digits that keep it, as in runs
            print(json.dumps({"rank": rank, "score": shortest, "line": numbers[i], "text": text}))
        else:
            print(f"{score:.6f}\t{text}")


if __name__ == "__main__":
    sys.exit(command.guarded(main))
