"""`touch RUN/profile` in a run that trains: a trace and a table of its steps, and the same run to the bit."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from scldm.train import requests
from scldm.train.losses import Stage
from scldm.train.profile import STEPS, StepProfile, part_of, table
from scldm.train.tracked import read_note
from scldm.train.tracking import Tracker, TrackingConfig
from tests.scldm.train.small_runs import ALONE, small_run
from tests.scldm.train.test_resume import assert_same_run

EVERY: dict[str, Any] = {"steps": 12, "validate_every": 8, "save_every": 8, "log_every": 3}
PARTS = [
    "waits for the cells",
    "computes micro-batch",
    "computes gradients, micro-batch",
    "updates the weights",
    "agrees on requests",
]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "LOOK_EVERY_S", 0.0)


def asked_at(run_dir: Path, step: int) -> Any:
    """For small_run: asks while the cells of a step are computed."""

    def disturb(stage: Stage, loader: Any) -> None:
        loss = stage.loss

        def asking(model: Any, batch: Any, draw: Any) -> Any:
            if draw.step == step:
                (run_dir / "profile").touch()
            return loss(model, batch, draw)

        stage.loss = asking  # pyright: ignore[reportAttributeAccessIssue]

    return disturb


@pytest.mark.heavy
def test_a_profile_is_asked_for_once_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small_run("vae", tmp_path / "plain", **EVERY)
    assert not (tmp_path / "plain" / "profiles").exists()
    run = tmp_path / "profiled"
    small_run("vae", run, disturb=asked_at(run, 1), **EVERY)
    assert_same_run(tmp_path / "plain", run)
    assert not (run / "profile").exists()
    (folder,) = (run / "profiles").iterdir()
    assert folder.name == "step-00000002"  # asked for in step 1
    assert sorted(path.name for path in folder.iterdir()) == ["parts.txt", "trace.json.gz"]
    assert f"profile of {STEPS} steps: {folder}" in capsys.readouterr().err

    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    n = {part: sum(e.get("name") == part and e["cat"] == "user_annotation" for e in events) for part in PARTS}
    assert n == dict.fromkeys(PARTS, STEPS)
    assert any("addmm" in e["name"] for e in events if e.get("cat") == "cpu_op")

    table = (folder / "parts.txt").read_text()
    shares = {part: float(re.search(rf"(?m)^{part} +[\d.]+ +([\d.]+)%", table)[1]) for part in PARTS}  # pyright: ignore[reportOptionalSubscript]
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert shares["computes micro-batch"] > 1


@pytest.mark.heavy
def test_a_validation_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its batches may be as many as thousands of steps."""
    small_run("vae", tmp_path, disturb=asked_at(tmp_path, 1), **EVERY | {"validate_every": 4})
    (folder,) = (tmp_path / "profiles").iterdir()
    assert "profile of 2 steps" in capsys.readouterr().err  # the third and the fourth
    assert "validates" not in (folder / "parts.txt").read_text()


@pytest.mark.heavy
def test_a_run_that_ends_meanwhile_keeps_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small_run("vae", tmp_path, disturb=asked_at(tmp_path, 8), **EVERY)
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == ["step-00000009"]
    assert "profile of 3 steps" in capsys.readouterr().err  # the tenth to the twelfth


def test_what_the_profiler_can_not_do_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("counters are taken")

    monkeypatch.setattr("scldm.train.profile.profile", refuse)
    small_run("vae", tmp_path, disturb=asked_at(tmp_path, 1), **EVERY)
    assert capsys.readouterr().err.count("scldm: no profile: counters are taken") == 1
    assert not (tmp_path / "profiles").exists()


def test_mlflow_is_to_get_it(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(uri="http://127.0.0.1:9", close_s=0.0)) as tracker:
        (tmp_path / "profile").touch()
        of = StepProfile(tmp_path, ALONE, tracker)
        for step in range(3, 4 + STEPS):
            of.step(step, wanted=True)
            of.mark(f"computes micro-batch 0 of step {step}")
            of.mark(f"agrees on requests after step {step}")
    note, at = read_note(tmp_path), "profiles/step-00000003"
    assert note is not None
    assert note["artifacts"] == [[f"{at}/parts.txt", at], [f"{at}/trace.json.gz", at]]


def test_parts_have_no_numbers() -> None:
    told = ["computes micro-batch 0 of step 7", "agrees on requests after validation batch 12", "validates batch 3"]
    assert [part_of(text) for text in told] == ["computes micro-batch", "agrees on requests", "validates"]


def test_a_part_is_counted_on_each_device_once() -> None:
    """With a GPU there are two rows of a name, in either order."""
    rows = [("gradients", DeviceType.CPU, 3_000, 0), ("gradients", DeviceType.CUDA, 0, 5_000)]
    rows += [("weights", DeviceType.CPU, 1_000, 0)]
    names = ("key", "device_type", "cpu_time_total", "device_time_total")

    class Averages(list[Any]):
        def table(self, **_: Any) -> str:
            return ""

    for order in (1, -1):
        events = Averages(SimpleNamespace(**dict(zip(names, row))) for row in rows[::order])
        profiler: Any = SimpleNamespace(key_averages=lambda of=events: of)
        _, gradients, weights, *_ = table(profiler, ["gradients", "weights"], 1).splitlines()
        assert gradients.split() == ["gradients", "3.00", "75.0%", "5.00"]
        assert weights.split() == ["weights", "1.00", "25.0%", "0.00"]
