"""Sets of cells as the metrics see them: counts, log expression, and points in a space of principal components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

from scldm.errors import InputError

TARGET_SUM = 10_000
N_COMPONENTS = 10


def normalise(counts: sp.csr_matrix | sp.csr_array) -> sp.csr_matrix:
    """Counts per 10,000, CSR float64 (cells, genes). A cell without counts stays all zero."""
    scaled = sp.csr_matrix(counts, dtype=np.float64, copy=True)
    total = np.asarray(scaled.sum(1)).ravel()
    scale = np.divide(TARGET_SUM, total, out=np.zeros_like(total), where=total > 0)
    scaled.data *= np.repeat(scale, np.diff(scaled.indptr))
    return scaled


def log_normalise(counts: sp.csr_matrix | sp.csr_array) -> sp.csr_matrix:
    """log1p of counts per 10,000."""
    log = normalise(counts)
    np.log1p(log.data, out=log.data)
    return log


def subsample(n: int, limit: int, seed: int) -> np.ndarray:
    """Sorted indices of at most `limit` of n cells, drawn without replacement under the seed. All of them if they
    fit."""
    if n <= limit:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))


def shape_of(matrix: sp.csr_matrix) -> tuple[int, int]:
    assert matrix.shape is not None  # scipy's own types allow it
    return matrix.shape


def fit_pca(log: sp.csr_matrix, n_components: int = N_COMPONENTS, seed: int = 0, which: str = "validation") -> PCA:
    """Principal components of log-normalised cells. Sparse input stays sparse.

    ARPACK runs to machine precision from a seeded start. The largest loading of a component is positive, so that the
    same cells always give the same components. `which` is what an error calls the cells.

    Raises: InputError for too few cells or genes.
    """
    n_cells, n_genes = shape_of(log)
    if min(n_cells, n_genes) <= n_components:
        raise InputError(
            f"{n_components} principal components need at least {n_components + 1} {which} cells and genes. "
            f"There are {n_cells} cells x {n_genes} genes"
        )
    if not log.count_nonzero():
        raise InputError(f"{which} cells have no count in any gene that is judged")
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(log)


@dataclass(frozen=True)
class Space:
    """Where cells are compared, fitted once and then the same for every set.

    pca: of log expression of the judged genes
    genes: columns of the counts that are judged, ascending. None for all
    protocol: name of the protocol that fitted it
    fitted_on: which cells, in words
    """

    pca: PCA
    genes: np.ndarray | None = None
    protocol: str = "scldm"
    fitted_on: str = "validation cells"

    def describe(self) -> dict:
        """What a table says of the space. explained_variance: the components' share of the variance, 0 to 1."""
        return {
            "protocol": self.protocol,
            "target_sum": TARGET_SUM,
            "n_genes": np.asarray(self.pca.components_).shape[1],
            "n_components": int(self.pca.n_components_),
            "explained_variance": float(self.pca.explained_variance_ratio_.sum()),
            "fitted_on": self.fitted_on,
        }


@dataclass(frozen=True)
class Profile:
    """A set of cells as the metrics see it.

    counts: raw counts of the judged genes, CSR (cells, genes)
    log: log1p of counts per 10,000 of the same genes, CSR (cells, genes). The 10,000 are those of all given genes
    components: (cells, components)
    total: counts per cell over all given genes, (cells,)
    types: label per cell, (cells,) str: its combination of conditions
    """

    counts: sp.csr_matrix
    log: sp.csr_matrix
    components: np.ndarray
    total: np.ndarray
    types: np.ndarray

    @classmethod
    def of(cls, counts: sp.csr_matrix, types: np.ndarray, space: Space | PCA) -> Profile:
        """The cells in a space. A PCA stands for a space of all genes."""
        space = space if isinstance(space, Space) else Space(space)
        log, total = log_normalise(counts), np.asarray(counts.sum(1)).ravel()
        if space.genes is not None:
            counts, log = counts[:, space.genes], log[:, space.genes]
        return cls(sp.csr_matrix(counts), log, space.pca.transform(log), total, np.asarray(types))

    def __len__(self) -> int:
        return len(self.types)

    def select(self, rows: np.ndarray) -> Profile:
        return Profile(self.counts[rows], self.log[rows], self.components[rows], self.total[rows], self.types[rows])

    def of_type(self, label: str) -> Profile:
        return self.select(np.flatnonzero(self.types == label))
