"""The cells of the benchmark: labels, splits, variable genes, and what is held out.

Reading order: LabelledCells, Task, read_task; splits, held-out combinations, variable genes; library sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from benchmarks.quality.config import QualityConfig
from scldm.errors import InputError
from scldm.evaluate.cells import Cells
from scldm.evaluate.response import guess_control

SPLITS = ("train", "validation", "test")
SHARES = {"validation": 0.2, "test": 0.2}  # of every combination; the others train
SPLIT_COLUMN = "quality_split"


def key_of(labels: Mapping[str, str]) -> str:
    """A combination as one text, such as `cell_type=B, treatment=ctrl`."""
    return ", ".join(f"{name}={label}" for name, label in labels.items())


@dataclass(frozen=True)
class LabelledCells:
    """counts: raw, CSR (cells, genes); labels: a column of text for each condition; genes: names of the columns."""

    counts: sp.csr_matrix
    labels: pd.DataFrame
    genes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def keys(self) -> np.ndarray:
        """Each cell's combination, (cells,) object of str."""
        return np.array([key_of(row) for row in self.labels.to_dict("records")], dtype=object)

    @cached_property
    def library_size(self) -> np.ndarray:
        """Counts per cell, (cells,)."""
        return np.asarray(self.counts.sum(1)).ravel()

    def select(self, rows: np.ndarray) -> LabelledCells:
        return LabelledCells(self.counts[rows], self.labels.iloc[rows].reset_index(drop=True), self.genes)

    def rows(self, labels: Mapping[str, str]) -> np.ndarray:
        """Indices of the cells with these labels."""
        return np.flatnonzero(matching(self.labels, labels))

    def numbers(self) -> dict[str, int]:
        """Cells of each combination, in the order of their names."""
        keys, n = np.unique(self.keys.astype(str), return_counts=True)
        return {str(key): int(k) for key, k in zip(keys, n, strict=True)}

    def to_cells(self, name: str) -> Cells:
        """As `scldm.evaluate` knows cells: a type is a combination."""
        labels = {condition: self.labels[condition].to_numpy().astype(str) for condition in self.labels}
        return Cells(self.counts, self.keys.astype(str), self.genes, name, labels=labels)

    def to_anndata(self) -> ad.AnnData:
        obs = self.labels.astype("category").set_axis([f"cell{k}" for k in range(len(self))])
        return ad.AnnData(self.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(self.genes)))


def matching(labels: pd.DataFrame, wanted: Mapping[str, str]) -> np.ndarray:
    """Which rows have all of these labels, bool."""
    return np.logical_and.reduce([labels[name].to_numpy() == label for name, label in wanted.items()])


@dataclass(frozen=True)
class Task:
    """What every method gets. It may train on `train`, choose by `validation`, and makes cells like `test`.

    control: condition and label of untreated cells, if they are named
    """

    train: LabelledCells
    validation: LabelledCells
    test: LabelledCells
    control: tuple[str, str] | None = None

    @property
    def genes(self) -> tuple[str, ...]:
        return self.train.genes

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(self.train.labels.columns)

    @cached_property
    def references(self) -> dict[str, str]:
        """Condition -> its label of untreated cells: the one that was named, or that has a usual name for them."""
        usual = {name: guess_control(sorted(set(self.train.labels[name]))) for name in self.conditions}
        return {name: label for name, label in usual.items() if label} | dict([self.control] if self.control else [])

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Cells to make of each combination: as many as are tested."""
        return self.test.numbers()

    @cached_property
    def labels_of(self) -> dict[str, dict[str, str]]:
        """Combination -> its labels, of all that are tested."""
        distinct = self.test.labels.drop_duplicates().to_dict("records")
        return {key_of(row): {str(k): str(v) for k, v in row.items()} for row in distinct}

    @cached_property
    def unseen(self) -> tuple[str, ...]:
        """Tested combinations without a training cell."""
        return tuple(key for key in self.numbers if key not in set(self.train.keys))

    @cached_property
    def codes(self) -> dict[str, tuple[str, ...]]:
        """Condition -> its labels among the training cells; a label's place is its number."""
        return {name: tuple(sorted(set(self.train.labels[name]))) for name in self.conditions}

    def encoded(self, labels: pd.DataFrame) -> np.ndarray:
        """Numbers of the labels, int64 (rows, conditions)."""
        place = {name: {label: k for k, label in enumerate(known)} for name, known in self.codes.items()}
        return np.array([[place[name][label] for label in labels[name]] for name in self.conditions], np.int64).T.copy()

    def wanted(self) -> pd.DataFrame:
        """Labels of the cells to make, a row for each, combination after combination."""
        rows = [self.labels_of[key] for key, n in self.numbers.items() for _ in range(n)]
        return pd.DataFrame(rows, columns=pd.Index(self.conditions))


def read_task(config: QualityConfig) -> Task:
    """The file's cells in their splits, with the variable genes of the training cells.

    Cells without a count in these genes are left out: a method that divides by the total can't take them.
    Raises: InputError for what the file or the held-out combinations lack.
    """
    cells = read_cells(config)
    split = split_column(config) if config.split else stratified(cells.keys, config.split_seed)
    held_out = held_out_cells(config.held_out, cells.labels)
    split[held_out] = "test"
    if not (split == "train").any():
        raise InputError("no cell is left for training")
    columns = variable_genes(cells.counts[split == "train"], config.n_top_genes)
    cells = LabelledCells(cells.counts[:, columns], cells.labels, tuple(cells.genes[k] for k in columns))
    counted = cells.library_size > 0
    parts = [cells.select(np.flatnonzero((split == name) & counted)) for name in SPLITS]
    for name, part in zip(SPLITS, parts, strict=True):
        if not len(part):
            raise InputError(f"the {name} split holds no cells")
    task = Task(*parts, control=config.control_label() if config.control else None)
    for name, known in task.codes.items():
        for labels in (task.validation.labels, task.test.labels):
            if missing := sorted(set(labels[name]) - set(known)):
                raise InputError(f"no training cell has {name}={missing[0]}; a method can't know such a label")
    if task.control and task.control[1] not in task.codes[task.control[0]]:
        raise InputError(f"control={config.control}: no training cell has this label")
    return task


def read_cells(config: QualityConfig) -> LabelledCells:
    """All cells of the file. Raises: InputError for a file, layer or column that is not there, and for no counts."""
    if not Path(config.h5ad).is_file():
        raise InputError(f"h5ad={config.h5ad}: no such file")
    adata = ad.read_h5ad(config.h5ad)
    if config.layer and config.layer not in adata.layers:
        raise InputError(f"layer={config.layer}: the file has {', '.join(adata.layers) or 'X alone'}")
    counts = sp.csr_matrix(adata.layers[config.layer] if config.layer else adata.X, dtype=np.float32)
    wrong = counts.data[(counts.data < 0) | (counts.data != np.rint(counts.data))]
    if len(wrong):
        raise InputError(f"h5ad={config.h5ad}: {wrong[0]:g} is not a count; give raw counts, or name their layer")
    obs = pd.DataFrame(adata.obs)
    labels = pd.DataFrame({name: column(obs, name, "conditions", config.h5ad) for name in config.conditions})
    return LabelledCells(counts, labels, tuple(map(str, adata.var_names)))


def column(obs: pd.DataFrame, name: str, key: str, path: str) -> np.ndarray:
    """A column of obs as text. Raises: InputError where it is not there or has no value in some cell."""
    if name not in obs:
        raise InputError(f"{key}: obs of {path} has no column {name!r}; it has {', '.join(map(str, obs.columns))}")
    if np.asarray(obs[name].isna()).any():
        raise InputError(f"{key}: obs column {name!r} of {path} has no value in some cells; leave these cells out")
    return obs[name].astype(str).to_numpy(object)


# --- splits --------------------------------------------------------------------------------------------------------


def split_column(config: QualityConfig) -> np.ndarray:
    """The split of each cell as a column says it. Raises: InputError for another word."""
    obs = pd.DataFrame(ad.read_h5ad(config.h5ad).obs)
    split = column(obs, config.split, "split", config.h5ad)
    if unknown := sorted(set(split) - set(SPLITS)):
        raise InputError(f"split={config.split}: {unknown[0]!r} must be one of {', '.join(SPLITS)}")
    return split


def stratified(keys: np.ndarray, seed: int) -> np.ndarray:
    """60, 20 and 20 % of the cells of each combination, rounded, drawn under the seed; (cells,) object of str."""
    split = np.full(len(keys), "train", dtype=object)
    rng = np.random.default_rng(seed)
    for key in sorted(set(keys)):
        rows = rng.permutation(np.flatnonzero(keys == key))
        n_validation, n_test = (int(np.floor(share * len(rows) + 0.5)) for share in SHARES.values())
        split[rows[:n_validation]] = "validation"
        split[rows[n_validation : n_validation + n_test]] = "test"
    return split


def held_out_cells(held_out: str, labels: pd.DataFrame) -> np.ndarray:
    """Which cells have one of the combinations, bool (cells,). Raises: InputError for a combination without cells."""
    out = np.zeros(len(labels), bool)
    for text in filter(None, (part.strip() for part in held_out.split(";"))):
        wanted = labels_of_text(text, tuple(labels.columns))
        found = matching(labels, wanted)
        if not found.any():
            raise InputError(f"held_out={text}: no cell has these labels")
        out |= found
    return out


def labels_of_text(text: str, conditions: tuple[str, ...]) -> dict[str, str]:
    """`a=x,b=y, z` as {a: x, b: "y, z"}: a comma is part of a label unless a condition's name follows it.

    Raises: InputError for a text that does not begin with a condition.
    """
    wanted: dict[str, str] = {}
    for part in text.split(","):
        name, equals, label = part.partition("=")
        if equals and name.strip() in conditions:
            wanted[name.strip()] = label
        elif wanted:
            wanted[list(wanted)[-1]] += f",{part}"
        else:
            raise InputError(f"held_out={text} must be CONDITION=LABEL,..., with conditions {', '.join(conditions)}")
    return {name: label.strip() for name, label in wanted.items()}


# --- genes ---------------------------------------------------------------------------------------------------------


def variable_genes(counts: sp.csr_matrix, n_top: int) -> np.ndarray:
    """Sorted columns of the most variable genes of these cells; all where there are no more than n_top.

    Source: Stuart et al. 2019 (seurat_v3), as scanpy computes it.
    """
    assert counts.shape is not None
    if not n_top or counts.shape[1] <= n_top:
        return np.arange(counts.shape[1])
    import scanpy as sc  # takes seconds

    found = sc.pp.highly_variable_genes(ad.AnnData(counts), flavor="seurat_v3", n_top_genes=n_top, inplace=False)
    assert found is not None
    return np.flatnonzero(found["highly_variable"].to_numpy())


# --- library sizes -------------------------------------------------------------------------------------------------


def library_sizes(train: LabelledCells, labels: Mapping[str, str], n: int, rng: np.random.Generator) -> np.ndarray:
    """Totals of n training cells of the combination, drawn with replacement, float64 (n,).

    Of a combination without training cells, those of the cells that share most of its labels.
    """
    shared = np.sum([train.labels[name].to_numpy() == label for name, label in labels.items()], 0)
    rows = np.flatnonzero(shared == shared.max())
    return train.library_size[rng.choice(rows, n)].astype(np.float64)
