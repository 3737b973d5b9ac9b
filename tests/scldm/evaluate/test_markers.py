"""Markers against scipy's Welch test; the fold change against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import ttest_ind

from scldm.evaluate import markers
from scldm.evaluate.space import log_normalise


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    types = np.repeat(["A", "B", "rare"], [40, 30, 2])
    rate = np.ones((3, 12))
    rate[0, [2, 5]], rate[1, [7]] = 6, 9
    counts = sp.csr_matrix(rng.poisson(rate[np.repeat([0, 1, 2], [40, 30, 2])]))
    return log_normalise(counts), types


def test_markers_are_the_highest_welch_t(cells):
    log, types = cells
    chosen = markers.choose(log, types)
    dense = log.toarray()
    t, _ = ttest_ind(dense[types == "A"], dense[types != "A"], equal_var=False)
    t = np.asarray(t)
    assert [g for g, _ in chosen["A"]] == [g for g in np.argsort(-t)[:5] if t[g] > 0]
    assert [v for _, v in chosen["A"]] == pytest.approx([t[g] for g, _ in chosen["A"]])
    assert {g for g, _ in chosen["A"][:2]} == {2, 5}
    few = markers.choose(log[:, 8:], types)
    t_few = np.asarray(ttest_ind(dense[types == "B", 8:], dense[types != "B", 8:], equal_var=False)[0])
    assert [g for g, _ in few["B"]] == [g for g in np.argsort(-t_few) if t_few[g] > 0]  # none that is down
    assert 0 < len(few["B"]) < 4
    assert "rare" not in chosen  # two cells have no variance worth the name


def test_fold_change_is_that_of_mean_counts_per_10k(cells):
    log, types = cells
    per_10k = np.expm1(log.toarray())
    expected = np.log2((per_10k[types == "B", 7].mean() + 1) / (per_10k[types != "B", 7].mean() + 1))
    assert markers.log2_fold_change(log, types, "B", [7]) == pytest.approx([expected])


def test_check_looks_at_each_source_and_leaves_out_types_it_lacks(cells):
    log, types = cells
    swapped = np.where(types == "A", "B", np.where(types == "B", "A", types))
    found = markers.check(cells, {"real": cells, "generated": (log, swapped)}, [f"g{k}" for k in range(12)])
    best = next(m for m in found if m.type == "B")
    assert best.gene == "g7"
    assert best.log2_fold_change["real"] > 1 > 0 > best.log2_fold_change["generated"]
    without_b = types != "B"
    found = markers.check(
        cells, {"real": cells, "generated": (log[without_b], types[without_b])}, [f"g{k}" for k in range(12)]
    )
    assert {m.type for m in found} == set()  # A has no 3 others left, B no cells
