"""Suites: the columns of a table over several datasets, a paper's or the user's own, and where the
runs and judgments of their datasets lie."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from data.command import BadInput
from data.paper import SUITES
from data.run_names import file_name_of, relative
from data.runs import read_qrels
from data.texts import load_qrels, text_lines

Suite = dict[str, dict[str, str]]  # {column: {name of the run file: dataset}}


def load_suite(name: str) -> Suite:
    """A suite by its name, or by a text file of datasets. Raises BadInput."""
    if name in SUITES:
        return SUITES[name]
    if not Path(name).is_file():
        raise BadInput(f"--suite {name}: neither {' nor '.join(SUITES)} nor a file of datasets, "
                       "one a line")
    return read_suite(name)


def read_suite(path: str) -> Suite:
    """The suite that a text file has: a dataset a line is a column, lines `column: dataset` of one
    column are its mean, # begins a comment. Raises BadInput (FILE:LINE)."""
    suite: Suite = {}
    datasets: dict[str, str] = {}
    for number, line in text_lines(path).items():
        where, text = f"{path}:{number}", re.sub(r"(^|\s)#.*", "", line).strip()
        if not text:
            continue
        match = re.fullmatch(r"(?:([^:]*[^:\s])\s*:\s*)?([^:\s\0]+)", text)
        name = match and file_name_of(match[2])
        if not name:
            raise BadInput(f"{where}: `{text[:60]}`: a line is a dataset, or `column: dataset`")
        column, dataset = match[1] or name, match[2]
        if datasets.setdefault(name, dataset) != dataset:
            raise BadInput(f"{where}: the run files of {dataset} would have the name of "
                           f"{datasets[name]}'s, {name}.run: name one of them only")
        if name in suite.setdefault(column, {}):
            raise BadInput(f"{where}: {dataset} stands in {column} twice: keep one of the lines")
        suite[column][name] = dataset
    if not suite:
        raise BadInput(f"{path}:1: no dataset in it: write one a line")
    return suite


def datasets_of(suite: Suite) -> dict[str, str]:
    """{name of the run file: dataset} of all columns."""
    return {name: dataset for column in suite.values() for name, dataset in column.items()}


def columns_of(suite: Suite, measures: Iterable[str], per_dataset: bool) -> dict:
    """{measure: {column: [(dataset, measure)]}}: a table per measure, a column per dataset or per
    group of them."""
    columns = {name: list(group.values()) for name, group in suite.items()}
    if per_dataset:
        columns = {name: [dataset] for name, dataset in datasets_of(suite).items()}
    return {measure: {name: [(dataset, measure) for dataset in datasets]
                      for name, datasets in columns.items()}
            for measure in measures}


def runs_of(name: str, dataset: str, folders: Iterable[str]) -> list[Path]:
    """The run files of a dataset that the folders hold."""
    stems = name, file_name_of(dataset), relative(dataset)
    names = [f"{stem}.run{packed}" for stem in dict.fromkeys(stems)
             for packed in ("", ".gz", ".zst")]
    paths = [Path(folder, name) for folder in folders for name in names]
    return [path for path in paths if path.is_file()]


def qrels_of(name: str, dataset: str, folder: str | None) -> dict[str, dict[str, int]]:
    """NAME.qrels or the BEIR folder NAME/ of a folder of qrels, where there is one; else the
    dataset's own."""
    local = sorted(Path(folder).glob("*")) if folder else []
    local = [path for path in local
             if re.fullmatch(rf"{re.escape(name)}(\.[A-Za-z]\w*)*", path.name)]
    if not local:
        return load_qrels(dataset)
    return read_qrels(local[0]) if local[0].is_file() else load_qrels(str(local[0]))
