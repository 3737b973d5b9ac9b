"""Saving and loading beside plain torch.save, and how long saving holds training up.

Reading order: BenchCheckpointConfig, main, the rest.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.report import Report, Row, median, run_benchmark
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig, PlainEngine
from scldm.train import checkpoint
from scldm.train.ema import EMA
from scldm.train.optim import OptimConfig, make_optimizer
from scldm.train.saver import Saver, own_share

PURPOSE = """Measure a checkpoint (weights, EMA, both moments) of one rank: how long training waits, and how long
until it is durable, and loading, beside torch.save (with fsync) and torch.load of the same tensors. Each repeat takes
them in turn."""
EXAMPLE = """
python -m benchmarks.checkpoint n_parameters=20_000_000
"""
WIDTH = 1_024


@dataclass(frozen=True)
class BenchCheckpointConfig:
    """What to measure.

    n_parameters: of the network; a checkpoint has 16 bytes for each
    folder: where to write; empty for the system's temporary folder
    repeats: of each way; the medians are reported
    threads: of torch
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    n_parameters: int = 20_000_000
    folder: str = ""
    repeats: int = 5
    threads: int = 1
    json: bool = False
    save: str = ""


CONFIG = BenchCheckpointConfig


def main(config: BenchCheckpointConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 1, device)
    n_layers = max(1, round(config.n_parameters / (WIDTH * (WIDTH + 1))))
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(n_layers)))
    engine = PlainEngine(module, lambda m: make_optimizer(OptimConfig(), m), HardwareConfig("plain"), 1.0, world)
    ema = EMA(engine, 0.99)
    step = training_step(engine, device)
    step()
    n_bytes = sum(t.numel() * t.element_size() for t in own_share(engine, ema, world).values())
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.setdefault(name, []).append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory(dir=config.folder or None) as scratch:
        run_dir, plain = Path(scratch) / "run", Path(scratch) / "plain.pt"
        saver = Saver(run_dir, engine, ema, world, keep=1)
        for k in range(config.repeats + 1):
            timed("save plain", lambda: save_plain(plain, own_share(engine, ema, world)))
            timed("step", step)
            state = {"step": k + 1, "loader": {}}
            timed("stall", lambda state=state: saver.begin(state))
            timed("step while saving", step)
            timed("rest of save", saver.finish)
            timed("load plain", lambda: load_plain(plain, device))
            timed("load", lambda: checkpoint.resume(run_dir / "checkpoints", engine, ema, world))
            if k == 0:
                times.clear()  # memory and files are new

    cost = {name: median(values) for name, values in times.items()}
    whole = [sum(parts) for parts in zip(times["stall"], times["step while saving"], times["rest of save"])]
    settings = {"parameters": sum(p.numel() for p in module.parameters()), "GB": round(n_bytes / 1e9, 3)}
    report = Report("checkpoint", {**settings, "repeats": config.repeats, "threads": config.threads}, save=config.save)
    report.add(Row("torch.save and fsync", n_bytes / cost["save plain"] / 1e9, "GB/s"))
    report.add(Row("save, hashed, until durable, beside training", n_bytes / median(whole) / 1e9, "GB/s"))
    report.add(Row("torch.load", n_bytes / cost["load plain"] / 1e9, "GB/s"))
    report.add(Row("load, hashes checked", n_bytes / cost["load"] / 1e9, "GB/s"))
    report.add(Row("torch.save and fsync", 1e3 * cost["save plain"], "ms"))
    report.add(Row("training waits", 1e3 * cost["stall"], "ms"))
    ratios = [stall / plain for stall, plain in zip(times["stall"], times["save plain"])]
    report.add(Row.at_most("training waits / torch.save and fsync", median(ratios), "x", 0.2))
    report.add(Row("a step while saving / a step", cost["step while saving"] / cost["step"], "x"))
    report.print(config.json)
    return report


def training_step(engine: PlainEngine, device: torch.device) -> Callable[[], None]:
    inputs = torch.randn(64, WIDTH, device=device)

    def step() -> None:
        engine.backward(engine.model(inputs).square().mean())
        engine.step(1e-6)

    return step


def save_plain(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def load_plain(path: Path, device: torch.device) -> None:
    torch.load(path, map_location=device, weights_only=True)


if __name__ == "__main__":
    sys.exit(run_benchmark("checkpoint"))
