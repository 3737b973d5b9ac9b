"""AnnData on the disk, as anndata 0.7 to 0.13 lay it out in h5ad and zarr. It is read by parts or whole, and made such
that every anndata can write and read it. It is opened in cells_opened.py.

Reading order: parts of a file, cells_in_file, storable, before a file is written, write_cells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset
from anndata.experimental import write_dispatched
from anndata.io import read_elem, sparse_dataset, write_elem

from scldm.cells_opened import check_columns, frame_of, is_array, open_cells, reading
from scldm.count_matrix import Damaged
from scldm.errors import InputError
from scldm.hdf5 import hdf5_made

IN_MEMORY = ("obs", "var", "obsm", "varm", "obsp", "varp", "uns")  # parts of an AnnData that are read with its tables
CHUNK_NUMBERS = 1 << 17  # whole rows, of a chunk of a copied matrix: 1 MB
COPIED_NUMBERS = 1 << 22  # at once, of a matrix of a file: 4 M x 8 B = 32 MB


# --- parts of a file -----------------------------------------------------------------------------------------------


def read_frame(group: Any) -> pd.DataFrame:
    """obs or var."""
    frame = read_elem(group)
    assert isinstance(frame, pd.DataFrame)
    return frame


def read_names(group: Any) -> pd.Index:
    """The index of obs or var, as text."""
    names: Any = read_elem(group[group.attrs["_index"]])
    return pd.Index([_name(name) for name in names], dtype=object)


def _name(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def read_column(group: Any, name: str) -> pd.Series:
    """One column of obs. Files of anndata 0.7 keep a categorical's labels beside its codes, which alone are numbers."""
    node: Any = group[name]
    if is_array(node) and "categories" in node.attrs:
        beside = node.attrs["categories"]
        stored: Any = group[beside] if isinstance(beside, str) else node.file[beside]  # zarr names, HDF5 refers
        labels = pd.Index([_name(v) if isinstance(v, bytes | str) else v for v in stored[:]])
        return pd.Series(pd.Categorical.from_codes(node[:], labels), name=name)
    return pd.Series(read_elem(node), name=name)


def read_obs(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of obs, without the counts and without the names. Raises: InputError for one that is not there."""
    with open_cells(path) as file, reading(path):
        obs = frame_of(file, "obs", path)
        check_columns(obs, columns, path)
        return pd.DataFrame({name: read_column(obs, name).array for name in columns})


# --- whole files ---------------------------------------------------------------------------------------------------


@contextmanager
def cells_in_file(path: str | Path) -> Iterator[ad.AnnData]:
    """An h5ad or zarr file, storable. It is open within: X, layers and raw.X stay there, and are read by whoever asks
    for rows of them. The rest is in memory. Raises: InputError where it can't be read."""
    with open_cells(path) as file:
        frame_of(file, "obs", path)
        with reading(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(Variable|Observation) names are not unique")
            warnings.simplefilter("ignore", PendingDeprecationWarning)  # of layouts that it reads all the same
            parts: dict[str, Any] = {name: read_elem(file[name]) for name in IN_MEMORY if name in file}
            layers = {name: _matrix(file["layers"][name]) for name in file.get("layers", ())}
            adata = ad.AnnData(_matrix(file.get("X")), layers=layers, **parts)
            if "raw" in file and not is_array(raw := file["raw"]):  # zarr has an array for none
                obs = pd.DataFrame(index=adata.obs_names)
                of_genes: dict[str, Any] = {name: read_elem(raw[name]) for name in ("var", "varm") if name in raw}
                adata.raw = ad.AnnData(_matrix(raw["X"]), obs=obs, **of_genes)
            made_storable(adata)
        try:
            yield adata
        except Damaged as error:
            raise InputError(f"{path}: {error}") from None
        except (OSError, RuntimeError) as error:
            if not any(of_damage in str(error) for of_damage in ("read data", "decompress")):  # of HDF5, and of zarr
                raise
            raise InputError(f"{path}: can't be read: damaged or truncated ({str(error).splitlines()[0]})") from None


def _matrix(node: Any) -> Any:
    """A matrix that is read when rows of it are asked for. None where there is none. Raises: ValueError."""
    if node is None or node.attrs.get("encoding-type") == "null":
        return None
    if is_array(node):
        return node
    places, values = (node[name].shape[0] for name in ("indices", "data"))
    told = int(node["indptr"][-1]) if node["indptr"].shape[0] else 0
    if places != values or told > values:  # more than are in use is allowed
        raise ValueError(f"{node.name} has {places} places and {values} values, indptr tells of {told}")
    return sparse_dataset(node)


def made_storable(adata: ad.AnnData) -> ad.AnnData:
    """The same AnnData, whose tables are storable from here on."""
    adata.obs, adata.var = storable(pd.DataFrame(adata.obs)), storable(pd.DataFrame(adata.var))
    for of in (adata.obsm, adata.varm):
        for key, value in list(of.items()):
            if isinstance(value, pd.DataFrame):
                of[key] = storable(value)
    if adata.raw is not None:
        raw: Any = adata.raw
        obs = pd.DataFrame(index=adata.obs_names)
        adata.raw = ad.AnnData(raw.X, obs=obs, var=storable(pd.DataFrame(raw.var)), varm=dict(raw.varm))
    return adata


def storable(table: pd.DataFrame) -> pd.DataFrame:
    """A table without pandas' nullable strings, which anndata writes since 0.12 alone and only when asked to. Names
    and columns are plain strings, or categories where values are missing."""
    out = table.copy(deep=False)
    out.index = pd.Index(out.index.astype(str).astype(object), name=out.index.name)
    if len(twice := out.columns[out.columns.duplicated()]):
        raise InputError(f"column {str(twice[0])!r} of the cells or genes stands twice. Rename one")
    for name in out.columns:
        values = pd.Series(out[name])
        if isinstance(values.dtype, pd.StringDtype):
            values = values.astype("category") if values.isna().any() else values.astype(object)
        if isinstance(values.dtype, pd.CategoricalDtype) and isinstance(values.cat.categories.dtype, pd.StringDtype):
            values = values.cat.rename_categories(values.cat.categories.astype(object))
        out[name] = values
    return out


def check_storable(adata: ad.AnnData, where: str) -> None:
    """Try what an anndata may refuse to write, in memory, before anything is computed: all but the large arrays.

    Raises: InputError that names the element.
    """
    parts = {"obs": adata.obs, "var": adata.var, "uns": dict(adata.uns)}
    for of in ("obsm", "varm"):
        parts |= {f"{of}/{k}": v for k, v in getattr(adata, of).items() if isinstance(v, pd.DataFrame)}
    if adata.raw is not None:
        parts["raw/var"] = adata.raw.var
    with h5py.File("tried", "w", driver="core", backing_store=False) as file:
        for name, part in parts.items():
            try:
                write_elem(file, name, part)
            except Exception as error:  # anndata, h5py and pandas each have their own
                why = str(error).splitlines()[0]
                raise InputError(f"{where}: {name} can't be written ({why}). Change or remove it") from None


# --- written -------------------------------------------------------------------------------------------------------


def write_cells(adata: ad.AnnData, path: Path, compression: str | None = "gzip") -> None:
    """Write an h5ad file. Matrices are written some numbers at a time, those that lie in another file too.

    Raises: OSError of a disk that becomes full.
    """
    adata.strings_to_categoricals()
    if adata.raw is not None:
        adata.strings_to_categoricals(pd.DataFrame(adata.raw.var))
    with hdf5_made(path) as (file, check):
        write = cast(Any, partial(_write, check))
        write_dispatched(file, "/", adata, write, dataset_kwargs={"compression": compression})


def _write(
    check: Callable[[], None], write: Any, store: Any, elem_name: str, elem: Any, *, dataset_kwargs: Any, iospec: Any
) -> None:
    """Write one element of an AnnData. anndata calls this for each, by these names.

    check: asks whether it reached the disk
    """
    check()
    if elem is None and elem_name.strip("/") == "raw":  # as `AnnData.write_h5ad`. Before anndata 0.12 nobody reads it
        return
    if isinstance(elem, CSRDataset | CSCDataset | sp.csr_matrix | sp.csc_matrix | sp.csr_array | sp.csc_array):
        made = store.create_group(elem_name)
        made.attrs["shape"] = elem.shape
        for name in ("data", "indices", "indptr"):
            part = getattr(elem, name) if sp.issparse(elem) else cast(Any, elem).group[name]
            _copy(part, made, name, dataset_kwargs, check)
    elif (hasattr(elem, "chunks") and hasattr(elem, "attrs")) or _is_large(elem):  # an array of HDF5 or zarr, or such
        made = _copy(elem, store, elem_name, dataset_kwargs, check)
    else:
        write(store, elem_name, elem, dataset_kwargs=dataset_kwargs)
        return
    made.attrs["encoding-type"], made.attrs["encoding-version"] = iospec.encoding_type, iospec.encoding_version


def _is_large(elem: Any) -> bool:
    return isinstance(elem, np.ndarray) and elem.dtype.kind in "biuf" and elem.size > COPIED_NUMBERS


def _copy(source: Any, group: Any, name: str, how: dict[str, Any], check: Callable[[], None]) -> Any:
    width = max(int(np.prod(source.shape[1:])), 1)
    of_chunk = max(min(CHUNK_NUMBERS // width, source.shape[0]), 1)
    chunks = (of_chunk, *source.shape[1:]) if all(source.shape) else True
    most = (None,) if len(source.shape) == 1 else None  # of a sparse matrix, to which rows may be appended
    made = group.create_dataset(name, shape=source.shape, dtype=source.dtype, chunks=chunks, maxshape=most, **how)
    step = max(COPIED_NUMBERS // width // of_chunk, 1) * of_chunk  # whole chunks, each of which is packed once
    for start in range(0, source.shape[0], step):
        made[start : start + step] = source[start : start + step]
        check()
    return made
