"""From genes to latent tokens: `pool`.

Reading order: pool, read_genes, Tables, tables, _OneOverDeviation, _Pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scldm.batch import GeneCounts
from scldm.model.factorised.functions import apply, centred, compute_dtype
from scldm.model.factorised.tiles import Space
from scldm.model.gene_rows import GeneRows
from scldm.model.mcab import MCAB
from scldm.model.token import GeneToken
from scldm.tf32 import tf32_products

# the score of a gene that is not there: exp(MASKED / sigma) is 0, and MASKED * 0 is, unlike -inf * 0
MASKED = -1e30


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
    the gene alone is computed once for all cells that share a set. Where each cell has its own set, it is computed once
    per gene of the vocabulary if the cells hold more genes than that.

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
        space = Space(B, M * S, r_BS, N if len(values) == 1 else 1)
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
        space = Space(B, M * S, r_BS, N if shared else 1)
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
