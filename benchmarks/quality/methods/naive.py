"""Methods that need no training: real cells, naive draws, and control cells that are shifted.

Reading order: training_cells, independent_genes, poisson_mean; control_shift and what it shares with scVI's shift.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from benchmarks.quality.cells import LabelledCells, Task, matching
from benchmarks.quality.known import Known, reconstruction
from benchmarks.quality.work import Made, Place, labels_frame
from scldm.errors import InputError
from scldm.evaluate import baselines as draws
from scldm.evaluate.reconstruction import fit_mean_profile
from scldm.evaluate.space import TARGET_SUM, log_normalise
from scldm.flow.means import POWER

UNSEEN = "not possible: no training cell has this combination"
SEEN = "not asked: the method takes control cells to combinations that are held out"


def training_cells(task: Task, seed: int, model: Path, place: Place) -> Made:
    """Training cells as they are, each once."""
    return _drawn(task, draws.floor_cells, training_numbers(task), seed)


def independent_genes(task: Task, seed: int, model: Path, place: Place) -> Made:
    return _drawn(task, draws.independent_genes, seen_numbers(task), seed)


def poisson_mean(task: Task, seed: int, model: Path, place: Place) -> Made:
    return _drawn(task, draws.poisson_mean, seen_numbers(task), seed)


def known_by_means(task: Task, seed: int, model: Path, place: Place) -> Known:
    """The mean profile of a cell's combination with a dispersion for each gene: what is known without a network."""
    profile = fit_mean_profile(task.train.counts, task.train.keys.astype(str), seed)

    def expected(cells: LabelledCells) -> tuple[np.ndarray, np.ndarray]:
        return profile.mean_BG(cells.library_size, cells.keys.astype(str)), profile.theta_G

    return Known(reconstruction=reconstruction(task.test, expected, seed))


def seen_numbers(task: Task) -> dict[str, int]:
    """Cells to make of each combination that training has."""
    return {key: n for key, n in task.numbers.items() if key not in task.unseen}


def training_numbers(task: Task) -> dict[str, int]:
    """The same, at most as many as training has."""
    of_train = task.train.numbers()
    return {key: min(n, of_train[key]) for key, n in seen_numbers(task).items()}


def not_seen(task: Task) -> dict[str, str]:
    """The combinations that a method per combination can't make, with why."""
    return dict.fromkeys(task.unseen, UNSEEN)


def _drawn(task: Task, draw: draws.Draw, numbers: dict[str, int], seed: int) -> Made:
    counts, keys = draw(task.train.counts, task.train.keys.astype(str), numbers, np.random.default_rng([seed, 1]))
    return Made(sp.csr_matrix(counts), labels_frame(task, keys), not_seen(task))


# --- shifts --------------------------------------------------------------------------------------------------------


def control_shift(task: Task, seed: int, model: Path, place: Place, near: bool = False) -> Made:
    """Control cells of the same kind, plus the shift that the treatment has in the others.

    near: as for `mean_shift`
    The shift of a gene is the mean, over the other kinds, of the difference of its mean log expression, treated less
    control. Whole counts come of rounding up with the probability of the fraction: it keeps the mean, and adds less
    noise than a Poisson draw would.
    """
    rng = np.random.default_rng([seed, 2])
    log = log_normalise(task.train.counts)

    def mean(rows: np.ndarray) -> np.ndarray:
        return np.asarray(log[rows].mean(0)).ravel()

    parts, keys = [], []
    for key in task.unseen:
        n = task.numbers[key]
        rows = control_rows(task, key, n, rng)
        shifted = np.maximum(log[rows].toarray() + mean_shift(task, key, mean, near), 0)
        share = np.expm1(shifted) / TARGET_SUM
        share /= share.sum(1, keepdims=True)
        counts = share * task.train.library_size[rows, None]
        parts.append(sp.csr_matrix(np.floor(counts + rng.random(counts.shape))))
        keys += [key] * n
    return Made(sp.csr_matrix(sp.vstack(parts)), labels_frame(task, np.array(keys, object)), not_shifted(task))


def not_shifted(task: Task) -> dict[str, str]:
    return {key: SEEN for key in task.numbers if key not in task.unseen}


def control_rows(task: Task, key: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Training cells of the combination's control, n of them; each once while there are enough.

    Raises: InputError where there are none.
    """
    assert task.control is not None
    name, label = task.control
    rows = task.train.rows({**task.labels_of[key], name: label})
    if not len(rows):
        raise InputError(f"{key}: no training cell of its control, {name}={label}")
    return rng.choice(rows, n, replace=n > len(rows))


def mean_shift(task: Task, key: str, mean: Callable[[np.ndarray], np.ndarray], near: bool = False) -> np.ndarray:
    """The mean difference, treated less control, over the kinds of training cells that have both.

    A kind is a combination of the other conditions.
    mean: of the cells with these row numbers
    near: kinds whose control cells are near count most, by the power of this project's sampler `shift`
    Raises: InputError where no kind has both.
    """
    assert task.control is not None
    name, label = task.control
    own = task.labels_of[key]
    control = mean(task.train.rows({**own, name: label}))
    others: pd.DataFrame = task.train.labels.drop(columns=name).drop_duplicates()
    shifts, ways = [], []
    for kind in others.to_dict("records"):
        of_kind = matching(task.train.labels, kind) if kind else np.ones(len(task.train), bool)
        of = [np.flatnonzero(of_kind & (task.train.labels[name].to_numpy() == one)) for one in (own[name], label)]
        if all(map(len, of)):
            shifts.append(mean(of[0]) - mean(of[1]))
            ways.append(np.linalg.norm(mean(of[1]) - control))
    if not shifts:
        raise InputError(f"{key}: no other kind of cell has both {name}={own[name]} and {name}={label} in training")
    return np.average(shifts, axis=0, weights=np.array(ways) ** -float(POWER) if near else None)
