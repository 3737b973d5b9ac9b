"""A Gaussian per combination, in whatever space; and PCA as the simplest such space.

Reading order: Gaussian, per_combination, negative_binomial; components, known, pca.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

from benchmarks.quality.cells import Task, library_sizes
from benchmarks.quality.known import ROWS, Known
from benchmarks.quality.methods.naive import not_seen, seen_numbers
from benchmarks.quality.work import Made, Place, labels_frame
from scldm.evaluate.space import log_normalise

N_COMPONENTS = 50


@dataclass(frozen=True)
class Gaussian:
    """mean: (d,); root: (k, d) with root.T @ root the covariance"""

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, variance: np.ndarray | float = 0.0) -> Gaussian:
        """Fitted to values (n, d), each known up to independent normal noise of this variance, (n, d) or 0.

        The covariance is that of the values over n - 1, plus the mean noise. It may be of lower rank than d.
        """
        mean = values.mean(0)
        root = (values - mean) / np.sqrt(max(len(values) - 1, 1))
        noise = np.broadcast_to(variance, values.shape).mean(0)
        return cls(mean, np.concatenate([root, np.diag(np.sqrt(noise))]) if noise.any() else root)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, d)."""
        return self.mean + rng.standard_normal((n, len(self.root))) @ self.root


def per_combination(
    task: Task,
    values: np.ndarray,
    variance: np.ndarray | float,
    decode: Callable[[np.ndarray, np.ndarray], sp.csr_matrix],
    seed: int,
) -> Made:
    """Cells decoded from a Gaussian per combination, with library sizes drawn from its training cells.

    values, variance: of the training cells, (n, d); variance as for Gaussian.of
    decode: values and library sizes -> counts
    """
    rng = np.random.default_rng([seed, 3])
    drawn, sizes, keys = [], [], []
    for key, n in seen_numbers(task).items():
        rows = np.flatnonzero(task.train.keys == key)
        of = variance[rows] if isinstance(variance, np.ndarray) else variance
        drawn.append(Gaussian.of(values[rows], of).draw(n, rng))
        sizes.append(library_sizes(task.train, task.labels_of[key], n, rng))
        keys += [key] * n
    counts = decode(np.concatenate(drawn), np.concatenate(sizes))
    return Made(counts, labels_frame(task, np.array(keys, object)), not_seen(task))


def negative_binomial(mu: np.ndarray, theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Counts with mean mu and variance mu + mu^2 / theta: a Poisson draw whose rate is a gamma draw."""
    return rng.poisson(rng.gamma(np.broadcast_to(theta, mu.shape), mu / theta))


def components(task: Task, seed: int) -> PCA:
    """Of log-normalised training cells; 50, or as many as there can be."""
    n_components = min(N_COMPONENTS, len(task.train) - 1, len(task.genes) - 1)
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(log_normalise(task.train.counts))


def known(task: Task, seed: int, model: Path, place: Place) -> Known:
    found = components(task, seed)
    train, test = (found.transform(log_normalise(cells.counts)) for cells in (task.train, task.test))
    return Known((train, test))


def pca(task: Task, seed: int, model: Path, place: Place) -> Made:
    """50 components of log-normalised training cells, a Gaussian per combination, and back: values below 0 are 0,
    expm1, scaled to a drawn library size, Poisson."""
    log = log_normalise(task.train.counts)
    found, rng = components(task, seed), np.random.default_rng([seed, 4])

    def decode(values: np.ndarray, sizes: np.ndarray) -> sp.csr_matrix:
        parts = []
        for start in range(0, len(values), ROWS):
            few = slice(start, start + ROWS)
            rate = np.expm1(np.maximum(found.inverse_transform(values[few]), 0))
            total = np.maximum(rate.sum(1, keepdims=True), 1e-12)
            parts.append(sp.csr_matrix(rng.poisson(rate / total * sizes[few, None])))
        return sp.csr_matrix(sp.vstack(parts))

    return per_combination(task, found.transform(log), 0.0, decode, seed)
