"""From latent tokens to genes, where cells have own gene sets in which a gene stands several times. The first product
is taken once for a gene of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scldm.model.factorised.functions import apply, centred
from scldm.model.factorised.gated import add_product, folded, gated_sum, gated_sum_backward, side_by_side
from scldm.model.factorised.tiles import Space, on_gpu
from scldm.model.gene_rows import GeneRows
from scldm.model.mcab import MCAB

# What a number of a table's row costs a cell that fetches it and adds to its gradient, in multiply-accumulates. FETCHED
# is from memory, FETCHED_CACHED where the whole table stays in the cache. Measured speed of a step: times 1.20 where
# 65,536 genes are rows of 20,001 (width 256, 64 latent tokens), 0.94 with 32,768, and 1.28 with 12,660 of 1,268 (width
# 64, 8 tokens).
FETCHED, FETCHED_CACHED = 60, 20
CACHED = 1 << 22


def pays_by_table(rows: GeneRows, x_BLD: Tensor, n_heads: int, hidden: int) -> bool:
    """Whether the decoder's first product is cheaper per (head, latent token) and row of the table than per gene of a
    cell, in multiply-accumulates per cell and gene. Cells have sets of their own. On a CPU: it goes cell by cell.
    """
    (_, L, D), R, F2, T = x_BLD.shape, n_heads * x_BLD.shape[1], 2 * hidden, len(rows.table_TD)
    fetched = FETCHED_CACHED if T * F2 <= CACHED else FETCHED
    by_table = R * F2 + 2 * R * D + R**2 + F2 * D * T / max(1, rows.shape.numel()) + fetched * F2
    return not on_gpu(x_BLD) and by_table < 2 * L * D + F2 * D


def by_head(k_BLD: Tensor, n_heads: int) -> Tensor:
    """Keys of each head, 0 in the channels of the others: (B, N L, D), so that one product gives all scores."""
    if n_heads == 1:
        return k_BLD
    k_BNLH = k_BLD.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    own_NN = torch.eye(n_heads, dtype=k_BLD.dtype, device=k_BLD.device)
    return (k_BNLH[:, :, :, None] * own_NN[:, None, :, None]).flatten(3).flatten(1, 2)


def by_table(
    mcab: MCAB, head: nn.Linear, query_TD: Tensor, row_BQ: Tensor, k_BLD: Tensor, U_BRD: Tensor, dtype: torch.dtype
) -> Tensor:
    """`unpooling._by_latents` of genes that are rows of a table, for each cell others. The first product is taken once
    a row. A cell fetches its genes' rows of t, for scores and LayerNorm's moments, and those of the product.
    """
    N, D, norm_query, norm = mcab.n_heads, query_TD.shape[1], mcab.norm_query, mcab.norm_mlp
    linear_TK, linear_BRK = head(query_TD + mcab.out.bias), head(U_BRD)
    t_TD, U_BRD = centred(query_TD), centred(U_BRD)
    r_query_T = (t_TD.square().mean(1) + norm_query.eps).rsqrt()
    shift_D = centred(mcab.out.bias)
    t_TD = t_TD + shift_D
    numbers_TX = torch.cat((r_query_T[:, None], t_TD.square().sum(1, keepdim=True), linear_TK), dim=1)
    r_query_BQ1, square_BQ1, linear_BQK = F.embedding(row_BQ, numbers_TX).split((1, 1, linear_TK.shape[1]), dim=-1)
    k_BRD = by_head(k_BLD * (D // N) ** -0.5, N)
    scaled_BRD = k_BRD * norm_query.weight
    read_BRQ, cross_BRQ = apply(_TimesRows, torch.cat((scaled_BRD, U_BRD), 1), t_TD, row_BQ).chunk(2, dim=1)
    scores_BRQ = (read_BRQ - (scaled_BRD @ shift_D)[..., None]) * r_query_BQ1.transpose(1, 2)
    scores_BRQ = scores_BRQ + (k_BRD @ norm_query.bias)[..., None]
    p_BRQ = scores_BRQ.unflatten(1, (N, -1)).softmax(2).flatten(1, 2)
    cross_BRQ = torch.baddbmm(cross_BRQ, U_BRD @ U_BRD.transpose(1, 2), p_BRQ, beta=2)
    r_BQ = ((square_BQ1[..., 0] + (p_BRQ * cross_BRQ).sum(1)).clamp_min(0) / D + norm.eps).rsqrt()
    w_BXQ = torch.cat((p_BRQ * r_BQ[:, None], torch.ones_like(r_BQ)[:, None]), 1).to(dtype)
    mlp_BQ = []
    for W_FD, b_F in folded(mcab.mlp, head):
        scaled_FD, b_F = (W_FD * norm.weight).to(dtype), F.linear(norm.bias, W_FD, b_F).to(dtype)
        T_TF, B_BRF = F.linear(t_TD.to(dtype), scaled_FD), F.linear(U_BRD.to(dtype), scaled_FD)
        B_BXF = torch.cat((B_BRF, b_F.expand(len(B_BRF), 1, -1)), 1)
        mlp_BQ.append(apply(_HeadByTable, w_BXQ, r_BQ, T_TF, B_BXF, row_BQ))
    return torch.baddbmm(linear_BQK, p_BRQ.transpose(1, 2), linear_BRK) + side_by_side(mlp_BQ)


class _TimesRows(torch.autograd.Function):
    """Each cell's vectors times its genes' rows of a table: (B, X, Q). x (B, X, D); table (T, D); row (B, Q)"""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x_BXD, table_TD, row_BQ = inputs
        ctx.save_for_backward(*inputs)
        out_BXQ = x_BXD.new_empty(*x_BXD.shape[:2], row_BQ.shape[1])
        rows_QD = table_TD.new_empty(row_BQ.shape[1], table_TD.shape[1])
        for x_XD, row_Q, out_XQ in zip(x_BXD, row_BQ, out_BXQ):
            torch.index_select(table_TD, 0, row_Q, out=rows_QD)
            torch.mm(x_XD, rows_QD.T, out=out_XQ)
        return out_BXQ

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BXD, table_TD, row_BQ = ctx.saved_tensors
        d_x, d_table = torch.empty_like(x_BXD), torch.zeros_like(table_TD)
        rows_QD = table_TD.new_empty(row_BQ.shape[1], table_TD.shape[1])
        for x_XD, row_Q, d_XQ, d_x_XD in zip(x_BXD, row_BQ, grad_outputs[0], d_x):
            torch.index_select(table_TD, 0, row_Q, out=rows_QD)
            torch.mm(d_XQ, rows_QD, out=d_x_XD)
            d_table.index_add_(0, row_Q, torch.mm(d_XQ.T, x_XD, out=rows_QD))
        return d_x, d_table, None


class _HeadByTable(torch.autograd.Function):
    """sum of value * silu(gate) with (value, gate) = r T + w B: (B, Q), in the precision of r.

    w (B, X, Q); r (B, Q), in full precision; T (T, 2F); B (B, X, 2F); row of T, (B, Q)
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        w_BXQ, r_BQ, T_TF, B_BXF, row_BQ = inputs
        ctx.save_for_backward(*inputs)
        out_BQ = torch.empty_like(r_BQ)
        for b, q, (hidden,) in _gene_tiles(r_BQ, T_TF, 1):
            torch.index_select(T_TF, 0, row_BQ[b, q], out=hidden)
            hidden.mul_(r_BQ[b, q, None]).addmm_(w_BXQ[b, :, q].T, B_BXF[b])
            out_BQ[b, q] = gated_sum(hidden, hidden)
        return out_BQ

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (d_out,) = grad_outputs
        w_BXQ, r_BQ, T_TF, B_BXF, row_BQ = ctx.saved_tensors
        d_w, d_r = torch.empty_like(w_BXQ), torch.empty_like(r_BQ)
        d_T, d_B = (torch.zeros_like(x, dtype=r_BQ.dtype) for x in (T_TF, B_BXF))
        for b, q, (hidden, other, T) in _gene_tiles(r_BQ, T_TF, 3):
            w, r, row = w_BXQ[b, :, q], r_BQ[b, q, None], row_BQ[b, q]
            torch.index_select(T_TF, 0, row, out=T)
            torch.mul(T, r.to(T.dtype), out=hidden).addmm_(w.T, B_BXF[b])
            d_hidden = gated_sum_backward(hidden, d_out[b, q], other)
            torch.mm(B_BXF[b], d_hidden.T, out=d_w[b, :, q])
            add_product(d_B[b], w, d_hidden)
            d_r[b, q] = T.mul_(d_hidden).sum(-1, dtype=r.dtype)
            d_T.index_add_(0, row, d_hidden.mul_(r).to(d_T.dtype))
        return d_w, d_r, d_T.to(T_TF.dtype), d_B.to(B_BXF.dtype), None


def _gene_tiles(r_BQ: Tensor, T_TF: Tensor, held: int) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """Of one cell after another as many genes as fill a tile, and memory for so many of its size."""
    space = Space(r_BQ.shape[1], T_TF.shape[1], T_TF, held=held)
    for cell in range(len(r_BQ)):
        for genes in space.slices():
            yield cell, genes, space.held(genes.stop - genes.start, T_TF.shape[1])
