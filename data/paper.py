"""What arXiv 2603.03010 did: backbones, lists, lengths, suites; and the recipe of a run, where a
flag is not given."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from data.command import BadInput, at_least
from data.list_file import carries_texts

# name: (hub id, group); shapes are in kernels/roofline.py
BACKBONES = {
    "minilm": ("microsoft/MiniLM-L12-H384-uncased", "mini"),
    "bert": ("bert-base-uncased", "base"),
    "roberta": ("FacebookAI/roberta-base", "base"),
    "electra": ("google/electra-base-discriminator", "base"),
    "deberta": ("microsoft/deberta-v3-base", "base"),
    "ettin-17m": ("jhu-clsp/ettin-encoder-17m", "mini"),
    "ettin-32m": ("jhu-clsp/ettin-encoder-32m", "mini"),
    "ettin-68m": ("jhu-clsp/ettin-encoder-68m", "mini"),
    "ettin-150m": ("jhu-clsp/ettin-encoder-150m", "base"),
    "modernbert": ("answerdotai/ModernBERT-base", "base"),
    "modernbert-large": ("answerdotai/ModernBERT-large", "base"),
}
PAPER_BACKBONES = [name for name in BACKBONES if not name.startswith("modernbert")]
# arXiv 2603.03010, sections 4 and 5 of its configuration; what a later layer has overrides (recipe)
PAPER = dict(dataset="msmarco-passage/train", steps=200_000, depth=100, eval_depth=100,
             query_length=32, doc_length=256)
GROUPS = {"base": dict(documents=32, lr=1e-5), "mini": dict(documents=64, lr=7e-6)}
LIST_SIZE = {"bce": 2, "hinge": 2, "marginmse": 2, "infonce": 8, "ranknet": 50, "adrmse": 50,
             "kl": 50, "mse": 8}
# ColBERTv2's first 100, scored by a cross-encoder: labels and a teacher for every loss
SHARED_LISTS = "hf-monoelectra"
# kl and mse are not the paper's; mse wants logits, and RankZephyr's scores are ranks
PAPER_LISTS = {"bce": "docpairs", "hinge": "docpairs", "marginmse": "ensemble-t2",
               "infonce": "colbert", "ranknet": "rankzephyr-50", "adrmse": "rankzephyr-50",
               "kl": "rankzephyr-50", "mse": SHARED_LISTS}
TINY = dict(dataset="pydocs", steps=450, batch_size=16, list_size=8, lr=2e-3, depth=50,
            query_length=24, doc_length=96, eval_depth=50, eval_queries=150, eval_every=225)
# of tiny's negatives, from the whole corpus: without some, only BM25's own choice is ever seen
TINY_RANDOM_SHARE = 2 / 7

BEIR13 = ["arguana", "climate-fever", "dbpedia-entity/test", "fever/test", "fiqa/test",
          "hotpotqa/test", "nfcorpus/test", "nq", "quora/test", "scidocs", "scifact/test",
          "webis-touche2020/v2", "trec-covid"]
LOTTE = ["writing", "recreation", "science", "technology", "lifestyle"]
SUITES = {  # column: {name of the run file: ir_datasets id}, in the paper's order
    "paper": {
        "MSM dev": {"msmarco-dev": "msmarco-passage/dev/small"},
        "DL19": {"dl19": "msmarco-passage/trec-dl-2019/judged"},
        "DL20": {"dl20": "msmarco-passage/trec-dl-2020/judged"},
        "BEIR13": {path.split("/")[0]: f"beir/{path}" for path in BEIR13},
        "LoTTE-S": {f"lotte-{topic}": f"lotte/{topic}/test/search" for topic in LOTTE},
        "Rob04": {"robust04": "disks45/nocr/trec-robust-2004"},
    }
}
NANO = sorted({*SUITES["paper"]["BEIR13"], "msmarco"} - {"trec-covid"})
SUITES["nanobeir"] = {"NanoBEIR": {name: f"nano-beir/{name}" for name in NANO}}
LOSSES = ("bce", "hinge", "marginmse", "infonce", "ranknet", "adrmse", "kl", "mse")


def recipe(args: argparse.Namespace) -> argparse.Namespace:
    """Every flag, in layers: the paper's, over it the backbone group's, the loss's, the data's, the
    model folder's, the preset of tiny, and over all what was given. Then what follows from
    these. An empty --lists or --triples, of a shell's unset variable, is none."""
    empty = [name for name in ("lists", "triples") if getattr(args, name) == ""]
    given = {name: value for name, value in vars(args).items()
             if value is not None and name not in empty}
    if carries_texts(given.get("lists")):
        given["dataset"] = None
    tiny = args.backbone == "tiny"
    preset = TINY if tiny else {}
    group = GROUPS[BACKBONES.get(args.backbone, ("", "base"))[1]]
    dataset = (PAPER | preset | given)["dataset"]
    loss = dict(list_size=8 if args.negatives == "shared" else LIST_SIZE[args.loss])
    flags = {}
    for layer in (PAPER, group, loss, lists_of(given, dataset), lengths_of(args.backbone), preset,
                  given):
        flags |= layer
    documents = flags.pop("documents")
    whole_lists = max(documents // flags["list_size"], 1)
    flags.setdefault("batch_size", documents if flags["list_size"] == 2 else whole_lists)
    if args.budget == "docs":
        if tiny:
            documents = TINY["batch_size"] * TINY["list_size"]
        a_step = flags["batch_size"] * flags["list_size"]
        flags["steps"] = math.ceil(flags["steps"] * documents / a_step)
    steps = flags["steps"]
    flags.setdefault("warmup", steps // (10 if tiny else 40))
    flags.setdefault("eval_every", max(steps // 40, min(steps, 100)))
    flags.setdefault("save_every", flags["eval_every"])
    flags["eval_dataset"] = validation_sets(dataset, args.eval_dataset, tiny)
    trained_on = dataset
    if dataset is None:
        trained_on = Path(flags["lists"]).name.partition(".")[0]
    flags.setdefault("out", default_folder(args, trained_on))
    if args.dtype == "auto":
        flags["dtype"] = dtype_of(args.device)
    if flags["warmup"] > steps:
        raise BadInput(f"--warmup {flags['warmup']}: longer than --steps {steps}")
    nothing = dict.fromkeys([*vars(args), "random_share"])
    return argparse.Namespace(**nothing | flags)


def lists_of(given: dict, dataset: str | None) -> dict:
    """Where the lists come from: what was given, else the paper's files for MS MARCO, else BM25."""
    tiny, loss = given["backbone"] == "tiny", given["loss"]
    source = {name: given[name] for name in ("lists", "triples", "first_stage") if name in given}
    if not source and dataset == PAPER["dataset"] and not tiny:
        kind = "triples" if LIST_SIZE[loss] == 2 else "lists"
        source = {kind: PAPER_LISTS[loss]}
        if given["negatives"] == "shared":
            source = {"lists": SHARED_LISTS}
    if not source:
        source = {"first_stage": "bm25"}
    if "triples" in source:
        source["list_size"] = 2
    if source.get("lists") == "colbert":
        source["depth"] = 500
    if tiny and "first_stage" in source:
        source["random_share"] = TINY_RANDOM_SHARE
    return source


def lengths_of(backbone: str) -> dict:
    """The lengths that a model trained here was saved with; those of the paper for another's."""
    config = Path(backbone) / "config.json"
    if not config.is_file():
        return {}
    try:
        known = json.loads(config.read_text())
        return {name: at_least(1)(str(known.get(name, PAPER[name])))
                for name in ("query_length", "doc_length")}
    except (ValueError, AttributeError, RecursionError, argparse.ArgumentTypeError) as e:
        raise BadInput(f"{config}: not the config of a model ({str(e)[:100]})") from e


def validation_sets(dataset: str | None, given: list[str] | None, tiny: bool) -> list[str]:
    """The datasets of --eval-dataset, by default the dev split that belongs to the training
    data."""
    names = own_validation(dataset, tiny) if given is None else given
    if names == ["nanobeir"]:
        return list(SUITES["nanobeir"]["NanoBEIR"].values())
    return [] if names == ["none"] else names


def own_validation(dataset: str | None, tiny: bool) -> list[str]:
    if dataset is None:  # lists with their texts
        return []
    if dataset.split("/")[0] == "pydocs":
        return ["pydocs/dev"]
    if dataset == PAPER["dataset"] and not tiny:
        return ["nanobeir"]
    folder = Path(dataset) if Path(dataset).is_dir() else Path(dataset).parent
    return [str(folder / "dev")] if (folder / "qrels" / "dev.tsv").is_file() else []


def default_folder(args: argparse.Namespace, dataset: str) -> Path:
    name = "-".join(Path(dataset).parts[-2:]) + f"-{Path(args.backbone).name}-{args.loss}"
    if args.negatives == "shared":
        name += "-shared"
    if args.budget == "docs":
        name += "-docs"
    return Path("runs") / f"{name}-seed{args.seed}"


def dtype_of(device: str) -> str:
    """bfloat16 on a card that has it in hardware; on a CPU the same bits everywhere: float32."""
    import torch

    has_gpu = device != "cpu" and torch.cuda.is_available()
    native = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"
