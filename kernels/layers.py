"""The layers of the families over packed rows, with Hugging Face's modules as holders of the
weights.

Rows of the packed batch in and out. `rows` None: every row; else the [CLS] rows alone (the last
layer of a model with a [CLS] head): queries, output and feed-forward on one row per pair, keys and
values on all. `project(x, *linears)` runs the linear maps (kernels.linears). On a GPU what stands
between the products is one kernel each way (kernels.fused); elsewhere it is torch's own operators.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation

from kernels.attention import DisentangledBias, dropout, next_draw, on_gpu, varlen_attention


class Stream(NamedTuple):
    """What runs through post-norm layers [rows, hidden], and what products read of it: the same
    tensor, but that under autocast on a GPU `narrow` is the rounded copy that the kernel before has
    written beside."""

    wide: torch.Tensor
    narrow: torch.Tensor

    def take(self, rows) -> "Stream":
        wide = self.wide.index_select(0, rows)
        return Stream(wide, wide if self.narrow is self.wide else self.narrow.index_select(0, rows))


def bert_layer(layer, x, batch, project, rows=None):
    """BERT, MiniLM, RoBERTa, ELECTRA (post-norm). x a Stream [tokens, hidden] -> [rows, hidden]."""
    attention = layer.attention.self
    q, k, v, x = attention_inputs(x, project, attention.query, attention.key, attention.value, rows)
    context = attend(q, k, v, batch, attention.attention_head_size, attention.dropout, rows)
    return post_norm_block(layer, x, context, project)


def deberta_layer(layer, x, batch, project, relative, lut, rows=None):
    """DeBERTa-v2 and v3: disentangled attention. relative [slots, hidden]: distance embeddings."""
    attention = layer.attention.self
    own = attention.query_proj, attention.key_proj, attention.value_proj
    q, k, v, x = attention_inputs(x, project, *own, rows)
    dim, kinds = attention.attention_head_size, attention.pos_att_type
    pos_query, pos_key = distance_tables(attention, attention.pos_dropout(relative), project)
    context = attend(q, k, v, batch, dim, attention.dropout, rows,
                     bias=DisentangledBias(pos_key, pos_query, lut),
                     scale=(dim * (1 + len(set(kinds) & {"c2p", "p2c"}))) ** -0.5)
    return post_norm_block(layer, x, context, project)


def attention_inputs(x, project, query, key, value, rows):
    """q of the rows, k and v of all tokens; and the rows of x themselves, which the layer goes on
    with."""
    if rows is None:
        return *project(x.narrow, query, key, value), x
    k, v = project(x.narrow, key, value)
    x = x.take(rows)
    return project(x.narrow, query), k, v, x


def distance_tables(attention, relative, project):
    """DeBERTa's queries and keys of the distances, [slots, heads, head_dim] each; None for a term
    the model lacks."""
    if attention.share_att_key:
        query, key = attention.query_proj, attention.key_proj
    else:
        query = getattr(attention, "pos_query_proj", None)
        key = getattr(attention, "pos_key_proj", None)
    if set(attention.pos_att_type) >= {"c2p", "p2c"}:
        tables = project(relative, query, key)
    elif "c2p" in attention.pos_att_type:
        tables = None, project(relative, key)
    else:
        tables = project(relative, query), None
    return [t if t is None else t.unflatten(-1, (-1, attention.attention_head_size))
            for t in tables]


def post_norm_block(layer, x, context, project):
    """Output projection and feed-forward, each added to its input and normalised after."""
    x = add_norm(project, context, layer.attention.output, x)
    inner = project(x.narrow, layer.intermediate.dense, act=layer.intermediate.intermediate_act_fn)
    return add_norm(project, inner, layer.output, x)


def modernbert_layer(layer, x, h, batch, project, rope, norm_after, dtype, rows=None):
    """ModernBERT and Ettin (pre-norm, rotary, alternating windows).

    x [tokens, hidden], h the norm of it that attention reads -> x [rows, hidden] and norm_after(x)
    in dtype (None: as the norm has it). rope: cos and sin [positions, head_dim] and the tokens'
    positions.
    """
    attention = layer.attn
    dim = attention.head_dim
    window = attention.sliding_window
    if window is not None:
        window -= 1  # Hugging Face's is exclusive
    if rows is None:
        q, k, v = turned(project(h, attention.Wqkv).unflatten(-1, (3, -1, dim)), rope, 2)
    else:
        cos, sin, positions = rope
        x, own = x.index_select(0, rows), h.index_select(0, rows)
        own_rope = cos, sin, positions.index_select(0, rows)
        if window is not None:  # the first token sees its window: only these keys are needed
            h, positions, batch = crop(h, positions, batch, window + 1)
            window = None
        hidden = attention.Wqkv.in_features
        q = project(own, attention.Wqkv, part=slice(0, hidden)).unflatten(-1, (1, -1, dim))
        kv = project(h, attention.Wqkv, part=slice(hidden, None)).unflatten(-1, (2, -1, dim))
        (q,), (k, v) = turned(q, own_rope, 1), turned(kv, (cos, sin, positions), 1)
    drop = attention.attention_dropout if layer.training else 0.0
    context = attend(q, k, v, batch, dim, drop, rows, window=window)
    x, h = add_then_norm(project(context, attention.Wo), x, attention.out_drop, layer.mlp_norm,
                         h.dtype)
    inner = gated(project(h, layer.mlp.Wi), layer.mlp)
    return add_then_norm(project(inner, layer.mlp.Wo), x, None, norm_after, dtype or h.dtype)


def attend(q, k, v, batch, head_dim, drop, rows, **how):
    """varlen_attention over heads split from [rows, hidden], or split already -> [rows, hidden]."""
    q, k, v = (t if t.dim() == 3 else t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))
    if rows is not None:
        pairs = torch.arange(len(batch.lengths) + 1, dtype=torch.int32, device=q.device)
        how |= {"cu_seqlens_q": pairs, "max_seqlen_q": 1}
    return varlen_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, lengths=batch.lengths,
                            dropout=probability(drop), **how).flatten(1)


def probability(drop) -> float:
    """What a dropout (a module, a number or None) does now."""
    if isinstance(drop, nn.Dropout):
        return drop.p if drop.training else 0.0
    return drop if isinstance(drop, float) else 0.0


def draws(drop, device) -> dict:
    """The arguments of a fused kernel that drops."""
    if not (p := probability(drop)):
        return {}
    seed, site = next_draw(device)
    return {"dropout": p, "seed": seed, "site": site}


def fuses(x) -> bool:
    return on_gpu(x.device) and x.dtype != torch.float64


def add_norm(project, inner, out, x) -> Stream:
    """LayerNorm(x + dropout(dense(inner))), the modules those of `out`, x a Stream."""
    norm = out.LayerNorm
    if fuses(x.wide):
        from kernels import fused

        branch = project(inner, out.dense, bias=False)
        return Stream(*fused.add_norm(branch, x.wide, norm.weight, norm.bias, norm.eps,
                                      branch_bias=out.dense.bias, dtype=x.narrow.dtype,
                                      **draws(out.dropout, branch.device)))
    y = norm(add_(out.dropout(project(inner, out.dense)), x.wide))
    return Stream(y, y)


def add_then_norm(branch, x, drop, norm, dtype):
    """x + drop(branch), and norm of it in dtype."""
    if fuses(branch):
        from kernels import fused

        return fused.add_norm(branch, x, norm.weight, norm.bias, norm.eps, dtype=dtype,
                              pre_norm=True, **draws(drop, branch.device))
    x = add_(branch if drop is None else drop(branch), x)
    return x, norm(x)


def gated(x, mlp):
    """act(first half) * second half of x [rows, 2 n], ModernBERT's feed-forward."""
    if fuses(x) and isinstance(mlp.act, GELUActivation) and not probability(mlp.drop):
        from kernels import fused

        return fused.geglu(x)
    inner, gate = x.chunk(2, -1)
    return mlp.drop(mlp.act(inner) * gate)


def turned(x, rope, parts):
    """The n parts of x [rows, n, heads, head_dim], the first `parts` turned by their positions,
    computed in fp32 (Su et al. 2021, eq. 34). rope: cos and sin [positions, head_dim] fp32,
    positions [rows]."""
    if fuses(x):
        from kernels import fused

        return fused.rotary(x, *rope, parts=parts)
    cos, sin = (table[rope[2]][:, None] for table in rope[:2])

    def turn(part):
        wide = part.float()
        first, second = wide.chunk(2, -1)
        return (wide * cos + torch.cat((-second, first), -1) * sin).to(part.dtype)

    return [turn(part) if i < parts else part for i, part in enumerate(x.unbind(1))]


def add_(fresh, x):
    """fresh + x, in the memory of `fresh` (a product's own output: no backward pass reads it) where
    types allow."""
    return fresh.add_(x) if fresh.dtype == x.dtype else fresh + x


def wide(x):
    """x in fp32 if it is narrower."""
    return x.float() if x.dtype.itemsize < 4 else x


class Dropout(nn.Dropout):
    """nn.Dropout that draws from the generator of `kernels.attention.dropout_from` where a thread
    has one."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def crop(h, positions, batch, longest):
    """The first `longest` rows of every pair."""
    lengths = [min(length, longest) for length in batch.lengths]
    kept = batch.cu_seqlens.diff().long().clamp(max=longest)
    starts = cumulative(kept)
    index = torch.arange(sum(lengths), device=h.device) + torch.repeat_interleave(
        batch.cu_seqlens[:-1].long() - starts[:-1], kept, output_size=sum(lengths))
    cropped = replace(batch, cu_seqlens=starts.to(torch.int32), lengths=lengths)
    return h[index], positions[index], cropped


def cumulative(lengths):
    return F.pad(lengths.cumsum(0), (1, 0))


@lru_cache(maxsize=1024)
def distance_slots(longest, buckets, span, device):
    """DeBERTa: the lowest and the highest slot of the distances 1 - longest .. longest - 1, and the
    slots of them all [2 longest - 1], counted from the lowest.

    The slots come from Hugging Face's own operation: a logarithm and a ceiling that must not be
    redone differently.
    """
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    with torch.inference_mode(False):  # kept: training may come after scoring
        distance = torch.arange(1 - longest, longest)
        if buckets > 0:
            distance = make_log_bucket_position(distance, buckets, span).long()
            span = buckets
        slots = (distance + span).clamp(0, 2 * span - 1)
        low, high = int(slots[0]), int(slots[-1])  # slots grow with the distance
        slots = slots - low
        return low, high, slots.int().to(device) if on_gpu(device) else slots


def product_groups(body, on_cls: bool) -> list[tuple[nn.Linear, ...]]:
    """The linear maps of an encoder, those of one input together. on_cls: the last layer's queries
    have an input of their own, the [CLS] rows."""
    layers = body.layers if hasattr(body, "layers") else body.encoder.layer
    groups = [(body.embeddings_project,)] if hasattr(body, "embeddings_project") else []
    for layer in layers:
        maps = [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
        linears = {name.rsplit(".", 1)[-1]: m for name, m in maps}
        joined = [linears[name] for name in linears if name in ("query", "query_proj")]
        others = ("key", "key_proj", "value", "value_proj")
        joined += [linears[name] for name in linears if name in others]
        alone = [m for _, m in maps if m not in joined]
        if joined and on_cls and layer is layers[-1]:
            groups += [tuple(joined[:1]), tuple(joined[1:])]
        elif joined:
            groups.append(tuple(joined))
        groups += [(linear,) for linear in alone]
    return groups
