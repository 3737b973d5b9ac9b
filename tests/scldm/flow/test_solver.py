"""Euler and Heun on a flow whose solution is known: the linear path between N(mean, std^2) and N(0, 1)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scldm.flow.solver import SOLVERS

MEAN, STD = 1.5, 0.3


class GaussianFlow:
    """v(z, t) = E[noise - data | z_t = z]; counts its calls and notes the times it was asked for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, z: Tensor, t_B: Tensor) -> Tensor:
        assert t_B.shape == (len(z),)
        self.times.append(float(t_B[0]))
        t = t_B[:, None, None].double()
        variance = (1 - t) ** 2 * STD**2 + t**2
        return -MEAN + (t - (1 - t) * STD**2) / variance * (z - (1 - t) * MEAN)


NOISE = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]


def error(method: str, n_steps: int) -> float:
    """Against the exact map: the flow keeps quantiles, so noise e arrives at mean + std e."""
    return float((SOLVERS[method](GaussianFlow(), NOISE, n_steps) - (MEAN + STD * NOISE)).abs().max())


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_the_solver_reaches_its_order(method: str, order: int) -> None:
    steps = (64, 128, 256)
    errors = [error(method, n) for n in steps]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - order) < 0.15 for slope in slopes), (errors, slopes)
    assert errors[-1] < {1: 1e-2, 2: 1e-4}[order]


@pytest.mark.parametrize("method, calls", [("euler", 1), ("heun", 2)])
def test_times_run_from_noise_to_data_and_never_below_zero(method: str, calls: int) -> None:
    flow = GaussianFlow()
    SOLVERS[method](flow, NOISE, 7)
    assert len(flow.times) == 7 * calls
    assert flow.times[0] == 1
    assert flow.times == sorted(flow.times, reverse=True)
    assert min(flow.times) == (0 if method == "heun" else pytest.approx(1 / 7))
