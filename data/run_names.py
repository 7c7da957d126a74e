"""What runs are called: their files, by model and dataset; and in tables and pictures, where the
part of a path that tells it from the others is its name and the seeds of one model are one run."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data.command import BadInput


def run_name(model: str, dataset: str) -> str:
    """MODEL/DATASET.run.gz, the model by the last part of its path, the dataset by its whole name.

    >>> run_name("runs/bert-bce-seed1/", "./beir/nq")
    'bert-bce-seed1/beir-nq.run.gz'
    """
    return f"{os.path.basename(os.path.abspath(model))}/{file_name_of(dataset)}.run.gz"


def file_name_of(dataset: str) -> str:
    """The name that the run files of a dataset have, e.g. corpora-mine-test of
    ../corpora/mine/test: never a hidden file's."""
    return relative(dataset).replace("/", "-")


def relative(dataset: str) -> str:
    return re.sub(r"^(\.{0,2}/)+", "", dataset).rstrip("/")


def without_seed(path: str | Path) -> str:
    """The path without -seedN at the end of a folder's or file's name: one model's seeds become
    equal."""
    return re.sub(r"-seed\d+(?=[./]|$)", "", str(path))


def text_of(path: str | Path) -> str:
    """A path as it can be written: names of files may hold bytes that are not UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()


def stem_of(path: str) -> str:
    """The name of a run file without .run.gz and the like."""
    name = Path(path).name or path
    return re.sub(r"(\.(run|txt|trec|gz|zst))+$", "", name) or name


def grouped(paths: Iterable[str | Path]) -> dict[str, list[str]]:
    """{name for the table: [a path per seed]} of run files or of folders of runs."""
    seeds: dict[str, list[str]] = {}
    for path in dict.fromkeys(map(str, paths)):
        seeds.setdefault(without_seed(path), []).append(path)
    names = short_names(seeds)
    groups = {}
    for path, group in seeds.items():
        name = text_of(names[path])
        if len(group) > 1:
            name += f" ({len(group)} seeds)"
        groups[name] = group
    return groups


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """{path: its shortest end that no other path has}, the whole path where there is none. A run
    that shares its file's name with others and its folder with none is called by its folder.

    >>> short_names(["bm25.run", "runs/bert-bce/nq.run.gz", "runs/bert-kl/nq.run.gz"]).values()
    dict_values(['bm25', 'bert-bce', 'bert-kl'])
    """
    whole = {path: (*Path(path).parent.parts, stem_of(path)) for path in paths}
    stems = Counter(parts[-1] for parts in whole.values())
    folders = Counter(parts[:-1] for parts in whole.values())
    part = {}
    for path, (*folder, stem) in whole.items():
        alone = folder and stems[stem] > 1 and folders[tuple(folder)] == 1
        part[path] = tuple(folder) if alone else (*folder, stem)
    taken = Counter(end for path in whole for end in {*ends_of(whole[path]), *ends_of(part[path])})
    names = {}
    for path in whole:
        free = [end for end in ends_of(part[path]) if taken[end] == 1]
        names[path] = "/".join(free[0]) if free else path
    return names


def ends_of(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The ends of a path, the shortest first, up to the root."""
    return [parts[-n:] for n in range(1, len(parts) + 1) if parts[-n] != "/"]


def run_called(given: str, groups: dict[str, list[str]]) -> str:
    """The name in `groups`, grouped()'s result, of the run that is meant: by the path of it or of a
    seed of it, by its name, or by its file's name. BadInput where there is none."""
    wanted = without_seed(os.path.abspath(given))
    for name, (path, *_) in groups.items():
        if wanted == without_seed(os.path.abspath(path)):
            return name
    known = {given, without_seed(stem_of(given))}
    for name in groups:
        if not known.isdisjoint((name, name.partition(" (")[0])):
            return name
    raise BadInput(f"--baseline {given}: not one of the runs: {', '.join(groups)}")
