"""`scldm bench train`: what the training loop adds to the bare step of the model, and DeepSpeed to plain torch.

Every way takes the same cells, weights and optimizer; steps of the ways alternate in one process.
Reading order: BenchTrainConfig, main, Cells, bare, ours.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch

from launch.bench.report import Report, Row, median
from launch.bench.ways import NO_GPU
from launch.cli import run_verb
from scldm.batch import CellBatch, GeneCounts
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import close_world, world_of_environment
from scldm.parallel.engine import HardwareConfig, start_engine
from scldm.train.loop import TrainConfig, train
from scldm.train.losses import Draws, VAEStage
from scldm.train.optim import OptimConfig, learning_rate, make_optimizer
from scldm.train.tracking import Tracker, TrackingConfig

PURPOSE = """Measure what the training loop (averages, metrics, log, its checks) adds to the bare step of the model
(forward, backward, clipping, AdamW), and DeepSpeed's engine to plain torch, on one rank. On a CPU, in CPU time."""
EXAMPLE = """
scldm bench train
scldm bench train steps=50 rounds=8 save=benchmarks/train-cpu.json
"""


@dataclass(frozen=True)
class BenchTrainConfig:
    """What to measure.

    cells: of a step
    n_genes: that every cell has
    steps: of a round
    rounds: the ways take turns in each
    log_every: steps between two rows of the log
    zero_stage: of DeepSpeed on its one rank
    precision: fp32 or bf16
    threads: of torch
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    cells: int = 16
    n_genes: int = 512
    model: VAEConfig = field(default_factory=lambda: VAEConfig(width=64, n_latents=8, n_layers=2))
    steps: int = 40
    rounds: int = 5
    log_every: int = 10
    zero_stage: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    json: bool = False
    save: str = ""


CONFIG = BenchTrainConfig
WAYS = ("bare", "plain", "deepspeed")


def main(config: BenchTrainConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    world = world_of_environment()
    on_gpu = world.device.type == "cuda"
    settings = {"cells": config.cells, "genes": config.n_genes, "width": config.model.width, "steps": config.steps}
    report = Report("bench train", {**settings, "rounds": config.rounds, "precision": config.precision})
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(config.rounds + 1):  # the first warms up
            for way in WAYS:
                run_dir = Path(folder) / f"{way}-{number}"
                took = bare(config, world.device) if way == "bare" else ours(config, way, world, run_dir)
                if number:
                    seconds[way].append(took)
    close_world()
    each = {way: 1e3 * median(took) for way, took in seconds.items()}
    for way, ms in each.items():
        report.add(Row(f"{way}: a step", ms, "ms"))
    added = median([1e3 * (a - b) for a, b in zip(seconds["plain"], seconds["bare"], strict=True)])
    report.add(Row.at_most("loop on the plain engine - bare step", added, "ms", 2.0))
    added = median([1e3 * (a - b) for a, b in zip(seconds["deepspeed"], seconds["plain"], strict=True)])
    report.add(Row("deepspeed - plain, the loop around both", added, "ms"))
    ratio = median([a / b for a, b in zip(seconds["deepspeed"], seconds["plain"], strict=True)])
    report.add(Row("deepspeed / plain", ratio, "x"))
    if on_gpu:
        share = median([a / b - 1 for a, b in zip(seconds["plain"], seconds["bare"], strict=True)])
        report.add(Row.at_most("loop on the plain engine, of the bare step", share, "share", 0.05))
    else:
        report.add(Row.not_measured("loop's share of a step", NO_GPU, "share", "<= 0.05"))
        for name in ("vae/20m", "vae/70m", "ldm/base"):
            report.add(
                Row.not_measured(f"{name}, ZeRO-2, bf16, cells/s, memory and MFU", NO_GPU, "share", "MFU >= 0.35")
            )
    report.print(config.json, config.save)
    return report


@dataclass
class Cells:
    """One batch, over and over, as a loader that costs nothing; stamps: when each was asked for."""

    config: BenchTrainConfig
    device: torch.device
    stamps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        B, S = self.config.cells, self.config.n_genes
        generator = torch.Generator().manual_seed(0)
        counts = torch.poisson(torch.rand(B, S, generator=generator), generator).int()
        given = GeneCounts(torch.arange(1, S + 1), counts)
        size_B, ids = counts.sum(1).float(), torch.zeros(B, 2, dtype=torch.int64)
        self.batch = CellBatch(given, given, size_B, size_B, torch.ones(B), {}, ids, torch.arange(B), B).to(self.device)

    def __next__(self) -> list[Any]:
        self.stamps.append(now(self.device))
        return [self.batch]

    def one_pass(self) -> Iterator[list[Any]]:
        yield [self.batch]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def step_s(self) -> float:
        """Of the steps but the first, in which things are made, and the last, which validates and saves."""
        return (self.stamps[-1] - self.stamps[1]) / (len(self.stamps) - 2)


def now(device: torch.device) -> float:
    """Seconds: of CPU time, all threads, or with a GPU of the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def bare(config: BenchTrainConfig, device: torch.device) -> float:
    """The step of the model as one would write it by hand; seconds a step."""
    gc.collect()
    torch.manual_seed(0)
    cells, optim = Cells(config, device), OptimConfig()
    vae = VAE(config.model, config.n_genes).to(device)
    stage, optimizer = VAEStage(vae), make_optimizer(optim, vae)
    for step in range(config.steps):
        (batch,) = next(cells)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, _ = stage.loss(vae, batch, Draws(0, step, batch.positions_B))
        (loss / batch.n_cells).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, config.steps) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return cells.step_s()


def ours(config: BenchTrainConfig, engine_name: Any, world: Any, run_dir: Path) -> float:
    """The same through the training loop; seconds a step."""
    gc.collect()
    torch.manual_seed(0)
    run_dir.mkdir()
    optim = OptimConfig()
    cells, vae = Cells(config, world.device), VAE(config.model, config.n_genes)
    hardware = HardwareConfig(engine_name, config.cells, config.zero_stage, precision=config.precision)
    engine = start_engine(vae, lambda m: make_optimizer(optim, m), hardware, optim.clip, world, config.cells)
    n = config.steps
    course = TrainConfig(n, config.cells, log_every=config.log_every, validate_every=n, save_every=n)
    with Tracker(run_dir, TrackingConfig(enabled=False)) as tracker, redirect_stderr(StringIO()):
        train(VAEStage(vae), engine, cells, cells, course, optim, world, run_dir, tracker, "bench")
    return cells.step_s()


if __name__ == "__main__":
    sys.exit(run_verb("bench train", sys.argv[1:]))
