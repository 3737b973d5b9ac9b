"""CellBatch and LatentBatch: the one contract between data and model.

The legend of shape letters, used everywhere: B cells, G genes of the vocabulary, S genes given to the encoder, Q genes
asked of the decoder, L latent tokens, Z latent width, D model width, N heads, H head width, C conditions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class GeneCounts:
    """Raw counts of a set of genes.

    gene_ids: vocabulary indices, int64; (S,) where the cells share one set, (B, S) where each has its own.
        0 is padding: it carries no count and is masked wherever it stands
    counts_BS: the integers as they were, any integer dtype
    """

    gene_ids: Tensor
    counts_BS: Tensor

    @property
    def mask(self) -> Tensor:
        """True where a gene stands, False at padding; the shape of `gene_ids`."""
        return self.gene_ids != 0

    def to(self, device: torch.device | str) -> GeneCounts:
        return GeneCounts(
            self.gene_ids.to(device, non_blocking=True), self.counts_BS.to(device, non_blocking=True)
        )


@dataclass(frozen=True)
class CellBatch:
    """A micro-batch of cells as a loader yields it and the VAE's loss takes it.

    given: what the encoder sees
    asked: what the decoder is asked for and the likelihood judges
    library_size_B: total counts over the asked genes (padding excluded), float32
    library_size_all_B: total counts over all genes of the vocabulary, float32
    weight_B: 1.0, or 0.0 for the copies that fill up an epoch's last global batch
    conditions: condition name -> label ids (B,), int64
    cell_ids_B2: stable identity, (source number, row or soma_joinid), int64
    positions_B: position in the global batch, int64; with (seed, step) the key of every random draw for the cell
    n_cells: real cells in the whole global batch: sums of losses are divided by it
    """

    given: GeneCounts
    asked: GeneCounts
    library_size_B: Tensor
    library_size_all_B: Tensor
    weight_B: Tensor
    conditions: dict[str, Tensor]
    cell_ids_B2: Tensor
    positions_B: Tensor
    n_cells: int

    def __len__(self) -> int:
        return len(self.weight_B)

    def to(self, device: torch.device | str) -> CellBatch:
        return _to(self, device)


@dataclass(frozen=True)
class LatentBatch:
    """A micro-batch of encoded cells, for stage 2.

    latent_BLZ: posterior means, float32
    The other fields are CellBatch's.
    """

    latent_BLZ: Tensor
    library_size_all_B: Tensor
    weight_B: Tensor
    conditions: dict[str, Tensor]
    cell_ids_B2: Tensor
    positions_B: Tensor
    n_cells: int

    def __len__(self) -> int:
        return len(self.weight_B)

    def to(self, device: torch.device | str) -> LatentBatch:
        return _to(self, device)


Batch = TypeVar("Batch", CellBatch, LatentBatch)


def _to(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on the device."""

    def move(value):
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, dict):
            return {name: move(v) for name, v in value.items()}
        return value.to(device) if isinstance(value, GeneCounts) else value

    return replace(batch, **{f.name: move(getattr(batch, f.name)) for f in fields(batch)})
