"""What a source of cells is: an h5ad file, a SOMA experiment or the Census, what is asked of it and what it holds.

A source is opened twice (open.py). The plan opens it once, for its genes and for the rows that the filters choose, with
their obs columns (`OpenSource`). Every worker opens it for its counts, in bounded chunks of those rows (`Matrix`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from data_pipeline.convert.genes import SourceGenes
from data_pipeline.convert.narrow import Rows
from data_pipeline.format.schema import Source


@dataclass(frozen=True)
class SourceSpec(Source):
    """A source that can be opened."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def has_changed(self) -> bool:
        """Whether the file is there and is another than it was."""
        if self.kind != "h5ad" or not os.path.exists(self.uri):
            return False
        return size_and_time(self.uri) != (self.size, self.modified_ns)


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes, and when they were last changed in ns, of a file or of all files of a zarr store."""
    inside = [p for p in Path(path).rglob("*") if p.is_file()] if os.path.isdir(path) else [path]
    stats = [os.stat(p) for p in inside]
    return sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)


@dataclass(frozen=True)
class OpenSource:
    """A source and what was chosen of it.

    rows: chosen rows or joinids, ascending, int64
    obs: the asked columns of the chosen rows, as labels
    report: what the filters dropped
    """

    spec: SourceSpec
    genes: SourceGenes
    keep_gene: np.ndarray
    rows: np.ndarray
    obs: pd.DataFrame
    report: dict[str, int]


class Matrix(Protocol):
    """The counts of a source, by chunks."""

    def read(self, rows: np.ndarray, chunk_bytes: int) -> Iterator[Rows]:
        """The given rows (ascending), in order, in chunks. Reading them takes at most about chunk_bytes of memory."""
        ...

    def row_name(self, row: int) -> str:
        """How a person finds the cell."""
        ...

    def close(self) -> None: ...


def spans(rows: np.ndarray, start: np.ndarray, end: np.ndarray, budget: float, gap: float) -> Iterator[tuple[int, int]]:
    """Positions a, b such that reading all rows from rows[a] to rows[b - 1] costs at most `budget`, or is one row. Rows
    between chosen ones that cost more than `gap` are not read.

    start, end: cost of all rows of the source before and up to each chosen row
    """
    cut = np.append(np.flatnonzero(start[1:] - end[:-1] > gap) + 1, len(rows))
    a = 0
    while a < len(rows):
        b = max(int(np.searchsorted(end, start[a] + budget, "right")), a + 1)
        b = min(b, int(cut[np.searchsorted(cut, a, "right")]))
        yield a, b
        a = b
