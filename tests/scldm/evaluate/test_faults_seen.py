"""Which metric sees which fault of a generator? One table, on simulated cells whose truth is known.

Reading order: the simulation, generators with a fault each, the table, what holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.evaluate.cells import Cells as CellsOf
from scldm.evaluate.memorisation import MEMORISATION, memorisation_errors, memorisation_scores, nearness
from scldm.evaluate.metrics import METRICS, Metric, score
from scldm.evaluate.protocols import PROTOCOLS
from scldm.evaluate.response import response
from scldm.evaluate.space import Profile, Space

# --- the simulation ------------------------------------------------------------------------------------------------

GENES, COMBINATIONS, CELLS = 60, ("B ctrl", "B stim", "T ctrl", "T stim"), 120  # cells of each combination in a set
EXPRESSION = np.random.default_rng(100)
BASE = EXPRESSION.normal(0, 1, GENES)
TYPE = np.where(np.arange(GENES) < 20, EXPRESSION.normal(0, 1, GENES), 0)
TREATMENT = np.where((np.arange(GENES) >= 20) & (np.arange(GENES) < 30), 1.2, 0)
STATE = np.where((np.arange(GENES) >= 30) & (np.arange(GENES) < 38), 2.0, 0)  # of 3 cells in 10
LOADING = EXPRESSION.normal(0, 0.35, (3, GENES))

Cells = tuple[sp.csr_matrix, np.ndarray]


def simulate(
    rng: np.random.Generator, effects: float = 1.0, state: float = 0.3, library: float = 1.0, condition: bool = True
) -> Cells:
    """Negative-binomial counts of CELLS cells of each combination, and their labels. Genes share three factors and a
    cell state. `effects` scales what tells combinations apart; without `condition`, labels say nothing."""
    types = np.repeat(COMBINATIONS, CELLS)
    of = types if condition else rng.permutation(types)
    is_t, is_stim = (np.array([word in t for t in of])[:, None] - 0.5 for word in ("T", "stim"))
    log = BASE + effects * (is_t * TYPE + is_stim * TREATMENT)
    log = log + rng.normal(size=(len(of), 3)) @ LOADING + (rng.random((len(of), 1)) < state) * STATE
    share = np.exp(log) / np.exp(log).sum(1, keepdims=True)
    mu = share * 400 * library * rng.lognormal(0, 0.3, size=(len(of), 1))
    return sp.csr_matrix(rng.negative_binomial(3, 3 / (3 + mu))), types


def independent(rng: np.random.Generator) -> Cells:
    """Each gene of a cell is taken from another cell of the combination."""
    counts, types = simulate(rng)
    dense = counts.toarray()
    for t in COMBINATIONS:
        dense[types == t] = rng.permuted(dense[types == t], axis=0)
    return sp.csr_matrix(dense), types


# --- generators with a fault each ----------------------------------------------------------------------------------

TRAIN = simulate(np.random.default_rng(104))
FAULTS: dict[str, Callable[[np.random.Generator], Cells]] = {
    "ignores its condition": lambda rng: simulate(rng, condition=False),
    "copies training cells": lambda rng: TRAIN,
    "washes out effects by half": lambda rng: simulate(rng, effects=0.5),
    "draws genes independently": independent,
    "drops a cell state": lambda rng: simulate(rng, state=0.0),
    "has twice the library size": lambda rng: simulate(rng, library=2.0),
}


# --- the table -----------------------------------------------------------------------------------------------------

# x: the metric sees the fault, by more than 3 standard deviations of the scores of good generators (8 draws of the
# truth). Dot: it does not. Question mark: it depends on the draw. In the order of FAULTS. Every metric is the mean over
# combinations; those of memorisation are pooled. W2 and precision do not see a library of twice the size because deeper
# cells lie nearer to their mean. slope and r are the response to the treatment.
SEEN = {
    "mmd2": "x . x x x x",
    "w2": "x . ? x x .",
    "fd": "x . x x x x",
    "nn_accuracy": "x . ? x ? x",
    "nn_accuracy_real": "x . ? x ? .",
    "nn_accuracy_other": "x . ? x ? x",
    "precision": "x . ? . . .",
    "recall": "? . ? x x x",
    "w1": "x . ? x x .",
    "energy": "x . x x x x",
    "mmd2_multiscale": "x . x x x x",
    "auc": "x . x x x x",
    "correlation_r": "? . . x ? .",
    "correlation_slope": "? . . x ? .",
    "mean_r": "x . x . x ?",
    "variance_r": "x . ? . . ?",
    "fraction_r": "x . ? . ? ?",
    "zeros_by_level": "x . ? ? ? x",
    "variance_by_level": "? . ? ? ? x",
    "library_w1": ". . . x . x",
    "closer_to_training": ". x . . . .",
    "memorisation_ratio": ". x ? ? . x",
    "near_copies": ". x . ? . ?",
    "exact_copies": ". x . . . .",
    "exact_copies_real": ". . . . . .",  # says whether exact_copies means anything
    "slope": "x . x . ? ?",
    "r": "x ? x ? ? ?",
}
RESPONSE = {"slope": Metric("slope", "of changes", "one", False), "r": Metric("r", "of changes", "highest", False)}
ALL = {**METRICS, **MEMORISATION, **RESPONSE}
SEES = 3.0  # standard deviations


# --- what holds it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Real cells, and the scores of good generators to compare with."""

    space: Space
    sides: tuple[CellsOf, CellsOf]
    train: Profile
    test: Profile
    good: list[dict[str, float]]
    errors: dict[str, float]

    def scores(self, cells: Cells) -> dict[str, float]:
        """Mean over combinations of every metric of METRICS, those of memorisation, and the response to treatment."""
        other = Profile.of(*cells, self.space)
        by_label = {t: score(self.test.of_type(t), other.of_type(t), 2_000, 0) for t in COMBINATIONS}
        held_out, generated = (
            nearness(self.train, self.test, 2_000, 0),
            nearness(self.train, other, 2_000, 0, self.test),
        )
        pooled = response(*self.sides, with_labels(cells, "generated"), "treatment", "ctrl").pooled
        changes = {name: float(pooled[name].value or 0.0) for name in RESPONSE}
        scores = PROTOCOLS["scldm"].mean(by_label, dict.fromkeys(COMBINATIONS, CELLS))
        return scores | memorisation_scores(held_out, generated) | changes

    def worse(self, scores: dict[str, float]) -> dict[str, float]:
        """By how many standard deviations of the good generators' scores each score is worse than their mean. Shares of
        a few cells may hardly vary in 8 draws: those of memorisation have their standard error at least."""
        out = {}
        for name, metric in ALL.items():
            good = [metric.loss(g[name]) for g in self.good]
            spread = max(np.std(good, ddof=1), self.errors.get(name, 0.0), 1e-9)
            out[name] = (metric.loss(scores[name]) - np.mean(good)) / spread
        return out


def with_labels(cells: Cells, name: str) -> CellsOf:
    kind, treatment = np.array([t.split() for t in cells[1]]).T
    return CellsOf.of_labels(cells[0], {"type": kind, "treatment": treatment}, tuple(map(str, range(GENES))), name)


@pytest.fixture(scope="module")
def judge() -> Judge:
    validation, test = (simulate(np.random.default_rng(seed)) for seed in (102, 103))
    space = PROTOCOLS["scldm"].fit(validation[0], test[0], 0)
    good: list[dict[str, float]] = []
    train, real = (Profile.of(*cells, space) for cells in (TRAIN, test))
    first = Profile.of(*simulate(np.random.default_rng([200, 0])), space)
    near = nearness(train, real, 2_000, 0), nearness(train, first, 2_000, 0, real)
    sides = with_labels(TRAIN, "train"), with_labels(test, "test")
    judge = Judge(space, sides, train, real, good, memorisation_errors(*near, seed=0))
    good += [judge.scores(simulate(np.random.default_rng([200, k]))) for k in range(8)]
    return judge


def test_the_table_is_whole():
    assert list(SEEN) == list(ALL)
    assert all(len(row.split()) == len(FAULTS) for row in SEEN.values())
    for k, fault in enumerate(FAULTS):
        assert any(row.split()[k] == "x" for row in SEEN.values()), fault


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_seen_by_the_metrics_of_the_table(judge, fault):
    k = list(FAULTS).index(fault)
    worse = judge.worse(judge.scores(FAULTS[fault](np.random.default_rng([400, k]))))
    for name, row in SEEN.items():
        expected = row.split()[k]
        if expected != "?":
            assert (worse[name] > SEES) == (expected == "x"), (name, worse[name])


@pytest.mark.slow
def test_a_good_generator_is_not_flagged(judge):
    worse = [judge.worse(judge.scores(simulate(np.random.default_rng([300, k])))) for k in range(2)]
    beyond = [(name, round(w[name], 1)) for w in worse for name in ALL if w[name] > SEES]
    assert len(beyond) <= 2, beyond  # of 48: 8 draws give a t distribution, which passes 3 once in a hundred
    assert all(w < 6 for _, w in beyond), beyond


@pytest.mark.slow
def test_pooled_scores_do_not_see_that_a_condition_is_ignored(judge):
    names = ("mmd2", "fd", "energy")

    def pooled(cells: Cells) -> dict[str, float]:
        return score(judge.test, Profile.of(*cells, judge.space), 2_000, 0, names)

    good = [pooled(simulate(np.random.default_rng([200, k]))) for k in range(8)]
    ignoring = pooled(simulate(np.random.default_rng(500), condition=False))
    for name in names:
        values = [g[name] for g in good]
        assert ignoring[name] < np.mean(values) + 4 * np.std(values, ddof=1), name
