"""Reconstruction scores against plain dense formulas, and mean profiles against scipy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import optimize, stats

from scldm.errors import InputError
from scldm.evaluate.named import PUBLISHED
from scldm.evaluate.reconstruction import (
    THETA_RANGE,
    OurScores,
    PublishedScores,
    Reconstruction,
    fit_mean_profile,
    fit_theta,
    log_profile,
    nb_nll,
    pearson_along,
)
from scldm.evaluate.space import log_normalise

G = 40


def cells(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts and what a model might expect of them; gene 0 is never counted, gene 1 in one cell alone."""
    rng = np.random.default_rng(seed)
    expected = rng.gamma(2, 1, (n, G)) * rng.gamma(3, 1, G)
    counts = rng.negative_binomial(2, 2 / (2 + expected))
    counts[:, :2] = 0
    counts[n // 2, 1] = 3
    return counts, expected


def plain_log(counts: np.ndarray) -> np.ndarray:
    return np.log1p(1e4 * counts / counts.sum(1, keepdims=True))


def plain_r(x: np.ndarray, y: np.ndarray) -> float:
    """NaN where one is constant, as numpy has it."""
    return float("nan") if np.ptp(x) == 0 or np.ptp(y) == 0 else stats.pearsonr(x, y).statistic


def plain_published(real: np.ndarray, drawn: np.ndarray, batch: int) -> float:
    of_batch = []
    for start in range(0, len(real), batch):
        x, y = plain_log(real[start : start + batch]), plain_log(drawn[start : start + batch])
        r_G = np.array([plain_r(x[:, g], y[:, g]) for g in range(G)])
        if not np.isnan(r_G).all():
            of_batch.append(np.nanmean(r_G))
    return float(np.mean(of_batch))


# --- log profiles --------------------------------------------------------------------------------------------------


def test_a_log_profile_is_of_the_cells_own_total() -> None:
    counts, _ = cells(30)
    counts[4] = 0
    found = log_profile(counts)
    np.testing.assert_allclose(found, log_normalise(sp.csr_matrix(counts)).toarray(), rtol=1e-12)
    assert not found[4].any()
    np.testing.assert_allclose(log_profile(7 * counts), found, rtol=1e-12)


def test_pearson_has_no_value_where_a_side_is_constant_or_constant_but_for_rounding() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((50, 3)), rng.random((50, 3))
    np.testing.assert_allclose(pearson_along(x, y, 0), [plain_r(x[:, k], y[:, k]) for k in range(3)], rtol=1e-10)
    np.testing.assert_allclose(pearson_along(x, y, 1), [plain_r(*pair) for pair in zip(x, y)], rtol=1e-8)
    y[:, 1] = 0.1 * 3  # whose mean is not exactly itself
    y[:, 2] = 5 * (1 + 1e-7 * rng.random(50))  # as float32 means would be
    assert np.isnan(pearson_along(x, y, 0)).tolist() == [False, True, True]


# --- the published reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 128, 300])
def test_the_published_reading_is_the_plain_one_however_the_cells_come(block: int) -> None:
    real, expected = cells(300)
    drawn = np.random.default_rng(1).poisson(expected)
    scores = PublishedScores()
    for start in range(0, 300, block):
        scores.add(log_profile(real[start : start + block]), log_profile(drawn[start : start + block]))
    found = scores.result()
    assert found["pcc"] == pytest.approx(plain_published(real, drawn, 128), rel=1e-9)
    assert found["mse"] == pytest.approx(np.square(plain_log(real) - plain_log(drawn)).mean(), rel=1e-12)
    assert (found["batches"], found["batches_without_pcc"]) == (3, 0)  # 128, 128, 44
    assert found["genes_with_pcc"] == pytest.approx((38 + 39 + 38) / 3)  # gene 1 has a count in the second batch alone


def test_the_published_pcc_depends_on_the_order_and_the_batch_and_mse_does_not() -> None:
    """Two kinds of cells: sorted, a batch holds one kind, and what tells the kinds apart is no correlation there."""
    real, expected = cells(256)
    real[:128, 5:15] *= 20
    expected[:128, 5:15] *= 20
    drawn = np.random.default_rng(1).poisson(expected)
    order = np.random.default_rng(2).permutation(256)

    def of(rows: np.ndarray, batch: int) -> dict:
        scores = PublishedScores(batch)
        scores.add(log_profile(real[rows]), log_profile(drawn[rows]))
        return scores.result()

    in_order, mixed = of(np.arange(256), 128), of(order, 128)
    assert mixed["pcc"] > in_order["pcc"] + 0.05
    assert mixed["mse"] == pytest.approx(in_order["mse"], rel=1e-12)
    assert of(np.arange(256), 256)["pcc"] > in_order["pcc"] + 0.05


def test_a_batch_without_any_correlation_is_left_out_and_counted() -> None:
    real, expected = cells(129)
    drawn = np.random.default_rng(1).poisson(expected)
    scores = PublishedScores()
    scores.add(log_profile(real), log_profile(drawn))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores.result()
    assert (found["batches"], found["batches_without_pcc"]) == (2, 1)  # the last has one cell
    assert found["pcc"] == pytest.approx(plain_published(real[:128], drawn[:128], 128), rel=1e-9)
    assert found["mse"] == pytest.approx(np.square(plain_log(real) - plain_log(drawn)).mean(), rel=1e-12)
    alone = PublishedScores()
    alone.add(log_profile(real[:1]), log_profile(drawn[:1]))
    assert alone.result()["pcc"] is None


# --- our reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 13, 300])
def test_our_reading_is_the_plain_one_whatever_the_blocks(block: int) -> None:
    real, expected = cells(300)
    expected[:, 7] = 0
    scores = OurScores()
    for start in range(0, 300, block):
        scores.add(log_profile(real[start : start + block]), log_profile(expected[start : start + block]))
    found = scores.result()
    x, y = plain_log(real), plain_log(expected)
    r_G = np.array([plain_r(x[:, g], y[:, g]) for g in range(G)])
    np.testing.assert_allclose(scores.r_G(), r_G, rtol=1e-9)
    assert found["pcc_gene"] == pytest.approx(np.nanmean(r_G), rel=1e-9)
    assert found["genes_with_pcc"] == 38  # gene 0 is never counted, 7 never expected
    assert found["pcc_cell"] == pytest.approx(np.mean([plain_r(a, b) for a, b in zip(x, y)]), rel=1e-9)
    assert found["cells_with_pcc"] == 300
    assert found["mse"] == pytest.approx(np.square(x - y).mean(), rel=1e-12)


def test_our_reading_keeps_the_digits_of_genes_that_hardly_vary() -> None:
    """Sums of squares would lose them: a mean of 9 with a deviation of 1e-4 has 11 digits less in its variance."""
    rng = np.random.default_rng(0)
    x = 9 + 1e-4 * rng.standard_normal((5_000, 2))
    y = 9 + 1e-4 * rng.standard_normal((5_000, 2)) + 0.5 * (x - 9)
    scores = OurScores()
    for start in range(0, 5_000, 100):
        scores.add(x[start : start + 100], y[start : start + 100])
    np.testing.assert_allclose(scores.r_G(), [plain_r(x[:, k], y[:, k]) for k in range(2)], rtol=1e-7)


def test_all_scores_of_a_model_at_once() -> None:
    real, expected = cells(200)
    drawn, nll = np.random.default_rng(1).poisson(expected), np.random.default_rng(2).random(200)
    every = Reconstruction()
    for rows in (slice(0, 90), slice(90, 200)):
        every.add(log_profile(real[rows]), expected[rows], drawn[rows], nll[rows])
    found = every.result()
    assert found["re"]["mean"] == pytest.approx(nll.mean())
    assert found["re"]["se"] == pytest.approx(nll.std(ddof=1) / 200**0.5)
    assert found["published"]["pcc"] == pytest.approx(plain_published(real, drawn, 128), rel=1e-9)
    assert found["ours"]["mse"] == pytest.approx(np.square(plain_log(real) - plain_log(expected)).mean(), rel=1e-12)
    assert found["published"]["mse"] > found["ours"]["mse"]


# --- mean profiles -------------------------------------------------------------------------------------------------


def scipy_nll(counts: np.ndarray, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return -stats.nbinom.logpmf(counts, theta, theta / (theta + mean)).sum(1)


def test_the_likelihood_of_a_negative_binomial_is_scipys() -> None:
    counts, mean = cells(50)
    theta = np.geomspace(0.05, 1e4, G)  # beyond, scipy itself has few digits
    stored_zero = sp.csr_matrix(counts)
    stored_zero.data[0] = 0
    np.testing.assert_allclose(
        nb_nll(stored_zero, mean, theta), scipy_nll(stored_zero.toarray(), mean, theta), rtol=1e-9
    )


def test_theta_has_the_largest_likelihood() -> None:
    """Against a search by scipy. A gene without overdispersion has the largest theta that there is."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(3, 1, (400, 1)) * np.array([0.1, 1.0, 5.0, 2.0])
    theta = np.array([0.3, 1.0, 8.0, np.inf])
    counts = np.stack(
        [rng.poisson(m) if np.isinf(t) else rng.negative_binomial(t, t / (t + m)) for m, t in zip(mean.T, theta)], 1
    )
    counts[:, 3] = np.rint(mean[:, 3])  # varies less than Poisson counts
    found = fit_theta(sp.csc_matrix(counts), mean)

    def best(g: int) -> float:
        def loss(log_theta: float) -> float:
            return scipy_nll(counts[:, [g]], mean[:, [g]], np.exp(np.array([log_theta]))).sum()

        return float(
            np.exp(optimize.minimize_scalar(loss, bounds=(-5, 8), method="bounded", options={"xatol": 1e-6}).x)
        )

    # the likelihood is flat at its top: a search by values finds the place to a thousandth
    np.testing.assert_allclose(found[:3], [best(g) for g in range(3)], rtol=1e-3)
    np.testing.assert_allclose(
        found[1:3], theta[1:3], rtol=0.35
    )  # four standard errors of 400 cells; gene 0 has few counts
    assert found[3] > 0.99 * THETA_RANGE[1]


def of_two_types(n: int, seed: int) -> tuple[sp.csr_matrix, np.ndarray]:
    rng = np.random.default_rng(seed)
    types = np.array(["a", "b"])[rng.integers(0, 2, n)]
    rate = np.ones((n, G))
    rate[types == "a", :10] *= 6
    rate *= rng.gamma(5, 0.2, (n, 1))
    counts = rng.negative_binomial(3, 3 / (3 + rate))
    counts[:, 0], counts[types == "b", 1] = 0, 0
    return sp.csr_matrix(counts), types


def test_mean_profiles_are_library_size_times_mean_share() -> None:
    counts, types = of_two_types(500, 0)
    dense, size = counts.toarray(), np.array([100.0, 2_000.0])
    pooled = fit_mean_profile(counts)
    np.testing.assert_allclose(pooled.share_G, dense.sum(0) / dense.sum(), rtol=0.02, atol=1e-4)
    assert pooled.share_G.sum() == pytest.approx(1)
    assert pooled.share_G[0] > 0  # never counted, and yet not impossible
    np.testing.assert_allclose(pooled.mean_BG(size, np.array(["a", "b"])), size[:, None] * pooled.share_G)

    each = fit_mean_profile(counts, types)
    found = each.mean_BG(size, np.array(["b", "a"]))
    for row, label in enumerate("ba"):
        of = dense[types == label].sum(0)
        np.testing.assert_allclose(found[row], size[row] * of / of.sum(), rtol=0.05, atol=size[row] * 1e-3)
    np.testing.assert_allclose(found.sum(1), size, rtol=1e-12)
    assert found[0, 1] > 0  # in no cell of b, but in those of a
    np.testing.assert_allclose(each.mean_BG(size[:1], np.array(["c"])), size[:1, None] * pooled.share_G)


def test_profiles_of_combinations_explain_held_out_cells_better_and_pooled_ones_are_scipys_formula() -> None:
    train, test = of_two_types(600, 0), of_two_types(300, 1)
    pooled, each = fit_mean_profile(train[0]), fit_mean_profile(*train)
    dense = test[0].toarray()
    profiles = {"pooled": pooled, "each": each}
    nll = {name: nb_nll(test[0], p.mean_BG(dense.sum(1), test[1]), p.theta_G) for name, p in profiles.items()}
    mean = dense.sum(1, keepdims=True) * pooled.share_G
    theta = np.minimum(pooled.theta_G, 1e4)  # beyond, the counts here are Poisson's, and scipy has few digits
    np.testing.assert_allclose(nll["pooled"], scipy_nll(dense, mean, theta), rtol=1e-4)
    assert nll["each"].mean() < nll["pooled"].mean() - 1
    # a theta per gene is worth something: Poisson counts of the same means are less likely
    assert nll["pooled"].mean() < nb_nll(test[0], mean, np.full(G, 1e6)).mean() - 1


def test_theta_is_fitted_on_a_draw_of_many_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """What 1,000 of 3,000 cells say is near what all say, and the seed decides which."""
    counts, types = of_two_types(3_000, 0)
    every = fit_mean_profile(counts, types)
    monkeypatch.setattr("scldm.evaluate.reconstruction.THETA_VALUES", 1_000 * G)
    few, again, other = (fit_mean_profile(counts, types, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(few.theta_G, again.theta_G)
    assert (few.theta_G != other.theta_G).any()
    np.testing.assert_allclose(few.theta_G[2:], every.theta_G[2:], rtol=0.5)
    np.testing.assert_array_equal(few.share_G, every.share_G)


def test_training_cells_without_counts_have_no_profile() -> None:
    with pytest.raises(InputError, match="no counts"):
        fit_mean_profile(sp.csr_matrix((5, G), dtype=np.int64))


def test_published_numbers_are_whole() -> None:
    assert all(len(row) == 3 and 0 < row[1] < 1 < row[0] for rows in PUBLISHED.values() for row in rows.values())
