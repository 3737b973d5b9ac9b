"""The shapes of configs/vae and configs/ldm: golden parameter counts, near the published ones; FLOPs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.config import compose
from launch.train_ldm import TrainLDMConfig
from launch.train_vae import TrainVAEConfig
from scldm.batch import GeneCounts
from scldm.model.dit import DiT
from scldm.model.flops import vae_flops
from scldm.model.vae import VAE, VAEConfig

# preset: (genes, parameters, published)
GOLDEN = {
    "tiny": (765, 271_500, None),
    "dentate_gyrus": (17_002, 3_498_470, 3.4e6),
    "20m": (36_130, 23_841_814, 23.5e6),
    "70m": (36_130, 76_463_574, 75.4e6),
    "270m": (36_130, 267_378_454, 264e6),
}


@pytest.mark.parametrize("preset", GOLDEN)
def test_parameter_counts(preset):
    n_genes, n_parameters, published = GOLDEN[preset]
    config = compose(TrainVAEConfig, [f"vae/{preset}", "data.shards=shards", "run_dir=runs/vae"])
    assert config.model.decoder_cross_heads == 1
    with torch.device("meta"):
        found = sum(p.numel() for p in VAE(config.model, n_genes).parameters())
    assert found == n_parameters
    assert published is None or abs(found / published - 1) < 0.05


@pytest.mark.parametrize("preset", [preset for preset in GOLDEN if preset != "tiny"])
@pytest.mark.parametrize(("hardware", "n_ranks"), [("one_gpu", 1), ("node_8gpu", 8)])
def test_a_gpus_micro_batch_is_a_whole_gene_set_group(preset, hardware, n_ranks):
    """The most that a set for a group allows: a micro-batch may not cross groups."""
    config = compose(TrainVAEConfig, [f"vae/{preset}", f"hardware/{hardware}", "data.shards=shards", "run_dir=run"])
    assert config.data.given.gene_set_group == config.hardware.micro_batch == 128
    assert config.hardware.accumulation(config.train.global_batch, n_ranks) == 8 // n_ranks


# preset of configs/ldm: (latent tokens, labels of one condition, parameters, published)
GOLDEN_LDM = {"tiny": (8, 10, 339_920, None), "base": (64, 50, 9_870_352, 9.8e6), "large": (64, 50, 58_176_272, 60e6)}


@pytest.mark.parametrize("preset", GOLDEN_LDM)
def test_parameter_counts_of_the_diffusion_transformer(preset):
    n_latents, n_labels, n_parameters, published = GOLDEN_LDM[preset]
    config = compose(TrainLDMConfig, [f"ldm/{preset}", "data.shards=latents", "run_dir=runs/ldm"])
    with torch.device("meta"):
        found = sum(p.numel() for p in DiT(config.model, n_latents, 16, {"type": n_labels}).parameters())
    assert found == n_parameters
    assert published is None or abs(found / published - 1) < 0.05


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("kl_weight", [0.0, 1e-3])
def test_flops_are_those_of_the_formula(likelihood, kl_weight):
    config = VAEConfig(width=32, n_latents=6, latent_width=8, n_layers=2, kl_weight=kl_weight, likelihood=likelihood)
    given = GeneCounts(torch.arange(1, 41), torch.ones(5, 40, dtype=torch.int32))
    with FlopCounterMode(display=False) as counter:
        VAE(replace(config, attention="plain"), 100)(given, torch.arange(1, 61))
    assert sum(vae_flops(config, n_cells=5, n_given=40, n_asked=60).values()) == counter.get_total_flops()
