"""Make a teacher's scores: ensembles of cross-encoders, LLM rankers, and the published teacher files by name.

    python teacher.py cross-encoder --model A B C --dataset D --run first.run --out teacher.run
    python teacher.py cross-encoder --model A B C --dataset D --triples triples.tsv --out scores.tsv
    python teacher.py listwise --model castorini/rank_zephyr_7b_v1_full --dataset D --run first.run --out teacher.run
    python teacher.py listwise --endpoint http://localhost:8000/v1 --model NAME --dataset D --run first.run --out t.run
    python teacher.py pointwise --model Qwen/Qwen3-Reranker-0.6B --dataset D --first-stage bm25 --out teacher.run
    torchrun --nproc_per_node 4 -- teacher.py ...       same flags, the same file

What comes out is a TREC run whose score column is the teacher's, or Hofstätter's TSV (pos_score neg_score qid pos_pid
neg_pid), and is read by `train.py --lists RUN` and `train.py --triples TSV`. A run that an LLM ranker made elsewhere
needs nothing from here: give it to --lists as it is. An interrupted command goes on where it stopped when it is given
again; an LLM is never asked twice for the same answer.

Wherever a file is asked for (--run, --triples, and --lists and --triples of train.py) the name of a published one will
do; it is fetched at first use, checked against its md5 and kept: ensemble-t1 and ensemble-t2 (Hofstätter et al. 2020),
colbert, bm25, rankzephyr-10, rankzephyr-50, rankzephyr-100, rankzephyr-bm25-100 and the parquet files hf-colbert,
hf-rankzephyr-100, hf-set-encoder, hf-monoelectra (Schlatt et al. 2025), docpairs (MS MARCO's training triples).
"""

import argparse
import contextlib
import fcntl
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; guarded() takes over
import numpy as np

from evaluate import BadInput, Parser, at_least, guarded
from rerank import (
    SURROGATE,
    PairScorer,
    Progress,
    Texts,
    add_first_stage_flags,
    add_model_flags,
    atomic_write,
    device_name,
    first_stage,
    irds_home,
    join_processes,
    locked,
    model_stamp,
    refuse_overwrite,
    run_lines,
    run_tag,
    say,
    sha256_of,
    write_in_blocks,
)

# ---------------------------------------------------------------------------------------------- published teachers

HOFSTAETTER = "https://zenodo.org/record/4068216/files"
SCHLATT = "https://zenodo.org/records/12528410/files"
HUB = "webis/rank-distillm"  # dataset on the Hugging Face hub; parquet with columns qid, docno, score
RUN, PARQUET = "msmarco-passage-train-judged.run", "msmarco-passage-train-judged.parquet"
TRIPLES = "msmarcopassage_train_scores_ids.tsv"
PUBLISHED = {  # name: (where, file, md5)
    "ensemble-t1": (HOFSTAETTER, f"bertbase_cat_{TRIPLES}", "a2575af08a19b47c2041e67c9efcd917"),
    "ensemble-t2": (HOFSTAETTER, f"bert_cat_ensemble_{TRIPLES}", "4d99696386f96a7f1631076bcc53ac3c"),
    "colbert": (SCHLATT, f"__colbert__{RUN}", "6ed152027f7270f32fcbfaaa6def951e"),
    "bm25": (SCHLATT, f"__bm25__{RUN}", "835372b2ab4d20acf10addeae526c559"),
    "rankzephyr-10": (SCHLATT, f"__rankzephyr-colbert-10000-sampled-10__{RUN}", "619bc815bd133bdca44d6331b241d39a"),
    "rankzephyr-50": (SCHLATT, f"__rankzephyr-colbert-10000-sampled-50__{RUN}", "c37b78874d4893a00566ab40aa453c56"),
    "rankzephyr-100": (SCHLATT, f"__rankzephyr-colbert-10000-sampled-100__{RUN}", "49f8dbf2c1ee7a2ca1fe517eda528af6"),
    "rankzephyr-bm25-100": (SCHLATT, f"__rankzephyr-bm25-10000-sampled-100__{RUN}", "05e3137ea3526671e1565cc90f9a2c8a"),
    "hf-colbert": (HUB, f"__colbert__{PARQUET}", "1e927d52af085516bf5a3de2865809d5"),
    "hf-rankzephyr-100": (HUB, f"__rankzephyr-colbert-10000-sampled-100__{PARQUET}",
                          "38f69a3c8a5ed21c639e882a6c2eff7c"),
    "hf-set-encoder": (HUB, f"__set-encoder-colbert-all-100__{PARQUET}", "a47206da7dc551e3ebd4e5b6866be78a"),
    "hf-monoelectra": (HUB, f"__monoelectra-colbert-all-100__{PARQUET}", "6561f33476a6c8408737f38ea85c848f"),
    "docpairs": ("ir_datasets", "docpairs.tsv", None),
}


def kept_at(name: str) -> Path:
    """Where `published` keeps the file of that name (it need not be there), under ir_datasets' home."""
    path = irds_home() / "teachers" / PUBLISHED[name][1]
    return path.with_suffix(".run") if path.suffix == ".parquet" else path


def published(name: str) -> Path:
    """The file of a published teacher (a name of PUBLISHED), fetched at first use, checked, and kept.

    ir_datasets' downloader fetches (progress, checksum, resumes a broken transfer) into its own cache; the parquet
    files come through huggingface_hub and are written there once as TREC runs; `docpairs` is `qid pos neg`.

    Raises:
        BadInput: no such name, or not to be had (with the way without a network), or a wrong checksum.
    """
    if name not in PUBLISHED:
        raise BadInput(f"{name}: neither a file nor the name of a published one ({', '.join(PUBLISHED)})")
    from ir_datasets.util import Download, RequestsDownload

    where, file, md5 = PUBLISHED[name]
    path = kept_at(name)
    url = f"https://huggingface.co/datasets/{where}/resolve/main/{file}" if where == HUB else f"{where}/{file}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks, or commands in a loop, wait and find the file
        try:
            if where == "ir_datasets":
                return path if path.exists() else _docpairs(path)
            if where == HUB:
                return path if path.exists() else _from_parquet(file, md5, path)
            return Path(Download([RequestsDownload(url)], cache_path=str(path), expected_md5=md5).path())
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as e:  # requests, huggingface_hub and ir_datasets each have their own
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            way = f"download {url} elsewhere (md5 {md5}) and give its path in place of the name"
            if where == "ir_datasets":
                way = "copy a filled ir_datasets folder here and set IR_DATASETS_HOME, or give a TSV"
            raise BadInput(f"{name}: could not be fetched ({reason}); offline, {way}") from e


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
    query = table["qid"].combine_chunks().dictionary_encode().indices.to_numpy()  # numbered as they first appear
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


# ---------------------------------------------------------------------------------------- what all teachers share


def open_candidates(args) -> tuple[Texts, dict[str, dict[str, float]], dict]:
    """(dataset, candidates of each query, what decides the scores so far) from the flags."""
    texts = Texts(args.dataset)
    source = getattr(args, "triples", None) or args.run
    plan = {"command": args.command, "corpus": texts.fingerprint(), "queries": texts.digest(),
            "skip_missing": args.skip_missing, "source": source and sha256_of(source)}
    if source is None or source == args.run:
        plan |= {"depth": args.depth, "first_stage": args.first_stage, "dataset": f"{texts.name} {texts.split}"}
        run = first_stage(texts, args.run, args.first_stage, args.depth, args.skip_missing)
    else:
        run = pairs_of(source, texts, args.skip_missing)
    if not any(texts.documents(ranked) for ranked in run.values()):
        raise BadInput(f"{source or args.first_stage}: none of its documents is in dataset {texts.name}; nothing to "
                       "score, is it the corpus that it was made on?")
    return texts, run, plan


def read_documents(texts: Texts, run: dict, qids: list[str], skip_missing: bool) -> dict[str, str]:
    """{docid: text} of the candidates of these queries; BadInput where the dataset lacks one, unless skip_missing."""
    docids = list(dict.fromkeys(d for qid in qids for d in run[qid]))
    found = texts.documents(docids)
    if len(found) < len(docids) and not skip_missing:
        docid = next(d for d in docids if d not in found)
        qid = next(q for q in qids if docid in run[q])
        raise BadInput(f"query {qid!r}: document {docid!r} is not in dataset {texts.name}; is it the corpus that the "
                       "run was made on? (--skip-missing leaves such documents out)")
    return found


def closing(done: str, counts: dict[str, int], alike: Counter) -> str:
    """The last line; `alike` are the queries of several documents by whether all of these have one score."""
    tied = {"queries, each with one score for all its documents: WARNING, this run is no teacher": alike[True]}
    counts = counts if alike[False] else counts | tied
    return "; ".join([done, *(f"{n:,} {what}" for what, n in counts.items() if n)])


def write_summary(out: Path, args, **values) -> None:
    """OUT.json: the flags and what was measured and counted."""
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    with atomic_write(Path(f"{out}.json")) as file:
        json.dump({**values, "flags": flags}, file, indent=1)


# -------------------------------------------------------------------------------------------------- cross-encoders


def triples(path: Path, queries: dict[str, str]) -> Iterator[tuple[int, str, str, str]]:
    """(line, qid, pos, neg) of a TSV of 3 columns, or of 5 whose scores are not used; gzip by its magic bytes.

    A first line whose query is none of `queries`, or whose score is no number, is a header; empty lines may come last.
    """
    number = 0
    with open(path, "rb") as file:
        unpack = gzip.open if file.read(2) == b"\x1f\x8b" else open
    try:
        with unpack(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                field = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n").split("\t")
                if not line.strip() and not any(map(bytes.strip, lines)):
                    return
                if len(field) not in (3, 5) or not all(field[-3:]):
                    raise BadInput(f"{path}:{number}: {len(field)} tab-separated columns; expected qid pos neg, or "
                                   "pos_score neg_score qid pos_pid neg_pid")
                if number > 1 or (field[0] in queries if len(field) == 3 else re.match(r"[-+.]*(\d|nan)", field[0])):
                    yield number, *field[-3:]
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise BadInput(f"{path}:{number}: not UTF-8 (iconv -t UTF-8), or damaged gzip: fetch it again ({e})") from None


def pairs_of(path: Path, texts: Texts, skip_missing: bool) -> dict[str, dict[str, float]]:
    """The distinct pairs of a file of triples in the form of a run, {qid: {docid: 0.0}}."""
    pairs: dict[str, dict[str, float]] = {}
    rows = triples(path, texts.all_queries)
    for number, qid, *docids in Progress(rows, desc=f"pairs of {path.name}", unit=" triples"):
        if number == 2 and not pairs:
            say(f"{path}:1: taken for a header and left out")
        if qid not in pairs:
            if qid not in texts.all_queries:
                raise BadInput(f"{path}:{number}: query {qid[:60]!r} is not in dataset {texts.name}; ids are expected")
            pairs[qid] = {}
        for docid in docids:
            if docid not in pairs[qid]:
                if texts.missing([docid]):
                    if skip_missing:
                        continue
                    raise BadInput(f"{path}:{number}: document {docid[:60]!r} is not in dataset {texts.name}; ids are "
                                   "expected (--skip-missing leaves such triples out)")
                pairs[qid][docid] = 0.0
    if not pairs:
        raise BadInput(f"{path}: empty; expected one triple per line")
    say(f"{path}: {sum(map(len, pairs.values())):,} distinct pairs of {len(pairs):,} queries")
    return pairs


def queries_of(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """(qid, {docid: float64 score}) of a run that write_in_blocks wrote, one query in memory at a time."""
    with open(path, encoding="utf-8") as lines:
        for qid, rows in itertools.groupby((line.split(" ") for line in lines), key=lambda field: field[0]):
            yield qid, {field[2]: float(field[4]) for field in rows}


def normalized(scores: np.ndarray, how: str) -> np.ndarray:
    """Scores of one query [documents] float64, brought to a common scale; all alike become 0.

    none: as they are (Hofstätter et al. 2020). zscore: (s - mean) / population deviation. minmax: onto [0, 1].
    """
    if how == "none":
        return scores
    low, scale = (scores.mean(), scores.std()) if how == "zscore" else (scores.min(), np.ptp(scores))
    return (scores - low) / scale if scale > 0 else np.zeros_like(scores)


def mean_of(members: list[Path], how: str, alike: Counter) -> Iterator[tuple[str, dict[str, float]]]:
    """(qid, {docid: mean over the members' runs}), in float64, each member's query normalized first; `alike` counts the
    queries of several documents by whether all of them have one score."""
    for parts in zip(*map(queries_of, members), strict=True):
        qid, docids = parts[0][0], list(parts[0][1])
        together = [normalized(np.array([scores[d] for d in docids]), how) for _, scores in parts]
        mean = np.mean(together, axis=0).tolist()
        alike[len(set(mean)) == 1] += len(mean) > 1
        yield qid, dict(zip(docids, mean, strict=True))


def write_scores(out: Path, scores: Iterator[tuple[str, dict[str, float]]], rows: Iterator | None, tag: str) -> None:
    """A TREC run; or, with `rows` of triples(), these with both scores before them (Hofstätter's TSV)."""
    if rows is None:
        with atomic_write(out) as file:
            for qid, ranked in scores:
                file.write(run_lines(qid, ranked, tag))
        return
    table, left = dict(scores), 0
    with atomic_write(out) as file:
        for _, qid, pos, neg in rows:
            ranked = table.get(qid, {})
            if pos in ranked and neg in ranked:
                file.write(f"{ranked[pos]}\t{ranked[neg]}\t{qid}\t{pos}\t{neg}\n")
            else:
                left += 1
    if left:
        say(f"{out}: {left:,} triples left out, the dataset lacks a document of theirs (--skip-missing)")


def cross_encoder(args) -> None:
    """Every pair by the first member, then every pair by the second, ...; then the mean."""
    from kernels.encoder import CrossEncoder

    kept = [args.out.with_name(f"{args.out.stem}.member-{i}{args.out.suffix}") for i in range(1, len(args.model) + 1)]
    scratch = f"{glob.escape(args.out.name)}.scores-*"
    begun = any(args.out.parent.glob(scratch))  # and may have come as far as the members' own files
    for file in [args.out, *kept] if args.keep_each and not begun else [args.out]:
        refuse_overwrite(file, args.overwrite, inputs=[args.run, args.triples])
    texts, run, plan = open_candidates(args)
    rank, _ = join_processes()
    members, summaries, start = [], [], time.perf_counter()
    for number, name in enumerate(args.model, 1):
        own = plan | {"model": model_stamp(name)} | {
            k: getattr(args, k) for k in ("device", "dtype", "max_tokens", "query_length", "doc_length")}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
        member = Path(f"{args.out}.scores-{number}-{digest}")
        sealed = [] if args.overwrite else list(args.out.parent.glob(f"{glob.escape(member.name)}-*"))
        if whole := [file for file in sealed if file.name == f"{member.name}-{sha256_of(file)[:16]}"]:
            say(f"{name}: scored before the interruption")
            members += whole
            summaries.append({"model": name})
            continue
        for file in sealed:
            say(f"{file}: damaged and left out, {name} scores anew")
        model = CrossEncoder.from_pretrained(name, args.dtype, args.device, args.query_length, args.doc_length)
        scorer = PairScorer(model, texts, run, args.max_tokens, skip_missing=args.skip_missing)
        if write_in_blocks(member, own, run, run_tag(name), scorer, args.overwrite):
            members.append(member.rename(f"{member}-{sha256_of(member)[:16]}"))
        say(f"{name}: {scorer.summary()}")
        summaries.append({"model": name, "seconds": scorer.seconds, "pairs": scorer.pairs,
                          "query_length": model.query_length, "doc_length": model.doc_length,
                          "documents_cut": len(scorer.documents.truncated), "queries_cut": scorer.truncated_queries})
        del model, scorer  # the next member gets this one's memory
    if rank:
        return

    def write(file, members, how, tag):
        rows, alike = args.triples and triples(args.triples, texts.all_queries), Counter()
        write_scores(file, mean_of(members, how, alike), rows, tag)
        return alike

    if args.keep_each:
        for file, member, name in zip(kept, members, args.model, strict=True):
            write(file, [member], "none", run_tag(name))
    write_summary(args.out, args, members=summaries, seconds=time.perf_counter() - start, queries=len(run),
                  pairs=sum(map(len, run.values())))
    tag = run_tag(args.model[0]) if len(members) == 1 else "ensemble"
    alike = write(args.out, members, args.normalize, tag)  # last: until it is there the same command goes on
    for file in args.out.parent.glob(scratch):
        file.unlink()
    done = f"{args.out}: {len(run):,} queries, mean of {len(members)} model{'s' * (len(members) > 1)}"
    say(closing(done, {}, alike))


# ------------------------------------------------------------------------------------------------- language models


def load_llm(name: str, dtype: str, device: str):
    """(model in eval mode, tokenizer) of a causal or seq2seq language model; ModelError where it is not to be had."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from kernels.encoder import ModelError, from_hub, quiet

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    with from_hub(name), quiet():
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        side = "right" if config.is_encoder_decoder else "left"  # the last token of every row in one column
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side=side)
        tokenizer.model_max_length = int(tokenizer.model_max_length)
        model, report = kind.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True)
        if lost := sorted(report["missing_keys"]):  # Hugging Face would go on with random ones
            raise ModelError(f"{name}: its files lack {len(lost)} weights ({', '.join(lost[:3])}); fetch it again")
        model.to(device).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def context_of(model, tokenizer) -> int:
    """Tokens that the model takes, prompt and answer together (T5 has relative positions: its tokenizer's limit)."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(positions or tokenizer.model_max_length, tokenizer.model_max_length)


def chat(tokenizer, name: str, messages: list[dict[str, str]]) -> str:
    """The prompt of a conversation by the tokenizer's chat template, up to where the answer begins.

    Templates that know no system role (Gemma, older Mistral) get it at the head of the first user message.
    """
    from jinja2 import TemplateError

    from kernels.encoder import from_hub

    if not tokenizer.chat_template:
        raise BadInput(f"{name}: its tokenizer has no chat template; an instruction-tuned model is needed")
    how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    with from_hub(name):
        try:
            return tokenizer.apply_chat_template(messages, **how)
        except TemplateError:
            system, user, *more = messages
            first = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
            return tokenizer.apply_chat_template([first, *more], **how)


# ------------------------------------------------------------------------------------------- listwise: the algorithm


def windows(n: int, window: int, stride: int) -> list[tuple[int, int]]:
    """[start, end) of Sun et al. 2023's sliding windows over a list of n, bottom up; the last one starts at 0.

    Each is put in order before the next is looked at, so its best climb on: with a perfect judge the top
    window - stride of the list come out exact.
    """
    spans = []
    for end in range(n, 1, -stride):
        spans.append((max(end - window, 0), end))
        if end <= window:
            break
    return spans


def parse_permutation(text: str, n: int) -> tuple[list[int], list[str]]:
    """(order of 0..n-1, what was wrong with the answer) of `[3] > [1] > ...`, repaired as RankGPT repairs it.

    Every run of digits is an identifier; the first occurrence counts; those out of 1..n are dropped; those missing
    follow in their old order. What a reasoning model thought (up to </think>) is not part of its answer.
    """
    text = text.rpartition("</think>")[2]
    found = [int(digits) if len(digits) < 10 else 0 for digits in re.findall(r"[0-9]+", text)]
    order = list(dict.fromkeys(i - 1 for i in found if 1 <= i <= n))
    wrong = []
    if not re.fullmatch(r"\s*\[[0-9]+\](\s*>\s*\[[0-9]+\])*\s*", text):
        wrong.append("malformed")
    if len(set(found)) < len(found):
        wrong.append("repeated")
    if any(not 1 <= i <= n for i in found):
        wrong.append("out of range")
    if len(order) < n:
        wrong.append("missing")
    seen = set(order)
    return order + [i for i in range(n) if i not in seen], wrong


def rankzephyr(query: str, passages: list[str]) -> list[dict[str, str]]:
    """RankZephyr's conversation (Pradeep et al. 2023; rank_llm's rank_zephyr template): one turn. Its passages and
    query hold no identifiers of their own: [7] becomes (7)."""
    query, *passages = (re.sub(r"\[([0-9]+)\]", r"(\1)", text) for text in (query, *passages))
    n, lines = len(passages), "".join(f"[{i}] {passage}\n" for i, passage in enumerate(passages, 1))
    return [
        {"role": "system", "content": "You are RankLLM, an intelligent assistant that can rank passages based on their "
                                      "relevancy to the query"},
        {"role": "user", "content":
            f"I will provide you with {n} passages, each indicated by a numerical identifier []. Rank the passages "
            f"based on their relevance to the search query: {query}.\n{lines}Search Query: {query}.\nRank the {n} "
            "passages above based on their relevance to the search query. All the passages should be included and "
            "listed using identifiers, in descending order of relevance. The output format should be [] > [], e.g., "
            "[2] > [1], Answer concisely and directly and only respond with the ranking results, do not say any word "
            "or explain."}]


def rankgpt(query: str, passages: list[str]) -> list[dict[str, str]]:
    """RankGPT's conversation (Sun et al. 2023): each passage a turn of its own, which the assistant acknowledges."""
    n = len(passages)
    turns = [("system", "You are RankGPT, an intelligent assistant that can rank passages based on their relevancy to "
                        "the query."),
             ("user", f"I will provide you with {n} passages, each indicated by number identifier []. \nRank the "
                      f"passages based on their relevance to query: {query}."),
             ("assistant", "Okay, please provide the passages.")]
    for i, passage in enumerate(passages, 1):
        turns += [("user", f"[{i}] {passage}"), ("assistant", f"Received passage [{i}].")]
    turns.append(("user", f"Search Query: {query}. \nRank the {n} passages above based on their relevance to the "
                          "search query. The passages should be listed in descending order using identifiers. The most "
                          "relevant passages should be listed first. The output format should be [] > [], e.g., [1] > "
                          "[2]. Only response the ranking results, do not say any word or explain."))
    return [{"role": role, "content": content} for role, content in turns]


PROMPTS = {"rankzephyr": rankzephyr, "rankgpt": rankgpt}


def conversation(prompt: str, query: str, passages: list[str], words: int) -> list[dict[str, str]]:
    """The messages that ask for the order of `passages`, each cut to its first `words` words."""
    return PROMPTS[prompt](query, [" ".join(passage.split()[:words]) for passage in passages])


# -------------------------------------------------------------------------------------------- listwise: who is asked


class LocalModel:
    """Answers by transformers, greedy: the windows that wait, of different queries, in one batch.

    Passages are shortened together, as RankGPT does, until prompt and answer fit the context.
    """

    def __init__(self, args):
        self.args, self.capacity, self.waiting = args, args.batch_size, []
        self.model, self.tokenizer = load_llm(args.model, args.dtype, args.device)
        if self.model.config.is_encoder_decoder:
            raise BadInput(f"{args.model}: a seq2seq model; listwise needs a causal one (pointwise takes both)")
        ideal = " > ".join(f"[{i + 1}]" for i in range(min(args.window, args.depth)))
        self.new_tokens = args.answer_tokens or len(self.tokenizer.encode(ideal, add_special_tokens=False)) + 8
        self.context = context_of(self.model, self.tokenizer)

    def start(self, qid: str, query: str, passages: list[str]) -> None:
        """Puts a window into the next batch."""
        words, shortened = self.args.passage_words, False
        while True:
            text = chat(self.tokenizer, self.args.model, conversation(self.args.prompt, query, passages, words))
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            beyond = len(ids) + self.new_tokens - self.context
            if beyond <= 0:
                break
            if words <= 1:
                raise BadInput(f"query {qid!r}: {len(passages)} passages of one word and the answer are {beyond} "
                               f"tokens more than the context of {self.context}; lower --window")
            words, shortened = max(1, words - max(1, beyond // (len(passages) * 4))), True
        self.waiting.append((qid, ids, shortened))

    def finished(self) -> list[tuple[str, dict]]:
        """(qid, answer) of every window that waits."""
        import torch
        from transformers import GenerationConfig

        from kernels.encoder import from_hub

        batch = self.tokenizer.pad({"input_ids": [ids for _, ids, _ in self.waiting]}, return_tensors="pt")
        stop = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        how = GenerationConfig(do_sample=False, max_new_tokens=self.new_tokens, eos_token_id=stop,
                               pad_token_id=self.tokenizer.pad_token_id)
        with from_hub(self.args.model, "run: "), torch.inference_mode():
            out = self.model.generate(**batch.to(self.model.device), generation_config=how)
        out = out[:, batch["input_ids"].shape[1]:].tolist()
        stops, results = set(stop if isinstance(stop, list) else [stop]), []
        for (qid, ids, shortened), answer in zip(self.waiting, out, strict=True):
            end = next((i for i, token in enumerate(answer) if token in stops), None)
            text = self.tokenizer.decode(answer[:end], skip_special_tokens=True)
            results.append((qid, {"text": text, "cut": end is None, "shortened": shortened, "prompt_tokens": len(ids),
                                  "answer_tokens": len(answer) if end is None else end + 1}))
        self.waiting = []
        return results

    def stop(self) -> list[tuple[str, dict]]:
        """Answers that were under way when the work was broken off."""
        return []


class AsItCame(urllib.request.HTTPErrorProcessor):
    """Every status is a reply, a redirect too: urllib would carry the key along to wherever it is sent."""

    http_response = https_response = lambda self, request, response: response


BUSY = (0, 408, 409, 425, 429)  # to be tried again, as 5xx is; 0: no connection, a time-out, not a chat completion
TOO_LONG = re.compile(r"context.?(length|size|window|limit)|maximum context|too (long|many tokens)|reduce the length|"
                      r"(input|prompt).{,80}(exceed|larger|longer)", re.I)  # of a prompt, in a server's words
FORM = {"max_tokens": "max_completion_tokens", "temperature": "", "seed": ""}  # what takes the place of what is refused


class Endpoint:
    """Answers by a server that speaks OpenAI's chat-completions protocol (vLLM, llama.cpp, ...), many at a time.

    Time-outs, broken connections and the statuses 408, 409, 425, 429 and 5xx are tried again after 1, 2, 4, ... seconds
    (or what Retry-After asks), by one thread at a time until the server answers. A parameter that it refuses is not
    sent again, a prompt beyond its context is asked with shorter passages. The key comes from OPENAI_API_KEY and goes
    into the request's header alone.
    """

    first_pause = 1.0

    def __init__(self, args):
        self.args, self.capacity, self.key = args, args.concurrency, os.environ.get("OPENAI_API_KEY", "").strip()
        self.url = args.endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        if not self.url.startswith(("http://", "https://")):
            raise BadInput(f"--endpoint {args.endpoint}: expected http://HOST:PORT/v1 or https://...")
        self.pool, self.running, self.stopping = ThreadPoolExecutor(args.concurrency), {}, threading.Event()
        self.opener, self.form = urllib.request.build_opener(AsItCame), {name: name for name in FORM}
        self.turn, self.noting = threading.Lock(), threading.Lock()
        self.failures, self.pause, self.why = 0, 0.0, ""  # in a row over all threads, then to the next try; the last

    def start(self, qid: str, query: str, passages: list[str]) -> None:
        """Sends a window in a thread."""
        self.running[self.pool.submit(self._ask, qid, query, passages)] = qid

    def _ask(self, qid: str, query: str, passages: list[str]) -> dict:
        longest = min(self.args.passage_words, max(len(passage.split()) for passage in passages))
        sent = {"max_tokens": self.args.answer_tokens or 8 * len(passages), "temperature": 0, "seed": self.args.seed}
        words, tried, pause = longest, 0, 0.0
        while True:
            with self.turn if self.failures else contextlib.nullcontext() as alone:
                before = self.failures
                if alone and not before:
                    continue  # it answers again: all may ask
                tries, pause = max(tried, before), max(pause, self.pause)
                if tries > self.args.retries or (self.stopping.wait(pause) if pause else self.stopping.is_set()):
                    raise BadInput(f"{self.url}: no answer in {tries} tries (the last: {self.why}); what was answered "
                                   "is kept, the same command goes on")
                body = {"model": self.args.model, "messages": conversation(self.args.prompt, query, passages, words)}
                body |= {self.form[name]: value for name, value in sent.items() if self.form[name]}
                status, said, asked = self._post(body)
                if status in BUSY or status >= 500:
                    pause = min(self.first_pause * 2 ** min(tries, 6), 60.0)
                    pause, tried = min(float(asked), 600.0) if asked.isdecimal() else pause, tried + 1
                    with self.noting:
                        if self.failures == before:  # tries that were under way together fail once
                            self.failures, self.pause = before + 1, pause
                            if before < self.args.retries and (before or not self.why):
                                say(f"{self.url}: {said[:300]}; tried again in {pause:g} s")
                        self.why = said[:300]
                    continue
                self.failures = self.pause = pause = 0  # it answers
            if status == 200:
                return said | {"shortened": words < longest}
            refused = [name for name in sent if name in body and re.search(rf"\b({name}|{FORM[name] or name})\b", said)]
            if status == 413 or (status in (400, 422) and TOO_LONG.search(said)):
                if words <= 1:
                    raise BadInput(f"query {qid!r}: {len(passages)} passages of one word are too long for {self.url} "
                                   f"({said[:300]}); lower --window")
                words = words * 3 // 4
            elif status in (400, 422) and refused:
                with self.noting:
                    for name in [name for name in refused if self.form[name] == name]:
                        self.form[name] = FORM[name]
                        say(f"{self.url}: refuses {name} ({said[:100]}); {FORM[name] or 'nothing'} goes in its place")
            else:
                raise BadInput(f"{self.url}: {said[:300]}")

    def _post(self, body: dict) -> tuple[int, dict | str, str]:
        """(status, the answer or what was said instead, Retry-After); status 0: no reply, or not a chat completion."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            with self.opener.open(request, timeout=self.args.timeout) as reply:
                status, asked, content = reply.status, reply.headers.get("Retry-After", ""), reply.read()
            if status == 200:
                data = json.loads(content)
                choice, tokens = data["choices"][0], data.get("usage") or {}
                text = choice["message"].get("content") or ""  # null where the model refuses; in parts by some servers
                return status, {
                    "text": text if isinstance(text, str) else "".join(part.get("text") or "" for part in text),
                    "cut": choice.get("finish_reason") == "length",
                    "prompt_tokens": int(tokens.get("prompt_tokens") or 0),
                    "answer_tokens": int(tokens.get("completion_tokens") or 0)}, asked
            said = f"HTTP {status}: {content.decode(errors='replace')}"
        except Exception as e:
            status, asked, said = 0, "", f"no chat completion ({type(e).__name__}: {e})"
        said = " ".join(said.split())
        return status, said.replace(self.key, "***") if self.key else said, asked

    def finished(self) -> list[tuple[str, dict]]:
        """(qid, answer) of every window answered since; waits for one. Raises BadInput where one cannot be had."""
        done, _ = wait(self.running, return_when=FIRST_COMPLETED)
        good = [future for future in done if not future.exception()]
        if not good:
            raise next(iter(done)).exception()
        return [(self.running.pop(future), future.result()) for future in good]

    def stop(self) -> list[tuple[str, dict]]:
        """Gives up what is to be tried again, waits for the answers under way and returns them."""
        self.stopping.set()
        wait(self.running)
        return [(qid, future.result()) for future, qid in self.running.items() if not future.exception()]


# ------------------------------------------------------------------------------------------ listwise: what is kept


class Answers:
    """Every answer as it came, one JSON line each behind a line with the plan: an LLM is asked once, whatever happens.

    `of[qid]` are the answers for the windows of a query, bottom up. A line names its window and carries its checksum:
    one that is damaged, or stands behind a gap, is left out, and what it answered is asked again.
    """

    def __init__(self, path: Path, plan: dict, overwrite: bool):
        self.of, kept = {}, [json.dumps(plan, sort_keys=True)]
        if path.exists() and not overwrite:
            header, *lines = path.read_bytes().decode("ascii", "replace").split("\n")
            if header != kept[0]:
                raise BadInput(f"{path}:1: damaged, or begun by a command with other flags or data; finish that one, "
                               "or give --overwrite (every answer is asked again) or another --out")
            for line in filter(None, lines):
                whole = line == self._sealed(line.rpartition(', "check":')[0])
                row = json.loads(line) if whole else {}
                if whole and row["window"] == len(self.of.setdefault(row["qid"], [])):
                    self.of[row["qid"]].append(row)
                    kept.append(line)
            lost = len(lines) - lines.count("") - len(kept) + 1
            say(f"{path}: going on after {len(kept) - 1:,} answers; {lost:,} damaged lines left out")
        with atomic_write(path) as file:
            file.write("\n".join([*kept, ""]))
        self.file = open(path, "a", encoding="ascii")  # noqa: SIM115

    def _sealed(self, text: str) -> str:
        return f'{text}, "check": {zlib.crc32(text.encode())}}}'

    def add(self, qid: str, answer: dict) -> None:
        row = {"qid": qid, "window": len(self.of.setdefault(qid, [])), **answer}
        self.file.write(self._sealed(json.dumps(row)[:-1]) + "\n")
        self.file.flush()
        self.of[qid].append(row)


def listwise(args) -> None:
    """Many queries are open at once, each with one window that waits for its answer; whole queries are appended to
    OUT.partial-RANK, a valid run at any moment."""
    refuse_overwrite(args.out, args.overwrite, inputs=[args.run])
    if args.stride > args.window:
        raise BadInput(f"--window {args.window} --stride {args.stride}: stride <= window is needed")
    texts, run, plan = open_candidates(args)
    rank, world = join_processes()
    mine, tag, start = list(run)[rank::world], run_tag(args.model), time.perf_counter()
    flags = ("model", "window", "stride", "prompt", "passage_words", "answer_tokens", "dtype", "seed")
    plan |= {k: getattr(args, k) for k in flags}
    plan |= {"weights": model_stamp(args.model), "server": args.endpoint is not None, "world": world}
    engine = Endpoint(args) if args.endpoint else LocalModel(args)  # first: a wrong name leaves no file behind
    answers = Answers(Path(f"{args.out}.answers-{rank}.jsonl"), plan, args.overwrite)
    counts, work, queue = Counter(), {}, iter(mine)
    done = sum(len(answers.of.get(q, [])) == len(windows(len(run[q]), args.window, args.stride)) for q in mine)

    def permute(qid):
        """Yields (query, passages) of each window not answered before, is sent its answer; writes the query last."""
        found = read_documents(texts, run, [qid], args.skip_missing)
        order = [d for d in run[qid] if d in found]
        counts["documents missing"] += len(run[qid]) - len(order)
        first, known, fresh = list(order), iter(list(answers.of.get(qid, []))), False
        for low, high in windows(len(order), args.window, args.stride):
            answer = next(known, None)
            if answer is None:
                fresh = True
                answer = yield texts.all_queries[qid], [found[d] for d in order[low:high]]
            permutation, wrong = parse_permutation(answer["text"], high - low)
            order[low:high] = [order[low + i] for i in permutation]
            counts.update(["answers", *(wrong or ["in order"]), *["cut off"] * (answer["cut"] and "missing" in wrong)])
            counts["passages shortened"] += answer.get("shortened", False)
            counts["prompt tokens"] += answer["prompt_tokens"]
            counts["answer tokens"] += answer["answer_tokens"]
        counts["queries kept in order" if order == first else "queries reordered"] += len(order) > 1
        part.write(run_lines(qid, {d: args.depth - i for i, d in enumerate(order)}, tag))
        part.flush()
        bar.set_postfix_str(f"{counts['prompt tokens']:,} tokens in, {counts['answer tokens']:,} out", refresh=False)
        bar.update(fresh)

    def step(qid, answer=None):
        try:
            request = work[qid].send(answer)  # None opens the query
        except StopIteration:
            del work[qid]
        else:
            engine.start(qid, *request)

    with (
        open(f"{args.out}.partial-{rank}", "w", encoding="utf-8") as part,
        answers.file,
        Progress(total=len(mine), initial=done, desc=tag, unit=" queries") as bar,
    ):
        try:
            while True:
                while len(work) < engine.capacity and (qid := next(queue, None)) is not None:
                    work[qid] = permute(qid)
                    step(qid)
                if not work:
                    break
                arrived = engine.finished()
                for qid, answer in arrived:
                    answers.add(qid, answer)
                for qid, answer in arrived:
                    step(qid, answer)
        except BaseException:
            for qid, answer in engine.stop():
                answers.add(qid, answer)
            raise
    every = [counts]
    if world > 1:
        import torch.distributed as dist

        every = [None] * world
        dist.all_gather_object(every, counts)  # also: every part is whole
    if rank == 0:
        counts = sum(every, Counter())
        parts = [Path(f"{args.out}.partial-{r}") for r in range(world)]
        ranked = {qid: scores for path in parts for qid, scores in queries_of(path)}
        if not counts.pop("queries reordered", 0) or counts["malformed"] == counts["answers"]:
            counts["answers, all malformed or no query reordered: WARNING, this run is no teacher"] = counts["answers"]
        write_summary(args.out, args, counts=counts, queries=len(run), seconds=time.perf_counter() - start)
        with atomic_write(args.out) as file:  # last: until it is there the same command goes on
            for qid in run:
                file.write(run_lines(qid, {d: int(s) for d, s in ranked.get(qid, {}).items()}, tag))
        for path in parts:
            path.unlink()
        say(closing(f"{args.out}: {len(run):,} queries", counts, Counter()))


# ------------------------------------------------------------------------------------------------------- pointwise

JUDGE = ("Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that "
         'the answer can only be "yes" or "no".')
MARK = "\x00"  # stands for the document while a template is cut in two


class YesNo:
    """logit(yes) - logit(no) of a language model for the pairs of blocks of a run, as rerank.PairScorer is called.

    Templates: `monot5` (Nogueira et al. 2020; true and false), `qwen3` (Qwen3-Reranker, ChatML as on its model card)
    and `chat` (the same words through the tokenizer's own chat template). Queries and documents are cut to their own
    lengths, so the end of the prompt is always there.
    """

    def __init__(self, args, texts: Texts, run: dict):
        self.args, self.texts, self.run = args, texts, run
        self.model, self.tokenizer = load_llm(args.model, args.dtype, args.device)
        self.seq2seq = self.model.config.is_encoder_decoder
        known = self.tokenizer.get_vocab()
        self.template = args.template or ("monot5" if self.seq2seq else "qwen3" if "<think>" in known else "chat")
        self.words = args.answers or (["true", "false"] if self.template == "monot5" else ["yes", "no"])
        self.answers = [self._token(word) for word in self.words]
        self.context = context_of(self.model, self.tokenizer)
        self.pairs, self.cut, self.cut_queries, self.missing, self.seconds = 0, set(), set(), set(), 0.0

    def _token(self, word: str) -> int:
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise BadInput(f"{self.args.model}: {word!r} is {len(ids)} tokens; --answers takes words of one token")
        return ids[0]

    def prompt(self, query: str) -> tuple[str, str]:
        """What stands before and behind the document."""
        if self.template == "monot5":
            return f"Query: {query} Document: ", " Relevant:"
        body = f"<Instruct>: {self.args.instruction}\n<Query>: {query}\n<Document>: "
        if self.template == "qwen3":
            return (f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n{body}",
                    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        text = chat(self.tokenizer, self.args.model,
                    [{"role": "system", "content": JUDGE}, {"role": "user", "content": body + MARK}])
        before, _, behind = text.rpartition(MARK)
        return before, behind

    def _shorten(self, names: list[str], texts: list[str], limit: int, cut: set) -> list[str]:
        """Each text up to the end of its `limit`-th token; the names of those that lose something are put into cut."""
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut.update(name for name, spans in zip(names, found, strict=True) if len(spans) > limit)
        return [t if len(spans) <= limit else t[: spans[limit - 1][1]] for t, spans in zip(texts, found, strict=True)]

    def logits(self, ids: list[list[int]]):
        """fp32 [pairs] of the model's first answer token, yes minus no; rows of unequal length are padded."""
        import torch

        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            if self.seq2seq:
                first = torch.full((len(ids), 1), self.model.config.decoder_start_token_id, device=self.model.device)
                out = self.model(**batch, decoder_input_ids=first).logits[:, -1]
            else:
                positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
                out = self.model(**batch, position_ids=positions, logits_to_keep=1, use_cache=False).logits[:, -1]
        yes, no = (out[:, token].float() for token in self.answers)
        return (yes - no).cpu().numpy()

    def __call__(self, blocks: list[list[str]]) -> Iterator[dict[str, dict[str, float]]]:
        """Yields {qid: {docid: fp32 score}} per block. BadInput on a missing document or a score that is not finite."""
        from kernels.encoder import default_max_tokens, from_hub, micro_batches

        start, budget = time.perf_counter(), self.args.max_tokens or default_max_tokens(self.model.device, False)
        for block in blocks:
            found = read_documents(self.texts, self.run, block, self.args.skip_missing)
            self.missing.update(d for qid in block for d in self.run[qid] if d not in found)
            found = dict(zip(found, self._shorten(list(found), list(found.values()), self.args.doc_length, self.cut),
                             strict=True))
            queries = self._shorten(block, [self.texts.all_queries[q] for q in block], self.args.query_length,
                                    self.cut_queries)
            keys, prompts = [], []
            for qid, query in zip(block, queries, strict=True):
                before, behind = self.prompt(query)
                for docid in self.run[qid]:
                    if docid in found:
                        keys.append((qid, docid))
                        prompts.append(f"{before}{found[docid]}{behind}")
            ids = self.tokenizer(prompts, add_special_tokens=self.seq2seq)["input_ids"] if prompts else []
            lengths = [len(row) for row in ids]
            if ids and max(lengths) > self.context:
                raise BadInput(f"query {keys[int(np.argmax(lengths))][0]!r}: a prompt of {max(lengths)} tokens, the "
                               f"model takes {self.context}; lower --doc-length")
            scores = np.zeros(len(ids), np.float32)
            with from_hub(self.args.model, "run: "):  # a pad token, say, that the model does not have
                for part in micro_batches(lengths, budget):
                    scores[part] = self.logits([ids[i] for i in part])
            if not np.isfinite(scores).all():
                bad = list(dict.fromkeys(keys[i][0] for i in np.flatnonzero(~np.isfinite(scores))))
                raise BadInput(f"scores not finite, first of queries {bad[:5]}; try --dtype float32")
            result: dict[str, dict[str, float]] = {qid: {} for qid in block}
            for (qid, docid), score in zip(keys, scores, strict=True):
                result[qid][docid] = score
            self.pairs, self.seconds = self.pairs + len(keys), time.perf_counter() - start
            yield result


def pointwise(args) -> None:
    """Every pair on its own, in the blocks of rerank.py."""
    refuse_overwrite(args.out, args.overwrite, inputs=[args.run])
    texts, run, plan = open_candidates(args)
    rank, _ = join_processes()
    scorer, alike, counts = YesNo(args, texts, run), Counter(), {}
    flags = ("model", "device", "dtype", "max_tokens", "query_length", "doc_length", "instruction")
    plan |= {k: getattr(args, k) for k in flags}
    plan |= {"weights": model_stamp(args.model), "template": scorer.template, "answers": scorer.words}

    def scored(blocks):
        for result in scorer(blocks):
            alike.update(len(set(ranked.values())) == 1 for ranked in result.values() if len(ranked) > 1)
            yield result
        counts.update({"documents cut": len(scorer.cut), "queries cut": len(scorer.cut_queries),
                       "documents missing": len(scorer.missing)})
        if rank == 0:  # before OUT: until that is there the same command goes on
            write_summary(args.out, args, pairs=scorer.pairs, seconds=scorer.seconds, template=scorer.template,
                          answers=scorer.words, counts=counts)

    if write_in_blocks(args.out, plan, run, run_tag(args.model), scored, args.overwrite):
        done = f"{args.out}: {scorer.pairs:,} pairs in {scorer.seconds:.1f} s by the template {scorer.template}"
        say(closing(done, counts, alike))


# ----------------------------------------------------------------------------------------------------- the command


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, does, model, **how):
        sub = commands.add_parser(name, help=does.partition(":")[0], description=does, conflict_handler="resolve")
        sub.add_argument("--model", required=True, help=model, **how)
        add_first_stage_flags(sub)
        sub.add_argument("--out", type=Path, required=True, help="the file to write; OUT.json gets flags and counts")
        sub.add_argument("--overwrite", action="store_true", help="replace --out where it exists, and start afresh")
        return sub

    sub = command("cross-encoder", "logits of one cross-encoder or the mean of several: --run or --first-stage in, "
                  "TREC run out; --triples in, Hofstätter's TSV out. Members may differ in tokenizer and lengths; one "
                  "after the other is loaded, and a pair that occurs twice is scored once.",
                  "model folders or hub ids", nargs="+")
    add_model_flags(sub)
    sub.add_argument("--triples", type=Path, help="TSV: qid pos neg, or pos_score neg_score qid pos_pid neg_pid (its "
                     "scores are not used), or the name of a published one")
    sub.add_argument("--keep-each", action="store_true", help="write each member's scores too, as STEM.member-N.SUFFIX")
    sub.add_argument("--normalize", choices=["none", "zscore", "minmax"], default="none",
                     help="of each member's scores per query before the mean (default none, as Hofstätter et al. 2020)")

    sub = command("listwise", "sliding-window permutation by an instruction-following LLM: here through transformers, "
                  "or by any server that speaks OpenAI's chat completions. Greedy; answers out of form are repaired as "
                  "RankGPT does and counted. Score: depth - rank + 1. OUT.answers-RANK.jsonl keeps every answer.",
                  "model folder or hub id; with --endpoint, the server's name of the model")
    sub.add_argument("--depth", type=at_least(1), default=100, help="candidates ranked per query (default 100)")
    sub.add_argument("--window", type=at_least(2), default=20, help="passages in one prompt (default 20)")
    sub.add_argument("--stride", type=at_least(1), default=10, help="places between windows (default 10)")
    sub.add_argument("--prompt", choices=sorted(PROMPTS), default="rankzephyr", help="whose (default rankzephyr)")
    sub.add_argument("--passage-words", type=at_least(1), default=300, help="words kept of a passage (default 300); "
                     "fewer where the window would not fit the model's context (counted)")
    sub.add_argument("--answer-tokens", type=at_least(1), help="longest answer (default: what a full permutation "
                     "takes; give more to a model that reasons first)")
    sub.add_argument("--batch-size", type=at_least(1), default=8, help="queries that share a batch (default 8)")
    sub.add_argument("--device", type=device_name, default="auto", metavar="auto|cpu|cuda",
                     help="default: cuda where there is one")
    sub.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on CUDA")
    sub.add_argument("--seed", type=int, default=1, help="sent to the server; decoding here is greedy (default 1)")
    sub.add_argument("--endpoint", metavar="URL", help="http://HOST:PORT/v1 of a server; its key, if it wants one, is "
                     "read from the environment variable OPENAI_API_KEY alone")
    sub.add_argument("--concurrency", type=at_least(1), default=16, help="requests in flight (default 16)")
    sub.add_argument("--timeout", type=float, default=120, help="seconds until a request is tried again (default 120)")
    sub.add_argument("--retries", type=at_least(0), default=8, help="further tries, 1, 2, 4, ... s apart (default 8)")

    sub = command("pointwise", "logit(yes) - logit(no) of a causal or seq2seq language model for each pair: monoT5, "
                  "Qwen3-Reranker, or any chat model.", "model folder or hub id")
    add_model_flags(sub)
    sub.add_argument("--query-length", type=at_least(1), default=64, help="tokens kept of a query (default 64)")
    sub.add_argument("--doc-length", type=at_least(1), default=384, help="tokens kept of a document (default 384)")
    sub.add_argument("--template", choices=["monot5", "qwen3", "chat"], help="default: monot5 for seq2seq models, "
                     "qwen3 where the tokenizer has <think>, else chat: its own chat template")
    sub.add_argument("--answers", nargs=2, metavar=("YES", "NO"),
                     help="words of one token (default true false for monot5, else yes no)")
    sub.add_argument("--instruction", help="the task, in the prompts qwen3 and chat (default: %(default)s)",
                     default="Given a web search query, retrieve relevant passages that answer the query")
    args = parser.parse_args(argv)
    if not args.out.name:
        parser.error(f"--out {args.out}: a folder; it names the file to write")
    words = [getattr(args, "instruction", ""), *(getattr(args, "answers", None) or [])]
    if SURROGATE.search("".join(words)):
        parser.error("--instruction and --answers are to be UTF-8")
    if not args.dataset:
        parser.error("--dataset is needed")
    sources = [args.run, args.first_stage, getattr(args, "triples", None)]
    if sum(s is not None for s in sources) != 1:
        parser.error("give one of --run FILE, --first-stage bm25|scoreddocs" + ", --triples TSV" * (len(sources) == 3))
    return args


def main() -> int:
    args = parse()
    for name in ("run", "triples"):
        path = getattr(args, name, None)
        if path and not path.exists():
            setattr(args, name, published(str(path)))
    with locked(args.out):
        {"cross-encoder": cross_encoder, "listwise": listwise, "pointwise": pointwise}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
