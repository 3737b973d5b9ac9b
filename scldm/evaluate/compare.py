"""Everything that is known about one set of generated cells, as a dict that JSON can hold. report.py draws it.

Reading order: config, compare, its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.spatial.distance import pdist

from scldm.checked import Checked, checked
from scldm.errors import InputError
from scldm.evaluate import baselines, markers
from scldm.evaluate.cells import (
    NO_TYPE,
    Cells,
    common_genes,
    matched_numbers,
    names,
    scored_combinations,
    with_genes,
)
from scldm.evaluate.genes import gene_moments
from scldm.evaluate.intervals import IntervalConfig
from scldm.evaluate.map_of_cells import cell_map
from scldm.evaluate.memorisation import memorisation_errors, memorisation_scores, nearness
from scldm.evaluate.metrics import score
from scldm.evaluate.named import check_controls
from scldm.evaluate.protocols import PROTOCOLS, Protocol
from scldm.evaluate.response import guess_control, responses
from scldm.evaluate.sample import SPLITS
from scldm.evaluate.scores import CHEAP, Levels, Scores, errors_of, score_sets, scored_labels, table
from scldm.evaluate.space import Profile, Space, log_normalise
from scldm.evaluate.verdict import summary, verdict
from scldm.label_text import known_label
from scldm.progress import Progress
from scldm.vocab import MIN_GENE_SHARE

COINCIDE = 0.3  # at half of all pairs a group has no width. Its halves reach that sooner
N_EXPENSIVE = 3  # draws of floor and baselines for which the forest is grown


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    """How generated cells are judged.

    seed: of every random draw: floor, baselines, subsamples, UMAP
    n_draws: how often the floor and each baseline are drawn. Tables give their mean and standard deviation. The
        classifier takes the first 3
    min_cells: combinations and labels with at least this many compared cells are scored one by one. All cells at once
        need as many
    max_combinations: at most so many are scored one by one, the largest
    max_cells: scores that compare every cell with every other take at most so many cells a side
    max_group_cells: of a combination or label, at most so many
    max_drawn_cells: of floor and each baseline at most so many cells are drawn in all draws together, in no fewer than
        3 draws
    max_real_cells: of each split at most so many cells are taken. They are a seeded draw, with combinations in the
        shares at which they are compared. 100,000 cells of 3,000 expressed genes take 2.4 GB
    min_gene_share: of the genes of real or generated cells, whichever are fewer, that both must have
    """

    seed: int = checked(0, at_least=0, below=1 << 31)  # scikit-learn's lie below 2^32, and parts add to it
    n_draws: int = checked(10, at_least=2)
    min_cells: int = checked(20, at_least=8)  # a half of them still has a covariance
    max_combinations: int = checked(100, at_least=0)
    max_cells: int = checked(2_000, at_least=100)
    max_group_cells: int = checked(500, at_least=20)
    max_drawn_cells: int = checked(200_000, at_least=1_000)
    max_real_cells: int = checked(100_000, at_least=1_000)
    min_gene_share: float = checked(MIN_GENE_SHARE, at_least=0, at_most=1)
    intervals: IntervalConfig = field(default_factory=IntervalConfig)


@dataclass(frozen=True)
class Part:
    """Cells that show which part of a model costs what, judged as the generated ones are.

    title, meaning: for a table
    cells: of combinations of the test cells
    """

    title: str
    meaning: str
    cells: Cells


# --- compare -------------------------------------------------------------------------------------------------------


def compare(
    train: Cells,
    validation: Cells,
    test: Cells,
    generated: Cells,
    config: EvaluateConfig,
    protocol: str = "scldm",
    control: Mapping[str, str] | None = None,
    parts: Mapping[str, Part] | None = None,
) -> dict:
    """Scores with floor and baselines, memorisation, responses, marker genes, and what the figures need. JSON-ready,
    every list in a stated order.

    Without a combination of enough cells, `pooled_only` says so and the scores per combination are absent. Without
    conditions, all that speaks of them is.

    control: condition -> its reference label, for responses. Of other conditions it is guessed by its name
    parts: reconstructed cells and the like, by name

    Raises: InputError for cells that can't be compared.
    """
    chosen = PROTOCOLS[protocol]
    _refuse_too_few(validation, chosen)
    n_genes = {"real": len(train.genes), "generated": len(generated.genes)}
    drawn_of = {split: of.drawn_of for split, of in zip(SPLITS, (train, validation, test)) if of.drawn_of}
    genes = common_genes(train, generated, config.min_gene_share)
    train, validation, test, generated = (with_genes(cells, genes) for cells in (train, validation, test, generated))
    sides = _Sides.of(train, test, generated, config)
    space = chosen.fit(validation.counts, test.counts, config.seed)
    control = known_controls(test, control or {})

    rng = _rng(config)
    judged = {
        "real": test.select(baselines.rows_per_type(test.types, sides.numbers, rng(0))),
        "generated": generated.select(baselines.rows_per_type(generated.types, sides.numbers, rng(1))),
    }
    profiles = {name: Profile.of(cells.counts, cells.types, space) for name, cells in judged.items()}
    alike = of_copies(profiles["real"], sides.levels)
    not_scored = [*sides.not_scored, *(label for condition, label in alike if not condition)]
    sides = replace(sides, levels=sides.levels.less(alike), not_scored=not_scored)
    scorer = _Scorer(profiles["real"], space, sides.levels, chosen, config)
    tables = scorer.all_of(sides, train, profiles["generated"], control)
    memorised, told = _memorisation(train, profiles, space, config)
    answers = responses(train, test, generated, control, config.min_cells, config.seed)
    notes = []
    if alike:
        notes = [f"Not scored one by one, as many of their test cells are alike: {names([x for _, x in alike])}."]

    out: dict[str, Any] = {
        "config": asdict(config),
        "conditions": list(test.labels),
        "protocol": _protocol(chosen, space, {"common": len(genes), **n_genes}),
        "cells": {
            "train": len(train),
            "validation": len(validation),
            "test": len(test),
            "generated": len(generated),
            "compared": len(judged["real"]),
            "drawn_of": drawn_of,
            "without_counts": {name: int((p.total == 0).sum()) for name, p in profiles.items()},
            **sides.by_combination(train, test, generated),
        },
        "scored_combinations": list(sides.levels.combinations),
        "not_scored": sides.not_scored,
        "set_apart": list(sides.levels.apart),
        "pooled_only": sides.pooled_only,
        **tables,
        "memorisation": memorised,
        "notes": [*notes, *told],
        "response": {c: of.as_json() for c, of in answers.items()},
        **scorer.parts(parts or {}, genes, sides, profiles["generated"]),
        "genes": {"ids": [genes[k] for k in _columns(space, genes)], **{n: _moments(p) for n, p in profiles.items()}},
        "map": cell_map(profiles, {name: cells.labels for name, cells in judged.items()}, config.seed),
        **(_markers(train, judged, genes) if NO_TYPE not in sides.numbers else {}),
    }
    out["summary"] = summary(out)
    out["verdict"] = verdict(out)
    return out


def _refuse_too_few(validation: Cells, chosen: Protocol) -> None:
    if chosen.fitted_on == "validation" and len(validation) <= chosen.n_components:
        raise InputError(
            f"{validation.name}: {len(validation)} validation cells, and at least {chosen.n_components + 1} are "
            f"needed: {chosen.n_components} principal components are fitted on them, because cells that were trained "
            "on or are judged would bend the scale. Put more cells into that split"
        )


def _protocol(chosen: Protocol, space: Space, n_genes: Mapping[str, int]) -> dict[str, Any]:
    """How cells were compared, and on how many genes of how many."""
    described = space.describe()
    return {
        **{key: getattr(chosen, key) for key in ("name", "title", "meaning")},
        "main": list(chosen.main),
        **{k: v for k, v in described.items() if k != "n_genes"},
        "n_genes": {"judged": described["n_genes"], **n_genes},
    }


def known_controls(test: Cells, given: Mapping[str, str]) -> dict[str, str]:
    """condition -> reference label: as given, else by the usual names (control, ctrl, DMSO ...) where exactly one label
    has one.

    Raises: InputError for a condition or a label that the test cells do not have.
    """
    check_controls(given, test.labels)
    for condition, label in given.items():
        there = np.unique(test.labels[condition]).tolist()
        if known_label(label, there) not in there:
            raise InputError(f"control.{condition}={label}: no test cell has this label. There are {there[:10]}")
    guessed = {c: guess_control(np.unique(column).tolist()) for c, column in test.labels.items()}
    own = {c: known_label(label, np.unique(test.labels[c]).tolist()) for c, label in given.items()}
    return {c: label for c in test.labels if (label := own.get(c) or guessed[c])}


def _rng(config: EvaluateConfig) -> Callable[..., np.random.Generator]:
    return lambda *key: np.random.default_rng([config.seed, *key])


# --- who is compared with whom -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sides:
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
    def of(cls, train: Cells, test: Cells, generated: Cells, config: EvaluateConfig) -> _Sides:
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
class _Scorer:
    """Scores sets of cells against the test cells, in one space and at the same levels."""

    real: Profile
    space: Space
    levels: Levels
    protocol: Protocol
    config: EvaluateConfig

    def scores(self, profile: Profile, only: Collection[str] | None = None) -> Scores:
        c = self.config
        return score_sets(self.real, profile, self.levels, self.protocol, c.max_cells, c.seed, only)

    def all_of(self, sides: _Sides, train: Cells, generated: Profile, control: Mapping[str, str]) -> dict:
        """pooled, per_combination, by_combination and by_condition: tables with floor and baselines."""
        config, rng = self.config, _rng(self.config)
        ways = {"floor": baselines.floor_cells, **{key: draw for key, (_, _, draw) in baselines.BASELINES.items()}}
        if NO_TYPE in sides.numbers:
            del ways["c"]  # there are no labels to shuffle
        draws: dict[str, list[Scores]] = {}
        n_draws = min(config.n_draws, max(3, config.max_drawn_cells // len(generated)))
        with Progress("evaluate", 2 + len(ways) * n_draws, "comparisons") as bar:
            mine = self.scores(generated)
            if not math.isfinite(mine.pooled["mmd2"]):
                raise InputError("half of the pairs of test cells or more coincide. Is the test split made of copies?")
            bar.advance()
            errors = errors_of(
                self.real, generated, self.levels, self.protocol, config.max_cells, config.seed, config.intervals
            )
            bar.advance()
            for k, (name, draw) in enumerate(ways.items()):
                draws[name] = []
                for j in range(n_draws):
                    counts, types = draw(sides.pool.counts, sides.pool.types, sides.numbers, rng(2, k, j))
                    profile = Profile.of(counts, types, self.space)
                    draws[name].append(self.scores(profile, None if j < N_EXPENSIVE else CHEAP))
                    bar.advance(note=name)
        shifted = {t: self._shifted(train, t, sides, control) for t in sides.relatives}

        def tabulate(pick: Callable[[Scores], dict[str, float]], as_floor: Collection[str] = (), more=None) -> dict:
            others = {name: [pick(s) for s in scores] for name, scores in draws.items()} | (more or {})
            return table(pick(mine), pick(errors), others.pop("floor"), others, as_floor)

        out: dict[str, Any] = {"n_draws": n_draws, "pooled": tabulate(lambda s: s.pooled, as_floor=("c",))}
        if "" in mine.mean:
            out["per_combination"] = tabulate(lambda s: s.mean[""])
        if self.levels.combinations:
            out["by_combination"] = {
                t: tabulate(lambda s, t=t: s.by["", t], more={"d": d} if (d := shifted.get(t)) else {})
                for t in self.levels.combinations
            }
        if self.levels.labels:
            out["per_condition"] = {c: tabulate(lambda s, c=c: s.mean[c]) for c, of in self.levels.labels.items() if of}
            out["by_condition"] = {
                c: {x: tabulate(lambda s, c=c, x=x: s.by[c, x]) for x in of} for c, of in self.levels.labels.items()
            }
        return out

    def _shifted(self, train: Cells, name: str, sides: _Sides, control: Mapping[str, str]) -> list[dict[str, float]]:
        """Scores of baseline (d) of an unseen combination. None where it can't be drawn."""
        if name not in self.levels.combinations:
            return []
        config, test, out = self.config, self.real.of_type(name), []
        for j in range(N_EXPENSIVE):
            rng = _rng(config)(5, j)
            counts = baselines.shifted_controls(train, sides.combinations[name], control, len(test), rng)
            if counts is None:
                return []
            other = Profile.of(counts, np.full(len(test), name), self.space)
            out.append(score(test, other, config.max_group_cells, config.seed))
        return out

    def parts(
        self, parts: Mapping[str, Part], genes: tuple[str, ...], sides: _Sides, generated: Profile
    ) -> dict[str, dict]:
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
        there = [part.cells.numbers() for part in parts.values()]
        most = self.config.max_group_cells
        numbers = {t: min(n, most, *(of.get(t, 0) for of in there)) for t, n in sides.numbers.items()}
        if not parts or sum(numbers.values()) < self.config.min_cells:
            return {"parts": {}, "beside_parts": {}}
        rng = _rng(self.config)(4)
        small = [t for t, n in numbers.items() if n < self.config.min_cells]
        few = replace(self, real=_drawn(self.real, numbers, rng), levels=self.levels.without(small))

        def sections(counts: sp.csr_matrix, types: np.ndarray) -> dict[str, dict[str, float]]:
            return _sections(few.scores(Profile.of(counts, types, self.space)))

        floors = [
            sections(*baselines.floor_cells(sides.pool.counts, sides.pool.types, numbers, rng))
            for _ in range(N_EXPENSIVE)
        ]
        beside: dict[str, Any] = {"n_cells": sum(numbers.values())}
        beside["generated"] = _sections(few.scores(_drawn(generated, numbers, rng)))
        for name, of in (("floor", np.mean), ("floor_sd", partial(np.std, ddof=1))):
            beside[name] = {
                section: {m: float(of([f[section][m] for f in floors if m in f[section]])) for m in values}
                for section, values in floors[0].items()
            }
        out = {}
        for name, part in parts.items():
            cells = with_genes(part.cells, genes)
            cells = cells.select(baselines.rows_per_type(cells.types, numbers, rng))
            out[name] = {"title": part.title, "meaning": part.meaning, **sections(cells.counts, cells.types)}
        return {"parts": out, "beside_parts": beside}


def _drawn(profile: Profile, numbers: Mapping[str, int], rng: np.random.Generator) -> Profile:
    return profile.select(baselines.rows_per_type(profile.types, numbers, rng))


def _sections(scores: Scores) -> dict[str, dict[str, float]]:
    of = {"pooled": scores.pooled} | ({"per_combination": scores.mean[""]} if "" in scores.mean else {})
    return {name: {m: v for m, v in values.items() if math.isfinite(v)} for name, values in of.items()}


# --- memorisation ---------------------------------------------------------------------------------------


def of_copies(real: Profile, levels: Levels) -> list[tuple[str, str]]:
    """The combinations and labels (as of Levels.rows) of whose test cells three in ten pairs or more coincide, as cells
    without counts do. They have no distances to judge by."""
    of = {key: real.components[rows[: levels.max_cells]] for key, rows in levels.rows(real).items()}
    return [key for key, components in of.items() if (pdist(components, "sqeuclidean") == 0).mean() > COINCIDE]


def _memorisation(
    train: Cells, profiles: Mapping[str, Profile], space: Space, config: EvaluateConfig
) -> tuple[dict, list[str]]:
    """metric -> score and standard error, at equal numbers of held-out and generated cells. Empty where it can't be
    told, with a sentence that says why."""
    trained = Profile.of(train.counts, train.types, space)
    real, generated = profiles["real"], profiles["generated"]
    n = min(config.max_cells, len(real))
    held_out = nearness(trained, real, n, config.seed)
    made = nearness(trained, generated, n, config.seed, real)
    try:
        values = memorisation_scores(held_out, made)
        errors = memorisation_errors(held_out, made, config.seed, config.intervals.n_parts)
    except InputError as error:
        return {}, [f"{error}."]
    errors = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    return {name: {"score": v, "error": errors[name]} for name, v in values.items() if math.isfinite(v)}, []


# --- genes ---------------------------------------------------------------------------------------------------------


def _columns(space: Space, genes: tuple[str, ...]) -> np.ndarray:
    return np.arange(len(genes)) if space.genes is None else space.genes


def _moments(profile: Profile) -> dict[str, list[float]]:
    """Mean, variance and fraction expressing of every gene over all cells."""
    moments = zip(("mean", "variance", "fraction"), gene_moments(profile.log), strict=True)
    return {name: v.round(4).tolist() for name, v in moments}


def _markers(train: Cells, judged: Mapping[str, Cells], genes: tuple[str, ...]) -> dict:
    """Marker genes of the labels of the first condition: what sets cell types apart, not treatments within them."""

    def first(cells: Cells) -> np.ndarray:
        return next(iter(cells.labels.values())) if cells.labels else cells.types

    sources = {name: (log_normalise(cells.counts), first(cells)) for name, cells in judged.items()}
    found = markers.check((log_normalise(train.counts), first(train)), sources, list(genes))
    labels, n = np.unique(first(judged["real"]), return_counts=True)
    order = [str(labels[k]) for k in np.argsort(-n, kind="stable")]
    found.sort(key=lambda m: order.index(m.type))  # stable: a label's own order stays
    condition = next(iter(judged["real"].labels), "")
    numbers = {str(t): int(k) for t, k in zip(labels, n, strict=True)}
    return {
        "markers": [asdict(m) for m in found],
        "markers_of": {"condition": condition, "n_cells": {t: numbers[t] for t in order}},
        "expression": _expression(sources, list(genes), found),
    }


def _expression(
    sources: Mapping[str, tuple[sp.csr_matrix, np.ndarray]], genes: list[str], found: list[markers.Marker]
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
