"""The manners of a command: one-line errors, progress, processes that take turns, shared flags.

Imports the standard library and tqdm alone, so that a script's --help and a wrong flag come at
once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

FULL = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)  # of a disk or quota


# ------------------------------------------------------------------------------------------ errors


class BadInput(ValueError):
    """The user's input is wrong. str() is one line: `FILE:LINE: what is wrong and what to do`."""

    for_the_user = True  # guarded() shows the line alone; kernels.loading.ModelError has it too


def quiet_imports() -> None:
    """Ctrl-C during a script's slow imports ends it without a traceback, until guarded() is
    there."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def one_malloc_arena() -> None:
    """One malloc arena (M_ARENA_MAX, -8) for all threads of a training, on a machine without a
    card.

    The others of glibc lie in heaps of 64 MB, which hold buffers of 10 MB badly and now and then
    fail to grow: half as much memory again. But threads that tokenise wait for each other there
    (three times as long with 2 of them, ten with 16), which a card would wait for. To be called
    before the first thread: importing pyarrow starts one, and what has an arena keeps it.
    """
    has_card = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if not has_card and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-8, 1)


AGAIN = "interrupted; the same command goes on where this one stopped"


def guarded(main: Callable[[], int], interrupted: str = AGAIN) -> int:
    """The exit code of a script's main: bad input ends with one line on stderr and 2, what is
    interrupted with 130, a reader that has seen enough (head) with 0."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (MemoryError, OSError, ValueError) as e:
        why = reason_of(e)
        if why is None:
            raise
    if rank_of_process():
        time.sleep(2)  # torchrun ends all ranks when rank 0 has failed: that is said once
    print(f"error: {' '.join(why.splitlines())}", file=sys.stderr)  # names may hold line breaks
    return 2


def reason_of(error: Exception) -> str | None:
    """What is said of an error that is the user's to mend; None for a fault of the program."""
    if isinstance(error, MemoryError):
        less = "a smaller --batch-size, --list-size, --depth or --max-tokens takes less"
        return f"out of memory ({error}); {less}"
    if isinstance(error, OSError):
        if error.errno in FULL:
            where = error.filename or "cannot write"
            return (f"{where}: {error.strerror}; free some space and give the same command again: "
                    "it goes on from what is written")
        return f"{error.filename}: {error.strerror}" if error.filename else None
    return str(error) if getattr(error, "for_the_user", False) else None


# ------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse whose errors are BadInput: one line, as for every other bad input."""

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def at_least(least: int, most: int = 10**9) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `least` to `most`."""

    def whole(text):
        if not re.fullmatch(r"-?[0-9]{1,10}", text) or not least <= int(text) <= most:
            wanted = f"a whole number from {least} to {most:,}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: {wanted}")
        return int(text)

    return whole


def device_name(text: str) -> str:
    """The value of --device; a card that is asked for and not there is an error, no slower run."""
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: auto, cpu or cuda")
    if text == "cuda":
        import torch

        if not torch.cuda.is_available():
            none = "torch sees no CUDA device here; give auto or cpu"
            raise argparse.ArgumentTypeError(none)
    return text


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script with a model shares."""
    add = parser.add_argument
    add("--device", type=device_name, default="auto", metavar="auto|cpu|cuda",
        help="default: cuda where there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="auto: bfloat16 on CUDA and, for scoring, on CPUs with native bfloat16, else float32")
    add("--max-tokens", type=at_least(1),
        help="token budget of one micro-batch (default: measured per device)")
    add("--query-length", type=at_least(1),
        help="tokens kept of a query (default: the model's, or 32)")
    add("--doc-length", type=at_least(1),
        help="tokens kept of a document (default: the model's, or 256)")
    add("--seed", type=at_least(0), default=1, help="seed of everything random (default 1)")


# ---------------------------------------------------------------------------------------- progress


def say(message: str) -> None:
    """One line of progress on stderr, from rank 0 only."""
    if rank_of_process() == 0:
        (tqdm.write if sys.stderr.isatty() else print)(message, file=sys.stderr)


class Progress(tqdm):
    """tqdm on rank 0: a bar on a terminal; elsewhere, as in a log file, a line every 30 seconds."""

    every = 30
    line = "{desc}: {n_fmt}/{total_fmt}{unit} in {elapsed}, {remaining} to go, {rate_fmt}{postfix}"

    def __init__(self, *args, disable=False, **settings) -> None:
        self.lines = not sys.stderr.isatty()
        if self.lines:
            settings |= dict(mininterval=self.every, maxinterval=self.every, delay=self.every,
                             miniters=1, position=0, bar_format=self.line)
        super().__init__(*args, disable=disable or rank_of_process() > 0, **settings)

    def status_printer(self, file):
        if self.lines:
            return lambda line: print(line, file=file, flush=True)
        return super().status_printer(file)

    def close(self) -> None:
        if self.lines:
            self.last_print_t = 0  # as if it had shown nothing: there is no bar to take away
        super().close()


# --------------------------------------------------------------------------------------- processes


def rank_of_process() -> int:
    """The rank that torchrun gave this process; 0 without it."""
    return int(os.environ.get("RANK", 0))


def join_processes() -> tuple[int, int]:
    """(rank, world size); under torchrun the process group is opened, gloo or NCCL by what the
    machine has."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    return rank_of_process(), world


def wait_for_all() -> None:
    """Returns once every rank has come here."""
    if join_processes()[1] > 1:
        import torch.distributed as dist

        dist.barrier()


def leave_processes() -> None:
    """Closes the process group, where join_processes has opened one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """What stands inside is done by rank 0, then by the others, who find the caches it filled."""
    rank, _ = join_processes()
    if rank:
        wait_for_all()
    yield
    if rank == 0:
        wait_for_all()


class Stop:
    """Inside `with`, SIGTERM and Ctrl-C are only noted, for the step in hand to be finished and
    saved. A second one ends the run at once, and so does a step that is not finished `grace`
    seconds later."""

    grace = 25  # schedulers wait 30 before they kill

    def __enter__(self):
        self.signal, self.timer = 0, None
        self.before = [(number, signal.signal(number, self._note))
                       for number in (signal.SIGINT, signal.SIGTERM)]
        return self

    def __exit__(self, *_):
        for number, handler in self.before:
            signal.signal(number, handler)
        if self.timer:
            self.timer.cancel()

    def _note(self, number, _frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self.timer = threading.Timer(self.grace, self._give_up)
        self.timer.daemon = True
        self.timer.start()

    def _give_up(self):
        os.write(2, b"\nstopped within a step that did not end; --resume goes on from the last "
                    b"checkpoint\n")
        os._exit(128 + self.signal)


# ------------------------------------------------------------------------------------------ output


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Inside, this process alone writes `out`. The system gives the lock beside it back when the
    process ends, by whatever cause; forked workers do not inherit it. BadInput names its holder
    (the library filelock empties the file that does)."""
    path = out.resolve().parent / f".{out.resolve().name}.lock"
    if not path.parent.is_dir():
        raise BadInput(f"{out}: the folder {out.parent} does not exist")
    if rank_of_process():  # rank 0 has it for all
        yield
        return
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # taken away since: its owner ended just now
                raise BlockingIOError
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise BadInput(f"{out}: being written by {holder}; wait for it, or give another --out"
                           ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def refuse_overwrite(path: Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """BadInput where `path` is a folder or one of `inputs`, or exists without --overwrite."""
    if path.is_dir():
        raise BadInput(f"{path}: a folder; --out names the file to write")
    for file in inputs:
        if file and path.exists() and Path(file).exists() and path.samefile(file):
            raise BadInput(f"{path}: is read by this very command; --out names another file")
    if path.exists() and not overwrite:
        raise BadInput(f"{path}: exists; give --overwrite to replace it, or another --out")
