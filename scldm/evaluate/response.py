"""How generated cells respond to a condition, beside how real cells do: how much, which genes, and in which direction.

A contrast is one label of a condition (treated) against the reference label (control), among cells whose other
conditions are the same. Every number stands beside its ceiling, which real cells reach against other real cells.

Reading order: the reference label, how far two sources agree, contrasts, all of them. changes.py has the formulas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scldm.errors import InputError
from scldm.evaluate.cells import Cells
from scldm.evaluate.changes import HALVES, N_BLOCKS, Blocks, Covariances, Pair, Score, slope, variance_of_sum
from scldm.evaluate.genes import pearson

TOP = (20, 50, 100)
LEAST_CELLS = 2 * N_BLOCKS  # a quarter of them still has a variance
FIGURE_GENES = 500

# --- the reference label -------------------------------------------------------------------------------------------

CONTROL_WORDS = (
    *("control", "controls", "ctrl", "vehicle", "dmso", "pbs", "mock", "untreated", "unstimulated", "unstim"),
    *("unperturbed", "nontargeting", "non targeting"),
)
CONTROL_LABELS = ("ctl",)  # a control only as the whole label: "CD4 CTL" is a cytotoxic T lymphocyte


def guess_control(labels: Sequence[str]) -> str | None:
    """The label that holds one of the usual names of a reference as a whole word, or is `ctl`, in any case. None where
    not exactly one does."""
    words = [" ".join(re.findall(r"[a-z0-9]+", label.casefold())) for label in labels]
    found = [
        label
        for label, text in zip(labels, words, strict=True)
        if text in CONTROL_LABELS or any(f" {word} " in f" {text} " for word in CONTROL_WORDS)
    ]
    return found[0] if len(set(found)) == 1 else None


# --- contrasts -----------------------------------------------------------------------------------------------------


def agreement(real: Pair, other: Pair) -> dict[str, float]:
    """How far two sources agree about a change. r: Pearson over genes. delta_r, delta_mae: Pearson r and mean absolute
    error of differences of mean log1p counts per 10,000, which cell-eval calls pearson_delta and mae_delta.
    overlap_K: share of the real cells' top K genes that are the other's too. direction_K: share of them that change
    in the same direction. K is 20, 50 and 100, but no more than half of the genes."""
    out = {
        "r": pearson(real.change, other.change),
        "delta_r": pearson(real.log1p_change, other.log1p_change),
        "delta_mae": float(np.abs(real.log1p_change - other.log1p_change).mean()),
    }
    for k in (k for k in TOP if 2 * k <= len(real.change)):
        top = real.top(k)
        out[f"overlap_{k}"] = len(np.intersect1d(top, other.top(k))) / k
        out[f"direction_{k}"] = float((np.sign(real.change) == np.sign(other.change))[top].mean())
    return out


def ceilings(test: Pair, train: Pair | None) -> dict[str, float]:
    """agreement of the test with the training cells. Without these, of the two halves of the test cells. There r is as
    it would be with twice the cells, 2 r / (1 + r). The others are as with half the cells, and so are too low.
    Source: Spearman 1910, Brown 1910."""
    if train is not None:
        return agreement(test, train)
    halves = agreement(test.half(0), test.half(1))
    return halves | {n: 2 * halves[n] / (1 + halves[n]) for n in ("r", "delta_r") if halves[n] > 0}


def rows_with(cells: Cells, labels: Mapping[str, str]) -> np.ndarray:
    """The cells that have these labels, condition -> label."""
    keep = np.ones(len(cells.types), bool)
    for condition, label in labels.items():
        keep &= cells.labels[condition] == label
    return np.flatnonzero(keep)


@dataclass(frozen=True)
class Contrast:
    """Treated (label `other` of the condition) against control cells of one combination of the other conditions.

    group: the other conditions and their labels. Empty where there are none
    n_cells: test, generated, train -> their treated and control cells
    of_halves: training cells have too few, so that ceilings are those of the test cells' halves
    covariances: what the slope is made of
    r_S: r again, each time from half of the generated and of the test cells
    scores: slope, and those of `agreement`, each with its ceiling
    genes: for a figure: those of the largest |z| in test cells, and others drawn evenly, with their changes
    """

    group: dict[str, str]
    condition: str
    control: str
    other: str
    n_cells: dict[str, dict[str, int]]
    of_halves: bool
    covariances: Covariances
    r_S: np.ndarray
    scores: dict[str, Score]
    genes: dict[str, list]

    @property
    def weight(self) -> int:
        return sum(self.n_cells["test"].values())

    @property
    def trained(self) -> bool:
        return self.n_cells["train"]["treated"] > 0

    def as_json(self) -> dict:
        """Everything but the covariances and replicates."""
        kept = ("group", "condition", "control", "other", "of_halves", "genes", "n_cells")
        scores = {name: score.as_json() for name, score in self.scores.items()}
        return {**{name: getattr(self, name) for name in kept}, "scores": scores}


def figure_genes(genes: Sequence[str], of: Mapping[str, Pair]) -> dict[str, list]:
    """At most 500 genes with their changes in each source: half of them of the largest |z| in test cells, largest
    first, and others drawn evenly."""
    order, first = of["test"].top(len(genes)), FIGURE_GENES // 2
    rest = order[first:]
    chosen = np.concatenate([order[:first], rest[:: max(1, -(-len(rest) // first))]])
    return {"gene": [genes[k] for k in chosen], **{s: np.round(p.change[chosen], 4).tolist() for s, p in of.items()}}


# --- all of them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """How generated cells respond to one condition.

    contrasts: those with enough cells on every side
    pooled: their means, weighted by test cells, over those that were trained. Of all, where none was. The slope is the
        ratio of weighted covariances, so that contrasts in which real cells hardly respond count little
    unseen: the same over those whose treated cells were not trained, where others were
    left_out: the others, with their cells. `least` is how many each side needs
    """

    condition: str
    control: str
    contrasts: list[Contrast]
    pooled: dict[str, Score]
    unseen: dict[str, Score]
    left_out: list[dict]
    least: int

    def as_json(self) -> dict:
        return {
            "condition": self.condition,
            "control": self.control,
            "pooled": {name: score.as_json() for name, score in self.pooled.items()},
            "unseen": {name: score.as_json() for name, score in self.unseen.items()},
            "contrasts": [c.as_json() for c in self.contrasts],
            "left_out": self.left_out,
            "min_cells": self.least,
        }


def pooled(contrasts: Sequence[Contrast]) -> dict[str, Score]:
    """slope and `agreement` of all contrasts together. The errors know which contrasts share their control cells.
    Empty without contrasts."""
    if not contrasts:
        return {}
    w, groups = [c.weight for c in contrasts], [tuple(c.group.items()) for c in contrasts]
    out = {"slope": slope([c.covariances for c in contrasts], w, groups)}
    errors = {"r": float(np.sqrt(variance_of_sum(np.array([c.r_S for c in contrasts]), w, groups))) / sum(w)}
    for name in contrasts[0].scores:
        if name != "slope":
            scores = [c.scores[name] for c in contrasts]
            value, ceiling = (
                float(np.average([getattr(s, n) for s in scores], weights=w)) for n in ("value", "ceiling")
            )
            out[name] = Score(value, ceiling, errors.get(name))
    return out


def response(
    train: Cells,
    test: Cells,
    generated: Cells,
    condition: str,
    control: str,
    min_cells: int = 20,
    seed: int = 0,
) -> Response:
    """Every label of the condition in the test cells against `control`, in every combination of the other conditions.

    Of a label, as many generated as training cells are compared, where training has enough, so that ceilings are at
    the same numbers. A contrast needs `min_cells` test and generated cells on both sides, and no less than 16.

    Raises: InputError for a condition that cells lack, and a control label that the test cells lack.
    """
    assert test.genes == generated.genes == train.genes
    sources = {"test": test, "generated": generated, "train": train}
    for name, source in sources.items():
        if condition not in source.labels:
            there = ", ".join(source.labels) or "none"
            raise InputError(f"control: {name} cells have no condition {condition!r}. They have {there}")
    labels = sorted(set(map(str, test.labels[condition])))
    if control not in labels:
        raise InputError(f"control: {condition}={control!r} is no label of the test cells: {', '.join(labels[:10])}")
    least, rng = max(min_cells, LEAST_CELLS), np.random.default_rng(seed)
    others = [c for c in test.labels if c != condition]
    groups = sorted(set(zip(*(map(str, test.labels[c]) for c in others)))) if others else [()]
    contrasts, left_out = [], []
    for group in (dict(zip(others, group, strict=True)) for group in groups):
        rows = {x: {s: rows_with(source, group | {condition: x}) for s, source in sources.items()} for x in labels}
        n = {x: {s: len(of_label[s]) for s in sources} for x, of_label in rows.items()}
        blocks = {x: _blocks(sources, of_label, least, rng) for x, of_label in rows.items() if n[x]["test"]}
        halves_SK = rng.permutation(HALVES)  # one order for the group: its contrasts have the same control cells
        for other in (x for x in blocks if x != control):
            about = {"group": group, "condition": condition, "control": control, "other": other}
            numbers = {s: {"treated": n[other][s], "control": n[control][s]} for s in sources}
            if min(*numbers["test"].values(), *numbers["generated"].values()) < least:
                left_out.append(about | {"n_cells": numbers})
                continue
            of = {s: Pair(blocks[other][s], blocks[control][s]) for s in sources if min(numbers[s].values()) >= least}
            contrasts.append(_contrast(about, numbers, test.genes, of, halves_SK))
    trained = [c for c in contrasts if c.trained]
    unseen = pooled([c for c in contrasts if not c.trained]) if trained else {}
    return Response(condition, control, contrasts, pooled(trained or contrasts), unseen, left_out, least)


def _blocks(
    sources: Mapping[str, Cells], rows: Mapping[str, np.ndarray], least: int, rng: np.random.Generator
) -> dict[str, Blocks]:
    """Of one label in one group, source -> its cells, where it has enough."""
    of_train = len(rows["train"])
    most = min(len(rows["generated"]), of_train) if of_train >= least else len(rows["generated"])
    out = {}
    for name, source in sources.items():
        if len(rows[name]) >= least and (name == "test" or most >= least):
            drawn = rows[name] if name == "test" else rng.permutation(rows[name])[:most]
            out[name] = Blocks.of_counts(source.counts[drawn], rng)
    return out


def _contrast(
    about: dict, numbers: dict, genes: Sequence[str], of: Mapping[str, Pair], halves_SK: np.ndarray
) -> Contrast:
    """halves_SK: HALVES in the group's order, of the generated cells that go with each half of the test cells."""
    test, generated, train = of["test"], of["generated"], of.get("train")
    covariances = Covariances.of(test, generated, train, halves_SK)
    r_S = np.array([pearson(x, y) for x, y in zip(test.changes(HALVES), generated.changes(halves_SK), strict=True)])
    errors, real = {"r": float(r_S.std())}, ceilings(test, train)  # of r by the delete-half jackknife, as of the slope
    scores = {name: Score(v, real.get(name), errors.get(name)) for name, v in agreement(test, generated).items()}
    return Contrast(
        **about,
        n_cells=numbers,
        of_halves=train is None,
        covariances=covariances,
        r_S=r_S,
        scores={"slope": slope([covariances], [1.0], [()]), **scores},
        genes=figure_genes(genes, of),
    )


def responses(
    train: Cells,
    test: Cells,
    generated: Cells,
    control: Mapping[str, str],
    min_cells: int = 20,
    seed: int = 0,
) -> dict[str, Response]:
    """condition -> `response`, for every condition whose reference label is named in `control`."""
    return {c: response(train, test, generated, c, label, min_cells, seed) for c, label in control.items()}
