"""How much of the cells' types is left in their embedding where genes are missing.

Reading order: BenchSubsetEmbeddingConfig, main, named_rightly, draw.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from sklearn.neighbors import KNeighborsClassifier

import scldm
from benchmarks.quality.cells import SPLIT_COLUMN
from benchmarks.report import Report, Row, run_benchmark
from scldm.errors import InputError
from scldm.evaluate.space import fit_pca, log_normalise

PURPOSE = """Embed cells from files that lack a quarter, a half and three quarters of their genes, and ask how often the
15 nearest training cells name a held-out cell's label rightly: training cells that lack the same genes, and training
cells embedded from all genes. Principal components of the genes that are left say how much is left to know."""
EXAMPLE = """
python -m benchmarks.quality h5ad=pbmc3k.h5ad conditions=cell_type out=runs/quality methods=ours
python -m benchmarks.subset_embedding models=runs/quality/models/ours-0/model,runs/quality/models/ours-1/model \\
    h5ad=runs/quality/cells.h5ad
"""
REMOVED = (25, 50, 75)
JUDGED = 50  # % removed
TARGET = 0.95  # of the accuracy with all genes
NEIGHBOURS, N_COMPONENTS = 15, 50
WAYS = {"same": "training cells with the same genes", "all": "training cells with all genes", "pca": "PCA, same genes"}


@dataclass(frozen=True)
class BenchSubsetEmbeddingConfig:
    """What to measure.

    models: model folders, such as one for each seed; the mean is given
    h5ad: their cells with raw counts, as `benchmarks.quality` writes them to `OUT/cells.h5ad`
    label: obs column with the cells' types
    split: obs column in which training cells say `train`; all others are asked about
    draws: of the genes that are removed, of which the mean is given
    threads: of torch
    figure: image file to draw; empty draws none
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    models: tuple[str, ...]
    h5ad: str
    label: str = "cell_type"
    split: str = SPLIT_COLUMN
    draws: int = 2
    threads: int = 1
    figure: str = ""
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"draws={self.draws} must be at least 1")
        if not self.models:
            raise InputError("models must name at least one model folder")


CONFIG = BenchSubsetEmbeddingConfig


def main(config: BenchSubsetEmbeddingConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    adata = ad.read_h5ad(config.h5ad)
    for column in (config.label, config.split):
        if column not in adata.obs:
            raise InputError(f"h5ad={config.h5ad} has no obs column {column!r}")
    train = pd.Series(adata.obs[config.split]).astype(str).to_numpy() == "train"
    label_n = pd.Series(adata.obs[config.label]).astype(str).to_numpy()
    if train.all() or not train.any():
        raise InputError(f"split={config.split}: training cells and others are needed, and there are none of one kind")
    settings = {"models": len(config.models), "training cells": int(train.sum()), "asked": int((~train).sum())}
    report = Report("subset_embedding", {**settings, "genes": adata.n_vars, "draws": config.draws}, save=config.save)
    models = [scldm.load(folder) for folder in config.models]
    full = [model.embed(adata) for model in models]
    of_all = [named_rightly(x[train], x[~train], label_n, train) for x in full]
    of_pca = pca_accuracy(adata, np.arange(adata.n_vars), label_n, train)
    report.add(Row("all genes: accuracy", float(np.mean(of_all)), "share"))
    report.add(Row("all genes: accuracy of PCA", of_pca, "share"))
    kept_of: dict[int, dict[str, list[float]]] = {}
    for percent in REMOVED:
        found = kept_of.setdefault(percent, {way: [] for way in WAYS})
        n_empty = 0
        for k in range(config.draws):
            genes = np.random.default_rng([percent, k]).permutation(adata.n_vars)
            kept = np.sort(genes[round(adata.n_vars * percent / 100) :])
            some = np.asarray(sp.csr_matrix(adata.X)[:, kept].sum(1)).ravel() > 0  # none without a count is embedded
            n_empty += int((~some).sum())
            label_s, train_s = label_n[some], train[some]
            for model, whole, best in zip(models, full, of_all, strict=True):
                left = model.embed(adata[some][:, kept].copy())
                found["same"].append(named_rightly(left[train_s], left[~train_s], label_s, train_s) / best)
                found["all"].append(named_rightly(whole[some][train_s], left[~train_s], label_s, train_s) / best)
            found["pca"].append(pca_accuracy(adata[some], kept, label_s, train_s) / of_pca)
        for way, title in WAYS.items():
            name, value = f"{percent} % of the genes removed: of that with all genes, {title}", np.mean(found[way])
            judged = percent == JUDGED and way != "pca"
            report.add(Row.at_least(name, float(value), "x", TARGET) if judged else Row(name, float(value), "x"))
        report.add(Row(f"{percent} % of the genes removed: cells without a count", n_empty / config.draws, "cells"))
    if config.figure:
        draw(kept_of, Path(config.figure))
    report.print(config.json)
    return report


def named_rightly(train_ND: np.ndarray, asked_nD: np.ndarray, label_n: np.ndarray, train: np.ndarray) -> float:
    """How often most of the 15 nearest training cells have an asked cell's label."""
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train_ND))).fit(train_ND, label_n[train])
    return float((neighbours.predict(asked_nD) == label_n[~train]).mean())


def pca_accuracy(adata: ad.AnnData, columns: np.ndarray, label_n: np.ndarray, train: np.ndarray) -> float:
    """The same in components of the training cells' log-normalised counts of these genes."""
    log = log_normalise(sp.csr_matrix(adata.X)[:, columns])
    pca = fit_pca(log[train], min(N_COMPONENTS, int(train.sum()) - 1, len(columns) - 1), 0, "training")
    return named_rightly(pca.transform(log[train]), pca.transform(log[~train]), label_n, train)


def draw(kept_of: dict[int, dict[str, list[float]]], path: Path) -> None:
    """What is kept over the share of genes removed: a point for each draw and model, a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    ax = figure.subplots()
    for (way, title), colour in zip(WAYS.items(), ("tab:blue", "tab:orange", "tab:gray"), strict=True):
        means = [1.0, *(float(np.mean(of[way])) for of in kept_of.values())]
        ax.plot([0, *kept_of], means, color=colour, label=title)
        points = [(percent, value) for percent, of in kept_of.items() for value in of[way]]
        ax.plot(*zip(*points), ".", color=colour)
    ax.plot([JUDGED], [TARGET], "k_", ms=20, label=f"wanted: {TARGET:g}")
    ax.set(xlabel="genes removed (%)", ylabel="accuracy, of that with all genes", ylim=(0.5, 1.05), xlim=(0, 100))
    ax.legend(fontsize="small", loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(run_benchmark("subset_embedding"))
