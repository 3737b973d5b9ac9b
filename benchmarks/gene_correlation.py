"""`python -m benchmarks.gene_correlation`: where generated cells lose gene-gene correlation, and how much of it so few
cells can show.

A correlation of two genes among 30 cells is mostly chance. So r of two sets' correlations is far below 1, even of real
cells. What two disjoint sets share is no chance: the covariance of their correlations, over pairs of genes.
    r: of a set's correlations with those of the test cells, as `benchmarks.quality` takes it
    own r: of two sets of one kind. A perfect model of such cells would reach it
    amount: covariance of the two sets' correlations, over that of real cells
    agreement: covariance with the test cells', over the root of both amounts. Chance does not lower it: 1 is right
Reading order: BenchGeneCorrelationConfig, main, Groups, sets_of, decoded_cells.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import scldm
from benchmarks.quality.cells import SPLIT_COLUMN, LabelledCells
from benchmarks.quality.methods.gaussian import negative_binomial
from benchmarks.report import Report, Row, run_benchmark
from launch.evaluation.reconstructed_cells import decoded, encoded, known_genes
from scldm.errors import InputError
from scldm.evaluate.genes import N_CORRELATED, correlations, pearson
from scldm.evaluate.space import log_normalise
from scldm.pretrained import Pretrained

PURPOSE = """Take apart where generated cells lose gene-gene correlation within combinations: expected counts of
training cells' latents, draws of them without and with the dispersion, with library sizes of other cells, generated
cells. Real cells say what can be reached."""
EXAMPLE = """
python -m benchmarks.quality h5ad=kang.h5ad conditions=cell_type,treatment out=runs/quality methods=ours
python -m benchmarks.gene_correlation h5ad=runs/quality/cells.h5ad conditions=cell_type,treatment \\
    models=runs/quality/models/ours-0/model,runs/quality/models/ours-1/model
"""
REAL = "training cells"


@dataclass(frozen=True)
class BenchGeneCorrelationConfig:
    """What to measure.

    models: model folders, such as one for each seed; means are given
    h5ad: their cells with raw counts, as `benchmarks.quality` writes them to `OUT/cells.h5ad`
    conditions: obs columns within whose combinations genes are correlated
    split: obs column that says train, validation or test
    min_cells: a combination counts with at least so many test cells, and twice as many for training as for the test
    draws: of disjoint sets
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    models: tuple[str, ...]
    h5ad: str
    conditions: tuple[str, ...]
    split: str = SPLIT_COLUMN
    min_cells: int = 20
    draws: int = 6
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        if not self.models or not self.conditions:
            raise InputError("models and conditions must name at least one each")
        if self.draws < 1 or self.min_cells < 3:
            raise InputError(f"draws={self.draws} must be at least 1, min_cells={self.min_cells} at least 3")


CONFIG = BenchGeneCorrelationConfig
Logs = Mapping[str, sp.csr_matrix]  # combination -> log-normalised cells


def main(config: BenchGeneCorrelationConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(1)
    cells, split = read_cells(config)
    groups = Groups.of(cells, split, config)
    n = {"combinations": len(groups.test), "test cells": sum(map(len, groups.test.values()))}
    report = Report("gene_correlation", {"models": len(config.models), **n, "draws": config.draws}, save=config.save)
    real = groups.compare([groups.halves(cells.counts, k) for k in range(config.draws)])
    amount = (real["own"] + 2 * real["shared"]) / 3  # three sets of real cells, three pairs of them
    found: dict[str, list[dict[str, float]]] = {}
    for path in config.models:
        for name, pairs in sets_of(scldm.load(path), cells, groups, config):
            found.setdefault(name, []).append(groups.compare(pairs))
    means = {name: {key: float(np.mean([of[key] for of in every])) for key in real} for name, every in found.items()}
    for name, of in {REAL: real, **means}.items():
        report.add(Row(f"{name}: r", of["r"], ""))
        report.add(Row(f"{name}: own r", of["own r"], ""))
        report.add(Row(f"{name}: amount", of["own"] / amount, "of real cells'"))
        report.add(Row(f"{name}: agreement", of["shared"] / (of["own"] * amount) ** 0.5, ""))
    report.print(config.json)
    return report


def read_cells(config: BenchGeneCorrelationConfig) -> tuple[LabelledCells, np.ndarray]:
    adata = ad.read_h5ad(config.h5ad)
    for name in (*config.conditions, config.split):
        if name not in adata.obs:
            raise InputError(f"h5ad={config.h5ad} has no obs column {name!r}; it has {', '.join(adata.obs.columns)}")
    labels = pd.DataFrame({name: adata.obs[name].astype(str).to_numpy() for name in config.conditions})
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    return LabelledCells(counts, labels, tuple(adata.var_names)), adata.obs[config.split].astype(str).to_numpy()


@dataclass(frozen=True)
class Groups:
    """Rows of test and of training cells by combination, the genes that its test cells express most, and these cells'
    correlations over all pairs of them."""

    test: Mapping[str, np.ndarray]
    train: Mapping[str, np.ndarray]
    genes: Mapping[str, np.ndarray]
    real: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, cells: LabelledCells, split: np.ndarray, config: BenchGeneCorrelationConfig) -> Groups:
        test, train = (
            {key: np.flatnonzero((split == name) & (cells.keys == key)) for key in cells.numbers()}
            for name in ("test", "train")
        )
        keys = [k for k in test if len(test[k]) >= config.min_cells and len(train[k]) >= 2 * len(test[k])]
        if not keys:
            raise InputError(
                f"no combination has {config.min_cells} test cells and twice as many training cells as test cells; "
                "choose fewer conditions or a smaller min_cells"
            )
        logs = {key: log_normalise(cells.counts[test[key]]) for key in keys}
        genes = {
            key: np.sort(np.argsort(-np.asarray(log.sum(0)).ravel(), kind="stable")[:N_CORRELATED])
            for key, log in logs.items()
        }
        test, train = ({key: of[key] for key in keys} for of in (test, train))
        return cls(test, train, genes, {key: _pairs(logs[key], genes[key]) for key in keys})

    def halves(self, counts: sp.csr_matrix, k: int) -> tuple[Logs, Logs]:
        """Two disjoint sets of training cells, as many of each combination as there are test cells; the k-th draw."""
        rng, first, second = np.random.default_rng(k), {}, {}
        for key, rows in self.train.items():
            n, mixed = len(self.test[key]), rng.permutation(rows)
            first[key], second[key] = (log_normalise(counts[of]) for of in (mixed[:n], mixed[n : 2 * n]))
        return first, second

    def compare(self, pairs: list[tuple[Logs, Logs]]) -> dict[str, float]:
        """Means over pairs of sets, and over combinations by their test cells."""
        rows = []
        for pair in pairs:
            for key, real in self.real.items():
                a, b = (_pairs(of[key], self.genes[key]) for of in pair)
                r = (pearson(real, a) + pearson(real, b)) / 2
                shared = (_covariance(real, a) + _covariance(real, b)) / 2
                rows.append((len(self.test[key]), r, pearson(a, b), _covariance(a, b), shared))
        weights, *values = np.array(rows).T
        names = ("r", "own r", "own", "shared")
        return {name: float(np.average(of, weights=weights)) for name, of in zip(names, values, strict=True)}


def sets_of(
    model: Pretrained, cells: LabelledCells, groups: Groups, config: BenchGeneCorrelationConfig
) -> Iterator[tuple[str, list[tuple[Logs, Logs]]]]:
    """Kinds of cells that the model makes, and pairs of sets of each."""
    mu, theta = decoded_cells(model, cells)
    draws, n = np.random.default_rng(1), range(config.draws)
    other = np.arange(len(cells))
    for rows in groups.train.values():
        other[rows] = draws.permutation(rows)
    of_others = mu * (cells.library_size[other] / cells.library_size)[:, None]
    for name, counts in (
        ("expected counts of training cells' latents", mu),
        ("Poisson draws of these", draws.poisson(mu)),
        ("draws of these with the dispersion", negative_binomial(mu, theta, draws)),
        ("the same with library sizes of other cells of the combination", negative_binomial(of_others, theta, draws)),
    ):
        yield name, [groups.halves(sp.csr_matrix(counts), k) for k in n]
    if model.dit is None:
        return
    labels = cells.labels.iloc[np.concatenate(list(groups.test.values()))].reset_index(drop=True)
    ends = np.cumsum([len(rows) for rows in groups.test.values()])[:-1]

    def generated(seed: int) -> Logs:
        made = sp.csr_matrix(model.generate(labels, seed=seed, genes=cells.genes).X)
        return dict(zip(groups.test, (log_normalise(made[k]) for k in np.split(np.arange(len(labels)), ends))))

    yield "generated cells", [(generated(2 * k), generated(2 * k + 1)) for k in n]


def decoded_cells(model: Pretrained, cells: LabelledCells) -> tuple[np.ndarray, np.ndarray]:
    """Expected counts of all cells, each from its own latent, float64 (cells, genes), and the dispersion (genes,).

    Raises: InputError for a model that does not know all genes, or without a negative binomial.
    """
    known, gene_ids_G = known_genes(model, cells.to_cells("cells"))
    if known.genes != cells.genes or model.vae.config.likelihood != "nb":
        raise InputError("the model must know all genes of the cells, and have model.likelihood=nb")
    parts, theta = [], None
    for block in encoded(model, known.counts, gene_ids_G):
        predicted = decoded(model, block.latent_BLZ, gene_ids_G)
        parts.append(predicted.expected(block.size_B).double().numpy())
        theta = predicted.dispersion
    assert theta is not None
    return np.concatenate(parts), theta.double().numpy()


def _pairs(log: sp.csr_matrix, genes: np.ndarray) -> np.ndarray:
    """Correlations of all pairs of these genes."""
    return correlations(log[:, genes].toarray())[np.triu_indices(len(genes), 1)]


def _covariance(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x - x.mean()) * (y - y.mean())).mean())


if __name__ == "__main__":
    sys.exit(run_benchmark("gene_correlation"))
