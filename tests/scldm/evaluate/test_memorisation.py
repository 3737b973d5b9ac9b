"""Copies are found however they are stored; new cells are not called copies."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors

from scldm.errors import InputError
from scldm.evaluate import memorisation as m
from scldm.evaluate.space import Profile, Space, fit_pca, log_normalise

GENES = 40


def counts(rng: np.random.Generator, n: int) -> np.ndarray:
    factor = rng.normal(size=(n, 3)) @ np.random.default_rng(9).normal(0, 0.5, size=(3, GENES))
    return rng.poisson(3 * np.exp(factor))


@pytest.fixture(scope="module")
def cells():
    """train, held_out and fresh counts, and what makes a profile of counts."""
    rng = np.random.default_rng(0)
    train, held_out, fresh = (counts(rng, n) for n in (800, 500, 500))
    space = Space(fit_pca(log_normalise(sp.csr_matrix(counts(rng, 300))), seed=0))

    def profile(of: np.ndarray | sp.csr_matrix) -> Profile:
        return Profile.of(sp.csr_matrix(of), np.array(["a"] * sp.csr_matrix(of).get_shape()[0]), space)

    return profile(train), profile(held_out), profile(fresh), profile


def test_new_cells_look_like_held_out_ones(cells):
    train, held_out, fresh, _ = cells
    near = m.nearness(train, held_out, 500, 0), m.nearness(train, fresh, 500, 0, held_out)
    scores, errors = m.memorisation_scores(*near), m.memorisation_errors(*near, seed=0)
    assert abs(scores["memorisation_ratio"] - 1) < 4 * errors["memorisation_ratio"] < 0.4
    assert scores["near_copies"] <= 0.03  # 1 % is expected
    assert abs(scores["closer_to_training"] - 0.5) < 3 * errors["closer_to_training"] < 0.1
    assert scores["exact_copies"] == 0 == scores["exact_copies_real"]
    assert set(scores) == set(errors) == set(m.MEMORISATION)


def test_distances_are_those_of_an_exhaustive_search(cells):
    train, held_out, *_ = cells
    expected = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(train.components).kneighbors(held_out.components)
    np.testing.assert_allclose(m.nearness(train, held_out, 500, 0).distance, expected[0][:, 0], atol=1e-6)


def test_copies_are_found_however_they_are_stored(cells):
    train, held_out, _, profile = cells
    copies = train.counts[:200].tocsc().tocsr().astype(np.float32)
    copies.data[copies.indices == 0] = 0  # gene 0: stored zeros are not counts
    dense = train.counts[:200].toarray()
    dense[:, 0] = 0
    known = profile(np.concatenate([dense, train.counts[200:].toarray()]))
    reversed_rows = sp.csr_matrix((copies.data[::-1], copies.indices[::-1], copies.nnz - copies.indptr[::-1]))
    for stored in (copies, reversed_rows):
        scores = m.memorisation(known, held_out, profile(stored))
        assert scores["exact_copies"] == 1
        assert scores["near_copies"] == 1
        assert scores["memorisation_ratio"] == pytest.approx(0, abs=1e-9)


def test_copies_are_told_by_16_bytes_a_cell_without_a_copy_of_the_matrix():
    n = 12 * m.HASH_ROWS + 5
    rows = sp.random(n, 1_000, 0.1, "csr", np.float32, np.random.default_rng(0), data_rvs=lambda k: np.ones(k))
    tracemalloc.start()
    try:
        digests = set(m._digests(rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * rows.nnz  # one copy as int64 with its columns has 12 bytes a nonzero
    assert {len(digest) for digest in digests} == {16}
    assert len(digests) == n
    for k in (0, m.HASH_ROWS - 1, m.HASH_ROWS, n - 1):
        assert set(m._digests(rows[[k]])) < digests


def test_a_jittered_copy_is_near_and_not_exact(cells):
    train, held_out, _, profile = cells
    jittered = train.counts[:400].toarray()
    jittered[:, 5] += 1
    scores = m.memorisation(train, held_out, profile(jittered))
    assert scores["exact_copies"] < 0.01
    assert scores["near_copies"] > 0.8
    assert scores["memorisation_ratio"] < 0.5
    assert scores["closer_to_training"] > 0.75


def test_one_copied_cell_in_ten_shows_in_the_shares_and_not_in_the_median(cells):
    train, held_out, fresh, profile = cells
    mixed = sp.csr_matrix(sp.vstack([train.counts[:50], fresh.counts[:450]]))
    scores = m.memorisation(train, held_out, profile(mixed))
    assert scores["exact_copies"] == pytest.approx(0.1)
    assert 0.1 <= scores["near_copies"] < 0.13
    assert scores["memorisation_ratio"] > 0.8


def test_splits_that_share_cells_are_refused(cells):
    train, _, fresh, profile = cells
    with pytest.raises(InputError, match="The splits share cells"):
        m.memorisation(train, profile(train.counts[:100]), fresh)


def test_where_part_of_the_held_out_cells_are_copies_only_the_ratios_error_is_missing(cells):
    """Just under half of all coincide, so that half of some parts do."""
    train, held_out, fresh, profile = cells
    mixed = profile(sp.csr_matrix(sp.vstack([train.counts[:99], held_out.counts[:101]])))
    near = m.nearness(train, mixed, 200, 0), m.nearness(train, fresh, 200, 0, mixed)
    assert m.memorisation_scores(*near)["memorisation_ratio"] > 0
    errors = m.memorisation_errors(*near, seed=0)
    assert {name for name, error in errors.items() if np.isnan(error)} == {"memorisation_ratio"}


def test_cells_that_vary_too_little_lie_near_training_cells_and_no_nearer_to_them_than_to_others(cells):
    """What a median alone would call copies. Few real cells are the nearest of many, which the error knows."""
    train, held_out, _, profile = cells
    middle = np.round(train.counts.toarray().mean(0)) + np.random.default_rng(1).integers(0, 2, (500, GENES))
    near = m.nearness(train, held_out, 500, 0), m.nearness(train, profile(middle), 500, 0, held_out)
    scores, errors = m.memorisation_scores(*near), m.memorisation_errors(*near, seed=0)
    assert scores["memorisation_ratio"] < 0.8
    assert abs(scores["closer_to_training"] - 0.5) < 2 * errors["closer_to_training"]
    assert errors["closer_to_training"] > 1.5 * 0.5 / np.sqrt(500)  # as if cells were independent
