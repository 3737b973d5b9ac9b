"""Classifier-free guidance at 0, 1 and 2: what it gives and what it costs."""

from __future__ import annotations

import pytest
import torch

from scldm.flow.generate import SamplerConfig, generate_latents
from scldm.flow.guidance import joint_guidance
from scldm.model.dit import DiT, DiTConfig

LABELS = {"type": 3, "donor": 2}


@pytest.fixture
def model() -> DiT:
    """A transformer with random weights; at its own start it gives 0 whatever is asked."""
    torch.manual_seed(1)
    model = DiT(DiTConfig(16, 1, 2), 3, 4, LABELS).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


@pytest.fixture
def rows_asked(model: DiT) -> list[int]:
    """How many rows each call of the network had."""
    rows: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    return rows


def test_guidance_is_eq_11_and_costs_one_call(model: DiT, rows_asked: list[int]) -> None:
    z, t = torch.randn(5, 3, 4), torch.rand(5)
    ids = {"type": torch.tensor([0, 1, 2, 3, 1]), "donor": torch.tensor([0, 1, 2, 0, 1])}
    null = {name: torch.full((5,), n) for name, n in LABELS.items()}
    given, free = model(z, t, ids), model(z, t, null)
    assert (given - free)[:2].abs().max() > 0.1  # else this tests nothing
    rows_asked.clear()
    torch.testing.assert_close(joint_guidance(model, ids, 0)(z, t), free)
    torch.testing.assert_close(joint_guidance(model, ids, 1)(z, t), given)
    assert rows_asked == [5, 5]
    torch.testing.assert_close(joint_guidance(model, ids, 2)(z, t), free + 2 * (given - free), atol=1e-5, rtol=1e-5)
    assert rows_asked == [5, 5, 10]


@pytest.mark.parametrize(
    "method, scale, calls", [("euler", 1.0, [5] * 4), ("heun", 1.0, [5] * 8), ("heun", 2.0, [10] * 8)]
)
def test_sampling_costs_what_the_config_says(model: DiT, rows_asked: list[int], method, scale, calls) -> None:
    ids = {name: torch.zeros(5, dtype=torch.int64) for name in LABELS}
    sampler = SamplerConfig(method=method, n_steps=4, guidance_scale=scale)
    latents = generate_latents(model, ids, torch.arange(5), 0, sampler)
    assert rows_asked == calls
    # a cell's latents are its own: another seed or number gives others, another batch does not
    alone = generate_latents(model, {k: v[:1] for k, v in ids.items()}, torch.tensor([3]), 0, sampler)
    torch.testing.assert_close(alone[0], latents[3])
    assert not torch.allclose(generate_latents(model, ids, torch.arange(5), 1, sampler)[3], latents[3], atol=0.1)


def test_latents_come_back_on_the_autoencoders_scale(model: DiT) -> None:
    ids = {name: torch.zeros(4, dtype=torch.int64) for name in LABELS}
    sampler = SamplerConfig(n_steps=2)
    plain = generate_latents(model, ids, torch.arange(4), 0, sampler)
    model.latent_mean_LZ += 5.0
    model.latent_std_LZ *= 3.0
    torch.testing.assert_close(generate_latents(model, ids, torch.arange(4), 0, sampler), plain * 3 + 5)
    torch.testing.assert_close(model.standardise(plain * 3 + 5), plain, atol=1e-5, rtol=1e-5)
