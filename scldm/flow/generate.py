"""From conditions to latent tokens: noise -> latent tokens.

Every draw is keyed by (seed, number of the cell), so a cell does not depend on the batch that it was made in.
Reading order: SamplerConfig, Drawn, generate_latents, guided and solve_ode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scldm import draws
from scldm.arguments import one_of
from scldm.checked import Checked, checked
from scldm.errors import InputError
from scldm.flow import solver
from scldm.flow.guidance import GuidanceKind, GuidedField, VelocityField
from scldm.flow.shift import nearest_trained, way
from scldm.flow.solver import Method
from scldm.model.dit import DiT


@dataclass(frozen=True)
class SamplerConfig(Checked):
    """How latents are drawn.

    method: ODE by euler (one network evaluation a step), heun (two) or adaptive (as many as the tolerance asks for).
        SDE by sde_euler (one) or sde_heun (two)
    n_steps: steps from noise to latent. adaptive chooses its own
    guidance: joint (all conditions at once) or additive (each by itself, with a weight of its own). Two more kinds are
        as joint for trained combinations. For a combination that was never trained, shift takes latents of the nearest
        trained one and moves them by the mean shift of the labels that differ. compositional composes it of its
        trained parts
    guidance_scale: 0 ignores the conditions, 1 follows them, above 1 exaggerates them
    guidance_weights: additive: the scale of each condition by itself. guidance_scale for those not named
    guidance_from: flow time, 0 (cell) to 1 (noise), below which all scales are 1
    guidance_to: flow time above which all scales are 1
    tolerance: adaptive: relative and absolute error of a step
    diffusion: SDE: its noise, g^2 = diffusion x t
    """

    method: Method = "heun"
    n_steps: int = checked(50, at_least=1)
    guidance: GuidanceKind = "shift"
    guidance_scale: float = checked(1.0, at_least=0)
    guidance_weights: dict[str, float] = checked(factory=dict, at_least=0)
    guidance_from: float = checked(0.0, at_least=0, below=1)
    guidance_to: float = checked(1.0, above=0, at_most=1)
    tolerance: float = checked(1e-5, above=0, below=1)
    diffusion: float = checked(1.0, above=0)

    def __hash__(self) -> int:
        """Its weights are a mapping, which has no hash."""
        return hash(tuple(frozenset(of.items()) if isinstance(of, Mapping) else of for of in vars(self).values()))

    @property
    def guidance_interval(self) -> tuple[float, float]:
        return self.guidance_from, self.guidance_to

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():  # numbers of numpy, which JSON does not know
            if isinstance(value, Mapping):
                value = {key: of.item() if isinstance(of, np.generic) else of for key, of in value.items()}
            object.__setattr__(self, name, value.item() if isinstance(value, np.generic) else value)
        one_of("sampler.method", self.method, Method)
        one_of("sampler.guidance", self.guidance, GuidanceKind)
        if self.guidance_weights and self.guidance != "additive":
            raise InputError(
                f"sampler.guidance_weights belong to sampler.guidance=additive. {self.guidance} has one scale"
            )
        low, high = self.guidance_from, self.guidance_to
        if low >= high:
            raise InputError(f"sampler.guidance_from={low} and sampler.guidance_to={high} must be 0 <= from < to <= 1")


class Drawn(NamedTuple):
    """latent_BLZ: latent tokens of new cells, on the autoencoder's scale
    n_evaluations_B: of the network for each cell, one for each subset of its conditions that it was asked for, int64
    """

    latent_BLZ: Tensor
    n_evaluations_B: Tensor


@torch.no_grad()
def generate_latents(
    dit: DiT,
    conditions: dict[str, Tensor],
    cell_numbers_B: Tensor,
    seed: int,
    sampler: SamplerConfig,
    base: dict[str, Tensor] | None = None,
    size_B: Tensor | None = None,
) -> Drawn:
    """Draw latent tokens of new cells.

    conditions: of each of the model's conditions, label ids (B,), of continuous ones values. `null` where not given.
        On the CPU, else the host waits for them
    cell_numbers_B: the key of each cell's draws, int64
    base: what `nearest_trained` gives for the conditions, where it is known already
    size_B: library sizes, where the model's latents are, for a model that is told them. Of base's labels

    Raises: InputError for guidance that the model can't follow.
    """
    if sampler.guidance != "shift":
        base = conditions
    elif base is None:
        base = nearest_trained(dit, conditions)
    v = guided(dit, base, sampler, size_B)
    z_BLZ = draws.normal(seed, "generate noise", 0, cell_numbers_B, dit.latent_shape)

    def noise(step: int) -> Tensor:
        return draws.normal(seed, "sampler noise", step, cell_numbers_B, dit.latent_shape)

    if sampler.method == "sde_euler":
        z_BLZ = solver.sde_euler(v, z_BLZ, sampler.n_steps, noise, sampler.diffusion)
    elif sampler.method == "sde_heun":
        z_BLZ = solver.sde_heun(v, z_BLZ, sampler.n_steps, noise, sampler.diffusion)
    else:
        z_BLZ = solve_ode(v, z_BLZ, sampler)
    return Drawn(
        dit.unstandardise(z_BLZ + way(dit, base, conditions)), torch.zeros_like(cell_numbers_B) + v.n_evaluations_B
    )


def guided(
    dit: DiT, conditions: dict[str, Tensor], sampler: SamplerConfig, size_B: Tensor | None = None
) -> GuidedField:
    """The field that a sampler follows. Raises: InputError for guidance that the model can't follow."""
    return GuidedField(
        dit,
        conditions,
        sampler.guidance,
        sampler.guidance_scale,
        sampler.guidance_weights,
        sampler.guidance_interval,
        size_B,
    )


def solve_ode(v: VelocityField, z_BLZ: Tensor, sampler: SamplerConfig) -> Tensor:
    """From t = 1 to 0 by one of the ODE methods."""
    if sampler.method == "euler":
        return solver.euler(v, z_BLZ, sampler.n_steps)
    if sampler.method == "heun":
        return solver.heun(v, z_BLZ, sampler.n_steps)
    assert sampler.method == "adaptive", sampler.method
    return solver.adaptive(v, z_BLZ, sampler.tolerance)
