"""What a table shows, and the table as Markdown, LaTeX, CSV and JSON.

Tables are files that evaluate.py writes; how its values came about they do not know.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from data.paper import LOSSES
from data.runs import read_bytes
from data.significance import ALPHA, Comparison, Table, bootstrap, value_of

LETTERS = "abcdefghijklmnoprstuvwxyz"  # without q: Unicode has no raised one
RAISED = str.maketrans(LETTERS, "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ")
PAPER = Path(__file__).parents[1] / "results" / "paper-ndcg10.json"
TEX = str.maketrans({
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "†": r"\dag{}", "‡": r"\ddag{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}",
})
TEX_MARKS = str.maketrans({"†": r"\dag", "‡": r"\ddag"})  # within a formula
TEX_PLACES = ("%s", r"\textbf{%s}", r"\underline{%s}")


class Entry(NamedTuple):
    """What a table shows in one place."""

    value: float | None
    text: str
    place: int = 0  # 1 the best of its column, 2 the second, of those that differ in what is shown
    marks: str = ""  # letters, † or ‡
    interval: tuple[float, float] | None = None

    def between(self) -> str:
        """The interval with as many decimals as the value."""
        if not self.interval:
            return ""
        places = len(self.text.partition(".")[2])
        low, high = self.interval
        return f" [{low:.{places}f}, {high:.{places}f}]"


Shown = dict[str, dict[str, Entry]]


def entries(table: Table, comparisons: list[Comparison], baseline: str | None, digits: int,
            intervals: bool = False, seed: int = 0,
            absent: dict[tuple[str, str], str] | None = None) -> Shown:
    """{run: {column: Entry}} of a table, with the marks of the significant comparisons; absent
    {(run, column): text in place of a value}."""
    marks = marks_of(list(table), comparisons, baseline)
    absent = absent or {}
    shown = {name: {} for name in table}
    for column in next(iter(table.values())):
        values = {name: value_of(row[column]) for name, row in table.items()
                  if row[column] is not None}
        rounded = {name: round(value, digits) for name, value in values.items()}
        best_two = sorted(set(rounded.values()), reverse=True)[:2]
        for name in table:
            if name not in values:
                text = absent.get((name, column), "absent")
                shown[name][column] = Entry(None, text)
                continue
            place, interval = 0, None
            if len(values) > 1 and rounded[name] in best_two:
                place = 1 + best_two.index(rounded[name])
            if intervals:
                interval = bootstrap(table[name][column], seed=seed)
            text = f"{rounded[name]:.{digits}f}"
            shown[name][column] = Entry(values[name], text, place, marks[name, column], interval)
    return shown


def marks_of(names: list[str], comparisons: list[Comparison],
             baseline: str | None) -> dict[tuple[str, str], str]:
    """{(run, column): marks of what is significant}, "" by default: † or ‡ beside a run that is
    better or worse than the baseline; without one, the letters of the runs that it is better
    than."""
    marks = defaultdict(str)
    for c in comparisons:
        if c.p_holm >= ALPHA:
            continue
        if baseline is not None:
            marks[c.first, c.column] = "†" if c.difference > 0 else "‡"
            continue
        better, worse = (c.first, c.second) if c.difference > 0 else (c.second, c.first)
        letters = marks[better, c.column] + LETTERS[names.index(worse)]
        marks[better, c.column] = "".join(sorted(letters))
    return marks


def letters_of(table: Table, comparisons: list[Comparison],
               baseline: str | None) -> dict[str, str]:
    """{run: its letter} where all pairs were compared."""
    if not comparisons or baseline is not None:
        return {}
    return dict(zip(table, LETTERS, strict=False))


def what_was_tested(table: Table, comparisons: list[Comparison], baseline: str | None,
                    test: str) -> str:
    """What the marks mean and how they were tested."""
    marks = "Raised letters: better than the run of that letter"
    if baseline:
        marks = f"†/‡: better/worse than {baseline}"
    tests = "two-sided paired randomisation test with 100,000 permutations over queries"
    if test == "t":
        tests = "two-sided paired t-test over queries"
    if any(cell and len(cell) > 1 for row in table.values() for cell in row.values()):
        tests += ", stratified by dataset"
    family = f"all {len(comparisons)} comparisons of this table"
    return f"{marks}, p < {ALPHA}; {tests}; Holm correction over {family}."


def backbone_and_loss(name: str) -> tuple[str, str] | None:
    """("minilm", "infonce") of a run named minilm-infonce; None for other names."""
    # mse is no part of ADR-MSE or Margin-MSE, as others name their models
    backbone, losses = r"(.+)(?<!-adr)(?<!-margin)", "|".join(LOSSES)
    match = re.fullmatch(rf"{backbone}-({losses})( \(\d+ seeds\))?", name.lower())
    return match and (match[1], match[2])


def add_paper(shown: Shown, digits: int, notes: list[str], warnings: list[str]) -> Shown:
    """The rows, below each that is named BACKBONE-LOSS the paper's figures and the difference; says
    where they are from in `notes`, and in `warnings` which runs the paper has not."""
    data = json.loads(read_bytes(PAPER))
    known = {(row["backbone"], row["loss"]): row for row in data["rows"]}
    notes.append(f"paper: {data['what']} ({data['source']}).")
    rows = {}
    for name, row in shown.items():
        rows[name] = row
        theirs = known.get(backbone_and_loss(name))
        if theirs is None:
            warnings.append(
                f"{name}: no row of the paper; its names are BACKBONE-LOSS, e.g. minilm-infonce.")
            continue
        values = dict(zip(data["columns"], theirs["values"], strict=True))
        paper = rows[f"{name}: paper, {' '.join(theirs['paper'])}"] = {}
        gaps = rows[f"{name}: ours - paper"] = {}
        for column, entry in row.items():
            paper[column] = Entry(values[column], f"{values[column]:.3f}")
            gaps[column] = Entry(None, "")
            if entry.value is not None:
                gap = entry.value - values[column]
                gaps[column] = Entry(gap, f"{gap:+.{digits}f}")
    return rows


# ------------------------------------------------------------------------------------------- forms
# Each takes the title of the first column, what is shown, the letters of the runs, notes on how the
# values came about, and warnings of what may be wrong.


def markdown(title: str, shown: Shown, letters: dict[str, str], notes, warnings=()) -> str:
    """Aligned Markdown, the best of each column in bold."""
    columns = list(next(iter(shown.values())))
    rows = [[title, *columns], ["---", *["---:"] * len(columns)]]
    for name, row in shown.items():
        label = f"{letters[name]} {name}" if name in letters else name
        rows.append([label, *map(_markdown_cell, row.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([label.ljust(widths[0]), *aligned])} |")
    lines += [f"\n{note}" for note in [*notes, *warnings]]
    return "\n".join(lines)


def _markdown_cell(entry: Entry) -> str:
    text = f"**{entry.text}**" if entry.place == 1 else entry.text
    return text + entry.marks.translate(RAISED) + entry.between()


def latex(title: str, shown: Shown, letters: dict[str, str], notes, warnings=()) -> str:
    """A table for booktabs: best of each column bold, second underlined, notes as caption, warnings
    as comments."""
    columns = list(next(iter(shown.values())))
    head = [text.translate(TEX) for text in [title, *columns]]
    rows = []
    for name, row in shown.items():
        label = name.translate(TEX)
        if name in letters:
            label = f"$^{{{letters[name]}}}$ {label}"
        rows.append(" & ".join([label, *map(_latex_cell, row.values())]) + r" \\")
    return "\n".join([
        *(f"% {warning}" for warning in warnings),
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{' '.join(notes).translate(TEX)}}}",
        r"\end{table}",
    ])


def _latex_cell(entry: Entry) -> str:
    text = TEX_PLACES[entry.place] % entry.text.replace("-", "$-$")  # a hyphen is no minus sign
    if entry.marks:
        text += f"$^{{{entry.marks.translate(TEX_MARKS)}}}$"
    return text + entry.between()


def as_csv(title: str, shown: Shown, letters: dict[str, str], notes, warnings=()) -> str:
    """A line per run and column, values at full precision; the notes are comments at the end."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "letter", "column", "value", "low", "high", "marks"])
    for name, row in shown.items():
        for column, entry in row.items():
            value = entry.text if entry.value is None else repr(entry.value)
            low, high = entry.interval or ("", "")
            writer.writerow([name, letters.get(name, ""), column, value, low, high, entry.marks])
    return text.getvalue() + "\n".join(f"# {note}" for note in [*notes, *warnings])


def as_json(title: str, shown: Shown, letters: dict[str, str], comparisons: list[Comparison],
            notes) -> str:
    """All that a table is made of, at full precision."""
    runs = {name: {column: entry._asdict() for column, entry in row.items()}
            for name, row in shown.items()}
    tests = [c._asdict() | {"significant": c.p_holm < ALPHA} for c in comparisons]
    content = {"title": title, "letters": letters, "runs": runs, "tests": tests, "notes": notes}
    return json.dumps(content, indent=1, ensure_ascii=False)
