"""The linear path between a cell's latent (t = 0) and noise (t = 1). Source: paper, section 3, and Ma et al. 2024."""

from __future__ import annotations

from torch import Tensor


def interpolate(z_BLZ: Tensor, noise_BLZ: Tensor, t_B: Tensor) -> Tensor:
    """z_t = (1 - t) z + t noise, (B, L, Z)."""
    t = t_B[:, None, None]
    return (1 - t) * z_BLZ + t * noise_BLZ


def velocity(z_BLZ: Tensor, noise_BLZ: Tensor) -> Tensor:
    """dz_t / dt = noise - z, (B, L, Z), the same at every t."""
    return noise_BLZ - z_BLZ
