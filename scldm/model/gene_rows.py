"""Which embeddings some genes of some cells have. What depends on the gene alone is then computed once for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GeneRows:
    """table_TD: embeddings
    row: index into the table, (S,) or (B, S). None where it counts up: the table holds each given gene in its order
    shape: of the set, (S,) or (B, S)
    """

    table_TD: Tensor
    row: Tensor | None
    shape: torch.Size

    @property
    def per_cell(self) -> bool:
        return len(self.shape) == 2

    @property
    def rows(self) -> Tensor:
        """`row`, also where it counts up."""
        if self.row is not None:
            return self.row
        return torch.arange(len(self.table_TD), device=self.table_TD.device).view(self.shape)


def by_vocabulary(gene_ids: Tensor, embedding: nn.Embedding) -> bool:
    """Whether the table is the whole vocabulary: where the sets of all cells hold more genes."""
    return gene_ids.ndim == 2 and gene_ids.numel() > embedding.num_embeddings


def rows_of(gene_ids: Tensor, embedding: nn.Embedding, embedded: Tensor | None = None) -> GeneRows:
    """embedded: embeddings of these genes, (S, D) or (B, S, D), if the caller has them."""
    if by_vocabulary(gene_ids, embedding):
        return GeneRows(embedding.weight, gene_ids, gene_ids.shape)
    table: Tensor = embedding(gene_ids) if embedded is None else embedded
    return GeneRows(table.flatten(0, -2), None, gene_ids.shape)
