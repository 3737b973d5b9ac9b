"""Cells straight from a Census-shaped collection: the batches that a converted set gives, and nothing left behind."""

import gc
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

import data_pipeline
from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.direct import DirectCells
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader, LoaderConfig
from data_pipeline.write_soma import SomaWriteConfig, write_soma
from launch import cli
from scldm.errors import InputError
from tests.data_pipeline.atlases import ShardsWriteConfig, atlas


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    folder = tmp_path_factory.mktemp("census")
    adata = atlas(n_cells=300, n_genes=200)
    adata.write_h5ad(folder / "cells.h5ad")
    write_soma(SomaWriteConfig(str(folder / "cells.h5ad"), str(folder / "soma")))
    return adata, SourceConfig(paths=(str(folder / "soma"),), obs_filter="cell_type in ['B', 'T']")


@pytest.mark.slow
def test_a_query_streams_as_its_converted_set_does(census, tmp_path, capsys):
    adata, source = census
    query = {"source": source, "conditions": ("cell_type",), "seed": 3}
    write_shards(ShardsWriteConfig(out=str(tmp_path / "set"), **query))
    before = sorted(os.listdir(tmp_path))
    direct = DirectCells(**query, folder=str(tmp_path))
    config = LoaderConfig(given=GeneSetConfig("random", 50, gene_set_group=8), lanes=4)
    both = (direct, ShardSet(str(tmp_path / "set")))
    loaders = [CellLoader(config, cells=c, global_batch=16, micro_batch=8) for c in both]
    counts = adata.X.toarray()
    seen = []
    for _ in range(loaders[0].steps_per_epoch):
        for a, b in zip(*map(next, loaders)):
            a, b = a.to("cpu"), b.to("cpu")
            assert a.given.counts_BS.equal(b.given.counts_BS)
            rows = a.cell_ids_B2[:, 1].numpy()
            np.testing.assert_array_equal(a.given.counts_BS, counts[rows][:, a.given.gene_ids.numpy() - 1])
            seen += rows[a.weight_B.numpy() > 0].tolist()
    assert len(seen) == len(set(seen)) == loaders[0].n_cells
    assert set(adata.obs["cell_type"].iloc[seen]) == {"B", "T"}
    for loader, c in zip(loaders, both):
        loader.close()
        c.close()
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.slow
def test_the_readme_trains_on_a_query_and_leaves_nothing_of_it(census, tmp_path, monkeypatch):
    """Its very text, with a training of two steps."""
    text = (Path(data_pipeline.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"<!-- a test trains on this text -->\n```python\n(.*?)```", text, re.S)
    small = ["hardware.engine=plain", "data.given.n_genes=50", "train.steps=2", "tracking.enabled=false"]
    train = cli.main
    monkeypatch.setattr(cli, "main", lambda words: train([*words, *small]))
    (tmp_path / "cells-soma").symlink_to(census[1].paths[0])
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for _ in range(2):  # the second time it resumes, which asks whether the cells are the same
        with pytest.raises(SystemExit) as ended:
            exec(code, {})
        assert ended.value.code == 0
        assert not list((tmp_path / "temporary").glob("scldm-direct-*"))
    assert json.loads((tmp_path / "runs/vae/conditions.json").read_text()) == {"cell_type": ["B", "T"]}
    assert json.loads((tmp_path / "runs/vae/outcome.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_cells_that_no_loader_came_to_hold_leave_nothing(census, tmp_path):
    direct = DirectCells(source=census[1], folder=str(tmp_path))
    assert os.listdir(tmp_path)
    del direct  # never closed
    gc.collect()
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_query_too_large_for_this_is_sent_to_be_converted(census, tmp_path):
    _, source = census
    with pytest.raises(InputError, match="more than limit_gb=1e-06. Convert it once with scldm shards write"):
        DirectCells(source=source, folder=str(tmp_path), limit_gb=1e-6)
    with pytest.raises(InputError, match="tissue"):
        DirectCells(source=source, conditions=("tissue",), folder=str(tmp_path))
    assert not os.listdir(tmp_path)
