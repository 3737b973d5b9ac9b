"""A run that was stopped anywhere and started again is the run that was not stopped: to the bit, and in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scldm.train import checkpoint
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import small_run

OF_THE_MACHINE = {"time", "cells_per_s", "waiting_share"}


def rows(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_metrics(run_dir)]


def final(run_dir: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    target = checkpoint.pointed(run_dir / "checkpoints" / "latest")
    assert target is not None
    state = checkpoint.read_state(target)
    return state, checkpoint.read_tensors(target, state)


def assert_same_run(one: Path, other: Path) -> None:
    (state, tensors), (state_other, tensors_other) = final(one), final(other)
    assert state == state_other  # the hashes of all parts too: weights, both moments, averages, buffers
    assert {key.split("/")[0] for key in tensors} >= {"weight", "ema", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(tensors[key], tensors_other[key]) for key in tensors)
    assert rows(one) == rows(other)
    best = [checkpoint.pointed(run / "checkpoints" / "best") for run in (one, other)]
    assert best[0] is not None and best[1] is not None  # noqa: PT018
    assert best[0].name == best[1].name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list]]:
    runs = {}
    for stage in ("vae", "ldm"):
        folder = tmp_path_factory.mktemp(stage) / "run"
        runs[stage] = (folder, small_run(stage, folder, log_every=3).loader.read)
    return runs


@pytest.mark.parametrize("stage", ["vae", "ldm"])
@pytest.mark.parametrize("stops", [(3,), (8, 13), (19,)])
def test_stopped_and_resumed_is_uninterrupted(
    uninterrupted, tmp_path: Path, stage: str, stops: tuple[int, ...]
) -> None:
    whole, order = uninterrupted[stage]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            small_run(stage, tmp_path, log_every=3, fail_at=stop)
    before = checkpoint.pointed(tmp_path / "checkpoints" / "latest")
    resumed = small_run(stage, tmp_path, log_every=3)
    start = 0 if before is None else int(before.name.removeprefix("step-"))
    assert (start > 0) == (stops != (3,))
    assert resumed.loader.read == order[start:]
    assert_same_run(whole, tmp_path)
    again = small_run(stage, tmp_path, log_every=3)
    assert again.loader.read == []  # all is done
    assert again.metrics == resumed.metrics


@pytest.mark.parametrize("at", ["save_file", "_write_synced", "os.replace", "best", "latest", "retain"])
def test_a_save_cut_short_costs_only_what_came_after_the_last_whole_one(
    uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """At the second save, of step 6: within the tensors, before the rename, before either pointer moves, before old
    ones go."""
    checkpoints = tmp_path / "checkpoints"
    holder = checkpoint.os if at == "os.replace" else checkpoint
    name = {"os.replace": "replace", "best": "point", "latest": "point"}.get(at, at)
    real = getattr(holder, name)

    def killed(*args, **kwargs):
        latest = checkpoint.pointed(checkpoints / "latest")
        if latest is not None and (checkpoints / "step-00000005").exists() and (name != "point" or args[0].name == at):
            if name == "save_file":
                Path(args[1]).write_bytes(b"torn")
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, killed)
        with pytest.raises(KeyboardInterrupt):
            small_run("vae", tmp_path, log_every=3)
    latest, best = (checkpoint.pointed(checkpoints / name) for name in ("latest", "best"))
    assert latest is not None
    state = checkpoint.read_state(latest)
    checkpoint.read_tensors(latest, state)  # whole, whatever lies beside it
    # a resume takes state["best"] for the one to beat, so the checkpoint that reached it must be kept
    if state["best"] < float("inf"):
        assert best is not None
        assert checkpoint.read_state(best)["validation"]["nll"] <= state["best"]
    small_run("vae", tmp_path, log_every=3)
    assert_same_run(uninterrupted["vae"][0], tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
