"""`scldm bench vae-step`: a training step of the autoencoder by each way of computing attention, on the same inputs.

Reading order: BenchVAEStepConfig, main.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from launch.bench.measure import Cost, measure
from launch.bench.report import Report, Row
from launch.cli import run_verb
from scldm.batch import GeneCounts
from scldm.model.attention import AttentionKind
from scldm.model.flops import vae_flops
from scldm.model.vae import VAE, VAEConfig

PURPOSE = """Measure a training step of the autoencoder (forward, backward, AdamW) by the formula, by torch's attention
kernels, compiled or not, and by the factorised path: time, peak memory, FLOPs. On a CPU, seconds of CPU time."""
EXAMPLE = """
scldm bench vae-step cells=16
scldm bench vae-step model.width=64 model.n_latents=8 model.n_layers=1 cells=30 n_given=255 n_asked=255 n_genes=765
"""


@dataclass(frozen=True)
class BenchVAEStepConfig:
    """What to measure.

    cells: of a step
    n_genes: of the vocabulary
    n_given: genes that all cells share, given to the encoder
    n_asked: genes asked of the decoder: of the given ones, or those and more
    compile: torch.compile torch's kernels' path too, the strongest other one; minutes on a CPU
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
    model: VAEConfig = field(default_factory=lambda: VAEConfig(width=256, n_latents=64, n_layers=2))
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    repeats: int = 5
    json: bool = False
    save: str = ""


CONFIG = BenchVAEStepConfig


def main(config: BenchVAEStepConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = config.model
    settings = {"cells": config.cells, "given": config.n_given, "asked": config.n_asked, "precision": config.precision}
    settings |= {"width": shape.width, "latents": shape.n_latents, "layers": shape.n_layers, "threads": config.threads}
    report = Report("bench vae-step", settings)
    ways: list[tuple[str, AttentionKind, bool]] = [("plain", "plain", False), ("sdpa", "sdpa", False)]
    if config.compile:
        ways.append(("sdpa, compiled", "sdpa", True))
    ways.append(("factorised", "factorised", False))
    costs = {name: step_cost(config, kind, compiled, device) for name, kind, compiled in ways}
    flops = 3 * sum(vae_flops(shape, config.cells, config.n_given, config.n_asked).values())
    for name, cost in costs.items():
        report.add(Row(name, 1e3 * cost.seconds, "ms"))
        report.add(Row(f"{name}: peak memory", cost.peak_bytes / 2**20, "MiB"))
        report.add(Row(f"{name}: FLOPs of the formula by time", flops / cost.seconds / 1e9, "GFLOP/s"))
    fast, plain = costs["factorised"], costs["plain"]
    for name, cost in costs.items():
        if name != "factorised":
            target = 1.4 if name == "plain" and device.type == "cpu" else None
            report.add(_ratio(f"{name} / factorised, time", cost.seconds / fast.seconds, target))
    memory = fast.peak_bytes / max(plain.peak_bytes, 1)
    report.add(Row.at_most("factorised / plain, peak memory", memory, "x", 0.6))
    report.print(config.json, config.save)
    return report


def _ratio(name: str, value: float, target: float | None) -> Row:
    return Row(name, value, "x") if target is None else Row.at_least(name, value, "x", target)


def step_cost(config: BenchVAEStepConfig, kind: AttentionKind, compiled: bool, device: torch.device) -> Cost:
    """Of one step on counts and weights that are the same for every way."""
    torch.manual_seed(0)
    with device:
        vae = VAE(replace(config.model, attention=kind), config.n_genes)
        ids = torch.randperm(config.n_genes)[: max(config.n_given, config.n_asked)] + 1
        counts = torch.poisson(0.5 * torch.rand(config.cells, len(ids))).int()
    given = GeneCounts(ids[: config.n_given], counts[:, : config.n_given])
    asked = GeneCounts(ids[: config.n_asked], counts[:, : config.n_asked])
    library_size_B = asked.counts_BS.sum(1).float()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4)
    run = torch.compile(vae) if compiled else vae
    autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()

    def step() -> None:
        with autocast:
            _, predicted = run(given, asked.gene_ids)
        predicted.nll_B(asked, library_size_B).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the optimizer's moments are made, and what is compiled is compiled
    return measure(step, config.repeats, device)


if __name__ == "__main__":
    sys.exit(run_verb("bench vae-step", sys.argv[1:]))
