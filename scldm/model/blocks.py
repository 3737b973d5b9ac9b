"""What the networks are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from scldm.model.attention import AttentionKind, SelfAttention


class SwiGLU(nn.Module):
    """MLP(x) = W_3 (W_1 x * silu(W_2 x)). Source: paper, Eq. 7. A hidden width of 8/3 D gives the paper's sizes."""

    def __init__(self, width: int, bias_out: bool = True) -> None:
        super().__init__()
        hidden = hidden_width(width)
        self.value = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width, bias=bias_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(x) * F.silu(self.gate(x)))


def hidden_width(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 16 for the matrix units."""
    return -(-8 * width // 48) * 16


class TransformerBlock(nn.Module):
    """Pre-LayerNorm attention, then pre-LayerNorm MLP, each added to its input."""

    def __init__(self, width: int, n_heads: int, kind: AttentionKind = "plain") -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, n_heads, kind)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm_attention(x_BLD))
        return x_BLD + self.mlp(self.norm_mlp(x_BLD))


class Within(nn.Module):
    """Calls a function that reads parameters of other modules than those it calls.

    An engine that shards weights gathers them around the forward of modules, and again before the backward of what they
    return, if that is a tensor. So such a function is called within a module, and returns one.
    """

    def forward(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return function(*inputs)
