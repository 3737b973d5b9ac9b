"""`scldm.fit`: an AnnData in, a model out, as a scientist would call it, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scldm
from scldm import cells_to_fit, count_matrix, fitting
from scldm.cells_to_fit import digest_of
from scldm.errors import InputError
from scldm.pretrained import Pretrained

N, G = 150, 40
FEW: dict[str, Any] = {"train": {"steps": 6, "validate_every": 3, "save_every": 3, "log_every": 3}}
FEW["train"]["global_batch"] = 20
SPLIT = {"split.validation": 0.2, "split.test": 0.3}
FAST = scldm.SamplerConfig("euler", 2)


def cells() -> ad.AnnData:
    """Three types, two treatments; counts in layers["counts"] alone, X is normalised."""
    rng = np.random.default_rng(0)
    kind, stim = rng.integers(0, 3, N), rng.integers(0, 2, N)
    rates = np.exp(rng.normal(1, 1, (3, G)))[kind] * np.exp(stim[:, None] * rng.normal(0, 0.7, G))
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    obs = {"cell_type": pd.Categorical(np.array(["T", "B", "NK"])[kind]), "treatment": np.array(["ctrl", "stim"])[stim]}
    var = pd.DataFrame({"symbol": [f"S{k}" for k in range(G)], "mean": 1.0}, index=[f"ENSG{k:011d}" for k in range(G)])
    adata = ad.AnnData(counts.log1p(), obs=pd.DataFrame(obs, index=[f"cell {k}" for k in range(N)]), var=var)
    adata.layers["counts"] = counts
    adata.obsm["X_pca"] = rng.normal(size=(N, 3))
    return adata


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretrained, ad.AnnData, Path]:
    """A model, its cells, and the folder that keeps all."""
    adata, folder = cells(), tmp_path_factory.mktemp("fit") / "kept"
    return scldm.fit(adata, ["cell_type", "treatment"], shards=SPLIT, vae=FEW, ldm=FEW, folder=folder), adata, folder


@pytest.mark.slow
def test_a_model_of_the_cells(fitted: tuple[Pretrained, ad.AnnData, Path]) -> None:
    model, adata, folder = fitted
    assert set(model.genes.ids) == set(adata.var_names)
    assert model.conditions.labels == {"cell_type": ("B", "NK", "T"), "treatment": ("ctrl", "stim")}
    splits = adata.obs["scldm_split"].value_counts().to_dict()
    assert splits["train"] > 60
    assert splits["validation"] > 8 < splits["test"]
    assert sum(splits.values()) == N
    assert list(model.gene_columns) == ["symbol"]  # no column of numbers
    for stage in ("vae", "ldm"):
        assert set(model.history[stage]["split"]) >= {"train", "validation"}
        assert model.history[stage]["step"].max() == 6
    made = model.generate({"cell_type": "T", "treatment": "stim"}, n=5, sampler=FAST)
    assert made.shape == (5, G)
    assert list(made.var["symbol"]) == [f"S{int(gene[4:])}" for gene in made.var_names]
    assert (folder / "model" / "config.json").is_file()


@pytest.mark.slow
def test_the_split_is_that_of_the_shards(fitted: tuple[Pretrained, ad.AnnData, Path]) -> None:
    """By the cells' own counts, which tell them apart."""
    from launch.evaluation.cells import cells_of_shards

    _, adata, folder = fitted
    for name, found in zip(("train", "validation", "test"), cells_of_shards(str(folder / "shards"), [])):
        own = adata[adata.obs["scldm_split"] == name, list(found.genes)].layers["counts"].toarray()
        assert sorted(map(tuple, own)) == sorted(map(tuple, found.counts.toarray()))


@pytest.mark.slow
def test_saved_it_is_the_same_model(fitted: tuple[Pretrained, ad.AnnData, Path], tmp_path: Path) -> None:
    model, _, _ = fitted
    model.save(tmp_path / "saved")
    again = scldm.load(tmp_path / "saved")
    assert again.hash == model.hash
    assert again.gene_columns.equals(model.gene_columns)
    assert {k: list(v) for k, v in again.history.items()} == {k: list(v) for k, v in model.history.items()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(InputError, match="folder=.*other is not empty and not a model folder"):
        model.save(tmp_path / "other")


@pytest.mark.slow
def test_cells_that_stay_in_a_file_train_the_same_model(
    fitted: tuple[Pretrained, ad.AnnData, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """anndata's backed="r", with labels of its own in memory."""
    model, adata, _ = fitted
    whole = cells()
    whole.obs["treatment"] = "none"
    whole.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    backed.obs["treatment"] = cells().obs["treatment"]
    found = scldm.fit(backed, ["cell_type", "treatment"], shards=SPLIT, vae=FEW, ldm=FEW)
    assert found.hash == model.hash
    said = capsys.readouterr().err
    assert said.count("no better than") == said.count("scldm.fit: WARNING: the autoencoder is no better than") == 1
    assert "/vae" not in said.replace("vae/tiny", "")  # a folder that is gone
    assert list(backed.obs["scldm_split"]) == list(adata.obs["scldm_split"])
    backed.file.close()


def test_the_cells_are_the_same_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_to_fit, "FILE_ROWS", 7)
    monkeypatch.setattr(count_matrix, "FILE_ROWS", 7)
    adata = cells()
    adata.X = None  # counts in a layer alone
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    dense = adata.copy()
    dense.layers["counts"] = dense.layers["counts"].toarray()
    of_all = [digest_of(of, "", (adata.obs, adata.var)) for of in (adata, backed, dense)]
    assert of_all == of_all[:1] * 3
    adata.layers["counts"][3, 0] += 1
    assert digest_of(adata, "", (adata.obs, adata.var)) != of_all[0]
    with pytest.raises(InputError, match=r"adata is a view of a file, .* Give adata.to_memory\(\)"):
        scldm.fit(backed[:20], ["cell_type"])
    backed.file.close()


@pytest.mark.slow
def test_the_same_call_goes_on_and_another_is_refused(
    fitted: tuple[Pretrained, ad.AnnData, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adata, folder = fitted
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = scldm.fit(adata, ["cell_type", "treatment"], shards=SPLIT, vae=FEW, ldm=FEW, folder=folder)
    assert again.hash == model.hash
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match="holds another fit: seed was 0, now 1. Choose another folder"):
        scldm.fit(adata, ["cell_type", "treatment"], shards=SPLIT, vae=FEW, ldm=FEW, folder=folder, seed=1)
    more = adata.copy()
    more.obs["leiden"] = "0"  # what is not asked for may change
    scldm.fit(more, ["cell_type", "treatment"], shards=SPLIT, vae=FEW, ldm=FEW, folder=folder)
    counts, label = cells(), cells()
    counts.layers["counts"][0, 0] += 1
    label.obs["treatment"] = np.where(np.arange(N) == 7, "ctrl", label.obs["treatment"])
    for other in (counts, label):
        with pytest.raises(InputError, match="holds another fit: cells was"):
            scldm.fit(other, ["cell_type", "treatment"], shards=SPLIT, vae=FEW, ldm=FEW, folder=folder)


@pytest.mark.slow
def test_it_starts_from_a_model_and_leaves_nothing(
    fitted: tuple[Pretrained, ad.AnnData, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On fewer genes, from a file, whose labels differ."""
    model, adata, _ = fitted
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    some = ad.AnnData(adata.layers["counts"][:, :20], obs=adata.obs[["treatment"]], var=adata.var.iloc[:20])
    some.write_h5ad(tmp_path / "some.h5ad")
    found = scldm.fit(tmp_path / "some.h5ad", ["treatment"], vae=FEW | {"optim.lr": 1e-9}, ldm=FEW, start_from=model)
    assert os.listdir(tmp_path / "temporary") == []
    assert "genes: 20 known" in capsys.readouterr().err
    assert found.genes.n_genes == 20
    assert list(found.gene_columns) == ["symbol"]
    own, before = found.vae.gene_embedding.weight, model.vae.gene_embedding.weight
    at = [model.genes.index_of[gene] for gene in found.genes.ids]
    assert torch.allclose(own[1:], before[at], atol=1e-3)  # the averaged weights at a learning rate of nothing


@pytest.mark.slow
def test_generated_cells_are_judged(fitted: tuple[Pretrained, ad.AnnData, Path], tmp_path: Path) -> None:
    model, adata, _ = fitted
    real = adata.copy()
    # principal components of the judged cells, as there are too few for those of validation cells
    made = model.generate(real, sampler=FAST)
    found = model.evaluate(made, real, layer="counts", protocol="cfgen", control={"treatment": "ctrl"})
    pooled = found.tables["pooled"]
    assert {"generated", "floor"} < set(pooled.columns)
    assert "shuffled" in " ".join(map(str, pooled.columns))
    assert np.isfinite(pooled["generated"].astype(float)).all()
    assert "loss_curves" in found.figures
    assert found.figure("scores").axes
    assert (found.save(tmp_path).stat().st_size, "<table" in found._repr_html_()) > (10_000, True)
    assert found.verdict in repr(found)
    assert "genes matched (100 %)" in repr(found)
    assert (found.numbers["made_with"]["model"], found.numbers["config"]["seed"]) == (model.hash, 0)
    with pytest.raises(InputError, match="figure 'score' is not there. There are scores"):
        found.figure("score")
    with pytest.raises(InputError, match="real: obs has no column split='fold'"):
        model.evaluate(made, real, split="fold", layer="counts")


@pytest.mark.slow
def test_a_column_of_numbers_is_asked_for_as_it_is_written_anywhere() -> None:
    """obs holds 10.0, the model's label is 10."""
    adata = cells()
    adata.obs["day"] = np.where(adata.obs["treatment"] == "stim", 10.0, 1.0)
    model = scldm.fit(adata, ["day"], shards=SPLIT, vae=FEW, ldm=FEW)
    assert model.conditions.labels == {"day": ("1", "10")}
    made = [model.generate({"day": day}, n=3, sampler=FAST) for day in ("10", "10.0", 10, 10.0)]
    for one in made[1:]:
        assert list(one.obs["day"]) == list(made[0].obs["day"]) == ["10"] * 3
        assert (one.X != made[0].X).nnz == 0
    like = model.generate(adata, sampler=FAST)
    found = model.evaluate(like, adata, protocol="cfgen", control={"day": "1.0"})
    assert "response to day" in found.tables
    moved = [model.transform(adata, {"day": day}, sampler=FAST) for day in ("10", "10.0", 10.0)]
    assert all((one.X != moved[0].X).nnz == 0 for one in moved)
    with pytest.raises(InputError, match=r"condition 'day' has no label '10.5'. It has '1', '10'"):
        model.generate({"day": "10.5"}, n=3)


# --- what is refused, before anything is trained ---


@pytest.mark.parametrize(
    "given, said",
    [
        ({"conditions": "cell_type"}, r"conditions='cell_type' must be a list of obs columns, as conditions=\['cell"),
        ({"conditions": ["celltype"]}, "adata.obs has no column 'celltype'. It has cell_type, treatment"),
        ({"conditions": [1]}, "conditions: 1 is of type int. obs columns are text"),
        ({"adata": np.zeros((3, 2))}, "adata is of type ndarray. It must be an AnnData, or the path of an h5ad file"),
        ({"adata": "nowhere.h5ad"}, "nowhere.h5ad: no such file"),
        ({"vae": "train.steps=9"}, "vae='train.steps=9' must be a preset, as vae/tiny, or a mapping"),
        ({"vae": 9}, "vae=9 must be a preset, a mapping of keys, or a list of both"),
        ({"vae": {"train.stepps": 9}}, "train.stepps.*Did you mean train.steps"),
        ({"ldm": {"run_dir": "x"}}, "ldm: run_dir is set by fit itself: give the argument folder"),
        ({"ldm": {"tracking.uri": "x"}}, "ldm: tracking.uri is set by fit itself: leave it out"),
        ({"shards": "split.test=0.2"}, "shards='split.test=0.2' must be a preset"),
        ({"shards": {"split.test": 1.5}}, "split.test=1.5"),
        ({"layer": "raw_counts"}, "adata: layer='raw_counts' is not in the file. It has X, layers/counts"),
        ({"seed": -1}, "seed=-1 must be a whole number, at least 0"),
        ({"seed": "a"}, "seed='a' must be a whole number"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"layer": ["counts"]}, r"layer=\['counts'\] must be one text"),
        ({"folder": __file__}, "folder=.*test_fitting.py is a file. Name a folder"),
        ({"start_from": 3}, "start_from=3 must be the path of a folder"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"adata": cells(), "conditions": ["cell_type"], **given}
    for verb in () if "layer" in given else ("shards_write", "train_vae"):  # the layer is found by shards write
        monkeypatch.setattr(f"launch.{verb}.main", lambda config: pytest.fail("it began"))
    with pytest.raises(InputError, match=said):
        scldm.fit(**wrong)


def test_no_layer_holds_counts() -> None:
    adata = cells()
    del adata.layers["counts"]
    with pytest.raises(InputError, match="^adata: no counts in X.*Choose another with layer=NAME"):
        scldm.fit(adata, ["cell_type"])


@pytest.mark.slow
def test_missing_values_can_be_asked_for_as_they_were_trained(tmp_path: Path) -> None:
    adata = cells()
    adata.obs["treatment"] = adata.obs["treatment"].astype("category")
    adata.obs.loc[adata.obs_names[::3], "treatment"] = np.nan
    with_missing: dict[str, Any] = {"shards": {**SPLIT, "missing": "unknown"}}
    model = scldm.fit(adata, ["treatment"], vae=FEW, ldm=FEW, **with_missing)
    assert model.conditions.labels == {"treatment": ("ctrl", "stim", "unknown")}
    model.save(tmp_path / "model")
    model = scldm.load(tmp_path / "model")
    made = model.generate(adata, sampler=FAST)
    was = adata.obs["treatment"].astype(object).fillna("unknown")
    assert list(made.obs["treatment"]) == list(was)
    moved = model.transform(adata, {"treatment": "stim"}, sampler=FAST)
    assert set(moved.obs["treatment"]) == {"stim"}
    said = model.evaluate(made, adata).verdict
    n_test = (adata.obs["scldm_split"] == "test").sum()
    assert f"The scores are of {n_test} generated cells and as many test cells. " in said
    assert "of 3 combinations of treatment" in said


def test_a_label_is_missing() -> None:
    adata = cells()
    adata.obs.loc["cell 3", "cell_type"] = np.nan
    said = r"adata: column 'cell_type' has no value in 1 cells, .*. shards=\{'missing': LABEL\} gives them one"
    with pytest.raises(InputError, match=said):
        scldm.fit(adata, ["cell_type"])


@pytest.mark.heavy
@pytest.mark.parametrize(
    "package, call, said",
    [
        (
            "zstandard",
            "scldm.fit(cells(), ['cell_type'])",
            "fit needs the package zstandard. scldm's extra 'shards' brings it",
        ),
        (
            "matplotlib",
            "Pretrained.evaluate(Mock(), cells(), cells())",
            "evaluate needs the package matplotlib. scldm's extra 'evaluate' brings it",
        ),
    ],
)
def test_a_missing_package_is_named(package: str, call: str, said: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import scldm; from unittest.mock import Mock; "
    code += f"from tests.scldm.test_fitting import cells; from scldm.pretrained import Pretrained; {call}"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stderr.splitlines()[-1].startswith(f"scldm.errors.InputError: {said}"), done.stderr


def test_one_of_many_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="fit runs in one process, and this is one of 4"):
        scldm.fit(cells(), ["cell_type"])


def test_presets_follow_from_the_number_of_cells() -> None:
    page = (
        (Path(__file__).parents[2] / "docs" / "presets.md").read_text().split("## By the number of training cells")[1]
    )
    page = page.split("\n## ")[0]
    for most, first, second in fitting.PRESETS:
        assert fitting._presets(most, on_gpu=True) == [first, second]
        assert fitting._presets(most, on_gpu=False) == ["vae/tiny", "ldm/tiny"]
        (row,) = [line for line in page.splitlines() if line.startswith("|") and f"`{first}`" in line]
        assert f"`{second}`" in row
    assert fitting._presets(10_001, on_gpu=True) == ["vae/dentate_gyrus", "ldm/base"]
    assert fitting.PRESETS[-1][0] == sys.maxsize
