"""The factorised cross-attention in kernels of our own (scldm/kernels): the same function, the same parameters.

What depends on a gene or a cell alone is made here by torch. What depends on both is made and summed within a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scldm import kernels
from scldm.batch import GeneCounts
from scldm.model.factorised import compute_dtype, tables
from scldm.model.factorised.by_table import by_head
from scldm.model.factorised.functions import centred
from scldm.model.factorised.gated import folded
from scldm.model.factorised.unpooling import heads_out
from scldm.model.gene_rows import GeneRows
from scldm.model.mcab import MCAB
from scldm.model.token import GeneToken
from scldm.tf32 import tf32_products


def read_genes(
    mcab: MCAB, q_MD: Tensor, token: GeneToken, rows: GeneRows, given: GeneCounts, dtype: torch.dtype
) -> Tensor:
    """`factorised.read_genes`: what the latent queries read from the genes, (B, M, D).

    Raises: InputError where fused kernels can't run.
    """
    kernels.check_available(q_MD.device)
    from scldm.kernels.deviation import one_over_deviation
    from scldm.kernels.pool import pool

    N, (M, D) = mcab.n_heads, q_MD.shape
    of = tables(mcab, q_MD, token, rows.table_TD, dtype)
    x_BS = token.position(given.counts_BS)
    A_TNM, values_TNH, a_KNH = of.A_RT.T.view(-1, N, M), of.values_TD.view(-1, N, D // N), of.a_KD.view(-1, N, D // N)
    row = rows.rows.masked_fill(~given.mask, -1) if given.padded else rows.rows
    r_BS = one_over_deviation(x_BS, row, of.uu_KK, of.ue_TK, of.ee_T, of.eps, token.kind)
    read_BNMH = pool(x_BS, r_BS, row, of.alpha_NMK, A_TNM, values_TNH, a_KNH, token.kind)
    read_BMD = read_BNMH.transpose(1, 2).flatten(2) + of.offset_D
    if not given.padded:
        return read_BMD
    return read_BMD * given.mask.view(-1, given.mask.shape[-1]).any(1)[:, None, None]


def unpool(mcab: MCAB, head: nn.Linear, rows: GeneRows, x_BLD: Tensor) -> Tensor:
    """`factorised.unpool`: the numbers that the decoder says of each asked gene, (B, Q, K).

    rows: embeddings of the asked genes
    head: D -> K, without a bias

    Raises: InputError where fused kernels can't run.
    """
    kernels.check_available(x_BLD.device)
    from scldm.kernels.unpool import unpool as unpool_kernel

    N, D, wide, norm = mcab.n_heads, x_BLD.shape[-1], head.weight.dtype, mcab.norm_mlp
    dtype = compute_dtype(head.weight)
    row, query_TD = rows.rows, mcab.query(rows.table_TD)
    q_TD = mcab.norm_query(query_TD) * (D // N) ** -0.5
    k_BLD, v_BLD = mcab.key(mcab.norm_key(x_BLD)), mcab.value(mcab.norm_value(x_BLD))
    with torch.autocast(x_BLD.device.type, enabled=False), tf32_products(dtype == torch.bfloat16):
        k_BRD = by_head(k_BLD.to(dtype), N)
        U_BRD, t_TD = heads_out(mcab, v_BLD.to(wide)), query_TD.to(wide) + mcab.out.bias
        line_KT, line_KBR = head(t_TD).T, head(U_BRD).permute(2, 0, 1)
        t_TD, U_BRD = centred(t_TD), centred(U_BRD)
        numbers = []
        for (W_FD, b_F), line_T, line_BR in zip(folded(mcab.mlp, head), line_KT, line_KBR):
            scaled_FD, b_F = (W_FD * norm.weight).to(dtype), (b_F + W_FD @ norm.bias).to(dtype)
            T_TF, B_BRF = t_TD.to(dtype) @ scaled_FD.T, U_BRD.to(dtype) @ scaled_FD.T
            of_weights = (q_TD.to(dtype), k_BRD, t_TD, U_BRD, line_T, line_BR)
            numbers.append(unpool_kernel(*of_weights, T_TF, B_BRF, b_F, row, N, norm.eps))
    return torch.stack(numbers, dim=-1)
