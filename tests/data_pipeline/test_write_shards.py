"""Atlas to shard set: every count exact, from every storage, to any place; chosen genes are those scanpy chooses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import anndata
import fsspec
import numpy as np
import pytest
import scanpy
import scipy.sparse as sp
from webdataset.tariterators import group_by_keys, tar_file_expander

import data_pipeline
from data_pipeline.convert import write_shards
from data_pipeline.format.schema import read_manifest
from data_pipeline.write_soma import SomaWriteConfig, write_soma
from scldm.errors import InputError
from tests.data_pipeline.atlases import FilterConfig, SplitConfig, atlas, config, digest, read_set, row_counts

pytestmark = pytest.mark.heavy

write = write_shards.write_shards


def holds(cells: dict, adata: anndata.AnnData, number: int = 0) -> None:
    assert sorted(cells) == [(number, row) for row in range(adata.n_obs)]
    for (_, row), cell in cells.items():
        assert cell["counts"] == row_counts(adata, row)
        assert cell["labels"]["cell_type"] == adata.obs["cell_type"].iloc[row]


@pytest.mark.parametrize(
    "storage", ["csr", "csc", "dense", "int64", "layers/counts", "raw/X", "unsorted", "soma", "census"]
)
def test_every_count_of_every_cell(tmp_path, source, storage):
    adata, path = source
    stored = adata.copy()
    if storage == "csc":
        stored.X = sp.csc_matrix(stored.X)
    elif storage == "dense":
        stored.X = stored.X.toarray()
    elif storage == "int64":
        stored.X = stored.X.astype(np.int64)
    elif storage == "layers/counts":
        stored.layers["counts"] = stored.X.copy()
        stored.X = stored.X * 0.37
    elif storage == "raw/X":
        stored.raw = stored.copy()
        stored = stored[:, :50].copy()
        stored.X = stored.X * 0.37
    elif storage == "unsorted":
        x = stored.X
        for a, b in zip(x.indptr, x.indptr[1:]):
            x.indices[a:b], x.data[a:b] = x.indices[a:b][::-1].copy(), x.data[a:b][::-1].copy()
    if storage in ("soma", "census"):
        write_soma(SomaWriteConfig(h5ad=str(path), out=str(tmp_path / "soma")))
        path = tmp_path / "soma"
        path = path / "census_data/homo_sapiens" if storage == "soma" else path
    else:
        path = tmp_path / "stored.h5ad"
        stored.write_h5ad(path)
    manifest = write(config(tmp_path / "set", path))
    holds(read_set(str(tmp_path / "set"))[1], adata)
    assert manifest is not None
    assert manifest.sources[0]["layer"] == {"soma": "raw", "census": "raw"}.get(
        storage, storage if "/" in storage else "X"
    )
    assert manifest.statistics.largest_count == 70_000


def test_splits_statistics_and_order(tmp_path, source):
    """Against pandas, from the source alone."""
    adata, path = source
    x = adata.X.astype(np.float64)
    split = SplitConfig(validation=0.2, test=0.2, stratify=("cell_type",))
    write(config(tmp_path / "set", path, split=split, conditions=("cell_type", "batch")))
    manifest, cells, order = read_set(str(tmp_path / "set"))
    obs = adata.obs.assign(split=[cells[0, row]["split"] for row in range(adata.n_obs)])
    shares = obs.groupby("cell_type", observed=True)["split"].value_counts(normalize=True).unstack()
    np.testing.assert_allclose(shares[["train", "validation", "test"]], [[0.6, 0.2, 0.2]] * 3, atol=0.01)
    assert manifest.conditions.labels["batch"] == ("0", "1", "2")
    assert manifest.conditions.names == manifest.statistics.combinations.by == ("cell_type", "batch")  # as asked for

    total = np.asarray(x.sum(axis=1)).ravel()
    train = (obs["split"] == "train").to_numpy()
    by_type = {t.by: t for t in manifest.statistics.library_sizes}
    assert set(by_type) == {("cell_type", "batch"), ("cell_type",), ("batch",), ()}
    for k, label in enumerate(manifest.conditions.labels["cell_type"]):
        logs = np.log(total[train & (obs["cell_type"] == label).to_numpy()])
        table = by_type[("cell_type",)]
        assert table.ids[k] == (k,)
        assert table.n[k] == len(logs)
        np.testing.assert_allclose((table.log_mean[k], table.log_std[k]), (logs.mean(), logs.std()), rtol=1e-9)
    mean = np.load(tmp_path / "set/index/genes.mean.npy")
    np.testing.assert_allclose(mean, np.asarray(x[train].mean(axis=0)).ravel(), rtol=1e-6)
    fraction = np.load(tmp_path / "set/index/genes.fraction_expressed.npy")
    np.testing.assert_allclose(fraction, np.asarray((x[train] > 0).mean(axis=0)).ravel(), rtol=1e-6)
    stored = np.load(tmp_path / "set/index/cells.total_counts.npy")
    np.testing.assert_array_equal(stored, total[[row for _, row in order]])
    # shuffled as a whole: neighbours in the set are no neighbours in the source
    rows = np.array([row for _, row in order[: manifest.splits[0].n_cells]])
    assert abs(np.corrcoef(np.arange(len(rows)), rows)[0, 1]) < 0.15


def test_the_reader_in_the_readme(tmp_path, source):
    """The very text of the README reads the set; and webdataset reads the bytes that the index points at."""
    adata, path = source
    write(config(tmp_path / "set", path))
    text = (Path(data_pipeline.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"<!-- a test runs this text -->\n```python\n(.*?)```", text, re.S)
    scope: dict = {}
    exec(code, scope)
    read = 0
    for split in ("train", "validation", "test"):
        for _, row, columns, values in scope["cells"](str(tmp_path / "set"), split):
            assert dict(zip(adata.var_names[columns], values.tolist())) == row_counts(adata, int(row))
            read += 1
    assert read == adata.n_obs
    assert len(code.splitlines()) <= 30
    shard = tmp_path / "set/shards/train-000000.tar"
    with shard.open("rb") as tar:  # WebDataset(...) would leave it open
        samples = list(group_by_keys(tar_file_expander([{"url": "train", "stream": tar}])))
    assert [s["__key__"] for s in samples] == ["00000000", "00000001", "00000002", "00000003"]
    whole, blocks = shard.read_bytes(), np.load(tmp_path / "set/index/blocks.npy")
    for sample, record in zip(samples, blocks):
        start = int(record["offset"])
        assert sample["block"] == whole[start : start + int(record["length"])]


def test_chosen_genes_are_scanpys(tmp_path):
    """Cells with enough genes, genes in enough cells, of those the most variable ones in training cells; single cells
    with thousands of a gene make clipping decide."""
    rng = np.random.default_rng(0)
    x = rng.negative_binomial(2, 1 / (1 + rng.lognormal(-1, 1.5, 400)), (500, 400)).astype(np.float32)
    x[:40, 100:] = 0  # cells with few genes; some genes live in them alone
    x[40:, :20] = 0
    x[rng.choice(np.arange(40, 500), 60), rng.choice(np.arange(20, 400), 60)] = 3000
    x[:, 20] = 1
    adata = atlas(500, 400)
    adata.X = sp.csr_matrix(x)
    adata.write_h5ad(tmp_path / "a.h5ad")
    chosen = FilterConfig(min_genes=90, min_cells=10, n_top_genes=80)
    manifest = write(config(tmp_path / "set", tmp_path / "a.h5ad", filter=chosen))
    scanpy.pp.filter_cells(adata, min_genes=90)
    scanpy.pp.filter_genes(adata, min_cells=10)
    assert manifest is not None
    cells = read_set(str(tmp_path / "set"))[1]
    in_train = [f"cell{row}" for (_, row), cell in cells.items() if cell["split"] == "train"]
    trained = adata[np.isin(adata.obs_names, in_train)].copy()
    assert 0.5 < trained.n_obs / adata.n_obs < 0.95
    found = scanpy.pp.highly_variable_genes(trained, flavor="seurat_v3", n_top_genes=80, inplace=False)
    everywhere = scanpy.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=80, inplace=False)
    assert (found["highly_variable"].to_numpy() != everywhere["highly_variable"].to_numpy()).any()
    top = adata[:, found["highly_variable"].to_numpy()]
    assert 300 < manifest.n_cells == adata.n_obs < 500
    assert list(manifest.genes.ids) == list(top.var_names)
    assert manifest.report["genes"]["filter.min_cells"] == 400 - adata.n_vars > 0
    assert cells[0, 45]["counts"] == row_counts(top, list(adata.obs_names).index("cell45"))


def test_to_a_url(tmp_path, source):
    """The same bytes through fsspec; unfinished work stays here."""
    _, path = source
    write(config(tmp_path / "here", path))
    with pytest.raises(InputError, match="work must name a local folder"):
        write(replace(config(tmp_path, path), out="memory://bucket/set"))
    write(replace(config(tmp_path, path), out="memory://bucket/set", work=str(tmp_path / "work")))
    fs = fsspec.filesystem("memory")
    there = {name.removeprefix("/bucket/set/"): fs.cat(name) for name in fs.find("/bucket/set")}
    assert there == {p: (tmp_path / "here" / p).read_bytes() for p in digest(tmp_path / "here")}
    assert read_manifest("memory://bucket/set").n_cells == 600
    assert not list((tmp_path / "work").iterdir())
