"""Genes -> latent tokens: attention whose keys and values are sums of two table entries, streamed over the genes.

Forward: a program takes a head of a few cells, and goes over all genes with an online softmax. Of each block it holds
the scores (cells x M x genes) and adds `p r values` to what is read; nothing is written but the result.
Backward: a program takes a head of a block of genes, and goes over all cells, making scores again from the
log of their sum; so a gene's gradients are summed in registers. Where each cell has its own set, a table's
row has genes of several cells, and their gradients meet in atomic additions, in no fixed order.

Reading order: pool, _Pool, the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scldm.kernels.tile import dot, launch, power_of_two

ROWS = 128  # cells x latent tokens of a program: two warp groups' worth of a matrix product
GENES = 64  # of a block: 128 x 64 scores x 4 B = 32 kB of the 256 kB of registers
STAGES = 3  # blocks whose loads are in flight


def pool(
    c_BS: Tensor, r_BS: Tensor, row: Tensor, alpha_NM: Tensor, A_TNM: Tensor, values_TNH: Tensor, a_NH: Tensor
) -> Tensor:
    """`plain.pool`, (B, N, M, H). Products in the precision of the values, all else in that of the others."""
    inputs = (c_BS.contiguous(), r_BS.contiguous(), row.to(torch.int32).contiguous(), alpha_NM.contiguous())
    out = _Pool.apply(*inputs, A_TNM.contiguous(), values_TNH.contiguous(), a_NH.contiguous())
    assert isinstance(out, Tensor)
    return out


class _Pool(torch.autograd.Function):
    """Counts c get no gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        c_BS, r_BS, row, alpha_NM, A_TNM, values_TNH, a_NH = inputs
        (B, S), (N, M), H = c_BS.shape, alpha_NM.shape, a_NH.shape[1]
        read = c_BS.new_empty(B, N, M, H)
        wc, lse = c_BS.new_empty(B, N, M), c_BS.new_empty(B, N, M)
        shared, latents = row.ndim == 1, power_of_two(M)
        cells = max(1, ROWS // latents) if shared else 1
        launch(
            _forward,
            (triton.cdiv(B, cells), N),
            *(c_BS, r_BS, row, alpha_NM, A_TNM, values_TNH, read, wc, lse),
            *(B, S, N, M, H, 0 if shared else S),
            CELLS=cells,
            LATENTS=latents,
            HEAD=power_of_two(H),
            GENES=GENES,
            BF16=values_TNH.dtype == torch.bfloat16,
            stages=STAGES,
        )
        out = torch.addcmul(read, wc[..., None], a_NH[:, None])
        ctx.save_for_backward(*inputs, out, wc, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_out = grad_outputs[0].contiguous()
        c_BS, r_BS, row, alpha_NM, A_TNM, values_TNH, a_NH, out, wc, lse = ctx.saved_tensors
        (B, S), (N, M), H = c_BS.shape, alpha_NM.shape, a_NH.shape[1]
        delta, d_wc = (d_out * out).sum(-1), (d_out * a_NH[:, None]).sum(-1)
        d_a = torch.einsum("bnmh,bnm->nh", d_out, wc)
        shared, blocks = row.ndim == 1, triton.cdiv(S, GENES)
        d_A, d_values = torch.zeros_like(A_TNM), torch.zeros_like(values_TNH, dtype=c_BS.dtype)
        d_r = c_BS.new_empty(N, B, S)
        d_alpha = c_BS.new_empty(1 if shared else B, blocks, N, M)
        launch(
            _backward,
            (blocks, N, 1 if shared else B),
            *(c_BS, r_BS, row, alpha_NM, A_TNM, values_TNH, d_out, lse, delta, d_wc, d_r, d_alpha, d_A, d_values),
            *(B, S, N, M, H, 0 if shared else S),
            SHARED=shared,
            LATENTS=power_of_two(M),
            HEAD=power_of_two(H),
            GENES=GENES,
            BF16=values_TNH.dtype == torch.bfloat16,
            stages=STAGES,
        )
        return None, d_r.sum(0), None, d_alpha.sum((0, 1)), d_A, d_values.to(values_TNH.dtype), d_a


@triton.jit
def _forward(
    c_ptr, r_ptr, row_ptr, alpha_ptr, A_ptr, values_ptr, read_ptr, wc_ptr, lse_ptr,
    B, S, N, M, H, row_stride,
    CELLS: tl.constexpr, LATENTS: tl.constexpr, HEAD: tl.constexpr, GENES: tl.constexpr,
    BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """CELLS cells, one head, all genes. row_stride: 0 where cells share a set, else S and CELLS is 1."""
    wide = c_ptr.dtype.element_ty
    n, first = tl.program_id(1), tl.program_id(0).to(tl.int64) * CELLS
    cell, latent, channel = first + tl.arange(0, CELLS), tl.arange(0, LATENTS), tl.arange(0, HEAD)
    alpha = tl.load(alpha_ptr + n * M + latent, mask=latent < M, other=0.0)
    largest = tl.full([CELLS, LATENTS], -1e30, wide)
    total = tl.zeros([CELLS, LATENTS], wide)
    wc = tl.zeros([CELLS, LATENTS], wide)
    read = tl.zeros([CELLS * LATENTS, HEAD], wide)
    for start in range(0, S, GENES):
        gene = start + tl.arange(0, GENES)
        row = tl.load(row_ptr + first * row_stride + gene, mask=gene < S, other=-1).to(tl.int64)
        there = row >= 0
        at = cell[:, None] * S + gene[None, :]
        inside = (cell < B)[:, None] & there[None, :]
        c = tl.load(c_ptr + at, mask=inside, other=0.0)[:, None, :]
        r = tl.load(r_ptr + at, mask=inside, other=0.0)[:, None, :]
        A = tl.load(
            A_ptr + (row * N + n)[None, :] * M + latent[:, None],
            mask=there[None, :] & (latent < M)[:, None],
            other=0.0,
        )
        values = tl.load(
            values_ptr + (row * N + n)[:, None] * H + channel[None, :],
            mask=there[:, None] & (channel < H)[None, :],
            other=0.0,
        )
        score = tl.where(there[None, None, :], r * (c * alpha[None, :, None] + A[None, :, :]), -1e30)
        larger = tl.maximum(largest, tl.max(score, 2))
        p = tl.where(there[None, None, :], tl.exp(score - larger[:, :, None]), 0.0)
        w = p * r
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(p, 2)
        wc = wc * shrink + tl.sum(w * c, 2)
        read = read * tl.reshape(shrink, [CELLS * LATENTS])[:, None]
        read = dot(tl.reshape(w, [CELLS * LATENTS, GENES]), values, read, BF16, INTERPRETED)
        largest = larger
    some = total > 0  # no gene at all: what is read is 0
    over = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    at = (cell[:, None] * N + n) * M + latent[None, :]
    inside = (cell < B)[:, None] & (latent < M)[None, :]
    tl.store(wc_ptr + at, wc * over, mask=inside)
    tl.store(lse_ptr + at, tl.where(some, largest + tl.log(tl.where(some, total, 1.0)), 0.0), mask=inside)
    read = read * tl.reshape(over, [CELLS * LATENTS])[:, None]
    at = tl.reshape(at, [CELLS * LATENTS])[:, None] * H + channel[None, :]
    inside = tl.reshape(inside, [CELLS * LATENTS])[:, None] & (channel < H)[None, :]
    tl.store(read_ptr + at, read, mask=inside)


@triton.jit
def _backward(
    c_ptr, r_ptr, row_ptr, alpha_ptr, A_ptr, values_ptr, d_out_ptr, lse_ptr, delta_ptr, d_wc_ptr,
    d_r_ptr, d_alpha_ptr, d_A_ptr, d_values_ptr,
    B, S, N, M, H, row_stride,
    SHARED: tl.constexpr, LATENTS: tl.constexpr, HEAD: tl.constexpr, GENES: tl.constexpr,
    BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A block of genes, one head, all cells; or, where each has its own set, one cell."""
    wide = c_ptr.dtype.element_ty
    block, n, only = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gene, latent, channel = block * GENES + tl.arange(0, GENES), tl.arange(0, LATENTS), tl.arange(0, HEAD)
    row = tl.load(row_ptr + only * row_stride + gene, mask=gene < S, other=-1).to(tl.int64)
    there, in_M, in_H = row >= 0, latent < M, channel < H
    alpha = tl.load(alpha_ptr + n * M + latent, mask=in_M, other=0.0)
    A_at = (row * N + n)[None, :] * M + latent[:, None]
    values_at = (row * N + n)[:, None] * H + channel[None, :]
    A = tl.load(A_ptr + A_at, mask=there[None, :] & in_M[:, None], other=0.0)
    values = tl.load(values_ptr + values_at, mask=there[:, None] & in_H[None, :], other=0.0)
    d_A = tl.zeros([LATENTS, GENES], wide)
    d_alpha = tl.zeros([LATENTS], wide)
    d_values = tl.zeros([GENES, HEAD], wide)
    for cell in range(only, B if SHARED else only + 1):
        c = tl.load(c_ptr + cell * S + gene, mask=there, other=0.0)[None, :]
        r = tl.load(r_ptr + cell * S + gene, mask=there, other=0.0)[None, :]
        at = (cell * N + n) * M + latent
        lse = tl.load(lse_ptr + at, mask=in_M, other=0.0)[:, None]
        delta = tl.load(delta_ptr + at, mask=in_M, other=0.0)[:, None]
        d_wc = tl.load(d_wc_ptr + at, mask=in_M, other=0.0)[:, None]
        d_out = tl.load(d_out_ptr + at[:, None] * H + channel[None, :], mask=in_M[:, None] & in_H[None, :], other=0.0)
        t = c * alpha[:, None] + A
        p = tl.where(there[None, :] & in_M[:, None], tl.exp(t * r - lse), 0.0)
        w = p * r
        d_values = dot(tl.trans(w), d_out, d_values, BF16, INTERPRETED)
        d_w = dot(d_out, tl.trans(values), tl.zeros([LATENTS, GENES], wide), BF16, INTERPRETED) + d_wc * c
        d_score = w * d_w - p * delta
        tl.store(d_r_ptr + (n * B + cell) * S + gene, tl.sum(p * d_w + d_score * t, 0), mask=gene < S)
        d_t = d_score * r
        d_A += d_t
        d_alpha += tl.sum(d_t * c, 1)
    tl.store(d_alpha_ptr + ((only * tl.num_programs(0) + block) * N + n) * M + latent, d_alpha, mask=in_M)
    if SHARED:
        tl.store(d_A_ptr + A_at, d_A, mask=there[None, :] & in_M[:, None])
        tl.store(d_values_ptr + values_at, d_values, mask=there[:, None] & in_H[None, :])
    else:
        tl.atomic_add(d_A_ptr + A_at, d_A, mask=there[None, :] & in_M[:, None], sem="relaxed")
        tl.atomic_add(d_values_ptr + values_at, d_values, mask=there[:, None] & in_H[None, :], sem="relaxed")
