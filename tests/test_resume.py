"""A training that is killed, stopped by a signal or short of disk goes on to the same bytes."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

import train
import training
from data.command import FULL, BadInput
from data.run_folder import save_checkpoint
from training import FOREVER, ROOT, Training, train_here, train_on_ranks, weights, words_of

place = pytest.fixture(scope="module")(training.make_place)


def end_at_any_instant(folder, words, out, seconds, rng) -> bool:
    """Whether a kill came before the run's own end; without it the run begins anew."""
    run = Training(folder, words)
    run.process.join(rng.uniform(0.1, 0.4) * seconds)
    if run.process.is_alive():
        os.kill(run.pid, signal.SIGKILL)
        return run.end() == -signal.SIGKILL
    assert run.end() == 0, run.said
    shutil.rmtree(out)
    return False


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_instant_it_ends_with_the_same_bytes(place, tmp_path, kills):
    flags = {"steps": 60, "save-every": 2, "eval-every": 15}
    whole, broken, logs = tmp_path / "whole", tmp_path / "broken", tmp_path / "logs"
    run, begin = Training(logs, words_of(place, out=whole, **flags)), time.time()
    assert run.end() == 0, run.said
    seconds, rng = time.time() - begin, np.random.default_rng(3)
    words = words_of(place, out=broken, resume=True, **flags)
    killed = [end_at_any_instant(logs, words, broken, seconds, rng) for _ in range(kills)]
    while sum(killed) < kills:
        killed.append(end_at_any_instant(logs, words, broken, seconds, rng))
        assert len(killed) < 3 * kills
    run = Training(logs, words)
    assert run.end() == 0, run.said
    assert weights(broken) == weights(whole)
    a, b = (torch.load(out / "last/checkpoint.pt") for out in (whole, broken))
    assert a["step"] == b["step"] == 60 and a["history"] == b["history"]
    assert all(map(torch.equal, a["model"].values(), b["model"].values()))


def test_resuming_on_other_data_is_refused(place, tmp_path):
    lists = tmp_path / "t.run"
    how = {"loss": "ranknet", "lists": lists, "steps": 3, "out": tmp_path / "run"}
    lists.write_bytes((place / "teacher.run").read_bytes())
    assert train_here(place, **how) == 0
    (tmp_path / "run/README.md").unlink()  # as if interrupted after its last step
    lines = lists.read_text().splitlines(keepends=True)
    lists.write_text("".join(lines[:-1]))
    with pytest.raises(BadInput, match="t.run changed since"):
        train_here(place, resume=True, **how)
    lists.write_text("".join(lines))
    assert train_here(place, resume=True, **how) == 0 and (tmp_path / "run/README.md").exists()


def test_a_file_is_known_again_by_its_path_however_it_is_written(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    how = {"loss": "ranknet", "lists": "./teacher.run", "steps": 1, "out": tmp_path / "run"}
    assert train_here(place, **how) == 0
    assert "teacher.run" in train.begun_with(tmp_path / "run/args.json")["data"]


# ----------------------------------------------------------------------------------------- workers


def test_workers_tokenise_after_the_fork(place, tmp_path):
    """Texts are tokenised before the fork too, by threads that the workers do not have; and workers
    change nothing."""
    for workers in (0, 2):
        out = tmp_path / str(workers)
        run = Training(tmp_path / "logs", words_of(place, steps=4, workers=workers, out=out),
                       TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS="2")
        assert run.end() == 0, run.said
    assert weights(tmp_path / "0") == weights(tmp_path / "2")


# ----------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(place, tmp_path, number, code):
    out = tmp_path / "run"
    run = Training(tmp_path / "logs", words_of(place, out=out, **FOREVER))
    run.wait_for_steps(out)
    os.kill(run.pid, number)
    assert run.end(60) == code and "checkpoint written; --resume" in run.said
    assert 0 < torch.load(out / "last/checkpoint.pt")["step"] < 100000


def test_signals_to_the_whole_group_spare_the_workers(place, tmp_path):
    """As a terminal and torchrun send them: the workers hand over the batches of the step in hand.
    Also, tokenising in a forked process ends though the parent's tokenizer has threads."""
    out = tmp_path / "run"
    run = Training(tmp_path / "logs", words_of(place, out=out, workers=2, **FOREVER),
                   before=os.setsid, TOKENIZERS_PARALLELISM="true")
    try:
        run.wait_for_steps(out)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.end(60) == 143 and "checkpoint written; --resume" in run.said
    finally:
        run.end(0)
    assert torch.load(out / "last/checkpoint.pt")["step"] > 0


STOP = """
import sys, time
sys.path.insert(0, sys.argv[1])
from data.command import Stop
with Stop():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


def test_a_second_signal_leaves_at_once():
    """A step that never ends holds the first one back; the second does not wait for it."""
    process = subprocess.Popen([sys.executable, "-c", STOP, ROOT], stdout=subprocess.PIPE,
                               text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    finally:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------- ranks


def test_bad_input_is_said_once_by_all_ranks(place, tmp_path):
    """A folder with other things in it, which each rank sees by itself."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    words = words_of(place, out=tmp_path / "out")
    statuses, said = train_on_ranks(tmp_path / "ranks", 2, words)
    assert statuses[0] == 2 and said.count("error: ") == 1, said


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_of_torchrun(place, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", ROOT / "train.py", *words_of(place, out=out, **FOREVER)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"],
                                  capture_output=True, text=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        assert process.wait(120) > 0
    finally:
        process.kill()
        process.wait()
    assert "2 processes on cpu" in (tmp_path / "log").read_text()


# -------------------------------------------------------------------------------------- a full disk


def no_file_beyond(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("share, said", [(0.6, "the last checkpoint is intact"),
                                         (0.1, "there is no checkpoint yet")])
def test_a_full_disk_leaves_the_last_checkpoint(place, tmp_path, monkeypatch, share, said):
    """No file may grow beyond a share of a checkpoint's size: at 0.1 the weights do not fit, at 0.6
    the checkpoint that the resumed run goes on to write does not."""
    how = {"steps": 8, "save-every": 2, "eval-every": 2, "workers": 0}
    out, kept = tmp_path / "run", tmp_path / "run/last/checkpoint.pt"
    assert train_here(place, out=tmp_path / "whole", **how) == 0
    size = (tmp_path / "whole/last/checkpoint.pt").stat().st_size
    if share > 0.1:  # the first of its checkpoints succeeds
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(train, "save_checkpoint",
                          lambda *state: (save_checkpoint(*state), 1 / 0))
            train_here(place, out=out, **how)
        good = kept.read_bytes()
    run = Training(tmp_path / "logs", words_of(place, out=out, resume=True, **how),
                   before=partial(no_file_beyond, int(size * share)))
    assert run.end() == 2, run.said
    last = run.said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "cannot write" in last and said in last
    assert "Traceback" not in run.said
    assert not list(out.rglob("*.new"))  # what could not be finished does not fill the disk
    if share > 0.1:
        assert kept.read_bytes() == good
        assert train_here(place, out=out, resume=True, **how) == 0  # space again
        assert weights(out) == weights(tmp_path / "whole")
        assert torch.load(kept)["step"] == 8


@pytest.mark.parametrize("size", range(0, 4096, 512))
def test_a_checkpoint_cut_short_anywhere_is_a_full_disk(tmp_path, size):
    """torch.save meets a short write with an OSError or with words of its own, by where it
    falls."""
    kept, before = tmp_path / "last/checkpoint.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(kept.parent, {"w": torch.ones(3)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 + size, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(kept.parent, {"w": torch.zeros(40_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno in FULL
    assert [file.name for file in kept.parent.iterdir()] == ["checkpoint.pt"]
    assert torch.equal(torch.load(kept)["w"], torch.ones(3))
