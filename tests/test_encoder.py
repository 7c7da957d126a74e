"""The packed encoder against Hugging Face's padded eager forward, for every architecture."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from kernels import layers
from kernels.attention import DisentangledBias, dropout, dropout_from, varlen_attention
from kernels.cpu import in_threads
from kernels.encoder import CrossEncoder, NonFiniteScores, default_max_tokens, micro_batches
from kernels.loading import ModelError, check_config

WORDS = [f"w{i}" for i in range(90)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
         "intermediate_size": 48, "vocab_size": 100, "num_labels": 1,
         "attn_implementation": "eager"}
LONG = {"max_position_embeddings": 700, "layer_norm_eps": 1e-6}
DEBERTA = LONG | {"relative_attention": True, "position_buckets": 256, "pos_att_type": "p2c|c2p",
                  "share_att_key": True, "norm_rel_ebd": "layer_norm",
                  "position_biased_input": False, "type_vocab_size": 0,
                  "max_position_embeddings": 512, "max_relative_positions": -1}
MODERN = {"max_position_embeddings": 700, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "cls_token_id": 1, "sep_token_id": 2,
          "attention_dropout": 0.1}  # not 0: the model has a second dropout after attention then
ROBERTA = LONG | {"type_vocab_size": 1, "pad_token_id": 1}


def deberta(**how):
    return hf.DebertaV2Config(**SMALL, **DEBERTA | how)


def modernbert(layers=3, **how):
    return hf.ModernBertConfig(**SMALL | {"num_hidden_layers": layers}, **MODERN, **how)


ONE_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_act": "relu"}
ARCHITECTURES = {
    "bert": hf.BertConfig(**SMALL, **LONG),
    "minilm": hf.BertConfig(**SMALL | ONE_LAYER, **LONG),
    "roberta": hf.RobertaConfig(**SMALL, **ROBERTA),
    "roberta-typed": hf.RobertaConfig(**SMALL, **ROBERTA | {"type_vocab_size": 2}),
    "xlm-roberta": hf.XLMRobertaConfig(**SMALL, **ROBERTA),
    "electra": hf.ElectraConfig(**SMALL, **LONG, embedding_size=32),
    "electra-projected": hf.ElectraConfig(**SMALL, **LONG, embedding_size=24),
    "modernbert": modernbert(layers=4),
    "modernbert-mean": modernbert(classifier_pooling="mean", attention_bias=True),
    "modernbert-last-local": modernbert(),
    "modernbert-narrow": modernbert(local_attention=16),
    "deberta": deberta(),
    "deberta-own-keys": deberta(share_att_key=False, norm_rel_ebd="none"),
    "deberta-c2p": deberta(pos_att_type="c2p", type_vocab_size=2),
    "deberta-p2c": deberta(pos_att_type="p2c", position_buckets=-1, max_relative_positions=40),
    "deberta-absolute": deberta(position_biased_input=True, position_buckets=16,
                                max_position_embeddings=700, embedding_size=24),
}  # fmt: skip
# tokens of query and document: pairs of 3 and 4 tokens, equal neighbours, both sides of
# ModernBERT's window of 64, DeBERTa's buckets beyond the identity (128) and beyond the largest
# distance of the configuration
SIDES = [(0, 0), (1, 0), (5, 9), (6, 8), (2, 60), (2, 61), (2, 62), (30, 100), (32, 256), (1, 1),
         (31, 560)]  # fmt: skip


def word_tokenizer(model_type, words=WORDS):
    """A word-level tokenizer with the family's special tokens and its own pair template."""
    roberta = model_type in ("roberta", "xlm-roberta")
    if roberta:
        first = cls, pad, sep, unk = ["<s>", "<pad>", "</s>", "<unk>"]
    else:
        first = pad, cls, sep, unk = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(first + words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    second = 0 if roberta or model_type == "modernbert" else 1
    between = f"{sep} {sep}" if roberta else sep
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {between} $B:{second} {sep}:{second}",
        special_tokens=[(t, backend.token_to_id(t)) for t in (cls, sep)])
    names = ["input_ids", "attention_mask"]
    if second == 1:
        names.append("token_type_ids")
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, cls_token=cls, sep_token=sep,
                                      pad_token=pad, unk_token=unk, model_input_names=names,
                                      model_max_length=700)


def build(name, dropout=0.0):
    """A random model, no weight near its usual small start, so that every term matters."""
    torch.manual_seed(7)
    model = hf.AutoModelForSequenceClassification.from_config(ARCHITECTURES[name])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm_weight = parameter.dim() == 1 and parameter_name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.3 + is_norm_weight)
    set_dropout(model, dropout)
    return CrossEncoder(model, word_tokenizer(model.config.model_type), 32, 600).eval()


def set_dropout(model, p):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = p


def random_sides(sides, seed=3):
    rng = np.random.default_rng(seed)
    return tuple([rng.integers(4, 94, n).astype(np.int32) for n in side]
                 for side in zip(*sides, strict=True))


def padded_logits(encoder, queries, documents):
    """Hugging Face's forward over one padded batch, in the tokenizer's own pair format."""
    tokenizer = encoder.tokenizer

    def text(ids):
        return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))

    batch = tokenizer([text(q) for q in queries], [text(d) for d in documents], padding=True,
                      return_tensors="pt")
    return encoder.model(**batch).logits.squeeze(-1)


def bge(folder):
    """A folder as BAAI/bge-reranker-v2-m3 is laid out, small, with pieces of its own."""
    texts = Path(layers.__file__).read_text(encoding="utf-8").splitlines()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("QQ", "w")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False))
    backend.add_special_tokens([*special, "<mask>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 8192,
                "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = ROBERTA | {"max_position_embeddings": 8194, "bos_token_id": 0, "eos_token_id": 2}
    config = hf.XLMRobertaConfig(**SMALL | {"vocab_size": backend.get_vocab_size()}, **shape)
    torch.manual_seed(7)
    model = hf.XLMRobertaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model, backend


def test_a_re_ranker_of_bges_shape(tmp_path):
    """XLM-RoBERTa: one token type, 8,192 positions from 2 on, two separators, SentencePiece's
    pieces; transformers 5 alone drops the steps of its tokenizer.json."""
    model, backend = bge(tmp_path / "m")
    encoder = CrossEncoder.from_pretrained(tmp_path / "m", device="cpu", doc_length=2000)
    assert encoder.max_positions == 8192 and encoder.new_weights == []
    queries = ["packed encoder", "QQhat is it", "\ufb01ne", "w"]
    documents = ["the  padded eager forward ", "a test " * 300, "\u4e1c\u4eac", ""]
    sides = [encoder.tokenize(texts, None) for texts in (queries, documents)]
    rows = [backend.encode(*pair).ids for pair in zip(queries, documents, strict=True)]
    packed = encoder.pack(*sides)
    assert packed.input_ids.tolist() == sum(rows, []) and not packed.token_types.any()
    assert packed.positions[: len(rows[0])].tolist() == [*range(2, 2 + len(rows[0]))]
    assert len(rows[1]) > 600
    assert "".join(map(backend.id_to_token, rows[1])).startswith("<s>\u2581what\u2581is")
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        expected = model(ids, attention_mask=(ids != 1).long()).logits.squeeze(-1)
    assert expected.std() > 0.05, "the test would not see a wrong model"
    torch.testing.assert_close(encoder.score(queries, documents), expected, rtol=1e-5, atol=1e-5)


DAILY = ("bert", "roberta", "electra-projected", "modernbert-mean", "modernbert-narrow",
         "deberta", "deberta-own-keys")
CASES = [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow)
         for name in ARCHITECTURES]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_padded_eager(name):
    encoder = build(name)
    queries, documents = random_sides(SIDES)
    with torch.no_grad():
        expected = padded_logits(encoder, queries, documents)
        assert expected.std() > 0.05, "the test would not see a wrong model"
        packed = encoder.pack(queries, documents)
        assert packed.lengths == [encoder.pair_length(*sides) for sides in SIDES]
        assert packed.max_seqlen == max(packed.lengths)
        torch.testing.assert_close(encoder(packed), expected, rtol=1e-5, atol=1e-5)
        for i in (0, 3, 10):  # batches of one
            alone = encoder(encoder.pack(queries[i : i + 1], documents[i : i + 1]))
            torch.testing.assert_close(alone, expected[i : i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_padded_eager(name):
    """Every parameter's gradient, in float64, where only a wrong formula can make a difference.

    But for ModernBERT: Hugging Face's eager softmax there is fp32 and turns a float64 mask of
    padding into NaN.
    """
    encoder = build(name)
    if "modernbert" not in name:
        encoder.model.double()
    sides = SIDES[:-1]
    queries, documents = random_sides(sides, seed=4)
    weight = torch.randn(len(sides), generator=torch.Generator().manual_seed(1))

    def gradients(logits):
        encoder.zero_grad()
        (logits * weight).sum().backward()
        return {n: p.grad for n, p in encoder.model.named_parameters()}

    expected = gradients(padded_logits(encoder, queries, documents))
    got = gradients(encoder(encoder.pack(queries, documents)))
    largest = max(float(e.abs().max()) for e in expected.values() if e is not None)
    # 1.03e-5 there for ModernBERT in fp32
    near = 2e-5 if hf.__version__.startswith("5.17") else 1e-5
    for n, e in expected.items():
        if e is None:
            assert got[n] is None, n
            continue
        # relative to the parameter's own largest, with a floor: key biases are zero by construction
        scale = max(float(e.abs().max()), 1e-6 * largest)
        error = float((got[n] - e).abs().max()) / scale
        assert error <= near, f"{n}: {error:.2e}"


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "modernbert", "modernbert-mean",
                                  "deberta-own-keys"])
def test_every_dropout_is_applied(name):
    """Each dropout of Hugging Face's model, alone: where it changes its logits it changes ours."""
    encoder = build(name)
    queries, documents = random_sides(SIDES[2:7])
    packed = encoder.pack(queries, documents)
    encoder.train()
    modules = list(encoder.model.modules())
    places = [(m, "p") for m in modules if isinstance(m, nn.Dropout)]
    places += [(m, "attention_dropout") for m in modules if hasattr(m, "attention_dropout")]
    assert len(places) > 6
    with torch.no_grad():
        for place, attribute in places:
            set_dropout(encoder.model, 0.0)
            setattr(place, attribute, 0.5)
            torch.manual_seed(5)
            theirs, again = (padded_logits(encoder, queries, documents) for _ in range(2))
            ours, anew = encoder(packed), encoder(packed)
            assert ours.equal(anew) == theirs.equal(again), place


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta"])
def test_dropout_follows_the_generator(name):
    encoder = build(name, dropout=0.2).train()
    packed = encoder.pack(*random_sides(SIDES[2:8]))
    state = torch.get_rng_state()
    with torch.no_grad():
        first = encoder(packed)
    torch.set_rng_state(state)
    again = encoder(packed)  # with gradient: the second pass of a long list
    torch.testing.assert_close(first, again, rtol=0, atol=1e-6)
    assert not torch.allclose(first, encoder(packed), atol=1e-3)
    encoder.eval()
    assert encoder(packed).equal(encoder(packed))


def test_dropout_of_a_thread_is_its_own():
    """Four threads at once, each by its own seed: a thread's own masks, torch's generator as is."""
    x = torch.ones(50, 70)

    def draw(seed):
        with dropout_from(seed, x.device):
            return [dropout(x, 0.3) for _ in range(20)]

    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(4)))
    kept = round(0.7 * 65536)
    factor = torch.tensor(65536 / kept).item()
    for seed, drawn in enumerate(together):
        assert all(map(torch.equal, drawn, draw(seed)))
        masks = torch.stack(drawn)
        assert set(masks.unique().tolist()) == {0.0, factor}
        share = float((masks > 0).double().mean())
        assert share == pytest.approx(kept / 65536, abs=0.008)  # 4.6 standard deviations
    assert torch.equal(torch.get_rng_state(), state)
    (first, second, *_), (other, *_), *_ = together
    assert not torch.equal(first, second) and not torch.equal(first, other)
    with dropout_from(3, x.device):
        y = torch.randn(40, 9, requires_grad=True)
        out = dropout(y, 0.4)
    (gradient,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(gradient, (out / y).detach())
    with dropout_from(0, x.device):
        assert dropout(x, 1.0).eq(0).all() and dropout(x, 0.0).equal(x)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_with_dropout_is_the_formula(window):
    """Masks of the same draws, probabilities and product written out per sequence, in float64."""
    torch.manual_seed(2)
    lengths = [6, 6, 1, 9]
    q, k, v = torch.randn(3, 22, 2, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with dropout_from(11, q.device):
        out = varlen_attention(q, k, v, cu_seqlens, 9, window=window, scale=0.7, dropout=0.4)
    expected = torch.zeros_like(out)
    runs = [(0, 2, 6), (12, 1, 1), (13, 1, 9)]  # equal lengths side by side
    with dropout_from(11, q.device):
        masks = [dropout(torch.ones(n, 2, length, length, dtype=torch.float64), 0.4)
                 for _, n, length in runs]  # fmt: skip
    for (start, n, length), mask in zip(runs, masks, strict=True):
        for m in range(n):
            rows = slice(start + m * length, start + (m + 1) * length)
            for h in range(2):
                scores = 0.7 * q[rows, h] @ k[rows, h].T
                for i in range(length):
                    for j in range(length):
                        if window is not None and abs(i - j) > window:
                            scores[i, j] = -torch.inf
                expected[rows, h] = (scores.softmax(1) * mask[m, h]) @ v[rows, h]
    torch.testing.assert_close(out, expected)


def test_attention_in_bf16_has_the_gradients_of_fp64():
    """Training in bf16 takes another way than scoring: all within bf16's rounding."""
    torch.manual_seed(3)
    cu_seqlens = torch.tensor([0, 70, 140, 143, 200], dtype=torch.int32)
    q, k, v, up = torch.randn(4, 200, 2, 32, dtype=torch.float64).bfloat16()
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    narrow = [t.clone().requires_grad_() for t in (q, k, v)]
    outs = [varlen_attention(*side, cu_seqlens, 70) for side in (exact, narrow)]
    (outs[0] * up).sum().backward()
    (outs[1] * up).sum().backward()
    assert outs[1].dtype == torch.bfloat16
    gradients = [(a.grad, b.grad) for a, b in zip(narrow, exact, strict=True)]
    for got, want in [(outs[1], outs[0]), *gradients]:
        assert (got.double() - want).norm() < 2**-6 * want.norm()


def test_attention_dropout_keeps_the_expectation():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 8)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    plain = varlen_attention(q, k, v, cu_seqlens, 7)
    draws = torch.stack([varlen_attention(q, k, v, cu_seqlens, 7, dropout=0.3)
                         for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), plain, rtol=0, atol=0.06)
    zeros, ones, cu_seqlens = torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([0, 1])
    kept = torch.stack([varlen_attention(zeros, zeros, ones, cu_seqlens, 1, dropout=0.3)
                        for _ in range(2000)])
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
    assert float((kept == 0).float().mean()) == pytest.approx(0.3, abs=0.04)


def test_varlen_attention_is_the_formula():
    """Against softmax written out per sequence in float64, with a window; the first row alone."""
    torch.manual_seed(1)
    lengths = [4, 4, 1, 9, 30]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = torch.randn(3, sum(lengths), 3, 8, dtype=torch.float64)
    for window in (None, 0, 2, 40):
        out = varlen_attention(q, k, v, cu_seqlens, 30, window=window, scale=0.7)
        for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
            for i in range(length):
                for h in range(3):
                    near = [j for j in range(length) if window is None or abs(i - j) <= window]
                    scores = torch.stack([0.7 * (q[start + i, h] * k[start + j, h]).sum()
                                          for j in near])
                    weights = zip(scores.softmax(0), near, strict=True)
                    expected = sum(weight * v[start + j, h] for weight, j in weights)
                    torch.testing.assert_close(out[start + i, h], expected)
    starts = cu_seqlens[:-1].long()
    one = varlen_attention(q[starts], k, v, cu_seqlens, 30, lengths=lengths, max_seqlen_q=1,
                           cu_seqlens_q=torch.arange(6, dtype=torch.int32))
    torch.testing.assert_close(one, varlen_attention(q, k, v, cu_seqlens, 30)[starts])
    with pytest.raises(ValueError, match="crop the keys"):
        varlen_attention(q[starts], k, v, cu_seqlens, 30, window=2, max_seqlen_q=1,
                         cu_seqlens_q=starts)


def test_the_call_of_flash_attn_is_that_of_its_source(monkeypatch):
    """A stand-in with the parameters of flash_attn_varlen_func in flash-attn 2.8.3's source
    distribution, over fake CUDA tensors: which inputs go there, and with what."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels import attention

    calls = []

    # no defaults beyond those of the source: what is passed must exist there
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               dropout_p=0.0, softmax_scale=None, causal=False,
                               window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):
        calls.append(dict(locals()))
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_attn_varlen_func)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("ATTENTION", "flash-attn")
    with FakeTensorMode():
        q, k, v = torch.empty(3, 9, 2, 64, device="cuda", dtype=torch.bfloat16)
        cu, ones = (torch.empty(4, device="cuda", dtype=torch.int32) for _ in range(2))
        out = varlen_attention(q, k, v, cu, 5, window=64, dropout=0.1, deterministic=True)
        assert out.shape == q.shape
        row = torch.empty(3, 2, 64, device="cuda", dtype=torch.bfloat16)
        varlen_attention(row, k, v, cu, 5, cu_seqlens_q=ones, max_seqlen_q=1, scale=0.5)
        expected = dict(max_seqlen_k=5, causal=False, softcap=0.0, return_attn_probs=False)
        whole, first = calls
        for call in calls:
            assert call["k"] is k and call["v"] is v and call["cu_seqlens_k"] is cu
            assert {name: call[name] for name in expected} == expected
        assert whole["cu_seqlens_q"] is cu and first["cu_seqlens_q"] is ones
        expected = dict(max_seqlen_q=5, window_size=(64, 64), dropout_p=0.1,
                        softmax_scale=64**-0.5, deterministic=True)
        assert {name: whole[name] for name in expected} == expected
        expected = dict(max_seqlen_q=1, window_size=(-1, -1), dropout_p=0.0, softmax_scale=0.5,
                        deterministic=False)
        assert {name: first[name] for name in expected} == expected


def test_the_choice_of_a_back_end(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels import attention

    monkeypatch.setattr(attention, "torch_has_flash_attention", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention, "flash_attn_varlen_func", object())
    monkeypatch.delenv("ATTENTION", raising=False)
    bias = DisentangledBias(torch.zeros(3, 2, 64), None, torch.zeros(9))
    with FakeTensorMode():
        q = torch.empty(9, 2, 64, device="cuda", dtype=torch.bfloat16)
        others = [torch.empty(9, 2, 64, device="cuda"),
                  torch.empty(9, 2, 60, device="cuda", dtype=torch.bfloat16),
                  torch.empty(9, 2, 264, device="cuda", dtype=torch.float16), torch.empty(9, 2, 64)]
    long = {"dropout": 0.1, "longest": 512}
    assert attention.backend(q, **long) == attention.backend(q.half(), **long) == "torch"
    assert attention.backend(q) == attention.backend(q, dropout=0.1, longest=384) == "triton"
    assert attention.backend(q, longest=512) == attention.backend(q, window=64, **long) == "triton"
    assert attention.backend(q, deterministic=True, **long) == "triton"
    assert all(attention.backend(x, bias, **long) == "triton" for x in (q, *others))
    assert all(attention.backend(x, **long) == "triton" for x in others)
    for wanted in ("torch", "triton", "flash-attn"):
        monkeypatch.setenv("ATTENTION", wanted)
        assert attention.backend(q) == wanted and attention.backend(q, bias) == "triton"
    assert attention.backend(q, deterministic=True) == "flash-attn"
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    with pytest.raises(ValueError, match="not installed"):
        attention.backend(q)
    monkeypatch.setattr(attention, "torch_has_flash_attention", lambda: False)
    monkeypatch.setenv("ATTENTION", "torch")
    with pytest.raises(ValueError, match="no FlashAttention-2"):
        attention.backend(q)
    monkeypatch.setenv("ATTENTION", "sdpa")
    with pytest.raises(ValueError, match="ATTENTION=sdpa: choose"):
        attention.backend(q)
    monkeypatch.delenv("ATTENTION")
    assert attention.backend(q, **long) == "triton"
    monkeypatch.setattr(attention, "torch_has_flash_attention", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert attention.backend(q, **long) == "triton"


def test_the_schema_of_torchs_flash_attention():
    """The private operator is known in every torch this runs under; no other is taken for it."""
    from kernels import attention

    schema = torch.ops.aten._flash_attention_forward.default._schema
    assert attention.flash_schema_is_known(schema)
    text = str(schema)
    for was, now in [("cum_seq_q", "cu_seqlens_q"), ("SymInt? window_size_left=None, ", ""),
                     ("is_causal", "causal")]:
        assert was in text
        assert not attention.flash_schema_is_known(torch._C.parse_schema(text.replace(was, now)))
    more = text.replace(") -> (", ", bool more=False) -> (")
    assert attention.flash_schema_is_known(torch._C.parse_schema(more))
    required = text.replace("window_size_left=None", "more, SymInt? x=None")
    assert not attention.flash_schema_is_known(torch._C.parse_schema(required))


@pytest.mark.parametrize("case", ["full", "window", "one row", "dropout"])
def test_torchs_flash_attention_takes_what_the_encoder_has(case, monkeypatch):
    """On tensors without numbers: shapes, dtypes, gradients that arrive at the sliced product."""
    from kernels import attention

    monkeypatch.setattr(attention, "_gpu_path", True)
    monkeypatch.setattr(attention, "backend", lambda *args: "torch")
    product = torch.empty(90, 3, 12, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    (q, k, v), cu = product.unbind(1), torch.empty(6, dtype=torch.int32, device="meta")
    leaves, how = [product], {"window": {"window": 64}, "dropout": {"dropout": 0.1}}.get(case, {})
    if case == "one row":
        q = torch.empty(5, 12, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        leaves, how = [product, q], {"cu_seqlens_q": torch.empty_like(cu), "max_seqlen_q": 1}
    out = varlen_attention(q, k, v, cu, 30, **how)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert "FlashAttention" in out.grad_fn.name()
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.float().sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta"])
def test_bf16_autocast_is_close(name):
    encoder = build(name)
    packed = encoder.pack(*random_sides(SIDES))
    with torch.no_grad():
        exact = encoder(packed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = encoder(packed)
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).abs().max()) < 0.15 * float(exact.std()) + 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(packed).sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_micro_batches():
    lengths = [5, 100, 7, 7, 30, 3, 250, 30]
    batches = micro_batches(lengths, 64)
    assert sorted(i for b in batches for i in b) == list(range(8))
    assert [[lengths[i] for i in b] for b in batches] == [[250], [100], [30, 30], [7, 7, 5, 3]]
    assert batches[3][:2] == [2, 3]  # ties keep their order
    assert micro_batches([32, 32], 64) == [[0, 1]] and micro_batches([], 64) == []
    assert 1024 <= default_max_tokens("cpu", True) < default_max_tokens("cuda", True)


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("pairs, most", [(1, 2048), (3, 2048), (200, 2048), (200, 4096), (400, 300),
                                         (4000, 4096)])
def test_micro_batches_of_threads_are_alike(threads, pairs, most):
    lengths = np.random.default_rng(pairs).integers(3, 260, pairs).tolist()
    batches = micro_batches(lengths, most, threads)
    assert sorted(i for b in batches for i in b) == list(range(pairs))
    sizes = [sum(lengths[i] for i in b) for b in batches]
    assert max(sizes) <= max(most, max(lengths))
    if sum(lengths) > 1024 * threads and most > 600:
        assert len(batches) % threads == 0 and max(sizes) - min(sizes) <= 2 * max(lengths)
    elif sum(lengths) > 1024 and most > 1024:
        assert min(sizes) >= 1024 - max(lengths)
    assert [lengths[i] for b in batches for i in b] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_scores_keep_their_order_and_mode(name):
    encoder = build(name, dropout=0.3).train()
    queries, documents = random_sides(SIDES * 2, seed=9)
    with torch.no_grad():
        pairs = zip(queries, documents, strict=True)
        expected = torch.cat([encoder.eval()(encoder.pack([q], [d])) for q, d in pairs])
    encoder.train()
    for budget in (1, 100, 700, None):
        scores = encoder.score_tokens(queries, documents, max_tokens=budget)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert encoder.training and encoder.model.training
    scores.sub_(1)  # an ordinary tensor, not one of inference mode
    assert encoder.score_tokens([], []).shape == (0,)
    texts = [" ".join(encoder.tokenizer.convert_ids_to_tokens(i.tolist()))
             for i in (*queries, *documents)]
    n = len(queries)
    torch.testing.assert_close(encoder.score(texts[:n], texts[n:]), expected, rtol=1e-5, atol=1e-5)


def test_weights_changed_in_place_are_seen():
    """The joined query, key and value weights are kept between calls; never stale ones."""
    encoder = build("bert")
    sides = random_sides(SIDES)
    before = encoder.score_tokens(*sides)
    with torch.no_grad():
        encoder.model.bert.encoder.layer[0].attention.self.key.weight.mul_(0.5)
    after = encoder.score_tokens(*sides)
    assert not torch.allclose(before, after, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(after, padded_logits(encoder, *sides), rtol=1e-5, atol=1e-5)


def test_a_longer_limit_than_the_model_has_positions_is_not_saved(tmp_path):
    encoder = build("roberta")
    encoder.doc_length = 10_000
    encoder.save_pretrained(tmp_path)
    assert hf.AutoTokenizer.from_pretrained(tmp_path).model_max_length == 698


def test_lone_surrogates_are_replaced():
    encoder = build("bert")
    encoder.tokenizer.add_tokens(["\ufffd"])
    marked = encoder.tokenize(["w1 \ufffd w2"], None)[0].tolist()
    assert [t.tolist() for t in encoder.tokenize(["w1 \ud83d w2", "w3"], None)] == [marked, [7]]
    assert 3 not in marked
    score, same = (encoder.score([query], ["w2"]) for query in ("w1 \udc00", "w1 \ufffd"))
    assert score.equal(same)


def test_truncation_is_per_side_and_counted():
    encoder = build("bert")
    assert [t.tolist() for t in encoder.tokenize(["w0 w1 w2", "", "w3"], 2)] == [[4, 5], [], [7]]
    assert encoder.truncated == 1
    long_query, document = " ".join(["w1"] * 50), "w2 w3"
    packed = encoder.pack(encoder.tokenize([long_query], encoder.query_length),
                          encoder.tokenize([document], 600))
    assert packed.lengths == [32 + 2 + 3] and packed.input_ids.tolist()[-3:] == [6, 7, 2]


def test_non_finite_scores_are_named():
    encoder = build("bert")
    with torch.no_grad():
        encoder.model.bert.embeddings.word_embeddings.weight[50] = torch.nan
    queries = [np.array([5, 6], dtype=np.int32)] * 4
    documents = [np.array(ids, dtype=np.int32) for ids in ([7], [8, 50], [9], [50])]
    with pytest.raises(NonFiniteScores) as error:
        encoder.score_tokens(queries, documents)
    assert error.value.pairs == [1, 3]


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "electra-projected", "modernbert-mean",
                                  "deberta-own-keys"])
def test_saved_folder_gives_peers_the_same_score(name, tmp_path):
    """Of a document that is cut too: peers cut where the training did."""
    encoder = build(name, dropout=0.1)
    encoder.query_length, encoder.doc_length = 9, 33
    queries = ["w1 w2 w3", "w4", "w1 w2 w3", "w1 w2 w3 w4 w5 w6 w7 w8 w9"]
    documents = ["w7 w8 w9 w1 w2", "w5 w5", "w80", " ".join(WORDS[:60])]
    scores = encoder.score(queries, documents)
    encoder.save_pretrained(tmp_path)
    again = CrossEncoder.from_pretrained(tmp_path)
    assert (again.query_length, again.doc_length) == (9, 33)
    assert again.new_weights == [] and not again.training
    torch.testing.assert_close(again.score(queries, documents), scores, rtol=0, atol=1e-6)
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == encoder.pair_length(9, 33)
    batch = tokenizer(queries, documents, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits.squeeze(-1), scores, rtol=0, atol=1e-5)
    peers = pytest.importorskip("sentence_transformers")
    peer = peers.CrossEncoder(str(tmp_path), device="cpu")
    predicted = peer.predict(list(zip(queries, documents, strict=True)), convert_to_tensor=True)
    torch.testing.assert_close(predicted.cpu(), scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra-projected", "modernbert-mean",
                                  "deberta-own-keys"])
def test_scores_are_not_rounded_to_bf16(name, tmp_path):
    """Of 60 scores some would tie, and all would be bf16 numbers; they stay near those of fp32."""
    encoder = build(name)
    rng = np.random.default_rng(3)
    sides = random_sides([(int(rng.integers(1, 9)), int(rng.integers(1, 40))) for _ in range(60)])
    exact = encoder.score_tokens(*sides)
    encoder.save_pretrained(tmp_path)
    narrow = CrossEncoder.from_pretrained(tmp_path, dtype="bfloat16", device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder.score_tokens(*sides)
    for scores in (narrow.score_tokens(*sides), cast):
        assert scores.dtype == torch.float32 and len(scores.unique()) == 60
        assert (scores != scores.bfloat16().float()).sum() > 50
        assert (scores - exact).abs().max() < 0.2 * exact.std()


GROWTH = """
import numpy as np, torch, transformers
from kernels import cpu
cpu.prepare(training=False)
from bench.scoring import MINILM, word_tokenizer
from kernels.encoder import CrossEncoder
torch.set_num_threads(1)
config = transformers.BertConfig(**MINILM | {"num_hidden_layers": 2}, vocab_size=5004, num_labels=1)
model = transformers.BertForSequenceClassification(config).eval()
encoder = CrossEncoder(model, word_tokenizer(config.vocab_size))
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20
for k in range(60):
    n = 8 + k % 9
    encoder.score_tokens([np.arange(4, 10)] * n, [np.arange(4, 90 + k)] * n)
    if k == 19:
        before = resident()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_different_micro_batches():
    """Neither by what oneDNN keeps of each: by 240 MiB of machine code with an unbounded cache."""
    root = Path(__file__).resolve().parents[1]
    env = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 80


def test_scores_do_not_depend_on_the_number_of_threads():
    encoder = build("bert")
    rng = np.random.default_rng(3)
    sides = random_sides([(int(rng.integers(1, 9)), int(rng.integers(1, 40))) for _ in range(60)])
    threads, scores = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            scores.append(encoder.score_tokens(*sides, max_tokens=100))
            assert torch.get_num_threads() == number
            # a setting of the thread, which those inside must share
            with torch.autocast("cpu", torch.bfloat16):
                scores.append(encoder.score_tokens(*sides, max_tokens=100))
    finally:
        torch.set_num_threads(threads)
    for exact, cast in (scores[2:4], scores[4:]):
        assert exact.equal(scores[0]) and cast.equal(scores[1])
    assert not scores[0].equal(scores[1])


def test_threads_are_kept_from_call_to_call_wait_for_each_other_and_do_not_live_in_a_fork():
    threads, running = torch.get_num_threads(), []
    barrier = threading.Barrier(2)

    def together(i):
        barrier.wait(30)
        return i, threading.get_ident()

    def fails_first(i):
        if i == 0:
            raise KeyError("the first")
        time.sleep(0.2)
        running.append(torch.get_num_threads())

    try:
        torch.set_num_threads(2)
        first, second = (list(in_threads(together, range(4))) for _ in range(2))
        assert [i for i, _ in first] == [0, 1, 2, 3]
        idents = [{thread for _, thread in done} for done in (first, second)]
        assert len(idents[0]) == 2 and idents[0] == idents[1]
        with pytest.raises(KeyError, match="the first"):
            list(in_threads(fails_first, range(2)))
        # the second was waited for, with a core of its own
        assert running == [1] and torch.get_num_threads() == 2
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=lambda: list(in_threads(together, range(2))))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    finally:
        torch.set_num_threads(threads)


def test_unsupported_backbones_are_refused():
    for config, what in [
        (hf.DistilBertConfig(num_labels=1), "distilbert"),
        (hf.BertConfig(num_labels=2), "2 labels"),
        (hf.BertConfig(num_labels=1, is_decoder=True), "decoder"),
        (hf.DebertaV2Config(num_labels=1, **DEBERTA, conv_kernel_size=3), "conv_kernel_size"),
        (hf.DebertaV2Config(num_labels=1), "relative_attention"),
    ]:
        with pytest.raises(ModelError, match=what) as error:
            check_config(config)
        assert "what works: BERT" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ModelError, match="lower --query-length"):
        CrossEncoder(build("bert").model, word_tokenizer("bert"), 300, 600)
    with pytest.raises(ModelError, match="600 tokens: the model has|of 703 tokens"):
        encoder = build("bert")
        encoder.pack(*random_sides([(100, 600)]))


def test_a_tokenizer_of_another_pair_format_is_refused():
    tokenizer = word_tokenizer("bert")
    with pytest.raises(ModelError, match="pair encoding"):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
        CrossEncoder(build("bert").model, tokenizer)
    with pytest.raises(ModelError, match="token types"):
        CrossEncoder(build("bert").model, word_tokenizer("modernbert"))
    for own, other in [("bert", "roberta"), ("roberta", "bert")]:
        what = f"not {own}'s .* put the model's own tokenizer files there"
        with pytest.raises(ModelError, match=what):
            CrossEncoder(build(own).model, word_tokenizer(other))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a model folder"):
        CrossEncoder.from_pretrained(tmp_path)
