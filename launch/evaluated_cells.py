"""Cells for an evaluation: real ones with their splits out of a shard set or an h5ad file, generated ones out of what
`scldm generate` writes.

Reading order: shards, files.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from data_pipeline.block import BlockBuffers, decode_block
from data_pipeline.read_cells import read_cells
from data_pipeline.read_shards import ShardSet
from data_pipeline.schema import column_dtype, count_dtype, vocab_tag
from data_pipeline.source_h5ad import find_counts, open_file, reading
from data_pipeline.sources import as_labels
from scldm.errors import InputError
from scldm.evaluate.compare import NO_TYPE, Cells
from scldm.evaluate.rivals import rows_per_type
from scldm.evaluate.sample import SPLITS, Sample, rows_of_blocks

# --- shards --------------------------------------------------------------------------------------------------------


def cells_of_shards(
    url: str, condition: str, sample: Sample | None = None, cache_folder: str = "", cache_gb: float = 0.0
) -> tuple[Cells, Cells, Cells]:
    """Training, validation and test cells of a shard set; an empty condition gives them no types.

    sample: which of them are read, a block at a time; None reads all
    cache_folder, cache_gb: where the index and, up to so many 1e9 bytes, blocks of a remote set are kept

    Raises: InputError for a set, a split or a condition that is not there.
    """
    shards = ShardSet(url, cache_folder=cache_folder, cache_bytes=int(cache_gb * 1e9))
    try:
        names = shards.manifest.conditions.names
        if condition and condition not in names:
            raise InputError(f"{url} has no condition={condition!r}; it has {', '.join(names) or 'none'}")
        ids = {name: _type_ids(shards, name, condition) for name in SPLITS}
        train, validation, test = (_split(shards, name, ids, condition, sample) for name in SPLITS)
    finally:
        shards.close()
    return train, validation, test


def _type_ids(shards: ShardSet, split: str, condition: str) -> np.ndarray:
    """Each cell's label, by its number."""
    entry = shards.manifest.splits[shards.manifest.split_number(split)]
    if not entry.n_cells:
        raise InputError(f"{shards.url} ({split}) holds no cells")
    if not condition:
        return np.zeros(entry.n_cells, np.uint8)
    return shards.cell_column(f"condition.{condition}")[entry.first_cell : entry.first_cell + entry.n_cells]


def _split(shards: ShardSet, split: str, ids: dict[str, np.ndarray], condition: str, sample: Sample | None) -> Cells:
    manifest, ids_n = shards.manifest, ids[split]
    genes, entry = manifest.genes, manifest.splits[manifest.split_number(split)]
    labels = manifest.conditions.labels[condition] if condition else (NO_TYPE,)
    start = np.append(shards.blocks["first_cell"][entry.first_block :][: entry.n_blocks], entry.first_cell + len(ids_n))
    start = start.astype(np.int64) - entry.first_cell
    rows = np.arange(len(ids_n))
    if sample is not None:
        of_split, of_test = (
            {labels[k]: n for k, n in enumerate(np.bincount(ids[of]).tolist()) if n} for of in (split, "test")
        )
        wanted = sample.numbers(split, of_split, of_test)
        if wanted != of_split:
            numbers_K = np.array([wanted.get(label, 0) for label in labels])
            rows = rows_of_blocks(ids_n, start, numbers_K, sample.rng(split))
    buffers = BlockBuffers(column_dtype(genes.n_genes), count_dtype(manifest.statistics.largest_count))
    parts: list[sp.csr_matrix] = []
    for at in np.flatnonzero(np.diff(np.searchsorted(rows, start))).tolist():
        number = entry.first_block + at
        where = shards.where(number)
        block = decode_block(shards.fetch(number).data, buffers, vocab_tag=vocab_tag(genes), where=where)
        # views of the buffers that the next block overwrites
        counts = block.counts.astype(np.promote_types(block.counts.dtype, np.int32))
        csr = counts, block.columns.astype(np.int32), block.indptr.astype(np.int64)
        of_block = rows[slice(*np.searchsorted(rows, start[at : at + 2]))] - start[at]
        parts.append(sp.csr_matrix(csr, shape=(len(block.indptr) - 1, genes.n_genes))[of_block])
    of = len(ids_n) if len(rows) < len(ids_n) else 0
    matrix = sp.csr_matrix(sp.vstack(parts))
    return Cells(matrix, np.array(labels)[ids_n[rows]], genes.ids, f"{shards.url} ({split})", of)


# --- files ---------------------------------------------------------------------------------------------------------


def cells_of_h5ad(
    path: str, condition: str, split: str, layer: str, sample: Sample | None = None
) -> tuple[Cells, Cells, Cells]:
    """Training, validation and test cells of a file with a column that tells them apart; an empty condition gives them
    no types. The file is read whole.

    sample: which of them are taken; None takes all

    Raises: InputError where they can't be read or told apart.
    """
    counts, obs, genes = _read(path, layer)
    types, splits = _types(obs, condition, path), _labels(obs, split, path, "split")
    found = sorted(set(splits))
    for name in SPLITS:
        if name not in found:
            raise InputError(
                f"{path}: obs column split={split!r} marks no {name} cells; it must say {', '.join(SPLITS)}, "
                f"and says {', '.join(map(repr, found[:5]))}"
            )
    of_test = _numbers(types[splits == "test"])
    parts = []
    for name in SPLITS:
        rows = np.flatnonzero(splits == name)
        of_split, of = _numbers(types[rows]), 0
        wanted = of_split if sample is None else sample.numbers(name, of_split, of_test)
        if sample is not None and wanted != of_split:
            of, rows = len(rows), rows[np.sort(rows_per_type(types[rows], wanted, sample.rng(name)))]
        parts.append(Cells(counts[rows], types[rows], genes, f"{path} ({name})", of))
    train, validation, test = parts
    return train, validation, test


def _numbers(types: np.ndarray) -> dict[str, int]:
    return {str(label): int(n) for label, n in zip(*np.unique(types, return_counts=True), strict=True)}


def generated_cells(path: str, condition: str) -> Cells:
    """Cells of an h5ad file, a zarr folder or a SOMA experiment.

    Raises: InputError where they can't be read, or don't say their condition.
    """
    if path.rstrip("/").endswith((".zarr", ".soma")):
        adata = read_cells(path)
        counts, obs, genes = sp.csr_matrix(adata.X), pd.DataFrame(adata.obs), tuple(map(str, adata.var_names))
    else:
        counts, obs, genes = _read(path, "")
    return Cells(counts, _types(obs, condition, path), genes, path)


def _read(path: str, layer: str) -> tuple[sp.csr_matrix, pd.DataFrame, tuple[str, ...]]:
    """Counts, obs and gene ids of a file."""
    with open_file(path) as file, reading(path):
        try:
            name = find_counts(file, layer)
        except InputError as error:
            raise InputError(str(error).replace("source.layer", "layer")) from None
        parts = [file[part] for part in (name, "obs", "raw/var" if name == "raw/X" else "var")]
        counts, obs, var = (read_elem(part) for part in parts)  # pyright: ignore[reportArgumentType]
    assert isinstance(obs, pd.DataFrame)
    assert isinstance(var, pd.DataFrame)
    return sp.csr_matrix(counts), obs, tuple(map(str, var.index))


def _types(obs: pd.DataFrame, condition: str, path: str) -> np.ndarray:
    return _labels(obs, condition, path, "condition") if condition else np.full(len(obs), NO_TYPE)


def _labels(obs: pd.DataFrame, column: str, path: str, key: str) -> np.ndarray:
    """A column of obs as strings."""
    if column not in obs:
        there = ", ".join(map(str, obs.columns)) or "none"
        raise InputError(f"{path}: obs has no column {key}={column!r}; it has {there}")
    values = pd.Series(obs[column])
    if n := int(np.asarray(values.isna()).sum()):
        raise InputError(
            f"{path}: obs column {key}={column!r} has no value in {n:,} cells; leave them out or label them"
        )
    return as_labels(values, path, "").to_numpy(str)
