"""Which matrix of an AnnData, or of its file, holds raw counts: X, a layer or raw. Its cells may be in memory, in a
file (anndata's backed="r") or lazy (anndata.experimental.read_lazy), and are read some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scldm.cells_opened import matrix_name
from scldm.errors import InputError

LOOKED_FOR = ("X", "layers/counts", "raw/X")
FILE_ROWS = 4096  # of a file, read at once: 4,096 cells x 60,000 genes x 4 B = 1 GB where it is dense
PROBE_ROWS = 100  # cells looked at, in each of three places, to tell counts from anything else


class Damaged(InputError):
    """A matrix that can't be: reading it would read other memory."""


@dataclass(frozen=True)
class CountMatrix:
    """name: X, layers/NAME or raw/X
    matrix: (n, its genes), as the AnnData has it
    genes: (its genes) names"""

    name: str
    matrix: Any
    genes: list[str]


def count_matrix(adata: ad.AnnData, layer: str | None = None, what: str = "the cells") -> CountMatrix:
    """The matrix that is named, or that holds counts, by a look at some cells: whoever reads it all checks all.

    layer: X, raw, raw/X, NAME or layers/NAME. Without one, it looks in X, layers/counts and raw/X
    what: names the cells in errors

    Raises: InputError for a layer that is not there, for no counts, and for counts in several that differ.
    """
    check_adata(adata)
    there = _matrices(adata)
    if layer is not None and not isinstance(layer, str):
        raise InputError(f"layer={layer!r} must be the name of one layer, as layer='counts'")
    if layer:
        name = matrix_name(layer, there)
        if name not in there:
            raise InputError(f"{what}: layer {layer!r} is not there. There are {', '.join(there) or 'none'}")
        return _found(adata, name, there)
    looks = {name: _values(sound(there[name], name)) for name in LOOKED_FOR if name in there}
    counts = [name for name, values in looks.items() if not len(_wrong(values))]
    if not counts:
        held = "; ".join(f"{name} holds {_wrong(values)[0]:g}, which is not a count" for name, values in looks.items())
        raise InputError(f"{what}: {held or 'X is empty'}. Give raw counts, or name their layer (layer=NAME)")
    first = counts[0]
    for name in counts[1:]:
        if there[name].shape != there[first].shape or not np.array_equal(looks[name], looks[first]):
            raise InputError(f"{what}: {first} and {name} hold counts and differ. Name one, as layer={first}")
    return _found(adata, first, there)


def check_adata(adata: Any, name: str = "adata") -> None:
    """Raises: InputError for what is none, and for none of a cell."""
    if not isinstance(adata, ad.AnnData):
        raise InputError(f"{name} is of type {type(adata).__name__}. It must be an AnnData, as anndata.read_h5ad gives")
    if adata.n_obs == 0:
        raise InputError("there are no cells" if name == "adata" else f"{name}: there are no cells")


def _matrices(adata: ad.AnnData) -> dict[str, Any]:
    there = {} if (x := x_of(adata)) is None else {"X": x}
    there |= {f"layers/{name}": matrix for name, matrix in adata.layers.items()}
    return there if adata.raw is None else there | {"raw/X": adata.raw.X}


def _found(adata: ad.AnnData, name: str, there: dict[str, Any]) -> CountMatrix:
    of = adata.raw if name == "raw/X" else adata
    return CountMatrix(name, sound(there[name], name), list(map(str, of.var_names)))


def _values(matrix: Any) -> np.ndarray:
    """Stored values, other than 0, of cells at the beginning, in the middle and at the end."""
    n = matrix.shape[0]
    starts = sorted({0, max(0, (n - PROBE_ROWS) // 2), max(0, n - PROBE_ROWS)})
    matrix = in_memory(matrix) if _by_columns(matrix) else matrix
    parts = [_rows(matrix, start, start + PROBE_ROWS) for start in starts]
    for part in parts:
        part.eliminate_zeros()
        part.sort_indices()
    return np.concatenate([part.data for part in parts])


def _rows(matrix: Any, start: int, stop: int) -> sp.csr_matrix:
    def read() -> Any:
        part = matrix[start:stop]
        return part.compute() if hasattr(part, "compute") else part

    return _csr(_read(read))


def _read(read: Callable[[], Any]) -> Any:
    """A sound part of a matrix in a file. Raises: Damaged."""
    try:
        part = read()
    except InputError:
        raise
    except (ValueError, IndexError) as error:  # of anndata and scipy, which look at some of it
        raise Damaged(f"the matrix is damaged: {error}") from None
    return sound(part)


def _csr(matrix: Any) -> sp.csr_matrix:
    if matrix.dtype.kind not in "biuf":
        raise InputError(f"counts are of type {matrix.dtype}. They must be numbers")
    return sp.csr_matrix(matrix.astype(np.float32) if matrix.dtype == np.float16 else matrix)


def sound(matrix: Any, name: str = "the matrix") -> Any:
    """The same matrix. Of one in a file, only where its rows begin is looked at.

    Raises: Damaged for places outside of a sparse one, which scipy would look up all the same.
    """
    if getattr(matrix, "format", "") not in ("csr", "csc"):
        return matrix
    in_file = getattr(getattr(matrix, "matrix", matrix), "group", None)
    ends = matrix.indptr if in_file is None else in_file["indptr"][:]
    if (ends[1:] < ends[:-1]).any():
        raise Damaged(f"{name} is damaged: its indptr falls")
    if in_file is not None:
        return matrix
    places = matrix.indices
    n, n_places = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    n_stored = min(len(places), len(matrix.data))
    if len(ends) != n + 1 or ends[0] != 0 or ends[-1] > n_stored:
        raise Damaged(f"{name} is damaged: its indptr does not fit its {n_stored} values")
    used = places[: ends[-1]]
    if len(used) and not (0 <= used.min() and used.max() < n_places):
        wrong = used[(used < 0) | (used >= n_places)][0]
        kind = "gene column" if matrix.format == "csr" else "row"
        raise Damaged(f"{name} is damaged: it has {kind} {wrong} of {n_places}")
    return matrix


class _ViewOfFile:
    """X of a view of cells in a file, read by rows. anndata reads all of a view."""

    def __init__(self, matrix: Any, row_n: np.ndarray, column_n: np.ndarray) -> None:
        self.matrix, self.row_n, self.column_n = matrix, row_n, column_n
        self.shape, self.format = (len(row_n), len(column_n)), getattr(matrix, "format", "")

    def __getitem__(self, rows: slice) -> Any:
        at_n, of_row = np.unique(self.row_n[rows], return_inverse=True)  # HDF5 reads in ascending order
        return _csr(_read(lambda: self.matrix[at_n]))[of_row][:, self.column_n]

    def to_memory(self) -> Any:
        return _read(self.matrix.to_memory)[self.row_n][:, self.column_n]


def x_of(adata: Any) -> Any:
    """X of an AnnData. None where there is none. It is not read where it lies in a file."""
    try:
        if adata.is_view and not is_in_memory(whole := adata._adata_ref.X) and not hasattr(whole, "compute"):
            return _ViewOfFile(whole, *(np.arange(n)[at] for n, at in zip(whole.shape, (adata._oidx, adata._vidx))))
        return adata.X
    except KeyError:  # a file without X, which anndata looks for when it is asked
        return None


def row_blocks(matrix: Any, batch: int = 1) -> Iterator[sp.csr_matrix]:
    """The matrix by rows, some at a time where it is not in memory. One in a file by columns (CSC) is read whole: a few
    rows of it cost as much as all.

    batch: each block has a multiple of so many rows, but for the last
    """
    if is_in_memory(matrix):
        yield _csr(sound(matrix))
    elif _by_columns(matrix):
        yield _csr(in_memory(matrix))
    else:
        step = max(FILE_ROWS // batch, 1) * batch
        for start in range(0, matrix.shape[0], step):
            yield _rows(matrix, start, start + step)


def _by_columns(matrix: Any) -> bool:
    """Whether a matrix that is not in memory is CSC. A lazy one (dask) says so of its parts."""
    return getattr(matrix, "format", getattr(getattr(matrix, "_meta", None), "format", "")) == "csc"


def rows_in_memory(matrix: Any, rows: np.ndarray) -> sp.csr_matrix:
    """Some rows, in ascending order, of a matrix wherever it lies."""
    if is_in_memory(matrix):
        return _csr(sound(matrix)[rows])
    parts, start = [], 0
    block: Any  # scipy's stubs give no shape
    for block in row_blocks(matrix):
        first, last = np.searchsorted(rows, [start, start + block.shape[0]])
        parts.append(block[rows[first:last] - start])
        start += block.shape[0]
    return sp.csr_matrix(sp.vstack(parts))


def is_in_memory(matrix: Any) -> bool:
    return matrix is None or sp.issparse(matrix) or isinstance(matrix, np.ndarray)


def in_memory(matrix: Any) -> Any:
    """The whole matrix, of the kind that it is: sparse or dense."""
    if is_in_memory(matrix):
        return sound(matrix)
    read = getattr(matrix, "to_memory", getattr(matrix, "compute", None))
    return _read(read or (lambda: matrix[:]))


def table_in_memory(table: Any) -> pd.DataFrame:
    """obs or var, which a lazy AnnData has as an xarray."""
    return pd.DataFrame(table.to_memory() if hasattr(table, "to_memory") else table)


def _wrong(values: np.ndarray) -> np.ndarray:
    return values[~((values >= 0) & (values == np.rint(values)) & np.isfinite(values))]
