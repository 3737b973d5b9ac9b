"""Scores of genes and of library sizes: what principal components do not show."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.stats import wasserstein_distance

from scldm.evaluate.space import Profile, shape_of

Moments = tuple[np.ndarray, np.ndarray, np.ndarray]

N_LEVELS = 10
N_CORRELATED = 200
MIN_CELLS = 3  # a correlation of two cells is 1 or -1
LEAST_VARIANCE = 1e-6  # of log expression: below it a gene counts as constant


def gene_moments(log: sp.csr_matrix) -> Moments:
    """Mean, variance (over n) and fraction of cells > 0 of every gene, each (genes,)."""
    n_cells, n_genes = shape_of(log)
    mean = np.bincount(log.indices, log.data, n_genes) / n_cells
    squares = np.bincount(log.indices, log.data**2, n_genes) / n_cells
    fraction = np.bincount(log.indices[log.data > 0], minlength=n_genes) / n_cells
    return mean, np.clip(squares - mean**2, 0, None), fraction


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation. 0 where one side is constant, as nothing then varies together."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y / norm) if norm > 0 else 0.0


def library_w1(reference_total: np.ndarray, other_total: np.ndarray) -> float:
    """1-Wasserstein distance of log(1 + total counts), natural log."""
    return float(wasserstein_distance(np.log1p(reference_total), np.log1p(other_total)))


def by_expression_level(reference: Moments, other: Moments, n_levels: int = N_LEVELS) -> tuple[float, float]:
    """How far zeros and variance of two sets differ, over groups of genes by the reference's mean log expression. The
    mean over groups of |share of zeros, other - reference|: 0.05 is 5 % of cells. And that of |log2(variance of other /
    variance of reference)|: 1 is twofold.

    Groups are of equal size. Genes that no reference cell expresses are left out. Averaging over the genes of a group
    leaves what is wrong at that level and little of the sampling error.
    """
    mean, expressed = reference[0], np.flatnonzero(reference[0] > 0)
    expressed = expressed if len(expressed) else np.arange(len(mean))
    ordered = expressed[np.argsort(mean[expressed], kind="stable")]
    groups = np.array_split(ordered, min(n_levels, len(ordered)))

    def levels(values: np.ndarray) -> np.ndarray:
        return np.array([values[g].mean() for g in groups])

    zeros, of_other = levels(1 - reference[2]), levels(1 - other[2])
    log_variance, log_of_other = (np.log2(np.maximum(levels(of[1]), LEAST_VARIANCE)) for of in (reference, other))
    return float(np.abs(of_other - zeros).mean()), float(np.abs(log_of_other - log_variance).mean())


def gene_correlation(
    reference_log: sp.csr_matrix, other_log: sp.csr_matrix, n_genes: int = N_CORRELATED
) -> tuple[float, float]:
    """r and slope of the other's gene-gene Pearson correlations against the reference's, over all pairs of the
    `n_genes` genes that the reference expresses most (mean log expression).

    The slope is that of least squares, the reference's correlations being x. Their own sampling error pulls r and slope
    below 1 even for real cells, the more the fewer cells: the floor says how far.
    """
    top = np.argsort(-np.bincount(reference_log.indices, reference_log.data, shape_of(reference_log)[1]), kind="stable")
    top = np.sort(top[:n_genes])
    pairs = np.triu_indices(len(top), 1)
    x, y = (correlations(log[:, top].toarray())[pairs] for log in (reference_log, other_log))
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float((x - x.mean()) @ (y - y.mean())) / spread if spread > 0 else 0.0
    return pearson(x, y), slope


def correlation_within(reference: Profile, other: Profile, n_genes: int = N_CORRELATED) -> tuple[float, float]:
    """`gene_correlation` within each combination, averaged with the reference's cells as weights. Cells of different
    combinations never enter one correlation. Combinations with fewer than 3 cells on a side are left out. NaN where
    that leaves none."""
    rows = []
    for label in np.unique(reference.types):
        r, o = (np.flatnonzero(p.types == label) for p in (reference, other))
        if min(len(r), len(o)) >= MIN_CELLS:
            rows.append((len(r), *gene_correlation(reference.log[r], other.log[o], n_genes)))
    if not rows:
        return float("nan"), float("nan")
    weights, *values = np.array(rows).T
    r, slope = (float(np.average(v, weights=weights)) for v in values)
    return r, slope


def correlations(x: np.ndarray) -> np.ndarray:
    """Pearson correlations of the columns, (genes, genes). 0 for a gene that is constant."""
    x -= x.mean(0)
    norm = np.linalg.norm(x, axis=0)
    x /= np.where(norm > np.sqrt(LEAST_VARIANCE * len(x)), norm, np.inf)
    return x.T @ x
