"""Marker genes of each type, chosen on real training cells, and whether generated cells have them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy.sparse as sp

from scldm.evaluate.cells import Cells, numbers_of
from scldm.evaluate.space import log_normalise

N_MARKERS = 5
MIN_CELLS = 3


@dataclass(frozen=True)
class Marker:
    """A marker gene of a type.

    t: Welch's t statistic of log1p counts per 10,000, the type's training cells against all others
    log2_fold_change: source -> log2 of the ratio of mean counts per 10,000 (+ 1), the type against all others of that
        source
    """

    type: str
    gene: str
    t: float
    log2_fold_change: dict[str, float]


def choose(log: sp.csr_matrix, types: np.ndarray, n: int = N_MARKERS) -> dict[str, list[tuple[int, float]]]:
    """type -> its n genes of the highest Welch t (log expression in the type against all other cells), as (column, t),
    best first. Only genes that are up. Types with fewer than 3 cells inside or outside are left out: they have no
    variance."""
    total, squares = _sums(log)
    out = {}
    for label in np.unique(types):
        rows = np.flatnonzero(types == label)
        n_in, n_out = len(rows), len(types) - len(rows)
        if min(n_in, n_out) < MIN_CELLS:
            continue
        total_in, squares_in = _sums(log[rows])
        mean_in, mean_out = total_in / n_in, (total - total_in) / n_out
        variance_in = np.clip(squares_in - n_in * mean_in**2, 0, None) / (n_in - 1)
        variance_out = np.clip(squares - squares_in - n_out * mean_out**2, 0, None) / (n_out - 1)
        error = np.sqrt(variance_in / n_in + variance_out / n_out)
        t = np.divide(mean_in - mean_out, error, out=np.zeros_like(error), where=error > 0)
        best = np.argsort(-t, kind="stable")[:n]
        out[str(label)] = [(int(g), float(t[g])) for g in best if t[g] > 0]
    return out


def log2_fold_change(log: sp.csr_matrix, types: np.ndarray, label: str, genes: list[int]) -> np.ndarray:
    """log2((mean counts per 10,000 in the type + 1) / (mean in all other cells + 1)), (genes,)."""
    per_10k = log[:, genes].expm1()
    inside = types == label
    mean_in, mean_out = (np.asarray(per_10k[np.flatnonzero(rows)].mean(0)).ravel() for rows in (inside, ~inside))
    return np.log2((mean_in + 1) / (mean_out + 1))


def check(
    train: tuple[sp.csr_matrix, np.ndarray], sources: dict[str, tuple[sp.csr_matrix, np.ndarray]], genes: Sequence[str]
) -> list[Marker]:
    """The markers chosen on the training cells with their fold changes in every source (name -> log matrix, types).
    Types of which some source has fewer than 3 cells inside or outside are left out."""
    markers = []
    for label, chosen in choose(*train).items():
        inside = [((types == label).sum(), (types != label).sum()) for _, types in sources.values()]
        if min(map(min, inside)) < MIN_CELLS:
            continue
        columns = [column for column, _ in chosen]
        changes = {name: log2_fold_change(log, types, label, columns) for name, (log, types) in sources.items()}
        for k, (column, t) in enumerate(chosen):
            markers.append(Marker(label, genes[column], t, {name: float(v[k]) for name, v in changes.items()}))
    return markers


def _sums(log: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(log.sum(0)).ravel(), np.asarray(log.multiply(log).sum(0)).ravel()


# --- as JSON -------------------------------------------------------------------------------------------------------


def compared(train: Cells, judged: Mapping[str, Cells]) -> dict:
    """Marker genes of the labels of the first condition: what sets cell types apart, not treatments within them."""

    def first(cells: Cells) -> np.ndarray:
        return next(iter(cells.labels.values())) if cells.labels else cells.types

    sources = {name: (log_normalise(cells.counts), first(cells)) for name, cells in judged.items()}
    found = check((log_normalise(train.counts), first(train)), sources, train.genes)
    n_cells = numbers_of(first(judged["real"]))
    order = list(n_cells)
    found.sort(key=lambda m: order.index(m.type))  # stable: a label's own order stays
    return {
        "markers": [asdict(m) for m in found],
        "markers_of": {"condition": next(iter(judged["real"].labels), ""), "n_cells": n_cells},
        "expression": _expression(sources, train.genes, found),
    }


def _expression(
    sources: Mapping[str, tuple[sp.csr_matrix, np.ndarray]], genes: Sequence[str], found: list[Marker]
) -> dict:
    """Mean log expression and fraction of cells > 0 of every marker in every label that has markers: source -> (labels,
    genes)."""
    types = list(dict.fromkeys(m.type for m in found))
    columns = [genes.index(g) for g in dict.fromkeys(m.gene for m in found)]
    out: dict = {"types": types, "genes": [genes[c] for c in columns]}
    for name, (log, of) in sources.items():
        values = [log[np.flatnonzero(of == t)][:, columns] for t in types]
        out[name] = {
            "mean": [np.asarray(v.mean(0)).ravel().round(4).tolist() for v in values],
            "fraction": [np.asarray((v > 0).mean(0)).ravel().round(4).tolist() for v in values],
        }
    return out
