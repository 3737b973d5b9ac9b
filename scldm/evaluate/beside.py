"""Generated cells beside floor, baselines and parts of the model: who is compared with whom, and tables of all scores.

Reading order: Part, Sides, Judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.evaluate import baselines
from scldm.evaluate.cells import NO_TYPE, Cells, matched_numbers, scored_combinations, with_genes
from scldm.evaluate.config import EvaluateConfig
from scldm.evaluate.metrics import score
from scldm.evaluate.scores import CHEAP, Levels, Scorer, Scores, scored_labels, table
from scldm.evaluate.space import Profile, Space
from scldm.progress import Progress

N_EXPENSIVE = 3  # draws of floor and baselines for which the forest is grown

Set = TypeVar("Set", Cells, Profile)


@dataclass(frozen=True)
class Part:
    """Cells that show which part of a model costs what, judged as the generated ones are.

    title, meaning: for a table
    cells: of combinations of the test cells
    """

    title: str
    meaning: str
    cells: Cells


# --- who is compared with whom -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sides:
    """pool: the training cells that floor and baselines are drawn from. Of an unseen combination, its relatives
    combinations: name -> labels, of the test cells
    numbers: compared cells per combination
    relatives: unseen combination -> the combinations that stand in for it"""

    pool: Cells
    combinations: dict[str, tuple[str, ...]]
    numbers: dict[str, int]
    relatives: dict[str, list[str]]
    levels: Levels
    not_scored: list[str]
    pooled_only: str

    @classmethod
    def of(cls, train: Cells, test: Cells, generated: Cells, config: EvaluateConfig) -> Sides:
        combinations, seen = test.combinations(), set(train.numbers())
        unseen = {t: labels for t, labels in combinations.items() if t not in seen}
        made = generated.numbers()
        wanted = {t: min(n, made.get(t, 0)) for t, n in test.numbers().items()}
        pool, relatives = baselines.with_relatives(train, unseen, wanted, config.seed) if len(train) else (train, {})
        numbers = matched_numbers(pool, test, generated)
        scored, not_scored, why = scored_combinations(numbers, config.min_cells, config.max_combinations)
        labels = scored_labels(list(test.labels), combinations, numbers, config.min_cells)
        # real cells of others are no floor for them, unless there is too little else to judge
        seen = sum(n for t, n in numbers.items() if t not in relatives)
        apart = sorted(t for t in numbers if t in relatives) if seen >= config.min_cells else []
        levels = Levels(scored, labels, config.max_group_cells, apart)
        return cls(pool, combinations, numbers, relatives, levels, not_scored, why)

    def by_combination(self, train: Cells, test: Cells, generated: Cells) -> dict:
        if NO_TYPE in self.numbers:
            return {}
        found = {c: cells.numbers() for c, cells in (("train", train), ("test", test), ("generated", generated))}
        of = {
            t: {
                **{c: n.get(t, 0) for c, n in found.items()},
                "compared": self.numbers[t],
                "labels": list(self.combinations[t]),
                **({"unseen": True, "relatives": self.relatives[t]} if t in self.relatives else {"unseen": False}),
            }
            for t in self.numbers
        }
        return {"by_combination": of, "generated_only": [t for t in found["generated"] if t not in self.numbers]}


# --- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Scores generated cells, and what stands beside them, in one space."""

    scorer: Scorer
    space: Space
    sides: Sides
    config: EvaluateConfig

    def tables(self, train: Cells, generated: Profile, control: Mapping[str, str]) -> dict:
        """pooled, per_combination, by_combination and by_condition: tables with floor and baselines."""
        config, sides, levels = self.config, self.sides, self.scorer.levels
        ways = {"floor": baselines.floor_cells, **{key: draw for key, (_, _, draw) in baselines.BASELINES.items()}}
        if NO_TYPE in sides.numbers:
            del ways["c"]  # there are no labels to shuffle
        draws: dict[str, list[Scores]] = {}
        n_draws = min(config.n_draws, max(3, config.max_drawn_cells // len(generated)))
        with Progress("evaluate", 2 + len(ways) * n_draws, "comparisons") as bar:
            mine = self.scorer.scores(generated)
            if not math.isfinite(mine.pooled["mmd2"]):
                raise InputError("half of the pairs of test cells or more coincide. Is the test split made of copies?")
            bar.advance()
            errors = self.scorer.errors(generated, config.intervals)
            bar.advance()
            for k, (name, draw) in enumerate(ways.items()):
                draws[name] = []
                for j in range(n_draws):
                    counts, types = draw(sides.pool.counts, sides.pool.types, sides.numbers, config.rng(2, k, j))
                    profile = Profile.of(counts, types, self.space)
                    draws[name].append(self.scorer.scores(profile, None if j < N_EXPENSIVE else CHEAP))
                    bar.advance(note=name)
        shifted = {t: self._shifted(train, t, control) for t in sides.relatives}

        def tabulate(pick: Callable[[Scores], dict[str, float]], as_floor: Collection[str] = (), more=None) -> dict:
            others = {name: [pick(s) for s in scores] for name, scores in draws.items()} | (more or {})
            return table(pick(mine), pick(errors), others.pop("floor"), others, as_floor)

        out: dict[str, Any] = {"n_draws": n_draws, "pooled": tabulate(lambda s: s.pooled, as_floor=("c",))}
        if "" in mine.mean:
            out["per_combination"] = tabulate(lambda s: s.mean[""])
        if levels.combinations:
            out["by_combination"] = {
                t: tabulate(lambda s, t=t: s.by["", t], more={"d": d} if (d := shifted.get(t)) else {})
                for t in levels.combinations
            }
        if levels.labels:
            out["per_condition"] = {c: tabulate(lambda s, c=c: s.mean[c]) for c, of in levels.labels.items() if of}
            out["by_condition"] = {
                c: {x: tabulate(lambda s, c=c, x=x: s.by[c, x]) for x in of} for c, of in levels.labels.items()
            }
        return out

    def _shifted(self, train: Cells, name: str, control: Mapping[str, str]) -> list[dict[str, float]]:
        """Scores of baseline (d) of an unseen combination. None where it can't be drawn."""
        if name not in self.scorer.levels.combinations:
            return []
        config, test, out = self.config, self.scorer.test.of_type(name), []
        for j in range(N_EXPENSIVE):
            labels = self.sides.combinations[name]
            counts = baselines.shifted_controls(train, labels, control, len(test), config.rng(5, j))
            if counts is None:
                return []
            other = Profile.of(counts, np.full(len(test), name), self.space)
            out.append(score(test, other, config.max_group_cells, config.seed))
        return out

    def parts(self, parts: Mapping[str, Part], genes: tuple[str, ...], generated: Profile) -> dict[str, dict]:
        """parts: the scores of each. beside_parts: n_cells, and the scores of generated and training cells (`floor`,
        with its standard deviation over draws), all at the same numbers. Of each combination these are the cells that
        every part has, at most `max_group_cells`. Where they are too few to be scored, it is left out. Both empty where
        all together are too few.

        Raises: InputError where a part lacks genes that are compared.
        """
        for part in parts.values():
            if lacking := set(genes) - set(part.cells.genes):
                raise InputError(
                    f"{part.cells.name} has {len(genes) - len(lacking):,} of the {len(genes):,} genes that are "
                    f"compared, and lacks {sorted(lacking)[0]!r}. Give the model that generated the cells, or leave "
                    "model out"
                )
        there, pool = [part.cells.numbers() for part in parts.values()], self.sides.pool
        most = self.config.max_group_cells
        numbers = {t: min(n, most, *(of.get(t, 0) for of in there)) for t, n in self.sides.numbers.items()}
        if not parts or sum(numbers.values()) < self.config.min_cells:
            return {"parts": {}, "beside_parts": {}}
        rng, scorer = self.config.rng(4), self.scorer
        small = [t for t, n in numbers.items() if n < self.config.min_cells]
        few = replace(scorer, test=drawn(scorer.test, numbers, rng), levels=scorer.levels.without(small))

        def sections(counts: sp.csr_matrix, types: np.ndarray) -> dict[str, dict[str, float]]:
            return _sections(few.scores(Profile.of(counts, types, self.space)))

        floors = [sections(*baselines.floor_cells(pool.counts, pool.types, numbers, rng)) for _ in range(N_EXPENSIVE)]
        beside: dict[str, Any] = {"n_cells": sum(numbers.values())}
        beside["generated"] = _sections(few.scores(drawn(generated, numbers, rng)))
        for name, of in (("floor", np.mean), ("floor_sd", partial(np.std, ddof=1))):
            beside[name] = {
                section: {m: float(of([f[section][m] for f in floors if m in f[section]])) for m in values}
                for section, values in floors[0].items()
            }
        out = {}
        for name, part in parts.items():
            cells = drawn(with_genes(part.cells, genes), numbers, rng)
            out[name] = {"title": part.title, "meaning": part.meaning, **sections(cells.counts, cells.types)}
        return {"parts": out, "beside_parts": beside}


def drawn(cells: Set, numbers: Mapping[str, int], rng: np.random.Generator) -> Set:
    """`numbers` of the cells of each combination."""
    return cells.select(baselines.rows_per_type(cells.types, numbers, rng))


def _sections(scores: Scores) -> dict[str, dict[str, float]]:
    of = {"pooled": scores.pooled} | ({"per_combination": scores.mean[""]} if "" in scores.mean else {})
    return {name: {m: v for m, v in values.items() if math.isfinite(v)} for name, values in of.items()}
