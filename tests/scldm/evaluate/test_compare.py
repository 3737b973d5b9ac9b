"""Cells that can't be compared are refused by name; those that can give scores that order them, and a report from
them."""

from __future__ import annotations

import json
import re
from html import escape

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.evaluate import compare as module
from scldm.evaluate.compare import NO_TYPE, Cells, EvaluateConfig, compare
from scldm.evaluate.curves import curves_of
from scldm.evaluate.figures import FIGURES, has, loss_curves
from scldm.evaluate.report import page as whole_page
from scldm.evaluate.report import verdicts, write_report

CONFIG = EvaluateConfig(n_draws=3)
GENES = tuple(f"g{k}" for k in range(40))


def cells(name: str, seed: int, numbers: dict[str, int], noise: float = 0.0) -> Cells:
    """Two factors shared by the genes of a cell (a program and its depth), other genes up in each type."""
    rng = np.random.default_rng(seed)
    types = np.repeat(list(numbers), list(numbers.values()))
    rate = np.ones((len(types), 40)) * rng.gamma(20, 0.1, size=(len(types), 1))
    rate[:, 20:30] *= rng.gamma(1, 1, size=(len(types), 1))
    for k, label in enumerate(("A", "B", "C")):
        rate[types == label, 6 * k : 6 * k + 6] *= 6
    rate = rate * (1 - noise) + noise * rate.mean()
    return Cells(sp.csr_matrix(rng.poisson(rate)), types, GENES, name)


@pytest.fixture
def sets() -> dict[str, Cells]:
    return {
        "train": cells("train", 0, {"A": 150, "B": 90, "C": 20}),
        "validation": cells("validation", 1, {"A": 50, "B": 30, "C": 6}),
        "test": cells("test", 2, {"A": 50, "B": 30, "C": 6}),
        "generated": cells("generated", 3, {"A": 60, "B": 25, "C": 6, "D & E": 4}),
    }


@pytest.fixture(autouse=True)
def no_umap(monkeypatch):
    """Its compiler takes seconds; the verb's test runs it."""
    monkeypatch.setattr(module, "umap_coordinates", lambda components, seed: components[:, :2])


def test_good_cells_are_near_the_floor_and_poor_ones_are_not(sets):
    good = compare(**sets, config=CONFIG)
    poor = compare(**{**sets, "generated": cells("generated", 3, {"A": 60, "B": 25, "C": 6}, noise=0.7)}, config=CONFIG)
    for name in ("mmd2", "w2", "fd"):
        row = good["per_type"][name]
        assert row["normalised"]["b"] < 0.4, name
        assert row["beats"] == {"a": True, "b": True, "c": True}, name
        assert poor["per_type"][name]["score"] > row["rivals"]["b"]["mean"], name
    assert good["per_type"]["nn_accuracy"]["score"] == pytest.approx(0.5, abs=0.12)
    assert poor["per_type"]["nn_accuracy"]["score"] > 0.8
    assert good["scored_types"] == ["A", "B"]
    assert good["cells"]["by_type"]["B"] == {"train": 90, "test": 30, "generated": 25, "compared": 25}
    assert good["cells"]["compared"] == 50 + 25 + 6
    assert good["cells"]["generated_only"] == ["D & E"]
    assert {m["gene"] for m in good["markers"] if m["type"] == "B"} < {f"g{k}" for k in range(6, 12)}
    assert all(m["log2_fold_change"]["generated"] > 0 for m in good["markers"])
    assert good == compare(**sets, config=CONFIG)
    # weights are cells: 50 of A, 25 of B
    a, b = (good["by_type"][t]["w2"]["score"] for t in "AB")
    assert good["per_type"]["w2"]["score"] == pytest.approx((50 * a + 25 * b) / 75)


def test_genes_are_matched_by_name(sets):
    generated = sets["generated"]
    order = np.random.default_rng(0).permutation(40)[:35]
    shuffled = Cells(generated.counts[:, order], generated.types, tuple(GENES[k] for k in order), "generated")
    found = compare(**{**sets, "generated": shuffled}, config=CONFIG)
    assert found["genes"]["ids"] == [g for g in GENES if g in set(shuffled.genes)]
    assert found["pooled"]["mean_r"]["score"] > 0.9  # about 0 with the columns out of order
    assert found["protocol"]["n_genes"] == {"common": 35, "real": 40, "generated": 35}


def without(cells: Cells, label: str) -> Cells:
    return cells.select(np.flatnonzero(cells.types != label))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: {"generated": without(s["generated"], "B")},
            "generated has no cells of 'B', which the test split holds",
        ),
        (lambda s: {"train": without(s["train"], "B")}, "train has no cells of 'B': floor and rivals"),
        (
            lambda s: {"validation": s["validation"].select(np.arange(10))},
            "validation: 10 validation cells, and at least 11 are needed",
        ),
        (lambda s: {"test": s["test"].select(np.arange(19))}, "only 19 cells to compare .* evaluate.min_cells=20"),
        (lambda s: {"generated": s["generated"].select(np.arange(0))}, "generated holds no cells"),
        (
            lambda s: {
                "generated": Cells(
                    s["generated"].counts, s["generated"].types, tuple("x" * k for k in range(40)), "generated"
                )
            },
            "generated and train have no gene in common",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(sets, change, message):
    with pytest.raises(InputError, match=message):
        compare(**{**sets, **change(sets)}, config=CONFIG)


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(InputError, match=rf"cells.h5ad: the matrix holds {value:g}, which is not a count"):
        Cells(sp.csr_matrix([[3.0, value]]), np.array(["A"]), ("g", "h"), "cells.h5ad")


def test_a_gene_that_stands_twice_is_refused():
    with pytest.raises(InputError, match="gene 'g' stands twice"):
        Cells(sp.csr_matrix([[3, 1]]), np.array(["A"]), ("g", "g"), "cells.h5ad")


def test_last_row_of_a_repeated_step_wins_and_what_is_not_finite_is_passed_over():
    rows = [
        {"step": 20, "cells_seen": 200, "time": 1.0, "split": "train", "loss": 9.0},
        {"step": 10, "cells_seen": 100, "time": 0.0, "split": "train", "loss": 5.0, "lr": None},
        {"step": 20, "cells_seen": 200, "time": 2.0, "split": "train", "loss": 4.0},
        {"step": 20, "cells_seen": 200, "time": 2.0, "split": "validation", "nll": float("nan")},
    ]
    assert curves_of(rows) == {"train": {"loss": [[100, 5.0], [200, 4.0]]}}
    many = curves_of(
        {"step": k, "cells_seen": k, "time": 0.0, "split": "train", "loss": float(k)} for k in range(3_500)
    )
    assert len(many["train"]["loss"]) == 875
    assert many["train"]["loss"][-1] == [3_499, 3_499.0]


def few_a_type(sets: dict[str, Cells]) -> dict:
    return compare(**{**sets, "test": cells("test", 2, {"A": 19, "B": 15, "C": 6})}, config=CONFIG)


def without_types(sets: dict[str, Cells]) -> dict:
    one = {name: Cells(c.counts, np.full(len(c.types), NO_TYPE), c.genes, name) for name, c in sets.items()}
    return compare(**one, config=CONFIG)


def test_small_sets_get_the_pooled_scores(sets):
    found = few_a_type(sets)
    assert "No type has 20 cells to compare (the most are 19 of 'A')" in found["pooled_only"]
    assert not {"per_type", "by_type"} & set(found)
    assert found["scored_types"] == []
    assert found["cells"]["by_type"]["A"]["compared"] == 19  # (a) and (b) still are drawn type by type
    assert found["markers"]
    assert found["pooled"]["w2"]["beats"] == {"a": True, "b": True, "c": None}
    told = verdicts(found)
    assert ["main metrics, pooled" in text for _, text in told] == [True, True, False]  # (c) is the floor; the markers
    assert told[0][0] == "4 of 4"


def test_cells_without_types_get_the_pooled_scores(sets):
    found = without_types(sets)
    assert found["pooled_only"].startswith("No condition was given")
    assert not {"per_type", "by_type", "markers", "expression"} & set(found)
    assert not {"by_type", "generated_only"} & set(found["cells"])
    assert all("type" not in source for source in found["map"])
    assert found["cells"]["compared"] == 86
    assert set(found["pooled"]["w2"]["rivals"]) == {"a", "b"}
    assert found["pooled"]["w2"]["normalised"]["a"] < 0.4


@pytest.mark.parametrize("make", [few_a_type, without_types])
def test_page_says_why_there_are_only_pooled_scores(sets, make):
    evaluation = make(sets)
    drawn = [name for name in FIGURES if has(evaluation, name)]
    for name in drawn:
        FIGURES[name](evaluation)
    page = whole_page(evaluation, dict.fromkeys(drawn, b""))
    assert escape(evaluation["pooled_only"]) in page
    for absent in ("Scores per type", "per type,", "Scores of each type", "Top row"):
        assert absent not in page
    typed = make is few_a_type
    assert ("Marker genes by type" in page) == ("Cells by type" in page) == ("shuffled types" in page) == typed
    assert {"scores", "umap", "genes", "library_sizes"} <= set(drawn)


def test_losses_over_different_genes_don_t_share_an_axis():
    curve = {"train": {"nll": [[64, 200.0], [128, 150.0]]}, "validation": {"nll": [[128, 450.0]]}}
    ldm = {"train": {"velocity_loss": [[64, 1.0]]}, "validation": {"velocity_loss": [[64, 1.1]]}}
    training, validation, both = loss_curves({"curves": {"vae": curve, "ldm": ldm}}).axes
    assert training.get_ylabel() == "nats per cell, over the genes of the step"
    assert validation.get_ylabel() == "nats per cell, over all genes"
    assert training.get_ylim()[1] < 300 < validation.get_ylim()[0]
    assert [line.get_label() for line in both.get_lines()][-1] == "validation"
    assert len(both.get_lines()) == 3
    assert not has({"curves": {"vae": {"train": {"lr": [[64, 0.1]]}}}}, "loss_curves")


def test_report_is_whole_and_needs_nothing_from_elsewhere(sets, tmp_path):
    sets["generated"] = Cells(*(getattr(sets["generated"], k) for k in ("counts", "types", "genes")), name="<b>&")
    evaluation = compare(**sets, config=CONFIG)
    rows = [
        {"step": k, "cells_seen": 64 * k, "time": 0.0, "split": split, name: 100 / k}
        for split, name in (("train", "loss"), ("validation", "nll"))
        for k in range(1, 30)
    ]
    evaluation["curves"] = {"vae": curves_of(rows)}
    evaluation["made_with"] = {"command": "scldm evaluate 'a<b'", "created": "today", "versions": {"numpy": "2"}}
    evaluation = json.loads(json.dumps(evaluation, allow_nan=False))  # a report can be drawn again from evaluation.json
    written = write_report(evaluation, tmp_path / "out")
    assert [p.name for p in written] == ["report.html", *(f"{name}.png" for name in FIGURES)]
    page = written[0].read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r"(src|href)=[\"'](?!data:image/png;base64,|#)|@import|url\(|<script", page)
    assert "a&lt;b" in page
    assert "Generated but not in the test split, and not judged: D &amp; E." in page
    assert not list((tmp_path / "out").rglob("*.part"))
