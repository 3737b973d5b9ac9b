"""Are generated cells copies of training cells? Held-out real cells say how near a new cell is expected to lie.

A set of copies scores better than anything else in every other metric, so that this check stands beside all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import scipy.sparse as sp
from scipy.spatial import KDTree

from scldm.errors import InputError
from scldm.evaluate.intervals import part_of_each_type
from scldm.evaluate.metrics import Metric
from scldm.evaluate.space import Profile, subsample

NEAR = 0.01  # quantile of the held-out cells' distances below which a cell counts as a near copy
HASH_ROWS = 256  # cells hashed at once. With 3,000 nonzeros each, 256 x 3,000 x (8 + 8) B = 12 MB

MEMORISATION: Mapping[str, Metric] = {
    "closer_to_training": Metric(
        "closer to training than to held-out cells",
        "share of generated cells whose nearest real cell is a training cell and not a held-out one, among equal "
        "numbers of both. 0.5 is ideal, and 1 is a model that repeats training cells",
        "half",
        False,
    ),
    "memorisation_ratio": Metric(
        "distance to training cells, ratio",
        "median distance of a generated cell to its nearest training cell, divided by that of a held-out real cell. 1 "
        "is ideal, and below 1 cells are repeated or vary too little",
        "one",
        False,
    ),
    "near_copies": Metric(
        "near copies",
        "share of generated cells that lie nearer to a training cell than 99 % of held-out real cells do. 0.01 is "
        "expected of new cells",
        "lowest",
        False,
    ),
    "exact_copies": Metric(
        "exact copies",
        "share of generated cells whose counts equal those of a training cell in every judged gene",
        "lowest",
        False,
    ),
    "exact_copies_real": Metric(
        "exact copies among real cells",
        "the same of held-out real cells: above 0 where cells have few counts, or the splits share cells",
        "lowest",
        False,
    ),
}


# --- nearest training cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearness:
    """How near cells lie to the training cells.

    distance: Euclidean, in components, to the nearest of all training cells, (cells,)
    copied: whether some training cell has the same counts in every judged gene, (cells,) bool
    closer: 1 where its nearest real cell is a training cell, 0 where it is a held-out one, 0.5 at the same distance,
        (cells,). NaN where there are no held-out cells to choose from
    nearest: which real cell that is, by a number, (cells,)
    types: label per cell, (cells,)
    """

    distance: np.ndarray
    copied: np.ndarray
    closer: np.ndarray
    nearest: np.ndarray
    types: np.ndarray

    def select(self, rows: np.ndarray) -> Nearness:
        return Nearness(self.distance[rows], self.copied[rows], self.closer[rows], self.nearest[rows], self.types[rows])


def nearness(train: Profile, cells: Profile, max_cells: int, seed: int, held_out: Profile | None = None) -> Nearness:
    """Of at most `max_cells` of the cells, drawn under the seed, to all training cells. `closer`: among as many of each
    type of training and of held-out cells. The held-out cells' own serve for every set that is compared with them."""
    cells = cells.select(subsample(len(cells), max_cells, seed))
    # a tree, not a product of matrices: the distance between equal points must be exactly 0
    distance, _ = KDTree(train.components).query(cells.components)
    known = set(_digests(train.counts))
    copied = np.array([digest in known for digest in _digests(cells.counts)], dtype=bool)
    closer = nearest = np.full(len(cells), np.nan)
    if held_out is not None:
        closer, nearest = _closer(train, held_out, cells, seed)
    return Nearness(np.asarray(distance), copied, closer, nearest, cells.types)


def _closer(train: Profile, held_out: Profile, cells: Profile, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`closer` and `nearest` of Nearness."""
    rng, rows = np.random.default_rng([seed, 8]), ([], [])
    for label in np.unique(held_out.types):
        of = [np.flatnonzero(p.types == label) for p in (train, held_out)]
        for kept, there in zip(rows, of, strict=True):
            kept.append(rng.choice(there, min(map(len, of)), replace=False))
    sides = [p.components[np.concatenate(kept)] for p, kept in zip((train, held_out), rows, strict=True)]
    if not len(sides[0]):
        return np.full(len(cells), np.nan), np.full(len(cells), np.nan)
    (trained, k), (other, j) = (map(np.asarray, KDTree(side).query(cells.components)) for side in sides)
    return np.where(trained == other, 0.5, trained < other), np.where(trained < other, k, j + len(sides[0]))


def _digests(counts: sp.csr_matrix) -> Iterator[bytes]:
    """16 bytes per cell, a hash of its nonzero counts: equal for equal cells, however they are stored."""
    for first in range(0, len(counts.indptr) - 1, HASH_ROWS):
        rows = sp.csr_matrix(counts[first : first + HASH_ROWS], dtype=np.int64, copy=True)
        rows.sum_duplicates()
        rows.eliminate_zeros()
        columns = rows.indices.astype(np.int64)
        for a, b in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
            yield blake2b(columns[a:b].tobytes() + rows.data[a:b].tobytes(), digest_size=16).digest()


# --- scores --------------------------------------------------------------------------------------------------------


def memorisation(
    train: Profile, reference: Profile, other: Profile, max_cells: int = 2_000, seed: int = 0
) -> dict[str, float]:
    """Every metric of MEMORISATION, by name: `reference` are held-out real cells, `other` the generated ones. Equal
    numbers of both, at most `max_cells`."""
    return memorisation_scores(*_both(train, reference, other, max_cells, seed))


def _both(train: Profile, reference: Profile, other: Profile, max_cells: int, seed: int) -> tuple[Nearness, Nearness]:
    n = min(len(reference), len(other), max_cells)
    return nearness(train, reference, n, seed), nearness(train, other, n, seed, reference)


def memorisation_scores(held_out: Nearness, generated: Nearness) -> dict[str, float]:
    """From distances d to the nearest training cell: median d(generated) / median d(held-out), and the share of
    generated cells with d < the 1 % quantile of d(held-out). Both also fall where generated cells vary too little.
    Only copying makes training cells nearer than held-out ones.
    Source: nearest training neighbour against held-out data, Meehan et al. 2020 (they compare ranks, here medians).
    Raises: InputError where half of the held-out cells coincide with training cells.
    """
    if np.median(held_out.distance) == 0:
        raise InputError(
            "memorisation: half of the held-out cells or more coincide with training cells. The splits share cells, or "
            "cells have hardly any counts in the judged genes"
        )
    return _scores(held_out, generated)


def _scores(held_out: Nearness, generated: Nearness) -> dict[str, float]:
    """memorisation_scores. The ratio is NaN where the median distance of held-out cells is 0."""
    middle = float(np.median(held_out.distance))
    return {
        "closer_to_training": float(generated.closer.mean()),
        "memorisation_ratio": float(np.median(generated.distance)) / middle if middle else float("nan"),
        "near_copies": float((generated.distance < np.quantile(held_out.distance, NEAR)).mean()),
        "exact_copies": float(generated.copied.mean()),
        "exact_copies_real": float(held_out.copied.mean()),
    }


def memorisation_table(
    train: Profile, reference: Profile, other: Profile, max_cells: int, seed: int, n_halves: int
) -> tuple[dict, list[str]]:
    """metric -> score and standard error, of the same arguments. Empty where they can't be told, with a sentence on
    why."""
    both = _both(train, reference, other, max_cells, seed)
    try:
        values, errors = memorisation_scores(*both), memorisation_errors(*both, seed, n_halves)
    except InputError as error:
        return {}, [f"{error}."]
    told = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    return {name: {"score": v, "error": told[name]} for name, v in values.items() if math.isfinite(v)}, []


# --- standard errors -----------------------------------------------------------------------------------------------


def memorisation_errors(held_out: Nearness, generated: Nearness, seed: int, n_halves: int = 20) -> dict[str, float]:
    """Standard errors of `memorisation_scores` by the delete-half jackknife over both sets (intervals.py). The training
    cells stay as they are. That of `closer_to_training` goes by clusters: cells with the same nearest real cell are
    closer to the same side. It is sqrt(sum over clusters of (sum of x - mean)^2) / n.
    That of the ratio is NaN where half of the held-out cells of a part coincide with training cells.
    Source: Liang & Zeger 1986.
    """
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_halves):
        halves = (s.select(part_of_each_type(s.types, 0.5, rng)) for s in (held_out, generated))
        draws.append(_scores(*halves))
    errors = {name: float(np.std([d[name] for d in draws], ddof=1)) for name in MEMORISATION}
    _, cluster = np.unique(generated.nearest, return_inverse=True)
    of_cluster = np.bincount(cluster.ravel(), generated.closer - generated.closer.mean())
    return errors | {"closer_to_training": float(np.linalg.norm(of_cluster)) / len(generated.closer)}
