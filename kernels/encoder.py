"""CrossEncoder: a query and a document in, one fp32 logit out, without a padding token ever computed.

Hugging Face's modules hold the weights; the layers are run here by hand over packed rows [tokens, hidden], so one
way serves training and scoring, CPU and GPU, and saving and loading stay Hugging Face's own.
"""

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from kernels.attention import on_gpu
from kernels.layers import (
    Dropout,
    Stream,
    bert_layer,
    deberta_layer,
    distance_slots,
    modernbert_layer,
    product_groups,
    wide,
)
from kernels.linears import Joined, Narrow, by_modules, native_bf16
from kernels.tokenizers import ModelError, check_deberta_tokenizer, check_vocabulary, load_tokenizer

# oneDNN keeps the machine code of its last 1,024 products, megabytes for one number of rows: hundreds of MB where no
# two batches are alike. Read at the first product. train.py keeps more: its attention takes a product per length.
for cache_size in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache_size, "16")


class NonFiniteScores(FloatingPointError):
    """Scores that are NaN or infinite; `.pairs` lists the positions of the pairs concerned."""

    def __init__(self, pairs: list[int]):
        super().__init__(f"{len(pairs)} scores are not finite, the first of pair {pairs[0]}")
        self.pairs = pairs


@dataclass
class Packed:
    """A batch of pairs without padding. Rows of one pair are consecutive, pairs in the order given.

    input_ids, token_types, positions int64 [tokens] (int32 on a GPU); cu_seqlens int32 [pairs+1]; lengths: tokens per
    pair, on the host.
    """

    input_ids: torch.Tensor
    token_types: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: list[int]

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    def to(self, device) -> "Packed":
        device = torch.device(device)
        if device == self.input_ids.device:
            return self
        fields = ("cu_seqlens", "input_ids", "token_types", "positions")
        hosts = [getattr(self, name) for name in fields]
        if device.type != "cuda":
            return replace(self, **{name: t.to(device) for name, t in zip(fields, hosts, strict=True)})
        together, places = one_buffer(hosts)
        (there,) = to_device(device, together)
        return replace(self, **{name: there[place] for name, place in zip(fields, places, strict=True)})


def one_buffer(tensors) -> tuple[torch.Tensor, list[slice]]:
    """int32 copies of the tensors one after the other, and the place of each: at multiples of 16 bytes, or Triton would
    compile kernels for both alignments."""
    rooms = [-(-len(t) // 4) * 4 for t in tensors]
    together = torch.zeros(sum(rooms), dtype=torch.int32)
    starts = np.cumsum([0, *rooms]).tolist()
    places = [slice(start, start + len(t)) for start, t in zip(starts, tensors, strict=False)]
    for place, t in zip(places, tensors, strict=True):
        together[place] = t
    return together, places


def micro_batches(lengths: Sequence[int], max_tokens: int, threads: int = 1) -> list[list[int]]:
    """Indices of the pairs in micro-batches, longest first, each within max_tokens (a longer pair stands alone).

    threads: as many for each of them, alike to a pair's length, as far as this leaves 1,024 tokens to each.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    total, longest = sum(lengths), max(lengths, default=0)
    if threads > 1 and total > 1024 and max_tokens >= 2 * longest:
        needed = -(-total // (max_tokens - longest))
        wanted = min(-(-needed // threads) * threads, max(total // 1024, needed))
        batches, before = [[] for _ in range(wanted)], 0
        for i in order:
            batches[before * wanted // total].append(i)
            before += lengths[i]
        return [batch for batch in batches if batch]
    batches, room = [], 0
    for i in order:
        if lengths[i] > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def default_max_tokens(device, training: bool) -> int:
    """Tokens of a micro-batch. On a CPU small ones win: their buffers stay in the cache; a GPU wants large ones."""
    if torch.device(device).type == "cpu":
        return 1664 if training else 2048
    return 16384 if training else 65536


# model_type -> (name of the body in ...ForSequenceClassification, separators between query and document)
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
LIMITS = {"num_hidden_layers": 1000, "max_position_embeddings": 1 << 20} | dict.fromkeys(
    ("hidden_size", "embedding_size", "intermediate_size", "num_attention_heads", "vocab_size", "query_length",
     "doc_length"), 1 << 30)
# What the files of a body may hold beyond it: poolers, buffers, what DeBERTa's pretraining needed.
LEFT = re.compile(r"pooler\.|_ids$|inv_freq$|\._weight$|position_embeddings.weight$")


def check_counts(name) -> None:
    """ModelError for a number in a model's config.json that no model has."""
    for key, value in read_json(name, "config.json").items():
        if key in LIMITS and (type(value) is not int or not 1 <= value <= LIMITS[key]):
            raise ModelError(f"{name}: config.json: {key} is {json.dumps(value)[:40]}, 1 to {LIMITS[key]} is possible")


def read_json(name, file) -> dict:
    """A JSON object of a model folder or hub id."""
    with from_hub(name, f"{file}: "), open(cached_file(name, file) or os.path.join(name, file), encoding="utf-8") as f:
        return dict(json.load(f))


def check_config(config) -> None:
    """ModelError for a backbone or a variant of one that the layers above do not compute."""

    def refuse(what):
        raise ModelError(f"{config.name_or_path or config.model_type}: {what}; what works: {WORKING}")

    if config.model_type not in FAMILIES:
        refuse(f"backbones of type {config.model_type!r} are not supported")
    if config.num_labels != 1:
        refuse(f"the head has {config.num_labels} labels, a cross-encoder needs one")
    if getattr(config, "is_decoder", False):
        refuse("a decoder (is_decoder) is not supported")
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        refuse(f"position_embedding_type {config.position_embedding_type!r} is not supported, only 'absolute'")
    if config.model_type == "deberta-v2":
        if getattr(config, "conv_kernel_size", 0) > 0:
            refuse("the convolution layer of DeBERTa-v2 xlarge (conv_kernel_size) is not supported")
        if not getattr(config, "relative_attention", False):
            refuse("DeBERTa without relative_attention is not supported")


def check_weights(name, model, fresh_head) -> list[str]:
    """The weights of a model that its files lack, a fresh head's; ModelError, without taking memory, where files and
    model do not fit. model: what config.json describes, on the meta device."""
    formats = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    present = (file for file in formats if cached_file(name, file, _raise_exceptions_for_missing_entries=False))
    file = next(present, formats[0])
    shards, there, here = [file], {}, dict(model.named_parameters())
    if file.endswith(".json"):
        shards = sorted(set(dict(read_json(name, file).get("weight_map", {})).values()))
    body = FAMILIES[model.config.model_type][0] + "."
    for file in shards:
        with from_hub(name, f"{file}: "):
            for weight, tensor in load_state_dict(cached_file(name, file), map_location="meta").items():
                weight = weight.replace(".gamma", ".weight").replace(".beta", ".bias")  # the first BERTs' names
                alone = weight.startswith(("embeddings", "encoder.", "layers.", "final_norm", "pooler."))
                there[body + weight if alone and weight not in here else weight] = tensor
    missing = [w for w in here if w not in there]
    faults = [f"{w} is missing" for w in missing if not fresh_head or w.startswith(body) and "pooler." not in w]
    faults += [f"{w} has no place" for w in there if w not in here and w.startswith(body) and not LEFT.search(w)]
    for weight, wanted in here.items():
        found = there.get(weight, wanted)
        if weight.startswith("classifier") and len(found) > 1 == len(wanted) and found.shape[1:] == wanted.shape[1:]:
            raise ModelError(f"{name}: the head has {len(found)} labels ({weight}), a cross-encoder needs one")
        if found.shape != wanted.shape or not found.is_floating_point() or found.dtype.itemsize < 2:
            faults.append(f"{weight} is {found.dtype} {[*found.shape]}, not floating-point {[*wanted.shape]}")
    if faults:
        raise ModelError(f"{name}: no trained cross-encoder (train.py makes one), or config.json is of another model: "
                         f"{len(faults)} of its weights do not fit: {', '.join(faults[:4])}")
    return missing


class CrossEncoder(nn.Module):
    """A Hugging Face ...ForSequenceClassification with one label and its fast tokenizer, run packed.

    query_length, doc_length: tokens kept of each side (special tokens come on top). `new_weights` names the
    parameters that were not in the files loaded (a fresh head). `truncated` counts the texts cut by tokenize.
    """

    def __init__(self, model, tokenizer, query_length: int = 32, doc_length: int = 256):
        super().__init__()
        check_config(model.config)
        self.model, self.tokenizer = model, tokenizer
        self.query_length, self.doc_length = query_length, doc_length
        self.new_weights: list[str] = []
        self.truncated = 0
        self._joined = Joined(rows=default_max_tokens("cpu", training=False))
        self._narrowed, self._ropes = None, {}
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.__class__ = Dropout
        if model.dtype.itemsize < 4:  # the head in fp32 all the same: scores rounded to bf16 tie with each other
            parts = [getattr(owner, p, None) for owner in (self.body, model) for p in ("pooler", "head", "classifier")]
            for part in filter(None, parts):
                part.float()
        self.train(model.training)
        check_vocabulary(tokenizer, model.config)
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self._before, self._between, self._after = [cls], [sep] * FAMILIES[model.config.model_type][1], [sep]
        roberta = model.config.model_type in ("roberta", "xlm-roberta")
        self._first_position = model.config.pad_token_id + 1 if roberta else 0
        if model.config.model_type == "deberta-v2":
            check_deberta_tokenizer(tokenizer)
        self._typed = not roberta and getattr(model.config, "type_vocab_size", 0) > 1  # RoBERTa's tokenizers give 0
        self._check_pair_format()
        longest = self.pair_length(query_length, doc_length)
        if longest > self.max_positions:
            raise ModelError(f"pairs of {query_length} + {doc_length} tokens and special tokens make {longest}, beyond "
                             f"the {self.max_positions} positions of the model: lower --query-length or --doc-length")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_positions(self) -> int:
        """Tokens of the longest pair the model has positions for."""
        config = self.model.config
        if config.model_type == "deberta-v2" and not getattr(config, "position_biased_input", True):
            return 1 << 30  # relative distances only: any length
        return config.max_position_embeddings - self._first_position

    def _check_pair_format(self):
        """Peers tokenise pairs with the tokenizer's own template: scores agree only if pack() makes the same ids."""
        query, document = self.tokenize(["what is this", "a test of it"], None)
        packed = self.pack([query], [document])
        own = self.tokenizer("what is this", "a test of it", return_token_type_ids=True)
        ids, types = packed.input_ids.tolist(), packed.token_types.tolist()
        if ids != own["input_ids"] or self._typed and types != own["token_type_ids"]:
            name, family = self.tokenizer.name_or_path or "the tokenizer", self.model.config.model_type
            raise ModelError(f"{name}: its own pair encoding or token types are not {family}'s ([CLS] query [SEP] "
                             "document [SEP], types 0 and 1; RoBERTa: two separators, types 0): it is another model's "
                             "tokenizer, put the model's own tokenizer files there")

    # -- tokens ---------------------------------------------------------------------------------------------------

    def tokenize(self, texts: list[str], max_length: int | None) -> list[np.ndarray]:
        """Token ids int32 of each text without special tokens, those beyond max_length dropped (None: all kept)."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # a tokenizer.json may bring its own limit and padding
        backend.no_padding()
        try:
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # a lone surrogate is no character: U+FFFD in its place
            texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.asarray(e.ids, dtype=np.int32) for e in encoded]
        if max_length is None:
            return ids
        self.truncated += sum(len(i) > max_length for i in ids)
        return [i[:max_length] for i in ids]

    def pair_length(self, n_query_tokens: int, n_doc_tokens: int) -> int:
        """Tokens of the pair, special tokens included."""
        return n_query_tokens + n_doc_tokens + len(self._before) + len(self._between) + len(self._after)

    def pack(self, query_ids: list[np.ndarray], doc_ids: list[np.ndarray]) -> Packed:
        """The pairs as one packed batch in the backbone's own pair format (special tokens, token types, positions)."""
        before, between, after = (np.asarray(s, dtype=np.int32) for s in (self._before, self._between, self._after))
        parts, sides = [], []
        for query, document in zip(query_ids, doc_ids, strict=True):
            parts += (before, query, between, document, after)
            sides += (len(before) + len(query) + len(between), len(document) + len(after))
        sides = np.asarray(sides)
        lengths = sides.reshape(-1, 2).sum(1)
        if lengths.max() > self.max_positions:
            raise ModelError(f"a pair of {lengths.max()} tokens: the model has {self.max_positions} positions")
        starts = np.concatenate(([0], lengths.cumsum()))
        types = np.repeat(np.tile([0, 1], len(lengths)), sides) if self._typed else np.zeros(starts[-1], dtype=np.int64)
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + self._first_position
        return Packed(torch.from_numpy(np.concatenate(parts).astype(np.int64)), torch.from_numpy(types),
                      torch.from_numpy(positions), torch.from_numpy(starts.astype(np.int32)), lengths.tolist())

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, packed: Packed) -> torch.Tensor:
        """fp32 logits [pairs] in the order packed; differentiable; in train() with the model's own dropout."""
        batch, device = packed.to(self.device), self.device.type
        if on_gpu(self.device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):  # the copies of the weights have its casts
                return self._logits(batch, self._narrow(dtype).projector(), dtype)
        scores = not self.training and not torch.is_grad_enabled()
        return self._logits(batch, self._joined if scores else by_modules)

    def _logits(self, batch, project, dtype=None):
        """dtype: what products read, where it is not the stream's own."""
        run = self._modernbert if self.model.config.model_type == "modernbert" else self._post_norm
        x = wide(run(self.body, batch, project, dtype))
        model, kind = self.model, self.model.config.model_type
        with torch.autocast(x.device.type.replace("meta", "cpu"), enabled=False):  # it knows no meta device
            if kind == "modernbert":
                logits = model.classifier(model.drop(model.head(x)))
            elif kind == "bert":  # the heads take the first of a sequence of one
                logits = model.classifier(model.dropout(self.body.pooler(x[:, None])))
            elif kind == "deberta-v2":
                logits = model.classifier(model.dropout(model.pooler(x[:, None])))
            else:
                logits = model.classifier(x[:, None])
        return logits.float().squeeze(-1)

    def _post_norm(self, body, batch, project, dtype):
        """BERT, RoBERTa, ELECTRA, DeBERTa: the [CLS] rows after the last layer."""
        x = body.embeddings(input_ids=batch.input_ids[None], token_type_ids=batch.token_types[None],
                            position_ids=batch.positions[None])[0]
        if hasattr(body, "embeddings_project"):
            x = project(x, body.embeddings_project)
        x = Stream(x, x) if dtype is None else Stream(wide(x), x.to(dtype))
        cls, layers, run, more = batch.cu_seqlens[:-1], body.encoder.layer, bert_layer, ()
        if self.model.config.model_type == "deberta-v2":
            run, more = deberta_layer, self._distances(body.encoder, batch.max_seqlen)
        for layer in layers:
            x = run(layer, x, batch, project, *more, rows=cls if layer is layers[-1] else None)
        return x.wide

    def _modernbert(self, body, batch, project, dtype):
        """ModernBERT: the [CLS] rows after the last layer, or each pair's mean."""
        x = body.embeddings(input_ids=batch.input_ids)
        h = x if dtype is None else x.to(dtype)  # the first layer's attention reads it without a norm
        ropes = {kind: (*self._rope(body, kind), batch.positions) for kind in set(self.model.config.layer_types)}
        norms = [layer.attn_norm for layer in body.layers[1:]]
        for layer, norm in zip(body.layers, [*norms, body.final_norm], strict=True):
            last = layer is body.layers[-1]
            rows = batch.cu_seqlens[:-1] if last and not self.mean_pooled else None
            x, h = modernbert_layer(layer, x, h, batch, project, ropes[layer.attention_type], norm,
                                    torch.float32 if last else None, rows)
        if self.mean_pooled:
            # unchecked: no waiting
            return torch.segment_reduce(wide(h), "mean", offsets=batch.cu_seqlens, axis=0, unsafe=True)
        return h

    @property
    def body(self):
        """The encoder without its head, a module of Hugging Face's."""
        return getattr(self.model, FAMILIES[self.model.config.model_type][0])

    @property
    def mean_pooled(self) -> bool:
        """Whether the head reads the mean of all rows instead of [CLS]."""
        return getattr(self.model.config, "classifier_pooling", "cls") == "mean"

    def _narrow(self, dtype) -> Narrow:
        """The weights of the layers' products in dtype, queries, keys and values as one."""
        place = dtype, self.device
        if self._narrowed is None or self._narrowed[0] != place:
            groups = product_groups(self.body, on_cls=not self.mean_pooled)
            self._narrowed = place, Narrow(groups, dtype)
        return self._narrowed[1]

    def _rope(self, body, kind):
        """cos and sin [positions, head_dim] fp32 of the layers of a kind, by Hugging Face's own rule; kept."""
        place = kind, self.device
        if place not in self._ropes:
            with torch.inference_mode(False), torch.no_grad():
                everywhere = torch.arange(self.max_positions, device=self.device)[None]
                like = torch.empty(0, device=self.device)
                self._ropes[place] = tuple(table[0] for table in body.rotary_emb(like, everywhere, kind))
        return self._ropes[place]

    def _distances(self, encoder, longest):
        """DeBERTa's distance embeddings that pairs of up to `longest` tokens reach, and the slot of each distance."""
        buckets, span = encoder.position_buckets, encoder.max_relative_positions
        low, high, slots = distance_slots(longest, buckets, span, self.device)
        return encoder.get_rel_embedding()[low : high + 1], slots

    def train(self, mode: bool = True) -> "CrossEncoder":
        self._joined.kept.clear()
        return super().train(mode)

    # -- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name, dtype="float32", device="auto", query_length=None, doc_length=None,
                        fresh_head=False):
        """A model folder or hub id. dtype of the weights: "float32", "bfloat16", a torch.dtype or "auto": bfloat16
        where the device has it in hardware, float32 else. The lengths default to those the model was saved with,
        else 32 and 256. fresh_head: a head that the files lack is drawn at random, for training.
        ModelError: not to be had or damaged, an unsupported backbone, weights missing or left over, a head of more than
        one label, a wrong tokenizer.
        """
        name = str(name)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if native_bf16(device) else "float32"
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with from_hub(name), quiet():
            check_counts(name)
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            config.num_labels = 1
            check_config(config)
            with from_hub(name, "tokenizer: "):
                tokenizer = load_tokenizer(name, config)
            query_length = query_length or getattr(config, "query_length", 32)
            doc_length = doc_length or getattr(config, "doc_length", 256)
            with from_hub(name, "config.json: "):
                with torch.device("meta"):  # what it describes, without its memory
                    model = AutoModelForSequenceClassification.from_config(config)
                draft = cls(model.eval(), tokenizer, query_length, doc_length)
                draft(draft.pack(*[draft.tokenize([""], 0)] * 2))
            new_weights = check_weights(name, model, fresh_head)
            model = AutoModelForSequenceClassification.from_pretrained(name, config=config, dtype=dtype)
            encoder = cls(model.eval(), tokenizer, query_length, doc_length)
            encoder.new_weights = new_weights
        return encoder.to(device)

    def save_pretrained(self, folder) -> None:
        """Hugging Face layout; peers get raw logits: one label, and sentence-transformers' activation the identity."""
        config = self.model.config
        config.query_length, config.doc_length = self.query_length, self.doc_length
        config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        with quiet():
            self.model.save_pretrained(folder)
        for file in Path(folder).glob("*.safetensors"):  # written for the owner alone
            shutil.copymode(Path(folder, "config.json"), file)
        longest = self.pair_length(self.query_length, self.doc_length)
        self.tokenizer.model_max_length = min(longest, self.max_positions)  # peers cut where the training did
        self.tokenizer.save_pretrained(folder)
        # transformers 5 writes a class name that transformers 4 does not know for the one both know
        path = Path(folder, "tokenizer_config.json")
        text = path.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        path.write_text(text, encoding="utf-8")

    # -- scoring --------------------------------------------------------------------------------------------------

    def start(self, query_ids, doc_ids, max_tokens: int | None = None) -> Callable[[], torch.Tensor]:
        """Begins what score_tokens does and returns the function that waits for its scores: a GPU works meanwhile, a
        CPU begins when it is called."""
        lengths = [self.pair_length(len(q), len(d)) for q, d in zip(query_ids, doc_ids, strict=True)]
        ahead = on_gpu(self.device)
        # on a CPU shared evenly by up to 8 threads, whatever their number: it must not change the scores
        budget = max_tokens or default_max_tokens(self.device, training=False)
        parts = micro_batches(lengths, budget, 1 if ahead else 8)

        @torch.inference_mode()
        def work(part):
            return self(self.pack([query_ids[i] for i in part], [doc_ids[i] for i in part]))

        def run():
            training = self.training
            if training:
                self.eval()
            try:
                return list((map if ahead else in_threads)(work, parts))
            finally:
                if training:
                    self.train()

        arrive = None
        if ahead and parts:
            arrive = to_host(torch.cat(run()))

        def scores():
            ordered = torch.empty(len(query_ids))
            if parts:
                found = arrive() if ahead else torch.cat(run())
                ordered[[i for part in parts for i in part]] = found
            bad = (~ordered.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise NonFiniteScores(bad)
            return ordered

        return scores

    def score_tokens(self, query_ids, doc_ids, max_tokens: int | None = None) -> torch.Tensor:
        """fp32 logits [pairs] on the CPU of pairs of token ids (from tokenize), in their order; no dropout.

        NonFiniteScores names the positions of pairs whose score is NaN or infinite.
        """
        return self.start(query_ids, doc_ids, max_tokens)()

    def score(self, queries: list[str], documents: list[str], max_tokens: int | None = None) -> torch.Tensor:
        """fp32 logits [pairs] of queries[i] with documents[i]. Each distinct text is tokenised once."""
        distinct = list(dict.fromkeys(queries))
        query_of = dict(zip(distinct, self.tokenize(distinct, self.query_length), strict=True))
        distinct = list(dict.fromkeys(documents))
        document_of = dict(zip(distinct, self.tokenize(distinct, self.doc_length), strict=True))
        return self.score_tokens([query_of[q] for q in queries], [document_of[d] for d in documents], max_tokens)


def to_device(device, *tensors):
    """Tensors of the host on the device, without waiting for what it computes."""
    if device.type != "cuda":
        return tensors
    return [t.pin_memory().to(device, non_blocking=True) for t in tensors]


def to_host(tensor) -> Callable[[], torch.Tensor]:
    """Begins to copy a tensor of the device; the function returned waits for it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait():
        copied.synchronize()
        return host

    return wait


def kept_bytes(config, dtype) -> int:
    """Bytes that a token's forward pass keeps for the backward pass, products in dtype: in bf16 36 to 37 a layer and
    hidden unit by count (`python -m kernels.bench launches`, and attention's result), taken for 40; twice in fp32;
    DeBERTa's two tables besides."""
    units = 40 * config.hidden_size
    if config.model_type == "deberta-v2":
        slots = 2 * (config.position_buckets if config.position_buckets > 0 else config.max_position_embeddings)
        units += 2 * 2 * config.num_attention_heads * slots
    return config.num_hidden_layers * units * dtype.itemsize // 2


def in_threads(work, items, spare=False):
    """Yields work(i) for i in items, in order, on a CPU: as many at a time as torch has threads, each computed by one.

    Threads that share every small product wait for each other more than they work; a thread of its own for every
    micro-batch also makes the last bits independent of how many there are. spare: threads beyond the number of items
    share the products all the same (where speed on a large machine counts more than those bits).
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    each = threads // workers if spare and workers else 1
    if workers <= 1 and each == threads:
        yield from map(work, items)
        return
    cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alone(item):  # autocast, like the number of threads, is a setting of the calling thread
        with torch.autocast("cpu", dtype, enabled=cast):
            return work(item)

    torch.set_num_threads(each)  # of this thread, and MKL's, which is one for all
    pending = deque(_pool(threads // each, each).submit(alone, item) for item in items)
    try:
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _pool(workers, each):
    """Kept from call to call: new threads would leave the memory that malloc keeps for the old ones lying idle."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,))


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of these threads


@contextmanager
def quiet():
    """Loading prints a bar and a table of fresh weights: `new_weights` says it once, to whom it concerns."""
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
    """Whatever goes wrong while somebody's model `name` is read, as one line that says what to do."""
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
            why = (f"{name}: neither a folder here nor to be had from the hub ({why}). Without a network pass a folder "
                   f"(`hf download {name} --local-dir FOLDER` elsewhere) or set HF_HUB_OFFLINE=1 to use the cache")
        pointers = [p.name for p in sorted(Path(name).glob("*")) if p.is_file() and p.stat().st_size < 1024
                    and p.read_bytes().startswith(b"version https://git-lfs")]
        if pointers and "Git LFS" not in why:
            why += f"; {', '.join(pointers)}: a Git LFS pointer, not the file: run `git lfs pull` there"
        raise ModelError(why) from e
