"""Atlas to shard set: plan, read and scatter, gather into tars, write the manifest. README.md specifies the result.

Every stage is a list of units. A unit that left its marker in the work folder is done. So the same command resumes
where a killed one stopped, and the tasks of an array job share a stage's units. The stages must follow one another. A
task stops where another's share of a stage is undone, and `finish` does whatever is left.

Reading order: write_shards (the story), stages and workers, choose_genes, make_layout, finish_set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.convert.config import ShardsWriteConfig
from data_pipeline.convert.genes import JoinedGenes, choose
from data_pipeline.convert.plan import Plan, differences, make_plan, settings_of
from data_pipeline.convert.source import SourceSpec
from data_pipeline.convert.stages import STAGES, ChosenGenes, Layout, Worker, deliver, delivered_bytes
from data_pipeline.convert.variable_genes import CELLS, clip_values, top_genes
from data_pipeline.format import schema
from data_pipeline.format.statistics import compute_statistics
from data_pipeline.stores import check_bucket, file_system, local_folder, store_explained
from scldm.errors import InputError
from scldm.files import disk_explained, left_aside, locked, of_bytes, write_bytes, written_aside
from scldm.given_json import known_of
from scldm.progress import Progress

DISK_BYTES_PER_COUNT = 2.1  # of the runs, before they have become tars
WORK_FILES = {*STAGES, "plan", "csc", "runs", "tars", "index", "genes.json", "clip_at.npy", "layout.json", "kept.npy"}
LOCK = re.compile(r"lock(\.\d+-of-\d+)?")  # beside them


def write_shards(config: ShardsWriteConfig) -> schema.Manifest | None:
    """Write the shard set of a config, or go on with it. Returns its manifest, or None where tasks' shares are undone.

    Raises: InputError for what is wrong with sources or settings, or where `out` holds another command's set.
    """
    _ = config.process_bytes
    with disk_explained(config.out):
        finished = finished_set(config)
        if finished:
            _remove_work(config)
            print(f"{config.out}: is complete, with {finished.n_cells:,} cells")
            return finished
        check_bucket(config.out)
        work = work_folder(config)
        if strange := _strangers(work):
            raise InputError(f"{work}: holds other files, such as {strange[0]}. Name another place with work=FOLDER")
    with disk_explained(str(work)), ExitStack() as locks:
        work.mkdir(parents=True, exist_ok=True)
        index, n_tasks = config.share
        busy = f"{config.out}: another process is writing this set. Wait for it, or end it"
        as_task = bool(config.task) and not config.finish
        locks.enter_context(locked(work / "lock", busy, shared=as_task))
        if as_task:
            busy = f"{config.out}: another process is doing task={config.task}. Wait for it, or end it"
            locks.enter_context(locked(work / f"lock.{index}-of-{n_tasks}", busy))
        locks.callback(_remove_if_unused, work)
        if not (work / "plan").is_dir():
            _refuse_what_lies_without_a_plan(config)
        plan = make_plan(config, work / "plan")
        _say_what_it_takes(plan, work)

        n_groups = sum(map(len, plan.csc_groups))
        n_columns = sum(high - low for groups in plan.csc_groups for low, high in groups)
        if n_groups and not run_stage(config, "transpose", n_groups, n_columns, "columns"):
            return None
        if not choose_genes(config, plan, work):
            return None
        if not run_stage(config, "scatter", len(plan.units), plan.n_cells, "cells"):
            return None
        layout = make_layout(plan, work)
        _forget_undelivered(config, work, layout)
        if not run_stage(config, "gather", len(layout.shards), len(layout.kept), "cells"):
            return None
        if config.task and not config.finish:
            print(f"{config.out}: every task's share is done. The same command with --finish writes the manifest")
            return None
        manifest = finish_set(config, plan, layout, work)
        _remove_work(config)
    return manifest


def work_folder(config: ShardsWriteConfig) -> Path:
    """Where unfinished work lies: a folder of this set alone, since it is removed in the end.

    Raises: InputError for a URL without `work`.
    """
    folder = local_folder(config.out)
    if config.work:
        name = str(folder) if folder is not None else config.out.rstrip("/")
        return Path(config.work) / f".scldm-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    if folder is None:
        raise InputError(f"work must name a local folder for unfinished work, as out={config.out} is elsewhere")
    return folder / ".work"


def _strangers(work: Path) -> list[str]:
    """What lies in a work folder and was not written by write_shards."""
    if not work.is_dir():
        return []
    ours = WORK_FILES | {path.name for path in left_aside(work)}
    return sorted(p.name for p in work.iterdir() if p.name not in ours and not LOCK.fullmatch(p.name))


def _remove_if_unused(work: Path) -> None:
    """A work folder in which nothing but locks was ever made: the command was refused."""
    if work.is_dir() and all(LOCK.fullmatch(path.name) for path in work.iterdir()):
        shutil.rmtree(work, ignore_errors=True)


def _refuse_what_lies_without_a_plan(config: ShardsWriteConfig) -> None:
    """Raises: InputError where `out` has shards of unfinished work that is gone: they would pass for this command's."""
    fs, root = file_system(config.out)
    with store_explained(config.out):
        there = [name for name in ("shards", "index") if fs.exists(f"{root.rstrip('/')}/{name}")]
    if there:
        raise InputError(
            f"out={config.out}: holds {' and '.join(there)} of unfinished work that is gone. Remove them, or give "
            "another out"
        )


def _remove_work(config: ShardsWriteConfig) -> None:
    """Of a finished set. Also what an interrupted removal left."""
    if config.work or local_folder(config.out) is not None:
        work = work_folder(config)
        if not _strangers(work):
            shutil.rmtree(work, ignore_errors=True)  # another task may be removing it too


def finished_set(config: ShardsWriteConfig) -> schema.Manifest | None:
    """The set at `out`, if it is this command's.

    Raises: InputError where a set of another command lies there.
    """
    if delivered_bytes(config.out, schema.MANIFEST) is None:
        folder = local_folder(config.out)
        there = sorted(p.name for p in folder.iterdir()) if folder is not None and folder.is_dir() else []
        ours = ["shards", "index", ".work"]
        if config.work and folder is not None and Path(config.work).resolve() == folder.resolve():
            ours.append(work_folder(config).name)
        strange = [name for name in there if name not in ours]
        if strange:
            raise InputError(f"out={config.out}: holds other files, such as {strange[0]}. Give an empty folder")
        return None
    manifest = schema.read_manifest(config.out)
    differ = differences(manifest.query, settings_of(config))
    if differ:
        raise InputError(f"out={config.out}: holds the set of another command: {'; '.join(differ)}. Give another out")
    for k, entry in enumerate(manifest.sources):
        source = known_of(SourceSpec, entry, f"{config.out}/{schema.MANIFEST}: sources[{k}]")
        if source.has_changed:
            raise InputError(f"out={config.out}: {source.uri} has changed since this set was written. Give another out")
    return manifest


def _say_what_it_takes(plan: Plan, work: Path) -> None:
    """Raises: InputError where the disk can't hold the runs."""
    taken = sum(f.stat().st_size for f in (work / "runs").glob("*")) if (work / "runs").is_dir() else 0
    stored = sum(plan.sources[s].mean_nonzeros * (high - low) for s, low, high in plan.units)
    csc = sum(12 * s.mean_nonzeros * s.n_rows for s, groups in zip(plan.sources, plan.csc_groups) if groups)
    need, free = int(DISK_BYTES_PER_COUNT * stored + csc) - taken, shutil.disk_usage(work).free
    if need > free and not (work / "layout.json").exists():
        raise InputError(
            f"{work}: no space left: about {of_bytes(need)} are needed for unfinished work, {of_bytes(free)} are free. "
            "Name another place with work=FOLDER"
        )


def _forget_undelivered(config: ShardsWriteConfig, work: Path, layout: Layout) -> None:
    """Tars that were noted as done and are not there are done again."""
    for number, shard in enumerate(layout.shards):
        marker = work / "gather" / f"{number:05d}.npz"
        if marker.exists():
            with np.load(marker) as done:
                n_bytes = int(done["bytes"])
            if delivered_bytes(config.out, shard.path) != n_bytes:
                marker.unlink()


# --- stages and workers --------------------------------------------------------------------------------------------


def run_stage(config: ShardsWriteConfig, stage: str, n_units: int, total: int, unit_name: str) -> bool:
    """Do this process's share of a stage's units that are not done. True where all units of the stage are done."""
    work = work_folder(config)
    index, n_tasks = config.share

    def undone() -> list[int]:
        return [u for u in range(n_units) if not (work / stage / f"{u:05d}.npz").exists()]

    mine = [u for u in undone() if config.finish or u % n_tasks == index]
    with Progress(stage, max(round(total * len(mine) / max(n_units, 1)), 1), unit_name, shown=bool(mine)) as bar:
        with _workers(config, bar) as do_all:
            do_all(stage, mine)
        bar.advance(bar.total - bar.done)
    rest = undone()
    if rest and not (config.task or config.finish):
        raise AssertionError(f"{stage}: units {rest[:5]} left no marker")
    if rest:
        print(
            f"{stage}: this task's share is done. {len(rest)} of {n_units} units belong to other tasks. When those are "
            "done, run the tasks again, or one command with --finish"
        )
    return not rest


@contextmanager
def _workers(config: ShardsWriteConfig, bar: Progress) -> Iterator[Any]:
    """Yields a function that does a list of units, here or in worker processes."""
    work, arguments = work_folder(config), (str(work_folder(config)), config.out, config.process_bytes)

    def here(stage: str, units: list[int]) -> None:
        def tick(n: int) -> None:
            bar.advance(min(n, bar.total - bar.done))

        with closing(Worker(work, config.out, config.process_bytes, tick)) as worker:
            for unit in units:
                worker.do(stage, unit)

    def in_pool(stage: str, units: list[int]) -> None:
        if not units:
            return
        # spawned, not forked: TileDB and HDF5 have threads and locks that don't survive a fork
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        n_workers = min(config.workers, len(units))
        pool = ProcessPoolExecutor(n_workers, context, _start_worker, (*arguments, counter, os.getpid()))
        try:
            undone = {pool.submit(_do_unit, (stage, u)) for u in units}
            while undone:
                done, undone = wait(undone, 0.5, FIRST_COMPLETED)
                for unit in done:
                    unit.result()
                # without its lock, which a killed worker may have taken along
                bar.advance(min(counter.get_obj().value, bar.total) - bar.done)
        except BrokenProcessPool:
            raise InputError(
                f"{stage}: a worker process died (killed? out of memory?). Run the same command again to go on, with "
                f"fewer workers than {config.workers} or less memory than {config.memory}"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    yield here if config.workers == 1 else in_pool


_worker: Worker


def _start_worker(work: str, out: str, process_bytes: int, counter: Any, parent: int) -> None:
    global _worker  # a pool's initializer has no other way to leave something for its tasks

    def tick(n: int) -> None:
        with counter.get_lock():
            counter.value += n

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed: nobody waits for this process any more

    threading.Thread(target=watch, daemon=True).start()
    _worker = Worker(Path(work), out, process_bytes, tick)


def _do_unit(task: tuple[str, int]) -> None:
    _worker.do(*task)


# --- between the stages --------------------------------------------------------------------------------------------


def choose_genes(config: ShardsWriteConfig, plan: Plan, work: Path) -> bool:
    """Writes genes.json, the set's vocabulary, after a scan where genes are chosen by counts. False: undone."""
    if (work / "genes.json").exists():
        return True
    keep = np.ones(plan.genes.n_genes, bool)
    dropped: dict[str, int] = {}
    if config.filter.min_cells or config.filter.n_top_genes:
        if not run_stage(config, "scan", len(plan.units), plan.n_cells, "cells"):
            return False
        sums, n_cells = _summed(work / "scan", len(plan.units))
        keep = sums[CELLS] >= config.filter.min_cells
        if not keep.any():
            raise InputError(f"filter.min_cells={config.filter.min_cells}: no gene is expressed by so many cells")
        dropped["filter.min_cells"] = int((~keep).sum())
        if 0 < config.filter.n_top_genes < keep.sum():
            clip_at = np.full(len(keep), np.inf)
            clip_at[keep] = clip_values(sums[:, keep], n_cells)
            with written_aside(work / "clip_at.npy") as file:
                np.save(file, clip_at)
            if not run_stage(config, "clip", len(plan.units), plan.n_cells, "cells"):
                return False
            clipped, _ = _summed(work / "clip", len(plan.units))
            top = top_genes(sums[:, keep], clipped[:, keep], clip_at[keep], n_cells, config.filter.n_top_genes)
            dropped["filter.n_top_genes"] = int((~top).sum())
            keep[np.flatnonzero(keep)[~top]] = False
    chosen = choose(JoinedGenes(plan.genes, (np.arange(len(keep), dtype=np.int32),), {}), keep, "filter")
    ChosenGenes(chosen.vocab, chosen.column_of[0].tolist(), dropped).save(work)
    return True


def _summed(folder: Path, n_units: int) -> tuple[np.ndarray, int]:
    sums, n_cells = np.zeros((), np.int64), 0
    for unit in range(n_units):
        with np.load(folder / f"{unit:05d}.npz") as part:
            sums, n_cells = sums + part["sums"], n_cells + int(part["n_cells"])
    return sums, n_cells


def _scattered(plan: Plan, work: Path, name: str) -> Iterator[np.ndarray]:
    """What each unit noted under a name."""
    for unit in range(len(plan.units)):
        with np.load(work / "scatter" / f"{unit:05d}.npz") as part:
            yield part[name]


def make_layout(plan: Plan, work: Path) -> Layout:
    """Which cells are in which tar. It is the same whoever computes it."""
    if (work / "layout.json").exists():
        return Layout.load(work)
    n_expressed = np.concatenate(list(_scattered(plan, work, "n_expressed")))
    in_order = np.asarray(plan.cell_at)
    kept = np.flatnonzero(n_expressed[in_order] > 0)
    if not len(kept):
        raise InputError(
            f"no cell is left by filter.min_genes={plan.settings['filter']['min_genes']} and the genes chosen"
        )
    splits = np.asarray(plan.split)[in_order[kept]]
    if not (splits == 0).any():
        raise InputError("the filters leave no cell for training")
    per_block, per_shard = plan.settings["block_cells"], plan.settings["shard_cells"]
    shards: list[schema.ShardEntry] = []
    first_cell = first_block = 0
    for number, name in enumerate(plan.splits):
        n = int((splits == number).sum())
        for k, start in enumerate(range(0, n, per_shard)):
            n_cells = min(per_shard, n - start)
            n_blocks = -(-n_cells // per_block)
            shards.append(
                schema.ShardEntry(schema.shard_name(name, k), number, n_cells, first_cell, n_blocks, first_block, 0, "")
            )
            first_block += n_blocks
            first_cell += n_cells
    n_runs = tuple(int(n) for n in _scattered(plan, work, "n_runs"))
    cell_bytes = 2 * float(n_expressed.mean(dtype=np.float64)) + 32
    Layout(tuple(shards), n_runs, cell_bytes, kept).save(work)
    return Layout.load(work)


# --- finish --------------------------------------------------------------------------------------------------------


def finish_set(config: ShardsWriteConfig, plan: Plan, layout: Layout, work: Path) -> schema.Manifest:
    """Index and manifest, the manifest last."""
    shards, blocks = _gathered(layout, work)
    index = _Index(config.out, work / "index")
    index.write(schema.BLOCK_INDEX_PATH, blocks)
    cell = np.asarray(plan.cell_at)[layout.kept]
    columns: dict[str, np.ndarray] = {"source": plan.source[cell], "row": np.asarray(plan.row)[cell]}
    for name in ("total_counts", "n_expressed"):
        columns[name] = np.concatenate(list(_scattered(plan, work, name)))[cell]
    for name, dtype in schema.CELL_COLUMNS.items():
        index.write(schema.cell_column_path(name), columns[name].astype(dtype))
    conditions = {name: np.asarray(ids)[cell] for name, ids in zip(plan.conditions.names, plan.condition_ids)}
    for name, ids in conditions.items():
        index.write(schema.cell_column_path(f"condition.{name}"), ids)

    split = np.asarray(plan.split)[cell]
    n_train = int((split == 0).sum())
    gene_total = sum(_scattered(plan, work, "gene_total"), np.zeros((), np.int64))
    gene_cells = sum(_scattered(plan, work, "gene_cells"), np.zeros((), np.int64))
    gene_columns = {"mean": gene_total / n_train, "fraction_expressed": gene_cells / n_train}
    for name, dtype in schema.GENE_COLUMNS.items():
        index.write(schema.gene_column_path(name), gene_columns[name].astype(dtype))

    largest = max(int(n) for n in _scattered(plan, work, "largest_count"))
    manifest = schema.Manifest(
        kind="cells",
        n_cells=len(cell),
        genes=Worker(work, config.out, 0, lambda n: None).chosen[0],
        conditions=plan.conditions,
        splits=tuple(_split_entry(name, [s for s in shards if s.split == k]) for k, name in enumerate(plan.splits)),
        split_rule=plan.split_rule,
        shards=tuple(shards),
        index=tuple(index.files),
        block_cells=plan.settings["block_cells"],
        codec=plan.settings["codec"],
        codec_level=plan.settings["codec_level"],
        seed=plan.settings["seed"],
        sources=tuple(
            {**s.to_json(), "n_cells": int((columns["source"] == k).sum())} for k, s in enumerate(plan.sources)
        ),
        query=plan.settings,
        report=_report(plan, work, len(cell)),
        tools=plan.tools,
        statistics=compute_statistics(
            split, len(plan.splits), conditions, columns["total_counts"], columns["n_expressed"], largest
        ),
    )
    index.deliver(schema.MANIFEST, manifest.file())
    return manifest


class _Index:
    """Files of the set beside its tars. `files` are those that the manifest names."""

    def __init__(self, out: str, folder: Path) -> None:
        self.out, self.folder, self.files = out, folder, list[schema.FileEntry]()
        folder.mkdir(exist_ok=True)

    def write(self, path: str, array: np.ndarray) -> None:
        entry, data = schema.array_file(path, array)
        self.files.append(entry)
        self.deliver(path, data)

    def deliver(self, path: str, data: bytes | memoryview) -> None:
        local = self.folder / Path(path).name
        write_bytes(local, data)
        deliver(local, self.out, path)


def _gathered(layout: Layout, work: Path) -> tuple[list[schema.ShardEntry], np.ndarray]:
    """The tars as they were written, and the records of all blocks."""
    shards, blocks = [], []
    for number, shard in enumerate(layout.shards):
        with np.load(work / "gather" / f"{number:05d}.npz") as done:
            blocks.append(done["blocks"])
            shards.append(dataclasses.replace(shard, bytes=int(done["bytes"]), sha256=done["sha256"].tobytes().hex()))
    return shards, np.concatenate(blocks)


def _split_entry(name: str, shards: list[schema.ShardEntry]) -> schema.SplitEntry:
    n_cells, n_blocks = sum(s.n_cells for s in shards), sum(s.n_blocks for s in shards)
    first_cell, first_block = (shards[0].first_cell, shards[0].first_block) if shards else (0, 0)
    return schema.SplitEntry(name, n_cells, first_cell, n_blocks, first_block)


def _report(plan: Plan, work: Path, n_cells: int) -> dict[str, Any]:
    """What was left out and why, with what was found since the plan was made."""
    too_few = sum(int(n) for n in _scattered(plan, work, "too_few_genes"))
    return {
        **plan.report,
        "genes": {**plan.report.get("genes", {}), **ChosenGenes.load(work).dropped},
        "cells_with_too_few_genes": too_few,
        "cells_without_counts_of_the_chosen_genes": plan.n_cells - n_cells - too_few,
    }
