"""The stream: micro-batches for every rank from a shard set, resumable at any step, the same for every world size.

    order (which cells) -> read ahead (a few threads) -> slots (blocks, compact) -> gather (gene sets) -> CellBatch

A loader's state is one integer, the global batches consumed since the start of the run, and the settings that prove
that it is the same stream. Where the global batch was changed, it also has the epoch of that. Nothing in it depends
on rank, threads or how often the run was interrupted.

Reading order: StreamConfig, LoaderConfig, what both loaders do, CellLoader, LatentLoader, shard_batches (for encoding),
which cells are chosen. Reading ahead is in feed.py, making a batch of what was read in collate.py.
"""

from __future__ import annotations

import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream import order as orders
from data_pipeline.stream.collate import CellCollator, LatentCollator
from data_pipeline.stream.feed import Collator, Feed, Plan, Running, from_outside, read_block
from data_pipeline.stream.gene_set_config import OF_THE_CELL, GeneSetConfig
from data_pipeline.stream.gene_sets import GeneSets
from scldm.batch import CellBatch, CompactCellBatch, LatentBatch
from scldm.checked import SEEDS, Checked, checked
from scldm.errors import InputError
from scldm.given_json import typed
from scldm.vocab import ConditionVocab, GeneVocab

Batch = TypeVar("Batch", covariant=True)


@dataclass(frozen=True)
class StreamConfig(Checked):
    """Where the cells come from, and in which order.

    shards: folder or fsspec URL of a shard set
    seed: of the order and of the gene sets
    lanes: slices of a global batch, each read from a stretch of the epoch of its own. With as many as ranks, or a
        multiple, no block is read by two ranks. They are part of the order, so of the run. Memory grows with those of a
        rank
    window_blocks: blocks of a lane whose cells are shuffled together. Memory grows with it
    select: condition -> labels: only cells that have one of the labels in each of these conditions, as
        data.select.dose=0.10,1 or 'data.select.cell_type=["B, naive",T]'. A preset must quote labels like 0.10
    balance: conditions whose combinations are drawn equally often, as data.balance=cell_type,dose. None draws every
        cell once an epoch
    balance_max_repeats: how often a balanced epoch may repeat a cell at most
    prefetch: micro-batch lists that are made ahead in a thread. 0 makes each when it is asked for
    read_threads: threads that read and decompress
    read_ahead: steps whose blocks are read before they are needed, half of them at a time: a thread that wakes up then
        finds several
    cache_folder: where the index and blocks of a remote set are kept, shared by the ranks of a node. Each set
        has a folder of its own, which stays until you remove it
    cache_gb: limit of the blocks of one set that are kept there, in 1e9 bytes
    """

    shards: str = "???"
    seed: int = checked(0, at_least=0, below=SEEDS)
    lanes: int = checked(32, at_least=1)
    window_blocks: int = checked(2, at_least=1)
    select: dict[str, list[str]] = field(default_factory=dict)
    balance: list[str] = field(default_factory=list)
    balance_max_repeats: int = checked(10, at_least=1, at_most=orders.MOST_REPEATS)
    prefetch: int = checked(2, at_least=0)
    read_threads: int = checked(2, at_least=1)
    read_ahead: int = checked(16, at_least=0)
    cache_folder: str = ""
    cache_gb: float = checked(50.0, at_least=0)


@dataclass(frozen=True)
class LoaderConfig(StreamConfig):
    """Where the cells come from, in which order, and which of their genes.

    given: gene set of the encoder
    asked: gene set of the decoder and the likelihood
    form: compact is CSR, which `to(device)` gathers on the device: less to compute and to send. dense is gathered here.
        auto is compact for batches that go to a GPU, and dense for a CPU
    """

    given: GeneSetConfig = field(default_factory=GeneSetConfig)
    asked: GeneSetConfig = field(default_factory=lambda: GeneSetConfig(policy="same"))
    form: Literal["auto", "dense", "compact"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.given.check("data.given")
        self.asked.check("data.asked")


# the help of a verb finds every key's line in the docstring of its class
LoaderConfig.__doc__ = f"{LoaderConfig.__doc__}{(StreamConfig.__doc__ or '').partition('.')[2]}"

# --- the loaders ---------------------------------------------------------------------------------------------------


class _Loader(ABC, Generic[Batch]):
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
        device: torch.device | str = "cpu",
        cells: ShardSet | None = None,
        most_cells: int = 0,
    ) -> None:
        """device: where the batches will go. Those for a GPU lie in pinned memory
        most_cells: of `one_pass`, in whole global batches. 0 for all
        cells: read these instead of opening config.shards. Several loaders may share them. Whoever opened them closes
            them after the last of these

        Raises: InputError for what this set, batch or world size can't serve.
        """
        self.config, self.split, self.global_batch, self.device = config, split, global_batch, torch.device(device)
        self.pass_steps = -(-most_cells // global_batch) or None
        low, high = orders.rank_slice(rank, world_size, global_batch, micro_batch)
        self.cells = cells or ShardSet(
            config.shards, cache_folder=config.cache_folder, cache_bytes=int(config.cache_gb * 1e9)
        )
        own = self.cells if cells is None else None
        try:
            self.manifest = self.cells.manifest
            if self.manifest.kind != self.kind:
                raise InputError(f"{config.shards}: a set of {self.manifest.kind}, not of {self.kind}")
            self.vocab: GeneVocab = self.manifest.genes
            self.conditions: ConditionVocab = self.manifest.conditions
            self.units = chosen_units(self.cells, split, config.select)
            self.population = balanced(self.cells, self.units, config) if config.balance else self.units
            self.order = orders.Order(self.population, config.seed, config.lanes, global_batch, config.window_blocks)
            self.n_cells = self.population.n_cells
            self.steps_per_epoch = self.order.steps_per_epoch
            self.feed = Feed(
                self.cells,
                self._collator(micro_batch, loud=rank == 0),
                self.order,
                len(np.unique(self.units.block)),
                low,
                high,
                micro_batch=micro_batch,
                read_ahead=config.read_ahead,
                read_threads=config.read_threads,
            )
        except BaseException:
            if own:
                own.close()
            raise
        lanes = min(config.lanes, global_batch)
        if rank == 0 and split == "train" and world_size > lanes and self.feed.n_slots < len(self.units):
            reads = orders.reads_of_a_block(lanes, world_size, global_batch)
            print(
                f"data.lanes={lanes} are shared by {world_size} ranks: a block is read and decompressed by {reads:.3g} "
                f"of them. In a new run, data.lanes={world_size} has it read by one. Lanes are part of the order",
                file=sys.stderr,
            )
        if rank == 0 and self.pass_cells < self.units.n_cells:
            print(
                f"scldm: a pass over {split} takes the first {self.pass_cells:,} of {self.units.n_cells:,} cells",
                file=sys.stderr,
            )
        self.step, self._loud = 0, rank == 0 and split == "train"
        self._running: Running | None = None
        self._closed, self._own = False, own
        self._finalizer = weakref.finalize(self, from_outside, _release, self.feed, own)

    @property
    def pass_cells(self) -> int:
        """Cells of `one_pass`, of all ranks."""
        return min(self.units.n_cells, self.pass_steps * self.global_batch if self.pass_steps else sys.maxsize)

    @abstractmethod
    def _collator(self, micro_batch: int, loud: bool) -> Collator[Batch]: ...

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of global batch `step`. Trouble with a block is raised by the first batch that needs it."""
        assert not self._closed, "the loader is closed"
        if self._running is None or self._running.ended:  # by one_pass, which took the threads over
            plans = self.feed.plans_from(self.step)
            self._running = self.feed.start(plans, self.config.prefetch)
        try:
            batches = next(self._running)
            self.step += 1  # in here: an interrupt before it gives the same batch again
        except BaseException:
            self._stop()
            raise
        return batches

    def one_pass(self) -> Iterator[list[Batch]]:
        """Every cell of the split (and selection) once, in stored order, always with the same gene sets. With
        `most_cells` the first ones, which are as good as drawn: sets are shuffled when they are written."""
        assert not self._closed, "the loader is closed"
        order = orders.EpochOrder(self.units, self.config.seed, orders.FIXED_PASS, 1, self.global_batch, 0)
        running = self.feed.start(islice(self.feed.plans_of(order), self.pass_steps), self.config.prefetch)
        try:
            yield from running
        finally:
            running.stop()

    def seek(self, step: int) -> None:
        """Goes to global batch `step`, counted from the start of the run."""
        assert step >= 0
        self._stop()
        self.step = step

    def state(self) -> dict[str, Any]:
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
            **({"regrouped": asdict(self.order.regrouped)} if self.order.regrouped else {}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to where another loader was, also one of another global batch: the cells that its epoch has left then
        come in its order, and each once.

        Raises: InputError naming what differs or is missing, where the rest of the stream might not be the same.
        """
        try:
            found, regrouped = self._checked_state(state)
        except InputError as error:
            raise InputError(f"the stream can't be resumed: {error}") from None
        step = found["step"]
        before = replace(self.order, global_batch=found["global_batch"], regrouped=regrouped)
        if self.global_batch != before.global_batch:
            regrouped = before.regroup(step)
        self.seek(step)
        self.order = replace(self.order, regrouped=regrouped)
        self.feed.follow(self.order, step)
        if self.global_batch != before.global_batch and regrouped and self._loud:
            left, until = self.n_cells - regrouped.first, self.order.regular_from
            print(
                f"train.global_batch was {before.global_batch} until step {step} and is {self.global_batch}: the "
                f"{left:,} cells left of epoch {regrouped.epoch} come once each, in its order, until step {until}. "
                "Which cells share a batch, and their gene sets, are not those of a run that began with this batch",
                file=sys.stderr,
                flush=True,
            )

    def _checked_state(self, state: dict[str, Any]) -> tuple[dict[str, Any], orders.Regrouped | None]:
        """Raises: InputError where it is not this stream's."""
        found, own = dict(state), self.state()
        own.pop("regrouped", None)
        regrouped = typed(orders.Regrouped, found.pop("regrouped"), "regrouped") if "regrouped" in found else None
        for names, text in ((own.keys() - found, "lacks {}"), (found.keys() - own, "has {}, which is unknown")):
            if names:
                raise InputError(f"the checkpoint's state {text.format(', '.join(sorted(names)))}")
        for name, value in found.items():
            if name not in ("step", "global_batch") and own[name] != value:
                raise InputError(f"{name} is {own[name]!r}, the checkpoint's was {value!r}")
        for name, least, of in (("step", 0, "global batches"), ("global_batch", 1, "cells")):
            if not isinstance(found[name], int) or found[name] < least:
                raise InputError(f"the checkpoint's {name}={found[name]!r} is no number of {of}")
        return found, regrouped

    def close(self) -> None:
        """Stops the threads and closes the files, but those of `cells` that the loader was given. May be called again,
        and ends then what an interrupt left of it."""
        self._running, self._closed = None, True
        from_outside(_release, self.feed, self._own)
        self._finalizer.detach()  # only now: it calls but once, done or not

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

    def state(self) -> dict[str, Any]:
        return {**super().state(), "given": repr(self.config.given), "asked": repr(self.config.asked)}

    def _collator(self, micro_batch: int, loud: bool) -> Collator[CellBatch | CompactCellBatch]:
        config, how = self.config, {"seed": self.config.seed, "micro_batch": micro_batch, "loud": loud}
        given = _gene_sets(self.cells, config.given, "given", purpose=orders.DRAW_GIVEN, **how)
        same = config.asked.policy == "same"
        asked = None if same else _gene_sets(self.cells, config.asked, "asked", purpose=orders.DRAW_ASKED, **how)
        return CellCollator(self.manifest.conditions.names, given, asked, **_how(self.device, config.form))


class LatentLoader(_Loader[LatentBatch]):
    """Encoded cells of a latent shard set."""

    kind = "latents"

    def _collator(self, micro_batch: int, loud: bool) -> Collator[LatentBatch]:
        return LatentCollator(self.manifest.conditions.names, pin=_how(self.device)["pin"])

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(L, Z)."""
        tokens, width = self.manifest.extra["shape"]
        return tokens, width


def shard_batches(
    cells: ShardSet,
    shard: int,
    *,
    micro_batch: int,
    given: GeneSetConfig | None = None,
    device: torch.device | str = "cpu",
    prefetch: int = 2,
) -> Iterator[CellBatch | CompactCellBatch]:
    """Every cell of one shard in set order and none twice, for encoding. A block's last micro-batch may be shorter.

    given: gene set. `all` if None, else `all`, `expressed` or `expressed_plus_zeros`, whose draws are by block and row
    device: where the batches will go. Those for a GPU are compact, in pinned memory
    """
    manifest = cells.manifest
    entry, config = manifest.shards[shard], given or GeneSetConfig()
    if config.policy not in ("all", *OF_THE_CELL):
        raise InputError(f"cells are encoded from all their genes or all expressed ones, not policy={config.policy}")
    loud = shard == 0  # else every shard would say it
    sets = _gene_sets(cells, config, "given", seed=0, purpose=orders.DRAW_GIVEN, micro_batch=micro_batch, loud=loud)
    collate = CellCollator(manifest.conditions.names, sets, None, **_how(torch.device(device)))
    slots = collate.make_slots(cells, 1)

    def batches() -> Iterator[Any]:
        for block in range(entry.first_block, entry.first_block + entry.n_blocks):
            read_block(cells, slots, block, 0)
            n = int(cells.blocks["n_cells"][block])
            for low in range(0, n, micro_batch):
                rows = np.arange(low, min(low + micro_batch, n))
                plan = Plan(orders.FIXED_PASS, block, np.full(len(rows), block), rows, n)
                yield collate(np.zeros_like(rows), rows, plan, rows, np.ones(len(rows), np.float32))

    running = Running(batches(), prefetch)
    try:
        running.begin()
        yield from running
    finally:
        running.stop()


def _gene_sets(cells: ShardSet, config: GeneSetConfig, key: str, **how: Any) -> GeneSets:
    """The gene sets of one side, for the cells of a set."""
    weights, manifest = None, cells.manifest
    if config.policy == "weighted":
        weights = cells.gene_column("mean" if config.weight_by == "mean" else "fraction_expressed")
        weights = weights if config.weight_by == "mean" else weights * (1 - weights)
    most = manifest.statistics.n_expressed_largest
    return GeneSets(config, key, n_genes=manifest.genes.n_genes, n_expressed_largest=most, weights=weights, **how)


def _how(device: torch.device, form: str = "auto") -> dict[str, bool]:
    """How batches for a device are made."""
    return {"compact": device.type != "cpu" if form == "auto" else form == "compact", "pin": device.type == "cuda"}


def chosen_units(cells: ShardSet, split: str, select: dict[str, list[str]]) -> orders.Units:
    """The cells of a split that have one of the labels in each condition of `select`. Reads the index alone."""
    manifest = cells.manifest
    entry = manifest.splits[manifest.split_number(split)]
    block = np.arange(entry.first_block, entry.first_block + entry.n_blocks, dtype=np.int32)
    units = orders.Units.whole(block, cells.blocks["n_cells"][entry.first_block : entry.first_block + entry.n_blocks])
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


def balanced(cells: ShardSet, units: orders.Units, config: StreamConfig) -> orders.Balance:
    """The cells drawn so that every combination of the conditions in `balance` comes equally often."""
    conditions = cells.manifest.conditions
    at = np.repeat(cells.blocks["first_cell"][units.block].astype(np.int64), np.diff(units.start))
    at += units.cell_rows()
    group, n_groups = np.zeros(units.n_cells, np.uint32), 1
    for name in sorted(config.balance):  # a group's number draws its cells, and state() knows no order either
        conditions.require(name, "balance")
        n_labels = conditions.n_labels(name)
        if n_groups * n_labels >= 1 << 32:
            raise InputError(f"balance: {', '.join(sorted(config.balance))} have more than 2^32 combinations of labels")
        group *= np.uint32(n_labels)
        group += cells.cell_column(f"condition.{name}")[at]
        group, n_groups = _numbered(group, n_groups * n_labels)
    del at
    return orders.Balance(units, group, config.balance_max_repeats, config.seed)


def _numbered(group: np.ndarray, n: int) -> tuple[np.ndarray, int]:
    """Numbers below n as numbers without gaps in the same order, and how many there are."""
    if n > 1 << 26:  # a table of 64 million numbers would take more than sorting
        present, group = np.unique(group, return_inverse=True)
        return group.astype(np.uint32), len(present)
    present = np.zeros(n, bool)
    present[group] = True
    return (np.cumsum(present, dtype=np.uint32) - np.uint32(1))[group], int(present.sum())


def _release(feed: Feed, own: ShardSet | None) -> None:
    if own:
        own.close()  # first, so that a waiting read gives up. What is being read stays open until it is
    feed.close()
