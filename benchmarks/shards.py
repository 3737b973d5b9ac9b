"""What it costs to turn an atlas into shards, beside what it costs to read it and do nothing.

The cells are synthetic: each gene has its own probability to be expressed, so that a cell expresses about 1,763 of
20,000 genes; 65 % of the counts are 1, 88 % at most 3, 0.01 % over 255. With `spread` that differs by cell type.

Reading order: BenchShardsConfig, the synthetic atlas, the controls, main.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from numba import njit

from benchmarks.report import Report, Row, median, run_benchmark
from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.narrow import GeneSums, Rows, narrow_rows
from data_pipeline.convert.open import open_matrix, open_sources
from data_pipeline.format.block import encode_block
from data_pipeline.format.schema import BLOCK_CELLS, read_manifest
from data_pipeline.write_soma import write_census
from scldm.errors import InputError
from scldm.progress import Progress

PURPOSE = """Measure the conversion from SOMA and from h5ad against reading the same cells and doing nothing, the size
of a cell, and the peak memory of all processes together."""
EXAMPLE = """python -m benchmarks.shards
python -m benchmarks.shards cells=1000000 soma=false repeats=1 workers=2 --json --save benchmarks/shards-1m.json"""

CHUNK_CELLS = 4096
N_TYPES = 12


@dataclass(frozen=True)
class BenchShardsConfig:
    """What to measure.

    cells: synthetic cells
    genes: synthetic genes
    expressed: genes with a count, per cell
    spread: how much genes differ between the 12 cell types, as the standard deviation of the log of their levels
    h5ad: measure from an uncompressed h5ad file
    soma: measure from a SOMA experiment
    repeats: of every timing; the median counts
    workers: of the conversion
    memory: of the conversion
    folder: for atlas and shards; empty: a temporary one, removed at the end
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    cells: int = 40_000
    genes: int = 20_000
    expressed: int = 1_763
    spread: float = 0.0
    h5ad: bool = True
    soma: bool = True
    repeats: int = 3
    workers: int = 1
    memory: str = "2GiB"
    folder: str = ""
    json: bool = False
    save: str = ""


CONFIG = BenchShardsConfig


# --- the synthetic atlas -------------------------------------------------------------------------------------------


def synthetic_rows(n_cells: int, n_genes: int, expressed: int, seed: int = 0, spread: float = 0.0) -> Iterator[Rows]:
    """Cells by chunks, the same for every run; float32 counts as atlases have them."""
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0, 1.6, n_genes)
    low, high, factor = 0.0, 1e9, 1.0  # find the factor that gives the wanted number of expressed genes
    for _ in range(60):
        factor = (low + high) / 2
        if np.minimum(weight * factor, 0.98).sum() > expressed:
            high = factor
        else:
            low = factor
    types = synthetic_types(n_cells)
    level_TG = np.random.default_rng(2).lognormal(-(spread**2) / 2, spread, (N_TYPES, n_genes)) * weight * factor
    threshold_TG = (np.minimum(level_TG, 0.98) * 2**32).astype(np.uint64)
    table = np.sort(np.concatenate([
        np.full(65_000, 1.0), np.full(15_000, 2.0), np.full(8_000, 3.0),
        np.floor(4 + rng.exponential(6.0, 11_990)), np.floor(256 + rng.exponential(300.0, 10)),
    ])).astype(np.float32)  # fmt: skip
    for start in range(0, n_cells, CHUNK_CELLS):
        n = min(CHUNK_CELLS, n_cells - start)
        indptr = np.zeros(n + 1, np.int64)
        columns, values = np.empty(n * n_genes // 2, np.int32), np.empty(n * n_genes // 2, np.float32)
        of_types = types[start : start + n]
        used = _draw(start, seed, threshold_TG, of_types, table, indptr, columns, values)
        yield Rows(np.arange(start, start + n), indptr, columns[:used].copy(), values[:used].copy())


@njit(cache=True)
def _draw(first, seed, threshold_TG, types, table, indptr, columns, values):
    at = 0
    for cell in range(len(indptr) - 1):
        threshold = threshold_TG[types[cell]]
        state = np.uint64((first + cell + 1) * 0x9E3779B97F4A7C15 + seed)
        depth = np.uint64(50 + (state >> np.uint64(20)) % np.uint64(101))  # cells differ in depth, 0.5 to 1.5
        for gene in range(len(threshold)):
            state ^= state << np.uint64(13)
            state ^= state >> np.uint64(7)
            state ^= state << np.uint64(17)
            if (state >> np.uint64(32)) * np.uint64(100) < threshold[gene] * depth:
                columns[at] = gene
                values[at] = table[(state & np.uint64(0xFFFFFFFF)) % np.uint64(len(table))]
                at += 1
        indptr[cell + 1] = at
    return at


def synthetic_types(n_cells: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, N_TYPES, n_cells)


def synthetic_obs(n_cells: int) -> pd.DataFrame:
    types = pd.Categorical.from_codes(synthetic_types(n_cells), [f"type {k}" for k in range(N_TYPES)])
    return pd.DataFrame(
        {"cell_type": types, "number": np.arange(n_cells)}, index=pd.Index([f"cell{k}" for k in range(n_cells)])
    )


def keep_to_one_atlas(folder: Path, **asked: float | str) -> None:
    """asked: what its cells are. Raises: InputError where the folder holds an atlas of others; it notes whose it is."""
    note = folder / "atlas.json"
    if note.exists() and json.loads(note.read_text()) != asked:
        raise InputError(f"folder={folder}: holds other cells ({note.read_text()}); give another folder")
    note.write_text(json.dumps(asked))


def write_h5ad(path: Path, config: BenchShardsConfig) -> None:
    """The atlas as an uncompressed h5ad file, never held in memory."""
    import anndata

    obs, var = synthetic_obs(config.cells), pd.DataFrame(index=pd.Index([f"GENE{k}" for k in range(config.genes)]))
    anndata.AnnData(obs=obs, var=var).write_h5ad(path)
    with h5py.File(path, "r+") as file, Progress("atlas as h5ad", config.cells, "cells") as bar:
        file.pop("X", None)
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        x.attrs["shape"] = np.array([config.cells, config.genes])
        data = x.create_dataset("data", (0,), "f4", maxshape=(None,), chunks=(1 << 18,))
        indices = x.create_dataset("indices", (0,), "i4", maxshape=(None,), chunks=(1 << 18,))
        ends = [np.zeros(1, np.int64)]
        for rows in synthetic_rows(config.cells, config.genes, config.expressed, spread=config.spread):
            at = int(ends[-1][-1])
            for dataset, values in ((data, rows.values), (indices, rows.columns)):
                dataset.resize(at + len(values), axis=0)
                dataset[at:] = values
            ends.append(rows.indptr[1:] + at)
            bar.advance(len(rows.rows))
        x.create_dataset("indptr", data=np.concatenate(ends))


def write_soma(path: Path, config: BenchShardsConfig) -> None:
    var = pd.DataFrame(index=pd.Index([f"GENE{k}" for k in range(config.genes)]))
    rows = synthetic_rows(config.cells, config.genes, config.expressed, spread=config.spread)
    write_census(str(path), synthetic_obs(config.cells), var, rows, "homo_sapiens")


# --- controls ------------------------------------------------------------------------------------------------------


def read_soma(path: Path) -> None:
    """The query, read by tiledbsoma as its users do, and dropped."""
    import tiledbsoma

    with tiledbsoma.Experiment.open(str(path)) as experiment:
        n = 0
        with experiment.axis_query("RNA") as query:
            for table in query.X("raw").tables():
                n += table.num_rows
        assert n > 0


def read_narrow_encode(path: Path) -> None:
    """The same blocks, read, narrowed and encoded in the order of the file: what a shuffle comes on top of."""
    source = open_sources(SourceConfig(paths=(str(path),)), (), "")[0]
    matrix = open_matrix(source.spec)
    n_genes = len(source.genes.ids)
    every, sums = np.arange(n_genes, dtype=np.int32), GeneSums(n_genes)
    for rows in matrix.read(source.rows, 24 << 20):
        cells = narrow_rows(rows, every, n_genes, sums, np.ones(len(rows.rows), bool)).cells
        for start in range(0, len(cells), BLOCK_CELLS):
            mine = np.arange(start, min(start + BLOCK_CELLS, len(cells)))
            encode_block(
                cells.take(mine), split=0, n_genes=n_genes, vocab_tag=0, sources=np.zeros(len(mine), np.uint16),
                rows=rows.rows[mine], conditions=[np.zeros(len(mine), np.uint8)], codec="zstd",
            )  # fmt: skip
    matrix.close()


CONTROLS: dict[str, Callable[[Path], None]] = {"read_soma": read_soma, "read_narrow_encode": read_narrow_encode}


# --- timing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one process and its children: wall seconds, CPU seconds, peak resident bytes of all of them together, and the
    most that lay in the folder it wrote to."""

    wall: float
    cpu: float
    peak: int
    disk: int


def run_and_watch(command: list[str], out: Path | None = None) -> Cost:
    """Raises: InputError where the command fails."""
    before, start = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = disk = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak, disk
        while not stop.wait(0.1):
            peak = max(peak, resident_bytes(process.pid))
            disk = max(disk, bytes_in(out) if out else 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    stop.set()
    watcher.join()
    after = os.times()
    if process.returncode:
        raise InputError(f"{' '.join(command)} failed: {output.strip().splitlines()[-1] if output.strip() else ''}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(time.perf_counter() - start, cpu, peak, disk)


def resident_bytes(pid: int) -> int:
    """Of a process and all its descendants, from /proc; 0 where there is none."""
    total = 0
    try:
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident_bytes(int(child)) for child in (task / "children").read_text().split())
    except (OSError, ValueError):
        pass  # it ended while we looked
    return total


def bytes_in(folder: Path) -> int:
    """Of all files below a folder that another process writes to."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was moved while we looked
                total += os.stat(os.path.join(at, name)).st_size
    return total


@contextmanager
def _folder(name: str) -> Iterator[Path]:
    if name:
        Path(name).mkdir(parents=True, exist_ok=True)
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(prefix="scldm-bench-") as path:
        yield Path(path)


# --- main ----------------------------------------------------------------------------------------------------------


def main(config: BenchShardsConfig) -> Report:
    settings = {"cells": config.cells, "genes": config.genes, "workers": config.workers, "memory": config.memory}
    report = Report("shards", {**settings, "repeats": config.repeats}, save=config.save)
    with _folder(config.folder) as folder:
        keep_to_one_atlas(
            folder, cells=config.cells, genes=config.genes, expressed=config.expressed, spread=config.spread
        )
        if config.h5ad:
            path = folder / "atlas.h5ad"
            if not path.exists():
                write_h5ad(path, config)
            _measure(report, config, "h5ad", path, folder, "read_narrow_encode", "h5ad / read, narrow, zstd-1", 2.0)
        if config.soma:
            path = folder / "atlas-soma"
            if not path.exists():
                write_soma(path, config)
            path = path / "census_data" / "homo_sapiens"
            _measure(report, config, "soma", path, folder, "read_soma", "SOMA / read with tiledbsoma", 1.5)
    report.print(config.json)
    return report


def _measure(
    report: Report,
    config: BenchShardsConfig,
    kind: str,
    path: Path,
    folder: Path,
    control: str,
    ratio: str,
    at_most: float,
) -> None:
    """Control and conversion in turn, each in a process of its own, so that a busy machine slows both."""
    out = folder / f"shards-{kind}"
    here = "from pathlib import Path; from benchmarks.shards import CONTROLS; "
    here += f"CONTROLS[{control!r}](Path({str(path)!r}))"
    write = [sys.executable, "-m", "launch.cli", "shards", "write", f"out={out}", f"source.paths={path}"]
    write += ["conditions=cell_type", f"workers={config.workers}", f"memory={config.memory}"]
    nothing = [
        sys.executable,
        "-c",
        "import data_pipeline.convert.write_shards, tiledbsoma",
    ]
    start_up = median([run_and_watch(nothing).wall for _ in range(config.repeats)])
    controls, conversions = [], []
    for _ in range(config.repeats):
        controls.append(run_and_watch([sys.executable, "-c", here]))
        shutil.rmtree(out, ignore_errors=True)
        conversions.append(run_and_watch(write, out))
    wall = [median([c.wall for c in costs]) for costs in (controls, conversions)]
    cpu = [median([c.cpu for c in costs]) for costs in (controls, conversions)]
    manifest = read_manifest(str(out))
    size = sum(s.bytes for s in manifest.shards)
    expressed = manifest.statistics.n_nonzeros / manifest.n_cells
    report.add(Row(f"{kind}: control", wall[0], "s"))
    report.add(Row(f"{kind}: conversion", wall[1], "s"))
    report.add(Row(f"{kind}: start of a process, in both", start_up, "s"))
    if config.workers == 1:
        report.add(Row.at_most(f"{ratio}, wall", wall[1] / wall[0], "x", at_most))
    else:  # no fair ratio to a control of one process: no target
        report.add(Row(f"{ratio} in one process, wall", wall[1] / wall[0], "x"))
    report.add(Row(f"{ratio}, CPU", cpu[1] / cpu[0], "x"))
    report.add(Row(f"{kind}: rate", config.cells / wall[1], "cells/s"))
    report.add(Row(f"{kind}: expressed genes a cell", expressed, ""))
    report.add(Row(f"{kind}: most disk, unfinished work and set", max(c.disk for c in conversions) / 1e9, "GB"))
    report.add(Row.at_most(f"{kind}: size of a cell, {manifest.codec}", size / manifest.n_cells, "B", 1_800))
    report.add(
        Row.at_most(f"{kind}: peak memory of all processes", max(c.peak for c in conversions) / 2**30, "GiB", 2.0)
    )


if __name__ == "__main__":
    sys.exit(run_benchmark("shards"))
