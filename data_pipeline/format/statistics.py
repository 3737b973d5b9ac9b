"""What a set's manifest says about its cells, computed from the per-cell columns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from data_pipeline.format.schema import CombinationCounts, LibrarySizes, Statistics

# With C conditions there are 2^C tables of library sizes. Beyond this many only all, each alone, and none are kept.
ALL_MARGINALS_UP_TO = 4


def compute_statistics(
    split: np.ndarray,
    n_splits: int,
    conditions: Mapping[str, np.ndarray],
    total_counts: np.ndarray,
    n_expressed: np.ndarray,
    largest_count: int,
) -> Statistics:
    """Statistics of a set. All arrays are per cell, in set order (sums of floats depend on it in the last digit)."""
    train = split == 0
    log_total = np.log(total_counts[train].astype(np.float64))
    ids = {name: np.asarray(column) for name, column in conditions.items()}
    train_ids = {name: column[train] for name, column in ids.items()}
    return Statistics(
        tuple(_library_sizes(by, train_ids, log_total) for by in marginals(tuple(ids))),
        _combination_counts(ids, split, n_splits),
        int(n_expressed.max(initial=0)),
        int(n_expressed.sum(dtype=np.int64)),
        largest_count,
    )


def marginals(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Choices of conditions, from all of them to none."""
    if len(names) <= ALL_MARGINALS_UP_TO:
        return [by for k in range(len(names), -1, -1) for by in combinations(names, k)]
    return [names, *((name,) for name in names), ()]


def _groups(by: tuple[str, ...], ids: Mapping[str, np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """The combinations that occur, sorted, (k, len(by)), and each cell's combination."""
    if not by:
        return np.zeros((1, 0), np.int64), np.zeros(n, np.int64)
    table = pd.DataFrame({name: ids[name] for name in by})
    found = table.drop_duplicates().sort_values(list(by))
    return found.to_numpy(np.int64), table.groupby(list(by), sort=True).ngroup().to_numpy()


def _library_sizes(by: tuple[str, ...], ids: Mapping[str, np.ndarray], log_total: np.ndarray) -> LibrarySizes:
    found, group = _groups(by, ids, len(log_total))
    n = np.bincount(group, minlength=len(found))
    mean = np.bincount(group, log_total, len(found)) / np.maximum(n, 1)
    variance = np.bincount(group, (log_total - mean[group]) ** 2, len(found)) / np.maximum(n, 1)
    return LibrarySizes(by, _rows(found), tuple(n.tolist()), tuple(mean.tolist()), tuple(np.sqrt(variance).tolist()))


def _combination_counts(ids: Mapping[str, np.ndarray], split: np.ndarray, n_splits: int) -> CombinationCounts:
    by = tuple(ids)
    found, group = _groups(by, ids, len(split))
    n = np.bincount(group * n_splits + split, minlength=len(found) * n_splits).reshape(len(found), n_splits)
    return CombinationCounts(by, _rows(found), _rows(n))


def _rows(table: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
