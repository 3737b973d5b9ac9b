"""The sentence fits the numbers: copies before effects, baselines before praise, and no praise without baselines."""

from __future__ import annotations

from typing import Any

import pytest

from scldm.evaluate.metrics import METRICS
from scldm.evaluate.verdict import DISTANCES, reaches_floor, summary, verdict, what_limits


def row(score: float, error: float, floor: float, baseline: float, beats: bool | None) -> dict[str, Any]:
    return {
        "score": score,
        "error": error,
        "floor": {"mean": floor, "sd": 0.1, "draws": [floor]},
        "baselines": {"a": {"mean": baseline, "sd": 0.1, "draws": [baseline]}},
        "normalised": {"a": None},
        "beats": {"a": beats},
    }


def evaluation(of: dict[str, Any], **more: Any) -> dict[str, Any]:
    empty = ("memorisation", "response", "parts", "beside_parts")
    out: dict[str, Any] = {"pooled": of, "set_apart": [], "conditions": [], "cells": {"compared": 1_500}}
    out |= {**{name: {} for name in empty}, **more}
    return out | {"summary": summary(out)}


def all_like(one: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(METRICS, one)


def test_a_model_that_loses_is_not_praised_for_wide_intervals() -> None:
    """Every interval reaches the floor, and every baseline is closer."""
    found = verdict(evaluation(all_like(row(5.0, 3.0, 1.0, 2.0, False))))
    assert found["says"].startswith("The model loses to a baseline: only 0 of 20 scores")


def test_it_says_how_many_cells_and_combinations_were_scored() -> None:
    one = all_like(row(1.0, 0.1, 1.0, 2.0, True))
    cells = {"compared": 1_500, "by_combination": {name: {} for name in "abc"}}
    of = {"conditions": ["type", "drug"], "cells": cells}
    assert verdict(evaluation(one))["says"].endswith("The scores are of 1,500 generated cells and as many test cells.")
    found = verdict(evaluation(one, by_combination={"a": one, "b": one}, **of))["says"]
    assert found.endswith("2 of 3 combinations of type and drug are scored one by one.")
    assert "None of 3 combinations of type and drug is scored by itself." in verdict(evaluation(one, **of))["says"]


def test_without_a_baseline_that_is_told_apart_nothing_is_beaten() -> None:
    found = verdict(evaluation(all_like(row(5.0, 0.1, 1.0, 2.0, None))))
    assert found["says"].startswith("There are too few cells to tell even the baselines from real cells")


def test_praise_takes_both() -> None:
    good = verdict(evaluation(all_like(row(1.0, 0.1, 1.0, 2.0, True))))
    assert good["says"].startswith("Generated cells can hardly be told from real ones. 20 of 20")
    fair = verdict(evaluation(all_like(row(1.5, 0.1, 1.0, 2.0, True))))
    assert fair["says"].startswith("The model beats the baselines on most scores. ")
    assert fair["next"].startswith("`scldm evaluate` with model=FOLDER tells")


def test_copies_and_lost_effects_come_first() -> None:
    good = all_like(row(1.0, 0.1, 1.0, 2.0, True))
    lost = {"drug": {"pooled": {"slope": {"value": 0.4, "ceiling": 1.0, "low": 0.2, "high": 0.6}}}}
    assert "The effect of drug is washed out" in verdict(evaluation(good, response=lost))["says"]
    unsure = {"drug": {"pooled": {"slope": {"value": 0.6, "ceiling": 1.0, "low": 0.1, "high": 1.1}}}}
    assert "washed out" not in verdict(evaluation(good, response=unsure))["says"]
    copies = {"closer_to_training": {"score": 0.9, "error": 0.02}}
    assert "repeat training cells" in verdict(evaluation(good, memorisation=copies, response=lost))["says"]


def limits(part: tuple, generated: tuple, floor: tuple, spread: float = 0.01) -> str:
    """Of MMD2, W2 and FD."""
    sides = {"generated": generated, "floor": floor, "floor_sd": (spread * 1, spread * 10, spread * 100)}
    of = {
        name: {"pooled": dict(zip(DISTANCES, values, strict=True))} for name, values in {**sides, "part": part}.items()
    }
    return what_limits({"parts": {"from_training": of.pop("part")}, "beside_parts": of})


def test_what_limits_is_the_median_of_shares_above_noise() -> None:
    floor = (0.0, 9.0, 30.0)
    assert limits((0.9, 9.9, 39.0), (1.0, 10.0, 40.0), floor).startswith(
        "Reconstruction limits: encoding and decoding a"
    )
    assert limits((0.1, 9.1, 31.0), (1.0, 10.0, 40.0), floor).startswith("The diffusion model limits")
    # of two shares, .64 and .26, the middle; W2 lies within the spread of training cells
    assert "explains 45% of the distance" in limits((0.64, 9.0, 32.6), (1.0, 9.1, 40.0), floor)
    # cells that vary too little lie below the floor, and that is a distance too
    assert limits((0.0, 7.1, 20.5), (0.0, 7.0, 20.0), floor).startswith("Reconstruction limits")
    assert limits((0.0, 9.0, 30.0), (0.0, 9.1, 30.5), floor).startswith("No distance tells generated cells")


@pytest.mark.parametrize(
    "name, score, error, floor, reaches",
    [
        ("mmd2", 1.15, 0.1, 1.0, True),
        ("mmd2", 1.5, 0.1, 1.0, False),
        ("mmd2", 0.5, 0.1, 1.0, True),  # nearer than training cells: no fault of a distance without bias
        ("w2", 0.5, 0.1, 1.0, False),  # below the floor: cells vary too little
        ("w2", 0.8, 0.1, 1.0, True),
        ("auc", 0.6, 0.2, 0.52, True),  # 0.5 lies within
        ("auc", 0.7, 0.05, 0.52, False),
        ("mean_r", 0.9, 0.01, 0.95, False),
        ("correlation_slope", 1.2, 0.15, 0.9, True),
    ],
)
def test_what_counts_as_real(name: str, score: float, error: float, floor: float, reaches: bool) -> None:
    assert reaches_floor(METRICS[name], row(score, error, floor, 0.0, None)) == reaches
