"""Scores of one set of cells against another, by name. The first set is always the reference.

The formulas live in rooms of their own: distances.py and neighbours.py take components, genes.py takes log expression
and totals, two_sample.py takes counts. What needs the training cells too is in memorisation.py. Which space the cells
are compared in is the protocol's (protocols.py).

Reading order: what a metric is, the table, who computes what, score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from scldm.errors import InputError
from scldm.evaluate.distances import energy_distance, frechet, mmd2, mmd2_multiscale, w1, w2
from scldm.evaluate.genes import by_expression_level, correlation_within, gene_moments, library_w1, pearson
from scldm.evaluate.neighbours import nn_accuracy, precision_recall
from scldm.evaluate.space import Profile, subsample
from scldm.evaluate.two_sample import classifier_auc


@dataclass(frozen=True)
class Metric:
    """What a score is called and how it reads.

    title: as in tables
    meaning: one sentence for a reader who doesn't know it
    best: the end at which generated cells equal real ones
    main: one of the four that decide
    of_size: it depends on the number of cells, so that real cells are not at 0 but at the floor. Below the floor, cells
        vary too little, which is as wrong
    """

    title: str
    meaning: str
    best: Literal["lowest", "highest", "half", "one"]
    main: bool = True
    of_size: bool = False

    def loss(self, value: float) -> float:
        """How far a score is from the best, so that less is better for every metric."""
        ends = {"lowest": value, "highest": -value, "half": abs(value - 0.5), "one": abs(value - 1)}
        return ends[self.best]

    def beyond(self, value: float, floor: float) -> float:
        """How much worse than the floor a score is. Below 0 where it is better."""
        return abs(value - floor) if self.of_size else self.loss(value) - self.loss(floor)


METRICS: Mapping[str, Metric] = {
    "mmd2": Metric(
        "MMD²",
        "squared maximum mean discrepancy, unbiased, Gaussian kernel as wide as the median distance of real cells. 0 "
        "is equal",
        "lowest",
    ),
    "w2": Metric(
        "W2",
        "2-Wasserstein distance: how far cells must move to turn one set into the other. Best at the floor, and "
        "below it cells vary too little",
        "lowest",
        of_size=True,
    ),
    "fd": Metric(
        "FD",
        "Fréchet distance of the two sets' means and covariances (squared, as in FID). Best at the floor, and below it "
        "cells vary too little",
        "lowest",
        of_size=True,
    ),
    "nn_accuracy": Metric(
        "1-NN accuracy",
        "how often a cell's nearest neighbour is of its own kind (real or not). 0.5 is indistinguishable, 1 is told "
        "apart",
        "half",
    ),
    "nn_accuracy_real": Metric(
        "1-NN of real cells", "the same over real cells alone. Above 0.5, real states are missing", "half", False
    ),
    "nn_accuracy_other": Metric(
        "1-NN of generated cells",
        "the same over generated cells alone. Above 0.5, they lie where real cells don't, or huddle together",
        "half",
        False,
    ),
    "precision": Metric(
        "precision",
        "share of generated cells that lie among real cells (within the distance of a real cell's 5th neighbour). Low "
        "means cells that do not exist",
        "highest",
        False,
    ),
    "recall": Metric(
        "recall",
        "share of real cells that lie among generated cells, by the same rule. Low means that real states are missing",
        "highest",
        False,
    ),
    "w1": Metric("W1", "1-Wasserstein distance: as W2, without squaring the distances", "lowest", False, True),
    "energy": Metric(
        "energy distance",
        "mean distance between the sets minus the mean distances within them, unbiased. 0 is equal",
        "lowest",
        False,
    ),
    "mmd2_multiscale": Metric(
        "MMD², five widths",
        "squared maximum mean discrepancy, biased, sum over kernel widths of 0.01 to 100 (CFGen's). Depends on the "
        "number of cells",
        "lowest",
        False,
        True,
    ),
    "auc": Metric(
        "classifier AUC",
        "how well a random forest tells the two sets apart by their counts. 0.5 is indistinguishable, 1 is told apart",
        "half",
        False,
    ),
    "correlation_r": Metric(
        "gene-gene correlation, r",
        "do the same pairs of genes vary together within a combination? Correlation of generated with real "
        "correlations over the 200 most expressed genes. The floor is the most that can be reached",
        "highest",
        False,
    ),
    "correlation_slope": Metric(
        "gene-gene correlation, slope",
        "how strongly they vary together: slope of generated against real correlations. 0 is independent genes, and "
        "sampling error alone brings real cells below 1 (see the floor)",
        "one",
        False,
    ),
    "mean_r": Metric("gene means, r", "Pearson correlation over genes of mean log expression", "highest", False),
    "variance_r": Metric("gene variances, r", "Pearson correlation over genes of its variance", "highest", False),
    "fraction_r": Metric("fraction expressing, r", "Pearson correlation over genes of the share > 0", "highest", False),
    "zeros_by_level": Metric(
        "zeros by level",
        "difference of the share of zeros, mean over 10 groups of genes by their expression. 0.05 is 5 % of cells",
        "lowest",
        False,
    ),
    "variance_by_level": Metric(
        "variance by level",
        "log2 ratio of the variances of log expression, its size averaged over the same groups. 1 is twofold",
        "lowest",
        False,
    ),
    "library_w1": Metric(
        "library size, W1",
        "1-Wasserstein distance of the natural log of total counts. 0.1 is about 10 % off",
        "lowest",
        False,
    ),
}


# --- who computes what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A function of two sets that gives one or more scores.

    names: of the scores, in order
    of: (reference, other, seed) -> the scores
    sampled: it compares every cell with every other, and takes at most `max_cells` a side
    expensive: it costs more than all others together
    """

    names: tuple[str, ...]
    of: Callable[[Profile, Profile, int], tuple[float, ...]]
    sampled: bool = True
    expensive: bool = False


def _on_components(distance: Callable) -> Callable[[Profile, Profile, int], tuple[float, ...]]:
    return lambda reference, other, _: (distance(reference.components, other.components),)


def _mmd2(reference: Profile, other: Profile, _: int) -> tuple[float, ...]:
    """NaN where half of the pairs of the reference coincide, as in some halves of cells that are much alike."""
    try:
        return (mmd2(reference.components, other.components),)
    except InputError:
        return (math.nan,)


def _nn_accuracy(reference: Profile, other: Profile, _: int) -> tuple[float, ...]:
    real, generated = nn_accuracy(reference.components, other.components)
    n, m = len(reference), len(other)
    return (n * real + m * generated) / (n + m), real, generated


def _gene_scores(reference: Profile, other: Profile, _: int) -> tuple[float, ...]:
    moments = gene_moments(reference.log), gene_moments(other.log)
    r = (pearson(*pair) for pair in zip(*moments, strict=True))
    return (*r, *by_expression_level(*moments), library_w1(reference.total, other.total))


MEASURES: tuple[Measure, ...] = (
    Measure(("mmd2",), _mmd2),
    Measure(("w2",), _on_components(w2)),
    Measure(("fd",), _on_components(frechet), sampled=False),
    Measure(("nn_accuracy", "nn_accuracy_real", "nn_accuracy_other"), _nn_accuracy),
    Measure(("precision", "recall"), lambda r, o, _: precision_recall(r.components, o.components)),
    Measure(("w1",), _on_components(w1)),
    Measure(("energy",), _on_components(energy_distance)),
    Measure(("mmd2_multiscale",), _on_components(mmd2_multiscale)),
    Measure(("auc",), lambda r, o, seed: (classifier_auc(r.counts, o.counts, seed),), expensive=True),
    Measure(("correlation_r", "correlation_slope"), lambda r, o, _: correlation_within(r, o), sampled=False),
    Measure(
        ("mean_r", "variance_r", "fraction_r", "zeros_by_level", "variance_by_level", "library_w1"),
        _gene_scores,
        sampled=False,
    ),
)


def measures_of(only: Collection[str] | None) -> list[Measure]:
    """The measures that give these scores. All where `only` is None."""
    assert only is None or set(only) <= set(METRICS), only
    return [m for m in MEASURES if only is None or set(m.names) & set(only)]


# --- score ---------------------------------------------------------------------------------------------------------


def compared_cells(reference: Profile, other: Profile, max_cells: int, seed: int) -> tuple[Profile, Profile]:
    """The cells that sampled measures take: equal numbers of both, at most `max_cells`, drawn under the seed."""
    n = min(len(reference), len(other), max_cells)
    real, generated = (p.select(subsample(len(p), n, seed)) if len(p) > n else p for p in (reference, other))
    return real, generated


def score(
    reference: Profile, other: Profile, max_cells: int, seed: int, only: Collection[str] | None = None
) -> dict[str, float]:
    """Every metric of METRICS, by name, in its order. With `only`, those. Sampled measures (MEASURES) take equal
    numbers of at most `max_cells` cells a side, drawn under the seed. The others see all cells."""
    few = compared_cells(reference, other, max_cells, seed)
    values: dict[str, float] = {}
    for measure in measures_of(only):
        of = few if measure.sampled else (reference, other)
        values |= dict(zip(measure.names, measure.of(*of, seed), strict=True))
    return {name: values[name] for name in METRICS if name in (METRICS if only is None else only)}
