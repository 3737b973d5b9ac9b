"""How sure a distance between two samples of cells is: MMD2 and W2 with the cells drawn again, with replacement.

A cell that is drawn twice would be its own neighbour, which biases an unbiased estimate; so the draws are weights of
the cells that there are, and no cell is paired with itself. Reading order: Distances, resampled.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.spatial.distance import cdist, pdist

METRICS = ("MMD2", "W2")


class Distances:
    """Of one set to a reference, in components, for any weights of their cells. Definitions as in
    `scldm.evaluate.metrics`; the kernel's bandwidth is that of the unweighted reference."""

    def __init__(self, reference: np.ndarray, other: np.ndarray) -> None:
        bandwidth2 = float(np.median(pdist(reference, "sqeuclidean")))
        self.cost = cdist(reference, other, "sqeuclidean")
        pairs = [(reference, reference), (other, other), (reference, other)]
        self.kernels = [np.exp(-cdist(*pair, "sqeuclidean") / (2 * bandwidth2)) for pair in pairs]

    def mmd2(self, reference_n: np.ndarray, other_m: np.ndarray) -> float:
        """reference_n, other_m: how often each cell is there."""

        def within(kernel: np.ndarray, n: np.ndarray) -> float:
            return (n @ kernel @ n - n @ n) / (n.sum() ** 2 - n @ n)  # a cell's kernel with itself is 1

        own, others, between = self.kernels
        across = reference_n @ between @ other_m / (reference_n.sum() * other_m.sum())
        return float(within(own, reference_n) + within(others, other_m) - 2 * across)

    def w2(self, reference_n: np.ndarray, other_m: np.ndarray) -> float:
        import ot

        rows, columns = reference_n.nonzero()[0], other_m.nonzero()[0]
        weights = reference_n[rows] / reference_n.sum(), other_m[columns] / other_m.sum()
        cost = np.ascontiguousarray(self.cost[np.ix_(rows, columns)])
        return float(np.sqrt(max(ot.emd2(*weights, cost, numItermax=10_000_000), 0.0)))


def resampled(
    draws: list[tuple[np.ndarray, Mapping[str, np.ndarray]]], n: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """(n, 2) of each set: MMD2 and W2 to the reference, each time of one of the draws with its cells drawn again. The
    reference's cells are the same for all sets, so that their differences are paired.

    draws: a reference and sets by name, each (cells, components)
    """
    distances = [{name: Distances(reference, of) for name, of in sets.items()} for reference, sets in draws]
    found: dict[str, list[tuple[float, float]]] = {}
    for k in range(n):
        reference, sets = draws[k % len(draws)]
        reference_n = _again(len(reference), rng)
        for name, of in sets.items():
            one, other_m = distances[k % len(draws)][name], _again(len(of), rng)
            found.setdefault(name, []).append((one.mmd2(reference_n, other_m), one.w2(reference_n, other_m)))
    return {name: np.array(scores) for name, scores in found.items()}


def _again(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.bincount(rng.integers(0, n, n), minlength=n).astype(float)
