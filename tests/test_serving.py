"""The saved folder where people serve it: what each server reads is there and means the same.

text-embeddings-inference and vLLM are not run: what they read is from their sources. ONNX is run
where optimum is: it wants transformers 4, so by a Python of its own, $ONNX_PYTHON.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from torch import nn

from kernels.encoder import CrossEncoder
from test_encoder import ARCHITECTURES, WORDS, build, modernbert

FAMILIES = ("bert", "roberta", "xlm-roberta", "electra-projected", "modernbert-mean",
            "modernbert-last-local", "deberta")
QUERIES = ["w1 w2 w3", "w4", "w1 w2 w3", "w1 w2 w3 w4 w5 w6 w7 w8 w9"]
DOCUMENTS = ["w7 w8 w9 w1 w2", "w5 w5", "w80", " ".join(WORDS[:60])]  # the last is cut


def saved(name, folder):
    """A model that keeps 9 and 33 tokens, in its folder."""
    encoder = build(name)
    encoder.query_length, encoder.doc_length = 9, 33
    encoder.save_pretrained(folder)
    return encoder


def read(folder, file):
    return json.loads((folder / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_servers_read(tmp_path, name):
    encoder = saved(name, tmp_path)
    config, longest = read(tmp_path, "config.json"), encoder.pair_length(9, 33)
    # text-embeddings-inference: a re-ranker by these; vLLM: raw scores by the last
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert (config["id2label"], config["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    identity = {"activation_fn": f"{nn.Identity.__module__}.Identity"}
    assert config["sentence_transformers"] == identity
    # vLLM reads this file where it has both, text-embeddings-inference the first
    cut = {"max_seq_length": longest, "do_lower_case": False}
    assert read(tmp_path, "sentence_bert_config.json") == cut
    assert read(tmp_path, "tokenizer_config.json")["model_max_length"] == longest
    assert read(tmp_path, "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizer_alone_cuts_pairs_as_ours(tmp_path, name):
    """As text-embeddings-inference does: tokenizer.json, the longest side first, to
    max_seq_length."""
    encoder = saved(name, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    longest = read(tmp_path, "sentence_bert_config.json")["max_seq_length"]
    tokenizer.enable_truncation(longest, strategy="longest_first")
    for query, document in zip(QUERIES, DOCUMENTS, strict=True):
        ids = [encoder.tokenize([text], n) for text, n in ((query, 9), (document, 33))]
        packed, theirs = encoder.pack(*ids), tokenizer.encode(query, document)
        assert theirs.ids == packed.input_ids.tolist()
        assert theirs.type_ids == packed.token_types.tolist() or not encoder._typed


def test_modernberts_config_has_the_names_of_before_transformers_5_too(tmp_path, monkeypatch):
    thetas = {"full_attention": 150_000.0, "sliding_attention": 90_000.0}  # Ettin's are alike
    ropes = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}
    monkeypatch.setitem(ARCHITECTURES, "own-ropes", modernbert(layers=4, rope_parameters=ropes))
    for name, every in (("own-ropes", 3), ("modernbert", 3), ("modernbert-last-local", 3)):
        encoder = saved(name, tmp_path / name)
        config = read(tmp_path / name, "config.json")
        assert config["global_attn_every_n_layers"] == every
        kinds = ["sliding_attention" if i % every else "full_attention"
                 for i in range(config["num_hidden_layers"])]
        assert config["layer_types"] == kinds
        if name == "own-ropes":
            assert (config["global_rope_theta"], config["local_rope_theta"]) == (150e3, 90e3)
        again = hf.AutoConfig.from_pretrained(tmp_path / name)
        assert again.rope_parameters == encoder.model.config.rope_parameters
        scores = CrossEncoder.from_pretrained(tmp_path / name, device="cpu").score(
            QUERIES, DOCUMENTS)
        torch.testing.assert_close(scores, encoder.score(QUERIES, DOCUMENTS), rtol=0, atol=1e-6)


def test_sentence_transformers_reads_activation_and_length_back(tmp_path):
    peers = pytest.importorskip("sentence_transformers")
    encoder = saved("modernbert-mean", tmp_path)
    peer = peers.CrossEncoder(str(tmp_path), device="cpu")
    assert type(peer.activation_fn) is nn.Identity
    assert peer.max_seq_length == encoder.pair_length(9, 33)
    assert peer.config.classifier_pooling == "mean"


ONNX = """
import json, sys, torch
from sentence_transformers import CrossEncoder
folders, queries, documents = json.loads(sys.argv[1])
for backend in ("torch", "onnx"):
    for folder in folders:
        model = CrossEncoder(folder, backend=backend, device="cpu")
        pairs = list(zip(queries, documents))
        print(json.dumps(model.predict(pairs, convert_to_tensor=True).tolist()))
"""


@pytest.mark.slow
def test_onnx_and_transformers_4_score_the_same(tmp_path, monkeypatch):
    python = os.environ.get("ONNX_PYTHON", sys.executable)
    has_optimum = [python, "-c", "import optimum.onnxruntime, sentence_transformers"]
    if subprocess.run(has_optimum, capture_output=True).returncode:
        pytest.skip("needs optimum-onnx and sentence-transformers: name their Python, ONNX_PYTHON")
    ropes = dict.fromkeys(["full_attention", "sliding_attention"],
                          {"rope_type": "default", "rope_theta": 160_000.0})
    monkeypatch.setitem(ARCHITECTURES, "ettin", modernbert(layers=4, rope_parameters=ropes))
    names = [*FAMILIES, "ettin"]
    scores = [saved(name, tmp_path / name).score(QUERIES, DOCUMENTS) for name in names]
    given = json.dumps([[str(tmp_path / name) for name in names], QUERIES, DOCUMENTS])
    done = subprocess.run([python, "-W", "ignore", "-c", ONNX, given], capture_output=True,
                          text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    for name, expected, line in zip(names * 2, scores * 2, lines, strict=True):
        torch.testing.assert_close(torch.tensor(json.loads(line)), expected, rtol=0, atol=1e-4,
                                   msg=name)
