"""CellBatch and LatentBatch: the one contract between data and model.

The legend of shape letters, used everywhere: B cells, G genes of the vocabulary, S genes given to the encoder, Q genes
asked of the decoder, L latent tokens, Z latent width, D model width, N heads, H head width, C conditions; X is the
expressed genes of all cells of a batch, one cell after the other.

Reading order: GeneCounts, CellBatch, its compact form (CompactCounts, CompactCellBatch), LatentBatch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
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
        return GeneCounts(self.gene_ids.to(device, non_blocking=True), self.counts_BS.to(device, non_blocking=True))


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
        return self.weight_B.shape[0]  # len() of a tensor costs ten times as much

    def to(self, device: torch.device | str) -> CellBatch:
        return _to(self, device)


@dataclass(frozen=True)
class CompactCounts:
    """All counts of some cells in CSR as narrow as they come: 3 bytes an expressed gene up to 65,535 genes.

    start: (B + 1,) int32, where each cell's genes begin
    gene_ids_X: vocabulary indices; int16 that is to be read as unsigned, or int32 for larger vocabularies
    counts_X: uint8, 0 where the count is over 255
    large_at: int32, where those stand in `counts_X`
    large: what they are; int32, or int64 where a count of the whole set needs it, be it in this batch or not
    table_size: genes of the vocabulary, and one for padding
    """

    start: Tensor
    gene_ids_X: Tensor
    counts_X: Tensor
    large_at: Tensor
    large: Tensor
    table_size: int

    @classmethod
    def from_numpy(
        cls,
        start: np.ndarray,
        gene_ids: np.ndarray,
        counts: np.ndarray,
        large_at: np.ndarray,
        large: np.ndarray,
        table_size: int,
    ) -> CompactCounts:
        """Takes gene ids as uint16 or int32. Where there is a GPU the tensors lie in pinned memory, which torch reuses
        once the copy to the device is done."""
        narrow = gene_ids.view(np.int16) if gene_ids.dtype == np.uint16 else gene_ids
        a, b, c, d, e = (pinned(torch.from_numpy(part)) for part in (start, narrow, counts, large_at, large))
        return cls(a, b, c, d, e, table_size)

    def to(self, device: torch.device | str) -> CompactCounts:
        return _to(self, device)

    def dense(self) -> Tensor:
        """Counts of every vocabulary index, (B, table_size) on the device where the parts lie; column 0, padding, is 0.
        The dtype of `large`: one for all batches of a set."""
        n, device = len(self.start) - 1, self.start.device
        start = self.start.long()
        cell_X = torch.repeat_interleave(torch.arange(n, device=device), start.diff(), output_size=len(self.gene_ids_X))
        gene_X = self.gene_ids_X.long()
        if self.gene_ids_X.dtype == torch.int16:
            gene_X = gene_X & 0xFFFF
        counts_X = self.counts_X.to(self.large.dtype)
        counts_X[self.large_at.long()] = self.large
        out = torch.zeros((n, self.table_size), dtype=counts_X.dtype, device=device)
        out[cell_X, gene_X] = counts_X
        return out


@dataclass(frozen=True)
class CompactCellBatch:
    """A CellBatch before its gene sets were gathered: `to(device)` sends this and gathers there, giving the CellBatch.

    csr: all counts of the cells
    given_ids, asked_ids: the gene sets, (S,) or (B, S), any integer dtype; the same tensor where the sets are the same
    The other fields are CellBatch's.
    """

    csr: CompactCounts
    given_ids: Tensor
    asked_ids: Tensor
    library_size_all_B: Tensor
    weight_B: Tensor
    conditions: dict[str, Tensor]
    cell_ids_B2: Tensor
    positions_B: Tensor
    n_cells: int

    def __len__(self) -> int:
        return self.weight_B.shape[0]  # len() of a tensor costs ten times as much

    def to(self, device: torch.device | str) -> CellBatch:
        same = self.given_ids is self.asked_ids
        moved = _to(self, device)
        dense = moved.csr.dense()
        given = _gathered(dense, moved.given_ids)
        asked = given if same else _gathered(dense, moved.asked_ids)
        rest = {
            f.name: getattr(moved, f.name) for f in fields(moved) if f.name not in ("csr", "given_ids", "asked_ids")
        }
        return CellBatch(given=given, asked=asked, library_size_B=asked.counts_BS.sum(1).float(), **rest)


def _gathered(dense: Tensor, ids: Tensor) -> GeneCounts:
    """The counts of a gene set out of those of every vocabulary index."""
    gene_ids = ids.long()
    return GeneCounts(gene_ids, dense[:, gene_ids] if gene_ids.ndim == 1 else dense.gather(1, gene_ids))


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in pinned memory where there is a GPU, else as it is."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


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
        return self.weight_B.shape[0]  # len() of a tensor costs ten times as much

    def to(self, device: torch.device | str) -> LatentBatch:
        return _to(self, device)


Batch = TypeVar("Batch", CellBatch, CompactCellBatch, CompactCounts, LatentBatch)


def _to(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on the device."""

    def move(value):
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, dict):
            return {name: move(v) for name, v in value.items()}
        return value.to(device) if isinstance(value, (GeneCounts, CompactCounts)) else value

    return replace(batch, **{f.name: move(getattr(batch, f.name)) for f in fields(batch)})
