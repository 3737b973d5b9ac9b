"""Generated cells out: written in parts by any number of processes, joined into one file when all parts are there.

    OUT               h5ad, zarr or a SOMA experiment, as its suffix says. It appears when it is whole
    OUT.parts/        until then
      made_by.json    all that decides what the cells are. A command that would make others is refused
      000017.npz      cells 17 * part_cells and on: CSR arrays, and columns of obs

After a kill the same command makes the parts that are missing. No matrix is ever in memory whole. obs is, at about
100 B a cell, as in every program that opens the file.

Reading order: CellWriter, then the formats.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem, sparse_dataset, write_elem

from data_pipeline.read_cells import LAYER, MEASUREMENT
from scldm.errors import InputError
from scldm.files import (
    disk_explained,
    locked,
    made_aside,
    of_bytes,
    remove_left,
    remove_marked,
    write_json,
    written_aside,
)
from scldm.given_json import read_sealed, sealed
from scldm.hdf5 import hdf5_made
from scldm.progress import Progress

PART_CELLS = 512  # 2,000 genes a cell of 8 B: 8 MB
JOIN_VALUES = 1 << 21  # parts are appended together up to so many values: 16 MB, as COO for SOMA 40 MB
CHUNK_VALUES = 1 << 16
CHUNK_ROWS = 1 << 13  # of obs in zarr, which holds several times the names of a chunk
OBS_BYTES = 100  # of a cell's obs in the file
UNS = "scldm"
N_EVALUATIONS = "n_evaluations"  # of the network
COSTS = (N_EVALUATIONS,)  # in uns beside what decides what the cells are

Append = Callable[[sp.csr_matrix], None]
Obs = Callable[[], pd.DataFrame]
Value = str | int


class CellWriter:
    """Cells numbered from 0, each in one part. Parts may be written in any order by any process, again and again.

    out: a path that ends in .h5ad, .zarr or .soma
    genes: ids of the matrix' columns
    dtype: of the values
    made_by: all that decides what the cells are, JSON texts and numbers. It is uns["scldm"] of the file
    batch: cells that are made at once: a part holds whole batches

    Raises: InputError where `out`, or what an interrupted command left of it, is of another command. Writes nothing.
    """

    def __init__(
        self,
        out: str | Path,
        n_cells: int,
        genes: Sequence[str],
        dtype: type,
        made_by: Mapping[str, Value],
        batch: int = 1,
    ) -> None:
        self.part_cells = -(-PART_CELLS // batch) * batch
        self.out, self.n_cells, self.genes, self.dtype = Path(out), n_cells, list(genes), np.dtype(dtype)
        self.made_by = {"n_cells": n_cells, "n_genes": len(self.genes), **made_by}
        if self.out.suffix not in FORMATS:
            raise InputError(f"out={out} must end in {', '.join(FORMATS)}: that says what is written")
        self.parts = self.out.with_name(self.out.name + ".parts")
        self.finished = self.out.exists()
        if self.finished:
            self._refuse_others(_made_by(self.out), "exists and holds other cells")
        elif (self.parts / "made_by.json").is_file():
            before = read_sealed(dict[str, Any], self.parts / "made_by.json")
            self._refuse_others(before, "is unfinished and of another command", self.parts)
        elif self.parts.exists() and any(of.name != "lock" and of.name[0] != "." for of in self.parts.iterdir()):
            raise InputError(f"{self.parts} is in the way of unfinished cells. Remove it, or choose another out")
        if not self.finished and not (self._folder.is_dir() and os.access(self._folder, os.W_OK)):
            raise InputError(f"out={out}: {self._folder} is no folder that can be written to")
        parts = range(0 if self.finished else self._n_parts)
        self.missing = [part for part in parts if not self._part(part).is_file()]

    def _refuse_others(self, before: Mapping[str, Any], what: str, folder: Path | None = None) -> None:
        was, now = dict(_flat(before)), dict(_flat(self.made_by))
        changed = [key for key in [*now, *(was.keys() - now.keys())] if was.get(key) != now.get(key)]
        if changed:
            told = "; ".join(f"{key} was {_short(was.get(key))}, now {_short(now.get(key))}" for key in changed[:3])
            raise InputError(f"out={self.out} {what}: {told}. Remove {folder or 'it'}, or choose another out")

    def require_space(self, values_a_cell: float) -> None:
        """values_a_cell: those that are stored. One takes 8 B in its part and at most 4 B, compressed, in the file.

        Raises: InputError where the disk has less than the missing parts and the file need.
        """
        free = shutil.disk_usage(self._folder).free + sum(file.stat().st_size for file in _files(self._joining))
        n_missing = sum(len(self.rows(part)) for part in self.missing)
        needed = 8 * values_a_cell * n_missing + (4 * values_a_cell + OBS_BYTES) * self.n_cells
        if needed > free:
            still = "" if n_missing == self.n_cells else f", {n_missing:,} of them still to be made"
            raise InputError(
                f"out={self.out}: about {of_bytes(needed)} are needed for {self.n_cells:,} cells{still}. "
                f"{self._folder} has {of_bytes(free)} free. Ask for fewer cells or genes, or another out"
            )

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Make the folder of parts, and within let no other command write there: for one process, before any writes.

        Raises: InputError where the folder is refused, or another command makes these cells.
        """
        with ExitStack() as stack:
            with disk_explained(str(self.parts)):
                self.parts.mkdir(parents=True, exist_ok=True)
                busy = f"{self.parts}: another process is making these cells. Wait for it, or end it"
                stack.enter_context(locked(self.parts / "lock", busy))
                remove_left(self.parts)
                write_json(self.parts / "made_by.json", sealed(self.made_by))
            yield

    def rows(self, part: int) -> range:
        """The numbers of a part's cells."""
        return range(part * self.part_cells, min((part + 1) * self.part_cells, self.n_cells))

    def write_part(self, part: int, matrix: sp.csr_matrix, columns: Mapping[str, np.ndarray]) -> None:
        """columns: of obs, known only where the cells are made. Raises: InputError where the disk is full."""
        assert matrix.shape == (len(self.rows(part)), len(self.genes)), (matrix.shape, part)
        arrays = {f"obs.{name}": values for name, values in columns.items()}
        with disk_explained(str(self.parts)), written_aside(self._part(part)) as file:
            np.savez(
                file,
                indptr=matrix.indptr.astype(np.int64),
                indices=matrix.indices.astype(np.int32),
                data=matrix.data.astype(self.dtype),
                **arrays,  # pyright: ignore[reportArgumentType]  # numpy's stubs take them for allow_pickle
            )

    def column(self, name: str) -> np.ndarray:
        """A column that came with the parts, of all cells."""
        return np.concatenate([self._read(part, lambda of: of[f"obs.{name}"]) for part in range(self._n_parts)])

    def join(self, obs: Obs, cost: Mapping[str, int]) -> None:
        """Join the parts, and remove them when the file is there: by one process, once every part is written.

        obs: makes them, for no longer than they are needed: they are not in memory while the matrix is written
        cost: what the cells have taken, by COSTS. It goes into uns["scldm"] too
        """
        assert set(cost) <= set(COSTS), cost
        # an AnnData of these obs would hold a copy and a table of their names
        rest = ad.AnnData(var=pd.DataFrame(index=pd.Index(self.genes)), uns={UNS: {**self.made_by, **cost}})
        with (
            disk_explained(str(self.out)),
            made_aside(self.out, at=self._joining) as joined,
            Progress("write", self.n_cells, "cells") as bar,
            FORMATS[self.out.suffix](joined, obs, rest, self.dtype) as append,
        ):
            for matrix in self._joined():
                append(matrix)
                bar.advance(len(matrix.indptr) - 1)
        self.finished = True
        self.remove_parts()

    def remove_parts(self) -> None:
        remove_marked(self.parts, "made_by.json")

    @property
    def _n_parts(self) -> int:
        return -(-self.n_cells // self.part_cells)

    @property
    def _folder(self) -> Path:
        """The nearest that is there."""
        return next(parent for parent in self.out.absolute().parents if parent.exists())

    @property
    def _joining(self) -> Path:
        """The file while it is written, or what a killed process left of it."""
        return self.parts / f"joined{self.out.suffix}"

    def _part(self, part: int) -> Path:
        return self.parts / f"{part:06d}.npz"

    def _joined(self) -> Iterator[sp.csr_matrix]:
        """The cells in order, some parts at a time."""
        held: list[sp.csr_matrix] = []
        for part in range(self._n_parts):
            csr = self._read(part, lambda of: tuple(of[name] for name in ("data", "indices", "indptr")))
            held.append(sp.csr_matrix(csr, shape=(len(self.rows(part)), len(self.genes))))
            if sum(matrix.nnz for matrix in held) >= JOIN_VALUES or part == self._n_parts - 1:
                yield sp.csr_matrix(sp.vstack(held))
                held = []

    def _read(self, part: int, what: Callable[[Any], Any]) -> Any:
        path = self._part(part)
        try:
            with np.load(path) as file:  # its archive holds a CRC of each array
                return what(file)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}). Remove it and run the same command again") from None


def require_room(out: str | Path, n_cells: int) -> None:
    """Raises: InputError for more cells than could be written at all, before there is an array of them. What is written
    already needs no room."""
    if Path(out).exists():
        return
    folder = next(parent for parent in Path(out).absolute().parents if parent.exists())
    needed, free = n_cells * OBS_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"out={out}: at least {of_bytes(needed)} are needed for {n_cells:,} cells. {folder} has {of_bytes(free)} "
            "free. Ask for fewer cells, or another out"
        )


# --- the formats ---------------------------------------------------------------------------------------------------


@contextmanager
def _h5ad(path: Path, obs: Obs, rest: ad.AnnData, dtype: np.dtype) -> Iterator[Append]:
    with hdf5_made(path) as (file, check):
        append = _matrix(file, rest, dtype, {"compression": "gzip", "compression_opts": 1, "shuffle": True})

        def appended(matrix: sp.csr_matrix) -> None:
            append(matrix)
            check()

        yield appended
        write_elem(file, "obs", obs())


@contextmanager
def _zarr(path: Path, obs: Obs, rest: ad.AnnData, dtype: np.dtype) -> Iterator[Append]:
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=2)
    yield _matrix(group, rest, dtype, {})
    write_elem(group, "obs", obs(), dataset_kwargs={"chunks": (CHUNK_ROWS,)})
    zarr.consolidate_metadata(group.store)


def _matrix(group: Any, rest: ad.AnnData, dtype: np.dtype, storage: dict[str, Any]) -> Append:
    """What anndata writes, with an X that grows."""
    write_elem(group, "/", rest)
    if "raw" in group:  # "there is none", of which anndata can't read a part of the file
        del group["raw"]
    empty = sp.csr_matrix((0, rest.n_vars), dtype=dtype)
    how = {"indptr_dtype": np.dtype(np.int64), "chunks": (CHUNK_VALUES,), **storage}
    write_elem(group, "X", empty, dataset_kwargs=how)
    growing: Any = sparse_dataset(group["X"])  # the stubs know its class, which is private, by its base
    return growing.append


@contextmanager
def _soma(path: Path, obs: Obs, rest: ad.AnnData, dtype: np.dtype) -> Iterator[Append]:
    import pyarrow as pa
    import tiledbsoma
    import tiledbsoma.io

    adata = ad.AnnData(obs=obs(), var=pd.DataFrame(index=rest.var_names), uns=rest.uns)
    shape = adata.shape
    tiledbsoma.io.from_anndata(str(path), adata, MEASUREMENT)
    del adata  # before the matrix is written
    with tiledbsoma.Experiment.open(str(path), "w") as experiment:
        measurement: Any = experiment.ms[MEASUREMENT]
        layers = measurement.X if "X" in measurement else measurement.add_new_collection("X")
        with layers.add_new_sparse_ndarray(LAYER, type=pa.from_numpy_dtype(dtype), shape=shape) as array:
            at = 0

            def append(matrix: sp.csr_matrix) -> None:
                nonlocal at
                coo = matrix.tocoo()
                columns = {"soma_dim_0": coo.row.astype(np.int64) + at, "soma_dim_1": coo.col.astype(np.int64)}
                array.write(pa.table({**columns, "soma_data": coo.data}))
                at += len(matrix.indptr) - 1

            yield append


FORMATS: dict[str, Callable[[Path, Obs, ad.AnnData, np.dtype], AbstractContextManager[Append]]] = {
    ".h5ad": _h5ad,
    ".zarr": _zarr,
    ".soma": _soma,
}


def _made_by(out: Path) -> dict[str, Any]:
    """uns["scldm"] of a file. Raises: InputError for a file that has none."""
    try:
        if out.suffix == ".h5ad":
            with h5py.File(out, "r") as file:
                found: Any = read_elem(file[f"uns/{UNS}"])  # pyright: ignore[reportArgumentType]
        elif out.suffix == ".zarr":
            import zarr

            found = read_elem(zarr.open_group(out, mode="r")[f"uns/{UNS}"])
        else:
            import tiledbsoma

            with tiledbsoma.Experiment.open(str(out)) as experiment:
                uns: Any = experiment.ms[MEASUREMENT]["uns"]
                found = {key: value for key, value in uns[UNS].metadata.items() if not key.startswith("soma_")}
        return {k: value if isinstance(value, str) else int(value) for k, value in found.items() if k not in COSTS}
    except Exception as error:  # each library has its own for what is none of its files
        told = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"out={out} exists and is not of this command ({told}). Remove it, or choose another out"
        ) from None


def _flat(made_by: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value), with the dotted keys of what is a JSON object."""
    for key, value in made_by.items():
        inner = value
        if isinstance(value, str) and value.startswith("{"):
            with suppress(ValueError, RecursionError):  # text that only begins so
                inner = json.loads(value)
        if isinstance(inner, dict) and inner:
            yield from ((f"{key}.{name}", of) for name, of in _flat(inner))
        else:
            yield key, inner


def _short(value: Any) -> str:
    return str(value) if len(str(value)) <= 40 else f"{str(value)[:12]}..."


def _files(path: Path) -> list[Path]:
    """A file itself, or all that are in a folder. None where it is not there."""
    return [path] if path.is_file() else [inside for inside in path.rglob("*") if inside.is_file()]
