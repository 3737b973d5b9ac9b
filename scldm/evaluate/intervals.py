"""How sure is a score? Standard errors by resampling cells without replacement.

A bootstrap draws cells with replacement, and a cell that is drawn twice is its own nearest neighbour. That would ruin
every score that looks at neighbours, and bias those that compare pairs. Parts without replacement have no copies.

An interval is score +- 1.96 standard errors. It speaks of the cells that were judged: of which cells were sequenced and
which were generated, given how many there are of each type. It does not speak of another training run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scldm.checked import Checked, checked
from scldm.evaluate.metrics import METRICS, compared_cells, measures_of
from scldm.evaluate.space import Profile

WIDTH = 1.96  # standard errors on either side of a 95 % interval


@dataclass(frozen=True)
class IntervalConfig(Checked):
    """n_parts: parts drawn. 20 give a standard error that is itself 16 % off (1 / sqrt(2 * 19))
    n_parts_expensive: parts for the classifier. 8 give one that is 27 % off
    max_part: cells of a part at most, for scores that take all cells
    """

    n_parts: int = checked(20, at_least=2)
    n_parts_expensive: int = checked(8, at_least=2)
    max_part: int = checked(10_000, at_least=100)


def part_of_each_type(types: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted indices of a share of the cells, without replacement. Each type gives its share, to within one cell, and
    every cell is as likely as any other. Cells are ordered by type, at random within it, and one in 1/share is taken.
    """
    assert 0 < share <= 1, share
    n = len(types)
    order = np.lexsort((rng.random(n), types))
    marks = np.floor(np.arange(n + 1) * share + rng.random())
    return np.sort(order[np.diff(marks) > 0])


def standard_errors(
    reference: Profile,
    other: Profile,
    max_cells: int,
    seed: int,
    config: IntervalConfig | None = None,
    only: Collection[str] | None = None,
) -> dict[str, float]:
    """Standard error of every score that `score` gives for the same arguments, by name.

    The delete-d jackknife: parts of r of n cells, drawn without replacement from both sets and by type. The standard
    error at the full size is sqrt(r / (n - r)) times the standard deviation of the scores over parts. Sampled measures
    take halves of the cells that `score` takes, where the factor is 1. The others take halves too, or parts of
    `max_part` cells of larger sets.

    How far it holds (measured, 120 cells a side): 0.9 to 1.3 times the true spread where the sets differ, 1.5 for
    precision and recall. Near equality MMD2, energy, FD and correlations near 1 have no first-order error left, and
    theirs comes out up to twice too large (sqrt(3) for a degenerate U-statistic): it errs on the side of caution.
    Source: Shao & Wu 1989, eq. 2.5. NaN where a part had too few cells for the score.
    """
    config = config or IntervalConfig()
    few = compared_cells(reference, other, max_cells, seed)
    share = min(0.5, config.max_part / max(len(reference), len(other)))
    measures = measures_of(only)
    draws: dict[str, list[float]] = {name: [] for m in measures for name in m.names}
    for k in range(config.n_parts):
        rng = np.random.default_rng([seed, k])
        few_part = [p.select(part_of_each_type(p.types, 0.5, rng)) for p in few]
        all_part = [p.select(part_of_each_type(p.types, share, rng)) for p in (reference, other)]
        for measure in measures:
            if measure.expensive and k >= config.n_parts_expensive:
                continue
            part_reference, part_other = few_part if measure.sampled else all_part
            values = measure.of(part_reference, part_other, seed + k)
            for name, value in zip(measure.names, values, strict=True):
                draws[name].append(value)
    factor = {name: 1.0 if m.sampled else np.sqrt(share / (1 - share)) for m in measures for name in m.names}
    wanted = [name for name in METRICS if name in (draws if only is None else only)]
    return {name: float(factor[name] * np.std(draws[name], ddof=1)) for name in wanted}


def error_of_mean(errors: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """Standard errors of the weighted mean of the scores of types, whose cells are different ones: the square root of
    sum (w_t e_t)^2 / (sum w_t)^2, by name."""
    w = np.asarray(weights, dtype=float) / np.sum(weights)
    return {name: float(np.sqrt(((w * [e[name] for e in errors]) ** 2).sum())) for name in errors[0]}
