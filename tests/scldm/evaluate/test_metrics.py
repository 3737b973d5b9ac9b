"""Each metric against an independent formula or another library, and at its ideal value."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance as energy_of_scipy
from scipy.stats import pearsonr, wasserstein_distance
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from scldm.errors import InputError
from scldm.evaluate import distances, genes, metrics, neighbours, space
from scldm.evaluate.neighbours import precision_recall


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def two_sets(rng) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4)) + 0.7


def test_log_normalise_is_log1p_of_counts_per_10k_and_keeps_empty_cells(rng):
    counts = rng.poisson(0.8, size=(20, 30))
    counts[4] = 0
    before = sp.csr_matrix(counts)
    log = space.log_normalise(before)
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(log.toarray(), np.log1p(counts / total * 10_000), rtol=1e-12)
    assert (before.toarray() == counts).all()


def test_pca_is_that_of_the_dense_full_decomposition_with_one_sign(rng):
    log = space.log_normalise(sp.csr_matrix(rng.poisson(1.0, size=(50, 40))))
    ours, full = space.fit_pca(log, 5), PCA(5, svd_solver="full").fit(log.toarray())
    other_start = space.fit_pca(log, 5, seed=9)
    np.testing.assert_allclose(np.asarray(ours.components_), np.asarray(full.components_), atol=1e-8)
    np.testing.assert_allclose(np.asarray(ours.components_), np.asarray(other_start.components_), atol=1e-8)
    np.testing.assert_allclose(ours.transform(log[:7]), full.transform(log[:7].toarray()), atol=1e-8)


def test_pca_of_too_few_cells_is_refused():
    with pytest.raises(InputError, match="at least 11 validation cells and genes. There are 10 cells x 30 genes"):
        space.fit_pca(sp.csr_matrix(np.eye(10, 30)))


def test_mmd2_is_the_u_statistic_written_as_loops(two_sets):
    x, y = two_sets
    distance = cdist(x, x)
    s = np.median(distance[np.triu_indices(60, 1)])

    def k(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * s**2))

    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (60 * 59)
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (60 * 59)
    xy = sum(k(a, b) for a in x for b in y) / 3600
    # the median of an even number of squared distances is not the square of the median
    assert distances.mmd2(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-3)


def test_mmd2_of_one_distribution_is_zero_on_average(rng):
    values = [distances.mmd2(rng.normal(size=(30, 3)), rng.normal(size=(30, 3))) for _ in range(200)]
    error = np.std(values) / np.sqrt(200)
    assert abs(np.mean(values)) < 3 * error  # a biased estimate would be at 2/30 * (1 - mean kernel), 20 times as far


def test_mmd2_of_a_test_split_of_copies_is_refused():
    with pytest.raises(InputError, match="copies"):
        distances.mmd2(np.ones((5, 2)), np.zeros((5, 2)))


def test_w2_is_the_best_assignment(two_sets):
    cost = cdist(two_sets[0], two_sets[1], "sqeuclidean")
    best = np.sqrt(cost[linear_sum_assignment(cost)].mean())
    assert distances.w2(*two_sets) == pytest.approx(best, rel=1e-9)
    assert distances.w2(two_sets[0], two_sets[0] + [3, 0, 4, 0]) == pytest.approx(5, rel=1e-9)


def test_w1_is_that_of_scipy_on_a_line_and_the_best_assignment_elsewhere(two_sets):
    x, y = two_sets
    assert distances.w1(x[:, :1], y[:40, :1]) == pytest.approx(wasserstein_distance(x[:, 0], y[:40, 0]), rel=1e-9)
    cost = cdist(x, y)
    assert distances.w1(x, y) == pytest.approx(cost[linear_sum_assignment(cost)].mean(), rel=1e-9)


def test_energy_distance_is_that_of_scipy_without_pairs_of_a_cell_with_itself(two_sets):
    x, y = (s[:, :1] for s in two_sets)
    with_itself = energy_of_scipy(x[:, 0], y[:, 0]) ** 2  # scipy's is a V-statistic, and the root of ours
    within = cdist(x, x).mean() + cdist(y, y).mean()
    assert distances.energy_distance(x, y) == pytest.approx(with_itself - within / 59, rel=1e-9)  # 60 / 59 - 1


def test_energy_distance_of_one_distribution_is_zero_on_average(rng):
    values = [distances.energy_distance(rng.normal(size=(30, 3)), rng.normal(size=(30, 3))) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)  # with self-pairs it would be at 2 * 2.2 / 30


def test_mmd2_multiscale_is_the_biased_sum_over_widths_written_as_loops(two_sets):
    x, y = two_sets

    def k(a, b):
        return sum(np.exp(-((a - b) ** 2).sum() / (2 * s**2)) for s in (0.01, 0.1, 1, 10, 100))

    def mean(a, b):
        return np.mean([[k(p, q) for q in b] for p in a])

    by_loops = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert distances.mmd2_multiscale(x, y) == pytest.approx(by_loops, rel=1e-9)
    assert distances.mmd2_multiscale(x, x) == pytest.approx(0, abs=1e-12)


def test_precision_and_recall_are_shares_inside_the_balls_of_the_other_set(two_sets):
    x, y = two_sets

    def share(points, cells, k):  # scikit-learn counts a cell as its own first neighbour
        radius = NearestNeighbors(n_neighbors=k + 1).fit(cells).kneighbors(cells)[0][:, -1]
        return np.mean([(np.linalg.norm(cells - p, axis=1) <= radius).any() for p in points])

    for k in (1, 5):
        assert precision_recall(x, y, k) == (pytest.approx(share(y, x, k)), pytest.approx(share(x, y, k)))
    far = x + 1_000
    assert precision_recall(x, far) == (0, 0)
    again = np.random.default_rng(4).normal(size=x.shape)  # as x is drawn
    precision, recall = precision_recall(np.concatenate([x, far]), again)
    assert precision > 0.6 > 0.5 >= recall  # a state that is not generated lowers recall alone


def test_frechet_is_the_formula_with_a_matrix_square_root(two_sets):
    x, y = two_sets
    c1, c2 = np.cov(x.T), np.cov(y.T)
    formula = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(np.asarray(sqrtm(c1 @ c2))))
    assert distances.frechet(x, y) == pytest.approx(formula, rel=1e-8)


def test_nn_accuracy_is_that_of_a_leave_one_out_classifier(two_sets):
    both, label = np.concatenate(two_sets), np.repeat([0, 1], 60)
    hits = []
    for k in range(120):
        rest = np.arange(120) != k
        hits.append(KNeighborsClassifier(1).fit(both[rest], label[rest]).predict(both[[k]])[0] == label[k])
    assert neighbours.nn_accuracy(*two_sets) == (pytest.approx(np.mean(hits[:60])), pytest.approx(np.mean(hits[60:])))


def test_nn_accuracy_of_copies_is_zero_and_ties_are_shared(rng):
    x = rng.normal(size=(20, 2))
    assert neighbours.nn_accuracy(x, x) == (0, 0)  # each cell's nearest is its copy: what a model that memorises gets
    assert neighbours.nn_accuracy(np.zeros((3, 2)), np.zeros((3, 2))) == (pytest.approx(2 / 5), pytest.approx(2 / 5))


def test_gene_level_metrics(rng):
    x, y = (space.log_normalise(sp.csr_matrix(rng.poisson(rng.gamma(1, 1, 30), size=(40, 30)))) for _ in range(2))
    for ours, numpy in zip(genes.gene_moments(x), (np.mean, np.var, lambda a, axis: (a > 0).mean(axis)), strict=True):
        np.testing.assert_allclose(ours, numpy(x.toarray(), axis=0), atol=1e-12)
    a, b = x.toarray().mean(0), y.toarray().mean(0)
    assert genes.pearson(a, b) == pytest.approx(pearsonr(a, b)[0])
    assert genes.pearson(a, np.ones(30)) == 0
    assert genes.library_w1(np.array([99, 999]), np.array([199, 1999])) == pytest.approx(np.log(2))


def test_score_has_every_metric_and_knows_the_sides(rng):
    few_types, counts = np.array(["a"] * 30), rng.poisson(1.0, size=(60, 25))
    pca = space.fit_pca(space.log_normalise(sp.csr_matrix(counts)))
    real = space.Profile.of(sp.csr_matrix(counts[:30]), few_types, pca)
    collapsed = space.Profile.of(sp.csr_matrix(np.ones((30, 25), dtype=int)), few_types, pca)
    scores = metrics.score(real, collapsed, max_cells=2_000, seed=0)
    assert set(scores) == set(metrics.METRICS)
    assert scores["nn_accuracy_other"] == 1 > 0.8 > scores["nn_accuracy_real"]
    assert scores["nn_accuracy"] == pytest.approx((scores["nn_accuracy_other"] + scores["nn_accuracy_real"]) / 2)


def test_the_measures_give_every_metric_once_and_some_on_demand(rng):
    names = [name for measure in metrics.MEASURES for name in measure.names]
    assert sorted(names) == sorted(metrics.METRICS)
    counts = rng.poisson(1.0, size=(50, 25))
    pca = space.fit_pca(space.log_normalise(sp.csr_matrix(counts)))
    real, other = (space.Profile.of(sp.csr_matrix(c), np.array(["a"] * len(c)), pca) for c in (counts, counts[:30]))
    assert list(metrics.score(real, other, 2_000, 0, only=("recall", "fd"))) == ["fd", "recall"]
    assert [len(p) for p in metrics.compared_cells(real, other, 2_000, 0)] == [30, 30]
    assert [len(p) for p in metrics.compared_cells(real, other, 20, 0)] == [20, 20]


@pytest.mark.parametrize("best, poor, good", [("lowest", 2, 1), ("highest", 1, 2), ("half", 0.2, 0.6), ("one", 2, 0.9)])
def test_less_loss_is_better_for_every_kind_of_metric(best, poor, good):
    metric = metrics.Metric("", "", best)
    assert metric.loss(poor) > metric.loss(good)
