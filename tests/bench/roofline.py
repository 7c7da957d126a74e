"""`python tests/bench roofline`: the figures of kernels/ROOFLINE.md, or with --study the hours and
disk of the paper's grid."""

import argparse

from kernels.roofline import (
    BANDWIDTH,
    FLOPS,
    MODELS,
    bytes_per_step,
    cell_hours,
    eager_attention_bytes,
    flops_per_step,
    least_seconds,
    loss_flops,
    parameters,
    parts_of,
)

# Queries of `evaluate.py --suite paper` (each re-ranked 1,000 deep) and of the 13 NanoBEIR sets
# (100 deep)
SUITE_QUERIES, NANO_QUERIES = 6_980 + 43 + 54 + 33_234 + 3_869 + 250, 649


def study(length):
    """Prints the least hours of every cell of the paper's grid, by train.py's own recipes, as a
    Markdown table."""
    import train
    from data.paper import PAPER_BACKBONES

    # the losses of one group cost the same
    groups = ("bce hinge marginmse", "infonce", "ranknet adrmse")
    print("| backbone | " + " | ".join(", ".join(g.split()) for g in groups)
          + " | re-ranking the suite | 6 losses x 3 seeds | a run folder, GB |")  # fmt: skip
    print("|---|" + "---:|" * (len(groups) + 3))
    whole = 0.0
    for name in PAPER_BACKBONES:
        shown, row = [], 0.0
        for losses in groups:
            args = train.parse(["--backbone", name, "--loss", losses.split()[0]])
            validated = NANO_QUERIES * args.eval_depth * (args.steps // args.eval_every)
            documents = args.batch_size * args.list_size
            training, validation = cell_hours(name, documents, args.steps, length, validated)
            _, reranking = cell_hours(name, documents, args.steps, length, SUITE_QUERIES * 1000)
            shown.append(f"{training + validation:.2f}")
            row += 3 * len(losses.split()) * (training + validation + reranking)
        whole += row
        # fp32 weights twice, and AdamW's two moments
        size = 16 * sum(parameters(MODELS[name])) / 1e9
        print(f"| {name} | " + " | ".join(shown)
              + f" | {reranking:.2f} | {row:,.0f} | {size:.1f} |")
    print(f"\n{len(PAPER_BACKBONES) * 18} runs: at least {whole:,.0f} GPU-hours.")


def main(argv):
    parser = argparse.ArgumentParser(prog="python tests/bench roofline",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=16, help="queries per step (default 16)")
    parser.add_argument("--documents", type=int, nargs="+", default=[8, 100],
                        help="per query (default 8 100)")
    parser.add_argument("--length", type=int, default=90, help="tokens per pair (default 90)")
    parser.add_argument("--padded", type=int, default=251,
                        help="width of a padded batch (default 251)")
    parser.add_argument("--study", action="store_true",
                        help="hours and disk of every cell of the paper's grid instead")
    args = parser.parse_args(argv)
    if args.study:
        return study(args.length)
    print("| model | documents | TFLOP | attention | tables | loss | GB | least ms (bound by) "
          "| last layer on [CLS] saves | packing saves | flash saves GB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for documents in args.documents:
        for name in ("minilm", "bert", "modernbert", "deberta"):
            config = MODELS[name]
            pairs = args.queries * documents
            lengths = [args.length] * pairs
            parts = parts_of(config, lengths, True, True)
            flops = sum(parts.values())
            moved = bytes_per_step(config, sum(lengths))
            every_row = flops_per_step(config, lengths, cls_only=False)
            padded = flops_per_step(config, [args.padded] * pairs)
            loss = args.queries * loss_flops(documents)
            by = "operations" if flops / FLOPS > moved / BANDWIDTH else "bytes"
            print(
                f"| {name} | {documents} | {flops / 1e12:.2f} | {parts['attention'] / flops:.1%} "
                f"| {parts['tables'] / flops:.1%} | {loss / flops:.0e} | {moved / 1e9:.1f} "
                f"| {1e3 * least_seconds(flops, moved):.1f} ({by}) | {1 - flops / every_row:.1%} "
                f"| {1 - flops / padded:.1%} | {eager_attention_bytes(config, lengths) / 1e9:.1f} |"
            )
    return 0
