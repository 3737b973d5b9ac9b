"""What a score is compared with: the floor, and three rivals that anyone could draw from the training cells.

The floor is the training cells themselves: nothing that learns from them is expected to be nearer to the test cells. A
rival knows one thing less than a model should: (a) that genes vary together, (b) more than the mean, (c) the type.

Reading order: draws, scores pooled and per type, the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.evaluate.metrics import METRICS, Profile, score

Counts = sp.csr_matrix
Numbers = Mapping[str, int]


# --- draws ---------------------------------------------------------------------------------------------------------


def rows_per_type(types: np.ndarray, numbers: Numbers, rng: np.random.Generator) -> np.ndarray:
    """Row indices of `numbers[label]` cells of each label, without replacement; `numbers` asks for no more than there
    are."""
    return np.concatenate([rng.choice(np.flatnonzero(types == t), n, replace=False) for t, n in numbers.items()])


def floor_cells(
    counts: Counts, types: np.ndarray, numbers: Numbers, rng: np.random.Generator
) -> tuple[Counts, np.ndarray]:
    """Training cells as they are, `numbers[label]` of each type; counts and types, as all draws here."""
    rows = rows_per_type(types, numbers, rng)
    return counts[rows], types[rows]


def independent_genes(
    counts: Counts, types: np.ndarray, numbers: Numbers, rng: np.random.Generator
) -> tuple[Counts, np.ndarray]:
    """(a) Every gene of a cell is taken from another training cell of the type: right marginals, no correlation."""

    def learn(of_type: Counts, n_cells: int) -> Callable[[int], np.ndarray]:
        columns = of_type.tocsc()
        columns.eliminate_zeros()
        expressing = np.diff(columns.indptr)

        def draw(n: int) -> np.ndarray:
            # a gene's expressing cells are thought of as the first ones: a draw beyond them is a zero
            cell = rng.integers(0, n_cells, size=(n, len(expressing)))
            drawn = np.zeros(cell.shape, dtype=counts.dtype)
            hit = cell < expressing
            drawn[hit] = columns.data[(cell + columns.indptr[:-1])[hit]]
            return drawn

        return draw

    return _by_type(counts, types, numbers, learn)


def poisson_mean(
    counts: Counts, types: np.ndarray, numbers: Numbers, rng: np.random.Generator
) -> tuple[Counts, np.ndarray]:
    """(b) Poisson counts at the type's mean of each gene."""

    def learn(of_type: Counts, n_cells: int) -> Callable[[int], np.ndarray]:
        mean = np.asarray(of_type.sum(0)).ravel() / n_cells
        return lambda n: rng.poisson(mean, size=(n, len(mean))).astype(counts.dtype)

    return _by_type(counts, types, numbers, learn)


def shuffled_types(
    counts: Counts, types: np.ndarray, numbers: Numbers, rng: np.random.Generator
) -> tuple[Counts, np.ndarray]:
    """(c) Real training cells under each other's types; pooled, they are the floor."""
    cells, labels = floor_cells(counts, types, numbers, rng)
    return cells, rng.permutation(labels)


def _by_type(
    counts: Counts,
    types: np.ndarray,
    numbers: Numbers,
    learn: Callable[[Counts, int], Callable[[int], np.ndarray]],
    rows: int = 256,
) -> tuple[Counts, np.ndarray]:
    """`learn` sees a type's training cells and returns what draws n dense cells of it; at most 256 are dense at a
    time."""
    blocks, labels = [], []
    for label, n in numbers.items():
        cells = np.flatnonzero(types == label)
        draw = learn(counts[cells], len(cells))
        blocks += [sp.csr_matrix(draw(min(rows, n - start))) for start in range(0, n, rows)]
        labels += [label] * n
    return sp.csr_matrix(sp.vstack(blocks)), np.array(labels)


Draw = Callable[[Counts, np.ndarray, Numbers, np.random.Generator], tuple[Counts, np.ndarray]]
RIVALS: Mapping[str, tuple[str, str, Draw]] = {
    "a": (
        "independent genes",
        "each gene resampled on its own among the training cells of the type",
        independent_genes,
    ),
    "b": ("Poisson at the mean", "Poisson counts at the gene's mean over the training cells of the type", poisson_mean),
    "c": ("shuffled types", "real training cells under each other's types", shuffled_types),
}


# --- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """pooled: all cells at once; per_type: cell-weighted mean over the scored types; by_type: each of these. Without
    scored types, these two are empty."""

    pooled: dict[str, float]
    per_type: dict[str, float]
    by_type: dict[str, dict[str, float]]


def score_sets(test: Profile, other: Profile, scored_types: list[str], max_cells: int, seed: int) -> Scores:
    """All metrics of a set of cells against the test cells. Weights are the test cells of each scored type."""
    by_type = {t: score(test.of_type(t), other.of_type(t), max_cells, seed) for t in scored_types}
    pooled = score(test, other, max_cells, seed)
    if not scored_types:
        return Scores(pooled, {}, {})
    weights = [int((test.types == t).sum()) for t in scored_types]
    per_type = {m: float(np.average([by_type[t][m] for t in scored_types], weights=weights)) for m in METRICS}
    return Scores(pooled, per_type, by_type)


# --- table ---------------------------------------------------------------------------------------------------------


def table(
    generated: dict[str, float],
    floor: list[dict[str, float]],
    rivals: Mapping[str, list[dict[str, float]]],
    as_floor: Collection[str] = (),
) -> dict:
    """metric -> score, floor and rivals (mean and standard deviation over the draws), and per rival `normalised` =
    (score - floor) / (rival - floor), 0 as good as real training cells and 1 as poor as the rival, and `beats`.

    Both are None where the metric does not find the rival worse than the floor: by less than three standard errors of
    the difference of their means, or where the rival is the floor by construction (`as_floor`).
    """
    out: dict[str, dict] = {}
    for name, metric in METRICS.items():
        base = _summary([d[name] for d in floor])
        row = {"score": generated[name], "floor": base, "rivals": {}, "normalised": {}, "beats": {}}
        for key, draws in rivals.items():
            rival = _summary([d[name] for d in draws])
            gap = rival["mean"] - base["mean"]
            told_apart = key not in as_floor and metric.loss(rival["mean"]) > metric.loss(base["mean"])
            told_apart &= bool(abs(gap) > 3 * np.hypot(base["sd"], rival["sd"]) / np.sqrt(len(draws)))
            row["rivals"][key] = rival
            row["normalised"][key] = (generated[name] - base["mean"]) / gap if told_apart else None
            beats = bool(metric.loss(generated[name]) < metric.loss(rival["mean"]))
            row["beats"][key] = beats if told_apart else None
        out[name] = row
    return out


def _summary(values: list[float]) -> dict:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "sd": spread, "draws": values}
