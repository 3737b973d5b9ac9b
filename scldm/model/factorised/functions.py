"""What both halves of the cross-attention are computed with: autograd functions applied, vectors centred, the precision
of products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *inputs: Tensor | float) -> Tensor:
    result = function.apply(*inputs)
    assert isinstance(result, Tensor)
    return result


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The precision of matrix products: autocast's where it is on, else the parameters'."""
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


def centred(x: Tensor) -> Tensor:
    """x less its mean over the last axis."""
    return apply(_Centred, x)


class _Centred(torch.autograd.Function):
    """Its gradient is centred too: two passes, of which torch makes four, with the sum of both ways to x."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        return inputs[0] - inputs[0].mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] - grad_outputs[0].mean(-1, keepdim=True)
