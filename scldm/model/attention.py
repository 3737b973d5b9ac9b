"""Multi-head attention, written as its formula: the specification that every faster path is tested against.

Keys have neither a bias nor, where they come from a LayerNorm, a shift: both add one number to all scores of a query,
which the softmax removes, so their true gradient is zero and AdamW would turn its rounding noise into full steps.
Reading order: attention, SelfAttention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(H)) v for each of N heads of width H = D / N; (..., Lq, D).

    q, k, v: (..., Lq, D), (..., Lk, D), (..., Lk, D); leading dimensions broadcast
    mask: (..., Lk), True where a key may be attended; attention over no key at all is 0
    """
    q, k, v = (_split_heads(x, n_heads) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (..., N, Lq, Lk)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        mask = mask[..., None, None, :]
        # the lowest finite number, not -inf: a row without any key would be NaN, in its gradient too
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
    return _join_heads(weights @ v)


def _split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(..., L, D) -> (..., N, L, H)"""
    return x.unflatten(-1, (n_heads, -1)).transpose(-2, -3)


def _join_heads(x: Tensor) -> Tensor:
    """(..., N, L, H) -> (..., L, D)"""
    return x.transpose(-2, -3).flatten(-2)


class SelfAttention(nn.Module):
    """Attention of tokens to one another, with its four projections."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)
        return self.out(attention(q, k, v, self.n_heads))
