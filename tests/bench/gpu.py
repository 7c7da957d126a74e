"""All that a card is asked, in one command.

    python tests/bench gpu [--only values tests ...] [--seconds 470] [--out FOLDER]
    python tests/bench gpu --tiny     small shapes, on a CPU too: tries the command itself

Each section is a process with a time limit of its own: a fault, a hang or an exhausted memory costs
that section alone. After every section FOLDER/gpu.json and FOLDER/gpu.md (gpu-tiny with --tiny) are
written anew and its tables are printed. Exit status 1: something failed, and both files say what.
Where the tree travels without its history, COMMIT=... names its commit.

MFU is the operations of kernels/ROOFLINE.md over time and over an H100's dense bf16 by the
datasheet: no padding, the last layer on [CLS] rows alone where the head reads no others, for all
sides alike.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench.clock import ROOT
from bench.section import Section, by_attention

# name: (module, function, seconds at the most); a module is imported by its own section alone.
# Those of speed come first, and begin nothing after 230 s in all.
SECTIONS = {
    "training": ("shapes", "training", 85),
    "scoring": ("shapes", "score", 70),
    "attention": ("gpu", "attention", 42),
    "losses": ("gpu", "loss_times", 40),
    "lists": ("shapes", "lists", 43),
    "values": ("values", "values", 80),
    "tests": ("gpu", "tests", 100),
}
TO_END = 10.0  # seconds between the last that a section begins and its end by force
TO_COUNT = 5.0  # the same between the interruption of pytest and its end by force


# ------------------------------------------------------- sections that need torch and triton alone


def tests(section):
    """`pytest -m gpu` over the files that have such tests: its last lines, and every failure with
    the last lines of its traceback. Needs pytest; runs a process for every core where pytest-xdist
    is there."""
    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py"))
             if "mark.gpu" in file.read_text()]  # fmt: skip
    plugins = ["-p", "bench.failures", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", *plugins, *files]
    path = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    if section.cuda and importlib.util.find_spec("xdist"):
        command += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "worksteal"]
        environment["OMP_NUM_THREADS"] = "1"
    if section.tiny:
        command += ["-k", "published"]
    with tempfile.TemporaryDirectory() as folder:
        printed, failures = Path(folder) / "printed", Path(folder) / "failures"
        failures.touch()
        environment["FAILURES"] = str(failures)
        ending = ending_of(command, environment, printed, section.until)
        lines = [line[:200] for line in printed.read_text().splitlines() if line.strip()]
        failed = [json.loads(line) for line in failures.read_text().splitlines()]
    section.note("\n".join([*lines[-2:], *failure_lines(failed)]))
    if ending:
        names = ", ".join(name for name, _ in failed) or "no failure until then"
        section.error("pytest -m gpu", f"{ending}: {names}")


def ending_of(command, environment, printed: Path, until: float) -> str | None:
    """How the command ended, None where it ended well. When its time is up it is interrupted, on
    which pytest counts what it has done; and killed TO_COUNT later."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a job in the background: ignored
    with printed.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out,
                                   stderr=subprocess.STDOUT)  # fmt: skip
    try:
        status = process.wait(max(until - time.time(), 1))
        return f"exit status {status}" if status else None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(TO_COUNT)
        return "its time was up"
    finally:
        process.kill()
        process.wait()


def failure_lines(failed: list) -> list[str]:
    """The name of every failure and the last lines of its traceback, about 40 lines in all."""
    room, lines = max(40 // max(len(failed), 1) - 1, 1), []
    for name, traceback in failed:
        last = [line[:200] for line in traceback.splitlines() if line.strip()][-room:]
        lines += [f"FAILED {name}", *last]
    return lines


def attention(section):
    """Attention of one layer of 12 heads: kernels/flash.py beside torch's FlashAttention-2, and
    other tiles of the forward kernel than it chooses. `card us` is of a replayed CUDA graph."""
    rng = np.random.default_rng(0)
    marco, long = np.clip(rng.lognormal(4.3, 0.42, 728), 20, 291).astype(int), np.full(128, 512)
    shapes = {
        "728 x ~90": (marco, 64, {}),
        "728 x ~90, heads of 32": (marco, 32, {}),
        "128 x 512": (long, 64, {}),
        "728 x ~90, window 64": (marco, 64, {"window": 64}),
        "128 x 512, window 64": (long, 64, {"window": 64}),
        "32 x ~90, dropout, both ways": (marco[:32], 64, {"dropout": 0.1}),
        "728 x ~90, dropout, both ways": (marco, 64, {"dropout": 0.1}),
        "128 x 512, dropout, both ways": (long, 64, {"dropout": 0.1}),
    }
    if section.tiny:
        few = np.array([5, 9])
        shapes = {"2 x 7": (few, 32, {}), "2 x 7, both ways": (few, 32, {"dropout": 0.1})}
    for shape, (lengths, d, how) in shapes.items():
        makers, flops = attention_sides(section, lengths, d, **how)
        sides, _ = section.working(shape, makers)
        section.measure_alone("Attention of one layer", {"shape": shape}, sides, flops)
        if not how and "triton" in sides:
            tiles(section, shape, d, sides["triton"])


def attention_sides(section, lengths, d, window=None, dropout=0.0):
    """({back end: function that makes its run}, operations); with dropout, the backward pass
    too."""
    both_ways, longest = dropout > 0, int(lengths.max())
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=section.device)
    x = torch.randn(int(lengths.sum()), 3, 12, d, device=section.device,
                    dtype=getattr(torch, section.dtype), requires_grad=both_ways)  # fmt: skip
    dout = torch.randn_like(x[:, 0])
    keys = lengths if window is None else np.minimum(lengths, 2 * window + 1)
    flops = 4 * 12 * d * float((lengths * keys).sum())

    def by_flash():
        from kernels.flash import flash_varlen

        return flash_varlen(*x.unbind(1), cu, cu, longest, longest, window=window, dropout=dropout,
                            seed=1)  # fmt: skip

    def by_torch():
        from kernels.attention import varlen_attention

        with by_attention("torch"):
            return varlen_attention(*x.unbind(1), cu, longest, window=window, dropout=dropout)

    def run(forward):
        if both_ways:
            return lambda: torch.autograd.grad(forward(), x, dout)
        return forward

    makers = {"triton": lambda: run(by_flash), "torch": lambda: run(by_torch)}
    return makers, flops * (3.5 if both_ways else 1)


def tiles(section, shape, d, run):
    """The forward kernel with other tiles than kernels.flash chooses."""
    from kernels import flash

    choices = [(64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 2), (128, 64, 4, 3),
               (128, 64, 8, 3), (128, 128, 8, 2)]  # fmt: skip
    for rows, keys, warps, stages in choices[:1] if section.tiny else choices:
        tile = {"BLOCK_D": d, "BLOCK_Q": rows, "BLOCK_K": keys, "num_warps": warps,
                "num_stages": stages}  # fmt: skip
        choose = mock.patch.object(flash, "_tiles", lambda *_, tile=tile, **__: tile)
        with section.tolerates(shape, f"tile {rows} x {keys}"), choose:
            run()
            labels = {"shape": shape, "rows": rows, "keys": keys, "warps": warps, "stages": stages}
            alone = section.replayed(run) if section.cuda else math.nan
            section.row("Tiles", labels | {"card us": 1e6 * alone})


def loss_times(section):
    """Each loss with its gradient in fp32: the fused kernel and the formula in plain torch; then
    beside torch.compile of the formula, while time lasts, since it compiles for long. `card us` is
    of a replayed CUDA graph."""
    from bench import losses

    def measure(table, name, shape, compiled):
        arguments = losses.inputs(*shape, torch.float32, section.device)
        what = f"{shape[0]} lists of {shape[1]}"
        sides = losses.sides(name, arguments, compiled)
        makers = {side: lambda run=run: run for side, run in sides.items()}
        sides, _ = section.working(f"{name}, {what}", makers)
        section.measure_alone(table, {"loss": name, "lists": what}, sides)

    def beside_compiled(name):
        for shape in ((64, 8), (64, 1000)):
            measure("Losses with gradient, beside torch.compile", name, shape, True)

    shapes = [(4, 8), (64, 8), (16, 100), (64, 100), (4, 1000), (64, 1000)]
    for name in losses.KINDS:
        for shape in [(2, 8)] if section.tiny else shapes:
            measure("Losses with gradient", name, shape, False)
    if section.cuda:
        section.while_time_lasts("torch.compile", losses.KINDS, beside_compiled)


# ------------------------------------------------------------------------------------ the command


def run_section(name: str, tiny: bool, until: float, into: Path) -> int:
    """The process of one section."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    section = Section(tiny, until, into)
    module, function, _ = SECTIONS[name]
    with section.tolerates(name):
        run = getattr(importlib.import_module(f"bench.{module}"), function)
        section.found["about"] = " ".join(run.__doc__.split())
        run(section)
    section.keep()
    return 0


def result_of(name: str, tiny: bool, seconds: float) -> dict:
    """What the process of a section found in `seconds` at the most, and how it ended."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                                "TRANSFORMERS_VERBOSITY": "error",
                                "TOKENIZERS_PARALLELISM": "true"}  # fmt: skip
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # read by triton where a kernel is decorated
        environment["OMP_NUM_THREADS"] = "1"  # small shapes: threads would wait for each other
    start = time.time()
    found = {"tables": {}, "notes": [], "errors": [], "profiles": {}}
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "found.json"
        command = [sys.executable, "tests/bench", "gpu", "--section", name, "--into",
                   str(into), "--until", str(start + seconds - TO_END)]  # fmt: skip
        if tiny:
            command.append("--tiny")
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            status = process.wait(seconds)
            ending = f"the process ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            ending = f"ended after its {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it started, too
            process.wait()
        if into.exists():
            found |= json.loads(into.read_text())
    if ending:
        found["errors"].append({"what": name, "error": ending})
    return found | {"seconds": round(time.time() - start, 1)}


def cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def section_markdown(name: str, found: dict) -> str:
    """A section's tables, notes and errors; of errors that say the same the first alone."""
    lines = [f"## {name}", "", f"{found.get('about', '')} ({found['seconds']:.0f} s)"]
    for title, rows in found["tables"].items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += ["", f"{title}:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in rows:
            lines.append(f"| {' | '.join(cell(row.get(column)) for column in columns)} |")
    for note in found["notes"]:
        lines += ["", "```", note, "```"]
    alike = {}
    for error in found["errors"]:
        alike.setdefault(error["error"], []).append(error["what"])
    if alike:
        lines += ["", "Failed:", ""]
    for text, what in alike.items():
        more = f" and {len(what) - 1} more" if len(what) > 1 else ""
        lines.append(f"- {what[0]}{more}: {text.strip().splitlines()[0][:300]}")
    return "\n".join(lines)


def markdown(result: dict) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    head = f"# On a card\n\n`{result['command']}`, {result['date']}. {facts}."
    sections = [section_markdown(*item) for item in result["sections"].items()]
    return "\n\n".join([head, *sections]) + "\n"


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    name = "python tests/bench gpu"
    parser = argparse.ArgumentParser(prog=name, description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=470.0, help="for all (default 470)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "results")),
                        help="folder of gpu.json, gpu.md (default $OUT or results/)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU interpreted")
    for own in ("--section", "--into", "--until"):  # of the process of one section
        parser.add_argument(own, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.section:
        return run_section(args.section, args.tiny, float(args.until), Path(args.into))
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("no CUDA device here: --tiny tries the command on a CPU")
    start, stem = time.time(), "gpu-tiny" if args.tiny else "gpu"
    result = {"command": " ".join([name, *argv]), "machine": {},
              "date": time.strftime("%Y-%m-%d %H:%M %Z"), "sections": {}}  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    for section in args.only:
        seconds = min(SECTIONS[section][2], start + args.seconds - time.time())
        print(f"{section}: up to {seconds:.0f} s", flush=True)
        found = result_of(section, args.tiny, max(seconds, 1.0))
        result["machine"] |= found.pop("machine", {})
        result["sections"][section] = found
        (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1))
        (args.out / f"{stem}.md").write_text(markdown(result))
        print(f"\n{section_markdown(section, found)}\n", flush=True)
    return int(any(found["errors"] for found in result["sections"].values()))
