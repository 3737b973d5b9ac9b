"""What the fused kernels compute, written plainly: the specification of scldm/kernels, which they are tested against.

T rows of the tables, one for a gene; `row` says which of them a gene of the set is: (S,) where the cells share a set,
(B, S) where each has its own; -1 is no gene. R = N L pairs of a head and a latent token. F numbers of a hidden layer.
Reading order: one_over_deviation, pool, unpool.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scldm.count_basis import TokenKind, basis


def one_over_deviation(
    x_BS: Tensor, row: Tensor, uu_KK: Tensor, ue_TK: Tensor, ee_T: Tensor, eps: float, kind: TokenKind
) -> Tensor:
    """One over the standard deviation of a gene's token, (phi uu phi + 2 phi ue + ee + eps)^-1/2 with the K numbers
    phi(x) of its count; (B, S). A variance below 0, by rounding, counts as 0. It is 0 where there is no gene.
    """
    phi_BSK, of = basis(x_BS, kind), row.clamp_min(0)
    variance_BS = (phi_BSK * (phi_BSK @ uu_KK + 2 * ue_TK[of])).sum(-1) + ee_T[of]
    return (variance_BS.clamp_min(0) + eps).rsqrt().masked_fill(row < 0, 0.0)


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
    """softmax over genes of r (A + alpha phi), times r (values + phi a): (B, N, M, H); 0 where a cell has no gene.

    A gene's token is e_g + phi u with the K numbers phi(x) of its count, and r is one over its standard deviation.
    """
    there_BS = (row >= 0).expand_as(x_BS)
    A_BSNM, values_BSNH = A_TNM[row.clamp_min(0)], values_TNH[row.clamp_min(0)]
    phi_BSK, r = basis(x_BS, kind), r_BS[:, :, None, None]
    score_BSNM = r * (torch.einsum("bsk,nmk->bsnm", phi_BSK, alpha_NMK) + A_BSNM)
    score_BSNM = score_BSNM.masked_fill(~there_BS[:, :, None, None], torch.finfo(score_BSNM.dtype).min)
    p_BSNM = score_BSNM.softmax(1) * there_BS[:, :, None, None]
    value_BSNH = r * (values_BSNH + torch.einsum("bsk,knh->bsnh", phi_BSK, a_KNH))
    return torch.einsum("bsnm,bsnh->bnmh", p_BSNM, value_BSNH)


def unpool(
    q_TD: Tensor,
    k_BRD: Tensor,
    t_TD: Tensor,
    U_BRD: Tensor,
    line_T: Tensor,
    line_BR: Tensor,
    T_TF: Tensor,
    B_BRF: Tensor,
    b_F: Tensor,
    row: Tensor,
    n_heads: int,
    eps: float,
) -> Tensor:
    """line + sum of value * silu(gate) with (value, gate) = r (T + p B) + b, (B, Q): `head(f + SwiGLU(LN(f)))`.

    The SwiGLU's last product and the head fold into one. Its first one is taken of t (T) and of U (B).
    q_TD, k_BRD: queries over sqrt(H), and keys, which are 0 outside their head's channels
    """
    from scldm.kernels.unpool import weights  # Triton may be missing where this is imported

    p_BQR, r_BQ, line_BQ = weights(q_TD, k_BRD, t_TD, U_BRD, line_T, line_BR, row, n_heads, eps)
    hidden_BQF = r_BQ[:, :, None] * (T_TF[row] + p_BQR.to(B_BRF.dtype) @ B_BRF) + b_F
    value, gate = hidden_BQF.chunk(2, dim=-1)
    return line_BQ + (value * F.silu(gate)).sum(-1)
