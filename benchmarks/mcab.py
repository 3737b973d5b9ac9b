"""Genes pooled into latent tokens, latent tokens read out for genes, and all genes of a vocabulary
encoded, by each way of computing it.

Reading order: BenchMCABConfig, main, cross_attention, its targets, the encoding of all genes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.measure import Cost, failure_of, measure, measure_in_turn
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
from scldm.model.all_genes import AllGenesEncoder
from scldm.model.flops import vae_flops
from scldm.model.vae import VAE, VAEConfig
from scldm.tf32 import tf32_products

PURPOSE = """Measure both cross-attentions, forward and with backward, by the formula, by torch's attention kernels
(compiled too, if asked), factorised and in fused kernels; and encoding all genes of a vocabulary at the price of the
expressed ones. On a CPU, seconds of CPU time."""
EXAMPLE = """
python -m benchmarks.mcab
python -m benchmarks.mcab preset=270m cells=1 given=2048,8192 asked=2048,36130 n_genes=36130 cells_encoded=0
"""


@dataclass(frozen=True)
class BenchMCABConfig:
    """What to measure.

    cells: that share the genes
    given: numbers of genes to pool
    asked: numbers of genes to read out
    n_genes: of the vocabulary, all of which are encoded
    density: share of them that a cell expresses
    cells_encoded: of an encoding of all genes; 0 leaves it out
    preset: name of a shape in configs/vae; empty takes `model`
    compile: torch.compile torch's kernels too, the strongest rival; a minute or two each on a CPU
    precision: fp32, or bf16 by autocast
    threads: of torch
    repeats: of everything
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    cells: int = 4
    given: tuple[int, ...] = (2_048,)
    asked: tuple[int, ...] = (2_048,)
    n_genes: int = 20_000
    density: float = 0.05
    cells_encoded: int = 16
    preset: str = ""
    model: VAEConfig = field(default_factory=lambda: VAEConfig(width=256, n_latents=64, n_layers=2))
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    repeats: int = 5
    json: bool = False
    save: str = ""


CONFIG = BenchMCABConfig


def main(config: BenchMCABConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(config, model=of_preset(config.preset, config.model))
    shape = config.model
    settings = {"cells": config.cells, "vocabulary": config.n_genes, "density": config.density}
    settings |= {"width": shape.width, "latents": shape.n_latents, "heads": shape.n_heads}
    report = Report("mcab", {**settings, "precision": config.precision, "threads": config.threads}, save=config.save)
    most = peak_flops(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    report.add(Row("large matrix product", most / 1e9, "GFLOP/s"))
    for n in config.given:
        found = cross_attention(report, config, "pooling", n, most, device)
        if (shape.width, shape.n_latents, n) == (256, 64, 2_048):
            pooling_targets(report, found, device)
    for n in config.asked:
        cross_attention(report, config, "reading out", n, most, device)
    if config.cells_encoded:
        all_genes(report, config, device)
    report.print(config.json)
    return report


def network(config: BenchMCABConfig, way: Way, device: torch.device) -> VAE:
    """The cross-attentions alone, with the same weights for every way."""
    torch.manual_seed(0)
    with device:
        return VAE(replace(config.model, attention=way.kind, n_layers=0), config.n_genes)


def cross_attention(
    report: Report, config: BenchMCABConfig, part: str, n: int, most: float, device: torch.device
) -> dict[str, Cost]:
    """One of the two by every way: forward, and with backward, which is what is returned by the way's name."""
    encodes = part == "pooling"
    flops = vae_flops(replace(config.model, n_layers=0), config.cells, n, n)
    work_flops = flops["tokens"] + flops["pool"] if encodes else flops["unpool"]
    measured = [way for way in ways(config.compile) if not unable(way, device)]
    calls = {way.name: forward_of(config, way, encodes, n, device) for way in measured}

    def forward(call: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            call()

    def step(call: Callable[[], Tensor]) -> None:
        loss = call().square().mean()
        with tf32_products(config.precision == "bf16"):  # as engines have it
            loss.backward()

    found: dict[str, Cost] = {}
    failed: dict[str, str] = {}
    for what, run, times in (("forward", forward, 1), ("forward + backward", step, 3)):
        works = {name: partial(run, call) for name, call in calls.items() if name not in failed}
        # what is compiled is compiled
        failed |= {name: why for name, work in works.items() if (why := failure_of(work, device))}
        works = {name: work for name, work in works.items() if name not in failed}
        found = measure_in_turn(works, config.repeats, device)
        for way in ways(config.compile):
            name = f"{part}, {n:,} genes, {way.name}, {what}"
            if why := unable(way, device) or failed.get(way.name):
                report.add(Row.not_measured(name, why, "ms"))
                continue
            cost = found[way.name]
            report.add(Row(name, 1e3 * cost.seconds, "ms"))
            report.add(Row(f"{name}: peak memory", cost.peak_bytes / 2**20, "MiB"))
            share = times * work_flops / cost.seconds / most
            report.add(Row(f"{name}: share of the matrix product's FLOP/s", share, "x"))
    for way in (PLAIN, OPPONENT):
        if way.name in found and FACTORISED.name in found:
            gain = found[way.name].seconds / found[FACTORISED.name].seconds
            report.add(Row(f"{part}, {n:,} genes, {way.name} / factorised, forward + backward", gain, "x"))
    return found


def forward_of(config: BenchMCABConfig, way: Way, encodes: bool, n: int, device: torch.device) -> Callable[[], Tensor]:
    """The cross-attention on inputs that are the same for every way; its gradients are of all its weights."""
    vae = network(config, way, device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(config.n_genes, generator=generator)[:n] + 1
    counts = torch.poisson(0.5 * torch.rand(config.cells, n, generator=generator), generator=generator)
    latent_shape = (config.cells, config.model.n_latents, config.model.latent_width)
    latent_BLZ = torch.randn(latent_shape, generator=generator).to(device).requires_grad_()
    given = GeneCounts(ids, counts.int(), padded=False).to(device)

    def compute() -> Tensor:
        vae.zero_grad(set_to_none=True)
        return run()

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
            return call(given).mean_BLZ if encodes else call(latent_BLZ, given.gene_ids).value_BQ

    call = as_way(way, vae.encode if encodes else vae.decode, device)
    return compute


def pooling_targets(report: Report, found: dict[str, Cost], device: torch.device) -> None:
    """What is asked of pooling at this shape, on a CPU and on a GPU."""
    for over, way, least, on in ((PLAIN, FACTORISED, 2, "cpu"), (SDPA, FUSED, 1.2, "cuda")):
        name = f"pooling, {over.name} / {way.name}, forward + backward, {'CPU' if on == 'cpu' else 'GPU'}"
        if device.type == on and over.name in found and way.name in found:
            report.add(Row.at_least(name, found[over.name].seconds / found[way.name].seconds, "x", least))
        else:
            why = NO_GPU if on == "cuda" else "not on a CPU"
            report.add(Row.not_measured(name, why, "x", f">= {least:g}"))


# --- all genes of a vocabulary ---------------------------------------------------------------------------------------


def all_genes(report: Report, config: BenchMCABConfig, device: torch.device) -> None:
    """Pooling alone, and the whole encoder; the targets are those of a vocabulary of 20,000 at a density of 5 %."""
    counts, share_G = sparse_counts(config, device)
    every = torch.arange(1, config.n_genes + 1, device=device)
    given = GeneCounts(every, counts, padded=False)
    found: dict[str, list[float]] = {}
    latents: dict[str, Tensor] = {}
    for part, n_layers in (("pooling", 0), ("encode", config.model.n_layers)):
        torch.manual_seed(0)
        with device:
            plain, fast = (
                VAE(replace(config.model, attention=kind, n_layers=n_layers), config.n_genes)
                for kind in ("plain", "factorised")
            )
        fast.load_state_dict(plain.state_dict())
        encoder = AllGenesEncoder(fast, every, share_G)
        if part == "pooling":
            tables = measure(lambda fast=fast: AllGenesEncoder(fast, every, share_G), 1, device)
            report.add(Row("all genes: tables, once per checkpoint", 1e3 * tables.seconds, "ms"))
        calls: dict[str, Callable[[], Tensor]] = {
            "plain": lambda plain=plain: plain.encode(given).mean_BLZ,
            "factorised": lambda fast=fast: fast.encode(given).mean_BLZ,
            "expressed genes": lambda encoder=encoder: encoder.encode(counts).mean_BLZ,
        }
        with torch.no_grad():
            latents = {name: call() for name, call in calls.items()}
            for name, cost in measure_in_turn(calls, config.repeats, device).items():
                found.setdefault(name, []).append(cost.seconds)
                report.add(Row(f"all genes, {part}, {name}", 1e3 * cost.seconds, "ms"))
    for k, (part, target) in enumerate((("pooling", 12), ("encode", 4))):
        gain = found["plain"][k] / found["expressed genes"][k]
        report.add(Row.at_least(f"all genes, {part}, plain / expressed genes", gain, "x", target))
    error = (latents["expressed genes"] - latents["plain"]).abs().max()
    report.add(Row("all genes, largest difference of a latent", float(error), ""))


def sparse_counts(config: BenchMCABConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counts, and the share of cells that express each gene: a few genes in most cells, most genes in a few."""
    generator = torch.Generator().manual_seed(2)
    share_G = torch.rand(config.n_genes, generator=generator) ** (1 / config.density - 1)
    shape = (config.cells_encoded, config.n_genes)
    expressed = torch.rand(shape, generator=generator) < share_G
    counts = (expressed * (1 + torch.poisson(torch.ones(shape), generator=generator))).int()
    return counts.to(device), share_G


if __name__ == "__main__":
    sys.exit(run_benchmark("mcab"))
