"""A training step of the autoencoder by each way of computing attention, on the same inputs.

Reading order: BenchVAEStepConfig, main, calls_of, torchs_fused_attention, auto_rows, PublishedToken, targets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import Cost, failure_of, measure_in_turn
from benchmarks.report import Report, Row, run_benchmark
from benchmarks.ways import (
    FACTORISED,
    FUSED,
    NO_GPU,
    OPPONENT,
    PLAIN,
    SDPA,
    Way,
    as_way,
    of_preset,
    peak_flops,
    unable,
    ways,
)
from scldm.batch import GeneCounts
from scldm.model.flops import vae_flops
from scldm.model.vae import VAE, VAEConfig, chosen
from scldm.tf32 import tf32_products
from scldm.train.optim import OptimConfig, make_optimizer

PURPOSE = """Measure a training step of the autoencoder (forward, backward, AdamW) and its forward pass alone, by the
formula, by torch's attention kernels (compiled too, if asked), factorised and in fused kernels, beside the network of
the published code: time, peak memory, FLOPs. On a CPU, seconds of CPU time."""
EXAMPLE = """
python -m benchmarks.vae_step cells=16
python -m benchmarks.vae_step own_sets=true
python -m benchmarks.vae_step preset=20m cells=1 n_genes=36130 n_given=8192 n_asked=36130 model.gene_chunk=4096
python -m benchmarks.vae_step preset=dentate_gyrus cells=128 n_genes=17002 n_given=4096 n_asked=4096 precision=bf16
"""


@dataclass(frozen=True)
class BenchVAEStepConfig:
    """What to measure.

    cells: of a step
    n_genes: of the vocabulary
    n_given: genes given to the encoder
    n_asked: genes asked of the decoder: of the given ones, or those and more
    own_sets: draw these genes for each cell, as the paper does; false lets the cells share them
    preset: name of a shape in configs/vae; empty takes `model`
    gene_chunk: genes that the decoder takes at once, made again in backward; 0 takes all
    compile: torch.compile torch's kernels too, the strongest rival, and the blocks of `auto`; minutes on a CPU
    precision: fp32, or bf16 by autocast
    threads: of torch
    repeats: of a step
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    cells: int = 4
    n_genes: int = 20_000
    n_given: int = 2_048
    n_asked: int = 2_048
    own_sets: bool = False
    preset: str = ""
    model: VAEConfig = field(default_factory=lambda: VAEConfig(width=256, n_latents=64, n_layers=2))
    gene_chunk: int = 0
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    repeats: int = 5
    json: bool = False
    save: str = ""


CONFIG = BenchVAEStepConfig
# the network of the published code: of a token embedding times log1p(count), no linear ways, padding attended
PUBLISHED = Way("published", "sdpa")
BLOCKS = Way("auto, compiled", "auto")  # with model.compile=true: the transformer blocks alone
# what is asked of a GPU, in bf16
GPU_TARGETS = {
    f"{OPPONENT.name} / fused, time, 20m, 128 cells x 8,192, GPU": ">= 1.2",
    f"fused / {OPPONENT.name}, peak memory, 20m, 128 cells x 8,192, GPU": "<= 0.25",
    f"{SDPA.name} / fused, time, 20m, 32 cells, 8,000 genes given, 36,130 asked, GPU": ">= 1.2",
    "dentate_gyrus at batch 128, peak memory, GPU": "<= 2 GB",
}


def main(config: BenchVAEStepConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = of_preset(config.preset, config.model)
    chunked = replace(shape, gene_chunk=config.gene_chunk, recompute=config.gene_chunk > 0)
    config = replace(config, model=chunked)
    settings = {"cells": config.cells, "given": config.n_given, "asked": config.n_asked, "precision": config.precision}
    settings |= {"width": shape.width, "latents": shape.n_latents, "layers": shape.n_layers, "threads": config.threads}
    report = Report(
        "vae_step", {**settings, "gene_chunk": config.gene_chunk, "own_sets": config.own_sets}, save=config.save
    )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    most = peak_flops(device, dtype)
    report.add(Row("large matrix product", most / 1e9, "GFLOP/s"))
    flops = sum(vae_flops(shape, config.cells, config.n_given, config.n_asked).values())
    every = [*ways(config.compile), *([BLOCKS] if config.compile else []), PUBLISHED]
    calls: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    for way in every:
        if not (why := unable(way, device)):
            calls[way.name] = calls_of(config, way, device)
            # the optimizer's moments are made, and what is compiled is compiled
            why = next(filter(None, (failure_of(call, device) for call in calls[way.name])), "")
        if why:
            calls.pop(way.name, None)  # with what it holds of the GPU's memory
            report.add(Row.not_measured(way.name, why, "ms"))
    if device.type == "cuda" and SDPA.name in calls:
        report.add(torchs_fused_attention(calls[SDPA.name][1], device))
    forwards = measure_in_turn({name: forward for name, (forward, _) in calls.items()}, config.repeats, device)
    for name, cost in forwards.items():
        report.add(Row(f"{name}, forward", 1e3 * cost.seconds, "ms"))
    steps = measure_in_turn({name: step for name, (_, step) in calls.items()}, config.repeats, device)
    for name, cost in steps.items():
        report.add(Row(name, 1e3 * cost.seconds, "ms"))
        report.add(Row(f"{name}: peak memory", cost.peak_bytes / 2**20, "MiB"))
        speed = 3 * flops / cost.seconds
        report.add(Row(f"{name}: FLOPs of the formula by time", speed / 1e9, "GFLOP/s"))
        report.add(Row(f"{name}: share of the matrix product's FLOP/s", speed / most, "x"))
    auto_rows(report, chosen(replace(shape, attention="auto"), device, dtype).way, steps)
    targets(report, config, steps, device)
    report.print(config.json)
    return report


def calls_of(
    config: BenchVAEStepConfig, way: Way, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass, and a whole step, on counts and weights that are the same for every way."""
    torch.manual_seed(0)
    shape = replace(config.model, attention=way.kind, compile=way is BLOCKS)
    most = min(max(config.n_given, config.n_asked), config.n_genes)
    if way is PUBLISHED:
        shape = replace(shape, token="linear", direct=False)
    with device:
        vae = VAE(shape, config.n_genes)
        if way is PUBLISHED:
            vae.token = PublishedToken()  # pyright: ignore[reportAttributeAccessIssue]  # of its own kind
        sets = torch.stack([torch.randperm(config.n_genes)[:most] + 1 for _ in range(config.cells)])
        counts = torch.poisson(0.5 * torch.rand(config.cells, most)).int()
    ids = sets if config.own_sets else sets[0]
    given = GeneCounts(ids[..., : config.n_given], counts[:, : config.n_given], padded=False)
    asked = given
    if config.n_asked != config.n_given:
        asked = GeneCounts(ids[..., : config.n_asked], counts[:, : config.n_asked])
    library_size_B = asked.counts_BS.sum(1).float()
    # the published code takes torch's as it comes
    optimizer = torch.optim.AdamW(vae.parameters()) if way is PUBLISHED else make_optimizer(OptimConfig(), vae)
    run = as_way(way, vae, device)
    is_bf16 = config.precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16) if is_bf16 else nullcontext()

    def step() -> None:
        with autocast:
            _, predicted = run(given, asked.gene_ids)
        loss = predicted.nll_B(asked, library_size_B).mean()
        with tf32_products(is_bf16 and way is not PUBLISHED):  # as engines have it
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward() -> None:
        with torch.no_grad(), autocast:
            run(given, asked.gene_ids)

    return forward, step


def torchs_fused_attention(step: Callable[[], object], device: torch.device) -> Row:
    """Whether a step runs where torch may take its fused kernels of attention alone, not the formula in disguise."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        why = failure_of(step, device)
    name = f"sdpa: runs by torch's fused attention{why and f': {why}'}"
    return Row.at_least(name, float(not why), "", 1)


def auto_rows(report: Report, auto: str, steps: dict[str, Cost]) -> None:
    """What `auto` takes, beside the fastest way of attention, and beside itself with compiled blocks."""
    name = f"auto, here {auto}, / the fastest way, time"
    if auto not in steps:
        report.add(Row.not_measured(name, f"{auto} failed", "x", "<= 1.05"))
        return
    fastest = min(cost.seconds for way, cost in steps.items() if way not in (PUBLISHED.name, BLOCKS.name))
    report.add(Row.at_most(name, steps[auto].seconds / fastest, "x", 1.05))
    if BLOCKS.name in steps:
        gain = steps[auto].seconds / steps[BLOCKS.name].seconds
        report.add(Row(f"auto, here {auto}, / {BLOCKS.name}, time", gain, "x"))


class PublishedToken(nn.Module):
    """A gene's embedding times log1p of its count, as the published code has it."""

    def forward(self, embedded: Tensor, counts_BS: Tensor) -> Tensor:
        return embedded * torch.log1p(counts_BS.to(embedded.dtype))[..., None]


def targets(report: Report, config: BenchVAEStepConfig, steps: dict[str, Cost], device: torch.device) -> None:
    """Ratios, and what is asked of a step, on a CPU and on a GPU."""
    on_cpu, shape, plain, fast = device.type == "cpu", config.model, steps.get(PLAIN.name), steps.get(FACTORISED.name)
    sizes = shape.width, shape.n_latents, config.n_given, config.gene_chunk
    judged = on_cpu and sizes == (256, 64, 2_048, 0) and not config.own_sets
    for name, cost in steps.items():
        if name != FACTORISED.name and fast:
            row = Row(f"{name} / factorised, time", cost.seconds / fast.seconds, "x")
            least = 1.4 if judged and name == PLAIN.name else 1.5 if config.own_sets and name == PUBLISHED.name else 0
            report.add(Row.at_least(row.name, cost.seconds / fast.seconds, "x", least) if on_cpu and least else row)
    if fast and plain:
        memory = fast.peak_bytes / max(plain.peak_bytes, 1)
        name = "factorised / plain, peak memory"
        report.add(Row.at_most(name, memory, "x", 0.6) if judged else Row(name, memory, "x"))

    if judged:
        for name, target in GPU_TARGETS.items():
            report.add(Row.not_measured(name, NO_GPU, "x" if "GB" not in target else "GB", target.removesuffix(" GB")))
    if on_cpu or config.precision != "bf16" or FUSED.name not in steps:
        return
    fused = steps[FUSED.name]
    against_opponent, memory_of_it, at_census, dentate_gyrus = GPU_TARGETS
    at, opponent = (config.preset, config.cells, config.n_given, config.n_asked), steps.get(OPPONENT.name)
    if opponent and at == ("20m", 128, 8_192, 8_192) and not config.own_sets:
        report.add(Row.at_least(against_opponent, opponent.seconds / fused.seconds, "x", 1.2))
        report.add(Row.at_most(memory_of_it, fused.peak_bytes / opponent.peak_bytes, "x", 0.25))
    if SDPA.name in steps and at == ("20m", 32, 8_000, 36_130) and not config.own_sets:
        report.add(Row.at_least(at_census, steps[SDPA.name].seconds / fused.seconds, "x", 1.2))
    if config.preset == "dentate_gyrus" and config.cells == 128:
        report.add(Row.at_most(dentate_gyrus, fused.peak_bytes / 1e9, "GB", 2))


if __name__ == "__main__":
    sys.exit(run_benchmark("vae_step"))
