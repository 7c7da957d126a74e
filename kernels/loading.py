"""Somebody's model folder or hub id, held against what it says before memory is taken for it."""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging


class ModelError(ValueError):
    """A backbone, head or tokenizer that this project does not run, or that is not to be had; one
    line says why."""

    for_the_user = True  # a command shows the line alone


# model_type -> (name of the body in ...ForSequenceClassification, separators between query and
# document)
FAMILIES = {
    "bert": ("bert", 1),
    "electra": ("electra", 1),
    "roberta": ("roberta", 2),
    "xlm-roberta": ("roberta", 2),
    "modernbert": ("model", 1),
    "deberta-v2": ("deberta", 1),
}
WORKING = "BERT, MiniLM, ELECTRA, RoBERTa, XLM-RoBERTa, ModernBERT/Ettin, DeBERTa-v2/v3"
# The most of what a config.json counts: beyond it much time or memory goes before anything fails.
SIZES = ("hidden_size", "embedding_size", "intermediate_size", "num_attention_heads", "vocab_size",
         "query_length", "doc_length")
LIMITS = {"num_hidden_layers": 1000, "max_position_embeddings": 1 << 20,
          **dict.fromkeys(SIZES, 1 << 30)}
OF_BODY = ("embeddings", "encoder.", "layers.", "final_norm", "pooler.")
# What the files of a body may hold beyond it: poolers, buffers, what DeBERTa's pretraining needed.
LEFT = re.compile(r"pooler\.|_ids$|inv_freq$|\._weight$|position_embeddings.weight$")


def check_counts(name) -> None:
    """ModelError for a number in a model's config.json that no model has."""
    for key, value in read_json(name, "config.json").items():
        if key in LIMITS and (type(value) is not int or not 1 <= value <= LIMITS[key]):
            raise ModelError(f"{name}: config.json: {key} is {json.dumps(value)[:40]}, 1 to "
                             f"{LIMITS[key]} is possible")


def read_json(name, file) -> dict:
    """A JSON object of a model folder or hub id."""
    with from_hub(name, f"{file}: "):
        return dict(load_json(name, file))


def load_json(name, file):
    """What a JSON file of a model folder or hub id holds."""
    with from_hub(name, f"{file}: "):
        path = cached_file(name, file) or os.path.join(name, file)
        return json.loads(Path(path).read_text(encoding="utf-8"))


def has_file(name, file) -> bool:
    return bool(cached_file(name, file, _raise_exceptions_for_missing_entries=False))


def check_config(config) -> None:
    """ModelError for a backbone or a variant of one that the layers above do not compute."""

    def refuse(what):
        name = config.name_or_path or config.model_type
        raise ModelError(f"{name}: {what}; what works: {WORKING}")

    if config.model_type not in FAMILIES:
        refuse(f"backbones of type {config.model_type!r} are not supported")
    if config.num_labels != 1:
        refuse(f"the head has {config.num_labels} labels, a cross-encoder needs one")
    if getattr(config, "is_decoder", False):
        refuse("a decoder (is_decoder) is not supported")
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        refuse(f"position_embedding_type {config.position_embedding_type!r} is not supported, "
               "only 'absolute'")
    if config.model_type == "deberta-v2":
        if getattr(config, "conv_kernel_size", 0) > 0:
            refuse("the convolution layer of DeBERTa-v2 xlarge (conv_kernel_size) is not supported")
        if not getattr(config, "relative_attention", False):
            refuse("DeBERTa without relative_attention is not supported")


def add_older_names(config) -> None:
    """The names that a ModernBERT's config.json had before transformers 5, beside the new ones.

    transformers 4 takes its defaults where they are missing, and turns Ettin's local layers by
    another angle, without a word; text-embeddings-inference does not start.
    """
    if config.model_type != "modernbert":
        return
    ropes, kinds = config.rope_parameters, config.layer_types
    config.global_rope_theta = ropes["full_attention"]["rope_theta"]
    config.local_rope_theta = ropes["sliding_attention"]["rope_theta"]
    config.global_attn_every_n_layers = [*kinds, "full_attention"].index("full_attention", 1)


def check_weights(name, model, fresh_head: bool, folders=()) -> list[str]:
    """The weights of a model that its files lack, a fresh head's; ModelError, without taking
    memory, where files and model do not fit. model: what config.json describes, on the meta
    device. folders: those of a modular head."""
    here, body = dict(model.named_parameters()), FAMILIES[model.config.model_type][0] + "."
    there = weights_of(name, body, here)
    for folder in folders:
        tensors = tensors_of(name, folder, map_location="meta")
        there |= {f"head.{folder}.{weight}": tensor for weight, tensor in tensors.items()}
    missing, faults = [weight for weight in here if weight not in there], []
    for weight in missing:
        of_body = weight.startswith(body) and "pooler." not in weight
        if of_body or not fresh_head:
            faults.append(f"{weight} is missing")
    for weight in there:
        if weight not in here and weight.startswith(body) and not LEFT.search(weight):
            faults.append(f"{weight} has no place")
    for weight, wanted in here.items():
        found = there.get(weight, wanted)
        same_input = found.shape[1:] == wanted.shape[1:]
        if weight.startswith("classifier") and same_input and len(found) > 1 == len(wanted):
            raise ModelError(f"{name}: the head has {len(found)} labels ({weight}), a "
                             "cross-encoder needs one")
        numbers = found.is_floating_point() and found.dtype.itemsize >= 2
        if found.shape != wanted.shape or not numbers:
            faults.append(f"{weight} is {found.dtype} {[*found.shape]}, not floating-point "
                          f"{[*wanted.shape]}")
    if faults:
        raise ModelError(f"{name}: no trained cross-encoder (train.py makes one), or config.json "
                         f"is of another model: {len(faults)} of its weights do not fit: "
                         f"{', '.join(faults[:4])}")
    return missing


def weights_of(name, body: str, here) -> dict[str, torch.Tensor]:
    """{name of a weight: it, on the meta device} of a model's files, named as in the model. body:
    the prefix of what is no head, which the files of a body alone leave out; here: the model's."""
    there = {}
    for weight, tensor in tensors_of(name, map_location="meta").items():
        # the first BERTs' names
        weight = weight.replace(".gamma", ".weight").replace(".beta", ".bias")
        if weight not in here and weight.startswith(OF_BODY):
            weight = body + weight
        there[weight] = tensor
    return there


def tensors_of(name, folder="", map_location="cpu") -> dict[str, torch.Tensor]:
    """{name: tensor} of the weight files of a model, or of one of its folders."""
    formats = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
               "pytorch_model.bin.index.json")
    formats = [os.path.join(folder, file) for file in formats]
    file = next((file for file in formats if has_file(name, file)), formats[0])
    files, tensors = [file], {}
    if file.endswith(".json"):
        shards = set(dict(read_json(name, file).get("weight_map", {})).values())
        files = sorted(os.path.join(folder, shard) for shard in shards)
    for file in files:
        with from_hub(name, f"{file}: "):
            tensors |= load_state_dict(cached_file(name, file), map_location=map_location)
    return tensors


@contextmanager
def quiet():
    """Loading prints a bar and a table of fresh weights: `new_weights` says it once, to whom it
    concerns."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def from_hub(name, part=""):
    """Whatever goes wrong while somebody's model `name` is read, as one line that says what to
    do."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, torch.OutOfMemoryError):
        raise
    except BaseException as e:  # a panic of the tokenizers is no Exception
        why = " ".join(f"{part}{type(e).__name__}: {e}".split())[:180]
        if isinstance(e, ModelError):
            why = str(e)
        elif os.path.isdir(name):
            why = f"{name}: cannot be loaded as a model folder: {why}"
        else:
            why = (f"{name}: neither a folder here nor to be had from the hub ({why}). Without a "
                   f"network pass a folder (`hf download {name} --local-dir FOLDER` elsewhere) or "
                   "set HF_HUB_OFFLINE=1 to use the cache")
        pointers = ", ".join(path.name for path in sorted(Path(name).glob("*")) if is_pointer(path))
        if pointers and "Git LFS" not in why:
            why += f"; {pointers}: a Git LFS pointer, not the file: run `git lfs pull` there"
        raise ModelError(why) from e


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one."""
    small = path.is_file() and path.stat().st_size < 1024
    return small and path.read_bytes().startswith(b"version https://git-lfs")
