"""teacher.py pointwise: scores against single forward passes, templates, what is cut or wrong."""

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import teacher
import teaching
from data import parts
from data.runs import read_run
from data.texts import Texts
from kernels.llm import LanguageModel
from teaching import graded_texts, local, pointwise, small_llm, small_tokenizer

JUDGE = ("Judge whether the Document meets the requirements based on the Query and the Instruct "
         'provided. Note that the answer can only be "yes" or "no".')
TASK = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return graded_texts(tmp_path_factory.mktemp("graded"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(folder, model, tokenizer)."""
    folder = tmp_path_factory.mktemp("llm")
    return folder, *small_llm(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with teaching.one_thread():
        yield


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(parts.blocks_of, "__defaults__", (50,))


def by_hand(template, query, document):
    if template == "monot5":
        return f"Query: {query} Document: {document} Relevant:"
    prompt = (f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n<Instruct>: {TASK}\n"
              f"<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n")
    return prompt + "<think>\n\n</think>\n\n" if template == "qwen3" else prompt


@pytest.mark.parametrize("template, absolute", [("qwen3", False), ("chat", False),
                                                ("monot5", True)])
def test_pointwise_causal(graded, llama, monkeypatch, tmp_path, template, absolute):
    folder, model, fast = llama
    if absolute:
        folder = tmp_path / "gpt2"
        model, fast = small_llm(folder, absolute=True)
    # chat: what ChatML without think is
    more = [] if template == "chat" else ["--template", template]
    assert pointwise(monkeypatch, graded, folder, tmp_path / "t.run", "--max-tokens", 700,
                     *more) == 0
    yes, no = fast.convert_tokens_to_ids(["true", "false"] if template == "monot5"
                                         else ["yes", "no"])
    texts, got = Texts(str(graded / "corpus")), read_run(tmp_path / "t.run")
    for qid, ranked in read_run(graded / "first.run").items():
        documents = texts.documents(list(ranked)[:8])
        for docid, document in documents.items():
            prompt = by_hand(template, texts.all_queries[qid], document)
            with torch.no_grad():
                logits = model(fast(prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
            assert abs(got[qid][docid] - float(logits[yes] - logits[no])) < 1e-4
    assert [len(ranked) for ranked in got.values()] == [40, 33, 25, 6, 1]


@pytest.fixture(scope="module")
def t5(graded, tmp_path_factory):
    """(folder, model, tokenizer) that takes the longest of the prompts with 12 tokens of a
    document, and no more."""
    torch.manual_seed(0)
    fast = small_tokenizer(None)
    fast.model_max_length = max(len(fast(prompt)["input_ids"])
                                for prompt, _ in seq2seq_prompts(graded, fast).values())
    config = T5Config(vocab_size=len(fast), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      initializer_factor=3.0, decoder_start_token_id=fast.pad_token_id,
                      pad_token_id=fast.pad_token_id)
    model, folder = T5ForConditionalGeneration(config).eval(), tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder, model, fast


def seq2seq_prompts(graded, fast):
    """{(qid, docid): (prompt with 12 tokens of the document, whether that cuts it)}."""
    texts, prompts = Texts(str(graded / "corpus")), {}
    for qid, ranked in read_run(graded / "first.run").items():
        for docid, document in texts.documents(ranked).items():
            ids = fast(document)["input_ids"]
            prompt = by_hand("monot5", texts.all_queries[qid], fast.decode(ids[:12]))
            prompts[qid, docid] = prompt, len(ids) > 12
    return prompts


def test_pointwise_seq2seq(graded, t5, monkeypatch, tmp_path, capsys):
    folder, model, fast = t5
    assert pointwise(monkeypatch, graded, folder, tmp_path / "t.run", "--doc-length", 12) == 0
    got, first = read_run(tmp_path / "t.run"), read_run(graded / "first.run")
    assert [sorted(ranked) for ranked in got.values()] == [sorted(r) for r in first.values()]
    prompts = seq2seq_prompts(graded, fast)
    start = torch.tensor([[fast.pad_token_id]])
    yes, no = fast.convert_tokens_to_ids(["true", "false"])
    for (qid, docid), (prompt, _) in list(prompts.items())[::3]:
        with torch.no_grad():
            logits = model(**fast(prompt, return_tensors="pt"),
                           decoder_input_ids=start).logits[0, 0]
        assert abs(got[qid][docid] - float(logits[yes] - logits[no])) < 1e-4
    cut = {docid for (_, docid), (_, is_cut) in prompts.items() if is_cut}
    assert cut and f"{len(cut)} documents cut" in capsys.readouterr().err


def test_what_a_seq2seq_model_does_not_do(graded, t5, monkeypatch, tmp_path, capsys):
    for command, flags, what in (
            (pointwise, ["--answers", "relevant", "no"], "'relevant' is"),
            (pointwise, ["--doc-length", 60], "lower --doc-length"),
            (local, [], "listwise needs a causal one")):
        assert command(monkeypatch, graded, t5[0], tmp_path / "t.run", *flags) == 2
        assert what in capsys.readouterr().err.splitlines()[-1]


def test_scores_that_are_not_finite(graded, llama, monkeypatch, tmp_path, capsys):
    whole = LanguageModel.first_logits

    def damaged(self, prompts, tokens):
        logits = whole(self, prompts, tokens)
        logits[0] = np.nan
        return logits

    monkeypatch.setattr(LanguageModel, "first_logits", damaged)
    assert pointwise(monkeypatch, graded, llama[0], tmp_path / "t.run", "--doc-length", 2) == 2
    assert "scores not finite, first of queries ['q0'" in capsys.readouterr().err


def test_arguments_that_are_not_utf8(graded, monkeypatch, tmp_path, capsys):
    for flag in (["--instruction", "caf\udce9"], ["--answers", "oui", "n\udcff"]):
        assert pointwise(monkeypatch, graded, tmp_path / "llm", tmp_path / "t.run", *flag) == 2
        error = "error: --instruction and --answers are to be UTF-8 (see --help)\n"
        assert capsys.readouterr().err == error


def test_pointwise_of_one_score_is_said(graded, llama, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(LanguageModel, "first_logits", lambda self, prompts, tokens:
                        np.zeros((len(prompts), 2), np.float32))

    def command():
        return pointwise(monkeypatch, graded, llama[0], tmp_path / "t.run", "--doc-length", 2)

    assert command() == 0
    what = "queries, each with one score for all its documents: WARNING, this run is no teacher"
    assert f"4 {what}" in capsys.readouterr().err  # the fifth has one document
    (tmp_path / "t.run").unlink()
    (tmp_path / "t.run.json").unlink()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher, "write_summary", full)
    assert command() == 2 and not (tmp_path / "t.run").exists()
    assert "goes on from what is written" in capsys.readouterr().err
