"""A run that several processes write piece by piece, safe against interruption.

Each rank appends whole blocks of queries to OUT.part-RANK, each behind its checksum; the same
command goes on after the last that is whole. At the end rank 0 joins the parts in the order of the
run and renames: the file is the one that a single uninterrupted process writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from data.command import BadInput, Progress, join_processes, say, wait_for_all
from data.runs import atomic_write, read_bytes, run_lines

BLOCK_PAIRS = 4096  # pairs scored, written and, after an interruption, redone together
MARK = b"# # # # # "  # six columns begin so in no run: the line behind a whole block


def blocks_of(run: dict[str, dict[str, float]], pairs: int = BLOCK_PAIRS) -> list[list[str]]:
    """Query ids in the order of the run, cut into blocks of whole queries of about `pairs` pairs.

    The blocks depend on nothing but the run, so a resumed or sharded run scores the same
    micro-batches.
    """
    blocks, count = [], pairs
    for qid, ranked in run.items():
        if count >= pairs:
            blocks.append([])
            count = 0
        blocks[-1].append(qid)
        count += len(ranked)
    return blocks


def write_in_blocks(out: Path, plan: dict, run: dict, tag: str,
                    score: Callable[[list], Iterator[dict]], overwrite: bool = False) -> bool:
    """Scores the blocks of `run` into the TREC run `out`, sharded over ranks.

    Args:
        plan: what decides the scores (JSON); parts that were begun with another plan are refused.
        score: blocks -> one {qid: {docid: score}} per block.
    Returns:
        True on the rank that wrote `out`.
    """
    rank, world = join_processes()
    blocks = blocks_of(run)
    mine, part = blocks[rank::world], _part(out, rank)
    header = json.dumps({**plan, "world": world, "blocks": len(blocks)}, sort_keys=True) + "\n"
    if overwrite:
        part.unlink(missing_ok=True)
    done, check = 0, 0
    if part.exists():
        done, check = _go_on(part, header.encode())
        say(f"{part}: going on after {done:,} of {len(mine):,} blocks")
    else:
        with atomic_write(part) as file:  # half a header could not be told from another command's
            file.write(header)
    pairs = [sum(len(run[q]) for q in block) for block in mine]
    with (
        open(part, "ab") as file,
        Progress(total=sum(pairs), initial=sum(pairs[:done]), desc=tag, unit=" pairs") as bar,
    ):
        scored = zip(mine[done:], pairs[done:], score(mine[done:]), strict=True)
        for block, count, result in scored:
            lines = "".join(run_lines(q, result[q], tag) for q in block).encode()
            end, check = _sealed(lines, check)
            file.write(lines + end)
            file.flush()
            bar.update(count)
    wait_for_all()
    if rank == 0:
        _join(out, len(blocks), world)
    wait_for_all()
    return rank == 0


def note_of(out: Path) -> Path:
    """RUN.json: what it took to make the run `out`, and by which plan it was made."""
    return Path(f"{out}.json")


def digest_of(plan: dict) -> str:
    """What RUN.json knows a plan by."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def is_finished(out: Path, plan: Callable[[], dict], overwrite: bool = False) -> bool:
    """Whether the run `out` is there, made by this plan; with `overwrite` what another one made
    counts as not there.

    Raises:
        BadInput: another plan made it, or RUN.json is damaged.
    """
    if not out.exists():
        return False
    note, made_by = note_of(out), None
    if note.exists():
        try:
            made_by = json.loads(read_bytes(note)).get("plan")
        except (ValueError, AttributeError, RecursionError):
            raise BadInput(f"{note}:1: not rerank.py's; remove it: {out.name} then counts as "
                           "finished") from None
    if made_by is None and not overwrite:
        say(f"{out}: taken as finished; {note.name} does not tell by what flags and data it was "
            "made, as of an older version")
        return True
    if made_by == digest_of(plan()):
        return True
    if overwrite:
        return False
    raise BadInput(f"{out}: made from another model, data or flags; --overwrite replaces it, or "
                   "give another --out")


def _part(out: Path, rank: int) -> Path:
    return Path(f"{out}.part-{rank}")


def _sealed(block: bytes, check: int) -> tuple[bytes, int]:
    """(the line behind a whole block, CRC-32 up to here); check: the CRC-32 up to this block.

    MARK counts as the end of the block, so that a line of this kind that stands twice is no empty
    block.
    """
    check = zlib.crc32(block + MARK, check)
    return MARK + b"%08x\n" % check, check


def _go_on(part: Path, header: bytes) -> tuple[int, int]:
    """(whole blocks, CRC-32 up to there) of a part, which is cut behind the last of them."""
    with open(part, "rb") as lines:
        if lines.readline() != header:
            raise BadInput(f"{part}: begun by a command with other flags or data, or damaged; "
                           "finish that one, or --overwrite")
        done, check, keep, block = 0, 0, len(header), bytearray()
        for line in lines:
            end, after = b"", check
            if line.startswith(MARK):
                end, after = _sealed(block, check)
            if line != end:
                block += line
                continue
            keep += len(block) + len(line)
            done, check, block = done + 1, after, bytearray()
    if MARK in block:
        say(f"{part}: damaged behind block {done:,}; from there on scored anew")
    os.truncate(part, keep)
    return done, check


def _join(out: Path, blocks: int, world: int) -> None:
    """Writes `out` from the parts of all ranks, block by block in turn, and removes these."""
    parts = [_part(out, rank) for rank in range(world)]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(part, encoding="utf-8")) for part in parts]
        file = stack.enter_context(atomic_write(out))
        for lines in opened:
            lines.readline()
        for block in range(blocks):
            for line in opened[block % world]:
                if line.startswith(MARK.decode()):
                    break
                file.write(line)
    for part in parts:
        part.unlink()
