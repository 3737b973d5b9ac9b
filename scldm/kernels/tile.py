"""What both kernels are written with: sizes of tiles, and a matrix product of two of them."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

LEAST = 16  # of each side of a tile in a matrix product


class Tile(NamedTuple):
    """How a program works. Chosen so that registers hardly spill, and that two or more programs fit onto a
    multiprocessor of an A100 or H100 where they can: `python -m benchmarks.kernels_compiled` shows what a choice takes.

    genes: of a block
    warps: 4 are one of Hopper's warp groups
    stages: blocks whose loads are in flight
    registers: of a thread at most. None leaves it to the compiler. 128 let 16 warps share a multiprocessor's 65,536
    """

    genes: int
    warps: int
    stages: int
    registers: int | None = None


def power_of_two(n: int) -> int:
    """The side of a tile that holds n."""
    return max(LEAST, 1 << (n - 1).bit_length())


def ceil_div(n: int, by: int) -> int:
    """How many parts of this size hold n. triton.cdiv is typed for kernels."""
    return -(-n // by)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, tile: Tile, **constants: Any) -> None:
    """Run a kernel's programs. Where TRITON_INTERPRET is 1, in Triton's interpreter, on a CPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    constants |= {"GENES": tile.genes, "INTERPRETED": interpreted}
    kernel[grid](*arguments, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, **constants)


@triton.jit
def dot(x, y, total, BF16: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + x y. Operands are rounded to bf16 where BF16. Sums have the precision of total."""
    if BF16:
        x, y = x.to(tl.bfloat16), y.to(tl.bfloat16)
        if INTERPRETED:  # which multiplies bf16 wrongly, and float32 of the same values rightly
            x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def dot_tf32(x, y, total, BF16: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + x y beside bf16, of operands cut to TF32's 10 bits where BF16, else in full precision."""
    if BF16 and INTERPRETED:  # which does not cut them
        x = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        y = (y.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return tl.dot(x, y, total, input_precision="tf32" if BF16 else "ieee", out_dtype=total.dtype)


@triton.jit
def phi_of(x, k, BINS: tl.constexpr):
    """`count_basis.basis`: the function k, counted from 0, of positions x."""
    return tl.maximum(1 - tl.abs(x - (k + 1)), 0.0) if BINS else tl.where(k == 0, x, 0.0)
