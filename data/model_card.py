"""README.md of a trained model, with the hub's front matter: what it is, its data and recipe, what
it reaches, how to use it, its limits. The text is model_card.md."""

from __future__ import annotations

import string
from pathlib import Path

from data.paper import BACKBONES
from data.run_folder import read_log

TEMPLATE = Path(__file__).with_suffix(".md")


def model_card(out: Path, flags: dict, plan: str, history: list, table: str) -> str:
    """The card of the run folder `out`.

    Args:
        flags: those that decide the result. plan: what train.py says of them at the start.
        history: [step, score] of every validation. table: the measures on the test split, or "".
    """
    from huggingface_hub import ModelCardData

    base = BACKBONES.get(flags["backbone"], [flags["backbone"]])[0]
    fresh = flags["backbone"] == "tiny" or Path(base).exists()
    dataset = flags["dataset"] or ""  # none of lists with their texts
    on_msmarco = dataset.startswith("msmarco")
    front = ModelCardData(
        base_model=None if fresh else base, license="other", license_name="see-training-data",
        datasets=["microsoft/ms_marco"] if on_msmarco else None,
        library_name="sentence-transformers", pipeline_tag="text-ranking",
        tags=["cross-encoder", "reranker"])
    first = candidates_named(flags["eval_run"], flags["eval_depth"])
    test = table or "Not tested: evaluate.py judges runs of rerank.py."
    validation = "Not validated: the weights of the last step."
    if history:
        step, scores = kept_step(out, flags["eval_dataset"], history)
        rows = [f"| {name} | {score:.4f} |" for name, score in scores.items()]
        validation = "\n".join([f"Step {step:,} is kept; its validation on {first}:", "",
                                f"| dataset | {flags['eval_measure']} |", "|---|---:|", *rows])
    scale = ""
    if flags["loss"] == "mse":
        scale = " further than the teacher's, whose scale they have"
    source = flags["triples"] or flags["lists"] or flags["first_stage"]
    licence = data_licence(dataset, source)
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        flags, front=front.to_yaml(), licence=licence, plan=plan, validation=validation, test=test,
        scale=scale, out=out)


def candidates_named(runs: list | None, depth: int) -> str:
    """What is re-ranked, of each query: of the runs of --eval-run, or BM25's."""
    if not runs:
        return f"BM25's first {depth}"
    return f"the first {depth} of {', '.join(Path(run).name for run in runs)}"


def kept_step(out: Path, names: list[str], history: list) -> tuple[int, dict[str, float]]:
    """(the step of the first best score, {dataset: its score there} and their mean)."""
    step, best = max(history, key=lambda row: row[1])
    logged = {}
    for row in read_log(out / "log.jsonl")[0]:
        if row["step"] == step:
            logged |= {name: row[name] for name in names if isinstance(row.get(name), float)}
    return step, {name: logged[name] for name in names if name in logged} | {"mean": best}


def data_licence(dataset: str, source: str) -> str:
    """Under what terms the training data stand, as far as they are known here."""
    if dataset.split("/")[0] == "pydocs":
        return ("Docstrings of installed packages, under the licences of those: Python (PSF "
                "License), numpy and torch (BSD-3-Clause and others that they bundle), "
                "transformers (Apache-2.0).")
    if dataset.startswith("msmarco"):
        return ("MS MARCO, which Microsoft offers for non-commercial research purposes only. The "
                f"lists and teacher's scores (`{source}`) are derived from it; those that were "
                "published name their terms where they are kept (PUBLISHED in data/published.py).")
    if not dataset or Path(dataset).is_dir():
        return ("A collection of the user's own; what its licence allows is for its owner to say "
                "here.")
    return (f"Through ir_datasets, whose page of `{dataset}` names the source and its terms: "
            "https://ir-datasets.com.")
