"""Scores of generated cells against test cells: the one place that knows the project's metrics.

The protocol: counts per 10,000, log1p, 30 principal components fitted on the validation cells. Every score that
`scldm.evaluate.metrics.score` returns is kept, whatever its name.
Reading order: the protocol in words, JudgeConfig, judge, response_of; what a metric is called and how it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality import known
from benchmarks.quality.cells import LabelledCells
from scldm.evaluate.memorisation import MEMORISATION, memorisation
from scldm.evaluate.metrics import METRICS, Metric, score
from scldm.evaluate.response import responses
from scldm.evaluate.space import Profile, fit_pca, log_normalise

N_COMPONENTS = 30
RESPONSE = {
    "response_slope": Metric("response, slope", "of generated against real changes; 1 is right", "one"),
    "response_r": Metric(
        "response, r", "do the same genes change? the floor is the most that can be reached", "highest"
    ),
}
ALL = {**METRICS, **MEMORISATION, **RESPONSE, **known.METRICS}
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
    "response": "changes of expression from a condition's reference label, in combinations that training has",
    "test_cells": "what the trained model knows of test cells; labels by what training cells' latents teach",
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


def response_of(
    train: LabelledCells, test: LabelledCells, generated: LabelledCells, control: Mapping[str, str], min_cells: int
) -> dict[str, float]:
    """Slope and r of generated against real changes of expression, of each condition with a reference label, such as
    `response_slope, treatment`. Combinations that training lacks are left out.

    control: condition -> its reference label
    """
    seen, out = set(train.keys), dict[str, float]()
    real, made = (of.select(np.flatnonzero([key in seen for key in of.keys])) for of in (test, generated))
    sources = train.to_cells("train"), real.to_cells("test"), made.to_cells("generated")
    if len(real) and len(made):
        for condition, found in responses(*sources, control, min_cells).items():
            scores = {name: found.pooled[name].value for name in ("slope", "r") if name in found.pooled}
            out |= {f"response_{name}, {condition}": value for name, value in scores.items() if value is not None}
    return out


def _some(cells: LabelledCells, key: str, n: int, rng: np.random.Generator) -> np.ndarray:
    rows = np.flatnonzero(cells.keys == key)
    return rows if len(rows) == n else np.sort(rng.choice(rows, n, replace=False))


def metric_of(name: str) -> Metric | None:
    """What is known of a score; one of a condition has that one's name behind a comma."""
    return ALL.get(name.partition(", ")[0])


def title_of(name: str) -> str:
    metric, (_, comma, condition) = metric_of(name), name.partition(", ")
    return metric.title + comma + condition if metric else name


def loss_of(metric: str, value: float, floor: float | None) -> float | None:
    """How far a score is from the best, less is better. That of a score that depends on the number of cells is `floor`,
    the training cells' own. None where the best is not known."""
    found = metric_of(metric)
    if found is None:
        return None
    if not found.of_size:
        return found.loss(value)
    return None if floor is None else found.beyond(value, floor)
