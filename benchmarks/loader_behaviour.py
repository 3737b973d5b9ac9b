"""How the stream behaves: memory, resume, mixing, and start-up and order at 100 million cells.

Reading order: memory and resume (in processes of their own), mixing, scale.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shards as bench_shards
from benchmarks.loader_cells import BenchLoaderConfig, loader_of
from benchmarks.report import Report, Row, median
from data_pipeline.format import schema
from data_pipeline.format.read_shards import manifest_hash
from data_pipeline.format.schema import FileEntry, ShardEntry, SplitEntry
from data_pipeline.format.statistics import compute_statistics
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader, LoaderConfig
from data_pipeline.stream.order import Balance, Units, rank_slice
from scldm.errors import InputError
from scldm.files import made_aside
from scldm.given_json import sealed
from scldm.vocab import ConditionVocab, GeneVocab


def in_a_process(task: str, config: BenchLoaderConfig) -> dict[str, Any]:
    """What TASKS[task] found in a fresh process."""
    here = "import json; from benchmarks.loader_behaviour import TASKS, BenchLoaderConfig; "
    here += f"config = {asdict(config)!r}; print(json.dumps(TASKS[{task!r}](BenchLoaderConfig(**config))))"
    done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"benchmarks.loader, {task}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def resident_mb() -> float:
    return bench_shards.resident_bytes(os.getpid()) / 1e6


def memory_task(config: BenchLoaderConfig, micro_batches: int = 1, epochs: int = 20) -> dict[str, Any]:
    """Resident MB after import, and after each epoch."""
    after_import = resident_mb()
    found = []
    with loader_of(config, micro_batches=micro_batches) as loader:
        for _ in range(epochs):
            for _ in range(loader.steps_per_epoch):
                next(loader)
            found.append(resident_mb())
    return {"after_import": after_import, "epochs": found}


def memory(config: BenchLoaderConfig, report: Report) -> None:
    found = in_a_process("memory", config)
    epochs = found["epochs"]
    report.add(Row("resident after import", found["after_import"], "MB"))
    report.add(Row.at_most("resident over import, most of 20 epochs", max(epochs) - found["after_import"], "MB", 250))
    report.add(Row.at_most("growth from epoch 2 to 20", max(epochs[-3:]) - max(epochs[1:4]), "MB", 5))
    found = in_a_process("memory of a large step", config)
    most = max(found["epochs"]) - found["after_import"]
    report.add(Row.at_most(f"resident over import, {8 * config.batch:,} cells a step on one rank", most, "MB", 250))


def resume_task(config: BenchLoaderConfig) -> dict[str, Any]:
    """Seconds from a state to the batch after it, in a process that has read nothing yet."""
    with loader_of(config) as loader:
        state = loader.state()
        state["step"] = loader.steps_per_epoch // 2 + 3
    start = time.perf_counter()
    with loader_of(config) as loader:
        loader.load_state(state)
        next(loader)
        return {"seconds": time.perf_counter() - start}


def resume(config: BenchLoaderConfig, report: Report) -> None:
    seconds = median([in_a_process("resume", config)["seconds"] for _ in range(min(config.rounds, 5))])
    report.add(Row.at_most("first batch after a resume", seconds, "s", 1.0))


# --- mixing ----------------------------------------------------------------------------------------------------------


def mixing(config: BenchLoaderConfig, report: Report) -> None:
    """Entropy within a batch of where a cell stood in its source: 20 data sets one after the other, each of 10 types in
    stretches, as in a Census. Against the same labels drawn at random."""
    with loader_of(config, "none") as loader:
        rows = np.stack([next(loader)[0].cell_ids_B2[:, 1].numpy() for _ in range(loader.steps_per_epoch - 1)])
    rng = np.random.default_rng(0)
    for name, n_labels, label in (("data set", 20, lambda r: r * 20 // config.cells),
                                  ("cell type", 10, lambda r: r * 200 // config.cells % 10)):  # fmt: skip
        ours = _entropy(label(rows), n_labels)
        drawn = _entropy(label(rng.permutation(config.cells)[: rows.size].reshape(rows.shape)), n_labels)
        report.add(Row(f"entropy of {name} in a batch (random: {drawn:.4f})", ours, "bits"))
        report.add(Row.at_least(f"entropy of {name} / random", ours / drawn, "x", 0.99))


def _entropy(labels: np.ndarray, n_labels: int) -> float:
    """Mean over batches, in bits."""
    share = np.stack([(labels == k).mean(1) for k in range(n_labels)])
    return float(-(share * np.log2(np.maximum(share, 1e-12))).sum(0).mean())


# --- scale -----------------------------------------------------------------------------------------------------------


def write_index(folder: Path, n_cells: int) -> None:
    """A shard set's manifest and block index without its data."""
    (folder / "shards").mkdir(parents=True)
    (folder / "index").mkdir()
    n_blocks = -(-n_cells // schema.BLOCK_CELLS)
    per_shard = 65_536 // schema.BLOCK_CELLS
    blocks = np.zeros(n_blocks, schema.BLOCK_INDEX)
    number = np.arange(n_blocks)
    blocks["shard"], blocks["offset"], blocks["length"] = number // per_shard, number % per_shard * 430_080, 430_000
    blocks["first_cell"] = number * schema.BLOCK_CELLS
    blocks["n_cells"] = np.minimum(schema.BLOCK_CELLS, n_cells - blocks["first_cell"].astype(np.int64))
    np.save(folder / schema.BLOCK_INDEX_PATH, blocks)
    shards = []
    for k, first in enumerate(range(0, n_blocks, per_shard)):
        mine = blocks[first : first + per_shard]
        path = schema.shard_name("train", k)
        (folder / path).touch()
        first_cell = int(mine["first_cell"][0])
        shards.append(
            ShardEntry(
                path, 0, int(mine["n_cells"].sum(dtype=np.int64)), first_cell, len(mine), first,
                len(mine) * 430_080, "0" * 64,
            )
        )  # fmt: skip
    one = np.ones(1, np.int64)
    statistics = compute_statistics(0 * one, 1, {}, one, one, 1)
    statistics = replace(statistics, combinations=replace(statistics.combinations, n=((n_cells,),)))
    manifest = schema.Manifest(
        "cells", n_cells, GeneVocab(tuple(f"GENE{k}" for k in range(60_000)), "symbol"), ConditionVocab({}),
        (SplitEntry("train", n_cells, 0, n_blocks, 0),), {}, tuple(shards),
        (), schema.BLOCK_CELLS, "zstd", 1, 0, (), {}, {}, {}, statistics,
    )  # fmt: skip
    # of the index only that of blocks is there: nothing else is read before a block
    sha256 = hashlib.sha256((folder / schema.BLOCK_INDEX_PATH).read_bytes()).hexdigest()
    files = [FileEntry(path, 0, sha256) for path in schema.index_kinds(manifest)]
    files[0] = replace(files[0], bytes=(folder / schema.BLOCK_INDEX_PATH).stat().st_size)
    manifest = replace(manifest, index=tuple(files))
    (folder / schema.MANIFEST).write_text(json.dumps(sealed(manifest.to_json())))


def scale_task(config: BenchLoaderConfig) -> dict[str, Any]:
    """Start-up of one rank of each world size, and the two guarantees of the order, on a real index."""
    folder = Path(config.folder) / f"index-{config.scale_cells}"
    batch, micro = 8_192, 8
    base = resident_mb()
    sets = GeneSetConfig("random", 2_048, micro)
    given = LoaderConfig(str(folder), seed=1, given=sets)
    found: dict[str, Any] = {"start": {}, "resident": {}, "files": 0, "same": True}
    rng = np.random.default_rng(0)
    whole = CellLoader(given, global_batch=batch, micro_batch=micro).order
    sampled = [int(s) for s in rng.integers(0, 2 * whole.steps_per_epoch, 6)]
    expected = {
        s: whole.epoch(s // whole.steps_per_epoch).plan(s % whole.steps_per_epoch, 1, 0, batch) for s in sampled
    }
    expected_hash = manifest_hash(schema.read_manifest(str(folder)))
    for world in (1, 8, 64, 1_024):
        for rank in sorted({0, world // 2, world - 1}):
            start = time.perf_counter()
            loader = CellLoader(given, rank=rank, world_size=world, global_batch=batch, micro_batch=micro)
            loader.seek(loader.steps_per_epoch * 3 // 2)
            plan = next(loader.feed.plans_from(loader.step))
            found["start"].setdefault(world, []).append(time.perf_counter() - start)
            found["resident"][world] = max(found["resident"].get(world, 0), resident_mb() - base)
            found["files"] = max(found["files"], len(os.listdir("/proc/self/fd")))
            low, high = rank_slice(rank, world, batch, micro)
            found["same"] &= len(plan.block) == high - low and loader.cells.hash == expected_hash
            for s in sampled:
                epoch, t = divmod(s, loader.steps_per_epoch)
                for a, b in zip(loader.order.epoch(epoch).plan(t, 1, low, high), expected[s]):
                    found["same"] &= np.array_equal(a[0], b[0, low:high])
            loader.close()
    # guarantee 1, over the ranks of a world of 64, each of which plans its own positions alone
    seen = np.zeros(config.scale_cells, np.uint8)
    start = time.perf_counter()
    order = whole.epoch(1)
    for rank in range(64):
        low, high = rank_slice(rank, 64, batch, micro)
        for t in range(0, order.steps, 1024):
            n = min(1024, order.steps - t)
            block, row = order.plan(t, n, low, high)
            real = (t + np.arange(n))[:, None] * batch + np.arange(low, high) < config.scale_cells
            seen[(block * schema.BLOCK_CELLS + row)[real]] += 1  # a cell met twice by a rank would leave another unmet
    found["once"] = bool((seen == 1).all())
    found["plan_seconds"] = time.perf_counter() - start
    return found


def balance_task(config: BenchLoaderConfig) -> dict[str, Any]:
    """Peak memory and time of drawing a balanced epoch of 1,000 groups, the largest 1,000 times the smallest."""
    before = resident_mb()
    n_blocks = -(-config.scale_cells // schema.BLOCK_CELLS)
    units = Units.whole(np.arange(n_blocks, dtype=np.int32), np.full(n_blocks, schema.BLOCK_CELLS))
    share = np.geomspace(1, 1_000, 1_000)
    group = np.random.default_rng(0).choice(1_000, units.n_cells // 100, p=share / share.sum()).astype(np.uint32)
    population = Balance(units, np.resize(group, units.n_cells), 10, 0)
    start = time.perf_counter()
    n_cells = population.units(1).n_cells
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024 / 1e6
    return {"peak_mb": peak_mb - before, "seconds": time.perf_counter() - start, "n_cells": n_cells}


def scale(config: BenchLoaderConfig, report: Report) -> None:
    folder = Path(config.folder) / f"index-{config.scale_cells}"
    if not folder.exists():
        with made_aside(folder) as part:
            write_index(part, config.scale_cells)
    found = in_a_process("scale", config)
    name = f"{config.scale_cells:,} cells"
    for world, seconds in found["start"].items():
        report.add(Row(f"{name}, {world} ranks: start to first plan", max(seconds), "s"))
        report.add(Row(f"{name}, {world} ranks: resident over import", found["resident"][world], "MB"))
    report.add(Row(f"{name}: open files before the first block is read", found["files"], ""))
    for text, held in (("sampled ranks of 1 to 1,024 plan the same global batches", found["same"]),
                       ("every cell once over 64 ranks", found["once"])):  # fmt: skip
        report.add(Row(f"{name}: {text}", float(held), "", "== 1", held))
    report.add(Row("plan of an epoch", found["plan_seconds"] / config.scale_cells * 1e9, "ns/cell"))
    found = in_a_process("balance", config)
    report.add(Row(f"{name}, balanced over 1,000 groups: most resident over import", found["peak_mb"], "MB"))
    report.add(Row(f"{name}, balanced over 1,000 groups: drawing an epoch", found["seconds"], "s"))


TASKS: dict[str, Callable[[BenchLoaderConfig], dict[str, Any]]] = {
    "memory": memory_task,
    "memory of a large step": lambda config: memory_task(config, micro_batches=8, epochs=5),
    "resume": resume_task,
    "scale": scale_task,
    "balance": balance_task,
}
