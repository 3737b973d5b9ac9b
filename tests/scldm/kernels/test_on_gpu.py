"""With SCLDM_TEST_GPU=1 the tests of kernels and attention run on CUDA, or this one fails: else all of them could pass
in Triton's interpreter, on a machine whose driver is not found."""

from __future__ import annotations

import os

import pytest
import torch

from scldm.batch import GeneCounts
from scldm.model.vae import VAE, VAEConfig
from tests.scldm.kernels import test_plain
from tests.scldm.model.test_attention_paths import at_preset, check_preset

NEEDS_GPU = pytest.mark.skipif(
    os.environ.get("SCLDM_TEST_GPU") != "1", reason="needs an NVIDIA GPU and SCLDM_TEST_GPU=1"
)


@NEEDS_GPU
def test_kernels_run_on_cuda() -> None:
    """The profiler sees kernels of ours, forward and backward."""
    assert torch.cuda.is_available(), "SCLDM_TEST_GPU=1 and torch finds no CUDA GPU"
    assert os.environ.get("TRITON_INTERPRET") != "1", "Triton's interpreter would run kernels on the CPU"
    assert test_plain.DEVICE == "cuda"
    shape = VAEConfig(width=32, n_latents=8, latent_width=8, n_layers=1, n_heads=2, attention="fused")
    vae = VAE(shape, 40).cuda()
    given = GeneCounts(torch.arange(1, 33), torch.ones(3, 32, dtype=torch.int32)).to(torch.device("cuda"))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        _, predicted = vae(given, given.gene_ids)
        predicted.nll_B(given, torch.full((3,), 32.0, device="cuda")).sum().backward()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    names = {event.name for event in recorded.events() or [] if event.device_type == on_gpu}
    assert {"_forward", "_backward", "_to_tables"} <= names, f"none of ours among {sorted(names)}"


@NEEDS_GPU
@pytest.mark.parametrize("preset", ["20m", "dentate_gyrus"])
@pytest.mark.parametrize("per_cell", [False, True], ids=["shared", "per cell"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_fused_kernels_at_a_presets_shape(preset: str, per_cell: bool, bf16: bool) -> None:
    assert torch.cuda.is_available(), "SCLDM_TEST_GPU=1 and torch finds no CUDA GPU"
    check_preset(at_preset(preset, 4, 1_024, per_cell), bf16)
