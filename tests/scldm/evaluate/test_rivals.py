"""The floor and the rivals know what they should and no more; the table says who is closer."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.evaluate import rivals
from scldm.evaluate.metrics import METRICS


@pytest.fixture
def training() -> tuple[sp.csr_matrix, np.ndarray]:
    """Type A: genes 0 and 1 are equal, gene 2 is never on, gene 3 is 7 in every cell; type B has only gene 2."""
    rng = np.random.default_rng(0)
    a = rng.negative_binomial(1, 0.2, size=400)
    counts_a = np.stack([a, a, 0 * a, 0 * a + 7], 1)
    counts_b = np.stack([0 * a, 0 * a, a + 1, 0 * a], 1)[:100]
    return sp.csr_matrix(np.concatenate([counts_a, counts_b])), np.array(["A"] * 400 + ["B"] * 100)


NUMBERS = {"B": 60, "A": 300}


@pytest.mark.parametrize("draw", [rivals.floor_cells, *(draw for *_, draw in rivals.RIVALS.values())])
def test_every_draw_gives_the_numbers_asked_as_counts_and_repeats_under_a_seed(training, draw):
    counts, types = draw(training[0], training[1], NUMBERS, np.random.default_rng(1))
    again, _ = draw(training[0], training[1], NUMBERS, np.random.default_rng(1))
    assert {t: int((types == t).sum()) for t in NUMBERS} == NUMBERS
    assert np.issubdtype(counts.dtype, np.integer)
    assert (counts != again).nnz == 0


def test_independent_genes_keeps_each_gene_and_loses_the_rest(training):
    counts, types = rivals.independent_genes(training[0], training[1], NUMBERS, np.random.default_rng(1))
    of_a, real = counts[types == "A"].toarray(), training[0][:400].toarray()
    assert abs(np.corrcoef(of_a[:, 0], of_a[:, 1])[0, 1]) < 0.15  # 1 in the training cells
    assert set(of_a[:, 0]) <= set(real[:, 0])
    assert (of_a[:, 0] == 0).mean() == pytest.approx((real[:, 0] == 0).mean(), abs=0.08)
    assert of_a[:, 0].var() == pytest.approx(real[:, 0].var(), rel=0.35)
    assert (of_a[:, 2] == 0).all()
    assert (of_a[:, 3] == 7).all()


def test_poisson_keeps_the_mean_of_each_type_alone(training):
    counts, types = rivals.poisson_mean(training[0], training[1], NUMBERS, np.random.default_rng(1))
    of_a, real = counts[types == "A"].toarray(), training[0][:400].toarray()
    np.testing.assert_allclose(of_a.mean(0), real.mean(0), atol=0.5)
    assert of_a[:, 0].var() == pytest.approx(real[:, 0].mean(), rel=0.3)  # its own is 5 times as large
    assert (counts[types == "B"].toarray()[:, 3] == 0).all()


def test_shuffled_types_are_real_cells_under_other_labels(training):
    counts, types = rivals.shuffled_types(training[0], training[1], NUMBERS, np.random.default_rng(1))
    is_b = counts.toarray()[:, 3] == 0
    assert is_b.sum() == 60  # the cells are as many of each kind
    assert (types[is_b] == "A").mean() == pytest.approx(300 / 360, abs=0.15)  # and their labels say nothing


def scores(**changed: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, 0.6) | changed


def test_table_normalises_between_floor_and_rival():
    floor = [scores(w2=1.0, nn_accuracy=0.5, mean_r=0.99), scores(w2=1.2, nn_accuracy=0.5, mean_r=0.99)]
    rival = [scores(w2=3.1, nn_accuracy=0.9, mean_r=0.79), scores(w2=3.1, nn_accuracy=0.9, mean_r=0.79)]
    good = [scores(w2=0.1), scores(w2=0.1)]
    draws = {"a": rival, "b": good, "c": floor, "d": rival}
    rows = rivals.table(scores(w2=2.1, nn_accuracy=0.05, mean_r=0.69), floor, draws, as_floor=("d",))
    assert rows["w2"]["floor"]["mean"] == pytest.approx(1.1)
    assert rows["w2"]["normalised"]["a"] == pytest.approx(0.5)
    assert rows["w2"]["beats"]["a"] is True
    assert rows["nn_accuracy"]["beats"]["a"] is False  # 0.05 is further from 0.5 than 0.9: cells copied, not drawn
    assert rows["mean_r"]["normalised"]["a"] == pytest.approx(1.5)  # more is better: beyond the rival
    assert rows["mean_r"]["beats"]["a"] is False
    for rival_no_worse_than_the_floor in "bcd":  # gives no scale
        assert rows["w2"]["normalised"][rival_no_worse_than_the_floor] is None
        assert rows["w2"]["beats"][rival_no_worse_than_the_floor] is None
