"""Streams over small sets of known cells, and what is asserted of their batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader, LoaderConfig

RANDOM = GeneSetConfig("random", 50, gene_set_group=4)
SAME = GeneSetConfig("same")


def config(folder, **changes):
    return replace(LoaderConfig(folder, seed=1, lanes=8, given=RANDOM), **changes)


def open_loader(folder, *, rank=0, world=1, global_batch=96, micro=4, split="train", cells=None, **changes):
    size = {"global_batch": global_batch, "micro_batch": micro}
    return CellLoader(config(folder, **changes), split, rank=rank, world_size=world, cells=cells, **size)


def check(cells, batch):
    """The rows of a batch's cells in the known set; asserts that all it says about them is so."""
    rows = batch.cell_ids_B2[:, 1].numpy() // 1_000_003
    rows = np.argsort(cells.identity[:, 1])[rows]  # identity's rows are a permutation of 0, 1_000_003, ...
    np.testing.assert_array_equal(cells.identity[rows], batch.cell_ids_B2.numpy())
    counts = cells.counts[rows]
    padded = np.concatenate([np.zeros((len(rows), 1), np.int64), counts], axis=1)
    for part in (batch.given, batch.asked):
        ids = part.gene_ids.numpy()
        expected = padded[:, ids] if ids.ndim == 1 else np.take_along_axis(padded, ids, 1)
        np.testing.assert_array_equal(part.counts_BS.numpy(), expected)
        for row in np.atleast_2d(ids):
            assert len(np.unique(row[row > 0])) == (row > 0).sum()
    np.testing.assert_array_equal(batch.library_size_B.numpy(), expected.sum(1).astype(np.float32))
    np.testing.assert_array_equal(batch.library_size_all_B.numpy(), counts.sum(1).astype(np.float32))
    for name, labels in cells.labels.items():
        np.testing.assert_array_equal(batch.conditions[name].numpy(), labels[rows])
    return rows


def flat(batch):
    """Every number of a batch, to compare two of them."""
    return [
        t.tolist()
        for t in (
            batch.cell_ids_B2, batch.given.gene_ids, batch.given.counts_BS, batch.asked.gene_ids, batch.asked.counts_BS,
            batch.library_size_B, batch.weight_B, batch.positions_B, batch.conditions["type"],
        )
    ] + [batch.n_cells]  # fmt: skip


def by_cell(micro_batches):
    """The rows of `flat` that belong to one cell, for every cell of some micro-batches."""
    cells = []
    for batch in micro_batches:
        n = len(batch)
        sides = []
        for part in (batch.given, batch.asked):
            ids = part.gene_ids if part.gene_ids.ndim == 2 else part.gene_ids.expand(n, -1)
            sides.append([[(i, c) for i, c in zip(*row) if i] for row in zip(ids.tolist(), part.counts_BS.tolist())])
        rest = (batch.cell_ids_B2, batch.library_size_B, batch.weight_B, batch.positions_B, batch.conditions["type"])
        cells += list(zip(*sides, *(t.tolist() for t in rest), [batch.n_cells] * n))
    return cells


def interrupt(monkeypatch, place, method, nth, late):
    """The nth call of this method is interrupted: instead of doing anything, or when it has done it."""
    whole, calls = getattr(place, method), []

    def interrupted(self, *rest):
        calls.append(rest)
        mine = len(calls) == nth
        done = whole(self, *rest) if late or not mine else None
        if mine:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(place, method, interrupted)
