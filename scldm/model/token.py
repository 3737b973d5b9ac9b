"""A gene and its count as one vector, from which the encoder's queries read.

Reading order: TokenKind, GeneToken, basis, position.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

# bins: of the count's logarithm, each a vector of its own; linear: paper, Eq. 9, one vector times log1p(count)
TokenKind = Literal["bins", "linear"]
# centres at the counts 1, 3, 7, ... 2^16 - 1: more of a gene in a cell is told apart from nothing, but not from that
N_BINS = 16


class GeneToken(nn.Module):
    """e_g + sum over k of phi_k(count) u_k, with e_g = W E_g + b of the gene's embedding E_g.

    phi are few functions of the count, 0 at count 0, and every u_k is a parameter of its own. Eq. 9 projects
    [repeat_D(c), E_g], so that the count meets the *sum* of D columns, which an optimizer that takes equal steps in all
    of them moves D times as fast as a gene's vector: trained so, a token shows that a gene is expressed and no longer
    how much. `linear` is the same function with the sum as the parameter.

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
        """What `basis` takes, in the precision of the parameters; the shape of `counts`."""
        return position(counts.to(self.count.dtype), self.kind)

    def phi(self, counts: Tensor) -> Tensor:
        """phi_k of each count, (..., K)."""
        return basis(self.position(counts), self.kind)


def position(counts: Tensor, kind: TokenKind) -> Tensor:
    """Where counts lie on the scale of the functions: log2(1 + count) up to N_BINS, or log1p(count)."""
    if kind == "linear":
        return torch.log1p(counts)
    return torch.log2(1 + counts).clamp_max(N_BINS)


def basis(x: Tensor, kind: TokenKind) -> Tensor:
    """phi of positions, (..., K): bins: max(0, 1 - |x - k|) for k = 1 to K, of which two at most are not 0."""
    if kind == "linear":
        return x[..., None]
    centre_K = torch.arange(1, N_BINS + 1, dtype=x.dtype, device=x.device)
    return (1 - (x[..., None] - centre_K).abs()).clamp_min(0)
