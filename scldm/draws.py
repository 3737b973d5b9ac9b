"""Random numbers by address: the draw for (seed, purpose, step, position) is the same on every rank and device.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations: no
generator, no state, and a micro-batch draws exactly what its cells would draw in any other micro-batch.
Reading order: uniform, normal, philox.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def uniform(seed: int, purpose: str, step: int, positions_B: Tensor, n: int) -> Tensor:
    """Uniform draws in the open interval (0, 1), (B, n), float32; the multiples of 2^-23, shifted by 2^-24.

    positions_B: what each row is keyed by, int64: a position in the global batch, or the number of a generated cell
    """
    words = philox(seed, purpose, step, positions_B, (n + 3) // 4)
    return ((words >> 9).to(torch.float32) + 0.5).mul_(2.0**-23).flatten(1)[:, :n]


def normal(seed: int, purpose: str, step: int, positions_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal draws, (B, *shape), float32, by Box-Muller; see `uniform` for the keys."""
    n = math.prod(shape)
    u_B2n = uniform(seed, purpose, step, positions_B, 2 * n)
    radius, angle = (-2.0 * u_B2n[:, :n].log()).sqrt(), (2.0 * math.pi) * u_B2n[:, n:]
    return (radius * angle.cos()).view(-1, *shape)


def philox(seed: int, purpose: str, step: int, positions_B: Tensor, n_blocks: int) -> Tensor:
    """32 random bits in each of (B, n_blocks, 4) int64; counter (block, position, step), key (seed, purpose)."""
    shape = (len(positions_B), n_blocks)
    block = torch.arange(n_blocks, device=positions_B.device)
    x0 = (block & _LOW).expand(shape)
    x1 = (positions_B & _LOW)[:, None].expand(shape)
    x2 = torch.full_like(x0, step & _LOW)
    x3 = ((positions_B >> 32) ^ (step >> 32))[:, None].expand(shape) & _LOW
    key0, key1 = seed & _LOW, zlib.crc32(purpose.encode()) ^ (seed >> 32 & _LOW)
    for _ in range(10):
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]  # wraps: the 64 bits are right all the same
        x0, x1, x2, x3 = (
            (product1 >> 32 & _LOW) ^ x1 ^ key0,
            product1 & _LOW,
            (product0 >> 32 & _LOW) ^ x3 ^ key1,
            product0 & _LOW,
        )
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return torch.stack((x0, x1, x2, x3), dim=-1)
