"""Which real cells are taken of an atlas whose splits are larger than memory or patience: a seeded draw of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scldm.errors import InputError

SPLITS = ("train", "validation", "test")


def check_splits(of_cell: np.ndarray, where: str, column: str) -> None:
    """of_cell: what a column of obs says of each cell. Raises: InputError where it leaves a split without cells."""
    found = sorted(set(of_cell))
    for name in SPLITS:
        if name not in found:
            raise InputError(
                f"{where}: obs column split={column!r} marks no {name} cells. It must say {', '.join(SPLITS)}, "
                f"and says {', '.join(map(repr, found[:5]))}"
            )


@dataclass(frozen=True)
class Sample:
    """At most so many cells of each split, all of them where it has no more.

    Among training and test cells, each type has the share at which it is compared. A type with too few cells leaves its
    place to the others. A uniform draw would have lost the rare types. Validation cells are drawn uniformly.

    n_cells: of a split at most
    generated: generated cells per type, which with the test cells say how many of a type are compared.
        None: no type is limited
    seed: of the draws
    """

    n_cells: int
    generated: Mapping[str, int] | None
    seed: int

    def numbers(self, split: str, of_split: Mapping[str, int], of_test: Mapping[str, int]) -> dict[str, int]:
        """Cells to take per type, of those that the split and the test split have. At least one of each type of the
        test split, so that one that was never generated or trained on is missed by name."""
        if sum(of_split.values()) <= self.n_cells:
            return dict(of_split)
        made = of_test if self.generated is None else self.generated
        compared = {t: max(1, min(n, made.get(t, 0))) for t, n in of_test.items()}
        share = of_split if split == "validation" else compared
        types = [t for t in of_split if share.get(t)]
        there, wanted = (np.array([of[t] for t in types], np.float64) for of in (of_split, share))

        def at(times: float) -> np.ndarray:
            return np.minimum(there, np.maximum(1, np.floor(times * wanted)))

        low, high = 0.0, float((there / wanted).max(initial=1.0)) + 1
        for _ in range(100):  # all digits of a float64
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle).sum() > self.n_cells else (middle, high)
        return {t: int(n) for t, n in zip(types, at(low), strict=True)}

    def rng(self, split: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, 3, SPLITS.index(split)])  # 0, 1 and 2 are compare's


def rows_of_blocks(
    type_n: np.ndarray, start: np.ndarray, numbers_K: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Rows, ascending, of numbers_K[k] cells of each type k, or of as many as there are, out of few blocks. Blocks are
    met in random order, and a set's cells were shuffled before they were put into blocks.

    type_n: (n,) numbers of the cells' types
    start: (n_blocks + 1,) first row of each block, and n
    """
    left_K, rows = numbers_K.copy(), [np.empty(0, np.int64)]
    for block in rng.permutation(len(start) - 1):
        types = np.asarray(type_n[start[block] : start[block + 1]])
        for k in np.unique(types[left_K[types] > 0]):
            of_type = np.flatnonzero(types == k)[: left_K[k]]
            left_K[k] -= len(of_type)
            rows.append(start[block] + of_type)
        if not left_K.any():
            break
    return np.sort(np.concatenate(rows))
