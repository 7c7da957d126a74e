"""What a section of `python tests/bench gpu` works with: device, clock, profiler, report."""

import gc
import json
import math
import os
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.clock import alternate, device_of, machine, wait

BUDGET = 1.0  # seconds of looks at a side of many kernels, after which two are enough
PEAK = 989e12  # an H100's bf16 operations a second by the datasheet
# what CUDA says of a card that answers no more calls of this process
LOST = ("illegal memory access", "misaligned address", "launch failure", "device-side assert")


class Section:
    """A section's device, time and findings: tables, notes, profiles, errors."""

    def __init__(self, tiny: bool, until: float, into: Path):
        self.tiny, self.until, self.into = tiny, until, into
        self.device = device_of("auto")
        self.cuda = self.device.type == "cuda"
        self.dtype = "bfloat16" if self.cuda else "float32"
        self.found = {"machine": machine(self.device), "tables": {}, "notes": [], "errors": [],
                      "profiles": {}}  # fmt: skip

    def row(self, table: str, cells: dict) -> dict:
        """The row as it is kept, to be completed; what is not measured here (NaN) is None."""
        known = {name: None if value != value else value for name, value in cells.items()}
        self.found["tables"].setdefault(table, []).append(known)
        self.keep()
        return known

    def note(self, text: str) -> None:
        self.found["notes"].append(text)
        self.keep()

    def error(self, what: str, text: str) -> None:
        print(f"!! {what}: {text[:300]}", flush=True)
        self.found["errors"].append({"what": what, "error": text[:2000]})
        self.keep()

    def keep(self) -> None:
        """Writes what was found so far: the process may be ended at any time, here too."""
        half = self.into.with_suffix(".half")
        half.write_text(json.dumps(self.found))
        half.replace(self.into)

    @contextmanager
    def tolerates(self, *what):
        """An error inside is kept and costs what is inside alone. A lost card ends the process, and
        so does the end of its time."""
        if time.time() > self.until:
            self.error(", ".join(what), "no time was left")
            raise SystemExit(0)
        try:
            yield
        except Exception as e:
            frames = traceback.extract_tb(e.__traceback__)[-3:]
            where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
            self.error(", ".join(what), f"{type(e).__name__}: {e} ({where})")
            if any(words in str(e) for words in LOST):
                raise SystemExit(3) from e
            free_memory()

    def working(self, what: str, makers: dict) -> tuple[dict, dict]:
        """({side: run} of those that can be made and run, {side: what it returned})."""
        sides, values = {}, {}
        for side, make in makers.items():
            with self.tolerates(what, side):
                run = make()
                values[side] = run()
                sides[side] = run
        return sides, values

    def while_time_lasts(self, what: str, names, measure) -> None:
        """measure(name) of one after the other, as long as there is the time that the last one
        took; those left out are noted."""
        left, took = list(names), 0.0
        while left and time.time() + took < self.until:
            start, name = time.time(), left.pop(0)
            with self.tolerates(what, name):
                measure(name)
            took = time.time() - start
        if left:
            self.note(f"{what}: no time for {', '.join(left)}")

    def held(self) -> float:
        """GiB that this process holds of the card when what is free is given back: tensors, and
        the memory of CUDA graphs. NaN on a CPU."""
        if not self.cuda:
            return math.nan
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device) / 2**30

    def measure(self, table, labels, sides, pairs, flops, repeats=5, calls=1, more=None,
                profile=()) -> dict:  # fmt: skip
        """Times {side: run}, a row each with what `more` has of the side, profiles those named in
        `profile`, and returns the timings. pairs, flops: of a call."""
        repeats = 1 if self.tiny else repeats
        timings = alternate(sides, repeats, self.device, calls, BUDGET)
        for side, timing in timings.items():
            cells = {"ms": 1e3 * timing.seconds, "pairs/s": round(pairs / timing.seconds),
                     "MFU": flops / timing.seconds / PEAK, "host ms": 1e3 * timing.host,
                     "GiB": timing.gib}  # fmt: skip
            cells = labels | {"side": side} | cells | (more or {}).get(side, {})
            row, what = self.row(table, cells), [*map(str, labels.values()), side, "profile"]
            if self.cuda and side in profile:
                with self.tolerates(*what):
                    kernels, busy = self.profiled(", ".join(what), sides[side], calls)
                    row |= {"kernels": kernels, "busy share": busy / timing.seconds}
        self.keep()
        return timings

    def profiled(self, what: str, run, calls: int) -> tuple[float, float]:
        """(kernels, seconds that the card works) of a call; the heaviest kernels are kept."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                run()
            wait(self.device)
        totals = card_totals(profile.events(), calls)
        self.found["profiles"][what] = [
            {"kernel": name[:100], "ms": 1e3 * seconds, "calls": count}
            for name, (seconds, count) in list(totals.items())[:25]
        ]
        copies = ("Memcpy", "Memset")
        kernels = sum(n for name, (_, n) in totals.items() if not name.startswith(copies))
        return kernels, sum(seconds for seconds, _ in totals.values())

    def measure_alone(self, table, labels, sides, flops=None) -> None:
        """The same for calls of a few kernels, with the time of the card alone."""
        repeats, calls = (1, 1) if self.tiny else (10, 10)
        timings = alternate(sides, repeats, self.device, calls, BUDGET / 5)
        for side, timing in timings.items():
            cells = {"us": 1e6 * timing.seconds, "host us": 1e6 * timing.host}
            row = self.row(table, labels | {"side": side} | cells)
            if self.cuda:
                with self.tolerates(*map(str, labels.values()), side, "as a CUDA graph"):
                    alone = self.replayed(sides[side])
                    row["card us"] = 1e6 * alone
                    if flops is not None:
                        row["TFLOP/s"] = flops / alone / 1e12
        self.keep()

    def replayed(self, run) -> float:
        """Seconds of the card without the host: of run() captured as a CUDA graph."""
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # what is made at first calls must not be captured
                run()
        side.synchronize()
        with torch.cuda.graph(graph):
            kept = run()
        seconds = alternate({"replay": graph.replay}, 5, self.device, calls=10)["replay"].seconds
        del kept
        return seconds


def free_memory() -> None:
    """Frees what lies in cycles, models too, and gives it back to the card."""
    gc.collect()
    torch.cuda.empty_cache()


def card_totals(events, calls: int) -> dict[str, tuple[float, float]]:
    """{kernel or copy: (seconds, times)} of one of `calls` profiled calls, the heaviest first."""
    totals = {}
    for event in events:
        on_card = event.device_type == torch.autograd.DeviceType.CUDA
        if on_card and not event.is_user_annotation:  # which spans kernels that count themselves
            seconds, count = totals.get(event.name, (0.0, 0.0))
            took = (event.time_range.end - event.time_range.start) * 1e-6
            totals[event.name] = seconds + took / calls, count + 1 / calls
    return dict(sorted(totals.items(), key=lambda item: -item[1][0]))


@contextmanager
def by_attention(back_end: str):
    """Attention inside is by that back end of kernels.attention, on CUDA. Inside what is timed:
    mock.patch.dict would write the whole environment anew."""
    before, os.environ["ATTENTION"] = os.environ.get("ATTENTION"), back_end
    try:
        yield
    finally:
        if before is None:
            del os.environ["ATTENTION"]
        else:
            os.environ["ATTENTION"] = before


def relative(x, y) -> float:
    """|x - y| / |y|, and 0 for two tensors of zeros."""
    x, y = x.detach().double(), y.detach().double()
    difference, size = float((x - y).norm()), float(y.norm())
    return difference / size if size else difference
