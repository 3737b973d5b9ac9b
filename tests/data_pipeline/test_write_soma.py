"""The SOMA collection is the Census's layout, exact, whole or not there."""

from __future__ import annotations

from typing import Any

import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.narrow import Rows
from data_pipeline.convert.open import open_sources
from data_pipeline.convert.source_soma import census_release
from data_pipeline.write_soma import SomaWriteConfig, write_census, write_soma
from launch.cli import main
from scldm.errors import InputError
from tests.data_pipeline.atlases import atlas, counts


@pytest.mark.heavy
def test_it_opens_as_a_census_does(tmp_path):
    """The query of a Census's user answers with the source's counts, obs and gene ids; mixed columns don't hinder."""
    adata = atlas(150, 80)
    adata.obs["note"] = ["x" if k % 2 else str(k) for k in range(150)]
    adata.layers["counts"] = adata.X
    adata.X = counts(150, 80) * np.float32(0.5)
    adata.write_h5ad(tmp_path / "a.h5ad")
    words = [f"h5ad={tmp_path / 'a.h5ad'}", f"out={tmp_path / 'soma'}", "organism=mus_musculus"]
    assert main(["soma", "write", *words]) == 0
    with cellxgene_census.open_soma(uri=str(tmp_path / "soma")) as census:
        got = cellxgene_census.get_anndata(
            census, "Mus musculus", obs_value_filter="cell_type == 'NK' and is_primary_data == True"
        )
        assert "total_cell_count" in census["census_info"]["summary"].read().concat().to_pandas()["label"].tolist()
    wanted = adata[adata.obs["cell_type"] == "NK"]
    np.testing.assert_array_equal(sp.csr_matrix(got.X).toarray(), sp.csr_matrix(wanted.layers["counts"]).toarray())
    assert got.var["feature_id"].tolist() == adata.var_names.tolist()
    assert got.obs["note"].tolist() == wanted.obs["note"].tolist()
    with pytest.raises(InputError, match="exists. A SOMA collection is written to a new folder"):
        write_soma(SomaWriteConfig(h5ad=str(tmp_path / "a.h5ad"), out=str(tmp_path / "soma")))


@pytest.mark.parametrize(
    "value, fault", [(-1, "negative"), (0.5, "fractional"), (np.nan, "not a number"), (2**24 + 2, "float32")]
)
def test_nothing_is_left_of_a_failure(tmp_path, value, fault):
    obs, var = (
        pd.DataFrame(index=pd.Index([f"{name}{k}" for k in range(n)])) for name, n in (("cell", 20), ("GENE", 10))
    )
    x = sp.csr_matrix(counts(20, 10), dtype=np.float64)
    x.data[x.indptr[5]] = value
    rows = Rows(np.arange(20), x.indptr.astype(np.int64), x.indices, x.data)
    with pytest.raises(InputError, match=rf"cell cell5, gene GENE0: .* is no count \(.*{fault}"):
        write_census(str(tmp_path / "soma"), obs, var, [rows], "homo_sapiens")
    assert list(tmp_path.iterdir()) == []


def test_a_census_version_that_there_is_not(monkeypatch):
    """What cellxgene_census says of an unknown version, as one line that names the key."""

    def open_soma(**kwargs):
        raise ValueError('The "2099-01-01" Census version is not valid.\nUse get_census_version_directory()')

    monkeypatch.setattr(cellxgene_census, "open_soma", open_soma)
    with pytest.raises(InputError, match=r"source.census_version='2099-01-01' can't be opened: The .* is not valid.$"):
        open_sources(SourceConfig(census_version="2099-01-01"), (), "")


def test_a_census_by_alias_is_written_down_by_its_date(monkeypatch):
    """`stable` is another release next year; the manifest must say which it was."""

    def described(version):
        if version != "stable":
            raise ValueError(f"Unable to locate Census version: {version}.")
        return {"release_build": "2025-01-30"}

    monkeypatch.setattr(cellxgene_census, "get_census_version_description", described)
    assert census_release("stable") == census_release("2025-01-30") == "2025-01-30"
    with pytest.raises(InputError, match=r"source.census_version='stabel' can't be looked up: Unable to locate"):
        census_release("stabel")


def test_a_path_from_here_is_found(tmp_path, monkeypatch):
    atlas(20, 10).write_h5ad(tmp_path / "a.h5ad")
    write_soma(SomaWriteConfig(h5ad=str(tmp_path / "a.h5ad"), out=str(tmp_path / "soma")))
    monkeypatch.chdir(tmp_path)
    assert len(open_sources(SourceConfig(paths=("./soma",)), (), "")[0].rows) == 20


@pytest.mark.heavy
def test_layers_and_columns_that_there_are_not(tmp_path):
    atlas(20, 10).write_h5ad(tmp_path / "a.h5ad")
    write_soma(SomaWriteConfig(h5ad=str(tmp_path / "a.h5ad"), out=str(tmp_path / "soma")))
    refused: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        ({"layer": "normalized"}, (), r"source.layer='normalized' is not in X of RNA. It has raw"),
        ({"measurement": "ATAC"}, (), r"source.measurement='ATAC' is not there. It has RNA"),
        (
            {"gene_column": "ensembl"},
            (),
            r"var has no column 'ensembl'. Give as source.gene_col.*feature_id",
        ),
        ({}, ("tissue",), r"obs has no column 'tissue'. It has .*cell_type"),
        ({"obs_filter": "tissue == 'x'"}, (), r"source.obs_filter=\"tissue == 'x'\" can't be applied"),
        ({"obs_filter": "donor == 'x'"}, (), r"source.obs_filter=\"donor == 'x'\" selects no cell"),
        ({"kind": "soma"}, (), r"a Collection, not a SOMA experiment"),
    ]
    for settings, columns, message in refused:
        with pytest.raises(InputError, match=message):
            open_sources(SourceConfig(paths=(str(tmp_path / "soma"),), **settings), columns, "")
    with pytest.raises(InputError, match=r"neither a SOMA experiment nor a Census"):
        open_sources(SourceConfig(paths=(str(tmp_path / "soma/census_info"),)), (), "")
