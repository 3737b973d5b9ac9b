"""Scores of genes against numpy on dense matrices, and at their ideal values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.evaluate import genes
from scldm.evaluate.space import Profile


def profile(log: np.ndarray, types: np.ndarray) -> Profile:
    """Cells with this log expression; the other fields are not looked at."""
    return Profile(sp.csr_matrix(log), sp.csr_matrix(log), log[:, :2], log.sum(1), types)


def correlated(rng: np.random.Generator, n: int, loading: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Log expression of genes that share one factor, around 5 + shift."""
    return 5 + shift + rng.normal(size=(n, 1)) * loading + rng.normal(size=(n, len(loading)))


def test_levels_are_groups_of_genes_by_the_reference_mean():
    rng = np.random.default_rng(0)
    x, y = (np.log1p(rng.poisson(np.linspace(0, 3, 21), size=(80, 21))) for _ in range(2))
    zeros, variance = genes.by_expression_level(*(genes.gene_moments(sp.csr_matrix(v)) for v in (x, y)), n_levels=4)
    expressed = np.flatnonzero(x.mean(0) > 0)  # gene 0 never is
    groups = np.array_split(expressed[np.argsort(x.mean(0)[expressed])], 4)
    assert zeros == pytest.approx(np.mean([abs((y[:, g] == 0).mean() - (x[:, g] == 0).mean()) for g in groups]))
    ratios = [y[:, g].var(0).mean() / x[:, g].var(0).mean() for g in groups]
    assert variance == pytest.approx(np.abs(np.log2(ratios)).mean())


def test_levels_see_dropout_and_doubled_variance():
    rng = np.random.default_rng(1)
    x = rng.normal(10, 1, size=(4_000, 12))
    moments = genes.gene_moments(sp.csr_matrix(x))
    doubled = genes.gene_moments(sp.csr_matrix(10 + (x - 10) * np.sqrt(2)))
    assert genes.by_expression_level(moments, doubled)[1] == pytest.approx(1, abs=0.02)
    dropped = genes.gene_moments(sp.csr_matrix(np.where(rng.random(x.shape) < 0.2, 0, x)))
    assert genes.by_expression_level(moments, dropped)[0] == pytest.approx(0.2, abs=0.01)
    assert genes.by_expression_level(moments, moments) == (0, 0)


def test_gene_correlation_is_that_of_numpy_over_the_genes_the_reference_expresses_most():
    rng = np.random.default_rng(2)
    loading = rng.normal(size=30)
    x, y = correlated(rng, 90, loading), correlated(rng, 70, loading)
    x[:, 20:] -= 3  # the last ten are not among the 20 most expressed, though they are in the other set
    r, slope = genes.gene_correlation(sp.csr_matrix(x), sp.csr_matrix(y), n_genes=20)
    pairs = np.triu_indices(20, 1)
    a, b = np.corrcoef(x[:, :20].T)[pairs], np.corrcoef(y[:, :20].T)[pairs]
    assert r == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-9)
    assert slope == pytest.approx(np.polyfit(a, b, 1)[0], rel=1e-9)


def test_halved_correlations_have_slope_one_half_and_independent_genes_none():
    rng = np.random.default_rng(3)
    loading = rng.choice([-1.0, 1.0], size=40)  # correlations of +- 1/2
    x, y = (correlated(rng, 5_000, loading * scale) for scale in (1, 1 / np.sqrt(3)))  # and of +- 1/4
    r, slope = genes.gene_correlation(sp.csr_matrix(x), sp.csr_matrix(y))
    assert r > 0.98
    assert slope == pytest.approx(0.5, abs=0.03)  # one set's error: 1 / sqrt(5,000) a pair, correlated over pairs
    r, slope = genes.gene_correlation(sp.csr_matrix(x), sp.csr_matrix(rng.permuted(y, axis=0)))
    assert abs(r) < 0.15
    assert abs(slope) < 0.02


def test_correlations_stay_within_combinations_and_weigh_by_cells():
    rng = np.random.default_rng(4)
    loading = rng.choice([-1.0, 1.0], size=40)
    n = {"a": 3_000, "b": 1_000, "c": 2}
    types = np.repeat(list(n), list(n.values()))
    shift = np.select([types == "a", types == "b"], [0.0, 9.0], 20.0)[:, None]
    x = correlated(rng, len(types), loading) + shift
    other = correlated(rng, len(types), loading) + shift
    in_a = types == "a"
    other[in_a] = rng.permuted(other[in_a], axis=0)  # right in b alone, which has a quarter of the cells
    r, slope = genes.correlation_within(profile(x, types), profile(other, types))
    assert r == pytest.approx(0.25, abs=0.1)  # pooled over types, the shifts would make it 1
    assert slope == pytest.approx(0.25, abs=0.05)


def test_a_constant_gene_correlates_with_nothing_and_too_few_cells_give_no_score():
    rng = np.random.default_rng(5)
    x = correlated(rng, 50, np.ones(10))
    y = x.copy()
    y[:, 3] = 0.1 + 0.2  # sums of such numbers are not exactly constant
    r, slope = genes.gene_correlation(sp.csr_matrix(x), sp.csr_matrix(y))
    assert 0 < r < 1
    assert np.isfinite(slope)
    few = np.array(["a"] * 48 + ["b"] * 2), np.array(["b"] * 48 + ["a"] * 2)
    assert np.isnan(genes.correlation_within(profile(x, few[0]), profile(x, few[1]))).all()
