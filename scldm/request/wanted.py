"""Which cells are asked for: a table of conditions as its distinct rows, and a number a cell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from scldm import draws
from scldm.errors import InputError
from scldm.label_text import texts
from scldm.request.told_sizes import ToldSizes

ABSENT = ("", "nan")  # texts that are no label, as in `as_labels`


class Ways(NamedTuple):
    """How far cells are moved from what the network is asked for.

    way_nLZ: the different ways, float32, the first of which is 0. (1, 1, 1) where none is gone
    way_K: each combination's, int32
    """

    way_nLZ: np.ndarray
    way_K: np.ndarray

    def of(self, combination_n: np.ndarray) -> np.ndarray:
        return self.way_nLZ[self.way_K[combination_n]]


@dataclass(frozen=True)
class Wanted:
    """Cells to make, numbered from 0, as checked against a model.

    seed: of all draws
    combination_n: which combination of labels a cell has, int32 (n,)
    labels: the combinations, one a row, a column for each condition that is given
    ids: for every condition of the model, the label ids of the combinations, int64, or of a continuous one the values,
        float32. Its null where not given
    base_ids: what the sampler asks the network for instead, as `ids`: other labels where it shifts to what was never
        trained
    ways: how far cells are moved from there
    given_size_n: library sizes that were given, float64 (n,)
    log_mean, log_std: else those of the combinations' log-normals
    told_sizes: what the network is told of library sizes, if it is
    notes: a sentence for each thing that a reader of the cells should know
    """

    seed: int
    combination_n: np.ndarray
    labels: pd.DataFrame
    ids: dict[str, np.ndarray]
    base_ids: dict[str, np.ndarray]
    ways: Ways
    given_size_n: np.ndarray | None
    log_mean: np.ndarray | None = None
    log_std: np.ndarray | None = None
    told_sizes: ToldSizes | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_cells(self) -> int:
        return len(self.combination_n)

    @property
    def told(self) -> dict[str, str]:
        """The notes as `uns["scldm"]` keeps them, as of combinations that were never trained. Empty without any."""
        return {"notes": "\n".join(self.notes)} if self.notes else {}

    @property
    def hash(self) -> str:
        """SHA-256 over which cells are asked for, with their library sizes, but not over the seed."""
        digest = hashlib.sha256(self.labels.to_csv().encode())
        for values in (self.combination_n, self.given_size_n, self.log_mean, self.log_std):
            digest.update(b"none" if values is None else values.tobytes())
        return digest.hexdigest()

    def _of(self, rows: range) -> np.ndarray:
        """The combinations of some cells. Beyond the last one, where a batch is filled up, that one's."""
        return self.combination_n[np.minimum(np.arange(rows.start, rows.stop), self.n_cells - 1)]

    def ids_of(self, rows: range) -> dict[str, np.ndarray]:
        """Label ids (or values) of some cells by condition."""
        return {name: ids[self._of(rows)] for name, ids in self.ids.items()}

    def base_ids_of(self, rows: range) -> dict[str, np.ndarray]:
        """The same of what the network is asked for."""
        return {name: ids[self._of(rows)] for name, ids in self.base_ids.items()}

    def way_of(self, rows: range) -> np.ndarray:
        """How far some cells are moved from there, (B, L, Z), or (B, 1, 1) where none is."""
        return self.ways.of(self._of(rows))

    def library_size(self, rows: range) -> np.ndarray:
        """Expected total counts of some cells, float64: those given, or drawn, each by its number."""
        if self.given_size_n is not None:
            return self.given_size_n[np.minimum(np.arange(rows.start, rows.stop), self.n_cells - 1)]
        assert self.log_mean is not None
        assert self.log_std is not None
        parts = []
        for first in range(rows.start, rows.stop, 4096):  # a draw takes some 300 B on its way
            some = range(first, min(first + 4096, rows.stop))
            normal = draws.normal(self.seed, "library size", 0, torch.arange(some.start, some.stop), (1,))[:, 0]
            of = self._of(some)
            parts.append(np.exp(self.log_mean[of] + self.log_std[of] * normal.double().numpy()))
        return np.concatenate(parts)

    def told_size(self, rows: range, size_n: np.ndarray) -> np.ndarray:
        """Library sizes of some cells as the network is told them: of the base labels, float64."""
        if self.told_sizes is None:
            return size_n
        return self.told_sizes.tell(torch.from_numpy(size_n), torch.from_numpy(self._of(rows))).numpy()


def distinct(conditions: pd.DataFrame, missing: Mapping[str, str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Which of the distinct rows every row is, int32 (n,), and those, as text.

    missing: condition -> label of its missing values

    Raises: InputError for a missing value of another condition.
    """
    code_n = np.zeros(len(conditions), np.int64)
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in map(str, conditions.columns):
        try:
            value_n, values = pd.factorize(conditions[name])
        except TypeError:  # of a list, say, which is no label
            raise InputError(f"column {name} holds what is no label: labels are texts or numbers") from None
        if (value_n < 0).any() and name not in missing:
            raise InputError(
                f"column {name}, row {(value_n < 0).argmax()}: no label is given, and the model was trained on no "
                f"missing values of {name}. Give a label, or leave these rows out"
            )
        known = texts(pd.Series(values))  # 1 and 1.0 are one label
        if name in missing:  # at the end, which a value_n of -1 means
            known = pd.Series([*known.where(~known.isin(ABSENT), missing[name]), missing[name]], dtype=object)
        label_of, labels = pd.factorize(known)
        columns[name] = label_of[value_n], np.asarray(labels, object)
        code_n = pd.factorize(code_n * len(labels) + columns[name][0])[0]
    _, first, code_n = np.unique(code_n, return_index=True, return_inverse=True)
    of_rows = {name: labels[label_n[first]] for name, (label_n, labels) in columns.items()}
    return code_n.astype(np.int32), pd.DataFrame(of_rows, index=range(len(first)), dtype=object)
