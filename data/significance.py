"""Values of runs per query: their mean, its interval, and paired tests between runs.

A cell is a list of arrays: the values of all queries, an array per dataset that the column averages
over, queries in one order for all runs. A column over several datasets is the mean of their means.
A table is {run: {column: cell, or None where the run lacks a dataset}}.

Beside evaluate.py, for the tables and pictures it writes need these numbers as well. Works copied
alone (it needs numpy, and scipy for the t-test).
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np

ALPHA = 0.05
Cell = list[np.ndarray]
Table = dict[str, dict[str, Cell | None]]

# difference: of the means, first - second
Comparison = namedtuple("Comparison", "first second column difference p p_holm")


def value_of(cell: Cell) -> float:
    return float(np.mean([values.mean() for values in cell]))


def paired_t(differences: list[np.ndarray]) -> np.ndarray:
    """Two-sided p [pairs] of the paired t-test; differences is a list, per dataset, of arrays
    [queries, pairs].

    Over one dataset this is scipy.stats.ttest_rel. Over several, the mean of the mean differences
    is divided by its standard error, the strata being independent, with the degrees of freedom of
    Welch and Satterthwaite.
    """
    from scipy.stats import t

    if min(map(len, differences)) < 2:
        return np.ones(differences[0].shape[1])
    effect = np.mean([d.mean(0) for d in differences], 0)
    parts = np.stack([d.var(0, ddof=1) / len(d) for d in differences]) / len(differences) ** 2
    variance = parts.sum(0)
    freedom = np.array([[len(d) - 1] for d in differences])
    with np.errstate(divide="ignore", invalid="ignore"):  # two runs may differ by a constant
        statistic = np.abs(effect) / np.sqrt(variance)
        p = 2 * t.sf(statistic, variance**2 / (parts**2 / freedom).sum(0))
    return np.where(variance > 0, p, effect == 0)


def randomization(differences: list[np.ndarray], permutations: int = 100_000,
                  seed: int = 0) -> np.ndarray:
    """Two-sided p [pairs] of Fisher's randomisation test: without a difference each query's sign is
    a coin toss.

    One set of tosses serves all pairs. p = (1 + tosses at least as extreme) / (1 + permutations).
    """
    weighted = np.concatenate([d / (len(d) * len(differences)) for d in differences])
    weighted = weighted[(weighted != 0).any(1)]
    queries, pairs = weighted.shape
    effect, extreme = weighted.sum(0), np.zeros(pairs)
    rng = np.random.default_rng(seed)
    step = max(1, (1 << 22) // max(1, queries))  # of 4 million tosses: 32 MiB as numbers
    for start in range(0, permutations, step):
        now = min(step, permutations - start)
        tosses = rng.integers(0, 256, (now, -(-queries // 8)), np.uint8)  # a bit per query
        flipped = np.unpackbits(tosses, axis=1, count=queries).astype(float) @ weighted
        extreme += (np.abs(effect - 2 * flipped) >= np.abs(effect) - 1e-12).sum(0)
    return (1 + extreme) / (1 + permutations)


def holm(p) -> np.ndarray:
    """Holm's adjusted p: the k-th smallest of m times m - k + 1, not below the one before it, at
    most 1."""
    p = np.asarray(p, float)
    order, adjusted = np.argsort(p, kind="stable"), np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def bootstrap(cell: Cell, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval (low, high) of the value of a cell, queries drawn anew within each
    dataset."""
    rng, means = np.random.default_rng(seed), np.zeros(resamples)
    for values in cell:
        parts = -(-resamples * len(values) // (1 << 22))  # of 4 million draws: 32 MiB
        for part in np.array_split(np.arange(resamples), parts):
            drawn = values[rng.integers(0, len(values), (len(part), len(values)))]
            means[part] += drawn.mean(1) / len(cell)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def compare(table: Table, baseline: str | None = None, test: str = "t",
            permutations: int = 100_000, seed: int = 0) -> list[Comparison]:
    """[Comparison] in every column of each run with the baseline, or of all pairs, Holm's
    correction over them all."""
    names = list(table)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if baseline is not None:
        pairs = [(a, baseline) for a in names if a != baseline]
    tested = paired_t
    if test == "randomization":
        tested = functools.partial(randomization, permutations=permutations, seed=seed)
    found = []
    for column in table[names[0]]:
        known = {name for name in names if table[name][column] is not None}
        here = [(a, b) for a, b in pairs if a in known and b in known]
        if not here:
            continue
        differences = differences_of(table, column, here)
        p = tested(differences)
        effects = np.mean([d.mean(0) for d in differences], 0)
        for (a, b), effect, p_of_pair in zip(here, effects.tolist(), p.tolist(), strict=True):
            found.append(Comparison(a, b, column, effect, p_of_pair, p_holm=1.0))
    adjusted = holm([c.p for c in found]).tolist()
    return [c._replace(p_holm=p) for c, p in zip(found, adjusted, strict=True)]


def differences_of(table: Table, column: str, pairs: list[tuple[str, str]]) -> list[np.ndarray]:
    """A list, per dataset of the column, of arrays [queries, pairs], the first run's values minus
    the second's."""
    datasets = len(table[pairs[0][0]][column])
    differences = []
    for dataset in range(datasets):
        by_pair = [table[a][column][dataset] - table[b][column][dataset] for a, b in pairs]
        # rounded, for means over seeds that were summed in another order differ in their last bit
        differences.append(np.round(np.stack(by_pair, axis=1), 12))
    return differences
