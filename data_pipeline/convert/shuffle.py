"""The external shuffle: cells arrive in source order and leave in set order, in bounded memory and by sequential IO.

A cell's position in set order is drawn before anything is read. The scatter pass keeps narrow cells in memory until a
budget is full, then writes them in the order of their positions: a run. The gather pass reads, for a range of
positions, one slice of each run, and sorts what it has read. What has no place in a set (cells with too few genes)
leaves a gap in the positions, which the gather pass doesn't notice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.convert.splits import keys
from data_pipeline.format.block import NarrowCells
from scldm.files import written_aside

PIECE_CELLS = 4096  # cells that are brought into order at a time while a run is written
SECTIONS = (("steps", np.uint8), ("small", np.uint8), ("far", np.uint32), ("large", np.uint64))


def set_positions(split: np.ndarray, seed: int, source: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Each cell's position in set order, int64: split by split, shuffled as a whole within each."""
    order = np.lexsort((keys(seed, "shuffle", source, row), split))
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    return positions


class Arena:
    """Memory that a process keeps from run to run: fresh pages cost more than what is written to them."""

    def __init__(self, budget: int) -> None:
        self.steps, self.small = np.empty(budget // 2, np.uint8), np.empty(budget // 2, np.uint8)

    def hold(self, n: int) -> None:
        """Room for n counts, what is in it is lost."""
        if n > len(self.steps):
            self.steps, self.small = np.empty(n, np.uint8), np.empty(n, np.uint8)


class RunWriter:
    """Collects a unit's narrow cells in an arena. `flush` writes them as one run."""

    def __init__(self, folder: Path, unit: int, arena: Arena) -> None:
        self.folder, self.unit, self.arena = folder, unit, arena
        self.parts: list[NarrowCells] = []  # their steps and small are views of the arena
        self.positions: list[np.ndarray] = []
        self.held = 0
        self.n_runs = 0
        self.largest = 0  # count that was added

    def add(self, cells: NarrowCells, positions: np.ndarray) -> None:
        n = len(cells.steps)
        if self.held + n > len(self.arena.steps):
            self.flush()
            self.arena.hold(n)
        mine = slice(self.held, self.held + n)
        self.arena.steps[mine], self.arena.small[mine] = cells.steps, cells.small
        self.parts.append(replace(cells, steps=self.arena.steps[mine], small=self.arena.small[mine]))
        self.positions.append(positions)
        self.held += n
        largest = cells.large.max() if len(cells.large) else cells.small.max(initial=0)
        self.largest = max(self.largest, int(largest))

    def flush(self) -> None:
        if not self.parts:
            return
        positions = np.concatenate(self.positions)
        order = np.argsort(positions)
        held = slice(0, self.held)
        names = ("nonzeros", "n_far", "n_large", "far", "large")
        joined = {name: np.concatenate([getattr(p, name) for p in self.parts]) for name in names}
        cells = NarrowCells(steps=self.arena.steps[held], small=self.arena.small[held], **joined)
        starts = np.zeros((len(order) + 1, 3), np.int64)
        for k, name in enumerate(names[:3]):
            np.cumsum(joined[name][order], out=starts[1:, k])
        stem = self.folder / f"{self.unit:05d}-{self.n_runs:03d}"
        with written_aside(stem.with_suffix(".data")) as file:
            offsets = _offsets(starts[-1])
            for first in range(0, len(order), PIECE_CELLS):
                piece = cells.take(order[first : first + PIECE_CELLS])
                for (name, _), offset in zip(SECTIONS, offsets):
                    file.seek(offset[0] + offset[1])
                    section = getattr(piece, name)
                    file.write(section.data)
                    offset[1] += section.nbytes
        for suffix, array in ((".starts.npy", starts), (".positions.npy", positions[order])):
            with written_aside(stem.with_suffix(suffix)) as file:
                np.save(file, array)
        self.parts, self.positions, self.held = [], [], 0
        self.n_runs += 1


def _offsets(totals: np.ndarray) -> list[list[int]]:
    """[start of the section, bytes written of it] of each section in a run's data, 8-byte aligned. Then the end."""
    sizes = [int(totals[0]), int(totals[0]), 4 * int(totals[1]), 8 * int(totals[2])]
    out, at = [], 0
    for size in sizes:
        out.append([at, 0])
        at += size + -size % 8
    return out


@dataclass(frozen=True)
class Run:
    """Of a run's cells, which lie by ascending position, those of a range. A run's files are open only while they are
    read: an atlas has thousands of runs.

    path: of its data
    positions: (n,) of the range's cells
    starts: (n + 1, 3), where each one's part of counts, far and large begins
    totals: (3,), where the run's last cell ends
    """

    path: Path
    positions: np.ndarray
    starts: np.ndarray
    totals: np.ndarray

    @classmethod
    def between(cls, stem: Path, low: int, high: int) -> Run:
        """The cells at positions low ... high."""
        positions = np.load(stem.with_suffix(".positions.npy"), mmap_mode="r")
        starts = np.load(stem.with_suffix(".starts.npy"), mmap_mode="r")
        a, b = bisect_left(positions, low), bisect_left(positions, high)
        return cls(stem.with_suffix(".data"), positions[a:b].copy(), starts[a : b + 1].copy(), starts[-1].copy())


def read_range(stems: Sequence[Path], low: int, high: int) -> tuple[np.ndarray, NarrowCells, np.ndarray]:
    """The cells at positions low ... high, as (positions, cells, order). Positions ascend. Cells lie as in the runs.
    The order brings them to ascending positions."""
    runs = [Run.between(stem, low, high) for stem in stems]
    lengths = [np.diff(run.starts, axis=0) for run in runs]
    totals = np.asarray(np.sum([n.sum(axis=0) for n in lengths], axis=0, dtype=np.int64))
    buffers = [np.empty(n, dtype) for n, (_, dtype) in zip((totals[0], totals[0], totals[1], totals[2]), SECTIONS)]
    filled = [0] * len(SECTIONS)
    for run in runs:
        if not len(run.positions):
            continue
        columns = (0, 0, 1, 2)
        offsets = _offsets(run.totals)
        with run.path.open("rb", buffering=0) as file:
            for k, (buffer, (start, _), column) in enumerate(zip(buffers, offsets, columns)):
                first, last = int(run.starts[0, column]), int(run.starts[-1, column])
                if first == last:
                    continue
                part = buffer[filled[k] : filled[k] + last - first]
                file.seek(start + first * buffer.itemsize)
                n_read = file.readinto(part.view(np.uint8).data)
                assert n_read == part.nbytes, f"{run.path}: shorter than its index says"
                filled[k] += last - first
    n = np.concatenate(lengths).astype(np.uint32)
    positions = np.concatenate([run.positions for run in runs])
    order = np.argsort(positions)
    return positions[order], NarrowCells(n[:, 0], n[:, 1], n[:, 2], *buffers), order
