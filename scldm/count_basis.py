"""A few functions of a count, of which a gene's token is made (scldm/model/token.py). They are 0 at count 0."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# bins: of the count's logarithm, each a vector of its own. linear: paper, Eq. 9, one vector times log1p(count)
TokenKind = Literal["bins", "linear"]
# centres at the counts 1, 3, 7, ... 2^16 - 1: more of a gene in a cell is told apart from nothing, but not from that
N_BINS = 16


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
