"""Cells for an evaluation: real ones with their splits out of a shard set or an h5ad file, generated ones out of what
`scldm generate` writes.

Reading order: shards, files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from data_pipeline.convert.source_h5ad import find_counts
from data_pipeline.format.block import BlockBuffers, decode_block
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.format.schema import column_dtype, count_dtype, vocab_tag
from data_pipeline.read_cells import read_soma
from scldm.cells_file import read_column, read_names
from scldm.cells_opened import column_names, frame_of, open_cells, reading
from scldm.count_matrix import sound
from scldm.errors import InputError
from scldm.evaluate.baselines import rows_per_type
from scldm.evaluate.cells import Cells, combination_names
from scldm.evaluate.sample import SPLITS, Sample, check_splits, rows_of_blocks
from scldm.label_text import labels_of
from scldm.vocab import unversioned

# --- shards --------------------------------------------------------------------------------------------------------


MOST_BLOCKS = 64  # of a split, where some of its cells are enough


def cells_of_shards(
    url: str,
    conditions: Sequence[str],
    sample: Sample | None = None,
    cache_folder: str = "",
    cache_gb: float = 0.0,
    splits: Sequence[str] = SPLITS,
    select: Mapping[str, Sequence[str]] | None = None,
) -> list[Cells]:
    """Cells of some splits of a shard set, with the labels of these conditions. Nothing of other splits is read.

    sample: which of them are read, a block at a time. None reads all
    cache_folder, cache_gb: where the index and, up to so many 1e9 bytes, blocks of a remote set are kept
    splits: in the order of the answer. The last is the one that is judged
    select: condition, one of these -> labels: only cells that have one of the labels

    Raises: InputError for a set, a split or a condition that is not there.
    """
    with closing(ShardSet(url, cache_folder=cache_folder, cache_bytes=int(cache_gb * 1e9))) as shards:
        ids: dict[str, np.ndarray] = {split: _label_ids(shards, split, conditions) for split in splits}
        # each combination that some cell has, by its labels' numbers. A cell's combination is its row here
        rows_KC, of_all = np.unique(np.concatenate(list(ids.values())), axis=0, return_inverse=True)
        ends = np.cumsum([len(of) for of in ids.values()])[:-1]
        of = dict(zip(ids, np.split(of_all.ravel(), ends), strict=True))
        labels_C = [np.array(shards.manifest.conditions.labels[c]) for c in conditions]
        labels = {c: labels_C[k][rows_KC[:, k]] for k, c in enumerate(conditions)}
        chosen_K = np.ones(len(rows_KC), bool)
        for condition, wanted in (select or {}).items():
            chosen_K &= np.isin(labels[condition], list(wanted))
        return [_split(shards, split, of, labels, chosen_K, sample) for split in splits]


def some_cells(
    url: str,
    conditions: Sequence[str],
    splits: Sequence[str],
    n_cells: int,
    seed: int,
    cache_folder: str = "",
    cache_gb: float = 0.0,
    select: Mapping[str, Sequence[str]] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Cells]:
    """So many cells of each split, or all where it has fewer, out of as few blocks as hold them, in random order. It is
    a uniform draw, as a set's cells were shuffled before they were put into blocks. At most MOST_BLOCKS are read, so
    that there may be fewer cells where rare labels are selected.

    select: condition -> labels: only cells that have one of the labels
    check: is called before each block, and may raise
    """
    select = select or {}
    with closing(ShardSet(url, cache_folder=cache_folder, cache_bytes=int(cache_gb * 1e9))) as shards:
        return [_some_of_split(shards, split, conditions, n_cells, seed, select, check) for split in splits]


def _some_of_split(
    shards: ShardSet, split: str, conditions: Sequence[str], n_cells: int, seed: int, select: Any, check: Any
) -> Cells:
    manifest, names = shards.manifest, list(dict.fromkeys([*conditions, *select]))
    entry, buffers = manifest.splits[manifest.split_number(split)], _buffers(shards)
    rng = np.random.default_rng([seed, 4, SPLITS.index(split)])  # 3 is Sample's
    n_left, parts = n_cells, list[sp.csr_matrix]()
    labels: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for number in entry.first_block + rng.permutation(entry.n_blocks)[:MOST_BLOCKS]:
        check()
        first, n = int(shards.blocks["first_cell"][number]), int(shards.blocks["n_cells"][number])
        ids = {name: np.asarray(shards.cell_column(f"condition.{name}")[first : first + n]) for name in names}
        own = {name: np.array(manifest.conditions.labels[name])[of] for name, of in ids.items()}
        chosen = np.all(
            [np.isin(own[name], list(wanted)) for name, wanted in select.items()] or np.ones((1, n), bool), 0
        )
        rows = np.flatnonzero(chosen)[:n_left]
        if len(rows):
            parts.append(_block(shards, number, buffers)[rows])
            labels = {name: [*before, own[name][rows]] for name, before in labels.items()}
            n_left -= len(rows)
        if not n_left:
            break
    if not parts:
        raise InputError(f"{shards.url} ({split}) holds no cells, or none of the labels that are selected")
    of_cells = {name: np.concatenate(labels[name]) for name in conditions}
    genes, name = unversioned(manifest.genes.ids), f"{shards.url} ({split})"
    drawn_of = entry.n_cells if not n_left and n_cells < entry.n_cells else 0
    return Cells.of_labels(sp.csr_matrix(sp.vstack(parts)), of_cells, genes, name, drawn_of)


def _buffers(shards: ShardSet) -> BlockBuffers:
    manifest = shards.manifest
    return BlockBuffers(column_dtype(manifest.genes.n_genes), count_dtype(manifest.statistics.largest_count))


def _block(shards: ShardSet, number: int, buffers: BlockBuffers) -> sp.csr_matrix:
    """The counts of one block, (cells, genes)."""
    genes, where = shards.manifest.genes, shards.where(number)
    block = decode_block(shards.fetch(number).data, buffers, vocab_tag=vocab_tag(genes), where=where)
    # views of the buffers that the next block overwrites
    counts = block.counts.astype(np.promote_types(block.counts.dtype, np.int32))
    csr = counts, block.columns.astype(np.int32), block.indptr.astype(np.int64)
    return sp.csr_matrix(csr, shape=(len(block.indptr) - 1, genes.n_genes))


def conditions_of_shards(url: str, cache_folder: str = "") -> tuple[str, ...]:
    """All conditions of a shard set."""
    with closing(ShardSet(url, cache_folder=cache_folder)) as shards:
        return tuple(shards.manifest.conditions.names)


def labels_of_split(url: str, split: str, conditions: Sequence[str] = ()) -> pd.DataFrame:
    """The conditions of every cell of a split. All of the set's, where none is named."""
    with closing(ShardSet(url)) as shards:
        known = shards.manifest.conditions
        names = tuple(conditions) or tuple(known.names)
        ids = _label_ids(shards, split, names)
        return pd.DataFrame({c: pd.Categorical.from_codes(ids[:, k], known.labels[c]) for k, c in enumerate(names)})


def _label_ids(shards: ShardSet, split: str, conditions: Sequence[str]) -> np.ndarray:
    """Each cell's label of each condition, by its number, (cells, conditions)."""
    there = shards.manifest.conditions.names
    if unknown := [name for name in conditions if name not in there]:
        raise InputError(f"{shards.url} has no condition={unknown[0]!r}. It has {', '.join(there) or 'none'}")
    entry = shards.manifest.splits[shards.manifest.split_number(split)]
    if not entry.n_cells:
        raise InputError(f"{shards.url} ({split}) holds no cells")
    of_split = slice(entry.first_cell, entry.first_cell + entry.n_cells)
    columns = [np.asarray(shards.cell_column(f"condition.{c}")[of_split], np.int64) for c in conditions]
    return np.stack(columns, axis=1) if columns else np.zeros((entry.n_cells, 0), np.int64)


def _split(
    shards: ShardSet,
    split: str,
    of: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    chosen_K: np.ndarray,
    sample: Sample | None,
) -> Cells:
    """of: split -> the combination of each of its cells, by its number
    labels: condition -> label of each
    chosen_K: whether the cells of a combination are read at all"""
    manifest, of_n = shards.manifest, of[split]
    genes, entry = manifest.genes, manifest.splits[manifest.split_number(split)]
    named = combination_names(labels, len(chosen_K))
    start = np.append(shards.blocks["first_cell"][entry.first_block :][: entry.n_blocks], entry.first_cell + len(of_n))
    start = start.astype(np.int64) - entry.first_cell
    rows = np.flatnonzero(chosen_K[of_n])
    n_chosen = len(rows)
    if not n_chosen:
        raise InputError(f"{shards.url} ({split}) holds no cells of the labels that are selected")
    if sample is not None:
        of_split, of_judged = (
            {str(named[k]): n for k, n in enumerate(np.bincount(of[name]).tolist()) if n and chosen_K[k]}
            for name in (split, [*of][-1])
        )
        wanted = sample.numbers(split, of_split, of_judged)
        if wanted != of_split:
            numbers_K = np.array([wanted.get(str(name), 0) for name in named])
            rows = rows_of_blocks(of_n, start, numbers_K, sample.rng(split))
    buffers = _buffers(shards)
    parts: list[sp.csr_matrix] = []
    for at in np.flatnonzero(np.diff(np.searchsorted(rows, start))).tolist():
        of_block = rows[slice(*np.searchsorted(rows, start[at : at + 2]))] - start[at]
        parts.append(_block(shards, entry.first_block + at, buffers)[of_block])
    drawn_of = n_chosen if len(rows) < n_chosen else 0
    own = {condition: column[of_n[rows]] for condition, column in labels.items()}
    return Cells.of_labels(
        sp.csr_matrix(sp.vstack(parts)), own, unversioned(genes.ids), f"{shards.url} ({split})", drawn_of
    )


# --- files ---------------------------------------------------------------------------------------------------------


def cells_of_h5ad(
    path: str,
    conditions: Sequence[str],
    split: str,
    layer: str,
    sample: Sample | None = None,
    missing: Mapping[str, str] | None = None,
) -> list[Cells]:
    """Training, validation and test cells of a file with a column that tells them apart, with the labels of these
    conditions. The file is read whole.

    sample: which of them are taken. None takes all
    missing: condition -> the label that training gave its missing values. Others are refused

    Raises: InputError where they can't be read or told apart.
    """
    counts, obs, genes = _read(path, layer, [*conditions, split])
    genes = unversioned(genes)
    labels = _columns(obs, conditions, path, missing)
    splits = labels_of(obs, split, path, "split", obs.attrs["columns"])
    types = combination_names(labels, len(obs))
    check_splits(splits, path, split)
    of_test = _numbers(types[splits == "test"])
    parts = []
    for name in SPLITS:
        rows = np.flatnonzero(splits == name)
        of_split, of = _numbers(types[rows]), 0
        wanted = of_split if sample is None else sample.numbers(name, of_split, of_test)
        if sample is not None and wanted != of_split:
            of, rows = len(rows), rows[np.sort(rows_per_type(types[rows], wanted, sample.rng(name)))]
        own = {condition: column[rows] for condition, column in labels.items()}
        parts.append(Cells.of_labels(counts[rows], own, genes, f"{path} ({name})", of))
    return parts


def _numbers(types: np.ndarray) -> dict[str, int]:
    return {str(label): int(n) for label, n in zip(*np.unique(types, return_counts=True), strict=True)}


def generated_cells(path: str, conditions: Sequence[str], missing: Mapping[str, str] | None = None) -> Cells:
    """Cells of an h5ad file, a zarr folder or a SOMA experiment. `missing` is as for `cells_of_h5ad`.

    Raises: InputError where they can't be read, or don't say their conditions.
    """
    if path.rstrip("/").endswith(".soma"):
        adata = read_soma(path)
        counts, obs, genes = sp.csr_matrix(adata.X), pd.DataFrame(adata.obs), tuple(map(str, adata.var_names))
    else:
        counts, obs, genes = _read(path, "", conditions)
    return Cells.of_labels(counts, _columns(obs, conditions, path, missing), unversioned(genes), path)


def obs_columns(path: str) -> set[str]:
    """The obs columns of generated cells, without their counts.

    Raises: InputError where they can't be read.
    """
    if path.rstrip("/").endswith(".soma"):
        return set(map(str, read_soma(path).obs.columns))
    with open_cells(path) as file, reading(path):
        return set(column_names(frame_of(file, "obs", path)))


def _read(path: str, layer: str, columns: Sequence[str]) -> tuple[sp.csr_matrix, pd.DataFrame, tuple[str, ...]]:
    """Counts, some columns of obs (those that are there) and gene ids of a file."""
    with open_cells(path) as file, reading(path):
        name = find_counts(file, layer, "layer")
        group = frame_of(file, "obs", path)
        there = {str(k): read_column(group, k).array for k in columns if k in group}
        obs = pd.DataFrame(there, index=read_names(group))
        obs.attrs["columns"] = column_names(group)  # of the file, to name where one is missing
        genes = read_names(file["raw/var" if name == "raw/X" else "var"])
        counts: Any = sound(read_elem(file[name]), f"{path}: {name}")
    return sp.csr_matrix(counts), obs, tuple(genes)


def _columns(
    obs: pd.DataFrame, conditions: Sequence[str], path: str, missing: Mapping[str, str] | None
) -> dict[str, np.ndarray]:
    there, known = obs.attrs.get("columns"), missing or {}
    return {name: labels_of(obs, name, path, "condition", there, known.get(name, "")) for name in conditions}
