"""What a score is compared with: the floor, and baselines that anyone could draw from the training cells.

The floor is the training cells themselves: nothing that learns from them is expected to be nearer to the test cells. A
baseline knows one thing less than a model should: (a) that genes vary together, (b) more than the mean, (c) the
combination of conditions. Each is drawn combination by combination, so that it knows all conditions that the model has.

Of a combination that training cells lack, everything is drawn from its relatives: the training cells that share most of
its labels. There, (d) does more: control cells and the mean change of the other groups.
Reading order: draws, combinations without training cells, the table of baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from scldm.evaluate.cells import Cells
from scldm.evaluate.space import TARGET_SUM, log_normalise

Counts = sp.csr_matrix
Numbers = Mapping[str, int]


# --- draws ---------------------------------------------------------------------------------------------------------


def rows_per_type(types: np.ndarray, numbers: Numbers, rng: np.random.Generator) -> np.ndarray:
    """Row indices of `numbers[label]` cells of each label, without replacement. `numbers` asks for no more than there
    are."""
    return np.concatenate([rng.choice(np.flatnonzero(types == t), n, replace=False) for t, n in numbers.items()])


def floor_cells(
    counts: Counts, types: np.ndarray, numbers: Numbers, rng: np.random.Generator
) -> tuple[Counts, np.ndarray]:
    """Training cells as they are, `numbers[label]` of each type. Counts and types, as all draws here."""
    rows = rows_per_type(types, numbers, rng)
    return counts[rows], types[rows]


def independent_genes(
    counts: Counts, types: np.ndarray, numbers: Numbers, rng: np.random.Generator
) -> tuple[Counts, np.ndarray]:
    """(a) Every gene of a cell is taken from another training cell of the type: right marginals, no correlation."""

    def learn(of_type: Counts, n_cells: int) -> Callable[[int], np.ndarray]:
        columns = of_type.tocsc()
        columns.eliminate_zeros()
        expressing = np.diff(columns.indptr)

        def draw(n: int) -> np.ndarray:
            # a gene's expressing cells are thought of as the first ones: a draw beyond them is a zero
            cell = rng.integers(0, n_cells, size=(n, len(expressing)))
            drawn = np.zeros(cell.shape, dtype=counts.dtype)
            hit = cell < expressing
            drawn[hit] = columns.data[(cell + columns.indptr[:-1])[hit]]
            return drawn

        return draw

    return _by_type(counts, types, numbers, learn)


def poisson_mean(
    counts: Counts, types: np.ndarray, numbers: Numbers, rng: np.random.Generator
) -> tuple[Counts, np.ndarray]:
    """(b) Poisson counts at the type's mean of each gene."""

    def learn(of_type: Counts, n_cells: int) -> Callable[[int], np.ndarray]:
        mean = np.asarray(of_type.sum(0)).ravel() / n_cells
        return lambda n: rng.poisson(mean, size=(n, len(mean))).astype(counts.dtype)

    return _by_type(counts, types, numbers, learn)


def shuffled_types(
    counts: Counts, types: np.ndarray, numbers: Numbers, rng: np.random.Generator
) -> tuple[Counts, np.ndarray]:
    """(c) Real training cells under each other's types. Pooled, they are the floor."""
    cells, labels = floor_cells(counts, types, numbers, rng)
    return cells, rng.permutation(labels)


def _by_type(
    counts: Counts,
    types: np.ndarray,
    numbers: Numbers,
    learn: Callable[[Counts, int], Callable[[int], np.ndarray]],
    rows: int = 256,
) -> tuple[Counts, np.ndarray]:
    """`learn` sees a type's training cells and returns what draws n dense cells of it. At most 256 are dense at a
    time."""
    blocks, labels = [], []
    for label, n in numbers.items():
        cells = np.flatnonzero(types == label)
        draw = learn(counts[cells], len(cells))
        blocks += [sp.csr_matrix(draw(min(rows, n - start))) for start in range(0, n, rows)]
        labels += [label] * n
    return sp.csr_matrix(sp.vstack(blocks)), np.array(labels)


# --- combinations without training cells ---------------------------------------------------------------------------


def relatives(train: Cells, labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Rows of the training cells that share most of these labels (one a condition), and the names of their
    combinations. Where none shares any, all training cells are relatives."""
    shared = {t: sum(x == y for x, y in zip(labels, of, strict=True)) for t, of in train.combinations().items()}
    most = max(shared.values())
    related = [t for t in train.numbers() if shared[t] == most]
    return np.flatnonzero(np.isin(train.types, related)), related


def with_relatives(
    train: Cells, unseen: Mapping[str, tuple[str, ...]], wanted: Numbers, seed: int = 0
) -> tuple[Cells, dict[str, list[str]]]:
    """The training cells, some of them now under the names of unseen combinations (name -> labels): their relatives.
    And which combinations these are of.

    wanted: cells that each combination, seen or not, is drawn at. An unseen one gets up to four times as many, at most
        2,000, so that baselines have cells to choose from. These are cells that the seen combinations do not need, and
        at most half of those. Each is taken once, as a cell that stands twice in a set would be its own neighbour.
        Where they are fewer than wanted, any relatives are taken, and stand twice
    """
    rng, types, extra, of = np.random.default_rng([seed, 10]), train.types.astype(object), [], {}
    spare = np.zeros(len(train), bool)
    for name in train.numbers():
        rows = rng.permutation(np.flatnonzero(train.types == name))
        spare[rows[(wanted.get(name, 0) + len(rows) + 1) // 2 :]] = True  # none where fewer are there than wanted
    for name, labels in unseen.items():
        own, of[name] = relatives(train, labels)
        most = min(4 * wanted.get(name, 1), 2_000)
        free = rng.permutation(own[spare[own]])[:most]
        spare[free], types[free] = False, name
        if len(free) < wanted.get(name, 1):
            rest = rng.permutation(np.setdiff1d(own, free))[: most - len(free)]
            extra.append((rest, name))
    rows = np.concatenate([np.arange(len(train)), *(rest for rest, _ in extra)])
    every = np.concatenate([types, *(np.full(len(rest), name, object) for rest, name in extra)])
    return Cells(train.counts[rows], every.astype(str), train.genes, train.name), of


def shifted_controls(
    train: Cells, labels: Sequence[str], control: Mapping[str, str], n: int, rng: np.random.Generator
) -> Counts | None:
    """(d) n cells of an unseen combination: control cells of the same other labels, with moved log expression. It moves
    by the mean difference of treated and control cells, over the other groups that have both. Fewer than n are drawn
    with replacement. The log is turned back into counts of the cell's own total, rounded at random. None where the
    combination is of no treatment, or where no control cells or no other groups have it.
    """
    conditions, of = list(train.labels), train.combinations()
    by_labels = {of_labels: name for name, of_labels in of.items()}
    for k, condition in enumerate(conditions):
        untreated = control.get(condition)
        if untreated is None or labels[k] == untreated:
            continue
        own = by_labels.get((*labels[:k], untreated, *labels[k + 1 :]))
        pairs = [
            (name, by_labels[(*x[:k], untreated, *x[k + 1 :])])
            for name, x in of.items()
            if x[k] == labels[k] and (*x[:k], untreated, *x[k + 1 :]) in by_labels
        ]
        if own is None or not pairs:
            continue

        def mean(name: str) -> np.ndarray:
            return np.asarray(log_normalise(train.counts[np.flatnonzero(train.types == name)]).mean(0)).ravel()

        shift = np.mean([mean(treated) - mean(untreated_too) for treated, untreated_too in pairs], axis=0)
        rows = np.flatnonzero(train.types == own)
        rows = rng.choice(rows, n, replace=len(rows) < n)
        blocks = []
        for start in range(0, n, 256):
            of_block = train.counts[rows[start : start + 256]]
            log = np.maximum(log_normalise(of_block).toarray() + shift, 0)
            total = np.asarray(of_block.sum(1))
            expected = np.expm1(log) * total / TARGET_SUM
            expected *= total / np.maximum(expected.sum(1, keepdims=True), 1e-12)
            whole = np.floor(expected + rng.random(expected.shape))
            blocks.append(sp.csr_matrix(whole.astype(train.counts.dtype)))
        return sp.csr_matrix(sp.vstack(blocks))
    return None


# --- the table of baselines ----------------------------------------------------------------------------------------

Draw = Callable[[Counts, np.ndarray, Numbers, np.random.Generator], tuple[Counts, np.ndarray]]
BASELINES: Mapping[str, tuple[str, str, Draw]] = {
    "a": (
        "independent genes",
        "each gene resampled on its own among the training cells of the combination",
        independent_genes,
    ),
    "b": (
        "Poisson at the mean",
        "Poisson counts at the gene's mean over the training cells of the combination",
        poisson_mean,
    ),
    "c": ("shuffled labels", "real training cells under each other's labels", shuffled_types),
}


SHIFTED = ("d", "control + mean change", "control cells moved by the mean log change of the other groups")
