"""Counts are read alike wherever they lie, and never more of them at once than a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scldm import count_matrix as module
from scldm.cells_file import cells_in_file
from scldm.count_matrix import Damaged, count_matrix, in_memory, row_blocks, rows_in_memory, table_in_memory
from scldm.errors import InputError

COUNTS = sp.csr_matrix(np.random.default_rng(0).poisson(0.5, (25, 6)).astype(np.float32))
ROWS = np.array([0, 3, 4, 11, 24])


class Lazy:
    """A matrix as dask has them: a slice is computed when it is asked for."""

    def __init__(self, matrix: sp.csr_matrix, seen: list[int]) -> None:
        self.matrix, self.seen, self.shape = matrix, seen, matrix.shape

    def __getitem__(self, rows: slice) -> Lazy:
        return Lazy(self.matrix[rows], self.seen)

    def compute(self) -> sp.csr_matrix:
        self.seen.append(self.matrix.shape[0])
        return self.matrix


@pytest.fixture(params=["memory", "dense", "csr", "csc", "array", "lazy"])
def matrix(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The counts in memory, in a file, or lazy."""
    monkeypatch.setattr(module, "FILE_ROWS", 4)
    if request.param in ("memory", "dense"):
        yield COUNTS if request.param == "memory" else COUNTS.toarray()
        return
    if request.param == "lazy":
        yield Lazy(COUNTS, [])
        return
    written = {"csr": COUNTS, "csc": COUNTS.tocsc(), "array": COUNTS.toarray()}[request.param]
    ad.AnnData(written).write_h5ad(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    yield adata.X
    adata.file.close()


def test_counts_are_the_same_wherever_they_lie(matrix: Any) -> None:
    assert (sp.vstack(list(row_blocks(matrix))) != COUNTS).nnz == 0
    assert (sp.csr_matrix(in_memory(matrix)) != COUNTS).nnz == 0
    assert (rows_in_memory(matrix, ROWS) != COUNTS[ROWS]).nnz == 0
    assert rows_in_memory(matrix, ROWS[:0]).shape == (0, 6)
    if isinstance(matrix, Lazy):
        assert matrix.seen == [*[4] * 6, 1, 25, *[4] * 6, 1, *[4] * 6, 1]


def test_a_file_is_read_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_ROWS", 10)
    ad.AnnData(COUNTS).write_h5ad(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert [block.shape[0] for block in row_blocks(count_matrix(adata).matrix)] == [10, 10, 5]
    assert [block.shape[0] for block in row_blocks(count_matrix(adata).matrix, 4)] == [8, 8, 8, 1]
    assert [block.shape[0] for block in row_blocks(count_matrix(adata).matrix, 12)] == [12, 12, 1]
    adata.file.close()


def test_a_lazy_table_is_read() -> None:
    class Table:
        def to_memory(self) -> pd.DataFrame:
            return pd.DataFrame({"a": [1]})

    assert table_in_memory(Table()).equals(table_in_memory(pd.DataFrame({"a": [1]})))


def read_from(path: Path, way: str) -> None:
    if way == "file":
        with cells_in_file(path) as adata:
            list(row_blocks(count_matrix(adata).matrix))
    else:
        adata = ad.read_h5ad(path, backed="r")
        list(row_blocks(count_matrix(adata[::2] if way == "view of a file" else adata).matrix))


# which array of a sparse matrix, where, the number there
HARMS = {
    "indices": [("indices", 3, -5), ("indices", 3, 6), ("indices", 3, 10**6)],
    "indptr": [("indptr", 5, -7), ("indptr", 5, 10**6), ("indptr", 5, COUNTS.indptr[7] + 1), ("indptr", -1, 10**6)],
}


@pytest.mark.parametrize("way", ["memory", "by columns", "backed", "view of a file", "file"])
@pytest.mark.parametrize("array, at, number", [*HARMS["indices"], *HARMS["indptr"]])
def test_a_matrix_that_can_not_be_is_refused(tmp_path: Path, way: str, array: str, at: int, number: int) -> None:
    """scipy would look up other memory: a crash, or counts of another gene."""
    whole = COUNTS.tocsc() if way == "by columns" else COUNTS
    path = tmp_path / "cells.h5ad"
    ad.AnnData(whole.copy()).write_h5ad(path)
    number = 26 if (way, number) == ("by columns", 6) else number
    if way == "memory":
        adata = ad.AnnData(whole.copy())
        getattr(adata.X, array)[at] = number
        with pytest.raises(Damaged, match="X is damaged: it"):
            count_matrix(adata)
        return
    with h5py.File(path, "r+") as file:
        file[f"X/{array}"][at] = number
    with pytest.raises(InputError, match=r"damaged"):
        read_from(path, way)


@pytest.mark.parametrize("kind", [np.float16, object, "U3", complex])
def test_counts_are_numbers(kind: Any) -> None:
    adata = ad.AnnData(COUNTS.toarray().astype(kind))
    if kind is np.float16:
        assert np.array_equal(next(row_blocks(count_matrix(adata).matrix)).toarray(), COUNTS.toarray())
    else:
        with pytest.raises(InputError, match=r"counts are of type .*\. They must be numbers"):
            count_matrix(adata)
