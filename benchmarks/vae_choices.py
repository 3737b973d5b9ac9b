"""What choices of the autoencoder's shape and training do to its likelihood on real cells.

Reading order: BenchVAEChoicesConfig, main, the studies.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.report import Report, Row, run_benchmark
from benchmarks.trained import CellsConfig, RealCells, Trained, knn_accuracy

PURPOSE = """Train small autoencoders on real cells that differ in one choice, and compare them on held-out cells, all
genes of them: `latents`, deterministic and normalised or with a KL term of growing weight; `heads` of the decoder's
cross-attention; `decode_few`, a random part of the genes asked in training, at equal steps and at equal CPU time."""
EXAMPLE = """
python -m benchmarks.vae_choices study=latents
python -m benchmarks.vae_choices study=decode_few cells.h5ad=pbmc3k.h5ad cells.top_genes=1000 steps=1200
"""
KL_WEIGHTS = (0.0, 1e-3, 1e-2, 1.0)
HEADS = (1, 4)
PARTS = (1, 4, 16)
ACTIVE = 0.01  # variance over the cells of a posterior mean (Burda et al. 2016, "Importance weighted autoencoders")


@dataclass(frozen=True)
class BenchVAEChoicesConfig:
    """What to compare.

    study: latents, heads or decode_few
    steps: of training, of 60 cells each
    seeds: trainings per choice, of which the mean is given
    threads: of torch
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    study: Literal["latents", "heads", "decode_few"]
    cells: CellsConfig = field(default_factory=CellsConfig)
    steps: int = 1_800
    seeds: int = 2
    threads: int = 1
    json: bool = False
    save: str = ""


CONFIG = BenchVAEChoicesConfig


def main(config: BenchVAEChoicesConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="scldm-bench-") as folder:
        cells = RealCells(config.cells, Path(folder))
        settings = {"study": config.study, "cells": cells.n_cells, "genes": cells.n_genes}
        report = Report("vae_choices", {**settings, "steps": config.steps, "seeds": config.seeds}, save=config.save)
        {"latents": latents, "heads": heads, "decode_few": decode_few}[config.study](config, cells, report)
    report.print(config.json)
    return report


def trainings(config: BenchVAEChoicesConfig, cells: RealCells, name: str, steps: int, *words: str) -> list[Trained]:
    """One for each seed. A third of the genes is given, the same third asked, unless the words say otherwise."""
    third = -(-cells.n_genes // 3)
    common = [f"data.given.n_genes={third}", f"train.steps={steps}", f"hardware.threads={config.threads}"]
    return [
        cells.train(f"{name}-{seed}", [*common, f"train.seed={seed}", f"data.seed={seed}", *words])
        for seed in range(config.seeds)
    ]


def mean(trained: list[Trained], metric: str) -> float:
    return float(np.mean([one.metrics[metric] for one in trained]))


def spread(name: str, trained: list[Trained], metric: str, unit: str, by: int = 1) -> Row:
    """From the smallest to the largest of the seeds, each over `by`; of one seed nothing is known of it."""
    name = f"{name}: between seeds"
    if len(trained) == 1:
        return Row.not_measured(name, "one seed", unit)
    return Row(name, float(np.ptp([one.metrics[metric] for one in trained])) / by, unit)


# --- the studies ---------------------------------------------------------------------------------------------------


def latents(config: BenchVAEChoicesConfig, cells: RealCells, report: Report) -> None:
    """The weight of the KL term; 0 is a point whose tokens are normalised."""
    for weight in KL_WEIGHTS:
        found = trainings(config, cells, f"kl-{weight}", config.steps, f"model.kl_weight={weight}")
        embedded = [one.model.embed(cells.adata) for one in found]
        name = f"KL weight {weight:g}" if weight else "deterministic, normalised"
        report.add(Row(f"{name}: validation NLL", mean(found, "nll"), "nats/cell"))
        report.add(spread(name, found, "nll", "nats/cell"))
        if weight:
            report.add(Row(f"{name}: KL", mean(found, "kl"), "nats/cell"))
        active = np.mean([(x.var(0) > ACTIVE).mean() for x in embedded])
        accuracy = np.mean([knn_accuracy(x, x, cells.label_n) for x in embedded])
        report.add(Row(f"{name}: latent numbers that vary", float(active), "share"))
        report.add(Row(f"{name}: kNN label accuracy", float(accuracy), "share"))


def heads(config: BenchVAEChoicesConfig, cells: RealCells, report: Report) -> None:
    """Heads of the decoder's cross-attention: one is cheap (identity 4), several are said to see more."""
    found = {n: trainings(config, cells, f"heads-{n}", config.steps, f"model.decoder_cross_heads={n}") for n in HEADS}
    for n, trained in found.items():
        name = f"{n} decoder head{'s' if n > 1 else ''}"
        report.add(Row(f"{name}: validation NLL", mean(trained, "nll"), "nats/cell"))
        report.add(spread(name, trained, "nll", "nats/cell"))
        report.add(Row(f"{name}: training", float(np.mean([one.seconds for one in trained])), "CPU-s"))
    gain = mean(found[1], "nll") / mean(found[4], "nll") - 1
    report.add(Row("1 head above 4 heads, NLL", 100 * gain, "%"))


def decode_few(config: BenchVAEChoicesConfig, cells: RealCells, report: Report) -> None:
    """All genes given, and a random part of them asked; then as many steps as take the CPU time of asking all."""
    at_equal_steps: dict[int, list[Trained]] = {}
    for part in PARTS:
        asked = max(1, cells.n_genes // part)
        words = [f"data.given.{key}" for key in ("policy=all", "n_genes=0", "share=0", "gene_set_group=1")]
        words += ["data.asked.policy=random", f"data.asked.n_genes={asked}", "data.asked.gene_set_group=60"]
        found = at_equal_steps[part] = trainings(config, cells, f"steps-{part}", config.steps, *words)
        _add_nll(report, f"1/{part} of the genes asked, equal steps", found, cells)
        report.add(Row(f"1/{part} of the genes asked, equal steps: training", _seconds(found), "CPU-s"))
        if part == 1:
            continue
        steps = round(config.steps * _seconds(at_equal_steps[1]) / _seconds(found))
        found = trainings(config, cells, f"time-{part}", steps, *words)
        _add_nll(report, f"1/{part} of the genes asked, equal time", found, cells)
        report.add(Row(f"1/{part} of the genes asked, equal time: steps", steps, "steps"))
        report.add(Row(f"1/{part} of the genes asked, equal time: training", _seconds(found), "CPU-s"))


def _add_nll(report: Report, name: str, found: list[Trained], cells: RealCells) -> None:
    report.add(Row(f"{name}: validation NLL, all genes", mean(found, "nll") / cells.n_genes, "nats/gene"))
    report.add(spread(name, found, "nll", "nats/gene", cells.n_genes))


def _seconds(found: list[Trained]) -> float:
    return float(np.mean([one.seconds for one in found]))


if __name__ == "__main__":
    sys.exit(run_benchmark("vae_choices"))
