"""`python tests/bench gpu` in its tiny form, and what it stands on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from bench import clock, gpu, losses, shapes, step, values
from bench.section import Section, card_totals
from kernels import roofline

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Absent())
"""
FAULT = """
import os, signal, sys
if "--section" in sys.orig_argv and "attention" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGSEGV)
"""


def run(folder, before, *argv):
    """A process of Python that runs `before` at its start, and so do those it starts."""
    (folder / "sitecustomize.py").write_text(before)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture
def section(tmp_path):
    """One that has time, on one thread: on small shapes several wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Section(True, 1e12, tmp_path / "found.json")
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_sections_are_written_down_and_a_fault_costs_its_own_alone(tmp_path):
    names = ["values", "attention", "losses"]
    command = ["tests/bench", "gpu", "--tiny", "--out", str(tmp_path), "--only", *names]
    done = run(tmp_path, FAULT, *command)
    assert done.returncode == 1, done.stderr  # for the fault
    result = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert list(result["sections"]) == names and result["machine"]["torch"] == torch.__version__
    checked, attention, timed = result["sections"].values()

    rows = checked["tables"]["Relative errors against float64"]
    kinds = {row["what"].split()[0].strip(",") for row in rows}
    assert all(0 <= row[error] < 1e-5 for row in rows for error in ("outputs", "gradients"))
    losses_timed = timed["tables"]["Losses with gradient"]
    assert all(row["us"] > 0 for row in losses_timed)
    if triton.__version__.startswith("3.6"):
        # whose interpreter fails with numpy 2.4: said, and the rest goes on
        assert kinds >= {"rotary", "geglu"} and len(losses_timed) >= 8
        errors = checked["errors"] + timed["errors"]
        assert all("0-dimensional" in error["error"] for error in errors)
    else:
        assert kinds == {"loss", "attention", "add_norm", "rotary", "geglu"} and len(rows) == 21
        assert len(losses_timed) == 16 and not checked["errors"] and not timed["errors"]

    ending = "the process ended with status -11"
    assert attention["errors"] == [{"what": "attention", "error": ending}]

    text = (tmp_path / "gpu-tiny.md").read_text()
    assert f"- attention: {ending}" in text and "| loss | lists | side | us |" in text
    assert all(f"\n## {name}\n" in text for name in names)


@pytest.mark.slow
def test_a_training_step_of_every_side(section):
    """All begin with the same loss, dropout apart."""
    from sentence_transformers import CrossEncoder as Peer

    shapes.train(section, "MiniLM-L12")
    shapes.train_beside(section, "MiniLM-L12", Peer)
    alone, beside = json.loads(section.into.read_text())["tables"].values()
    rows = alone + beside
    assert [row["side"].split(", 2")[0].split(", 1")[0] for row in rows] == [
        "ours", "ours, attention by torch", "Hugging Face padded",
        "ours", "ours, from text", "sentence-transformers"]  # fmt: skip
    assert all(abs(row["first loss"] - rows[0]["first loss"]) < 0.05 for row in rows)
    assert all(row["ms"] > 0 and row["MFU"] > 0 for row in rows) and not section.found["errors"]


def test_scoring_where_sentence_transformers_is_absent(section, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.setattr(shapes, "DOCUMENTS", {"ModernBERT-base": 16})
    shapes.score(section)
    rows = section.found["tables"]["Scoring"]
    assert [row["side"].split(",")[0] for row in rows] == ["ours", "ours", "Hugging Face padded"]
    assert all(row["differs from ours by"] < 1e-5 and row["pairs/s"] > 0 for row in rows)
    (error,) = section.found["errors"]
    assert error["what"] == "sentence-transformers" and "sentence_transformers" in error["error"]


@pytest.mark.slow
def test_scoring_from_text(section):
    from sentence_transformers import CrossEncoder as Peer

    shapes.score_texts(section, "BERT-base", shapes.scoring.random_pairs(12), Peer)
    ours, peer = section.found["tables"]["Scoring from text"]
    assert ours["side"] == "ours, from text" and "sentence-transformers, " in peer["side"]
    assert ours["differs from ours by"] == 0 < peer["differs from ours by"] < 1e-5
    assert ours["pairs"] == 12 and not section.found["errors"]


def test_a_step_by_graphs_is_made_and_seen_three_times_with_its_attention(section, monkeypatch):
    """Before it is timed; all of it by the attention that is asked for."""
    asked, seen = [], []

    def gradient(*_, graphs=None, **__):
        asked.append(graphs is not None)
        return SimpleNamespace(on_gpu=False)

    monkeypatch.setattr(step, "ListGradient", gradient)
    monkeypatch.setattr(step, "fused_adamw", lambda *_: None)
    monkeypatch.setattr(step.Step, "flush", lambda self: [(0.5, 1.0)])
    monkeypatch.setattr(step.Step, "__call__",
                        lambda *_: seen.append(os.environ.get("ATTENTION")) or [])  # fmt: skip
    given = shapes.Training(section, "MiniLM-L12")
    given.ours()
    assert asked == [False] and not seen  # on a CPU
    (make,) = shapes.attention_by_torch("BERT", lambda: given.ours(graphs=True)).values()
    run = make()
    assert asked == [False, True] and seen == ["torch"] * 3 * given.count
    assert run() == 0.5 and seen.pop() == "torch" and os.environ.get("ATTENTION") is None


def test_where_the_time_of_the_host_goes(section):
    calls = []

    def one():
        calls.append(sum(range(100_000)))

    shapes.note_host_time(section, "BERT-base", one)
    (note,) = section.found["notes"]
    assert len(calls) == 10 and note.startswith("BERT-base, the host's time of 10 steps")
    assert "       10 " in note and "built-in method builtins.sum" in note


def test_sides_that_are_slow_have_fewer_looks(monkeypatch):
    looks = {"quick": [], "slow": []}

    def timed(run, device, calls):
        run()
        return clock.Timing({"quick": 0.1, "slow": 0.4}[run.__name__], 0.0, 0.0)

    def quick():
        looks["quick"].append(1)

    def slow():
        looks["slow"].append(1)

    monkeypatch.setattr(clock, "timed", timed)
    sides = {"quick": quick, "slow": slow}
    timings = clock.alternate(sides, 5, calls=2, budget=1.0)
    # 0.2 and 0.8 s a look, after one to warm up
    assert len(looks["quick"]) == 6 and len(looks["slow"]) == 3
    assert timings["quick"].seconds == 0.1 and timings["slow"].seconds == 0.4
    clock.alternate(sides, 5)
    assert len(looks["quick"]) == len(looks["slow"]) + 3 == 12


def test_what_there_is_no_time_for_is_noted(section):
    section.until, done = time.time() + 0.5, []

    def measure(name):
        done.append(name)
        time.sleep(0.3)

    section.while_time_lasts("beside", ["a", "b", "c"], measure)
    assert done == ["a"] and section.found["notes"] == ["beside: no time for b, c"]
    assert not section.found["errors"]


FAILING = """
import os, signal, time, pytest

pytestmark = pytest.mark.gpu

def test_published_right():
    pass

def test_published_wrong():
    assert [1, 2] == [1, 3], "the second"

@pytest.fixture
def broken():
    raise ValueError("not made")

def test_published_without_its_fixture(broken):
    pass

def test_published_last():
    while len(open(os.environ["FAILURES"]).readlines()) < 2:
        time.sleep(0.01)
    os.kill(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_failures_are_named_though_pytest_is_killed(section, tmp_path, monkeypatch, processes):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(FAILING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if processes:
        pytest.importorskip("xdist")
        monkeypatch.setenv("PYTEST_ADDOPTS", f"-n {processes}")
    gpu.tests(section)
    (note,), (error,) = section.found["notes"], section.found["errors"]
    names = [f"tests/test_some.py::test_published_{name}" for name in (
        "without_its_fixture", "wrong")]  # fmt: skip
    ending, found = error["error"].split(": ")
    assert ending == "exit status -9" and sorted(found.split(", ")) == names
    assert all(note.count(f"\nFAILED {name}\n") == 1 for name in names)
    assert "\nE   AssertionError: the second" in note and "\nE   ValueError: not made" in note


def test_a_command_is_interrupted_then_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TO_COUNT", 0.3)
    script = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("counted", flush=True)
time.sleep(60)
"""
    printed, start = tmp_path / "printed", time.time()
    command = [sys.executable, "-I", "-c", script]
    assert gpu.ending_of(command, os.environ, printed, start) == "its time was up"
    assert printed.read_text() == "counted\n" and 1.3 < time.time() - start < 10


def test_many_failures_share_the_lines_of_the_note():
    traceback = "\n".join(f"line {i}" for i in range(90))
    assert gpu.failure_lines([["a", traceback]]) == ["FAILED a", *traceback.split("\n")[-39:]]
    many = gpu.failure_lines([[f"t{i}", traceback] for i in range(50)])
    assert many[:3] == ["FAILED t0", "line 89", "FAILED t1"] and len(many) == 100


def test_one_list_in_one_pass_and_in_two(section):
    for two_passes in (False, True):
        shapes.one_list(section, "BERT-base", 6, two_passes)
    first, second = section.found["tables"]["One list"]
    assert first["tokens"] == second["tokens"] == 6 * 91
    assert first["keep"] > 0 and second["keep"] == 0


def test_a_section_beyond_its_time_is_ended():
    found = gpu.result_of("tests", True, 1.0)
    # before it is ended it may have come to what it has no time for
    errors = [error["error"] for error in found["errors"] if error["error"] != "no time was left"]
    assert errors == ["ended after its 1 s"]


def test_nothing_begins_when_the_time_is_up(section):
    section.until = 0.0
    with pytest.raises(SystemExit), section.tolerates("a", "b"):
        raise AssertionError("begun")
    found = json.loads(section.into.read_text())
    assert found["errors"] == [{"what": "a, b", "error": "no time was left"}]


def test_a_lost_card_ends_the_section(section):
    with section.tolerates("one"):
        raise ValueError("of its own")
    with pytest.raises(SystemExit), section.tolerates("two"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert [error["what"] for error in section.found["errors"]] == ["one", "two"]


def test_a_value_out_of_bounds_is_an_error(section):
    leaf = torch.randn(5)
    values.compare(section, "right", torch.float32, torch.sin, torch.sin, [leaf])
    values.compare(section, "wrong", torch.float32, torch.sin, torch.cos, [leaf])
    values.compare(section, "no number", torch.float32, lambda x: x * torch.nan, torch.cos, [leaf])
    errors = [error["what"] for error in section.found["errors"]]
    assert errors == ["wrong, float32", "no number, float32"]


def test_without_a_card_the_command_asks_for_tiny(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--tiny" in capsys.readouterr().err


def test_the_clock_waits_for_a_card_on_both_sides(monkeypatch):
    """And counts its peak beyond what was there. A card is told by its device's type alone."""
    done, bytes_now = [], {"memory_allocated": 2**30, "max_memory_allocated": 3 * 2**30}
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: done.append(name))
    for name, count in bytes_now.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, count=count: count)
    timing = clock.timed(lambda: done.append("run"), torch.device("cuda"), calls=2)
    assert done == ["synchronize", "reset_peak_memory_stats", "run", "run", "synchronize"]
    assert timing.gib == 2.0 and timing.host >= 0


def test_times_of_a_card_by_kernel():
    def event(name, start, end, device="CUDA", note=False):
        return SimpleNamespace(name=name, device_type=getattr(torch.autograd.DeviceType, device),
                               is_user_annotation=note,
                               time_range=SimpleNamespace(start=start, end=end))  # fmt: skip

    events = [event("a", 0, 10), event("b", 10, 50), event("a", 50, 70), event("a", 0, 99, "CPU"),
              event("step", 0, 60, note=True)]  # fmt: skip
    totals = card_totals(events, calls=2)
    assert list(totals) == ["b", "a"]
    assert totals["a"] == pytest.approx((15e-6, 1.0)) and totals["b"] == pytest.approx((20e-6, 0.5))


def test_losses_goes_on_where_the_interpreter_fails(monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nTypeError: only 0-dimensional\n")
    monkeypatch.setattr(losses.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(losses, "SIZES", (10,))
    assert losses.main(["--queries", "1", "--list", "4", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "not counted, since Triton's interpreter failed: TypeError: only" in printed
    assert "| kl |" in printed and "times are not measured" in printed


def test_global_layers_of_a_config_that_does_not_say_every_how_many():
    import transformers

    config = transformers.ModernBertConfig(classifier_pooling="mean")
    lengths = [90, 300]
    by_list = roofline.flops_per_step(roofline.config_of(config), lengths)
    assert by_list == roofline.flops_per_step(roofline.MODELS["modernbert"], lengths)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    assert roofline.flops_per_step(roofline.config_of(config), lengths) > by_list


def test_train_and_rerank_import_without_what_a_card_lacks(tmp_path):
    lacks = {"pytrec_eval", "ir_datasets", "bm25s", "Stemmer"}
    script = """
import train, rerank, evaluate
train.parse(["--backbone", "minilm", "--loss", "infonce"])
try:
    evaluate.evaluate({"q": {"d": 1}}, {"q": {"d": 1.0}})
except ModuleNotFoundError as e:
    print(e)
"""
    done = run(tmp_path, BLOCK.format(names=lacks), "-c", script)
    assert done.stdout.strip() == "No module named 'pytrec_eval'", done.stderr
