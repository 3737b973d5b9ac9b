"""`scldm train ldm` beyond a plain latent set: cells encoded as they come, vectors of labels, continuous conditions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scldm
from data_pipeline.stream.loader import CellLoader, LoaderConfig, StreamConfig
from launch import encode, train_ldm, train_vae
from launch.cli import main
from launch.train_ldm import TrainLDMConfig, described, set_up, values_of
from launch.train_vae import TrainVAEConfig
from scldm.batch import CompactCellBatch
from scldm.errors import InputError
from scldm.model.dit import DiT, DiTConfig
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig
from scldm.train.loop import TrainConfig
from scldm.train.tracking import read_metrics
from scldm.vocab import ConditionVocab
from tests.scldm.train.small_runs import make_cells, tensors_at_a_time

SMALL = [
    *("hardware.engine=plain", "hardware.micro_batch=30", "train.global_batch=60", "train.steps=20"),
    *("train.validate_every=10", "train.log_every=5", "tracking.enabled=false", "model.n_heads=2"),
]
VAE = [*SMALL, "model.width=16", "model.n_latents=2", "model.latent_width=4", "model.n_layers=1"]
LDM = [*SMALL, "model.width=16", "model.n_layers=1"]
VOCAB = ConditionVocab({"drug": ("b", "a"), "dose": ("0", "0.1", "10")})


def run(*words: str) -> None:
    assert main(list(words)) == 0, words


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained autoencoder and the shards of 200 cells with drug x dose, of which one combination has none."""
    at = tmp_path_factory.mktemp("ldm")
    cells = make_cells(200, 0)
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"drug": np.array(["a", "b"])[rng.integers(0, 2, 200)]})
    obs["dose"] = np.where(obs["drug"] == "a", rng.choice(["0", "10"], 200), rng.choice(["0", "0.1"], 200))
    obs.index = pd.Index([f"cell{k}" for k in range(200)])
    var = pd.DataFrame(index=pd.Index([f"gene{k}" for k in range(cells.counts_nG.shape[1])]))
    ad.AnnData(sp.csr_matrix(cells.counts_nG.astype(np.float32)), obs=obs, var=var).write_h5ad(at / "cells.h5ad")
    run("shards", "write", f"source.paths={at}/cells.h5ad", f"out={at}/shards", "conditions=[drug,dose]",
        "block_cells=32", "split.validation=0.2", "split.test=0")  # fmt: skip
    run("train", "vae", f"data.shards={at}/shards", f"run_dir={at}/vae", *VAE)
    (at / "drugs.csv").write_text("label,x,y\na,1,0\nb,0,1\nc,0.5,0.5\n")
    return at


@pytest.mark.slow
def test_cells_are_encoded_as_they_come_and_all_conditions_reach_the_model(made: Path, capsys, monkeypatch) -> None:
    """Every option at once, from training to cells of a drug, a dose and a combination that were never trained."""
    run(
        "train", "ldm", *LDM, f"vae={made}/vae", f"data.shards={made}/shards", f"run_dir={made}/live",
        "given.policy=random", "given.n_genes=20", "given.gene_set_group=30", f"label_embeddings.drug={made}/drugs.csv",
        "model.continuous.dose=log", "model.combination_tokens=true", "model.library_size=true",
        "flow.time=logit_normal",
    )  # fmt: skip
    losses = [row["loss"] for row in read_metrics(made / "live", "train")]
    assert losses[-1] < losses[0]
    assert json.loads((made / "live" / "conditions.json").read_text())["drug"] == ["a", "b", "c"]
    at_a_time = tensors_at_a_time(monkeypatch)
    run("export", f"vae={made}/vae", f"ldm={made}/live", f"out={made}/model")
    assert len(at_a_time) > 100
    assert max(at_a_time) <= 2, "of a network of any size one tensor is in memory, and the one before it"
    model = scldm.load(made / "model")
    asked = pd.DataFrame({"drug": ["a", "b", "c", "a", "a"], "dose": ["0", "10", "0.1", "10.0", "1.5"]})
    capsys.readouterr()
    cells = model.generate(asked, seed=0)
    assert cells.n_obs == 5
    said = capsys.readouterr().err
    assert "drug=b, dose=10: this combination was not trained" in said
    assert "drug=c, dose=0.1: this combination was not trained" in said
    assert "drug=a, dose=1.5: this combination was not trained" in said
    assert said.count("was not trained") == 3
    assert "library sizes of drug=c, dose=0.1: no training cell has this combination" in said
    with pytest.raises(InputError, match=r"library sizes were fitted for drug=c"):
        model.generate(asked[["drug"]].iloc[2:3], seed=0)
    # the same cells through another autoencoder are not this model's
    run("train", "vae", f"data.shards={made}/shards", f"run_dir={made}/other", *VAE, "train.seed=1", "train.steps=4")
    assert main(["export", f"vae={made}/other", f"ldm={made}/live", f"out={made}/wrong"]) == 2
    assert "latents of another autoencoder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["all", "expressed"])
def test_encoding_as_they_come_from_whole_cells_is_what_a_latent_set_holds(made: Path, tmp_path, policy: str) -> None:
    """The same cells in the same order give the same losses, of training and of validation, but for the moments'
    precision: so the moments, too, are those of cells that are given as in training."""
    vae = made / "vae"
    if policy != "all":
        vae, given = tmp_path / "vae", [f"data.given.policy={policy}", "data.asked.policy=all"]
        run("train", "vae", f"data.shards={made}/shards", f"run_dir={vae}", *VAE, *given)
    run("encode", f"vae={vae}", f"shards={made}/shards", f"out={tmp_path}/latents", f"genes.policy={policy}")
    live = [f"data.shards={made}/shards", f"vae={vae}", f"given.policy={policy}"]
    often = ["train.steps=3", "train.log_every=1", "train.validate_every=3"]
    for name, words in (("stored", [f"data.shards={tmp_path}/latents"]), ("live", live)):
        run("train", "ldm", *LDM, *words, f"run_dir={tmp_path}/{name}", *often)
    for split in ("train", "validation"):
        stored, live = ([row["velocity_loss"] for row in read_metrics(tmp_path / n, split)] for n in ("stored", "live"))
        assert len(live) == (3 if split == "train" else 1)
        assert live == pytest.approx(stored, rel=1e-3)


@pytest.mark.slow
def test_a_validation_takes_as_many_cells_as_its_key_says_and_is_not_compared_with_others(
    made: Path, tmp_path: Path
) -> None:
    run("encode", f"vae={made}/vae", f"shards={made}/shards", f"out={tmp_path}/latents")
    small = ["train.steps=2", "train.validate_every=1", "train.global_batch=6", "hardware.micro_batch=3"]
    for name, words in (
        ("vae", ["train", "vae", *VAE, f"data.shards={made}/shards"]),
        ("stored", ["train", "ldm", *LDM, f"data.shards={tmp_path}/latents"]),
        ("live", ["train", "ldm", *LDM, f"vae={made}/vae", f"data.shards={made}/shards"]),
    ):
        words += [f"run_dir={tmp_path}/{name}", *small, *(["gate=false"] if name == "vae" else [])]
        run(*words, "train.validation_cells=10")
        run(*words, "train.validation_cells=0", "train.steps=3", "allow_changes=train.validation_cells,train.steps")
        cells = [row["cells"] for row in read_metrics(tmp_path / name, "validation")]
        assert cells == [12, 12, 40], name
        state = json.loads((tmp_path / name / "checkpoints" / "step-00000003" / "state.json").read_text())["state"]
        assert state["best"] == state["validation"]["nll" if name == "vae" else "velocity_loss"], name


@pytest.mark.slow
def test_a_run_on_a_gpu_takes_its_batches_compact_and_pinned(made: Path, monkeypatch) -> None:
    """Without being told, in both stages and in encoding; the device `meta` stands in for one, without memory."""
    there = World(0, 1, torch.device("meta"))
    still = torch.zeros(2, 4), torch.ones(2, 4)
    asked: list[torch.device] = []
    monkeypatch.setattr(train_ldm, "moments", lambda vae, every, world: (asked.append(every.device), *still)[1:])
    monkeypatch.setattr(train_ldm, "fit_means", lambda stage, every, world: asked.append(every.device))
    course, hardware = TrainConfig(global_batch=60), HardwareConfig("plain", 30)
    stream, run = f"{made}/shards", "run"
    live = TrainLDMConfig(run, StreamConfig(stream), vae=f"{made}/vae", train=course, hardware=hardware)
    vae = TrainVAEConfig(run, LoaderConfig(stream), train=course, hardware=hardware)
    for parts in (set_up(live, there), train_vae.set_up(vae, there)):
        for loader in (parts.loader, parts.validation):
            assert isinstance(loader, CellLoader)
            asked.append(loader.device)
            batch = next(loader)[0]
            assert isinstance(batch, CompactCellBatch)
            assert batch.to("meta").given.counts_BS.is_meta
            loader.close()
    assert set(asked) == {there.device}
    assert len(asked) == 6

    def shard_batches(*_, device, **__):
        asked.append(device)
        return iter(())

    monkeypatch.setattr(encode, "shard_batches", shard_batches)
    config = encode.EncodeConfig(f"{made}/vae", stream, "out")
    assert list(encode.latents(None, None, 0, config, there, None)) == []  # pyright: ignore[reportArgumentType]
    assert asked[-1] == there.device


@pytest.mark.slow
@pytest.mark.parametrize("first", [3, 160])
def test_how_many_combinations_were_not_measured_is_said(made: Path, monkeypatch, capsys, first: int) -> None:
    monkeypatch.setattr(train_ldm, "MEAN_CELLS", 0)
    monkeypatch.setattr(train_ldm, "LEAST_MEAN_CELLS", first)
    small = {"train": TrainConfig(global_batch=6), "hardware": HardwareConfig("plain", 3)}
    set_up(
        TrainLDMConfig("run", StreamConfig(f"{made}/shards"), vae=f"{made}/vae", **small),
        World(0, 1, torch.device("cpu")),
    )
    told = capsys.readouterr().err
    if first == 3:
        said = re.search(r"(\d) of 4 combinations have no cell among the first 3 training cells", told)
        assert said is not None
        assert int(said[1]) >= 1
    else:
        assert "combinations have no cell" not in told


# --- what the conditions are ---------------------------------------------------------------------------------------


def test_the_files_labels_come_behind_those_of_the_set(tmp_path: Path) -> None:
    (tmp_path / "drugs.csv").write_text("label,x,y\na,1,2\nc,3,4\nb,5,6\nNA,7,8\n")
    vocab, features = described(VOCAB, {"drug": f"{tmp_path}/drugs.csv"})
    assert vocab.labels == {"drug": ("b", "a", "c", "NA"), "dose": ("0", "0.1", "10")}
    assert features["drug"].tolist() == [[5, 6], [1, 2], [3, 4], [7, 8]]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("gene", "label,x\na,1\n", "condition 'gene' is unknown. The set has drug, dose"),
        ("drug", "label,x\na,1\n", "no vector for 'b'"),
        ("drug", "label,x\na,1\nb,2\na,3\n", "label 'a' stands twice"),
        ("drug", "label,x\na,1\nb,high\n", "not a CSV file of labels and numbers"),
        ("drug", "label,x\na,1\nb,inf\n", "not all of its numbers are finite"),
        ("drug", "label\na\nb\n", "no column of numbers"),
        ("drug", "label,x\na,1\n,3\nb,2\n", "row 3 has no label"),
        ("drug", "", "not a readable CSV file"),
        ("drug", None, "not a readable CSV file: .*No such file"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "vectors.csv").write_text(text)
    with pytest.raises(InputError, match=said) as refusal:
        described(VOCAB, {name: f"{tmp_path}/vectors.csv"})
    assert f"label_embeddings.{name}=" in str(refusal.value)


def config_of(**more) -> TrainLDMConfig:
    return TrainLDMConfig("run", StreamConfig("shards"), **more)


def test_numbers_of_a_continuous_condition() -> None:
    config = config_of(model=DiTConfig(continuous={"dose": "log"}))
    assert values_of(VOCAB, config)["dose"].tolist() == pytest.approx([0, 0.1, 10])
    for name, said in (("drug", "not all of its labels are numbers"), ("time", "no such condition. The set has drug")):
        with pytest.raises(InputError, match=f"model.continuous.{name}: {said}"):
            values_of(VOCAB, config_of(model=DiTConfig(continuous={name: "linear"})))
    both = config_of(model=DiTConfig(continuous={"dose": "log"}), label_embeddings={"dose": "file.csv"})
    with pytest.raises(InputError, match="stands in model.continuous and in label_embeddings"):
        values_of(VOCAB, both)


@pytest.mark.slow
def test_only_combinations_of_training_cells_are_known(made: Path) -> None:
    """And the moments of cells that are encoded as they come, and of their library sizes, are of the training cells."""
    config = TrainLDMConfig(
        "run", StreamConfig(f"{made}/shards"), vae=f"{made}/vae", train=TrainConfig(global_batch=60),
        hardware=HardwareConfig("plain", 30), model=DiTConfig(16, 1, 2, library_size=True),
    )  # fmt: skip
    parts = set_up(config, World(0, 1, torch.device("cpu")))
    assert isinstance(parts.module, DiT)
    assert parts.module.combinations.labels_KC.tolist() == [[0, 0], [0, 2], [1, 0], [1, 1]]
    batches = [batch for of_step in [next(parts.loader) for _ in range(3)] for batch in of_step]
    log_size = torch.cat([batch.library_size_all_B for batch in batches]).log()
    torch.testing.assert_close(
        parts.module.size.log_moments, torch.stack([log_size.mean(), log_size.std()]), atol=0.02, rtol=0.05
    )
    z = parts.module.standardise(torch.cat([parts.stage.latents(batch) for batch in batches]))
    assert z.mean().abs() < 0.05
    assert abs(z.std() - 1) < 0.1
    # and so are their means: the sum of the labels' shifts, and what they do together
    module, known = parts.module, parts.module.combinations
    assert known.interaction_KLZ is not None
    assert known.cells_K.sum() == 160
    index = torch.cat([known.index(module.label_ids(module.of_labels(batch.conditions))) for batch in batches])
    measured = module.means(dict(zip(module.n_labels, known.labels_KC.unbind(1)))) + known.interaction_KLZ
    for k in range(4):  # of the first 160, which is each training cell once
        torch.testing.assert_close(z[:160][index[:160] == k].mean(0), measured[k], atol=1e-4, rtol=0)
    assert known.interaction_KLZ.abs().max() > 0.02
    for loader in (parts.loader, parts.validation):
        loader.close()
