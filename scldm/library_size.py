"""How many UMIs a cell of given conditions has: log-normal per combination of labels.

The moments come from a shard set's manifest, where they were taken over the training cells when the set was written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from scldm.errors import InputError, read_json

FEW_CELLS = 10  # below, a standard deviation says little


class LogNormal(NamedTuple):
    """n_cells: training cells it was fitted on; log_mean, log_std: of the natural log of their total counts."""

    n_cells: int
    log_mean: float
    log_std: float


class Sizes(NamedTuple):
    """log_mean_n, log_std_n: mean and standard deviation of the log library size of n cells
    backed_off: a sentence for each combination whose own were never fitted
    """

    log_mean_n: np.ndarray
    log_std_n: np.ndarray
    backed_off: tuple[str, ...]


@dataclass(frozen=True)
class LibrarySizeModel:
    """For every subset of the conditions, a distribution for each combination of labels that training cells had.

    names: the conditions; a subset keeps their order
    fitted: names of a subset -> labels -> distribution; the empty subset is that of all cells
    """

    names: tuple[str, ...]
    fitted: dict[tuple[str, ...], dict[tuple[str, ...], LogNormal]]

    def of(self, labels: pd.DataFrame) -> Sizes:
        """The log-normal of each row of labels.

        A combination that no training cell had backs off to the largest choice of its labels that some had together; of
        several, to that in which cells differ least, by the standard deviation of the log over 10 cells or more. It
        does not back off to all cells whatever their labels.

        labels: one column for each condition that is given, in any order; none for any cell

        Raises: InputError for the first row of which no label was fitted.
        """
        by = tuple(name for name in self.names if name in labels)
        # of no column, pandas has no rows
        rows = list(labels[list(by)].astype(str).itertuples(index=False, name=None)) if by else [()] * len(labels)
        of_row, backed_off = {}, []
        for row in dict.fromkeys(rows):
            given: dict[str, str] = dict(zip(by, row, strict=True))
            used = self._best(given)
            of_row[row] = self.fitted[used][tuple(given[name] for name in used)]
            if used != by:
                backed_off.append(
                    f"library sizes of {_told(given)}: no training cell has this combination; taken from the "
                    f"{of_row[row].n_cells:,} with {_told({name: given[name] for name in used})}"
                )
        found = [of_row[row] for row in rows]
        return Sizes(
            np.array([one.log_mean for one in found]), np.array([one.log_std for one in found]), tuple(backed_off)
        )

    def _best(self, given: dict[str, str]) -> tuple[str, ...]:
        """The conditions by which library sizes of these labels are known best."""

        def rank(by: tuple[str, ...]) -> tuple:
            one = self.fitted[by][tuple(given[name] for name in by)]
            return (-len(by), one.n_cells < FEW_CELLS, one.log_std)

        known = [
            by
            for by in subsets(tuple(given))
            if (by or not given) and tuple(given[name] for name in by) in self.fitted.get(by, {})
        ]
        if not known:
            raise InputError(
                f"no library sizes were fitted for {_told(given) or 'cells of any kind'}: no training cell has "
                "any of these labels; give sizes of your own in a column `library_size`"
            )
        return min(known, key=rank)

    def to_json(self) -> dict:
        fitted = [
            {"by": list(by), "labels": list(labels), **of_labels._asdict()}
            for by, table in self.fitted.items()
            for labels, of_labels in table.items()
        ]
        return {"names": list(self.names), "fitted": fitted}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: Path) -> LibrarySizeModel:
        obj = read_json(path)
        names = tuple(obj["names"])
        fitted: dict[tuple[str, ...], dict[tuple[str, ...], LogNormal]] = {by: {} for by in subsets(names)}
        for row in obj["fitted"]:
            fitted[tuple(row["by"])][tuple(row["labels"])] = LogNormal(row["n_cells"], row["log_mean"], row["log_std"])
        return cls(names, fitted)


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All subsets of some names, from the empty one to all of them, each in the order of `names`."""
    return [by for n in range(len(names) + 1) for by in combinations(names, n)]


def _told(given: dict[str, str]) -> str:
    return ", ".join(f"{name}={label}" for name, label in given.items())
