"""How large a tile of scores or hidden layers is, and memory for some of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# numbers in a tile: on a CPU 1 MB of float32, so that the passes over it stay in the cache of one core. With 2 MB of
# that and tiles of 2^17, 2^18, 2^19, forward + backward: pooling in 61, 57, 55 ms, reading out in 191, 164, 161
TILE_CPU = 1 << 18
# a GPU reads a tile from its memory anyway, and pays for launches: a tile is this share of it. Two are held, 2.5 GB of
# 80 GB. By 32 cells of width 256 each of them has 7,100 genes in float32: 2 tiles of 8,192 genes, and not 128
TILE_SHARE = 1 / 64
# numbers of hidden layers that backward finds again rather than makes again, on a CPU (268 MB of float32), and on a GPU
# in tiles: a 16th of its memory
KEPT_CPU = 1 << 26
KEPT_TILES = 4

planned_memory = 0  # bytes of a GPU whose tiles are planned on a CPU, by `train/step_cost.py`. 0 where none is


def tile_numbers(like: Tensor) -> int:
    """Numbers in a tile of such a tensor: on a CPU what stays in its cache, on a GPU a share of its memory."""
    if not on_gpu(like):
        return TILE_CPU
    memory = planned_memory or torch.cuda.get_device_properties(like.device).total_memory
    return int(TILE_SHARE * memory) // like.element_size()


def kept_numbers(like: Tensor) -> int:
    """Numbers of hidden layers that are kept for backward: a few tiles' worth."""
    return KEPT_TILES * tile_numbers(like) if on_gpu(like) else KEPT_CPU


def on_gpu(like: Tensor) -> bool:
    return like.device.type == "cuda" or planned_memory > 0


class Space:
    """Tiles of as many cells (or rows) as fill them, and memory for some, made once. Fresh memory costs a page fault
    for every 4 kB, which is more than what is then done with it.

    n_outer: of the outer, such as heads, a tile takes as many as fill it with all cells, and at most so many
    held: tiles that there is memory for
    """

    def __init__(self, n: int, numbers_each: int, like: Tensor, n_outer: int = 1, held: int = 2) -> None:
        fits = tile_numbers(like) // max(1, numbers_each)
        self.n, self.step, self.outer = n, min(n, max(1, fits)), min(n_outer, max(1, fits // max(1, n)))
        self.memory = like.new_empty(held, self.outer * self.step * numbers_each)

    def slices(self) -> Iterator[slice]:
        for start in range(0, self.n, max(1, self.step)):
            yield slice(start, min(start + self.step, self.n))

    def tiles(self, n_outer: int) -> Iterator[tuple[slice, slice]]:
        """For some of the outer after others, all slices."""
        for outer in range(0, n_outer, self.outer):
            for part in self.slices():
                yield slice(outer, min(outer + self.outer, n_outer)), part

    def held(self, *shape: int) -> list[Tensor]:
        """As many tensors of a tile's shape as there is memory for."""
        n = math.prod(shape)
        return [memory[:n].view(shape) for memory in self.memory]
