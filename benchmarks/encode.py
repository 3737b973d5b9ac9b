"""Encoding a shard set by a trained autoencoder, beside what `scldm plan` says of it.

Reading order: BenchEncodeConfig, main, planned.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import Report, Row, run_benchmark
from benchmarks.ways import peak_flops
from data_pipeline.format.read_shards import ShardSet
from launch.encode import EncodeConfig
from launch.encode import main as encode
from launch.plan import read as read_plan
from launch.plan import with_data
from launch.planning.config import PlanVAEConfig
from launch.planning.of_encode import EncodePlan, encode_of
from scldm.train.run_folder import read_config

PURPOSE = """Encode all cells of a shard set on one core, and plan the same: CPU time a cell, bytes read and written.
Twice, as the first time compiles kernels of the loader. The second time counts."""
EXAMPLE = """
python -m benchmarks.encode vae=runs/vae shards=shards
"""


@dataclass(frozen=True)
class BenchEncodeConfig:
    """What to measure.

    vae: run folder of the autoencoder
    shards: cells that it was trained on
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    vae: str
    shards: str
    json: bool = False
    save: str = ""


CONFIG = BenchEncodeConfig


def main(config: BenchEncodeConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(1)
    cells = ShardSet(config.shards)
    manifest, expressed = cells.manifest, float(cells.gene_column("fraction_expressed").sum())
    cells.close()
    n_cells, peak = manifest.n_cells, peak_flops(torch.device("cpu"), torch.float32)
    report = Report(
        "encode", {"cells": n_cells, "genes": manifest.genes.n_genes, "expressed": round(expressed)}, save=config.save
    )
    seconds, written = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            began = time.process_time()
            encode(EncodeConfig(config.vae, config.shards, f"{folder}/{name}", which="latest"))
            seconds = time.process_time() - began
        written = sum(file.stat().st_size for file in Path(folder, "second").rglob("*") if file.is_file())
    report.add(Row("large matrix product", peak / 1e9, "GFLOP/s"))
    report.add(Row("CPU time", seconds / n_cells * 1e3, "ms a cell"))
    report.add(Row("bytes read", sum(shard.bytes for shard in manifest.shards) / n_cells, "a cell"))
    report.add(Row("bytes written", written / n_cells, "a cell"))
    for name, words in (("planned", ()), ("planned for this core", (f"hardware.peak_tflops={peak / 1e12}",))):
        plan = planned(config, round(expressed), *words)
        report.add(Row(f"{name}, CPU time", plan.seconds / n_cells * 1e3, "ms a cell"))
        report.add(Row(f"{name}, CPU time / measured", plan.seconds / seconds, ""))
    report.add(Row("planned, bytes read", plan.read_bytes / n_cells, "a cell"))
    report.add(Row("planned, bytes written", plan.written_bytes / n_cells, "a cell"))
    report.print(config.json)
    return report


def planned(config: BenchEncodeConfig, expressed: int, *words: str) -> EncodePlan:
    """By the shape of the run, on one core."""
    model = read_config(Path(config.vae))["model"]
    shape = [f"model.{key}={json.dumps(value)}" for key, value in model.items()]
    told = read_plan(["vae", "hardware/cpu", f"data.shards={config.shards}", f"expressed={expressed}", *shape, *words])
    filled = with_data(told)
    assert isinstance(filled, PlanVAEConfig)
    plan = encode_of(filled)
    assert plan is not None
    return plan


if __name__ == "__main__":
    sys.exit(run_benchmark("encode"))
