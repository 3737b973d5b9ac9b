"""What an embedding of cells knows about a label: a linear probe and nearest neighbours, beside PCA of the same cells.

Every cell is predicted once, by a classifier that has not seen it. Where groups are given (a donor, say), it has seen
no cell of the group either. A label that only tells the donor then scores nothing. Everything that is fitted, scales
and components too, is fitted on the training cells of its fold.

Reading order: folds, which labels, features, classifiers, scores, probe.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scldm.errors import InputError
from scldm.evaluate.cells import numbers_of
from scldm.evaluate.space import fit_pca, log_normalise, subsample

N_FOLDS = 5
N_NEIGHBOURS = 15
N_COMPONENTS = 50
MAX_ITERATIONS = 1_000  # of the linear probe's solver
MAX_CELLS = 20_000
SCORES = ("accuracy", "macro_f1", "macro_precision", "macro_recall")

# training and test rows of each fold
Folds = list[tuple[np.ndarray, np.ndarray]]

# --- folds ---------------------------------------------------------------------------------------------------------


def folds_of(labels_n: np.ndarray, groups_n: np.ndarray | None, seed: int) -> Folds:
    """Five folds of the labels' shares. With groups, one fold a group where there are five or fewer, else five folds of
    whole groups, of shares as equal as they allow."""
    if groups_n is None:
        splitter = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    elif len(np.unique(groups_n)) <= N_FOLDS:
        splitter = LeaveOneGroupOut()
    else:
        splitter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # of a label with fewer groups than folds, which `judged` leaves out where that harms
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return list(splitter.split(np.zeros((len(labels_n), 1)), labels_n, groups_n))


# --- which labels --------------------------------------------------------------------------------------------------


def judged(labels_n: np.ndarray, groups_n: np.ndarray | None, seed: int) -> tuple[np.ndarray, Folds, list[dict]]:
    """The rows of cells that are judged, folds of these rows, and the labels that are left out. These have fewer cells
    than folds, or some fold would have no training cell of them.

    Raises: InputError for fewer than two labels, or than two groups.
    """
    left_out: list[dict] = []
    keep = np.ones(len(labels_n), bool)

    def leave_out(label: str, reason: str) -> None:
        nonlocal keep
        left_out.append({"label": str(label), "cells": int((labels_n == label).sum()), "reason": reason})
        keep = keep & (labels_n != label)

    for label, n in zip(*np.unique(labels_n, return_counts=True), strict=True):
        if n < N_FOLDS:
            leave_out(label, f"fewer than {N_FOLDS} cells")
    while True:
        rows = np.flatnonzero(keep)
        if len(there := np.unique(labels_n[rows])) < 2:
            why = "; ".join(f"{x['label']!r} has {x['reason']}" for x in left_out[:3])
            raise InputError(
                f"label: cells of at least two labels are needed, and {repr(str(there[0])) if len(there) else 'none'} "
                "is left" + (f" ({why})" if why else "")
            )
        groups = None if groups_n is None else groups_n[rows]
        if groups is not None and len(np.unique(groups)) < 2:
            raise InputError(f"held_out_by: at least two groups are needed, and all cells are of {str(groups[0])!r}")
        folds = folds_of(labels_n[rows], groups, seed)
        parts = [(set(labels_n[rows[train]]), set(labels_n[rows[test]])) for train, test in folds]
        untaught = sorted(set().union(*(of_test - of_train for of_train, of_test in parts)))
        if not untaught:
            return rows, folds, left_out
        for label in untaught:
            leave_out(label, "all its cells in the groups of one fold")


# --- features ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """Principal components of log1p counts per 10,000, fitted on the training cells of a fold. 50, or as many as there
    can be.

    log: CSR (cells, genes)
    """

    log: sp.csr_matrix
    seed: int

    def __call__(self, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = min(N_COMPONENTS, len(train) - 1, self.log[train].shape[1] - 1)  # pyright: ignore[reportOptionalSubscript]
        pca = fit_pca(self.log[train], n, self.seed, "training")
        return pca.transform(self.log[train]), pca.transform(self.log[test])


# --- classifiers ---------------------------------------------------------------------------------------------------

CLASSIFIERS: Mapping[str, Callable[[int], object]] = {
    # multinomial, L2 penalty of weight 1, on features of mean 0 and standard deviation 1
    "linear": lambda n: make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS)),
    # the most frequent label of the 15 nearest cells, Euclidean
    "knn": lambda n: KNeighborsClassifier(min(N_NEIGHBOURS, n)),
}


def predictions(
    features: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], labels_n: np.ndarray, folds: Folds
) -> tuple[dict[str, np.ndarray], bool]:
    """Classifier -> the label of each cell, predicted in the fold that tests it, and whether every linear probe
    converged.

    features: those of the training rows and the test rows of a fold
    """
    found = {name: np.empty_like(labels_n) for name in CLASSIFIERS}
    converged = True
    for train, test in folds:
        of_train, of_test = features(train, test)
        for name, make in CLASSIFIERS.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                model = make(len(train)).fit(of_train, labels_n[train])  # pyright: ignore[reportAttributeAccessIssue]
            converged &= not any(issubclass(w.category, ConvergenceWarning) for w in caught)
            found[name][test] = model.predict(of_test)
    return found, converged


# --- scores --------------------------------------------------------------------------------------------------------


def classification(true_n: np.ndarray, predicted_n: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1, precision and recall as plain means over the labels that the true ones hold. Precision is 0 for
    a label that is never predicted."""
    labels = np.unique(true_n)
    precision, recall, f1, _ = precision_recall_fscore_support(
        true_n,
        predicted_n,
        labels=labels,
        average="macro",
        zero_division=0,  # pyright: ignore[reportArgumentType] - as documented
    )
    values = (accuracy_score(true_n, predicted_n), f1, precision, recall)
    return {name: float(value) for name, value in zip(SCORES, values, strict=True)}


def scored(true_n: np.ndarray, predicted_n: np.ndarray, folds: Folds) -> dict[str, dict]:
    """Score -> `value` over all cells, the values of the folds alone and their standard deviation `sd`."""
    whole = classification(true_n, predicted_n)
    parts = [classification(true_n[test], predicted_n[test]) for _, test in folds]
    return {
        name: {
            "value": value,
            "sd": float(np.std([part[name] for part in parts], ddof=1)),
            "folds": [part[name] for part in parts],
        }
        for name, value in whole.items()
    }


# --- probe ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What `probe` finds.

    scores: features (embedding, pca) -> classifier (linear, knn) -> score -> value, sd, folds
    labels: label -> cells that were judged
    left_out: label, cells and reason of those that were not
    n_folds, groups: folds, and the groups that each tests. None where cells are not held out by group
    most_frequent: share of the most frequent label, which is the accuracy of knowing nothing
    drawn_of: cells that the judged ones were drawn from. 0 where they are all
    not_converged: features whose linear probe stopped at 1,000 iterations
    """

    scores: dict[str, dict[str, dict[str, dict]]]
    labels: dict[str, int]
    left_out: list[dict]
    n_folds: int
    groups: list[list[str]] | None
    most_frequent: float
    drawn_of: int
    not_converged: list[str] = field(default_factory=list)


def probe(
    embedding_nD: np.ndarray,
    labels_n: np.ndarray,
    groups_n: np.ndarray | None = None,
    seed: int = 0,
    counts: sp.csr_matrix | None = None,
    max_cells: int = MAX_CELLS,
) -> Probe:
    """How well a label is told from an embedding of cells, and from principal components of their counts.

    embedding_nD: (cells, width)
    labels_n, groups_n: of each cell, (cells,) str. The cells of a group are held out together
    seed: of folds and of the draw
    counts: raw counts of the same cells, CSR (cells, genes). None for no baseline
    max_cells: at most so many cells are judged, drawn uniformly

    Raises: InputError for too few labels or groups, and for an embedding that is not finite.
    """
    assert len(embedding_nD) == len(labels_n), (len(embedding_nD), len(labels_n))
    if len(wrong := np.flatnonzero(~np.isfinite(embedding_nD).all(1))):
        raise InputError(f"the embedding of {len(wrong):,} cells is not finite. The first is at position {wrong[0]}")
    drawn = subsample(len(labels_n), max_cells, seed)
    labels_n = np.asarray(labels_n, str)
    of_drawn = None if groups_n is None else np.asarray(groups_n, str)[drawn]
    rows, folds, left_out = judged(labels_n[drawn], of_drawn, seed)
    true = labels_n[drawn[rows]]
    embedding = np.asarray(embedding_nD, np.float64)[drawn[rows]]
    features: dict[str, Callable] = {"embedding": lambda train, test: (embedding[train], embedding[test])}
    if counts is not None:
        features["pca"] = Components(log_normalise(counts[drawn[rows]]), seed)
    scores, not_converged = {}, []
    for name, of in features.items():
        found, converged = predictions(of, true, folds)
        scores[name] = {classifier: scored(true, predicted, folds) for classifier, predicted in found.items()}
        not_converged += [] if converged else [name]
    labels = numbers_of(true)
    return Probe(
        scores=scores,
        labels=labels,
        left_out=left_out,
        n_folds=len(folds),
        groups=None if of_drawn is None else [sorted(set(map(str, of_drawn[rows][test]))) for _, test in folds],
        most_frequent=max(labels.values()) / len(true),
        drawn_of=len(labels_n) if len(drawn) < len(labels_n) else 0,
        not_converged=not_converged,
    )
