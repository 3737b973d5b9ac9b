"""The floor and the baselines know what they should and no more."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.evaluate import baselines
from scldm.evaluate.cells import Cells


@pytest.fixture
def training() -> tuple[sp.csr_matrix, np.ndarray]:
    """Type A: genes 0 and 1 are equal, gene 2 is never on, gene 3 is 7 in every cell; type B has only gene 2."""
    rng = np.random.default_rng(0)
    a = rng.negative_binomial(1, 0.2, size=400)
    counts_a = np.stack([a, a, 0 * a, 0 * a + 7], 1)
    counts_b = np.stack([0 * a, 0 * a, a + 1, 0 * a], 1)[:100]
    return sp.csr_matrix(np.concatenate([counts_a, counts_b])), np.array(["A"] * 400 + ["B"] * 100)


NUMBERS = {"B": 60, "A": 300}


@pytest.mark.parametrize("draw", [baselines.floor_cells, *(draw for *_, draw in baselines.BASELINES.values())])
def test_every_draw_gives_the_numbers_asked_as_counts_and_repeats_under_a_seed(training, draw):
    counts, types = draw(training[0], training[1], NUMBERS, np.random.default_rng(1))
    again, _ = draw(training[0], training[1], NUMBERS, np.random.default_rng(1))
    assert {t: int((types == t).sum()) for t in NUMBERS} == NUMBERS
    assert np.issubdtype(counts.dtype, np.integer)
    assert (counts != again).nnz == 0


def test_independent_genes_keeps_each_gene_and_loses_the_rest(training):
    counts, types = baselines.independent_genes(training[0], training[1], NUMBERS, np.random.default_rng(1))
    of_a, real = counts[types == "A"].toarray(), training[0][:400].toarray()
    assert abs(np.corrcoef(of_a[:, 0], of_a[:, 1])[0, 1]) < 0.15  # 1 in the training cells
    assert set(of_a[:, 0]) <= set(real[:, 0])
    assert (of_a[:, 0] == 0).mean() == pytest.approx((real[:, 0] == 0).mean(), abs=0.08)
    assert of_a[:, 0].var() == pytest.approx(real[:, 0].var(), rel=0.35)
    assert (of_a[:, 2] == 0).all()
    assert (of_a[:, 3] == 7).all()


def test_poisson_keeps_the_mean_of_each_type_alone(training):
    counts, types = baselines.poisson_mean(training[0], training[1], NUMBERS, np.random.default_rng(1))
    of_a, real = counts[types == "A"].toarray(), training[0][:400].toarray()
    np.testing.assert_allclose(of_a.mean(0), real.mean(0), atol=0.5)
    assert of_a[:, 0].var() == pytest.approx(real[:, 0].mean(), rel=0.3)  # its own is 5 times as large
    assert (counts[types == "B"].toarray()[:, 3] == 0).all()


def test_shuffled_types_are_real_cells_under_other_labels(training):
    counts, types = baselines.shuffled_types(training[0], training[1], NUMBERS, np.random.default_rng(1))
    is_b = counts.toarray()[:, 3] == 0
    assert is_b.sum() == 60  # the cells are as many of each kind
    assert (types[is_b] == "A").mean() == pytest.approx(300 / 360, abs=0.15)  # and their labels say nothing


# --- combinations without training cells ---------------------------------------------------------------------------


@pytest.fixture
def treated() -> Cells:
    """Types A, B, C and D under control and treatment, but for treated B. Gene 0 sets the types apart, gene 1 rises
    fourfold under treatment, genes 3 to 22 carry the rest of a cell's total."""
    rng = np.random.default_rng(0)
    kinds = [(t, u) for t in "ABCD" for u in ("ctrl", "stim") if (t, u) != ("B", "stim")]
    labels = np.repeat(np.array(kinds), 60, axis=0)
    rate = np.full((len(labels), 23), 10.0)
    rate[:, 0] = 5 * (1 + np.array(["ABCD".index(t) for t in labels[:, 0]]))
    rate[:, 1] = np.where(labels[:, 1] == "stim", 40, 10)
    genes = tuple(f"g{k}" for k in range(23))
    of = {"type": labels[:, 0], "treatment": labels[:, 1]}
    return Cells.of_labels(sp.csr_matrix(rng.poisson(rate)), of, genes, "train")


def test_an_unseen_combination_is_drawn_from_those_that_share_most_labels(treated: Cells) -> None:
    wanted = dict.fromkeys([*treated.numbers(), "B · stim"], 20)
    pool, of = baselines.with_relatives(treated, {"B · stim": ("B", "stim")}, wanted)
    assert set(of["B · stim"]) == {"A · stim", "B · ctrl", "C · stim", "D · stim"}
    # 80 of the 4 x 20, half of what the seen ones do not need; each cell stands once, under one name
    assert pool.numbers()["B · stim"] == 4 * 20
    assert pool.numbers()["A · stim"] == 40  # twice what is drawn: draws of its floor still differ
    assert (pool.counts != treated.counts).nnz == 0
    moved = pool.types != treated.types
    assert set(pool.types[moved]) == {"B · stim"}
    assert set(treated.types[moved]) <= set(of["B · stim"])
    _, of = baselines.with_relatives(treated, {"E · stim": ("E", "stim")}, wanted)
    assert set(of["E · stim"]) == {"A · stim", "C · stim", "D · stim"}


def test_where_all_cells_are_needed_relatives_stand_twice(treated: Cells) -> None:
    wanted = {**treated.numbers(), "B · stim": 70}
    pool, of = baselines.with_relatives(treated, {"B · stim": ("B", "stim")}, wanted)
    assert pool.numbers() == {**treated.numbers(), "B · stim": 4 * 60}
    own = pool.counts[np.flatnonzero(pool.types == "B · stim")].toarray()
    expected = treated.counts[np.flatnonzero(np.isin(treated.types, of["B · stim"]))].toarray()
    np.testing.assert_array_equal(np.sort(own, axis=0), np.sort(expected, axis=0))


def test_control_cells_are_moved_by_the_change_of_the_other_types(treated: Cells) -> None:
    rng = np.random.default_rng(0)
    moved = baselines.shifted_controls(treated, ("B", "stim"), {"treatment": "ctrl"}, 200, rng)
    assert moved is not None
    found, control = moved.toarray(), treated.counts[np.flatnonzero(treated.types == "B · ctrl")].toarray()
    assert np.issubdtype(moved.dtype, np.integer)
    assert found.shape == (200, 23)
    per_cell = found[:, 1].mean() / found.sum(1).mean() / (control[:, 1].mean() / control.sum(1).mean())
    # 40 of 240 + type's own, after 10 of 210: the share rises by 3.4 to 3.6
    assert per_cell == pytest.approx(3.5, rel=0.1)
    assert found[:, 0].mean() == pytest.approx(control[:, 0].mean() * 0.88, rel=0.15)  # B's own level, smaller share
    assert found.sum(1).mean() == pytest.approx(control.sum(1).mean(), rel=0.03)


@pytest.mark.parametrize(
    "labels, control",
    [(("B", "stim"), {}), (("E", "stim"), {"treatment": "ctrl"}), (("B", "ctrl"), {"treatment": "ctrl"})],
)
def test_without_control_cells_there_is_nothing_to_move(treated: Cells, labels, control) -> None:
    assert baselines.shifted_controls(treated, labels, control, 10, np.random.default_rng(0)) is None
