"""An embedding in a file is judged: numbers in evaluation.json, a table, or one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from launch.cli import main
from launch.evaluate import main as evaluate
from launch.evaluation.config import EvaluateVerbConfig
from launch.evaluation.terminal import console, started
from scldm.errors import InputError


def embedded_cells() -> ad.AnnData:
    """120 cells of two types that their counts tell apart, of 4 donors, and an embedding that does so less well."""
    rng = np.random.default_rng(0)
    number = np.arange(120) % 2
    rate = np.ones((2, 30))
    rate[0, :6], rate[1, 6:12] = 4, 4
    obs = pd.DataFrame({"cell_type": pd.Categorical(np.array(["B [1]", "T"])[number]), "donor": np.arange(120) // 30})
    obs.loc[118:, "cell_type"] = None
    cells = ad.AnnData(
        sp.csr_matrix(rng.poisson(rate[number]).astype(np.float32)), obs.set_index(obs.index.astype(str))
    )
    cells.obsm["X_scldm"] = (rng.normal(size=(120, 4)) + 1.5 * number[:, None]).astype(np.float32)
    cells.obsm["other"] = rng.normal(size=(120, 3))
    return cells[:118].copy()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    embedded_cells().write_h5ad(tmp_path / "embedded.h5ad")
    return tmp_path / "embedded.h5ad"


def of(path: Path) -> dict[str, str]:
    return {"embedding": str(path), "label": "cell_type"}


@pytest.mark.heavy
def test_scores_are_written_and_shown(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    found = evaluate(EvaluateVerbConfig(**of(path), held_out_by="donor", out=str(out)))
    assert json.loads((out / "evaluation.json").read_text()) == found
    assert (found["cells"], found["embedding"]["width"], found["n_folds"]) == (118, 4, 4)
    assert found["groups"] == [["0"], ["1"], ["2"], ["3"]]
    accuracy = {name: found["scores"][name]["linear"]["accuracy"]["value"] for name in ("embedding", "pca")}
    assert 0.75 < accuracy["embedding"] < 0.99
    assert accuracy["pca"] > accuracy["embedding"]
    shown = capsys.readouterr().out
    assert f"{accuracy['embedding']:.3f}" in shown
    assert "PCA of the counts" in shown
    assert "4 of donor are held out in turn" in shown
    other = evaluate(EvaluateVerbConfig(**of(path), key="other", out=str(out)))
    assert other["scores"]["embedding"]["knn"]["accuracy"]["value"] < 0.7
    assert "names its column" in capsys.readouterr().out


@pytest.mark.heavy
def test_names_are_shown_as_text_and_the_notes_say_what_each_side_saw(tmp_path: Path, capsys) -> None:
    cells = embedded_cells()
    cells.obs["type [mem] :cat:"] = cells.obs["cell_type"].astype(str).where(np.arange(118) > 0, "x[/b] y")
    cells.layers["raw_counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    words = [f"embedding={tmp_path}/cells.h5ad", "label=type [mem] :cat:", "layer=raw_counts"]
    assert main(["evaluate", *words]) == 0
    shown = capsys.readouterr().out
    assert "type [mem] :cat: told from 117 cells" in shown
    assert "labels are left out: x[/b] y: 1 cells" in shown
    assert "The embedding's model may have been trained on the held-out cells" in shown
    assert main(["evaluate", *words[:2], "layer=scaled"]) == 2
    assert "layer='scaled' is not in the file" in capsys.readouterr().err


@pytest.mark.heavy
def test_counts_of_another_file_are_matched_by_name(path: Path, tmp_path: Path) -> None:
    cells = embedded_cells()
    here = evaluate(EvaluateVerbConfig(**of(path)))
    order = np.random.default_rng(1).permutation(118)
    cells[order].copy().write_h5ad(tmp_path / "counts.h5ad")
    cells.X = sp.csr_matrix(cells.X).log1p()  # no counts any more
    cells.write_h5ad(tmp_path / "logged.h5ad")
    logged = of(tmp_path / "logged.h5ad")
    there = evaluate(EvaluateVerbConfig(**logged, real=str(tmp_path / "counts.h5ad")))
    assert there["scores"] == here["scores"]
    with pytest.raises(InputError, match="no counts in X, .*real=FILE gives them for the same cells"):
        evaluate(EvaluateVerbConfig(**logged))
    cells[:100].copy().write_h5ad(tmp_path / "fewer.h5ad")
    with pytest.raises(InputError, match="no counts in X"):
        evaluate(EvaluateVerbConfig(**logged, real=str(tmp_path / "fewer.h5ad")))
    embedded_cells()[:100].copy().write_h5ad(tmp_path / "fewer.h5ad")
    with pytest.raises(InputError, match="lacks 18 of the 118 cells of .*logged.h5ad, such as '100'"):
        evaluate(EvaluateVerbConfig(**logged, real=str(tmp_path / "fewer.h5ad")))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"label": "kind"}, "obs has no column label='kind'. It has cell_type, donor"),
        ({"held_out_by": "batch"}, "obs has no column held_out_by='batch'"),
        ({"held_out_by": "cell_type"}, "is the label itself"),
        ({"key": "X_pca"}, "obsm has no key=X_pca. It has X_scldm, other"),
        ({"embedding": "nowhere.h5ad"}, "nowhere.h5ad: no such file"),
    ],
)
def test_what_is_not_there_is_named(path: Path, tmp_path: Path, given: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate(EvaluateVerbConfig(**{**of(path), **given}, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_cell_without_a_label_is_not_guessed(tmp_path: Path) -> None:
    cells = embedded_cells()
    cells.obs["cell_type"] = np.where(np.arange(118) < 3, np.nan, cells.obs["cell_type"].astype(object))
    cells.write_h5ad(tmp_path / "embedded.h5ad")
    with pytest.raises(InputError, match="label='cell_type' has no value in 3 cells"):
        evaluate(EvaluateVerbConfig(**of(tmp_path / "embedded.h5ad")))


def test_a_table_in_a_file_or_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    table = started("title", [f"score {k}" for k in range(12)], ("classifier", "features"), min_width=13)
    table.add_row("nearest neighbours", "embedding (256 wide)", *["0.953 ± 0.012"] * 12)
    console().print(table)
    out = capsys.readouterr().out
    assert (out.count("0.953 ± 0.012"), out.count("score ")) == (12, 12)
