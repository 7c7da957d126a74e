"""Modular re-rankers against sentence-transformers' own CrossEncoder, on folders that it saved."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import kernels.encoder
import rerank
import teacher
import train
from data.cache import model_stamp
from kernels.encoder import CrossEncoder
from kernels.loading import ModelError
from kernels.modular import Modular
from test_encoder import WORDS, build
from training import make_place, run_main, words_of

peers = pytest.importorskip("sentence_transformers")
from sentence_transformers.base.modules import Dense  # noqa: E402
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)

place = pytest.fixture(make_place, scope="module", name="place")
SIDES = [(0, 1), (1, 0), (5, 9), (6, 8), (2, 61), (30, 100), (32, 250)]
QUERIES = [" ".join(WORDS[q : q + q % 40]) for q, _ in SIDES]
DOCUMENTS = [" ".join(WORDS[i % 90] for i in range(d)) for _, d in SIDES]
HIDDEN = 32
SCORE = {"activation_function": nn.Identity(), "module_output_name": "scores"}


def ettin(act=None, bias=False, norm=True):
    """The head of the ettin-reranker models, or one that differs."""
    first = Dense(HIDDEN, HIDDEN, bias=bias, activation_function=act or nn.GELU())
    return [first, *[LayerNorm(HIDDEN)] * norm, Dense(HIDDEN, 1, **SCORE)]


HEADS = {
    "ettin": ettin,
    "tanh": lambda: ettin(nn.Tanh(), bias=True, norm=False),
    "norm": lambda: [LayerNorm(HIDDEN), Dense(HIDDEN, 1, bias=False, **SCORE)],
    "one": lambda: [Dense(HIDDEN, 1, **SCORE)],
}


def save(folder, name="bert", pooling="cls", head=None, **how):
    """A modular re-ranker of random weights, as sentence-transformers saves it; its score of the
    texts, raw."""
    encoder = build(name)
    encoder.body.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))
    transformer.model.config.num_labels = 1
    head = head or ettin()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in nn.ModuleList(head).parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)
    modules = [transformer, Pooling(HIDDEN, pooling), *head]
    model = peers.CrossEncoder(modules=modules, num_labels=1, device="cpu", **how)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def predicted(folder):
    """Raw scores of the texts by sentence-transformers."""
    model = peers.CrossEncoder(str(folder), device="cpu")
    pairs = list(zip(QUERIES, DOCUMENTS, strict=True))
    scores = model.predict(pairs, activation_fn=nn.Identity(), convert_to_tensor=True)
    assert scores.std() > 0.02, "the test would not see a wrong model"
    return scores


def load(folder, **how):
    return CrossEncoder.from_pretrained(folder, device="cpu", query_length=40, doc_length=600,
                                        **how)


def close(scores, expected):
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_scores_are_those_of_sentence_transformers(tmp_path, name, pooling, head):
    save(tmp_path, name, pooling, HEADS[head]())
    encoder = load(tmp_path)
    assert isinstance(encoder.model, Modular) and encoder.new_weights == []
    close(encoder.score(QUERIES, DOCUMENTS), predicted(tmp_path))


def test_an_activation_is_of_the_scores_only_where_a_module_has_it(tmp_path):
    """That of the whole model stands behind the raw scores and is left out."""
    sigmoid = SCORE | {"activation_function": nn.Sigmoid()}
    save(tmp_path, "bert", head=[Dense(HIDDEN, 1, **sigmoid)], activation_fn=nn.Tanh())
    scores = load(tmp_path).score(QUERIES, DOCUMENTS)
    assert scores.min() > 0 and scores.max() < 1
    close(scores, predicted(tmp_path))


def test_names_of_older_versions_and_files_without_a_pooler_are_read(tmp_path):
    save(tmp_path, "bert", "mean")
    expected = load(tmp_path).score(QUERIES, DOCUMENTS)
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": False,
               "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = json.loads((tmp_path / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rsplit('.', 1)[1]}"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    changed("4_Dense/config.json", activation_function="torch.nn.Identity")(tmp_path)
    weights = load_file(tmp_path / "2_Dense" / "model.safetensors")
    torch.save(weights, tmp_path / "2_Dense" / "pytorch_model.bin")
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    body = load_file(tmp_path / "model.safetensors")
    body = {name: weight for name, weight in body.items() if "pooler" not in name}
    save_file(body, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(tmp_path).score(QUERIES, DOCUMENTS).equal(expected)


def test_a_dense_module_that_names_no_activation_has_tanh(tmp_path):
    save(tmp_path, head=HEADS["tanh"]())
    expected, file = load(tmp_path).score(QUERIES, DOCUMENTS), tmp_path / "2_Dense" / "config.json"
    config = json.loads(file.read_text())
    del config["activation_function"]
    file.write_text(json.dumps(config))
    assert load(tmp_path).score(QUERIES, DOCUMENTS).equal(expected)
    close(expected, predicted(tmp_path))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_last_layer_computes_what_is_pooled(tmp_path, pooling, monkeypatch):
    encoder, seen, layer = load(save(tmp_path, "bert", pooling)), [], kernels.encoder.bert_layer

    def counted(*args, rows=None):
        out = layer(*args, rows=rows)
        seen.append(len(out.wide))
        return out

    monkeypatch.setattr(kernels.encoder, "bert_layer", counted)
    packed = encoder.pack(*[encoder.tokenize(texts, None) for texts in (QUERIES, DOCUMENTS)])
    encoder(packed)
    every = sum(packed.lengths)
    assert seen == [every, every, len(SIDES) if pooling == "cls" else every]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_head_is_computed_in_fp32(tmp_path, pooling):
    save(tmp_path, "bert", pooling)
    narrow = load(tmp_path, dtype="bfloat16")
    scores = narrow.score(QUERIES, DOCUMENTS)
    assert narrow.model.dtype == torch.bfloat16 and scores.dtype == torch.float32
    assert {p.dtype for p in narrow.model.head.parameters()} == {torch.float32}
    assert (scores != scores.bfloat16().float()).sum() >= 6
    assert (scores - predicted(tmp_path)).abs().max() < 0.2 * scores.std()


def test_a_head_is_saved_in_fp32(tmp_path):
    encoder = load(save(tmp_path / "m", head=HEADS["tanh"]()), dtype="bfloat16")
    encoder.save_pretrained(tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert weights["classifier.weight"].equal(encoder.model.head[1][0].weight)
    assert weights["bert.embeddings.LayerNorm.weight"].dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------- training


def heads_of_their_own():
    """Names of backbones with a pooling and modules that their ...ForSequenceClassification has."""
    tanh, gelu = HEADS["tanh"], lambda: ettin(bias=True, norm=False)
    cases = [("modernbert", "cls", ettin), ("modernbert", "mean", ettin), ("bert", "cls", tanh)]
    for name, head in [("roberta", tanh), ("xlm-roberta", tanh), ("electra", gelu),
                       ("deberta", gelu)]:
        cases.append(pytest.param(name, "cls", head, marks=pytest.mark.slow))
    return [*cases, ("bert", "cls", lambda: ettin(nn.Tanh(), norm=False))]  # no bias: zeros


@pytest.mark.parametrize("name, pooling, head", heads_of_their_own())
def test_training_starts_from_its_scores_and_saves_a_plain_folder(tmp_path, name, pooling, head):
    save(tmp_path / "m", name, pooling, head())
    encoder = load(tmp_path / "m", fresh_head=True)
    assert not isinstance(encoder.model, Modular) and encoder.new_weights == []
    expected = predicted(tmp_path / "m")
    close(encoder.score(QUERIES, DOCUMENTS), expected)
    load(tmp_path / "m").save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "modules.json").exists()
    close(load(tmp_path / "plain").score(QUERIES, DOCUMENTS), expected)
    close(predicted(tmp_path / "plain"), expected)
    model, report = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "plain", output_loading_info=True)
    assert model.config.num_labels == 1 and not report["missing_keys"]


@pytest.mark.parametrize("name, pooling, head, given", [
    ("bert", "mean", HEADS["tanh"], "mean pooling, tanh, identity"),
    ("bert", "cls", ettin, "cls pooling, gelu, layernorm, identity"),
    ("modernbert", "cls", HEADS["tanh"], "cls pooling, tanh, identity"),
    ("modernbert", "cls", lambda: ettin(bias=True), "cls pooling, gelu, layernorm, identity"),
    ("modernbert", "mean", HEADS["one"], "mean pooling, identity"),
])  # fmt: skip
def test_other_heads_are_not_trained(tmp_path, name, pooling, head, given):
    save(tmp_path / "m", name, pooling, head())
    what = rf"m: its head \({given}\) is not that of \w+ForSequenceClassification \(.* a copy of"
    with pytest.raises(ModelError, match=what) as error:
        load(tmp_path / "m", fresh_head=True)
    assert "\n" not in str(error.value) and error.value.for_the_user
    with pytest.raises(ModelError, match=what):
        load(tmp_path / "m").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "m" / "modules.json").unlink()  # as the line says
    encoder = load(tmp_path / "m", fresh_head=True)
    assert encoder.new_weights and all("layer" not in weight for weight in encoder.new_weights)


def test_the_scripts_take_one(place, tmp_path, monkeypatch, capsys):
    """train.py, rerank.py and teacher.py, and a folder trained from it scores the same with
    peers."""
    save(tmp_path / "m", head=HEADS["tanh"]())
    flags = {"backbone": tmp_path / "m", "out": tmp_path / "out", "steps": 2, "query-length": 8,
             "doc-length": 32, "eval-dataset": "none"}
    assert run_main(monkeypatch, train, *words_of(place, **flags)) == 0
    assert "new weights" not in capsys.readouterr().err
    trained = load(tmp_path / "out").score(QUERIES, DOCUMENTS)
    assert (trained - load(tmp_path / "m").score(QUERIES, DOCUMENTS)).abs().max() > 1e-3
    (tmp_path / "lines").write_text("w7 w8\nw9\n")
    run_main(monkeypatch, rerank, "--model", tmp_path / "m", "--query", "w7", tmp_path / "lines",
             "--dtype", "float32")
    lines = dict(line.split("\t")[::-1] for line in capsys.readouterr().out.splitlines())
    expected = peers.CrossEncoder(str(tmp_path / "m"), device="cpu").predict(
        [("w7", "w7 w8"), ("w7", "w9")], activation_fn=nn.Identity())
    assert [float(lines[text]) for text in ("w7 w8", "w9")] == pytest.approx(expected, abs=2e-5)
    lists = {"query": "w7", "pos": ["w7 w8"], "neg": ["w9"]}
    (tmp_path / "lists.jsonl").write_text(json.dumps(lists))
    assert run_main(monkeypatch, teacher, "cross-encoder", "--model", tmp_path / "m", "--lists",
                    tmp_path / "lists.jsonl", "--out", tmp_path / "scored.jsonl", "--dtype",
                    "float32") == 0
    scored = json.loads((tmp_path / "scored.jsonl").read_text())
    assert scored["pos_scores"] + scored["neg_scores"] == pytest.approx(expected, abs=2e-5)
    flags |= {"backbone": save(tmp_path / "mean", pooling="mean"), "out": tmp_path / "no"}
    assert run_main(monkeypatch, train, *words_of(place, **flags)) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"error: {tmp_path / 'mean'}: its head (mean pooling, gelu,")
    assert not (tmp_path / "no").exists()


def test_a_changed_head_is_another_model(tmp_path):
    before = model_stamp(str(save(tmp_path)))
    weights = load_file(tmp_path / "2_Dense" / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()},
              tmp_path / "2_Dense" / "model.safetensors")
    assert model_stamp(str(tmp_path)) != before


# --------------------------------------------------------------------------- what is not computed


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("modular") / "m")


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "m")


def changed(file, **values):
    """A JSON object of the folder with other values."""

    def change(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def module(number, **values):
    """An entry of modules.json with other values."""

    def change(folder):
        modules = json.loads((folder / "modules.json").read_text())
        modules[number] |= values
        (folder / "modules.json").write_text(json.dumps(modules))

    return change


def written(file, text):
    return lambda folder: (folder / file).write_text(text)


def without(file):
    return lambda folder: (folder / file).unlink()


def weights(file, **new):
    return lambda folder: save_file(load_file(folder / file) | new, folder / file)


ST = "sentence_transformers"
WHOLE, DENSE, LAST = f"config_{ST}.json", "2_Dense/config.json", "4_Dense/config.json"


@pytest.mark.parametrize("change, what", [
    (changed("1_Pooling/config.json", pooling_mode="lasttoken"), "1_Pooling: the pooling last"),
    (changed("1_Pooling/config.json", pooling_mode=["cls", "mean"]), "the pooling cls.mean"),
    (module(2, type=f"{ST}.models.Normalize"), "modules.json: 2_Dense is of type Normalize"),
    (module(2, type="mine.Dense"), "modules.json: 2_Dense is of type mine.Dense"),
    (module(0, path="0_Transformer"), "begins with Transformer, Pooling, the first in '0_Tr"),
    (module(1, type=f"{ST}.models.Dense"), "begins with Transformer, Dense"),
    (module(4, path="../m/4_Dense"), "the path '../m/4_Dense' is no folder's name"),
    (changed(DENSE, activation_function="torch.nn.ELU"), "2_Dense: the activation ELU is none"),
    (changed(DENSE, activation_function="mine.Act"), "2_Dense: the activation mine.Act is none of"),
    (changed(DENSE, use_residual=True), "2_Dense: use_residual"),
    (changed(DENSE, in_features=7), "2_Dense: reads 7 numbers of 'sentence_embedding', and"),
    (changed("3_LayerNorm/config.json", dimension=7), "3_LayerNorm: reads 7 numbers of"),
    (changed(DENSE, module_input_name="token_embeddings"), "reads 32 numbers of 'token_embed"),
    (changed(LAST, out_features=3), "the last module gives 3 numbers of 'scores', a cross-encoder"),
    (changed(LAST, module_output_name=None), "the last module gives 1 numbers of 'sentence_embed"),
    (changed(WHOLE, prompts={"q": "query: "}, default_prompt_name="q"), "the prompt 'q' is put"),
    (changed(f"{ST[:8]}_bert_config.json", do_lower_case=True), "do_lower_case changes the texts"),
    (changed(f"{ST[:8]}_bert_config.json", processing_kwargs={"text": {}}), "processing_kwargs"),
    (changed(f"{ST[:8]}_bert_config.json", modality_config={}), "modality_config is not that"),
    (changed(f"{ST[:8]}_bert_config.json", transformer_task="fill-mask"), "the task fill-mask"),
    (without("4_Dense/model.safetensors"), "4_Dense/model.safetensors: OSError"),
    (without("4_Dense/config.json"), "4_Dense/config.json: "),
    (weights("4_Dense/model.safetensors", **{"linear.weight": torch.ones(2, 32)}),
     "head.4_Dense.linear.weight is torch.float32 .2, 32., not floating-point .1, 32."),
    (weights("4_Dense/model.safetensors", more=torch.ones(2)), 'Unexpected key.*: "more"'),
    (changed(LAST, bias=False), 'Unexpected key.*: "linear.bias"'),
    (changed(DENSE, bias=True), "1 of its weights do not fit: head.2_Dense.linear.bias is missing"),
    (written("modules.json", "[{}][{}]"), "folder: modules.json: JSONDecodeError"),
    (written("modules.json", "[{}, 3]"), "modules.json or a file it names: KeyError: 'type'"),
    (written("modules.json", "5"), "modules.json or a file it names: TypeError"),
    (written(LAST, "{}"), "modules.json or a file it names: KeyError: 'in_features'"),
    (written("1_Pooling/config.json", "[3]"), "folder: 1_Pooling/config.json: TypeError"),
])  # fmt: skip
def test_what_is_not_computed_is_one_line(folder, change, what):
    change(folder)
    for fresh_head in (False, True):
        with pytest.raises(ModelError, match=what) as error:
            load(folder, fresh_head=fresh_head)
        assert str(error.value).startswith(f"{folder}: ") and "\n" not in str(error.value)


def test_prompts_that_are_not_the_default_and_empty_ones_change_nothing(folder):
    expected = load(folder).score(QUERIES, DOCUMENTS)
    for default in (None, "none"):
        changed(WHOLE, prompts={"q": "query: ", "none": ""}, default_prompt_name=default)(folder)
        assert load(folder).score(QUERIES, DOCUMENTS).equal(expected)


def test_folders_of_one_module_and_of_single_texts_are_read_as_before(tmp_path):
    encoder = build("bert")
    encoder.save_pretrained(tmp_path / "plain")
    peers.CrossEncoder(str(tmp_path / "plain")).save_pretrained(str(tmp_path / "one"))
    assert (tmp_path / "one" / "modules.json").exists()
    close(load(tmp_path / "one").score(QUERIES, DOCUMENTS), encoder.score(QUERIES, DOCUMENTS))
    encoder.body.save_pretrained(tmp_path / "body")
    encoder.tokenizer.save_pretrained(tmp_path / "body")
    bi = peers.SentenceTransformer(modules=[Transformer(str(tmp_path / "body")), Pooling(HIDDEN),
                                            Normalize()])
    bi.save_pretrained(str(tmp_path / "bi"), create_model_card=False)
    with pytest.raises(ModelError, match="bi: no trained cross-encoder"):
        load(tmp_path / "bi")
    assert load(tmp_path / "bi", fresh_head=True).new_weights == [
        "classifier.weight", "classifier.bias"]
