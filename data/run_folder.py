"""What train.py leaves in a run folder and reads again: args.json, log.jsonl, last/checkpoint.pt,
the weights. Every file is whole under its name or not there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from data.command import BadInput, say
from data.runs import atomic_write


def checkpoint_kept(out: Path) -> str:
    there = (out / "last" / "checkpoint.pt").is_file()
    return "the last checkpoint is intact" if there else "there is no checkpoint yet"


def damaged(path: Path, error: Exception) -> BadInput:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return BadInput(f"{path}: damaged ({why}); put a copy in its place, or --overwrite starts "
                    "afresh")


def begun_with(path: Path) -> dict:
    """args.json of a run folder."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        # | is an error of what is no object
        return {name: made[name] | {} for name in ("flags", "data", "versions")}
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise damaged(path, e) from e


def save_checkpoint(folder: Path, state: dict) -> None:
    """Writes folder/checkpoint.pt: the old one stays until the new one is whole and on the disk."""
    import torch

    folder.mkdir(exist_ok=True)
    temporary = folder / "checkpoint.pt.new"
    try:
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError:  # torch's words for a write that was cut short
                file.write(bytes(1 << 20))  # on a full disk this one says so
                file.flush()
                raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "checkpoint.pt")
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def load_checkpoint(path: Path, model, optimizer, steps: int) -> tuple[int, float, list]:
    """(step, best score, history) of a checkpoint whose weights and optimizer state are put in
    place. BadInput where it is damaged or of another run."""
    import torch

    try:
        if wrong := zipfile.ZipFile(path).testzip():  # torch looks at no checksum
            raise ValueError(f"{wrong}: wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if not 0 < state["step"] <= steps:
            raise ValueError(f"step {state['step']} of {steps}")
        for p, kept in optimizer.state.items():
            shapes = kept["exp_avg"].shape, kept["exp_avg_sq"].shape
            if shapes != (p.shape, p.shape) or kept["step"] < 0:
                raise ValueError("moments of other weights")
        history = [[int(step), float(score)] for step, score in state["history"]]
        return int(state["step"]), float(state["best"]), history
    except Exception as e:  # whatever torch and pickle make of a damaged file
        raise damaged(path, e) from e


def save_whole(save: Callable[[Path], None], folder: Path) -> None:
    """What save(FOLDER) writes, each file put in place whole, weights last."""
    temporary = folder / ".model.new"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save(temporary)
        for file in sorted(temporary.iterdir(), key=lambda f: f.suffix == ".safetensors"):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
            os.replace(file, folder / file.name)
    except Exception as e:  # safetensors wraps the system's errors, of which words are left
        if number := re.search(r"os error (\d+)", str(e)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from e
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Log:
    """log.jsonl always; TensorBoard and Weights & Biases where asked and installed.

    Args:
        kinds: of jsonl, tensorboard, wandb.
        step: the last step that is kept of a log that is there; 0 begins a new one.
        config: what Weights & Biases shows of the run.
    """

    def __init__(self, out: Path, kinds: list[str], step: int, config: dict) -> None:
        self.path, self.writers = out / "log.jsonl", []
        rows, lost = read_log(self.path) if step else ([], 0)
        if step and (lost or not rows):
            say(f"{self.path}: {lost:,} damaged lines left out, {len(rows):,} kept; the training "
                "goes on without")
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        if "tensorboard" in kinds:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(out / "tensorboard", purge_step=step)
            self.writers.append(
                lambda row: [board.add_scalar(k, v, row["step"]) for k, v in row.items()])
        if "wandb" in kinds:
            import wandb

            wandb.init(project="cross-encoder-study", name=out.name, config=config)
            self.writers.append(lambda row: wandb.log(row, step=row["step"]))

    def __call__(self, **row) -> None:
        row["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        for write in self.writers:
            write(numbers)


def read_log(path: Path) -> tuple[list[dict], int]:
    """(rows, number of lines that are none) of a log.jsonl, which a full disk may have torn."""
    rows, lines = [], []
    if path.is_file():
        lines = path.read_text("utf-8", "replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            rows += [row] if row["step"] >= 0 else []
    return rows, len(lines) - len(rows)
