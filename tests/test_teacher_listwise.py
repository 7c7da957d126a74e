"""teacher.py listwise: the algorithm, its prompts and answers, and models that run here."""

import itertools
import json
import re
import shutil
from collections import Counter

import pytest
import torch
from transformers import LlamaForCausalLM

import teacher
import teaching
from data.prompts import conversation, parse_permutation, rankzephyr
from data.runs import read_run
from data.texts import Texts
from kernels.llm import LanguageModel, LocalModel
from teaching import (
    CHATML,
    IDENTIFIERS,
    ROLELESS,
    graded_texts,
    local,
    pointwise,
    small_llm,
    small_tokenizer,
)


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return graded_texts(tmp_path_factory.mktemp("graded"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with teaching.one_thread():
        yield


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    small_llm(folder)
    return folder


# ------------------------------------------------------------------------------------ the algorithm


@pytest.mark.parametrize("text, order, wrong", [
    ("[3] > [1] > [4] > [2]", [2, 0, 3, 1], []),
    (" [2]>[1] >[3]>  [4]\n", [1, 0, 2, 3], []),
    ("[3] > [1]", [2, 0, 1, 3], ["missing"]),
    ("[3] > [1] > [3] > [2] > [4]", [2, 0, 1, 3], ["repeated"]),
    ("[9] > [2] > [0] > [1] > [3] > [4]", [1, 0, 2, 3], ["out of range"]),
    ("3, 1, 2, 4", [2, 0, 1, 3], ["malformed"]),
    ("I cannot rank these.", [0, 1, 2, 3], ["malformed", "missing"]),
    ("", [0, 1, 2, 3], ["malformed", "missing"]),
    ("[4] > [4] > [7] and so on", [3, 0, 1, 2],
     ["malformed", "repeated", "out of range", "missing"]),
    ("<think>[1] > [2]?</think>[4] > [3] > [2] > [1]", [3, 2, 1, 0], []),
    ("[" + "1" * 5000 + "] > [2]", [1, 0, 2, 3], ["out of range", "missing"]),
    ("[²] > [2] > [1] > [3] > [4]", [1, 0, 2, 3], ["malformed"]),
])
def test_permutations_are_repaired(text, order, wrong):
    assert parse_permutation(text, 4) == (order, wrong)


@pytest.mark.parametrize("n, window, stride, spans", [
    (100, 20, 10, [(80, 100), (70, 90), (60, 80), (50, 70), (40, 60), (30, 50), (20, 40), (10, 30),
                   (0, 20)]),
    (25, 10, 5, [(15, 25), (10, 20), (5, 15), (0, 10)]),
    (23, 10, 4, [(13, 23), (9, 19), (5, 15), (1, 11), (0, 7)]),
    (12, 20, 10, [(0, 12)]),
    (20, 20, 10, [(0, 20)]),
    (2, 20, 10, [(0, 2)]),
    (1, 20, 10, []),
    (0, 20, 10, []),
])
def test_windows(n, window, stride, spans):
    assert teacher.windows(n, window, stride) == spans


def answer(text, **more):
    return {"text": text, "cut": False, "prompt_tokens": 5, "answer_tokens": 3, **more}


def open_query(answers=(), documents="abc"):
    """A query over the documents a, b and c, whose texts are their names twice."""
    spans, counts = teacher.windows(len(documents), 2, 1), Counter()
    texts = {docid: docid * 2 for docid in documents}
    return teacher.OpenQuery("q", "text", texts, spans, list(answers), counts), counts


def test_an_open_query_climbs_window_by_window():
    query, counts = open_query()
    assert query.request() == query.request() == ["bb", "cc"]
    query.take(answer("[2] > [1]"))
    assert query.request() == ["aa", "cc"]
    query.take(answer("[2]", cut=True, shortened=True))
    assert query.request() is None and query.close() == ["c", "a", "b"] and query.fresh
    assert counts == {"answers": 2, "in order": 1, "missing": 1, "cut off": 1,
                      "passages shortened": 1, "prompt tokens": 10, "answer tokens": 6,
                      "queries reordered": 1}


def test_an_open_query_takes_the_answers_that_are_known():
    query, counts = open_query([answer("[2] > [1]")])
    assert query.request() == ["aa", "cc"] and query.fresh
    query, counts = open_query([answer("[1] > [2]")] * 3)  # one more than it has windows
    assert query.request() is None and query.close() == ["a", "b", "c"] and not query.fresh
    assert counts["answers"] == 2 and counts["queries kept in order"] == 1
    query, counts = open_query(documents="a")
    assert query.request() is None and query.close() == ["a"] and not counts


# -------------------------------------------------------------------------------------- the prompts


def test_rankzephyr_as_published():
    """The conversation of the paper, spelled out for two passages."""
    passages = ["one  two three [12] x", "four"]
    system, user = conversation("rankzephyr", "what is [1] ir", passages, 4)
    assert system == {"role": "system", "content": (
        "You are RankLLM, an intelligent assistant that can rank passages based on their relevancy "
        "to the query")}
    assert user == {"role": "user", "content": (
        "I will provide you with 2 passages, each indicated by a numerical identifier []. Rank the "
        "passages based on their relevance to the search query: what is (1) ir.\n"
        "[1] one two three (12)\n"
        "[2] four\n"
        "Search Query: what is (1) ir.\n"
        "Rank the 2 passages above based on their relevance to the search query. All the passages "
        "should be included and listed using identifiers, in descending order of relevance. The "
        "output format should be [] > [], e.g., [2] > [1], Answer concisely and directly and only "
        "respond with the ranking results, do not say any word or explain.")}


def test_rankgpt_as_published():
    turns = conversation("rankgpt", "q", ["one", "two"], 300)
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 3, "user"]
    assert [turn["content"] for turn in turns] == [
        "You are RankGPT, an intelligent assistant that can rank passages based on their relevancy "
        "to the query.",
        "I will provide you with 2 passages, each indicated by number identifier []. \n"
        "Rank the passages based on their relevance to query: q.",
        "Okay, please provide the passages.",
        "[1] one",
        "Received passage [1].",
        "[2] two",
        "Received passage [2].",
        "Search Query: q. \n"
        "Rank the 2 passages above based on their relevance to the search query. The passages "
        "should be listed in descending order using identifiers. The most relevant passages should "
        "be listed first. The output format should be [] > [], e.g., [1] > [2]. Only response the "
        "ranking results, do not say any word or explain.",
    ]


def test_braces_in_texts_stay():
    said = json.dumps(conversation("rankzephyr", "{query}", ["{n} {0}"], 9))
    assert "[1] {n} {0}" in said and said.count("{query}") == 2


# ------------------------------------------------------------------------------------- models here


def by_hand(chatml, messages):
    """The prompt, with the template written out."""
    system, user = (message["content"] for message in messages)
    if not chatml:
        return f"<|im_start|>{system}\n\n{user}<|im_end|><|im_start|>"
    return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            "<|im_start|>assistant\n")


def greedy(model, fast, prompt, longest):
    """The answer, token by token."""
    ids = fast(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    tokens, cache = [], None
    while len(tokens) < longest:
        with torch.no_grad():
            out = model(ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        if ids.item() == fast.eos_token_id:
            break
        tokens.append(ids.item())
    return fast.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("template", [CHATML, ROLELESS])
def test_small_llm_end_to_end(graded, monkeypatch, tmp_path, template):
    """The run is that of asking window by window, unbatched."""
    model, fast = small_llm(tmp_path / "llm", template)
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", "--batch-size", 3) == 0
    got, texts, moved = read_run(tmp_path / "t.run"), Texts(str(graded / "corpus")), 0
    longest = len(fast.encode(" > ".join(IDENTIFIERS))) + 8
    spans = {12: [(6, 12), (3, 9), (0, 6)], 6: [(0, 6)], 1: []}
    for qid, ranked in read_run(graded / "first.run").items():
        items = list(ranked)[:12]
        for low, high in spans[len(items)]:
            found = texts.documents(items)
            passages = [" ".join(found[d].split()) for d in items[low:high]]
            prompt = by_hand(template == CHATML, rankzephyr(texts.all_queries[qid], passages))
            numbers = map(int, re.findall(r"\d+", greedy(model, fast, prompt, longest)))
            numbers = [n for n in dict.fromkeys(numbers) if 1 <= n <= high - low]
            numbers += [n for n in range(1, high - low + 1) if n not in numbers]
            moved += numbers != sorted(numbers)
            items[low:high] = [items[low + n - 1] for n in numbers]
        assert got[qid] == {d: 12.0 - r for r, d in enumerate(items)}
    counts = json.loads((tmp_path / "t.run.json").read_text())["counts"]
    assert counts["answers"] == 10 and moved >= 5 and counts.get("missing", 0) > 0


def test_interrupted_llm_goes_on(graded, llm_folder, monkeypatch, tmp_path):
    whole, batches = LocalModel.finished, []

    def stop_after(limit):
        def finished(self):
            if len(batches) == limit:
                raise KeyboardInterrupt
            batches.append([qid for qid, *_ in self.waiting])
            return whole(self)
        monkeypatch.setattr(LocalModel, "finished", finished)

    def command(name):
        return local(monkeypatch, graded, llm_folder, tmp_path / name, "--batch-size", 2,
                     "--answer-tokens", 9)

    stop_after(3)
    assert command("t.run") == 130
    stop_after(100)
    assert command("t.run") == 0
    assert Counter(itertools.chain(*batches)) == {"q0": 3, "q1": 3, "q2": 3, "q3": 1}
    # of two queries, as long as there are two
    assert [len(set(batch)) for batch in batches] == [2] * 4 + [1] * 2
    assert command("u.run") == 0
    assert (tmp_path / "t.run").read_bytes() == (tmp_path / "u.run").read_bytes()


def test_passages_are_shortened_to_the_context(graded, monkeypatch, tmp_path, capsys):
    small_llm(tmp_path / "llm", context=600)
    assert local(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run") == 0
    assert "passages shortened" in capsys.readouterr().err
    small_llm(tmp_path / "smaller", context=300)
    assert local(monkeypatch, graded, tmp_path / "smaller", tmp_path / "u.run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: query 'q\d': 6 passages of one word and the answer are \d+ tokens "
                        "more than the context of 300; lower --window", error)


def test_a_tokenizer_that_cannot_ask(graded, llm_folder, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    small_tokenizer(None).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)

    def error():
        assert local(monkeypatch, graded, folder, tmp_path / "t.run") == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert error() == (f"error: {folder}: its tokenizer has no chat template; an instruction-tuned "
                       "model is needed")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": ""}))
    assert "invalid literal for int() with base 10: ''" in error()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ range(5, 0, 0) }}")
    (tmp_path / "t.run.answers-0.jsonl").unlink()  # another model's
    said = error()
    assert said.startswith(f"error: {folder}: cannot be loaded") and "must not be zero" in said


@pytest.mark.parametrize("limit, context", [(5000, 4096), (500, 500)])
def test_the_context_is_the_lower_limit(llm_folder, tmp_path, limit, context):
    """Of the model's positions, 4,096, and the tokenizer's."""
    shutil.copytree(llm_folder, tmp_path / "llm")
    file = tmp_path / "llm" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": limit}))
    assert LanguageModel(str(tmp_path / "llm"), "float32", "cpu").context == context


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_whose_files_lack_weights(graded, monkeypatch, tmp_path, capsys, tied):
    """Random weights in place of lost ones would make a teacher without a word; tied ones are not
    lost."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "llm"
    model, _ = small_llm(folder)
    if tied:
        model.config.tie_word_embeddings = True
        LlamaForCausalLM(model.config).save_pretrained(folder)
    LanguageModel(str(folder), "float32", "cpu")
    weights = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in weights) != tied
    lost = "model.embed_tokens.weight" if tied else "model.layers.1.self_attn.q_proj.weight"
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    for command in (local, pointwise):
        assert command(monkeypatch, graded, folder, tmp_path / "t.run") == 2
        *before, error = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: {folder}: its files lack ") and lost in error
        assert not any("MISSING" in line for line in before)
    assert not list(tmp_path.glob("t.run*"))


@pytest.mark.parametrize("command", [local, pointwise])
def test_a_model_that_fails_at_its_first_batch(graded, llm_folder, monkeypatch, tmp_path, capsys,
                                               command):
    """A folder whose files do not fit each other: read without a word, one line when it is run."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, **_: {}["index out of range"])
    assert command(monkeypatch, graded, llm_folder, tmp_path / "t.run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {llm_folder}: cannot be ") and "index out of range" in error


@pytest.mark.parametrize("command", [local, pointwise])
def test_a_tokenizer_without_padding(graded, llm_folder, monkeypatch, tmp_path, capsys,
                                     command):
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"pad_token": None, "eos_token": None}
    file.write_text(json.dumps(settings))
    assert command(monkeypatch, graded, folder, tmp_path / "t.run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folder}: cannot be ") and "padding token" in error
