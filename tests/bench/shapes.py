"""`training`, `scoring` and `lists` of `python tests/bench gpu`: four backbones' shapes.

Random weights, words of word_tokenizer, MS MARCO's lengths; on a card in bf16. The sides are those
of bench/scoring.py.
"""

import copy
import cProfile
import io
import math
import pstats
import tempfile

import torch

from bench import scoring
from bench.clock import timed, wait
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


def attention_by_torch(name, make) -> dict:
    """The side whose attention is torch's FlashAttention-2, where there is a choice."""
    if name.startswith("DeBERTa"):  # its bias leaves no choice
        return {}

    def forced():
        with by_attention("torch"):
            run = make()

        def with_torch():
            with by_attention("torch"):
                return run()

        return with_torch

    return {"ours, attention by torch": forced}


def training(section):
    """One step, 8 documents a query, dropout on. First of every model: train.py's own (by CUDA
    graphs, and without) beside Hugging Face's padded model (SDPA where it has it, the whole batch,
    inputs on the card beforehand). Then of one model after the other, while time lasts: train.py's
    own again, and from text, beside sentence-transformers' loss (from text, at the quicker of two
    mini-batches). The sides of a model in a table run in turns; medians of five looks at five
    batches, of sides that take more than a second for them of fewer, two at least. All: autocast,
    gradients clipped, fused AdamW. GiB: a step's at the most beyond what the side holds, GiB held:
    weights, optimizer, graphs. Needs sentence-transformers."""
    for name in DOCUMENTS:
        with section.tolerates(name):
            train(section, name)
    with section.tolerates("sentence-transformers"):
        from sentence_transformers import CrossEncoder as Peer

        section.while_time_lasts("beside sentence-transformers", DOCUMENTS,
                                 lambda name: train_beside(section, name, Peer))  # fmt: skip


def train(section, name):
    given = Training(section, name)
    makers = {"ours": given.ours}
    if section.cuda:
        makers["ours, no graphs"] = lambda: given.ours(graphs=False)
    makers |= attention_by_torch(name, given.ours) | {"Hugging Face padded": given.padded}
    sides = given.measure("Training step", makers, ("ours", "Hugging Face padded"))
    if "ours, no graphs" in sides:
        with section.tolerates(name, "the host's time"):
            note_host_time(section, name, sides["ours, no graphs"])


def train_beside(section, name, peer_class):
    given = Training(section, name)
    with tempfile.TemporaryDirectory() as folder:
        given.encoder.save_pretrained(folder)
        loaded = peer_class(folder, device=section.device.type)

    def peer(queries):
        own = copy.deepcopy(loaded).train()
        return scoring.peer_step(own, given.steps, WIDTH, queries, section.dtype)

    queries = given.documents // WIDTH
    best = quickest(section, f"{name}, sentence-transformers", peer, (queries, queries // 2))
    makers = {"ours": given.ours, "ours, from text": lambda: given.ours(scoring.from_text),
              f"sentence-transformers, {best} queries at a time": lambda: peer(best)}
    given.measure("Training step, beside sentence-transformers", makers)


class Training:
    """A model, batches for it in turns, and the sides that take steps on copies of it."""

    def __init__(self, section, name):
        self.section, self.name, self.model = section, name, model_of(section, name)
        self.documents = 2 * WIDTH if section.tiny else DOCUMENTS[name]
        self.count = 2 if section.tiny else 5
        tokenizer = scoring.word_tokenizer(self.model.config.vocab_size)
        self.encoder = CrossEncoder(self.model, tokenizer)
        texts = scoring.random_pairs(self.count * self.documents, per_query=WIDTH)
        starts = range(0, self.count * self.documents, self.documents)
        self.steps = [tuple(side[at : at + self.documents] for side in texts) for at in starts]

    def ours(self, draw=scoring.ready, graphs=None):
        graphs = self.section.cuda if graphs is None else graphs
        own = CrossEncoder(copy.deepcopy(self.model), self.encoder.tokenizer).train()
        inputs = draw(self.encoder, self.steps)
        run = scoring.packed_step(own, inputs, WIDTH, None, self.section.dtype, graphs)
        if graphs:
            for _ in range(3 * self.count):  # a size is run when first seen, then captured
                run()
        return run

    def padded(self):
        draw = scoring.padded_ready(self.encoder, self.steps, self.documents)
        own = copy.deepcopy(self.model).train()
        return scoring.padded_step(own, draw, WIDTH, self.section.dtype)

    def measure(self, table, makers, profile=()) -> dict:
        """Rows of the sides that can be made, which are returned."""
        section, sides, more = self.section, {}, {}
        for side, make in makers.items():
            before = section.held()
            made, first = section.working(self.name, {side: make})
            sides |= made
            for loss in map(float, first.values()):
                more[side] = {"first loss": loss, "GiB held": section.held() - before}
                if not math.isfinite(loss):
                    section.error(f"{self.name}, {side}",
                                  "the loss is not finite: its speed proves nothing")  # fmt: skip
        config, count = roofline.config_of(self.model.config), len(self.steps)
        flops = 0
        for step in self.steps:
            lengths = scoring.pair_lengths(self.encoder, scoring.token_ids(self.encoder, *step))
            flops += roofline.flops_per_step(config, lengths) / count
        section.measure(table, {"model": self.name, "documents": self.documents}, sides,
                        self.documents, flops, calls=count, more=more, profile=profile)  # fmt: skip
        return sides


def note_host_time(section, name, step):
    """A note of what the host does in ten steps, by cProfile, which makes all Python slower."""
    wait(section.device)
    profile = cProfile.Profile()
    # the backward pass in this thread, or it would not be seen
    with torch.autograd.set_multithreading_enabled(False), profile:
        for _ in range(10):
            step()
    wait(section.device)
    out = io.StringIO()
    pstats.Stats(profile, stream=out).strip_dirs().sort_stats("tottime").print_stats(25)
    lines = [line.rstrip()[:120] for line in out.getvalue().splitlines() if line.strip()]
    section.note("\n".join([f"{name}, the host's time of 10 steps without graphs:", *lines]))


def score(section):
    """Weights in bf16. First of every model: 4,096 pairs from token ids, beside Hugging Face's
    padded model (sorted by length, SDPA where it has it, inputs on the card beforehand). Then of
    one model after the other, while time lasts: 1,024 pairs from text, beside
    sentence-transformers. The others at their best batch size, chosen on fewer pairs. The sides of
    a model in a table run in turns; medians of three looks, of sides that take more than half a
    second for one of two. Needs sentence-transformers."""
    texts = scoring.random_pairs(12 if section.tiny else 4096)
    for name in DOCUMENTS:
        with section.tolerates(name):
            score_ids(section, name, texts)
    few = [side[:1024] for side in texts]
    with section.tolerates("sentence-transformers"):
        from sentence_transformers import CrossEncoder as Peer

        section.while_time_lasts("beside sentence-transformers", DOCUMENTS,
                                 lambda name: score_texts(section, name, few, Peer))  # fmt: skip


def rounded(section, name):
    """(a new model in the dtype of the section, a CrossEncoder of a copy: its head is in fp32)."""
    model = model_of(section, name).to(getattr(torch, section.dtype))
    tokenizer = scoring.word_tokenizer(model.config.vocab_size)
    return model, CrossEncoder(copy.deepcopy(model), tokenizer)


def score_ids(section, name, texts):
    padded_model, encoder = rounded(section, name)
    ids = scoring.token_ids(encoder, *texts)

    def ours():
        return lambda: encoder.score_tokens(*ids)

    def padded(size, count):
        some = [side[:count] for side in ids]
        return scoring.padded_scores(padded_model, encoder, some, size)

    whole = len(ids[0])
    best = quickest(section, f"{name}, Hugging Face", lambda size: padded(size, whole // 8),
                    (64, 128, 256))  # fmt: skip
    peer = f"Hugging Face padded, {best} at a time"
    makers = {"ours": ours, **attention_by_torch(name, ours), peer: lambda: padded(best, whole)}
    measure_scoring(section, "Scoring", name, encoder, ids, makers, ("ours", peer))


def score_texts(section, name, texts, peer_class):
    _, encoder = rounded(section, name)
    pairs = list(zip(*texts, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        loaded = peer_class(folder, device=section.device.type,
                            model_kwargs={"dtype": section.dtype})  # fmt: skip

    def peer(size, count):
        return scoring.peer_scores(loaded, pairs[:count], size)

    best = quickest(section, f"{name}, sentence-transformers",
                    lambda size: peer(size, len(pairs) // 2), (256, 128))  # fmt: skip
    makers = {"ours, from text": lambda: lambda: encoder.score(*texts),
              f"sentence-transformers, {best} at a time": lambda: peer(best, len(pairs))}
    ids = scoring.token_ids(encoder, *texts)
    measure_scoring(section, "Scoring from text", name, encoder, ids, makers)


def measure_scoring(section, table, name, encoder, ids, makers, profile=()):
    """Rows of the sides, the first of which is ours."""
    sides, scores = section.working(name, makers)
    lengths = scoring.pair_lengths(encoder, ids)
    config = roofline.config_of(encoder.model.config)
    flops = roofline.flops_per_step(config, lengths, train=False)
    first, more = next(iter(makers)), {}
    if first in scores:
        more = {side: {"differs from ours by": relative(found, scores[first])}
                for side, found in scores.items()}  # fmt: skip
    section.measure(table, {"model": name, "pairs": len(lengths)}, sides, len(lengths), flops,
                    repeats=3, more=more, profile=profile)  # fmt: skip


def lists(section):
    """One RankNet step over one list of 100, 400 and 1,600 documents of 91 tokens each: as train.py
    keeps activations by itself, then in two passes (keep 0) of micro-batches of 4,096 tokens, where
    memory at 1,600 may be 1.15 times that at 100. It is compared with itself, kernel by kernel
    (train.py would replay the list of 100, one micro-batch, as CUDA graphs)."""
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
    profile = () if two_passes else ("ours",)
    timings = section.measure("One list", labels, {"ours": lambda: step(0, batch)}, documents,
                              flops, repeats=3, calls=2, profile=profile)  # fmt: skip
    step.flush()
    return timings["ours"].gib
