"""`python -m benchmarks.unseen`: what stands in its table, and that its guesses are what they are called."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from benchmarks.resampled import Distances, resampled
from benchmarks.unseen import BenchUnseenConfig, Labelled, main, rivals
from launch.cli import run
from scldm.evaluate.distances import mmd2, w2

TYPES, DONORS, G = ("B", "T", "NK"), ("01", "02"), 40
GENES = tuple(f"gene{k}" for k in range(G))


def cells(n: int = 16) -> ad.AnnData:
    """Types differ in genes 10 to 29; treatment raises gene 0 eightfold in every type and gene 1 in T cells alone."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        [(t, f"{c}{d}", c) for t in TYPES for d in DONORS for c in ("ctrl", "stim") for _ in range(n)],
        columns=["cell_type", "sample", "condition"],
    )
    rates = np.full((len(obs), G), 5.0)
    for k, kind in enumerate(TYPES):
        rates[(obs["cell_type"] == kind).to_numpy(), 10 + 6 * k : 16 + 6 * k] *= 4
    treated = (obs["condition"] == "stim").to_numpy()
    rates[treated, 0] *= 8
    rates[treated & (obs["cell_type"] == "T").to_numpy(), 1] *= 8
    obs.index = pd.Index([f"cell{k}" for k in range(len(obs))])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)), obs=obs, var=pd.DataFrame(index=[*GENES]))


def test_the_rivals_are_control_cells_treated_cells_elsewhere_and_shifted_control_cells() -> None:
    adata = cells()
    obs = pd.DataFrame({"type": adata.obs["cell_type"], "treatment": adata.obs["condition"]})
    obs["donor"] = adata.obs["sample"].str[-2:]
    train = Labelled(sp.csr_matrix(adata.X), obs.reset_index(drop=True), GENES)
    config = BenchUnseenConfig("", "", held_out=("B",))
    control, elsewhere, shifted = rivals(config, "B", train, {"01": 9, "02": 4}, np.random.default_rng(0))
    dense = train.log.toarray()

    def found(rows: np.ndarray) -> list[set]:
        """Of each row, the labels of the training cell that it is."""
        return [
            tuple(train.obs.iloc[int(np.abs(dense - row).sum(1).argmin())][["type", "donor", "treatment"]])
            for row in rows
        ]

    assert found(control) == [("B", "01", "ctrl")] * 9 + [("B", "02", "ctrl")] * 4
    assert [labels[1:] for labels in found(elsewhere)] == [("01", "stim")] * 9 + [("02", "stim")] * 4
    assert {labels[0] for labels in found(elsewhere)} == {"T", "NK"}
    shift = shifted - control
    assert np.allclose(shift, shift[0])  # every cell by the same
    assert shift[0, 0] > 1.2  # in both other types
    assert 0.4 < shift[0, 1] < 1.2  # in one of them: half of it
    assert np.abs(shift[0, 2:]).max() < 0.6


@pytest.mark.heavy
def test_cells_drawn_again_have_the_distances_of_the_cells() -> None:
    rng = np.random.default_rng(0)
    reference, near, far = rng.normal(size=(80, 3)), rng.normal(size=(60, 3)), rng.normal(0.8, 1, size=(60, 3))
    one, once = Distances(reference, far), (np.ones(80), np.ones(60))
    for weight in (1, 2):  # a cell that is there twice is no neighbour of itself
        scores = one.mmd2(weight * once[0], weight * once[1]), one.w2(weight * once[0], weight * once[1])
        assert scores == pytest.approx((mmd2(reference, far), w2(reference, far)), rel=1e-9)
    again = resampled([(reference, {"near": near, "far": far})], 100, rng)
    for k, distance in enumerate((mmd2, w2)):
        low, high = np.quantile((again["far"] - again["near"])[:, k], (0.025, 0.975))
        assert 0 < low < distance(reference, far) - distance(reference, near) < high
    # drawing cells with replacement leaves MMD2 where it was; counting a cell as its own neighbour adds 2/n of it
    error = again["near"][:, 0].std() / 10
    assert abs(again["near"][:, 0].mean() - mmd2(reference, near)) < 4 * error


@pytest.mark.slow
def test_the_table_has_all_that_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cells().write_h5ad(tmp_path / "cells.h5ad")
    few = ("train.steps=20", "train.validate_every=20", "train.log_every=20", "hardware.micro_batch=30")
    vae = (*few, "data.given.n_genes=20", "model.width=16", "model.n_latents=2", "model.latent_width=4")
    config = BenchUnseenConfig(
        str(tmp_path / "cells.h5ad"), str(tmp_path / "out"), donor_characters=2, held_out=("B",), repeats=2,
        genes=("gene0", "gene1"), vae=(*vae, "model.n_heads=2"), ldm=few, save=str(tmp_path / "unseen.json"),
    )  # fmt: skip
    report = main(config)
    rows = {row["name"]: row for row in json.loads((tmp_path / "unseen.json").read_text())["rows"]}
    assert 2 < rows["B: log2 fold change of gene0, real"]["value"] < 3.2
    assert abs(rows["B: log2 fold change of gene1, real"]["value"]) < 0.7
    for metric, ours in itertools.product(("MMD2", "W2"), ("generated", "control cells of the type, transformed")):
        for rival in ("control cells of the type", "treated cells of other types", "control cells + mean log-shift"):
            (row,) = [row for name, row in rows.items() if name.startswith(f"B: {metric}, {ours} / {rival}")]
            assert row["target"] == "<= 1"
            assert row["met"] == (row["value"] <= 1)
            found = [row for name, row in rows.items() if name.startswith(f"B: {metric}, {ours} - {rival}")]
            difference, low, high = (row["value"] for row in found)
            assert (difference <= 0) == row["met"] == found[0]["met"]
            assert low < difference < high
    # no held-out cell in training; again, nothing is trained again
    splits = {
        s["name"]: s["n_cells"] for s in json.loads((tmp_path / "out/shards/manifest.json").read_text())["splits"]
    }
    assert splits["test"] == 32
    before = (tmp_path / "out" / "vae" / "metrics.jsonl").stat().st_mtime_ns
    assert main(config).rows == report.rows
    assert (tmp_path / "out" / "vae" / "metrics.jsonl").stat().st_mtime_ns == before
    words = [f"h5ad={tmp_path}/cells.h5ad", f"out={tmp_path}/out", "donor_characters=3"]
    assert run("unseen", "benchmarks.unseen", words) == 2
    assert "holds another run: donor_characters was 2, now 3" in capsys.readouterr().err
