"""The pictures of a table as PNG, PDF or SVG: bars, heatmap, difference, latency.

The one module that imports matplotlib, so evaluate.py imports it where a picture is wanted. A table
is {run: {column: cell}} as in significance.py; the same table gives the same bytes. matplotlib's
state in the process is left alone: no pyplot, and the look holds inside look() only.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from data.command import BadInput, say
from data.paper import BACKBONES, LOSSES
from data.significance import Table, bootstrap, value_of
from data.tables import backbone_and_loss
from data.texts import Texts

# Okabe and Ito's colours differ for every kind of colour vision; the hatches for prints without
# colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "++")
MARKERS = "osD^vPX*"
DATES = {".pdf": "CreationDate", ".svg": "Date"}  # what matplotlib calls the time that it writes


def look():
    """A context within which figures are drawn and saved."""
    return matplotlib.rc_context({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "hatch.linewidth": 0.6,
        "text.parse_math": False,  # a query may hold dollar signs
        "svg.hashsalt": "",  # ids that do not change from one time to the next
    })


def saved(figure: Figure, suffix: str) -> bytes:
    """The content of a file of this kind, .png, .pdf or .svg, without the time it was made."""
    file = io.BytesIO()
    undated = {DATES[suffix]: None} if suffix in DATES else None
    figure.savefig(file, format=suffix[1:], dpi=200, bbox_inches="tight", metadata=undated)
    return file.getvalue()


def _with_interval(cell: list[np.ndarray], seed: int) -> tuple[float, float, float]:
    """(value, low, high)."""
    return value_of(cell), *bootstrap(cell, seed=seed)


def _say_left_out(table: Table, shown: dict, why: str) -> None:
    if len(shown) < len(table):
        say(f"not in the picture, {why}: {', '.join(n for n in table if n not in shown)}")


def bars(table: Table, seed: int) -> Figure:
    """A group of bars per column, a bar with its interval per run."""
    if len(table) > len(COLOURS):
        raise BadInput(f"--plot-kind bars is legible up to {len(COLOURS)} runs, not {len(table)}: "
                       "take heatmap")
    columns = list(next(iter(table.values())))
    width = min(7.5, max(4.5, 1 + 0.4 * len(table) * len(columns)))
    figure = Figure(figsize=(width, 3.6))
    axis = figure.subplots()
    for i, (name, row) in enumerate(table.items()):
        shift = (i - (len(table) - 1) / 2) * 0.8 / len(table)
        places, known = [], []
        for place, column in enumerate(columns):
            if row[column] is None:
                axis.text(place + shift, 0.01, "absent", rotation=90, ha="center", va="bottom",
                          fontsize=7)
            else:
                places.append(place)
                known.append(_with_interval(row[column], seed))
        where = np.array(places) + shift
        values, low, high = np.array(known).reshape(-1, 3).T
        axis.bar(where, values, 0.74 / len(table), label=name, color=COLOURS[i], hatch=HATCHES[i],
                 edgecolor="white", linewidth=0)
        axis.errorbar(where, values, np.abs([low - values, high - values]), fmt="none",
                      ecolor="black", elinewidth=1, capsize=2)
    axis.set_xticks(range(len(columns)), columns)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylabel="mean, 95 % bootstrap interval")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def heatmap(table: Table) -> Figure:
    """A map per column, in it a row per backbone and a column per loss, of the runs named
    BACKBONE-LOSS or by train.py."""
    named = cells_of(table)
    columns = [column for column in next(iter(table.values()))
               if any(table[name][column] is not None for name in named)]
    if not columns:
        raise BadInput("--plot-kind heatmap needs runs named BACKBONE-LOSS, e.g. minilm-infonce, "
                       "and a whole column")
    _say_left_out(table, named, "not named BACKBONE-LOSS")
    backbones = list(dict.fromkeys(backbone for backbone, _ in named.values()))
    present = {loss for _, loss in named.values()}
    losses = [loss for loss in LOSSES if loss in present]
    across, down = min(3, len(columns)), -(-len(columns) // 3)
    names = max(1, 0.085 * max(map(len, backbones)))  # inches
    size = names + across * (0.1 + 0.36 * len(losses)), down * (0.9 + 0.28 * len(backbones))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, column in zip(axes.flat, columns, strict=False):
        grid = np.full((len(backbones), len(losses)), math.nan)
        for name, (backbone, loss) in named.items():
            if table[name][column] is not None:
                value = value_of(table[name][column])
                grid[backbones.index(backbone), losses.index(loss)] = value
        axis.imshow(grid, cmap="cividis", aspect="auto")
        dark = np.nanmin(grid) + 0.42 * np.ptp(grid[~np.isnan(grid)])
        for (i, j), value in np.ndenumerate(grid):
            text = "absent" if np.isnan(value) else f"{value:.3f}".removeprefix("0")
            axis.text(j, i, text, ha="center", va="center", fontsize=7,
                      color="white" if value <= dark else "black")
        axis.set_xticks(range(len(losses)), losses, rotation=35, ha="right", rotation_mode="anchor")
        axis.set(title=textwrap.fill(column, max(8, 4 * len(losses))),
                 yticks=range(len(backbones)), yticklabels=backbones)
    return figure


def cells_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{name: (backbone, loss)} of the runs named BACKBONE-LOSS, or [DATASET-]BACKBONE-LOSS[-shared]
    [-docs] as train.py names its folders. How the lists were drawn stays with the backbone, and so
    does the dataset unless it is the same for all.

    >>> cells_of(["pydocs-bert-bce (3 seeds)", "pydocs-tiny-kl-shared", "bm25"]).values()
    dict_values([('bert', 'bce'), ('tiny-shared', 'kl')])
    """
    found = {}
    for name in names:
        ending = re.search(r"((?:-shared)?(?:-docs)?)(?: \(\d+ seeds\))?\Z", name)
        if pair := backbone_and_loss(name[: ending.start()]):
            found[name] = pair[0] + ending[1], pair[1]
    known = "|".join([*BACKBONES, "tiny"])
    parts = {name: re.fullmatch(rf"(.*-|)((?:{known})(?:-shared)?(?:-docs)?)", row)
             for name, (row, _) in found.items()}
    if all(parts.values()) and len({part[1] for part in parts.values()}) == 1:
        return {name: (parts[name][2], loss) for name, (_, loss) in found.items()}
    return found


def difference(table: Table, queries: dict[str, list[str]], dataset: str | None) -> Figure:
    """A bar per query, from the one that lost most to the one that gained most; the five at each
    end by id and, if they are to be had, text. queries {dataset: [qid]}."""
    columns = [column for column in next(iter(table.values()))
               if all(row[column] is not None for row in table.values())]
    if len(table) != 2 or len(queries) > 1 or not columns:
        raise BadInput("--plot-kind difference takes two runs on one dataset")
    (first, second), column, (qids,) = table, columns[0], queries.values()
    try:
        texts = Texts(dataset).queries if dataset else {}
    except BadInput:  # qrels are enough for the bars
        texts = {}
    delta = table[second][column][0] - table[first][column][0]
    order = np.argsort(delta, kind="stable")
    delta, qids = delta[order], [qids[i] for i in order]
    better, worse = int((delta > 0).sum()), int((delta < 0).sum())
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    axis.bar(range(len(delta)), delta, 0.85, color=np.where(delta < 0, COLOURS[5], COLOURS[0]))
    axis.axhline(0, color="black", linewidth=0.8)
    equal = len(delta) - better - worse
    axis.set(xticks=[], ylabel=f"difference in {column}",
             xlabel=f"{len(delta)} queries: {better} better, {worse} worse, {equal} equal")
    axis.set_title(f"{second} − {first}", fontsize=9)
    largest = np.abs(delta).max(initial=0.01)
    axis.set_ylim(-1.1 * largest, 1.1 * largest)  # free corners for the lists of queries

    def write_list(head, places, x, side, edge):
        lines = [f"{delta[i]:+.2f} {qids[i]} {texts.get(qids[i], '')}".strip() for i in places]
        short = [line if len(line) <= 52 else line[:50] + " …" for line in lines]
        axis.text(x, 1 - x, "\n".join([head, *short]), transform=axis.transAxes, ha=side, va=edge,
                  fontsize=7.5)

    last = len(delta) - 1
    write_list("worst", range(min(5, worse)), 0.02, "left", "top")
    write_list("best", range(last, last - min(5, better), -1), 0.98, "right", "bottom")
    return figure


def latency(table: Table, timing: dict[str, tuple[float, int]], seed: int) -> Figure:
    """A point per run, its first column against its time; timing {run: (seconds, pairs)}."""
    column = next(iter(next(iter(table.values()))))
    points = {name: row[column] for name, row in table.items()
              if name in timing and row[column] is not None}
    if not points:
        raise BadInput("--plot-kind latency needs the RUN.json with timing that rerank.py writes "
                       "beside a run")
    _say_left_out(table, points, "without RUN.json")
    figure = Figure(figsize=(4.8, 3.6))
    axis = figure.subplots()
    for i, (name, cell) in enumerate(points.items()):
        seconds, pairs = timing[name]
        value, low, high = _with_interval(cell, seed)
        axis.errorbar(1000 * seconds / pairs, value, [[value - low], [high - value]], label=name,
                      fmt=MARKERS[i % len(MARKERS)], color=COLOURS[i % 6], capsize=2,
                      elinewidth=0.8)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axis.set(xscale="log", xlabel="milliseconds per query-document pair",
             ylabel=f"{column}, 95 % bootstrap interval")
    axis.margins(x=0.2)
    low, high = axis.get_xlim()
    round_numbers = [m * 10.0**k for k in range(-3, 6) for m in (1, 2, 3, 5, 7)]
    ticks = [x for x in round_numbers if low <= x <= high]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set_xticks([], minor=True)
    return figure
