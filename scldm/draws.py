"""Random numbers by address: the draw for (seed, purpose, step, position) is the same on every rank and device.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations: no
generator, no state, and a micro-batch draws exactly what its cells would draw in any other micro-batch.
Where a row is addressed by two numbers, as a cell's gene, Philox gives each a key, and SplitMix64 draws from their sum.
Reading order: uniform, normal, philox; keys, uniform_of.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# of SplitMix64, as signed numbers: those that torch has
_GOLDEN, _MIX = 0x9E3779B97F4A7C15 - 2**64, (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


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


def keys(seed: int, purpose: str, cells_B: Tensor, genes_Q: Tensor) -> Tensor:
    """64 bits for each cell's gene, (B, Q) int64: what `uniform_of` draws from, whatever else is asked for with it.

    cells_B, genes_Q: numbers of the cells and of the genes, int64
    """
    key_B, key_Q = (
        (words_N2[:, 0] << 32) | words_N2[:, 1]
        for words_N2 in (
            philox(seed, f"{purpose}, {of}", 0, numbers_N, 1)[:, 0, :2]
            for of, numbers_N in (("cell", cells_B), ("gene", genes_Q))
        )
    )
    return key_B[:, None] + key_Q


def uniform_of(keys: Tensor, k: int | Tensor) -> Tensor:
    """The k-th uniform draw of every key, in the open interval (0, 1), float64: odd multiples of 2^-53."""
    return (bits_of(keys, k).bitwise_right_shift_(12).bitwise_and_(0xFFFFFFFFFFFFF).double().add_(0.5)).mul_(2.0**-52)


def bits_of(keys: Tensor, k: int | Tensor) -> Tensor:
    """The k-th 64 bits of every key, int64.

    Source: Steele, Lea & Flood 2014 (SplitMix64), the k-th number of the generator that begins at the key.
    """
    if isinstance(k, int):
        k = torch.tensor(k, device=keys.device)  # the product wraps, as Python's does not
    x = keys + (k + 1) * _GOLDEN
    for shift, factor in zip((30, 27), _MIX):
        x = _xor_shifted(x, shift).mul_(factor)
    return _xor_shifted(x, 31)


def _xor_shifted(x: Tensor, n: int) -> Tensor:
    """x ^ (x >> n), the shift being that of a number without a sign; in place."""
    return x.bitwise_xor_((x >> n).bitwise_and_((1 << 64 - n) - 1))
