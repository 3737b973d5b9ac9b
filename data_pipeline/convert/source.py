"""What a source of cells is: an h5ad file, a SOMA experiment or the Census, what is asked of it and what it holds.

A source is opened twice (open.py). The plan opens it once, for its genes and for the rows that the filters choose, with
their obs columns (`OpenSource`). Every worker opens it for its counts, in bounded chunks of those rows (`Matrix`).

Reading order: SourceConfig, SourceSpec, OpenSource, Matrix, spans.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from data_pipeline.convert.genes import Join, SourceGenes
from data_pipeline.convert.narrow import Rows
from scldm.checked import Checked, checked
from scldm.vocab import MIN_GENE_SHARE

Kind = Literal["auto", "h5ad", "soma", "census"]


@dataclass(frozen=True)
class SourceConfig(Checked):
    """What to read.

    kind: h5ad stands for AnnData files, h5ad or zarr. auto looks at what lies there
    paths: h5ad or zarr files or globs of them, or the URI of a SOMA experiment or of a Census
    census_version: of the Census on the net, such as 2025-01-30, where no path is given
    organism: which experiment of a Census
    measurement: of a SOMA experiment
    layer: X, raw or a name in layers. Empty takes the one that holds counts from h5ad, and raw from SOMA
    obs_filter: cells to take, such as "tissue == 'lung' and n_genes > 500"
    var_filter: genes to take
    primary_data_only: of the Census, only cells with is_primary_data: each cell once
    gene_column: column of var with the gene ids. Empty takes the index from h5ad, and feature_id or var_id from SOMA
    namespace: of the gene vocabulary. auto takes the sources' own. Any other must be theirs, or needs gene_table
    join: several sources' genes: all, or those that every source has
    min_gene_share: of the smallest source's genes that the others must have, where only those of all are taken
    gene_table: CSV with the columns ensembl and symbol, for sources that name genes otherwise than the vocabulary
    """

    kind: Kind = "auto"
    paths: tuple[str, ...] = ()
    census_version: str = ""
    organism: str = "homo_sapiens"
    measurement: str = "RNA"
    layer: str = ""
    obs_filter: str = ""
    var_filter: str = ""
    primary_data_only: bool = False
    gene_column: str = ""
    namespace: Literal["auto", "ensembl", "symbol"] = "auto"
    join: Join = "intersection"
    min_gene_share: float = checked(MIN_GENE_SHARE, at_least=0, at_most=1)
    gene_table: str = ""


@dataclass(frozen=True)
class SourceSpec:
    """One source as the manifest names it, and all that it takes to read its counts again.

    n_rows, n_columns: shape of the matrix, before filters
    mean_nonzeros: stored values a row, without a dense matrix's zeros. Of some rows, where counting all takes long
    size, modified_ns: bytes and modification time of the file, 0 where it is none
    """

    kind: str
    uri: str
    layer: str
    n_rows: int
    n_columns: int
    mean_nonzeros: float
    size: int = 0
    modified_ns: int = 0
    measurement: str = ""
    organism: str = ""
    census_version: str = ""

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
    """Positions a, b such that reading all rows from rows[a] to rows[b - 1] costs at most `budget` (or is one row), and
    no rows between chosen ones that cost more than `gap` are read in vain.

    start, end: cost of all rows of the source before and up to each chosen row
    """
    cut = np.append(np.flatnonzero(start[1:] - end[:-1] > gap) + 1, len(rows))
    a = 0
    while a < len(rows):
        b = max(int(np.searchsorted(end, start[a] + budget, "right")), a + 1)
        b = min(b, int(cut[np.searchsorted(cut, a, "right")]))
        yield a, b
        a = b
