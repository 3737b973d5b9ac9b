"""One over the standard deviation of a gene's token, of its count's position and two table entries of the gene.

The K functions phi of a count are made where they are needed: nothing of size cells x genes x K is written.
Forward: a program takes a block of genes of one cell. Backward: it takes a block of genes and goes over all cells, so
that a gene's gradients are summed in registers. Where each cell has its own set, a table's row has genes of several
cells, and their gradients meet in atomic additions, in no fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scldm.count_basis import TokenKind
from scldm.kernels.tile import LEAST, Tile, ceil_div, launch, phi_of

TILE = Tile(genes=64, warps=4, stages=2)


def one_over_deviation(
    x_BS: Tensor, row: Tensor, uu_KK: Tensor, ue_TK: Tensor, ee_T: Tensor, eps: float, kind: TokenKind
) -> Tensor:
    """(phi uu phi + 2 phi ue + ee + eps)^-1/2 with the K numbers phi(x) of a count, (B, S), in the precision of x."""
    inputs = (x_BS.contiguous(), row.to(torch.int32).contiguous(), uu_KK.contiguous(), ue_TK.contiguous())
    r_BS = _OneOverDeviation.apply(*inputs, ee_T.contiguous(), eps, kind)
    assert isinstance(r_BS, Tensor)
    return r_BS


class _OneOverDeviation(torch.autograd.Function):
    """Counts get no gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, eps, kind = inputs
        x_BS, row, _, ue_TK, _ = tensors
        (B, S), K = x_BS.shape, ue_TK.shape[1]
        r_BS = torch.empty_like(x_BS)
        launch(
            _forward,
            (ceil_div(S, TILE.genes), B),
            *(*tensors, r_BS, S, K, eps, 0 if row.ndim == 1 else S),
            FUNCTIONS=LEAST,
            BINS=kind == "bins",
            tile=TILE,
        )
        ctx.save_for_backward(*tensors, r_BS)
        ctx.kind = kind
        return r_BS

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_r = grad_outputs[0].contiguous()
        x_BS, row, uu_KK, ue_TK, ee_T, r_BS = ctx.saved_tensors
        (B, S), K, shared = x_BS.shape, ue_TK.shape[1], row.ndim == 1
        grid = (ceil_div(S, TILE.genes), 1 if shared else B)
        d_uu, d_ue, d_ee = x_BS.new_empty(*grid, K, K), torch.zeros_like(ue_TK), torch.zeros_like(ee_T)
        launch(
            _backward,
            grid,
            *(x_BS, row, uu_KK, ue_TK, ee_T, r_BS, d_r, d_uu, d_ue, d_ee, B, S, K, 0 if shared else S),
            SHARED=shared,
            FUNCTIONS=LEAST,
            BINS=ctx.kind == "bins",
            tile=TILE,
        )
        return None, None, d_uu.sum((0, 1)), d_ue, d_ee, None, None


@triton.jit
def _variance(phi, uu, ue, ee):
    """phi uu phi + 2 phi ue + ee of a block of genes: the square of LayerNorm's deviation, before eps."""
    return tl.sum(phi * tl.dot(phi, uu, 2 * ue, input_precision="ieee", out_dtype=ue.dtype), 1) + ee


@triton.jit
def _forward(
    x_ptr, row_ptr, uu_ptr, ue_ptr, ee_ptr, r_ptr,
    S, K, eps, row_stride,
    GENES: tl.constexpr, FUNCTIONS: tl.constexpr, BINS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A block of genes of one cell. 0 where there is no gene."""
    cell = tl.program_id(1).to(tl.int64)
    gene, k = tl.program_id(0) * GENES + tl.arange(0, GENES), tl.arange(0, FUNCTIONS)
    row = tl.load(row_ptr + cell * row_stride + gene, mask=gene < S, other=-1).to(tl.int64)
    there, in_K = row >= 0, k < K
    uu = tl.load(uu_ptr + k[:, None] * K + k[None, :], mask=in_K[:, None] & in_K[None, :], other=0.0)
    ue = tl.load(ue_ptr + row[:, None] * K + k[None, :], mask=there[:, None] & in_K[None, :], other=0.0)
    ee = tl.load(ee_ptr + row, mask=there, other=0.0)
    x = tl.load(x_ptr + cell * S + gene, mask=there, other=0.0)
    variance = _variance(phi_of(x[:, None], k[None, :], BINS), uu, ue, ee)
    r = tl.where(there, 1 / tl.sqrt(tl.maximum(variance, 0.0) + eps), 0.0)
    tl.store(r_ptr + cell * S + gene, r, mask=gene < S)


@triton.jit
def _backward(
    x_ptr, row_ptr, uu_ptr, ue_ptr, ee_ptr, r_ptr, d_r_ptr, d_uu_ptr, d_ue_ptr, d_ee_ptr,
    B, S, K, row_stride,
    SHARED: tl.constexpr, GENES: tl.constexpr, FUNCTIONS: tl.constexpr, BINS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A block of genes, all cells. Where each has its own set, one cell."""
    wide = x_ptr.dtype.element_ty
    block, only = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gene, k = block * GENES + tl.arange(0, GENES), tl.arange(0, FUNCTIONS)
    row = tl.load(row_ptr + only * row_stride + gene, mask=gene < S, other=-1).to(tl.int64)
    there, in_K = row >= 0, k < K
    of_uu, in_KK = k[:, None] * K + k[None, :], in_K[:, None] & in_K[None, :]
    ue_at, of_ue = row[:, None] * K + k[None, :], there[:, None] & in_K[None, :]
    uu = tl.load(uu_ptr + of_uu, mask=in_KK, other=0.0)
    ue = tl.load(ue_ptr + ue_at, mask=of_ue, other=0.0)
    ee = tl.load(ee_ptr + row, mask=there, other=0.0)
    d_uu = tl.zeros([FUNCTIONS, FUNCTIONS], wide)
    d_ue = tl.zeros([GENES, FUNCTIONS], wide)
    d_ee = tl.zeros([GENES], wide)
    for cell in range(only, B if SHARED else only + 1):
        x = tl.load(x_ptr + cell * S + gene, mask=there, other=0.0)
        r = tl.load(r_ptr + cell * S + gene, mask=there, other=0.0)
        d_r = tl.load(d_r_ptr + cell * S + gene, mask=there, other=0.0)
        phi = phi_of(x[:, None], k[None, :], BINS)
        # a variance below 0, by rounding, was counted as 0
        d_variance = tl.where(_variance(phi, uu, ue, ee) < 0, 0.0, -0.5 * d_r * r * r * r)
        scaled = phi * d_variance[:, None]
        d_uu = tl.dot(tl.trans(phi), scaled, d_uu, input_precision="ieee", out_dtype=wide)
        d_ue += 2 * scaled
        d_ee += d_variance
    tl.store(d_uu_ptr + (block * tl.num_programs(1) + only) * K * K + of_uu, d_uu, mask=in_KK)
    if SHARED:
        tl.store(d_ue_ptr + ue_at, d_ue, mask=of_ue)
        tl.store(d_ee_ptr + row, d_ee, mask=there)
    else:
        tl.atomic_add(d_ue_ptr + ue_at, d_ue, mask=of_ue, sem="relaxed")
        tl.atomic_add(d_ee_ptr + row, d_ee, mask=there, sem="relaxed")
