"""Solvers from noise at t = 1 to a latent at t = 0.

ODE: dz/dt = v(z, t). SDE, with the same distribution at every t: dz = (v - g^2/2 * score) dt + g dW, run backwards. On
the linear path the score is -(z + (1 - t) v) / t, so that g^2 = diffusion * t keeps every term finite. 0 is the ODE.
Source: Ma et al. 2024 (SiT), Eq. 5 and section 3.5. Its choice "w = sigma" is diffusion = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scldm.errors import InputError
from scldm.flow.guidance import VelocityField

Noise = Callable[[int], Tensor]  # number of the step -> standard normal draws of the latents' shape
Kick = Callable[[int], Tensor | float]  # number of the step -> what is added to the latents after it


def no_kick(k: int) -> float:
    """That of an ODE."""
    return 0.0


def euler(v: VelocityField, z: Tensor, n_steps: int, kick: Kick = no_kick) -> Tensor:
    """First order, one evaluation of v per step. With kicks Euler-Maruyama, of weak order 1."""
    dt = 1 / n_steps
    for k in range(n_steps):
        z = z - dt * v(z, _time(k, n_steps)) + kick(k)
    return z


def heun(v: VelocityField, z: Tensor, n_steps: int, kick: Kick = no_kick) -> Tensor:
    """Second order (explicit trapezoid), two evaluations of v per step. With kicks, which must not depend on z, weak
    order 2. Source: Kloeden & Platen 1992, section 15.1, for additive noise."""
    dt = 1 / n_steps
    for k in range(n_steps):
        kicked = kick(k)
        slope = v(z, _time(k, n_steps))
        slope_ahead = v(z - dt * slope + kicked, _time(k + 1, n_steps))
        z = z - dt * (slope + slope_ahead) / 2 + kicked
    return z


def adaptive(v: VelocityField, z: Tensor, tolerance: float) -> Tensor:
    """Dormand-Prince 5(4) with steps as small as relative and absolute error per step of every cell ask for. Steps are
    shared by a batch, so a cell depends on the others of its batch, within the tolerance. v is asked at 1 >= t >= 0.

    Raises: InputError without the package torchdiffeq.
    """
    try:
        from torchdiffeq import odeint
    except ModuleNotFoundError:
        raise InputError("sampler.method=adaptive needs the package torchdiffeq: pip install 'scldm[ode]'") from None

    def worst_cell(error: Tensor) -> Tensor:
        # torchdiffeq may flatten the state
        return error.reshape(z.shape).flatten(1).square().mean(1).sqrt().max()

    ends = torch.tensor([1.0, 0.0], device=z.device, dtype=torch.float64)
    options = {"norm": worst_cell, "step_t": ends}  # the last step ends at 0. Else it goes beyond and interpolates back
    path: Any = odeint(
        lambda t, y: v(y, float(t)), z, ends, rtol=tolerance, atol=tolerance, method="dopri5", options=options
    )
    return path[-1]


def sde(v: VelocityField, n_steps: int, noise: Noise, diffusion: float) -> tuple[VelocityField, Kick]:
    """What `euler` and `heun` solve the SDE by: the drift v - g^2/2 * score, and the noise of each step."""

    def drift(z: Tensor, t: float) -> Tensor:
        velocity = v(z, t)
        return velocity + 0.5 * diffusion * (z + (1 - t) * velocity)

    def kick(k: int) -> Tensor:
        t, t_ahead = _time(k, n_steps), _time(k + 1, n_steps)  # the variance is the integral of g^2 over the step
        return (0.5 * diffusion * (t**2 - t_ahead**2)) ** 0.5 * noise(k)

    return drift, kick


def _time(k: int, n_steps: int) -> float:
    return (n_steps - k) / n_steps
