"""Encoding cells from all genes of a set at the price of the genes that they express.

The direct way alone takes them all, for D multiply-accumulates each.

A gene that a cell does not express has the same score and value in every such cell. The sums over all genes at count 0
are taken once. A cell adds its expressed genes and takes their zeros away again. Genes that are expressed in many
cells are not in those sums: there, what is taken away would be most of what there is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scldm.batch import GeneCounts
from scldm.model import factorised
from scldm.model.gene_rows import rows_of
from scldm.model.predicted import Posterior
from scldm.model.vae import VAE

PREVALENT = 0.2  # share of cells. A gene expressed in more of them is summed in each cell by itself
# sum of what is added over what remains: beyond it float64 sums of float32 terms (6e-8 each) keep too few digits
MOST_AMPLIFICATION = 1e6


class AllGenesEncoder:
    """The posterior of cells over one gene set, in inference. Equal to `vae.encode` up to rounding.

    gene_ids_S: the set, without padding. Counts are of these genes, zeros included
    prevalent_S: share of cells that express each gene. It changes speed and never the result
    """

    @torch.no_grad()
    def __init__(self, vae: VAE, gene_ids_S: Tensor, prevalent_S: Tensor) -> None:
        assert (gene_ids_S > 0).all(), "padding has no place in a set that all cells share"
        self.vae, self.gene_ids_S = vae, gene_ids_S
        mcab = vae.pool
        self.query_MD = mcab.query(vae.latent_queries)
        q_MD = mcab.norm_query(self.query_MD)
        self.of = factorised.tables(mcab, q_MD, vae.token, vae.gene_embedding(gene_ids_S), q_MD.dtype)
        # a row per gene, so that a cell's genes are whole rows. A count of 0 adds nothing to a token
        self.A_SR = self.of.A_RT.T.contiguous()
        self.base_S = prevalent_S.to(gene_ids_S.device) <= PREVALENT
        self.always_P = (~self.base_S).nonzero()[:, 0]
        r0_S1 = self.of.scale(torch.zeros_like(self.of.ue_TK), self.of.ue_TK, self.of.ee_T)[:, None]
        score_SR = r0_S1 * self.A_SR
        base_S1 = self.base_S[:, None]
        self.max_R = score_SR.masked_fill(~base_S1, -torch.inf).amax(0)
        self.e0_SR = torch.exp(score_SR - self.max_R).where(base_S1, 0.0)
        self.e0r_SR = self.e0_SR * r0_S1
        self.Z0_R = self.e0_SR.sum(0, dtype=torch.float64)
        self.N0_RH = self._values_of(self.e0r_SR.double(), self.of.values_TD.double())

    def encode(self, counts_BS: Tensor) -> Posterior:
        """counts_BS: raw counts of the set's genes, (B, S)."""
        with torch.no_grad():
            return self.vae.posterior(self.pool(counts_BS))

    @torch.no_grad()
    def pool(self, counts_BS: Tensor) -> Tensor:
        """What the encoder's blocks get of the genes, (B, L, D)."""
        read, unsafe = [], []
        for counts_S in counts_BS:
            read_MD, safe = self._read(counts_S)
            read.append(read_MD)
            unsafe.append(not safe)
        vae, mcab = self.vae, self.vae.pool
        x_BMD = self.query_MD + mcab.out(torch.stack(read))
        x_BMD = x_BMD + mcab.mlp(mcab.norm_mlp(x_BMD))
        if any(unsafe):
            again = torch.tensor(unsafe, device=counts_BS.device)
            given, rows = GeneCounts(self.gene_ids_S, counts_BS[again]), rows_of(self.gene_ids_S, vae.gene_embedding)
            x_BMD[again] = factorised.pool(mcab, vae.latent_queries, vae.token, rows, given, factorised.read_genes)
        if vae.config.direct:
            x_BMD += vae.direct_in(GeneCounts(self.gene_ids_S, counts_BS))[:, None]
        return x_BMD

    def _read(self, counts_S: Tensor) -> tuple[Tensor, bool]:
        """What the queries read of one cell, (M, D), and whether enough digits are left of it."""
        of, (N, M, _) = self.of, self.of.alpha_NMK.shape
        expressed_E = ((counts_S > 0) & self.base_S).nonzero()[:, 0]
        direct_X = torch.cat((expressed_E, self.always_P))
        phi = self.vae.token.phi(counts_S[direct_X])
        r_X1 = of.scale(phi, of.ue_TK[direct_X], of.ee_T[direct_X])[:, None]
        score_XR = torch.addmm(self.A_SR[direct_X], phi, of.alpha_NMK.flatten(0, 1).T).mul_(r_X1)
        max_R = torch.maximum(self.max_R, score_XR.amax(0)) if len(direct_X) else self.max_R
        e_XR = score_XR.sub_(max_R).exp_()
        added_R = e_XR.sum(0, dtype=torch.float64)
        w_XR = e_XR.mul_(r_X1)
        added_RH = self._values_of(w_XR, of.values_TD[direct_X]) + self._values_of(phi.T @ w_XR, of.a_KD)
        # what is taken away are the very float32 numbers that were added, in float64
        zero_RH = self._values_of(self.e0r_SR[expressed_E].double(), of.values_TD[expressed_E].double())
        zero_R = self.e0_SR[expressed_E].sum(0, dtype=torch.float64)
        shrink_R = torch.exp((self.max_R - max_R).double())
        Z_R = (self.Z0_R - zero_R) * shrink_R + added_R
        read_RH = ((self.N0_RH - zero_RH) * shrink_R[:, None] + added_RH) / Z_R[:, None]
        most = (self.Z0_R * shrink_R + added_R) / Z_R
        safe = bool(((Z_R > 0) & (most < MOST_AMPLIFICATION)).all())
        read_MD = read_RH.view(N, M, -1).transpose(0, 1).flatten(1).to(w_XR.dtype)
        return read_MD + of.offset_D, safe

    def _values_of(self, w_XR: Tensor, values_XD: Tensor) -> Tensor:
        """Each head's weighted sum of values, (R, H)."""
        (N, M, _), (X, D) = self.of.alpha_NMK.shape, values_XD.shape
        return (w_XR.T.view(N, M, X) @ values_XD.view(X, N, D // N).transpose(0, 1)).flatten(0, 1)


def encoder_of(vae: VAE, gene_ids_S: Tensor, prevalent_S: np.ndarray) -> Callable[[Tensor], Posterior]:
    """From counts of a gene set, (B, S), to the posterior: on a CPU by AllGenesEncoder if attention is factorised.

    On a GPU all genes are read. That takes 4 M D FLOPs and more per gene and cell (1.3 GFLOP at 20,000 genes, 64 latent
    tokens and a width of 256). It should take less time than launching the dozens of small kernels of a cell. Not
    measured on a GPU.
    """
    if vae.attention.way in ("factorised", "fused") and gene_ids_S.device.type == "cpu":
        return AllGenesEncoder(vae, gene_ids_S, torch.tensor(np.asarray(prevalent_S))).encode
    return lambda counts_BS: vae.encode(GeneCounts(gene_ids_S, counts_BS))
