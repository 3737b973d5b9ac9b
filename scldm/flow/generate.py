"""From conditions to latent tokens: noise -> latent tokens.

Every draw is keyed by (seed, number of the cell), so a cell does not depend on the batch that it was made in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scldm import draws
from scldm.flow import solver
from scldm.flow.guidance import GuidedField, VelocityField
from scldm.flow.sampler import SamplerConfig
from scldm.flow.shift import nearest_trained, way
from scldm.model.dit import DiT


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
    base: tuple[dict[str, Tensor], Tensor | float] | None = None,
    size_B: Tensor | None = None,
) -> Drawn:
    """Draw latent tokens of new cells.

    conditions: of each of the model's conditions, label ids (B,), of continuous ones values. `null` where not given.
        On the CPU, else the host waits for them
    cell_numbers_B: the key of each cell's draws, int64
    base: what `nearest_trained` gives for the conditions, and the `way` from there, (B, L, Z), where they are known
    size_B: library sizes, where the model's latents are, for a model that is told them. Of base's labels

    Raises: InputError for guidance that the model can't follow.
    """
    if base is None:
        labels = nearest_trained(dit, conditions) if sampler.guidance == "shift" else conditions
        base = labels, way(dit, labels, conditions)
    labels, way_BLZ = base
    v = GuidedField(dit, labels, sampler, size_B)
    z_BLZ = draws.normal(seed, "generate noise", 0, cell_numbers_B, dit.latent_shape)

    def noise(step: int) -> Tensor:
        return draws.normal(seed, "sampler noise", step, cell_numbers_B, dit.latent_shape)

    z_BLZ = solve(v, z_BLZ, sampler, noise)
    return Drawn(dit.unstandardise(z_BLZ + way_BLZ), torch.zeros_like(cell_numbers_B) + v.n_evaluations_B)


@torch.no_grad()
def solve(v: VelocityField, z_BLZ: Tensor, sampler: SamplerConfig, noise: solver.Noise | None = None) -> Tensor:
    """From t = 1 to 0 by the sampler's method. noise: for an SDE"""
    if sampler.method == "adaptive":
        return solver.adaptive(v, z_BLZ, sampler.tolerance)
    kick, step = solver.no_kick, solver.heun if sampler.method.endswith("heun") else solver.euler
    if sampler.is_sde:
        assert noise is not None
        v, kick = solver.sde(v, sampler.n_steps, noise, sampler.diffusion)
    return step(v, z_BLZ, sampler.n_steps, kick)
