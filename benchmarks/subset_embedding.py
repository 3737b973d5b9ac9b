"""How much of the cells' types is left in their embedding where genes are missing.

Reading order: BenchSubsetEmbeddingConfig, main, draw.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import Report, Row, run_benchmark
from benchmarks.trained import CellsConfig, RealCells, knn_accuracy
from scldm.errors import InputError

PURPOSE = """Train a small autoencoder on real cells, embed them from files that lack 10 to 90 % of its genes, and ask
how often a cell's label is that of most of its 15 nearest cells: among cells that lack the same genes, and among the
cells embedded from all genes."""
EXAMPLE = """
python -m benchmarks.subset_embedding
python -m benchmarks.subset_embedding cells.h5ad=pbmc3k.h5ad cells.top_genes=2000 figure=benchmarks/subset-embedding.png
"""
REMOVED = (10, 20, 30, 40, 50, 60, 70, 80, 90)
JUDGED = 50  # % removed
TARGET = 0.9  # of the accuracy with all genes


@dataclass(frozen=True)
class BenchSubsetEmbeddingConfig:
    """What to measure.

    steps: of training, of 60 cells each
    draws: of the genes that are removed, of which the mean is given
    threads: of torch
    figure: image file to draw; empty draws none
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    cells: CellsConfig = field(default_factory=CellsConfig)
    steps: int = 1_800
    draws: int = 3
    threads: int = 1
    figure: str = ""
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"draws={self.draws} must be at least 1")


CONFIG = BenchSubsetEmbeddingConfig


def main(config: BenchSubsetEmbeddingConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="scldm-bench-") as folder:
        cells = RealCells(config.cells, Path(folder))
        settings = {"cells": cells.n_cells, "genes": cells.n_genes, "steps": config.steps, "draws": config.draws}
        report = Report("subset_embedding", settings)
        third = -(-cells.n_genes // 3)
        words = [f"train.steps={config.steps}", f"data.given.n_genes={third}", f"hardware.threads={config.threads}"]
        model = cells.train("vae", words).model
        full = model.embed(cells.adata)
        of_all = knn_accuracy(full, full, cells.label_n)
        share = float(np.unique(cells.label_n, return_counts=True)[1].max() / cells.n_cells)
        report.add(Row("largest label", share, "share"))
        report.add(Row("all genes: kNN label accuracy", of_all, "share"))
        among: dict[int, list[tuple[float, float]]] = {}
        for percent in REMOVED:
            n_empty = 0
            for k in range(config.draws):
                genes = np.random.default_rng([percent, k]).permutation(cells.n_genes)
                kept = np.sort(genes[round(cells.n_genes * percent / 100) :])
                some = np.flatnonzero(cells.total_of(kept))  # a cell without a count has no embedding
                n_empty += cells.n_cells - len(some)
                left = model.embed(cells.adata[some][:, kept].copy())
                label = cells.label_n[some]
                both = (knn_accuracy(left, left, label), knn_accuracy(left, full[some], label))
                among.setdefault(percent, []).append(both)
            same, whole = np.mean(among[percent], axis=0)
            name = f"{percent} % of the genes removed"
            report.add(Row(f"{name}: kNN label accuracy", float(same), "share"))
            kept_of_all, what = float(same / of_all), f"{name}: of that with all genes"
            judged = percent == JUDGED
            report.add(Row.at_least(what, kept_of_all, "x", TARGET) if judged else Row(what, kept_of_all, "x"))
            report.add(Row(f"{name}: among cells with all genes", float(whole), "share"))
            report.add(Row(f"{name}: cells left out, without a count", n_empty / config.draws, "cells"))
    if config.figure:
        draw(among, of_all, share, Path(config.figure))
    report.print(config.json, config.save)
    return report


def draw(among: dict[int, list[tuple[float, float]]], of_all: float, share: float, path: Path) -> None:
    """Accuracy over the share of genes removed, a point a draw, a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    ax = figure.subplots()
    for k, (name, colour) in enumerate((("same genes removed", "tab:blue"), ("all genes", "tab:orange"))):
        means = [of_all, *(np.mean([one[k] for one in ones]) for ones in among.values())]
        ax.plot([0, *among], means, color=colour, label=f"neighbours embedded from: {name}")
        points = [(percent, one[k]) for percent, ones in among.items() for one in ones]
        ax.plot(*zip(*points), ".", color=colour)
    ax.axhline(TARGET * of_all, color="gray", linestyle="--", label=f"{TARGET:g} x all genes")
    ax.axhline(share, color="gray", linestyle=":", label="largest label")
    ax.set(xlabel="genes removed (%)", ylabel="kNN label accuracy", ylim=(0, 1), xlim=(0, 100))
    ax.legend(fontsize="small", loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(run_benchmark("subset_embedding"))
