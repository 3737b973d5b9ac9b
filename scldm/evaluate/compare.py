"""Everything that is known about one set of generated cells, as a dict that JSON can hold. report.py draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from scldm.errors import InputError
from scldm.evaluate import markers
from scldm.evaluate.beside import Judge, Part, Sides, drawn
from scldm.evaluate.cells import NO_TYPE, Cells, common_genes, names, with_genes
from scldm.evaluate.config import EvaluateConfig
from scldm.evaluate.genes import gene_moments
from scldm.evaluate.map_of_cells import cell_map
from scldm.evaluate.memorisation import memorisation_table
from scldm.evaluate.named import check_controls
from scldm.evaluate.protocols import PROTOCOLS, Protocol
from scldm.evaluate.response import guess_control, responses
from scldm.evaluate.sample import SPLITS
from scldm.evaluate.scores import Scorer
from scldm.evaluate.space import Profile, Space
from scldm.evaluate.verdict import summary, verdict
from scldm.label_text import known_label


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
    sides = Sides.of(train, test, generated, config)
    space = chosen.fit(validation.counts, test.counts, config.seed)
    control = known_controls(test, control or {})

    both = {"real": test, "generated": generated}
    judged = {name: drawn(of, sides.numbers, config.rng(k)) for k, (name, of) in enumerate(both.items())}
    profiles = {name: Profile.of(cells.counts, cells.types, space) for name, cells in judged.items()}
    real, made = profiles["real"], profiles["generated"]
    alike = sides.levels.of_copies(real)
    not_scored = [*sides.not_scored, *(label for condition, label in alike if not condition)]
    sides = replace(sides, levels=sides.levels.less(alike), not_scored=not_scored)
    scorer = Scorer(real, sides.levels, chosen, config.max_cells, config.seed)
    judge = Judge(scorer, space, sides, config)
    tables = judge.tables(train, made, control)
    trained = Profile.of(train.counts, train.types, space)
    memorised, told = memorisation_table(trained, real, made, config.max_cells, config.seed, config.intervals.n_parts)
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
        **judge.parts(parts or {}, genes, made),
        "genes": {
            "ids": list(genes) if space.genes is None else [genes[k] for k in space.genes],
            **{name: _moments(p) for name, p in profiles.items()},
        },
        "map": cell_map(profiles, {name: cells.labels for name, cells in judged.items()}, config.seed),
        **(markers.compared(train, judged) if NO_TYPE not in sides.numbers else {}),
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
    labels = {c: np.unique(column).tolist() for c, column in test.labels.items()}
    own = {c: known_label(label, labels[c]) for c, label in given.items()}
    for c, label in own.items():
        if label not in labels[c]:
            raise InputError(f"control.{c}={given[c]}: no test cell has this label. There are {labels[c][:10]}")
    return {c: found for c, there in labels.items() if (found := own.get(c) or guess_control(there))}


def _moments(profile: Profile) -> dict[str, list[float]]:
    """Mean, variance and fraction expressing of every gene over all cells."""
    moments = zip(("mean", "variance", "fraction"), gene_moments(profile.log), strict=True)
    return {name: v.round(4).tolist() for name, v in moments}
