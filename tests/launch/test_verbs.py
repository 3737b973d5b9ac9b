"""Cells in, cells out, verb by verb on 200 small cells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from sklearn.neighbors import NearestNeighbors

from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader, LoaderConfig
from launch import train_vae
from launch.cli import main
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig
from scldm.train.loop import TrainConfig
from scldm.train.tracking import read_metrics
from tests.launch.small_verbs import LDM, VAE, refused, scldm, write_cells

pytestmark = pytest.mark.heavy


def test_cells_in_cells_out(made: Path) -> None:
    for run, metric in (("vae", "nll"), ("ldm", "velocity_loss")):
        losses = [row["loss"] for row in read_metrics(made / run, "train")]
        assert len(losses) == 4
        assert losses[-1] < losses[0]
        assert [row["step"] for row in read_metrics(made / run, "validation") if row[metric] > 0] == [10, 20]
    generated: Any = ad.read_h5ad(made / "generated.h5ad")
    assert list(generated.obs["type"]) == ["T cell"] * 7 + ["NA"] * 3
    assert list(generated.var_names) == [f"gene{k}" for k in range(40)]
    assert generated.X.format == "csr"
    assert np.issubdtype(generated.X.dtype, np.integer)
    # library sizes are those of the training cells of the type
    assert 100 < generated.X.sum() / 10 < 1_200
    source: Any
    embedded: Any
    source, embedded = ad.read_h5ad(made / "cells.h5ad"), ad.read_h5ad(made / "embedded.h5ad")
    assert embedded.obsm["X_scldm"].shape == (200, 8)
    assert (embedded.X != source.X).nnz == 0
    pd.testing.assert_frame_equal(embedded.obs, source.obs)
    assert not list(made.rglob("*.partial"))


def test_shards_that_a_job_staged_are_read_there_and_named_as_they_were_given(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the run folder names a place that is gone with the job."""
    monkeypatch.setenv("SCLDM_STAGED", f"{made}/shards")
    few = ["train.steps=2", "train.validate_every=2", "train.save_every=2"]
    scldm("train", "vae", f"data.shards={tmp_path}/set", f"run_dir={tmp_path}/vae", *VAE, *few)
    scldm("encode", f"vae={tmp_path}/vae", f"shards={tmp_path}/set", f"out={tmp_path}/latents")
    monkeypatch.setenv("SCLDM_STAGED", f"{tmp_path}/latents")
    scldm("train", "ldm", f"data.shards={tmp_path}/coded", f"run_dir={tmp_path}/ldm", *LDM, *few)
    for run, shards in (("vae", "set"), ("ldm", "coded")):
        kept = [path for path in (tmp_path / run).rglob("*.json") if "config" in path.name]
        assert len(kept) > 1  # with each checkpoint there is a copy
        assert {json.loads(path.read_text())["data"]["shards"] for path in kept} == {f"{tmp_path}/{shards}"}


def test_validation_is_as_wide_as_training_allows(made: Path) -> None:
    """All genes are given in training, few asked: a micro-batch of all genes takes no more memory than one of those."""
    data = LoaderConfig(f"{made}/shards", asked=GeneSetConfig("random", 10))
    course, hardware = TrainConfig(global_batch=60), HardwareConfig("plain", 30)
    parts = train_vae.set_up(
        train_vae.TrainVAEConfig("run", data, train=course, hardware=hardware), World(0, 1, torch.device("cpu"))
    )
    for loader in (parts.loader, parts.validation):
        assert isinstance(loader, CellLoader)
        loader.close()
        assert {cut.stop - cut.start for cut in loader.feed.cuts} == {30}


def test_the_latents_are_what_the_exported_model_embeds(made: Path) -> None:
    """Through shards, the checkpoint's EMA, the exported folder and the h5ad file: one cell, one latent."""
    from contextlib import closing

    from data_pipeline.stream.loader import LatentLoader, StreamConfig

    embedded = ad.read_h5ad(made / "embedded.h5ad").obsm["X_scldm"]
    seen = {}
    for split in ("train", "validation", "test"):
        loader = LatentLoader(StreamConfig(shards=str(made / "latents")), split, global_batch=20, micro_batch=20)
        with closing(loader):
            for (batch,) in loader.one_pass():
                for row, weight, latent in zip(batch.cell_ids_B2[:, 1].tolist(), batch.weight_B, batch.latent_BLZ):
                    if weight:
                        seen[row] = latent.flatten().numpy()
    assert sorted(seen) == list(range(200))
    found = np.stack([seen[row] for row in range(200)])
    nearest = NearestNeighbors(n_neighbors=2).fit(embedded).kneighbors(embedded)[0][:, 1].min()
    assert np.abs(found - embedded).max() < 1e-2 * nearest  # rounded otherwise, and no other cell's


def test_a_run_starts_from_an_exported_model_on_other_genes(made: Path, capsys: pytest.CaptureFixture) -> None:
    def other(adata) -> None:
        adata.var_names = [f"gene{k if k >= 3 else 40 + k}" for k in range(40)]  # three are gone, three are new

    write_cells(made / "other.h5ad", other)
    scldm("shards", "write", f"source.paths={made}/other.h5ad", f"out={made}/other", "conditions=type",
          "split.validation=0.2", "split.stratify=type")  # fmt: skip
    capsys.readouterr()
    command = ["train", "vae", f"data.shards={made}/other", f"run_dir={made}/tuned", f"init_from={made}/model", *VAE]
    assert main([*command, "min_gene_share=0.95"]) == 2
    assert "37 of 40 genes matched, and at least 95 % are needed (min_gene_share=0.95)" in capsys.readouterr().err
    assert not (made / "tuned").exists()
    scldm(*command)
    assert (
        "genes: 37 known, 3 new (gene40, gene41, gene42), 3 left out (gene0, gene1, gene2)" in capsys.readouterr().err
    )
    assert json.loads((made / "tuned" / "init_from.json").read_text())["genes"]["new"][0] == "gene40"
    scldm("train", "vae", f"data.shards={made}/other", f"run_dir={made}/fresh", *VAE)
    start = [read_metrics(made / run, "train")[0]["loss"] for run in ("fresh", "tuned")]
    # of the first five steps, on the same cells in the same order; a fresh start is at the mean cell already
    assert start[1] < 0.98 * start[0]
    scldm(*command, "min_gene_share=0.95")  # resumes, and starts from nothing again
    assert "37 known" not in "".join(capsys.readouterr())
    scldm("train", "ldm", f"data.shards={made}/latents", f"run_dir={made}/tuned-ldm", f"init_from={made}/model", *LDM)
    assert "type: 3 known" in capsys.readouterr().err
    scldm("encode", f"vae={made}/tuned", f"shards={made}/other", f"out={made}/tuned-latents")
    words = [
        "train",
        "ldm",
        f"data.shards={made}/tuned-latents",
        f"run_dir={made}/other-ldm",
        f"init_from={made}/model",
    ]
    assert main([*words, *LDM]) == 2
    assert "knows the latents of its own autoencoder" in capsys.readouterr().err


def test_a_verb_run_again_resumes_or_replaces(made: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted((p.relative_to(made), p.stat().st_mtime_ns) for p in (made / "vae" / "checkpoints").rglob("*"))
    scldm("train", "vae", f"data.shards={made}/shards", f"run_dir={made}/vae", *VAE)
    assert (
        sorted((p.relative_to(made), p.stat().st_mtime_ns) for p in (made / "vae" / "checkpoints").rglob("*")) == before
    )
    scldm("encode", f"vae={made}/vae", f"shards={made}/shards", f"out={made}/latents")
    scldm("export", f"vae={made}/vae", f"ldm={made}/ldm", f"out={made}/model")
    scldm(
        "generate",
        f"model={made}/model",
        f"like={made}/cells.h5ad",
        "by=type",
        f"out={made}/like.h5ad",
        "sampler.n_steps=2",
    )
    assert list(ad.read_h5ad(made / "like.h5ad").obs["type"]) == list(ad.read_h5ad(made / "cells.h5ad").obs["type"])
    scldm("generate", f"model={made}/model", "n=3", f"out={made}/n.h5ad", "sampler.n_steps=2", "genes=gene7,gene2")
    assert list(ad.read_h5ad(made / "n.h5ad").var_names) == ["gene7", "gene2"]
    assert set(ad.read_h5ad(made / "n.h5ad").obs["type"]) == {"not given"}


@pytest.fixture
def remote(made: Path) -> Iterator[str]:
    """The shards of `made` in a store that is no local folder."""
    for path in (made / "shards").rglob("*"):
        if path.is_file():
            MemoryFileSystem().pipe_file(f"/bucket/{path.relative_to(made / 'shards')}", path.read_bytes())
    yield "memory://bucket"
    MemoryFileSystem.store.clear()


def test_a_remote_set_is_planned_trained_on_encoded_and_evaluated(
    made: Path, remote: str, tmp_path: Path, capsys
) -> None:
    plan = ["plan", "vae", f"data.shards={remote}", *VAE, "hardware.gpus_per_node=1", "hardware.engine=deepspeed"]
    scldm(*plan)  # the manifest says all that it takes
    assert "epochs of 120 cells" in capsys.readouterr().out
    cache = f"cache_folder={tmp_path}/cache"
    scldm("train", "vae", f"data.shards={remote}", f"data.{cache}", f"run_dir={tmp_path}/vae", *VAE, "train.steps=2")
    encode = ["encode", f"vae={made}/vae", f"shards={remote}", f"out={tmp_path}/latents"]
    refused(encode, "a remote set needs cache_folder", capsys, tmp_path)
    scldm(*encode, cache)
    for path in [path for path in (made / "latents").rglob("*.*") if path.name != "encoded_from.json"]:
        assert (tmp_path / path.relative_to(made)).read_bytes() == path.read_bytes(), path
    words = ["evaluate", f"generated={made}/generated.h5ad", f"shards={remote}", f"out={tmp_path}/evaluation"]
    refused([*words, "conditions=type"], "a remote set needs cache_folder", capsys, tmp_path)
    # all cells were read, and are what it says
    refused([*words, "conditions=type", cache], "no cells of 'B cell', which the test split holds", capsys, tmp_path)


def test_an_unconditional_model_goes_the_same_way(made: Path, tmp_path: Path) -> None:
    scldm("shards", "write", f"source.paths={made}/cells.h5ad", f"out={tmp_path}/shards", "split.validation=0.2")
    scldm("train", "vae", f"data.shards={tmp_path}/shards", f"run_dir={tmp_path}/vae", *VAE, "train.steps=4")
    scldm("encode", f"vae={tmp_path}/vae", f"shards={tmp_path}/shards", f"out={tmp_path}/latents")
    scldm("train", "ldm", f"data.shards={tmp_path}/latents", f"run_dir={tmp_path}/ldm", *LDM, "train.steps=4")
    scldm("export", f"vae={tmp_path}/vae", f"ldm={tmp_path}/ldm", f"out={tmp_path}/model")
    scldm("generate", f"model={tmp_path}/model", "n=5", f"out={tmp_path}/made.h5ad", "sampler.n_steps=2")
    assert ad.read_h5ad(tmp_path / "made.h5ad").shape == (5, 40)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["conditions"] == []
