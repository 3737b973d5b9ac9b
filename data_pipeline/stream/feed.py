"""From plans to micro-batches: blocks are read ahead by a few threads into slots, then collated in order.

Knows neither shard sets nor torch: a Feed is given what fetches a block and what collates cells.

Reading order: Plan, Slots and Collator (what a feed works with), Feed, _Blocks (which block is in which slot), its
kernels, Running, from_outside (how threads are ended).
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numba import njit

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.order import EpochOrder, Order, RestOfEpoch
from scldm.errors import InputError

CHUNK = 64  # steps that are planned at once
READER, LOADER = "scldm-read", "scldm-loader"  # what the names of a stream's threads begin with

Batch = TypeVar("Batch", covariant=True)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Plan:
    """One global batch of one rank: blocks and rows of the cells at its positions, before anything was read."""

    epoch: int
    step: int  # within the epoch
    block: np.ndarray
    row: np.ndarray
    n_cells: int  # real ones in the whole global batch


class Slots(Protocol):
    n_slots: int
    n_cells: np.ndarray  # of the block in each slot

    def buffer(self, slot: int, n_bytes: int) -> np.ndarray: ...
    def fill(self, slot: int, data: np.ndarray, where: str) -> None: ...


class Collator(Protocol[Batch]):
    slots: Any

    def make_slots(self, cells: ShardSet, n_slots: int) -> Slots: ...

    def __call__(
        self, slots: np.ndarray, rows: np.ndarray, plan: Plan, positions: np.ndarray, weight: np.ndarray
    ) -> Batch: ...


class Feed(Generic[Batch]):
    """Turns plans into micro-batches. Knows nothing of the loader that holds it, so that no thread keeps that alive."""

    def __init__(
        self,
        cells: ShardSet,
        collate: Collator[Batch],
        order: Order,
        n_blocks: int,
        low: int,
        high: int,
        *,
        micro_batch: int,
        read_ahead: int,
        read_threads: int,
    ) -> None:
        """n_blocks: different blocks in the order. low, high: this rank's positions in a global batch."""
        self.cells, self.collate, self.n_blocks = cells, collate, n_blocks
        self.low, self.high = low, high
        self.read_ahead, self.read_threads, self.positions = read_ahead, read_threads, np.arange(low, high)
        self.cuts = [slice(k, k + micro_batch) for k in range(0, high - low, micro_batch)]
        self.pool: ThreadPoolExecutor | None = None
        self.blocks: _Blocks | None = None
        self.running: Running | None = None
        self.n_slots = 0
        self.follow(order)

    def follow(self, order: Order, step: int = 0) -> None:
        """Serve this order from a step on, and have room for its blocks."""
        if self.running:
            self.running.stop()
        self.order = order
        low, high, n_blocks = self.low, self.high, self.n_blocks
        # All blocks of a small set. Else the windows of this rank's lanes, half as many again, and the blocks read
        # ahead: few where all of their cells are used, up to as many as the windows where few are selected. At least
        # the blocks of one step: of each lane the windows that it begins and ends in, and those between.
        # Where the batch was changed within an epoch, any lane may be this rank's until its end
        edge = np.arange(order.lanes + 1) * order.global_batch // order.lanes
        own = ((edge[:-1] < high) & (edge[1:] > low)) | (step < order.regular_from)
        windows = int(own.sum()) * order.window
        coming = self.read_ahead * (high - low) * n_blocks // order.population.n_cells
        n_slots = windows * 3 // 2 + self.read_ahead + min(coming, windows)
        n_slots = max(n_slots, min(high - low, 2 * windows + order.population.most_units(high - low)))
        n_slots = n_blocks if n_blocks <= order.lanes * order.window else min(n_blocks, n_slots)
        if n_slots != self.n_slots:
            self.n_slots, self.blocks = n_slots, None

    def plans_from(self, step: int) -> Iterator[Plan]:
        """From a step on, without end."""
        while True:
            epoch, t = self.order.place(step)
            order = self.order.epoch(epoch)
            n = min(CHUNK, order.steps - t)
            yield from self._chunk(order, t, n)
            step += n

    def plans_of(self, order: EpochOrder) -> Iterator[Plan]:
        """One epoch."""
        for t in range(0, order.steps, CHUNK):
            yield from self._chunk(order, t, min(CHUNK, order.steps - t))

    def _chunk(self, order: EpochOrder | RestOfEpoch, step: int, n: int) -> Iterator[Plan]:
        block, row = order.plan(step, n, self.low, self.high)
        for k in range(n):
            yield Plan(order.epoch, step + k, block[k], row[k], order.n_real(step + k))

    def start(self, plans: Iterator[Plan], prefetch: int) -> Running[list[Batch]]:
        if self.running:
            self.running.stop()  # the slots serve one stream at a time
        if self.blocks is None:
            self.pool = self.pool or ThreadPoolExecutor(self.read_threads, READER)
            self.blocks = _Blocks(self.cells, self.collate.make_slots(self.cells, self.n_slots), self.pool)
        running = self.running = Running(self._batches(plans, self.blocks), prefetch)
        running.begin()
        return running

    def _batches(self, plans: Iterator[Plan], blocks: _Blocks) -> Iterator[list[Batch]]:
        ahead: deque[tuple[Plan, int]] = deque()  # and when its blocks were asked for
        for plan in plans:
            if len(ahead) > self.read_ahead:
                # several steps' at once, so that a reading thread, once awake, finds several blocks to read
                while len(ahead) > self.read_ahead // 2:
                    yield self._collate(ahead.popleft()[0], blocks)
            while not (asked := blocks.want(plan.block, ahead[0][1] if ahead else blocks.now + 1)):
                assert ahead, "more blocks at once than slots"
                yield self._collate(ahead.popleft()[0], blocks)
            ahead.append((plan, asked))
        while ahead:
            yield self._collate(ahead.popleft()[0], blocks)

    def _collate(self, plan: Plan, blocks: _Blocks) -> list[Batch]:
        slots = blocks.slots_of(plan.block)
        positions = self.positions
        weight = (positions < plan.n_cells).astype(np.float32)
        return [self.collate(slots[c], plan.row[c], plan, positions[c], weight[c]) for c in self.cuts]

    def close(self) -> None:
        if self.running:
            self.running.stop()
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None
        self.blocks = None


class _Blocks:
    """Which block is in which slot. The slot that was needed longest ago goes first."""

    def __init__(self, cells: ShardSet, slots: Slots, pool: ThreadPoolExecutor) -> None:
        self.cells, self.slots, self.pool = cells, slots, pool
        self.slot = np.full(len(cells.blocks), -1, np.int32)  # of each block
        self.block = np.full(slots.n_slots, -1, np.int64)  # in each slot
        self.needed = np.full(slots.n_slots, -1, np.int64)  # when a slot was last asked for
        self.read = np.zeros(slots.n_slots, bool)  # whether a slot's block is there
        self.now = 0
        self.loading: dict[int, Future[None]] = {}  # block -> its read, until it was waited for

    def want(self, block: np.ndarray, since: int) -> int:
        """Begins to read what is not there, and returns when that was. Returns 0, with nothing begun, where reading
        would take the slot of a block that was asked for after `since`."""
        self.now += 1
        if _ask_for(block, self.slot, self.needed, self.now):
            return self.now
        missing = dict.fromkeys(block[self.slot[block] < 0].tolist())
        if len(missing) > int((self.needed < since).sum()):
            return 0
        for b in missing:
            slot = int(self.needed.argmin())
            if self.block[slot] >= 0:
                self._drop(int(self.block[slot]))
            self.block[slot], self.slot[b], self.needed[slot] = b, slot, self.now
            self._begin(b)
        return self.now

    def _begin(self, block: int) -> Future[None]:
        reading = self.pool.submit(read_block, self.cells, self.slots, block, int(self.slot[block]))
        self.loading[block] = reading
        return reading

    def slots_of(self, block: np.ndarray) -> np.ndarray:
        """The slots (B,) that hold these blocks, all read.

        Raises: what reading one of them raised.
        """
        slots = np.empty(len(block), np.int64)
        if not _find(block, self.slot, self.read, slots):
            asked = self.want(block, self.now + 1)  # again, where another batch's fault dropped one
            assert asked, "more blocks at once than slots"
            for b in dict.fromkeys(block[~self.read[self.slot[block]]].tolist()):
                reading = self.loading.get(b) or self._begin(b)  # an interrupt may come between a slot and its read
                error = reading.exception()
                self.loading.pop(b, None)  # only now: an interrupt ends the wait, not the read
                if error:
                    self._drop(b)
                    raise error
                self.read[self.slot[b]] = True
            found = _find(block, self.slot, self.read, slots)
            assert found
        return slots

    def _drop(self, block: int) -> None:
        reading = self.loading.get(block)
        if reading:  # it was wanted and never used. Its slot is free only when the read is over
            reading.exception()
            self.loading.pop(block)
        slot = self.slot[block]
        self.slot[block], self.block[slot], self.needed[slot], self.read[slot] = -1, -1, -1, False


@njit(cache=True)
def _ask_for(block, slot_of, needed, now):
    """Notes that the slots of these blocks are needed. False where a block has none. It is a kernel, as the one below,
    because a batch looks up a hundred blocks, for which NumPy takes five calls."""
    there = True
    for b in block:
        if slot_of[b] < 0:
            there = False
        else:
            needed[slot_of[b]] = now
    return there


@njit(cache=True)
def _find(block, slot_of, read, slots):
    """The slots of these blocks. False where one has none, or is still being read."""
    for i in range(len(block)):
        slots[i] = slot_of[block[i]]
        if slots[i] < 0 or not read[slots[i]]:
            return False
    return True


def read_block(cells: ShardSet, slots: Slots, block: int, slot: int) -> None:
    """Raises: InputError for a block that can't be read or is damaged. Also where it has another number of cells than
    the index says: rows beyond its own would be those of the block that was in the slot before."""
    record = cells.blocks[block]
    slots.fill(slot, cells.fetch(block, slots.buffer(slot, int(record["length"]))), cells.where(block))
    if slots.n_cells[slot] != record["n_cells"]:
        n = slots.n_cells[slot]
        raise InputError(f"{cells.where(block)}: {n} cells, the index says {record['n_cells']}")


class Running(Generic[Item]):
    """An iterator that is run ahead in a thread. `stop` ends and joins it.

    Whoever is to stop it holds it before it begins: an interrupt of `begin` may leave a thread that goes its way.
    """

    def __init__(self, batches: Iterator[Item], prefetch: int) -> None:
        self.batches, self.thread, self.ended = batches, None, False
        if not prefetch:
            return
        self.queue: queue.Queue[Any] = queue.Queue(prefetch)
        self.stopped, self.at_work = threading.Event(), threading.Lock()
        self.thread = threading.Thread(
            target=_run_ahead, args=(batches, self.queue, self.stopped, self.at_work), name=LOADER, daemon=True
        )

    def begin(self) -> None:
        if self.thread is not None:
            self.thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        assert not self.ended, "another stream of the same loader was begun before its end, or the loader was closed"
        if self.thread is None:
            return next(self.batches)
        item = self.queue.get()
        if isinstance(item, BaseException):
            self.stop()
            raise item
        return item

    def stop(self) -> None:
        self.ended = True
        if self.thread is not None:
            from_outside(self._join, self.thread)

    def _join(self, thread: threading.Thread) -> None:
        self.stopped.set()
        with suppress(queue.Empty):  # a thread that waits to put a batch gets room, sees `stopped` and ends
            while True:
                self.queue.get_nowait()
        with self.at_work:  # what has not come so far, if it ever does, sees `stopped` first
            pass
        if thread.is_alive():  # not while an interrupted start() is on its way: join() would raise
            thread.join()


def _run_ahead(
    batches: Iterable[Any], out: queue.Queue[Any], stopped: threading.Event, at_work: threading.Lock
) -> None:
    with at_work:
        if stopped.is_set():
            return
        try:
            for batch in batches:
                out.put(batch)
                if stopped.is_set():
                    return
            out.put(StopIteration())
        except BaseException as error:  # to be raised where it is asked for
            out.put(error)


def from_outside(end: Callable[..., None], *of: Any) -> None:
    """Calls what waits for the threads of a stream. In such a thread, it calls it from a new one.

    The garbage collector runs in whatever thread it is due in, and there ends a stream that nobody holds any more. A
    thread of the stream would wait for itself, and a lock that it holds just then would never be given up.
    """
    if threading.current_thread().name.startswith((READER, LOADER)):
        threading.Thread(target=end, args=of, name="scldm-end", daemon=True).start()
    else:
        end(*of)
