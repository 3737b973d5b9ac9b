"""Through noise and back: exact on flows between Gaussians, whose maps are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scldm.errors import InputError
from scldm.flow.generate import solve
from scldm.flow.guidance import GuidedField, VelocityField
from scldm.flow.sampler import SamplerConfig
from scldm.flow.transform import blend, to_noise
from tests.scldm.flow.test_guidance import random_model


def of_gaussian(mean: float, std: float) -> VelocityField:
    """E[noise - z | z_t] where z ~ N(mean, std^2): its flow takes z to the noise (z - mean) / std."""

    def v(z: Tensor, t: float) -> Tensor:
        slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return slope * (z - (1 - t) * mean) - mean

    return v


def through_noise(own: VelocityField, other: VelocityField, z: Tensor, sampler: SamplerConfig) -> Tensor:
    return solve(other, to_noise(own, z, sampler), sampler)


CELLS = torch.linspace(-3, 5, 24, dtype=torch.float64).view(4, 2, 3)
PRECISE = [SamplerConfig("heun", 400), SamplerConfig("adaptive", tolerance=1e-8), SamplerConfig("euler", 20_000)]


@pytest.mark.heavy
@pytest.mark.parametrize("sampler", PRECISE, ids=lambda sampler: sampler.method)
def test_a_cell_keeps_its_place_among_others_of_its_condition(sampler: SamplerConfig) -> None:
    """Mean -> mean and a standard deviation -> a standard deviation."""
    moved = through_noise(of_gaussian(1.0, 2.0), of_gaussian(-4.0, 0.5), CELLS, sampler)
    torch.testing.assert_close(moved, -4.0 + 0.5 * (CELLS - 1.0) / 2.0, atol=2e-3, rtol=0)
    back = through_noise(of_gaussian(1.0, 2.0), of_gaussian(1.0, 2.0), CELLS, sampler)
    torch.testing.assert_close(back, CELLS, atol=2e-3, rtol=0)


def test_the_way_back_errs_by_the_order_of_the_solver() -> None:
    own, other = of_gaussian(1.0, 2.0), of_gaussian(-4.0, 0.5)
    expected = -4.0 + 0.5 * (CELLS - 1.0) / 2.0
    for method, order in (("euler", 1), ("heun", 2)):
        errors = [
            float((through_noise(own, other, CELLS, SamplerConfig(method, n)) - expected).abs().max())
            for n in (100, 200)
        ]
        assert 2**order * 0.8 < errors[0] / errors[1] < 2**order * 1.25, (method, errors)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_a_blend_goes_part_of_the_way(alpha: float) -> None:
    """Of equal spread, so that the averaged velocity is that of the averaged mean."""
    own, other = of_gaussian(1.0, 2.0), of_gaussian(-4.0, 2.0)
    moved = through_noise(own, blend(own, other, alpha), CELLS, SamplerConfig("heun", 400))
    torch.testing.assert_close(moved, CELLS - 5 * alpha, atol=2e-3, rtol=0)


def test_the_ends_of_a_blend_cost_one_evaluation() -> None:
    own, other = of_gaussian(1.0, 2.0), of_gaussian(-4.0, 2.0)
    assert blend(own, other, 0.0) is own
    assert blend(own, other, 1.0) is other


@pytest.mark.parametrize("sampler", [SamplerConfig("adaptive", tolerance=1e-3), SamplerConfig("heun", 7)])
def test_no_time_lies_beyond_a_cell_or_beyond_noise(sampler: SamplerConfig) -> None:
    own, times = of_gaussian(1.0, 2.0), []

    def noting(z: Tensor, t: float) -> Tensor:
        times.append(t)
        return own(z, t)

    to_noise(noting, CELLS, sampler)
    assert (min(times), max(times)) == (0, 1)


@pytest.mark.parametrize("n_steps", [3, 10, 30, 70])
@pytest.mark.parametrize("end", [0.3, 0.7, 0.9])
def test_guidance_acts_at_the_same_times_there_and_back(n_steps: int, end: float) -> None:
    """1 - s is not t to the last bit: 1 - 0.7 lies above 0.3."""
    model = random_model({"type": 3}, [[0], [1], [2]]).float()
    for interval in ((0.0, end), (end, 1.0)):
        guided = SamplerConfig(guidance_scale=2.0, guidance_from=interval[0], guidance_to=interval[1])
        v = GuidedField(model, {"type": torch.tensor([0, 1])}, guided)
        cost = []
        for way in (to_noise, solve):
            v.n_evaluations_B = 0
            way(v, torch.zeros(2, 3, 4), SamplerConfig("heun", n_steps))
            cost.append(torch.as_tensor(v.n_evaluations_B).tolist())
        assert cost[0] == cost[1], interval


@pytest.mark.parametrize("method", ["sde_euler", "sde_heun"])
def test_an_sde_does_not_lead_back(method) -> None:
    v = of_gaussian(0.0, 1.0)
    with pytest.raises(InputError, match=f"sampler.method={method} can't be followed to noise: euler, heun"):
        through_noise(v, v, CELLS, SamplerConfig(method, 5))
