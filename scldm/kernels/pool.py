"""Genes -> latent tokens: attention whose keys and values are sums of two table entries, streamed over the genes.

Forward: a program takes a head of a few cells, and goes over all genes with an online softmax. Of each block it holds
the scores (cells x M x genes) and adds `p r values` to what is read. Nothing is written but the result. With few cells,
programs take parts of the genes, and what they read is combined. A count's K
functions phi are made from its position where they are needed. Each cell has its own factor for them, and yet all
cells of a program go through one product: the first factor is alpha in a cell's own columns and 0 in the others'.
Backward: a program takes a head of a block of genes, and goes over all cells, making scores again from the
log of their sum. So a gene's gradients are summed in registers. Where each cell has its own set, a table's
row has genes of several cells, and their gradients meet in atomic additions, in no fixed order.

Reading order: forward_tile, backward_tile, parts, pool, _Pool, combined, the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scldm.count_basis import N_BINS, TokenKind
from scldm.kernels.tile import LEAST, Tile, ceil_div, dot, launch, phi_of, power_of_two

MOST_CELLS = 4  # of a program: the functions of their counts are the columns of one product
# of a launch, for few cells: four on each of an H100's 132 multiprocessors. The same on all GPUs, as the sums of the
# parts of the genes are rounded apart
PROGRAMS = 528
LEAST_BLOCKS = 2  # of genes in a part
assert N_BINS <= LEAST


def forward_tile(latents: int, head: int, bf16: bool, shared: bool) -> tuple[int, Tile]:
    """How many cells a program takes, and its tile. The cells of a program share the loads of the tables."""
    rows = 128 if bf16 and head <= 128 else 64  # cells x latent tokens: 128 x 32 scores x 4 B = 16 kB of registers
    cells = max(1, min(MOST_CELLS, rows // latents)) if shared else 1
    if not bf16:  # products without matrix units, whose operands lie in registers
        return cells, Tile(genes=16, warps=8, stages=2)
    warps = 8 if cells * latents > 64 else 4
    return cells, Tile(genes=32, warps=warps, stages=3, registers=128) if head <= 64 else Tile(32, 8, 2)


def backward_tile(latents: int, head: int, bf16: bool, shared: bool) -> Tile:
    if not bf16:
        # of a large tile, a program of one cell has no loop that keeps loads apart: 8 warps spill kilobytes of a thread
        return Tile(genes=16, warps=8 if shared or latents * head <= 64 * 64 else 32, stages=1)
    if max(latents, head) <= 64:
        return Tile(genes=32, warps=4, stages=2)
    return Tile(genes=16, warps=8, stages=2, registers=128) if head <= 64 else Tile(genes=16, warps=8, stages=1)


def parts(programs: int, n_genes: int, genes: int) -> tuple[int, int]:
    """Into how many parts the genes are split so that there are about PROGRAMS programs, and the genes of one."""
    blocks = ceil_div(n_genes, genes)
    wanted = max(1, min(PROGRAMS // programs, blocks // LEAST_BLOCKS))
    span = ceil_div(blocks, wanted) * genes
    return ceil_div(n_genes, span), span


def pool(
    x_BS: Tensor,
    r_BS: Tensor,
    row: Tensor,
    alpha_NMK: Tensor,
    A_TNM: Tensor,
    values_TNH: Tensor,
    a_KNH: Tensor,
    kind: TokenKind,
) -> Tensor:
    """softmax over genes of r (A + alpha phi), times r (values + phi a): (B, N, M, H). 0 where a cell has no gene.
    Products in the precision of the values, all else in that of the others."""
    inputs = (x_BS.contiguous(), r_BS.contiguous(), row.to(torch.int32).contiguous(), alpha_NMK.contiguous())
    out = _Pool.apply(*inputs, A_TNM.contiguous(), values_TNH.contiguous(), a_KNH.contiguous(), kind)
    assert isinstance(out, Tensor)
    return out


class _Pool(torch.autograd.Function):
    """Counts get no gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, kind = inputs
        x_BS, r_BS, row, alpha_NMK, A_TNM, values_TNH, a_KNH = tensors
        (B, S), (N, M, K), H = x_BS.shape, alpha_NMK.shape, a_KNH.shape[2]
        shared, latents, head, bf16 = (
            row.ndim == 1,
            power_of_two(M),
            power_of_two(H),
            values_TNH.dtype == torch.bfloat16,
        )
        cells, tile = forward_tile(latents, head, bf16, shared)
        groups = ceil_div(B, cells)
        n_parts, span = parts(groups * N, S, tile.genes)
        read, w_phi, lse = (x_BS.new_empty(n_parts, B, N, M, *width) for width in ((H,), (K,), ()))
        launch(
            _forward,
            (groups, N, n_parts),
            *(x_BS, r_BS, row, alpha_NMK, A_TNM, values_TNH, read, w_phi, lse),
            *(B, S, N, M, K, H, 0 if shared else S, span),
            WHOLE=n_parts == 1,
            CELLS=cells,
            FUNCTIONS=LEAST,
            BINS=kind == "bins",
            LATENTS=latents,
            HEAD=head,
            BF16=bf16,
            tile=tile,
        )
        read, w_phi, lse = combined(read, w_phi, lse) if n_parts > 1 else (read[0], w_phi[0], lse[0])
        out = read + torch.einsum("bnmk,knh->bnmh", w_phi, a_KNH)
        ctx.save_for_backward(*tensors, out, w_phi, lse)
        ctx.kind = kind
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_out = grad_outputs[0].contiguous()
        x_BS, r_BS, row, alpha_NMK, A_TNM, values_TNH, a_KNH, out, w_phi, lse = ctx.saved_tensors
        (B, S), (N, M, K), H = x_BS.shape, alpha_NMK.shape, a_KNH.shape[2]
        delta, d_w_phi = (d_out * out).sum(-1), torch.einsum("bnmh,knh->bnmk", d_out, a_KNH).contiguous()
        d_a = torch.einsum("bnmh,bnmk->knh", d_out, w_phi)
        dtype, shared, latents, head = values_TNH.dtype, row.ndim == 1, power_of_two(M), power_of_two(H)
        tile = backward_tile(latents, head, dtype == torch.bfloat16, shared)
        blocks = ceil_div(S, tile.genes)
        d_A, d_values = torch.zeros_like(A_TNM), torch.zeros_like(values_TNH, dtype=x_BS.dtype)
        d_r = x_BS.new_empty(N, B, S)
        d_alpha = x_BS.new_zeros(blocks if shared else 1, N, M, K)
        launch(
            _backward,
            (blocks, N, 1 if shared else B),
            *(x_BS, r_BS, row, alpha_NMK, A_TNM, values_TNH, d_out.to(dtype), lse, delta, d_w_phi.to(dtype)),
            *(d_r, d_alpha, d_A, d_values),
            *(B, S, N, M, K, H, 0 if shared else S),
            SHARED=shared,
            FUNCTIONS=LEAST,
            BINS=ctx.kind == "bins",
            LATENTS=latents,
            HEAD=head,
            BF16=dtype == torch.bfloat16,
            tile=tile,
        )
        return None, d_r.sum(0), None, d_alpha.sum(0), d_A, d_values.to(values_TNH.dtype), d_a, None


def combined(reads: Tensor, w_phis: Tensor, lses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """read, w_phi and lse of all genes, from those of their parts: (parts, B, N, M, ...) -> (B, N, M, ...)."""
    n_parts, B, N, M, H = reads.shape
    read, w_phi, lse = reads.new_empty(reads.shape[1:]), w_phis.new_empty(w_phis.shape[1:]), lses.new_empty(B, N, M)
    launch(
        _combine,
        (B * N, ceil_div(M, LEAST)),
        *(reads, w_phis, lses, read, w_phi, lse, n_parts, B * N * M, M, w_phis.shape[4], H),
        LATENTS=LEAST,
        HEAD=power_of_two(H),
        FUNCTIONS=LEAST,
        tile=Tile(genes=LEAST, warps=4, stages=2),
    )
    return read, w_phi, lse


@triton.jit
def _forward(
    x_ptr, r_ptr, row_ptr, alpha_ptr, A_ptr, values_ptr, read_ptr, w_phi_ptr, lse_ptr,
    B, S, N, M, K, H, row_stride, span,
    WHOLE: tl.constexpr, CELLS: tl.constexpr, LATENTS: tl.constexpr, HEAD: tl.constexpr, GENES: tl.constexpr,
    FUNCTIONS: tl.constexpr, BINS: tl.constexpr, BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """CELLS cells, one head, `span` genes. row_stride: 0 where cells share a set, else S and CELLS is 1. WHOLE: these
    are all genes, and the log of a sum over none is 0. For `_combine` it is that of 0.
    """
    wide = x_ptr.dtype.element_ty
    n, first, part = tl.program_id(1), tl.program_id(0).to(tl.int64) * CELLS, tl.program_id(2).to(tl.int64)
    cell, latent, channel = tl.arange(0, CELLS), tl.arange(0, LATENTS), tl.arange(0, HEAD)
    in_B = cell < B - first
    pair, column = tl.arange(0, CELLS * LATENTS), tl.arange(0, CELLS * FUNCTIONS)
    of_latent, k = pair % LATENTS, column % FUNCTIONS
    own = (pair // LATENTS)[:, None] == (column // FUNCTIONS)[None, :]
    own = own & (of_latent < M)[:, None] & (k < K)[None, :]
    alpha = tl.load(alpha_ptr + (n * M + of_latent)[:, None] * K + k[None, :], mask=own, other=0.0)
    of_cell = column // FUNCTIONS
    x_ptr, r_ptr, row_ptr = x_ptr + first * S, r_ptr + first * S, row_ptr + first * row_stride
    largest = tl.full([CELLS, LATENTS], -1e30, wide)
    total = tl.zeros([CELLS, LATENTS], wide)
    w_phi = tl.zeros([CELLS * LATENTS, CELLS * FUNCTIONS], wide)
    read = tl.zeros([CELLS * LATENTS, HEAD], wide)
    for start in range(tl.program_id(2) * span, tl.minimum(tl.program_id(2) * span + span, S), GENES):
        gene = start + tl.arange(0, GENES)
        row = tl.load(row_ptr + gene, mask=gene < S, other=-1)
        there = row >= 0
        inside = in_B[:, None] & there[None, :]
        r = tl.load(r_ptr + cell[:, None] * S + gene[None, :], mask=inside, other=0.0)[:, None, :]
        inside = (of_cell < B - first)[:, None] & there[None, :]
        x = tl.load(x_ptr + of_cell[:, None] * S + gene[None, :], mask=inside, other=0.0)
        phi = phi_of(x, k[:, None], BINS)
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
        by_count = dot(alpha, phi, tl.zeros([CELLS * LATENTS, GENES], wide), BF16, INTERPRETED)
        score = r * (tl.reshape(by_count, [CELLS, LATENTS, GENES]) + A[None, :, :])
        score = tl.where(there[None, None, :], score, -1e30)
        larger = tl.maximum(largest, tl.max(score, 2))
        p = tl.where(there[None, None, :], tl.exp(score - larger[:, :, None]), 0.0)
        w = p * r
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(p, 2)
        shrink = tl.reshape(shrink, [CELLS * LATENTS])[:, None]
        w = tl.reshape(w, [CELLS * LATENTS, GENES])
        w_phi = dot(w, tl.trans(phi), w_phi * shrink, BF16, INTERPRETED)
        read = dot(w, values, read * shrink, BF16, INTERPRETED)
        largest = larger
    some = total > 0  # no gene at all: what is read is 0
    nothing = 0.0 if WHOLE else -1e30
    over = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    at = part * B + first
    lse_ptr, w_phi_ptr, read_ptr = lse_ptr + at * N * M, w_phi_ptr + at * N * M * K, read_ptr + at * N * M * H
    at = (cell[:, None] * N + n) * M + latent[None, :]
    inside = in_B[:, None] & (latent < M)[None, :]
    tl.store(lse_ptr + at, tl.where(some, largest + tl.log(tl.where(some, total, 1.0)), nothing), mask=inside)
    over, at = tl.reshape(over, [CELLS * LATENTS])[:, None], tl.reshape(at, [CELLS * LATENTS])[:, None]
    inside = tl.reshape(inside, [CELLS * LATENTS])[:, None]
    tl.store(w_phi_ptr + at * K + k[None, :], w_phi * over, mask=inside & own)
    tl.store(read_ptr + at * H + channel[None, :], read * over, mask=inside & (channel < H)[None, :])


@triton.jit
def _combine(
    reads_ptr, w_phis_ptr, lses_ptr, read_ptr, w_phi_ptr, lse_ptr,
    parts, size, M, K, H,
    LATENTS: tl.constexpr, HEAD: tl.constexpr, FUNCTIONS: tl.constexpr, GENES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of a cell's head and some of its latent tokens, what was read of the parts of the genes, as of all genes.

    size: cells x heads x latent tokens, by which the parts lie apart
    """
    wide = read_ptr.dtype.element_ty
    latent, channel, k = tl.program_id(1) * LATENTS + tl.arange(0, LATENTS), tl.arange(0, HEAD), tl.arange(0, FUNCTIONS)
    in_M = latent < M
    first = tl.program_id(0).to(tl.int64) * M + latent
    of_read, of_phi = in_M[:, None] & (channel < H)[None, :], in_M[:, None] & (k < K)[None, :]
    largest = tl.full([LATENTS], -1e30, wide)
    for part in range(parts):
        at = first + part * size
        largest = tl.maximum(largest, tl.load(lses_ptr + at, mask=in_M, other=-1e30))
    total = tl.zeros([LATENTS], wide)
    read = tl.zeros([LATENTS, HEAD], wide)
    w_phi = tl.zeros([LATENTS, FUNCTIONS], wide)
    for part in range(parts):
        at = first + part * size
        e = tl.exp(tl.load(lses_ptr + at, mask=in_M, other=-1e30) - largest)
        total += e
        read += e[:, None] * tl.load(reads_ptr + at[:, None] * H + channel[None, :], mask=of_read, other=0.0)
        w_phi += e[:, None] * tl.load(w_phis_ptr + at[:, None] * K + k[None, :], mask=of_phi, other=0.0)
    some = largest > -1e29  # no gene at all: what is read is 0
    total = tl.where(some, total, 1.0)
    tl.store(lse_ptr + first, tl.where(some, largest + tl.log(total), 0.0), mask=in_M)
    tl.store(read_ptr + first[:, None] * H + channel[None, :], read / total[:, None], mask=of_read)
    tl.store(w_phi_ptr + first[:, None] * K + k[None, :], w_phi / total[:, None], mask=of_phi)


@triton.jit
def _backward(
    x_ptr, r_ptr, row_ptr, alpha_ptr, A_ptr, values_ptr, d_out_ptr, lse_ptr, delta_ptr, d_w_phi_ptr,
    d_r_ptr, d_alpha_ptr, d_A_ptr, d_values_ptr,
    B, S, N, M, K, H, row_stride,
    SHARED: tl.constexpr, LATENTS: tl.constexpr, HEAD: tl.constexpr, GENES: tl.constexpr,
    FUNCTIONS: tl.constexpr, BINS: tl.constexpr, BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A block of genes, one head, all cells. Where each has its own set, one cell."""
    wide = x_ptr.dtype.element_ty
    block, n, only = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gene, latent, channel = block * GENES + tl.arange(0, GENES), tl.arange(0, LATENTS), tl.arange(0, HEAD)
    row = tl.load(row_ptr + only * row_stride + gene, mask=gene < S, other=-1)
    there, in_M, in_H = row >= 0, latent < M, channel < H
    k = tl.arange(0, FUNCTIONS)
    of_functions = latent[:, None] * K + k[None, :]
    in_MK = in_M[:, None] & (k < K)[None, :]
    alpha = tl.load(alpha_ptr + n * M * K + of_functions, mask=in_MK, other=0.0)
    A_at = (row * N + n)[None, :] * M + latent[:, None]
    values_at = (row * N + n)[:, None] * H + channel[None, :]
    A = tl.load(A_ptr + A_at, mask=there[None, :] & in_M[:, None], other=0.0)
    values = tl.load(values_ptr + values_at, mask=there[:, None] & in_H[None, :], other=0.0)
    d_A = tl.zeros([LATENTS, GENES], wide)
    d_alpha = tl.zeros([LATENTS, FUNCTIONS], wide)
    d_values = tl.zeros([GENES, HEAD], wide)
    d_out_at = latent[:, None] * H + channel[None, :]
    for cell in range(only, B if SHARED else only + 1):
        phi = phi_of(tl.load(x_ptr + cell * S + gene, mask=there, other=0.0)[None, :], k[:, None], BINS)
        r = tl.load(r_ptr + cell * S + gene, mask=there, other=0.0)[None, :]
        first = (cell * N + n) * M
        lse = tl.load(lse_ptr + first + latent, mask=in_M, other=0.0)[:, None]
        delta = tl.load(delta_ptr + first + latent, mask=in_M, other=0.0)[:, None]
        d_w_phi = tl.load(d_w_phi_ptr + first * K + of_functions, mask=in_MK, other=0.0)
        d_out = tl.load(d_out_ptr + first * H + d_out_at, mask=in_M[:, None] & in_H[None, :], other=0.0)
        t = dot(alpha, phi, A, BF16, INTERPRETED)
        p = tl.where(there[None, :] & in_M[:, None], tl.exp(t * r - lse), 0.0)
        w = p * r
        d_values = dot(tl.trans(w), d_out, d_values, BF16, INTERPRETED)
        d_w = dot(d_w_phi, phi, tl.zeros([LATENTS, GENES], wide), BF16, INTERPRETED)
        d_w = dot(d_out, tl.trans(values), d_w, BF16, INTERPRETED)
        d_score = w * d_w - p * delta
        tl.store(d_r_ptr + (n * B + cell) * S + gene, tl.sum(p * d_w + d_score * t, 0), mask=gene < S)
        d_t = d_score * r
        d_A += d_t
        d_alpha = dot(d_t, tl.trans(phi), d_alpha, BF16, INTERPRETED)
    if SHARED:
        tl.store(d_alpha_ptr + (block * N + n) * M * K + of_functions, d_alpha, mask=in_MK)
        tl.store(d_A_ptr + A_at, d_A, mask=there[None, :] & in_M[:, None])
        tl.store(d_values_ptr + values_at, d_values, mask=there[:, None] & in_H[None, :])
    else:
        tl.atomic_add(d_alpha_ptr + n * M * K + of_functions, d_alpha, mask=in_MK, sem="relaxed")
        tl.atomic_add(d_A_ptr + A_at, d_A, mask=there[None, :] & in_M[:, None], sem="relaxed")
        tl.atomic_add(d_values_ptr + values_at, d_values, mask=there[:, None] & in_H[None, :], sem="relaxed")
