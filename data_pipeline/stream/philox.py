"""Random words by counter: any word can be drawn without those before it, so that a draw depends on its place alone.

Philox4x64-10 of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), word for word numpy.random.Philox,
whose construction alone takes longer than a batch's draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def random_words(seed: int, purpose: int, epoch: int, index: int, n: int, skip: int = 0) -> np.ndarray:
    """n uint64 words of Philox4x64-10 with key (seed, purpose) from counter (skip, index, epoch, 0) on, 4 a count."""
    assert skip + -(-n // 4) < 1 << 64, "no counter is carried over"
    words = np.empty(-(-n // 4) * 4, np.uint64)
    _fill(np.uint64(seed), np.uint64(purpose), np.uint64(skip), np.uint64(index), np.uint64(epoch), words)
    return words[:n]


@intrinsic
def _upper_half(typing_context, a, b):
    """The upper 64 bits of a product of two uint64."""

    def generate(context, builder, signature, arguments):
        x, y = (builder.zext(value, ir.IntType(128)) for value in arguments)
        return builder.trunc(builder.lshr(builder.mul(x, y), ir.Constant(ir.IntType(128), 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


_upper: Any = _upper_half  # without a type, since the decorator hides that numba passes the typing context


@njit(nogil=True, inline="always")
def four_words(key_0, key_1, skip, index, epoch):
    """The four words at counter (skip, index, epoch, 0). All are uint64, skip under 2^64 - 1."""
    a, b, c, d = skip + np.uint64(1), index, epoch, np.uint64(0)  # NumPy counts before it draws
    x, y = key_0, key_1
    for _ in range(10):
        high, low = _upper(np.uint64(0xD2E7470EE14C6C93), a), np.uint64(0xD2E7470EE14C6C93) * a
        high_2, low_2 = _upper(np.uint64(0xCA5A826395121157), c), np.uint64(0xCA5A826395121157) * c
        a, b, c, d = high_2 ^ b ^ x, low_2, high ^ d ^ y, low
        x, y = x + np.uint64(0x9E3779B97F4A7C15), y + np.uint64(0xBB67AE8584CAA73B)
    return a, b, c, d


@njit(nogil=True, cache=True)
def _fill(key_0, key_1, skip, index, epoch, words):
    for k in range(np.uint64(len(words) // 4)):
        a, b, c, d = four_words(key_0, key_1, skip + np.uint64(k), index, epoch)
        words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3] = a, b, c, d
