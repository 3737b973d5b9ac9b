"""`scldm bench mcab`: genes pooled into latent tokens, and all genes encoded, by each way of computing it.

Reading order: BenchMCABConfig, main, the pooling, the encoding of all genes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from launch.bench.measure import Cost, measure
from launch.bench.report import Report, Row
from launch.cli import run_verb
from scldm.batch import GeneCounts
from scldm.model import factorised
from scldm.model.all_genes import AllGenesEncoder
from scldm.model.attention import AttentionKind
from scldm.model.vae import VAE, VAEConfig

PURPOSE = """Measure the cross-attention that pools genes into latent tokens, forward and backward, by the formula, by
torch's attention kernels and factorised; and encoding all genes of a vocabulary at the price of the expressed ones.
On a CPU, seconds of CPU time."""
EXAMPLE = """
scldm bench mcab
scldm bench mcab n_given=8192 model.width=512 cells=2 --json
"""


@dataclass(frozen=True)
class BenchMCABConfig:
    """What to measure.

    cells: of a pooling
    n_given: genes that they share
    n_genes: of the vocabulary, all of which are encoded
    density: share of them that a cell expresses
    cells_encoded: of an encoding of all genes
    threads: of torch
    repeats: of everything
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    cells: int = 4
    n_given: int = 2_048
    n_genes: int = 20_000
    density: float = 0.05
    cells_encoded: int = 16
    model: VAEConfig = field(default_factory=lambda: VAEConfig(width=256, n_latents=64, n_layers=2))
    threads: int = 1
    repeats: int = 5
    json: bool = False
    save: str = ""


CONFIG = BenchMCABConfig
KINDS: tuple[AttentionKind, ...] = ("plain", "sdpa", "factorised")


def main(config: BenchMCABConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"cells": config.cells, "given": config.n_given, "vocabulary": config.n_genes, "density": config.density}
    settings |= {"width": config.model.width, "latents": config.model.n_latents, "heads": config.model.n_heads}
    report = Report("bench mcab", settings)
    vaes = {kind: network(config, kind, device) for kind in KINDS}
    on_cpu = device.type == "cpu"

    pooling = {kind: pool_cost(vaes[kind], config, device) for kind in KINDS}
    for kind, cost in pooling.items():
        report.add(Row(f"pooling, {kind}", 1e3 * cost.seconds, "ms"))
        report.add(Row(f"pooling, {kind}: peak memory", cost.peak_bytes / 2**20, "MiB"))
    gain = pooling["plain"].seconds / pooling["factorised"].seconds
    report.add(Row.at_least("pooling, plain / factorised, time", gain, "x", 2 if on_cpu else 10))

    counts, share_G = sparse_counts(config, device)
    every = torch.arange(1, config.n_genes + 1, device=device)
    given, plain, fast = GeneCounts(every, counts), vaes["plain"], vaes["factorised"]
    tables = measure(lambda: AllGenesEncoder(fast, every, share_G), 1, device)
    encoder = AllGenesEncoder(fast, every, share_G)
    report.add(Row("all genes: tables, once per checkpoint", 1e3 * tables.seconds, "ms"))
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "plain": (
            lambda: plain.pool(plain.latent_queries, plain.gene_tokens(given), given.mask),
            lambda: plain.encode(given),
        ),
        "factorised": (
            lambda: factorised.pool(fast.pool, fast.latent_queries, fast.token, fast.gene_embedding, given),
            lambda: fast.encode(given),
        ),
        "expressed genes": (lambda: encoder.pool(counts), lambda: encoder.encode(counts)),
    }
    found: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for name, (pool, encode) in ways.items():
            costs = [measure(work, 1 if name == "plain" else config.repeats, device) for work in (pool, encode)]
            found[name] = (costs[0].seconds, costs[1].seconds)
            report.add(Row(f"all genes, pooling, {name}", 1e3 * costs[0].seconds, "ms"))
            report.add(Row(f"all genes, encode, {name}", 1e3 * costs[1].seconds, "ms"))
        error = (encoder.encode(counts).mean_BLZ - plain.encode(given).mean_BLZ).abs().max()
    for k, (what, target) in enumerate((("pooling", 12), ("encode", 4))):
        gain = found["plain"][k] / found["expressed genes"][k]
        report.add(Row.at_least(f"all genes, {what}, plain / expressed genes, time", gain, "x", target))
    report.add(Row("all genes, largest difference of a latent", float(error), ""))
    report.print(config.json, config.save)
    return report


def network(config: BenchMCABConfig, kind: AttentionKind, device: torch.device) -> VAE:
    """The same weights for every kind."""
    torch.manual_seed(0)
    with device:
        return VAE(replace(config.model, attention=kind), config.n_genes)


def pool_cost(vae: VAE, config: BenchMCABConfig, device: torch.device) -> Cost:
    """Tokens and pooling of shared genes, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(config.n_genes, generator=generator)[: config.n_given] + 1
    counts = torch.poisson(0.5 * torch.rand(config.cells, config.n_given, generator=generator), generator=generator)
    given = GeneCounts(ids, counts.int()).to(device)

    def step() -> None:
        if vae.config.attention == "factorised":
            x_BLD = factorised.pool(vae.pool, vae.latent_queries, vae.token, vae.gene_embedding, given)
        else:
            x_BLD = vae.pool(vae.latent_queries, vae.gene_tokens(given), given.mask)
        x_BLD.square().mean().backward()
        vae.zero_grad(set_to_none=True)

    return measure(step, config.repeats, device)


def sparse_counts(config: BenchMCABConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counts, and the share of cells that express each gene: a few genes in most cells, most genes in a few."""
    generator = torch.Generator().manual_seed(2)
    share_G = torch.rand(config.n_genes, generator=generator) ** (1 / config.density - 1)
    shape = (config.cells_encoded, config.n_genes)
    expressed = torch.rand(shape, generator=generator) < share_G
    counts = (expressed * (1 + torch.poisson(torch.ones(shape), generator=generator))).int()
    return counts.to(device), share_G


if __name__ == "__main__":
    sys.exit(run_verb("bench mcab", sys.argv[1:]))
