"""Cells as they would be under other conditions: each to its noise along the flow of its own, and back along another.

The noise keeps what the conditions do not say of a cell. Source: Su et al. 2023 (dual diffusion implicit bridges), here
for flow matching.
"""

from __future__ import annotations

from torch import Tensor

from scldm.errors import InputError
from scldm.flow.generate import solve
from scldm.flow.guidance import VelocityField
from scldm.flow.sampler import SamplerConfig


def to_noise(v_own: VelocityField, z_BLZ: Tensor, sampler: SamplerConfig) -> Tensor:
    """Standardised latents to their noise, from t = 0 to 1 along the flow of their own conditions, (B, L, Z).

    Raises: InputError for a method that is no ODE: only such a way leads back.
    """
    if sampler.is_sde:
        raise InputError(f"sampler.method={sampler.method} can't be followed to noise: euler, heun and adaptive can")
    # with s = 1 - t: a solver that goes from s = 1 to 0 goes from t = 0 to 1
    return solve(lambda z, s: -v_own(z, 1 - s), z_BLZ, sampler)


def blend(v_own: VelocityField, v_other: VelocityField, alpha: float) -> VelocityField:
    """A field between two: 0 is the first, 1 the second. Neither is evaluated in vain."""
    if alpha in (0.0, 1.0):
        return v_other if alpha else v_own
    return lambda z, t: (1 - alpha) * v_own(z, t) + alpha * v_other(z, t)
