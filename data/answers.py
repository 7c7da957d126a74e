"""The answers of a language model, kept as they come: it is asked once, whatever happens."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from data.command import BadInput, say
from data.runs import atomic_write


class Answers:
    """Every answer as it came, one JSON line each behind a line with the plan.

    `of[qid]` are the answers for the windows of a query, bottom up. A line names its window and
    carries its checksum: one that is damaged, or stands behind a gap, is left out, and what it
    answered is asked again.

    Args:
        path: the file; what is in it is gone on with, without `overwrite`.
        plan: what decides the answers (JSON).

    Raises:
        BadInput: the file's plan is another one.
    """

    def __init__(self, path: Path, plan: dict, overwrite: bool) -> None:
        self.of: dict[str, list[dict]] = {}
        header, kept = json.dumps(plan, sort_keys=True), []
        if path.exists() and not overwrite:
            kept = self._read(path, header)
        with atomic_write(path) as file:
            file.writelines(f"{line}\n" for line in [header, *kept])
        self.file = open(path, "a", encoding="ascii")  # noqa: SIM115  open as long as it grows

    def _read(self, path: Path, header: str) -> list[str]:
        """The whole lines of a file behind its header; fills `of`, says how many are left out."""
        first, *lines = path.read_bytes().decode("ascii", "replace").split("\n")
        if first != header:
            raise BadInput(f"{path}:1: damaged, or begun by a command with other flags or data; "
                           "finish that one, or give --overwrite (every answer is asked again) or "
                           "another --out")
        lines, kept = [line for line in lines if line], []
        for line in lines:
            if line != _sealed(line.rpartition(', "check":')[0]):
                continue
            row = json.loads(line)
            before = self.of.setdefault(row["qid"], [])
            if row["window"] == len(before):
                before.append(row)
                kept.append(line)
        say(f"{path}: going on after {len(kept):,} answers; {len(lines) - len(kept):,} damaged "
            "lines left out")
        return kept

    def add(self, qid: str, answer: dict) -> None:
        """Keeps the answer for the next window of a query."""
        row = {"qid": qid, "window": len(self.of.setdefault(qid, [])), **answer}
        self.file.write(_sealed(json.dumps(row)[:-1]) + "\n")
        self.file.flush()
        self.of[qid].append(row)


def _sealed(text: str) -> str:
    """A JSON object, open at its end, closed behind its checksum."""
    return f'{text}, "check": {zlib.crc32(text.encode())}}}'
