"""A gene and its count as one vector, from which the encoder's queries read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scldm.count_basis import N_BINS, TokenKind, basis, position


class GeneToken(nn.Module):
    """e_g + sum over k of phi_k(count) u_k, with e_g = W E_g + b of the gene's embedding E_g.

    phi are few functions of the count (scldm/count_basis.py), and every u_k is a parameter of its own. Eq. 9 projects
    [repeat_D(c), E_g], so that the count meets the *sum* of D columns. An optimizer that takes equal steps in all of
    them moves the sum D times as fast as a gene's vector. Trained so, a token shows that a gene is expressed and no
    longer how much. `linear` is the same function with the sum as the parameter.

    Soft bins rather than hard ones: neighbouring counts share vectors, as they mean much the same.
    """

    def __init__(self, width: int, kind: TokenKind = "bins") -> None:
        super().__init__()
        self.kind: TokenKind = kind
        self.gene = nn.Linear(width, width)
        self.count = nn.Parameter(torch.empty(N_BINS if kind == "bins" else 1, width))

    def forward(self, embedded: Tensor, counts_BS: Tensor) -> Tensor:
        """(B, S, D).

        embedded: embeddings of the genes, (S, D) shared by the cells or (B, S, D)
        """
        e_D = self.gene(embedded)
        with torch.autocast(embedded.device.type, enabled=False):  # counts are told apart by less than bf16 resolves
            return e_D + self.phi(counts_BS) @ self.count

    def position(self, counts: Tensor) -> Tensor:
        """What `basis` takes, in the precision of the parameters. The shape is that of `counts`."""
        return position(counts.to(self.count.dtype), self.kind)

    def phi(self, counts: Tensor) -> Tensor:
        """phi_k of each count, (..., K)."""
        return basis(self.position(counts), self.kind)
