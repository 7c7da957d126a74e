"""The device of a benchmark, what it is, and the clock: one way for a CPU and a card."""

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def add_device_flag(parser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="default auto: cuda where there is a card")  # fmt: skip


def device_of(choice: str) -> torch.device:
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def output_of(*command) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def machine(device) -> dict[str, str]:
    """What a figure depends on: card, driver, processor, versions, and the commit ($COMMIT where
    the tree travelled without its history)."""
    facts = {}
    if device.type == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts = {"card": torch.cuda.get_device_name(device), "driver": driver or "unknown",
                 "CUDA": torch.version.cuda or "unknown"}  # fmt: skip
    facts["processor"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    facts["torch"] = torch.__version__
    packages = ("triton", "transformers", "sentence-transformers", "numpy")
    facts |= {package: version_of(package) for package in packages}
    facts["python"] = platform.python_version()
    if os.environ.get("ATTENTION"):
        facts["ATTENTION"] = os.environ["ATTENTION"]
    commit = os.environ.get("COMMIT") or output_of("git", "describe", "--always", "--dirty")
    facts["commit"] = commit or "unknown"
    return facts


def wait(device) -> None:
    """Until the device has done all that it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timing(NamedTuple):
    """Of one call: seconds until the device is done; seconds until the call returns, the host's
    part; and GiB of a card's memory at the most beyond what was taken before (NaN on a CPU)."""

    seconds: float
    host: float
    gib: float


def timed(run, device, calls: int = 1) -> Timing:
    """One look at `calls` calls in a row: a card runs one while the host prepares the next."""
    cuda = device.type == "cuda"
    wait(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    for _ in range(calls - 1):
        run()
    wait(device)
    seconds = (time.perf_counter() - start) / calls
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else math.nan
    return Timing(seconds, host, peak / 2**30)


def alternate(sides: dict, repeats: int, device=CPU, calls: int = 1,
              budget: float = math.inf) -> dict[str, Timing]:
    """Medians of every side, run in turns after a warm-up each, `calls` calls at a time; of a side
    whose looks took `budget` seconds there are no more of them, but two at least."""
    timings = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            looks = timings[name]
            if len(looks) >= 2 and calls * sum(look.seconds for look in looks) > budget:
                continue
            timing = timed(run, device, calls)
            if repeat:
                looks.append(timing)
            if sys.stderr.isatty():
                print(f"\r{repeat}/{repeats} {name:60}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    return {name: Timing(*map(statistics.median, zip(*looks, strict=True)))
            for name, looks in timings.items()}  # fmt: skip
