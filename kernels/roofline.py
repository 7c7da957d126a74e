"""Operations, bytes and least time of a training step, by formula. Nothing here is measured.

kernels/ROOFLINE.md explains the formulas; `python tests/bench roofline` prints its figures.
"""

FLOPS, BANDWIDTH = 800e12, 3.0e12  # an H100's bf16 operations and bytes per second, as reached


def _modernbert(hidden, layers, intermediate, heads):
    return dict(hidden=hidden, layers=layers, intermediate=intermediate, heads=heads, vocab=50368,
                gated=True, window=64, global_every=3, mean_pooled=True)  # fmt: skip


BASE = dict(hidden=768, layers=12, intermediate=3072, heads=12, vocab=30522)
MODELS = {  # by train.py's names of the backbones
    "minilm": dict(hidden=384, layers=12, intermediate=1536, heads=12, vocab=30522),
    "bert": BASE,
    "roberta": BASE | dict(vocab=50265),
    "electra": BASE,
    "deberta": BASE | dict(vocab=128100, slots=512),
    "ettin-17m": _modernbert(256, 7, 384, 4),
    "ettin-32m": _modernbert(384, 10, 576, 6),
    "ettin-68m": _modernbert(512, 19, 768, 8),
    "ettin-150m": _modernbert(768, 22, 1152, 12),
    "modernbert": _modernbert(768, 22, 1152, 12),
    "modernbert-large": _modernbert(1024, 28, 2624, 16),
}


def config_of(config):
    """The sizes this module counts with, from a Hugging Face config of one of the supported
    families."""
    sizes = dict(hidden=config.hidden_size, layers=config.num_hidden_layers,
                 intermediate=config.intermediate_size, heads=config.num_attention_heads,
                 vocab=config.vocab_size)  # fmt: skip
    if config.model_type == "modernbert":
        # not config.global_attn_every_n_layers: a config made without it lacks the attribute
        everywhere = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        sizes |= dict(gated=True, window=config.local_attention // 2, global_layers=everywhere,
                      mean_pooled=config.classifier_pooling == "mean")  # fmt: skip
    if config.model_type == "deberta-v2":
        buckets = (
            config.position_buckets
            if config.position_buckets > 0
            else config.max_position_embeddings
        )
        sizes |= dict(slots=2 * buckets)
    return sizes


def flops_per_step(config, lengths, train=True, cls_only=True):
    """Floating-point operations (2 per multiply-add) of a step over packed pairs of `lengths`
    tokens: matrix products only.

    config: mapping with hidden h, layers, intermediate i, and optionally gated, window w and the
    layers without it (global_every, or a list, global_layers), slots, mean_pooled (`config_of`).
    Per token and layer: 8 h^2 for q, k, v and output, 4 h i (6 h i gated)
    for the feed-forward, 4 h slots for DeBERTa's two tables; per query row 4 h times its keys for
    attention.
    cls_only: the last layer runs its queries, output and feed-forward on one row per pair (not
        where the head
    is mean_pooled). The head: 2 h^2 per pair. train: three times the forward (gradients of inputs
    and of weights); what is computed again in the backward pass is not counted.
    """
    return sum(parts_of(config, lengths, train, cls_only).values())


def parts_of(config, lengths, train, cls_only):
    """{"products", "attention", "tables"}: operations by part."""
    h, i, slots = config["hidden"], config["intermediate"], config.get("slots", 0)
    feed_forward = (6 if config.get("gated") else 4) * h * i
    cls_only = cls_only and not config.get("mean_pooled")
    parts = dict(products=2 * h * h * len(lengths), attention=0, tables=0)
    every = range(0, config["layers"], config.get("global_every", 1))
    everywhere = config.get("global_layers", every)
    for layer in range(config["layers"]):
        on_cls = cls_only and layer == config["layers"] - 1
        window = None if layer in everywhere else config.get("window")
        for n, pairs in _counts(lengths):
            rows = 1 if on_cls else n
            keys = n if on_cls else _pairs_within(n, window)  # (query, key) pairs
            parts["products"] += pairs * ((4 * h * h + feed_forward) * rows + 4 * h * h * n)
            parts["attention"] += pairs * 4 * h * keys
            parts["tables"] += pairs * 2 * h * slots * (rows + n)
        parts["tables"] += 4 * h * h * slots  # the relative embeddings' own projections
    return {name: value * (3 if train else 1) for name, value in parts.items()}


def _counts(lengths):
    return ((n, lengths.count(n)) for n in sorted(set(lengths)))


def _pairs_within(n, window):
    """(query, key) pairs of n tokens with |r - c| <= window: n (2 w + 1) less the two cut
    corners."""
    if window is None or window >= n:
        return n * n
    return n * (2 * window + 1) - window * (window + 1)


def parameters(config):
    """(of the layers and head, of the token embeddings)."""
    h, i = config["hidden"], config["intermediate"]
    layer = 4 * h * h + (3 if config.get("gated") else 2) * h * i
    return config["layers"] * layer + h * h, config["vocab"] * h


def bytes_per_step(config, tokens, train=True):
    """Bytes between chip and memory, at the least that whole-tensor operations need, bf16
    activations.

    Per token and layer 2 (18 h + 2 u + 2 i) forward, u = i or 2 i gated: each product reads its
    input and writes its output, attention reads q, k, v and writes out, two residual-and-norms read
    two and write one, the activation reads u and writes i. DeBERTa adds 2 * 2 * slots * heads
    written and read once. Backward: twice the forward. Weights: 2 read in the forward, 2 in the
    backward, 4 written as gradient, and AdamW's 28 (p, m, v, g read, p, m, v written in fp32).
    """
    h, i = config["hidden"], config["intermediate"]
    up = 2 * i if config.get("gated") else i
    per_token = 2 * (18 * h + 2 * up + 2 * i) + 2 * 2 * 2 * config.get("slots", 0) * config["heads"]
    body, embeddings = parameters(config)
    weights = 36 * (body + embeddings) if train else 2 * body
    return tokens * config["layers"] * per_token * (3 if train else 1) + weights


def least_seconds(flops, moved):
    """No step is faster than its operations at FLOPS or its bytes at BANDWIDTH."""
    return max(flops / FLOPS, moved / BANDWIDTH)


def eager_attention_bytes(config, lengths):
    """What attention with a [rows, keys] matrix in memory moves beyond flash attention, forward and
    backward, bf16: scores, probabilities and dropped probabilities written and read once each
    forward (12 bytes per element), twice that backward. DeBERTa: the two gathered terms and their
    sum besides (another 12)."""
    per_element = 36 * (2 if config.get("slots") else 1)
    return config["layers"] * config["heads"] * per_element * sum(n * n for n in lengths)


def loss_flops(documents):
    """RankNet over one list: about 10 operations for each ordered pair (difference, exp, log, two
    sums)."""
    return 10 * documents * documents


def cell_hours(name, documents, steps, length=90, scored=0):
    """(training, scoring) hours at the least on this module's card: `steps` of `documents` pairs of
    `length` tokens, and `scored` pairs in blocks of 1,000."""
    config, block = MODELS[name], 1000
    step = least_seconds(flops_per_step(config, [length] * documents),
                         bytes_per_step(config, length * documents))
    forward = least_seconds(flops_per_step(config, [length] * block, train=False),
                            bytes_per_step(config, length * block, train=False))  # fmt: skip
    return step * steps / 3600, forward * scored / block / 3600
