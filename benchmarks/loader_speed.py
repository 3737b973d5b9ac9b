"""What the stream costs beside a memory-mapped matrix and other loaders, and where the time goes.

Rates are cells per CPU-second of this process, all its threads: wall time says little on a shared machine. Readers take
turns, so that a busy machine slows all of them; a ratio is the median over rounds of the ratios within a round. Of slow
loaders, whose rounds are short, one rate of all rounds is taken, so that the quartiles of their ratios are ours. The
stream makes its batches in the consumer's thread, as the memory-mapped control does, but where a row says otherwise.

Reading order: speed, costs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import loader_controls as controls
from benchmarks.loader_cells import BenchLoaderConfig, batches_of, loader_of
from benchmarks.report import Report, Row, median
from data_pipeline.convert.narrow import GeneSums, Rows, narrow_rows
from data_pipeline.format import schema
from data_pipeline.format.block import decode_block, encode_block
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.gather import CellSlots
from data_pipeline.stream.gene_set_config import GeneSetConfig, Policy
from data_pipeline.stream.gene_sets import GeneSets
from data_pipeline.stream.order import Order, Units
from scldm.vocab import GeneVocab

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


# --- where the time goes ---------------------------------------------------------------------------------------------


def costs(config: BenchLoaderConfig, report: Report) -> None:
    """CPU microseconds a cell of each part, alone, and of the whole; then what one core feeds to a consumer that does
    nothing."""
    rng = np.random.default_rng(0)
    units = Units.whole(np.arange(400_000), np.full(400_000, 256))
    order = Order(units, 0, 32, config.batch, 2).epoch(0)
    planned = _cost(lambda: order.plan(1000, 256, 0, config.batch)[0].size)
    report.add(Row("order", planned, "us/cell"))
    gathered = 0.0
    for codec in ("none", "zstd"):
        cells = ShardSet(str(Path(config.folder) / f"shards-{codec}"))
        n = min(64, len(cells.blocks) - 1)
        slots, chosen = CellSlots(cells.manifest, n), rng.permutation(len(cells.blocks) - 1)[:n]
        lengths = cells.blocks["length"][chosen].tolist()
        own = codec == "none"  # as the loader reads: into the slot what is not compressed
        buffers = [slots.buffer(k, size) if own else np.empty(size, np.uint8) for k, size in enumerate(lengths)]

        def read(cells=cells, chosen=chosen, buffers=buffers) -> int:
            for block, into in zip(chosen, buffers):
                cells.fetch(int(block), into)
            return len(chosen) * cells.manifest.block_cells

        def fill(cells=cells, n=n, slots=slots, buffers=buffers) -> int:
            for slot in range(n):
                slots.fill(slot, buffers[slot], "bench")
            return n * cells.manifest.block_cells

        parts = [_cost(read), _cost(fill)]
        report.add(Row(f"{codec}: read, with CRC-32", parts[0], "us/cell"))
        report.add(Row(f"{codec}: decompress and check", parts[1], "us/cell"))
        if codec == "none":
            gathered = _gather_costs(config, report, slots, rng, cells.manifest.genes.n_genes, "")
        cells.close()
        reader = batches_of(loader_of(config, codec, prefetch=0))
        ours = min(OUR_ROUND_CELLS, 3 * config.cells)
        _rate(reader, ours)
        whole = 1e6 / median([_rate(reader, ours) for _ in range(7)])
        report.add(Row(f"{codec}: all of it, a set per batch", whole, "us/cell"))
        rest = whole - sum(parts) - gathered - planned
        report.add(Row(f"{codec}: of it threads, Python, and caches that a batch filled", rest, "us/cell"))
    wide = _wide_slots(config)
    _gather_costs(config, report, wide, rng, 60_000, ", 60,000 genes")
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
        rows = Rows(np.arange(len(found.indptr) - 1), found.indptr.astype(np.int64), spread, found.counts)
        every = np.arange(60_000, dtype=np.int32)
        kept = narrow_rows(rows, every, 60_000, GeneSums(60_000), np.ones(len(rows.indptr) - 1, bool))
        data = encode_block(
            kept.cells, split=0, n_genes=60_000,
            vocab_tag=schema.vocab_tag(genes), sources=found.sources, rows=found.rows, conditions=found.conditions,
            codec="none",
        )  # fmt: skip
        slots.fill(slot, np.frombuffer(data, np.uint8), "bench")
    cells.close()
    return slots


def _gather_costs(config: BenchLoaderConfig, report: Report, slots: CellSlots, rng, n_genes: int, note: str) -> float:
    """Returns what gathering, and drawing, one set per batch costs."""
    sets = controls.gene_sets(n_genes, config.n_genes, config.batch)
    ids = sets.ids(0, 0, np.arange(config.batch))
    cells = [(rng.integers(0, slots.n_slots, config.batch), rng.integers(0, 256, config.batch)) for _ in range(64)]

    def each(gather: Callable[..., Any], *rest: Any) -> int:
        for where in cells:
            gather(*where, *rest)
        return len(cells) * config.batch

    gathered = _cost(lambda: each(slots.take, ids))
    report.add(Row(f"gather {config.n_genes:,} genes{note}", gathered, "us/cell"))
    report.add(Row(f"gather compact{note}", _cost(lambda: each(slots.take_csr)), "us/cell"))
    every = np.arange(config.batch)

    def draw(sets, steps=32) -> int:
        for step in range(steps):
            sets.ids(0, step, every)
        return steps * config.batch

    def alone(policy: Policy) -> GeneSets:
        return GeneSets(
            GeneSetConfig(policy, config.n_genes), "given", seed=1, purpose=4, n_genes=n_genes, n_expressed_largest=0,
            weights=rng.lognormal(0, 1.6, n_genes), micro_batch=config.batch, loud=False,
        )  # fmt: skip

    random, weighted = alone("random"), alone("weighted")
    drawn = _cost(lambda: draw(sets))
    report.add(Row(f"draw a set per batch{note}", drawn, "us/cell"))
    report.add(Row(f"draw a set per cell{note}", _cost(lambda: draw(random)), "us/cell"))
    report.add(Row(f"draw a weighted set per cell{note}", _cost(lambda: draw(weighted, 4)), "us/cell"))
    return gathered + drawn


def _cost(work: Callable[[], int]) -> float:
    """CPU microseconds a cell: the median of 7."""
    work()
    found = []
    for _ in range(7):
        start = time.process_time()
        n = work()
        found.append((time.process_time() - start) / n * 1e6)
    return median(found)
