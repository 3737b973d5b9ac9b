"""Every preset of configs/data, on a stand-in with the columns, labels and storage of its data set."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import anndata
import numpy as np
import pandas as pd
import pytest

from data_pipeline.convert.config import ShardsWriteConfig
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.write_soma import SomaWriteConfig, write_soma
from launch.config import compose, shipped
from scldm.errors import InputError
from tests.data_pipeline.atlases import counts, read_set

TESTED = {"dentate_gyrus", "tabula_muris", "hlca", "parse_1m", "replogle", "census"}


def stand_in(
    columns: Mapping[str, Sequence[str | bool]], n_cells: int, n_genes: int = 200, prefix: str = "GENE"
) -> anndata.AnnData:
    """Every combination of the labels at least once, as far as the cells reach."""
    rng = np.random.default_rng(0)
    combinations = list(itertools.product(*columns.values()))
    chosen = [combinations[k % len(combinations)] for k in range(n_cells)]
    obs = pd.DataFrame(chosen, columns=pd.Index(columns), index=pd.Index([f"c{k}" for k in range(n_cells)]))
    obs = obs.iloc[rng.permutation(n_cells)]
    var = pd.DataFrame(index=pd.Index([f"{prefix}{k:011d}" for k in range(n_genes)]))
    return anndata.AnnData(counts(n_cells, n_genes), obs, var)


def labels(name: str, n: int) -> list[str]:
    return [f"{name} {k}" for k in range(n)]


def command(tmp_path, preset: str, *words: str):
    return compose(
        ShardsWriteConfig, [f"data/{preset}", f"out={tmp_path / 'set'}", "block_cells=64", "shard_cells=256", *words]
    )


def test_every_preset_is_tested():
    assert {p.stem for p in (shipped("configs") / "data").glob("*.yaml")} == TESTED


@pytest.mark.parametrize("preset, column, n", [("dentate_gyrus", "clusters", 14), ("tabula_muris", "tissue", 16)])
def test_one_condition(tmp_path, preset, column, n):
    stand_in({column: labels("label", n)}, 20 * n).write_h5ad(tmp_path / "a.h5ad")
    manifest = write_shards(command(tmp_path, preset, f"source.paths={tmp_path / 'a.h5ad'}"))
    assert manifest is not None
    assert manifest.conditions.n_labels(column) == n
    assert [s.n_cells for s in manifest.splits] == [16 * n, 2 * n, 2 * n]
    assert [n_of for (n_of, *_) in manifest.statistics.combinations.n] == [16] * n


def test_hlca(tmp_path):
    adata = stand_in({"cell_type": labels("type", 50)}, 500, prefix="ENSG")
    adata.raw = adata.copy()
    adata.X = np.log1p(counts(*adata.shape).toarray())
    adata.write_h5ad(tmp_path / "a.h5ad")
    manifest = write_shards(command(tmp_path, "hlca", f"source.paths={tmp_path / 'a.h5ad'}"))
    assert manifest is not None
    assert (manifest.sources[0]["layer"], manifest.genes.namespace) == ("raw/X", "ensembl")


@pytest.mark.heavy
def test_parse_holds_out_its_combinations(tmp_path):
    """18 cell types x 91 cytokines, two donors; CD4 Naive with 27 cytokines is in the test split alone, all of it."""
    types, cytokines = ["CD4 Naive", *labels("type", 17)], labels("cytokine", 91)
    adata = stand_in({"donor": ["Donor1", "Donor2"], "cell_type": types, "cytokine": cytokines}, 2 * 18 * 91, 2100)
    adata.write_h5ad(tmp_path / "a.h5ad")
    words = (f"source.paths={tmp_path / 'a.h5ad'}",)
    with pytest.raises(InputError, match=r"split.held_out: parse_1m_held_out.csv: no such file"):
        write_shards(command(tmp_path, "parse_1m", *words))
    held_out = pd.DataFrame({"cell_type": "CD4 Naive", "cytokine": cytokines[:27]})
    held_out.to_csv(tmp_path / "held_out.csv", index=False)
    manifest = write_shards(command(tmp_path, "parse_1m", *words, f"split.held_out={tmp_path / 'held_out.csv'}"))
    assert manifest is not None
    assert (manifest.genes.n_genes, manifest.n_cells) == (2000, 18 * 91)
    assert [manifest.conditions.n_labels(c) for c in ("cell_type", "cytokine")] == [18, 91]
    cells = read_set(str(tmp_path / "set"))[1].values()
    wanted = set(zip(held_out["cell_type"], held_out["cytokine"]))
    for cell in cells:
        combination = cell["labels"]["cell_type"], cell["labels"]["cytokine"]
        assert (cell["split"] == "test") == (combination in wanted)


@pytest.mark.heavy
def test_replogle_joins_its_files(tmp_path):
    """A file per cell line, with genes of their own; hepg2 with some genes is held out."""
    genes = labels("gene", 60)
    for k, line in enumerate(["hepg2", "jurkat", "k562", "rpe1"]):
        adata = stand_in({"cell_line": [line], "gene": genes}, 120, 2200)
        adata.var_names = [f"GENE{k * 20 + g}" for g in range(2200)]
        adata.write_h5ad(tmp_path / f"replogle_{line}.h5ad")
    pd.DataFrame({"cell_line": "hepg2", "gene": genes[:11]}).to_csv(tmp_path / "held_out.csv", index=False)
    words = (f"source.paths={tmp_path}/replogle_*.h5ad", f"split.held_out={tmp_path / 'held_out.csv'}")
    manifest = write_shards(command(tmp_path, "replogle", *words))
    assert manifest is not None
    assert manifest.genes.n_genes == 2000
    assert manifest.splits[2].n_cells == 22
    assert len(manifest.sources) == 4


@pytest.mark.heavy
@pytest.mark.parametrize("organism", ["homo_sapiens", "mus_musculus"])
def test_census(tmp_path, organism):
    """Cells that are primary data, whole data sets to one split, genes that some cell expresses."""
    adata = stand_in({"dataset_id": labels("set", 20), "is_primary_data": [True, False]}, 400, prefix="ENSG")
    adata.obs["is_primary_data"] = adata.obs["is_primary_data"].astype(bool)
    x = counts(*adata.shape).toarray()
    x[:, 50:60] = 0
    adata.X = x
    adata.write_h5ad(tmp_path / "a.h5ad")
    write_soma(SomaWriteConfig(h5ad=str(tmp_path / "a.h5ad"), out=str(tmp_path / "census"), organism=organism))
    words = (f"source.paths={tmp_path / 'census'}", f"source.organism={organism}")
    manifest = write_shards(command(tmp_path, "census", *words))
    assert manifest is not None
    assert (manifest.n_cells, manifest.genes.n_genes) == (200, 190)
    cells = read_set(str(tmp_path / "set"))[1]
    splits = {}
    for (_, joinid), cell in cells.items():
        assert adata.obs["is_primary_data"].iloc[joinid]
        splits.setdefault(adata.obs["dataset_id"].iloc[joinid], set()).add(cell["split"])
    assert all(len(s) == 1 for s in splits.values())
    assert sorted(next(iter(s)) for s in splits.values()).count("test") == 1
    with pytest.raises(InputError, match=r"source.organism='danio_rerio' is not in the Census. It has"):
        write_shards(command(tmp_path / "other", "census", words[0], "source.organism=danio_rerio"))
