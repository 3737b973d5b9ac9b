"""What the training loop adds to the bare step of the model, and DeepSpeed and FSDP2 to plain torch.

Every way takes the same cells, weights and optimizer, and the ways take turns in one process. On a GPU presets of the
atlas are measured as well: cells/s, memory, and the share of the device's peak.
Reading order: BenchTrainConfig, main, ways_of, time_ways, preset_rows, compiled_row; Work, SameCells, bare, ours.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.measure import failure_of, peak_of
from benchmarks.report import Report, Row, median, run_benchmark
from benchmarks.ways import NO_GPU
from launch.config import compose
from launch.train_ldm import TrainLDMConfig
from launch.train_vae import TrainVAEConfig, genes_of, sets_per_cell
from scldm.batch import CellBatch, GeneCounts, LatentBatch
from scldm.errors import InputError
from scldm.model.dit import DiT
from scldm.model.flops import vae_flops
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import World, close_world, world_of_environment
from scldm.parallel.engine import HardwareConfig, start_engine
from scldm.tf32 import tf32_products
from scldm.train.budget import Memory, rank_memory
from scldm.train.loop import TrainConfig, train
from scldm.train.losses import Draws, LDMStage, VAEStage
from scldm.train.optim import OptimConfig, learning_rate, make_optimizer
from scldm.train.step_cost import StepCost, dit_step, vae_step
from scldm.train.throughput import peak_flops
from scldm.train.tracking import Tracker, TrackingConfig

PURPOSE = """Measure what the training loop (EMA, metrics, log, its checks) adds to the bare step of the model
(forward, backward, clipping, AdamW), and the engines of DeepSpeed and FSDP2 to plain torch. Under torchrun it compares
those two at zero_stage 2 and 3. On a CPU, in CPU time of a rank. On a GPU presets of the atlas as well, through
DeepSpeed ZeRO-2 in bf16: cells/s, peak memory, MFU. Where DeepSpeed is not installed, the rows that need it say so, and
presets go through the plain engine."""
EXAMPLE = """
python -m benchmarks.train
python -m benchmarks.train steps=50 rounds=8 save=benchmarks/train-cpu.json
torchrun --standalone --nproc-per-node 2 -m benchmarks.train save=benchmarks/train-cpu-two-ranks.json
"""
ATLAS_GENES = 36_130  # human genes of the Census
LATENT_SHAPE = (64, 16)  # of the atlas presets' autoencoders


@dataclass(frozen=True)
class BenchTrainConfig:
    """What to measure.

    cells: of a step, on each rank
    n_genes: that every cell has
    steps: of a round
    rounds: the ways take turns in each
    log_every: steps between two rows of the log
    zero_stage: of DeepSpeed on one rank. FSDP2 has at least 2
    precision: fp32 or bf16
    threads: of torch
    presets: of training, for a GPU: with the micro-batch of hardware/one_gpu, through ZeRO-2 in bf16
    compile: of these, measured with model.compile=true as well
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
    presets: list[str] = field(default_factory=lambda: ["vae/20m", "vae/70m", "ldm/base"])
    compile: list[str] = field(default_factory=list)
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        if self.steps < 3:
            raise InputError(f"steps={self.steps} must be at least 3: the first and the last are not timed")


CONFIG = BenchTrainConfig
NO_DEEPSPEED = "the package deepspeed is not installed"


def main(config: BenchTrainConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    world = world_of_environment()
    world.join()
    settings = {"cells": config.cells, "genes": config.n_genes, "width": config.model.width, "steps": config.steps}
    report = Report(
        "train",
        {**settings, "rounds": config.rounds, "precision": config.precision, "ranks": world.size},
        save=config.save if world.is_first else "",
    )
    work = vae_work(config.model, config.n_genes, config.n_genes, config.cells, OptimConfig())
    hardware = HardwareConfig(zero_stage=config.zero_stage, precision=config.precision)
    seconds = time_ways(work, hardware, config, world)
    for way, took in seconds.items():
        report.add(Row(f"{way}: a step", 1e3 * median(took), "ms"))
    if world.size > 1:
        report.command = report.command.replace("python", f"torchrun --standalone --nproc-per-node {world.size}", 1)
        for stage in (2, 3) if installed() else ():
            row = f"fsdp / deepspeed at zero_stage={stage}"
            report.add(Row(row, ratio(seconds, f"fsdp at zero_stage={stage}", f"deepspeed at zero_stage={stage}"), "x"))
    else:
        for row in rows_of_one_rank(seconds, config, world):  # each as it is found
            report.add(row)
    close_world()
    if world.is_first:
        report.print(config.json)
    return report


def rows_of_one_rank(seconds: dict[str, list[float]], config: BenchTrainConfig, world: World) -> Iterator[Row]:
    """What the loop and the engines add, and presets where there is a GPU."""
    added = median([1e3 * (a - b) for a, b in zip(seconds["plain"], seconds["bare"], strict=True)])
    yield Row.at_most("loop on the plain engine - bare step", added, "ms", 2.0)
    for engine in ("deepspeed", "fsdp"):
        if engine in seconds:
            added = median([1e3 * (a - b) for a, b in zip(seconds[engine], seconds["plain"], strict=True)])
            yield Row(f"{engine} - plain, the loop around both", added, "ms")
            yield Row(f"{engine} / plain", ratio(seconds, engine, "plain"), "x")
        else:
            yield Row.not_measured(f"{engine}: a step", NO_DEEPSPEED, "ms")
    on_gpu = world.device.type == "cuda"
    if not on_gpu:
        yield Row.not_measured("loop's share of a step", NO_GPU, "share", "<= 0.05")
    for preset in config.presets:
        if on_gpu:
            yield from preset_rows([preset], ATLAS_GENES, config, world)
        else:
            name = f"{preset}, ZeRO-2, bf16, cells/s, memory and MFU"
            yield Row.not_measured(name, NO_GPU, "share", "MFU >= 0.35")


def installed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def ways_of(hardware: HardwareConfig, world: World) -> dict[str, HardwareConfig | None]:
    """Name -> how the training loop runs, None for the bare step."""
    engines: tuple[Literal["deepspeed", "fsdp"], ...] = ("deepspeed", "fsdp") if installed() else ("fsdp",)
    if world.size > 1:
        laid = [(engine, stage) for stage in (2, 3) for engine in engines]
        return {f"{e} at zero_stage={stage}": replace(hardware, engine=e, zero_stage=stage) for e, stage in laid}
    ways: dict[str, HardwareConfig | None] = {"bare": None, "plain": replace(hardware, engine="plain")}
    for engine in engines:
        stage = max(2, hardware.zero_stage) if engine == "fsdp" else hardware.zero_stage
        ways[engine] = replace(hardware, engine=engine, zero_stage=stage)
    return ways


def time_ways(work: Work, hardware: HardwareConfig, config: BenchTrainConfig, world: World) -> dict[str, list[float]]:
    """Seconds a step of each way, in every round but the first, which warms up."""
    seconds: dict[str, list[float]] = {}
    for number in range(config.rounds + 1):
        for way, how in ways_of(hardware, world).items():
            if how is None:
                took = bare(work, hardware.precision, config.steps, world.device)
            else:
                took = ours(work, how, config.steps, config.log_every, world)
            if number:
                seconds.setdefault(way, []).append(took)
    return seconds


def ratio(seconds: dict[str, list[float]], way: str, other: str) -> float:
    return median([a / b for a, b in zip(seconds[way], seconds[other], strict=True)])


def preset_rows(words: Sequence[str], n_genes: int, config: BenchTrainConfig, world: World) -> list[Row]:
    """A preset of training (and further words of its command line) through ZeRO-2 in bf16, or where DeepSpeed is not
    installed through the plain engine, on whatever device this is.

    Memory beside what the plan says of it; MFU where the device's peak is known, by the FLOPs of the path that ran and
    by those of the formula, which are more where the path saves some.
    """
    engine = "deepspeed" if installed() else "plain"
    words = on_device(words, world.device)
    work, hardware = preset_work(words, n_genes), HardwareConfig(engine=engine, zero_stage=2, precision="bf16")
    peak_bytes = peak_of(lambda: ours(work, hardware, 3, 1, world), world.device)
    cost, lazy = work.cost(), world.device.type == "cpu"
    memory = rank_memory(cost, 2, 1, bf16=True, lazy=lazy) if engine == "deepspeed" else plain_memory(cost)
    planned = memory.peak / peak_bytes
    seconds = time_ways(work, hardware, config, world)
    step_s, peak = median(seconds[engine]), peak_flops(world.device, "bf16")
    rows = [
        Row(f"cells/s on the {engine} engine", work.batch.n_cells / step_s, "cells/s"),
        mfu_row("MFU", cost.flops / step_s, peak, 0.35),
        mfu_row("MFU by the formula's FLOPs", work.formula_flops() / step_s, peak),
        Row("peak memory", peak_bytes / 1e9, "GB"),
        Row("planned / measured peak memory", planned, "x", "0.85 to 1.15", abs(planned - 1) <= 0.15),
        Row.at_most("loop on the plain engine / bare step - 1", ratio(seconds, "plain", "bare") - 1, "share", 0.05),
        Row("fsdp / bare step", ratio(seconds, "fsdp", "bare"), "x"),
        Row.not_measured("deepspeed / bare step", NO_DEEPSPEED, "x"),
    ]
    if installed():
        rows[-1] = Row("deepspeed / bare step", ratio(seconds, "deepspeed", "bare"), "x")
    if words[0] in config.compile:
        rows.append(compiled_row(preset_work([*words, "model.compile=true"], n_genes), seconds["bare"], config, world))
    return [replace(row, name=f"{words[0]}: {row.name}") for row in rows]


def plain_memory(cost: StepCost) -> Memory:
    """Of a lone process without DeepSpeed: no masters beside the weights, and all gradients stay to the end of the
    pass, where AdamW makes three tensors as large as the weights."""
    P = cost.n_parameters
    return Memory(
        weights=4 * P,
        gathered=0.0,
        masters=0.0,
        moments=8 * P,
        ema=4 * P,
        gradients=0.0,
        buckets=0.0,
        activations=cost.peak_with_gradients_bytes,
        step=4 * P + 3 * 4 * P,
        validation=4 * P + cost.peak_bytes,
        saved=4 * 4 * P,
    )


def on_device(words: Sequence[str], device: torch.device) -> list[str]:
    """A preset and further words, as a user of such a device composes them: one GPU has a micro-batch of its own."""
    return [words[0], *(["hardware/one_gpu"] if device.type == "cuda" else []), *words[1:]]


def compiled_row(work: Work, plain_s: list[float], config: BenchTrainConfig, world: World) -> Row:
    """What compiled transformer blocks gain."""
    took: list[float] = []
    run = partial(bare, work, "bf16", config.steps, world.device)
    why = failure_of(lambda: took.extend(run() for _ in range(config.rounds)), world.device)
    name = "bare step / bare step, compiled"
    return Row.not_measured(name, why, "x") if why else Row(name, median(plain_s) / median(took), "x")


def mfu_row(name: str, flops_per_s: float, peak: float, target: float | None = None) -> Row:
    """As a share of a device's peak, which is 0 where it is not known."""
    if not peak:
        why = "the peak of this device is not known"
        return Row.not_measured(name, why, "share", f">= {target:g}" if target else "")
    share = flops_per_s / peak
    return Row.at_least(name, share, "share", target) if target else Row(name, share, "share")


# --- the work ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What is trained, on which cells.

    stage: makes it, with its network
    batch: of one step, on the CPU
    cost: of that batch
    formula_flops: of that batch by the formula, forward and backward; where there is one path alone, those of the cost
    """

    stage: Callable[[], VAEStage | LDMStage]
    batch: CellBatch | LatentBatch
    optim: OptimConfig
    cost: Callable[[], StepCost]
    formula_flops: Callable[[], float]


def preset_work(words: Sequence[str], n_genes: int) -> Work:
    """A micro-batch of what `scldm train` would train; for a diffusion transformer latents of LATENT_SHAPE."""
    words = [*words, "run_dir=", "data.shards="]
    if not words[0].startswith("ldm/"):
        run = compose(TrainVAEConfig, words)
        n_given, (per_cell, _) = genes_of(run.data, n_genes)[0], sets_per_cell(run.data, n_genes)
        return vae_work(run.model, n_genes, n_given, run.hardware.micro_batch, run.optim, per_cell)
    run = compose(TrainLDMConfig, words)
    B = run.hardware.micro_batch

    def cost() -> StepCost:
        return dit_step(run.model, *LATENT_SHAPE, {}, B, bf16=True)

    return Work(
        lambda: LDMStage(DiT(run.model, *LATENT_SHAPE, {}), run.guidance, run.flow),
        LatentBatch(latent_BLZ=torch.randn(B, *LATENT_SHAPE), library_size_all_B=torch.ones(B), **_identities(B)),
        run.optim,
        cost,
        lambda: cost().flops,
    )


def vae_work(
    model: VAEConfig, n_genes: int, n_given: int, n_cells: int, optim: OptimConfig, per_cell: bool = False
) -> Work:
    """Cells that are given and asked for the same genes of the vocabulary: all for the same, or each for its own."""
    generator = torch.Generator().manual_seed(0)
    sets = [1 + torch.randperm(n_genes, generator=generator)[:n_given] for _ in range(n_cells if per_cell else 1)]
    ids = torch.stack(sets) if per_cell else sets[0]
    given = GeneCounts(ids, torch.poisson(torch.rand(n_cells, n_given, generator=generator), generator).int())
    size_B = given.counts_BS.sum(1).float()
    return Work(
        lambda: VAEStage(VAE(model, n_genes)),
        CellBatch(given, given, size_B, library_size_all_B=size_B, **_identities(n_cells)),
        optim,
        lambda: vae_step(model, n_genes, n_cells, n_given, n_given, (per_cell, per_cell), bf16=True),
        lambda: 3 * sum(vae_flops(model, n_cells, n_given, n_given).values()),
    )


def _identities(n_cells: int) -> dict[str, Any]:
    return {
        "weight_B": torch.ones(n_cells),
        "conditions": {},
        "cell_ids_B2": torch.zeros(n_cells, 2, dtype=torch.int64),
        "positions_B": torch.arange(n_cells),
        "n_cells": n_cells,
    }


# --- the ways ------------------------------------------------------------------------------------------------------


@dataclass
class SameCells:
    """One batch, over and over, as a loader that costs nothing; it times the steps but the first, in which things are
    made, and the last, which validates and saves."""

    batch: CellBatch | LatentBatch
    n_steps: int
    device: torch.device
    n_given: int = 0
    stamps: list[float] = field(default_factory=list)

    def __next__(self) -> list[Any]:
        if self.n_given in (1, self.n_steps - 1):
            self.stamps.append(now(self.device))
        self.n_given += 1
        return [self.batch]

    def one_pass(self) -> Iterator[list[Any]]:
        yield [self.batch]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def step_s(self) -> float:
        return (self.stamps[1] - self.stamps[0]) / (self.n_steps - 2)


def now(device: torch.device) -> float:
    """Seconds: of CPU time, all threads, or with a GPU of the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def bare(work: Work, precision: str, n_steps: int, device: torch.device) -> float:
    """The step of the model as one would write it by hand; seconds a step."""
    gc.collect()
    torch.manual_seed(0)
    stage, optim = work.stage(), work.optim
    cells, module = SameCells(work.batch.to(device), n_steps, device), stage.module.to(device)
    optimizer, loss_of = make_optimizer(optim, module), stage.loss
    for step in range(n_steps):
        (batch,) = next(cells)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = loss_of(module, batch, Draws(0, step, batch.positions_B))
        with tf32_products(precision == "bf16"):  # as engines have it
            (loss / batch.n_cells).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, n_steps) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return cells.step_s()


def ours(work: Work, hardware: HardwareConfig, n_steps: int, log_every: int, world: World) -> float:
    """The same through the training loop, every rank with as many cells; seconds a step."""
    gc.collect()
    torch.manual_seed(0)
    stage, optim, n, n_cells = work.stage(), work.optim, n_steps, world.size * work.batch.n_cells
    cells = SameCells(replace(work.batch, n_cells=n_cells).to(world.device), n, world.device)
    hardware = replace(hardware, micro_batch=work.batch.n_cells)
    engine = start_engine(stage.module, lambda m: make_optimizer(optim, m), hardware, optim.clip, world, n_cells)
    course = TrainConfig(n, n_cells, log_every=log_every, validate_every=n, save_every=n)
    with (
        tempfile.TemporaryDirectory() as own,
        Tracker(Path(own), TrackingConfig(enabled=False), active=world.is_first) as tracker,
        redirect_stderr(StringIO()),
    ):
        folder = Path(world.gather(own)[0])
        train(stage, engine, cells, cells, course, optim, world, folder, tracker, "bench")
        world.barrier()
    return cells.step_s()


if __name__ == "__main__":
    sys.exit(run_benchmark("train"))
