"""Random numbers by address: the draw for (seed, purpose, step, position) is the same on every rank and device.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations. There is
no generator and no state. A cell draws the same numbers in any micro-batch. A GPU pays for launches here, not for
numbers: a round takes four, and what a step draws for several purposes goes through the rounds at once (`uniforms`). No
Python number is copied to the device, for which the host would wait. Where a row is addressed by two numbers, as a
cell's gene, Philox gives each a key, and SplitMix64 draws from their sum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

ROUNDS = 10
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# of SplitMix64, as signed numbers: those that torch has
_GOLDEN, _MIX = 0x9E3779B97F4A7C15 - 2**64, (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def uniform(seed: int, purpose: str, step: int, positions_B: Tensor, n: int) -> Tensor:
    """Uniform draws in the open interval (0, 1), (B, n), float32. They are the multiples of 2^-23, shifted by 2^-24.

    positions_B: what each row is keyed by, int64: a position in the global batch, or the number of a generated cell
    """
    return uniforms(seed, {purpose: n}, step, positions_B)[purpose]


def uniforms(seed: int, n_of: Mapping[str, int], step: int, positions_B: Tensor) -> dict[str, Tensor]:
    """`uniform` for several purposes, n of each by its name, in about the launches of one."""
    blocks = {purpose: (n + 3) // 4 for purpose, n in n_of.items()}
    words = philox(seed, blocks, step, positions_B)
    u = ((words >> 9).to(torch.float32) + 0.5).mul_(2.0**-23).flatten(1)
    parts = u.split([4 * n_blocks for n_blocks in blocks.values()], dim=1)
    return {purpose: part[:, :n] for (purpose, n), part in zip(n_of.items(), parts, strict=True)}


def normal(seed: int, purpose: str, step: int, positions_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal draws, (B, *shape), float32, by Box-Muller. See `uniform` for the keys."""
    return normal_of(uniform(seed, purpose, step, positions_B, 2 * math.prod(shape)), shape)


def normal_of(u_B2n: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`normal` of uniform draws, twice as many as there are numbers in the shape."""
    n = math.prod(shape)
    radius, angle = (-2.0 * u_B2n[:, :n].log()).sqrt(), (2.0 * math.pi) * u_B2n[:, n:]
    return (radius * angle.cos()).view(-1, *shape)


def philox(seed: int, blocks: Mapping[str, int], step: int, positions_B: Tensor) -> Tensor:
    """32 random bits in each of (B, n, 4) int64. Counter (block, position, step), key (seed, purpose).

    blocks: of each purpose, one purpose after the other
    """
    n = sum(blocks.values())
    counter_2Bn = positions_B.new_empty(2, len(positions_B), n)  # words 0 and 2. Their upper halves stay 0
    counter_2Bn[1] = step & _LOW
    key_2n = torch.empty(2, n, dtype=torch.int32, device=positions_B.device)
    key_2n[0] = _signed(seed, 32)
    at = 0
    for purpose, n_blocks in blocks.items():
        counter_2Bn[0, :, at : at + n_blocks] = torch.arange(n_blocks, device=positions_B.device)
        key_2n[1, at : at + n_blocks] = _signed(zlib.crc32(purpose.encode()) ^ (seed >> 32 & _LOW), 32)
        at += n_blocks
    low_B, high_B = _halves(positions_B)
    others_2B = torch.stack((low_B, high_B ^ _signed(step >> 32, 32)))  # words 1 and 3
    return _rounds(counter_2Bn, others_2B[:, :, None], key_2n)


def _rounds(x_2Bn: Tensor, y_2Bn: Tensor, key_2n: Tensor) -> Tensor:
    """Philox' rounds. Overwrites x.

    x_2Bn: words 0 and 2 of the counters, int64 from 0 to 2^32 - 1
    y_2Bn: words 1 and 3, int32 of the same bits
    key_2n: int32 of the same bits
    """
    weyl_R2 = torch.empty(ROUNDS, 2, dtype=torch.int32, device=x_2Bn.device)
    for k, step in enumerate(_WEYL):
        weyl_R2[:, k] = _signed(step, 32)
    key_R2n = weyl_R2.cumsum(0, dtype=torch.int32)[:, :, None] + (key_2n - weyl_R2[0, :, None])  # sums wrap
    x_low = _halves(x_2Bn)[0]
    products = x_2Bn.new_empty(2, *x_2Bn.shape)  # of this round and the last, of which y is a part
    for k, key in enumerate(key_R2n):
        product = products[k % 2]
        for word in (0, 1):  # products wrap: the 64 bits are right all the same
            torch.mul(x_2Bn[1 - word], _MULTIPLIERS[1 - word], out=product[word])
        low, high = _halves(product)
        torch.bitwise_xor(high, y_2Bn, out=x_low).bitwise_xor_(key[:, None])
        y_2Bn = low
    last = products[(ROUNDS - 1) % 2]
    return torch.stack((x_2Bn[0], last[0], x_2Bn[1], last[1]), dim=-1).bitwise_and_(_LOW)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper 32 bits of int64 numbers, as int32: views, of a little-endian machine as all with torch are."""
    low, high = x.contiguous().view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
    return low, high


def _signed(x: int, n_bits: int) -> int:
    """The number with a sign that has the same lower bits."""
    half = 1 << n_bits - 1
    return (x + half) % (2 * half) - half


def keys(seed: int, purpose: str, cells_B: Tensor, genes_Q: Tensor) -> Tensor:
    """64 bits for each cell's gene, (B, Q) int64: what `uniform_of` draws from, whatever else is asked for with it.

    cells_B, genes_Q: numbers of the cells and of the genes, int64
    """
    key_B, key_Q = (
        (words_N2[:, 0] << 32) | words_N2[:, 1]
        for words_N2 in (
            philox(seed, {f"{purpose}, {of}": 1}, 0, numbers_N)[:, 0, :2]
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
    x = keys + (_signed((k + 1) * _GOLDEN, 64) if isinstance(k, int) else (k + 1) * _GOLDEN)  # products wrap
    for shift, factor in zip((30, 27), _MIX):
        x = _xor_shifted(x, shift).mul_(factor)
    return _xor_shifted(x, 31)


def _xor_shifted(x: Tensor, n: int) -> Tensor:
    """x ^ (x >> n), the shift being that of a number without a sign. In place."""
    return x.bitwise_xor_((x >> n).bitwise_and_((1 << 64 - n) - 1))
