"""A model folder of 30 genes that takes no training, cells that it knows, and what is asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import scldm
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.model_folder import save_pretrained
from scldm.pretrained import Pretrained
from scldm.vocab import ConditionVocab, GeneVocab

G, L, Z = 30, 3, 4
GENES = GeneVocab(tuple(f"ENSG{k:05d}" for k in range(G)), "ensembl")
CONDITIONS = ConditionVocab({"type": ("T cell", "B cell", "NK"), "donor": ("d1", "d2")})
FEW = SamplerConfig("euler", 3)


def library_sizes() -> LibrarySizeModel:
    """Fitted for T and B cells and both donors, and for T cells of d1 alone: nobody saw an NK cell."""
    of = {(): {(): LogNormal(9, 6.0, 0.2)}, ("type",): {}, ("donor",): {}, ("type", "donor"): {}}
    of["type",] = {("T cell",): LogNormal(5, 5.0, 0.1), ("B cell",): LogNormal(4, 7.0, 0.1)}
    of["donor",] = {("d1",): LogNormal(5, 5.0, 0.1), ("d2",): LogNormal(4, 7.0, 0.1)}
    of["type", "donor"] = {("T cell", "d1"): LogNormal(5, 5.0, 0.1)}
    return LibrarySizeModel(("type", "donor"), of)


def networks() -> tuple[VAE, DiT]:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(16, L, Z, 1, 2, 1, 0.01), G).eval()
    labels = {name: CONDITIONS.n_labels(name) for name in CONDITIONS.names}
    dit = DiT(DiTConfig(16, 1, 2, library_size=True), L, Z, labels).eval()
    for network in (vae, dit):
        for name, parameter in network.named_parameters():
            if "log_theta" not in name:
                parameter.data.normal_(std=0.3)
    vae.gene_embedding.weight.data[0] = 0
    dit.latent_mean_LZ += 0.5
    dit.size.log_moments.copy_(torch.tensor([6.0, 0.8]))
    return vae, dit


def cells(n: int = 70) -> Any:
    counts = np.random.default_rng(0).poisson(2, (n, G)).astype(np.float32)
    counts[:, 0] += 1
    return ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=pd.Index(GENES.ids)))


def wanted(n: int = 10) -> pd.DataFrame:
    return pd.DataFrame({"type": ["T cell", "B cell"] * (n // 2)})


def of_doses(tmp_path: Path) -> Pretrained:
    """A model of dose (the last held out), type (known by vectors, one of which no cell had) and donor (the last held
    out), trained on three combinations."""
    donors = ("d1", "d2", "held out")
    vocab = ConditionVocab({"dose": ("0", "1.0", "10", "20"), "type": ("T cell", "B cell", "NK"), "donor": donors})
    torch.manual_seed(0)
    dit = DiT(
        DiTConfig(16, 1, 2, continuous={"dose": "log"}, combination_tokens=True),
        L,
        Z,
        {name: vocab.n_labels(name) for name in vocab.names},
        values={"dose": torch.tensor([0.0, 1.0, 10.0, 20.0])},
        features={"type": torch.randn(3, 5)},
        combinations_KC=torch.tensor([[2, 1, 1], [0, 0, 0], [1, 0, 0]]),
    )
    for parameter in dit.parameters():
        parameter.data.normal_(std=0.3)
    sizes: dict = {("donor",): {("d1",): LogNormal(20, 6.0, 0.2)}}
    sizes["dose", "type", "donor"] = {("1.0", "T cell", "d1"): LogNormal(20, 5.0, 0.2)}
    save_pretrained(tmp_path / "model", networks()[0], dit, GENES, vocab, LibrarySizeModel(vocab.names, sizes), {})
    return scldm.load(tmp_path / "model")
