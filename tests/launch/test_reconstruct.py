"""`scldm reconstruct`: expected counts and log-likelihoods of a user's cells, by hand and by the verb."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from launch.cli import run_verb
from scldm.batch import GeneCounts
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.vae import VAE, VAEConfig
from scldm.model_folder import save_pretrained
from scldm.pretrained import load
from scldm.vocab import ConditionVocab, GeneVocab

pytestmark = pytest.mark.heavy

GENES = GeneVocab(tuple(f"G{k}" for k in range(30)), "symbol")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(16, 3, 4, 1, 2, 1, 0.01), GENES.n_genes)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    sizes = LibrarySizeModel((), {(): {(): LogNormal(9, 6.0, 0.2)}})
    save_pretrained(tmp_path / "model", vae, None, GENES, ConditionVocab({}), sizes, {"from": "a test"})
    return tmp_path / "model"


def cells(genes: list[str]) -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(2, (70, len(genes))).astype(np.float32) + 1
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b"] * 35)}, index=pd.Index([f"cell-{k}" for k in range(70)]))
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=pd.Index(genes)))


def test_expected_counts_and_log_likelihoods(folder, tmp_path):
    """The file holds 20 of the 30 genes, in an order of its own, and one that nobody knows."""
    file_genes = [f"G{k}" for k in np.random.default_rng(1).permutation(30)[:20]]
    adata = cells(["unknown", *file_genes])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = [f"model={folder}", f"h5ad={tmp_path}/cells.h5ad", f"out={tmp_path}/out.h5ad"]
    assert run_verb("reconstruct", words) == 0
    found = ad.read_h5ad(tmp_path / "out.h5ad")

    vae = load(folder).vae
    counts = torch.from_numpy(adata.X.toarray()[:, 1:]).int()  # type: ignore[union-attr]
    given = GeneCounts(torch.from_numpy(GENES.lookup(file_genes)), counts)
    size_B = counts.sum(1).float()
    predicted = vae.decode(vae.encode(given).mean_BLZ, given.gene_ids)
    np.testing.assert_allclose(found.X, predicted.mu(size_B).numpy(), rtol=1e-3)
    np.testing.assert_allclose(found.obs["log_likelihood"], -predicted.nll_B(given, size_B).numpy(), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(found.X).sum(1), size_B.numpy(), rtol=1e-4)
    assert list(found.var_names) == file_genes
    assert list(found.obs["kind"]) == list(adata.obs["kind"])

    chosen = [file_genes[7], file_genes[2]]
    lacking = next(g for g in GENES.ids if g not in file_genes)
    assert run_verb("reconstruct", [*words, f"genes=[{chosen[0]},{lacking},{chosen[1]}]"]) == 0
    part = ad.read_h5ad(tmp_path / "out.h5ad")
    assert run_verb("reconstruct", [*words, f"genes={chosen[0]},{chosen[1]}"]) == 0  # as in generate and transform
    assert list(ad.read_h5ad(tmp_path / "out.h5ad").var_names) == chosen
    assert list(part.var_names) == [chosen[0], lacking, chosen[1]]
    np.testing.assert_allclose(part[:, chosen].X, found[:, chosen].X, rtol=1e-4)
    np.testing.assert_array_equal(part.obs["log_likelihood"], found.obs["log_likelihood"])


@pytest.mark.parametrize("verb", ["reconstruct", "embed"])
def test_cells_without_a_count_are_left_out_where_that_is_asked_for(folder, tmp_path, capsys, verb) -> None:
    adata = cells(["G1", "G2", "G3", "G4", "unknown"])
    adata.X[3, :4] = 0
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = [f"model={folder}", f"h5ad={tmp_path}/cells.h5ad", f"out={tmp_path}/out.h5ad"]
    assert run_verb(verb, words) == 2
    assert "1 of 70 cells have no count in any gene that the model knows. drop_empty=true" in capsys.readouterr().err
    assert run_verb(verb, [*words, "drop_empty=true", "batch=20", "precision=bfloat16"]) == 0
    assert "1 of 70 cells are left out" in capsys.readouterr().err
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    assert list(found.obs_names) == [f"cell-{k}" for k in range(70) if k != 3]
    how = found.uns["scldm"]
    assert (how["verb"], how["batch"], how["precision"]) == (verb, 20, "bfloat16")


def test_embedded_cells_keep_what_made_them(folder, tmp_path) -> None:
    adata = cells(["G1", "G2", "G3", "G4"])
    adata.uns["scldm"] = {"verb": "generate", "seed": 3}
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert run_verb("embed", [f"model={folder}", f"h5ad={tmp_path}/cells.h5ad", f"out={tmp_path}/out.h5ad"]) == 0
    how = ad.read_h5ad(tmp_path / "out.h5ad").uns["scldm"]
    assert how["verb"] == "embed"
    assert json.loads(how["before"])["verb"] == "generate"


@pytest.mark.parametrize(
    "change, said",
    [({"genes": "[G1,nonsense]"}, "gene 'nonsense'"), ({"h5ad": "missing.h5ad"}, "missing.h5ad: no such file")],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, change, said):
    cells(["G1", "G2", "G3"]).write_h5ad(tmp_path / "cells.h5ad")
    given = {"model": str(folder), "h5ad": f"{tmp_path}/cells.h5ad", "out": f"{tmp_path}/out.h5ad"} | change
    assert run_verb("reconstruct", [f"{key}={value}" for key, value in given.items()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()
