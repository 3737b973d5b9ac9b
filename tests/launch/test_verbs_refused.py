"""For every bad input of a verb one line, exit code 2, nothing made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import training
from scldm.parallel.dist import World
from tests.launch.small_verbs import LDM, VAE, refused, scldm, write_cells

pytestmark = pytest.mark.heavy


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
        (None, "condition=type", "unknown key 'condition'. Did you mean conditions"),
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
        (lambda at: run_words(at, "vae", "vae/tinny"), "preset 'vae/tinny' is unknown. There are: "),
        (lambda at: run_words(at, "vae", "train.step=3"), "unknown key 'train.step'. Did you mean train.steps"),
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
