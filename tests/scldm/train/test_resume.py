"""A run that was stopped anywhere and started again is the run that was not stopped: to the bit, and in order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from scldm.errors import InputError
from scldm.train import saver, steps
from scldm.train.parts import Layout
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import small_run, stored

pytestmark = pytest.mark.heavy

OF_THE_MACHINE = {"time", "cells_per_s", "cells_per_s_rank", "step_s", "waiting_share", "memory_gb"}


def rows(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_metrics(run_dir)]


def assert_same_run(one: Path, other: Path) -> None:
    (state, tensors), (state_other, tensors_other) = stored(one), stored(other)
    assert state == state_other  # the hashes of all parts too: weights, both moments, EMA, buffers
    assert {key.split("/")[0] for key in tensors} >= {"weight", "ema", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(tensors[key], tensors_other[key]) for key in tensors)
    assert rows(one) == rows(other)
    best = [steps.pointed(run / "checkpoints" / "best") for run in (one, other)]
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
    before = steps.pointed(tmp_path / "checkpoints" / "latest")
    resumed = small_run(stage, tmp_path, log_every=3)
    start = 0 if before is None else int(before.name.removeprefix("step-"))
    assert (start > 0) == (stops != (3,))
    assert resumed.loader.read == order[start:]
    assert_same_run(whole, tmp_path)
    again = small_run(stage, tmp_path, log_every=3)
    assert again.loader.read == []  # all is done
    assert again.metrics == resumed.metrics


@pytest.mark.parametrize("at", ["write_a_part", "write_bytes", "os.replace", "best", "latest"])
def test_a_save_cut_short_costs_only_what_came_after_the_last_whole_one(
    uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """At the second save, of step 6: within the tensors, before the rename, before either pointer moves. Where
    it fails in the background, training ends by it; test_kills.py kills the process instead."""
    checkpoints = tmp_path / "checkpoints"
    name = {"os.replace": "replace", "best": "point", "latest": "point", "write_a_part": "write"}.get(at, at)
    holder = {"os.replace": os, "write_a_part": Layout, "write_bytes": saver}.get(at, steps)
    real = getattr(holder, name)

    def cut_short(*args, **kwargs):
        latest = steps.pointed(checkpoints / "latest")
        if latest is not None and (checkpoints / "step-00000005").exists() and (name != "point" or args[0].name == at):
            if name == "write":
                part, folder, *_ = args
                folder.mkdir()
                (folder / part.name).write_bytes(b"torn")
            raise OSError("no more")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, cut_short)
        with pytest.raises(InputError, match=r"step-00000006 could not be written \(rank 0: OSError: no more\)"):
            small_run("vae", tmp_path, log_every=3)
    state, _ = stored(tmp_path)  # whole, whatever lies beside it
    # a resume takes state["best"] for the one to beat, so the checkpoint that reached it must be kept
    if state["best"] is not None:
        assert stored(tmp_path, "best")[0]["validation"]["nll"] <= state["best"]
    small_run("vae", tmp_path, log_every=3)
    assert_same_run(uninterrupted["vae"][0], tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_an_old_checkpoint_that_can_not_be_removed_ends_nothing(
    uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("device busy")

    monkeypatch.setattr(steps, "remove", refuse)
    small_run("vae", tmp_path, log_every=3)
    assert "an old checkpoint can't be removed: device busy" in capsys.readouterr().err
    assert_same_run(uninterrupted["vae"][0], tmp_path)
