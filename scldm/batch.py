"""CellBatch and LatentBatch: the one contract between data and model.

The legend of shape letters, used everywhere: B cells, G genes of the vocabulary, S genes given to the encoder, Q genes
asked of the decoder, L latent tokens, Z latent width, D model width, N heads, H head width, C conditions. X is the
expressed genes of all cells of a batch, one cell after the other.

Reading order: GeneCounts, CellBatch, its compact form (CompactCounts, CompactCellBatch), LatentBatch, moving batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor


class Moved:
    """What is sent to a device with every tensor that it has."""

    def to(self, device: torch.device | str) -> Self:
        return _to(self, device)


@dataclass(frozen=True)
class GeneCounts(Moved):
    """Raw counts of a set of genes.

    gene_ids: vocabulary indices, int64. (S,) where the cells share one set, (B, S) where each has its own.
        0 is padding: it carries no count and is masked wherever it stands
    counts_BS: the integers as they were, any integer dtype
    padded: whether there may be padding. Where there is none, torch's attention kernels need no mask
    """

    gene_ids: Tensor
    counts_BS: Tensor
    padded: bool = True

    @property
    def mask(self) -> Tensor:
        """True where a gene stands, False at padding. The shape is that of `gene_ids`."""
        return self.gene_ids != 0


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """What every micro-batch says of its cells.

    library_size_all_B: total counts over all genes of the vocabulary, float32
    weight_B: 1.0, or 0.0 for the copies that fill up an epoch's last global batch
    conditions: condition name -> label ids (B,), int64
    cell_ids_B2: stable identity, (source number, row or soma_joinid), int64
    positions_B: position in the global batch, int64. With (seed, step) it keys every random draw for the cell
    n_cells: real cells in the whole global batch: sums of losses are divided by it
    """

    library_size_all_B: Tensor
    weight_B: Tensor
    conditions: dict[str, Tensor]
    cell_ids_B2: Tensor
    positions_B: Tensor
    n_cells: int

    def __len__(self) -> int:
        return self.weight_B.shape[0]  # len() of a tensor costs ten times as much


@dataclass(frozen=True)
class CellBatch(_Cells, Moved):
    """A micro-batch of cells as a loader yields it and the VAE's loss takes it.

    given: what the encoder sees
    asked: what the decoder is asked for and the likelihood judges
    library_size_B: total counts over the asked genes (padding excluded), float32
    """

    given: GeneCounts
    asked: GeneCounts
    library_size_B: Tensor


@dataclass(frozen=True)
class CompactCounts(Moved):
    """All counts of some cells in CSR as narrow as they come: 3 bytes an expressed gene up to 65,535 genes.

    start: (B + 1,) int32, where each cell's genes begin
    gene_ids_X: vocabulary indices, as `narrow_ids` gives them
    counts_X: uint8. 0 where the count is over 255, and at the few genes without a count, or padding, that come along
    large_at: int32, where those stand in `counts_X`
    large: what they are. int32, or int64 where a count of the whole set needs it, in this batch or not
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
        """Takes gene ids as uint16 or int32."""
        a, c, d, e = (torch.from_numpy(part) for part in (start, counts, large_at, large))
        return cls(a, narrow_ids(gene_ids), c, d, e, table_size)

    def dense(self) -> Tensor:
        """Counts of every vocabulary index, (B, table_size) on the device where the parts lie. Column 0, padding, is 0.
        The dtype of `large`: one for all batches of a set."""
        n, device = len(self.start) - 1, self.start.device
        start = self.start.long()
        cell_X = torch.repeat_interleave(torch.arange(n, device=device), start.diff(), output_size=len(self.gene_ids_X))
        gene_X = _wide_ids(self.gene_ids_X)
        counts_X = self.counts_X.to(self.large.dtype)
        counts_X[self.large_at.long()] = self.large
        out = torch.zeros((n, self.table_size), dtype=counts_X.dtype, device=device)
        out[cell_X, gene_X] = counts_X
        return out


@dataclass(frozen=True)
class CompactCellBatch(_Cells):
    """A CellBatch before its gene sets were gathered: `to(device)` sends this and gathers there, giving the CellBatch.

    csr: all counts of the cells
    given_ids, asked_ids: the gene sets, (S,) or (B, S), any integer dtype, int16 as `narrow_ids` gives it. The same
        tensor where the sets are the same
    """

    csr: CompactCounts
    given_ids: Tensor
    asked_ids: Tensor

    def to(self, device: torch.device | str) -> CellBatch:
        moved = _to(self, device)
        dense = moved.csr.dense()
        given = _gathered(dense, moved.given_ids, _padded(self.given_ids))
        asked = given if moved.asked_ids is moved.given_ids else _gathered(dense, moved.asked_ids, True)
        rest = {f.name: getattr(moved, f.name) for f in fields(_Cells)}
        return CellBatch(given=given, asked=asked, library_size_B=asked.counts_BS.sum(1).float(), **rest)


def _gathered(dense: Tensor, ids: Tensor, padded: bool) -> GeneCounts:
    """The counts of a gene set out of those of every vocabulary index."""
    gene_ids = _wide_ids(ids)
    return GeneCounts(gene_ids, dense[:, gene_ids] if gene_ids.ndim == 1 else dense.gather(1, gene_ids), padded)


def _padded(ids: Tensor) -> bool:
    """Whether there may be padding in a set. It is looked for where no device has to be waited for: on the CPU."""
    return ids.device.type != "cpu" or bool((ids == 0).any())


def narrow_ids(ids: np.ndarray) -> Tensor:
    """Vocabulary indices to be sent: uint16 as int16 of the same bits, since torch hardly computes with uint16. Other
    dtypes stay as they are."""
    return torch.from_numpy(ids.view(np.int16) if ids.dtype == np.uint16 else ids)


def _wide_ids(ids: Tensor) -> Tensor:
    """Vocabulary indices as int64, of what `narrow_ids` gave."""
    return ids.long() & 0xFFFF if ids.dtype == torch.int16 else ids.long()


@dataclass(frozen=True)
class LatentBatch(_Cells, Moved):
    """A micro-batch of encoded cells, for stage 2.

    latent_BLZ: posterior means, float32
    """

    latent_BLZ: Tensor


# --- moving batches --------------------------------------------------------------------------------------------------

Batch = TypeVar("Batch")


def pinned(batch: Batch) -> Batch:
    """The batch in pinned (page-locked) memory, from which a copy to a GPU runs beside other work. For CUDA alone.

    torch reuses the memory. Its caching host allocator rounds a request up to a power of two and keeps what is given
    back. It hands that out again once the copies from it are over. It asks CUDA for memory only where no such piece is
    free. It allocates in the context of a device that the process uses already, whatever the thread, so that a loader's
    thread opens none on GPU 0. Source: docs.pytorch.org, torch.cuda.host_memory_stats,
    ATen/cuda/CachingHostAllocator.cpp.
    """
    return _mapped(batch, Tensor.pin_memory, {})


def _to(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on the device."""
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True), {})


def _mapped(value: Any, f: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    """A batch, or a part of one, with f(tensor) for every tensor. f is called once for each, so that what was one
    object stays one, as the genes given and asked may be."""
    if isinstance(value, dict):
        return {name: _mapped(v, f, done) for name, v in value.items()}
    if not isinstance(value, Tensor) and not is_dataclass(value):
        return value
    if id(value) not in done:
        if isinstance(value, Tensor):
            done[id(value)] = f(value)
        else:
            parts = {part.name: _mapped(getattr(value, part.name), f, done) for part in fields(value)}
            done[id(value)] = replace(value, **parts)  # pyright: ignore[reportArgumentType]
    return done[id(value)]
