"""`training`, `scoring` and `lists` of `python tests/bench gpu`: four backbones' shapes.

Random weights, words of word_tokenizer, MS MARCO's lengths; on a card in bf16. The sides are those
of bench/scoring.py.
"""

import copy
import math
import tempfile

import torch

from bench import scoring
from bench.clock import timed
from bench.memory import list_step
from bench.section import by_attention, free_memory, relative
from kernels import roofline
from kernels.encoder import CrossEncoder

DOCUMENTS = {"MiniLM-L12": 64, "BERT-base": 32, "ModernBERT-base": 32, "DeBERTa-v3-base": 32}
WIDTH = 8  # documents of a query
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 6000}  # fmt: skip


def model_of(section, name):
    """A new model, once what is left of those before it is freed."""
    free_memory()
    sizes = TINY if section.tiny else {}
    return scoring.random_model(name, section.device, **sizes)


def quickest(section, what, make, sizes) -> int:
    """The size whose make(size) runs fastest, the second time; the first of them if all fail."""
    seconds = {}
    for size in sizes:
        with section.tolerates(what, f"{size} at a time"):
            run = make(size)
            run()
            seconds[size] = timed(run, section.device).seconds
    return min(seconds, key=seconds.get, default=sizes[0])


def attention_by_triton(name, make) -> dict:
    """The side whose attention is ours, for shapes that have torch's by default."""
    if name.startswith("DeBERTa"):  # its bias leaves no choice
        return {}

    def forced():
        run = make()

        def with_triton():
            with by_attention("triton"):
                return run()

        return with_triton

    return {"ours, attention by Triton": forced}


def training(section):
    """One step, 8 documents a query, dropout on: train.py's own beside Hugging Face's padded model
    (SDPA where it has it, the whole batch, inputs on the card beforehand) and
    sentence-transformers' loss (from text, at its best mini-batch). All: autocast, gradients
    clipped, fused AdamW, five batches in turns. Needs sentence-transformers."""
    for name, documents in DOCUMENTS.items():
        with section.tolerates(name), tempfile.TemporaryDirectory() as folder:
            train(section, name, 2 * WIDTH if section.tiny else documents, folder)


def train(section, name, documents, folder):
    model = model_of(section, name)
    tokenizer = scoring.word_tokenizer(model.config.vocab_size)
    encoder = CrossEncoder(model, tokenizer)
    encoder.save_pretrained(folder)
    count = 2 if section.tiny else 5
    texts = scoring.random_pairs(count * documents, per_query=WIDTH)
    starts = range(0, count * documents, documents)
    steps = [tuple(side[at : at + documents] for side in texts) for at in starts]

    def ours(draw=scoring.ready):
        own = CrossEncoder(copy.deepcopy(model), tokenizer).train()
        return scoring.packed_step(own, draw(encoder, steps), WIDTH, None, section.dtype)

    def padded():
        draw = scoring.padded_ready(encoder, steps, documents)
        return scoring.padded_step(copy.deepcopy(model).train(), draw, WIDTH, section.dtype)

    def peer(queries):
        from sentence_transformers import CrossEncoder as Peer

        own = Peer(folder, device=section.device.type).train()
        return scoring.peer_step(own, steps, WIDTH, queries, section.dtype)

    queries = documents // WIDTH
    sizes = sorted({2, queries // 2, queries})
    best = quickest(section, f"{name}, sentence-transformers", peer, sizes)
    makers = {"ours": ours, **attention_by_triton(name, ours),
              "ours, from text": lambda: ours(scoring.from_text),
              "Hugging Face padded": padded,
              f"sentence-transformers, {best} queries at a time": lambda: peer(best)}
    sides, first = section.working(name, makers)
    config = roofline.config_of(model.config)
    lengths = [scoring.pair_lengths(encoder, scoring.token_ids(encoder, *step)) for step in steps]
    flops = sum(roofline.flops_per_step(config, step) for step in lengths) / count
    losses = {side: {"first loss": float(loss)} for side, loss in first.items()}
    for side, loss in losses.items():
        if not math.isfinite(loss["first loss"]):
            section.error(f"{name}, {side}", "the loss is not finite: its speed proves nothing")
    section.measure("Training step", {"model": name, "documents": documents}, sides, documents,
                    flops, calls=count, more=losses)  # fmt: skip


def score(section):
    """4,096 pairs with weights in bf16, from token ids and from text, beside Hugging Face's padded
    model (sorted by length, SDPA where it has it, inputs on the card beforehand) and
    sentence-transformers (from text), each at its best batch size. Needs sentence-transformers."""
    texts = scoring.random_pairs(12 if section.tiny else 4096)
    for name in DOCUMENTS:
        with section.tolerates(name), tempfile.TemporaryDirectory() as folder:
            score_by(section, name, texts, folder)


def score_by(section, name, texts, folder):
    padded_model = model_of(section, name).to(getattr(torch, section.dtype))
    tokenizer = scoring.word_tokenizer(padded_model.config.vocab_size)
    encoder = CrossEncoder(copy.deepcopy(padded_model), tokenizer)
    encoder.save_pretrained(folder)
    ids, pairs = scoring.token_ids(encoder, *texts), list(zip(*texts, strict=True))
    whole, few = len(pairs), len(pairs) // 4  # batch sizes are chosen on these few

    def ours():
        return lambda: encoder.score_tokens(*ids)

    def padded(size, count):
        some = [side[:count] for side in ids]
        return scoring.padded_scores(padded_model, encoder, some, size)

    def peer(size, count):
        from sentence_transformers import CrossEncoder as Peer

        own = Peer(folder, device=section.device.type, model_kwargs={"dtype": section.dtype})
        return scoring.peer_scores(own, pairs[:count], size)

    by_padding = quickest(section, f"{name}, Hugging Face",
                          lambda size: padded(size, few), (64, 128, 256))  # fmt: skip
    by_peer = quickest(section, f"{name}, sentence-transformers",
                       lambda size: peer(size, few), (32, 128, 256))  # fmt: skip
    makers = {"ours": ours, **attention_by_triton(name, ours),
              f"Hugging Face padded, {by_padding} at a time": lambda: padded(by_padding, whole),
              "ours, from text": lambda: lambda: encoder.score(*texts),
              f"sentence-transformers, {by_peer} at a time": lambda: peer(by_peer, whole)}
    sides, scores = section.working(name, makers)
    lengths = scoring.pair_lengths(encoder, ids)
    flops = roofline.flops_per_step(roofline.config_of(padded_model.config), lengths, train=False)
    more = {}
    if "ours" in scores:
        more = {side: {"differs from ours by": relative(found, scores["ours"])}
                for side, found in scores.items()}  # fmt: skip
    section.measure("Scoring", {"model": name}, sides, whole, flops, repeats=3, more=more)


def lists(section):
    """One RankNet step over one list of 100, 400 and 1,600 documents of 91 tokens each: as train.py
    keeps activations by itself, then in two passes (keep 0) of micro-batches of 4,096 tokens, where
    memory at 1,600 may be 1.15 times that at 100. It is compared with itself."""
    sizes = (4, 8) if section.tiny else (100, 400, 1600)
    for name in ("MiniLM-L12", "BERT-base"):
        for documents in sizes:
            with section.tolerates(name, f"{documents} documents"):
                one_list(section, name, documents)
        gib = {}
        for documents in sizes:
            with section.tolerates(name, f"{documents} documents, two passes"):
                gib[documents] = one_list(section, name, documents, two_passes=True)
        if section.cuda and len(gib) == len(sizes):
            growth = gib[sizes[-1]] / gib[sizes[0]]
            section.note(f"{name}: in two passes memory grows {growth:.2f} times")
            if growth > 1.15:
                section.error(name, f"in two passes memory grows {growth:.2f} times, beyond 1.15")


def one_list(section, name, documents, two_passes=False) -> float:
    """GiB of the step beyond weights and optimizer, after a row about it."""
    model = model_of(section, name)
    encoder = CrossEncoder(model, scoring.word_tokenizer(model.config.vocab_size)).train()
    step, batch = list_step(encoder, documents, section.dtype, two_passes)
    lengths = scoring.pair_lengths(encoder, (batch.queries, batch.documents))
    flops = roofline.flops_per_step(roofline.config_of(encoder.model.config), lengths)
    step(0, batch)
    labels = {"model": name, "documents": documents, "tokens": sum(lengths),
              "keep": step.gradient.keep}
    timings = section.measure("One list", labels, {"ours": lambda: step(0, batch)}, documents,
                              flops, calls=2)  # fmt: skip
    step.flush()
    return timings["ours"].gib
