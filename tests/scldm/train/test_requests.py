"""What is asked while a run validates is heard there, and costs nothing. Many ranks ask less often."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from scldm.errors import InputError, Stopped
from scldm.parallel.dist import World
from scldm.train import requests
from scldm.train.losses import Stage
from scldm.train.parts import Layout
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


@pytest.mark.parametrize("waits", [True, False])
def test_a_save_that_begins_while_an_answer_is_on_its_way_is_not_taken_for_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """As where 128 ranks agree every few steps, and parts take longer than these."""
    apart = {**EVERY, "validate_every": 12, "save_every": 3, "keep": 9}
    small_run("vae", tmp_path / "whole", **apart)
    write, slow = Layout.write, list[Path]()

    def write_slowly(part: Layout, folder: Path, *rest: Any) -> None:
        time.sleep(0.5)
        slow.append(folder)
        write(part, folder, *rest)

    monkeypatch.setattr(Layout, "write", write_slowly)
    monkeypatch.setattr(requests, "steps_between", lambda *_: 3)
    if not waits:
        monkeypatch.setattr(requests.Requests, "save_begins", lambda _: None)
    with nullcontext() if waits else pytest.raises(InputError, match="could not be written"):
        small_run("vae", tmp_path / "run", **apart)
        assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert len(slow) == 4 or not waits


# --- many ranks ------------------------------------------------------------------------------------------------------


class Ranks:
    """As many as are many, of which two are there. A step takes some seconds, by a clock that only it moves."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, n: int = requests.MANY) -> None:
        self.now, self.told = 100.0, list[list[list[int]]]()
        monkeypatch.setattr(requests.time, "monotonic", lambda: self.now)
        self.each = [requests.Requests(folder, (), Rank(rank, n, torch.device("cpu"))) for rank in (0, 1)]
        for one in self.each:
            object.__setattr__(one.world, "begin_max", self.begin_max)

    def begin_max(self, values: list[int]) -> Any:
        if not self.told or len(self.told[-1]) == 2:
            self.told.append([])
        mine = self.told[-1]
        mine.append(values)
        return lambda: [max(one) for one in zip(*mine, strict=True)]

    def step(self, seconds: float, at_once: bool = False) -> requests.Asked:
        for one in self.each:
            one.begin(False, False)
        self.now += seconds
        one, other = [one.end(at_once) for one in self.each]
        assert one == other  # whatever is done is done by all at one step
        return one


class Rank(World):
    """Whose exchange may be taken over."""


def test_an_answer_has_few_steps_however_fast_they_are() -> None:
    n = requests.MANY
    assert [requests.steps_between(n, of) for of in (0, 1, 5, 60, 400, 3_000)] == [1, 20, 20, 16, 2, 1]
    assert requests.steps_between(n - 1, 5) == 1


def test_many_ranks_agree_once_a_second_and_at_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, monkeypatch)
    for _ in range(43):
        assert ranks.step(0.2) in (requests.Asked(), requests.Asked(save_unfinished=True))
    assert len(ranks.told) == 2 + 8 + 1  # the first two for a step each, while none knows how long one takes
    ranks.each[1].caught = signal.SIGTERM
    answers = [ranks.step(0.2) for _ in range(9)]
    assert [answer.stop for answer in answers] == [*[0] * 8, 85]  # what is on its way was told before the signal came
    assert answers[-1].reason == "SIGTERM on rank 1"


def test_what_was_not_told_yet_makes_no_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, monkeypatch)
    answers = [ranks.step(0.2).save_unfinished for _ in range(12)]
    assert answers == [False, False, *[True] * 4, False, *[True] * 4, False]


@pytest.mark.parametrize("n, seconds", [(requests.MANY - 1, 0.2), (requests.MANY, 1.1)])
def test_few_ranks_or_long_steps_agree_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, seconds: float
) -> None:
    ranks = Ranks(tmp_path, monkeypatch, n)
    for _ in range(6):
        ranks.step(seconds)
    assert len(ranks.told) == 6


@pytest.mark.parametrize("n_batches", [1, 8])
def test_the_short_batches_of_a_validation_do_not_make_long_steps_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_batches: int
) -> None:
    """And each asks."""
    ranks = Ranks(tmp_path, monkeypatch)
    for _ in range(4):
        ranks.step(0.2)
    before = len(ranks.told)
    for _ in range(n_batches):
        assert ranks.step(0.01, at_once=True) == requests.Asked()
    assert len(ranks.told) == before + n_batches - 1  # the first waits for what the steps had begun
    before = len(ranks.told)
    for _ in range(4):
        ranks.step(3.0)
    assert len(ranks.told) == before + 4


@pytest.mark.parametrize("at", [2, 5, 9])
def test_a_run_that_agrees_every_third_step_stops_and_resumes_as_one_that_was_not_stopped(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(requests, "steps_between", lambda n_ranks, step_ms: 3)

    def disturb(stage: Stage, loader: Any) -> None:
        loss = stage.loss

        def asks(model: Any, batch: Any, draws: Any) -> Any:
            if draws.step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(model, batch, draws)

        stage.loss = asks  # pyright: ignore[reportAttributeAccessIssue]

    with pytest.raises(Stopped):
        small_run("vae", tmp_path, disturb=disturb, **EVERY)
    state, _ = stored(tmp_path)
    assert at < state["step"] <= at + 6
    small_run("vae", tmp_path, **EVERY)
    assert_same_run(uninterrupted, tmp_path)


def test_a_run_that_agrees_every_third_step_still_asks_after_every_batch_of_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "steps_between", lambda n_ranks, step_ms: 3)
    seen: list[int] = []
    with pytest.raises(Stopped):
        small_run("vae", tmp_path, disturb=asking(4, lambda: os.kill(os.getpid(), signal.SIGTERM), seen), **EVERY)
    state, _ = stored(tmp_path)
    assert (state["step"], state["unvalidated"], len(seen)) == (4, True, 1)


def test_a_run_that_agrees_every_third_step_answers_a_save_once(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requests, "steps_between", lambda n_ranks, step_ms: 3)
    tmp_path.joinpath("save").touch()
    small_run("vae", tmp_path, **EVERY)
    assert capfd.readouterr().err.count("asked by the file") == 1
    assert not (tmp_path / "save").exists()
    assert_same_run(uninterrupted, tmp_path)
