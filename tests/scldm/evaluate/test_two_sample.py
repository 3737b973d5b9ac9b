"""The forest's AUC: unbiased for equal sets, the known value for known ones."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import poisson

from scldm.evaluate.two_sample import classifier_auc


@pytest.mark.heavy
def test_equal_distributions_are_at_one_half_even_with_few_cells():
    rng = np.random.default_rng(0)
    sets = [[sp.csr_matrix(rng.poisson(1.0, size=(20, 15))) for _ in range(2)] for _ in range(50)]
    aucs = [classifier_auc(*pair, seed=k, n_trees=15) for k, pair in enumerate(sets)]
    error = np.std(aucs) / np.sqrt(50)
    assert error < 0.02  # out-of-bag votes would be .08 below one half
    assert abs(np.mean(aucs) - 0.5) < 3 * error


def test_auc_of_one_informative_gene_is_the_chance_that_a_pair_is_in_order():
    rng = np.random.default_rng(1)
    low, high = rng.poisson(2, size=(1_500, 1)), rng.poisson(4, size=(1_500, 1))
    k = np.arange(50)
    exact = (poisson.pmf(k, 4) * (poisson.cdf(k, 2) - 0.5 * poisson.pmf(k, 2))).sum()
    # an AUC over 750 + 750 cells twice has a standard error of about .01
    assert classifier_auc(sp.csr_matrix(low), sp.csr_matrix(high)) == pytest.approx(exact, abs=0.03)


def test_sets_that_differ_are_told_apart_and_a_seed_repeats():
    rng = np.random.default_rng(2)
    x, y = rng.poisson(1.0, size=(60, 20)), rng.poisson(1.0, size=(60, 20))
    y[:, 7] += 9
    x, y = sp.csr_matrix(x), sp.csr_matrix(y)
    assert classifier_auc(x, y, seed=3) > 0.97
    assert classifier_auc(x, x[:30], seed=3, n_trees=5) == classifier_auc(x, x[:30], seed=3, n_trees=5)
