"""CrossEncoder: a query and a document in, one fp32 logit out, without a padding token ever
computed.

Hugging Face's modules hold the weights; the layers are run here by hand over packed rows [tokens,
hidden], so one way serves training and scoring, CPU and GPU, and saving and loading stay Hugging
Face's own.
"""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from kernels.attention import on_gpu
from kernels.cpu import in_threads
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
from kernels.loading import (
    FAMILIES,
    ModelError,
    add_older_names,
    check_config,
    check_counts,
    check_weights,
    from_hub,
    quiet,
)
from kernels.modular import Modular, read_chain
from kernels.packing import Packed, default_max_tokens, micro_batches, to_host
from kernels.sigmoid import sigmoid_in_order
from kernels.tokenizers import check_deberta_tokenizer, check_vocabulary, load_tokenizer


class NonFiniteScores(FloatingPointError):
    """Scores that are NaN or infinite; `.pairs` lists the positions of the pairs concerned."""

    def __init__(self, pairs: list[int]):
        super().__init__(f"{len(pairs)} scores are not finite, the first of pair {pairs[0]}")
        self.pairs = pairs


def mean_of_pairs(x, batch):
    """x [tokens, hidden] -> [pairs, hidden], in fp32 at the least."""
    # unchecked: no waiting
    return torch.segment_reduce(wide(x), "mean", offsets=batch.cu_seqlens, axis=0, unsafe=True)


class CrossEncoder(nn.Module):
    """A Hugging Face ...ForSequenceClassification with one label, or a kernels.modular.Modular, and
    its fast tokenizer, run packed.

    query_length, doc_length: tokens kept of each side (special tokens come on top). `new_weights`
    names the parameters that were not in the files loaded (a fresh head). `truncated` counts the
    texts cut by tokenize.
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
        if model.dtype.itemsize < 4:  # the head in fp32: scores rounded to bf16 tie with each other
            for owner in (self.body, model):
                for part in ("pooler", "head", "classifier"):
                    if getattr(owner, part, None) is not None:
                        getattr(owner, part).float()
        self.train(model.training)
        check_vocabulary(tokenizer, model.config)
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        family = model.config.model_type
        self._before, self._between, self._after = [cls], [sep] * FAMILIES[family][1], [sep]
        roberta = family in ("roberta", "xlm-roberta")
        self._first_position = model.config.pad_token_id + 1 if roberta else 0
        # RoBERTa's tokenizers give 0 to both sides
        self._typed = not roberta and getattr(model.config, "type_vocab_size", 0) > 1
        if family == "deberta-v2":
            check_deberta_tokenizer(tokenizer)
        self._check_pair_format()
        longest = self.pair_length(query_length, doc_length)
        if longest > self.max_positions:
            raise ModelError(f"pairs of {query_length} + {doc_length} tokens and special tokens "
                             f"make {longest}, beyond the {self.max_positions} positions of the "
                             "model: lower --query-length or --doc-length")

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
        """Peers tokenise pairs with the tokenizer's own template: scores agree only if pack() makes
        the same ids."""
        query, document = self.tokenize(["what is this", "a test of it"], None)
        packed = self.pack([query], [document])
        own = self.tokenizer("what is this", "a test of it", return_token_type_ids=True)
        ids, types = packed.input_ids.tolist(), packed.token_types.tolist()
        if ids != own["input_ids"] or self._typed and types != own["token_type_ids"]:
            name = self.tokenizer.name_or_path or "the tokenizer"
            family = self.model.config.model_type
            raise ModelError(f"{name}: its own pair encoding or token types are not {family}'s "
                             "([CLS] query [SEP] document [SEP], types 0 and 1; RoBERTa: two "
                             "separators, types 0): it is another model's tokenizer, put the "
                             "model's own tokenizer files there")

    # --------------------------------------------------------------------------------------- tokens

    def tokenize(self, texts: list[str], max_length: int | None) -> list[np.ndarray]:
        """Token ids int32 of each text without special tokens, those beyond max_length dropped
        (None: all kept)."""
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
        special = len(self._before) + len(self._between) + len(self._after)
        return n_query_tokens + n_doc_tokens + special

    def pack(self, query_ids: list[np.ndarray], doc_ids: list[np.ndarray]) -> Packed:
        """The pairs as one packed batch in the backbone's own pair format (special tokens, token
        types, positions)."""
        special = (self._before, self._between, self._after)
        before, between, after = (np.asarray(ids, dtype=np.int32) for ids in special)
        parts, sides = [], []
        for query, document in zip(query_ids, doc_ids, strict=True):
            parts += (before, query, between, document, after)
            sides += (len(before) + len(query) + len(between), len(document) + len(after))
        sides = np.asarray(sides)
        lengths = sides.reshape(-1, 2).sum(1)
        if lengths.max() > self.max_positions:
            raise ModelError(f"a pair of {lengths.max()} tokens: the model has "
                             f"{self.max_positions} positions")
        starts = np.concatenate(([0], lengths.cumsum()))
        types = np.zeros(starts[-1], dtype=np.int64)
        if self._typed:
            types = np.repeat(np.tile([0, 1], len(lengths)), sides)
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + self._first_position
        return Packed(
            input_ids=torch.from_numpy(np.concatenate(parts).astype(np.int64)),
            token_types=torch.from_numpy(types),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
            lengths=lengths.tolist(),
        )

    # -------------------------------------------------------------------------------------- forward

    def forward(self, packed: Packed) -> torch.Tensor:
        """fp32 logits [pairs] in the order packed; differentiable; in train() with the model's own
        dropout."""
        batch, device = packed.to(self.device), self.device.type
        if on_gpu(self.device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):  # the copies of the weights have its casts
                return self._logits(batch, self.narrow(dtype).projector(), dtype)
        scores = not self.training and not torch.is_grad_enabled()
        return self._logits(batch, self._joined if scores else by_modules)

    def _logits(self, batch, project, dtype=None):
        """dtype: what products read, where it is not the stream's own."""
        run = self._modernbert if self.model.config.model_type == "modernbert" else self._post_norm
        x = wide(run(self.body, batch, project, dtype))
        model, kind = self.model, self.model.config.model_type
        device = x.device.type.replace("meta", "cpu")  # autocast knows no meta device
        with torch.autocast(device, enabled=False):
            if isinstance(model, Modular):
                logits = model.head(x)
            elif kind == "modernbert":
                logits = model.classifier(model.drop(model.head(x)))
            elif kind == "bert":  # the heads take the first of a sequence of one
                logits = model.classifier(model.dropout(self.body.pooler(x[:, None])))
            elif kind == "deberta-v2":
                logits = model.classifier(model.dropout(model.pooler(x[:, None])))
            else:
                logits = model.classifier(x[:, None])
        return logits.float().squeeze(-1)

    def _post_norm(self, body, batch, project, dtype):
        """BERT, RoBERTa, ELECTRA, DeBERTa: the [CLS] rows after the last layer, or each pair's
        mean."""
        x = body.embeddings(input_ids=batch.input_ids[None], token_type_ids=batch.token_types[None],
                            position_ids=batch.positions[None])[0]
        if hasattr(body, "embeddings_project"):
            x = project(x, body.embeddings_project)
        x = Stream(x, x) if dtype is None else Stream(wide(x), x.to(dtype))
        cls, layers, run, more = batch.cu_seqlens[:-1], body.encoder.layer, bert_layer, ()
        if self.model.config.model_type == "deberta-v2":
            run, more = deberta_layer, self._distances(body.encoder, batch.max_seqlen)
        for layer in layers:
            last = layer is layers[-1] and not self.mean_pooled
            x = run(layer, x, batch, project, *more, rows=cls if last else None)
        return mean_of_pairs(x.wide, batch) if self.mean_pooled else x.wide

    def _modernbert(self, body, batch, project, dtype):
        """ModernBERT: the [CLS] rows after the last layer, or each pair's mean."""
        x = body.embeddings(input_ids=batch.input_ids)
        h = x if dtype is None else x.to(dtype)  # the first layer's attention has no norm
        ropes = {kind: (*self._rope(body, kind), batch.positions)
                 for kind in set(self.model.config.layer_types)}
        norms = [layer.attn_norm for layer in body.layers[1:]]
        for layer, norm in zip(body.layers, [*norms, body.final_norm], strict=True):
            last = layer is body.layers[-1]
            rows = batch.cu_seqlens[:-1] if last and not self.mean_pooled else None
            x, h = modernbert_layer(layer, x, h, batch, project, ropes[layer.attention_type], norm,
                                    torch.float32 if last else None, rows)
        return mean_of_pairs(h, batch) if self.mean_pooled else h

    @property
    def body(self):
        """The encoder without its head, a module of Hugging Face's."""
        return getattr(self.model, FAMILIES[self.model.config.model_type][0])

    @property
    def mean_pooled(self) -> bool:
        """Whether the head reads the mean of all rows instead of [CLS]."""
        if isinstance(self.model, Modular):
            return self.model.pooling == "mean"
        config = self.model.config
        return config.model_type == "modernbert" and config.classifier_pooling == "mean"

    @property
    def fixed_launches(self) -> bool:
        """Whether a GPU does the same for all batches of as many tokens and pairs; a last layer
        that looks at a window from [CLS] alone crops the pairs, each by its length."""
        config = self.model.config
        if config.model_type != "modernbert" or self.mean_pooled:
            return True
        return config.layer_types[-1] == "full_attention"

    def narrow(self, dtype) -> Narrow:
        """The weights of the layers' products in dtype, queries, keys and values as one."""
        place = dtype, self.device
        if self._narrowed is None or self._narrowed[0] != place:
            groups = product_groups(self.body, on_cls=not self.mean_pooled)
            self._narrowed = place, Narrow(groups, dtype)
        return self._narrowed[1]

    def _rope(self, body, kind):
        """cos and sin [positions, head_dim] fp32 of the layers of a kind, by Hugging Face's own
        rule; kept."""
        place = kind, self.device
        if place not in self._ropes:
            with torch.inference_mode(False), torch.no_grad():
                everywhere = torch.arange(self.max_positions, device=self.device)[None]
                like = torch.empty(0, device=self.device)
                tables = body.rotary_emb(like, everywhere, kind)
                self._ropes[place] = tuple(table[0] for table in tables)
        return self._ropes[place]

    def _distances(self, encoder, longest):
        """DeBERTa's distance embeddings that pairs of up to `longest` tokens reach, and the slot of
        each distance."""
        buckets, span = encoder.position_buckets, encoder.max_relative_positions
        low, high, slots = distance_slots(longest, buckets, span, self.device)
        return encoder.get_rel_embedding()[low : high + 1], slots

    def train(self, mode: bool = True) -> "CrossEncoder":
        self._joined.kept.clear()
        return super().train(mode)

    # ---------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, name, dtype="float32", device="auto", query_length=None,
                        doc_length=None, fresh_head=False):
        """A model folder or hub id.

        dtype: of the weights, "float32", "bfloat16", a torch.dtype or "auto": bfloat16 where the
        device has it in hardware, float32 else. The lengths default to those the model was saved
        with, else 32 and 256. fresh_head: for training; a head that the files lack is drawn at
        random, one in modules of sentence-transformers becomes that of the backbone's own
        ...ForSequenceClassification.

        ModelError: not to be had or damaged, an unsupported backbone, weights missing or left over,
        a head of more than one label or one that cannot be trained, a wrong tokenizer.
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
            with from_hub(name, "modules.json or a file it names: "):
                chain = read_chain(name, config)
            kind = chain or AutoModelForSequenceClassification
            with from_hub(name, "config.json: "):
                with torch.device("meta"):  # what it describes, without its memory
                    model = kind.from_config(config)
                draft = cls(model.eval(), tokenizer, query_length, doc_length)
                draft(draft.pack(*[draft.tokenize([""], 0)] * 2))
            draw = fresh_head and not chain  # the head of a trained re-ranker has to be there
            new_weights = check_weights(name, model, draw, chain.steps if chain else ())
            model = kind.from_pretrained(name, config=config, dtype=dtype)
            if chain and fresh_head:
                model = model.plain()
            encoder = cls(model.eval(), tokenizer, query_length, doc_length)
            encoder.new_weights = new_weights
        return encoder.to(device)

    def save_pretrained(self, folder) -> None:
        """Hugging Face layout. Peers get raw logits: one label, and the activation of
        sentence-transformers and vLLM the identity. They cut pairs to the longest of ours:
        transformers and sentence-transformers read that in the tokenizer's files,
        text-embeddings-inference and vLLM in sentence_bert_config.json.

        ModelError for a modular head that no ...ForSequenceClassification has.
        """
        config = self.model.config
        config.query_length, config.doc_length = self.query_length, self.doc_length
        config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        add_older_names(config)
        with quiet():
            self.model.save_pretrained(folder)
        for file in Path(folder).glob("*.safetensors"):  # written for the owner alone
            shutil.copymode(Path(folder, "config.json"), file)
        longest = self.pair_length(self.query_length, self.doc_length)
        self.tokenizer.model_max_length = longest = min(longest, self.max_positions)
        self.tokenizer.save_pretrained(folder)
        cut = json.dumps({"max_seq_length": longest, "do_lower_case": False}, indent=2)
        Path(folder, "sentence_bert_config.json").write_text(f"{cut}\n", encoding="utf-8")
        # transformers 5 writes a class name that transformers 4 does not know for the one both know
        path = Path(folder, "tokenizer_config.json")
        text = path.read_text(encoding="utf-8")
        text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        path.write_text(text, encoding="utf-8")

    # -------------------------------------------------------------------------------------- scoring

    def start(self, query_ids: list[np.ndarray], doc_ids: list[np.ndarray],
              max_tokens: int | None = None, progress: bool | None = False
              ) -> Callable[[], torch.Tensor]:
        """Begins what score_tokens does and returns the function that waits for its scores: a GPU
        works meanwhile, a CPU begins when it is called. progress: see score."""
        lengths = [self.pair_length(len(q), len(d))
                   for q, d in zip(query_ids, doc_ids, strict=True)]
        budget = max_tokens or default_max_tokens(self.device, training=False)
        # shared evenly by up to 8 threads, whatever their number: it must not change the scores
        each, threads = in_threads, 8
        if on_gpu(self.device):
            each, threads = map, 1
        parts = micro_batches(lengths, budget, threads)

        @torch.inference_mode()
        def score(part):
            return self(self.pack([query_ids[i] for i in part], [doc_ids[i] for i in part]))

        def launch():
            with self._evaluating():
                found = list(with_bar(each(score, parts), parts, progress))
            return torch.cat(found) if found else torch.zeros(0, device=self.device)

        arrive = to_host(launch()) if on_gpu(self.device) else launch

        def scores():
            ordered = torch.empty(len(query_ids))
            ordered[[i for part in parts for i in part]] = arrive()
            bad = (~ordered.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise NonFiniteScores(bad)
            return ordered

        return scores

    @contextmanager
    def _evaluating(self):
        training = self.training
        if training:
            self.eval()
        try:
            yield
        finally:
            if training:
                self.train()

    def score_tokens(self, query_ids, doc_ids, max_tokens: int | None = None) -> torch.Tensor:
        """fp32 logits [pairs] on the CPU of pairs of token ids (from tokenize), in their order; no
        dropout.

        NonFiniteScores names the positions of pairs whose score is NaN or infinite.
        """
        return self.start(query_ids, doc_ids, max_tokens)()

    def score(self, queries: list[str], documents: list[str], max_tokens: int | None = None,
              sigmoid: bool = False, progress: bool | None = None) -> torch.Tensor:
        """fp32 logits [pairs] of queries[i] with documents[i]. Each distinct text is tokenised
        once.

        sigmoid: kernels.sigmoid.sigmoid_in_order of them, all pairs taken as one list, so that
        their order is that of the logits within every query and across queries.
        progress: a bar on stderr; None: on a terminal, for work of more than 5 seconds.
        NonFiniteScores names the positions of pairs whose logit is NaN or infinite.
        """

        def ids_of(texts, length):
            distinct = list(dict.fromkeys(texts))
            ids = dict(zip(distinct, self.tokenize(distinct, length), strict=True))
            return [ids[text] for text in texts]

        logits = self.start(ids_of(queries, self.query_length),
                            ids_of(documents, self.doc_length), max_tokens, progress)()
        return torch.from_numpy(sigmoid_in_order(logits.numpy())) if sigmoid else logits

    def rank(self, query: str, documents: list[str], top_k: int | None = None,
             max_tokens: int | None = None, sigmoid: bool = False, progress: bool | None = None
             ) -> list[tuple[int, float]]:
        """(index, score) of the documents, best first, ties in the order given; the first top_k
        (None: all). The scores, and what is raised, are those of score."""
        scores = self.score([query] * len(documents), documents, max_tokens, sigmoid,
                            progress).tolist()
        best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
        return [(i, scores[i]) for i in best_first[:top_k]]


def with_bar(batches, parts: list[list[int]], progress: bool | None):
    """The scores of each part as they come, under tqdm's bar of the pairs (transformers depends on
    tqdm); progress: see CrossEncoder.score."""
    if progress is False:
        yield from batches
        return
    from tqdm import tqdm

    auto = progress is None
    with tqdm(total=sum(map(len, parts)), unit=" pairs", leave=False, delay=5 if auto else 0,
              disable=None if auto else False) as bar:
        for part, scores in zip(parts, batches, strict=True):
            yield scores
            bar.update(len(part))
