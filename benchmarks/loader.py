"""What the stream costs beside a memory-mapped matrix and other loaders, and how it behaves.

Reading order: loader_cells.py (settings and data), loader_speed.py, loader_behaviour.py, and here what runs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.loader_behaviour import memory, mixing, resume, scale
from benchmarks.loader_cells import BenchLoaderConfig, prepare
from benchmarks.loader_speed import costs, speed
from benchmarks.report import Report, run_benchmark

PURPOSE = """Measure the stream of minibatches: cells per CPU-second beside a memory-mapped matrix and other loaders,
where the time goes, memory, resume, mixing, and start-up and order at 100 million cells."""
EXAMPLE = """python -m benchmarks.loader folder=bench-data
python -m benchmarks.loader folder=bench-data parts=[speed,costs] controls=[mmap] rounds=5
pip install scldm[bench] brings the other packages' loaders"""

CONFIG = BenchLoaderConfig

RUN: dict[str, Callable[[BenchLoaderConfig, Report], None]] = {
    "speed": speed,
    "costs": costs,
    "memory": memory,
    "resume": resume,
    "mixing": mixing,
    "scale": scale,
}


def main(config: BenchLoaderConfig) -> Report:
    keys = ("cells", "genes", "expressed", "batch", "n_genes", "rounds")
    report = Report("loader", {key: getattr(config, key) for key in keys}, save=config.save)
    if set(config.parts) - {"scale"}:
        prepare(config, Path(config.folder))
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        RUN[part](config, report)
    report.print(config.json)
    return report


if __name__ == "__main__":
    sys.exit(run_benchmark("loader"))
