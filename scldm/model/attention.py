"""Multi-head attention: its formula, the specification that every faster path is tested against, and torch's kernels.

Keys have neither a bias nor, where they come from a LayerNorm, a shift. Both add one number to all scores of a query,
which the softmax removes. So their true gradient is zero, and AdamW would turn its rounding noise into full steps.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Way = Literal["plain", "sdpa", "factorised", "fused"]
AttentionKind = Literal["auto", "plain", "sdpa", "factorised", "fused"]


class Choice(NamedTuple):
    """A way of computing attention, and why it was chosen."""

    way: Way
    why: str

    def __str__(self) -> str:
        return f"{self.way} ({self.why})"


def fastest(device: str, dtype: torch.dtype, refusal: str) -> Choice:
    """The fastest of the ways that are exact and fit into memory: what `auto` is.

    1. `fused` on an NVIDIA GPU, for products in bf16, where its kernels can run and take the shape.
    2. `factorised` everywhere else: on a CPU, in float32, and for shapes that the kernels refuse.

    `plain` and `sdpa` are never it. Both make keys, values and a hidden layer for every cell and gene. By a roofline
    model of an H100, a step of vae/20m in bf16 (8,192 genes) takes them more time than `factorised`. That holds at 32
    and at 128 cells, with one set for all and with a set each. Their memory grows with cells x genes, while
    that of `factorised` is a share of the device's (`tiles.TILE_SHARE`) beside the tables. In float32 a multiprocessor
    has room for one block of the kernels, and not for two (benchmarks/kernels-compiled.json).

    device: a torch device's type
    dtype: of matrix products
    refusal: why fused kernels can't run there or don't take the shape. Empty where they can
    """
    if device != "cuda":
        return Choice("factorised", f"the fastest on {device}")
    if dtype != torch.bfloat16:
        return Choice("factorised", f"the fastest on {device} in {str(dtype).removeprefix('torch.')}")
    return Choice("factorised", refusal) if refusal else Choice("fused", f"the fastest on {device} in bfloat16")


def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(H)) v for each of N heads of width H = D / N, (..., Lq, D).

    q, k, v: (..., Lq, D), (..., Lk, D), (..., Lk, D). Leading dimensions broadcast
    mask: (..., Lk), True where a key may be attended. Attention over no key at all is 0
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


def sdpa(q: Tensor, k: Tensor, v: Tensor, n_heads: int, mask: Tensor | None = None) -> Tensor:
    """`attention` by torch's fused kernels, which write no scores.

    On a GPU they want four axes, and batches that are equal, not broadcast: a query that all cells share is expanded.
    Flash attention is taken in bf16, without a mask, for heads of at most 256 channels. A head can't be cut into
    several: its scores are a sum over all its channels. So the one decoder head of vae/70m (512) and vae/270m (1,024),
    float32 and cells with padding get the memory-efficient kernel.
    """
    q, k, v = (_split_heads(x, n_heads) for x in (q, k, v))
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
    q, k, v = (x.expand(*lead, *x.shape[-2:]) for x in (q, k, v))
    if mask is None:
        return _join_heads(F.scaled_dot_product_attention(q, k, v))
    mask = mask[..., None, None, :]
    some = mask.any(-1, keepdim=True)
    # a row without any key would be NaN in some of the kernels, so it reads all, and what it reads is dropped
    return _join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some) * some)


def _split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(..., L, D) -> (..., N, L, H)"""
    return x.unflatten(-1, (n_heads, -1)).transpose(-2, -3)


def _join_heads(x: Tensor) -> Tensor:
    """(..., N, L, H) -> (..., L, D)"""
    return x.transpose(-2, -3).flatten(-2)


class SelfAttention(nn.Module):
    """Attention of tokens to one another, with its four projections."""

    def __init__(self, width: int, n_heads: int, kind: AttentionKind = "plain") -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attend = attention if kind == "plain" else sdpa
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)
        return self.out(self.attend(q, k, v, self.n_heads))
