"""`scldm encode`: cells are given to an autoencoder as it was trained, and ranks wait for the slowest."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.gene_set_config import GeneSetConfig, as_whole_cells
from data_pipeline.stream.loader import LatentLoader, StreamConfig
from data_pipeline.write_latents import LatentWriter
from launch import encode
from launch.encode import EncodeConfig
from launch.trained import check_given
from scldm.errors import InputError
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import World
from tests.data_pipeline.small_sets import known_cells, write_set

ONE = World(0, 1, torch.device("cpu"))
ALL, EXPRESSED, PADDED = GeneSetConfig(), GeneSetConfig("expressed"), GeneSetConfig("expressed_plus_zeros", 20)
RANDOM, WEIGHTED = GeneSetConfig("random", 9), GeneSetConfig("weighted", 9)


def run_with(given: GeneSetConfig) -> dict[str, Any]:
    """The origin of an autoencoder that was trained so."""
    return {
        "run": "runs/vae",
        "checkpoint": "runs/vae/checkpoints/step-00000001",
        "config": {"data": {"given": vars(given)}},
    }


@pytest.mark.parametrize(
    "trained, given, said",
    [
        (EXPRESSED, ALL, "genes.policy=all: .* trained with data.given.policy=expressed. Give genes.policy=expressed"),
        (ALL, EXPRESSED, "trained with data.given.policy=all. Give genes.policy=all"),
        (RANDOM, PADDED, "trained with data.given.policy=random. Give genes.policy=all"),
        (PADDED, ALL, "Give genes.policy=expressed_plus_zeros genes.n_genes=20"),
        (PADDED, EXPRESSED, "Give genes.policy=expressed_plus_zeros genes.n_genes=20"),
        (EXPRESSED, PADDED, "genes.n_genes=20: .* Give genes.policy=expressed$"),
        (PADDED, GeneSetConfig("expressed_plus_zeros", 21), "genes.n_genes=21: .* data.given.n_genes=20. Give"),
        (WEIGHTED, EXPRESSED, "trained with data.given.policy=weighted. Give genes.policy=all"),
    ],
)
def test_cells_given_otherwise_than_in_training_are_refused(trained, given, said: str) -> None:
    run = run_with(trained)
    with pytest.raises(InputError, match=said):
        check_given(given, run, "genes", ONE)
    check_given(as_whole_cells(trained), run, "genes", ONE)


@pytest.mark.parametrize(
    "trained, given, told",
    [
        (ALL, ALL, False),
        (RANDOM, ALL, False),
        (ALL, RANDOM, False),
        (EXPRESSED, GeneSetConfig("expressed", 64, overflow="sample"), False),
        (WEIGHTED, WEIGHTED, False),
        (WEIGHTED, ALL, True),
        (ALL, WEIGHTED, True),
    ],
)
def test_genes_in_other_shares_than_in_training_are_told(capsys, trained, given, told: bool) -> None:
    run = run_with(trained)
    for rank in (0, 1):
        check_given(given, run, "genes", World(rank, 2, torch.device("cpu")))
    said = capsys.readouterr().err
    assert said.count("it met genes in other shares than here") == int(told)
    assert f"trained with data.given.policy={trained.policy}" in said or not told


def test_a_drawn_set_is_a_part_of_the_whole_cell_and_one_of_expressed_genes_is_not() -> None:
    assert as_whole_cells(RANDOM) == as_whole_cells(WEIGHTED) == as_whole_cells(ALL) == ALL
    assert as_whole_cells(GeneSetConfig("expressed", 64, overflow="sample")) == EXPRESSED
    assert as_whole_cells(PADDED) == PADDED


def cells_and_vae(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small shard set in the folder, and an autoencoder that was trained with genes PADDED."""
    vae = VAE(VAEConfig(8, 2, 3, 1, 2), 40).eval().requires_grad_(False)
    cells = known_cells(64, 32, n_genes=40)
    write_set(folder / "cells", cells, block_cells=32)
    cells.genes.save(folder / "genes.json")
    monkeypatch.setattr(encode, "trained_vae", lambda run, which: (vae, {"hash": "h", **run_with(PADDED)}))


def test_latents_are_float32_and_say_in_what_precision_they_were_computed(tmp_path: Path, monkeypatch) -> None:
    cells_and_vae(tmp_path, monkeypatch)
    made = {}
    for precision, taken in (("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        out = f"{tmp_path}/{precision}"
        encode.main(EncodeConfig(str(tmp_path), f"{tmp_path}/cells", out, genes=PADDED, precision=precision))
        with closing(ShardSet(out)) as latents:
            assert latents.manifest.extra["precision"] == taken
        loader = LatentLoader(StreamConfig(out, lanes=1), global_batch=64, micro_batch=64)
        (batch,) = next(loader)
        loader.close()
        assert batch.latent_BLZ.dtype == torch.float32
        made[precision] = batch.latent_BLZ
    assert torch.equal(made["auto"], made["float32"])
    off = (made["bfloat16"] - made["float32"]).std() / made["float32"].std()
    assert 1e-4 < off < 0.05


@pytest.mark.parametrize("done", [True, False])
def test_auto_goes_on_in_the_precision_of_latents_that_are_there(tmp_path: Path, monkeypatch, done: bool) -> None:
    cells_and_vae(tmp_path, monkeypatch)
    config = EncodeConfig(str(tmp_path), f"{tmp_path}/cells", f"{tmp_path}/out", genes=PADDED)
    finish = LatentWriter.finish

    def ends(writer: LatentWriter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "precision_on", lambda device, asked: "bfloat16")  # as on a GPU
    monkeypatch.setattr(LatentWriter, "finish", finish if done else ends)
    with nullcontext() if done else pytest.raises(KeyboardInterrupt):
        encode.main(config)
    monkeypatch.setattr(LatentWriter, "finish", finish)
    monkeypatch.setattr(encode, "precision_on", lambda device, asked: asked if asked != "auto" else "float32")
    with pytest.raises(InputError, match="precision is 'bfloat16', not 'float32'. Give precision=bfloat16, or"):
        encode.main(replace(config, precision="float32"))
    encode.main(config)
    with closing(ShardSet(f"{tmp_path}/out")) as latents:
        assert latents.manifest.extra["precision"] == "bfloat16"


def test_a_rank_computes_in_the_precision_of_the_first(tmp_path: Path, monkeypatch) -> None:
    cells_and_vae(tmp_path, monkeypatch)
    made = {}
    for first in ("float32", "bfloat16"):  # its own device has float32
        monkeypatch.setattr(World, "of_first", lambda self, value, first=first: first if value == "float32" else value)
        encode.main(EncodeConfig(str(tmp_path), f"{tmp_path}/cells", f"{tmp_path}/{first}", genes=PADDED))
        made[first] = (tmp_path / first / "shards" / "train-000000.tar").read_bytes()
    assert made["float32"] != made["bfloat16"]


def test_the_ranks_wait_for_the_slowest_as_long_as_a_shard_may_take(tmp_path: Path, monkeypatch) -> None:
    """A shard of 65,536 cells is longer on a CPU than the half hour that ranks wait for each other elsewhere."""
    waits: list[float] = []
    cells_and_vae(tmp_path, monkeypatch)
    monkeypatch.setattr(World, "join", lambda self, timeout_s=1_800: waits.append(timeout_s))
    config = EncodeConfig(str(tmp_path), f"{tmp_path}/cells", f"{tmp_path}/out", genes=PADDED)
    encode.main(config)
    assert len(waits) == 1
    assert waits[0] > 86_400
    latents = ShardSet(f"{tmp_path}/out")
    assert latents.manifest.extra["genes"] == asdict(PADDED)
    assert latents.manifest.n_cells == 96
    latents.close()
    encode.main(config)  # is there
