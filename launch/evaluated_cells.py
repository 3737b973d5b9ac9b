"""Cells for an evaluation: real ones with their splits out of a shard set or an h5ad file, generated ones out of h5ad.

Reading order: shards, h5ad.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from data_pipeline.block import BlockBuffers, decode_block
from data_pipeline.read_shards import ShardSet
from data_pipeline.schema import column_dtype, count_dtype, vocab_tag
from data_pipeline.source_h5ad import find_counts, open_file, reading
from data_pipeline.sources import as_labels
from scldm.errors import InputError
from scldm.evaluate.compare import NO_TYPE, Cells

SPLITS = ("train", "validation", "test")


# --- shards --------------------------------------------------------------------------------------------------------


def cells_of_shards(
    url: str, condition: str, cache_folder: str = "", cache_gb: float = 0.0
) -> tuple[Cells, Cells, Cells]:
    """Training, validation and test cells of a shard set, whole in memory; an empty condition gives them no types.

    cache_folder, cache_gb: where the index and, up to so many 1e9 bytes, blocks of a remote set are kept

    Raises: InputError for a set, a split or a condition that is not there.
    """
    shards = ShardSet(url, cache_folder=cache_folder, cache_bytes=int(cache_gb * 1e9))
    try:
        names = shards.manifest.conditions.names
        if condition and condition not in names:
            raise InputError(f"{url} has no condition={condition!r}; it has {', '.join(names) or 'none'}")
        train, validation, test = (_split(shards, name, condition) for name in SPLITS)
    finally:
        shards.close()
    return train, validation, test


def _split(shards: ShardSet, split: str, condition: str) -> Cells:
    manifest = shards.manifest
    genes, name = manifest.genes, f"{shards.url} ({split})"
    buffers = BlockBuffers(column_dtype(genes.n_genes), count_dtype(manifest.statistics.largest_count))
    numbers = np.flatnonzero(shards.blocks["split"] == manifest.split_number(split)).tolist()
    which = manifest.conditions.names.index(condition) if condition else None
    labels = manifest.conditions.labels[condition] if condition else (NO_TYPE,)
    lengths, columns, counts, ids = [np.zeros(1, np.int64)], [], [], []
    for number in numbers:
        where = shards.where(number)
        block = decode_block(shards.fetch(number).data, buffers, vocab_tag=vocab_tag(genes), where=where)
        lengths.append(np.diff(block.indptr))
        # views of the buffers that the next block overwrites
        columns.append(block.columns.astype(np.int32))
        counts.append(block.counts.astype(np.promote_types(block.counts.dtype, np.int32)))
        n_cells = len(block.indptr) - 1
        ids.append(np.zeros(n_cells, np.int64) if which is None else block.conditions[which].astype(np.int64))
    if not ids:
        raise InputError(f"{name} holds no cells")
    indptr = np.cumsum(np.concatenate(lengths))
    matrix = sp.csr_matrix(
        (np.concatenate(counts), np.concatenate(columns), indptr), shape=(len(indptr) - 1, genes.n_genes)
    )
    types = np.array(labels)[np.concatenate(ids)]
    return Cells(matrix, types, genes.ids, name)


# --- h5ad ----------------------------------------------------------------------------------------------------------


def cells_of_h5ad(path: str, condition: str, split: str, layer: str) -> tuple[Cells, Cells, Cells]:
    """Training, validation and test cells of a file with a column that tells them apart; an empty condition gives them
    no types.

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
    rows = (np.flatnonzero(splits == name) for name in SPLITS)
    train, validation, test = (
        Cells(counts[r], types[r], genes, f"{path} ({name})") for r, name in zip(rows, SPLITS, strict=True)
    )
    return train, validation, test


def generated_cells(path: str, condition: str) -> Cells:
    """Raises: InputError where they can't be read, or don't say their condition."""
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
