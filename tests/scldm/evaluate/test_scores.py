"""Scores at every level, and the table that says who is closer."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.evaluate.intervals import IntervalConfig
from scldm.evaluate.metrics import METRICS, score
from scldm.evaluate.protocols import PROTOCOLS
from scldm.evaluate.scores import CHEAP, Levels, Scorer, scored_labels, table
from scldm.evaluate.space import Profile, Space, fit_pca, log_normalise

COMBINATIONS = {"A · x": ("A", "x"), "A · y": ("A", "y"), "B · x": ("B", "x")}
NUMBERS = {"A · x": 40, "A · y": 15, "B · x": 25}


def profile(seed: int) -> Profile:
    rng = np.random.default_rng(seed)
    types = np.repeat(list(NUMBERS), list(NUMBERS.values()))
    rate = np.ones((len(types), 30)) + 3 * (np.arange(30) % 3 == np.array(["A" in t for t in types])[:, None])
    return Profile.of(sp.csr_matrix(rng.poisson(rate)), types, SPACE)


SPACE = Space(fit_pca(log_normalise(sp.csr_matrix(np.random.default_rng(9).poisson(2.0, (60, 30))))))


def test_labels_of_enough_cells_are_scored_and_one_condition_has_none_beside_its_combinations() -> None:
    found = scored_labels(["type", "drug"], COMBINATIONS, NUMBERS, 20)
    assert found == {"type": {"A": ["A · x", "A · y"], "B": ["B · x"]}, "drug": {"x": ["A · x", "B · x"]}}
    assert scored_labels(["type"], {"A": ("A",)}, {"A": 50}, 20) == {}


@pytest.mark.parametrize("name", ["scldm", "cfgen"])
def test_each_level_is_scored_on_its_own_cells_and_means_are_weighed_as_the_protocol_says(name: str) -> None:
    real, other = profile(0), profile(1)
    levels = Levels(["A · x", "B · x"], scored_labels(["type", "drug"], COMBINATIONS, NUMBERS, 20))
    found = Scorer(real, levels, PROTOCOLS[name], 2_000, 0).scores(other, CHEAP)
    assert set(found.by) == {("", "A · x"), ("", "B · x"), ("type", "A"), ("type", "B"), ("drug", "x")}
    rows = np.flatnonzero(np.isin(real.types, ["A · x", "B · x"]))
    assert found.by["drug", "x"] == score(real.select(rows), other.select(rows), 2_000, 0, CHEAP)
    weights = [40, 25] if name == "scldm" else [1, 1]
    each = [found.by["", t]["fd"] for t in ("A · x", "B · x")]
    assert found.mean[""]["fd"] == pytest.approx(np.average(each, weights=weights))
    few = levels.without(["A · y"])
    assert few.labels == {"type": {"B": ["B · x"]}, "drug": {"x": ["A · x", "B · x"]}}


@pytest.mark.heavy
def test_errors_stand_where_the_scores_do() -> None:
    real, other = profile(0), profile(1)
    config = IntervalConfig(n_parts=4, n_parts_expensive=2)
    found = Scorer(real, Levels(["A · x", "B · x"]), PROTOCOLS["scldm"], 2_000, 0).errors(other, config)
    assert set(found.pooled) == set(METRICS)
    a, b = (found.by["", t]["fd"] for t in ("A · x", "B · x"))
    assert found.mean[""]["fd"] == pytest.approx(np.hypot(40 * a, 25 * b) / 65)


def scores(**changed: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, 0.6) | changed


def test_table_normalises_between_floor_and_baseline():
    floor = [scores(w2=1.0, nn_accuracy=0.5, mean_r=0.99), scores(w2=1.2, nn_accuracy=0.5, mean_r=0.99)]
    poor = [scores(w2=3.1, nn_accuracy=0.9, mean_r=0.79), scores(w2=3.1, nn_accuracy=0.9, mean_r=0.79)]
    draws = {"a": poor, "b": floor, "c": floor, "d": poor}
    errors = {"w2": 0.2, "fd": float("nan")}
    rows = table(scores(w2=2.1, nn_accuracy=0.05, mean_r=0.69), errors, floor, draws, as_floor=("d",))
    assert rows["w2"]["floor"]["mean"] == pytest.approx(1.1)
    assert rows["w2"]["normalised"]["a"] == pytest.approx(0.5)
    assert rows["w2"]["beats"]["a"] is True
    assert rows["nn_accuracy"]["beats"]["a"] is False  # 0.05 is further from 0.5 than 0.9: cells copied, not drawn
    below = table(scores(w2=0.6), errors, floor, draws)["w2"]  # by .5 less than real cells have: too little variance
    assert below["normalised"]["a"] == pytest.approx(0.5 / 2.0)
    assert rows["mean_r"]["normalised"]["a"] == pytest.approx(1.5)  # more is better: beyond the baseline
    assert rows["mean_r"]["beats"]["a"] is False
    for no_worse_than_the_floor in "bcd":  # gives no scale
        assert rows["w2"]["normalised"][no_worse_than_the_floor] is None
        assert rows["w2"]["beats"][no_worse_than_the_floor] is None
    assert [rows[m]["error"] for m in ("w2", "fd", "mmd2")] == [0.2, None, None]


def test_a_baseline_on_the_other_side_of_the_ideal_gives_no_scale() -> None:
    """AUC: .46 of the floor and .543 of the baseline are about as far from one half."""
    floor, near = ([scores(auc=v), scores(auc=v + 0.004)] for v in (0.46, 0.541))
    row = table(scores(auc=0.6), {}, floor, {"a": near})["auc"]
    assert (row["normalised"]["a"], row["beats"]["a"]) == (None, None)


def test_expensive_scores_have_fewer_draws() -> None:
    cheap = dict.fromkeys(CHEAP, 0.5)
    rows = table(scores(), {}, [scores(), scores(), cheap], {"a": [scores(auc=0.9), scores(auc=0.91), cheap]})
    assert [len(rows[m]["floor"]["draws"]) for m in ("auc", "mmd2")] == [2, 3]
    assert rows["auc"]["beats"]["a"] is True
