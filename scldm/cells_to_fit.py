"""The cells that `scldm.fit` is given: what is wrong with them, a file of what training needs, and what tells them
apart."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

from scldm.cells_file import check_storable, made_storable, read_frame, read_names, write_cells
from scldm.cells_opened import frame_of, open_cells, reading
from scldm.count_matrix import FILE_ROWS, row_blocks, table_in_memory, x_of
from scldm.errors import InputError
from scldm.files import made_aside
from scldm.label_text import texts

if TYPE_CHECKING:
    from data_pipeline.convert.config import ShardsWriteConfig

Tables = tuple[pd.DataFrame, pd.DataFrame]  # obs and var

SPLIT = "scldm_split"  # the obs column that says which cells were trained on


def path_of(adata: Any, conditions: tuple[str, ...]) -> Path | None:
    """The file with the cells, or None where they are in memory. Raises: InputError for what are no cells, or an obs
    without these columns."""
    if isinstance(adata, ad.AnnData):
        if adata.isbacked and adata.is_view:
            raise InputError(
                f'adata is a view of a file, whose obs can\'t get the column "{SPLIT}". Give adata.to_memory()'
            )
        for name in conditions:
            if name not in adata.obs:
                there = ", ".join(map(str, adata.obs.columns)) or "none"
                raise InputError(f"conditions: adata.obs has no column {name!r}. It has {there}")
        return None
    if not isinstance(adata, str | os.PathLike):
        raise InputError(f"adata is of type {type(adata).__name__}. It must be an AnnData, or the path of an h5ad file")
    path = Path(adata)
    with open_cells(path) as file:  # which says what it is, if it is no such file
        frame_of(file, "obs", path)
    return path.resolve()


def n_cells_in(path: Path) -> int:
    with open_cells(path) as file, reading(path):
        return len(read_names(frame_of(file, "obs", path)))


def tables_of(adata: ad.AnnData, config: ShardsWriteConfig) -> Tables:
    """obs and var, with those columns that are asked for. Raises: InputError for one that is not there, stands twice or
    is `fit`'s own, and for names and labels that no file can hold."""
    from data_pipeline.convert.splits import columns_of

    source = config.source
    labels = [*config.conditions, *columns_of(config.split)]
    if missing := [name for name in labels if name not in adata.obs]:
        raise InputError(f"shards: adata.obs has no column {missing[0]!r}. It has {', '.join(map(str, adata.obs))}")
    primary = ["is_primary_data"] if source.primary_data_only else []
    obs = _named("obs", adata.obs, [*labels, *primary], source.obs_filter)
    if SPLIT in obs:
        raise InputError(f"adata.obs: fit itself writes the column {SPLIT!r}. Give a copy of it that has another name")
    for name in labels:
        column = pd.Series(obs[name])
        if column.dtype not in ("float32", "float64"):  # numbers as they are, to be refused as those of a file
            obs = obs.assign(**{name: texts(column).where(column.notna()).astype("category")})
        _check_texts(f"adata.obs[{name!r}]", pd.unique(obs[name].dropna()))
    for name, names in (("obs_names", adata.obs_names), ("var_names", adata.var_names)):
        _check_texts(f"adata.{name}", names)
    return obs, _named("var", adata.var, [source.gene_column], source.var_filter)


def _named(what: str, table: Any, names: Sequence[str], expression: str) -> pd.DataFrame:
    """The columns of obs or var with these names, and those that a filter names."""
    table = table_in_memory(table)
    asked = {*names, *re.findall(r"\w+", expression), *re.findall(r"`([^`]+)`", expression)}
    columns = [name for name in table if name in asked]
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise InputError(f"adata.{what} has several columns {twice[0]!r}. Rename all but one")
    return table[columns]


def _check_texts(what: str, values: Iterable[Any]) -> None:
    """Raises: InputError for a text that a file can't hold."""
    for value in map(str, values):
        if "\0" in value or value != value.encode(errors="replace").decode():
            raise InputError(f"{what}: {value!r} holds a NUL, or is no text in UTF-8. Rename it")


def write_slim(adata: ad.AnnData, tables: Tables, config: ShardsWriteConfig, path: Path) -> None:
    """What training needs of the cells as a file, unless an earlier call wrote it: it would be another file."""
    if path.exists():
        return
    wanted = {"counts", config.source.layer.removeprefix("layers/")}
    kept = {name: matrix for name, matrix in adata.layers.items() if name in wanted}
    slim = ad.AnnData(x_of(adata), obs=tables[0], var=tables[1], layers=kept)
    if adata.raw is not None:
        names = {"obs": adata.obs_names, "var": adata.raw.var_names}
        frames: dict[str, Any] = {of: pd.DataFrame(index=index) for of, index in names.items()}
        slim.raw = ad.AnnData(adata.raw.X, **frames)
    made_storable(slim).strings_to_categoricals()
    check_storable(slim, "adata")
    with made_aside(path) as part:
        write_cells(slim, part, compression=None)


def digest_of(adata: ad.AnnData | str | os.PathLike[str], path: str, tables: Tables | None) -> str:
    """What tells cells apart: of a file its name, size and time, of an AnnData its genes, counts and labels.

    tables: of an AnnData, those that matter
    """
    if tables is None:
        from data_pipeline.convert.source import size_and_time

        size, modified_ns = size_and_time(path)
        return f"{path} {size} {modified_ns}"
    assert isinstance(adata, ad.AnnData)
    digest = hashlib.sha256("\n".join([*map(str, adata.var_names), *map(str, adata.obs_names)]).encode())
    for table in tables:
        for name in table:
            digest.update("\n".join([str(name), *table[name].astype(str)]).encode())
    raw: list[Any] = [] if adata.raw is None else [adata.raw.X]
    matrices: list[Any] = [x_of(adata), *(adata.layers[name] for name in sorted(adata.layers)), *raw]
    blocks: Any = (block for matrix in matrices if matrix is not None for block in row_blocks(matrix))
    for block in blocks:
        for start in range(0, block.shape[0], FILE_ROWS):  # the same in memory as in a file
            rows = block[start : start + FILE_ROWS]
            for part in (rows.data, rows.indices.astype(np.int64), rows.indptr.astype(np.int64)):
                digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def gene_columns(adata: ad.AnnData | str | os.PathLike[str], ids: Sequence[str]) -> pd.DataFrame:
    """The text columns of var, such as symbols beside ids, for the genes that the model has."""
    if isinstance(adata, ad.AnnData):
        var = table_in_memory(adata.var)
    else:
        path = Path(adata)
        with open_cells(path) as file, reading(path):
            var = read_frame(frame_of(file, "var", path))
    columns = {
        str(name): column.astype(str)
        for name, column in var.items()
        if isinstance(column.dtype, pd.CategoricalDtype | pd.StringDtype) or column.map(type).eq(str).all()
    }
    found = pd.DataFrame(columns, index=var.index)
    return found.reindex(list(ids)) if set(ids) <= set(var.index) else pd.DataFrame(index=pd.Index(ids))


def splits_of(shards: Path, n_cells: int) -> np.ndarray:
    """The split of every cell, in the order of the cells."""
    from data_pipeline.format.read_shards import ShardSet

    out = np.full(n_cells, "left out", object)
    with closing(ShardSet(str(shards))) as cells:
        row = cells.cell_column("row")
        for split in cells.manifest.splits:
            out[row[split.first_cell :][: split.n_cells]] = split.name
    return out
