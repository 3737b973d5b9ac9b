"""The decoder's SwiGLU with the head folded into it: of its hidden layer only sums leave a tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scldm.model.blocks import SwiGLU
from scldm.model.factorised.tiles import Space, kept_numbers


def folded(mlp: SwiGLU, head: nn.Linear) -> list[tuple[Tensor, Tensor]]:
    """The SwiGLU's first product for each of the head's numbers, as weight (2F, D) and bias (2F,).

    The half of the value is scaled so that the number is the plain sum of value * silu(gate). That can be done, as the
    last product and the head are both linear.
    """
    folded = []
    for w_F in head.weight @ mlp.out.weight:
        weight = torch.cat((mlp.value.weight * w_F[:, None], mlp.gate.weight))
        folded.append((weight, torch.cat((mlp.value.bias * w_F, mlp.gate.bias))))
    return folded


def side_by_side(numbers: list[Tensor]) -> Tensor:
    """A last axis of these. Of one without a copy."""
    return torch.stack(numbers, dim=-1) if len(numbers) > 1 else numbers[0][..., None]


class Head(torch.autograd.Function):
    """sum of value * silu(gate) with (value, gate) = W y + b: (rows,), at least in float32.

    Tiles of the hidden layer that `kept_numbers` have room for are kept for backward. The others are made again.
    y (rows, D); W (2F, D); b (2F,)
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        y_RD, W_FD, b_F = inputs
        out_R = y_RD.new_empty(len(y_RD), dtype=torch.promote_types(y_RD.dtype, torch.float32))
        space = Space(len(y_RD), len(b_F), y_RD)
        n_kept = kept_numbers(y_RD) // len(b_F) if any(ctx.needs_input_grad) else 0
        kept_KF = y_RD.new_empty(min(n_kept, len(y_RD)), len(b_F))
        for rows in space.slices():
            hidden, other = space.held(rows.stop - rows.start, len(b_F))
            if rows.stop <= len(kept_KF):
                hidden = torch.addmm(b_F, y_RD[rows], W_FD.T, out=kept_KF[rows])
                out_R[rows] = gated_sum(hidden, other)
            else:
                out_R[rows] = gated_sum(torch.addmm(b_F, y_RD[rows], W_FD.T, out=hidden), hidden)
        ctx.save_for_backward(*inputs, kept_KF)
        return out_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (d_out,) = grad_outputs
        y_RD, W_FD, b_F, kept_KF = ctx.saved_tensors
        d_y = torch.empty_like(y_RD)
        d_W, d_b = (torch.zeros_like(x, dtype=d_out.dtype) for x in (W_FD, b_F))
        space = Space(len(y_RD), len(b_F), y_RD)
        for rows in space.slices():
            hidden, other = space.held(rows.stop - rows.start, len(b_F))
            if rows.stop <= len(kept_KF):
                hidden = kept_KF[rows]
            else:
                torch.addmm(b_F, y_RD[rows], W_FD.T, out=hidden)
            d_hidden = gated_sum_backward(hidden, d_out[rows], other)
            torch.mm(d_hidden, W_FD, out=d_y[rows])
            add_product(d_W, d_hidden.T, y_RD[rows])
            d_b += d_hidden.sum(0)
        return d_y, d_W.to(W_FD.dtype), d_b.to(b_F.dtype)


def gated_sum(hidden: Tensor, other: Tensor) -> Tensor:
    """sum of value * silu(gate) over the last axis, which holds both. `other` is memory of its shape, or it itself."""
    value, gate = hidden.chunk(2, dim=-1)
    active = torch.ops.aten.silu.out(gate, out=other.chunk(2, dim=-1)[1])
    return active.mul_(value).sum(-1, dtype=torch.promote_types(hidden.dtype, torch.float32))


def gated_sum_backward(hidden: Tensor, d_out: Tensor, other: Tensor) -> Tensor:
    """Gradient to (value, gate), written over them. `other` is memory of the same shape."""
    value, gate = hidden.chunk(2, dim=-1)
    active = other.chunk(2, dim=-1)[0]
    d_out = d_out[..., None].to(hidden.dtype)
    torch.ops.aten.silu.out(gate, out=active)
    torch.ops.aten.silu_backward.grad_input(value.mul_(d_out), gate, grad_input=gate)
    torch.mul(active, d_out, out=value)
    return hidden


def add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out += x y, or of several. It takes no memory of its own where they are of one precision."""
    if out.dtype != x.dtype:
        out += x @ y
    elif x.ndim == 3:
        out.baddbmm_(x, y)
    else:
        out.addmm_(x, y)
