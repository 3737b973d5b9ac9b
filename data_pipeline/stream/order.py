"""Which cell stands at which position: a pure function of (seed, epoch), the same for every rank of every world size.

An epoch is a permutation of its cells, cut into global batches. A global batch has `lanes` slices of positions, and
each lane serves its slice of every batch from a list of cells of its own. A rank looks up the positions that are its
own, so the world size can't change what a batch holds, and any position can be looked up without those before it.

    blocks, permuted     | b7 | b2 | b9 | b4 | b0 | b5 | b1 | ...     one after the other: the epoch's cells
    lanes, cut by cells  |  lane 0   |  lane 1   |  lane 2   | ...     as many cells as the lane's positions need
    windows in a lane    | w0  | w1  |                                 a few blocks, whose cells are shuffled together

A set of no more blocks than the windows of all lanes hold is shuffled by the cell. Everything is drawn from the raw
words of Philox4x64-10, keyed by what is drawn. No draw depends on an earlier one.

Reading order: Units (the cells before shuffling), Balance, EpochOrder, RestOfEpoch (of a run whose batch was changed),
Order, rank_slice, reads_of_a_block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numba import njit

from data_pipeline.stream.philox import random_words
from scldm.checked import SEEDS
from scldm.errors import InputError
from scldm.micro_batches import accumulation

# What a draw is for: the second half of its Philox key (the first is the seed). Numbers, once used, never change.
DRAW_BLOCKS, DRAW_WINDOW, DRAW_BALANCE, DRAW_GIVEN, DRAW_ASKED = 1, 2, 3, 4, 5
FIXED_PASS = (1 << 63) - 1  # stands for the epoch in draws of a pass in fixed order
CHUNK_CELLS = 1 << 22
MOST_REPEATS = (1 << 16) - 1  # of a cell in a balanced epoch: they are counted in uint16


# --- the cells of an epoch -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Cells in runs that lie in one block each. The order permutes the runs.

    block: (U,) the block of each unit, any integer dtype
    start: (U + 1,) int64, where each unit's cells begin in `rows`
    rows: (start[-1],) row of each cell within its block. None where unit u holds the rows 0, 1, ... of its block
    """

    block: np.ndarray
    start: np.ndarray
    rows: np.ndarray | None = None

    @property
    def n_cells(self) -> int:
        return int(self.start[-1])

    def __len__(self) -> int:
        return len(self.block)

    @classmethod
    def whole(cls, block: np.ndarray, n_cells: np.ndarray) -> Units:
        """Every cell of some blocks, a unit a block."""
        return cls(block, np.concatenate([[0], np.cumsum(n_cells, dtype=np.int64)]))

    def units(self, epoch: int) -> Units:
        """Those of an epoch: each cell once."""
        return self

    def most_units(self, n_cells: int) -> int:
        """Most units that n cells can hold whole: the smallest ones."""
        return int(np.searchsorted(np.cumsum(np.sort(np.diff(self.start))), n_cells, "right"))

    def cell_rows(self) -> np.ndarray:
        """The row within its block of every cell."""
        if self.rows is not None:
            return self.rows
        dtype = np.uint32 if self.n_cells < 1 << 32 else np.int64  # half the memory. A difference may wrap around
        rows = np.arange(self.n_cells, dtype=dtype)
        rows -= np.repeat(self.start[:-1].astype(dtype), np.diff(self.start))
        return rows.astype(np.uint16)

    def where(self, keep: np.ndarray) -> Units:
        """The units (none is empty) with only the cells for which `keep` (n_cells,) is true. Units left empty go."""
        sizes = np.add.reduceat(keep, self.start[:-1], dtype=np.int64) if len(self) else np.empty(0, np.int64)
        alive = sizes > 0
        return Units(
            self.block[alive], np.concatenate([[0], np.cumsum(sizes[alive])]).astype(np.int64), self.cell_rows()[keep]
        )

    def by_cell(self) -> Units:
        """The same cells, each a unit of its own."""
        block = np.repeat(self.block, np.diff(self.start))
        return Units(block, np.arange(self.n_cells + 1, dtype=np.int64), self.cell_rows())


@njit(cache=True)
def _rank_in_group(group: np.ndarray, met: np.ndarray, rank: np.ndarray) -> None:
    for k in range(len(group)):
        rank[k] = met[group[k]]
        met[group[k]] += np.uint32(1)


class Balance:
    """Each group of cells (a combination of labels) equally often: quota cells an epoch of every group.

    The quota is the epoch divided by the number of groups, but a cell is repeated at most `max_repeats` times an epoch,
    so that a small group gets less. In a group all cells come equally often, give or take one. Over the epochs the
    extra one goes round. Copies of a cell are dealt to the epoch each on its own: mostly far apart, but nothing keeps
    two of them out of the same batch.

    Memory: 6 bytes a cell and those of the groups' dtype, and of an epoch 6 bytes for each of its cells.

    cells: the cells that there are
    group: (n_cells,) number of each cell's group, from 0
    """

    def __init__(self, cells: Units, group: np.ndarray, max_repeats: int, seed: int) -> None:
        assert 1 <= max_repeats <= MOST_REPEATS
        self.cells, self.group = cells, group
        met = np.zeros(int(group.max()) + 1, np.uint32)
        self.rank = np.empty(cells.n_cells, np.uint32)  # of a cell within its group
        _rank_in_group(group, met, self.rank)
        n = met.astype(np.int64)
        present = n > 0
        quota = np.minimum(cells.n_cells // present.sum(), max_repeats * n)
        self.quota = np.where(present, np.maximum(quota, 1), 0)
        self.n = np.maximum(n, 1)
        self.n_cells = int(self.quota.sum())
        self.offset = (random_words(seed, DRAW_BALANCE, 0, 0, len(n)) % self.n.astype(np.uint64)).astype(np.int64)

    def units(self, epoch: int) -> Units:
        whole, extra = np.divmod(self.quota, self.n)
        start = (self.offset + epoch * extra) % self.n
        times = np.empty(self.cells.n_cells, np.uint16)
        for low in range(0, len(times), CHUNK_CELLS):  # at 64 bits, a few numbers a cell
            rank, group = self.rank[low : low + CHUNK_CELLS].astype(np.int64), self.group[low : low + CHUNK_CELLS]
            # conversion has shuffled the cells, so a stretch of a group is a random choice of it
            ahead = (rank - start[group]) % self.n[group]
            times[low : low + CHUNK_CELLS] = whole[group] + (ahead < extra[group])
        passes = [self.cells.where(times > p) for p in range(int(times.max()))]
        sizes = np.concatenate([np.diff(u.start) for u in passes])
        rows = np.concatenate([u.cell_rows() for u in passes])
        return Units(
            np.concatenate([u.block for u in passes]), np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]), rows
        )

    def most_units(self, n_cells: int) -> int:
        return n_cells  # of the last copies, a block may have one


# --- the order -----------------------------------------------------------------------------------------------------


class EpochOrder:
    """The order of one epoch. Memory: 20 bytes a unit (8 MB for 100 million cells in blocks of 256).

    window: units whose cells are shuffled together. 0 leaves the cells in the order in which they are stored
    """

    def __init__(self, units: Units, seed: int, epoch: int, lanes: int, global_batch: int, window: int) -> None:
        self.seed, self.epoch, self.global_batch, self.window = seed, epoch, global_batch, window
        if window and len(units) <= lanes * window:
            units = units.by_cell()
        self.units, self.n_cells = units, units.n_cells
        lanes = min(lanes, global_batch) if window else 1
        if window:
            self.permutation = np.argsort(random_words(seed, DRAW_BLOCKS, epoch, 0, len(units)), kind="stable")
        else:
            self.permutation = np.arange(len(units))
        sizes = np.diff(units.start)[self.permutation]
        self.start = np.concatenate([[0], np.cumsum(sizes)])  # of each unit among the epoch's cells
        # lane l serves positions edge[l] ... edge[l + 1] of every batch. The last batch has only its first positions
        self.edge = np.arange(lanes + 1) * global_batch // lanes
        whole, rest = divmod(self.n_cells, global_batch)
        width = np.diff(self.edge)
        self.lane_start = np.concatenate([[0], np.cumsum(whole * width + np.clip(rest - self.edge[:-1], 0, width))])
        self.current: dict[int, tuple[int, int, np.ndarray]] = {}  # lane -> its latest window

    @property
    def steps(self) -> int:
        return -(-self.n_cells // self.global_batch)

    def n_real(self, step: int) -> int:
        """Cells of a global batch that are no copies."""
        return min(self.global_batch, self.n_cells - step * self.global_batch)

    def plan(self, step: int, n_steps: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Block and row within it, each (n_steps, high - low) int64, of the cells at positions low ... high of the
        epoch's global batches step ... step + n_steps. Positions beyond the epoch's last cell hold copies."""
        assert 0 <= step < step + n_steps <= self.steps
        assert 0 <= low < high <= self.global_batch
        cells = np.empty((n_steps, high - low), np.int64)
        first = int(np.searchsorted(self.edge, low, "right")) - 1
        for lane in range(first, len(self.edge) - 1):
            left, right = int(self.edge[lane]), int(self.edge[lane + 1])
            if left >= high:
                break
            width, p, q = right - left, max(left, low), min(right, high)
            served = self.lane_cells(lane, step * width, (step + n_steps) * width).reshape(n_steps, width)
            cells[:, p - low : q - low] = served[:, p - left : q - left]
        unit = np.searchsorted(self.start, cells.ravel(), "right").reshape(cells.shape) - 1
        source = self.permutation[unit]
        row = cells - self.start[unit]
        if self.units.rows is not None:
            row = self.units.rows[self.units.start[source] + row]
        return self.units.block[source].astype(np.int64), row.astype(np.int64)

    def lane_cells(self, lane: int, low: int, high: int) -> np.ndarray:
        """The cells low ... high of a lane, as positions among the epoch's cells before the lane's shuffle. Beyond the
        lane's last cell it is repeated (a lane without cells repeats the epoch's first)."""
        begin, end = int(self.lane_start[lane]), int(self.lane_start[lane + 1])
        real = np.arange(begin + low, min(begin + high, end))
        if self.window and len(real) and len(self.units) < self.n_cells:
            at, until = begin + low, begin + low + len(real)
            while at < until:
                w0, w1, shuffled = self._window(lane, at, begin, end)
                stop = min(w1, until)
                real[at - begin - low : stop - begin - low] = shuffled[at - w0 : stop - w0]
                at = stop
        missing = high - low - len(real)
        if missing:
            last = self.lane_cells(lane, end - begin - 1, end - begin)[0] if end > begin else 0
            real = np.concatenate([real, np.full(missing, last)])
        return real

    def _window(self, lane: int, at: int, begin: int, end: int) -> tuple[int, int, np.ndarray]:
        """The window of a lane that position `at` falls in: its first and last (exclusive) position, and its cells."""
        held = self.current.get(lane)
        if held is None or not held[0] <= at < held[1]:
            first = int(np.searchsorted(self.start, begin, "right")) - 1
            unit = int(np.searchsorted(self.start, at, "right")) - 1
            w = first + (unit - first) // self.window * self.window
            w0 = max(begin, int(self.start[w]))
            w1 = min(end, int(self.start[min(w + self.window, len(self.start) - 1)]))
            words = random_words(self.seed, DRAW_WINDOW, self.epoch, w0, w1 - w0)
            held = self.current[lane] = (w0, w1, w0 + np.argsort(words, kind="stable"))
        return held


@dataclass(frozen=True)
class Regrouped:
    """The epoch in which a run's global batch was changed: its cells keep their order, the rest of them is cut anew.

    epoch, start: that epoch, and the step of the run that it began with
    global_batch: whose order it has
    step, first: the first step of another batch, and how many cells of the epoch came before
    """

    epoch: int
    start: int
    global_batch: int
    step: int
    first: int


class RestOfEpoch:
    """An epoch from a step on, in batches of another size: every cell that has not come yet, once, in its order.

    Its positions lie in any lane, so that a rank reads blocks of all lanes until the epoch's end.
    """

    def __init__(self, order: EpochOrder, regrouped: Regrouped, global_batch: int) -> None:
        self.order, self.epoch, self.global_batch = order, order.epoch, global_batch
        self.first, self.begin = regrouped.first, regrouped.step - regrouped.start

    @property
    def steps(self) -> int:
        """Of the whole epoch, those of the batch before included: no two steps of an epoch share their draws."""
        return self.begin - (self.first - self.order.n_cells) // self.global_batch

    def n_real(self, step: int) -> int:
        return min(self.global_batch, self.order.n_cells - self.first - (step - self.begin) * self.global_batch)

    def plan(self, step: int, n_steps: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """As EpochOrder has it."""
        assert self.begin <= step < step + n_steps <= self.steps
        batch = self.order.global_batch
        number = np.arange(step - self.begin, step - self.begin + n_steps)[:, None]
        cells = self.first + number * self.global_batch + np.arange(low, high)
        at, position = np.divmod(np.minimum(cells, self.order.n_cells - 1), batch)
        begin, end = int(at.min()), int(at.max()) + 1
        block, row = self.order.plan(begin, end - begin, 0, batch)
        return block[at - begin, position], row[at - begin, position]


@dataclass(frozen=True)
class Order:
    """The order of a run: an endless row of epochs.

    population: what an epoch is drawn from, as many cells each time
    window: blocks shuffled together in a lane
    regrouped: where the global batch was another one before
    """

    population: Units | Balance
    seed: int
    lanes: int
    global_batch: int
    window: int
    regrouped: Regrouped | None = None

    def __post_init__(self) -> None:
        assert min(self.lanes, self.global_batch, self.window) >= 1, self
        assert 0 <= self.seed < SEEDS, self.seed
        if not self.population.n_cells:
            raise InputError("no cell to draw from: the split is empty, or the selection chose none")

    @cached_property
    def _latest(self) -> dict[int, EpochOrder | RestOfEpoch]:
        return {}

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.population.n_cells // self.global_batch)

    def epoch(self, epoch: int) -> EpochOrder | RestOfEpoch:
        """The order of an epoch. The latest one asked for is kept."""
        if epoch not in self._latest:
            self._latest.clear()
            units, there = self.population.units(epoch), self.regrouped
            rest = there if there and there.epoch == epoch else None
            batch = rest.global_batch if rest else self.global_batch
            order = EpochOrder(units, self.seed, epoch, self.lanes, batch, self.window)
            self._latest[epoch] = RestOfEpoch(order, rest, self.global_batch) if rest else order
        return self._latest[epoch]

    def place(self, step: int) -> tuple[int, int]:
        """Epoch, and step within it, of a step of the run."""
        if not (there := self.regrouped):
            return divmod(step, self.steps_per_epoch)
        assert step >= there.step, "steps before a change of the global batch are another order's"
        if step < self.regular_from:
            return there.epoch, step - there.start
        epochs, t = divmod(step - self.regular_from, self.steps_per_epoch)
        return there.epoch + 1 + epochs, t

    @property
    def regular_from(self) -> int:
        """The step of the run from which on every epoch is one of this global batch from its beginning."""
        there, n_cells = self.regrouped, self.population.n_cells
        return there.step - (there.first - n_cells) // self.global_batch if there else 0

    def regroup(self, step: int) -> Regrouped | None:
        """What another global batch from this step on goes on with. None where it is the run's first step."""
        if not step:
            return None
        epoch, t = self.place(step)
        if t == 0:  # nothing is left of the epoch before
            return Regrouped(epoch - 1, step, self.global_batch, step, self.population.n_cells)
        there = self.regrouped
        if there and there.epoch == epoch:  # once more in the same epoch
            return replace(there, step=step, first=there.first + (step - there.step) * self.global_batch)
        return Regrouped(epoch, step - t, self.global_batch, step, t * self.global_batch)


def rank_slice(rank: int, world_size: int, global_batch: int, micro_batch: int) -> tuple[int, int]:
    """The positions low ... high of every global batch that are a rank's.

    Raises: InputError with the nearest allowed values where that is no whole number of micro-batches.
    """
    if micro_batch < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise InputError(f"rank {rank} of {world_size} with micro_batch={micro_batch} is impossible")
    accumulation(global_batch, world_size, micro_batch)
    share = global_batch // world_size
    return rank * share, (rank + 1) * share


def reads_of_a_block(lanes: int, world_size: int, global_batch: int) -> float:
    """How many ranks read a block, as a mean: those that have a share of its lane's positions. It is 1 where no rank's
    share begins within a lane. So it is with as many lanes as ranks, or a multiple. Ranks divide the global batch."""
    lanes = min(lanes, global_batch)
    edge = np.arange(lanes + 1) * global_batch // lanes
    begins = np.arange(1, world_size) * (global_batch // world_size)
    return 1 + float((~np.isin(begins, edge)).sum()) / lanes
