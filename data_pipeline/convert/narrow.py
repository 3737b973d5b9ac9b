"""Raw rows of a source, checked to be counts and made narrow in one pass.

Reading order: Rows (what sources yield), CountError, narrow_rows, coo_to_rows, the numba kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from data_pipeline.format.block import NarrowCells
from scldm.errors import InputError

FAULTS = ("", "negative", "fractional", "not a number", "infinite", "given twice for the gene", "too large for 64 bits")


@dataclass(frozen=True)
class Rows:
    """Rows of a source's count matrix, CSR, with its own columns and values.

    rows: (n,) row or soma_joinid of each
    indptr: (n + 1,) int64
    columns: (nnz,) any integer dtype, in any order within a row
    values: (nnz,) any numeric dtype. Zeros may be stored
    """

    rows: np.ndarray
    indptr: np.ndarray
    columns: np.ndarray
    values: np.ndarray


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
    """Checked rows.

    cells: over the vocabulary's genes
    n_genes_all: (n,) genes of the source, in the vocabulary or not, with a count
    totals: (n,) uint64, counts over the vocabulary's genes
    """

    cells: NarrowCells
    n_genes_all: np.ndarray
    totals: np.ndarray


def narrow_rows(
    rows: Rows, column_of: np.ndarray, n_genes: int, sums: GeneSums, counted: np.ndarray, min_genes: int = 0
) -> NarrowRows:
    """The rows over the vocabulary, every value checked.

    column_of: source column -> vocabulary column, int32. -1 where the vocabulary lacks the gene
    sums: increased by the rows where `counted` is True and that have at least `min_genes` genes
    Raises: CountError for the first value that is no count.
    """
    n, values = len(rows.rows), rows.values
    if values.dtype == bool or values.dtype == np.float16:
        values = values.astype(np.float32)
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


def check_columns(rows: Rows, n_columns: int, where: str) -> None:
    """Raises: InputError for a column beyond the source's: a kernel would read elsewhere, or crash."""
    if len(rows.columns):
        low, high = rows.columns.min(), rows.columns.max()
        if low < 0 or high >= n_columns:
            column = low if low < 0 else high
            raise InputError(f"{where}: gene column {column} of a matrix with {n_columns} genes: damaged")


Coordinates = tuple[np.ndarray, np.ndarray, np.ndarray]  # row, column and value of each stored value


class RowBuffers:
    """Memory for one chunk's columns and values that is used again for the next: fresh pages cost more than sorting."""

    def __init__(self) -> None:
        self.columns, self.values = np.empty(0, np.int32), np.empty(0, np.float32)

    def take(self, n: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        if n > len(self.columns) or dtype != self.values.dtype:
            self.columns, self.values = np.empty(n + n // 8, np.int32), np.empty(n + n // 8, dtype)
        return self.columns[:n], self.values[:n]


def coo_to_rows(
    rows: np.ndarray, row_of: np.ndarray, low: int, parts: Sequence[Coordinates], buffers: RowBuffers | None = None
) -> Rows:
    """Coordinates in any order as Rows: one counting sort, no lookup per value but an array's.

    rows: the rows that are wanted
    row_of: coordinate minus `low` -> position among `rows`, int32, or -1 where it is not wanted
    buffers: where columns and values are put. The next call overwrites them
    """
    indptr = np.zeros(len(rows) + 1, np.int64)
    for dim_0, _, _ in parts:
        _count_rows(row_of, low, dim_0, indptr)
    np.cumsum(indptr, out=indptr)
    values_dtype = parts[0][2].dtype if parts else np.dtype(np.float32)
    columns, values = (buffers or RowBuffers()).take(int(indptr[-1]), values_dtype)
    at = indptr[:-1].copy()
    for dim_0, dim_1, data in parts:
        _sort_rows(row_of, low, dim_0, dim_1, data, at, columns, values)
    return Rows(rows, indptr, columns, values)


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
    """Position in FAULTS of what is wrong with a value. 0 where it is a count."""
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
    """Returns (fault, row, k, and how much of steps, far, large is filled). `dense` is zeros, and is left so.

    Positions are unsigned: signed ones cost a test for negative indices at every access.
    """
    at, at_far, at_large = np.uint64(0), np.uint64(0), np.uint64(0)
    one = np.uint64(1)
    row_columns, row_counts = np.empty(len(column_of) + 1, np.int32), np.empty(len(column_of) + 1, np.int64)
    for row in range(len(indptr) - 1):
        start, end = np.uint64(indptr[row]), np.uint64(indptr[row + 1])
        if end - start > len(column_of):
            return 5, row, start, at, at_far, at_large
        ascending, before, genes, n = True, np.int32(-1), 0, np.uint64(0)
        for k in range(start, end):
            v = values[k]
            count = np.int64(v)
            if not (v >= 0 and v == count and count >= 0):
                return fault_of(np.float64(v)), row, k, at, at_far, at_large
            column = column_of[np.uint64(columns[k])]
            genes += count > 0
            # written always, kept where it counts: no branch to mispredict
            row_columns[n], row_counts[n] = column, count
            kept = (column >= 0) & (count > 0)
            ascending &= (column > before) | (not kept)
            before = column if kept else before
            n += np.uint64(kept)
        n_all[row] = genes
        if not ascending:
            low, high = row_columns[0], row_columns[0]
            for i in range(n):
                column = np.uint64(row_columns[i])
                if dense[column] != 0:
                    for k in range(start, end):
                        if column_of[np.uint64(columns[k])] == row_columns[i]:
                            return 5, row, k, at, at_far, at_large
                dense[column] = row_counts[i]
                low, high = min(low, row_columns[i]), max(high, row_columns[i])
            n = np.uint64(0)
            for gene in range(np.uint64(low), np.uint64(high) + one):
                row_columns[n], row_counts[n] = gene, dense[gene]
                n += np.uint64(dense[gene] != 0)
                dense[gene] = 0
        if counted[row] and genes >= min_genes:
            for i in range(n):
                gene_total[np.uint64(row_columns[i])] += row_counts[i]
                gene_cells[np.uint64(row_columns[i])] += 1
        first_far, first_large, total = at_far, at_large, np.int64(0)
        before = np.int32(-1)
        for i in range(n):
            step, count = row_columns[i] - before, row_counts[i]
            before = row_columns[i]
            total += count
            if step > 255:
                far[at_far] = step
                at_far += one
                step = 0
            if count > 255:
                large[at_large] = count
                at_large += one
                count = 0
            steps[at] = step
            small[at] = count
            at += one
        nonzeros[row], n_far[row], n_large[row] = n, at_far - first_far, at_large - first_large
        totals[row] = total
    return 0, 0, np.uint64(0), at, at_far, at_large


@njit(nogil=True, cache=True)
def _count_rows(row_of, low, dim_0, counts):
    for coordinate in dim_0:
        row = row_of[coordinate - low]
        if row >= 0:
            counts[row + 1] += 1


@njit(nogil=True, cache=True)
def _sort_rows(row_of, low, dim_0, dim_1, data, at, columns, values):
    """Values come in stretches of one row, so that a row is looked up once a stretch."""
    k, n = np.uint64(0), np.uint64(len(dim_0))
    while k < n:
        coordinate = dim_0[k]
        end = k
        while end < n and dim_0[end] == coordinate:
            end += np.uint64(1)
        row = row_of[coordinate - low]
        if row >= 0:
            to = np.uint64(at[row])
            at[row] += end - k
            for i in range(end - k):
                columns[to + i] = dim_1[k + i]
                values[to + i] = data[k + i]
        k = end
