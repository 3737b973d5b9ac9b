"""Runs that are followed in other places than MLflow: TensorBoard, and a class of one's own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from scldm.errors import InputError
from scldm.train.follower import Follower
from scldm.train.tracking import Tracker, TrackingConfig

OURS = "tests.scldm.train.test_follower:Ours"


class Ours(Follower):
    """A place that is a file; its first two answers are errors."""

    def send(self) -> None:
        calls = self.folder / "calls"
        calls.write_text((calls.read_text() if calls.exists() else "") + ".")
        if len(calls.read_text()) <= 2:
            raise ConnectionError("https://me:secret@place is away")
        for rows in self.new_rows():
            with (self.folder / "arrived").open("a") as file:
                file.writelines(f"{row['step']} {row['loss']}\n" for row in rows)


def config(also: str, **of: float) -> TrackingConfig:
    return TrackingConfig(enabled=False, also=also, **of)  # pyright: ignore[reportArgumentType]


def test_what_a_place_missed_it_gets_once_also_from_the_next_start(tmp_path: Path, capsys) -> None:
    for start in range(4):
        with Tracker(tmp_path, config(OURS, every_s=60.0)) as tracker:
            for step in range(3 * start, 3 * start + 3):
                tracker.log(step, {"loss": step / 2})
    assert (tmp_path / "arrived").read_text() == "".join(f"{step} {step / 2}\n" for step in range(12))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4  # of two starts, why, and that it lacks rows
    assert told[0].startswith(f"tracking: {OURS} failed: https://place is away. metrics.jsonl goes on")
    assert told[1].endswith(f"All is in {tmp_path}, and the next start there sends it")


def test_it_gets_rows_while_the_run_goes_on(tmp_path: Path) -> None:
    with Tracker(tmp_path, config(OURS, every_s=0.01)) as tracker:
        tracker.log(1, {"loss": 1.0})
        for _ in range(3_000):
            if (tmp_path / "arrived").exists():
                break
            time.sleep(0.01)
        assert (tmp_path / "arrived").read_text() == "1 1.0\n"


@pytest.mark.heavy
def test_tensorboard_has_the_rows_and_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard, of the extra test")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]

    (tmp_path / "config.json").write_text(json.dumps({"optim": {"lr": 0.5}}))
    also = "scldm.train.tensorboard:TensorBoard"
    for start in range(2):
        with Tracker(tmp_path, config(also)) as tracker:
            tracker.log(2 * start, {"loss": 0.5, "kl": float("nan")}, cells_seen=64)
            tracker.log(2 * start + 1, {"nll": 7.0}, split="validation")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {
        *("train/loss", "train/cells_seen", "validation/nll", "validation/cells_seen")
    }
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(0, 0.5), (2, 0.5)]
    assert [(event.step, event.value) for event in found.Scalars("validation/nll")] == [(1, 7.0), (3, 7.0)]
    (text,) = {event.tensor_proto.string_val[0] for event in found.Tensors("config.json/text_summary")}
    assert b'"lr": 0.5' in text


@pytest.mark.parametrize(
    "also, error, why",
    [
        ("wandb", InputError, "tracking.also=wandb: give module:Class"),
        ("json:JSONDecoder", InputError, "json has no class 'JSONDecoder' that is a scldm.train.follower.Follower"),
        ("nobody_has_this:Class", InputError, "no module 'nobody_has_this' is found. PYTHONPATH must name the folder"),
        ("scldm.nobody.has:Class", InputError, "no module 'scldm.nobody' is found"),
        ("of_mine:Class", ModuleNotFoundError, "No module named 'a_package_that_it_needs'"),
    ],
)
def test_what_is_no_follower_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also: str, error, why: str
) -> None:
    (tmp_path / "of_mine.py").write_text("import a_package_that_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=why):
        Tracker(tmp_path, config(also))
