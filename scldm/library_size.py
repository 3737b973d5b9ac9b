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


class LogNormal(NamedTuple):
    """n_cells: training cells it was fitted on; log_mean, log_std: of the natural log of their total counts."""

    n_cells: int
    log_mean: float
    log_std: float


@dataclass(frozen=True)
class LibrarySizeModel:
    """For every subset of the conditions, a distribution for each combination of labels that training cells had.

    names: the conditions; a subset keeps their order
    fitted: names of a subset -> labels -> distribution; the empty subset is that of all cells
    """

    names: tuple[str, ...]
    fitted: dict[tuple[str, ...], dict[tuple[str, ...], LogNormal]]

    def of(self, labels: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the log library size of each row of labels, (n,) and (n,).

        labels: one column for each condition that is given, in any order; none for any cell

        Raises: InputError for the first combination of labels that no training cell had.
        """
        by = tuple(name for name in self.names if name in labels)
        table = self.fitted[by]
        if not table:
            told = ", ".join(by)
            raise InputError(f"no library sizes were fitted by {told} alone; give your own in a column `library_size`")
        # of no column, pandas has no rows
        rows = list(labels[list(by)].astype(str).itertuples(index=False, name=None)) if by else [()] * len(labels)
        for row in rows:
            if row not in table:
                told = ", ".join(f"{name}={label}" for name, label in zip(by, row, strict=True))
                raise InputError(
                    f"no library sizes were fitted for {told}: no training cell has this combination; "
                    "give sizes of your own in a column `library_size`"
                )
        return np.array([table[row].log_mean for row in rows]), np.array([table[row].log_std for row in rows])

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
