"""Every verb on 200 small cells: the cells, the keys of small runs, and how a verb is run or refused."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from launch.cli import main
from tests.scldm.train.small_runs import make_cells

LABELS = np.array(["T cell", "B cell", "NA"])  # the last as some files call what they don't know
SMALL = [
    *("hardware.engine=plain", "hardware.micro_batch=30", "train.global_batch=60", "train.steps=20"),
    *("train.validate_every=10", "train.log_every=5", "tracking.enabled=false", "model.n_heads=2"),
]
VAE = [*SMALL, "model.width=16", "model.n_latents=2", "model.latent_width=4", "model.n_layers=1"]
LDM = [*SMALL, "model.width=16", "model.n_layers=1"]


def write_cells(path: Path, change=None, n: int = 200) -> Path:
    """Synthetic cells as h5ad, after some change to them."""
    cells = make_cells(n, 0)
    obs = pd.DataFrame({"type": pd.Categorical(LABELS[cells.label_n])}, index=pd.Index([f"cell{k}" for k in range(n)]))
    var = pd.DataFrame(index=pd.Index([f"gene{k}" for k in range(cells.counts_nG.shape[1])]))
    adata = ad.AnnData(sp.csr_matrix(cells.counts_nG.astype(np.float32)), obs=obs, var=var)
    (change or (lambda a: None))(adata)
    adata.write_h5ad(path)
    return path


def scldm(*words: str) -> None:
    assert main([word.replace("\n", " ") for word in words]) == 0, words


def refused(words: list[str], said: str, capsys: pytest.CaptureFixture, folder: Path) -> None:
    """Exit code 2, one line that says it, and not a file more or less in the folder."""
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())
    capsys.readouterr()
    assert main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert said in errors[0], errors[0]
    after = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())
    assert after == before


def make_all(at: Path) -> None:
    """All that the verbs make of cells.h5ad, one after another."""
    write_cells(at / "cells.h5ad")
    scldm("shards", "write", f"source.paths={at}/cells.h5ad", f"out={at}/shards", "conditions=type", "block_cells=32",
          "shard_cells=128", "split.validation=0.2", "split.test=0.2", "split.stratify=type")  # fmt: skip
    scldm("train", "vae", f"data.shards={at}/shards", f"run_dir={at}/vae", *VAE)
    scldm("encode", f"vae={at}/vae", f"shards={at}/shards", f"out={at}/latents")
    scldm("train", "ldm", f"data.shards={at}/latents", f"run_dir={at}/ldm", *LDM)
    scldm("export", f"vae={at}/vae", f"ldm={at}/ldm", f"out={at}/model")
    (at / "wanted.csv").write_text("type,n_cells\nT cell,7\nNA,3\n")
    scldm(
        "generate", f"model={at}/model", f"conditions={at}/wanted.csv", f"out={at}/generated.h5ad", "sampler.n_steps=5"
    )
    scldm("embed", f"model={at}/model", f"h5ad={at}/cells.h5ad", f"out={at}/embedded.h5ad")
