"""Distances between two clouds of points, the reference first. All are in the units of the components."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist, pdist

from scldm.errors import InputError

SIGMAS = (0.01, 0.1, 1.0, 10.0, 100.0)


def mmd2(reference: np.ndarray, other: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy, kernel exp(-|x - y|^2 / (2 s^2)). It may fall slightly below 0.

    Bandwidth: s is the median Euclidean distance between two different cells of the reference (median heuristic), so
    that it does not depend on what is judged. Memory: three n x n float64 matrices.
    Source: Gretton et al. 2012, lemma 6.
    Raises: InputError where half of the reference's pairs coincide.
    """
    pairs = pdist(reference, "sqeuclidean")
    # the median of squares, not the square of the median: they differ by interpolation only
    bandwidth2 = float(np.median(pairs))
    if bandwidth2 == 0:
        raise InputError("MMD2: over half of the pairs of reference cells coincide. Is the test split made of copies?")
    n, m = len(reference), len(other)

    def kernel_sum(squares: np.ndarray) -> float:
        return float(np.exp(-squares / (2 * bandwidth2)).sum())

    within = 2 * kernel_sum(pairs) / (n * (n - 1)) + 2 * kernel_sum(pdist(other, "sqeuclidean")) / (m * (m - 1))
    return within - 2 * kernel_sum(cdist(reference, other, "sqeuclidean")) / (n * m)


def mmd2_multiscale(reference: np.ndarray, other: np.ndarray, sigmas: tuple[float, ...] = SIGMAS) -> float:
    """Biased squared maximum mean discrepancy with the kernel sum_s exp(-|x - y|^2 / (2 s^2)): the SUM over sigmas, not
    their mean. A cell is paired with itself too, so that two samples of n cells of one distribution are at about
    2 len(sigmas) / n at most, not at 0. Compare at equal numbers only.
    Source: Gretton et al. 2012, eq. 5. The sigmas and the sum as CFGen's repository has them.
    """
    n, m = len(reference), len(other)

    def kernel_sum(squares: np.ndarray) -> float:
        return float(sum(np.exp(squares * (-0.5 / s**2)).sum() for s in sigmas))

    xx = (2 * kernel_sum(pdist(reference, "sqeuclidean")) + n * len(sigmas)) / n**2
    yy = (2 * kernel_sum(pdist(other, "sqeuclidean")) + m * len(sigmas)) / m**2
    return xx + yy - 2 * kernel_sum(cdist(reference, other, "sqeuclidean")) / (n * m)


def energy_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased. No cell is paired with itself (a U-statistic). So
    equal distributions are at 0 on average, and a score may fall slightly below 0.
    Source: Szekely & Rizzo 2013, eq. 1.
    """
    across = float(cdist(reference, other).mean())
    return 2 * across - float(pdist(reference).mean()) - float(pdist(other).mean())


def w2(reference: np.ndarray, other: np.ndarray) -> float:
    """2-Wasserstein distance of the empirical distributions: the square root of the exact optimal transport cost under
    squared Euclidean distance, every cell of a set weighing the same. Finite sets of the same distribution are not at
    0: compare at equal numbers.
    Source: Peyre & Cuturi 2019, eq. 2.24 with p = 2."""
    return float(np.sqrt(_transport(cdist(reference, other, "sqeuclidean"))))


def w1(reference: np.ndarray, other: np.ndarray) -> float:
    """1-Wasserstein distance of the empirical distributions: the exact optimal transport cost under Euclidean distance.
    As for W2, compare at equal numbers.
    Source: Peyre & Cuturi 2019, eq. 2.24 with p = 1."""
    return _transport(cdist(reference, other))


def _transport(cost: np.ndarray) -> float:
    """Least cost of moving equal weights of the rows to equal weights of the columns."""
    import ot  # looks for every array library that is installed, which takes seconds

    weights, others = (np.full(n, 1 / n) for n in cost.shape)
    return max(np.asarray(ot.emd2(weights, others, cost, numItermax=10_000_000)).item(), 0.0)


def frechet(reference: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to both sets, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), covariances
    over n - 1.
    Source: Dowson & Landau 1982. Squared, as FID is."""
    c1, c2 = np.cov(reference, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which needs no complex square root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ c2 @ root), 0, None)).sum()
    shift = reference.mean(0) - other.mean(0)
    return float(shift @ shift + np.trace(c1) + np.trace(c2) - 2 * cross)
