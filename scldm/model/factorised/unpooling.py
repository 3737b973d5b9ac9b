"""From latent tokens to the asked genes: `unpool`, by gene or by latent token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scldm.likelihood import at_least_float32
from scldm.model.factorised.by_table import by_table, pays_by_table
from scldm.model.factorised.functions import apply, centred, compute_dtype
from scldm.model.factorised.gated import Head, add_product, folded, gated_sum, gated_sum_backward, side_by_side
from scldm.model.factorised.tiles import Space, on_gpu, tile_numbers
from scldm.model.gene_rows import GeneRows
from scldm.model.mcab import MCAB
from scldm.tf32 import tf32_products

# genes of a tile on a CPU: 64 x 2 x 688 (width 256) x 4 B = 352 kB of the genes' table
GENES = 64
# what a multiply-accumulate by latents costs beside one by gene: measured, 0.5 as many take 0.67 of the time, 1.4 times
# as many 1.27 of it (width 256, 64 latent tokens, 4 cells x 2,048 genes, one and four heads, forward and backward, CPU)
PAYS = 0.8


def unpool(mcab: MCAB, head: nn.Linear, rows: GeneRows, x_BLD: Tensor) -> Tensor:
    """`head(mcab(embedded, x))`, (B, Q, K): the numbers that the decoder says of each asked gene.

    rows: embeddings of the asked genes
    head: D -> K, without a bias
    """
    dtype, kind, wide, N = compute_dtype(head.weight), x_BLD.device.type, head.weight.dtype, mcab.n_heads
    query = mcab.query(rows.table_TD)
    k_BLD, v_BLD = mcab.key(mcab.norm_key(x_BLD)), mcab.value(mcab.norm_value(x_BLD))
    hidden = mcab.mlp.value.out_features
    if rows.row is not None and rows.per_cell and pays_by_table(rows, x_BLD, N, hidden):
        with torch.autocast(kind, enabled=False):
            U_BRD = heads_out(mcab, v_BLD.to(wide))
            return by_table(mcab, head, query.to(wide), rows.row, k_BLD.to(wide), U_BRD, dtype)
    if rows.per_cell:
        query = F.embedding(rows.row, query) if rows.row is not None else query.view(*rows.shape, -1)
    q = mcab.norm_query(query)
    p_BNLQ = _weights(q, k_BLD, N)
    p_BRQ = p_BNLQ.flatten(1, 2)
    if not rows.per_cell and pays_by_latents(p_BNLQ.shape, x_BLD.shape[-1], hidden):
        with torch.autocast(kind, enabled=False), tf32_products(dtype == torch.bfloat16):
            return _by_latents(mcab, head, query.to(wide), p_BRQ.to(wide), heads_out(mcab, v_BLD.to(wide)), dtype)
    # a head's weights sum to 1, so that each gene gets the bias once
    U_BRD = heads_out(mcab, v_BLD)
    U_BRD = (U_BRD + mcab.out.bias / N).to(query.dtype)
    read_BQD = torch.baddbmm(query, p_BRQ.transpose(1, 2).to(query.dtype), U_BRD)
    y_RD = mcab.norm_mlp(read_BQD).flatten(0, 1).to(dtype)
    with torch.autocast(kind, enabled=False):
        mlp_R = [apply(Head, y_RD, W_FD.to(dtype), b_F.to(dtype)) for W_FD, b_F in folded(mcab.mlp, head)]
        return head(read_BQD.to(wide)) + side_by_side(mlp_R).view(*read_BQD.shape[:2], -1)


def heads_out(mcab: MCAB, v_BLD: Tensor) -> Tensor:
    """W_O applied to each head's values apart: U (B, N L, D), so that what a gene reads is p U."""
    N, (B, L, D) = mcab.n_heads, v_BLD.shape
    out_NHD = mcab.out.weight.T.view(N, -1, D)
    U_NTD = v_BLD.view(B * L, N, -1).transpose(0, 1) @ out_NHD
    return U_NTD.view(N, B, L, D).transpose(0, 1).flatten(1, 2)


def _weights(q: Tensor, k_BLD: Tensor, n_heads: int) -> Tensor:
    """Attention weights of genes over latent tokens, (B, N, L, Q), the genes last. q (Q, D) or (B, Q, D)."""
    N, (B, L, D) = n_heads, k_BLD.shape
    k_BLNH = (k_BLD * (D // N) ** -0.5).view(B, L, N, -1)
    if q.ndim == 3:
        scores_BNLQ = k_BLNH.transpose(1, 2) @ q.unflatten(-1, (N, -1)).permute(0, 2, 3, 1)
    else:  # one product over all cells
        scores_NTQ = k_BLNH.flatten(0, 1).transpose(0, 1) @ q.unflatten(-1, (N, -1)).permute(1, 2, 0)
        scores_BNLQ = scores_NTQ.view(N, B, L, -1).transpose(0, 1)
    scores_BNLQ = at_least_float32(scores_BNLQ)
    return scores_BNLQ.softmax(2)


def pays_by_latents(weights_shape: tuple[int, ...], width: int, hidden: int) -> bool:
    """Whether the decoder's first product is cheaper per (head, latent token) than per gene, in multiply-accumulates
    per cell and gene, tables included.
    """
    B, N, L, Q = weights_shape
    R, F2 = N * L, 2 * hidden
    by_latents = R * F2 + hidden + (N + 1) * L * width + R**2 + F2 * width / B + R * F2 * width / Q
    by_gene = width**2 + 2 * L * width + F2 * width
    return by_latents < PAYS * by_gene


def _by_latents(
    mcab: MCAB, head: nn.Linear, query_QD: Tensor, p_BRQ: Tensor, U_BRD: Tensor, dtype: torch.dtype
) -> Tensor:
    """f_g = t_g + p_g U: LayerNorm's moments, the first product and the head are all taken of t and of U."""
    D, norm = query_QD.shape[1], mcab.norm_mlp
    t_QD = query_QD + mcab.out.bias
    linear_BKQ = torch.baddbmm(head(t_QD).T, head(U_BRD).transpose(1, 2), p_BRQ)
    t_QD, U_BRD = centred(t_QD), centred(U_BRD)
    cross_BRQ = torch.baddbmm(U_BRD @ t_QD.T, U_BRD @ U_BRD.transpose(1, 2), p_BRQ, beta=2)
    variance_BQ = (t_QD.square().sum(1) + (p_BRQ * cross_BRQ).sum(1)).clamp_min(0) / D
    r_BQ = (variance_BQ + norm.eps).rsqrt()
    scaled_BRQ = (p_BRQ * r_BQ[:, None]).to(dtype)
    mlp_BQ = []
    for W_FD, b_F in folded(mcab.mlp, head):
        scaled_FD, b_F = (W_FD * norm.weight).to(dtype), F.linear(norm.bias, W_FD, b_F).to(dtype)
        T_QF, B_BRF = F.linear(t_QD.to(dtype), scaled_FD), F.linear(U_BRD.to(dtype), scaled_FD)
        mlp_BQ.append(apply(_HeadByLatents, scaled_BRQ, r_BQ, T_QF, B_BRF, b_F))
    return linear_BKQ.transpose(1, 2) + side_by_side(mlp_BQ)


class _HeadByLatents(torch.autograd.Function):
    """sum of value * silu(gate) with (value, gate) = r T + p B + b: (B, Q), in the precision of r.

    p (B, R, Q); r (B, Q), in full precision; T (Q, 2F); B (B, R, 2F); b (2F,)
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        p_BRQ, r_BQ, T_QF, B_BRF, b_F = inputs
        ctx.save_for_backward(*inputs)
        out_BQ = torch.empty_like(r_BQ)
        for b, q, hidden, _ in _cell_gene_tiles(r_BQ, T_QF):
            r = r_BQ[b, q, None].to(T_QF.dtype)
            torch.baddbmm(b_F, p_BRQ[b, :, q].transpose(1, 2), B_BRF[b], out=hidden).addcmul_(T_QF[q], r)
            out_BQ[b, q] = gated_sum(hidden, hidden)
        return out_BQ

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (d_out,) = grad_outputs
        p_BRQ, r_BQ, T_QF, B_BRF, b_F = ctx.saved_tensors
        d_p, d_r = torch.empty_like(p_BRQ), torch.empty_like(r_BQ)
        d_T, d_B, d_b = (torch.zeros_like(x, dtype=r_BQ.dtype) for x in (T_QF, B_BRF, b_F))
        for b, q, hidden, other in _cell_gene_tiles(r_BQ, T_QF):
            p, r, T = p_BRQ[b, :, q], r_BQ[b, q, None].to(T_QF.dtype), T_QF[q]
            torch.baddbmm(b_F, p.transpose(1, 2), B_BRF[b], out=hidden).addcmul_(T, r)
            d_hidden = gated_sum_backward(hidden, d_out[b, q], other)
            torch.bmm(B_BRF[b], d_hidden.transpose(1, 2), out=d_p[b, :, q])
            add_product(d_B[b], p, d_hidden)
            d_b += d_hidden.sum((0, 1))
            torch.sum(torch.mul(d_hidden, T, out=other), -1, dtype=r_BQ.dtype, out=d_r[b, q])
            d_T[q].add_(d_hidden.mul_(r).sum(0))
        return d_p, d_r, d_T.to(T_QF.dtype), d_B.to(B_BRF.dtype), d_b.to(b_F.dtype)


def _cell_gene_tiles(r_BQ: Tensor, T_QF: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """On a CPU a few genes of as many cells as fill a tile, so that the genes' table stays in the cache with it. On a
    GPU as many genes of all cells. And memory for two of its size.
    """
    (B, Q), F2 = r_BQ.shape, T_QF.shape[1]
    n_genes = max(1, tile_numbers(T_QF) // (B * F2 * GENES)) * GENES if on_gpu(T_QF) and B else GENES
    space = Space(B, min(n_genes, Q) * F2, T_QF)
    for start in range(0, Q, n_genes):
        genes = slice(start, min(start + n_genes, Q))
        for cells in space.slices():
            hidden, other = space.held(cells.stop - cells.start, genes.stop - start, F2)
            yield cells, genes, hidden, other
