"""Cells that can't be compared are refused by name; those that can give scores that order them, and a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.evaluate import map_of_cells, metrics
from scldm.evaluate.beside import Part
from scldm.evaluate.cells import NO_TYPE, Cells, combination_names
from scldm.evaluate.compare import compare, known_controls
from scldm.evaluate.config import EvaluateConfig
from scldm.evaluate.curves import curves_of
from scldm.evaluate.intervals import IntervalConfig
from scldm.evaluate.two_sample import classifier_auc
from scldm.evaluate.verdict import DISTANCES

pytestmark = pytest.mark.heavy

CONFIG = EvaluateConfig(n_draws=3, intervals=IntervalConfig(4, 2))
GENES = tuple(f"g{k}" for k in range(40))
SEEN = {("A", "ctrl"): 150, ("A", "stim"): 90, ("B", "ctrl"): 60, ("C", "ctrl"): 40, ("C", "stim"): 40}
TESTED = {
    ("A", "ctrl"): 50,
    ("A", "stim"): 30,
    ("B", "ctrl"): 25,
    ("B", "stim"): 25,
    ("C", "ctrl"): 8,
    ("C", "stim"): 8,
}


def cells(name: str, seed: int, numbers: Mapping, noise: float = 0.0) -> Cells:
    """Two factors shared by the genes of a cell (a program and its depth), other genes up in each type; where numbers
    are of pairs, ten more rise fourfold in the second condition's `stim`."""
    rng = np.random.default_rng(seed)
    pairs = [key if isinstance(key, tuple) else (key,) for key in numbers]
    labels = np.repeat(np.array(pairs), list(numbers.values()), axis=0)
    rate = np.ones((len(labels), 40)) * rng.gamma(20, 0.1, size=(len(labels), 1))
    rate[:, 20:30] *= rng.gamma(1, 1, size=(len(labels), 1))
    for k, label in enumerate(("A", "B", "C")):
        rate[labels[:, 0] == label, 6 * k : 6 * k + 6] *= 6
    if labels.shape[1] > 1:
        rate[np.ix_(labels[:, 1] == "stim", range(30, 40))] *= 4
    rate = rate * (1 - noise) + noise * rate.mean()
    of = dict(zip(("type", "treatment"), labels.T))
    return Cells.of_labels(sp.csr_matrix(rng.poisson(rate)), of, GENES, name)


@pytest.fixture
def sets() -> dict[str, Cells]:
    return {
        "train": cells("train", 0, {"A": 150, "B": 90, "C": 20}),
        "validation": cells("validation", 1, {"A": 50, "B": 30, "C": 6}),
        "test": cells("test", 2, {"A": 50, "B": 30, "C": 6}),
        "generated": cells("generated", 3, {"A": 60, "B": 25, "C": 6, "D & E": 4}),
    }


@pytest.fixture
def two_conditions() -> dict[str, Cells]:
    """Treated B is not among the training cells; both combinations of C are too small to be scored alone."""
    return {
        "train": cells("train", 0, SEEN),
        "validation": cells("validation", 1, SEEN),
        "test": cells("test", 2, TESTED),
        "generated": cells("generated", 3, TESTED),
    }


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Its compiler takes seconds, and a hundred forests too; the verb's test runs both."""
    monkeypatch.setattr(metrics, "classifier_auc", partial(classifier_auc, n_trees=4))
    monkeypatch.setattr(map_of_cells, "umap_coordinates", lambda components, seed: components[:, :2])


def test_good_cells_are_near_the_floor_and_poor_ones_are_not(sets):
    good = compare(**sets, config=CONFIG)
    poor = compare(**{**sets, "generated": cells("generated", 3, {"A": 60, "B": 25, "C": 6}, noise=0.7)}, config=CONFIG)
    for name in ("mmd2", "w2", "fd"):
        row = good["per_combination"][name]
        assert row["normalised"]["b"] < 0.4, name
        assert row["beats"] == {"a": True, "b": True, "c": True}, name
        assert poor["per_combination"][name]["score"] > row["baselines"]["b"]["mean"], name
    assert good["per_combination"]["nn_accuracy"]["score"] == pytest.approx(0.5, abs=0.12)
    assert poor["per_combination"]["nn_accuracy"]["score"] > 0.8
    assert good["scored_combinations"] == ["A", "B"]
    assert good["not_scored"] == ["C"]
    of_b = {"train": 90, "test": 30, "generated": 25, "compared": 25, "labels": ["B"], "unseen": False}
    assert good["cells"]["by_combination"]["B"] == of_b
    assert good["cells"]["compared"] == 50 + 25 + 6
    assert good["cells"]["generated_only"] == ["D & E"]
    assert {m["gene"] for m in good["markers"] if m["type"] == "B"} < {f"g{k}" for k in range(6, 12)}
    assert all(m["log2_fold_change"]["generated"] > 0 for m in good["markers"])
    assert good == compare(**sets, config=CONFIG)
    # weights are cells: 50 of A, 25 of B
    a, b = (good["by_combination"][t]["w2"]["score"] for t in "AB")
    assert good["per_combination"]["w2"]["score"] == pytest.approx((50 * a + 25 * b) / 75)
    assert good["summary"]["baselines"]["b"]["closer"] > poor["summary"]["baselines"]["b"]["closer"]
    assert poor["verdict"]["says"].startswith("The model loses to a baseline")


def test_all_conditions_together_make_the_combinations(two_conditions):
    found = compare(**two_conditions, config=CONFIG)
    assert found["conditions"] == ["type", "treatment"]
    assert found["scored_combinations"] == ["A · ctrl", "A · stim", "B · ctrl", "B · stim"]
    assert set(found["not_scored"]) == {"C · ctrl", "C · stim"}
    assert {c: list(of) for c, of in found["by_condition"].items()} == {
        "type": ["A", "B"],
        "treatment": ["ctrl", "stim"],
    }
    # the pooled score of a condition's label is that of its combinations' cells together
    assert found["by_condition"]["type"]["A"]["fd"]["score"] != found["by_combination"]["A · ctrl"]["fd"]["score"]
    assert found["markers_of"]["condition"] == "type"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_an_unseen_combination_is_marked_and_its_baselines_are_what_can_be_drawn_without_it(two_conditions):
    found = compare(**two_conditions, config=CONFIG)
    of = found["cells"]["by_combination"]
    assert [t for t, n in of.items() if n["unseen"]] == ["B · stim"]
    assert set(of["B · stim"]["relatives"]) == {"A · stim", "B · ctrl", "C · stim"}
    row = found["by_combination"]["B · stim"]["fd"]
    assert row["floor"]["mean"] > 5 * found["by_combination"]["A · stim"]["fd"]["floor"]["mean"]  # others' cells
    assert set(row["baselines"]) == {"a", "b", "c", "d"}
    assert row["baselines"]["d"]["mean"] < row["floor"]["mean"] / 3  # control cells and the change of the others
    assert "d" not in found["by_combination"]["A · stim"]["fd"]["baselines"]


def test_unseen_combinations_count_in_no_score_of_the_others(two_conditions):
    """Cells that no training cell is like bend neither means nor pooled scores, nor what the verdict says of others."""
    found = compare(**two_conditions, config=CONFIG)
    others = {name: cells.select(np.flatnonzero(cells.types != "B · stim")) for name, cells in two_conditions.items()}
    without = compare(**others, config=CONFIG)
    for section in ("pooled", "per_combination"):
        for metric, row in without[section].items():
            assert found[section][metric]["score"] == pytest.approx(row["score"], rel=0.05, abs=0.02), (section, metric)
    judged = found["summary"]["like_real"]["judged"]
    assert judged == without["summary"]["like_real"]["judged"]
    assert found["set_apart"] == ["B · stim"]
    assert "On 1 unseen combination, " in found["verdict"]["says"]
    assert "(d) control + mean change" in found["verdict"]["says"]
    response = found["response"]["treatment"]
    assert set(response["pooled"]) == set(response["unseen"])
    assert {c["group"]["type"] for c in response["contrasts"] if not c["n_cells"]["train"]["treated"]} == {"B"}
    assert without["response"]["treatment"]["unseen"] == {}
    only = {name: cells.select(np.flatnonzero(cells.types == "B · stim")) for name, cells in two_conditions.items()}
    alone = compare(**two_conditions | {"test": only["test"], "generated": only["generated"]}, config=CONFIG)
    assert alone["set_apart"] == []  # nothing else to judge
    assert alone["per_combination"]
    few = found_with_seen(two_conditions, 10)
    assert few["set_apart"] == []  # the others are too few to be judged
    assert found_with_seen(two_conditions, 20)["set_apart"] == ["B · stim"]


def found_with_seen(two_conditions: dict[str, Cells], n: int) -> dict:
    """Evaluated with all cells of the unseen combination, and n others."""
    few = {}
    for name in ("test", "generated"):
        cells = two_conditions[name]
        unseen, other = np.flatnonzero(cells.types == "B · stim"), np.flatnonzero(cells.types == "A · ctrl")
        few[name] = cells.select(np.concatenate([unseen, other[:n]]))
    return compare(**two_conditions | few, config=CONFIG)


def test_responses_are_measured_against_the_control(two_conditions):
    found = compare(**two_conditions, config=CONFIG)["response"]
    assert list(found) == ["treatment"]
    assert found["treatment"]["control"] == "ctrl"
    assert found["treatment"]["pooled"]["slope"]["value"] == pytest.approx(1, abs=0.15)
    test = two_conditions["test"]
    assert known_controls(test, {}) == {"treatment": "ctrl"}
    assert known_controls(test, {"type": "A"}) == {"type": "A", "treatment": "ctrl"}
    with pytest.raises(InputError, match=r"control.donor=x: the conditions are type, treatment"):
        known_controls(test, {"donor": "x"})
    with pytest.raises(InputError, match=r"control.type=Z: no test cell has this label. There are \['A', 'B', 'C'\]"):
        known_controls(test, {"type": "Z"})


def test_effects_that_are_washed_out_are_what_the_verdict_names(two_conditions):
    """Half of the treated cells are control cells."""
    half = {
        ("A", "ctrl"): 50,
        ("A", "stim"): 15,
        ("B", "ctrl"): 25,
        ("B", "stim"): 13,
        ("C", "ctrl"): 8,
        ("C", "stim"): 8,
    }
    rest = cells("rest", 8, {("A", "ctrl"): 15, ("B", "ctrl"): 12})
    relabelled = {"type": rest.labels["type"], "treatment": np.full(len(rest), "stim")}
    kept = cells("kept", 7, half)
    together = {c: np.concatenate([kept.labels[c], relabelled[c]]) for c in relabelled}
    washed = Cells.of_labels(sp.csr_matrix(sp.vstack([kept.counts, rest.counts])), together, GENES, "washed")
    found = compare(**{**two_conditions, "generated": washed}, config=CONFIG)
    assert found["response"]["treatment"]["pooled"]["slope"]["value"] < 0.8
    assert "The effect of treatment is washed out" in found["verdict"]["says"]


def test_copied_cells_are_what_the_verdict_names(sets):
    train = sets["train"]
    rows = np.concatenate([np.flatnonzero(train.types == t)[:n] for t, n in {"A": 60, "B": 30, "C": 6}.items()])
    copies = replace(train.select(rows), name="copies")
    found = compare(**{**sets, "generated": copies}, config=CONFIG)
    assert found["memorisation"]["exact_copies"]["score"] == 1
    assert found["verdict"]["says"].startswith("Generated cells repeat training cells")


def test_splits_that_share_cells_have_no_memorisation_and_a_note(sets):
    shared = sets["train"].select(np.concatenate([np.arange(50), np.arange(150, 180)]))
    found = compare(**{**sets, "test": replace(shared, name="test")}, config=CONFIG)
    assert found["memorisation"] == {}
    assert "The splits share cells" in found["notes"][0]
    assert found["verdict"]["says"]


def test_a_combination_of_cells_that_are_alike_is_not_scored_alone_and_named(sets):
    test = sets["test"]
    counts = test.counts.tolil()
    counts[np.flatnonzero(test.types == "B")] = np.eye(1, 40, dtype=int)
    alike = test.with_counts(sp.csr_matrix(counts), GENES, "test")
    found = compare(**{**sets, "test": alike}, config=CONFIG)
    assert found["scored_combinations"] == ["A"]
    assert found["not_scored"] == ["C", "B"]
    assert "many of their test cells are alike: 'B'" in found["notes"][0]


def test_cells_of_which_many_are_alike_end_no_evaluation(sets):
    """28 of 40 cells of a combination have no counts: its halves may have no width, where the whole has."""
    test = cells("test", 2, {"A": 50, "B": 40, "C": 6})
    counts = test.counts.tolil()
    counts[np.flatnonzero(test.types == "B")[:28]] = 0
    empty = test.with_counts(sp.csr_matrix(counts), GENES, "test")
    generated = cells("generated", 3, {"A": 60, "B": 40, "C": 6})
    found = compare(**{**sets, "test": empty, "generated": generated}, config=CONFIG)
    assert found["scored_combinations"] == ["A"]
    with pytest.raises(InputError, match="Is the test split made of copies"):
        compare(**{**sets, "test": test.with_counts(counts.tocsr() * 0, GENES, "test")}, config=CONFIG)


def test_groups_as_small_as_allowed_are_scored(sets):
    few = {**sets, "test": cells("test", 2, {"A": 8, "B": 30, "C": 6})}
    found = compare(**few, config=replace(CONFIG, min_cells=8))
    assert set(found["by_combination"]) == {"A", "B"}
    with pytest.raises(InputError, match="min_cells=7 must be at least 8"):
        EvaluateConfig(min_cells=7)


def test_large_sets_have_fewer_draws(sets):
    found = compare(**sets, config=replace(CONFIG, n_draws=20, max_drawn_cells=1_000))
    assert len(found["pooled"]["fd"]["floor"]["draws"]) == 12


def test_a_part_tells_which_stage_limits(sets):
    poor = {**sets, "generated": cells("generated", 3, {"A": 60, "B": 25, "C": 6}, noise=0.7)}
    same, good = (cells("part", 5, {"A": 50, "B": 30, "C": 6}, noise) for noise in (0.7, 0.0))
    for part, said in ((same, "Reconstruction limits"), (good, "The diffusion model limits")):
        found = compare(**poor, config=CONFIG, parts={"reconstructed": Part("reconstructed", "as they are", part)})
        assert set(found["parts"]["reconstructed"]["per_combination"]) == set(found["per_combination"])
        assert found["beside_parts"]["n_cells"] == 81
        assert said in found["verdict"]["next"]
    # all parts, generated and training cells are scored at the numbers that every part has
    few = good.select(np.flatnonzero(good.types == "A"))
    parts = {"one": Part("one", "whole", good), "other": Part("other", "of A alone", few)}
    found = compare(**poor, config=CONFIG, parts=parts)
    beside, of_a = found["beside_parts"], found["by_combination"]["A"]["fd"]["score"]
    assert beside["n_cells"] == 50
    assert beside["generated"]["per_combination"]["fd"] == pytest.approx(of_a)
    one, other = (found["parts"][k]["per_combination"] for k in ("one", "other"))
    assert [one[m] for m in DISTANCES] == pytest.approx([other[m] for m in DISTANCES])
    assert min(beside["floor_sd"]["per_combination"][m] for m in DISTANCES) > 0
    single = Part("reconstructed", "as they are", good.select(np.flatnonzero(good.types == "A")[:1]))
    assert compare(**poor, config=CONFIG, parts={"reconstructed": single})["parts"] == {}


def test_a_part_of_another_model_is_refused_by_its_genes(sets):
    part = sets["test"]
    lacking = part.with_counts(part.counts[:, :30], GENES[:30], "reconstructed")
    with pytest.raises(InputError, match="reconstructed has 30 of the 40 genes that are compared, and lacks 'g30'"):
        compare(**sets, config=CONFIG, parts={"reconstructed": Part("reconstructed", "as they are", lacking)})


def test_the_published_protocol_is_another(sets):
    ours, theirs = (compare(**sets, config=CONFIG, protocol=name) for name in ("scldm", "cfgen"))
    assert [e["protocol"]["n_components"] for e in (ours, theirs)] == [10, 30]
    assert [e["protocol"]["fitted_on"] for e in (ours, theirs)] == ["validation cells", "test cells"]
    assert theirs["pooled"]["w2"]["score"] > ours["pooled"]["w2"]["score"]
    a, b = (theirs["by_combination"][t]["w2"]["score"] for t in "AB")
    assert theirs["per_combination"]["w2"]["score"] == pytest.approx((a + b) / 2)


def test_genes_are_matched_by_name(sets):
    generated = sets["generated"]
    order = np.random.default_rng(0).permutation(40)[:35]
    shuffled = generated.with_counts(generated.counts[:, order], tuple(GENES[k] for k in order), "generated")
    found = compare(**{**sets, "generated": shuffled}, config=CONFIG)
    assert found["genes"]["ids"] == [g for g in GENES if g in set(shuffled.genes)]
    assert found["pooled"]["mean_r"]["score"] > 0.9  # about 0 with the columns out of order
    assert found["protocol"]["n_genes"] == {"judged": 35, "common": 35, "real": 40, "generated": 35}


def without(cells: Cells, label: str) -> Cells:
    return cells.select(np.flatnonzero(cells.types != label))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: {"generated": without(s["generated"], "B")},
            "generated has no cells of 'B', which the test split holds",
        ),
        (
            lambda s: {"validation": s["validation"].select(np.arange(10))},
            "validation: 10 validation cells, and at least 11 are needed",
        ),
        (lambda s: {"test": s["test"].select(np.arange(19))}, "only 19 cells to compare .* evaluate.min_cells=20"),
        (lambda s: {"generated": s["generated"].select(np.arange(0))}, "generated holds no cells"),
        (lambda s: {"train": s["train"].select(np.arange(0))}, "train holds no cells"),
        (
            lambda s: {"generated": replace(s["generated"], genes=tuple("x" * k for k in range(40)))},
            "generated and train: 0 of [0-9]+ genes matched, less than evaluate.min_gene_share=0.1",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(sets, change, message):
    with pytest.raises(InputError, match=message):
        compare(**{**sets, **change(sets)}, config=CONFIG)


def test_combinations_are_told_apart_or_refused():
    of = {"a": np.array(["x", "x"]), "b": np.array(["1", "2"])}
    assert combination_names(of, 2).tolist() == ["x · 1", "x · 2"]
    assert combination_names({"a": of["a"]}, 2).tolist() == ["x", "x"]
    assert combination_names({}, 2).tolist() == [NO_TYPE, NO_TYPE]
    with pytest.raises(InputError, match="condition 'a': label 'x · y' holds ' · '. Rename it"):
        combination_names({"a": np.array(["x · y"]), "b": np.array(["z"])}, 1)


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
    one = {name: Cells.of_labels(c.counts, {}, c.genes, name) for name, c in sets.items()}
    return compare(**one, config=CONFIG)


def test_small_sets_get_the_pooled_scores(sets):
    found = few_a_type(sets)
    assert "No combination has 20 cells to compare (the most are 19 of 'A')" in found["pooled_only"]
    assert not {"per_combination", "by_combination"} & set(found)
    assert found["scored_combinations"] == []
    assert found["cells"]["by_combination"]["A"]["compared"] == 19  # (a) and (b) still are drawn one by one
    assert found["markers"]
    assert found["pooled"]["fd"]["beats"] == {"a": True, "b": True, "c": None}
    assert set(found["summary"]["baselines"]) == {"a", "b"}  # (c) is the floor


def test_cells_without_types_get_the_pooled_scores(sets):
    found = without_types(sets)
    assert found["pooled_only"].startswith("No condition was given")
    assert not {"per_combination", "by_combination", "markers", "expression"} & set(found)
    assert not {"by_combination", "generated_only"} & set(found["cells"])
    assert all("combination" not in source for source in found["map"])
    assert found["cells"]["compared"] == 86
    assert set(found["pooled"]["w2"]["baselines"]) == {"a", "b"}
    assert found["pooled"]["w2"]["normalised"]["a"] < 0.4
