"""Where fused kernels can't run, that is said before anything is computed, and never is another path taken instead."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scldm
from launch.config import compose
from launch.train_vae import TrainVAEConfig, set_up
from scldm import kernels
from scldm.batch import GeneCounts
from scldm.errors import InputError
from scldm.library_size import LibrarySizeModel
from scldm.model.vae import VAE, VAEConfig, chosen
from scldm.model_folder import save_pretrained
from scldm.parallel.dist import World
from scldm.vocab import ConditionVocab, GeneVocab

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.attention=fused needs the package triton.*factorised"):
        kernels.check_available(torch.device("cuda"))


def test_without_a_gpu(with_triton):
    with pytest.raises(InputError, match=r"model\.attention=fused needs an NVIDIA GPU and this is cpu.*factorised"):
        kernels.check_available(CPU)


def test_on_a_gpu_that_is_too_old(with_triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(InputError, match=r"8\.0 or more.*Tesla V100 has less"):
        kernels.check_available(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels.check_available(torch.device("cuda"))


def test_training_is_refused_before_its_shards_are_opened(with_triton):
    words = ["vae/tiny", "data.shards=nowhere", "run_dir=runs/vae", "model.attention=fused"]
    with pytest.raises(InputError, match="NVIDIA GPU"):
        set_up(compose(TrainVAEConfig, words), World(0, 1, CPU))


def test_the_network_takes_no_other_path_by_itself(with_triton):
    vae = VAE(VAEConfig(width=16, n_latents=4, n_layers=1, attention="fused"), 20)
    with pytest.raises(InputError, match="NVIDIA GPU"):
        vae.encode(GeneCounts(torch.arange(1, 6), torch.ones(2, 5, dtype=torch.int32)))
    with pytest.raises(InputError, match="NVIDIA GPU"):
        vae.decode(torch.zeros(2, 4, 16), torch.arange(1, 6))


def test_more_heads_and_latents_than_fit_into_registers():
    config = VAEConfig(n_latents=64, decoder_cross_heads=4)
    with pytest.raises(InputError, match=r"decoder_cross_heads=4 only if .* at most 128, not 256. model.attention"):
        replace(config, attention="fused")


def test_trained_by_them_a_model_is_loaded_anywhere(tmp_path):
    config = VAEConfig(width=16, n_latents=4, n_layers=1, attention="fused")
    genes, nothing = GeneVocab(("CD3D", "MS4A1", "NKG7"), "symbol"), ConditionVocab({})
    save_pretrained(tmp_path / "model", VAE(config, 3), None, genes, nothing, LibrarySizeModel((), {}), {})
    model = scldm.load(tmp_path / "model")
    assert model.vae.config == replace(config, attention="auto")
    cells = ad.AnnData(np.array([[1, 0, 4], [0, 2, 1]]), var=pd.DataFrame(index=list(genes.ids)))
    assert np.isfinite(model.embed(cells)).all()


@pytest.mark.parametrize("heads, latents", [(3, 8), (6, 8), (16, 8), (2, 65), (1, 129)])
def test_decoders_whose_pairs_fill_no_tile(heads, latents):
    with pytest.raises(InputError, match=rf"decoder_cross_heads={heads} only if .*n_latents={latents} .*factorised"):
        VAEConfig(width=96, n_latents=latents, decoder_cross_heads=heads, attention="fused")


@pytest.mark.parametrize("width, latents, most", [(257, 4, 256), (129, 65, 128), (257, 64, 256)])
def test_heads_of_the_encoder_that_are_wider_than_a_tile(width, latents, most):
    """By name, before anything is built; `auto` takes another way."""
    kernels.check_head(most, latents)
    with pytest.raises(InputError, match=rf"at most {most} with model\.n_latents={latents}, not {width}. model"):
        VAEConfig(width=width, n_latents=latents, n_layers=0, n_heads=1, attention="fused")
    wide = VAEConfig(width=width, n_latents=latents, n_layers=0, n_heads=1)
    assert chosen(wide, torch.device("cuda"), torch.bfloat16).way == "factorised"


@pytest.mark.parametrize("heads, latents", [(1, 128), (4, 32), (8, 9)])
def test_decoders_whose_pairs_do(heads, latents):
    VAEConfig(width=96, n_latents=latents, decoder_cross_heads=heads, attention="fused")
