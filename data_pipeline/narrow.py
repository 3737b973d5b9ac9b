"""Raw rows of a source, checked to be counts and made narrow in one pass.

Reading order: Rows (what sources yield), CountError, narrow_rows, coo_to_rows, the numba kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from data_pipeline.block import NarrowCells
from scldm.errors import InputError

FAULTS = ("", "negative", "fractional", "not a number", "infinite", "given twice for the gene", "too large for 64 bits")


@dataclass(frozen=True)
class Rows:
    """Rows of a source's count matrix, CSR, with its own columns and values.

    rows: (n,) row or soma_joinid of each
    indptr: (n + 1,) int64
    columns: (nnz,) any integer dtype, in any order within a row
    values: (nnz,) any numeric dtype; zeros may be stored
    """

    rows: np.ndarray
    indptr: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + self.values.nbytes + self.indptr.nbytes + self.rows.nbytes


class CountError(Exception):
    """A value that is no count: which row of the Rows, which source column, what is wrong with it."""

    def __init__(self, row: int, column: int, value: float, fault: str) -> None:
        super().__init__(fault)
        self.row, self.column, self.value, self.fault = row, column, value, fault


class GeneSums:
    """Per gene of the vocabulary, over the cells that were counted: sum of counts and cells that express it, int64."""

    def __init__(self, n_genes: int) -> None:
        self.total = np.zeros(n_genes, np.int64)
        self.cells = np.zeros(n_genes, np.int64)


@dataclass(frozen=True)
class NarrowRows:
    """cells: the rows over the vocabulary's genes; n_genes_all: (n,) genes of the source with a count; totals: (n,) uint64."""

    cells: NarrowCells
    n_genes_all: np.ndarray
    totals: np.ndarray


def narrow_rows(
    rows: Rows, column_of: np.ndarray, n_genes: int, sums: GeneSums, counted: np.ndarray, min_genes: int = 0
) -> NarrowRows:
    """The rows over the vocabulary, every value checked.

    column_of: source column -> vocabulary column, int32; -1 where the vocabulary lacks the gene
    sums: increased by the rows where `counted` is True and that have at least `min_genes` genes
    Raises: CountError for the first value that is no count.
    """
    n, values = len(rows.rows), rows.values
    if values.dtype == bool or values.dtype == np.float16:
        values = values.astype(np.float32)
    if len(rows.columns):
        low, high = rows.columns.min(), rows.columns.max()
        if low < 0 or high >= len(column_of):
            raise InputError(f"gene column {low if low < 0 else high} of a matrix with {len(column_of)} genes: damaged")
    nnz = int(rows.indptr[-1])
    nonzeros, n_far, n_large = (np.zeros(n, np.uint32) for _ in range(3))
    n_all, totals = np.zeros(n, np.uint32), np.zeros(n, np.uint64)
    steps, small = np.empty(nnz, np.uint8), np.empty(nnz, np.uint8)
    n_escapes = _count_escapes(rows.indptr, values, n_genes)
    far, large = np.empty(n_escapes[0], np.uint32), np.empty(n_escapes[1], np.uint64)
    fault, row, k, used, used_far, used_large = _narrow_rows(
        rows.indptr, rows.columns, values, column_of, min_genes, counted,
        nonzeros, n_far, n_large, n_all, totals, steps, small, far, large,
        sums.total, sums.cells, np.zeros(n_genes, np.int64),
    )  # fmt: skip
    if fault:
        raise CountError(int(row), int(rows.columns[k]), values[k].item(), FAULTS[fault])
    cells = NarrowCells(nonzeros, n_far, n_large, steps[:used], small[:used], far[:used_far], large[:used_large])
    return NarrowRows(cells, n_all, totals)


def coo_to_rows(row_of: np.ndarray, n_rows: int, rows: np.ndarray, dim_0: np.ndarray, dim_1: np.ndarray,
                values: np.ndarray) -> Rows:  # fmt: skip
    """Coordinates in any order as Rows: one counting sort, no lookup per value but an array's.

    row_of: coordinate minus its smallest -> position among `rows`, or -1 for rows that are not wanted; int32
    dim_0: coordinates minus their smallest
    """
    indptr = np.zeros(n_rows + 1, np.int64)
    _count_rows(row_of, dim_0, indptr)
    columns, out = np.empty(indptr[-1], dim_1.dtype), np.empty(indptr[-1], values.dtype)
    _sort_rows(row_of, dim_0, dim_1, values, indptr[:-1].copy(), columns, out)
    return Rows(rows, indptr, columns, out)


# --- kernels -------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _count_escapes(indptr, values, n_genes):
    """Upper bounds of a chunk's large steps (a row has at most n_genes // 256 + 1) and large counts."""
    n_far, n_large = 0, 0
    for cell in range(len(indptr) - 1):
        n_far += min(indptr[cell + 1] - indptr[cell], n_genes // 256 + 1)
    for v in values:
        n_large += v > 255
    return n_far, n_large


@njit(nogil=True, cache=True)
def fault_of(value):
    """Position in FAULTS of what is wrong with a value; 0 where it is a count."""
    if value < 0:
        return 1
    if value != value:
        return 3
    if value > 1e300:
        return 4
    if value >= 9223372036854775808.0:
        return 6
    return 2 if value != np.int64(value) else 0


@njit(nogil=True, cache=True)
def _narrow_rows(
    indptr, columns, values, column_of, min_genes, counted,
    nonzeros, n_far, n_large, n_all, totals, steps, small, far, large, gene_total, gene_cells, dense,
):  # fmt: skip
    """Returns (fault, row, k, and how much of steps, far, large is filled); `dense` is zeros, and is left so."""
    at, at_far, at_large = 0, 0, 0
    for row in range(len(indptr) - 1):
        start, end = indptr[row], indptr[row + 1]
        ascending, before, genes = True, np.int64(-1), 0
        low, high = np.int64(len(dense)), np.int64(-1)
        for k in range(start, end):
            v = values[k]
            if not (v >= 0 and v < 9.2e18 and v == np.int64(v)):
                return fault_of(np.float64(v)), row, k, 0, 0, 0
            column = np.int64(column_of[columns[k]])
            if v > 0:
                genes += 1
                if column >= 0:
                    ascending &= column > before
                    before = column
                    low, high = min(low, column), max(high, column)
        n_all[row] = genes
        if not ascending:
            for k in range(start, end):
                column = column_of[columns[k]]
                if column >= 0 and values[k] > 0:
                    if dense[column] != 0:
                        return 5, row, k, 0, 0, 0
                    dense[column] = np.int64(values[k])
        first, first_far, first_large, total = at, at_far, at_large, np.uint64(0)
        counts_it = counted[row] and genes >= min_genes
        before = np.int64(-1)
        for i in range(start, end) if ascending else range(low, high + 1):
            if ascending:
                column, count = np.int64(column_of[columns[i]]), np.int64(values[i])
                if column < 0 or count == 0:
                    continue
            else:
                column, count = np.int64(i), dense[i]
                if count == 0:
                    continue
                dense[i] = 0
            step = column - before
            before = column
            total += np.uint64(count)
            if counts_it:
                gene_total[column] += count
                gene_cells[column] += 1
            if step > 255:
                far[at_far] = step
                at_far += 1
                step = 0
            if count > 255:
                large[at_large] = count
                at_large += 1
                count = 0
            steps[at] = step
            small[at] = count
            at += 1
        nonzeros[row], n_far[row], n_large[row] = at - first, at_far - first_far, at_large - first_large
        totals[row] = total
    return 0, 0, 0, at, at_far, at_large


@njit(nogil=True, cache=True)
def _count_rows(row_of, dim_0, indptr):
    for coordinate in dim_0:
        row = row_of[coordinate]
        if row >= 0:
            indptr[row + 1] += 1
    for row in range(len(indptr) - 1):
        indptr[row + 1] += indptr[row]


@njit(nogil=True, cache=True)
def _sort_rows(row_of, dim_0, dim_1, values, at, columns, out):
    for k in range(len(dim_0)):
        row = row_of[dim_0[k]]
        if row >= 0:
            columns[at[row]] = dim_1[k]
            out[at[row]] = values[k]
            at[row] += 1
