"""What several files of tests read; a file that changes it has its own."""

from __future__ import annotations

from pathlib import Path

import anndata
import pytest

from tests.data_pipeline.atlases import atlas
from tests.data_pipeline.small_sets import Known, known_cells, write_set


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[anndata.AnnData, Path]:
    """A small atlas, and the h5ad file that holds it."""
    adata = atlas()
    path = tmp_path_factory.mktemp("source") / "atlas.h5ad"
    adata.write_h5ad(path)
    return adata, path


@pytest.fixture(scope="module")
def cells() -> Known:
    return known_cells()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cells: Known) -> str:
    """53 training blocks of 8 cells: more than 8 lanes of 2 hold, so that the order is that of a large set."""
    return str(write_set(tmp_path_factory.mktemp("shards") / "set", cells, block_cells=8))
