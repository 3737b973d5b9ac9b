"""Cells in, cells out, verb by verb on 200 small cells; and for every bad input one line, exit code 2, nothing made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from fsspec.implementations.memory import MemoryFileSystem
from sklearn.neighbors import NearestNeighbors

from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader, LoaderConfig
from launch import train_vae, training
from launch.cli import main
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig
from scldm.train.loop import TrainConfig
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import make_cells

pytestmark = pytest.mark.heavy

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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the verbs make of cells.h5ad, one after another."""
    at = tmp_path_factory.mktemp("verbs")
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
    return at


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
    refused(encode, "a remote shard set needs cache_folder", capsys, tmp_path)
    scldm(*encode, cache)
    for path in [path for path in (made / "latents").rglob("*.*") if path.name != "encoded_from.json"]:
        assert (tmp_path / path.relative_to(made)).read_bytes() == path.read_bytes(), path
    words = ["evaluate", f"generated={made}/generated.h5ad", f"shards={remote}", f"out={tmp_path}/evaluation"]
    refused([*words, "conditions=type"], "a remote shard set needs cache_folder", capsys, tmp_path)
    # all cells were read, and are what it says
    refused([*words, "conditions=type", cache], "no cells of 'B cell', which the test split holds", capsys, tmp_path)


# --- bad input -----------------------------------------------------------------------------------------------------


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


def negative(adata: Any) -> None:
    adata.X[3, 4] = -2


def fractional(adata: Any) -> None:
    adata.X = adata.X.multiply(0.37).tocsr()


def no_counts(adata: Any) -> None:
    adata.X = np.log1p(adata.X.toarray())


@pytest.mark.parametrize(
    "change, word, said",
    [
        (negative, "conditions=type", "-2"),
        (fractional, "conditions=type", "X"),
        (no_counts, "conditions=type", "X"),
        (None, "conditions=tpye", "tpye"),
        (None, "condition=type", "unknown key 'condition'; did you mean conditions"),
    ],
)
def test_cells_that_can_not_be_shards(tmp_path: Path, capsys, change, word: str, said: str) -> None:
    write_cells(tmp_path / "bad.h5ad", change)
    words = ["shards", "write", f"source.paths={tmp_path}/bad.h5ad", f"out={tmp_path}/shards", word]
    refused(words, said, capsys, tmp_path)


def run_words(made: Path, stage: str, *more: str) -> list[str]:
    data, small = {"vae": ("shards", VAE), "ldm": ("latents", LDM)}[stage]
    return ["train", stage, f"data.shards={made}/{data}", f"run_dir={made}/{stage}", *small, *more]


@pytest.mark.parametrize(
    "words, said",
    [
        (lambda at: run_words(at, "vae", "vae/tinny"), "preset 'vae/tinny' is unknown; there are: "),
        (lambda at: run_words(at, "vae", "train.step=3"), "unknown key 'train.step'; did you mean train.steps"),
        (lambda at: run_words(at, "vae", "train.steps=many"), "train.steps"),
        (
            lambda at: run_words(at, "vae", "data.given.n_genes=20"),
            "data.given.n_genes=20 has no effect with data.given.p",
        ),
        (
            lambda at: run_words(at, "vae", "vae/tiny", "data.given.policy=all"),
            "data.given.share=0.3333 has no effect",
        ),
        (lambda at: run_words(at, "vae", "data.asked.overflow=sample"), "data.asked.overflow=sample has no effect"),
        (lambda at: run_words(at, "ldm", "given.n_genes=20"), "given.n_genes=20 has no effect with given.policy=all"),
        (lambda at: run_words(at, "ldm", "given.policy=expressed"), "given.policy=expressed has no effect on latents"),
        (
            lambda at: ["plan", *run_words(at, "vae", "data.given.n_genes=20")[1:]],
            "data.given.n_genes=20 has no effect",
        ),
        (
            lambda at: ["encode", f"vae={at}/vae", f"shards={at}/shards", f"out={at}/new", "genes.gene_set_group=5"],
            "genes.gene_set_group=5 has no effect with genes.policy=all",
        ),
        (lambda at: run_words(at, "vae", "train.steps=21"), "vae holds another run: train.steps was 20, now 21"),
        (lambda at: run_words(at, "vae", "model.width=32"), "model.width was 16, now 32"),
        (lambda at: run_words(at, "vae", "model.n_heads=3"), "model.n_heads=3 does not divide"),
        (lambda at: run_words(at, "vae", f"run_dir={at}/ldm"), "ldm holds another run"),
        (lambda at: run_words(at, "vae", f"run_dir={at}/shards"), "shards is not empty and not a run folder"),
        (
            lambda at: run_words(at, "vae", "hardware.micro_batch=7", f"run_dir={at}/new"),
            "over 1 ranks with hardware.micro_batch=7. Nearest allowed: hardware.micro_batch 6 or 10; train.global_b",
        ),
        (lambda at: run_words(at, "vae", f"data.shards={at}/latents", f"run_dir={at}/new"), "not of cells"),
        (lambda at: run_words(at, "ldm", f"data.shards={at}/shards", f"run_dir={at}/new"), "not of latents"),
        (lambda at: run_words(at, "vae", f"data.shards={at}/nowhere", f"run_dir={at}/new"), "nowhere"),
        (lambda at: ["encode", f"vae={at}/shards", f"shards={at}/shards", f"out={at}/new"], "not a run folder"),
        (lambda at: ["export", f"vae={at}/ldm", f"out={at}/new"], "ldm"),
        (lambda at: ["export", f"vae={at}/vae", f"out={at}/shards"], "shards is not empty and not a model folder"),
        (lambda at: ["generate", f"model={at}/vae", "n=3", f"out={at}/new.h5ad"], "vae"),
        (lambda at: ["generate", f"model={at}/shards", "n=3", f"out={at}/new.h5ad"], "is not a model folder"),
        (
            lambda at: ["generate", f"model={at}/model", f"out={at}/new.h5ad"],
            "exactly one of conditions, like, shards and n",
        ),
        (lambda at: ["generate", f"model={at}/model", "n=3", f"out={at}/new.csv"], "must end in .h5ad"),
        (lambda at: ["generate", f"model={at}/model", "n=3", f"out={at}/new.h5ad", "seed=-1"], "seed=-1"),
        (lambda at: ["generate", f"model={at}/model", "n=3", f"out={at}/new.h5ad", "genes=none"], "gene 'none' is not"),
        (
            lambda at: ["generate", f"model={at}/model", f"like={at}/cells.h5ad", "by=typ", f"out={at}/new.h5ad"],
            "obs has no column 'typ'. It has type",
        ),
        (
            lambda at: ["generate", f"model={at}/model", f"like={at}/wanted.csv", "by=type", f"out={at}/new.h5ad"],
            "wanted.csv: a table, no AnnData file",
        ),
        (
            lambda at: ["generate", f"model={at}/model", f"conditions={at}/cells.h5ad", f"out={at}/new.h5ad"],
            "not a readable CSV file",
        ),
        (
            lambda at: ["embed", f"model={at}/model", f"h5ad={at}/wanted.csv", f"out={at}/new.h5ad"],
            "wanted.csv: a table, no AnnData file",
        ),
        (lambda at: ["embed", f"model={at}/model", f"h5ad={at}/no.h5ad", f"out={at}/new.h5ad"], "no such file"),
        (
            lambda at: ["embed", f"model={at}/model", f"h5ad={at}/cells.h5ad", f"out={at}/new.h5ad", "layer=raw"],
            "cells.h5ad: layer='raw' is not in the file. It has X",
        ),
        (
            lambda at: ["embed", f"model={at}/model", f"h5ad={at}/cells.h5ad", f"out={at}/new.h5ad", "device=tpu"],
            "device=tpu",
        ),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(made: Path, capsys: pytest.CaptureFixture, words, said: str) -> None:
    refused(words(made), said, capsys, made)


def test_a_world_size_that_the_batch_can_not_serve_is_refused_with_the_nearest(made: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(training, "world_of_environment", lambda: World(0, 7, torch.device("cpu")))
    words = run_words(made, "vae", "hardware.engine=deepspeed", "hardware.micro_batch=5", f"run_dir={made}/new")
    said = (
        "train.global_batch=60 can't be split over 7 ranks with hardware.micro_batch=5. Nearest allowed: world size 6"
    )
    refused(words, said, capsys, made)


@pytest.mark.parametrize(
    "table, said",
    [
        ("type\nT cells\n", "condition 'type' has no label 'T cells'. It has "),
        ("cell_type\nT cell\n", "condition 'cell_type' is unknown. The model knows type"),
        ("type,n_cells\nT cell,-1\n", "column n_cells must hold whole numbers"),
        ("type,n_cells\nT cell,0\n", "the table of conditions is empty"),
        ("type,library_size\nT cell,many\n", "column library_size, row 0: "),
        ("", "not a readable CSV file"),
        ("type\nT cell,3,4\na,b\n", "csv"),
    ],
)
def test_conditions_that_the_model_never_saw(made: Path, tmp_path: Path, capsys, table: str, said: str) -> None:
    (tmp_path / "bad.csv").write_text(table)
    words = ["generate", f"model={made}/model", f"conditions={tmp_path}/bad.csv", f"out={tmp_path}/out.h5ad"]
    refused(words, said, capsys, tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "genes.json"])
def test_a_damaged_model_is_named(made: Path, tmp_path: Path, capsys, name: str) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    cut(tmp_path / "model" / name)
    refused(
        ["generate", f"model={tmp_path}/model", "n=1", f"out={tmp_path}/x.h5ad"], f"{name} is damaged", capsys, tmp_path
    )


@pytest.mark.parametrize(
    "name, said",
    [("vae/checkpoints/*/part-0-of-1.safetensors", "is damaged"), ("vae/checkpoints/*/state.json", "is damaged")],
)
def test_a_damaged_checkpoint_is_named(made: Path, tmp_path: Path, capsys, name: str, said: str) -> None:
    shutil.copytree(made / "vae", tmp_path / "vae")
    for path in tmp_path.glob(name):
        cut(path)
    refused(["export", f"vae={tmp_path}/vae", f"out={tmp_path}/model"], said, capsys, tmp_path)
    refused(
        ["encode", f"vae={tmp_path}/vae", f"shards={made}/shards", f"out={tmp_path}/latents"], said, capsys, tmp_path
    )


def test_a_changed_run_folder_changes_no_model(made: Path, tmp_path: Path, capsys) -> None:
    """Export reads config and vocabularies from the checkpoint, which has their hashes."""
    for run in ("vae", "ldm"):
        shutil.copytree(made / run, tmp_path / run)
    words = [f"vae={tmp_path}/vae", f"ldm={tmp_path}/ldm"]
    changes = {
        "conditions.json": lambda of: of["type"].reverse(),
        "genes.json": lambda of: of["ids"].reverse(),
        "latents.json": lambda of: of.update(mean=[[1e9] * len(row) for row in of["mean"]]),
        "config.json": lambda of: of["model"].update(n_heads=of["model"]["n_heads"] * 2),
        "library_sizes.json": lambda of: of.clear(),
    }
    for path in [path for run in ("vae", "ldm") for path in (tmp_path / run).glob("*.json") if path.name in changes]:
        document = json.loads(path.read_text())
        changes[path.name](document)
        path.write_text(json.dumps(document))
    scldm("export", *words, f"out={tmp_path}/model")
    for name in ("conditions.json", "genes.json", "library_sizes.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (made / "model" / name).read_bytes(), name
    ours, theirs = (json.loads((at / "model" / "config.json").read_text()) for at in (tmp_path, made))
    assert {**ours, "sha256": 0, "origin": 0} == {**theirs, "sha256": 0, "origin": 0}
    for path in (tmp_path / "ldm" / "checkpoints").glob("step-*"):
        (path / "missing.json").write_text('{"label": "B"}')
    refused(["export", *words, f"out={tmp_path}/other"], "missing.json is not noted in state.json", capsys, tmp_path)


def test_stages_that_do_not_belong_together_are_not_joined(made: Path, tmp_path: Path, capsys) -> None:
    """Another autoencoder's latents, in encode's folder and in export."""
    scldm(
        "train", "vae", f"data.shards={made}/shards", f"run_dir={tmp_path}/vae", *VAE, "train.seed=1", "train.steps=4"
    )
    words = ["encode", f"vae={tmp_path}/vae", f"shards={made}/shards", f"out={made}/latents"]
    refused(words, "holds latents of another run", capsys, made)
    words = ["export", f"vae={tmp_path}/vae", f"ldm={made}/ldm", f"out={tmp_path}/model"]
    refused(words, "was trained on the latents of another autoencoder", capsys, tmp_path)
    write_cells(tmp_path / "fewer.h5ad", lambda a: a._inplace_subset_var(slice(0, 30)))
    scldm("shards", "write", f"source.paths={tmp_path}/fewer.h5ad", f"out={tmp_path}/shards", "conditions=type")
    words = ["encode", f"vae={made}/vae", f"shards={tmp_path}/shards", f"out={tmp_path}/latents"]
    refused(words, f"shards={tmp_path}/shards has other genes (30, not those 40) (genes.json)", capsys, tmp_path)


def test_a_set_is_the_same_data_or_not_for_every_verb(made: Path, tmp_path: Path, capsys) -> None:
    """The same genes in another order are refused. Cells split otherwise are no data to resume on, and to encode them
    is told: the autoencoder may have seen the test cells."""
    write_cells(tmp_path / "turned.h5ad", lambda a: a._inplace_subset_var(slice(None, None, -1)))
    words = ["conditions=type", "split.validation=0.2", "split.stratify=type"]
    scldm("shards", "write", f"source.paths={tmp_path}/turned.h5ad", f"out={tmp_path}/turned", *words)
    scldm("shards", "write", f"source.paths={made}/cells.h5ad", f"out={tmp_path}/again", "seed=7", *words)
    shutil.copytree(made / "vae", tmp_path / "vae")
    train = ["train", "vae", f"run_dir={tmp_path}/vae", *VAE]
    encode = ["encode", f"vae={made}/vae", f"out={tmp_path}/latents"]
    ldm = ["train", "ldm", f"vae={made}/vae", f"run_dir={tmp_path}/ldm", *LDM]
    turned = "has the same genes in another order (genes.json)"
    for key, of in (("data.shards", train), ("shards", encode), ("data.shards", ldm)):
        refused([*of, f"{key}={tmp_path}/turned"], turned, capsys, tmp_path)
    split = "has other training cells, as after another split (library_sizes.json)"
    refused([*train, f"data.shards={tmp_path}/again"], f"data.shards {split}. Choose another run_dir", capsys, tmp_path)
    scldm(*encode, f"shards={tmp_path}/again")
    assert f"WARNING: {made}/vae was trained on other data: shards={tmp_path}/again {split}" in capsys.readouterr().err
    scldm("train", "ldm", f"data.shards={tmp_path}/latents", f"run_dir={tmp_path}/ldm", *LDM, "train.steps=4")
    capsys.readouterr()
    scldm("export", f"vae={made}/vae", f"ldm={tmp_path}/ldm", f"out={tmp_path}/model")
    assert f"ldm={tmp_path}/ldm {split}" in capsys.readouterr().err
    scldm("export", f"vae={made}/vae", f"ldm={made}/ldm", f"out={tmp_path}/own")
    assert "WARNING" not in capsys.readouterr().err


def test_an_unconditional_model_goes_the_same_way(made: Path, tmp_path: Path) -> None:
    scldm("shards", "write", f"source.paths={made}/cells.h5ad", f"out={tmp_path}/shards", "split.validation=0.2")
    scldm("train", "vae", f"data.shards={tmp_path}/shards", f"run_dir={tmp_path}/vae", *VAE, "train.steps=4")
    scldm("encode", f"vae={tmp_path}/vae", f"shards={tmp_path}/shards", f"out={tmp_path}/latents")
    scldm("train", "ldm", f"data.shards={tmp_path}/latents", f"run_dir={tmp_path}/ldm", *LDM, "train.steps=4")
    scldm("export", f"vae={tmp_path}/vae", f"ldm={tmp_path}/ldm", f"out={tmp_path}/model")
    scldm("generate", f"model={tmp_path}/model", "n=5", f"out={tmp_path}/made.h5ad", "sampler.n_steps=2")
    assert ad.read_h5ad(tmp_path / "made.h5ad").shape == (5, 40)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["conditions"] == []


def test_an_autoencoder_of_expressed_genes_is_given_no_others(made: Path, tmp_path: Path, capsys) -> None:
    """It would answer, with latents of another function (0.83 of the norm apart at 5 % expressed)."""
    run = ["train", "vae", f"data.shards={made}/shards", f"run_dir={tmp_path}/vae", *VAE, "train.steps=4"]
    scldm(*run, "data.given.policy=expressed", "data.asked.policy=all")
    encode = ["encode", f"vae={tmp_path}/vae", f"shards={made}/shards", f"out={tmp_path}/latents"]
    refused(encode, "was trained with data.given.policy=expressed. Give genes.policy=expressed", capsys, tmp_path)
    scldm(*encode, "genes.policy=expressed")
    words = ["encode", f"vae={made}/vae", f"shards={made}/shards", f"out={tmp_path}/new", "genes.policy=expressed"]
    refused(words, "was trained with data.given.policy=all. Give genes.policy=all", capsys, tmp_path)
    scldm("export", f"vae={tmp_path}/vae", f"out={tmp_path}/model")
    words = ["embed", f"model={tmp_path}/model", f"h5ad={made}/cells.h5ad", f"out={tmp_path}/embedded.h5ad"]
    refused(words, "trained with data.given.policy=expressed and is given all genes", capsys, tmp_path)
