"""Make a teacher's scores: ensembles of cross-encoders, LLM rankers, published files by name.

    python teacher.py cross-encoder --model A B C --dataset D --run first.run --out teacher.run
    python teacher.py cross-encoder --model A B C --dataset D --triples triples.tsv --out scores.tsv
    python teacher.py cross-encoder --model A B C --lists mine.jsonl --out scored.jsonl
    python teacher.py listwise --model castorini/rank_zephyr_7b_v1_full --dataset D \\
        --run first.run --out teacher.run
    python teacher.py listwise --endpoint http://localhost:8000/v1 --model NAME --dataset D \\
        --run first.run --out teacher.run
    python teacher.py pointwise --model Qwen/Qwen3-Reranker-0.6B --dataset D --first-stage bm25 \\
        --out teacher.run
    torchrun --nproc_per_node 4 -- teacher.py ...           same flags, the same file

What comes out is a TREC run whose score column is the teacher's, Hofstätter's TSV (pos_score
neg_score qid pos_pid neg_pid), or the JSONL that went in with pos_scores and neg_scores, and is
read by `train.py --lists RUN`, `train.py --triples TSV` and `train.py --lists JSONL`.
A run that an LLM ranker made elsewhere needs nothing from here: give it to --lists as it is. An
interrupted command goes on where it stopped when it is given again; an LLM is never asked twice for
the same answer.

Wherever a file is asked for (--run, --triples, and --lists and --triples of train.py) the name of a
published one will do; it is fetched at first use, checked against its md5 and kept: ensemble-t1 and
ensemble-t2 (Hofstätter et al. 2020), colbert, bm25, rankzephyr-10, rankzephyr-50, rankzephyr-100,
rankzephyr-bm25-100 and the parquet files hf-colbert, hf-rankzephyr-100, hf-set-encoder,
hf-monoelectra (Schlatt et al. 2025), docpairs (MS MARCO's training triples).
"""

import argparse
import glob
import itertools
import json
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data import command

if __name__ == "__main__":
    command.quiet_imports()
import numpy as np

from data.answers import Answers
from data.cache import model_stamp, sha256_of
from data.chat_server import Endpoint
from data.command import BadInput, Parser, Progress, at_least, join_processes, say
from data.first_stages import first_stage
from data.list_file import ListFile, carries_texts, write_scored
from data.parts import digest_of, note_of, write_in_blocks
from data.prompts import PROMPTS, around_document, conversation, parse_permutation
from data.published import published
from data.runs import atomic_write, run_lines, run_tag
from data.texts import SURROGATE, Texts
from data.triples import TripleFile
from rerank import PairScorer, add_first_stage_flags

# -------------------------------------------------------------------------- what all teachers share


def plan_of(kind: str, texts: Texts | ListFile, source: Path | None, skip_missing: bool) -> dict:
    """What decides the scores as far as the candidates do: another plan is another run."""
    return {"command": kind, "corpus": texts.fingerprint(), "queries": texts.digest(),
            "skip_missing": skip_missing, "source": source and sha256_of(source)}


def open_candidates(*, kind: str, dataset: str, run: Path | None, first: str | None, depth: int,
                    skip_missing: bool) -> tuple[Texts, dict[str, dict[str, float]], dict]:
    """(dataset, candidates of each query, plan) from a run, or from the first stage of that
    name."""
    texts = Texts(dataset)
    plan = plan_of(kind, texts, run, skip_missing)
    plan |= {"depth": depth, "first_stage": first, "dataset": f"{texts.name} {texts.split}"}
    candidates = first_stage(texts, run, first, depth, skip_missing)
    refuse_nothing(texts, candidates, run or first)
    return texts, candidates, plan


def open_lists(kind: str, path: Path) -> tuple[ListFile, dict[str, dict[str, float]], dict]:
    """(lists with their texts, the same as a run, plan)."""
    file = ListFile(path)
    if scored := np.isfinite(file.scores).sum():
        say(f"{path}: {scored:,} of its {len(file.scores):,} texts have scores, which are replaced")
    return file, file.run(), plan_of(kind, file, path, skip_missing=False)


def refuse_nothing(texts: Texts, run: dict, source: Path | str) -> None:
    """BadInput where the dataset holds none of the run's documents."""
    if not any(texts.documents(ranked) for ranked in run.values()):
        raise BadInput(f"{source}: none of its documents is in dataset {texts.name}; nothing to "
                       "score, is it the corpus that it was made on?")


def read_documents(texts: Texts, run: dict, qids: list[str], skip_missing: bool) -> dict[str, str]:
    """{docid: text} of the candidates of these queries; BadInput where the dataset lacks one,
    unless skip_missing."""
    docids = list(dict.fromkeys(d for qid in qids for d in run[qid]))
    found = texts.documents(docids)
    if len(found) < len(docids) and not skip_missing:
        docid = next(d for d in docids if d not in found)
        qid = next(q for q in qids if docid in run[q])
        raise BadInput(f"query {qid!r}: document {docid!r} is not in dataset {texts.name}; is it "
                       "the corpus that the run was made on? (--skip-missing leaves such documents "
                       "out)")
    return found


def count_alike(alike: Counter, scores) -> None:
    """Counts a query of several documents by whether all of them have one score."""
    if len(scores) > 1:
        alike[len(set(scores)) == 1] += 1


def closing(done: str, counts: dict[str, int], alike: Counter) -> str:
    """The last line; `alike` as count_alike counts."""
    if not alike[False]:
        counts = counts | {"queries, each with one score for all its documents: WARNING, this run "
                           "is no teacher": alike[True]}
    return "; ".join([done, *(f"{n:,} {what}" for what, n in counts.items() if n)])


def write_summary(out: Path, flags: dict, **values) -> None:
    """OUT.json: the flags and what was measured and counted."""
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}
    with atomic_write(note_of(out)) as file:
        json.dump({**values, "flags": flags}, file, indent=1)


# ----------------------------------------------------------------------------------- cross-encoders


def open_triples(*, kind: str, dataset: str, path: Path, skip_missing: bool
                 ) -> tuple[Texts, TripleFile, dict[str, dict[str, float]], dict]:
    """(dataset, triples, their distinct pairs, plan)."""
    texts = Texts(dataset)
    plan = plan_of(kind, texts, path, skip_missing)
    triples = TripleFile(path, texts)
    pairs = pairs_of(triples, texts, skip_missing)
    refuse_nothing(texts, pairs, path)
    return texts, triples, pairs, plan


def pairs_of(triples: TripleFile, texts: Texts, skip_missing: bool) -> dict[str, dict[str, float]]:
    """The distinct pairs of a file of triples in the form of a run, {qid: {docid: 0.0}}."""
    pairs: dict[str, dict[str, float]] = {}
    bar = Progress(triples, desc=f"pairs of {triples.path.name}", unit=" triples")
    for i, (qid, *docids) in enumerate(bar):
        if qid not in texts.all_queries:
            raise BadInput(f"{triples.where(i)}: query {qid[:60]!r} is not in dataset "
                           f"{texts.name}; ids are expected")
        known = pairs.setdefault(qid, {})
        fresh = [d for d in docids if d not in known]
        lost = texts.missing(fresh)
        if lost and not skip_missing:
            raise BadInput(f"{triples.where(i)}: document {lost[0][:60]!r} is not in dataset "
                           f"{texts.name}; ids are expected (--skip-missing leaves such triples "
                           "out)")
        known |= {d: 0.0 for d in fresh if d not in lost}
    say(f"{triples.path}: {sum(map(len, pairs.values())):,} distinct pairs of {len(pairs):,} "
        "queries")
    return pairs


def queries_of(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """(qid, {docid: float64 score}) of a run that write_in_blocks wrote, one query in memory at a
    time."""
    with open(path, encoding="utf-8") as lines:
        fields = (line.split(" ") for line in lines)
        for qid, rows in itertools.groupby(fields, key=lambda field: field[0]):
            yield qid, {field[2]: float(field[4]) for field in rows}


def normalized(scores: np.ndarray, how: str) -> np.ndarray:
    """Scores of one query [documents] float64, brought to a common scale; all alike become 0.

    none: as they are (Hofstätter et al. 2020). zscore: (s - mean) / population deviation. minmax:
    onto [0, 1].
    """
    if how == "none":
        return scores
    low, scale = scores.min(), np.ptp(scores)
    if how == "zscore":
        low, scale = scores.mean(), scores.std()
    return (scores - low) / scale if scale > 0 else np.zeros_like(scores)


def mean_of(members: list[Path], how: str,
            alike: Counter) -> Iterator[tuple[str, dict[str, float]]]:
    """(qid, {docid: mean over the members' runs}), in float64, each member's query normalized
    first; `alike` is what count_alike counts in."""
    for parts in zip(*map(queries_of, members), strict=True):
        qid, docids = parts[0][0], list(parts[0][1])
        together = [normalized(np.array([scores[d] for d in docids]), how) for _, scores in parts]
        mean = np.mean(together, axis=0).tolist()
        count_alike(alike, mean)
        yield qid, dict(zip(docids, mean, strict=True))


def write_scores(out: Path, scores: Iterator[tuple[str, dict[str, float]]],
                 source: TripleFile | ListFile | None, tag: str) -> None:
    """A TREC run; or the `source` of the pairs with their scores in it: triples as Hofstätter's
    TSV, lists with their texts as they are."""
    if isinstance(source, ListFile):
        write_scored(out, scores, source)
    elif source:
        write_triples(out, dict(scores), source)
    else:
        with atomic_write(out) as file:
            for qid, ranked in scores:
                file.write(run_lines(qid, ranked, tag))


def write_triples(out: Path, table: dict[str, dict[str, float]], triples: TripleFile) -> None:
    """Triples with both scores before them; those that lack one are left out and counted."""
    left = 0
    with atomic_write(out) as file:
        for qid, pos, neg in triples:
            ranked = table.get(qid, {})
            if pos in ranked and neg in ranked:
                file.write(f"{ranked[pos]}\t{ranked[neg]}\t{qid}\t{pos}\t{neg}\n")
            else:
                left += 1
    if left:
        say(f"{out}: {left:,} triples left out, the dataset lacks a document of theirs "
            "(--skip-missing)")


def member_of(out: Path, number: int, plan: dict) -> Path:
    """Where the scores of one model wait for OUT to be made of them."""
    return Path(f"{out}.scores-{number}-{digest_of(plan)[:12]}")


def sealed(member: Path, content: Path) -> Path:
    """The name of a member's scores when they are whole: with the checksum of `content`."""
    return Path(f"{member}-{sha256_of(content)[:16]}")


def scored_before(member: Path, name: str) -> Path | None:
    """The whole scores of the model `name` that an interrupted command left; says which are
    damaged."""
    kept = list(member.parent.glob(f"{glob.escape(member.name)}-*"))
    for file in kept:
        if file.name == sealed(member, file).name:
            say(f"{name}: scored before the interruption")
            return file
    for file in kept:
        say(f"{file}: damaged and left out, {name} scores anew")
    return None


def cross_encoder(args) -> None:
    """Every pair by the first member, then every pair by the second, ...; then the mean."""
    from kernels import cpu
    from kernels.encoder import CrossEncoder

    cpu.prepare(training=False)
    suffix = re.search(r"(\.jsonl?)?(\.[^.]*)?$", args.out.name)[0]
    stem = args.out.name.removesuffix(suffix)
    kept = [args.out.with_name(f"{stem}.member-{i}{suffix}")
            for i in range(1, len(args.model) + 1)]
    scratch = f"{glob.escape(args.out.name)}.scores-*"
    begun = any(args.out.parent.glob(scratch))  # and may have come as far as the members' own files
    for file in [args.out, *kept] if args.keep_each and not begun else [args.out]:
        command.refuse_overwrite(file, args.overwrite, inputs=[args.run, args.triples, args.lists])
    source = None  # of the pairs, where their scores are written into it
    if args.lists:
        source, run, plan = open_lists(args.command, args.lists)
        texts = source
    elif args.triples:
        texts, source, run, plan = open_triples(
            kind=args.command, dataset=args.dataset, path=args.triples,
            skip_missing=args.skip_missing)
    else:
        texts, run, plan = open_candidates(
            kind=args.command, dataset=args.dataset, run=args.run, first=args.first_stage,
            depth=args.depth, skip_missing=args.skip_missing)
    rank, _ = join_processes()
    plan |= {k: getattr(args, k)
             for k in ("device", "dtype", "max_tokens", "query_length", "doc_length")}
    members, summaries, start = [], [], time.perf_counter()
    for number, name in enumerate(args.model, 1):
        own = plan | {"model": model_stamp(name)}
        member = member_of(args.out, number, own)
        whole = None if args.overwrite else scored_before(member, name)
        if whole:
            members.append(whole)
            summaries.append({"model": name})
            continue
        model = CrossEncoder.from_pretrained(name, args.dtype, args.device, args.query_length,
                                             args.doc_length)
        scorer = PairScorer(model, texts, run, args.max_tokens, skip_missing=args.skip_missing)
        if write_in_blocks(member, own, run, run_tag(name), scorer, args.overwrite):
            members.append(member.rename(sealed(member, member)))
        say(f"{name}: {scorer.summary()}")
        summaries.append({"model": name, "seconds": scorer.seconds, "pairs": scorer.pairs,
                          "query_length": model.query_length, "doc_length": model.doc_length,
                          "documents_cut": len(scorer.documents.truncated),
                          "queries_cut": scorer.truncated_queries})
        del model, scorer  # the next member gets this one's memory
    if rank:
        return
    if args.keep_each:
        for file, member, name in zip(kept, members, args.model, strict=True):
            write_scores(file, mean_of([member], "none", Counter()), source, run_tag(name))
    write_summary(args.out, vars(args), members=summaries, seconds=time.perf_counter() - start,
                  queries=len(run), pairs=sum(map(len, run.values())))
    tag, models = "ensemble", f"{len(members)} models"
    if len(members) == 1:
        tag, models = run_tag(args.model[0]), "1 model"
    alike: Counter = Counter()
    # last: until OUT is there the same command goes on
    write_scores(args.out, mean_of(members, args.normalize, alike), source, tag)
    for file in args.out.parent.glob(scratch):
        file.unlink()
    say(closing(f"{args.out}: {len(run):,} queries, mean of {models}", {}, alike))


# ----------------------------------------------------------------------------------------- listwise


def windows(n: int, window: int, stride: int) -> list[tuple[int, int]]:
    """[start, end) of Sun et al. 2023's sliding windows over a list of n, bottom up; the last one
    starts at 0.

    Each is put in order before the next is looked at, so its best climb on: with a perfect judge
    the top window - stride of the list come out exact.
    """
    spans = []
    for end in range(n, 1, -stride):
        spans.append((max(end - window, 0), end))
        if end <= window:
            break
    return spans


class OpenQuery:
    """A query whose documents are being ordered, window by window.

    Args:
        text: of the query. documents: {docid: text}, in the order to begin with.
        spans: its windows(). answers: those for the first windows, known already.
        counts: gets what the answers are counted by.

    Attributes: order, the docids as far as they are ordered; fresh, whether an answer was missing.
    """

    def __init__(self, qid: str, text: str, documents: dict[str, str], spans: list[tuple[int, int]],
                 answers: list[dict], counts: Counter) -> None:
        self.qid, self.text, self.documents, self.counts = qid, text, documents, counts
        self.order, self.left = list(documents), deque(spans)
        self.fresh = len(spans) > len(answers)
        for answer in answers[: len(spans)]:
            self.take(answer)

    def request(self) -> list[str] | None:
        """The passages to be ordered next; None where all windows are."""
        if not self.left:
            return None
        low, high = self.left[0]
        return [self.documents[d] for d in self.order[low:high]]

    def take(self, answer: dict) -> None:
        """Puts the window of request() into the order of the answer."""
        low, high = self.left.popleft()
        permutation, wrong = parse_permutation(answer["text"], high - low)
        self.order[low:high] = [self.order[low + i] for i in permutation]
        self.counts.update(["answers", *(wrong or ["in order"])])
        if answer["cut"] and "missing" in wrong:
            self.counts["cut off"] += 1
        self.counts["passages shortened"] += answer.get("shortened", False)
        self.counts["prompt tokens"] += answer["prompt_tokens"]
        self.counts["answer tokens"] += answer["answer_tokens"]

    def close(self) -> list[str]:
        """The final order of a query that asks nothing more."""
        if len(self.order) > 1:
            kept = self.order == list(self.documents)
            self.counts["queries kept in order" if kept else "queries reordered"] += 1
        return self.order


def ordered(queries: Iterator[OpenQuery], engine, answers: Answers) -> Iterator[OpenQuery]:
    """The queries, each as soon as all its windows are in order.

    engine: Endpoint or LocalModel; engine.capacity queries wait for an answer at a time, each for
    one.
    """
    asked: dict[str, OpenQuery] = {}
    ready: deque[OpenQuery] = deque()
    while True:
        if not ready and len(asked) < engine.capacity:
            ready.extend(itertools.islice(queries, 1))
        if ready:
            query = ready.popleft()
            passages = query.request()
            if passages is None:
                yield query
            else:
                asked[query.qid] = query
                engine.start(query.qid, query.text, passages)
        elif asked:
            arrived = engine.finished()
            for qid, answer in arrived:
                answers.add(qid, answer)
            for qid, answer in arrived:
                asked[qid].take(answer)
                ready.append(asked.pop(qid))
        else:
            return


def listwise(args) -> None:
    """Whole queries are appended to OUT.partial-RANK as they come, a valid run at any moment; at
    the end rank 0 joins these."""
    command.refuse_overwrite(args.out, args.overwrite, inputs=[args.run])
    if args.stride > args.window:
        raise BadInput(f"--window {args.window} --stride {args.stride}: stride <= window is needed")
    texts, run, plan = open_candidates(
        kind=args.command, dataset=args.dataset, run=args.run, first=args.first_stage,
        depth=args.depth, skip_missing=args.skip_missing)
    rank, world = join_processes()
    mine, tag, start = list(run)[rank::world], run_tag(args.model), time.perf_counter()
    flags = ("model", "window", "stride", "prompt", "passage_words", "answer_tokens", "dtype",
             "seed")
    plan |= {k: getattr(args, k) for k in flags}
    plan |= {"weights": model_stamp(args.model), "server": args.endpoint is not None,
             "world": world}
    engine = engine_of(args)  # first: a wrong name leaves no file behind
    answers = Answers(Path(f"{args.out}.answers-{rank}.jsonl"), plan, args.overwrite)
    counts: Counter = Counter()

    def open_query(qid):
        found = read_documents(texts, run, [qid], args.skip_missing)
        counts["documents missing"] += len(run[qid]) - len(found)
        documents = {d: found[d] for d in run[qid] if d in found}
        spans = windows(len(documents), args.window, args.stride)
        return OpenQuery(qid, texts.all_queries[qid], documents, spans,
                         list(answers.of.get(qid, [])), counts)

    done = sum(len(answers.of.get(q, [])) == len(windows(len(run[q]), args.window, args.stride))
               for q in mine)
    with (
        open(f"{args.out}.partial-{rank}", "w", encoding="utf-8") as part,
        answers.file,
        Progress(total=len(mine), initial=done, desc=tag, unit=" queries") as bar,
    ):
        try:
            for query in ordered(map(open_query, mine), engine, answers):
                part.write(run_lines(query.qid, scores_of(query.close(), args.depth), tag))
                part.flush()
                tokens = counts["prompt tokens"], counts["answer tokens"]
                bar.set_postfix_str("{:,} tokens in, {:,} out".format(*tokens), refresh=False)
                bar.update(query.fresh)
        except BaseException:
            for qid, answer in engine.stop():
                answers.add(qid, answer)
            raise
    counts = sum_of_ranks(counts, world)
    if rank:
        return
    parts = [Path(f"{args.out}.partial-{r}") for r in range(world)]
    ranked = {qid: scores for path in parts for qid, scores in queries_of(path)}
    if not counts.pop("queries reordered", 0) or counts["malformed"] == counts["answers"]:
        counts["answers, all malformed or no query reordered: WARNING, this run is no teacher"] = (
            counts["answers"])
    write_summary(args.out, vars(args), counts=counts, queries=len(run),
                  seconds=time.perf_counter() - start)
    with atomic_write(args.out) as file:  # last: until it is there the same command goes on
        for qid in run:
            file.write(run_lines(qid, {d: int(s) for d, s in ranked.get(qid, {}).items()}, tag))
    for path in parts:
        path.unlink()
    say(closing(f"{args.out}: {len(run):,} queries", counts, Counter()))


def scores_of(order: list[str], depth: int) -> dict[str, int]:
    """{docid: depth - rank + 1}."""
    return {docid: depth - i for i, docid in enumerate(order)}


def engine_of(args):
    """The Endpoint or LocalModel that the flags of listwise name."""
    ask = partial(conversation, args.prompt)
    if args.endpoint:
        return Endpoint(args.endpoint, args.model, ask, passage_words=args.passage_words,
                        answer_tokens=args.answer_tokens, seed=args.seed,
                        concurrency=args.concurrency, timeout=args.timeout, retries=args.retries)
    from kernels import cpu
    from kernels.llm import LanguageModel, LocalModel

    cpu.prepare(training=False)
    llm = LanguageModel(args.model, args.dtype, args.device)
    return LocalModel(llm, ask, capacity=args.batch_size, passage_words=args.passage_words,
                      answer_tokens=args.answer_tokens,
                      most_passages=min(args.window, args.depth))


def sum_of_ranks(counts: Counter, world: int) -> Counter:
    """The counts of all ranks; returns when every rank has come here."""
    every = [counts]
    if world > 1:
        import torch.distributed as dist

        every = [None] * world
        dist.all_gather_object(every, counts)
    return sum(every, Counter())


# ---------------------------------------------------------------------------------------- pointwise


class YesNo:
    """logit(yes) - logit(no) of a language model for the pairs of blocks of a run, as
    rerank.PairScorer is called.

    Queries and documents are cut to their own lengths, so the end of the prompt is always there.

    Args:
        llm: kernels.llm.LanguageModel.
        template: of data.prompts.around_document; None: monot5 for seq2seq models, qwen3 where the
            tokenizer has <think>, else chat.
        words: for yes and no, of one token each; None: the template's own.
        instruction: the task, in the prompts qwen3 and chat.

    After use: pairs, seconds, counts() and alike, what count_alike counts in.

    Raises:
        BadInput: a word of several tokens; when called, a missing document, a prompt beyond the
            context, or a score that is not finite.
    """

    def __init__(self, llm, texts: Texts, run: dict, *, template: str | None,
                 words: list[str] | None, instruction: str, query_length: int, doc_length: int,
                 max_tokens: int | None, skip_missing: bool) -> None:
        self.llm, self.texts, self.run, self.instruction = llm, texts, run, instruction
        self.query_length, self.doc_length = query_length, doc_length
        self.max_tokens, self.skip_missing = max_tokens, skip_missing
        self.template = template or self._fitting_template()
        own = ["true", "false"] if self.template == "monot5" else ["yes", "no"]
        self.words = words or own
        self.answers = [self._token(word) for word in self.words]
        self.cut, self.cut_queries, self.missing = set(), set(), set()
        self.pairs, self.seconds, self.alike = 0, 0.0, Counter()

    def _fitting_template(self) -> str:
        if self.llm.seq2seq:
            return "monot5"
        return "qwen3" if "<think>" in self.llm.tokenizer.get_vocab() else "chat"

    def _token(self, word: str) -> int:
        ids = self.llm.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise BadInput(f"{self.llm.name}: {word!r} is {len(ids)} tokens; --answers takes words "
                           "of one token")
        return ids[0]

    def counts(self) -> dict[str, int]:
        """What was cut or left out."""
        return {"documents cut": len(self.cut), "queries cut": len(self.cut_queries),
                "documents missing": len(self.missing)}

    def __call__(self, blocks: list[list[str]]) -> Iterator[dict[str, dict[str, float]]]:
        """Yields {qid: {docid: fp32 score}} per block."""
        start = time.perf_counter()
        for block in blocks:
            keys, prompts = self._prompts(block)
            scores = self._scores(keys, prompts)
            result: dict[str, dict[str, float]] = {qid: {} for qid in block}
            for (qid, docid), score in zip(keys, scores, strict=True):
                result[qid][docid] = score
            for ranked in result.values():
                count_alike(self.alike, ranked.values())
            self.pairs += len(keys)
            self.seconds = time.perf_counter() - start
            yield result

    def _prompts(self, block: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
        """((qid, docid), prompt) of every pair of these queries, as two lists."""
        found = read_documents(self.texts, self.run, block, self.skip_missing)
        self.missing.update(d for qid in block for d in self.run[qid] if d not in found)
        documents = self._shortened(found, self.doc_length, self.cut)
        queries = self._shortened({q: self.texts.all_queries[q] for q in block}, self.query_length,
                                  self.cut_queries)
        keys, prompts = [], []
        for qid in block:
            before, behind = around_document(self.template, queries[qid], self.instruction,
                                             self.llm.chat)
            for docid in self.run[qid]:
                if docid in documents:
                    keys.append((qid, docid))
                    prompts.append(f"{before}{documents[docid]}{behind}")
        return keys, prompts

    def _shortened(self, texts: dict[str, str], limit: int, cut: set[str]) -> dict[str, str]:
        """{name: text up to the end of its `limit`-th token}; the names of those that lose
        something are put into cut."""
        if not texts:
            return {}
        spans = self.llm.tokenizer(list(texts.values()), add_special_tokens=False,
                                   return_offsets_mapping=True)["offset_mapping"]
        ends = {name: tokens[limit - 1][1] for name, tokens in zip(texts, spans, strict=True)
                if len(tokens) > limit}
        cut.update(ends)
        return {name: text[: ends.get(name)] for name, text in texts.items()}

    def _scores(self, keys: list[tuple[str, str]], prompts: list[str]) -> np.ndarray:
        """float32 [pairs]."""
        from kernels.encoder import default_max_tokens, micro_batches

        scores = np.zeros(len(prompts), np.float32)
        if not prompts:
            return scores
        ids = self.llm.tokenizer(prompts, add_special_tokens=self.llm.seq2seq)["input_ids"]
        lengths = [len(row) for row in ids]
        longest = int(np.argmax(lengths))
        if lengths[longest] > self.llm.context:
            raise BadInput(f"query {keys[longest][0]!r}: a prompt of {lengths[longest]} tokens, "
                           f"the model takes {self.llm.context}; lower --doc-length")
        budget = self.max_tokens or default_max_tokens(self.llm.model.device, False)
        for part in micro_batches(lengths, budget):
            yes, no = self.llm.first_logits([ids[i] for i in part], self.answers).T
            scores[part] = yes - no
        if not np.isfinite(scores).all():
            bad = list(dict.fromkeys(keys[i][0] for i in np.flatnonzero(~np.isfinite(scores))))
            raise BadInput(f"scores not finite, first of queries {bad[:5]}; try --dtype float32")
        return scores


def pointwise(args) -> None:
    """Every pair on its own, in the blocks of rerank.py."""
    command.refuse_overwrite(args.out, args.overwrite, inputs=[args.run, args.lists])
    if args.lists:
        texts, run, plan = open_lists(args.command, args.lists)
    else:
        texts, run, plan = open_candidates(
            kind=args.command, dataset=args.dataset, run=args.run, first=args.first_stage,
            depth=args.depth, skip_missing=args.skip_missing)
    rank, _ = join_processes()
    tag = run_tag(args.model)
    from kernels import cpu  # late: a wrong flag or file is said at once
    from kernels.llm import LanguageModel

    cpu.prepare(training=False)
    llm = LanguageModel(args.model, args.dtype, args.device)
    scorer = YesNo(llm, texts, run, template=args.template, words=args.answers,
                   instruction=args.instruction, query_length=args.query_length,
                   doc_length=args.doc_length, max_tokens=args.max_tokens,
                   skip_missing=args.skip_missing)
    flags = ("model", "device", "dtype", "max_tokens", "query_length", "doc_length", "instruction")
    plan |= {k: getattr(args, k) for k in flags}
    plan |= {"weights": model_stamp(args.model), "template": scorer.template,
             "answers": scorer.words}

    def scored(blocks):
        yield from scorer(blocks)
        if rank == 0:  # before OUT: until that is there the same command goes on
            write_summary(args.out, vars(args), pairs=scorer.pairs, seconds=scorer.seconds,
                          template=scorer.template, answers=scorer.words, counts=scorer.counts())

    if args.lists:
        member = member_of(args.out, 1, plan)
        whole = None if args.overwrite else scored_before(member, args.model)
        if whole is None and write_in_blocks(member, plan, run, tag, scored, args.overwrite):
            whole = member.rename(sealed(member, member))
        if rank == 0:
            write_scored(args.out, queries_of(whole), texts)
            whole.unlink()
    else:
        write_in_blocks(args.out, plan, run, tag, scored, args.overwrite)
    if rank == 0:
        done = (f"{args.out}: {scorer.pairs:,} pairs in {scorer.seconds:.1f} s by the template "
                f"{scorer.template}")
        say(closing(done, scorer.counts(), scorer.alike))


# -------------------------------------------------------------------------------------- the command


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_cross_encoder(commands)
    add_listwise(commands)
    add_pointwise(commands)
    args = parser.parse_args(argv)
    if not args.out.name:
        parser.error(f"--out {args.out}: a folder; it names the file to write")
    words = [getattr(args, "instruction", ""), *(getattr(args, "answers", None) or [])]
    if SURROGATE.search("".join(words)):
        parser.error("--instruction and --answers are to be UTF-8")
    refuse_other_sources(args, parser.error)
    return args


def refuse_other_sources(args: argparse.Namespace, error) -> None:
    """error(message) where the pairs come from nowhere or from several places."""
    lists = getattr(args, "lists", None)
    if lists and (args.dataset or args.skip_missing):
        error(f"--lists {lists} has its texts: no --dataset or --skip-missing with it")
    if lists and not carries_texts(args.out):
        error(f"--out {args.out}: what --lists gives is JSONL; name it .jsonl (or .jsonl.gz, "
              ".jsonl.zst)")
    if not (lists or args.dataset):
        error("--dataset is needed")
    ways = "--run FILE, --first-stage bm25|scoreddocs"
    ways += "".join(f", --{name} {form}" for name, form in (("triples", "TSV"), ("lists", "JSONL"))
                    if name in args)
    given = [args.run, args.first_stage, getattr(args, "triples", None), lists]
    if sum(way is not None for way in given) != 1:
        error(f"give one of {ways}")


def add_command(commands, name: str, does: str, model: str, **how) -> argparse.ArgumentParser:
    """A parser with the flags that all commands share; `model` is the help of --model, `how` what
    else argparse gets for it."""
    parser = commands.add_parser(name, help=does.partition(":")[0], description=does,
                                 conflict_handler="resolve")
    parser.add_argument("--model", required=True, help=model, **how)
    add_first_stage_flags(parser)
    parser.add_argument("--out", type=Path, required=True,
                        help="the file to write; OUT.json gets flags and counts")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace --out where it exists, and start afresh")
    return parser


def add_lists_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lists", type=Path, metavar="JSONL",
                        help='lists that carry their texts, no --dataset then: {"query": "...", '
                        '"pos": ["..."], "neg": ["..."]} a line; --out gets the same lines with '
                        "pos_scores and neg_scores")


def add_cross_encoder(commands) -> None:
    parser = add_command(
        commands, "cross-encoder",
        "logits of one cross-encoder or the mean of several: --run or --first-stage in, TREC run "
        "out; --triples in, Hofstätter's TSV out. Members may differ in tokenizer and lengths; one "
        "after the other is loaded, and a pair that occurs twice is scored once.",
        "model folders or hub ids, in modules of sentence-transformers (ettin-reranker) too",
        nargs="+")
    command.add_model_flags(parser)
    parser.add_argument("--triples", type=Path,
                        help="TSV: qid pos neg, or pos_score neg_score qid pos_pid neg_pid (its "
                        "scores are not used), or the name of a published one")
    add_lists_flag(parser)
    parser.add_argument("--keep-each", action="store_true",
                        help="write each member's scores too, as STEM.member-N.SUFFIX")
    parser.add_argument("--normalize", choices=["none", "zscore", "minmax"], default="none",
                        help="of each member's scores per query before the mean (default none, as "
                        "Hofstätter et al. 2020)")


def add_listwise(commands) -> None:
    parser = add_command(
        commands, "listwise",
        "sliding-window permutation by an instruction-following LLM: here through transformers, or "
        "by any server that speaks OpenAI's chat completions. Greedy; answers out of form are "
        "repaired as RankGPT does and counted. Score: depth - rank + 1. OUT.answers-RANK.jsonl "
        "keeps every answer.",
        "model folder or hub id; with --endpoint, the server's name of the model")
    add = parser.add_argument
    add("--depth", type=at_least(1), default=100, help="candidates ranked per query (default 100)")
    add("--window", type=at_least(2), default=20, help="passages in one prompt (default 20)")
    add("--stride", type=at_least(1), default=10, help="places between windows (default 10)")
    add("--prompt", choices=sorted(PROMPTS), default="rankzephyr",
        help="whose (default rankzephyr)")
    add("--passage-words", type=at_least(1), default=300,
        help="words kept of a passage (default 300); fewer where the window would not fit the "
        "model's context (counted)")
    add("--answer-tokens", type=at_least(1),
        help="longest answer (default: what a full permutation takes; give more to a model that "
        "reasons first)")
    add("--batch-size", type=at_least(1), default=8,
        help="queries that share a batch (default 8)")
    add("--device", type=command.device_name, default="auto", metavar="auto|cpu|cuda",
        help="default: cuda where there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="auto: bfloat16 on CUDA")
    add("--seed", type=int, default=1,
        help="sent to the server; decoding here is greedy (default 1)")
    add("--endpoint", metavar="URL",
        help="http://HOST:PORT/v1 of a server; its key, if it wants one, is read from the "
        "environment variable OPENAI_API_KEY alone")
    add("--concurrency", type=at_least(1), default=16, help="requests in flight (default 16)")
    add("--timeout", type=float, default=120,
        help="seconds until a request is tried again (default 120)")
    add("--retries", type=at_least(0), default=8,
        help="further tries, 1, 2, 4, ... s apart (default 8)")


def add_pointwise(commands) -> None:
    parser = add_command(
        commands, "pointwise",
        "logit(yes) - logit(no) of a causal or seq2seq language model for each pair: monoT5, "
        "Qwen3-Reranker, or any chat model.",
        "model folder or hub id")
    command.add_model_flags(parser)
    add_lists_flag(parser)
    add = parser.add_argument
    add("--query-length", type=at_least(1), default=64,
        help="tokens kept of a query (default 64)")
    add("--doc-length", type=at_least(1), default=384,
        help="tokens kept of a document (default 384)")
    add("--template", choices=["monot5", "qwen3", "chat"],
        help="default: monot5 for seq2seq models, qwen3 where the tokenizer has <think>, else "
        "chat: its own chat template")
    add("--answers", nargs=2, metavar=("YES", "NO"),
        help="words of one token (default true false for monot5, else yes no)")
    add("--instruction",
        default="Given a web search query, retrieve relevant passages that answer the query",
        help="the task, in the prompts qwen3 and chat (default: %(default)s)")


def main() -> int:
    args = parse()
    for name in ("run", "triples"):
        path = getattr(args, name, None)
        if path and not path.exists():
            setattr(args, name, published(str(path)))
    teach = {"cross-encoder": cross_encoder, "listwise": listwise, "pointwise": pointwise}
    with command.locked(args.out):
        teach[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main))
