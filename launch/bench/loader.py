"""`scldm bench loader`: what the stream costs beside a memory-mapped matrix and other loaders, and how it behaves.

Rates are cells per CPU-second of this process, all its threads: wall time says little on a shared machine. Readers take
turns, so that a busy machine slows all of them; a ratio is the median over rounds of the ratios within a round. The
stream makes its batches in the consumer's thread, as the memory-mapped control does, but where a row says otherwise.

Reading order: BenchLoaderConfig, the data, speed, costs (where the time goes), memory, resume, mixing, scale, main.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import schema
from data_pipeline.block import decode_block, encode_block, narrow
from data_pipeline.gather import CellSlots
from data_pipeline.gene_sets import GeneSetConfig, GeneSets
from data_pipeline.loader import CellLoader, LoaderConfig
from data_pipeline.order import Balance, EveryCell, Order, Units, rank_slice
from data_pipeline.plan import ShardsWriteConfig
from data_pipeline.read_shards import ShardSet, manifest_hash
from data_pipeline.schema import FileEntry, ShardEntry, SplitEntry
from data_pipeline.sources import SourceConfig
from data_pipeline.splits import SplitConfig
from data_pipeline.statistics import compute_statistics
from data_pipeline.write_shards import write_shards
from launch.bench import loader_controls as controls
from launch.bench import shards as bench_shards
from launch.bench.report import Report, Row, median
from launch.bench.shards import BenchShardsConfig
from launch.cli import run_verb
from scldm.errors import InputError
from scldm.vocab import ConditionVocab, GeneVocab

PURPOSE = """Measure the stream of minibatches: cells per CPU-second beside a memory-mapped matrix and other loaders,
where the time goes, memory, resume, mixing, and start-up and order at 100 million cells."""
EXAMPLE = """scldm bench loader folder=bench-data
scldm bench loader folder=bench-data parts=[speed,costs] controls=[mmap] rounds=5
pip install scldm[bench] brings the other packages' loaders"""

PARTS = ("speed", "costs", "memory", "resume", "mixing", "scale")
CONTROLS = ("mmap", "soma", "scdataset", "webdataset")


@dataclass(frozen=True)
class BenchLoaderConfig:
    """What to measure.

    folder: for the synthetic cells in every format (about 4 GB at 100,000 cells); what is there is used again
    cells: synthetic cells
    genes: synthetic genes
    expressed: genes with a count, per cell
    batch: cells of a batch
    n_genes: random genes of a batch
    rounds: of every reader
    parts: of the benchmark: speed, costs, memory, resume, mixing, scale
    controls: mmap, soma (tiledbsoma-ml), scdataset, webdataset (a sample a cell)
    scale_cells: cells of the synthetic index
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    folder: str = "???"
    cells: int = 100_000
    genes: int = 20_000
    expressed: int = 1_763
    batch: int = 128
    n_genes: int = 2_048
    rounds: int = 12
    parts: tuple[str, ...] = PARTS
    controls: tuple[str, ...] = CONTROLS
    scale_cells: int = 100_000_000
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        for key, known in (("parts", PARTS), ("controls", CONTROLS)):
            unknown = [name for name in getattr(self, key) if name not in known]
            if unknown:
                raise InputError(f"{key}={unknown[0]!r} is unknown; there are {', '.join(known)}")


CONFIG = BenchLoaderConfig


# --- the data ------------------------------------------------------------------------------------------------------


def prepare(config: BenchLoaderConfig, folder: Path) -> None:
    """The same cells in every format that the chosen parts read."""
    folder.mkdir(parents=True, exist_ok=True)
    atlas = BenchShardsConfig(cells=config.cells, genes=config.genes, expressed=config.expressed)
    bench_shards.keep_to_one_atlas(folder, config.cells, config.genes, config.expressed)

    def once(name: str, write: Callable[[Path], Any]) -> None:
        if not (folder / name).exists():
            shutil.rmtree(folder / "part", ignore_errors=True)
            write(folder / "part")
            (folder / "part").rename(folder / name)

    once("atlas.h5ad", lambda path: bench_shards.write_h5ad(path, atlas))
    for codec in schema.CODECS:
        # write_shards goes on by itself, and needs the name it will have
        write_shards(_set_of(folder, codec))
    if "mmap" in config.controls:
        once("mmap", lambda path: controls.write_mmap(folder / "shards-none", path))
    if "soma" in config.controls:
        once("atlas-soma", lambda path: bench_shards.write_soma(path, atlas))
    if "webdataset" in config.controls:
        once("samples", lambda path: controls.write_samples(folder / "shards-none", path))
    (folder / "n_genes").write_text(str(config.genes))


def _set_of(folder: Path, codec: schema.Codec) -> ShardsWriteConfig:
    return ShardsWriteConfig(
        out=str(folder / f"shards-{codec}"),
        source=SourceConfig(paths=(str(folder / "atlas.h5ad"),)),
        conditions=("cell_type",),
        split=SplitConfig(0.0, 0.0),
        codec=codec,
    )


def loader_of(config: BenchLoaderConfig, codec: str = "zstd", **changes: Any) -> CellLoader:
    sets = GeneSetConfig("random", config.n_genes, config.batch)
    given = LoaderConfig(str(Path(config.folder) / f"shards-{codec}"), seed=1, given=sets)
    return CellLoader(replace(given, **changes), global_batch=config.batch, micro_batch=config.batch)


def batches_of(loader: CellLoader) -> Iterator[int]:
    for micro_batches in loader:
        yield sum(map(len, micro_batches))


# --- speed ---------------------------------------------------------------------------------------------------------

# cells of a round: a few tenths of a CPU-second, or a whole read of those that read far ahead
OUR_ROUND_CELLS = 60_000
ROUND_CELLS = {"soma": controls.SOMA_IO_BATCH, "scdataset": 128 * controls.SCDATASET_FETCH, "webdataset": 2_048}


def speed(config: BenchLoaderConfig, report: Report) -> None:
    folder = Path(config.folder)
    one_set_a_cell = GeneSetConfig("random", config.n_genes)
    readers: dict[str, Iterator[int]] = {
        "no codec": batches_of(loader_of(config, "none", prefetch=0)),
        "lz4": batches_of(loader_of(config, "lz4", prefetch=0)),
        "zstd-1": batches_of(loader_of(config, "zstd", prefetch=0)),
        "zstd-1, made ahead in a thread": batches_of(loader_of(config, "zstd")),
        "no codec, compact": batches_of(loader_of(config, "none", form="compact", prefetch=0)),
        "zstd-1, compact": batches_of(loader_of(config, "zstd", form="compact", prefetch=0)),
        "zstd-1, a set per cell": batches_of(loader_of(config, "zstd", given=one_set_a_cell, prefetch=0)),
    }
    arguments = (folder, config.batch, config.n_genes)
    if "mmap" in config.controls:
        shards = folder / "shards-none"
        readers["mmap"] = controls.mmap_reader(shards, folder / "mmap", config.batch, config.n_genes)
    if "soma" in config.controls:
        readers["soma"] = controls.soma_reader(folder / "atlas-soma", *arguments)
    if "scdataset" in config.controls:
        readers["scdataset"] = controls.scdataset_reader(folder / "atlas.h5ad", *arguments)
    if "webdataset" in config.controls:
        readers["webdataset"] = controls.webdataset_reader(folder / "samples", *arguments)
    ours = min(OUR_ROUND_CELLS, 3 * config.cells)
    for name, reader in readers.items():  # compiled, connected, read ahead
        _rate(reader, ROUND_CELLS.get(name, ours))
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(config.rounds):
        for name, reader in readers.items():
            rates[name].append(_rate(reader, ROUND_CELLS.get(name, ours)))
    for name, values in rates.items():
        low, high = np.percentile(values, [25, 75])
        if name in ROUND_CELLS:  # a round may hold none or two of their long reads: the mean counts all
            rates[name] = [len(values) / sum(1 / rate for rate in values)] * len(values)
        report.add(Row(f"{name} (quartiles {low:,.0f} - {high:,.0f})", median(rates[name]), "cells/CPU-s"))
    if "mmap" in rates:
        report.add(Row("lz4 / mmap", median([a / b for a, b in zip(rates["lz4"], rates["mmap"])]), "x"))
    # the h5ad file and the tars of the controls are not compressed either; tiledbsoma's arrays are, by zstd
    for name, control, target in (
        ("zstd-1", "mmap", 0.5),
        ("no codec", "mmap", 0.65),
        ("zstd-1", "soma", 30),
        ("no codec", "scdataset", 8),
        ("zstd-1", "scdataset", 0),
        ("no codec", "webdataset", 40),
        ("zstd-1", "webdataset", 0),
    ):
        if control in rates:
            ratios = [a / b for a, b in zip(rates[name], rates[control])]
            text, middle = f"{name} / {control}", median(ratios)
            report.add(Row.at_least(text, middle, "x", target) if target else Row(text, middle, "x"))
            for quartile, value in zip(("lower", "upper"), np.percentile(ratios, [25, 75])):
                report.add(Row(f"{text}, {quartile} quartile", float(value), "x"))


def _rate(reader: Iterator[int], n_cells: int) -> float:
    done, start = 0, time.process_time()
    while done < n_cells:
        done += next(reader)
    return done / (time.process_time() - start)


# --- where the time goes -------------------------------------------------------------------------------------------


def costs(config: BenchLoaderConfig, report: Report) -> None:
    """CPU microseconds a cell of each part, alone; then what one core feeds to a consumer that does nothing."""
    rng = np.random.default_rng(0)
    for codec in ("none", "zstd"):
        cells = ShardSet(str(Path(config.folder) / f"shards-{codec}"))
        n = min(64, len(cells.blocks) - 1)
        slots, chosen = CellSlots(cells.manifest, n), rng.permutation(len(cells.blocks) - 1)[:n]
        buffers = [np.empty(int(cells.blocks["length"][b]), np.uint8) for b in chosen]

        def read(cells=cells, chosen=chosen, buffers=buffers) -> int:
            for block, into in zip(chosen, buffers):
                cells.fetch(int(block), into)
            return len(chosen) * cells.manifest.block_cells

        def fill(cells=cells, n=n, slots=slots, buffers=buffers) -> int:
            for slot in range(n):
                slots.fill(slot, buffers[slot], "bench")
            return n * cells.manifest.block_cells

        report.add(Row(f"{codec}: read, with CRC-32", _cost(read), "us/cell"))
        report.add(Row(f"{codec}: decompress and check", _cost(fill), "us/cell"))
        if codec == "none":
            _gather_costs(config, report, slots, rng, cells.manifest.genes.n_genes, "")
        cells.close()
    wide = _wide_slots(config)
    _gather_costs(config, report, wide, rng, 60_000, ", 60,000 genes")
    units = Units.whole(np.arange(400_000), np.full(400_000, 256))
    order = Order(EveryCell(units), 0, 32, config.batch, 2).epoch(0)
    report.add(Row("order", _cost(lambda: order.plan(1000, 256, 0, config.batch)[0].size), "us/cell"))
    for form in ("dense", "compact"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})  # before the loader starts its threads, which inherit it
        try:
            reader = batches_of(loader_of(config, "zstd", form=form))
            ours = min(OUR_ROUND_CELLS, 3 * config.cells)
            _rate(reader, ours)
            start, cpu, done = time.perf_counter(), time.process_time(), 0
            while done < 5 * ours:
                done += next(reader)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            report.add(Row(f"one core feeds, {form}", done / wall, "cells/s"))
            report.add(Row(f"one core feeds, {form}, by its CPU time", done / cpu, "cells/CPU-s"))
        finally:
            os.sched_setaffinity(0, cores)


def _wide_slots(config: BenchLoaderConfig) -> CellSlots:
    """The same cells, spread over a vocabulary of 60,000 genes: every third column."""
    cells = ShardSet(str(Path(config.folder) / "shards-none"))
    genes = GeneVocab(tuple(f"GENE{k}" for k in range(60_000)), "symbol")
    manifest = replace(cells.manifest, genes=genes)
    slots = CellSlots(manifest, min(64, len(cells.blocks) - 1))
    for slot in range(slots.n_slots):
        found = decode_block(cells.fetch(slot).data)
        spread = found.columns.astype(np.int64) * (60_000 // cells.manifest.genes.n_genes)
        data = encode_block(
            narrow(found.indptr, spread, found.counts, 60_000), split=0, n_genes=60_000,
            vocab_tag=schema.vocab_tag(genes), sources=found.sources, rows=found.rows, conditions=found.conditions,
            codec="none",
        )  # fmt: skip
        slots.fill(slot, np.frombuffer(data, np.uint8), "bench")
    cells.close()
    return slots


def _gather_costs(config: BenchLoaderConfig, report: Report, slots: CellSlots, rng, n_genes: int, note: str) -> None:
    sets = controls.gene_sets(n_genes, config.n_genes, config.batch)
    ids = sets.ids(0, 0, np.arange(config.batch))
    cells = [(rng.integers(0, slots.n_slots, config.batch), rng.integers(0, 256, config.batch)) for _ in range(64)]

    def each(gather: Callable[..., Any], *rest: Any) -> int:
        for where in cells:
            gather(*where, *rest)
        return len(cells) * config.batch

    report.add(Row(f"gather {config.n_genes:,} genes{note}", _cost(lambda: each(slots.take, ids)), "us/cell"))
    report.add(Row(f"gather compact{note}", _cost(lambda: each(slots.take_csr)), "us/cell"))
    every = np.arange(config.batch)

    def draw(sets) -> int:
        for step in range(32):
            sets.ids(0, step, every)
        return 32 * config.batch

    alone = GeneSets(
        GeneSetConfig("random", config.n_genes), "given", seed=1, purpose=4, n_genes=n_genes, n_expressed_largest=0,
        weights=None, global_batch=config.batch, micro_batch=config.batch, loud=False,
    )  # fmt: skip
    report.add(Row(f"draw a set per batch{note}", _cost(lambda: draw(sets)), "us/cell"))
    report.add(Row(f"draw a set per cell{note}", _cost(lambda: draw(alone)), "us/cell"))


def _cost(work: Callable[[], int]) -> float:
    """CPU microseconds a cell: the median of 7."""
    work()
    found = []
    for _ in range(7):
        start = time.process_time()
        n = work()
        found.append((time.process_time() - start) / n * 1e6)
    return median(found)


# --- processes of their own ----------------------------------------------------------------------------------------


def in_a_process(task: str, config: BenchLoaderConfig) -> dict[str, Any]:
    """What TASKS[task] found in a fresh process."""
    here = f"import json; from launch.bench.loader import TASKS, BenchLoaderConfig; config = {asdict(config)!r}; "
    here += f"print(json.dumps(TASKS[{task!r}](BenchLoaderConfig(**config))))"
    done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"bench loader, {task}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def resident_mb() -> float:
    return bench_shards.resident_bytes(os.getpid()) / 1e6


def memory_task(config: BenchLoaderConfig) -> dict[str, Any]:
    """Resident MB after import, and after each of 20 epochs."""
    after_import = resident_mb()
    found = []
    with loader_of(config) as loader:
        for _ in range(20):
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


# --- mixing --------------------------------------------------------------------------------------------------------


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


# --- scale ---------------------------------------------------------------------------------------------------------


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
    data = (folder / schema.BLOCK_INDEX_PATH).read_bytes()
    shards = []
    for k, first in enumerate(range(0, n_blocks, per_shard)):
        mine = blocks[first : first + per_shard]
        path = schema.shard_name("train", k)
        (folder / path).touch()
        first_cell = int(mine["first_cell"][0])
        shards.append(
            ShardEntry(path, 0, int(mine["n_cells"].sum(dtype=np.int64)), first_cell, len(mine), first, 0, "")
        )
    one = np.ones(1, np.int64)
    manifest = schema.Manifest(
        "cells", n_cells, GeneVocab(tuple(f"GENE{k}" for k in range(60_000)), "symbol"), ConditionVocab({}),
        (SplitEntry("train", n_cells, 0, n_blocks, 0),), {}, tuple(shards),
        (FileEntry(schema.BLOCK_INDEX_PATH, len(data), hashlib.sha256(data).hexdigest()),),
        schema.BLOCK_CELLS, "zstd", 1, 0, ({},),
        {}, {}, {}, compute_statistics(0 * one, 1, {}, one, one, 1),
    )  # fmt: skip
    (folder / schema.MANIFEST).write_text(json.dumps(manifest.to_json()))


def scale_task(config: BenchLoaderConfig) -> dict[str, Any]:
    """Start-up of one rank of each world size, and the two guarantees of the order, on a real index."""
    folder = Path(config.folder) / f"index-{config.scale_cells}"
    batch, micro = 8_192, 8
    base = resident_mb()
    sets = GeneSetConfig("random", 2_048, micro)
    given = LoaderConfig(str(folder), seed=1, given=sets)
    found: dict[str, Any] = {"start": {}, "resident": {}, "files": 0}
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
            assert len(plan.block) == high - low
            assert loader.cells.hash == expected_hash
            for s in sampled:
                epoch, t = divmod(s, loader.steps_per_epoch)
                for a, b in zip(loader.order.epoch(epoch).plan(t, 1, low, high), expected[s]):
                    np.testing.assert_array_equal(a[0], b[0, low:high])
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
        part = folder.with_name("part")
        shutil.rmtree(part, ignore_errors=True)
        write_index(part, config.scale_cells)
        part.rename(folder)
    found = in_a_process("scale", config)
    name = f"{config.scale_cells:,} cells"
    for world, seconds in found["start"].items():
        report.add(Row(f"{name}, {world} ranks: start to first plan", max(seconds), "s"))
        report.add(Row(f"{name}, {world} ranks: resident over import", found["resident"][world], "MB"))
    report.add(Row(f"{name}: open files", found["files"], ""))
    report.add(Row(f"{name}: sampled ranks of 1 to 1,024 plan the same global batches", 1, "", "== 1", True))
    once = found["once"]
    report.add(Row(f"{name}: every cell once over 64 ranks", float(once), "", "== 1", once))
    report.add(Row("plan of an epoch", found["plan_seconds"] / config.scale_cells * 1e9, "ns/cell"))
    found = in_a_process("balance", config)
    report.add(Row(f"{name}, balanced over 1,000 groups: most resident over import", found["peak_mb"], "MB"))
    report.add(Row(f"{name}, balanced over 1,000 groups: drawing an epoch", found["seconds"], "s"))


TASKS: dict[str, Callable[[BenchLoaderConfig], dict[str, Any]]] = {
    "memory": memory_task,
    "resume": resume_task,
    "scale": scale_task,
    "balance": balance_task,
}


# --- main ----------------------------------------------------------------------------------------------------------


def main(config: BenchLoaderConfig) -> Report:
    keys = ("cells", "genes", "expressed", "batch", "n_genes", "rounds")
    report = Report("bench loader", {key: getattr(config, key) for key in keys})
    if set(config.parts) - {"scale"}:
        prepare(config, Path(config.folder))
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        {"speed": speed, "costs": costs, "memory": memory, "resume": resume, "mixing": mixing, "scale": scale}[part](
            config, report
        )
    report.print(config.json, config.save)
    return report


if __name__ == "__main__":
    sys.exit(run_verb("bench loader", sys.argv[1:]))
