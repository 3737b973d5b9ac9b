"""Encoding from all genes at the price of the expressed ones, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from launch.planning.of_encode import KERNELS_OF_A_CELL
from scldm.batch import GeneCounts
from scldm.count_basis import TokenKind
from scldm.model import all_genes
from scldm.model.all_genes import AllGenesEncoder
from scldm.model.flops import expressed_flops
from scldm.model.vae import VAE, VAEConfig
from scldm.train.step_cost import _Watch, vae_encode
from tests.rounding import APART

G, B, N_PREVALENT = 2_000, 6, 60
CONFIG = VAEConfig(width=32, n_latents=6, latent_width=8, n_layers=1, n_heads=4)
EVERY = torch.arange(1, G + 1)


def cells() -> tuple[Tensor, Tensor]:
    """Counts of 60 genes that all cells express and of many that few do; and how many do."""
    expressed_by = torch.full((G,), 0.04)
    expressed_by[:N_PREVALENT] = 1.0
    generator = torch.Generator().manual_seed(3)
    counts = torch.poisson(2 * torch.rand(B, G, generator=generator), generator=generator) + 1
    return (counts * (torch.rand(B, G, generator=generator) < expressed_by)).int(), expressed_by


def network(favour: float, spread: float = 3.0) -> VAE:
    """Zero-scores of about that spread; `favour` is added to those of the prevalent genes."""
    torch.manual_seed(0)
    vae = VAE(replace(CONFIG, attention="plain"), G).double().requires_grad_(False)
    vae.gene_embedding.weight.normal_()
    vae.latent_queries.normal_()
    if favour:  # all queries have something in common, which the keys of a direction in the tokens answer
        vae.pool.norm_query.bias.fill_(1.0)
        vae.token.count *= 1_500  # so that a count drowns it: what is taken away is not given back
    mcab, q_MD = vae.pool, vae.pool.norm_query(vae.pool.query(vae.latent_queries))
    mcab.key.weight.mul_(spread / float(zero_scores(vae).std()))
    if favour:
        direction_D = torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)
        common_NH = q_MD.view(6, 4, 8).mean(0)
        gain_NH = favour * common_NH / common_NH.square().sum(1, keepdim=True) * 8**0.5 / 32**0.5
        mcab.key.weight += torch.einsum("nh,d->nhd", gain_NH, direction_D).flatten(0, 1)
        away_D = torch.linalg.lstsq(vae.token.gene.weight, direction_D[:, None]).solution[:, 0]
        vae.gene_embedding.weight[1 : N_PREVALENT + 1] += 40 * away_D
    return vae


def zero_scores(vae: VAE) -> Tensor:
    """Of every gene at count 0, (N, M, G)."""
    mcab, none = vae.pool, torch.zeros(1, G, dtype=torch.int32)
    key_GD = mcab.key(mcab.norm_key(vae.token(vae.gene_embedding(EVERY), none)))[0]
    q_MD = mcab.norm_query(mcab.query(vae.latent_queries))
    return q_MD.view(6, 4, 8).transpose(0, 1) @ key_GD.view(G, 4, 8).permute(1, 2, 0) / 8**0.5


def errors(vae: VAE, counts: Tensor, prevalent: Tensor) -> tuple[float, float]:
    """Of AllGenesEncoder and of the formula, both in float32."""
    true = vae.encode(GeneCounts(EVERY, counts)).mean_BLZ
    single = VAE(vae.config, G).requires_grad_(False)
    single.load_state_dict(vae.state_dict())
    found = AllGenesEncoder(single, EVERY, prevalent).encode(counts).mean_BLZ
    plain = single.encode(GeneCounts(EVERY, counts)).mean_BLZ
    return float((found - true).abs().max()), float((plain - true).abs().max())


@pytest.mark.parametrize("known", [True, False], ids=["prevalence known", "unknown"])
@pytest.mark.parametrize("spread, favour", [(0.5, 0), (3, 0), (10, 0), (3, 20), (3, 40)])
def test_it_errs_as_the_formula_does(spread, favour, known):
    """Also where genes that a cell expresses would be almost all of what is taken away."""
    counts, expressed_by = cells()
    vae = network(favour, spread)
    scores = zero_scores(vae)
    assert favour == 0 or float(scores[..., :N_PREVALENT].mean() - scores[..., N_PREVALENT:].mean()) > 0.8 * favour
    found, plain = errors(vae, counts, expressed_by if known else torch.zeros(G))
    assert found < APART * max(plain, 2**-20)


def test_without_its_guard_it_would_not(monkeypatch):
    counts, _ = cells()
    monkeypatch.setattr(all_genes, "MOST_AMPLIFICATION", float("inf"))
    found, plain = errors(network(favour=40), counts, torch.zeros(G))
    assert not found < 10 * plain


@pytest.mark.parametrize("kl_weight, token", [(0.0, "bins"), (1e-3, "bins"), (0.0, "linear")])
def test_cells_of_nothing_of_everything_and_of_millions(kl_weight, token):
    torch.manual_seed(0)
    vae = VAE(replace(CONFIG, attention="plain", kl_weight=kl_weight, token=token), G).double().requires_grad_(False)
    counts = torch.stack([torch.zeros(G), torch.ones(G), (torch.arange(G) % 3 == 0) * 1e6]).int()
    found, plain = errors(vae, counts, torch.zeros(G))
    assert found < APART * max(plain, 2**-20)


def test_a_set_of_prevalent_genes_alone():
    counts, _ = cells()
    found, plain = errors(network(favour=0), counts, torch.ones(G))
    assert found < APART * max(plain, 2**-20)


@pytest.mark.parametrize("kl_weight, token, direct", [(0.0, "bins", True), (0.1, "linear", False)])
def test_the_plan_counts_what_is_computed(kl_weight: float, token: TokenKind, direct: bool) -> None:
    """FLOPs and kernels of a cell, by torch's own count, in which float64 costs no more than float32."""
    # of torch's fused attention among latent tokens, torch counts nothing on a CPU
    config = replace(CONFIG, n_layers=2, kl_weight=kl_weight, token=token, direct=direct, attention="plain")
    vae = VAE(config, G).requires_grad_(False)
    encoder = AllGenesEncoder(vae, EVERY, torch.zeros(G))
    counts = torch.zeros(B, G, dtype=torch.int32)
    counts[:, : (n_expressed := 70)] = 1
    with _Watch([]) as watch:
        encoder.encode(counts)
    in_float64 = B * 2 * n_expressed * CONFIG.n_latents * CONFIG.width
    assert watch.flops == B * expressed_flops(config, G, n_expressed) - in_float64
    with _Watch([]) as fewer:
        encoder.encode(counts[1:])
    assert watch.kernels - fewer.kernels == pytest.approx(KERNELS_OF_A_CELL, rel=0.15)


def test_the_traced_encoder_is_the_one_that_runs() -> None:
    config = replace(CONFIG, n_layers=3)
    vae, counts = VAE(config, 50).requires_grad_(False), torch.ones(B, 50, dtype=torch.int32)
    with _Watch([]) as watch:
        vae.encode(GeneCounts(EVERY[:50], counts))
    traced = vae_encode(config, 50, B, 50, False, device="cpu")
    assert (traced.flops, traced.n_parameters) == (watch.flops, sum(p.numel() for p in vae.parameters()))
