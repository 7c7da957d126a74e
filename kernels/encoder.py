"""CrossEncoder: a query and a document in, one fp32 logit out, without a padding token ever computed.

Hugging Face's modules hold the weights; the layers are run here by hand over packed rows [tokens, hidden], so one
way serves training and scoring, CPU and GPU, and saving and loading stay Hugging Face's own.
"""

import json
import os
import struct
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.normalizers import BertNormalizer
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast
from transformers.activations import GELUActivation
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from kernels.attention import DisentangledBias, dropout, varlen_attention

# oneDNN keeps the machine code of its last 1,024 products, megabytes for one number of rows: hundreds of MB where no
# two batches are alike. Read at the first product. train.py keeps more: its attention takes a product per length.
for cache_size in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache_size, "16")


class ModelError(ValueError):
    """A backbone, head or tokenizer that this project does not run, or that is not to be had; one line says why."""


class NonFiniteScores(FloatingPointError):
    """Scores that are NaN or infinite; `.pairs` lists the positions of the pairs concerned."""

    def __init__(self, pairs: list[int]):
        super().__init__(f"{len(pairs)} scores are not finite, the first of pair {pairs[0]}")
        self.pairs = pairs


@dataclass
class Packed:
    """A batch of pairs without padding. Rows of one pair are consecutive, pairs in the order given.

    input_ids, token_types, positions int64 [tokens]; cu_seqlens int32 [pairs+1]; lengths: tokens per pair, on the host.
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

        def move(t):
            return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)

        return replace(self, input_ids=move(self.input_ids), token_types=move(self.token_types),
                       positions=move(self.positions), cu_seqlens=move(self.cu_seqlens))


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


def native_bf16(device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere it is emulated and slower than fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def packs_weights(dtype) -> bool:
    """Whether torch was built with oneDNN's products over weights laid out beforehand, and this CPU runs them."""
    return (hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability()[:3] == "AVX"
            and (dtype == torch.float32 or dtype == torch.bfloat16 and native_bf16("cpu")))


def default_max_tokens(device, training: bool) -> int:
    """Tokens of a micro-batch. On a CPU small ones win: their buffers stay in the cache; a GPU wants large ones."""
    if torch.device(device).type == "cpu":
        return 1664 if training else 2048
    return 16384 if training else 65536


# ---------------------------------------------------------------------------------------------------------------
# The layers of the families: Hugging Face's modules, rows of the packed batch in and out. `rows` None: every row;
# else the [CLS] rows alone (the last layer of a model with a [CLS] head): queries, output and feed-forward on one
# row per pair, keys and values on all.


def bert_layer(layer, x, batch, project, rows=None):
    """BERT, MiniLM, RoBERTa, ELECTRA (post-norm). x [tokens, hidden] -> [rows, hidden]."""
    attention = layer.attention.self
    if rows is None:
        q, k, v = project(x, attention.query, attention.key, attention.value)
    else:
        k, v = project(x, attention.key, attention.value)
        x = x[rows]
        q = project(x, attention.query)
    context = attend(q, k, v, batch, attention.attention_head_size, attention.dropout, rows)
    return post_norm_block(layer, x, context, project)


def deberta_layer(layer, x, batch, project, relative, lut, rows=None):
    """DeBERTa-v2 and v3: disentangled attention. relative [slots, hidden]: distance embeddings."""
    attention = layer.attention.self
    if rows is None:
        q, k, v = project(x, attention.query_proj, attention.key_proj, attention.value_proj)
    else:
        k, v = project(x, attention.key_proj, attention.value_proj)
        x = x[rows]
        q = project(x, attention.query_proj)
    relative = attention.pos_dropout(relative)
    dim, kinds = attention.attention_head_size, attention.pos_att_type
    pos_key = pos_query = None
    if "c2p" in kinds:
        pos_key = project(relative, attention.key_proj if attention.share_att_key else attention.pos_key_proj)
        pos_key = pos_key.unflatten(-1, (-1, dim))
    if "p2c" in kinds:
        pos_query = project(relative, attention.query_proj if attention.share_att_key else attention.pos_query_proj)
        pos_query = pos_query.unflatten(-1, (-1, dim))
    context = attend(q, k, v, batch, dim, attention.dropout, rows, bias=DisentangledBias(pos_key, pos_query, lut),
                     scale=(dim * (1 + len(set(kinds) & {"c2p", "p2c"}))) ** -0.5)
    return post_norm_block(layer, x, context, project)


def post_norm_block(layer, x, context, project):
    """Output projection and feed-forward, each added to its input and normalised after."""
    out = layer.attention.output
    x = out.LayerNorm(add_(out.dropout(project(context, out.dense)), x))
    inner = project(x, layer.intermediate.dense, act=layer.intermediate.intermediate_act_fn)
    out = layer.output
    return out.LayerNorm(add_(out.dropout(project(inner, out.dense)), x))


def modernbert_layer(layer, x, batch, project, rope, rows=None):
    """ModernBERT and Ettin (pre-norm, rotary, alternating windows). rope: cos and sin [tokens, 1, head_dim]."""
    attention = layer.attn
    dim = attention.head_dim
    window = None if attention.sliding_window is None else attention.sliding_window - 1  # Hugging Face's is exclusive
    h = layer.attn_norm(x)
    if rows is None:
        q, k, v = project(h, attention.Wqkv).unflatten(-1, (3, -1, dim)).unbind(1)
    else:
        if window is not None:  # the first token sees its window: only these keys are needed
            h, rope, batch = crop(h, rope, batch, window + 1)
            window, rows, x = None, batch.cu_seqlens[:-1].long(), x[rows]
        else:
            x = x[rows]
        weight, bias = attention.Wqkv.weight, attention.Wqkv.bias
        hidden = weight.shape[1]
        q = F.linear(h[rows], weight[:hidden], None if bias is None else bias[:hidden]).unflatten(-1, (-1, dim))
        kv = F.linear(h, weight[hidden:], None if bias is None else bias[hidden:])
        k, v = kv.unflatten(-1, (2, -1, dim)).unbind(1)
    cos, sin = rope
    q = rotate(q, cos, sin) if rows is None else rotate(q, cos[rows], sin[rows])
    context = attend(q, rotate(k, cos, sin), v, batch, dim, attention.attention_dropout if layer.training else 0.0,
                     rows, window=window)
    x = add_(attention.out_drop(project(context, attention.Wo)), x)
    inner, gate = project(layer.mlp_norm(x), layer.mlp.Wi).chunk(2, -1)
    return add_(project(layer.mlp.drop(layer.mlp.act(inner) * gate), layer.mlp.Wo), x)


def attend(q, k, v, batch, head_dim, drop, rows, **how):
    """varlen_attention over heads split from [rows, hidden] (or split already) -> [rows, hidden]."""
    q, k, v = (t if t.dim() == 3 else t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))
    if isinstance(drop, nn.Dropout):
        drop = drop.p if drop.training else 0.0
    if rows is not None:
        pairs = torch.arange(len(batch.lengths) + 1, dtype=torch.int32, device=q.device)
        how |= {"cu_seqlens_q": pairs, "max_seqlen_q": 1}
    return varlen_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, lengths=batch.lengths, dropout=drop,
                            **how).flatten(1)


def add_(fresh, x):
    """fresh + x, in the memory of `fresh` (a product's own output: no backward pass reads it) where types allow."""
    return fresh.add_(x) if fresh.dtype == x.dtype else fresh + x


def wide(x):
    """x in fp32 if it is narrower."""
    return x.float() if x.dtype.itemsize < 4 else x


class Dropout(nn.Dropout):
    """nn.Dropout that draws from the generator of `kernels.attention.dropout_from` where a thread has one."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, eq. 34) of x [rows, heads, head_dim], computed in fp32."""
    dtype, x = x.dtype, x.float()
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(dtype)


def crop(h, rope, batch, longest):
    """The first `longest` rows of every pair."""
    lengths = [min(length, longest) for length in batch.lengths]
    kept = batch.positions.new_tensor(lengths)
    starts = cumulative(kept)
    index = torch.arange(sum(lengths), device=h.device) + torch.repeat_interleave(
        batch.cu_seqlens[:-1].long() - starts[:-1], kept, output_size=sum(lengths))
    cropped = replace(batch, cu_seqlens=starts.to(torch.int32), lengths=lengths)
    return h[index], tuple(t[index] for t in rope), cropped


def cumulative(lengths):
    return F.pad(lengths.cumsum(0), (1, 0))


# ---------------------------------------------------------------------------------------------------------------

# model_type -> (name of the body in ...ForSequenceClassification, separators between query and document)
FAMILIES = {
    "bert": ("bert", 1),
    "electra": ("electra", 1),
    "roberta": ("roberta", 2),
    "modernbert": ("model", 1),
    "deberta-v2": ("deberta", 1),
}
WORKING = "BERT, MiniLM, ELECTRA, RoBERTa, ModernBERT/Ettin, DeBERTa-v2/v3"


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
        self._joined: dict = {}
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.__class__ = Dropout
        if model.dtype.itemsize < 4:  # the head in fp32 all the same: scores rounded to bf16 tie with each other
            body = getattr(model, FAMILIES[model.config.model_type][0])
            parts = [getattr(owner, p, None) for owner in (body, model) for p in ("pooler", "head", "classifier")]
            for part in filter(None, parts):
                part.float()
        self.train(model.training)
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        if cls is None or sep is None:
            raise ModelError(f"{tokenizer.name_or_path or 'the tokenizer'}: has no cls or sep token to join pairs with")
        self._before, self._between, self._after = [cls], [sep] * FAMILIES[model.config.model_type][1], [sep]
        roberta = model.config.model_type == "roberta"
        self._first_position = model.config.pad_token_id + 1 if roberta else 0
        if model.config.model_type == "deberta-v2":
            check_deberta_tokenizer(tokenizer)
        self._typed = getattr(model.config, "type_vocab_size", 0) > 1
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
        name = self.tokenizer.name_or_path or "the tokenizer"
        if packed.input_ids.tolist() != own["input_ids"]:
            raise ModelError(f"{name}: its own pair encoding is not the {self.model.config.model_type} format "
                             "([CLS] query [SEP] document [SEP], RoBERTa with two separators): fix its post-processor")
        if self._typed and packed.token_types.tolist() != own["token_type_ids"]:
            raise ModelError(f"{name}: its own token types are not 0 for the query and 1 for the document")

    # -- tokens ---------------------------------------------------------------------------------------------------

    def tokenize(self, texts: list[str], max_length: int | None) -> list[np.ndarray]:
        """Token ids int32 of each text without special tokens, those beyond max_length dropped (None: all kept)."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # a tokenizer.json may bring its own limit and padding
        backend.no_padding()
        ids = [np.asarray(e.ids, dtype=np.int32) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
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
        config = self.model.config
        body = getattr(self.model, FAMILIES[config.model_type][0])
        batch = packed.to(self.device)
        if config.model_type == "modernbert":
            return self._modernbert(body, batch)
        x = body.embeddings(input_ids=batch.input_ids[None], token_type_ids=batch.token_types[None],
                            position_ids=batch.positions[None])[0]
        if hasattr(body, "embeddings_project"):
            x = body.embeddings_project(x)
        cls = batch.cu_seqlens[:-1].long()
        *layers, last = body.encoder.layer
        if config.model_type == "deberta-v2":
            relative, lut = self._distances(body.encoder, batch.max_seqlen)
            for layer in layers:
                x = deberta_layer(layer, x, batch, self._project, relative, lut)
            x = deberta_layer(last, x, batch, self._project, relative, lut, cls)
        else:
            for layer in layers:
                x = bert_layer(layer, x, batch, self._project)
            x = bert_layer(last, x, batch, self._project, cls)
        model, x = self.model, wide(x)[:, None]  # the heads take the first of a sequence of one
        with torch.autocast(x.device.type, enabled=False):
            if config.model_type == "bert":
                logits = model.classifier(model.dropout(body.pooler(x)))
            elif config.model_type == "deberta-v2":
                logits = model.classifier(model.dropout(model.pooler(x)))
            else:
                logits = model.classifier(x)
        return logits.float().squeeze(-1)

    def _modernbert(self, body, batch):
        x = body.embeddings(input_ids=batch.input_ids)
        ropes = {kind: tuple(t[0, :, None].float() for t in body.rotary_emb(x[None], batch.positions[None], kind))
                 for kind in set(self.model.config.layer_types)}
        mean = self.model.config.classifier_pooling == "mean"
        cls = None if mean else batch.cu_seqlens[:-1].long()
        *layers, last = body.layers
        for layer in layers:
            x = modernbert_layer(layer, x, batch, self._project, ropes[layer.attention_type])
        x = wide(body.final_norm(modernbert_layer(last, x, batch, self._project, ropes[last.attention_type], cls)))
        if mean:
            x = torch.segment_reduce(x, "mean", lengths=batch.cu_seqlens.diff(), axis=0)
        model = self.model
        with torch.autocast(x.device.type, enabled=False):
            return model.classifier(model.drop(model.head(x))).float().squeeze(-1)

    def _distances(self, encoder, longest):
        """DeBERTa's distance embeddings that pairs of up to `longest` tokens reach, and the slot of each distance.

        The slots come from Hugging Face's own operation: a logarithm and a ceiling that must not be redone differently.
        """
        from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

        distance = torch.arange(1 - longest, longest)
        span = encoder.max_relative_positions
        if encoder.position_buckets > 0:
            distance = make_log_bucket_position(distance, encoder.position_buckets, span).long()
            span = encoder.position_buckets
        slots = (distance + span).clamp(0, 2 * span - 1)
        low, high = int(slots[0]), int(slots[-1])  # slots grow with the distance
        relative = encoder.get_rel_embedding()[low : high + 1]
        return relative, (slots - low).to(self.device, non_blocking=True)

    def _project(self, x, *linears, act=None):
        """Linear maps of one input, a tensor for each (one alone for one), `act` applied to it.

        Scoring joins them to one product, and on a CPU runs it with the weights laid out as oneDNN wants them and an
        exact GELU in the same pass: 10 to 20 % faster than F.linear. Both are kept while the weights do not change.
        """
        cpu, gelu = x.device.type == "cpu", isinstance(act, GELUActivation)
        if self.training or torch.is_grad_enabled() or not cpu and len(linears) == 1:
            outs = [linear(x) for linear in linears]
            if len(outs) > 1 or not act:
                return outs if len(outs) > 1 else outs[0]
            return torch.ops.aten.gelu_(outs[0]) if gelu and not outs[0].requires_grad else act(outs[0])
        dtype = torch.get_autocast_dtype("cpu") if cpu and torch.is_autocast_enabled("cpu") else linears[0].weight.dtype
        now = dtype, [(p.data_ptr(), p._version) for linear in linears for p in (linear.weight, linear.bias)
                      if p is not None]
        kept = self._joined.get(linears)
        if kept is None or kept[0] != now:
            weight = torch.cat([linear.weight for linear in linears]).to(dtype)
            bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears]).to(dtype)
            laid_out = cpu and packs_weights(dtype)
            if laid_out:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, default_max_tokens(x.device, training=False))
            kept = self._joined[linears] = now, weight, bias, laid_out
        _, weight, bias, laid_out = kept
        if laid_out:
            how = ("gelu", [], "none") if gelu else ("none", [], "")
            out = torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, *how)
        else:
            out = F.linear(x, weight, bias)
            out = torch.ops.aten.gelu_(out) if gelu else out
        out = act(out) if act and not gelu else out
        return out.chunk(len(linears), -1) if len(linears) > 1 else out

    def train(self, mode: bool = True) -> "CrossEncoder":
        self._joined.clear()
        return super().train(mode)

    # -- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name, dtype="float32", device="auto", query_length=None, doc_length=None):
        """A model folder or hub id. dtype of the weights: "float32", "bfloat16", a torch.dtype or "auto": bfloat16
        where the device has it in hardware, float32 else. The lengths default to those the model was saved with,
        else 32 and 256.
        ModelError: not to be had, an unsupported backbone, a head of more than one label, a wrong tokenizer.
        """
        name = str(name)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if native_bf16(device) else "float32"
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with from_hub(name):
            config = AutoConfig.from_pretrained(name)
        config.num_labels = 1
        check_config(config)
        with from_hub(name), quiet():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=dtype, output_loading_info=True)
        with from_hub(name):
            tokenizer = load_tokenizer(name, config)
        query_length = query_length or getattr(config, "query_length", 32)
        doc_length = doc_length or getattr(config, "doc_length", 256)
        encoder = cls(model.to(device).eval(), tokenizer, query_length, doc_length)
        encoder.new_weights = sorted(report["missing_keys"])
        return encoder

    def save_pretrained(self, folder) -> None:
        """Hugging Face layout; peers get raw logits: one label, and sentence-transformers' activation the identity."""
        config = self.model.config
        config.query_length, config.doc_length = self.query_length, self.doc_length
        config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        with quiet():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        # transformers 5 writes a class name that transformers 4 does not know for the one both know
        path = os.path.join(folder, "tokenizer_config.json")
        with open(path, encoding="utf-8") as f:
            text = f.read()
        with open(path, "w", encoding="utf-8") as f:
            f.write(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))

    # -- scoring --------------------------------------------------------------------------------------------------

    def score_tokens(self, query_ids, doc_ids, max_tokens: int | None = None) -> torch.Tensor:
        """fp32 logits [pairs] on the CPU of pairs of token ids (from tokenize), in their order; no dropout.

        NonFiniteScores names the positions of pairs whose score is NaN or infinite.
        """
        scores = torch.empty(len(query_ids))
        lengths = [self.pair_length(len(q), len(d)) for q, d in zip(query_ids, doc_ids, strict=True)]
        cpu = self.device.type == "cpu"
        # shared evenly by up to 8 threads, whatever their number: it must not change the scores
        parts = micro_batches(lengths, max_tokens or default_max_tokens(self.device, training=False), 8 if cpu else 1)

        @torch.inference_mode()
        def work(part):
            return self(self.pack([query_ids[i] for i in part], [doc_ids[i] for i in part]))

        with evaluating(self):
            done = list((in_threads if cpu else map)(work, parts))
        if done:
            scores[[i for part in parts for i in part]] = torch.cat(done).cpu()
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteScores(bad)
        return scores

    def score(self, queries: list[str], documents: list[str], max_tokens: int | None = None) -> torch.Tensor:
        """fp32 logits [pairs] of queries[i] with documents[i]. Each distinct text is tokenised once."""
        distinct = list(dict.fromkeys(queries))
        query_of = dict(zip(distinct, self.tokenize(distinct, self.query_length), strict=True))
        distinct = list(dict.fromkeys(documents))
        document_of = dict(zip(distinct, self.tokenize(distinct, self.doc_length), strict=True))
        return self.score_tokens([query_of[q] for q in queries], [document_of[d] for d in documents], max_tokens)


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
def evaluating(module):
    """module in eval() inside, in the mode it had after."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()


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
def from_hub(name):
    """Hugging Face's errors while loading `name`, as one line that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        if os.path.isdir(name):
            raise ModelError(f"{name}: cannot be loaded as a model folder: {first_line(e)}") from e
        raise ModelError(
            f"{name}: neither a folder here nor to be had from the hub ({first_line(e)}). Without a network pass a "
            f"folder (`hf download {name} --local-dir FOLDER` elsewhere) or set HF_HUB_OFFLINE=1 to use the cache alone"
        ) from e


def first_line(error) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers. transformers 5 builds DeBERTa's from the vocabulary alone (DebertaV2Tokenizer.__init__: Unigram with
# byte_fallback=False, and Replace, NFC, Strip for a normaliser), whatever spm.model or tokenizer.json say: the
# SentencePiece character map and the byte fallback are gone without a word, other ids in one passage of five.

# Text and its ids by the DeBERTa-v3 vocabulary: the character map, the byte fallback, white space, plain words.
DEBERTA_V3_CHECK = {
    "hello world": [12018, 447],
    "you\u2026\u00a0\u00a0you\u2026": [274, 260, 260, 260, 274, 260, 260, 260],
    "\U0001f999\ua64a": [507, 244, 163, 170, 157, 238, 157, 142],
    "\u2581This \u2581is \u2581a \u2581test \u2581.": [329, 269, 266, 1010, 323],
}


def load_tokenizer(name, config):
    """The fast tokenizer of a model folder or hub id; ModelError where it is known to be a wrong one."""
    if config.model_type == "deberta-v2":
        return deberta_tokenizer(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: has no fast tokenizer (tokenizer.json)")
    # microsoft/MiniLM-L12-H384-uncased and its like: an uncased vocabulary whose files do not say lower case.
    backend, words = tokenizer.backend_tokenizer, tokenizer.get_vocab()
    if isinstance(backend.normalizer, BertNormalizer) and not backend.normalizer.lowercase:
        if not any(word.strip("[]#").isalpha() and word != word.lower() and word[0] != "[" for word in words):
            backend.normalizer = BertNormalizer(lowercase=True)
    return tokenizer


def deberta_tokenizer(name):
    """DeBERTa-v2/v3's tokenizer from spm.model, or from tokenizer.json as it stands where there is no spm.model."""
    files = ("spm.model", "tokenizer.json", "tokenizer_config.json")
    spm, ready, settings = (cached_file(name, f, _raise_exceptions_for_missing_entries=False) for f in files)
    if settings:
        with open(settings, encoding="utf-8") as f:
            settings = json.load(f)
        for variant in ("do_lower_case", "split_by_punct"):
            if settings.get(variant):
                raise ModelError(f"{name}: {variant} in tokenizer_config.json is not supported for DeBERTa")
    if spm:
        backend = sentencepiece_tokenizer(spm)
    elif ready:
        backend = Tokenizer.from_file(ready)
    else:
        raise ModelError(f"{name}: has neither spm.model nor tokenizer.json, DeBERTa's tokenizer cannot be built")
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("cls", "sep", "pad", "unk", "mask")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=(settings or {}).get("model_max_length", 512), name_or_path=name,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special)
    check_deberta_tokenizer(tokenizer)
    return tokenizer


def check_deberta_tokenizer(tokenizer) -> None:
    """ModelError for a tokenizer over DeBERTa-v3's vocabulary that gives other ids than the model was trained on."""
    if tokenizer.convert_tokens_to_ids("\u2581hello") != 12018:
        return  # another vocabulary: nothing known to hold it against
    for text, ids in DEBERTA_V3_CHECK.items():
        if (given := tokenizer(text, add_special_tokens=False)["input_ids"]) != ids:
            raise ModelError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: wrong DeBERTa-v3 tokenizer, {text!r} gives {given}, "
                f"not {ids} (its character map or byte fallback is lost): put the model's spm.model into the folder")


def sentencepiece_tokenizer(path) -> Tokenizer:
    """A tokenizers.Tokenizer equal to a SentencePiece unigram model with DeBERTa's [CLS] A [SEP] B [SEP] template."""
    with open(path, "rb") as f:
        model = list(protobuf_fields(f.read()))
    # field numbers of sentencepiece_model.proto: pieces 1 (piece 1, score 2), trainer_spec 2 (model_type 3,
    # byte_fallback 35, unk_id 40), normalizer_spec 3 (precompiled_charsmap 2)
    pieces = [dict(protobuf_fields(value)) for number, value in model if number == 1]
    trainer, normalizer = (dict(protobuf_fields(dict(model).get(n, b""))) for n in (2, 3))
    if trainer.get(3, 1) != 1:
        raise ModelError(f"{path}: not a unigram SentencePiece model")
    vocab = [(p[1].decode(), struct.unpack("<f", p.get(2, bytes(4)))[0]) for p in pieces]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=trainer.get(40, 0), byte_fallback=bool(trainer.get(35, 0))))
    steps = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.get(2):
        steps.insert(1, normalizers.Precompiled(normalizer[2]))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True)
                                  for t in ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")])
    return tokenizer


def protobuf_fields(data: bytes):
    """(field number, value) of a serialised protobuf message: int for varints, bytes for everything else."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else 8 if kind == 1 else 4
            yield number, data[at : at + size]
            at += size
