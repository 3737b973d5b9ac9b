"""A run that is continued otherwise: with keys that may change, or as a branch from one of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import training
from launch.config import compose
from launch.train_ldm import TrainLDMConfig
from launch.train_vae import TrainVAEConfig
from scldm.errors import InputError, Stopped
from scldm.parallel.engine import HardwareConfig
from scldm.train import branch as branches
from scldm.train import steps
from scldm.train.tracking import TrackingConfig, read_metrics
from tests.launch import faulty
from tests.launch.faulty import Fault, SmallConfig
from tests.scldm.train.small_runs import stored
from tests.scldm.train.test_resume import OF_THE_MACHINE

pytestmark = pytest.mark.heavy

LOW = dataclasses.replace(faulty.OPTIM, lr=3e-4)


def config(run_dir: Path, stage: str = "vae", **changes: Any) -> SmallConfig:
    train = dataclasses.replace(SmallConfig("").train, **{"keep": 9, **changes.pop("train", {})})
    return SmallConfig(str(run_dir), stage=stage, train=train, hardware=HardwareConfig("plain", 16), **changes)


def rows(run_dir: Path, after: int = 0) -> list[dict]:
    found = [row for row in read_metrics(run_dir) if row["step"] > after]
    return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in found]


def noted(run_dir: Path) -> list[dict]:
    entries = json.loads((run_dir / "changes.json").read_text())
    return [{key: value for key, value in entry.items() if key != "time"} for entry in entries]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Undisturbed runs of 16 steps, saved every 5th and where they were best: at 8 and 16."""
    folder = tmp_path_factory.mktemp("parents")
    for stage in ("vae", "ldm"):
        faulty.train(config(folder / stage, stage))
    return {stage: folder / stage for stage in ("vae", "ldm")}


# --- branches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, step", [("vae", 5), ("vae", 10), ("ldm", 10)])
def test_a_branch_without_a_change_is_its_parent_to_the_bit(
    parent: dict[str, Path], tmp_path: Path, stage: str, step: int
) -> None:
    faulty.train(config(tmp_path / "new", stage, branch_from=f"{parent[stage]}@{step}"))
    assert rows(tmp_path / "new") == rows(parent[stage], after=step)
    (state, tensors), (state_of_parent, of_parent) = stored(tmp_path / "new"), stored(parent[stage])
    own = {key: value for key, value in state.items() if key not in ("files", "parts")}
    assert own == {key: state_of_parent[key] for key in own}
    assert all(torch.equal(value, of_parent[key]) for key, value in tensors.items())
    assert noted(tmp_path / "new") == [{"step": step, "branched_from": str(parent[stage]), "changed": {}}]


def test_a_branch_with_a_lower_rate_differs_from_there_on_and_alone(parent: dict[str, Path], tmp_path: Path) -> None:
    vae, new = parent["vae"], tmp_path / "new"
    before = {path: path.read_bytes() for path in vae.rglob("*") if path.is_file()}
    faulty.train(config(new, branch_from=f"{vae}@10", optim=LOW, train={"steps": 18, "validate_every": 3}))
    assert {path: path.read_bytes() for path in before} == before
    ours, theirs = ({row["step"]: row["loss"] for row in read_metrics(run, "train")} for run in (new, vae))
    assert ours[11] == theirs[11]  # of the parent's weights
    assert all(ours[step] != theirs[step] for step in range(12, 17))
    assert sorted(ours) == list(range(11, 19))
    changed = {"optim.lr": [0.003, 0.0003], "train.steps": [16, 18], "train.validate_every": [8, 3]}
    assert noted(new) == [{"step": 10, "branched_from": str(vae), "changed": changed}]
    assert {"branch_from", "allow_changes"}.isdisjoint(json.loads((new / "config.json").read_text()))


@pytest.mark.parametrize("links", [True, False])
def test_a_branch_that_has_begun_needs_its_parent_no_more(
    parent: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(parent["vae"], old)
    if not links:
        monkeypatch.setattr(branches.os, "link", lambda source, _: os.mkdir(source))  # which fails
    with pytest.raises(Stopped):
        faulty.train(config(new, branch_from=f"{old}@10"), Fault("SIGTERM", 0, (12,)))
    files = list((new / "checkpoints" / "step-00000010").iterdir())
    assert {path.stat().st_nlink for path in files} == {1 + links}
    shutil.rmtree(old)
    faulty.train(config(new, branch_from=f"{old}@10"))  # the same command
    assert rows(new) == rows(parent["vae"], after=10)


def test_the_best_checkpoint_until_then_is_the_one_to_beat(parent: dict[str, Path], tmp_path: Path) -> None:
    old, best = tmp_path / "old", "step-00000008"
    shutil.copytree(parent["vae"], old)
    (old / "checkpoints" / "best").write_text(best)
    worse = dataclasses.replace(faulty.OPTIM, lr=1.0)
    faulty.train(config(tmp_path / "kept", branch_from=f"{old}@10", optim=worse, train={"keep": 1}))
    kept, (state, _) = tmp_path / "kept", stored(tmp_path / "kept")
    assert [path.name for path in steps.steps_in(kept / "checkpoints")] == [best, "step-00000016"]
    assert stored(kept, "best")[0]["validation"]["nll"] == state["best"] < state["validation"]["nll"]
    # of its parent, step 16 is: which one was at step 10 can't be told any more
    assert branches.find(f"{parent['vae']}@10").best is None
    faulty.train(config(tmp_path / "anew", branch_from=f"{parent['vae']}@10", optim=worse))
    assert steps.pointed(tmp_path / "anew" / "checkpoints" / "best") is not None
    faulty.train(config(tmp_path / "first", branch_from=f"{old}@best"))
    assert noted(tmp_path / "first")[0]["step"] == 8


@pytest.mark.parametrize("at", ["_link", "point"])
def test_a_branch_that_was_cut_short_has_not_begun(
    parent: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """It never trains from new weights by mistake, and begins with what is asked for then."""
    given = config(tmp_path, branch_from=f"{parent['vae']}@10")

    def cut_short(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(branches, at, cut_short)
        with pytest.raises(KeyboardInterrupt):
            faulty.train(given)
    with pytest.raises(InputError, match=r"was to branch from .*@10 and has not begun. Give branch_from=.*@10"):
        faulty.train(config(tmp_path))
    faulty.train(dataclasses.replace(given, branch_from=f"{parent['vae']}@5", optim=LOW))
    assert [entry["step"] for entry in noted(tmp_path)] == [5]
    assert rows(tmp_path)[0]["step"] == 6


def test_what_no_branch_can_begin_with_is_refused_and_makes_no_folder(parent: dict[str, Path], tmp_path: Path) -> None:
    vae, new = parent["vae"], tmp_path / "new"
    for given, said in (
        (f"{vae}", "must be RUN@STEP, with a step, latest or best, as runs/vae@15000"),
        (f"{vae}@12", "the run has no checkpoint of step 12. There are 5, 8, 10, 15, 16"),
        (f"{tmp_path}@5", "is not a run folder: it has no config.json"),
        (f"{parent['ldm']}@5", "stage was 'ldm', now 'vae'. A branch may differ in optim, train"),
    ):
        with pytest.raises(InputError, match=said):
            faulty.train(config(new, branch_from=given))
    with pytest.raises(InputError, match="train.steps=9: the run is at step 10 already"):
        faulty.train(config(new, branch_from=f"{vae}@10", train={"steps": 9}))
    assert not new.exists()
    before = {path: path.read_bytes() for path in vae.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds a run that is no branch. Choose another run_dir"):
        faulty.train(config(vae, branch_from=f"{vae}@10"))
    assert {path: path.read_bytes() for path in before} == before


def test_a_branch_of_another_parent_is_refused(parent: dict[str, Path], tmp_path: Path) -> None:
    faulty.train(config(tmp_path, branch_from=f"{parent['vae']}@latest"))
    for given in (f"{parent['vae']}@10", f"{tmp_path}@latest"):
        with pytest.raises(InputError, match=rf"is a branch from {parent['vae']}@16. Choose another run_dir"):
            faulty.train(config(tmp_path, branch_from=given))
    faulty.train(config(tmp_path, branch_from=f"{parent['vae']}@latest"))


def test_a_branch_of_a_damaged_checkpoint_is_refused(parent: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(parent["vae"], tmp_path / "old")
    (part,) = (tmp_path / "old" / "checkpoints" / "step-00000010").glob("part-*")
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="is damaged: its SHA-256"):
        faulty.train(config(tmp_path / "new", branch_from=f"{tmp_path}/old@10"))
    assert not (tmp_path / "new").exists()


def test_a_branch_on_other_data_is_refused(
    parent: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = training.data_of
    monkeypatch.setattr(training, "data_of", lambda manifest: {**found(manifest), "genes.json": {"ids": []}})
    with pytest.raises(
        InputError,
        match=r"@10 was trained on other data: data.shards has other genes \(0, not those \d+\) \(genes.json\)",
    ):
        faulty.train(config(tmp_path / "new", branch_from=f"{parent['vae']}@10"))
    assert not (tmp_path / "new").exists()


def test_a_branch_does_not_begin_with_the_model_that_its_parent_began_with(tmp_path: Path) -> None:
    given = config(tmp_path, init_from="a model that is gone", branch_from="runs/vae@10")
    assert training.start_of(given) is None


# --- allowed changes ------------------------------------------------------------------------------------------------


def test_an_allowed_change_is_noted_and_needs_no_second_word(parent: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        faulty.train(config(tmp_path), Fault("SIGTERM", 0, (9,)))
    changed = config(tmp_path, optim=LOW, train={"steps": 20})
    said = (
        "optim.lr was 0.003, now 0.0003; train.steps was 16, now 20. Choose another run_dir, or name what may change: "
    )
    with pytest.raises(InputError, match=f"{said}allow_changes=optim.lr,train.steps"):
        faulty.train(changed)
    with pytest.raises(InputError, match=r"train.steps was 16, now 20. Choose .* allow_changes=train.steps"):
        faulty.train(dataclasses.replace(changed, allow_changes=["optim.lr"]))
    assert not (tmp_path / "changes.json").exists()
    allowed = dataclasses.replace(changed, allow_changes=["optim.lr", "train.steps"])
    with pytest.raises(Stopped):
        faulty.train(allowed, Fault("SIGTERM", 0, (12,)))
    faulty.train(changed)  # the same command without the word
    assert noted(tmp_path) == [{"step": 11, "changed": {"optim.lr": [0.003, 0.0003], "train.steps": [16, 20]}}]
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == list(range(1, 21))
    assert rows(tmp_path)[:11] == rows(parent["vae"])[:11]
    with pytest.raises(InputError, match=r"optim.lr was 0.0003, now 0.003; train.steps was 20, now 16"):
        faulty.train(config(tmp_path))
    with pytest.raises(InputError, match="train.steps=16: the run is at step 20 already"):
        faulty.train(config(tmp_path, optim=LOW, allow_changes=["train.steps"]))


def test_cells_seen_go_on_where_the_batch_was_changed(parent: dict[str, Path], tmp_path: Path) -> None:
    train = {"global_batch": 32, "log_every": 2}
    faulty.train(config(tmp_path, branch_from=f"{parent['vae']}@10", train=train))
    assert [(row["step"], row["cells_seen"]) for row in read_metrics(tmp_path, "train")] == [
        (12, 224),
        (14, 288),
        (16, 352),
    ]


@pytest.mark.parametrize("kind", [TrainVAEConfig, TrainLDMConfig])
@pytest.mark.parametrize(
    "key, said",
    [
        ("model.width", "model.width can't change in a run: the weights have the shape"),
        ("model", "model.* can't change in a run: the weights have the shape"),
        ("data.seed", "data.seed can't change in a run: a run is of one set of cells, in one order"),
        ("data.shard", "no such key. Did you mean data.shards"),
    ],
)
def test_what_can_never_change_is_refused_when_named(kind: type, key: str, said: str) -> None:
    with pytest.raises(InputError, match=f"allow_changes={key}: {said}"):
        compose(kind, ["run_dir=a", "data.shards=b", f"allow_changes={key}"])


def test_groups_can_be_named() -> None:
    words = ["run_dir=a", "data.shards=b", "--allow-changes", "optim", "--allow-changes", "hardware"]
    assert compose(TrainVAEConfig, words).allow_changes == ["optim", "hardware"]


@pytest.mark.slow
def test_mlflow_has_the_branch_and_the_change(parent: dict[str, Path], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracking = TrackingConfig(every_s=1, close_s=60)
    new, given = tmp_path / "new", {"branch_from": f"{parent['vae']}@10", "tracking": tracking}
    faulty.train(config(new, **given))
    faulty.train(config(new, **given, train={"steps": 18}, allow_changes=["train.steps"]))
    client = MlflowClient(f"sqlite:///{new}/mlflow.db")
    run = client.get_run(json.loads((new / "mlflow_run.json").read_text())["run_id"])
    assert run.info.run_name == "train vae"
    assert run.data.tags["branch_from"] == given["branch_from"]
    assert run.data.tags["resumed.train.steps"] == "18"
    assert "changes.json" in [item.path for item in client.list_artifacts(run.info.run_id)]


def test_other_data_is_refused_before_anything_of_the_run_is_written(
    parent: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(parent["vae"], run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    monkeypatch.setattr(training, "data_of", lambda manifest: {"genes.json": {"of": "others"}})
    with pytest.raises(
        InputError, match=r"was trained on other data: data.shards has other genes .* \(genes.json\). Choose another"
    ):
        faulty.train(config(run, train={"steps": 20}))
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
