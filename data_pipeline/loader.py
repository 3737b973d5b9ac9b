"""The stream: micro-batches for every rank from a shard set, resumable at any step, the same for every world size.

    order (which cells) -> read ahead (a few threads) -> slots (blocks, compact) -> gather (gene sets) -> CellBatch

A loader's state is one integer, the global batches consumed since the start of the run, and the settings that prove
that it is the same stream. Nothing in it depends on rank, threads or how often the run was interrupted.

Reading order: LoaderConfig, CellLoader, LatentLoader, what both do, then the feed: reading ahead and collating.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch

from data_pipeline.gather import CellSlots
from data_pipeline.gene_sets import GeneSetConfig, GeneSets
from data_pipeline.order import (
    DRAW_ASKED,
    DRAW_GIVEN,
    FIXED_PASS,
    Balance,
    EpochOrder,
    EveryCell,
    Order,
    Population,
    Units,
    rank_slice,
)
from data_pipeline.read_shards import BlockSource, ShardSet
from data_pipeline.write_latents import LatentSlots
from scldm.batch import CellBatch, CompactCellBatch, CompactCounts, GeneCounts, LatentBatch, pinned
from scldm.errors import InputError
from scldm.vocab import ConditionVocab, GeneVocab

CHUNK = 64  # steps that are planned at once


@dataclass(frozen=True)
class StreamConfig:
    """Where the cells come from, and in which order.

    shards: folder or fsspec URL of a shard set
    seed: of the order and of the gene sets
    lanes: slices of a global batch, each read from a stretch of the epoch of its own; belongs to the run, at least the
        number of ranks if no block is to be read twice
    window_blocks: blocks of a lane whose cells are shuffled together; memory grows with it
    select: condition -> labels: only cells that have one of the labels in each of these conditions
    balance: conditions whose combinations are drawn equally often; none draws every cell once an epoch
    balance_max_repeats: how often a balanced epoch may repeat a cell at most
    prefetch: micro-batch lists that are made ahead in a thread; 0 makes each when it is asked for
    read_threads: threads that read and decompress
    read_ahead: steps whose blocks are read before they are needed
    cache_folder: where the index and blocks of a remote set are kept, shared by the ranks of a node
    cache_gb: limit of the blocks kept there, in 1e9 bytes
    """

    shards: str = "???"
    seed: int = 0
    lanes: int = 32
    window_blocks: int = 2
    select: dict[str, list[str]] = field(default_factory=dict)
    balance: list[str] = field(default_factory=list)
    balance_max_repeats: int = 10
    prefetch: int = 2
    read_threads: int = 2
    read_ahead: int = 8
    cache_folder: str = ""
    cache_gb: float = 50.0


@dataclass(frozen=True)
class LoaderConfig(StreamConfig):
    """Where the cells come from, in which order, and which of their genes.

    given: gene set of the encoder
    asked: gene set of the decoder and the likelihood
    form: dense, or compact: CSR that is gathered on the device by `to(device)`, less to compute and to send
    """

    given: GeneSetConfig = field(default_factory=GeneSetConfig)
    asked: GeneSetConfig = field(default_factory=lambda: GeneSetConfig(policy="same"))
    form: Literal["dense", "compact"] = "dense"


# the help of a verb finds every key's line in the docstring of its class
LoaderConfig.__doc__ = f"{LoaderConfig.__doc__}{(StreamConfig.__doc__ or '').partition('.')[2]}"

Batch = TypeVar("Batch", covariant=True)
Item = TypeVar("Item")


# --- the loaders ---------------------------------------------------------------------------------------------------


class _Loader(Generic[Batch]):
    """What both loaders do. `next` gives all micro-batches of this rank for one global batch, epoch after epoch."""

    kind: str

    def __init__(
        self,
        config: StreamConfig,
        split: str = "train",
        *,
        rank: int = 0,
        world_size: int = 1,
        global_batch: int,
        micro_batch: int,
        cells: BlockSource | None = None,
    ) -> None:
        """cells: read these instead of opening config.shards.

        Raises: InputError for what this set, batch or world size can't serve.
        """
        self.config, self.split, self.global_batch = config, split, global_batch
        low, high = rank_slice(rank, world_size, global_batch, micro_batch)
        self.cells = cells or ShardSet(
            config.shards, cache_folder=config.cache_folder, cache_bytes=int(config.cache_gb * 1e9)
        )
        try:
            self.manifest = self.cells.manifest
            if self.manifest.kind != self.kind:
                raise InputError(f"{config.shards}: a set of {self.manifest.kind}, not of {self.kind}")
            self.vocab: GeneVocab = self.manifest.genes
            self.conditions: ConditionVocab = self.manifest.conditions
            for name in ("prefetch", "read_ahead", "cache_gb"):
                if getattr(config, name) < 0:
                    raise InputError(f"{name}={getattr(config, name)} can't be negative")
            if config.read_threads < 1:
                raise InputError(f"read_threads={config.read_threads} must be at least 1")
            self.units = chosen_units(self.cells, split, config.select)
            self.population = balanced(self.cells, self.units, config) if config.balance else EveryCell(self.units)
            self.order = Order(self.population, config.seed, config.lanes, global_batch, config.window_blocks)
            self.n_cells = self.population.n_cells
            self.steps_per_epoch = self.order.steps_per_epoch
            self.feed = _Feed(
                self.cells, self._collator(micro_batch, loud=rank == 0), config, global_batch, low, high, micro_batch
            )
            self.feed.reserve(self.units, self.population)
        except BaseException:
            self.cells.close()
            raise
        self.step = 0
        self._running: _Running | None = None
        self._finalizer = weakref.finalize(self, _release, self.feed, self.cells)

    def _collator(self, micro_batch: int, loud: bool) -> _Collator[Batch]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of global batch `step`. Trouble with a block is raised by the first batch that needs it."""
        assert self._finalizer.alive, "the loader is closed"
        if self._running is None or self._running.ended:  # by one_pass, which took the threads over
            plans = self.feed.plans_from(self.order, self.step)
            self._running = self.feed.start(plans, self.config.prefetch)
        try:
            batches = next(self._running)
        except BaseException:
            self._stop()
            raise
        self.step += 1
        return batches

    def one_pass(self) -> Iterator[list[Batch]]:
        """Every cell of the split (and selection) once, in stored order, always with the same gene sets."""
        assert self._finalizer.alive, "the loader is closed"
        order = EpochOrder(self.units, self.config.seed, FIXED_PASS, 1, self.global_batch, 0)
        running = self.feed.start(self.feed.plans_of(order), self.config.prefetch)
        try:
            yield from running
        finally:
            running.stop()

    def seek(self, step: int) -> None:
        """Goes to global batch `step`, counted from the start of the run."""
        assert step >= 0
        self._stop()
        self.step = step

    def state(self) -> dict[str, int | str]:
        """Where the stream is, and what proves that another one is the same."""
        config = self.config
        return {
            "step": self.step,
            "data": self.cells.hash,
            "split": self.split,
            "seed": config.seed,
            "lanes": config.lanes,
            "window_blocks": config.window_blocks,
            "global_batch": self.global_batch,
            "select": repr(sorted((k, sorted(v)) for k, v in config.select.items())),
            "balance": repr((sorted(config.balance), config.balance_max_repeats if config.balance else 0)),
        }

    def load_state(self, state: dict[str, int | str]) -> None:
        """Goes to where another loader was.

        Raises: InputError naming what differs or is missing, where the rest of the stream might not be the same.
        """
        own = self.state()
        for names, text in ((own.keys() - state, "lacks {}"), (state.keys() - own, "has {}, which is unknown")):
            if names:
                raise InputError(
                    f"the stream can't be resumed: the checkpoint's state {text.format(', '.join(sorted(names)))}"
                )
        for name, value in state.items():
            if name != "step" and own[name] != value:
                raise InputError(
                    f"the stream can't be resumed: {name} is {own[name]!r}, the checkpoint's was {value!r}"
                )
        self.seek(int(state["step"]))

    def close(self) -> None:
        """Stops the threads and closes the files."""
        self._running = None
        self._finalizer()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None


class CellLoader(_Loader[CellBatch | CompactCellBatch]):
    """Cells of a shard set as CellBatch (or CompactCellBatch, whose `to(device)` is one)."""

    kind = "cells"
    config: LoaderConfig

    def state(self) -> dict[str, int | str]:
        return {**super().state(), "given": repr(self.config.given), "asked": repr(self.config.asked)}

    def _collator(self, micro_batch: int, loud: bool) -> _Collator[CellBatch | CompactCellBatch]:
        config, sides = self.config, []
        for key, purpose in (("given", DRAW_GIVEN), ("asked", DRAW_ASKED)):
            sets: GeneSetConfig = getattr(config, key)
            if key == "asked" and sets.policy == "same":
                sides.append(None)
                continue
            weights = None
            if sets.policy == "weighted":
                weights = self.cells.gene_column("mean" if sets.weight_by == "mean" else "fraction_expressed")
                weights = weights if sets.weight_by == "mean" else weights * (1 - weights)
            sides.append(
                GeneSets(
                    sets,
                    key,
                    seed=config.seed,
                    purpose=purpose,
                    n_genes=self.vocab.n_genes,
                    n_expressed_largest=self.manifest.statistics.n_expressed_largest,
                    weights=weights,
                    global_batch=self.global_batch,
                    micro_batch=micro_batch,
                    loud=loud,
                )
            )
        return _CellCollator(self.manifest.conditions.names, sides[0], sides[1], config.form)


class LatentLoader(_Loader[LatentBatch]):
    """Encoded cells of a latent shard set."""

    kind = "latents"

    def _collator(self, micro_batch: int, loud: bool) -> _Collator[LatentBatch]:
        return _LatentCollator(self.manifest.conditions.names)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(L, Z)."""
        tokens, width = self.manifest.extra["shape"]
        return tokens, width


def shard_batches(
    cells: BlockSource, shard: int, *, micro_batch: int, given: GeneSetConfig | None = None, prefetch: int = 2
) -> Iterator[CellBatch]:
    """Every cell of one shard in set order and none twice, for encoding; a block's last micro-batch may be shorter.

    given: gene set; `all` if None, else `all` or `expressed`
    """
    manifest = cells.manifest
    entry, config = manifest.shards[shard], given or GeneSetConfig()
    if config.policy not in ("all", "expressed"):
        raise InputError(f"cells are encoded from all or all expressed genes, not policy={config.policy}")
    sets = GeneSets(
        config,
        "given",
        seed=0,
        purpose=DRAW_GIVEN,
        n_genes=manifest.genes.n_genes,
        n_expressed_largest=manifest.statistics.n_expressed_largest,
        weights=None,
        global_batch=manifest.block_cells,
        micro_batch=micro_batch,
        loud=True,
    )
    collate = _CellCollator(manifest.conditions.names, sets, None, "dense")
    slots = collate.make_slots(cells, 1)

    def batches() -> Iterator[Any]:
        for k, block in enumerate(range(entry.first_block, entry.first_block + entry.n_blocks)):
            _read(cells, slots, block, 0)
            n = int(cells.blocks["n_cells"][block])
            for low in range(0, n, micro_batch):
                rows = np.arange(low, min(low + micro_batch, n))
                plan = _Plan(FIXED_PASS, k, np.full(len(rows), block), rows, n)
                yield collate(np.zeros_like(rows), rows, plan, rows, np.ones(len(rows), np.float32))

    running = _Running(batches(), prefetch)
    try:
        yield from running
    finally:
        running.stop()


def chosen_units(cells: BlockSource, split: str, select: dict[str, list[str]]) -> Units:
    """The cells of a split that have one of the labels in each condition of `select`. Reads the index alone."""
    manifest = cells.manifest
    entry = manifest.splits[manifest.split_number(split)]
    block = np.arange(entry.first_block, entry.first_block + entry.n_blocks, dtype=np.int32)
    units = Units.whole(block, cells.blocks["n_cells"][entry.first_block : entry.first_block + entry.n_blocks])
    if not select:
        if not units.n_cells:
            raise InputError(f"split {split!r} has no cell")
        return units
    keep = np.ones(entry.n_cells, bool)
    for name, labels in select.items():
        wanted = manifest.conditions.encode(name, labels)
        ids = cells.cell_column(f"condition.{name}")[entry.first_cell : entry.first_cell + entry.n_cells]
        keep &= np.isin(ids, wanted)
    if not keep.any():
        text = ", ".join(f"{name} in {labels}" for name, labels in select.items())
        raise InputError(f"select: no cell of split {split!r} has {text}")
    return units.where(keep)


def balanced(cells: BlockSource, units: Units, config: StreamConfig) -> Balance:
    """The cells drawn so that every combination of the conditions in `balance` comes equally often."""
    if config.balance_max_repeats < 1:
        raise InputError(f"balance_max_repeats={config.balance_max_repeats} must be at least 1")
    conditions = cells.manifest.conditions
    at = np.repeat(cells.blocks["first_cell"][units.block].astype(np.int64), np.diff(units.start)) + units.cell_rows()
    group = np.zeros(units.n_cells, np.int64)
    for name in sorted(config.balance):  # a group's number draws its cells, and state() knows no order either
        if name not in conditions.names:
            raise InputError(
                f"balance: condition {name!r} is unknown; the set has {', '.join(conditions.names) or 'none'}"
            )
        group = group * conditions.n_labels(name) + cells.cell_column(f"condition.{name}")[at]
    _, group = np.unique(group, return_inverse=True)
    return Balance(units, group, config.balance_max_repeats, config.seed)


# --- the feed ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """One global batch of one rank: blocks and rows of the cells at its positions, before anything was read."""

    epoch: int
    step: int  # within the epoch
    block: np.ndarray
    row: np.ndarray
    n_cells: int  # real ones in the whole global batch


class _Slots(Protocol):
    n_slots: int

    def buffer(self, slot: int, n_bytes: int) -> np.ndarray: ...
    def fill(self, slot: int, data: np.ndarray, where: str) -> None: ...


class _Collator(Protocol[Batch]):
    slots: Any

    def make_slots(self, cells: BlockSource, n_slots: int) -> _Slots: ...

    def __call__(
        self, slots: np.ndarray, rows: np.ndarray, plan: _Plan, positions: np.ndarray, weight: np.ndarray
    ) -> Batch: ...


class _Feed(Generic[Batch]):
    """Turns plans into micro-batches. Knows nothing of the loader that holds it, so that no thread keeps that alive."""

    def __init__(
        self,
        cells: BlockSource,
        collate: _Collator[Batch],
        config: StreamConfig,
        global_batch: int,
        low: int,
        high: int,
        micro: int,
    ) -> None:
        self.cells, self.collate, self.global_batch = cells, collate, global_batch
        self.low, self.high, self.micro = low, high, micro
        self.lanes, self.window, self.read_ahead = config.lanes, config.window_blocks, config.read_ahead
        self.threads, self.positions = config.read_threads, np.arange(low, high)
        self.pool: ThreadPoolExecutor | None = None
        self.running: _Running | None = None

    def reserve(self, units: Units, population: Population) -> None:
        """Slots for the blocks that are in use at a time: all of a small set, else the windows of this rank's lanes and
        half as many again, for blocks read ahead."""
        n_blocks = len(np.unique(units.block))
        edge = np.arange(self.lanes + 1) * self.global_batch // self.lanes
        lanes = int(((edge[:-1] < self.high) & (edge[1:] > self.low)).sum())
        n_slots = lanes * self.window * 3 // 2 + self.read_ahead
        if n_blocks <= self.lanes * self.window:
            n_slots = n_blocks
        self.n_slots = min(n_blocks, max(n_slots, self.high - self.low))
        self.blocks: _Blocks | None = None

    def plans_from(self, order: Order, step: int) -> Iterator[_Plan]:
        """From a step on, without end."""
        while True:
            epoch, t = divmod(step, order.steps_per_epoch)
            n = min(CHUNK, order.steps_per_epoch - t)
            yield from self._chunk(order.epoch(epoch), t, n)
            step += n

    def plans_of(self, order: EpochOrder) -> Iterator[_Plan]:
        """One epoch."""
        for t in range(0, order.steps, CHUNK):
            yield from self._chunk(order, t, min(CHUNK, order.steps - t))

    def _chunk(self, order: EpochOrder, step: int, n: int) -> Iterator[_Plan]:
        block, row = order.plan(step, n, self.low, self.high)
        for k in range(n):
            real = min(order.global_batch, order.n_cells - (step + k) * order.global_batch)
            yield _Plan(order.epoch, step + k, block[k], row[k], real)

    def start(self, plans: Iterator[_Plan], prefetch: int) -> _Running[list[Batch]]:
        if self.running:
            self.running.stop()  # the slots serve one stream at a time
        if self.blocks is None:
            self.pool = ThreadPoolExecutor(self.threads, "scldm-read")
            self.blocks = _Blocks(self.cells, self.collate.make_slots(self.cells, self.n_slots), self.pool)
        running = self.running = _Running(self._batches(plans, self.blocks), prefetch)
        return running

    def _batches(self, plans: Iterator[_Plan], blocks: _Blocks) -> Iterator[list[Batch]]:
        ahead: deque[_Plan] = deque()
        for plan in plans:
            blocks.want(plan.block)
            ahead.append(plan)
            if len(ahead) > self.read_ahead:
                yield self._collate(ahead.popleft(), blocks)
        while ahead:
            yield self._collate(ahead.popleft(), blocks)

    def _collate(self, plan: _Plan, blocks: _Blocks) -> list[Batch]:
        slots = blocks.slots_of(plan.block)
        positions = self.positions
        weight = (positions < plan.n_cells).astype(np.float32)
        cuts = [slice(k, k + self.micro) for k in range(0, len(positions), self.micro)]
        return [self.collate(slots[c], plan.row[c], plan, positions[c], weight[c]) for c in cuts]

    def close(self) -> None:
        if self.running:
            self.running.stop()
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None
        self.blocks = None


def _release(feed: _Feed, cells: BlockSource) -> None:
    cells.close()  # so that a read that waits to try again gives up
    feed.close()
    cells.close()  # what a read under way opened again


class _Blocks:
    """Which block is in which slot; the slot that was needed longest ago goes first."""

    def __init__(self, cells: BlockSource, slots: _Slots, pool: ThreadPoolExecutor) -> None:
        self.cells, self.slots, self.pool = cells, slots, pool
        self.slot = np.full(len(cells.blocks), -1, np.int32)  # of each block
        self.block = np.full(slots.n_slots, -1, np.int64)  # in each slot
        self.needed = np.full(slots.n_slots, -1, np.int64)  # when a slot was last asked for
        self.now = 0
        self.loading: dict[int, Future[None]] = {}  # block -> its read, until it was waited for

    def want(self, block: np.ndarray) -> None:
        """Begins to read what is not there."""
        self.now += 1
        slots = self.slot[block]
        self.needed[slots[slots >= 0]] = self.now
        for b in dict.fromkeys(block[slots < 0].tolist()):
            slot = int(self.needed.argmin())
            assert self.needed[slot] < self.now, "more blocks at once than slots"
            if self.block[slot] >= 0:
                self._drop(int(self.block[slot]))
            self.block[slot], self.slot[b], self.needed[slot] = b, slot, self.now
            self.loading[b] = self.pool.submit(_read, self.cells, self.slots, b, slot)

    def slots_of(self, block: np.ndarray) -> np.ndarray:
        """The slots (B,) that hold these blocks, all read.

        Raises: what reading one of them raised.
        """
        if self.loading or self.slot[block].min() < 0:
            self.want(block)
            for b in dict.fromkeys(block.tolist()):
                if b in self.loading:
                    error = self.loading.pop(b).exception()
                    if error:
                        self._drop(b)
                        raise error
        return self.slot[block].astype(np.int64)

    def _drop(self, block: int) -> None:
        reading = self.loading.pop(block, None)
        if reading:  # it was wanted and never used; its slot is free only when the read is over
            reading.exception()
        slot = self.slot[block]
        self.slot[block], self.block[slot], self.needed[slot] = -1, -1, -1


def _read(cells: BlockSource, slots: _Slots, block: int, slot: int) -> None:
    into = slots.buffer(slot, int(cells.blocks["length"][block]))
    slots.fill(slot, cells.fetch(block, into), cells.where(block))


class _Running(Generic[Item]):
    """An iterator that is run ahead in a thread; `stop` ends and joins it."""

    def __init__(self, batches: Iterator[Item], prefetch: int) -> None:
        self.batches, self.thread, self.ended = batches, None, False
        if not prefetch:
            return
        self.queue: queue.Queue[Any] = queue.Queue(prefetch)
        self.stopped = threading.Event()
        self.thread = threading.Thread(
            target=_run_ahead, args=(batches, self.queue, self.stopped), name="scldm-loader", daemon=True
        )
        self.thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        assert not self.ended, "another stream of the same loader was begun before this one was read to its end"
        if self.thread is None:
            return next(self.batches)
        item = self.queue.get()
        if isinstance(item, BaseException):
            self.stop()
            raise item
        return item

    def stop(self) -> None:
        self.ended = True
        if self.thread is None:
            return
        self.stopped.set()
        while self.thread.is_alive():
            try:  # a thread that waits to put a batch gets room, sees `stopped` and ends
                self.queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self.thread.join()


def _run_ahead(batches: Iterable[Any], out: queue.Queue[Any], stopped: threading.Event) -> None:
    try:
        for batch in batches:
            out.put(batch)
            if stopped.is_set():
                return
        out.put(StopIteration())
    except BaseException as error:  # to be raised where it is asked for
        out.put(error)


# --- collate -------------------------------------------------------------------------------------------------------


class _CellCollator:
    """Cells in slots -> one micro-batch."""

    slots: CellSlots

    def __init__(self, names: tuple[str, ...], given: GeneSets | None, asked: GeneSets | None, form: str) -> None:
        assert given is not None
        self.names, self.given, self.asked, self.form = names, given, asked, form

    def make_slots(self, cells: BlockSource, n_slots: int) -> CellSlots:
        self.slots = CellSlots(cells.manifest, n_slots)
        return self.slots

    def __call__(
        self, slots: np.ndarray, rows: np.ndarray, plan: _Plan, positions: np.ndarray, weight: np.ndarray
    ) -> CellBatch | CompactCellBatch:
        rest = _rest(self.slots, self.names, slots, rows, plan, positions, weight)
        if self.form == "compact":
            return self._compact(slots, rows, plan, positions, rest)
        given, totals = self._dense(self.given, slots, rows, plan, positions)
        asked = given
        if self.asked is not None:
            asked, totals = self._dense(self.asked, slots, rows, plan, positions)
        library_size = torch.from_numpy(totals.astype(np.float32))
        return CellBatch(given=given, asked=asked, library_size_B=library_size, **rest)

    def _dense(
        self, sets: GeneSets, slots: np.ndarray, rows: np.ndarray, plan: _Plan, positions: np.ndarray
    ) -> tuple[GeneCounts, np.ndarray]:
        if sets.of_the_cell:
            words = sets.words(plan.epoch, plan.step, positions)
            ids, counts, totals = self.slots.take_of_the_cell(slots, rows, sets, words)
        else:
            ids = sets.ids(plan.epoch, plan.step, positions)
            counts, totals = self.slots.take(slots, rows, ids)
        return GeneCounts(torch.from_numpy(ids), torch.from_numpy(counts)), totals

    def _compact(
        self, slots: np.ndarray, rows: np.ndarray, plan: _Plan, positions: np.ndarray, rest: dict[str, Any]
    ) -> CompactCellBatch:
        csr = self.slots.take_csr(slots, rows)
        ids = [self._ids(sets, slots, rows, plan, positions) for sets in (self.given, self.asked) if sets is not None]
        counts = CompactCounts.from_numpy(
            csr.start, csr.gene_ids, csr.counts, csr.large_at, csr.large, self.slots.n_genes + 1
        )
        return CompactCellBatch(csr=counts, given_ids=ids[0], asked_ids=ids[-1], **rest)

    def _ids(
        self, sets: GeneSets, slots: np.ndarray, rows: np.ndarray, plan: _Plan, positions: np.ndarray
    ) -> torch.Tensor:
        if sets.of_the_cell:
            words = sets.words(plan.epoch, plan.step, positions)
            ids = self.slots.take_of_the_cell(slots, rows, sets, words)[0]
        else:
            ids = sets.ids(plan.epoch, plan.step, positions)
        return pinned(torch.from_numpy(ids.astype(np.int32)))


class _LatentCollator:
    """Latents in slots -> one micro-batch."""

    slots: LatentSlots

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def make_slots(self, cells: BlockSource, n_slots: int) -> LatentSlots:
        self.slots = LatentSlots(cells.manifest, n_slots)
        return self.slots

    def __call__(
        self, slots: np.ndarray, rows: np.ndarray, plan: _Plan, positions: np.ndarray, weight: np.ndarray
    ) -> LatentBatch:
        rest = _rest(self.slots, self.names, slots, rows, plan, positions, weight)
        return LatentBatch(latent_BLZ=torch.from_numpy(self.slots.latent[slots, rows]), **rest)


def _rest(
    held: CellSlots | LatentSlots,
    names: tuple[str, ...],
    slots: np.ndarray,
    rows: np.ndarray,
    plan: _Plan,
    positions: np.ndarray,
    weight: np.ndarray,
) -> dict[str, Any]:
    """What cells and latents have in common."""
    labels = held.labels[slots, rows]
    return {
        "library_size_all_B": torch.from_numpy(held.total_counts[slots, rows].astype(np.float32)),
        "weight_B": torch.from_numpy(weight),
        "conditions": {name: torch.from_numpy(np.ascontiguousarray(labels[:, c])) for c, name in enumerate(names)},
        "cell_ids_B2": torch.from_numpy(held.identity[slots, rows]),
        "positions_B": torch.from_numpy(positions.copy()),
        "n_cells": plan.n_cells,
    }
