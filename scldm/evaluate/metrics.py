"""Distances between two sets of cells, as pure functions of two matrices; the first is always the reference.

The protocol: counts per 10,000, log1p, 10 principal components fitted on cells that are neither trained on nor judged.
MMD2, W2, FD and 1-NN accuracy take the components; the gene-level ones take the log-normalised matrices and the totals.

Reading order: protocol, distances in components, gene level, all of them under their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
from scipy.spatial.distance import cdist, pdist
from scipy.stats import wasserstein_distance
from sklearn.decomposition import PCA

from scldm.errors import InputError

TARGET_SUM = 10_000
N_COMPONENTS = 10


@dataclass(frozen=True)
class Metric:
    """What a score is called and how it reads.

    title: as in tables
    meaning: one sentence for a reader who doesn't know it
    best: the end at which generated cells equal real ones
    main: one of the four that decide
    """

    title: str
    meaning: str
    best: Literal["lowest", "highest", "half"]
    main: bool = True

    def loss(self, value: float) -> float:
        """How far a score is from the best, so that less is better for every metric."""
        return {"lowest": value, "highest": -value, "half": abs(value - 0.5)}[self.best]


METRICS: Mapping[str, Metric] = {
    "mmd2": Metric(
        "MMD²",
        "squared maximum mean discrepancy, unbiased, Gaussian kernel as wide as the median distance of real cells; 0 "
        "is equal",
        "lowest",
    ),
    "w2": Metric(
        "W2",
        "2-Wasserstein distance: how far cells must move to turn one set into the other; smaller is better",
        "lowest",
    ),
    "fd": Metric(
        "FD",
        "Fréchet distance of the two sets' means and covariances (squared, as in FID); smaller is better",
        "lowest",
    ),
    "nn_accuracy": Metric(
        "1-NN accuracy",
        "how often a cell's nearest neighbour is of its own kind (real or not); 0.5 is indistinguishable, 1 is told "
        "apart",
        "half",
    ),
    "nn_accuracy_real": Metric(
        "1-NN of real cells", "the same over real cells alone; above 0.5, real states are missing", "half", False
    ),
    "nn_accuracy_other": Metric(
        "1-NN of generated cells",
        "the same over generated cells alone; above 0.5, they lie where real cells don't, or huddle together",
        "half",
        False,
    ),
    "mean_r": Metric("gene means, r", "Pearson correlation over genes of mean log expression", "highest", False),
    "variance_r": Metric("gene variances, r", "Pearson correlation over genes of its variance", "highest", False),
    "fraction_r": Metric(
        "fraction expressing, r", "Pearson correlation over genes of the share of cells > 0", "highest", False
    ),
    "library_w1": Metric(
        "library size, W1",
        "1-Wasserstein distance of the natural log of total counts; 0.1 is about 10 % off",
        "lowest",
        False,
    ),
}


# --- protocol ------------------------------------------------------------------------------------------------------


def log_normalise(counts: sp.csr_matrix | sp.csr_array) -> sp.csr_matrix:
    """log1p of counts per 10,000, CSR float64 (cells, genes); a cell without counts stays all zero."""
    log = sp.csr_matrix(counts, dtype=np.float64, copy=True)
    total = np.asarray(log.sum(1)).ravel()
    scale = np.divide(TARGET_SUM, total, out=np.zeros_like(total), where=total > 0)
    log.data *= np.repeat(scale, np.diff(log.indptr))
    np.log1p(log.data, out=log.data)
    return log


def fit_pca(log: sp.csr_matrix, n_components: int = N_COMPONENTS, seed: int = 0) -> PCA:
    """Principal components of log-normalised cells, sparse input kept sparse.

    ARPACK to machine precision from a seeded start; the largest loading of a component is positive, so that the same
    cells always give the same components.

    Raises: InputError for too few cells or genes.
    """
    n_cells, n_genes = _shape(log)
    if min(n_cells, n_genes) <= n_components:
        raise InputError(
            f"{n_components} principal components need at least {n_components + 1} validation cells and genes; "
            f"there are {n_cells} cells x {n_genes} genes"
        )
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(log)


def subsample(n: int, limit: int, seed: int) -> np.ndarray:
    """Sorted indices of at most `limit` of n cells, drawn without replacement under the seed; all of them if they
    fit."""
    if n <= limit:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))


def _shape(matrix: sp.csr_matrix) -> tuple[int, int]:
    assert matrix.shape is not None  # scipy's own types allow it
    return matrix.shape


# --- distances in components ---------------------------------------------------------------------------------------


def mmd2(reference: np.ndarray, other: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy, kernel exp(-|x - y|^2 / (2 s^2)); may fall slightly below 0.

    Bandwidth: s is the median Euclidean distance between two different cells of the reference (median heuristic), so
    that it does not depend on what is judged. Memory: three n x n float64 matrices.
    Source: Gretton et al. 2012, lemma 6.
    Raises: InputError where half of the reference's pairs coincide.
    """
    pairs = pdist(reference, "sqeuclidean")
    # the median of squares, not the square of the median: they differ by interpolation only
    bandwidth2 = float(np.median(pairs))
    if bandwidth2 == 0:
        raise InputError(
            "MMD2: more than half of the pairs of reference cells coincide; is the test split made of copies?"
        )
    n, m = len(reference), len(other)

    def kernel_sum(squares: np.ndarray) -> float:
        return float(np.exp(-squares / (2 * bandwidth2)).sum())

    within = 2 * kernel_sum(pairs) / (n * (n - 1)) + 2 * kernel_sum(pdist(other, "sqeuclidean")) / (m * (m - 1))
    return within - 2 * kernel_sum(cdist(reference, other, "sqeuclidean")) / (n * m)


def w2(reference: np.ndarray, other: np.ndarray) -> float:
    """2-Wasserstein distance of the empirical distributions: the square root of the exact optimal transport cost under
    squared Euclidean distance, every cell of a set weighing the same. In the units of the components. Finite sets of
    the same distribution are not at 0: compare at equal numbers."""
    import ot  # looks for every array library that is installed, which takes seconds

    cost = cdist(reference, other, "sqeuclidean")
    weights, others = (np.full(len(x), 1 / len(x)) for x in (reference, other))
    return float(np.sqrt(max(ot.emd2(weights, others, cost, numItermax=10_000_000), 0.0)))


def frechet(reference: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to both sets, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), covariances
    over n - 1.
    Source: Dowson & Landau 1982; squared, as FID is."""
    c1, c2 = np.cov(reference, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which needs no complex square root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ c2 @ root), 0, None)).sum()
    shift = reference.mean(0) - other.mean(0)
    return float(shift @ shift + np.trace(c1) + np.trace(c2) - 2 * cross)


def nn_accuracy(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Leave-one-out 1-nearest-neighbour accuracy over the reference's cells and over the other's; 0.5 is ideal at equal
    numbers. Neighbours at the same distance count by their share.
    Source: Lopez-Paz & Oquab 2017; per class as in Xu et al. 2018."""
    both = np.concatenate([reference, other])
    is_other = np.arange(len(both)) >= len(reference)
    hit = np.empty(len(both))
    step = max(1, 20_000_000 // len(both))  # 160 MB of distances at a time
    for start in range(0, len(both), step):
        rows = np.arange(start, min(start + step, len(both)))
        distance = cdist(both[rows], both, "sqeuclidean")
        distance[rows - start, rows] = np.inf
        nearest = distance == distance.min(1, keepdims=True)
        same = is_other[rows, None] == is_other
        hit[rows] = (nearest & same).sum(1) / nearest.sum(1)
    return float(hit[~is_other].mean()), float(hit[is_other].mean())


# --- gene level ----------------------------------------------------------------------------------------------------


def gene_moments(log: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance (over n) and fraction of cells > 0 of every gene, each (genes,)."""
    mean = np.asarray(log.mean(0)).ravel()
    squares = np.asarray(log.multiply(log).mean(0)).ravel()
    n_cells, n_genes = _shape(log)
    fraction = np.bincount(log.indices[log.data > 0], minlength=n_genes) / n_cells
    return mean, np.clip(squares - mean**2, 0, None), fraction


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; 0 where one side is constant, as nothing then varies together."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y / norm) if norm > 0 else 0.0


def library_w1(reference_total: np.ndarray, other_total: np.ndarray) -> float:
    """1-Wasserstein distance of log(1 + total counts), natural log."""
    return float(wasserstein_distance(np.log1p(reference_total), np.log1p(other_total)))


# --- all of them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """A set of cells as the metrics see it.

    log: log1p of counts per 10,000, CSR (cells, genes)
    components: (cells, 10)
    total: counts per cell, (cells,)
    types: label per cell, (cells,) str
    """

    log: sp.csr_matrix
    components: np.ndarray
    total: np.ndarray
    types: np.ndarray

    @classmethod
    def of(cls, counts: sp.csr_matrix, types: np.ndarray, pca: PCA) -> Profile:
        log = log_normalise(counts)
        return cls(log, pca.transform(log), np.asarray(counts.sum(1)).ravel(), np.asarray(types))

    def __len__(self) -> int:
        return len(self.types)

    def of_type(self, label: str) -> Profile:
        rows = np.flatnonzero(self.types == label)
        return Profile(self.log[rows], self.components[rows], self.total[rows], self.types[rows])


def score(reference: Profile, other: Profile, max_cells: int, seed: int) -> dict[str, float]:
    """Every metric of METRICS, by name. MMD2, W2 and 1-NN accuracy compare every cell with every other and are taken on
    at most `max_cells` cells a side, drawn under the seed; the others see all cells."""
    few = [p.components[subsample(len(p), max_cells, seed)] for p in (reference, other)]
    real, generated = nn_accuracy(*few)
    n_real, n_other = map(len, few)
    moments = zip(gene_moments(reference.log), gene_moments(other.log), strict=True)
    return {
        "mmd2": mmd2(*few),
        "w2": w2(*few),
        "fd": frechet(reference.components, other.components),
        "nn_accuracy": (n_real * real + n_other * generated) / (n_real + n_other),
        "nn_accuracy_real": real,
        "nn_accuracy_other": generated,
        **{name: pearson(*pair) for name, pair in zip(("mean_r", "variance_r", "fraction_r"), moments, strict=True)},
        "library_w1": library_w1(reference.total, other.total),
    }
