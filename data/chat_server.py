"""A server that speaks OpenAI's chat-completions protocol (vLLM, llama.cpp, ...), asked for the
order of passages many times at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from data.command import BadInput, say

NO_REPLY = 0  # the status of: no connection, a time-out, not a chat completion
BUSY = (NO_REPLY, 408, 409, 425, 429)  # to be tried again, as 5xx is
TOO_LONG = re.compile(  # of a prompt, in a server's words
    r"context.?(length|size|window|limit)|maximum context|too (long|many tokens)|reduce the length|"
    r"(input|prompt).{,80}(exceed|larger|longer)", re.I)
INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": "", "seed": ""}  # of a refused one


class AsItCame(urllib.request.HTTPErrorProcessor):
    """Every status is a reply, a redirect too: urllib would carry the key along to wherever it is
    sent."""

    http_response = https_response = lambda self, request, response: response


@dataclass
class Window:
    """Passages whose order is asked for, and how that has gone so far."""

    qid: str
    query: str
    passages: list[str]
    words: int  # kept of each passage
    tried: int = 0  # times that the server failed
    pause: float = 0.0  # seconds to the next try


class Endpoint:
    """Answers by a server, `capacity` windows at a time.

    Time-outs, broken connections and the statuses 408, 409, 425, 429 and 5xx are tried again after
    1, 2, 4, ... seconds (or what Retry-After asks), by one thread at a time until the server
    answers. A parameter that it refuses is not sent again, a prompt beyond its context is asked
    with shorter passages. The key comes from OPENAI_API_KEY and goes into the request's header
    alone.

    Args:
        url: http://HOST:PORT/v1. model: the server's name of it.
        conversation: (query, passages, words kept of a passage) -> messages.
        passage_words: the most of them. answer_tokens: None for what a permutation takes.
        timeout: seconds until a request counts as failed. retries: further tries.

    Raises:
        BadInput: a URL of another kind; from finished(), an answer that cannot be had.
    """

    first_pause = 1.0

    def __init__(self, url: str, model: str,
                 conversation: Callable[[str, list[str], int], list[dict]], *, passage_words: int,
                 answer_tokens: int | None, seed: int, concurrency: int, timeout: float,
                 retries: int) -> None:
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"--endpoint {url}: expected http://HOST:PORT/v1 or https://...")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.conversation, self.seed = model, conversation, seed
        self.passage_words, self.answer_tokens = passage_words, answer_tokens
        self.capacity, self.timeout, self.retries = concurrency, timeout, retries
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.opener = urllib.request.build_opener(AsItCame)
        self.pool, self.running = ThreadPoolExecutor(concurrency), {}
        self.stopping = threading.Event()
        self.turn, self.noting = threading.Lock(), threading.Lock()
        self.names = {name: name for name in INSTEAD}  # under which a parameter is sent; "": not
        self.failures = 0  # in a row, over all threads
        self.pause = 0.0  # to the next try of any thread
        self.why = ""  # the last failure

    def start(self, qid: str, query: str, passages: list[str]) -> None:
        """Sends a window in a thread."""
        longest = max(len(passage.split()) for passage in passages)
        window = Window(qid, query, passages, min(self.passage_words, longest))
        self.running[self.pool.submit(self._ask, window)] = qid

    def finished(self) -> list[tuple[str, dict]]:
        """(qid, answer) of every window answered since; waits for one. Raises BadInput where one
        cannot be had."""
        done, _ = wait(self.running, return_when=FIRST_COMPLETED)
        good = [future for future in done if not future.exception()]
        if not good:
            raise next(iter(done)).exception()
        return [(self.running.pop(future), future.result()) for future in good]

    def stop(self) -> list[tuple[str, dict]]:
        """Gives up what is to be tried again, waits for the answers under way and returns them."""
        self.stopping.set()
        wait(self.running)
        return [(qid, future.result()) for future, qid in self.running.items()
                if not future.exception()]

    # ------------------------------------------------------------------ one window, in its thread

    def _ask(self, window: Window) -> dict:
        """The answer, asked for in the form that the server takes."""
        longest = window.words
        while True:
            body, status, reply = self._first_reply(window)
            if status == 200:
                return reply | {"shortened": window.words < longest}
            if status == 413 or (status in (400, 422) and TOO_LONG.search(reply)):
                self._shorten(window, reply)
            elif status not in (400, 422) or not self._renamed(body, reply):
                raise BadInput(f"{self.url}: {reply[:300]}")

    def _first_reply(self, window: Window) -> tuple[dict, int, dict | str]:
        """(what was sent, status, reply) as soon as the server does not fail."""
        while True:
            with self.turn if self.failures else contextlib.nullcontext() as alone:
                before = self.failures
                if alone and not before:
                    continue  # it answers again: all may ask
                self._wait(window, before)
                body = self._body(window)
                status, reply, retry_after = self._post(body)
                if status not in BUSY and status < 500:
                    self.failures = self.pause = window.pause = 0
                    return body, status, reply
                self._note_failure(window, before, reply[:300], retry_after)

    def _wait(self, window: Window, failures: int) -> None:
        """The pause before a try; BadInput where there have been enough, or the work is broken
        off."""
        tries = max(window.tried, failures)
        window.pause = max(window.pause, self.pause)
        if tries > self.retries or self._stopped_within(window.pause):
            raise BadInput(f"{self.url}: no answer in {tries} tries (the last: {self.why}); what "
                           "was answered is kept, the same command goes on")

    def _stopped_within(self, pause: float) -> bool:
        return self.stopping.wait(pause) if pause else self.stopping.is_set()

    def _note_failure(self, window: Window, before: int, why: str, retry_after: str) -> None:
        """before: the failures in a row when this try began."""
        tries = max(window.tried, before)
        pause = min(self.first_pause * 2 ** min(tries, 6), 60.0)
        if retry_after.isdecimal():
            pause = min(float(retry_after), 600.0)
        window.pause, window.tried = pause, window.tried + 1
        with self.noting:
            if self.failures == before:  # tries that were under way together fail once
                self.failures, self.pause = before + 1, pause
                if before < self.retries and (before or not self.why):
                    say(f"{self.url}: {why}; tried again in {pause:g} s")
            self.why = why

    def _shorten(self, window: Window, reply: str) -> None:
        if window.words <= 1:
            raise BadInput(f"query {window.qid!r}: {len(window.passages)} passages of one word are "
                           f"too long for {self.url} ({reply[:300]}); lower --window")
        window.words = window.words * 3 // 4

    def _renamed(self, body: dict, reply: str) -> bool:
        """Whether the reply refuses parameters of `body`; from now on each goes by its other name,
        or not at all."""
        refused = [name for name, instead in INSTEAD.items()
                   if name in body and re.search(rf"\b({name}|{instead or name})\b", reply)]
        with self.noting:
            for name in refused:
                if self.names[name] == name:  # no other thread was faster
                    self.names[name] = INSTEAD[name]
                    say(f"{self.url}: refuses {name} ({reply[:100]}); "
                        f"{INSTEAD[name] or 'nothing'} goes in its place")
        return bool(refused)

    # ------------------------------------------------------------------------------- one request

    def _body(self, window: Window) -> dict:
        values = {"max_tokens": self.answer_tokens or 8 * len(window.passages), "temperature": 0,
                  "seed": self.seed}
        messages = self.conversation(window.query, window.passages, window.words)
        body = {"model": self.model, "messages": messages}
        return body | {self.names[name]: value for name, value in values.items()
                       if self.names[name]}

    def _post(self, body: dict) -> tuple[int, dict | str, str]:
        """(status, the answer or what was said instead, Retry-After)."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            with self.opener.open(request, timeout=self.timeout) as reply:
                status, retry_after = reply.status, reply.headers.get("Retry-After", "")
                content = reply.read()
            if status == 200:
                return status, answer_of(content), retry_after
            said = f"HTTP {status}: {content.decode(errors='replace')}"
        except Exception as e:  # whatever urllib, json and a reply of another shape raise
            status, retry_after = NO_REPLY, ""
            said = f"no chat completion ({type(e).__name__}: {e})"
        said = " ".join(said.split())
        return status, said.replace(self.key, "***") if self.key else said, retry_after


def answer_of(content: bytes) -> dict:
    """The answer in a chat completion; whatever it raises says that the reply is none."""
    data = json.loads(content)
    choice, usage = data["choices"][0], data.get("usage") or {}
    text = choice["message"].get("content") or ""  # null where the model refuses
    if not isinstance(text, str):  # in parts, by some servers
        text = "".join(part.get("text") or "" for part in text)
    return {"text": text, "cut": choice.get("finish_reason") == "length",
            "prompt_tokens": int(usage.get("prompt_tokens") or 0),
            "answer_tokens": int(usage.get("completion_tokens") or 0)}
