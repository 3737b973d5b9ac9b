"""Scores of a set of cells at every level: all cells at once, each combination, each label of a condition, and means.

Reading order: levels, scores and their standard errors, the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.spatial.distance import pdist

from scldm.evaluate.intervals import IntervalConfig, standard_errors
from scldm.evaluate.metrics import MEASURES, METRICS, score
from scldm.evaluate.protocols import Protocol
from scldm.evaluate.space import Profile

Values = dict[str, float]
CHEAP = tuple(name for m in MEASURES if not m.expensive for name in m.names)
COINCIDE = 0.3  # at half of all pairs a group has no width. Its halves reach that sooner
NOT_OF_LABELS = ("auc",)  # a forest for each label of each condition costs more than all other scores together

# --- levels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """Where scores are taken besides all cells at once.

    combinations: those that are scored one by one
    labels: condition -> its scored labels -> their combinations. Empty where one condition makes the combinations
    max_cells: of a combination or label, scores that compare every cell with every other take at most so many a side
    apart: combinations that count neither in the mean over combinations nor in the scores of all cells at once
    """

    combinations: Sequence[str] = ()
    labels: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    max_cells: int = 500
    apart: Collection[str] = ()

    def less(self, keys: Sequence[tuple[str, str]]) -> Levels:
        """Less some combinations and labels, named as `rows` does."""
        labels = {c: {x: ts for x, ts in of.items() if (c, x) not in keys} for c, of in self.labels.items()}
        return replace(self, combinations=[t for t in self.combinations if ("", t) not in keys], labels=labels)

    def without(self, names: Sequence[str]) -> Levels:
        """Less some combinations, and all labels that have one of these."""
        of_labels = [(c, x) for c, of in self.labels.items() for x, ts in of.items() if set(ts) & set(names)]
        return self.less([*(("", t) for t in names), *of_labels])

    def rows(self, profile: Profile) -> dict[tuple[str, str], np.ndarray]:
        """(condition, label) -> its cells. Combinations stand under the condition ""."""
        out = {("", t): np.flatnonzero(profile.types == t) for t in self.combinations}
        for condition, of in self.labels.items():
            out |= {(condition, label): np.flatnonzero(np.isin(profile.types, ts)) for label, ts in of.items()}
        return out

    def of_copies(self, real: Profile) -> list[tuple[str, str]]:
        """The combinations and labels, named as `rows` does, of whose test cells three in ten pairs or more coincide,
        as cells without counts do. They have no distances to judge by."""
        of = {key: real.components[rows[: self.max_cells]] for key, rows in self.rows(real).items()}
        return [key for key, components in of.items() if (pdist(components, "sqeuclidean") == 0).mean() > COINCIDE]


def scored_labels(
    conditions: Sequence[str], combinations: Mapping[str, tuple[str, ...]], numbers: Mapping[str, int], min_cells: int
) -> dict[str, dict[str, list[str]]]:
    """condition -> label -> its combinations, for labels of `min_cells` compared cells or more, largest first. Empty
    for fewer than two conditions.

    combinations: name -> labels, in the order of the conditions. numbers: compared cells of each
    """
    out: dict[str, dict[str, list[str]]] = {}
    for k, condition in enumerate(conditions if len(conditions) > 1 else ()):
        of: dict[str, list[str]] = {}
        for name in numbers:
            of.setdefault(combinations[name][k], []).append(name)
        size = {label: sum(numbers[t] for t in ts) for label, ts in of.items()}
        out[condition] = {x: of[x] for x in sorted(of, key=lambda x: -size[x]) if size[x] >= min_cells}
    return out


# --- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """metric -> score. pooled: all cells at once. by: (condition, label) -> scores, as of Levels.rows. mean: condition
    -> the mean over its labels, as the protocol weighs them."""

    pooled: Values
    by: dict[tuple[str, str], Values]
    mean: dict[str, Values]


def _of_level(key: tuple[str, str], only: Collection[str] | None) -> list[str]:
    """The metrics of a combination, or of a label."""
    condition, _ = key
    wanted = METRICS if only is None else only
    return [name for name in METRICS if name in wanted and not (condition and name in NOT_OF_LABELS)]


@dataclass(frozen=True)
class Scorer:
    """Scores sets of cells against the test cells, at the same levels.

    max_cells: of all cells at once, scores that compare every cell with every other take at most so many a side
    """

    test: Profile
    levels: Levels
    protocol: Protocol
    max_cells: int
    seed: int

    def scores(self, other: Profile, only: Collection[str] | None = None) -> Scores:
        """All metrics, or `only` some, of a set of cells."""

        def of(test: Profile, other: Profile, level: tuple[str, str] | None) -> Values:
            if level is None:
                return score(test, other, self.max_cells, self.seed, only)
            return score(test, other, self.levels.max_cells, self.seed, _of_level(level, only))

        return self._at_levels(other, of, self.protocol.mean)

    def errors(self, other: Profile, config: IntervalConfig) -> Scores:
        """Standard errors in the place of scores. Of combinations and labels, from half as many parts."""
        parts = {name: max(2, getattr(config, name) // 2) for name in ("n_parts", "n_parts_expensive")}
        halved = replace(config, **parts)

        def of(test: Profile, other: Profile, level: tuple[str, str] | None) -> Values:
            if level is None:
                return standard_errors(test, other, self.max_cells, self.seed, config)
            return standard_errors(test, other, self.levels.max_cells, self.seed, halved, _of_level(level, None))

        return self._at_levels(other, of, self.protocol.mean_error)

    def _at_levels(
        self,
        other: Profile,
        of: Callable[[Profile, Profile, tuple[str, str] | None], Values],
        mean: Callable[[Mapping[str, Values], Mapping[str, int]], Values],
    ) -> Scores:
        """`of` the cells of every level (None: of all cells), and the `mean` over each condition's labels."""
        test, apart = self.test, self.levels.apart
        rows, others = self.levels.rows(test), self.levels.rows(other)
        by = {key: of(test.select(rows[key]), other.select(others[key]), key) for key in rows}
        means = {}
        for condition in dict.fromkeys(condition for condition, _ in by):
            keys = [key for key in by if key[0] == condition and (condition or key[1] not in apart)]
            if not keys:  # all combinations stand apart
                continue
            means[condition] = mean({x: by[_, x] for _, x in keys}, {x: len(rows[_, x]) for _, x in keys})
        if apart:
            test, other = (s.select(np.flatnonzero(~np.isin(s.types, list(apart)))) for s in (test, other))
        return Scores(of(test, other, None), by, means)


# --- the table -----------------------------------------------------------------------------------------------------


def table(
    generated: Values,
    errors: Values,
    floor: Sequence[Values],
    baselines: Mapping[str, Sequence[Values]],
    as_floor: Collection[str] = (),
) -> dict:
    """metric -> score, its standard error, floor and baselines (mean and standard deviation over the draws), and per
    baseline `normalised` and `beats`. `normalised` is how much worse than the floor the score is, as a share of how
    much worse the baseline is (Metric.beyond). 0 is as good as real training cells, and 1 as poor as the baseline.

    Both are None where the metric does not find the baseline worse than the floor. It must be worse by three standard
    errors of the difference of their means, and not be the floor by construction (`as_floor`). Expensive metrics have
    fewer draws than the others. A metric that can't be told (no combination has enough cells for correlations) has no
    row.
    """
    out: dict[str, dict] = {}
    for name, value in generated.items():
        every = [value, *(d[name] for of in (floor, *baselines.values()) for d in of if name in d)]
        if not all(map(math.isfinite, every)):
            continue
        metric = METRICS[name]
        base = _summary([d[name] for d in floor if name in d])
        error = errors.get(name, math.nan)
        row = {"score": value, "error": error if math.isfinite(error) else None, "floor": base}
        row |= {"baselines": {}, "normalised": {}, "beats": {}}
        for key, draws in baselines.items():
            baseline = _summary([d[name] for d in draws if name in d])
            beyond = metric.beyond(baseline["mean"], base["mean"])
            n = min(len(base["draws"]), len(baseline["draws"]))
            told_apart = key not in as_floor and beyond > 3 * np.hypot(base["sd"], baseline["sd"]) / np.sqrt(n)
            row["baselines"][key] = baseline
            own = metric.beyond(value, base["mean"])
            row["normalised"][key] = own / beyond if told_apart else None
            row["beats"][key] = bool(own < beyond) if told_apart else None
        out[name] = row
    return out


def _summary(values: list[float]) -> dict:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "sd": spread, "draws": values}
