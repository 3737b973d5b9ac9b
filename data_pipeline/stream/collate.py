"""Cells in slots -> one micro-batch on its way to a model: CellBatch, CompactCellBatch or LatentBatch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from data_pipeline.format.latent_block import LatentSlots
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.feed import Plan
from data_pipeline.stream.gather import CellSlots
from data_pipeline.stream.gather_kernels import take_cells
from data_pipeline.stream.gene_sets import GeneSets
from scldm.batch import CellBatch, CompactCellBatch, CompactCounts, GeneCounts, LatentBatch, narrow_ids, pinned


class CellCollator:
    """Cells in slots -> one micro-batch.

    asked: None where the decoder is asked for what the encoder is given
    compact: a CompactCellBatch, not a CellBatch
    pin: in pinned memory
    """

    slots: CellSlots

    def __init__(
        self, names: tuple[str, ...], given: GeneSets, asked: GeneSets | None, *, compact: bool, pin: bool
    ) -> None:
        self.names, self.given, self.asked, self.compact, self.pin = names, given, asked, compact, pin

    def make_slots(self, cells: ShardSet, n_slots: int) -> CellSlots:
        self.slots = CellSlots(cells.manifest, n_slots)
        return self.slots

    def __call__(
        self, slots: np.ndarray, rows: np.ndarray, plan: Plan, positions: np.ndarray, weight: np.ndarray
    ) -> CellBatch | CompactCellBatch:
        rest = _rest(self.slots, self.names, slots, rows, plan, positions, weight)
        if self.compact:
            batch = self._compact(slots, rows, plan, positions, rest)
            return pinned(batch) if self.pin else batch
        given, totals = self._dense(self.given, slots, rows, plan, positions)
        asked = given
        if self.asked is not None:
            asked, totals = self._dense(self.asked, slots, rows, plan, positions)
        library_size = torch.from_numpy(totals.astype(np.float32))
        batch = CellBatch(given=given, asked=asked, library_size_B=library_size, **rest)
        return pinned(batch) if self.pin else batch

    def _dense(
        self, sets: GeneSets, slots: np.ndarray, rows: np.ndarray, plan: Plan, positions: np.ndarray
    ) -> tuple[GeneCounts, np.ndarray]:
        if sets.of_the_cell:
            words = sets.words(plan.epoch, plan.step, positions)
            ids, counts, totals = self.slots.take_of_the_cell(slots, rows, sets, words)
        else:
            ids = sets.ids(plan.epoch, plan.step, positions)
            counts, totals = self.slots.take(slots, rows, ids)
        return GeneCounts(torch.from_numpy(ids), torch.from_numpy(counts)), totals

    def _compact(
        self, slots: np.ndarray, rows: np.ndarray, plan: Plan, positions: np.ndarray, rest: dict[str, Any]
    ) -> CompactCellBatch:
        ids = [self._ids(sets, slots, rows, plan, positions) for sets in (self.given, self.asked) if sets is not None]
        start, gene_ids, counts, large_at, large = self.slots.take_csr(slots, rows)
        csr = CompactCounts.from_numpy(start, gene_ids, counts, large_at, large, self.slots.n_genes + 1)
        return CompactCellBatch(csr=csr, given_ids=ids[0], asked_ids=ids[-1], **rest)

    def _ids(
        self, sets: GeneSets, slots: np.ndarray, rows: np.ndarray, plan: Plan, positions: np.ndarray
    ) -> torch.Tensor:
        if sets.of_the_cell:
            words = sets.words(plan.epoch, plan.step, positions)
            ids = self.slots.take_of_the_cell(slots, rows, sets, words)[0]
        else:
            ids = sets.ids(plan.epoch, plan.step, positions)
        return narrow_ids(ids.astype(self.slots.id_dtype))


class LatentCollator:
    """Latents in slots -> one micro-batch. pin: in pinned memory."""

    slots: LatentSlots

    def __init__(self, names: tuple[str, ...], *, pin: bool) -> None:
        self.names, self.pin = names, pin

    def make_slots(self, cells: ShardSet, n_slots: int) -> LatentSlots:
        self.slots = LatentSlots(cells.manifest, n_slots)
        return self.slots

    def __call__(
        self, slots: np.ndarray, rows: np.ndarray, plan: Plan, positions: np.ndarray, weight: np.ndarray
    ) -> LatentBatch:
        rest = _rest(self.slots, self.names, slots, rows, plan, positions, weight)
        batch = LatentBatch(latent_BLZ=torch.from_numpy(self.slots.latent[slots, rows]), **rest)
        return pinned(batch) if self.pin else batch


def _rest(
    held: CellSlots | LatentSlots,
    names: tuple[str, ...],
    slots: np.ndarray,
    rows: np.ndarray,
    plan: Plan,
    positions: np.ndarray,
    weight: np.ndarray,
) -> dict[str, Any]:
    """What cells and latents have in common."""
    labels, identity, totals = take_cells(slots, rows, held.about)
    return {
        "library_size_all_B": torch.from_numpy(totals),
        "weight_B": torch.from_numpy(weight),
        "conditions": {name: torch.from_numpy(ids) for name, ids in zip(names, labels)},
        "cell_ids_B2": torch.from_numpy(identity),
        "positions_B": torch.from_numpy(positions.copy()),
        "n_cells": plan.n_cells,
    }
