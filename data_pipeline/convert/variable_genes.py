"""The most variable genes (seurat_v3), from moments that are summed while cells stream by.

Source: Stuart et al. 2019 (Seurat v3), as scanpy.pp.highly_variable_genes(flavor="seurat_v3") has it. The variance that
is expected at a gene's mean is fitted by loess. Counts are clipped at sqrt(n) expected standard deviations above the
mean. Genes are ranked by the variance of the clipped counts over the expected one.

All sums are of integers, so that neither the order of cells nor the number of workers changes a digit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from data_pipeline.convert.narrow import FAULTS, CountError, Rows, fault_of
from scldm.errors import InputError

# A gene's squares in one unit of at most 32,768 cells sum to at most this, so that those of 4,096 units stay within 64
# bits. A count that would lead past it is taken as a clipped one. It takes counts of 262,144 in every cell.
LARGEST_SQUARES = 1 << 51
TOTAL, SQUARES, CELLS, CLIPPED = range(4)  # rows of the sums: of counts and their squares, both unclipped ones only


def add_moments(
    rows: Rows, column_of: np.ndarray, clip_at: np.ndarray, min_genes: int, in_train: np.ndarray, sums: np.ndarray
) -> int:
    """Adds the cells with at least min_genes genes to `sums` (4, n_genes). Returns how many training cells they are.

    in_train: (n,) bool. Of other cells only CELLS is summed: genes are ranked by what training sees

    Raises: CountError for the first value that is no count.
    """
    values = rows.values.astype(np.float32) if rows.values.dtype in (np.float16, bool) else rows.values
    column_of = np.ascontiguousarray(column_of)
    n, fault, row, k = _add(rows.indptr, rows.columns, values, column_of, clip_at, min_genes, in_train, sums)
    if fault:
        raise CountError(int(row), int(rows.columns[k]), values[k].item(), FAULTS[fault])
    return int(n)


@njit(nogil=True, cache=True)
def _add(indptr, columns, values, column_of, clip_at, min_genes, in_train, sums):
    n = 0
    for row in range(len(indptr) - 1):
        genes = 0
        for k in range(indptr[row], indptr[row + 1]):
            v = values[k]
            if not (v >= 0 and v < 9.2e18 and v == np.int64(v)):
                return n, fault_of(np.float64(v)), row, k
            genes += v > 0
        if genes < min_genes:
            continue
        n += in_train[row]
        for k in range(indptr[row], indptr[row + 1]):
            gene, count = column_of[columns[k]], np.int64(values[k])
            if gene < 0 or count == 0:
                continue
            sums[2, gene] += 1
            if not in_train[row]:
                continue
            if count > clip_at[gene] or count > 1 << 25 or sums[1, gene] + count * count > LARGEST_SQUARES:
                sums[3, gene] += 1
            else:
                sums[0, gene] += count
                sums[1, gene] += count * count
    return n, 0, 0, 0


def expected_std(sums: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and expected standard deviation of every gene's counts, from unclipped sums.

    Raises: InputError where the cells are too few for the fit.
    """
    from skmisc.loess import loess  # a compiled library that nothing else needs

    if n_cells < 2:
        raise InputError(f"filter.n_top_genes: {n_cells} training cells are too few to choose variable genes")
    mean = sums[TOTAL] / n_cells
    variance = (sums[SQUARES] / n_cells - mean**2) * (n_cells / (n_cells - 1))
    varies = variance > 0
    log_variance = np.zeros(len(mean))
    try:
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=0.3, degree=2)
        model.fit()
    except ValueError as error:
        raise InputError(f"filter.n_top_genes: variances can't be fitted to means: {error}") from None
    log_variance[varies] = model.outputs.fitted_values
    return mean, np.sqrt(10**log_variance)


def clip_values(sums: np.ndarray, n_cells: int) -> np.ndarray:
    """The count above which each gene's counts are clipped, from sums without clipping.

    Raises: InputError where counts are too large, or the cells are too few for the fit.
    """
    too_large = int((sums[CLIPPED] > 0).sum())  # nothing else is clipped yet
    if too_large:
        raise InputError(f"filter.n_top_genes: counts of {too_large} genes are too large to square. 0 keeps all genes")
    mean, std = expected_std(sums, n_cells)
    return std * np.sqrt(n_cells) + mean


def top_genes(sums: np.ndarray, clipped: np.ndarray, clip_at: np.ndarray, n_cells: int, n_top: int) -> np.ndarray:
    """Which genes are among the n_top most variable ones, from the sums without and with clipping."""
    mean, std = expected_std(sums, n_cells)
    total = clipped[TOTAL] + clipped[CLIPPED] * clip_at
    squares = clipped[SQUARES] + clipped[CLIPPED] * clip_at**2
    variance = (n_cells * mean**2 + squares - 2 * total * mean) / ((n_cells - 1) * std**2)
    keep = np.zeros(len(mean), bool)
    keep[np.argsort(-variance, kind="stable")[:n_top]] = True
    return keep
