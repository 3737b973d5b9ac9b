"""The probe against scikit-learn put together by hand; an embedding of noise, and one of donors, are seen."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from scldm.errors import InputError
from scldm.evaluate.representation import Components, classification, folds_of, judged, probe
from scldm.evaluate.space import log_normalise


def by_hand(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    confusion = np.array([[np.sum((true == a) & (predicted == b)) for b in np.unique(true)] for a in np.unique(true)])
    right, said, there = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    precision, recall = np.where(said > 0, right / np.maximum(said, 1), 0), right / there
    f1 = np.where(right > 0, 2 * right / (said + there), 0)
    names = ("accuracy", "macro_f1", "macro_precision", "macro_recall")
    return dict(zip(names, (right.sum() / len(true), f1.mean(), precision.mean(), recall.mean()), strict=True))


@pytest.fixture(scope="module")
def cells() -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
    """250 cells of three overlapping types: an embedding of unequal scales, labels, counts of 60 genes."""
    rng = np.random.default_rng(0)
    labels = rng.choice(["B", "NK", "T"], 250, p=[0.5, 0.15, 0.35])
    number = np.unique(labels, return_inverse=True)[1]
    embedding = rng.normal(size=(250, 6)) + 1.2 * np.eye(3, 6)[number]
    embedding *= [1, 1, 100, 1, 0.01, 1]
    rate = np.ones((3, 60))
    rate[np.repeat(range(3), 5), np.arange(15)] = 4
    return embedding, labels, sp.csr_matrix(rng.poisson(rate[number]))


def test_scores_are_those_put_together_by_hand(cells) -> None:
    embedding, labels, counts = cells
    found = probe(embedding, labels, seed=3, counts=counts)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=3).split(embedding, labels))
    assert found.n_folds == 5
    log = log_normalise(counts).toarray()
    for features in ("embedding", "pca"):
        linear, nearest = np.empty_like(labels), np.empty_like(labels)
        parts = []
        for train, test in folds:
            if features == "pca":
                pca = PCA(50, svd_solver="full").fit(log[train])
                of_train, of_test = pca.transform(log[train]), pca.transform(log[test])
            else:
                of_train, of_test = embedding[train], embedding[test]
            mean, sd = of_train.mean(0), of_train.std(0)
            model = LogisticRegression(max_iter=1_000, tol=1e-6).fit((of_train - mean) / sd, labels[train])
            linear[test] = model.predict((of_test - mean) / sd)
            parts.append(by_hand(labels[test], linear[test]))
            distance = ((of_test[:, None] - of_train[None]) ** 2).sum(-1)
            votes = labels[train][np.argsort(distance, 1)[:, :15]]
            counted = np.stack([(votes == x).sum(1) for x in ("B", "NK", "T")], 1)
            nearest[test] = np.array(["B", "NK", "T"])[counted.argmax(1)]
        for classifier, predicted in (("linear", linear), ("knn", nearest)):
            for name, expected in by_hand(labels, predicted).items():
                # another solver's tolerance may move one cell on the border
                assert found.scores[features][classifier][name]["value"] == pytest.approx(expected, abs=0.012)
        spread = np.std([part["macro_f1"] for part in parts], ddof=1)
        assert found.scores[features]["linear"]["macro_f1"]["sd"] == pytest.approx(spread, abs=0.012)
    assert found.scores["embedding"]["linear"]["accuracy"]["value"] > found.most_frequent + 0.1
    assert found.labels == dict(sorted(found.labels.items(), key=lambda x: -x[1]))
    assert sum(found.labels.values()) == 250
    assert (found.left_out, found.groups, found.drawn_of, found.not_converged) == ([], None, 0, [])


def test_classification_is_macro() -> None:
    true = np.array(["a"] * 6 + ["b"] * 3 + ["c"])
    predicted = np.array(["a"] * 5 + ["b"] + ["b"] * 2 + ["a"] + ["a"])
    assert classification(true, predicted) == pytest.approx(by_hand(true, predicted))
    assert classification(true, predicted)["macro_recall"] == pytest.approx((5 / 6 + 2 / 3 + 0) / 3)
    # of a fold that lacks c, c is no label to miss
    assert classification(true[:9], predicted[:9])["macro_recall"] == pytest.approx((5 / 6 + 2 / 3) / 2)


def test_the_scale_of_a_column_is_nothing_to_the_linear_probe_and_all_to_neighbours(cells) -> None:
    embedding, labels, _ = cells
    whole = probe(embedding, labels).scores["embedding"]
    scaled = probe(embedding * np.array([1, 1, 1e-2, 1, 1, 1e3]), labels).scores["embedding"]
    assert scaled["linear"]["accuracy"]["value"] == pytest.approx(whole["linear"]["accuracy"]["value"], abs=0.01)
    assert scaled["knn"]["accuracy"]["value"] < whole["knn"]["accuracy"]["value"] - 0.05


def test_components_see_no_test_cell(cells) -> None:
    _, _, counts = cells
    log = log_normalise(counts)
    train, test = np.arange(200), np.arange(200, 250)
    of_train, _ = Components(log, 0)(train, test)
    changed = log.copy()
    changed.data[changed.indptr[200] :] *= 50
    again, _ = Components(changed, 0)(train, test)
    np.testing.assert_array_equal(of_train, again)
    assert of_train.shape == (200, 50)
    assert Components(log[:, :20], 0)(train, test)[1].shape == (50, 19)


def test_noise_knows_nothing(cells) -> None:
    _, labels, counts = cells
    noise = np.random.default_rng(5).normal(size=(250, 8))
    found = probe(noise, labels, counts=counts)
    for classifier in ("linear", "knn"):
        values = {name: found.scores[name][classifier]["macro_recall"]["value"] for name in ("embedding", "pca")}
        assert values["embedding"] == pytest.approx(1 / 3, abs=0.08)
        assert values["pca"] > 0.6


def of_donors(n_donors: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An embedding that places each type of each donor somewhere else, and nothing else."""
    rng = np.random.default_rng(0)
    donors = np.repeat([f"d{k}" for k in range(n_donors)], 40)
    labels = np.tile(np.repeat(["B", "T"], 20), n_donors)
    centre = rng.normal(size=(n_donors * 2, 12)) * 4
    return np.repeat(centre, 20, axis=0) + rng.normal(size=(n_donors * 40, 12)), labels, donors


@pytest.mark.parametrize("n_donors, n_folds", [(4, 4), (8, 5)])
def test_labels_known_by_donor_alone_are_worth_nothing_in_held_out_donors(n_donors: int, n_folds: int) -> None:
    embedding, labels, donors = of_donors(n_donors)
    leaky = probe(embedding, labels).scores["embedding"]["knn"]["accuracy"]["value"]
    found = probe(embedding, labels, donors)
    assert leaky > 0.97
    assert found.scores["embedding"]["knn"]["accuracy"]["value"] < 0.8
    assert found.n_folds == n_folds
    assert found.groups is not None
    assert sorted(d for held_out in found.groups for d in held_out) == sorted(
        set(donors)
    )  # each held out once, and whole
    for train, test in folds_of(labels, donors, 0):
        assert not set(donors[train]) & set(donors[test])


def test_labels_that_can_not_be_judged_are_named() -> None:
    rng = np.random.default_rng(0)
    labels = np.array(["B"] * 40 + ["T"] * 40 + ["rare"] * 4 + ["own"] * 20)
    donors = np.concatenate([np.tile(["d0", "d1", "d2", "d3"], 21), ["d1"] * 20])
    embedding = rng.normal(size=(104, 3))
    rows, folds, left_out = judged(labels, donors, 0)
    assert {(x["label"], x["cells"]) for x in left_out} == {("rare", 4), ("own", 20)}
    assert "fewer than 5 cells" in left_out[0]["reason"]
    assert "groups of one fold" in left_out[1]["reason"]
    assert set(labels[rows]) == {"B", "T"}
    assert len(folds) == 4
    without = probe(embedding, labels)
    assert [x["label"] for x in without.left_out] == ["rare"]
    assert without.labels == {"B": 40, "T": 40, "own": 20}
    with pytest.raises(InputError, match="at least two labels are needed, and 'B' is left .'rare' has fewer than 5"):
        probe(embedding[:44], np.array(["B"] * 40 + ["rare"] * 4))
    with pytest.raises(InputError, match="at least two groups are needed, and all cells are of 'd'"):
        probe(embedding, labels, np.full(104, "d"))
    embedding[7, 1] = np.nan
    with pytest.raises(InputError, match="1 cells is not finite. The first is at position 7"):
        probe(embedding, labels)


def test_more_cells_than_the_limit_are_drawn_and_seeds_repeat(cells) -> None:
    embedding, labels, _ = cells
    first, again, other = (probe(embedding, labels, seed=seed, max_cells=150) for seed in (1, 1, 2))
    assert first.drawn_of == 250
    assert sum(first.labels.values()) == 150
    assert first == again
    assert first != other


def test_neighbours_are_no_more_than_there_are() -> None:
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"] * 5)
    found = probe(rng.normal(size=(10, 2)) + 9 * (labels == "a")[:, None], labels)
    assert found.scores["embedding"]["linear"]["accuracy"]["value"] == 1
    # of 8 training cells all are neighbours: the votes tie, and the first label wins
    assert found.scores["embedding"]["knn"]["accuracy"]["value"] == 0.5
    assert KNeighborsClassifier(8).fit(np.eye(8), [0, 1] * 4).predict(np.eye(8)).tolist() == [0] * 8
