"""What both kernels are written with: sizes of tiles, and a matrix product of two of them.

Reading order: power_of_two, launch, dot.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

LEAST = 16  # of each side of a tile in a matrix product
WARPS = 8  # of a program: two warp groups, for Hopper's matrix units


def power_of_two(n: int) -> int:
    """The side of a tile that holds n."""
    return max(LEAST, triton.next_power_of_2(n))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, stages: int, **constants: Any) -> None:
    """Run a kernel's programs; in Triton's interpreter, on a CPU, where TRITON_INTERPRET is 1."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    kernel[grid](*arguments, INTERPRETED=interpreted, num_warps=WARPS, num_stages=stages, **constants)


@triton.jit
def dot(x, y, total, BF16: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + x y; of operands rounded to bf16 where BF16, else in full precision; summed in the precision of total."""
    if BF16:
        x, y = x.to(tl.bfloat16), y.to(tl.bfloat16)
        if INTERPRETED:  # which multiplies bf16 wrongly, and float32 of the same values rightly
            x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee", out_dtype=total.dtype)
