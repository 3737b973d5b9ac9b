"""Where a training step of the autoencoder spends its time, for each way of attention: kernels, GPU time, idle share.

On a GPU torch.profiler lists the kernels. The step is timed apart from that, as the profiler slows the host. A GPU that
is idle for much of a step waits for the host to launch. On a CPU operations take the kernels' place: that shows that
the profile works, and says nothing about a GPU.
Reading order: GPUProfileConfig, main, profiled, launch_us, kernels_of.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import failure_of, measure
from benchmarks.report import Report, Row, run_benchmark
from benchmarks.vae_step import BenchVAEStepConfig, calls_of
from benchmarks.ways import of_preset, unable, ways
from scldm.model.vae import VAEConfig

PURPOSE = """Say where a training step of the autoencoder spends its time, for each way of attention: kernels, GPU time,
idle share."""

EXAMPLE = """
python -m benchmarks.gpu_profile preset=20m cells=32,128 genes=8192 save=runs/profile.json
"""


@dataclass(frozen=True)
class GPUProfileConfig:
    """What to profile.

    preset: name of a shape in configs/vae; empty takes `model`
    cells: numbers of cells that share the genes
    genes: given to the encoder and asked of the decoder
    n_genes: of the vocabulary
    compile: the formula with torch's kernels, compiled, as well; a minute or two
    precision: fp32, or bf16 by autocast
    steps: that are profiled
    repeats: of a timed step
    top: kernels that are listed, by time
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    preset: str = ""
    model: VAEConfig = field(default_factory=lambda: VAEConfig(width=256, n_latents=64, n_layers=2))
    cells: tuple[int, ...] = (32,)
    genes: int = 8_192
    n_genes: int = 36_130
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "bf16"
    steps: int = 3
    repeats: int = 5
    top: int = 8
    json: bool = False
    save: str = ""


CONFIG = GPUProfileConfig


def main(config: GPUProfileConfig) -> Report:
    """Print the table; returns it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"preset": config.preset, "genes": config.genes, "vocabulary": config.n_genes}
    settings |= {"precision": config.precision, "counted": "kernels" if device.type == "cuda" else "operations"}
    report = Report("gpu_profile", settings, save=config.save)
    for cells in config.cells:
        shape = of_preset(config.preset, config.model)
        step_config = BenchVAEStepConfig(
            cells, config.n_genes, config.genes, config.genes, model=shape, precision=config.precision
        )
        for way in ways(config.compile):
            name = f"{way.name}, {cells} cells"
            if why := unable(way, device):
                report.add(Row.not_measured(name, why, "ms"))
                continue
            _, step = calls_of(step_config, way, device)
            if why := failure_of(step, device):
                report.add(Row.not_measured(name, why, "ms"))
                continue
            for row in profiled(step, config, device):
                report.add(replace(row, name=f"{name}: {row.name}"))
            del step
    report.print(config.json)
    return report


def profiled(step: Callable[[], object], config: GPUProfileConfig, device: torch.device) -> list[Row]:
    """Rows of one step that ran before."""
    step_ms = 1e3 * measure(step, config.repeats, device).seconds
    found = kernels_of(step, config.steps, device)
    n, busy_ms = (sum(numbers) for numbers in zip(*found.values()))
    rows = [
        Row("a step", step_ms, "ms"),
        Row("kernels a step", n, ""),
        Row("kernels' time a step", busy_ms, "ms"),
        Row("idle share of a step", max(0.0, 1 - busy_ms / step_ms), "share"),
    ]
    if device.type == "cuda":
        rows.append(Row("host's time a kernel", launch_us(step, config.repeats) / n, "us"))
    by_time = sorted(found.items(), key=lambda item: -item[1][1])[: config.top]
    return [*rows, *(Row(f"{count:g} x {kernel[:90]}", ms, "ms") for kernel, (count, ms) in by_time)]


def launch_us(step: Callable[[], object], repeats: int) -> float:
    """Microseconds until a step has been launched, the least of the repeats: less than the step where the host is ahead
    of the GPU, and as much where it waits for it."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        found.append(1e6 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return min(found)


def kernels_of(step: Callable[[], object], n_steps: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Kernel -> how many of it a step has, and their time in ms; copies and fills count too. On a CPU, of operations
    that call no others."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(n_steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in recorded.events() or []:
        if counts(event, on_gpu):
            kernel = found[event.name]
            kernel[0] += 1 / n_steps
            kernel[1] += (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e3 / n_steps
    return {name: (round(count, 2), ms) for name, (count, ms) in found.items()}


def counts(event: Any, on_gpu: bool) -> bool:
    if on_gpu:
        return event.device_type == DeviceType.CUDA and not event.is_user_annotation
    return event.name.startswith("aten::") and not event.cpu_children


if __name__ == "__main__":
    sys.exit(run_benchmark("gpu_profile"))
