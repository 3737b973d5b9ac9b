"""AnnData on the disk, as anndata 0.7 to 0.13 lay it out in h5ad and zarr. It is opened, read by parts or whole, and
made such that every anndata can write and read it.

Reading order: open_cells, reading, parts of a file, cells_in_file, storable, before a file is written, write_cells.
"""

from __future__ import annotations

import os
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

from scldm.errors import InputError
from scldm.hdf5 import hdf5_made

IN_MEMORY = ("obs", "var", "obsm", "varm", "obsp", "varp", "uns")  # parts of an AnnData that are read with its tables
CHUNK_NUMBERS = 1 << 17  # whole rows, of a chunk of a copied matrix: 1 MB
COPIED_NUMBERS = 1 << 22  # at once, of a matrix of a file: 4 M x 8 B = 32 MB
ZARR_MARKS = ("zarr.json", ".zgroup", ".zmetadata")  # of version 3, and of version 2


# --- open ----------------------------------------------------------------------------------------------------------


def is_zarr(path: str | Path) -> bool:
    """Whether a zarr store lies in a folder."""
    return any((Path(path) / mark).is_file() for mark in ZARR_MARKS)


def is_cells_file(path: str | Path) -> bool:
    """Whether a path is, or by its name would be, a file of cells and no SOMA experiment."""
    endings = (".h5ad", ".h5", ".zarr", ".loom", ".mtx", ".mtx.gz", ".csv", ".tsv", ".txt")
    return str(path).rstrip("/").endswith(endings) or Path(path).is_file() or is_zarr(path) or _is_mtx(path)


def _is_mtx(path: str | Path) -> bool:
    return any(Path(path).glob("*matrix.mtx*")) if Path(path).is_dir() else ".mtx" in Path(path).suffixes


class ZarrFile:
    """A zarr group that is opened, read and closed as an h5py.File."""

    def __init__(self, group: Any, path: str | Path) -> None:
        self.group, self.attrs, self.filename = group, group.attrs, str(path)

    def __getitem__(self, name: str) -> Any:
        return self.group[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.group.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self.group

    def __iter__(self) -> Iterator[str]:
        return iter(self.group)

    def __enter__(self) -> ZarrFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.group.store.close()


def open_cells(path: str | Path) -> Any:
    """An h5py.File or a ZarrFile, to read. Typed Any, as h5py's stubs make a union of every node.

    Raises: InputError for what is not there, is none, is locked by a writer, or is a format that scanpy reads.
    """
    if is_zarr(path):
        import zarr  # anndata brings it

        with reading(path):
            return ZarrFile(zarr.open_group(str(path), mode="r"), path)
    if not Path(path).exists():
        raise InputError(f"{path}: no such file")
    if convert := _by_scanpy(Path(path)):
        raise InputError(f"{path}: {convert}")
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder, and no zarr store. An AnnData file ends in .h5ad or .zarr")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        text = str(error)
        if "unable to lock" in text:
            raise InputError(f"{path}: locked: another process has it open for writing. Wait for it to close") from None
        why = "truncated" if "truncated" in text else "not an HDF5 file, damaged, or not permitted to be read"
        raise InputError(f"{path}: can't be opened: {why}") from None
    if "obs" not in file and "matrix" in file:
        file.close()
        raise InputError(f"{path}: {_told('a 10x file', 'read_10x_h5', Path(path))}")
    return file


def _by_scanpy(path: Path) -> str:
    """What to type where another library reads a format. Empty for h5ad."""
    if path.name.endswith(".loom"):
        return _told("a loom file", "read_loom", path, "anndata.io")
    if _is_mtx(path):
        return _told("10x matrices", "read_10x_mtx", path if path.is_dir() else path.parent)
    if path.suffix in (".csv", ".tsv", ".txt"):
        return _told("a table", "read_csv", path)
    return ""


def _told(what: str, function: str, path: Path, module: str = "scanpy") -> str:
    code = f"import {module} as r; a = r.{function}({str(path)!r}); a.var_names_make_unique(); "
    return f'{what}, no AnnData file. Write one: python -c "{code}a.write_h5ad({str(path.with_suffix(".h5ad"))!r})"'


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what the libraries say about a damaged file into one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: can't be read: damaged or truncated ({why})") from None
    except Exception as error:  # anndata has a class for elements that it does not know
        if "anndata" not in type(error).__module__:
            raise
        raise InputError(f"{path}: can't be read: {str(error).splitlines()[0]}") from None


# --- parts of a file -----------------------------------------------------------------------------------------------


def is_array(node: Any) -> bool:
    """Whether a node of h5ad or zarr is an array, not a group."""
    return hasattr(node, "shape")


def frame_of(file: Any, name: str, path: str | Path) -> Any:
    """The group of obs, var or raw/var. Raises: InputError for a layout that nothing reads any more."""
    if name not in file:
        raise InputError(f"{path}: not an AnnData file: it has no {name}")
    if is_array(file[name]):
        raise InputError(f"{path}: its layout is that of anndata before 0.7. Read and write it with a newer one")
    return file[name]


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


def column_names(group: Any) -> list[str]:
    """The columns of obs or var."""
    index = group.attrs.get("_index", "")
    return [str(n) for n in group.attrs.get("column-order", [k for k in group if k not in (index, "__categories")])]


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
        for name in columns:
            if name not in obs:
                raise InputError(f"{path}: obs has no column {name!r}. It has {', '.join(column_names(obs)) or 'none'}")
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
    for name in out.columns:
        values = pd.Series(out[name])
        if isinstance(values.dtype, pd.StringDtype):
            values = values.astype("category") if values.isna().any() else values.astype(object)
        if isinstance(values.dtype, pd.CategoricalDtype) and isinstance(values.cat.categories.dtype, pd.StringDtype):
            values = values.cat.rename_categories(values.cat.categories.astype(object))
        out[name] = values
    return out


def check_out(out: str | Path, endings: Sequence[str], **inputs: str) -> None:
    """Raises: InputError for a file to write that is an input, has another ending, or whose folder can't be written.

    inputs: by their keys
    """
    path = Path(out)
    if path.suffix not in endings:
        raise InputError(f"out={out} must end in {', '.join(endings)}: that says what is written")
    for key, given in inputs.items():
        if given and path.resolve() == Path(given).resolve():
            raise InputError(f"out={out} is {key}={given}, which would be lost. Choose another out")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"out={out}: {path if path.is_dir() else folder} can't be written to")


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
