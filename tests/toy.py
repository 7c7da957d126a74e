"""A made-up corpus of 60 documents in BEIR layout and a small BERT over it, for tests that need
both."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = [a + b for a in ["ka", "lo", "mi", "ne", "pu", "ra", "so", "ti", "vu", "ze"]
         for b in ("ba", "dor", "fin", "gus")]


def corpus(folder: Path, documents: int = 60, queries: int = 20, seed: int = 0) -> Path:
    """Each query's relevant document holds its three words; splits train, dev and test by
    thirds."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "qrels").mkdir()
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 30))) for _ in range(documents)]
    with open(folder / "corpus.jsonl", "w") as file:
        for i, text in enumerate(texts):
            file.write(json.dumps({"_id": f"d{i}", "title": "", "text": text}) + "\n")
    splits = {name: ["query-id\tcorpus-id\tscore\n"] for name in ("train", "dev", "test")}
    with open(folder / "queries.jsonl", "w") as file:
        for q in range(queries):
            words = texts[q].split()
            file.write(json.dumps({"_id": f"q{q}", "text": " ".join(rng.choice(words, 3))}) + "\n")
            split = {8: "dev", 9: "test"}.get(q % 10, "train")
            splits[split].append(f"q{q}\td{q}\t1\n")
    for name, lines in splits.items():
        (folder / "qrels" / f"{name}.tsv").write_text("".join(lines))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]",
                                   cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
                                   model_max_length=64)


def model(folder: Path, seed: int = 0, dropout: float = 0.0, hidden: int = 32) -> Path:
    """A BERT of two layers, saved as a model folder."""
    from kernels.encoder import CrossEncoder

    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(WORDS) + 5, hidden_size=hidden, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=2 * hidden,
                        max_position_embeddings=64, hidden_dropout_prob=dropout,
                        attention_probs_dropout_prob=dropout, num_labels=1, initializer_range=0.2)
    CrossEncoder(BertForSequenceClassification(config), tokenizer(), 8, 32).save_pretrained(folder)
    return folder
