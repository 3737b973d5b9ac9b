"""Solvers of dz/dt = v(z, t) from noise at t = 1 to a latent at t = 0, in equal steps. Reading order: euler, heun."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scldm.flow.guidance import VelocityField

Method = Literal["euler", "heun"]


def euler(v: VelocityField, z: Tensor, n_steps: int) -> Tensor:
    """First order; one evaluation of v per step."""
    dt = 1 / n_steps
    for k in range(n_steps):
        z = z - dt * v(z, _times(z, 1 - k * dt))
    return z


def heun(v: VelocityField, z: Tensor, n_steps: int) -> Tensor:
    """Second order (explicit trapezoid); two evaluations of v per step."""
    dt = 1 / n_steps
    for k in range(n_steps):
        slope = v(z, _times(z, 1 - k * dt))
        slope_ahead = v(z - dt * slope, _times(z, 1 - (k + 1) * dt))
        z = z - dt * (slope + slope_ahead) / 2
    return z


def _times(z: Tensor, t: float) -> Tensor:
    return torch.full((len(z),), max(t, 0.0), device=z.device, dtype=torch.float32)


SOLVERS = {"euler": euler, "heun": heun}
