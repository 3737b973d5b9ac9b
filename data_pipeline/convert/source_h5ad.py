"""AnnData files, h5ad and zarr: which of X, layers and raw holds counts, obs and var, and rows in bounded memory, never
the whole matrix.

Reading order: Candidate and find_counts, open_h5ad_source, H5adMatrix (CSR, dense, CSC).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numba import njit

from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.genes import SourceGenes
from data_pipeline.convert.narrow import FAULTS, Rows, coo_to_rows, fault_of
from data_pipeline.convert.row_filter import matches, where_true
from data_pipeline.convert.source import OpenSource, SourceSpec, size_and_time, spans
from scldm.cells_file import read_column, read_frame, read_names
from scldm.cells_opened import check_columns, frame_of, is_array, layer_in, matrices, no_column, open_cells, reading
from scldm.count_matrix import LOOKED_FOR
from scldm.errors import InputError
from scldm.files import written_aside
from scldm.label_text import as_labels

CHUNK_BYTES = 24 << 20  # larger chunks are no faster: they leave the caches
PROBE = 200_000  # values looked at, in each of three places, to tell counts from anything else
FEW = 0.05  # share of wrong values below which a matrix is counts with faults, not something else


# --- where the counts are ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A matrix of the file, and what a look at its values says.

    name: X, layers/NAME or raw/X
    n_stored: stored values
    first_wrong: the first value that was looked at and is no count, with its cell and gene
    wrong: share of such values
    nonzero: share of the stored values that are kept: of a dense matrix, those that are not zero
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    n_stored: int
    low: float
    high: float
    integral: float
    finite: bool
    first_wrong: str
    wrong: float
    nonzero: float

    @property
    def holds_counts(self) -> bool:
        return self.integral == 1 and self.low >= 0 and self.finite

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.shape[0]} x {self.shape[1]}, {self.dtype}, from {self.low:g} to {self.high:g}, "
            f"{100 * self.integral:.3g} % of its values whole)"
        )


def matrix_shape(node: Any) -> tuple[int, int]:
    shape = node.shape if is_array(node) else node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    if shape is None or len(shape) != 2:
        raise InputError(f"{node.name}: not a matrix")
    return int(shape[0]), int(shape[1])


def _probe(node: Any) -> tuple[int, np.ndarray, np.ndarray]:
    """How many values a matrix stores, those at its beginning, middle and end, and where they are stored."""
    if is_array(node):
        n_rows = max(1, PROBE // max(node.shape[1], 1))
        starts = {0, max(0, (node.shape[0] - n_rows) // 2), max(0, node.shape[0] - n_rows)}
        parts = [(s * node.shape[1], node[s : s + n_rows].ravel()) for s in sorted(starts)]
        return int(np.prod(node.shape)), *_joined(parts)
    data = node["data"]
    n = data.shape[0]
    starts = {0, max(0, (n - PROBE) // 2), max(0, n - PROBE)}
    return n, *_joined([(s, data[s : s + PROBE]) for s in sorted(starts)])


def _joined(parts: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    where = np.concatenate([np.arange(start, start + len(values)) for start, values in parts])
    return np.concatenate([values for _, values in parts]), where


def look_at(file: Any, name: str) -> Candidate:
    """What a matrix of the file holds."""
    node = file[name]
    n_stored, values, where = _probe(node)
    finite = bool(np.isfinite(values).all())
    low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if len(values) else (0.0, 0.0)
    integral = float((values == np.floor(values)).mean()) if len(values) else 1.0
    wrong = np.flatnonzero(~((values >= 0) & (values == np.floor(values)) & np.isfinite(values)))
    first = ""
    if len(wrong):
        value = float(values[wrong[0]])
        first = f"{_place(file, name, int(where[wrong[0]]))}: {value!r} ({FAULTS[fault_of(value)]})"
    return Candidate(
        name, matrix_shape(node), str(values.dtype), n_stored, low, high, integral, finite,
        first, len(wrong) / max(len(values), 1),
        float((values != 0).mean()) if is_array(node) and len(values) else 1.0,
    )  # fmt: skip


def _place(file: Any, name: str, at: int) -> str:
    """The cell and the gene of a stored value."""
    node = file[name]
    if matrix_format(node) == "dense":
        row, column = divmod(at, node.shape[1])
    else:
        row, column = int(np.searchsorted(node["indptr"][:], at, "right")) - 1, int(node["indices"][at])
        if matrix_format(node) == "csc":
            row, column = column, row
    gene = name_at(file.get("raw/var" if name == "raw/X" else "var"), column)
    return f"cell {name_at(file.get('obs'), row)} (row {row}), gene {gene}"


def name_at(frame: Any, k: int) -> str:
    """The k-th name of obs or var, or its number where a broken file has none."""
    try:
        return str(read_names(frame)[k])
    except (AttributeError, IndexError, KeyError, TypeError):
        return str(k)


def find_counts(file: Any, layer: str = "", key: str = "source.layer") -> str:
    """The name of the matrix with the counts: X, layers/NAME or raw/X.

    layer: what the user named (X, raw, raw/X, NAME or layers/NAME), or empty to look in X, layers/counts and raw/X
    key: that names it
    Raises: InputError that lists what each holds, where none or several different ones hold counts.
    """
    path = file.filename
    if layer:
        name = layer_in(file, layer, path, key)
        candidate = look_at(file, name)
        if not candidate.holds_counts:
            raise InputError(f"{path}: {key}={layer!r} does not hold counts: {candidate}: {candidate.first_wrong}")
        return name
    there = matrices(file)
    seen = [look_at(file, n) for n in LOOKED_FOR if n in there]
    counts = [c for c in seen if c.holds_counts]
    others = [n for n in there if n not in {c.name for c in seen}]
    more = f". Also there: {', '.join(others)}" if others else ""
    if not counts:
        # of a few wrong values among counts the first is worth a look. Scaled values are all wrong
        held = "; ".join(f"{c}: {c.first_wrong}" if c.wrong < FEW else str(c) for c in seen) or "neither is there"
        raise InputError(f"{path}: no counts in {', '.join(LOOKED_FOR)}: {held}{more}. Choose another with {key}=NAME")
    if any(not _same(file, counts[0], c) for c in counts[1:]):
        held = "; ".join(map(str, counts))
        raise InputError(f"{path}: several matrices hold counts and differ: {held}{more}. Choose one with {key}=NAME")
    return counts[0].name


def _same(file: Any, a: Candidate, b: Candidate) -> bool:
    if (a.shape, a.n_stored) != (b.shape, b.n_stored):
        return False
    return np.array_equal(_probe(file[a.name])[1], _probe(file[b.name])[1])


# --- for the plan --------------------------------------------------------------------------------------------------


def open_h5ad_source(path: str, config: SourceConfig, columns: tuple[str, ...], missing: str) -> OpenSource:
    """Raises: InputError for a file that is damaged, or lacks what is asked of it."""
    with open_cells(path) as file, reading(path):
        obs_group = frame_of(file, "obs", path)
        frame_of(file, "var", path)
        layer = find_counts(file, config.layer)
        n_rows, n_columns = matrix_shape(file[layer])
        var = read_frame(file["raw/var" if layer == "raw/X" else "var"])
        if config.gene_column and config.gene_column not in var:
            raise no_column(path, config.gene_column, list(var.columns), "var")
        genes = SourceGenes.of(path, var[config.gene_column] if config.gene_column else var.index)
        ids = genes.ids
        barcodes = read_names(obs_group)
        if (len(barcodes), len(ids)) != (n_rows, n_columns):
            raise InputError(f"{path}: {layer} is {n_rows} x {n_columns}, obs x var {len(barcodes)} x {len(ids)}")
        if not barcodes.is_unique:
            twice = barcodes[barcodes.duplicated()][0]
            raise InputError(f"{path}: cell {twice!r} stands twice in obs. Names must be unique within a file")
        check_columns(obs_group, columns, path)
        chosen = np.ones(n_rows, bool)
        if config.obs_filter:
            chosen = matches(read_frame(obs_group), config.obs_filter, path, "source.obs_filter")
        if config.primary_data_only:
            if "is_primary_data" not in obs_group:
                raise InputError(f"{path}: source.primary_data_only: obs has no column is_primary_data")
            primary = read_column(obs_group, "is_primary_data")
            chosen &= where_true(primary, f"{path}: source.primary_data_only: is_primary_data")
        rows = np.flatnonzero(chosen).astype(np.int64)
        obs = pd.DataFrame(index=range(len(rows)))
        for column in columns:
            values = read_column(obs_group, column).iloc[rows].reset_index(drop=True)
            obs[column] = as_labels(values, path, missing)
        keep_gene = np.ones(n_columns, bool)
        if config.var_filter:
            keep_gene = matches(var, config.var_filter, path, "source.var_filter")
        candidate = look_at(file, layer)
        mean_nonzeros = candidate.n_stored * candidate.nonzero / max(n_rows, 1)
    spec = SourceSpec("h5ad", path, layer, n_rows, n_columns, mean_nonzeros, *size_and_time(path))
    report = {"cells_not_selected": n_rows - len(rows), "genes_not_selected": int((~keep_gene).sum())}
    return OpenSource(spec, genes, keep_gene, rows, obs, report)


def matrix_format(node: Any) -> str:
    """csr, csc or dense. Raises: InputError for any other."""
    if is_array(node):
        return "dense"
    encoding = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    if encoding.removesuffix("_matrix") not in ("csr", "csc"):
        raise InputError(f"{node.name} is stored as {encoding!r}. It must be csr, csc or dense")
    return encoding.removesuffix("_matrix")


# --- for the counts ------------------------------------------------------------------------------------------------


class H5adMatrix:
    """A matrix of an h5ad file, by chunks of rows.

    transposed: where `transpose_csc` has put a CSC matrix. Without it, all of a CSC matrix is read for every `read`
    """

    def __init__(self, spec: SourceSpec, transposed: Path | None = None) -> None:
        self.spec = spec
        self.file = open_cells(spec.uri)
        with reading(spec.uri):
            self.node = self.file[spec.layer]
            self.format = matrix_format(self.node)
            if self.format != "dense":
                self.indptr = self.node["indptr"][:].astype(np.int64)
                n = {"csr": spec.n_rows, "csc": spec.n_columns}[self.format]
                stored = min(self.node[name].shape[0] for name in ("data", "indices"))
                if len(self.indptr) != n + 1 or self.indptr[-1] != stored or (np.diff(self.indptr) < 0).any():
                    raise InputError(f"{spec.uri}: {spec.layer}: damaged: indptr, indices and data don't fit")
        self.groups = None if transposed is None else open_transposed(transposed)

    def read(self, rows: np.ndarray, chunk_bytes: int) -> Iterator[Rows]:
        chunk_bytes = min(chunk_bytes // 4, CHUNK_BYTES)
        with reading(self.spec.uri):
            if self.format == "dense":
                yield from self._read_dense(rows, chunk_bytes)
            elif self.format == "csr":
                yield from self._read_csr(rows, chunk_bytes)
            elif self.groups is not None:
                yield from self._read_transposed(rows, chunk_bytes)
            else:
                yield self._scan_csc(rows, chunk_bytes)

    def _read_csr(self, rows: np.ndarray, chunk_bytes: int) -> Iterator[Rows]:
        data, indices = self.node["data"], self.node["indices"]
        value_bytes = data.dtype.itemsize + indices.dtype.itemsize
        start, end = self.indptr[rows], self.indptr[rows + 1]
        for a, b in spans(rows, start, end, chunk_bytes / value_bytes, gap=(1 << 18) / value_bytes):
            columns, values = indices[start[a] : end[b - 1]], data[start[a] : end[b - 1]]
            if b - a < rows[b - 1] + 1 - rows[a]:
                lengths = end[a:b] - start[a:b]
                kept = np.repeat(start[a:b] - start[a] - (np.cumsum(lengths) - lengths), lengths)
                kept += np.arange(len(kept))
                columns, values = columns[kept], values[kept]
            yield Rows(rows[a:b], np.concatenate([[0], np.cumsum(end[a:b] - start[a:b])]), columns, values)

    def _read_dense(self, rows: np.ndarray, chunk_bytes: int) -> Iterator[Rows]:
        width = self.node.shape[1] * self.node.dtype.itemsize
        for a, b in spans(rows, rows, rows + 1, max(chunk_bytes // (2 * width), 1), gap=max((1 << 18) // width, 1)):
            slab = self.node[rows[a] : rows[b - 1] + 1]
            if b - a < len(slab):
                slab = slab[rows[a:b] - rows[a]]
            narrow = slab.dtype in (np.float16, bool)
            slab = slab.astype(np.float32 if narrow else slab.dtype.newbyteorder("="), copy=False)  # as scipy wants it
            csr = sp.csr_matrix(slab)  # what is not 0, row by row
            yield Rows(rows[a:b], csr.indptr.astype(np.int64), csr.indices, csr.data)

    def _read_transposed(self, rows: np.ndarray, chunk_bytes: int) -> Iterator[Rows]:
        assert self.groups is not None
        value_bytes = sum(array.dtype.itemsize for array in self.groups[0][1:])
        totals = np.asarray(np.sum([np.diff(indptr)[rows] for indptr, *_ in self.groups], axis=0, dtype=np.int64))
        end = np.cumsum(totals)
        for a, b in spans(rows, end - totals, end, chunk_bytes / value_bytes, gap=0):
            indptr = np.concatenate([[0], np.cumsum(totals[a:b])])
            columns = np.empty(indptr[-1], self.groups[0][1].dtype)
            values = np.empty(indptr[-1], self.groups[0][2].dtype)
            at = indptr[:-1].copy()
            for group_indptr, group_columns, group_values in self.groups:
                first, last = int(group_indptr[rows[a]]), int(group_indptr[rows[b - 1] + 1])
                starts, ends = group_indptr[rows[a:b]] - first, group_indptr[rows[a:b] + 1] - first
                _append_rows(starts, ends, group_columns[first:last], group_values[first:last], at, columns, values)
            yield Rows(rows[a:b], indptr, columns, values)

    def _scan_csc(self, rows: np.ndarray, chunk_bytes: int) -> Rows:
        row_of = np.full(self.spec.n_rows, -1, np.int32)
        row_of[rows] = np.arange(len(rows), dtype=np.int32)
        found = []
        for low, high in column_groups(self.node, self.indptr, chunk_bytes):
            a, b = self.indptr[low], self.indptr[high]
            where, values = self.node["indices"][a:b], self.node["data"][a:b]
            columns = np.repeat(np.arange(low, high, dtype=np.int32), np.diff(self.indptr[low : high + 1]))
            wanted = row_of[where] >= 0
            found.append((where[wanted], columns[wanted], values[wanted]))
        return coo_to_rows(rows, row_of, 0, found)

    def row_name(self, row: int) -> str:
        with reading(self.spec.uri):
            return f"{name_at(self.file['obs'], row)} (row {row})"

    def close(self) -> None:
        self.file.close()


@njit(nogil=True, cache=True)
def _append_rows(starts, ends, columns, values, at, columns_out, values_out):
    for row in range(len(starts)):
        n = ends[row] - starts[row]
        columns_out[at[row] : at[row] + n] = columns[starts[row] : ends[row]]
        values_out[at[row] : at[row] + n] = values[starts[row] : ends[row]]
        at[row] += n


# --- CSC to CSR ----------------------------------------------------------------------------------------------------


def column_groups(node: Any, indptr: np.ndarray, chunk_bytes: int) -> list[tuple[int, int]]:
    """Ranges of columns of a CSC matrix that take about chunk_bytes each."""
    value_bytes = node["data"].dtype.itemsize + node["indices"].dtype.itemsize
    columns = np.arange(len(indptr) - 1)
    return list(spans(columns, indptr[:-1], indptr[1:], chunk_bytes / value_bytes, gap=0))


def groups_to_transpose(spec: SourceSpec, chunk_bytes: int) -> list[tuple[int, int]]:
    """The column groups of a CSC matrix. None for any other. Transposing one takes about three times chunk_bytes."""
    with open_cells(spec.uri) as file, reading(spec.uri):
        node = file[spec.layer]
        if matrix_format(node) != "csc":
            return []
        return column_groups(node, node["indptr"][:].astype(np.int64), chunk_bytes)


def transpose_csc(spec: SourceSpec, group: tuple[int, int], folder: Path, number: int) -> None:
    """One group of columns as CSR: folder/NNNNN.{columns,values,indptr}.npy, the last one written last."""
    with open_cells(spec.uri) as file, reading(spec.uri):
        node = file[spec.layer]
        indptr = node["indptr"][group[0] : group[1] + 1].astype(np.int64)
        where, values = node["indices"][indptr[0] : indptr[-1]], node["data"][indptr[0] : indptr[-1]]
    if len(where) and (where.min() < 0 or where.max() >= spec.n_rows):
        raise InputError(f"{spec.uri}: {spec.layer}: a row number is out of range: damaged")
    columns = np.repeat(np.arange(group[0], group[1], dtype=np.int32), np.diff(indptr))
    every = np.arange(spec.n_rows, dtype=np.int32)
    rows = coo_to_rows(every, every, 0, [(where, columns, values)])
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("columns", rows.columns), ("values", rows.values), ("indptr", rows.indptr)):
        with written_aside(folder / f"{number:05d}.{name}.npy") as out:
            np.save(out, array)


def open_transposed(folder: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """indptr, columns, values of every group, memory-mapped."""
    numbers = sorted(path.name.split(".")[0] for path in folder.glob("*.indptr.npy"))
    names = ("indptr", "columns", "values")
    return [tuple(np.load(folder / f"{n}.{name}.npy", mmap_mode="r") for name in names) for n in numbers]
