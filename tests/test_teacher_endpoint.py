"""teacher.py listwise by a server: a judge that knows every grade, failures, refusals, and answers
that are asked for once."""

import contextlib
import json
import multiprocessing
import re
import resource
import shutil
import threading
import time
from collections import Counter

import pytest

import teacher
import teaching
from data.chat_server import Window
from data.runs import read_run
from data.texts import Texts
from teaching import (
    answered,
    by_two_processes,
    completion,
    expected,
    grade,
    judge,
    judged,
    llm,
    perfect,
    pointwise,
    reply,
)


@pytest.fixture
def serve():
    with teaching.servers() as start:
        yield start


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return teaching.graded_texts(tmp_path_factory.mktemp("graded"))


def counts_of(out):
    return json.loads(out.with_name(f"{out.name}.json").read_text())["counts"]


# ------------------------------------------------------------------------------------- the judgment


@pytest.mark.parametrize("prompt", ["rankzephyr", "rankgpt"])
def test_perfect_judge(graded, serve, monkeypatch, tmp_path, prompt):
    together, most, lock = 0, 0, threading.Lock()

    def handle(handler, number, body):
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.02)
        with lock:
            together -= 1
        judge(handler, number, body)

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--prompt", prompt) == 0
    got = read_run(tmp_path / "t.run")
    assert got == expected(graded) and list(got) == [f"q{q}" for q in range(5)]
    # the top window - stride of the whole list are exact
    for qid, first in read_run(graded / "first.run").items():
        best = sorted(first, key=lambda d: -grade(qid, d))[:5]
        assert list(got[qid])[:5] == best and list(got[qid].values())[:1] == [100.0]
    assert most > 1 and {path for path, *_ in seen} == {"/v1/chat/completions"}
    for body in (json.loads(body) for *_, body in seen):
        passages = len(judged(json.dumps(body))[1])
        assert (body["model"], body["temperature"], body["seed"]) == ("judge", 0, 1)
        assert body["max_tokens"] == 8 * passages
    assert counts_of(tmp_path / "t.run") == {"answers": 18, "in order": 18, "prompt tokens": 1800,
                                             "answer tokens": 180}
    assert len(seen) == 18
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "t.run", "t.run.answers-0.jsonl", "t.run.json"]


def test_depth_and_bad_windows(graded, serve, monkeypatch, tmp_path, capsys):
    url, _ = serve(judge)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--depth", 15) == 0
    assert read_run(tmp_path / "t.run") == expected(graded, depth=15)
    for flags, what in ((["--stride", 11], "stride <= window"), (["--stride", 0], "--stride")):
        assert llm(monkeypatch, graded, url, tmp_path / "u.run", *flags) == 2
        assert what in capsys.readouterr().err


def test_passages_are_cut_to_their_first_words(graded, serve, monkeypatch, tmp_path):
    url, seen = serve(judge)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--passage-words", 3) == 0
    said = "".join(body.decode() for *_, body in seen)
    assert "text d4 more" in said and "more and" not in said
    assert read_run(tmp_path / "t.run") == expected(graded)
    assert "passages shortened" not in counts_of(tmp_path / "t.run")  # asked for


def test_tags_are_one_column(graded, serve, monkeypatch, tmp_path):
    url, _ = serve(judge)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--model", "my judge\n") == 0
    lines = (tmp_path / "t.run").read_text().splitlines()
    assert {tuple(line.split(" ")[5:]) for line in lines} == {("my_judge_",)}


@pytest.mark.parametrize("text", [
    "I cannot.", " > ".join(f"[{i}]" for i in range(1, 11)), "Sure! [2] > [1]"])
def test_a_judge_that_is_no_teacher_is_said(graded, serve, monkeypatch, tmp_path, capsys, text):
    url, _ = serve(lambda handler, number, body: completion(handler, text))
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    what = "answers, all malformed or no query reordered: WARNING, this run is no teacher"
    assert f"18 {what}" in capsys.readouterr().err.splitlines()[-1]
    assert counts_of(tmp_path / "t.run")[what] == 18


def test_documents_that_the_dataset_lacks(graded, serve, monkeypatch, tmp_path, capsys):
    """An ir_datasets corpus only tells when it is read: the query is named, or the rest is ranked
    and counted."""
    url, _ = serve(judge)
    whole, first = Texts.documents, read_run(graded / "first.run")
    lost = list(first["q3"])[2]
    monkeypatch.setattr(Texts, "documents", lambda self, ids: {
        docid: text for docid, text in whole(self, ids).items() if docid != lost})
    teaching.small_llm(tmp_path / "llm")
    for command, what in ((llm, url), (pointwise, tmp_path / "llm")):
        out = tmp_path / f"{command.__name__}.run"
        with teaching.one_thread():
            assert command(monkeypatch, graded, what, out) == 2
            error = capsys.readouterr().err
            assert re.search(rf"query 'q\d': document '{lost}' is not in", error)
            out = tmp_path / f"{command.__name__}-skip.run"
            assert command(monkeypatch, graded, what, out, "--skip-missing") == 0
        got = {qid: ranked.keys() for qid, ranked in read_run(out).items()}
        assert got == {qid: ranked.keys() - {lost} for qid, ranked in first.items()}
        assert counts_of(out)["documents missing"] >= 1


# ------------------------------------------------------------------------ failures, and tried again


def test_malformed_truncated_late_and_failing_answers(graded, serve, monkeypatch, tmp_path, capsys):
    """Failures are tried again until the answer comes; answers out of form are repaired and counted
    by kind."""
    faults = {0: 500, 1: 429, 2: "late", 3: "short", 4: "nonsense", 5: "hang up", 6: 503, 7: 502}
    over = threading.Event()

    def fail(handler, fault):
        if fault == 429:
            reply(handler, 429, b"busy", [("Retry-After", "0")])
        elif isinstance(fault, int):
            reply(handler, fault, b"busy")
        elif fault == "late":
            over.wait(60)
        elif fault == "short":
            reply(handler, 200, b'{"choices": [{"mess', length=500)
        elif fault == "nonsense":
            reply(handler, 200, b"<html>a proxy speaks</html>")
        else:
            handler.connection.close()

    def handle(handler, number, body):
        qid, _ = judged(body)
        if number in faults:
            fail(handler, faults[number])
        elif qid == "q3":
            completion(handler, "[2] > [2] > [77", "length")
        elif qid == "q1":
            completion(handler, f"Sure! {perfect(body)}")
        else:
            completion(handler, perfect(body))

    url, seen = serve(handle)
    out = tmp_path / "t.run"
    assert llm(monkeypatch, graded, url, out, "--timeout", 2, "--retries", 9, "--concurrency",
               3) == 0
    over.set()
    want, first = expected(graded), list(read_run(graded / "first.run")["q3"])
    want["q3"] = {d: 100.0 - r for r, d in enumerate([first[1], first[0], *first[2:]])}
    assert read_run(out) == want
    counts = counts_of(out)
    assert (counts["answers"], counts["in order"], counts["malformed"]) == (18, 11, 7)
    assert [counts[k] for k in ("repeated", "out of range", "missing", "cut off")] == [1, 1, 1, 1]
    assert len(seen) == 18 + 8 and "7 malformed" in capsys.readouterr().err


MESSAGE = {"role": "assistant", "content": "x"}
NO_COMPLETIONS = [
    b"[]", b"null", b"5", b'"text"', b"{}", b'{"choices": []}', b'{"choices": null}',
    b'{"choices": [null]}', b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": 5}}]}', b"[" * 99999,
    b'{"choices": [{"message": {"content": [5]}}]}', b"\xff\xfe", b'{"error": {"message": "down"}}',
    json.dumps({"choices": [{"message": MESSAGE}], "usage": {"prompt_tokens": "many"}}).encode(),
    json.dumps({"choices": [{"message": MESSAGE}], "usage": [7]}).encode(),
    b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": Infinity}}',
]


def test_replies_of_many_forms(graded, serve, monkeypatch, tmp_path):
    """What is no chat completion is asked again, what is one in another form is read; nothing is a
    traceback."""

    def handle(handler, number, body):
        if number % 2 == 0 and number < 2 * len(NO_COMPLETIONS):
            return reply(handler, 200, NO_COMPLETIONS[number // 2])
        text = perfect(body)
        content, usage = {
            "q0": (text, None),
            "q1": ([{"type": "text", "text": text[:7]}, {"type": "text", "text": text[7:]},
                    {"type": "image", "text": None}], {"prompt_tokens": None}),
            "q2": (text, {}),
            "q3": (None, {"completion_tokens": 3}),
        }[judged(body)[0]]
        choice = {"message": {"content": content, "refusal": "no"}}
        reply(handler, 200, json.dumps({"choices": [choice], "usage": usage}).encode())

    url, seen = serve(handle)
    out = tmp_path / "t.run"
    assert llm(monkeypatch, graded, url, out, "--retries", 1, "--concurrency", 1) == 0
    want, got = expected(graded), read_run(out)
    want["q3"] = {d: 100.0 - r for r, d in enumerate(read_run(graded / "first.run")["q3"])}
    assert got == want and len(seen) == 18 + len(NO_COMPLETIONS)
    counts = counts_of(out)
    assert [counts[k] for k in ("malformed", "answer tokens", "queries kept in order")] == [1, 3, 1]


@pytest.mark.parametrize("fault", ["500", "html", "hang up"])
def test_a_server_that_is_down_is_asked_by_one_thread_at_a_time(graded, serve, monkeypatch,
                                                                tmp_path, capsys, fault):
    together, lock, most, four = [], threading.Lock(), [], threading.Barrier(4)

    def handle(handler, number, body):
        with lock:
            together.append(number)
            most.append(len(together))
        if number < 4:
            four.wait(10)
        with lock:
            together.remove(number)
        if fault == "hang up":
            return handler.connection.close()
        reply(handler, 500 if fault == "500" else 200, b"<html>the proxy\nspeaks</html>")

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 4, "--retries",
               3) == 2
    # the four that were under way, then one after the other
    assert len(seen) == 4 + 3 and max(most[4:]) == 1
    *said, error = capsys.readouterr().err.splitlines()[1:]
    pauses = [line.rpartition("; tried again in ")[2] for line in said]
    assert pauses == ["0.01 s", "0.02 s", "0.04 s"]
    assert error.startswith(f"error: {url}/v1/chat/completions: no answer in 4 tries (the last: ")
    what = "HTTP 500: <html>the proxy speaks</html>" if fault == "500" else "no chat completion"
    assert what in error


def test_a_request_that_fails_alone_has_its_own_tries(graded, serve, monkeypatch, tmp_path, capsys):
    """The others' answers in between end the failures in a row, not the tries that the request has
    had itself."""
    left = {"q1": 4}

    def handle(handler, number, body):
        qid, _ = judged(body)
        if left.get(qid, 0):
            left[qid] -= 1
            return reply(handler, 500, b"busy")
        time.sleep(0.03)
        judge(handler, number, body)

    def command(name):
        return llm(monkeypatch, graded, url, tmp_path / name, "--concurrency", 3, "--retries", 4)

    url, seen = serve(handle)
    assert command("t.run") == 0
    assert read_run(tmp_path / "t.run") == expected(graded) and len(seen) == 18 + 4
    left["q1"] = 10**6
    assert command("u.run") == 2
    assert 10**6 - left["q1"] == 5 and "no answer in 5 tries" in capsys.readouterr().err
    left["q1"] = 0
    assert command("u.run") == 0 and read_run(tmp_path / "u.run") == expected(graded)


def test_threads_that_wait_stop_at_once(graded, serve, monkeypatch, tmp_path, capsys):
    three = threading.Barrier(3)

    def handle(handler, number, body):
        three.wait(60)  # all are under way before the first is told to wait
        if number:
            time.sleep(0.3)
            return reply(handler, 403, b"no")
        reply(handler, 503, b"busy", [("Retry-After", "500")])

    url, _ = serve(handle)
    start = time.perf_counter()
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 3) == 2
    assert time.perf_counter() - start < 30 and "HTTP 403: no" in capsys.readouterr().err


def test_pauses_double_and_follow_the_server(graded, serve, monkeypatch, tmp_path):
    def handle(handler, number, body):
        if number < 5:
            asked = [("Retry-After", "7")] if number == 4 else []
            return reply(handler, 500 + number, b"busy", asked)
        judge(handler, number, body)

    pauses = []
    monkeypatch.setattr(teacher.Endpoint, "_stopped_within",
                        lambda self, pause: pauses.append(pause))
    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 1) == 0
    assert [pause for pause in pauses if pause] == [0.01, 0.02, 0.04, 0.08, 7.0]
    assert len(seen) == 18 + 5


def test_what_a_thread_knows_of_the_others_failures(monkeypatch):
    """A try that began before the others failed adds nothing to theirs; whoever asks next waits as
    long as they do."""
    server = teacher.Endpoint("http://127.0.0.1:9", "judge", None, passage_words=9,
                              answer_tokens=None, seed=1, concurrency=1, timeout=1, retries=5)
    late, other = (Window(qid, "query", ["passage"], 1) for qid in ("q0", "q1"))
    for before in range(3):
        server._note_failure(other, before, "busy", "")
    server._note_failure(late, 0, "still busy", "")
    assert (server.failures, server.why, late.tried, other.tried) == (3, "still busy", 1, 3)
    pauses = []
    monkeypatch.setattr(server, "_stopped_within", pauses.append)
    fresh = Window("q2", "query", ["passage"], 1)
    server._wait(fresh, server.failures)
    assert pauses == [4.0] and other.pause == 4.0 and late.pause == 1.0


def test_no_server(graded, monkeypatch, tmp_path, capsys):
    assert llm(monkeypatch, graded, "http://127.0.0.1:9", tmp_path / "t.run", "--retries", 2) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: http://127.0.0.1:9/v1/chat/completions: no answer in 3 tries")


# ----------------------------------------------------------------------------------------- refusals


def test_parameters_that_the_server_refuses(graded, serve, monkeypatch, tmp_path, capsys):
    """The newer OpenAI models: each refusal is said once, and the form they want is kept for all
    that follows."""
    refusals = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported. Use "
                      "'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
        "seed": "Unrecognized request argument supplied: seed",
    }

    def handle(handler, number, body):
        named = [name for name in refusals if name in json.loads(body)]
        if named:
            return reply(handler, 422 if named[0] == "seed" else 400, refusals[named[0]].encode())
        judge(handler, number, body)

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 4) == 0
    assert read_run(tmp_path / "t.run") == expected(graded)
    bodies = [json.loads(body) for *_, body in seen]
    taken = [b for b in bodies if b.keys() == {"model", "messages", "max_completion_tokens"}]
    # every thread is refused thrice at the most
    assert len(taken) == 18 and taken[-8:] == bodies[-8:] and len(bodies) <= 18 + 12
    assert {b["max_completion_tokens"] for b in taken} == {80, 64, 48}
    said = capsys.readouterr().err
    assert [said.count(f"refuses {name} (HTTP 4") for name in refusals] == [1, 1, 1]


def test_a_parameter_is_refused_for_ever(graded, serve, monkeypatch, tmp_path, capsys):
    url, seen = serve(lambda handler, number, body:
                      reply(handler, 400, b"temperature and seed: never"))
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 1) == 2
    assert len(seen) == 2 and "HTTP 400: temperature and seed: never" in capsys.readouterr().err


@pytest.mark.parametrize("status, text", [
    (400, "This model's maximum context length is 80 tokens, max_tokens is 80"),
    (400, "context_length_exceeded"),
    (400, "the request exceeds the available context size, try increasing it"),
    (413, ""),
    (422, "prompt is too long"),
])
def test_windows_beyond_the_servers_context(graded, serve, monkeypatch, tmp_path, capsys, status,
                                            text):
    """Only they are asked again, with shorter passages; what was shortened is counted."""
    limit = 60

    def handle(handler, number, body):
        said = json.loads(body)["messages"][1]["content"]
        if len(re.findall("more|and", said)) > limit:
            return reply(handler, status, text.encode())
        judge(handler, number, body)

    url, seen = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    assert read_run(tmp_path / "t.run") == expected(graded)
    shortened = sum(row["shortened"] for row in answered(tmp_path / "t.run.answers-0.jsonl"))
    assert 0 < counts_of(tmp_path / "t.run")["passages shortened"] == shortened < 18 < len(seen)
    limit = -1
    assert llm(monkeypatch, graded, url, tmp_path / "u.run", "--concurrency", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: query 'q0': 10 passages of one word are too long")
    assert "lower --window" in error


def test_the_key_is_sent_and_never_shown(graded, serve, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    url, seen = serve(judge)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    assert {headers["Authorization"] for _, headers, _ in seen} == {"Bearer sk-very-secret"}
    refusing, _ = serve(lambda handler, number, body:
                        reply(handler, 401, b"wrong key: sk-very-secret"))
    assert llm(monkeypatch, graded, refusing, tmp_path / "u.run") == 2
    away, there = serve(lambda handler, number, body:
                        reply(handler, 302, b"", [("Location", f"{url}/elsewhere")]))
    before = len(seen)
    assert llm(monkeypatch, graded, away, tmp_path / "v.run") == 2
    assert len(seen) == before and there
    shown = capsys.readouterr()
    assert "HTTP 401: wrong key: ***" in shown.err and "HTTP 302" in shown.err
    written = "".join(p.read_text() for p in tmp_path.iterdir())
    assert "secret" not in shown.err + shown.out + written


# ------------------------------------------------------------------------- answers that are damaged

DAMAGE = {  # of the line with q0's third answer
    "torn": lambda line: line[:40],
    "garbage": lambda line: b"\xff\x00\xfe" * 9,
    "deep": lambda line: b"[" * 99999,
    "empty": lambda line: b"",
    "number": lambda line: b"17",
    "no text": lambda line: line.replace(b'"text"', b'"next"'),
    "another type": lambda line: line.replace(b'"window": 2', b'"window": "2"'),
    "another window": lambda line: line.replace(b'"window": 2', b'"window": 3'),
    "another query": lambda line: line.replace(b'"q0"', b'"q1"'),
    "a digit": lambda line: re.sub(rb"\[(\d+)\] > \[(\d+)\]", rb"[\2] > [\1]", line, count=1),
    "a query that is a list": lambda line: line.replace(b'"q0"', b'["q0"]'),
    "twice": lambda line: line + b"\n" + line,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_answers_alone_are_asked_again(graded, serve, monkeypatch, tmp_path, capsys,
                                               damage):
    url, seen = serve(judge)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    (tmp_path / "t.run").unlink()
    file = tmp_path / "t.run.answers-0.jsonl"
    lines, rows = file.read_bytes().splitlines(), answered(file)
    place = next(i for i, row in enumerate(rows, 1) if (row["qid"], row["window"]) == ("q0", 2))
    behind = [row for row in rows[place:] if row["qid"] == "q0"]
    lines[place] = DAMAGE[damage](lines[place])
    file.write_bytes(b"\n".join(lines))  # and the last one's end is lost
    capsys.readouterr()
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 0
    assert read_run(tmp_path / "t.run") == expected(graded)
    again = 0 if damage == "twice" else 1 + len(behind)
    left = {"twice": 1, "empty": len(behind)}.get(damage, again)
    assert len(seen) == 18 + again
    said = f"going on after {18 - again} answers; {left} damaged lines left out\n"
    assert said in capsys.readouterr().err
    rows = answered(file)
    assert len(rows) == 18 and sorted(Counter(row["qid"] for row in rows).values()) == [1, 4, 6, 7]


@pytest.mark.parametrize("header", [b"", b"\n", b"\xff\x00", b'{"command": "li',
                                    b"[" * 99999 + b"\n", b"null\n"])
def test_answers_with_a_wrong_header(graded, serve, monkeypatch, tmp_path, capsys, header):
    url, seen = serve(judge)
    file = tmp_path / "t.run.answers-0.jsonl"
    file.write_bytes(header)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run") == 2
    error, = capsys.readouterr().err.splitlines()[1:]
    assert error.startswith(
        f"error: {file}:1: damaged, or begun by a command with other flags")
    assert "give --overwrite" in error and file.read_bytes() == header and not seen
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--overwrite") == 0 and len(seen) == 18


def test_another_plan_is_another_run(graded, serve, monkeypatch, tmp_path, capsys):
    """A query that reads otherwise is another question, whatever its id."""
    url, seen = serve(lambda handler, number, body:
                      reply(handler, 400, b"no") if number else judge(handler, number, body))
    shutil.copytree(graded, tmp_path / "g")

    def command():
        return llm(monkeypatch, tmp_path / "g", url, tmp_path / "t.run", "--concurrency", 1)

    assert command() == 2
    queries = tmp_path / "g" / "corpus" / "queries.jsonl"
    queries.write_text(queries.read_text().replace("query q4", "query q4 of another"))
    assert command() == 2 and len(seen) == 2
    error = "t.run.answers-0.jsonl:1: damaged, or begun by a command with other flags"
    assert error in capsys.readouterr().err


# ------------------------------------------------------------------------ answers asked for once


def test_answers_on_a_full_disk(graded, serve, monkeypatch, tmp_path, capsys):
    """The file may not grow: one line says so, and with room again nothing that is kept is asked
    twice."""
    url, seen = serve(judge)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (1600, 2500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 2) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = capsys.readouterr().err
        assert "free some space" in said.splitlines()[-1] and "Traceback" not in said
    assert 4 < len(seen) < 18
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 2) == 0
    assert read_run(tmp_path / "t.run") == expected(graded) and len(seen) <= 18 + 2 * 2


def test_the_disk_full_at_the_end_leaves_a_command_that_goes_on(graded, serve, monkeypatch,
                                                                tmp_path, capsys):
    """Whichever file cannot be written: OUT is the last, so that it is not taken for finished."""
    url, seen = serve(judge)
    out = tmp_path / "t.run"
    for file in ("t.run.json", "t.run"):
        with teaching.full_disk(monkeypatch, file):
            assert llm(monkeypatch, graded, url, out) == 2 and not out.exists()
        assert "give the same command again: it goes on" in capsys.readouterr().err
    assert llm(monkeypatch, graded, url, out) == 0 and out.exists() and len(seen) == 18


def test_interrupted_listwise_asks_nothing_twice(graded, serve, monkeypatch, tmp_path, capsys):
    refused_from = 8

    def handle(handler, number, body):
        if refused_from <= number < refused_from + 50:
            return reply(handler, 400, b"no money left")
        time.sleep(0.01)
        judge(handler, number, body)

    def command(*more):
        return llm(monkeypatch, graded, url, out, "--concurrency", 2, *more)

    url, seen = serve(handle)
    asked, out = [], tmp_path / "t.run"
    for _ in range(2):
        assert command() == 2 and not out.exists()
        assert "HTTP 400: no money left" in capsys.readouterr().err
        partial = tmp_path / "t.run.partial-0"
        finished = read_run(partial) if partial.stat().st_size else {}
        assert all(finished[q] == expected(graded)[q] for q in finished)
        asked += [body for *_, body in seen[:refused_from]][len(asked) :]
        del seen[len(asked) :]  # what was refused was not answered
        refused_from += 6
    assert len(finished) >= 1
    refused_from = 10**6
    assert command() == 0 and read_run(out) == expected(graded)
    assert max(Counter(body for *_, body in seen).values()) == 1 and len(seen) == 18
    assert counts_of(out)["answers"] == 18
    out.unlink()  # the answers alone make the run again
    assert command() == 0 and len(seen) == 18 and read_run(out) == expected(graded)
    out.unlink()
    assert command("--prompt", "rankgpt") == 2
    assert "other flags" in capsys.readouterr().err and len(seen) == 18


def test_killed_listwise_goes_on(graded, serve, monkeypatch, tmp_path):
    killed = threading.Event()

    def handle(handler, number, body):
        if number == 8:  # is under way when the process is killed
            killed.wait(60)
        with contextlib.suppress(ConnectionError):
            judge(handler, number, body)

    url, seen = serve(handle)
    out, answers = tmp_path / "t.run", tmp_path / "t.run.answers-0.jsonl"
    arguments = (monkeypatch, graded, url, out, "--concurrency", 1)
    process = multiprocessing.get_context("fork").Process(target=llm, args=arguments)
    process.start()
    while len(seen) < 9 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    killed.set()
    assert len(answered(answers)) == 8
    assert read_run(tmp_path / "t.run.partial-0").keys() == {"q0"}
    with open(answers, "a") as file:
        file.write('{"qid": "q1", "te')  # as a power cut leaves it
    assert llm(*arguments) == 0 and read_run(out) == expected(graded)
    again = Counter(body for *_, body in seen)
    assert len(again) == 18 and again.total() <= 18 + 1  # the one that was under way
    out.unlink()
    assert llm(*arguments) == 0 and again.total() == len(seen)
    assert read_run(out) == expected(graded)


def test_answers_under_way_are_kept_when_one_fails(graded, serve, monkeypatch, tmp_path):
    three, refused = threading.Barrier(3), threading.Event()

    def handle(handler, number, body):
        if number < 3:
            three.wait(60)  # all are under way before one fails
        if judged(body)[0] == "q1" or number >= 3:
            reply(handler, 403, b"no")
            return refused.set()
        refused.wait(60)
        time.sleep(0.3)
        judge(handler, number, body)

    url, _ = serve(handle)
    assert llm(monkeypatch, graded, url, tmp_path / "t.run", "--concurrency", 3) == 2
    rows = answered(tmp_path / "t.run.answers-0.jsonl")
    assert sorted(row["qid"] for row in rows) == ["q0", "q2"]


def test_two_processes_write_the_same_file(graded, serve, monkeypatch, tmp_path):
    """Byte for byte what one process writes."""
    url, seen = serve(judge)

    def command(name):
        return llm(monkeypatch, graded, url, tmp_path / name)

    assert by_two_processes(lambda: command("two.run")) == [0, 0] and len(seen) == 18
    assert command("one.run") == 0
    assert (tmp_path / "two.run").read_bytes() == (tmp_path / "one.run").read_bytes()
    assert counts_of(tmp_path / "two.run")["answers"] == 18
