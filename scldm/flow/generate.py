"""From conditions to counts: noise -> latent tokens -> expected counts -> counts.

Every draw is keyed by (seed, number of the cell), so a cell does not depend on the batch that it was made in.
Reading order: SamplerConfig, generate_latents, sample_counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scldm import draws
from scldm.errors import InputError
from scldm.flow.guidance import joint_guidance
from scldm.flow.solver import SOLVERS, Method
from scldm.model.dit import DiT
from scldm.model.vae import VAE


@dataclass(frozen=True)
class SamplerConfig:
    """How latents are drawn.

    method: euler (one network evaluation a step) or heun (two)
    n_steps: steps from noise to latent
    guidance_scale: 0 ignores the conditions, 1 follows them, above 1 exaggerates them
    """

    method: Method = "heun"
    n_steps: int = 50
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise InputError(f"sampler.n_steps={self.n_steps} must be at least 1")
        if self.guidance_scale < 0:
            raise InputError(f"sampler.guidance_scale={self.guidance_scale} must not be negative")


@torch.no_grad()
def generate_latents(
    dit: DiT, conditions: dict[str, Tensor], cell_numbers_B: Tensor, seed: int, sampler: SamplerConfig
) -> Tensor:
    """Latent tokens of new cells, (B, L, Z), on the autoencoder's scale.

    conditions: label ids (B,) of each of the model's conditions, `null_id` where not given
    cell_numbers_B: the key of each cell's draws, int64
    """
    noise_BLZ = draws.normal(seed, "generate noise", 0, cell_numbers_B, dit.latent_shape)
    field = joint_guidance(dit, conditions, sampler.guidance_scale)
    return dit.unstandardise(SOLVERS[sampler.method](field, noise_BLZ, sampler.n_steps))


@torch.no_grad()
def sample_counts(
    vae: VAE, latent_BLZ: Tensor, gene_ids_Q: Tensor, library_size_B: Tensor, cell_numbers_B: Tensor, seed: int
) -> np.ndarray:
    """Counts of the asked genes drawn from what the decoder predicts, (B, Q), int64."""
    generators = [
        np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))
        for number in cell_numbers_B.tolist()
    ]
    return vae.decode(latent_BLZ, gene_ids_Q).sample(library_size_B, generators)
