"""Scores that look at nearest neighbours, the reference first. Copies of a cell would be its nearest: none of these may
be computed on cells that were drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import cdist

K_NEIGHBOURS = 5


def nn_accuracy(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Leave-one-out 1-nearest-neighbour accuracy over the reference's cells and over the other's. 0.5 is ideal at equal
    numbers. Neighbours at the same distance count by their share.
    Source: Lopez-Paz & Oquab 2017. Per class as in Xu et al. 2018."""
    both = np.concatenate([reference, other])
    is_other = np.arange(len(both)) >= len(reference)
    hit = np.empty(len(both))
    for rows in _blocks(len(both), len(both)):
        distance = cdist(both[rows], both, "sqeuclidean")
        distance[np.arange(len(rows)), rows] = np.inf
        nearest = distance == distance.min(1, keepdims=True)
        same = is_other[rows, None] == is_other
        hit[rows] = (nearest & same).sum(1) / nearest.sum(1)
    return float(hit[~is_other].mean()), float(hit[is_other].mean())


def precision_recall(reference: np.ndarray, other: np.ndarray, k: int = K_NEIGHBOURS) -> tuple[float, float]:
    """Precision: share of the other's cells that lie in the reference's manifold. Recall: share of the reference's
    cells that lie in the other's. A set's manifold is the union of balls around its cells, each with the radius of the
    cell's k-th nearest neighbour in its own set. Real cells against real cells are not at 1: the floor is the scale.
    With k cells or fewer in a set, its farthest cell takes the place of the k-th.
    Source: Kynkaanniemi et al. 2019, eq. 1-2. They take k = 3. Here k = 5."""
    return _inside(other, reference, k), _inside(reference, other, k)


def _inside(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    """Share of the points that lie in some ball of the manifold's cells."""
    n = len(manifold)
    radius2 = np.empty(n)
    for rows in _blocks(n, n):  # position 0 of a sorted row is the cell itself
        radius2[rows] = np.partition(cdist(manifold[rows], manifold, "sqeuclidean"), min(k, n - 1), axis=1)[
            :, min(k, n - 1)
        ]
    inside = np.empty(len(points), dtype=bool)
    for rows in _blocks(len(points), n):
        inside[rows] = (cdist(points[rows], manifold, "sqeuclidean") <= radius2).any(1)
    return float(inside.mean())


def _blocks(n_rows: int, n_columns: int) -> Iterator[np.ndarray]:
    """Row indices in blocks whose distances to all columns take 160 MB at most."""
    step = max(1, 20_000_000 // n_columns)
    for start in range(0, n_rows, step):
        yield np.arange(start, min(start + step, n_rows))
