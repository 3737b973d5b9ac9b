"""Cross-attention between genes and latent tokens without a matrix product per gene and cell: the same function as
`MCAB`, the same parameters, in less time and memory.

A gene's token is `e_g + sum_k phi_k u_k`: a vector per gene, and a few numbers of its count times as many vectors that
all genes share. So keys, values and scores are sums of two table entries, one by gene and one by count, scaled by one
over the token's standard deviation (`pool`). Of an asked gene only a few numbers leave the decoder (`unpool`). So the
SwiGLU's last product and the head fold into one. Where the latent tokens are few beside the width, its first product is
taken per latent token instead of per gene, also where cells have sets of their own that hold a gene several times.

What is large, scores and hidden layers, is made tile by tile and made again in backward: within a processor's cache, or
within a share of a GPU's memory.

Reading order: pool, tables, _OneOverDeviation, _Pool, unpool, pays_by_latents, _HeadByLatents, pays_by_table,
_TimesRows, _HeadByTable, _Head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scldm.batch import GeneCounts
from scldm.likelihood import at_least_float32
from scldm.model.blocks import SwiGLU
from scldm.model.gene_rows import GeneRows
from scldm.model.mcab import MCAB
from scldm.model.token import GeneToken
from scldm.tf32 import tf32_products

# numbers in a tile: on a CPU 1 MB of float32, so that the passes over it stay in the cache of one core. With 2 MB of
# that and tiles of 2^17, 2^18, 2^19, forward + backward: pooling in 61, 57, 55 ms, reading out in 191, 164, 161
TILE_CPU = 1 << 18
GENES = 64  # of those, in the decoder: 64 x 2 x 688 (width 256) x 4 B = 352 kB of the genes' table
# a GPU reads a tile from its memory anyway, and pays for launches: a tile is this share of it. Two are held, 2.5 GB of
# 80 GB. By 32 cells of width 256 each of them has 7,100 genes in float32: 2 tiles of 8,192 genes, and not 128
TILE_SHARE = 1 / 64
# numbers of hidden layers that backward finds again rather than makes again, on a CPU (268 MB of float32), and on a GPU
# in tiles: a 16th of its memory
KEPT_CPU = 1 << 26
KEPT_TILES = 4
# the score of a gene that is not there: exp(MASKED / sigma) is 0, and MASKED * 0 is, unlike -inf * 0
MASKED = -1e30
# what a multiply-accumulate by latents costs beside one by gene: measured, 0.5 as many take 0.67 of the time, 1.4 times
# as many 1.27 of it (width 256, 64 latent tokens, 4 cells x 2,048 genes, one and four heads, forward and backward, CPU)
PAYS = 0.8
# what a number of a table's row costs a cell that fetches it and adds to its gradient, in multiply-accumulates: from
# memory, and where the whole table stays in the cache. Measured, 1.20 times the speed of a step where 65,536 genes are
# rows of 20,001 (width 256, 64 latent tokens), 0.94 with 32,768, and 1.28 with 12,660 of 1,268 (width 64, 8 tokens)
FETCHED, FETCHED_CACHED = 60, 20
CACHED = 1 << 22


# --- genes -> latent tokens ----------------------------------------------------------------------------------------


def pool(
    mcab: MCAB,
    queries_MD: Tensor,
    token: GeneToken,
    rows: GeneRows,
    given: GeneCounts,
    read: Callable[[MCAB, Tensor, GeneToken, GeneRows, GeneCounts, torch.dtype], Tensor],
) -> Tensor:
    """`mcab(queries, tokens of the given genes, given.mask)`, (B, M, D).

    Per cell and gene it takes N M exponentials, 2 M D FLOPs, and 4 N M for each function of the count. What depends on
    the gene alone is computed once for all cells that share a set, and for sets per cell once per gene of the
    vocabulary where the cells hold more genes.

    rows: embeddings of the given genes
    read: how the queries read the genes: `read_genes`, or that of `fused`
    """
    query_MD = mcab.query(queries_MD)
    q_MD = mcab.norm_query(query_MD).to(queries_MD.dtype)
    dtype, kind = compute_dtype(queries_MD), queries_MD.device.type
    with torch.autocast(kind, enabled=False), tf32_products(dtype == torch.bfloat16):
        read_BMD = read(mcab, q_MD, token, rows, given, dtype)
    read_BMD = query_MD + mcab.out(read_BMD)
    return read_BMD + mcab.mlp(mcab.norm_mlp(read_BMD))


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The precision of matrix products: autocast's where it is on, else the parameters'."""
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


def read_genes(
    mcab: MCAB, q_MD: Tensor, token: GeneToken, rows: GeneRows, given: GeneCounts, dtype: torch.dtype
) -> Tensor:
    """What the latent queries read from the genes, heads side by side, before the output projection, (B, M, D)."""
    N, (M, D), S = mcab.n_heads, q_MD.shape, rows.shape[-1]
    n_sets, wide = rows.shape.numel() // S, q_MD.dtype
    phi_BSK = token.phi(given.counts_BS)
    K = phi_BSK.shape[-1]
    of = tables(mcab, q_MD, token, rows.table_TD, dtype)
    A_RT, values, ue, ee = of.A_RT, of.values_TD, of.ue_TK, of.ee_T
    if rows.row is not None:
        A_RT = A_RT.gather(1, rows.row.flatten().expand(N * M, -1))
        table = torch.cat((values.to(wide), ue, ee[:, None]), dim=1)
        values, ue, ee = F.embedding(rows.row, table).split((D, K, 1), dim=-1)
        values = values.to(dtype)
    ue, ee = ue.reshape(n_sets, S, K), ee.reshape(n_sets, S)
    r_BS = of.scale(phi_BSK, ue, ee)
    A, mask = A_RT.view(-1, n_sets, S), given.mask.view(-1, S)
    if given.padded:
        A = A.masked_fill(~mask, MASKED)
    values, a_KNH = values.reshape(n_sets, S, N, D // N), of.a_KD.unflatten(-1, (N, D // N))
    out_NMBH = apply(_Pool, phi_BSK, r_BS, of.alpha_NMK, A.view(N, M, n_sets, S), values, a_KNH)
    read_BMD = out_NMBH.permute(2, 1, 0, 3).flatten(2) + of.offset_D
    return read_BMD * mask.any(1)[:, None, None] if given.padded else read_BMD  # attention over no gene at all is 0


@dataclass(frozen=True)
class Tables:
    """Tokens are e_g + phi u, centred over D. phi are the K numbers of a count. With r one over a token's standard
    deviation its scores are r (A + alpha phi) and its values r (values + phi a) + offset. T genes, R = N M pairs of a
    head and a query.
    """

    alpha_NMK: Tensor
    A_RT: Tensor
    a_KD: Tensor
    values_TD: Tensor
    offset_D: Tensor
    uu_KK: Tensor
    ue_TK: Tensor
    ee_T: Tensor
    eps: float

    def scale(self, phi: Tensor, ue: Tensor, ee: Tensor) -> Tensor:
        """r of counts by their phi (..., K): LayerNorm's variance, in which keys and values agree, is quadratic in phi.

        ue, ee: of their genes, (..., K) and (...)
        """
        return apply(_OneOverDeviation, phi, self.uu_KK, ue, ee, self.eps)


def tables(mcab: MCAB, q_MD: Tensor, token: GeneToken, rows_TD: Tensor, dtype: torch.dtype) -> Tables:
    """What depends on the gene alone. rows_TD: embeddings. dtype: of the large products but the scores'."""
    N, (M, D), wide = mcab.n_heads, q_MD.shape, q_MD.dtype
    u_KD = centred(token.count)
    mean_DK = u_KD.T / D
    key_NHD = (mcab.key.weight * mcab.norm_key.weight).view(N, D // N, D)
    q_NMD = q_MD.view(M, N, D // N).transpose(0, 1) @ key_NHD * (D // N) ** -0.5
    value_DD = mcab.value.weight * mcab.norm_value.weight
    e_TD = F.linear(rows_TD.to(dtype), token.gene.weight.to(dtype), token.gene.bias.to(dtype)).to(wide)
    # not in the weights: float32 gradients would err by up to 1.4 times as much
    e_TD = centred(e_TD)
    return Tables(
        alpha_NMK=q_NMD @ u_KD.T,
        A_RT=q_NMD.flatten(0, 1) @ e_TD.T,
        a_KD=u_KD @ value_DD.T,
        values_TD=F.linear(e_TD.to(dtype), value_DD.to(dtype)),
        offset_D=F.linear(mcab.norm_value.bias, mcab.value.weight, mcab.value.bias),
        uu_KK=u_KD @ mean_DK,
        ue_TK=e_TD @ mean_DK,
        ee_T=e_TD.square().mean(1),
        eps=mcab.norm_key.eps,
    )


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


class _OneOverDeviation(torch.autograd.Function):
    """(phi uu phi + 2 phi ue + ee + eps)^-1/2, (B, S), what is below 0 by rounding counted as 0. phi get no gradient.

    phi_BSK, uu_KK; ue (1 or B, S, K) and ee (1 or B, S), or without the axis of the cells
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        phi, uu_KK, ue, ee, eps = inputs
        variance = torch.matmul(phi, uu_KK).add_(ue, alpha=2).mul_(phi).sum(-1).add_(ee)
        r = (variance.clamp_min(0) + eps).rsqrt()
        ctx.save_for_backward(phi, r, variance < 0)
        ctx.shapes = ue.shape, ee.shape
        return r

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        phi, r, below = ctx.saved_tensors
        d_variance = (grad_outputs[0] * r**3 * (-0.5)).masked_fill_(below, 0)
        scaled = phi * d_variance[..., None]
        d_uu = scaled.flatten(0, -2).T @ phi.flatten(0, -2)
        return None, d_uu, scaled.sum_to_size(ctx.shapes[0]) * 2, d_variance.sum_to_size(ctx.shapes[1]), None


class _Pool(torch.autograd.Function):
    """softmax over genes of r (A + alpha phi), times r (values + phi a): (N, M, B, H). phi get no gradient.

    phi_BSK, r_BS, alpha_NMK, a_KNH; A (N, M, 1 or B, S); values (1 or B, S, N, H), in the precision of their product
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        phi_BSK, r_BS, alpha_NMK, A, values, a_KNH = inputs
        (N, M, K), (B, S) = alpha_NMK.shape, r_BS.shape
        out, w_phi = r_BS.new_empty(N, M, B, a_KNH.shape[-1]), r_BS.new_empty(N, M, B, K)
        space = _Space(B, M * S, r_BS, N if len(values) == 1 else 1)
        for n, b in space.tiles(N):
            phi, r, alpha_nMK = phi_BSK[b], r_BS[b], alpha_NMK[n]
            score, w = space.held(*alpha_nMK.shape[:2], *r.shape)
            _scores(alpha_nMK, phi, _of(A[n], 2, b), out=score).mul_(r)
            torch.softmax(score, -1, out=w).mul_(r)
            out[n, :, b] = _times(w, _of(values[:, :, n], 0, b))
            w_phi[n, :, b] = _times_each(w, phi)
        out += torch.einsum("nmbk,knh->nmbh", w_phi, a_KNH)
        ctx.save_for_backward(*inputs, out, w_phi)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (d_out,) = grad_outputs
        phi_BSK, r_BS, alpha_NMK, A, values, a_KNH, out, w_phi = ctx.saved_tensors
        (N, M, K), (B, S), shared = alpha_NMK.shape, r_BS.shape, len(values) == 1
        delta, d_w_phi = (d_out * out).sum(-1), torch.einsum("nmbh,knh->nmbk", d_out, a_KNH)
        d_a = torch.einsum("nmbh,nmbk->knh", d_out, w_phi)
        d_r, d_alpha = torch.zeros_like(r_BS), torch.zeros_like(alpha_NMK)
        make = torch.zeros_like if shared else torch.empty_like  # summed over the cells that share them
        d_A, d_values = make(A), make(values, dtype=r_BS.dtype)
        space = _Space(B, M * S, r_BS, N if shared else 1)
        for n, b in space.tiles(N):
            phi, r, alpha_nMK = phi_BSK[b], r_BS[b], alpha_NMK[n]
            A_b, values_b = _of(A[n], 2, b), _of(values[:, :, n], 0, b)
            w, p = space.held(*alpha_nMK.shape[:2], *r.shape)
            torch.softmax(_scores(alpha_nMK, phi, A_b, out=w).mul_(r), -1, out=p)
            torch.mul(p, r, out=w)
            of_A, of_values = _of(d_A[n], 2, b), _of(d_values[:, :, n], 0, b)
            product = _transposed(w, d_out[n, :, b], values.dtype, shared)
            of_values.add_(product) if shared else of_values.copy_(product)
            d_w = _times(d_out[n, :, b], values_b.transpose(1, 3))
            d_w += _times_each(d_w_phi[n, :, b], phi.transpose(1, 2))
            d_score = w.mul_(d_w)  # p r d_w, from which p delta is taken
            ones = r.new_ones(len(alpha_nMK) * M)
            d_r_direct = ones @ d_score.view(len(ones), -1)
            d_t = d_score.addcmul_(p, delta[n, :, b, None], value=-1).mul_(r)  # of A + alpha phi
            of_A.add_(d_t.sum(2, keepdim=True)) if shared else of_A.copy_(d_t)
            d_alpha[n].view(len(ones), K).addmm_(d_t.view(len(ones), -1), phi.reshape(-1, K))
            by_alpha = (d_t.view(len(ones), -1).T @ alpha_nMK.flatten(0, 1)).view_as(phi).mul_(phi).sum(-1)
            by_A = ones @ d_t.mul_(A_b).view(len(ones), -1)
            d_r[b].add_((d_r_direct + by_A).view_as(r).add_(by_alpha).div_(r))
        return None, d_r, d_alpha, d_A, d_values.to(values.dtype), d_a


def _scores(alpha_nMK: Tensor, phi_bSK: Tensor, A: Tensor, out: Tensor) -> Tensor:
    """A + alpha phi, (n, M, b, S), before it is scaled. A (n, M, 1 or b, S)."""
    alpha = alpha_nMK.flatten(0, 1)
    torch.mm(alpha, phi_bSK.reshape(-1, phi_bSK.shape[-1]).T, out=out.view(len(alpha), -1))
    return out.add_(A)


planned_memory = 0  # bytes of a GPU whose tiles are planned on a CPU, by `train/step_cost.py`. 0 where none is


def tile_numbers(like: Tensor) -> int:
    """Numbers in a tile of such a tensor: on a CPU what stays in its cache, on a GPU a share of its memory."""
    if not on_gpu(like):
        return TILE_CPU
    memory = planned_memory or torch.cuda.get_device_properties(like.device).total_memory
    return int(TILE_SHARE * memory) // like.element_size()


def kept_numbers(like: Tensor) -> int:
    """Numbers of hidden layers that are kept for backward: a few tiles' worth."""
    return KEPT_TILES * tile_numbers(like) if on_gpu(like) else KEPT_CPU


def on_gpu(like: Tensor) -> bool:
    return like.device.type == "cuda" or planned_memory > 0


class _Space:
    """Tiles of as many cells (or rows) as fill them, and memory for some, made once. Fresh memory costs a page fault
    for every 4 kB, which is more than what is then done with it.

    n_outer: of the outer, such as heads, a tile takes as many as fill it with all cells, and at most so many
    held: tiles that there is memory for
    """

    def __init__(self, n: int, numbers_each: int, like: Tensor, n_outer: int = 1, held: int = 2) -> None:
        fits = tile_numbers(like) // max(1, numbers_each)
        self.n, self.step, self.outer = n, min(n, max(1, fits)), min(n_outer, max(1, fits // max(1, n)))
        self.memory = like.new_empty(held, self.outer * self.step * numbers_each)

    def slices(self) -> Iterator[slice]:
        for start in range(0, self.n, max(1, self.step)):
            yield slice(start, min(start + self.step, self.n))

    def tiles(self, n_outer: int) -> Iterator[tuple[slice, slice]]:
        """For some of the outer after others, all slices."""
        for outer in range(0, n_outer, self.outer):
            for part in self.slices():
                yield slice(outer, min(outer + self.outer, n_outer)), part

    def held(self, *shape: int) -> list[Tensor]:
        """As many tensors of a tile's shape as there is memory for."""
        n = math.prod(shape)
        return [memory[:n].view(shape) for memory in self.memory]


def _of(x: Tensor, dim: int, cells: slice) -> Tensor:
    """The cells' part, or the whole where the cells share it."""
    return x if x.shape[dim] == 1 else x[cells] if dim == 0 else x[:, :, cells]


def _times(x: Tensor, y: Tensor) -> Tensor:
    """(n, M, b, K) x (1 or b, K, n, J) -> (n, M, b, J), multiplied in the precision of y, returned in that of x. n is 1
    where each cell has its own."""
    left = x.to(y.dtype)
    if len(y) == 1:
        return (left.flatten(1, 2) @ y[0].transpose(0, 1)).view(*x.shape[:3], -1).to(x.dtype)
    return _times_each(left, y[:, :, 0]).to(x.dtype)


def _times_each(x: Tensor, y_bKJ: Tensor) -> Tensor:
    """(n, M, b, K) x (b, K, J) -> (n, M, b, J), for each cell."""
    product = x.flatten(0, 1).transpose(0, 1) @ y_bKJ
    return product.transpose(0, 1).unflatten(0, x.shape[:2])


def _transposed(w: Tensor, d: Tensor, dtype: torch.dtype, shared: bool) -> Tensor:
    """w (n, M, b, S)^T d (n, M, b, H): for each cell, (b, S, n, H) with n = 1, or summed over them, (1, S, n, H)."""
    w, d = w.to(dtype), d.to(dtype)
    if shared:
        return (w.flatten(1, 2).transpose(1, 2) @ d.flatten(1, 2)).transpose(0, 1)[None]
    return (w[0].permute(1, 2, 0) @ d[0].transpose(0, 1))[:, :, None]


# --- latent tokens -> genes ----------------------------------------------------------------------------------------


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
            return _by_table(mcab, head, query.to(wide), rows.row, k_BLD.to(wide), U_BRD, dtype)
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
        mlp_R = [apply(_Head, y_RD, W_FD.to(dtype), b_F.to(dtype)) for W_FD, b_F in folded(mcab.mlp, head)]
        return head(read_BQD.to(wide)) + _side_by_side(mlp_R).view(*read_BQD.shape[:2], -1)


def _side_by_side(numbers: list[Tensor]) -> Tensor:
    """A last axis of these. Of one without a copy."""
    return torch.stack(numbers, dim=-1) if len(numbers) > 1 else numbers[0][..., None]


def folded(mlp: SwiGLU, head: nn.Linear) -> list[tuple[Tensor, Tensor]]:
    """For each of the head's numbers the SwiGLU's first product as weight (2F, D) and bias (2F,), its value's half
    scaled so that the number is the plain sum of value * silu(gate): the last product and the head are both linear.
    """
    folded = []
    for w_F in head.weight @ mlp.out.weight:
        weight = torch.cat((mlp.value.weight * w_F[:, None], mlp.gate.weight))
        folded.append((weight, torch.cat((mlp.value.bias * w_F, mlp.gate.bias))))
    return folded


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


def heads_out(mcab: MCAB, v_BLD: Tensor) -> Tensor:
    """W_O applied to each head's values apart: U (B, N L, D), so that what a gene reads is p U."""
    N, (B, L, D) = mcab.n_heads, v_BLD.shape
    out_NHD = mcab.out.weight.T.view(N, -1, D)
    U_NTD = v_BLD.view(B * L, N, -1).transpose(0, 1) @ out_NHD
    return U_NTD.view(N, B, L, D).transpose(0, 1).flatten(1, 2)


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
    return linear_BKQ.transpose(1, 2) + _side_by_side(mlp_BQ)


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
            out_BQ[b, q] = _gated_sum(hidden, hidden)
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
            d_hidden = _gated_sum_backward(hidden, d_out[b, q], other)
            torch.bmm(B_BRF[b], d_hidden.transpose(1, 2), out=d_p[b, :, q])
            _add_product(d_B[b], p, d_hidden)
            d_b += d_hidden.sum((0, 1))
            torch.sum(torch.mul(d_hidden, T, out=other), -1, dtype=r_BQ.dtype, out=d_r[b, q])
            d_T[q].add_(d_hidden.mul_(r).sum(0))
        return d_p, d_r, d_T.to(T_QF.dtype), d_B.to(B_BRF.dtype), d_b.to(b_F.dtype)


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


def _by_table(
    mcab: MCAB, head: nn.Linear, query_TD: Tensor, row_BQ: Tensor, k_BLD: Tensor, U_BRD: Tensor, dtype: torch.dtype
) -> Tensor:
    """`_by_latents` of genes that are rows of a table, for each cell others. The first product is taken once a row. A
    cell fetches its genes' rows of t, for scores and LayerNorm's moments, and those of the product.
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
    return torch.baddbmm(linear_BQK, p_BRQ.transpose(1, 2), linear_BRK) + _side_by_side(mlp_BQ)


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
            out_BQ[b, q] = _gated_sum(hidden, hidden)
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
            d_hidden = _gated_sum_backward(hidden, d_out[b, q], other)
            torch.mm(B_BXF[b], d_hidden.T, out=d_w[b, :, q])
            _add_product(d_B[b], w, d_hidden)
            d_r[b, q] = T.mul_(d_hidden).sum(-1, dtype=r.dtype)
            d_T.index_add_(0, row, d_hidden.mul_(r).to(d_T.dtype))
        return d_w, d_r, d_T.to(T_TF.dtype), d_B.to(B_BXF.dtype), None


def _gene_tiles(r_BQ: Tensor, T_TF: Tensor, held: int) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """Of one cell after another as many genes as fill a tile, and memory for so many of its size."""
    space = _Space(r_BQ.shape[1], T_TF.shape[1], T_TF, held=held)
    for cell in range(len(r_BQ)):
        for genes in space.slices():
            yield cell, genes, space.held(genes.stop - genes.start, T_TF.shape[1])


class _Head(torch.autograd.Function):
    """sum of value * silu(gate) with (value, gate) = W y + b: (rows,), at least in float32.

    Tiles of the hidden layer that `kept_numbers` have room for are kept for backward. The others are made again.
    y (rows, D); W (2F, D); b (2F,)
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        y_RD, W_FD, b_F = inputs
        out_R = y_RD.new_empty(len(y_RD), dtype=torch.promote_types(y_RD.dtype, torch.float32))
        space = _Space(len(y_RD), len(b_F), y_RD)
        n_kept = kept_numbers(y_RD) // len(b_F) if any(ctx.needs_input_grad) else 0
        kept_KF = y_RD.new_empty(min(n_kept, len(y_RD)), len(b_F))
        for rows in space.slices():
            hidden, other = space.held(rows.stop - rows.start, len(b_F))
            if rows.stop <= len(kept_KF):
                hidden = torch.addmm(b_F, y_RD[rows], W_FD.T, out=kept_KF[rows])
                out_R[rows] = _gated_sum(hidden, other)
            else:
                out_R[rows] = _gated_sum(torch.addmm(b_F, y_RD[rows], W_FD.T, out=hidden), hidden)
        ctx.save_for_backward(*inputs, kept_KF)
        return out_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (d_out,) = grad_outputs
        y_RD, W_FD, b_F, kept_KF = ctx.saved_tensors
        d_y = torch.empty_like(y_RD)
        d_W, d_b = (torch.zeros_like(x, dtype=d_out.dtype) for x in (W_FD, b_F))
        space = _Space(len(y_RD), len(b_F), y_RD)
        for rows in space.slices():
            hidden, other = space.held(rows.stop - rows.start, len(b_F))
            if rows.stop <= len(kept_KF):
                hidden = kept_KF[rows]
            else:
                torch.addmm(b_F, y_RD[rows], W_FD.T, out=hidden)
            d_hidden = _gated_sum_backward(hidden, d_out[rows], other)
            torch.mm(d_hidden, W_FD, out=d_y[rows])
            _add_product(d_W, d_hidden.T, y_RD[rows])
            d_b += d_hidden.sum(0)
        return d_y, d_W.to(W_FD.dtype), d_b.to(b_F.dtype)


def _gated_sum(hidden: Tensor, other: Tensor) -> Tensor:
    """sum of value * silu(gate) over the last axis, which holds both. `other` is memory of its shape, or it itself."""
    value, gate = hidden.chunk(2, dim=-1)
    active = torch.ops.aten.silu.out(gate, out=other.chunk(2, dim=-1)[1])
    return active.mul_(value).sum(-1, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _gated_sum_backward(hidden: Tensor, d_out: Tensor, other: Tensor) -> Tensor:
    """Gradient to (value, gate), written over them. `other` is memory of the same shape."""
    value, gate = hidden.chunk(2, dim=-1)
    active = other.chunk(2, dim=-1)[0]
    d_out = d_out[..., None].to(hidden.dtype)
    torch.ops.aten.silu.out(gate, out=active)
    torch.ops.aten.silu_backward.grad_input(value.mul_(d_out), gate, grad_input=gate)
    torch.mul(active, d_out, out=value)
    return hidden


def _add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out += x y, or of several. It takes no memory of its own where they are of one precision."""
    if out.dtype != x.dtype:
        out += x @ y
    elif x.ndim == 3:
        out.baddbmm_(x, y)
    else:
        out.addmm_(x, y)


def _cell_gene_tiles(r_BQ: Tensor, T_QF: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """On a CPU a few genes of as many cells as fill a tile, so that the genes' table stays in the cache with it. On a
    GPU as many genes of all cells. And memory for two of its size.
    """
    (B, Q), F2 = r_BQ.shape, T_QF.shape[1]
    n_genes = max(1, tile_numbers(T_QF) // (B * F2 * GENES)) * GENES if on_gpu(T_QF) and B else GENES
    space = _Space(B, min(n_genes, Q) * F2, T_QF)
    for start in range(0, Q, n_genes):
        genes = slice(start, min(start + n_genes, Q))
        for cells in space.slices():
            hidden, other = space.held(cells.stop - cells.start, genes.stop - start, F2)
            yield cells, genes, hidden, other


def apply(function: type[torch.autograd.Function], *inputs: Tensor | float) -> Tensor:
    result = function.apply(*inputs)
    assert isinstance(result, Tensor)
    return result
