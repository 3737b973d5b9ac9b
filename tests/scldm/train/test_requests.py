"""What is asked while a run validates is heard there, and costs nothing."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from scldm.errors import Stopped
from scldm.parallel.dist import World
from scldm.train import requests
from scldm.train.losses import Stage
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import small_run, stored
from tests.scldm.train.test_resume import assert_same_run

pytestmark = pytest.mark.heavy

# steps after which a pass is disturbed, besides one that does not save: one that does, and the last
EVERY: dict[str, Any] = {"steps": 12, "validate_every": 4, "save_every": 8, "log_every": 3}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "LOOK_EVERY_S", 0.0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    small_run("vae", run_dir, **EVERY)
    return run_dir


def asking(at: int, ask: Any, seen: list[int]) -> Any:
    """For small_run: asks in the first batch of the validation pass after step `at`; notes the batches computed."""

    def disturb(stage: Stage, loader: Any) -> None:
        judge = stage.validation

        def validation(model: Any, batch: Any, draw: Any) -> Any:
            if loader.step == at:
                seen.append(draw.step)
                if len(seen) == 1:
                    ask()
            return judge(model, batch, draw)

        stage.validation = validation  # pyright: ignore[reportAttributeAccessIssue]

    return disturb


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_signal_during_validation_stops_within_a_batch_and_the_pass_is_made_again(
    uninterrupted: Path, tmp_path: Path, step: int
) -> None:
    seen: list[int] = []
    disturb = asking(step, lambda: os.kill(os.getpid(), signal.SIGTERM), seen)
    with pytest.raises(Stopped) as stopped:
        small_run("vae", tmp_path, disturb=disturb, **EVERY)
    assert stopped.value.exit_code == 85
    assert len(seen) == 1  # of two batches
    state, _ = stored(tmp_path)
    assert (state["step"], state["unvalidated"]) == (step, True)
    assert [row["step"] for row in read_metrics(tmp_path, "validation")] == [*range(4, step, 4)]
    resumed = small_run("vae", tmp_path, **EVERY)
    assert [at for at, _ in resumed.loader.read] == [*range(step, 12)]
    assert_same_run(uninterrupted, tmp_path)


def test_a_stop_that_is_asked_again_before_the_pass_is_made_again_loses_nothing(
    uninterrupted: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(Stopped):
            small_run("vae", tmp_path, disturb=asking(4, (tmp_path / "stop").touch, []), **EVERY)
        assert not (tmp_path / "stop").exists()
    small_run("vae", tmp_path, **EVERY)
    assert_same_run(uninterrupted, tmp_path)


def test_a_save_that_is_asked_for_during_validation_waits_for_its_end(uninterrupted: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    small_run("vae", tmp_path, disturb=asking(4, (tmp_path / "save").touch, seen), **{**EVERY, "keep": 9})
    assert len(seen) == 2
    assert (tmp_path / "checkpoints" / "step-00000004" / "state.json").is_file()
    assert not (tmp_path / "save").exists()
    assert rows_of(tmp_path) == rows_of(uninterrupted)


def rows_of(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["split"], row.get("loss"), row.get("nll")) for row in read_metrics(run_dir)]


@pytest.mark.parametrize("pause, ends", [(0.0, False), (0.2, True)])
def test_ctrl_c_saves_and_a_second_one_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float, ends: bool
) -> None:
    """Torchrun passes on the signal that the terminal has sent to every process already."""
    monkeypatch.setattr(requests, "PATIENCE_S", 0.1)
    with requests.Requests(tmp_path, ("SIGTERM", "SIGINT"), World(0, 1, torch.device("cpu"))) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(pause)
        with pytest.raises(KeyboardInterrupt) if ends else nullcontext():
            os.kill(os.getpid(), signal.SIGINT)
    assert asked.caught == signal.SIGINT
