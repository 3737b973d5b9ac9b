"""How many UMIs a cell of given conditions has: log-normal per combination of labels.

The moments come from a shard set's manifest, where they were taken over the training cells when the set was written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scldm.errors import InputError
from scldm.given_json import Count, JsonFile, typed

FEW_CELLS = 10  # below, a standard deviation says little


class LogNormal(NamedTuple):
    """n_cells: training cells it was fitted on. log_mean, log_std: of the natural log of their total counts."""

    n_cells: int
    log_mean: float
    log_std: float


Tables = dict[tuple[str, ...], dict[tuple[str, ...], LogNormal]]  # names of conditions -> labels -> distribution


class Sizes(NamedTuple):
    """log_mean_n, log_std_n: mean and standard deviation of the log library size of n cells
    backed_off: a sentence for each combination whose own were never fitted, or on too few cells
    """

    log_mean_n: np.ndarray
    log_std_n: np.ndarray
    backed_off: tuple[str, ...]


@dataclass(frozen=True)
class LibrarySizeModel(JsonFile):
    """A distribution for each combination of labels that training cells had, of all conditions or of some.

    names: the conditions. A subset keeps their order
    fitted: names of a subset -> labels -> distribution. The empty subset is that of all cells. That of all conditions
        is there. A subset that is not (with many conditions there are too many) is pooled from it
    """

    names: tuple[str, ...]
    fitted: Tables

    def of(self, labels: pd.DataFrame, or_all: bool = False) -> Sizes:
        """The log-normal of each row of labels.

        A combination that no training cell had backs off to the largest choice of its labels that some had together.
        That is all but one of them, then all but two, and so on to one alone. Among choices of one size, the one is
        taken in which cells differ least, by the standard deviation of the log over 10 cells or more. It does not back
        off to all cells whatever their labels. Fewer than 10 cells give the mean alone. The spread then comes from the
        largest choice of these labels that 10 or more cells had together, or else from all cells.

        labels: one column for each condition that is given, in any order. None for any cell
        or_all: where no label was fitted, take all cells

        Raises: InputError for the first row of which no label was fitted.
        """
        by = tuple(name for name in self.names if name in labels)
        # of no column, pandas has no rows
        rows = list(labels[list(by)].astype(str).itertuples(index=False, name=None)) if by else [()] * len(labels)
        of_row, backed_off, tables = {}, [], dict(self.fitted)
        for row in dict.fromkeys(rows):
            given: dict[str, str] = dict(zip(by, row, strict=True))
            used, taken = self._best(given, tables, or_all)
            spread_by, spread = self._spread({name: given[name] for name in used}, taken, tables)
            of_row[row] = taken._replace(log_std=spread.log_std)
            said = []
            if used != by:
                said += [
                    "no training cell has this combination",
                    f"taken from the {taken.n_cells:,} with {_told({name: given[name] for name in used})}",
                ]
            elif taken.n_cells < FEW_CELLS:
                said.append(f"taken from {taken.n_cells}")
            if taken.n_cells < FEW_CELLS and by:
                whose = _told({name: given[name] for name in spread_by}) or "any labels"
                said.append(
                    f"as these are fewer than {FEW_CELLS}, how much cells differ is taken from the {spread.n_cells:,} "
                    f"with {whose}"
                )
            if said:
                backed_off.append(f"library sizes of {_told(given)}: {'; '.join(said)}")
        found = [of_row[row] for row in rows]
        return Sizes(
            np.array([one.log_mean for one in found]), np.array([one.log_std for one in found]), tuple(backed_off)
        )

    def _best(self, given: dict[str, str], tables: Tables, or_all: bool) -> tuple[tuple[str, ...], LogNormal]:
        """The conditions by which library sizes of these labels are known best, and what is known of them.

        tables: those fitted. What is pooled on the way is added
        """

        # a label that no training cell had is in no combination that some had
        seen = {name: label for name, label in given.items() if (name, label) in self.known_labels}
        for n in range(len(seen), 0 if given and not or_all else -1, -1):
            known = self._of_parts(seen, n, tables)
            if known:
                return min(known, key=lambda found: (found[1].n_cells < FEW_CELLS, found[1].log_std))
        raise InputError(
            f"no library sizes were fitted for {_told(given) or 'cells of any kind'}: no training cell has "
            "any of these labels. Give sizes of your own in a column `library_size`"
        )

    def _spread(self, given: dict[str, str], taken: LogNormal, tables: Tables) -> tuple[tuple[str, ...], LogNormal]:
        """The conditions by which it is known best how much cells of these labels differ, and what is known of them."""
        n, known = len(given), [(tuple(given), taken)]
        while n and not any(one.n_cells >= FEW_CELLS for _, one in known):
            n -= 1
            known = self._of_parts(given, n, tables)
        enough = [(by, one) for by, one in known if n == 0 or one.n_cells >= FEW_CELLS]
        return min(enough, key=lambda found: found[1].log_std, default=(tuple(given), taken))

    def _of_parts(self, given: dict[str, str], n: int, tables: Tables) -> list[tuple[tuple[str, ...], LogNormal]]:
        """What is known of cells that have n of these labels, for every choice of which."""
        found = []
        for by in combinations(given, n):
            if by not in tables:
                tables[by] = self._pooled(by)
            if one := tables[by].get(tuple(given[name] for name in by)):
                found.append((by, one))
        return found

    @cached_property
    def known_labels(self) -> set[tuple[str, str]]:
        """(condition, label) of all that some training cell had."""
        return {pair for by, table in self.fitted.items() for labels in table for pair in zip(by, labels)}

    def _pooled(self, by: tuple[str, ...]) -> dict[tuple[str, ...], LogNormal]:
        """The distributions by some of the conditions, from those by all of them."""
        parts: dict[tuple[str, ...], list[LogNormal]] = {}
        for labels, one in self.fitted.get(self.names, {}).items():
            of_name = dict(zip(self.names, labels, strict=True))
            parts.setdefault(tuple(of_name[name] for name in by), []).append(one)
        return {labels: _pool(of_labels) for labels, of_labels in parts.items()}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1))

    def to_json(self) -> dict:
        fitted = [
            {"by": list(by), "labels": list(labels), **of_labels._asdict()}
            for by, table in self.fitted.items()
            for labels, of_labels in table.items()
        ]
        return {"names": list(self.names), "fitted": fitted}

    @classmethod
    def from_json(cls, obj: Any, where: str) -> LibrarySizeModel:
        """Raises: InputError for anything else."""
        stored = typed(_Stored, obj, where)
        fitted: Tables = {}
        for row in stored.fitted:
            if not set(row.by) <= set(stored.names) or len(row.by) != len(row.labels) or row.log_std < 0:
                raise InputError(f"{where}: no library sizes can be by {row.by} of {row.labels} (std {row.log_std})")
            fitted.setdefault(row.by, {})[row.labels] = LogNormal(row.n_cells, row.log_mean, row.log_std)
        return cls(stored.names, fitted)


@dataclass(frozen=True)
class _StoredRow:
    by: tuple[str, ...]
    labels: tuple[str, ...]
    n_cells: Count
    log_mean: float
    log_std: float


@dataclass(frozen=True)
class _Stored:
    names: tuple[str, ...]
    fitted: tuple[_StoredRow, ...]


def _pool(parts: list[LogNormal]) -> LogNormal:
    """Of the cells of several distributions together."""
    n = sum(one.n_cells for one in parts)
    mean = sum(one.n_cells * one.log_mean for one in parts) / n
    variance = sum(one.n_cells * (one.log_std**2 + (one.log_mean - mean) ** 2) for one in parts) / n
    return LogNormal(n, mean, variance**0.5)


def _told(given: dict[str, str]) -> str:
    return ", ".join(f"{name}={label}" for name, label in given.items())
