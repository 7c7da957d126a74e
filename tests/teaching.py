"""What the tests of teacher.py share: a server on this machine, a judge that knows every document's
grade, small language models made on the spot, and the commands."""

import contextlib
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import teacher
from data import command
from data.runs import read_run

# ------------------------------------------------------------------------------------- the commands


def run(monkeypatch, script, *argv):
    """The exit code of a script's main."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, argv)])
    return command.guarded(script.main)


@contextlib.contextmanager
def full_disk(monkeypatch, name):
    """Inside, the file of this name cannot be written, as atomic_write finds out."""
    whole = teacher.atomic_write

    def full(path):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return whole(path)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "atomic_write", full)
        yield


def llm(monkeypatch, graded, url, out, *more):
    """listwise by a server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(teacher.Endpoint, "first_pause", 0.01)
    return run(monkeypatch, teacher, "listwise", "--endpoint", f"{url}/v1", "--model", "judge",
               "--dataset", graded / "corpus", "--run", graded / "first.run", "--window", 10,
               "--stride", 5, "--out", out, *more)


def local(monkeypatch, graded, folder, out, *more):
    """listwise by a model folder."""
    return run(monkeypatch, teacher, "listwise", "--model", folder, "--dataset", graded / "corpus",
               "--run", graded / "first.run", "--window", 6, "--stride", 3, "--depth", 12,
               "--device", "cpu", "--out", out, *more)


def pointwise(monkeypatch, graded, folder, out, *more):
    return run(monkeypatch, teacher, "pointwise", "--model", folder, "--dataset", graded / "corpus",
               "--run", graded / "first.run", "--device", "cpu", "--out", out, *more)


def answered(file):
    """The answers in a file of them."""
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


def by_two_processes(work):
    """The exit codes of two forked processes that call work() in torchrun's environment, over
    gloo."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def process(rank):
        torch.set_num_threads(1)
        values = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port)
        os.environ.update({key: str(value) for key, value in values.items()})
        os._exit(work())

    processes = [multiprocessing.get_context("fork").Process(target=process, args=(rank,))
                 for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        p.kill()  # one that waits for the other for ever
        p.join()
    return [p.exitcode for p in processes]


# ------------------------------------------------------------------------------------ local servers


@contextlib.contextmanager
def servers():
    """Yields start(handle) -> (url, list of requests seen); handle(handler, number, body) answers
    request `number`."""
    running = []

    def start(handle):
        seen, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    seen.append((self.path, dict(self.headers), body))
                    number = len(seen) - 1
                handle(self, number, body)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def reply(handler, status, content, headers=(), length=None):
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def completion(handler, text, finish="stop"):
    content = {"choices": [{"message": {"role": "assistant", "content": text},
                            "finish_reason": finish}],
               "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    reply(handler, 200, json.dumps(content).encode())


# ------------------------------------------------------------------------------------- graded texts


def grade(qid, docid):
    """The relevance that the perfect judge sees, a number of its own for each document of a
    query."""
    return int(docid[1:]) * 37 % 61 if int(qid[1:]) % 2 else int(docid[1:]) * 23 % 61


def graded_texts(folder):
    """Five queries, the first over 40 documents, the last over one; texts are just ids for the
    judge."""
    (folder / "corpus").mkdir()
    with open(folder / "corpus" / "corpus.jsonl", "w") as file:
        for d in range(60):
            text = f"text d{d} " + "more and more " * (d % 5)
            file.write(json.dumps({"_id": f"d{d}", "text": text}) + "\n")
    with open(folder / "corpus" / "queries.jsonl", "w") as file:
        for q in range(5):
            file.write(json.dumps({"_id": f"q{q}", "text": f"query q{q}"}) + "\n")
    with open(folder / "first.run", "w") as file:
        for q, n in enumerate((40, 33, 25, 6, 1)):
            order = np.random.default_rng(q).permutation(60)[:n]
            file.write("".join(f"q{q} Q0 d{d} {r + 1} {n - r} bm25\n" for r, d in enumerate(order)))
    return folder


def judged(body):
    """(qid, docids in the order shown) of a request, by the text of its conversation."""
    said = "\n".join(m["content"] for m in json.loads(body)["messages"] if m["role"] == "user")
    return re.search(r"query (q\d+)", said)[1], re.findall(r"^\[\d+\] text (d\d+)", said, re.M)


def perfect(body):
    """The answer of a judge who knows every grade."""
    qid, docids = judged(body)
    order = sorted(range(len(docids)), key=lambda i: -grade(qid, docids[i]))
    return " > ".join(f"[{i + 1}]" for i in order)


def judge(handler, number, body):
    """A server's handle: always the perfect answer."""
    completion(handler, perfect(body))


def expected(graded, depth=100):
    """The published algorithm on its own: {qid: {docid: depth - rank + 1}}."""
    result = {}
    for qid, ranked in read_run(graded / "first.run").items():
        items, end = list(ranked)[:depth], min(len(ranked), depth)
        start = end - 10
        while len(items) > 1:
            low = max(start, 0)
            items[low:end] = sorted(items[low:end], key=lambda d: -grade(qid, d))
            if start <= 0:
                break
            start, end = start - 5, end - 5
        result[qid] = {d: float(depth - r) for r, d in enumerate(items)}
    return result


# ---------------------------------------------------------------------------------- language models

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ROLELESS = ("{% for m in messages %}"
            "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>")
IDENTIFIERS = [f"[{i}]" for i in range(1, 7)]


@contextlib.contextmanager
def one_thread():
    """Inside, torch has one: on models this small, threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def small_tokenizer(template=CHATML, context=4096):
    """Byte-level BPE made on the spot; yes, no, true and false and the identifiers are single
    tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = [*["yes", "no", "true", "false"] * 50,
             "text query passages relevance ranking more and " * 9]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>",
                                   eos_token="<|im_end|>", model_max_length=context,
                                   chat_template=template)
    fast.add_tokens(IDENTIFIERS)
    return fast


def small_llm(folder, template=CHATML, context=4096, absolute=False):
    """A Llama of two layers whose greedy answers are full of identifiers; or a GPT-2, with absolute
    positions."""
    torch.manual_seed(0)
    fast = small_tokenizer(template, context)
    if absolute:
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(fast), n_embd=48, n_layer=2, n_head=4, n_positions=context,
            initializer_range=0.4, tie_word_embeddings=False))
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(fast), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context,
            initializer_range=0.4, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
            bos_token_id=None))
    with torch.no_grad():
        model.lm_head.weight[fast.convert_tokens_to_ids(IDENTIFIERS)] *= 3
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return model.eval(), fast
