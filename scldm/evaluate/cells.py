"""Sets of cells with their conditions, and how many of each combination are compared.

Reading order: combinations, cells, genes, numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.vocab import MIN_GENE_SHARE, stands_twice, why_few

NO_TYPE = ""  # of all cells where no condition tells them apart. No label is empty
BETWEEN = " · "  # the labels of a combination, in a table

# --- combinations --------------------------------------------------------------------------------------------------


def combination_names(labels: Mapping[str, np.ndarray], n_cells: int) -> np.ndarray:
    """Each cell's combination as one text, (cells,) str: its labels in the order of the conditions.

    Raises: InputError where two combinations would have one name.
    """
    if not labels:
        return np.full(n_cells, NO_TYPE)
    columns = [np.asarray(column, dtype=str) for column in labels.values()]
    if len(columns) == 1:
        return columns[0]
    for condition, column in zip(labels, columns, strict=True):
        if clash := next((str(label) for label in np.unique(column) if BETWEEN in label), None):
            raise InputError(f"condition {condition!r}: label {clash!r} holds {BETWEEN!r}. Rename it")
    names = columns[0]
    for column in columns[1:]:
        names = np.char.add(np.char.add(names, BETWEEN), column)
    return names


# --- cells ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Cells of one source.

    counts: raw counts, CSR (cells, genes)
    types: each cell's combination of conditions, (cells,) str. All NO_TYPE where there is no condition
    genes: gene ids of the columns
    name: how messages call them
    drawn_of: cells of the split that they were drawn from. 0 where they are all of it
    labels: condition -> its label of each cell, (cells,) str. Empty where `types` is all that is known

    Raises: InputError where the counts are not counts or a gene stands twice.
    """

    counts: sp.csr_matrix
    types: np.ndarray
    genes: tuple[str, ...]
    name: str
    drawn_of: int = 0
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.counts.shape == (len(self.types), len(self.genes)), self.name
        assert all(len(column) == len(self.types) for column in self.labels.values()), self.name
        values = self.counts.data
        wrong = values[(values < 0) | (values != np.floor(values)) | ~np.isfinite(values)]
        if len(wrong):
            raise InputError(
                f"{self.name}: the matrix holds {wrong[0]:g}, which is not a count. "
                "Give raw counts (integers from 0), not normalised ones"
            )
        if (twice := stands_twice(self.genes)) is not None:
            raise InputError(f"{self.name}: gene {twice!r} stands twice. Gene ids must be unique")

    @classmethod
    def of_labels(
        cls,
        counts: sp.csr_matrix,
        labels: Mapping[str, np.ndarray],
        genes: tuple[str, ...],
        name: str,
        drawn_of: int = 0,
    ) -> Cells:
        """Cells whose combinations are named after their labels."""
        n_cells = len(counts.indptr) - 1
        return cls(counts, combination_names(labels, n_cells), genes, name, drawn_of, labels)

    def __len__(self) -> int:
        return len(self.types)

    def select(self, rows: np.ndarray) -> Cells:
        labels = {condition: column[rows] for condition, column in self.labels.items()}
        return Cells(self.counts[rows], self.types[rows], self.genes, self.name, labels=labels)

    def with_counts(self, counts: sp.csr_matrix, genes: tuple[str, ...], name: str) -> Cells:
        """Other counts of the same cells."""
        return Cells(counts, self.types, genes, name, labels=self.labels)

    def numbers(self) -> dict[str, int]:
        """Cells per combination, most first."""
        return numbers_of(self.types)

    def combinations(self) -> dict[str, tuple[str, ...]]:
        """Its labels by the name of each combination, in the order of the conditions. A set without labels has one
        condition or none."""
        if not self.labels:
            return {t: (t,) for t in self.numbers()}
        names, first = np.unique(self.types, return_index=True)
        return {str(t): tuple(str(c[k]) for c in self.labels.values()) for t, k in zip(names, first, strict=True)}


# --- genes ---------------------------------------------------------------------------------------------------------


def common_genes(real: Cells, generated: Cells, min_share: float = MIN_GENE_SHARE) -> tuple[str, ...]:
    """The genes of both, in the real cells' order.

    min_share: of the genes of the one that has fewer
    Raises: InputError where there are none, or fewer, with a guess at the cause.
    """
    theirs, fewer = set(generated.genes), min(len(real.genes), len(generated.genes))
    common = tuple(g for g in real.genes if g in theirs)
    if not common or len(common) < min_share * fewer:
        raise InputError(
            f"{generated.name} and {real.name}: {len(common):,} of {fewer:,} genes matched, less than "
            f"evaluate.min_gene_share={min_share:g}: {', '.join(generated.genes[:3])} ... against "
            f"{', '.join(real.genes[:3])} ...{why_few(generated.genes, real.genes)}"
        )
    return common


def with_genes(cells: Cells, genes: tuple[str, ...]) -> Cells:
    """The cells with these genes as columns."""
    if cells.genes == genes:
        return cells
    column = {g: k for k, g in enumerate(cells.genes)}
    return cells.with_counts(cells.counts[:, [column[g] for g in genes]], genes, cells.name)


# --- numbers -------------------------------------------------------------------------------------------------------


def numbers_of(labels_n: np.ndarray) -> dict[str, int]:
    """Cells of each label, most first."""
    labels, n = np.unique(labels_n, return_counts=True)
    return {str(labels[k]): int(n[k]) for k in np.argsort(-n, kind="stable")}


def matched_numbers(train: Cells, test: Cells, generated: Cells) -> dict[str, int]:
    """Cells per combination at which everything is compared: the test split's, or fewer where fewer were generated or
    trained on. Distances of finite samples depend on their size, and pooled ones on the mix of combinations. A
    combination that training cells lack is limited by the other two.

    Raises: InputError for a set without cells, and for a combination of the test split that was not generated.
    """
    for cells in (test, generated, train):
        if not len(cells):
            raise InputError(f"{cells.name} holds no cells")
    n_test, n_generated, n_train = (cells.numbers() for cells in (test, generated, train))
    missing = [t for t in n_test if t not in n_generated]
    if missing:
        raise InputError(
            f"{generated.name} has no cells of {names(missing)}, which the test split holds. Generate some of each, "
            f"or leave it out of the real cells (generated: {names(list(n_generated))})"
        )
    return {t: min(n, n_generated[t], n_train.get(t, n)) for t, n in n_test.items()}


def scored_combinations(
    numbers: Mapping[str, int], min_cells: int, max_combinations: int
) -> tuple[list[str], list[str], str]:
    """The combinations that are scored one by one, largest first, those that are not, and, where none is, the
    sentence that says why.

    Raises: InputError for fewer cells of all together than one combination needs.
    """
    if (n := sum(numbers.values())) < min_cells:
        raise InputError(
            f"only {n} cells to compare (test, generated and training cells all count), and "
            f"evaluate.min_cells={min_cells} are needed. Give more cells, or set it lower"
        )
    if NO_TYPE in numbers:
        why = "No condition was given, so that all cells count as one group. Scores are pooled only, and there are "
        return [], [], why + "no marker genes."
    order = sorted(numbers, key=lambda t: -numbers[t])
    scored = [t for t in order if numbers[t] >= min_cells][:max_combinations]
    if scored:
        return scored, [t for t in order if t not in set(scored)], ""
    most = f"the most are {numbers[order[0]]} of {order[0]!r}"
    why = f"No combination has {min_cells} cells to compare ({most}), so that scores are pooled only. "
    return [], order, why + "evaluate.min_cells lowers that number."


def names(labels: Sequence[str], shown: int = 5) -> str:
    """The first of them, quoted, and how many more there are."""
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return ", ".join(map(repr, labels[:shown])) + more
