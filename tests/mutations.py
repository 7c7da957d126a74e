"""Valid inputs of every format, mutated by seed, through all four scripts: what may not happen.

    python tests/mutations.py --cases 2000 --seed 7    every bad case by kind, with its command
    python tests/mutations.py --seed 7 --case 123      that one case again, with all that it wrote

A case is a pure function of (seed, number): the number chooses one of COMMANDS, Random(f"{seed}
{number}") what becomes of its inputs. The first len(COMMANDS) cases change nothing and have to
succeed. All others end with 0 and an output that our own readers accept, or with 2, one line
`error: ...` behind the progress, and nothing half-written.

One process imports everything once and forks a child per case: torch alone takes seconds to import.
It never computes itself, for OpenMP's threads do not live through a fork. Folders of bad cases are
kept under --folder.
"""

import argparse
import gc
import gzip
import io
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # of a case, before it counts as one that never ends
LIMITS = {resource.RLIMIT_AS: 8 << 30, resource.RLIMIT_CPU: SECONDS,
          resource.RLIMIT_FSIZE: 1 << 30, resource.RLIMIT_CORE: 0}  # fmt: skip
OUTPUTS = ("out.jsonl", "out.run", "out.tsv", "out.png", "values.tsv")
UNFIT = 99  # exit code of a child whose script succeeded with an output that is not as it has to be


# ------------------------------------------------------------------------------------- the commands


class Command(NamedTuple):
    """words: the command line, {NAME} for what `build` makes.

    stops: (module, dotted name, calls): the command is also run beforehand and interrupted behind
    so many calls of that function; what it leaves behind is an input too.
    """

    words: str
    stops: tuple | None = None


RERANK = "rerank.py --device cpu --dtype float32 --out out.run --model {model} --dataset {corpus} "
ENSEMBLE = ("teacher.py cross-encoder --device cpu --dtype float32 --dataset {corpus} "
            "--model {model} {other} ")  # fmt: skip
LISTWISE = ("teacher.py listwise --dataset {corpus} --run {first.run} --window 6 --stride 3 "
            "--out out.run --depth 12 ")  # fmt: skip
SERVER = LISTWISE + "--model judge --endpoint {endpoint} --retries 1 --timeout 5 "
POINTWISE = ("teacher.py pointwise --device cpu --model {llm} --dataset {corpus} --depth 5 "
             "--out out.run ")  # fmt: skip
TRAIN = "train.py --device cpu --out out --dataset {corpus} --steps 3 --batch-size 4 --lr 1e-3 "
TOY, LISTS = TRAIN + "--backbone {model} ", "--lists {teacher.run} --list-size 4 "
TEXTS = "--device cpu --lists {lists.jsonl} "
JUDGE = "evaluate.py --qrels {qrels.txt} {runs/bm25.run} {runs/bert-kl.run} "
COMMANDS = [Command(*line) if isinstance(line, tuple) else Command(line) for line in [
    RERANK + "--run {first.run} --depth 10",
    RERANK + "--run {first.run.gz} --long-docs max --doc-length 8 --stride 4",
    RERANK + "--run {first.run.zst} --skip-missing",
    RERANK + "--first-stage bm25 --depth 10",
    (RERANK + "--run {first.run} --seed 2", ("rerank", "PairScorer._result", 3)),
    *[RERANK.replace("{model}", f"{{{family}}}") + "--run {first.run} --depth 5"
      for family in ("electra", "modernbert", "deberta", "modular")],
    RERANK + "--run {first.run} --depth 10 --sigmoid",
    "rerank.py --device cpu --dtype float32 --out outs --model {model} {other} --dataset {corpus} "
    "{corpus}/train --run {first.run} {teacher.run} --depth 5",
    "rerank.py --dataset {corpus} --first-stage bm25 --out out.run",
    "rerank.py --device cpu --model {model} --query kaba {passages.txt}",
    "rerank.py --device cpu --model {model} --query kaba {passages.txt} --top 3 --json",
    JUDGE,
    JUDGE + "--format latex --intervals --measures nDCG@10 P@5 AP(rel=2) --test randomization",
    JUDGE + "--format csv --per-query values.tsv --baseline {runs/bm25.run}",
    JUDGE + "--plot out.png --plot-kind latency --format json",
    JUDGE + "--plot out.png --plot-kind difference",
    JUDGE + "--plot out.png --plot-kind heatmap",
    "evaluate.py --dataset {corpus}/train {first.run} {first.run.gz} --plot out.png "
    "--measures RR@10 Judged@10 bpref",
    "evaluate.py --dataset {corpus}/train --diff {first.run} {teacher.run} --top 3",
    "evaluate.py --suite nanobeir --runs {suite} --qrels {judged} --per-dataset",
    "evaluate.py --suite {datasets.txt} --runs {suite} --qrels {judged} --baseline bert-kl",
    ENSEMBLE + "--run {first.run} --out out.run --normalize zscore --keep-each",
    ENSEMBLE + "--triples {triples.tsv} --out out.tsv --keep-each",
    ENSEMBLE + "--triples {scored.tsv} --out out.tsv --normalize minmax",
    (ENSEMBLE + "--run {first.run} --out out.run", ("rerank", "PairScorer._result", 6)),
    SERVER,
    (SERVER + "--prompt rankgpt", ("teacher", "Answers.add", 5)),
    LISTWISE + "--model {llm} --device cpu --answer-tokens 12",
    POINTWISE + "--run {first.run}",
    POINTWISE + "--first-stage bm25 --template chat",
    TRAIN + "--backbone tiny --query-length 8 --doc-length 16",
    TRAIN + "--backbone tiny --list-size 4 --query-length 8 --doc-length 16 "
            "--eval-dataset {corpus}/dev",
    TOY + "--first-stage bm25 --loss hinge",
    *[TOY + LISTS + f"--loss {loss}" for loss in ("adrmse", "infonce", "kl", "mse")],
    TOY + LISTS + "--loss ranknet --negatives shared --max-teacher-margin 1 --skip-missing",
    TOY + "--triples {triples.tsv} --loss bce --eval-dataset none",
    TOY + "--triples {scored.tsv} --loss marginmse --eval-dataset none",
    (TOY + LISTS + "--loss bce --eval-every 1 --resume", ("train", "save_checkpoint", 2)),
    TOY + LISTS + "--eval-dataset {corpus}/dev --eval-run {first.run}",
    *["train.py --out out --backbone {model} --steps 3 --batch-size 4 " + TEXTS + f"--loss {loss}"
      for loss in ("infonce", "kl --max-teacher-margin 1 --negatives shared")],
    "teacher.py cross-encoder --model {model} {other} --out out.jsonl --keep-each " + TEXTS,
    "teacher.py pointwise --model {llm} --out out.jsonl " + TEXTS,
]]  # fmt: skip


# --------------------------------------------------------------------------------- the valid inputs


def build(world: Path) -> None:
    """Everything that COMMANDS name, and what their interrupted runs leave, under `world`."""
    import numpy as np
    import pyarrow as pa
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        DebertaV2Config,
        ElectraConfig,
        ModernBertConfig,
    )

    import teaching
    import toy
    from kernels.encoder import CrossEncoder

    rng = np.random.default_rng(0)
    toy.corpus(world / "corpus")
    toy.model(world / "model")
    toy.model(world / "other", seed=1, hidden=64)
    teaching.small_llm(world / "llm")
    sizes = dict(vocab_size=len(toy.WORDS) + 5, hidden_size=32, num_hidden_layers=2,
                 num_attention_heads=2, intermediate_size=48, max_position_embeddings=64,
                 num_labels=1, initializer_range=0.2, pad_token_id=0)
    families = {
        "electra": ElectraConfig(**sizes, embedding_size=24),
        "modernbert": ModernBertConfig(**sizes, cls_token_id=2, sep_token_id=3, bos_token_id=2,
                                       eos_token_id=3),
        "deberta": DebertaV2Config(**sizes, relative_attention=True, position_buckets=16,
                                   type_vocab_size=0, pos_att_type="p2c|c2p",
                                   position_biased_input=False),
    }  # fmt: skip
    for name, config in families.items():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        CrossEncoder(model, toy.tokenizer(), 8, 32).save_pretrained(world / name)
    build_modular(world / "modernbert", world / "modular")

    (world / "runs").mkdir()
    steps = {"first.run": 3, "teacher.run": 7, "runs/bm25.run": 3, "runs/bert-kl.run": 7}
    for name, step in steps.items():
        scores = rng.standard_normal((12, 20)).round(2)
        lines = [f"q{q} Q0 d{(q + step * i) % 60} {i + 1} {scores[q, i]} t\n"
                 for q in range(12) for i in range(20)]  # fmt: skip
        (world / name).write_text("".join(lines))
        (world / f"{name}.json").write_text('{"seconds": 1.5, "pairs": 240}')
    first = (world / "first.run").read_bytes()
    (world / "first.run.gz").write_bytes(gzip.compress(first, mtime=0))
    (world / "first.run.zst").write_bytes(pa.compress(first, "zstd", asbytes=True))
    judged = "".join(f"q{q} 0 d{(q + 3 * i) % 60} {i % 3}\n" for q in range(12) for i in range(9))
    (world / "judged").mkdir()
    (world / "suite" / "bert-kl").mkdir(parents=True)
    for name in ("qrels.txt", "judged/scifact.qrels", "judged/nfcorpus.qrels"):
        (world / name).write_text(judged)
    (world / "datasets.txt").write_text("# mine\nscifact\nboth: scifact\nboth: nfcorpus\n")
    for name in ("scifact", "nfcorpus"):
        shutil.copy(world / "first.run", world / "suite" / "bert-kl" / f"{name}.run")
    lines = (world / "corpus" / "corpus.jsonl").read_text().splitlines()
    passages = [json.loads(line)["text"] + "\n" for line in lines[:20]]
    (world / "passages.txt").write_text("".join(passages))
    rows = [(f"q{i % 8}", f"d{i % 8}", f"d{(i * 7 + 21) % 60}") for i in range(30)]
    (world / "triples.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    rows = [(f"{i / 4}", f"-{i}", *row) for i, row in enumerate(rows)]
    (world / "scored.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    lists = [{"query": passages[i].strip(), "pos": passages[i : i + 1 + i % 2],
              "neg": passages[i + 2 : i + 5], "pos_scores": [2.5, 1][: 1 + i % 2],
              "neg_scores": [0, -1.5, 0.5]} for i in range(10)]  # fmt: skip
    (world / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))


def build_modular(model: Path, folder: Path) -> None:
    """A re-ranker in modules of sentence-transformers around the encoder of a model folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel

    shutil.copytree(model, folder)
    AutoModel.from_pretrained(model).save_pretrained(folder)
    dense = {"in_features": 32, "out_features": 1, "bias": True, "module_output_name": "scores",
             "activation_function": "torch.nn.modules.linear.Identity"}
    steps = {"": ("Transformer", None), "1_Pooling": ("Pooling", {"pooling_mode": "mean"}),
             "2_LayerNorm": ("LayerNorm", {"dimension": 32}), "3_Dense": ("Dense", dense)}
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.x.{kind}"}
               for i, (path, (kind, _)) in enumerate(steps.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    whole = {"model_type": "CrossEncoder", "prompts": {}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(whole))
    for path, (_, settings) in list(steps.items())[1:]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    ones, noise = torch.ones(32), torch.randn(1, 32)
    save_file({"norm.weight": ones, "norm.bias": 0 * ones},
              folder / "2_LayerNorm" / "model.safetensors")
    save_file({"linear.weight": noise, "linear.bias": torch.zeros(1)},
              folder / "3_Dense" / "model.safetensors")


def leave_behind(world: Path, number: int) -> None:
    """Runs the command of that number until its `stops`, in the folder its cases begin with."""
    module, name, calls = COMMANDS[number].stops
    holder, left = sys.modules[module], [calls]
    *outer, name = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    function = getattr(holder, name)

    def stopping(*args, **settings):
        result = function(*args, **settings)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return result

    setattr(holder, name, stopping)
    folder = world / "states" / str(number)
    folder.mkdir(parents=True)
    os.chdir(folder)
    if (code := run_script(command_line(number, world), completion())) != 130:
        raise SystemExit(f"{COMMANDS[number].words}: exit {code} in place of an interruption")


# ------------------------------------------------------------------------------------ the mutations

LONG = "x" * 100_000
ODD_TEXTS = ["", " ", "\0", "é", "１２", "a b", "a\nb", "a\tb", "\u2028", "\ufeff", "\ud800", "-",
             "#", "%s", LONG]
ODD_NUMBERS = ["nan", "inf", "-inf", "1e400", "1e-400", "-0", "0", "-1", "1.5", "1e5", "0x10",
               "1_000", "１２", "", str(2**31), str(2**62), str(2**64), "9" * 5000]
ODD_JSON = ["null", "true", "0", "-1", "1.5", str(2**31), str(2**62), "9" * 5000, "1e400", "NaN",
            "-Infinity", "[]", "{}", "[[]]", '{"a": {"b": [0]}}', "[" * 100_000 + "]" * 100_000,
            *map(json.dumps, ODD_TEXTS)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
LONG_LINE = b"\n" + b"x" * 2_000_000 + b"\n"
PAGE = b"<!DOCTYPE html>\n<html><body>429 Too Many Requests</body></html>\n"


def place(rng, data) -> int:
    """Somewhere in data, by one draw: the same share of the way whatever its length."""
    return int(rng.random() * len(data))


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(min(len(data), rng.randint(1, 8))):
        data[place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def inserted(rng, data, what):
    at = place(rng, data)
    return data[:at] + what + data[at:]


def reordered(rng, data):
    lines = data.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def doubled(rng, data):
    lines = data.splitlines(keepends=True)
    at = place(rng, lines)
    return b"".join([*lines[: at + 1], *lines[at:]])


def half_gzip(rng, data):
    return gzip.compress(data, mtime=0)[: max(10, len(data) // 8)]


BYTES = {
    "cut off": lambda rng, data: data[: place(rng, data)],
    "its beginning gone": lambda rng, data: data[place(rng, data) :],
    "bits flipped": flipped,
    "random bytes inserted": lambda rng, data: inserted(rng, data, rng.randbytes(9)),
    "a NUL inserted": lambda rng, data: inserted(rng, data, b"\0"),
    "a carriage return inserted": lambda rng, data: inserted(rng, data, b"\r"),
    "a lone surrogate inserted": lambda rng, data: inserted(rng, data, b"\xed\xa0\x80"),
    "a very long line inserted": lambda rng, data: inserted(rng, data, LONG_LINE),
    "random bytes": lambda rng, data: rng.randbytes(len(data)),
    "a byte order mark": lambda rng, data: b"\xef\xbb\xbf" + data,
    "CRLF": lambda rng, data: data.replace(b"\n", b"\r\n"),
    "CR alone": lambda rng, data: data.replace(b"\n", b"\r"),
    "UTF-16": lambda rng, data: data.decode("latin-1").encode("utf-16"),
    "latin-1": lambda rng, data: data.replace(b"a", b"\xe9"),
    "gzip of it": lambda rng, data: gzip.compress(data, mtime=0),
    "half the gzip of it": half_gzip,
    "empty": lambda rng, data: b"",
    "blank lines": lambda rng, data: b" \n\n\t\n",
    "a line doubled": doubled,
    "all lines doubled": lambda rng, data: data + data,
    "lines shuffled": reordered,
    "no newline at the end": lambda rng, data: data.rstrip(b"\n"),
    "a git-lfs pointer": lambda rng, data: POINTER,
    "an HTML page": lambda rng, data: PAGE,
}


def in_bytes(rng, data):
    name = rng.choice(list(BYTES))
    return name, BYTES[name](rng, data)


def in_columns(rng, data):
    """One field, in one line or in all: removed, swapped with its neighbour, doubled, replaced."""
    blank = b"\t" if b"\t" in data else b" "
    lines = [line.split(blank) for line in data.split(b"\n")]
    chosen, column = place(rng, lines[:-1]), rng.randrange(6)
    everywhere = rng.random() < 0.3
    how = rng.choice(["removed", "swapped", "doubled", *["replaced"] * 4])
    value = rng.choice(rng.choice([ODD_NUMBERS, ODD_TEXTS]))
    for line in lines[:-1] if everywhere else lines[chosen : chosen + 1]:
        at = column % len(line)
        field = line.pop(at)
        if how == "swapped":
            line.insert(at + 1, field)
        elif how == "doubled":
            line[at:at] = [field, field]
        elif how == "replaced":
            line.insert(at, value.encode("utf-8", "surrogatepass"))
    where = "every line" if everywhere else f"line {chosen + 1}"
    what = f"{how} by {value[:20]!r}" if how == "replaced" else how
    return f"{where}: field {column + 1} {what}", b"\n".join(blank.join(line) for line in lines)


def nodes(tree, path=""):
    """(container, key, path) of all that hangs on a tree of dicts and lists."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key, f"{path}.{key}"
        if isinstance(value, (dict, list)):
            yield from nodes(value, f"{path}.{key}")


def in_json(rng, data):
    """One value of a JSON text: removed or replaced."""
    tree, value, mark = [json.loads(data)], rng.choice(ODD_JSON), "the value"
    holder, key, path = rng.choice(list(nodes(tree)))
    removed = rng.random() < 0.2 and holder is not tree
    if removed:
        del holder[key]
    else:
        holder[key] = mark
    text = json.dumps(tree[0]).replace(json.dumps(mark), value)
    return f"{path[3:] or 'all'} {'removed' if removed else f'= {value[:24]}'}", text.encode()


def in_json_lines(rng, data):
    """in_json of one line, or the same of every line."""
    lines, seed = data.decode().splitlines(), rng.random()
    chosen, everywhere = place(rng, lines), rng.random() < 0.3
    for i in range(len(lines)) if everywhere else [chosen]:
        what, line = in_json(random.Random(seed), lines[i])
        lines[i] = line.decode()
    where = "every line" if everywhere else f"line {chosen + 1}"
    return f"{where}: {what}", "".join(f"{line}\n" for line in lines).encode()


def in_tensors(rng, data):
    """One tensor of a safetensors file: removed, renamed, or of other values, shape or dtype."""
    import numpy as np
    from safetensors.numpy import load, save

    ways = {
        "removed": None,
        "NaN": lambda a: a * np.nan,
        "infinite": lambda a: a + np.inf,
        "zero": lambda a: a * 0,
        "int64": lambda a: a.astype(np.int64),
        "float16": lambda a: a.astype(np.float16),
        "bool": lambda a: a > 0,
        "transposed": lambda a: np.ascontiguousarray(a.T),
        "twice as long": lambda a: np.concatenate([a, a]),
        "one shorter": lambda a: a[1:],
        "without elements": lambda a: a[:0],
        "with one axis more": lambda a: a[None],
        "renamed": lambda a: a,
    }
    tensors = load(data)
    name = rng.choice(sorted(tensors))
    way = rng.choice(list(ways))
    tensor = tensors.pop(name)
    becomes = f"{name}x" if way == "renamed" else name
    if way != "removed":
        tensors[becomes] = ways[way](tensor)
    return f"tensor {name} {way}", save(tensors, {"format": "pt"})


def in_checkpoint(rng, data):
    """One value of a checkpoint: removed or replaced."""
    import torch

    state = torch.load(io.BytesIO(data), weights_only=True)
    values = [None, 0, -1, 10**30, "x", [], {}, math.nan, torch.zeros(3),
              torch.full((32,), math.nan)]
    top = rng.random() < 0.4  # among all nodes those of the optimizer would be nearly all
    holder, key, path = rng.choice([node for node in nodes(state) if node[0] is state or not top])
    removed, holder[key] = rng.random() < 0.2, rng.choice(values)
    what = f"{path[1:]} {'removed' if removed else f'= {holder[key]}'}"
    if removed:
        del holder[key]
    torch.save(state, file := io.BytesIO())
    return what, file.getvalue()


# valid, but not what anyone expects: a BEIR folder's rows, the lines of its qrels, the lines of a
# run as fields
ODD_ROWS = {
    "the first alone": lambda rows: rows[:1],
    "the first three": lambda rows: rows[:3],
    "none": lambda rows: [],
    "an empty id": lambda rows: [rows[0] | {"_id": ""}, *rows[1:]],
    "the last empty": lambda rows: [*rows[:-1], rows[-1] | {"text": ""}],
    "the first of 200,000 words": lambda rows: [rows[0] | {"text": "kaba kador " * 100_000},
                                                *rows[1:]],
}  # fmt: skip
TEXTS = (*ODD_TEXTS, "kaba kador", "\U0001f999 日本語", "kaba\r\n\0dor")
OTHERS = [{"title": None}, {"title": 7}, {"metadata": {"url": []}, "id": 3}]
for change in [*({"text": text} for text in TEXTS), *OTHERS]:
    ODD_ROWS[f"all with {str(change)[:40]}"] = lambda rows, change=change: [
        row | change for row in rows
    ]
for odd in ODD_TEXTS:  # in the middle: what stands at an end is more easily lost
    ODD_ROWS[f"ids with {odd[:10]!r}"] = lambda rows, odd=odd: [
        row | {"_id": row["_id"][0] + odd + row["_id"][1:]} for row in rows
    ]
ODD_GRADES = ["0", "-1", "2", "-2147483649", "2147483648", "4611686018427387904", "1.0"]


def scored(lines, score):
    """The lines with other scores: score(number of the line)."""
    return [[*line[:4], score(i), line[5]] for i, line in enumerate(lines)]


ODD_LINES = {
    "all scores tied": lambda lines: scored(lines, lambda i: "0.5"),
    "all scores 1e300": lambda lines: scored(lines, lambda i: "1e300"),
    "all scores denormal": lambda lines: scored(lines, lambda i: f"{i}e-320"),
    "one document a query": lambda lines: lines[::20],
    "two documents a query": lambda lines: [*lines[::20], *lines[1::20]],
    "one query": lambda lines: lines[:20],
    "one line": lambda lines: lines[:1],
    "a document that is nowhere": lambda lines: [
        *lines, [*lines[0][:2], "nowhere", *lines[0][3:]]
    ],
    "a query that is nowhere": lambda lines: [*lines, ["nowhere", *lines[0][1:]]],
    "documents of all queries the same": lambda lines: [
        [*line[:2], f"d{i % 20}", *line[3:]] for i, line in enumerate(lines)
    ],
}  # fmt: skip


def odd_corpus(rng, folder: Path) -> str:
    """Makes a BEIR folder odd, its qrels still of its queries (none where renamed); says how."""
    if rng.random() < 0.2:
        grade = rng.choice(ODD_GRADES)
        for path in folder.glob("qrels/*.tsv"):
            path.write_text(re.sub(r"\t1$", f"\t{grade}", path.read_text(), flags=re.M))
        return f"all grades {grade}"
    what, part = rng.choice(list(ODD_ROWS)), rng.choice(["corpus", "corpus", "queries"])
    path = folder / f"{part}.jsonl"
    rows = ODD_ROWS[what]([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = [json.loads(line)["_id"]
             for line in (folder / "queries.jsonl").read_text().splitlines()]
    for path in folder.glob("qrels/*.tsv"):
        header, *lines = path.read_text().splitlines()
        lines = [line for line in lines if line.split("\t")[0] in known]
        path.write_text("\n".join([header, *lines, ""])) if lines else path.unlink()
    return f"{part}: {what}"


def odd_run(rng, data):
    what = rng.choice(list(ODD_LINES))
    lines = ODD_LINES[what]([line.split(" ") for line in data.decode().splitlines()])
    return what, "".join(" ".join(line) + "\n" for line in lines).encode()


WAYS = {".jsonl": [in_json_lines], ".json": [in_json], ".safetensors": [in_tensors],
        ".pt": [in_checkpoint], ".run": [in_columns, odd_run], ".tsv": [in_columns],
        ".qrels": [in_columns], ".txt": [in_columns]}


def zstd(data) -> bytes:
    import pyarrow as pa

    return pa.compress(data, "zstd", asbytes=True)


def damage(rng, path: Path) -> str:
    """Mutates a file in place; says how."""
    if rng.random() < 0.06:
        path.unlink()
        how = rng.choice(["missing", "a folder", "a link to itself"])
        if how == "a folder":
            path.mkdir()
        if how == "a link to itself":
            path.symlink_to(path.name)
        return how
    data, pack, name = path.read_bytes(), bytes, path
    if path.suffix in (".gz", ".zst") and rng.random() < 0.7:
        import pyarrow as pa

        name = path.with_suffix("")
        codec, pack = {".gz": ("gzip", gzip.compress), ".zst": ("zstd", zstd)}[path.suffix]
        data = pa.CompressedInputStream(pa.BufferReader(data), codec).read()
    part = re.search(r"\.(part|scores)-", name.name)
    own = WAYS.get(name.suffix, [in_columns] if part else [])
    what, data = rng.choice([in_bytes, *own * 2])(rng, data)
    path.write_bytes(pack(data))
    return what


# flags that take a number, a path, or a word (also numbers, whose large values are to be obeyed)
FLAGS = {
    "rerank": ("depth stride max-tokens query-length doc-length seed", "model dataset run out",
               "dtype device long-docs first-stage nonsense"),
    "evaluate": ("digits top seed", "dataset qrels plot per-query runs baseline",
                 "measures test format plot-kind suite compare"),
    "cross-encoder": ("depth max-tokens query-length doc-length seed",
                      "model dataset run triples lists out", "dtype normalize first-stage"),
    "listwise": ("depth window stride passage-words batch-size concurrency timeout seed",
                 "model dataset run out endpoint", "prompt retries answer-tokens dtype"),
    "pointwise": ("depth max-tokens query-length doc-length seed", "model dataset run lists out",
                  "template answers instruction dtype"),
    "train": ("depth list-size batch-size lr warmup weight-decay clip eval-every eval-depth "
              "eval-queries save-every seed max-tokens query-length doc-length max-teacher-margin",
              "backbone dataset lists triples out eval-dataset eval-run",
              "loss negatives log eval-measure budget steps workers"),
}
ODD_PATHS = ["", ".", "..", "no/such", "é/日本", "\udcff", "x" * 300, "-", "case.json", "a\nb", "~",
             "*", " "]
ODD_WORDS = ["", " ", "x", "é", "\udcff", "0", "-1", "nan", "a\nb", "yes no", "nDCG@0",
             "nDCG@99999999999", "P_5", "num_q", "AP(rel=0)", "set_F.1e400", "nDCG@" + "9" * 5000]


def odd_flag(rng, argv: list[str]) -> str:
    """Adds a flag with an odd value to argv, or takes the value of its last one away; says what."""
    kind = argv[1] if argv[0] == "teacher.py" else argv[0].removesuffix(".py")
    if rng.random() < 0.05:
        return f"without {argv.pop()!r}"
    if rng.random() < 0.1 and "--run" in argv:
        at = argv.index("--run") + 1
        argv[at] = shutil.copy2(argv[at], Path(argv[at]).name)
        argv += ["--out", argv[at], "--overwrite"]
        return "--out is --run"
    which = rng.choice([0, 0, 1, 2])
    flag = rng.choice(FLAGS[kind][which].split())
    value = rng.choice([ODD_NUMBERS, ODD_PATHS, ODD_WORDS][which])
    argv.append(f"--{flag}={value}")
    return f"--{flag}={value[:24]!r}"


# ---------------------------------------------------------------------------------- the fake server


def completion(text="[2] > [1] > [3] > [4] > [5] > [6]") -> bytes:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 9}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def odd_answer(rng):
    """(what is wrong, the body that the server sends)"""
    text = rng.choice([*ODD_TEXTS, "[1] > [1]", "[7]", f"[{'9' * 5000}]", "[１] > [٢]", "</think>",
                       "[2]>" * 100_000])
    ways = [lambda rng, body: (f"the text {text[:20]!r}", completion(text)), in_json, in_json,
            in_bytes]
    return rng.choice(ways)(rng, completion())


def serve(body: bytes) -> str:
    """The address of a server in a thread of this process that answers everything with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


# ------------------------------------------------------------------------------------------- a case


def command_line(number: int, world: Path, changed: str = "") -> list[str]:
    """argv of a command; `changed` is the name that stands for a copy in the current folder."""

    def path(match):
        name = match[1]
        return name if name.split("/")[0] in (changed, "endpoint") else str(world / name)

    return [re.sub(r"{([^}]+)}", path, word) for word in COMMANDS[number].words.split()]


def prepare(seed: int, number: int, world: Path) -> tuple[list[str], str, bytes]:
    """(argv, the mutation in words, what the server answers) of a case.

    Puts its files into the current folder.
    """
    rng, own, body = random.Random(f"{seed} {number}"), number % len(COMMANDS), completion()
    state = world / "states" / str(own)
    if state.is_dir():
        shutil.copytree(state, ".", dirs_exist_ok=True)
    if number < len(COMMANDS):
        return command_line(own, world), "nothing changed", body
    left = sorted(path for path in Path().rglob("*") if path.is_file())
    names = sorted({name.split("/")[0] for name in re.findall(r"{([^}]+)}", COMMANDS[own].words)})
    more = ["what is left"] * 3 if left else []
    name = rng.choice(["a flag", *names, *more])
    argv = command_line(own, world, name)
    if name == "a flag":
        return argv, odd_flag(rng, argv), body
    if name == "endpoint":
        what, body = odd_answer(rng)
        return argv, f"answers of the server: {what}", body
    if name == "what is left":
        path = rng.choice(left)
        return argv, f"{path}: {damage(rng, path)}", body
    if (world / name).is_file():
        shutil.copy2(world / name, name)
        return argv, f"{name}: {damage(rng, Path(name))}", body
    shutil.copytree(world / name, name)
    if name == "corpus" and rng.random() < 0.5:
        return argv, f"corpus: {odd_corpus(rng, Path(name))}", body
    path = rng.choice(sorted(path for path in Path(name).rglob("*") if path.is_file()))
    return argv, f"{path}: {damage(rng, path)}", body


def run_script(argv: list[str], body: bytes) -> int:
    """The exit code of the script argv[0] run in this process."""
    from data.command import guarded

    if "endpoint" in argv:
        argv = [serve(body) if word == "endpoint" else word for word in argv]
    sys.argv = argv
    try:
        return guarded(sys.modules[argv[0].removesuffix(".py")].main)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1


def unfit(argv: list[str], printed: str) -> str | None:
    """What is wrong with the output of a command that said 0."""
    given = dict(zip(argv, argv[1:], strict=False))
    given |= dict(word.split("=", 1) for word in argv if "=" in word)
    out, source, triples, plot = map(given.get, ("--out", "--run", "--triples", "--plot"))
    if argv[0] == "train.py":
        return unfit_folder(Path(out))
    if argv[0] == "evaluate.py":
        if plot and not Path(plot).read_bytes().startswith(b"\x89PNG"):
            return f"{plot} is no picture"
        if given.get("--format") == "json":
            json.loads(printed)
        if re.search(r"[|&,] *\**-?nan\b", printed):
            return "a table with NaN"
    if out is None or argv[0] == "evaluate.py":
        return None if printed.strip() else "printed nothing"
    from data.runs import read_run

    if "--lists" in given:
        return unfit_lists(out, given["--lists"])
    if triples:
        return unfit_triples(out, triples, given["--dataset"])
    if Path(out).is_dir():
        runs = sorted(Path(out).glob("*/*.run.gz"))
        return None if len(runs) == 4 and all(map(read_run, runs)) else f"{len(runs)} runs in {out}"
    return unfit_run(out, source, int(given.get("--depth", 1000)), "--skip-missing" in argv)


def unfit_folder(out: Path) -> str | None:
    from kernels.encoder import CrossEncoder

    CrossEncoder.from_pretrained(out, device="cpu")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return None if rows and (out / "README.md").is_file() else "no log, or no README.md"


def unfit_lists(out: str, source: str) -> str | None:
    from data.list_file import ListFile

    before, got = ListFile(Path(source)), ListFile(Path(out))
    same = list(before.corpus()) == list(got.corpus())
    scored = bool(abs(got.scores).max() < math.inf)
    return None if same and scored else f"same texts: {same}, all scored: {scored}"


def unfit_triples(out: str, source: str, dataset: str) -> str | None:
    from data.texts import Texts
    from data.triples import TripleFile

    texts = Texts(dataset)
    before, got = (list(TripleFile(Path(path), texts)) for path in (source, out))
    return None if got == before else f"{len(got)} triples of {len(before)}"


def unfit_run(out: str, source: str | None, depth: int, may_lack: bool) -> str | None:
    from data.runs import read_run

    got = read_run(out)
    if source in (None, out) or may_lack:
        return None
    for qid, ranked in read_run(source).items():
        there = got.get(qid, {})
        if len(there) != min(depth, len(ranked)) or not there.keys() <= ranked.keys():
            return f"query {qid!r} has other documents than in {source}"
    return None


def left_over(argv: list[str], before: set[str]) -> str | None:
    """What should not be there behind a command that said 2: output, or parts of no further use."""
    fresh = {str(path) for path in Path().iterdir()} - before
    stray = [name for name in fresh if name[0] == "." or name.endswith(".tmp") or name in OUTPUTS]
    return f"left {', '.join(sorted(stray))} behind" if stray else None


def play(seed: int, number: int, world: Path) -> int:
    """Runs a case in the current folder; stdout, stderr and case.json, what it was, stay there."""
    argv, what, body = prepare(seed, number, world)
    Path("case.json").write_text(json.dumps([shlex.join(argv), what]))
    before = {str(path) for path in Path().iterdir()} | {"stdout", "stderr"}
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = run_script(argv, body)
    sys.stdout.flush()
    wrong = None
    if code == 0:
        try:
            wrong = unfit(argv, Path("stdout").read_text(errors="replace"))
        except Exception as e:  # as our readers say it
            wrong = f"{type(e).__name__}: {e}"
    elif code == 2:
        wrong = left_over(argv, before)
    if wrong:
        print(f"unfit: {wrong}", file=sys.stderr)
        return UNFIT
    return code


def verdict(status: int | None, stderr: str, unchanged: bool = False) -> str | None:
    """What is wrong with a case, or None.

    status: as of os.waitstatus_to_exitcode; None: it had to be killed.
    """
    lines = stderr.rstrip("\n").split("\n")
    if status is None:
        return f"did not end in {SECONDS} s"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if "Traceback (most recent call last)" in stderr:
        ours = re.findall(rf'File "{re.escape(str(ROOT))}/((?!tests/)\S+)", line (\d+)', stderr)
        where = ":".join(ours[-1]) if ours else "not in our files"
        behind = stderr[stderr.rindex('\n  File "') :].split("\n")[2:]
        said = next((line for line in behind if line[:1].strip()), lines[-1])
        name, _, message = said.partition(": ")
        return f"{name} ({where}): {message[:200]}"
    if status == UNFIT:
        return lines[-1][:200]
    if status not in (0, 2) or unchanged and status:
        return f"exit {status}: {lines[-1][:200]}"
    if status == 2 and [line for line in lines if line.startswith("error:")] != lines[-1:]:
        return f"exit 2: not one line `error: ...` at the end of stderr, but {lines[-1][:100]!r}"
    return None


# ---------------------------------------------------------------------------------- the fork server


def imports() -> None:
    """All that the scripts import anywhere, and one thread for each child."""
    for path in (ROOT, ROOT / "tests"):
        sys.path.insert(0, str(path))
    import torch

    torch.set_num_threads(1)
    import bm25s  # noqa: F401
    import ir_datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pytrec_eval  # noqa: F401
    import scipy.stats  # noqa: F401
    import Stemmer  # noqa: F401

    import kernels.tiny  # noqa: F401
    import teacher
    import teaching  # noqa: F401
    import toy  # noqa: F401
    import train  # noqa: F401
    from data.parts import blocks_of

    blocks_of.__defaults__ = (60,)  # more than one block of a run of 240 pairs
    teacher.Endpoint.first_pause = 0.01


def fork(folder: Path, work) -> int:
    """The id of a child that does work() in `folder` under LIMITS.

    It ends with work's result, or with 1 and a traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for limit, value in LIMITS.items():
            resource.setrlimit(limit, (value, value))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = work() or 0
        # as at the end of any Python: waits for threads, and may wait for ever
        threading._shutdown()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(running: dict, seconds: float = SECONDS) -> tuple[int, int | None]:
    """(child, status) of the first of {child: when it began} to end.

    After so many seconds a child is killed, and its status is None.
    """
    while True:
        for child, begun in running.items():
            late = time.monotonic() - begun > seconds
            if late:
                os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if ended:
                del running[child]
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # what it started
                return child, None if late else os.waitstatus_to_exitcode(status)
        time.sleep(0.01)


def prepared(folder: Path) -> Path:
    """The valid inputs, under `folder`, with a cache of their own; everything imported."""
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"),
                   "IR_DATASETS_HOME": str(folder / "irds"), "no_proxy": "*",
                   "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
                   "CUDA_VISIBLE_DEVICES": ""}
    os.environ.pop("OPENAI_API_KEY", None)
    imports()
    gc.freeze()
    world = folder / "world"
    states = [number for number, command in enumerate(COMMANDS) if command.stops]
    for work in [partial(build, world), *(partial(leave_behind, world, n) for n in states)]:
        child = fork(world, work)
        if wait_for({child: time.monotonic()})[1]:
            raise SystemExit("the valid inputs could not be made")
    return world


def read_if_there(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def run_cases(seed: int, numbers, folder: Path, jobs: int, keep: bool = False):
    """Yields (number, command line, mutation, what is wrong or None, seconds), as cases end."""
    world, numbers = prepared(folder), iter(numbers)
    running, cases = {}, {}
    while True:
        while len(running) < jobs and (number := next(numbers, None)) is not None:
            child = fork(folder / str(number), partial(play, seed, number, world))
            running[child], cases[child] = time.monotonic(), (number, time.monotonic())
        if not running:
            return
        child, status = wait_for(running)
        number, begun = cases.pop(child)
        here = folder / str(number)
        case, stderr = (read_if_there(here / name) for name in ("case.json", "stderr"))
        line, what = json.loads(case or '["?", "?"]')
        wrong = verdict(status, stderr, number < len(COMMANDS))
        if wrong is None and not keep:
            shutil.rmtree(here)
        yield number, line, what, wrong, time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="this one alone; its folder is kept")
    parser.add_argument("--folder", type=Path, help="made anew (default: a temporary one)")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    # command lines may hold bytes that are no text
    sys.stdout.reconfigure(errors="backslashreplace")
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="mutations-"))).resolve()
    numbers = range(args.cases) if args.case is None else [args.case]
    kinds, begun, done = defaultdict(list), time.monotonic(), 0
    alone = args.case is not None
    cases = run_cases(args.seed, numbers, folder, args.jobs, keep=alone)
    for number, line, what, wrong, seconds in cases:
        done += 1
        if alone:
            ending = wrong or "as it should be"
            print(f"{line}\n{what}\n{ending}, {seconds:.1f} s, in {folder / str(number)}")
        if wrong:
            kinds[wrong.partition(": ")[0]].append((number, line, what, wrong))
    for kind, bad in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(bad)} x {kind}")
        for number, line, what, wrong in bad:
            print(f"  case {number}: {what}\n    {wrong}\n    {line[:300]}")
    failed = sum(map(len, kinds.values()))
    print(f"\n{done} cases of seed {args.seed} in {time.monotonic() - begun:.0f} s, {failed} bad; "
          f"{folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
