"""Modular re-rankers of sentence-transformers: an encoder of Hugging Face's, what pools it, and a
head of Dense and LayerNorm modules, each in a folder of its own that modules.json names.

The cross-encoder/ettin-reranker models are such. The files are those that sentence-transformers 6.2
writes; its activation_fn stands behind the modules and is left out: scores are raw.
"""

import re
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from kernels.loading import FAMILIES, ModelError, has_file, load_json, read_json, tensors_of

ACTIVATIONS = {kind.__name__: kind
               for kind in (nn.GELU, nn.Identity, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh)}
POOLINGS = ("cls", "mean")
# How a pooling was named before pooling_mode, one flag for each.
POOLING_FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean",
                 "pooling_mode_max_tokens": "max", "pooling_mode_lasttoken": "lasttoken",
                 "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
                 "pooling_mode_weightedmean_tokens": "weightedmean"}
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# model_type -> the layers of the head in ...ForSequenceClassification, each with what it does last:
# an activation, or the key of config.json that names one
HEADS = {
    "bert": {"bert.pooler.dense": "tanh", "classifier": "identity"},
    "electra": {"classifier.dense": "gelu", "classifier.out_proj": "identity"},
    "roberta": {"classifier.dense": "tanh", "classifier.out_proj": "identity"},
    "xlm-roberta": {"classifier.dense": "tanh", "classifier.out_proj": "identity"},
    "modernbert": {"head.dense": "classifier_activation", "head.norm": "layernorm",
                   "classifier": "identity"},
    "deberta-v2": {"pooler.dense": "pooler_hidden_act", "classifier": "identity"},
}


class Modular(nn.Module):
    """An encoder, pooling ("cls" or "mean") and head, with what CrossEncoder asks of a
    ...ForSequenceClassification.

    head: {folder: linear and activation, or norm} in their order; the last gives one number.
    """

    def __init__(self, body, pooling: str, head: nn.Sequential):
        super().__init__()
        if hasattr(body, "pooler"):
            body.pooler = None  # BERT's own, which no module reads
        self.config, self.pooling, self.head = body.config, pooling, head
        setattr(self, FAMILIES[body.config.model_type][0], body)

    @property
    def body(self):
        return getattr(self, FAMILIES[self.config.model_type][0])

    @property
    def device(self) -> torch.device:
        return self.body.device

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    def plain(self):
        """The same scores from a ...ForSequenceClassification of Hugging Face's; ModelError where
        that has another head."""
        config, kind = self.config, self.config.model_type
        model = AutoModelForSequenceClassification.from_config(config, dtype=self.dtype)
        model.to(self.device)
        layers = [model.get_submodule(place).float() for place in HEADS[kind]]
        own = [getattr(config, does, does) for does in HEADS[kind].values()]
        given = [type(step[-1]).__name__.lower() for step in self.head]
        same = own == given and (self.pooling == "cls" or kind == "modernbert")
        if not same or not all(map(takes, layers, self.head)):
            raise ModelError(
                f"{config.name_or_path}: its head ({self.pooling} pooling, {', '.join(given)}) is "
                f"not that of {type(model).__name__} ({', '.join(own)}), which is what is trained "
                "and saved here: re-rank with it as it is, or train its encoder under a new head, "
                "from a copy of the folder without modules.json")
        body = getattr(model, FAMILIES[kind][0])
        body.load_state_dict(self.body.state_dict(), strict=False)  # BERT's pooler is of the head
        with torch.no_grad():
            for layer, step in zip(layers, self.head, strict=True):
                layer.weight.copy_(step[0].weight)
                if layer.bias is not None:
                    layer.bias.copy_(bias_of(step[0]))
            if kind == "modernbert" and layers[1].bias is None:
                # its norm has none: W (n + b) + c = W n + (W b + c)
                layers[2].bias += layers[2].weight @ bias_of(self.head[1][0])
        if kind == "modernbert":
            model.config.classifier_pooling = self.pooling
        return model

    def save_pretrained(self, folder) -> None:
        self.plain().save_pretrained(folder)


def takes(layer, step) -> bool:
    """Whether a layer of Hugging Face's has a place for all that a module of a head computes. A
    norm without a bias hands it on to the layer behind."""
    given, norm = step[0], isinstance(layer, nn.LayerNorm)
    if layer.weight.shape != given.weight.shape or norm and layer.eps != given.eps:
        return False
    return norm or layer.bias is not None or given.bias is None


def bias_of(layer) -> torch.Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


class Chain(NamedTuple):
    """What modules.json says: how the encoder's rows are pooled, and {folder: its config.json with
    "type"} of the modules behind. Makes models as Hugging Face's auto classes do."""

    pooling: str
    steps: dict[str, dict]

    def from_config(self, config) -> Modular:
        return Modular(AutoModel.from_config(config), self.pooling, self.head())

    def from_pretrained(self, name, config, dtype) -> Modular:
        body = AutoModel.from_pretrained(name, config=config, dtype=dtype)
        model = Modular(body, self.pooling, self.head())
        for folder, step in model.head.named_children():
            step.load_state_dict(tensors_of(name, folder))
        return model

    def head(self) -> nn.Sequential:
        return nn.Sequential(OrderedDict((f, module_of(step)) for f, step in self.steps.items()))


def module_of(step: dict) -> nn.Sequential:
    """The module, its weights named as in its file."""
    if step["type"] == "LayerNorm":
        return nn.Sequential(OrderedDict(norm=nn.LayerNorm(step["dimension"])))
    linear = nn.Linear(step["in_features"], step["out_features"], step.get("bias", True))
    return nn.Sequential(OrderedDict(linear=linear, activation=ACTIVATIONS[activation(step)]()))


def activation(step: dict) -> str:
    """The name of a Dense module's activation; of one that is not torch's own, all of it."""
    name = step.get("activation_function", "torch.nn.Tanh")
    return name.rsplit(".", 1)[-1] if name.startswith("torch.nn.") else name


def read_chain(name, config) -> Chain | None:
    """What modules.json of a folder or hub id says; None for one that is no modular re-ranker.
    ModelError for modules that are not computed here."""

    def refuse(what):
        raise ModelError(f"{name}: {what}; what works of sentence-transformers' modules: a "
                         f"Transformer, Pooling ({' or '.join(POOLINGS)}), Dense, LayerNorm")

    whole = "config_sentence_transformers.json"
    if not has_file(name, "modules.json") or not has_file(name, whole):
        return None
    modules, settings = load_json(name, "modules.json"), read_json(name, whole)
    if settings.get("model_type") != "CrossEncoder" or len(modules) == 1:
        return None  # an encoder of single texts; a ...ForSequenceClassification alone
    kinds = [kind_of(module["type"]) for module in modules]
    folders = [module["path"] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or folders[0]:
        refuse(f"modules.json begins with {', '.join(kinds[:2])}, the first in {folders[0]!r}")
    for kind, folder in zip(kinds[1:], folders[1:], strict=True):
        if not re.fullmatch(r"[\w-]+", folder):
            refuse(f"modules.json: the path {folder[:40]!r} is no folder's name")
        if kind not in ("Pooling", "Dense", "LayerNorm"):
            refuse(f"modules.json: {folder} is of type {kind}")
    check_text(name, settings, refuse)
    pooling = pooling_of(read_json(name, f"{folders[1]}/config.json"))
    if pooling not in POOLINGS:
        refuse(f"{folders[1]}: the pooling {pooling}")
    steps = {folder: read_json(name, f"{folder}/config.json") | {"type": kind}
             for kind, folder in zip(kinds[2:], folders[2:], strict=True)}
    check_head(steps, config.hidden_size, refuse)
    return Chain(pooling, steps)


def kind_of(kind: str) -> str:
    """The name of a class of sentence-transformers; of another's, all of it."""
    return kind.rsplit(".", 1)[-1] if kind.startswith("sentence_transformers.") else kind


def pooling_of(settings: dict) -> str:
    """The name of the pooling, of several those joined by +."""
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in POOLING_FLAGS.items() if settings.get(flag)] or "mean"
    return modes if isinstance(modes, str) else "+".join(modes)


def check_text(name, settings: dict, refuse) -> None:
    """Whether texts go to the encoder as they are. settings: those of the whole model."""
    file = "sentence_bert_config.json"
    transformer = read_json(name, file) if has_file(name, file) else {}
    prompt = settings.get("default_prompt_name")
    if settings.get("prompts", {}).get(prompt):
        refuse(f"the prompt {prompt!r} is put before every text")
    for key in ("do_lower_case", "processing_kwargs"):
        if transformer.get(key):
            refuse(f"{file}: {key} changes the texts")
    if transformer.get("transformer_task", "feature-extraction") != "feature-extraction":
        refuse(f"{file}: the task {transformer['transformer_task']}")
    if transformer.get("modality_config", TEXT) != TEXT:
        refuse(f"{file}: modality_config is not that of text and last_hidden_state")


def check_head(steps: dict[str, dict], width: int, refuse) -> None:
    """Whether each module reads what the one before gives, and the last gives one score. width: of
    the encoder's rows."""
    given = "sentence_embedding"
    for folder, step in steps.items():
        dense = step["type"] == "Dense"
        wanted = step.get("module_input_name", "sentence_embedding")
        size = step["in_features"] if dense else step["dimension"]
        if wanted != given or size != width:
            refuse(f"{folder}: reads {size} numbers of {wanted!r}, and gets {width} of {given!r}")
        if not dense:
            continue
        given, width = step.get("module_output_name") or wanted, step["out_features"]
        if step.get("use_residual"):
            refuse(f"{folder}: use_residual")
        if activation(step) not in ACTIVATIONS:
            refuse(f"{folder}: the activation {activation(step)} is none of "
                   f"{', '.join(ACTIVATIONS)}")
    if given != "scores" or width != 1:
        refuse(f"the last module gives {width} numbers of {given!r}, a cross-encoder needs one of "
               "'scores'")
