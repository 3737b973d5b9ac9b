"""Scores of generated cells against test cells: the one place that knows the project's metrics.

The protocol: counts per 10,000, log1p, 30 principal components fitted on the validation cells. Every score that
`scldm.evaluate.metrics.score` returns is kept, whatever its name.
Reading order: the protocol in words, JudgeConfig, judge; what a metric is called and how it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality.cells import LabelledCells
from scldm.evaluate.memorisation import MEMORISATION, memorisation
from scldm.evaluate.metrics import METRICS, Metric, score
from scldm.evaluate.space import Profile, fit_pca, log_normalise

N_COMPONENTS = 30
TEST_NLL = "test_nll"  # of a row's note: the method's own, from its trained model
KNOWN = {
    **METRICS,
    **MEMORISATION,
    TEST_NLL: Metric("test NLL", "negative log-likelihood of test cells at their own latent, nats a cell", "lowest"),
}
DRAWN = ("mmd2", "w2", "fd", "nn_accuracy", "auc", "correlation_r")  # in the figure, and first in tables
TITLE = "quality benchmark"
MEANING = (
    f"{N_COMPONENTS} principal components of the validation cells' log1p counts per 10,000; means over combinations "
    "weigh each combination alike"
)
PROTOCOL = 2  # another number scores all rows again
SCOPES = {
    "pooled": "all cells of the combinations that training has",
    "per_combination": "mean over the combinations that training has, of those with enough test cells",
    "unseen": "mean over the combinations that training does not have, of those with enough test cells",
}


@dataclass(frozen=True)
class JudgeConfig:
    """min_cells: of a combination that is scored by itself; max_cells: of a side where all pairs are compared; seed: of
    what is left out"""

    min_cells: int = 20
    max_cells: int = 2_000
    seed: int = 0


def judge(
    train: LabelledCells,
    validation: LabelledCells,
    test: LabelledCells,
    generated: LabelledCells,
    config: JudgeConfig,
) -> dict[str, Any]:
    """{"pooled" | "per_combination" | "unseen": {metric: score}, "by_combination": {combination: {metric: score}},
    "cells": {combination: cells compared}}.

    Both sides have as many cells of each combination as the smaller one. A scope is missing where it has nothing to
    score; pooled is, where the method lacks a combination that training has.
    """
    seen = set(train.keys)
    n_test, n_made = test.numbers(), generated.numbers()
    numbers = {key: min(n, n_made[key]) for key, n in n_test.items() if key in n_made}
    pca = fit_pca(log_normalise(validation.counts), N_COMPONENTS, config.seed)
    rng = np.random.default_rng([config.seed, 0])

    def profiles(keys: list[str]) -> tuple[Profile, Profile]:
        real, made = (
            Profile.of(of.counts[rows], of.keys[rows].astype(str), pca)
            for of in (test, generated)
            for rows in [np.concatenate([_some(of, key, numbers[key], rng) for key in keys])]
        )
        return real, made

    def scores(keys: list[str]) -> dict[str, float]:
        return {name: float(value) for name, value in score(*profiles(keys), config.max_cells, config.seed).items()}

    by = {key: scores([key]) for key, n in numbers.items() if n >= config.min_cells}
    out: dict[str, Any] = {"by_combination": by, "cells": numbers}
    if (of_seen := [key for key in n_test if key in seen]) and all(key in numbers for key in of_seen):
        real, made = profiles(of_seen)
        known = Profile.of(train.counts, train.keys.astype(str), pca)
        out["pooled"] = scores(of_seen) | memorisation(known, real, made, config.max_cells, config.seed)
    for scope, of_scope in (
        ("per_combination", [s for key, s in by.items() if key in seen]),
        ("unseen", [s for key, s in by.items() if key not in seen]),
    ):
        if of_scope:
            out[scope] = {name: float(np.mean([s[name] for s in of_scope])) for name in of_scope[0]}
    return out


def _some(cells: LabelledCells, key: str, n: int, rng: np.random.Generator) -> np.ndarray:
    rows = np.flatnonzero(cells.keys == key)
    return rows if len(rows) == n else np.sort(rng.choice(rows, n, replace=False))


def title_of(metric: str) -> str:
    return KNOWN[metric].title if metric in KNOWN else metric


def loss_of(metric: str, value: float, floor: float | None) -> float | None:
    """How far a score is from the best, less is better. That of a score that depends on the number of cells is `floor`,
    the training cells' own. None where the best is not known."""
    if metric not in KNOWN:
        return None
    if not KNOWN[metric].of_size:
        return KNOWN[metric].loss(value)
    return None if floor is None else KNOWN[metric].beyond(value, floor)
