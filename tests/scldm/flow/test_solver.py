"""Solvers on a flow whose solution is known: the linear path between N(mean, std^2) and N(0, 1)."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from scldm.errors import InputError
from scldm.flow.solver import adaptive, euler, heun, sde

MEAN, STD = 1.5, 0.3
ODE = {"euler": euler, "heun": heun}
SDE = {"sde_euler": euler, "sde_heun": heun}


class GaussianFlow:
    """v(z, t) = E[noise - data | z_t = z]; notes the times it was asked for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, z: Tensor, t: float) -> Tensor:
        self.times.append(t)
        variance = (1 - t) ** 2 * STD**2 + t**2
        return -MEAN + (t - (1 - t) * STD**2) / variance * (z - (1 - t) * MEAN)


NOISE = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]


def error(method: str, n_steps: int) -> float:
    """Against the exact map: the flow keeps quantiles, so noise e arrives at mean + std e."""
    return float((ODE[method](GaussianFlow(), NOISE, n_steps) - (MEAN + STD * NOISE)).abs().max())


def weak_error(method: str, n_steps: int, diffusion: float) -> float:
    """Of mean and standard deviation of the samples, exactly: as the flow is linear, so is the sample in all its draws,
    whose coefficients are what a unit in each changes. Row 0 has no draw, row 1 the start's, row 2 + k step k's."""
    n = n_steps + 2

    def one_at(row: int) -> Tensor:
        return (torch.arange(n) == row).double()[:, None, None]

    drift, kick = sde(GaussianFlow(), n_steps, lambda step: one_at(2 + step), diffusion)
    end = SDE[method](drift, one_at(1), n_steps, kick)[:, 0, 0]
    mean, std = end[0], (end[1:] - end[0]).square().sum().sqrt()
    return max(abs(float(mean) - MEAN), abs(float(std) - STD))


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_the_solver_reaches_its_order(method: str, order: int) -> None:
    steps = (64, 128, 256)
    errors = [error(method, n) for n in steps]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - order) < 0.15 for slope in slopes), (errors, slopes)
    assert errors[-1] < {1: 1e-2, 2: 1e-4}[order]


@pytest.mark.parametrize("diffusion", [1.0, 4.0])
@pytest.mark.parametrize("method, order", [("sde_euler", 1), ("sde_heun", 2)])
def test_the_sde_has_the_flows_distribution_and_reaches_its_weak_order(
    method: str, order: int, diffusion: float
) -> None:
    steps = (64, 128, 256)
    errors = [weak_error(method, n, diffusion) for n in steps]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - order) < 0.2 for slope in slopes), (errors, slopes)
    assert errors[-1] < {1: 1e-2, 2: 1e-4}[order] * diffusion


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_adaptive_solver_keeps_its_tolerance_for_every_cell(tolerance: float) -> None:
    pytest.importorskip("torchdiffeq", reason="needs the extra `ode`")
    flow = GaussianFlow()
    end = adaptive(flow, NOISE, tolerance)
    assert (end - (MEAN + STD * NOISE)).abs().max() < 20 * tolerance
    # a looser one would be cheaper
    cheap = GaussianFlow()
    adaptive(cheap, NOISE, 10 * tolerance)
    assert len(cheap.times) < len(flow.times)
    # the worst cell decides: cells that are easy do not let it get away with more
    easy = torch.cat((NOISE, torch.zeros(1_000, 1, 1, dtype=torch.float64)))
    crowd = GaussianFlow()
    adaptive(crowd, easy, tolerance)
    assert len(crowd.times) == len(flow.times)


def test_without_torchdiffeq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(InputError, match=r"scldm\[ode\]"):
        adaptive(GaussianFlow(), NOISE, 1e-3)


@pytest.mark.parametrize("method, calls", [("euler", 1), ("heun", 2), ("sde_euler", 1), ("sde_heun", 2)])
def test_times_run_from_noise_to_data_and_never_below_zero(method: str, calls: int) -> None:
    flow = GaussianFlow()
    if method in ODE:
        ODE[method](flow, NOISE, 7)
    else:
        drift, kick = sde(flow, 7, lambda step: torch.zeros_like(NOISE), 1.0)
        SDE[method](drift, NOISE, 7, kick)
    assert len(flow.times) == 7 * calls
    assert flow.times[0] == 1
    assert flow.times == sorted(flow.times, reverse=True)
    assert min(flow.times) == (0 if calls == 2 else pytest.approx(1 / 7))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
def test_the_adaptive_solver_ends_at_zero_and_does_not_come_back_from_beyond(tolerance: float) -> None:
    """Below 0 a network was never trained, and what is interpolated back is less precise than what was solved."""
    pytest.importorskip("torchdiffeq", reason="needs the extra `ode`")
    flow = GaussianFlow()
    end = adaptive(flow, NOISE, tolerance)
    assert max(flow.times) == 1
    assert 0 <= min(flow.times) < 1e-300  # torchdiffeq looks just beside the end of a step
    assert (end - (MEAN + STD * NOISE)).abs().max() < 2 * tolerance
