"""An evaluation made up in a moment, in the shape that `compare` gives, for tests of what is drawn from it."""

from __future__ import annotations

import itertools
import json

import numpy as np

from scldm.evaluate.cells import BETWEEN
from scldm.evaluate.memorisation import MEMORISATION
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.protocols import PROTOCOLS
from scldm.evaluate.scores import table
from scldm.evaluate.verdict import summary, verdict

GENES = ["$g_1$", "<i>", "_gene", "g3"]


def evaluation(conditions: dict[str, list[str]], protocol: str = "scldm", small: int = 0, unseen: int = 0) -> dict:
    """As `compare` gives it: 20 + k cells of a combination; the last `small` have 5, the last of the others `unseen`
    none to train on. With two conditions the first label of the second is the control."""
    rng = np.random.default_rng(0)
    combinations = list(itertools.product(*conditions.values())) if conditions else []
    names = [BETWEEN.join(c) for c in combinations]
    n_scored = len(names) - small
    n = {t: 20 + n_scored - k if k < n_scored else 5 for k, t in enumerate(names)}
    by = {t: {"train": 50, "test": n[t], "generated": n[t], "compared": n[t]} for t in names}
    for k, (t, c) in enumerate(zip(names, combinations, strict=True)):
        lacks = n_scored - unseen <= k < n_scored
        by[t] |= {"labels": list(c), "unseen": lacks, **({"relatives": names[:1], "train": 0} if lacks else {})}
    scored, compared = names[:n_scored], sum(n.values()) or 30

    def scores_of(keys: str) -> dict:
        draws = {
            k: [{m: 0.1 * (j + 2) + 0.01 * rng.random() for m in METRICS} for _ in range(3)] for j, k in enumerate(keys)
        }
        floor = [{m: 0.1 + 0.001 * rng.random() for m in METRICS} for _ in range(3)]
        return table({m: 0.5 * rng.random() for m in METRICS}, dict.fromkeys(METRICS, 0.02), floor, draws)

    used = PROTOCOLS[protocol]
    by_label = {c: {x: scores_of("abc") for x in of} for c, of in (conditions if len(conditions) > 1 else {}).items()}
    out = {
        "config": {
            "seed": 0,
            "min_cells": 20,
            "max_combinations": 100,
            "max_cells": 25,
            "max_group_cells": 25,
            "max_real_cells": 100_000,
        },
        "conditions": list(conditions),
        "protocol": {
            **{key: getattr(used, key) for key in ("name", "title", "meaning", "main")},
            "n_components": 10,
            "explained_variance": 0.2,
            "fitted_on": "validation cells",
            "target_sum": 10_000,
            "n_genes": dict.fromkeys(("judged", "common", "real", "generated"), len(GENES)),
        },
        "cells": {
            **dict.fromkeys(("train", "validation", "test", "generated", "compared"), compared),
            "drawn_of": {},
            "without_counts": {"real": 0, "generated": 0},
            **({"by_combination": by, "generated_only": []} if names else {}),
        },
        "scored_combinations": scored,
        "not_scored": names[n_scored:],
        "set_apart": [t for t in names if by[t]["unseen"]],
        "pooled_only": "" if names else "No condition was given.",
        "pooled": scores_of("abc" if names else "ab"),
        **({"per_combination": scores_of("abc")} if names else {}),
        **({"by_combination": {t: scores_of("abcd" if by[t]["unseen"] else "abc") for t in scored}} if names else {}),
        **({"per_condition": {c: scores_of("abc") for c in conditions}, "by_condition": by_label} if by_label else {}),
        "notes": [],
        "memorisation": {m: {"score": 0.9, "error": 0.01} for m in MEMORISATION},
        "response": responses(conditions),
        "parts": {},
        "beside_parts": {},
        "genes": {
            "ids": GENES,
            **{s: {m: [0.1, 0.5, 0.2, 0.7] for m in ("mean", "variance", "fraction")} for s in SOURCES},
        },
        "map": [cell_map(s, conditions, combinations, names, rng) for s in SOURCES],
        **(markers(*next(iter(conditions.items())), rng) if conditions else {}),
    }
    out["summary"] = summary(out)
    out["verdict"] = verdict(out)
    return json.loads(json.dumps(out, allow_nan=False))


SOURCES = ("real", "generated")


def cell_map(source: str, conditions: dict, combinations: list, names: list[str], rng: np.random.Generator) -> dict:
    """Three cells of each combination."""
    n = 3 * max(len(names), 1)
    column = {c: [x for of in combinations for x in [of[k]] * 3] for k, c in enumerate(conditions)}
    of = {"labels": column, "combination": [t for t in names for _ in range(3)]} if names else {}
    return {"source": source, "x": rng.random(n).tolist(), "y": rng.random(n).tolist(), "total": [500] * n, **of}


def markers(condition: str, of: list[str], rng: np.random.Generator) -> dict:
    found = [
        {"type": t, "gene": g, "t": 3.0, "log2_fold_change": {"real": 2 * rng.random(), "generated": rng.random()}}
        for t in of
        for g in GENES[:2]
    ]
    values = {k: [[0.5, 0.2]] * len(of) for k in ("mean", "fraction")}
    return {
        "markers": found,
        "markers_of": {"condition": condition, "n_cells": dict.fromkeys(of, 30)},
        "expression": {"types": of, "genes": GENES[:2], "real": values, "generated": values},
    }


def responses(conditions: dict[str, list[str]]) -> dict:
    if len(conditions) < 2:
        return {}
    (group, groups), (condition, (control, *others)) = list(conditions.items())[:2]
    scores = {"slope": {"value": 0.6, "ceiling": 1.02, "low": 0.5, "high": 0.7}}
    scores |= {m: {"value": 0.8, "ceiling": 0.95} for m in ("r", "overlap_20", "direction_20", "delta_r", "delta_mae")}
    genes = {"gene": GENES, "test": [1.0, -1.0, 0.2, 0.0], "generated": [0.6, -0.6, 0.1, 0.1]}
    contrasts = [
        {
            "group": {group: g},
            "condition": condition,
            "control": control,
            "other": x,
            "of_halves": k == 0,
            "n_cells": {s: {"treated": 20 + k, "control": 20} for s in ("test", "generated", "train")},
            "scores": scores,
            "genes": genes,
        }
        for k, (g, x) in enumerate(itertools.product(groups, others))
    ]
    *kept, last = contrasts
    left_out = [{k: last[k] for k in ("group", "condition", "control", "other", "n_cells")}]
    found = {"condition": condition, "control": control, "pooled": scores, "unseen": {}, "contrasts": kept}
    return {condition: found | {"left_out": left_out, "min_cells": 20}}


TWO = {"cell_type": ["B cell", "T cell", "NK"], "treatment": ["ctrl", "stim"]}
