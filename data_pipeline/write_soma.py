"""Counts as a SOMA collection laid out as the Census: what cellxgene_census.open_soma(uri=...) opens.

    census_info/summary                           label, value
    census_data/<organism>                        an Experiment: obs
                          /ms/RNA/var             feature_id, feature_name and the columns of var
                          /ms/RNA/X/raw           the counts, float32

Reading order: SomaWriteConfig, write_soma (from an h5ad file), write_census (from chunks of rows).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma
import tiledbsoma.io

from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.narrow import FAULTS, Rows, fault_of
from data_pipeline.convert.open import open_matrix, open_sources
from scldm.cells_file import read_frame
from scldm.cells_opened import open_cells, reading
from scldm.errors import InputError
from scldm.files import check_new, disk_explained, made_aside
from scldm.progress import Progress

MEASUREMENT, LAYER = "RNA", "raw"
CHUNK_BYTES = 16 << 20
EXACT_IN_FLOAT32 = 1 << 24


@dataclass(frozen=True)
class SomaWriteConfig:
    """Write an h5ad file's counts as a SOMA collection laid out as the Census.

    h5ad: the file
    out: folder of the collection
    organism: name of its experiment
    layer: X, raw or a name in layers. Empty: the one that holds counts
    gene_column: column of var with the gene ids. Empty: its index
    """

    h5ad: str
    out: str
    organism: str = "homo_sapiens"
    layer: str = ""
    gene_column: str = ""


def write_soma(config: SomaWriteConfig) -> str:
    """Returns the name of the matrix that the counts came from. Its rows are never all in memory.

    Raises: InputError for a file without counts or with values that are none, or where `out` exists.
    """
    source = SourceConfig(kind="h5ad", paths=(config.h5ad,), layer=config.layer, gene_column=config.gene_column)
    opened = open_sources(source, (), "")[0]
    with open_cells(config.h5ad) as file, reading(config.h5ad):
        obs = read_frame(file["obs"])
        var = read_frame(file["raw/var" if opened.spec.layer == "raw/X" else "var"])
    var["feature_id"] = list(opened.genes.ids)
    with closing(open_matrix(opened.spec)) as matrix:
        write_census(config.out, obs, var, matrix.read(opened.rows, CHUNK_BYTES), config.organism)
    return opened.spec.layer


def write_census(out: str, obs: pd.DataFrame, var: pd.DataFrame, chunks: Iterable[Rows], organism: str) -> None:
    """Write cells as such a collection. Its folder appears when it is whole.

    var: a column feature_id, or its index, holds the gene ids
    chunks: rows of the counts, numbered as obs, with columns numbered as var
    Raises: InputError for a value that is no count, or where `out` exists.
    """
    check_new(out)
    obs, var = obs.copy(), var.copy()
    if "is_primary_data" not in obs:
        obs["is_primary_data"] = True  # what the Census has, and queries of it ask for
    if "feature_id" not in var:
        var["feature_id"] = list(map(str, var.index))
    if "feature_name" not in var:
        var["feature_name"] = list(map(str, var.index))
    target = Path(out)
    with disk_explained(str(target.parent)), made_aside(target, replaces=False) as draft:
        _write(str(draft), obs, var, chunks, organism)


def _write(uri: str, obs: pd.DataFrame, var: pd.DataFrame, chunks: Iterable[Rows], organism: str) -> None:
    with tiledbsoma.Collection.create(uri) as census:
        info = census.add_new_collection("census_info")
        table = pd.DataFrame(
            {
                "soma_joinid": np.arange(2),
                "label": ["census_schema_version", "total_cell_count"],
                "value": ["2.1.0", str(len(obs))],
            }
        )
        arrow = pa.Table.from_pandas(table, preserve_index=False)
        with info.add_new_dataframe("summary", schema=arrow.schema, domain=[(0, 1)]) as summary:
            summary.write(arrow)
        census.add_new_collection("census_data")
    experiment_uri = f"{uri}/census_data/{organism}"
    names = anndata.AnnData(obs=_storable(obs), var=_storable(var))
    tiledbsoma.io.from_anndata(experiment_uri, names, MEASUREMENT)
    with tiledbsoma.Collection.open(f"{uri}/census_data", "w") as data, tiledbsoma.open(experiment_uri) as written:
        data.set(organism, written, use_relative_uri=True)
    with tiledbsoma.Experiment.open(experiment_uri, "w") as experiment:
        measurement = experiment.ms[MEASUREMENT]
        layers = measurement.X if "X" in measurement else measurement.add_new_collection("X")
        shape = (len(obs), len(var))
        with (
            layers.add_new_sparse_ndarray(LAYER, type=pa.float32(), shape=shape) as array,
            Progress("soma", len(obs), "cells") as bar,
        ):
            for rows in chunks:
                _check(rows, obs, var)
                stored = rows.values != 0
                dim_0 = np.repeat(rows.rows, np.diff(rows.indptr))[stored]
                columns = {
                    "soma_dim_0": dim_0.astype(np.int64),
                    "soma_dim_1": rows.columns[stored].astype(np.int64),
                    "soma_data": rows.values[stored].astype(np.float32),
                }
                array.write(pa.table(columns))
                bar.advance(len(rows.rows))


def _check(rows: Rows, obs: pd.DataFrame, var: pd.DataFrame) -> None:
    values = rows.values
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= 0) & (values == np.floor(values)) & (values <= EXACT_IN_FLOAT32))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        cell = rows.rows[np.searchsorted(rows.indptr, at, "right") - 1]
        value = values[at].item()
        fault = FAULTS[fault_of(float(value))] or "too large for the float32 of the Census's layout"
        gene = var["feature_id"].iloc[int(rows.columns[at])]
        raise InputError(f"cell {obs.index[cell]}, gene {gene}: {value!r} is no count ({fault})")


def _storable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table as SOMA can hold it: columns of mixed objects as strings, an index with a name of its own."""
    out = frame.copy()
    for name in out.columns:
        if out[name].dtype == object:
            out[name] = out[name].astype(str)
    out.index = pd.Index(out.index.astype(str))
    return out
